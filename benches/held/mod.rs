//! Keyrings of a sidecar, created in memory for benchmarks.

use std::{sync::Arc, time::Duration};

use prometheus_client::registry::Registry;
use prost::Message as _;
use relatch::{
    authz::{Authorizer, Settings, SettingsParts},
    clock::{BootTime, Clock},
    key::{
        AllowedSources, Epoch, KeyDigest, KeyId, KeyRecord, KeyState, KeyringName, Pepper,
        PepperId, Prefix, Revision, Scopes, Secret, VersionNumber, Window,
    },
    keyring::{
        Announced, KeyringSettings, Keyrings, Mirror, Mode, Staleness,
        on_demand::{CacheSettings, Fill, Finding, Follower, Found},
    },
    proto::auth::{CheckRequest, CheckResponse},
    telemetry::{check::CheckTelemetry, metrics::SidecarMetrics},
};

/// A keyring that is held in full, and one key of it.
pub(crate) struct Held {
    keys: u64,
    keyrings: Keyrings,
    pub(crate) mirror: Mirror,
    secret: Secret,
    record: KeyRecord,
    revision: Revision,
}

/// A keyring on demand with all its keys in the cache.
pub(crate) struct OnDemand {
    secrets: Vec<Secret>,
    follower: Follower,
}

/// A request that Envoy 1.40 sent, after the five bytes that frame a gRPC message.
pub(crate) const RECORDED: &[u8] = include_bytes!("../../tests/data/check-request.grpc");
const EPOCH: Epoch = Epoch::new(1);
const BOOT: BootTime = BootTime::from_millis(1_000);

/// A span that nobody records.
const UNSAMPLED: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-00";
/// A prime, whose multiples spread over a whole keyring.
pub(crate) const STRIDE: u64 = 7_919;

impl Held {
    /// `keys` versions that nobody can present, and one that somebody can.
    pub(crate) fn new(keys: u64) -> Self {
        let staleness = Staleness {
            warn_after: Duration::from_secs(30),
            deny_after: Duration::from_hours(1),
        };
        let keyrings = Keyrings::new([(keyring(), staleness)]);
        let slot = keyrings.get(&keyring()).expect("it was just made");
        let mut mirror = Mirror::new(Arc::clone(&slot));
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
        slot.confirm(Clock::system().reading().into(), Duration::from_hours(1));
        Self {
            keys,
            keyrings,
            mirror,
            secret,
            record,
            revision: Revision::new(1),
        }
    }

    /// Applies the next change: another version becomes retiring each time.
    pub(crate) fn change(&mut self) {
        let next = self.revision.next();
        let change = Announced {
            record: KeyRecord {
                state: KeyState::Retiring,
                digest: digest_of(next.get() * STRIDE % self.keys),
                ..self.record.clone()
            },
            hash: next.get(),
        };
        self.mirror
            .apply_delta(EPOCH, self.revision, next, Vec::new(), vec![change], &[])
            .expect("it follows what is held");
        self.revision = next;
    }

    pub(crate) fn authorizer(&self) -> Authorizer {
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

    /// The recorded request with the key of this keyring. Its `traceparent` is not sampled.
    pub(crate) fn request(&self) -> Vec<u8> {
        let mut request = CheckRequest::decode(&RECORDED[5..]).expect("a request");
        let http = request
            .attributes
            .as_mut()
            .and_then(|attributes| attributes.request.as_mut())
            .and_then(|request| request.http.as_mut())
            .expect("a request was recorded");
        let mut set = |name: &str, value: &str| {
            let header = http.headers.iter_mut().find(|held| held.key == name);
            header.expect("it was recorded").value = value.to_owned().into();
        };
        set("x-api-key", self.secret.expose());
        set("traceparent", UNSAMPLED);
        request.encode_to_vec()
    }
}

impl OnDemand {
    /// `keys` keys whose secrets are known; they must fit into the cache.
    pub(crate) fn new(keys: usize) -> Self {
        let mode = Mode::OnDemand(CacheSettings::default());
        let keyrings = Keyrings::with_modes([(keyring(), Staleness::default(), mode)]);
        let slot = keyrings.get(&keyring()).expect("it was just made");
        let cache = slot.cache().expect("it is held on demand");
        let mut follower = Follower::new(Arc::clone(&slot), Arc::clone(cache));
        follower.adopt(KeyringSettings {
            prefix: Prefix::default(),
            issued_only: true,
            peppers: vec![pepper()],
            help_url: None,
        });
        let is_started = follower.start(EPOCH, Revision::new(1));
        assert_eq!(is_started, Ok(true));
        let secrets: Vec<_> = (0..keys).map(|_| secret()).collect();
        for secret in &secrets {
            let record = record(secret);
            let fill = Fill {
                epoch: EPOCH,
                revision: Revision::new(1),
                digest: record.digest,
                found: Found::Version(Box::new(record)),
                siblings: Some(Vec::new()),
            };
            follower.fill(fill, BOOT);
        }
        follower.cache().tidy();
        assert_eq!(follower.cache().len(), keys as u64);
        Self { secrets, follower }
    }

    /// Whether the key with this number is found.
    pub(crate) fn finds(&self, number: usize, peppers: &[Pepper]) -> bool {
        let presented = self.secrets[number].presented();
        let found = self.follower.cache().find(peppers, &presented, &[], BOOT);
        matches!(found, Finding::Held(_))
    }
}

pub(crate) fn assert_allowed(response: &[u8]) {
    let response = CheckResponse::decode(response).expect("a response");
    let code = response.status.as_ref().map(|status| status.code);
    assert_eq!(code, Some(0), "the key is denied");
}

fn keyring() -> KeyringName {
    "bench".parse().expect("a valid name")
}

pub(crate) fn pepper() -> Pepper {
    Pepper::new(PepperId::new(1), &[7; Pepper::LEN]).expect("32 bytes")
}

pub(crate) fn secret() -> Secret {
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

/// Spreads numbers over digests, as a hash does, with the finalizer of `SplitMix64`.
pub(crate) fn digest_of(number: u64) -> KeyDigest {
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
