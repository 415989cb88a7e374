//! Compares the decoder with the generated one, on arbitrary messages and on arbitrarily damaged
//! ones.

use bytes::Bytes;
use proptest::{collection::vec, option, prelude::*};
use prost::Message as _;

use super::*;
use crate::proto::auth::{
    Address, AttributeContext, CheckRequest, Entry, HeaderMap, HttpRequest, Peer, RawHeader,
    Request, SocketAddress,
};

pub(in crate::authz) type Owned = Vec<(Vec<u8>, Vec<u8>)>;

/// The fields that are read from a message.
#[derive(Debug, Default, PartialEq, Eq)]
pub(in crate::authz) struct Seen {
    has_http: bool,
    method: Vec<u8>,
    path: Vec<u8>,
    host: Vec<u8>,
    source: Vec<u8>,
    headers: Owned,
    joined: usize,
    has_two_values: bool,
    extensions: Owned,
}

pub(in crate::authz) fn by_hand(bytes: &[u8]) -> Option<Seen> {
    let owned = |pairs: &mut dyn Iterator<Item = (&[u8], &[u8])>| -> Owned {
        pairs
            .map(|(name, value)| (name.to_vec(), value.to_vec()))
            .collect()
    };
    let message = Message::read(bytes).ok()?;
    Some(Seen {
        has_http: message.has_http,
        method: message.method.to_vec(),
        path: message.path.to_vec(),
        host: message.host.to_vec(),
        source: message.source.to_vec(),
        headers: sorted(owned(&mut message.headers())),
        joined: message.joined,
        has_two_values: message.has_two_values,
        extensions: owned(&mut message.extensions()),
    })
}

/// The decoder has the headers of both encodings in one list, as they came; the generated code has two.
fn sorted(mut pairs: Owned) -> Owned {
    pairs.sort_unstable();
    pairs
}

fn generated(bytes: &[u8]) -> Option<Seen> {
    let entries = |entries: Vec<Entry>| -> Owned {
        let entries = entries.into_iter();
        entries
            .map(|entry| (entry.key.into(), entry.value.into()))
            .collect()
    };
    let attributes = CheckRequest::decode(bytes)
        .ok()?
        .attributes
        .unwrap_or_default();
    let source = attributes
        .source
        .and_then(|peer| peer.address)
        .and_then(|address| address.socket_address)
        .map_or_else(Vec::new, |socket| socket.address.into());
    let http = attributes.request.and_then(|request| request.http);
    let has_http = http.is_some();
    let http = http.unwrap_or_default();
    let raw = http.header_map.unwrap_or_default().headers;
    let differs = |header: &RawHeader| {
        let is_both = !header.value.is_empty() && !header.raw_value.is_empty();
        is_both && header.value != header.raw_value
    };
    let has_two_values = raw.iter().any(differs);
    let joined = http.headers.len();
    let mut headers = entries(http.headers);
    headers.extend(raw.into_iter().map(|header| {
        let is_raw = !header.raw_value.is_empty();
        let value = if is_raw {
            header.raw_value
        } else {
            header.value
        };
        (header.key.into(), value.into())
    }));
    Some(Seen {
        has_http,
        method: http.method.into(),
        path: http.path.into(),
        host: http.host.into(),
        source,
        headers: sorted(headers),
        joined,
        has_two_values,
        extensions: entries(attributes.context_extensions),
    })
}

/// The parts of a header in `header_map`: key, value, raw value.
pub(in crate::authz) type RawParts = (Bytes, Bytes, Bytes);
/// Method, path, host, `headers`, `header_map`.
pub(in crate::authz) type HttpParts = (
    Bytes,
    Bytes,
    Bytes,
    Vec<(Bytes, Bytes)>,
    Option<Vec<RawParts>>,
);
/// The parts of a request, which print where the messages themselves do not: source, HTTP, context extensions.
pub(in crate::authz) type Parts = Option<(
    Option<Option<Option<Bytes>>>,
    Option<Option<HttpParts>>,
    Vec<(Bytes, Bytes)>,
)>;

fn text() -> impl Strategy<Value = Bytes> {
    prop_oneof![
        "[a-z0-9/=?-]{0,12}".prop_map(Bytes::from),
        vec(any::<u8>(), 0..6).prop_map(Bytes::from),
        // Around 128, from which a length needs two bytes.
        (120_usize..140).prop_map(|len| "x".repeat(len).into()),
    ]
}

pub(in crate::authz) fn parts() -> impl Strategy<Value = Parts> {
    let pairs = || vec((text(), text()), 0..4);
    let raw = option::of(vec((text(), text(), text()), 0..4));
    let http = option::of(option::of((text(), text(), text(), pairs(), raw)));
    let source = option::of(option::of(option::of(text())));
    option::of((source, http, pairs()))
}

pub(in crate::authz) fn encoded(parts: Parts) -> Vec<u8> {
    let entries = |pairs: Vec<(Bytes, Bytes)>| -> Vec<Entry> {
        let pairs = pairs.into_iter();
        pairs.map(|(key, value)| Entry { key, value }).collect()
    };
    let raw_header = |(key, value, raw_value)| RawHeader {
        key,
        value,
        raw_value,
    };
    let header_map = |headers: Vec<RawParts>| HeaderMap {
        headers: headers.into_iter().map(raw_header).collect(),
    };
    let attributes = parts.map(|(source, http, extensions)| AttributeContext {
        source: source.map(|address| Peer {
            address: address.map(|socket| Address {
                socket_address: socket.map(|address| SocketAddress { address }),
            }),
        }),
        request: http.map(|http| Request {
            http: http.map(|(method, path, host, headers, raw)| HttpRequest {
                method,
                headers: entries(headers),
                path,
                host,
                header_map: raw.map(header_map),
            }),
        }),
        context_extensions: entries(extensions),
    });
    CheckRequest { attributes }.encode_to_vec()
}

