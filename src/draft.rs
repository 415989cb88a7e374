//! A file that replaces another one as a whole: a reader opens the old file or the new one, never a part.

use std::{
    ffi::OsString,
    fs::{self, File, OpenOptions},
    io,
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
};

use rustix::fs::OFlags;

/// A new file beside the file that it will replace. If it is not published, it is removed.
#[derive(Debug)]
pub(crate) struct Draft {
    file: File,
    target: PathBuf,
    name: DraftName,
}

/// The name of a draft, removed when it is dropped: on a full disk, an unpublished draft would use the space for others.
#[derive(Debug)]
struct DraftName(PathBuf);

impl Draft {
    /// Creates an empty draft of `target` with the permissions `mode`. It replaces the draft of a process that was killed:
    /// two drafts of one file cannot exist at a time.
    ///
    /// # Errors
    ///
    /// When it cannot be created.
    pub(crate) fn create(target: &Path, mode: u32) -> io::Result<Self> {
        remove_leftover(target)?;
        let name = DraftName(path_of(target));
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(mode)
            .custom_flags(OFlags::NOFOLLOW.bits().cast_signed())
            .open(&name.0)?;
        Ok(Self {
            file,
            target: target.to_owned(),
            name,
        })
    }

    /// The file, to write to.
    pub(crate) const fn file(&mut self) -> &mut File {
        &mut self.file
    }

    /// Replaces the target by this draft. When this returns, the new file survives a loss of power.
    ///
    /// # Errors
    ///
    /// When this is not certain.
    pub(crate) fn publish(&mut self) -> io::Result<()> {
        self.file.sync_all()?;
        fs::rename(&self.name.0, &self.target)?;
        sync_directory_of(&self.target)
    }

    /// The open file. If it is not published, it has no name from now on.
    pub(crate) fn into_file(self) -> File {
        self.file
    }
}

impl Drop for DraftName {
    fn drop(&mut self) {
        // A published draft no longer has this name. If the name cannot be removed, the next draft replaces the file.
        let _ = fs::remove_file(&self.0);
    }
}

/// Removes the draft of `target` that a killed process left behind, if there is one.
///
/// # Errors
///
/// When it cannot be removed.
pub(crate) fn remove_leftover(target: &Path) -> io::Result<()> {
    match fs::remove_file(path_of(target)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

fn path_of(target: &Path) -> PathBuf {
    let mut path = OsString::from(target);
    path.push(".new");
    path.into()
}

/// Makes the names in the directory of `path` survive a loss of power.
///
/// # Errors
///
/// When this is not certain.
pub(crate) fn sync_directory_of(path: &Path) -> io::Result<()> {
    let directory = match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        Some(_) | None => Path::new("."),
    };
    File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use std::{io::Write as _, os::unix::fs::PermissionsExt as _};

    use super::*;

    #[test]
    fn a_published_draft_replaces_the_file() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let target = dir.path().join("file");
        fs::write(&target, "old").expect("writable");
        let mut draft = Draft::create(&target, 0o600).expect("a draft");
        draft.file().write_all(b"new").expect("written");
        assert_eq!(fs::read_to_string(&target).expect("readable"), "old");
        draft.publish().expect("published");
        drop(draft);
        assert_eq!(fs::read_to_string(&target).expect("readable"), "new");
        let mode = fs::metadata(&target)
            .expect("it exists")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600);
        assert_eq!(fs::read_dir(dir.path()).expect("readable").count(), 1);
    }

    #[test]
    fn an_unpublished_draft_leaves_nothing_behind() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let target = dir.path().join("file");
        let draft = Draft::create(&target, 0o600).expect("a draft");
        drop(draft.into_file());
        assert_eq!(fs::read_dir(dir.path()).expect("readable").count(), 0);
    }

    #[test]
    fn the_draft_of_a_killed_process_is_replaced() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let target = dir.path().join("file");
        fs::write(dir.path().join("file.new"), "half a fi").expect("writable");
        let mut draft = Draft::create(&target, 0o600).expect("a draft");
        draft.file().write_all(b"whole").expect("written");
        draft.publish().expect("published");
        assert_eq!(fs::read_to_string(&target).expect("readable"), "whole");
    }
}
