//! The end of a command: its exit code, and its report if it failed.

use std::{
    error::Error,
    fmt::{self, Write as _},
    process::ExitCode,
};

use prost::Message as _;
use tonic::{Code, Status};

use super::{barrier::BarrierView, words};
use crate::proto::{MISSING, OUTCOME, WITHDRAWN, admin};

/// The exit codes. Scripts rely on them, so a number never changes its meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done.
    Done = 0,
    /// Failed without another code for the reason; also a denied `check` and a broken audit log.
    Failed = 1,
    /// The command line, or a value on it, is not valid.
    Usage = 2,
    /// The object of the command does not exist.
    NotFound = 3,
    /// A safety check refused it.
    Refused = 4,
    /// Not every sidecar that may serve has confirmed in time, or before Ctrl-C.
    TimedOut = 5,
    /// The token is not known, or its role does not permit the command.
    NotPermitted = 6,
    /// The control plane, or for `check` the sidecar, cannot be reached.
    Unreachable = 7,
    /// An earlier call with the same idempotency key did this, and its secret is forgotten.
    SecretForgotten = 8,
}

/// The reason why a command failed, with its [`Exit`] and a hint for people.
#[derive(Debug)]
pub struct Failure {
    exit: Exit,
    error: anyhow::Error,
    hint: Option<String>,
    /// What is known about the failed call.
    call: CallOutcome,
}

/// What is known about a failed call.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum CallOutcome {
    /// There was no call: the failure is on this machine.
    #[default]
    None,
    /// The control plane, or a gateway in front of it, refused the call.
    Refused,
    /// The control plane refused the call, and reported its state.
    Settled,
    /// The control plane reported that the change is committed, and that not every sidecar has confirmed it.
    Committed,
    /// The control plane reported that it has handed out nothing.
    Withdrawn,
    /// No answer of the control plane arrived: the call may have been executed.
    Unknown,
}

/// A call that the other side refused, or that never reached it.
#[derive(Debug)]
struct CallError {
    message: String,
    status: Status,
}

/// The advice about an answer that is not HTTP/2.
const TRY_TLS: &str = "the server may expect TLS: try https://";

impl Exit {
    /// The exit code for the code of a gRPC error. An error with the code `Ok` is still an error.
    #[must_use]
    pub const fn from_code(code: Code) -> Self {
        match code {
            Code::InvalidArgument => Self::Usage,
            Code::NotFound => Self::NotFound,
            Code::FailedPrecondition => Self::Refused,
            Code::DeadlineExceeded => Self::TimedOut,
            Code::PermissionDenied | Code::Unauthenticated => Self::NotPermitted,
            Code::Unavailable => Self::Unreachable,
            Code::Ok
            | Code::Cancelled
            | Code::Unknown
            | Code::AlreadyExists
            | Code::ResourceExhausted
            | Code::Aborted
            | Code::OutOfRange
            | Code::Unimplemented
            | Code::Internal
            | Code::DataLoss => Self::Failed,
        }
    }

    /// The number that the process exits with.
    #[must_use]
    pub const fn code(self) -> u8 {
        self as u8
    }
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> Self {
        Self::from(exit.code())
    }
}

impl Failure {
    /// Creates a failure that ends the command with `exit`.
    pub fn new(exit: Exit, error: impl Into<anyhow::Error>) -> Self {
        Self {
            exit,
            error: error.into(),
            hint: None,
            call: CallOutcome::default(),
        }
    }

    /// Creates the failure of a call that was not answered in time.
    pub fn unanswered(exit: Exit, error: impl Into<anyhow::Error>) -> Self {
        Self {
            call: CallOutcome::Unknown,
            ..Self::new(exit, error)
        }
    }

    /// Its message, without causes.
    #[must_use]
    pub fn summary(&self) -> String {
        self.error.to_string()
    }

    /// Whether the call may have been executed although no answer of the control plane confirms it.
    #[must_use]
    pub fn is_answer_lost(&self) -> bool {
        self.call == CallOutcome::Unknown
    }

    /// Whether the failure is on this machine, and not of a call.
    #[must_use]
    pub fn is_local(&self) -> bool {
        self.call == CallOutcome::None
    }

    /// Whether it has a hint.
    #[must_use]
    pub const fn has_hint(&self) -> bool {
        self.hint.is_some()
    }

    /// Whether the call was refused by a server that may not know of an earlier attempt.
    #[must_use]
    pub fn is_refused(&self) -> bool {
        self.call == CallOutcome::Refused
    }

    /// Marks that an earlier attempt of the call may have been executed.
    #[must_use]
    pub fn after_lost_answer(self) -> Self {
        Self {
            call: CallOutcome::Unknown,
            ..self
        }
    }

