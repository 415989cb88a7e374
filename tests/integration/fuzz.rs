//! What the fuzzer has collected, against the properties that it tries to break.

use std::{
    fs,
    path::{Path, PathBuf},
};

use proptest::{collection::vec, prelude::*};

#[path = "../../fuzz/properties/check_request.rs"]
mod check_request;

#[path = "../../fuzz/properties/config.rs"]
mod config;

#[path = "../../fuzz/properties/discovery_down.rs"]
mod discovery_down;

#[path = "../../fuzz/properties/discovery_up.rs"]
mod discovery_up;

#[path = "../../fuzz/properties/input.rs"]
mod input;

#[path = "../../fuzz/properties/snapshot_file.rs"]
mod snapshot_file;

#[path = "../../fuzz/properties/token.rs"]
mod token;

fn directory(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(target)
}

/// The corpus of a target: names and bytes.
fn corpus(target: &str) -> impl Iterator<Item = (PathBuf, Vec<u8>)> {
    let entries = fs::read_dir(directory(target)).expect("the target has a corpus");
    entries.map(|entry| {
        let path = entry.expect("a readable directory").path();
        let bytes = fs::read(&path).expect("a readable file");
        (path, bytes)
    })
}

/// Replays the corpus of a target.
fn replay(target: &str, property: fn(&[u8])) {
    let mut replayed = 0;
    for (path, bytes) in corpus(target) {
        let outcome = std::panic::catch_unwind(|| property(&bytes));
        assert!(outcome.is_ok(), "{} breaks {target}", path.display());
        replayed += 1;
    }
    assert!(replayed > 0, "the corpus of {target} is empty");
}

#[test]
fn the_corpus_of_check_request_holds() {
    replay("check_request", check_request::holds);
}

#[test]
fn the_corpus_of_snapshot_file_holds() {
    replay("snapshot_file", snapshot_file::holds);
}

#[test]
fn the_corpus_of_token_holds() {
    replay("token", token::holds);
}

#[test]
fn the_corpus_of_config_holds() {
    replay("config", config::holds);
}

#[test]
fn the_corpus_of_discovery_down_holds() {
    replay("discovery_down", discovery_down::holds);
}

#[test]
fn the_corpus_of_discovery_up_holds() {
    replay("discovery_up", discovery_up::holds);
}

proptest! {
    /// The fuzzer's way in small: what lies behind the seal is damaged, too.
    #[test]
    fn a_damaged_snapshot_file_breaks_nothing(
        damage in vec((any::<prop::sample::Index>(), any::<u8>()), 1..8),
        cut in proptest::option::of(any::<prop::sample::Index>()),
    ) {
        // Those that are whole; what the fuzzer has found is damaged already.
        for name in ["file", "plaintexts"] {
            let mut bytes = fs::read(directory("snapshot_file").join(name)).expect("a readable file");
            for (at, byte) in &damage {
                let at = 1 + at.index(bytes.len() - 1);
                bytes[at] = *byte;
            }
            if let Some(cut) = cut {
                bytes.truncate(1 + cut.index(bytes.len()));
            }
            snapshot_file::holds(&bytes);
        }
    }
}
