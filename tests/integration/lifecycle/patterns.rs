//! Keyrings that a pattern of a sidecar finds: they are served as soon as they exist, and no others are.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use relatch::clock::Clock;
use serde_json::{Value, json};

use super::{
    deployment::{Control, IssuedKey, Sidecar, Verdict, check_request},
    snapshot::Disk,
};
use crate::support::{
    eventually::{eventually, eventually_within},
    relatch::sidecar_yaml,
};

/// The time within which a running sidecar serves a new keyring.
const AT_ONCE: Duration = Duration::from_secs(1);

/// The file of sidecar `node` with the entries `keyrings`, and without a default keyring.
fn yaml(control: &Control, node: &str, keyrings: &str) -> String {
    let yaml = sidecar_yaml(node, control.plane.discovery(), &["payments"]);
    let yaml = yaml.replace("{ name: payments }", keyrings);
    yaml.replace("default_keyring: payments\n", "")
}

async fn start(control: &Control, node: &str, keyrings: &str) -> Sidecar {
    Sidecar::with_config(&yaml(control, node, keyrings)).await
}

/// Creates a key of a keyring, which is created if it does not exist.
async fn create_key(control: &Control, keyring: &str) -> IssuedKey {
    let create = ["key", "create", "--consumer", "acme", "--create-missing"];
    IssuedKey::from_json(
        &control
            .json(&[&create[..], &["--keyring", keyring]].concat())
            .await,
    )
}

/// What the sidecar decides on a key of a keyring that the route names.
async fn check(sidecar: &Sidecar, keyring: &str, key: &str) -> Verdict {
    let mut request = check_request(key);
    let attributes = request.attributes.as_mut().expect("it has attributes");
    let named = ("relatch.keyring".to_owned(), keyring.to_owned());
    attributes.context_extensions.extend([named]);
    Box::pin(sidecar.judge(request)).await
}

/// Waits until a key of a keyring passes, for at most `deadline`.
async fn passes(sidecar: &Sidecar, keyring: &str, key: &str, deadline: Duration) {
    let what = format!("a key of {keyring} passes");
    eventually_within(deadline, &what, async || {
        let verdict = check(sidecar, keyring, key).await;
        (verdict == Verdict::allowed(1)).then_some(())
    })
    .await;
}

async fn status(sidecar: &Sidecar) -> Value {
    sidecar.daemon.get("/status").await.json()
}

/// The names of the keyrings that the sidecar holds.
async fn held(sidecar: &Sidecar) -> Vec<String> {
    let status = status(sidecar).await;
    let keyrings = status["keyrings"].as_array().expect("a list of keyrings");
    let names = keyrings.iter().map(|keyring| keyring["name"].as_str());
    names.map(|name| name.expect("a name").to_owned()).collect()
}

fn unknown_keyring() -> Verdict {
    Verdict {
        allowed: false,
        reason: "unknown_keyring".to_owned(),
        version: None,
    }
}

#[tokio::test]
async fn a_new_keyring_is_served_within_a_second() {
    let control = Control::start().await;
    let first = create_key(&control, "payments-eu").await;
    let sidecar = start(&control, "edge-1", "{ match: \"payments-*\" }").await;
    sidecar.ready().await;
    assert_eq!(
        check(&sidecar, "payments-eu", &first.secret).await,
        Verdict::allowed(1)
    );

    for keyring in ["payments-us", "payments-asia"] {
        let key = create_key(&control, keyring).await;
        let created = Clock::system().boot();
        passes(&sidecar, keyring, &key.secret, AT_ONCE).await;
        println!(
            "{keyring}: served {:?} after its creation",
            Clock::system().boot().saturating_since(created)
        );
        assert!(sidecar.is_ready().await);
    }
    let other = create_key(&control, "partners").await;
    let last = create_key(&control, "payments-last").await;
    passes(&sidecar, "payments-last", &last.secret, AT_ONCE).await;
    assert_eq!(
        check(&sidecar, "partners", &other.secret).await,
        unknown_keyring()
    );
    assert_eq!(
        held(&sidecar).await,
        [
            "payments-asia",
            "payments-eu",
            "payments-last",
            "payments-us"
        ]
    );
    let status = status(&sidecar).await;
    assert_eq!(
        status["patterns"],
        json!({ "match": ["payments-*"], "matching": 4, "left_out": 0 })
    );
    let metrics = sidecar.daemon.get("/metrics").await;
    let metrics = metrics.text();
    assert!(
        metrics.contains("relatch_keyrings_left_out 0\n"),
        "{metrics}"
    );
    let counted = "relatch_checks_total{keyring=\"payments-us\",decision=\"allow\"";
    assert!(metrics.contains(counted), "{metrics}");
}

#[tokio::test]
async fn a_sidecar_whose_patterns_match_nothing_is_not_ready_and_says_so() {
    let control = Control::start().await;
    create_key(&control, "partners").await;
    let sidecar = start(&control, "edge-1", "{ match: \"payments-*\" }").await;
    let blocker = "the control plane serves no keyring that matches payments-* and that this sidecar may have";
    eventually("the reason is in /readyz", async || {
        let page = sidecar.daemon.get("/readyz").await;
        (page.status == 503 && page.text().contains(blocker)).then_some(())
    })
    .await;
    assert_eq!(status(&sidecar).await["blocked_by"], json!([blocker]));
    sidecar
        .until_logged("the patterns of this sidecar match no keyring", 1)
        .await;

    let key = create_key(&control, "payments-eu").await;
    sidecar.ready().await;
    passes(&sidecar, "payments-eu", &key.secret, AT_ONCE).await;
}

