use std::future::pending;

use axum::{
    Router,
    http::header::{LOCATION, USER_AGENT as AGENT},
    response::Redirect,
    routing::{any, get},
};
use rustls::pki_types::PrivateKeyDer;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::TcpListener,
    sync::mpsc::{self, UnboundedReceiver},
};
use tokio_rustls::TlsAcceptor;

use super::*;
use crate::reserved::Reserved;

/// Far longer than a request on loopback, so that only a server that hangs on purpose reaches it.
const PATIENT: Limits = Limits {
    connect: Duration::from_mins(2),
    total: Duration::from_mins(2),
};
const HASTY: Limits = Limits {
    connect: Duration::from_secs(20),
    total: Duration::from_secs(1),
};

/// A server on loopback, and the paths at which it was called.
struct Server {
    port: u16,
    calls: UnboundedReceiver<String>,
}

impl Server {
    async fn start() -> Self {
        let (called, calls) = mpsc::unbounded_channel();
        let long = vec![b'a'; MAX_ANSWER + 1];
        let full = vec![b'a'; MAX_ANSWER];
        let router = Router::new()
            .route("/ok", any(async |body: Bytes| body))
            .route(
                "/agent",
                get(async |headers: HeaderMap| headers[AGENT].as_bytes().to_vec()),
            )
            .route("/moved", any(async || Redirect::temporary("/ok")))
            .route("/long", any(async move || long.clone()))
            .route("/full", any(async move || full.clone()))
            .route("/hang", any(async || pending::<()>().await))
            .layer(axum::middleware::from_fn(
                move |request: axum::extract::Request, next: axum::middleware::Next| {
                    let _ = called.send(request.uri().path().to_owned());
                    next.run(request)
                },
            ));
        let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
        let port = listener.local_addr().expect("bound").port();
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { port, calls }
    }

    fn url(&self, host: &str, path: &str) -> String {
        format!("http://{host}:{}{path}", self.port)
    }
}

fn guarded(limits: Limits) -> Outbound {
    Outbound::guarded(limits).expect("a client")
}

fn request(url: &str, allow_private: bool) -> Request {
    Request {
        method: Method::POST,
        url: OutboundUrl::parse(url).expect("a URL"),
        headers: HeaderMap::new(),
        body: Bytes::from_static(b"body"),
        allow_private,
    }
}

async fn refusal(client: &Outbound, url: &str, allow_private: bool) -> String {
    match client.send(request(url, allow_private)).await {
        Ok(answer) => format!("answered: {answer:?}"),
        Err(error) => error.to_string(),
    }
}

#[tokio::test]
async fn an_allowed_private_address_is_called_by_address_and_by_name() {
    let mut server = Server::start().await;
    for host in ["127.0.0.1", "localhost"] {
        let sent = guarded(PATIENT)
            .send(request(&server.url(host, "/ok?token=a"), true))
            .await
            .expect("it answers");
        assert_eq!(
            (sent.status, &sent.body[..]),
            (StatusCode::OK, &b"body"[..])
        );
        assert!(!sent.truncated);
        assert_eq!(server.calls.recv().await.as_deref(), Some("/ok"));
    }
}

#[tokio::test]
async fn private_addresses_are_refused_unless_allowed_whatever_their_spelling() {
    let mut server = Server::start().await;
    let client = guarded(PATIENT);
    for host in [
        "127.0.0.1",
        "2130706433",
        "0x7f.1",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "[64:ff9b::7f00:1]",
        "10.0.0.1",
        "100.64.0.1",
        "[fd00::1]",
        "localhost",
    ] {
        let url = server.url(host, "/ok").replace("http:", "https:");
        let error = refusal(&client, &url, false).await;
        assert!(error.contains("has a private address"), "{host}: {error}");
    }
    server.calls.try_recv().expect_err("nothing was called");
}

#[tokio::test]
async fn special_addresses_are_refused_even_where_private_ones_are_allowed() {
    let client = guarded(PATIENT);
    for host in [
        "169.254.169.254",
        "[fe80::1]",
        "0.0.0.0",
        "[::]",
        "224.0.0.1",
        "255.255.255.255",
        "[fd00:ec2::254]",
        "[::ffff:169.254.169.254]",
    ] {
        for scheme in ["http", "https"] {
            let error = refusal(&client, &format!("{scheme}://{host}/latest"), true).await;
            assert!(error.contains("never called"), "{scheme} {host}: {error}");
        }
    }
}

#[tokio::test]
async fn plain_text_only_goes_to_private_addresses() {
    let error = refusal(&guarded(PATIENT), "http://hooks.example/?token=a", false).await;
    assert_eq!(
        error,
        "the URL of hooks.example uses plain http: use https, or allow private addresses"
    );
    let operator = Outbound::for_operator(PATIENT, None).expect("a client");
    for client in [guarded(PATIENT), operator] {
        let error = refusal(&client, "http://8.8.8.8/?token=a", true).await;
        assert_eq!(
            error,
            "8.8.8.8 has a public address, but its URL uses plain http: use https"
        );
    }
}

#[tokio::test]
async fn an_operators_server_may_be_private() {
    let server = Server::start().await;
    let client = Outbound::for_operator(PATIENT, None).expect("a client");
    let sent = client
        .send(request(&server.url("localhost", "/ok"), false))
        .await;
    assert_eq!(sent.expect("it answers").status, StatusCode::OK);
}

