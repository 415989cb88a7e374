//! What a consumer is told that uses a retiring version, and what of the upstream's answer it must not lose.

use relatch::{clock::Clock, key::Timestamp};

use super::{Key, Mesh};
use crate::support::{
    client::{Request, Response},
    upstream::ANSWER_WITH,
};

#[tokio::test]
async fn only_the_version_is_said_to_end_unless_more_is_asked_for() {
    let mesh = Mesh::start().await;
    let (old, new) = rotated(&mesh).await;
    mesh.through_each_version(
        |options| options,
        async |gate| {
            let response = gate.send(old.get("/")).await;
            assert_eq!(lines(&response, "api-key-rotation").len(), 1);
            assert_told(&response, &[]);
            let response = gate.send(new.get("/")).await;
            assert_eq!(lines(&response, "api-key-rotation").len(), 0);

            // The upstream's own words arrive as they are.
            let response = gate.send(ending(old.get("/"))).await;
            assert_told(&response, &UPSTREAMS);
        },
    )
    .await;
}

#[tokio::test]
async fn deprecation_and_sunset_are_told_beside_an_upstream_that_says_neither() {
    let mesh = Mesh::start_with("notice: { deprecation: true, sunset: true }\n").await;
    let before = seconds();
    let (old, new) = rotated(&mesh).await;
    let after = seconds();
    mesh.through_each_version(
        |options| options,
        async |gate| {
            let response = gate.send(old.get("/")).await;
            let [deprecation] = lines(&response, "deprecation")[..] else {
                panic!("not one deprecation: {response:?}");
            };
            let since = deprecation.strip_prefix('@').expect("a date of RFC 9651");
            let since: i64 = since.parse().expect("whole seconds");
            assert!((before..=after).contains(&since), "{since}");
            let [sunset] = lines(&response, "sunset")[..] else {
                panic!("not one sunset: {response:?}");
            };
            let date = httpdate::parse_http_date(sunset).expect("an HTTP date");
            let announced = format!("sunset=@{}", Timestamp::from(date).as_millis() / 1000);
            let [notice] = lines(&response, "api-key-rotation")[..] else {
                panic!("not one notice: {response:?}");
            };
            assert!(notice.ends_with(&announced), "{notice} and {sunset}");

            let response = gate.send(new.get("/")).await;
            assert_told(&response, &[]);
            assert_eq!(lines(&response, "api-key-rotation").len(), 0);
        },
    )
    .await;
}

#[tokio::test]
async fn the_end_of_a_resource_is_neither_lost_nor_doubled_beside_the_end_of_a_key() {
    let mesh = Mesh::start_with("notice: { deprecation: true, sunset: true }\n").await;
    let (old, new) = rotated(&mesh).await;
    mesh.through_each_version(
        |options| options,
        async |gate| {
            for key in [&old, &new] {
                let response = gate.send(ending(key.get("/"))).await;
                assert_told(&response, &UPSTREAMS);
            }
            // One alone leaves room for the other.
            let (name, value) = UPSTREAMS[1];
            let line = format!("{name}: {value}");
            let response = gate.send(old.get("/").header(ANSWER_WITH, line)).await;
            assert_eq!(lines(&response, "sunset"), [value]);
            assert_eq!(lines(&response, "deprecation").len(), 1);
        },
    )
    .await;
}

/// What an upstream says of a resource that ends.
const UPSTREAMS: [(&str, &str); 2] = [
    ("deprecation", "@1735689600"),
    ("sunset", "Sun, 01 Jan 2040 00:00:00 GMT"),
];

/// A key's version 1, which is retiring, and its version 2.
async fn rotated(mesh: &Mesh) -> (Key, Key) {
    let old = mesh.key(&[]).await;
    let rotate = ["rotate", "start", &old.id, "--overlap", "1h"];
    let new = mesh.issue(&rotate).await;
    (old, new)
}

/// The request to an upstream that announces the end of the resource.
fn ending(request: Request) -> Request {
    UPSTREAMS.iter().fold(request, |request, (name, value)| {
        request.header(ANSWER_WITH, format!("{name}: {value}"))
    })
}

/// Fails unless deprecation and sunset are exactly `expected`.
#[track_caller]
fn assert_told(response: &Response, expected: &[(&str, &str)]) {
    let told: Vec<_> = ["deprecation", "sunset"]
        .into_iter()
        .flat_map(|name| {
            lines(response, name)
                .into_iter()
                .map(move |value| (name, value))
        })
        .collect();
    assert_eq!(told, expected);
}

/// The values of every line of a header.
fn lines<'a>(response: &'a Response, name: &str) -> Vec<&'a str> {
    let lines = response
        .headers
        .iter()
        .filter(|(other, _)| other.eq_ignore_ascii_case(name));
    lines
        .map(|(_, value)| str::from_utf8(value).expect("headers are text"))
        .collect()
}

fn seconds() -> i64 {
    Clock::system().wall().as_millis() / 1000
}
