//! Micro-benchmarks of the steps of a Check, and of applying a change.
//!
//! `cargo bench --bench micro` measures; `cargo test --benches` runs each once.

use std::{hint::black_box, sync::Arc, time::Duration};

use bytes::BytesMut;
use divan::Bencher;
use prometheus_client::registry::Registry;
use prost::Message as _;
use relatch::{
    authz::{Authorizer, Settings, SettingsParts, request::CheckInput},
    clock::Clock,
    key::{
        AllowedSources, Epoch, KeyDigest, KeyId, KeyRecord, KeyState, KeyringName, Pepper,
        PepperId, Prefix, Revision, Scopes, Secret, VersionNumber, Window,
    },
    keyring::{Announced, KeyringSettings, Keyrings, Mirror, Staleness},
    proto::auth::{CheckRequest, CheckResponse},
    telemetry::{check::CheckTelemetry, metrics::SidecarMetrics},
};

/// A keyring as a sidecar holds it, and one key of it.
struct Held {
    keyrings: Keyrings,
    mirror: Mirror,
    secret: Secret,
    record: KeyRecord,
}

/// As Envoy 1.40 sent it, behind the five bytes that frame a gRPC message.
const RECORDED: &[u8] = include_bytes!("../tests/data/check-request.grpc");
const SIZES: [u64; 2] = [1_000, 1_000_000];
const EPOCH: Epoch = Epoch::new(1);

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
            number = (number + 7_919) % keys;
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
    let message = held.request().encode_to_vec();
    let mut answer = BytesMut::with_capacity(4 << 10);
    authorizer.answer(&message, None, &mut answer);
    assert_allowed(&CheckResponse::decode(answer.as_ref()).expect("a response"));
    bencher.bench_local(|| {
        answer.clear();
        authorizer.answer(black_box(&message), None, &mut answer);
        answer.len()
    });
}

/// One version changes its state; the new view is published.
#[divan::bench(args = SIZES)]
fn apply_delta_of_one(bencher: Bencher<'_, '_>, keys: u64) {
    let mut held = Held::new(keys);
    let mut revision = Revision::new(1);
    bencher.bench_local(|| {
        let next = revision.next();
        let change = Announced {
            record: KeyRecord {
                state: KeyState::Retiring,
                digest: digest_of(next.get() * 7_919 % keys),
                ..held.record.clone()
            },
            hash: next.get(),
        };
        held.mirror
            .apply_delta(EPOCH, revision, next, Vec::new(), vec![change], &[])
            .expect("it follows what is held");
        revision = next;
    });
}

impl Held {
    /// `keys` versions that nobody can present, and one that somebody can.
    fn new(keys: u64) -> Self {
        let staleness = Staleness {
            warn_after: Duration::from_secs(30),
            deny_after: Duration::from_hours(1),
        };
        let keyrings = Keyrings::new([(keyring(), staleness)]);
        let slot = keyrings.get(&keyring()).expect("it was just made");
        let mut mirror = Mirror::new(Arc::clone(slot));
        mirror.adopt(KeyringSettings {
            prefix: Prefix::default(),
            issued_only: true,
            peppers: vec![pepper()],
            help_url: None,
        });
        let secret = secret();
        let record = record(&secret);
        let mut snapshot = mirror
            .begin_snapshot(EPOCH, Revision::new(1), usize::try_from(keys).expect("few"))
            .expect("settings have come");
        for number in 0..keys {
            snapshot.add(&Announced {
                record: KeyRecord {
                    digest: digest_of(number),
                    ..record.clone()
                },
                hash: number,
            });
        }
        snapshot.add(&Announced {
            record: record.clone(),
            hash: keys,
        });
        mirror
            .finish_snapshot(snapshot, None, 0)
            .expect("the first snapshot");
        slot.confirm(Clock::system().boot());
        Self {
            keyrings,
            mirror,
            secret,
            record,
        }
    }

    fn authorizer(&self) -> Authorizer {
        let settings = Settings::new(SettingsParts {
            default_keyring: Some(keyring()),
            ..SettingsParts::default()
        });
        let clock = Clock::system();
        let metrics =
            SidecarMetrics::register(&mut Registry::default(), &self.keyrings, clock.clone());
        Authorizer::new(
            Arc::new(settings.expect("valid settings")),
            &self.keyrings,
            clock.clone(),
            Arc::new(CheckTelemetry::new(metrics, None, clock)),
        )
    }

    /// The recorded request with the key of this keyring.
    fn request(&self) -> CheckRequest {
        let mut request = CheckRequest::decode(&RECORDED[5..]).expect("a request");
        let header = request
            .attributes
            .as_mut()
            .and_then(|attributes| attributes.request.as_mut())
            .and_then(|request| request.http.as_mut())
            .and_then(|http| http.headers.iter_mut().find(|held| held.key == "x-api-key"))
            .expect("a key was recorded");
        header.value = self.secret.expose().to_owned().into();
        request
    }
}

fn assert_allowed(response: &CheckResponse) {
    let code = response.status.as_ref().map(|status| status.code);
    assert_eq!(code, Some(0), "the key is denied");
}

fn keyring() -> KeyringName {
    "bench".parse().expect("a valid name")
}

fn pepper() -> Pepper {
    Pepper::new(PepperId::new(1), &[7; Pepper::LEN]).expect("32 bytes")
}

fn secret() -> Secret {
    let id = KeyId::generate().expect("the random source works");
    Secret::generate(&Prefix::default(), id).expect("the random source works")
}

fn record(secret: &Secret) -> KeyRecord {
    let presented = secret.presented();
    KeyRecord {
        digest: pepper().digest(&presented),
        pepper: pepper().id(),
        key_id: presented.parse(&Prefix::default()).expect("a token"),
        version: VersionNumber::FIRST,
        consumer: "checkout".parse().expect("a valid id"),
        state: KeyState::Active,
        window: Window::default(),
        retiring_since: None,
        retires_at: None,
        scopes: Scopes::default(),
        allowed_sources: AllowedSources::default(),
        replaced_by: None,
        rotation: None,
    }
}

/// Spreads numbers over digests as a hash does: 64 bits through the finalizer of `SplitMix64`.
fn digest_of(number: u64) -> KeyDigest {
    let mut bytes = [0; KeyDigest::LEN];
    for (lane, part) in (0u64..).zip(bytes.chunks_exact_mut(8)) {
        let mut word = (number + 1)
            .wrapping_mul(0x9e37_79b9_7f4a_7c15)
            .wrapping_add(lane);
        word = (word ^ (word >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        word = (word ^ (word >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        part.copy_from_slice(&(word ^ (word >> 31)).to_le_bytes());
    }
    KeyDigest::from_slice(&bytes).expect("it has the length of a digest")
}
