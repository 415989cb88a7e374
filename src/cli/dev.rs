//! `relatch dev`: a control plane, a sidecar and a demo key in one process on this machine.

use std::{
    env, fs,
    io::{self, Write as _},
    net::{Ipv4Addr, SocketAddr},
    num::NonZeroUsize,
    path::{Path, PathBuf},
    time::Duration,
};

use clap::Args;
use serde::{Deserialize, Serialize};
use tonic::Request;
use tracing::level_filters::LevelFilter;

use super::{
    Console, Exit, Failure,
    connection::{self, Admin, AdminAddress, Bearer, TlsArgs},
    control, daemon,
    secret::Revealed,
};
use crate::{
    authz,
    clock::Clock,
    config::{
        ControlEndpoint, ControlSettings, Listen, LogSettings, OtlpEndpoint, SidecarSettings,
    },
    control::{
        data::{self, Data, DataError, NewData},
        plane::{ControlEndpoints, ControlPlane, PlaneError},
        secrets,
    },
    draft::Draft,
    key::{KeyringName, KeyringPattern, Timestamp},
    keyring::{Mode, PatternRule, Staleness},
    node_name::NodeName,
    proto::admin,
    readiness::Readiness,
    secret_file,
    shutdown::Shutdown,
    sidecar::{Sidecar, SidecarEndpoints, SidecarError},
    store::{Owner, OwnerError, StoreOwner},
};

/// The arguments of `dev`.
#[derive(Debug, Args)]
pub struct DevArgs {
    /// Directory for keys, tokens and endpoint information
    #[arg(
        long,
        value_name = "DIR",
        env = "RELATCH_DATA_DIR",
        default_value = "relatch-data"
    )]
    data_dir: PathBuf,

    /// Let the system choose every port [default: ports 9001, 9002 and 9010 to 9012]
    #[arg(long)]
    ephemeral_ports: bool,

    /// Number of threads that answer checks
    #[arg(long, value_name = "N", default_value = "1")]
    workers: NonZeroUsize,

    /// Send spans to this OTLP/gRPC collector, for example `http://127.0.0.1:4317` [default: none]
    #[arg(long, value_name = "URL")]
    otlp_endpoint: Option<OtlpEndpoint>,

    /// Log level on standard error: off, error, warn, info, debug or trace
    #[arg(
        long,
        value_name = "LEVEL",
        env = "RELATCH_LOG",
        default_value = "warn"
    )]
    log_level: LevelFilter,
}

/// The addresses that were bound, in `endpoints.json` for other programs.
#[derive(Serialize, Deserialize)]
struct EndpointsFile {
    ext_authz: String,
    sidecar_http: String,
    discovery: String,
    admin: String,
    control_http: String,
    admin_token_file: PathBuf,
}

/// The demo key.
struct DemoKey {
    id: String,
    /// The secret, only if the key was just created.
    secret: Option<Revealed>,
}

/// The paths of the files.
struct Place {
    data_dir: PathBuf,
    token_file: PathBuf,
    endpoints_file: PathBuf,
    envoy_file: PathBuf,
}

/// The name of this process for others that find the store in use.
const DEV: &str = "relatch dev";
const KEYRING: &str = "demo";
const CONSUMER: &str = "demo-app";
/// The advice for a second `relatch dev` on one machine.
const SECOND: &str = "to start a second one, use another --data-dir and --ephemeral-ports";
/// The advice about an address that another process uses.
const TAKEN: &str = "stop the process that listens there, or let the system choose every port with --ephemeral-ports";
/// Prints the secret of a key from JSON, with tools that every system has.
const SECRET_OF_JSON: &str = r#"sed 's/.*"secret":"\([^"]*\)".*/\1/'"#;
const ENVOY_SAMPLE: &str = include_str!("../../deploy/envoy/envoy.yaml");
/// The longest wait for the sidecar to become ready: its stream opens immediately, but a slow disk may need a moment.
const READY_TIMEOUT: Duration = Duration::from_secs(20);
const READY_POLL: Duration = Duration::from_millis(20);

