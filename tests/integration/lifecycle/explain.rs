//! What `relatch explain` says is what a sidecar does.

use std::{collections::BTreeSet, fs};

use envoy_types::pb::envoy::{
    config::core::v3::{Address, SocketAddress, address},
    service::auth::v3::{CheckRequest, attribute_context::Peer},
};
use relatch::proto::admin::{ExplainRequest, ExplainResponse, admin_client::AdminClient};
use serde_json::Value;
use tonic::{Request, transport::Channel};

use super::deployment::{CONSUMER, Control, IssuedKey, KEYRING, Sidecar, Verdict, check_request};
use crate::support::{eventually::eventually, process::relatch, relatch::text};

/// Keys in every state, by what they are.
#[derive(Debug)]
struct Credentials(Vec<(&'static str, String)>);

/// A request's source and the scopes of its route.
#[derive(Clone, Copy, Debug)]
struct Circumstances {
    source: Option<&'static str>,
    scopes: &'static str,
}

const SOURCES: [Option<&str>; 4] = [
    None,
    Some("127.0.0.1"),
    Some("10.1.2.3"),
    Some("::ffff:10.1.2.3"),
];
const SCOPES: [&str; 3] = ["", "read", "admin read"];
/// Beyond every test.
const FUTURE: &str = "2999-01-01T00:00:00Z";

#[tokio::test]
async fn it_agrees_with_a_sidecar_on_every_credential_in_every_circumstance() {
    let control = Control::start().await;
    control.create_key().await;
    let sidecar = Sidecar::start(&control, "edge-1").await;
    let credentials = Box::pin(Credentials::make(&control, &sidecar)).await;
    let mut admin = admin(&control).await;

    let mut seen = BTreeSet::new();
    for (what, credential) in &credentials.0 {
        for source in SOURCES {
            for scopes in SCOPES {
                let circumstances = Circumstances { source, scopes };
                let decided = sidecar.judge(circumstances.check(credential)).await;
                let explained = explain(&control, &mut admin, circumstances, credential).await;
                let steps = &explained.steps;
                assert_eq!(
                    verdict(&explained),
                    decided,
                    "{what}, {circumstances:?}: {steps:?}"
                );
                let (last, before) = steps.split_last().expect("there is a step");
                assert_eq!(last.passed, decided.allowed, "{what}: {steps:?}");
                assert!(before.iter().all(|step| step.passed), "{what}: {steps:?}");
                let told = format!("{steps:?}");
                assert!(!told.contains(credential.as_str()), "{what}: {told}");
                seen.insert(decided.reason);
            }
        }
    }

    let expected = [
        "expired",
        "insufficient_scope",
        "malformed_credential",
        "not_yet_valid",
        "ok",
        "retired",
        "revoked",
        "source_not_allowed",
        "unknown_key",
    ];
    assert_eq!(seen.iter().collect::<Vec<_>>(), expected);
}

#[tokio::test]
async fn its_exit_code_is_the_verdict_and_the_credential_is_not_repeated() {
    let control = Control::start().await;
    let key = control.create_key().await;
    let later = create(&control, &["--not-before", FUTURE]).await;
    let explain = async |args: &[&str], credential: &str| {
        let explain = ["explain", "--keyring", KEYRING];
        let output = control
            .plane
            .cli_reading(&[&explain[..], args].concat(), credential)
            .await;
        for text in [&output.stdout, &output.stderr] {
            assert!(!text.contains(credential), "{text}");
        }
        output
    };

    let allowed = explain(&[], &key.secret).await;
    assert_eq!(allowed.status.code(), Some(0), "{}", allowed.stderr);
    let allowed = allowed.json();
    assert_eq!(
        (
            &allowed["decision"],
            &allowed["key_version"],
            &allowed["consumer"]
        ),
        (&"allow".into(), &1.into(), &CONSUMER.into())
    );
    let denied = explain(&[], &later.secret).await;
    assert_eq!(denied.status.code(), Some(1), "{}", denied.stderr);
    let denied: Value = serde_json::from_str(&denied.stdout).expect("a document");
    assert_eq!(denied["reason"], "not_yet_valid");
    let then = explain(&["--at", FUTURE], &later.secret).await;
    assert_eq!(then.status.code(), Some(0), "{}", then.stderr);
    for (args, credential, code) in [
        (&[][..], "no-key-at-all", 1),
        (&[], "", 2),
        (&["--scope", "read"], &key.secret, 1),
        (&["--source", "nowhere"], &key.secret, 2),
    ] {
        let output = control
            .plane
            .cli_reading(
                &[&["explain", "--keyring", KEYRING][..], args].concat(),
                credential,
            )
            .await;
        assert_eq!(
            output.status.code(),
            Some(code),
            "{args:?}: {}",
            output.stderr
        );
        assert!(credential.is_empty() || !output.stderr.contains(credential));
    }
    let nowhere = ["explain", "--keyring", "partners"];
    let missing = control.plane.cli_reading(&nowhere, &key.secret).await;
    assert_eq!(missing.status.code(), Some(3), "{}", missing.stderr);
    assert!(!missing.stderr.contains(&key.secret), "{}", missing.stderr);

    let log = control.stopped().await;
    assert!(!log.has(&key.secret), "{log}");
}

#[tokio::test]
async fn its_table_marks_the_step_that_decides() {
    let control = Control::start().await;
    let key = control.create_key().await;
    let file = control.data_dir().join("acme.key");
    fs::write(&file, &key.secret).expect("the test's directory can be written to");
    let admin = format!("http://{}", control.plane.admin());
    let token = text(control.plane.token_file());
    let connection = ["-o", "table", "--admin", &admin, "--token-file", token];
    let explain = ["explain", "--keyring", KEYRING, "--scope", "write"];
    let args = [&explain[..], &["--key-file", text(&file)], &connection].concat();

    let denied = relatch(&args, "").await;

    assert_eq!(denied.status.code(), Some(1), "{}", denied.stderr);
    let marks: String = denied
        .stdout
        .chars()
        .filter(|c| ['✓', '✗'].contains(c))
        .collect();
    assert_eq!(marks, "✓✓✓✓✓✗", "{}", denied.stdout);
    assert!(
        denied.stdout.contains("insufficient_scope"),
        "{}",
        denied.stdout
    );
}

impl Credentials {
    /// Makes them, and waits until the sidecar has all of them.
    async fn make(control: &Control, sidecar: &Sidecar) -> Self {
        let plain = create(control, &[]).await;
        let limited = ["--allow-source", "10.0.0.0/8", "--scope", "read"];
        let limited = create(control, &limited).await;
        let short = create(control, &["--expires-in", "1s"]).await;
        let later = create(control, &["--not-before", FUTURE]).await;
        let leaked = create(control, &[]).await;
        let revoke = ["revoke", &leaked.id, "--all", "--reason", "leaked"];
        control.json(&revoke).await;
        let retiring = create(control, &["--scope", "read"]).await;
        let next = control.json(&["rotate", "start", &retiring.id]).await;
        let next = IssuedKey::from_json(&next);
        let retired = create(control, &[]).await;
        control.json(&["rotate", "start", &retired.id]).await;
        let retire = [
            "rotate",
            "retire",
            &retired.id,
            "--force",
            "--reason",
            "told",
        ];
        let last = control.json(&retire).await;
        control.json(&["keyring", "create", "partners"]).await;
        let foreign = [
            "--keyring",
            "partners",
            "--consumer",
            CONSUMER,
            "--create-missing",
        ];
        let foreign = control
            .json(&[&["key", "create"], &foreign[..]].concat())
            .await;
        let foreign = IssuedKey::from_json(&foreign);
        sidecar
            .reaches(last["revision"].as_u64().expect("a revision"))
            .await;
        eventually("the short-lived key has expired", async || {
            (sidecar.check(&short.secret).await.reason == "expired").then_some(())
        })
        .await;
        let typo = format!("{}x", &plain.secret[..plain.secret.len() - 1]);
        Self(vec![
            ("a key", plain.secret),
            ("a limited key", limited.secret),
            ("an expired key", short.secret),
            ("a key that is not valid yet", later.secret),
            ("a revoked key", leaked.secret),
            ("a retiring version", retiring.secret),
            ("the version after it", next.secret),
            ("a retired version", retired.secret),
            ("a key of another keyring", foreign.secret),
            ("a key with a typo", typo),
            ("no key", "no-key-at-all".to_owned()),
        ])
    }
}

impl Circumstances {
    /// The request as Envoy would ask about it.
    fn check(self, credential: &str) -> CheckRequest {
        let mut request = check_request(credential);
        let attributes = request.attributes.as_mut().expect("it has attributes");
        attributes.source = self.source.map(|source| Peer {
            address: Some(Address {
                address: Some(address::Address::SocketAddress(SocketAddress {
                    address: source.to_owned(),
                    ..SocketAddress::default()
                })),
            }),
            ..Peer::default()
        });
        attributes
            .context_extensions
            .insert("relatch.scopes".to_owned(), self.scopes.to_owned());
        request
    }
}

async fn create(control: &Control, args: &[&str]) -> IssuedKey {
    let create = [
        "key",
        "create",
        "--keyring",
        KEYRING,
        "--consumer",
        CONSUMER,
    ];
    IssuedKey::from_json(&control.json(&[&create[..], args].concat()).await)
}

async fn admin(control: &Control) -> AdminClient<Channel> {
    let uri = format!("http://{}", control.plane.admin());
    let channel = Channel::from_shared(uri).expect("an address");
    AdminClient::new(channel.connect().await.expect("it listens"))
}

async fn explain(
    control: &Control,
    admin: &mut AdminClient<Channel>,
    circumstances: Circumstances,
    credential: &str,
) -> ExplainResponse {
    let scopes = circumstances.scopes.split_whitespace();
    let mut request = Request::new(ExplainRequest {
        keyring: KEYRING.to_owned(),
        credential: credential.to_owned(),
        source: circumstances.source.unwrap_or_default().to_owned(),
        scopes: scopes.map(str::to_owned).collect(),
        at: None,
    });
    let token = fs::read_to_string(control.plane.token_file()).expect("it is there");
    let token = format!("Bearer {token}").parse().expect("ASCII");
    request.metadata_mut().insert("authorization", token);
    let explained = admin.explain(request).await;
    explained.expect("it is explained").into_inner()
}

/// An explanation as the sidecar would have put it.
fn verdict(explained: &ExplainResponse) -> Verdict {
    Verdict {
        allowed: explained.allowed,
        reason: if explained.allowed {
            "ok".to_owned()
        } else {
            explained.reason.clone()
        },
        version: Some(u64::from(explained.version)).filter(|&version| version != 0),
    }
}
