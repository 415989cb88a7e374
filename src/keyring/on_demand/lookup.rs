//! Lookups that are in progress: one for each digest, however many checks wait for it.

use std::{
    collections::{HashMap, VecDeque},
    mem,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use tokio::sync::oneshot;

use super::{CachedKey, Hashing, KeyCache, LookupOutcome, LookupRefusal};
use crate::{
    budget::{Budget, Rate},
    clock::BootTime,
    key::KeyDigest,
};

/// The lookups of one cache. An answered lookup stays until the waiting checks have collected the
/// answer. Until then, the follower keeps the answer as correct as an entry.
#[derive(Debug)]
pub(crate) struct Lookups {
    pub(super) flights: HashMap<KeyDigest, Flight, Hashing>,
    /// The number of checks that wait, in all flights.
    waiting: usize,
    /// The digests that must be sent.
    outbox: VecDeque<KeyDigest>,
    pub(super) budget: Budget,
    /// Whether a stream to a control plane is open.
    is_online: bool,
}

/// The wait of a check for a lookup. The future completes when the lookup is answered; the check
/// then [collects](Self::collect) the answer. Dropping this ends the wait.
#[derive(Debug)]
pub struct Waiting {
    cache: Arc<KeyCache>,
    digest: KeyDigest,
    answered: oneshot::Receiver<()>,
}

/// The result of a lookup.
#[derive(Clone, Debug)]
pub enum Answer {
    /// The version, whatever its state.
    Held(Arc<CachedKey>),
    /// The control plane holds no such key.
    Unknown,
    /// The lookup failed: no answer may be used.
    Failed(Failure),
}

/// Why a lookup failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Failure {
    /// The control plane lags behind what this sidecar has seen.
    Outdated,
    /// The record cannot be read by this version of relatch.
    Unreadable,
    /// The stream ended before the answer.
    Lost,
}

#[derive(Debug)]
pub(super) struct Flight {
    sent_at: BootTime,
    waiting: usize,
    wakers: Vec<oneshot::Sender<()>>,
    answer: Option<Answer>,
    /// Whether a token of the budget is charged for it.
    is_charged: bool,
}

/// The most checks that wait at a time, and the most lookups in progress. With a control plane that
/// answers within 10 ms, this allows 400,000 misses a second. When the control plane does not
/// answer at all, at most this number of checks waits until the deadline.
pub(crate) const MAX_WAITING: usize = 4_096;

impl Lookups {
    pub(super) fn new(rate: Rate) -> Self {
        Self {
            flights: HashMap::default(),
            waiting: 0,
            outbox: VecDeque::new(),
            budget: Budget::new(rate),
            is_online: false,
        }
    }

    /// Joins the lookup of a digest, or begins one. Also returns whether the lookup must be sent.
    fn join(
        &mut self,
        digest: KeyDigest,
        now: BootTime,
        resend_after: Duration,
        is_held: bool,
    ) -> Result<(oneshot::Receiver<()>, bool), LookupRefusal> {
        if !self.is_online {
            return Err(LookupRefusal::Offline);
        }
        if self.waiting >= MAX_WAITING {
            return Err(LookupRefusal::Crowded);
        }
        let (waker, answered) = oneshot::channel();
        let is_sent = self.begin(digest, now, resend_after, is_held)?;
        let Some(flight) = self.flights.get_mut(&digest) else {
            return Err(LookupRefusal::Crowded);
        };
        self.waiting += 1;
        flight.waiting += 1;
        if flight.answer.is_some() {
            // The receiver is still in this function, so sending cannot fail.
            let _ = waker.send(());
        } else {
            flight.wakers.push(waker);
        }
        Ok((answered, is_sent))
    }

