//! How a command ends: its exit code, and what it says when it failed.

use std::{
    error::Error,
    fmt::{self, Write as _},
    process::ExitCode,
};

use prost::Message as _;
use tonic::{Code, Status};

use super::{barrier::BarrierView, words};
use crate::proto::{MISSING, OUTCOME, WITHDRAWN, admin};

/// The exit codes. Scripts rely on them, so that a number never changes its meaning.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Exit {
    /// Done.
    Done = 0,
    /// Failed in a way that no other code says; also a denied `check` and a broken audit log.
    Failed = 1,
    /// The command line, or a value on it, cannot be.
    Usage = 2,
    /// What the command speaks of does not exist.
    NotFound = 3,
    /// A safety check refused it.
    Refused = 4,
    /// Not every sidecar that may serve has confirmed: not in time, or not before Ctrl-C.
    TimedOut = 5,
    /// The token is not known, or its role does not permit it.
    NotPermitted = 6,
    /// The control plane, or for `check` the sidecar, cannot be reached.
    Unreachable = 7,
    /// An earlier call with the same idempotency key did it, and the secret that it handed out is forgotten.
    SecretForgotten = 8,
}

/// Why a command did not do what it was asked, with the [`Exit`] that says so and a hint for people.
#[derive(Debug)]
pub struct Failure {
    exit: Exit,
    error: anyhow::Error,
    hint: Option<String>,
    /// What is known of the call that failed.
    call: CallOutcome,
}

/// What is known of a call that failed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum CallOutcome {
    /// There was none: the failure is of this machine.
    #[default]
    None,
    /// The control plane, or a gateway before it, refused it.
    Refused,
    /// The control plane refused it and knows of it: it says what stands.
    Settled,
    /// The control plane says that its change is committed, and that not every sidecar has confirmed it.
    Committed,
    /// The control plane says that it has handed out nothing.
    Withdrawn,
    /// No answer of the control plane came: the call may have been carried out.
    Unknown,
}

/// A call that the other side refused, or that never reached it.
#[derive(Debug)]
struct CallError {
    message: String,
    status: Status,
}

/// What to do about an answer that does not read as HTTP/2.
const TRY_TLS: &str = "the server may expect TLS: try https://";

impl Exit {
    /// What the code of a gRPC error means for the command line. An error that calls itself `Ok` is still an error.
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
    /// A failure that ends the command with `exit`.
    pub fn new(exit: Exit, error: impl Into<anyhow::Error>) -> Self {
        Self {
            exit,
            error: error.into(),
            hint: None,
            call: CallOutcome::default(),
        }
    }

    /// A call that was not answered in time.
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

    /// Whether the call may have been carried out, though no answer of the control plane says so.
    #[must_use]
    pub fn is_answer_lost(&self) -> bool {
        self.call == CallOutcome::Unknown
    }

    /// Whether no call has failed, but something on this machine.
    #[must_use]
    pub fn is_local(&self) -> bool {
        self.call == CallOutcome::None
    }

    /// Whether it says what to do about it.
    #[must_use]
    pub const fn has_hint(&self) -> bool {
        self.hint.is_some()
    }

    /// Whether the call was refused by somebody who may not know of an earlier attempt.
    #[must_use]
    pub fn is_refused(&self) -> bool {
        self.call == CallOutcome::Refused
    }

    /// The failure of a call of which an earlier attempt may have been carried out.
    #[must_use]
    pub fn after_lost_answer(self) -> Self {
        Self {
            call: CallOutcome::Unknown,
            ..self
        }
    }

    /// Whether the control plane says that nothing was handed out, and that nothing will be.
    #[must_use]
    pub fn is_withdrawn(&self) -> bool {
        self.call == CallOutcome::Withdrawn
    }

    /// An error that no other exit code describes.
    pub fn from_error(error: impl Into<anyhow::Error>) -> Self {
        Self::new(Exit::Failed, error)
    }

    /// A failure that no other exit code describes.
    pub fn failed(message: impl Into<String>) -> Self {
        Self::new(Exit::Failed, anyhow::Error::msg(message.into()))
    }

    /// A command line that cannot be carried out as it stands.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, anyhow::Error::msg(message.into()))
    }

    /// Says before the cause what it was that failed.
    #[must_use]
    pub fn context(self, message: impl Into<String>) -> Self {
        Self {
            error: self.error.context(message.into()),
            ..self
        }
    }

    /// Says what to do about it.
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
        // Layers of a network stack repeat each other's words.
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
            // Set in, so that nothing that another party wrote begins a line of the report.
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
    /// A gateway in between answers for a control plane that it lost, with a code of this list. The control plane itself
    /// says with [`OUTCOME`] when it knows better.
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
            // No gateway makes it of an HTTP status (gRPC's http-grpc-status-mapping).
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
        // Only what tonic's own transport reports has a source; what the other side answered arrives without one. So a
        // connection that breaks in the middle of a call counts as unreachable, whatever code tonic chose for it.
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

/// A server that expects TLS answers plaintext with a TLS alert, whose first bytes read as the length of a huge frame.
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

/// Who was waited for in vain.
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

/// What an answer must hold.
///
/// # Errors
///
/// When it does not.
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
