//! A keyring that a sidecar holds on demand: keys are looked up, follow their changes, and go on without a control plane.

use std::time::Duration;

use relatch::{
    clock::{BootTime, Clock},
    key::{KeyId, Prefix, Secret},
};

use super::deployment::{Control, IssuedKey, KEYRING, Sidecar, Verdict};
use crate::support::{eventually::eventually, relatch::sidecar_yaml};

/// A cache that waits for lookups as long as it may: on a busy machine none is given up.
const PATIENT: &str = "{ lookup_timeout: 10s }";

/// A sidecar that holds [`KEYRING`] on demand, with the settings `cache`.
async fn start(control: &Control, node: &str, cache: &str) -> Sidecar {
    let yaml = sidecar_yaml(node, control.plane.discovery(), &[KEYRING]);
    let full = format!("{{ name: {KEYRING} }}");
    let on_demand = format!("{{ name: {KEYRING}, mode: on_demand, cache: {cache} }}");
    assert!(yaml.contains(&full), "{yaml}");
    let sidecar = Sidecar::with_config(&yaml.replace(&full, &on_demand)).await;
    sidecar.ready().await;
    sidecar
}

/// A series of its metrics.
async fn metric(sidecar: &Sidecar, series: &str) -> u64 {
    let page = sidecar.daemon.get("/metrics").await;
    let page = page.text();
    let line = page.lines().find_map(|line| line.strip_prefix(series));
    let value = line.unwrap_or_else(|| panic!("no {series} in {page}"));
    value.trim().parse().expect("a whole number")
}

async fn lookups(sidecar: &Sidecar, outcome: &str) -> u64 {
    let labels = format!("{{keyring=\"{KEYRING}\",outcome=\"{outcome}\"}}");
    metric(sidecar, &format!("relatch_on_demand_lookups_total{labels}")).await
}

/// What the control plane counted.
async fn asked(control: &Control, outcome: &str) -> u64 {
    let label = format!("outcome=\"{outcome}\"");
    let count = control.metric("relatch_lookups_total", &[&label]).await;
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "counts are whole numbers"
    )]
    let count = count.expect("it is counted") as u64;
    count
}

/// Nobody's key, which looks like one of the keyring's.
fn nobodys_key() -> String {
    let key_id = KeyId::generate().expect("the random source works");
    let secret = Secret::generate(&Prefix::default(), key_id);
    let secret = secret.expect("the random source works");
    secret.expose().to_owned()
}

fn now() -> BootTime {
    Clock::system().boot()
}

fn unavailable() -> Verdict {
    Verdict {
        allowed: false,
        reason: "keyring_unavailable".to_owned(),
        version: None,
    }
}

fn unknown() -> Verdict {
    Verdict {
        reason: "unknown_key".to_owned(),
        ..unavailable()
    }
}

#[tokio::test]
async fn a_key_is_looked_up_once_and_follows_its_changes() {
    let control = Control::start().await;
    let old = control.create_key().await;
    let other = control.create_key().await;
    let sidecar = start(&control, "edge-1", PATIENT).await;
    for _ in 0..3 {
        assert_eq!(sidecar.check(&old.secret).await, Verdict::allowed(1));
    }
    assert_eq!(lookups(&sidecar, "found").await, 1);
    let wrong = nobodys_key();
    for _ in 0..3 {
        assert_eq!(sidecar.check(&wrong).await, unknown());
    }
    assert_eq!(lookups(&sidecar, "unknown").await, 1);
    assert_eq!(asked(&control, "found").await, 1);
    assert_eq!(asked(&control, "unknown").await, 1);

    // The barrier counts it like any other sidecar.
    let rotated = control.json(&["rotate", "start", &old.id]).await;
    assert_eq!(rotated["total"], 1, "{rotated}");
    let new = IssuedKey::from_json(&rotated);
    assert_eq!(sidecar.check(&new.secret).await, Verdict::allowed(2));
    assert_eq!(sidecar.check(&old.secret).await, Verdict::allowed(1));
    for (key, version) in [(&new, "2"), (&other, "1")] {
        let id = key.id.as_str();
        let why = ["--reason", "leaked", "--wait"];
        control
            .json(&[&["revoke", id, "--version", version], &why[..]].concat())
            .await;
    }
    // One was held, the other one never was.
    let held = sidecar.check(&new.secret).await;
    assert_eq!(held, Verdict::denied("revoked", 2));
    let looked_up = sidecar.check(&other.secret).await;
    assert_eq!(looked_up, Verdict::denied("revoked", 1));

    let used = eventually("the sidecar has told of all requests", async || {
        let usage = control.json(&["usage", &old.id]).await;
        (usage["versions"][0]["requests"].as_u64()? == 4).then_some(usage)
    });
    used.await;
    let status = eventually("the cache has counted its entries", async || {
        let status = sidecar.keyring().await;
        (status["cache"]["entries"].as_u64()? == 3).then_some(status)
    })
    .await;
    assert_eq!(status["mode"], "on_demand", "{status}");
    assert_eq!(status["keys"], serde_json::Value::Null, "{status}");
    // The new version came with the rotation.
    assert_eq!(lookups(&sidecar, "found").await, 2);
    let log = sidecar.stopped().await;
    assert_eq!(log.count("snapshot applied"), 0, "{log}");
}

