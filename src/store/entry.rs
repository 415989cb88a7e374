//! The parts of a log: its name, its entries and its head.

use std::{fmt, str::FromStr};

use crate::key::{Epoch, KeyringName, Revision, Timestamp};

use super::{MAX_APPEND, MAX_ENTRY_LEN};

/// The name of a log. As text it is `_control`, which is not a valid name of a keyring, or the name
/// of the keyring.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum LogName {
    /// The log of the control plane: changes of admin tokens.
    Control,
    /// The log of a keyring.
    Keyring(KeyringName),
}

/// A text that is not the name of a log.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a log: use `_control` or the name of a keyring")]
pub struct ParseLogNameError;

/// SHA-256 of an entry and of all entries before it; all zeros before the first.
/// [`chain`](super::chain) defines the encoding.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash)]
pub struct EntryHash([u8; EntryHash::LEN]);

/// An entry to be appended.
#[derive(Clone, PartialEq, Eq)]
pub struct NewEntry {
    /// The time at which the change was decided.
    pub at: Timestamp,
    /// The originator of the change.
    pub actor: String,
    /// The kind of the change; it determines the fields of `payload`.
    pub kind: String,
    /// The change, as JSON.
    pub payload: Vec<u8>,
}

/// Entries that every store rejects.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EntryError {
    /// An append with more than [`MAX_APPEND`] entries.
    #[error("{count} changes at once: commit at most {MAX_APPEND} at a time")]
    TooMany {
        /// The number of entries.
        count: usize,
    },
    /// An entry with more than [`MAX_ENTRY_LEN`] bytes of actor, kind and payload.
    #[error("a change of {len} bytes: make it at most {MAX_ENTRY_LEN} bytes long")]
    TooLong {
        /// The number of these bytes.
        len: usize,
    },
    /// An actor or a kind contains a NUL character.
    #[error("the actor or the kind of a change has a NUL character: remove it")]
    Nul,
}

/// One committed change.
#[derive(Clone, PartialEq, Eq)]
pub struct LogEntry {
    /// The log that it belongs to.
    pub log: LogName,
    /// The position of the entry in the log, counted from 1.
    pub revision: Revision,
    /// The time at which the change was decided. The clocks of replicas differ, so it does not
    /// order the log.
    pub(crate) at: Timestamp,
    /// The originator of the change.
    pub actor: String,
    /// The kind of the change; it determines the fields of `payload`.
    pub(crate) kind: String,
    /// The change, as JSON: the bytes that were appended.
    pub payload: Vec<u8>,
    /// The hash of the entry before it.
    pub prev_hash: EntryHash,
    /// The hash of this entry.
    pub hash: EntryHash,
}

/// The end of a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Head {
    /// The name of the log.
    pub log: LogName,
    /// The epoch of the log; 0 while the log does not exist.
    pub epoch: Epoch,
    /// The revision of the last entry; 0 while the log does not exist.
    pub revision: Revision,
    /// The hash of the last entry.
    pub hash: EntryHash,
}

/// The position at which a writer expects the head of a log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Expected {
    /// The revision of the last entry; 0 for a log that does not exist.
    pub(crate) revision: Revision,
    /// The hash of that entry; none to accept any entry.
    pub(crate) hash: Option<EntryHash>,
}

impl Expected {
    /// Expects the entry with this revision and this hash.
    #[must_use]
    pub(crate) const fn at(revision: Revision, hash: EntryHash) -> Self {
        Self {
            revision,
            hash: Some(hash),
        }
    }

    /// Whether `head` is at the expected position.
    #[must_use]
    pub(crate) fn is(self, head: &Head) -> bool {
        self.revision == head.revision && self.hash.is_none_or(|hash| hash == head.hash)
    }
}

impl From<Revision> for Expected {
    fn from(revision: Revision) -> Self {
        Self {
            revision,
            hash: None,
        }
    }
}

impl LogName {
    const CONTROL: &'static str = "_control";

    /// Returns the name as text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        match self {
            Self::Control => Self::CONTROL,
            Self::Keyring(name) => name.as_str(),
        }
    }
}

impl FromStr for LogName {
    type Err = ParseLogNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == Self::CONTROL {
            return Ok(Self::Control);
        }
        text.parse()
            .map(Self::Keyring)
            .map_err(|_| ParseLogNameError)
    }
}

impl From<KeyringName> for LogName {
    fn from(name: KeyringName) -> Self {
        Self::Keyring(name)
    }
}

impl fmt::Display for LogName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl EntryHash {
    /// The length of a hash in bytes.
    pub(crate) const LEN: usize = 32;

    /// The hash before the first entry of a log.
    pub const ZERO: Self = Self([0; Self::LEN]);

    #[must_use]
    pub(crate) const fn new(bytes: [u8; Self::LEN]) -> Self {
        Self(bytes)
    }

    #[must_use]
    pub(crate) const fn as_bytes(&self) -> &[u8; Self::LEN] {
        &self.0
    }
}

