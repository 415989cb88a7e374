//! The control plane's end of one stream: handles the messages of a sidecar until the stream ends.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tonic::Streaming;

use super::{
    super::not_served::NotServedBook, MAX_SUBSCRIPTIONS, claim_nothing, clamp_subscription,
    counted::Counted, newest, record,
};
use crate::{
    admission::Audience,
    clock::Clock,
    control::stream::session::{Beats, Drains, Ending, SubscriptionChange},
    control::{
        catalog::Catalog,
        fleet::{Fleet, OpenStream, Parting},
        metrics::LookupReply,
        usage::{UsageBook, UsageStream},
    },
    key::Timestamp,
    proto::discovery::{self, sidecar_message::Kind},
    serving::Farewell,
};

/// The channels on which a session receives the requests of its sidecar.
pub(super) struct Asking {
    pub(super) resyncs: mpsc::Sender<discovery::Resync>,
    pub(super) lookups: mpsc::Sender<discovery::Lookup>,
    pub(super) beats: Beats,
    pub(super) changes: mpsc::Sender<SubscriptionChange>,
}

/// Handles the messages of a sidecar on one stream.
pub(super) struct Listener {
    pub(super) catalog: Arc<Catalog>,
    pub(super) fleet: Arc<Fleet>,
    pub(super) usage: Arc<UsageBook>,
    pub(super) audience: Audience,
    pub(super) stream: OpenStream,
    pub(super) counted: Counted,
    pub(super) not_served: Arc<NotServedBook>,
    /// The keyrings to which the sidecar has subscribed.
    pub(super) subscribed: BTreeSet<String>,
    pub(super) reports: UsageStream,
    pub(super) asking: Asking,
    pub(super) drains: Drains,
}

/// The most patterns of a sidecar. The limit is that of its file.
const MAX_PATTERNS: usize = 256;
/// How long to wait for a sidecar that is told to reconnect: it leaves immediately. After this
/// time, the control plane ends the stream.
const LEAVE_TIMEOUT: Duration = Duration::from_secs(3);

impl Listener {
    /// Listens until the stream ends, and records how it ended.
    pub(super) async fn run(mut self, mut inbound: Streaming<discovery::SidecarMessage>) {
        let (not_after, clock) = (self.audience.peer.not_after, self.catalog.clock().clone());
        let ended = tokio::select! {
            goodbye = self.listen(&mut inbound) => Some(goodbye),
            () = expired(not_after, &clock) => None,
        };
        let goodbye = if let Some(goodbye) = ended {
            goodbye
        } else {
            tracing::info!(
                node = self.stream.run.node,
                identity = %self.audience.peer,
                "the certificate of a sidecar has expired; the sidecar is asked to reconnect with its next certificate"
            );
            self.drains.expired.cancel();
            let left = tokio::time::timeout(LEAVE_TIMEOUT, self.listen(&mut inbound)).await;
            left.unwrap_or(None)
        };
        self.note_end(goodbye).await;
    }

