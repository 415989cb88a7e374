//! Policies: a keyring's, and that in which a key departs from it.

use std::time::Duration;

use relatch::{clock::Clock, key::Timestamp};
use serde_json::json;

use super::deployment::{Control, KEYRING};

#[tokio::test]
async fn a_key_departs_from_its_keyring_until_it_inherits_again() {
    let control = Control::start().await;
    let key = control.create_key().await;
    let of_keyring = ["policy", "show", "--keyring", KEYRING];
    let of_key = ["policy", "show", &key.id];
    let fresh = control.json(&of_keyring).await;
    assert_eq!(
        (&fresh["overlap"], &fresh["idle_for"], &fresh["on_deadline"]),
        (&"7d".into(), &"1d".into(), &"hold".into())
    );
    assert_eq!(
        (&fresh["rotate_every"], &fresh["sink"]),
        (&json!(null), &json!(null))
    );

    let set = [
        "policy",
        "set",
        "--keyring",
        KEYRING,
        "--overlap",
        "14d",
        "--on-deadline",
        "extend",
    ];
    let set = control.json(&set).await;
    assert_eq!(
        (&set["overlap"], &set["idle_for"]),
        (&"14d".into(), &"1d".into())
    );
    let own = [
        "policy",
        "set",
        &key.id,
        "--idle-for",
        "3d",
        "--rotate-every",
        "90d",
    ];
    let own = control.json(&own).await;
    assert_eq!(own["overridden"], json!(["rotate_every", "idle_for"]));
    let shown = control.json(&of_key).await;
    assert_eq!(
        (&shown["overlap"], &shown["idle_for"], &shown["on_deadline"]),
        (&"14d".into(), &"3d".into(), &"extend".into())
    );
    let kept = control
        .json(&["policy", "set", &key.id, "--rotate-every", "never"])
        .await;
    assert_eq!(
        (&kept["rotate_every"], &kept["idle_for"]),
        (&json!(null), &"3d".into())
    );
    assert_eq!(control.json(&of_keyring).await["idle_for"], "1d");

    let inherits = control.json(&["policy", "set", &key.id, "--inherit"]).await;
    assert_eq!(inherits["overridden"], json!([]));
    assert_eq!(inherits["idle_for"], "1d");
}

#[tokio::test]
async fn a_policy_that_cannot_be_is_refused_and_changes_nothing() {
    let control = Control::start().await;
    let key = control.create_key().await;
    let before = control.json(&["policy", "show", &key.id]).await;
    for (args, code, said) in [
        (
            &["--keyring", KEYRING, "--idle-for", "8d"][..],
            2,
            "idle_for",
        ),
        (
            &["--keyring", KEYRING, "--rotate-every", "1d"],
            2,
            "overlap",
        ),
        (&[&key.id, "--sink", "vault"], 2, "no sink"),
        (&["--keyring", "partners", "--overlap", "1d"], 3, "partners"),
        (&["000000000000", "--overlap", "1d"], 3, "000000000000"),
    ] {
        let refused = control.run(&[&["policy", "set"], args].concat()).await;
        assert_eq!(
            refused.status.code(),
            Some(code),
            "{args:?}: {}",
            refused.stderr
        );
        assert!(
            refused.stderr.contains(said),
            "{args:?}: {}",
            refused.stderr
        );
    }
    let (_, issuer) = control.create_token("issuer", &[]).await;
    let set = ["policy", "set", &key.id, "--overlap", "10d"];
    let refused = control.plane.cli_as(&issuer, &set).await;
    assert_eq!(refused.status.code(), Some(6), "{}", refused.stderr);
    assert_eq!(control.json(&["policy", "show", &key.id]).await, before);
}

#[tokio::test]
async fn a_rotation_takes_its_overlap_from_the_policy() {
    let control = Control::start().await;
    let key = control.create_key().await;
    let set = [
        "policy",
        "set",
        &key.id,
        "--overlap",
        "100d",
        "--idle-for",
        "1h",
    ];
    control.json(&set).await;
    let clock = Clock::system();
    let overlap = Duration::from_hours(100 * 24);
    let before = clock.wall();

    let done = control.json(&["rotate", "start", &key.id]).await;

    let until = done["old_until"].as_str().expect("the old version ends");
    let until: Timestamp = until.parse().expect("RFC 3339");
    let range = before.saturating_add(overlap)..=clock.wall().saturating_add(overlap);
    assert!(range.contains(&until), "{until} is not in {range:?}");
}
