//! The saved form of a keyring: a head, and pages of consumers with their keys. With it, a start
//! does not read the whole log.
//!
//! The head is JSON. A page is a protobuf message, because most of the saved data is millions of
//! keys: a key of one version takes about a hundred bytes. Pages are encoded one after the other
//! from a keyring that does not change, and read one after the other: the whole data is never in
//! memory at once.

use std::{collections::HashMap, sync::Arc};

use prost::Message;

use super::journal::SaveState;
use crate::key::{
    AllowedSources, Consumer, ConsumerId, Key, KeyDigest, KeyId, KeyVersion, Keyring, KeyringHead,
    PagedMap, PepperId, Scopes, Timestamp, VersionNumber, VersionState, Window, note::NotesTold,
};

/// The format of the saved data. Other formats are ignored, and the log is read instead. Format 1
/// was JSON throughout.
pub(crate) const FORMAT: u32 = 2;

/// Saves a keyring page by page.
#[derive(Debug)]
pub(crate) struct Saver {
    keyring: Keyring,
    /// The start of the next page. None after the last page.
    next: Option<PageStart>,
}

/// Restores a saved keyring.
#[derive(Debug)]
pub(crate) struct Restorer {
    head: KeyringHead,
    consumers: Vec<(ConsumerId, Consumer)>,
    keys: Vec<(KeyId, Arc<Key>)>,
    scopes: HashMap<String, Scopes>,
    sources: HashMap<String, AllowedSources>,
}

/// The reasons why saved data cannot be restored.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SavedError {
    /// A page is not a valid message.
    #[error("a page is damaged")]
    Page(#[from] prost::DecodeError),
    /// A part is not the expected JSON.
    #[error("a part is damaged")]
    Json(#[from] serde_json::Error),
    /// A field has an invalid value.
    #[error("a saved {0} is damaged")]
    Field(&'static str),
    /// The keys contradict each other.
    #[error("the saved keys contradict each other")]
    Keys,
}

/// The consumer with which a page begins, and the key with which it continues. Without a key, the
/// page begins with the first key of the consumer.
#[derive(Clone, Debug)]
struct PageStart {
    consumer: ConsumerId,
    from: Option<KeyId>,
}

#[derive(Clone, PartialEq, Message)]
struct Page {
    #[prost(message, repeated, tag = "1")]
    consumers: Vec<SavedConsumer>,
}

/// A consumer with some of its keys. A consumer with more keys than fit into a page continues at
/// the beginning of the next one.
#[derive(Clone, PartialEq, Message)]
struct SavedConsumer {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(string, tag = "2")]
    name: String,
    #[prost(int64, tag = "3")]
    created_at: i64,
    #[prost(message, repeated, tag = "4")]
    keys: Vec<SavedKey>,
}

#[derive(Clone, PartialEq, Message)]
struct SavedKey {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(string, tag = "2")]
    name: String,
    #[prost(bool, tag = "3")]
    imported: bool,
    /// Separated by spaces.
    #[prost(string, tag = "4")]
    scopes: String,
    /// Separated by spaces.
    #[prost(string, tag = "5")]
    allowed_sources: String,
    /// JSON; empty when the key has no overrides.
    #[prost(string, tag = "6")]
    overrides: String,
    #[prost(message, repeated, tag = "7")]
    versions: Vec<SavedVersion>,
}

#[derive(Clone, PartialEq, Message)]
struct SavedVersion {
    #[prost(uint32, tag = "1")]
    number: u32,
    #[prost(bytes = "vec", tag = "2")]
    digest: Vec<u8>,
    #[prost(uint32, tag = "3")]
    pepper: u32,
    #[prost(int64, tag = "4")]
    created_at: i64,
    #[prost(int64, optional, tag = "5")]
    not_before: Option<i64>,
    #[prost(int64, optional, tag = "6")]
    expires_at: Option<i64>,
    #[prost(string, optional, tag = "7")]
    rotation: Option<String>,
    #[prost(enumeration = "SavedState", tag = "8")]
    state: i32,
    #[prost(int64, tag = "9")]
    since: i64,
    /// The time at which a pending version is withdrawn, or the deadline of a retiring version.
    #[prost(int64, tag = "10")]
    until: i64,
    #[prost(uint32, tag = "11")]
    replaced_by: u32,
    #[prost(string, tag = "12")]
    reason: String,
    #[prost(string, optional, tag = "13")]
    sink: Option<String>,
    /// JSON of what was announced about the version; empty for nothing.
    #[prost(string, tag = "14")]
    told: String,
    #[prost(string, optional, tag = "15")]
    staged_by: Option<String>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, prost::Enumeration)]
