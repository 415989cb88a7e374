//! `relatch certs`: creates certificates to try out TLS.

use std::{
    fs,
    io::{self, Write as _},
    path::{Path, PathBuf},
    time::Duration,
};

use clap::{Args, Subcommand};
use serde::Serialize;
use zeroize::Zeroizing;

use super::{Console, Exit, Failure, output::View, words};
use crate::{
    control::secrets,
    draft::Draft,
    key::Timestamp,
    node_name::NodeName,
    tls::{
        Identity,
        dev::{DevAuthority, DevPair, Subject},
    },
};

/// The commands of `certs`.
#[derive(Debug, Subcommand)]
pub enum CertsCommand {
    /// Create an authority and certificates for control plane, sidecars, operator and Envoy, to try out TLS
    ///
    /// Do not use them in production: the key of the authority is in a file, and nothing renews the certificates. If
    /// the directory already has an authority, that authority is used again.
    Dev(DevArgs),
}

/// The arguments of `certs dev`.
#[derive(Debug, Args)]
pub struct DevArgs {
    /// Directory to write to; it is created if it does not exist
    #[arg(long, value_name = "DIR")]
    out: PathBuf,

    /// Node id of a sidecar; may be repeated
    #[arg(long, value_name = "ID", default_value = "edge-1")]
    node: Vec<NodeName>,

    /// Additional host name or address of the control plane and of the sidecars' `ext_authz`; may be repeated [default:
    /// only localhost and its addresses]
    #[arg(long, value_name = "NAME")]
    host: Vec<String>,

    /// Validity in days, 1 to 365
    #[arg(long, value_name = "N", default_value = "30", value_parser = clap::value_parser!(u32).range(1..=365))]
    days: u32,

    /// Trust domain of the identities: `spiffe://NAME/`
    #[arg(long, value_name = "NAME", default_value = "relatch.example")]
    trust_domain: NodeName,

    /// Replace existing certificates, under the same authority
    #[arg(long)]
    force: bool,
}

/// The files that were created.
#[derive(Debug, Serialize)]
struct MadeView {
    directory: PathBuf,
    files: Vec<String>,
    not_after: Timestamp,
    /// The lines for the two configuration files and for the shell.
    control: String,
    sidecar: String,
    operator: String,
}

/// A file to write.
struct CertificateFile {
    name: String,
    content: Zeroizing<String>,
    mode: u32,
}

const DAY: Duration = Duration::from_hours(24);
/// The hosts in every certificate: localhost and its addresses.
const LOCAL: [&str; 3] = ["localhost", "127.0.0.1", "::1"];
/// Whether the content of a file is public, or a key.
const PUBLIC: u32 = 0o644;
const KEY: u32 = 0o600;

impl CertsCommand {
    /// Runs the command.
    ///
    /// # Errors
    ///
    /// When a file already exists, or something cannot be created.
    pub fn run(self, console: &Console) -> Result<(), Failure> {
        match self {
            Self::Dev(args) => args.run(console),
        }
    }
}

impl DevArgs {
    fn run(self, console: &Console) -> Result<(), Failure> {
        let now = console.now();
        secrets::ensure_directory(&self.out).map_err(Failure::from_error)?;
        let (authority, mut files) = self.authority(now)?;
        let life = DAY * self.days;
        for (file, subject) in self.subjects()? {
            let pair = authority.issue(&subject, now, life);
            files.extend(pair_files(&file, pair.map_err(Failure::from_error)?));
        }
        self.write(&files)?;
        console.show(&self.view(&files, now.saturating_add(life)))?;
        console
            .output
            .note("do not use these in production: let SPIRE, cert-manager or Vault issue and renew certificates");
        Ok(())
    }

    /// The authority, and its files to write.
    fn authority(&self, now: Timestamp) -> Result<(DevAuthority, Vec<CertificateFile>), Failure> {
        let (cert, key) = (self.out.join("ca.pem"), self.out.join("ca.key"));
        match (fs::read_to_string(&cert), fs::read_to_string(&key)) {
            (Ok(cert), Ok(key)) => {
                let pair = DevPair {
                    cert,
                    key: Zeroizing::new(key),
                };
                let authority = DevAuthority::from_pem(pair, now);
                let authority = authority.map_err(|error| Failure::new(Exit::Refused, error))?;
                Ok((authority, Vec::new()))
            }
            (Err(one), Err(other)) if is_missing(&one) && is_missing(&other) => {
                let authority =
                    DevAuthority::new(now, DAY * self.days).map_err(Failure::from_error)?;
                let pair = DevPair {
                    cert: authority.pair().cert.clone(),
                    key: authority.pair().key.clone(),
                };
                Ok((authority, pair_files("ca", pair).into()))
            }
            (Err(error), _) | (_, Err(error)) => Err(Failure::from_error(error).context(format!(
                "cannot read both {} and {}",
                cert.display(),
                key.display()
            ))),
        }
    }

