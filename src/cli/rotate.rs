//! `relatch rotate`: from one version of a key to the next, and what may become necessary on the way.

mod abort;
mod extend;
mod retire;
mod rollback;
mod start;
mod status;

use clap::Subcommand;

use super::{Session, failure::Failure};

/// What can be done with rotations.
#[derive(Debug, Subcommand)]
pub enum RotateCommand {
    /// Make the next version of a key, and hand it out once every sidecar accepts it
    ///
    /// A new version is staged and pushed to the sidecars. Only when every sidecar that may serve has confirmed that it
    /// accepts it is its secret printed, once, and the old version begins to retire: both are accepted during the overlap,
    /// so that the consumer can switch without a failed request. `relatch rotate status` shows how far it has switched.
    ///
    /// When sidecars do not confirm in time, or after Ctrl-C before the hand-over, the version is withdrawn, nothing was
    /// handed out, and the exit code is 5.
    ///
    /// With --emergency the old version is revoked at the hand-over instead of retiring: for a key that has leaked, at
    /// the price of denied requests until its consumer has the new one. It needs a token with role admin.
    ///
    /// With -o json each event is a line: `staged`, then `barrier` for each step of the progress, then `handed_over`
    /// with the new key.
    #[command(after_help = start::EXAMPLES)]
    Start(start::StartArgs),
    /// Show how far the rotation of a key is, and what it waits for
    ///
    /// It tells the phase, which share of the recent traffic uses which version, when the old version was used last and
    /// by whom, when its overlap ends and what the policy does then, and what keeps it from retiring now. Where sidecars
    /// have not told of all requests, it says which.
    ///
    /// With --watch it goes on until no rotation of the key is under way any more, also over a restart of the control
    /// plane. With -o json each change is a line then: `status`, and `ended` as the last.
    #[command(after_help = status::EXAMPLES)]
    Status(status::StatusArgs),
    /// End an old version now that nobody uses it any more
    ///
    /// A retiring version retires by itself when its overlap is over and nobody uses it. This ends it before, on the
    /// same evidence: without it the command is refused with exit code 4, and names who still uses the version. With
    /// --force it ends all the same, which the audit log keeps with the reason.
    #[command(after_help = retire::EXAMPLES)]
    Retire(retire::RetireArgs),
    /// Move the end of an overlap to a later time
    ///
    /// For a consumer that needs longer to switch. The overlap of a version cannot outlast the version's own expiry.
    #[command(after_help = extend::EXAMPLES)]
    Extend(extend::ExtendArgs),
    /// Make the version that was replaced last the one to use again
    ///
    /// For a consumer that cannot use its new key. The former version is active again; the version that had replaced it
    /// goes on to be accepted and retires on evidence, so that nobody who has switched already is denied. A version that
    /// was revoked never comes back.
    ///
    /// With -o json and --wait each step is a line: `barrier`, then `rolled_back`.
    #[command(after_help = rollback::EXAMPLES)]
    Rollback(rollback::RollbackArgs),
    /// Give up a rotation before its hand-over
    ///
    /// The version that is being staged is withdrawn, and the `relatch rotate start` that waits for sidecars fails. What
    /// was handed out already is undone by `relatch rotate rollback`.
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
