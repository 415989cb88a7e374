//! The origin of a snapshot file: its id, its inode and the clock of its sidecar.

use std::{
    fmt,
    fs::Metadata,
    os::unix::fs::MetadataExt,
    time::{SystemTime, UNIX_EPOCH},
};

use crate::{
    clock::{BootClock, BootId},
    key::{RandomError, fill_random},
    proto::snapshot,
};

/// The origin of a snapshot file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The id of the file, the same over all rewrites and runs.
    pub id: FileId,
    /// The inode to which the file was written.
    pub inode: Inode,
    /// The clock of the sidecar that wrote it; none if the system did not report it.
    pub boot_clock: Option<BootClock>,
}

/// The id of a snapshot file, the same over all rewrites and runs.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct FileId([u8; FileId::LEN]);

/// An inode: a renamed file keeps it, and a copy has another one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Inode {
    /// The device of the file system.
    pub device: u64,
    /// The number in the file system, which may be used again after the file is removed.
    pub number: u64,
    /// The time of its creation, in nanoseconds since the Unix epoch; zero if the file system does not report it.
    pub born_ns: i64,
}

impl Origin {
    /// Whether a file with this origin was created as `inode` and by the clock `boot_clock`. Only then is its age known:
    /// another file may be a copy, or of another boot.
    #[must_use]
    pub(crate) fn is_here(&self, inode: Inode, boot_clock: Option<&BootClock>) -> bool {
        self.inode == inode && boot_clock.is_some() && self.boot_clock.as_ref() == boot_clock
    }

    pub(super) fn to_wire(&self) -> (Vec<u8>, snapshot::Inode, Option<snapshot::BootClock>) {
        let inode = snapshot::Inode {
            device: self.inode.device,
            number: self.inode.number,
            born_ns: self.inode.born_ns,
        };
        let boot_clock = self.boot_clock.as_ref().map(|clock| snapshot::BootClock {
            boot_id: clock.boot_id.to_string(),
            time_namespace: clock.time_namespace,
        });
        (self.id.0.to_vec(), inode, boot_clock)
    }

    /// None if the header does not have one.
    pub(super) fn from_wire(header: &snapshot::Header) -> Option<Self> {
        let inode = header.inode.as_ref()?;
        let boot_clock = match &header.boot_clock {
            None => None,
            Some(clock) => Some(BootClock {
                boot_id: BootId::new(&clock.boot_id)?,
                time_namespace: clock.time_namespace,
            }),
        };
        Some(Self {
            id: FileId(header.id[..].try_into().ok()?),
            inode: Inode {
                device: inode.device,
                number: inode.number,
                born_ns: inode.born_ns,
            },
            boot_clock,
        })
    }
}

impl FileId {
    /// The length in bytes.
    pub const LEN: usize = 16;

    /// Creates an id that no other file has.
    ///
    /// # Errors
    ///
    /// When the random source of the operating system fails.
    pub(crate) fn generate() -> Result<Self, RandomError> {
        let mut id = [0; Self::LEN];
        fill_random(&mut id)?;
        Ok(Self(id))
    }

    /// An id from its bytes.
    #[must_use]
    pub const fn new(bytes: [u8; Self::LEN]) -> Self {
        Self(bytes)
    }

    /// The bytes of the id.
    #[must_use]
    pub(crate) const fn as_bytes(&self) -> &[u8; Self::LEN] {
        &self.0
    }
}

impl fmt::Display for FileId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for FileId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "FileId({self})")
    }
}

impl Inode {
    /// The inode of `metadata`.
    #[must_use]
    pub(crate) fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            number: metadata.ino(),
            born_ns: metadata.created().map_or(0, nanos),
        }
    }
}

fn nanos(time: SystemTime) -> i64 {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    fn clock(boot_id: &str, time_namespace: u64) -> BootClock {
        BootClock {
            boot_id: BootId::new(boot_id).expect("it is short"),
            time_namespace,
        }
    }

    #[test]
    fn a_file_is_where_it_was_made_on_the_same_clock_only() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("file");
        fs::write(&path, "x").expect("it is written");
        let inode = |name: &str| Inode::of(&fs::metadata(dir.path().join(name)).expect("a file"));
        let origin = Origin {
            id: FileId::new([1; FileId::LEN]),
            inode: inode("file"),
            boot_clock: Some(clock("one", 1)),
        };
        let here = |inode, clock: Option<BootClock>| origin.is_here(inode, clock.as_ref());
        fs::rename(&path, dir.path().join("renamed")).expect("it is ours");
        assert!(here(inode("renamed"), Some(clock("one", 1))));
        assert!(!here(inode("renamed"), Some(clock("two", 1))));
        assert!(!here(inode("renamed"), Some(clock("one", 2))));
        assert!(!here(inode("renamed"), None));
        fs::copy(dir.path().join("renamed"), dir.path().join("copy")).expect("it is ours");
        assert!(!here(inode("copy"), Some(clock("one", 1))));
        // One that cannot be told is not the same one.
        let untold = Origin {
            boot_clock: None,
            ..origin.clone()
        };
        assert!(!untold.is_here(inode("renamed"), None));
    }

    /// File systems give the number of a file that was removed to the next one.
    #[test]
    fn an_inode_number_that_is_used_again_is_another_inode() {
        let inode = Inode {
            device: 1,
            number: 2,
            born_ns: 3,
        };
        let origin = Origin {
            id: FileId::new([1; FileId::LEN]),
            inode,
            boot_clock: Some(clock("one", 1)),
        };
        let again = Inode {
            born_ns: 4,
            ..inode
        };
        assert!(!origin.is_here(again, Some(&clock("one", 1))));
    }
}
