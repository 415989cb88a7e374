//! The token that a sidecar shows in the place of a certificate, and the file that it is in.

use std::{
    fmt,
    path::{Path, PathBuf},
};

use http::HeaderValue;
use zeroize::Zeroizing;

use crate::{
    key::PresentedKey,
    secret_file::{self, PrivateFileError},
};

/// 32 to 512 printable characters of ASCII without spaces, such as `openssl rand -hex 32` makes. Never printed.
pub struct SidecarToken(Zeroizing<String>);

/// A file holds no token that can be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenFileError {
    /// It cannot be read, or others can.
    #[error(transparent)]
    File(#[from] PrivateFileError),
    /// It holds something else.
    #[error(
        "{} holds no token: write one line of 32 to 512 printable characters, such as `openssl rand -hex 32` makes", path.display()
    )]
    Malformed {
        /// Which file.
        path: PathBuf,
    },
}

/// A shorter one could be guessed, whatever it is made of.
const MIN_LEN: usize = 32;

impl SidecarToken {
    /// Reads it from a file of its own that nobody else can use. What is white around it does not count.
    ///
    /// # Errors
    ///
    /// When there is none, or others can use the file.
    pub fn read(path: &Path) -> Result<Self, TokenFileError> {
        let text = secret_file::read_private(path)?;
        let token = text.trim();
        if token.len() < MIN_LEN || PresentedKey::new(token.as_bytes()).is_err() {
            return Err(TokenFileError::Malformed {
                path: path.to_owned(),
            });
        }
        Ok(Self(Zeroizing::new(token.to_owned())))
    }

    /// As it is compared.
    #[must_use]
    pub(crate) fn presented(&self) -> PresentedKey<'_> {
        PresentedKey::new(self.0.as_bytes()).expect("it was printable when it was read")
    }

    /// What goes into the metadata `authorization` of a call (RFC 6750, section 2.1).
    #[must_use]
    pub(crate) fn bearer(&self) -> HeaderValue {
        let text = Zeroizing::new(format!("Bearer {}", self.0.as_str()));
        let mut value = HeaderValue::from_str(&text).expect("it was printable when it was read");
        value.set_sensitive(true);
        value
    }
}

impl fmt::Debug for SidecarToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SidecarToken(redacted)")
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use super::*;

    const TOKEN: &str = "0123456789abcdef0123456789abcdef";

    fn read(content: &str) -> Result<SidecarToken, TokenFileError> {
        let dir = tempfile::tempdir().expect("a directory can be made");
        let path = dir.path().join("edge-1.token");
        fs::write(&path, content).expect("writable");
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).expect("it is ours");
        SidecarToken::read(&path)
    }

    #[test]
    fn a_line_is_read_and_shown_as_a_bearer() {
        let token = read(&format!("{TOKEN}\n")).expect("a token");
        let bearer = token.bearer();
        assert_eq!(bearer, format!("Bearer {TOKEN}"));
        assert!(bearer.is_sensitive());
        assert_eq!(format!("{token:?}"), "SidecarToken(redacted)");
    }

    #[test]
    fn what_is_no_token_is_refused_and_not_told() {
        let long = TOKEN.repeat(17);
        for content in [
            "",
            "short",
            &TOKEN[1..],
            "a token of two words, long enough",
            &long,
        ] {
            let error = read(content).expect_err(content).to_string();
            assert!(error.contains("edge-1.token holds no token"), "{error}");
            assert!(content.is_empty() || !error.contains(content), "{error}");
        }
        let missing = SidecarToken::read(Path::new("/nowhere/edge-1.token"));
        let error = missing.expect_err("it is missing").to_string();
        assert_eq!(error, "cannot read /nowhere/edge-1.token");
    }
}
