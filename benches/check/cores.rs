//! Assigns work to cores: a load on the same core as the measured server would measure the scheduler.

use std::thread;

use anyhow::{Context as _, Result, anyhow};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// The core of a program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Core {
    /// The core of the measured servers; only one of them has load at a time.
    Measured,
    /// The core of the load, with the control plane and the collector.
    Load,
}

/// The cores that this process may use, in their order.
#[derive(Clone, Debug)]
pub(crate) struct Cores(Vec<usize>);

impl Cores {
    /// Reads the available cores, before anything is pinned.
    ///
    /// # Errors
    ///
    /// When the system refuses.
    pub(crate) fn look() -> Result<Self> {
        let set = sched_getaffinity(None)?;
        let cores = (0..CpuSet::MAX_CPU).filter(|core| set.is_set(*core));
        Ok(Self(cores.collect()))
    }

    /// Pins this thread, and everything that it starts, to a core. On a machine with one core, everything shares that core.
    ///
    /// # Errors
    ///
    /// When the system refuses.
    pub(crate) fn pin(&self, core: Core) -> Result<()> {
        let at = match core {
            Core::Measured => self.0.first(),
            Core::Load => self.0.get(1).or(self.0.first()),
        };
        let mut set = CpuSet::new();
        set.set(*at.context("there is no core")?);
        sched_setaffinity(None, &set).context("cannot choose a core")
    }

    /// Does `work` on a core. Everything that it starts begins there and stays there.
    ///
    /// # Errors
    ///
    /// When the work fails, or the system refuses.
    pub(crate) fn on<T: Send>(
        &self,
        core: Core,
        work: impl FnOnce() -> Result<T> + Send,
    ) -> Result<T> {
        thread::scope(|scope| {
            let working = scope.spawn(|| {
                self.pin(core)?;
                work()
            });
            working
                .join()
                .map_err(|_| anyhow!("what was done on a core of its own has panicked"))?
        })
    }
}
