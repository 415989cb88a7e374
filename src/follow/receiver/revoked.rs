//! The revision up to which a sidecar can confirm that every revocation is in force.

use crate::key::Revision;

/// The revision up to which every revocation of a keyring's history is in use for checks.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct RevokedThrough {
    through: Revision,
    /// The range that the lane has brought beyond `through`: every revocation after the first
    /// revision, up to the second. Revisions between `through` and the first are missing.
    ahead: Option<(Revision, Revision)>,
    /// The newest revision with a revocation that could not be read. Until a whole state at or
    /// after it is in use, deltas and the lane do not raise `through`.
    refused: Option<Revision>,
}

impl RevokedThrough {
    pub(super) const fn get(self) -> Revision {
        self.through
    }

    /// Notes that the whole state at `revision` is in use: no version that was revoked up to there
    /// is accepted. If it is of another history, nothing else is known any more.
    pub(super) fn replaced(&mut self, revision: Revision, is_same_history: bool) {
        if !is_same_history {
            *self = Self::default();
        }
        self.refused = self.refused.filter(|refused| *refused > revision);
        self.raise(revision);
    }

    /// Notes that a delta that leads to `revision` is in use, with all its revocations.
    pub(super) fn applied(&mut self, revision: Revision) {
        if self.refused.is_none() {
            self.raise(revision);
        }
    }

    /// Notes that every revocation after `after`, up to `revision`, is in use.
    pub(super) fn overtaken(&mut self, after: Revision, revision: Revision) {
        if self.refused.is_some() {
            return;
        }
        self.ahead = match self.ahead {
            // The earlier range reaches up to this one.
            Some((first, last)) if last >= after => Some((first.min(after), last.max(revision))),
            Some(_) | None => Some((after, revision)),
        };
        self.raise(Revision::default());
    }

    /// Notes that a revocation at `revision` could not be read.
    pub(super) fn refused(&mut self, revision: Revision) {
        if revision > self.through {
            self.refused = self.refused.max(Some(revision));
        }
    }

    fn raise(&mut self, revision: Revision) {
        self.through = self.through.max(revision);
        if let Some((after, last)) = self.ahead
            && after <= self.through
        {
            self.through = self.through.max(last);
            self.ahead = None;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(revision: u64) -> Revision {
        Revision::new(revision)
    }

    fn whole(revision: u64) -> RevokedThrough {
        let mut revoked = RevokedThrough::default();
        revoked.replaced(at(revision), false);
        revoked
    }

    #[test]
    fn the_lane_claims_nothing_across_what_is_missing() {
        let mut revoked = whole(10);
        revoked.overtaken(at(10), at(12));
        assert_eq!(revoked.get(), at(12));
        revoked.overtaken(at(20), at(30));
        revoked.overtaken(at(30), at(40));
        assert_eq!(revoked.get(), at(12));
        revoked.applied(at(19));
        assert_eq!(revoked.get(), at(19));
        // The range that overtook the rest counts once the rest has arrived.
        revoked.applied(at(20));
        assert_eq!(revoked.get(), at(40));
        revoked.overtaken(at(50), at(60));
        revoked.overtaken(at(70), at(80));
        revoked.replaced(at(55), true);
        assert_eq!(revoked.get(), at(55));
        revoked.replaced(at(70), true);
        assert_eq!(revoked.get(), at(80));
    }

    #[test]
    fn nothing_is_claimed_beyond_what_was_refused_until_a_whole_state_is_in_use() {
        let mut revoked = whole(10);
        revoked.refused(at(15));
        revoked.overtaken(at(10), at(20));
        revoked.applied(at(16));
        assert_eq!(revoked.get(), at(10));
        revoked.replaced(at(14), true);
        revoked.applied(at(16));
        assert_eq!(revoked.get(), at(14));
        revoked.replaced(at(15), true);
        revoked.applied(at(16));
        assert_eq!(revoked.get(), at(16));
        // A revocation that was in force before the refusal stays in force.
        revoked.refused(at(16));
        revoked.applied(at(17));
        assert_eq!(revoked.get(), at(17));
    }

    #[test]
    fn of_another_history_nothing_stays() {
        let mut revoked = whole(10);
        revoked.overtaken(at(20), at(30));
        revoked.refused(at(40));
        revoked.replaced(at(5), false);
        assert_eq!(revoked.get(), at(5));
        revoked.applied(at(25));
        assert_eq!(revoked.get(), at(25));
    }
}