impl fmt::Display for EntryHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for EntryHash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "EntryHash({self})")
    }
}

impl NewEntry {
    /// Checks that `entries` can be appended to any engine.
    ///
    /// # Errors
    ///
    /// When there are more than [`MAX_APPEND`], when one is longer than [`MAX_ENTRY_LEN`], or when
    /// an actor or a kind contains a NUL, which PostgreSQL cannot store in a text.
    pub(crate) fn check(entries: &[Self]) -> Result<(), EntryError> {
        if entries.len() > MAX_APPEND {
            return Err(EntryError::TooMany {
                count: entries.len(),
            });
        }
        for entry in entries {
            let len = entry.actor.len() + entry.kind.len() + entry.payload.len();
            if len > MAX_ENTRY_LEN {
                return Err(EntryError::TooLong { len });
            }
            if entry.actor.contains('\0') || entry.kind.contains('\0') {
                return Err(EntryError::Nul);
            }
        }
        Ok(())
    }
}

impl Head {
    /// Returns the head of a log that does not exist.
    #[must_use]
    pub fn absent(log: LogName) -> Self {
        Self {
            log,
            epoch: Epoch::default(),
            revision: Revision::default(),
            hash: EntryHash::ZERO,
        }
    }
}

// Payloads may be long and contain digests: only their length is printed.
impl fmt::Debug for NewEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("NewEntry")
            .field("at", &self.at)
            .field("actor", &self.actor)
            .field("kind", &self.kind)
            .field("payload_len", &self.payload.len())
            .finish()
    }
}

impl fmt::Debug for LogEntry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogEntry")
            .field("log", &self.log)
            .field("revision", &self.revision)
            .field("at", &self.at)
            .field("actor", &self.actor)
            .field("kind", &self.kind)
            .field("payload_len", &self.payload.len())
            .field("prev_hash", &self.prev_hash)
            .field("hash", &self.hash)
            .finish()
    }
}

/// Returns a new epoch. It is never 0, which means none, and has 53 bits, so that JSON readers that
/// use doubles for numbers keep it exact.
#[expect(clippy::disallowed_methods, reason = "this is the home of epochs")]
pub(super) fn random_epoch() -> Result<Epoch, getrandom::Error> {
    loop {
        let number = getrandom::u64()? >> 11;
        if number != 0 {
            return Ok(Epoch::new(number));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(actor: &str, payload: Vec<u8>) -> NewEntry {
        NewEntry {
            at: Timestamp::from_millis(0),
            actor: actor.into(),
            kind: "k".into(),
            payload,
        }
    }

    #[test]
    fn log_names_round_trip_through_text() {
        let keyring = LogName::from("payments".parse::<KeyringName>().expect("a valid name"));
        for (log, text) in [(LogName::Control, "_control"), (keyring, "payments")] {
            assert_eq!(log.to_string(), text);
            assert_eq!(text.parse(), Ok(log));
        }
        assert_eq!("_other".parse::<LogName>(), Err(ParseLogNameError));
    }

    #[test]
    fn hashes_print_as_hex() {
        let mut bytes = [0; EntryHash::LEN];
        bytes[0] = 0x0a;
        bytes[31] = 0xff;
        let hex = EntryHash::new(bytes).to_string();
        assert_eq!(hex.len(), 64);
        assert!(hex.starts_with("0a00") && hex.ends_with("00ff"));
    }

    #[test]
    fn payloads_are_not_printed() {
        let printed = format!("{:?}", entry("alice", b"digest".to_vec()));
        assert!(!printed.contains("digest") && !printed.contains("100, 105"));
        assert!(printed.contains("payload_len: 6"));
    }

    #[test]
    fn entries_are_bounded() {
        let longest = entry("a", vec![b' '; MAX_ENTRY_LEN - 2]);
        assert_eq!(NewEntry::check(std::slice::from_ref(&longest)), Ok(()));
        let longer = entry("a", vec![b' '; MAX_ENTRY_LEN - 1]);
        let len = MAX_ENTRY_LEN + 1;
        assert_eq!(NewEntry::check(&[longer]), Err(EntryError::TooLong { len }));
        assert_eq!(
            NewEntry::check(&[entry("a\0b", Vec::new())]),
            Err(EntryError::Nul)
        );
        let mut many = vec![entry("a", Vec::new()); MAX_APPEND];
        assert_eq!(NewEntry::check(&many), Ok(()));
        many.push(entry("a", Vec::new()));
        let count = MAX_APPEND + 1;
        assert_eq!(NewEntry::check(&many), Err(EntryError::TooMany { count }));
    }

    #[test]
    fn epochs_survive_a_double() {
        const MAX_EXACT: u64 = (1 << 53) - 1;
        for _ in 0..1_000 {
            let epoch = random_epoch().expect("the random source works").get();
            assert!(matches!(epoch, 1..=MAX_EXACT), "{epoch}");
        }
    }
}
