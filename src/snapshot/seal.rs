//! The encryption of a snapshot file: a header in plaintext, then frames. Without the key, nobody can read, alter, reorder
//! or remove a frame in the middle, or move it to another file.
//!
//! ```text
//! magic (8) | format (2) | length of header (4) | header | frames
//! frame: kind (1) | length of what follows (4) | AES-256-GCM ciphertext and tag
//! ```
//!
//! Numbers are big-endian. The key of a file is derived (HKDF-SHA-256, RFC 5869) from the configured key and the salt in the
//! header, which is new in each file. The nonce is the number of the frame. The authenticated data of a frame are the SHA-256
//! of everything before the first frame, the kind of the frame, and its number. Only the process that created a file appends
//! to it, so no nonce is ever used twice under a key.

use std::io::{self, Read};

use prost::Message;
use ring::{
    aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, Tag, UnboundKey},
    hkdf::{HKDF_SHA256, KeyType, Prk, Salt},
};
use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;

use super::{error::ReadError, key::SnapshotKey, origin::Origin};
use crate::{
    key::{RandomError, Timestamp, fill_random},
    proto::snapshot,
};

/// The header of a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// The node id of the sidecar.
    pub node: String,
    /// The cluster of the sidecar.
    pub cluster: String,
    /// The time at which the file was created, by the wall clock.
    pub written_at: Timestamp,
    /// The origin of the file.
    pub origin: Origin,
}

/// The kind of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameKind {
    /// The beginning of a keyring.
    Keyring = 1,
    /// Entries of a keyring.
    Entries = 2,
    /// The end of the state with which the file was created.
    End = 3,
    /// Changes that were applied since then.
    Appended = 4,
}

/// Seals frames one after another.
pub struct Sealer {
    preamble: Vec<u8>,
    seal: Seal,
}

/// Opens a file frame by frame.
pub(crate) struct Opener<R> {
    input: R,
    /// The number of bytes that follow, from the length of the file.
    remaining: u64,
    header: Header,
    /// None without a key: frames are then counted, but not opened.
    seal: Option<Seal>,
    frames: u64,
}

/// The next part of a file.
#[derive(Debug)]
pub(super) enum Next {
    /// An opened frame; empty without a key.
    Frame(FrameKind, Vec<u8>),
    /// An incomplete frame at the end of a file, as a kill or a loss of power during a write leaves it.
    Torn,
    /// The end of the file.
    End,
}

struct Seal {
    key: LessSafeKey,
    preamble_hash: [u8; 32],
    next: u64,
}

/// The length of a secret from HKDF, in bytes.
struct Bytes(usize);

/// The first bytes of every snapshot file.
pub(crate) const MAGIC: [u8; 8] = *b"RLKSNAP\n";
/// The format that this version reads and writes. A change that a reader has to know gets another number.
pub(crate) const FORMAT: u16 = 2;
/// The largest plaintext of a frame, in bytes: twice the largest message of the stream, so that the changes collected for
/// one write fit into it together with the last message.
pub(crate) const MAX_PLAINTEXT: usize = 8 << 20;

const SALT_LEN: usize = 32;
const KEY_CHECK_LEN: usize = 8;
const TAG_LEN: usize = 16;
/// The length of the magic, the format and the length of the header, in bytes.
const PREAMBLE_LEN: usize = MAGIC.len() + 2 + 4;
/// The length of the kind and the length of a frame, in bytes.
const FRAME_HEAD_LEN: usize = 1 + 4;
/// The longest header, in bytes: two names of at most 253 bytes, and fields of fixed length.
const MAX_HEADER: u32 = 1 << 10;

impl FrameKind {
    const fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Keyring),
            2 => Some(Self::Entries),
            3 => Some(Self::End),
            4 => Some(Self::Appended),
            _ => None,
        }
    }
}

impl Sealer {
    /// Begins a file with its own key.
    ///
    /// # Errors
    ///
    /// When the random source of the operating system fails.
    pub fn new(key: &SnapshotKey, header: &Header) -> Result<Self, RandomError> {
        let mut salt = [0; SALT_LEN];
        fill_random(&mut salt)?;
        Ok(Self::with_salt(key, header, salt))
    }

    fn with_salt(key: &SnapshotKey, header: &Header, salt: [u8; SALT_LEN]) -> Self {
        let derived = derive(key, &salt);
        let (id, inode, boot_clock) = header.origin.to_wire();
        let header = snapshot::Header {
            node: header.node.clone(),
            cluster: header.cluster.clone(),
            salt: salt.to_vec().into(),
            key_check: key_check(&derived).to_vec().into(),
            written_at_ms: header.written_at.as_millis(),
            id: id.into(),
            inode: Some(inode),
            boot_clock,
        }
        .encode_to_vec();
        let mut preamble = Vec::with_capacity(PREAMBLE_LEN + header.len());
        preamble.extend_from_slice(&MAGIC);
        preamble.extend_from_slice(&FORMAT.to_be_bytes());
        let len = u32::try_from(header.len()).expect("a header is short");
        preamble.extend_from_slice(&len.to_be_bytes());
        preamble.extend_from_slice(&header);
        let seal = Seal::new(&derived, &preamble);
        Self { preamble, seal }
    }

