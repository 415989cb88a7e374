//! The data of a control plane: a store, the pepper that its digests need, and their one owner.
//!
//! A process that changes the data owns the store for that time: the control plane while it runs,
//! and the commands beside it. A pepper is created with its store, and never for an existing store,
//! because all keys of that store would be denied.

use std::{
    collections::BTreeMap,
    fmt, fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use super::{
    journal::{CommitError, LogError},
    secrets::{self, SecretFileError},
    token::{self, Role, Token, Tokens},
};
use crate::{
    clock::Clock,
    config::ControlSettings,
    control::fleet::Fleet,
    key::{MasterPepper, PepperCheck, PepperId, RandomError, Revision, Secret},
    serving::RowError,
    store::{
        AppendError, LogName, OwnerError, SqliteOptions, SqliteStore, Store, StoreError, StoreOwner,
    },
};

/// A store that this process owns, with its pepper.
#[derive(Debug)]
pub struct Data {
    pub(super) store: Arc<dyn Store>,
    pub(super) tokens: Tokens,
    pub(super) pepper: MasterPepper,
    // Released after the store is closed.
    pub(super) owner: StoreOwner,
}

/// The data of a control plane cannot be used or created.
#[derive(Debug, thiserror::Error)]
pub enum DataError {
    /// The store's rows of sidecars cannot be read.
    #[error(transparent)]
    Fleet(#[from] RowError),
    /// There is neither a store nor a pepper.
    #[error(
        "there is no store at {} and no pepper file {}: create both with `relatch control init`, or correct the paths",
        store.display(),
        pepper_file.display()
    )]
    Missing {
        /// The path of the missing store.
        store: PathBuf,
        /// The path of the missing pepper file.
        pepper_file: PathBuf,
    },
    /// There is a store without its pepper.
    #[error(
        "there is a store at {}, but no pepper file {}: restore the file from its copy; without it no key of the store can be verified, and with a new one every key would be denied",
        store.display(),
        pepper_file.display()
    )]
    PepperMissing {
        /// The path of the store.
        store: PathBuf,
        /// The path of the missing pepper file.
        pepper_file: PathBuf,
    },
    /// There is a pepper without its store.
    #[error(
        "there is a pepper file {}, but no store at {}: restore the store from a backup; for a new control plane choose other paths, or move the pepper file away, and keep it if there is a backup of its store",
        pepper_file.display(),
        store.display()
    )]
    StoreMissing {
        /// The path of the missing store.
        store: PathBuf,
        /// The path of the pepper file.
        pepper_file: PathBuf,
    },
    /// There are a store and a pepper already.
    #[error(
        "{} is already initialized: create further admin tokens with `relatch token create`, or with `relatch control recover-admin` when no admin token is left",
        store.display()
    )]
    Initialized {
        /// The path of the store.
        store: PathBuf,
    },
    /// The pepper belongs to another store.
    #[error(
        "{} is not the pepper of {}: the store expects {}, but the file has {}; restore the pepper file that belongs to this store, because with another pepper every key would be denied (check values are not secret)",
        pepper_file.display(),
        store.display(),
        Peppers(expected),
        Peppers(&BTreeMap::from([*found]))
    )]
    ForeignPepper {
        /// The path of the store.
        store: PathBuf,
        /// The path of the pepper file.
        pepper_file: PathBuf,
        /// The ids and check values of the peppers that the store expects.
        expected: BTreeMap<PepperId, PepperCheck>,
        /// The id and the check value of the pepper in the file.
        found: (PepperId, PepperCheck),
    },
    /// The store does not record which pepper belongs to it.
    #[error(
        "{} has entries but does not record which pepper belongs to it, so {} with {} may belong to another store; with another pepper every key would be denied permanently; if you are sure that it is the right one, start `relatch control` once with `--adopt-pepper`, which records it (check values are not secret)",
        store.display(),
        pepper_file.display(),
        Peppers(&BTreeMap::from([*found]))
    )]
    UnknownPepper {
        /// The path of the store.
        store: PathBuf,
        /// The path of the pepper file.
        pepper_file: PathBuf,
        /// The id and the check value of the pepper in the file.
        found: (PepperId, PepperCheck),
    },
    /// Another process owns the store.
    #[error(transparent)]
    Owner(#[from] OwnerError),
    /// The pepper cannot be used.
    #[error(transparent)]
    Secrets(#[from] SecretFileError),
    /// The store cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The control plane's own log cannot be followed.
    #[error(transparent)]
    Log(#[from] LogError),
    /// A change was not committed.
    #[error(transparent)]
    Commit(#[from] CommitError),
    /// The first entries were not written.
    #[error(transparent)]
    Append(#[from] AppendError),
    /// The operating system's random source failed.
    #[error(transparent)]
    Random(#[from] RandomError),
}

/// The treatment of a store that has entries and no check value of its pepper.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum UnknownPepper {
    /// The store is refused: the existing pepper may belong to another one.
    Refuse,
    /// The existing pepper becomes that of the store, because an operator states that it is the
    /// right one.
    Adopt,
}

/// The record of a store about its pepper.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct PepperRecord {
    /// The check value of every pepper that its digests need.
    pub(crate) expected: BTreeMap<PepperId, PepperCheck>,
    /// Whether any log of the store has an entry.
    pub(crate) has_entries: bool,
}

/// Displays peppers by their ids and the beginnings of their check values.
struct Peppers<'a>(&'a BTreeMap<PepperId, PepperCheck>);

/// The parts of the data that exist. A process that creates them holds the lock of the store
/// meanwhile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Parts {
    has_pepper: bool,
    has_store: bool,
}

/// New data, which this process still owns.
#[derive(Debug)]
pub struct NewData {
    /// The secret of the first admin token, which is not stored anywhere.
    pub token: Secret,
    /// The owner of the store, to be dropped once the token is saved.
    pub owner: StoreOwner,
}

/// The files and directories that a failed creation has to delete.
#[derive(Debug, Default)]
struct Created {
    /// The deepest first.
    directories: Vec<PathBuf>,
    files: Vec<PathBuf>,
    owner: Option<StoreOwner>,
}

/// The actor that creates the first token.
const INIT: &str = "relatch control init";
/// The actor that creates a token beside the store.
const RECOVER: &str = "relatch control recover-admin";
/// The file in which Linux reports which user logged in, also after `sudo`. See `credentials(7)`
/// and `audit_setloginuid(3)`.
const LOGIN_UID: &str = "/proc/self/loginuid";

/// Creates the directory, the pepper and the store of a control plane, and a first admin token,
/// which is returned and not stored anywhere. A creation that fails deletes what it created. If
/// another process owns the store, that process may be about to create a missing part: the call
/// waits for it, as a claim of the store waits.
///
/// A process that is killed in between leaves the pepper alone, or a store without a token, for which
/// [`recover_admin`] creates one.
///
/// # Errors
///
/// When there is a store or a pepper, and then nothing is written; when another process owns the store; or when something
/// cannot be created.
///
/// # Panics
///
/// Never: a successful creation has its owner.
pub async fn initialize(settings: &ControlSettings, clock: &Clock) -> Result<NewData, DataError> {
    if Parts::at(settings)?.are_incomplete() {
        StoreOwner::wait_until_free(&settings.store).await?;
    }
    Parts::at(settings)?.refuse_existing(settings)?;
    let mut created = Created::default();
    match created.fill(settings, clock).await {
        Ok(token) => Ok(NewData {
            token,
            owner: created.owner.expect("what was created has its owner"),
        }),
        Err(error) => {
            created.delete();
            Err(error)
        }
    }
}

/// Creates another admin token that does not expire, in the store of a control plane that is
/// stopped.
///
/// # Errors
///
/// When the control plane runs, or its data cannot be used.
pub(crate) async fn recover_admin(
    settings: &ControlSettings,
    clock: &Clock,
) -> Result<(Token, Secret), DataError> {
    let data = Data::open(settings, clock, RECOVER).await?;
    let actor = format!("{RECOVER} ({})", user());
    let created = data
        .tokens
        .create(&actor, "recovered admin", Role::Admin, None);
    Ok(created.await?)
}

impl Data {
    /// Claims the store for `command`, and checks that the pepper belongs to the store. If the
    /// store has no entry, because its creation did not end, the check value of the existing pepper
    /// is recorded in it.
    ///
    /// # Errors
    ///
    /// When a part is missing, another process owns the store, the pepper is another one or may be, or something cannot be
    /// read.
    pub async fn open(
        settings: &ControlSettings,
        clock: &Clock,
        command: &str,
    ) -> Result<Self, DataError> {
        Self::open_with(settings, clock, command, UnknownPepper::Refuse).await
    }

    /// Opens the data as [`open`](Self::open) does; `unknown` decides about a store that has
    /// entries and no check value.
    ///
    /// # Errors
    ///
    /// As [`open`](Self::open).
    pub(crate) async fn open_with(
        settings: &ControlSettings,
        clock: &Clock,
        command: &str,
        unknown: UnknownPepper,
    ) -> Result<Self, DataError> {
        let ControlSettings {
            store, pepper_file, ..
        } = settings;
        if Parts::usable(settings)? != Parts::WHOLE {
            StoreOwner::wait_until_free(store).await?;
            let Parts {
                has_pepper,
                has_store,
            } = Parts::usable(settings)?;
            if !(has_pepper && has_store) {
                return Err(lacking(settings, has_pepper, has_store));
            }
        }
        let owner = StoreOwner::claim(store, command, clock.wall()).await?;
        // The pepper is read after the claim: before, the process that creates it may not have
        // written all of it.
        let pepper = secrets::read_pepper(pepper_file)?;
        let store = SqliteStore::open(store, SqliteOptions::default()).await?;
        let store: Arc<dyn Store> = Arc::new(store);
        let tokens = Tokens::open(Arc::clone(&store), clock.clone(), &pepper).await?;
        let data = Self {
            store,
            tokens,
            pepper,
            owner,
        };
        data.check_pepper(settings, command, unknown).await?;
        Ok(data)
    }

    /// Starts a new epoch of every log after a restore, so that every sidecar loads its keyrings
    /// anew.
    ///
    /// # Errors
    ///
    /// When the store cannot be used.
    pub(crate) async fn begin_epoch(
        &self,
        settings: &ControlSettings,
        clock: &Clock,
    ) -> Result<(), DataError> {
        // Done first, so that a start that fails in between does not leave the times of the backup.
        let known = self.store.load_presence().await?;
        let fleet = Fleet::new(clock.clone(), settings.max_serve_for, known)?;
        fleet.distrust_rests();
        fleet.record_news(&*self.store).await?;
        for head in self.store.heads().await? {
            let head = self.store.rotate_epoch(&head.log).await?;
            tracing::warn!(log = %head.log, epoch = %head.epoch, "a new epoch has begun");
        }
        Ok(())
    }

    async fn check_pepper(
        &self,
        settings: &ControlSettings,
        command: &str,
        unknown: UnknownPepper,
    ) -> Result<(), DataError> {
        let record = PepperRecord {
            expected: self.tokens.peppers(),
            has_entries: !self.store.heads().await?.is_empty(),
        };
        match (record.check(settings, &self.pepper), unknown) {
            (Ok(()), _) | (Err(DataError::UnknownPepper { .. }), UnknownPepper::Adopt) => {}
            (Err(error), UnknownPepper::Refuse | UnknownPepper::Adopt) => return Err(error),
        }
        if record.expected.is_empty() {
            self.tokens.add_pepper(command, &self.pepper).await?;
            tracing::warn!(
                pepper = self.pepper.id().get(),
                check = self.pepper.check().fingerprint(),
                "the store did not record which pepper belongs to it: recorded the pepper of the file"
            );
        }
        Ok(())
    }
}

impl PepperRecord {
    /// Reads the record from a store at `path` that no process owns, without leaving a trace. None
    /// if it cannot be read without a trace: the store is in use, or a part of it is in its
    /// write-ahead log. It blocks.
    ///
    /// # Errors
    ///
    /// When the store cannot be read.
    pub(crate) fn at_rest(path: &Path) -> Result<Option<Self>, StoreError> {
        let found = SqliteStore::at_rest(path, &LogName::Control, token::PEPPER_ADDED)?;
        Ok(found.map(|found| Self {
            // An entry that cannot be read stops the start of the control plane anyway.
            expected: found
                .payloads
                .iter()
                .filter_map(|payload| token::recorded_pepper(payload))
                .collect(),
            has_entries: found.has_entries,
        }))
    }

    /// Checks that `pepper` belongs to the store. A store without entries has no digest that needs
    /// another one.
    ///
    /// # Errors
    ///
    /// When it belongs to another store, or may belong to one.
    pub(crate) fn check(
        &self,
        settings: &ControlSettings,
        pepper: &MasterPepper,
    ) -> Result<(), DataError> {
        let found = (pepper.id(), pepper.check());
        let (store, pepper_file) = (settings.store.clone(), settings.pepper_file.clone());
        if self.expected.is_empty() {
            return if self.has_entries {
                Err(DataError::UnknownPepper {
                    store,
                    pepper_file,
                    found,
                })
            } else {
                Ok(())
            };
        }
        if self.expected.get(&found.0) == Some(&found.1) {
            return Ok(());
        }
        Err(DataError::ForeignPepper {
            store,
            pepper_file,
            expected: self.expected.clone(),
            found,
        })
    }
}

impl Parts {
    const WHOLE: Self = Self {
        has_pepper: true,
        has_store: true,
    };

    /// Returns the parts by whether anything exists at their paths.
    fn at(settings: &ControlSettings) -> Result<Self, DataError> {
        Self::found(settings, "read the metadata of", |path| {
            fs::symlink_metadata(path)
        })
    }

    /// Returns the parts that can be used: a link that leads nowhere is no pepper.
    fn usable(settings: &ControlSettings) -> Result<Self, DataError> {
        Self::found(settings, "read", |path| fs::metadata(path))
    }

    fn found(
        settings: &ControlSettings,
        what: &'static str,
        look: impl FnOnce(&Path) -> io::Result<fs::Metadata>,
    ) -> Result<Self, DataError> {
        let path = &settings.pepper_file;
        let has_pepper = match look(path) {
            Ok(_) => true,
            Err(error) if error.kind() == io::ErrorKind::NotFound => false,
            Err(source) => {
                let path = path.clone();
                return Err(SecretFileError::Io { what, path, source }.into());
            }
        };
        let has_store = SqliteStore::is_at(&settings.store)?;
        Ok(Self {
            has_pepper,
            has_store,
        })
    }

    fn are_incomplete(self) -> bool {
        self.has_pepper != self.has_store
    }

    /// Refuses to create anything if a part exists.
    fn refuse_existing(self, settings: &ControlSettings) -> Result<(), DataError> {
        let Self {
            has_pepper,
            has_store,
        } = self;
        match (has_pepper, has_store) {
            (false, false) => Ok(()),
            (true, true) => Err(DataError::Initialized {
                store: settings.store.clone(),
            }),
            (true, false) | (false, true) => Err(lacking(settings, has_pepper, has_store)),
        }
    }
}

impl Created {
    /// Creates all parts. The pepper comes first: an existing store always has its pepper.
    async fn fill(
        &mut self,
        settings: &ControlSettings,
        clock: &Clock,
    ) -> Result<Secret, DataError> {
        let ControlSettings {
            data_dir,
            store,
            pepper_file,
            ..
        } = settings;
        let is_missing = |path: &&Path| *path != Path::new("") && !path.exists();
        let missing = data_dir.ancestors().take_while(is_missing);
        self.directories = missing.map(Path::to_owned).collect();
        secrets::ensure_directory(data_dir)?;
        let owner = StoreOwner::claim(store, INIT, clock.wall()).await?;
        // Another process may have been first.
        Parts::at(settings)?.refuse_existing(settings)?;
        self.owner = Some(owner);
        let pepper = secrets::create_pepper(pepper_file)?;
        self.files.push(pepper_file.clone());
        let (entries, secret) = token::first_entries(INIT, "first admin", &pepper, clock.wall())?;
        self.files.push(store.clone());
        let options = SqliteOptions {
            create: true,
            ..SqliteOptions::default()
        };
        let store = SqliteStore::open(store, options).await?;
        store
            .append(&LogName::Control, Revision::default(), entries)
            .await?;
        Ok(secret)
    }

    fn delete(self) {
        for file in self.files.iter().rev() {
            // If the store cannot be deleted, its pepper stays.
            if let Err(error) = fs::remove_file(file)
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(
                    path = %file.display(),
                    error = &error as &dyn std::error::Error,
                    "a file that the failed command created cannot be deleted"
                );
                return;
            }
        }
        if let Some(owner) = self.owner {
            owner.discard();
        }
        for directory in self.directories {
            // A directory that others have used meanwhile is not empty, and stays.
            drop(fs::remove_dir(directory));
        }
    }
}

