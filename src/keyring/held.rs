//! A key version as a sidecar holds it: packed into some forty bytes beside its digest, and read in place.
//!
//! The packed form never leaves the process: it is neither sent nor stored.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::IpNet;

use super::usage::UsageCell;
use crate::key::{
    AllowedSources, ConsumerId, KeyDigest, KeyId, KeyRecord, KeyState, PepperId, RotationId,
    Scopes, Standing, Timestamp, VersionNumber, VersionRef, Window, permit_source,
};

/// A key version, borrowed from where it is held.
#[derive(Clone, Copy, Debug)]
pub struct HeldKey<'v> {
    digest: &'v KeyDigest,
    usage: &'v UsageCell,
    common: Common<'v>,
}

/// A key version that is held by itself.
#[derive(Debug)]
pub struct OwnedKey {
    digest: KeyDigest,
    usage: UsageCell,
    packed: Box<[u8]>,
}

/// What every version has.
#[derive(Clone, Copy, Debug)]
struct Common<'v> {
    state: KeyState,
    key_id: KeyId,
    version: VersionNumber,
    pepper: PepperId,
    consumer: &'v str,
    window: Window,
    /// What few versions have, packed; none for those that have nothing of it.
    rare: Option<&'v [u8]>,
}

/// What few versions have.
#[derive(Clone, Debug, Default)]
struct Rare<'v> {
    retiring_since: Option<Timestamp>,
    retires_at: Option<Timestamp>,
    replaced_by: Option<VersionNumber>,
    rotation: Option<RotationId>,
    /// Separated by single spaces.
    scopes: &'v str,
    sources: Sources<'v>,
}

/// Blocks of addresses, packed one after the other.
#[derive(Clone, Debug, Default)]
struct Sources<'v>(&'v [u8]);

/// Reads what [`pack`] wrote.
struct Reader<'v>(&'v [u8]);

/// The bits of the first byte that are the state.
const STATE: u8 = 0b111;
const HAS_NOT_BEFORE: u8 = 1 << 3;
const HAS_EXPIRES_AT: u8 = 1 << 4;
const HAS_RARE: u8 = 1 << 5;

const HAS_RETIRING_SINCE: u8 = 1;
const HAS_RETIRES_AT: u8 = 1 << 1;
const HAS_REPLACED_BY: u8 = 1 << 2;
const HAS_ROTATION: u8 = 1 << 3;

const PACKED: &str = "a record is read as it was packed";

impl<'v> HeldKey<'v> {
    /// Reads the version that is packed at the beginning of `packed`.
    pub(super) fn read(digest: &'v KeyDigest, usage: &'v UsageCell, packed: &'v [u8]) -> Self {
        Self {
            digest,
            usage,
            common: Common::read(&mut Reader(packed)),
        }
    }

