//! The control plane's end of discovery: accepts the streams of sidecars.

mod counted;
mod listener;

use std::{pin::Pin, sync::Arc, time::Duration};

use futures_util::Stream;
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::StreamExt;
use tokio_util::{sync::CancellationToken, task::TaskTracker};
use tonic::{Request, Response, Status, Streaming};

use self::{
    counted::Counted,
    listener::{Asking, Listener},
};
use super::{
    not_served::NotServedBook,
    session::{Asked, Beats, Drains, Grantor, MAX_LOOKUPS, Session, Subscriber, Terms},
};
use crate::{
    admission::{Admission, Audience, Refusal},
    control::{
        bearers::Bearers,
        catalog::Catalog,
        fleet::{Believed, Fleet},
        served::ServedKeyring,
        token::bearer,
        usage::UsageBook,
    },
    key::Revision,
    proto::discovery::{
        self, control_message,
        keyring_discovery_server::{KeyringDiscovery, KeyringDiscoveryServer},
        sidecar_message::Kind,
    },
    store::StoreError,
    tls::Peer,
};

/// The service `KeyringDiscovery`.
#[derive(Debug)]
pub struct DiscoveryServer {
    catalog: Arc<Catalog>,
    fleet: Arc<Fleet>,
    usage: Arc<UsageBook>,
    terms: Terms,
    builds: Arc<Semaphore>,
    tasks: TaskTracker,
    shutdown: CancellationToken,
    admission: Arc<Admission>,
    bearers: Option<Arc<Bearers>>,
}

/// The most snapshots that are encoded at the same time. A control plane that restarts under a
/// thousand sidecars must keep a core for everything else.
const MAX_BUILDS: usize = 2;
/// The longest wait for a hello. A client that sends none within this time is not a sidecar.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// The largest message of a sidecar, in bytes: a hello of a hundred keyrings, or a nack of a
/// hundred items, with room to spare.
const MAX_MESSAGE: usize = 256 << 10;
/// The most labels of a sidecar, and the longest text of one in bytes: they are kept for each of
/// its processes. The limits are those of its file.
const MAX_LABELS: usize = 16;
const MAX_TEXT: usize = 128;
/// The most keyrings that a sidecar may subscribe to.
const MAX_SUBSCRIPTIONS: usize = 1_000;
/// The most changes of the keyrings of a stream that wait for its session. Further messages of the
/// sidecar wait, too.
const MAX_CHANGES: usize = 16;

impl DiscoveryServer {
    /// Creates a server of the catalog's keyrings. It records the states of sidecars in `fleet` and
    /// their reports in `usage`.
    #[must_use]
    pub fn new(
        catalog: Arc<Catalog>,
        fleet: Arc<Fleet>,
        usage: Arc<UsageBook>,
        terms: Terms,
        tasks: TaskTracker,
        shutdown: CancellationToken,
    ) -> Self {
        Self {
            catalog,
            fleet,
            usage,
            terms,
            builds: Arc::new(Semaphore::new(MAX_BUILDS)),
            tasks,
            shutdown,
            admission: Arc::default(),
            bearers: None,
        }
    }

    /// Restricts subscriptions to the sidecars that `admission` admits.
    #[must_use]
    pub(crate) fn with_admission(self, admission: Admission) -> Self {
        Self {
            admission: Arc::new(admission),
            ..self
        }
    }

    /// Accepts the tokens of `bearers` as identities, in addition to certificates.
    #[must_use]
    pub(crate) fn with_bearers(self, bearers: Arc<Bearers>) -> Self {
        Self {
            bearers: Some(bearers),
            ..self
        }
    }

