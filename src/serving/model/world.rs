//! What there is, what each step does to it, and the judge.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    time::Duration,
};

use super::{
    Plant, Random, Step,
    machine::{Asked, Down, File, Machine, Sidecar, Stream, StreamState, Up, View, Volume},
};
use crate::{
    clock::BootTime,
    key::{
        Coverage, Epoch, Evidence, Idleness, KeyringName, Revision, Timestamp, Use, VersionNumber,
        VersionRef, testing,
    },
    serving::{
        About, Confirmation, Farewell, Held, Hello, Lock, LockAt, LockPlace, Now, Row, RunKey,
        Serving, SnapshotFile, Target,
    },
};

const MOST_RUNS: usize = 12;
/// The limits of sidecars and the longest grants of control planes, in milliseconds.
const SHORT: u64 = 20_000;
const LONG: u64 = 60_000;
const IDLE_FOR: u64 = 15_000;

/// A promise is broken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Violation {
    /// A sidecar denies a version that was handed out.
    Denied { run: usize, version: usize },
    /// A sidecar accepts a version that none should accept any more.
    Accepted { run: usize, version: usize },
    /// A version was retired as unused, and was used.
    Used { version: usize },
}

/// A version of the one key, by the revisions at which things became of it.
#[derive(Clone, Copy, Debug, Default)]
struct Version {
    staged: u64,
    handed_over: Option<u64>,
    revoked: Option<u64>,
    retired: Option<u64>,
    /// All that may serve have denied it.
    is_denied: bool,
    /// Since when it is replaced, by the control plane's wall clock.
    replaced_at: Option<i64>,
}

/// What the control plane has been told of the use of a version by a run.
#[derive(Clone, Copy, Debug, Default)]
struct Told {
    uses: u64,
    last: i64,
}