#[tokio::test]
async fn a_redirect_is_an_answer_and_not_followed() {
    let mut server = Server::start().await;
    let sent = guarded(PATIENT)
        .send(request(&server.url("127.0.0.1", "/moved"), true))
        .await
        .expect("it answers");
    assert_eq!(sent.status, StatusCode::TEMPORARY_REDIRECT);
    assert_eq!(sent.headers[LOCATION], "/ok");
    assert_eq!(server.calls.recv().await.as_deref(), Some("/moved"));
    server
        .calls
        .try_recv()
        .expect_err("nothing else was called");
}

#[tokio::test]
async fn of_a_long_answer_the_beginning_is_read() {
    let server = Server::start().await;
    for (path, truncated) in [("/full", false), ("/long", true)] {
        let sent = guarded(PATIENT)
            .send(request(&server.url("127.0.0.1", path), true))
            .await
            .expect("it answers");
        assert_eq!((sent.body.len(), sent.truncated), (MAX_ANSWER, truncated));
    }
}

#[tokio::test]
async fn a_server_that_hangs_is_left_at_the_deadline() {
    let server = Server::start().await;
    let url = server.url("127.0.0.1", "/hang?token=a");
    let error = refusal(&guarded(HASTY), &url, true).await;
    let host = format!("127.0.0.1:{}", server.port);
    assert_eq!(error, format!("{host} did not answer within 1s"));
}

#[tokio::test]
async fn a_server_that_is_not_there_is_named() {
    let nobody = Reserved::new();
    let address = nobody.address();
    let client = guarded(PATIENT);
    let error = refusal(&client, &format!("http://{address}/?token=a"), true).await;
    assert_eq!(error, format!("cannot connect to {address}"));
    let error = refusal(&client, "https://nowhere.invalid/?token=a", false).await;
    assert_eq!(error, "the name nowhere.invalid cannot be resolved");
}

#[tokio::test]
async fn a_server_that_speaks_no_tls_is_named() {
    let server = Server::start().await;
    let url = server
        .url("127.0.0.1", "/ok?token=a")
        .replace("http:", "https:");
    let error = refusal(&guarded(PATIENT), &url, true).await;
    assert_eq!(error, format!("TLS with 127.0.0.1:{} failed", server.port));
}

#[tokio::test]
async fn requests_name_relatch() {
    let server = Server::start().await;
    let mut get = request(&server.url("127.0.0.1", "/agent"), true);
    get.method = Method::GET;
    let sent = guarded(PATIENT).send(get).await.expect("it answers");
    assert!(sent.body.starts_with(b"relatch/"), "{:?}", sent.body);
}

/// Starts a TLS server on loopback that answers every request, with a certificate for `name`.
/// Returns its port and the certificate.
async fn tls_server(name: &str) -> (u16, String) {
    let made = rcgen::generate_simple_self_signed([name.to_owned()]);
    let rcgen::CertifiedKey { cert, signing_key } = made.expect("a certificate");
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .expect("the provider has them")
        .with_no_client_auth()
        .with_single_cert(
            vec![cert.der().clone()],
            PrivateKeyDer::try_from(signing_key.serialize_der()).expect("a key"),
        );
    let acceptor = TlsAcceptor::from(Arc::new(config.expect("they fit")));
    let listener = TcpListener::bind(("127.0.0.1", 0)).await.expect("a port");
    let port = listener.local_addr().expect("bound").port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            // A client that does not trust the certificate closes the connection.
            let Ok(mut stream) = acceptor.accept(stream).await else {
                continue;
            };
            let mut request = [0; 1_024];
            if stream.read(&mut request).await.is_ok_and(|len| len > 0) {
                let answer = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";
                stream.write_all(answer).await.expect("the client reads");
                stream.shutdown().await.expect("the client reads");
            }
        }
    });
    (port, cert.pem())
}

#[tokio::test]
async fn only_a_trusted_certificate_of_the_very_host_is_spoken_to() {
    let (port, ca) = tls_server("localhost").await;
    let trusting = Outbound::for_operator(PATIENT, Some(ca.as_bytes())).expect("a client");
    let url = format!("https://localhost:{port}/?token=a");
    let sent = trusting.send(request(&url, false)).await;
    assert_eq!(&sent.expect("it answers").body[..], b"ok");

    let stranger = Outbound::for_operator(PATIENT, None).expect("a client");
    let by_address = format!("https://127.0.0.1:{port}/?token=a");
    for (client, url, why) in [
        (&stranger, &url, "UnknownIssuer"),
        (&trusting, &by_address, "not valid for name"),
    ] {
        let error = client.send(request(url, false)).await.expect_err(why);
        let text = error.to_string();
        assert!(text.starts_with("TLS with "), "{text}");
        let cause = std::error::Error::source(&error)
            .expect("a cause")
            .to_string();
        assert!(cause.contains(why), "{cause}");
        assert!(!format!("{error:?}").contains("token"), "{error:?}");
    }
}

#[test]
fn certificates_must_be_some() {
    let setup = |pem: &[u8]| {
        let made = Outbound::for_operator(PATIENT, Some(pem));
        made.expect_err("not accepted").to_string()
    };
    assert!(setup(b"").starts_with("there is no certificate"));
    assert!(
        setup(b"-----BEGIN CERTIFICATE-----\n!\n").starts_with("the certificates cannot be read")
    );
}
