//! Checks that are answered later. Only this module lets a check wait: for the lookup of its key.

use std::{panic::AssertUnwindSafe, pin::Pin, time::Duration};

use bytes::{Bytes, BytesMut};
use futures_util::FutureExt as _;
use tokio::time::{Instant, timeout_at};

use super::{check::Check, judge::Judge};
use crate::keyring::on_demand::{Answer, Waiting};

/// A serialized `CheckResponse` that is not known yet. Dropping it cancels the check.
pub(crate) type LaterAnswer = Pin<Box<dyn Future<Output = Bytes> + Send>>;

/// Answers a check as soon as the lookup of its key is answered, or when `lookup_timeout` is over.
/// A panic becomes a denial.
pub(super) fn answer_later(
    judge: Judge,
    mut check: Check<'static>,
    waiting: Waiting,
) -> LaterAnswer {
    Box::pin(async move {
        let answered = AssertUnwindSafe(look_up(&judge, &mut check, waiting));
        match answered.catch_unwind().await {
            Ok(answer) => answer,
            Err(_panic) => {
                let mut answer = BytesMut::new();
                judge.deny_internal(&check, &mut answer);
                answer.freeze()
            }
        }
    })
}

/// Waits for the lookup, and then judges the check. If the key may be under another pepper, it
/// waits for another lookup, within the same deadline. The deadline is the one of lookups, or the
/// one of Envoy if that is earlier.
async fn look_up(judge: &Judge, check: &mut Check<'_>, waiting: Waiting) -> Bytes {
    let patience = check.metadata.patience().unwrap_or(Duration::MAX);
    let deadline = Instant::now() + waiting.timeout().min(patience);
    let mut waiting = Some(waiting);
    loop {
        if let Some(mut waiting) = waiting.take() {
            let is_in_time = timeout_at(deadline, &mut waiting).await.is_ok();
            match waiting.collect() {
                Some(Answer::Held(cached)) => check.looked_up.found(cached),
                Some(Answer::Unknown) => check.looked_up.found_none(*waiting.digest()),
                Some(Answer::Failed(_)) => check.looked_up.failed(),
                None => {
                    if !is_in_time {
                        waiting.gave_up();
                    }
                    check.looked_up.failed();
                }
            }
        }
        check.moment = judge.now();
        let mut answer = BytesMut::new();
        let Some(missing) = judge.answer(check, &mut answer) else {
            return answer.freeze();
        };
        match missing.look_up(check.moment) {
            Ok(next) => waiting = Some(next),
            Err(_refused) => check.looked_up.failed(),
        }
    }
}

#[cfg(test)]
mod tests;