#[repr(i32)]
enum SavedState {
    Unknown = 0,
    Pending = 1,
    Active = 2,
    Retiring = 3,
    Retired = 4,
    Revoked = 5,
}

/// The most keys of a page: about 1 MiB. It is written within milliseconds, so that a commit waits
/// no longer for a page than for another commit.
const PAGE_KEYS: usize = 8_192;
/// The most consumers of a page: consumers without keys fill it too.
const PAGE_CONSUMERS: usize = 8_192;

impl Saver {
    /// Creates a saver of `keyring` as it is now.
    #[must_use]
    pub(crate) fn new(keyring: Keyring) -> Self {
        let first = keyring.consumers().keys().next().cloned();
        Self {
            next: first.map(|consumer| PageStart {
                consumer,
                from: None,
            }),
            keyring,
        }
    }

    fn consumer(&self, place: &PageStart, room: usize) -> (SavedConsumer, Option<KeyId>) {
        let consumer = &self.keyring.consumers()[&place.consumer];
        let mut ids = match place.from {
            Some(from) => consumer.keys.range_from(&from),
            None => consumer.keys.iter(),
        };
        let keys = ids.by_ref().take(room);
        let keys = keys
            .filter_map(|(id, ())| self.keyring.keys().get(id))
            .map(|key| save_key(key))
            .collect();
        let saved = SavedConsumer {
            id: place.consumer.to_string(),
            name: consumer.name.clone(),
            created_at: consumer.created_at.as_millis(),
            keys,
        };
        (saved, ids.next().map(|(id, ())| *id))
    }
}

impl SaveState for Saver {
    fn format(&self) -> u32 {
        FORMAT
    }

    fn head(&self) -> Vec<u8> {
        serde_json::to_vec(self.keyring.head()).expect("the keys of a head's maps are text")
    }
}

impl Iterator for Saver {
    type Item = Vec<u8>;

    fn next(&mut self) -> Option<Vec<u8>> {
        let mut place = self.next.take()?;
        let mut page = Page::default();
        let mut room = PAGE_KEYS;
        let mut rest = self.keyring.consumers().range_from(&place.consumer);
        // Skip the consumer with which the page begins.
        rest.next();
        loop {
            let (saved, goes_on) = self.consumer(&place, room);
            room -= saved.keys.len();
            page.consumers.push(saved);
            place.from = goes_on;
            if goes_on.is_none() {
                let Some((next, _)) = rest.next() else {
                    break;
                };
                place.consumer = next.clone();
            }
            if room == 0 || page.consumers.len() == PAGE_CONSUMERS {
                self.next = Some(place);
                break;
            }
        }
        Some(page.encode_to_vec())
    }
}

impl Restorer {
    /// Creates a restorer from a head.
    ///
    /// # Errors
    ///
    /// When the head is invalid.
    pub(crate) fn new(head: &[u8]) -> Result<Self, SavedError> {
        Ok(Self {
            head: serde_json::from_slice(head)?,
            consumers: Vec::new(),
            keys: Vec::new(),
            scopes: HashMap::new(),
            sources: HashMap::new(),
        })
    }

    /// Adds the next page.
    ///
    /// # Errors
    ///
    /// When the page or one of its fields is invalid. Pages that do not belong together are an
    /// error of [`Self::finish`].
    pub(crate) fn page(&mut self, page: &[u8]) -> Result<(), SavedError> {
        for saved in Page::decode(page)?.consumers {
            let goes_on = self.consumers.last().map(|(id, _)| id.as_str()) == Some(&saved.id);
            if !goes_on {
                let id: ConsumerId = parse("consumer", &saved.id)?;
                let consumer = Consumer {
                    name: saved.name,
                    created_at: Timestamp::from_millis(saved.created_at),
                    keys: PagedMap::default(),
                };
                self.consumers.push((id, consumer));
            }
            for key in saved.keys {
                let owner = self.consumers.last().map(|(id, _)| id.clone());
                let key = self.key(key, owner.ok_or(SavedError::Field("consumer"))?)?;
                if let Some((_, consumer)) = self.consumers.last_mut() {
                    consumer.keys.insert(key.id, ());
                }
                self.keys.push((key.id, Arc::new(key)));
            }
        }
        Ok(())
    }

    /// Returns the keyring.
    ///
    /// # Errors
    ///
    /// When its keys contradict each other.
    pub(crate) fn finish(self) -> Result<Keyring, SavedError> {
        let consumers = self.consumers.into_iter();
        let consumers = consumers.map(|(id, consumer)| (id, Arc::new(consumer)));
        Keyring::restore(self.head, consumers.collect(), self.keys).ok_or(SavedError::Keys)
    }

