//! The check that is sent: a request of Envoy, with a key of the keyring.

use ::relatch::proto::auth::CheckRequest;
use anyhow::{Context as _, Result, ensure};
use prost::Message as _;
use prost::encoding::{WireType, decode_key, decode_varint, encode_key, encode_varint};

use crate::keys::Keys;

/// A gRPC message in its frame: what a client sends as the body. All keys have one length, so that only their bytes
/// differ.
#[derive(Clone, Debug)]
pub(crate) struct CheckTemplate {
    framed: Vec<u8>,
    /// The position of the key.
    at: usize,
}

/// A request that Envoy 1.40 sent for a GET with twelve headers.
const RECORDED: &[u8] = include_bytes!("../../tests/data/check-request.grpc");
/// The length of the gRPC frame before a message, in bytes: one for the compression, four for the length.
pub(crate) const FRAME_LEN: usize = 5;
/// The placeholder for the key.
const NO_KEY: &[u8; Keys::LEN] = &[b'-'; Keys::LEN];
/// The path to the headers: `attributes`, `request`, `http`, `headers`.
const HEADERS: [u32; 4] = [1, 4, 2, 3];

impl CheckTemplate {
    /// The recorded request with a placeholder for a key in the header `x-api-key`. The route names no keyring, and the
    /// `traceparent` of the consumer is not sampled. Everything else is as Envoy sent it, in the same order.
    ///
    /// # Errors
    ///
    /// When the recording is not the expected request.
    pub(crate) fn recorded() -> Result<Self> {
        let message = rewritten(&RECORDED[FRAME_LEN..], &HEADERS, &|header| {
            let (name, value) = read_header(header)?;
            Ok(match name {
                b"x-api-key" => written_header(name, NO_KEY),
                b"traceparent" => {
                    let ids = value.strip_suffix(b"-01");
                    let ids = ids.context("the recorded traceparent is not sampled")?;
                    written_header(name, &[ids, b"-00"].concat())
                }
                _ => header.to_vec(),
            })
        })?;
        let mut framed = vec![0];
        framed.extend(u32::try_from(message.len())?.to_be_bytes());
        framed.extend(message);
        let at = framed
            .windows(Keys::LEN)
            .position(|window| window == NO_KEY)
            .context("the recorded request has no key")?;
        Ok(Self { framed, at })
    }

    /// The frame and the message, without a key.
    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.framed
    }

    /// The length of frame and message, in bytes.
    pub(crate) const fn framed_len(&self) -> usize {
        self.framed.len()
    }

    /// The length of the message, in bytes.
    pub(crate) const fn len(&self) -> usize {
        self.framed.len() - FRAME_LEN
    }

    /// Writes `key` into a copy of the bytes.
    pub(crate) fn present(&self, key: &[u8], copy: &mut [u8]) {
        copy[self.at..self.at + Keys::LEN].copy_from_slice(key);
    }

    /// The headers of the request with `key`, without pseudo-headers.
    ///
    /// # Errors
    ///
    /// When the message is not a `CheckRequest` of an HTTP request.
    pub(crate) fn headers(&self, key: &[u8]) -> Result<Vec<(String, String)>> {
        let framed = self.with(key);
        let request = CheckRequest::decode(&framed[FRAME_LEN..])?;
        let attributes = request.attributes.context("it has attributes")?;
        let http = attributes.request.and_then(|request| request.http);
        let headers = http
            .context("it is of an HTTP request")?
            .headers
            .into_iter();
        let pairs = headers.map(|header| {
            let text = |bytes| anyhow::Ok(str::from_utf8(bytes)?.to_owned());
            anyhow::Ok((text(&header.key)?, text(&header.value)?))
        });
        let all: Vec<_> = pairs.collect::<Result<_>>()?;
        let is_plain = |(name, _): &(String, String)| !name.starts_with(':');
        Ok(all.into_iter().filter(is_plain).collect())
    }

    /// Frame and message with `key`.
    pub(crate) fn with(&self, key: &[u8]) -> Vec<u8> {
        let mut copy = self.framed.clone();
        self.present(key, &mut copy);
        copy
    }
}

/// Returns the message with the fields at `path` replaced by the result of `edit`.
fn rewritten(
    mut rest: &[u8],
    path: &[u32],
    edit: &dyn Fn(&[u8]) -> Result<Vec<u8>>,
) -> Result<Vec<u8>> {
    let Some((wanted, path)) = path.split_first() else {
        return edit(rest);
    };
    let mut out = Vec::new();
    while !rest.is_empty() {
        let (field, wire_type) = decode_key(&mut rest)?;
        encode_key(field, wire_type, &mut out);
        match wire_type {
            WireType::Varint => encode_varint(decode_varint(&mut rest)?, &mut out),
            WireType::LengthDelimited => {
                let len = usize::try_from(decode_varint(&mut rest)?)?;
                let (value, tail) = rest.split_at_checked(len).context("a field is cut")?;
                rest = tail;
                let value = if field == *wanted {
                    rewritten(value, path, edit)?
                } else {
                    value.to_vec()
                };
                encode_varint(value.len() as u64, &mut out);
                out.extend(value);
            }
            WireType::SixtyFourBit
            | WireType::ThirtyTwoBit
            | WireType::StartGroup
            | WireType::EndGroup => anyhow::bail!("a field of another type than Envoy's"),
        }
    }
    Ok(out)
}

/// An entry of a map of texts: field 1 is the name, field 2 the value, both shorter than 128 bytes.
fn read_header(entry: &[u8]) -> Result<(&[u8], &[u8])> {
    let text = |entry: &mut &'_ [u8]| -> Result<usize> {
        let (_, wire_type) = decode_key(entry)?;
        ensure!(
            wire_type == WireType::LengthDelimited,
            "a header is no text"
        );
        Ok(usize::try_from(decode_varint(entry)?)?)
    };
    let mut rest = entry;
    let len = text(&mut rest)?;
    let (name, mut rest) = rest.split_at_checked(len).context("a header is cut")?;
    let len = text(&mut rest)?;
    Ok((name, rest.get(..len).context("a header is cut")?))
}

fn written_header(name: &[u8], value: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    for (field, text) in [(1, name), (2, value)] {
        encode_key(field, WireType::LengthDelimited, &mut out);
        encode_varint(text.len() as u64, &mut out);
        out.extend_from_slice(text);
    }
    out
}