    /// The subjects of the certificates, each with the name of its files.
    fn subjects(&self) -> Result<Vec<(String, Subject)>, Failure> {
        let hosts: Vec<String> = LOCAL
            .map(str::to_owned)
            .into_iter()
            .chain(self.host.clone())
            .collect();
        let subject = |name: &str, path: String, hosts: &[String]| {
            let identity: Identity = format!("spiffe://{}/{path}", self.trust_domain)
                .parse()
                .map_err(|error| Failure::new(Exit::Usage, anyhow::Error::new(error)))?;
            Ok::<_, Failure>(Subject {
                name: name.to_owned(),
                is_server: !hosts.is_empty(),
                hosts: hosts.to_vec(),
                identity: Some(identity),
            })
        };
        let mut subjects = vec![
            (
                "control".to_owned(),
                subject("relatch control", "control".to_owned(), &hosts)?,
            ),
            (
                "ext-authz".to_owned(),
                subject("relatch ext_authz", "ext-authz".to_owned(), &hosts)?,
            ),
            (
                "envoy".to_owned(),
                subject("envoy", "envoy".to_owned(), &[])?,
            ),
            (
                "operator".to_owned(),
                subject("operator", "operator".to_owned(), &[])?,
            ),
        ];
        for node in &self.node {
            let named = subject(node.as_str(), format!("node/{node}"), &[])?;
            subjects.push((format!("node-{node}"), named));
        }
        Ok(subjects)
    }

    /// Writes all files, or none if one exists that must not be replaced.
    fn write(&self, files: &[CertificateFile]) -> Result<(), Failure> {
        let there = files.iter().map(|file| self.out.join(&file.name));
        if !self.force
            && let Some(path) = there
                .into_iter()
                .find(|path| path.symlink_metadata().is_ok())
        {
            return Err(Failure::new(
                Exit::Refused,
                anyhow::anyhow!("{} already exists", path.display()),
            )
            .hint("--force replaces the certificates, under the same authority"));
        }
        for file in files {
            let path = self.out.join(&file.name);
            write(&path, file).map_err(|error| {
                Failure::from_error(error).context(format!("cannot write {}", path.display()))
            })?;
        }
        Ok(())
    }

    fn view(&self, files: &[CertificateFile], not_after: Timestamp) -> MadeView {
        let directory = self.out.canonicalize().unwrap_or_else(|_| self.out.clone());
        let dir = directory.display();
        let domain = &self.trust_domain;
        let node = &self.node[0];
        MadeView {
            control: format!(
                "discovery:\n  \
                 address: 0.0.0.0:9010\n  \
                 tls: {{ cert: {dir}/control.pem, key: {dir}/control.key, client_ca: {dir}/ca.pem }}\n  \
                 allow:\n    \
                 - {{ identity: \"spiffe://{domain}/node/*\", keyrings: [\"*\"] }}\n\
                 admin:\n  \
                 address: 0.0.0.0:9011\n  \
                 tls: {{ cert: {dir}/control.pem, key: {dir}/control.key, client_ca: {dir}/ca.pem }}\n"
            ),
            sidecar: format!(
                "node: {{ id: {node} }}\n\
                 control:\n  \
                 endpoints: [\"https://localhost:9010\"]\n  \
                 tls:\n    \
                 ca: {dir}/ca.pem\n    \
                 cert: {dir}/node-{node}.pem\n    \
                 key: {dir}/node-{node}.key\n    \
                 server_identity: spiffe://{domain}/control\n"
            ),
            operator: format!(
                "export RELATCH_ADMIN=https://localhost:9011 RELATCH_CA={dir}/ca.pem\n\
                 export RELATCH_TLS_CERT={dir}/operator.pem RELATCH_TLS_KEY={dir}/operator.key\n"
            ),
            files: files.iter().map(|file| file.name.clone()).collect(),
            not_after,
            directory,
        }
    }
}

impl View for MadeView {
    fn render(&self, _now: Timestamp) -> String {
        format!(
            "{}: {}; valid until {}\n\n\
             # control.yaml\n{}\n\
             # sidecar.yaml; `listen` also accepts a `tls` section, with ext-authz.pem and ext-authz.key\n{}\n\
             # an operator's shell\n{}",
            self.directory.display(),
            self.files.join(" "),
            words::time(Some(self.not_after)),
            self.control,
            self.sidecar,
            self.operator
        )
    }
}

