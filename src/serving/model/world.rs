//! The modelled world, and the effect of each step on it.

mod judge;
mod plane;
mod sidecars;

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

pub(super) use judge::Violation;

use super::{
    Failure, Plant, Random, Step,
    machine::{Asked, Machine, Sidecar, Stream, Volume},
};
use crate::{
    clock::{BootTime, Clock, ManualClock},
    control::pace::Pace,
    key::{Timestamp, VersionNumber, VersionRef},
    serving::{Now, Row, RunKey, Serving, Unsaved},
};

const MOST_RUNS: usize = 12;
/// The limits of sidecars and the longest grants of control planes, in milliseconds.
const SHORT: u64 = 20_000;
const LONG: u64 = 60_000;
const IDLE_FOR: u64 = 15_000;

/// A version of the one key, with the revisions at which its state changed.
#[derive(Clone, Copy, Debug, Default)]
struct Version {
    staged: u64,
    handed_over: Option<u64>,
    revoked: Option<u64>,
    retired: Option<u64>,
    /// Every run that may serve has confirmed that it denies the version.
    is_denied: bool,
    /// The moment at which it was replaced.
    replaced_at: Option<Moment>,
}

/// A moment.
#[derive(Clone, Copy, Debug)]
struct Moment {
    /// By the control plane's wall clock,
    wall: i64,
    /// and in truth.
    true_time: u64,
}

/// A check that presented a version.
#[derive(Clone, Copy, Debug)]
struct Check {
    run: usize,
    /// Counted from 1 within the run.
    number: u64,
    true_time: u64,
}

/// The uses of a version that a run has reported to the control plane.
#[derive(Clone, Copy, Debug, Default)]
struct Told {
    uses: u64,
    last: i64,
}

pub(super) struct World {
    plant: Plant,
    random: Random,
    /// The true time since the start.
    true_time: u64,
    /// The machine of the control plane.
    control: Machine,
    /// The pace by which its planned ends are due, with the hands of its clock.
    pace: (Pace, ManualClock),
    /// Whether a control plane began with a wall clock that had been set ahead. This cannot be
    /// distinguished from a long stop.
    has_begun_ahead: bool,
    serving: Serving,
    /// The rows in the store.
    rows: BTreeMap<RunKey, Row>,
    /// The changes that are on their way to the store, and their time.
    writing: Option<(Unsaved, Now)>,
    /// How the next writes fail, and how many of them.
    failing: (Failure, u8),
    max_serve_for: u64,
    /// The longest grant by the settings with which the control plane started.
    granted_at_most: u64,
    /// The holders of locks, in the order in which they came.
    arrivals: u64,
    /// For the plant that lowers bounds, and the one that counts leases.
    naive: BTreeMap<RunKey, u64>,
    lost_since: BTreeMap<RunKey, u64>,
    head: u64,
    versions: Vec<Version>,
    told: BTreeMap<(usize, usize), Told>,
    /// When each version was really used.
    used: BTreeMap<usize, Vec<Check>>,
    /// The runs for which an operator answers until the control plane accepts their next Hello.
    forgotten: BTreeSet<usize>,
    /// The pairs of a version and a run for which an operator answered when the version was handed
    /// out, or when all runs were reported to deny it.
    may_deny: BTreeSet<(usize, usize)>,
    may_accept: BTreeSet<(usize, usize)>,
    forbidden: BTreeSet<u8>,
    nodes: u8,
    machines: Vec<Machine>,
    volumes: Vec<Volume>,
    inodes: u64,
    sidecars: Vec<Sidecar>,
    streams: Vec<Stream>,
}

