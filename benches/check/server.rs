//! A server of a comparison, and the serving of a baseline.

use std::{
    env,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
};

use ::relatch::proto::auth::{CheckResponse, check_response::HttpResponse};
use anyhow::{Context as _, Result, anyhow, ensure};
use bytes::Bytes;
use prost::Message as _;
use serde_json::json;
use tokio::{net::TcpListener, runtime::Builder};
use tonic::{
    service::Routes,
    transport::{Server as GrpcServer, server::TcpIncoming},
};

use crate::{
    cores::{Core, Cores},
    daemon::{Daemon, Place},
    generator::{Generator, Traffic},
    page,
    request::FRAME_LEN,
};

/// A server that answers checks in a process of its own.
#[derive(Debug)]
pub(crate) struct Server {
    /// The name in the report.
    pub(crate) name: &'static str,
    /// The place for checks.
    pub(crate) place: Place,
    /// The address of its metrics, which count its answers; baselines have none.
    pub(crate) metrics: Option<SocketAddr>,
    pub(crate) daemon: Daemon,
}

/// A baseline, with which other servers are compared.
#[derive(Clone, Debug)]
pub(crate) enum Baseline {
    AlwaysOk,
    /// With the answer of `always-ok`.
    Floor,
    /// With the answer in a file.
    FloorWith(PathBuf),
}

/// The number of checks that a server reports as answered.
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
    pub(crate) fn baseline(cores: &Cores, baseline: &Baseline) -> Result<Self> {
        let mut command = this_program()?;
        let name = match baseline {
            Baseline::AlwaysOk => {
                command.args(["serve", "always-ok"]);
                "always-ok"
            }
            Baseline::Floor => {
                command.args(["serve", "floor"]);
                "floor"
            }
            Baseline::FloorWith(answer) => {
                command.args(["serve", "floor", "--answer"]).arg(answer);
                "floor, same answer"
            }
        };
        let daemon = cores.on(Core::Measured, || Daemon::start(&mut command))?;
        Ok(Self {
            name,
            place: daemon.place("ext_authz")?,
            metrics: None,
            daemon,
        })
    }

    /// The TCP address for checks.
    ///
    /// # Errors
    ///
    /// When it listens on a Unix socket.
    pub(crate) fn address(&self) -> Result<SocketAddr> {
        match &self.place {
            Place::Tcp(address) => Ok(*address),
            Place::Unix(path) => Err(anyhow!("{} listens on {}", self.name, path.display())),
        }
    }

    /// Sends one check, and returns the message of the answer, which must be an allow. This shows that later measurements are of
    /// allows.
    ///
    /// # Errors
    ///
    /// When the answer is anything else.
    pub(crate) fn allow(&self, traffic: Traffic) -> Result<Bytes> {
        let framed = Generator::new(self.address()?, traffic).ask_once()?;
        let message = Bytes::from(framed).split_off(FRAME_LEN);
        let response = CheckResponse::decode(message.clone())?;
        let code = response.status.map(|status| status.code);
        let is_ok = matches!(response.http_response, Some(HttpResponse::OkResponse(_)));
        ensure!(
            code == Some(0) && is_ok,
            "{} does not allow the request: status {code:?}",
            self.name
        );
        Ok(message)
    }

    /// Does `work`, which sends `count` checks. The HTTP status says little about a gRPC call. If the server counts, its own
    /// counters prove that every answer was an allow.
    ///
    /// # Errors
    ///
    /// When `work` fails, or the server counts something else.
    pub(crate) fn allowing<T>(&self, count: u64, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let before = self.answered()?;
        let done = work()?;
        let Some(before) = before else {
            return Ok(done);
        };
        let after = self.answered()?;
        let expected = Answered {
            allowed: before.allowed + count,
            denied: before.denied,
        };
        ensure!(
            after == Some(expected),
            "{} was asked {count} times and counts {after:?} after {before:?}",
            self.name
        );
        Ok(done)
    }

    /// The number of its answers since its start; none if it does not count.
    fn answered(&self) -> Result<Option<Answered>> {
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

/// A command that starts this program as a server.
///
/// # Errors
///
/// When this program cannot be found.
pub(crate) fn this_program() -> Result<Command> {
    let this: &Path = &env::current_exe().context("cannot find this program")?;
    Ok(Command::new(this))
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
