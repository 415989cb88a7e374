//! Files: `<directory>/<keyring>/<key id>/current` and `previous`, each with one secret and nothing else.
//!
//! Every file is written under another name and moved into place: a reader sees the old secret or
//! the new one, whole, and never none. No symbolic link is followed: each directory is opened
//! within the one before it.

use std::{
    ffi::OsStr,
    fs::File,
    io::{self, Read as _, Write as _},
    os::fd::OwnedFd,
    path::{Component, Path, PathBuf},
    time::Duration,
};

use rustix::{
    fs::{self, AtFlags, FileType, FlockOperation, Mode, OFlags},
    io::Errno,
    process::geteuid,
};
use zeroize::Zeroizing;

use super::SecretDelivery;
use crate::{
    config::sink::FileSettings,
    duration::written,
    key::{KeyId, KeyringName},
};

/// Files in a directory.
#[derive(Clone, Debug)]
pub(crate) struct FileSink {
    directory: PathBuf,
}

/// Why a secret was not written.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The directory of the settings does not exist.
    #[error("the directory {} does not exist: create it for the user of the control plane, with mode 0700", .0.display())]
    Missing(PathBuf),
    /// A part of the path is a symbolic link.
    #[error("{} is a symbolic link, which is not followed: name its target, or remove it", .0.display())]
    Symlink(PathBuf),
    /// A part of the path is not a directory, or a secret's file is not a regular file.
    #[error("{} is not a {expected}: move it out of the way", path.display())]
    Type {
        /// The path of the wrong entry.
        path: PathBuf,
        /// The expected type, `directory` or `file`.
        expected: &'static str,
    },
    /// The entry belongs to another user, who could read the secret.
    #[error("{} belongs to user {owner}, but the control plane runs as user {user}: run `chown {user}` on it", path.display())]
    Owner {
        /// The path of the entry.
        path: PathBuf,
        /// The user id of its owner.
        owner: u32,
        /// The user id of this process.
        user: u32,
    },
    /// Users other than the owner can create files in the directory.
    #[error("other users can write to {} (mode {mode:03o}): run `chmod go-w` on it", path.display())]
    Writable {
        /// The path of the directory.
        path: PathBuf,
        /// The permissions of the directory.
        mode: u32,
    },
    /// The disk is full, or the user's quota is used up.
    #[error("there is no space left for {}: free some space", .0.display())]
    Full(PathBuf),
    /// Another delivery writes to the directory, in this process or in another one.
    #[error("another delivery is writing to {}: try again", .0.display())]
    Busy(PathBuf),
    /// The operating system reported another error.
    #[error("cannot {what} {}: {error}; check its permissions and its file system", path.display())]
    Io {
        /// The failed operation, such as `open`.
        what: &'static str,
        /// The path of the failed operation.
        path: PathBuf,
        /// The error of the operating system.
        error: io::Error,
    },
    /// The file system did not answer in time. The files may still be written.
    #[error("{} was not written within {}: check its file system", path.display(), written(*limit))]
    TimedOut {
        /// The directory of the settings.
        path: PathBuf,
        /// The longest time of a delivery.
        limit: Duration,
    },
}

/// The directory of one key, locked for one delivery.
#[derive(Debug)]
struct KeyDirectory {
    path: PathBuf,
    directory: OwnedFd,
}

/// The steps of a delivery, in this order. The process may end between any two of them: `current`
/// is whole at any time, and the delivery can be repeated from the start.
#[derive(Clone, Copy, Debug)]
enum DeliveryStep {
    WritePrevious,
    MovePrevious,
    WriteCurrent,
    MoveCurrent,
}

/// The contents that the steps write.
#[derive(Debug)]
struct Contents {
    /// The content of `current` before the delivery. None: there is no such file.
    old: Option<Zeroizing<Vec<u8>>>,
    new: Zeroizing<Vec<u8>>,
}

const CURRENT: &str = "current";
const PREVIOUS: &str = "previous";
/// The names under which files are written. The next delivery removes files that an ended process
/// left under them.
const CURRENT_NEW: &str = ".current.new";
const PREVIOUS_NEW: &str = ".previous.new";
/// The most bytes that are read of a file: more than the longest key, 512 bytes. A longer file was
/// not written by relatch.
const MAX_LEN: u64 = 4 << 10;

impl FileSink {
    /// The longest time of a delivery. Two small files take milliseconds; on a network file system,
    /// some seconds.
    pub(crate) const TIME_LIMIT: Duration = Duration::from_secs(30);

    /// Creates the sink of `settings`.
    #[must_use]
    pub(crate) fn new(settings: &FileSettings) -> Self {
        Self {
            directory: settings.directory.clone(),
        }
    }

    /// Finds problems that would prevent every delivery, without creating anything: a missing
    /// directory, or one in which other users could read or replace the secret. Blocks the thread.
    ///
    /// # Errors
    ///
    /// When there is such a problem.
    pub(crate) fn look(&self) -> Result<(), FileError> {
        open_base(&self.directory).map(drop)
    }

