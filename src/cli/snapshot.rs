//! `relatch snapshot`: looks at the snapshot file of a sidecar.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, BufReader},
    path::{Path, PathBuf},
};

use clap::{Args, Subcommand};
use serde::Serialize;

use super::{
    Exit, Failure, Session,
    output::{self, View},
    words,
};
use crate::{
    key::{KeyState, KeyringName, Timestamp},
    keyring::Restored,
    snapshot::{
        KeyFileError, ReadError, SnapshotKey,
        pulse::Pulse,
        read::{self, Contents, Outline, Tail},
        seal::{FORMAT, Header},
    },
};

/// What can be done with snapshot files.
#[derive(Debug, Subcommand)]
pub enum SnapshotCommand {
    /// Show what a snapshot file holds, without secrets
    ///
    /// Without its key: whose it is, and when it was made, as it says. With it: its keyrings, after every frame was found to
    /// be as it was written. A sidecar that runs goes on writing to its file.
    Inspect(InspectArgs),
}

/// The arguments of `snapshot inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// The snapshot file
    file: PathBuf,

    /// The file with its key, as the sidecar's `snapshot.key_file` names it
    #[arg(long, value_name = "PATH")]
    key_file: Option<PathBuf>,
}

#[derive(Debug, Serialize)]
struct SnapshotView {
    file: String,
    format: u16,
    node: String,
    cluster: String,
    /// When its sidecar began it.
    written_at: Timestamp,
    bytes: u64,
    frames: u64,
    /// The last write was cut off.
    torn: bool,
    /// Whether it was opened; what follows is null where it was not.
    opened: bool,
    /// Changes that were appended since.
    changes: Option<u64>,
    /// The latest time by which windows were judged.
    latest_wall: Option<Timestamp>,
    keyrings: Option<Vec<KeyringView>>,
}

#[derive(Debug, Serialize)]
struct KeyringView {
    keyring: String,
    epoch: u64,
    revision: u64,
    /// When the control plane last confirmed it, by the sidecar's clock.
    as_of: Option<Timestamp>,
    versions: BTreeMap<&'static str, usize>,
}

impl SnapshotCommand {
    /// Runs the command.
    ///
    /// # Errors
    ///
    /// When the file is not there, or not what it should be.
    pub fn run(self, session: &Session) -> Result<(), Failure> {
        match self {
            Self::Inspect(args) => args.run(session),
        }
    }
}

impl InspectArgs {
    fn run(self, session: &Session) -> Result<(), Failure> {
        let key = self.key_file.as_deref().map(SnapshotKey::read).transpose();
        let key = key.map_err(|error| {
            let exit = match &error {
                KeyFileError::Missing { .. } => Exit::NotFound,
                KeyFileError::Unusable(_)
                | KeyFileError::Malformed { .. }
                | KeyFileError::Exists { .. }
                | KeyFileError::Make { .. }
                | KeyFileError::Random(_) => Exit::Failed,
            };
            Failure::new(exit, error)
        })?;
        let path = &self.file;
        let file = File::open(path).map_err(|error| unreadable(path, error))?;
        let metadata = file.metadata().map_err(|error| unreadable(path, error))?;
        if !metadata.is_file() {
            return Err(Failure::failed(format!(
                "{} is no regular file",
                path.display()
            )));
        }
        let bytes = metadata.len();
        let input = BufReader::new(file);
        let view = match key {
            None => {
                let outline = read::outline(input, bytes).map_err(|error| refused(path, error))?;
                SnapshotView::closed(path, bytes, outline)
            }
            Some(key) => {
                let contents =
                    read::read(input, bytes, &key).map_err(|error| refused(path, error))?;
                SnapshotView::opened(path, bytes, contents)
            }
        };
        session.show(&view)?;
        if !view.opened {
            session.output.note(
                "nothing of this was verified: give --key-file PATH for that, and for the keyrings",
            );
        }
        Ok(())
    }
}

impl SnapshotView {
    fn closed(path: &Path, bytes: u64, outline: Outline) -> Self {
        let Header {
            node,
            cluster,
            written_at,
        } = outline.header;
        Self {
            file: path.display().to_string(),
            format: FORMAT,
            node,
            cluster,
            written_at,
            bytes,
            frames: outline.frames,
            torn: outline.tail == Tail::Torn,
            opened: false,
            changes: None,
            latest_wall: None,
            keyrings: None,
        }
    }

    fn opened(path: &Path, bytes: u64, contents: Contents) -> Self {
        let pulse = &contents.pulse;
        let keyrings = contents.keyrings.iter();
        let keyrings = keyrings.map(|(name, restored)| KeyringView::of(name, restored, pulse));
        let keyrings = keyrings.collect();
        let latest_wall = Some(pulse.latest_wall);
        let outline = Outline {
            header: contents.header,
            frames: contents.frames,
            tail: contents.tail,
        };
        Self {
            opened: true,
            changes: Some(contents.changes),
            latest_wall,
            keyrings: Some(keyrings),
            ..Self::closed(path, bytes, outline)
        }
    }
}

