//! Writes protobuf messages field by field, directly into the buffer that is sent.

use std::fmt::{self, Write as _};

use bytes::{BufMut, BytesMut};
use prost::encoding::encode_varint;

/// Appends fields to a message.
pub(super) struct Writer<'b>(&'b mut BytesMut);

/// The wire types (protobuf's encoding, "Message Structure").
const VARINT: u32 = 0;
const FIXED64: u32 = 1;
const WITH_LENGTH: u32 = 2;

impl<'b> Writer<'b> {
    /// Creates a writer that appends to `buffer`.
    pub(super) const fn new(buffer: &'b mut BytesMut) -> Self {
        Self(buffer)
    }

    /// Writes a number or the value of an enumeration.
    pub(super) fn number(&mut self, field: u32, value: u32) {
        self.varint(field << 3 | VARINT);
        self.varint(value);
    }

    pub(super) fn double(&mut self, field: u32, value: f64) {
        self.varint(field << 3 | FIXED64);
        self.0.put_f64_le(value);
    }

    pub(super) fn text(&mut self, field: u32, text: &str) {
        self.bytes(field, text.as_bytes());
    }

    pub(super) fn bytes(&mut self, field: u32, bytes: &[u8]) {
        self.message(field, |message| message.0.extend_from_slice(bytes));
    }

    /// Writes the name of a header in lower case. A byte that is not ASCII, which no name of a
    /// header has, becomes a `?`: a text that is not UTF-8 would make the whole answer invalid.
    pub(super) fn lower_case(&mut self, field: u32, name: &[u8]) {
        self.message(field, |message| {
            let lower = |byte: &u8| match byte {
                0..=0x7f => byte.to_ascii_lowercase(),
                0x80.. => b'?',
            };
            message.0.extend(name.iter().map(lower));
        });
    }

    /// Writes the [`Display`](fmt::Display) form of `text`.
    pub(super) fn display(&mut self, field: u32, text: impl fmt::Display) {
        self.message(field, |message| {
            write!(message.0, "{text}").expect("a buffer grows");
        });
    }

    /// Writes a message with the fields that `fill` appends.
    pub(super) fn message(&mut self, field: u32, fill: impl FnOnce(&mut Self)) {
        self.varint(field << 3 | WITH_LENGTH);
        let at = self.0.len();
        // The length precedes the content. Most lengths fit in one byte; a longer one moves the
        // content.
        self.0.put_u8(0);
        fill(self);
        let len = self.0.len() - at - 1;
        match u8::try_from(len) {
            Ok(len @ 0..0x80) => self.0[at] = len,
            Ok(_) | Err(_) => self.put_long_length(at, len),
        }
    }

    /// Writes a length that does not fit in the one reserved byte at `at`, and moves the content
    /// behind it.
    #[cold]
    fn put_long_length(&mut self, at: usize, len: usize) {
        let end = self.0.len();
        let value = u32::try_from(len).expect("an answer is far smaller than 4 GiB");
        // Write the length behind the content first, to find out how many bytes it has.
        self.varint(value);
        let width = self.0.len() - end;
        let mut length = [0; 5];
        length[..width].copy_from_slice(&self.0[end..]);
        self.0.truncate(end + width - 1);
        self.0.copy_within(at + 1..end, at + width);
        self.0[at..at + width].copy_from_slice(&length[..width]);
    }

    fn varint(&mut self, value: u32) {
        encode_varint(value.into(), self.0);
    }
}

#[cfg(test)]
mod tests {
    use prost::Message as _;
    use prost_types::{Struct, Value, value::Kind};

    use super::*;

    fn written(fill: impl FnOnce(&mut Writer<'_>)) -> Vec<u8> {
        let mut buffer = BytesMut::from(&b"before"[..]);
        fill(&mut Writer::new(&mut buffer));
        buffer
            .strip_prefix(b"before")
            .expect("it was there")
            .to_vec()
    }

    /// Tests lengths of one, two and three bytes, at their limits.
    #[test]
    fn messages_are_written_as_the_generated_code_writes_them() {
        for len in [
            0, 1, 100, 117, 118, 119, 127, 128, 129, 16_370, 16_383, 16_384, 70_000,
        ] {
            let text = "x".repeat(len);
            let bytes = written(|message| {
                message.message(1, |entry| {
                    entry.text(1, "name");
                    entry.message(2, |value| value.text(3, &text));
                });
            });
            let kind = Some(Kind::StringValue(text));
            let expected = Struct {
                fields: [("name".to_owned(), Value { kind })].into(),
            };
            assert!(bytes == expected.encode_to_vec(), "of {len} bytes");
        }
    }

    #[test]
    fn names_are_written_in_lower_case_and_always_as_text() {
        let bytes = written(|message| message.lower_case(1, b"X-Api_\xffKey"));
        assert_eq!(bytes, b"\x0a\x0ax-api_?key");
    }

    #[test]
    fn numbers_are_written_as_the_generated_code_writes_them() {
        for number in [1, 127, 128, 16_383, 16_384, i32::MAX] {
            let bytes = written(|message| message.number(1, number.unsigned_abs()));
            let expected = crate::proto::auth::HttpStatus { code: number };
            assert_eq!(bytes, expected.encode_to_vec());
        }
        let bytes = written(|message| message.double(2, 1.5));
        let kind = Some(Kind::NumberValue(1.5));
        assert_eq!(bytes, Value { kind }.encode_to_vec());
    }
}
