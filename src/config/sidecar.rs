//! The configuration file of a sidecar.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    num::NonZeroUsize,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::Deserialize;
use serde_saphyr::{Location, Spanned};

use super::{
    client_address::RawClientAddress,
    credential::{Placed, RawCredential, RawIdentityHeaders},
    error::ConfigError,
    http_authz::{self, HttpAuthzSettings, RawHttpAuthz, Shared},
    keyring::{RawKeyring, RawStaleness, SidecarKeyringSettings, SidecarKeyrings},
    plaintext::{PlaintextError, refuse_plaintext_listener},
    reader::{self, Findings, Places, Text},
    route::{self, KnownKeyrings, RawRoute, Rules},
    tls::{ClientTls, RawClientTls, RawListener, RawServer},
    value::{self, ControlEndpoint, Listen, LogSettings, RawLog, RawTelemetry, TelemetrySettings},
};
use crate::{
    authz::{self, AllSettings, Dialect, Enforcement, Enforcements, Notices, SettingsParts},
    budget::Rate,
    key::KeyringName,
    keyring::{Mode, PatternRule, Staleness, Wanted},
    node_name::NodeName,
    tls::TlsFiles,
};

/// The settings of a sidecar. Relative paths are relative to the working directory.
#[derive(Clone, Debug)]
pub struct SidecarSettings {
    pub(crate) node: NodeSettings,
    /// The address for Envoy (`ext_authz` and gRPC health); without TLS, on loopback or a Unix socket. Default:
    /// `127.0.0.1:9001`.
    pub(crate) listen: Listen,
    /// The certificate of `listen`, and the authorities of the certificates that Envoy has to present. Default: none.
    pub(crate) listen_tls: Option<TlsFiles>,
    /// The listener for proxies that ask over HTTP. Default: none.
    pub(crate) http_authz: Option<HttpAuthzSettings>,
    /// The address of `/metrics`, `/livez`, `/readyz` and `/status`; any address is allowed. Default: `127.0.0.1:9002`.
    pub(crate) http: SocketAddr,
    /// The number of threads that answer checks, 1 to 64. Default: 1.
    pub(crate) workers: NonZeroUsize,
    /// The addresses of the control plane, 1 to 16. The first that answers is used.
    pub(crate) control: Vec<ControlEndpoint>,
    /// The TLS files for `control`; given if its addresses are `https://`.
    pub(crate) control_tls: Option<ClientTls>,
    /// The keyrings that the file names, each once; with `patterns`, 1 to 256 entries.
    pub(crate) keyrings: Vec<SidecarKeyringSettings>,
    /// The patterns that find further keyrings. The first that matches applies.
    pub(crate) patterns: Vec<PatternRule>,
    /// The places of credentials, the routes to keyrings, and the headers for the upstream. All keyrings that it names are
    /// in `keyrings`, or match one of `patterns`.
    pub(crate) authz: authz::Settings,
    /// How long the sidecar still answers checks at a stop, while it reports that it is not ready; at most 5 minutes.
    /// Default: 0 s.
    pub(crate) drain: Duration,
    /// The snapshot file, with which a sidecar can restart while the control plane is away. Default: none; then nothing is
    /// written to disk.
    pub snapshot: Option<SnapshotSettings>,
    /// The export of spans.
    pub(crate) telemetry: TelemetrySettings,
    /// The format and level of the log.
    pub(crate) log: LogSettings,
}

/// The configuration file of a sidecar, and the flags that replace some of its fields.
#[derive(Clone, Debug)]
pub(crate) struct SidecarFile {
    path: PathBuf,
    overrides: SidecarOverrides,
}

/// The fields that flags replace.
#[derive(Clone, Debug, Default)]
pub(crate) struct SidecarOverrides {
    pub(crate) node_id: Option<NodeName>,
    pub(crate) listen: Option<Listen>,
    /// Empty for the addresses of the file.
    pub(crate) control: Vec<ControlEndpoint>,
    pub(crate) http: Option<SocketAddr>,
}

