//! Calls that hand out a secret. Each is carried out once, however often it is repeated.
//!
//! An answer can get lost on its way, and with it the only copy of a secret. A call with an
//! [`IdempotencyKey`] can therefore be repeated: for ten minutes the same actor gets the same
//! answer, with the secret, which is held in memory only and wiped after that time. Calls with the
//! same key wait for each other. A call that failed before it handed out a secret is carried out
//! anew.
//!
//! After the answer is forgotten, the object that the call has created is found by its id, which is
//! derived from the key.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use prost::Message;
use tokio::sync::OwnedMutexGuard;
use zeroize::Zeroizing;

use super::{rotation::HandedOver, token::AdminCaller};
use crate::{
    clock::{BootTime, Clock},
    key::{
        IdempotencyKey, KeyId, MasterPepper, Pepper, RandomError, Revision, Secret, VersionRef,
        WebhookId,
    },
    serving::Barrier,
};

/// The calls of the last ten minutes.
#[derive(Debug)]
pub(crate) struct Calls {
    /// The key of the HMAC for ids and for the digests of arguments.
    pepper: Pepper,
    clock: Clock,
    remembered: Mutex<HashMap<IdempotencyKey, Call>>,
}

/// The identity of a call. Only an equal call gets its answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CallIdentity {
    key: IdempotencyKey,
    actor: String,
    method: &'static str,
    arguments: [u8; 32],
}

/// A call that was made, or is under way.
#[derive(Debug)]
struct Call {
    identity: CallIdentity,
    /// Locked while the call is carried out.
    outcome: Arc<tokio::sync::Mutex<CallOutcome>>,
}

/// The outcome of a call so far.
#[derive(Debug, Default)]
struct CallOutcome {
    kept: Option<Kept>,
    /// The last id under which the call was carried out without handing out an answer.
    given_up: Option<KeyId>,
    /// The time at which the call is forgotten.
    until: BootTime,
}

/// An answer that can be returned again.
#[derive(Debug)]
pub(crate) enum Kept {
    /// The answer with a key that was created or imported.
    Key(KeptKey),
    /// The answer with the new version of a rotation.
    Rotation(Arc<HandedOver>),
    /// The answer with an admin token.
    Token(KeyId, Secret),
    /// The answer with a webhook, whose secret is derived from its id.
    Webhook(WebhookId),
}

/// A key as its creator receives it.
#[derive(Debug)]
pub(crate) struct KeptKey {
    /// The first version of the key.
    pub(crate) version: VersionRef,
    /// The secret; none for an imported key, because its owner knows it.
    pub(crate) secret: Option<Secret>,
    /// The revision of the key's creation.
    pub(crate) revision: Revision,
    /// The sidecars that accept the key, if the caller waited for them.
    pub(crate) barrier: Option<Barrier>,
}

/// The right to carry out a call, or to return its answer again. No equal call is carried out while
/// it is held.
#[derive(Debug)]
pub(crate) struct Turn<'a> {
    calls: &'a Calls,
    /// None for a call without an idempotency key.
    repeatable: Option<(CallIdentity, OwnedMutexGuard<CallOutcome>)>,
}

/// The id under which a call is to be carried out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum CallId {
    /// The call has created nothing.
    New(KeyId),
    /// The call has created this, and its answer is forgotten.
    Used(KeyId),
}

/// An idempotency key belongs to another call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "another call has used it, with other arguments or with another token; use a new key for each call"
)]
pub(crate) struct ReusedError;

/// How long an answer can be returned again: long enough for a person to read an error and to
/// repeat the command, and no longer than needed, because no secret should stay anywhere.
pub(crate) const KEPT_FOR: Duration = Duration::from_mins(10);
/// The most calls that are remembered, some hundred bytes each. A script that creates more keys
/// within ten minutes can still repeat its newest calls.
const MAX_CALLS: usize = 10_000;
/// The most attempts under one key that may fail. A caller that needs more has to use another key.
const MAX_ATTEMPTS: u32 = 1_000;

impl Calls {
    /// Returns a memory without calls.
    pub(crate) fn new(pepper: &MasterPepper, clock: Clock) -> Self {
        Self {
            pepper: pepper.for_idempotency(),
            clock,
            remembered: Mutex::default(),
        }
    }

    /// Returns the identity of a call with an idempotency key.
    pub(crate) fn identify(
        &self,
        key: IdempotencyKey,
        caller: &AdminCaller,
        method: &'static str,
        request: &impl Message,
    ) -> CallIdentity {
        // The request may contain a secret to import.
        let arguments = Zeroizing::new(request.encode_to_vec());
        CallIdentity {
            key,
            actor: caller.actor.clone(),
            method,
            arguments: self.pepper.mac(&[&arguments]),
        }
    }

