use super::*;
use crate::snapshot::testing::origin;

/// Frames of different lengths and kinds.
const FRAMES: [(FrameKind, &[u8]); 4] = [
    (FrameKind::Keyring, b"one"),
    (FrameKind::Entries, b"the second one"),
    (FrameKind::Entries, b"the third"),
    (FrameKind::End, b""),
];

fn key() -> SnapshotKey {
    SnapshotKey::new([7; SnapshotKey::LEN])
}

fn header() -> Header {
    Header {
        node: "edge-1".to_owned(),
        cluster: "default".to_owned(),
        written_at: Timestamp::from_millis(5_000),
        origin: origin(),
    }
}

/// The preamble of a file, and its frames.
fn file() -> (Vec<u8>, Vec<Vec<u8>>) {
    let mut sealer = Sealer::new(&key(), &header()).expect("the random source works");
    let frames = FRAMES.iter().map(|(kind, plaintext)| {
        let mut frame = Vec::new();
        sealer.seal(*kind, plaintext, &mut frame);
        frame
    });
    let frames = frames.collect();
    (sealer.preamble().to_vec(), frames)
}

/// How many frames of `bytes` open, one after the other, and how it ends.
fn open(bytes: &[u8]) -> (usize, Result<Next, ReadError>) {
    let opener = Opener::new(bytes, bytes.len() as u64, Some(&key()));
    let mut opener = match opener {
        Ok(opener) => opener,
        Err(error) => return (0, Err(error)),
    };
    assert_eq!(*opener.header(), header());
    let mut count = 0;
    loop {
        match opener.next() {
            Ok(Next::Frame(kind, plaintext)) => {
                assert_eq!((kind, &plaintext[..]), FRAMES[count]);
                count += 1;
            }
            end => return (count, end),
        }
    }
}

#[test]
fn what_was_sealed_is_opened() {
    let (preamble, frames) = file();
    let (opened, end) = open(&[preamble, frames.concat()].concat());
    assert_eq!(opened, FRAMES.len());
    assert!(matches!(end, Ok(Next::End)), "{end:?}");
}

#[test]
fn two_files_of_the_same_have_nothing_in_common() {
    let (one, other) = (file(), file());
    assert_ne!(one.0, other.0);
    for (one, other) in one.1.iter().zip(&other.1) {
        assert_ne!(one[FRAME_HEAD_LEN..], other[FRAME_HEAD_LEN..]);
    }
    let again = [one.0, other.1.concat()].concat();
    let (opened, end) = open(&again);
    assert_eq!(opened, 0);
    assert!(
        matches!(end, Err(ReadError::Altered { frame: 0 })),
        "{end:?}"
    );
}

#[test]
fn frames_are_neither_reordered_nor_repeated_nor_left_out() {
    let (preamble, frames) = file();
    for order in [
        &[1, 0, 2, 3][..],
        &[0, 2, 1, 3],
        &[0, 2, 3],
        &[0, 1, 1, 3],
        &[0, 0, 1, 2, 3],
        &[1, 2, 3],
    ] {
        let reordered = order.iter().map(|at| frames[*at].clone());
        let reordered = [preamble.clone(), reordered.collect::<Vec<_>>().concat()].concat();
        let right = order.iter().zip(0..).take_while(|(at, is)| **at == *is);
        let (opened, end) = open(&reordered);
        assert_eq!(opened, right.count(), "{order:?}");
        let is_refused = matches!(end, Err(ReadError::Altered { .. }));
        assert!(is_refused, "{order:?}: {end:?}");
    }
}

#[test]
fn a_frame_is_not_taken_for_one_of_another_kind() {
    let (preamble, mut frames) = file();
    frames[1][0] = FrameKind::Appended as u8;
    let (opened, end) = open(&[preamble, frames.concat()].concat());
    assert_eq!(opened, 1);
    assert!(
        matches!(end, Err(ReadError::Altered { frame: 1 })),
        "{end:?}"
    );
}

#[test]
fn what_a_loss_of_power_leaves_at_the_end_is_no_alteration() {
    let (preamble, frames) = file();
    let whole = [preamble, frames.concat()].concat();
    for zeros in [1, 4, 5, 6, 100, 10_000] {
        let (opened, end) = open(&[whole.clone(), vec![0; zeros]].concat());
        assert_eq!(opened, FRAMES.len());
        assert!(matches!(end, Ok(Next::Torn)), "{zeros}: {end:?}");
    }
    let mut other = [whole, vec![0; 10_000]].concat();
    *other.last_mut().expect("it is long") = 1;
    assert!(matches!(open(&other).1, Err(ReadError::Altered { .. })));
}

#[test]
fn a_header_that_says_something_else_opens_nothing() {
    let (preamble, frames) = file();
    let whole = [preamble.clone(), frames.concat()].concat();
    for bit in 0..preamble.len() * 8 {
        let mut altered = whole.clone();
        altered[bit / 8] ^= 1 << (bit % 8);
        let opener = Opener::new(&altered[..], altered.len() as u64, Some(&key()));
        let Ok(mut opener) = opener else { continue };
        let end = opener.next();
        assert!(
            matches!(end, Err(ReadError::Altered { frame: 0 })),
            "bit {bit}: {end:?}"
        );
    }
}

#[test]
fn without_the_key_frames_are_counted_and_stay_closed() {
    let (preamble, frames) = file();
    let whole = [preamble, frames.concat()].concat();
    let mut opener = Opener::new(&whole[..], whole.len() as u64, None).expect("a header");
    while let Next::Frame(_, plaintext) = opener.next().expect("frames") {
        assert!(plaintext.is_empty());
    }
    assert_eq!(opener.frames(), FRAMES.len() as u64);
    let text = String::from_utf8_lossy(&whole);
    assert!(
        text.contains("edge-1") && !text.contains("second"),
        "{text}"
    );
}
