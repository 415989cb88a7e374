use tokio::{net::TcpListener, task::JoinSet};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{
    service::interceptor::InterceptedService,
    transport::{Endpoint, Server},
};

use super::*;
use crate::{
    control::{metrics::ControlMetrics, pace::Pace},
    key::{MasterPepper, PepperId, testing},
    proto::discovery::{
        control_message::Kind as Told, keyring_discovery_client::KeyringDiscoveryClient,
    },
    store::{SqliteOptions, SqliteStore, Store},
};

/// Longer than anything here takes, so that only a hung test meets it.
const DEADLINE: Duration = Duration::from_secs(20);

/// A control plane without keyrings, whose every client is `peer`.
struct World {
    fleet: Arc<Fleet>,
    endpoint: Endpoint,
    _server: JoinSet<()>,
    _dir: tempfile::TempDir,
}

impl World {
    async fn start(peer: Peer) -> Self {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let options = SqliteOptions {
            create: true,
            ..SqliteOptions::default()
        };
        let store = SqliteStore::open(&dir.path().join("relatch.db"), options).await;
        let store: Arc<dyn Store> = Arc::new(store.expect("a new store"));
        let clock = Clock::system();
        let pepper = MasterPepper::new(PepperId::new(1), &[7; 32]).expect("32 bytes");
        let catalog = Catalog::open(
            Arc::clone(&store),
            clock.clone(),
            pepper,
            ControlMetrics::default(),
        );
        let pace = Arc::new(Pace::new(clock.clone()));
        let usage = UsageBook::open(store, clock.clone(), pace, &[]);
        let fleet = Arc::new(Fleet::new(clock, Duration::from_mins(1), Vec::new()));
        let discovery = DiscoveryServer::new(
            Arc::new(catalog.await.expect("an empty store")),
            Arc::clone(&fleet),
            Arc::new(usage.await.expect("an empty store")),
            Duration::from_hours(1),
            TaskTracker::new(),
            CancellationToken::new(),
        );
        let discovery =
            InterceptedService::new(discovery.into_service(), move |mut request: Request<()>| {
                request.extensions_mut().insert(peer.clone());
                Ok(request)
            });
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("an address");
        let serving = Server::builder()
            .add_service(discovery)
            .serve_with_incoming(TcpListenerStream::new(listener));
        let mut server = JoinSet::new();
        server.spawn(async move { serving.await.expect("it serves") });
        Self {
            fleet,
            endpoint: Endpoint::try_from(format!("http://{address}")).expect("a URI"),
            _server: server,
            _dir: dir,
        }
    }

    /// Opens the stream of a sidecar. It stays open on its side for as long as the sender lives.
    async fn subscribe(
        &self,
    ) -> (
        mpsc::Sender<wire::SidecarMessage>,
        Streaming<wire::ControlMessage>,
    ) {
        let hello = wire::Hello {
            node: Some(wire::Node {
                id: "edge-1".to_owned(),
                ..wire::Node::default()
            }),
            boot_id: "a".to_owned(),
            subscriptions: vec![wire::Subscription {
                keyring: testing::keyring_name().to_string(),
                ..wire::Subscription::default()
            }],
        };
        let (say, said) = mpsc::channel(1);
        let hello = wire::SidecarMessage {
            kind: Some(Kind::Hello(hello)),
        };
        say.send(hello).await.expect("there is room");
        let channel = self.endpoint.connect().await.expect("it listens");
        let opened = KeyringDiscoveryClient::new(channel)
            .subscribe(ReceiverStream::new(said))
            .await;
        (say, opened.expect("it is admitted").into_inner())
    }
}

async fn next(stream: &mut Streaming<wire::ControlMessage>) -> Option<Told> {
    let next = tokio::time::timeout(DEADLINE, stream.message()).await;
    let message = next.expect("in time").ok().flatten()?;
    message.kind
}

#[tokio::test]
async fn a_stream_ends_with_the_certificate_that_it_began_with() {
    let peer = Peer {
        identity: "spiffe://mesh/edge-1".parse().ok(),
        not_after: Some(Clock::system().wall()),
    };
    let world = World::start(peer).await;
    let (say, mut stream) = world.subscribe().await;
    let told = next(&mut stream).await;
    assert!(matches!(told, Some(Told::NotServed(_))), "{told:?}");
    loop {
        match next(&mut stream).await {
            Some(Told::Heartbeat(_)) => {}
            Some(Told::Drain(_)) => break,
            other => panic!("no drain: {other:?}"),
        }
    }
    assert!(next(&mut stream).await.is_none(), "nothing follows");
    // The sidecar does not leave, and is left.
    let mut changes = world.fleet.watch();
    let left = async {
        while world
            .fleet
            .members()
            .iter()
            .any(|(_, member)| member.streams > 0)
        {
            changes.changed().await.expect("the fleet lives");
        }
    };
    tokio::time::timeout(DEADLINE, left)
        .await
        .expect("it is left");
    drop(say);
}
