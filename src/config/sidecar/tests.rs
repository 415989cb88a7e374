//! Each field of the sidecar's file: what is read, what is refused, and with which words.

use ::http::HeaderName;

use super::*;
use crate::tls::{Authorities, files::OwnFiles};
use crate::{
    authz::{AddressSource, Auth, Hops, HostPattern, TrustedProxies},
    config::value::LogFormat,
    key::parse_block,
    keyring::on_demand::CacheSettings,
};

/// The least that a file must hold.
const LEAST: &str =
    "control: {endpoints: [\"http://127.0.0.1:9010\"]}\nkeyrings: [{name: payments}]\n";

fn settings(more: &str) -> SidecarSettings {
    parse(&format!("{LEAST}{more}"), "sidecar.yaml").unwrap_or_else(|error| panic!("{error}"))
}

fn refusal(text: &str) -> String {
    match parse(text, "sidecar.yaml") {
        Ok(settings) => format!("accepted: {settings:?}"),
        Err(error) => error.to_string(),
    }
}

#[test]
fn the_least_file_has_the_defaults() {
    let settings = settings("");
    let default = SidecarSettings::new(
        NodeName::of_host().expect("a host name"),
        "http://127.0.0.1:9010".parse().expect("an endpoint"),
        vec!["payments".parse().expect("a name")],
    );
    assert_eq!(format!("{settings:?}"), format!("{default:?}"));
    assert_eq!(settings.node.cluster.as_str(), "default");
    assert_eq!(settings.listen.to_string(), "127.0.0.1:9001");
    assert_eq!(settings.http.to_string(), "127.0.0.1:9002");
    assert_eq!(settings.workers.get(), 1);
    assert_eq!(settings.authz.notices(), Some(Notices::default()));
    assert_eq!(settings.telemetry.service_name, "relatch-sidecar");
    assert_eq!(
        settings.keyrings[0].staleness,
        Staleness {
            warn_after: Duration::from_secs(30),
            deny_after: Duration::from_hours(1),
        }
    );
}

#[test]
fn every_field_is_read() {
    let settings = parse(
        r#"
node: { id: edge-1, cluster: payments-gateway, labels: { zone: eu-1a } }
listen: unix:///run/relatch/authz.sock
http: 0.0.0.0:0
workers: 4
control: { endpoints: ["http://127.0.0.1:9010", "http://[::1]:9010"] }
keyrings:
  - { name: payments, mode: full, staleness: { warn_after: 5s } }
  - { name: partners }
default_keyring: payments
routes:
  - { host: "*.Example.com", path_prefix: /v1, keyring: partners, scopes: [write, read], auth: optional }
credentials: [{ header: X-Api-Key }, { header: authorization, scheme: ApiKey }, { query: api_key }, { cookie: key }]
identity_headers: { consumer: X-Consumer, key_id: false }
notice: { enabled: true, deprecation: true, sunset: true }
staleness: { warn_after: 10s, deny_after: 2m }
telemetry: { otlp_endpoint: "http://otel:4317", service_name: gate }
log: { format: json, level: debug }
"#,
        "sidecar.yaml",
    )
    .unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(settings.node.id.as_str(), "edge-1");
    assert_eq!(settings.node.labels["zone"], "eu-1a");
    assert_eq!(
        settings.listen,
        Listen::Unix("/run/relatch/authz.sock".into())
    );
    assert_eq!(settings.workers.get(), 4);
    assert_eq!(settings.control.len(), 2);
    let limits: Vec<_> = settings
        .keyrings
        .iter()
        .map(|k| {
            (
                k.staleness.warn_after.as_secs(),
                k.staleness.deny_after.as_secs(),
            )
        })
        .collect();
    assert_eq!(limits, [(5, 120), (10, 120)]);
    let authz = &settings.authz;
    assert_eq!(
        authz.default_keyring().map(KeyringName::as_str),
        Some("payments")
    );
    let route = &authz.routes()[0];
    assert_eq!(route.host, Some(HostPattern::Suffix(".example.com".into())));
    assert_eq!(route.path_prefix.to_string(), "/v1");
    assert_eq!(route.keyring.as_str(), "partners");
    assert_eq!(route.scopes.to_string(), "read write");
    assert_eq!(route.auth, Auth::Optional);
    let places: Vec<_> = authz
        .credentials()
        .iter()
        .map(ToString::to_string)
        .collect();
    assert_eq!(
        places,
        [
            "header x-api-key",
            "header authorization with scheme ApiKey",
            "query parameter api_key",
            "cookie key",
        ]
    );
    let names: Vec<_> = authz.identity().names().map(HeaderName::as_str).collect();
    assert_eq!(
        names,
        ["x-consumer", "x-relatch-key-version", "x-relatch-scopes"]
    );
    assert_eq!(
        authz.notices(),
        Some(Notices {
            deprecation: true,
            sunset: true,
        })
    );
    assert_eq!(settings.log.format, LogFormat::Json);
}

