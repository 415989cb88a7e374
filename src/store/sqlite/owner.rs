//! Who owns a database: the one process that may serve from it, or change it while nobody does.
//!
//! The owner holds an advisory lock (`flock`) on a file beside the database for as long as it lives. The kernel releases
//! the lock when the process ends, however it ends; no other process inherits it, because the file is closed on exec. The
//! lock is not on the database itself: the close of any descriptor of that file drops the locks that SQLite holds there.
//! What the file says about the owner is only for messages.

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

/// The ownership of a store, held for as long as the value lives.
#[derive(Debug)]
pub struct StoreOwner {
    lock: PathBuf,
    /// Holds the lock; its close releases it.
    file: File,
    owner: Owner,
}

/// A process that owns a store, as it describes itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Owner {
    /// What it runs as, such as `relatch control`.
    pub(crate) command: String,
    /// Its process id, which counts on its own host or in its own container.
    pub(crate) process: u32,
    /// The name of its host.
    pub(crate) host: String,
    /// When it became the owner.
    pub(crate) since: Timestamp,
    /// Whether it stops, and the store will be free soon.
    #[serde(default)]
    pub(crate) is_stopping: bool,
}

/// A store cannot be owned by this process.
#[derive(Debug, thiserror::Error)]
pub enum OwnerError {
    /// Another process owns it.
    #[error(
        "{store} is in use by {}: a store has one owner, so stop that process first; the lock {} ends with the process, do not delete it",
        Named(owner.as_ref()),
        lock.display()
    )]
    Held {
        /// The database.
        store: String,
        /// The file with the lock.
        lock: PathBuf,
        /// The owner; none when the file does not say.
        owner: Option<Owner>,
    },
    /// The database has several names, and SQLite keeps a write-ahead log for each of them.
    #[error(
        "{store} has {links} names (hard links): keep only one, because two processes that use different names would destroy the database"
    )]
    Linked {
        /// The database.
        store: String,
        /// How many names.
        links: u64,
    },
    /// The file system has no locks.
    #[error(
        "the file system of {} does not support locks (flock): move the store to a local file system",
        lock.display()
    )]
    Unsupported {
        /// The file with the lock.
        lock: PathBuf,
        /// What the system says.
        source: io::Error,
    },
    /// The lock cannot be created or opened.
    #[error(
        "cannot lock {}: it and its directory must be readable and writable for the user that runs relatch",
        lock.display()
    )]
    Io {
        /// The file with the lock.
        lock: PathBuf,
        /// Why not.
        source: io::Error,
    },
}

/// What a look from outside finds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Ownership {
    /// Nobody owns the store.
    Free,
    /// A process owns it; none when the lock does not name it.
    Held(Option<Owner>),
}

/// An owner in words.
pub(crate) struct Named<'a>(pub(crate) Option<&'a Owner>);

/// The result of one attempt to take the lock.
enum Attempt {
    Taken(File),
    Held(Option<Owner>),
}

/// How long a process that was just killed may still hold the lock: the kernel first frees its memory, which takes a
/// moment when that is gigabytes.
const LEAVING: Duration = Duration::from_secs(1);
/// How long a process that stops may still hold the lock: a control plane drains for 10 s and sends its last spans for 3 s.
const STOPPING: Duration = Duration::from_secs(15);
/// How often the lock is tried while waiting: people do not notice this delay.
const POLL: Duration = Duration::from_millis(20);
/// The longest file that is read: an owner takes about 150 bytes, and no host name is longer than 255.
const MAX_LEN: usize = 1024;
/// The ending of the files in which databases are built.
const DRAFT: &str = ".new-";

impl StoreOwner {
    /// Takes the ownership of the database at `store`, as `command`. The directory of the database must exist.
    ///
    /// When the owner is another process that stops, this waits for up to 15 s; otherwise for up to 1 s, for a process that
    /// was just killed.
    ///
    /// Cancel safe: a dropped future owns nothing.
    ///
    /// # Errors
    ///
    /// When another process owns the database, or the lock cannot be taken.
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

