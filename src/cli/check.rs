//! `relatch check`: sends one real check to a running sidecar, as Envoy does.

use std::{net::IpAddr, str::FromStr, time::Duration};

use clap::Args;
use http::{HeaderName, HeaderValue, Method};
use zeroize::Zeroizing;

use super::{
    Console,
    connection::{Address, TlsArgs},
    decision::DecisionView,
    failure::{Exit, Failure},
    secret::SecretInput,
};
use crate::{
    key::{KeyringName, Scopes},
    proto::auth::{self, CheckRequest, Entry, authorization_client::AuthorizationClient},
};

/// The arguments of `check`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct CheckArgs {
    /// Address of the sidecar's `ext_authz`: `HOST:PORT`, `https://HOST:PORT` or `unix:///PATH`
    #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:9001")]
    endpoint: Address,

    /// File that contains the key, or - for standard input; one trailing line break is ignored
    #[arg(long, value_name = "PATH", default_value = "-")]
    key_file: SecretInput,

    /// Send no key
    #[arg(long, conflicts_with = "key_file")]
    no_key: bool,

    /// Header to send the key in
    #[arg(long, value_name = "NAME", default_value = "x-api-key")]
    header: HeaderName,

    /// Scheme before the key in that header, for example Bearer [default: none]
    #[arg(long)]
    scheme: Option<String>,

    /// Another header of the request, such as "x-forwarded-for: 203.0.113.9"; may be repeated [default: none]
    #[arg(long = "request-header", value_name = "NAME: VALUE")]
    request_headers: Vec<RequestHeader>,

    /// Method of the request
    #[arg(long, default_value = "GET")]
    method: Method,

    /// Path of the request, with its query
    #[arg(long, default_value = "/")]
    path: String,

    /// Host of the request
    #[arg(long, default_value = "localhost")]
    host: String,

    /// Keyring that the route names [default: the sidecar chooses]
    #[arg(long)]
    keyring: Option<KeyringName>,

    /// Scopes that the route requires, separated by spaces [default: none]
    #[arg(long, value_parser = Scopes::parse)]
    scopes: Option<Scopes>,

    /// Address of the peer of Envoy: of the client, or of the last proxy before Envoy
    #[arg(long, value_name = "IP", default_value = "127.0.0.1")]
    source: IpAddr,

    #[command(flatten)]
    tls: TlsArgs,
}

/// A header of the request.
#[derive(Clone, Debug)]
struct RequestHeader {
    name: HeaderName,
    value: HeaderValue,
}

impl FromStr for RequestHeader {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const FORM: &str =
            "use a name, a colon and a value, such as \"x-forwarded-for: 203.0.113.9\"";

        let (name, value) = text.split_once(':').ok_or(FORM)?;
        Ok(Self {
            name: name.parse().map_err(|_| FORM)?,
            value: value.trim().parse().map_err(|_| FORM)?,
        })
    }
}

const EXAMPLES: &str = "\
Examples:
  relatch check --key-file acme.key --keyring payments
  relatch check --keyring payments --scopes 'read write' --source 10.1.2.3 \\
    < acme.key
  relatch check --endpoint unix:///run/relatch/authz.sock --no-key

  Which address counts behind a load balancer (`client_address`)?
    relatch check --no-key --source 10.0.0.5 \\
      --request-header 'x-forwarded-for: 203.0.113.9' -o table

Exit codes: 0 the request passes (allow, or would_deny: a denial that is not
enforced), 1 denied, 7 no decision: nothing listens at the endpoint, or it is
not a sidecar.";

/// The timeout. A sidecar answers within a millisecond, and Envoy waits 250 ms; five seconds are for a machine in trouble.
const TIMEOUT: Duration = Duration::from_secs(5);
/// The reason that a sidecar gives if it found no key.
const MISSING_CREDENTIAL: &str = "missing_credential";

impl CheckArgs {
    /// Runs the command, and returns [`Exit::Done`] for allowed and [`Exit::Failed`] for denied.
    ///
    /// # Errors
    ///
    /// When there is no key to send, or no decision.
    pub async fn run(self, console: &Console) -> Result<Exit, Failure> {
        let request = self.request()?;
        let channel = self.endpoint.connect(TIMEOUT, &self.tls).await;
        let channel = channel.map_err(|failure| self.no_decision(failure))?;
        let mut sidecar = AuthorizationClient::new(channel);
        let response = match tokio::time::timeout(TIMEOUT, sidecar.check(request)).await {
            Ok(response) => response.map_err(|status| self.no_decision(status.into()))?,
            Err(_elapsed) => {
                let message = format!("no answer within {} seconds", TIMEOUT.as_secs());
                return Err(self.no_decision(Failure::failed(message)));
            }
        };
        let view = DecisionView::from(response.into_inner());
        console.show(&view)?;
        if view.reason() == Some(MISSING_CREDENTIAL) && !self.no_key {
            console.output.note(&format!(
                "the sidecar does not look for a key in {}: see `credentials` in its configuration; if this happens only behind Envoy, the filter's allowed_headers or disallowed_headers may hide the header",
                self.header
            ));
        }
        Ok(view.decision().exit())
    }

    /// The failure without a decision. It always has the same exit code, so that a script can distinguish it from a denial.
    fn no_decision(&self, failure: Failure) -> Failure {
        failure
            .exit_with(Exit::Unreachable)
            .context(format!("no decision from a sidecar at {}", self.endpoint))
            .hint("check that the sidecar runs, and that --endpoint is its ext_authz address")
    }