/// A damage to the bytes of a message.
#[derive(Clone, Debug)]
pub(in crate::authz) enum Damage {
    Set(usize, u8),
    Insert(usize, Vec<u8>),
    Remove(usize, usize),
    /// A range of bytes is repeated at another place.
    Repeat(usize, usize, usize),
}

pub(in crate::authz) fn damage() -> impl Strategy<Value = Damage> {
    // Keys of fields and groups, and lengths, reveal more differences than other bytes.
    let byte = prop_oneof![
        3 => any::<u8>(),
        3 => (1_u8..15, 0_u8..8).prop_map(|(number, kind)| number << 3 | kind),
        1 => 0_u8..8,
        1 => Just(0xff),
    ];
    let bytes = vec(byte.clone(), 1..12);
    prop_oneof![
        (any::<usize>(), byte).prop_map(|(at, byte)| Damage::Set(at, byte)),
        (any::<usize>(), bytes).prop_map(|(at, bytes)| Damage::Insert(at, bytes)),
        (any::<usize>(), 1_usize..9).prop_map(|(at, len)| Damage::Remove(at, len)),
        (any::<usize>(), any::<usize>(), 1_usize..60)
            .prop_map(|(from, to, len)| Damage::Repeat(from, to, len)),
    ]
}

impl Damage {
    pub(in crate::authz) fn befall(self, bytes: &mut Vec<u8>) {
        let within = |at: usize, bytes: &[u8]| at % (bytes.len() + 1);
        match self {
            Self::Set(at, byte) => {
                let at = within(at, bytes);
                if let Some(hit) = bytes.get_mut(at) {
                    *hit = byte;
                }
            }
            Self::Insert(at, more) => {
                let at = within(at, bytes);
                bytes.splice(at..at, more);
            }
            Self::Remove(at, len) => {
                let at = within(at, bytes);
                let end = (at + len).min(bytes.len());
                bytes.drain(at..end);
            }
            Self::Repeat(from, to, len) => {
                let (from, to) = (within(from, bytes), within(to, bytes));
                let part = bytes[from..(from + len).min(bytes.len())].to_vec();
                bytes.splice(to..to, part);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4_000))]

    #[test]
    fn a_message_reads_as_the_generated_code_reads_it(parts in parts()) {
        let bytes = encoded(parts);
        let seen = by_hand(&bytes);
        prop_assert!(seen.is_some());
        prop_assert_eq!(seen, generated(&bytes));
    }

    #[test]
    fn messages_that_follow_each_other_are_merged_as_by_the_generated_code(
        first in parts(),
        second in parts(),
    ) {
        let bytes = [encoded(first), encoded(second)].concat();
        prop_assert_eq!(by_hand(&bytes), generated(&bytes));
    }

    #[test]
    fn a_damaged_message_reads_as_the_generated_code_reads_it(
        parts in parts(),
        damages in vec(damage(), 1..5),
    ) {
        let mut bytes = encoded(parts);
        for damage in damages {
            damage.befall(&mut bytes);
        }
        prop_assert_eq!(by_hand(&bytes), generated(&bytes));
    }
}

#[test]
fn groups_are_skipped_to_the_depth_that_the_generated_code_allows() {
    // Field 7 of the outermost message, and the same within an HTTP request.
    let nested = |depth: usize| [vec![0x3b; depth], vec![0x3c; depth]].concat();
    let wrapped = |inner: &[u8]| {
        let mut bytes = inner.to_vec();
        for key in [0x12, 0x22, 0x0a] {
            let mut outer = vec![key];
            prost::encoding::encode_varint(bytes.len() as u64, &mut outer);
            outer.extend_from_slice(&bytes);
            bytes = outer;
        }
        bytes
    };
    let mut refused = 0;
    for depth in 90..110 {
        for bytes in [nested(depth), wrapped(&nested(depth))] {
            assert_eq!(by_hand(&bytes), generated(&bytes), "at depth {depth}");
            refused += usize::from(by_hand(&bytes).is_none());
        }
    }
    assert!((1..40).contains(&refused), "the limit lies outside");
}

#[test]
fn what_is_kept_is_bounded() {
    let entry = Entry {
        key: "a".into(),
        value: "b".into(),
    };
    let with = |count| {
        let context_extensions = vec![entry.clone(); count];
        let attributes = Some(AttributeContext {
            context_extensions,
            ..AttributeContext::default()
        });
        CheckRequest { attributes }.encode_to_vec()
    };
    for (count, kept) in [(3, 3), (MAX_PAIRS, MAX_PAIRS), (MAX_PAIRS + 1, MAX_PAIRS)] {
        let bytes = with(count);
        let message = Message::read(&bytes).expect("a message");
        assert_eq!(message.extensions().len(), kept);
    }
}

/// The tenth byte of a number may have only one bit.
#[test]
fn numbers_are_read_as_far_as_the_generated_code_reads_them() {
    for len in 1..=11 {
        for last in 0..=u8::MAX {
            // An unknown field whose value is a number of `len` bytes.
            let mut bytes = vec![15 << 3];
            bytes.extend(std::iter::repeat_n(0x80, len - 1));
            bytes.push(last);
            let read = (by_hand(&bytes), generated(&bytes));
            assert_eq!(read.0, read.1, "{len} bytes, the last of them {last:#x}");
        }
    }
}