impl World {
    pub(super) fn new(plant: Plant, seed: u64) -> Self {
        let mut random = Random(seed ^ 0x5eed);
        let control = Machine::new(rate(&mut random), false);
        // The fewer there are, the more happens to each.
        let machines = usize::from(1 + random.any() % 3);
        let nodes = 1 + random.any() % 2;
        let machines = (0..machines).map(|at| {
            let mut machine = Machine::new(rate(&mut random), at == 0);
            machine.volume = Some(at);
            machine
        });
        let machines: Vec<Machine> = machines.collect();
        // The numbers of a lock are the same on machines that were set up alike.
        let volume = |at: usize| Volume {
            inode: 7 + u64::try_from(at / 2).unwrap_or(0),
            file: None,
        };
        let volumes = (0..machines.len()).map(volume).collect();
        let serving = Serving::restore(Vec::new(), millis(LONG), now_of(plant, &control));
        Self {
            plant,
            random,
            true_time: 0,
            pace: pace_of(&control),
            has_begun_ahead: false,
            control,
            serving: serving.expect("there are no rows"),
            rows: BTreeMap::new(),
            writing: None,
            failing: (Failure::Refused, 0),
            max_serve_for: LONG,
            granted_at_most: LONG,
            arrivals: 0,
            naive: BTreeMap::new(),
            lost_since: BTreeMap::new(),
            head: 1,
            versions: vec![Version {
                staged: 1,
                handed_over: Some(1),
                ..Version::default()
            }],
            told: BTreeMap::new(),
            used: BTreeMap::new(),
            forgotten: BTreeSet::new(),
            may_deny: BTreeSet::new(),
            may_accept: BTreeSet::new(),
            forbidden: BTreeSet::new(),
            machines,
            volumes,
            nodes,
            inodes: 100,
            sidecars: Vec::new(),
            streams: Vec::new(),
        }
    }

    #[expect(clippy::too_many_lines, reason = "an arm for each kind of step")]
    pub(super) fn make(&mut self, step: Step) -> Result<(), Violation> {
        match step {
            Step::Pass(time) => self.pass(time, None),
            Step::Pause(machine, time) => {
                let machine = self.machine(machine);
                let paused = self.machines[machine].pauses.then_some(machine);
                if paused.is_some() {
                    self.pass(time, paused);
                }
            }
            Step::Start {
                machine,
                node,
                with_file,
                patient,
                on_demand,
            } => {
                let at = self.machine(machine);
                let deny_after = if patient { LONG } else { SHORT };
                self.start(at, node % self.nodes, with_file, deny_after, on_demand);
            }
            Step::Kill(run) => self.kill(run),
            Step::Crash(run) => self.crash(run),
            Step::Stop { run, erase } => self.stop(run, erase),
            Step::Freeze(run) => self.freeze(run, true),
            Step::Thaw(run) => self.freeze(run, false),
            Step::Reboot(machine) => {
                let at = self.machine(machine);
                self.reboot(at);
            }
            Step::SetWall(machine, by) => {
                let at = self.machine(machine);
                let machine = &mut self.machines[at];
                if !machine.pauses {
                    machine.step(by);
                }
            }
            Step::MoveVolume(from, to) => self.move_volume(from, to),
            Step::CopyFile(from, to) => self.copy_file(from, to),
            Step::Disk { machine, full } => {
                let at = self.machine(machine);
                self.machines[at].is_full = full;
            }
            Step::Sync(run) => self.sync_one(run),
            Step::Connect(run) => {
                if let Some(run) = self.run(run) {
                    self.connect(run);
                }
            }
            Step::Cut(stream) => {
                if let Some(stream) = self.stream(stream) {
                    self.streams[stream].is_cut = true;
                }
            }
            Step::Notice(stream) => {
                if let Some(stream) = self.stream(stream)
                    && self.streams[stream].is_cut
                {
                    self.end_stream(stream);
                }
            }
            Step::Up(stream) => {
                if let Some(stream) = self.stream(stream) {
                    self.deliver_up(stream);
                }
            }
            Step::Down(stream) => {
                if let Some(stream) = self.stream(stream) {
                    self.deliver_down(stream);
                }
            }
            Step::Ask(run) => {
                if let Some(run) = self.run(run) {
                    self.ask(run);
                }
            }
            Step::Use(run, version) => {
                if let Some(run) = self.run(run) {
                    let version = usize::from(version) % self.versions.len();
                    self.use_version(run, version);
                }
            }
            Step::Settle(run) => self.settle(run),
            Step::Stage => self.stage(),
            Step::HandOver => self.hand_over(),
            Step::Revoke(version) => self.revoke(version),
            Step::Revoked(version) => self.confirm_revoked(version),
            Step::Retire(version) => self.retire(version)?,
            Step::Restart {
                generous,
                elsewhere,
            } => self.restart(generous, elsewhere),
            Step::SetControlWall(by) => {
                self.control.step(by);
                self.turn_hands(0);
            }
            Step::WriteDown => {
                self.serving.pass(self.now());
                self.serving.write_down(true);
                self.begin_to_write();
            }
            Step::Written => {
                self.write_to_end();
            }
            Step::Failing(failure, writes) => self.failing = (failure, writes),
            Step::Forget(run) => self.forget(run),
            Step::Evict(run) => {
                if let Some(run) = self.run(run)
                    && let Some(held) = &mut self.sidecars[run].on_demand
                {
                    held.clear();
                }
            }
            Step::Limit { generous } => {
                let limit = if generous { LONG } else { SHORT };
                self.max_serve_for = limit.min(self.granted_at_most);
            }
            Step::Rule { node, allowed } => self.rule(node % self.nodes, allowed),
        }
        self.judge()
    }

