//! The keyrings to which a sidecar may subscribe: rules of the configuration for the identities of
//! certificates and tokens.
//!
//! A subscription that no rule allows is refused. A rule also determines under which node ids an
//! identity may appear, so that a sidecar on a compromised machine cannot ack, report or say
//! Goodbye as another. Without `node` in the rule, the node id must be the last path segment of the
//! identity. If many sidecars share an identity, like those of a Kubernetes service account, a node
//! id belongs to the identity that holds it as long as the fleet knows it (`control/fleet`).

use std::{collections::BTreeSet, fmt, path::PathBuf, str::FromStr, sync::Arc};

use crate::{
    key::KeyringName,
    node_name::NodeName,
    parse::ParseValueError,
    tls::{Identity, IdentityPattern, Peer},
};

/// The sidecars that may subscribe.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Admission {
    /// Every process that can connect: only processes on this machine can.
    #[default]
    Local,
    /// The sidecars that a rule names.
    Rules(Vec<AdmissionRule>),
}

/// The rights of some identities.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdmissionRule {
    /// The identities that the rule is for.
    pub(crate) identity: IdentityPattern,
    /// The keyrings to which they may subscribe.
    pub(crate) keyrings: KeyringGrant,
    /// The node ids under which they may appear.
    pub(crate) nodes: NodePattern,
}

/// A set of keyrings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum KeyringGrant {
    /// Every keyring, also one that is created later.
    All,
    /// The keyrings with these names.
    Of(BTreeSet<KeyringName>),
}

/// A set of node ids.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) enum NodePattern {
    /// The last path segment of the identity.
    #[default]
    LastSegment,
    /// This node id.
    Exactly(NodeName),
    /// The node ids that begin with this text; all for an empty text.
    Beginning(String),
}

/// A file with a token, and the identity of the token.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BearerFile {
    pub(crate) path: PathBuf,
    /// The identity of a sidecar that presents the token.
    pub(crate) identity: Identity,
}

/// The rights of a sidecar that was admitted.
#[derive(Clone, Debug)]
pub(crate) struct Admitted<'a> {
    identity: Option<&'a Identity>,
    rules: Vec<&'a AdmissionRule>,
}

/// A sidecar that has a stream, for which its rights are read again.
#[derive(Clone, Debug)]
pub(crate) struct Audience {
    pub(crate) admission: Arc<Admission>,
    pub(crate) peer: Peer,
    /// The node id of the sidecar.
    pub(crate) node: String,
}

/// The reason of a refusal. Its text is for both sides.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
    /// The sidecar has no identity.
    #[error("this control plane requires a certificate with an identity, or a token")]
    Nobody,
    /// No rule names the identity.
    #[error(
        "no rule of `discovery.allow` names the identity {identity}: add one with its keyrings"
    )]
    Unknown {
        /// The identity of the sidecar.
        identity: Identity,
    },
    /// The identity may not appear as this node.
    #[error(
        "the identity {identity} may not appear as node {node}: rules of `discovery.allow` let it be {allowed}; \
         correct `node.id` of the sidecar, or add `node` to the rule"
    )]
    OtherNode {
        /// The identity of the sidecar.
        identity: Identity,
        /// The node id that the sidecar reports.
        node: String,
        /// The node ids that the rules allow.
        allowed: String,
    },
    /// Another identity holds this node id.
    #[error(
        "the identity {identity} may not appear as node {node}: another identity does, for as long as one of its processes may serve"
    )]
    Taken {
        /// The identity of the sidecar.
        identity: String,
        /// The node id that the sidecar reports.
        node: String,
    },
    /// The run has opened a later stream.
    #[error("a later stream of this run has begun")]
    Late,
    /// The run has ended.
    #[error("this run has ended: another process holds its lock, or it has said Goodbye")]
    Ended,
    /// No rule allows the identity this keyring.
    #[error("no rule of `discovery.allow` lets the identity {identity} subscribe to {keyring}")]
    Keyring {
        /// The identity of the sidecar.
        identity: Identity,
        /// The name of the keyring.
        keyring: String,
    },
}

