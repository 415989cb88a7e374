//! The names that pages give to things: commands, flags, files and metrics. Each exists.

use std::{
    collections::BTreeSet,
    fs,
    path::{Path, PathBuf},
};

use clap::{Command, CommandFactory as _};
use relatch::cli::Cli;

/// A page for people.
struct Page {
    /// Below the repository.
    place: PathBuf,
    text: String,
}

impl Page {
    /// Every page of the repository.
    fn all() -> Vec<Self> {
        let mut pages: Vec<_> = ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"]
            .map(|place| root().join(place))
            .into();
        pages.extend(files(&root().join("docs"), "md"));
        let pages = pages.into_iter().map(|file| Self {
            place: below_root(&file),
            text: fs::read_to_string(&file).expect("a page is readable"),
        });
        pages.collect()
    }

    /// The words in backquotes, outside of blocks.
    fn quoted(&self) -> Vec<&str> {
        let prose = self.text.split("```").step_by(2);
        prose
            .flat_map(|prose| prose.split('`').skip(1).step_by(2))
            .collect()
    }

    /// The command lines of its blocks for a shell, and those in backquotes.
    fn commands(&self) -> Vec<String> {
        let blocks = self.text.split("```").skip(1).step_by(2);
        let blocks = blocks.filter_map(|block| block.strip_prefix("sh\n"));
        let lines = blocks.map(|block| block.replace("\\\n", " "));
        let lines: Vec<_> = lines.flat_map(|block| owned(block.lines())).collect();
        lines.into_iter().chain(owned(self.quoted())).collect()
    }
}

fn owned<'a>(texts: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    texts.into_iter().map(str::to_owned).collect()
}

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

fn below_root(file: &Path) -> PathBuf {
    let below = file.strip_prefix(root()).expect("it is in the repository");
    below.to_owned()
}

/// The files below a directory with an ending.
fn files(directory: &Path, ending: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut places = vec![directory.to_owned()];
    while let Some(place) = places.pop() {
        if place.is_dir() {
            let entries = fs::read_dir(&place).expect("a readable directory");
            places.extend(entries.map(|entry| entry.expect("a readable entry").path()));
        } else if place.extension().is_some_and(|is| is == ending) {
            found.push(place);
        }
    }
    found
}

/// The calls of `relatch` in a command line, each as its words.
fn calls(line: &str) -> Vec<Vec<&str>> {
    let separators = ['|', ';', '&', '(', ')', '<', '>', '#'];
    let parts = line.split(separators).map(str::trim);
    let calls = parts.filter_map(|part| {
        let mut words = part.split_whitespace().skip_while(|word| *word == "$");
        let program = Path::new(words.next()?).file_name()?;
        (program == "relatch").then(|| words.collect())
    });
    calls.collect()
}

/// Whether a flag is one of a command, or of a command above it.
fn has_flag(command: &Command, flag: &str) -> bool {
    let long = flag.trim_start_matches('-');
    let mut own = command.get_arguments();
    ["help", "version"].contains(&long) || own.any(|arg| arg.get_long() == Some(long))
}

/// What is wrong with a call of `relatch`: its flags have to be those of its command.
fn problem_of_call(words: &[&str]) -> Option<String> {
    let mut command = Cli::command();
    command.build();
    let mut command = &command;
    let mut words = words.iter().peekable();
    while let Some(next) = words.peek() {
        let Some(below) = command.find_subcommand(next) else {
            break;
        };
        command = below;
        words.next();
    }
    let name = command.get_name();
    if let Some(word) = words.peek()
        && command.has_subcommands()
        && word.bytes().all(|byte| byte.is_ascii_lowercase())
    {
        return Some(format!("{name} has no command {word}"));
    }
    let flags = words
        .map(|word| word.split('=').next().unwrap_or(word))
        .filter(|word| is_flag(word));
    let mut unknown = flags.filter(|flag| !has_flag(command, flag));
    unknown.next().map(|flag| format!("{name} has no {flag}"))
}

fn is_flag(word: &str) -> bool {
    let name = word.strip_prefix("--").unwrap_or_default();
    !name.is_empty()
        && name
            .bytes()
            .all(|byte| byte.is_ascii_lowercase() || byte == b'-')
}

/// The long flags of a command and of all below it.
fn all_flags(command: &Command, found: &mut BTreeSet<String>) {
    let flags = command.get_arguments().filter_map(|arg| arg.get_long());
    found.extend(flags.map(|flag| format!("--{flag}")));
    for below in command.get_subcommands() {
        all_flags(below, found);
    }
}

