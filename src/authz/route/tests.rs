//! The rule that applies to a request, in every spelling of its host and path.

use prost::Message as _;

use super::*;
use crate::authz::{
    settings::{CredentialSource, Enforcements, SettingsParts},
    testing::{Message, parts},
};

fn rule(host: Option<&str>, path: &str, keyring: &str, scopes: &str) -> RouteRule {
    RouteRule {
        host: host.map(|host| host.parse().expect("a host")),
        path_prefix: path.parse().expect("a path"),
        keyring: keyring.parse().expect("a name"),
        scopes: Scopes::parse(scopes).expect("scopes"),
        auth: Auth::Required,
        preflight: Preflight::Deny,
        enforcement: None,
        credentials: None,
    }
}

fn settings() -> Settings {
    let public = RouteRule {
        auth: Auth::Optional,
        ..rule(None, "/public", "payments", "")
    };
    Settings::new(SettingsParts {
        routes: vec![
            rule(None, "/", "payments", ""),
            rule(None, "/admin", "payments", "admin"),
            rule(None, "/admin/status", "payments", "read"),
            rule(Some("*.partners.example.com"), "/", "partners", ""),
            public,
        ],
        ..parts()
    })
    .expect("valid settings")
}

fn chosen(settings: &Settings, message: &Message) -> Result<(String, String, Auth), RouteError> {
    let request = message.joined().encode_to_vec();
    let input = CheckInput::read(&request).expect("a request");
    let route = Route::choose(settings, &input)?;
    Ok((
        route.keyring.unwrap_or_default().to_owned(),
        route.scopes.to_string(),
        route.auth,
    ))
}

fn scopes_of(path: &str) -> Result<String, RouteError> {
    chosen(&settings(), &Message::get(path.to_owned())).map(|(_, scopes, _)| scopes)
}

#[test]
fn extensions_win_over_rules_and_the_default() {
    let message = Message::get("/admin")
        .extension("relatch.keyring", "partners")
        .extension("relatch.scopes", "a b")
        .extension("relatch.auth", "optional")
        .extension("other", "\u{1}");
    let route = chosen(&settings(), &message);
    assert_eq!(route, Ok(("partners".into(), "a b".into(), Auth::Optional)));
}

#[test]
fn a_rule_never_loosens_what_the_route_sets() {
    let keyring = |path: &'static str| Message::get(path).extension("relatch.keyring", "p");
    let admin = chosen(&settings(), &keyring("/admin"));
    assert_eq!(admin, Ok(("p".into(), "admin".into(), Auth::Required)));
    let public = chosen(&settings(), &keyring("/public"));
    assert_eq!(public, Ok(("p".into(), String::new(), Auth::Required)));
}

#[test]
fn rules_win_over_the_default() {
    let at = |host: &'static str, path: &'static str| {
        chosen(&settings(), &Message::get(path).host(host))
    };
    let expect = |keyring: &str, scopes: &str, auth| Ok((keyring.into(), scopes.into(), auth));
    let required = Auth::Required;
    assert_eq!(at("a", "/x"), expect("payments", "", required));
    assert_eq!(
        at("a", "/public?x=/admin"),
        expect("payments", "", Auth::Optional)
    );
    assert_eq!(at("a", "/admin?x"), expect("payments", "admin", required));
    for host in [
        "eu.partners.example.com",
        "EU.Partners.example.com:8443",
        "eu.partners.example.com.",
    ] {
        assert_eq!(
            at(host, "/admin"),
            expect("partners", "", required),
            "{host}"
        );
    }
}

#[test]
fn without_rules_the_default_demands_a_key() {
    let settings = Settings::new(parts()).expect("valid settings");
    let route = chosen(&settings, &Message::get("/a/../%2e%2e//b").host("odd host"));
    assert_eq!(
        route,
        Ok(("payments".into(), String::new(), Auth::Required))
    );
}

#[test]
fn invalid_extensions_are_refused() {
    for (name, value, error) in [
        ("relatch.auth", "none", RouteError::InvalidExtension),
        ("relatch.auth", "", RouteError::InvalidExtension),
        ("relatch.auth", "Optional", RouteError::InvalidExtension),
        ("relatch.scopes", "a\"b", RouteError::InvalidExtension),
        ("relatch.scopes", "a\tb", RouteError::InvalidExtension),
        ("relatch.scope", "a", RouteError::UnknownExtension),
    ] {
        let message = Message::get("/").extension(name, value);
        assert_eq!(chosen(&settings(), &message), Err(error), "{name}={value}");
    }
    let twice = Message::get("/")
        .extension("relatch.keyring", "a")
        .extension("relatch.keyring", "a");
    assert_eq!(
        chosen(&settings(), &twice),
        Err(RouteError::RepeatedExtension)
    );
}

