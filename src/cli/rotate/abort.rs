//! `relatch rotate abort`: ends a rotation before its hand-over.

use clap::Args;
use serde::Serialize;

use crate::{
    cli::{
        Session,
        connection::answer,
        failure::Failure,
        output::{self, View},
        value::KeyIdParser,
    },
    key::{KeyId, Timestamp},
    proto::admin,
};

/// The arguments of `rotate abort`.
#[derive(Debug, Args)]
pub struct AbortArgs {
    /// Key id: the 12 characters between the first two '_' of the key
    #[arg(value_name = "KEY_ID", value_parser = KeyIdParser)]
    key_id: KeyId,

    /// Reason, recorded in the audit log
    #[arg(long, value_name = "TEXT")]
    reason: String,
}

/// The version that was withdrawn.
#[derive(Debug, Serialize)]
struct AbortedView {
    keyring: String,
    key_id: String,
    version: u32,
    revision: u64,
}

pub(super) const EXAMPLES: &str = "\
Example:
  Abort a rotation that waits for a sidecar that will not come back:
    relatch rotate abort 7Qm2Xc91TbKe --reason 'edge-3 is being replaced'

Exit codes of note: 4 no version of the key is staged.";

impl AbortArgs {
    pub(super) async fn run(self, session: &Session) -> Result<(), Failure> {
        let mut admin = session.admin().await?;
        let request = admin::AbortRotationRequest {
            key_id: self.key_id.as_str().to_owned(),
            reason: self.reason,
        };
        let aborted = answer(admin.abort_rotation(request)).await?;
        session.show(&AbortedView::from(aborted))
    }
}

impl From<admin::AbortRotationResponse> for AbortedView {
    fn from(aborted: admin::AbortRotationResponse) -> Self {
        Self {
            keyring: aborted.keyring,
            key_id: aborted.key_id,
            version: aborted.version,
            revision: aborted.revision,
        }
    }
}

impl View for AbortedView {
    fn render(&self, _now: Timestamp) -> String {
        output::facts(&[
            ("KEYRING", self.keyring.clone()),
            ("KEY ID", self.key_id.clone()),
            ("WITHDRAWN", self.version.to_string()),
            ("REVISION", self.revision.to_string()),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_tells_which_version_was_withdrawn() {
        let view = AbortedView::from(admin::AbortRotationResponse {
            keyring: "payments".to_owned(),
            key_id: "7Qm2Xc91TbKe".to_owned(),
            version: 4,
            revision: 19,
        });
        assert_eq!(
            serde_json::to_string(&view).expect("serializable"),
            r#"{"keyring":"payments","key_id":"7Qm2Xc91TbKe","version":4,"revision":19}"#
        );
        assert_eq!(
            view.render(Timestamp::from_millis(0)),
            "KEYRING    payments\nKEY ID     7Qm2Xc91TbKe\nWITHDRAWN  4\nREVISION   19\n"
        );
    }
}
