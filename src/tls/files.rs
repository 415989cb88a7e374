//! The files that a side of a channel is configured with.

use std::{
    fs::File,
    io::Read as _,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

use super::TlsError;

/// Where a side's own certificate is, and whom it trusts. PEM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsFiles {
    /// Its certificate with those between it and the authority, and its private key.
    pub own: Option<OwnFiles>,
    /// The authorities whose certificates are trusted; none: those of the system for a client, nobody for a server.
    pub ca: Option<PathBuf>,
}

/// A certificate and its private key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OwnFiles {
    /// The certificate, first in its file.
    pub cert: PathBuf,
    /// The key.
    pub key: PathBuf,
}

/// What the files held at one moment.
#[derive(Debug)]
pub(super) struct Content {
    pub(super) own: Option<OwnContent>,
    pub(super) ca: Option<Vec<u8>>,
}

#[derive(Debug)]
pub(super) struct OwnContent {
    pub(super) cert: Vec<u8>,
    pub(super) key: Zeroizing<Vec<u8>>,
}

/// Tells one content from another.
pub(super) type Fingerprint = [u8; 32];

/// A bundle of authorities of a system has some 300 KiB.
const MAX_FILE: u64 = 1 << 20;
/// What everybody may do with a file. The group may read a key: so does Kubernetes mount secrets for a user that is not
/// root (`fsGroup`).
const OTHERS: u32 = 0o007;

impl TlsFiles {
    /// Reads all of them.
    pub(super) fn read(&self) -> Result<Content, TlsError> {
        let own = self.own.as_ref().map(|files| {
            let (key, mode) = read(&files.key)?;
            let key = Zeroizing::new(key);
            if mode & OTHERS != 0 {
                return Err(TlsError::Exposed {
                    path: files.key.clone(),
                    mode: mode & 0o777,
                });
            }
            let (cert, _) = read(&files.cert)?;
            Ok(OwnContent { cert, key })
        });
        let ca = self.ca.as_ref().map(|path| read(path));
        Ok(Content {
            own: own.transpose()?,
            ca: ca.transpose()?.map(|(pem, _)| pem),
        })
    }
}

impl Content {
    pub(super) fn fingerprint(&self) -> Fingerprint {
        let own = self.own.as_ref();
        let parts = [
            own.map(|own| own.cert.as_slice()),
            own.map(|own| own.key.as_slice()),
            self.ca.as_deref(),
        ];
        let mut hash = Sha256::new();
        for part in parts {
            let part = part.unwrap_or_default();
            hash.update((part.len() as u64).to_be_bytes());
            hash.update(part);
        }
        hash.finalize().into()
    }
}

fn read(path: &Path) -> Result<(Vec<u8>, u32), TlsError> {
    let mut bytes = Vec::new();
    let read = File::open(path).and_then(|file| {
        let metadata = file.metadata()?;
        // At once, so that a key is not left behind in buffers that were too small.
        bytes.reserve_exact(usize::try_from(metadata.len().min(MAX_FILE)).unwrap_or(0) + 1);
        file.take(MAX_FILE + 1).read_to_end(&mut bytes)?;
        Ok(metadata.mode())
    });
    let mode = read.map_err(|source| TlsError::Read {
        path: path.to_owned(),
        source,
    })?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(TlsError::TooLarge {
            path: path.to_owned(),
            limit: MAX_FILE,
        });
    }
    Ok((bytes, mode))
}
