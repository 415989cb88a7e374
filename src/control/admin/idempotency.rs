//! Calls that hand out a secret. Each is carried out to its end once, whether its caller waits for
//! it or not.

use prost::Message;
use tonic::{Status, metadata::MetadataValue};

use super::{AdminApi, error, field};
use crate::{
    control::{
        calls::{CallIdentity, ReusedError, Turn},
        spans,
        token::AdminCaller,
    },
    key::IdempotencyKey,
    proto::{COMMITTED, OUTCOME, WITHDRAWN},
};

impl AdminApi {
    /// Returns the identity of a call; none if it has no idempotency key.
    pub(super) fn identify(
        &self,
        caller: &AdminCaller,
        method: &'static str,
        key: &str,
        request: &impl Message,
    ) -> Result<Option<CallIdentity>, Status> {
        if key.is_empty() {
            return Ok(None);
        }
        let key: IdempotencyKey = field::parse("idempotency_key", key)?;
        Ok(Some(self.calls.identify(key, caller, method, request)))
    }

    /// Waits until no equal call is under way.
    pub(super) async fn turn(&self, identity: Option<CallIdentity>) -> Result<Turn<'_>, Status> {
        self.calls.turn(identity).await.map_err(reused)
    }

    /// Carries out a call in a task of its own. A caller that disconnects does not stop it.
    pub(super) async fn carry_out<T: Send + 'static>(
        &self,
        call: impl Future<Output = Result<T, Status>> + Send + 'static,
    ) -> Result<T, Status> {
        let task = self.tasks.spawn(spans::carried(call));
        task.await
            .unwrap_or_else(|_| Err(Status::aborted("the control plane is stopping")))
    }
}

/// Returns the status of an idempotency key that belongs to another call.
pub(super) fn reused(problem: ReusedError) -> Status {
    error::invalid("idempotency_key", problem)
}

/// Marks an error: nothing was handed out, and nothing will be.
pub(super) fn withdrawn(status: Status) -> Status {
    with_outcome(status, WITHDRAWN)
}

/// Marks an error: the change is committed, but not every sidecar has confirmed it.
pub(super) fn committed(status: Status) -> Status {
    with_outcome(status, COMMITTED)
}

fn with_outcome(mut status: Status, outcome: &'static str) -> Status {
    let outcome = MetadataValue::from_static(outcome);
    status.metadata_mut().insert(OUTCOME, outcome);
    status
}
