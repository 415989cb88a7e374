//! Handshakes over real sockets, right and wrong.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use rustls::{ClientConfig, RootCertStore, client::Resumption, pki_types::ServerName};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
};
use tokio_rustls::TlsConnector;

use super::{
    testing::{Authority, Files, Issued, Leaf},
    *,
};

const CONTROL: &str = "spiffe://mesh.example/control";
const EDGE: &str = "spiffe://mesh.example/relatch/edge-1";

/// A server that accepts connections, reports how each handshake ended, and sends hello on each.
struct World {
    address: SocketAddr,
    ends: tokio::sync::mpsc::UnboundedReceiver<Result<Peer, HandshakeError>>,
    _server: JoinHandle<()>,
}

/// The files and authorities of a test.
struct Mesh {
    files: Files,
    ca: Authority,
    other: Authority,
}

impl Mesh {
    fn new() -> Self {
        Self {
            files: Files::new(),
            ca: Authority::new("mesh CA"),
            other: Authority::new("other CA"),
        }
    }

    fn server_pair(&self) -> Issued {
        self.ca
            .issue(&Leaf::server(&["localhost", "127.0.0.1"]).uri(CONTROL))
    }

    fn client_pair(&self) -> Issued {
        self.ca.issue(&Leaf::client("edge-1").uri(EDGE))
    }

    fn server(&self, own: &Issued) -> Arc<Credentials> {
        self.files
            .credentials(TlsUse::DiscoveryServer, Some(own), Some(&self.ca))
    }

    fn client(&self, own: Option<&Issued>, ca: &Authority) -> TlsClient {
        let credentials = self
            .files
            .credentials(TlsUse::DiscoveryClient, own, Some(ca));
        TlsClient::new(credentials, None)
    }

    /// A client with a valid certificate.
    fn right(&self) -> TlsClient {
        self.client(Some(&self.client_pair()), &self.ca)
    }
}

impl World {
    async fn start(server: TlsServer) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("bound");
        let (told, ends) = tokio::sync::mpsc::unbounded_channel();
        let server = tokio::spawn(async move {
            loop {
                let (socket, _) = listener.accept().await.expect("a connection");
                let (server, told) = (server.clone(), told.clone());
                tokio::spawn(async move {
                    match server.accept(socket, None).await {
                        Ok((mut stream, peer)) => {
                            let _ = told.send(Ok(peer));
                            let _ = stream.write_all(b"hello").await;
                            let _ = stream.flush().await;
                            // Until the client goes.
                            let _ = stream.read(&mut [0]).await;
                        }
                        Err(error) => drop(told.send(Err(error))),
                    }
                });
            }
        });
        Self {
            address,
            ends,
            _server: server,
        }
    }

    async fn connect(
        &self,
        client: &TlsClient,
        host: &str,
    ) -> Result<TlsStream<TcpStream>, HandshakeError> {
        client.connect(host, self.socket().await).await
    }

    async fn socket(&self) -> TcpStream {
        TcpStream::connect(self.address).await.expect("it listens")
    }

    /// Returns the result of the next handshake on the server's side.
    async fn end(&mut self) -> Result<Peer, HandshakeError> {
        let end = tokio::time::timeout(Duration::from_mins(2), self.ends.recv()).await;
        end.expect("in time").expect("the server runs")
    }

    async fn refusal(&mut self) -> String {
        let end = self.end().await;
        end.expect_err("no connection comes of it").to_string()
    }
}

async fn hello(mut stream: TlsStream<TcpStream>) {
    let mut hello = [0; 5];
    stream
        .read_exact(&mut hello)
        .await
        .expect("the server speaks");
    assert_eq!(&hello, b"hello");
}

fn assert_parts(text: &str, parts: &[&str]) {
    for part in parts {
        assert!(text.contains(part), "{part:?} is not in {text:?}");
    }
}

#[tokio::test]
async fn two_sides_of_one_mesh_know_each_other() {
    let mesh = Mesh::new();
    let mut world = World::start(TlsServer::new(mesh.server(&mesh.server_pair()))).await;
    for host in ["127.0.0.1", "localhost"] {
        hello(world.connect(&mesh.right(), host).await.expect("TLS")).await;
        let peer = world.end().await.expect("TLS");
        assert_eq!(peer.identity.as_ref().map(Identity::as_str), Some(EDGE));
    }
}

