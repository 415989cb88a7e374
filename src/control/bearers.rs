//! The tokens of sidecars that have no certificate, and the identity of each token.

use std::{sync::Arc, time::Duration};

use arc_swap::ArcSwap;
use tokio_util::sync::CancellationToken;

use crate::{
    admission::BearerFile,
    key::{KeyDigest, Pepper, PresentedKey},
    seldom::Seldom,
    tls::Identity,
    wire::token::{SidecarToken, TokenFileError},
};

/// The tokens of all files, as they were last read.
#[derive(Debug)]
pub(crate) struct Bearers {
    files: Vec<BearerFile>,
    pepper: Pepper,
    /// The digest of the token in each file; none if the file has no token.
    digests: ArcSwap<Vec<Option<KeyDigest>>>,
}

/// The interval between two reads of the files, as for certificates.
const EVERY: Duration = Duration::from_secs(2);
/// The least interval between two logs of errors: a file that cannot be read now cannot be read two
/// seconds later.
const LOG_INTERVAL: Duration = Duration::from_mins(1);

impl Bearers {
    /// Reads all `files`.
    ///
    /// # Errors
    ///
    /// When one of them has no token: at the start, that is a mistake.
    pub(crate) fn load(
        files: Vec<BearerFile>,
        pepper: Pepper,
    ) -> Result<Arc<Self>, TokenFileError> {
        let digests = files.iter().map(|file| read(&pepper, file).map(Some));
        let digests = digests.collect::<Result<_, _>>()?;
        Ok(Arc::new(Self {
            files,
            digests: ArcSwap::from_pointee(digests),
            pepper,
        }))
    }

    /// Returns the identity that a token proves. If two files have the same token, the first
    /// counts.
    #[must_use]
    pub(crate) fn identity_of(&self, token: &str) -> Option<&Identity> {
        let presented = PresentedKey::new(token.as_bytes()).ok()?;
        let digest = self.pepper.digest(&presented);
        let digests = self.digests.load();
        let at = digests.iter().position(|held| *held == Some(digest))?;
        Some(&self.files[at].identity)
    }

    /// Reads the files every two seconds until `stop`. A file that has no token any more admits no
    /// sidecar.
    pub(crate) async fn keep(self: Arc<Self>, stop: CancellationToken) {
        let mut told = Seldom::new(LOG_INTERVAL);
        loop {
            tokio::select! {
                () = tokio::time::sleep(EVERY) => {}
                () = stop.cancelled() => return,
            }
            let bearers = Arc::clone(&self);
            // A file may be on a disk or a network that hangs.
            let looked = tokio::task::spawn_blocking(move || bearers.look());
            tokio::select! {
                looked = looked => match looked {
                    Ok(errors) => tell(&errors, &mut told),
                    Err(error) => tracing::error!(
                        error = &error as &dyn std::error::Error,
                        "the task that reads the token files failed; it runs again at the next interval"
                    ),
                },
                () = stop.cancelled() => return,
            }
        }
    }

    /// Reads all files again, and returns the errors.
    fn look(&self) -> Vec<TokenFileError> {
        let mut errors = Vec::new();
        let digests = self
            .files
            .iter()
            .map(|file| match read(&self.pepper, file) {
                Ok(digest) => Some(digest),
                Err(error) => {
                    errors.push(error);
                    None
                }
            });
        let digests = digests.collect();
        self.digests.store(Arc::new(digests));
        errors
    }
}

fn read(pepper: &Pepper, file: &BearerFile) -> Result<KeyDigest, TokenFileError> {
    let token = SidecarToken::read(&file.path)?;
    Ok(pepper.digest(&token.presented()))
}

fn tell(errors: &[TokenFileError], told: &mut Seldom) {
    if errors.is_empty() || !told.is_due() {
        return;
    }
    for error in errors {
        tracing::error!(
            error = error as &dyn std::error::Error,
            "the sidecar with this token is refused"
        );
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs,
        os::unix::fs::{OpenOptionsExt as _, PermissionsExt as _},
    };

    use tempfile::TempDir;

    use super::*;
    use crate::key::testing;

    const ONE: &str = "0123456789abcdef0123456789abcdef";
    const OTHER: &str = "fedcba9876543210fedcba9876543210";
    const NEW: &str = "ffffffffffffffffffffffffffffffff";

    fn file(dir: &TempDir, name: &str, token: &str) -> BearerFile {
        use std::io::Write as _;
        let path = dir.path().join(name);
        let opened = fs::OpenOptions::new()
            .create(true)
            .truncate(true)
            .write(true)
            .mode(0o600)
            .open(&path);
        opened
            .and_then(|mut file| file.write_all(token.as_bytes()))
            .expect("writable");
        BearerFile {
            path,
            identity: format!("spiffe://mesh/{name}")
                .parse()
                .expect("an identity"),
        }
    }

    fn speaks_for<'a>(bearers: &'a Bearers, token: &str) -> Option<&'a str> {
        bearers.identity_of(token).map(Identity::as_str)
    }

    #[test]
    fn a_token_speaks_for_the_identity_of_its_file() {
        let dir = tempfile::tempdir().expect("a directory can be made");
        let files = vec![file(&dir, "edge-1", ONE), file(&dir, "edge-2", OTHER)];
        let bearers = Bearers::load(files, testing::pepper()).expect("both hold one");
        assert_eq!(speaks_for(&bearers, ONE), Some("spiffe://mesh/edge-1"));
        assert_eq!(speaks_for(&bearers, OTHER), Some("spiffe://mesh/edge-2"));
        for nobodys in [NEW, "", &ONE[1..], "two words"] {
            assert_eq!(speaks_for(&bearers, nobodys), None, "{nobodys:?}");
        }
    }

    #[test]
    fn a_file_that_changes_is_read_again() {
        let dir = tempfile::tempdir().expect("a directory can be made");
        let files = vec![file(&dir, "edge-1", ONE), file(&dir, "edge-2", OTHER)];
        let bearers = Bearers::load(files, testing::pepper()).expect("both hold one");
        file(&dir, "edge-1", NEW);
        assert!(bearers.look().is_empty());
        assert_eq!(speaks_for(&bearers, ONE), None);
        assert_eq!(speaks_for(&bearers, NEW), Some("spiffe://mesh/edge-1"));

        let open = fs::Permissions::from_mode(0o644);
        fs::set_permissions(dir.path().join("edge-1"), open).expect("it is ours");
        assert_eq!(bearers.look().len(), 1);
        assert_eq!(speaks_for(&bearers, NEW), None, "others may have read it");
        assert_eq!(speaks_for(&bearers, OTHER), Some("spiffe://mesh/edge-2"));
    }

    #[test]
    fn nobody_begins_with_a_file_without_a_token() {
        let dir = tempfile::tempdir().expect("a directory can be made");
        let files = vec![file(&dir, "edge-1", "")];
        let error = Bearers::load(files, testing::pepper()).expect_err("it is empty");
        assert!(matches!(error, TokenFileError::Malformed { .. }), "{error}");
    }
}
