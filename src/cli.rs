//! The command line: a client of the control plane's admin API, and of a sidecar for `check`.
//!
//! [`Cli`] parses, [`Cli::run`] dispatches to one file per command. A command calls through [`connection`], answers
//! with a [`View`](output::View) through [`output`], and ends with an [`Exit`] or a [`Failure`].

pub(crate) mod audit;
pub(crate) mod barrier;
pub(crate) mod certs;
pub(crate) mod check;
pub(crate) mod completions;
pub(crate) mod config;
pub mod connection;
pub(crate) mod consumer;
pub(crate) mod control;
pub(crate) mod convert;
mod daemon;
pub(crate) mod decision;
pub(crate) mod dev;
pub(crate) mod explain;
pub(crate) mod failure;
pub(crate) mod fleet;
pub(crate) mod idempotency;
pub(crate) mod issued;
pub(crate) mod key;
pub(crate) mod keyring;
pub mod output;
pub(crate) mod pass_by;
pub(crate) mod policy;
pub(crate) mod revoke;
pub(crate) mod rotate;
pub(crate) mod screen;
pub(crate) mod secret;
pub(crate) mod sidecar;
pub(crate) mod snapshot;
pub mod stream;
pub(crate) mod token;
pub(crate) mod usage;
pub mod usage_error;
pub(crate) mod value;
pub(crate) mod watch;
pub(crate) mod webhook;
pub(crate) mod words;

use std::ops::Deref;

use clap::{Parser, Subcommand};
use serde::Serialize;
use tokio::runtime::Builder;

pub use failure::{Exit, Failure};

use crate::{
    clock::{BootTime, Clock},
    key::Timestamp,
};
use connection::{Admin, Client, ClientArgs, ConnectionArgs};
use output::{Format, Output, Progress, Terminal, View};

/// Rotate API keys across a service mesh with no failed request
///
/// relatch rotates API keys across a service mesh with no failed request. Every sidecar accepts a new version of a key
/// before its secret is handed out. The old version stays accepted until its consumer has switched.
#[derive(Debug, Parser)]
#[command(name = "relatch", version, after_help = EXIT_CODES, max_term_width = 80)]
pub struct Cli {
    /// Output format: table, or json with one document on one line, or one line per event for commands that report
    /// progress [default: table on a terminal, json elsewhere]
    #[arg(
        short,
        long,
        global = true,
        hide_possible_values = true,
        value_name = "FORMAT",
        help_heading = "Global options"
    )]
    pub(crate) output: Option<Format>,

    /// The command.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a control plane and a sidecar with a demo key on this machine: start here
    Dev(dev::DevArgs),
    /// Run the control plane, or create its data directory
    Control(control::ControlArgs),
    /// Run a sidecar that answers Envoy's external authorization checks
    Sidecar(sidecar::SidecarArgs),
    /// Create, list and delete admin tokens
    Token(Client<token::TokenCommand>),
    /// Create and show keyrings: each is the set of keys of one API
    Keyring(Client<keyring::KeyringCommand>),
    /// Create and show consumers: the callers that own keys
    Consumer(Client<consumer::ConsumerCommand>),
    /// Create, import and show keys
    Key(Client<key::KeyCommand>),
    /// Rotate a key to its next version with no failed request
    Rotate(Client<rotate::RotateCommand>),
    /// Revoke versions of a key immediately and permanently
    Revoke(ClientArgs<revoke::RevokeArgs>),
    /// Show the sidecars, and which revision each of them has confirmed
    Fleet(ClientArgs<fleet::FleetArgs>),
    /// Show how often each version of a key was used, when it was last used, and from where
    ///
    /// Use it to find out whether an old version is still needed, and who needs it. `relatch rotate status` shows what
    /// that means for a rotation.
    Usage(ClientArgs<usage::UsageArgs>),
    /// Show what a sidecar would decide about a key, step by step
    ///
    /// Use it to find out why a request was denied, or whether it would be denied. The key is read from a file or from
    /// standard input, never from an argument.
    Explain(ClientArgs<explain::ExplainArgs>),
    /// Send one real check to a running sidecar
    Check(check::CheckArgs),
    /// Show and set how keys are rotated
    ///
    /// A policy sets how long an old version stays accepted, how long it must be unused before it retires, and what
    /// happens to a version that is still used at the end of its overlap.
    Policy(Client<policy::PolicyCommand>),
    /// Create, list, test and delete webhooks: they receive events about keys
    Webhook(Client<webhook::WebhookCommand>),
    /// List and verify the audit log
    Audit(Client<audit::AuditCommand>),
    /// Create certificates to try out TLS
    #[command(subcommand)]
    Certs(certs::CertsCommand),
    /// Check configuration files, and create the key of a snapshot file
    #[command(subcommand)]
    Config(config::ConfigCommand),
    /// Inspect the snapshot file of a sidecar
    #[command(subcommand)]
    Snapshot(snapshot::SnapshotCommand),
    /// Print the completion script for a shell
    Completions(completions::CompletionsArgs),
}

