//! The settings of the allocator, which are built into the program.

use std::process::Command;

use crate::support::process::{RELATCH, run};

/// A process that stands beside every pod must not hold memory that it does not use.
#[tokio::test]
async fn memory_is_committed_as_it_is_needed() {
    let mut version = Command::new(RELATCH);
    version.arg("--version").env("MIMALLOC_VERBOSE", "1");
    let output = run(&mut version, "").await;
    let setting = "option 'arena_eager_commit': 0";
    assert!(
        output.stderr.contains(setting),
        "the build has not read .cargo/config.toml: build in the directory of the project\n{}",
        output.stderr
    );
}
