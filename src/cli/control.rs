//! `relatch control`: runs the control plane, or creates its data.

use std::{net::SocketAddr, path::PathBuf};

use clap::{Args, Subcommand};
use serde::Serialize;

use super::{
    Console, Exit, Failure, daemon,
    output::{self, View},
    secret::Revealed,
};
use crate::{
    clock::Clock,
    config::{self, ControlSettings, value},
    control::{
        data::{self, Data, DataError, NewData, UnknownPepper},
        plane::ControlPlane,
    },
    key::Timestamp,
    shutdown::Shutdown,
    store::OwnerError,
};

/// The arguments of `control`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true)]
pub struct ControlArgs {
    #[command(subcommand)]
    command: Option<ControlCommand>,

    #[command(flatten)]
    daemon: DaemonArgs,
}

/// The commands of `control`; without one, the control plane runs.
#[derive(Debug, Subcommand)]
enum ControlCommand {
    /// Create the data directory, the pepper, the store and the first admin token, which is printed once
    ///
    /// The pepper keys the digests of all keys. Keep a copy of its file apart from the backups of the store: without the
    /// pepper no key can be verified, and with both an attacker can test guesses. If a store or a pepper already exists,
    /// nothing is written, and the exit code is 4.
    Init(DataArgs),
    /// Create another admin token while the control plane is stopped, after all admin tokens were lost
    ///
    /// The token has the role admin, does not expire, and is printed once. Run this on the machine of the store, as the
    /// user of the control plane. It is refused while the control plane runs. Other tokens stay valid: delete the lost
    /// ones with `relatch token end`.
    RecoverAdmin(DataArgs),
}

/// The options of a control plane that runs.
#[derive(Debug, Args)]
struct DaemonArgs {
    /// Configuration file; `deploy/control.yaml` is a commented sample [default: none]
    #[arg(long, value_name = "FILE", env = "RELATCH_CONFIG")]
    config: Option<PathBuf>,

    /// Data directory of the control plane; overrides the file [default: from the file, else relatch-data]
    #[arg(long, value_name = "DIR", env = "RELATCH_DATA_DIR")]
    data_dir: Option<PathBuf>,

    /// Address for sidecars; overrides the file [default: from the file, else 127.0.0.1:9010]
    #[arg(long, value_name = "ADDRESS", env = "RELATCH_DISCOVERY", value_parser = value::address)]
    discovery: Option<SocketAddr>,

    /// Address of the admin API; overrides the file [default: from the file, else 127.0.0.1:9011]
    #[arg(long, value_name = "ADDRESS", env = "RELATCH_ADMIN_LISTEN", value_parser = value::address)]
    admin_listen: Option<SocketAddr>,

    /// Address for metrics and probes; overrides the file [default: from the file, else 127.0.0.1:9012]
    #[arg(long, value_name = "ADDRESS", env = "RELATCH_HTTP")]
    http: Option<SocketAddr>,

    /// Begin a new epoch of every keyring before serving, so that every sidecar loads its keyrings again; use it once,
    /// after you restored the store from a backup
    #[arg(long)]
    new_epoch: bool,

    /// Record the existing pepper as the pepper of the store; use it once, for a store without a check value, which does
    /// not start otherwise. With the pepper of another store, every key is denied permanently
    #[arg(long)]
    adopt_pepper: bool,
}

/// The arguments of `control init` and `control recover-admin`.
#[derive(Debug, Args)]
struct DataArgs {
    /// Configuration file [default: none]
    #[arg(long, value_name = "FILE", env = "RELATCH_CONFIG")]
    config: Option<PathBuf>,

    /// Data directory; overrides the file [default: from the file, else relatch-data]
    #[arg(long, value_name = "DIR", env = "RELATCH_DATA_DIR")]
    data_dir: Option<PathBuf>,
}

#[derive(Serialize)]
struct Initialized {
    data_dir: String,
    store: String,
    pepper_file: String,
    admin_token: Option<Revealed>,
}

#[derive(Serialize)]
struct Recovered {
    data_dir: String,
    store: String,
    token_id: String,
    admin_token: Option<Revealed>,
}

/// The name of this process for others that find the store in use.
const CONTROL: &str = "relatch control";
/// The default data directory.
const DEFAULT_DATA_DIR: &str = "relatch-data";

impl ControlArgs {
    /// Runs a control plane until a signal stops it, or creates its data.
    ///
    /// # Errors
    ///
    /// When the data cannot be created, or the control plane cannot be started, or a part of it fails.
    pub async fn run(self, console: &Console) -> Result<(), Failure> {
        match self.command {
            Some(ControlCommand::Init(args)) => args.initialize(console).await,
            Some(ControlCommand::RecoverAdmin(args)) => args.recover_admin(console).await,
            None => self.daemon.run().await,
        }
    }
}