#[test]
fn keyrings_are_held_on_demand_within_their_bounds() {
    let settings = parse(
        r#"
control: { endpoints: ["http://127.0.0.1:9010"] }
keyrings:
  - { name: payments, mode: full }
  - name: partners
    mode: on_demand
    cache:
      max_size: 1GiB
      ttl: 1h
      negative_ttl: 30s
      lookup_timeout: 50ms
      unknown_per_second: 7
      unknown_burst: 70
  - { name: archive, mode: on_demand }
"#,
        "sidecar.yaml",
    )
    .unwrap_or_else(|error| panic!("{error}"));
    let modes: Vec<_> = settings.keyrings.iter().map(|k| k.mode).collect();
    let partners = CacheSettings {
        max_size: 1 << 30,
        ttl: Duration::from_hours(1),
        negative_ttl: Duration::from_secs(30),
        lookup_timeout: Duration::from_millis(50),
        unknown_budget: Rate {
            per_second: 7,
            burst: 70,
        },
    };
    assert_eq!(
        modes,
        [
            Mode::Full,
            Mode::OnDemand(partners),
            Mode::OnDemand(CacheSettings::default()),
        ]
    );
}

#[test]
fn the_client_is_found_as_the_file_says() {
    let source = |fields: &str| {
        let settings = settings(&format!("client_address: {{{fields}}}\n"));
        settings.authz.client_address().clone()
    };
    let blocks = ["10.0.0.0/8", "192.0.2.7"].map(|text| parse_block(text).expect("a block"));
    let trusted = || TrustedProxies::new(blocks.to_vec());
    assert_eq!(
        *settings("").authz.client_address(),
        AddressSource::default()
    );
    assert_eq!(
        source("from: X-Forwarded-For, trusted: [10.1.2.3/8, \"::ffff:192.0.2.7\"]"),
        AddressSource::ForwardedFor { trusted: trusted() }
    );
    for (text, envoy_appends) in [("true", true), ("false", false)] {
        let trusted_by_all = parse_block("0.0.0.0/0").expect("a block");
        assert_eq!(
            source(&format!(
                "from: x-forwarded-for, trusted: [0.0.0.0/0], hops: 16, envoy_appends: {text}"
            )),
            AddressSource::Hops {
                trusted: TrustedProxies::new(vec![trusted_by_all]),
                hops: Hops {
                    count: 16,
                    envoy_appends,
                },
            }
        );
    }
    assert_eq!(
        source("from: X-Envoy-External-Address, trusted: [10.0.0.0/8, 192.0.2.7]"),
        AddressSource::Header {
            trusted: trusted(),
            name: HeaderName::from_static("x-envoy-external-address"),
        }
    );
}

