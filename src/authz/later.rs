//! Checks that are answered later: the one place where a check waits, for the lookup of its key.

use std::{panic::AssertUnwindSafe, pin::Pin};

use bytes::{Bytes, BytesMut};
use futures_util::FutureExt as _;
use tokio::time::{Instant, timeout_at};

use super::{
    decision::{Denial, LookedUp},
    service::{Authorizer, Missing, Moment},
};
use crate::{
    keyring::on_demand::{Answer, Waiting},
    trace::TraceParent,
};

/// A serialized `CheckResponse` that is not known yet. Dropping it takes the check back.
pub(crate) type LaterAnswer = Pin<Box<dyn Future<Output = Bytes> + Send>>;

impl Authorizer {
    /// Answers a check when the lookup of its key was answered, or its time is over.
    pub(super) fn answer_later(
        self,
        message: Bytes,
        parent: Option<TraceParent>,
        moment: Moment,
        waiting: Waiting,
    ) -> LaterAnswer {
        Box::pin(async move {
            let answered = self.look_up(&message, parent, moment, waiting);
            match AssertUnwindSafe(answered).catch_unwind().await {
                Ok(answer) => answer,
                Err(_panic) => {
                    let mut answer = BytesMut::new();
                    self.refuse(Denial::internal(), None, parent, moment, &mut answer);
                    answer.freeze()
                }
            }
        })
    }

    /// Waits for the lookup, and for another one where the key may be under another pepper, and judges what they came to.
    async fn look_up(
        &self,
        message: &[u8],
        parent: Option<TraceParent>,
        began: Moment,
        waiting: Waiting,
    ) -> Bytes {
        let deadline = Instant::now() + waiting.timeout();
        let mut looked_up = LookedUp::default();
        let mut waiting = Some(waiting);
        loop {
            if let Some(mut waiting) = waiting.take() {
                let is_in_time = timeout_at(deadline, &mut waiting).await.is_ok();
                match waiting.collect() {
                    Some(Answer::Held(cached)) => looked_up.found(cached),
                    Some(Answer::Unknown) => looked_up.found_none(*waiting.digest()),
                    Some(Answer::Failed(_)) => looked_up.failed(),
                    None => {
                        if !is_in_time {
                            waiting.gave_up();
                        }
                        looked_up.failed();
                    }
                }
            }
            let moment = self.now().of(began);
            let mut answer = BytesMut::new();
            let missing = self.answer_by(parent, moment, &mut answer, |answer| {
                self.judge(message, parent, moment, &looked_up, answer)
            });
            let Some(Missing { cache, digest }) = missing else {
                return answer.freeze();
            };
            match cache.look_up(digest, moment.judged_at()) {
                Ok(next) => waiting = Some(next),
                Err(_refused) => looked_up.failed(),
            }
        }
    }
}

#[cfg(test)]
mod tests;
