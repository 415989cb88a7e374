//! Scheduled rotations: a rotation that a policy makes due is staged, delivered to its sink and
//! handed over.

use std::{
    collections::{HashMap, HashSet},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::{
    sync::{Semaphore, mpsc},
    time::MissedTickBehavior,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use super::{
    catalog::Catalog,
    journal::CommitError,
    pace::Pace,
    rotation::{Patience, RotationError, RotationSpec, Rotations},
    served::ServedKeyring,
};
use crate::{
    clock::BootTime,
    key::{KeyId, SinkName, Timestamp, operation::OldEnds, rotation},
};

/// Starts the rotations that are due.
#[derive(Clone, Debug)]
pub(crate) struct Schedule {
    catalog: Arc<Catalog>,
    rotations: Rotations,
    pace: Arc<Pace>,
    tasks: TaskTracker,
    /// The keys whose rotation is in progress in this process, or has failed recently.
    attempts: Arc<Mutex<HashMap<KeyId, Attempt>>>,
    /// The places of each sink: a sink that accepts nothing delays no rotation of another sink.
    places: Arc<Mutex<HashMap<SinkName, Arc<Semaphore>>>>,
}

/// The scheduled rotation of a key in this process.
#[derive(Clone, Copy, Debug, Default)]
struct Attempt {
    is_running: bool,
    /// The number of failures in a row.
    failures: u32,
    retry_at: BootTime,
}

/// Marks a key as being rotated until it is dropped, including by a panic.
struct Running<'a> {
    schedule: &'a Schedule,
    key_id: KeyId,
}

/// The interval at which due rotations are looked for.
const EVERY: Duration = Duration::from_secs(1);
/// The most rotations of a sink at the same time. Each waits for sidecars and the sink most of the
/// time.
const MAX_RUNNING: usize = 16;
/// The first and the longest wait after a failed rotation. Each further failure in a row doubles
/// the wait.
const RETRY: (Duration, Duration) = (Duration::from_mins(1), Duration::from_hours(1));
/// The actor in the audit log.
const ACTOR: &str = "schedule";

impl Schedule {
    /// Creates a schedule for the keys of the catalog, whose rotations run as `tasks`.
    #[must_use]
    pub(crate) fn new(
        catalog: Arc<Catalog>,
        rotations: Rotations,
        pace: Arc<Pace>,
        tasks: TaskTracker,
    ) -> Self {
        Self {
            catalog,
            rotations,
            pace,
            tasks,
            attempts: Arc::default(),
            places: Arc::default(),
        }
    }

    /// Starts due rotations until `shutdown`.
    pub(crate) async fn run(self, shutdown: CancellationToken) {
        let mut ticks = tokio::time::interval(EVERY);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                _ = ticks.tick() => self.start_due(),
                () = shutdown.cancelled() => return,
            }
        }
    }

    fn start_due(&self) {
        let now = self.pace.now();
        let mut all_due = HashSet::new();
        for served in self.catalog.list() {
            let due = rotation::due_rotations(&served.journal().state().keyring, now);
            for key_id in due {
                all_due.insert(key_id);
                self.start(&served, key_id, now);
            }
        }
        // A key that is no longer due starts without failures when it is due again.
        self.lock()
            .retain(|key_id, attempt| attempt.is_running || all_due.contains(key_id));
    }

    /// Starts a rotation, unless the key has to wait or its sink has no free place.
    fn start(&self, served: &Arc<ServedKeyring>, key_id: KeyId, now: Timestamp) {
        if !self.may_start(key_id) {
            return;
        }
        let Some((spec, sink)) = spec(served, key_id, now) else {
            return;
        };
        let Ok(place) = self.places_of(&sink).try_acquire_owned() else {
            return;
        };
        self.lock().entry(key_id).or_default().is_running = true;
        let schedule = self.clone();
        let served = Arc::clone(served);
        self.tasks.spawn(async move {
            let running = Running {
                schedule: &schedule,
                key_id: spec.key_id,
            };
            schedule.rotate(&served, &spec).await;
            drop((running, place));
        });
    }

    async fn rotate(&self, served: &ServedKeyring, spec: &RotationSpec) {
        // No caller reads the progress; the receiver lives as long as the rotation.
        let (progress, mut unread) = mpsc::channel(1);
        let rotate = self.rotations.start_rotation(ACTOR, spec, &progress);
        tokio::pin!(rotate);
        let rotated = loop {
            tokio::select! {
                rotated = &mut rotate => break rotated,
                _ = unread.recv() => {}
            }
        };
        match rotated {
            Ok(done) => {
                self.lock().remove(&spec.key_id);
                tracing::info!(
                    auth.keyring = %served.name(),
                    auth.key.id = %spec.key_id,
                    auth.key.version = done.version.version.get(),
                    sidecars = done.barrier.total,
                    "scheduled rotation handed over"
                );
            }
            Err(RotationError::Stopping) => {}
            Err(RotationError::Commit(CommitError::Refused(refusal)))
                if !self.is_due(served, spec) =>
            {
                self.lock().remove(&spec.key_id);
                tracing::info!(
                    auth.keyring = %served.name(),
                    auth.key.id = %spec.key_id,
                    reason = %refusal,
                    "scheduled rotation not needed: another rotation of the key was first"
                );
            }
            Err(error) => {
                let wait = self.note_failure(spec.key_id);
                tracing::error!(
                    auth.keyring = %served.name(),
                    auth.key.id = %spec.key_id,
                    error = &error as &dyn std::error::Error,
                    retry_in_ms = wait.as_millis(),
                    "scheduled rotation not handed over"
                );
            }
        }
    }

    /// Returns whether the rotation is still due.
    fn is_due(&self, served: &ServedKeyring, spec: &RotationSpec) -> bool {
        let state = served.journal().state();
        let key = state.keyring.key(spec.key_id);
        key.is_ok_and(|key| rotation::is_rotation_due(&state.keyring, key, self.pace.now()))
    }

    fn places_of(&self, sink: &SinkName) -> Arc<Semaphore> {
        let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
        let places = places.entry(sink.clone());
        Arc::clone(places.or_insert_with(|| Arc::new(Semaphore::new(MAX_RUNNING))))
    }

    fn may_start(&self, key_id: KeyId) -> bool {
        let now = self.catalog.clock().boot();
        self.lock()
            .get(&key_id)
            .is_none_or(|attempt| !attempt.is_running && attempt.retry_at <= now)
    }

    fn note_failure(&self, key_id: KeyId) -> Duration {
        let now = self.catalog.clock().boot();
        let mut attempts = self.lock();
        let attempt = attempts.entry(key_id).or_default();
        let factor = 1_u32.checked_shl(attempt.failures).unwrap_or(u32::MAX);
        let wait = RETRY.0.saturating_mul(factor).min(RETRY.1);
        *attempt = Attempt {
            is_running: false,
            failures: attempt.failures.saturating_add(1),
            retry_at: now.saturating_add(wait),
        };
        wait
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<KeyId, Attempt>> {
        self.attempts.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        let is_running = |attempt: &Attempt| attempt.is_running;
        if self
            .schedule
            .lock()
            .get(&self.key_id)
            .is_some_and(is_running)
        {
            self.schedule.note_failure(self.key_id);
        }
    }
}

/// Returns the parameters of a scheduled rotation and its sink. None when the key's policy has
/// changed and names no sink.
fn spec(served: &ServedKeyring, key_id: KeyId, now: Timestamp) -> Option<(RotationSpec, SinkName)> {
    let state = served.journal().state();
    let key = state.keyring.key(key_id).ok()?;
    let sink = state.keyring.policy_of(key).sink.clone()?;
    let spec = RotationSpec {
        key_id,
        id: None,
        old_ends: OldEnds::AfterOverlap(None),
        lifetime: None,
        patience: Patience::default(),
        sink: Some(sink.clone()),
        due_at: Some(now),
    };
    Some((spec, sink))
}

#[cfg(test)]
mod tests;