/// A field with a bad value, its place and what is said of it.
const BAD_VALUES: &[(&str, &str)] = &[
    (
        "node: {id: a b}",
        "3:12: node.id: use 1 to 253 of A-Z, a-z, 0-9 and . _ -",
    ),
    (
        "node: {cluster: \"\"}",
        "3:17: node.cluster: use 1 to 253 of A-Z, a-z, 0-9 and . _ -",
    ),
    (
        "node: {labels: {a: é}}",
        "3:20: node.labels.a: use 1 to 128 printable ASCII characters",
    ),
    (
        "failed_credentials: {per_second: 0}",
        "3:34: failed_credentials.per_second: use a whole number from 1 to 100000",
    ),
    (
        "failed_credentials: {burst: 100001}",
        "3:29: failed_credentials.burst: use a whole number from 1 to 100000",
    ),
    (
        "listen: 9001",
        "3:9: listen: use an IP address with a port, such as 127.0.0.1:9001, or unix:///path",
    ),
    (
        "listen: 0.0.0.0:9001",
        "3:9: listen: without `tls` only this machine may connect: use 127.0.0.1 or [::1], or add `tls`",
    ),
    (
        "http: here",
        "3:7: http: use an IP address with a port, such as 127.0.0.1:9002",
    ),
    (
        "http: 127.0.0.1:9001",
        "3:7: http: is the address of `listen` too, use another port",
    ),
    (
        "workers: 0",
        "3:10: workers: use a whole number from 1 to 64",
    ),
    (
        "workers: 65",
        "3:10: workers: use a whole number from 1 to 64",
    ),
    ("workers: [1]", "3:10: workers: use a single value"),
    (
        "default_keyring: other",
        "3:18: default_keyring: is not in `keyrings`, add it there or name another keyring",
    ),
    (
        "default_keyring: A",
        "3:18: default_keyring: not a valid keyring name: use 1 to 63 of a-z, 0-9 and '-', beginning with a letter",
    ),
    (
        "routes: [{keyring: payments, host: \"a:80\"}]",
        "3:36: routes[0].host: use a host name without a port, or \"*.domain\" for every host below a domain",
    ),
    (
        "routes: [{keyring: payments, path_prefix: v1}]",
        "3:43: routes[0].path_prefix: use a path that begins with '/', in ASCII, without '%', ';', '?', '#', '\\', '//' and dot segments",
    ),
    (
        "routes: [{keyring: payments}, {keyring: other}]",
        "3:41: routes[1].keyring: is not in `keyrings`, add it there or name another keyring",
    ),
    (
        "routes: [{path_prefix: /v1}]",
        "3:10: routes[0].keyring: is missing, name a keyring here or in `default_keyring`",
    ),
    (
        "routes: [{keyring: payments, path_prefix: /a}, {keyring: payments, path_prefix: /A/}]",
        "3:48: routes[1]: matches the same requests as routes[0], remove one of the two",
    ),
    (
        "routes: [{keyring: payments, scopes: [read, \"a b\"]}]",
        "3:45: routes[0].scopes[1]: not a valid scope: use 1 to 128 printable ASCII characters without space, '\"' and '\\'",
    ),
    (
        "routes: [{keyring: payments, preflight: yes}]",
        "3:41: routes[0].preflight: use allow or deny",
    ),
    (
        "routes: [{keyring: payments, enforce: maybe}]",
        "3:39: routes[0].enforce: use true or false",
    ),
    (
        "routes: [{keyring: payments, remove: true}]",
        "3:38: routes[0].remove: can be used only with `enforce: false`, remove it",
    ),
    (
        "routes: [{keyring: payments, credentials: [{basic: name}]}]",
        "3:52: routes[0].credentials[0].basic: use username or password",
    ),
    (
        "routes: [{keyring: payments, credentials: [{websocket_protocol: \"a b\"}]}]",
        "3:65: routes[0].credentials[0].websocket_protocol: use 1 to 128 letters, digits and any of !#$%&'*+-.^_`|~",
    ),
    (
        "routes: [{keyring: payments, credentials: [{header: x-relatch-scopes}]}]",
        "3:53: routes[0].credentials[0].header: this header is reserved for the identity of the caller, use another one",
    ),
    (
        "identity_headers: {consumer: x-caller}\nroutes: [{keyring: payments, credentials: [{header: x_caller}]}]",
        "3:30: identity_headers.consumer: `x-caller` is also searched for a credential, use another name",
    ),
    (
        "credentials: [{header: Sec-WebSocket-Protocol}]",
        "3:24: credentials[0].header: use `websocket_protocol` for a key in this header",
    ),
    (
        "credentials: [{basic: username}, {header: authorization, scheme: basic}]",
        "3:34: credentials[1]: header authorization with scheme basic is already in the list, remove one of the two",
    ),
    (
        "routes: [{keyring: payments, auth: none}]",
        "3:36: routes[0].auth: use required or optional",
    ),
    (
        "routes: {}",
        "3:9: routes: use a list, such as `[first, second]`",
    ),
    (
        "credentials: []",
        "3:14: credentials: is empty, add a place such as { header: x-api-key }, or remove the field",
    ),
    (
        "credentials: [{}]",
        "3:15: credentials[0]: use exactly one of header, basic, websocket_protocol, query and cookie",
    ),
    (
        "credentials: [{header: a, query: b}]",
        "3:15: credentials[0]: use exactly one of header, basic, websocket_protocol, query and cookie",
    ),
    (
        "credentials: [{query: a, scheme: b}]",
        "3:34: credentials[0].scheme: can be used only with `header`, remove it",
    ),
    (
        "credentials: [{header: \":path\"}]",
        "3:24: credentials[0].header: use a header name of letters, digits and '-', not a pseudo-header",
    ),
    (
        "credentials: [{header: Cookie}]",
        "3:24: credentials[0].header: this header has a fixed meaning in HTTP, use another one",
    ),
    (
        "credentials: [{header: host}]",
        "3:24: credentials[0].header: this header has a fixed meaning in HTTP, use another one",
    ),
    (
        "credentials: [{header: a, scheme: \"b c\"}]",
        "3:35: credentials[0].scheme: use 1 to 128 letters, digits and any of !#$%&'*+-.^_`|~",
    ),
    (
        "credentials: [{query: \"a&b\"}]",
        "3:23: credentials[0].query: use 1 to 128 letters, digits and any of - . _ ~",
    ),
    (
        "credentials: [{cookie: \"a;b\"}]",
        "3:24: credentials[0].cookie: use 1 to 128 letters, digits and any of !#$%&'*+-.^_`|~",
    ),
    (
        "credentials: [{header: x-a}, {header: X_A}]",
        "3:30: credentials[1]: header x_a is already in the list, remove one of the two",
    ),
    (
        "credentials: [{header: a, scheme: Key}, {header: a}]",
        "3:41: credentials[1]: header a is already in the list, remove one of the two",
    ),
    (
        "identity_headers: {consumer: true id}",
        "3:30: identity_headers.consumer: use a header name of letters, digits and '-', not a pseudo-header",
    ),
    (
        "identity_headers: {consumer: x_api.key}",
        "3:30: identity_headers.consumer: `x_api.key` is also searched for a credential, use another name",
    ),
    (
        "identity_headers: {scopes: X-Relatch_Consumer}",
        "3:28: identity_headers.scopes: `x-relatch_consumer` is also another identity header, use another name",
    ),
    (
        "credentials: [{header: x-relatch-key-id}]",
        "3:24: credentials[0].header: this header is reserved for the identity of the caller, use another one",
    ),
    (
        "identity_headers: {scopes: false}\ncredentials: [{header: x_relatch.scopes}]",
        "4:24: credentials[0].header: this header is reserved for the identity of the caller, use another one",
    ),
    (
        "credentials: [{header: content_type}]",
        "3:24: credentials[0].header: this header has a fixed meaning in HTTP, use another one",
    ),
    (
        "identity_headers: {consumer: X-Api_Key}",
        "3:30: identity_headers.consumer: `x-api_key` is also searched for a credential, use another name",
    ),
    (
        "notice: {enabled: maybe}",
        "3:19: notice.enabled: use true or false",
    ),
    (
        "notice: {deprecation: soon}",
        "3:23: notice.deprecation: use true or false",
    ),
    (
        "notice: {enabled: false, sunset: true}",
        "3:34: notice.sunset: has no effect while `notice.enabled` is false, remove one of the two",
    ),
    (
        "staleness: {warn_after: 30}",
        "3:25: staleness.warn_after: use a duration from 1s to 30d",
    ),
    (
        "staleness: {deny_after: 31days}",
        "3:25: staleness.deny_after: use a duration from 1s to 30d",
    ),
    (
        "staleness: {warn_after: 10s, deny_after: 10s}",
        "3:25: staleness.warn_after: use less than `deny_after`, which is 10s",
    ),
    (
        "telemetry: {otlp_endpoint: \"https://otel:4317\"}",
        "3:28: telemetry.otlp_endpoint: use http://host:port of a collector that receives OTLP over gRPC, such as http://127.0.0.1:4317; this version sends spans in plaintext",
    ),
    (
        "telemetry: {service_name: \"\"}",
        "3:27: telemetry.service_name: use 1 to 128 printable ASCII characters",
    ),
    ("log: {format: xml}", "3:15: log.format: use text or json"),
    (
        "log: {level: loud}",
        "3:14: log.level: use error, warn, info, debug or trace",
    ),
    (
        "log: json",
        "3:6: log: use fields with values, such as `name: value`",
    ),
];