impl DevArgs {
    /// Runs the control plane and the sidecar until a signal stops them.
    ///
    /// # Errors
    ///
    /// When they cannot be started, or a part of them fails.
    pub async fn run(self, console: &Console) -> Result<(), Failure> {
        let _lines = daemon::log(LogSettings {
            level: self.log_level,
            ..LogSettings::default()
        })?;
        let signals = daemon::signals()?;
        let shutdown = Shutdown::new();
        let place = Place::prepare(&self.data_dir)?;
        let control = self.control_settings();
        first_start(&control, &place).await?;
        let started = self.start(&control, &place, &shutdown).await;
        let (sidecar, control_plane, key) = started.inspect_err(|_| shutdown.abandon())?;
        place.write(&sidecar.endpoints, &control_plane.endpoints)?;
        console.output.announce(&welcome(
            &place,
            &sidecar.endpoints,
            &control_plane.endpoints,
            &key,
        ))?;
        drop(key);
        let ended = shutdown.run(signals, daemon::DRAIN).await;
        tokio::join!(
            sidecar.flush(daemon::FLUSH),
            control_plane.flush(daemon::FLUSH)
        );
        ended.map_err(Failure::from_error)
    }

    async fn start(
        &self,
        control: &ControlSettings,
        place: &Place,
        shutdown: &Shutdown,
    ) -> Result<(Sidecar, ControlPlane, DemoKey), Failure> {
        // The sidecar's last report and its Goodbye need a control plane that still listens.
        let clock = Clock::system();
        let data = Data::open(control, &clock, DEV)
            .await
            .map_err(|error| place.unusable(error))?;
        let control_plane = ControlPlane::start(data, control, clock, &shutdown.last())
            .await
            .map_err(no_control_plane)?;
        let address = AdminAddress::at(control_plane.endpoints.admin);
        let mut admin = connection::connect(
            &address,
            Bearer::from_file(&place.token_file)?,
            &TlsArgs::default(),
        )
        .await?;
        let key = demo_key(&mut admin).await?;
        let settings = self.sidecar_settings(control_plane.endpoints.discovery)?;
        let sidecar = Sidecar::start(&settings, Clock::system(), shutdown)
            .await
            .map_err(no_sidecar)?;
        until_ready(&sidecar.readiness).await?;
        Ok((sidecar, control_plane, key))
    }

    fn control_settings(&self) -> ControlSettings {
        let mut settings = ControlSettings::new(self.data_dir.clone());
        settings
            .telemetry
            .otlp_endpoint
            .clone_from(&self.otlp_endpoint);
        if self.ephemeral_ports {
            settings.discovery = ANY_PORT;
            settings.admin = ANY_PORT;
            settings.http = ANY_PORT;
        }
        settings
    }

    fn sidecar_settings(&self, discovery: SocketAddr) -> Result<SidecarSettings, Failure> {
        let node: NodeName = "dev".parse().map_err(Failure::from_error)?;
        let keyring: KeyringName = KEYRING.parse().map_err(Failure::from_error)?;
        let control = ControlEndpoint::at(discovery).map_err(Failure::from_error)?;
        let mut settings = SidecarSettings::new(node, control, Vec::new());
        settings.patterns = vec![PatternRule {
            pattern: KeyringPattern::all(),
            mode: Mode::Full,
            staleness: Staleness::default(),
        }];
        settings.authz = authz::Settings::of_keyring(keyring);
        settings.workers = self.workers;
        settings
            .telemetry
            .otlp_endpoint
            .clone_from(&self.otlp_endpoint);
        if self.ephemeral_ports {
            settings.listen = Listen::Tcp(ANY_PORT);
            settings.http = ANY_PORT;
        }
        Ok(settings)
    }
}

const ANY_PORT: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 0);

