//! The admin API: serves the calls of operators and of the command line.
//!
//! Each handler states the permission that it needs in its first line; a call without a token with
//! that permission ends there. Each noun has a file of its own. [`field`] reads the fields of
//! requests, [`messages`] creates the messages of answers, and [`error`] creates statuses.

mod audit;
mod call;
mod consumer;
mod error;
mod explain;
mod field;
mod fleet;
mod idempotency;
mod issue;
mod key;
mod keyring;
mod messages;
mod overlap;
mod policy;
mod progress;
mod rotation;
mod token;
mod usage;
mod webhook;

use std::{pin::Pin, sync::Arc};

use futures_util::Stream;
use tokio_util::task::TaskTracker;
use tonic::{Request, Response, Status};

use super::{
    calls::Calls,
    catalog::Catalog,
    fleet::Fleet,
    pace::Pace,
    rotation::Rotations,
    served::ServedKeyring,
    spans,
    token::{AdminCaller, Permission, Tokens, bearer},
    usage::UsageBook,
    webhook::Webhooks,
};
use crate::{
    key::KeyId,
    proto::admin::{
        self as api,
        admin_server::{Admin, AdminServer},
    },
};

pub(crate) use call::TracedCalls;

/// Serves `relatch.admin.v1.Admin`.
#[derive(Clone, Debug)]
pub(crate) struct AdminApi {
    catalog: Arc<Catalog>,
    fleet: Arc<Fleet>,
    usage: Arc<UsageBook>,
    tokens: Arc<Tokens>,
    rotations: Rotations,
    webhooks: Arc<Webhooks>,
    pace: Arc<Pace>,
    calls: Arc<Calls>,
    tasks: TaskTracker,
}

/// The parts of a control plane that the API uses.
#[derive(Debug)]
pub(crate) struct AdminParts {
    /// The keyrings.
    pub(crate) catalog: Arc<Catalog>,
    /// The sidecars.
    pub(crate) fleet: Arc<Fleet>,
    /// The use of keys.
    pub(crate) usage: Arc<UsageBook>,
    /// The admin tokens that permit calls.
    pub(crate) tokens: Arc<Tokens>,
    /// The rotations, which wait for sidecars.
    pub(crate) rotations: Rotations,
    /// The webhooks that receive events.
    pub(crate) webhooks: Arc<Webhooks>,
    /// The time by which planned ends come.
    pub(crate) pace: Arc<Pace>,
    /// The answers that can be returned again.
    pub(crate) calls: Arc<Calls>,
}

type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send + 'static>>;

/// The largest request: a key with a hundred long scopes, with room to spare.
const MAX_MESSAGE: usize = 64 << 10;

impl AdminApi {
    /// Returns an API over the parts of a control plane. Rotations run as `tasks`.
    #[must_use]
    pub(crate) fn new(parts: AdminParts, tasks: TaskTracker) -> Self {
        let AdminParts {
            catalog,
            fleet,
            usage,
            tokens,
            rotations,
            webhooks,
            pace,
            calls,
        } = parts;
        Self {
            catalog,
            fleet,
            usage,
            tokens,
            rotations,
            webhooks,
            pace,
            calls,
            tasks,
        }
    }

    /// Returns the service to add to a server.
    #[must_use]
    pub(crate) fn into_service(self) -> TracedCalls<AdminServer<Self>> {
        let tracer = self.catalog.tracer().clone();
        let service = AdminServer::new(self).max_decoding_message_size(MAX_MESSAGE);
        TracedCalls::new(service, tracer)
    }

    /// Returns the keyring that contains a key.
    fn holding(&self, key_id: KeyId) -> Result<Arc<ServedKeyring>, Status> {
        self.catalog
            .holding(key_id)
            .map_err(|refusal| error::refused(&refusal))
    }

    /// Returns the caller, if its token permits the call.
    fn permit<T>(
        &self,
        request: &Request<T>,
        permission: Permission,
    ) -> Result<AdminCaller, Status> {
        let caller = request
            .metadata()
            .get("authorization")
            .and_then(|value| value.to_str().ok())
            .and_then(bearer)
            .and_then(|token| self.tokens.verify(&token))
            .ok_or_else(|| {
                Status::unauthenticated(
                    "the admin token was rejected: it is expired, deleted, or of another control plane",
                )
            })?;
        spans::tell_actor(&caller.actor);
        if caller.role.permits(permission) {
            Ok(caller)
        } else {
            Err(Status::permission_denied(format!(
                "a token with role {} does not permit this; see `relatch token create --help`",
                caller.role
            )))
        }
    }
}

#[tonic::async_trait]
impl Admin for AdminApi {
    type StartRotationStream = Streamed<api::StartRotationResponse>;
    type RevokeStream = Streamed<api::RevokeResponse>;
    type RollBackStream = Streamed<api::RollBackResponse>;

    async fn create_token(
        &self,
        request: Request<api::CreateTokenRequest>,
    ) -> Result<Response<api::CreateTokenResponse>, Status> {
        let caller = self.permit(&request, Permission::Administer)?;
        self.create_token(caller, request.into_inner())
            .await
            .map(Response::new)
    }

