//! Which sidecars may be answering checks, from which state, and until when: the rule behind every proof.
//!
//! A sidecar whose stream broke goes on answering from memory, and one that stopped may start again from its snapshot file.
//! Neither a broken stream nor a Goodbye proves that nobody serves an old state. Two things do: an end that was witnessed,
//! and time that one boot clock has measured beyond what the control plane has granted. [`Serving`] keeps that book. It is a
//! state machine without clocks, sockets and storage: events go in with the time at which they happened, and whoever waits
//! asks it who is missing.
//!
//! | state | how it comes about | may it answer checks? |
//! | --- | --- | --- |
//! | connected | one of its streams is open | yes |
//! | lost | its stream ended without a Goodbye | yes, until its bound |
//! | stopped | its process has ended and left a snapshot file | no, but it may start from the file: counts until its bound |
//! | gone | its process has ended without a file, its bound has passed, or somebody forgot it | no |
//!
//! The *bound* of a run for a keyring is the arrival of the newest beat that was answered, plus the time that the answer
//! granted, plus 1 %: the most by which two boot clocks may differ in speed. The run counts from the sending of that beat, and
//! so never ends later. A smaller grant becomes the bound only when the larger one before it has run out.

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
pub(crate) use held::Held;
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

/// The book of all runs that may serve, and of those that have ended without telling every use.
#[derive(Clone, Debug)]
pub(crate) struct Serving {
    runs: BTreeMap<RunKey, Run>,
    gaps: Gaps,
    /// Those whose rows the store does not have as they are. Answers to them wait.
    unsaved: BTreeSet<RunKey>,
    /// Those of whose time the store is to be given anew how much is left. Nobody waits for that.
    aging: BTreeSet<RunKey>,
    /// Those whose rows the store is to remove.
    unremoved: BTreeSet<RunKey>,
    max_serve_for: Duration,
}

/// The time of an event, by both clocks of the control plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Now {
    /// Waiting is measured by this one.
    pub(crate) boot: BootTime,
    /// People are told this one.
    pub(crate) wall: Timestamp,
}

/// How a run said Goodbye.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Farewell {
    /// It has reported every use that it saw, and the store has that.
    pub(crate) has_told_all: bool,
    /// It has unlinked its snapshot file, and that is synced.
    pub(crate) has_erased_file: bool,
    /// The number of the last write to its snapshot file; zero when it is not known.
    pub(crate) last_write: u64,
}

/// A run cannot be forgotten.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ForgetError {
    /// Nothing is known of it.
    #[error("there is no such sidecar")]
    Unknown,
    /// It is connected.
    #[error("the sidecar is connected")]
    Connected,
}

/// Why a run does not count any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Gone {
    /// Its bound has passed.
    Bound,
    /// Its process has ended, and its file cannot be served.
    Ended,
    /// Somebody answers for it.
    Forgotten,
}

/// A run is not connected, or does not hold the keyring: nothing may be granted to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the run is not connected, or does not hold the keyring")]
pub(crate) struct UnknownRun;

/// What is to be written to the store.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Unsaved {
    /// To be kept, each in the place of the one before.
    pub(crate) rows: Vec<Row>,
    /// To be removed.
    pub(crate) removed: Vec<RunKey>,
}

impl Serving {
    /// The book as the store has it. Every run in it may serve for what was left of its bound when that was last written; one
    /// of which nothing was written may serve for its full bound from now on. `max_serve_for` is the longest grant.
    ///
    /// # Errors
    ///
    /// When a row cannot be read: whoever starts without it proves too much.
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

    /// The store is a backup: what it says of the time that was left is of the past. Every run in it may serve for its full
    /// bound from now on.
    pub(crate) fn distrust_rests(&mut self, now: Now) {
        for (key, run) in &mut self.runs {
            for holding in run.keyrings.values_mut() {
                holding.suppose(holding.granted.max(self.max_serve_for), now.boot);
            }
            self.unsaved.insert(key.clone());
        }
    }

    /// The longest time that an answer grants.
    #[must_use]
    pub(crate) const fn max_serve_for(&self) -> Duration {
        self.max_serve_for
    }