/// The context of every command.
#[derive(Debug)]
pub struct Console {
    /// The output of the command.
    pub(crate) output: Output,
    clock: Clock,
}

/// The context of a command that calls the control plane.
#[derive(Debug)]
pub struct Session {
    console: Console,
    connection: ConnectionArgs,
}

/// The threads of a daemon's control path: one can be busy with a large keyring while the other serves streams.
const CONTROL_THREADS: usize = 2;

const EXIT_CODES: &str = "\
Exit codes:
  0  done
  1  failed; also: denied (check, explain), not delivered (webhook test),
     broken (audit verify)
  2  usage: the command line, or a value on it, is not valid
  3  not found
  4  refused by a safety check
  5  timed out waiting for sidecars to confirm
  6  not permitted
  7  control plane (for check: sidecar) unreachable
  8  an earlier call with the same idempotency key did this, and its secret is
     forgotten

Secrets are read from files or standard input, never from arguments. The command
that creates a secret prints it once.";

impl Cli {
    /// Runs the command.
    ///
    /// # Errors
    ///
    /// When the command failed; the failure has the exit code.
    pub async fn run(self, terminal: Terminal) -> Result<Exit, Failure> {
        let console = Console {
            output: Output::new(self.output, terminal),
            clock: Clock::system(),
        };
        match self.command {
            Command::Dev(args) => Box::pin(args.run(&console)).await?,
            Command::Control(args) => Box::pin(args.run(&console)).await?,
            Command::Sidecar(args) => Box::pin(args.run(&console)).await?,
            Command::Certs(command) => command.run(&console)?,
            Command::Config(command) => return command.run(&console),
            Command::Snapshot(command) => command.run(&console)?,
            Command::Check(args) => return args.run(&console).await,
            Command::Completions(args) => args.run()?,
            Command::Token(client) => {
                let (command, session) = client.into_parts(console);
                command.run(&session).await?;
            }
            Command::Keyring(client) => {
                let (command, session) = client.into_parts(console);
                command.run(&session).await?;
            }
            Command::Consumer(client) => {
                let (command, session) = client.into_parts(console);
                command.run(&session).await?;
            }
            Command::Key(client) => {
                let (command, session) = client.into_parts(console);
                Box::pin(command.run(&session)).await?;
            }
            Command::Rotate(client) => {
                let (command, session) = client.into_parts(console);
                command.run(&session).await?;
            }
            Command::Policy(client) => {
                let (command, session) = client.into_parts(console);
                command.run(&session).await?;
            }
            Command::Webhook(client) => {
                let (command, session) = client.into_parts(console);
                return command.run(&session).await;
            }
            Command::Audit(client) => {
                let (command, session) = client.into_parts(console);
                command.run(&session).await?;
            }
            Command::Revoke(client) => {
                let (args, session) = client.into_parts(console);
                args.run(&session).await?;
            }
            Command::Fleet(client) => {
                let (args, session) = client.into_parts(console);
                args.run(&session).await?;
            }
            Command::Usage(client) => {
                let (args, session) = client.into_parts(console);
                args.run(&session).await?;
            }
            Command::Explain(client) => {
                let (args, session) = client.into_parts(console);
                return args.run(&session).await;
            }
        }
        Ok(Exit::Done)
    }
}