/// The identity of a sidecar.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct NodeSettings {
    /// The node id, unique among the sidecars of a control plane. Default: the host name.
    pub(crate) id: NodeName,
    /// The group of the sidecar. Default: `default`.
    pub(crate) cluster: NodeName,
    /// Information for the operator: at most 16 entries, with names and values of 1 to 128 printable characters. Default:
    /// none.
    pub(crate) labels: BTreeMap<String, String>,
}

/// The settings of a channel are not safe.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ChannelError {
    /// A listener in plaintext on an address that other machines can reach.
    #[error(transparent)]
    Listen(#[from] PlaintextError),
    /// An address of the control plane does not fit `control.tls`.
    #[error("control.endpoints: {0}")]
    Endpoint(#[from] EndpointError),
}

/// An address of a control plane does not fit `control.tls`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum EndpointError {
    /// `https://` without `control.tls`.
    #[error(
        "https:// needs `control.tls`: `ca` or `bundles`, and `cert` with `key`, or `token_file`"
    )]
    NoTls,
    /// `control.tls` with `http://`, which does not use it.
    #[error("http:// does not use `control.tls`: write https://, or remove `control.tls`")]
    Plaintext,
}

/// The settings of the snapshot file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SnapshotSettings {
    /// The path of the snapshot file, in an existing directory that belongs to the user of the sidecar.
    pub path: PathBuf,
    /// The path of the key that encrypts the snapshot file. `relatch config snapshot-key` creates one.
    pub(crate) key_file: PathBuf,
    /// Whether the sidecar deletes the snapshot file when it stops in order: for a sidecar that does not start again under
    /// the same node id. Default: false.
    pub(crate) erase_on_stop: bool,
}

/// The most addresses of control planes: more of them do not improve availability.
const MAX_ENDPOINTS: usize = 16;

/// The most labels: the sidecar sends them in every message of presence.
const MAX_LABELS: usize = 16;

/// The most workers: more threads than cores do not help.
const MAX_WORKERS: usize = 64;

/// The longest drain. Kubernetes kills a process after 30 s by default.
const MAX_DRAIN: Duration = Duration::from_mins(5);