    /// Ensures that a digest is being looked up, and returns whether the lookup must be sent. A
    /// lookup without an answer for `resend_after` is sent again. A lookup of a held digest is not
    /// charged to the budget, because its key exists.
    fn begin(
        &mut self,
        digest: KeyDigest,
        now: BootTime,
        resend_after: Duration,
        is_held: bool,
    ) -> Result<bool, LookupRefusal> {
        let is_lost = |flight: &Flight| now.saturating_since(flight.sent_at) >= resend_after;
        match self.flights.get(&digest) {
            Some(flight) if flight.answer.is_some() || !is_lost(flight) => return Ok(false),
            Some(_) => {}
            None if self.flights.len() < MAX_WAITING => {}
            None => {
                self.flights
                    .retain(|_, flight| flight.waiting > 0 || !is_lost(flight));
                if self.flights.len() >= MAX_WAITING {
                    return Err(LookupRefusal::Crowded);
                }
            }
        }
        if !is_held && !self.budget.take(now) {
            return Err(LookupRefusal::OverBudget);
        }
        self.flights
            .entry(digest)
            .and_modify(|flight| {
                flight.sent_at = now;
                flight.is_charged |= !is_held;
            })
            .or_insert_with(|| Flight::new(now, !is_held));
        self.outbox.push_back(digest);
        Ok(true)
    }

    /// Answers a lookup and returns how long it took; none when it is not in progress, or was
    /// answered before.
    fn answer(&mut self, digest: &KeyDigest, answer: Answer, now: BootTime) -> Option<Duration> {
        match &answer {
            // Also where the flight is gone: the token was charged as if the key did not exist.
            Answer::Held(_) => {
                let flight = self.flights.get_mut(digest);
                if flight.is_none_or(|flight| mem::take(&mut flight.is_charged)) {
                    self.budget.refund();
                }
            }
            Answer::Unknown | Answer::Failed(_) => {}
        }
        let flight = self.flights.get_mut(digest)?;
        let took = flight.answer.is_none().then_some(flight.sent_at);
        flight.answer = Some(answer);
        for waker in mem::take(&mut flight.wakers) {
            let _ = waker.send(());
        }
        if flight.waiting == 0 {
            self.flights.remove(digest);
        }
        took.map(|sent_at| now.saturating_since(sent_at))
    }

    /// Replaces the answer of an answered lookup by the one that `answer` returns, if any.
    fn amend(&mut self, digest: &KeyDigest, answer: impl FnOnce(&Answer) -> Option<Answer>) {
        if let Some(flight) = self.flights.get_mut(digest)
            && let Some(held) = &flight.answer
            && let Some(answer) = answer(held)
        {
            flight.answer = Some(answer);
        }
    }

    /// Marks every answer as outdated: it may no longer be used.
    fn outdate(&mut self) {
        for flight in self.flights.values_mut() {
            if flight.answer.is_some() {
                flight.answer = Some(Answer::Failed(Failure::Outdated));
            }
        }
    }

    /// Fails all lookups without an answer, and wakes the checks that wait for them. Their tokens
    /// are refunded. Returns the number of lookups that failed.
    fn lose(&mut self) -> usize {
        self.is_online = false;
        self.outbox.clear();
        let mut lost = 0;
        for flight in self.flights.values_mut() {
            if flight.answer.is_none() {
                lost += 1;
                if mem::take(&mut flight.is_charged) {
                    self.budget.refund();
                }
                flight.answer = Some(Answer::Failed(Failure::Lost));
                for waker in mem::take(&mut flight.wakers) {
                    let _ = waker.send(());
                }
            }
        }
        self.flights.retain(|_, flight| flight.waiting > 0);
        lost
    }

    fn leave(&mut self, digest: &KeyDigest) {
        self.waiting -= 1;
        if let Some(flight) = self.flights.get_mut(digest) {
            flight.waiting -= 1;
            if flight.waiting == 0 && flight.answer.is_some() {
                self.flights.remove(digest);
            }
        }
    }
}

impl Flight {
    const fn new(sent_at: BootTime, is_charged: bool) -> Self {
        Self {
            sent_at,
            waiting: 0,
            wakers: Vec::new(),
            answer: None,
            is_charged,
        }
    }
}

