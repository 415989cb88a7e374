use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use super::*;
use crate::{
    clock::Clock,
    follow::receiver::Receiver,
    key::{KeyState, Timestamp, testing},
    keyring::{KeyringView, Keyrings, Staleness},
    proto::discovery::{ControlMessage, control_message::Kind},
    snapshot::{
        pulse::Confirmed,
        seal::Sealer,
        testing::{Act, Control, State, origin},
        write::{self, Change, ChangeKind},
    },
};

/// A small file, and the state after each of its appends; the first is the one that it was made with.
struct Sample {
    bytes: Vec<u8>,
    /// The plaintexts of its frames, each behind its kind and its length, as the fuzzer makes them up.
    plaintexts: Vec<u8>,
    /// Where each state is whole.
    ends: Vec<usize>,
    states: Vec<State>,
}

impl Sample {
    fn new() -> Self {
        let staleness = Staleness {
            warn_after: Duration::from_secs(30),
            deny_after: Duration::from_hours(1),
        };
        let keyrings = Keyrings::new([(testing::keyring_name(), staleness)]);
        let mut receiver = Receiver::new(&keyrings, Clock::system());
        let mut take = |messages: Vec<Kind>| {
            for kind in messages.clone() {
                let message = ControlMessage { kind: Some(kind) };
                receiver.receive(message).expect("the stream goes on");
            }
            let slot = keyrings.get(&testing::keyring_name());
            let view = slot.and_then(|slot| slot.load().as_ref().map(Arc::clone));
            (messages, view.expect("it has its keyring"))
        };
        let mut control = Control::new();
        control.act(Act::Put(1, KeyState::Active));
        control.act(Act::Put(2, KeyState::Revoked));
        let (_, view) = take(control.begin());

        let header = Header {
            node: "edge-1".to_owned(),
            cluster: "default".to_owned(),
            written_at: Timestamp::from_millis(5_000),
            origin: origin(),
        };
        let mut sealer = Sealer::new(&key(), &header).expect("the random source works");
        let mut bytes = Vec::new();
        let views: [&KeyringView; 1] = [&view];
        write::write(&mut bytes, &mut sealer, views, &pulse(0), 1).expect("memory takes it");
        let mut ends = vec![bytes.len()];
        let mut states = vec![State::of(&view)];
        for (number, act) in [
            Act::Put(3, KeyState::Pending),
            Act::RevokeAhead(1),
            Act::Remove(3),
        ]
        .into_iter()
        .enumerate()
        {
            let (messages, view) = take(control.act(act));
            let changes: Vec<_> = messages.into_iter().map(change).collect();
            let write = u64::try_from(number).expect("it is small") + 2;
            let frame = write::append(&mut sealer, &changes, &pulse(number + 1), write);
            bytes.extend_from_slice(&frame.expect("it is small"));
            ends.push(bytes.len());
            states.push(State::of(&view));
        }
        Self {
            plaintexts: plaintexts(&bytes),
            bytes,
            ends,
            states,
        }
    }
}

/// The seeds of the fuzzer: what its first byte says, and the rest.
fn corpus() -> [(PathBuf, Vec<u8>); 2] {
    let sample = Sample::new();
    let place = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus/snapshot_file");
    [
        (place.join("file"), [&[0], &sample.bytes[..]].concat()),
        (
            place.join("plaintexts"),
            [&[1], &sample.plaintexts[..]].concat(),
        ),
    ]
}

fn plaintexts(bytes: &[u8]) -> Vec<u8> {
    let mut opener = Opener::new(bytes, bytes.len() as u64, Some(&key())).expect("it is ours");
    let mut plaintexts = Vec::new();
    while let Next::Frame(kind, plaintext) = opener.next().expect("it is whole") {
        let len = u16::try_from(plaintext.len()).expect("it is small");
        plaintexts.push(kind as u8 - 1);
        plaintexts.extend_from_slice(&len.to_be_bytes());
        plaintexts.extend_from_slice(&plaintext);
    }
    plaintexts
}

fn key() -> SnapshotKey {
    SnapshotKey::new([7; SnapshotKey::LEN])
}

