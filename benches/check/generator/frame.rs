//! Frames of HTTP/2 (RFC 9113) and field blocks of HPACK (RFC 7541), as far as a client of one call needs them.

use anyhow::{Context as _, Result, ensure};

/// The preface of a connection (section 3.4).
pub(crate) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// The length of a frame's head (section 4.1).
pub(crate) const HEAD_LEN: usize = 9;

/// The flag on DATA and HEADERS for the end of the stream.
pub(crate) const END_STREAM: u8 = 0x1;
/// The flag on HEADERS for a complete field block.
pub(crate) const END_HEADERS: u8 = 0x4;
/// The flag on DATA and HEADERS for padding, which no server here sends.
pub(crate) const PADDED: u8 = 0x8;
/// The flag on SETTINGS and PING for an answer.
pub(crate) const ACK: u8 = 0x1;

/// The types of frames (section 6).
pub(crate) mod kind {
    pub(crate) const DATA: u8 = 0x0;
    pub(crate) const HEADERS: u8 = 0x1;
    pub(crate) const RST_STREAM: u8 = 0x3;
    pub(crate) const SETTINGS: u8 = 0x4;
    pub(crate) const PUSH_PROMISE: u8 = 0x5;
    pub(crate) const PING: u8 = 0x6;
    pub(crate) const GOAWAY: u8 = 0x7;
    pub(crate) const WINDOW_UPDATE: u8 = 0x8;
    pub(crate) const CONTINUATION: u8 = 0x9;
}

/// The head of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Head {
    /// The length of the payload, in bytes.
    pub(crate) len: usize,
    pub(crate) kind: u8,
    pub(crate) flags: u8,
    pub(crate) stream: u32,
}

/// A field block with the same names in every request. The first one on a connection adds its fields to the dynamic table,
/// as clients do; the others refer to these entries.
#[derive(Clone, Debug)]
pub(crate) struct FieldBlock {
    first: Vec<u8>,
    later: Vec<u8>,
}

/// The name of a field.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Name {
    /// An entry of the static table (RFC 7541, appendix A).
    Static(u8),
    Text(&'static str),
}

impl Name {
    pub(crate) const AUTHORITY: Self = Self::Static(1);
    pub(crate) const PATH: Self = Self::Static(4);
    pub(crate) const ACCEPT: Self = Self::Static(19);
    pub(crate) const CONTENT_TYPE: Self = Self::Static(31);
    pub(crate) const USER_AGENT: Self = Self::Static(58);
}

/// Fields whose name and value are in the static table.
pub(crate) const METHOD_GET: u8 = 0x82;
pub(crate) const METHOD_POST: u8 = 0x83;
pub(crate) const SCHEME_HTTP: u8 = 0x86;
const STATUS_200: u8 = 0x88;
/// The last entry of the static table.
const STATIC_ENTRIES: usize = 61;

impl Head {
    /// Reads the head of a frame.
    pub(crate) fn read(bytes: &[u8; HEAD_LEN]) -> Self {
        let [high, middle, low, kind, flags, stream @ ..] = *bytes;
        Self {
            len: usize::from(high) << 16 | usize::from(middle) << 8 | usize::from(low),
            kind,
            flags,
            stream: u32::from_be_bytes(stream) & 0x7fff_ffff,
        }
    }

    pub(crate) const fn has(self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}

impl FieldBlock {
    /// `statics` are entries of the static table; `fields` are added to the dynamic table.
    pub(crate) fn new(statics: &[u8], fields: &[(Name, &str)]) -> Self {
        let mut first = statics.to_vec();
        for (name, value) in fields {
            literal(0x40, 0x3f, *name, value.as_bytes(), &mut first);
        }
        let mut later = statics.to_vec();
        // The newest entry is the first.
        for back in (0..fields.len()).rev() {
            let index = u8::try_from(STATIC_ENTRIES + 1 + back).expect("a request has few fields");
            later.push(0x80 | index);
        }
        Self { first, later }
    }

    /// The block for a request on a connection.
    pub(crate) fn bytes(&self, is_first: bool) -> &[u8] {
        if is_first { &self.first } else { &self.later }
    }
}

/// Writes a frame with `payload`.
pub(crate) fn write(out: &mut Vec<u8>, kind: u8, flags: u8, stream: u32, payload: &[u8]) {
    let length = u32::try_from(payload.len()).expect("frames here are small");
    out.extend_from_slice(&length.to_be_bytes()[1..]);
    out.extend_from_slice(&[kind, flags]);
    out.extend_from_slice(&stream.to_be_bytes());
    out.extend_from_slice(payload);
}

/// Writes a field that is not added to the dynamic table.
pub(crate) fn field(name: &'static str, value: &[u8], out: &mut Vec<u8>) {
    literal(0x00, 0x0f, Name::Text(name), value, out);
}

/// Whether the first field of a response is `:status: 200`, which every encoder writes as that entry of the static
/// table.
///
/// # Errors
///
/// When the block is empty.
pub(crate) fn is_ok(block: &[u8]) -> Result<bool> {
    let mut rest = block;
    // The size of the dynamic table may be set first (RFC 7541, section 6.3).
    while let [first @ 0x20..=0x3f, tail @ ..] = rest {
        rest = tail;
        if first & 0x1f == 0x1f {
            let end = rest.iter().position(|byte| byte & 0x80 == 0);
            rest = &rest[end.context("the field block is cut")? + 1..];
        }
    }
    ensure!(!rest.is_empty(), "the field block is empty");
    Ok(rest[0] == STATUS_200)
}

/// A literal field (RFC 7541, section 6.2), without Huffman coding.
fn literal(pattern: u8, mask: u8, name: Name, value: &[u8], out: &mut Vec<u8>) {
    match name {
        Name::Static(index) => integer(pattern, mask, usize::from(index), out),
        Name::Text(text) => {
            out.push(pattern);
            integer(0x00, 0x7f, text.len(), out);
            out.extend_from_slice(text.as_bytes());
        }
    }
    integer(0x00, 0x7f, value.len(), out);
    out.extend_from_slice(value);
}

/// An integer with a prefix (RFC 7541, section 5.1).
fn integer(pattern: u8, mask: u8, value: usize, out: &mut Vec<u8>) {
    match u8::try_from(value) {
        Ok(small) if small < mask => out.push(pattern | small),
        Ok(_) | Err(_) => {
            out.push(pattern | mask);
            let mut rest = value - usize::from(mask);
            while rest >= 0x80 {
                out.push(0x80 | u8::try_from(rest & 0x7f).expect("seven bits"));
                rest >>= 7;
            }
            out.push(u8::try_from(rest).expect("seven bits"));
        }
    }
}
