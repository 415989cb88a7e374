//! All keyrings of a control plane.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, PoisonError, RwLock,
        atomic::{AtomicI64, Ordering},
    },
};

use tokio::sync::watch;

use super::{
    journal::{self, CommitError, Committed, Journal, LogError},
    served::{FedKeyring, ServedKeyring},
};
use crate::{
    clock::Clock,
    key::{Change, Epoch, KeyId, Keyring, KeyringName, MasterPepper, Refusal, Timestamp},
    store::{AppendError, LogName, Store},
};

/// The keyrings, where they are kept, and who is told of their changes.
#[derive(Debug)]
pub struct Catalog {
    store: Arc<dyn Store>,
    clock: Clock,
    pepper: MasterPepper,
    keyrings: RwLock<BTreeMap<KeyringName, Arc<ServedKeyring>>>,
    /// Counts changes of any keyring; wakes the streams.
    changes: watch::Sender<u64>,
    /// When the store was last read successfully.
    as_of: AtomicI64,
}

impl Catalog {
    /// Loads every keyring of the store.
    ///
    /// # Errors
    ///
    /// When a log cannot be followed.
    pub async fn open(
        store: Arc<dyn Store>,
        clock: Clock,
        pepper: MasterPepper,
    ) -> Result<Self, LogError> {
        let catalog = Self {
            store,
            clock,
            pepper,
            keyrings: RwLock::new(BTreeMap::new()),
            changes: watch::Sender::new(0),
            as_of: AtomicI64::new(0),
        };
        catalog.refresh().await?;
        Ok(catalog)
    }

    /// The clock that commits are dated by.
    #[must_use]
    pub const fn clock(&self) -> &Clock {
        &self.clock
    }

    /// The store.
    #[must_use]
    pub const fn store(&self) -> &Arc<dyn Store> {
        &self.store
    }

    /// One keyring.
    ///
    /// # Errors
    ///
    /// When it does not exist.
    pub fn get(&self, name: &KeyringName) -> Result<Arc<ServedKeyring>, Refusal> {
        self.read()
            .get(name)
            .cloned()
            .ok_or_else(|| Refusal::NotFound {
                what: "keyring",
                name: name.to_string(),
            })
    }

    /// The keyring that holds a key.
    ///
    /// # Errors
    ///
    /// When none does.
    pub fn holding(&self, key_id: KeyId) -> Result<Arc<ServedKeyring>, Refusal> {
        self.read()
            .values()
            .find(|served| {
                served
                    .journal()
                    .state()
                    .keyring
                    .keys()
                    .contains_key(&key_id)
            })
            .cloned()
            .ok_or_else(|| Refusal::NotFound {
                what: "key",
                name: key_id.to_string(),
            })
    }

    /// All keyrings by name.
    #[must_use]
    pub fn list(&self) -> Vec<Arc<ServedKeyring>> {
        self.read().values().cloned().collect()
    }

    /// Wakes whenever a keyring has changed or was made.
    #[must_use]
    pub fn watch(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// When the store was last read successfully: how fresh the keyrings are.
    #[must_use]
    pub fn as_of(&self) -> Timestamp {
        Timestamp::from_millis(self.as_of.load(Ordering::Relaxed))
    }

    /// Makes a keyring from the first change of its log.
    ///
    /// # Errors
    ///
    /// When it exists, or the store fails.
    pub async fn create_keyring(
        &self,
        actor: &str,
        name: KeyringName,
        first: &Change,
    ) -> Result<Arc<ServedKeyring>, CommitError> {
        let at = self.clock.wall();
        let log = LogName::Keyring(name.clone());
        let entry = journal::entry::<FedKeyring>(first, actor, at);
        let exists = Refusal::AlreadyExists {
            what: "keyring",
            name: name.to_string(),
        };
        match self
            .store
            .append(&log, crate::key::Revision::default(), vec![entry])
            .await
        {
            Ok(head) => Ok(self.serve(name, head.epoch).await?),
            Err(AppendError::Conflict { .. }) => Err(exists.into()),
            Err(AppendError::Invalid(error)) => Err(LogError::from(error).into()),
            Err(AppendError::Store(error)) => Err(LogError::from(error).into()),
        }
    }

    /// Commits what `plan` returns for a keyring, and tells its sidecars.
    ///
    /// # Errors
    ///
    /// When the plan is refused, or the store fails.
    pub async fn commit<T>(
        &self,
        served: &ServedKeyring,
        actor: &str,
        mut plan: impl FnMut(&Keyring, Timestamp) -> Result<(Vec<Change>, T), CommitError>,
    ) -> Result<Committed<T>, CommitError> {
        let committed = served
            .journal()
            .commit(actor, |state, now| plan(&state.keyring, now))
            .await?;
        self.wake();
        Ok(committed)
    }

    /// Follows what other processes have committed, and notes that the store could be read.
    ///
    /// # Errors
    ///
    /// When the store cannot be read or a log cannot be followed.
    pub async fn refresh(&self) -> Result<(), LogError> {
        let began = self.clock.wall();
        let heads = self.store.heads().await.map_err(LogError::from)?;
        for head in heads {
            let LogName::Keyring(name) = head.log else {
                continue;
            };
            let held = self.read().get(&name).cloned();
            match held {
                Some(served) if served.epoch() == head.epoch => {
                    if served.revision() < head.revision {
                        served.journal().catch_up().await?;
                        self.wake();
                    }
                }
                Some(_) | None => {
                    self.serve(name, head.epoch).await?;
                }
            }
        }
        self.as_of.fetch_max(began.as_millis(), Ordering::Relaxed);
        Ok(())
    }

    async fn serve(&self, name: KeyringName, epoch: Epoch) -> Result<Arc<ServedKeyring>, LogError> {
        let log = LogName::Keyring(name.clone());
        let first = self
            .store
            .read(&log, crate::key::Revision::default(), 1)
            .await?;
        let state = first
            .first()
            .ok_or(crate::store::StoreError::UnknownLog { log: log.clone() })
            .map_err(LogError::from)
            .and_then(|entry| {
                let change = journal::decode(entry)?;
                FedKeyring::begin(epoch, entry.at, &change).map_err(|source| LogError::Apply {
                    log: log.clone(),
                    source,
                })
            })?;
        let journal = Journal::open(
            Arc::clone(&self.store),
            self.clock.clone(),
            log,
            epoch,
            state,
        )
        .await?;
        let served = Arc::new(ServedKeyring::new(journal, self.pepper.for_keyring(&name)));
        let served = {
            let mut keyrings = self
                .keyrings
                .write()
                .unwrap_or_else(PoisonError::into_inner);
            match keyrings.get(&name) {
                // Another task was first; one journal is the writer.
                Some(held) if held.epoch() == epoch => Arc::clone(held),
                Some(_) | None => {
                    keyrings.insert(name, Arc::clone(&served));
                    served
                }
            }
        };
        self.wake();
        Ok(served)
    }

    fn wake(&self) {
        self.changes
            .send_modify(|count| *count = count.wrapping_add(1));
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, BTreeMap<KeyringName, Arc<ServedKeyring>>> {
        self.keyrings.read().unwrap_or_else(PoisonError::into_inner)
    }
}
