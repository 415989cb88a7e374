//! The file of a control plane's master pepper, and its directory.

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, Zeroizing};

use crate::{
    draft,
    key::{MasterPepper, PepperId, RandomError},
    secret_file,
};

/// The reasons why a pepper file or its directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SecretFileError {
    /// The file does not exist.
    #[error("there is no pepper file {}: restore it from its copy; without it no key of the store can be verified", path.display())]
    Missing {
        /// The path of the file.
        path: PathBuf,
    },
    /// The file or the directory cannot be read, written or created.
    #[error("cannot {what} {}", path.display())]
    Io {
        /// The operation that failed, such as `read`.
        what: &'static str,
        /// The path of the file or the directory.
        path: PathBuf,
        /// The error of the operation.
        source: io::Error,
    },
    /// The file is not a pepper file. The error does not repeat its content.
    #[error("{} is not a pepper file: it must be the one that `relatch control init` created, or a copy of it", path.display())]
    Malformed {
        /// The path of the file.
        path: PathBuf,
    },
    /// The operating system's random source failed.
    #[error(transparent)]
    Random(#[from] RandomError),
}

/// The pepper as its file holds it.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct PepperFile {
    id: u32,
    /// 64 hexadecimal digits.
    secret: String,
}

/// The id of the first pepper of a control plane.
const FIRST_PEPPER: PepperId = PepperId::new(1);

/// Creates a directory that only its owner can enter, and its missing parents. An existing
/// directory stays as it is.
///
/// # Errors
///
/// When the directory cannot be created.
pub(crate) fn ensure_directory(path: &Path) -> Result<(), SecretFileError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(io_error("create the directory", path))
}

/// Reads the master pepper from its file.
///
/// # Errors
///
/// When the file is missing, cannot be read, or is not a pepper file.
pub fn read_pepper(path: &Path) -> Result<MasterPepper, SecretFileError> {
    let text = secret_file::read(path).map_err(|source| match source.kind() {
        io::ErrorKind::NotFound => SecretFileError::Missing {
            path: path.to_owned(),
        },
        _ => io_error("read", path)(source),
    })?;
    parse_pepper(&text).ok_or_else(|| SecretFileError::Malformed {
        path: path.to_owned(),
    })
}

/// Creates a master pepper in a new file. When this returns, the file survives a power loss. A file
/// that could not be written completely is deleted.
///
/// # Errors
///
/// When the file exists already or cannot be written, or the random source fails.
pub(crate) fn create_pepper(path: &Path) -> Result<MasterPepper, SecretFileError> {
    let pepper = MasterPepper::generate(FIRST_PEPPER)?;
    let mut content = PepperFile {
        id: pepper.id().get(),
        secret: secret_file::to_hex(pepper.expose()),
    };
    let json = serde_json::to_string(&content).map(Zeroizing::new);
    content.secret.zeroize();
    let json = json.map_err(|error| io_error("encode", path)(error.into()))?;
    let written = secret_file::write_new(path, &json).and_then(|()| draft::sync_directory_of(path));
    if let Err(error) = written {
        if error.kind() != io::ErrorKind::AlreadyExists {
            // The file does not exist, or is incomplete.
            drop(fs::remove_file(path));
        }
        return Err(io_error("create", path)(error));
    }
    Ok(pepper)
}

fn parse_pepper(text: &str) -> Option<MasterPepper> {
    let mut content: PepperFile = serde_json::from_str(text).ok()?;
    let secret = secret_file::from_hex(&content.secret).map(Zeroizing::new);
    content.secret.zeroize();
    MasterPepper::new(PepperId::new(content.id), &secret?).ok()
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SecretFileError {
    let path = path.to_owned();
    move |source| SecretFileError::Io { what, path, source }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn a_pepper_is_created_once_and_read_back() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("pepper.json");
        let created = create_pepper(&path).expect("it is created");
        create_pepper(&path).expect_err("it is there");
        let read = read_pepper(&path).expect("it is read");
        assert_eq!(created.expose(), read.expose());
        let metadata = fs::metadata(&path).expect("it is there");
        assert_eq!(metadata.mode() & 0o777, 0o600);
    }

    #[test]
    fn a_bad_pepper_file_is_refused_without_telling_what_it_holds() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("pepper.json");
        for bad in [
            "",
            "{}",
            r#"{"id":1,"secret":"beef"}"#,
            r#"{"id":1,"secret":"äöüß"}"#,
        ] {
            fs::write(&path, bad).expect("it is written");
            let error = read_pepper(&path).expect_err(bad).to_string();
            assert!(error.contains("is not a pepper file"), "{error}");
            assert!(!error.contains("beef"), "{error}");
        }
    }

    #[test]
    fn a_missing_pepper_is_to_be_restored_and_not_created_anew() {
        let error = read_pepper(Path::new("/nonexistent/pepper.json")).expect_err("it is missing");
        let error = error.to_string();
        assert!(error.contains("restore it"), "{error}");
        assert!(!error.contains("init"), "{error}");
    }
}
