//! Envoy's `CheckRequest`, read in place: the fields that a check needs, borrowed from the received
//! bytes.
//!
//! The fields are those of `proto/envoy/service/auth/v3/external_auth.proto`. This decoder gives
//! the same result as the code that is generated from that file. If a field occurs twice, the last
//! one counts; if a message occurs twice, the two are merged; an unknown field is skipped. Both
//! refuse the same bytes.

use smallvec::SmallVec;

/// The fields of a request.
#[derive(Clone, Debug, Default)]
pub(super) struct Message<'a> {
    /// Whether the message has the attributes of an HTTP request.
    pub(super) has_http: bool,
    pub(super) method: &'a [u8],
    pub(super) path: &'a [u8],
    pub(super) host: &'a [u8],
    /// The downstream peer's address, as text.
    pub(super) source: &'a [u8],
    /// The headers of `headers` and of `header_map`, in the order of the message.
    headers: Pairs<32>,
    /// The number of headers in `headers`.
    pub(super) joined: usize,
    /// Whether a header of `header_map` has a value and a raw value that differ.
    pub(super) has_two_values: bool,
    extensions: Pairs<4>,
    bytes: &'a [u8],
}

/// Names and values in order, up to [`MAX_PAIRS`]. Later ones are left out.
type Pairs<const INLINE: usize> = SmallVec<[(Span, Span); INLINE]>;

/// A range of bytes of the message.
#[derive(Clone, Copy, Debug, Default)]
struct Span {
    start: u32,
    end: u32,
}

/// The error for bytes that are not an encoded `CheckRequest`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the check is not an encoded CheckRequest")]
pub struct NotAMessage;

/// A field of a message: its number, and its content if the field has a length (wire type 2).
struct Field {
    number: u64,
    content: Option<Span>,
}

/// The fields of a message that are not read yet.
struct Fields<'a> {
    bytes: &'a [u8],
    rest: Span,
    /// The number of messages around this one.
    depth: u32,
}

/// The maximum number of pairs. It is above the bounds of a request, so that a request with pairs
/// that are left out is refused in any case.
pub(super) const MAX_PAIRS: usize = 1_024;
/// The maximum depth of nested messages and groups, as in protobuf's own implementations.
const MAX_DEPTH: u32 = 100;

impl<'a> Message<'a> {
    /// Reads a serialized `CheckRequest`.
    pub(super) fn read(bytes: &'a [u8]) -> Result<Self, NotAMessage> {
        let end = u32::try_from(bytes.len()).map_err(|_| NotAMessage)?;
        let mut message = Self {
            bytes,
            ..Self::default()
        };
        let mut fields = Fields {
            bytes,
            rest: Span { start: 0, end },
            depth: 0,
        };
        while let Some(field) = fields.next()? {
            if field.number == 1 {
                message.read_attributes(&mut fields.within(&field)?)?;
            }
        }
        Ok(message)
    }

    /// Returns the names and values of the headers. A header of `header_map` has its raw value, if
    /// that is not empty.
    pub(super) fn headers(
        &self,
    ) -> impl ExactSizeIterator<Item = (&'a [u8], &'a [u8])> + DoubleEndedIterator {
        self.pairs(&self.headers)
    }

    /// Returns the names and values of the context extensions.
    pub(super) fn extensions(&self) -> impl ExactSizeIterator<Item = (&'a [u8], &'a [u8])> {
        self.pairs(&self.extensions)
    }

    fn pairs<const INLINE: usize>(
        &self,
        pairs: &Pairs<INLINE>,
    ) -> impl ExactSizeIterator<Item = (&'a [u8], &'a [u8])> + DoubleEndedIterator {
        let bytes = self.bytes;
        let pairs = pairs.as_slice().iter();
        pairs.map(move |(name, value)| (name.of(bytes), value.of(bytes)))
    }

    fn read_attributes(&mut self, fields: &mut Fields<'a>) -> Result<(), NotAMessage> {
        while let Some(field) = fields.next()? {
            match field.number {
                1 => self.read_peer(&mut fields.within(&field)?)?,
                4 => self.read_request(&mut fields.within(&field)?)?,
                10 => push(
                    &mut self.extensions,
                    read_entry(&mut fields.within(&field)?)?,
                ),
                _ => {}
            }
        }
        Ok(())
    }

    fn read_peer(&mut self, fields: &mut Fields<'a>) -> Result<(), NotAMessage> {
        while let Some(field) = fields.next()? {
            if field.number == 1 {
                self.read_address(&mut fields.within(&field)?)?;
            }
        }
        Ok(())
    }

    fn read_address(&mut self, fields: &mut Fields<'a>) -> Result<(), NotAMessage> {
        while let Some(field) = fields.next()? {
            if field.number == 1 {
                let mut fields = fields.within(&field)?;
                while let Some(field) = fields.next()? {
                    if field.number == 2 {
                        self.source = field.content()?.of(self.bytes);
                    }
                }
            }
        }
        Ok(())
    }

