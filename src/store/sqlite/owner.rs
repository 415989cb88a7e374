//! The owner of a database: the one process that may serve from it, or change it while no process
//! serves.
//!
//! The owner holds an advisory lock (`flock`) on a file beside the database as long as it lives.
//! The kernel releases the lock when the process ends, however it ends; no other process inherits
//! it, because the file is closed on exec. The lock is not on the database itself: the close of any
//! descriptor of that file drops the locks that SQLite holds there. The content of the lock file
//! describes the owner, for messages only.

use std::{
    ffi::OsString,
    fmt,
    fs::{self, File, OpenOptions, TryLockError},
    io,
    os::unix::{
        ffi::OsStrExt,
        fs::{FileExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::fs::{Access, AtFlags, CWD, OFlags};
use serde::{Deserialize, Serialize};

use crate::key::Timestamp;

/// The ownership of a store, until this value is dropped.
#[derive(Debug)]
pub struct StoreOwner {
    lock: PathBuf,
    /// Holds the lock. The lock is released when this file is closed.
    file: File,
    owner: Owner,
}

/// The description that a process gives of itself as the owner of a store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Owner {
    /// The command that the process runs, such as `relatch control`.
    pub(crate) command: String,
    /// The process id, which is valid on its own host or in its own container.
    pub(crate) process: u32,
    pub(crate) host: String,
    /// The time at which the process became the owner.
    pub(crate) since: Timestamp,
    /// Whether the process is stopping, so that the store will be free soon.
    #[serde(default)]
    pub(crate) is_stopping: bool,
}

/// The reason that this process cannot own a store.
#[derive(Debug, thiserror::Error)]
pub enum OwnerError {
    /// Another process owns it.
    #[error(
        "{store} is in use by {}: a store has one owner, so stop that process first; the lock {} is released when the process ends, do not delete it",
        Named(owner.as_ref()),
        lock.display()
    )]
    Held {
        /// The path of the database.
        store: String,
        /// The path of the lock file.
        lock: PathBuf,
        /// The owner; none if the lock file does not describe it.
        owner: Option<Owner>,
    },
    /// The database has several names, and SQLite keeps a write-ahead log for each of them.
    #[error(
        "{store} has {links} names (hard links): keep only one, because two processes that use different names would destroy the database"
    )]
    Linked {
        /// The path of the database.
        store: String,
        /// The number of names.
        links: u64,
    },
    /// The file system has no locks.
    #[error(
        "the file system of {} does not support locks (flock): move the store to a local file system",
        lock.display()
    )]
    Unsupported {
        /// The path of the lock file.
        lock: PathBuf,
        source: io::Error,
    },
    /// The lock cannot be created or opened.
    #[error(
        "cannot lock {}: it and its directory must be readable and writable for the user that runs relatch",
        lock.display()
    )]
    Io {
        /// The path of the lock file.
        lock: PathBuf,
        source: io::Error,
    },
}

/// The result of a look at the ownership from outside.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ownership {
    /// No process owns the store.
    Free,
    /// A process owns the store; none if the lock file does not describe it.
    Held(Option<Owner>),
}

/// Displays an owner in words.
pub(crate) struct Named<'a>(pub(crate) Option<&'a Owner>);

/// The result of one attempt to acquire the lock.
enum Attempt {
    Taken(File),
    Held(Option<Owner>),
}

/// The time for which a process that was just killed may still hold the lock: the kernel first
/// frees its memory, which needs a moment for gigabytes.
const LEAVING: Duration = Duration::from_secs(1);
/// The time for which a process that is stopping may still hold the lock: a control plane drains
/// for 10 s and sends its last spans for 3 s.
const STOPPING: Duration = Duration::from_secs(15);
/// The interval of the attempts while waiting: people do not notice this delay.
const POLL: Duration = Duration::from_millis(20);
/// The most bytes of the lock file that are read: an owner needs about 150, and a host name has at
/// most 255.
const MAX_LEN: usize = 1024;
/// The marker in the names of drafts, in which databases are built.
const DRAFT: &str = ".new-";