impl fmt::Display for Peppers<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, (id, check)) in self.0.iter().enumerate() {
            let separator = if at == 0 { "" } else { " or " };
            let (id, check) = (id.get(), check.fingerprint());
            write!(f, "{separator}pepper {id} (check value {check})")?;
        }
        Ok(())
    }
}

/// Returns the error that names the missing parts.
pub(crate) fn lacking(settings: &ControlSettings, has_pepper: bool, has_store: bool) -> DataError {
    let (store, pepper_file) = (settings.store.clone(), settings.pepper_file.clone());
    match (has_pepper, has_store) {
        (false, true) => DataError::PepperMissing { store, pepper_file },
        (true, false) => DataError::StoreMissing { store, pepper_file },
        (false, false) | (true, true) => DataError::Missing { store, pepper_file },
    }
}

/// Returns the user of this process, for the audit log: by the system's numbers, because the
/// environment can contain anything.
fn user() -> String {
    let uid = rustix::process::getuid().as_raw();
    let login = fs::read_to_string(LOGIN_UID).ok();
    let login: Option<u32> = login.and_then(|text| text.trim().parse().ok());
    match login {
        Some(login) if login != uid && login != u32::MAX => {
            format!("user {uid}, logged in as user {login}")
        }
        Some(_) | None => format!("user {uid}"),
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;

    const PEPPER: [u8; 32] = [7; 32];

    /// A store with a token, from before stores knew their pepper.
    async fn former() -> (TempDir, ControlSettings) {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let settings = ControlSettings::new(dir.path().to_owned());
        write_pepper(&settings, PEPPER);
        let store: Arc<dyn Store> = Arc::new(create_store(&settings).await);
        let pepper = MasterPepper::new(PepperId::new(1), &PEPPER).expect("32 bytes");
        let tokens = Tokens::open(store, Clock::system(), &pepper).await;
        let tokens = tokens.expect("a sound store");
        let created = tokens.create("test", "one", Role::Admin, None).await;
        created.expect("it is created");
        (dir, settings)
    }

    async fn create_store(settings: &ControlSettings) -> SqliteStore {
        let options = SqliteOptions {
            create: true,
            ..SqliteOptions::default()
        };
        let store = SqliteStore::open(&settings.store, options).await;
        store.expect("a new store")
    }

    async fn adopt(settings: &ControlSettings) -> Result<Data, DataError> {
        let unknown = UnknownPepper::Adopt;
        Data::open_with(settings, &Clock::system(), "test", unknown).await
    }

    fn write_pepper(settings: &ControlSettings, secret: [u8; 32]) {
        let secret = crate::secret_file::to_hex(&secret);
        let json = format!("{{\"id\":1,\"secret\":\"{secret}\"}}");
        fs::write(&settings.pepper_file, json).expect("the directory is the test's");
    }

    #[tokio::test]
    async fn what_another_process_is_creating_is_not_missing() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let settings = ControlSettings::new(dir.path().to_owned());
        write_pepper(&settings, PEPPER);
        let clock = Clock::system();
        let creator = StoreOwner::claim(&settings.store, "creator", clock.wall()).await;
        let creator = creator.expect("nobody has it");
        let refused = [
            initialize(&settings, &clock).await.map(drop),
            open(&settings).await.map(drop),
        ];
        for refused in refused {
            let error = refused.expect_err("it is owned").to_string();
            assert!(error.contains("in use by `creator`"), "{error}");
        }
        // The creator was killed.
        drop(creator);
        let missing = open(&settings).await;
        assert!(
            matches!(missing, Err(DataError::StoreMissing { .. })),
            "{missing:?}"
        );
    }

    async fn open(settings: &ControlSettings) -> Result<Data, DataError> {
        Data::open(settings, &Clock::system(), "test").await
    }

    #[tokio::test]
    async fn a_store_with_entries_that_does_not_know_its_pepper_is_told_once_by_a_person() {
        let (_dir, settings) = former().await;
        let refused = open(&settings).await.expect_err("it may be another pepper");
        assert!(
            matches!(refused, DataError::UnknownPepper { .. }),
            "{refused:?}"
        );
        let said = refused.to_string();
        assert!(said.contains("--adopt-pepper"), "{said}");
        let recovered = recover_admin(&settings, &Clock::system()).await;
        assert!(
            matches!(recovered, Err(DataError::UnknownPepper { .. })),
            "{recovered:?}"
        );

        let data = adopt(&settings).await.expect("a person vouches for it");
        let known = data.tokens.peppers();
        assert_eq!(known.len(), 1);
        drop(data);
        let data = open(&settings).await.expect("it is its pepper");
        assert_eq!(data.tokens.peppers(), known);
        let head = data.store.head(&LogName::Control).await.expect("it reads");
        assert_eq!(head.expect("it has a log").revision, Revision::new(2));
        drop(data);

        write_pepper(&settings, [8; 32]);

        for refused in [open(&settings).await, adopt(&settings).await] {
            assert!(
                matches!(refused, Err(DataError::ForeignPepper { .. })),
                "{refused:?}"
            );
        }
    }

    #[tokio::test]
    async fn a_store_without_entries_gets_the_pepper_that_was_created_with_it() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let settings = ControlSettings::new(dir.path().to_owned());
        write_pepper(&settings, PEPPER);
        drop(create_store(&settings).await);

        let data = open(&settings).await.expect("no digest needs another one");

        assert_eq!(data.tokens.peppers().len(), 1);
        drop(data);
        write_pepper(&settings, [8; 32]);
        let refused = open(&settings).await;
        assert!(
            matches!(refused, Err(DataError::ForeignPepper { .. })),
            "{refused:?}"
        );
    }

    #[tokio::test]
    async fn a_creation_that_fails_leaves_nothing_behind() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let mut settings = ControlSettings::new(dir.path().join("new/data"));
        // The lock of such a name can be created, and the draft of the database cannot.
        settings.store = settings.data_dir.join("x".repeat(240));

        let failed = initialize(&settings, &Clock::system()).await;

        assert!(matches!(failed, Err(DataError::Store(_))), "{failed:?}");
        assert_eq!(fs::read_dir(dir.path()).expect("it reads").count(), 0);
        settings.store = settings.data_dir.join("relatch.db");
        let created = initialize(&settings, &Clock::system()).await;
        created.expect("nothing is in the way");
    }
}