impl Place {
    fn prepare(data_dir: &Path) -> Result<Self, Failure> {
        secrets::ensure_directory(data_dir).map_err(Failure::from_error)?;
        let data_dir = data_dir.canonicalize().map_err(|error| {
            Failure::from_error(error).context(format!("cannot use {}", data_dir.display()))
        })?;
        Ok(Self {
            token_file: data_dir.join("admin.token"),
            endpoints_file: data_dir.join("endpoints.json"),
            envoy_file: data_dir.join("envoy.yaml"),
            data_dir,
        })
    }

    /// Adds the addresses of the other `relatch dev` to the error about a store that it uses.
    fn unusable(&self, error: DataError) -> Failure {
        let hint = match &error {
            DataError::Owner(OwnerError::Held {
                owner: Some(owner), ..
            }) if owner.command == DEV => Some(self.whereabouts(owner)),
            _ => None,
        };
        let failure = control::unusable(error);
        match hint {
            Some(hint) => failure.hint(hint),
            None => failure,
        }
    }

    fn without_token(&self) -> Failure {
        let (data_dir, token_file) = (self.data_dir.display(), self.token_file.display());
        Failure::new(
            Exit::Refused,
            anyhow::anyhow!("{data_dir} contains the data of a control plane, but not its token file {token_file}"),
        )
        .hint(format!(
            "restore the file, write a token from `relatch control recover-admin --data-dir {data_dir}` to it, or choose another --data-dir"
        ))
    }

    /// The addresses of the `relatch dev` that owns the store, if it has already written them.
    fn whereabouts(&self, owner: &Owner) -> String {
        let path = self.endpoints_file.display();
        let written = fs::metadata(&self.endpoints_file).and_then(|metadata| metadata.modified());
        let is_of_owner = written.is_ok_and(|written| Timestamp::from(written) >= owner.since);
        let read = fs::read(&self.endpoints_file).ok();
        let endpoints = read.and_then(|json| serde_json::from_slice::<EndpointsFile>(&json).ok());
        match endpoints.filter(|_| is_of_owner) {
            Some(endpoints) => format!(
                "it serves ext_authz at {}, sidecar http at {}, discovery at {}, admin at {} and control http at {} (see {path}); {SECOND}",
                endpoints.ext_authz,
                endpoints.sidecar_http,
                endpoints.discovery,
                endpoints.admin,
                endpoints.control_http,
            ),
            None => format!("it is starting: it writes its addresses to {path}; {SECOND}"),
        }
    }

    fn write(&self, sidecar: &SidecarEndpoints, control: &ControlEndpoints) -> Result<(), Failure> {
        let endpoints = EndpointsFile {
            ext_authz: sidecar.ext_authz.to_string(),
            sidecar_http: sidecar.http.to_string(),
            discovery: control.discovery.to_string(),
            admin: control.admin.to_string(),
            control_http: control.http.to_string(),
            admin_token_file: self.token_file.clone(),
        };
        let json = serde_json::to_string_pretty(&endpoints).map_err(Failure::from_error)?;
        replace(&self.endpoints_file, &json).map_err(Failure::from_error)?;
        let port = endpoints.ext_authz.rsplit(':').next().unwrap_or_default();
        let envoy = ENVOY_SAMPLE.replace("port_value: 9001", &format!("port_value: {port}"));
        replace(&self.envoy_file, &envoy).map_err(Failure::from_error)
    }
}

/// Creates the files of the control plane if there are none, and writes the first admin token to its file.
async fn first_start(settings: &ControlSettings, place: &Place) -> Result<(), Failure> {
    let clock = Clock::system();
    match data::initialize(settings, &clock).await {
        Ok(NewData { token, owner }) => {
            let written = secret_file::write_new(&place.token_file, token.expose());
            // The file is written only now, so that the owner of the store finds it.
            drop(owner);
            written.map_err(|error| {
                Failure::from_error(error)
                    .context(format!("cannot create {}", place.token_file.display()))
            })
        }
        Err(DataError::Initialized { .. }) if place.token_file.exists() => Ok(()),
        Err(DataError::Initialized { store }) => {
            // Another `relatch dev` may be about to write the file.
            let owner = StoreOwner::claim(&store, DEV, clock.wall())
                .await
                .map_err(|error| place.unusable(error.into()))?;
            let is_there = place.token_file.exists();
            drop(owner);
            if is_there {
                Ok(())
            } else {
                Err(place.without_token())
            }
        }
        Err(error) => Err(place.unusable(error)),
    }
}

