//! A disk that cannot sync: `strace` answers in the kernel's place. A disk that is full: no file may grow.

use std::{
    fs,
    path::{Path, PathBuf},
    time::Duration,
};

use rustix::process::{Pid, Resource, Rlimit, getrlimit, prlimit};
use tokio::task::JoinHandle;

use super::{
    change,
    form::run,
    start_alone,
    world::{Plan, World},
};
use crate::support::{eventually::eventually, process::Process, relatch::text};

/// Some of the syncs of a process fail, as they do when a disk is about to die. They are counted for each thread, and
/// apart for files that are written whole (fsync) and for what is appended (fdatasync).
#[derive(Clone, Debug)]
pub(super) struct FailingSyncs {
    /// The syncs of whole files that fail, as strace's `when` has it.
    pub(super) whole: String,
    /// The syncs of appends that fail.
    pub(super) append: String,
    /// Where strace writes what it did.
    pub(super) log: PathBuf,
}

/// What the files of a process may grow to: each write fails where the disk is full.
#[derive(Clone, Copy, Debug)]
pub(super) struct LimitedFiles(Pid);

impl LimitedFiles {
    /// What a shell runs that is about to become the program: a write beyond the limit fails, and ends no process.
    pub(super) const BEFORE: &str = "trap '' XFSZ";

    pub(super) fn of(process: &Process) -> Self {
        let pid = i32::try_from(process.id()).ok().and_then(Pid::from_raw);
        Self(pid.expect("a process has a number"))
    }

    /// The disk is full from now on.
    pub(super) fn fill(self) {
        self.limit(Some(0));
    }

    /// The disk has room again, some time from now, whatever goes on then.
    pub(super) fn room_in(self, moment: Duration) -> JoinHandle<()> {
        tokio::spawn(async move {
            tokio::time::sleep(moment).await;
            self.limit(getrlimit(Resource::Fsize).current);
        })
    }

    fn limit(self, current: Option<u64>) {
        let limit = Rlimit {
            current,
            ..getrlimit(Resource::Fsize)
        };
        prlimit(Some(self.0), Resource::Fsize, limit).expect("it is our process, and it runs");
    }
}

impl FailingSyncs {
    /// What a shell that is about to become a program becomes instead.
    ///
    /// # Panics
    ///
    /// When `scripts/test.sh` has not fetched strace.
    pub(super) fn before(&self) -> String {
        let strace = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/strace/strace");
        assert!(
            strace.exists(),
            "{} is missing: run scripts/test.sh once, it fetches the strace that the tests run",
            strace.display()
        );
        let fail = |call: &str, when: &str| format!("-e inject={call}:error=EIO:when={when}");
        // The program stays our child, and only its syncs are stopped at: the others cost nothing.
        format!(
            "exec '{}' -D -f -qq --seccomp-bpf -o '{}' -e signal=none -e trace=fsync,fdatasync {} {} \"$0\" \"$@\"",
            strace.display(),
            text(&self.log),
            fail("fsync", &self.whole),
            fail("fdatasync", &self.append),
        )
    }

    /// How many have failed.
    pub(super) fn failed(&self) -> usize {
        let log = fs::read_to_string(&self.log).expect("strace has begun to write");
        log.matches("(INJECTED)").count()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_disk_that_cannot_sync_is_told_of_and_never_lied_about() {
    let plan = Plan {
        has_files: true,
        ..Plan::default()
    };
    run("9 errors of fsync", plan, async |world, dice| {
        let node = dice.roll(world.nodes.len());
        // An append fails, and the file that is written in its place, or the rename of that.
        let whole = 3 + dice.roll(2);
        let disk = world.nodes[node].failing_syncs(&format!("{whole}..{whole}"), "2..2");
        world.nodes[node].stop().await;
        world.nodes[node].restart_on(&disk).await;
        world.injected();
        eventually(
            "both have failed, and the file is written again",
            async || {
                world.issue().await;
                let node = &world.nodes[node];
                let is_well = node.metric("relatch_snapshot_failing").await? == "0";
                let is_told = node.logged("is written again") > 0;
                (disk.failed() == 2 && is_well && is_told).then_some(())
            },
        )
        .await;
        world.follows().await;
        world.is_kept().await;

        // From some time on nothing comes to the disk any more, and then the process ends.
        let first = 2 + dice.roll(3);
        let disk = world.nodes[node].failing_syncs("3+", &format!("{first}+"));
        world.nodes[node].kill().await;
        world.nodes[node].restart_on(&disk).await;
        world.injected();
        fails_to_keep(world, node).await;
        for _ in 0..4 {
            change(world, dice).await;
        }
        assert!(!world.is_kept_by(node), "no sync has succeeded since");
        world.nodes[node].kill().await;
        start_alone(world, node, 300).await;
        let taken = "keyring loaded from the snapshot file";
        let process = &mut world.nodes[node].sidecar.process;
        process.wait_for_line(taken).await;
        world.follows().await;
        world.is_kept().await;
    })
    .await;
}

/// Makes keys until the sidecar says that it cannot keep them: the alarm is there, the log has it once, and checks go on.
async fn fails_to_keep(world: &mut World, node: usize) {
    let mut problem = None;
    while problem.is_none() {
        world.issue().await;
        let status = world.nodes[node].status().await;
        problem = status["snapshot"]["problem"].as_str().map(str::to_owned);
    }
    // The newest by now, whatever came to the disk before.
    world.issue().await;
    let problem = problem.unwrap_or_default();
    assert!(problem.contains("Input/output error"), "{problem}");
    let failing = world.nodes[node].metric("relatch_snapshot_failing").await;
    assert_eq!(failing.as_deref(), Some("1"));
    assert!(!world.is_kept_by(node), "the newest key is on no disk");
    assert_eq!(world.nodes[node].health().await, (200, 200));
    eventually("it is logged", async || {
        let logged = world.nodes[node].logged("the snapshot file cannot be written");
        assert!(logged <= 1, "it is logged once");
        (logged == 1).then_some(())
    })
    .await;
}
