//! `relatch policy`: shows and sets how the keys of a keyring, or one key, are rotated.

use std::{str::FromStr, time::Duration};

use clap::{Args, Subcommand};
use serde::Serialize;

use super::{
    Session,
    connection::answer,
    convert,
    failure::Failure,
    output::{self, View},
    value::{self, KeyIdParser, ParseDurationError},
    words,
};
use crate::{
    duration::written,
    key::{
        KeyId, KeyringName, OnDeadline, SinkName, Timestamp, policy::ParseOnDeadlineError,
        sink_name::ParseSinkNameError,
    },
    proto::admin::{self, get_policy_request, set_policy_request},
};

/// The commands of `policy`.
#[derive(Debug, Subcommand)]
pub enum PolicyCommand {
    /// Show how the keys of a keyring, or one key, are rotated
    #[command(after_help = SHOW_EXAMPLES)]
    Show(ShowArgs),
    /// Change how the keys of a keyring, or one key, are rotated
    ///
    /// Settings without a flag do not change. A policy applies immediately, also to rotations in progress: it decides when
    /// an old version retires, and what happens to it at the end of its overlap. The policy of a keyring applies to all
    /// its keys, except where a key has its own setting.
    // The usage that clap generates lists every flag twice.
    #[command(
        after_help = SET_EXAMPLES,
        override_usage = "relatch policy set [OPTIONS] <KEY_ID|--keyring <KEYRING>>"
    )]
    Set(SetArgs),
}

/// The arguments of `policy show`.
#[derive(Debug, Args)]
pub struct ShowArgs {
    #[command(flatten)]
    of: OfArgs,
}

/// The arguments of `policy set`.
#[derive(Debug, Args)]
pub struct SetArgs {
    #[command(flatten)]
    of: OfArgs,

    #[command(flatten)]
    parts: PartsArgs,
}

/// The keyring or the key of the policy.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct OfArgs {
    /// Key id, for the policy of one key: the 12 characters between the first two '_' of the key
    #[arg(value_name = "KEY_ID", value_parser = KeyIdParser)]
    key_id: Option<KeyId>,

    /// Keyring, for the policy of all its keys
    #[arg(long)]
    keyring: Option<KeyringName>,
}

/// The new settings.
#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
struct PartsArgs {
    /// Time that a version is active before the next rotation is due, for example 90d; never: rotations are started
    /// manually [default: unchanged]
    #[arg(long, value_name = "DURATION|never")]
    rotate_every: Option<Every>,

    /// Minimum time that an old version stays accepted, for example 7d [default: unchanged]
    #[arg(long, value_name = "DURATION", value_parser = value::duration)]
    overlap: Option<Duration>,

    /// Time that an old version must be unused before it retires, for example 24h; at most the overlap, and at most
    /// 30d [default: unchanged]
    #[arg(long, value_name = "DURATION", value_parser = value::duration)]
    idle_for: Option<Duration>,

    /// Action for a version that is still used at the end of its overlap: retire, extend or hold [default: unchanged]
    #[arg(long, value_name = "ANSWER", value_parser = on_deadline)]
    on_deadline: Option<OnDeadline>,

    /// Time after its retirement in which a version can be rolled back to [default: unchanged]
    #[arg(long, value_name = "DURATION", value_parser = value::duration)]
    rollback_for: Option<Duration>,

    /// Time before the end of a version at which its consumer gets a reminder [default: unchanged]
    #[arg(long, value_name = "DURATION", value_parser = value::duration)]
    remind_before: Option<Duration>,

    /// Maximum number of versions of a key that are accepted at the same time, 2 to 10 [default: unchanged]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(2..=10))]
    max_versions: Option<u32>,

    /// Sink for the secrets of scheduled rotations, from the control plane's configuration; none: due rotations are
    /// reported but not started [default: unchanged]
    #[arg(long, value_name = "NAME|none")]
    sink: Option<SinkChoice>,

    /// Only for a key: first delete its own settings, so that it inherits its keyring's
    #[arg(long, conflicts_with = "keyring")]
    inherit: bool,
}

/// A duration, or never.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Every(Option<Duration>);

/// A sink, or none.
#[derive(Clone, Debug, PartialEq, Eq)]
struct SinkChoice(Option<SinkName>);

/// A policy. Durations have the format of `policy set`.
#[derive(Debug, Serialize)]
struct PolicyView {
    keyring: String,
    /// Null for the policy of a keyring.
    key_id: Option<String>,
    /// Null: rotations are started manually.
    rotate_every: Option<String>,
    overlap: Option<String>,
    idle_for: Option<String>,
    on_deadline: Option<OnDeadline>,
    rollback_for: Option<String>,
    remind_before: Option<String>,
    max_versions: u32,
    sink: Option<String>,
    /// The settings of a key that differ from those of its keyring.
    overridden: Vec<String>,
    revision: u64,
}

const SHOW_EXAMPLES: &str = "\
Examples:
  relatch policy show --keyring payments -o table
  relatch policy show 7Qm2Xc91TbKe -o table";

