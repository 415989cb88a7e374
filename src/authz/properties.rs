//! Properties of every check, for any request: reading, deciding and answering together.

use std::collections::BTreeMap;

use proptest::{collection::vec, prelude::*, sample::select};
use prost::Message as _;

use super::{
    DenyReason, Enforcement, Enforcements, Outcome, Settings, SettingsParts,
    settings::{IdentityHeaders, folds_to},
    testing::{CONFIRMED_AT, Judged, Message, judge, keyrings, parts, settings},
};
use crate::{
    key::{KeyRecord, KeyState, Secret, Timestamp, Window, testing},
    keyring::Keyrings,
    proto::auth::{
        CheckRequest, CheckResponse, HeaderValueOption, OkHttpResponse,
        check_response::HttpResponse, header_value_option::HeaderAppendAction,
    },
};

const NOW: Timestamp = Timestamp::from_millis(1_000_000);

/// A sidecar with a key in every state.
struct World {
    settings: Settings,
    keyrings: Keyrings,
    keys: Vec<(Secret, KeyRecord, bool)>,
}

/// A request as it reaches the upstream.
#[derive(Debug, PartialEq, Eq)]
struct Upstream {
    path: Vec<u8>,
    headers: BTreeMap<String, Vec<Vec<u8>>>,
}

impl World {
    fn new() -> Self {
        let before = Timestamp::from_millis(999_999);
        let after = Timestamp::from_millis(1_000_001);
        let standings = [
            (KeyState::Active, Window::default(), None, true),
            (KeyState::Pending, Window::new(Some(NOW), None), None, true),
            (KeyState::Retiring, Window::default(), Some(after), true),
            (KeyState::Retiring, Window::default(), Some(before), true),
            (KeyState::Retired, Window::default(), None, false),
            (KeyState::Revoked, Window::default(), None, false),
            (KeyState::Active, Window::new(None, Some(NOW)), None, false),
            (
                KeyState::Active,
                Window::new(Some(after), None),
                None,
                false,
            ),
        ];
        let ids = "abcdefgh".chars().map(|c| c.to_string().repeat(12));
        let keys: Vec<_> = standings
            .into_iter()
            .zip(ids)
            .map(|((state, window, retires_at, is_accepted), id)| {
                let secret = testing::secret(id.parse().expect("an id"));
                let record = KeyRecord {
                    state,
                    window,
                    retires_at,
                    ..testing::record_of(&secret)
                };
                (secret, record, is_accepted)
            })
            .collect();
        let records = keys.iter().map(|(_, record, _)| record.clone()).collect();
        Self {
            settings: settings(),
            keyrings: keyrings(records, true),
            keys,
        }
    }

    /// The same sidecar in a trial.
    fn observed(self) -> Self {
        let observed = Enforcement::Observed {
            removes_credential: false,
        };
        let keyrings = ["payments", "empty"];
        let keyrings = keyrings.map(|name| (name.parse().expect("a name"), observed));
        let parts = SettingsParts {
            enforcements: Enforcements {
                named: keyrings.to_vec(),
                ..Enforcements::default()
            },
            ..parts()
        };
        Self {
            settings: Settings::new(parts).expect("valid settings"),
            ..self
        }
    }

    fn judge(&self, request: &CheckRequest) -> (Judged, CheckResponse) {
        judge(&self.settings, &self.keyrings, request, NOW, CONFIRMED_AT)
    }

    /// Replaces the placeholders by the keys. A placeholder has a `-`, which no key has.
    fn fill(&self, text: &[u8]) -> Vec<u8> {
        let mut filled = text.to_vec();
        for (at, (secret, _, _)) in self.keys.iter().enumerate() {
            filled = replace(
                &filled,
                format!("KEY-{at}").as_bytes(),
                secret.expose().as_bytes(),
            );
        }
        filled
    }
}

