//! The last revisions of a keyring, encoded.

use std::sync::Arc;

use bytes::Bytes;

use crate::key::Revision;

/// The last revisions without a gap, as many as are kept. Clones share them: another step costs a
/// copy of the last block.
#[derive(Clone, Debug, Default)]
pub(crate) struct Steps {
    /// The state that the first step starts from.
    before: Before,
    /// The steps of revisions `n * BLOCK` to `(n + 1) * BLOCK - 1`, for consecutive `n`. Only the first block may lack
    /// steps at its beginning, and only the last one at its end.
    blocks: Vec<Arc<Block>>,
    bytes: usize,
}

/// One revision, encoded.
#[derive(Clone, Debug)]
pub(crate) struct EncodedStep {
    /// The revision to which it leads.
    pub(crate) revision: Revision,
    /// A serialized delta.
    pub(crate) delta: Bytes,
    /// Serialized revocations, where the delta has any.
    pub(crate) revocations: Option<Bytes>,
    /// The digest of the set of items at this revision.
    pub(crate) set_digest: u64,
}

/// The revision before the first step, with its digest.
#[derive(Clone, Copy, Debug, Default)]
struct Before {
    revision: Revision,
    set_digest: u64,
}

#[derive(Clone, Debug, Default)]
struct Block {
    steps: Vec<EncodedStep>,
    bytes: usize,
    /// Whether one of the steps revokes something.
    revokes: bool,
}

/// The number of last revisions that are kept, unless they are too large. A sidecar that is further
/// behind gets a snapshot.
pub(crate) const KEPT: u64 = 8_192;
/// The number of revisions in a block.
const BLOCK: u64 = 64;
/// The most blocks: the last one is rarely full.
const MAX_BLOCKS: usize = (KEPT / BLOCK) as usize + 1;
/// The most bytes of the steps: all streams of a keyring share them, however slow their readers
/// are.
const MAX_BYTES: usize = 16 << 20;

impl Steps {
    /// Creates a history without steps. The first one starts from `revision`, where the set of
    /// items has `set_digest`.
    #[must_use]
    pub(crate) fn after(revision: Revision, set_digest: u64) -> Self {
        Self {
            before: Before {
                revision,
                set_digest,
            },
            ..Self::default()
        }
    }

    /// Adds the step that follows the last one.
    pub(crate) fn push(&mut self, step: EncodedStep) {
        let begins_block = step.revision.get().is_multiple_of(BLOCK);
        if begins_block || self.blocks.is_empty() {
            self.blocks.push(Arc::default());
        }
        let Some(block) = self.blocks.last_mut() else {
            return;
        };
        let block = Arc::make_mut(block);
        let len = step.len();
        block.bytes += len;
        block.revokes |= step.revocations.is_some();
        block.steps.push(step);
        self.bytes += len;
        self.drop_old();
    }

    /// Returns the step that leads to `revision`, if it is kept.
    #[must_use]
    pub(crate) fn get(&self, revision: Revision) -> Option<&EncodedStep> {
        let (block, step) = self.place(revision)?;
        self.blocks.get(block)?.steps.get(step)
    }

    /// Returns the first kept step from `revision` on that revokes something.
    #[must_use]
    pub(crate) fn first_revocation(&self, revision: Revision) -> Option<&EncodedStep> {
        let oldest = self.oldest()?;
        let (first, skipped) = self.place(revision.max(oldest))?;
        let rest = self.blocks.get(first..)?.iter().enumerate();
        rest.filter(|(_, block)| block.revokes)
            .flat_map(|(number, block)| {
                let skipped = if number == 0 { skipped } else { 0 };
                block.steps.iter().skip(skipped)
            })
            .find(|step| step.revocations.is_some())
    }

    /// Returns the digest of the set of items at `revision`: that of a kept step, or that before
    /// the first step.
    #[must_use]
    pub(crate) fn digest_at(&self, revision: Revision) -> Option<u64> {
        if revision == self.before.revision {
            return Some(self.before.set_digest);
        }
        Some(self.get(revision)?.set_digest)
    }

    fn drop_old(&mut self) {
        let mut surplus = 0;
        // The last block stays: a change of any size reaches the sidecars that follow.
        while surplus + 1 < self.blocks.len()
            && (self.blocks.len() - surplus > MAX_BLOCKS || self.bytes > MAX_BYTES)
        {
            let dropped = &self.blocks[surplus];
            self.bytes -= dropped.bytes;
            if let Some(last) = dropped.steps.last() {
                self.before = Before {
                    revision: last.revision,
                    set_digest: last.set_digest,
                };
            }
            surplus += 1;
        }
        self.blocks.drain(..surplus);
    }

