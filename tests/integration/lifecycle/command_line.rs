//! The command line from end to end: what scripts rely on.

use std::{fs, process::Command};

use rusqlite::Connection;
use rustix::process::Signal;
use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, MapAccess, Visitor},
};

use super::deployment::{CONSUMER, Control, IssuedKey, KEYRING, Sidecar};
use crate::support::{
    envoy::AuthzAddress,
    eventually::eventually,
    process::{Output, RELATCH, relatch, run},
    relatch::{sidecar_yaml, text},
    reserved::Reserved,
};

/// The names of a JSON object's fields in their order.
struct FieldNames(Vec<String>);

struct FieldNamesVisitor;

/// A key that nobody has.
const UNKNOWN: &str = "000000000000";

const ISSUED: [&str; 9] = [
    "keyring",
    "consumer",
    "key_id",
    "version",
    "state",
    "secret",
    "not_before",
    "expires_at",
    "revision",
];
const VERSION: [&str; 7] = [
    "version",
    "state",
    "created_at",
    "not_before",
    "expires_at",
    "requests",
    "last_used_at",
];

#[tokio::test]
async fn each_exit_code_has_its_cause() {
    let control = Control::start().await;
    let key = control.create_key().await;
    let sidecar = Sidecar::start(&control, "edge-1").await;
    let AuthzAddress::Tcp(address) = sidecar.daemon.ext_authz() else {
        panic!("it listens on TCP");
    };
    let address = address.to_string();
    let check = ["check", "--endpoint", &address];
    assert_code(0, &relatch(&check, &key.secret).await, "");
    let denied = relatch(&check, &format!("{}x", key.secret)).await;
    assert_code(1, &denied, "");
    assert!(
        denied.stdout.contains("malformed_credential"),
        "{}",
        denied.stdout
    );
    assert_code(2, &control.run(&["key", "show"]).await, "KEY_ID");
    assert_code(
        2,
        &control.run(&["key", "show", "short"]).await,
        "12 characters",
    );
    assert_code(3, &control.run(&["key", "show", UNKNOWN]).await, UNKNOWN);
    assert_code(
        3,
        &control.run(&["rotate", "start", UNKNOWN]).await,
        UNKNOWN,
    );
    let key_import = [
        "key",
        "import",
        "--keyring",
        KEYRING,
        "--consumer",
        CONSUMER,
    ];
    let file = control.data_dir().join("foreign.key");
    fs::write(&file, "a-key-of-another-system").expect("the test's directory can be written to");
    let import = [&key_import[..], &["--from-file", text(&file)]].concat();
    assert_code(4, &control.run(&import).await, "--allow-imported");
    sidecar.daemon.process.signal(Signal::STOP);
    let rotate = ["rotate", "start", &key.id, "--timeout", "100ms"];
    assert_code(5, &control.run(&rotate).await, "edge-1");
    let (_, viewer) = control.create_token("viewer", &[]).await;
    let create = ["keyring", "create", "partners"];
    assert_code(
        6,
        &control.plane.cli_as(&viewer, &create).await,
        "role viewer",
    );
    let token = text(control.plane.token_file());
    let reserved = Reserved::new();
    let nobody = format!("http://{}", reserved.address());
    let nowhere = ["key", "list", "--token-file", token, "--admin", &nobody];
    assert_code(7, &relatch(&nowhere, "").await, &nobody);
    let nowhere = ["check", "--endpoint", &nobody, "--no-key"];
    assert_code(7, &relatch(&nowhere, "").await, &nobody);
}

#[tokio::test]
async fn an_exit_code_is_the_same_when_nothing_can_be_written_to_standard_error() {
    let secret = format!("rlk_{}", "0123456789abcdef".repeat(2));
    for args in [
        &["fleet", "--token-file", "/nonexistent"][..],
        &["no-such-command"],
        &[&secret],
    ] {
        let usual = relatch(args, "").await;
        assert!(!usual.stderr.is_empty(), "{args:?}");
        // Every write to this device fails: the disk is full.
        let mut shell = Command::new("sh");
        shell.args(["-c", "exec \"$0\" \"$@\" 2>/dev/full", RELATCH]);
        let unheard = run(shell.args(args), "").await;
        assert_eq!(unheard.status.code(), Some(2), "{args:?}");
        assert_eq!(usual.status.code(), Some(2), "{args:?}: {}", usual.stderr);
    }
}

