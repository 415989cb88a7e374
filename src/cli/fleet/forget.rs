//! `relatch fleet forget`: declares that a sidecar no longer serves, so that no command waits for it.

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
    /// Node id of the sidecar
    node: String,

    /// Forget only this process: `run_id` in `relatch fleet -o json` [default: every process that is not connected]
    #[arg(long, value_name = "ID")]
    run: Option<String>,

    /// Reason, recorded in the audit log
    #[arg(long, value_name = "TEXT")]
    reason: String,
}

/// The processes that were forgotten.
#[derive(Debug, Serialize)]
struct ForgottenView {
    forgotten: Vec<RunView>,
}

const EXAMPLES: &str = "\
Example:
  A node was removed from the cluster, together with its disk:
    relatch fleet forget edge-3 --reason 'node deleted, see INC-1043'

Do this only if the process has ended and its snapshot file cannot be used
again. A sidecar that has only lost its connection continues to accept keys that
you revoke until its time is up; `relatch fleet` shows when that is. If the
sidecar comes back, it starts over, and the control plane logs an error.";

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
