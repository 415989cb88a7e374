//! A check that is too large to be kept whole: the fields that a decision needs, collected while
//! the check arrives.
//!
//! Envoy can pass the body of a request along (`with_request_body`), and its limit on headers can
//! be raised (`max_request_headers_kb`). No size may turn a check into a gRPC error: Envoy treats
//! an error as a failure of relatch, and may be configured to let the request pass then. So
//! everything that [`message`](super::message) does not read, above all the body, is skipped as it
//! arrives.

use bytes::{BufMut as _, Bytes, BytesMut};
use prost::encoding::encode_varint;

use super::{message::NotAMessage, request::RequestError};

/// Collects the fields of a serialized `CheckRequest` that a decision needs. Groups, which Envoy
/// does not send, are refused.
#[derive(Debug)]
pub(crate) struct Condenser {
    /// The number of bytes that have arrived.
    at: usize,
    /// The length of the message.
    end: usize,
    /// The messages around the current position, outermost first.
    around: Vec<Around>,
    varint: Varint,
    step: Step,
    /// The needed fields, in the form of a `CheckRequest`.
    kept: BytesMut,
    error: Option<RequestError>,
}

/// A message that contains the current position.
#[derive(Debug)]
struct Around {
    /// Where it ends in what arrives.
    end: usize,
    /// Where its length stands in what is kept.
    length_at: usize,
}

/// The meaning of the next bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    /// The number and the wire type of a field.
    Key,
    /// A varint that is skipped.
    Number,
    /// The length of the field with this number.
    Length(u64),
    /// This many bytes, which are kept.
    Keep(usize),
    /// This many bytes, which are skipped.
    Skip(usize),
}

/// What a decision needs of a field.
enum Need {
    /// Some of the fields in it.
    Parts,
    All,
    Nothing,
}

/// A varint of which some bytes have arrived.
#[derive(Debug, Default)]
struct Varint {
    value: u64,
    bits: u32,
}

/// The largest message that is kept, in bytes. Envoy's default limit on the headers of a request is
/// 60 KiB, and the fields that a decision needs contain little else.
pub(crate) const MAX_KEPT: usize = 256 << 10;
/// The length of an enclosing message in what is kept: a varint of this many bytes, which is filled
/// in at the end of the message.
const LENGTH: usize = 4;

impl Condenser {
    /// Creates a condenser for a message of `length` bytes.
    #[must_use]
    pub(crate) fn new(length: usize) -> Self {
        Self {
            at: 0,
            end: length,
            around: Vec::new(),
            varint: Varint::default(),
            step: Step::Key,
            kept: BytesMut::new(),
            error: None,
        }
    }

    /// Reads the next bytes of the message. Bytes after its end are ignored.
    pub(crate) fn push(&mut self, bytes: &[u8]) {
        let mut bytes = &bytes[..bytes.len().min(self.end - self.at)];
        while !bytes.is_empty() && self.error.is_none() {
            let wanted = match self.step {
                Step::Key | Step::Number | Step::Length(_) => 1,
                Step::Keep(left) | Step::Skip(left) => left,
            };
            let (now, later) = bytes.split_at(wanted.min(bytes.len()));
            bytes = later;
            self.at += now.len();
            if let Err(error) = self.read(now) {
                self.error = Some(error);
                self.kept = BytesMut::new();
            }
        }
        self.at += bytes.len();
    }

    /// Returns whether the whole message has arrived.
    #[must_use]
    pub(crate) const fn is_complete(&self) -> bool {
        self.at == self.end
    }

    /// Returns a `CheckRequest` with the needed fields of a complete message.
    ///
    /// # Errors
    ///
    /// When the message is not a `CheckRequest`, or the needed fields are larger than [`MAX_KEPT`].
    pub(crate) fn finish(self) -> Result<Bytes, RequestError> {
        match self.error {
            Some(error) => Err(error),
            None if self.is_complete() => Ok(self.kept.freeze()),
            None => Err(NotAMessage.into()),
        }
    }

