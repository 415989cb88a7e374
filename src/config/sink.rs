//! Where the control plane's file says that secrets of scheduled rotations are delivered.
//!
//! Sinks stand in the file alone: whoever may declare one chooses a program that the control plane runs, which no admin
//! token may do.

use std::{
    path::{Component, Path, PathBuf},
    time::Duration,
};

use serde::Deserialize;
use serde_saphyr::{Location, Spanned};

use super::{
    reader::{Findings, Text},
    vault::{RawVault, VaultSettings},
};
use crate::key::SinkName;

/// A place to which secrets of scheduled rotations can be delivered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SinkSettings {
    /// What a policy calls it.
    pub name: SinkName,
    /// What it is.
    pub target: SinkTarget,
}

/// What a sink is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SinkTarget {
    /// Files in a directory.
    File(FileSettings),
    /// A program that is handed the secret.
    Exec(ExecSettings),
    /// A KV version 2 mount of Vault or OpenBao.
    Vault(VaultSettings),
}

/// Files in a directory: `<directory>/<keyring>/<key id>/current` and `previous`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileSettings {
    /// An absolute path without `..`.
    pub(crate) directory: PathBuf,
}

/// A program that is handed the secret on its standard input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecSettings {
    /// Its absolute path.
    pub(crate) program: PathBuf,
    /// What it is called with, without its name.
    pub(crate) arguments: Vec<String>,
    /// How long it may run, 1 second to 10 minutes. Default: 30 seconds.
    pub(crate) timeout: Duration,
}