#[test]
fn odd_spellings_of_a_path_do_not_dodge_its_rule() {
    for dodge in [
        "//admin",
        "/./admin",
        "/%61dmin",
        "/%2561dmin",
        "/x/../admin",
        "/x/%2e%2e/admin",
        "/x/..%2fadmin",
        "/x/..\\admin",
        "/x/..;a=b/admin",
        "/\\admin",
        "/%5cadmin",
        "/;/admin",
        "/admin;x",
        "/ADMIN",
        "/admin/../public",
        "/admin%2fx/../../public",
        "/admin//status",
        "/admin/%73tatus",
        "admin",
        "/%252525252561dmin",
        "/admin%00",
        "/x%00/../admin",
        "/x%2500",
    ] {
        assert_eq!(scopes_of(dodge), Err(RouteError::OddPath), "{dodge}");
    }
}

#[test]
fn odd_spellings_under_one_rule_pass() {
    for (path, scopes) in [
        ("/admin/%7euser//x/./y", "admin"),
        ("/admin/a;b=c/d%2Fe", "admin"),
        ("/x/100%25", ""),
        ("/x//y;z", ""),
        ("*", ""),
        ("/x%zz", ""),
    ] {
        assert_eq!(scopes_of(path), Ok(scopes.to_owned()), "{path}");
    }
}

#[test]
fn odd_hosts_are_refused_where_a_rule_looks_at_hosts() {
    for host in [
        "a b",
        "user@a",
        "a,b",
        "a:80:81",
        "a%2eb",
        "[::1",
        "[::1]x",
        "\u{e4}",
        "a..",
        "a..b",
        ".a",
        ".",
        "[a]",
        "[127.0.0.1]",
        "::1",
        "127.1",
        "127.0.0.1.1",
        "0x7f.1",
        "2130706433",
        "127.0.0.01",
        "a.0X7f",
        "[fe80::1%25lo]",
    ] {
        let message = Message::get("/").host(host);
        assert_eq!(
            chosen(&settings(), &message),
            Err(RouteError::OddHost),
            "{host}"
        );
    }
    for host in [
        "",
        "[::1]:80",
        "127.0.0.1:80",
        "a1.b2:80",
        "1a.example.com.",
    ] {
        assert!(chosen(&settings(), &Message::get("/").host(host)).is_ok());
    }
}

#[test]
fn addresses_are_compared_as_addresses() {
    let settings = Settings::new(SettingsParts {
        routes: vec![
            rule(Some("2001:DB8:0::1"), "/", "six", ""),
            rule(Some("192.0.2.1"), "/", "four", ""),
        ],
        ..parts()
    });
    let settings = settings.expect("valid settings");
    for (host, keyring) in [
        ("[2001:db8::1]", "six"),
        ("[2001:0db8:0:0::0001]:443", "six"),
        ("192.0.2.1:80", "four"),
        ("192.0.2.1.", "four"),
        ("[::ffff:192.0.2.1]", "four"),
        ("[::ffff:c000:201]", "four"),
        ("[2001:db8::2]", "payments"),
        ("192.0.2.2", "payments"),
    ] {
        let chosen = chosen(&settings, &Message::get("/").host(host));
        assert_eq!(chosen.expect("a rule").0, keyring, "{host}");
    }
    let twice = Settings::new(SettingsParts {
        routes: vec![
            rule(Some("[2001:db8::1]"), "/", "a", ""),
            rule(Some("2001:db8:0::1"), "/", "b", ""),
        ],
        ..parts()
    });
    assert!(twice.is_err(), "two rules match the same requests");
}

#[test]
fn a_tunnel_always_needs_a_key() {
    let of = |message: &Message| {
        let mut request = message.joined();
        message.http_of(&mut request).method = "CONNECT".into();
        let request = request.encode_to_vec();
        let input = CheckInput::read(&request).expect("a request");
        Route::choose(&settings(), &input).expect("a route").auth
    };
    let public = Message::get("/public");
    assert_eq!(
        chosen(&settings(), &public).expect("a route").2,
        Auth::Optional
    );
    assert_eq!(of(&public), Auth::Required);
    assert_eq!(
        of(&Message::get("/").extension("relatch.auth", "optional")),
        Auth::Required
    );
}

#[test]
fn all_required_scopes_must_be_held() {
    let held = "read write";
    let of_rule = Scopes::parse("admin").expect("scopes");
    let of_route = |scopes| RequiredScopes {
        of_route: Some(scopes),
        of_rule: None,
    };
    for (scopes, are_held) in [
        ("", true),
        (" write  read ", true),
        ("read admin", false),
        ("rea", false),
    ] {
        assert_eq!(of_route(scopes).are_held_by(held), are_held, "{scopes}");
    }
    let of_rule = RequiredScopes {
        of_route: None,
        of_rule: Some(&of_rule),
    };
    assert!(!of_rule.are_held_by(held));
    assert!(RequiredScopes::default().are_held_by(held));
}

