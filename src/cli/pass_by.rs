//! Sidecars for which a command does not wait.

use clap::Args;

use crate::proto::admin;

/// The arguments that name these sidecars.
#[derive(Clone, Debug, Default, Args)]
pub(crate) struct PassByArgs {
    /// Do not wait for this sidecar, although it may still serve; may be repeated [default: wait for every sidecar]
    #[arg(long, value_name = "NODE")]
    without: Vec<String>,

    /// Do not wait for sidecars that are lost or stopped, although they may still serve
    #[arg(long)]
    without_lost: bool,
}

impl PassByArgs {
    /// The message of the admin API; none if the command waits for all sidecars.
    #[must_use]
    pub(crate) fn into_request(self) -> Option<admin::PassBy> {
        let Self {
            without,
            without_lost,
        } = self;
        (without_lost || !without.is_empty()).then_some(admin::PassBy {
            nodes: without,
            lost: without_lost,
        })
    }
}
