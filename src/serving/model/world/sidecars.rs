//! The life and the actions of sidecars.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::{
    super::{
        Plant,
        machine::{Down, File, Sidecar, Stream, StreamState, Up, View},
    },
    Check, MOST_RUNS, World,
};

impl World {
    pub(super) fn start(
        &mut self,
        machine: usize,
        node: u8,
        with_file: bool,
        deny_after: u64,
        on_demand: bool,
    ) {
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
            goes_on_from: None,
            view: View::default(),
            on_demand: on_demand.then(BTreeSet::new),
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
            sidecar.goes_on_from = Some(file.writer);
            if !on_demand {
                sidecar.view = file.view;
                sidecar.durable = file.view;
                let is_own = file.inode == file.written_as || self.plant == Plant::CopyServes;
                if is_own && file.boot == boot && file.machine == machine {
                    sidecar.confirmed = file.confirmed;
                    sidecar.grant = file.grant;
                }
            }
            let (writer, is_forgotten) = (file.writer, file.is_forgotten);
            self.answered_for_like(run, writer);
            if is_forgotten {
                self.answered_for_in_all(run);
            }
        }
        self.sidecars.push(sidecar);
    }

    /// Later ones have larger numbers on one machine.
    pub(super) fn acquisition(&mut self, machine: usize) -> u64 {
        self.inodes += 1;
        self.machines[machine].now().boot * 1_000 + self.inodes % 1_000
    }

    pub(super) fn kill(&mut self, run: u8) {
        if let Some(run) = self.run(run) {
            self.sidecars[run].is_alive = false;
            if let Some(stream) = self.sidecars[run].stream {
                self.streams[stream].is_cut |= self.random.one_in(2);
            }
        }
    }

    pub(super) fn crash(&mut self, run: u8) {
        if let Some(run) = self.run(run) {
            self.connect(run);
            let sidecar = &mut self.sidecars[run];
            sidecar.is_alive = false;
            let (machine, node) = (sidecar.machine, sidecar.node);
            let (with_file, deny_after) = (sidecar.volume.is_some(), sidecar.deny_after);
            let on_demand = sidecar.on_demand.is_some();
            self.start(machine, node, with_file, deny_after, on_demand);
        }
    }

    pub(super) fn stop(&mut self, run: u8, erase: bool) {
        let Some(run) = self.run(run).filter(|run| !self.sidecars[*run].is_frozen) else {
            return;
        };
        self.sidecars[run].is_alive = false;
        let mut erased = false;
        if let Some(volume) = self.own_volume(run) {
            self.keep(run, volume);
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

    pub(super) fn freeze(&mut self, run: u8, frozen: bool) {
        if let Some(run) = self.run(run) {
            self.sidecars[run].is_frozen = frozen;
        }
    }

    pub(super) fn reboot(&mut self, machine: usize) {
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
    pub(super) fn move_volume(&mut self, from: u8, to: u8) {
        let (from, to) = (self.machine(from), self.machine(to));
        if from != to && self.machines[from].volume.is_some() {
            let taken = self.machines[from].volume.take();
            let swapped = std::mem::replace(&mut self.machines[to].volume, taken);
            self.machines[from].volume = swapped;
        }
    }

    pub(super) fn copy_file(&mut self, from: u8, to: u8) {
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

    pub(super) fn sync_one(&mut self, run: u8) {
        if let Some(run) = self.run(run).filter(|run| !self.sidecars[*run].is_frozen)
            && let Some(volume) = self.own_volume(run)
        {
            self.keep(run, volume);
            self.ack(run);
        }
    }

    /// The volume of a sidecar, while its machine has it.
    pub(super) fn own_volume(&self, run: usize) -> Option<usize> {
        let sidecar = &self.sidecars[run];
        let volume = sidecar.volume?;
        (self.machines[sidecar.machine].volume == Some(volume)).then_some(volume)
    }

    /// Writes its state to its file, unless the state is held in memory only: the file then stays
    /// as a former run left it.
    pub(super) fn keep(&mut self, run: usize, volume: usize) {
        if self.sidecars[run].on_demand.is_none() {
            self.write(run, volume);
        }
    }

    pub(super) fn write(&mut self, run: usize, volume: usize) {
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
            writer: run,
            is_forgotten: self.forgotten.contains(&run),
            write: sidecar.writes,
            view: sidecar.view,
            confirmed: sidecar.confirmed,
            grant: sidecar.grant,
        });
    }

    pub(super) fn connect(&mut self, run: usize) {
        let sidecar = &mut self.sidecars[run];
        if sidecar.is_frozen {
            return;
        }
        if let Some(former) = sidecar.stream {
            // Messages that are on their way may still arrive.
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

    pub(super) fn beat(&mut self, run: usize) {
        let now = self.machines[self.sidecars[run].machine].now();
        let sidecar = &mut self.sidecars[run];
        if let Some(stream) = sidecar.stream.filter(|_| !sidecar.is_frozen) {
            sidecar.beats += 1;
            sidecar.asked.insert(sidecar.beats, now);
            let beat = Up::Beat(sidecar.beats);
            self.say(stream, beat);
        }
    }

    pub(super) fn ask(&mut self, run: usize) {
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

    pub(super) fn use_version(&mut self, run: usize, version: usize) {
        let sidecar = &self.sidecars[run];
        if !sidecar.holds(version) {
            self.look_up(run, version);
            return;
        }
        let now = self.machines[sidecar.machine].now();
        let is_fresh = sidecar.is_fresh(now, self.plant == Plant::GrantIgnored);
        if is_fresh && self.accepts(sidecar, version) {
            let uses = &mut self.sidecars[run].uses;
            let (count, last) = uses.entry(version).or_default();
            *count += 1;
            *last = now.wall;
            let check = Check {
                run,
                number: *count,
                true_time: self.true_time,
            };
            if !self.forgotten.contains(&run) {
                self.used.entry(version).or_default().push(check);
            }
        }
    }

    pub(super) fn look_up(&mut self, run: usize, version: usize) {
        if let Some(stream) = self.sidecars[run].stream {
            self.say(stream, Up::Lookup(version));
        }
    }

    pub(super) fn settle(&mut self, run: u8) {
        let Some(run) = self.run(run) else { return };
        let is_forbidden = self.forbidden.contains(&self.sidecars[run].node);
        let is_served = self.sidecars[run].stream.is_some_and(|at| {
            let stream = &self.streams[at];
            stream.is_open() && !stream.is_cut && stream.is_forbidden == is_forbidden
        });
        if !is_served {
            self.connect(run);
        }
        if self.sidecars[run].on_demand.is_some() {
            let version = usize::from(self.random.any()) % self.versions.len();
            self.look_up(run, version);
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
                self.keep(run, volume);
                self.ack(run);
            }
        }
    }

    pub(super) fn ack(&mut self, run: usize) {
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

    pub(super) fn say(&mut self, stream: usize, message: Up) {
        self.streams[stream].up.push_back(message);
    }

    pub(super) fn deliver_down(&mut self, stream: usize) {
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
            Down::Anew => {
                if let Some(held) = &mut sidecar.on_demand {
                    held.clear();
                }
            }
            Down::State(head) => self.fold(run, head),
            Down::Found { version, head } => self.fill(run, version, head),
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

    /// A sidecar that holds keys on demand adds a version of the key to those that it holds; if there are none, it holds none.
    fn fold(&mut self, run: usize, head: u64) {
        let sidecar = &mut self.sidecars[run];
        let before = sidecar.view.applied;
        sidecar.view.applied = before.max(head);
        sidecar.view.revoked_through = sidecar.view.revoked_through.max(head);
        if let Some(held) = &mut sidecar.on_demand
            && !held.is_empty()
            && self.plant != Plant::SiblingsApart
        {
            let versions = self.versions.iter().enumerate();
            let staged =
                versions.filter(|(_, version)| (before + 1..=head).contains(&version.staged));
            held.extend(staged.map(|(at, _)| at));
        }
        self.ack(run);
    }

    /// Applies the answer to a lookup: all versions of the key that were accepted when the answer
    /// was read. An answer that is older than the state of the sidecar is of no use.
    fn fill(&mut self, run: usize, version: usize, head: u64) {
        let sidecar = &mut self.sidecars[run];
        let is_outdated = head < sidecar.view.applied.max(sidecar.view.revoked_through);
        if let Some(held) = &mut sidecar.on_demand
            && !is_outdated
        {
            let versions = self.versions.iter().enumerate();
            let live = versions.filter(|(_, version)| version.is_live_at(head));
            let brought = live.map(|(at, _)| at);
            held.extend(brought.filter(|at| *at == version || self.plant != Plant::SiblingsApart));
        }
    }

    pub(super) fn drop_keyring(&mut self, run: usize, stream: usize) {
        let sidecar = &mut self.sidecars[run];
        let uses = sidecar.uses.clone();
        sidecar.view = View::default();
        sidecar.confirmed = None;
        if let Some(held) = &mut sidecar.on_demand {
            held.clear();
        }
        let is_erased = match self.own_volume(run) {
            Some(volume) => {
                self.write(run, volume);
                let file = self.volumes[volume].file.as_ref();
                file.is_none_or(|file| file.view == View::default())
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
}