#[tokio::test]
async fn without_a_control_plane_held_keys_go_on_and_others_are_denied() {
    let mut control = Control::start().await;
    let held = control.create_key().await;
    let other = control.create_key().await;
    let sidecar = start(&control, "edge-1", PATIENT).await;
    assert_eq!(sidecar.check(&held.secret).await, Verdict::allowed(1));

    control.plane.kill().await;
    eventually("the sidecar knows that it is alone", async || {
        let began = now();
        let verdict = sidecar.check(&other.secret).await;
        assert_eq!(verdict, unavailable());
        // At once, rather than after the time for a lookup.
        (now().saturating_since(began) < Duration::from_secs(5)).then_some(())
    })
    .await;
    assert_eq!(sidecar.check(&held.secret).await, Verdict::allowed(1));

    control.plane.restart().await;
    let allowed = eventually("keys are looked up again", async || {
        let verdict = sidecar.check(&other.secret).await;
        (verdict != unavailable()).then_some(verdict)
    });
    assert_eq!(allowed.await, Verdict::allowed(1));
    assert_eq!(sidecar.check(&held.secret).await, Verdict::allowed(1));
    let revoke = ["revoke", &held.id, "--all", "--reason", "leaked", "--wait"];
    control.json(&revoke).await;
    let verdict = sidecar.check(&held.secret).await;
    assert_eq!(verdict, Verdict::denied("revoked", 1));
}

/// Whichever version of the key it has been asked for, and whether that was before the rotation or after it.
#[tokio::test]
async fn a_sidecar_that_is_cut_off_knows_all_versions_of_the_keys_that_it_holds() {
    let mut control = Control::start().await;
    let old = control.create_key().await;
    let before = start(&control, "edge-1", PATIENT).await;
    let after = start(&control, "edge-2", PATIENT).await;
    assert_eq!(before.check(&old.secret).await, Verdict::allowed(1));
    let rotated = control.json(&["rotate", "start", &old.id]).await;
    assert_eq!(rotated["total"], 2, "{rotated}");
    let new = IssuedKey::from_json(&rotated);
    assert_eq!(after.check(&new.secret).await, Verdict::allowed(2));

    control.plane.kill().await;
    for sidecar in [&before, &after] {
        assert_eq!(sidecar.check(&new.secret).await, Verdict::allowed(2));
        assert_eq!(sidecar.check(&old.secret).await, Verdict::allowed(1));
        assert_eq!(lookups(sidecar, "found").await, 1);
    }
}

#[tokio::test]
async fn a_flood_of_unknown_keys_costs_the_control_plane_the_budget_and_no_more() {
    const BURST: u64 = 20;
    let control = Control::start().await;
    let key = control.create_key().await;
    let budget = "{ lookup_timeout: 10s, unknown_per_second: 1, unknown_burst: 20 }";
    let sidecar = start(&control, "edge-1", budget).await;
    let began = now();
    assert_eq!(sidecar.check(&key.secret).await, Verdict::allowed(1));
    let mut told = [0, 0];
    for _ in 0..500 {
        let verdict = sidecar.check(&nobodys_key()).await;
        if verdict == unknown() {
            told[0] += 1;
        } else {
            assert_eq!(verdict, unavailable());
            told[1] += 1;
        }
    }
    let seconds = now().saturating_since(began).as_secs();
    assert_eq!(sidecar.check(&key.secret).await, Verdict::allowed(1));
    let most = BURST + seconds + 2;
    let asked = asked(&control, "unknown").await;
    assert!((BURST..=most).contains(&asked), "{asked} of {most}");
    assert_eq!(lookups(&sidecar, "unknown").await, told[0]);
    let labels = format!("{{keyring=\"{KEYRING}\",cause=\"over_budget\"}}");
    let denied = metric(
        &sidecar,
        &format!("relatch_on_demand_denials_total{labels}"),
    )
    .await;
    assert_eq!(denied, told[1]);
    assert_eq!(told[0] + told[1], 500);
}
