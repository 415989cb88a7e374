//! Faults, one scenario for each: what was done and seen is recorded, and every check is judged by it.
//!
//! Each runs once, in seconds, among the other tests. `scripts/faults.sh` runs them for longer and prints what they came to.

use std::time::Duration;

use rustix::process::Signal;

use form::{Dice, run, run_each};
use history::Limits;
use proxy::Fault;
use world::{Plan, World};

mod asker;
mod fleet;
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
    let plan = Plan {
        settings: "staleness: { warn_after: 2s, deny_after: 6s }\n".to_owned(),
        limits: Limits {
            deny_after: Duration::from_secs(6),
            ..Limits::default()
        },
        ..Plan::default()
    };
    run("4 staleness limit", plan, async |world, dice| {
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