impl Admission {
    /// Returns the identity of `peer`, unless every process on this machine is admitted.
    #[must_use]
    pub(crate) const fn counts<'a>(&self, peer: &'a Peer) -> Option<&'a Identity> {
        match self {
            Self::Local => None,
            Self::Rules(_) => peer.identity.as_ref(),
        }
    }

    /// Returns the rights of `peer` as `node`.
    ///
    /// # Errors
    ///
    /// When no rule names the identity of `peer`, or none allows it this node.
    pub(crate) fn admit<'a>(&'a self, peer: &'a Peer, node: &str) -> Result<Admitted<'a>, Refusal> {
        let rules = match self {
            Self::Local => {
                return Ok(Admitted {
                    identity: None,
                    rules: Vec::new(),
                });
            }
            Self::Rules(rules) => rules,
        };
        let identity = peer.identity.as_ref().ok_or(Refusal::Nobody)?;
        let of_identity: Vec<_> = rules
            .iter()
            .filter(|rule| rule.identity.matches(identity))
            .collect();
        if of_identity.is_empty() {
            return Err(Refusal::Unknown {
                identity: identity.clone(),
            });
        }
        let rules: Vec<_> = of_identity
            .iter()
            .copied()
            .filter(|rule| rule.nodes.matches(identity, node))
            .collect();
        if rules.is_empty() {
            let allowed: BTreeSet<_> = of_identity
                .iter()
                .map(|rule| rule.nodes.describe(identity))
                .collect();
            return Err(Refusal::OtherNode {
                identity: identity.clone(),
                node: node.to_owned(),
                allowed: allowed.into_iter().collect::<Vec<_>>().join(" or "),
            });
        }
        Ok(Admitted {
            identity: Some(identity),
            rules,
        })
    }
}

impl Audience {
    /// Returns the rights of the sidecar.
    ///
    /// # Errors
    ///
    /// As [`Admission::admit`].
    pub(crate) fn admitted(&self) -> Result<Admitted<'_>, Refusal> {
        self.admission.admit(&self.peer, &self.node)
    }
}

impl Admitted<'_> {
    /// Checks that the sidecar may subscribe to a keyring.
    ///
    /// # Errors
    ///
    /// When no rule allows it.
    pub(crate) fn subscribe(&self, keyring: &str) -> Result<(), Refusal> {
        let Some(identity) = self.identity else {
            return Ok(());
        };
        if self.rules.iter().any(|rule| rule.keyrings.has(keyring)) {
            Ok(())
        } else {
            Err(Refusal::Keyring {
                identity: identity.clone(),
                keyring: keyring.to_owned(),
            })
        }
    }
}

impl KeyringGrant {
    fn has(&self, keyring: &str) -> bool {
        match self {
            Self::All => true,
            Self::Of(names) => names.iter().any(|name| name.as_str() == keyring),
        }
    }
}

impl NodePattern {
    fn matches(&self, identity: &Identity, node: &str) -> bool {
        match self {
            Self::LastSegment => node == identity.last_segment(),
            Self::Exactly(name) => node == name.as_str(),
            Self::Beginning(text) => node.starts_with(text.as_str()),
        }
    }

    fn describe(&self, identity: &Identity) -> String {
        match self {
            Self::LastSegment => identity.last_segment().to_owned(),
            Self::Exactly(_) | Self::Beginning(_) => self.to_string(),
        }
    }
}

/// Parses a node id, or the beginning of node ids followed by `*`.
impl FromStr for NodePattern {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let Some(beginning) = text.strip_suffix('*') else {
            return text.parse().map(Self::Exactly);
        };
        if !beginning.is_empty() {
            let _: NodeName = beginning.parse()?;
        }
        Ok(Self::Beginning(beginning.to_owned()))
    }
}

