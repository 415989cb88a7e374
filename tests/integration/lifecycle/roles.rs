//! Who may call what: every call of the admin API with every kind of token. What is not listed is not permitted.

use std::{collections::BTreeSet, path::Path};

use prost::Message;
use prost_types::FileDescriptorSet;
use relatch::proto::{
    DESCRIPTORS,
    admin::{CreateKeyRequest, admin_client::AdminClient},
};
use tonic::{
    Code, Request, Status,
    client::Grpc,
    codegen::http::uri::PathAndQuery,
    metadata::{Ascii, MetadataValue},
    transport::Channel,
};
use tonic_prost::ProstCodec;

use super::deployment::Control;
use crate::support::eventually::eventually;

/// The roles that may make each call.
const PERMITTED: [(&str, &[&str]); 34] = [
    ("CreateToken", &["admin"]),
    ("ListTokens", &["admin"]),
    ("EndToken", &["admin"]),
    ("CreateKeyring", &["admin"]),
    ("ListKeyrings", EVERYBODY),
    ("GetKeyring", EVERYBODY),
    ("ConfirmSnapshot", &["admin"]),
    ("CreateConsumer", &["issuer", "admin"]),
    ("ListConsumers", EVERYBODY),
    ("GetConsumer", EVERYBODY),
    ("CreateKey", &["issuer", "admin"]),
    ("ImportKey", &["issuer", "admin"]),
    ("ListKeys", EVERYBODY),
    ("GetKey", EVERYBODY),
    ("StartRotation", &["issuer", "admin"]),
    ("GetRotation", EVERYBODY),
    ("RetireVersion", &["issuer", "admin"]),
    ("ExtendOverlap", &["issuer", "admin"]),
    ("RollBack", &["issuer", "admin"]),
    ("AbortRotation", &["issuer", "admin"]),
    ("GetPolicy", EVERYBODY),
    ("SetPolicy", &["admin"]),
    ("GetUsage", EVERYBODY),
    ("Explain", EVERYBODY),
    ("AddWebhook", &["admin"]),
    ("RemoveWebhook", &["admin"]),
    ("TestWebhook", &["admin"]),
    ("ListWebhooks", EVERYBODY),
    ("ListDeliveries", EVERYBODY),
    ("Revoke", &["revoker", "admin"]),
    ("GetFleet", EVERYBODY),
    ("ForgetSidecar", &["admin"]),
    ("ListAudit", EVERYBODY),
    ("VerifyAudit", EVERYBODY),
];
const EVERYBODY: &[&str] = &ROLES;
const ROLES: [&str; 4] = ["viewer", "issuer", "revoker", "admin"];

#[tokio::test]
async fn every_role_may_make_the_calls_of_the_table_and_no_other() {
    let named: BTreeSet<&str> = PERMITTED.iter().map(|(method, _)| *method).collect();
    let declared = methods();
    let declared: BTreeSet<&str> = declared.iter().map(String::as_str).collect();
    assert_eq!(named, declared, "the table and the API differ");

    let control = Control::start().await;
    let channel = channel(&control).await;
    for role in ROLES {
        let (_, file) = control.create_token(role, &[]).await;
        let token = token(&file);
        for (method, permitted) in PERMITTED {
            let code = call(&channel, method, Some(&token)).await;
            if permitted.contains(&role) {
                // An empty request is answered, or refused for what it lacks.
                let answered = [Code::Ok, Code::InvalidArgument, Code::NotFound];
                assert!(answered.contains(&code), "{role}: {method}: {code:?}");
            } else {
                assert_eq!(code, Code::PermissionDenied, "{role}: {method}");
            }
        }
    }
}

#[tokio::test]
async fn no_call_is_answered_without_a_token_that_is_valid() {
    let control = Control::start().await;
    let channel = channel(&control).await;
    let (ended_id, ended) = control.create_token("admin", &[]).await;
    let (_, expired) = control.create_token("admin", &["--expires-in", "2s"]).await;
    let [ended, expired] = [token(&ended), token(&expired)];
    assert_eq!(call(&channel, "ListTokens", Some(&ended)).await, Code::Ok);
    assert_eq!(call(&channel, "ListTokens", Some(&expired)).await, Code::Ok);
    control.json(&["token", "end", &ended_id]).await;
    eventually("the token is over", async || {
        let code = call(&channel, "ListTokens", Some(&expired)).await;
        (code != Code::Ok).then_some(())
    })
    .await;
    let first = std::fs::read_to_string(control.plane.token_file()).expect("it is there");
    let wrong = format!(
        "{}{}",
        &first[..first.len() - 1],
        if first.ends_with('0') { '1' } else { '0' }
    );
    let basic = format!("Basic {first}");
    let others = [format!("Bearer {wrong}"), basic, first, String::new()];
    let others = others.map(|value| value.parse().expect("ASCII"));

    let tokens = [None, Some(&ended), Some(&expired)];
    for token in tokens.into_iter().chain(others.iter().map(Some)) {
        for (method, _) in PERMITTED {
            let code = call(&channel, method, token).await;
            assert_eq!(code, Code::Unauthenticated, "{method}");
        }
    }
}

