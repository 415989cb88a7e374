//! The files that hold a control plane's secrets: the master pepper, and the first admin token of `relatch dev`.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read, Write},
    os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, Zeroizing};

use crate::key::{MasterPepper, PepperId, RandomError};

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
/// The largest file that is read: a pepper file has about 100 bytes, the largest tokens of secret stores some hundred.
const MAX_LEN: u64 = 4 << 10;

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
    let text = read_secret(path).map_err(|source| match source.kind() {
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
                secret: to_hex(pepper.expose()),
            };
            let json = serde_json::to_string(&content).map(Zeroizing::new);
            content.secret.zeroize();
            let json = json.map_err(|error| io_error("encode", path)(error.into()))?;
            write_new(path, &json)?;
            Ok(pepper)
        }
        read => read,
    }
}

/// Reads a file that holds a secret, at most 4 KiB of it; warns when others than its owner can read it.
///
/// # Errors
///
/// When it is missing, unreadable, or not UTF-8.
pub fn read_secret(path: &Path) -> io::Result<Zeroizing<String>> {
    let file = File::open(path)?;
    let mode = file.metadata()?.mode();
    if mode & 0o077 != 0 {
        tracing::warn!(
            path = %path.display(),
            mode = format!("{:03o}", mode & 0o777),
            "others than its owner can read this file of a secret; `chmod 600` it"
        );
    }
    let mut text = Zeroizing::new(String::new());
    file.take(MAX_LEN).read_to_string(&mut text)?;
    Ok(text)
}

/// Writes a secret to a new file that only its owner can read.
///
/// # Errors
///
/// When the file exists, or cannot be written.
pub fn write_new(path: &Path, secret: &str) -> Result<(), SecretFileError> {
    let mut file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(io_error("make", path))?;
    file.write_all(secret.as_bytes())
        .and_then(|()| file.write_all(b"\n"))
        .and_then(|()| file.sync_all())
        .map_err(io_error("write", path))
}

fn parse_pepper(text: &str) -> Option<MasterPepper> {
    let mut content: PepperFile = serde_json::from_str(text).ok()?;
    let secret = from_hex(&content.secret).map(Zeroizing::new);
    content.secret.zeroize();
    MasterPepper::new(PepperId::new(content.id), &secret?).ok()
}

fn to_hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let digit = |nibble: u8| char::from(DIGITS[usize::from(nibble)]);
    bytes
        .iter()
        .flat_map(|byte| [digit(byte >> 4), digit(byte & 15)])
        .collect()
}

fn from_hex(text: &str) -> Option<Vec<u8>> {
    let digit = |byte: u8| char::from(byte).to_digit(16);
    if !text.len().is_multiple_of(2) {
        return None;
    }
    text.as_bytes()
        .chunks_exact(2)
        .map(|pair| u8::try_from(digit(pair[0])? << 4 | digit(pair[1])?).ok())
        .collect()
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> SecretFileError {
    let path = path.to_owned();
    move |source| SecretFileError::Io { what, path, source }
}

#[cfg(test)]
mod tests {
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

    #[test]
    fn a_secret_is_never_written_over_a_file() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("admin.token");
        write_new(&path, "one").expect("a new file");
        assert!(write_new(&path, "two").is_err());
        assert_eq!(fs::read_to_string(&path).expect("it is there"), "one\n");
    }
}
