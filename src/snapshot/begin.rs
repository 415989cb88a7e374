//! The start of a sidecar that keeps a file: what was kept is taken back, and a keeper goes on from there.

use std::sync::Arc;

use super::{
    disk::Disk,
    error::RefusedError,
    journal::Journal,
    keeper::{Keeper, KeeperParts},
    key::{KeyFileError, SnapshotKey},
    place::{Place, PlaceError},
    pulse::{Age, Now},
    read::{self, Contents, Tail},
    recorder::Recorder,
};
use crate::{
    causes,
    clock::{Clock, LatestWall},
    config::sidecar::{NodeSettings, SnapshotSettings},
    discovery::receiver::Receiver,
    key::KeyringName,
    keyring::{Confirmation, Keyrings, Restored, Slot},
};

/// A file that is kept.
#[derive(Debug)]
pub struct Begun {
    /// Keeps it, once it runs.
    pub keeper: Keeper,
    /// What is known of it.
    pub disk: Arc<Disk>,
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
}

/// What a sidecar has that was not told anything yet.
#[derive(Debug)]
pub struct Empty<'a> {
    /// Who it is.
    pub node: &'a NodeSettings,
    /// Its keyrings.
    pub keyrings: &'a Keyrings,
    /// Where they come in.
    pub receiver: &'a mut Receiver,
    /// The latest time by which windows were judged.
    pub latest: &'a LatestWall,
    /// The time.
    pub clock: &'a Clock,
}

impl Begun {
    /// The keeper, and what is known of the file.
    #[must_use]
    pub fn into_parts(self) -> (Keeper, Arc<Disk>) {
        (self.keeper, self.disk)
    }
}

/// Takes back what was kept. A file that cannot be taken is put aside, and the sidecar starts as if there were none.
///
/// It blocks while it reads: until it is done there is nothing that a sidecar could answer.
///
/// # Errors
///
/// When the key cannot be used, another process uses the file, or there is no place for it.
pub fn begin(settings: &SnapshotSettings, sidecar: Empty<'_>) -> Result<Begun, BeginError> {
    let key = SnapshotKey::read(&settings.key_file)?;
    let place = Place::claim(&settings.path)?;
    let disk = Arc::new(Disk::default());
    let contents = take(&place, &key, sidecar.node).unwrap_or_else(|refused| {
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
    if let Some(contents) = contents {
        restore(&place, contents, keyrings, receiver, latest, clock);
    }
    let held = keyrings.iter().filter(|slot| slot.cache().is_none());
    let views = held.filter_map(|slot| slot.load().as_ref().map(Arc::clone));
    let journal = Arc::new(Journal::new(views));
    receiver.record(&Recorder::new(Arc::clone(&journal), Arc::clone(&disk)));
    let keeper = Keeper::new(KeeperParts {
        place,
        key,
        node: node.clone(),
        keyrings: keyrings.clone(),
        journal,
        disk: Arc::clone(&disk),
        latest: latest.clone(),
        clock: clock.clone(),
    });
    Ok(Begun { keeper, disk })
}

fn take(
    place: &Place,
    key: &SnapshotKey,
    node: &NodeSettings,
) -> Result<Option<Contents>, RefusedError> {
    let Some((file, len)) = place.open()? else {
        return Ok(None);
    };
    let input = std::io::BufReader::with_capacity(READ_AHEAD, file);
    let contents = read::read(input, len, key)?;
    let header = &contents.header;
    if header.node != node.id.as_str() || header.cluster != node.cluster.as_str() {
        return Err(RefusedError::Node {
            node: header.node.clone(),
            cluster: header.cluster.clone(),
        });
    }
    Ok(Some(contents))
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
            "the snapshot file is refused and put aside; the sidecar starts as if there were none"
        ),
        Err(failed) => tracing::error!(
            path = %path,
            error,
            aside_error = &failed as &dyn std::error::Error,
            "the snapshot file is refused, and cannot be put aside; the sidecar starts as if there were none"
        ),
    }
}

fn restore(
    place: &Place,
    contents: Contents,
    keyrings: &Keyrings,
    receiver: &mut Receiver,
    latest: &LatestWall,
    clock: &Clock,
) {
    let now = Now::of(clock);
    let pulse = contents.pulse;
    if contents.tail == Tail::Torn {
        tracing::warn!(
            path = %place.path().display(),
            "the last write to the snapshot file was cut off; it is taken up to there"
        );
    }
    if now.wall < latest.not_before(pulse.latest_wall) {
        tracing::warn!(
            latest = %pulse.latest_wall,
            now = %now.wall,
            "the wall clock is behind the latest time that this sidecar had; windows are judged by that until it is passed"
        );
    }
    for (name, restored) in contents.keyrings {
        match keyrings.get(&name) {
            Some(slot) if slot.cache().is_none() => {
                restore_age(slot, pulse.age(&name, &now), &now);
                restore_keyring(&name, restored, slot, receiver, &now);
            }
            Some(_) | None => tracing::warn!(
                auth.keyring = %name,
                "the snapshot file has a keyring that is not configured to be held in full any more; it is left out from now on"
            ),
        }
    }
}

fn restore_age(slot: &Slot, age: Age, now: &Now) {
    let reading = now.reading();
    let grant = slot.staleness().deny_after;
    match age {
        Age::Known(age) => slot.restore(Confirmation::from(reading).before(age), grant),
        Age::Untold => {
            tracing::error!(
                auth.keyring = %slot.name(),
                "the machine has booted and its wall clock was set back: nobody knows how old the keyring is, and it is taken for stale"
            );
            slot.restore(Confirmation::from(reading).before(grant), grant);
        }
        Age::Never => {}
    }
}

fn restore_keyring(
    name: &KeyringName,
    restored: Restored,
    slot: &Slot,
    receiver: &mut Receiver,
    now: &Now,
) {
    let versions = restored.view().len();
    let revision = restored.view().revision();
    receiver.restore(name, restored);
    tracing::info!(
        auth.keyring = %name,
        auth.keyring.revision = %revision,
        auth.keyring.age_ms = slot.age(now.reading()).map(|age| age.as_millis()),
        items = versions,
        "keyring taken from the snapshot file"
    );
}
