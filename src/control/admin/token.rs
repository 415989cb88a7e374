//! Creates, lists and deletes admin tokens.

use tonic::Status;

use super::{AdminApi, error, field, messages};
use crate::{
    control::{
        calls::{CallId, CallIdentity, Kept},
        token::AdminCaller,
    },
    proto::admin as api,
};

impl AdminApi {
    pub(super) async fn create_token(
        &self,
        caller: AdminCaller,
        request: api::CreateTokenRequest,
    ) -> Result<api::CreateTokenResponse, Status> {
        let identity = self.identify(&caller, "CreateToken", &request.idempotency_key, &request)?;
        let api = self.clone();
        self.carry_out(async move { api.make_token_once(&caller, &request, identity).await })
            .await
    }

    async fn make_token_once(
        &self,
        caller: &AdminCaller,
        request: &api::CreateTokenRequest,
        identity: Option<CallIdentity>,
    ) -> Result<api::CreateTokenResponse, Status> {
        let role = field::role(request.role)?;
        let expires_in = field::duration("expires_in", request.expires_in)?;
        let mut turn = self.turn(identity).await?;
        let answer = |id, secret: Option<&str>| {
            let token = self.tokens.get(id);
            let token = token.map_err(|refusal| error::refused(&refusal))?;
            Ok(api::CreateTokenResponse {
                token: Some(messages::token(&token)),
                secret: secret.unwrap_or_default().to_owned(),
                secret_forgotten: secret.is_none(),
            })
        };
        if let Some(Kept::Token(id, secret)) = turn.kept() {
            return answer(*id, Some(secret.expose()));
        }
        let id = turn.id(|id| self.tokens.get(id).is_ok());
        let id = match id.map_err(|error| error::commit(error.into()))? {
            CallId::Used(id) => return answer(id, None),
            CallId::New(id) => id,
        };
        let (token, secret) = self
            .tokens
            .create_as(id, &caller.actor, &request.name, role, expires_in)
            .await
            .map_err(error::commit)?;
        tracing::info!(actor = caller.actor, token = %token.id, %role, "admin token created");
        let created = answer(id, Some(secret.expose()));
        turn.keep(Kept::Token(id, secret));
        created
    }

    pub(super) fn list_tokens(&self) -> api::ListTokensResponse {
        api::ListTokensResponse {
            tokens: self.tokens.list().iter().map(messages::token).collect(),
        }
    }

    pub(super) async fn end_token(
        &self,
        caller: AdminCaller,
        request: api::EndTokenRequest,
    ) -> Result<api::EndTokenResponse, Status> {
        let id = field::parse("id", &request.id)?;
        let token = self
            .tokens
            .end(&caller.actor, id)
            .await
            .map_err(error::commit)?;
        tracing::info!(actor = caller.actor, token = %token.id, "admin token deleted");
        Ok(api::EndTokenResponse {
            token: Some(messages::token(&token)),
        })
    }
}