fn replace(text: &[u8], from: &[u8], to: &[u8]) -> Vec<u8> {
    let mut replaced = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.windows(from.len()).position(|window| window == from) {
        replaced.extend_from_slice(&rest[..at]);
        replaced.extend_from_slice(to);
        rest = &rest[at + from.len()..];
    }
    replaced.extend_from_slice(rest);
    replaced
}

fn contains(text: &[u8], part: &[u8]) -> bool {
    text.windows(part.len()).any(|window| window == part)
}

fn credential() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        8 => (0_usize..8).prop_map(|at| format!("KEY-{at}").into_bytes()),
        1 => Just(Vec::new()),
        1 => "rlk_[a-z]{12}_[a-z]{38}".prop_map(String::into_bytes),
        1 => vec(any::<u8>(), 0..12),
    ]
}

fn header() -> impl Strategy<Value = (Vec<u8>, Vec<u8>)> {
    let scheme = select(vec!["Bearer ", "bearer  ", "Basic ", "Bearer", ""]);
    let name = select(vec!["api_key", "a", "API_KEY", " api_key"]);
    let separator = select(vec!["; ", ";", ", ", ","]);
    let pair =
        (name, credential()).prop_map(|(name, value)| [name.as_bytes(), b"=", &value].concat());
    prop_oneof![
        (
            select(vec!["x-api-key", "X-Api-Key", "x_api_key"]),
            credential()
        )
            .prop_map(|(name, value)| (name.into(), value)),
        (scheme, credential()).prop_map(|(scheme, value)| {
            ("authorization".into(), [scheme.as_bytes(), &value].concat())
        }),
        (vec(pair, 0..3), separator)
            .prop_map(|(pairs, separator)| { ("cookie".into(), pairs.join(separator.as_bytes())) }),
        (vec(any::<u8>(), 0..20), vec(any::<u8>(), 0..20)),
        Just(("x-relatch-consumer".into(), "root".into())),
    ]
}

fn path() -> impl Strategy<Value = Vec<u8>> {
    let name = select(vec!["api_key", "api%5Fkey", "a", "", "API_KEY"]);
    let parameter =
        (name, credential()).prop_map(|(name, value)| [name.as_bytes(), b"=", &value].concat());
    prop_oneof![
        6 => (select(vec!["/", "/a/b", "", "*"]), vec(parameter, 0..3))
            .prop_map(|(path, parameters)| [path.as_bytes(), b"?", &parameters.join(&b'&')].concat()),
        1 => vec(any::<u8>(), 0..30),
    ]
}

fn extension() -> impl Strategy<Value = (Vec<u8>, Vec<u8>)> {
    prop_oneof![
        select(vec![
            ("relatch.keyring", "payments"),
            ("relatch.keyring", "empty"),
            ("relatch.keyring", "other"),
            ("relatch.scopes", ""),
            ("relatch.scopes", "admin"),
            ("relatch.auth", "optional"),
            ("relatch.auth", "required"),
            ("relatch.auth", "none"),
            ("relatch.enforce", "true"),
        ])
        .prop_map(|(name, value)| (name.into(), value.into())),
        (vec(any::<u8>(), 0..20), vec(any::<u8>(), 0..20)),
    ]
}

/// Generates requests between a good one and noise.
fn any_message() -> impl Strategy<Value = Message> {
    (
        path(),
        prop_oneof![4 => Just(b"a.b:80".to_vec()), 1 => vec(any::<u8>(), 0..20)],
        vec(header(), 0..4),
        prop_oneof![3 => Just(vec![]), 1 => vec(extension(), 0..3)],
    )
        .prop_map(|(path, host, headers, extensions)| {
            let message = Message::get(path).host(host);
            let message = headers.into_iter().fold(message, |message, (name, value)| {
                message.header(name, value)
            });
            extensions
                .into_iter()
                .fold(message, |message, (name, value)| {
                    message.extension(name, value)
                })
        })
}

fn filled(world: &World, message: Message) -> Message {
    let headers = message.headers.iter();
    Message {
        path: world.fill(&message.path).into(),
        headers: headers
            .map(|(name, value)| (name.clone(), world.fill(value).into()))
            .collect(),
        ..message
    }
}

