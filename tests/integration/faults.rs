//! Faults, one scenario for each: what was done and seen is recorded, and every check is judged by it.
//!
//! Each runs once, in seconds, among the other tests. `scripts/faults.sh` runs them for longer and prints what they came to.

use std::time::Duration;

use rustix::process::Signal;

use flood::Shape;
use form::{Dice, length, run, run_each};
use history::Limits;
use proxy::Fault;
use world::{Plan, World};

use crate::support::{envoy::EnvoyVersion, eventually::eventually};

mod asker;
mod consumer;
mod disk;
mod fleet;
mod flood;
mod form;
mod history;
mod node;
mod proxy;
mod record;
mod world;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_control_plane_is_killed_frozen_and_restarted() {
    run(
        "1 control plane killed, frozen, restarted",
        Plan::default(),
        async |world, dice| {
            for ending in 0..3 {
                change(world, dice).await;
                end_control(world, dice, ending).await;
                change(world, dice).await;
                world.follows().await;
            }
        },
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_that_is_dead_without_a_word_is_found_out() {
    run("2 link half-open", Plan::default(), async |world, dice| {
        let node = dice.roll(world.nodes.len());
        world.nodes[node].proxy.set(Fault::HalfOpen);
        world.injected();
        world.a_while(50).await;
        // Whatever connects anew gets through.
        world.nodes[node].proxy.set(Fault::None);
        let key = dice.roll(world.keys());
        world.revoke(key).await;
        world.follows().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_is_reset_slow_late_and_flapping() {
    run(
        "2 link reset, 1 KB/s, late, flapping",
        Plan::default(),
        async |world, dice| {
            let faults = [
                Fault::ResetAfter(dice.roll(3_000)),
                Fault::Throttled(1_024),
                Fault::Delayed(Duration::from_millis(dice.millis(20, 300))),
            ];
            for fault in faults {
                let node = dice.roll(world.nodes.len());
                fail_link(world, dice, node, fault).await;
            }
            for _ in 0..6 {
                let node = dice.roll(world.nodes.len());
                world.nodes[node].proxy.set(Fault::Cut);
                world.injected();
                world.a_while(dice.millis(10, 200)).await;
                world.nodes[node].proxy.set(Fault::None);
                change(world, dice).await;
            }
        },
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sidecar_starts_without_a_control_plane() {
    run(
        "3 cold start without control plane",
        Plan::default(),
        async |world, dice| {
            let node = dice.roll(world.nodes.len());
            world.nodes[node].kill().await;
            start_alone(world, node, 300).await;
            world.follows().await;
        },
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sidecar_that_is_killed_in_a_storm_starts_from_its_file() {
    let plan = Plan {
        has_files: true,
        ..Plan::default()
    };
    run(
        "3 cold start with a snapshot file",
        plan,
        async |world, dice| {
            for _ in 0..4 {
                let node = dice.roll(world.nodes.len());
                let moment = Duration::from_millis(dice.millis(0, 600));
                let kill = world.nodes[node].kill_in(moment);
                while !kill.is_finished() {
                    // Rotations would wait for the sidecar that is about to be killed.
                    match dice.roll(3) {
                        0 if world.keys() > 2 => {
                            let key = dice.roll(world.keys());
                            world.revoke(key).await;
                        }
                        _ => world.issue().await,
                    }
                }
                kill.await.expect("it was there to be killed");
                change(world, dice).await;
                start_alone(world, node, 300).await;
                change(world, dice).await;
                world.follows().await;
            }
        },
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_keyring_that_nobody_confirms_is_denied_from_its_limit_on() {
    run("4 staleness limit", soon_stale(), async |world, dice| {
        let node = dice.roll(world.nodes.len());
        world.nodes[node].proxy.set(Fault::Cut);
        world.is_cut(node);
        world.injected();
        change(world, dice).await;
        world.a_while(8_000).await;
        assert_eq!(world.nodes[node].health().await, (503, 200));
        world.is_healed(node);
        world.nodes[node].proxy.set(Fault::None);
        world.follows().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_control_plane_that_cannot_read_its_store_confirms_nothing() {
    let row = "6 control plane cut off from its store";
    run(row, soon_stale(), async |world, dice| {
        // It is gone, as with a volume that is gone, or something else is in its place.
        let instead = [None, Some(&b"not a database"[..])];
        world.take_store(instead[dice.roll(2)]);
        change(world, dice).await;
        // Who comes now is told what the control plane has in memory, and how old that is.
        world.a_while(dice.millis(0, 3_000)).await;
        let node = dice.roll(world.nodes.len());
        world.nodes[node].kill().await;
        world.nodes[node].restart().await;
        for node in &world.nodes {
            eventually("it is too old, and the link is whole", async || {
                let status = node.status().await;
                let age = status["keyrings"][0]["age_ms"].as_u64()?;
                let is_connected = status["control"][0]["connected"] == true;
                (age > 9_500 && is_connected).then_some(())
            })
            .await;
            assert_eq!(node.health().await, (503, 200));
        }
        world.give_store_back();
        world.follows().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_cannot_sync_is_told_of_and_never_lied_about() {
    let plan = Plan {
        has_files: true,
        ..Plan::default()
    };
    run("9 errors of fsync", plan, async |world, dice| {
        let node = dice.roll(world.nodes.len());
        // An append fails, and the file that is written in its place, or the rename of that.
        let whole = 3 + dice.roll(2);
        let disk = world.nodes[node].failing_syncs(&format!("{whole}..{whole}"), "2..2");
        world.nodes[node].stop().await;
        world.nodes[node].restart_on(&disk).await;
        world.injected();
        eventually(
            "both have failed, and the file is written again",
            async || {
                world.issue().await;
                let node = &world.nodes[node];
                let is_well = node.metric("relatch_snapshot_failing").await? == "0";
                let is_told = node.logged("is written again") > 0;
                (disk.failed() == 2 && is_well && is_told).then_some(())
            },
        )
        .await;
        world.follows().await;
        world.is_kept().await;

        // From some time on nothing comes to the disk any more, and then the process ends.
        let first = 2 + dice.roll(3);
        let disk = world.nodes[node].failing_syncs("3+", &format!("{first}+"));
        world.nodes[node].kill().await;
        world.nodes[node].restart_on(&disk).await;
        world.injected();
        fails_to_keep(world, node).await;
        for _ in 0..4 {
            change(world, dice).await;
        }
        assert!(!world.is_kept_by(node), "no sync has succeeded since");
        world.nodes[node].kill().await;
        start_alone(world, node, 300).await;
        assert_eq!(
            world.nodes[node].logged("keyring taken from the snapshot file"),
            1
        );
        world.follows().await;
        world.is_kept().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_that_nobody_was_issued_come_in_great_numbers() {
    let plan = Plan {
        sidecars: 2,
        is_last_on_demand: true,
        ..Plan::default()
    };
    run("12 random keys", plan, async |world, dice| {
        let mut notes = Vec::new();
        for (node, mode) in ["full", "on demand"].into_iter().enumerate() {
            let before = world.now();
            world.a_while(1_000).await;
            let quiet = world.slowest_but_one_in_a_hundred(node, before);
            // Whatever is bounded is filled by that, such as what is known of keys that do not exist.
            for shape in [Shape::WellFormed, Shape::Malformed] {
                let warm_up = if length().is_zero() {
                    FLOOD_AT_ONCE
                } else {
                    WARM_UP
                };
                world.flood(node, shape, warm_up, dice).await;
            }
            let resident = world.nodes[node].sidecar.process.resident();
            let since = world.now();
            let mut asked = 0;
            while asked < 2 * FLOOD || world.now() - since < length() / 2 {
                for shape in [Shape::WellFormed, Shape::Malformed] {
                    world.injected();
                    let lookups = world.nodes[node].count(UNKNOWN).await;
                    let flooded = world.flood(node, shape, FLOOD_AT_ONCE, dice).await;
                    asked += flooded.asked();
                    assert_eq!(flooded.failed, 0, "{flooded:?}");
                    if shape == Shape::Malformed {
                        let reason = flooded.denied.get("malformed_credential");
                        assert_eq!(reason, Some(&FLOOD_AT_ONCE), "{flooded:?}");
                        // Those of the others, whose keys that do not exist are forgotten after a while.
                        let more = world.nodes[node].count(UNKNOWN).await - lookups;
                        assert!(more < 100, "{more} lookups of keys that cannot be");
                    }
                }
                change(world, dice).await;
            }
            let flooded = world.slowest_but_one_in_a_hundred(node, since);
            let now = world.nodes[node].sidecar.process.resident();
            let grown = now.saturating_sub(resident);
            assert!(grown < FLAT, "{mode}: {resident} bytes, {now} after {asked} keys");
            notes.push(format!(
                "{mode}: {asked} keys, {} MiB before and {} MiB after, p99 of valid checks {quiet:?} before and {flooded:?} meanwhile",
                resident >> 20,
                now >> 20,
            ));
        }
        world.note(notes.join("; "));
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_second_check_is_given_up_at_its_deadline() {
    run(
        "18 every second check given up",
        Plan::default(),
        async |world, dice| {
            for _ in 0..3 {
                let node = dice.roll(world.nodes.len());
                world.injected();
                world.give_up_every_second(node, 20).await;
                change(world, dice).await;
            }
        },
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_are_rotated_again_and_again() {
    run(
        "27 rotations v1 to v4 under load",
        Plan::default(),
        async |world, dice| {
            for _ in 0..3 {
                for key in 0..2 {
                    world.rotate(key).await;
                    world.injected();
                    world.a_while(dice.millis(20, 100)).await;
                    world.retire(key).await;
                }
            }
        },
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_through_envoy_are_decided_as_checks_are() {
    let plan = |seed: u64| Plan {
        sidecars: 1,
        has_files: true,
        envoy: Some(EnvoyVersion::ALL[usize::from(!seed.is_multiple_of(2))]),
        ..Plan::default()
    };
    run_each("1, 3, 22 through Envoy", plan, async |world, dice| {
        for round in 0..6 {
            change(world, dice).await;
            match round % 3 {
                0 => {
                    let ending = dice.roll(3);
                    end_control(world, dice, ending).await;
                }
                1 => {
                    world.nodes[0].stop().await;
                    world.injected();
                    world.nodes[0].restart().await;
                }
                _ => {
                    world.nodes[0].kill().await;
                    let moment = dice.millis(20, 300);
                    start_alone(world, 0, moment).await;
                }
            }
            change(world, dice).await;
            world.a_while(dice.millis(50, 300)).await;
        }
        world.follows().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_thing_happens_after_the_other() {
    // Every second world has snapshot files.
    let plan = |seed: u64| Plan {
        has_files: !seed.is_multiple_of(2),
        ..Plan::default()
    };
    run_each("1, 2, 3, 22 in any order", plan, async |world, dice| {
        for _ in 0..8 {
            let node = dice.roll(world.nodes.len());
            match dice.roll(8) {
                0 => {
                    let ending = dice.roll(3);
                    end_control(world, dice, ending).await;
                }
                1 => fail_link(world, dice, node, Fault::Cut).await,
                2 => {
                    let after = dice.roll(2_000);
                    fail_link(world, dice, node, Fault::ResetAfter(after)).await;
                }
                3 => fail_link(world, dice, node, Fault::Throttled(1_024)).await,
                4 => {
                    world.nodes[node].kill().await;
                    world.injected();
                    change(world, dice).await;
                    world.nodes[node].restart().await;
                }
                5 => {
                    world.nodes[node].kill().await;
                    start_alone(world, node, dice.millis(20, 300)).await;
                }
                6 => {
                    world.nodes[node].stop().await;
                    world.injected();
                    world.nodes[node].restart().await;
                }
                _ => {
                    world.injected();
                    let pause = Duration::from_millis(dice.millis(50, 800));
                    world.nodes[node].freeze(pause).await;
                }
            }
            change(world, dice).await;
        }
    })
    .await;
}

/// Of each shape, at the least: a build that is not optimized takes seconds for them.
const FLOOD: usize = 4_000;
const FLOOD_AT_ONCE: usize = 1_000;
/// Before the memory is looked at, where there is time for it: more than the 16,384 keys of which it is remembered that
/// they do not exist.
const WARM_UP: usize = 18_000;
/// A few allocations come and go. 80 bytes for each of a hundred thousand keys would be more.
const FLAT: u64 = 8 << 20;
/// Lookups of keys that do not exist.
const UNKNOWN: &str = "relatch_on_demand_lookups_total{keyring=\"payments\",outcome=\"unknown\"}";

/// A world whose keyrings are too old within seconds.
fn soon_stale() -> Plan {
    Plan {
        settings: "staleness: { warn_after: 2s, deny_after: 6s }\n".to_owned(),
        limits: Limits {
            deny_after: Duration::from_secs(6),
            ..Limits::default()
        },
        ..Plan::default()
    }
}

/// One change or another.
async fn change(world: &mut World, dice: &mut Dice) {
    let key = dice.roll(world.keys());
    match dice.roll(4) {
        0 if world.keys() > 2 => world.revoke(key).await,
        1 => world.rotate(key).await,
        2 => world.retire(key).await,
        _ => world.issue().await,
    }
}

/// Lets a link fail for a moment in which things change.
async fn fail_link(world: &mut World, dice: &mut Dice, node: usize, fault: Fault) {
    world.nodes[node].proxy.set(fault);
    world.injected();
    for _ in 0..2 {
        change(world, dice).await;
        world.a_while(dice.millis(20, 250)).await;
    }
    world.nodes[node].proxy.set(Fault::None);
}

/// Makes keys until the sidecar says that it cannot keep them: the alarm is there, the log has it once, and checks go on.
async fn fails_to_keep(world: &mut World, node: usize) {
    let mut problem = None;
    while problem.is_none() {
        world.issue().await;
        let status = world.nodes[node].status().await;
        problem = status["snapshot"]["problem"].as_str().map(str::to_owned);
    }
    // The newest by now, whatever came to the disk before.
    world.issue().await;
    let problem = problem.unwrap_or_default();
    assert!(problem.contains("Input/output error"), "{problem}");
    let failing = world.nodes[node].metric("relatch_snapshot_failing").await;
    assert_eq!(failing.as_deref(), Some("1"));
    assert!(!world.is_kept_by(node), "the newest key is on no disk");
    assert_eq!(world.nodes[node].health().await, (200, 200));
    eventually("it is logged", async || {
        let logged = world.nodes[node].logged("the snapshot file cannot be written");
        assert!(logged <= 1, "it is logged once");
        (logged == 1).then_some(())
    })
    .await;
}

/// Starts a sidecar after its end where it reaches nobody for a while: it has what its file has, if it has one.
async fn start_alone(world: &mut World, node: usize, millis: u64) {
    world.nodes[node].proxy.set(Fault::Cut);
    world.injected();
    world.nodes[node].restart().await;
    if world.has_files() {
        world.nodes[node].until_ready().await;
    }
    world.a_while(millis).await;
    let ready = if world.has_files() { 200 } else { 503 };
    assert_eq!(world.nodes[node].health().await, (ready, 200));
    world.nodes[node].proxy.set(Fault::None);
}

/// Ends the control plane, or lets it stand still, and brings it back.
async fn end_control(world: &mut World, dice: &mut Dice, ending: usize) {
    world.injected();
    let signal = [Signal::KILL, Signal::TERM, Signal::STOP][ending];
    world.control.process.signal(signal);
    if signal == Signal::STOP {
        world.a_while(dice.millis(100, 900)).await;
        world.control.process.signal(Signal::CONT);
    } else {
        world.a_while(dice.millis(0, 400)).await;
        world.control.restart().await;
    }
}
