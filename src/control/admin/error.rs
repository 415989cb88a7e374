//! The statuses of failures. Each kind has one status code, so that callers can rely on the code.

use prost::Message as _;
use tonic::{Status, metadata::MetadataValue};

use super::messages;
use crate::{
    control::{
        journal::{CommitError, LogError},
        rotation::RotationError,
    },
    key::OperationRefusal,
    proto::MISSING,
    store::StoreError,
};

/// Returns the status of an invalid value in a request.
pub(super) fn invalid(field: &str, problem: impl std::fmt::Display) -> Status {
    Status::invalid_argument(format!("{field}: {problem}"))
}

pub(super) fn refused(refusal: &OperationRefusal) -> Status {
    let message = refusal.to_string();
    match refusal {
        OperationRefusal::NotFound { .. } | OperationRefusal::NoVersion(_) => {
            Status::not_found(message)
        }
        OperationRefusal::AlreadyExists { .. } | OperationRefusal::DoneBefore(_) => {
            Status::already_exists(message)
        }
        OperationRefusal::Invalid { .. } => Status::invalid_argument(message),
        OperationRefusal::Unsafe(_) | OperationRefusal::InUse { .. } => {
            Status::failed_precondition(message)
        }
    }
}

pub(super) fn commit(error: CommitError) -> Status {
    match error {
        CommitError::Refused(refusal) => refused(&refusal),
        CommitError::Contended => Status::aborted(error.to_string()),
        CommitError::Log(error) => log(&error),
        CommitError::Random(error) => Status::internal(error.to_string()),
    }
}

pub(super) fn log(error: &LogError) -> Status {
    tracing::error!(
        error = error as &dyn std::error::Error,
        "an admin call failed"
    );
    status(error)
}

fn status(error: &LogError) -> Status {
    match error {
        LogError::Store(error) => store(error),
        LogError::Shared(error) => status(error),
        LogError::Entry(error) => Status::invalid_argument(error.to_string()),
        LogError::Payload { .. } | LogError::Apply { .. } | LogError::OtherHistory { .. } => {
            Status::failed_precondition(error.to_string())
        }
    }
}

pub(super) fn store(error: &StoreError) -> Status {
    Status::unavailable(format!("the store: {error}"))
}

pub(super) fn rotation(error: RotationError) -> Status {
    match error {
        RotationError::Commit(error) => commit(error),
        RotationError::TimedOut { ref barrier, .. } => {
            let mut status = Status::deadline_exceeded(error.to_string());
            let missing = MetadataValue::from_bytes(&messages::missing(barrier).encode_to_vec());
            status.metadata_mut().insert_bin(MISSING, missing);
            status
        }
        RotationError::TakenBack => Status::failed_precondition(error.to_string()),
        RotationError::Abandoned => Status::cancelled(error.to_string()),
        RotationError::Stopping | RotationError::Unsure { .. } => {
            Status::unavailable(error.to_string())
        }
    }
}
