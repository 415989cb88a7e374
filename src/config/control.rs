//! The configuration file of a control plane.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    time::Duration,
};

use serde::Deserialize;
use serde_saphyr::{Location, Spanned};

use super::{
    error::ConfigError,
    plaintext::{PlaintextError, refuse_plaintext_listener},
    reader::{self, Findings, Places, Text},
    sink::{self, RawSinks, SinkSettings},
    tls::{DiscoveryParts, RawDiscovery, RawListener, RawServer, ServerParts},
    value::{self, LogSettings, RawLog, RawTelemetry, TelemetrySettings},
};
use crate::{
    admission::{Admission, BearerFile},
    duration::written,
    tls::TlsFiles,
};

/// The settings of a control plane. Relative paths are relative to the working directory.
#[derive(Clone, Debug)]
pub struct ControlSettings {
    /// The directory of its data.
    pub data_dir: PathBuf,
    /// The address for sidecars (gRPC); without TLS, on loopback. Default: `127.0.0.1:9010`.
    pub discovery: SocketAddr,
    /// The certificate of discovery, and the authorities of the certificates of sidecars. Default: none.
    pub discovery_tls: Option<TlsFiles>,
    /// The tokens that sidecars may present instead of certificates, at most 100. Default: none.
    pub sidecar_tokens: Vec<BearerFile>,
    /// Which sidecars may subscribe to which keyrings. Default: every process of this machine, to all of them.
    pub admission: Admission,
    /// The address for operators (gRPC); without TLS, on loopback. Default: `127.0.0.1:9011`.
    pub admin: SocketAddr,
    /// The certificate of the admin API, and the authorities of the certificates that operators need in addition to their
    /// tokens. Default: none.
    pub admin_tls: Option<TlsFiles>,
    /// The address of `/metrics`, `/livez` and `/readyz`; any address is allowed. Default: `127.0.0.1:9012`.
    pub http: SocketAddr,
    /// The file of the SQLite store. Default: `relatch.db` in the data directory.
    pub store: PathBuf,
    /// The file of the master pepper. Default: `pepper.json` in the data directory.
    pub pepper_file: PathBuf,
    /// How often a sidecar asks whether its keyrings are current, 1 to 30 seconds. Default: 5 seconds.
    pub heartbeat: Duration,
    /// How long a sidecar may serve without an answer to that, 1 second to 30 days. The `deny_after` of the sidecar applies
    /// where it is shorter. Default: 1 hour.
    pub max_serve_for: Duration,
    /// The sinks for the secrets of scheduled rotations; each name once. Default: none.
    pub sinks: Vec<SinkSettings>,
    /// The export of spans.
    pub telemetry: TelemetrySettings,
    /// The format and level of the log.
    pub log: LogSettings,
}

const DEFAULT_DISCOVERY: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9010);
const DEFAULT_ADMIN: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9011);
const DEFAULT_HTTP: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9012);
const DEFAULT_HEARTBEAT: Duration = Duration::from_secs(5);
const DEFAULT_MAX_SERVE_FOR: Duration = Duration::from_hours(1);
const SERVICE_NAME: &str = "relatch-control";

/// Below 1 second, heartbeats are the main traffic. Above 30 seconds, a sidecar with the default limits would be stale
/// between two of them.
const HEARTBEAT_BOUNDS: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// The bounds of `deny_after` in the file of a sidecar. Below a second, no answer arrives in time. After a month without a
/// confirmation, nothing is known about the keyring.
const MAX_SERVE_FOR_BOUNDS: (Duration, Duration) =
    (Duration::from_secs(1), Duration::from_hours(30 * 24));

#[derive(Debug, Default, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Raw {
    data_dir: Option<Text>,
    discovery: Option<Spanned<RawListener<RawDiscovery>>>,
    admin: Option<Spanned<RawListener<RawServer>>>,
    http: Option<Text>,
    store: Option<RawStore>,
    pepper_file: Option<Text>,
    heartbeat: Option<Text>,
    max_serve_for: Option<Text>,
    sinks: Option<RawSinks>,
    telemetry: Option<RawTelemetry>,
    log: Option<RawLog>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawStore {
    sqlite: Option<Text>,
}

