//! The admin API: what operators and the command line ask of a control plane.
//!
//! Each handler states the permission that it needs, in its own first line; a call without a token that has it ends
//! there. The nouns are in files of their own, [`wire`] translates to and from messages, [`error`] to statuses.

mod audit;
mod consumer;
mod error;
mod fleet;
mod key;
mod keyring;
mod rotation;
mod token;
mod wire;

use std::{pin::Pin, sync::Arc};

use futures_util::Stream;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Request, Response, Status};

use super::{
    catalog::Catalog,
    fleet::Fleet,
    rotation::Rotations,
    token::{Caller, Permission, Tokens, bearer},
    usage::UsageBook,
};
use crate::proto::admin::{
    self as api,
    admin_server::{Admin, AdminServer},
};

/// Serves `relatch.admin.v1.Admin`.
#[derive(Clone, Debug)]
pub struct AdminApi {
    catalog: Arc<Catalog>,
    fleet: Arc<Fleet>,
    usage: Arc<UsageBook>,
    tokens: Arc<Tokens>,
    rotations: Rotations,
    tasks: TaskTracker,
}

type Streamed<T> = Pin<Box<dyn Stream<Item = Result<T, Status>> + Send + 'static>>;

/// The largest request: a key with a hundred long scopes, with room to spare.
const MAX_MESSAGE: usize = 64 << 10;

impl AdminApi {
    /// An API over a catalog and its fleet. Rotations run as `tasks`, and wait for sidecars no longer after `stop`.
    #[must_use]
    pub fn new(
        catalog: Arc<Catalog>,
        fleet: Arc<Fleet>,
        usage: Arc<UsageBook>,
        tokens: Arc<Tokens>,
        tasks: TaskTracker,
        stop: CancellationToken,
    ) -> Self {
        let rotations = Rotations::new(Arc::clone(&catalog), Arc::clone(&fleet), stop);
        Self {
            catalog,
            fleet,
            usage,
            tokens,
            rotations,
            tasks,
        }
    }

    /// The service to add to a server.
    #[must_use]
    pub fn into_service(self) -> AdminServer<Self> {
        AdminServer::new(self).max_decoding_message_size(MAX_MESSAGE)
    }

