//! What relatch relies on in Envoy, held against every release line that it works with.
//!
//! `request`: what a Check tells; `response`: what an answer decides; `mutation`: what it changes in an allowed request.
//! No relatch takes part, a script answers.

mod mutation;
mod request;
mod response;

use std::{collections::VecDeque, sync::Mutex, thread};

use envoy_types::pb::envoy::service::auth::v3::{CheckResponse, OkHttpResponse};
use tonic::Status;

use crate::support::{
    client::{Request, Response},
    envoy::{Envoy, EnvoyOptions, EnvoyVersion},
    scripted_authz::{Answer, Call, ScriptedAuthz, allowed},
    upstream::Upstream,
};

/// An Envoy between a consumer and an upstream, with a script that answers its Checks.
struct Mesh {
    envoy: Envoy,
    upstream: Upstream,
    authz: ScriptedAuthz,
}

/// Says with which Envoy a test was failing.
struct Blame(EnvoyVersion);

impl Mesh {
    /// Answers every Check with what `script` makes of it.
    async fn start(
        version: EnvoyVersion,
        script: impl Fn(&Call) -> Answer + Send + Sync + 'static,
    ) -> Self {
        Self::start_with(version, |options| options, script).await
    }

    /// As [`Self::start`], with settings of Envoy changed.
    async fn start_with(
        version: EnvoyVersion,
        options: impl FnOnce(EnvoyOptions) -> EnvoyOptions,
        script: impl Fn(&Call) -> Answer + Send + Sync + 'static,
    ) -> Self {
        let upstream = Upstream::start().await;
        let (authz, addr) = ScriptedAuthz::start(script).await;
        let defaults = EnvoyOptions::new(addr, upstream.addr()).version(version);
        let envoy = Envoy::start(options(defaults)).await;
        Self {
            envoy,
            upstream,
            authz,
        }
    }

    async fn send(&self, request: Request) -> Response {
        request.send(self.envoy.addr()).await
    }

    async fn send_http2(&self, request: Request) -> Response {
        request.send_http2(self.envoy.addr()).await
    }
}

impl Drop for Blame {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("this was with Envoy {}", self.0);
        }
    }
}

/// Runs `test` with one Envoy after the other.
async fn with_each_envoy(test: impl AsyncFn(EnvoyVersion)) {
    for version in EnvoyVersion::ALL {
        let _blame = Blame(version);
        test(version).await;
    }
}

#[expect(clippy::unnecessary_wraps, reason = "a script may fail the call")]
fn allow(_: &Call) -> Answer {
    Ok(allowed(OkHttpResponse::default()))
}

/// A mesh in which every Check gets `answer`.
async fn answering(version: EnvoyVersion, answer: Answer) -> Mesh {
    Mesh::start(version, move |_| answer.clone()).await
}

/// A mesh in which each Check gets the next of `answers`.
async fn answering_in_turn(
    version: EnvoyVersion,
    answers: impl IntoIterator<Item = CheckResponse>,
) -> Mesh {
    let answers = Mutex::new(VecDeque::from_iter(answers));
    let next = move |_: &Call| {
        let mut answers = answers.lock().expect("no holder of the answers panics");
        answers
            .pop_front()
            .ok_or_else(|| Status::internal("the script has come to its end"))
    };
    Mesh::start(version, next).await
}
