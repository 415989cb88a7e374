//! Keys that nobody was ever issued, in numbers.

use std::collections::BTreeMap;

use envoy_types::pb::envoy::service::auth::v3::authorization_client::AuthorizationClient;
use futures_util::future::join_all;
use relatch::key::{KeyId, Prefix, Secret};
use tonic::transport::Channel;

use super::{
    asker::{check_request, outcome},
    change,
    form::{Dice, length, run},
    history::Outcome,
    world::Plan,
};

/// What the keys of a flood look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// As the keyring's own, checksum and all.
    WellFormed,
    /// One character off, of another length, or of another kind.
    Malformed,
}

/// What the checks of a flood came to.
#[derive(Debug, Default)]
pub(super) struct Flooded {
    pub(super) allowed: usize,
    /// By the reason that was given.
    pub(super) denied: BTreeMap<String, usize>,
    /// Without an answer; why, of the last.
    pub(super) failed: usize,
    pub(super) failure: Option<String>,
}

/// Checks under way at once: enough to leave a worker no pause, and far from what a connection bears.
const AT_ONCE: usize = 16;
/// Of each shape, at the least: a build that is not optimized takes seconds for them.
const FLOOD: usize = 4_000;
const FLOOD_AT_ONCE: usize = 1_000;
/// Before the memory is looked at, where there is time for it: more than the 16,384 keys of which it is remembered that
/// they do not exist.
const WARM_UP: usize = 18_000;
/// A few allocations come and go. 80 bytes for each of a hundred thousand keys would be more.
const FLAT: u64 = 8 << 20;
/// Lookups of keys that do not exist.
const UNKNOWN: &str = "relatch_on_demand_lookups_total{keyring=\"payments\",outcome=\"unknown\"}";

/// Asks for `count` keys of a shape.
pub(super) async fn flood(
    client: AuthorizationClient<Channel>,
    shape: Shape,
    count: usize,
    dice: &mut Dice,
) -> Flooded {
    let callers = (0..AT_ONCE).map(|caller| {
        let mut client = client.clone();
        let mut dice = dice.split();
        let part = count / AT_ONCE + usize::from(caller < count % AT_ONCE);
        tokio::spawn(async move {
            let mut flooded = Flooded::default();
            for _ in 0..part {
                let key = shape.key(&mut dice);
                match client.check(check_request(&key)).await {
                    Ok(answer) => flooded.add(outcome(answer.into_inner())),
                    Err(status) => flooded.add(Outcome::Failed(status.to_string())),
                }
            }
            flooded
        })
    });
    let callers: Vec<_> = callers.collect();
    let mut all = Flooded::default();
    for flooded in join_all(callers).await {
        all.merge(flooded.expect("no caller panics"));
    }
    all
}

impl Shape {
    fn key(self, dice: &mut Dice) -> String {
        let id = KeyId::generate().expect("the random source works");
        let key = Secret::generate(&Prefix::default(), id).expect("the random source works");
        let mut key = key.expose().to_owned();
        match self {
            Self::WellFormed => key,
            Self::Malformed => {
                match dice.roll(4) {
                    0 => {
                        let last = key.pop();
                        key.push(if last == Some('0') { '1' } else { '0' });
                    }
                    1 => key.truncate(dice.roll(key.len()).max(1)),
                    2 => key.insert_str(0, "sk_live_"),
                    _ => key.push_str(&"x".repeat(1 + dice.roll(400))),
                }
                key
            }
        }
    }
}

impl Flooded {
    pub(super) fn asked(&self) -> usize {
        self.allowed + self.failed + self.denied.values().sum::<usize>()
    }

    /// Takes note of one.
    pub(super) fn add(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Allowed => self.allowed += 1,
            Outcome::Denied(reason) => *self.denied.entry(reason).or_default() += 1,
            Outcome::Failed(why) => {
                self.failed += 1;
                self.failure = Some(why);
            }
        }
    }

    /// Takes those of another caller, too.
    pub(super) fn merge(&mut self, other: Self) {
        self.allowed += other.allowed;
        self.failed += other.failed;
        self.failure = other.failure.or(self.failure.take());
        for (reason, count) in other.denied {
            *self.denied.entry(reason).or_default() += count;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_that_nobody_was_issued_come_in_great_numbers() {
    let plan = Plan {
        sidecars: 2,
        is_last_on_demand: true,
        ..Plan::default()
    };
    run("12 random keys", plan, async |world, dice| {
        let mut notes = Vec::new();
        for (node, mode) in ["full", "on demand"].into_iter().enumerate() {
            let before = world.now();
            world.a_while(1_000).await;
            let quiet = world.slowest_but_one_in_a_hundred(node, before);
            // Whatever is bounded is filled by that, such as what is known of keys that do not exist.
            for shape in [Shape::WellFormed, Shape::Malformed] {
                let warm_up = if length().is_zero() {
                    FLOOD_AT_ONCE
                } else {
                    WARM_UP
                };
                world.flood(node, shape, warm_up, dice).await;
            }
            let resident = world.nodes[node].sidecar.process.resident();
            let since = world.now();
            let mut asked = 0;
            while asked < 2 * FLOOD || world.now() < since + length() / 2 {
                for shape in [Shape::WellFormed, Shape::Malformed] {
                    world.injected();
                    let lookups = world.nodes[node].count(UNKNOWN).await;
                    let flooded = world.flood(node, shape, FLOOD_AT_ONCE, dice).await;
                    asked += flooded.asked();
                    assert_eq!(flooded.failed, 0, "{flooded:?}");
                    if shape == Shape::Malformed {
                        let reason = flooded.denied.get("malformed_credential");
                        assert_eq!(reason, Some(&FLOOD_AT_ONCE), "{flooded:?}");
                        // Those of the others, whose keys that do not exist are forgotten after a while.
                        let more = world.nodes[node].count(UNKNOWN).await - lookups;
                        assert!(more < 100, "{more} lookups of keys that cannot be");
                    }
                }
                change(world, dice).await;
            }
            let flooded = world.slowest_but_one_in_a_hundred(node, since);
            let now = world.nodes[node].sidecar.process.resident();
            let grown = now.saturating_sub(resident);
            assert!(grown < FLAT, "{mode}: {resident} bytes, {now} after {asked} keys");
            notes.push(format!(
                "{mode}: {asked} keys, {} MiB before and {} MiB after, p99 of valid checks {quiet:?} before and {flooded:?} meanwhile",
                resident >> 20,
                now >> 20,
            ));
        }
        world.note(notes.join("; "));
    })
    .await;
}

mod tests {
    use relatch::key::PresentedKey;

    use super::*;

    #[test]
    fn malformed_keys_are_none_of_the_keyrings() {
        let mut dice = Dice::new(1);
        let is_own = |key: &str| {
            let key = PresentedKey::new(key.as_bytes()).expect("it is printable");
            key.parse(&Prefix::default()).is_ok()
        };
        for _ in 0..200 {
            assert!(is_own(&Shape::WellFormed.key(&mut dice)));
            assert!(!is_own(&Shape::Malformed.key(&mut dice)));
        }
    }
}
