//! The listener for proxies that ask over HTTP, in the configuration file of a sidecar.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    str::FromStr,
};

use serde::Deserialize;
use serde_saphyr::{Location, Spanned};

use super::{
    credential::{Placed, RawCredential},
    reader::{Findings, Text},
    route::KnownKeyrings,
    tls::{RawListener, RawServer},
    value::Listen,
};
use crate::{
    authz::{self, CredentialSource, Dialect, SettingsParts},
    key::{KeyringName, Scope, Scopes},
    parse::ParseValueError,
    tls::TlsFiles,
};

/// The listener for proxies that ask over HTTP.
#[derive(Clone, Debug)]
pub(crate) struct HttpAuthzSettings {
    /// The address; without TLS, on loopback or a Unix socket. Default: `127.0.0.1:9003`.
    pub(crate) listen: Listen,
    /// The certificate of `listen`, and the authorities of the certificates that proxies have to present. Default: none.
    pub(crate) listen_tls: Option<TlsFiles>,
    /// The profiles, 1 to 64, each name once.
    pub(crate) profiles: Vec<ProfileSettings>,
}

/// What a proxy asks for at `/authz/<name>`.
#[derive(Clone, Debug)]
pub(crate) struct ProfileSettings {
    pub(crate) name: ProfileName,
    /// The keyring of the keys. Default: `default_keyring`.
    pub(crate) keyring: KeyringName,
    /// The scopes that a key must have. Default: none.
    pub(crate) scopes: Scopes,
    /// The settings of its checks, with its dialect and its places of credentials.
    pub(crate) authz: authz::Settings,
}

/// The name of a profile: 1 to 64 letters, digits and any of `-`, `_` and `.`, which need no escape in a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ProfileName(String);

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawHttpAuthz {
    listen: Option<Spanned<RawListener<RawServer>>>,
    profiles: Option<Spanned<Vec<Spanned<RawProfile>>>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawProfile {
    name: Option<Text>,
    dialect: Option<Text>,
    keyring: Option<Text>,
    scopes: Option<Vec<Text>>,
    credentials: Option<Spanned<Vec<Spanned<RawCredential>>>>,
}

/// What the rest of the file says about checks.
pub(super) struct Shared<'a> {
    pub(super) keyrings: &'a KnownKeyrings<'a>,
    pub(super) credentials: &'a [Placed],
}

/// The listener before the settings of its checks are made.
pub(super) struct Parsed {
    listen: Listen,
    listen_tls: Option<TlsFiles>,
    /// The place of the address in the file.
    pub(super) place: Location,
    profiles: Vec<ParsedProfile>,
}

/// A profile before the settings of its checks are made.
struct ParsedProfile {
    at: usize,
    place: Location,
    name: ProfileName,
    dialect: Dialect,
    keyring: KeyringName,
    scopes: Scopes,
    /// Its own places; none: those of the file.
    credentials: Option<Vec<CredentialSource>>,
}

/// The most profiles: a check compares them one by one, and one is enough for all routes with the same requirements.
const MAX_PROFILES: usize = 64;
const DEFAULT_LISTEN: Listen = Listen::Tcp(SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 9003));
pub(super) const LISTEN: &str = "http_authz.listen";
const PROFILES: &str = "http_authz.profiles";

impl HttpAuthzSettings {
    /// Whether both serve the same profiles at the same address. The settings of their checks may differ.
    pub(super) fn serve_the_same(one: Option<&Self>, other: Option<&Self>) -> bool {
        let served = |settings: &Self| {
            let profiles = settings.profiles.iter().map(|profile| {
                let ProfileSettings {
                    name,
                    keyring,
                    scopes,
                    authz,
                } = profile;
                let dialect = authz.dialect();
                (name.clone(), keyring.clone(), scopes.clone(), dialect)
            });
            let profiles: Vec<_> = profiles.collect();
            (
                settings.listen.clone(),
                settings.listen_tls.clone(),
                profiles,
            )
        };
        one.map(served) == other.map(served)
    }
}

