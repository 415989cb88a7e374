//! The book of the sidecars that may answer checks, of the state from which they answer, and of the
//! time until which they may. Every proof relies on its rule.
//!
//! A sidecar whose stream broke continues to answer from memory, and a sidecar that stopped may
//! start again from its snapshot file. Neither a broken stream nor a Goodbye proves that no process
//! serves an old state. Two things prove it: the witnessed end of the process, and a time beyond
//! the control plane's grant that one boot clock has measured. [`Serving`] keeps the book of this.
//! It is a state machine without clocks, sockets and storage: it receives events with the times at
//! which they happened, and it names the sidecars that a caller still waits for.
//!
//! | state | cause | may it answer checks? |
//! | --- | --- | --- |
//! | connected | one of its streams is open | yes |
//! | lost | its stream ended without a Goodbye | yes, until its bound |
//! | stopped | its process has ended and left a snapshot file | no, but it may start from the file: counts until its bound |
//! | gone | its process has ended without a file, its bound has passed, or an operator forgot it | no |
//!
//! The *bound* of a run for a keyring is the arrival of the newest beat that was answered, plus the
//! time that the answer granted, plus 1 % and 1 ms: two boot clocks may differ in speed by at most
//! 1 %. The run counts its grant from the moment at which it sent that beat, so it never serves
//! beyond its bound. A smaller grant becomes the bound only when the larger grant before it has
//! expired.

mod about;
mod barrier;
mod gap;
mod held;
mod hello;
mod holding;
mod lock;
#[cfg(test)]
mod model;
mod progress;
mod row;
mod run;
mod run_key;
mod target;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use crate::{
    clock::BootTime,
    key::{Coverage, Epoch, KeyringName, Timestamp},
};

pub(crate) use about::About;
pub(crate) use barrier::{Barrier, Laggard};
pub(crate) use gap::Gap;
pub(crate) use held::HeldState;
#[cfg(test)]
use hello::Welcome;
pub(crate) use hello::{Hello, HelloError};
pub(crate) use holding::Holding;
pub(crate) use lock::{Lock, LockAt, LockPlace};
pub(crate) use progress::{Confirmation, Progress};
pub(crate) use row::{Row, RowError};
pub use run::Run;
pub(crate) use run::{Presence, SnapshotFile};
pub use run_key::RunKey;
pub(crate) use target::Target;

use gap::Gaps;
use run::Ended;

/// The book of all runs that may serve, and of the runs that are gone without a complete report of
/// their uses.
#[derive(Clone, Debug)]
pub(crate) struct Serving {
    runs: BTreeMap<RunKey, Run>,
    gaps: Gaps,
    /// The runs and gaps whose current rows are not in the store. Answers to these runs wait.
    unsaved: BTreeSet<RunKey>,
    /// The runs whose rest, and the gaps whose age, must be written to the store again. No answer
    /// waits for that.
    aging: BTreeSet<RunKey>,
    /// The runs and gaps whose rows the store must remove.
    unremoved: BTreeSet<RunKey>,
    max_serve_for: Duration,
}

/// The time of an event, by both clocks of the control plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Now {
    /// The boot clock, which measures waiting times.
    pub(crate) boot: BootTime,
    /// The wall clock, for the times that people see.
    pub(crate) wall: Timestamp,
}

/// How a run has ended, as its Goodbye reports it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Farewell {
    /// Whether it has reported every use that it saw, and the store contains the reports.
    pub(crate) has_told_all: bool,
    /// Whether it has unlinked its snapshot file and synced the directory.
    pub(crate) has_erased_file: bool,
    /// The number of the last write to its snapshot file; zero when the number is unknown.
    pub(crate) last_write: u64,
}

/// Why a run cannot be forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ForgetError {
    /// The book does not contain the run.
    #[error("there is no such sidecar")]
    Unknown,
    /// The run is connected.
    #[error("the sidecar is connected")]
    Connected,
}

