//! Fills a store with keys as fast as possible, with the types of the library.

use std::path::Path;

use ::relatch::{
    clock::Clock,
    control::{journal, served::FedKeyring},
    key::{
        AllowedSources, Change, ConsumerId, KeyId, KeyringName, MasterPepper, Prefix, Revision,
        Scopes, Secret, Timestamp, VersionNumber, Window, operation, version::NewVersion,
    },
    store::{LogName, MAX_APPEND, NewEntry, SqliteOptions, SqliteStore, Store},
};
use anyhow::Result;

/// The number of keys for a keyring, and the number of keys of each consumer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Seed {
    pub(crate) keys: u64,
    pub(crate) keys_per_consumer: u64,
}

/// A log that is being written.
struct Writer {
    store: SqliteStore,
    log: LogName,
    head: Revision,
    now: Timestamp,
    waiting: Vec<NewEntry>,
}

/// The actor in the audit log.
const ACTOR: &str = "bench";
/// The scopes of each key.
const SCOPES: &str = "orders.read orders.write";
/// The number of keys whose ids are returned, to revoke them later.
const RETURNED: usize = 10_000;

impl Seed {
    /// Creates `keyring` in the store at `path`, and returns the ids of some of its keys. Their secrets are not known.
    ///
    /// # Errors
    ///
    /// When the store cannot be written.
    pub(crate) async fn fill(
        &self,
        path: &Path,
        master: &MasterPepper,
        keyring: &str,
    ) -> Result<Vec<KeyId>> {
        let name: KeyringName = keyring.parse()?;
        let pepper = master.for_keyring(&name);
        let prefix = Prefix::default();
        let scopes = Scopes::parse(SCOPES)?;
        let mut writer = Writer {
            store: SqliteStore::open(path, SqliteOptions::default()).await?,
            log: LogName::Keyring(name.clone()),
            head: Revision::default(),
            now: Clock::system().wall(),
            waiting: Vec::with_capacity(MAX_APPEND),
        };
        let first = operation::create_keyring(name, prefix.clone(), false, None)?;
        writer.write(&first).await?;
        let mut some = Vec::new();
        let mut consumer: ConsumerId = "nobody".parse()?;
        for number in 0..self.keys {
            if number % self.keys_per_consumer == 0 {
                consumer = format!("consumer-{}", number / self.keys_per_consumer).parse()?;
                let made = Change::ConsumerCreated {
                    consumer: consumer.clone(),
                    name: String::new(),
                };
                writer.write(&made).await?;
            }
            let key_id = KeyId::generate()?;
            let secret = Secret::generate(&prefix, key_id)?;
            let made = Change::KeyCreated {
                key_id,
                consumer: consumer.clone(),
                name: String::new(),
                imported: false,
                scopes: scopes.clone(),
                allowed_sources: AllowedSources::default(),
                version: NewVersion {
                    number: VersionNumber::FIRST,
                    digest: pepper.digest(&secret.presented()),
                    pepper: pepper.id(),
                    window: Window::default(),
                },
            };
            writer.write(&made).await?;
            if some.len() < RETURNED {
                some.push(key_id);
            }
        }
        writer.flush().await?;
        Ok(some)
    }
}

impl Writer {
    async fn write(&mut self, change: &Change) -> Result<()> {
        let entry = journal::entry::<FedKeyring>(change, ACTOR, self.now);
        self.waiting.push(entry);
        if self.waiting.len() == MAX_APPEND {
            self.flush().await?;
        }
        Ok(())
    }

    async fn flush(&mut self) -> Result<()> {
        let entries = std::mem::replace(&mut self.waiting, Vec::with_capacity(MAX_APPEND));
        self.head = self
            .store
            .append(&self.log, self.head, entries)
            .await?
            .revision;
        Ok(())
    }
}