const DEFAULT_LISTEN: Listen = Listen::Tcp(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9001));
const DEFAULT_HTTP: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9002);
const DEFAULT_CLUSTER: &str = "default";
const SERVICE_NAME: &str = "relatch-sidecar";

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Raw {
    node: Option<RawNode>,
    listen: Option<Spanned<RawListener<RawServer>>>,
    http_authz: Option<Spanned<RawHttpAuthz>>,
    http: Option<Text>,
    workers: Option<Text>,
    control: Option<Spanned<RawControl>>,
    keyrings: Option<Spanned<Vec<Spanned<RawKeyring>>>>,
    default_keyring: Option<Text>,
    routes: Option<Spanned<Vec<Spanned<RawRoute>>>>,
    credentials: Option<Spanned<Vec<Spanned<RawCredential>>>>,
    identity_headers: Option<RawIdentityHeaders>,
    notice: Option<RawNotice>,
    failed_credentials: Option<RawRate>,
    client_address: Option<Spanned<RawClientAddress>>,
    staleness: Option<RawStaleness>,
    drain: Option<Text>,
    snapshot: Option<Spanned<RawSnapshot>>,
    telemetry: Option<RawTelemetry>,
    log: Option<RawLog>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawNode {
    id: Option<Text>,
    cluster: Option<Text>,
    labels: Option<Spanned<BTreeMap<String, Text>>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawControl {
    endpoints: Option<Spanned<Vec<Text>>>,
    tls: Option<Spanned<RawClientTls>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawSnapshot {
    path: Option<Text>,
    key_file: Option<Text>,
    erase_on_stop: Option<Text>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawNotice {
    enabled: Option<Text>,
    deprecation: Option<Text>,
    sunset: Option<Text>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawRate {
    per_second: Option<Text>,
    burst: Option<Text>,
}

/// Reads `text`; errors name it `file`.
///
/// # Errors
///
/// When it is not valid; the error has all problems.
pub fn parse(text: &str, file: &str) -> Result<SidecarSettings, ConfigError> {
    parse_placed(text, file).map(|(settings, _)| settings)
}

/// As [`parse`], with the places of the fields.
pub(super) fn parse_placed(
    text: &str,
    file: &str,
) -> Result<(SidecarSettings, Places), ConfigError> {
    let raw: Raw = reader::from_yaml(text, file)?;
    let mut found = Findings::new(file);
    let settings = SidecarSettings::from_raw(raw, &mut found);
    found.finish(settings)
}

impl SidecarFile {
    pub(crate) const fn new(path: PathBuf, overrides: SidecarOverrides) -> Self {
        Self { path, overrides }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Reads the content of the file.
    ///
    /// # Errors
    ///
    /// When it cannot be read.
    pub(crate) fn read(&self) -> Result<String, ConfigError> {
        reader::read(&self.path).map(|(text, _)| text)
    }

    /// Returns the settings of the content, with the fields that flags replace. The caller checks
    /// the channels.
    ///
    /// # Errors
    ///
    /// When it is not valid; the error has all problems.
    pub(crate) fn parse(&self, content: &str) -> Result<SidecarSettings, ConfigError> {
        let mut settings = parse(content, &self.path.display().to_string())?;
        let SidecarOverrides {
            node_id,
            listen,
            control,
            http,
        } = &self.overrides;
        if let Some(id) = node_id {
            settings.node.id = id.clone();
        }
        if let Some(listen) = listen {
            settings.listen = listen.clone();
        }
        if !control.is_empty() {
            settings.control.clone_from(control);
        }
        if let Some(http) = http {
            settings.http = *http;
        }
        Ok(settings)
    }
}

impl SidecarSettings {
    /// The defaults for a sidecar `node` with `keyrings` of the control plane at `control`.
    #[must_use]
    pub(crate) fn new(
        node: NodeName,
        control: ControlEndpoint,
        keyrings: Vec<KeyringName>,
    ) -> Self {
        let staleness = Staleness::default();
        let named = keyrings
            .iter()
            .map(|name| (name.clone(), Enforcement::default()));
        let authz = SettingsParts {
            enforcements: Enforcements {
                named: named.collect(),
                ..Enforcements::default()
            },
            ..SettingsParts::default()
        };
        Self {
            node: NodeSettings::named(node),
            listen: DEFAULT_LISTEN,
            listen_tls: None,
            http_authz: None,
            http: DEFAULT_HTTP,
            workers: NonZeroUsize::MIN,
            control: vec![control],
            control_tls: None,
            keyrings: keyrings
                .into_iter()
                .map(|name| SidecarKeyringSettings {
                    name,
                    mode: Mode::Full,
                    staleness,
                })
                .collect(),
            patterns: Vec::new(),
            authz: authz::Settings::new(authz).expect("the defaults do not contradict each other"),
            drain: Duration::ZERO,
            snapshot: None,
            telemetry: TelemetrySettings::named(SERVICE_NAME),
            log: LogSettings::default(),
        }
    }

    /// Returns the keyrings that the sidecar is to hold.
    #[must_use]
    pub(crate) fn wanted(&self) -> Wanted {
        let named = self.keyrings.iter();
        let named = named.map(|keyring| (keyring.name.clone(), keyring.staleness, keyring.mode));
        Wanted::new(named, self.patterns.clone())
    }

    /// Returns the fields in which `other` differs and that cannot change in a running process.
    #[must_use]
    pub(crate) fn fixed_changes(&self, other: &Self) -> Vec<&'static str> {
        let Self {
            node,
            listen,
            listen_tls,
            http,
            workers,
            control,
            control_tls,
            keyrings: _,
            patterns: _,
            authz: _,
            http_authz,
            drain,
            snapshot,
            telemetry,
            log,
        } = self;
        let fields = [
            ("node", *node != other.node),
            (
                "listen",
                *listen != other.listen || *listen_tls != other.listen_tls,
            ),
            ("http", *http != other.http),
            ("workers", *workers != other.workers),
            (
                "control",
                *control != other.control || *control_tls != other.control_tls,
            ),
            (
                "http_authz",
                !HttpAuthzSettings::serve_the_same(http_authz.as_ref(), other.http_authz.as_ref()),
            ),
            ("drain", *drain != other.drain),
            ("snapshot", *snapshot != other.snapshot),
            ("telemetry", *telemetry != other.telemetry),
            ("log.format", log.format != other.log.format),
        ];
        let changed = fields.into_iter().filter(|(_, is_other)| *is_other);
        changed.map(|(field, _)| field).collect()
    }

    /// The settings of the checks of Envoy and of each profile.
    #[must_use]
    pub(crate) fn all_authz(&self) -> AllSettings {
        let profiles = self.http_authz.iter().flat_map(|it| &it.profiles);
        let profiles = profiles.map(|profile| profile.authz.clone());
        AllSettings::new(self.authz.clone(), profiles)
    }

    /// Checks the addresses again after flags have replaced some of the file.
    ///
    /// # Errors
    ///
    /// When a channel would leave this machine in plaintext, or `control.tls` does not fit the addresses in `control`.
    pub(crate) fn check_channels(&self) -> Result<(), ChannelError> {
        if let Some(ip) = self.listen.ip() {
            refuse_plaintext_listener("listen", ip, self.listen_tls.is_some())?;
        }
        if let Some(http_authz) = &self.http_authz
            && let Some(ip) = http_authz.listen.ip()
        {
            refuse_plaintext_listener(http_authz::LISTEN, ip, http_authz.listen_tls.is_some())?;
        }
        for endpoint in &self.control {
            check_endpoint(endpoint, self.control_tls.is_some())?;
        }
        Ok(())
    }

    fn from_raw(raw: Raw, found: &mut Findings) -> Option<Self> {
        let node = NodeSettings::from_raw(raw.node.unwrap_or_default(), found);
        let listener = RawListener::<RawServer>::into_parts(raw.listen, "listen", found);
        let listen = listener.listen("listen", found).unwrap_or(DEFAULT_LISTEN);
        let http = found
            .parse("http", raw.http.as_ref(), value::address)
            .unwrap_or(DEFAULT_HTTP);
        if listen == Listen::Tcp(http) && http.port() != 0 {
            let place = raw
                .http
                .or(listener.address)
                .map_or(Location::UNKNOWN, |text| text.referenced);
            found.note(
                place,
                "http",
                "is the address of `listen` too, use another port",
            );
        }
        let workers = found
            .parse("workers", raw.workers.as_ref(), workers)
            .unwrap_or(NonZeroUsize::MIN);
        let (control, control_tls) = control(raw.control, found);
        let staleness =
            raw.staleness
                .unwrap_or_default()
                .into_limits("staleness", Staleness::default(), found);
        let keyrings = SidecarKeyrings::from_raw(raw.keyrings, staleness, found);
        let known = KnownKeyrings::from_raw(&keyrings, raw.default_keyring.as_ref(), found);
        let Rules {
            rules,
            credentials: of_rules,
        } = route::rules(raw.routes, &known, found);
        let general = Placed::from_raw(raw.credentials.as_ref(), "credentials", found);
        let credentials = general.iter().map(|it| it.source.clone()).collect();
        let shared = Shared {
            keyrings: &known,
            credentials: &general,
        };
        let http_authz = raw.http_authz;
        let http_authz = http_authz.and_then(|raw| RawHttpAuthz::parse(raw, &shared, found));
        if let Some(other) = &http_authz
            && let Some(address) = other.fixed_address()
            && (*address == listen || *address == Listen::Tcp(http))
        {
            found.note(
                other.place,
                http_authz::LISTEN,
                "is the address of `listen` or `http` too, use another one",
            );
        }
        let placed = [general, of_rules].concat();
        let identity = raw
            .identity_headers
            .unwrap_or_default()
            .into_headers(&placed, found);
        let notices = raw.notice.unwrap_or_default().into_notices(found);
        let failed_credentials = raw.failed_credentials.unwrap_or_default().into_rate(
            "failed_credentials",
            SettingsParts::default().failed_credentials,
            found,
        );
        let drain = raw.drain.as_ref();
        let drain = found.duration("drain", drain, (Duration::ZERO, MAX_DRAIN));
        let client_address =
            RawClientAddress::into_source(raw.client_address, &placed, &identity, found);
        let snapshot = SnapshotSettings::from_raw(raw.snapshot, found);
        let telemetry =
            TelemetrySettings::from_raw(&raw.telemetry.unwrap_or_default(), SERVICE_NAME, found);
        let log = LogSettings::from_raw(&raw.log.unwrap_or_default(), found);
        let parts = SettingsParts {
            credentials,
            routes: rules,
            default_keyring: known.default_keyring().cloned(),
            enforcements: keyrings.enforcements.clone(),
            identity,
            notices,
            failed_credentials,
            // Where it is none, a problem is noted.
            client_address: client_address.unwrap_or_default(),
            dialect: Dialect::Envoy,
        };
        let authz = found.combine(|| authz::Settings::new(parts.clone()));
        // Without the settings of all checks, the problems of a profile would be repetitions.
        let http_authz = http_authz
            .filter(|_| authz.is_some())
            .and_then(|parsed| parsed.finish(&parts, found));
        Some(Self {
            node: node?,
            listen,
            listen_tls: listener.tls,
            http_authz,
            http,
            workers,
            control,
            control_tls,
            keyrings: keyrings.named,
            patterns: keyrings.patterns,
            authz: authz?,
            drain: drain.unwrap_or_default(),
            snapshot,
            telemetry,
            log,
        })
    }
}

impl NodeSettings {
    /// A node `id` of the default cluster, without labels.
    #[must_use]
    pub(crate) fn named(id: NodeName) -> Self {
        Self {
            id,
            cluster: DEFAULT_CLUSTER
                .parse()
                .expect("the default is a valid name"),
            labels: BTreeMap::new(),
        }
    }

    /// None if the id is not valid, which is then noted.
    fn from_raw(raw: RawNode, found: &mut Findings) -> Option<Self> {
        let id = match &raw.id {
            Some(id) => found.parse("node.id", Some(id), str::parse),
            None => NodeName::of_host()
                .map_err(|error| found.note(Location::UNKNOWN, "node.id", error))
                .ok(),
        };
        let cluster = found.parse("node.cluster", raw.cluster.as_ref(), str::parse);
        let labels = raw.labels.map_or_else(BTreeMap::new, |labels| {
            if labels.value.len() > MAX_LABELS {
                found.note(
                    labels.referenced,
                    "node.labels",
                    format_args!(
                        "has {} entries, use at most {MAX_LABELS}",
                        labels.value.len()
                    ),
                );
            }
            labels
                .value
                .into_iter()
                .filter_map(|(name, text)| {
                    let field = format!("node.labels.{name}");
                    if let Err(error) = value::label(&name) {
                        found.note(text.referenced, &field, format_args!("as a name: {error}"));
                    }
                    let value = found.parse(field, Some(&text), value::label)?;
                    Some((name, value))
                })
                .collect()
        });
        let named = Self::named(id?);
        Some(Self {
            cluster: cluster.unwrap_or(named.cluster),
            labels,
            id: named.id,
        })
    }
}

impl SnapshotSettings {
    /// None if they are not given, or if they are not valid, which is then noted.
    fn from_raw(raw: Option<Spanned<RawSnapshot>>, found: &mut Findings) -> Option<Self> {
        let Spanned {
            value: raw,
            referenced: place,
            ..
        } = raw?;
        let mut path = |name: &str, text: Option<Text>, example: &str| {
            let field = format!("snapshot.{name}");
            let Some(text) = text else {
                found.note(place, field, format_args!("is missing, such as {example}"));
                return None;
            };
            found.path(field, Some(&text))
        };
        let file = path("path", raw.path, "/var/lib/relatch/keyring.snap");
        let key_file = path("key_file", raw.key_file, "/etc/relatch/snapshot.key");
        let erase = raw.erase_on_stop.as_ref();
        let erase_on_stop = found.parse("snapshot.erase_on_stop", erase, value::boolean);
        let settings = Self {
            path: file?,
            key_file: key_file?,
            erase_on_stop: erase_on_stop.unwrap_or(false),
        };
        if settings.path == settings.key_file {
            found.note(
                place,
                "snapshot.key_file",
                "is the same file as `snapshot.path`, use another one",
            );
        }
        Some(settings)
    }
}

impl RawNotice {
    /// The notices for consumers; none if they are switched off.
    fn into_notices(self, found: &mut Findings) -> Option<Notices> {
        let mut is_on = |name: &str, text: Option<&Text>| {
            found.parse(format_args!("notice.{name}"), text, value::boolean)
        };
        let enabled = is_on("enabled", self.enabled.as_ref()).unwrap_or(true);
        let notices = Notices {
            deprecation: is_on("deprecation", self.deprecation.as_ref()).unwrap_or(false),
            sunset: is_on("sunset", self.sunset.as_ref()).unwrap_or(false),
        };
        if enabled {
            return Some(notices);
        }
        for (name, is_on, text) in [
            ("deprecation", notices.deprecation, self.deprecation),
            ("sunset", notices.sunset, self.sunset),
        ] {
            if let Some(text) = text.filter(|_| is_on) {
                let field = format_args!("notice.{name}");
                found.note(
                    text.referenced,
                    field,
                    "has no effect while `notice.enabled` is false, remove one of the two",
                );
            }
        }
        None
    }
}

impl RawRate {
    fn into_rate(self, field: &str, default: Rate, found: &mut Findings) -> Rate {
        let mut number = |name: &str, text: Option<Text>| {
            found.parse(format_args!("{field}.{name}"), text.as_ref(), value::rate)
        };
        Rate {
            per_second: number("per_second", self.per_second).unwrap_or(default.per_second),
            burst: number("burst", self.burst).unwrap_or(default.burst),
        }
    }
}

fn workers(text: &str) -> Result<NonZeroUsize, String> {
    text.parse()
        .ok()
        .filter(|workers: &NonZeroUsize| workers.get() <= MAX_WORKERS)
        .ok_or_else(|| format!("use a whole number from 1 to {MAX_WORKERS}"))
}

/// The addresses of the control plane, and the TLS files for them.
fn control(
    raw: Option<Spanned<RawControl>>,
    found: &mut Findings,
) -> (Vec<ControlEndpoint>, Option<ClientTls>) {
    let place = raw.as_ref().map_or(Location::UNKNOWN, |raw| raw.referenced);
    let (texts, raw_tls) = raw.map_or((None, None), |raw| (raw.value.endpoints, raw.value.tls));
    let endpoints = endpoints(place, texts, raw_tls.is_some(), found);
    let tls = raw_tls.and_then(|tls| ClientTls::from_raw(&tls, found));
    (endpoints, tls)
}

/// Checks that an endpoint and `control.tls` fit.
fn check_endpoint(endpoint: &ControlEndpoint, has_tls: bool) -> Result<(), EndpointError> {
    match (endpoint.has_tls(), has_tls) {
        (true, false) => Err(EndpointError::NoTls),
        // A typing error must not send in plaintext what the operator meant to send over TLS.
        (false, true) => Err(EndpointError::Plaintext),
        (true, true) | (false, false) => Ok(()),
    }
}

fn endpoints(
    place: Location,
    texts: Option<Spanned<Vec<Text>>>,
    has_tls: bool,
    found: &mut Findings,
) -> Vec<ControlEndpoint> {
    const FIELD: &str = "control.endpoints";
    let Some(endpoints) = texts.filter(|endpoints| !endpoints.value.is_empty()) else {
        found.note(
            place,
            FIELD,
            "is missing, name a control plane, such as [\"http://127.0.0.1:9010\"]",
        );
        return Vec::new();
    };
    found.bound(FIELD, &endpoints, MAX_ENDPOINTS);
    endpoints
        .value
        .iter()
        .enumerate()
        .filter_map(|(at, text)| {
            let endpoint: ControlEndpoint =
                found.parse(format_args!("{FIELD}[{at}]"), Some(text), str::parse)?;
            if let Err(error) = check_endpoint(&endpoint, has_tls) {
                found.note(text.referenced, format_args!("{FIELD}[{at}]"), error);
            }
            Some(endpoint)
        })
        .collect()
}

#[cfg(test)]
mod tests;