#[tokio::test]
async fn a_client_refuses_a_server_that_is_not_what_it_should_be() {
    let mesh = Mesh::new();
    let right = Leaf::server(&["localhost", "127.0.0.1"]).uri(CONTROL);
    for (issued, host, why, told) in [
        (
            mesh.other.issue(&right),
            "127.0.0.1",
            "its issuer is not among the authorities that are trusted here",
            "it does not trust the issuer of our certificate",
        ),
        (
            mesh.ca.issue(&right.valid(-3, -1)),
            "127.0.0.1",
            "it has expired",
            "it reports that our certificate has expired, or is not valid yet",
        ),
        (
            mesh.ca.issue(&right.valid(1, 3)),
            "127.0.0.1",
            "it is not valid yet by the clock of this machine",
            "it reports that our certificate has expired, or is not valid yet",
        ),
        (
            mesh.ca.issue(&right),
            "other.example",
            "it is not for the host other.example",
            "it does not accept our certificate",
        ),
        (
            mesh.ca.issue(&Leaf::client("control").uri(CONTROL)),
            "127.0.0.1",
            "it is for another use",
            "it does not accept our certificate",
        ),
    ] {
        let mut world = World::start(TlsServer::new(mesh.server(&issued))).await;
        let error = world.connect(&mesh.right(), host).await.expect_err(why);
        assert_eq!(error.as_str(), "certificate_refused");
        assert_parts(
            &error.to_string(),
            &[
                "the certificate of the server is not accepted: ",
                why,
                "; issued by CN=",
            ],
        );
        assert_parts(
            &world.refusal().await,
            &["the client refuses the connection: ", told],
        );
    }
}

#[tokio::test]
async fn a_server_may_have_to_have_an_identity() {
    let mesh = Mesh::new();
    let world = World::start(TlsServer::new(mesh.server(&mesh.server_pair()))).await;
    let credentials = mesh.files.credentials(
        TlsUse::DiscoveryClient,
        Some(&mesh.client_pair()),
        Some(&mesh.ca),
    );
    let expecting = |identity: &str| {
        let identity = identity.parse().expect("an identity");
        TlsClient::new(Arc::clone(&credentials), Some(identity))
    };
    let connected = world.connect(&expecting(CONTROL), "127.0.0.1").await;
    hello(connected.expect("TLS")).await;
    let error = world
        .connect(&expecting("spiffe://mesh.example/other"), "127.0.0.1")
        .await
        .expect_err("somebody else");
    assert_parts(
        &error.to_string(),
        &["its identity is spiffe://mesh.example/control, not spiffe://mesh.example/other"],
    );
}

#[tokio::test]
async fn a_server_refuses_a_client_that_is_not_what_it_should_be_and_both_say_why() {
    let mesh = Mesh::new();
    let mut world = World::start(TlsServer::new(mesh.server(&mesh.server_pair()))).await;
    let right = Leaf::client("edge-1").uri(EDGE);
    for (issued, why, told) in [
        (
            mesh.other.issue(&right),
            "its issuer is not among the authorities that are trusted here",
            "it does not trust the issuer of our certificate; ours is ",
        ),
        (
            mesh.ca.issue(&right.valid(-3, -1)),
            "it has expired",
            "it reports that our certificate has expired, or is not valid yet; ours is ",
        ),
        (
            mesh.ca.issue(&right.valid(1, 3)),
            "it is not valid yet by the clock of this machine",
            "it reports that our certificate has expired, or is not valid yet; ours is ",
        ),
        (
            mesh.ca.issue(&Leaf::server(&["edge-1"]).uri(EDGE)),
            "it is for another use",
            "it does not accept our certificate",
        ),
    ] {
        let client = mesh.client(Some(&issued), &mesh.ca);
        let error = world.connect(&client, "127.0.0.1").await.expect_err(why);
        let refusal = world.refusal().await;
        assert_parts(
            &refusal,
            &[
                "the certificate of the client is not accepted: ",
                why,
                EDGE,
                "; issued by CN=",
            ],
        );
        assert_parts(
            &error.to_string(),
            &["the server refuses the connection: ", told],
        );
    }
}