fn no_control_plane(error: PlaneError) -> Failure {
    let is_taken = match &error {
        PlaneError::Bind { source, .. } => is_taken(source),
        PlaneError::Store(_)
        | PlaneError::Log(_)
        | PlaneError::Fleet(_)
        | PlaneError::Token(_)
        | PlaneError::Sink(_)
        | PlaneError::Tls { .. }
        | PlaneError::Reflection(_)
        | PlaneError::Process(_)
        | PlaneError::Spans(_)
        | PlaneError::Webhooks(_) => false,
    };
    not_started(error, is_taken)
}

fn no_sidecar(error: SidecarError) -> Failure {
    let is_taken = match &error {
        SidecarError::Listen { source, .. } | SidecarError::Http { source, .. } => is_taken(source),
        SidecarError::Tls { .. }
        | SidecarError::Inherited(_)
        | SidecarError::Snapshot(_)
        | SidecarError::Worker(_)
        | SidecarError::Export(_)
        | SidecarError::Random(_)
        | SidecarError::Process(_) => false,
    };
    not_started(error, is_taken)
}

fn is_taken(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::AddrInUse
}

fn not_started(error: impl Into<anyhow::Error>, is_address_taken: bool) -> Failure {
    let failure = Failure::from_error(error);
    if is_address_taken {
        failure.hint(TAKEN)
    } else {
        failure
    }
}

/// Creates the demo key if there is none.
async fn demo_key(admin: &mut Admin) -> Result<DemoKey, Failure> {
    let keyrings =
        connection::answer(admin.list_keyrings(Request::new(admin::ListKeyringsRequest {})))
            .await?;
    if keyrings
        .keyrings
        .iter()
        .any(|keyring| keyring.name == KEYRING)
    {
        let request = admin::ListKeysRequest {
            keyring: KEYRING.to_owned(),
            consumer: CONSUMER.to_owned(),
        };
        let keys = connection::answer(admin.list_keys(request)).await?.keys;
        if let Some(key) = keys.into_iter().next() {
            return Ok(DemoKey {
                id: key.key_id,
                secret: None,
            });
        }
    }
    let request = admin::CreateKeyRequest {
        keyring: KEYRING.to_owned(),
        consumer: CONSUMER.to_owned(),
        name: "created by relatch dev".to_owned(),
        create_missing: true,
        ..admin::CreateKeyRequest::default()
    };
    let key = connection::answer(admin.create_key(request)).await?;
    Ok(DemoKey {
        id: key.key_id,
        secret: Revealed::new(key.secret),
    })
}

async fn until_ready(readiness: &Readiness) -> Result<(), Failure> {
    let ready = async {
        while !readiness.is_ready() {
            tokio::time::sleep(READY_POLL).await;
        }
    };
    tokio::time::timeout(READY_TIMEOUT, ready)
        .await
        .map_err(|_| {
            Failure::failed(format!(
                "the sidecar did not become ready: {}",
                readiness.blocked_by().join("; ")
            ))
        })
}

