//! What programs leave behind, by the place where it was found.

use std::{
    fs,
    io::ErrorKind,
    path::{Path, PathBuf},
};

use super::search::Canaries;
use crate::support::process::Process;

/// What is searched for secrets.
#[derive(Debug, Default)]
pub(super) struct Leavings {
    places: Vec<(String, Vec<u8>)>,
}

impl Leavings {
    pub(super) fn add(&mut self, place: impl Into<String>, left: impl Into<Vec<u8>>) {
        self.places.push((place.into(), left.into()));
    }

    /// What a process that runs shows to others of the machine. To whoever is not root it shows little, since it has no
    /// core dumps.
    pub(super) fn add_shown(&mut self, name: &str, process: &Process) {
        let proc = PathBuf::from(format!("/proc/{}", process.id()));
        for file in ["cmdline", "environ", "comm", "limits"] {
            match fs::read(proc.join(file)) {
                Ok(read) => self.add(format!("{name}: /proc/PID/{file}"), read),
                Err(error) => assert_eq!(error.kind(), ErrorKind::PermissionDenied, "{file}"),
            }
        }
        let open = fs::read_dir(proc.join("fd"));
        // Paths of files that are open, removed ones too.
        for open in open.into_iter().flatten() {
            // One may be closed between the two looks.
            if let Ok(target) = open.and_then(|open| fs::read_link(open.path())) {
                let target = target.to_string_lossy().into_owned();
                self.add(format!("{name}: /proc/PID/fd"), target);
            }
        }
    }

    /// What a process has printed and logged so far.
    pub(super) fn add_output(&mut self, name: &str, process: &Process) {
        self.add(format!("{name}: output"), process.lines().join("\n"));
    }

    /// Every file below `dir` and its name, but for the files that `is_secret` because a secret is all that they hold.
    pub(super) fn add_files(&mut self, dir: &Path, is_secret: &dyn Fn(&Path) -> bool) {
        for entry in fs::read_dir(dir).expect("the directory is there") {
            let entry = entry.expect("the directory can be read");
            let path = entry.path();
            self.add("the name of a file", path.to_string_lossy().into_owned());
            let kind = entry.file_type().expect("the file is there");
            if kind.is_dir() {
                self.add_files(&path, is_secret);
            } else if kind.is_file() && !is_secret(&path) {
                let left = fs::read(&path).expect("the file can be read");
                self.add(path.to_string_lossy(), left);
            }
        }
    }

    /// Whether a place with `name` in its name holds `text`: what is searched is what it is taken for.
    pub(super) fn has(&self, name: &str, text: &str) -> bool {
        let mut places = self.places.iter().filter(|(place, _)| place.contains(name));
        places.any(|(_, left)| {
            let mut windows = left.windows(text.len());
            windows.any(|window| window == text.as_bytes())
        })
    }

    /// Every finding, with its place.
    pub(super) fn search(&self, canaries: &Canaries) -> Vec<String> {
        let places = self.places.iter();
        places
            .flat_map(|(place, left)| {
                let found = canaries.search(left).into_iter();
                found.map(move |found| {
                    format!(
                        "{place} has {} ({}): {}",
                        found.canary, found.form, found.context
                    )
                })
            })
            .collect()
    }

    /// Bytes in all.
    pub(super) fn len(&self) -> usize {
        self.places.iter().map(|(_, left)| left.len()).sum()
    }
}

#[test]
fn a_secret_is_found_in_a_file_and_in_its_name_and_not_where_it_belongs() {
    let dir = tempfile::tempdir().expect("a directory can be made");
    let below = dir.path().join("below");
    fs::create_dir(&below).expect("the directory is the test's");
    for (name, text) in [
        ("secret.key", "sesame-sesame"),
        ("log", "opened by sesame-sesame"),
        ("named-sesame-sesame", ""),
    ] {
        fs::write(below.join(name), text).expect("the directory is the test's");
    }
    let mut canaries = Canaries::default();
    canaries.add("password", b"sesame-sesame");
    let mut leavings = Leavings::default();
    leavings.add_files(dir.path(), &|path| path.ends_with("secret.key"));
    let found = leavings.search(&canaries);
    assert_eq!(found.len(), 2, "{found:?}");
    assert!(leavings.has("below/log", "opened by"));
    assert!(!leavings.has("below/log", "closed by"));
}