#[tokio::test]
async fn a_client_without_a_certificate_is_refused_where_one_is_asked_for() {
    let mesh = Mesh::new();
    let mut world = World::start(TlsServer::new(mesh.server(&mesh.server_pair()))).await;
    let nobody = mesh.client(None, &mesh.ca);
    let error = world
        .connect(&nobody, "127.0.0.1")
        .await
        .expect_err("no certificate");
    assert_eq!(
        world.refusal().await,
        "the client presented no certificate, but this port requires one"
    );
    assert_parts(
        &error.to_string(),
        &["it requires a certificate, but none is configured here"],
    );

    let open = mesh
        .files
        .credentials(TlsUse::AdminServer, Some(&mesh.server_pair()), None);
    let mut world = World::start(TlsServer::new(open)).await;
    hello(world.connect(&nobody, "127.0.0.1").await.expect("TLS")).await;
    assert_eq!(world.end().await.expect("TLS"), Peer::default());
}

#[tokio::test]
async fn a_client_that_speaks_for_nobody_or_for_two_is_refused() {
    let mesh = Mesh::new();
    let mut world = World::start(TlsServer::new(mesh.server(&mesh.server_pair()))).await;
    for (leaf, why) in [
        (
            Leaf::client("edge-1"),
            "it has no URI among its subject alternative names",
        ),
        (
            Leaf::client("edge-1").uri(EDGE).uri(CONTROL),
            "it has 2 URIs",
        ),
    ] {
        let client = mesh.client(Some(&mesh.ca.issue(&leaf)), &mesh.ca);
        let _connection = world.connect(&client, "127.0.0.1").await;
        assert_parts(&world.refusal().await, &[why, "CN=edge-1"]);
    }
}

