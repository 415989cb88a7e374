//! `relatch rotate`: starts, shows and changes rotations of keys.

mod abort;
mod extend;
mod retire;
mod rollback;
mod start;
mod status;

use clap::Subcommand;

use super::{Session, failure::Failure};

/// The commands of `rotate`.
#[derive(Debug, Subcommand)]
pub enum RotateCommand {
    /// Create the next version of a key, and hand it out when every sidecar accepts it
    ///
    /// The control plane stages a new version and pushes it to the sidecars. When every sidecar that may serve has
    /// confirmed that it accepts the version, the secret is printed once, and the old version begins to retire. Both
    /// versions are accepted during the overlap, so the consumer can switch without a failed request. `relatch rotate
    /// status` shows how much of the traffic has switched.
    ///
    /// If sidecars do not confirm in time, or if you press Ctrl-C before the hand-over, the version is withdrawn, no
    /// secret is handed out, and the exit code is 5.
    ///
    /// With --emergency the old version is revoked at the hand-over and does not retire. Use it for a leaked key: requests
    /// are denied until the consumer uses the new version. It requires a token with role admin.
    ///
    /// With -o json each event is a line: `staged`, then `barrier` for each step of progress, then `handed_over` with the
    /// new key.
    #[command(after_help = start::EXAMPLES)]
    Start(start::StartArgs),
    /// Show the progress of a key's rotation, and what it waits for
    ///
    /// The status shows the phase, the share of recent traffic for each version, when the old version was last used and by
    /// whom, when its overlap ends and what the policy does then, and what keeps it from retiring now. If sidecars have
    /// not reported all requests, it names them.
    ///
    /// With --watch the command continues until the key has no rotation in progress, also across a restart of the control
    /// plane. With --watch and -o json each change is a line: `status`, and `ended` as the last.
    #[command(after_help = status::EXAMPLES)]
    Status(status::StatusArgs),
    /// Retire an unused old version before its overlap ends
    ///
    /// A retiring version retires automatically when its overlap is over and nobody uses it. This command retires it
    /// earlier, on the same evidence. Without that evidence the command is refused with exit code 4 and names who still
    /// uses the version. With --force the version retires anyway, and the audit log records the reason.
    #[command(after_help = retire::EXAMPLES)]
    Retire(retire::RetireArgs),
    /// Move the end of an overlap to a later time
    ///
    /// Use it if a consumer needs more time to switch. The overlap of a version cannot end after the version expires.
    // The usage that clap generates is wider than a terminal.
    #[command(
        after_help = extend::EXAMPLES,
        override_usage = "relatch rotate extend [OPTIONS] <KEY_ID> --reason <TEXT>\n    \
                          <--until <TIME>|--by <DURATION>>"
    )]
    Extend(extend::ExtendArgs),
    /// Make the last replaced version active again
    ///
    /// Use it if a consumer cannot use its new key. The former version becomes active again. The version that replaced it
    /// stays accepted and retires on evidence, so that no caller that has already switched is denied. A revoked version
    /// never becomes active again.
    ///
    /// With -o json and --wait each step is a line: `barrier`, then `rolled_back`.
    #[command(after_help = rollback::EXAMPLES)]
    Rollback(rollback::RollbackArgs),
    /// Abort a rotation before its hand-over
    ///
    /// The staged version is withdrawn, and the `relatch rotate start` that waits for sidecars fails. To undo a rotation
    /// after its hand-over, use `relatch rotate rollback`.
    #[command(after_help = abort::EXAMPLES)]
    Abort(abort::AbortArgs),
}

impl RotateCommand {
    /// Runs the command.
    ///
    /// # Errors
    ///
    /// When the control plane cannot be reached or refuses, when sidecars do not confirm in time, or on Ctrl-C before
    /// the end.
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        match self {
            Self::Start(args) => args.run(session).await,
            Self::Status(args) => args.run(session).await,
            Self::Retire(args) => args.run(session).await,
            Self::Extend(args) => args.run(session).await,
            Self::Rollback(args) => args.run(session).await,
            Self::Abort(args) => args.run(session).await,
        }
    }
}