    /// The bytes before the first frame.
    #[must_use]
    pub fn preamble(&self) -> &[u8] {
        &self.preamble
    }

    /// Appends the next frame to `out`.
    ///
    /// # Panics
    ///
    /// When `plaintext` is longer than [`MAX_PLAINTEXT`].
    pub fn seal(&mut self, kind: FrameKind, plaintext: &[u8], out: &mut Vec<u8>) {
        assert!(plaintext.len() <= MAX_PLAINTEXT, "a frame is bounded");
        let len = u32::try_from(plaintext.len() + TAG_LEN).expect("a frame is bounded");
        out.reserve(FRAME_HEAD_LEN + plaintext.len() + TAG_LEN);
        out.push(kind as u8);
        out.extend_from_slice(&len.to_be_bytes());
        let begin = out.len();
        out.extend_from_slice(plaintext);
        let (nonce, aad) = self.seal.next(kind);
        let tag: Tag = self
            .seal
            .key
            .seal_in_place_separate_tag(nonce, Aad::from(aad), &mut out[begin..])
            .expect("AES-GCM takes what is far shorter than 64 GiB");
        out.extend_from_slice(tag.as_ref());
    }
}

impl std::fmt::Debug for Sealer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sealer").finish_non_exhaustive()
    }
}

impl<R: Read> Opener<R> {
    /// Reads the header of a file of `len` bytes.
    ///
    /// # Errors
    ///
    /// When it is not a snapshot file, or was not sealed with this key.
    pub(crate) fn new(
        mut input: R,
        len: u64,
        key: Option<&SnapshotKey>,
    ) -> Result<Self, ReadError> {
        let mut preamble = vec![0; PREAMBLE_LEN];
        let is_there = len >= PREAMBLE_LEN as u64;
        if !is_there || !read_exact(&mut input, &mut preamble)? || preamble[..8] != MAGIC {
            return Err(ReadError::NoSnapshot);
        }
        let format = u16::from_be_bytes([preamble[8], preamble[9]]);
        if format != FORMAT {
            return Err(ReadError::Format { found: format });
        }
        let header_len =
            u32::from_be_bytes([preamble[10], preamble[11], preamble[12], preamble[13]]);
        if header_len > MAX_HEADER || u64::from(header_len) > len - PREAMBLE_LEN as u64 {
            return Err(ReadError::Header);
        }
        let header_len = header_len as usize;
        preamble.resize(PREAMBLE_LEN + header_len, 0);
        if !read_exact(&mut input, &mut preamble[PREAMBLE_LEN..])? {
            return Err(ReadError::Header);
        }
        let header = snapshot::Header::decode(&preamble[PREAMBLE_LEN..]).ok();
        let header = header.ok_or(ReadError::Header)?;
        let salt: [u8; SALT_LEN] = header.salt[..].try_into().map_err(|_| ReadError::Header)?;
        let origin = Origin::from_wire(&header).ok_or(ReadError::Header)?;
        let seal = match key {
            None => None,
            Some(key) => {
                let derived = derive(key, &salt);
                let is_key = key_check(&derived).ct_eq(&header.key_check);
                if !bool::from(is_key) {
                    return Err(ReadError::Key);
                }
                Some(Seal::new(&derived, &preamble))
            }
        };
        Ok(Self {
            input,
            remaining: len - preamble.len() as u64,
            header: Header {
                node: header.node,
                cluster: header.cluster,
                written_at: Timestamp::from_millis(header.written_at_ms),
                origin,
            },
            seal,
            frames: 0,
        })
    }

    /// The header of the file. It is not verified before a frame was opened.
    pub(crate) const fn header(&self) -> &Header {
        &self.header
    }

    /// The number of frames that were read.
    pub(crate) const fn frames(&self) -> u64 {
        self.frames
    }

    /// The number of bytes that follow.
    pub(crate) const fn remaining(&self) -> u64 {
        self.remaining
    }