fn welcome(
    place: &Place,
    sidecar: &SidecarEndpoints,
    control: &ControlEndpoints,
    key: &DemoKey,
) -> zeroize::Zeroizing<String> {
    let program = shell_word(&program());
    let word = |path: &Path| shell_word(&path.display().to_string());
    let (token, envoy) = (word(&place.token_file), word(&place.envoy_file));
    let admin = control.admin;
    let export = format!("  export RELATCH_ADMIN=http://{admin} RELATCH_TOKEN_FILE={token}\n");
    let (shown, secret, id) = match &key.secret {
        Some(secret) => (secret.expose(), secret.expose(), key.id.as_str()),
        None => ("(shown once, when it was created)", "$KEY", "$KEY_ID"),
    };
    // If the secret of the key is no longer known, the key may also have been rotated or revoked. The commands then
    // use another key.
    let (once, another, export) = match &key.secret {
        Some(_) => ("  (shown only once)", String::new(), export),
        None => (
            "",
            format!(
                "\
That key is not shown again. Create another key to try out:
{export}  KEY=$({program} key create --keyring {KEYRING} --consumer {CONSUMER} -o json | {SECRET_OF_JSON})
  KEY_ID=$(echo $KEY | cut -d_ -f2)

"
            ),
            String::new(),
        ),
    };
    zeroize::Zeroizing::new(format!(
        "\
relatch is running.

  ext_authz      {ext_authz}
  sidecar http   {sidecar_http}   /metrics /livez /readyz /status
  discovery      {discovery}
  admin          {admin}
  control http   {control_http}
  admin token    {token_file}
  endpoints      {endpoints}

  keyring        {KEYRING}
  consumer       {CONSUMER}
  key id         {key_id}
  key            {shown}{once}

{another}Ask the sidecar as Envoy would:
  echo {secret} | {program} check --endpoint {ext_authz}

Put Envoy in front of a service on port 8080, and call it:
  envoy -c {envoy}
  curl -i -H \"x-api-key: {secret}\" http://127.0.0.1:10000/

Rotate the key with no failed request, see who still uses the old version, then
revoke it:
{export}  {program} rotate start {id} --overlap 1h
  {program} rotate status {id}
  {program} revoke {id} --version 1 --reason 'trying it out' --wait

Press Ctrl-C to stop. The keys stay in {data_dir}.
",
        ext_authz = sidecar.ext_authz,
        sidecar_http = sidecar.http,
        discovery = control.discovery,
        control_http = control.http,
        token_file = place.token_file.display(),
        endpoints = place.endpoints_file.display(),
        key_id = key.id,
        data_dir = place.data_dir.display(),
    ))
}

/// The path by which this program was called, so that the printed commands also work in a build directory.
fn program() -> String {
    env::args_os().next().map_or_else(
        || "relatch".to_owned(),
        |program| Path::new(&program).display().to_string(),
    )
}

/// Quotes `text` as one word of a shell.
fn shell_word(text: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "_-./:@%+=,".contains(c);
    if !text.is_empty() && text.chars().all(is_plain) {
        text.to_owned()
    } else {
        format!("'{}'", text.replace('\'', "'\\''"))
    }
}

/// Replaces a file that everybody may read, as a whole.
fn replace(path: &Path, content: &str) -> io::Result<()> {
    let mut draft = Draft::create(path, 0o644)?;
    draft.file().write_all(content.as_bytes())?;
    draft.publish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_that_is_taken_can_be_left_to_the_system() {
        for (kind, is_taken) in [
            (io::ErrorKind::AddrInUse, true),
            (io::ErrorKind::PermissionDenied, false),
        ] {
            let control = no_control_plane(PlaneError::Bind {
                field: "http",
                address: ANY_PORT,
                source: kind.into(),
            });
            let sidecar = no_sidecar(SidecarError::Listen {
                field: "listen",
                listen: Listen::Tcp(ANY_PORT),
                source: kind.into(),
            });
            let http = no_sidecar(SidecarError::Http {
                address: ANY_PORT,
                source: kind.into(),
            });
            for failure in [control, sidecar, http] {
                let report = failure.report(false);
                assert_eq!(report.contains("--ephemeral-ports"), is_taken, "{report}");
            }
        }
    }

    #[test]
    fn a_path_is_one_word_of_a_shell() {
        for (path, word) in [
            ("target/release/relatch", "target/release/relatch"),
            ("/home/you/my keys", "'/home/you/my keys'"),
            ("it's $HOME", r"'it'\''s $HOME'"),
            ("", "''"),
        ] {
            assert_eq!(shell_word(path), word);
        }
    }
}
