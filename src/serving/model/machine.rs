//! Machines, their clocks and volumes, and the sidecars that run on them.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

/// The time of every wall clock when a schedule begins: a thousand days, so that no clock is ever
/// set back to a time before zero.
const BEGIN: i64 = 86_400_000_000;

/// A machine with two clocks. Its boot clock is true within half a per cent.
#[derive(Clone, Debug)]
pub(super) struct Machine {
    pub(super) boot: u64,
    /// In microseconds, so that a drift is not lost in rounding.
    boot_us: u64,
    wall: i64,
    /// In thousandths.
    rate: u64,
    /// Its boot clock stands still while it is paused; the wall clock of such a machine is never set.
    pub(super) pauses: bool,
    pub(super) volume: Option<usize>,
    pub(super) is_full: bool,
}

/// A disk with a place for a snapshot file. It can move from machine to machine.
#[derive(Clone, Debug)]
pub(super) struct Volume {
    /// The inode of the lock beside the file.
    pub(super) inode: u64,
    pub(super) file: Option<File>,
}

/// A snapshot file.
#[derive(Clone, Debug)]
pub(super) struct File {
    pub(super) id: String,
    /// Its own inode in the file system.
    pub(super) inode: u64,
    /// The inode that its content names.
    pub(super) written_as: u64,
    pub(super) boot: u64,
    pub(super) machine: usize,
    pub(super) writer: usize,
    /// Whether an operator answers for every process that serves from it.
    pub(super) is_forgotten: bool,
    pub(super) write: u64,
    pub(super) view: View,
    pub(super) confirmed: Option<Asked>,
    pub(super) grant: u64,
}

/// The state of the keyring that a sidecar holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct View {
    pub(super) applied: u64,
    pub(super) revoked_through: u64,
}

/// When something was asked, by both clocks of a machine.
#[derive(Clone, Copy, Debug)]
pub(super) struct Asked {
    pub(super) boot: u64,
    pub(super) wall: i64,
}

/// A process.
#[derive(Clone, Debug)]
pub(super) struct Sidecar {
    pub(super) node: u8,
    pub(super) run: usize,
    pub(super) machine: usize,
    pub(super) is_alive: bool,
    pub(super) is_frozen: bool,
    pub(super) deny_after: u64,
    /// When it acquired its lock; none when it holds none.
    pub(super) acquired: Option<u64>,
    pub(super) boot: u64,
    /// The volume of the file that it keeps.
    pub(super) volume: Option<usize>,
    /// The device number of that volume on its machine.
    pub(super) device: u64,
    pub(super) file_id: String,
    pub(super) begun_from_write: u64,
    pub(super) writes: u64,
    /// The run that wrote the file that this run continues, until the control plane has accepted
    /// its Hello.
    pub(super) goes_on_from: Option<usize>,
    pub(super) view: View,
    /// For a sidecar on demand, the versions that it has looked up and holds, in memory only.
    pub(super) on_demand: Option<BTreeSet<usize>>,
    pub(super) durable: View,
    pub(super) confirmed: Option<Asked>,
    pub(super) grant: u64,
    pub(super) beats: u64,
    pub(super) asked: BTreeMap<u64, Asked>,
    pub(super) streams: u64,
    /// The index of its stream in the world.
    pub(super) stream: Option<usize>,
    /// How often each version was used, and when last by its own clock.
    pub(super) uses: BTreeMap<usize, (u64, i64)>,
}

/// A message of a sidecar.
#[derive(Clone, Debug)]
pub(super) enum Up {
    Hello {
        stream: u64,
        view: View,
    },
    Beat(u64),
    Ack {
        view: View,
        durable: View,
    },
    Usage {
        beat: u64,
        uses: BTreeMap<usize, (u64, i64)>,
    },
    /// A version is presented that it does not hold.
    Lookup(usize),
    Dropped,
    Goodbye {
        erased: bool,
        last_write: u64,
    },
}

/// A message of a control plane.
#[derive(Clone, Debug)]
pub(super) enum Down {
    /// The held state must not be used again.
    Anew,
    State(u64),
    Lane(u64),
    /// The answer to a lookup.
    Found {
        version: usize,
        head: u64,
    },
    Answer {
        beat: u64,
        head: u64,
        serve_for: u64,
    },
    NotServed,
    End,
}

/// A stream between a run and the control plane.
#[derive(Clone, Debug)]
pub(super) struct Stream {
    pub(super) run: usize,
    pub(super) number: u64,
    pub(super) up: VecDeque<Up>,
    pub(super) down: VecDeque<Down>,
    /// Nothing arrives any more.
    pub(super) is_cut: bool,
    /// Its state at the control plane.
    pub(super) state: StreamState,
    /// Whether the sidecar may not have the keyring.
    pub(super) is_forbidden: bool,
    /// When each answer was sent, by the control plane's wall clock.
    pub(super) answered: BTreeMap<u64, i64>,
}

/// The state of a stream at the control plane.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StreamState {
    /// Its Hello has not been read.
    Opening,
    Open,
    Over,
}

impl Stream {
    pub(super) fn is_open(&self) -> bool {
        self.state == StreamState::Open
    }

    pub(super) fn is_over(&self) -> bool {
        self.state == StreamState::Over
    }
}

impl Machine {
    pub(super) fn new(rate: u64, pauses: bool) -> Self {
        Self {
            boot: 1,
            boot_us: 0,
            wall: BEGIN,
            rate,
            pauses,
            volume: None,
            is_full: false,
        }
    }

    pub(super) fn pass(&mut self, time: u64) {
        self.boot_us += time * self.rate;
        self.wall += i64::try_from(time).unwrap_or(i64::MAX);
    }

    /// The boot clock stands still, and the wall clock does not.
    pub(super) fn pass_paused(&mut self, time: u64) {
        self.wall += i64::try_from(time).unwrap_or(i64::MAX);
    }

    pub(super) fn step(&mut self, by: i64) {
        self.wall += by;
    }

    pub(super) fn reboot(&mut self) {
        self.boot += 1;
        self.boot_us = 0;
    }

    /// Replaces its boot clock by another one, with any time and a speed of its own.
    pub(super) fn replace(&mut self, boot: u64, rate: u64) {
        self.boot += 1;
        self.boot_us = boot * 1_000;
        self.rate = rate;
    }

    pub(super) const fn now(&self) -> Asked {
        Asked {
            boot: self.boot_us / 1_000,
            wall: self.wall,
        }
    }
}

impl Asked {
    /// Returns the larger of the times that the two clocks have measured since then.
    pub(super) fn age(&self, now: Self) -> u64 {
        let by_wall = u64::try_from(now.wall.saturating_sub(self.wall)).unwrap_or(0);
        now.boot.saturating_sub(self.boot).max(by_wall)
    }
}

impl Sidecar {
    pub(super) fn holds(&self, version: usize) -> bool {
        self.on_demand
            .as_ref()
            .is_none_or(|held| held.contains(&version))
    }

    /// Returns whether it answers checks from its state.
    pub(super) fn is_fresh(&self, now: Asked, ignores_grant: bool) -> bool {
        let limit = if ignores_grant {
            self.deny_after
        } else {
            self.deny_after.min(self.grant)
        };
        let fresh = self.confirmed.is_some_and(|asked| asked.age(now) < limit);
        self.is_alive && !self.is_frozen && fresh && self.view.applied > 0
    }
}
