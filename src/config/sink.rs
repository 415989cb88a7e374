//! The sinks in the configuration file of a control plane, for the secrets of scheduled rotations.
//!
//! Only the file can declare a sink: a sink can be a program that the control plane runs, and no admin token may choose
//! one.

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

/// The settings of a sink for the secrets of scheduled rotations.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SinkSettings {
    /// The name that policies use.
    pub name: SinkName,
    /// The kind of sink, with its settings.
    pub target: SinkTarget,
}

/// The kinds of sink.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum SinkTarget {
    /// Files in a directory.
    File(FileSettings),
    /// A program that receives the secret.
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

/// A program that receives the secret on its standard input.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExecSettings {
    /// The absolute path of the program.
    pub(crate) program: PathBuf,
    /// The arguments, without the name of the program.
    pub(crate) arguments: Vec<String>,
    /// The longest time of one run, 1 second to 10 minutes. Default: 30 seconds.
    pub(crate) timeout: Duration,
}

/// The sinks as the file gives them.
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

/// The most sinks: one for each team of a large company. Each has a client of its own.
const MAX_SINKS: usize = 64;
/// The most arguments: a program that delivers one secret has fewer.
const MAX_ARGUMENTS: usize = 64;
/// The default limit of a run: a call to a busy cluster takes seconds.
const DEFAULT_TIMEOUT: Duration = Duration::from_secs(30);
/// Below 1 second, the start of an interpreter can take too long. Above 10 minutes, a new version stays pending for too long
/// because of one sink.
const TIMEOUT_BOUNDS: (Duration, Duration) = (Duration::from_secs(1), Duration::from_mins(10));

/// The valid sinks of the file; problems are noted.
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
                "is missing, name the sink: policies refer to it by this name",
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
        let directory = self.directory.as_ref();
        let directory = found.required(place, &field, "name a directory", directory, absolute)?;
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
            found.missing(place, &field, "name a program and its arguments");
            return None;
        };
        found.bound(&field, &command, MAX_ARGUMENTS);
        let Some((program, arguments)) = command.value.split_first() else {
            found.note(
                command.referenced,
                &field,
                "is empty, name a program and its arguments, such as [/usr/local/bin/deliver]",
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
    /// The longest argument in bytes: far below the limit of the system (`ARG_MAX`), far above the need of a name or a flag.
    const MAX_ARGUMENT: usize = 4 << 10;
    if text.len() <= MAX_ARGUMENT && !text.contains('\0') {
        Ok(text.to_owned())
    } else {
        Err("use at most 4,096 bytes, without a zero byte")
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
        const PATH: &str = "use segments of A-Z, a-z, 0-9, . _ - and the placeholders {keyring}, {consumer} \
                            and {key_id}, with '/' between them";
        for (yaml, expected) in [
            ("file: { directory: run }", format!("3:35: sinks[0].file.directory: {ABSOLUTE}")),
            ("file: { directory: /run/../etc }", format!("3:35: sinks[0].file.directory: {ABSOLUTE}")),
            ("file: {}", "3:5: sinks[0].file.directory: is missing, name a directory".into()),
            ("files: {}", "3:16: sinks[0].files: is not a known field, did you mean `file`?".into()),
            ("exec: { command: [] }", "3:33: sinks[0].exec.command: is empty, name a program and its arguments, such as [/usr/local/bin/deliver]".into()),
            ("exec: { command: [sh] }", format!("3:34: sinks[0].exec.command[0]: {ABSOLUTE}")),
            ("exec: { timeout: 5s }", "3:5: sinks[0].exec.command: is missing, name a program and its arguments".into()),
            (
                "exec: { command: [/a], timeout: 11m }",
                "3:48: sinks[0].exec.timeout: use a duration from 1s to 10m".into(),
            ),
            (
                "exec: { command: [/a, \"\\0\"] }",
                "3:38: sinks[0].exec.command[1]: use at most 4,096 bytes, without a zero byte".into(),
            ),
            ("kafka: a", "3:16: sinks[0].kafka: is not a known field, use one of `name`, `file`, `exec`, `vault`".into()),
        ] {
            assert_eq!(one(yaml), Err(format!("control.yaml:{expected}")), "{yaml}");
        }
        for (field, expected) in [
            (
                "address: \"http://vault:8200\"",
                "sinks[0].vault.address: use https://, or http:// with 127.0.0.1, [::1] or localhost: secrets are sent to this address",
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
                "sinks[0].vault.path: add {key_id} to the path: two keys must not have the same path",
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
                "control.yaml:3:5: sinks[0].name: is missing, name the sink: policies refer to it by this name"
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
