//! The wait until every sidecar that may serve a keyring has reached a point.

use std::{collections::BTreeSet, fmt::Write, time::Duration};

use tokio::{
    sync::{mpsc, watch},
    time::{Instant, MissedTickBehavior},
};

use super::{RotationError, RotationProgress, Rotations};
use crate::{
    clock::BootTime,
    control::{served::ServedKeyring, spans::whole},
    serving::{Barrier, Laggard, Presence, RunKey, Target},
};

/// How long a caller waits for sidecars, and which of them it passes by.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Patience {
    /// The longest wait in all. None: 1 minute for connected sidecars, and for the others until
    /// they may no longer serve.
    pub(crate) timeout: Option<Duration>,
    /// Runs that the wait passes by, although they may serve.
    pub(crate) without: BTreeSet<RunKey>,
}

/// A point that every sidecar that may serve a keyring has to reach.
#[derive(Debug)]
pub(crate) struct Goal<'a> {
    pub(crate) served: &'a ServedKeyring,
    pub(crate) target: Target,
    /// The time before the commit that the sidecars are to confirm. None: the commit is older than
    /// the call, and its propagation time is not measured.
    pub(crate) committed_at: Option<BootTime>,
    /// How long to wait, and which sidecars to pass by.
    pub(crate) patience: &'a Patience,
}

/// How long to wait for connected sidecars when the caller sets no timeout.
const CONNECTED_TIMEOUT: Duration = Duration::from_mins(1);
/// The wait for further confirmations after each one. The confirmations of a thousand sidecars
/// arrive within milliseconds of each other: a look at all sidecars after each of them would take
/// longer than their transmission.
const SETTLE: Duration = Duration::from_millis(2);
/// The shortest time between two progress reports of a wait. Each report names the missing
/// sidecars.
const TELL_EVERY: Duration = Duration::from_millis(100);
/// The interval at which a wait checks time limits: they pass without an event.
const BOUND_CHECK: Duration = Duration::from_millis(500);
/// The most missing sidecars that an error names.
const MAX_NAMED: usize = 10;

impl Patience {
    /// Returns the longest time that a wait takes, where no answer grants more than
    /// `max_serve_for`.
    pub(super) fn longest(&self, max_serve_for: Duration) -> Duration {
        self.timeout.unwrap_or_else(|| {
            // The granted time of a sidecar that is lost during the wait starts at that moment.
            CONNECTED_TIMEOUT + 2 * max_serve_for
        })
    }
}

impl Rotations {
    /// Waits until every sidecar that may serve has reached a goal, and reports the progress when
    /// it changes. Measures the propagation time of a commit that all of them have applied.
    ///
    /// # Errors
    ///
    /// When the wait takes longer than the goal allows, the receiver of `progress` is dropped, or
    /// the control plane stops.
    pub(crate) async fn wait(
        &self,
        goal: &Goal<'_>,
        progress: &mpsc::Sender<RotationProgress>,
    ) -> Result<Barrier, RotationError> {
        let span = self.catalog.tracer().begin("relatch.barrier");
        let mut has_waited_for_lost = false;
        let waited = self
            .wait_for(goal, progress, &mut has_waited_for_lost)
            .await;
        if let Ok(barrier) = &waited
            && let Some(at) = goal.committed_at
            // Without a sidecar there is no propagation, and the granted time of a lost sidecar is
            // not propagation time.
            && barrier.total > 0
            && !has_waited_for_lost
        {
            let took = self.catalog.clock().boot().saturating_since(at);
            self.catalog.metrics().propagated(took);
        }
        let barrier = match &waited {
            Ok(barrier) | Err(RotationError::TimedOut { barrier, .. }) => barrier.clone(),
            Err(_) => self.barrier(goal),
        };
        span.set("auth.keyring", goal.served.name().to_string());
        let revision = goal.target.revision();
        span.set("auth.keyring.revision", whole(revision.get()));
        span.set("relatch.sidecars.applied", whole(barrier.confirmed as u64));
        span.set("relatch.sidecars.total", whole(barrier.total as u64));
        match &waited {
            Ok(_) => span.set("relatch.barrier.outcome", "passed"),
            Err(error) => error.tell(&span, "relatch.barrier.outcome"),
        }
        waited
    }