impl RawHttpAuthz {
    /// The listener; none if it has no profile, which is then noted.
    pub(super) fn parse(
        raw: Spanned<Self>,
        shared: &Shared<'_>,
        found: &mut Findings,
    ) -> Option<Parsed> {
        let Spanned {
            value: raw,
            referenced: place,
            ..
        } = raw;
        let listener = RawListener::<RawServer>::into_parts(raw.listen, LISTEN, found);
        let listen = listener.listen(LISTEN, found).unwrap_or(DEFAULT_LISTEN);
        let address = listener.address.as_ref();
        let at = address.map_or(place, |text| text.referenced);
        let place_of_list = raw.profiles.as_ref().map_or(place, |raw| raw.referenced);
        let Some(profiles) = raw.profiles.filter(|raw| !raw.value.is_empty()) else {
            found.missing(
                place_of_list,
                PROFILES,
                "name what a proxy asks for, such as [{ name: shop, dialect: traefik, keyring: payments }]",
            );
            return None;
        };
        found.bound(PROFILES, &profiles, MAX_PROFILES);
        let mut parsed: Vec<ParsedProfile> = Vec::new();
        for (at, raw) in profiles.value.iter().enumerate().take(MAX_PROFILES) {
            let Some(profile) = raw.value.parse(at, raw.referenced, shared, found) else {
                continue;
            };
            if parsed.iter().any(|other| other.name == profile.name) {
                found.note(
                    raw.referenced,
                    format_args!("{PROFILES}[{at}].name"),
                    "is in the list already, use another name",
                );
            }
            parsed.push(profile);
        }
        Some(Parsed {
            listen,
            listen_tls: listener.tls,
            place: at,
            profiles: parsed,
        })
    }
}

impl RawProfile {
    /// None if something is missing or wrong, which is then noted.
    fn parse(
        &self,
        at: usize,
        place: Location,
        shared: &Shared<'_>,
        found: &mut Findings,
    ) -> Option<ParsedProfile> {
        let field = |name: &str| format!("{PROFILES}[{at}].{name}");
        let advice = "the proxy asks at /authz/<name>";
        let name = found.required(place, field("name"), advice, self.name.as_ref(), str::parse);
        let advice = "use traefik, caddy or nginx";
        let dialect = self.dialect.as_ref();
        let dialect = found.required(place, field("dialect"), advice, dialect, str::parse);
        let keyring = self.keyring.as_ref();
        let keyring = shared
            .keyrings
            .named(place, &field("keyring"), keyring, found);
        let scopes = self.scopes.iter().flatten().enumerate();
        let scopes = scopes.filter_map(|(i, scope)| {
            let field = format!("{PROFILES}[{at}].scopes[{i}]");
            found.parse(field, Some(scope), str::parse::<Scope>)
        });
        let scopes = scopes.collect();
        let own = self.credentials.as_ref();
        let own = own.map(|raw| Placed::from_raw(Some(raw), &field("credentials"), found));
        let dialect: Dialect = dialect?;
        let places = own.as_deref().unwrap_or(shared.credentials);
        if let Some(kept) = places.iter().find(|placed| !placed.source.is_header()) {
            let kept_at = kept.at.filter(|_| own.is_some()).unwrap_or(place);
            let advice = if own.is_some() {
                "name headers only"
            } else {
                "give the profile a list of its own, of headers only"
            };
            found.note(
                kept_at,
                field("credentials"),
                format_args!(
                    "a key in the {} would reach the upstream, because {dialect} removes only whole headers from a request: {advice}",
                    kept.source
                ),
            );
        }
        Some(ParsedProfile {
            at,
            place,
            name: name?,
            dialect,
            keyring: keyring?,
            scopes,
            credentials: own.map(|own| own.into_iter().map(|placed| placed.source).collect()),
        })
    }
}

