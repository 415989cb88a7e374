//! Keyrings that nobody confirms: because the link is cut, or because the control plane cannot read its store.

use std::time::Duration;

use super::{
    change,
    form::{run, run_each},
    history::Limits,
    world::Plan,
};
use crate::support::{eventually::eventually, proxy::Fault};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_keyring_that_nobody_confirms_is_denied_from_its_limit_on() {
    // Every second world has snapshot files.
    let plan = |seed: u64| Plan {
        has_files: !seed.is_multiple_of(2),
        ..soon_stale()
    };
    run_each("4 staleness limit", plan, async |world, dice| {
        let node = dice.roll(world.nodes.len());
        world.nodes[node].proxy.cut().await;
        world.is_cut(node);
        let cut = world.now();
        world.injected();
        change(world, dice).await;
        // What comes from a file is as old as it was.
        world.a_while(dice.millis(0, 14_000)).await;
        world.nodes[node].kill().await;
        world.nodes[node].restart().await;
        world.until(cut + Duration::from_secs(15)).await;
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
        world.a_while(dice.millis(0, 3_000)).await;
        let begun = dice.roll(world.nodes.len());
        world.nodes[begun].kill().await;
        world.nodes[begun].restart().await;
        for (number, node) in world.nodes.iter().enumerate() {
            eventually("it is too old, and the link is whole", async || {
                let status = node.status().await;
                let age = status["keyrings"][0]["age_ms"].as_u64();
                // A process that begins now is confirmed nothing.
                let is_over = age.map_or(number == begun, |age| age > 13_500);
                is_over.then_some(())
            })
            .await;
            assert_eq!(node.health().await, (503, 200));
        }
        world.give_store_back();
        world.follows().await;
    })
    .await;
}

/// A world whose keyrings are too old within seconds: many more than a busy machine makes a confirmation late.
fn soon_stale() -> Plan {
    Plan {
        settings: "staleness: { warn_after: 3s, deny_after: 12s }\n".to_owned(),
        limits: Limits {
            deny_after: Duration::from_secs(12),
            // A file says every 3 s how fresh it is.
            heartbeat: Duration::from_secs(10),
        },
        ..Plan::default()
    }
}
