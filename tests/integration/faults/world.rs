//! A control plane and its sidecars as processes, each link through a proxy, under steady checks, with a record of all.

use std::{fs, path::PathBuf, sync::Arc, time::Duration};

use tempfile::TempDir;
use tokio::task::{JoinHandle, JoinSet};

use super::{
    asker::{Asker, checks},
    consumer::Consumer,
    fleet::{self, Admin, admin_of, new_prefix},
    flood::{Flooded, Shape, flood},
    form::Dice,
    history::{Credential, Judgement, Limits, Moment, Outcome},
    key::IssuedKey,
    node::{Node, Setup},
    record::Record,
};
use crate::support::{envoy::EnvoyVersion, eventually::eventually, proxy::Fault, relatch::Control};

/// Everything that a scenario plays with.
pub(super) struct World {
    pub(super) control: Control,
    pub(super) nodes: Vec<Node>,
    pub(super) record: Arc<Record>,
    pub(super) admin: Admin,
    pub(super) keys: Vec<IssuedKey>,
    plan: Plan,
    /// What the names of its sidecars begin with.
    prefix: String,
    /// What was done to it.
    injections: usize,
    /// The longest time until everything followed again.
    recovery: Duration,
    note: Option<String>,
    tasks: JoinSet<()>,
    data: TempDir,
}

/// How a world is made.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) sidecars: usize,
    /// More lines of each sidecar's file.
    pub(super) settings: String,
    pub(super) limits: Limits,
    /// Whether each sidecar keeps a snapshot file.
    pub(super) has_files: bool,
    /// Whether the last sidecar holds the keyring on demand.
    pub(super) is_last_on_demand: bool,
    /// The Envoy that asks the first sidecar, which nobody else asks then.
    pub(super) envoy: Option<EnvoyVersion>,
}

/// What a run came to.
#[derive(Debug)]
pub(super) struct Report {
    pub(super) injections: usize,
    pub(super) judgement: Judgement,
    pub(super) recovery: Duration,
    /// What else there is to tell.
    pub(super) note: Option<String>,
}

/// The least that the control plane's file may hold. How long a sidecar may serve is for each plan to say.
const BRISK: &str = "heartbeat: 1s\n";

/// So many checks that were judged at one process prove something.
const ENOUGH: usize = 20;

/// A sidecar may look a hundred keys up that nobody has, a second after it has used up what it may look up at once.
const BUDGET_FILLS: Duration = Duration::from_secs(1);

impl World {
    /// Starts everything, issues two keys, and asks from then on.
    pub(super) async fn start(plan: Plan) -> Self {
        let data = tempfile::tempdir().expect("a directory can be made");
        let control = Control::start_with(data.path(), BRISK).await;
        let record = Arc::new(Record::new(plan.limits));
        let admin = admin_of(&control);
        let mut world = Self {
            control,
            nodes: Vec::new(),
            record,
            admin,
            keys: Vec::new(),
            plan: plan.clone(),
            prefix: new_prefix(),
            injections: 0,
            recovery: Duration::ZERO,
            note: None,
            tasks: JoinSet::new(),
            data,
        };
        // Well formed, and of nobody.
        let never = "rlk_7Qm2Xc91TbKe_0000000000000000000000000000000003Xqnfa".to_owned();
        world.record.add(never, Credential::default());
        world.issue().await;
        for number in 0..plan.sidecars {
            let name = format!("{}{number}", world.prefix);
            world.start_node(name, plan.has_files).await;
        }
        let watcher = fleet::watch(Arc::clone(&world.record), world.admin.clone());
        world.tasks.spawn(watcher);
        world.issue().await;
        world.follows().await;
        if plan.has_files {
            world.is_kept().await;
        }
        world
    }

    /// Starts one more sidecar with its askers.
    async fn start_node(&mut self, name: String, has_file: bool) {
        let number = self.nodes.len();
        let envoy = self.plan.envoy.filter(|_| number == 0);
        let setup = Setup {
            name,
            directory: self.directory(number),
            settings: self.plan.settings.clone(),
            has_file,
            has_socket: envoy.is_some(),
            is_on_demand: self.plan.is_last_on_demand && number + 1 == self.plan.sidecars,
        };
        let node = Node::start(number, &self.control, setup, &self.record).await;
        let record = Arc::clone(&self.record);
        if let Some(version) = envoy {
            let address = node.sidecar.ext_authz();
            let consumer = Consumer::start(record, number, address, version).await;
            self.tasks.spawn(consumer.run());
        } else {
            let asker = Asker::new(record, number, node.address());
            self.tasks.spawn(asker.run());
        }
        self.nodes.push(node);
    }

