//! The TLS settings and addresses of the channels, and the rules of admission to discovery.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    marker::PhantomData,
    net::SocketAddr,
    path::PathBuf,
};

use serde::{
    Deserialize, Deserializer,
    de::{MapAccess, Visitor, value::MapAccessDeserializer},
};
use serde_saphyr::{Location, Spanned};

use super::{
    plaintext::refuse_plaintext_listener,
    reader::{Findings, Text},
    value::Listen,
};
use crate::{
    admission::{Admission, AdmissionRule, BearerFile, KeyringGrant, NodePattern},
    parse::ParseValueError,
    tls::{Authorities, Identity, TlsFiles, TrustDomain, domain_text, files::OwnFiles},
};

/// The TLS settings of a client.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ClientTls {
    /// The certificate and key, unless there is a token, and the authorities of the server.
    pub(crate) files: TlsFiles,
    /// The identity that the certificate of the server needs in addition to the host name. Default: any.
    pub(crate) server_identity: Option<Identity>,
    /// The file of the token that is sent instead of a certificate.
    pub(crate) token_file: Option<PathBuf>,
}

/// The address of a server, alone or as one field among others.
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
    tokens: Option<Spanned<Vec<Spanned<RawToken>>>>,
    allow: Option<Spanned<Vec<Spanned<RawRule>>>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawServerTls {
    cert: Option<Text>,
    key: Option<Text>,
    client_ca: Option<Text>,
    bundles: Option<RawBundles>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawToken {
    file: Option<Text>,
    identity: Option<Text>,
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
    bundles: Option<RawBundles>,
    cert: Option<Text>,
    key: Option<Text>,
    token_file: Option<Text>,
    server_identity: Option<Text>,
}

/// Files of authorities by the name of their trust domain.
type RawBundles = Spanned<BTreeMap<String, Text>>;

/// The address and TLS files of a server.
#[derive(Debug, Default)]
pub(super) struct ServerParts {
    pub(super) address: Option<Text>,
    pub(super) tls: Option<TlsFiles>,
}

/// The settings of discovery.
#[derive(Debug)]
pub(super) struct DiscoveryParts {
    pub(super) server: ServerParts,
    pub(super) tokens: Vec<BearerFile>,
    pub(super) admission: Admission,
}

/// The most tokens: every file is read every two seconds, and an operator of more sidecars has a tool that issues
/// certificates.
const MAX_TOKENS: usize = 100;
/// The most bundles: each file is read every two seconds, and a mesh that trusts more domains needs a broker between them.
const MAX_BUNDLES: usize = 32;
/// The most rules: patterns suit better where there are more.
const MAX_RULES: usize = 1_000;
/// The problem of TLS on a Unix socket. The mode of the directory determines who may open the socket.
const UNIX_TLS: ParseValueError =
    ParseValueError::new("a Unix socket never leaves this machine: remove `tls`");

impl RawListener<RawServer> {
    /// Splits the settings into parts. An address that stands alone has the place of the whole.
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
                    .and_then(|tls| server_files(&tls, field, ClientAuthorities::Optional, found)),
            },
        }
    }
}

impl RawListener<RawDiscovery> {
    /// Splits the settings into parts.
    pub(super) fn into_parts(
        listener: Option<Spanned<Self>>,
        field: &str,
        found: &mut Findings,
    ) -> DiscoveryParts {
        let (place, raw) = match listener.map(|listener| (listener.referenced, listener.value)) {
            None => return DiscoveryParts::local(ServerParts::default()),
            Some((place, Self::Address(text))) => {
                return DiscoveryParts::local(ServerParts::at(place, text));
            }
            Some((place, Self::Full(raw))) => (place, raw),
        };
        let identities = identities(raw.allow.as_ref());
        let admission = admission(place, raw.allow, raw.tls.is_some(), found);
        let authorities = match &raw.tokens {
            None => ClientAuthorities::Needed("the authorities of the sidecars' certificates"),
            Some(_) => ClientAuthorities::Unused(
                "cannot be used together with `discovery.tokens`, with which sidecars present no certificates",
            ),
        };
        let tokens = raw.tokens.map_or_else(Vec::new, |tokens| {
            if raw.tls.is_none() {
                let field = format!("{field}.tokens");
                found.note(
                    tokens.referenced,
                    field,
                    "needs `discovery.tls`: a token must not be sent in plaintext",
                );
            }
            bearer_files(tokens, &format!("{field}.tokens"), found)
        });
        let tls = raw
            .tls
            .and_then(|tls| server_files(&tls, field, authorities, found));
        if let Some(ca) = tls.as_ref().and_then(|tls| tls.ca.as_ref()) {
            check_domains(&identities, ca, found);
        }
        DiscoveryParts {
            server: ServerParts {
                address: raw.address,
                tls,
            },
            tokens,
            admission,
        }
    }
}