    /// What it is found by.
    #[must_use]
    pub const fn digest(&self) -> &'v KeyDigest {
        self.digest
    }

    /// Where its counters are found.
    #[must_use]
    pub(super) const fn usage(&self) -> &'v UsageCell {
        self.usage
    }

    /// Where it is in its life.
    #[must_use]
    pub const fn state(&self) -> KeyState {
        self.common.state
    }

    /// The key, the same for all its versions.
    #[must_use]
    pub const fn key_id(&self) -> KeyId {
        self.common.key_id
    }

    /// Which version of the key.
    #[must_use]
    pub const fn version(&self) -> VersionNumber {
        self.common.version
    }

    /// What names it.
    #[must_use]
    pub const fn version_ref(&self) -> VersionRef {
        VersionRef {
            key_id: self.common.key_id,
            version: self.common.version,
        }
    }

    /// Whose key it is: the text of a [`ConsumerId`].
    #[must_use]
    pub const fn consumer(&self) -> &'v str {
        self.common.consumer
    }

    /// When the secret is valid at all.
    #[must_use]
    pub const fn window(&self) -> Window {
        self.common.window
    }

    /// How the version stands at `now`, by the wall clock: see [`Standing::of`].
    #[must_use]
    pub fn standing(&self, now: Timestamp) -> Standing {
        Standing::of(self.common.state, &self.common.window, now)
    }

    /// The beginning of the overlap, in state retiring.
    #[must_use]
    pub fn retiring_since(&self) -> Option<Timestamp> {
        self.rare().retiring_since
    }

    /// The announced end of the overlap, in state retiring.
    #[must_use]
    pub fn retires_at(&self) -> Option<Timestamp> {
        self.rare().retires_at
    }

    /// The rotation that the version takes part in.
    #[must_use]
    pub fn rotation(&self) -> Option<RotationId> {
        self.rare().rotation
    }

    /// What the key may do: the text of [`Scopes`], in order and separated by single spaces.
    #[must_use]
    pub fn scopes(&self) -> &'v str {
        self.rare().scopes
    }

    /// Whether the key may be used from `source`; an unknown source is only where every source is.
    #[must_use]
    pub fn permits(&self, source: Option<IpAddr>) -> bool {
        permit_source(self.rare().sources, source)
    }

    /// All of it, copied.
    #[must_use]
    #[expect(clippy::missing_panics_doc, reason = "what was packed is valid")]
    pub fn to_record(&self) -> KeyRecord {
        let (common, rare) = (&self.common, self.rare());
        KeyRecord {
            digest: *self.digest,
            pepper: common.pepper,
            key_id: common.key_id,
            version: common.version,
            consumer: common.consumer.parse::<ConsumerId>().expect(PACKED),
            state: common.state,
            window: common.window,
            retiring_since: rare.retiring_since,
            retires_at: rare.retires_at,
            scopes: Scopes::parse(rare.scopes).expect(PACKED),
            allowed_sources: AllowedSources::from(rare.sources.collect::<Vec<_>>()),
            replaced_by: rare.replaced_by,
            rotation: rare.rotation,
        }
    }

    fn rare(&self) -> Rare<'v> {
        self.common.rare.map_or_else(Rare::default, Rare::read)
    }
}

impl OwnedKey {
    /// Packs a record.
    #[must_use]
    pub fn new(record: &KeyRecord) -> Self {
        let mut packed = Vec::new();
        pack(record, &mut packed);
        Self {
            digest: record.digest,
            usage: UsageCell::default(),
            packed: packed.into(),
        }
    }

    /// The version.
    #[must_use]
    pub fn held(&self) -> HeldKey<'_> {
        HeldKey::read(&self.digest, &self.usage, &self.packed)
    }

    /// The memory that it takes, in bytes, without what an allocator adds.
    #[must_use]
    pub const fn size(&self) -> usize {
        size_of::<Self>() + self.packed.len()
    }
}

impl<'v> Common<'v> {
    fn read(packed: &mut Reader<'v>) -> Self {
        let head = packed.byte();
        let key_id = packed.key_id();
        let version = packed.version();
        let pepper = PepperId::new(packed.number());
        let consumer_len = usize::from(packed.byte());
        Self {
            state: KeyState::ALL[usize::from(head & STATE)],
            key_id,
            version,
            pepper,
            consumer: packed.text(consumer_len),
            window: Window {
                not_before: (head & HAS_NOT_BEFORE != 0).then(|| packed.time()),
                expires_at: (head & HAS_EXPIRES_AT != 0).then(|| packed.time()),
            },
            rare: (head & HAS_RARE != 0).then(|| {
                let len = packed.len();
                packed.take(len)
            }),
        }
    }
}

impl<'v> Rare<'v> {
    fn read(packed: &'v [u8]) -> Self {
        let mut packed = Reader(packed);
        let has = packed.byte();
        let retiring_since = (has & HAS_RETIRING_SINCE != 0).then(|| packed.time());
        let retires_at = (has & HAS_RETIRES_AT != 0).then(|| packed.time());
        let replaced_by = (has & HAS_REPLACED_BY != 0).then(|| packed.version());
        let rotation = (has & HAS_ROTATION != 0).then(|| RotationId::from(packed.key_id()));
        let scopes_len = packed.len();
        Self {
            retiring_since,
            retires_at,
            replaced_by,
            rotation,
            scopes: packed.text(scopes_len),
            sources: Sources(packed.0),
        }
    }
}