    /// Starts a sidecar with the node id of another one, as a copied configuration does, and waits until it is ready; its
    /// number.
    pub(super) async fn start_namesake(&mut self, of: usize, has_file: bool) -> usize {
        let name = self.nodes[of].name().to_owned();
        self.start_node(name, has_file).await;
        self.injected();
        self.nodes.len() - 1
    }

    pub(super) fn now(&self) -> Moment {
        self.record.now()
    }

    /// Notes that something was done to the world.
    pub(super) const fn injected(&mut self) {
        self.injections += 1;
    }

    /// Whether its sidecars keep snapshot files.
    pub(super) const fn has_files(&self) -> bool {
        self.plan.has_files
    }

    /// Asks a sidecar many times at once over one connection, and gives every second call up after a moment. The others are
    /// judged as any check.
    pub(super) async fn give_up_every_second(&self, number: usize, rounds: usize) {
        let address = self.nodes[number].address();
        let asker = Asker::new(Arc::clone(&self.record), number, address);
        asker.give_up_every_second(rounds).await;
    }

    /// Asks a sidecar for many keys that nobody was ever issued.
    pub(super) async fn flood(
        &self,
        number: usize,
        shape: Shape,
        count: usize,
        dice: &mut Dice,
    ) -> Flooded {
        let node = &self.nodes[number];
        let client = checks(&node.address().borrow());
        if node.is_on_demand() {
            self.record.is_crowded(number);
        }
        let flooded = flood(client, shape, count, dice).await;
        let end = self.now() + BUDGET_FILLS;
        self.record.is_crowded_until(number, end);
        let mut history = self.record.history();
        history.nobodys.asked += flooded.asked();
        history.nobodys.allowed += flooded.allowed;
        flooded
    }

    /// The time within which 99 of 100 checks that a sidecar allowed since a moment were answered.
    pub(super) fn slowest_but_one_in_a_hundred(&self, number: usize, since: Moment) -> Duration {
        let history = self.record.history();
        let checks = history.checks.iter();
        let allowed = checks.filter(|check| {
            check.sidecar == number && check.sent >= since && check.outcome == Outcome::Allowed
        });
        let mut times: Vec<_> = allowed
            .map(|check| check.answered.saturating_sub(check.sent))
            .collect();
        times.sort_unstable();
        times
            .get(times.len() * 99 / 100)
            .copied()
            .unwrap_or_default()
    }

    /// Tells more of the run.
    pub(super) fn note(&mut self, note: String) {
        self.note = Some(note);
    }

    /// Takes the store's file away from the control plane, which goes on; every link stays whole. Puts `instead` in its
    /// place, if there is something.
    pub(super) fn take_store(&mut self, instead: Option<&[u8]>) {
        let store = self.store();
        fs::rename(&store, store.with_extension("away")).expect("the directory of the run is ours");
        if let Some(instead) = instead {
            fs::write(&store, instead).expect("the directory of the run is ours");
        }
        for number in 0..self.nodes.len() {
            self.record.is_cut(number);
        }
        self.injected();
    }

    /// Puts it back.
    pub(super) fn give_store_back(&self) {
        for number in 0..self.nodes.len() {
            self.record.is_healed(number);
        }
        let store = self.store();
        fs::rename(store.with_extension("away"), store).expect("the directory of the run is ours");
    }

    fn store(&self) -> PathBuf {
        self.data.path().join("relatch.db")
    }

    /// Notes that nobody can confirm any more what a sidecar holds.
    pub(super) fn is_cut(&self, number: usize) {
        self.record.is_cut(number);
    }

    /// As [`Self::is_cut`], of a process that begins with a file in which nothing is newer than that.
    pub(super) fn is_cut_with(&self, number: usize, confirmed: Moment) {
        self.record.is_cut_with(number, confirmed);
    }

    /// Waits until checks were judged at a sidecar since a moment that had to be allowed.
    pub(super) async fn owes_allows(&self, number: usize, since: Moment) {
        eventually("checks had to be allowed there", async || {
            let owed = self.record.history().owed(number, since);
            (owed.allowed > ENOUGH).then_some(())
        })
        .await;
    }

    /// Waits until checks were judged at a sidecar since a moment that had to be denied, of what a command had promised to be
    /// gone.
    pub(super) async fn owes_what_is_gone(&self, number: usize, since: Moment) {
        eventually("checks of what is gone were judged there", async || {
            let owed = self.record.history().owed(number, since);
            (owed.gone > ENOUGH).then_some(())
        })
        .await;
    }

