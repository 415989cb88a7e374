//! Which core does what: a load that shares a core with the server that it asks measures the scheduler.

use std::thread;

use anyhow::{Context as _, Result, anyhow};
use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

/// Where a program runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Core {
    /// On the core of the servers that are measured; one of them is asked at a time.
    Measured,
    /// With the load: control plane, collector, and the load itself.
    Load,
}

/// The cores that this process may use, in their order.
#[derive(Clone, Debug)]
pub(crate) struct Cores(Vec<usize>);

impl Cores {
    /// Looks, before anything is pinned.
    ///
    /// # Errors
    ///
    /// When the system does not tell.
    pub(crate) fn look() -> Result<Self> {
        let set = sched_getaffinity(None)?;
        let cores = (0..CpuSet::MAX_CPU).filter(|core| set.is_set(*core));
        Ok(Self(cores.collect()))
    }

    /// Puts this thread, and what it starts, onto a core. On a machine with one core everything shares it.
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

    /// Does `work` on a core. What it starts begins there and stays there.
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
