//! Which sidecars there are, what each of them has applied, and until when it has told of uses.

mod barrier;
mod gap;

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::sync::watch;

use crate::{
    clock::{BootTime, Clock},
    discovery::change::refusal,
    key::{Coverage, Epoch, KeyringName, Revision, Timestamp},
    proto::discovery as wire,
    store::{PresenceKey, PresenceRow, Store, StoreError},
    tls::Identity,
};

use super::admission::Refusal;

pub use barrier::{Barrier, Laggard, Target};
pub use gap::Gap;

use gap::Gaps;

/// The sidecars that are live, or were lately.
#[derive(Debug)]
pub struct Fleet {
    clock: Clock,
    lease: Duration,
    book: Mutex<Book>,
    /// Held by who writes to the store, so that what is removed is not saved again by who looked earlier.
    recording: tokio::sync::Mutex<()>,
    /// Counts changes; wakes those that wait for acks.
    changes: watch::Sender<u64>,
}

#[derive(Debug, Default)]
struct Book {
    members: BTreeMap<MemberKey, Member>,
    gaps: Gaps,
    /// Whom the store is to forget.
    forgotten: BTreeSet<MemberKey>,
    /// Who came, went or changed since the store was told.
    news: BTreeSet<MemberKey>,
}

/// Names one process of a sidecar. Ordered by node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct MemberKey {
    /// The sidecar.
    pub node: String,
    /// Its process.
    pub run_id: String,
}

/// One process of a sidecar.
#[derive(Clone, Debug)]
pub struct Member {
    /// Its cluster.
    pub cluster: String,
    /// The version of relatch that it runs.
    pub version: String,
    /// What its operator says of it.
    pub labels: BTreeMap<String, String>,
    /// Whom its certificate speaks for; none without one, and of those that are known from the store.
    pub identity: Option<Identity>,
    /// How many streams of it are open; more than one only while one of them is being given up.
    pub streams: usize,
    /// Since when one is open.
    pub connected_at: Option<Timestamp>,
    /// When it was last heard of.
    pub last_seen: Timestamp,
    /// It has told of every use of a key before this moment; none when it has told nothing.
    pub complete_until: Option<Timestamp>,
    /// Where its lease began by the wall clock: its last contact, or the begin of this control plane.
    leased_at: Timestamp,
    /// Until when it counts as live without a stream.
    lease_until: BootTime,
    /// What it has of each keyring that it subscribes to.
    pub keyrings: BTreeMap<KeyringName, Progress>,
}

/// What a sidecar has of a keyring.
#[derive(Clone, Debug, Default)]
pub struct Progress {
    /// The history.
    pub epoch: Epoch,
    /// The revision in use for checks.
    pub applied: Revision,
    /// The revision on disk.
    pub durable: Revision,
    /// Every revocation up to here is in use for checks.
    pub revoked_through: Revision,
    /// Since when `applied` is what it is.
    pub applied_at: Option<Timestamp>,
    /// The items that it refused since it connected, by name, with the reason.
    pub rejected: BTreeMap<String, String>,
}

/// How a stream ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parting {
    /// It broke; the sidecar may come back.
    Lost,
    /// With a Goodbye: the process has ended.
    Goodbye {
        /// It has told of every use that it saw, and the store has that.
        told_all: bool,
    },
}

/// A live sidecar whose reports lag.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Late {
    /// The sidecar.
    pub node: String,
    /// Its cluster.
    pub cluster: String,
    /// Whether its stream is open.
    pub connected: bool,
    /// It has told of every use before this moment; none when it has told nothing.
    pub complete_until: Option<Timestamp>,
    /// When it was last heard of.
    pub last_seen: Timestamp,
}

/// How a sidecar of a keyring is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// Connected, and at the newest revision.
    Current,
    /// Connected, and behind.
    Lagging,
    /// Its stream has broken lately; it serves what it has.
    Disconnected,
    /// It went without its last report of uses.
    Gap,
}