    /// Returns the identity of the caller of a call, from its token or its connection.
    fn peer<T>(&self, call: &Request<T>) -> Result<Peer, Status> {
        let peer = call.extensions().get::<Peer>().cloned();
        let peer = peer.unwrap_or_default();
        let shown = call.metadata().get("authorization");
        let (Some(bearers), Some(shown)) = (&self.bearers, shown) else {
            return Ok(peer);
        };
        let token = shown.to_str().ok().and_then(bearer);
        let identity = token.and_then(|token| bearers.identity_of(&token).cloned());
        if identity.is_none() {
            tracing::warn!("a sidecar is refused: no file of `discovery.tokens` holds its token");
            return Err(Status::unauthenticated(
                "no file of `discovery.tokens` holds the token of this sidecar",
            ));
        }
        Ok(Peer {
            identity,
            not_after: None,
        })
    }

    /// Removes from a hello the keyrings that the sidecar may not receive, and returns a message
    /// about each. The sidecar has to erase its data of these keyrings.
    fn admit(
        audience: &Audience,
        hello: &mut discovery::Hello,
        book: &NotServedBook,
    ) -> Result<Vec<discovery::NotServed>, Status> {
        let admitted = audience.admitted();
        let admitted = admitted.map_err(|refusal| refused(&audience.peer, &refusal))?;
        let mut not_served = Vec::new();
        let mut subscriptions = std::mem::take(&mut hello.subscriptions);
        subscriptions.retain(|subscription| {
            let Err(refusal) = admitted.subscribe(&subscription.keyring) else {
                return true;
            };
            tracing::warn!(
                node = audience.node,
                auth.keyring = subscription.keyring,
                error = &refusal as &dyn std::error::Error,
                "a sidecar does not receive a keyring"
            );
            not_served.push(book.forbidden(&subscription.keyring, refusal.to_string()));
            false
        });
        hello.subscriptions = subscriptions;
        Ok(not_served)
    }

    /// Returns the service to add to a server.
    #[must_use]
    pub fn into_service(self) -> KeyringDiscoveryServer<Self> {
        KeyringDiscoveryServer::new(self).max_decoding_message_size(MAX_MESSAGE)
    }
}

#[tonic::async_trait]
impl KeyringDiscovery for DiscoveryServer {
    type SubscribeStream =
        Pin<Box<dyn Stream<Item = Result<discovery::ControlMessage, Status>> + Send + 'static>>;

    async fn subscribe(
        &self,
        request: Request<Streaming<discovery::SidecarMessage>>,
    ) -> Result<Response<Self::SubscribeStream>, Status> {
        let peer = self.peer(&request)?;
        let mut inbound = request.into_inner();
        let mut hello = first(&mut inbound).await?;
        let mut said = hello.clone();
        let book = Arc::new(NotServedBook::default());
        let audience = Audience {
            admission: Arc::clone(&self.admission),
            node: hello
                .node
                .as_ref()
                .map_or_else(String::new, |node| node.id.clone()),
            peer,
        };
        let not_served = Self::admit(&audience, &mut hello, &book)?;
        let believed = believed(&self.catalog, &hello);
        clamp(&self.catalog, &mut said);
        let stream = self
            .fleet
            .connected(&said, &believed, self.admission.counts(&audience.peer))
            .map_err(|refusal| refused(&audience.peer, &refusal))?;
        let counted = Counted::new(Arc::clone(&self.fleet), stream.clone());
        // Nothing is sent to a sidecar that is not on record: a control plane that restarts has to
        // wait for it.
        record(&self.catalog, &self.fleet, &self.usage)
            .await
            .map_err(|error| Status::unavailable(format!("the store: {error}")))?;
        tracing::info!(
            node = stream.run.node,
            run_id = stream.run.run_id,
            identity = %audience.peer,
            "sidecar connected"
        );
        if stream.was_forgotten {
            begin_anew(&mut hello);
        }
        let (asking, asked) = channels();
        // The use of a keyring that the sidecar has to erase counts, too.
        let counted_keyrings = self.fleet.keyrings_of(&stream.run);
        let (reports, acks) = self.usage.stream(&stream.run, counted_keyrings);
        let drains = Drains {
            stop: self.shutdown.clone(),
            expired: CancellationToken::new(),
        };
        let session = Session::new(
            Arc::clone(&self.catalog),
            Subscriber {
                audience: audience.clone(),
                not_served: Arc::clone(&book),
                grantor: Grantor {
                    fleet: Arc::clone(&self.fleet),
                    member: stream.run.clone(),
                    terms: self.terms,
                },
            },
            &hello.subscriptions,
            asked,
            acks,
            Arc::clone(&self.builds),
            drains.clone(),
        );
        let listener = Listener {
            catalog: Arc::clone(&self.catalog),
            fleet: Arc::clone(&self.fleet),
            usage: Arc::clone(&self.usage),
            audience,
            stream,
            counted,
            not_served: book,
            subscribed: hello
                .subscriptions
                .into_iter()
                .map(|subscription| subscription.keyring)
                .collect(),
            reports,
            asking,
            drains,
        };
        self.tasks.spawn(listener.run(inbound));
        let not_served = not_served.into_iter().map(|not_served| {
            Ok(discovery::ControlMessage {
                kind: Some(control_message::Kind::NotServed(not_served)),
            })
        });
        let not_served = futures_util::stream::iter(not_served);
        Ok(Response::new(Box::pin(
            not_served.chain(session.into_stream()),
        )))
    }
}

