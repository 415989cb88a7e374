//! Headers that pass for an identity or a credential of ours reach the upstream from nobody but us.

use super::{Gate, Mesh};
use crate::support::{client::Request, upstream::Seen};

/// Names that a framework may take for `x-relatch-consumer`: CGI and WSGI fold `-` and `_`, others `.` too.
const CONSUMER: [&str; 6] = [
    "x-relatch-consumer",
    "X-Relatch-Consumer",
    "X_Relatch_Consumer",
    "x.relatch.consumer",
    "x-relatch_consumer",
    "X.RELATCH-Consumer",
];

const OTHERS: [&str; 6] = [
    "x-relatch-key-id",
    "X_RELATCH_KEY_ID",
    "x-relatch-key-version",
    "x.relatch.key.version",
    "x-relatch-scopes",
    "x_relatch_scopes",
];

#[tokio::test]
async fn a_forged_identity_is_replaced_by_ours_in_every_spelling() {
    let mesh = Mesh::start().await;
    let key = mesh.key(&[]).await;
    mesh.through_each_envoy(async |gate| {
        let forged = forge(key.get("/"), CONSUMER.into_iter().chain(OTHERS));
        for seen in send_both_ways(gate, forged).await {
            assert_eq!(
                identities(&seen),
                [
                    ("x-relatch-consumer", "checkout"),
                    ("x-relatch-key-id", key.id.as_str()),
                    ("x-relatch-key-version", "1"),
                ]
            );
        }
        for spelling in CONSUMER {
            let seen = gate.send(forge(key.get("/"), [spelling])).await.seen();
            assert_eq!(
                seen.values("x-relatch-consumer"),
                ["checkout"],
                "{spelling}"
            );
            assert_eq!(identities(&seen).len(), 3, "{spelling}");
        }
    })
    .await;
}

#[tokio::test]
async fn the_anonymous_have_no_identity_however_they_spell_it() {
    let mesh = Mesh::start().await;
    mesh.through_each_envoy(async |gate| {
        let forged = forge(
            Request::get("/optional"),
            CONSUMER.into_iter().chain(OTHERS),
        );
        for seen in send_both_ways(gate, forged).await {
            assert_eq!(identities(&seen), []);
        }
        for spelling in CONSUMER.into_iter().chain(OTHERS) {
            let seen = gate
                .send(forge(Request::get("/optional"), [spelling]))
                .await
                .seen();
            assert_eq!(identities(&seen), [], "{spelling}");
        }
    })
    .await;
}

#[tokio::test]
async fn other_spellings_of_the_credentials_header_are_no_credential_and_do_not_pass() {
    const SPELLINGS: [&str; 4] = ["x_api_key", "X.Api.Key", "x-api_key", "X_API-KEY"];
    let mesh = Mesh::start().await;
    let key = mesh.key(&[]).await;
    let other = mesh.key(&[]).await;
    mesh.through_each_envoy(async |gate| {
        for spelling in SPELLINGS {
            let alone = Request::get("/").header(spelling, &other.secret);
            assert_eq!(gate.send(alone).await.status, 401, "{spelling}");
            let beside = key.get("/").header(spelling, &other.secret);
            let anonymous = Request::get("/optional").header(spelling, &other.secret);
            for request in [beside, anonymous] {
                for seen in send_both_ways(gate, request).await {
                    other.assert_hidden_from(&seen);
                    key.assert_hidden_from(&seen);
                    let folds = |name: &str| folded(name) == "x-api-key";
                    assert!(
                        !seen.headers.iter().any(|(name, _)| folds(name)),
                        "{spelling}"
                    );
                }
            }
        }
    })
    .await;
}

#[tokio::test]
async fn a_key_that_envoy_does_not_show_reaches_nobody() {
    let mesh = Mesh::start().await;
    let key = mesh.key(&[]).await;
    let other = mesh.key(&[]).await;
    mesh.through_each_version(
        |options| options.shows_only(&["authorization"]),
        async |gate| {
            let unseen = |request: Request| request.header("x-api-key", &other.secret);
            let bearer =
                Request::get("/").header("authorization", format!("Bearer {}", key.secret));
            for request in [unseen(bearer), unseen(Request::get("/optional"))] {
                for seen in send_both_ways(gate, request).await {
                    other.assert_hidden_from(&seen);
                    key.assert_hidden_from(&seen);
                }
            }
        },
    )
    .await;
}

#[tokio::test]
async fn renamed_and_silenced_identity_headers_are_guarded_as_well() {
    let mesh = Mesh::start_with(
        "identity_headers: { consumer: x-caller, key_id: false, scopes: x-caller-scopes }\n",
    )
    .await;
    let key = mesh.key(&[]).await;
    mesh.through_each_version(
        |options| options,
        async |gate| {
            let names = [
                "X_Caller",
                "x.caller",
                "x-caller",
                "x-caller-scopes",
                "x_caller_scopes",
            ];
            let forged = forge(
                key.get("/"),
                names.into_iter().chain(CONSUMER).chain(OTHERS),
            );
            for seen in send_both_ways(gate, forged).await {
                let of_caller = seen
                    .headers
                    .iter()
                    .filter(|(name, _)| name.contains("caller"));
                let of_caller: Vec<_> = of_caller
                    .map(|(name, value)| (name.as_str(), value.as_str()))
                    .collect();
                assert_eq!(of_caller, [("x-caller", "checkout")]);
                assert_eq!(seen.values("x-relatch-key-version"), ["1"]);
            }
        },
    )
    .await;
}

/// The same request over HTTP/1.1 and HTTP/2.
async fn send_both_ways(gate: &Gate, request: Request) -> [Seen; 2] {
    [
        gate.send(request.clone()).await.seen(),
        gate.send_http2(request).await.seen(),
    ]
}

fn forge<'n>(request: Request, names: impl IntoIterator<Item = &'n str>) -> Request {
    let names = names.into_iter();
    names.fold(request, |request, name| request.header(name, "root"))
}

/// Every header that could be taken for an identity, sorted by name.
fn identities(seen: &Seen) -> Vec<(&str, &str)> {
    let lines = seen.headers.iter();
    let mut found: Vec<_> = lines
        .filter(|(name, _)| folded(name).starts_with("x-relatch-"))
        .map(|(name, value)| (name.as_str(), value.as_str()))
        .collect();
    found.sort_unstable();
    found
}

fn folded(name: &str) -> String {
    name.to_ascii_lowercase().replace(['_', '.'], "-")
}
