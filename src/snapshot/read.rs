//! Reads a snapshot file. For any bytes, it does not panic, and it uses no more memory than a valid file of that length
//! could need.

use std::{collections::BTreeMap, io::Read};

use bytes::Bytes;
use prost::Message;

use super::{
    error::ReadError,
    key::SnapshotKey,
    pulse::Pulse,
    seal::{FrameKind, Header, Next, Opener},
};
use crate::{
    key::{Epoch, KeyringName, Revision},
    keyring::{Announced, KeyringPosition, KeyringSettings, Restored},
    proto::{discovery, snapshot},
    wire::{
        change::{Changes, decode_revocations},
        item, settings,
    },
};

/// The content of a snapshot file.
#[derive(Debug)]
pub struct Contents {
    /// The header, with the owner of the file.
    pub(crate) header: Header,
    /// The keyrings after the last complete change.
    pub keyrings: BTreeMap<KeyringName, Restored>,
    /// The times at that moment.
    pub pulse: Pulse,
    /// The number of the last complete write.
    pub write: u64,
    /// How many frames are whole.
    pub frames: u64,
    /// The number of changes that were applied since the file was created.
    pub(crate) changes: u64,
    /// How it ends.
    pub(crate) tail: Tail,
}

/// What is known about a file without its key.
#[derive(Clone, Debug)]
pub struct Outline {
    /// The header, with the owner of the file; not verified.
    pub(crate) header: Header,
    /// How many frames are whole.
    pub frames: u64,
    /// How it ends.
    pub(crate) tail: Tail,
}

/// The end of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Tail {
    /// The file ends with a complete frame.
    Whole,
    /// The file ends within an append, because of a kill or a loss of power.
    Torn,
}

/// The content that was read so far.
#[derive(Default)]
struct Reading {
    keyrings: BTreeMap<KeyringName, Restored>,
    /// The keyring to which the next entries belong.
    open: Option<Open>,
    /// Set when the state with which the file was created is complete.
    pulse: Option<Pulse>,
    write: u64,
    changes: u64,
}

struct Open {
    name: KeyringName,
    keyring: Restored,
    entries: u64,
    set_digest: u64,
}

/// The most keyrings: as many as the configuration of a sidecar allows.
const MAX_KEYRINGS: usize = 256;
/// The size of the smallest entry in bytes: a digest, the id of a key and a consumer.
const MIN_ENTRY: u64 = 48;

/// Reads a file of `len` bytes that was sealed under `key`.
///
/// # Errors
///
/// When it cannot be used: everything up to its [`End`](FrameKind::End) has to be complete and unaltered.
pub fn read(input: impl Read, len: u64, key: &SnapshotKey) -> Result<Contents, ReadError> {
    let mut opener = Opener::new(input, len, Some(key))?;
    let mut reading = Reading::default();
    let tail = loop {
        let frame = opener.frames();
        let contradiction = |problem| ReadError::Contradiction { frame, problem };
        let room = opener.remaining();
        match opener.next()? {
            Next::Frame(kind, plaintext) => {
                let taken = reading.take(kind, plaintext.into(), room);
                taken.map_err(contradiction)?;
            }
            Next::Torn => break Tail::Torn,
            Next::End => break Tail::Whole,
        }
    };
    let frames = opener.frames();
    Ok(Contents {
        header: opener.header().clone(),
        keyrings: reading.keyrings,
        pulse: reading.pulse.ok_or(ReadError::Cut { frame: frames })?,
        write: reading.write,
        frames,
        changes: reading.changes,
        tail,
    })
}

/// Reads the outline of a file of `len` bytes without its key.
///
/// # Errors
///
/// When it is not a snapshot file of this format, or when there is anything between its frames.
pub fn outline(input: impl Read, len: u64) -> Result<Outline, ReadError> {
    let mut opener = Opener::new(input, len, None)?;
    let tail = loop {
        match opener.next()? {
            Next::Frame(_, _) => {}
            Next::Torn => break Tail::Torn,
            Next::End => break Tail::Whole,
        }
    };
    Ok(Outline {
        header: opener.header().clone(),
        frames: opener.frames(),
        tail,
    })
}

impl Reading {
    /// Reads a frame; `room` is the number of bytes from its beginning to the end of the file.
    fn take(&mut self, kind: FrameKind, plaintext: Bytes, room: u64) -> Result<(), String> {
        match (kind, &mut self.pulse) {
            (FrameKind::Keyring, None) => self.begin(&decode(plaintext)?, room),
            (FrameKind::Entries, None) => self.entries(decode(plaintext)?),
            (FrameKind::End, None) => self.end(decode(plaintext)?),
            (FrameKind::Appended, Some(pulse)) => {
                let appended: snapshot::Appended = decode(plaintext)?;
                pulse.advance(pulse_of(appended.pulse)?);
                self.number(appended.write)?;
                self.changes(appended.changes)
            }
            (FrameKind::Keyring | FrameKind::Entries | FrameKind::End, Some(_)) => {
                Err("the state continues after its end".to_owned())
            }
            (FrameKind::Appended, None) => Err("a change comes before the state's end".to_owned()),
        }
    }