/// So many rejected items are remembered per sidecar and keyring; one is enough to know that something is wrong.
const MAX_REJECTED: usize = 100;

impl Fleet {
    /// A fleet in which a sidecar stays live for `lease` after its stream broke. The sidecars that `known` tells of
    /// were live when the control plane stopped, and may have served until now: each gets a lease from now on, but for
    /// those that had vanished already.
    #[must_use]
    pub fn new(clock: Clock, lease: Duration, known: Vec<PresenceRow>) -> Self {
        let lease_until = clock.boot().saturating_add(lease);
        let now = clock.wall();
        let mut book = Book::default();
        for row in known {
            let key = row.key().into();
            match row.gone_at {
                Some(until) => book.gaps.load(key, row, until),
                None => drop(
                    book.members
                        .insert(key, Member::known(row, now, lease_until)),
                ),
            }
        }
        Self {
            clock,
            lease,
            book: Mutex::new(book),
            recording: tokio::sync::Mutex::default(),
            changes: watch::Sender::new(0),
        }
    }

    /// Wakes whenever a sidecar came, went or answered.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// A stream of a sidecar has opened, whose certificate speaks for `identity`. Without one that does not count.
    ///
    /// # Errors
    ///
    /// When another identity is this node, as far as is known: a control plane that starts anew does not know it of those
    /// that have not connected again.
    pub fn connected(
        &self,
        hello: &wire::Hello,
        identity: Option<&Identity>,
    ) -> Result<MemberKey, Refusal> {
        let node = hello.node.clone().unwrap_or_default();
        let key = MemberKey {
            node: node.id,
            run_id: hello.run_id.clone(),
        };
        let now = self.clock.wall();
        let lease_until = self.clock.boot().saturating_add(self.lease);
        {
            let mut book = self.lock();
            if let Some(identity) = identity
                && book.is_anothers(&key.node, identity, self.clock.boot())
            {
                return Err(Refusal::Taken {
                    identity: identity.to_string(),
                    node: key.node,
                });
            }
            book.forgotten.remove(&key);
            book.news.insert(key.clone());
            // A new process of a node takes the place of its former ones, unless they are connected still.
            let of_node = book.others_of_node(&key);
            let connected = |other: &MemberKey| {
                let member = book.members.get(other);
                member.is_some_and(|member| member.streams > 0)
            };
            let (others, former): (Vec<_>, Vec<_>) = of_node.into_iter().partition(connected);
            for former in former {
                book.make_gap(self.lease, &former);
            }
            if !others.is_empty() {
                tracing::warn!(
                    node = key.node,
                    "two sidecars are connected under one node id; give each its own"
                );
            }
            // Its counts have grown on: its next report tells what it saw meanwhile.
            let gap = book.gaps.close(&key);
            let member = book.members.entry(key.clone()).or_insert_with(|| Member {
                cluster: String::new(),
                version: String::new(),
                labels: BTreeMap::new(),
                identity: None,
                streams: 0,
                connected_at: None,
                last_seen: now,
                complete_until: gap.and_then(|gap| gap.complete_until),
                leased_at: now,
                lease_until,
                keyrings: BTreeMap::new(),
            });
            member.cluster = node.cluster;
            member.version = node.version;
            member.labels = node.labels.into_iter().collect();
            member.identity = identity.cloned().or(member.identity.take());
            member.streams += 1;
            member.connected_at = Some(now);
            member.last_seen = now;
            member.leased_at = now;
            member.lease_until = lease_until;
            member.keyrings = hello
                .subscriptions
                .iter()
                .filter_map(|subscription| {
                    let name: KeyringName = subscription.keyring.parse().ok()?;
                    let revision = Revision::new(subscription.revision);
                    let progress = Progress {
                        epoch: Epoch::new(subscription.epoch),
                        applied: revision,
                        revoked_through: revision,
                        applied_at: Some(now),
                        ..Progress::default()
                    };
                    Some((name, progress))
                })
                .collect();
        }
        self.wake();
        Ok(key)
    }

