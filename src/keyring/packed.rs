//! Numbers, times and texts packed one behind the other, and read again in the same order.
//!
//! The packed form never leaves the process: it is neither sent nor stored, so that whatever reads it may rely on it.

use crate::key::{KeyId, Timestamp, VersionNumber};

/// Reads from the beginning of what was packed.
#[derive(Clone, Debug)]
pub(super) struct Reader<'v> {
    rest: &'v [u8],
}

/// What an expectation of a reader says.
pub(super) const PACKED: &str = "a record is read as it was packed";

impl<'v> Reader<'v> {
    pub(super) const fn new(packed: &'v [u8]) -> Self {
        Self { rest: packed }
    }

    /// What is not read yet.
    pub(super) const fn rest(&self) -> &'v [u8] {
        self.rest
    }

    fn take(&mut self, len: usize) -> &'v [u8] {
        let (taken, rest) = self.rest.split_at(len);
        self.rest = rest;
        taken
    }

    pub(super) fn array<const N: usize>(&mut self) -> [u8; N] {
        self.take(N).try_into().expect(PACKED)
    }

    pub(super) fn byte(&mut self) -> u8 {
        let [byte] = self.array();
        byte
    }

    pub(super) fn text(&mut self) -> &'v str {
        str::from_utf8(self.measured()).expect(PACKED)
    }

    pub(super) fn key_id(&mut self) -> KeyId {
        KeyId::from_bytes(self.take(KeyId::LEN)).expect(PACKED)
    }

    pub(super) fn version(&mut self) -> VersionNumber {
        VersionNumber::new(self.number()).expect(PACKED)
    }

    pub(super) fn time(&mut self) -> Timestamp {
        Timestamp::from_millis(i64::from_le_bytes(self.array()))
    }

    /// What [`push_measured`] wrote.
    pub(super) fn measured(&mut self) -> &'v [u8] {
        let len = usize::try_from(self.number()).expect(PACKED);
        self.take(len)
    }

    /// Seven bits a byte, the lowest first.
    pub(super) fn number(&mut self) -> u32 {
        let mut number = 0;
        let mut shift = 0;
        loop {
            let byte = self.byte();
            number |= u32::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return number;
            }
            shift += 7;
        }
    }
}

pub(super) fn push_time(time: Timestamp, packed: &mut Vec<u8>) {
    packed.extend_from_slice(&time.as_millis().to_le_bytes());
}

/// Bytes behind their number.
pub(super) fn push_measured(bytes: &[u8], packed: &mut Vec<u8>) {
    push_number(
        u32::try_from(bytes.len()).expect("a record is small"),
        packed,
    );
    packed.extend_from_slice(bytes);
}

pub(super) fn push_number(mut number: u32, packed: &mut Vec<u8>) {
    while number >= 0x80 {
        packed.push(0x80 | u8::try_from(number & 0x7f).expect("seven bits"));
        number >>= 7;
    }
    packed.push(u8::try_from(number).expect("seven bits"));
}