    async fn note_end(self, goodbye: Option<discovery::Goodbye>) {
        let Self {
            catalog,
            fleet,
            usage,
            stream,
            counted,
            reports,
            asking,
            ..
        } = self;
        // This ends the session.
        drop(asking);
        let parting = match goodbye {
            Some(goodbye) => Parting::Goodbye(Farewell {
                has_told_all: reports.settle(&fleet).await,
                has_erased_file: goodbye.has_erased_file,
                last_write: goodbye.last_write,
            }),
            None => Parting::Lost,
        };
        drop(reports);
        counted.end(parting);
        tracing::info!(node = stream.run.node, ?parting, "sidecar disconnected");
        if let Err(error) = record(&catalog, &fleet, &usage).await {
            // The reconciler retries. Until then, the store holds more sidecars than may serve.
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "the states of sidecars could not be written to the store"
            );
        }
    }

    /// Handles messages until the stream ends. Returns the Goodbye of the sidecar, if there was
    /// one. A cancellation between two messages loses nothing.
    async fn listen(
        &mut self,
        inbound: &mut Streaming<discovery::SidecarMessage>,
    ) -> Option<discovery::Goodbye> {
        while let Some(Ok(message)) = inbound.next().await {
            match message.kind {
                Some(Kind::Ack(ack)) => self.acked(ack),
                Some(Kind::Nack(nack)) => self.nacked(nack),
                Some(Kind::Resync(resync)) => {
                    if self.asking.resyncs.send(resync).await.is_err() {
                        return None;
                    }
                }
                Some(Kind::Lookup(lookup)) => {
                    if self.asking.lookups.try_send(lookup).is_err() {
                        let metrics = self.catalog.metrics();
                        metrics.looked_up(LookupReply::Dropped);
                    }
                }
                Some(Kind::Usage(usage)) => self.reports.note(&usage, &*self.catalog),
                Some(Kind::Beat(beat)) => self.asking.beats.arrive(beat.number, &self.catalog),
                Some(Kind::Goodbye(goodbye)) => return Some(goodbye),
                Some(Kind::Dropped(dropped)) => self.dropped(&dropped),
                Some(Kind::Find(find)) => self.find(&find).await?,
                Some(Kind::Subscribe(subscribe)) => {
                    self.subscribe(subscribe.subscriptions).await?;
                }
                Some(Kind::Unsubscribe(ended)) => {
                    self.unsubscribe(ended.keyring).await?;
                }
                // A second hello, or a kind that this version does not know.
                Some(Kind::Hello(_)) | None => {}
            }
        }
        None
    }

    /// Passes the patterns of the sidecar to the session. None if the stream has ended.
    async fn find(&self, find: &discovery::Find) -> Option<()> {
        let patterns = find.patterns.iter().take(MAX_PATTERNS);
        let patterns = patterns.filter_map(|pattern| pattern.parse().ok());
        self.tell(SubscriptionChange::Find(patterns.collect()))
            .await
    }

    /// Subscribes the sidecar to further keyrings. The session sends nothing of them before the
    /// store has the subscriptions. A subscription that the stream already has takes another limit.
    /// None if the stream has to end.
    async fn subscribe(&mut self, asked: Vec<discovery::Subscription>) -> Option<()> {
        let is_known = |asked: &discovery::Subscription| self.subscribed.contains(&asked.keyring);
        let (known, mut asked): (Vec<_>, Vec<_>) = asked.into_iter().partition(is_known);
        for discovery::Subscription {
            keyring,
            deny_after_ms,
            ..
        } in known
        {
            let deny_after = Duration::from_millis(deny_after_ms);
            self.tell(SubscriptionChange::Limit {
                keyring,
                deny_after,
            })
            .await?;
        }
        if asked.is_empty() {
            return Some(());
        }
        let mut refused = Vec::new();
        asked.retain(|subscription| {
            let refusal = self.refuse(&subscription.keyring);
            let is_admitted = refusal.is_none();
            refused.extend(refusal);
            is_admitted
        });
        for ending in refused {
            self.tell(SubscriptionChange::End(ending)).await?;
        }
        for subscription in &mut asked {
            clamp_subscription(&self.catalog, subscription);
            if let Ok(name) = subscription.keyring.parse() {
                // A Dropped that follows is about what the sidecar had before.
                self.not_served.serve(&name);
            }
        }
        if !self.fleet.subscribed(&self.stream, &asked) {
            return None;
        }
        let recorded = record(&self.catalog, &self.fleet, &self.usage).await;
        if let Err(error) = recorded {
            tracing::warn!(
                node = self.stream.run.node,
                error = &error as &dyn std::error::Error,
                "the stream of a sidecar ends, because its new subscriptions cannot be written to the store"
            );
            return None;
        }
        for subscription in &mut asked {
            self.reports.subscribe(&subscription.keyring);
            claim_nothing(subscription);
        }
        self.tell(SubscriptionChange::Begin(asked)).await
    }

    /// Returns why the sidecar may not subscribe to a keyring; none if it may. From then on, the
    /// keyring counts as subscribed.
    fn refuse(&mut self, keyring: &str) -> Option<Ending> {
        let admitted = self.audience.admitted();
        let refusal = admitted.and_then(|admitted| admitted.subscribe(keyring));
        let has_room = self.subscribed.len() < MAX_SUBSCRIPTIONS;
        let reason = match refusal {
            Err(refusal) => refusal.to_string(),
            Ok(()) if has_room => {
                self.subscribed.insert(keyring.to_owned());
                return None;
            }
            Ok(()) => format!("a sidecar may have at most {MAX_SUBSCRIPTIONS} keyrings"),
        };
        tracing::warn!(
            node = self.stream.run.node,
            auth.keyring = keyring,
            reason,
            "a sidecar does not receive a keyring"
        );
        Some(Ending {
            keyring: keyring.to_owned(),
            reason,
        })
    }

    /// Ends a subscription. None if the stream has ended.
    async fn unsubscribe(&mut self, keyring: String) -> Option<()> {
        self.subscribed.remove(&keyring);
        let reason = "the sidecar has ended its subscription".to_owned();
        self.tell(SubscriptionChange::End(Ending { keyring, reason }))
            .await
    }

    /// Passes a change to the session. None if the session has ended.
    async fn tell(&self, change: SubscriptionChange) -> Option<()> {
        self.asking.changes.send(change).await.ok()
    }

    fn acked(&self, mut ack: discovery::Ack) {
        let newest = newest(&self.catalog, &ack.keyring, ack.epoch);
        ack.applied_revision = ack.applied_revision.min(newest);
        ack.revoked_through = ack.revoked_through.min(newest);
        ack.durable_revision = ack.durable_revision.min(newest);
        ack.durable_revoked_through = ack.durable_revoked_through.min(newest);
        self.fleet.acked(&self.stream, &ack);
    }

    fn nacked(&self, mut nack: discovery::Nack) {
        let newest = newest(&self.catalog, &nack.keyring, nack.epoch);
        nack.applied_revision = nack.applied_revision.min(newest);
        nack.revoked_through = nack.revoked_through.min(newest);
        nack.durable_revision = nack.durable_revision.min(newest);
        nack.durable_revoked_through = nack.durable_revoked_through.min(newest);
        tracing::error!(
            node = self.stream.run.node,
            auth.keyring = nack.keyring,
            items = nack.items.len(),
            "a sidecar cannot use some items; see `relatch fleet`"
        );
        self.fleet.nacked(&self.stream, &nack);
    }

    /// Records that the sidecar has erased a keyring, if this stream asked for it.
    fn dropped(&self, dropped: &discovery::Dropped) {
        if let Some(keyring) = self.not_served.erased(dropped) {
            self.fleet.dropped(&self.stream, &keyring);
        }
    }
}

/// Returns when a certificate has expired: a sidecar that stays longer has to present another one.
/// Never returns without a certificate.
async fn expired(not_after: Option<Timestamp>, clock: &Clock) {
    match not_after {
        Some(not_after) => {
            // The certificate is valid until the end of its last second.
            let end = not_after.saturating_add(Duration::from_secs(1));
            tokio::time::sleep(end.saturating_since(clock.wall())).await;
        }
        None => std::future::pending().await,
    }
}