/// Why a run no longer counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Gone {
    /// Its bound has passed.
    Bound,
    /// Its process has ended, and its file cannot be served.
    Ended,
    /// An operator has stated that it no longer serves.
    Forgotten,
}

/// Why a grant is rejected: the run is not connected, or does not hold the keyring.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the run is not connected, or does not hold the keyring")]
pub(crate) struct UnknownRun;

/// The changes that must be written to the store.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Unsaved {
    /// The rows to store. Each one replaces the former row of its run.
    pub(crate) rows: Vec<Row>,
    /// The runs whose rows must be removed.
    pub(crate) removed: Vec<RunKey>,
}

impl Serving {
    /// Restores the book from the rows of the store. Every run in it may serve for the rest of its
    /// bound that was last written. A run without a written rest may serve for its full bound from
    /// now on. `max_serve_for` is the longest grant.
    ///
    /// # Errors
    ///
    /// When a row cannot be read: a control plane that starts without it would prove too much.
    pub(crate) fn restore(
        rows: Vec<Row>,
        max_serve_for: Duration,
        now: Now,
    ) -> Result<Self, RowError> {
        let mut serving = Self {
            runs: BTreeMap::new(),
            gaps: Gaps::default(),
            unsaved: BTreeSet::new(),
            aging: BTreeSet::new(),
            unremoved: BTreeSet::new(),
            max_serve_for,
        };
        for row in rows {
            row.load(&mut serving, now)?;
        }
        Ok(serving)
    }

    /// Ignores the rests in the store, because the store is a backup and its rests are out of date.
    /// Every run in it may serve for its full bound from now on.
    pub(crate) fn distrust_rests(&mut self, now: Now) {
        for (key, run) in &mut self.runs {
            for holding in run.keyrings.values_mut() {
                holding.suppose(holding.granted.max(self.max_serve_for), now.boot);
            }
            self.unsaved.insert(key.clone());
        }
    }

    /// Returns the longest time that an answer grants.
    #[must_use]
    pub(crate) const fn max_serve_for(&self) -> Duration {
        self.max_serve_for
    }

    /// Records that a stream has ended. Without a Goodbye, the run is lost when none of its streams
    /// is open any more.
    pub(crate) fn stream_ended(&mut self, key: &RunKey, stream: u64, now: Now) {
        let Some(run) = self.runs.get_mut(key) else {
            return;
        };
        if !run.open.remove(&stream) {
            return;
        }
        run.last_seen = now.wall;
        if run.open.is_empty() {
            run.lost_at = Some(now.wall);
            self.unsaved.insert(key.clone());
        }
        self.pass(now);
    }

    /// Records the Goodbye of a run: it has answered its last check.
    pub(crate) fn goodbye(&mut self, key: &RunKey, farewell: Farewell, now: Now) {
        let Some(run) = self.runs.get_mut(key) else {
            return;
        };
        run.last_seen = now.wall;
        if farewell.has_erased_file {
            run.file = None;
        }
        self.end(key, farewell, now);
        self.pass(now);
    }

    /// Grants a run `serve_for` of a keyring, with the answer to a beat that arrived at `arrived`.
    /// Returns whether the grant is on record. If it is not, the answer must not be sent before the
    /// run's row is saved.
    ///
    /// # Errors
    ///
    /// When the run is not connected, or does not hold the keyring: the answer must not be sent.
    /// The rest of a lost run's bound may already be written.
    pub(crate) fn grant(
        &mut self,
        key: &RunKey,
        keyring: &KeyringName,
        serve_for: Duration,
        arrived: BootTime,
    ) -> Result<bool, UnknownRun> {
        let run = self.runs.get_mut(key).filter(|run| run.is_connected());
        let holding = run.and_then(|run| run.keyrings.get_mut(keyring));
        let holding = holding.filter(|holding| holding.is_followed);
        let holding = holding.ok_or(UnknownRun)?;
        if !holding.grant(serve_for, arrived) {
            self.unsaved.insert(key.clone());
        }
        Ok(!self.unsaved.contains(key))
    }

