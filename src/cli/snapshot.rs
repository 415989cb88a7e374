//! `relatch snapshot`: shows the content of the snapshot file of a sidecar.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, BufReader},
    path::{Path, PathBuf},
    time::Duration,
};

use clap::{Args, Subcommand};
use serde::Serialize;

use super::{
    Console, Exit, Failure,
    output::{self, View},
    words,
};
use crate::{
    clock::{BootClock, Clock},
    duration::written,
    key::{KeyState, KeyringName, Timestamp},
    keyring::Restored,
    snapshot::{
        KeyFileError, ReadError, SnapshotKey,
        origin::Inode,
        pulse::Pulse,
        read::{self, Contents, Outline, Tail},
        seal::{FORMAT, Header},
    },
};

/// The commands of `snapshot`.
#[derive(Debug, Subcommand)]
pub enum SnapshotCommand {
    /// Show the content of a snapshot file, without secrets
    ///
    /// Without its key, the command shows what the header of the file says, such as its sidecar and its creation time,
    /// and verifies nothing. With its key, the command verifies every frame and also shows the keyrings. A running
    /// sidecar continues to write to its file.
    Inspect(InspectArgs),
}

/// The arguments of `snapshot inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// Snapshot file
    file: PathBuf,

    /// File with its key: `snapshot.key_file` in the sidecar's configuration [default: show only the header]
    #[arg(long, value_name = "PATH")]
    key_file: Option<PathBuf>,
}

#[derive(Debug, Serialize)]
struct SnapshotView {
    file: String,
    format: u16,
    node: String,
    cluster: String,
    /// The time at which its sidecar created it.
    written_at: Timestamp,
    /// The id of the file, the same over all rewrites and runs.
    id: String,
    /// The boot of the machine in which it was created; null if the system did not report it.
    boot_id: Option<String>,
    /// Whether it was created in this boot, and was not copied. Only then does a sidecar know its age before the control plane
    /// answers.
    age_known: bool,
    bytes: u64,
    frames: u64,
    /// Whether the last write is incomplete.
    torn: bool,
    /// Whether it was opened with its key; if not, the following fields are null.
    opened: bool,
    /// The number of its last write, over all rewrites and runs.
    write: Option<u64>,
    /// The number of changes that were appended since then.
    changes: Option<u64>,
    /// The latest time at which validity was judged.
    latest_wall: Option<Timestamp>,
    keyrings: Option<Vec<KeyringView>>,
}

#[derive(Debug, Serialize)]
struct KeyringView {
    keyring: String,
    epoch: u64,
    revision: u64,
    /// The time of the last confirmation by the control plane, by the clock of the sidecar.
    as_of: Option<Timestamp>,
    /// How long a sidecar may serve it after that without another confirmation.
    serve_for_ms: Option<u64>,
    versions: BTreeMap<&'static str, usize>,
}

impl SnapshotCommand {
    /// Runs the command.
    ///
    /// # Errors
    ///
    /// When the file does not exist, or is not a valid snapshot file.
    pub fn run(self, console: &Console) -> Result<(), Failure> {
        match self {
            Self::Inspect(args) => args.run(console),
        }
    }
}

impl InspectArgs {
    fn run(self, console: &Console) -> Result<(), Failure> {
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
                "{} is not a regular file",
                path.display()
            )));
        }
        let bytes = metadata.len();
        let found = Found {
            path,
            bytes,
            inode: Inode::of(&metadata),
            boot_clock: Clock::system().boot_clock(),
        };
        let input = BufReader::new(file);
        let view = match key {
            None => {
                let outline = read::outline(input, bytes).map_err(|error| refused(path, error))?;
                SnapshotView::closed(&found, outline)
            }
            Some(key) => {
                let contents =
                    read::read(input, bytes, &key).map_err(|error| refused(path, error))?;
                SnapshotView::opened(&found, contents)
            }
        };
        console.show(&view)?;
        if !view.opened {
            console.output.note(
                "nothing here is verified: use --key-file PATH to verify the file and to show its keyrings",
            );
        }
        Ok(())
    }
}

/// A file to inspect, and the clock for its age.
struct Found<'a> {
    path: &'a Path,
    bytes: u64,
    inode: Inode,
    boot_clock: Option<BootClock>,
}

impl SnapshotView {
    fn closed(found: &Found<'_>, outline: Outline) -> Self {
        let Header {
            node,
            cluster,
            written_at,
            origin,
        } = outline.header;
        Self {
            file: found.path.display().to_string(),
            format: FORMAT,
            id: origin.id.to_string(),
            age_known: origin.is_here(found.inode, found.boot_clock.as_ref()),
            boot_id: origin.boot_clock.map(|clock| clock.boot_id.to_string()),
            node,
            cluster,
            written_at,
            bytes: found.bytes,
            frames: outline.frames,
            torn: outline.tail == Tail::Torn,
            opened: false,
            write: None,
            changes: None,
            latest_wall: None,
            keyrings: None,
        }
    }

    fn opened(found: &Found<'_>, contents: Contents) -> Self {
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
            write: Some(contents.write),
            changes: Some(contents.changes),
            latest_wall,
            keyrings: Some(keyrings),
            ..Self::closed(found, outline)
        }
    }
}