impl StoreOwner {
    /// Acquires the ownership of the database at `store`, as `command`. The directory of the
    /// database must exist.
    ///
    /// When the owner is another process that is stopping, this waits for up to 15 s; otherwise for
    /// up to 1 s, for a process that was just killed.
    ///
    /// Cancel safe: a dropped future owns nothing.
    ///
    /// # Errors
    ///
    /// When another process owns the database, or the lock cannot be acquired.
    pub(crate) async fn claim(
        store: &Path,
        command: &str,
        now: Timestamp,
    ) -> Result<Self, OwnerError> {
        let store = resolved(store).map_err(|source| OwnerError::Io {
            lock: beside(store),
            source,
        })?;
        let lock = beside(&store);
        let mut waited = Duration::ZERO;
        let mut is_told = false;
        let file = loop {
            let owner = match attempt(&store, &lock)? {
                Attempt::Taken(file) => break file,
                Attempt::Held(owner) => owner,
            };
            if waited >= patience(owner.as_ref()) {
                let store = store.display().to_string();
                return Err(OwnerError::Held { store, lock, owner });
            }
            if is_stopping(owner.as_ref()) && !is_told {
                tracing::warn!(
                    store = %store.display(),
                    "waiting for the end of {}, which is stopping",
                    Named(owner.as_ref())
                );
                is_told = true;
            }
            tokio::time::sleep(POLL).await;
            waited += POLL;
        };
        check_names(&store)?;
        let owner = Owner {
            command: command.to_owned(),
            process: std::process::id(),
            host: host(),
            since: now,
            is_stopping: false,
        };
        let claimed = Self { lock, file, owner };
        claimed.write();
        Ok(claimed)
    }

    /// Returns the owner of the database at `store`, without owning it. The function holds a shared
    /// lock for microseconds, so that two processes that look do not find each other. A process
    /// that claims the store in these microseconds tries again. Nothing is created or changed.
    ///
    /// # Errors
    ///
    /// When the lock is free but could not be acquired.
    pub(crate) fn look(store: &Path) -> Result<Ownership, OwnerError> {
        let store = match resolved(store) {
            Ok(store) => store,
            // Without its directory the lock does not exist either.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Ownership::Free),
            Err(source) => {
                let lock = beside(store);
                return Err(OwnerError::Io { lock, source });
            }
        };
        look_at(&beside(&store))
    }

    /// Waits until no process owns the database at `store`, for as long as [`claim`](Self::claim)
    /// waits. Nothing is created.
    ///
    /// Cancel safe.
    ///
    /// # Errors
    ///
    /// When another process keeps the database, or the lock cannot be inspected.
    pub(crate) async fn wait_until_free(store: &Path) -> Result<(), OwnerError> {
        let mut waited = Duration::ZERO;
        loop {
            let owner = match Self::look(store)? {
                Ownership::Free => return Ok(()),
                Ownership::Held(owner) => owner,
            };
            if waited >= patience(owner.as_ref()) {
                let store = resolved(store).unwrap_or_else(|_| store.to_owned());
                let lock = beside(&store);
                let store = store.display().to_string();
                return Err(OwnerError::Held { store, lock, owner });
            }
            tokio::time::sleep(POLL).await;
            waited += POLL;
        }
    }

    /// Checks whether [`claim`](Self::claim) would refuse the database at `store` because of its
    /// names. Nothing is deleted.
    ///
    /// # Errors
    ///
    /// When the database has several names, not counting drafts of its creation.
    pub(crate) fn look_at_names(store: &Path) -> Result<(), OwnerError> {
        // A database that cannot be found has no names.
        let Ok(store) = resolved(store) else {
            return Ok(());
        };
        let Ok(metadata) = fs::metadata(&store) else {
            return Ok(());
        };
        if !metadata.is_file() || metadata.nlink() == 1 {
            return Ok(());
        }
        // Drafts do not count: the next owner deletes them.
        let drafts = drafts(&store, &metadata).len() as u64;
        let links = metadata.nlink().saturating_sub(drafts);
        if links > 1 {
            let store = store.display().to_string();
            return Err(OwnerError::Linked { store, links });
        }
        Ok(())
    }