/// Reads the file at `path`.
///
/// # Errors
///
/// When it cannot be read, or is not valid; the error has all problems.
pub(crate) fn load(path: &Path) -> Result<ControlSettings, ConfigError> {
    let (text, file) = reader::read(path)?;
    parse(&text, &file)
}

/// Reads `text`; errors name it `file`.
///
/// # Errors
///
/// When it is not valid; the error has all problems.
pub fn parse(text: &str, file: &str) -> Result<ControlSettings, ConfigError> {
    parse_placed(text, file).map(|(settings, _)| settings)
}

/// As [`parse`], with the places of the fields.
pub(super) fn parse_placed(
    text: &str,
    file: &str,
) -> Result<(ControlSettings, Places), ConfigError> {
    let raw: Raw = reader::from_yaml(text, file)?;
    let mut found = Findings::new(file);
    let settings = ControlSettings::from_raw(raw, &mut found);
    found.finish(settings)
}

impl ControlSettings {
    /// The defaults for a control plane with its data in `data_dir`.
    #[must_use]
    pub fn new(data_dir: PathBuf) -> Self {
        Self {
            discovery: DEFAULT_DISCOVERY,
            discovery_tls: None,
            sidecar_tokens: Vec::new(),
            admission: Admission::Local,
            admin: DEFAULT_ADMIN,
            admin_tls: None,
            http: DEFAULT_HTTP,
            store: data_dir.join("relatch.db"),
            pepper_file: data_dir.join("pepper.json"),
            heartbeat: DEFAULT_HEARTBEAT,
            max_serve_for: DEFAULT_MAX_SERVE_FOR,
            sinks: Vec::new(),
            telemetry: TelemetrySettings::named(SERVICE_NAME),
            log: LogSettings::default(),
            data_dir,
        }
    }

    /// Checks the addresses again after flags have replaced some of the file.
    ///
    /// # Errors
    ///
    /// When a listener without TLS is on an address that other machines can reach.
    pub(crate) fn check_channels(&self) -> Result<(), PlaintextError> {
        for (field, address, tls) in [
            ("discovery", self.discovery, &self.discovery_tls),
            ("admin", self.admin, &self.admin_tls),
        ] {
            refuse_plaintext_listener(field, address.ip(), tls.is_some())?;
        }
        Ok(())
    }

    /// None if the data directory is missing, which is then noted.
    fn from_raw(mut raw: Raw, found: &mut Findings) -> Option<Self> {
        if raw.data_dir.is_none() {
            found.note(
                Location::UNKNOWN,
                "data_dir",
                "is missing, name a directory, such as /var/lib/relatch",
            );
        }
        let data_dir = found.path("data_dir", raw.data_dir.as_ref());
        let DiscoveryParts {
            server: discovery_parts,
            tokens: sidecar_tokens,
            admission,
        } = RawListener::<RawDiscovery>::into_parts(raw.discovery.take(), "discovery", found);
        let admin_parts = RawListener::<RawServer>::into_parts(raw.admin.take(), "admin", found);
        let [discovery, admin, http] =
            addresses(&discovery_parts, &admin_parts, raw.http.as_ref(), found);
        let Times {
            heartbeat,
            max_serve_for,
        } = times(&raw, found);
        let store = raw.store.and_then(|store| store.sqlite);
        let store = found.path("store.sqlite", store.as_ref());
        let pepper_file = found.path("pepper_file", raw.pepper_file.as_ref());
        let sinks = raw
            .sinks
            .map_or_else(Vec::new, |sinks| sink::from_raw(sinks, found));
        let telemetry =
            TelemetrySettings::from_raw(&raw.telemetry.unwrap_or_default(), SERVICE_NAME, found);
        let log = LogSettings::from_raw(&raw.log.unwrap_or_default(), found);
        let default = Self::new(data_dir?);
        Some(Self {
            data_dir: default.data_dir,
            discovery,
            discovery_tls: discovery_parts.tls,
            sidecar_tokens,
            admission,
            admin,
            admin_tls: admin_parts.tls,
            http,
            store: store.unwrap_or(default.store),
            pepper_file: pepper_file.unwrap_or(default.pepper_file),
            heartbeat,
            max_serve_for,
            sinks,
            telemetry,
            log,
        })
    }
}