    fn key(&mut self, saved: SavedKey, consumer: ConsumerId) -> Result<Key, SavedError> {
        let scopes = self.scopes(saved.scopes)?;
        let allowed_sources = self.sources(saved.allowed_sources)?;
        Ok(Key {
            id: parse("key", &saved.id)?,
            consumer,
            name: saved.name,
            imported: saved.imported,
            scopes,
            allowed_sources,
            policy: match saved.overrides.as_str() {
                "" => None,
                json => Some(Arc::new(serde_json::from_str(json)?)),
            },
            versions: saved
                .versions
                .iter()
                .map(restore_version)
                .collect::<Result<_, _>>()?,
        })
    }

    fn scopes(&mut self, text: String) -> Result<Scopes, SavedError> {
        if let Some(scopes) = self.scopes.get(&text) {
            return Ok(scopes.clone());
        }
        let scopes = Scopes::parse(&text).map_err(|_| SavedError::Field("scope"))?;
        self.scopes.insert(text, scopes.clone());
        Ok(scopes)
    }

    fn sources(&mut self, text: String) -> Result<AllowedSources, SavedError> {
        if let Some(sources) = self.sources.get(&text) {
            return Ok(sources.clone());
        }
        let blocks: Vec<&str> = text.split_ascii_whitespace().collect();
        let sources = AllowedSources::parse(&blocks).map_err(|_| SavedError::Field("source"))?;
        self.sources.insert(text, sources.clone());
        Ok(sources)
    }
}

fn save_key(key: &Key) -> SavedKey {
    SavedKey {
        id: key.id.to_string(),
        name: key.name.clone(),
        imported: key.imported,
        scopes: key.scopes.to_string(),
        allowed_sources: key
            .allowed_sources
            .iter()
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join(" "),
        overrides: key.policy.as_ref().map_or_else(String::new, |overrides| {
            serde_json::to_string(&**overrides).expect("overrides have no map")
        }),
        versions: key.versions.values().map(save_version).collect(),
    }
}

fn save_version(version: &KeyVersion) -> SavedVersion {
    let saved = SavedVersion {
        number: version.number.get(),
        digest: version.digest.as_bytes().to_vec(),
        pepper: version.pepper.get(),
        created_at: version.created_at.as_millis(),
        not_before: version.window.not_before.map(Timestamp::as_millis),
        expires_at: version.window.expires_at.map(Timestamp::as_millis),
        rotation: version.rotation.map(|id| id.to_string()),
        staged_by: version.staged_by.map(|id| id.to_string()),
        told: if version.told.is_nothing() {
            String::new()
        } else {
            serde_json::to_string(&version.told).expect("what was told has no map")
        },
        ..SavedVersion::default()
    };
    match &version.state {
        VersionState::Pending {
            since,
            withdraw_after,
            sink,
        } => SavedVersion {
            state: SavedState::Pending.into(),
            since: since.as_millis(),
            until: withdraw_after.as_millis(),
            sink: sink.as_ref().map(ToString::to_string),
            ..saved
        },
        VersionState::Active { since } => SavedVersion {
            state: SavedState::Active.into(),
            since: since.as_millis(),
            ..saved
        },
        VersionState::Retiring {
            since,
            until,
            replaced_by,
        } => SavedVersion {
            state: SavedState::Retiring.into(),
            since: since.as_millis(),
            until: until.as_millis(),
            replaced_by: replaced_by.get(),
            ..saved
        },
        VersionState::Retired {
            since,
            replaced_by,
            reason,
        } => SavedVersion {
            state: SavedState::Retired.into(),
            since: since.as_millis(),
            replaced_by: replaced_by.get(),
            reason: reason.to_string(),
            ..saved
        },
        VersionState::Revoked { since, reason } => SavedVersion {
            state: SavedState::Revoked.into(),
            since: since.as_millis(),
            reason: reason.to_string(),
            ..saved
        },
    }
}