const SET_EXAMPLES: &str = "\
Examples:
  Overlap of two weeks; an old version retires after three unused days:
    relatch policy set --keyring payments --overlap 14d --idle-for 3d

  Rotate one key every 90 days, and send its new secrets to the sink `vault`:
    relatch policy set 7Qm2Xc91TbKe --rotate-every 90d --sink vault

  Use the policy of the keyring for that key again:
    relatch policy set 7Qm2Xc91TbKe --inherit

Requires role admin.";

/// The value of --rotate-every for no schedule.
const NEVER: &str = "never";
/// The value of --sink for no sink.
const NO_SINK: &str = "none";

impl PolicyCommand {
    /// Runs the command.
    ///
    /// # Errors
    ///
    /// When the control plane cannot be reached or refuses.
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        let mut admin = session.admin().await?;
        let policy = match self {
            Self::Show(args) => answer(admin.get_policy(args.into_request())).await?,
            Self::Set(args) => answer(admin.set_policy(args.into_request())).await?,
        };
        session.show(&PolicyView::from(policy))
    }
}

impl ShowArgs {
    fn into_request(self) -> admin::GetPolicyRequest {
        let of = self.of.choose(
            get_policy_request::Of::KeyId,
            get_policy_request::Of::Keyring,
        );
        admin::GetPolicyRequest { of }
    }
}

impl SetArgs {
    fn into_request(self) -> admin::SetPolicyRequest {
        let of = self.of.choose(
            set_policy_request::Of::KeyId,
            set_policy_request::Of::Keyring,
        );
        admin::SetPolicyRequest {
            of,
            anew: self.parts.inherit,
            policy: Some(self.parts.into_policy()),
        }
    }
}

impl OfArgs {
    fn choose<T>(
        self,
        key: impl FnOnce(String) -> T,
        keyring: impl FnOnce(String) -> T,
    ) -> Option<T> {
        let of_key = self.key_id.map(|key_id| key(key_id.as_str().to_owned()));
        of_key.or_else(|| self.keyring.map(|name| keyring(name.into())))
    }
}

impl PartsArgs {
    fn into_policy(self) -> admin::Policy {
        let duration = |duration: Option<Duration>| duration.map(convert::to_duration);
        let sink = |SinkChoice(sink)| sink.map_or_else(String::new, String::from);
        admin::Policy {
            rotate_every: duration(
                self.rotate_every
                    .map(|Every(every)| every.unwrap_or_default()),
            ),
            overlap: duration(self.overlap),
            idle_for: duration(self.idle_for),
            on_deadline: convert::to_on_deadline(self.on_deadline),
            rollback_for: duration(self.rollback_for),
            remind_before: duration(self.remind_before),
            max_versions: self.max_versions.unwrap_or_default(),
            sink: self.sink.map(sink),
        }
    }
}

impl FromStr for Every {
    type Err = ParseDurationError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == NEVER {
            return Ok(Self(None));
        }
        value::positive_duration(text).map(Some).map(Self)
    }
}

impl FromStr for SinkChoice {
    type Err = ParseSinkNameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == NO_SINK {
            return Ok(Self(None));
        }
        text.parse().map(Some).map(Self)
    }
}

fn on_deadline(text: &str) -> Result<OnDeadline, ParseOnDeadlineError> {
    text.parse()
}

impl From<admin::PolicyStatus> for PolicyView {
    fn from(status: admin::PolicyStatus) -> Self {
        let policy = status.policy.unwrap_or_default();
        let duration = |value| {
            let duration = convert::duration(value)?;
            Some(written(duration).to_string())
        };
        let every = convert::duration(policy.rotate_every).filter(|every| !every.is_zero());
        Self {
            keyring: status.keyring,
            key_id: Some(status.key_id).filter(|id| !id.is_empty()),
            rotate_every: every.map(|every| written(every).to_string()),
            overlap: duration(policy.overlap),
            idle_for: duration(policy.idle_for),
            on_deadline: convert::on_deadline(policy.on_deadline),
            rollback_for: duration(policy.rollback_for),
            remind_before: duration(policy.remind_before),
            max_versions: policy.max_versions,
            sink: policy.sink.filter(|sink| !sink.is_empty()),
            overridden: status.overridden,
            revision: status.revision,
        }
    }
}

impl PolicyView {
    /// A setting as a line, with a mark if it is set for this key.
    fn part(&self, title: &'static str, name: &str, value: &str) -> (&'static str, String) {
        let is_own = self.overridden.iter().any(|part| part == name);
        let whose = if is_own { "  (set for this key)" } else { "" };
        (title, format!("{value}{whose}"))
    }
}

