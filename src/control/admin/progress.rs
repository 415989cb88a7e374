//! Answers that wait for sidecars and report the progress.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use futures_util::StreamExt;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;

use super::{AdminApi, Streamed, error, field, messages};
use crate::{
    clock::BootTime,
    control::{
        rotation::{Goal, Patience, RotationProgress},
        served::ServedKeyring,
        spans,
        token::TokenChange,
    },
    key::{KeyId, KeyringName},
    proto::admin as api,
    serving::{Barrier, RunKey, Target},
};

/// The longest timeout: a caller may not keep a version staged for longer.
const MAX_TIMEOUT: Duration = Duration::from_hours(24);
/// The most messages of progress that wait for a caller that reads slowly; more are skipped.
pub(super) const MAX_PROGRESS: usize = 16;

/// A commit whose way to all sidecars can be followed.
#[derive(Clone)]
pub(super) struct Underway {
    /// The keyring of the commit.
    pub(super) served: Arc<ServedKeyring>,
    /// The state that every sidecar is to reach.
    pub(super) target: Target,
    /// The time at which the call began.
    pub(super) began: BootTime,
    /// Whether the call committed anything; if not, it waits for an earlier commit.
    pub(super) is_new: bool,
}

/// The progress of a commit, as messages report it.
pub(super) struct CommitProgress {
    /// The sidecars that have reached the target, and those that have not.
    pub(super) barrier: api::Barrier,
    /// Whether this is the last message.
    pub(super) done: bool,
    /// The time from the commit to the last ack; only in the last message of a wait.
    pub(super) propagation: Option<prost_types::Duration>,
}

impl AdminApi {
    /// Reports a commit: at once, or until every sidecar has confirmed it, if `wait` says for how
    /// long to wait.
    pub(super) fn tell_progress<T: Send + 'static>(
        &self,
        underway: Underway,
        wait: Option<Patience>,
        message: impl Fn(CommitProgress) -> T + Clone + Send + 'static,
    ) -> Streamed<T> {
        let Underway {
            served,
            target,
            began,
            is_new,
        } = underway;
        let without = wait.as_ref().map(|patience| &patience.without);
        let nobody = BTreeSet::new();
        let without = without.unwrap_or(&nobody);
        let now = (self.fleet).barrier(served.name(), served.epoch(), target, without);
        let Some(patience) = wait else {
            let only = message(CommitProgress::under_way(&now, true));
            return Box::pin(futures_util::stream::iter([Ok(only)]));
        };
        let first = message(CommitProgress::under_way(&now, false));
        let (progress, steps) = mpsc::channel(MAX_PROGRESS);
        let (outcome, last) = tokio::sync::oneshot::channel();
        let (api, tell) = (self.clone(), message.clone());
        self.tasks.spawn(spans::carried(async move {
            let goal = Goal {
                served: &served,
                target,
                committed_at: is_new.then_some(began),
                patience: &patience,
            };
            let waited = api.rotations.wait(&goal, &progress).await;
            let propagation = api.catalog.clock().boot().saturating_since(began);
            // The caller may have left; the commit stands.
            let _ = outcome.send(waited.map_err(error::rotation).map(|barrier| {
                tell(CommitProgress {
                    propagation: messages::elapsed(propagation),
                    ..CommitProgress::under_way(&barrier, true)
                })
            }));
        }));
        let steps = ReceiverStream::new(steps).filter_map(move |step| {
            let told = match step {
                RotationProgress::Waiting(barrier) => {
                    Some(Ok(message(CommitProgress::under_way(&barrier, false))))
                }
                RotationProgress::Staged { .. } => None,
            };
            std::future::ready(told)
        });
        let last = futures_util::stream::once(async {
            last.await
                .unwrap_or_else(|_| Err(Status::aborted("the control plane is stopping")))
        });
        Box::pin(
            futures_util::stream::iter([Ok(first)])
                .chain(steps)
                .chain(last),
        )
    }
}

impl CommitProgress {
    fn under_way(barrier: &Barrier, done: bool) -> Self {
        Self {
            barrier: messages::barrier(barrier),
            done,
            propagation: None,
        }
    }
}

impl AdminApi {
    /// Returns how long to wait for all sidecars that may serve a keyring, and which of the
    /// sidecars that exist now are passed by.
    pub(super) fn patience(
        &self,
        timeout: Option<prost_types::Duration>,
        pass_by: Option<api::PassBy>,
    ) -> Result<Patience, Status> {
        let timeout = field::duration("timeout", timeout)?;
        if timeout.is_some_and(|timeout| timeout > MAX_TIMEOUT) {
            return Err(error::invalid("timeout", "wait for at most one day"));
        }
        let api::PassBy { nodes, lost } = pass_by.unwrap_or_default();
        let mut without = BTreeSet::new();
        if lost || !nodes.is_empty() {
            let members = self.fleet.members();
            for node in &nodes {
                if !members.iter().any(|(key, _)| key.node == *node) {
                    let problem =
                        format!("no sidecar {node} may serve; `relatch fleet` lists them");
                    return Err(error::invalid("pass_by.nodes", problem));
                }
            }
            let passed = members
                .into_iter()
                .filter(|(key, run)| nodes.contains(&key.node) || (lost && !run.is_connected()));
            without.extend(passed.map(|(key, _)| key));
        }
        Ok(Patience { timeout, without })
    }

    /// Notes in the audit log for which sidecars a call does not wait.
    pub(super) async fn note_passed_by(
        &self,
        actor: &str,
        call: &str,
        keyring: &KeyringName,
        key_id: Option<KeyId>,
        patience: &Patience,
    ) -> Result<(), Status> {
        if patience.without.is_empty() {
            return Ok(());
        }
        let sidecars: Vec<RunKey> = patience.without.iter().cloned().collect();
        let named: Vec<&str> = sidecars.iter().map(|key| key.node.as_str()).collect();
        tracing::warn!(
            actor,
            call,
            auth.keyring = %keyring,
            sidecars = named.join(", "),
            "a call does not wait for sidecars that may serve"
        );
        let change = TokenChange::SidecarsPassedBy {
            sidecars,
            call: call.to_owned(),
            keyring: keyring.clone(),
            key_id,
        };
        let noted = self.tokens.note(actor, change).await;
        noted.map_err(error::commit)
    }
}
