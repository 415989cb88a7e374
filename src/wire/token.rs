//! The token that a sidecar sends in place of a certificate, and its file.

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

/// 32 to 512 printable ASCII characters without spaces, such as the output of `openssl rand -hex
/// 32`. Never printed.
pub struct SidecarToken(Zeroizing<String>);

/// The reason that a file contains no token that can be used.
#[derive(Debug, thiserror::Error)]
pub enum TokenFileError {
    /// The file cannot be read, or other users may use it.
    #[error(transparent)]
    File(#[from] PrivateFileError),
    /// The file contains something else than a token.
    #[error(
        "{} holds no token: write one line of 32 to 512 printable characters, such as the output of `openssl rand -hex 32`", path.display()
    )]
    Malformed {
        /// The path of the file.
        path: PathBuf,
    },
}

/// The minimum length in bytes: a shorter token could be guessed, whatever its characters are.
const MIN_LEN: usize = 32;

impl SidecarToken {
    /// Reads a token from a file that other users cannot use. White space around the token is
    /// ignored.
    ///
    /// # Errors
    ///
    /// When the file contains no token, cannot be read, or can be used by other users.
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

    /// Returns the token in the form in which it is compared.
    #[must_use]
    pub(crate) fn presented(&self) -> PresentedKey<'_> {
        PresentedKey::new(self.0.as_bytes()).expect("it was printable when it was read")
    }

    /// Returns the value of the metadata `authorization` of a call (RFC 6750, section 2.1).
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
