//! The baseline `always-ok`: a simple authorization server, as one can write it in an afternoon.
//!
//! It decodes the whole request with Envoy's own declarations from `envoy-types`, reads one header, and adds two headers for
//! the upstream.

use anyhow::Result;
use envoy_types::{
    ext_authz::v3::{
        CheckRequestExt as _, CheckResponseExt as _, DeniedHttpResponseBuilder,
        OkHttpResponseBuilder,
    },
    pb::envoy::service::auth::v3::{
        CheckRequest, CheckResponse,
        authorization_server::{Authorization, AuthorizationServer},
    },
};
use tonic::{Request, Response, Status, service::Routes};

use crate::server;

/// Allows whoever has a key, whatever it is.
#[derive(Debug)]
struct AlwaysOk;

/// Serves until the process is killed.
///
/// # Errors
///
/// When no address can be bound.
pub(crate) fn serve() -> Result<()> {
    server::serve(Routes::new(AuthorizationServer::new(AlwaysOk)))
}

/// The answer to `request`.
pub(crate) fn answer(request: &CheckRequest) -> CheckResponse {
    let key = request
        .get_client_headers()
        .and_then(|headers| headers.get("x-api-key"));
    let Some(key) = key else {
        let mut response = CheckResponse::with_status(Status::unauthenticated("no key"));
        response.set_http_response(DeniedHttpResponseBuilder::new());
        return response;
    };
    let mut allowed = OkHttpResponseBuilder::new();
    allowed
        .add_header("x-consumer", "checkout", None, false)
        .add_header("x-key-length", key.len().to_string(), None, false);
    let mut response = CheckResponse::with_status(Status::ok("allowed"));
    response.set_http_response(allowed);
    response
}

#[tonic::async_trait]
impl Authorization for AlwaysOk {
    async fn check(
        &self,
        request: Request<CheckRequest>,
    ) -> Result<Response<CheckResponse>, Status> {
        Ok(Response::new(answer(request.get_ref())))
    }
}