impl KeyringView {
    fn of(name: &KeyringName, restored: &Restored, pulse: &Pulse) -> Self {
        let view = restored.view();
        let states = KeyState::ALL.into_iter();
        let confirmed = pulse.confirmed.get(name);
        Self {
            keyring: name.to_string(),
            epoch: view.epoch().get(),
            revision: view.revision().get(),
            as_of: confirmed.map(|confirmed| confirmed.wall),
            serve_for_ms: confirmed.map(|confirmed| {
                u64::try_from(confirmed.serve_for.as_millis()).unwrap_or(u64::MAX)
            }),
            versions: states
                .map(|state| (state.as_str(), view.count(state)))
                .collect(),
        }
    }
}

impl View for SnapshotView {
    fn render(&self, now: Timestamp) -> String {
        let torn = if self.torn {
            "torn: the last write is incomplete and was skipped"
        } else {
            "complete"
        };
        let age = if self.age_known {
            "known: created since the last boot, and not copied"
        } else {
            "unknown: copied or rebooted; waits for the control plane"
        };
        let mut facts = vec![
            ("FILE", self.file.clone()),
            ("FORMAT", self.format.to_string()),
            ("NODE", self.node.clone()),
            ("CLUSTER", self.cluster.clone()),
            ("CREATED", words::time(Some(self.written_at))),
            ("ID", self.id.clone()),
            (
                "BOOT",
                self.boot_id.clone().unwrap_or_else(|| "unknown".to_owned()),
            ),
            ("AGE", age.to_owned()),
            ("BYTES", self.bytes.to_string()),
            ("FRAMES", self.frames.to_string()),
            ("END", torn.to_owned()),
        ];
        if let Some(write) = self.write {
            facts.push(("LAST WRITE", write.to_string()));
        }
        if let Some(changes) = self.changes {
            facts.push(("CHANGES SINCE", changes.to_string()));
        }
        let mut text = output::facts(&facts);
        if let Some(keyrings) = &self.keyrings {
            // There are two tables, because one would be wider than a terminal.
            let served = keyrings.iter().map(|keyring| keyring.served(now));
            text.push('\n');
            text.push_str(&output::table(&SERVED, served));
            let versions = keyrings.iter().map(KeyringView::versions);
            text.push('\n');
            text.push_str(&output::table(&VERSIONS, versions));
        }
        text
    }
}

const SERVED: [&str; 5] = ["KEYRING", "EPOCH", "REVISION", "CONFIRMED", "SERVES FOR"];
const VERSIONS: [&str; 6] = [
    "KEYRING", "PENDING", "ACTIVE", "RETIRING", "RETIRED", "REVOKED",
];

impl KeyringView {
    /// The revision and age of each keyring, and how long it may be served.
    fn served(&self, now: Timestamp) -> Vec<String> {
        let confirmed = self.as_of.map(|as_of| words::distance(as_of, now));
        let serve_for = Duration::from_millis(self.serve_for_ms.unwrap_or(0));
        vec![
            self.keyring.clone(),
            self.epoch.to_string(),
            self.revision.to_string(),
            confirmed.unwrap_or_else(|| "never".to_owned()),
            written(serve_for).to_string(),
        ]
    }

    /// The number of versions of each keyring by state.
    fn versions(&self) -> Vec<String> {
        let mut cells = vec![self.keyring.clone()];
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
    Failure::new(exit, error).context(format!("cannot load {}", path.display()))
}

#[cfg(test)]
mod tests {
    use super::{super::output::tests::fits, *};

    #[test]
    fn a_file_is_shown_as_facts_and_its_keyrings_as_a_table() {
        let at = Timestamp::from_millis(1_000_000_000_000);
        let view = SnapshotView {
            file: "keyring.snap".to_owned(),
            format: 1,
            node: "edge-1".to_owned(),
            cluster: "default".to_owned(),
            written_at: at,
            id: "00112233445566778899aabbccddeeff".to_owned(),
            boot_id: None,
            age_known: false,
            bytes: 1_234,
            frames: 4,
            torn: true,
            opened: true,
            write: Some(17),
            changes: Some(2),
            latest_wall: Some(at),
            keyrings: Some(vec![KeyringView {
                keyring: "payments".to_owned(),
                epoch: 7,
                revision: 12,
                as_of: Some(at),
                serve_for_ms: Some(3_600_000),
                versions: [("active", 3), ("revoked", 1)].into(),
            }]),
        };
        let text = fits(view.render(at));
        let lines: Vec<_> = text.lines().collect();
        assert_eq!(lines[2], "NODE           edge-1");
        assert!(lines[7].starts_with("AGE            unknown"), "{text}");
        assert!(lines[10].starts_with("END            torn"), "{text}");
        assert_eq!(lines[11], "LAST WRITE     17");
        assert_eq!(
            lines[14..],
            [
                "KEYRING   EPOCH  REVISION  CONFIRMED  SERVES FOR",
                "payments  7      12        0s ago     1h",
                "",
                "KEYRING   PENDING  ACTIVE  RETIRING  RETIRED  REVOKED",
                "payments  0        3       0         0        1",
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
