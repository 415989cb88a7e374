//! Certificates of a channel, and where it listens.

use std::{
    collections::BTreeSet,
    fmt,
    marker::PhantomData,
    net::{IpAddr, SocketAddr},
};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor, value::MapAccessDeserializer},
};
use serde_saphyr::{Location, Spanned};

use super::{
    reader::{Findings, Text},
    value::{Listen, ParseValueError},
};
use crate::{
    control::admission::{Admission, AdmissionRule, KeyringGrant, NodePattern},
    tls::{Identity, TlsFiles, files::OwnFiles},
};

/// The side that connects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientTls {
    /// Its certificate, its key, and the authorities that it trusts.
    pub files: TlsFiles,
    /// Who the server has to be, beside being at its host. Default: anybody with a certificate for the host.
    pub server_identity: Option<Identity>,
}

/// Something may not be said in clear over a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {rule}")]
pub struct PlaintextError {
    /// The setting.
    pub field: &'static str,
    rule: ParseValueError,
}

/// Where a server listens: an address, or an address with more.
#[derive(Debug)]
pub(super) enum RawListener<F> {
    Address(String),
    Full(F),
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawServer {
    address: Option<Text>,
    tls: Option<Spanned<RawServerTls>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawDiscovery {
    address: Option<Text>,
    tls: Option<Spanned<RawServerTls>>,
    allow: Option<Spanned<Vec<Spanned<RawRule>>>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawServerTls {
    cert: Option<Text>,
    key: Option<Text>,
    client_ca: Option<Text>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRule {
    identity: Option<Text>,
    keyrings: Option<Spanned<Vec<Text>>>,
    node: Option<Text>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawClientTls {
    ca: Option<Text>,
    cert: Option<Text>,
    key: Option<Text>,
    server_identity: Option<Text>,
}

/// A server as it stands in the file.
#[derive(Debug, Default)]
pub(super) struct ServerParts {
    pub(super) address: Option<Text>,
    pub(super) tls: Option<TlsFiles>,
}

/// The most rules: more say that patterns would be better.
const MAX_RULES: usize = 1_000;
/// Why a server that takes keys or hands them out may not listen beyond this machine.
const PLAINTEXT_LISTENER: ParseValueError = ParseValueError::new(
    "without `tls` only this machine may connect: use 127.0.0.1 or [::1], or give it `tls`",
);
/// Who may open a Unix socket is said by the mode of its directory.
const UNIX_TLS: ParseValueError =
    ParseValueError::new("a Unix socket never leaves this machine: remove `tls`");
/// Why a client may not say what it has to say.
const PLAINTEXT_CLIENT: ParseValueError = ParseValueError::new(
    "http:// is for this machine only (127.0.0.1, [::1] or localhost): use https:// for another",
);

/// The one rule about plaintext: nothing that takes, hands out or checks keys listens on an address that other machines
/// reach, unless over TLS.
///
/// # Errors
///
/// When it would.
pub fn refuse_plaintext_listener(
    field: &'static str,
    address: IpAddr,
    has_tls: bool,
) -> Result<(), PlaintextError> {
    if has_tls || address.is_loopback() {
        Ok(())
    } else {
        let rule = PLAINTEXT_LISTENER;
        Err(PlaintextError { field, rule })
    }
}

/// The same of whoever connects to `host`.
///
/// # Errors
///
/// When what it says would cross a network in clear.
pub fn refuse_plaintext_client(host: &str, has_tls: bool) -> Result<(), ParseValueError> {
    if has_tls || super::value::is_loopback(host) {
        Ok(())
    } else {
        Err(PLAINTEXT_CLIENT)
    }
}

impl PlaintextError {
    pub(super) const fn rule(&self) -> ParseValueError {
        self.rule
    }
}

impl RawListener<RawServer> {
    /// Its parts; the address has the place of the whole where that is all there is.
    pub(super) fn into_parts(
        listener: Option<Spanned<Self>>,
        field: &str,
        found: &mut Findings,
    ) -> ServerParts {
        match listener.map(|listener| (listener.referenced, listener.value)) {
            None => ServerParts::default(),
            Some((place, Self::Address(text))) => ServerParts::at(place, text),
            Some((_, Self::Full(raw))) => ServerParts {
                address: raw.address,
                tls: raw
                    .tls
                    .and_then(|tls| server_files(&tls, field, false, found)),
            },
        }
    }
}

impl RawListener<RawDiscovery> {
    /// Its parts, and who may subscribe.
    pub(super) fn into_parts(
        listener: Option<Spanned<Self>>,
        field: &str,
        found: &mut Findings,
    ) -> (ServerParts, Admission) {
        match listener.map(|listener| (listener.referenced, listener.value)) {
            None => (ServerParts::default(), Admission::Local),
            Some((place, Self::Address(text))) => (ServerParts::at(place, text), Admission::Local),
            Some((place, Self::Full(raw))) => {
                let admission = admission(place, raw.allow, raw.tls.is_some(), found);
                let tls = raw
                    .tls
                    .and_then(|tls| server_files(&tls, field, true, found));
                let address = raw.address;
                (ServerParts { address, tls }, admission)
            }
        }
    }
}

impl ServerParts {
    /// The address, where it is given and may be listened on.
    pub(super) fn address(&self, field: &'static str, found: &mut Findings) -> Option<SocketAddr> {
        found.parse(field, self.address.as_ref(), |text| {
            let address = super::value::address(text)?;
            refuse_plaintext_listener(field, address.ip(), self.tls.is_some())
                .map_err(|error| error.rule())?;
            Ok::<_, ParseValueError>(address)
        })
    }

    /// The same of a server that may also listen on a Unix socket.
    pub(super) fn listen(&self, found: &mut Findings) -> Option<Listen> {
        let has_tls = self.tls.is_some();
        found.parse("listen", self.address.as_ref(), |text| {
            let listen: Listen = text.parse()?;
            if let Some(ip) = listen.ip() {
                refuse_plaintext_listener("listen", ip, has_tls).map_err(|error| error.rule())?;
            } else if has_tls {
                return Err(UNIX_TLS);
            }
            Ok::<_, ParseValueError>(listen)
        })
    }

    fn at(place: Location, text: String) -> Self {
        Self {
            address: Some(Spanned::new(text, place, place)),
            tls: None,
        }
    }
}

impl ClientTls {
    /// None when something is missing, which was noted then.
    pub(super) fn from_raw(raw: &Spanned<RawClientTls>, found: &mut Findings) -> Option<Self> {
        const FIELD: &str = "control.tls";
        let mut file = |name: &str, text: Option<&Text>, what: &str| {
            let field = format!("{FIELD}.{name}");
            if text.is_none() {
                found.note(
                    raw.referenced,
                    &field,
                    format_args!("is missing, name {what}"),
                );
            }
            found.path(field, text)
        };
        let raw_files = &raw.value;
        let ca = file(
            "ca",
            raw_files.ca.as_ref(),
            "the authorities of the control plane",
        );
        let cert = file(
            "cert",
            raw_files.cert.as_ref(),
            "the certificate of this sidecar",
        );
        let key = file("key", raw_files.key.as_ref(), "the key of its certificate");
        let server_identity = found.parse(
            format_args!("{FIELD}.server_identity"),
            raw_files.server_identity.as_ref(),
            str::parse,
        );
        Some(Self {
            files: TlsFiles {
                own: Some(OwnFiles {
                    cert: cert?,
                    key: key?,
                }),
                ca: Some(ca?),
            },
            server_identity,
        })
    }
}

fn server_files(
    raw: &Spanned<RawServerTls>,
    field: &str,
    is_mutual: bool,
    found: &mut Findings,
) -> Option<TlsFiles> {
    let mut file = |name: &str, text: Option<&Text>, what: Option<&str>| {
        let field = format!("{field}.tls.{name}");
        if let (None, Some(what)) = (text, what) {
            found.note(
                raw.referenced,
                &field,
                format_args!("is missing, name {what}"),
            );
        }
        found.path(field, text)
    };
    let files = &raw.value;
    let cert = file(
        "cert",
        files.cert.as_ref(),
        Some("the certificate of this server"),
    );
    let key = file(
        "key",
        files.key.as_ref(),
        Some("the key of its certificate"),
    );
    let authorities = is_mutual.then_some("the authorities of the sidecars' certificates");
    let ca = file("client_ca", files.client_ca.as_ref(), authorities);
    Some(TlsFiles {
        own: Some(OwnFiles {
            cert: cert?,
            key: key?,
        }),
        ca,
    })
}

fn admission(
    place: Location,
    raw: Option<Spanned<Vec<Spanned<RawRule>>>>,
    has_tls: bool,
    found: &mut Findings,
) -> Admission {
    const FIELD: &str = "discovery.allow";
    let raw = match (raw, has_tls) {
        (Some(raw), true) if !raw.value.is_empty() => raw,
        (raw, true) => {
            let place = raw.map_or(place, |raw| raw.referenced);
            found.note(
                place,
                FIELD,
                "is missing, say who may subscribe to what, such as \
                 [{ identity: \"spiffe://mesh.example/relatch/edge-1\", keyrings: [payments] }]",
            );
            return Admission::Rules(Vec::new());
        }
        (Some(raw), false) => {
            found.note(
                raw.referenced,
                FIELD,
                "needs `discovery.tls`: without certificates nobody has an identity",
            );
            return Admission::Local;
        }
        (None, false) => return Admission::Local,
    };
    found.bound(FIELD, &raw, MAX_RULES);
    let rules = raw.value.into_iter().take(MAX_RULES).enumerate();
    let rules = rules.filter_map(|(at, raw)| rule(&format!("{FIELD}[{at}]"), &raw, found));
    Admission::Rules(rules.collect())
}

fn rule(field: &str, raw: &Spanned<RawRule>, found: &mut Findings) -> Option<AdmissionRule> {
    let place = raw.referenced;
    let raw = &raw.value;
    if raw.identity.is_none() {
        let field = format_args!("{field}.identity");
        found.note(place, field, "is missing, name the URI of a certificate");
    }
    let identity = found.parse(format_args!("{field}.identity"), raw.identity.as_ref(), |text| {
        text.parse().map_err(|_| {
            "use a URI such as spiffe://mesh.example/relatch/edge-1; a * may stand for its last path segment"
        })
    });
    let node = found.parse(format_args!("{field}.node"), raw.node.as_ref(), str::parse);
    let names = raw.keyrings.as_ref().map(|list| list.value.as_slice());
    let keyrings = match names {
        None | Some([]) => {
            let field = format_args!("{field}.keyrings");
            found.note(
                place,
                field,
                "is missing, name keyrings, or \"*\" for all of them",
            );
            None
        }
        Some([all]) if all.value == "*" => Some(KeyringGrant::All),
        Some(names) => {
            let mut of = BTreeSet::new();
            for (at, name) in names.iter().enumerate() {
                let field = format_args!("{field}.keyrings[{at}]");
                of.extend(found.parse(field, Some(name), str::parse));
            }
            Some(KeyringGrant::Of(of))
        }
    };
    Some(AdmissionRule {
        identity: identity?,
        keyrings: keyrings?,
        nodes: node.unwrap_or(NodePattern::LastSegment),
    })
}

impl<'de, F: Deserialize<'de>> Deserialize<'de> for RawListener<F> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ListenerVisitor(PhantomData))
    }
}

struct ListenerVisitor<F>(PhantomData<F>);

impl<'de, F: Deserialize<'de>> Visitor<'de> for ListenerVisitor<F> {
    type Value = RawListener<F>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an address, or `address` and `tls`")
    }

    fn visit_str<E>(self, text: &str) -> Result<Self::Value, E> {
        Ok(RawListener::Address(text.to_owned()))
    }

    fn visit_u64<E>(self, number: u64) -> Result<Self::Value, E> {
        Ok(RawListener::Address(number.to_string()))
    }

    fn visit_i64<E>(self, number: i64) -> Result<Self::Value, E> {
        Ok(RawListener::Address(number.to_string()))
    }

    fn visit_f64<E>(self, number: f64) -> Result<Self::Value, E> {
        Ok(RawListener::Address(number.to_string()))
    }

    fn visit_bool<E>(self, value: bool) -> Result<Self::Value, E> {
        Ok(RawListener::Address(value.to_string()))
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
        F::deserialize(MapAccessDeserializer::new(map)).map(RawListener::Full)
    }
}