    fn read(&mut self, bytes: &[u8]) -> Result<(), RequestError> {
        self.step = match self.step {
            Step::Key => match self.varint.push(bytes[0])? {
                Some(key) => self.begin(key)?,
                None => Step::Key,
            },
            Step::Number => match self.varint.push(bytes[0])? {
                Some(_) => Step::Key,
                None => Step::Number,
            },
            Step::Length(number) => match self.varint.push(bytes[0])? {
                Some(length) => self.enter(number, length)?,
                None => Step::Length(number),
            },
            Step::Keep(left) => {
                self.kept.put_slice(bytes);
                Step::Keep(left - bytes.len())
            }
            Step::Skip(left) => Step::Skip(left - bytes.len()),
        };
        if matches!(self.step, Step::Keep(0) | Step::Skip(0)) {
            self.step = Step::Key;
        }
        self.leave()
    }

    /// Reads the number and the wire type of a field.
    fn begin(&self, key: u64) -> Result<Step, NotAMessage> {
        let (number, kind) = (key >> 3, key & 0b111);
        if u32::try_from(key).is_err() || number == 0 {
            return Err(NotAMessage);
        }
        match (self.need(number), kind) {
            (_, 2) => Ok(Step::Length(number)),
            (Need::Nothing, 0) => Ok(Step::Number),
            (Need::Nothing, 1) => self.skip(8),
            (Need::Nothing, 5) => self.skip(4),
            _ => Err(NotAMessage),
        }
    }

    /// Reads the length of a field.
    fn enter(&mut self, number: u64, length: u64) -> Result<Step, RequestError> {
        let length = usize::try_from(length).map_err(|_| NotAMessage)?;
        if length > self.room() {
            return Err(NotAMessage.into());
        }
        match self.need(number) {
            Need::Nothing => Ok(Step::Skip(length)),
            Need::All => {
                self.put_key(number);
                encode_varint(length as u64, &mut self.kept);
                self.check_size(length)?;
                Ok(Step::Keep(length))
            }
            Need::Parts => {
                self.put_key(number);
                self.around.push(Around {
                    end: self.at + length,
                    length_at: self.kept.len(),
                });
                self.kept.put_bytes(0, LENGTH);
                self.check_size(0)?;
                Ok(Step::Key)
            }
        }
    }

    /// Leaves the messages that end at the current position.
    fn leave(&mut self) -> Result<(), RequestError> {
        while self.room() == 0 {
            if self.step != Step::Key || !self.varint.is_empty() {
                return Err(NotAMessage.into());
            }
            let Some(Around { length_at, .. }) = self.around.pop() else {
                break;
            };
            let begin = length_at + LENGTH;
            let mut length = self.kept.len() - begin;
            for byte in &mut self.kept[length_at..begin] {
                let [low, ..] = length.to_le_bytes();
                *byte = 0x80 | low;
                length >>= 7;
            }
            self.kept[begin - 1] &= 0x7f;
        }
        Ok(())
    }

    fn skip(&self, length: usize) -> Result<Step, NotAMessage> {
        if length <= self.room() {
            Ok(Step::Skip(length))
        } else {
            Err(NotAMessage)
        }
    }

    /// Returns how many bytes the innermost message still has.
    fn room(&self) -> usize {
        let end = self.around.last().map_or(self.end, |around| around.end);
        end - self.at
    }

    /// Returns what a decision needs of a field of the innermost message.
    const fn need(&self, number: u64) -> Need {
        match (self.around.len(), number) {
            // The attributes, their request, and its HTTP request.
            (0, 1) | (1, 4) | (2, 2) => Need::Parts,
            // The source and the context extensions; method, headers, path, host and raw headers.
            (1, 1 | 10) | (3, 2..=5 | 13) => Need::All,
            _ => Need::Nothing,
        }
    }

    /// Writes the number of a field that has a length.
    fn put_key(&mut self, number: u64) {
        encode_varint(number << 3 | 2, &mut self.kept);
    }

    fn check_size(&self, more: usize) -> Result<(), RequestError> {
        if self.kept.len() + more <= MAX_KEPT {
            Ok(())
        } else {
            Err(RequestError::TooLarge)
        }
    }
}

impl Varint {
    /// Adds a byte, and returns the value if it is complete.
    fn push(&mut self, byte: u8) -> Result<Option<u64>, NotAMessage> {
        if self.bits == 63 && byte > 1 {
            return Err(NotAMessage);
        }
        self.value |= u64::from(byte & 0x7f) << self.bits;
        self.bits += 7;
        if byte >= 0x80 {
            return Ok(None);
        }
        let Self { value, .. } = std::mem::take(self);
        Ok(Some(value))
    }

    const fn is_empty(&self) -> bool {
        self.bits == 0
    }
}

#[cfg(test)]
mod tests;
