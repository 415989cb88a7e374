//! The life of the process: tasks with owners, and an orderly stop.
//!
//! A task ends when it is told to stop. A task that ends earlier, fails or panics stops the whole
//! process: the work of the task would be missing from then on, and a restart is better than a part
//! of a daemon. Tasks that other tasks need until they end are stopped after them. Early tasks end
//! first, while all others still work.

use std::{
    collections::BTreeMap,
    convert::Infallible,
    error::Error,
    fmt, io,
    panic::AssertUnwindSafe,
    pin::pin,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

use futures_util::FutureExt as _;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::duration::written;

/// Owns the tasks of the process and stops them; cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Shutdown {
    process: Arc<Process>,
    turn: Turn,
}

/// Receives SIGTERM and SIGINT from its creation on.
#[derive(Debug)]
pub(crate) struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

/// The reason that the process stops.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ShutdownError {
    /// A task ended before it was told to stop.
    #[error("task `{task}` ended before the shutdown")]
    Ended {
        /// The name of the task.
        task: Arc<str>,
    },
    /// A task failed.
    #[error("task `{task}` failed")]
    Failed {
        /// The name of the task.
        task: Arc<str>,
        /// The error of the task.
        source: Box<dyn Error + Send + Sync>,
    },
    /// A task panicked; its message was already printed.
    #[error("task `{task}` panicked")]
    Panicked {
        /// The name of the task.
        task: Arc<str>,
    },
    /// Some tasks did not end in time and were cancelled.
    #[error("cut off after {}: {}", written(*after), Names(tasks))]
    Undrained {
        /// The time limit.
        after: Duration,
        /// The names of the tasks.
        tasks: Vec<Arc<str>>,
    },
}

#[derive(Debug, Default)]
struct Process {
    early: Stage,
    first: Stage,
    last: Stage,
    /// Cancels the tasks that have not ended.
    cut: CancellationToken,
    book: Mutex<Book>,
}

/// Tasks that are told to stop together.
#[derive(Debug, Default)]
struct Stage {
    stop: CancellationToken,
    tasks: TaskTracker,
}

/// The moment at which tasks are told to stop.
#[derive(Clone, Copy, Debug, Default)]
enum Turn {
    /// At the start of the shutdown.
    Early,
    /// After all early tasks have ended.
    #[default]
    First,
    /// After all tasks of the first turn have ended.
    Last,
}

#[derive(Debug, Default)]
struct Book {
    next: u64,
    running: BTreeMap<u64, Arc<str>>,
    /// The first failure; later ones are consequences.
    failure: Option<ShutdownError>,
}

/// An entry of the book, which is removed when the future of the task is dropped.
struct Entry {
    shutdown: Shutdown,
    id: u64,
    name: Arc<str>,
}

/// The time for which a stop waits for peers. Their work in progress needs milliseconds. A frozen
/// peer must neither delay the stop until the deadline of the drain nor turn it into a failure.
pub(crate) const GRACE: Duration = Duration::from_secs(3);

/// Runs `work`, which ends soon after `stop` unless a peer does not answer. In that case the work
/// is cancelled [`GRACE`] after `stop`, and none is returned.
pub(crate) async fn unless_left_behind<T>(
    what: &str,
    stop: CancellationToken,
    work: impl Future<Output = T>,
) -> Option<T> {
    let overdue = async {
        stop.cancelled().await;
        tokio::time::sleep(GRACE).await;
    };
    tokio::select! {
        done = work => Some(done),
        () = overdue => {
            tracing::warn!(what, "the stop does not wait longer for peers that do not answer");
            None
        }
    }
}

impl Shutdown {
    /// Creates an owner without tasks.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Returns the owner of the early tasks: a shutdown stops them first, and all other tasks continue
    /// until they have ended.
    #[must_use]
    pub(crate) fn early(&self) -> Self {
        Self {
            turn: Turn::Early,
            ..self.clone()
        }
    }

