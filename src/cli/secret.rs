//! The input and output of secrets. A secret is read from a file or from standard input, and shown once. It is never an
//! argument, because the history of the shell and every process of the machine could read it.
//!
//! These types wipe their memory when they are dropped. They cannot wipe the copies in the network stack, in the buffer of
//! standard output and in the terminal.

use std::{
    fmt,
    fs::File,
    io::{self, IsTerminal, Read},
    path::PathBuf,
    str::FromStr,
};

use serde::{Serialize, Serializer};
use zeroize::Zeroizing;

use super::failure::{Exit, Failure};

/// The source of a secret: a file, or `-` for standard input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum SecretInput {
    /// Standard input.
    Stdin,
    /// A file.
    File(PathBuf),
}

/// A secret that the control plane has just created, to show once.
pub struct Revealed(Zeroizing<String>);

/// The longest input, in bytes. The longest key has 512 bytes, and the longest token has fewer; the rest is for the end of
/// the line. A longer file is a wrong file.
const MAX_LEN: usize = 1024;

impl SecretInput {
    /// Reads the secret, without the line end that an editor or `echo` adds: one `\n` or `\r\n`.
    ///
    /// # Errors
    ///
    /// When standard input is a terminal (there is no prompt for secrets), or when the input cannot be read, is empty or is too
    /// long.
    pub(crate) fn read(&self, what: &str, flag: &str) -> Result<Zeroizing<Vec<u8>>, Failure> {
        let secret = match self {
            Self::Stdin if io::stdin().is_terminal() => {
                return Err(Failure::usage(format!(
                    "standard input is a terminal: no {what} to read"
                ))
                .hint(format!(
                    "use {flag} PATH, or pipe the {what} into the command"
                )));
            }
            Self::Stdin => read_bounded(io::stdin().lock()),
            Self::File(path) => File::open(path).and_then(read_bounded),
        };
        secret.map_err(|error| {
            Failure::new(Exit::Usage, error).context(format!("cannot read the {what} from {self}"))
        })
    }
}

impl FromStr for SecretInput {
    type Err = std::convert::Infallible;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Ok(if text == "-" {
            Self::Stdin
        } else {
            Self::File(text.into())
        })
    }
}

impl fmt::Display for SecretInput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Stdin => f.write_str("standard input"),
            Self::File(path) => write!(f, "{}", path.display()),
        }
    }
}

impl Revealed {
    /// Creates it from a secret in a message; none if the message has none.
    #[must_use]
    pub fn new(secret: String) -> Option<Self> {
        let secret = Zeroizing::new(secret);
        (!secret.is_empty()).then_some(Self(secret))
    }

    /// The secret in plaintext, for standard output.
    #[must_use]
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Revealed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Revealed(redacted)")
    }
}

/// The secret in plaintext: `-o json` shows it so.
impl Serialize for Revealed {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

fn read_bounded(input: impl Read) -> io::Result<Zeroizing<Vec<u8>>> {
    // The capacity is enough for all input: a vector that grows leaves a copy of the secret behind.
    let mut secret = Zeroizing::new(Vec::with_capacity(MAX_LEN + 1));
    let mut chunk = Zeroizing::new([0; MAX_LEN + 1]);
    let mut input = input.take(MAX_LEN as u64 + 1);
    loop {
        match input.read(chunk.as_mut_slice()) {
            Ok(0) => break,
            Ok(read) => secret.extend_from_slice(&chunk[..read]),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    if secret.len() > MAX_LEN {
        return Err(io::Error::new(
            io::ErrorKind::InvalidData,
            format!("longer than {MAX_LEN} bytes"),
        ));
    }
    if secret.ends_with(b"\n") {
        secret.pop();
        if secret.ends_with(b"\r") {
            secret.pop();
        }
    }
    if secret.is_empty() {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "it is empty"));
    }
    Ok(secret)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn read(bytes: &[u8]) -> io::Result<Vec<u8>> {
        read_bounded(bytes).map(|secret| secret.to_vec())
    }

    #[test]
    fn one_line_end_is_stripped_and_no_more() {
        for (input, secret) in [
            ("ak_0123\n", "ak_0123"),
            ("ak_0123\r\n", "ak_0123"),
            ("ak_0123\n\n", "ak_0123\n"),
            (" ak_0123 ", " ak_0123 "),
        ] {
            let read = read(input.as_bytes()).expect("readable");
            assert_eq!(read, secret.as_bytes());
        }
    }

    #[test]
    fn empty_and_long_inputs_are_refused() {
        assert!(read(b"").is_err());
        assert!(read(b"\n").is_err());
        assert!(read(&[b'x'; MAX_LEN]).is_ok());
        assert!(read(&[b'x'; MAX_LEN + 1]).is_err());
    }

    #[test]
    fn a_file_that_is_not_there_is_named() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("key");
        let input = SecretInput::File(path.clone());
        let failure = input.read("key", "--from-file").expect_err("not there");
        assert_eq!(failure.exit(), Exit::Usage);
        assert!(failure.report(false).contains(&*path.to_string_lossy()));

        fs::write(&path, "ak_0123\n").expect("writable");
        let secret = input.read("key", "--from-file").expect("there");
        assert_eq!(secret.as_slice(), b"ak_0123");
    }

    #[test]
    fn a_dash_is_standard_input() {
        assert_eq!("-".parse(), Ok(SecretInput::Stdin));
        assert_eq!("./-".parse(), Ok(SecretInput::File("./-".into())));
    }

    #[test]
    fn a_revealed_secret_does_not_print_but_is_written_as_json() {
        let secret = Revealed::new("rlk_x".to_owned()).expect("not empty");
        assert_eq!(format!("{secret:?}"), "Revealed(redacted)");
        let json = serde_json::to_string(&secret).expect("serializable");
        assert_eq!(json, "\"rlk_x\"");
        assert!(Revealed::new(String::new()).is_none());
    }
}