/// Returns the hello of a sidecar, which is its first message.
async fn first(
    inbound: &mut Streaming<discovery::SidecarMessage>,
) -> Result<discovery::Hello, Status> {
    let message = tokio::time::timeout(HELLO_TIMEOUT, inbound.message()).await;
    let message = message.map_err(|_| Status::deadline_exceeded("no hello arrived in time"))??;
    let Some(Kind::Hello(hello)) = message.and_then(|message| message.kind) else {
        return Err(Status::invalid_argument(
            "the first message must be a hello",
        ));
    };
    check(&hello)?;
    Ok(hello)
}

/// Returns the channels from the listener of a stream to its session.
fn channels() -> (Asking, Asked) {
    // A sidecar has at most one waiting resync for each keyring.
    let (resyncs, asked_resyncs) = mpsc::channel(MAX_SUBSCRIPTIONS);
    let (lookups, asked_lookups) = mpsc::channel(MAX_LOOKUPS);
    let (beats, asked_beats) = Beats::new();
    let (changes, asked_changes) = mpsc::channel(MAX_CHANGES);
    let asking = Asking {
        resyncs,
        lookups,
        beats,
        changes,
    };
    let asked = Asked {
        resyncs: asked_resyncs,
        lookups: asked_lookups,
        beats: asked_beats,
        changes: asked_changes,
    };
    (asking, asked)
}

/// Returns for each keyring of a hello whether the sidecar holds what it claims: its set digest is
/// the digest of the keyring at that revision. A sidecar that could not use an item holds another
/// set. A keyring on demand has no digest, and the revision decides. No sidecar can be ahead: a
/// sidecar that claims so comes from a control plane that is ahead of this one, or from a history
/// that this one has lost, and holds nothing of the changes that will have those revisions here.
fn believed(catalog: &Catalog, hello: &discovery::Hello) -> Believed {
    let mut believed = Believed::new();
    for subscription in &hello.subscriptions {
        let newest = newest(catalog, &subscription.keyring, subscription.epoch);
        let Ok(name) = subscription.keyring.parse() else {
            continue;
        };
        let served = served_at(catalog, &subscription.keyring, subscription.epoch);
        let at = Revision::new(subscription.revision);
        let is_held = (1..=newest).contains(&subscription.revision);
        let agrees = is_held
            && served.is_some_and(|served| match subscription.mode() {
                discovery::Mode::Full => {
                    let state = served.journal().state();
                    state.feed.digest_at(at) == Some(subscription.set_digest)
                }
                discovery::Mode::OnDemand => true,
            });
        believed.insert(name, agrees);
    }
    believed
}

