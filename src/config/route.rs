//! The routes in the configuration file of a sidecar: what applies to requests for which the mesh does not say it.

use serde::Deserialize;
use serde_saphyr::{Location, Spanned};

use super::{
    credential::{Placed, RawCredential},
    enforcement::enforcement,
    keyring::SidecarKeyrings,
    reader::{Findings, Text},
};
use crate::{
    authz::{Auth, PathPrefix, Preflight, RouteRule, Settings},
    key::{KeyringName, Scope},
};

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawRoute {
    host: Option<Text>,
    path_prefix: Option<Text>,
    keyring: Option<Text>,
    scopes: Option<Vec<Text>>,
    auth: Option<Text>,
    preflight: Option<Text>,
    enforce: Option<Text>,
    remove: Option<Text>,
    credentials: Option<Spanned<Vec<Spanned<RawCredential>>>>,
}

/// The rules of the file, and the places of credentials that they have of their own.
#[derive(Debug, Default)]
pub(super) struct Rules {
    pub(super) rules: Vec<RouteRule>,
    pub(super) credentials: Vec<Placed>,
}

/// The keyrings that a route can name.
#[derive(Debug)]
pub(super) struct KnownKeyrings<'a> {
    keyrings: &'a SidecarKeyrings,
    default: DefaultKeyring,
}

/// The keyring of the routes that do not name one.
#[derive(Debug)]
enum DefaultKeyring {
    Missing,
    /// Given, but not one of the keyrings, which was noted.
    Wrong,
    Named(KeyringName),
}

impl<'a> KnownKeyrings<'a> {
    /// The keyrings of the file, with `default_keyring`, which has to be one of them.
    pub(super) fn from_raw(
        keyrings: &'a SidecarKeyrings,
        default_keyring: Option<&Text>,
        found: &mut Findings,
    ) -> Self {
        let keyring = found.parse("default_keyring", default_keyring, |text| {
            known(text, keyrings)
        });
        let default = match (default_keyring, keyring) {
            (_, Some(name)) => DefaultKeyring::Named(name),
            (Some(_), None) => DefaultKeyring::Wrong,
            (None, None) => DefaultKeyring::Missing,
        };
        Self { keyrings, default }
    }

    /// The keyring that `text` names, or the default one for the value at `place`. None if there is neither, or if `text` is
    /// wrong, which is then noted.
    pub(super) fn named(
        &self,
        place: Location,
        field: &str,
        text: Option<&Text>,
        found: &mut Findings,
    ) -> Option<KeyringName> {
        match (text, &self.default) {
            (Some(_), _) => found.parse(field, text, |text| known(text, self.keyrings)),
            (None, DefaultKeyring::Named(name)) => Some(name.clone()),
            (None, DefaultKeyring::Wrong) => None,
            (None, DefaultKeyring::Missing) => {
                let advice = "name a keyring here or in `default_keyring`";
                found.missing(place, field, advice);
                None
            }
        }
    }

    /// The keyring of requests that no rule matches.
    pub(super) fn default_keyring(&self) -> Option<&KeyringName> {
        match &self.default {
            DefaultKeyring::Named(name) => Some(name),
            DefaultKeyring::Missing | DefaultKeyring::Wrong => None,
        }
    }
}

/// The rules of the file.
pub(super) fn rules(
    raw: Option<Spanned<Vec<Spanned<RawRoute>>>>,
    keyrings: &KnownKeyrings<'_>,
    found: &mut Findings,
) -> Rules {
    let Some(raw) = raw else {
        return Rules::default();
    };
    found.bound("routes", &raw, Settings::MAX_ROUTES);
    let mut rules: Vec<(usize, RouteRule)> = Vec::new();
    let mut credentials = Vec::new();
    for (at, raw) in raw.value.iter().enumerate().take(Settings::MAX_ROUTES) {
        let own = raw.value.credentials.as_ref().map(|raw| {
            let field = format!("routes[{at}].credentials");
            Placed::list(&field, raw, found)
        });
        let sources = own
            .as_ref()
            .map(|own| own.iter().map(|it| it.source.clone()).collect());
        credentials.extend(own.into_iter().flatten());
        let Some(rule) = rule(at, raw, keyrings, found) else {
            continue;
        };
        let rule = RouteRule {
            credentials: sources,
            ..rule
        };
        if let Some((other, _)) = rules.iter().find(|(_, other)| other.matches_as(&rule)) {
            found.note(
                raw.referenced,
                format_args!("routes[{at}]"),
                format_args!("matches the same requests as routes[{other}], remove one of the two"),
            );
        }
        rules.push((at, rule));
    }
    Rules {
        rules: rules.into_iter().map(|(_, rule)| rule).collect(),
        credentials,
    }
}

/// The rule at index `at`, without places of its own; none if it is wrong, which is then noted.
fn rule(
    at: usize,
    raw: &Spanned<RawRoute>,
    keyrings: &KnownKeyrings<'_>,
    found: &mut Findings,
) -> Option<RouteRule> {
    let field = |name: &str| format!("routes[{at}].{name}");
    let RawRoute {
        host,
        path_prefix,
        keyring,
        scopes,
        auth,
        preflight,
        enforce,
        remove,
        credentials: _,
    } = &raw.value;
    let host = found.parse_or(field("host"), host.as_ref(), None, |text| {
        text.parse().map(Some)
    });
    let path_prefix = found.parse_or(
        field("path_prefix"),
        path_prefix.as_ref(),
        PathPrefix::default(),
        str::parse,
    );
    let keyring = keyrings.named(raw.referenced, &field("keyring"), keyring.as_ref(), found);
    let scopes = scopes
        .iter()
        .flatten()
        .enumerate()
        .filter_map(|(i, scope)| {
            found.parse(
                format_args!("routes[{at}].scopes[{i}]"),
                Some(scope),
                str::parse::<Scope>,
            )
        })
        .collect();
    let auth = found.parse_or(field("auth"), auth.as_ref(), Auth::default(), str::parse);
    let preflight = found.parse_or(
        field("preflight"),
        preflight.as_ref(),
        Preflight::default(),
        str::parse,
    );
    let enforcement = enforcement(field, enforce.as_ref(), remove.as_ref(), found);
    Some(RouteRule {
        host: host?,
        path_prefix: path_prefix?,
        keyring: keyring?,
        scopes,
        auth: auth?,
        preflight: preflight?,
        enforcement,
        credentials: None,
    })
}

/// Parses the name of a keyring of the file.
fn known(text: &str, keyrings: &SidecarKeyrings) -> Result<KeyringName, String> {
    let name: KeyringName = text.parse().map_err(|error| format!("{error}"))?;
    if keyrings.has(&name) {
        Ok(name)
    } else {
        Err("is not in `keyrings`, add it there or name another keyring".to_owned())
    }
}