    /// Writes the secret to `current`, and the former content of `current` to `previous`. Changes
    /// nothing when `current` already holds the secret.
    ///
    /// # Errors
    ///
    /// When the files cannot be written. `current` then has its former content, or holds the
    /// secret.
    pub(crate) async fn deliver(&self, delivery: &SecretDelivery<'_>) -> Result<(), FileError> {
        let base = self.directory.clone();
        let keyring = delivery.keyring.clone();
        let key_id = delivery.version.key_id;
        let new = Zeroizing::new(delivery.secret.expose().as_bytes().to_vec());
        let written = tokio::task::spawn_blocking(move || {
            KeyDirectory::open(&base, &keyring, key_id)?.write(new)
        });
        match tokio::time::timeout(Self::TIME_LIMIT, written).await {
            Ok(Ok(written)) => written,
            Ok(Err(ended)) => Err(FileError::Io {
                what: "finish writing to",
                path: self.directory.clone(),
                error: ended.into(),
            }),
            Err(_elapsed) => Err(FileError::TimedOut {
                path: self.directory.clone(),
                limit: Self::TIME_LIMIT,
            }),
        }
    }
}

impl Drop for KeyDirectory {
    fn drop(&mut self) {
        // A child that this process is about to start holds a copy of the descriptor until it runs
        // its program. The close of one copy alone does not release the lock.
        let _ = fs::flock(&self.directory, FlockOperation::Unlock);
    }
}

impl KeyDirectory {
    /// Opens the directory of a key and locks it. Creates it and the directory of its keyring when
    /// they do not exist.
    fn open(base: &Path, keyring: &KeyringName, key_id: KeyId) -> Result<Self, FileError> {
        let (mut path, mut directory) = open_base(base)?;
        for name in [keyring.as_str(), key_id.as_str()] {
            path.push(name);
            match fs::mkdirat(&directory, name, Mode::RWXU) {
                Ok(()) | Err(Errno::EXIST) => {}
                Err(error) => return Err(failed("create", &path)(error)),
            }
            fs::fsync(&directory).map_err(failed("write", &path))?;
            directory = enter(&directory, OsStr::new(name), &path, OFlags::RDONLY)?;
            check_directory(&directory, &path)?;
        }
        match fs::flock(&directory, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Self { path, directory }),
            Err(Errno::WOULDBLOCK) => Err(FileError::Busy(path)),
            Err(error) => Err(failed("lock", &path)(error)),
        }
    }

    fn write(&self, new: Zeroizing<Vec<u8>>) -> Result<(), FileError> {
        let old = self.read(CURRENT)?;
        if old.as_ref() == Some(&new) {
            // A process may have moved it there and ended before the directory was synced.
            self.remove_unfinished();
            return self.sync();
        }
        let contents = Contents { old, new };
        let written = DeliveryStep::ALL
            .into_iter()
            .try_for_each(|step| self.run(step, &contents));
        if written.is_err() {
            self.remove_unfinished();
        }
        written
    }

    /// Removes files that were not moved into place. A file that cannot be removed now is removed
    /// before the next write.
    fn remove_unfinished(&self) {
        for name in [PREVIOUS_NEW, CURRENT_NEW] {
            let _ = fs::unlinkat(&self.directory, name, AtFlags::empty());
        }
    }

    fn run(&self, step: DeliveryStep, contents: &Contents) -> Result<(), FileError> {
        match (step, &contents.old) {
            (DeliveryStep::WritePrevious, Some(old)) => self.write_new(PREVIOUS_NEW, old),
            (DeliveryStep::MovePrevious, Some(_)) => self.rename(PREVIOUS_NEW, PREVIOUS),
            (DeliveryStep::WritePrevious | DeliveryStep::MovePrevious, None) => Ok(()),
            (DeliveryStep::WriteCurrent, _) => self.write_new(CURRENT_NEW, &contents.new),
            (DeliveryStep::MoveCurrent, _) => self.rename(CURRENT_NEW, CURRENT),
        }
    }

    /// Returns the content of the file `name`. None when it does not exist.
    fn read(&self, name: &str) -> Result<Option<Zeroizing<Vec<u8>>>, FileError> {
        let path = self.path.join(name);
        // The open of a pipe would block without `NONBLOCK`.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = match fs::openat(&self.directory, name, flags, Mode::empty()) {
            Ok(file) => file,
            Err(Errno::NOENT) => return Ok(None),
            Err(Errno::LOOP) => return Err(FileError::Symlink(path)),
            Err(error) => return Err(failed("open", &path)(error)),
        };
        let found = fs::fstat(&file).map_err(failed("read the metadata of", &path))?;
        if FileType::from_raw_mode(found.st_mode) != FileType::RegularFile {
            let expected = "file";
            return Err(FileError::Type { path, expected });
        }
        check_owner(found.st_uid, &path)?;
        let capacity = usize::try_from(MAX_LEN).unwrap_or(usize::MAX);
        let mut content = Zeroizing::new(Vec::with_capacity(capacity));
        File::from(file)
            .take(MAX_LEN)
            .read_to_end(&mut content)
            .map_err(|error| FileError::Io {
                what: "read",
                path,
                error,
            })?;
        Ok(Some(content))
    }

    /// Writes a new file that only its owner can read, and syncs it to the disk.
    fn write_new(&self, name: &str, content: &[u8]) -> Result<(), FileError> {
        let path = self.path.join(name);
        match fs::unlinkat(&self.directory, name, AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(error) => return Err(failed("remove", &path)(error)),
        }
        let mode = Mode::RUSR | Mode::WUSR;
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file =
            fs::openat(&self.directory, name, flags, mode).map_err(failed("create", &path))?;
        let mut file = File::from(file);
        file.write_all(content)
            .and_then(|()| file.sync_all())
            .map_err(|error| match Errno::from_io_error(&error) {
                Some(error) => failed("write", &path)(error),
                None => FileError::Io {
                    what: "write",
                    path,
                    error,
                },
            })
    }

    fn rename(&self, from: &str, to: &str) -> Result<(), FileError> {
        fs::renameat(&self.directory, from, &self.directory, to)
            .map_err(failed("replace", &self.path.join(to)))?;
        self.sync()
    }

    fn sync(&self) -> Result<(), FileError> {
        fs::fsync(&self.directory).map_err(failed("write", &self.path))
    }
}

