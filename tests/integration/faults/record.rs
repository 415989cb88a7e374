//! What is written down of a run while it goes on.

use std::{
    collections::HashMap,
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
};

use relatch::clock::{BootTime, Clock};

use super::history::{
    Change, Check, Credential, Cut, HandOver, History, Life, Limits, Moment, SidecarPast, Span,
};

/// The history of a run, to which all its tasks add.
#[derive(Debug)]
pub(super) struct Record {
    clock: Clock,
    begun: BootTime,
    history: Mutex<History>,
    secrets: Mutex<Vec<String>>,
    /// Credentials that are asked for at one sidecar alone, or nowhere.
    only_at: Mutex<HashMap<usize, Option<usize>>>,
    stop: AtomicBool,
}

impl Record {
    /// Of a run that begins now.
    pub(super) fn new(limits: Limits) -> Self {
        let clock = Clock::system();
        Self {
            begun: clock.boot(),
            clock,
            history: Mutex::new(History {
                limits,
                ..History::default()
            }),
            secrets: Mutex::default(),
            only_at: Mutex::default(),
            stop: AtomicBool::new(false),
        }
    }

    pub(super) fn now(&self) -> Moment {
        self.clock.boot().saturating_since(self.begun)
    }

    pub(super) fn history(&self) -> MutexGuard<'_, History> {
        self.history
            .lock()
            .expect("no holder of the history panics")
    }

    /// What checks present, by the number of the credential.
    pub(super) fn secrets(&self) -> MutexGuard<'_, Vec<String>> {
        self.secrets
            .lock()
            .expect("no holder of the secrets panics")
    }

    /// Tells the tasks of the run to end.
    pub(super) fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    pub(super) fn has_stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }

    /// What checks present from now on.
    pub(super) fn add(&self, secret: String, credential: Credential) -> usize {
        let mut history = self.history();
        history.credentials.push(credential);
        self.secrets().push(secret);
        history.credentials.len() - 1
    }

    /// Notes what somebody was issued.
    pub(super) fn issued(&self, begun: Moment, secret: String, revision: u64) -> usize {
        let issued = Some(Change {
            begun,
            revision: Some(revision),
        });
        self.add(
            secret,
            Credential {
                issued,
                ..Credential::default()
            },
        )
    }

    /// Notes that a command has returned which hands a credential out in the place of another one.
    pub(super) fn handed_over(&self, credential: usize, old: usize) {
        let at = self.now();
        self.history().credentials[credential].handed_over = Some(HandOver { at, old });
    }

    /// Notes that a command has returned which waits until no sidecar accepts a credential.
    pub(super) fn is_gone(&self, credential: usize) {
        let now = self.now();
        self.history().credentials[credential].gone = Some(now);
    }

    /// Asks for a credential at one sidecar alone, from the next check on; or nowhere.
    pub(super) fn ask_only_at(&self, credential: usize, sidecar: Option<usize>) {
        self.only_at
            .lock()
            .expect("no holder of the choices panics")
            .insert(credential, sidecar);
    }

    /// Notes that the end of a credential is about to be asked for.
    pub(super) fn ending(&self, credential: usize) {
        let begun = self.now();
        let mut history = self.history();
        // An end that was asked for before, and of which nothing was heard, may be in force since.
        history.credentials[credential].ended.get_or_insert(Change {
            begun,
            revision: None,
        });
    }

    /// Notes with which revision a credential has ended.
    pub(super) fn ended(&self, credential: usize, revision: u64) {
        if let Some(ended) = &mut self.history().credentials[credential].ended {
            ended.revision = Some(revision);
        }
    }

    /// Chooses what the check of a turn presents to a sidecar: the newest as often as all others, for there it is decided
    /// whether a change was told in time.
    pub(super) fn choose(&self, turn: usize, sidecar: usize) -> (usize, String) {
        let secrets = self.secrets();
        let mut number = match turn % 2 {
            0 => secrets.len() - 1 - (turn / 2) % secrets.len().min(4),
            _ => (turn / 2) % secrets.len(),
        };
        let only_at = self
            .only_at
            .lock()
            .expect("no holder of the choices panics");
        let only = only_at.get(&number);
        if only.is_some_and(|only| *only != Some(sidecar)) {
            number = 0;
        }
        (number, secrets[number].clone())
    }

    pub(super) fn checked(&self, check: Check) {
        self.history().checks.push(check);
    }

    /// Notes that a process of a sidecar is about to start.
    pub(super) fn lives(&self, sidecar: usize) {
        let now = self.now();
        let mut history = self.history();
        if history.sidecars.len() == sidecar {
            history.sidecars.push(SidecarPast::default());
        }
        history.sidecars[sidecar].lives.push(Life::since(now));
    }

    /// Notes that it listens, where checks are sent by now.
    pub(super) fn serves(&self, sidecar: usize) {
        let now = self.now();
        if let Some(life) = self.history().sidecars[sidecar].lives.last_mut() {
            life.serves = Some(now);
        }
    }

    /// Notes that it is about to be ended.
    pub(super) fn dies(&self, sidecar: usize) {
        let now = self.now();
        if let Some(life) = self.history().sidecars[sidecar].lives.last_mut() {
            life.to = Some(now);
        }
    }

    /// Notes that it is about to stand still.
    pub(super) fn freezes(&self, sidecar: usize) {
        let now = self.now();
        let past = &mut self.history().sidecars[sidecar];
        past.frozen.push(Span::since(now));
    }

    /// Notes that it goes on.
    pub(super) fn thaws(&self, sidecar: usize) {
        let now = self.now();
        if let Some(span) = self.history().sidecars[sidecar].frozen.last_mut() {
            span.to = Some(now);
        }
    }

    /// Notes that a sidecar is about to be asked for more keys that nobody has than it looks up.
    pub(super) fn is_crowded(&self, sidecar: usize) {
        let now = self.now();
        let past = &mut self.history().sidecars[sidecar];
        past.crowded.push(Span::since(now));
    }

    /// Notes that this is over by then.
    pub(super) fn is_crowded_until(&self, sidecar: usize, end: Moment) {
        if let Some(span) = self.history().sidecars[sidecar].crowded.last_mut() {
            span.to = Some(end);
        }
    }

    /// Notes that nobody can confirm any more what a sidecar holds.
    pub(super) fn is_cut(&self, sidecar: usize) {
        self.is_cut_with(sidecar, self.now());
    }

    /// As [`Self::is_cut`], of a process that begins with what was confirmed by then at the latest.
    pub(super) fn is_cut_with(&self, sidecar: usize, confirmed: Moment) {
        let cut = Cut {
            from: self.now(),
            confirmed,
            healed: None,
            recovered: None,
        };
        self.history().sidecars[sidecar].cut.push(cut);
    }

    /// Notes that the way of its confirmations is about to be whole again.
    pub(super) fn is_healed(&self, sidecar: usize) {
        let now = self.now();
        if let Some(cut) = self.history().sidecars[sidecar].cut.last_mut() {
            cut.healed = Some(now);
        }
    }

    /// Notes that a sidecar says that all is well.
    pub(super) fn is_well(&self, sidecar: usize) {
        let now = self.now();
        if let Some(life) = self.history().sidecars[sidecar].lives.last_mut() {
            life.well.get_or_insert(now);
        }
        if let Some(cut) = self.history().sidecars[sidecar].cut.last_mut() {
            cut.recovered.get_or_insert(now);
        }
    }
}