    /// Who makes the call, if that is permitted.
    fn permit<T>(&self, request: &Request<T>, permission: Permission) -> Result<Caller, Status> {
        let caller = request
            .metadata()
            .get("authorization")
            .and_then(|value| value.to_str().ok())
            .and_then(bearer)
            .and_then(|token| self.tokens.verify(&token))
            .ok_or_else(|| {
                Status::unauthenticated(
                    "give an admin token that is valid: --token-file or RELATCH_TOKEN_FILE",
                )
            })?;
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

    async fn create_token(
        &self,
        request: Request<api::CreateTokenRequest>,
    ) -> Result<Response<api::CreateTokenResponse>, Status> {
        let caller = self.permit(&request, Permission::Administer)?;
        self.make_token(caller, request.into_inner())
            .await
            .map(Response::new)
    }

    async fn list_tokens(
        &self,
        request: Request<api::ListTokensRequest>,
    ) -> Result<Response<api::ListTokensResponse>, Status> {
        self.permit(&request, Permission::Administer)?;
        Ok(Response::new(self.all_tokens()))
    }

    async fn end_token(
        &self,
        request: Request<api::EndTokenRequest>,
    ) -> Result<Response<api::EndTokenResponse>, Status> {
        let caller = self.permit(&request, Permission::Administer)?;
        self.finish_token(caller, request.into_inner())
            .await
            .map(Response::new)
    }

    async fn create_keyring(
        &self,
        request: Request<api::CreateKeyringRequest>,
    ) -> Result<Response<api::Keyring>, Status> {
        let caller = self.permit(&request, Permission::Administer)?;
        self.make_keyring(caller, request.into_inner())
            .await
            .map(Response::new)
    }

    async fn list_keyrings(
        &self,
        request: Request<api::ListKeyringsRequest>,
    ) -> Result<Response<api::ListKeyringsResponse>, Status> {
        self.permit(&request, Permission::Read)?;
        Ok(Response::new(self.all_keyrings()))
    }

    async fn get_keyring(
        &self,
        request: Request<api::GetKeyringRequest>,
    ) -> Result<Response<api::Keyring>, Status> {
        self.permit(&request, Permission::Read)?;
        self.one_keyring(&request.into_inner()).map(Response::new)
    }

    async fn confirm_snapshot(
        &self,
        request: Request<api::ConfirmSnapshotRequest>,
    ) -> Result<Response<api::ConfirmSnapshotResponse>, Status> {
        let caller = self.permit(&request, Permission::Administer)?;
        self.confirm_items(&caller, &request.into_inner())
            .map(Response::new)
    }

    async fn create_consumer(
        &self,
        request: Request<api::CreateConsumerRequest>,
    ) -> Result<Response<api::Consumer>, Status> {
        let caller = self.permit(&request, Permission::Issue)?;
        self.make_consumer(caller, request.into_inner())
            .await
            .map(Response::new)
    }

    async fn list_consumers(
        &self,
        request: Request<api::ListConsumersRequest>,
    ) -> Result<Response<api::ListConsumersResponse>, Status> {
        self.permit(&request, Permission::Read)?;
        self.all_consumers(&request.into_inner()).map(Response::new)
    }

    async fn get_consumer(
        &self,
        request: Request<api::GetConsumerRequest>,
    ) -> Result<Response<api::Consumer>, Status> {
        self.permit(&request, Permission::Read)?;
        self.one_consumer(&request.into_inner()).map(Response::new)
    }

    async fn create_key(
        &self,
        request: Request<api::CreateKeyRequest>,
    ) -> Result<Response<api::IssuedKey>, Status> {
        let caller = self.permit(&request, Permission::Issue)?;
        self.make_key(&caller, request.into_inner(), None)
            .await
            .map(Response::new)
    }

    async fn import_key(
        &self,
        request: Request<api::ImportKeyRequest>,
    ) -> Result<Response<api::IssuedKey>, Status> {
        let caller = self.permit(&request, Permission::Issue)?;
        self.take_key(&caller, request.into_inner())
            .await
            .map(Response::new)
    }

    async fn list_keys(
        &self,
        request: Request<api::ListKeysRequest>,
    ) -> Result<Response<api::ListKeysResponse>, Status> {
        self.permit(&request, Permission::Read)?;
        self.all_keys(&request.into_inner()).map(Response::new)
    }

    async fn get_key(
        &self,
        request: Request<api::GetKeyRequest>,
    ) -> Result<Response<api::Key>, Status> {
        self.permit(&request, Permission::Read)?;
        self.one_key(&request.into_inner()).map(Response::new)
    }

    async fn start_rotation(
        &self,
        request: Request<api::StartRotationRequest>,
    ) -> Result<Response<Self::StartRotationStream>, Status> {
        let caller = self.permit(&request, Permission::Issue)?;
        self.rotate(caller, &request.into_inner())
            .map(Response::new)
    }

    async fn revoke(
        &self,
        request: Request<api::RevokeRequest>,
    ) -> Result<Response<Self::RevokeStream>, Status> {
        let caller = self.permit(&request, Permission::Revoke)?;
        self.end_versions(caller, request.into_inner())
            .await
            .map(Response::new)
    }

    async fn get_fleet(
        &self,
        request: Request<api::GetFleetRequest>,
    ) -> Result<Response<api::GetFleetResponse>, Status> {
        self.permit(&request, Permission::Read)?;
        self.all_sidecars(&request.into_inner()).map(Response::new)
    }

    async fn list_audit(
        &self,
        request: Request<api::ListAuditRequest>,
    ) -> Result<Response<api::ListAuditResponse>, Status> {
        self.permit(&request, Permission::Read)?;
        self.audit_entries(&request.into_inner())
            .await
            .map(Response::new)
    }

    async fn verify_audit(
        &self,
        request: Request<api::VerifyAuditRequest>,
    ) -> Result<Response<api::VerifyAuditResponse>, Status> {
        self.permit(&request, Permission::Read)?;
        self.audit_verdicts(&request.into_inner())
            .await
            .map(Response::new)
    }
}