    /// Records that a run has reported every use before `until`, and that the store contains the
    /// report.
    pub(crate) fn reported(&mut self, key: &RunKey, until: Timestamp, now: Now) {
        if let Some(run) = self.runs.get_mut(key) {
            if run.is_connected() {
                run.last_seen = now.wall;
            }
            // A use in the future is never covered, whatever a clock shows.
            run.complete_until = run.complete_until.max(Some(until.min(now.wall)));
        }
    }

    /// Records what a run has confirmed for a keyring. A late message of an older stream is
    /// ignored: it describes what the run held at that time.
    pub(crate) fn confirmed(
        &mut self,
        key: &RunKey,
        stream: u64,
        keyring: &KeyringName,
        confirmation: &Confirmation,
        now: Now,
    ) {
        let is_heard = |run: &&mut Run| run.ended.is_none() && run.newest_stream == stream;
        let Some(run) = self.runs.get_mut(key).filter(is_heard) else {
            return;
        };
        run.last_seen = now.wall;
        if let Some(holding) = run.keyrings.get_mut(keyring) {
            holding.progress.confirm(confirmation, now.wall);
        }
    }

    /// Records that a run subscribes to a further keyring on an open stream. Nothing of the keyring
    /// may be sent before the run's row is saved. Returns false, and records nothing, when the
    /// stream is not the newest of the run, or has ended.
    #[must_use]
    pub(crate) fn subscribed(
        &mut self,
        key: &RunKey,
        stream: u64,
        keyring: KeyringName,
        held: &HeldState,
        now: Now,
    ) -> bool {
        let max_serve_for = self.max_serve_for;
        let is_newest = |run: &&mut Run| run.newest_stream == stream && run.open.contains(&stream);
        let Some(run) = self.runs.get_mut(key).filter(is_newest) else {
            return false;
        };
        let holding = run.keyrings.entry(keyring).or_default();
        holding.greet(held, max_serve_for, now);
        self.unsaved.insert(key.clone());
        true
    }

    /// Records that a connected run has erased a keyring from memory and from its snapshot file,
    /// and has reported the uses that it saw.
    pub(crate) fn dropped(&mut self, key: &RunKey, stream: u64, keyring: &KeyringName) {
        // A late message of an older stream describes what the run held at that time.
        if let Some(run) = self
            .runs
            .get_mut(key)
            .filter(|run| run.newest_stream == stream)
            && run.is_connected()
            && run.keyrings.remove(keyring).is_some()
        {
            self.unsaved.insert(key.clone());
        }
    }

    /// Forgets a run: an operator has stated that it no longer serves. Its name stays known: when
    /// the run returns, it must begin anew.
    ///
    /// # Errors
    ///
    /// When the run is connected, or unknown.
    pub(crate) fn forget(&mut self, key: &RunKey, now: Now) -> Result<(), ForgetError> {
        let run = self.runs.get(key).ok_or(ForgetError::Unknown)?;
        if run.is_connected() {
            return Err(ForgetError::Connected);
        }
        self.leave_gap(key, Gone::Forgotten, now);
        Ok(())
    }

    /// Applies the passage of time: a run whose bound has passed is gone, and gaps that are too old
    /// are removed.
    pub(crate) fn pass(&mut self, now: Now) {
        for run in self.runs.values_mut() {
            // The wall clock was ahead and was set right: it is unknown which uses were reported by
            // then. The next report shows it.
            run.complete_until = run.complete_until.filter(|until| *until <= now.wall);
        }
        let over = self.runs.iter();
        let over = over.filter(|(_, run)| !run.may_serve_any(now.boot));
        let over: Vec<RunKey> = over.map(|(key, _)| key.clone()).collect();
        for key in over {
            self.leave_gap(&key, Gone::Bound, now);
        }
        let old = self.gaps.forget_old(now.boot);
        self.unsaved.retain(|key| !old.contains(key));
        self.unremoved.extend(old);
    }

