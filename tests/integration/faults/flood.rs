//! Keys that nobody was ever issued, in numbers.

use std::collections::BTreeMap;

use envoy_types::pb::envoy::service::auth::v3::authorization_client::AuthorizationClient;
use futures_util::future::join_all;
use relatch::key::{KeyId, Prefix, Secret};
use tonic::transport::Channel;

use super::{
    asker::{check_request, outcome},
    form::Dice,
    history::Outcome,
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
        let share = count / AT_ONCE + usize::from(caller < count % AT_ONCE);
        tokio::spawn(async move {
            let mut flooded = Flooded::default();
            for _ in 0..share {
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

    fn add(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Allowed => self.allowed += 1,
            Outcome::Denied(reason) => *self.denied.entry(reason).or_default() += 1,
            Outcome::Failed(why) => {
                self.failed += 1;
                self.failure = Some(why);
            }
        }
    }

    fn merge(&mut self, other: Self) {
        self.allowed += other.allowed;
        self.failed += other.failed;
        self.failure = other.failure.or(self.failure.take());
        for (reason, count) in other.denied {
            *self.denied.entry(reason).or_default() += count;
        }
    }
}

#[test]
fn malformed_keys_are_none_of_the_keyrings() {
    use relatch::key::PresentedKey;

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