impl View for PolicyView {
    fn render(&self, _now: Timestamp) -> String {
        let text = |value: &Option<String>| words::or_nothing(value.as_deref().unwrap_or_default());
        let every = self.rotate_every.as_deref().unwrap_or(NEVER);
        let sink = self.sink.as_deref().unwrap_or(NO_SINK);
        let on_deadline = self.on_deadline.map_or(words::NOTHING, OnDeadline::as_str);
        let versions = self.max_versions.to_string();
        let mut facts = vec![("KEYRING", self.keyring.clone())];
        if let Some(key_id) = &self.key_id {
            facts.push(("KEY ID", key_id.clone()));
        }
        facts.extend([
            self.part("ROTATE EVERY", "rotate_every", every),
            self.part("OVERLAP", "overlap", &text(&self.overlap)),
            self.part("IDLE FOR", "idle_for", &text(&self.idle_for)),
            self.part("ON DEADLINE", "on_deadline", on_deadline),
            self.part("ROLLBACK FOR", "rollback_for", &text(&self.rollback_for)),
            self.part("REMIND BEFORE", "remind_before", &text(&self.remind_before)),
            self.part("MAX VERSIONS", "max_versions", &versions),
            self.part("SINK", "sink", sink),
            ("REVISION", self.revision.to_string()),
        ]);
        output::facts(&facts)
    }
}

#[cfg(test)]
mod tests {
    use clap::{Parser, error::ErrorKind};

    use super::{
        super::{Cli, Command, connection::Client, output::tests::fits},
        *,
    };

    fn parse(line: &str) -> Result<admin::SetPolicyRequest, ErrorKind> {
        let line = format!("relatch policy set {line}");
        let cli = Cli::try_parse_from(line.split(' ')).map_err(|error| error.kind())?;
        match cli.command {
            Command::Policy(Client {
                command: PolicyCommand::Set(args),
                ..
            }) => Ok(args.into_request()),
            other => panic!("{other:?}"),
        }
    }

    fn status() -> admin::PolicyStatus {
        let days = |days: i64| {
            Some(prost_types::Duration {
                seconds: days * 86_400,
                nanos: 0,
            })
        };
        admin::PolicyStatus {
            keyring: "payments".to_owned(),
            key_id: "7Qm2Xc91TbKe".to_owned(),
            policy: Some(admin::Policy {
                rotate_every: days(0),
                overlap: days(7),
                idle_for: days(1),
                on_deadline: admin::OnDeadline::Hold as i32,
                rollback_for: days(7),
                remind_before: days(2),
                max_versions: 3,
                sink: Some(String::new()),
            }),
            overridden: vec!["overlap".to_owned()],
            revision: 19,
        }
    }

    #[test]
    fn json_of_a_policy() {
        assert_eq!(
            serde_json::to_string(&PolicyView::from(status())).expect("serializable"),
            concat!(
                r#"{"keyring":"payments","key_id":"7Qm2Xc91TbKe","rotate_every":null,"overlap":"7d","idle_for":"1d","#,
                r#""on_deadline":"hold","rollback_for":"7d","remind_before":"2d","max_versions":3,"sink":null,"#,
                r#""overridden":["overlap"],"revision":19}"#,
            )
        );
    }

    #[test]
    fn a_table_says_what_is_the_key_s_own() {
        assert_eq!(
            fits(PolicyView::from(status()).render(Timestamp::from_millis(0))),
            "KEYRING        payments\n\
             KEY ID         7Qm2Xc91TbKe\n\
             ROTATE EVERY   never\n\
             OVERLAP        7d  (set for this key)\n\
             IDLE FOR       1d\n\
             ON DEADLINE    hold\n\
             ROLLBACK FOR   7d\n\
             REMIND BEFORE  2d\n\
             MAX VERSIONS   3\n\
             SINK           none\n\
             REVISION       19\n"
        );
    }

    #[test]
    fn what_is_not_given_is_not_sent() {
        let request = parse("--keyring payments --overlap 14d").expect("valid");
        let policy = request.policy.expect("parts");
        let expected = admin::Policy {
            overlap: Some(convert::to_duration(Duration::from_hours(14 * 24))),
            ..admin::Policy::default()
        };
        assert_eq!((policy, request.anew), (expected, false));
    }

    #[test]
    fn never_and_none_take_away() {
        let request = parse("7Qm2Xc91TbKe --rotate-every never --sink none --inherit");
        let request = request.expect("valid");
        let policy = request.policy.expect("parts");
        assert_eq!(policy.rotate_every, Some(prost_types::Duration::default()));
        assert_eq!(policy.sink.as_deref(), Some(""));
        assert!(request.anew);
    }

    #[test]
    fn the_parts_that_cannot_be_are_refused() {
        for (line, kind) in [
            ("--overlap 7d", ErrorKind::MissingRequiredArgument),
            ("--keyring payments", ErrorKind::MissingRequiredArgument),
            (
                "7Qm2Xc91TbKe --keyring payments --overlap 7d",
                ErrorKind::ArgumentConflict,
            ),
            ("--keyring payments --inherit", ErrorKind::ArgumentConflict),
            (
                "--keyring payments --on-deadline wait",
                ErrorKind::ValueValidation,
            ),
            (
                "--keyring payments --rotate-every 0s",
                ErrorKind::ValueValidation,
            ),
            (
                "--keyring payments --max-versions 1",
                ErrorKind::ValueValidation,
            ),
            (
                "--keyring payments --sink Vault",
                ErrorKind::ValueValidation,
            ),
        ] {
            assert_eq!(parse(line).err(), Some(kind), "{line}");
        }
        assert!(parse("7Qm2Xc91TbKe --inherit").is_ok());
    }
}
