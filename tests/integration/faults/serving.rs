//! What may still be serving: links that are cut, files that are started from and answers that are late while a command waits
//! for every sidecar.

use std::time::Duration;

use super::{
    end_control,
    form::{Dice, run, run_each},
    history::Limits,
    world::{Plan, World},
};
use crate::support::proxy::Fault;

/// How long a sidecar serves without an answer; many more than a busy machine makes an answer late.
const BOUND: Duration = Duration::from_secs(12);

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