    fn read_request(&mut self, fields: &mut Fields<'a>) -> Result<(), NotAMessage> {
        while let Some(field) = fields.next()? {
            if field.number == 2 {
                self.has_http = true;
                self.read_http(&mut fields.within(&field)?)?;
            }
        }
        Ok(())
    }

    fn read_http(&mut self, fields: &mut Fields<'a>) -> Result<(), NotAMessage> {
        while let Some(field) = fields.next()? {
            match field.number {
                2 => self.method = field.content()?.of(self.bytes),
                3 => {
                    push(&mut self.headers, read_entry(&mut fields.within(&field)?)?);
                    self.joined += 1;
                }
                4 => self.path = field.content()?.of(self.bytes),
                5 => self.host = field.content()?.of(self.bytes),
                13 => {
                    let mut fields = fields.within(&field)?;
                    while let Some(field) = fields.next()? {
                        if field.number == 1 {
                            self.read_raw_header(&mut fields.within(&field)?)?;
                        }
                    }
                }
                _ => {}
            }
        }
        Ok(())
    }

    fn read_raw_header(&mut self, fields: &mut Fields<'a>) -> Result<(), NotAMessage> {
        let (mut name, mut value, mut raw_value) =
            (Span::default(), Span::default(), Span::default());
        while let Some(field) = fields.next()? {
            match field.number {
                1 => name = field.content()?,
                2 => value = field.content()?,
                3 => raw_value = field.content()?,
                _ => {}
            }
        }
        let is_raw = !raw_value.is_empty();
        self.has_two_values |=
            is_raw && !value.is_empty() && value.of(self.bytes) != raw_value.of(self.bytes);
        push(
            &mut self.headers,
            (name, if is_raw { raw_value } else { value }),
        );
        Ok(())
    }
}

impl Span {
    fn of(self, bytes: &[u8]) -> &[u8] {
        &bytes[self.start as usize..self.end as usize]
    }

    const fn is_empty(self) -> bool {
        self.start >= self.end
    }
}

impl Field {
    /// Returns the content of a field that must be a text or a message.
    fn content(&self) -> Result<Span, NotAMessage> {
        self.content.ok_or(NotAMessage)
    }
}

impl Fields<'_> {
    /// Returns the fields of the message that is the content of a field.
    fn within(&self, field: &Field) -> Result<Self, NotAMessage> {
        Ok(Self {
            bytes: self.bytes,
            rest: field.content()?,
            depth: self.depth + 1,
        })
    }

    /// Reads the next field. The content of a field without a length is skipped.
    #[inline]
    fn next(&mut self) -> Result<Option<Field>, NotAMessage> {
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

    /// Reads the number and the wire type of a field.
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

    /// Skips the content of a field inside `depth` messages and groups.
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

    #[inline]
    fn with_length(&mut self) -> Result<Span, NotAMessage> {
        let len = self.varint()?;
        self.take(u32::try_from(len).map_err(|_| NotAMessage)?)
    }

    fn take(&mut self, len: u32) -> Result<Span, NotAMessage> {
        let Span { start, end } = self.rest;
        if len > end - start {
            return Err(NotAMessage);
        }
        self.rest.start += len;
        Ok(Span {
            start,
            end: start + len,
        })
    }

    fn byte(&mut self) -> Result<u8, NotAMessage> {
        let byte = self.take(1)?;
        Ok(self.bytes[byte.start as usize])
    }

    /// Reads a number of at most 64 bits, 7 bits in each byte. Almost all numbers have one byte.
    #[inline]
    fn varint(&mut self) -> Result<u64, NotAMessage> {
        match self.byte()? {
            byte @ 0..0x80 => Ok(u64::from(byte)),
            byte => self.long_varint(byte),
        }
    }

    fn long_varint(&mut self, first: u8) -> Result<u64, NotAMessage> {
        let mut number = u64::from(first & 0x7f);
        for shift in (7..u64::BITS).step_by(7) {
            let byte = self.byte()?;
            if shift == 63 && byte > 1 {
                return Err(NotAMessage);
            }
            number |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Ok(number);
            }
        }
        Err(NotAMessage)
    }
}

/// Reads an entry of a `map<string, string>`.
fn read_entry(fields: &mut Fields<'_>) -> Result<(Span, Span), NotAMessage> {
    let (mut key, mut value) = (Span::default(), Span::default());
    while let Some(field) = fields.next()? {
        match field.number {
            1 => key = field.content()?,
            2 => value = field.content()?,
            _ => {}
        }
    }
    Ok((key, value))
}

fn push<const INLINE: usize>(pairs: &mut Pairs<INLINE>, pair: (Span, Span)) {
    if pairs.as_slice().len() < MAX_PAIRS {
        pairs.push(pair);
    }
}

#[cfg(test)]
pub(super) mod tests;