/// Returns every text that could be a credential, in the simplest reading: any part of a place
/// between separators.
fn oracle_candidates(message: &Message) -> Vec<Vec<u8>> {
    let is_place = |name: &[u8]| {
        [&b"x-api-key"[..], b"authorization", b"cookie"]
            .iter()
            .any(|place| name.eq_ignore_ascii_case(place))
    };
    let headers = message.headers.iter().filter(|(name, _)| is_place(name));
    headers
        .map(|(_, value)| value)
        .chain([&message.path])
        .flat_map(|text| text.split(|b| b" =;&\"".contains(b)))
        .map(<[u8]>::to_vec)
        .collect()
}

/// Applies an answer as Envoy does: headers, then removals.
fn apply(message: &Message, ok: &OkHttpResponse) -> Upstream {
    let mut path = message.path.to_vec();
    let mut headers: BTreeMap<String, Vec<Vec<u8>>> = BTreeMap::new();
    for (name, value) in &message.headers {
        let name = String::from_utf8_lossy(name).to_ascii_lowercase();
        headers.entry(name).or_default().push(value.to_vec());
    }
    for option in &ok.headers {
        assert!(overwrites(option), "a header would be added to another");
        let header = option.header.as_ref().expect("a header");
        let name = header.key.to_ascii_lowercase();
        if name == ":path" {
            path = header.value.clone().into_bytes();
        } else {
            headers.insert(name, vec![header.value.clone().into_bytes()]);
        }
    }
    for name in &ok.headers_to_remove {
        let name = name.to_ascii_lowercase();
        if !name.starts_with(':') && name != "host" {
            headers.remove(&name);
        }
    }
    assert!(ok.query_parameters_to_remove.is_empty());
    Upstream { path, headers }
}

/// Returns whether both fields replace an existing header. Some versions of Envoy use one field,
/// some the other.
fn overwrites(option: &HeaderValueOption) -> bool {
    option.append.is_some_and(|append| !append.value)
        && option.append_action() == HeaderAppendAction::OverwriteIfExistsOrAdd
}

fn passing(response: &CheckResponse) -> Option<&OkHttpResponse> {
    match &response.http_response {
        Some(HttpResponse::OkResponse(ok)) => Some(ok),
        Some(HttpResponse::DeniedResponse(_)) | None => None,
    }
}

/// A good request, and the path and headers that the upstream should receive besides relatch's own.
#[derive(Clone, Debug)]
struct GoodRequest {
    message: Message,
    /// Whether the check is exact enough to remove the key even where Envoy joins headers.
    is_separable: bool,
    expected_path: String,
    expected_headers: BTreeMap<String, Vec<Vec<u8>>>,
}

