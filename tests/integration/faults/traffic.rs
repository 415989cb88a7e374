//! Checks and rotations that come without a pause.

use super::{change, form::run, world::Plan};

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
