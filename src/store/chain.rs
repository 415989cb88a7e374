//! The hash chain of a log: it reveals every edit, swap, gap and cut.
//!
//! The hash of an entry is SHA-256 over, in this order: the text `relatch.log.entry.v1`, the hash
//! of the entry before it, the name of the log, the revision, the time in milliseconds, the actor,
//! the kind, the payload. The length in bytes precedes each text and the payload; lengths and
//! numbers are 8 bytes, the most significant first. Two different entries therefore never have the
//! same encoding.
//!
//! The chain contains no secret. Anyone who can write to the store can create a new chain from any
//! entry on, and a new head. Only a comparison of the head with a copy that was noted elsewhere
//! reveals that; [`Verdict`] contains the head for this purpose.

use std::fmt;

use sha2::{Digest, Sha256};

use crate::key::Revision;

use super::{EntryHash, Head, LogEntry, LogName, MAX_PAGE, NewEntry, Store, StoreError};

/// The result of the verification of a log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Verdict {
    /// The head up to which the log was verified; note it outside the store.
    pub head: Head,
    /// The number of sound entries, counted from the first.
    pub entries: u64,
    /// The first place where the log differs from the committed one.
    pub problem: Option<Problem>,
}

/// A place where a log differs from the committed one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Problem {
    /// Revisions are missing.
    Gap {
        /// The last revision before the gap; 0 for a gap at the beginning.
        after: Revision,
        /// The first revision after the gap.
        next: Revision,
    },
    /// An entry was chained to another entry than the one before it.
    Unchained {
        /// The revision of the entry.
        revision: Revision,
        /// The hash that the entry was chained to.
        chained_to: EntryHash,
        /// The hash of the entry before it.
        found: EntryHash,
    },
    /// The content of an entry does not match its hash.
    Edited {
        /// The revision of the entry.
        revision: Revision,
    },
    /// The log ends before its head.
    Cut {
        /// The last revision; 0 if no entry is left.
        end: Revision,
        /// The last revision according to the head.
        head: Revision,
    },
    /// The last entry does not have the hash of the head.
    OtherHead {
        /// The revision of the last entry.
        revision: Revision,
        /// The hash of the last entry.
        found: EntryHash,
        /// The hash in the head.
        head: EntryHash,
    },
    /// The log continues after its head.
    Overhang {
        /// The last revision according to the head.
        head: Revision,
        /// The revision of the first entry after it.
        found: Revision,
    },
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Gap { after, next } => {
                write!(f, "gap: revision {after} is followed by revision {next}")
            }
            Self::Unchained {
                revision,
                chained_to,
                found,
            } => write!(
                f,
                "revision {revision} was chained to hash {chained_to}, but the entry before it has hash {found}: \
                 one of the two was edited, moved or replaced"
            ),
            Self::Edited { revision } => {
                write!(
                    f,
                    "revision {revision} was edited: its content does not match its hash"
                )
            }
            Self::Cut { end, head } => {
                write!(
                    f,
                    "cut: the head says revision {head}, but the log ends at revision {end}"
                )
            }
            Self::OtherHead {
                revision,
                found,
                head,
            } => write!(
                f,
                "the last entry was replaced: revision {revision} has hash {found}, but the head says {head}"
            ),
            Self::Overhang { head, found } => {
                write!(
                    f,
                    "the head says revision {head}, but there is a revision {found}"
                )
            }
        }
    }
}

/// Chains `entries` to `head`.
#[must_use]
pub fn link(head: &Head, entries: Vec<NewEntry>) -> Vec<LogEntry> {
    let mut revision = head.revision;
    let mut prev_hash = head.hash;
    entries
        .into_iter()
        .map(|new| {
            revision = revision.next();
            let mut entry = LogEntry {
                log: head.log.clone(),
                revision,
                at: new.at,
                actor: new.actor,
                kind: new.kind,
                payload: new.payload,
                prev_hash,
                hash: EntryHash::ZERO,
            };
            entry.hash = hash(&entry);
            prev_hash = entry.hash;
            entry
        })
        .collect()
}

/// Checks that `entry` is sound and follows the entry of revision `after` and hash `prev_hash`.
///
/// # Errors
///
/// The first difference: a gap, another predecessor, or an edit.
pub(crate) fn check_next(
    after: Revision,
    prev_hash: EntryHash,
    entry: &LogEntry,
) -> Result<(), Problem> {
    if entry.revision != after.next() {
        return Err(Problem::Gap {
            after,
            next: entry.revision,
        });
    }
    if entry.prev_hash != prev_hash {
        return Err(Problem::Unchained {
            revision: entry.revision,
            chained_to: entry.prev_hash,
            found: prev_hash,
        });
    }
    if entry.hash != hash(entry) {
        return Err(Problem::Edited {
            revision: entry.revision,
        });
    }
    Ok(())
}

/// Verifies `log` from its first entry to its head, a page at a time. Appends may happen meanwhile.
///
/// # Errors
///
/// [`StoreError::UnknownLog`], or when the store cannot be read.
pub async fn verify(store: &dyn Store, log: &LogName) -> Result<Verdict, StoreError> {
    let Some(head) = store.head(log).await? else {
        return Err(StoreError::UnknownLog { log: log.clone() });
    };
    let (mut revision, mut prev_hash) = (Revision::default(), EntryHash::ZERO);
    let mut problem = None;
    'pages: while revision < head.revision {
        let wanted = revision.behind(head.revision);
        let limit = usize::try_from(wanted).map_or(MAX_PAGE, |wanted| wanted.min(MAX_PAGE));
        let page = store.read(log, revision, limit).await?;
        if page.is_empty() {
            problem = Some(Problem::Cut {
                end: revision,
                head: head.revision,
            });
            break;
        }
        for entry in page {
            if let Err(found) = check_next(revision, prev_hash, &entry) {
                problem = Some(found);
                break 'pages;
            }
            (revision, prev_hash) = (entry.revision, entry.hash);
        }
    }
    if problem.is_none() {
        problem = check_end(store, &head, prev_hash).await?;
    }
    Ok(Verdict {
        head,
        entries: revision.get(),
        problem,
    })
}