impl KeyCache {
    /// Lets a check wait for the lookup of a digest. The lookup is sent unless it is already in
    /// progress.
    ///
    /// # Errors
    ///
    /// When no stream is open, the budget is spent, or too many checks or lookups wait: see
    /// [`LookupRefusal`].
    pub fn look_up(
        self: &Arc<Self>,
        digest: KeyDigest,
        now: BootTime,
    ) -> Result<Waiting, LookupRefusal> {
        let is_held = self.holds(&digest);
        let joined = self
            .lock_lookups()
            .join(digest, now, self.settings.lookup_timeout, is_held);
        // A check of a held version is not denied for this reason.
        let count = |refusal: &LookupRefusal| {
            if !is_held {
                self.stats.refused(*refusal);
            }
        };
        let (answered, is_sent) = joined.inspect_err(count)?;
        if is_sent {
            self.wake.notify_one();
        }
        Ok(Waiting {
            cache: Arc::clone(self),
            digest,
            answered,
        })
    }

    /// Removes and returns the next digest to send to the control plane.
    pub(crate) fn next_request(&self) -> Option<KeyDigest> {
        self.lock_lookups().outbox.pop_front()
    }

    /// Starts a lookup for which no check waits.
    pub(super) fn refresh(&self, digest: KeyDigest, now: BootTime) {
        let mut lookups = self.lock_lookups();
        let begun = lookups.is_online
            && lookups
                .begin(digest, now, self.settings.lookup_timeout, true)
                .unwrap_or(false);
        drop(lookups);
        if begun {
            self.stats.refreshed();
            self.wake.notify_one();
        }
    }

    pub(super) fn answer(&self, digest: &KeyDigest, answer: Answer, now: BootTime) {
        let outcome = match &answer {
            Answer::Held(_) => LookupOutcome::Found,
            Answer::Unknown => LookupOutcome::Unknown,
            Answer::Failed(Failure::Outdated) => LookupOutcome::Outdated,
            Answer::Failed(Failure::Unreadable) => LookupOutcome::Unreadable,
            Answer::Failed(Failure::Lost) => LookupOutcome::Lost,
        };
        self.stats.answered(outcome, 1);
        let took = self.lock_lookups().answer(digest, answer, now);
        if let Some(took) = took {
            self.stats.took(took);
        }
    }

    pub(super) fn amend(&self, digest: &KeyDigest, answer: impl FnOnce(&Answer) -> Option<Answer>) {
        self.lock_lookups().amend(digest, answer);
    }

    pub(super) fn outdate_answers(&self) {
        self.lock_lookups().outdate();
    }

    pub(super) fn connected(&self) {
        self.lock_lookups().is_online = true;
    }

    pub(super) fn disconnected(&self) {
        let lost = self.lock_lookups().lose();
        self.stats.answered(LookupOutcome::Lost, lost as u64);
    }
}

impl Waiting {
    /// Returns the answer that the lookup holds now; none before it is answered. The answer is as
    /// correct as an entry of the cache at this moment, so the caller must judge it at once.
    #[must_use]
    pub fn collect(&self) -> Option<Answer> {
        let lookups = self.cache.lock_lookups();
        let flight = lookups.flights.get(&self.digest)?;
        flight.answer.clone()
    }

    /// Returns the longest time that a check waits.
    #[must_use]
    pub(crate) fn timeout(&self) -> Duration {
        self.cache.settings.lookup_timeout
    }

    /// Returns the digest that is looked up.
    #[must_use]
    pub const fn digest(&self) -> &KeyDigest {
        &self.digest
    }

    /// Counts a check that waited until its deadline without an answer, unless the version is held.
    pub(crate) fn gave_up(&self) {
        if !self.cache.holds(&self.digest) {
            self.cache.stats.timed_out();
        }
    }
}

impl Future for Waiting {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        // The sender is not dropped before it has sent: a flight stays while a check waits for it.
        Pin::new(&mut self.answered).poll(context).map(drop)
    }
}

impl Drop for Waiting {
    fn drop(&mut self) {
        self.cache.lock_lookups().leave(&self.digest);
    }
}