/// The addresses of discovery, admin and HTTP. They have to differ, except where the port is 0.
fn addresses(
    discovery_parts: &ServerParts,
    admin_parts: &ServerParts,
    http_text: Option<&Text>,
    found: &mut Findings,
) -> [SocketAddr; 3] {
    let discovery = discovery_parts
        .address("discovery", found)
        .unwrap_or(DEFAULT_DISCOVERY);
    let admin = admin_parts.address("admin", found).unwrap_or(DEFAULT_ADMIN);
    let http = found
        .parse("http", http_text, value::address)
        .unwrap_or(DEFAULT_HTTP);
    let (discovery_text, admin_text) = (
        discovery_parts.address.as_ref(),
        admin_parts.address.as_ref(),
    );
    for (one, one_name, one_text, other, other_name, other_text) in [
        (
            discovery,
            "discovery",
            discovery_text,
            admin,
            "admin",
            admin_text,
        ),
        (
            discovery,
            "discovery",
            discovery_text,
            http,
            "http",
            http_text,
        ),
        (admin, "admin", admin_text, http, "http", http_text),
    ] {
        if one == other && one.port() != 0 {
            let place = place_of(other_text.or(one_text));
            let message = format_args!("is the address of `{one_name}` too, use another port");
            found.note(place, other_name, message);
        }
    }
    [discovery, admin, http]
}

struct Times {
    heartbeat: Duration,
    max_serve_for: Duration,
}

fn times(raw: &Raw, found: &mut Findings) -> Times {
    let heartbeat = found
        .duration("heartbeat", raw.heartbeat.as_ref(), HEARTBEAT_BOUNDS)
        .unwrap_or(DEFAULT_HEARTBEAT);
    let text = raw.max_serve_for.as_ref();
    let max_serve_for = found
        .duration("max_serve_for", text, MAX_SERVE_FOR_BOUNDS)
        .unwrap_or(DEFAULT_MAX_SERVE_FOR);
    if max_serve_for < heartbeat {
        let heartbeat = written(heartbeat);
        found.note(
            place_of(text.or(raw.heartbeat.as_ref())),
            "max_serve_for",
            format_args!("use at least the `heartbeat`, which is {heartbeat}"),
        );
    }
    Times {
        heartbeat,
        max_serve_for,
    }
}

