//! Creates, deletes, tests and lists webhooks, and lists deliveries.

use tonic::Status;

use super::{AdminApi, error, field, idempotency::reused, messages};
use crate::{
    control::{
        calls::{CallId, CallIdentity, Kept, ReusedError},
        token::AdminCaller,
        webhook::WebhookError,
    },
    key::{EventKind, KeyId, KeyringName, Webhook, WebhookId},
    outbound::OutboundUrl,
    proto::admin as api,
    store::{Delivery, DeliveryState},
};

/// The number of deliveries in an answer if the caller gives no limit.
const DEFAULT_LIMIT: usize = 100;
/// The most deliveries in one answer.
const MAX_LIMIT: usize = 1_000;

impl AdminApi {
    pub(super) async fn add_webhook(
        &self,
        caller: AdminCaller,
        request: api::AddWebhookRequest,
    ) -> Result<api::AddWebhookResponse, Status> {
        let identity = self.identify(&caller, "AddWebhook", &request.idempotency_key, &request)?;
        let api = self.clone();
        self.carry_out(async move { api.tell_of_events_once(&caller, request, identity).await })
            .await
    }

    async fn tell_of_events_once(
        &self,
        caller: &AdminCaller,
        request: api::AddWebhookRequest,
        identity: Option<CallIdentity>,
    ) -> Result<api::AddWebhookResponse, Status> {
        let served = self.served("keyring", &request.keyring)?;
        OutboundUrl::parse(&request.url).map_err(|problem| error::invalid("url", problem))?;
        let consumer = match request.consumer.as_str() {
            "" => None,
            text => Some(field::parse("consumer", text)?),
        };
        let events = request
            .events
            .iter()
            .map(|event| field::parse::<EventKind>("events", event))
            .collect::<Result<_, _>>()?;
        let mut turn = self.turn(identity).await?;
        let added = |id: KeyId| {
            let webhooks = &served.journal().state().keyring;
            webhooks.webhooks().get(&WebhookId::from(id)).cloned()
        };
        // The secret is derived from the id, so that it can be returned again at any time.
        let answer = |webhook: &Webhook| api::AddWebhookResponse {
            webhook: Some(describe(served.name(), webhook)),
            signing_secret: self.webhooks.secret(webhook.id).expose().to_string(),
        };
        if let Some(Kept::Webhook(id)) = turn.kept() {
            let keyring = &served.journal().state().keyring;
            return match keyring.webhooks().get(id) {
                Some(webhook) => Ok(answer(webhook)),
                None => Err(Status::failed_precondition(format!(
                    "this call added webhook {id} before, which was removed; to add another one, repeat the call with a new idempotency key"
                ))),
            };
        }
        let id = turn.id(|id| added(id).is_some());
        let id = match id.map_err(|error| error::commit(error.into()))? {
            CallId::New(id) => WebhookId::from(id),
            CallId::Used(id) => {
                let is_asked_for = |webhook: &Webhook| {
                    (&webhook.url, &webhook.consumer) == (&request.url, &consumer)
                        && (&webhook.events, webhook.allow_private)
                            == (&events, request.allow_private)
                };
                let webhook = added(id).filter(is_asked_for);
                let webhook = webhook.ok_or_else(|| reused(ReusedError))?;
                return Ok(answer(&webhook));
            }
        };
        let webhook = Webhook {
            id,
            url: request.url,
            consumer,
            events,
            allow_private: request.allow_private,
            created_at: self.catalog.clock().wall(),
        };
        self.catalog
            .commit(&served, &caller.actor, |keyring, _| {
                Ok((keyring.add_webhook(webhook.clone())?, ()))
            })
            .await
            .map_err(error::commit)?;
        tracing::info!(
            actor = caller.actor,
            auth.keyring = %served.name(),
            webhook = %id,
            "webhook added"
        );
        turn.keep(Kept::Webhook(id));
        Ok(answer(&webhook))
    }

    pub(super) async fn remove_webhook(
        &self,
        caller: AdminCaller,
        request: api::RemoveWebhookRequest,
    ) -> Result<api::Webhook, Status> {
        let served = self.served("keyring", &request.keyring)?;
        let id: WebhookId = field::parse("id", &request.id)?;
        let committed = self
            .catalog
            .commit(&served, &caller.actor, |keyring, _| {
                let changes = keyring.remove_webhook(id)?;
                Ok((changes, keyring.webhooks().get(&id).cloned()))
            })
            .await
            .map_err(error::commit)?;
        tracing::info!(
            actor = caller.actor,
            auth.keyring = %served.name(),
            webhook = %id,
            "webhook removed"
        );
        committed
            .value
            .map(|webhook| describe(served.name(), &webhook))
            .ok_or_else(|| Status::internal("nothing was removed"))
    }

