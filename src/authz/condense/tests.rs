use proptest::{collection::vec, prelude::*};
use prost::Message as _;

use super::*;
use crate::authz::{
    message::tests::{by_hand, damage, encoded, parts},
    testing::Message,
};

/// Reads a message in pieces of the given sizes, over and over.
fn condensed(message: &[u8], sizes: &[usize]) -> Result<Bytes, RequestError> {
    let mut condenser = Condenser::new(message.len());
    let mut rest = message;
    for size in sizes.iter().cycle() {
        if rest.is_empty() {
            break;
        }
        let (piece, later) = rest.split_at((*size).min(rest.len()));
        condenser.push(piece);
        rest = later;
    }
    assert!(condenser.is_complete());
    condenser.finish()
}

/// Encodes a field with a length.
fn field(number: u64, content: &[u8]) -> Vec<u8> {
    let mut field = Vec::new();
    encode_varint(number << 3 | 2, &mut field);
    encode_varint(content.len() as u64, &mut field);
    field.extend_from_slice(content);
    field
}

/// Encodes a check with a body, which stands before the raw headers, as in Envoy's own order.
fn with_body(number: u64, body: &[u8]) -> Vec<u8> {
    let http = [
        field(2, b"POST"),
        field(4, b"/upload"),
        field(number, body),
        field(
            13,
            &field(1, &[field(1, b"x-api-key"), field(3, b"K")].concat()),
        ),
    ];
    let request = field(4, &field(2, &http.concat()));
    let extensions = field(10, &[field(1, b"relatch.keyring"), field(2, b"a")].concat());
    field(1, &[request, extensions].concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn a_condensed_message_reads_as_the_whole_one(
        parts in parts(),
        sizes in vec(1_usize..40, 1..5),
    ) {
        let message = encoded(parts);
        let condensed = condensed(&message, &sizes).expect("a valid message");
        prop_assert_eq!(by_hand(&condensed), by_hand(&message));
    }

    #[test]
    fn a_damaged_message_is_refused_or_reads_as_the_whole_one(
        parts in parts(),
        damages in vec(damage(), 1..5),
        sizes in vec(1_usize..40, 1..5),
    ) {
        let mut message = encoded(parts);
        for damage in damages {
            damage.befall(&mut message);
        }
        if let Ok(condensed) = condensed(&message, &sizes) {
            prop_assert_eq!(by_hand(&condensed), by_hand(&message));
        }
    }
}

#[test]
fn the_body_is_skipped_whatever_its_size() {
    let body = vec![0xff; 3 * MAX_KEPT];
    for number in [11, 12] {
        let condensed = condensed(&with_body(number, &body), &[16 << 10]).expect("a message");
        assert_eq!(by_hand(&condensed), by_hand(&with_body(number, b"")));
        assert!(condensed.len() < 200, "{} bytes", condensed.len());
    }
}

#[test]
fn what_is_kept_is_bounded() {
    let with = |size| Message::get("/").header("a", "b".repeat(size)).joined();
    let around = with(0).encoded_len() + 32;
    let fits = with(MAX_KEPT - around).encode_to_vec();
    assert!(condensed(&fits, &[1_000]).is_ok());
    for size in [MAX_KEPT, 4 * MAX_KEPT] {
        let condensed = condensed(&with(size).encode_to_vec(), &[1_000]);
        assert_eq!(condensed, Err(RequestError::TooLarge));
    }
    let many = (0..MAX_KEPT / 2).fold(Message::get("/"), |message, _| message.header("", ""));
    let condensed = condensed(&many.raw().encode_to_vec(), &[1_000]);
    assert_eq!(condensed, Err(RequestError::TooLarge));
}

#[test]
fn what_ends_within_a_field_is_refused() {
    let whole = with_body(11, b"body");
    for end in 1..whole.len() {
        let condensed = condensed(&whole[..end], &[1]);
        assert_eq!(condensed, Err(NotAMessage.into()), "cut at {end}");
    }
}

#[test]
fn what_follows_the_message_is_ignored() {
    let message = with_body(11, b"body");
    let mut condenser = Condenser::new(message.len());
    condenser.push(&[&message[..], b"more"].concat());
    condenser.push(b"and more");
    let kept = condenser.finish().expect("a message");
    assert_eq!(by_hand(&kept), by_hand(&message));
}