impl Parsed {
    /// The address; none if the system chooses the port.
    pub(super) fn fixed_address(&self) -> Option<&Listen> {
        match &self.listen {
            Listen::Tcp(address) if address.port() == 0 => None,
            listen => Some(listen),
        }
    }

    /// The settings: those of `parts`, and of each profile what it changes. None if they do not fit together, which is then
    /// noted.
    pub(super) fn finish(
        self,
        parts: &SettingsParts,
        found: &mut Findings,
    ) -> Option<HttpAuthzSettings> {
        let profiles = self.profiles.into_iter();
        let profiles: Option<Vec<_>> = profiles
            .map(|profile| profile.finish(parts.clone(), found))
            .collect();
        Some(HttpAuthzSettings {
            listen: self.listen,
            listen_tls: self.listen_tls,
            profiles: profiles?,
        })
    }
}

impl ParsedProfile {
    fn finish(self, mut parts: SettingsParts, found: &mut Findings) -> Option<ProfileSettings> {
        parts.dialect = self.dialect;
        // The profile decides about every request, and no rule does.
        parts.routes = Vec::new();
        parts.default_keyring = Some(self.keyring.clone());
        parts.credentials = self.credentials.unwrap_or(parts.credentials);
        match authz::Settings::new(parts) {
            Ok(authz) => Some(ProfileSettings {
                name: self.name,
                keyring: self.keyring,
                scopes: self.scopes,
                authz,
            }),
            Err(error) => {
                found.note(self.place, format_args!("{PROFILES}[{}]", self.at), error);
                None
            }
        }
    }
}

impl fmt::Display for ProfileName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for ProfileName {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const ERROR: ParseValueError =
            ParseValueError::new("use 1 to 64 letters, digits and any of - _ .");

        let is_valid = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte);
        let is_segment = matches!(text.len(), 1..=64) && text.bytes().all(is_valid);
        if is_segment && !matches!(text, "." | "..") {
            Ok(Self(text.to_owned()))
        } else {
            Err(ERROR)
        }
    }
}

#[cfg(test)]
mod tests {
    use ::http::HeaderName;

    use super::super::{SidecarSettings, sidecar};
    use super::*;

    /// The least that a file must hold.
    const LEAST: &str = "control: {endpoints: [\"http://127.0.0.1:9010\"]}\n\
        keyrings: [{name: payments}, {name: partners}]\n\
        default_keyring: payments\n";

    fn read(more: &str) -> Result<SidecarSettings, String> {
        let read = sidecar::parse(&format!("{LEAST}{more}"), "sidecar.yaml");
        read.map_err(|error| error.to_string())
    }

    fn settings(more: &str) -> HttpAuthzSettings {
        let settings = read(more).unwrap_or_else(|error| panic!("{error}"));
        settings.http_authz.expect("it is configured")
    }

    #[track_caller]
    fn assert_refused(more: &str, problem: &str) {
        let refusal = read(more).expect_err("it is wrong");
        assert!(refusal.contains(problem), "{problem} is not in\n{refusal}");
    }

    #[test]
    fn without_the_section_there_is_no_listener() {
        assert!(read("").expect("a right file").http_authz.is_none());
    }

    #[test]
    fn a_profile_has_defaults() {
        let settings = settings("http_authz: { profiles: [{ name: shop, dialect: traefik }] }\n");
        assert_eq!(settings.listen.to_string(), "127.0.0.1:9003");
        assert!(settings.listen_tls.is_none());
        let [profile] = &*settings.profiles else {
            panic!("one profile: {settings:?}");
        };
        assert_eq!(profile.name.to_string(), "shop");
        assert_eq!(profile.keyring.as_str(), "payments");
        assert!(profile.scopes.to_string().is_empty());
        assert_eq!(profile.authz.dialect(), Dialect::Traefik);
        assert_eq!(profile.authz.credentials(), CredentialSource::defaults());
        let listed: Vec<_> = profile
            .authz
            .listed_headers()
            .map(HeaderName::as_str)
            .collect();
        assert_eq!(
            listed,
            [
                "x-relatch-consumer",
                "x-relatch-key-id",
                "x-relatch-key-version",
                "x-relatch-scopes",
                "x-api-key",
                "authorization"
            ]
        );
    }