#[tokio::test]
async fn an_issuer_makes_keys_but_no_keyring_for_them() {
    let control = Control::start().await;
    let (_, file) = control.create_token("issuer", &[]).await;
    let token = token(&file);
    let mut admin = AdminClient::new(channel(&control).await);
    let mut create = async |keyring: &str| {
        let mut request = Request::new(CreateKeyRequest {
            keyring: keyring.to_owned(),
            consumer: "acme".to_owned(),
            create_missing: true,
            ..CreateKeyRequest::default()
        });
        request
            .metadata_mut()
            .insert("authorization", token.clone());
        admin.create_key(request).await
    };
    let refused = create("partners")
        .await
        .expect_err("an admin makes keyrings");
    assert_eq!(refused.code(), Code::PermissionDenied);
    control.json(&["keyring", "create", "partners"]).await;
    create("partners")
        .await
        .expect("an issuer makes consumers and keys");
}

#[tokio::test]
async fn an_emergency_is_for_an_admin_to_declare() {
    let control = Control::start().await;
    let key = control.create_key().await;
    let start = [
        "rotate",
        "start",
        &key.id,
        "--emergency",
        "--reason",
        "leaked",
    ];
    for role in ["viewer", "issuer", "revoker"] {
        let (_, file) = control.create_token(role, &[]).await;
        let refused = control.plane.cli_as(&file, &start).await;
        assert_eq!(refused.status.code(), Some(6), "{role}: {}", refused.stderr);
    }
    let versions = control.show_key(&key.id).await["versions"].clone();
    assert_eq!(versions.as_array().map(Vec::len), Some(1), "{versions}");
    let (done, _) = control.emergency(&key.id).await;
    assert_eq!(
        (&done["version"], &done["old_version"]),
        (&2.into(), &1.into())
    );
}

#[tokio::test]
async fn to_retire_by_force_needs_the_permission_to_revoke() {
    let control = Control::start().await;
    let key = control.create_key().await;
    control.rotate(&key.id).await;
    let force = ["--force", "--reason", "they were told twice"];
    let retire = [&["rotate", "retire", &key.id][..], &force].concat();
    for role in ["viewer", "issuer"] {
        let (_, file) = control.create_token(role, &[]).await;
        let refused = control.plane.cli_as(&file, &retire).await;
        assert_eq!(refused.status.code(), Some(6), "{role}: {}", refused.stderr);
    }
    let versions = control.show_key(&key.id).await["versions"].clone();
    assert_eq!(versions[0]["state"], "retiring", "{versions}");
    let (_, file) = control.create_token("revoker", &[]).await;
    let retired = control.plane.cli_as(&file, &retire).await;
    assert_eq!(retired.status.code(), Some(0), "{}", retired.stderr);
    let versions = control.show_key(&key.id).await["versions"].clone();
    assert_eq!(versions[0]["state"], "retired", "{versions}");
}

#[tokio::test]
async fn what_is_not_permitted_ends_the_command_with_its_own_exit_code() {
    let control = Control::start().await;
    let (_, viewer) = control.create_token("viewer", &[]).await;
    let listed = control.plane.cli_as(&viewer, &["key", "list"]).await;
    assert_eq!(listed.status.code(), Some(0), "{}", listed.stderr);
    let denied = control.plane.cli_as(&viewer, &["token", "list"]).await;
    assert_eq!(denied.status.code(), Some(6), "{}", denied.stderr);
    assert!(denied.stderr.contains("role viewer"), "{}", denied.stderr);
    std::fs::write(&viewer, "nobody").expect("the test's directory can be written to");
    let unknown = control.plane.cli_as(&viewer, &["key", "list"]).await;
    assert_eq!(unknown.status.code(), Some(6), "{}", unknown.stderr);
    let why = "the admin token was rejected: it is expired, deleted, or of another control plane";
    assert!(unknown.stderr.contains(why), "{}", unknown.stderr);
}

/// The names of the calls that `proto/` declares.
fn methods() -> Vec<String> {
    let descriptors = FileDescriptorSet::decode(DESCRIPTORS).expect("descriptors");
    let services = descriptors.file.iter().flat_map(|file| &file.service);
    let mut admin = services.filter(|service| service.name() == "Admin");
    let admin = admin.next().expect("the admin API is described");
    admin
        .method
        .iter()
        .map(|method| method.name().to_owned())
        .collect()
}

async fn channel(control: &Control) -> Channel {
    let uri = format!("http://{}", control.plane.admin());
    let endpoint = Channel::from_shared(uri).expect("an address");
    endpoint.connect().await.expect("it listens")
}

/// The header of whoever holds the token in `file`.
fn token(file: &Path) -> MetadataValue<Ascii> {
    let token = std::fs::read_to_string(file).expect("it is there");
    format!("Bearer {token}").parse().expect("a token is ASCII")
}

/// What comes of an empty request. A call with one answer looks like one that streams an answer.
async fn call(channel: &Channel, method: &str, token: Option<&MetadataValue<Ascii>>) -> Code {
    let mut client = Grpc::new(channel.clone());
    client.ready().await.expect("the control plane is there");
    let mut request = Request::new(());
    if let Some(token) = token {
        request
            .metadata_mut()
            .insert("authorization", token.clone());
    }
    let path: PathAndQuery = format!("/relatch.admin.v1.Admin/{method}")
        .parse()
        .expect("a path");
    let answer = async {
        let codec = ProstCodec::<(), ()>::default();
        let mut answers = client
            .server_streaming(request, path, codec)
            .await?
            .into_inner();
        while answers.message().await?.is_some() {}
        Ok::<_, Status>(())
    };
    answer
        .await
        .map_or_else(|status| status.code(), |()| Code::Ok)
}
