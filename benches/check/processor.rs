//! The processor time that a process has spent, from `/proc` (proc(5)).

use std::{fs, path::Path, time::Duration};

use anyhow::{Context as _, Result};
use rustix::param::clock_ticks_per_second;

/// User and system time since the process began, in steps of a clock tick, commonly 10 ms.
#[derive(Clone, Copy, Debug)]
pub(crate) struct ProcessorTime {
    /// The time of all threads, including those that have ended.
    pub(crate) process: Duration,
    /// The time of the threads that answer checks; the whole time for a server without such threads.
    pub(crate) check_threads: Duration,
}

/// The name of the threads of a sidecar that answer checks.
const CHECK_THREAD: &str = "(check-";

impl ProcessorTime {
    /// Reads the time of process `id`.
    ///
    /// # Errors
    ///
    /// When there is no such process.
    pub(crate) fn read(id: u32) -> Result<Self> {
        let home = Path::new("/proc").join(id.to_string());
        let process = spent(&read_stat(&home)?)?;
        let mut check_threads = Duration::ZERO;
        let mut has_check_threads = false;
        for task in fs::read_dir(home.join("task"))? {
            let stat = read_stat(&task?.path())?;
            if stat.contains(CHECK_THREAD) {
                check_threads += spent(&stat)?;
                has_check_threads = true;
            }
        }
        Ok(Self {
            process,
            check_threads: if has_check_threads {
                check_threads
            } else {
                process
            },
        })
    }

    /// The time that was spent since `earlier`.
    pub(crate) const fn since(self, earlier: Self) -> Self {
        Self {
            process: self.process.saturating_sub(earlier.process),
            check_threads: self.check_threads.saturating_sub(earlier.check_threads),
        }
    }
}

fn read_stat(home: &Path) -> Result<String> {
    let path = home.join("stat");
    fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))
}

/// Reads fields 14 and 15. The name in field 2 may contain any character: the fields are counted after its closing
/// parenthesis.
fn spent(stat: &str) -> Result<Duration> {
    let (_, fields) = stat.rsplit_once(") ").context("stat has no name")?;
    let mut ticks = 0;
    for field in fields.split(' ').skip(11).take(2) {
        ticks += field.parse::<u64>().context("stat has other fields")?;
    }
    Ok(Duration::from_secs(ticks) / u32::try_from(clock_ticks_per_second())?)
}
