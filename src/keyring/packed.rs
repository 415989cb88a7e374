//! Packs numbers, times and texts one after the other, and reads them in the same order.
//!
//! The packed form never leaves the process: it is neither sent nor stored. So a reader may rely on
//! its format.

use crate::key::{KeyId, Timestamp, VersionNumber};

/// Reads packed values from the beginning.
#[derive(Clone, Debug)]
pub(super) struct Reader<'v> {
    rest: &'v [u8],
}

/// The panic message of a reader.
pub(super) const PACKED: &str = "a record is read as it was packed";

impl<'v> Reader<'v> {
    pub(super) const fn new(packed: &'v [u8]) -> Self {
        Self { rest: packed }
    }

    /// Returns the bytes that are not read yet.
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

    /// Reads the bytes that [`push_measured`] wrote.
    pub(super) fn measured(&mut self) -> &'v [u8] {
        let len = usize::try_from(self.number()).expect(PACKED);
        self.take(len)
    }

    /// Reads a number of seven bits a byte, the lowest bits first.
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

/// Appends the number of the bytes, and then the bytes.
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