/// The same for `client_address`.
const BAD_CLIENT_ADDRESSES: &[(&str, &str)] = &[
    (
        "client_address: {trusted: [10.0.0.0/8]}",
        "3:17: client_address.from: is missing, name the header with the address, such as x-forwarded-for",
    ),
    (
        "client_address: {from: x-real-ip}",
        "3:17: client_address.trusted: is missing, name the addresses of your proxies, such as [10.0.0.0/8]: a header of anybody else does not count",
    ),
    (
        "client_address: {from: x-real-ip, trusted: []}",
        "3:44: client_address.trusted: is missing, name the addresses of your proxies, such as [10.0.0.0/8]: a header of anybody else does not count",
    ),
    (
        "client_address: {from: x-real-ip, trusted: [10.0.0.1, 10.0.0.0/33]}",
        "3:55: client_address.trusted[1]: \"10.0.0.0/33\" is neither an address nor a CIDR block, such as 10.0.0.0/8",
    ),
    (
        "client_address: {from: x-forwarded-for, trusted: [0.0.0.0/0]}",
        "3:51: client_address.trusted[0]: trusts every address, so that each client could choose its own: name the addresses of your proxies, or count them with `hops`",
    ),
    (
        "client_address: {from: X-Forwarded-For, trusted: [10.0.0.1, \"::/0\"]}",
        "3:61: client_address.trusted[1]: trusts every address, so that each client could choose its own: name the addresses of your proxies, or count them with `hops`",
    ),
    (
        "client_address: {from: Forwarded, trusted: [10.0.0.0/8]}",
        "3:24: client_address.from: relatch does not read `forwarded`, because proxies pass on what a client writes there: use x-forwarded-for, or a header that your proxy sets itself",
    ),
    (
        "client_address: {from: source.address, trusted: [10.0.0.0/8]}",
        "3:24: client_address.from: source.address is the default: remove `client_address`",
    ),
    (
        "client_address: {from: x_forwarded_for, trusted: [10.0.0.0/8]}",
        "3:24: client_address.from: use x-forwarded-for, or another header",
    ),
    (
        "client_address: {from: \":authority\", trusted: [10.0.0.0/8]}",
        "3:24: client_address.from: use a header name of letters, digits and '-', not a pseudo-header",
    ),
    (
        "client_address: {from: X_Api_Key, trusted: [10.0.0.0/8]}",
        "3:24: client_address.from: `x_api_key` is also searched for a credential, use another header",
    ),
    (
        "client_address: {from: x-relatch-scopes, trusted: [10.0.0.0/8]}",
        "3:24: client_address.from: this header is reserved for the identity of the caller, use another one",
    ),
    (
        "client_address: {from: x-forwarded-for, trusted: [10.0.0.0/8], hops: 0, envoy_appends: true}",
        "3:70: client_address.hops: use the number of proxies before Envoy, from 1 to 16",
    ),
    (
        "client_address: {from: x-forwarded-for, trusted: [10.0.0.0/8], hops: 17, envoy_appends: true}",
        "3:70: client_address.hops: use the number of proxies before Envoy, from 1 to 16",
    ),
    (
        "client_address: {from: x-forwarded-for, trusted: [10.0.0.0/8], hops: -1, envoy_appends: true}",
        "3:70: client_address.hops: use the number of proxies before Envoy, from 1 to 16",
    ),
    (
        "client_address: {from: x-forwarded-for, trusted: [10.0.0.0/8], hops: 1}",
        "3:70: client_address.envoy_appends: is missing, say whether Envoy appends its peer to the header before it asks: true with `use_remote_address: true`, else false",
    ),
    (
        "client_address: {from: x-forwarded-for, trusted: [10.0.0.0/8], envoy_appends: true}",
        "3:79: client_address.envoy_appends: has an effect only with `hops`, remove it",
    ),
    (
        "client_address: {from: x-real-ip, trusted: [10.0.0.0/8], hops: 1}",
        "3:64: client_address.hops: can be used only with `from: x-forwarded-for`, remove it",
    ),
    (
        "client_address: {from: x-real-ip, trusted: [10.0.0.0/8], envoy_appends: true}",
        "3:73: client_address.envoy_appends: can be used only with `from: x-forwarded-for`, remove it",
    ),
    (
        "client_address: {from: x-caller, trusted: [10.0.0.0/8]}\nidentity_headers: {consumer: X_Caller}",
        "3:24: client_address.from: `x-caller` is also an identity header, use another header",
    ),
];

