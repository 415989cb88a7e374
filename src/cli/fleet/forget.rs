//! `relatch fleet forget`: nobody waits for a sidecar that is gone for good.

use clap::Args;
use serde::Serialize;

use crate::{
    cli::{
        Session,
        barrier::RunView,
        connection::answer,
        failure::Failure,
        output::{View, facts},
        words,
    },
    key::Timestamp,
    proto::admin,
};

/// The arguments of `fleet forget`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct ForgetArgs {
    /// The sidecar's node id
    node: String,

    /// Only this process of it, as `relatch fleet -o json` names it in `run_id` [default: every one that is not connected]
    #[arg(long, value_name = "ID")]
    run: Option<String>,

    /// Why; it is kept in the audit log
    #[arg(long, value_name = "TEXT")]
    reason: String,
}

/// The processes for which nobody waits any more.
#[derive(Debug, Serialize)]
struct ForgottenView {
    forgotten: Vec<RunView>,
}

const EXAMPLES: &str = "\
Example:
  A node was taken out of the cluster, and its disk with it:
    relatch fleet forget edge-3 --reason 'node deleted, see INC-1043'

Only do this when the process has ended and its snapshot file cannot be used again: a sidecar that
is merely cut off goes on accepting what you revoke, until its time is up. `relatch fleet` shows
until when that is. A sidecar that comes back begins anew, and the control plane logs an error.";

impl ForgetArgs {
    pub(super) async fn run(self, session: &Session) -> Result<(), Failure> {
        let mut admin = session.admin().await?;
        let request = admin::ForgetSidecarRequest {
            node: self.node,
            run_id: self.run.unwrap_or_default(),
            reason: self.reason,
        };
        let forgotten = answer(admin.forget_sidecar(request)).await?.forgotten;
        session.show(&ForgottenView {
            forgotten: forgotten.into_iter().map(Into::into).collect(),
        })
    }
}

impl View for ForgottenView {
    fn render(&self, _now: Timestamp) -> String {
        let runs = self.forgotten.iter();
        let runs: Vec<String> = runs
            .map(|run| format!("{} (run {})", run.node, run.run_id))
            .collect();
        facts(&[("FORGOTTEN", words::or_nothing(&runs.join(", ")))])
    }
}
