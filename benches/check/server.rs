//! A server under comparison, and how a baseline serves.

use std::{env, net::SocketAddr, process::Command};

use ::relatch::proto::auth::{
    CheckRequest, authorization_client::AuthorizationClient, check_response::HttpResponse,
};
use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use tokio::{net::TcpListener, runtime::Builder};
use tonic::{
    service::Routes,
    transport::{Server as GrpcServer, server::TcpIncoming},
};

use crate::{daemon::Daemon, page, request::FramedRequest};

/// A server that answers checks in a process of its own.
#[derive(Debug)]
pub(crate) struct Server {
    /// As the report calls it.
    pub(crate) name: &'static str,
    /// Where it is asked.
    pub(crate) address: SocketAddr,
    /// Where it counts what it answered; baselines do not count.
    pub(crate) metrics: Option<SocketAddr>,
    pub(crate) daemon: Daemon,
}

/// How many checks a server says that it answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Answered {
    pub(crate) allowed: u64,
    pub(crate) denied: u64,
}

impl Server {
    /// Starts this program as a baseline.
    ///
    /// # Errors
    ///
    /// When it does not start.
    pub(crate) fn baseline(name: &'static str) -> Result<Self> {
        let this = env::current_exe().context("cannot find this program")?;
        let daemon = Daemon::start(Command::new(this).args(["serve", name]))?;
        Ok(Self {
            name,
            address: daemon.address("ext_authz")?,
            metrics: None,
            daemon,
        })
    }

    /// Asks once and looks at the answer: what is measured later is known to be an allow.
    ///
    /// # Errors
    ///
    /// When the answer is anything else.
    pub(crate) fn assert_allows(&self, request: &FramedRequest) -> Result<()> {
        let request: CheckRequest = request.decode()?;
        let endpoint = format!("http://{}", self.address);
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let response = runtime.block_on(async {
            let mut client = AuthorizationClient::connect(endpoint).await?;
            anyhow::Ok(client.check(request).await?.into_inner())
        })?;
        let code = response.status.map(|status| status.code);
        let is_ok = matches!(response.http_response, Some(HttpResponse::OkResponse(_)));
        ensure!(
            code == Some(0) && is_ok,
            "{} does not allow the request: status {code:?}",
            self.name
        );
        Ok(())
    }

    /// What it has answered since it started; none when it does not count.
    ///
    /// # Errors
    ///
    /// When its metrics cannot be read.
    pub(crate) fn answered(&self) -> Result<Option<Answered>> {
        let Some(address) = self.metrics else {
            return Ok(None);
        };
        let page = page::get(address, "/metrics")?;
        Ok(Some(Answered {
            allowed: page::sum(&page, "relatch_checks_total", "decision=\"allow\"")?,
            denied: page::sum(&page, "relatch_checks_total", "decision=\"deny\"")?,
        }))
    }
}

/// Serves `routes` on one thread and a free port until the process is killed.
///
/// # Errors
///
/// When no address can be bound.
pub(crate) fn serve(routes: Routes) -> Result<()> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?.to_string();
        eprintln!("{}", json!({ "message": "started", "ext_authz": address }));
        let incoming = TcpIncoming::from(listener).with_nodelay(Some(true));
        let server = GrpcServer::builder().add_routes(routes);
        Ok(server.serve_with_incoming(incoming).await?)
    })
}