/// The same for an entry of `keyrings`.
const BAD_KEYRINGS: &[(&str, &str)] = &[
    (
        "{mode: full}",
        "2:12: keyrings[0].name: is missing, name the keyring, or find keyrings by a pattern with `match`",
    ),
    (
        "{name: _control}",
        "2:19: keyrings[0].name: not a valid keyring name: use 1 to 63 of a-z, 0-9 and '-', beginning with a letter",
    ),
    (
        "{name: a, mode: half}",
        "2:28: keyrings[0].mode: use full or on_demand",
    ),
    (
        "{name: a, cache: {ttl: 10m}}",
        "2:29: keyrings[0].cache: has an effect only with `mode: on_demand`, remove it or set the mode",
    ),
    (
        "{name: a, mode: on_demand, cache: {max_size: 64MB}}",
        "2:57: keyrings[0].cache.max_size: use a size from 1MiB to 64GiB, such as 64MiB",
    ),
    (
        "{name: a, mode: on_demand, cache: {max_size: 1023KiB}}",
        "2:57: keyrings[0].cache.max_size: use a size from 1MiB to 64GiB, such as 64MiB",
    ),
    (
        "{name: a, mode: on_demand, cache: {ttl: 59s}}",
        "2:52: keyrings[0].cache.ttl: use a duration from 1m to 1d",
    ),
    (
        "{name: a, mode: on_demand, cache: {negative_ttl: 6m}}",
        "2:61: keyrings[0].cache.negative_ttl: use a duration from 1s to 5m",
    ),
    (
        "{name: a, mode: on_demand, cache: {lookup_timeout: 4ms}}",
        "2:63: keyrings[0].cache.lookup_timeout: use a duration from 5ms to 10s",
    ),
    (
        "{name: a, mode: on_demand, cache: {unknown_per_second: 0}}",
        "2:67: keyrings[0].cache.unknown_per_second: use a whole number from 1 to 100000",
    ),
    (
        "{name: a, mode: on_demand, cache: {unknown_burst: 100001}}",
        "2:62: keyrings[0].cache.unknown_burst: use a whole number from 1 to 100000",
    ),
    (
        "{name: a, staleness: {warn_after: 2h}}",
        "2:46: keyrings[0].staleness.warn_after: use less than `deny_after`, which is 1h",
    ),
    (
        "{name: a, enforce: true, remove: true}",
        "2:45: keyrings[0].remove: can be used only with `enforce: false`, remove it",
    ),
    (
        "{name: a}, {name: a}",
        "2:30: keyrings[1].name: is in the list already, remove one of the two",
    ),
    (
        "{name: a, match: \"a*\"}",
        "2:29: keyrings[0].match: has no place beside `name`, remove one of the two",
    ),
    (
        "{match: \"a.*\"}",
        "2:20: keyrings[0].match: use 1 to 63 of a-z, 0-9, '-' and '*', beginning with a letter or '*', such as \"payments-*\"",
    ),
    (
        "{name: a}, {match: \"a*\"}, {match: \"a-*-eu\"}",
        "2:46: keyrings[2].match: never applies, because keyrings[1].match matches the same keyrings: move it before that entry, or remove it",
    ),
    (
        "{match: \"*\"}, {match: \"*\", mode: on_demand}",
        "2:34: keyrings[1].match: never applies, because keyrings[0].match matches the same keyrings: move it before that entry, or remove it",
    ),
    (
        "{match: \"*\", cache: {ttl: 10m}}",
        "2:32: keyrings[0].cache: has an effect only with `mode: on_demand`, remove it or set the mode",
    ),
];

#[test]
fn patterns_find_keyrings_in_the_order_of_the_file() {
    let settings = parse(
        r#"
control: { endpoints: ["http://127.0.0.1:9010"] }
keyrings:
  - { match: "payments-eu-*", mode: on_demand, cache: { ttl: 5m } }
  - { name: payments-us }
  - { match: "payments-*", staleness: { deny_after: 10m } }
default_keyring: payments-us
routes: [{ host: eu.example.com, keyring: payments-eu-1 }, { path_prefix: /x, keyring: payments-x }]
"#,
        "sidecar.yaml",
    )
    .unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(settings.keyrings.len(), 1);
    let rule = |name: &str| {
        let name = name.parse().expect("a name");
        let rule = PatternRule::of(&settings.patterns, &name)?;
        Some((rule.pattern.as_str(), rule.staleness.deny_after.as_secs()))
    };
    assert_eq!(rule("payments-eu-1"), Some(("payments-eu-*", 3_600)));
    assert_eq!(rule("payments-x"), Some(("payments-*", 600)));
    assert_eq!(rule("partners"), None);
    assert!(matches!(settings.patterns[0].mode, Mode::OnDemand(_)));
}

#[test]
fn a_route_names_a_keyring_that_a_pattern_can_find() {
    let file = "control: {endpoints: [\"http://[::1]:1\"]}\nkeyrings: [{match: \"a-*\"}]\n";
    assert_eq!(
        refusal(&format!("{file}default_keyring: b")),
        "sidecar.yaml:3:18: default_keyring: is not in `keyrings`, add it there or name another keyring"
    );
    assert!(refusal(&format!("{file}default_keyring: a-b")).starts_with("accepted"));
}