    /// Records in the lock file that this process is stopping, for processes that wait for the
    /// store.
    pub(crate) fn note_stop(&self) {
        let owner = Owner {
            is_stopping: true,
            ..self.owner.clone()
        };
        write(&self.file, &self.lock, &owner);
    }

    /// Deletes the lock file, together with a store that was not completed.
    pub(crate) fn discard(self) {
        // A file that stays does no harm.
        drop(fs::remove_file(&self.lock));
    }

    fn write(&self) {
        write(&self.file, &self.lock, &self.owner);
    }
}

impl Drop for StoreOwner {
    fn drop(&mut self) {
        // A child that this process is about to start holds a copy of the descriptor until it
        // executes its program, and the close of one copy alone does not release the lock. If the
        // unlock fails, the next owner waits for that moment.
        drop(self.file.unlock());
    }
}

impl fmt::Display for Named<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Some(owner) = self.0 else {
            return f.write_str("another process, which the lock does not name");
        };
        write!(
            f,
            "`{}`, process {} on {}, since {}",
            owner.command,
            owner.process,
            owner.host,
            humantime::format_rfc3339_seconds(owner.since.into())
        )
    }
}

/// Tries the lock once. The file is created if it does not exist.
fn attempt(store: &Path, lock: &Path) -> Result<Attempt, OwnerError> {
    let failed = |source| OwnerError::Io {
        lock: lock.to_owned(),
        source,
    };
    loop {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
            .open(lock)
            .map_err(failed)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Ok(Attempt::Held(read(&file))),
            Err(TryLockError::Error(source)) if is_unsupported(&source) => {
                let lock = lock.to_owned();
                return Err(OwnerError::Unsupported { lock, source });
            }
            Err(TryLockError::Error(source)) => return Err(failed(source)),
        }
        if lies_at(&file, lock).map_err(failed)? {
            give_to_owner_of(store, &file);
            return Ok(Attempt::Taken(file));
        }
    }
}

/// Tries the lock for a moment, if its file exists.
fn look_at(lock: &Path) -> Result<Ownership, OwnerError> {
    let failed = |source| OwnerError::Io {
        lock: lock.to_owned(),
        source,
    };
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
        .open(lock);
    let file = match opened {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Ownership::Free),
        Err(source) => return Err(failed(source)),
    };
    match file.try_lock_shared() {
        // The close at the end of this function releases it.
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => return Ok(Ownership::Held(read(&file))),
        Err(TryLockError::Error(source)) if is_unsupported(&source) => {
            let lock = lock.to_owned();
            return Err(OwnerError::Unsupported { lock, source });
        }
        Err(TryLockError::Error(source)) => return Err(failed(source)),
    }
    // The owner writes its description into the file.
    rustix::fs::accessat(CWD, lock, Access::WRITE_OK, AtFlags::EACCESS)
        .map_err(|error| failed(error.into()))?;
    Ok(Ownership::Free)
}

fn is_stopping(owner: Option<&Owner>) -> bool {
    owner.is_some_and(|owner| owner.is_stopping)
}

/// Returns the time for which a claim waits for this owner.
fn patience(owner: Option<&Owner>) -> Duration {
    if is_stopping(owner) {
        STOPPING
    } else {
        LEAVING
    }
}

/// Whether the file is still at its path. If it was deleted after the open, its lock excludes no
/// other process.
fn lies_at(file: &File, lock: &Path) -> io::Result<bool> {
    let ours = file.metadata()?;
    let here = fs::symlink_metadata(lock);
    Ok(here.is_ok_and(|here| (here.dev(), here.ino()) == (ours.dev(), ours.ino())))
}