impl Command {
    /// The runtime of the command. The control path of a daemon has its own threads, apart from the workers that answer checks;
    /// every other command needs one thread.
    #[must_use]
    pub fn runtime(&self) -> Builder {
        match self {
            Self::Dev(_) | Self::Control(_) | Self::Sidecar(_) => {
                let mut builder = Builder::new_multi_thread();
                builder
                    .worker_threads(CONTROL_THREADS)
                    .thread_name("control");
                builder
            }
            Self::Token(_)
            | Self::Keyring(_)
            | Self::Consumer(_)
            | Self::Key(_)
            | Self::Rotate(_)
            | Self::Revoke(_)
            | Self::Fleet(_)
            | Self::Usage(_)
            | Self::Explain(_)
            | Self::Check(_)
            | Self::Policy(_)
            | Self::Webhook(_)
            | Self::Audit(_)
            | Self::Certs(_)
            | Self::Config(_)
            | Self::Snapshot(_)
            | Self::Completions(_) => Builder::new_current_thread(),
        }
    }
}

impl Session {
    /// Connects to the admin API.
    ///
    /// # Errors
    ///
    /// When there is no admin token, or the control plane cannot be reached.
    pub(crate) async fn admin(&self) -> Result<Admin, Failure> {
        self.connection.connect().await
    }
}

impl Deref for Session {
    type Target = Console;

    fn deref(&self) -> &Console {
        &self.console
    }
}

impl Console {
    /// The current time of the wall clock.
    #[must_use]
    pub(crate) fn now(&self) -> Timestamp {
        self.clock.wall()
    }

    /// The current time of the boot clock, which never goes back; waits are measured by it.
    #[must_use]
    pub(crate) fn boot(&self) -> BootTime {
        self.clock.boot()
    }

    /// Writes the answer.
    ///
    /// # Errors
    ///
    /// When standard output cannot be written to.
    pub(crate) fn show<V: View>(&self, view: &V) -> Result<(), Failure> {
        self.output.show(view, self.now())
    }