#[tokio::test]
async fn a_key_that_is_refused_leaves_no_consumer_and_no_keyring_behind() {
    let control = Control::start().await;
    control.create_key().await;
    let file = control.data_dir().join("foreign.key");
    fs::write(&file, "a-key-of-another-system").expect("the test's directory can be written to");
    let import = ["key", "import", "--from-file", text(&file)];
    let create = ["key", "create", "--not-before", "2020-01-01T00:00:00Z"];
    let create = [&create[..], &["--expires-in", "1d"]].concat();
    let refused = async |code: i32, args: &[&str], keyring: &str, said: &str| {
        let of = ["--keyring", keyring, "--consumer", "ghost"];
        let all = [args, &of, &["--create-missing"]].concat();
        assert_code(code, &control.run(&all).await, said);
    };
    let foreign = ["--keyring", "foreign", "--consumer", "first"];
    let made = control
        .json(&[&import[..], &foreign, &["--create-missing"]].concat())
        .await;
    assert_eq!(made["revision"], 3);

    refused(4, &import, KEYRING, "--allow-imported").await;
    refused(1, &import, "foreign", "already imported").await;
    refused(2, &create, "foreign", "would have expired").await;
    refused(2, &create, "nowhere", "would have expired").await;

    for (keyring, consumer) in [(KEYRING, CONSUMER), ("foreign", "first")] {
        let list = control
            .json(&["consumer", "list", "--keyring", keyring])
            .await;
        let consumers = list.as_array().expect("a list");
        let names: Vec<_> = consumers.iter().map(|entry| &entry["consumer"]).collect();
        assert_eq!(names, [consumer]);
    }
    let list = control.json(&["keyring", "list"]).await;
    let keyrings = list.as_array().expect("a list");
    let names: Vec<_> = keyrings.iter().map(|keyring| &keyring["name"]).collect();
    assert_eq!(names, ["foreign", KEYRING]);
}

#[tokio::test]
async fn a_key_is_told_with_the_fields_of_the_contract_and_its_secret_once() {
    let control = Control::start().await;
    let _sidecar = Sidecar::start_unready(&control, "edge-1").await;
    let create = [
        "key",
        "create",
        "--keyring",
        KEYRING,
        "--consumer",
        CONSUMER,
    ];
    let more = ["--create-missing", "--scope", "read", "--expires-in", "90d"];
    let created = control.run(&[&create[..], &more[..]].concat()).await;
    let key = issued(&created);
    assert_eq!(names(&created), ISSUED);

    let rotated = control.run(&["rotate", "start", &key.id]).await;
    let new = issued(&rotated);
    let fields = names(&rotated);
    assert_eq!(fields[0], "event");
    assert_eq!(fields[1..=ISSUED.len()], ISSUED);

    let shown = control.run(&["key", "show", &key.id]).await;
    let without_secret = ISSUED.iter().filter(|name| **name != "secret");
    let expected: Vec<&str> = without_secret
        .chain(&["scopes", "versions"])
        .copied()
        .collect();
    assert_eq!(names(&shown)[..expected.len()], expected);
    let shown_key = shown.json();
    assert_eq!(shown_key["scopes"], serde_json::json!(["read"]));
    assert_eq!(shown_key["version"], 2);
    let versions = shown.stdout.split_once("\"versions\":[").expect("versions");
    let first = &versions.1[..=versions.1.find('}').expect("an object")];
    assert_eq!(names_of(first)[..VERSION.len()], VERSION);
    let audit = ["audit", "list", "--keyring", KEYRING];
    let elsewhere = [
        shown.stdout,
        control.run(&["key", "list"]).await.stdout,
        control.run(&audit).await.stdout,
        control.stopped().await.to_string(),
    ];
    for secret in [&key.secret, &new.secret] {
        assert!(elsewhere.iter().all(|text| !text.contains(secret.as_str())));
    }
}