    /// Whether the control plane reported that nothing was handed out, and that nothing will be.
    #[must_use]
    pub fn is_withdrawn(&self) -> bool {
        self.call == CallOutcome::Withdrawn
    }

    /// Creates a failure from an error that no other exit code describes.
    pub fn from_error(error: impl Into<anyhow::Error>) -> Self {
        Self::new(Exit::Failed, error)
    }

    /// Creates a failure that no other exit code describes.
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(Exit::Failed, anyhow::Error::msg(message.into()))
    }

    /// Creates the failure of a command line that is not valid.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, anyhow::Error::msg(message.into()))
    }

    /// Adds before the cause what failed.
    #[must_use]
    pub fn context(self, message: impl Into<String>) -> Self {
        Self {
            error: self.error.context(message.into()),
            ..self
        }
    }

    /// Adds a hint: what to do about it.
    #[must_use]
    pub fn hint(self, hint: impl Into<String>) -> Self {
        Self {
            hint: Some(hint.into()),
            ..self
        }
    }

    /// Ends the command with `exit` instead.
    #[must_use]
    pub fn exit_with(self, exit: Exit) -> Self {
        Self { exit, ..self }
    }

    /// The exit code.
    #[must_use]
    pub const fn exit(&self) -> Exit {
        self.exit
    }

    /// The message with its causes and the hint, as lines for standard error.
    #[must_use]
    pub fn report(&self, colour: bool) -> String {
        let mut report = String::new();
        // The layers of a network stack repeat the texts of each other.
        let mut messages: Vec<String> = self.error.chain().map(ToString::to_string).collect();
        messages.dedup();
        for (at, message) in messages.iter().enumerate() {
            let label = if at == 0 {
                words::label("error:", words::Colour::Red, colour)
            } else {
                "  caused by:".to_owned()
            };
            let mut lines = message.lines().map(words::printable);
            let _ = writeln!(report, "{label} {}", lines.next().unwrap_or_default());
            // The causes are indented, so that no text of another party begins a line of the report.
            for line in lines {
                let _ = writeln!(report, "       {line}");
            }
        }
        if let Some(hint) = &self.hint {
            let label = words::label("hint:", words::Colour::Cyan, colour);
            let _ = writeln!(report, "{label} {}", words::printable_lines(hint));
        }
        report
    }
}

impl CallOutcome {
    /// Classifies a failed call. A gateway that loses the control plane answers in its place, with a code of the list below.
    /// If the control plane knows the state of the call, it reports it with [`OUTCOME`].
    fn of(status: &Status, broken: bool) -> Self {
        if let Some(outcome) = status.metadata().get(OUTCOME) {
            return if outcome == WITHDRAWN {
                Self::Withdrawn
            } else {
                Self::Committed
            };
        }
        match status.code() {
            _ if broken => Self::Unknown,
            Code::Cancelled
            | Code::Unknown
            | Code::DeadlineExceeded
            | Code::Aborted
            | Code::Internal
            | Code::Unavailable
            | Code::DataLoss => Self::Unknown,
            // No gateway answers with this code: no HTTP status is mapped to it (http-grpc-status-mapping of gRPC).
            Code::FailedPrecondition => Self::Settled,
            Code::Ok
            | Code::InvalidArgument
            | Code::NotFound
            | Code::AlreadyExists
            | Code::PermissionDenied
            | Code::ResourceExhausted
            | Code::OutOfRange
            | Code::Unimplemented
            | Code::Unauthenticated => Self::Refused,
        }
    }
}

impl From<Status> for Failure {
    fn from(status: Status) -> Self {
        // Only an error of the transport of tonic has a source; an answer of the server has none. A connection that breaks
        // during a call therefore counts as unreachable, with any code that tonic chooses for it.
        let broken = status.source().is_some();
        let exit = if broken {
            Exit::Unreachable
        } else {
            Exit::from_code(status.code())
        };
        let message = if broken {
            "the connection failed".to_owned()
        } else if status.message().is_empty() {
            status.code().description().to_owned()
        } else {
            status.message().to_owned()
        };
        let call = CallOutcome::of(&status, broken);
        let way_out = missing(&status).and_then(|missing| missing.way_out());
        let tls_in_answer = is_frame_of_impossible_size(&status);
        let failure = Self {
            call,
            ..Self::new(exit, CallError { message, status })
        };
        match exit {
            Exit::NotPermitted => failure.hint(
                "--token-file or RELATCH_TOKEN_FILE sets the file of the admin token; its role (viewer, issuer, revoker or admin) must permit the command",
            ),
            Exit::Unreachable if tls_in_answer => failure.hint(TRY_TLS),
            Exit::Unreachable => {
                failure.hint("check that it runs, and that --admin or RELATCH_ADMIN is its address")
            }
            Exit::TimedOut => failure.hint(way_out.unwrap_or_else(|| {
                "`relatch fleet` shows which sidecars lag".to_owned()
            })),
            Exit::Done
            | Exit::Failed
            | Exit::Usage
            | Exit::NotFound
            | Exit::Refused
            | Exit::SecretForgotten => failure,
        }
    }
}

