//! Checks whether a daemon would start on this machine: whether the files, directories and addresses that its configuration
//! names exist and can be used.
//!
//! The checks call the functions that a start calls. They create, change and delete nothing. They lock a store for a moment
//! only, so that a daemon may run meanwhile; its addresses and its store are then reported as in use. A new setting that
//! names something on the machine is checked in [`Look::control`] or [`Look::sidecar`].

use std::{
    error::Error,
    fs, io,
    net::{SocketAddr, TcpListener},
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
};

use prometheus_client::registry::Registry;
use rustix::fs::{Access, AtFlags, CWD};

use crate::{
    clock::Clock,
    config::{
        Checked, ControlSettings, Listen, SidecarSettings, SinkSettings, sidecar::SnapshotSettings,
        sink::SinkTarget, vault::VaultSettings,
    },
    control::{
        data::{self, PepperRecord},
        secrets::{self, SecretFileError},
        sink::{file::FileSink, vault::VaultSink},
    },
    secret_file::{self, PrivateFileError},
    sidecar::listener::Occupant,
    snapshot::{
        key::{KeyFileError, SnapshotKey},
        place::SnapshotPlace,
    },
    store::{Named, Ownership, SqliteStore, StoreError, StoreOwner},
    tls::{Authorities, Credentials, TlsError, TlsFiles, TlsMetrics, TlsUse, files::OwnFiles},
    wire::token::{SidecarToken, TokenFileError},
};

/// A difference between the configuration and this machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Finding {
    /// The path of the field, such as `snapshot.key_file`.
    pub(crate) field: String,
    /// The field whose line is reported where `field` is not in the file; empty: none.
    pub(crate) near: &'static str,
    /// The problem, and the remedy.
    pub(crate) message: String,
    pub(crate) weight: Weight,
}

/// What a finding means for a start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Weight {
    /// The start fails, or the purpose of the field does not work.
    Problem,
    /// The daemon starts.
    Warning,
}

/// A check of this machine in progress, with the findings so far.
struct Look {
    clock: Clock,
    found: Vec<Finding>,
}

/// The field of the store, and the field that determines its path where `store.sqlite` is not given.
const STORE: &str = "store.sqlite";
const NEAR_STORE: &str = "data_dir";
/// The advice about a file that cannot be read.
const CHECK_PATH: &str = "check the path and its permissions";

/// Returns all findings in the order of the checks. It blocks.
pub(crate) fn look(settings: &Checked, clock: Clock) -> Vec<Finding> {
    let mut look = Look {
        clock,
        found: Vec::new(),
    };
    match settings {
        Checked::Control(settings) => look.control(settings),
        Checked::Sidecar(settings) => look.sidecar(settings),
    }
    look.found
}

impl Look {
    /// Checks everything that the configuration of a control plane names.
    fn control(&mut self, settings: &ControlSettings) {
        let has_data = self.data_dir(&settings.data_dir);
        // A missing directory is one finding: the files in it are not reported too.
        let may_be = |path: &Path| has_data || !path.starts_with(&settings.data_dir);
        let has_pepper = may_be(&settings.pepper_file) && self.pepper(&settings.pepper_file);
        let before = self.found.len();
        let has_store = may_be(&settings.store) && self.store(&settings.store);
        if has_pepper && has_store && self.found.len() == before {
            self.pepper_of_store(settings);
        }
        if has_data && !(has_pepper && has_store) {
            let field = match (has_pepper, has_store) {
                (true, false) => STORE,
                (false, true) => "pepper_file",
                (false, false) | (true, true) => "data_dir",
            };
            let message = match StoreOwner::look(&settings.store) {
                Ok(Ownership::Held(owner)) => format!(
                    "{} is in use by {}, which may be creating what is missing: check again when it is done",
                    settings.store.display(),
                    Named(owner.as_ref())
                ),
                Ok(Ownership::Free) | Err(_) => {
                    with_causes(&data::lacking(settings, has_pepper, has_store))
                }
            };
            self.problem_near(field, "data_dir", message);
        }
        for (field, used, files) in [
            (
                "discovery",
                TlsUse::DiscoveryServer,
                &settings.discovery_tls,
            ),
            ("admin", TlsUse::AdminServer, &settings.admin_tls),
        ] {
            if let Some(files) = files {
                self.tls(field, "client_ca", used, files);
            }
        }
        for (at, token) in settings.sidecar_tokens.iter().enumerate() {
            self.sidecar_token(format!("discovery.tokens[{at}].file"), &token.path);
        }
        for (at, sink) in settings.sinks.iter().enumerate() {
            self.sink(at, sink);
        }
        self.address("discovery", settings.discovery);
        self.address("admin", settings.admin);
        self.address("http", settings.http);
    }