    /// Waits until no equal call is under way. A call without an identity does not wait.
    ///
    /// # Errors
    ///
    /// When the idempotency key belongs to another call.
    pub(crate) async fn turn(
        &self,
        identity: Option<CallIdentity>,
    ) -> Result<Turn<'_>, ReusedError> {
        let repeatable = match identity {
            None => None,
            Some(identity) => {
                let outcome = self.outcome_of(&identity)?;
                Some((identity, outcome.lock_owned().await))
            }
        };
        Ok(Turn {
            calls: self,
            repeatable,
        })
    }

    /// Forgets the calls whose ten minutes are over, and wipes their secrets.
    pub(crate) fn forget(&self) {
        let now = self.clock.boot();
        self.lock().retain(|_, call| !call.is_over(now));
    }

    fn outcome_of(
        &self,
        identity: &CallIdentity,
    ) -> Result<Arc<tokio::sync::Mutex<CallOutcome>>, ReusedError> {
        let now = self.clock.boot();
        let mut calls = self.lock();
        if let Some(call) = calls.get(&identity.key)
            && !call.is_over(now)
        {
            return if call.identity == *identity {
                Ok(Arc::clone(&call.outcome))
            } else {
                Err(ReusedError)
            };
        }
        if calls.len() >= MAX_CALLS {
            forget_oldest(&mut calls);
        }
        let call = Call {
            identity: identity.clone(),
            outcome: Arc::new(tokio::sync::Mutex::new(CallOutcome {
                until: now.saturating_add(KEPT_FOR),
                ..CallOutcome::default()
            })),
        };
        let outcome = Arc::clone(&call.outcome);
        calls.insert(identity.key.clone(), call);
        Ok(outcome)
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<IdempotencyKey, Call>> {
        self.remembered
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Turn<'_> {
    /// Returns the answer that was given before.
    pub(crate) fn kept(&self) -> Option<&Kept> {
        self.repeatable.as_ref()?.1.kept.as_ref()
    }

    /// Returns the id under which the call is carried out; `exists` says which ids exist already.
    ///
    /// # Errors
    ///
    /// When the operating system's random source fails.
    pub(crate) fn id(&self, exists: impl Fn(KeyId) -> bool) -> Result<CallId, RandomError> {
        let Some((identity, outcome)) = &self.repeatable else {
            return KeyId::generate().map(CallId::New);
        };
        let mut last = None;
        for attempt in 0..MAX_ATTEMPTS {
            let CallIdentity {
                key, actor, method, ..
            } = identity;
            let id = key.id(&self.calls.pepper, actor, method, attempt);
            if !exists(id) {
                return Ok(match last {
                    Some(last) if outcome.given_up != Some(last) => CallId::Used(last),
                    Some(_) | None => CallId::New(id),
                });
            }
            last = Some(id);
        }
        last.map_or_else(
            || KeyId::generate().map(CallId::New),
            |last| Ok(CallId::Used(last)),
        )
    }

    /// Keeps the answer for repetitions of the call.
    pub(crate) fn keep(&mut self, kept: Kept) {
        if let Some((_, outcome)) = &mut self.repeatable {
            outcome.kept = Some(kept);
        }
    }

    /// Notes that nothing was handed out for the object with `id`, so that an equal call is carried
    /// out anew.
    pub(crate) fn give_up(&mut self, id: KeyId) {
        if let Some((_, outcome)) = &mut self.repeatable {
            outcome.given_up = Some(id);
        }
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        if let Some((_, outcome)) = &mut self.repeatable {
            outcome.until = self.calls.clock.boot().saturating_add(KEPT_FOR);
        }
    }
}

impl Call {
    /// Returns whether the call is neither under way nor to be remembered.
    fn is_over(&self, now: BootTime) -> bool {
        self.outcome
            .try_lock()
            .is_ok_and(|outcome| outcome.until <= now)
    }
}

/// Makes room: removes the call that would be forgotten first, but none that is under way.
fn forget_oldest(calls: &mut HashMap<IdempotencyKey, Call>) {
    let ended = calls.iter().filter_map(|(key, call)| {
        let outcome = call.outcome.try_lock().ok()?;
        Some((outcome.until, key.clone()))
    });
    if let Some((_, oldest)) = ended.min_by_key(|(until, _)| *until) {
        calls.remove(&oldest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        clock::ManualClock,
        control::token::Role,
        key::{PepperId, Timestamp},
        proto::admin::CreateTokenRequest,
    };

    fn calls() -> (Calls, ManualClock) {
        let (clock, hands) = Clock::manual(Timestamp::from_millis(1_800_000_000_000));
        let pepper = MasterPepper::new(PepperId::new(1), &[7; 32]).expect("32 bytes");
        (Calls::new(&pepper, clock), hands)
    }

    fn identity(calls: &Calls, actor: &str, name: &str) -> CallIdentity {
        let caller = AdminCaller {
            actor: actor.to_owned(),
            role: Role::Admin,
        };
        let request = CreateTokenRequest {
            name: name.to_owned(),
            ..CreateTokenRequest::default()
        };
        let key = "once".parse().expect("an idempotency key");
        calls.identify(key, &caller, "CreateToken", &request)
    }

    async fn turn<'a>(calls: &'a Calls, actor: &str, name: &str) -> Turn<'a> {
        let turn = calls.turn(Some(identity(calls, actor, name))).await;
        turn.expect("the same call")
    }

    fn token() -> Kept {
        let id = KeyId::generate().expect("random");
        let prefix = "rlat".parse().expect("a prefix");
        Kept::Token(id, Secret::generate(&prefix, id).expect("random"))
    }

    fn secret(turn: &Turn<'_>) -> Option<String> {
        match turn.kept() {
            Some(Kept::Token(_, secret)) => Some(secret.expose().to_owned()),
            Some(Kept::Key(_) | Kept::Rotation(_) | Kept::Webhook(_)) | None => None,
        }
    }

    #[tokio::test]
    async fn the_same_call_gets_the_same_secret_for_ten_minutes() {
        let (calls, hands) = calls();
        let mut first = turn(&calls, "alice", "ci").await;
        assert_eq!(secret(&first), None);
        first.keep(token());
        let answered = secret(&first);
        drop(first);

        hands.advance(KEPT_FOR.saturating_sub(Duration::from_millis(1)));
        calls.forget();
        let again = turn(&calls, "alice", "ci").await;
        assert!(answered.is_some());
        assert_eq!(secret(&again), answered);
        drop(again);
        hands.advance(KEPT_FOR);
        assert_eq!(secret(&turn(&calls, "alice", "ci").await), None);
    }

    #[tokio::test]
    async fn a_secret_is_forgotten_though_nobody_asks_again() {
        let (calls, hands) = calls();
        turn(&calls, "alice", "ci").await.keep(token());
        hands.advance(KEPT_FOR);
        calls.forget();
        assert!(calls.lock().is_empty());
    }

    #[tokio::test]
    async fn another_actor_and_other_arguments_are_refused() {
        let (calls, _) = calls();
        turn(&calls, "alice", "ci").await.keep(token());
        for (actor, name) in [("mallory", "ci"), ("alice", "cd")] {
            let other = calls.turn(Some(identity(&calls, actor, name))).await;
            assert_eq!(other.map(drop), Err(ReusedError), "{actor} {name}");
        }
    }

    #[tokio::test]
    async fn equal_calls_wait_for_each_other() {
        let (calls, _) = calls();
        let mut first = turn(&calls, "alice", "ci").await;
        let second = calls.turn(Some(identity(&calls, "alice", "ci")));
        tokio::pin!(second);
        let early = tokio::time::timeout(Duration::from_millis(1), &mut second).await;
        assert!(early.is_err(), "the first is under way");
        // One that is under way is not forgotten.
        calls.forget();
        first.keep(token());
        let answered = secret(&first);
        drop(first);
        let second = second.await.expect("the same call");
        assert_eq!(secret(&second), answered);
    }

    #[tokio::test]
    async fn what_was_given_up_is_carried_out_anew_and_what_is_forgotten_is_not() {
        let (calls, hands) = calls();
        let new = |turn: &Turn<'_>, existing: &[KeyId]| {
            turn.id(|id| existing.contains(&id)).expect("an id")
        };
        let mut first = turn(&calls, "alice", "ci").await;
        let CallId::New(one) = new(&first, &[]) else {
            panic!("nothing exists");
        };
        first.give_up(one);
        drop(first);

        let second = turn(&calls, "alice", "ci").await;
        let CallId::New(two) = new(&second, &[one]) else {
            panic!("the first was given up");
        };
        assert_ne!(one, two);
        drop(second);
        // As after a restart, or ten minutes later: the last id that exists is that of the object
        // that the call has created.
        hands.advance(KEPT_FOR);
        calls.forget();
        let later = turn(&calls, "alice", "ci").await;
        assert_eq!(new(&later, &[one, two]), CallId::Used(two));
        assert_eq!(new(&later, &[]), CallId::New(one));
    }

    #[tokio::test]
    async fn calls_without_a_key_are_all_new() {
        let (calls, _) = calls();
        let mut first = calls.turn(None).await.expect("a turn");
        first.keep(token());
        assert!(calls.turn(None).await.expect("a turn").kept().is_none());
        let ids = [(); 2].map(|()| first.id(|_| true).expect("random"));
        assert_ne!(ids[0], ids[1]);
        assert!(calls.lock().is_empty());
    }

    #[tokio::test]
    async fn the_oldest_call_makes_room() {
        let (calls, hands) = calls();
        let call = async |number: usize| {
            let mut identity = identity(&calls, "alice", "ci");
            identity.key = number.to_string().parse().expect("an idempotency key");
            calls
                .turn(Some(identity))
                .await
                .expect("a turn")
                .keep(token());
        };
        call(0).await;
        hands.advance(Duration::from_secs(1));
        for number in 1..=MAX_CALLS {
            call(number).await;
        }
        let held = calls.lock();
        assert_eq!(held.len(), MAX_CALLS);
        assert!(!held.contains_key(&"0".parse().expect("an idempotency key")));
    }
}