/// Whether a program of the repository other than relatch has a flag: a script, a bench, or the faults.
fn is_flag_of_a_script(flag: &str) -> bool {
    let field = flag.trim_start_matches('-').replace('-', "_");
    let shell = files(&root().join("scripts"), "sh");
    let rust = files(&root().join("benches"), "rs");
    let read = |file: &PathBuf| fs::read_to_string(file).expect("a readable file");
    let is_end = |c: char| !(c.is_ascii_alphanumeric() || c == '-');
    let names = |text: String| {
        text.match_indices(flag)
            .any(|(at, _)| text[at + flag.len()..].starts_with(is_end))
    };
    shell.iter().map(read).any(names)
        || rust
            .iter()
            .map(read)
            .any(|text| text.contains(&format!("\n    {field}: ")))
}

#[test]
fn every_call_of_relatch_on_a_page_is_one_that_it_accepts() {
    let mut seen = 0;
    for page in Page::all() {
        for line in page.commands() {
            for words in calls(&line) {
                let problem = problem_of_call(&words);
                let place = page.place.display();
                assert_eq!(problem, None, "{place}: {line}");
                seen += 1;
            }
        }
    }
    assert!(seen > 100, "only {seen} calls were found");
}

#[test]
fn every_flag_that_a_page_names_exists() {
    let mut command = Cli::command();
    command.build();
    let mut known = BTreeSet::new();
    all_flags(&command, &mut known);
    for page in Page::all() {
        for quoted in page.quoted() {
            let word = quoted.split([' ', '=']).next().unwrap_or_default();
            let is_there = !is_flag(word) || known.contains(word) || is_flag_of_a_script(word);
            assert!(is_there, "{}: there is no {word}", page.place.display());
        }
    }
}

#[test]
fn every_file_that_a_page_names_exists() {
    let mut seen = 0;
    for page in Page::all() {
        let directory = root().join(&page.place);
        let directory = directory.parent().expect("a page is in a directory");
        for link in page.text.split("](").skip(1) {
            let target = link.split([')', '#']).next().unwrap_or_default();
            if target.is_empty() || target.contains("://") {
                continue;
            }
            let is_there = directory.join(target).exists();
            assert!(is_there, "{}: there is no {target}", page.place.display());
            seen += 1;
        }
        for quoted in page.quoted() {
            let of_repository = [
                "src/", "tests/", "docs/", "deploy/", "scripts/", "benches/", "fuzz/", "proto/",
            ];
            let word = quoted
                .trim_start_matches("./")
                .split(' ')
                .next()
                .unwrap_or_default();
            if !of_repository.iter().any(|start| word.starts_with(start))
                || word.contains(['*', '{'])
            {
                continue;
            }
            let is_there = root().join(word).exists();
            assert!(is_there, "{}: there is no {word}", page.place.display());
            seen += 1;
        }
    }
    assert!(seen > 100, "only {seen} files were named");
}

#[test]
fn every_metric_that_a_page_or_a_sample_names_exists() {
    let sources = files(&root().join("src"), "rs");
    let sources = sources
        .iter()
        .map(|file| fs::read_to_string(file).expect("a readable file"));
    let sources: Vec<_> = sources
        .filter(|text| text.contains("prometheus_client"))
        .collect();
    let is_registered = |name: &str| {
        let names = [format!("\"{name}\""), format!("\"relatch_{name}\"")];
        let has = |text: &String| names.iter().any(|name| text.contains(name));
        sources.iter().any(has)
    };
    let samples = ["yaml", "json", "md"].map(|ending| files(&root().join("deploy"), ending));
    let samples = samples.concat().into_iter().map(|file| Page {
        text: fs::read_to_string(&file).expect("a readable file"),
        place: below_root(&file),
    });
    let mut seen = BTreeSet::new();
    for page in Page::all().into_iter().chain(samples) {
        let words = page
            .text
            .split(|c: char| !(c.is_ascii_alphanumeric() || c == '_'));
        for name in words.filter_map(|word| word.strip_prefix("relatch_")) {
            // What the format of Prometheus appends: the kind, and then the unit.
            let kinds = ["_total", "_bucket", "_sum", "_count", "_created", ""];
            let units = ["_seconds", "_bytes", "_ratio", ""];
            let bare = kinds.iter().filter_map(|kind| name.strip_suffix(kind));
            let mut bare =
                bare.flat_map(|name| units.iter().filter_map(|unit| name.strip_suffix(unit)));
            let is_there = bare.any(&is_registered);
            assert!(
                is_there,
                "{}: there is no relatch_{name}",
                page.place.display()
            );
            seen.insert(name.to_owned());
        }
    }
    assert!(seen.len() > 30, "only {seen:?} were found");
}