/// Limits the claimed revocations to those that exist.
fn clamp(catalog: &Catalog, hello: &mut discovery::Hello) {
    for subscription in &mut hello.subscriptions {
        clamp_subscription(catalog, subscription);
    }
}

fn clamp_subscription(catalog: &Catalog, subscription: &mut discovery::Subscription) {
    let newest = newest(catalog, &subscription.keyring, subscription.epoch);
    subscription.revoked_through = subscription.revoked_through.min(newest);
}

/// Removes all claims from a hello: the state that the sidecar holds does not count.
fn begin_anew(hello: &mut discovery::Hello) {
    hello.subscriptions.iter_mut().for_each(claim_nothing);
}

fn claim_nothing(subscription: &mut discovery::Subscription) {
    subscription.epoch = 0;
    subscription.revision = 0;
    subscription.set_digest = 0;
    subscription.partial = None;
}

/// Returns the newest revision of a keyring in this history. For another history, nothing is known
/// and any revision is accepted.
fn newest(catalog: &Catalog, keyring: &str, epoch: u64) -> u64 {
    let served = served_at(catalog, keyring, epoch);
    served.map_or(u64::MAX, |served| served.revision().get())
}

/// Returns a keyring if its epoch is `epoch`.
fn served_at(catalog: &Catalog, keyring: &str, epoch: u64) -> Option<Arc<ServedKeyring>> {
    let served = catalog.get(&keyring.parse().ok()?).ok()?;
    (served.epoch().get() == epoch).then_some(served)
}

/// Writes the states of the sidecars to the store, and ends the counts of runs that are gone.
async fn record(catalog: &Catalog, fleet: &Fleet, usage: &UsageBook) -> Result<(), StoreError> {
    let gone = fleet.record_news(&**catalog.store()).await?;
    for run in &gone {
        usage.end(&run.run_id);
    }
    Ok(())
}

fn refused(peer: &Peer, refusal: &Refusal) -> Status {
    tracing::warn!(
        identity = %peer,
        error = refusal as &dyn std::error::Error,
        "a sidecar is refused"
    );
    Status::permission_denied(refusal.to_string())
}

fn check(hello: &discovery::Hello) -> Result<(), Status> {
    if hello.protocol != discovery::PROTOCOL {
        return Err(Status::failed_precondition(format!(
            "the sidecar speaks version {} of the discovery protocol, the control plane version {}: run the same version of relatch on both",
            hello.protocol.max(1),
            discovery::PROTOCOL
        )));
    }
    if hello.stream == 0 {
        return Err(Status::invalid_argument("stream: use a number from 1"));
    }
    let node = hello.node.as_ref().map_or("", |node| node.id.as_str());
    let printable =
        |text: &str| matches!(text.len(), 1..=253) && text.bytes().all(|b| b.is_ascii_graphic());
    if !printable(node) || !printable(&hello.run_id) {
        return Err(Status::invalid_argument(
            "node.id and run_id: use 1 to 253 printable ASCII characters without spaces",
        ));
    }
    if let Some(node) = &hello.node {
        let labels = node.labels.iter();
        let mut texts = labels.flat_map(|(name, value)| [name, value]);
        if node.labels.len() > MAX_LABELS
            || texts.any(|text| text.len() > MAX_TEXT)
            || node.cluster.len() > 253
            || node.version.len() > MAX_TEXT
        {
            return Err(Status::invalid_argument(format!(
                "node: use a cluster of at most 253 bytes, at most {MAX_LABELS} labels, and at most {MAX_TEXT} bytes in the version and in each name and value of a label"
            )));
        }
    }
    if hello.subscriptions.len() > MAX_SUBSCRIPTIONS {
        return Err(Status::invalid_argument(format!(
            "subscriptions: a sidecar may have at most {MAX_SUBSCRIPTIONS}"
        )));
    }
    Ok(())
}

#[cfg(test)]
mod tests;