    /// Finds who owns the database at `store`, without owning it: the lock is tried for microseconds, and shared, so that
    /// two who look do not find each other. A process that claims the store in these microseconds tries again. Nothing is
    /// created or changed.
    ///
    /// # Errors
    ///
    /// When the lock could not be taken although it is free.
    pub(crate) fn look(store: &Path) -> Result<Ownership, OwnerError> {
        let store = match resolved(store) {
            Ok(store) => store,
            // Without its directory there is no lock either.
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Ownership::Free),
            Err(source) => {
                let lock = beside(store);
                return Err(OwnerError::Io { lock, source });
            }
        };
        look_at(&beside(&store))
    }

    /// Waits until nobody owns the database at `store`, for as long as [`claim`](Self::claim) waits. Nothing is created.
    ///
    /// Cancel safe.
    ///
    /// # Errors
    ///
    /// When another process keeps the database, or the lock cannot be looked at.
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

    /// Finds whether [`claim`](Self::claim) would refuse the database at `store` because of its names. Nothing is deleted.
    ///
    /// # Errors
    ///
    /// When it has more than one that is no draft of its creation.
    pub(crate) fn look_at_names(store: &Path) -> Result<(), OwnerError> {
        // Where it cannot be found, there are no names either.
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

    /// Tells processes that want the store that it will be free soon.
    pub(crate) fn note_stop(&self) {
        let owner = Owner {
            is_stopping: true,
            ..self.owner.clone()
        };
        write(&self.file, &self.lock, &owner);
    }

    /// Deletes the file with the lock, with a store that was not completed.
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
        // A child that this process is about to start holds a copy of the descriptor until it runs its program, and the
        // close of one copy alone leaves the lock. If this fails, that moment is waited for by whoever comes next.
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

/// Tries the lock once. The file is created when it is not there.
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

/// Tries the lock for a moment, where there is one.
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
    // An owner writes its name into it.
    rustix::fs::accessat(CWD, lock, Access::WRITE_OK, AtFlags::EACCESS)
        .map_err(|error| failed(error.into()))?;
    Ok(Ownership::Free)
}

fn is_stopping(owner: Option<&Owner>) -> bool {
    owner.is_some_and(|owner| owner.is_stopping)
}

/// How long an owner is waited for.
fn patience(owner: Option<&Owner>) -> Duration {
    if is_stopping(owner) {
        STOPPING
    } else {
        LEAVING
    }
}

/// Whether the file is still there. It may have been deleted since it was opened, and its lock then excludes nobody.
fn lies_at(file: &File, lock: &Path) -> io::Result<bool> {
    let ours = file.metadata()?;
    let here = fs::symlink_metadata(lock);
    Ok(here.is_ok_and(|here| (here.dev(), here.ino()) == (ours.dev(), ours.ino())))
}

/// Root may run a command on the store of another user, who must be able to lock it afterwards.
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

/// Describes the owner. A disk that is full keeps nobody from owning the store: only messages lack the name then.
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

/// What the holder of the lock says about itself; none when it has not said it completely.
fn read(file: &File) -> Option<Owner> {
    let mut bytes = vec![0; MAX_LEN];
    let len = file.read_at(&mut bytes, 0).ok()?;
    serde_json::from_slice(&bytes[..len]).ok()
}

/// The path of the database without links on the way, so that all paths to it lead to one lock.
fn resolved(store: &Path) -> io::Result<PathBuf> {
    match store.canonicalize() {
        // It is about to be created.
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

/// Refuses a database with several names, after the deletion of those that its unfinished creation left.
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
        // One that stays is reported as another name.
        drop(fs::remove_file(draft));
    }
}

/// The names that an unfinished creation has left of a database.
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

/// What file systems without locks answer.
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