fn pulse(number: usize) -> Pulse {
    let wall = Timestamp::from_millis(1_000 * i64::try_from(number).expect("it is small"));
    let confirmed = Confirmed {
        wall,
        boot_ms: 1,
        serve_for: Duration::from_hours(1),
    };
    Pulse {
        latest_wall: wall,
        confirmed: [(testing::keyring_name(), confirmed)].into(),
    }
}

fn change(message: Kind) -> Change {
    let kind = match message {
        Kind::Delta(delta) => ChangeKind::Delta(delta),
        Kind::Revocations(revocations) => ChangeKind::Revocations(revocations),
        other => panic!("no change: {other:?}"),
    };
    Change {
        keyring: testing::keyring_name(),
        kind,
    }
}

fn read(bytes: &[u8]) -> Result<(State, Pulse, Tail), ReadError> {
    let mut contents = super::read(bytes, bytes.len() as u64, &key())?;
    let keyring = contents.keyrings.remove(&testing::keyring_name());
    let keyring = keyring.expect("it has the keyring");
    Ok((State::of(keyring.view()), contents.pulse, contents.tail))
}

#[test]
fn wherever_a_file_is_cut_it_is_refused_or_one_of_its_states() {
    let sample = Sample::new();
    let whole = sample.ends[0];
    for len in 0..=sample.bytes.len() {
        let read = read(&sample.bytes[..len]);
        if len < whole {
            let error = read.map(|(state, ..)| state).expect_err("its state is cut");
            let is_right = matches!(
                error,
                ReadError::Cut { .. } | ReadError::NoSnapshot | ReadError::Header
            );
            assert!(is_right, "{len}: {error}");
            continue;
        }
        let newest = sample.ends.iter().rposition(|end| *end <= len);
        let newest = newest.expect("the first state is whole");
        let is_torn = sample.ends[newest] != len;
        let tail = if is_torn { Tail::Torn } else { Tail::Whole };
        let (state, read_pulse, read_tail) = read.expect("its state is whole");
        assert_eq!(state, sample.states[newest], "{len}");
        assert_eq!((read_pulse, read_tail), (pulse(newest), tail), "{len}");
    }
}

#[test]
fn whichever_bit_is_flipped_no_other_state_comes_of_it() {
    let sample = Sample::new();
    let whole = sample.ends[0];
    let newest = sample.states.len() - 1;
    for bit in 0..sample.bytes.len() * 8 {
        let mut altered = sample.bytes.clone();
        altered[bit / 8] ^= 1 << (bit % 8);
        let Ok((state, read_pulse, tail)) = read(&altered) else {
            continue;
        };
        assert!(bit / 8 >= whole, "bit {bit} of the state is altered");
        assert_eq!(tail, Tail::Torn, "bit {bit}");
        let earlier =
            (0..newest).find(|at| sample.states[*at] == state && pulse(*at) == read_pulse);
        assert!(earlier.is_some(), "bit {bit} makes another state");
    }
}

#[test]
fn an_append_in_the_middle_is_not_left_out() {
    let sample = Sample::new();
    let (from, to) = (sample.ends[0], sample.ends[1]);
    let cut = [&sample.bytes[..from], &sample.bytes[to..]].concat();
    let error = read(&cut).map(|_| ()).expect_err("a frame is missing");
    assert!(matches!(error, ReadError::Altered { .. }), "{error}");
}

/// A file of the frames of the sample, changed by `change`.
fn resealed(change: impl FnOnce(&mut Vec<(FrameKind, Vec<u8>)>)) -> Vec<u8> {
    let sample = Sample::new();
    let len = sample.bytes.len() as u64;
    let opener = Opener::new(&sample.bytes[..], len, Some(&key()));
    let mut opener = opener.expect("it is ours");
    let mut frames = Vec::new();
    while let Next::Frame(kind, plaintext) = opener.next().expect("it is whole") {
        frames.push((kind, plaintext));
    }
    change(&mut frames);
    let sealer = Sealer::new(&key(), opener.header());
    let mut sealer = sealer.expect("the random source works");
    let mut file = sealer.preamble().to_vec();
    for (kind, plaintext) in frames {
        sealer.seal(kind, &plaintext, &mut file);
    }
    file
}

