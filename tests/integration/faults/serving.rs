//! What may still be serving: links that are cut, files that are started from, answers that are late, processes of one name and
//! disks that are full while a command waits for every sidecar.

use std::time::Duration;

use super::{
    disk::LimitedFiles,
    end_control,
    form::{Dice, run, run_each},
    history::{Limits, Moment},
    world::{Plan, World},
};
use crate::support::{eventually::eventually, proxy::Fault};

/// How long a sidecar serves without an answer; many more than a busy machine makes an answer late.
const BOUND: Duration = Duration::from_secs(12);
/// As [`BOUND`], and long enough for a few commands before it is near.
const LONG_BOUND: Duration = Duration::from_secs(20);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_link_is_cut_at_any_moment_of_what_waits() {
    run("28 link cut in waits", bounded(), async |world, dice| {
        for _ in 0..2 {
            let node = dice.roll(world.nodes.len());
            // Half of the cuts end before the bound.
            let cut = world.cut_in(node, dice.millis(0, 300), dice.millis(2_000, 22_000));
            world.a_while(dice.millis(0, 400)).await;
            if dice.roll(2) == 0 {
                // What was left of each bound is left still.
                end_control(world, dice, 0).await;
            }
            wait_for_all(world, dice).await;
            wait_for_all(world, dice).await;
            cut.await.expect("the link is cut and healed");
            world.follows().await;
        }
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_file_is_started_from_while_something_waits() {
    let plan = Plan {
        has_files: true,
        ..bounded()
    };
    run(
        "29 start from a file in waits",
        plan,
        async |world, dice| {
            for is_in_order in [true, false] {
                let node = dice.roll(world.nodes.len());
                if is_in_order {
                    world.nodes[node].stop().await;
                } else {
                    world.nodes[node].kill().await;
                }
                world.injected();
                world.nodes[node].proxy.set(Fault::Cut);
                world.is_cut(node);
                world.nodes[node].restart().await;
                wait_for_all(world, dice).await;
                wait_for_all(world, dice).await;
                world.is_healed(node);
                world.nodes[node].proxy.set(Fault::None);
                world.follows().await;
            }
        },
    )
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn answers_come_late_to_a_process_that_stood_still() {
    run("30 late answers", bounded(), async |world, dice| {
        let node = dice.roll(world.nodes.len());
        world.nodes[node].proxy.set(Fault::HeldBack);
        world.injected();
        world.a_while(dice.millis(1_500, 3_000)).await;
        world.nodes[node].stand_still();
        world.nodes[node].proxy.set(Fault::Late);
        world.is_cut(node);
        let key = dice.roll(world.keys());
        world.revoke_patiently(key).await;
        world.nodes[node].go_on();
        // An answer that counted from its arrival would make it fresh.
        world.a_while(dice.millis(1_000, 3_000)).await;
        world.nodes[node].proxy.cut().await;
        world.is_healed(node);
        world.nodes[node].proxy.set(Fault::None);
        world.follows().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_version_is_used_at_a_sidecar_that_is_cut_off() {
    // Every second world has snapshot files.
    let plan = |seed: u64| Plan {
        has_files: !seed.is_multiple_of(2),
        ..serving_for(Duration::from_secs(40))
    };
    run_each("31 use that nobody sees", plan, async |world, dice| {
        world.retire_when_unused().await;
        let key = dice.roll(world.keys());
        world.rotate(key).await;
        let node = dice.roll(world.nodes.len());
        world.ask_for_old_only_at(key, Some(node));
        let (wait, length) = (dice.millis(0, 1_000), dice.millis(6_000, 14_000));
        let cut = world.cut_in(node, wait, length);
        cut.await.expect("the link is cut and healed");
        world.follows().await;
        world.a_while(dice.millis(2_500, 4_000)).await;
        world.ask_for_old_only_at(key, None);
        world.first_retires(key).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_namesake_goes_on_where_nobody_reaches_it() {
    // Every second world has snapshot files.
    let plan = |seed: u64| Plan {
        sidecars: 2,
        has_files: seed.is_multiple_of(2),
        ..serving_for(LONG_BOUND)
    };
    run_each("32 two processes of one name", plan, async |world, dice| {
        let first = dice.roll(world.nodes.len());
        // The one that is cut off is not the one that came last.
        let cut = world.now();
        world.nodes[first].proxy.cut().await;
        world.is_cut(first);
        world.injected();
        let has_file = dice.roll(2) == 0;
        let second = world.start_namesake(first, has_file).await;
        for both in [first, second] {
            world.owes_allows(both, cut).await;
        }
        wait_for_both(world, dice).await;
        for both in [first, second] {
            world.owes_what_is_gone(both, cut).await;
        }
        world.assert_right();
        world.is_healed(first);
        world.nodes[first].proxy.set(Fault::None);
        world.follows().await;

        // The other way round: who starts in the place of a process that has ended proves that end, and not the namesake's.
        let cut = world.cut_in(second, dice.millis(0, 300), dice.millis(2_000, 12_000));
        world.a_while(dice.millis(0, 400)).await;
        world.nodes[first].kill().await;
        world.injected();
        world.nodes[first].restart().await;
        wait_for_all(world, dice).await;
        wait_for_all(world, dice).await;
        cut.await.expect("the link is cut and healed");
        world.follows().await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_brings_nothing_back_that_is_promised_to_be_gone() {
    let plan = Plan {
        sidecars: 2,
        has_files: true,
        ..serving_for(LONG_BOUND)
    };
    run("33 full disk in waits", plan, async |world, dice| {
        let node = dice.roll(world.nodes.len());
        let disk = fill_disk(world, node).await;
        let room = disk.room_in(Duration::from_millis(dice.millis(0, 1_500)));
        world.revoke_patiently(world.keys() - 1).await;
        wait_for_all(world, dice).await;
        room.await.expect("the disk has room again");
        let now = world.now();
        let begun = start_from_file(world, node, now).await;
        world.owes_what_is_gone(node, begun).await;
        world.is_healed(node);
        world.nodes[node].proxy.set(Fault::None);
        world.follows().await;

        // It stays full: what is promised now is promised of a process that begins with an older state, too.
        let node = dice.roll(world.nodes.len());
        fill_disk(world, node).await;
        let full = world.now();
        let newest = world.keys() - 1;
        let revoked = if dice.roll(2) == 0 {
            world.revoke_impatiently(newest).await
        } else {
            world.rotate(newest).await;
            None
        };
        eventually("nothing more comes to the disk", async || {
            let failing = world.nodes[node].metric("relatch_snapshot_failing").await?;
            (failing == "1").then_some(())
        })
        .await;
        let begun = start_from_file(world, node, full).await;
        if let Some(key) = revoked {
            world.revoke_again(&key).await;
        } else {
            let key = dice.roll(world.keys());
            world.revoke_patiently(key).await;
        }
        world.owes_what_is_gone(node, begun).await;
        world.is_healed(node);
        world.nodes[node].proxy.set(Fault::None);
        world.follows().await;
    })
    .await;
}

/// Has nothing more come to the disk of a sidecar, once that has the newest key.
async fn fill_disk(world: &mut World, node: usize) -> LimitedFiles {
    world.nodes[node].stop().await;
    let disk = world.nodes[node].restart_limited().await;
    world.follows().await;
    world.is_kept().await;
    disk.fill();
    world.injected();
    disk
}

/// Kills a sidecar and starts it from its file where nobody reaches it. Returns when that was, once checks are judged there
/// that have to be allowed. Nothing in the file is newer than `confirmed`.
async fn start_from_file(world: &mut World, node: usize, confirmed: Moment) -> Moment {
    world.nodes[node].kill().await;
    world.nodes[node].proxy.set(Fault::Cut);
    let begun = world.now();
    world.is_cut_with(node, confirmed);
    world.nodes[node].restart().await;
    world.owes_allows(node, begun).await;
    begun
}

/// A revocation and a rotation, in any order, each of which returns once no sidecar serves without it.
async fn wait_for_both(world: &mut World, dice: &mut Dice) {
    let is_first = dice.roll(2) == 0;
    for is_rotation in [is_first, !is_first] {
        while world.keys() < 3 {
            world.issue().await;
        }
        let key = dice.roll(world.keys());
        if is_rotation {
            world.rotate_patiently(key).await;
        } else {
            world.revoke_patiently(key).await;
        }
    }
}

/// A rotation or a revocation, which returns once no sidecar serves without it.
async fn wait_for_all(world: &mut World, dice: &mut Dice) {
    while world.keys() < 3 {
        world.issue().await;
    }
    let key = dice.roll(world.keys());
    match dice.roll(2) {
        0 => world.revoke_patiently(key).await,
        _ => world.rotate_patiently(key).await,
    }
}

fn bounded() -> Plan {
    serving_for(BOUND)
}

/// A world whose sidecars serve for so long without an answer.
fn serving_for(bound: Duration) -> Plan {
    let deny_after = bound.as_secs();
    Plan {
        settings: format!("staleness: {{ warn_after: 5s, deny_after: {deny_after}s }}\n"),
        limits: Limits {
            deny_after: bound,
            // A file says every few seconds how fresh it is, and late answers were true early.
            heartbeat: Duration::from_secs(9),
        },
        ..Plan::default()
    }
}