    /// Checks everything that the configuration of a sidecar names.
    fn sidecar(&mut self, settings: &SidecarSettings) {
        match &settings.listen {
            Listen::Tcp(address) => self.address("listen", *address),
            Listen::Unix(path) => self.socket("listen", path),
        }
        if let Some(files) = &settings.listen_tls {
            self.tls("listen", "client_ca", TlsUse::ExtAuthzServer, files);
        }
        if let Some(http_authz) = &settings.http_authz {
            const FIELD: &str = "http_authz.listen";
            match &http_authz.listen {
                Listen::Tcp(address) => self.address(FIELD, *address),
                Listen::Unix(path) => self.socket(FIELD, path),
            }
            if let Some(files) = &http_authz.listen_tls {
                self.tls(FIELD, "client_ca", TlsUse::HttpAuthzServer, files);
            }
        }
        self.address("http", settings.http);
        if let Some(tls) = &settings.control_tls {
            self.tls("control", "ca", TlsUse::DiscoveryClient, &tls.files);
            if let Some(path) = &tls.token_file {
                self.sidecar_token("control.tls.token_file".to_owned(), path);
            }
        }
        if let Some(snapshot) = &settings.snapshot {
            self.snapshot(snapshot);
        }
    }

    /// Returns whether the directory exists.
    fn data_dir(&mut self, path: &Path) -> bool {
        const FIELD: &str = "data_dir";
        let shown = path.display();
        match fs::metadata(path) {
            Ok(metadata) if metadata.is_dir() => {
                self.writable(FIELD, path);
                true
            }
            Ok(_) => {
                self.problem(
                    FIELD,
                    format!("{shown} is not a directory: correct the path"),
                );
                false
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.problem(
                    FIELD,
                    format!(
                        "the directory {shown} does not exist: create it and its content with `relatch control init`, or correct the path"
                    ),
                );
                false
            }
            Err(error) => {
                self.problem(FIELD, format!("cannot read {shown}: {error}; {CHECK_PATH}"));
                false
            }
        }
    }

    /// Returns whether the store exists, even if something is wrong with it.
    fn store(&mut self, path: &Path) -> bool {
        match SqliteStore::look(path) {
            Ok(()) => {}
            Err(StoreError::Missing { .. }) => return false,
            Err(error) => self.problem_near(STORE, NEAR_STORE, with_causes(&error)),
        }
        if let Err(error) = StoreOwner::look_at_names(path) {
            self.problem_near(STORE, NEAR_STORE, with_causes(&error));
        }
        match StoreOwner::look(path) {
            Ok(Ownership::Free) => {}
            // A warning only: an operator who checks a change before a restart finds the running control plane.
            Ok(Ownership::Held(owner)) => self.found.push(Finding {
                field: STORE.to_owned(),
                near: NEAR_STORE,
                message: format!(
                    "{} is in use by {}: a second control plane would not start",
                    path.display(),
                    Named(owner.as_ref())
                ),
                weight: Weight::Warning,
            }),
            Err(error) => self.problem_near(STORE, NEAR_STORE, with_causes(&error)),
        }
        true
    }

    /// Returns whether the pepper file exists, even if something is wrong with it.
    fn pepper(&mut self, path: &Path) -> bool {
        const FIELD: &str = "pepper_file";
        const NEAR: &str = "data_dir";
        match secrets::read_pepper(path) {
            Ok(_) => self.exposed(FIELD, NEAR, path),
            Err(SecretFileError::Missing { .. }) => return false,
            Err(error @ SecretFileError::Io { .. }) => {
                self.problem_near(
                    FIELD,
                    NEAR,
                    format!("{}; {CHECK_PATH}", with_causes(&error)),
                );
            }
            Err(error @ (SecretFileError::Malformed { .. } | SecretFileError::Random(_))) => {
                self.problem_near(FIELD, NEAR, with_causes(&error));
            }
        }
        true
    }

