//! The configuration file of a running sidecar, which is read again when it changes.
//!
//! The file is read every two seconds and compared by its content, as the files of certificates
//! are, and at once on SIGHUP. A change counts when two readings agree, because a file that is
//! written in place may be read in the middle. A file is applied as a whole or not at all: where it is not valid, or
//! changes what cannot change in a running process, the former settings stay in use. Settings and
//! keyrings change together, so that no check sees a part of a file.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use serde::Serialize;
use tokio::{signal::unix::Signal, task::spawn_blocking};
use tokio_util::sync::CancellationToken;

use crate::{
    authz::Authorizer,
    causes,
    clock::Clock,
    config::{
        ConfigError, SidecarSettings,
        sidecar::{ChannelError, SidecarFile},
    },
    key::Timestamp,
    keyring::{Keyrings, ModeError},
    telemetry::{logs::LogLevel, metrics::SidecarMetrics},
};

/// The parts of a running sidecar that its file can change.
#[derive(Clone, Debug)]
pub(crate) struct Changeable {
    pub(crate) keyrings: Keyrings,
    pub(crate) authorizer: Authorizer,
    pub(crate) metrics: SidecarMetrics,
    pub(crate) clock: Clock,
    pub(crate) state: ReloadState,
}

/// Reads the configuration file again, and applies it.
#[derive(Debug)]
pub(crate) struct Reloader {
    file: Arc<SidecarFile>,
    /// The settings in use.
    running: SidecarSettings,
    /// The content that was looked at last; none if it could not be read, or has to be looked at
    /// again.
    seen: Option<String>,
    /// The content of the last reading; none if it could not be read.
    last: Option<String>,
    parts: Changeable,
    level: LogLevel,
}

/// What came of the last reading, for `/status`. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub(crate) struct ReloadState(Arc<Mutex<Option<ReloadStatus>>>);

/// What came of the last reading.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct ReloadStatus {
    file: PathBuf,
    /// The time at which the settings in use were applied.
    applied_at: Timestamp,
    /// The reason why the file as it is now is not applied; null if it is.
    problem: Option<String>,
}

/// The reason why a file is not applied.
#[derive(Debug, thiserror::Error)]
enum ReloadError {
    #[error(transparent)]
    Config(#[from] ConfigError),
    #[error(transparent)]
    Channel(#[from] ChannelError),
    #[error("{}: cannot change while the sidecar runs; restart it, or undo this change", .0.join(", "))]
    Fixed(Vec<&'static str>),
    #[error("keyrings: {0}: restart the sidecar to change that, or undo this change")]
    Mode(#[from] ModeError),
}

/// The interval at which the file is read.
const EVERY: Duration = Duration::from_secs(2);

impl Changeable {
    pub(crate) fn new(
        keyrings: Keyrings,
        authorizer: Authorizer,
        metrics: SidecarMetrics,
        clock: Clock,
    ) -> Self {
        Self {
            keyrings,
            authorizer,
            metrics,
            clock,
            state: ReloadState::default(),
        }
    }
}

impl Reloader {
    /// Keeps `parts` equal to `file`, from which `running` were read as `content`.
    pub(crate) fn new(
        file: SidecarFile,
        content: String,
        running: SidecarSettings,
        parts: Changeable,
        level: LogLevel,
    ) -> Self {
        let reloader = Self {
            file: Arc::new(file),
            running,
            seen: Some(content.clone()),
            last: Some(content),
            parts,
            level,
        };
        reloader.note(None);
        reloader
    }

    /// Reads the file when it changes, and on each of `hangups`, until `stop`.
    pub(crate) async fn run(mut self, mut hangups: Signal, stop: CancellationToken) {
        loop {
            let is_asked = tokio::select! {
                () = tokio::time::sleep(EVERY) => false,
                hangup = hangups.recv() => hangup.is_some(),
                () = stop.cancelled() => return,
            };
            let file = Arc::clone(&self.file);
            // A file may be on a disk or a network that hangs.
            let read = spawn_blocking(move || file.read());
            tokio::select! {
                read = read => match read {
                    Ok(read) => self.look(read, is_asked),
                    Err(_panicked) => tracing::error!("the task that reads the configuration file has failed"),
                },
                () = stop.cancelled() => return,
            }
        }
    }

    /// Applies what was read, if it is new and complete, or `is_asked` for.
    fn look(&mut self, read: Result<String, ConfigError>, is_asked: bool) {
        let content = read.as_ref().ok();
        let is_stable = content == self.last.as_ref();
        self.last = content.cloned();
        if !is_asked && (!is_stable || content == self.seen.as_ref()) {
            return;
        }
        self.seen = content.cloned();
        let applied = read
            .map_err(ReloadError::from)
            .and_then(|content| self.apply(&content));
        match applied {
            Ok(()) => {
                self.note(None);
                tracing::info!(file = %self.file.path().display(), "the configuration file is applied");
            }
            Err(error) => {
                if let ReloadError::Mode(_) = error {
                    // The keyring may be gone soon.
                    self.seen = None;
                }
                let problem = causes::in_one_line(&error);
                let is_news = self.parts.state.problem().as_ref() != Some(&problem);
                self.note(Some(problem));
                if is_asked || is_news {
                    tracing::error!(
                        file = %self.file.path().display(),
                        error = &error as &dyn std::error::Error,
                        "the configuration file is not applied; the former settings stay in use"
                    );
                }
            }
        }
    }

    fn apply(&mut self, content: &str) -> Result<(), ReloadError> {
        let settings = self.file.parse(content)?;
        settings.check_channels()?;
        let fixed = self.running.fixed_changes(&settings);
        if !fixed.is_empty() {
            return Err(ReloadError::Fixed(fixed));
        }
        let Changeable {
            keyrings,
            authorizer,
            ..
        } = &self.parts;
        let authz = settings.all_authz();
        keyrings.reconfigure(settings.wanted(), || authorizer.settle(authz))?;
        self.level.set(settings.log.level);
        self.running = settings;
        Ok(())
    }

    fn note(&self, problem: Option<String>) {
        let Changeable {
            metrics,
            clock,
            state,
            ..
        } = &self.parts;
        let now = clock.wall();
        let mut status = state.lock();
        let former = status.as_ref().filter(|_| problem.is_some());
        let applied_at = former.map_or(now, |former| former.applied_at);
        metrics.config_reloaded(problem.is_none(), applied_at);
        *status = Some(ReloadStatus {
            file: self.file.path().to_owned(),
            applied_at,
            problem,
        });
    }
}

impl ReloadState {
    /// Returns what came of the last reading; none for a sidecar without a file.
    pub(crate) fn status(&self) -> Option<ReloadStatus> {
        self.lock().clone()
    }

    fn problem(&self) -> Option<String> {
        self.lock().as_ref()?.problem.clone()
    }

    fn lock(&self) -> MutexGuard<'_, Option<ReloadStatus>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