    #[test]
    fn every_field_is_read() {
        let settings = settings(
            r"
routes: [{ path_prefix: /free, auth: optional }]
credentials: [{ query: api_key }]
identity_headers: { consumer: x-caller }
http_authz:
  listen: unix:///run/relatch/http.sock
  profiles:
    - { name: shop, dialect: caddy, keyring: partners, scopes: [write, read], credentials: [{ header: x-key }] }
    - { name: Blog_2.0, dialect: nginx, credentials: [{ header: authorization, scheme: Key }] }
",
        );
        assert_eq!(settings.listen.to_string(), "unix:///run/relatch/http.sock");
        let [shop, blog] = &*settings.profiles else {
            panic!("two profiles: {settings:?}");
        };
        assert_eq!(shop.keyring.as_str(), "partners");
        assert_eq!(shop.scopes.to_string(), "read write");
        assert_eq!(shop.authz.dialect(), Dialect::Caddy);
        assert_eq!(shop.authz.credentials()[0].to_string(), "header x-key");
        assert_eq!(shop.authz.default_keyring(), Some(&shop.keyring));
        assert!(
            shop.authz.routes().is_empty(),
            "a rule could make the key optional"
        );
        let consumer = shop.authz.identity().consumer.as_ref();
        assert_eq!(consumer.map(HeaderName::as_str), Some("x-caller"));
        assert_eq!(blog.authz.dialect(), Dialect::Nginx);
        assert_eq!(blog.keyring.as_str(), "payments");
    }

    #[test]
    fn a_place_that_a_proxy_cannot_clear_is_refused() {
        let profile = |credentials: &str, of_profile: &str| {
            format!(
                "credentials: [{{ header: x-api-key }}, {credentials}]\n\
                 http_authz: {{ profiles: [{{ name: shop, dialect: traefik{of_profile} }}] }}\n"
            )
        };
        assert_refused(
            &profile("{ query: api_key }", ""),
            "http_authz.profiles[0].credentials: a key in the query parameter api_key would reach the upstream, because traefik removes only whole headers from a request: give the profile a list of its own, of headers only",
        );
        assert_refused(
            &profile("{ header: x-key }", ", credentials: [{ cookie: key }]"),
            "http_authz.profiles[0].credentials: a key in the cookie key would reach the upstream, because traefik removes only whole headers from a request: name headers only",
        );
        let own = ", credentials: [{ header: x-api-key }]";
        read(&profile("{ query: api_key }", own)).expect("it has a list of its own");
        // The settings themselves refuse it, too.
        let settings = authz::Settings::new(SettingsParts {
            credentials: vec![CredentialSource::Query {
                name: "api_key".parse().expect("a name"),
            }],
            dialect: Dialect::Nginx,
            ..SettingsParts::default()
        });
        let refusal = settings.expect_err("nginx cannot remove it").to_string();
        assert!(
            refusal.contains("nginx removes only whole headers"),
            "{refusal}"
        );
    }