impl KeyringView {
    fn of(name: &KeyringName, restored: &Restored, pulse: &Pulse) -> Self {
        let view = restored.view();
        let states = KeyState::ALL.into_iter();
        Self {
            keyring: name.to_string(),
            epoch: view.epoch().get(),
            revision: view.revision().get(),
            as_of: pulse.confirmed.get(name).map(|confirmed| confirmed.wall),
            versions: states
                .map(|state| (state.as_str(), view.count(state)))
                .collect(),
        }
    }
}

impl View for SnapshotView {
    fn render(&self, now: Timestamp) -> String {
        let torn = if self.torn {
            "torn: the last write was cut off, and is left out"
        } else {
            "whole"
        };
        let mut facts = vec![
            ("FILE", self.file.clone()),
            ("FORMAT", self.format.to_string()),
            ("NODE", self.node.clone()),
            ("CLUSTER", self.cluster.clone()),
            ("MADE", words::time(Some(self.written_at))),
            ("BYTES", self.bytes.to_string()),
            ("FRAMES", self.frames.to_string()),
            ("END", torn.to_owned()),
        ];
        if let Some(changes) = self.changes {
            facts.push(("CHANGES SINCE", changes.to_string()));
        }
        let mut text = output::facts(&facts);
        if let Some(keyrings) = &self.keyrings {
            let rows = keyrings.iter().map(|keyring| keyring.cells(now));
            text.push('\n');
            text.push_str(&output::table(&TITLES, rows));
        }
        text
    }
}

const TITLES: [&str; 9] = [
    "KEYRING", "EPOCH", "REVISION", "AS OF", "PENDING", "ACTIVE", "RETIRING", "RETIRED", "REVOKED",
];

impl KeyringView {
    fn cells(&self, now: Timestamp) -> Vec<String> {
        let as_of = self.as_of.map(|as_of| words::age(as_of, now));
        let mut cells = vec![
            self.keyring.clone(),
            self.epoch.to_string(),
            self.revision.to_string(),
            as_of.unwrap_or_else(|| "never".to_owned()),
        ];
        let states = KeyState::ALL.into_iter();
        cells.extend(states.map(|state| {
            let count = self.versions.get(state.as_str());
            count.copied().unwrap_or_default().to_string()
        }));
        cells
    }
}

fn unreadable(path: &Path, error: io::Error) -> Failure {
    let exit = match error.kind() {
        io::ErrorKind::NotFound => Exit::NotFound,
        _ => Exit::Failed,
    };
    Failure::new(exit, error).context(format!("cannot read {}", path.display()))
}

fn refused(path: &Path, error: ReadError) -> Failure {
    let exit = match &error {
        ReadError::Io(_) => Exit::Failed,
        ReadError::NoSnapshot
        | ReadError::Format { .. }
        | ReadError::Header
        | ReadError::Key
        | ReadError::Altered { .. }
        | ReadError::Cut { .. }
        | ReadError::Contradiction { .. } => Exit::Refused,
    };
    Failure::new(exit, error).context(format!("{} is refused", path.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_shown_as_facts_and_its_keyrings_as_a_table() {
        let at = Timestamp::from_millis(1_000_000_000_000);
        let view = SnapshotView {
            file: "keyring.snap".to_owned(),
            format: 1,
            node: "edge-1".to_owned(),
            cluster: "default".to_owned(),
            written_at: at,
            bytes: 1_234,
            frames: 4,
            torn: true,
            opened: true,
            changes: Some(2),
            latest_wall: Some(at),
            keyrings: Some(vec![KeyringView {
                keyring: "payments".to_owned(),
                epoch: 7,
                revision: 12,
                as_of: None,
                versions: [("active", 3), ("revoked", 1)].into(),
            }]),
        };
        let text = view.render(at);
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[2], "NODE           edge-1");
        assert!(lines[7].starts_with("END            torn"), "{text}");
        assert_eq!(
            lines[10..],
            [
                "KEYRING   EPOCH  REVISION  AS OF  PENDING  ACTIVE  RETIRING  RETIRED  REVOKED",
                "payments  7      12        never  0        3       0         0        1",
            ]
        );
    }

    #[test]
    fn a_file_that_is_refused_ends_with_the_code_that_says_so() {
        let path = Path::new("keyring.snap");
        assert_eq!(refused(path, ReadError::Key).exit(), Exit::Refused);
        assert_eq!(
            unreadable(path, io::ErrorKind::NotFound.into()).exit(),
            Exit::NotFound
        );
        assert_eq!(
            refused(path, ReadError::Io(io::ErrorKind::Other.into())).exit(),
            Exit::Failed
        );
    }
}