    /// Returns a run, while it may serve.
    #[must_use]
    pub(crate) fn run(&self, key: &RunKey) -> Option<&Run> {
        self.runs.get(key)
    }

    /// Returns every run that may serve.
    pub(crate) fn runs(&self) -> impl Iterator<Item = (&RunKey, &Run)> {
        self.runs.iter()
    }

    /// Returns the runs that are gone without a complete report of their uses.
    pub(crate) fn gaps(&self) -> impl Iterator<Item = (&RunKey, &Gap)> {
        self.gaps.iter()
    }

    /// Returns how far the runs that may serve a keyring are from a target. The runs in `without`
    /// are passed by.
    #[must_use]
    pub(crate) fn barrier(
        &self,
        keyring: &KeyringName,
        epoch: Epoch,
        target: Target,
        without: &BTreeSet<RunKey>,
        now: Now,
    ) -> Barrier {
        let mut barrier = Barrier::default();
        for (key, run) in &self.runs {
            let Some(holding) = run.holding(keyring, now.boot) else {
                continue;
            };
            if without.contains(key) {
                barrier.passed_by.push(key.clone());
                continue;
            }
            barrier.total += 1;
            if holding.has_reached(epoch, target, run.keeps(holding, now.boot)) {
                barrier.confirmed += 1;
            } else {
                let laggard = Laggard::of(key, run, holding, target, now);
                barrier.laggards.push(laggard);
            }
        }
        barrier
    }

    /// Returns how many runs that may serve a keyring have reached a target, and how many such runs
    /// exist: a [`barrier`](Self::barrier) without names.
    #[must_use]
    pub(crate) fn reached(
        &self,
        keyring: &KeyringName,
        epoch: Epoch,
        target: Target,
        without: &BTreeSet<RunKey>,
        now: Now,
    ) -> (usize, usize) {
        let serving = self.runs.iter().filter_map(|(key, run)| {
            let holding = run.holding(keyring, now.boot)?;
            (!without.contains(key)).then_some((run, holding))
        });
        serving.fold((0, 0), |(reached, all), (run, holding)| {
            let is_there = holding.has_reached(epoch, target, run.keeps(holding, now.boot));
            (reached + usize::from(is_there), all + 1)
        })
    }

    /// Returns how completely the uses of a keyring's keys were reported. `at` is the time by which
    /// planned ends are due. A gap's end is computed as `at` minus the age that the boot clock has
    /// measured. While no run may serve the keyring, its keys cannot be used, so the reports are
    /// complete until `at`.
    #[must_use]
    pub(crate) fn coverage(&self, keyring: &KeyringName, at: Timestamp, now: Now) -> Coverage {
        let mut coverage = Coverage {
            complete_until: Some(at),
            gap_until: None,
        };
        let mut end_of_gap = |since: Duration| {
            let until = at.saturating_sub(since);
            coverage.gap_until = coverage.gap_until.max(Some(until));
        };
        for (_, gap) in self.gaps.iter() {
            if gap.keyrings.contains(keyring) {
                end_of_gap(gap.age(now.boot));
            }
        }
        for run in self.runs.values() {
            if run.holding(keyring, now.boot).is_some() {
                coverage.complete_until = coverage.complete_until.min(run.complete_until);
            } else if let Some(over) = run.keyrings.get(keyring).and_then(|held| held.until) {
                end_of_gap(now.boot.saturating_since(over));
            }
        }
        coverage
    }

    /// Returns the changes that the store does not contain, with the rest of each bound at `now`. A
    /// caller that has written them calls [`saved`](Self::saved).
    #[must_use]
    pub(crate) fn unsaved(&self, now: Now) -> Unsaved {
        Unsaved {
            rows: self
                .unsaved
                .union(&self.aging)
                .filter_map(|key| self.row(key, now))
                .collect(),
            removed: self.unremoved.iter().cloned().collect(),
        }
    }

