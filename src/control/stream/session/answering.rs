//! The answers of a session to beats. An answer follows a read of the store that began after the
//! beat arrived, and is sent when the time that it grants is on record.

use std::{
    future::{Future, pending},
    pin::Pin,
    sync::Arc,
    time::Duration,
};

use futures_util::FutureExt as _;
use tokio::sync::watch;

use crate::{
    clock::BootTime,
    control::{
        catalog::Catalog,
        fleet::{Fleet, GrantError},
        reads::ReadRequest,
    },
    key::KeyringName,
    serving::RunKey,
};

/// The limits that a control plane sets for its sidecars.
#[derive(Clone, Copy, Debug)]
pub struct Terms {
    /// The interval between two beats of a sidecar.
    pub beat_every: Duration,
    /// The longest time for which a sidecar may serve without another answer, even if its own
    /// `deny_after` is longer.
    pub max_serve_for: Duration,
}

/// The record of the grants of a session.
#[derive(Clone, Debug)]
pub(crate) struct Grantor {
    /// The fleet, which keeps the record.
    pub(crate) fleet: Arc<Fleet>,
    /// The sidecar of the session.
    pub(crate) member: RunKey,
    /// The limits of the grants.
    pub(crate) terms: Terms,
}

/// A beat that has arrived.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ArrivedBeat {
    number: u64,
    at: BootTime,
    read: ReadRequest,
}

/// Passes the newest beat that has arrived on a stream to its session.
#[derive(Debug)]
pub(crate) struct Beats(watch::Sender<Option<ArrivedBeat>>);

/// The answers of a session.
pub(super) struct Answering {
    catalog: Arc<Catalog>,
    grantor: Grantor,
    arrived: watch::Receiver<Option<ArrivedBeat>>,
    /// The number of the newest read of the store that succeeded.
    reads: watch::Receiver<u64>,
    /// The beat that is answered next. Newer beats wait in `arrived`.
    due: Option<ArrivedBeat>,
    pub(super) recording: Option<Recording>,
    /// The grant of the beat that can be answered now.
    granted: Option<Granted>,
}

/// The times that the answer to a beat grants.
#[derive(Debug)]
pub(super) struct Granted {
    pub(super) beat: u64,
    pub(super) serve_for: Vec<(KeyringName, Duration)>,
}

/// A future that records a grant.
pub(super) type Recording = Pin<Box<dyn Future<Output = (Granted, Result<(), GrantError>)> + Send>>;

impl Beats {
    /// Creates the state before the first beat, and the receiver for a session.
    #[must_use]
    pub(crate) fn new() -> (Self, watch::Receiver<Option<ArrivedBeat>>) {
        let (beats, arrived) = watch::channel(None);
        (Self(beats), arrived)
    }

    /// Records that a beat arrives now. A beat that is not newer than all before it is ignored.
    pub(crate) fn arrive(&self, number: u64, catalog: &Catalog) {
        self.0.send_if_modified(|newest| {
            let is_newer = newest.is_none_or(|newest| newest.number < number);
            if is_newer {
                *newest = Some(ArrivedBeat {
                    number,
                    at: catalog.clock().boot(),
                    read: catalog.reads().ask(),
                });
            }
            is_newer
        });
    }
}

impl Answering {
    pub(super) fn new(
        catalog: &Arc<Catalog>,
        grantor: Grantor,
        arrived: watch::Receiver<Option<ArrivedBeat>>,
    ) -> Self {
        Self {
            reads: catalog.reads().watch(),
            catalog: Arc::clone(catalog),
            grantor,
            arrived,
            due: None,
            recording: None,
            granted: None,
        }
    }

    /// Waits for the next event of an answer: a beat, a read of the store, or the record of a
    /// grant. A cancellation loses nothing.
    pub(super) async fn turn(&mut self) {
        tokio::select! {
            () = changed(&mut self.arrived), if self.due.is_none() => {
                self.arrived.mark_changed();
            }
            () = served(&mut self.reads, self.due), if self.recording.is_none() => {}
            recorded = recorded(&mut self.recording) => self.note(recorded),
        }
    }

    /// Advances the recording in progress. The session calls this for each message, because it does
    /// not wait while it has one to send: otherwise a long snapshot would delay the answer.
    pub(super) fn bring_on(&mut self) {
        if let Some(recorded) = recorded(&mut self.recording).now_or_never() {
            self.note(recorded);
        }
    }

    fn note(&mut self, (granted, recorded): (Granted, Result<(), GrantError>)) {
        self.recording = None;
        match recorded {
            Ok(()) => self.granted = Some(granted),
            Err(error) => tracing::warn!(
                node = self.grantor.member.node,
                error = &error as &dyn std::error::Error,
                "a sidecar receives no confirmation, because its grant cannot be recorded in the store"
            ),
        }
    }

    /// Accepts beats that have arrived. Beats that the same read serves get one answer, to the
    /// newest.
    pub(super) fn hear(&mut self) {
        if !self.arrived.has_changed().unwrap_or(false) {
            return;
        }
        let arrived = *self.arrived.borrow();
        let joins = |due: ArrivedBeat| arrived.is_some_and(|newest| newest.read == due.read);
        if self.due.is_none_or(joins) {
            self.arrived.mark_unchanged();
            self.due = arrived;
        }
    }

    /// Starts to record the grant of the due answer, once the store was read for it. `served` are
    /// the keyrings that the sidecar follows, each with the sidecar's own limit.
    pub(super) fn record<'k>(&mut self, served: impl Iterator<Item = (&'k KeyringName, Duration)>) {
        if self.recording.is_some() || self.granted.is_some() {
            return;
        }
        let read = *self.reads.borrow();
        let Some(due) = self.due.filter(|due| due.read.is_served_by(read)) else {
            return;
        };
        self.due = None;
        let most = self.grantor.terms.max_serve_for;
        let granted = Granted {
            beat: due.number,
            serve_for: served
                .map(|(name, limit)| (name.clone(), limit.min(most)))
                .collect(),
        };
        let Grantor { fleet, member, .. } = self.grantor.clone();
        let store = Arc::clone(self.catalog.store());
        self.recording = Some(Box::pin(async move {
            let recorded = fleet
                .grant(&*store, &member, due.at, &granted.serve_for)
                .await;
            (granted, recorded)
        }));
    }

    /// Returns the beat that can be answered now, with its grant.
    pub(super) fn take(&mut self) -> Option<Granted> {
        self.granted.take()
    }

    pub(super) const fn beat_every(&self) -> Duration {
        self.grantor.terms.beat_every
    }
}

impl Granted {
    /// Returns for how long the sidecar may serve a keyring. None when the grant does not include
    /// it.
    pub(super) fn serve_for(&self, keyring: &KeyringName) -> Option<Duration> {
        let granted = self.serve_for.iter().find(|(name, _)| name == keyring);
        granted.map(|(_, serve_for)| *serve_for)
    }
}

async fn changed(arrived: &mut watch::Receiver<Option<ArrivedBeat>>) {
    if arrived.changed().await.is_err() {
        pending::<()>().await;
    }
}

/// Waits until the read for a beat has succeeded; forever without a beat.
async fn served(reads: &mut watch::Receiver<u64>, due: Option<ArrivedBeat>) {
    match due {
        Some(due)
            if reads
                .wait_for(|done| due.read.is_served_by(*done))
                .await
                .is_ok() => {}
        Some(_) | None => pending().await,
    }
}

async fn recorded(recording: &mut Option<Recording>) -> (Granted, Result<(), GrantError>) {
    match recording {
        Some(recording) => recording.await,
        None => pending().await,
    }
}