    /// Checks that the pepper belongs to the store. This is possible only for a store that no
    /// process uses.
    fn pepper_of_store(&mut self, settings: &ControlSettings) {
        // A pepper that cannot be read is already among the findings.
        let Ok(pepper) = secrets::read_pepper(&settings.pepper_file) else {
            return;
        };
        match PepperRecord::at_rest(&settings.store) {
            Ok(Some(record)) => {
                if let Err(error) = record.check(settings, &pepper) {
                    self.problem_near("pepper_file", "data_dir", with_causes(&error));
                }
            }
            // A process uses the store, or was killed while it used it. The help of the command
            // explains this.
            Ok(None) => {}
            Err(error) => self.problem_near(STORE, NEAR_STORE, with_causes(&error)),
        }
    }

    /// Warns about a secret file that other users can read or write. A start accepts it.
    fn exposed(&mut self, field: &str, near: &'static str, path: &Path) {
        // An error here was already reported when the file was read.
        if let Ok(Some(mode)) = secret_file::mode_if_open(path) {
            let shown = path.display();
            self.found.push(Finding {
                field: field.to_owned(),
                near,
                message: format!(
                    "{shown} holds a secret, and its mode is {mode:03o}: other users can use it; run `chmod 600` on it"
                ),
                weight: Weight::Warning,
            });
        }
    }

    /// Checks the TLS files of a channel, each part on its own, so that an error in one does not hide an error in another.
    fn tls(&mut self, field: &str, ca_name: &str, used: TlsUse, files: &TlsFiles) {
        let field = |name: &str| format!("{field}.tls.{name}");
        if let Some(own) = &files.own {
            let pair = TlsFiles {
                own: Some(own.clone()),
                ca: None,
            };
            let loaded = self.load(used, pair);
            match (loaded, Credentials::check_key(&own.key)) {
                (Ok(()), _) => {}
                (Err(_), Err(of_key)) => {
                    self.problem(field("key"), with_causes(&of_key));
                    self.certificate(&field("cert"), used, own);
                }
                (Err(error @ TlsError::Mismatch { .. }), Ok(())) => {
                    self.problem(field("key"), with_causes(&error));
                }
                (Err(error), Ok(())) => self.problem(field("cert"), with_causes(&error)),
            }
        }
        let Some(ca) = &files.ca else {
            return;
        };
        let load = |look: &Self, ca: Authorities<PathBuf>| {
            let authorities = TlsFiles {
                own: None,
                ca: Some(ca),
            };
            look.load(used, authorities)
        };
        let Err(error) = load(self, ca.clone()) else {
            return;
        };
        let Authorities::Bundles(bundles) = ca else {
            self.problem(field(ca_name), with_causes(&error));
            return;
        };
        let before = self.found.len();
        for path in bundles.values() {
            if let Err(error) = load(self, Authorities::Flat(path.clone())) {
                self.problem(field("bundles"), with_causes(&error));
            }
        }
        if self.found.len() == before {
            // Each bundle can be used alone, but not all of them together.
            self.problem(field("bundles"), with_causes(&error));
        }
    }

    /// Checks a certificate whose key cannot be used. It is read as an authority, which shows whether it is a certificate.
    fn certificate(&mut self, field: &str, used: TlsUse, own: &OwnFiles) {
        let alone = TlsFiles {
            own: None,
            ca: Some(Authorities::Flat(own.cert.clone())),
        };
        match self.load(used, alone) {
            Err(
                error @ (TlsError::Read { .. }
                | TlsError::TooLarge { .. }
                | TlsError::NoCertificate { .. }
                | TlsError::Damaged { .. }),
            ) => self.problem(field, with_causes(&error)),
            // A certificate of a server or client is not an authority: these errors say nothing about it.
            Ok(())
            | Err(
                TlsError::Exposed { .. }
                | TlsError::NoKey { .. }
                | TlsError::Mismatch { .. }
                | TlsError::Expired { .. }
                | TlsError::NotYetValid { .. }
                | TlsError::NoSystemRoots
                | TlsError::Authority { .. }
                | TlsError::SharedAuthority { .. }
                | TlsError::Setup(_)
                | TlsError::Verifier(_),
            ) => {}
        }
    }