    /// Returns the owner of tasks that other tasks need until they end: it stops its tasks after
    /// all others have ended.
    #[must_use]
    pub(crate) fn last(&self) -> Self {
        Self {
            turn: Turn::Last,
            ..self.clone()
        }
    }

    /// Returns a token that is cancelled when the tasks of this turn must stop.
    #[must_use]
    pub(crate) fn token(&self) -> CancellationToken {
        self.stage().stop.clone()
    }

    /// Tells all tasks to stop at once, where [`Shutdown::run`] is not called: the process cannot
    /// start.
    pub(crate) fn abandon(&self) {
        let Process {
            early, first, last, ..
        } = &*self.process;
        for stage in [early, first, last] {
            stage.stop.cancel();
        }
    }

    /// Starts the shutdown: the tasks are told to stop, turn by turn.
    pub fn trigger(&self) {
        self.process.early.stop.cancel();
    }

    /// Runs `task` on the current runtime until it ends. It must end soon after [`Shutdown::token`]
    /// is cancelled.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub(crate) fn spawn<F>(&self, name: &str, task: F)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        self.spawn_fallible(name, task.map(Ok::<(), Infallible>));
    }

    /// Runs a task that can fail, as [`spawn`](Self::spawn) does.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub(crate) fn spawn_fallible<F, E>(&self, name: &str, task: F)
    where
        F: Future<Output = Result<(), E>> + Send + 'static,
        E: Into<Box<dyn Error + Send + Sync>> + 'static,
    {
        tokio::spawn(self.supervise(name, task));
    }

    /// Wraps `task` so that the shutdown knows its name, waits for it and, at the deadline of the
    /// drain, drops it. Use it for the root task of another runtime, and [`Shutdown::spawn`] for
    /// all others. The task counts from this call on, so it must be polled.
    pub(crate) fn supervise<F, E>(
        &self,
        name: &str,
        task: F,
    ) -> impl Future<Output = ()> + use<F, E>
    where
        F: Future<Output = Result<(), E>>,
        E: Into<Box<dyn Error + Send + Sync>>,
    {
        let entry = self.enter(name);
        let supervised = async move {
            let shutdown = entry.shutdown.clone();
            let ended = tokio::select! {
                ended = AssertUnwindSafe(task).catch_unwind() => ended,
                () = shutdown.process.cut.cancelled() => return,
            };
            let task = entry.name.clone();
            let failure = match ended {
                Err(_panic) => ShutdownError::Panicked { task },
                Ok(Err(source)) => ShutdownError::Failed {
                    task,
                    source: source.into(),
                },
                Ok(Ok(())) if shutdown.stage().stop.is_cancelled() => return,
                Ok(Ok(())) => ShutdownError::Ended { task },
            };
            tracing::error!(error = &failure as &dyn Error, "shutting down");
            shutdown.lock().failure.get_or_insert(failure);
            // A part is missing: nothing is drained.
            shutdown.trigger();
            shutdown.process.first.stop.cancel();
        };
        self.stage().tasks.track_future(supervised)
    }

    /// Waits for a signal, for [`Shutdown::trigger`] or for a task that ends too early. Then it
    /// tells all tasks to stop, turn by turn, and waits for them at most `drain` in total. A second
    /// signal ends the wait at once.
    ///
    /// # Errors
    ///
    /// The error of the task that stopped the process, or else the names of the tasks that did not
    /// end in time.
    pub(crate) async fn run(
        &self,
        mut signals: Signals,
        drain: Duration,
    ) -> Result<(), ShutdownError> {
        tokio::select! {
            () = self.process.early.stop.cancelled() => {}
            name = signals.next() => tracing::info!(signal = name, "shutting down"),
        }
        self.trigger();
        let drained = {
            let mut tasks = pin!(self.process.drain());
            tokio::select! {
                () = &mut tasks => true,
                () = tokio::time::sleep(drain) => false,
                _name = signals.next() => false,
            }
        };
        let undrained: Vec<_> = if drained {
            Vec::new()
        } else {
            self.lock().running.values().cloned().collect()
        };
        self.process.cut.cancel();
        match self.lock().failure.take() {
            Some(failure) => Err(failure),
            None if undrained.is_empty() => Ok(()),
            None => Err(ShutdownError::Undrained {
                after: drain,
                tasks: undrained,
            }),
        }
    }

    fn enter(&self, name: &str) -> Entry {
        let name: Arc<str> = name.into();
        let mut book = self.lock();
        let id = book.next;
        book.next += 1;
        book.running.insert(id, name.clone());
        Entry {
            shutdown: self.clone(),
            id,
            name,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Book> {
        self.process
            .book
            .lock()
            .expect("no holder of the book panics")
    }

    fn stage(&self) -> &Stage {
        match self.turn {
            Turn::Early => &self.process.early,
            Turn::First => &self.process.first,
            Turn::Last => &self.process.last,
        }
    }
}

impl Process {
    /// Tells the tasks to stop and waits until they have ended, turn by turn.
    async fn drain(&self) {
        for Stage { stop, tasks } in [&self.early, &self.first, &self.last] {
            stop.cancel();
            tasks.close();
            tasks.wait().await;
        }
    }
}

impl Drop for Entry {
    fn drop(&mut self) {
        self.shutdown.lock().running.remove(&self.id);
    }
}

impl Signals {
    /// Starts to listen, so that from now on these signals do not kill the process.
    ///
    /// # Errors
    ///
    /// When the system refuses the signal handlers.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub(crate) fn listen() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    /// Returns the name of the next signal. Cancellation safe.
    async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }
}