fn restore_version(saved: &SavedVersion) -> Result<KeyVersion, SavedError> {
    let since = Timestamp::from_millis(saved.since);
    let until = Timestamp::from_millis(saved.until);
    let replaced_by =
        || VersionNumber::new(saved.replaced_by).ok_or(SavedError::Field("successor"));
    let state = match SavedState::try_from(saved.state) {
        Ok(SavedState::Pending) => VersionState::Pending {
            since,
            withdraw_after: until,
            sink: parse_some("sink", saved.sink.as_deref())?,
        },
        Ok(SavedState::Active) => VersionState::Active { since },
        Ok(SavedState::Retiring) => VersionState::Retiring {
            since,
            until,
            replaced_by: replaced_by()?,
        },
        Ok(SavedState::Retired) => VersionState::Retired {
            since,
            replaced_by: replaced_by()?,
            reason: saved.reason.as_str().into(),
        },
        Ok(SavedState::Revoked) => VersionState::Revoked {
            since,
            reason: saved.reason.as_str().into(),
        },
        Ok(SavedState::Unknown) | Err(_) => return Err(SavedError::Field("state")),
    };
    Ok(KeyVersion {
        number: VersionNumber::new(saved.number).ok_or(SavedError::Field("version"))?,
        digest: KeyDigest::from_slice(&saved.digest).map_err(|_| SavedError::Field("digest"))?,
        pepper: PepperId::new(saved.pepper),
        created_at: Timestamp::from_millis(saved.created_at),
        window: Window {
            not_before: saved.not_before.map(Timestamp::from_millis),
            expires_at: saved.expires_at.map(Timestamp::from_millis),
        },
        rotation: parse_some("rotation", saved.rotation.as_deref())?,
        staged_by: parse_some("staged_by", saved.staged_by.as_deref())?,
        state,
        told: match saved.told.as_str() {
            "" => NotesTold::default(),
            json => serde_json::from_str(json)?,
        },
    })
}

fn parse_some<T: std::str::FromStr>(
    what: &'static str,
    text: Option<&str>,
) -> Result<Option<T>, SavedError> {
    text.map(|text| parse(what, text)).transpose()
}

fn parse<T: std::str::FromStr>(what: &'static str, text: &str) -> Result<T, SavedError> {
    text.parse().map_err(|_| SavedError::Field(what))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::key::{Change, Prefix, VersionRef, history, operation, testing};

    fn restored(keyring: &Keyring) -> Keyring {
        let saver = Saver::new(keyring.clone());
        let mut restorer = Restorer::new(&saver.head()).expect("a head");
        for page in saver {
            restorer.page(&page).expect("a page");
        }
        restorer.finish().expect("sound keys")
    }

    proptest! {
        #[test]
        fn every_keyring_reads_back(keyring in history::keyring()) {
            prop_assert_eq!(restored(&keyring), keyring);
        }
    }

    /// Creates a keyring with the given number of consumers, each with the given number of keys.
    fn keyring(consumers: usize, keys: usize) -> Keyring {
        let now = Timestamp::from_millis(1_000);
        let name = testing::keyring_name();
        let first = operation::create_keyring(name, Prefix::default(), false, None);
        let mut keyring = Keyring::begin(now, &first.expect("valid")).expect("a first change");
        let mut apply = |change| {
            let revision = keyring.revision().next();
            keyring
                .apply(revision, now, &change)
                .expect("it is possible");
        };
        for consumer in 0..consumers {
            let consumer: ConsumerId = format!("consumer-{consumer}").parse().expect("valid");
            apply(Change::ConsumerCreated {
                consumer: consumer.clone(),
                name: "Somebody".to_owned(),
            });
            for _ in 0..keys {
                let mut record = testing::record();
                record.consumer = consumer.clone();
                apply(history::creation(&record));
            }
        }
        keyring
    }

    #[test]
    fn pages_are_bounded_and_go_on_where_the_former_one_ended() {
        for (consumers, keys, pages) in [
            (0, 0, 0),
            (PAGE_CONSUMERS + 1, 0, 2),
            (3, PAGE_KEYS / 2 + 1, 2),
            (1, 2 * PAGE_KEYS, 2),
        ] {
            let keyring = keyring(consumers, keys);
            assert_eq!(Saver::new(keyring.clone()).count(), pages);
            assert_eq!(restored(&keyring), keyring);
        }
    }

    #[test]
    fn damage_is_noticed() {
        let keyring = keyring(1, 2);
        let page = Saver::new(keyring.clone()).next().expect("a page");
        let restorer = || Restorer::new(&Saver::new(keyring.clone()).head()).expect("a head");
        assert!(restorer().page(&page[..page.len() - 1]).is_err());
        let mut twice = restorer();
        for _ in 0..2 {
            twice.page(&page).expect("a page");
        }
        assert!(matches!(twice.finish(), Err(SavedError::Keys)));
        assert!(Restorer::new(b"{}").is_err());
    }

    #[test]
    fn what_is_restored_is_found() {
        let keyring = restored(&keyring(2, 3));
        for (key_id, key) in keyring.keys() {
            let version = key.active().expect("it is active");
            let which = VersionRef {
                key_id: *key_id,
                version: version.number,
            };
            assert_eq!(keyring.find(&version.digest), Some(which));
        }
    }
}