    #[test]
    fn what_is_missing_or_wrong_is_refused_where_it_stands() {
        for (more, problem) in [
            (
                "http_authz: {}\n",
                "4:13: http_authz.profiles: is missing, name what a proxy asks for",
            ),
            (
                "http_authz: { profiles: [] }\n",
                "http_authz.profiles: is missing",
            ),
            (
                "http_authz: { profiles: [{ dialect: nginx }] }\n",
                "http_authz.profiles[0].name: is missing, the proxy asks at /authz/<name>",
            ),
            (
                "http_authz: { profiles: [{ name: a/b, dialect: nginx }] }\n",
                "http_authz.profiles[0].name: use 1 to 64 letters, digits and any of - _ .",
            ),
            (
                "http_authz: { profiles: [{ name: .., dialect: nginx }] }\n",
                "http_authz.profiles[0].name: use 1 to 64",
            ),
            (
                "http_authz: { profiles: [{ name: a }] }\n",
                "http_authz.profiles[0].dialect: is missing, use traefik, caddy or nginx",
            ),
            (
                "http_authz: { profiles: [{ name: a, dialect: envoy }] }\n",
                "http_authz.profiles[0].dialect: use traefik, caddy or nginx; Envoy asks over gRPC, at `listen`",
            ),
            (
                "http_authz: { profiles: [{ name: a, dialect: nginx, keyring: other }] }\n",
                "http_authz.profiles[0].keyring: is not in `keyrings`",
            ),
            (
                "http_authz: { profiles: [{ name: a, dialect: nginx, scopes: [\"a b\"] }] }\n",
                "http_authz.profiles[0].scopes[0]:",
            ),
            (
                "http_authz: { profiles: [{ name: a, dialect: nginx }, { name: a, dialect: caddy }] }\n",
                "http_authz.profiles[1].name: is in the list already, use another name",
            ),
            (
                "http_authz: { profiles: [{ name: a, dialect: nginx, credentials: [{ header: x-a }, { header: x_a }] }] }\n",
                "http_authz.profiles[0].credentials[1]: header x_a is already in the list",
            ),
            (
                "http_authz: { profiles: [{ name: a, dialect: nginx, credentials: [{ header: cookie }] }] }\n",
                "http_authz.profiles[0].credentials[0].header: this header has a fixed meaning",
            ),
            (
                "identity_headers: { consumer: x-caller }\nhttp_authz: { profiles: [{ name: a, dialect: nginx, credentials: [{ header: x-caller }] }] }\n",
                "http_authz.profiles[0]: the header \"x-caller\", or another spelling of it, is configured for two uses",
            ),
            (
                "http_authz: { listen: 0.0.0.0:9003, profiles: [{ name: a, dialect: nginx }] }\n",
                "http_authz.listen: without `tls` only this machine may connect",
            ),
            (
                "http_authz: { listen: 127.0.0.1:9001, profiles: [{ name: a, dialect: nginx }] }\n",
                "http_authz.listen: is the address of `listen` or `http` too, use another one",
            ),
            (
                "http: 127.0.0.1:9003\nhttp_authz: { profiles: [{ name: a, dialect: nginx }] }\n",
                "http_authz.listen: is the address of `listen` or `http` too",
            ),
        ] {
            assert_refused(more, problem);
        }
    }

    #[test]
    fn a_profile_without_any_keyring_is_refused() {
        let text = "control: {endpoints: [\"http://127.0.0.1:9010\"]}\nkeyrings: [{name: payments}]\n\
            http_authz: { profiles: [{ name: a, dialect: nginx }] }\n";
        let refusal = sidecar::parse(text, "sidecar.yaml").expect_err("no keyring");
        let problem = "http_authz.profiles[0].keyring: is missing, name a keyring here or in `default_keyring`";
        assert!(refusal.to_string().contains(problem), "{refusal}");
    }

    #[test]
    fn the_summary_names_the_profiles() {
        let profiles = "http_authz: { profiles: [{ name: shop, dialect: traefik }, { name: blog, dialect: nginx }] }\n";
        let settings = read(profiles).expect("a right file");
        let summary = super::super::Checked::Sidecar(Box::new(settings)).to_string();
        let end = "; over HTTP on 127.0.0.1:9003: shop for traefik, blog for nginx";
        assert!(summary.ends_with(end), "{summary}");
    }
}