#[test]
fn each_bad_value_is_named_with_its_place() {
    for (line, expected) in BAD_VALUES.iter().chain(BAD_CLIENT_ADDRESSES) {
        assert_eq!(
            refusal(&format!("{LEAST}{line}\n")),
            format!("sidecar.yaml:{expected}"),
            "{line}"
        );
    }
}

#[test]
fn each_bad_keyring_is_named_with_its_place() {
    for (keyring, expected) in BAD_KEYRINGS {
        let text = format!("control: {{endpoints: [\"http://[::1]:1\"]}}\nkeyrings: [{keyring}]");
        assert_eq!(
            refusal(&text),
            format!("sidecar.yaml:{expected}"),
            "{keyring}"
        );
    }
}

#[test]
fn control_planes_beyond_loopback_need_tls_and_certificates() {
    const CLEAR: &str = "http:// is for this machine only (127.0.0.1, [::1] or localhost): use https:// for another machine";
    const BARE: &str =
        "https:// needs `control.tls`: `ca` or `bundles`, and `cert` with `key`, or `token_file`";
    const SLIP: &str =
        "http:// does not use `control.tls`: write https://, or remove `control.tls`";
    let tls = ", tls: {ca: a, cert: b, key: c}";
    for (endpoint, tls, expected) in [
        ("http://relatch-control:9010", "", CLEAR),
        ("http://10.0.0.1:9010", tls, CLEAR),
        ("https://relatch-control:9010", "", BARE),
        ("http://127.0.0.1:9010", tls, SLIP),
    ] {
        let text = format!(
            "control: {{endpoints: [\"{endpoint}\"]{tls}}}\nkeyrings: [{{name: payments}}]"
        );
        assert_eq!(
            refusal(&text),
            format!("sidecar.yaml:1:23: control.endpoints[0]: {expected}")
        );
    }
}

#[test]
fn certificates_are_read() {
    let settings = parse(
        "listen: {address: 0.0.0.0:9001, tls: {cert: s.pem, key: s.key}}\n\
         control: {endpoints: [\"https://relatch-control:9010\"], tls: {ca: ca.pem, cert: n.pem, key: n.key, \
         server_identity: \"spiffe://mesh/control\"}}\nkeyrings: [{name: payments}]\n",
        "sidecar.yaml",
    );
    let mut settings = settings.unwrap_or_else(|error| panic!("{error}"));
    assert_eq!(settings.listen.to_string(), "0.0.0.0:9001");
    let own = |name: &str| {
        Some(OwnFiles {
            cert: format!("{name}.pem").into(),
            key: format!("{name}.key").into(),
        })
    };
    let listen = TlsFiles {
        own: own("s"),
        ca: None,
    };
    assert_eq!(settings.listen_tls, Some(listen));
    let control = ClientTls {
        files: TlsFiles {
            own: own("n"),
            ca: Some(Authorities::Flat("ca.pem".into())),
        },
        server_identity: "spiffe://mesh/control".parse().ok(),
        token_file: None,
    };
    assert_eq!(settings.control_tls, Some(control));
    assert_eq!(settings.check_channels(), Ok(()));
    // What a flag may replace is held to the same.
    settings.listen_tls = None;
    let refused = settings.check_channels().expect_err("in clear");
    assert!(
        refused.to_string().starts_with("listen: without `tls`"),
        "{refused}"
    );
    settings.listen = "127.0.0.1:9001".parse().expect("an address");
    settings.control_tls = None;
    let refused = settings.check_channels().expect_err("no certificates");
    assert!(
        refused
            .to_string()
            .starts_with("control.endpoints: https:// needs"),
        "{refused}"
    );
}

#[test]
fn certificates_that_are_missing_or_of_no_use_are_named() {
    for (line, expected) in [
        (
            "listen: {address: 0.0.0.0:9001}",
            "3:19: listen: without `tls` only this machine may connect: use 127.0.0.1 or [::1], or add `tls`",
        ),
        (
            "listen: {address: 127.0.0.1:9001, tls: {cert: a}}",
            "3:40: listen.tls.key: is missing, name the key of its certificate",
        ),
        (
            "listen: {address: \"unix:///run/a.sock\", tls: {cert: a, key: b}}",
            "3:19: listen: a Unix socket never leaves this machine: remove `tls`",
        ),
        (
            "listen: {adress: 127.0.0.1:9001}",
            "3:10: listen.adress: is not a known field, did you mean `address`?",
        ),
    ] {
        let refused = refusal(&format!("{LEAST}{line}\n"));
        assert_eq!(refused, format!("sidecar.yaml:{expected}"), "{line}");
    }
    let missing = refusal(
        "control: {endpoints: [\"https://a:1\"], tls: {ca: a, server_identity: b}}\nkeyrings: [{name: k}]",
    );
    for line in [
        "1:44: control.tls.cert: is missing, name the certificate of this sidecar",
        "1:44: control.tls.key: is missing, name the key of its certificate",
        "1:69: control.tls.server_identity: an identity is a URI",
    ] {
        assert!(missing.contains(line), "{line}: {missing}");
    }
}

