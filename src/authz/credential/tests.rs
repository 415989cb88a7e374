//! The places where a credential is found, and requests with none or more than one.

use prost::Message as _;

use super::*;
use crate::authz::{
    SettingsParts,
    removal::{Inseparable, Removal},
    testing::{Message, parts, settings},
};

/// The credential and the set of its places.
type Found = Result<Option<(Vec<u8>, u32)>, Lack>;

/// The reason why a request has no credential that can be judged and removed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lack {
    NoCredential(NoCredential),
    Inseparable,
}

/// Returns the result for both encodings, with the header `x-api-key`, the scheme `Bearer`, and the
/// parameter and the cookie `api_key` as places.
fn collected(message: &Message) -> [Found; 2] {
    collected_by(&settings(), message)
}

fn collected_by(settings: &Settings, message: &Message) -> [Found; 2] {
    [message.joined(), message.raw()].map(|request| {
        let request = request.encode_to_vec();
        let input = CheckInput::read(&request).expect("a request");
        let Search {
            credential, found, ..
        } = Search::new(settings, settings.general_places(), &input);
        let removal = Removal::plan(settings, &input, found);
        match (credential, removal) {
            (Ok(_) | Err(NoCredential::Ambiguous), Err(Inseparable)) => Err(Lack::Inseparable),
            (Ok(credential), Ok(_)) => Ok(credential.map(|it| (it.0.as_bytes().to_vec(), found.0))),
            (Err(none), _) => Err(Lack::NoCredential(none)),
        }
    })
}

fn assert_collects(message: &Message, key: &str, places: u32) {
    for found in collected(message) {
        assert_eq!(found, Ok(Some((key.as_bytes().to_vec(), places))));
    }
}

fn assert_all(message: &Message, expected: &Found) {
    for found in collected(message) {
        assert_eq!(found, *expected);
    }
}

const HEADER: u32 = 1;
const BEARER: u32 = 2;
const QUERY: u32 = 4;
const COOKIE: u32 = 8;

#[test]
fn a_credential_is_found_in_every_place() {
    let get = || Message::get("/");
    assert_collects(&get().header("X-API-Key", " K "), "K", HEADER);
    assert_collects(&get().header("authorization", "bEARER  K"), "K", BEARER);
    assert_collects(&Message::get("/?api%5Fkey=%4B"), "K", QUERY);
    assert_collects(&get().header("cookie", "a=1; api_key=\"K\""), "K", COOKIE);
}

#[test]
fn the_same_credential_in_all_places_is_one() {
    let message = Message::get("/?api_key=K")
        .header("x-api-key", "K")
        .header("authorization", "Bearer K")
        .header("cookie", "api_key=K");
    assert_collects(&message, "K", HEADER | BEARER | QUERY | COOKIE);
}

#[test]
fn none_is_none() {
    for message in [
        Message::get("/?a=K"),
        Message::get("/").header("authorization", "Basic SzpL"),
        Message::get("/").header("authorization", "BearerK"),
        Message::get("/").header("x-api-key", ""),
        Message::get("/").header("authorization", "Bearer "),
        Message::get("/?api_key=").header("cookie", "api_key="),
    ] {
        assert_all(&message, &Ok(None));
    }
}

#[test]
fn an_empty_place_does_not_stand_in_the_way_of_another() {
    let message = Message::get("/?api_key=").header("x-api-key", "K");
    assert_collects(&message, "K", HEADER);
}

#[test]
fn two_credentials_are_ambiguous() {
    for message in [
        Message::get("/?api_key=L").header("x-api-key", "K"),
        Message::get("/?api_key=K&api_key=K"),
        Message::get("/?api_key=K&api%5fkey="),
        Message::get("/").header("cookie", "api_key=K; api_key=K"),
        Message::get("/").header("cookie", "a=1,api_key=K"),
        Message::get("/").header("cookie", "api_key=K; a=1, api_key=L"),
    ] {
        assert_all(&message, &Err(Lack::NoCredential(NoCredential::Ambiguous)));
    }
}

#[test]
fn a_header_that_comes_twice_is_ambiguous_in_both_encodings() {
    for (name, first, second) in [
        ("x-api-key", "K", "K"),
        ("x-api-key", "K", "L"),
        ("x-api-key", "", "K"),
        ("authorization", "Bearer K", "Basic SzpL"),
        ("authorization", "Basic SzpL", "Bearer K"),
    ] {
        let twice = Message::get("/").header(name, first).header(name, second);
        for separator in [",", ", "] {
            let joined = Message::get("/").header(name, format!("{first}{separator}{second}"));
            for found in [collected(&joined)[0].clone(), collected(&twice)[1].clone()] {
                assert_eq!(
                    found,
                    Err(Lack::NoCredential(NoCredential::Ambiguous)),
                    "{first} {second}"
                );
            }
        }
    }
}

#[test]
fn joined_lines_with_a_scheme_are_ambiguous_even_where_headers_stand_apart() {
    for value in [
        "Basic SzpL,Bearer K",
        "Bearer K,Basic SzpL",
        "Bearer K,Bearer L",
        "Bearer K,",
    ] {
        let message = Message::get("/").header("authorization", value);
        assert_all(&message, &Err(Lack::NoCredential(NoCredential::Ambiguous)));
    }
}

