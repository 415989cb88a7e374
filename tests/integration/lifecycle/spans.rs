//! The spans of a control plane: who asked for what, and what became of it, without a word that is secret.

use std::{fmt::Write as _, net::TcpListener};

use relatch::proto::admin::{self, admin_client::AdminClient};
use rustix::process::Signal;
use tonic::{
    Code, Request,
    metadata::MetadataValue,
    transport::{Channel, Endpoint},
};
use tonic_prost::ProstCodec;

use super::deployment::{CONSUMER, Control, IssuedKey, KEYRING, Sidecar};
use crate::support::{
    client,
    eventually::{DEADLINE, eventually},
    otlp::{OtlpReceiver, ReceivedSpan},
};

const SERVICE: &str = "relatch.admin.v1.Admin";
const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
const PARENT: &str = "b7ad6b7169203331";
/// Stands in texts of people and of other programs, none of which belongs in a span.
const CANARY: &str = "geheim";

/// What every test here needs to know of spans.
struct Spans(Vec<ReceivedSpan>);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotation_is_one_trace_below_the_call_that_began_it() {
    let collector = OtlpReceiver::start().await;
    let mut control = traced(&collector, "").await;
    let key = control.create_key().await;
    let sidecar = Sidecar::start(&control, "edge-1").await;
    sidecar.reaches(key.revision).await;

    let new = rotated(&control, &key).await;

    let spans = ended(&mut control, &collector).await;
    let call = spans.one(&format!("{SERVICE}/StartRotation"));
    assert_eq!(call.service, "relatch-control");
    assert_eq!(call.span.kind, 2, "a server's");
    assert_eq!(
        (hex(&call.span.trace_id), hex(&call.span.parent_span_id)),
        (TRACE.to_owned(), PARENT.to_owned())
    );
    assert_eq!(call.text("rpc.system.name"), Some("grpc"));
    assert_eq!(call.text("rpc.method"), Some(&*call.span.name));
    assert_eq!(call.text("rpc.response.status_code"), Some("OK"));
    let actor = call.text("relatch.actor").expect("who called");
    assert!(actor.starts_with("token:"), "{actor}");
    assert!(!actor.contains(' '), "a token's name is a text: {actor}");

    let [rotation] = &spans.below(call)[..] else {
        panic!("one thing came of it: {:?}", spans.below(call));
    };
    assert_eq!(rotation.span.name, "relatch.rotation");
    assert_eq!(
        rotation.text("relatch.rotation.outcome"),
        Some("handed_over")
    );
    assert_eq!(rotation.text("auth.key.id"), Some(&*key.id));
    assert_eq!(rotation.int("auth.key.version"), Some(2));
    let id = rotation.text("auth.rotation.id").expect("it has an id");

