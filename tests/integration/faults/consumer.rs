//! A consumer of the API behind an Envoy, whose every request is a check.

use std::sync::Arc;

use super::{
    asker::{PAUSE, reason},
    history::{Check, Outcome},
    record::Record,
};
use crate::support::{
    client::{Connection, Request, Response},
    envoy::AuthzAddress,
    envoy::{Envoy, EnvoyOptions, EnvoyVersion},
    upstream::Upstream,
};

/// An Envoy that asks one sidecar, the API behind it, and a consumer.
#[derive(Debug)]
pub(super) struct Consumer {
    record: Arc<Record>,
    sidecar: usize,
    envoy: Envoy,
    _upstream: Upstream,
}

impl Consumer {
    /// Of an Envoy that asks a sidecar at `address`, which none of its processes changes.
    pub(super) async fn start(
        record: Arc<Record>,
        sidecar: usize,
        address: AuthzAddress,
        version: EnvoyVersion,
    ) -> Self {
        let upstream = Upstream::start().await;
        let options = EnvoyOptions::new(address, upstream.addr()).version(version);
        Self {
            record,
            sidecar,
            envoy: Envoy::start(options).await,
            _upstream: upstream,
        }
    }

    /// Sends one request after the other until the run ends.
    pub(super) async fn run(self) {
        let mut kept = None;
        let mut turn = 0;
        while !self.record.has_stopped() {
            let (credential, secret) = self.record.choose(turn, self.sidecar);
            let request = Request::get("/v1/orders").header("x-api-key", secret);
            let sent = self.record.now();
            let answer = Connection::send_kept(&mut kept, self.envoy.addr(), &request).await;
            let outcome = match answer {
                Ok(response) => outcome(&response),
                Err(error) => Outcome::Failed(error.to_string()),
            };
            self.record.checked(Check {
                sidecar: self.sidecar,
                credential,
                sent,
                answered: self.record.now(),
                outcome,
            });
            turn += 1;
            tokio::time::sleep(PAUSE).await;
        }
    }
}

/// What an answer comes to. One that Envoy gives by itself has no reason of ours.
fn outcome(response: &Response) -> Outcome {
    match (response.status, reason(&response.body)) {
        // The API's own.
        (200, _) => Outcome::Allowed,
        (400..600, Some(reason)) => Outcome::Denied(reason),
        (status, _) => Outcome::Failed(format!("{status}: {}", response.text())),
    }
}