impl Iterator for Sources<'_> {
    type Item = IpNet;

    fn next(&mut self) -> Option<IpNet> {
        let (prefix_len, rest) = self.0.split_first()?;
        let mut packed = Reader(rest);
        let is_v6 = packed.byte() == 6;
        let address = if is_v6 {
            IpAddr::from(Ipv6Addr::from(packed.array::<16>()))
        } else {
            IpAddr::from(Ipv4Addr::from(packed.array::<4>()))
        };
        self.0 = packed.0;
        Some(IpNet::new(address, *prefix_len).expect(PACKED))
    }
}

impl<'v> Reader<'v> {
    fn take(&mut self, len: usize) -> &'v [u8] {
        let (taken, rest) = self.0.split_at(len);
        self.0 = rest;
        taken
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        self.take(N).try_into().expect(PACKED)
    }

    fn byte(&mut self) -> u8 {
        let [byte] = self.array();
        byte
    }

    fn text(&mut self, len: usize) -> &'v str {
        str::from_utf8(self.take(len)).expect(PACKED)
    }

    fn key_id(&mut self) -> KeyId {
        KeyId::from_bytes(self.take(KeyId::LEN)).expect(PACKED)
    }

    fn version(&mut self) -> VersionNumber {
        VersionNumber::new(self.number()).expect(PACKED)
    }

    fn time(&mut self) -> Timestamp {
        Timestamp::from_millis(i64::from_le_bytes(self.array()))
    }

    fn len(&mut self) -> usize {
        usize::try_from(self.number()).expect(PACKED)
    }

    /// Seven bits a byte, the lowest first.
    fn number(&mut self) -> u32 {
        let mut number = 0;
        let mut shift = 0;
        loop {
            let byte = self.byte();
            number |= u32::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return number;
            }
            shift += 7;
        }
    }
}

/// Appends a record, without its digest, to `packed`.
pub(super) fn pack(record: &KeyRecord, packed: &mut Vec<u8>) {
    let rare = pack_rare(record);
    let flag = |is_there, flag| if is_there { flag } else { 0 };
    let window = &record.window;
    packed.push(
        record.state as u8
            | flag(window.not_before.is_some(), HAS_NOT_BEFORE)
            | flag(window.expires_at.is_some(), HAS_EXPIRES_AT)
            | flag(rare.is_some(), HAS_RARE),
    );
    packed.extend_from_slice(record.key_id.as_str().as_bytes());
    push_number(record.version.get(), packed);
    push_number(record.pepper.get(), packed);
    let consumer = record.consumer.as_str();
    packed.push(u8::try_from(consumer.len()).expect("a consumer has at most 128 characters"));
    packed.extend_from_slice(consumer.as_bytes());
    for time in [window.not_before, window.expires_at].into_iter().flatten() {
        push_time(time, packed);
    }
    if let Some(rare) = rare {
        push_len(rare.len(), packed);
        packed.extend_from_slice(&rare);
    }
}

/// How many bytes the version takes that is packed at the beginning of `packed`.
pub(super) fn packed_len(packed: &[u8]) -> usize {
    let mut reader = Reader(packed);
    let _common = Common::read(&mut reader);
    packed.len() - reader.0.len()
}

fn pack_rare(record: &KeyRecord) -> Option<Vec<u8>> {
    let flag = |is_there, flag| if is_there { flag } else { 0 };
    let has = flag(record.retiring_since.is_some(), HAS_RETIRING_SINCE)
        | flag(record.retires_at.is_some(), HAS_RETIRES_AT)
        | flag(record.replaced_by.is_some(), HAS_REPLACED_BY)
        | flag(record.rotation.is_some(), HAS_ROTATION);
    let sources = record.allowed_sources.iter();
    let mut sources = sources.peekable();
    if has == 0 && record.scopes.is_empty() && sources.peek().is_none() {
        return None;
    }
    let mut packed = vec![has];
    for time in [record.retiring_since, record.retires_at]
        .into_iter()
        .flatten()
    {
        push_time(time, &mut packed);
    }
    if let Some(version) = record.replaced_by {
        push_number(version.get(), &mut packed);
    }
    if let Some(rotation) = record.rotation {
        packed.extend_from_slice(rotation.as_str().as_bytes());
    }
    let scopes = record.scopes.to_string();
    push_len(scopes.len(), &mut packed);
    packed.extend_from_slice(scopes.as_bytes());
    for block in sources {
        packed.push(block.prefix_len());
        match block.addr() {
            IpAddr::V4(address) => {
                packed.push(4);
                packed.extend_from_slice(&address.octets());
            }
            IpAddr::V6(address) => {
                packed.push(6);
                packed.extend_from_slice(&address.octets());
            }
        }
    }
    Some(packed)
}

