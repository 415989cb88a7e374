//! The scopes and the allowed sources of keys. Many keys of a keyring have the same ones.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use ipnet::IpNet;

use super::packed::{PACKED, Reader, push_measured};
use crate::key::KeyRecord;

/// The scopes and the allowed sources of a key, packed.
///
/// The text of the scopes comes first. The blocks of addresses follow it, one after the other.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Grants<'v>(&'v [u8]);

/// Grants that several key versions share: each is held once, and found by its number.
///
/// The list only grows. Grants that no version uses any more are dropped with the next snapshot,
/// which begins a list of its own.
#[derive(Clone, Debug, Default)]
pub(super) struct SharedGrants {
    list: Vec<Arc<[u8]>>,
    numbers: HashMap<Arc<[u8]>, u8>,
}

/// How a version's grants are found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Granted<'v> {
    /// In [`SharedGrants`], under this number.
    Shared(u8),
    /// Packed with the version.
    Own(&'v [u8]),
}

/// Blocks of addresses, packed one after the other.
#[derive(Clone, Debug)]
pub(super) struct Sources<'v>(Reader<'v>);

/// The most grants that are shared, because a number is one byte. A keyring in which every key has
/// different grants saves almost nothing by sharing. In a keyring with more different grants than
/// this, the ones that arrive last are packed with their versions.
const MAX_SHARED: usize = 255;

/// The most bytes of grants that can be shared: enough for ten scopes or a dozen blocks. The bound
/// keeps the list small, which only grows.
const MAX_SHARED_LEN: usize = 256;

impl<'v> Grants<'v> {
    /// Returns the scopes, in order and separated by single spaces.
    pub(super) fn scopes(self) -> &'v str {
        self.read().0
    }

    /// Returns the allowed blocks of addresses; no block where every source is allowed.
    pub(super) fn sources(self) -> Sources<'v> {
        Sources(self.read().1)
    }

    fn read(self) -> (&'v str, Reader<'v>) {
        let mut packed = Reader::new(self.0);
        if self.0.is_empty() {
            return ("", packed);
        }
        (packed.text(), packed)
    }
}

impl SharedGrants {
    /// Returns the number of these grants; none when they are not shared.
    pub(super) fn number(&self, packed: &[u8]) -> Option<u8> {
        self.numbers.get(packed).copied()
    }

    /// Returns whether these grants can be added to the list.
    pub(super) const fn has_room(&self, packed: &[u8]) -> bool {
        self.list.len() < MAX_SHARED && packed.len() <= MAX_SHARED_LEN
    }

    /// Adds grants and returns their number. The caller has checked [`has_room`](Self::has_room).
    pub(super) fn add(&mut self, packed: &[u8]) -> u8 {
        let number = u8::try_from(self.list.len()).expect("there is room");
        let packed: Arc<[u8]> = packed.into();
        self.list.push(Arc::clone(&packed));
        self.numbers.insert(packed, number);
        number
    }

    /// Returns all shared grants. The number of grants is their index.
    pub(super) fn list(&self) -> &[Arc<[u8]>] {
        &self.list
    }
}

impl<'v> Granted<'v> {
    /// Returns the grants, which may be among the shared ones.
    pub(super) fn among(self, shared: &'v [Arc<[u8]>]) -> Grants<'v> {
        match self {
            Self::Shared(number) => Grants(&shared[usize::from(number)]),
            Self::Own(packed) => Grants(packed),
        }
    }
}

impl Iterator for Sources<'_> {
    type Item = IpNet;

    fn next(&mut self) -> Option<IpNet> {
        if self.0.rest().is_empty() {
            return None;
        }
        let prefix_len = self.0.byte();
        let is_v6 = self.0.byte() == 6;
        let address = if is_v6 {
            IpAddr::from(Ipv6Addr::from(self.0.array::<16>()))
        } else {
            IpAddr::from(Ipv4Addr::from(self.0.array::<4>()))
        };
        Some(IpNet::new(address, prefix_len).expect(PACKED))
    }
}

/// Packs the grants of a record; none when it has no scopes and every source is allowed.
pub(super) fn pack(record: &KeyRecord) -> Option<Vec<u8>> {
    let mut sources = record.allowed_sources.iter().peekable();
    if record.scopes.is_empty() && sources.peek().is_none() {
        return None;
    }
    let mut packed = Vec::new();
    push_measured(record.scopes.to_string().as_bytes(), &mut packed);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::{AllowedSources, Scopes, testing};

    fn record(scopes: &str, sources: &[&str]) -> KeyRecord {
        KeyRecord {
            scopes: Scopes::parse(scopes).expect("scopes"),
            allowed_sources: AllowedSources::parse(sources).expect("blocks"),
            ..testing::record()
        }
    }

    #[test]
    fn grants_come_out_as_they_went_in() {
        assert_eq!(pack(&record("", &[])), None);
        let none = Grants::default();
        assert_eq!((none.scopes(), none.sources().count()), ("", 0));
        for (scopes, sources) in [
            ("orders:read", &[][..]),
            ("orders:read orders:write", &["10.0.0.0/8", "2001:db8::/32"]),
            ("", &["::1"]),
        ] {
            let record = record(scopes, sources);
            let packed = pack(&record).expect("not the default");
            let grants = Granted::Own(&packed).among(&[]);
            assert_eq!(grants.scopes(), scopes);
            assert!(grants.sources().eq(record.allowed_sources.iter().copied()));
        }
    }

    #[test]
    fn grants_are_shared_while_there_is_room() {
        let mut shared = SharedGrants::default();
        let packed = |number: usize| number.to_le_bytes();
        for number in 0..MAX_SHARED {
            let packed = packed(number);
            assert_eq!(shared.number(&packed), None);
            assert!(shared.has_room(&packed));
            shared.add(&packed);
        }
        assert!(!shared.has_room(&packed(MAX_SHARED)));
        for number in 0..MAX_SHARED {
            let found = shared.number(&packed(number)).expect("it was added");
            assert_eq!(
                Granted::Shared(found).among(shared.list()).0,
                packed(number)
            );
        }
        assert!(!SharedGrants::default().has_room(&[0; MAX_SHARED_LEN + 1]));
    }
}