    /// Marks the rest of each bound to be written to the store again, and, `with_gaps`, the age of
    /// each gap.
    pub(crate) fn write_down(&mut self, with_gaps: bool) {
        self.aging.extend(self.runs.keys().cloned());
        if with_gaps {
            self.aging
                .extend(self.gaps.iter().map(|(key, _)| key.clone()));
        }
    }

    /// Records that the store contains `written` as of `now`. Later changes are still to be
    /// written.
    pub(crate) fn saved(&mut self, written: &Unsaved, now: Now) {
        for row in &written.rows {
            if self
                .row(&row.key, now)
                .is_none_or(|is| is.says_as_much_as(row))
            {
                self.unsaved.remove(&row.key);
            }
            self.aging.remove(&row.key);
        }
        for key in &written.removed {
            self.unremoved.remove(key);
        }
    }

    fn row(&self, key: &RunKey, now: Now) -> Option<Row> {
        match (self.runs.get(key), self.gaps.get(key)) {
            (Some(run), _) => Some(Row::of_run(key, run, now)),
            (None, Some(gap)) => Some(Row::of_gap(key, gap, now)),
            (None, None) => None,
        }
    }

    /// Ends a run, because its process has ended. If the process left its file behind, the run is
    /// stopped; otherwise the run is gone.
    fn end(&mut self, key: &RunKey, farewell: Farewell, now: Now) {
        let Some(run) = self.runs.get_mut(key) else {
            return;
        };
        run.open.clear();
        run.lost_at = None;
        let leaves_file = run.keyrings.values().any(|held| run.keeps(held, now.boot));
        if leaves_file {
            run.ended.get_or_insert(Ended {
                at: now.wall,
                has_told_all: farewell.has_told_all,
                last_write: farewell.last_write,
            });
            let is_kept = run.file.is_some();
            // A keyring that was never granted is in no file that may serve.
            run.keyrings.retain(|_, holding| holding.until.is_some());
            for holding in run.keyrings.values_mut() {
                if !(is_kept && holding.may_be_in_file(now.boot)) {
                    // Its time ends with the process; its uses until then may be unknown.
                    holding.until = holding.until.min(Some(now.boot));
                }
            }
            if farewell.has_told_all {
                run.keyrings
                    .retain(|_, holding| holding.may_be_in_file(now.boot));
            }
            self.unsaved.insert(key.clone());
        } else if farewell.has_told_all {
            self.remove(key);
        } else {
            self.leave_gap(key, Gone::Ended, now);
        }
    }

    /// Moves a run that is gone to the gaps: the uses that it saw since its last report are
    /// unknown.
    fn leave_gap(&mut self, key: &RunKey, gone: Gone, now: Now) {
        let Some(run) = self.runs.remove(key) else {
            return;
        };
        let ended = match gone {
            Gone::Bound => run.last_bound().unwrap_or(now.boot).min(now.boot),
            Gone::Ended | Gone::Forgotten => now.boot,
        };
        let has_ended = gone == Gone::Ended || run.ended.is_some();
        let is_forgotten = gone == Gone::Forgotten;
        let age = now.boot.saturating_since(ended);
        let gap = Gap {
            keyrings: run.keyrings.keys().cloned().collect(),
            held: if is_forgotten {
                run.keyrings
            } else {
                BTreeMap::new()
            },
            complete_until: run.complete_until,
            last_seen: run.last_seen,
            until: now.wall.saturating_sub(age),
            about: run.about,
            ended,
            age_before: Duration::ZERO,
            newest_stream: run.newest_stream,
            has_ended,
            is_forgotten,
        };
        if gap.keyrings.is_empty() && !is_forgotten {
            self.unsaved.remove(key);
            self.unremoved.insert(key.clone());
            return;
        }
        self.unsaved.insert(key.clone());
        for surplus in self.gaps.add(key.clone(), gap) {
            self.unsaved.remove(&surplus);
            self.unremoved.insert(surplus);
        }
    }

    fn remove(&mut self, key: &RunKey) {
        self.runs.remove(key);
        self.unsaved.remove(key);
        self.unremoved.insert(key.clone());
    }
}