pub(super) struct World {
    plant: Plant,
    random: Random,
    control: Machine,
    serving: Serving,
    /// What the store has of it.
    rows: BTreeMap<RunKey, Row>,
    max_serve_for: u64,
    /// By the settings with which the control plane started.
    granted_at_most: u64,
    /// The holders of locks, in the order in which they came.
    arrivals: u64,
    /// For the plant that lowers bounds, and the one that counts leases.
    naive: BTreeMap<RunKey, u64>,
    lost_since: BTreeMap<RunKey, u64>,
    head: u64,
    versions: Vec<Version>,
    told: BTreeMap<(usize, usize), Told>,
    /// When a version was really used, by the control plane's wall clock.
    used: BTreeMap<usize, Vec<i64>>,
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
        // The numbers of a lock are the same on machines that were made alike.
        let volume = |at: usize| Volume {
            inode: 7 + u64::try_from(at / 2).unwrap_or(0),
            file: None,
        };
        let volumes = (0..machines.len()).map(volume).collect();
        let serving = Serving::restore(Vec::new(), millis(LONG), now_of(&control));
        Self {
            plant,
            random,
            control,
            serving: serving.expect("there are no rows"),
            rows: BTreeMap::new(),
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
            forbidden: BTreeSet::new(),
            machines,
            volumes,
            nodes,
            inodes: 100,
            sidecars: Vec::new(),
            streams: Vec::new(),
        }
    }

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
            } => {
                let at = self.machine(machine);
                let deny_after = if patient { LONG } else { SHORT };
                self.start(at, node % self.nodes, with_file, deny_after);
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
            Step::Restart { generous } => self.restart(generous),
            Step::WriteDown => {
                self.serving.pass(now_of(&self.control));
                self.serving.write_down(true);
                self.save();
            }
            Step::Limit { generous } => {
                let limit = if generous { LONG } else { SHORT };
                self.max_serve_for = limit.min(self.granted_at_most);
            }
            Step::Rule { node, allowed } => self.rule(node % self.nodes, allowed),
        }
        self.judge()
    }

    fn judge(&self) -> Result<(), Violation> {
        for (run, sidecar) in self.sidecars.iter().enumerate() {
            let now = self.machines[sidecar.machine].now();
            if !sidecar.is_fresh(now, self.plant == Plant::GrantIgnored) {
                continue;
            }
            for (version, state) in self.versions.iter().enumerate() {
                let handed_over = state.handed_over.is_some();
                if handed_over && sidecar.view.applied < state.staged {
                    return Err(Violation::Denied { run, version });
                }
                if state.is_denied && accepts(state, sidecar.view) {
                    return Err(Violation::Accepted { run, version });
                }
            }
        }
        Ok(())
    }

    fn pass(&mut self, time: u64, paused: Option<usize>) {
        self.control.pass(time);
        for (at, machine) in self.machines.iter_mut().enumerate() {
            if paused == Some(at) {
                machine.pass_paused(time);
            } else {
                machine.pass(time);
            }
        }
        let now = now_of(&self.control);
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

    fn start(&mut self, machine: usize, node: u8, with_file: bool, deny_after: u64) {
        if self.sidecars.len() >= MOST_RUNS {
            return;
        }
        let boot = self.machines[machine].boot;
        let alive = |other: &&Sidecar| other.is_alive && other.machine == machine;
        let volume = self.machines[machine].volume.filter(|_| with_file);
        let is_locked = self.sidecars.iter().filter(alive).any(|other| {
            let same_file = volume.is_some() && other.volume == volume;
            let same_socket = volume.is_none() && other.volume.is_none() && other.node == node;
            other.acquired.is_some() && (same_file || same_socket)
        });
        let volume = volume.filter(|_| !is_locked);
        // A device has its number for as long as a process has a file of it open.
        let others = self.sidecars.iter().filter(alive);
        let taken = others.filter(|other| other.volume != volume);
        let device = taken
            .map(|other| other.device)
            .max()
            .map_or(1, |most| most + 1);
        let run = self.sidecars.len();
        let mut sidecar = Sidecar {
            node,
            run,
            machine,
            is_alive: true,
            is_frozen: false,
            deny_after,
            acquired: (!is_locked).then(|| self.acquisition(machine)),
            boot,
            volume,
            device,
            file_id: format!("file-{run}"),
            begun_from_write: 0,
            writes: 0,
            view: View::default(),
            durable: View::default(),
            confirmed: None,
            grant: 0,
            beats: 0,
            asked: BTreeMap::new(),
            streams: 0,
            stream: None,
            uses: BTreeMap::new(),
        };
        if let Some(file) = volume.and_then(|at| self.volumes[at].file.as_ref()) {
            sidecar.file_id.clone_from(&file.id);
            sidecar.begun_from_write = file.write;
            sidecar.writes = file.write;
            sidecar.view = file.view;
            sidecar.durable = file.view;
            let is_own = file.inode == file.written_as || self.plant == Plant::CopyServes;
            if is_own && file.boot == boot && file.machine == machine {
                sidecar.confirmed = file.confirmed;
                sidecar.grant = file.grant;
            }
        }
        self.sidecars.push(sidecar);
    }

    /// Later ones have larger numbers on one machine.
    fn acquisition(&mut self, machine: usize) -> u64 {
        self.inodes += 1;
        self.machines[machine].now().boot * 1_000 + self.inodes % 1_000
    }

    fn kill(&mut self, run: u8) {
        if let Some(run) = self.run(run) {
            self.sidecars[run].is_alive = false;
            if let Some(stream) = self.sidecars[run].stream {
                self.streams[stream].is_cut |= self.random.one_in(2);
            }
        }
    }

    fn crash(&mut self, run: u8) {
        if let Some(run) = self.run(run) {
            self.connect(run);
            let sidecar = &mut self.sidecars[run];
            sidecar.is_alive = false;
            let (machine, node) = (sidecar.machine, sidecar.node);
            let (with_file, deny_after) = (sidecar.volume.is_some(), sidecar.deny_after);
            self.start(machine, node, with_file, deny_after);
        }
    }

    fn stop(&mut self, run: u8, erase: bool) {
        let Some(run) = self.run(run).filter(|run| !self.sidecars[*run].is_frozen) else {
            return;
        };
        self.sidecars[run].is_alive = false;
        let mut erased = false;
        if let Some(volume) = self.own_volume(run) {
            self.write(run, volume);
            if erase && !self.machines[self.sidecars[run].machine].is_full {
                self.volumes[volume].file = None;
                erased = true;
            }
        }
        let (uses, last_write) = {
            let sidecar = &self.sidecars[run];
            (sidecar.uses.clone(), sidecar.writes)
        };
        if let Some(stream) = self.sidecars[run].stream {
            let beat = u64::MAX;
            self.say(stream, Up::Usage { beat, uses });
            self.say(stream, Up::Goodbye { erased, last_write });
        }
    }

    fn freeze(&mut self, run: u8, frozen: bool) {
        if let Some(run) = self.run(run) {
            self.sidecars[run].is_frozen = frozen;
        }
    }

    fn reboot(&mut self, machine: usize) {
        self.machines[machine].reboot();
        let killed = self.sidecars.iter_mut();
        for sidecar in killed.filter(|sidecar| sidecar.machine == machine) {
            sidecar.is_alive = false;
            if let Some(stream) = sidecar.stream {
                self.streams[stream].is_cut = true;
            }
        }
    }

    /// A volume is taken from a machine that may not notice, and appears at another one.
    fn move_volume(&mut self, from: u8, to: u8) {
        let (from, to) = (self.machine(from), self.machine(to));
        if from != to && self.machines[from].volume.is_some() {
            let taken = self.machines[from].volume.take();
            let swapped = std::mem::replace(&mut self.machines[to].volume, taken);
            self.machines[from].volume = swapped;
        }
    }

    fn copy_file(&mut self, from: u8, to: u8) {
        let (from, to) = (self.machine(from), self.machine(to));
        let (Some(from), Some(to)) = (self.machines[from].volume, self.machines[to].volume) else {
            return;
        };
        let is_used = |sidecar: &Sidecar| sidecar.is_alive && sidecar.volume == Some(to);
        if from == to || self.sidecars.iter().any(is_used) {
            return;
        }
        self.inodes += 1;
        let inode = self.inodes;
        let copied = self.volumes[from].file.clone();
        if let Some(copy) = copied {
            self.volumes[to].file = Some(File { inode, ..copy });
        }
    }

    fn sync_one(&mut self, run: u8) {
        if let Some(run) = self.run(run).filter(|run| !self.sidecars[*run].is_frozen)
            && let Some(volume) = self.own_volume(run)
        {
            self.write(run, volume);
            self.ack(run);
        }
    }

    /// The volume of a sidecar, while its machine has it.
    fn own_volume(&self, run: usize) -> Option<usize> {
        let sidecar = &self.sidecars[run];
        let volume = sidecar.volume?;
        (self.machines[sidecar.machine].volume == Some(volume)).then_some(volume)
    }

    fn write(&mut self, run: usize, volume: usize) {
        let sidecar = &mut self.sidecars[run];
        let machine = &self.machines[sidecar.machine];
        if machine.is_full {
            return;
        }
        sidecar.writes += 1;
        sidecar.durable = sidecar.view;
        self.inodes += 1;
        self.volumes[volume].file = Some(File {
            id: sidecar.file_id.clone(),
            inode: self.inodes,
            written_as: self.inodes,
            boot: machine.boot,
            machine: sidecar.machine,
            write: sidecar.writes,
            view: sidecar.view,
            confirmed: sidecar.confirmed,
            grant: sidecar.grant,
        });
    }

    fn connect(&mut self, run: usize) {
        let sidecar = &mut self.sidecars[run];
        if sidecar.is_frozen {
            return;
        }
        if let Some(former) = sidecar.stream {
            // What is on its way may arrive still.
            self.streams[former].down.clear();
        }
        sidecar.streams += 1;
        sidecar.stream = Some(self.streams.len());
        let (stream, view) = (sidecar.streams, sidecar.view);
        self.streams.push(Stream {
            run,
            number: stream,
            up: [Up::Hello { stream, view }].into(),
            down: VecDeque::default(),
            is_cut: false,
            state: StreamState::Opening,
            is_forbidden: false,
            answered: BTreeMap::new(),
        });
    }

    fn beat(&mut self, run: usize) {
        let now = self.machines[self.sidecars[run].machine].now();
        let sidecar = &mut self.sidecars[run];
        if let Some(stream) = sidecar.stream.filter(|_| !sidecar.is_frozen) {
            sidecar.beats += 1;
            sidecar.asked.insert(sidecar.beats, now);
            let beat = Up::Beat(sidecar.beats);
            self.say(stream, beat);
        }
    }

    fn ask(&mut self, run: usize) {
        self.beat(run);
        if let Some(stream) = self.sidecars[run]
            .stream
            .filter(|_| self.sidecars[run].is_alive)
        {
            while !self.streams[stream].up.is_empty() && !self.streams[stream].is_over() {
                let left = self.streams[stream].up.len();
                self.deliver_up(stream);
                if self.streams[stream].up.len() == left {
                    break;
                }
            }
        }
    }

    fn use_version(&mut self, run: usize, version: usize) {
        let sidecar = &mut self.sidecars[run];
        let now = self.machines[sidecar.machine].now();
        let is_fresh = sidecar.is_fresh(now, self.plant == Plant::GrantIgnored);
        if is_fresh && accepts(&self.versions[version], sidecar.view) {
            let (count, last) = sidecar.uses.entry(version).or_default();
            *count += 1;
            *last = now.wall;
            let at = self.control.now().wall;
            self.used.entry(version).or_default().push(at);
        }
    }

    fn settle(&mut self, run: u8) {
        let Some(run) = self.run(run) else { return };
        let is_forbidden = self.forbidden.contains(&self.sidecars[run].node);
        let is_served = self.sidecars[run].stream.is_some_and(|at| {
            let stream = &self.streams[at];
            stream.is_open() && !stream.is_cut && stream.is_forbidden == is_forbidden
        });
        if !is_served {
            self.connect(run);
        }
        self.beat(run);
        let (rounds, ups) = (1 + self.random.below(3), self.random.below(9));
        for _ in 0..rounds {
            if let Some(stream) = self.sidecars[run].stream {
                for round in 0..8 {
                    if round < ups {
                        self.deliver_up(stream);
                    }
                    self.deliver_down(stream);
                }
            }
            if let Some(volume) = self.own_volume(run) {
                self.write(run, volume);
                self.ack(run);
            }
        }
    }

    fn ack(&mut self, run: usize) {
        let sidecar = &self.sidecars[run];
        let durable = if self.plant == Plant::ConfirmedFromMemory {
            sidecar.view
        } else {
            sidecar.durable
        };
        let view = sidecar.view;
        if let Some(stream) = sidecar.stream {
            self.say(stream, Up::Ack { view, durable });
        }
    }

    fn say(&mut self, stream: usize, message: Up) {
        self.streams[stream].up.push_back(message);
    }

    fn end_stream(&mut self, stream: usize) {
        let was_open = self.streams[stream].is_open();
        self.streams[stream].state = StreamState::Over;
        self.streams[stream].up.clear();
        if was_open {
            let (run, number) = (self.streams[stream].run, self.streams[stream].number);
            let key = self.key(run);
            self.lost_since.insert(key.clone(), self.control.now().boot);
            let now = now_of(&self.control);
            self.serving.stream_ended(&key, number, now);
        }
    }

    fn deliver_up(&mut self, stream: usize) {
        if self.streams[stream].is_cut || self.streams[stream].is_over() {
            return;
        }
        let Some(message) = self.streams[stream].up.pop_front() else {
            return;
        };
        let run = self.streams[stream].run;
        let key = self.key(run);
        let now = now_of(&self.control);
        if let Up::Hello {
            stream: number,
            view,
        } = message
        {
            self.greet(stream, number, view);
            return;
        }
        if !self.streams[stream].is_open() {
            return;
        }
        match message {
            Up::Hello { .. } => {}
            Up::Beat(beat) => self.answer(stream, beat),
            Up::Ack { view, durable } => {
                let confirmation = Confirmation {
                    epoch: Epoch::new(1),
                    applied: Revision::new(view.applied),
                    revoked_through: Revision::new(view.revoked_through),
                    durable: Revision::new(durable.applied),
                    durable_revoked_through: Revision::new(durable.revoked_through),
                    is_whole: true,
                    ..Confirmation::default()
                };
                let number = self.streams[stream].number;
                let name = testing::keyring_name();
                self.serving
                    .confirmed(&key, number, &name, &confirmation, now);
            }
            Up::Usage { beat, uses } => {
                self.count(run, &uses);
                // The last one is of this run alone: its file may be served from by then.
                if let Some(until) = self.streams[stream].answered.get(&beat).copied() {
                    let until = Timestamp::from_millis(until);
                    self.serving.reported(&key, until, now);
                }
            }
            Up::Dropped => {
                let number = if self.plant == Plant::LateDropped {
                    self.sidecars[run].streams
                } else {
                    self.streams[stream].number
                };
                self.serving.dropped(&key, number, &testing::keyring_name());
            }
            Up::Goodbye { erased, last_write } => {
                let farewell = Farewell {
                    has_told_all: true,
                    has_erased_file: erased || self.plant == Plant::GoodbyeIsGone,
                    last_write,
                };
                self.serving.goodbye(&key, farewell, now);
                self.streams[stream].state = StreamState::Over;
            }
        }
    }

    fn count(&mut self, run: usize, uses: &BTreeMap<usize, (u64, i64)>) {
        let wall = self.control.now().wall;
        for (version, (count, last)) in uses {
            let told = self.told.entry((run, *version)).or_default();
            if *count > told.uses {
                told.uses = *count;
                told.last = if self.plant == Plant::SidecarsClock {
                    (*last).min(wall)
                } else {
                    wall
                };
            }
        }
    }

    fn greet(&mut self, stream: usize, number: u64, view: View) {
        let run = self.streams[stream].run;
        let is_forbidden = self.forbidden.contains(&self.sidecars[run].node);
        let hello = self.hello(run, number, view, is_forbidden);
        let key = hello.key.clone();
        let now = now_of(&self.control);
        let welcome = self.serving.hello(hello, now);
        if welcome.is_err() {
            self.streams[stream].down.push_back(Down::End);
            self.streams[stream].state = StreamState::Over;
            return;
        }
        let kept = self.rows.get(&key).cloned();
        self.save();
        if self.plant == Plant::StaleRest
            && let Some(kept) = kept
        {
            self.rows.insert(key.clone(), kept);
        }
        self.lost_since.remove(&key);
        self.naive.remove(&key);
        let opened = &mut self.streams[stream];
        opened.state = StreamState::Open;
        opened.is_forbidden = is_forbidden;
        opened.down.push_back(if is_forbidden {
            Down::NotServed
        } else {
            Down::State(self.head)
        });
    }

    fn hello(&mut self, run: usize, number: u64, view: View, is_forbidden: bool) -> Hello {
        let key = self.key(run);
        self.arrivals += 1;
        let sidecar = &self.sidecars[run];
        let at = match sidecar.volume {
            Some(volume) => LockAt::File {
                device: sidecar.device,
                inode: self.volumes[volume].inode,
            },
            None => LockAt::Socket {
                network_namespace: 1,
                node: format!("node-{}", sidecar.node),
            },
        };
        let machine = if self.plant == Plant::MovedVolume {
            "any".to_owned()
        } else {
            format!("machine-{}-{}", sidecar.machine, sidecar.boot)
        };
        let place = LockPlace {
            boot_id: machine,
            time_namespace: 1,
            at,
        };
        let acquired = sidecar.acquired.map(|acquired| match self.plant {
            Plant::LateHello => self.arrivals,
            _ => acquired,
        });
        let mut lock = acquired.map(|acquired_ns| Lock { place, acquired_ns });
        let mut file = sidecar.volume.map(|_| SnapshotFile {
            id: sidecar.file_id.clone(),
            begun_from_write: sidecar.begun_from_write,
        });
        if self.plant == Plant::RunProofIsFileProof {
            file = None;
        }
        if self.plant == Plant::NamesakeSupersedes {
            file = None;
            lock = Some(Lock {
                place: LockPlace {
                    boot_id: "any".to_owned(),
                    time_namespace: 1,
                    at: LockAt::Socket {
                        network_namespace: 1,
                        node: format!("node-{}", sidecar.node),
                    },
                },
                acquired_ns: u64::try_from(run).unwrap_or(0),
            });
        }
        let held = Held {
            epoch: Epoch::new(1),
            revision: Revision::new(view.applied),
            revoked_through: Revision::new(view.revoked_through),
            agrees: !is_forbidden && view.applied > 0,
            deny_after: millis(sidecar.deny_after),
            is_admitted: !is_forbidden,
            is_on_demand: false,
        };
        Hello {
            key,
            stream: number,
            about: About::default(),
            lock,
            file,
            keyrings: [(testing::keyring_name(), held)].into(),
        }
    }

    fn answer(&mut self, stream: usize, beat: u64) {
        if self.streams[stream].is_forbidden {
            return;
        }
        let run = self.streams[stream].run;
        let key = self.key(run);
        let serve_for = self.sidecars[run].deny_after.min(self.max_serve_for);
        let arrived = now_of(&self.control);
        let name = testing::keyring_name();
        let granted = self
            .serving
            .grant(&key, &name, millis(serve_for), arrived.boot);
        match granted {
            Ok(true) => {}
            Ok(false) => self.save(),
            Err(_) => return,
        }
        self.naive.insert(
            key,
            self.control.now().boot + serve_for + serve_for / 100 + 1,
        );
        let sent_at = self.control.now().wall;
        let head = self.head;
        let opened = &mut self.streams[stream];
        opened.answered.insert(beat, sent_at);
        let answer = Down::Answer {
            beat,
            head,
            serve_for,
        };
        // An answer may overtake what is large.
        if self.random.one_in(2) {
            opened.down.push_front(answer);
        } else {
            opened.down.push_back(answer);
        }
    }

    fn deliver_down(&mut self, stream: usize) {
        let run = self.streams[stream].run;
        let is_current = self.sidecars[run].stream == Some(stream);
        let sidecar = &self.sidecars[run];
        if self.streams[stream].is_cut || !is_current || !sidecar.is_alive || sidecar.is_frozen {
            return;
        }
        let Some(message) = self.streams[stream].down.pop_front() else {
            return;
        };
        let now = self.machines[sidecar.machine].now();
        let sidecar = &mut self.sidecars[run];
        match message {
            Down::State(head) => {
                sidecar.view.applied = sidecar.view.applied.max(head);
                sidecar.view.revoked_through = sidecar.view.revoked_through.max(head);
                self.ack(run);
            }
            Down::Lane(head) => {
                if sidecar.view.applied > 0 {
                    sidecar.view.revoked_through = sidecar.view.revoked_through.max(head);
                }
                self.ack(run);
            }
            Down::Answer {
                beat,
                head,
                serve_for,
            } => {
                let asked = sidecar.asked.remove(&beat);
                let is_folded =
                    sidecar.view.applied >= head || self.plant == Plant::FreshBeforeFolded;
                if let Some(asked) = asked.filter(|_| is_folded) {
                    sidecar.grant = serve_for;
                    sidecar.confirmed = Some(if self.plant == Plant::AgeFromArrival {
                        now
                    } else {
                        asked
                    });
                }
                let uses = sidecar.uses.clone();
                self.say(stream, Up::Usage { beat, uses });
            }
            Down::NotServed => self.drop_keyring(run, stream),
            Down::End => sidecar.stream = None,
        }
    }

    fn drop_keyring(&mut self, run: usize, stream: usize) {
        let sidecar = &mut self.sidecars[run];
        let uses = sidecar.uses.clone();
        sidecar.view = View::default();
        sidecar.confirmed = None;
        let is_erased = match self.own_volume(run) {
            Some(volume) => {
                self.write(run, volume);
                self.sidecars[run].durable == View::default()
            }
            // The volume is elsewhere, with the file.
            None => self.sidecars[run].volume.is_none(),
        };
        let beat = 0;
        self.say(stream, Up::Usage { beat, uses });
        if is_erased {
            self.say(stream, Up::Dropped);
        }
    }

    fn stage(&mut self) {
        let newest = self.versions.last().expect("there is a first");
        if newest.handed_over.is_none() && newest.revoked.is_none() {
            return;
        }
        self.head += 1;
        let staged = self.head;
        self.versions.push(Version {
            staged,
            ..Version::default()
        });
        self.publish(false);
    }

    fn hand_over(&mut self) {
        let at = self.versions.len() - 1;
        let newest = self.versions[at];
        if newest.handed_over.is_some() || newest.revoked.is_some() {
            return;
        }
        let target = Target::Applied(Revision::new(newest.staged), version_ref(at));
        if !self.is_passed(target) {
            return;
        }
        self.head += 1;
        self.versions[at].handed_over = Some(self.head);
        let now = self.control.now().wall;
        for version in &mut self.versions[..at] {
            version.replaced_at.get_or_insert(now);
        }
        self.publish(false);
    }

    fn revoke(&mut self, version: u8) {
        let at = usize::from(version) % self.versions.len();
        let head = self.head + 1;
        let version = &mut self.versions[at];
        if version.revoked.is_none() && version.retired.is_none() {
            version.revoked = Some(head);
            self.head = head;
            self.publish(true);
        }
    }

    fn confirm_revoked(&mut self, version: u8) {
        let at = usize::from(version) % self.versions.len();
        if let Some(revision) = self.versions[at].revoked
            && self.is_passed(Target::Revoked(Revision::new(revision)))
        {
            self.versions[at].is_denied = true;
        }
    }

    fn retire(&mut self, version: u8) -> Result<(), Violation> {
        let at = usize::from(version) % self.versions.len();
        let state = self.versions[at];
        let Some(replaced_at) = state.replaced_at else {
            return Ok(());
        };
        if state.retired.is_some() || state.revoked.is_some() {
            return Ok(());
        }
        let name: KeyringName = testing::keyring_name();
        let wall = self.control.now().wall;
        let now = now_of(&self.control);
        let coverage: Coverage = self
            .serving
            .coverage(&name, Timestamp::from_millis(wall), now);
        let told = self.told.iter().filter(|((_, which), _)| *which == at);
        let last = told.map(|(_, told)| told.last).max();
        let used = Use {
            last_used: last.map(Timestamp::from_millis),
            ..Use::default()
        };
        let evidence = Evidence {
            coverage,
            uses: [(version_ref(at), used)].into(),
        };
        let overlap = Timestamp::from_millis(replaced_at);
        let idle = evidence.idleness(version_ref(at), overlap, millis(IDLE_FOR));
        if let Idleness::Complete {
            since,
            complete_until,
        } = idle
        {
            let (since, until) = (since.as_millis(), complete_until.as_millis());
            let seen = self.used.get(&at).map_or(&[][..], Vec::as_slice);
            // Both clocks of the control plane are true within one per cent, and they differ.
            let slack = (until - since) / 100 + 1;
            if seen
                .iter()
                .any(|used| *used > since + slack && *used < until)
            {
                return Err(Violation::Used { version: at });
            }
            self.head += 1;
            self.versions[at].retired = Some(self.head);
            self.publish(false);
        }
        Ok(())
    }

    fn is_passed(&self, target: Target) -> bool {
        let name = testing::keyring_name();
        let now = now_of(&self.control);
        let nobody = BTreeSet::new();
        let barrier = self
            .serving
            .barrier(&name, Epoch::new(1), target, &nobody, now);
        barrier.is_passed()
    }

    /// Every stream that is open brings the newest state.
    fn publish(&mut self, revokes: bool) {
        let head = self.head;
        for stream in &mut self.streams {
            if stream.is_open() && !stream.is_forbidden {
                if revokes {
                    stream.down.push_front(Down::Lane(head));
                }
                stream.down.push_back(Down::State(head));
            }
        }
    }

    fn restart(&mut self, generous: bool) {
        self.max_serve_for = if generous { LONG } else { SHORT };
        self.granted_at_most = self.max_serve_for;
        for stream in &mut self.streams {
            stream.state = StreamState::Over;
            stream.up.clear();
            stream.down.push_back(Down::End);
        }
        let rows = self.rows.values().cloned().collect();
        let now = now_of(&self.control);
        let restored = Serving::restore(rows, millis(self.max_serve_for), now);
        self.serving = restored.expect("it has written them");
        self.lost_since.clear();
        self.naive.clear();
    }

    fn rule(&mut self, node: u8, allowed: bool) {
        if allowed {
            self.forbidden.remove(&node);
        } else {
            self.forbidden.insert(node);
        }
    }

    fn save(&mut self) {
        let now = now_of(&self.control);
        let unsaved = self.serving.unsaved(now);
        for row in &unsaved.rows {
            self.rows.insert(row.key.clone(), row.clone());
        }
        for key in &unsaved.removed {
            self.rows.remove(key);
        }
        self.serving.saved(&unsaved, now);
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

/// Of a clock, in thousandths: two differ by less than one per cent.
fn rate(random: &mut Random) -> u64 {
    if random.one_in(2) { 996 } else { 1_004 }
}

/// Whether a sidecar with a view accepts a version.
fn accepts(version: &Version, view: View) -> bool {
    let revoked_through = view.revoked_through.max(view.applied);
    version.staged <= view.applied
        && version.revoked.is_none_or(|at| at > revoked_through)
        && version.retired.is_none_or(|at| at > view.applied)
}

fn version_ref(at: usize) -> VersionRef {
    let number = u32::try_from(at + 1).expect("they are few");
    VersionRef {
        key_id: "7Qm2Xc91TbKe".parse().expect("a key id"),
        version: VersionNumber::new(number).expect("it is not zero"),
    }
}

fn now_of(machine: &Machine) -> Now {
    let Asked { boot, wall } = machine.now();
    Now {
        boot: BootTime::from_millis(boot),
        wall: Timestamp::from_millis(wall),
    }
}

const fn millis(time: u64) -> Duration {
    Duration::from_millis(time)
}