fn good_request(key: String) -> impl Strategy<Value = GoodRequest> {
    let parameters = || vec("[b-z]{1,3}(=([a-z]|%20|%7e|\\+|/|\\?){0,4})?", 0..3);
    let cookies = || vec("[b-z]{1,3}=[a-z0-9,!=\\.]{0,6}", 0..3);
    let names = vec![
        "x_relatch_consumer",
        "X-Relatch-Consumer",
        "x.relatch-key_id",
        "x-relatch_scopes",
        "x-relatch-scopes",
        "x_api_key",
        "X.API.KEY",
    ];
    (
        1_u8..16,
        (parameters(), parameters()),
        (cookies(), cookies()),
        proptest::sample::subsequence(names, 0..5),
        vec(("y-[a-z]{1,5}", "[ -~]{0,10}"), 0..4),
        select(vec!["", "api%5Fkey", "%61pi%5fkey"]),
    )
        .prop_map(
            move |(places, parameters, cookies, spoofed, others, spelling)| {
                let has = |place: u8| places & (1 << place) != 0;
                let kept = joined(&parameters, "&");
                let mut query = kept.clone();
                let name = if spelling.is_empty() {
                    "api_key"
                } else {
                    spelling
                };
                if has(0) {
                    query = with_key(&parameters, &format!("{name}={key}"), "&");
                }
                let target = |query: &str| match query {
                    "" => "/p".to_owned(),
                    query => format!("/p?{query}"),
                };
                let mut message = Message::get(target(&query));
                let mut expected_headers = BTreeMap::new();
                if has(1) {
                    message = message.header("x-api-key", key.clone());
                }
                if has(2) {
                    message = message.header("authorization", format!("Bearer {key}"));
                } else {
                    message = message.header("authorization", "Basic SzpL");
                    expected_headers
                        .insert("authorization".to_owned(), vec![b"Basic SzpL".to_vec()]);
                }
                let kept_cookies = joined(&cookies, "; ");
                let mut cookie = kept_cookies.clone();
                if has(3) {
                    cookie = with_key(&cookies, &format!("api_key={key}"), "; ");
                }
                if !cookie.is_empty() {
                    message = message.header("cookie", cookie);
                }
                // Envoy would show a byte that is not UTF-8 as this one.
                let is_separable = !(has(3) && kept_cookies.contains('!'));
                if !kept_cookies.is_empty() {
                    expected_headers.insert("cookie".to_owned(), vec![kept_cookies.into_bytes()]);
                }
                for name in spoofed {
                    message = message.header(name, "root");
                }
                for (name, value) in others {
                    if expected_headers
                        .insert(name.clone(), vec![value.clone().into_bytes()])
                        .is_none()
                    {
                        message = message.header(name, value);
                    } else {
                        let sent = message.headers.iter().find(|(sent, _)| *sent == name);
                        let (_, value) = sent.expect("it was sent");
                        expected_headers.insert(name, vec![value.to_vec()]);
                    }
                }
                GoodRequest {
                    message,
                    is_separable,
                    expected_path: target(&kept),
                    expected_headers,
                }
            },
        )
}

fn joined((before, after): &(Vec<String>, Vec<String>), separator: &str) -> String {
    let all: Vec<&str> = before.iter().chain(after).map(String::as_str).collect();
    all.join(separator)
}

