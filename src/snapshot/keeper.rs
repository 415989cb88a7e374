//! Keeps the file: brings to the disk what the journal takes, on a thread of its own.
//!
//! A file is appended to only by the process that made it whole, and only as long as every write to it has succeeded. After
//! an error nobody knows what it holds: it is made anew. Once a new one lies in its place, the former one is emptied, so that
//! whoever has another name of it does not serve from it. Whatever the disk does, checks go on.

use std::{collections::BTreeMap, fs::File, io, io::Write, sync::Arc, time::Duration};

use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

use super::{
    disk::{Disk, FileEnd},
    journal::{Applied, Batch, Ending, Journal, Patience},
    key::SnapshotKey,
    origin::{FileId, Inode, Origin},
    place::Place,
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

/// Keeps the file.
#[derive(Debug)]
pub(crate) struct Keeper {
    place: Place,
    key: SnapshotKey,
    node: NodeSettings,
    keyrings: Keyrings,
    journal: Arc<Journal>,
    disk: Arc<Disk>,
    latest: LatestWall,
    clock: Clock,
    id: FileId,
    /// The number of the last write, whatever became of it.
    write: u64,
    /// What lies at the place, and was made or taken by this process.
    present: Option<Arc<File>>,
    ending: Ending,
    /// None until it was made whole by this process, and after every error.
    file: Option<Kept>,
    /// The file has a keyring of which it does not tell that the control plane has ever confirmed it.
    is_unconfirmed: bool,
    patience: Patience,
    backoff: Duration,
    last_told: Option<BootTime>,
}

/// What a keeper works with.
#[derive(Debug)]
pub(crate) struct KeeperParts {
    /// Where the file is.
    pub(crate) place: Place,
    /// Under which it is sealed.
    pub(crate) key: SnapshotKey,
    /// Whose it is.
    pub(crate) node: NodeSettings,
    /// Of which it tells how fresh they are.
    pub(crate) keyrings: Keyrings,
    /// What is to be written.
    pub(crate) journal: Arc<Journal>,
    /// What is known of the disk.
    pub(crate) disk: Arc<Disk>,
    /// The latest time by which windows were judged.
    pub(crate) latest: LatestWall,
    /// The time.
    pub(crate) clock: Clock,
    /// Names the file.
    pub(crate) id: FileId,
    /// The number of the last write.
    pub(crate) write: u64,
    /// The file that was taken at the start.
    pub(crate) present: Option<File>,
    /// What becomes of the file at an orderly stop.
    pub(crate) ending: Ending,
}

/// The keeper has ended before its time.
#[derive(Debug, thiserror::Error)]
pub(crate) enum KeeperError {
    /// It got no thread.
    #[error("cannot start the thread of the snapshot file")]
    Thread(#[source] io::Error),
    /// It panicked; its message was printed where it did.
    #[error("the thread of the snapshot file panicked")]
    Panicked,
}

/// The file as this process has written it.
#[derive(Debug)]
struct Kept {
    file: Arc<File>,
    sealer: Sealer,
    /// The last one that it tells.
    pulse: Pulse,
    /// Of the state that it was made with, in bytes.
    whole: u64,
    /// What was appended, in bytes.
    appended: u64,
}

/// Closes a journal, so that the thread which writes it ends, however its owner ends.
struct Closing(Arc<Journal>);

/// Something was not written.
#[derive(Debug, thiserror::Error)]
enum WriteError {
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error(transparent)]
    Random(#[from] RandomError),
    #[error("the file was removed or replaced from outside")]
    Gone,
}

/// So much may pass unnoticed when a sidecar is killed: it then takes its keyrings for as much older than they are. Three
/// thousand small writes a day wear no disk out.
const PULSE_EVERY: Duration = Duration::from_secs(30);
/// With limits of staleness of a few seconds more often, but a limit is never below a second.
const PULSES_PER_LIMIT: u32 = 4;
const MIN_PULSE: Duration = Duration::from_millis(250);
/// A keyring that nothing confirms is of no use at a start. The first confirmation comes with the answer to the next
/// beat, soon after the keyring itself, and is waited for.
const UNCONFIRMED_PULSE: Duration = Duration::from_secs(1);
/// How long a change that revokes nothing waits for others: twenty syncs a second at most, and a rotation, which waits for
/// the disk of every sidecar, hardly notices.
const GATHER: Duration = Duration::from_millis(50);
/// A file is made anew when as much was appended as it was made with: then it has at most twice the length that it needs. A
/// small one not before this,
const MIN_APPENDED: u64 = 4 << 20;
/// and a large one not after this, which is some hundred thousand changes to apply at a start.
const MAX_APPENDED: u64 = 64 << 20;
/// After an error the next attempt waits, each time for longer.
const FIRST_BACKOFF: Duration = Duration::from_secs(1);
const MAX_BACKOFF: Duration = Duration::from_mins(1);
/// How often an error that stays is logged.
const TELL_EVERY: Duration = Duration::from_mins(5);

impl Keeper {
    /// A keeper of what `parts` name.
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
        let patience = Patience {
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

    /// Keeps the file until `stop`; then writes what is left, and how late it is, or erases it.
    ///
    /// # Errors
    ///
    /// When its thread cannot be made, or dies.
    pub(crate) async fn run(self, stop: CancellationToken) -> Result<(), KeeperError> {
        let closing = Closing(Arc::clone(&self.journal));
        let ending = self.ending;
        let (tell, mut ended) = oneshot::channel();
        std::thread::Builder::new()
            .name("snapshot".to_owned())
            .spawn(move || {
                self.work();
                // Who does not listen any more was cut off.
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
        // Whoever has the file erased closes the journal before the keeper is told to stop.
        stop.cancelled().await;
        Ok(())
    }

    fn work(mut self) {
        while !self.turn() {}
    }

    /// Writes what is to be written next; whether that was the last.
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

    fn patience(&self) -> Patience {
        let Patience { idle, gather } = self.patience;
        let limit = if self.is_unconfirmed {
            UNCONFIRMED_PULSE
        } else {
            pulse_every(&self.keyrings)
        };
        Patience {
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
                inode: Inode::of(&draft.metadata()?),
                boot_clock: self.clock.boot_clock(),
            },
        };
        let mut sealer = Sealer::new(&self.key, &header)?;
        let views = state.values().map(|applied| &*applied.view);
        let whole = write::write(&mut draft, &mut sealer, views, &pulse, self.write)?;
        let published = self.place.publish(&draft);
        let file = Arc::new(draft);
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

    /// Empties a file in whose place another one lies.
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
        self.place.discard();
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

    /// How late it is, and how fresh what is written.
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
        self.place.discard();
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
    /// Appends a frame. When this returns, it outlives a loss of power.
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

/// By the keyring that may be served for the shortest time.
fn pulse_every(keyrings: &Keyrings) -> Duration {
    let limits = keyrings.iter().map(|slot| {
        let deny_after = slot.staleness().deny_after;
        let granted = slot.confirmation().map(|(_, serve_for)| serve_for);
        granted.map_or(deny_after, |granted| granted.min(deny_after))
    });
    let least = limits.min().unwrap_or(PULSE_EVERY) / PULSES_PER_LIMIT;
    least.clamp(MIN_PULSE, PULSE_EVERY)
}

#[cfg(test)]
mod tests;