/// The bundles of two trust domains.
fn bundles(mesh: &Mesh) -> [(&'static str, &Authority); 2] {
    [("mesh.example", &mesh.ca), ("other.example", &mesh.other)]
}

#[tokio::test]
async fn a_client_is_judged_by_the_bundle_of_its_own_trust_domain_alone() {
    let mesh = Mesh::new();
    let server = mesh.files.with_bundles(
        TlsUse::DiscoveryServer,
        &mesh.server_pair(),
        &bundles(&mesh),
    );
    let mut world = World::start(TlsServer::new(server)).await;
    let edge = Leaf::client("edge-1").uri(EDGE);
    let others = Leaf::client("edge-1").uri("spiffe://other.example/relatch/edge-1");
    let (between, between_others) = (
        mesh.ca.intermediate("between"),
        mesh.other.intermediate("between"),
    );
    for (admitted, identity) in [
        (mesh.ca.issue(&edge), EDGE),
        (between.issue(&edge).with(between.pem()), EDGE),
        (
            mesh.other.issue(&others),
            "spiffe://other.example/relatch/edge-1",
        ),
    ] {
        let client = mesh.client(Some(&admitted), &mesh.ca);
        hello(world.connect(&client, "127.0.0.1").await.expect("TLS")).await;
        let peer = world.end().await.expect("TLS").identity;
        assert_eq!(peer.as_ref().map(Identity::as_str), Some(identity));
    }
    let unknown = "its issuer is not among the authorities that are trusted here";
    let leaf = |uri: &str| Leaf::client("edge-1").uri(uri);
    for (refused, why) in [
        // The authority of the other mesh for an identity of ours, with every chain; and ours for
        // an identity of the other.
        (mesh.other.issue(&edge), unknown),
        (mesh.other.issue(&edge).with(mesh.other.pem()), unknown),
        (mesh.other.issue(&edge).with(mesh.ca.pem()), unknown),
        (
            between_others
                .issue(&edge)
                .with(between_others.pem())
                .with(mesh.other.pem()),
            unknown,
        ),
        (mesh.ca.issue(&others), unknown),
        (
            mesh.ca
                .issue(&leaf("spiffe://third.example/relatch/edge-1")),
            "there is no bundle for its trust domain third.example",
        ),
        (
            mesh.ca.issue(&leaf("https://mesh.example/relatch/edge-1")),
            "its identity https://mesh.example/relatch/edge-1 is not a SPIFFE ID",
        ),
        (
            mesh.ca.issue(&leaf("spiffe://MESH.example/relatch/edge-1")),
            "is not a SPIFFE ID",
        ),
        (mesh.ca.issue(&Leaf::client("edge-1")), "it has no URI"),
        (
            mesh.ca
                .issue(&edge.uri("spiffe://other.example/relatch/edge-1")),
            "it has 2 URIs",
        ),
    ] {
        let client = mesh.client(Some(&refused), &mesh.ca);
        let error = world.connect(&client, "127.0.0.1").await.expect_err(why);
        let refusal = world.refusal().await;
        assert_parts(
            &refusal,
            &["the certificate of the client is not accepted: ", why],
        );
        assert_parts(
            &error.to_string(),
            &["the server refuses the connection: ", "; ours is "],
        );
    }
}

#[tokio::test]
async fn a_server_is_judged_by_the_bundle_of_its_own_trust_domain_alone() {
    let mesh = Mesh::new();
    let client = |expected: Option<&str>| {
        let credentials = mesh.files.with_bundles(
            TlsUse::DiscoveryClient,
            &mesh.client_pair(),
            &bundles(&mesh),
        );
        let expected = expected.map(|identity| identity.parse().expect("an identity"));
        TlsClient::new(credentials, expected)
    };
    let control = Leaf::server(&["localhost", "127.0.0.1"]).uri(CONTROL);
    let of_other = Leaf::server(&["127.0.0.1"]).uri("spiffe://other.example/control");
    let nobody = Leaf::server(&["127.0.0.1"]);
    for (issued, host, why) in [
        (mesh.ca.issue(&control), "localhost", None),
        (
            mesh.other.issue(&control),
            "127.0.0.1",
            Some("its issuer is not among the authorities that are trusted here"),
        ),
        (
            mesh.other.issue(&of_other),
            "127.0.0.1",
            Some(
                "its identity is spiffe://other.example/control, not spiffe://mesh.example/control",
            ),
        ),
        (mesh.ca.issue(&nobody), "127.0.0.1", Some("it has no URI")),
        // A valid identity does not make a certificate valid for another host.
        (
            mesh.ca.issue(&control),
            "elsewhere.example",
            Some("it is not for the host elsewhere.example"),
        ),
    ] {
        let world = World::start(TlsServer::new(mesh.server(&issued))).await;
        let connected = world.connect(&client(Some(CONTROL)), host).await;
        match why {
            None => hello(connected.expect("TLS")).await,
            Some(why) => assert_parts(&connected.expect_err(why).to_string(), &[why]),
        }
    }
}

/// A client of another mesh.
fn foreign(
    mesh: &Mesh,
    versions: &[&'static rustls::SupportedProtocolVersion],
    alpn: &[&[u8]],
) -> TlsConnector {
    use rustls::pki_types::{CertificateDer, pem::PemObject as _};

    let mut roots = RootCertStore::empty();
    let root = CertificateDer::from_pem_slice(mesh.ca.pem().as_bytes()).expect("PEM");
    roots.add(root).expect("an authority");
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(versions)
        .expect("known versions")
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = alpn.iter().map(|&name| name.to_vec()).collect();
    config.resumption = Resumption::in_memory_sessions(16);
    TlsConnector::from(Arc::new(config))
}

fn name() -> ServerName<'static> {
    ServerName::try_from("localhost").expect("a name")
}

/// A server that asks for no certificate.
async fn open_world(mesh: &Mesh) -> World {
    let credentials = mesh
        .files
        .credentials(TlsUse::AdminServer, Some(&mesh.server_pair()), None);
    World::start(TlsServer::new(credentials)).await
}

#[tokio::test]
async fn older_tls_and_other_protocols_are_refused() {
    let mesh = Mesh::new();
    let mut world = open_world(&mesh).await;
    let old = foreign(&mesh, OLD, &[b"h2"]);
    assert!(old.connect(name(), world.socket().await).await.is_err());
    assert_parts(
        &world.refusal().await,
        &["the client does not speak TLS 1.3"],
    );
    for alpn in [&[][..], &[&b"http/1.1"[..]]] {
        let other = foreign(&mesh, &[&rustls::version::TLS13], alpn);
        let connected = other.connect(name(), world.socket().await).await;
        let refusal = world.refusal().await;
        assert_parts(&refusal, &["the client does not agree on HTTP/2 (ALPN h2)"]);
        if let Ok(mut connection) = connected {
            let read = connection.read(&mut [0]).await;
            assert!(matches!(read, Ok(0) | Err(_)), "{read:?}");
        }
    }
}

#[tokio::test]
async fn a_server_of_http_1_accepts_clients_that_name_it_or_no_protocol() {
    let mesh = Mesh::new();
    let pair = mesh.server_pair();
    let credentials = mesh
        .files
        .credentials(TlsUse::HttpAuthzServer, Some(&pair), None);
    let world = World::start(TlsServer::new(credentials)).await;
    let connect = async |alpn: &[&[u8]]| {
        let client = foreign(&mesh, &[&rustls::version::TLS13], alpn);
        client.connect(name(), world.socket().await).await
    };
    let http1: &[u8] = b"http/1.1";
    for alpn in [&[][..], &[http1], &[b"h2", http1]] {
        let mut connection = connect(alpn).await.expect("TLS");
        connection.read_exact(&mut [0; 5]).await.expect("hello");
        let agreed = connection.get_ref().1.alpn_protocol();
        let expected = (!alpn.is_empty()).then_some(http1);
        assert_eq!(agreed, expected);
    }
    assert!(connect(&[b"h2"]).await.is_err());
}

#[tokio::test]
async fn no_session_is_resumed() {
    let mesh = Mesh::new();
    let world = open_world(&mesh).await;
    let eager = foreign(&mesh, &[&rustls::version::TLS13], &[b"h2"]);
    for _ in 0..3 {
        let mut connection = eager
            .connect(name(), world.socket().await)
            .await
            .expect("TLS");
        connection.read_exact(&mut [0; 5]).await.expect("hello");
        let (_, session) = connection.get_ref();
        assert_eq!(session.handshake_kind(), Some(rustls::HandshakeKind::Full));
        assert_eq!(session.tls13_tickets_received(), 0);
    }
}

const OLD: &[&rustls::SupportedProtocolVersion] = &[&rustls::version::TLS12];

#[tokio::test]
async fn our_client_takes_no_ticket_and_no_other_version() {
    let mesh = Mesh::new();
    let issued = mesh.server_pair();
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("bound");
    let pair = mesh.files.pair("foreign", &issued);
    let serve = |versions: &'static [&'static rustls::SupportedProtocolVersion], alpn: &[u8]| {
        use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject as _};
        let chain = vec![CertificateDer::from_pem_file(&pair.cert).expect("PEM")];
        let key = PrivateKeyDer::from_pem_file(&pair.key).expect("PEM");
        let mut config = rustls::ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(versions)
            .expect("known versions")
            .with_no_client_auth()
            .with_single_cert(chain, key)
            .expect("a pair");
        config.alpn_protocols = vec![alpn.to_vec()];
        config.ticketer = rustls::crypto::ring::Ticketer::new().expect("tickets");
        tokio_rustls::TlsAcceptor::from(Arc::new(config))
    };
    let client = mesh.client(None, &mesh.ca);
    let resuming = serve(rustls::ALL_VERSIONS, b"h2");
    for _ in 0..2 {
        let socket = TcpStream::connect(address).await.expect("it listens");
        let (accepted, connected) = tokio::join!(
            async {
                resuming
                    .accept(listener.accept().await.expect("one").0)
                    .await
            },
            client.connect("localhost", socket),
        );
        connected.expect("TLS");
        let accepted = accepted.expect("TLS");
        let kind = accepted.get_ref().1.handshake_kind();
        assert_eq!(kind, Some(rustls::HandshakeKind::Full));
    }
    for (acceptor, why) in [
        (serve(OLD, b"h2"), "the server does not speak TLS 1.3"),
        (
            serve(rustls::ALL_VERSIONS, b"http/1.1"),
            "the server does not agree on HTTP/2",
        ),
    ] {
        let socket = TcpStream::connect(address).await.expect("it listens");
        let (_, connected) = tokio::join!(
            async {
                acceptor
                    .accept(listener.accept().await.expect("one").0)
                    .await
            },
            client.connect("localhost", socket),
        );
        assert_parts(&connected.expect_err(why).to_string(), &[why]);
    }
}

