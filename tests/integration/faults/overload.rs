//! More checks at once than a sidecar can answer.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use envoy_types::pb::envoy::service::auth::v3::authorization_client::AuthorizationClient;
use tokio::task::JoinSet;
use tonic::transport::Channel;

use super::{
    asker::{check_request, checks, outcome},
    change,
    flood::Flooded,
    form::run,
    history::Outcome,
    world::Plan,
};
use crate::support::envoy::AuthzAddress;

/// Callers that ask a sidecar without a pause until they are told to stop.
#[derive(Debug)]
struct Overload {
    callers: JoinSet<Flooded>,
    stop: Arc<AtomicBool>,
}

/// Connections, and calls under way on each: a sidecar that answers one after the other is always asked for more.
const CONNECTIONS: usize = 16;
const CALLS: usize = 32;
/// How long what arrives waited for its worker, all together.
const DELAYS: &str = "relatch_worker_delay_seconds_sum";

impl Overload {
    /// Has them present `secret`.
    fn begin(address: &AuthzAddress, secret: &str) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let mut callers = JoinSet::new();
        for _ in 0..CONNECTIONS {
            let client = checks(address);
            for _ in 0..CALLS {
                callers.spawn(call(client.clone(), secret.to_owned(), Arc::clone(&stop)));
            }
        }
        Self { callers, stop }
    }

    /// What they were answered.
    async fn end(self) -> Flooded {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Flooded::default();
        for answered in self.callers.join_all().await {
            all.merge(answered);
        }
        all
    }
}

async fn call(
    mut client: AuthorizationClient<Channel>,
    secret: String,
    stop: Arc<AtomicBool>,
) -> Flooded {
    let mut answered = Flooded::default();
    while !stop.load(Ordering::Relaxed) {
        let answer = client.check(check_request(&secret)).await;
        answered.add(match answer {
            Ok(response) => outcome(response.into_inner()),
            Err(status) => Outcome::Failed(status.to_string()),
        });
    }
    answered
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn more_is_asked_than_can_be_answered() {
    run(
        "19 more checks than can be answered",
        Plan::default(),
        async |world, dice| {
            let node = dice.roll(world.nodes.len());
            let before = world.now();
            world.a_while(500).await;
            let quiet = world.slowest_but_one_in_a_hundred(node, before);
            let delays = world.nodes[node].seconds(DELAYS).await;

            let since = world.now();
            world.injected();
            let nobodys = world.record.secrets()[0].clone();
            let address = world.nodes[node].address().borrow().clone();
            let overload = Overload::begin(&address, &nobodys);
            for _ in 0..4 {
                change(world, dice).await;
                world.a_while(dice.millis(100, 400)).await;
            }
            let answered = overload.end().await;
            assert_eq!((answered.allowed, answered.failed), (0, 0), "{answered:?}");
            let loaded = world.slowest_but_one_in_a_hundred(node, since);
            let waited = world.nodes[node].seconds(DELAYS).await - delays;
            world.note(format!(
                "{} checks beside; p99 of valid checks {quiet:?} before and {loaded:?} meanwhile; timers late by {waited:.3} s in all",
                answered.asked(),
            ));
        },
    )
    .await;
}
