//! Which sidecars there are, and what each of them has applied.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use tokio::sync::watch;

use crate::{
    clock::{BootTime, Clock},
    key::{Epoch, KeyringName, Revision, Timestamp, VersionRef},
    proto::discovery as wire,
    store::{PresenceKey, PresenceRow},
};

/// The sidecars that are live, or were lately.
#[derive(Debug)]
pub struct Fleet {
    clock: Clock,
    lease: Duration,
    members: Mutex<BTreeMap<MemberKey, Member>>,
    /// Counts changes; wakes those that wait for acks.
    changes: watch::Sender<u64>,
}

/// Names one process of a sidecar. Ordered by node.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct MemberKey {
    /// The sidecar.
    pub node: String,
    /// Its process.
    pub boot_id: String,
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
    /// How many streams of it are open; more than one only while one of them is being given up.
    pub streams: usize,
    /// Since when one is open.
    pub connected_at: Option<Timestamp>,
    /// When it was last heard of.
    pub last_seen: Timestamp,
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

/// A point that every sidecar is to reach.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Target {
    /// Everything up to the revision is in use, and this version was not refused.
    Applied(Revision, VersionRef),
    /// Every revocation up to the revision is in use.
    Revoked(Revision),
}

/// How far the live sidecars of a keyring are from a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Barrier {
    /// How many are there.
    pub applied: usize,
    /// How many there are.
    pub total: usize,
    /// The others.
    pub laggards: Vec<Laggard>,
}

/// A sidecar that is not there yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Laggard {
    /// The sidecar.
    pub node: String,
    /// Its cluster.
    pub cluster: String,
    /// Whether its stream is open.
    pub connected: bool,
    /// By how many revisions it lags.
    pub behind: u64,
    /// When it was last heard of.
    pub last_seen: Timestamp,
}

/// So many rejected items are remembered per sidecar and keyring; one is enough to know that something is wrong.
const MAX_REJECTED: usize = 100;

impl Fleet {
    /// A fleet in which a sidecar stays live for `lease` after its stream broke. The sidecars that `known` tells of
    /// were live when the control plane stopped: each gets a lease from now on.
    #[must_use]
    pub fn new(clock: Clock, lease: Duration, known: Vec<PresenceRow>) -> Self {
        let lease_until = clock.boot().saturating_add(lease);
        let members = known
            .into_iter()
            .map(|row| (row.key().into(), Member::known(row, lease_until)))
            .collect();
        Self {
            clock,
            lease,
            members: Mutex::new(members),
            changes: watch::Sender::new(0),
        }
    }

