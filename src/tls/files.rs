//! The files that a side of a channel is configured with.

use std::{
    fs::File,
    io::Read as _,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

use super::{Authorities, TlsError};

/// Where a side's own certificate is, and whom it trusts. PEM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsFiles {
    /// Its certificate with those between it and the authority, and its private key.
    pub(crate) own: Option<OwnFiles>,
    /// The authorities whose certificates are trusted; none: those of the system for a client, nobody for a server.
    pub(crate) ca: Option<Authorities<PathBuf>>,
}

/// A certificate and its private key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OwnFiles {
    /// The certificate, first in its file.
    pub(crate) cert: PathBuf,
    /// The key.
    pub(crate) key: PathBuf,
}

/// What the files held at one moment.
#[derive(Debug)]
pub(super) struct Content {
    pub(super) own: Option<OwnContent>,
    pub(super) ca: Option<Authorities<AuthorityContent>>,
}

#[derive(Debug)]
pub(super) struct OwnContent {
    pub(super) cert: Vec<u8>,
    pub(super) key: Zeroizing<Vec<u8>>,
}

#[derive(Debug)]
pub(super) struct AuthorityContent {
    pub(super) path: PathBuf,
    /// Only of a bundle it may be an error: a trust domain whose bundle cannot be read holds up no other.
    pub(super) pem: Result<Vec<u8>, TlsError>,
}

/// Tells one content from another.
pub(super) type Fingerprint = [u8; 32];

/// A bundle of authorities of a system has some 300 KiB.
const MAX_FILE: u64 = 1 << 20;
/// What everybody may do with a file. The group may read a key: so does Kubernetes mount secrets for a user that is not
/// root (`fsGroup`).
const OTHERS: u32 = 0o007;
/// The place of a file that cannot be read, in the fingerprint of them all. No content has it.
const UNREADABLE: Fingerprint = [0; 32];

impl TlsFiles {
    /// Reads all of them.
    pub(super) fn read(&self) -> Result<Content, TlsError> {
        let own = self.own.as_ref().map(|files| {
            let key = read_key(&files.key)?;
            let (cert, _) = read(&files.cert)?;
            Ok::<_, TlsError>(OwnContent { cert, key })
        });
        let own = own.transpose()?;
        let ca = self.ca.as_ref().map(|ca| {
            ca.as_ref().try_map(|domain, path| {
                let path = path.clone();
                let pem = match read(&path) {
                    Ok((pem, _)) => Ok(pem),
                    Err(error) if domain.is_some() => Err(error),
                    Err(error) => return Err(error),
                };
                Ok(AuthorityContent { path, pem })
            })
        });
        Ok(Content {
            own,
            ca: ca.transpose()?,
        })
    }
}

impl Content {
    pub(super) fn fingerprint(&self) -> Fingerprint {
        let own = self.own.iter().map(|own| Some(own.fingerprint()));
        let authorities = self.ca.iter().flat_map(Authorities::iter);
        let authorities = authorities.map(|(_, content)| {
            let pem = content.pem.as_ref().ok();
            pem.map(|pem| fingerprint(&[pem]))
        });
        let parts: Vec<Fingerprint> = own
            .chain(authorities)
            .map(|part| part.unwrap_or(UNREADABLE))
            .collect();
        let parts: Vec<&[u8]> = parts.iter().map(<[u8; 32]>::as_slice).collect();
        fingerprint(&parts)
    }
}

impl OwnContent {
    pub(super) fn fingerprint(&self) -> Fingerprint {
        fingerprint(&[&self.cert, &self.key])
    }
}

pub(super) fn fingerprint(parts: &[&[u8]]) -> Fingerprint {
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    hash.finalize().into()
}

/// Reads a private key, which not everybody may be able to use.
pub(super) fn read_key(path: &Path) -> Result<Zeroizing<Vec<u8>>, TlsError> {
    let (key, mode) = read(path)?;
    let key = Zeroizing::new(key);
    if mode & OTHERS != 0 {
        return Err(TlsError::Exposed {
            path: path.to_owned(),
            mode: mode & 0o777,
        });
    }
    Ok(key)
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