/// Root may run a command on the store of another user. That user must be able to lock the store
/// afterwards.
fn give_to_owner_of(store: &Path, file: &File) {
    let (Ok(store), Ok(lock)) = (fs::metadata(store), file.metadata()) else {
        return;
    };
    if rustix::process::geteuid().is_root() && store.uid() != lock.uid() {
        let given = std::os::unix::fs::fchown(file, Some(store.uid()), Some(store.gid()));
        if let Err(error) = given {
            tracing::warn!(
                error = &error as &dyn std::error::Error,
                "the user of the store could not be made the owner of the lock file"
            );
        }
    }
}

/// Writes the description of the owner. A full disk does not prevent the ownership: only messages
/// lack the description then.
fn write(file: &File, lock: &Path, owner: &Owner) {
    let json = serde_json::to_vec(owner).expect("an owner has nothing but texts and numbers");
    let written = file.set_len(0).and_then(|()| file.write_all_at(&json, 0));
    if let Err(error) = written {
        tracing::warn!(
            lock = %lock.display(),
            error = &error as &dyn std::error::Error,
            "the process that owns the store could not be recorded in the lock file"
        );
    }
}

/// Returns the description of the lock's holder; none if it is missing or incomplete.
fn read(file: &File) -> Option<Owner> {
    let mut bytes = vec![0; MAX_LEN];
    let len = file.read_at(&mut bytes, 0).ok()?;
    serde_json::from_slice(&bytes[..len]).ok()
}

/// Returns the path of the database without symbolic links, so that all paths to the database lead
/// to one lock.
fn resolved(store: &Path) -> io::Result<PathBuf> {
    match store.canonicalize() {
        // The database does not exist yet.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let name = store.file_name().ok_or(error)?;
            let directory = match store.parent() {
                Some(parent) if parent != Path::new("") => parent,
                Some(_) | None => Path::new("."),
            };
            Ok(directory.canonicalize()?.join(name))
        }
        resolved => resolved,
    }
}

/// Refuses a database with several names. It first deletes the names that an interrupted creation
/// left.
fn check_names(store: &Path) -> Result<(), OwnerError> {
    let Ok(metadata) = fs::metadata(store) else {
        return Ok(());
    };
    if metadata.nlink() > 1 {
        delete_drafts(store, &metadata);
    }
    match fs::metadata(store) {
        Ok(metadata) if metadata.is_file() && metadata.nlink() > 1 => Err(OwnerError::Linked {
            store: store.display().to_string(),
            links: metadata.nlink(),
        }),
        Ok(_) | Err(_) => Ok(()),
    }
}

fn delete_drafts(store: &Path, database: &fs::Metadata) {
    for draft in drafts(store, database) {
        // A draft that cannot be deleted is reported as another name.
        drop(fs::remove_file(draft));
    }
}

/// Returns the names that an interrupted creation left.
fn drafts(store: &Path, database: &fs::Metadata) -> Vec<PathBuf> {
    let (Some(directory), Some(name)) = (store.parent(), store.file_name()) else {
        return Vec::new();
    };
    let prefix = [name.as_bytes(), DRAFT.as_bytes()].concat();
    let is_same =
        |draft: fs::Metadata| (draft.dev(), draft.ino()) == (database.dev(), database.ino());
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    entries
        .filter(|entry| {
            entry.file_name().as_bytes().starts_with(&prefix) && entry.metadata().is_ok_and(is_same)
        })
        .map(|entry| entry.path())
        .collect()
}

fn beside(store: &Path) -> PathBuf {
    let mut path = OsString::from(store);
    path.push(".lock");
    path.into()
}

fn host() -> String {
    let name = rustix::system::uname();
    name.nodename().to_string_lossy().into_owned()
}

