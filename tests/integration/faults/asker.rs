//! Asks sidecars again and again, and writes down what they answer.

use std::{sync::Arc, time::Duration};

use envoy_types::pb::envoy::service::auth::v3::{
    AttributeContext, CheckRequest, CheckResponse,
    attribute_context::{HttpRequest, Request as AttributesRequest},
    authorization_client::AuthorizationClient,
    check_response::HttpResponse,
};
use futures_util::future::join_all;
use tokio::sync::watch;
use tonic::transport::{Channel, Endpoint};

use super::{
    history::{Check, Outcome},
    record::Record,
};
use crate::support::envoy::AuthzAddress;

/// Asks one sidecar.
#[derive(Debug)]
pub(super) struct Asker {
    record: Arc<Record>,
    sidecar: usize,
    /// Where it is asked, which changes with each of its processes.
    address: watch::Receiver<AuthzAddress>,
    client: AuthorizationClient<Channel>,
}

/// Between two checks of one asker: enough of them, and time for what is asked.
pub(super) const PAUSE: Duration = Duration::from_millis(4);
/// A check that takes longer has failed. As long as the Envoys of the tests wait: on a busy machine a process may not run for
/// seconds.
const CHECK_TIMEOUT: Duration = Duration::from_secs(30);
/// How many checks are under way at once where every second one is given up.
const GIVEN_UP_AT_ONCE: u32 = 32;

impl Asker {
    pub(super) fn new(
        record: Arc<Record>,
        sidecar: usize,
        mut address: watch::Receiver<AuthzAddress>,
    ) -> Self {
        let client = checks(&address.borrow_and_update());
        Self {
            record,
            sidecar,
            address,
            client,
        }
    }

    /// Asks for one credential after the other until the run ends.
    pub(super) async fn run(mut self) {
        let mut turn = 0;
        while !self.record.has_stopped() {
            self.ask(turn).await;
            turn += 1;
            tokio::time::sleep(PAUSE).await;
        }
    }

    /// Asks many times at once over one connection, and gives every second call up after a moment. The others are judged
    /// as any check.
    pub(super) async fn give_up_every_second(&self, rounds: usize) {
        for _ in 0..rounds {
            join_all((0..GIVEN_UP_AT_ONCE).map(async |turn: u32| {
                let mut asker = Self {
                    record: Arc::clone(&self.record),
                    sidecar: self.sidecar,
                    address: self.address.clone(),
                    client: self.client.clone(),
                };
                if turn.is_multiple_of(2) {
                    asker.ask(turn as usize).await;
                } else {
                    let secret = self.record.secrets()[0].clone();
                    let call = asker.client.check(check_request(&secret));
                    let moment = PAUSE.mul_f64(0.05) * turn;
                    // Whether it was answered in time does not matter.
                    let _ = tokio::time::timeout(moment, call).await;
                }
            }))
            .await;
        }
    }

    /// Asks once.
    async fn ask(&mut self, turn: usize) {
        let (credential, secret) = self.record.choose(turn, self.sidecar);
        // Before the address is looked at: who is asked from now on is asked where it listens.
        let sent = self.record.now();
        if self.address.has_changed().unwrap_or(false) {
            self.client = checks(&self.address.borrow_and_update());
        }
        let answer = self.client.check(check_request(&secret)).await;
        let outcome = match answer {
            Ok(response) => outcome(response.into_inner()),
            Err(status) => Outcome::Failed(format!("{:?}: {}", status.code(), status.message())),
        };
        self.record.checked(Check {
            sidecar: self.sidecar,
            credential,
            sent,
            answered: self.record.now(),
            outcome,
        });
    }
}

/// Asks a sidecar that listens on a port.
pub(super) fn checks(address: &AuthzAddress) -> AuthorizationClient<Channel> {
    let AuthzAddress::Tcp(address) = address else {
        panic!("a sidecar that is asked without Envoy listens on a port");
    };
    let endpoint = Endpoint::from_shared(format!("http://{address}")).expect("an address");
    AuthorizationClient::new(endpoint.timeout(CHECK_TIMEOUT).connect_lazy())
}

/// A check of what presents `secret`.
pub(super) fn check_request(secret: &str) -> CheckRequest {
    let http = HttpRequest {
        method: "GET".to_owned(),
        path: "/v1/orders".to_owned(),
        host: "api.example.com".to_owned(),
        headers: [("x-api-key".to_owned(), secret.to_owned())].into(),
        ..HttpRequest::default()
    };
    CheckRequest {
        attributes: Some(AttributeContext {
            request: Some(AttributesRequest {
                http: Some(http),
                ..AttributesRequest::default()
            }),
            ..AttributeContext::default()
        }),
    }
}

/// What an answer comes to.
pub(super) fn outcome(response: CheckResponse) -> Outcome {
    let code = response.status.unwrap_or_default().code;
    match response.http_response {
        // What Envoy takes for an allow, whatever else the answer holds.
        _ if code == 0 => Outcome::Allowed,
        Some(HttpResponse::DeniedResponse(denied)) => match reason(denied.body.as_bytes()) {
            Some(reason) => Outcome::Denied(reason),
            None => Outcome::Denied("none".to_owned()),
        },
        _ => Outcome::Failed(format!("code {code} without a denial")),
    }
}

/// The reason that the body of a denial gives.
pub(super) fn reason(body: &[u8]) -> Option<String> {
    let problem: serde_json::Value = serde_json::from_slice(body).ok()?;
    problem["reason"].as_str().map(str::to_owned)
}
