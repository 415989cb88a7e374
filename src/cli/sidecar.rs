//! `relatch sidecar`: runs a sidecar, which answers the checks of Envoy.

use std::{net::SocketAddr, path::PathBuf};

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};

use super::{Console, Exit, Failure, daemon};
use crate::{
    clock::Clock,
    config::{
        ControlEndpoint, Listen,
        sidecar::{SidecarFile, SidecarOverrides},
    },
    node_name::NodeName,
    shutdown::Shutdown,
    sidecar::{Inherited, Sidecar, reload::Reloader},
};

/// The arguments of `sidecar`.
#[derive(Debug, Args)]
pub struct SidecarArgs {
    /// Configuration file; `deploy/sidecar.yaml` is a commented sample
    #[arg(long, value_name = "FILE", env = "RELATCH_CONFIG")]
    config: PathBuf,

    /// Node id of this sidecar, unique in the fleet [default: `node.id` in the file]
    #[arg(long, value_name = "ID", env = "RELATCH_NODE_ID")]
    node_id: Option<NodeName>,

    /// Address for Envoy: `HOST:PORT` (without TLS only on loopback) or `unix:///PATH` [default: `listen` in the file]
    #[arg(long, value_name = "ADDRESS", env = "RELATCH_LISTEN")]
    listen: Option<Listen>,

    /// URL of a control plane; may be repeated [default: `control.endpoints` in the file]
    #[arg(
        long,
        value_name = "URL",
        env = "RELATCH_CONTROL",
        value_delimiter = ','
    )]
    control: Vec<ControlEndpoint>,

    /// Address for metrics, probes and status [default: `http` in the file]
    #[arg(long, value_name = "ADDRESS", env = "RELATCH_HTTP")]
    http: Option<SocketAddr>,
}

impl SidecarArgs {
    /// Runs a sidecar until a signal stops it.
    ///
    /// # Errors
    ///
    /// When it cannot be started, or a part of it fails.
    pub async fn run(self, _console: &Console) -> Result<(), Failure> {
        let overrides = SidecarOverrides {
            node_id: self.node_id,
            listen: self.listen,
            control: self.control,
            http: self.http,
        };
        let file = SidecarFile::new(self.config, overrides);
        let content = file.read().map_err(daemon::misconfigured)?;
        let settings = file.parse(&content).map_err(daemon::misconfigured)?;
        settings
            .check_channels()
            .map_err(|error| Failure::new(Exit::Usage, error))?;
        let log = daemon::log(settings.log)?;
        let shutdown = Shutdown::new();
        let signals = daemon::signals()?;
        let hangups = signal(SignalKind::hangup()).map_err(Failure::from_error)?;
        let inherited = Inherited::from_env().map_err(|error| Failure::new(Exit::Usage, error))?;
        let sidecar = Sidecar::start_on(&settings, inherited, Clock::system(), &shutdown)
            .await
            .map_err(|error| daemon::stopped(&shutdown, error))?;
        tracing::info!(
            ext_authz = %sidecar.endpoints.ext_authz,
            http_authz = sidecar.endpoints.http_authz.as_ref().map(tracing::field::display),
            http = %sidecar.endpoints.http,
            "sidecar started"
        );
        let reloader = Reloader::new(
            file,
            content,
            settings.clone(),
            sidecar.changeable.clone(),
            log.level.clone(),
        );
        shutdown.spawn("configuration", reloader.run(hangups, shutdown.token()));
        let ended = shutdown.run(signals, settings.drain + daemon::DRAIN).await;
        sidecar.flush(daemon::FLUSH).await;
        ended.map_err(Failure::from_error)
    }
}
