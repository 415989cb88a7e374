//! Writes the content of a snapshot file: the state of every keyring, then the changes that were applied since.

use std::io::{self, Write};

use bytes::Bytes;
use prost::Message;

use super::{
    pulse::Pulse,
    seal::{FrameKind, MAX_PLAINTEXT, Sealer},
};
use crate::{
    key::KeyringName,
    keyring::{Announced, KeyringPosition, KeyringView},
    proto::snapshot,
    wire::{item, settings},
};

/// A message of the stream that was applied to a keyring.
#[derive(Clone, PartialEq, Eq)]
pub(crate) struct Change {
    pub(crate) keyring: KeyringName,
    pub(crate) kind: ChangeKind,
}

/// A serialized message of the discovery protocol.
#[derive(Clone, PartialEq, Eq)]
pub(crate) enum ChangeKind {
    /// A `Delta`.
    Delta(Bytes),
    /// `Revocations` that were sent ahead.
    Revocations(Bytes),
    /// `KeyringSettings`.
    Settings(Bytes),
}

/// The plaintext of one frame of entries, in bytes: the overhead is below a thousandth, and no large buffer is necessary.
const CHUNK: usize = 64 << 10;
/// The overhead of a message in a frame, in bytes: tags, lengths and the name of a keyring.
const AROUND: usize = 128;

/// Writes the whole state of `keyrings`, as write `number`. Returns the number of bytes.
///
/// # Errors
///
/// When they cannot be written.
pub fn write<'v>(
    output: &mut impl Write,
    sealer: &mut Sealer,
    keyrings: impl IntoIterator<Item = &'v KeyringView>,
    pulse: &Pulse,
    number: u64,
) -> io::Result<u64> {
    let mut bytes = Vec::with_capacity(CHUNK + 2 * AROUND);
    let mut written = sealer.preamble().len() as u64;
    output.write_all(sealer.preamble())?;
    let mut frame = |kind, plaintext: &[u8]| {
        bytes.clear();
        sealer.seal(kind, plaintext, &mut bytes);
        written += bytes.len() as u64;
        output.write_all(&bytes)
    };
    let mut count = 0;
    for view in keyrings {
        count += 1;
        frame(FrameKind::Keyring, &begin(view).encode_to_vec())?;
        let mut chunk = snapshot::Entries::default();
        let mut size = 0;
        for Announced { record, hash } in view.announced() {
            let record = item::encode_record(&record);
            size += record.len() + 16;
            chunk.entries.push(snapshot::Entry {
                record: record.into(),
                announced: hash,
            });
            if size >= CHUNK {
                frame(FrameKind::Entries, &chunk.encode_to_vec())?;
                chunk.entries.clear();
                size = 0;
            }
        }
        if !chunk.entries.is_empty() {
            frame(FrameKind::Entries, &chunk.encode_to_vec())?;
        }
    }
    let end = snapshot::End {
        keyrings: count,
        pulse: Some(pulse.to_wire()),
        write: number,
    };
    frame(FrameKind::End, &end.encode_to_vec())?;
    Ok(written)
}

/// Returns the frame with `changes` and the newer part of the pulse, as write `number`. None if they do not fit into one
/// frame.
#[must_use]
pub(crate) fn append(
    sealer: &mut Sealer,
    changes: &[Change],
    pulse: &Pulse,
    number: u64,
) -> Option<Vec<u8>> {
    let appended = snapshot::Appended {
        changes: changes.iter().map(Change::to_wire).collect(),
        pulse: Some(pulse.to_wire()),
        write: number,
    };
    if appended.encoded_len() > MAX_PLAINTEXT {
        return None;
    }
    let mut bytes = Vec::new();
    sealer.seal(FrameKind::Appended, &appended.encode_to_vec(), &mut bytes);
    Some(bytes)
}

impl Change {
    /// The approximate size in a frame, in bytes.
    #[must_use]
    pub(crate) fn size(&self) -> usize {
        let (ChangeKind::Delta(message)
        | ChangeKind::Revocations(message)
        | ChangeKind::Settings(message)) = &self.kind;
        message.len() + AROUND
    }

    fn to_wire(&self) -> snapshot::Change {
        use snapshot::change::Kind;
        snapshot::Change {
            keyring: self.keyring.to_string(),
            kind: Some(match self.kind.clone() {
                ChangeKind::Delta(delta) => Kind::Delta(delta),
                ChangeKind::Revocations(revocations) => Kind::Revocations(revocations),
                ChangeKind::Settings(settings) => Kind::Settings(settings),
            }),
        }
    }
}

/// Without the content, because settings have peppers.
impl std::fmt::Debug for Change {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Change")
            .field("keyring", &self.keyring)
            .field("kind", &self.kind)
            .finish()
    }
}

impl std::fmt::Debug for ChangeKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Delta(_) => "Delta",
            Self::Revocations(_) => "Revocations",
            Self::Settings(_) => "Settings",
        })
    }
}

fn begin(view: &KeyringView) -> snapshot::Keyring {
    let KeyringPosition {
        epoch,
        revision,
        set_digest,
    } = KeyringPosition::of(view);
    snapshot::Keyring {
        name: view.name().to_string(),
        epoch: epoch.get(),
        revision: revision.get(),
        set_digest,
        entries: view.len() as u64,
        settings: settings::encode(view.name(), epoch, view.settings())
            .encode_to_vec()
            .into(),
    }
}
