//! The actions of the control plane.

use std::collections::{BTreeMap, BTreeSet};

use super::{
    super::{
        Failure, Plant,
        machine::{Down, StreamState, Up, View},
    },
    IDLE_FOR, LONG, Moment, SHORT, Version, Violation, World, millis, pace_of, rate, version_ref,
};
use crate::{
    key::{Coverage, Epoch, Evidence, Idleness, KeyringName, Revision, Timestamp, Use, testing},
    serving::{
        About, Confirmation, Farewell, HeldState, Hello, Lock, LockAt, LockPlace, Serving,
        SnapshotFile, Target,
    },
};

impl World {
    pub(super) fn end_stream(&mut self, stream: usize) {
        let was_open = self.streams[stream].is_open();
        self.streams[stream].state = StreamState::Over;
        self.streams[stream].up.clear();
        if was_open {
            let (run, number) = (self.streams[stream].run, self.streams[stream].number);
            let key = self.key(run);
            self.lost_since.insert(key.clone(), self.control.now().boot);
            let now = self.now();
            self.serving.stream_ended(&key, number, now);
        }
    }

    pub(super) fn deliver_up(&mut self, stream: usize) {
        if self.streams[stream].is_cut || self.streams[stream].is_over() {
            return;
        }
        let Some(message) = self.streams[stream].up.pop_front() else {
            return;
        };
        let run = self.streams[stream].run;
        let key = self.key(run);
        let now = self.now();
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
                // The last report covers this run only: another process may serve from its file by
                // then.
                if let Some(until) = self.streams[stream].answered.get(&beat).copied() {
                    let until = Timestamp::from_millis(until);
                    self.serving.reported(&key, until, now);
                }
            }
            Up::Lookup(version) => {
                let head = self.head;
                let opened = &mut self.streams[stream];
                if !opened.is_forbidden {
                    opened.down.push_back(Down::Found { version, head });
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
        let now = self.now();
        let is_known = self.serving.gaps().any(|(gone, _)| *gone == key);
        let Ok(welcome) = self.serving.hello(hello, now) else {
            self.refuse(stream);
            return;
        };
        let kept = self.rows.get(&key).cloned();
        if self.plant != Plant::HelloBeforeSaved && !self.save() {
            self.serving.stream_ended(&key, number, now);
            self.refuse(stream);
            return;
        }
        if !is_forbidden {
            self.sidecars[run].goes_on_from = None;
        }
        if is_known {
            self.forgotten.remove(&run);
        }
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
        if welcome.was_forgotten {
            opened.down.push_back(Down::Anew);
        }
        opened.down.push_back(if is_forbidden {
            Down::NotServed
        } else {
            Down::State(self.head)
        });
    }

    /// The stream ends before anything was sent on it.
    fn refuse(&mut self, stream: usize) {
        self.streams[stream].down.push_back(Down::End);
        self.streams[stream].state = StreamState::Over;
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
        let held = HeldState {
            epoch: Epoch::new(1),
            revision: Revision::new(view.applied),
            revoked_through: Revision::new(view.revoked_through),
            agrees: !is_forbidden && view.applied > 0,
            deny_after: millis(sidecar.deny_after),
            is_admitted: !is_forbidden,
            is_on_demand: sidecar.on_demand.is_some(),
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
        let arrived = self.now();
        let name = testing::keyring_name();
        let granted = self
            .serving
            .grant(&key, &name, millis(serve_for), arrived.boot);
        match granted {
            Ok(true) => {}
            Ok(false) => {
                if self.plant != Plant::AnswerBeforeSaved && !self.save() {
                    return;
                }
            }
            Err(_) => return,
        }
        self.naive.insert(
            key,
            self.control.now().boot + serve_for + serve_for / 100 + 1,
        );
        self.forgotten.remove(&run);
        let sent_at = self.pace.0.now().as_millis();
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

    pub(super) fn stage(&mut self) {
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

    pub(super) fn hand_over(&mut self) {
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
        self.may_deny
            .extend(self.forgotten.iter().map(|run| (at, *run)));
        let now = Moment {
            wall: self.control.now().wall,
            true_time: self.true_time,
        };
        for version in &mut self.versions[..at] {
            version.replaced_at.get_or_insert(now);
        }
        self.publish(false);
    }

    pub(super) fn revoke(&mut self, version: u8) {
        let at = usize::from(version) % self.versions.len();
        let head = self.head + 1;
        let version = &mut self.versions[at];
        if version.revoked.is_none() && version.retired.is_none() {
            version.revoked = Some(head);
            self.head = head;
            self.publish(true);
        }
    }

    pub(super) fn confirm_revoked(&mut self, version: u8) {
        let at = usize::from(version) % self.versions.len();
        if let Some(revision) = self.versions[at].revoked
            && self.is_passed(Target::Revoked(Revision::new(revision)))
        {
            self.versions[at].is_denied = true;
            self.may_accept.retain(|(version, _)| *version != at);
            self.may_accept
                .extend(self.forgotten.iter().map(|run| (at, *run)));
        }
    }

    pub(super) fn retire(&mut self, version: u8) -> Result<(), Violation> {
        let at = usize::from(version) % self.versions.len();
        let state = self.versions[at];
        let Some(replaced_at) = state.replaced_at else {
            return Ok(());
        };
        if state.retired.is_some() || state.revoked.is_some() {
            return Ok(());
        }
        let name: KeyringName = testing::keyring_name();
        let now = self.now();
        // By `Pace`, and never later than by the clock.
        let at_pace = now.wall.min(self.pace.0.now());
        let coverage: Coverage = self.serving.coverage(&name, at_pace, now);
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
        let overlap = Timestamp::from_millis(replaced_at.wall);
        let idle = evidence.idleness(version_ref(at), overlap, millis(IDLE_FOR));
        if let Idleness::Complete { .. } = idle {
            if !self.has_begun_ahead && !self.was_idle(at) {
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
        let now = self.now();
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

    /// The control plane crashes, and starts again with the rows that are in the store by then.
    pub(super) fn restart(&mut self, generous: bool, elsewhere: bool) {
        if self.random.one_in(2) {
            self.write_to_end();
        }
        self.writing = None;
        self.max_serve_for = if generous { LONG } else { SHORT };
        self.granted_at_most = self.max_serve_for;
        for stream in &mut self.streams {
            stream.state = StreamState::Over;
            stream.up.clear();
            stream.down.push_back(Down::End);
        }
        if elsewhere {
            let boot = self.random.below(1_000_000);
            let rate = rate(&mut self.random);
            self.control.replace(boot, rate);
        }
        let before = self.pace.0.now();
        self.pace = pace_of(&self.control);
        self.has_begun_ahead |= self.pace.0.now() > before;
        let rows = self.rows.values().cloned().collect();
        let restored = Serving::restore(rows, millis(self.max_serve_for), self.now());
        self.serving = restored.expect("it has written them");
        self.lost_since.clear();
        self.naive.clear();
        let forgotten = std::mem::take(&mut self.forgotten);
        let is_counted = |run: &usize| {
            let formers = self.formers(*run).into_iter();
            let mut formers = formers.filter_map(|run| self.serving.run(&self.key(run)));
            formers.any(|run| !run.keyrings.is_empty())
        };
        let forgotten = forgotten.into_iter().filter(|run| !is_counted(run));
        self.forgotten = forgotten.collect();
    }

    /// An operator answers for a run, and thereby for the runs that continue its file, until the
    /// control plane accepts their Hello.
    pub(super) fn forget(&mut self, which: u8) {
        let now = self.now();
        self.serving.pass(now);
        let runs = 0..self.sidecars.len();
        let counted: Vec<usize> = runs
            .clone()
            .filter(|run| self.serving.run(&self.key(*run)).is_some())
            .collect();
        let Some(run) = counted
            .get(usize::from(which) % counted.len().max(1))
            .copied()
        else {
            return;
        };
        if self.serving.forget(&self.key(run), now).is_ok() {
            let id = self.sidecars[run].file_id.clone();
            let goes_on = |other: &usize| {
                let other = &self.sidecars[*other];
                other.goes_on_from.is_some() && other.file_id == id
            };
            let alike: Vec<usize> = runs.filter(goes_on).chain([run]).collect();
            self.forgotten.extend(alike);
            let files = self.volumes.iter_mut();
            for file in files.filter_map(|volume| volume.file.as_mut()) {
                file.is_forgotten |= file.id == id;
            }
            self.save();
        }
    }

    /// Returns a run, and the runs whose file it continues without an accepted Hello.
    fn formers(&self, run: usize) -> Vec<usize> {
        let former = |run: &usize| self.sidecars[*run].goes_on_from;
        std::iter::successors(Some(run), former).collect()
    }

    /// An operator answers for a run, whatever was promised before it began.
    pub(super) fn answered_for_in_all(&mut self, run: usize) {
        self.forgotten.insert(run);
        for version in 0..self.versions.len() {
            self.may_deny.insert((version, run));
            self.may_accept.insert((version, run));
        }
    }

    /// An operator who answers for a run also answers for the runs that continue its file.
    pub(super) fn answered_for_like(&mut self, run: usize, former: usize) {
        if self.forgotten.contains(&former) {
            self.forgotten.insert(run);
        }
        for answered_for in [&mut self.may_deny, &mut self.may_accept] {
            let of_former = answered_for.iter().filter(|(_, of)| *of == former);
            let alike: Vec<_> = of_former.map(|(version, _)| (*version, run)).collect();
            answered_for.extend(alike);
        }
    }

    pub(super) fn rule(&mut self, node: u8, allowed: bool) {
        if allowed {
            self.forbidden.remove(&node);
        } else {
            self.forbidden.insert(node);
        }
    }

    /// Writes the changes to the store. Returns whether they are known to be there.
    pub(super) fn save(&mut self) -> bool {
        self.begin_to_write();
        self.write_to_end()
    }

    /// A write waits for the write in progress.
    pub(super) fn begin_to_write(&mut self) {
        self.write_to_end();
        let now = self.now();
        self.writing = Some((self.serving.unsaved(now), now));
    }

    pub(super) fn write_to_end(&mut self) -> bool {
        let Some((unsaved, now)) = self.writing.take() else {
            return true;
        };
        let (failure, times) = self.failing;
        self.failing.1 = times.saturating_sub(1);
        let failure = (times > 0).then_some(failure);
        if failure == Some(Failure::Refused) {
            return false;
        }
        for row in &unsaved.rows {
            self.rows.insert(row.key.clone(), row.clone());
        }
        if failure == Some(Failure::Torn) && !unsaved.removed.is_empty() {
            return false;
        }
        for key in &unsaved.removed {
            self.rows.remove(key);
        }
        if failure == Some(Failure::Unheard) {
            return false;
        }
        self.serving.saved(&unsaved, now);
        true
    }
}