impl fmt::Display for NodePattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LastSegment => f.write_str("the last segment of the identity"),
            Self::Exactly(name) => name.fmt(f),
            Self::Beginning(text) => write!(f, "{text}*"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PAYMENTS: &str = "spiffe://mesh/ns/payments/sa/web";
    const EDGE: &str = "spiffe://mesh/relatch/edge-1";

    fn rule(identity: &str, keyrings: &[&str], nodes: Option<&str>) -> AdmissionRule {
        AdmissionRule {
            identity: identity.parse().expect("a pattern"),
            keyrings: match keyrings {
                ["*"] => KeyringGrant::All,
                names => KeyringGrant::Of(
                    names
                        .iter()
                        .map(|name| name.parse().expect("a name"))
                        .collect(),
                ),
            },
            nodes: nodes.map_or(NodePattern::LastSegment, |text| {
                text.parse().expect("a node")
            }),
        }
    }

    fn admission() -> Admission {
        Admission::Rules(vec![
            rule(
                "spiffe://mesh/ns/payments/sa/*",
                &["payments", "partners"],
                Some("*"),
            ),
            rule(EDGE, &["*"], None),
            rule("spiffe://mesh/relatch/*", &["demo"], Some("spare-*")),
        ])
    }

    fn peer(identity: &str) -> Peer {
        Peer {
            identity: Some(identity.parse().expect("an identity")),
            not_after: None,
        }
    }

    fn may(identity: &str, node: &str, keyring: &str) -> Result<(), Refusal> {
        admission()
            .admit(&peer(identity), node)
            .and_then(|admitted| admitted.subscribe(keyring))
    }

    #[test]
    fn a_rule_gives_its_keyrings_and_no_others() {
        assert_eq!(may(PAYMENTS, "pod-1", "payments"), Ok(()));
        assert_eq!(may(EDGE, "edge-1", "anything"), Ok(()));
        let refusal = may(PAYMENTS, "pod-1", "demo").expect_err("another keyring");
        assert_eq!(
            refusal.to_string(),
            format!("no rule of `discovery.allow` lets the identity {PAYMENTS} subscribe to demo")
        );
    }

    #[test]
    fn who_is_in_no_rule_gets_nothing() {
        let refusal = may("spiffe://mesh/other", "other", "demo").expect_err("in no rule");
        assert_eq!(
            refusal.to_string(),
            "no rule of `discovery.allow` names the identity spiffe://mesh/other: add one with its keyrings"
        );
        let nobody = Peer::default();
        let refused = admission().admit(&nobody, "edge-1").map(|_| ());
        assert_eq!(refused, Err(Refusal::Nobody));
        assert!(
            Admission::Rules(Vec::new())
                .admit(&peer(EDGE), "edge-1")
                .is_err()
        );
    }

    #[test]
    fn a_node_appears_as_itself() {
        assert_eq!(may(EDGE, "edge-1", "demo"), Ok(()));
        let refusal = may(EDGE, "edge-2", "demo")
            .expect_err("another node")
            .to_string();
        assert!(
            refusal.contains("may not appear as node edge-2"),
            "{refusal}"
        );
        assert!(
            refusal.contains("let it be edge-1 or spare-*;"),
            "{refusal}"
        );
    }

    #[test]
    fn a_rule_that_a_node_id_does_not_fit_gives_nothing() {
        assert_eq!(may(EDGE, "spare-1", "demo"), Ok(()));
        assert!(
            may(EDGE, "spare-1", "payments").is_err(),
            "that is of the other rule"
        );
    }

    #[test]
    fn on_this_machine_everybody_may_everything() {
        let nobody = Peer::default();
        let admitted = Admission::Local.admit(&nobody, "x").expect("everybody may");
        assert_eq!(admitted.subscribe("payments"), Ok(()));
        assert_eq!(Admission::Local.counts(&peer(EDGE)), None);
        assert!(admission().counts(&peer(EDGE)).is_some());
    }
}