/// Changes the message in a frame.
fn alter<M: Message + Default>(frame: &mut (FrameKind, Vec<u8>), change: impl FnOnce(&mut M)) {
    let mut message = M::decode(&frame.1[..]).expect("it is one");
    change(&mut message);
    frame.1 = message.encode_to_vec();
}

#[test]
fn what_makes_no_sense_behind_the_seal_is_refused() {
    type Frames = Vec<(FrameKind, Vec<u8>)>;
    type Case = (&'static str, fn(&mut Frames));
    let cases: [Case; 11] = [
        ("do not match its digest", |frames| {
            alter::<snapshot::Keyring>(&mut frames[0], |keyring| keyring.set_digest ^= 1);
        }),
        ("has 2 entries, but should have 3", |frames| {
            alter::<snapshot::Keyring>(&mut frames[0], |keyring| keyring.entries += 1);
        }),
        ("has 1 entries, but should have 2", |frames| {
            alter::<snapshot::Entries>(&mut frames[1], |chunk| drop(chunk.entries.pop()));
        }),
        ("entries come before their keyring", |frames| {
            frames.swap(0, 1);
        }),
        ("begins twice", |frames| {
            let again = [frames[0].clone(), frames[1].clone()];
            frames.splice(2..2, again);
        }),
        ("it has 1 keyrings, but should have 2", |frames| {
            alter::<snapshot::End>(&mut frames[2], |end| end.keyrings = 2);
        }),
        ("its times are missing or damaged", |frames| {
            alter::<snapshot::Appended>(&mut frames[3], |appended| appended.pulse = None);
        }),
        ("it is write 0", |frames| {
            alter::<snapshot::End>(&mut frames[2], |end| end.write = 0);
        }),
        ("it is write 2, but comes after write 2", |frames| {
            alter::<snapshot::Appended>(&mut frames[4], |appended| appended.write = 2);
        }),
        ("the state continues after its end", |frames| {
            let again = frames[1].clone();
            frames.push(again);
        }),
        ("but the keyring is at revision", |frames| {
            frames.remove(3);
        }),
    ];
    for (problem, change) in cases {
        let error = read(&resealed(change)).map(|_| ()).expect_err(problem);
        let is_right = matches!(error, ReadError::Contradiction { .. });
        assert!(is_right && error.to_string().contains(problem), "{error}");
    }
    assert!(read(&resealed(|_| {})).is_ok());
}

#[test]
fn an_outline_needs_no_key_and_tells_no_secret() {
    let sample = Sample::new();
    let len = sample.bytes.len();
    let outline = outline(&sample.bytes[..], len as u64).expect("it is whole");
    assert_eq!(outline.header.node, "edge-1");
    // A keyring, its entries, the end, three appends.
    assert_eq!((outline.frames, outline.tail), (6, Tail::Whole));
    let outline = super::outline(&sample.bytes[..len - 1], len as u64 - 1).expect("it is torn");
    assert_eq!((outline.frames, outline.tail), (5, Tail::Torn));
    let pepper = testing::pepper();
    let holds = |needle: &[u8]| {
        sample
            .bytes
            .windows(needle.len())
            .any(|part| part == needle)
    };
    assert!(!holds(pepper.expose()));
    assert!(!holds(testing::keyring_name().as_str().as_bytes()));
}

#[test]
fn the_corpus_of_the_fuzzer_is_of_this_format() {
    let [(file, _), (plaintexts, made)] = corpus();
    let kept = fs::read(plaintexts).expect("it is in the repository");
    assert!(kept == made, "make the corpus anew: see the test below");
    let kept = fs::read(file).expect("it is in the repository");
    let (state, ..) = read(&kept[1..]).expect("it is whole");
    assert_eq!(Some(&state), Sample::new().states.last());
}

#[test]
#[ignore = "writes the corpus: run it when the format has changed"]
fn the_corpus_of_the_fuzzer_is_made() {
    for (path, bytes) in corpus() {
        fs::write(path, bytes).expect("it is ours");
    }
}