    fn request(&self) -> Result<CheckRequest, Failure> {
        let mut headers = vec![
            entry(":authority", self.host.as_bytes()),
            entry(":method", self.method.as_str().as_bytes()),
            entry(":path", self.path.as_bytes()),
        ];
        // The sidecar reads repeated headers as Envoy sends them apart: in order.
        let others = self.request_headers.iter();
        headers.extend(others.map(|it| entry(it.name.as_str(), it.value.as_bytes())));
        if !self.no_key {
            let key = self.key_file.read("key", "--key-file")?;
            headers.push(entry(self.header.as_str(), &self.header_value(&key)));
        }
        let http = auth::HttpRequest {
            method: bytes(self.method.as_str().as_bytes()),
            headers,
            path: bytes(self.path.as_bytes()),
            host: bytes(self.host.as_bytes()),
            header_map: None,
        };
        let keyring = self.keyring.as_ref().map(|name| name.as_str().to_owned());
        let scopes = self.scopes.as_ref().map(Scopes::to_string);
        let extensions = [("relatch.keyring", keyring), ("relatch.scopes", scopes)];
        Ok(CheckRequest {
            attributes: Some(auth::AttributeContext {
                source: Some(auth::Peer {
                    address: Some(auth::Address {
                        socket_address: Some(auth::SocketAddress {
                            address: bytes(self.source.to_string().as_bytes()),
                        }),
                    }),
                }),
                request: Some(auth::Request { http: Some(http) }),
                context_extensions: extensions
                    .into_iter()
                    .filter_map(|(name, value)| Some(entry(name, value?.as_bytes())))
                    .collect(),
            }),
        })
    }

    fn header_value(&self, key: &[u8]) -> Zeroizing<Vec<u8>> {
        let scheme = self.scheme.as_deref().unwrap_or_default();
        let mut value = Zeroizing::new(Vec::with_capacity(scheme.len() + 1 + key.len()));
        if !scheme.is_empty() {
            value.extend_from_slice(scheme.as_bytes());
            value.push(b' ');
        }
        value.extend_from_slice(key);
        value
    }
}

fn bytes(bytes: &[u8]) -> bytes::Bytes {
    bytes::Bytes::copy_from_slice(bytes)
}

fn entry(name: &str, value: &[u8]) -> Entry {
    Entry {
        key: bytes(name.as_bytes()),
        value: bytes(value),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::{
        super::{Cli, Command},
        *,
    };

    fn args(line: &[&str]) -> CheckArgs {
        let line = ["relatch", "check"].iter().chain(line);
        match Cli::try_parse_from(line)
            .expect("a valid command line")
            .command
        {
            Command::Check(args) => args,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_request_is_the_one_that_envoy_would_send() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("key");
        std::fs::write(&path, "rlk_x\n").expect("writable");
        let path = path.to_string_lossy();
        let args = args(&[
            "--key-file",
            &path,
            "--header",
            "Authorization",
            "--scheme",
            "Bearer",
            "--keyring",
            "payments",
            "--scopes",
            "write read",
            "--source",
            "10.1.2.3",
            "--path",
            "/a?b=c",
        ]);
        let attributes = args.request().expect("a request").attributes.expect("set");
        let http = attributes
            .request
            .and_then(|request| request.http)
            .expect("set");
        assert_eq!(http.method, "GET");
        assert_eq!(http.path, "/a?b=c");
        assert_eq!(http.host, "localhost");
        assert!(
            http.headers
                .contains(&entry("authorization", b"Bearer rlk_x"))
        );
        let expected = [
            entry("relatch.keyring", b"payments"),
            entry("relatch.scopes", b"read write"),
        ];
        assert!(attributes.context_extensions == expected);
        let address = attributes.source.and_then(|peer| peer.address);
        let socket = address.and_then(|address| address.socket_address);
        assert_eq!(socket.expect("set").address, "10.1.2.3");
    }

    #[test]
    fn other_headers_are_sent_in_their_order() {
        let headers = [
            "--request-header",
            "X-Forwarded-For: 203.0.113.9",
            "--request-header",
            "x-forwarded-for:10.0.0.1",
        ];
        let args = args(&[&headers[..], &["--no-key"]].concat());
        let attributes = args.request().expect("a request").attributes.expect("set");
        let http = attributes.request.and_then(|request| request.http);
        let sent = http.expect("set").headers;
        let expected = [
            entry("x-forwarded-for", b"203.0.113.9"),
            entry("x-forwarded-for", b"10.0.0.1"),
        ];
        assert!(sent.ends_with(&expected));
        for wrong in ["x-forwarded-for", "a b: c", ":path: /", "a: b\nc"] {
            assert!(wrong.parse::<RequestHeader>().is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn without_a_key_no_credential_is_sent() {
        let attributes = args(&["--no-key"]).request().expect("a request").attributes;
        let request = attributes.expect("set").request;
        let headers = request
            .and_then(|request| request.http)
            .expect("set")
            .headers;
        assert!(headers.iter().all(|header| header.key.starts_with(b":")));
    }

    #[test]
    fn what_is_no_decision_is_never_a_denial() {
        let failure = args(&["--no-key"]).no_decision(tonic::Status::unimplemented("no").into());
        assert_eq!(failure.exit(), Exit::Unreachable);
    }
}