struct Names<'a>(&'a [Arc<str>]);

impl fmt::Display for Names<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join(", "))
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use tokio::sync::oneshot;

    use super::*;

    /// Longer than any task in these tests needs, so that only a test that hangs reaches it.
    const DRAIN: Duration = Duration::from_mins(2);

    fn signals() -> Signals {
        Signals::listen().expect("signals can be heard")
    }

    #[tokio::test]
    async fn tasks_are_waited_for() {
        let shutdown = Shutdown::new();
        let token = shutdown.token();
        let (done, seen) = oneshot::channel();
        shutdown.spawn("worker", async move {
            token.cancelled().await;
            tokio::task::yield_now().await;
            done.send(()).expect("the test listens");
        });
        shutdown.trigger();
        shutdown
            .run(signals(), DRAIN)
            .await
            .expect("an orderly end");
        seen.await.expect("the task ended before the shutdown did");
    }

    #[tokio::test]
    async fn others_continue_until_the_early_tasks_have_ended() {
        let shutdown = Shutdown::new();
        let early = shutdown.early();
        let (told, other) = (early.token(), shutdown.token());
        let (done, seen) = oneshot::channel();
        early.spawn("drain", async move {
            told.cancelled().await;
            tokio::task::yield_now().await;
            done.send(other.is_cancelled()).expect("the test listens");
        });
        let stop = shutdown.token();
        shutdown.spawn("worker", async move { stop.cancelled().await });
        shutdown.trigger();
        shutdown
            .run(signals(), DRAIN)
            .await
            .expect("an orderly end");
        let was_told = seen.await.expect("the early task ended");
        assert!(!was_told, "the others were told during the early turn");
    }

    #[tokio::test(start_paused = true)]
    async fn a_failure_ends_the_early_turn() {
        let triggered = tokio::time::Instant::now();
        let shutdown = Shutdown::new();
        let early = shutdown.early();
        let (begin, stop) = (early.token(), shutdown.token());
        early.spawn("drain", async move {
            begin.cancelled().await;
            stop.cancelled().await;
        });
        shutdown.spawn("discovery", async {});
        let error = shutdown.run(signals(), DRAIN).await.expect_err("it ended");
        assert!(
            error.to_string().starts_with("task `discovery` ended"),
            "{error}"
        );
        assert_eq!(
            triggered.elapsed(),
            Duration::ZERO,
            "the early task was waited for"
        );
    }

    #[tokio::test]
    async fn a_task_that_ends_on_its_own_stops_the_others() {
        let shutdown = Shutdown::new();
        let token = shutdown.token();
        shutdown.spawn("other", async move { token.cancelled().await });
        shutdown.spawn("discovery", async {});
        let error = shutdown.run(signals(), DRAIN).await.expect_err("it ended");
        assert_eq!(
            error.to_string(),
            "task `discovery` ended before the shutdown"
        );
    }

    #[tokio::test]
    async fn a_failure_keeps_its_cause() {
        let shutdown = Shutdown::new();
        shutdown.spawn_fallible("http", async { Err(io::Error::other("no socket")) });
        let error = shutdown.run(signals(), DRAIN).await.expect_err("it failed");
        assert_eq!(error.to_string(), "task `http` failed");
        assert_eq!(
            error.source().map(ToString::to_string).as_deref(),
            Some("no socket")
        );
    }

    #[tokio::test]
    async fn a_panic_is_told_with_the_name_of_its_task() {
        let shutdown = Shutdown::new();
        shutdown.spawn("reconciler", async { panic!("a broken invariant") });
        let error = shutdown
            .run(signals(), DRAIN)
            .await
            .expect_err("it panicked");
        assert_eq!(error.to_string(), "task `reconciler` panicked");
    }

    #[tokio::test]
    async fn tasks_of_the_last_turn_go_on_until_all_others_have_ended() {
        let shutdown = Shutdown::new();
        let needed = shutdown.last().token();
        let (first, last) = (shutdown.token(), shutdown.last().token());
        shutdown.spawn("client", async move {
            first.cancelled().await;
            // Every other ready task runs meanwhile.
            for _ in 0..10 {
                tokio::task::yield_now().await;
            }
            assert!(!needed.is_cancelled(), "the server ends first");
        });
        shutdown
            .last()
            .spawn("server", async move { last.cancelled().await });
        shutdown.last().trigger();
        shutdown
            .run(signals(), DRAIN)
            .await
            .expect("an orderly end");
    }

    #[tokio::test]
    async fn a_task_of_the_last_turn_that_ends_on_its_own_stops_the_others() {
        let shutdown = Shutdown::new();
        let token = shutdown.token();
        shutdown.spawn("client", async move { token.cancelled().await });
        shutdown.last().spawn("server", async {});
        let error = shutdown.run(signals(), DRAIN).await.expect_err("it ended");
        assert_eq!(error.to_string(), "task `server` ended before the shutdown");
    }

    #[tokio::test]
    async fn tasks_that_do_not_end_are_cut_off_and_named() {
        let shutdown = Shutdown::new();
        let (alive, cut) = oneshot::channel::<()>();
        shutdown.spawn("stuck", async move {
            let _alive = alive;
            pending::<()>().await;
        });
        shutdown.trigger();
        let error = shutdown
            .run(signals(), Duration::from_millis(5))
            .await
            .expect_err("one is stuck");
        assert_eq!(error.to_string(), "cut off after 5ms: stuck");
        cut.await.expect_err("the task was dropped");
    }

    #[tokio::test]
    async fn a_signal_ends_the_process_in_order() {
        let shutdown = Shutdown::new();
        let token = shutdown.token();
        shutdown.spawn("worker", async move { token.cancelled().await });
        let signals = signals();
        let this = rustix::process::getpid();
        rustix::process::kill_process(this, rustix::process::Signal::TERM).expect("a signal");
        shutdown.run(signals, DRAIN).await.expect("an orderly end");
        assert!(shutdown.token().is_cancelled());
    }

    #[tokio::test]
    async fn the_root_of_another_runtime_is_waited_for() {
        let shutdown = Shutdown::new();
        let token = shutdown.token();
        let root = shutdown.supervise("worker 1", async move {
            token.cancelled().await;
            Ok::<(), Infallible>(())
        });
        let thread = std::thread::spawn(|| {
            tokio::runtime::Builder::new_current_thread()
                .build()
                .expect("a runtime")
                .block_on(root);
        });
        shutdown.trigger();
        shutdown
            .run(signals(), DRAIN)
            .await
            .expect("an orderly end");
        thread.join().expect("the worker does not panic");
    }
}