fn place_of(text: Option<&Text>) -> Location {
    text.map_or(Location::UNKNOWN, |Spanned { referenced, .. }| *referenced)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::Authorities;

    fn refusal(text: &str) -> String {
        match parse(text, "control.yaml") {
            Ok(settings) => format!("accepted: {settings:?}"),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn the_least_file_has_the_defaults() {
        let settings = parse("data_dir: /var/lib/relatch", "control.yaml")
            .unwrap_or_else(|error| panic!("{error}"));
        let default = ControlSettings::new("/var/lib/relatch".into());
        assert_eq!(format!("{settings:?}"), format!("{default:?}"));
        assert_eq!(settings.store, Path::new("/var/lib/relatch/relatch.db"));
        assert_eq!(
            settings.pepper_file,
            Path::new("/var/lib/relatch/pepper.json")
        );
        assert_eq!(settings.discovery.to_string(), "127.0.0.1:9010");
        assert_eq!(settings.admin.to_string(), "127.0.0.1:9011");
        assert_eq!(settings.http.to_string(), "127.0.0.1:9012");
        assert_eq!(settings.heartbeat.as_secs(), 5);
        assert_eq!(settings.max_serve_for.as_secs(), 3_600);
        assert_eq!(settings.telemetry.service_name, "relatch-control");
    }

    #[test]
    fn every_field_is_read() {
        let settings = parse(
            "data_dir: d\ndiscovery: '[::1]:0'\nadmin: 127.0.0.1:0\nhttp: 0.0.0.0:0\nstore: {sqlite: /s.db}\n\
             pepper_file: /p.json\nheartbeat: 1s\nmax_serve_for: 90s\n\
             telemetry: {otlp_endpoint: \"http://127.0.0.1:4317\"}\nlog: {level: warn}\n",
            "control.yaml",
        )
        .unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(settings.discovery.to_string(), "[::1]:0");
        assert_eq!(settings.http.to_string(), "0.0.0.0:0");
        assert_eq!(settings.store, Path::new("/s.db"));
        assert_eq!(settings.pepper_file, Path::new("/p.json"));
        assert_eq!(settings.heartbeat.as_secs(), 1);
        assert_eq!(settings.max_serve_for.as_secs(), 90);
        assert!(settings.telemetry.otlp_endpoint.is_some());
    }

    #[test]
    fn each_bad_value_is_named_with_its_place() {
        const PLAINTEXT: &str =
            "without `tls` only this machine may connect: use 127.0.0.1 or [::1], or add `tls`";
        for (line, expected) in [
            ("discovery: 0.0.0.0:9010", format!("2:12: discovery: {PLAINTEXT}")),
            ("admin: 10.0.0.1:9011", format!("2:8: admin: {PLAINTEXT}")),
            ("admin: 9011", "2:8: admin: use an IP address with a port, such as 127.0.0.1:9002".into()),
            ("http: 127.0.0.1:9011", "2:7: http: is the address of `admin` too, use another port".into()),
            ("discovery: 127.0.0.1:9011", "2:12: admin: is the address of `discovery` too, use another port".into()),
            ("store: {sqlite: \"\"}", "2:17: store.sqlite: use the path of a file or directory".into()),
            ("store: {postgres: a}", "2:9: store.postgres: is not a known field, use one of `sqlite`".into()),
            ("pepper_file: [a]", "2:14: pepper_file: use a single value".into()),
            ("heartbeat: 31s", "2:12: heartbeat: use a duration from 1s to 30s".into()),
            ("heartbeat: 999ms", "2:12: heartbeat: use a duration from 1s to 30s".into()),
            ("max_serve_for: 999ms", "2:16: max_serve_for: use a duration from 1s to 30d".into()),
            ("max_serve_for: 31d", "2:16: max_serve_for: use a duration from 1s to 30d".into()),
            ("max_serve_for: 5s\nheartbeat: 6s", "2:16: max_serve_for: use at least the `heartbeat`, which is 6s".into()),
            ("max_serve_for: 4s", "2:16: max_serve_for: use at least the `heartbeat`, which is 5s".into()),
            ("hartbeat: 5s", "2:1: hartbeat: is not a known field, did you mean `heartbeat`?".into()),
            ("lease: 60s", "2:1: lease: is not a known field, use one of `data_dir`, `discovery`, `admin`, \
              `http`, `store`, `pepper_file`, `heartbeat`, `max_serve_for`, `sinks`, `telemetry`, `log`".into()),
            ("token_file: a", "2:1: token_file: is not a known field, use one of `data_dir`, `discovery`, `admin`, \
              `http`, `store`, `pepper_file`, `heartbeat`, `max_serve_for`, `sinks`, `telemetry`, `log`".into()),
            ("heartbeat: 5s\nheartbeat: 6s", "3:1: heartbeat: is given twice, keep one of them".into()),
        ] {
            assert_eq!(
                refusal(&format!("data_dir: d\n{line}\n")),
                format!("control.yaml:{expected}"),
                "{line}"
            );
        }
        assert_eq!(
            refusal(""),
            "control.yaml:1:1: data_dir: is missing, name a directory, such as /var/lib/relatch"
        );
    }

    #[test]
    fn tokens_stand_in_for_certificates() {
        let text = "data_dir: d\n\
             discovery:\n  tls: {cert: c.pem, key: c.key}\n  \
             tokens: [{file: t/edge-1, identity: \"spiffe://mesh/edge/1\"}]\n  \
             allow: [{identity: \"spiffe://mesh/edge/*\", keyrings: [\"*\"]}]\n";
        let settings = parse(text, "control.yaml").unwrap_or_else(|error| panic!("{error}"));
        let tls = settings.discovery_tls.expect("a certificate of the server");
        assert_eq!(tls.ca, None);
        let [token] = &settings.sidecar_tokens[..] else {
            panic!("{:?}", settings.sidecar_tokens);
        };
        assert_eq!(token.path, PathBuf::from("t/edge-1"));
        assert_eq!(token.identity.to_string(), "spiffe://mesh/edge/1");

        let both = text.replace("key: c.key", "key: c.key, client_ca: ca.pem");
        assert_eq!(
            refusal(&both),
            "control.yaml:3:45: discovery.tls.client_ca: cannot be used together with `discovery.tokens`, with which sidecars present no certificates: remove one of the two"
        );
        let nobodys = text.replace(", identity: \"spiffe://mesh/edge/1\"", "");
        assert_eq!(
            refusal(&nobodys),
            "control.yaml:4:12: discovery.tokens[0].identity: is missing, name the identity of the sidecars that use the token"
        );
        let clear = text.replace("  tls: {cert: c.pem, key: c.key}\n", "");
        assert!(refusal(&clear).contains("discovery.tokens: needs `discovery.tls`"));
    }

    #[test]
    fn certificates_and_rules_are_read() {
        let settings = parse(
            "data_dir: d\n\
             discovery:\n  address: 0.0.0.0:9010\n  tls: {cert: c.pem, key: c.key, client_ca: ca.pem}\n  allow:\n  \
             - {identity: \"spiffe://mesh/edge/*\", keyrings: [\"*\"]}\n  \
             - {identity: \"spiffe://mesh/sa\", keyrings: [a, b], node: pod-*}\n\
             admin: {tls: {cert: c.pem, key: c.key}}\n",
            "control.yaml",
        );
        let mut settings = settings.unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(settings.discovery.to_string(), "0.0.0.0:9010");
        assert_eq!(settings.admin, DEFAULT_ADMIN);
        let ca = |tls: &Option<TlsFiles>| tls.as_ref().and_then(|files| files.ca.clone());
        assert_eq!(
            ca(&settings.discovery_tls),
            Some(Authorities::Flat("ca.pem".into()))
        );
        assert!(settings.admin_tls.is_some() && ca(&settings.admin_tls).is_none());
        let Admission::Rules(rules) = &settings.admission else {
            panic!("no rules: {settings:?}");
        };
        assert_eq!(rules.len(), 2);
        assert_eq!(rules[0].identity.to_string(), "spiffe://mesh/edge/*");
        assert_eq!(rules[1].nodes.to_string(), "pod-*");
        assert_eq!(settings.check_channels(), Ok(()));
        settings.discovery_tls = None;
        let refused = settings.check_channels().expect_err("in clear");
        assert!(
            refused.to_string().starts_with("discovery: without `tls`"),
            "{refused}"
        );
    }

    const BUNDLES: &str = "bundles: {mesh.example: m.pem, other.example: o.pem}";

    /// A file with these authorities, and rules for these identities.
    fn with_rules(authorities: &str, identities: &[&str]) -> String {
        let rules = identities
            .iter()
            .map(|identity| format!("  - {{identity: \"{identity}\", keyrings: [k]}}\n"));
        let rules: String = rules.collect();
        format!(
            "data_dir: d\ndiscovery:\n  tls: {{cert: a, key: b, {authorities}}}\n  allow:\n{rules}"
        )
    }

    #[test]
    fn one_file_of_authorities_serves_one_trust_domain() {
        let (mesh, others) = ("spiffe://mesh.example/a", "spiffe://other.example/ns/*");
        let flat = "client_ca: c.pem";
        let refused = refusal(&with_rules(flat, &[mesh, "https://x/y", mesh, others]));
        assert_eq!(
            refused,
            "control.yaml:8:16: discovery.allow[3].identity: is of trust domain other.example, but discovery.allow[0] is of mesh.example: \
             `client_ca` is for one trust domain, because its authorities may sign for any; use `discovery.tls.bundles` with a file for each"
        );
        for admitted in [
            &[mesh, "spiffe://mesh.example/ns/*", "https://x/y"][..],
            &[others],
        ] {
            assert!(refusal(&with_rules(flat, admitted)).starts_with("accepted"));
        }
        assert!(refusal(&with_rules(BUNDLES, &[mesh, others])).starts_with("accepted"));
        // Tokens are of no authority.
        let tokens = with_rules("", &[mesh, others])
            + "  tokens: [{file: t, identity: \"spiffe://mesh.example/a\"}]\n";
        assert!(refusal(&tokens).starts_with("accepted"));
    }

    #[test]
    fn a_rule_that_no_bundle_can_serve_is_refused() {
        for unserved in [
            "spiffe://third.example/a",
            "https://mesh.example/a",
            "SPIFFE://mesh.example/a",
        ] {
            assert_eq!(
                refusal(&with_rules(BUNDLES, &["spiffe://mesh.example/a", unserved])),
                "control.yaml:6:16: discovery.allow[1].identity: is not a SPIFFE ID of a trust domain in `discovery.tls.bundles`: \
                 add a file for its domain there, or remove the rule",
                "{unserved}"
            );
        }
    }

    #[test]
    fn bundles_stand_in_the_place_of_one_file() {
        let settings = parse(
            &with_rules(BUNDLES, &["spiffe://mesh.example/a"]),
            "control.yaml",
        );
        let tls = settings
            .unwrap_or_else(|error| panic!("{error}"))
            .discovery_tls;
        let Some(Authorities::Bundles(bundles)) = tls.and_then(|tls| tls.ca) else {
            panic!("no bundles");
        };
        assert_eq!(bundles.len(), 2);
        let both = format!("client_ca: c, {BUNDLES}");
        assert_eq!(
            refusal(&with_rules(&both, &["spiffe://mesh.example/a"])),
            "control.yaml:3:49: discovery.tls.bundles: cannot be used together with `client_ca`: remove one of the two"
        );
        let tokens = with_rules(BUNDLES, &["spiffe://mesh.example/a"])
            + "  tokens: [{file: t, identity: \"spiffe://mesh.example/a\"}]\n";
        assert_eq!(
            refusal(&tokens),
            "control.yaml:3:35: discovery.tls.bundles: cannot be used together with `discovery.tokens`, with which sidecars present no certificates: remove one of the two"
        );
        let many: Vec<String> = (0..33).map(|at| format!("d{at}: f")).collect();
        let many = format!("bundles: {{{}}}", many.join(", "));
        assert!(
            refusal(&with_rules(&many, &[]))
                .contains("discovery.tls.bundles: has 33 entries, use at most 32")
        );
    }

    #[test]
    fn each_slip_about_certificates_is_named_with_its_place() {
        let tls = "tls: {cert: a, key: b, client_ca: c}";
        for (line, expected) in [
            ("discovery: {address: 0.0.0.0:9010}".to_owned(), "2:22: discovery: without `tls` only this machine may connect: use 127.0.0.1 or [::1], or add `tls`"),
            (format!("discovery: {{{tls}}}"), "2:12: discovery.allow: is missing or empty, list which sidecars may subscribe to which keyrings, such as [{ identity: \"spiffe://mesh.example/relatch/edge-1\", keyrings: [payments] }]"),
            (format!("discovery: {{{tls}, allow: []}}"), "2:58: discovery.allow: is missing or empty, list which sidecars may subscribe to which keyrings, such as [{ identity: \"spiffe://mesh.example/relatch/edge-1\", keyrings: [payments] }]"),
            ("discovery: {allow: [{identity: \"a://b\", keyrings: [k]}]}".to_owned(), "2:20: discovery.allow: needs `discovery.tls`: without TLS, sidecars have no identity"),
            ("discovery: {tls: {cert: a, key: b}, allow: [{identity: \"a://b\", keyrings: [k]}]}".to_owned(), "2:18: discovery.tls.client_ca: is missing, name the authorities of the sidecars' certificates"),
            (format!("discovery: {{{tls}, allow: [{{keyrings: [k]}}]}}"), "2:59: discovery.allow[0].identity: is missing, use a URI such as spiffe://mesh.example/relatch/edge-1"),
            (format!("discovery: {{{tls}, allow: [{{identity: \"*\", keyrings: [k]}}]}}"), "2:70: discovery.allow[0].identity: use a URI such as spiffe://mesh.example/relatch/edge-1; its last path segment may be a *"),
            (format!("discovery: {{{tls}, allow: [{{identity: \"a://b\"}}]}}"), "2:59: discovery.allow[0].keyrings: is missing, list keyrings, or use [\"*\"] for all keyrings"),
            ("admin: {allow: []}".to_owned(), "2:9: admin.allow: is not a known field, use one of `address`, `tls`"),
        ] {
            assert_eq!(
                refusal(&format!("data_dir: d\n{line}\n")),
                format!("control.yaml:{expected}"),
                "{line}"
            );
        }
    }
}