    fn begin(&mut self, begin: &snapshot::Keyring, room: u64) -> Result<(), String> {
        self.close()?;
        let name: KeyringName = begin.name.parse().map_err(text)?;
        if self.keyrings.contains_key(&name) {
            return Err(format!("keyring {name} begins twice"));
        }
        if self.keyrings.len() >= MAX_KEYRINGS {
            return Err(format!("there are more than {MAX_KEYRINGS} keyrings"));
        }
        let versions = begin.entries.min(room / MIN_ENTRY);
        let keyring = Restored::new(
            name.clone(),
            Epoch::new(begin.epoch),
            Revision::new(begin.revision),
            settings_of(begin.settings.clone())?,
            usize::try_from(versions).unwrap_or(usize::MAX),
        );
        self.open = Some(Open {
            name,
            keyring,
            entries: begin.entries,
            set_digest: begin.set_digest,
        });
        Ok(())
    }

    fn entries(&mut self, chunk: snapshot::Entries) -> Result<(), String> {
        let open = self.open.as_mut();
        let open = open.ok_or_else(|| "entries come before their keyring".to_owned())?;
        for entry in chunk.entries {
            let kept = discovery::Item {
                name: String::new(),
                record: entry.record,
            };
            let record = item::decode(&kept).map_err(text)?;
            open.keyring.add(&Announced {
                record,
                hash: entry.announced,
            });
        }
        Ok(())
    }

    fn end(&mut self, end: snapshot::End) -> Result<(), String> {
        self.close()?;
        if end.keyrings as usize != self.keyrings.len() {
            return Err(format!(
                "it has {} keyrings, but should have {}",
                self.keyrings.len(),
                end.keyrings
            ));
        }
        self.pulse = Some(pulse_of(end.pulse)?);
        self.number(end.write)
    }

    /// Reads the number of a write.
    fn number(&mut self, number: u64) -> Result<(), String> {
        if number <= self.write {
            return Err(format!(
                "it is write {number}, but comes after write {}",
                self.write
            ));
        }
        self.write = number;
        Ok(())
    }

    /// Adds the open keyring to the complete ones.
    fn close(&mut self) -> Result<(), String> {
        let Some(open) = self.open.take() else {
            return Ok(());
        };
        let found = open.keyring.view().len() as u64;
        if found != open.entries {
            return Err(format!(
                "keyring {} has {found} entries, but should have {}",
                open.name, open.entries
            ));
        }
        if KeyringPosition::of(open.keyring.view()).set_digest != open.set_digest {
            return Err(format!(
                "the entries of keyring {} do not match its digest",
                open.name
            ));
        }
        self.keyrings.insert(open.name, open.keyring);
        Ok(())
    }

    fn changes(&mut self, changes: Vec<snapshot::Change>) -> Result<(), String> {
        for change in changes {
            let name: KeyringName = change.keyring.parse().map_err(text)?;
            let keyring = self.keyrings.get_mut(&name);
            let keyring = keyring.ok_or_else(|| format!("keyring {name} is not in the state"))?;
            match change.kind {
                Some(snapshot::change::Kind::Delta(delta)) => apply(keyring, &decode(delta)?)?,
                Some(snapshot::change::Kind::Revocations(revocations)) => {
                    let revocations: discovery::Revocations = decode(revocations)?;
                    let held = |digest: &_| keyring.view().record(digest);
                    let (records, _) = decode_revocations(&revocations.items, held);
                    let records = records.into_iter().map(|announced| announced.record);
                    keyring.revoke(records.collect());
                }
                Some(snapshot::change::Kind::Settings(settings)) => {
                    keyring.adopt(settings_of(settings)?);
                }
                None => return Err("a change is of an unknown kind".to_owned()),
            }
            self.changes += 1;
        }
        Ok(())
    }
}

/// Applies a message. An item that could not be read when it was first applied is skipped again.
fn apply(keyring: &mut Restored, delta: &discovery::Delta) -> Result<(), String> {
    let changes = Changes::of(delta, |digest| keyring.view().record(digest));
    keyring
        .apply_delta(
            Epoch::new(delta.epoch),
            Revision::new(delta.prev_revision),
            Revision::new(delta.revision),
            &changes.revocations,
            &changes.upserts,
            &changes.removals,
        )
        .map_err(text)
}

fn settings_of(settings: Bytes) -> Result<KeyringSettings, String> {
    let message: discovery::KeyringSettings = decode(settings)?;
    settings::decode(&message).map_err(text)
}

fn pulse_of(pulse: Option<snapshot::Pulse>) -> Result<Pulse, String> {
    pulse
        .and_then(Pulse::from_wire)
        .ok_or_else(|| "its times are missing or damaged".to_owned())
}

fn decode<M: Message + Default>(plaintext: Bytes) -> Result<M, String> {
    M::decode(plaintext).map_err(text)
}

#[expect(clippy::needless_pass_by_value, reason = "it maps an error")]
fn text(error: impl ToString) -> String {
    error.to_string()
}

#[cfg(test)]
mod tests;
