//! The lock beside a snapshot file: the process that holds it is the only user of the file.
//!
//! The lock file contains the id of the last written file and the number of its last write, so that a copy of an older state
//! is recognized. This note is not synced: after a boot, the age of a snapshot file is not known anyway.

use std::{
    fs::{File, OpenOptions, TryLockError},
    io,
    os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt},
    path::Path,
};

use rustix::fs::OFlags;

use super::origin::FileId;
use crate::clock::{BootTime, Clock};

/// An exclusive `flock(2)` of a file, released when this is dropped. A process that is killed releases it, too.
#[derive(Debug)]
pub(crate) struct FileLock {
    file: File,
    device: u64,
    inode: u64,
    acquired: BootTime,
}

/// The length of a file id and the number of a write.
const NOTE_LEN: usize = FileId::LEN + 8;

impl FileLock {
    /// Acquires the lock file at `path`. It creates the file if it does not exist and the disk allows it.
    ///
    /// # Errors
    ///
    /// With [`io::ErrorKind::WouldBlock`] when another process holds it, or when the file cannot be opened.
    pub(crate) fn acquire(path: &Path, clock: &Clock) -> io::Result<Self> {
        let file = open(path)?;
        match file.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(io::ErrorKind::WouldBlock.into()),
            Err(TryLockError::Error(error)) => return Err(error),
        }
        // Read after the lock was acquired: every former holder acquired it earlier.
        let acquired = clock.boot();
        // The metadata of the open file: the path may already name another one.
        let metadata = file.metadata()?;
        Ok(Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            file,
            acquired,
        })
    }

    /// The device of the file that is locked.
    #[must_use]
    pub(crate) const fn device(&self) -> u64 {
        self.device
    }

    /// The inode of the file that is locked.
    #[must_use]
    pub(crate) const fn inode(&self) -> u64 {
        self.inode
    }

    /// Notes the last write of the file `id` by its number. If the note cannot be written, the former note stays, and nothing
    /// else is affected.
    pub(crate) fn note(&self, id: FileId, write: u64) {
        let mut note = [0; NOTE_LEN];
        note[..FileId::LEN].copy_from_slice(id.as_bytes());
        note[FileId::LEN..].copy_from_slice(&write.to_be_bytes());
        drop(self.file.write_all_at(&note, 0));
    }

    /// Whether `write` of the file `id` is the last noted write, or a later one; also true if there is no note.
    #[must_use]
    pub(crate) fn is_last(&self, id: FileId, write: u64) -> bool {
        let mut note = [0; NOTE_LEN];
        if self.file.read_exact_at(&mut note, 0).is_err() {
            return true;
        }
        let (noted, number) = note.split_at(FileId::LEN);
        // Numbers of equal length are ordered as their bytes.
        noted == id.as_bytes() && write.to_be_bytes()[..] >= *number
    }

    /// The descriptor that a child process holds before it runs its program.
    #[cfg(test)]
    pub(super) fn copy(&self) -> File {
        self.file.try_clone().expect("a descriptor is free")
    }

    /// A time at which the lock was held, immediately after it was acquired.
    #[must_use]
    pub(crate) const fn acquired(&self) -> BootTime {
        self.acquired
    }
}

impl Drop for FileLock {
    fn drop(&mut self) {
        // A child that this process is starting holds a copy of the descriptor until it runs its program. To close only
        // one copy does not release the lock.
        drop(self.file.unlock());
    }
}

/// A file on a read-only disk can still be locked.
fn open(path: &Path) -> io::Result<File> {
    let no_follow = OFlags::NOFOLLOW.bits().cast_signed();
    let opened = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .mode(0o600)
        .custom_flags(no_follow)
        .open(path);
    match opened {
        Err(error) if error.kind() == io::ErrorKind::ReadOnlyFilesystem => OpenOptions::new()
            .read(true)
            .custom_flags(no_follow)
            .open(path)
            .map_err(|_| error),
        opened => opened,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lock_has_one_holder_and_a_later_one_has_a_later_time() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("lock");
        let clock = Clock::system();
        let before = clock.boot();
        let first = FileLock::acquire(&path, &clock).expect("it is free");
        assert!(first.acquired() >= before);
        let error = FileLock::acquire(&path, &clock).expect_err("it is held");
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        let (device, inode, acquired) = (first.device(), first.inode(), first.acquired());
        drop(first);
        let second = FileLock::acquire(&path, &clock).expect("it is free");
        assert_eq!((second.device(), second.inode()), (device, inode));
        assert!(second.acquired() > acquired);
    }

    #[test]
    fn an_older_write_and_another_file_are_known_as_such() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let lock = FileLock::acquire(&dir.path().join("lock"), &Clock::system());
        let lock = lock.expect("it is free");
        let (id, other) = (FileId::new([1; FileId::LEN]), FileId::new([2; FileId::LEN]));
        assert!(lock.is_last(id, 1));
        for number in [255, 256, 70_000] {
            lock.note(id, number);
            assert!(!lock.is_last(id, number - 1));
            assert!(lock.is_last(id, number) && lock.is_last(id, number + 1));
            assert!(!lock.is_last(other, number));
        }
    }

    #[test]
    fn a_lock_is_of_the_file_that_is_open_and_not_of_its_name() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("lock");
        let clock = Clock::system();
        let first = FileLock::acquire(&path, &clock).expect("it is free");
        std::fs::remove_file(&path).expect("it is there");
        let second = FileLock::acquire(&path, &clock).expect("it is another file");
        assert_ne!(first.inode(), second.inode());
    }
}
