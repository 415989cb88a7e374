//! Files that contain a secret as text: only their owner can read them, and they are never
//! overwritten.

use std::{
    fs::{File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use zeroize::Zeroizing;

/// The reason that a private file cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum PrivateFileError {
    /// The file cannot be read, or is not UTF-8.
    #[error("cannot read {}", path.display())]
    Io {
        /// The path of the file.
        path: PathBuf,
        /// The error of the system.
        source: io::Error,
    },
    /// Other users may read or change the file.
    #[error("others may use {}: its owner is user {owner}, and its mode is {mode:03o}; make the user of the process its owner, run `chmod 600` on it, and create a new secret if others may have read this one", path.display())]
    Open {
        /// The path of the file.
        path: PathBuf,
        /// The id of the user who owns the file.
        owner: u32,
        /// The permission bits of the file.
        mode: u32,
    },
}

/// The maximum number of bytes that are read: a pepper file has about 100, the largest tokens of
/// secret stores some hundred.
const MAX_LEN: u64 = 4 << 10;

/// Reads a file that contains a secret, at most its first 4 KiB. It logs a warning if users other
/// than the owner can use the file.
///
/// # Errors
///
/// When it is missing, unreadable, or not UTF-8.
pub(crate) fn read(path: &Path) -> io::Result<Zeroizing<String>> {
    let file = File::open(path)?;
    if let Some(mode) = open_mode(&file)? {
        tracing::warn!(
            path = %path.display(),
            mode = format!("{mode:03o}"),
            "users other than its owner can use this secret file; run `chmod 600` on it"
        );
    }
    text(file)
}

/// Returns the permission bits of a file that users other than its owner can use; none if they have
/// no permission.
///
/// # Errors
///
/// When it is missing or cannot be opened.
pub(crate) fn mode_if_open(path: &Path) -> io::Result<Option<u32>> {
    open_mode(&File::open(path)?)
}

fn open_mode(file: &File) -> io::Result<Option<u32>> {
    let mode = file.metadata()?.mode() & 0o777;
    Ok((mode & 0o077 != 0).then_some(mode))
}

/// Reads a file that contains a secret and that other users must not be able to use, at most its
/// first 4 KiB.
///
/// The owner is the user of the process, and no other user has permissions. The owner may also be
/// root, who may let the group of the process read the file: Kubernetes and systemd mount secrets
/// in this way. PostgreSQL uses the same rule for the keys of its certificates.
///
/// # Errors
///
/// When the file is missing, cannot be read, is not UTF-8, or can be used by other users.
pub(crate) fn read_private(path: &Path) -> Result<Zeroizing<String>, PrivateFileError> {
    let unreadable = |source| PrivateFileError::Io {
        path: path.to_owned(),
        source,
    };
    let file = File::open(path).map_err(unreadable)?;
    let metadata = file.metadata().map_err(unreadable)?;
    let (owner, mode) = (metadata.uid(), metadata.mode() & 0o777);
    if !is_private(owner, mode, rustix::process::geteuid().as_raw()) {
        return Err(PrivateFileError::Open {
            path: path.to_owned(),
            owner,
            mode,
        });
    }
    text(file).map_err(unreadable)
}

/// Writes a secret and a line feed to a new file that only its owner can read.
///
/// # Errors
///
/// When the file exists, or cannot be written.
pub(crate) fn write_new(path: &Path, secret: &str) -> io::Result<()> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)?;
    file.write_all(secret.as_bytes())?;
    file.write_all(b"\n")?;
    file.sync_all()
}

/// Returns the bytes as hexadecimal digits.
#[must_use]
pub(crate) fn to_hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digit = |nibble: u8| char::from(DIGITS[usize::from(nibble)]);
    // The capacity is reserved first, so that a growing string leaves no copy of a secret behind.
    let mut text = String::with_capacity(2 * bytes.len());
    text.extend(
        bytes
            .iter()
            .flat_map(|byte| [digit(byte >> 4), digit(byte & 15)]),
    );
    text
}

/// Returns the bytes of hexadecimal digits; none for any other text.
#[must_use]
pub(crate) fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16);
    if !text.len().is_multiple_of(2) {
        return None;
    }
    let mut bytes = Vec::with_capacity(text.len() / 2);
    for pair in text.as_bytes().chunks_exact(2) {
        bytes.push(u8::try_from(digit(pair[0])? << 4 | digit(pair[1])?).ok()?);
    }
    Some(bytes)
}

/// Whether only `user` can use a file, apart from root, who can use every file.
fn is_private(owner: u32, mode: u32, user: u32) -> bool {
    const ROOT: u32 = 0;
    /// The widest permissions without any for the group and other users.
    const NOTHING: u32 = 0o600;
    const READ: u32 = 0o640;
    let is_within = |most: u32| mode | most | 0o700 == most | 0o700;
    if owner == user {
        is_within(NOTHING)
    } else {
        owner == ROOT && is_within(READ)
    }
}

fn text(file: File) -> io::Result<Zeroizing<String>> {
    let mut text = Zeroizing::new(String::with_capacity(usize::try_from(MAX_LEN).unwrap_or(0)));
    file.take(MAX_LEN).read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt};

    use super::*;

    #[test]
    fn a_secret_is_never_written_over_a_file() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("admin.token");
        write_new(&path, "one").expect("a new file");
        assert!(write_new(&path, "two").is_err());
        assert_eq!(fs::read_to_string(&path).expect("it is there"), "one\n");
        let metadata = fs::metadata(&path).expect("it is there");
        assert_eq!(metadata.mode() & 0o777, 0o600);
    }

    #[test]
    fn a_private_file_is_refused_as_soon_as_others_may_do_anything_with_it() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("secret");
        write_new(&path, "one").expect("a new file");
        for mode in [0o600, 0o400, 0o700] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("it is ours");
            assert_eq!(read_private(&path).expect("private").as_str(), "one\n");
        }
        for mode in [0o640, 0o620, 0o610, 0o604, 0o602, 0o601] {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).expect("it is ours");
            let error = read_private(&path).expect_err("others may use it");
            assert!(error.to_string().contains("chmod 600"), "{error}");
            assert_eq!(read(&path).expect("only warned of").as_str(), "one\n");
        }
    }

    #[test]
    fn only_root_may_let_a_group_read_a_private_file() {
        for (owner, mode, is) in [
            (1_000, 0o600, true),
            (1_000, 0o640, false),
            (1_000, 0o604, false),
            (0, 0o600, true),
            (0, 0o440, true),
            (0, 0o460, false),
            (0, 0o444, false),
            (1_001, 0o600, false),
            (1_001, 0o640, false),
        ] {
            assert_eq!(is_private(owner, mode, 1_000), is, "{owner} {mode:03o}");
        }
        assert!(!is_private(0, 0o640, 0));
    }

    #[test]
    fn hexadecimal_digits_go_there_and_back() {
        let bytes: Vec<u8> = (0..=255).collect();
        assert_eq!(from_hex(&to_hex(&bytes)), Some(bytes));
        for bad in ["0", "0g", "äö", "0 "] {
            assert_eq!(from_hex(bad), None, "{bad}");
        }
    }
}