    async fn wait_for(
        &self,
        goal: &Goal<'_>,
        progress: &mpsc::Sender<RotationProgress>,
        has_waited_for_lost: &mut bool,
    ) -> Result<Barrier, RotationError> {
        let began = self.catalog.clock().boot();
        let longest = goal.patience.longest(self.fleet.max_serve_for());
        let mut changes = self.fleet.watch();
        let deadline = tokio::time::sleep(longest);
        tokio::pin!(deadline);
        // Created before the loop: on a busy fleet, an event always comes before a new interval
        // fires.
        let mut bound_checks = tokio::time::interval(BOUND_CHECK);
        bound_checks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // The time since which a connected sidecar is missing.
        let mut missing_since = Some(began);
        let (mut told, mut tell_at) = (None, Instant::now());
        loop {
            changes.mark_unchanged();
            let news = self.reached(goal);
            if news.0 == news.1 {
                let barrier = self.barrier(goal);
                if barrier.is_passed() {
                    return Ok(barrier);
                }
            }
            if told != Some(news) && Instant::now() >= tell_at {
                told = Some(news);
                tell_at = Instant::now() + TELL_EVERY;
                // A caller that does not keep up receives the next report.
                let _ = progress.try_send(RotationProgress::Waiting(self.barrier(goal)));
            }
            tokio::select! {
                () = settled(&mut changes) => {}
                () = tokio::time::sleep_until(tell_at), if told != Some(news) => {}
                _ = bound_checks.tick() => {
                    let barrier = self.barrier(goal);
                    if !*has_waited_for_lost && barrier.laggards.iter().any(|l| l.rest.is_some()) {
                        *has_waited_for_lost = true;
                        tracing::warn!(
                            auth.keyring = %goal.served.name(),
                            auth.keyring.revision = goal.target.revision().get(),
                            missing = missing(&barrier),
                            "waiting for sidecars that may serve without a stream"
                        );
                    }
                    if goal.patience.timeout.is_none() {
                        self.lose_patience(barrier, &mut missing_since)?;
                    }
                }
                () = progress.closed() => return Err(RotationError::Abandoned),
                () = self.stop.cancelled() => return Err(RotationError::Stopping),
                () = &mut deadline => {
                    let barrier = self.barrier(goal);
                    let waited = self.catalog.clock().boot().saturating_since(began);
                    return Err(RotationError::TimedOut { barrier, waited });
                }
            }
        }
    }

    /// Fails when a connected sidecar has been missing for 1 minute. A lost sidecar is waited for
    /// until its time limit.
    fn lose_patience(
        &self,
        barrier: Barrier,
        missing_since: &mut Option<BootTime>,
    ) -> Result<(), RotationError> {
        let now = self.catalog.clock().boot();
        let mut laggards = barrier.laggards.iter();
        if !laggards.any(|laggard| laggard.rest.is_none()) {
            *missing_since = None;
            return Ok(());
        }
        let since = *missing_since.get_or_insert(now);
        let waited = now.saturating_since(since);
        if waited >= CONNECTED_TIMEOUT {
            return Err(RotationError::TimedOut { barrier, waited });
        }
        Ok(())
    }

    fn reached(&self, goal: &Goal<'_>) -> (usize, usize) {
        let Goal {
            served, patience, ..
        } = goal;
        let without = &patience.without;
        self.fleet
            .reached(served.name(), served.epoch(), goal.target, without)
    }

    fn barrier(&self, goal: &Goal<'_>) -> Barrier {
        let Goal {
            served, patience, ..
        } = goal;
        let without = &patience.without;
        self.fleet
            .barrier(served.name(), served.epoch(), goal.target, without)
    }
}

/// Waits for a change of the fleet, and for the changes that come with it.
async fn settled(changes: &mut watch::Receiver<u64>) {
    // The fleet outlives this wait.
    let _ = changes.changed().await;
    tokio::time::sleep(SETTLE).await;
}

/// Returns the missing sidecars, at most 10, each with its state and the time until which it may
/// serve.
pub(super) fn missing(barrier: &Barrier) -> String {
    let mut text = String::new();
    for (index, laggard) in barrier.laggards.iter().take(MAX_NAMED).enumerate() {
        if index > 0 {
            text.push_str("; ");
        }
        describe(&mut text, laggard);
    }
    if barrier.laggards.len() > MAX_NAMED {
        let more = barrier.laggards.len() - MAX_NAMED;
        let _ = write!(text, "; and {more} more");
    }
    text
}

fn describe(text: &mut String, laggard: &Laggard) {
    text.push_str(&laggard.key.node);
    let _ = match (laggard.presence, laggard.serves_until) {
        (Presence::Lost(since), Some(until)) => write!(
            text,
            ", lost since {since}, may serve its last revision until {until}"
        ),
        (Presence::Stopped(since), Some(until)) => write!(
            text,
            ", stopped at {since}, may start from its snapshot file until {until}"
        ),
        _ if laggard.lacks_disk => write!(text, ", connected, its snapshot file is behind"),
        _ if laggard.behind == 1 => write!(text, ", connected, 1 revision behind"),
        _ => write!(text, ", connected, {} revisions behind", laggard.behind),
    };
}
