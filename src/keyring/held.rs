//! A key version as a sidecar holds it: packed into about forty bytes beside its digest, and read
//! in place.

use std::{net::IpAddr, sync::Arc};

use super::{
    grants::{self, Granted, Grants},
    packed::{PACKED, Reader, push_measured, push_number, push_time},
    usage_cell::UsageCell,
};
use crate::key::{
    AllowedSources, ConsumerId, KeyDigest, KeyId, KeyRecord, KeyState, PepperId, RotationId,
    Scopes, Standing, Timestamp, VersionNumber, VersionRef, Window, permit_source,
};

/// A key version, borrowed from the shard or the [`OwnedKey`] that holds it.
#[derive(Clone, Copy, Debug)]
pub struct HeldKey<'v> {
    digest: &'v KeyDigest,
    usage: &'v UsageCell,
    common: Common<'v>,
    grants: Grants<'v>,
}

/// A key version that is held outside a shard.
#[derive(Debug)]
pub struct OwnedKey {
    digest: KeyDigest,
    usage: UsageCell,
    packed: Box<[u8]>,
}

/// The fields of every version.
#[derive(Clone, Copy, Debug)]
struct Common<'v> {
    state: KeyState,
    key_id: KeyId,
    version: VersionNumber,
    pepper: PepperId,
    consumer: &'v str,
    window: Window,
    /// The packed fields of [`Rare`]; none for a version without any of them.
    rare: Option<&'v [u8]>,
}

/// The fields that few versions have.
#[derive(Clone, Debug, Default)]
struct Rare {
    retiring_since: Option<Timestamp>,
    retires_at: Option<Timestamp>,
    replaced_by: Option<VersionNumber>,
    rotation: Option<RotationId>,
}

/// The bits of the first byte that contain the state.
const STATE: u8 = 0b111;
const HAS_NOT_BEFORE: u8 = 1 << 3;
const HAS_EXPIRES_AT: u8 = 1 << 4;
const HAS_RARE: u8 = 1 << 5;
const HAS_GRANTS: u8 = 1 << 6;
/// The grants are packed with the version, and are not shared.
const HAS_OWN_GRANTS: u8 = 1 << 7;

const HAS_RETIRING_SINCE: u8 = 1;
const HAS_RETIRES_AT: u8 = 1 << 1;
const HAS_REPLACED_BY: u8 = 1 << 2;
const HAS_ROTATION: u8 = 1 << 3;

impl<'v> HeldKey<'v> {
    /// Reads the version that is packed at the beginning of `packed`. Its grants may be among the
    /// shared ones.
    pub(super) fn read(
        digest: &'v KeyDigest,
        usage: &'v UsageCell,
        packed: &'v [u8],
        shared: &'v [Arc<[u8]>],
    ) -> Self {
        let (common, granted) = Common::read(&mut Reader::new(packed));
        let grants = granted.map(|granted| granted.among(shared));
        Self {
            digest,
            usage,
            common,
            grants: grants.unwrap_or_default(),
        }
    }

    /// Returns the digest by which the version is found.
    #[must_use]
    pub(crate) const fn digest(&self) -> &'v KeyDigest {
        self.digest
    }

    /// Returns the cell with the index of the version's counters.
    #[must_use]
    pub(super) const fn usage(&self) -> &'v UsageCell {
        self.usage
    }

    /// Returns the state of the version.
    #[must_use]
    pub const fn state(&self) -> KeyState {
        self.common.state
    }

    /// Returns the id of the key, which is the same for all its versions.
    #[must_use]
    pub(crate) const fn key_id(&self) -> KeyId {
        self.common.key_id
    }

    /// Returns the number of the version.
    #[must_use]
    pub(crate) const fn version(&self) -> VersionNumber {
        self.common.version
    }

    /// Returns the key id and the number of the version.
    #[must_use]
    pub(crate) const fn version_ref(&self) -> VersionRef {
        VersionRef {
            key_id: self.common.key_id,
            version: self.common.version,
        }
    }

    /// Returns the consumer of the key: the text of a [`ConsumerId`].
    #[must_use]
    pub(crate) const fn consumer(&self) -> &'v str {
        self.common.consumer
    }

    /// Returns the window outside of which the secret is never valid.
    #[must_use]
    pub(crate) const fn window(&self) -> Window {
        self.common.window
    }

    /// Returns the standing of the version at `now`, by the wall clock: see [`Standing::of`].
    #[must_use]
    pub(crate) fn standing(&self, now: Timestamp) -> Standing {
        Standing::of(self.common.state, &self.common.window, now)
    }

    /// Returns the beginning of the overlap, in state retiring.
    #[must_use]
    pub(crate) fn retiring_since(&self) -> Option<Timestamp> {
        self.rare().retiring_since
    }

    /// Returns the announced end of the overlap, in state retiring.
    #[must_use]
    pub(crate) fn retires_at(&self) -> Option<Timestamp> {
        self.rare().retires_at
    }

    /// Returns the rotation that the version is part of.
    #[must_use]
    pub(crate) fn rotation(&self) -> Option<RotationId> {
        self.rare().rotation
    }

    /// Returns the scopes of the key: the text of [`Scopes`], in order and separated by single
    /// spaces.
    #[must_use]
    pub(crate) fn scopes(&self) -> &'v str {
        self.grants.scopes()
    }

    /// Returns whether the key may be used from `source`. An unknown source is allowed only where
    /// every source is allowed.
    #[must_use]
    pub(crate) fn permits(&self, source: Option<IpAddr>) -> bool {
        permit_source(self.grants.sources(), source)
    }

    /// Copies the version into a record.
    #[must_use]
    pub fn to_record(self) -> KeyRecord {
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
            scopes: Scopes::parse(self.scopes()).expect(PACKED),
            allowed_sources: AllowedSources::from(self.grants.sources().collect::<Vec<_>>()),
            replaced_by: rare.replaced_by,
            rotation: rare.rotation,
        }
    }

    fn rare(&self) -> Rare {
        self.common.rare.map_or_else(Rare::default, Rare::read)
    }
}