impl DeliveryStep {
    const ALL: [Self; 4] = [
        Self::WritePrevious,
        Self::MovePrevious,
        Self::WriteCurrent,
        Self::MoveCurrent,
    ];
}

const DIRECTORY: OFlags = OFlags::DIRECTORY
    .union(OFlags::NOFOLLOW)
    .union(OFlags::CLOEXEC);

/// Opens the directory `name` within `parent`. Errors show `path`.
fn enter(parent: &OwnedFd, name: &OsStr, path: &Path, flags: OFlags) -> Result<OwnedFd, FileError> {
    let error = match fs::openat(parent, name, flags | DIRECTORY, Mode::empty()) {
        Ok(directory) => return Ok(directory),
        Err(error) => error,
    };
    match error {
        Errno::NOENT => Err(FileError::Missing(path.to_owned())),
        // For a symbolic link, Linux reports that it is not a directory.
        Errno::NOTDIR | Errno::LOOP => {
            let link = fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW)
                .is_ok_and(|found| FileType::from_raw_mode(found.st_mode) == FileType::Symlink);
            let path = path.to_owned();
            let expected = "directory";
            Err(if link {
                FileError::Symlink(path)
            } else {
                FileError::Type { path, expected }
            })
        }
        error => Err(failed("open", path)(error)),
    }
}

/// Opens the directory of the settings, and returns its path without `.` as well.
fn open_base(base: &Path) -> Result<(PathBuf, OwnedFd), FileError> {
    let mut path = PathBuf::from("/");
    let mut directory =
        fs::open(&path, OFlags::PATH | DIRECTORY, Mode::empty()).map_err(failed("open", &path))?;
    for component in base.components() {
        // The settings allow neither another prefix nor `..`, and `.` is the same directory.
        if let Component::Normal(name) = component {
            path.push(name);
            directory = enter(&directory, name, &path, OFlags::PATH)?;
        }
    }
    // Opened separately, because the directories above it need not be readable.
    directory = enter(&directory, OsStr::new("."), &path, OFlags::RDONLY)?;
    check_directory(&directory, &path)?;
    Ok((path, directory))
}

/// Checks that the directory belongs to the user of this process, and that no other user can create
/// files in it.
fn check_directory(directory: &OwnedFd, path: &Path) -> Result<(), FileError> {
    let found = fs::fstat(directory).map_err(failed("read the metadata of", path))?;
    check_owner(found.st_uid, path)?;
    let mode = found.st_mode & 0o7777;
    if mode & 0o022 == 0 {
        Ok(())
    } else {
        let path = path.to_owned();
        Err(FileError::Writable { path, mode })
    }
}

fn check_owner(owner: u32, path: &Path) -> Result<(), FileError> {
    let user = geteuid().as_raw();
    if owner == user {
        Ok(())
    } else {
        let path = path.to_owned();
        Err(FileError::Owner { path, owner, user })
    }
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(Errno) -> FileError {
    let path = path.to_owned();
    move |error| match error {
        Errno::NOSPC | Errno::DQUOT => FileError::Full(path),
        error => FileError::Io {
            what,
            path,
            error: error.into(),
        },
    }
}

#[cfg(test)]
mod tests;