/// Whether the error is one that file systems without locks return.
fn is_unsupported(error: &io::Error) -> bool {
    use rustix::io::Errno;
    [Errno::NOTSUP, Errno::NOSYS, Errno::NOLCK, Errno::INVAL]
        .into_iter()
        .any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use tempfile::TempDir;

    use super::*;

    fn store() -> (TempDir, PathBuf) {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let store = dir.path().join("relatch.db");
        fs::write(&store, "").expect("the directory is the test's");
        (dir, store)
    }

    async fn claim(store: &Path) -> Result<StoreOwner, OwnerError> {
        StoreOwner::claim(store, "relatch control", Timestamp::from_millis(0)).await
    }

    async fn refusal(store: &Path) -> String {
        claim(store).await.expect_err("it is owned").to_string()
    }

    #[tokio::test(start_paused = true)]
    async fn a_store_has_one_owner_by_whatever_path() {
        let (dir, store) = store();
        let owner = claim(&store).await.expect("it is free");
        let link = dir.path().join("link.db");
        symlink(&store, &link).expect("a link");
        let below = dir.path().join("below");
        symlink(dir.path(), &below).expect("a link");
        let process = format!("`relatch control`, process {} on ", std::process::id());
        for path in [store.clone(), link, below.join("relatch.db")] {
            let refusal = refusal(&path).await;
            for part in [&process, "since 1970-01-01T00:00:00Z", "relatch.db.lock"] {
                assert!(refusal.contains(part), "{part}: {refusal}");
            }
        }
        drop(owner);
        claim(&store).await.expect("it is free again");
    }

    #[tokio::test(start_paused = true)]
    async fn an_owner_that_stops_is_waited_for() {
        let (_dir, store) = store();
        let owner = claim(&store).await.expect("it is free");
        owner.note_stop();
        let leaves = async {
            tokio::time::sleep(LEAVING * 5).await;
            drop(owner);
        };
        let (claimed, ()) = tokio::join!(claim(&store), leaves);
        claimed.expect("it is free by then");
    }

    #[tokio::test(start_paused = true)]
    async fn an_owner_that_does_not_stop_is_named_within_a_second() {
        let (_dir, store) = store();
        let _owner = claim(&store).await.expect("it is free");
        let began = tokio::time::Instant::now();
        refusal(&store).await;
        assert!(began.elapsed() < LEAVING * 2, "{:?}", began.elapsed());
    }

    #[tokio::test(start_paused = true)]
    async fn a_lock_that_says_nothing_sensible_is_still_a_lock() {
        let (_dir, store) = store();
        let owner = claim(&store).await.expect("it is free");
        for content in ["", "{\"command\":\"rel", "relatch\0"] {
            fs::write(beside(&store), content).expect("the directory is the test's");
            let refusal = refusal(&store).await;
            assert!(refusal.contains("by another process"), "{refusal}");
        }
        drop(owner);
        let owner = claim(&store).await.expect("what it says does not matter");
        assert_eq!(read(&owner.file), Some(owner.owner.clone()));
    }

    #[tokio::test(start_paused = true)]
    async fn a_database_with_two_names_is_refused() {
        let (dir, store) = store();
        let draft = dir.path().join("relatch.db.new-0123456789abcdef");
        fs::hard_link(&store, &draft).expect("another name");
        drop(claim(&store).await.expect("an unfinished creation left it"));
        assert!(!draft.exists());

        fs::hard_link(&store, dir.path().join("copy.db")).expect("another name");

        let refusal = refusal(&store).await;
        assert!(refusal.contains("has 2 names"), "{refusal}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_look_finds_the_owner_and_takes_nothing() {
        let (dir, store) = store();
        let free = || StoreOwner::look(&store).expect("it can be looked at");
        assert_eq!(free(), Ownership::Free);
        assert!(!beside(&store).exists(), "a look creates nothing");
        let owner = claim(&store).await.expect("it is free");
        let named = fs::read(beside(&store)).expect("it is there");
        let link = dir.path().join("link.db");
        symlink(&store, &link).expect("a link");
        for path in [&store, &link] {
            let found = StoreOwner::look(path).expect("it can be looked at");
            assert_eq!(found, Ownership::Held(Some(owner.owner.clone())));
        }
        assert_eq!(fs::read(beside(&store)).expect("it is there"), named);
        drop(owner);
        assert_eq!(free(), Ownership::Free);
        let looking = File::open(beside(&store)).expect("it is there");
        looking.try_lock_shared().expect("it is free");
        assert_eq!(free(), Ownership::Free, "somebody else looks");
        let ends = async {
            tokio::time::sleep(POLL).await;
            drop(looking);
        };
        let (claimed, ()) = tokio::join!(claim(&store), ends);
        claimed.expect("a look holds nobody up");
    }

    #[tokio::test(start_paused = true)]
    async fn a_look_finds_the_names_that_a_claim_refuses_and_deletes_none() {
        let (dir, store) = store();
        let draft = dir.path().join("relatch.db.new-0123456789abcdef");
        fs::hard_link(&store, &draft).expect("another name");
        StoreOwner::look_at_names(&store).expect("a start deletes it");
        assert!(draft.exists());

        fs::hard_link(&store, dir.path().join("copy.db")).expect("another name");

        let found = StoreOwner::look_at_names(&store);
        assert!(matches!(found, Err(OwnerError::Linked { .. })), "{found:?}");
        refusal(&store).await;
    }

    #[tokio::test(start_paused = true)]
    async fn an_owner_is_waited_for_without_a_claim() {
        let (_dir, store) = store();
        let owner = claim(&store).await.expect("it is free");
        let held = StoreOwner::wait_until_free(&store).await;
        assert!(matches!(held, Err(OwnerError::Held { .. })), "{held:?}");
        owner.note_stop();
        let leaves = async {
            tokio::time::sleep(LEAVING * 5).await;
            drop(owner);
        };
        let (free, ()) = tokio::join!(StoreOwner::wait_until_free(&store), leaves);
        free.expect("it is free by then");
    }

    #[tokio::test(start_paused = true)]
    async fn a_lock_that_was_deleted_excludes_nobody_and_is_not_taken() {
        let (_dir, store) = store();
        let first = claim(&store).await.expect("it is free");
        let opened = first.file.try_clone().expect("a descriptor is free");
        let lock = beside(&store);
        assert!(lies_at(&opened, &lock).expect("it is there"));
        first.discard();
        assert!(!lies_at(&opened, &lock).expect("it is open"));
        let _second = claim(&store).await.expect("it is free");
        assert!(!lies_at(&opened, &lock).expect("it is open"));
        refusal(&store).await;
    }

    #[tokio::test(start_paused = true)]
    async fn a_store_is_free_although_a_child_holds_a_copy_of_its_lock() {
        let (_dir, store) = store();
        let owner = claim(&store).await.expect("it is free");
        let _copy = owner.file.try_clone().expect("a descriptor is free");
        drop(owner);
        claim(&store).await.expect("it is free again");
    }

    #[tokio::test(start_paused = true)]
    async fn a_child_does_not_keep_the_lock_of_an_owner_that_has_ended() {
        let (_dir, store) = store();
        let owner = claim(&store).await.expect("it is free");
        let mut child = std::process::Command::new("sleep");
        let mut child = child.arg("600").spawn().expect("it starts");
        drop(owner);
        let claimed = claim(&store).await;
        child.kill().expect("it runs");
        child.wait().expect("it was killed");
        claimed.expect("the child has no part in it");
    }

    #[tokio::test]
    async fn a_lock_that_cannot_be_created_is_named() {
        let refusal = refusal(Path::new("/proc/self/relatch.db")).await;
        assert!(refusal.contains("relatch.db.lock"), "{refusal}");
    }
}