#[test]
fn what_is_not_printable_is_malformed_even_beside_another() {
    let word = Some(Wrapping::Scheme(None));
    for (message, wrapping) in [
        (Message::get("/").header("x-api-key", "K\0"), None),
        (Message::get("/").header("x-api-key", "K L"), word),
        (Message::get("/").header("x-api-key", "K\u{e4}"), None),
        (
            Message::get("/?api_key=K%00").header("x-api-key", "K"),
            None,
        ),
        (Message::get("/?api_key=K%0A"), Some(Wrapping::LineEnd)),
        (Message::get("/?api_key=%ff"), None),
        (Message::get("/").header("cookie", "api_key=a b"), word),
    ] {
        assert_all(
            &message,
            &Err(Lack::NoCredential(NoCredential::Malformed(wrapping))),
        );
    }
}

#[test]
fn a_credential_among_bytes_that_are_not_text_is_inseparable() {
    let cookie = Message::get("/").header("cookie", b"a=\xff; api_key=K".to_vec());
    assert_all(&cookie, &Err(Lack::Inseparable));
    let query = Message::get(b"/\xff?api_key=K".to_vec());
    assert_all(&query, &Err(Lack::Inseparable));
}

/// A `!` may be a byte that Envoy could not show, unless the headers are raw.
#[test]
fn a_credential_beside_bytes_that_envoy_may_have_replaced_is_inseparable() {
    let inseparable = || Err(Lack::Inseparable);
    let found = |places| Ok(Some((b"K".to_vec(), places)));
    let cookie = Message::get("/").header("cookie", "a=!; api_key=K");
    assert_eq!(collected(&cookie), [inseparable(), found(COOKIE)]);
    let query = Message::get("/!?api_key=K");
    assert_eq!(collected(&query), [inseparable(), inseparable()]);
    let shown = |target: &'static [u8]| query.clone().header(":path", target);
    assert_eq!(collected(&shown(b"/!?api_key=K"))[1], found(QUERY));
    for other in [
        &b"/\xff?api_key=K"[..],
        b"/!?api_key=L",
        b"/!!?api_key=K",
        b"/",
    ] {
        assert_eq!(collected(&shown(other))[1], inseparable());
    }
    // The credential itself may have one.
    for message in [
        Message::get("/?api_key=K!"),
        Message::get("/").header("cookie", "api_key=K!"),
        Message::get("/!").header("x-api-key", "K!"),
    ] {
        assert!(collected(&message).iter().all(Result::is_ok));
    }
}

/// Returns settings with one place.
fn only(source: CredentialSource) -> Settings {
    let credentials = vec![source];
    let settings = Settings::new(SettingsParts {
        credentials,
        ..parts()
    });
    settings.expect("valid settings")
}

#[test]
fn a_part_of_basic_is_a_credential() {
    let found = |part, value: &'static str| {
        let settings = only(CredentialSource::Basic { part });
        let message = Message::get("/").header("authorization", value);
        let [joined, raw] = collected_by(&settings, &message);
        assert_eq!(joined, raw, "{value}");
        joined
    };
    let key = |key: &str| Ok(Some((key.as_bytes().to_vec(), 1)));
    let malformed = Err(Lack::NoCredential(NoCredential::Malformed(None)));
    let ambiguous = Err(Lack::NoCredential(NoCredential::Ambiguous));
    // K:L, K: without padding and with it, :L and a NUL, K:L:M, K without a colon
    for (value, user_name, password) in [
        ("Basic SzpM", key("K"), key("L")),
        ("bASIC  Szo", key("K"), Ok(None)),
        ("Basic Szo=", key("K"), Ok(None)),
        ("Basic OkwA", Ok(None), malformed.clone()),
        ("Basic SzpMOk0=", key("K"), key("L:M")),
        ("Basic Sw==", malformed.clone(), malformed.clone()),
        ("Basic S$pM", malformed.clone(), malformed.clone()),
        ("Basic SzpM SzpM", malformed.clone(), malformed.clone()),
        (
            "Basic SzpM, Basic SzpM",
            ambiguous.clone(),
            ambiguous.clone(),
        ),
        ("Bearer a, Basic SzpM", ambiguous.clone(), ambiguous),
        ("Basic", Ok(None), Ok(None)),
        ("Bearer SzpM", Ok(None), Ok(None)),
    ] {
        assert_eq!(found(BasicPart::UserName, value), user_name, "{value}");
        assert_eq!(found(BasicPart::Password, value), password, "{value}");
    }
}

#[test]
fn an_item_of_the_websocket_protocols_is_a_credential() {
    let settings = only(CredentialSource::WebSocketProtocol {
        prefix: "key.".parse().expect("a token"),
    });
    let header = |value: &'static str| Message::get("/").header("Sec-WebSocket-Protocol", value);
    let key = Ok(Some((b"K".to_vec(), 1)));
    let ambiguous = Err(Lack::NoCredential(NoCredential::Ambiguous));
    for (message, expected) in [
        (header("key.K"), &key),
        (header("chat, key.K,soap"), &key),
        (
            header("chat").header("sec-websocket-protocol", "key.K"),
            &key,
        ),
        (header("chat, Key.K, a.key.K"), &Ok(None)),
        (header("key., chat"), &Ok(None)),
        (header("key.K, key.K"), &ambiguous),
        (header("key.K, key.L"), &ambiguous),
        (
            header("key.K").header("sec-websocket-protocol", "key.K"),
            &ambiguous,
        ),
    ] {
        for found in collected_by(&settings, &message) {
            assert_eq!(found, *expected);
        }
    }
}

#[test]
fn credentials_do_not_print() {
    let request = Message::get("/").header("x-api-key", "Kanarienvogel").raw();
    let request = request.encode_to_vec();
    let input = CheckInput::read(&request).expect("a request");
    let settings = settings();
    let search = Search::new(&settings, settings.general_places(), &input);
    assert!(matches!(search.credential, Ok(Some(_))));
    assert!(!format!("{search:?}").contains("Kanarienvogel"));
}