#[tokio::test]
async fn plaintext_on_a_tls_port_and_tls_on_a_plaintext_port_are_told_apart() {
    let mesh = Mesh::new();
    let mut world = World::start(TlsServer::new(mesh.server(&mesh.server_pair()))).await;
    let mut plain = world.socket().await;
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    plain.write_all(preface).await.expect("writable");
    assert_parts(
        &world.refusal().await,
        &["the client does not speak TLS: it may use http://, but this port needs https://"],
    );

    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let socket = TcpStream::connect(listener.local_addr().expect("bound")).await;
    let socket = socket.expect("it listens");
    let (mut server, _) = listener.accept().await.expect("a connection");
    // The settings with which a server of HTTP/2 begins.
    server
        .write_all(b"\0\0\0\x04\0\0\0\0\0")
        .await
        .expect("writable");
    let error = mesh
        .right()
        .connect("localhost", socket)
        .await
        .expect_err("no TLS");
    assert_parts(
        &error.to_string(),
        &["the server does not speak TLS: the port may use plaintext"],
    );
}

/// A client that sends one byte at a time keeps a handshake open no longer than one that sends
/// nothing.
#[tokio::test]
async fn a_slow_handshake_is_cut_at_its_deadline_and_holds_up_nobody() {
    let mesh = Mesh::new();
    let credentials = mesh.server(&mesh.server_pair());
    // Far more than a handshake needs on a busy machine.
    let deadline = Duration::from_secs(3);
    let mut world = World::start(TlsServer::with_limits(credentials, 8, deadline)).await;
    let mut slow = world.socket().await;
    let began = Clock::system().boot();
    // A record that is announced and arrives byte by byte.
    let dripping = tokio::spawn(async move {
        slow.write_all(&[22, 3, 1, 1, 0]).await.expect("writable");
        while slow.write_all(&[1]).await.is_ok() {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
    hello(
        world
            .connect(&mesh.right(), "127.0.0.1")
            .await
            .expect("another is served meanwhile"),
    )
    .await;
    world.end().await.expect("TLS");
    assert_eq!(
        world.refusal().await,
        "the client did not finish the TLS handshake within 3s"
    );
    assert!(Clock::system().boot().saturating_since(began) >= deadline);
    dripping.await.expect("its connection was closed");
}

#[tokio::test]
async fn many_slow_handshakes_keep_nobody_out() {
    let mesh = Mesh::new();
    let credentials = mesh.server(&mesh.server_pair());
    let mut world = World::start(TlsServer::with_limits(
        credentials,
        8,
        Duration::from_mins(10),
    ))
    .await;
    let mut silent = Vec::new();
    for _ in 0..40 {
        silent.push(world.socket().await);
    }
    // All but eight are cancelled for newer ones.
    for _ in 0..32 {
        assert_parts(&world.refusal().await, &["this was the oldest"]);
    }
    hello(
        world
            .connect(&mesh.right(), "127.0.0.1")
            .await
            .expect("TLS"),
    )
    .await;
}

#[tokio::test]
async fn connections_go_on_while_the_certificates_are_replaced_and_new_ones_take_the_new() {
    let mesh = Mesh::new();
    let credentials = mesh.server(&mesh.server_pair());
    let mut world = World::start(TlsServer::new(Arc::clone(&credentials))).await;
    let client = mesh.right();
    let mut open = Vec::new();
    for _ in 0..100 {
        open.push(world.connect(&client, "127.0.0.1").await.expect("TLS"));
        world.end().await.expect("TLS");
    }
    // Another authority: what is trusted on both sides changes as a whole.
    let next = mesh.other.issue(&Leaf::server(&["127.0.0.1"]).uri(CONTROL));
    mesh.files.pair("discovery_server", &next);
    mesh.files
        .write("discovery_server-ca.pem", mesh.other.pem());
    credentials.look();
    for connection in open {
        hello(connection).await;
    }
    let error = world
        .connect(&client, "127.0.0.1")
        .await
        .expect_err("another CA");
    assert_eq!(error.as_str(), "certificate_refused");
    world.end().await.expect_err("it was refused");
    let moved = mesh.other.issue(&Leaf::client("edge-1").uri(EDGE));
    let moved = mesh.client(Some(&moved), &mesh.other);
    hello(world.connect(&moved, "127.0.0.1").await.expect("TLS")).await;
    world.end().await.expect("TLS");
}
