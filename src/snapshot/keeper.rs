//! Writes the snapshot file: it brings the changes of the journal to the disk, on a thread of its own.
//!
//! A process appends to a file only if it created this file, and only as long as every write to it has succeeded. After an
//! error, the content is not known, and the process creates a new file. When a new file is in place, the former one is
//! emptied, so that no process serves from another name of it. Checks continue independently of the disk.

use std::{collections::BTreeMap, fs::File, io, io::Write, sync::Arc, time::Duration};

use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::{
    disk::{Disk, FileEnd},
    journal::{Applied, Batch, Ending, Journal, WritePatience},
    key::SnapshotKey,
    origin::{FileId, Inode, Origin},
    place::SnapshotPlace,
    pulse::{Now, Pulse},
    seal::{Header, Sealer},
    write,
};
use crate::{
    causes,
    clock::{BootTime, Clock, LatestWall},
    config::sidecar::NodeSettings,
    key::{KeyringName, RandomError},
    keyring::Keyrings,
};

/// Writes the snapshot file.
#[derive(Debug)]
pub(crate) struct Keeper {
    place: SnapshotPlace,
    key: SnapshotKey,
    node: NodeSettings,
    keyrings: Keyrings,
    journal: Arc<Journal>,
    disk: Arc<Disk>,
    latest: LatestWall,
    clock: Clock,
    id: FileId,
    /// The number of the last write, successful or not.
    write: u64,
    /// The file at the place, if this process has created or loaded it.
    present: Option<Arc<File>>,
    ending: Ending,
    /// The file to append to. None until this process has created one, and after every error.
    file: Option<Kept>,
    /// Whether the file has a keyring without a confirmation by the control plane.
    is_unconfirmed: bool,
    patience: WritePatience,
    backoff: Duration,
    last_told: Option<BootTime>,
}

/// The parts of a keeper.
#[derive(Debug)]
pub(crate) struct KeeperParts {
    /// The place of the file.
    pub(crate) place: SnapshotPlace,
    /// The key that seals the file.
    pub(crate) key: SnapshotKey,
    /// The sidecar that owns the file.
    pub(crate) node: NodeSettings,
    /// The keyrings whose age is written.
    pub(crate) keyrings: Keyrings,
    /// The changes to write.
    pub(crate) journal: Arc<Journal>,
    /// The state of the disk.
    pub(crate) disk: Arc<Disk>,
    /// The latest time at which validity was judged.
    pub(crate) latest: LatestWall,
    /// The clocks.
    pub(crate) clock: Clock,
    /// The id of the file.
    pub(crate) id: FileId,
    /// The number of the last write.
    pub(crate) write: u64,
    /// The file that was loaded at the start.
    pub(crate) present: Option<File>,
    /// What happens to the file at an orderly stop.
    pub(crate) ending: Ending,
}

/// The keeper has ended too early.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KeeperError {
    /// Its thread could not start.
    #[error("cannot start the thread of the snapshot file")]
    Thread(#[source] io::Error),
    /// Its thread panicked, and printed the message of the panic.
    #[error("the thread of the snapshot file panicked")]
    Panicked,
}

/// The file that this process has written.
#[derive(Debug)]
struct Kept {
    file: Arc<File>,
    sealer: Sealer,
    /// The last pulse in the file.
    pulse: Pulse,
    /// The size of the state with which the file was created, in bytes.
    whole: u64,
    /// The size of the appended frames, in bytes.
    appended: u64,
}

/// Closes a journal on drop, so that the thread that writes always ends with its owner.
struct Closing(Arc<Journal>);

/// A write failed.
#[derive(Debug, thiserror::Error)]
enum WriteError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Random(#[from] RandomError),
    #[error("the file was removed or replaced from outside")]
    Gone,
}

/// How often the age of the keyrings is written. After a kill, a sidecar takes its keyrings for older by at most this time.
/// Three thousand small writes per day do not wear out a disk.
const PULSE_EVERY: Duration = Duration::from_secs(30);
/// With limits of staleness of a few seconds, the age is written this many times per limit. A limit is at least a second.
const PULSES_PER_LIMIT: u32 = 4;
const MIN_PULSE: Duration = Duration::from_millis(250);
/// How soon the first confirmation of a keyring is written: a keyring without a confirmation is useless at a start. The
/// confirmation arrives with the answer to the next beat, soon after the keyring.
const UNCONFIRMED_PULSE: Duration = Duration::from_secs(1);
/// How long a change that revokes nothing waits for others. This limits the syncs to twenty per second, and delays a rotation,
/// which waits for the disk of every sidecar, only a little.
const GATHER: Duration = Duration::from_millis(50);
/// A new file is created when as many bytes were appended as the state had, so that a file has at most twice the necessary
/// length. A small file is not rewritten before this number of appended bytes.
const MIN_APPENDED: u64 = 4 << 20;
/// A large file is rewritten after this number of appended bytes, which are some hundred thousand changes to apply at a
/// start.
const MAX_APPENDED: u64 = 64 << 20;
/// The first and the longest wait after an error; it grows with each error.
const FIRST_BACKOFF: Duration = Duration::from_secs(1);
const MAX_BACKOFF: Duration = Duration::from_mins(1);
/// How often a continuing error is logged.
const TELL_EVERY: Duration = Duration::from_mins(5);