impl DiscoveryParts {
    const fn local(server: ServerParts) -> Self {
        Self {
            server,
            tokens: Vec::new(),
            admission: Admission::Local,
        }
    }
}

impl ServerParts {
    /// The address, if it is given and allowed.
    pub(super) fn address(&self, field: &'static str, found: &mut Findings) -> Option<SocketAddr> {
        found.parse(field, self.address.as_ref(), |text| {
            let address = super::value::address(text)?;
            refuse_plaintext_listener(field, address.ip(), self.tls.is_some())
                .map_err(|error| error.rule())?;
            Ok::<_, ParseValueError>(address)
        })
    }

    /// The same for a server that may also listen on a Unix socket.
    pub(super) fn listen(&self, field: &'static str, found: &mut Findings) -> Option<Listen> {
        let has_tls = self.tls.is_some();
        found.parse(field, self.address.as_ref(), |text| {
            let listen: Listen = text.parse()?;
            if let Some(ip) = listen.ip() {
                refuse_plaintext_listener(field, ip, has_tls).map_err(|error| error.rule())?;
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
    /// None if something is missing or wrong, which is then noted.
    pub(super) fn from_raw(raw: &Spanned<RawClientTls>, found: &mut Findings) -> Option<Self> {
        const FIELD: &str = "control.tls";
        let mut file = |name: &str, text: Option<&Text>, what: Option<&str>| {
            let field = format!("{FIELD}.{name}");
            if let (None, Some(what)) = (text, what) {
                found.note(
                    raw.referenced,
                    &field,
                    format_args!("is missing, name {what}"),
                );
            }
            found.path(field, text)
        };
        let raw_files = &raw.value;
        let is_needed = raw_files.bundles.is_none();
        let ca = file(
            "ca",
            raw_files.ca.as_ref(),
            is_needed.then_some("the authorities of the control plane"),
        );
        let has_token = raw_files.token_file.is_some();
        let needed = |what| (!has_token).then_some(what);
        let cert = file(
            "cert",
            raw_files.cert.as_ref(),
            needed("the certificate of this sidecar"),
        );
        let key = file(
            "key",
            raw_files.key.as_ref(),
            needed("the key of its certificate"),
        );
        let token_file = file("token_file", raw_files.token_file.as_ref(), None);
        let server_identity = found.parse(
            format_args!("{FIELD}.server_identity"),
            raw_files.server_identity.as_ref(),
            str::parse,
        );
        let flat = raw_files.ca.as_ref().map(|_| "ca");
        let bundles = raw_files.bundles.as_ref();
        let bundles = bundles.and_then(|bundles| read_bundles(bundles, FIELD, flat, found));
        if let Some(bundles) = &bundles {
            check_server_identity(raw, server_identity.as_ref(), bundles, found);
        }
        let ca = ca
            .map(Authorities::Flat)
            .or(bundles.map(Authorities::Bundles));
        let own = if has_token {
            for (name, text) in [("cert", &raw_files.cert), ("key", &raw_files.key)] {
                if let Some(text) = text {
                    let field = format_args!("{FIELD}.{name}");
                    let why = "cannot be used together with `token_file`: remove one of the two";
                    found.note(text.referenced, field, why);
                }
            }
            None
        } else {
            Some(OwnFiles {
                cert: cert?,
                key: key?,
            })
        };
        Some(Self {
            files: TlsFiles { own, ca: Some(ca?) },
            server_identity,
            token_file,
        })
    }
}

/// Whether a server needs the authorities of its clients.
#[derive(Clone, Copy)]
enum ClientAuthorities {
    /// With the words for them in an error.
    Needed(&'static str),
    Optional,
    /// With the reason.
    Unused(&'static str),
}

fn server_files(
    raw: &Spanned<RawServerTls>,
    field: &str,
    authorities: ClientAuthorities,
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
    let needed = match authorities {
        ClientAuthorities::Needed(what) => files.bundles.is_none().then_some(what),
        ClientAuthorities::Optional | ClientAuthorities::Unused(_) => None,
    };
    let ca = file("client_ca", files.client_ca.as_ref(), needed);
    let flat = files.client_ca.as_ref().map(|_| "client_ca");
    let bundles = files.bundles.as_ref();
    let parent = format!("{field}.tls");
    let bundles_read = bundles.and_then(|bundles| read_bundles(bundles, &parent, flat, found));
    if let ClientAuthorities::Unused(why) = authorities {
        let places = [
            (
                "client_ca",
                files.client_ca.as_ref().map(|text| text.referenced),
            ),
            ("bundles", bundles.map(|bundles| bundles.referenced)),
        ];
        for (name, place) in places {
            if let Some(place) = place {
                let why = format_args!("{why}: remove one of the two");
                found.note(place, format!("{parent}.{name}"), why);
            }
        }
    }
    let ca = ca
        .map(Authorities::Flat)
        .or(bundles_read.map(Authorities::Bundles));
    Some(TlsFiles {
        own: Some(OwnFiles {
            cert: cert?,
            key: key?,
        }),
        ca,
    })
}

/// The file of each trust domain; none if a problem was noted. `flat` is the field with the authorities of all domains, if
/// that is given too.
fn read_bundles(
    raw: &RawBundles,
    parent: &str,
    flat: Option<&str>,
    found: &mut Findings,
) -> Option<BTreeMap<TrustDomain, PathBuf>> {
    let field = format!("{parent}.bundles");
    let problem = if let Some(flat) = flat {
        format!("cannot be used together with `{flat}`: remove one of the two")
    } else if raw.value.is_empty() {
        "is empty, name the authorities of each trust domain, such as { mesh.example: mesh.pem }"
            .to_owned()
    } else if raw.value.len() > MAX_BUNDLES {
        let entries = raw.value.len();
        format!("has {entries} entries, use at most {MAX_BUNDLES}")
    } else {
        let mut bundles = BTreeMap::new();
        for (name, path) in &raw.value {
            let field = format!("{field}.{name}");
            let domain = name.parse();
            if let Err(error) = &domain {
                found.note(path.referenced, &field, error);
            }
            bundles.extend(domain.ok().zip(found.path(field, Some(path))));
        }
        return (bundles.len() == raw.value.len()).then_some(bundles);
    };
    found.note(raw.referenced, field, problem);
    None
}

/// Checks that the identity of the server is given where there are several trust domains: without it, an authority of any of
/// them could issue a certificate for the server.
fn check_server_identity(
    raw: &Spanned<RawClientTls>,
    expected: Option<&Identity>,
    bundles: &BTreeMap<TrustDomain, PathBuf>,
    found: &mut Findings,
) {
    const FIELD: &str = "control.tls.server_identity";
    let given = raw.value.server_identity.as_ref();
    match (given, expected.map(TrustDomain::of)) {
        (Some(_), Some(Ok(domain))) if bundles.contains_key(&domain) => {}
        (Some(given), Some(Ok(domain))) => {
            let why = format!("is of trust domain {domain}, which is not in `bundles`: add its file there");
            found.note(given.referenced, FIELD, why);
        }
        (Some(given), Some(Err(_))) => {
            let why = "has to be a SPIFFE ID with `bundles`, such as spiffe://mesh.example/control";
            found.note(given.referenced, FIELD, why);
        }
        // The problem was noted when it was parsed.
        (Some(_), None) => {}
        (None, _) if bundles.len() < 2 => {}
        (None, _) => found.note(
            raw.referenced,
            FIELD,
            "is missing, name the identity of the control plane, such as spiffe://mesh.example/control: with several trust \
             domains in `bundles`, it is needed",
        ),
    }
}

/// The identities of rules, with the index of each in the list.
fn identities(allow: Option<&Spanned<Vec<Spanned<RawRule>>>>) -> Vec<(usize, Text)> {
    let rules = allow.map_or(&[][..], |allow| &allow.value);
    let rules = rules.iter().take(MAX_RULES).enumerate();
    let identities = rules.filter_map(|(at, rule)| Some((at, rule.value.identity.clone()?)));
    identities.collect()
}

/// Refuses rules that the authorities cannot tell apart, and rules that can never match. The authorities of one file may sign
/// for every trust domain: with rules for two domains, an authority of one could issue an identity of the other.
fn check_domains(
    identities: &[(usize, Text)],
    authorities: &Authorities<PathBuf>,
    found: &mut Findings,
) {
    let named = |identity: &Text| domain_text(&identity.value).map(str::to_owned);
    let field = |at: usize| format!("discovery.allow[{at}].identity");
    match authorities {
        Authorities::Flat(_) => {
            let mut rules = identities
                .iter()
                .filter_map(|(at, identity)| Some((*at, identity, named(identity)?)));
            let Some((first_at, _, first)) = rules.next() else {
                return;
            };
            for (at, identity, other) in rules.filter(|(_, _, domain)| *domain != first) {
                let why = format!(
                    "is of trust domain {other}, but discovery.allow[{first_at}] is of {first}: `client_ca` is for one trust \
                     domain, because its authorities may sign for any; use `discovery.tls.bundles` with a file for each"
                );
                found.note(identity.referenced, field(at), why);
            }
        }
        Authorities::Bundles(bundles) => {
            for (at, identity) in identities {
                let domain = named(identity).unwrap_or_default();
                let is_served = |domain: TrustDomain| bundles.contains_key(&domain);
                let is_exact = identity.value.starts_with("spiffe://");
                if !(is_exact && domain.parse().is_ok_and(is_served)) {
                    let why = "is not a SPIFFE ID of a trust domain in `discovery.tls.bundles`: add a file for its \
                               domain there, or remove the rule";
                    found.note(identity.referenced, field(*at), why);
                }
            }
        }
    }
}

fn bearer_files(
    raw: Spanned<Vec<Spanned<RawToken>>>,
    field: &str,
    found: &mut Findings,
) -> Vec<BearerFile> {
    if raw.value.is_empty() {
        let why = "is empty, add entries with `file` and `identity`, or remove the field";
        found.note(raw.referenced, field, why);
    }
    found.bound(field, &raw, MAX_TOKENS);
    let tokens = raw.value.into_iter().take(MAX_TOKENS).enumerate();
    let files = tokens.filter_map(|(at, raw)| {
        let (place, raw) = (raw.referenced, raw.value);
        for (name, text, what) in [
            ("file", &raw.file, "name the file of a token"),
            (
                "identity",
                &raw.identity,
                "name the identity of the sidecars that use the token",
            ),
        ] {
            if text.is_none() {
                found.note(
                    place,
                    format!("{field}[{at}].{name}"),
                    format_args!("is missing, {what}"),
                );
            }
        }
        let path = found.path(format!("{field}[{at}].file"), raw.file.as_ref());
        let identity = found.parse(
            format!("{field}[{at}].identity"),
            raw.identity.as_ref(),
            str::parse,
        );
        Some(BearerFile {
            path: path?,
            identity: identity?,
        })
    });
    files.collect()
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
                "is missing or empty, list which sidecars may subscribe to which keyrings, such as \
                 [{ identity: \"spiffe://mesh.example/relatch/edge-1\", keyrings: [payments] }]",
            );
            return Admission::Rules(Vec::new());
        }
        (Some(raw), false) => {
            found.note(
                raw.referenced,
                FIELD,
                "needs `discovery.tls`: without TLS, sidecars have no identity",
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
        found.note(
            place,
            field,
            "is missing, use a URI such as spiffe://mesh.example/relatch/edge-1",
        );
    }
    let identity = found.parse(format_args!("{field}.identity"), raw.identity.as_ref(), |text| {
        text.parse().map_err(|_| {
            "use a URI such as spiffe://mesh.example/relatch/edge-1; its last path segment may be a *"
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
                "is missing, list keyrings, or use [\"*\"] for all keyrings",
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
