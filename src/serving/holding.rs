//! What a run holds of a keyring, and until when it may serve it.

use std::time::Duration;

use super::{Held, Now, Progress, Target};
use crate::{
    clock::BootTime,
    key::{Epoch, Revision},
};

/// What a run holds of a keyring.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holding {
    /// What it has confirmed.
    pub progress: Progress,
    /// It may serve until then without another answer; none when it was never granted anything.
    pub(super) until: Option<BootTime>,
    /// The largest grant that may not have run out. It is on record.
    pub(super) granted: Duration,
    /// The run asks for it, and gets it: an open stream may extend its time.
    pub(super) is_followed: bool,
    /// It is held on demand, so that no file holds it,
    pub(super) is_on_demand: bool,
    /// but for what a former run, which held it in full, may have left there: that serves until then.
    pub(super) in_file_until: Option<BootTime>,
}

impl Holding {
    /// A stream begins on which it is followed.
    pub(super) fn greet(&mut self, held: &Held, max_serve_for: Duration, now: Now) {
        let full = held.deny_after.min(max_serve_for);
        self.progress.greet(held, now.wall);
        self.is_followed = true;
        if held.is_on_demand && !self.is_on_demand {
            self.in_file_until = self.until;
        }
        self.is_on_demand = held.is_on_demand;
        if held.revision > Revision::default() {
            // Nobody knows who has granted what it serves.
            self.suppose(full, now.boot);
        }
        self.granted = self.granted.max(full);
    }

    /// An answer to a beat that arrived at `arrived` lets the run serve for `serve_for`; whether that is on record.
    pub(super) fn grant(&mut self, serve_for: Duration, arrived: BootTime) -> bool {
        let bound = arrived.saturating_add(stretched(serve_for));
        let on_record = serve_for <= self.granted;
        if !on_record || self.until.is_none_or(|until| until <= bound) {
            // The larger grant before it has run out by then.
            self.granted = serve_for;
        }
        self.until = self.until.max(Some(bound));
        on_record
    }

    /// The run may serve for `serve_for` from `now` on, as far as is known.
    pub(super) fn suppose(&mut self, serve_for: Duration, now: BootTime) {
        self.granted = self.granted.max(serve_for);
        self.until = self
            .until
            .max(Some(now.saturating_add(stretched(serve_for))));
    }

    /// What another run held is what this one holds.
    pub(super) fn inherit(&mut self, other: &Self) {
        self.granted = self.granted.max(other.granted);
        self.until = self.until.max(other.until);
    }

    /// Whether a snapshot file of the run may hold it.
    pub(super) fn may_be_in_file(&self, now: BootTime) -> bool {
        !self.is_on_demand || self.in_file_until.is_some_and(|until| now < until)
    }

    pub(super) fn is_within(&self, now: BootTime) -> bool {
        self.until.is_some_and(|until| now < until)
    }

    pub(super) fn has_reached(&self, epoch: Epoch, target: Target, has_file: bool) -> bool {
        self.progress.has_reached(epoch, target, has_file)
    }

    /// How long the run may serve without another answer, from `now` on.
    #[must_use]
    pub(crate) fn rest(&self, now: BootTime) -> Duration {
        self.until
            .map_or(Duration::ZERO, |until| until.saturating_since(now))
    }
}

/// A time by another boot clock, which may be slower by 1 %.
pub(super) fn stretched(time: Duration) -> Duration {
    time.saturating_add(time / 100)
        .saturating_add(Duration::from_millis(1))
}