    async fn list_tokens(
        &self,
        request: Request<api::ListTokensRequest>,
    ) -> Result<Response<api::ListTokensResponse>, Status> {
        self.permit(&request, Permission::Administer)?;
        Ok(Response::new(self.list_tokens()))
    }

    async fn end_token(
        &self,
        request: Request<api::EndTokenRequest>,
    ) -> Result<Response<api::EndTokenResponse>, Status> {
        let caller = self.permit(&request, Permission::Administer)?;
        self.end_token(caller, request.into_inner())
            .await
            .map(Response::new)
    }

    async fn create_keyring(
        &self,
        request: Request<api::CreateKeyringRequest>,
    ) -> Result<Response<api::Keyring>, Status> {
        let caller = self.permit(&request, Permission::Administer)?;
        self.create_keyring(caller, request.into_inner())
            .await
            .map(Response::new)
    }

    async fn list_keyrings(
        &self,
        request: Request<api::ListKeyringsRequest>,
    ) -> Result<Response<api::ListKeyringsResponse>, Status> {
        self.permit(&request, Permission::Read)?;
        Ok(Response::new(self.list_keyrings()))
    }

    async fn get_keyring(
        &self,
        request: Request<api::GetKeyringRequest>,
    ) -> Result<Response<api::Keyring>, Status> {
        self.permit(&request, Permission::Read)?;
        self.get_keyring(&request.into_inner()).map(Response::new)
    }

    async fn confirm_snapshot(
        &self,
        request: Request<api::ConfirmSnapshotRequest>,
    ) -> Result<Response<api::ConfirmSnapshotResponse>, Status> {
        let caller = self.permit(&request, Permission::Administer)?;
        self.confirm_snapshot(&caller, &request.into_inner())
            .map(Response::new)
    }

    async fn create_consumer(
        &self,
        request: Request<api::CreateConsumerRequest>,
    ) -> Result<Response<api::Consumer>, Status> {
        let caller = self.permit(&request, Permission::Issue)?;
        self.create_consumer(caller, request.into_inner())
            .await
            .map(Response::new)
    }

    async fn list_consumers(
        &self,
        request: Request<api::ListConsumersRequest>,
    ) -> Result<Response<api::ListConsumersResponse>, Status> {
        self.permit(&request, Permission::Read)?;
        self.list_consumers(&request.into_inner())
            .map(Response::new)
    }

    async fn get_consumer(
        &self,
        request: Request<api::GetConsumerRequest>,
    ) -> Result<Response<api::Consumer>, Status> {
        self.permit(&request, Permission::Read)?;
        self.get_consumer(&request.into_inner()).map(Response::new)
    }

    async fn create_key(
        &self,
        request: Request<api::CreateKeyRequest>,
    ) -> Result<Response<api::IssuedKey>, Status> {
        let caller = self.permit(&request, Permission::Issue)?;
        self.create_key(caller, request.into_inner())
            .await
            .map(Response::new)
    }

    async fn import_key(
        &self,
        request: Request<api::ImportKeyRequest>,
    ) -> Result<Response<api::IssuedKey>, Status> {
        let caller = self.permit(&request, Permission::Issue)?;
        self.import_key(caller, request.into_inner())
            .await
            .map(Response::new)
    }

    async fn list_keys(
        &self,
        request: Request<api::ListKeysRequest>,
    ) -> Result<Response<api::ListKeysResponse>, Status> {
        self.permit(&request, Permission::Read)?;
        self.list_keys(&request.into_inner()).map(Response::new)
    }

    async fn get_key(
        &self,
        request: Request<api::GetKeyRequest>,
    ) -> Result<Response<api::Key>, Status> {
        self.permit(&request, Permission::Read)?;
        self.get_key(&request.into_inner()).map(Response::new)
    }

    async fn start_rotation(
        &self,
        request: Request<api::StartRotationRequest>,
    ) -> Result<Response<Self::StartRotationStream>, Status> {
        let permission = if request.get_ref().emergency {
            Permission::Administer
        } else {
            Permission::Issue
        };
        let caller = self.permit(&request, permission)?;
        self.start_rotation(caller, &request.into_inner())
            .await
            .map(Response::new)
    }

    async fn revoke(
        &self,
        request: Request<api::RevokeRequest>,
    ) -> Result<Response<Self::RevokeStream>, Status> {
        let caller = self.permit(&request, Permission::Revoke)?;
        self.revoke(caller, request.into_inner())
            .await
            .map(Response::new)
    }

    async fn get_rotation(
        &self,
        request: Request<api::GetRotationRequest>,
    ) -> Result<Response<api::RotationStatus>, Status> {
        self.permit(&request, Permission::Read)?;
        self.get_rotation(request.get_ref()).map(Response::new)
    }

    async fn get_usage(
        &self,
        request: Request<api::GetUsageRequest>,
    ) -> Result<Response<api::KeyUsage>, Status> {
        self.permit(&request, Permission::Read)?;
        self.get_usage(request.get_ref()).map(Response::new)
    }

