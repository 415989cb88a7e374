//! The start of a sidecar that keeps a file: what was kept is taken back, and a keeper goes on from there.

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
        place::{Place, PlaceError},
        pulse::Now,
        read::{self, Contents, Tail},
        recorder::Recorder,
    },
};

/// What a sidecar begins with that is to keep a file.
#[derive(Debug)]
pub(crate) struct Begun {
    /// What is known of the file.
    pub(crate) disk: Arc<Disk>,
    /// None when another process uses the file: nothing is read or written then.
    pub(crate) kept: Option<KeptFile>,
}

/// A file that is kept.
#[derive(Debug)]
pub(crate) struct KeptFile {
    /// Keeps it, once it runs.
    pub(crate) keeper: Keeper,
    /// Ends its keeping at an orderly stop.
    pub(crate) closer: Closer,
    /// What this process holds as long as it uses the file; none when the disk did not let it.
    pub(crate) lock: Option<Arc<FileLock>>,
    /// Names the file.
    pub(crate) id: FileId,
    /// The number of the last write to what was taken; zero when nothing was.
    pub(crate) begun_from_write: u64,
}

/// A sidecar that is to keep a file cannot start.
#[derive(Debug, thiserror::Error)]
pub enum BeginError {
    /// There is no key.
    #[error("snapshot.key_file")]
    Key(#[from] KeyFileError),
    /// The file cannot be used by this process.
    #[error("snapshot.path")]
    Place(#[from] PlaceError),
    /// The operating system's random source failed.
    #[error(transparent)]
    Random(#[from] RandomError),
}

/// What a sidecar has that was not told anything yet.
#[derive(Debug)]
pub(crate) struct Empty<'a> {
    /// Who it is.
    pub(crate) node: &'a NodeSettings,
    /// Its keyrings.
    pub(crate) keyrings: &'a Keyrings,
    /// Where they come in.
    pub(crate) receiver: &'a mut Receiver,
    /// The latest time by which windows were judged.
    pub(crate) latest: &'a LatestWall,
    /// The time.
    pub(crate) clock: &'a Clock,
}

/// A file that can be taken.
struct Taken {
    file: File,
    inode: Inode,
    contents: Contents,
}

/// Takes back what was kept. A file that cannot be taken is put aside, and the sidecar starts as if there were none. While
/// another process uses the file, the sidecar starts without it.
///
/// It blocks while it reads: until it is done there is nothing that a sidecar could answer.
///
/// # Errors
///
/// When the key cannot be used, or there is no place for the file.
pub(crate) fn begin(settings: &SnapshotSettings, sidecar: Empty<'_>) -> Result<Begun, BeginError> {
    let key = SnapshotKey::read(&settings.key_file)?;
    let disk = Arc::new(Disk::default());
    let place = match Place::claim(&settings.path, sidecar.clock) {
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
            // Who begins from a copy does not have the file that was copied.
            let begun_from_write = if is_ours { write } else { 0 };
            (id, write, begun_from_write, Some(file))
        }
    };
    let held = keyrings.iter().filter(|slot| slot.cache().is_none());
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
    place: &Place,
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

/// A few frames for each call of the system.
const READ_AHEAD: usize = 256 << 10;

fn refuse(place: &Place, refused: &RefusedError) {
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

fn is_ours(place: &Place, contents: &Contents, inode: Inode, clock: &Clock) -> bool {
    let origin = &contents.header.origin;
    let is_last = |lock: &Arc<FileLock>| lock.is_last(origin.id, contents.write);
    origin.is_here(inode, clock.boot_clock().as_ref()) && place.held().is_none_or(is_last)
}

/// Everything up to its revision was applied, so that no revocation is missing.
fn begun_with(slot: &Slot) -> Option<Applied> {
    let view = slot.load().as_ref().map(Arc::clone)?;
    let revoked_through = view.revision();
    Some(Applied {
        view,
        revoked_through,
    })
}

/// A sidecar that takes a file.
struct Start<'a> {
    keyrings: &'a Keyrings,
    receiver: &'a mut Receiver,
    now: Now,
    /// The file was made where it lies, by this clock, and is the newest one: its age is known.
    is_ours: bool,
}

impl Start<'_> {
    /// Returns the keyrings that are not to be in the file any more.
    fn restore(
        mut self,
        place: &Place,
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
            let slot = self.keyrings.get(&name);
            let Some(slot) = slot.filter(|slot| slot.cache().is_none()) else {
                tracing::warn!(
                    auth.keyring = %name,
                    "the snapshot file has a keyring that is not in the configuration, or is now on demand; the keyring is left out from now on"
                );
                left_out.push(name);
                continue;
            };
            let kept = pulse.restored(&name, &now);
            if let Some((confirmed, serve_for)) = kept.filter(|_| self.is_ours) {
                slot.restore(confirmed, serve_for);
            }
            self.restore_keyring(&name, restored, slot);
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
