//! Micro-benchmarks of the steps of a check, of a change, and of a snapshot file.
//!
//! `cargo bench --bench micro` measures them; `cargo test --benches` runs each one once.

mod held;

use std::{collections::BTreeMap, hint::black_box};

use bytes::BytesMut;
use divan::Bencher;
use prost::Message as _;
use relatch::authz::Metadata;
use relatch::{
    authz::request::CheckInput,
    key::Timestamp,
    keyring::KeyringView,
    proto::auth::CheckRequest,
    snapshot::{
        SnapshotKey,
        origin::{FileId, Inode, Origin},
        pulse::Pulse,
        read,
        seal::{Header, Sealer},
        write,
    },
};

use held::{Held, OnDemand, RECORDED, STRIDE, assert_allowed, digest_of, pepper, secret};

const SIZES: [u64; 2] = [1_000, 1_000_000];

fn main() {
    divan::main();
}

/// Reads the fields of a request, within bounds.
#[divan::bench]
fn read_request(bencher: Bencher<'_, '_>) {
    bencher.bench(|| CheckInput::read(black_box(&RECORDED[5..])).is_ok());
}

/// Reads the same with the generated code.
#[divan::bench]
fn decode_request(bencher: Bencher<'_, '_>) {
    let message = bytes::Bytes::from_static(&RECORDED[5..]);
    bencher.bench(|| CheckRequest::decode(black_box(message.clone())));
}

#[divan::bench]
fn digest(bencher: Bencher<'_, '_>) {
    let (pepper, secret) = (pepper(), secret());
    bencher.bench(|| pepper.digest(black_box(&secret.presented())));
}

/// Finds digests that are spread over the whole keyring, so that a large one does not fit into the cache of the processor.
#[divan::bench(args = SIZES)]
fn lookup(bencher: Bencher<'_, '_>, keys: u64) {
    let held = Held::new(keys);
    let slot = held.mirror.slot();
    let mut number = 0;
    bencher
        .with_inputs(|| {
            number = (number + STRIDE) % keys;
            digest_of(number)
        })
        .bench_local_refs(|digest| {
            let view = slot.load();
            let view = view.as_ref().expect("a snapshot was taken");
            view.lookup(black_box(digest)).is_some()
        });
}

/// Computes the digest of a secret, and finds its version in the cache of a keyring on demand.
#[divan::bench(args = [1_000, 50_000])]
fn find_on_demand(bencher: Bencher<'_, '_>, keys: usize) {
    let held = OnDemand::new(keys);
    let peppers = [pepper()];
    let mut number = 0;
    bencher.bench_local(|| {
        number = (number + 7_919) % keys;
        held.finds(black_box(number), &peppers)
    });
}

/// A whole check, from the bytes of the request to the bytes of the response, with metrics and without spans.
#[divan::bench(args = SIZES)]
fn answer(bencher: Bencher<'_, '_>, keys: u64) {
    let held = Held::new(keys);
    let authorizer = held.authorizer();
    let message = held.request();
    let mut answer = BytesMut::with_capacity(4 << 10);
    assert!(
        authorizer
            .answer(Ok(&message), Metadata::default(), &mut answer)
            .is_none()
    );
    assert_allowed(&answer);
    bencher.bench_local(|| {
        answer.clear();
        let later = authorizer.answer(Ok(black_box(&message)), Metadata::default(), &mut answer);
        (later.is_none(), answer.len())
    });
}

/// Changes the state of one version, and publishes the new view.
#[divan::bench(args = SIZES)]
fn apply_delta_of_one(bencher: Bencher<'_, '_>, keys: u64) {
    let mut held = Held::new(keys);
    bencher.bench_local(|| held.change());
}

/// Writes a whole keyring into a snapshot file in memory.
#[divan::bench(args = SIZES, sample_count = 10)]
fn write_snapshot(bencher: Bencher<'_, '_>, keys: u64) {
    let held = Held::new(keys);
    let view = held.mirror.slot().load();
    let view = view.as_deref().expect("a snapshot was taken");
    bencher.bench_local(|| snapshot_file(view).len());
}

/// Reads the file into a view that can answer checks.
#[divan::bench(args = SIZES, sample_count = 10)]
fn read_snapshot(bencher: Bencher<'_, '_>, keys: u64) {
    let held = Held::new(keys);
    let view = held.mirror.slot().load();
    let view = view.as_deref().expect("a snapshot was taken");
    let file = snapshot_file(view);
    bencher.bench_local(|| {
        let contents = read::read(&file[..], file.len() as u64, &snapshot_key());
        let contents = contents.expect("it was just written");
        let restored = contents.keyrings.values().next().expect("it has one");
        assert_eq!(restored.view().len(), view.len());
        contents
    });
}

fn snapshot_file(view: &KeyringView) -> Vec<u8> {
    let header = Header {
        node: "edge-1".to_owned(),
        cluster: "default".to_owned(),
        written_at: Timestamp::from_millis(0),
        origin: Origin {
            id: FileId::new([1; FileId::LEN]),
            inode: Inode {
                device: 1,
                number: 2,
                born_ns: 3,
            },
            boot_clock: None,
        },
    };
    let pulse = Pulse {
        latest_wall: Timestamp::from_millis(0),
        confirmed: BTreeMap::new(),
    };
    let mut sealer = Sealer::new(&snapshot_key(), &header).expect("the random source works");
    let mut file = Vec::new();
    write::write(&mut file, &mut sealer, [view], &pulse, 1).expect("memory takes it");
    file
}

fn snapshot_key() -> SnapshotKey {
    SnapshotKey::new([7; SnapshotKey::LEN])
}