#[test]
fn bundles_are_read_in_the_place_of_one_file_of_authorities() {
    let own = "cert: n.pem, key: n.key";
    let with = |tls: &str| {
        "control: {endpoints: [\"https://a:1\"], tls: {TLS, OWN}}\nkeyrings: [{name: k}]"
            .replace("TLS", tls)
            .replace("OWN", own)
    };
    let two = "bundles: {mesh.example: m.pem, other.example: o.pem}";
    let control = "server_identity: \"spiffe://mesh.example/control\"";
    let read = parse(&with(&format!("{two}, {control}")), "sidecar.yaml");
    let tls = read.unwrap_or_else(|error| panic!("{error}")).control_tls;
    let domain = |name: &str| name.parse().expect("a trust domain");
    let bundles = [
        (domain("mesh.example"), "m.pem".into()),
        (domain("other.example"), "o.pem".into()),
    ];
    assert_eq!(
        tls.and_then(|tls| tls.files.ca),
        Some(Authorities::Bundles(bundles.into()))
    );
    let one = parse(&with("bundles: {mesh.example: m.pem}"), "sidecar.yaml");
    assert!(one.is_ok(), "{one:?}");
    for (tls, expected) in [
        (
            "ca: a.pem, bundles: {mesh.example: m.pem}",
            "1:65: control.tls.bundles: cannot be used together with `ca`: remove one of the two",
        ),
        (
            "bundles: {}",
            "1:54: control.tls.bundles: is empty, name the authorities of each trust domain, such as { mesh.example: mesh.pem }",
        ),
        (
            "bundles: {Mesh.example: m.pem}",
            "1:69: control.tls.bundles.Mesh.example: a trust domain is 1 to 255 of `a-z`, `0-9`, `.`, `-` and `_`, such as mesh.example, without spiffe://",
        ),
        (
            two,
            "1:44: control.tls.server_identity: is missing, name the identity of the control plane, such as spiffe://mesh.example/control: with several trust domains in `bundles`, it is needed",
        ),
        (
            "bundles: {other.example: o.pem}, server_identity: \"spiffe://mesh.example/control\"",
            "1:95: control.tls.server_identity: is of trust domain mesh.example, which is not in `bundles`: add its file there",
        ),
        (
            "bundles: {other.example: o.pem}, server_identity: \"https://other.example/control\"",
            "1:95: control.tls.server_identity: has to be a SPIFFE ID with `bundles`, such as spiffe://mesh.example/control",
        ),
    ] {
        assert_eq!(
            refusal(&with(tls)),
            format!("sidecar.yaml:{expected}"),
            "{tls}"
        );
    }
}

#[test]
fn a_token_stands_in_for_a_certificate() {
    let with = |tls: &str| {
        format!(
            "control: {{endpoints: [\"https://a:1\"], tls: {{{tls}}}}}\nkeyrings: [{{name: k}}]"
        )
    };
    let read = parse(&with("ca: ca.pem, token_file: a.token"), "sidecar.yaml");
    let tls = read.unwrap_or_else(|error| panic!("{error}")).control_tls;
    let tls = tls.expect("it is configured");
    assert_eq!(tls.token_file, Some("a.token".into()));
    let ca = Some(Authorities::Flat("ca.pem".into()));
    assert_eq!((tls.files.own, tls.files.ca), (None, ca));
    assert_eq!(
        refusal(&with("ca: ca.pem, token_file: a.token, key: a.key")),
        "sidecar.yaml:1:83: control.tls.key: cannot be used together with `token_file`: remove one of the two"
    );
}

#[test]
fn a_snapshot_file_needs_a_path_and_a_key() {
    assert_eq!(settings("").snapshot, None);
    let read = settings("snapshot: {path: /var/lib/relatch/a.snap, key_file: snapshot.key}\n");
    assert_eq!(
        read.snapshot,
        Some(SnapshotSettings {
            path: "/var/lib/relatch/a.snap".into(),
            key_file: "snapshot.key".into(),
            erase_on_stop: false,
        })
    );
    for (line, expected) in [
        (
            "snapshot: {path: a.snap}",
            "3:11: snapshot.key_file: is missing, such as /etc/relatch/snapshot.key",
        ),
        (
            "snapshot: {key_file: a.key}",
            "3:11: snapshot.path: is missing, such as /var/lib/relatch/keyring.snap",
        ),
        (
            "snapshot: {path: a, key_file: a}",
            "3:11: snapshot.key_file: is the same file as `snapshot.path`, use another one",
        ),
    ] {
        assert_eq!(
            refusal(&format!("{LEAST}{line}\n")),
            format!("sidecar.yaml:{expected}"),
            "{line}"
        );
    }
}

