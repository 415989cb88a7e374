//! The connection to the control plane: its address, the admin token, and the limits of a call.

use std::{
    fmt,
    path::{Path, PathBuf},
    str::FromStr,
    time::Duration,
};

use http::Uri;
use tonic::{
    Request, Response, Status,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Channel, Endpoint},
};
use zeroize::Zeroizing;

use super::{
    Console, Session,
    failure::{Exit, Failure},
    secret::SecretInput,
};
use crate::{
    clock::Clock,
    config::plaintext::refuse_plaintext_client,
    proto::admin::admin_client::AdminClient,
    tls::{
        Authorities, Credentials, TlsClient, TlsFiles, TlsMetrics, TlsUse, connector::Connector,
        files::OwnFiles,
    },
};

/// The client of the admin API; it sends the token with every call.
pub type Admin = AdminClient<InterceptedService<Channel, Bearer>>;

/// A command with subcommands, and the connection to the control plane.
#[derive(Debug, clap::Args)]
pub struct Client<C: clap::Subcommand> {
    #[command(flatten)]
    pub(super) connection: ConnectionArgs,

    #[command(subcommand)]
    pub(super) command: C,
}

/// A command without subcommands, and the connection to the control plane.
#[derive(Debug, clap::Args)]
pub struct ClientArgs<A: clap::Args> {
    #[command(flatten)]
    pub(super) args: A,

    #[command(flatten)]
    pub(super) connection: ConnectionArgs,
}

/// The connection to the control plane.
#[derive(Clone, Debug, clap::Args)]
#[command(next_help_heading = "Connection options")]
pub struct ConnectionArgs {
    /// Admin API of the control plane: `https://HOST:PORT`, `unix:///PATH`, or `http://HOST:PORT` on this machine
    #[arg(
        long,
        global = true,
        value_name = "URL",
        env = "RELATCH_ADMIN",
        default_value = "http://127.0.0.1:9011"
    )]
    admin: AdminAddress,

    /// File that contains the admin token [default: ./relatch-data/admin.token, which `relatch dev` writes]
    #[arg(long, global = true, value_name = "PATH", env = "RELATCH_TOKEN_FILE")]
    token_file: Option<PathBuf>,

    #[command(flatten)]
    tls: TlsArgs,
}

/// Certificates for `https://`.
#[derive(Clone, Debug, Default, clap::Args)]
#[command(next_help_heading = "Connection options")]
pub struct TlsArgs {
    /// Certificate authorities to trust for https, in PEM [default: the system's]
    #[arg(long, global = true, value_name = "PATH", env = "RELATCH_CA")]
    ca: Option<PathBuf>,

    /// Client certificate for https, in PEM [default: none]
    #[arg(
        long,
        global = true,
        value_name = "PATH",
        env = "RELATCH_TLS_CERT",
        requires = "tls_key"
    )]
    tls_cert: Option<PathBuf>,

    /// Private key of the client certificate, in PEM [default: none]
    #[arg(
        long,
        global = true,
        value_name = "PATH",
        env = "RELATCH_TLS_KEY",
        requires = "tls_cert"
    )]
    tls_key: Option<PathBuf>,
}

/// The address of a gRPC server: `HOST:PORT`, `http://HOST:PORT`, `https://HOST:PORT` or `unix:///PATH`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Address(String);

/// An [`Address`] to which an admin token may be sent: over TLS, or in plaintext to a loopback address or a Unix socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AdminAddress(Address);

/// A text that is not an address that a command can call.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ParseAddressError {
    /// The text is not an address.
    #[error(
        "write https://HOST:PORT, http://HOST:PORT or unix:///PATH, for example http://127.0.0.1:9011"
    )]
    Syntax,
    /// The token would cross a network in plaintext.
    #[error(
        "the admin token would cross the network unencrypted; use https://, or a loopback address through `ssh -L` or `kubectl port-forward`"
    )]
    NotLoopback,
}

/// Adds `authorization: Bearer TOKEN` to each call.
#[derive(Clone)]
pub struct Bearer(MetadataValue<Ascii>);

