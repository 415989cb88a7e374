//! The file that holds a control plane's master pepper, and the directory that it lies in.

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, Zeroizing};

use crate::{
    key::{MasterPepper, PepperId, RandomError},
    secret_file,
};

/// A file of secrets cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum SecretFileError {
    /// It is not there.
    #[error("there is no file {}: make it with `relatch control init`, or correct the path", path.display())]
    Missing {
        /// Which file.
        path: PathBuf,
    },
    /// It cannot be read or written.
    #[error("cannot {what} {}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// It is not what it should be. What it holds is not told.
    #[error("{} is not a pepper file: it must be the one that `relatch control init` made, or a copy of it", path.display())]
    Malformed {
        /// Which file.
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

/// The first pepper of a control plane.
const FIRST_PEPPER: PepperId = PepperId::new(1);

/// Makes a directory that only its owner can enter, with those above it; one that exists is left as it is.
///
/// # Errors
///
/// When that is not possible.
pub fn ensure_directory(path: &Path) -> Result<(), SecretFileError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(io_error("make the directory", path))
}

/// Reads the master pepper.
///
/// # Errors
///
/// When the file is missing, unreadable, or something else.
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

/// Reads the master pepper, or makes one where there is no file.
///
/// # Errors
///
/// When that is not possible.
pub fn ensure_pepper(path: &Path) -> Result<MasterPepper, SecretFileError> {
    match read_pepper(path) {
        Err(SecretFileError::Missing { .. }) => {
            let pepper = MasterPepper::generate(FIRST_PEPPER)?;
            let mut content = PepperFile {
                id: pepper.id().get(),
                secret: secret_file::to_hex(pepper.expose()),
            };
            let json = serde_json::to_string(&content).map(Zeroizing::new);
            content.secret.zeroize();
            let json = json.map_err(|error| io_error("encode", path)(error.into()))?;
            secret_file::write_new(path, &json).map_err(io_error("make", path))?;
            Ok(pepper)
        }
        read => read,
    }
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
    fn a_pepper_is_made_once_and_read_back() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("pepper.json");
        let made = ensure_pepper(&path).expect("it is made");
        let read = ensure_pepper(&path).expect("it is read");
        assert_eq!(made.expose(), read.expose());
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
            let error = ensure_pepper(&path).expect_err(bad).to_string();
            assert!(error.contains("is not a pepper file"), "{error}");
            assert!(!error.contains("beef"), "{error}");
        }
    }

    #[test]
    fn a_missing_pepper_names_the_command_that_makes_it() {
        let error = read_pepper(Path::new("/nonexistent/pepper.json")).expect_err("it is missing");
        assert!(error.to_string().contains("relatch control init"));
    }
}
