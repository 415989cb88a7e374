//! The keyrings of the store that cannot be read.
//!
//! What is wrong with one keyring is of that keyring alone: the others are read and served. Until it can be read again,
//! nobody hears that what they hold of it is fresh, so that its sidecars deny its keys at their bound.

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

/// Why a keyring cannot be read.
#[derive(Debug)]
struct Problem {
    /// In words, with what to do.
    text: Arc<str>,
    /// The head with which it was found; none: the store has no such log.
    head: Option<Head>,
    /// When its log was read the last time.
    tried_at: BootTime,
    /// When it was logged the last time.
    logged_at: BootTime,
}

/// A log that could not be read stays as it is, unless its head moves. To read a long one takes its time.
const TRY_EVERY: Duration = Duration::from_mins(1);
/// It lasts until somebody does something about it.
const LOG_EVERY: Duration = Duration::from_mins(1);

impl Unread {
    /// A keyring could not be read.
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

    /// A keyring was read.
    pub(super) fn clear(&self, name: &KeyringName) {
        if self.lock().remove(name).is_some() {
            tracing::info!(auth.keyring = %name, "the keyring is read from the store again");
        }
    }

    /// Whether the log with this head could not be read a moment ago.
    pub(super) fn is_known(&self, name: &KeyringName, head: &Head, now: BootTime) -> bool {
        self.lock().get(name).is_some_and(|problem| {
            problem.head.as_ref() == Some(head)
                && now.saturating_since(problem.tried_at) < TRY_EVERY
        })
    }

    /// Why a keyring cannot be read; none when it can, or does not exist.
    pub(super) fn problem(&self, name: &KeyringName) -> Option<Arc<str>> {
        self.lock()
            .get(name)
            .map(|problem| Arc::clone(&problem.text))
    }

    /// All of them, with what is wrong.
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

/// Whether what is wrong is of one log, and not of the whole store.
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