#[tokio::test]
async fn tables_are_for_people() {
    let control = Control::start().await;
    let key = control.create_key().await;
    let _sidecar = Sidecar::start(&control, "edge-1").await;
    let admin = format!("http://{}", control.plane.admin());
    let token = text(control.plane.token_file()).to_owned();
    let table = async |args: &[&str]| {
        let connection = ["-o", "table", "--admin", &admin, "--token-file", &token];
        let output = relatch(&[args, &connection].concat(), "").await;
        assert_code(0, &output, "");
        output.stdout
    };
    for (args, parts) in [
        (&["key", "list"][..], &["KEY ID", &key.id, CONSUMER][..]),
        (&["key", "show", &key.id], &["VERSION", "active", KEYRING]),
        (&["keyring", "list"], &[KEYRING]),
        (&["consumer", "list", "--keyring", KEYRING], &[CONSUMER]),
        (&["token", "list"], &["ROLE", "admin"]),
        (&["fleet"], &["STATUS", "edge-1", "connected"]),
        (
            &["audit", "list", "--keyring", KEYRING],
            &["ACTOR", "key_created"],
        ),
        (&["audit", "verify"], &[KEYRING]),
    ] {
        let text = table(args).await;
        for part in parts {
            assert!(text.contains(part), "{args:?} without {part}:\n{text}");
        }
    }
    let rotated = table(&["rotate", "start", &key.id]).await;
    let secrets = rotated.matches(&format!("rlk_{}_", key.id)).count();
    assert_eq!(secrets, 1, "{rotated}");
}

#[tokio::test]
async fn a_sidecar_that_waits_for_a_keyring_which_does_not_exist_is_shown_so() {
    let control = Control::start().await;
    let sidecar = Sidecar::start_unready(&control, "edge-1").await;
    let keyring = async || {
        let fleet = control.run(&["fleet"]).await;
        let keyring = fleet.json()[0]["keyrings"][0].clone();
        (keyring["keyring"] == KEYRING).then_some((keyring, fleet.stderr))
    };

    let (waiting, notes) = eventually("the sidecar is connected", keyring).await;

    assert_eq!(waiting["missing"], true);
    assert_eq!(waiting["lag"], serde_json::Value::Null);
    let note = format!("edge-1 waits for keyring {KEYRING}, which does not exist");
    assert!(notes.contains(&note), "{notes}");

    let key = control.create_key().await;
    sidecar.reaches(key.revision).await;
    let (held, notes) = keyring().await.expect("it is connected");
    assert_eq!((&held["missing"], &held["lag"]), (&false.into(), &0.into()));
    assert!(!notes.contains("does not exist"), "{notes}");
}

#[tokio::test]
async fn a_name_that_would_deceive_its_readers_is_refused_and_a_reason_is_shown_without() {
    let control = Control::start().await;
    let key = control.create_key().await;
    let deceptive = "edge\u{202e}1-egde";
    let named = ["--keyring", KEYRING, "--name", deceptive];
    for create in [
        &["consumer", "create", "globex"][..],
        &["key", "create", "--consumer", CONSUMER],
    ] {
        let refused = control.run(&[create, &named].concat()).await;
        assert_code(2, &refused, "change the direction of text");
    }
    // An emergency does not fail for the words that it is explained with.
    let revoke = ["revoke", &key.id, "--all", "--reason", deceptive];
    assert_code(0, &control.run(&revoke).await, "");
    let shown = control.show_key(&key.id).await;
    assert_eq!(shown["versions"][0]["reason"], deceptive);
    let table = relatch(
        &[
            "key",
            "show",
            &key.id,
            "-o",
            "table",
            "--admin",
            &format!("http://{}", control.plane.admin()),
            "--token-file",
            text(control.plane.token_file()),
        ],
        "",
    )
    .await;
    assert!(
        table.stdout.contains("edge\u{fffd}1-egde"),
        "{}",
        table.stdout
    );
}

#[tokio::test]
async fn a_control_plane_is_initialized_once() {
    let control = Control::start().await;
    let pepper = control.data_dir().join("pepper.json");
    let before = fs::read(&pepper).expect("it is there");
    let init = ["control", "init", "--data-dir", text(control.data_dir())];

    let again = relatch(&init, "").await;

    assert_code(4, &again, "is already initialized");
    assert_eq!(again.stdout, "");
    assert_eq!(fs::read(&pepper).expect("it is there"), before);
}