#[test]
fn unknown_fields_are_refused_at_every_level() {
    for (line, expected) in [
        (
            "keyrigns: []",
            "3:1: keyrigns: is not a known field, did you mean `keyrings`?",
        ),
        (
            "node: {ids: a}",
            "3:8: node.ids: is not a known field, did you mean `id`?",
        ),
        (
            "routes: [{hots: a}]",
            "3:11: routes[0].hots: is not a known field, did you mean `host`?",
        ),
        (
            "credentials: [{body: a}]",
            "3:16: credentials[0].body: is not a known field, use one of `header`, `scheme`, `basic`, `websocket_protocol`, `query`, `cookie`",
        ),
        (
            "identity_headers: {key: a}",
            "3:20: identity_headers.key: is not a known field, use one of `consumer`, `key_id`, `key_version`, `scopes`",
        ),
        (
            "notice: {header: a}",
            "3:10: notice.header: is not a known field, use one of `enabled`, `deprecation`, `sunset`",
        ),
        (
            "staleness: {warn: 1s}",
            "3:13: staleness.warn: is not a known field, use one of `warn_after`, `deny_after`",
        ),
        (
            "telemetry: {endpoint: a}",
            "3:13: telemetry.endpoint: is not a known field, use one of `otlp_endpoint`, `service_name`",
        ),
        (
            "snapshot: {file: a}",
            "3:12: snapshot.file: is not a known field, use one of `path`, `key_file`, `erase_on_stop`",
        ),
        (
            "log: {levels: a}",
            "3:7: log.levels: is not a known field, did you mean `level`?",
        ),
    ] {
        assert_eq!(
            refusal(&format!("{LEAST}{line}\n")),
            format!("sidecar.yaml:{expected}"),
            "{line}"
        );
    }
    let refused = refusal(&format!("{LEAST}tls: {{ca: a}}\n"));
    assert!(refused.contains("is not a known field, use one of `node`"));
    let control =
        refusal("control: {endpoints: [a], tsl: {}}\nkeyrings: [{name: payments, size: 1}]");
    assert_eq!(
        control,
        "sidecar.yaml:1:27: control.tsl: is not a known field, did you mean `tls`?"
    );
    let keyring = refusal("keyrings: [{name: payments, size: 1}]");
    assert_eq!(
        keyring,
        "sidecar.yaml:1:29: keyrings[0].size: is not a known field, use one of `name`, `match`, `mode`, `cache`, `staleness`, `enforce`, `remove`"
    );
}

#[test]
fn all_problems_are_told_in_the_order_of_the_file() {
    let text =
        "workers: 0\nkeyrings: [{name: A}, {name: b, mode: on_demands}]\nlog: {level: loud}\n";
    let error = parse(text, "sidecar.yaml").expect_err("four problems");
    let found: Vec<_> = error
        .problems()
        .iter()
        .map(|problem| (problem.line, problem.column, problem.field.as_str()))
        .collect();
    assert_eq!(
        found,
        [
            (1, 1, "control.endpoints"),
            (1, 10, "workers"),
            (2, 19, "keyrings[0].name"),
            (2, 39, "keyrings[1].mode"),
            (3, 14, "log.level"),
        ]
    );
}

#[test]
fn a_route_without_a_keyring_takes_the_default_one() {
    let settings = settings(
        "default_keyring: payments\nroutes: [{path_prefix: /}, {path_prefix: /a, auth: optional}]",
    );
    let routes: Vec<_> = settings
        .authz
        .routes()
        .iter()
        .map(|rule| (rule.path_prefix.to_string(), rule.keyring.as_str()))
        .collect();
    let expected = [("/a".to_owned(), "payments"), ("/".to_owned(), "payments")];
    assert_eq!(routes, expected);
}

#[test]
fn one_fault_is_told_once() {
    // The route takes the default keyring, which is wrong already, and a wrong host is not every host.
    let text = format!(
        "{LEAST}default_keyring: other\n\
         routes: [{{path_prefix: /a}}, {{keyring: payments, host: \"a:80\"}}, {{keyring: payments}}]\n"
    );
    let error = parse(&text, "sidecar.yaml").expect_err("two problems");
    let fields: Vec<_> = error
        .problems()
        .iter()
        .map(|problem| problem.field.as_str())
        .collect();
    assert_eq!(fields, ["default_keyring", "routes[1].host"]);
}

#[test]
fn an_empty_file_says_what_is_needed() {
    let expected = "sidecar.yaml:1:1: control.endpoints: is missing, name a control plane, such as \
                    [\"http://127.0.0.1:9010\"]\n\
                    sidecar.yaml:1:1: keyrings: is missing, name a keyring, such as [{ name: payments }]";
    for empty in ["", "# nothing\n", "control:\nkeyrings:\n", "{}"] {
        assert_eq!(refusal(empty), expected, "{empty:?}");
    }
}

#[test]
fn broken_yaml_is_named_with_its_place() {
    assert_eq!(
        refusal("workers: 1\nworkers: 2\n"),
        "sidecar.yaml:2:1: workers: is given twice, keep one of them"
    );
    assert_eq!(
        refusal("workers: 1\n---\nworkers: 2\n"),
        "sidecar.yaml:3:1: holds more than one YAML document, keep one of them"
    );
    assert!(refusal("node:\n  id: a\n bad\n").starts_with("sidecar.yaml:3:2: "));
}

#[test]
fn lists_are_bounded() {
    let places: Vec<_> = (0..17).map(|n| format!("{{query: q{n}}}")).collect();
    assert_eq!(
        refusal(&format!("{LEAST}credentials: [{}]\n", places.join(", "))),
        "sidecar.yaml:3:14: credentials: has 17 entries, use at most 16"
    );
    let keyrings: Vec<_> = (0..257).map(|n| format!("{{name: k{n}}}")).collect();
    assert_eq!(
        refusal(&format!(
            "control: {{endpoints: [\"http://[::1]:1\"]}}\nkeyrings: [{}]\n",
            keyrings.join(", ")
        )),
        "sidecar.yaml:2:11: keyrings: has 257 entries, use at most 256"
    );
}
