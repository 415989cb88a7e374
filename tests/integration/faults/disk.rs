//! A disk that cannot sync: `strace` answers in the kernel's place.

use std::{
    fs,
    path::{Path, PathBuf},
};

use crate::support::relatch::text;

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