fn push_time(time: Timestamp, packed: &mut Vec<u8>) {
    packed.extend_from_slice(&time.as_millis().to_le_bytes());
}

fn push_len(len: usize, packed: &mut Vec<u8>) {
    push_number(u32::try_from(len).expect("a record is small"), packed);
}

fn push_number(mut number: u32, packed: &mut Vec<u8>) {
    while number >= 0x80 {
        packed.push(0x80 | u8::try_from(number & 0x7f).expect("seven bits"));
        number >>= 7;
    }
    packed.push(u8::try_from(number).expect("seven bits"));
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::testing;

    fn at(millis: i64) -> Timestamp {
        Timestamp::from_millis(millis)
    }

    fn full() -> KeyRecord {
        KeyRecord {
            version: VersionNumber::new(300).expect("not zero"),
            pepper: PepperId::new(u32::MAX),
            state: KeyState::Revoked,
            window: Window::new(Some(at(1)), Some(at(i64::MAX))),
            retiring_since: Some(at(2)),
            retires_at: Some(at(3)),
            scopes: Scopes::parse("orders:read orders:write").expect("scopes"),
            allowed_sources: AllowedSources::parse(&["10.0.0.0/8", "2001:db8::/32", "::1"])
                .expect("blocks"),
            replaced_by: VersionNumber::new(301),
            rotation: Some("7Qm2Xc91TbKe".parse().expect("an id")),
            consumer: "c".repeat(128).parse().expect("a consumer"),
            ..testing::record()
        }
    }

    #[test]
    fn a_record_comes_out_as_it_went_in() {
        let plain = testing::record();
        let mut records = vec![plain.clone(), full()];
        records.extend(KeyState::ALL.map(|state| KeyRecord {
            state,
            ..plain.clone()
        }));
        // Each of what may be missing, alone.
        let full = full();
        records.extend([
            KeyRecord {
                window: Window::new(None, Some(at(9))),
                ..plain.clone()
            },
            KeyRecord {
                retires_at: full.retires_at,
                ..plain.clone()
            },
            KeyRecord {
                rotation: full.rotation,
                ..plain.clone()
            },
            KeyRecord {
                scopes: full.scopes.clone(),
                ..plain.clone()
            },
            KeyRecord {
                allowed_sources: full.allowed_sources.clone(),
                ..plain
            },
        ]);
        for record in records {
            let owned = OwnedKey::new(&record);
            assert_eq!(owned.held().to_record(), record);
            assert_eq!(packed_len(&owned.packed), owned.packed.len());
            let mut followed = owned.packed.to_vec();
            followed.extend_from_slice(&[0xff; 40]);
            assert_eq!(packed_len(&followed), owned.packed.len());
        }
    }

    #[test]
    fn what_is_judged_is_judged_as_of_the_record() {
        let record = full();
        let owned = OwnedKey::new(&record);
        let held = owned.held();
        for source in [
            "10.1.2.3",
            "11.0.0.1",
            "::1",
            "2001:db8::5",
            "::ffff:10.0.0.1",
        ] {
            let source = source.parse().expect("an address");
            assert_eq!(
                held.permits(Some(source)),
                record.allowed_sources.permit(Some(source))
            );
        }
        assert!(!held.permits(None));
        assert_eq!(held.scopes(), record.scopes.to_string());
        assert_eq!(held.standing(at(5)), record.standing(at(5)));
    }

    #[test]
    fn a_plain_record_is_small() {
        let record = KeyRecord {
            consumer: "consumer-0000001".parse().expect("a consumer"),
            ..testing::record()
        };
        assert!(OwnedKey::new(&record).packed.len() <= 32);
    }
}