    pub(super) async fn test_webhook(
        &self,
        caller: AdminCaller,
        request: api::TestWebhookRequest,
    ) -> Result<api::TestWebhookResponse, Status> {
        let served = self.served("keyring", &request.keyring)?;
        let id: WebhookId = field::parse("id", &request.id)?;
        let began = self.catalog.clock().boot();
        let tried = self
            .webhooks
            .test(served.name(), id)
            .await
            .map_err(|error| failed(&error))?;
        tracing::info!(
            actor = caller.actor,
            auth.keyring = %served.name(),
            webhook = %id,
            delivered = tried.error.is_none(),
            "test event sent to a webhook"
        );
        Ok(api::TestWebhookResponse {
            delivered: tried.error.is_none(),
            status: tried.status.map_or(0, u32::from),
            problem: tried.error.unwrap_or_default(),
            took: messages::elapsed(self.catalog.clock().boot().saturating_since(began)),
        })
    }

    pub(super) fn list_webhooks(
        &self,
        request: &api::ListWebhooksRequest,
    ) -> Result<api::ListWebhooksResponse, Status> {
        let keyrings = match request.keyring.as_str() {
            "" => self.catalog.list(),
            name => vec![self.served("keyring", name)?],
        };
        let webhooks = keyrings
            .iter()
            .flat_map(|served| {
                let state = served.journal().state();
                let webhooks = state.keyring.webhooks().values();
                webhooks
                    .map(|webhook| describe(served.name(), webhook))
                    .collect::<Vec<_>>()
            })
            .collect();
        Ok(api::ListWebhooksResponse { webhooks })
    }

    pub(super) async fn list_deliveries(
        &self,
        request: &api::ListDeliveriesRequest,
    ) -> Result<api::ListDeliveriesResponse, Status> {
        let served = self.served("keyring", &request.keyring)?;
        let limit = match usize::try_from(request.limit) {
            Ok(0) => DEFAULT_LIMIT,
            Ok(limit) => limit.min(MAX_LIMIT),
            Err(_) => MAX_LIMIT,
        };
        let webhook = match request.webhook_id.as_str() {
            "" => None,
            text => Some(field::parse::<WebhookId>("webhook_id", text)?),
        };
        let of: Vec<WebhookId> = if let Some(id) = webhook {
            vec![id]
        } else {
            let state = served.journal().state();
            state.keyring.webhooks().keys().copied().collect()
        };
        let mut deliveries = Vec::new();
        for id in of {
            let listed = self.webhooks.deliveries(served.name(), id, limit).await;
            deliveries.extend(listed.map_err(|error| failed(&error))?);
        }
        deliveries.sort_by_key(|delivery| std::cmp::Reverse(delivery.what.created_at));
        deliveries.truncate(limit);
        Ok(api::ListDeliveriesResponse {
            deliveries: deliveries.into_iter().map(delivery).collect(),
        })
    }
}

fn describe(keyring: &KeyringName, webhook: &Webhook) -> api::Webhook {
    api::Webhook {
        id: webhook.id.to_string(),
        keyring: keyring.to_string(),
        url: webhook.url.clone(),
        consumer: webhook
            .consumer
            .as_ref()
            .map_or_else(String::new, ToString::to_string),
        events: webhook.events.iter().map(ToString::to_string).collect(),
        allow_private: webhook.allow_private,
        created_at: messages::time(Some(webhook.created_at)),
    }
}

fn delivery(delivery: Delivery) -> api::Delivery {
    let (state, next) = match delivery.state {
        DeliveryState::Waiting => ("waiting", Some(delivery.next_attempt_at)),
        DeliveryState::Delivered => ("delivered", None),
        DeliveryState::GivenUp => ("given_up", None),
    };
    api::Delivery {
        webhook_id: delivery.what.webhook,
        event_id: delivery.what.event,
        event: delivery.what.kind,
        created_at: messages::time(Some(delivery.what.created_at)),
        state: state.to_owned(),
        attempts: delivery.attempts,
        next_attempt_at: messages::time(next),
        last_status: delivery.last_status.map_or(0, u32::from),
        last_problem: delivery.last_error.unwrap_or_default(),
    }
}

fn failed(failure: &WebhookError) -> Status {
    match failure {
        WebhookError::Refused(refusal) => error::refused(refusal),
        WebhookError::Store(store) => error::store(store),
    }
}