    let [staged, barrier, handed_over] = &spans.below(rotation)[..] else {
        panic!("three steps: {:?}", spans.below(rotation));
    };
    for (commit, kind) in [(staged, "version_staged"), (handed_over, "handed_over")] {
        assert_eq!(commit.span.name, "relatch.commit");
        assert_eq!(commit.texts("relatch.change.kinds"), [kind]);
        assert_eq!(commit.text("relatch.commit.outcome"), Some("committed"));
        assert_eq!(commit.text("relatch.actor"), Some(actor));
        assert_eq!(commit.text("auth.keyring"), Some(KEYRING));
        assert_eq!(commit.text("auth.key.id"), Some(&*key.id));
        assert_eq!(commit.text("auth.rotation.id"), Some(id));
    }
    let revision = i64::try_from(new.revision).expect("small");
    assert_eq!(handed_over.int("auth.keyring.revision"), Some(revision));
    assert_eq!(barrier.span.name, "relatch.barrier");
    assert_eq!(barrier.text("relatch.barrier.outcome"), Some("passed"));
    assert_eq!(barrier.int("relatch.sidecars.applied"), Some(1));
    assert_eq!(barrier.int("relatch.sidecars.total"), Some(1));
    assert_eq!(
        barrier.int("auth.keyring.revision"),
        staged.int("auth.keyring.revision")
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_wait_for_an_emergencys_revocation_is_below_its_call() {
    let collector = OtlpReceiver::start().await;
    let mut control = traced(&collector, "").await;
    let key = control.create_key().await;
    let start = ["rotate", "start", &key.id, "--emergency"];
    control
        .json(&[&start[..], &["--reason", CANARY]].concat())
        .await;

    let spans = ended(&mut control, &collector).await;

    let call = spans.one(&format!("{SERVICE}/StartRotation"));
    let below = spans.below(call);
    let names: Vec<&str> = below.iter().map(|span| &*span.span.name).collect();
    assert_eq!(names, ["relatch.rotation", "relatch.barrier"]);
    assert_eq!(below[1].text("relatch.barrier.outcome"), Some("passed"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn calls_that_are_not_served_have_spans_too() {
    let collector = OtlpReceiver::start().await;
    let mut control = traced(&collector, "").await;
    let key = control.create_key().await;
    let again = control.run(&["keyring", "create", KEYRING]).await;
    assert!(!again.status.success(), "it is there already");
    let channel = channel(&control).await;
    let mut client = AdminClient::new(channel.clone());
    let request = admin::GetKeyRequest {
        key_id: key.id.clone(),
    };
    let refused = client.get_key(request).await.expect_err("without a token");
    assert_eq!(refused.code(), Code::Unauthenticated);
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready().await.expect("it listens");
    let path = format!("/{SERVICE}/{CANARY}");
    let codec = ProstCodec::<admin::GetKeyRequest, admin::Key>::default();
    let path = path.parse().expect("a path");
    let request = Request::new(admin::GetKeyRequest::default());
    let unknown = grpc.unary(request, path, codec).await;
    assert_eq!(
        unknown.expect_err("there is no such method").code(),
        Code::Unimplemented
    );

    let spans = ended(&mut control, &collector).await;

    let unknown = spans.one(&format!("{SERVICE}/_OTHER"));
    assert_eq!(
        unknown.text("rpc.response.status_code"),
        Some("UNIMPLEMENTED")
    );
    assert_eq!(unknown.text("error.type"), Some("UNIMPLEMENTED"));
    let refused = spans.one(&format!("{SERVICE}/GetKey"));
    assert_eq!(
        refused.text("rpc.response.status_code"),
        Some("UNAUTHENTICATED")
    );
    assert_eq!(refused.text("error.type"), None, "a fault of the caller's");
    assert_eq!(refused.text("relatch.actor"), None);
    let exists = spans.one(&format!("{SERVICE}/CreateKeyring"));
    assert_eq!(
        exists.text("rpc.response.status_code"),
        Some("ALREADY_EXISTS")
    );
    let [commit] = &spans.below(exists)[..] else {
        panic!("one commit: {:?}", spans.below(exists));
    };
    assert_eq!(commit.text("relatch.commit.outcome"), Some("refused"));
    assert_eq!(commit.int("auth.keyring.revision"), None);
    let text = format!("{:?}", spans.0);
    assert!(!text.contains(CANARY), "{text}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_time_brings_about_has_spans_only_where_something_is_committed() {
    let collector = OtlpReceiver::start().await;
    let keys = tempfile::tempdir().expect("a directory can be made");
    let sinks = format!(
        "sinks: [{{ name: files, file: {{ directory: {} }} }}]\n",
        keys.path().display()
    );
    let mut control = traced(&collector, &sinks).await;
    let key = control.create_key().await;
    let set = ["policy", "set", "--keyring", KEYRING, "--sink", "files"];
    let often = [
        "--rotate-every",
        "5s",
        "--overlap",
        "1s",
        "--idle-for",
        "0s",
    ];
    control.json(&[&set[..], &often].concat()).await;

    eventually("a version was rotated and retired by itself", async || {
        let shown = control.show_key(&key.id).await;
        (shown["versions"][0]["state"] == "retired").then_some(())
    })
    .await;
    let current = keys.path().join(KEYRING).join(&key.id).join("current");
    let current = std::fs::read_to_string(current).expect("it was delivered");

    let spans = ended(&mut control, &collector).await;
    let rotation = spans
        .named("relatch.rotation")
        .find(|rotation| rotation.int("auth.key.version") == Some(2))
        .expect("the scheduled one");
    assert_eq!(rotation.text("relatch.actor"), Some("schedule"));
    assert_eq!(
        rotation.text("relatch.rotation.outcome"),
        Some("handed_over")
    );
    assert!(
        rotation.span.parent_span_id.is_empty(),
        "nobody asked for it"
    );
    let steps: Vec<&str> = spans
        .below(rotation)
        .iter()
        .map(|step| &*step.span.name)
        .collect();
    assert_eq!(
        steps,
        [
            "relatch.commit",
            "relatch.barrier",
            "relatch.commit",
            "relatch.delivery",
            "relatch.commit"
        ]
    );
    let mut retired = false;
    for round in spans.named("relatch.reconciler") {
        let commits = spans.below(round);
        assert!(!commits.is_empty(), "{round:?}");
        for commit in commits {
            assert_eq!(commit.span.name, "relatch.commit");
            assert_eq!(commit.text("relatch.actor"), Some("reconciler"));
            retired |= commit
                .texts("relatch.change.kinds")
                .contains(&"version_retired");
        }
    }
    assert!(retired);
    let secret = current.trim().rsplit('_').next().expect("a token");
    let text = format!("{:?}", spans.0);
    assert!(
        !text.contains(secret) && !text.contains(&key.secret),
        "{text}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_span_holds_a_secret_or_a_text_of_somebody() {
    let collector = OtlpReceiver::start().await;
    let sinks = "sinks: [{ name: hook, exec: { command: [/bin/sh, -c, \"cat >&2; exit 1\"] } }]\n";
    let mut control = traced(&collector, sinks).await;
    let (_, token_file) = control.create_token("admin", &[]).await;
    let key = control.create_key().await;
    let new = IssuedKey::from_json(&control.json(&["rotate", "start", &key.id]).await);
    let url = format!("https://{CANARY}.example/hooks/{CANARY}?token={CANARY}");
    let add = ["webhook", "add", "--keyring", KEYRING, "--url", &url];
    let webhook = control
        .json(&[&add[..], &["--consumer", CONSUMER]].concat())
        .await;
    let revoke = [
        "revoke",
        &key.id,
        "--version",
        "1",
        "--reason",
        CANARY,
        "--wait",
    ];
    control.json(&revoke).await;
    let other = control.create_key().await;
    let set = ["policy", "set", &other.id, "--sink", "hook"];
    control
        .json(
            &[
                &set[..],
                &[
                    "--rotate-every",
                    "1s",
                    "--overlap",
                    "0s",
                    "--idle-for",
                    "0s",
                ],
            ]
            .concat(),
        )
        .await;
    let failed = |span: &ReceivedSpan| {
        span.span.name == "relatch.delivery" && span.text("error.type") == Some("exec_sink")
    };
    let delivery = collector.span(failed).await;
    assert_eq!(delivery.text("relatch.sink"), Some("hook"));

    let spans = ended(&mut control, &collector).await;

    let held = spans.named("relatch.rotation").last().expect("it was held");
    assert_eq!(held.text("relatch.rotation.outcome"), Some("stopping"));
    let text = format!("{:?}", spans.0);
    let read = |path| std::fs::read_to_string(path).expect("the test's file");
    let tokens = [read(control.plane.token_file()), read(&token_file)];
    let pepper: serde_json::Value =
        serde_json::from_str(&read(&control.data_dir().join("pepper.json"))).expect("JSON");
    let pepper = pepper["secret"].as_str().expect("a secret");
    let signing = webhook["signing_secret"].as_str().expect("a secret");
    let [first, second] = [&tokens[0], &tokens[1]];
    for secret in [&key.secret, &new.secret, &other.secret, first, second] {
        let random = secret.trim().rsplit('_').next().expect("a token");
        assert!(random.len() > 30 && !text.contains(random), "{text}");
    }
    for hidden in [signing, pepper, CANARY, "/bin/sh"] {
        assert!(!text.contains(hidden), "{hidden} is in {text}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_collector_that_hangs_costs_spans_and_no_time() {
    // Connections are taken by the kernel, and nobody reads from them.
    let listener = TcpListener::bind("127.0.0.1:0").expect("a loopback port is free");
    let address = listener.local_addr().expect("it is bound");
    let mut control = Control::with_file(&format!(
        "telemetry: {{ otlp_endpoint: \"http://{address}\" }}\n"
    ))
    .await;
    let key = control.create_key().await;
    let done = control.json(&["rotate", "start", &key.id]).await;
    assert_eq!(done["event"], "handed_over");
    eventually("the lost spans are counted", async || {
        let page = client::Request::get("/metrics")
            .send(control.plane.http())
            .await;
        let page = page.text();
        let line = page
            .lines()
            .find_map(|line| line.strip_prefix("relatch_spans_dropped_total "))?;
        (line.parse::<u64>().expect("a number") > 0).then_some(())
    })
    .await;
    control.plane.process.signal(Signal::TERM);
    assert!(control.plane.process.exit().await.success());
    drop(listener);
}

impl Spans {
    fn named(&self, name: &str) -> impl Iterator<Item = &ReceivedSpan> {
        self.0.iter().filter(move |span| span.span.name == name)
    }

    fn one(&self, name: &str) -> &ReceivedSpan {
        let mut named = self.named(name);
        let one = named.next();
        assert!(named.next().is_none(), "{name} is there twice");
        one.unwrap_or_else(|| panic!("no {name} in {:?}", self.0))
    }

    /// Those whose parent is `span`, as they began.
    fn below(&self, span: &ReceivedSpan) -> Vec<&ReceivedSpan> {
        let is_child = |other: &&ReceivedSpan| {
            other.span.trace_id == span.span.trace_id
                && other.span.parent_span_id == span.span.span_id
        };
        let mut children: Vec<_> = self.0.iter().filter(is_child).collect();
        children.sort_by_key(|child| child.span.start_time_unix_nano);
        children
    }
}

/// A control plane that sends spans to `collector`.
async fn traced(collector: &OtlpReceiver, yaml: &str) -> Control {
    let endpoint = collector.addr();
    let telemetry = format!("telemetry: {{ otlp_endpoint: \"http://{endpoint}\" }}\n");
    Control::with_file(&format!("{telemetry}{yaml}")).await
}

/// Rotates a key as a caller who is traced, unsampled, does.
async fn rotated(control: &Control, key: &IssuedKey) -> IssuedKey {
    let mut client = AdminClient::new(channel(control).await);
    let mut request = Request::new(admin::StartRotationRequest {
        key_id: key.id.clone(),
        ..admin::StartRotationRequest::default()
    });
    let token = std::fs::read_to_string(control.plane.token_file()).expect("a token");
    let bearer: MetadataValue<_> = format!("Bearer {token}").parse().expect("text");
    let parent: MetadataValue<_> = format!("00-{TRACE}-{PARENT}-00").parse().expect("text");
    request.metadata_mut().insert("authorization", bearer);
    request.metadata_mut().insert("traceparent", parent);
    let steps = client.start_rotation(request).await;
    let mut steps = steps.expect("it begins").into_inner();
    let mut issued = None;
    while let Some(step) = steps.message().await.expect("it goes on") {
        if let Some(admin::start_rotation_response::Step::HandedOver(done)) = step.step {
            issued = done.key;
        }
    }
    let issued = issued.expect("it is handed over");
    IssuedKey {
        id: issued.key_id,
        version: u64::from(issued.version),
        revision: issued.revision,
        secret: issued.secret,
    }
}

/// Every span of a control plane that is told to end.
async fn ended(control: &mut Control, collector: &OtlpReceiver) -> Spans {
    control.plane.process.signal(Signal::TERM);
    assert!(control.plane.process.exit().await.success());
    Spans(collector.spans())
}

async fn channel(control: &Control) -> Channel {
    let uri = format!("http://{}", control.plane.admin());
    let endpoint = Endpoint::from_shared(uri).expect("an address");
    let endpoint = endpoint.timeout(DEADLINE);
    endpoint.connect().await.expect("it listens")
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut hex, byte| {
        let _ = write!(hex, "{byte:02x}");
        hex
    })
}