    /// Wakes whenever a sidecar came, went or answered.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// A stream of a sidecar has opened.
    pub fn connected(&self, hello: &wire::Hello) -> MemberKey {
        let node = hello.node.clone().unwrap_or_default();
        let key = MemberKey {
            node: node.id,
            boot_id: hello.boot_id.clone(),
        };
        let now = self.clock.wall();
        let lease_until = self.clock.boot().saturating_add(self.lease);
        {
            let mut members = self.lock();
            // A new process of a node takes the place of its former ones, unless they are connected still.
            members.retain(|other, member| {
                other.node != key.node || other.boot_id == key.boot_id || member.streams > 0
            });
            if members
                .keys()
                .any(|other| other.node == key.node && *other != key)
            {
                tracing::warn!(
                    node = key.node,
                    "two sidecars are connected under one node id; give each its own"
                );
            }
            let member = members.entry(key.clone()).or_insert_with(|| Member {
                cluster: String::new(),
                version: String::new(),
                labels: BTreeMap::new(),
                streams: 0,
                connected_at: None,
                last_seen: now,
                lease_until,
                keyrings: BTreeMap::new(),
            });
            member.cluster = node.cluster;
            member.version = node.version;
            member.labels = node.labels.into_iter().collect();
            member.streams += 1;
            member.connected_at = Some(now);
            member.last_seen = now;
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
        key
    }

    /// A stream of a sidecar has closed; with a Goodbye the sidecar is gone at once.
    pub fn disconnected(&self, key: &MemberKey, goodbye: bool) {
        let now = self.clock.boot();
        {
            let mut members = self.lock();
            if let Some(member) = members.get_mut(key) {
                member.streams = member.streams.saturating_sub(1);
                member.lease_until = now.saturating_add(self.lease);
                if member.streams == 0 {
                    member.connected_at = None;
                    if goodbye {
                        members.remove(key);
                    }
                }
            }
        }
        self.wake();
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
                    progress
                        .rejected
                        .insert(item.name.clone(), item.reason.clone());
                }
            }
        });
    }

    /// Every sidecar that is live.
    #[must_use]
    pub fn members(&self) -> Vec<(MemberKey, Member)> {
        let now = self.clock.boot();
        let mut members = self.lock();
        members.retain(|_, member| member.is_live(now));
        members
            .iter()
            .map(|(key, member)| (key.clone(), member.clone()))
            .collect()
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
        for (key, member) in self.lock().iter().filter(|(_, member)| member.is_live(now)) {
            let Some(progress) = member.keyrings.get(keyring) else {
                continue;
            };
            barrier.total += 1;
            let (wanted, reached) = match target {
                Target::Applied(wanted, which) => {
                    let refused = progress.rejected.contains_key(&which.to_string());
                    (wanted, progress.applied >= wanted && !refused)
                }
                Target::Revoked(wanted) => (wanted, progress.revoked_through >= wanted),
            };
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

    /// What the store is to remember of the fleet.
    #[must_use]
    pub fn rows(&self) -> Vec<PresenceRow> {
        let now = self.clock.wall();
        self.members()
            .into_iter()
            .map(|(key, member)| PresenceRow {
                node: key.node,
                boot_id: key.boot_id,
                cluster: member.cluster,
                version: member.version,
                keyrings: member.keyrings.keys().map(ToString::to_string).collect(),
                complete_until: None,
                gone_at: None,
                last_contact: if member.streams > 0 {
                    now
                } else {
                    member.last_seen
                },
            })
            .collect()
    }

    fn heard(&self, key: &MemberKey, keyring: &str, note: impl FnOnce(&mut Progress, Timestamp)) {
        let now = self.clock.wall();
        if let (Some(member), Ok(name)) = (self.lock().get_mut(key), keyring.parse::<KeyringName>())
        {
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

    fn lock(&self) -> MutexGuard<'_, BTreeMap<MemberKey, Member>> {
        self.members.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Member {
    fn known(row: PresenceRow, lease_until: BootTime) -> Self {
        Self {
            cluster: row.cluster,
            version: row.version,
            labels: BTreeMap::new(),
            streams: 0,
            connected_at: None,
            last_seen: row.last_contact,
            lease_until,
            keyrings: row
                .keyrings
                .into_iter()
                .filter_map(|name| Some((name.parse().ok()?, Progress::default())))
                .collect(),
        }
    }

    fn is_live(&self, now: BootTime) -> bool {
        self.streams > 0 || now < self.lease_until
    }
}

impl Progress {
    fn reach(&mut self, epoch: u64, applied: u64, revoked_through: u64, now: Timestamp) {
        let (epoch, applied) = (Epoch::new(epoch), Revision::new(applied));
        if self.epoch != epoch || self.applied != applied {
            self.applied_at = Some(now);
        }
        self.epoch = epoch;
        self.applied = applied;
        self.revoked_through = applied.max(Revision::new(revoked_through));
    }
}

impl Barrier {
    /// Whether every live sidecar is there.
    #[must_use]
    pub const fn is_passed(&self) -> bool {
        self.laggards.is_empty()
    }
}

impl From<PresenceKey> for MemberKey {
    fn from(key: PresenceKey) -> Self {
        Self {
            node: key.node,
            boot_id: key.boot_id,
        }
    }
}

impl From<MemberKey> for PresenceKey {
    fn from(key: MemberKey) -> Self {
        Self {
            node: key.node,
            boot_id: key.boot_id,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::testing;

    const LEASE: Duration = Duration::from_mins(1);

    fn hello(node: &str, boot_id: &str, revision: u64) -> wire::Hello {
        wire::Hello {
            node: Some(wire::Node {
                id: node.to_owned(),
                ..wire::Node::default()
            }),
            boot_id: boot_id.to_owned(),
            subscriptions: vec![wire::Subscription {
                keyring: testing::keyring_name().to_string(),
                epoch: 1,
                revision,
                set_digest: 0,
            }],
        }
    }

    fn ack(applied: u64, revoked_through: u64) -> wire::Ack {
        wire::Ack {
            keyring: testing::keyring_name().to_string(),
            epoch: 1,
            nonce: applied,
            applied_revision: applied,
            durable_revision: 0,
            revoked_through,
        }
    }

    fn fleet() -> (Fleet, crate::clock::ManualClock) {
        let (clock, hands) = Clock::manual(Timestamp::from_millis(1_000_000));
        (Fleet::new(clock, LEASE, Vec::new()), hands)
    }

    fn barrier(fleet: &Fleet, target: Target) -> Barrier {
        fleet.barrier(&testing::keyring_name(), Epoch::new(1), target)
    }

    fn staged() -> VersionRef {
        VersionRef {
            key_id: "7Qm2Xc91TbKe".parse().expect("a key id"),
            version: crate::key::VersionNumber::FIRST,
        }
    }

    fn applied(revision: u64) -> Target {
        Target::Applied(Revision::new(revision), staged())
    }

    #[test]
    fn a_barrier_waits_for_every_live_sidecar() {
        let (fleet, _) = fleet();
        let first = fleet.connected(&hello("edge-1", "a", 3));
        fleet.connected(&hello("edge-2", "b", 2));
        let seen = barrier(&fleet, applied(4));
        assert_eq!((seen.applied, seen.total), (0, 2));
        assert_eq!(seen.laggards[1].behind, 2);
        fleet.acked(&first, &ack(4, 4));
        let seen = barrier(&fleet, applied(4));
        assert_eq!((seen.applied, seen.total), (1, 2));
        assert!(!seen.is_passed());
    }

    #[test]
    fn a_lost_sidecar_is_waited_for_until_its_lease_is_over() {
        let (fleet, hands) = fleet();
        let key = fleet.connected(&hello("edge-1", "a", 3));
        fleet.disconnected(&key, false);
        hands.advance(LEASE.saturating_sub(Duration::from_millis(1)));
        assert!(!barrier(&fleet, applied(4)).is_passed());
        hands.advance(Duration::from_millis(1));
        assert!(barrier(&fleet, applied(4)).is_passed());
    }

    #[test]
    fn a_sidecar_that_said_goodbye_is_gone_at_once() {
        let (fleet, _) = fleet();
        let key = fleet.connected(&hello("edge-1", "a", 3));
        fleet.disconnected(&key, true);
        assert!(barrier(&fleet, applied(4)).is_passed());
        assert!(fleet.members().is_empty());
    }

    #[test]
    fn a_restarted_sidecar_takes_its_former_place() {
        let (fleet, _) = fleet();
        let key = fleet.connected(&hello("edge-1", "a", 3));
        fleet.disconnected(&key, false);
        fleet.connected(&hello("edge-1", "b", 4));
        assert_eq!(barrier(&fleet, applied(4)).total, 1);
    }

    #[test]
    fn a_stream_that_is_replaced_does_not_end_the_sidecar() {
        let (fleet, hands) = fleet();
        let key = fleet.connected(&hello("edge-1", "a", 3));
        fleet.connected(&hello("edge-1", "a", 3));
        fleet.disconnected(&key, false);
        hands.advance(2 * LEASE);
        assert_eq!(fleet.members().len(), 1);
    }

    #[test]
    fn sidecars_of_a_former_life_are_waited_for() {
        let (clock, hands) = Clock::manual(Timestamp::from_millis(1_000_000));
        let row = PresenceRow {
            node: "edge-1".to_owned(),
            boot_id: "a".to_owned(),
            cluster: String::new(),
            version: String::new(),
            keyrings: vec![testing::keyring_name().to_string()],
            last_contact: Timestamp::from_millis(999_000),
            complete_until: None,
            gone_at: None,
        };
        let fleet = Fleet::new(clock, LEASE, vec![row]);
        assert!(!barrier(&fleet, applied(1)).is_passed());
        hands.advance(LEASE);
        assert!(barrier(&fleet, applied(1)).is_passed());
    }

    #[test]
    fn revocations_are_acked_ahead_of_the_revision() {
        let (fleet, _) = fleet();
        let key = fleet.connected(&hello("edge-1", "a", 3));
        fleet.acked(&key, &ack(3, 9));
        assert!(barrier(&fleet, Target::Revoked(Revision::new(9))).is_passed());
        assert!(!barrier(&fleet, applied(9)).is_passed());
    }

    #[test]
    fn a_sidecar_that_refused_the_version_is_not_there() {
        let (fleet, _) = fleet();
        let key = fleet.connected(&hello("edge-1", "a", 3));
        let nack = wire::Nack {
            keyring: testing::keyring_name().to_string(),
            epoch: 1,
            nonce: 4,
            items: vec![wire::RejectedItem {
                name: staged().to_string(),
                reason: "state: 9 is unknown".to_owned(),
            }],
            applied_revision: 4,
            revoked_through: 4,
        };
        fleet.nacked(&key, &nack);
        fleet.acked(&key, &ack(5, 5));
        assert!(!barrier(&fleet, applied(4)).is_passed());
        let other = VersionRef {
            version: staged().version.next(),
            ..staged()
        };
        assert!(barrier(&fleet, Target::Applied(Revision::new(4), other)).is_passed());
    }

    #[test]
    fn another_epoch_is_never_there() {
        let (fleet, _) = fleet();
        fleet.connected(&hello("edge-1", "a", 30));
        let seen = fleet.barrier(&testing::keyring_name(), Epoch::new(2), applied(4));
        assert!(!seen.is_passed());
    }
}