    async fn retire_version(
        &self,
        request: Request<api::RetireVersionRequest>,
    ) -> Result<Response<api::RetireVersionResponse>, Status> {
        // With force, it ends a version that may be in use, as a revocation does.
        let permission = if request.get_ref().force {
            Permission::Revoke
        } else {
            Permission::Issue
        };
        let caller = self.permit(&request, permission)?;
        self.retire_version(caller, request.into_inner())
            .await
            .map(Response::new)
    }

    async fn extend_overlap(
        &self,
        request: Request<api::ExtendOverlapRequest>,
    ) -> Result<Response<api::ExtendOverlapResponse>, Status> {
        let caller = self.permit(&request, Permission::Issue)?;
        self.extend_overlap(caller, request.into_inner())
            .await
            .map(Response::new)
    }

    async fn roll_back(
        &self,
        request: Request<api::RollBackRequest>,
    ) -> Result<Response<Self::RollBackStream>, Status> {
        let caller = self.permit(&request, Permission::Issue)?;
        self.roll_back(caller, request.into_inner())
            .await
            .map(Response::new)
    }

    async fn abort_rotation(
        &self,
        request: Request<api::AbortRotationRequest>,
    ) -> Result<Response<api::AbortRotationResponse>, Status> {
        let caller = self.permit(&request, Permission::Issue)?;
        self.abort_rotation(caller, request.into_inner())
            .await
            .map(Response::new)
    }

    async fn get_policy(
        &self,
        request: Request<api::GetPolicyRequest>,
    ) -> Result<Response<api::PolicyStatus>, Status> {
        self.permit(&request, Permission::Read)?;
        self.get_policy(request.into_inner()).map(Response::new)
    }

    async fn set_policy(
        &self,
        request: Request<api::SetPolicyRequest>,
    ) -> Result<Response<api::PolicyStatus>, Status> {
        let caller = self.permit(&request, Permission::Administer)?;
        self.set_policy(caller, request.into_inner())
            .await
            .map(Response::new)
    }

    async fn explain(
        &self,
        request: Request<api::ExplainRequest>,
    ) -> Result<Response<api::ExplainResponse>, Status> {
        self.permit(&request, Permission::Read)?;
        self.explain(request.get_ref()).map(Response::new)
    }

    async fn add_webhook(
        &self,
        request: Request<api::AddWebhookRequest>,
    ) -> Result<Response<api::AddWebhookResponse>, Status> {
        let caller = self.permit(&request, Permission::Administer)?;
        self.add_webhook(caller, request.into_inner())
            .await
            .map(Response::new)
    }

    async fn remove_webhook(
        &self,
        request: Request<api::RemoveWebhookRequest>,
    ) -> Result<Response<api::Webhook>, Status> {
        let caller = self.permit(&request, Permission::Administer)?;
        self.remove_webhook(caller, request.into_inner())
            .await
            .map(Response::new)
    }

    async fn test_webhook(
        &self,
        request: Request<api::TestWebhookRequest>,
    ) -> Result<Response<api::TestWebhookResponse>, Status> {
        let caller = self.permit(&request, Permission::Administer)?;
        self.test_webhook(caller, request.into_inner())
            .await
            .map(Response::new)
    }

    async fn list_webhooks(
        &self,
        request: Request<api::ListWebhooksRequest>,
    ) -> Result<Response<api::ListWebhooksResponse>, Status> {
        self.permit(&request, Permission::Read)?;
        self.list_webhooks(request.get_ref()).map(Response::new)
    }

    async fn list_deliveries(
        &self,
        request: Request<api::ListDeliveriesRequest>,
    ) -> Result<Response<api::ListDeliveriesResponse>, Status> {
        self.permit(&request, Permission::Read)?;
        self.list_deliveries(request.get_ref())
            .await
            .map(Response::new)
    }

    async fn get_fleet(
        &self,
        request: Request<api::GetFleetRequest>,
    ) -> Result<Response<api::GetFleetResponse>, Status> {
        self.permit(&request, Permission::Read)?;
        self.get_fleet(&request.into_inner()).map(Response::new)
    }

    async fn forget_sidecar(
        &self,
        request: Request<api::ForgetSidecarRequest>,
    ) -> Result<Response<api::ForgetSidecarResponse>, Status> {
        let caller = self.permit(&request, Permission::Administer)?;
        let request = request.into_inner();
        AdminApi::forget_sidecar(self, caller, request)
            .await
            .map(Response::new)
    }

    async fn list_audit(
        &self,
        request: Request<api::ListAuditRequest>,
    ) -> Result<Response<api::ListAuditResponse>, Status> {
        self.permit(&request, Permission::Read)?;
        self.list_audit(&request.into_inner())
            .await
            .map(Response::new)
    }

    async fn verify_audit(
        &self,
        request: Request<api::VerifyAuditRequest>,
    ) -> Result<Response<api::VerifyAuditResponse>, Status> {
        self.permit(&request, Permission::Read)?;
        self.verify_audit(&request.into_inner())
            .await
            .map(Response::new)
    }
}
