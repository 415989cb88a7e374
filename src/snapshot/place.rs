//! The place of a snapshot file in its directory.
//!
//! The same directory has its lock, which one process holds for its whole life, the new file that is being written (`.new`),
//! and the last file that was refused (`.refused`).

use std::{
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::Arc,
};

use rustix::fs::OFlags;

use super::{error::RefusedError, lock::FileLock, origin::Inode};
use crate::{
    clock::Clock,
    draft::{self, Draft},
};

/// The place of a snapshot file, of which this process is the only user.
#[derive(Debug)]
pub(crate) struct SnapshotPlace {
    path: PathBuf,
    clock: Clock,
    /// None while the disk refuses to create the lock file.
    lock: Option<Arc<FileLock>>,
}

/// A snapshot file cannot be used by this process.
#[derive(Debug, thiserror::Error)]
pub enum PlaceError {
    /// Another process uses it.
    #[error("another process uses {}: give each sidecar a snapshot file of its own", path.display())]
    Busy {
        /// The file.
        path: PathBuf,
    },
    /// No file can be created at the place.
    #[error("cannot create {}: its directory must exist and belong to the user of the sidecar", path.display())]
    Directory {
        /// The file that cannot be created.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
}

impl SnapshotPlace {
    /// Claims the place of the file at `path`, and removes the draft of a process that was killed.
    ///
    /// A full or read-only disk does not prevent a start: nothing can be written, but an existing file can be read.
    ///
    /// # Errors
    ///
    /// When another process has claimed the place, or no file can be created there.
    pub(crate) fn claim(path: &Path, clock: &Clock) -> Result<Self, PlaceError> {
        let mut place = Self {
            path: path.to_owned(),
            clock: clock.clone(),
            lock: None,
        };
        let directory = |source| PlaceError::Directory {
            path: path.to_owned(),
            source,
        };
        match place.lock() {
            Ok(()) => match draft::remove_leftover(path) {
                Err(error) if !is_of_disk(&error) => Err(directory(error)),
                Ok(()) | Err(_) => Ok(place),
            },
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Err(PlaceError::Busy {
                path: path.to_owned(),
            }),
            Err(error) if is_of_disk(&error) => {
                tracing::error!(
                    path = %path.display(),
                    error = &error as &dyn std::error::Error,
                    "the snapshot file cannot be locked"
                );
                Ok(place)
            }
            Err(error) => Err(directory(error)),
        }
    }

    /// Checks, without claiming the place, whether a start would put the file at `path` aside.
    ///
    /// # Errors
    ///
    /// When it is not a file of this user that no other user can use.
    pub(crate) fn look(path: &Path) -> Result<(), RefusedError> {
        let place = Self {
            path: path.to_owned(),
            clock: Clock::system(),
            lock: None,
        };
        place.open().map(drop)
    }

    /// The path of the file.
    #[must_use]
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// The lock that this process holds while it uses the place; none if the disk refused to create it.
    #[must_use]
    pub(crate) const fn held(&self) -> Option<&Arc<FileLock>> {
        self.lock.as_ref()
    }

    /// Opens the file, also for writing if the disk allows it, and returns it with its length; none if there is no file.
    ///
    /// # Errors
    ///
    /// When it is not a file of this user that no other user can use.
    pub(crate) fn open(&self) -> Result<Option<(File, u64)>, RefusedError> {
        // Without NONBLOCK, the open of a pipe would block.
        let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
        let mut options = OpenOptions::new();
        options.read(true).custom_flags(flags);
        let opened = match options.clone().write(true).open(&self.path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => options.open(&self.path),
            opened => opened,
        };
        let file = match opened {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) if is_link(&error) => return Err(RefusedError::NotAFile),
            Err(error) => return Err(error.into()),
        };
        let metadata = file.metadata()?;
        if !metadata.is_file() {
            return Err(RefusedError::NotAFile);
        }
        let (owner, user) = (metadata.uid(), rustix::process::geteuid().as_raw());
        if owner != user {
            return Err(RefusedError::Owner { owner, user });
        }
        let mode = metadata.mode() & 0o777;
        if mode & 0o077 != 0 {
            return Err(RefusedError::Mode { mode });
        }
        Ok(Some((file, metadata.len())))
    }