impl Keeper {
    /// Creates a keeper from `parts`.
    #[must_use]
    pub(crate) fn new(parts: KeeperParts) -> Self {
        let KeeperParts {
            place,
            key,
            node,
            keyrings,
            journal,
            disk,
            latest,
            clock,
            id,
            write,
            present,
            ending,
        } = parts;
        let patience = WritePatience {
            idle: PULSE_EVERY,
            gather: GATHER,
        };
        Self {
            place,
            key,
            node,
            keyrings,
            journal,
            disk,
            latest,
            clock,
            id,
            write,
            present: present.map(Arc::new),
            ending,
            file: None,
            is_unconfirmed: false,
            patience,
            backoff: FIRST_BACKOFF,
            last_told: None,
        }
    }

    /// Writes the file until `stop`. Then it writes the last changes and the time, or erases the file.
    ///
    /// # Errors
    ///
    /// When its thread cannot start, or panics.
    pub(crate) async fn run(self, stop: CancellationToken) -> Result<(), KeeperError> {
        let closing = Closing(Arc::clone(&self.journal));
        let ending = self.ending;
        let (tell, mut ended) = oneshot::channel();
        std::thread::Builder::new()
            .name("snapshot".to_owned())
            .spawn(move || {
                self.work();
                // The receiver may already be dropped.
                let _ = tell.send(());
            })
            .map_err(KeeperError::Thread)?;
        let ended = tokio::select! {
            ended = &mut ended => ended,
            () = stop.cancelled() => {
                closing.0.close(ending);
                ended.await
            }
        };
        ended.map_err(|_| KeeperError::Panicked)?;
        // The journal may be closed, to erase the file, before the keeper is told to stop.
        stop.cancelled().await;
        Ok(())
    }

    fn work(mut self) {
        while !self.turn() {}
    }

    /// Writes the next batch. Returns whether it was the last.
    fn turn(&mut self) -> bool {
        let batch = self.journal.next(self.patience(), self.file.is_none());
        let is_last = batch.ending.is_some();
        match batch.ending {
            Some(Ending::Erase) => self.erase(),
            Some(Ending::Keep) | None => {
                let end = match self.write(batch) {
                    Ok(()) => {
                        self.succeeded();
                        let last_write = self.write;
                        FileEnd::Kept { last_write }
                    }
                    Err(error) => {
                        self.failed(&error, is_last);
                        FileEnd::Unknown
                    }
                };
                if is_last {
                    self.disk.ended(end);
                }
            }
        }
        is_last
    }

    fn patience(&self) -> WritePatience {
        let WritePatience { idle, gather } = self.patience;
        let limit = if self.is_unconfirmed {
            UNCONFIRMED_PULSE
        } else {
            pulse_every(&self.keyrings)
        };
        WritePatience {
            idle: idle.min(limit),
            gather,
        }
    }

    fn write(&mut self, batch: Batch) -> Result<(), WriteError> {
        let Batch {
            state,
            changes,
            is_whole,
            removal,
            ending: _,
        } = batch;
        if state.is_empty() && !is_whole {
            return Ok(());
        }
        self.write += 1;
        let pulse = self.pulse(&state);
        self.is_unconfirmed = pulse.confirmed.len() < state.len();
        let appended = match self.file.take() {
            Some(mut kept) if !is_whole && !kept.is_overgrown() => {
                let news = pulse.since(&kept.pulse);
                match write::append(&mut kept.sealer, &changes, &news, self.write) {
                    Some(frame) => {
                        kept.append(&frame)?;
                        kept.pulse.clone_from(&pulse);
                        Some(kept)
                    }
                    None => None,
                }
            }
            Some(_) | None => None,
        };
        let kept = match appended {
            Some(kept) => kept,
            None => self.write_whole(&state, pulse)?,
        };
        if !self.place.holds(&kept.file) {
            return Err(WriteError::Gone);
        }
        if let Some(lock) = self.place.held() {
            lock.note(self.id, self.write);
        }
        let size = kept.whole + kept.appended;
        self.file = Some(kept);
        self.disk.written(&state, removal, size, self.clock.wall());
        Ok(())
    }

