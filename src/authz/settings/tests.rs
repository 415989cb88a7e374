//! Tests of contradicting settings, reserved headers, and the order of rules.

use super::*;
use crate::{authz::TrustedProxies, key::Scopes};

fn header(name: &'static str, scheme: Option<&str>) -> CredentialSource {
    CredentialSource::Header {
        name: HeaderName::from_static(name),
        scheme: scheme.map(|scheme| scheme.parse().expect("a token")),
    }
}

fn with_credentials(credentials: Vec<CredentialSource>) -> Result<Settings, SettingsError> {
    Settings::new(SettingsParts {
        credentials,
        ..SettingsParts::default()
    })
}

fn rule(host: Option<&str>, path: &str) -> RouteRule {
    RouteRule {
        host: host.map(|host| host.parse().expect("a host")),
        path_prefix: path.parse().expect("a path"),
        keyring: crate::key::testing::keyring_name(),
        scopes: Scopes::default(),
        auth: Auth::Required,
        preflight: Preflight::Deny,
        enforcement: None,
        credentials: None,
    }
}

#[test]
fn default_settings_are_valid() {
    assert!(Settings::new(SettingsParts::default()).is_ok());
}

#[test]
fn the_address_of_the_client_has_a_header_of_its_own() {
    let with = |name: &'static str| {
        Settings::new(SettingsParts {
            client_address: AddressSource::Header {
                trusted: TrustedProxies::default(),
                name: HeaderName::from_static(name),
            },
            ..SettingsParts::default()
        })
    };
    assert!(with("x-real-ip").is_ok());
    for taken in ["x-api-key", "x_api.key", "x-relatch-scopes"] {
        let clash = SettingsError::AddressHeaderClash(taken.to_owned());
        assert_eq!(with(taken).err(), Some(clash));
    }
}

#[test]
fn contradictory_credentials_are_refused() {
    assert!(with_credentials(vec![]).is_err());
    assert!(with_credentials(vec![header("x-api-key", None), header("x-api-key", None)]).is_err());
    assert!(
        with_credentials(vec![
            header("authorization", None),
            header("authorization", Some("Bearer"))
        ])
        .is_err()
    );
    assert!(
        with_credentials(vec![
            header("authorization", Some("bearer")),
            header("authorization", Some("Bearer"))
        ])
        .is_err()
    );
    assert!(
        with_credentials(vec![
            header("authorization", Some("ApiKey")),
            header("authorization", Some("Bearer"))
        ])
        .is_ok()
    );
    for unusable in ["host", "cookie", "x-relatch-consumer", "x_relatch_scopes"] {
        assert!(
            with_credentials(vec![header(unusable, None)]).is_err(),
            "{unusable} was accepted"
        );
    }
}

#[test]
fn an_identity_header_has_one_use() {
    let with_consumer = |name: &'static str| {
        Settings::new(SettingsParts {
            identity: IdentityHeaders {
                consumer: Some(HeaderName::from_static(name)),
                ..IdentityHeaders::default()
            },
            ..SettingsParts::default()
        })
    };
    assert!(with_consumer("x-caller").is_ok());
    for clash in ["x_api_key", "x-relatch-key-id", "authorization", "host"] {
        assert!(with_consumer(clash).is_err(), "{clash} was accepted");
    }
}

#[test]
fn every_spelling_of_a_reserved_header_is_known() {
    let settings = Settings::new(SettingsParts {
        identity: IdentityHeaders {
            consumer: Some(HeaderName::from_static("x-caller")),
            scopes: None,
            ..IdentityHeaders::default()
        },
        ..SettingsParts::default()
    })
    .expect("valid settings");
    for spoofed in [
        "x-caller",
        "X_Caller",
        "x.caller",
        "x-relatch-consumer",
        "X_RELATCH.scopes",
        "x-api-key",
        "X-Api-Key",
        "x_api_key",
        "X.API-KEY",
    ] {
        assert!(
            settings.is_spoofed(spoofed.as_bytes(), settings.general_places()),
            "{spoofed} passes"
        );
    }
    for honest in ["authorization", "x-calle", "xcaller"] {
        assert!(
            !settings.is_spoofed(honest.as_bytes(), settings.general_places()),
            "{honest} is taken"
        );
    }
}

#[test]
fn the_most_specific_rule_comes_first_whatever_their_order() {
    let settings = Settings::new(SettingsParts {
        routes: vec![
            rule(None, "/"),
            rule(Some("*.example.com"), "/a"),
            rule(None, "/a/b"),
            rule(Some("api.example.com"), "/"),
            rule(Some("*.eu.example.com"), "/"),
            rule(None, "/a"),
        ],
        ..SettingsParts::default()
    })
    .expect("valid settings");
    let order: Vec<String> = settings
        .routes()
        .iter()
        .map(|rule| {
            let host = rule.host.as_ref().map(ToString::to_string);
            format!("{}{}", host.unwrap_or_default(), rule.path_prefix)
        })
        .collect();
    assert_eq!(
        order,
        [
            "api.example.com/",
            "*.eu.example.com/",
            "*.example.com/a",
            "/a/b",
            "/a",
            "/"
        ]
    );
}

#[test]
fn rules_that_match_the_same_are_refused() {
    for (one, other) in [("/a", "/a/"), ("/a", "/A")] {
        let settings = Settings::new(SettingsParts {
            routes: vec![rule(None, one), rule(None, other)],
            ..SettingsParts::default()
        });
        assert!(settings.is_err(), "{one} and {other} were accepted");
    }
}

#[test]
fn a_rule_can_have_places_of_its_own() {
    let own = |credentials| RouteRule {
        credentials: Some(credentials),
        ..rule(None, "/own")
    };
    let settings = Settings::new(SettingsParts {
        routes: vec![rule(None, "/"), own(vec![header("x-token", None)])],
        ..SettingsParts::default()
    });
    let settings = settings.expect("valid settings");
    assert_eq!(settings.credentials().len(), 3);
    let general = settings.general_places();
    assert_eq!(settings.places_of(1), general, "the rule for / has none");
    let places = settings.places_of(0);
    assert!(settings.is_spoofed(b"x_token", places));
    assert!(!settings.is_spoofed(b"x-token", general));
    assert!(!settings.is_spoofed(b"x-api-key", places));
    for refused in [
        vec![],
        vec![header("x-token", None), header("x-token", Some("Bearer"))],
        vec![header("x-relatch-scopes", None)],
        vec![header("sec-websocket-protocol", None)],
    ] {
        let settings = Settings::new(SettingsParts {
            routes: vec![own(refused)],
            ..SettingsParts::default()
        });
        assert!(settings.is_err());
    }
}

#[test]
fn only_so_many_different_places_are_possible() {
    let rules = |count: usize| {
        let rules = (0..count).map(|at| RouteRule {
            credentials: Some(vec![CredentialSource::Query {
                name: format!("key{at}").parse().expect("a name"),
            }]),
            ..rule(None, &format!("/{at}"))
        });
        Settings::new(SettingsParts {
            routes: rules.collect(),
            ..SettingsParts::default()
        })
    };
    let most = Settings::MAX_ALL_SOURCES - SettingsParts::default().credentials.len();
    assert!(rules(most).is_ok());
    let error = rules(most + 1).err();
    assert_eq!(error, Some(SettingsError::AllSourcesCount));
}
