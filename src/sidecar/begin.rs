//! The start of a sidecar with a snapshot file: the file is loaded, and a keeper continues to write
//! it.

use std::{fs::File, sync::Arc};

use crate::{
    causes,
    clock::{Clock, LatestWall},
    config::sidecar::{NodeSettings, SnapshotSettings},
    follow::receiver::Receiver,
    key::{KeyringName, RandomError},
    keyring::{Keyrings, Restored, Slot},
    snapshot::{
        closer::Closer,
        disk::Disk,
        error::RefusedError,
        journal::{Applied, Ending, Journal},
        keeper::{Keeper, KeeperParts},
        key::{KeyFileError, SnapshotKey},
        lock::FileLock,
        origin::{FileId, Inode},
        place::{PlaceError, SnapshotPlace},
        pulse::Now,
        read::{self, Contents, Tail},
        recorder::Recorder,
    },
};

/// The result of [`begin`].
#[derive(Debug)]
pub(crate) struct Begun {
    /// The state of the snapshot file.
    pub(crate) disk: Arc<Disk>,
    /// None if another process uses the file: this process then neither reads nor writes it.
    pub(crate) kept: Option<KeptFile>,
}

/// The snapshot file that this process writes.
#[derive(Debug)]
pub(crate) struct KeptFile {
    /// Writes the file while it runs.
    pub(crate) keeper: Keeper,
    /// Writes the file for the last time, or erases it, at an orderly stop.
    pub(crate) closer: Closer,
    /// The lock that this process holds while it uses the file; none if it could not be acquired on
    /// this disk.
    pub(crate) lock: Option<Arc<FileLock>>,
    /// The identity of the file: that of the loaded file, or a new one.
    pub(crate) id: FileId,
    /// The number of the last write in the loaded file; 0 if no file was loaded, or if it is a
    /// copy, an older file, or from another boot.
    pub(crate) begun_from_write: u64,
}