    /// Puts the file aside, and replaces the one that was put aside before. Returns its new path.
    ///
    /// # Errors
    ///
    /// When it cannot be renamed.
    pub(crate) fn set_aside(&self) -> io::Result<PathBuf> {
        let aside = self.beside("refused");
        fs::rename(&self.path, &aside)?;
        Ok(aside)
    }

    /// Creates a draft of a new file, which will replace the present one.
    ///
    /// # Errors
    ///
    /// When it cannot be created, or another process has claimed the place.
    pub(crate) fn draft(&mut self) -> io::Result<Draft> {
        self.lock()?;
        Draft::create(&self.path, 0o600)
    }

    /// Whether `file` is still the file at this path. If somebody has removed it, writes to it are lost.
    #[must_use]
    pub(crate) fn holds(&self, file: &File) -> bool {
        match (fs::symlink_metadata(&self.path), file.metadata()) {
            (Ok(here), Ok(written)) => Inode::of(&here) == Inode::of(&written),
            (Err(_), _) | (_, Err(_)) => false,
        }
    }

    /// Whether there is no file at this path.
    #[must_use]
    pub(crate) fn is_empty(&self) -> bool {
        let found = fs::symlink_metadata(&self.path);
        found.is_err_and(|error| error.kind() == io::ErrorKind::NotFound)
    }

    /// Erases `file`, the file at this path: it removes it, and empties it for all other names. When this returns, this
    /// survives a loss of power.
    ///
    /// # Errors
    ///
    /// When this is not certain, or when another file is at this path.
    pub(crate) fn erase(&self, file: &File) -> io::Result<()> {
        if !self.holds(file) {
            return Err(io::Error::other("it was removed or replaced from outside"));
        }
        file.set_len(0)?;
        file.sync_all()?;
        fs::remove_file(&self.path)?;
        draft::sync_directory_of(&self.path)
    }

    /// Acquires the lock, unless this process already holds it.
    fn lock(&mut self) -> io::Result<()> {
        if self.lock.is_none() {
            let lock = FileLock::acquire(&self.beside("lock"), &self.clock)?;
            self.lock = Some(Arc::new(lock));
        }
        Ok(())
    }

    fn beside(&self, ending: &str) -> PathBuf {
        let mut path = OsString::from(&self.path);
        path.push(".");
        path.push(ending);
        path.into()
    }
}

/// Whether an error is of the disk, and not of the directory or its permissions.
fn is_of_disk(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull
            | io::ErrorKind::QuotaExceeded
            | io::ErrorKind::ReadOnlyFilesystem
    ) || error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error())
}

