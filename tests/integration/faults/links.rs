//! Links that fail.

use std::time::Duration;

use super::{change, fail_link, form::run, world::Plan};
use crate::support::proxy::Fault;

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