/// The token file of `relatch dev`.
const DEV_TOKEN_FILE: &str = "relatch-data/admin.token";
/// The time to connect: a control plane on this machine answers immediately or not at all.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// The time for an answer that does not wait for sidecars. The slowest is a large list; a commit takes milliseconds.
const CALL_TIMEOUT: Duration = Duration::from_secs(30);
/// The keepalive finds a dead link within 15 seconds, as between a sidecar and the control plane.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(10);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// The largest answer, in bytes. The list of all keys is the largest; 64 MiB are enough for some 200,000 of them.
const MAX_ANSWER: usize = 64 << 20;
/// The largest request, in bytes. A key with all its scopes and sources has a few kilobytes.
const MAX_REQUEST: usize = 256 << 10;

impl<C: clap::Subcommand> Client<C> {
    /// Splits into the command and its session.
    pub(super) fn into_parts(self, console: Console) -> (C, Session) {
        let connection = self.connection;
        let session = Session {
            console,
            connection,
        };
        (self.command, session)
    }
}

impl<A: clap::Args> ClientArgs<A> {
    /// Splits into the arguments of the command and its session.
    pub(super) fn into_parts(self, console: Console) -> (A, Session) {
        let connection = self.connection;
        let session = Session {
            console,
            connection,
        };
        (self.args, session)
    }
}

impl ConnectionArgs {
    /// Connects to the control plane.
    ///
    /// # Errors
    ///
    /// When there is no admin token, or the control plane cannot be reached.
    pub async fn connect(&self) -> Result<Admin, Failure> {
        let bearer = Bearer::from_file(&self.token_file()?)?;
        connect(&self.admin, bearer, &self.tls)
            .await
            .map_err(|failure| {
                failure.hint(
                "--admin or RELATCH_ADMIN sets the address; `relatch dev` starts a control plane on this machine",
            )
            })
    }

    fn token_file(&self) -> Result<PathBuf, Failure> {
        if let Some(path) = &self.token_file {
            return Ok(path.clone());
        }
        let dev = Path::new(DEV_TOKEN_FILE);
        if dev.exists() {
            Ok(dev.to_owned())
        } else {
            Err(Failure::usage("no admin token").hint(format!(
                "use --token-file PATH or set RELATCH_TOKEN_FILE; `relatch dev` writes ./{DEV_TOKEN_FILE}, which is found only from the directory where `relatch dev` started"
            )))
        }
    }
}

/// Connects to the control plane at `address`.
///
/// # Errors
///
/// When it cannot be reached.
pub async fn connect(
    address: &AdminAddress,
    bearer: Bearer,
    tls: &TlsArgs,
) -> Result<Admin, Failure> {
    let channel = address
        .0
        .connect(CONNECT_TIMEOUT, tls)
        .await
        .map_err(|failure| {
            failure.context(format!("cannot reach the control plane at {address}"))
        })?;
    Ok(AdminClient::with_interceptor(channel, bearer)
        .max_decoding_message_size(MAX_ANSWER)
        .max_encoding_message_size(MAX_REQUEST))
}