    /// Reads the next frame.
    ///
    /// # Errors
    ///
    /// When it cannot be read, or when it is not as it was written and is not the incomplete end of the file.
    pub(super) fn next(&mut self) -> Result<Next, ReadError> {
        if self.remaining == 0 {
            return Ok(Next::End);
        }
        let mut head = [0; FRAME_HEAD_LEN];
        if !self.take(&mut head)? {
            return Ok(Next::Torn);
        }
        if head == [0; FRAME_HEAD_LEN] && self.rest_is_zero()? {
            // The power was lost when the file had already grown, but its content was not written.
            return Ok(Next::Torn);
        }
        let kind = FrameKind::from_byte(head[0]);
        let len = u32::from_be_bytes([head[1], head[2], head[3], head[4]]) as usize;
        let altered = ReadError::Altered { frame: self.frames };
        if len as u64 > self.remaining {
            return Ok(Next::Torn);
        }
        let is_last = len as u64 == self.remaining;
        let is_possible = (TAG_LEN..=MAX_PLAINTEXT + TAG_LEN).contains(&len);
        let (Some(kind), true) = (kind, is_possible) else {
            return if is_last {
                Ok(Next::Torn)
            } else {
                Err(altered)
            };
        };
        let mut sealed = vec![0; len];
        if !self.take(&mut sealed)? {
            return Ok(Next::Torn);
        }
        let Some(seal) = &mut self.seal else {
            self.frames += 1;
            return Ok(Next::Frame(kind, Vec::new()));
        };
        let (nonce, aad) = seal.next(kind);
        match seal.key.open_in_place(nonce, Aad::from(aad), &mut sealed) {
            Ok(plaintext) => {
                let len = plaintext.len();
                sealed.truncate(len);
                self.frames += 1;
                Ok(Next::Frame(kind, sealed))
            }
            Err(_) if is_last => Ok(Next::Torn),
            Err(_) => Err(altered),
        }
    }

    /// Fills `bytes`. Returns whether the input had enough bytes.
    fn take(&mut self, bytes: &mut [u8]) -> Result<bool, ReadError> {
        if bytes.len() as u64 > self.remaining {
            return Ok(false);
        }
        self.remaining -= bytes.len() as u64;
        Ok(read_exact(&mut self.input, bytes)?)
    }

    fn rest_is_zero(&mut self) -> Result<bool, ReadError> {
        let mut chunk = [0; 4 << 10];
        let mut rest = self.remaining;
        while rest > 0 {
            let len = usize::try_from(rest).map_or(chunk.len(), |rest| rest.min(chunk.len()));
            let chunk = &mut chunk[..len];
            if !read_exact(&mut self.input, chunk)? || chunk.iter().any(|byte| *byte != 0) {
                return Ok(false);
            }
            rest -= len as u64;
        }
        Ok(true)
    }
}

impl<R> std::fmt::Debug for Opener<R> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Opener")
            .field("header", &self.header)
            .field("frames", &self.frames)
            .finish_non_exhaustive()
    }
}

impl Seal {
    fn new(derived: &Prk, preamble: &[u8]) -> Self {
        let key: UnboundKey = derived
            .expand(&[b"relatch snapshot frames"], &AES_256_GCM)
            .expect("HKDF gives a key of 32 bytes")
            .into();
        Self {
            key: LessSafeKey::new(key),
            preamble_hash: Sha256::digest(preamble).into(),
            next: 0,
        }
    }

    /// The nonce of the next frame, and its authenticated data.
    fn next(&mut self, kind: FrameKind) -> (Nonce, [u8; 32 + 1 + 8]) {
        let number = self.next.to_be_bytes();
        self.next += 1;
        let mut nonce = [0; NONCE_LEN];
        nonce[NONCE_LEN - number.len()..].copy_from_slice(&number);
        let mut aad = [0; 32 + 1 + 8];
        aad[..32].copy_from_slice(&self.preamble_hash);
        aad[32] = kind as u8;
        aad[33..].copy_from_slice(&number);
        (Nonce::assume_unique_for_key(nonce), aad)
    }
}

impl KeyType for Bytes {
    fn len(&self) -> usize {
        self.0
    }
}

fn derive(key: &SnapshotKey, salt: &[u8; SALT_LEN]) -> Prk {
    Salt::new(HKDF_SHA256, salt).extract(key.expose())
}

fn key_check(derived: &Prk) -> [u8; KEY_CHECK_LEN] {
    let mut check = [0; KEY_CHECK_LEN];
    derived
        .expand(&[b"relatch snapshot key check"], Bytes(KEY_CHECK_LEN))
        .and_then(|okm| okm.fill(&mut check))
        .expect("HKDF gives so few bytes");
    check
}

/// Returns false if the input had too few bytes.
fn read_exact(input: &mut impl Read, bytes: &mut [u8]) -> io::Result<bool> {
    match input.read_exact(bytes) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(false),
        Err(error) => Err(error),
    }
}

#[cfg(test)]
mod tests;
