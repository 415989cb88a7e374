//! A model of one keyring of a control plane, and of the state that a sidecar has of it, for tests.

use std::collections::BTreeMap;

use prost::Message;

use super::origin::{FileId, Inode, Origin};
use crate::{
    clock::{BootClock, BootId},
    key::{KeyDigest, KeyRecord, KeyState, VersionNumber, testing},
    keyring::{KeyringPosition, KeyringView},
    proto::discovery::{self, control_message::Kind},
    wire::{item, settings},
};

/// An event of the keyring or the stream.
#[derive(Clone, Copy, Debug)]
pub(super) enum Act {
    /// A version is added, or changes to this state.
    Put(u8, KeyState),
    /// A version is removed.
    Remove(u8),
    /// A revocation is sent ahead; the delta with it may be lost.
    RevokeAhead(u8),
    /// A delta that does not start at the current revision, and revokes.
    Gap(u8),
    /// New settings.
    Settings(bool),
    /// A new snapshot, in a new epoch or in the same.
    Snapshot(bool),
}

/// The keyring of the control plane.
#[derive(Debug)]
pub(super) struct Control {
    epoch: u64,
    revision: u64,
    items: BTreeMap<u8, discovery::Item>,
    help_url: String,
}

/// The whole state that a sidecar has of a keyring.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct State {
    position: KeyringPosition,
    settings: Vec<u8>,
    versions: BTreeMap<[u8; KeyDigest::LEN], (KeyRecord, u64)>,
}

impl Control {
    pub(super) fn new() -> Self {
        Self {
            epoch: 7,
            revision: 1,
            items: BTreeMap::new(),
            help_url: String::new(),
        }
    }

    /// The messages for an event.
    pub(super) fn act(&mut self, act: Act) -> Vec<Kind> {
        match act {
            Act::Put(number, KeyState::Revoked) => {
                let revoked = item(number, KeyState::Revoked);
                self.items.insert(number, revoked.clone());
                self.delta(|delta| delta.revocations.push(revoked))
            }
            Act::Put(number, state) => {
                let put = item(number, state);
                self.items.insert(number, put.clone());
                self.delta(|delta| delta.upserts.push(put))
            }
            Act::Remove(number) => {
                self.items.remove(&number);
                let digest = record(number, KeyState::Active).digest;
                self.delta(|delta| {
                    delta.removals.push(discovery::ItemRef {
                        name: String::new(),
                        digest: digest.as_bytes().to_vec().into(),
                    });
                })
            }
            Act::RevokeAhead(number) => {
                let revocations = discovery::Revocations {
                    keyring: testing::keyring_name().to_string(),
                    epoch: self.epoch,
                    revision: self.revision + 1,
                    nonce: 1,
                    items: vec![item(number, KeyState::Revoked)],
                    ..Default::default()
                };
                vec![Kind::Revocations(revocations.encode_to_vec().into())]
            }
            Act::Gap(number) => {
                self.revision += 1;
                self.delta(|delta| delta.revocations.push(item(number, KeyState::Revoked)))
            }
            Act::Settings(is_other) => {
                // The longest allowed URL, so that the file grows.
                let page = if is_other { "a" } else { "b" };
                self.help_url = format!("https://help/{}", page.repeat(2_000));
                vec![self.settings()]
            }
            Act::Snapshot(is_new_history) => {
                self.epoch += u64::from(is_new_history);
                self.revision += 1;
                vec![self.settings(), self.snapshot()]
            }
        }
    }

    /// The first messages of a stream.
    pub(super) fn begin(&self) -> Vec<Kind> {
        vec![self.settings(), self.snapshot()]
    }

    fn delta(&mut self, fill: impl FnOnce(&mut discovery::Delta)) -> Vec<Kind> {
        let mut delta = discovery::Delta {
            keyring: testing::keyring_name().to_string(),
            epoch: self.epoch,
            prev_revision: self.revision,
            revision: self.revision + 1,
            nonce: 1,
            ..discovery::Delta::default()
        };
        self.revision += 1;
        fill(&mut delta);
        vec![Kind::Delta(delta.encode_to_vec().into())]
    }

    fn settings(&self) -> Kind {
        let pepper = testing::pepper();
        Kind::Settings(discovery::KeyringSettings {
            keyring: testing::keyring_name().to_string(),
            epoch: self.epoch,
            prefix: "rlk".to_owned(),
            issued_only: true,
            peppers: vec![discovery::Pepper {
                id: pepper.id().get(),
                secret: pepper.expose().to_vec().into(),
            }],
            help_url: self.help_url.clone(),
        })
    }

    fn snapshot(&self) -> Kind {
        let items: Vec<_> = self.items.values().cloned().collect();
        let hashes = items.iter().map(item::hash);
        let chunk = discovery::SnapshotChunk {
            keyring: testing::keyring_name().to_string(),
            epoch: self.epoch,
            revision: self.revision,
            nonce: 1,
            index: 0,
            last: true,
            total_items: items.len() as u64,
            set_digest: hashes.fold(0, u64::wrapping_add),
            confirmed_items: items.len() as u64,
            items,
            id: 0,
        };
        Kind::Snapshot(chunk.encode_to_vec().into())
    }
}

impl State {
    pub(super) fn of(view: &KeyringView) -> Self {
        let epoch = view.epoch();
        Self {
            position: KeyringPosition::of(view),
            settings: settings::encode(view.name(), epoch, view.settings()).encode_to_vec(),
            versions: view
                .announced()
                .map(|held| (*held.record.digest.as_bytes(), (held.record, held.hash)))
                .collect(),
        }
    }

    /// The numbers of the revoked versions.
    pub(super) fn revoked(&self) -> Vec<u8> {
        let versions = self.versions.values();
        let revoked = versions.filter(|(record, _)| record.state == KeyState::Revoked);
        revoked
            .map(|(record, _)| record.digest.as_bytes()[0])
            .collect()
    }
}

/// The origin of a file that does not exist.
pub(super) fn origin() -> Origin {
    let boot_id = BootId::new("one").expect("it is short");
    Origin {
        id: FileId::new([3; FileId::LEN]),
        inode: Inode {
            device: 1,
            number: 2,
            born_ns: 3,
        },
        boot_clock: Some(BootClock {
            boot_id,
            time_namespace: 4,
        }),
    }
}

/// One of a few versions.
pub(super) fn record(number: u8, state: KeyState) -> KeyRecord {
    let mut digest = [number; KeyDigest::LEN];
    // Some of the versions share a shard.
    digest[8] = number / 2;
    digest[9] = 0;
    KeyRecord {
        digest: KeyDigest::from_slice(&digest).expect("32 bytes"),
        key_id: "7Qm2Xc91TbKe".parse().expect("an id"),
        version: VersionNumber::new(u32::from(number) + 1).expect("not zero"),
        state,
        ..testing::record()
    }
}

fn item(number: u8, state: KeyState) -> discovery::Item {
    item::encode(&record(number, state))
}