#[tokio::test]
async fn the_audit_log_tells_who_did_what() {
    let control = Control::start().await;
    let key = control.create_key().await;
    let (issuer, file) = control.create_token("issuer", &[]).await;
    let rotated = control
        .plane
        .cli_as(&file, &["rotate", "start", &key.id])
        .await;
    let new = issued(&rotated);
    control
        .json(&["revoke", &key.id, "--version", "1", "--reason", "leaked"])
        .await;

    let log = control.json(&["audit", "list", "--keyring", KEYRING]).await;

    let entries = log.as_array().expect("entries");
    let kinds: Vec<&str> = entries
        .iter()
        .filter_map(|entry| entry["kind"].as_str())
        .collect();
    assert_eq!(
        kinds,
        [
            "keyring_created",
            "consumer_created",
            "key_created",
            "version_staged",
            "handed_over",
            "versions_revoked"
        ]
    );
    assert_eq!(entries[4]["revision"], new.revision);
    assert_eq!(entries[4]["actor"], format!("token:{issuer} (issuer)"));
    assert_eq!(entries[5]["payload"]["reason"], "leaked");
    let own = control.json(&["audit", "list"]).await;
    assert_eq!(own[1]["kind"], "token_created");
    let page = [
        "audit",
        "list",
        "--keyring",
        KEYRING,
        "--after",
        "2",
        "--limit",
        "2",
    ];
    let page = control.json(&page).await;
    assert_eq!(
        (&page[0]["revision"], page.as_array().map(Vec::len)),
        (&3.into(), Some(2))
    );
}

#[tokio::test]
async fn an_audit_log_that_was_edited_is_found_out() {
    let control = Control::start().await;
    control.create_key().await;
    assert_code(0, &control.run(&["audit", "verify"]).await, "");
    let database = Connection::open(control.data_dir().join("relatch.db")).expect("it opens");
    database
        .execute_batch(
            "DROP TRIGGER entries_are_never_updated;
             UPDATE entries SET actor = 'nobody' WHERE log = 'payments' AND revision = 2;",
        )
        .expect("whoever may write to the file can edit it");

    let verified = control.run(&["audit", "verify"]).await;

    assert_code(1, &verified, "the log of payments is broken");
    assert!(
        verified.stderr.contains("revision 2"),
        "{}",
        verified.stderr
    );
    let own = control
        .run(&["audit", "verify", "--keyring", "partners"])
        .await;
    assert!(!own.stderr.contains(KEYRING), "{}", own.stderr);
}

#[tokio::test]
async fn configuration_files_are_checked_by_line_and_field() {
    let files = tempfile::tempdir().expect("a directory can be made");
    let file = files.path().join("sidecar.yaml");
    let discovery = "127.0.0.1:9010".parse().expect("an address");
    let good = sidecar_yaml("edge-1", discovery, &[KEYRING]);
    let check = async |content: &str| {
        fs::write(&file, content).expect("the test's directory can be written to");
        relatch(&["config", "check", text(&file)], "").await
    };
    assert_code(0, &check(&good).await, "");
    let bad = good.replace("http: 127.0.0.1:0", "http: nowhere");
    let refused = check(&bad).await;
    assert_code(2, &refused, "sidecar.yaml:3");
    assert!(refused.stderr.contains("http"), "{}", refused.stderr);
    let unknown = check(&format!("{good}colour: green\n")).await;
    assert_code(2, &unknown, "sidecar.yaml:7");
    assert!(unknown.stderr.contains("colour"), "{}", unknown.stderr);
    fs::write(&file, bad).expect("the test's directory can be written to");
    let daemon = relatch(&["sidecar", "--config", text(&file)], "").await;
    assert_code(2, &daemon, "sidecar.yaml:3");
}

impl<'de> Deserialize<'de> for FieldNames {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(FieldNamesVisitor)
    }
}

impl<'de> Visitor<'de> for FieldNamesVisitor {
    type Value = FieldNames;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<FieldNames, A::Error> {
        let mut names = Vec::new();
        while let Some((name, IgnoredAny)) = map.next_entry()? {
            names.push(name);
        }
        Ok(FieldNames(names))
    }
}

/// The names of the fields of the last line.
fn names(output: &Output) -> Vec<String> {
    let line = output.stdout.lines().next_back().unwrap_or_default();
    names_of(line)
}

fn names_of(object: &str) -> Vec<String> {
    let FieldNames(names) = serde_json::from_str(object).expect("an object");
    names
}

/// The key of an output that shows its secret exactly once.
fn issued(output: &Output) -> IssuedKey {
    let key = IssuedKey::from_json(&output.json());
    assert_eq!(output.stdout.matches(&key.secret).count(), 1);
    assert!(!output.stderr.contains(&key.secret));
    key
}

fn assert_code(code: i32, output: &Output, said: &str) {
    let Output { status, stderr, .. } = output;
    assert_eq!(status.code(), Some(code), "{stderr}");
    assert!(stderr.contains(said), "{said:?} is not in {stderr}");
}
