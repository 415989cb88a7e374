//! The certificate files that are configured for one side of a channel.

use std::{
    fs::File,
    io::Read as _,
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use sha2::{Digest as _, Sha256};
use zeroize::Zeroizing;

use super::{Authorities, TlsError};

/// The files of a side's own certificate, and of the authorities that it trusts, in PEM.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TlsFiles {
    /// Its certificate with the intermediate ones, and its private key.
    pub(crate) own: Option<OwnFiles>,
    /// The trusted authorities; none: a client trusts those of the system, and a server asks for no
    /// certificate.
    pub(crate) ca: Option<Authorities<PathBuf>>,
}

/// A certificate and its private key.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OwnFiles {
    /// The certificate, followed by the intermediate ones.
    pub(crate) cert: PathBuf,
    pub(crate) key: PathBuf,
}

/// The content of the files at one moment.
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
    /// Can be an error only for a bundle: a trust domain whose bundle cannot be read does not
    /// affect the others.
    pub(super) pem: Result<Vec<u8>, TlsError>,
}

/// A hash that differs for different content.
pub(super) type Fingerprint = [u8; 32];

/// The maximum size of a file, in bytes. The bundle of a system has some 300 KiB.
const MAX_FILE: u64 = 1 << 20;
/// The permission bits of all other users. The group may read a key: Kubernetes mounts secrets like
/// this for a user other than root (`fsGroup`).
const OTHERS: u32 = 0o007;
/// Replaces the fingerprint of a bundle that cannot be read. No content has this fingerprint.
const UNREADABLE: Fingerprint = [0; 32];

impl TlsFiles {
    /// Reads all files.
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

/// Reads a private key. It is an error if every user can use the file.
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
        // The buffer has its final size from the start, so that no copies of a key remain in
        // smaller buffers.
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