/// Checks that the log ends with the entry that `head` names, which has hash `found`.
async fn check_end(
    store: &dyn Store,
    head: &Head,
    found: EntryHash,
) -> Result<Option<Problem>, StoreError> {
    if found != head.hash {
        return Ok(Some(Problem::OtherHead {
            revision: head.revision,
            found,
            head: head.hash,
        }));
    }
    let behind = store.read(&head.log, head.revision, 1).await?;
    let Some(entry) = behind.first() else {
        return Ok(None);
    };
    // An append in the meantime moved the head as well.
    let moved = store.head(&head.log).await?;
    if moved.is_some_and(|moved| moved.revision >= entry.revision) {
        return Ok(None);
    }
    Ok(Some(Problem::Overhang {
        head: head.revision,
        found: entry.revision,
    }))
}

fn hash(entry: &LogEntry) -> EntryHash {
    let mut encoded = Encoder(Sha256::new());
    encoded.text(b"relatch.log.entry.v1");
    encoded.0.update(entry.prev_hash.as_bytes());
    encoded.text(entry.log.as_str().as_bytes());
    encoded.0.update(entry.revision.get().to_be_bytes());
    encoded.0.update(entry.at.as_millis().to_be_bytes());
    encoded.text(entry.actor.as_bytes());
    encoded.text(entry.kind.as_bytes());
    encoded.text(&entry.payload);
    EntryHash::new(encoded.0.finalize().into())
}

struct Encoder(Sha256);

impl Encoder {
    fn text(&mut self, bytes: &[u8]) {
        self.0.update((bytes.len() as u64).to_be_bytes());
        self.0.update(bytes);
    }
}

#[cfg(test)]
mod tests {
    use crate::key::{KeyringName, Timestamp};

    use super::*;

    fn log() -> LogName {
        LogName::Keyring("payments".parse::<KeyringName>().expect("a valid name"))
    }

    fn new_entry(actor: &str, kind: &str, payload: &str) -> NewEntry {
        NewEntry {
            at: Timestamp::from_millis(1_798_761_600_000),
            actor: actor.into(),
            kind: kind.into(),
            payload: payload.into(),
        }
    }

    fn chain(len: usize) -> Vec<LogEntry> {
        let entries = vec![new_entry("alice", "k", "{}"); len];
        link(&Head::absent(log()), entries)
    }

    fn first_problem(entries: &[LogEntry]) -> Option<Problem> {
        let mut at = (Revision::default(), EntryHash::ZERO);
        entries.iter().find_map(|entry| {
            let problem = check_next(at.0, at.1, entry).err();
            at = (entry.revision, entry.hash);
            problem
        })
    }

    /// The expected hash was computed by another program, from the encoding as the module documents it.
    #[test]
    fn the_encoding_never_changes() {
        let entry = new_entry("alice", "keyring_created", r#"{"kind":"keyring_created"}"#);
        let linked = link(&Head::absent(log()), vec![entry]);
        assert_eq!(
            linked[0].hash.to_string(),
            "0a5b1c25cab5bbd9b1f071024b1b6698e2bf28e10b8f90d2e37202432381d5c8"
        );
    }

    #[test]
    fn every_field_is_hashed() {
        let sound = chain(1).remove(0);
        let edits: [fn(&mut LogEntry); 7] = [
            |entry| entry.log = LogName::Control,
            |entry| entry.revision = Revision::new(2),
            |entry| entry.at = entry.at.saturating_add(std::time::Duration::from_millis(1)),
            |entry| entry.actor.push('x'),
            |entry| entry.kind.push('x'),
            |entry| entry.payload.push(b' '),
            |entry| entry.prev_hash = entry.hash,
        ];
        for (number, edit) in edits.into_iter().enumerate() {
            let mut edited = sound.clone();
            edit(&mut edited);
            assert_ne!(hash(&edited), sound.hash, "edit {number} went unseen");
        }
    }

    #[test]
    fn bytes_cannot_move_between_fields() {
        let pairs = [("ab", "c"), ("a", "bc")];
        let [one, other] = pairs.map(|(actor, kind)| {
            link(&Head::absent(log()), vec![new_entry(actor, kind, "{}")])[0].hash
        });
        assert_ne!(one, other);
    }

    #[test]
    fn linking_in_steps_is_linking_at_once() {
        let whole = chain(5);
        let mut head = Head::absent(log());
        head.revision = whole[2].revision;
        head.hash = whole[2].hash;
        let rest = link(&head, vec![new_entry("alice", "k", "{}"); 2]);
        assert_eq!(rest, whole[3..]);
    }

    #[test]
    fn sound_chain_has_no_problem() {
        assert_eq!(first_problem(&chain(20)), None);
    }

    #[test]
    fn missing_first_entry_is_a_gap() {
        let problem = first_problem(&chain(3)[1..]).expect("a problem");
        assert_eq!(
            problem.to_string(),
            "gap: revision 0 is followed by revision 2"
        );
    }

    #[test]
    fn entry_rehashed_after_an_edit_breaks_the_next_one() {
        let mut entries = chain(10);
        entries[8].actor = "mallory".into();
        entries[8].hash = hash(&entries[8]);
        let problem = first_problem(&entries).expect("a problem");
        assert!(matches!(problem, Problem::Unchained { revision, .. } if revision.get() == 10));
    }
}