impl OwnedKey {
    /// Packs a record.
    #[must_use]
    pub(crate) fn new(record: &KeyRecord) -> Self {
        let mut packed = Vec::new();
        let grants = grants::pack(record);
        pack(record, grants.as_deref().map(Granted::Own), &mut packed);
        Self {
            digest: record.digest,
            usage: UsageCell::default(),
            packed: packed.into(),
        }
    }

    /// Returns the digest by which the version is found.
    #[must_use]
    pub(crate) const fn digest(&self) -> &KeyDigest {
        &self.digest
    }

    /// Returns the version, borrowed.
    #[must_use]
    pub fn held(&self) -> HeldKey<'_> {
        HeldKey::read(&self.digest, &self.usage, &self.packed, &[])
    }

    /// Returns the memory that the version uses, in bytes, without the overhead of the allocator.
    #[must_use]
    pub(crate) const fn size(&self) -> usize {
        size_of::<Self>() + self.packed.len()
    }
}

impl<'v> Common<'v> {
    /// Reads the fields of every version, and how the grants are found.
    fn read(packed: &mut Reader<'v>) -> (Self, Option<Granted<'v>>) {
        let head = packed.byte();
        let has = |flag| head & flag != 0;
        let key_id = packed.key_id();
        let version = packed.version();
        let pepper = PepperId::new(packed.number());
        let common = Self {
            state: KeyState::ALL[usize::from(head & STATE)],
            key_id,
            version,
            pepper,
            consumer: packed.text(),
            window: Window {
                not_before: has(HAS_NOT_BEFORE).then(|| packed.time()),
                expires_at: has(HAS_EXPIRES_AT).then(|| packed.time()),
            },
            rare: has(HAS_RARE).then(|| packed.measured()),
        };
        let granted = if !has(HAS_GRANTS) {
            None
        } else if has(HAS_OWN_GRANTS) {
            Some(Granted::Own(packed.measured()))
        } else {
            Some(Granted::Shared(packed.byte()))
        };
        (common, granted)
    }
}

impl Rare {
    fn read(packed: &[u8]) -> Self {
        let mut packed = Reader::new(packed);
        let has = packed.byte();
        let retiring_since = (has & HAS_RETIRING_SINCE != 0).then(|| packed.time());
        let retires_at = (has & HAS_RETIRES_AT != 0).then(|| packed.time());
        let replaced_by = (has & HAS_REPLACED_BY != 0).then(|| packed.version());
        let rotation = (has & HAS_ROTATION != 0).then(|| RotationId::from(packed.key_id()));
        Self {
            retiring_since,
            retires_at,
            replaced_by,
            rotation,
        }
    }
}

/// Appends a record to `packed`, without its digest. `granted` is how its grants are found, as
/// [`grants::pack`] packed them.
pub(super) fn pack(record: &KeyRecord, granted: Option<Granted<'_>>, packed: &mut Vec<u8>) {
    let rare = pack_rare(record);
    let flag = |is_there, flag| if is_there { flag } else { 0 };
    let window = &record.window;
    packed.push(
        record.state as u8
            | flag(window.not_before.is_some(), HAS_NOT_BEFORE)
            | flag(window.expires_at.is_some(), HAS_EXPIRES_AT)
            | flag(rare.is_some(), HAS_RARE)
            | flag(granted.is_some(), HAS_GRANTS)
            | flag(matches!(granted, Some(Granted::Own(_))), HAS_OWN_GRANTS),
    );
    packed.extend_from_slice(record.key_id.as_str().as_bytes());
    push_number(record.version.get(), packed);
    push_number(record.pepper.get(), packed);
    push_measured(record.consumer.as_str().as_bytes(), packed);
    for time in [window.not_before, window.expires_at].into_iter().flatten() {
        push_time(time, packed);
    }
    if let Some(rare) = rare {
        push_measured(&rare, packed);
    }
    match granted {
        None => {}
        Some(Granted::Shared(number)) => packed.push(number),
        Some(Granted::Own(grants)) => push_measured(grants, packed),
    }
}

/// Reads which version is packed at the beginning of `packed`.
pub(super) fn version_ref(packed: &[u8]) -> VersionRef {
    let (common, _granted) = Common::read(&mut Reader::new(packed));
    VersionRef {
        key_id: common.key_id,
        version: common.version,
    }
}

/// Returns the length, in bytes, of the version that is packed at the beginning of `packed`.
pub(super) fn packed_len(packed: &[u8]) -> usize {
    let mut reader = Reader::new(packed);
    let (_common, _granted) = Common::read(&mut reader);
    packed.len() - reader.rest().len()
}

fn pack_rare(record: &KeyRecord) -> Option<Vec<u8>> {
    let flag = |is_there, flag| if is_there { flag } else { 0 };
    let has = flag(record.retiring_since.is_some(), HAS_RETIRING_SINCE)
        | flag(record.retires_at.is_some(), HAS_RETIRES_AT)
        | flag(record.replaced_by.is_some(), HAS_REPLACED_BY)
        | flag(record.rotation.is_some(), HAS_ROTATION);
    if has == 0 {
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
    Some(packed)
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
        // Each optional field alone.
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