/// The error of opening a link without following it.
fn is_link(error: &io::Error) -> bool {
    error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use rustix::fs::{CWD, FileType, Mode, mknodat};
    use tempfile::TempDir;

    use super::*;

    fn place() -> (TempDir, SnapshotPlace) {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let place = claim(&dir.path().join("keyring.snap")).expect("it is ours");
        (dir, place)
    }

    fn claim(path: &Path) -> Result<SnapshotPlace, PlaceError> {
        SnapshotPlace::claim(path, &Clock::system())
    }

    fn publish(place: &mut SnapshotPlace, content: &[u8]) -> File {
        use std::io::Write;
        let mut draft = place.draft().expect("it is made");
        draft.file().write_all(content).expect("it is written");
        draft.publish().expect("it is put in place");
        draft.into_file()
    }

    fn refusal(place: &SnapshotPlace) -> String {
        place.open().expect_err("it is refused").to_string()
    }

    #[test]
    fn a_file_is_put_in_place_for_its_owner_alone() {
        let (dir, mut place) = place();
        assert!(place.open().expect("there is none").is_none());
        let first = publish(&mut place, b"one");
        let second = publish(&mut place, b"two!");
        assert!(!place.holds(&first) && place.holds(&second));
        let (_, len) = place.open().expect("it is ours").expect("it is there");
        assert_eq!(len, 4);
        let metadata = fs::metadata(place.path()).expect("it is there");
        assert_eq!(metadata.mode() & 0o777, 0o600);
        assert!(!dir.path().join("keyring.snap.new").exists());
        fs::remove_file(place.path()).expect("it is there");
        assert!(!place.holds(&second));
    }

    #[test]
    fn a_place_has_one_user() {
        let (dir, place) = place();
        let path = dir.path().join("keyring.snap");
        let error = claim(&path).expect_err("it is taken");
        assert!(matches!(error, PlaceError::Busy { .. }), "{error}");
        drop(place);
        assert!(claim(&path).is_ok());
    }

    #[test]
    fn a_place_is_free_although_a_child_holds_a_copy_of_its_lock() {
        let (dir, place) = place();
        let lock = place.lock.as_ref().expect("it is locked");
        let _copy = lock.copy();
        drop(place);
        assert!(claim(&dir.path().join("keyring.snap")).is_ok());
    }

    #[test]
    fn a_file_that_is_erased_is_empty_under_its_other_names() {
        let (dir, mut place) = place();
        let link = dir.path().join("link");
        let file = publish(&mut place, b"one");
        fs::hard_link(place.path(), &link).expect("it is ours");
        place.erase(&file).expect("it lies there");
        assert!(place.is_empty());
        assert_eq!(fs::read(&link).expect("it is there"), b"");
    }

    #[test]
    fn only_what_lies_here_is_erased() {
        let (dir, mut place) = place();
        let file = publish(&mut place, b"one");
        let moved = dir.path().join("moved");
        fs::rename(place.path(), &moved).expect("it is ours");
        assert!(place.erase(&file).is_err());
        fs::write(place.path(), "other").expect("it is written");
        assert!(place.erase(&file).is_err());
        assert_eq!(fs::read(place.path()).expect("it is there"), b"other");
        assert_eq!(fs::read(&moved).expect("it is there"), b"one");
    }

    #[test]
    fn what_a_killed_process_has_left_is_removed() {
        let (dir, place) = place();
        drop(place);
        let left = dir.path().join("keyring.snap.new");
        fs::write(&left, "half").expect("it is written");
        let mut place = claim(&dir.path().join("keyring.snap")).expect("it is ours");
        assert!(!left.exists());
        fs::write(&left, "half").expect("it is written");
        publish(&mut place, b"one");
        assert!(!left.exists());
    }

    #[test]
    fn no_draft_follows_a_link() {
        let (dir, mut place) = place();
        let target = dir.path().join("target");
        let link = dir.path().join("keyring.snap.new");
        std::os::unix::fs::symlink(&target, link).expect("a link");
        publish(&mut place, b"one");
        assert!(!target.exists());
        assert!(place.open().expect("it is ours").is_some());
    }

    #[test]
    fn what_is_not_a_file_of_ours_alone_is_refused_and_put_aside() {
        let (dir, place) = place();
        let path = place.path().to_owned();
        let aside = dir.path().join("keyring.snap.refused");
        let target = dir.path().join("target");
        fs::write(&target, "x").expect("it is written");
        std::os::unix::fs::symlink(&target, &path).expect("a link");
        assert_eq!(refusal(&place), "it is not a regular file");
        assert_eq!(place.set_aside().expect("it is put aside"), aside);

        mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).expect("a pipe");
        assert_eq!(refusal(&place), "it is not a regular file");
        place.set_aside().expect("it is put aside");

        for mode in [0o640, 0o604, 0o620, 0o602] {
            fs::write(&path, "x").expect("it is written");
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("it is ours");
            let refusal = refusal(&place);
            assert!(refusal.contains(&format!("{mode:03o}")), "{refusal}");
            place.set_aside().expect("it is put aside");
        }
        assert!(place.open().expect("there is none").is_none());
        assert!(fs::metadata(&aside).expect("the last one").is_file());
        assert_eq!(fs::read(&target).expect("as it was"), b"x");
        fs::create_dir(&path).expect("a directory");
        assert_eq!(refusal(&place), "it is not a regular file");
    }

    #[test]
    fn a_place_that_cannot_be_is_named() {
        let error = claim(Path::new("/nonexistent/keyring.snap")).expect_err("no place");
        let error = error.to_string();
        assert!(error.contains("/nonexistent/keyring.snap"), "{error}");
    }
}