fn with_key(
    (before, after): &(Vec<String>, Vec<String>),
    credential: &str,
    separator: &str,
) -> String {
    let before = before.iter().map(String::as_str);
    let after = after.iter().map(String::as_str);
    let all: Vec<&str> = before.chain([credential]).chain(after).collect();
    all.join(separator)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn a_request_is_allowed_only_with_an_accepted_key(message in any_message()) {
        let world = World::new();
        let message = filled(&world, message);
        let candidates = oracle_candidates(&message);
        for request in [message.joined(), message.raw()] {
            let (judged, response) = world.judge(&request);
            let code = response.status.as_ref().map_or(0, |status| status.code);
            match judged.outcome {
                Outcome::Allowed => {
                    let used = judged.record.as_ref().map(|record| record.key_id);
                    let (secret, _, is_accepted) = world
                        .keys
                        .iter()
                        .find(|(_, record, _)| Some(record.key_id) == used)
                        .expect("one of the keys");
                    prop_assert!(*is_accepted);
                    prop_assert!(candidates.iter().any(|text| text == secret.expose().as_bytes()));
                    for (other, _, _) in &world.keys {
                        let is_other = other.expose() != secret.expose();
                        let others = message.headers.iter().filter(|(name, _)| {
                            name.eq_ignore_ascii_case(b"x-api-key")
                        });
                        for (_, value) in others {
                            prop_assert!(!(is_other && contains(value, other.expose().as_bytes())));
                        }
                    }
                    prop_assert_eq!(code, 0);
                    prop_assert!(passing(&response).is_some());
                }
                Outcome::Anonymous => {
                    let optional = (b"relatch.auth".to_vec(), b"optional".to_vec());
                    let optional = (optional.0.into(), optional.1.into());
                    prop_assert!(message.extensions.contains(&optional));
                    prop_assert_eq!(code, 0);
                    prop_assert!(passing(&response).is_some());
                }
                Outcome::Preflight | Outcome::WouldDeny(_) => {
                    return Err(TestCaseError::fail("the settings allow neither"));
                }
                Outcome::Denied(reason) => {
                    prop_assert_eq!(code, reason.status().rpc());
                    prop_assert_ne!(code, 0);
                    let Some(HttpResponse::DeniedResponse(denied)) = &response.http_response else {
                        return Err(TestCaseError::fail("a denial without a denied response"));
                    };
                    let http = denied.status.map(|status| status.code);
                    prop_assert!(http.is_some_and(|http| http >= 400));
                    for (secret, _, _) in &world.keys {
                        prop_assert!(!contains(
                            &response.encode_to_vec(),
                            secret.expose().as_bytes()
                        ));
                    }
                }
            }
        }
    }

    #[test]
    fn the_upstream_gets_the_request_without_credential_and_spoofed_headers(
        request in good_request("KEY-0".to_owned()),
    ) {
        let world = World::new();
        let secret = world.keys[0].0.expose().as_bytes();
        let message = filled(&world, request.message);
        for (check, is_raw) in [(message.joined(), false), (message.raw(), true)] {
            let (judged, response) = world.judge(&check);
            if !is_raw && !request.is_separable {
                let malformed = Outcome::Denied(DenyReason::MalformedRequest);
                prop_assert_eq!(judged.outcome, malformed);
                continue;
            }
            let Some(ok) = passing(&response) else {
                return Err(TestCaseError::fail(format!("{:?}", judged.outcome)));
            };
            let upstream = apply(&message, ok);
            prop_assert!(!contains(&upstream.path, secret));
            for value in upstream.headers.values().flatten() {
                prop_assert!(!contains(value, secret));
            }
            let mut expected = request.expected_headers.clone();
            let record = &world.keys[0].1;
            for (name, value) in [
                ("x-relatch-consumer", record.consumer.to_string()),
                ("x-relatch-key-id", record.key_id.to_string()),
                ("x-relatch-key-version", record.version.to_string()),
            ] {
                expected.insert(name.to_owned(), vec![value.into_bytes()]);
            }
            prop_assert_eq!(&upstream.headers, &expected);
            prop_assert_eq!(String::from_utf8_lossy(&upstream.path), &*request.expected_path);
        }
    }

    #[test]
    fn a_trial_decides_the_same_and_removes_only_identity_headers(message in any_message()) {
        let world = World::new();
        let message = filled(&world, message);
        let enforced = [message.joined(), message.raw()].map(|it| world.judge(&it).0);
        let trial = world.observed();
        // A route that is enforced, or whose keyring is not in the trial.
        let is_enforced = message
            .extensions
            .iter()
            .any(|(name, value)| name == "relatch.enforce" || value == "other");
        for (request, enforced) in [message.joined(), message.raw()].iter().zip(enforced) {
            let (judged, response) = trial.judge(request);
            prop_assert_eq!(judged.outcome.reason(), enforced.outcome.reason());
            if is_enforced {
                continue;
            }
            let Some(ok) = passing(&response) else {
                // The request cannot be read.
                let malformed = Outcome::Denied(DenyReason::MalformedRequest);
                prop_assert_eq!(judged.outcome, malformed);
                continue;
            };
            prop_assert!(!matches!(judged.outcome, Outcome::Denied(_)));
            prop_assert!(ok.response_headers_to_add.is_empty());
            let upstream = apply(&message, ok);
            let unchanged = apply(&message, &OkHttpResponse::default());
            prop_assert_eq!(upstream.path, unchanged.path);
            let identity = IdentityHeaders::default();
            let is_identity = |name: &str| {
                let mut names = identity.names();
                names.any(|header| folds_to(name.as_bytes(), header))
            };
            let mut expected = unchanged.headers;
            expected.retain(|name, _| !is_identity(name));
            prop_assert_eq!(upstream.headers, expected);
        }
    }
}
