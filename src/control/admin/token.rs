//! Admin tokens.

use tonic::Status;

use super::{AdminApi, error, wire};
use crate::{control::token::Caller, proto::admin as api};

impl AdminApi {
    pub(super) async fn make_token(
        &self,
        caller: Caller,
        request: api::CreateTokenRequest,
    ) -> Result<api::CreateTokenResponse, Status> {
        let role = wire::role(request.role)?;
        let expires_in = wire::duration("expires_in", request.expires_in)?;
        let (token, secret) = self
            .tokens
            .create(&caller.actor, &request.name, role, expires_in)
            .await
            .map_err(error::commit)?;
        tracing::info!(actor = caller.actor, token = %token.id, %role, "admin token created");
        Ok(api::CreateTokenResponse {
            token: Some(wire::token(&token)),
            secret: secret.expose().to_owned(),
        })
    }

    pub(super) fn all_tokens(&self) -> api::ListTokensResponse {
        api::ListTokensResponse {
            tokens: self.tokens.list().iter().map(wire::token).collect(),
        }
    }

    pub(super) async fn finish_token(
        &self,
        caller: Caller,
        request: api::EndTokenRequest,
    ) -> Result<api::EndTokenResponse, Status> {
        let id = wire::field("id", &request.id)?;
        let token = self
            .tokens
            .end(&caller.actor, id)
            .await
            .map_err(error::commit)?;
        tracing::info!(actor = caller.actor, token = %token.id, "admin token ended");
        Ok(api::EndTokenResponse {
            token: Some(wire::token(&token)),
        })
    }
}
