//! The key that seals snapshot files, and its file.

use std::{fmt, io, path::Path};

use zeroize::Zeroizing;

use crate::{
    key::{RandomError, fill_random},
    secret_file::{self, PrivateFileError},
};

/// A snapshot key: 32 random bytes. The key of each snapshot file is derived from them; they seal nothing directly.
#[derive(Clone)]
pub struct SnapshotKey(Zeroizing<[u8; SnapshotKey::LEN]>);

/// The file of a key cannot be used or created.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// The file cannot be read, or other users can use it.
    #[error(transparent)]
    Unusable(#[from] PrivateFileError),
    /// The file does not exist.
    #[error(
        "the file {path} does not exist: create it with `relatch config snapshot-key`, or correct the path"
    )]
    Missing {
        /// Which file.
        path: String,
    },
    /// The file is not a snapshot key. The error does not show its content.
    #[error(
        "{path} is not a snapshot key: it must be a file that `relatch config snapshot-key` created, or a copy of one"
    )]
    Malformed {
        /// Which file.
        path: String,
    },
    /// The file already exists.
    #[error(
        "{path} exists, and a key is never overwritten: nothing could open a snapshot file that was sealed with it any more"
    )]
    Exists {
        /// Which file.
        path: String,
    },
    /// The file cannot be written.
    #[error("cannot create {path}")]
    Make {
        /// Which file.
        path: String,
        /// The error of the system.
        source: io::Error,
    },
    /// The random source of the operating system failed.
    #[error(transparent)]
    Random(#[from] RandomError),
}

/// The prefix of a key, for people and for scanners of secrets. 64 hexadecimal digits follow.
const MARK: &str = "relatch-snapshot-key-1:";

impl SnapshotKey {
    /// The length of a key in bytes.
    pub const LEN: usize = 32;

    /// Creates a key from the random source of the operating system.
    ///
    /// # Errors
    ///
    /// When that source fails.
    pub(crate) fn generate() -> Result<Self, RandomError> {
        let mut bytes = Zeroizing::new([0; Self::LEN]);
        fill_random(bytes.as_mut_slice())?;
        Ok(Self(bytes))
    }

    /// A key from its bytes.
    #[must_use]
    pub fn new(bytes: [u8; Self::LEN]) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// Reads the key from the file at `path`, which only its owner may be able to use.
    ///
    /// # Errors
    ///
    /// When the file cannot be read, when other users can use it, or when it is not a snapshot key.
    pub fn read(path: &Path) -> Result<Self, KeyFileError> {
        let text = secret_file::read_private(path).map_err(|error| match error {
            PrivateFileError::Io { source, .. } if source.kind() == io::ErrorKind::NotFound => {
                KeyFileError::Missing {
                    path: path.display().to_string(),
                }
            }
            PrivateFileError::Io { .. } | PrivateFileError::Open { .. } => error.into(),
        })?;
        Self::parse(&text).ok_or_else(|| KeyFileError::Malformed {
            path: path.display().to_string(),
        })
    }

    /// Creates a key in a new file that only its owner can read.
    ///
    /// # Errors
    ///
    /// When the file already exists, or cannot be created.
    pub(crate) fn make(path: &Path) -> Result<(), KeyFileError> {
        let key = Self::generate()?;
        let digits = Zeroizing::new(secret_file::to_hex(key.0.as_slice()));
        let text = Zeroizing::new([MARK, &digits].concat());
        secret_file::write_new(path, &text).map_err(|source| {
            let path = path.display().to_string();
            match source.kind() {
                io::ErrorKind::AlreadyExists => KeyFileError::Exists { path },
                _ => KeyFileError::Make { path, source },
            }
        })
    }

    pub(super) fn expose(&self) -> &[u8] {
        self.0.as_slice()
    }

    fn parse(text: &str) -> Option<Self> {
        let text = text.strip_suffix('\n').unwrap_or(text);
        let bytes = secret_file::from_hex(text.strip_prefix(MARK)?).map(Zeroizing::new)?;
        Some(Self::new(bytes.as_slice().try_into().ok()?))
    }
}

impl fmt::Debug for SnapshotKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SnapshotKey(redacted)")
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{MetadataExt, PermissionsExt},
    };

    use super::*;

    #[test]
    fn a_key_is_made_once_for_its_owner_and_read_back() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("snapshot.key");
        SnapshotKey::make(&path).expect("it is made");
        let text = fs::read_to_string(&path).expect("it is there");
        assert_eq!(text.len(), MARK.len() + 2 * SnapshotKey::LEN + 1);
        let metadata = fs::metadata(&path).expect("it is there");
        assert_eq!(metadata.mode() & 0o777, 0o600);
        let key = SnapshotKey::read(&path).expect("it is one");
        assert_eq!(secret_file::to_hex(key.expose()), text.trim()[MARK.len()..]);

        let error = SnapshotKey::make(&path).expect_err("it is there already");
        assert!(matches!(error, KeyFileError::Exists { .. }), "{error}");
        assert_eq!(fs::read_to_string(&path).expect("as it was"), text);

        let other = dir.path().join("other.key");
        SnapshotKey::make(&other).expect("it is made");
        assert_ne!(fs::read_to_string(&other).expect("it is there"), text);
    }

    #[test]
    fn a_key_that_others_may_read_is_refused() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("snapshot.key");
        SnapshotKey::make(&path).expect("it is made");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).expect("it is ours");
        let error = SnapshotKey::read(&path).expect_err("others may read it");
        assert!(error.to_string().contains("chmod 600"), "{error}");
    }

    #[test]
    fn what_is_no_key_is_refused_without_telling_what_it_is() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("snapshot.key");
        let digits = "beef".repeat(16);
        for bad in [
            String::new(),
            digits.clone(),
            format!("{MARK}{}", &digits[2..]),
            format!("{MARK}{digits}00"),
            format!("{MARK}{}zz", &digits[2..]),
            format!("relatch-snapshot-key-2:{digits}"),
        ] {
            fs::write(&path, &bad).expect("it is written");
            fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("it is ours");
            let error = SnapshotKey::read(&path).expect_err(&bad).to_string();
            assert!(error.contains("is not a snapshot key"), "{error}");
            assert!(!error.contains("beef"), "{error}");
        }
    }

    #[test]
    fn a_missing_key_names_the_command_that_makes_it() {
        let error = SnapshotKey::read(Path::new("/nonexistent/a.key")).expect_err("missing");
        let error = error.to_string();
        assert!(error.contains("relatch config snapshot-key"), "{error}");
    }

    #[test]
    fn a_key_does_not_print() {
        let key = SnapshotKey::new([0xbe; SnapshotKey::LEN]);
        assert_eq!(format!("{key:?}"), "SnapshotKey(redacted)");
    }
}