    fn pass(&mut self, time: u64, paused: Option<usize>) {
        self.true_time += time;
        let before = self.control.now().boot;
        self.control.pass(time);
        self.turn_hands(self.control.now().boot - before);
        for (at, machine) in self.machines.iter_mut().enumerate() {
            if paused == Some(at) {
                machine.pass_paused(time);
            } else {
                machine.pass(time);
            }
        }
        let now = self.now();
        let boot = self.control.now().boot;
        let gone = |since: &u64, limit: u64| boot.saturating_sub(*since) > limit;
        if self.plant == Plant::LeaseIsEvidence {
            let over = self.lost_since.iter().filter(|(_, at)| gone(at, 10_000));
            let over: Vec<RunKey> = over.map(|(key, _)| key.clone()).collect();
            for key in over {
                let _ = self.serving.forget(&key, now);
            }
        }
        if self.plant == Plant::LoweredBound {
            let over = self.naive.iter().filter(|(_, until)| **until < boot);
            let over: Vec<RunKey> = over.map(|(key, _)| key.clone()).collect();
            for key in over {
                let _ = self.serving.forget(&key, now);
            }
        }
        self.serving.pass(now);
    }

    /// The hands of the control plane's clock follow its machine.
    fn turn_hands(&self, passed: u64) {
        let (pace, hands) = &self.pace;
        hands.advance(millis(passed));
        hands.set_wall(Timestamp::from_millis(self.control.now().wall));
        // It hears of steps as they happen.
        let _ = pace.now();
    }

    fn now(&self) -> Now {
        now_of(self.plant, &self.control)
    }

    fn key(&self, run: usize) -> RunKey {
        RunKey {
            node: format!("node-{}", self.sidecars[run].node),
            run_id: format!("run-{:02}", self.sidecars[run].run),
        }
    }

    fn machine(&self, which: u8) -> usize {
        usize::from(which) % self.machines.len()
    }

    /// A process that lives.
    fn run(&self, which: u8) -> Option<usize> {
        let alive = self.sidecars.iter().filter(|sidecar| sidecar.is_alive);
        let alive: Vec<usize> = alive.map(|sidecar| sidecar.run).collect();
        (!alive.is_empty()).then(|| alive[usize::from(which) % alive.len()])
    }

    /// A stream that is not over; the newest are the likeliest.
    fn stream(&self, which: u8) -> Option<usize> {
        let newest = self.streams.iter().enumerate().rev();
        let live = newest.filter(|(_, stream)| !stream.is_over() || !stream.down.is_empty());
        let live: Vec<usize> = live.map(|(at, _)| at).take(8).collect();
        (!live.is_empty()).then(|| live[usize::from(which) % live.len()])
    }
}

/// Returns the speed of a clock, in thousandths: two clocks differ by less than one per cent.
fn rate(random: &mut Random) -> u64 {
    if random.one_in(2) { 996 } else { 1_004 }
}

fn version_ref(at: usize) -> VersionRef {
    let number = u32::try_from(at + 1).expect("they are few");
    VersionRef {
        key_id: "7Qm2Xc91TbKe".parse().expect("a key id"),
        version: VersionNumber::new(number).expect("it is not zero"),
    }
}

fn now_of(plant: Plant, control: &Machine) -> Now {
    let Asked { boot, wall } = control.now();
    let boot = match plant {
        Plant::CountedByWallClock => wall.unsigned_abs(),
        _ => boot,
    };
    Now {
        boot: BootTime::from_millis(boot),
        wall: Timestamp::from_millis(wall),
    }
}

/// Returns the pace of a control plane that starts.
fn pace_of(control: &Machine) -> (Pace, ManualClock) {
    let (clock, hands) = Clock::manual(Timestamp::from_millis(control.now().wall));
    (Pace::new(clock), hands)
}

const fn millis(time: u64) -> Duration {
    Duration::from_millis(time)
}
