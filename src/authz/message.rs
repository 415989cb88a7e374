//! Envoy's `CheckRequest`, read in place: the fields that a check needs, borrowed from the bytes that came.
//!
//! The fields are those of `proto/envoy/service/auth/v3/external_auth.proto`, and the same bytes read the same as by the
//! code that is generated from it: of a field that comes twice the last one counts, a message that comes twice is
//! merged, what is unknown is skipped. What one refuses the other refuses.

use super::inline::InlineVec;

/// The fields of a request.
#[derive(Clone, Debug, Default)]
pub(super) struct Message<'a> {
    /// It tells of an HTTP request.
    pub(super) has_http: bool,
    pub(super) method: &'a [u8],
    pub(super) path: &'a [u8],
    pub(super) host: &'a [u8],
    /// The downstream peer's address, as text.
    pub(super) source: &'a [u8],
    /// Of `headers`.
    pub(super) joined: Pairs<'a, 32>,
    /// Of `header_map`; where a header has a raw value, that one.
    pub(super) raw: Pairs<'a, 32>,
    /// A header of `header_map` has a value and a raw value that differ.
    pub(super) has_two_values: bool,
    pub(super) extensions: Pairs<'a, 4>,
}

/// Names and values in order.
#[derive(Clone, Debug, Default)]
pub(super) struct Pairs<'a, const INLINE: usize> {
    pairs: InlineVec<(&'a [u8], &'a [u8]), INLINE>,
    /// More came than [`MAX_PAIRS`], and were left out.
    pub(super) is_cut: bool,
}

/// The bytes are no message.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the check is not an encoded CheckRequest")]
pub struct NotAMessage;

/// A field of a message: its number, and its content where that has a length.
struct Field<'a> {
    number: u64,
    content: Option<&'a [u8]>,
}

/// The fields of a message that are still to be read.
struct Fields<'a> {
    rest: &'a [u8],
    /// How many messages this one is in.
    depth: u32,
}

/// More than any bound of a request allows, so that what is left out cannot matter.
pub(super) const MAX_PAIRS: usize = 1_024;
/// How deep messages and groups may lie in each other: what protobuf's own implementations allow.
const MAX_DEPTH: u32 = 100;

impl<'a> Message<'a> {
    /// Reads a serialized `CheckRequest`.
    pub(super) fn read(bytes: &'a [u8]) -> Result<Self, NotAMessage> {
        let mut message = Self::default();
        let mut fields = Fields {
            rest: bytes,
            depth: 0,
        };
        while let Some(field) = fields.next()? {
            if field.number == 1 {
                message.attributes(&mut fields.within(&field)?)?;
            }
        }
        Ok(message)
    }

