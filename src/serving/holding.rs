//! The keyring that a run holds, and until when it may serve it.

use std::time::Duration;

use super::{HeldState, Now, Progress, Target};
use crate::{
    clock::BootTime,
    key::{Epoch, Revision},
};

/// The keyring that a run holds.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Holding {
    /// The state that the run has confirmed.
    pub progress: Progress,
    /// The bound: the run may serve until then without another answer; none when it was never
    /// granted anything.
    pub(super) until: Option<BootTime>,
    /// The largest grant that may not have expired. It is on record.
    pub(super) granted: Duration,
    /// Whether the run subscribes to the keyring and receives it: an open stream may extend its
    /// time.
    pub(super) is_followed: bool,
    /// Whether the keyring is held on demand, so that no file contains it.
    pub(super) is_on_demand: bool,
    /// For a keyring on demand, the bound of a state in the file that was written while the keyring
    /// was held in full: that state may be served until then.
    pub(super) in_file_until: Option<BootTime>,
}

impl Holding {
    /// Records that a stream begins on which the keyring is followed.
    pub(super) fn greet(&mut self, held: &HeldState, max_serve_for: Duration, now: Now) {
        let full = held.deny_after.min(max_serve_for);
        self.progress.greet(held, now.wall);
        self.is_followed = true;
        if held.is_on_demand && !self.is_on_demand {
            self.in_file_until = self.until;
        }
        self.is_on_demand = held.is_on_demand;
        if held.revision > Revision::default() {
            // It is unknown which control plane granted the state that it serves.
            self.suppose(full, now.boot);
        }
        self.granted = self.granted.max(full);
    }

    /// Grants `serve_for` with the answer to a beat that arrived at `arrived`. Returns whether the
    /// grant is on record.
    pub(super) fn grant(&mut self, serve_for: Duration, arrived: BootTime) -> bool {
        let bound = arrived.saturating_add(stretched(serve_for));
        let on_record = serve_for <= self.granted;
        if !on_record || self.until.is_none_or(|until| until <= bound) {
            // The larger grant before it has expired by then.
            self.granted = serve_for;
        }
        self.until = self.until.max(Some(bound));
        on_record
    }

    /// Assumes that the run may serve for `serve_for` from `now` on.
    pub(super) fn suppose(&mut self, serve_for: Duration, now: BootTime) {
        self.granted = self.granted.max(serve_for);
        self.until = self
            .until
            .max(Some(now.saturating_add(stretched(serve_for))));
    }

    /// Adds the grant and the bound of another run, whose keyring this run holds now.
    pub(super) fn inherit(&mut self, other: &Self) {
        self.granted = self.granted.max(other.granted);
        self.until = self.until.max(other.until);
    }

    /// Returns whether a snapshot file of the run may contain the keyring.
    pub(super) fn may_be_in_file(&self, now: BootTime) -> bool {
        !self.is_on_demand || self.in_file_until.is_some_and(|until| now < until)
    }

    pub(super) fn is_within(&self, now: BootTime) -> bool {
        self.until.is_some_and(|until| now < until)
    }

    pub(super) fn has_reached(&self, epoch: Epoch, target: Target, has_file: bool) -> bool {
        self.progress.has_reached(epoch, target, has_file)
    }

    /// Returns how long the run may serve without another answer, from `now` on.
    #[must_use]
    pub(crate) fn rest(&self, now: BootTime) -> Duration {
        self.until
            .map_or(Duration::ZERO, |until| until.saturating_since(now))
    }
}

/// Returns a time that another boot clock measures, which may be slower by 1 %; plus 1 ms for
/// rounding.
pub(super) fn stretched(time: Duration) -> Duration {
    time.saturating_add(time / 100)
        .saturating_add(Duration::from_millis(1))
}
