//! Reads a Hello for the book of the sidecars that may serve.

use std::{collections::BTreeMap, time::Duration};

use crate::{
    admission::Refusal,
    key::{Epoch, KeyringName, Revision},
    proto::discovery::{self, lock::Place},
    serving::{About, HeldState, Hello, HelloError, Lock, LockAt, LockPlace, RunKey, SnapshotFile},
    tls::Identity,
};

/// For each keyring of a Hello that the sidecar may hold: whether the state in the Hello agrees
/// with the state of the control plane.
pub(crate) type Believed = BTreeMap<KeyringName, bool>;

/// The most bytes of a lock's boot id. A lock's numbers come from one machine; a longer text is no
/// boot id.
const MAX_BOOT_ID: usize = 64;

/// Reads a Hello that was checked. The sidecar may hold the keyrings in `believed`.
pub(super) fn read(
    hello: &discovery::Hello,
    believed: &Believed,
    identity: Option<&Identity>,
) -> Hello {
    let node = hello.node.clone().unwrap_or_default();
    let lock = hello.lock.as_ref();
    let subscriptions = hello.subscriptions.iter();
    let keyrings = subscriptions.filter_map(|subscription| {
        let name: KeyringName = subscription.keyring.parse().ok()?;
        let agrees = believed.get(&name);
        let held = HeldState {
            agrees: agrees.copied().unwrap_or(false),
            is_admitted: agrees.is_some(),
            ..read_held(subscription)
        };
        Some((name, held))
    });
    Hello {
        lock: lock.and_then(|lock| read_lock(lock, &node.id)),
        key: RunKey {
            node: node.id,
            run_id: hello.run_id.clone(),
        },
        stream: hello.stream,
        about: About {
            cluster: node.cluster,
            version: node.version,
            labels: node.labels.into_iter().collect(),
            identity: identity.cloned(),
        },
        file: hello.snapshot_file.as_ref().map(read_file),
        keyrings: keyrings.collect(),
    }
}

/// Reads a subscription of a sidecar that may hold the keyring. What it holds does not count.
pub(super) fn read_held(subscription: &discovery::Subscription) -> HeldState {
    HeldState {
        epoch: Epoch::new(subscription.epoch),
        revision: Revision::new(subscription.revision),
        revoked_through: Revision::new(subscription.revoked_through),
        agrees: false,
        is_admitted: true,
        is_on_demand: subscription.mode() == discovery::Mode::OnDemand,
        deny_after: Duration::from_millis(subscription.deny_after_ms),
    }
}

/// Returns the lock of a Hello; none if it does not say where it is, because it then proves
/// nothing.
fn read_lock(lock: &discovery::Lock, node: &str) -> Option<Lock> {
    let at = match lock.place? {
        Place::File(file) => LockAt::File {
            device: file.device,
            inode: file.inode,
        },
        Place::Socket(socket) => LockAt::Socket {
            network_namespace: socket.network_namespace,
            node: node.to_owned(),
        },
    };
    let is_whole = (1..=MAX_BOOT_ID).contains(&lock.boot_id.len()) && lock.time_namespace > 0;
    is_whole.then(|| Lock {
        place: LockPlace {
            boot_id: lock.boot_id.clone(),
            time_namespace: lock.time_namespace,
            at,
        },
        acquired_ns: lock.acquired_ns,
    })
}

fn read_file(file: &discovery::SnapshotFile) -> SnapshotFile {
    use std::fmt::Write;
    let mut id = String::with_capacity(2 * file.id.len());
    for byte in &file.id {
        let _ = write!(id, "{byte:02x}");
    }
    SnapshotFile {
        id,
        begun_from_write: file.begun_from_write,
    }
}

pub(super) fn refusal(error: &HelloError, run: &RunKey, identity: Option<&Identity>) -> Refusal {
    match error {
        HelloError::Late => Refusal::Late,
        HelloError::Ended => Refusal::Ended,
        HelloError::Taken { .. } => Refusal::Taken {
            identity: identity.map_or_else(String::new, ToString::to_string),
            node: run.node.clone(),
        },
    }
}