    fn attributes(&mut self, fields: &mut Fields<'a>) -> Result<(), NotAMessage> {
        while let Some(field) = fields.next()? {
            match field.number {
                1 => self.peer(&mut fields.within(&field)?)?,
                4 => self.request(&mut fields.within(&field)?)?,
                10 => {
                    let (name, value) = entry(&mut fields.within(&field)?)?;
                    self.extensions.push(name, value);
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn peer(&mut self, fields: &mut Fields<'a>) -> Result<(), NotAMessage> {
        while let Some(field) = fields.next()? {
            if field.number == 1 {
                self.address(&mut fields.within(&field)?)?;
            }
        }
        Ok(())
    }

    fn address(&mut self, fields: &mut Fields<'a>) -> Result<(), NotAMessage> {
        while let Some(field) = fields.next()? {
            if field.number == 1 {
                let mut fields = fields.within(&field)?;
                while let Some(field) = fields.next()? {
                    if field.number == 2 {
                        self.source = field.content()?;
                    }
                }
            }
        }
        Ok(())
    }

    fn request(&mut self, fields: &mut Fields<'a>) -> Result<(), NotAMessage> {
        while let Some(field) = fields.next()? {
            if field.number == 2 {
                self.has_http = true;
                self.http(&mut fields.within(&field)?)?;
            }
        }
        Ok(())
    }

    fn http(&mut self, fields: &mut Fields<'a>) -> Result<(), NotAMessage> {
        while let Some(field) = fields.next()? {
            match field.number {
                2 => self.method = field.content()?,
                3 => {
                    let (name, value) = entry(&mut fields.within(&field)?)?;
                    self.joined.push(name, value);
                }
                4 => self.path = field.content()?,
                5 => self.host = field.content()?,
                13 => {
                    let mut fields = fields.within(&field)?;
                    while let Some(field) = fields.next()? {
                        if field.number == 1 {
                            self.raw_header(&mut fields.within(&field)?)?;
                        }
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn raw_header(&mut self, fields: &mut Fields<'a>) -> Result<(), NotAMessage> {
        let (mut name, mut value, mut raw_value): (&[u8], &[u8], &[u8]) = (b"", b"", b"");
        while let Some(field) = fields.next()? {
            match field.number {
                1 => name = field.content()?,
                2 => value = field.content()?,
                3 => raw_value = field.content()?,
                _ => {}
            }
        }
        self.has_two_values |= !value.is_empty() && !raw_value.is_empty() && value != raw_value;
        self.raw.push(
            name,
            if raw_value.is_empty() {
                value
            } else {
                raw_value
            },
        );
        Ok(())
    }
}

impl<'a, const INLINE: usize> Pairs<'a, INLINE> {
    pub(super) const fn len(&self) -> usize {
        self.pairs.len()
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (&'a [u8], &'a [u8])> {
        self.pairs.iter().copied()
    }

    fn push(&mut self, name: &'a [u8], value: &'a [u8]) {
        if self.pairs.len() < MAX_PAIRS {
            self.pairs.push((name, value));
        } else {
            self.is_cut = true;
        }
    }
}

impl<'a> Field<'a> {
    /// What a field holds that is a text or a message.
    fn content(&self) -> Result<&'a [u8], NotAMessage> {
        self.content.ok_or(NotAMessage)
    }
}

impl<'a> Fields<'a> {
    /// The fields of the message that a field holds.
    fn within(&self, field: &Field<'a>) -> Result<Self, NotAMessage> {
        Ok(Self {
            rest: field.content()?,
            depth: self.depth + 1,
        })
    }

    /// The next field; what has no length is skipped.
    fn next(&mut self) -> Result<Option<Field<'a>>, NotAMessage> {
        if self.rest.is_empty() {
            return Ok(None);
        }
        let (number, kind) = self.key()?;
        let content = match kind {
            2 => Some(self.with_length()?),
            kind => {
                self.skip(number, kind, self.depth)?;
                None
            }
        };
        Ok(Some(Field { number, content }))
    }

    /// The number and the wire type of a field.
    fn key(&mut self) -> Result<(u64, u8), NotAMessage> {
        let key = self.varint()?;
        let (number, kind) = (key >> 3, key & 0b111);
        let is_valid = u32::try_from(key).is_ok() && number > 0;
        let kind = u8::try_from(kind).map_err(|_| NotAMessage)?;
        if is_valid {
            Ok((number, kind))
        } else {
            Err(NotAMessage)
        }
    }

    /// Skips the content of a field that lies in `depth` messages and groups.
    fn skip(&mut self, number: u64, kind: u8, depth: u32) -> Result<(), NotAMessage> {
        if depth >= MAX_DEPTH {
            return Err(NotAMessage);
        }
        match kind {
            0 => self.varint().map(|_| ()),
            1 => self.take(8).map(|_| ()),
            2 => self.with_length().map(|_| ()),
            3 => loop {
                let (inner, kind) = self.key()?;
                if kind != 4 {
                    self.skip(inner, kind, depth + 1)?;
                } else if inner == number {
                    return Ok(());
                } else {
                    return Err(NotAMessage);
                }
            },
            5 => self.take(4).map(|_| ()),
            _ => Err(NotAMessage),
        }
    }

    fn with_length(&mut self) -> Result<&'a [u8], NotAMessage> {
        let len = self.varint()?;
        self.take(usize::try_from(len).map_err(|_| NotAMessage)?)
    }

    fn take(&mut self, len: usize) -> Result<&'a [u8], NotAMessage> {
        let (taken, rest) = self.rest.split_at_checked(len).ok_or(NotAMessage)?;
        self.rest = rest;
        Ok(taken)
    }

    /// At most 64 bits, seven a byte.
    fn varint(&mut self) -> Result<u64, NotAMessage> {
        // Almost all are of one byte.
        if let [byte @ 0..0x80, rest @ ..] = self.rest {
            self.rest = rest;
            return Ok(u64::from(*byte));
        }
        let mut number = 0;
        for shift in (0..u64::BITS).step_by(7) {
            let (byte, rest) = self.rest.split_first().ok_or(NotAMessage)?;
            self.rest = rest;
            if shift == 63 && *byte > 1 {
                return Err(NotAMessage);
            }
            number |= u64::from(byte & 0x7f) << shift;
            if *byte < 0x80 {
                return Ok(number);
            }
        }
        Err(NotAMessage)
    }
}

/// An entry of a `map<string, string>`.
fn entry<'a>(fields: &mut Fields<'a>) -> Result<(&'a [u8], &'a [u8]), NotAMessage> {
    let (mut key, mut value): (&[u8], &[u8]) = (b"", b"");
    while let Some(field) = fields.next()? {
        match field.number {
            1 => key = field.content()?,
            2 => value = field.content()?,
            _ => {}
        }
    }
    Ok((key, value))
}

#[cfg(test)]
mod tests;
