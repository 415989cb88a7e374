//! Control planes and sidecars that end, stand still and start again.

use std::time::Duration;

use super::{
    change, end_control, fail_link,
    form::{run, run_each},
    start_alone,
    world::Plan,
};
use crate::support::{envoy::EnvoyVersion, proxy::Fault};

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