fn pair_files(name: &str, pair: DevPair) -> [CertificateFile; 2] {
    let DevPair { cert, key } = pair;
    [
        CertificateFile {
            name: format!("{name}.pem"),
            content: Zeroizing::new(cert),
            mode: PUBLIC,
        },
        CertificateFile {
            name: format!("{name}.key"),
            content: key,
            mode: KEY,
        },
    ]
}

fn write(path: &Path, file: &CertificateFile) -> io::Result<()> {
    let mut draft = Draft::create(path, file.mode)?;
    draft.file().write_all(file.content.as_bytes())?;
    draft.publish()
}

fn is_missing(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use clap::Parser as _;

    use super::*;
    use crate::{
        cli::{Cli, Command, output::Terminal},
        clock::Clock,
        tls::{
            Authorities, Certificate, Credentials, TlsFiles, TlsMetrics, TlsUse, files::OwnFiles,
        },
    };

    async fn certs(dir: &Path, args: &[&str]) -> Result<Exit, Failure> {
        let out = dir.to_str().expect("text");
        let line = [&["relatch", "certs", "dev", "--out", out], args].concat();
        let cli = Cli::try_parse_from(line).expect("a command line");
        assert!(matches!(cli.command, Command::Certs(_)));
        cli.run(Terminal::default()).await
    }

    fn describe(path: &Path) -> Certificate {
        use rustls::pki_types::{CertificateDer, pem::PemObject as _};

        let der = CertificateDer::from_pem_file(path).expect("PEM");
        Certificate::read(&der).expect("a certificate")
    }

    #[tokio::test]
    async fn a_set_is_made_whose_keys_are_private_and_fit() {
        let dir = tempfile::tempdir().expect("a directory");
        let dir = dir.path().join("certs");
        certs(
            &dir,
            &["--node", "a", "--node", "b", "--host", "control.example"],
        )
        .await
        .expect("it is made");
        for name in [
            "control",
            "ext-authz",
            "envoy",
            "operator",
            "node-a",
            "node-b",
        ] {
            let own = OwnFiles {
                cert: dir.join(format!("{name}.pem")),
                key: dir.join(format!("{name}.key")),
            };
            let mode = |path: &Path| {
                fs::metadata(path)
                    .expect("it is there")
                    .permissions()
                    .mode()
            };
            assert_eq!(mode(&own.key) & 0o777, KEY, "{name}");
            let files = TlsFiles {
                own: Some(own),
                ca: Some(Authorities::Flat(dir.join("ca.pem"))),
            };
            let (used, clock) = (TlsUse::AdminClient, Clock::system());
            let loaded = Credentials::load(used, files, clock, TlsMetrics::default());
            loaded.unwrap_or_else(|error| panic!("{error}"));
        }
        let control = describe(&dir.join("control.pem")).to_string();
        assert!(
            control.contains(
                "for spiffe://relatch.example/control, localhost, 127.0.0.1, ::1, control.example;"
            ),
            "{control}"
        );
        let node = describe(&dir.join("node-b.pem"));
        assert_eq!(node.uris(), ["spiffe://relatch.example/node/b"]);
        let life = node.not_after().saturating_since(Clock::system().wall());
        assert_eq!(life.as_secs().div_ceil(DAY.as_secs()), 30);
    }

    #[tokio::test]
    async fn what_is_there_is_replaced_by_force_only_and_under_the_same_authority() {
        let dir = tempfile::tempdir().expect("a directory");
        let dir = dir.path();
        certs(dir, &[]).await.expect("it is made");
        let read = |name: &str| fs::read_to_string(dir.join(name)).expect("it is there");
        let (ca, node) = (read("ca.pem"), read("node-edge-1.pem"));
        let refused = certs(dir, &[]).await.expect_err("it is there");
        assert_eq!(refused.exit(), Exit::Refused);
        assert_eq!(read("node-edge-1.pem"), node);
        certs(dir, &["--force"]).await.expect("by force");
        assert_eq!(read("ca.pem"), ca);
        assert_ne!(read("node-edge-1.pem"), node);
        // Somebody else's authority is left alone.
        fs::copy(dir.join("operator.key"), dir.join("ca.key")).expect("writable");
        let refused = certs(dir, &["--force"]).await.expect_err("another key");
        assert_eq!(refused.exit(), Exit::Refused);
    }
}
