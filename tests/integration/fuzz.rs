//! What the fuzzer has collected, against the properties that it tries to break.

use std::{fs, path::Path};

#[path = "../../fuzz/properties/check_request.rs"]
mod check_request;

#[path = "../../fuzz/properties/snapshot_file.rs"]
mod snapshot_file;

/// Replays the corpus of a target.
fn replay(target: &str, property: fn(&[u8])) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("fuzz/corpus")
        .join(target);
    let mut replayed = 0;
    for entry in fs::read_dir(corpus).expect("the target has a corpus") {
        let path = entry.expect("a readable directory").path();
        let bytes = fs::read(&path).expect("a readable file");
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
