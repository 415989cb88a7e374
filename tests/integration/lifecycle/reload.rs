//! The file of a running sidecar: what changes in it is in use without a restart, as a whole or not at all.

use std::{
    fs,
    os::unix::fs::symlink,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use envoy_types::pb::envoy::service::auth::v3::{
    CheckResponse, authorization_client::AuthorizationClient, check_response::HttpResponse,
};
use rustix::process::Signal;
use serde_json::Value;
use tonic::transport::Endpoint;

use super::deployment::{Control, IssuedKey, Sidecar, Verdict, check_request};
use crate::support::{
    envoy::AuthzAddress,
    eventually::{DEADLINE, eventually, within},
    relatch::sidecar_yaml,
};

/// What a sidecar logs when it applies its file.
const APPLIED: &str = "the configuration file is applied";
const REFUSED: &str = "the configuration file is not applied";
const PASSES: &str = "relatch_config_last_reload_successful 1\n";
const FAILS: &str = "relatch_config_last_reload_successful 0\n";

/// A sidecar whose file changes.
struct Changing {
    sidecar: Sidecar,
    /// What its file said at the start, with the addresses that it got.
    first: String,
}

impl Changing {
    async fn start(control: &Control, keyrings: &[&str]) -> Self {
        let yaml = sidecar_yaml("edge-1", control.plane.discovery(), keyrings);
        let sidecar = Sidecar::with_config(&yaml).await;
        sidecar.ready().await;
        let first = fs::read_to_string(sidecar.daemon.config()).expect("it has a file");
        Self { sidecar, first }
    }

    /// Replaces the file as editors and orchestrators do: no reader sees half of it.
    fn write(&self, yaml: &str) {
        let file = self.sidecar.daemon.config();
        let draft = file.with_extension("draft");
        fs::write(&draft, yaml).expect("the test's directory can be written to");
        fs::rename(&draft, &file).expect("the test's directory can be written to");
    }

    /// Replaces the file, sends SIGHUP, and waits until it is applied.
    async fn apply(&self, yaml: &str) {
        let count = self.sidecar.logged(APPLIED);
        self.write(yaml);
        self.sidecar.daemon.process.signal(Signal::HUP);
        self.sidecar.until_logged(APPLIED, count + 1).await;
    }

    /// Replaces the file, sends SIGHUP, and waits until it is refused; the reason.
    async fn refuse(&self, yaml: &str) -> String {
        let count = self.sidecar.logged(REFUSED);
        self.write(yaml);
        self.sidecar.daemon.process.signal(Signal::HUP);
        self.sidecar.until_logged(REFUSED, count + 1).await;
        let status = self.status().await;
        let problem = status["config"]["problem"].as_str();
        problem.expect("the reason is in /status").to_owned()
    }

    async fn status(&self) -> Value {
        self.sidecar.daemon.get("/status").await.json()
    }

    async fn has_metric(&self, line: &str) -> bool {
        self.sidecar
            .daemon
            .get("/metrics")
            .await
            .text()
            .contains(line)
    }

    async fn check(&self, key: &str) -> Verdict {
        self.sidecar.check(key).await
    }

    /// The whole answer to a request with `key`.
    async fn answer(&self, key: &str) -> CheckResponse {
        let AuthzAddress::Tcp(address) = self.sidecar.daemon.ext_authz() else {
            panic!("it listens on a port");
        };
        let endpoint = Endpoint::from_shared(format!("http://{address}")).expect("a URL");
        let mut client = AuthorizationClient::new(endpoint.connect_lazy());
        let answer = client.check(check_request(key)).await;
        answer.expect("a sidecar answers").into_inner()
    }
}

async fn create_key(control: &Control, keyring: &str) -> IssuedKey {
    let create = ["key", "create", "--consumer", "acme", "--create-missing"];
    IssuedKey::from_json(
        &control
            .json(&[&create[..], &["--keyring", keyring]].concat())
            .await,
    )
}

fn denied(reason: &str) -> Verdict {
    Verdict {
        allowed: false,
        reason: reason.to_owned(),
        version: None,
    }
}

#[tokio::test]
async fn every_kind_of_setting_changes_without_a_restart() {
    let control = Control::start().await;
    let [payments, partners] = [
        create_key(&control, "payments").await,
        create_key(&control, "partners").await,
    ];
    let changing = Changing::start(&control, &["payments"]).await;
    let first = &changing.first;
    assert_eq!(changing.check(&payments.secret).await, Verdict::allowed(1));

    // A keyring and the default keyring.
    let both = first.replace(
        "{ name: payments }",
        "{ name: payments }, { name: partners }",
    );
    let both = both.replace("default_keyring: payments", "default_keyring: partners");
    changing.apply(&both).await;
    eventually("the new keyring is served", async || {
        let verdict = changing.check(&partners.secret).await;
        (verdict == Verdict::allowed(1)).then_some(())
    })
    .await;
    assert_eq!(
        changing.check(&payments.secret).await,
        denied("unknown_key")
    );

    // Routes.
    let route = "routes: [{ host: api.example, keyring: payments }]\n";
    changing.apply(&format!("{both}{route}")).await;
    assert_eq!(changing.check(&payments.secret).await, Verdict::allowed(1));

    // The places of credentials.
    let places = "credentials: [{ header: x-other-key }]\n";
    changing.apply(&format!("{first}{places}")).await;
    assert_eq!(
        changing.check(&payments.secret).await,
        denied("missing_credential")
    );

    // The headers for the upstream.
    let headers = "identity_headers: { consumer: x-caller }\n";
    changing.apply(&format!("{first}{headers}")).await;
    let answer = changing.answer(&payments.secret).await;
    let Some(HttpResponse::OkResponse(allowed)) = answer.http_response else {
        panic!("{answer:?}");
    };
    let names = allowed.headers.iter().filter_map(|set| set.header.as_ref());
    assert!(names.clone().any(|header| header.key == "x-caller"));

    // The budget of failed credentials.
    let budget = "failed_credentials: { per_second: 1, burst: 1 }\n";
    let address = "client_address: { from: x-real-ip, trusted: [\"10.0.0.0/8\"] }\n";
    changing.apply(&format!("{first}{budget}{address}")).await;
    let status = changing.status().await;
    assert_eq!(status["client_address"]["from"], "x-real-ip");

    // The log level: what is less severe is not logged any more.
    let count = changing.sidecar.logged(APPLIED);
    let applied_at = |status: &Value| status["config"]["applied_at"].clone();
    changing.write(&format!("{first}log: {{ level: error }}\n"));
    changing.sidecar.daemon.process.signal(Signal::HUP);
    eventually("the level is in use", async || {
        (applied_at(&changing.status().await) != applied_at(&status)).then_some(())
    })
    .await;
    changing.apply(first).await;
    assert!(changing.sidecar.logged(APPLIED) > count);

    // The keyring that is not in the file any more is gone here and at the control plane.
    assert_eq!(changing.status().await["keyrings"][0]["name"], "payments");
    eventually("the sidecar does not count for it", async || {
        let fleet = control.json(&["fleet"]).await;
        let keyrings = fleet[0]["keyrings"].as_array()?;
        (keyrings.len() == 1 && changing.status().await["keyrings"].as_array()?.len() == 1)
            .then_some(())
    })
    .await;
    assert!(changing.has_metric(PASSES).await);
    assert_eq!(changing.check(&payments.secret).await, Verdict::allowed(1));
}

#[tokio::test]
async fn a_file_that_changes_is_applied_without_a_signal_also_behind_a_link() {
    let control = Control::start().await;
    let key = create_key(&control, "payments").await;
    let changing = Changing::start(&control, &["payments"]).await;
    let other = format!("{}credentials: [{{ cookie: key }}]\n", changing.first);
    changing.write(&other);
    changing.sidecar.until_logged(APPLIED, 1).await;
    assert_eq!(
        changing.check(&key.secret).await,
        denied("missing_credential")
    );

    // As Kubernetes switches a directory of a ConfigMap.
    let file = changing.sidecar.daemon.config();
    let dir = file.parent().expect("a directory");
    for (version, yaml) in [("v1", &other), ("v2", &changing.first)] {
        fs::create_dir(dir.join(version)).expect("a directory can be made");
        fs::write(dir.join(version).join("sidecar.yaml"), yaml).expect("it can be written to");
        let draft = dir.join("draft");
        symlink(version, &draft).expect("a link can be made");
        fs::rename(&draft, dir.join("data")).expect("a link can be replaced");
        if version == "v1" {
            symlink("data/sidecar.yaml", &draft).expect("a link can be made");
            fs::rename(&draft, &file).expect("the file can be replaced");
        }
    }
    changing.sidecar.until_logged(APPLIED, 2).await;
    assert_eq!(changing.check(&key.secret).await, Verdict::allowed(1));
}

#[tokio::test]
async fn a_file_that_cannot_be_applied_changes_nothing_and_says_why() {
    let control = Control::start().await;
    let key = create_key(&control, "payments").await;
    let changing = Changing::start(&control, &["payments"]).await;
    let first = &changing.first;
    let cookie = "credentials: [{ cookie: key }]\n";
    for (yaml, why) in [
        (
            format!("{first}{cookie}workers: 0\n"),
            "workers: use a whole number from 1 to 64",
        ),
        (
            format!("{first}{cookie}workers: 2\ndrain: 1s\n"),
            "workers, drain: cannot change while the sidecar runs",
        ),
        (
            format!("{cookie}{}", first.replace("id: edge-1", "id: edge-2")),
            "node: cannot change while the sidecar runs",
        ),
        (
            format!(
                "{cookie}{}",
                first.replace("name: payments", "name: payments, mode: on_demand")
            ),
            "keyring payments is held in another mode or with another cache",
        ),
        ("credentials: [".to_owned(), "sidecar.yaml:1"),
    ] {
        let problem = changing.refuse(&yaml).await;
        assert!(problem.contains(why), "{problem}");
        assert!(changing.has_metric(FAILS).await);
        assert_eq!(changing.check(&key.secret).await, Verdict::allowed(1));
    }
    fs::remove_file(changing.sidecar.daemon.config()).expect("it is there");
    let count = changing.sidecar.logged(REFUSED);
    changing.sidecar.daemon.process.signal(Signal::HUP);
    changing.sidecar.until_logged(REFUSED, count + 1).await;
    assert_eq!(changing.check(&key.secret).await, Verdict::allowed(1));

    changing.apply(&format!("{first}{cookie}")).await;
    assert!(changing.has_metric(PASSES).await);
    assert!(changing.status().await["config"]["problem"].is_null());
    assert_eq!(
        changing.check(&key.secret).await,
        denied("missing_credential")
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_check_fails_while_files_are_applied() {
    const RELOADS: usize = 50;

    let control = Control::start().await;
    let key = create_key(&control, "payments").await;
    create_key(&control, "partners").await;
    let changing = Arc::new(Changing::start(&control, &["payments"]).await);
    let first = &changing.first;
    let other = first.replace(
        "{ name: payments }",
        "{ name: payments }, { match: \"p*\" }",
    );
    // Each request has its key where either file looks for it, and its keyring by a route or by default.
    let other = other.replace("default_keyring: payments", "default_keyring: partners");
    let other = format!(
        "{other}routes: [{{ host: api.example, keyring: payments }}]\nfailed_credentials: {{ burst: 1 }}\n"
    );
    let ended = Arc::new(AtomicBool::new(false));
    let callers = [(); 4].map(|()| {
        let (changing, ended, key) = (Arc::clone(&changing), Arc::clone(&ended), key.clone());
        tokio::spawn(async move {
            let mut count = 0;
            while !ended.load(Ordering::Relaxed) {
                let verdict = changing.check(&key.secret).await;
                assert_eq!(verdict, Verdict::allowed(1), "after {count} checks");
                count += 1;
            }
            count
        })
    });
    for reload in 0..RELOADS {
        changing
            .apply(if reload % 2 == 0 { &other } else { first })
            .await;
        assert!(changing.sidecar.is_ready().await, "after {reload} reloads");
    }
    ended.store(true, Ordering::Relaxed);
    for caller in callers {
        let count = within(DEADLINE, "a caller ends", caller).await;
        assert!(count.expect("every check passes") > RELOADS);
    }
}