#[tokio::test]
async fn a_name_comes_before_patterns_and_the_first_pattern_that_matches_applies() {
    let control = Control::start().await;
    for keyring in ["payments-eu", "payments-us", "payments-asia"] {
        create_key(&control, keyring).await;
    }
    let entries = "{ match: \"*-eu\", mode: on_demand, cache: { lookup_timeout: 10s } }, { name: payments-us, mode: on_demand }, { match: \"*\" }";
    let sidecar = start(&control, "edge-1", entries).await;
    sidecar.ready().await;
    let status = status(&sidecar).await;
    let modes = status["keyrings"].as_array().expect("a list").iter();
    let modes: Vec<_> = modes
        .map(|keyring| (keyring["name"].clone(), keyring["mode"].clone()))
        .collect();
    assert_eq!(
        modes,
        [
            (json!("payments-asia"), json!("full")),
            (json!("payments-eu"), json!("on_demand")),
            (json!("payments-us"), json!("on_demand"))
        ]
    );
    // A keyring on demand that is found later is looked up on the open stream.
    let key = create_key(&control, "partners-eu").await;
    passes(&sidecar, "partners-eu", &key.secret, AT_ONCE).await;
}

#[tokio::test]
async fn a_restart_without_a_control_plane_serves_the_keyrings_that_were_found() {
    let disk = Disk::new().await;
    let mut control = Control::start().await;
    create_key(&control, "payments-eu").await;
    let more = disk.lines();
    let found = yaml(&control, "edge-1", "{ match: \"payments-*\" }") + &more;
    let sidecar = Sidecar::with_config(&found).await;
    sidecar.ready().await;
    let key = create_key(&control, "payments-us").await;
    passes(&sidecar, "payments-us", &key.secret, AT_ONCE).await;
    eventually("both keyrings and their ages are on disk", async || {
        let keyrings = disk.keyrings().await;
        let keyrings = keyrings.as_array()?;
        let is_dated = keyrings.iter().all(|keyring| !keyring["as_of"].is_null());
        (keyrings.len() == 2 && is_dated).then_some(())
    })
    .await;

    control.plane.kill().await;
    drop(sidecar);
    let sidecar = Sidecar::with_config(&found).await;
    sidecar.ready().await;
    assert_eq!(
        check(&sidecar, "payments-us", &key.secret).await,
        Verdict::allowed(1)
    );
    drop(sidecar);

    // What no entry of the file matches any more is not served, and leaves the file.
    let other = yaml(&control, "edge-1", "{ match: \"*-eu\" }") + &more;
    let sidecar = Sidecar::with_config(&other).await;
    sidecar.ready().await;
    assert_eq!(held(&sidecar).await, ["payments-eu"]);
    assert_eq!(
        check(&sidecar, "payments-us", &key.secret).await,
        unknown_keyring()
    );
    eventually("the other keyring leaves the file", async || {
        let keyrings = disk.keyrings().await;
        (keyrings.as_array()?.len() == 1).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn checks_continue_while_keyrings_come() {
    let control = Control::start().await;
    let key = create_key(&control, "payments-eu").await;
    let sidecar = Arc::new(start(&control, "edge-1", "{ match: \"*\" }").await);
    sidecar.ready().await;
    let ended = Arc::new(AtomicBool::new(false));
    let asking = {
        let (sidecar, ended) = (Arc::clone(&sidecar), Arc::clone(&ended));
        tokio::spawn(async move {
            let mut count = 0;
            while !ended.load(Ordering::Relaxed) {
                let verdict = check(&sidecar, "payments-eu", &key.secret).await;
                assert_eq!(verdict, Verdict::allowed(1), "after {count} checks");
                assert!(sidecar.is_ready().await, "after {count} checks");
                count += 1;
            }
            count
        })
    };
    for number in 0..20 {
        create_key(&control, &format!("k{number}")).await;
    }
    let last = create_key(&control, "last").await;
    passes(&sidecar, "last", &last.secret, AT_ONCE).await;
    ended.store(true, Ordering::Relaxed);
    let count = asking.await.expect("every check is answered");
    assert!(count > 20, "only {count} checks");
    assert_eq!(held(&sidecar).await.len(), 22);
}

#[tokio::test]
async fn the_barrier_waits_for_a_sidecar_that_found_the_keyring() {
    let control = Control::start_brisk("").await;
    let named = start(&control, "edge-1", "{ name: payments }").await;
    let found = start(&control, "edge-2", "{ match: \"*\" }").await;
    let key = create_key(&control, "payments").await;
    named.ready().await;
    found.ready().await;
    // Its process stands still: it answers no check, and confirms nothing.
    found.daemon.process.signal(rustix::process::Signal::STOP);
    let reason = ["--reason", "leaked"];
    let revoke = ["revoke", &key.id, "--all", "--wait", "--timeout", "2s"];
    let output = control.run(&[&revoke[..], &reason].concat()).await;
    assert_eq!(output.status.code(), Some(5), "{}", output.stderr);
    assert!(output.stderr.contains("edge-2"), "{}", output.stderr);
    found.daemon.process.signal(rustix::process::Signal::CONT);
    let output = control.run(&[&revoke[..], &reason].concat()).await;
    assert_eq!(output.status.code(), Some(0), "{}", output.stderr);
    assert!(output.stdout.contains('2'), "{}", output.stdout);
    assert_eq!(
        check(&found, "payments", &key.secret).await,
        Verdict::denied("revoked", 1)
    );

    // Uses of a keyring that was found are reported.
    let usage = control.json(&["usage", &key.id]).await;
    assert_eq!(usage["versions"][0]["state"], "revoked", "{usage}");
    eventually("the denied use is reported", async || {
        let usage = control.json(&["usage", &key.id]).await;
        (usage["versions"][0]["denied"] == 1).then_some(())
    })
    .await;
}