/// Waits for the answer of a call that does not wait for sidecars.
///
/// # Errors
///
/// When the call fails, or is not answered within 30 seconds.
pub async fn answer<T>(
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, Failure> {
    answer_within(CALL_TIMEOUT, call).await
}

/// Waits for the answer of a call that may wait for sidecars.
///
/// # Errors
///
/// When the call fails, or is not answered within `patience`.
pub async fn answer_within<T>(
    patience: Duration,
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, Failure> {
    match tokio::time::timeout(patience, call).await {
        Ok(answer) => Ok(answer?.into_inner()),
        Err(_) => Err(Failure::unanswered(
            Exit::Unreachable,
            anyhow::anyhow!(
                "the control plane did not answer within {} seconds",
                patience.as_secs()
            ),
        )),
    }
}

impl Address {
    /// Connects to the address within `timeout`, with the certificates of `tls` for `https://`.
    ///
    /// # Errors
    ///
    /// When it cannot be reached.
    pub async fn connect(&self, timeout: Duration, tls: &TlsArgs) -> Result<Channel, Failure> {
        let unreachable = |error| Failure::new(Exit::Unreachable, anyhow::Error::new(error));
        let endpoint = Endpoint::from_shared(self.0.clone())
            .map_err(unreachable)?
            .user_agent(concat!("relatch/", env!("CARGO_PKG_VERSION")))
            .map_err(unreachable)?
            .connect_timeout(timeout)
            .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
            .keep_alive_timeout(KEEPALIVE_TIMEOUT);
        let connected = if self.has_tls() {
            Connector::new(tls.client()?).open(&endpoint).await
        } else {
            endpoint.connect().await
        };
        connected.map_err(unreachable)
    }

    fn has_tls(&self) -> bool {
        self.0.starts_with("https://")
    }

    /// Whether it is a Unix socket or a loopback address: no other machine sees that traffic.
    fn is_local(&self) -> bool {
        if self.0.starts_with("unix:") {
            return true;
        }
        let uri: Option<Uri> = self.0.parse().ok();
        let host = uri.as_ref().and_then(Uri::host).unwrap_or_default();
        refuse_plaintext_client(host, false).is_ok()
    }
}

impl TlsArgs {
    fn client(&self) -> Result<TlsClient, Failure> {
        let own = match (&self.tls_cert, &self.tls_key) {
            (Some(cert), Some(key)) => Some(OwnFiles {
                cert: cert.clone(),
                key: key.clone(),
            }),
            (Some(_) | None, Some(_) | None) => None,
        };
        let files = TlsFiles {
            own,
            ca: self.ca.clone().map(Authorities::Flat),
        };
        let (used, clock) = (TlsUse::AdminClient, Clock::system());
        let credentials = Credentials::load(used, files, clock, TlsMetrics::default())
            .map_err(|error| Failure::new(Exit::Usage, error))?;
        Ok(TlsClient::new(credentials, None))
    }
}

impl FromStr for Address {
    type Err = ParseAddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Some(path) = text.strip_prefix("unix://") {
            let valid = path.starts_with('/') && path.len() > 1;
            return if valid {
                Ok(Self(text.to_owned()))
            } else {
                Err(ParseAddressError::Syntax)
            };
        }
        let url = if text.contains("://") {
            text.to_owned()
        } else {
            format!("http://{text}")
        };
        let uri: Uri = url.parse().map_err(|_| ParseAddressError::Syntax)?;
        let plain = uri.port().is_some() && uri.path() == "/" && uri.query().is_none();
        match uri.scheme_str() {
            Some("http" | "https") if plain => Ok(Self(url)),
            _ => Err(ParseAddressError::Syntax),
        }
    }
}

impl FromStr for AdminAddress {
    type Err = ParseAddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let address: Address = text.parse()?;
        if address.has_tls() || address.is_local() {
            Ok(Self(address))
        } else {
            Err(ParseAddressError::NotLoopback)
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for AdminAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

impl AdminAddress {
    /// The address of a control plane in this process.
    #[must_use]
    pub fn at(address: std::net::SocketAddr) -> Self {
        Self(Address(format!("http://{address}")))
    }
}

impl Bearer {
    /// Reads a token from a file.
    ///
    /// # Errors
    ///
    /// When the file cannot be read, or does not contain a token.
    pub fn from_file(path: &Path) -> Result<Self, Failure> {
        let token = SecretInput::File(path.to_owned()).read("admin token", "--token-file")?;
        let is_token = token.iter().all(u8::is_ascii_graphic);
        let text = std::str::from_utf8(&token).ok().filter(|_| is_token);
        let header = text.map(|token| Zeroizing::new(format!("Bearer {token}")));
        let value = header.and_then(|header| header.parse::<MetadataValue<Ascii>>().ok());
        let mut value = value.ok_or_else(|| {
            Failure::usage(format!(
                "{} does not contain an admin token",
                path.display()
            ))
            .hint("the file must contain only the token, on one line")
        })?;
        // A sensitive value is not in the debug output, and not in the table of the header compression.
        value.set_sensitive(true);
        Ok(Self(value))
    }
}

impl fmt::Debug for Bearer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Bearer(redacted)")
    }
}

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        let metadata = request.metadata_mut();
        metadata.insert("authorization", self.0.clone());
        Ok(request)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;
    use crate::reserved::Reserved;

    #[test]
    fn addresses_are_host_and_port_url_or_socket() {
        for (text, address) in [
            ("127.0.0.1:9001", "http://127.0.0.1:9001"),
            ("http://edge.example:9001", "http://edge.example:9001"),
            ("[::1]:9001", "http://[::1]:9001"),
            ("https://edge.example:9001", "https://edge.example:9001"),
            (
                "unix:///run/relatch/authz.sock",
                "unix:///run/relatch/authz.sock",
            ),
        ] {
            let parsed = text.parse::<Address>().map(|address| address.to_string());
            assert_eq!(parsed.as_deref(), Ok(address));
        }
        for bad in [
            "",
            "127.0.0.1",
            "http://127.0.0.1",
            "unix://run.sock",
            "http://a:1/b",
            "ftp://a:1",
        ] {
            let error = bad.parse::<Address>().expect_err(bad);
            assert_eq!(error, ParseAddressError::Syntax, "{bad:?}");
        }
    }

    #[test]
    fn the_token_is_not_sent_across_a_network() {
        for local in [
            "http://127.0.0.1:9011",
            "http://localhost:9011",
            "http://[::1]:9011",
            "unix:///run/admin.sock",
            "https://relatch-control:9011",
        ] {
            assert!(local.parse::<AdminAddress>().is_ok(), "{local} was refused");
        }
        for remote in [
            "http://10.0.0.1:9011",
            "http://relatch-control:9011",
            "http://localhost.example:9011",
        ] {
            let error = remote.parse::<AdminAddress>().expect_err(remote);
            assert_eq!(error, ParseAddressError::NotLoopback, "{remote}");
        }
    }

    #[test]
    fn the_bearer_is_sensitive_and_does_not_print() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("admin.token");
        fs::write(&path, "rlt_abc\n").expect("writable");
        let bearer = Bearer::from_file(&path).expect("a token");
        assert_eq!(bearer.0.to_str().ok(), Some("Bearer rlt_abc"));
        assert!(bearer.0.is_sensitive());
        assert_eq!(format!("{bearer:?}"), "Bearer(redacted)");
    }

    #[test]
    fn a_file_that_holds_no_token_is_refused_without_repeating_it() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("admin.token");
        fs::write(&path, "rlt_abc\nrlt_def\n").expect("writable");
        let failure = Bearer::from_file(&path).expect_err("two lines");
        assert_eq!(failure.exit(), Exit::Usage);
        assert!(!failure.report(false).contains("rlt_"));
    }

    #[tokio::test]
    async fn a_port_that_expects_tls_is_named_as_such() {
        use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
        const ALERT: &[u8] = b"\x15\x03\x03\x00\x02\x02\x46";
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await;
        let listener = listener.expect("a port");
        let address = AdminAddress::at(listener.local_addr().expect("bound"));
        let server = async {
            let (mut socket, _) = listener.accept().await.expect("a connection");
            let mut preface = [0; 24];
            let _ = socket.read_exact(&mut preface).await;
            let _ = socket.write_all(ALERT).await;
            let _ = socket.write_all(&[0; 64]).await;
            // Open until the client has read it all.
            let _ = socket.read_to_end(&mut Vec::new()).await;
        };
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("admin.token");
        fs::write(&path, "rlt_abc\n").expect("writable");
        let bearer = Bearer::from_file(&path).expect("a token");
        let call = async {
            let mut admin = connect(&address, bearer, &TlsArgs::default()).await?;
            let request = crate::proto::admin::ListKeyringsRequest {};
            answer(admin.list_keyrings(request)).await
        };
        let failure = tokio::select! {
            answer = call => answer.expect_err("no HTTP/2"),
            () = async { server.await; std::future::pending().await } => unreachable!("it waits"),
        };
        assert_eq!(failure.exit(), Exit::Unreachable);
        let report = failure.report(false);
        assert!(
            report.contains("hint: the server may expect TLS: try https://"),
            "{report}"
        );
    }

    #[tokio::test]
    async fn a_port_that_nobody_listens_on_is_unreachable() {
        let nobody = Reserved::new();
        let address: Address = nobody.address().to_string().parse().expect("an address");
        let tls = TlsArgs::default();
        let failure = address.connect(CONNECT_TIMEOUT, &tls).await;
        let failure = failure.expect_err("closed");
        assert_eq!(failure.exit(), Exit::Unreachable);

        let dir = tempfile::tempdir().expect("a directory");
        let socket = format!("unix://{}/none.sock", dir.path().display());
        let address: Address = socket.parse().expect("an address");
        let failure = address
            .connect(CONNECT_TIMEOUT, &tls)
            .await
            .expect_err("not there");
        assert_eq!(failure.exit(), Exit::Unreachable);
    }
}