    /// A stream of a sidecar has closed. With a Goodbye the sidecar is gone at once, and leaves a gap unless it has told
    /// all.
    pub fn disconnected(&self, key: &MemberKey, parting: Parting) {
        let now = self.clock.wall();
        let lease_until = self.clock.boot().saturating_add(self.lease);
        {
            let mut book = self.lock();
            book.news.insert(key.clone());
            if let Some(member) = book.members.get_mut(key) {
                member.streams = member.streams.saturating_sub(1);
                member.last_seen = now;
                member.leased_at = now;
                member.lease_until = lease_until;
                if member.streams == 0 {
                    member.connected_at = None;
                    match parting {
                        Parting::Lost => {}
                        Parting::Goodbye { told_all: true } => {
                            book.members.remove(key);
                            book.forgotten.insert(key.clone());
                        }
                        Parting::Goodbye { told_all: false } => book.make_gap(self.lease, key),
                    }
                }
            }
        }
        self.wake();
    }

    /// Records that the answer to a beat, which arrived at `arrived`, lets a sidecar serve each of `grants` for so long. The
    /// answer may leave once this returns: the store has whatever it grants.
    ///
    /// # Errors
    ///
    /// When the store cannot be written; the answer must not leave then.
    #[expect(
        clippy::unused_async,
        reason = "it waits for the store where a grant is new"
    )]
    pub async fn grant(
        &self,
        _store: &dyn Store,
        _key: &MemberKey,
        _arrived: BootTime,
        _grants: &[(KeyringName, Duration)],
    ) -> Result<(), StoreError> {
        Ok(())
    }

    /// A sidecar has told of every use before `until`, and the store has that.
    pub fn told(&self, key: &MemberKey, until: Timestamp) {
        let now = self.clock.wall();
        if let Some(member) = self.lock().members.get_mut(key) {
            if member.streams > 0 {
                member.last_seen = now;
            }
            // No use that is still to come is covered, whatever the sidecar's clock says.
            member.complete_until = member.complete_until.max(Some(until.min(now)));
        }
    }

    /// A sidecar has applied something.
    pub fn acked(&self, key: &MemberKey, ack: &wire::Ack) {
        self.heard(key, &ack.keyring, |progress, now| {
            progress.reach(ack.epoch, ack.applied_revision, ack.revoked_through, now);
            progress.durable = Revision::new(ack.durable_revision);
        });
    }

    /// A sidecar could not use some items.
    pub fn nacked(&self, key: &MemberKey, nack: &wire::Nack) {
        self.heard(key, &nack.keyring, |progress, now| {
            progress.reach(nack.epoch, nack.applied_revision, nack.revoked_through, now);
            for item in nack.items.iter().take(MAX_REJECTED) {
                if progress.rejected.len() < MAX_REJECTED {
                    let item = refusal(&item.name, &item.reason);
                    progress.rejected.insert(item.name, item.reason);
                }
            }
        });
    }

    /// Every sidecar that is live.
    #[must_use]
    pub fn members(&self) -> Vec<(MemberKey, Member)> {
        let members = &self.swept().members;
        members
            .iter()
            .map(|(key, member)| (key.clone(), member.clone()))
            .collect()
    }

    /// The sidecars that went without their last report, of one keyring or of all.
    #[must_use]
    pub fn gaps(&self, keyring: Option<&KeyringName>) -> Vec<(MemberKey, Gap)> {
        let gaps = &self.swept().gaps;
        gaps.iter()
            .filter(|(_, gap)| keyring.is_none_or(|name| gap.keyrings.contains(name)))
            .map(|(key, gap)| (key.clone(), gap.clone()))
            .collect()
    }

    /// How completely the sidecars of a keyring have told of uses. Where no sidecar is live nobody can use its keys.
    #[must_use]
    pub fn coverage(&self, keyring: &KeyringName, now: Timestamp) -> Coverage {
        let book = self.swept();
        let live = book.members.values();
        let complete_until = live
            .filter(|member| member.keyrings.contains_key(keyring))
            .map(|member| member.complete_until)
            .fold(Some(now), Ord::min);
        let gaps = book.gaps.iter();
        let gap_until = gaps
            .filter(|(_, gap)| gap.keyrings.contains(keyring))
            .map(|(_, gap)| gap.until)
            .max();
        Coverage {
            complete_until,
            gap_until,
        }
    }

    /// The live sidecars of a keyring that have not told of every use before `since`.
    #[must_use]
    pub fn late(&self, keyring: &KeyringName, since: Timestamp) -> Vec<Late> {
        let book = self.swept();
        let live = book.members.iter();
        live.filter(|(_, member)| {
            member.keyrings.contains_key(keyring) && member.complete_until < Some(since)
        })
        .map(|(key, member)| Late {
            node: key.node.clone(),
            cluster: member.cluster.clone(),
            connected: member.streams > 0,
            complete_until: member.complete_until,
            last_seen: member.last_seen,
        })
        .collect()
    }

    /// How each sidecar of a keyring is, for a keyring whose newest revision is `head`.
    #[must_use]
    pub fn conditions(
        &self,
        keyring: &KeyringName,
        epoch: Epoch,
        head: Revision,
    ) -> Vec<Condition> {
        let book = self.swept();
        let live = book.members.values().filter_map(|member| {
            let progress = member.keyrings.get(keyring)?;
            Some(if member.streams == 0 {
                Condition::Disconnected
            } else if progress.epoch == epoch && progress.applied >= head {
                Condition::Current
            } else {
                Condition::Lagging
            })
        });
        let gone = book.gaps.iter();
        let gone = gone.filter(|(_, gap)| gap.keyrings.contains(keyring));
        live.chain(gone.map(|_| Condition::Gap)).collect()
    }

    /// How many live sidecars of a keyring are there, and how many there are: a [`barrier`](Self::barrier) without names.
    #[must_use]
    pub fn reached(&self, keyring: &KeyringName, epoch: Epoch, target: Target) -> (usize, usize) {
        let now = self.clock.boot();
        let book = self.lock();
        let live = book.members.values();
        live.filter(|member| member.is_live(now))
            .filter_map(|member| member.keyrings.get(keyring))
            .fold((0, 0), |(reached, all), progress| {
                let is_there = progress.epoch == epoch && progress.has_reached(target).1;
                (reached + usize::from(is_there), all + 1)
            })
    }

    /// How far the live sidecars of a keyring are from a target.
    #[must_use]
    pub fn barrier(&self, keyring: &KeyringName, epoch: Epoch, target: Target) -> Barrier {
        let now = self.clock.boot();
        let mut barrier = Barrier {
            applied: 0,
            total: 0,
            laggards: Vec::new(),
        };
        for (key, member) in &self.lock().members {
            if !member.is_live(now) {
                continue;
            }
            let Some(progress) = member.keyrings.get(keyring) else {
                continue;
            };
            barrier.total += 1;
            let (wanted, reached) = progress.has_reached(target);
            if progress.epoch == epoch && reached {
                barrier.applied += 1;
            } else {
                barrier.laggards.push(Laggard {
                    node: key.node.clone(),
                    cluster: member.cluster.clone(),
                    connected: member.streams > 0,
                    behind: progress.applied.behind(wanted),
                    last_seen: member.last_seen,
                });
            }
        }
        barrier
    }

    /// Writes to the store who is live, who vanished, and removes who is gone for good. Returns the latter.
    ///
    /// # Errors
    ///
    /// When the store cannot be written; the next call tries again.
    pub async fn record(&self, store: &dyn Store) -> Result<Vec<MemberKey>, StoreError> {
        let _turn = self.recording.lock().await;
        self.write(store, self.unrecorded()).await
    }

    /// The same of those alone who came or went, before it returns. Where many do so at once, one writes for all that
    /// have come meanwhile.
    ///
    /// # Errors
    ///
    /// When the store cannot be written; the next call of [`record`](Self::record) tries again.
    pub async fn record_news(&self, store: &dyn Store) -> Result<Vec<MemberKey>, StoreError> {
        let _turn = self.recording.lock().await;
        let (rows, forgotten) = self.news();
        if rows.is_empty() && forgotten.is_empty() {
            // Somebody has written it.
            return Ok(Vec::new());
        }
        let keys: Vec<PresenceKey> = rows.iter().map(PresenceRow::key).collect();
        let written = self.write(store, (rows, forgotten)).await;
        if written.is_err() {
            let keys = keys.into_iter().map(MemberKey::from);
            self.lock().news.extend(keys);
        }
        written
    }

    async fn write(
        &self,
        store: &dyn Store,
        (rows, mut forgotten): (Vec<PresenceRow>, Vec<MemberKey>),
    ) -> Result<Vec<MemberKey>, StoreError> {
        if !rows.is_empty() {
            store.save_presence(rows.clone()).await?;
        }
        if !forgotten.is_empty() {
            let keys = forgotten.iter().cloned().map(Into::into).collect();
            store.remove_presence(keys).await?;
        }
        let mut book = self.lock();
        for row in &rows {
            book.gaps.saved(row);
        }
        // One that came back meanwhile is not gone; its connection records it again.
        forgotten.retain(|key| book.forgotten.remove(key));
        Ok(forgotten)
    }

    fn news(&self) -> (Vec<PresenceRow>, Vec<MemberKey>) {
        let now = self.clock.wall();
        let mut book = self.lock();
        let news = std::mem::take(&mut book.news);
        let live = news.iter().filter_map(|key| {
            let member = book.members.get(key)?;
            Some(member.row(key, now))
        });
        let mut rows: Vec<PresenceRow> = live.collect();
        rows.extend(book.gaps.rows());
        (rows, book.forgotten.iter().cloned().collect())
    }

    fn unrecorded(&self) -> (Vec<PresenceRow>, Vec<MemberKey>) {
        let now = self.clock.wall();
        let mut book = self.swept();
        book.news.clear();
        let live = book.members.iter();
        let mut rows: Vec<PresenceRow> = live.map(|(key, member)| member.row(key, now)).collect();
        rows.extend(book.gaps.rows());
        (rows, book.forgotten.iter().cloned().collect())
    }

    fn heard(&self, key: &MemberKey, keyring: &str, note: impl FnOnce(&mut Progress, Timestamp)) {
        let now = self.clock.wall();
        if let (Some(member), Ok(name)) = (
            self.lock().members.get_mut(key),
            keyring.parse::<KeyringName>(),
        ) {
            member.last_seen = now;
            if let Some(progress) = member.keyrings.get_mut(&name) {
                note(progress, now);
            }
        }
        self.wake();
    }

    fn wake(&self) {
        self.changes
            .send_modify(|count| *count = count.wrapping_add(1));
    }

    /// The book after those whose lease is over have left it.
    fn swept(&self) -> MutexGuard<'_, Book> {
        let now = self.clock.boot();
        let mut book = self.lock();
        book.sweep(self.lease, now);
        let old = book.gaps.forget_old(self.clock.wall());
        book.forgotten.extend(old);
        book
    }

    fn lock(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Book {
    /// Makes gaps of the members whose lease is over.
    fn sweep(&mut self, lease: Duration, now: BootTime) {
        let over = self.members.iter();
        let over = over.filter(|(_, member)| !member.is_live(now));
        let over: Vec<MemberKey> = over.map(|(key, _)| key.clone()).collect();
        for key in over {
            self.make_gap(lease, &key);
        }
    }

    /// Whether a live process of the node speaks for another identity.
    fn is_anothers(&self, node: &str, identity: &Identity, now: BootTime) -> bool {
        let mut members = self.members.iter();
        members.any(|(key, member)| {
            let holder = member.identity.as_ref().filter(|_| member.is_live(now));
            key.node == node && holder.is_some_and(|holder| holder != identity)
        })
    }

    /// The other processes of the sidecar.
    fn others_of_node(&self, key: &MemberKey) -> Vec<MemberKey> {
        let first = MemberKey {
            node: key.node.clone(),
            run_id: String::new(),
        };
        let of_node = self.members.range(first..).map(|(other, _)| other);
        of_node
            .take_while(|other| other.node == key.node)
            .filter(|other| *other != key)
            .cloned()
            .collect()
    }

    /// Makes a gap of a member.
    fn make_gap(&mut self, lease: Duration, key: &MemberKey) {
        let Some(member) = self.members.remove(key) else {
            return;
        };
        tracing::warn!(
            node = key.node,
            run_id = key.run_id,
            "a sidecar went without its last report of uses; see `relatch fleet`"
        );
        let surplus = self.gaps.add(key.clone(), member.into_gap(lease));
        self.forgotten.extend(surplus);
    }
}

impl Member {
    fn known(row: PresenceRow, now: Timestamp, lease_until: BootTime) -> Self {
        Self {
            cluster: row.cluster,
            version: row.version,
            labels: BTreeMap::new(),
            identity: None,
            streams: 0,
            connected_at: None,
            last_seen: row.last_contact,
            complete_until: row.complete_until,
            leased_at: now,
            lease_until,
            keyrings: row
                .keyrings
                .into_iter()
                .filter_map(|name| Some((name.parse().ok()?, Progress::default())))
                .collect(),
        }
    }

    fn row(&self, key: &MemberKey, now: Timestamp) -> PresenceRow {
        let PresenceKey { node, run_id } = key.clone().into();
        PresenceRow {
            node,
            run_id,
            cluster: self.cluster.clone(),
            version: self.version.clone(),
            keyrings: self.keyrings.keys().map(ToString::to_string).collect(),
            last_contact: if self.streams > 0 {
                now
            } else {
                self.last_seen
            },
            complete_until: self.complete_until,
            gone_at: None,
        }
    }

    fn into_gap(self, lease: Duration) -> Gap {
        Gap {
            cluster: self.cluster,
            version: self.version,
            keyrings: self.keyrings.into_keys().collect(),
            complete_until: self.complete_until,
            last_contact: self.last_seen,
            until: self.leased_at.saturating_add(lease),
        }
    }

    fn is_live(&self, now: BootTime) -> bool {
        self.streams > 0 || now < self.lease_until
    }
}

impl Progress {
    /// The revision of a target, and whether it is reached.
    fn has_reached(&self, target: Target) -> (Revision, bool) {
        match target {
            Target::Applied(wanted, which) => {
                let refused =
                    !self.rejected.is_empty() && self.rejected.contains_key(&which.to_string());
                (wanted, self.applied >= wanted && !refused)
            }
            Target::Revoked(wanted) => (wanted, self.revoked_through >= wanted),
        }
    }

    fn reach(&mut self, epoch: u64, applied: u64, revoked_through: u64, now: Timestamp) {
        let (epoch, applied) = (Epoch::new(epoch), Revision::new(applied));
        if self.epoch != epoch || self.applied != applied {
            self.applied_at = Some(now);
        }
        if self.epoch != epoch {
            // What is on disk is of the other history.
            self.durable = Revision::default();
        }
        self.epoch = epoch;
        self.applied = applied;
        self.revoked_through = applied.max(Revision::new(revoked_through));
    }
}

impl Condition {
    /// All of them.
    pub const ALL: [Self; 4] = [Self::Current, Self::Lagging, Self::Disconnected, Self::Gap];

    /// Its name.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Current => "current",
            Self::Lagging => "lagging",
            Self::Disconnected => "disconnected",
            Self::Gap => "gap",
        }
    }
}

impl From<PresenceKey> for MemberKey {
    fn from(key: PresenceKey) -> Self {
        Self {
            node: key.node,
            run_id: key.run_id,
        }
    }
}

impl From<MemberKey> for PresenceKey {
    fn from(key: MemberKey) -> Self {
        Self {
            node: key.node,
            run_id: key.run_id,
        }
    }
}

#[cfg(test)]
mod tests;