/// The sinks as they stand in the file.
pub(super) type RawSinks = Spanned<Vec<Spanned<RawSink>>>;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawSink {
    name: Option<Text>,
    file: Option<RawFile>,
    exec: Option<RawExec>,
    vault: Option<RawVault>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawFile {
    directory: Option<Text>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RawExec {
    command: Option<Spanned<Vec<Text>>>,
    timeout: Option<Text>,
}

/// One for each team of a large company; each costs a client of its own.
const MAX_SINKS: usize = 64;
/// More than a program that delivers one secret has arguments.
const MAX_ARGUMENTS: usize = 64;
/// How long a command may run when the file does not say: a call to a busy cluster takes seconds.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);
/// Below, starting an interpreter can take too long; above, the new version waits pending for one place.
const TIMEOUT_BOUNDS: (Duration, Duration) = (Duration::from_secs(1), Duration::from_mins(10));
/// The sinks of the file; what is wrong with them is noted.
pub(super) fn from_raw(raw: RawSinks, found: &mut Findings) -> Vec<SinkSettings> {
    found.bound("sinks", &raw, MAX_SINKS);
    let mut sinks: Vec<SinkSettings> = Vec::new();
    for (at, raw) in raw.value.into_iter().enumerate().take(MAX_SINKS) {
        let field = |name: &str| format!("sinks[{at}].{name}");
        let place = raw.referenced;
        let raw = raw.value;
        if raw.name.is_none() {
            found.note(
                place,
                field("name"),
                "is missing, a policy refers to the sink by it",
            );
        }
        let name: Option<SinkName> = found.parse(field("name"), raw.name.as_ref(), str::parse);
        let target = match (raw.file, raw.exec, raw.vault) {
            (Some(file), None, None) => file.into_settings(at, place, found).map(SinkTarget::File),
            (None, Some(exec), None) => exec.into_settings(at, place, found).map(SinkTarget::Exec),
            (None, None, Some(vault)) => {
                vault.into_settings(at, place, found).map(SinkTarget::Vault)
            }
            (None, None, None)
            | (Some(_), Some(_), _)
            | (_, Some(_), Some(_))
            | (Some(_), _, Some(_)) => {
                found.note(
                    place,
                    format_args!("sinks[{at}]"),
                    "use exactly one of file, exec and vault",
                );
                None
            }
        };
        let (Some(name), Some(target)) = (name, target) else {
            continue;
        };
        if sinks.iter().any(|other| other.name == name) {
            let place = raw.name.map_or(place, |text| text.referenced);
            found.note(
                place,
                field("name"),
                "is the name of another sink too, use another one",
            );
        }
        sinks.push(SinkSettings { name, target });
    }
    sinks
}

impl RawFile {
    fn into_settings(
        self,
        at: usize,
        place: Location,
        found: &mut Findings,
    ) -> Option<FileSettings> {
        let field = format!("sinks[{at}].file.directory");
        let directory = found.required(place, &field, self.directory.as_ref(), absolute)?;
        Some(FileSettings { directory })
    }
}

impl RawExec {
    fn into_settings(
        self,
        at: usize,
        place: Location,
        found: &mut Findings,
    ) -> Option<ExecSettings> {
        let field = format!("sinks[{at}].exec.command");
        let timeout = match &self.timeout {
            Some(text) => found.duration(
                format_args!("sinks[{at}].exec.timeout"),
                Some(text),
                TIMEOUT_BOUNDS,
            ),
            None => Some(DEFAULT_TIMEOUT),
        };
        let Some(command) = self.command else {
            found.missing(place, &field);
            return None;
        };
        found.bound(&field, &command, MAX_ARGUMENTS);
        let Some((program, arguments)) = command.value.split_first() else {
            found.note(
                command.referenced,
                &field,
                "is empty, begin with the path of a program",
            );
            return None;
        };
        let program = found.parse(format_args!("{field}[0]"), Some(program), absolute);
        let read: Vec<String> = arguments
            .iter()
            .take(MAX_ARGUMENTS)
            .enumerate()
            .filter_map(|(at, text)| {
                let field = format!("{field}[{}]", at + 1);
                found.parse(field, Some(text), argument)
            })
            .collect();
        Some(ExecSettings {
            program: program?,
            arguments: (read.len() == arguments.len()).then_some(read)?,
            timeout: timeout?,
        })
    }
}

fn absolute(text: &str) -> Result<PathBuf, &'static str> {
    let path = Path::new(text);
    let climbs = path
        .components()
        .any(|component| component == Component::ParentDir);
    if path.is_absolute() && !climbs && !text.contains('\0') {
        Ok(path.to_owned())
    } else {
        Err("use an absolute path without `..`")
    }
}

fn argument(text: &str) -> Result<String, &'static str> {
    /// Far below what the system takes in all (`ARG_MAX`), far above what a name or a flag needs.
    const MAX_ARGUMENT: usize = 4 << 10;
    if text.len() <= MAX_ARGUMENT && !text.contains('\0') {
        Ok(text.to_owned())
    } else {
        Err("use at most 4096 bytes without a zero byte")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::control;

    fn sinks(yaml: &str) -> Result<Vec<SinkSettings>, String> {
        control::parse(&format!("data_dir: d\n{yaml}"), "control.yaml")
            .map(|settings| settings.sinks)
            .map_err(|error| error.to_string())
    }

    fn one(yaml: &str) -> Result<Vec<SinkSettings>, String> {
        sinks(&format!("sinks:\n  - {{ name: s, {yaml} }}\n"))
    }

    #[test]
    fn each_kind_is_read() {
        let read = sinks(
            "sinks:\n\
             - { name: files, file: { directory: /run/keys } }\n\
             - { name: hook, exec: { command: [/bin/deliver, --json, \"\"], timeout: 5s } }\n\
             - { name: least, exec: { command: [/bin/deliver] } }\n\
             - name: vault\n  \
               vault: { address: \"https://v:8200\", mount: team/kv, path: \"a-{consumer}/{key_id}\", token_file: t, \
                        namespace: team-a, ca_file: ca.pem }\n\
             - { name: bao, vault: { address: \"http://127.0.0.1:8200\", token_file: t } }\n",
        )
        .expect("right sinks");
        let targets: Vec<SinkTarget> = read.iter().map(|sink| sink.target.clone()).collect();
        let vault = |address: &str, mount: &str, path: &str, namespace: Option<&str>| {
            SinkTarget::Vault(VaultSettings {
                address: address.parse().expect("an address"),
                mount: mount.parse().expect("a mount"),
                path: path.parse().expect("a path"),
                token_file: "t".into(),
                namespace: namespace.map(|text| text.parse().expect("a namespace")),
                ca_file: namespace.map(|_| "ca.pem".into()),
            })
        };
        let exec = |arguments: &[&str], seconds| {
            SinkTarget::Exec(ExecSettings {
                program: "/bin/deliver".into(),
                arguments: arguments.iter().map(|&text| text.to_owned()).collect(),
                timeout: Duration::from_secs(seconds),
            })
        };
        let expected = [
            SinkTarget::File(FileSettings {
                directory: "/run/keys".into(),
            }),
            exec(&["--json", ""], 5),
            exec(&[], 30),
            vault(
                "https://v:8200",
                "team/kv",
                "a-{consumer}/{key_id}",
                Some("team-a"),
            ),
            vault(
                "http://127.0.0.1:8200",
                "secret",
                "relatch/{keyring}/{key_id}",
                None,
            ),
        ];
        assert_eq!(targets, expected);
        let names: Vec<&str> = read.iter().map(|sink| sink.name.as_str()).collect();
        assert_eq!(names, ["files", "hook", "least", "vault", "bao"]);
    }

    #[test]
    fn each_bad_value_is_named_with_its_place() {
        const ABSOLUTE: &str = "use an absolute path without `..`";
        const PATH: &str = "use segments of A-Z, a-z, 0-9 and . _ - with '/' between them, and in them {keyring}, \
                            {consumer} and {key_id}";
        for (yaml, expected) in [
            ("file: { directory: run }", format!("3:35: sinks[0].file.directory: {ABSOLUTE}")),
            ("file: { directory: /run/../etc }", format!("3:35: sinks[0].file.directory: {ABSOLUTE}")),
            ("file: {}", "3:5: sinks[0].file.directory: is missing".into()),
            ("files: {}", "3:16: sinks[0].files: is not a known field, did you mean `file`?".into()),
            ("exec: { command: [] }", "3:33: sinks[0].exec.command: is empty, begin with the path of a program".into()),
            ("exec: { command: [sh] }", format!("3:34: sinks[0].exec.command[0]: {ABSOLUTE}")),
            ("exec: { timeout: 5s }", "3:5: sinks[0].exec.command: is missing".into()),
            (
                "exec: { command: [/a], timeout: 11m }",
                "3:48: sinks[0].exec.timeout: use a duration from 1s to 10m, such as \"30s\"".into(),
            ),
            (
                "exec: { command: [/a, \"\\0\"] }",
                "3:38: sinks[0].exec.command[1]: use at most 4096 bytes without a zero byte".into(),
            ),
            ("kafka: a", "3:16: sinks[0].kafka: is not a known field, use one of `name`, `file`, `exec`, `vault`".into()),
        ] {
            assert_eq!(one(yaml), Err(format!("control.yaml:{expected}")), "{yaml}");
        }
        for (field, expected) in [
            (
                "address: \"http://vault:8200\"",
                "sinks[0].vault.address: secrets go there: use https://, or http:// with 127.0.0.1, [::1] or localhost",
            ),
            (
                "address: \"https://u:p@vault:8200\"",
                "sinks[0].vault.address: use https://host:port, such as https://vault.internal:8200",
            ),
            (
                "mount: a//b",
                "sinks[0].vault.mount: use segments of A-Z, a-z, 0-9 and . _ - with '/' between them, such as \
                 team-a/secret",
            ),
            (
                "path: \"{key_id}/{owner}\"",
                &format!("sinks[0].vault.path: {PATH}"),
            ),
            (
                "path: \"../{key_id}\"",
                &format!("sinks[0].vault.path: {PATH}"),
            ),
            (
                "path: \"/{key_id}\"",
                &format!("sinks[0].vault.path: {PATH}"),
            ),
            (
                "path: \"a b/{key_id}\"",
                &format!("sinks[0].vault.path: {PATH}"),
            ),
            ("path: \"{key_id\"", &format!("sinks[0].vault.path: {PATH}")),
            (
                "path: \"{keyring}/{consumer}\"",
                "sinks[0].vault.path: put {key_id} into it: two keys must not share a place",
            ),
        ] {
            let address = if field.starts_with("address") {
                ""
            } else {
                "address: \"https://v:8200\", "
            };
            let error = one(&format!("vault: {{ {address}token_file: t, {field} }}"))
                .expect_err("something is wrong with it");
            assert!(error.ends_with(expected), "{field}: {error}");
        }
    }

    #[test]
    fn a_sink_is_one_thing_with_a_name_of_its_own() {
        const ONE_OF: &str = "control.yaml:3:5: sinks[0]: use exactly one of file, exec and vault";
        assert_eq!(sinks("sinks:\n  - { name: s }\n"), Err(ONE_OF.to_owned()));
        assert_eq!(
            one("file: { directory: /a }, exec: { command: [/a] }"),
            Err(ONE_OF.to_owned())
        );
        assert_eq!(
            sinks("sinks:\n  - { file: { directory: /a } }\n"),
            Err(
                "control.yaml:3:5: sinks[0].name: is missing, a policy refers to the sink by it"
                    .to_owned()
            )
        );
        assert_eq!(
            sinks("sinks:\n  - { name: s, file: { directory: /a } }\n  - { name: s, file: { directory: /b } }\n"),
            Err(
                "control.yaml:4:13: sinks[1].name: is the name of another sink too, use another one"
                    .to_owned()
            )
        );
    }
}
