//! Micro-benchmarks of the steps of a Check, and of applying a change.
//!
//! `cargo bench --bench micro` measures; `cargo test --benches` runs each once.

mod held;

use std::hint::black_box;

use bytes::BytesMut;
use divan::Bencher;
use prost::Message as _;
use relatch::{authz::request::CheckInput, proto::auth::CheckRequest};

use held::{Held, RECORDED, STRIDE, assert_allowed, digest_of, pepper, secret};

const SIZES: [u64; 2] = [1_000, 1_000_000];

fn main() {
    divan::main();
}

/// Into the fields of a request, within bounds.
#[divan::bench]
fn read_request(bencher: Bencher<'_, '_>) {
    bencher.bench(|| CheckInput::read(black_box(&RECORDED[5..])).is_ok());
}

/// The same by the generated code.
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

/// Among digests that are spread over the whole keyring, so that large ones do not fit the cache.
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

/// From the bytes of the request to the bytes of the response, with metrics and without spans.
#[divan::bench(args = SIZES)]
fn answer(bencher: Bencher<'_, '_>, keys: u64) {
    let held = Held::new(keys);
    let authorizer = held.authorizer();
    let message = held.request();
    let mut answer = BytesMut::with_capacity(4 << 10);
    assert!(authorizer.answer(&message, None, &mut answer).is_none());
    assert_allowed(&answer);
    bencher.bench_local(|| {
        answer.clear();
        let later = authorizer.answer(black_box(&message), None, &mut answer);
        (later.is_none(), answer.len())
    });
}

/// One version changes its state; the new view is published.
#[divan::bench(args = SIZES)]
fn apply_delta_of_one(bencher: Bencher<'_, '_>, keys: u64) {
    let mut held = Held::new(keys);
    bencher.bench_local(|| held.change());
}