    /// Fails the test on a wrong decision so far: for where one that goes wrong may never follow again.
    pub(super) fn assert_right(&self) {
        let judgement = self.record.history().judge();
        judgement.assert_right();
    }

    /// Notes that the way of a sidecar's confirmations is about to be whole again.
    pub(super) fn is_healed(&self, number: usize) {
        self.record.is_healed(number);
    }

    /// Cuts the link of a sidecar so many milliseconds from now, and makes it whole after so many more, whatever goes on then.
    pub(super) fn cut_in(&mut self, number: usize, wait: u64, length: u64) -> JoinHandle<()> {
        self.injected();
        let link = self.nodes[number].proxy.remote();
        let record = Arc::clone(&self.record);
        tokio::spawn(async move {
            tokio::time::sleep(Duration::from_millis(wait)).await;
            link.set(Fault::Cut);
            record.is_cut(number);
            tokio::time::sleep(Duration::from_millis(length)).await;
            record.is_healed(number);
            link.set(Fault::None);
        })
    }

    /// Makes a key, and waits until every sidecar has it and is ready: how long that takes is the recovery from what was
    /// done before.
    pub(super) async fn follows(&mut self) {
        let since = self.now();
        let before = self.keys.len();
        eventually("the control plane makes a key", async || {
            self.issue().await;
            (self.keys.len() > before).then_some(())
        })
        .await;
        let revision = self.newest_revision();
        for (number, node) in self.nodes.iter().enumerate() {
            eventually("every sidecar has the newest key", async || {
                let status = node.status().await;
                let keyring = &status["keyrings"][0];
                let is_ready = node.sidecar.get("/readyz").await.status == 200;
                (is_ready && keyring["revision"].as_u64() >= Some(revision)).then_some(())
            })
            .await;
            self.record.is_well(number);
        }
        self.recovery = self.recovery.max(self.now().saturating_sub(since));
    }

    /// Lets checks go on for a while.
    pub(super) async fn a_while(&self, millis: u64) {
        tokio::time::sleep(Duration::from_millis(millis)).await;
    }

    /// Lets checks go on until a moment of the run.
    pub(super) async fn until(&self, moment: Moment) {
        tokio::time::sleep(moment.saturating_sub(self.now())).await;
    }

    /// Ends the run and judges it.
    pub(super) async fn finish(mut self) -> Report {
        self.follows().await;
        // On a busy machine few checks have come by now.
        eventually("enough checks can be judged", async || {
            self.a_while(100).await;
            let judgement = self.record.history().judge();
            judgement.is_enough().then_some(())
        })
        .await;
        self.record.stop();
        while let Some(ended) = self.tasks.join_next().await {
            ended.expect("no task of the world panics");
        }
        let judgement = self.record.history().judge();
        Report {
            injections: self.injections,
            judgement,
            recovery: self.recovery,
            note: self.note,
        }
    }

    /// Whether the control plane was told that a sidecar has the newest key on its disk.
    pub(super) fn is_kept_by(&self, number: usize) -> bool {
        let revision = self.newest_revision();
        self.record.history().sidecars[number].keeps(revision)
    }

    /// Waits until the control plane was told that every sidecar has the newest key on its disk.
    pub(super) async fn is_kept(&self) {
        let revision = self.newest_revision();
        eventually("every sidecar has the newest key on its disk", async || {
            let history = self.record.history();
            let mut sidecars = history.sidecars.iter();
            sidecars.all(|past| past.keeps(revision)).then_some(())
        })
        .await;
    }

    /// With which a key or a version was last made.
    fn newest_revision(&self) -> u64 {
        let history = self.record.history();
        let issued = history.credentials.iter().filter_map(|made| made.issued);
        let newest = issued.filter_map(|change| change.revision).max();
        newest.expect("a run begins with a key")
    }

    /// Of a sidecar alone.
    fn directory(&self, number: usize) -> PathBuf {
        let directory = self.data.path().join(format!("sidecar-{number}"));
        fs::create_dir(&directory).expect("the directory of the run is ours");
        directory
    }
}

impl Report {
    /// Fails the test on a wrong decision, or when nothing was judged.
    pub(super) fn assert_right(&self) {
        self.judgement.assert_right();
        assert!(
            self.judgement.is_enough(),
            "too few checks were judged: {}",
            self.judgement
        );
    }
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            sidecars: 3,
            settings: String::new(),
            limits: Limits::default(),
            has_files: false,
            is_last_on_demand: false,
            envoy: None,
        }
    }
}