/// The reason why a sidecar with a snapshot file cannot start.
#[derive(Debug, thiserror::Error)]
pub enum BeginError {
    /// The key of the file cannot be read.
    #[error("snapshot.key_file")]
    Key(#[from] KeyFileError),
    /// No file can be created at the configured path. A file that another process uses is not an
    /// error: the sidecar starts without it.
    #[error("snapshot.path")]
    SnapshotPlace(#[from] PlaceError),
    /// The operating system's random source failed.
    #[error(transparent)]
    Random(#[from] RandomError),
}

/// The parts of a sidecar that has no keys yet.
#[derive(Debug)]
pub(crate) struct Empty<'a> {
    pub(crate) node: &'a NodeSettings,
    /// The keyrings that the configuration names, none of them loaded.
    pub(crate) keyrings: &'a Keyrings,
    /// Receives the keyrings of the file, and later those of the control plane.
    pub(crate) receiver: &'a mut Receiver,
    /// The latest time by which the validity of versions was judged.
    pub(crate) latest: &'a LatestWall,
    pub(crate) clock: &'a Clock,
}

/// A snapshot file that was read and can be loaded.
struct Taken {
    file: File,
    inode: Inode,
    contents: Contents,
}

/// Loads the snapshot file, and creates the keeper that writes it. A file that is refused is put
/// aside, and the sidecar starts as if there were none. If another process uses the file, the
/// sidecar starts without it.
///
/// It blocks while it reads: until it returns, the sidecar has nothing to answer with.
///
/// # Errors
///
/// When the key cannot be used, the directory of the file cannot be used, or the random source
/// fails.
pub(crate) fn begin(settings: &SnapshotSettings, sidecar: Empty<'_>) -> Result<Begun, BeginError> {
    let key = SnapshotKey::read(&settings.key_file)?;
    let disk = Arc::new(Disk::default());
    let place = match SnapshotPlace::claim(&settings.path, sidecar.clock) {
        Ok(place) => place,
        Err(busy @ PlaceError::Busy { .. }) => {
            tracing::error!(
                path = %settings.path.display(),
                error = &busy as &dyn std::error::Error,
                "this process neither reads nor writes the snapshot file, and the control plane cannot know when this process ends"
            );
            disk.unused(causes::in_one_line(&busy));
            return Ok(Begun { disk, kept: None });
        }
        Err(error @ PlaceError::Directory { .. }) => return Err(error.into()),
    };
    let taken = take(&place, &key, sidecar.node).unwrap_or_else(|refused| {
        refuse(&place, &refused);
        disk.refused(causes::in_one_line(&refused));
        None
    });
    let Empty {
        node,
        keyrings,
        receiver,
        latest,
        clock,
    } = sidecar;
    let mut left_out = Vec::new();
    let (id, last_write, begun_from_write, present) = match taken {
        None => (FileId::generate()?, 0, 0, None),
        Some(Taken {
            file,
            inode,
            contents,
        }) => {
            let (id, write) = (contents.header.origin.id, contents.write);
            let is_ours = is_ours(&place, &contents, inode, clock);
            let start = Start {
                keyrings,
                receiver,
                now: Now::of(clock),
                is_ours,
            };
            left_out = start.restore(&place, contents, latest);
            // A sidecar that loads a copy does not continue the original file.
            let begun_from_write = if is_ours { write } else { 0 };
            (id, write, begun_from_write, Some(file))
        }
    };
    let slots = keyrings.load();
    let held = slots.iter().filter(|slot| slot.cache().is_none());
    let journal = Arc::new(Journal::new(held.filter_map(|slot| begun_with(slot))));
    for keyring in left_out {
        journal.removed(&keyring);
    }
    receiver.record(&Recorder::new(Arc::clone(&journal), Arc::clone(&disk)));
    let lock = place.held().cloned();
    let ending = if settings.erase_on_stop {
        Ending::Erase
    } else {
        Ending::Keep
    };
    let closer = Closer::new(Arc::clone(&journal), Arc::clone(&disk), ending);
    let keeper = Keeper::new(KeeperParts {
        place,
        key,
        node: node.clone(),
        keyrings: keyrings.clone(),
        journal,
        disk: Arc::clone(&disk),
        latest: latest.clone(),
        clock: clock.clone(),
        id,
        write: last_write,
        present,
        ending,
    });
    let kept = KeptFile {
        keeper,
        closer,
        lock,
        id,
        begun_from_write,
    };
    let kept = Some(kept);
    Ok(Begun { disk, kept })
}

fn take(
    place: &SnapshotPlace,
    key: &SnapshotKey,
    node: &NodeSettings,
) -> Result<Option<Taken>, RefusedError> {
    let Some((file, len)) = place.open()? else {
        return Ok(None);
    };
    let inode = Inode::of(&file.metadata()?);
    let input = std::io::BufReader::with_capacity(READ_AHEAD, &file);
    let contents = read::read(input, len, key)?;
    let header = &contents.header;
    if header.node != node.id.as_str() || header.cluster != node.cluster.as_str() {
        return Err(RefusedError::Node {
            node: header.node.clone(),
            cluster: header.cluster.clone(),
        });
    }
    Ok(Some(Taken {
        file,
        inode,
        contents,
    }))
}

/// The size of the read buffer, in bytes: one system call reads several frames.
const READ_AHEAD: usize = 256 << 10;

fn refuse(place: &SnapshotPlace, refused: &RefusedError) {
    let error = refused as &dyn std::error::Error;
    let path = place.path().display();
    match place.set_aside() {
        Ok(aside) => tracing::error!(
            path = %path,
            error,
            aside = %aside.display(),
            "the snapshot file is refused and put aside; the sidecar starts without it"
        ),
        Err(failed) => tracing::error!(
            path = %path,
            error,
            aside_error = &failed as &dyn std::error::Error,
            "the snapshot file is refused, but cannot be put aside; the sidecar starts without it"
        ),
    }
}

fn is_ours(place: &SnapshotPlace, contents: &Contents, inode: Inode, clock: &Clock) -> bool {
    let origin = &contents.header.origin;
    let is_last = |lock: &Arc<FileLock>| lock.is_last(origin.id, contents.write);
    origin.is_here(inode, clock.boot_clock().as_ref()) && place.held().is_none_or(is_last)
}

/// Returns the loaded state of a keyring; none if it is not loaded. All changes up to its revision
/// were applied, so that no revocation is missing.
fn begun_with(slot: &Slot) -> Option<Applied> {
    let view = slot.load().as_ref().map(Arc::clone)?;
    let revoked_through = view.revision();
    Some(Applied {
        view,
        revoked_through,
    })
}

/// A sidecar that loads a file.
struct Start<'a> {
    keyrings: &'a Keyrings,
    receiver: &'a mut Receiver,
    now: Now,
    /// Whether the file was created at its place, by this boot clock, and is the newest one. Only
    /// then is its age known.
    is_ours: bool,
}

impl Start<'_> {
    /// Loads the contents of the file. Returns the keyrings that must be removed from the file.
    fn restore(
        mut self,
        place: &SnapshotPlace,
        contents: Contents,
        latest: &LatestWall,
    ) -> Vec<KeyringName> {
        let mut left_out = Vec::new();
        let now = self.now;
        let pulse = contents.pulse;
        let path = place.path().display();
        if contents.tail == Tail::Torn {
            tracing::warn!(
                path = %path,
                "the last write to the snapshot file is incomplete; the file is loaded up to that write"
            );
        }
        if now.wall < latest.not_before(pulse.latest_wall) {
            tracing::warn!(
                latest = %pulse.latest_wall,
                now = %now.wall,
                "the wall clock is behind the latest time that this sidecar recorded; the validity of versions is evaluated at that time until the clock has passed it"
            );
        }
        if !self.is_ours {
            tracing::warn!(
                path = %path,
                "the snapshot file is a copy, an older file, or from another boot: its age is unknown, and its keyrings are used after the control plane has confirmed them"
            );
        }
        for (name, restored) in contents.keyrings {
            let held = self.keyrings.get(&name);
            let slot = held.or_else(|| self.receiver.find_kept(&name));
            let Some(slot) = slot.filter(|slot| slot.cache().is_none()) else {
                tracing::warn!(
                    auth.keyring = %name,
                    "the snapshot file has a keyring that the configuration neither names nor matches, or that is now on demand; the keyring is left out from now on"
                );
                left_out.push(name);
                continue;
            };
            let kept = pulse.restored(&name, &now);
            if let Some((confirmed, serve_for)) = kept.filter(|_| self.is_ours) {
                slot.restore(confirmed, serve_for);
            }
            self.restore_keyring(&name, restored, &slot);
        }
        left_out
    }

    fn restore_keyring(&mut self, name: &KeyringName, restored: Restored, slot: &Slot) {
        let versions = restored.view().len();
        let revision = restored.view().revision();
        self.receiver.restore(name, restored);
        tracing::info!(
            auth.keyring = %name,
            auth.keyring.revision = %revision,
            auth.keyring.age_ms = slot.age(self.now.reading()).map(|age| age.as_millis()),
            items = versions,
            "keyring loaded from the snapshot file"
        );
    }
}