    /// Reports an event: as a sentence for people, or as the event in JSON.
    ///
    /// # Errors
    ///
    /// When standard output cannot be written to.
    pub(crate) fn report<T: Serialize>(
        &self,
        progress: &mut Progress,
        event: &T,
        sentence: &str,
    ) -> Result<(), Failure> {
        progress.say(sentence);
        match self.output.format() {
            Format::Json => self.output.event(event),
            Format::Table => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, error::ErrorKind};

    use super::*;

    /// `command` and everything below it, each with its full name.
    fn tree(command: &clap::Command, name: &str) -> Vec<(String, clap::Command)> {
        let below = command.get_subcommands().flat_map(|sub| {
            let name = format!("{name} {}", sub.get_name());
            tree(sub, &name)
        });
        let mut all = vec![(name.to_owned(), command.clone())];
        all.extend(below);
        all
    }

    fn commands() -> Vec<(String, clap::Command)> {
        tree(&Cli::command(), "relatch")
    }

    fn parse_error(line: &str) -> clap::Error {
        Cli::try_parse_from(line.split(' ')).expect_err(line)
    }

    #[test]
    fn the_tree_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_commands_are_those_of_this_release() {
        let names: Vec<String> = commands().into_iter().map(|(name, _)| name).collect();
        assert_eq!(
            names,
            [
                "relatch",
                "relatch dev",
                "relatch control",
                "relatch control init",
                "relatch control recover-admin",
                "relatch sidecar",
                "relatch token",
                "relatch token create",
                "relatch token list",
                "relatch token end",
                "relatch keyring",
                "relatch keyring create",
                "relatch keyring list",
                "relatch keyring show",
                "relatch keyring confirm",
                "relatch consumer",
                "relatch consumer create",
                "relatch consumer list",
                "relatch consumer show",
                "relatch key",
                "relatch key create",
                "relatch key import",
                "relatch key list",
                "relatch key show",
                "relatch rotate",
                "relatch rotate start",
                "relatch rotate status",
                "relatch rotate retire",
                "relatch rotate extend",
                "relatch rotate rollback",
                "relatch rotate abort",
                "relatch revoke",
                "relatch fleet",
                "relatch fleet forget",
                "relatch usage",
                "relatch explain",
                "relatch check",
                "relatch policy",
                "relatch policy show",
                "relatch policy set",
                "relatch webhook",
                "relatch webhook add",
                "relatch webhook list",
                "relatch webhook remove",
                "relatch webhook test",
                "relatch webhook deliveries",
                "relatch audit",
                "relatch audit list",
                "relatch audit verify",
                "relatch certs",
                "relatch certs dev",
                "relatch config",
                "relatch config check",
                "relatch config snapshot-key",
                "relatch snapshot",
                "relatch snapshot inspect",
                "relatch completions",
            ]
        );
    }

    #[test]
    fn every_command_and_every_argument_says_what_it_is() {
        for (name, command) in commands() {
            assert!(command.get_about().is_some(), "{name} says nothing");
            for arg in command.get_arguments() {
                assert!(arg.get_help().is_some(), "{name}: {arg} says nothing");
            }
        }
    }

    #[test]
    fn no_argument_takes_a_secret() {
        // A secret comes by a file, which these name.
        const FILES: [&str; 5] = ["token_file", "from_file", "key_file", "url_file", "tls_key"];
        const NO_SECRETS: [&str; 3] = ["key_id", "no_key", "idempotency_key"];
        for (name, command) in commands() {
            for arg in command.get_arguments() {
                let id = arg.get_id().as_str();
                let secret = ["secret", "key", "token", "password", "credential", "bearer"]
                    .iter()
                    .any(|word| id.split('_').any(|part| part == *word));
                let known = FILES.contains(&id) || NO_SECRETS.contains(&id);
                assert!(!secret || known, "{name} takes {arg}");
                if FILES.contains(&id) {
                    let value = arg.get_value_names().and_then(|names| names.first());
                    assert_eq!(
                        value.map(clap::builder::Str::as_str),
                        Some("PATH"),
                        "{name} {arg}"
                    );
                }
            }
        }
        let import = "relatch key import --keyring k --consumer c rlk_x";
        assert_eq!(parse_error(import).kind(), ErrorKind::UnknownArgument);
        for line in ["relatch check rlk_x", "relatch explain --keyring k rlk_x"] {
            assert_eq!(
                parse_error(line).kind(),
                ErrorKind::UnknownArgument,
                "{line}"
            );
        }
    }

    #[test]
    fn a_key_in_the_place_of_its_id_is_not_repeated() {
        let key = "rlk_7Qm2Xc91TbKe_0123456789abcdef0123456789abcdefABCDEF";
        let error = parse_error(&format!("relatch key show {key}"));
        assert_eq!(error.kind(), ErrorKind::ValueValidation);
        let error = error.to_string();
        assert!(!error.contains("0123456789"), "{error}");
        assert!(error.contains("invalid value for '<KEY_ID>'"), "{error}");
        assert!(error.contains("12 characters"), "{error}");
    }

    #[test]
    fn a_bad_value_names_its_flag_and_an_example() {
        for (line, flag, example) in [
            (
                "relatch rotate start 7Qm2Xc91TbKe --overlap soon",
                "--overlap",
                "30s, 12h or 7d",
            ),
            (
                "relatch rotate start 7Qm2Xc91TbKe --timeout 0s",
                "--timeout",
                "longer than zero",
            ),
            (
                "relatch key create --keyring k --consumer c --expires-in 9",
                "--expires-in",
                "30s, 12h or 7d",
            ),
            (
                "relatch key create --keyring k --consumer c --not-before now",
                "--not-before",
                "2027-01-31T12:00:00Z",
            ),
            (
                "relatch key create --keyring k --consumer c --allow-source lan",
                "--allow-source",
                "10.0.0.0/8",
            ),
            (
                "relatch fleet --keyring Payments",
                "--keyring",
                "1 to 63 of a-z",
            ),
            (
                "relatch fleet --admin http://10.0.0.1:9011",
                "--admin",
                "loopback",
            ),
        ] {
            let error = parse_error(line);
            assert_eq!(error.exit_code(), i32::from(Exit::Usage.code()), "{line}");
            let error = error.to_string();
            assert!(error.contains(flag) && error.contains(example), "{error}");
        }
    }

    #[test]
    fn a_revocation_says_which_versions_and_why() {
        let revoke = |tail: &str| {
            let line = format!("relatch revoke 7Qm2Xc91TbKe --reason leaked{tail}");
            Cli::try_parse_from(line.split(' ')).map_err(|error| error.kind())
        };
        assert!(revoke(" --version 3").is_ok());
        assert!(revoke(" --all --wait --timeout 5s").is_ok());
        for (tail, kind) in [
            ("", ErrorKind::MissingRequiredArgument),
            (" --all --version 3", ErrorKind::ArgumentConflict),
            (" --version 0", ErrorKind::ValueValidation),
            (" --all --timeout 5s", ErrorKind::MissingRequiredArgument),
        ] {
            assert_eq!(revoke(tail).err(), Some(kind), "{tail:?}");
        }
        let reason = parse_error("relatch revoke 7Qm2Xc91TbKe --all");
        assert_eq!(reason.kind(), ErrorKind::MissingRequiredArgument);
    }

    #[test]
    fn what_is_asked_of_a_rotation_is_asked_whole() {
        let rotate = |tail: &str| {
            let line = format!("relatch rotate {tail}");
            Cli::try_parse_from(line.split(' ')).map_err(|error| error.kind())
        };
        for tail in [
            "start 7Qm2Xc91TbKe --emergency --reason leaked",
            "status 7Qm2Xc91TbKe",
            "status 7Qm2Xc91TbKe --watch --interval 500ms",
            "retire 7Qm2Xc91TbKe --version 1",
            "retire 7Qm2Xc91TbKe --force --reason told",
            "extend 7Qm2Xc91TbKe --by 3d --reason freeze",
            "extend 7Qm2Xc91TbKe --until 2027-01-31T12:00:00Z --reason freeze --version 1",
            "rollback 7Qm2Xc91TbKe --reason broken --wait --timeout 5s",
            "abort 7Qm2Xc91TbKe --reason stuck",
        ] {
            assert!(rotate(tail).is_ok(), "{tail}");
        }
        for (tail, kind) in [
            (
                "start 7Qm2Xc91TbKe --emergency",
                ErrorKind::MissingRequiredArgument,
            ),
            (
                "start 7Qm2Xc91TbKe --reason leaked",
                ErrorKind::MissingRequiredArgument,
            ),
            (
                "start 7Qm2Xc91TbKe --emergency --reason leaked --overlap 1d",
                ErrorKind::ArgumentConflict,
            ),
            (
                "status 7Qm2Xc91TbKe --interval 1s",
                ErrorKind::MissingRequiredArgument,
            ),
            (
                "retire 7Qm2Xc91TbKe --force",
                ErrorKind::MissingRequiredArgument,
            ),
            (
                "retire 7Qm2Xc91TbKe --reason told",
                ErrorKind::MissingRequiredArgument,
            ),
            (
                "extend 7Qm2Xc91TbKe --reason freeze",
                ErrorKind::MissingRequiredArgument,
            ),
            (
                "extend 7Qm2Xc91TbKe --by 3d",
                ErrorKind::MissingRequiredArgument,
            ),
            (
                "extend 7Qm2Xc91TbKe --by 0s --reason freeze",
                ErrorKind::ValueValidation,
            ),
            (
                "extend 7Qm2Xc91TbKe --by 3d --until 2027-01-31T12:00:00Z --reason freeze",
                ErrorKind::ArgumentConflict,
            ),
            ("rollback 7Qm2Xc91TbKe", ErrorKind::MissingRequiredArgument),
            (
                "rollback 7Qm2Xc91TbKe --reason broken --timeout 5s",
                ErrorKind::MissingRequiredArgument,
            ),
            ("abort 7Qm2Xc91TbKe", ErrorKind::MissingRequiredArgument),
        ] {
            assert_eq!(rotate(tail).err(), Some(kind), "{tail}");
        }
    }

    #[test]
    fn the_help_lists_the_exit_codes_and_the_token_file_of_dev() {
        let help = Cli::command().render_long_help().to_string();
        for code in 0..=7 {
            assert!(help.contains(&format!("\n  {code}  ")), "{code} is missing");
        }
        let key_list = Cli::try_parse_from(["relatch", "key", "list", "--help"]);
        let help = key_list.expect_err("the help").to_string();
        for part in ["relatch-data/admin.token", "RELATCH_ADMIN", "RELATCH_CA"] {
            assert!(help.contains(part), "{help}");
        }
    }

    /// As they are parsed: with the options that they have from the commands above.
    fn built() -> Vec<(String, clap::Command)> {
        let mut root = Cli::command();
        root.build();
        tree(&root, "relatch")
    }

    #[test]
    fn the_help_of_every_command_fits_a_terminal() {
        let mut wide = Vec::new();
        for (name, mut command) in built() {
            // clap wraps all but examples, where a broken line would not run.
            let mut texts: Vec<String> = [command.get_after_help(), command.get_after_long_help()]
                .into_iter()
                .flatten()
                .map(ToString::to_string)
                .collect();
            texts.push(command.render_help().to_string());
            texts.push(command.render_long_help().to_string());
            let lines = texts.iter().flat_map(|text| text.lines());
            let lines = lines.filter(|line| line.chars().count() > 80);
            wide.extend(lines.map(|line| format!("{name}: {line}")));
        }
        assert_eq!(wide, [""; 0], "lines that are too wide");
    }

    #[test]
    fn every_option_names_its_default() {
        for (name, command) in built() {
            for arg in command.get_arguments() {
                let in_required_group = command.get_groups().any(|group| {
                    group.is_required_set() && group.get_args().any(|id| id == arg.get_id())
                });
                let takes_value = arg.get_action().takes_values();
                if !takes_value || arg.is_required_set() || in_required_group {
                    continue;
                }
                let help = arg.get_long_help().or_else(|| arg.get_help());
                let help = help.map(ToString::to_string).unwrap_or_default();
                let named = help.contains("[default: ") || !arg.get_default_values().is_empty();
                assert!(named, "{name}: {arg} names no default: {help}");
            }
        }
    }

    #[test]
    fn only_clients_have_options_for_the_connection() {
        for line in [
            "relatch dev",
            "relatch control",
            "relatch control init",
            "relatch sidecar --config x",
            "relatch certs dev --out x",
            "relatch config check x",
            "relatch config snapshot-key x",
            "relatch snapshot inspect x",
            "relatch completions bash",
            "relatch check",
        ] {
            let error = parse_error(&format!("{line} --admin http://127.0.0.1:9011"));
            assert_eq!(error.kind(), ErrorKind::UnknownArgument, "{line}");
        }
        for line in [
            "relatch key list --admin http://127.0.0.1:9011 --token-file x",
            "relatch key --admin http://127.0.0.1:9011 list --ca x",
            "relatch fleet --admin http://127.0.0.1:9011",
            "relatch fleet forget edge-1 --reason gone --token-file x",
            "relatch check --ca x --tls-cert y --tls-key z",
        ] {
            assert!(Cli::try_parse_from(line.split(' ')).is_ok(), "{line}");
        }
    }

    #[test]
    fn global_options_are_taken_before_and_after_the_command() {
        for line in ["relatch -o json key list", "relatch key list -o json"] {
            let cli = Cli::try_parse_from(line.split(' ')).expect(line);
            assert_eq!(cli.output, Some(Format::Json));
        }
    }
}