    fn write_whole(
        &mut self,
        state: &BTreeMap<KeyringName, Applied>,
        pulse: Pulse,
    ) -> Result<Kept, WriteError> {
        let mut draft = self.place.draft()?;
        let header = Header {
            node: self.node.id.to_string(),
            cluster: self.node.cluster.to_string(),
            written_at: self.clock.wall(),
            origin: Origin {
                id: self.id,
                inode: Inode::of(&draft.file().metadata()?),
                boot_clock: self.clock.boot_clock(),
            },
        };
        let mut sealer = Sealer::new(&self.key, &header)?;
        let views = state.values().map(|applied| &*applied.view);
        let whole = write::write(draft.file(), &mut sealer, views, &pulse, self.write)?;
        let published = draft.publish();
        let file = Arc::new(draft.into_file());
        let former = if self.place.holds(&file) {
            self.present.replace(Arc::clone(&file))
        } else {
            None
        };
        published?;
        if let Some(former) = former {
            self.empty(&former);
        }
        Ok(Kept {
            file,
            sealer,
            pulse,
            whole,
            appended: 0,
        })
    }

    /// Empties a file that was replaced by another one.
    fn empty(&self, former: &File) {
        if let Err(error) = former.set_len(0) {
            tracing::warn!(
                path = %self.place.path().display(),
                error = &error as &dyn std::error::Error,
                "the former snapshot file cannot be emptied: remove all its other names (hard links)"
            );
        }
    }

    fn erase(&mut self) {
        self.file = None;
        let erased = match &self.present {
            Some(present) => self.place.erase(present),
            None if self.place.is_empty() => Ok(()),
            None => Err(io::Error::other("this process did not create it")),
        };
        let path = self.place.path().display();
        match erased {
            Ok(()) => {
                tracing::info!(path = %path, "the snapshot file is erased");
                self.disk.ended(FileEnd::Erased);
            }
            Err(error) => {
                tracing::error!(
                    path = %path,
                    error = &error as &dyn std::error::Error,
                    "the snapshot file cannot be erased; the control plane waits for this sidecar as for one that may start again"
                );
                self.disk.ended(FileEnd::Unknown);
            }
        }
    }

    /// The current pulse.
    fn pulse(&self, state: &BTreeMap<KeyringName, Applied>) -> Pulse {
        let now = Now::of(&self.clock);
        let latest = self.latest.to_remember(now.wall, now.boot);
        let mut pulse = Pulse::of(&self.keyrings, latest);
        pulse.confirmed.retain(|name, _| state.contains_key(name));
        pulse
    }

    fn succeeded(&mut self) {
        self.backoff = FIRST_BACKOFF;
        if self.last_told.take().is_some() {
            tracing::info!(
                path = %self.place.path().display(),
                "the snapshot file is written again"
            );
        }
    }

    fn failed(&mut self, error: &WriteError, is_last: bool) {
        self.file = None;
        self.disk.failed(causes::in_one_line(error));
        let now = self.clock.boot();
        let is_news = |told| now.saturating_since(told) >= TELL_EVERY;
        if self.last_told.is_none_or(is_news) {
            self.last_told = Some(now);
            tracing::error!(
                path = %self.place.path().display(),
                error = error as &dyn std::error::Error,
                "the snapshot file cannot be written; checks continue, but a restart without the control plane goes back to the last write"
            );
        }
        if !is_last {
            self.journal.pause(self.backoff);
            self.backoff = (2 * self.backoff).min(MAX_BACKOFF);
        }
    }
}

impl Drop for Closing {
    fn drop(&mut self) {
        self.0.close(Ending::Keep);
    }
}

impl Kept {
    /// Appends a frame. When this returns, the frame survives a loss of power.
    fn append(&mut self, frame: &[u8]) -> io::Result<()> {
        (&*self.file).write_all(frame)?;
        self.file.sync_data()?;
        self.appended += frame.len() as u64;
        Ok(())
    }

    fn is_overgrown(&self) -> bool {
        self.appended > self.whole.clamp(MIN_APPENDED, MAX_APPENDED)
    }
}

/// The interval of pulses, for the keyring that may be served for the shortest time.
fn pulse_every(keyrings: &Keyrings) -> Duration {
    let slots = keyrings.load();
    let limits = slots.iter().map(|slot| {
        let deny_after = slot.staleness().deny_after;
        let granted = slot.confirmation().map(|(_, serve_for)| serve_for);
        granted.map_or(deny_after, |granted| granted.min(deny_after))
    });
    let least = limits.min().unwrap_or(PULSE_EVERY) / PULSES_PER_LIMIT;
    least.clamp(MIN_PULSE, PULSE_EVERY)
}

#[cfg(test)]
mod tests;
