//! Calls that hand out a secret, and what to do if an answer is lost.
//!
//! Each call has an idempotency key. If the connection breaks, the command repeats the call: the control plane gives the same
//! answer, with the same secret, and does nothing twice. If no answer arrives, the command reports that the result is not
//! known, and how to ask again.

use std::time::Duration;

use super::{
    Session,
    connection::Admin,
    failure::{Exit, Failure},
};
use crate::key::IdempotencyKey;

/// The flag of a command that hands out a secret.
#[derive(Clone, Debug, Default, clap::Args)]
pub(crate) struct IdempotencyArgs {
    /// Idempotency key: to repeat a call whose answer was lost, run the same command with the same key; it returns the
    /// same secret for ten minutes [default: a new key]
    #[arg(long, value_name = "KEY")]
    idempotency_key: Option<IdempotencyKey>,
}

/// How long a command repeats a call after a lost answer: a control plane restarts within seconds.
const ASK_AGAIN_FOR: Duration = Duration::from_secs(30);
/// The first and the longest wait before a repetition.
const WAIT: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(4));

impl IdempotencyArgs {
    /// Returns the given key, or a new one.
    ///
    /// # Errors
    ///
    /// When the random source of the operating system fails.
    pub(crate) fn key(&self) -> Result<IdempotencyKey, Failure> {
        match &self.idempotency_key {
            Some(key) => Ok(key.clone()),
            None => IdempotencyKey::generate().map_err(Failure::from_error),
        }
    }
}

/// Repeats a call until it is answered. `call` has to use `key`.
///
/// # Errors
///
/// When the control plane cannot be reached, refuses, or does not answer for 30 seconds after an answer was lost.
pub(crate) async fn answered<T>(
    session: &Session,
    key: &IdempotencyKey,
    mut call: impl AsyncFnMut(Admin) -> Result<T, Failure>,
) -> Result<T, Failure> {
    let mut admin = session.admin().await?;
    let mut lost_at = None;
    loop {
        let failure = match call(admin).await {
            Err(failure) if failure.is_answer_lost() => failure,
            // A refusal of this attempt, for example because the token has expired, says nothing about the earlier attempt.
            Err(failure) if failure.is_refused() && lost_at.is_some() => {
                return Err(unanswered(failure.after_lost_answer(), key));
            }
            answered => return answered,
        };
        let since = if let Some(since) = lost_at {
            since
        } else {
            let cause = failure.summary();
            session
                .output
                .note(&format!("no answer ({cause}); retrying"));
            *lost_at.insert(session.boot())
        };
        let mut wait = WAIT.0;
        admin = loop {
            if session.boot().saturating_since(since) >= ASK_AGAIN_FOR {
                return Err(unanswered(failure, key));
            }
            tokio::time::sleep(wait).await;
            wait = WAIT.1.min(2 * wait);
            if let Ok(admin) = session.admin().await {
                break admin;
            }
        };
    }
}

/// The failure if an earlier call with the same key did this, and its secret is forgotten.
#[must_use]
pub(crate) fn forgotten(stands: &str, hint: String) -> Failure {
    Failure::new(
        Exit::SecretForgotten,
        anyhow::anyhow!(
            "{stands} by an earlier call with this idempotency key, and its secret is forgotten"
        ),
    )
    .hint(hint)
}

/// The failure if a secret arrived but could not be shown, with the way to get it again.
#[must_use]
pub(crate) fn not_shown(failure: Failure, key: &IdempotencyKey) -> Failure {
    failure
        .context("received the secret, but could not write it")
        .hint(ask_again(key))
}

/// The failure of a call without an answer, with the way to get the answer.
#[must_use]
pub(crate) fn ask_again(key: &IdempotencyKey) -> String {
    format!(
        "to get the same answer, run the same command with --idempotency-key {key} within ten minutes"
    )
}

fn unanswered(failure: Failure, key: &IdempotencyKey) -> Failure {
    failure
        .context("it is not known whether the control plane executed the call")
        .hint(ask_again(key))
}