    /// Loads the files as a start does. It also fails for a certificate that is not valid now: a daemon starts with it, but
    /// no handshake succeeds.
    fn load(&self, used: TlsUse, files: TlsFiles) -> Result<(), TlsError> {
        let metrics = TlsMetrics::register(&mut Registry::default());
        Credentials::load(used, files, self.clock.clone(), metrics)?.check_validity()
    }

    fn sidecar_token(&mut self, field: String, path: &Path) {
        match SidecarToken::read(path) {
            Ok(_) => {}
            Err(TokenFileError::File(error)) => self.problem(field, private(&error)),
            Err(error @ TokenFileError::Malformed { .. }) => {
                self.problem(field, with_causes(&error));
            }
        }
    }

    /// Checks a sink. A start does not check it: a problem here would delay the first rotation.
    fn sink(&mut self, at: usize, sink: &SinkSettings) {
        match &sink.target {
            SinkTarget::File(settings) => {
                if let Err(error) = FileSink::new(settings).look() {
                    let field = format!("sinks[{at}].file.directory");
                    self.problem(field, with_causes(&error));
                }
            }
            SinkTarget::Exec(settings) => {
                let field = format!("sinks[{at}].exec.command[0]");
                self.program(field, &settings.program);
            }
            SinkTarget::Vault(settings) => self.vault(at, settings),
        }
    }

    fn program(&mut self, field: String, path: &Path) {
        let shown = path.display();
        match fs::metadata(path) {
            Ok(metadata)
                if metadata.is_file()
                    && metadata.permissions().mode() & 0o111 != 0
                    && may(path, Access::EXEC_OK) => {}
            Ok(_) => self.problem(
                field,
                format!("this user cannot run {shown}: name a program, and run `chmod +x` on it"),
            ),
            Err(error) => self.problem(field, format!("cannot run {shown}: {error}; {CHECK_PATH}")),
        }
    }

    fn vault(&mut self, at: usize, settings: &VaultSettings) {
        let field = |name: &str| format!("sinks[{at}].vault.{name}");
        if let Err(error) = VaultSink::new(settings) {
            self.problem(field("ca_file"), with_causes(&error));
        }
        match VaultSink::check_token(settings) {
            Ok(()) => self.exposed(&field("token_file"), "", &settings.token_file),
            Err(error) => self.problem(field("token_file"), with_causes(&error)),
        }
    }

    fn snapshot(&mut self, settings: &SnapshotSettings) {
        const PATH: &str = "snapshot.path";
        if let Err(error) = SnapshotKey::read(&settings.key_file) {
            let message = match &error {
                KeyFileError::Unusable(error) => private(error),
                KeyFileError::Missing { .. }
                | KeyFileError::Malformed { .. }
                | KeyFileError::Exists { .. }
                | KeyFileError::Make { .. }
                | KeyFileError::Random(_) => with_causes(&error),
            };
            self.problem("snapshot.key_file", message);
        }
        if !self.directory_of(PATH, &settings.path) {
            return;
        }
        if let Err(error) = SnapshotPlace::look(&settings.path) {
            self.found.push(Finding {
                field: PATH.to_owned(),
                near: "",
                message: format!(
                    "the sidecar cannot use {}, and puts it aside at its start: {}",
                    settings.path.display(),
                    with_causes(&error)
                ),
                weight: Weight::Warning,
            });
        }
    }

    fn socket(&mut self, field: &str, path: &Path) {
        if !self.directory_of(field, path) {
            return;
        }
        let shown = path.display();
        match Occupant::of(path) {
            Ok(Occupant::Nothing | Occupant::StaleSocket) => {}
            Ok(Occupant::Other) => self.problem(
                field,
                format!(
                    "{shown} is in use, or is not a socket: stop the process that listens there, or choose another path; --offline skips this check"
                ),
            ),
            Err(error) => self.problem(field, format!("cannot read {shown}: {error}; {CHECK_PATH}")),
        }
    }