    fn oldest(&self) -> Option<Revision> {
        Some(self.blocks.first()?.steps.first()?.revision)
    }

    /// Returns the place of the step of `revision`, also for a step to come. None when it is before
    /// the oldest step.
    fn place(&self, revision: Revision) -> Option<(usize, usize)> {
        let oldest = self.oldest()?.get();
        let revision = revision.get();
        if revision < oldest {
            return None;
        }
        let block = revision / BLOCK;
        let begin = (block * BLOCK).max(oldest);
        let block = usize::try_from(block - oldest / BLOCK).ok()?;
        Some((block, usize::try_from(revision - begin).ok()?))
    }
}

impl EncodedStep {
    fn len(&self) -> usize {
        self.delta.len() + self.revocations.as_ref().map_or(0, Bytes::len)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(revision: u64, bytes: usize, revokes: bool) -> EncodedStep {
        EncodedStep {
            revision: Revision::new(revision),
            delta: vec![0; bytes].into(),
            revocations: revokes.then(Bytes::new),
            set_digest: revision * 10,
        }
    }

    fn steps(revisions: std::ops::Range<u64>, revoking: &[u64]) -> Steps {
        let mut steps = Steps::default();
        for revision in revisions {
            steps.push(step(revision, 1, revoking.contains(&revision)));
        }
        steps
    }

    fn revision(number: u64) -> Revision {
        Revision::new(number)
    }

    #[test]
    fn every_step_is_found_by_its_revision() {
        for first in [1, 63, 64, 65, 1_000] {
            let end = first + 200;
            let steps = steps(first..end, &[]);
            for number in first..end {
                let found = steps.get(revision(number)).map(|step| step.revision.get());
                assert_eq!(found, Some(number));
            }
            assert!(steps.get(revision(first - 1)).is_none());
            assert!(steps.get(revision(end)).is_none());
        }
        assert!(Steps::default().get(revision(1)).is_none());
    }

    #[test]
    fn the_next_revocation_is_found() {
        let steps = steps(30..300, &[40, 63, 64, 250]);
        for (from, found) in [
            (0, Some(40)),
            (40, Some(40)),
            (41, Some(63)),
            (64, Some(64)),
            (65, Some(250)),
            (251, None),
            (1_000, None),
        ] {
            let step = steps.first_revocation(revision(from));
            assert_eq!(step.map(|step| step.revision.get()), found, "from {from}");
        }
    }

    #[test]
    fn revisions_and_bytes_are_bounded() {
        let many = steps(1..20_000, &[]);
        assert!(many.get(revision(20_000 - 8_192)).is_some());
        assert!(many.get(revision(20_000 - 8_192 - 2 * BLOCK)).is_none());
        let mut large = Steps::default();
        for number in 1..1_000 {
            large.push(step(number, 1 << 20, false));
        }
        assert!(large.bytes <= MAX_BYTES + (64 << 20), "{}", large.bytes);
        assert!(large.get(revision(999)).is_some());
    }

    #[test]
    fn the_digest_is_known_wherever_a_step_leads_on_from() {
        let mut steps = Steps::after(revision(30), 300);
        assert_eq!(steps.digest_at(revision(30)), Some(300));
        for number in 31..20_000 {
            steps.push(step(number, 1, false));
        }
        assert_eq!(steps.digest_at(revision(30)), None);
        let first = (0..20_000).find(|number| steps.get(revision(*number)).is_some());
        let first = first.expect("some are kept");
        for number in first - 1..20_000 {
            assert_eq!(steps.digest_at(revision(number)), Some(number * 10));
        }
        assert_eq!(steps.digest_at(revision(first - 2)), None);
        assert_eq!(steps.digest_at(revision(20_000)), None);
    }

    #[test]
    fn a_clone_stays_as_it_was() {
        let mut steps = steps(1..100, &[]);
        let before = steps.clone();
        steps.push(step(100, 1, true));
        assert!(before.get(revision(100)).is_none());
        assert!(before.first_revocation(revision(1)).is_none());
        assert!(steps.get(revision(100)).is_some());
    }
}
