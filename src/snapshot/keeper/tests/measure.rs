//! What keeping a file costs: run it with `--ignored --nocapture`, on the disk that `TMPDIR` is on.

use super::*;

/// The newest revision that is on the disk, once it is `revision` or a later one.
async fn until_durable(disk: &Disk, revision: Revision) {
    while disk.durable(&testing::keyring_name()).revision < revision {
        disk.news().notified().await;
    }
}

fn quantile(times: &mut [Duration], of_hundred: usize) -> Duration {
    times.sort_unstable();
    times[(times.len() - 1) * of_hundred / 100]
}

#[tokio::test]
#[ignore = "it measures, and takes a minute"]
async fn what_a_change_costs_on_the_disk() {
    const ALONE: usize = 300;
    const BURST: usize = 20_000;
    let mut machine = Machine::new();
    machine.clock = Clock::system();
    let mut control = Control::new();
    let mut sidecar = machine.start();
    sidecar.keeper.patience.gather = GATHER;
    sidecar.keeper.patience.idle = PULSE_EVERY;
    sidecar.take(control.begin());
    let disk = Arc::clone(&sidecar.keeper.disk);
    let stop = CancellationToken::new();
    let Sidecar {
        keyrings,
        mut receiver,
        keeper,
        ..
    } = sidecar;
    let keeping = tokio::spawn(keeper.run(stop.clone()));
    let slot = keyrings.get(&testing::keyring_name());
    let slot = slot.expect("it is configured");
    let mut take = |messages: Vec<Kind>| {
        for kind in messages {
            let message = discovery::ControlMessage { kind: Some(kind) };
            receiver.receive(message).expect("the stream goes on");
        }
        slot.load().as_ref().expect("it is here").revision()
    };
    until_durable(&disk, Revision::new(1)).await;
    for (what, state) in [
        ("a change", KeyState::Active),
        ("a revocation", KeyState::Revoked),
    ] {
        let (before, mut times) = (disk.health(), Vec::new());
        for number in 0..ALONE {
            let number = u8::try_from(number % 200).expect("it is small");
            let began = machine.clock.boot();
            let revision = take(control.act(Act::Put(number, state)));
            until_durable(&disk, revision).await;
            times.push(machine.clock.boot().saturating_since(began));
        }
        let after = disk.health();
        let bytes = (after.size - before.size) / ALONE as u64;
        let (p50, p99) = (quantile(&mut times, 50), quantile(&mut times, 99));
        println!("{what} alone: {bytes} bytes, on the disk after {p50:?} (p50), {p99:?} (p99)");
    }
    let (before, began) = (disk.health(), machine.clock.boot());
    let mut revision = Revision::default();
    for number in 0..BURST {
        let number = u8::try_from(number % 200).expect("it is small");
        revision = take(control.act(Act::Put(number, KeyState::Active)));
        tokio::task::yield_now().await;
    }
    let applied = machine.clock.boot().saturating_since(began);
    until_durable(&disk, revision).await;
    let durable = machine.clock.boot().saturating_since(began);
    let after = disk.health();
    println!(
        "a burst of {BURST} changes: {} writes, each with a sync, applied after {applied:?}, on the disk after {durable:?}",
        after.written - before.written,
    );
    stop.cancel();
    let kept = keeping.await.expect("it does not panic");
    kept.expect("it ends in order");
}
