//! Faults, one scenario for each: what was done and seen is recorded, and every check is judged by it.
//!
//! Each runs once, in seconds, among the other tests. `scripts/faults.sh` runs them for longer and prints what they came to.
//!
//! The scenarios are in `processes`, `links`, `staleness`, `serving`, `disk`, `flood`, `overload` and `traffic`; [`form::run`] plays them in a
//! [`World`], whose [`record`] is judged by its [`history`].

use rustix::process::Signal;

use form::Dice;
use world::World;

use crate::support::proxy::Fault;

mod asker;
mod consumer;
mod disk;
mod fleet;
mod flood;
mod form;
mod history;
mod key;
mod links;
mod node;
mod overload;
mod processes;
mod record;
mod serving;
mod slow;
mod staleness;
mod traffic;
mod world;

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