    /// Binds the address for a moment, as a start does.
    fn address(&mut self, field: &str, address: SocketAddr) {
        let Err(error) = TcpListener::bind(address) else {
            return;
        };
        let what_to_do = match error.kind() {
            io::ErrorKind::AddrInUse => {
                "stop the process that listens there, or choose another port; if it is this daemon, --offline skips this check"
            }
            io::ErrorKind::AddrNotAvailable => "use an address of this machine",
            io::ErrorKind::PermissionDenied => {
                "ports below 1024 need the capability CAP_NET_BIND_SERVICE: choose another port"
            }
            _ => "choose another address",
        };
        self.problem(
            field,
            format!("cannot listen on {address}: {error}; {what_to_do}"),
        );
    }

    /// Checks the directory of a file that the daemon will create. Returns whether this user can create files in it.
    fn directory_of(&mut self, field: &str, path: &Path) -> bool {
        let directory = match path.parent() {
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            Some(_) | None => Path::new("."),
        };
        let shown = directory.display();
        match fs::metadata(directory) {
            Ok(metadata) if metadata.is_dir() => self.writable(field, directory),
            Ok(_) => {
                self.problem(
                    field,
                    format!("{shown} is not a directory: correct the path"),
                );
                false
            }
            Err(error) => {
                self.problem(
                    field,
                    format!(
                        "cannot use the directory {shown}: {error}; create it, or correct the path"
                    ),
                );
                false
            }
        }
    }

    /// Checks whether this user can create files in an existing directory, and returns it.
    fn writable(&mut self, field: &str, directory: &Path) -> bool {
        let may_write = may(directory, Access::WRITE_OK | Access::EXEC_OK);
        if !may_write {
            self.problem(
                field,
                format!(
                    "this user cannot create files in {}: make the user of the daemon the owner of the directory, on a writable file system",
                    directory.display()
                ),
            );
        }
        may_write
    }

    fn problem(&mut self, field: impl Into<String>, message: String) {
        self.problem_near(field, "", message);
    }

    fn problem_near(&mut self, field: impl Into<String>, near: &'static str, message: String) {
        self.found.push(Finding {
            field: field.into(),
            near,
            message,
            weight: Weight::Problem,
        });
    }
}

/// Whether the effective user of this process has `access` to `path`.
fn may(path: &Path, access: Access) -> bool {
    rustix::fs::accessat(CWD, path, access, AtFlags::EACCESS).is_ok()
}

fn private(error: &PrivateFileError) -> String {
    match error {
        PrivateFileError::Io { .. } => format!("{}; {CHECK_PATH}", with_causes(error)),
        PrivateFileError::Open { .. } => with_causes(error),
    }
}

/// An error with its causes, on one line.
fn with_causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::testing::{Authority, Files, Leaf};

    #[test]
    fn a_certificate_that_is_not_valid_now_is_found_although_a_start_takes_it() {
        let (files, authority) = (Files::new(), Authority::new("authority"));
        let found = |from, to| {
            let issued = authority.issue(&Leaf::server(&["control"]).valid(from, to));
            let mut look = Look {
                clock: Clock::system(),
                found: Vec::new(),
            };
            let pair = TlsFiles {
                own: Some(files.pair("control", &issued)),
                ca: None,
            };
            look.tls("admin", "client_ca", TlsUse::AdminServer, &pair);
            let found = look.found.into_iter();
            found
                .map(|finding| (finding.field, finding.message))
                .collect::<Vec<_>>()
        };
        assert_eq!(found(-1, 1), []);
        for (from, to, said) in [(-3, -1, "expired on"), (1, 3, "is not valid before")] {
            let found = found(from, to);
            let [(field, message)] = found.as_slice() else {
                panic!("one finding, and not {found:?}");
            };
            assert_eq!(field, "admin.tls.cert");
            assert!(message.contains(said), "{message}");
        }
    }
}
