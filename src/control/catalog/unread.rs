//! The keyrings of the store that cannot be read.
//!
//! A problem with one keyring concerns that keyring alone: the others are read and served. Until it
//! can be read again, no sidecar receives a confirmation of it, and so each denies its keys at its
//! bound.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use crate::{
    causes,
    clock::BootTime,
    control::journal::LogError,
    key::KeyringName,
    store::{Head, StoreError},
};

/// The keyrings that cannot be read, by name.
#[derive(Debug, Default)]
pub(super) struct Unread(Mutex<BTreeMap<KeyringName, Problem>>);

/// The reason why a keyring cannot be read.
#[derive(Debug)]
struct Problem {
    /// The problem in words, with what to do.
    text: Arc<str>,
    /// The head with which it was found; none if the store has no such log.
    head: Option<Head>,
    /// When its log was last read.
    tried_at: BootTime,
    /// When the problem was last logged.
    logged_at: BootTime,
}

/// How often a log that could not be read is read again. It stays as it is, unless its head moves,
/// and reading a long log takes time.
const TRY_EVERY: Duration = Duration::from_mins(1);
/// How often a problem is logged: it lasts until an operator acts.
const LOG_EVERY: Duration = Duration::from_mins(1);

impl Unread {
    /// Notes that a keyring could not be read.
    pub(super) fn note(
        &self,
        name: &KeyringName,
        head: Option<&Head>,
        error: &LogError,
        now: BootTime,
    ) {
        let text: Arc<str> = causes::in_one_line(error).into();
        let mut problems = self.lock();
        let known = problems.get(name).filter(|known| known.text == text);
        let logged_at = known.map(|known| known.logged_at);
        let is_due = logged_at.is_none_or(|at| now.saturating_since(at) >= LOG_EVERY);
        if is_due {
            tracing::error!(
                auth.keyring = %name,
                auth.keyring.revision = head.map(|head| head.revision.get()),
                error = error as &dyn std::error::Error,
                "the keyring cannot be read from the store: sidecars receive no confirmation of it, and each denies its keys when its grant is over; the other keyrings are served"
            );
        }
        let problem = Problem {
            text,
            head: head.cloned(),
            tried_at: now,
            logged_at: logged_at.filter(|_| !is_due).unwrap_or(now),
        };
        problems.insert(name.clone(), problem);
    }

    /// Notes that a keyring was read.
    pub(super) fn clear(&self, name: &KeyringName) {
        if self.lock().remove(name).is_some() {
            tracing::info!(auth.keyring = %name, "the keyring is read from the store again");
        }
    }

    /// Returns whether a read of the log with this head failed less than [`TRY_EVERY`] ago.
    pub(super) fn is_known(&self, name: &KeyringName, head: &Head, now: BootTime) -> bool {
        self.lock().get(name).is_some_and(|problem| {
            problem.head.as_ref() == Some(head)
                && now.saturating_since(problem.tried_at) < TRY_EVERY
        })
    }

    /// Returns why a keyring cannot be read; none if it can, or does not exist.
    pub(super) fn problem(&self, name: &KeyringName) -> Option<Arc<str>> {
        self.lock()
            .get(name)
            .map(|problem| Arc::clone(&problem.text))
    }

    /// Returns all of them, each with its problem.
    pub(super) fn list(&self) -> Vec<(KeyringName, Arc<str>)> {
        self.lock()
            .iter()
            .map(|(name, problem)| (name.clone(), Arc::clone(&problem.text)))
            .collect()
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<KeyringName, Problem>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns whether an error concerns one log, and not the whole store.
pub(super) fn is_of_one_log(error: &LogError) -> bool {
    match error {
        LogError::Payload { .. }
        | LogError::Apply { .. }
        | LogError::OtherHistory { .. }
        | LogError::Entry(_) => true,
        LogError::Shared(error) => is_of_one_log(error),
        LogError::Store(error) => matches!(
            error,
            StoreError::Corrupt { .. } | StoreError::UnknownLog { .. }
        ),
    }
}