impl DaemonArgs {
    async fn run(self) -> Result<(), Failure> {
        let mut settings = settings(self.config, self.data_dir)?;
        if let Some(discovery) = self.discovery {
            settings.discovery = discovery;
        }
        if let Some(admin) = self.admin_listen {
            settings.admin = admin;
        }
        if let Some(http) = self.http {
            settings.http = http;
        }
        settings
            .check_channels()
            .map_err(|error| Failure::new(Exit::Usage, error))?;
        let _lines = daemon::log(settings.log)?;
        let shutdown = Shutdown::new();
        let signals = daemon::signals()?;
        let clock = Clock::system();
        let unknown = if self.adopt_pepper {
            UnknownPepper::Adopt
        } else {
            UnknownPepper::Refuse
        };
        let data = Data::open_with(&settings, &clock, CONTROL, unknown)
            .await
            .map_err(unusable)?;
        if self.new_epoch {
            data.begin_epoch(&settings, &clock)
                .await
                .map_err(unusable)?;
        }
        let plane = ControlPlane::start(data, &settings, clock, &shutdown)
            .await
            .map_err(|error| daemon::stopped(&shutdown, error))?;
        tracing::info!(
            discovery = %plane.endpoints.discovery,
            admin = %plane.endpoints.admin,
            http = %plane.endpoints.http,
            "control plane started"
        );
        let ended = shutdown.run(signals, daemon::DRAIN).await;
        plane.flush(daemon::FLUSH).await;
        ended.map_err(Failure::from_error)
    }
}

impl DataArgs {
    async fn initialize(self, console: &Console) -> Result<(), Failure> {
        let settings = settings(self.config, self.data_dir)?;
        let NewData { token, owner } = data::initialize(&settings, &Clock::system())
            .await
            .map_err(unusable)?;
        drop(owner);
        console.show(&Initialized {
            data_dir: settings.data_dir.display().to_string(),
            store: settings.store.display().to_string(),
            pepper_file: settings.pepper_file.display().to_string(),
            admin_token: Revealed::new(token.expose().to_owned()),
        })?;
        console
            .output
            .note("keep a copy of the pepper file, apart from the backups of the store: without it no key can be verified");
        Ok(())
    }

    async fn recover_admin(self, console: &Console) -> Result<(), Failure> {
        let settings = settings(self.config, self.data_dir)?;
        let (token, secret) = data::recover_admin(&settings, &Clock::system())
            .await
            .map_err(unusable)?;
        console.show(&Recovered {
            data_dir: settings.data_dir.display().to_string(),
            store: settings.store.display().to_string(),
            token_id: token.id.to_string(),
            admin_token: Revealed::new(secret.expose().to_owned()),
        })?;
        console.output.note(
            "the other tokens stay valid: start the control plane, and delete the lost ones with `relatch token end`",
        );
        Ok(())
    }
}

impl View for Initialized {
    fn render(&self, _now: Timestamp) -> String {
        output::facts(&[
            ("DATA", self.data_dir.clone()),
            ("STORE", self.store.clone()),
            ("PEPPER", self.pepper_file.clone()),
        ])
    }

    fn secret(&self) -> Option<&Revealed> {
        self.admin_token.as_ref()
    }
}

impl View for Recovered {
    fn render(&self, _now: Timestamp) -> String {
        output::facts(&[
            ("DATA", self.data_dir.clone()),
            ("STORE", self.store.clone()),
            ("TOKEN ID", self.token_id.clone()),
        ])
    }

    fn secret(&self) -> Option<&Revealed> {
        self.admin_token.as_ref()
    }
}

fn settings(
    config: Option<PathBuf>,
    data_dir: Option<PathBuf>,
) -> Result<ControlSettings, Failure> {
    match (config, data_dir) {
        (Some(path), data_dir) => {
            let mut settings = config::control::load(&path).map_err(daemon::misconfigured)?;
            if let Some(data_dir) = data_dir {
                move_to(&mut settings, data_dir);
            }
            Ok(settings)
        }
        (None, Some(data_dir)) => Ok(ControlSettings::new(data_dir)),
        (None, None) => Ok(ControlSettings::new(PathBuf::from(DEFAULT_DATA_DIR))),
    }
}

/// Changes the data directory, and with it all paths that have their default within the data directory.
fn move_to(settings: &mut ControlSettings, data_dir: PathBuf) {
    let was = ControlSettings::new(settings.data_dir.clone());
    let is = ControlSettings::new(data_dir);
    if settings.store == was.store {
        settings.store = is.store;
    }
    if settings.pepper_file == was.pepper_file {
        settings.pepper_file = is.pepper_file;
    }
    settings.data_dir = is.data_dir;
}

/// The failure of data that cannot be used or created.
pub(super) fn unusable(error: DataError) -> Failure {
    let exit = match &error {
        DataError::Initialized { .. }
        | DataError::PepperMissing { .. }
        | DataError::StoreMissing { .. }
        | DataError::ForeignPepper { .. }
        | DataError::UnknownPepper { .. }
        | DataError::Owner(OwnerError::Held { .. } | OwnerError::Linked { .. }) => Exit::Refused,
        DataError::Missing { .. }
        | DataError::Owner(OwnerError::Unsupported { .. } | OwnerError::Io { .. })
        | DataError::Secrets(_)
        | DataError::Store(_)
        | DataError::Fleet(_)
        | DataError::Log(_)
        | DataError::Commit(_)
        | DataError::Append(_)
        | DataError::Random(_) => Exit::Failed,
    };
    Failure::new(exit, error)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn another_data_directory_takes_along_what_lies_in_it_by_default() {
        let mut settings = ControlSettings::new(PathBuf::from("old"));
        settings.pepper_file = PathBuf::from("/run/secrets/pepper.json");
        move_to(&mut settings, PathBuf::from("new"));
        assert_eq!(settings.data_dir, PathBuf::from("new"));
        assert_eq!(settings.store, PathBuf::from("new/relatch.db"));
        assert_eq!(
            settings.pepper_file,
            PathBuf::from("/run/secrets/pepper.json")
        );
    }
}