/// Returns the enforcement of a request to `path`, where the keyring `payments` is named and
/// enforced, `trial` is named and observed, and rules for `/trial` and `/enforced` say otherwise.
fn enforcement(message: &Message) -> Result<Enforcement, RouteError> {
    const OBSERVED: Enforcement = Enforcement::Observed {
        removes_credential: true,
    };
    let by_rule = |path: &str, keyring: &str, enforcement| RouteRule {
        enforcement: Some(enforcement),
        ..rule(None, path, keyring, "")
    };
    let settings = Settings::new(SettingsParts {
        enforcements: Enforcements {
            named: vec![
                ("payments".parse().expect("a name"), Enforcement::Enforced),
                ("trial".parse().expect("a name"), OBSERVED),
            ],
            patterns: Vec::new(),
        },
        routes: vec![
            by_rule("/trial", "payments", OBSERVED),
            by_rule("/enforced", "trial", Enforcement::Enforced),
            rule(None, "/keyring", "trial", ""),
        ],
        ..parts()
    });
    let settings = settings.expect("valid settings");
    let request = message.raw().encode_to_vec();
    let input = CheckInput::read(&request).expect("a request");
    Route::choose(&settings, &input).map(|route| route.enforcement)
}

#[test]
fn enforcement_is_of_the_route_then_the_rule_then_the_keyring() {
    let by_rule = Enforcement::Observed {
        removes_credential: true,
    };
    let by_route = Enforcement::Observed {
        removes_credential: false,
    };
    let on = |path: &'static str| Message::get(path);
    let enforce =
        |message: Message, value: &'static str| message.extension("relatch.enforce", value);
    let keyring = |message: Message, name: &'static str| message.extension("relatch.keyring", name);
    for (message, expected) in [
        (on("/"), Ok(Enforcement::Enforced)),
        (on("/trial"), Ok(by_rule)),
        (on("/enforced"), Ok(Enforcement::Enforced)),
        (on("/keyring"), Ok(by_rule)),
        (enforce(on("/trial"), "true"), Ok(Enforcement::Enforced)),
        (enforce(on("/"), "false"), Ok(by_route)),
        (enforce(on("/enforced"), "false"), Ok(by_rule)),
        (keyring(on("/"), "trial"), Ok(by_rule)),
        // A rule loosens nothing that the route sets.
        (keyring(on("/trial"), "payments"), Ok(Enforcement::Enforced)),
        (keyring(on("/"), "other"), Ok(Enforcement::Enforced)),
        // It can still tighten it.
        (keyring(on("/enforced"), "trial"), Ok(Enforcement::Enforced)),
        (
            keyring(on("/enforced"), "trial").extension("relatch.scopes", ""),
            Ok(Enforcement::Enforced),
        ),
        (enforce(keyring(on("/"), "trial"), "false"), Ok(by_rule)),
        (
            enforce(keyring(on("/"), "other"), "false"),
            Err(RouteError::UnnamedKeyring),
        ),
        (enforce(on("/"), "no"), Err(RouteError::InvalidExtension)),
    ] {
        assert_eq!(enforcement(&message), expected, "{message:?}");
    }
}

#[test]
fn a_preflight_passes_by_a_rule_and_never_beside_extensions() {
    let settings = Settings::new(SettingsParts {
        routes: vec![RouteRule {
            preflight: Preflight::Allow,
            ..rule(None, "/app", "payments", "")
        }],
        ..parts()
    });
    let settings = settings.expect("valid settings");
    let preflight = |message: &Message| {
        let request = message.raw().encode_to_vec();
        let input = CheckInput::read(&request).expect("a request");
        let route = Route::choose(&settings, &input);
        route.map(|route| route.preflight)
    };
    assert_eq!(preflight(&Message::get("/app")), Ok(Preflight::Allow));
    assert_eq!(preflight(&Message::get("/")), Ok(Preflight::Deny));
    let extended = Message::get("/app").extension("relatch.scopes", "");
    assert_eq!(preflight(&extended), Ok(Preflight::Deny));
}

#[test]
fn the_places_are_those_of_the_rule_whatever_the_route_sets() {
    let own = CredentialSource::Query {
        name: "token".parse().expect("a name"),
    };
    let settings = Settings::new(SettingsParts {
        routes: vec![RouteRule {
            credentials: Some(vec![own]),
            ..rule(None, "/own", "payments", "")
        }],
        ..parts()
    });
    let settings = settings.expect("valid settings");
    let places = |message: &Message| {
        let request = message.raw().encode_to_vec();
        let input = CheckInput::read(&request).expect("a request");
        Route::choose(&settings, &input).map(|route| route.places)
    };
    let own = Ok(settings.places_of(0));
    assert_ne!(own, Ok(settings.general_places()));
    assert_eq!(places(&Message::get("/own")), own);
    let decided = Message::get("/own")
        .extension("relatch.keyring", "payments")
        .extension("relatch.scopes", "");
    assert_eq!(places(&decided), own);
    assert_eq!(places(&Message::get("/")), Ok(settings.general_places()));
}