    /// A stream has ended. Without a Goodbye the run is lost once none of its streams is open.
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

    /// A run has answered its last check.
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

    /// The answer to a beat, which arrived at `arrived`, lets a run serve a keyring for `serve_for`. Returns whether that is
    /// on record; if not, the answer must not leave before the run's row is saved.
    ///
    /// # Errors
    ///
    /// When the run is not connected, or does not hold the keyring: the answer must not leave. What is left of the bound of one
    /// that is lost may be written already.
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

    /// A run has reported every use before `until`, and the store has that.
    pub(crate) fn reported(&mut self, key: &RunKey, until: Timestamp, now: Now) {
        if let Some(run) = self.runs.get_mut(key) {
            if run.is_connected() {
                run.last_seen = now.wall;
            }
            // No use that is still to come is covered, whatever a clock says.
            run.complete_until = run.complete_until.max(Some(until.min(now.wall)));
        }
    }

    /// A run has confirmed something of a keyring. What an older stream brings late was said of what the run held then.
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

    /// A connected run has erased what it held of a keyring, from memory and from its snapshot file, and has reported what it
    /// saw used.
    pub(crate) fn dropped(&mut self, key: &RunKey, stream: u64, keyring: &KeyringName) {
        // What an older stream brings late was said of what the run held then.
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

    /// Somebody answers for it that a run does not serve any more. Its name stays known: when it comes back, it has to begin
    /// anew.
    ///
    /// # Errors
    ///
    /// When it is connected, or not known.
    pub(crate) fn forget(&mut self, key: &RunKey, now: Now) -> Result<(), ForgetError> {
        let run = self.runs.get(key).ok_or(ForgetError::Unknown)?;
        if run.is_connected() {
            return Err(ForgetError::Connected);
        }
        self.leave_gap(key, Gone::Forgotten, now);
        Ok(())
    }

    /// Time has passed: whoever is over its bound is gone.
    pub(crate) fn pass(&mut self, now: Now) {
        for run in self.runs.values_mut() {
            // A clock that was ahead, and was set right: nobody knows what was reported by then. The next report tells.
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

    /// One run, while it may serve.
    #[must_use]
    pub(crate) fn run(&self, key: &RunKey) -> Option<&Run> {
        self.runs.get(key)
    }

    /// Every run that may serve.
    pub(crate) fn runs(&self) -> impl Iterator<Item = (&RunKey, &Run)> {
        self.runs.iter()
    }

    /// The runs that have ended without telling every use.
    pub(crate) fn gaps(&self) -> impl Iterator<Item = (&RunKey, &Gap)> {
        self.gaps.iter()
    }

    /// How far the runs that may serve a keyring are from a target; those of `without` are passed by.
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

    /// How many runs that may serve a keyring have reached a target, and how many there are: a [`barrier`](Self::barrier)
    /// without names.
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

    /// How completely uses of a keyring's keys were reported. `at` is the time by which planned ends come: the end of a gap is
    /// as long before it as the boot clock has measured. Where nothing may serve, nobody can use a key.
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

    /// What the store does not have, with what is left of each bound at `now`. Whoever has written it calls
    /// [`saved`](Self::saved).
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

    /// The store is to be given anew what is left of each bound, and, `with_gaps`, how long ago gaps ended.
    pub(crate) fn write_down(&mut self, with_gaps: bool) {
        self.aging.extend(self.runs.keys().cloned());
        if with_gaps {
            self.aging
                .extend(self.gaps.iter().map(|(key, _)| key.clone()));
        }
    }

    /// The store has `written` as of `now`. What has changed since stays to be written.
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

    /// A process has ended. With its file left behind the run is stopped; else it is gone.
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
            // What was never granted is in no file that may serve.
            run.keyrings.retain(|_, holding| holding.until.is_some());
            for holding in run.keyrings.values_mut() {
                if !(is_kept && holding.may_be_in_file(now.boot)) {
                    // Its time ends with the process; what was used until then is not known.
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

    /// A run is gone, and nobody knows what it saw used since its last report.
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