/// Whether the server may expect TLS. Such a server answers plaintext with a TLS alert, whose first bytes look like the
/// length of a huge frame.
fn is_frame_of_impossible_size(status: &Status) -> bool {
    let mut cause = status.source();
    while let Some(error) = cause {
        let reason = error
            .downcast_ref::<h2::Error>()
            .and_then(h2::Error::reason);
        if reason == Some(h2::Reason::FRAME_SIZE_ERROR) {
            return true;
        }
        cause = error.source();
    }
    false
}

/// The sidecars that did not confirm.
fn missing(status: &Status) -> Option<BarrierView> {
    let bytes = status.metadata().get_bin(MISSING)?.to_bytes().ok()?;
    let barrier = admin::Barrier::decode(bytes).ok()?;
    Some(BarrierView::from(barrier))
}

impl fmt::Display for CallError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl Error for CallError {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.status.source()
    }
}

/// Returns a part that an answer must have.
///
/// # Errors
///
/// When the part is missing.
pub(crate) fn required<T>(part: Option<T>, what: &str) -> Result<T, Failure> {
    part.ok_or_else(|| Failure::failed(format!("the answer of the control plane lacks the {what}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_status_code_has_its_exit_code() {
        for (code, exit) in [
            (Code::Ok, 1),
            (Code::Cancelled, 1),
            (Code::Unknown, 1),
            (Code::InvalidArgument, 2),
            (Code::DeadlineExceeded, 5),
            (Code::NotFound, 3),
            (Code::AlreadyExists, 1),
            (Code::PermissionDenied, 6),
            (Code::ResourceExhausted, 1),
            (Code::FailedPrecondition, 4),
            (Code::Aborted, 1),
            (Code::OutOfRange, 1),
            (Code::Unimplemented, 1),
            (Code::Internal, 1),
            (Code::Unavailable, 7),
            (Code::DataLoss, 1),
            (Code::Unauthenticated, 6),
        ] {
            assert_eq!(Exit::from_code(code).code(), exit, "{code:?}");
        }
    }

    #[test]
    fn an_answer_is_judged_by_its_code_and_not_by_its_words() {
        let failure = Failure::from(Status::internal("not found: connection refused"));
        assert_eq!(failure.exit(), Exit::Failed);
        assert_eq!(
            failure.report(false),
            "error: not found: connection refused\n"
        );
    }

    #[test]
    fn a_connection_that_breaks_during_a_call_is_unreachable() {
        let broken = std::io::Error::from(std::io::ErrorKind::ConnectionReset);
        let status = Status::from_error(Box::new(broken));
        assert_eq!(status.code(), Code::Unknown);
        let failure = Failure::from(status);
        assert_eq!(failure.exit(), Exit::Unreachable);
        let report = failure.report(false);
        assert!(
            report.starts_with("error: the connection failed\n  caused by: connection reset\n"),
            "{report}"
        );
    }

    #[test]
    fn a_report_names_causes_and_hint_and_nothing_that_steers_a_terminal() {
        let failure = Failure::from(Status::failed_precondition("two\x1b[2J versions"))
            .context("cannot rotate the key")
            .hint("let one retire");
        assert_eq!(failure.exit(), Exit::Refused);
        assert_eq!(
            failure.report(false),
            "error: cannot rotate the key\n  caused by: two\u{fffd}[2J versions\nhint: let one retire\n"
        );
        assert!(failure.report(true).starts_with("\x1b[1;31merror:\x1b[0m "));
        let deceptive = Failure::failed("node \u{202e}1-egde").hint("see \u{2067}edge-1");
        assert_eq!(
            deceptive.report(false),
            "error: node \u{fffd}1-egde\nhint: see \u{fffd}edge-1\n"
        );
    }

    #[test]
    fn each_line_of_a_message_is_a_line_that_is_set_in() {
        let failure = Failure::usage("a.yaml:1:1: one\na.yaml:2:1: two\r\nhint: none");
        assert_eq!(
            failure.report(false),
            "error: a.yaml:1:1: one\n       a.yaml:2:1: two\n       hint: none\n"
        );
    }
}
