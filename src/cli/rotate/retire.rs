//! `relatch rotate retire`: retires an old version before its overlap ends.

use clap::Args;
use serde::Serialize;

use crate::{
    cli::{
        Session,
        connection::answer,
        failure::{Exit, Failure},
        output::{self, View},
        value::KeyIdParser,
    },
    key::{KeyId, Timestamp},
    proto::admin,
};

/// The arguments of `rotate retire`.
#[derive(Debug, Args)]
pub struct RetireArgs {
    /// Key id: the 12 characters between the first two '_' of the key
    #[arg(value_name = "KEY_ID", value_parser = KeyIdParser)]
    key_id: KeyId,

    /// Version to retire; required if several versions are retiring [default: the retiring version]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    version: Option<u32>,

    /// Retire the version even if it may be in use; requires role revoker or admin
    #[arg(long, requires = "reason")]
    force: bool,

    /// Reason for --force, recorded in the audit log [default: none]
    #[arg(long, value_name = "TEXT", requires = "force")]
    reason: Option<String>,
}

/// The version that was retired, and the reason.
#[derive(Debug, Serialize)]
struct RetiredView {
    keyring: String,
    key_id: String,
    version: u32,
    revision: u64,
    /// The reason in the audit log.
    reason: String,
}

pub(super) const EXAMPLES: &str = "\
Examples:
  Retire the old version if the evidence shows that nobody uses it:
    relatch rotate retire 7Qm2Xc91TbKe

  Retire it although it is still used:
    relatch rotate retire 7Qm2Xc91TbKe --force \\
      --reason 'the consumer was told twice'

Exit codes of note: 4 the version may be in use; `relatch usage` shows by whom.";

impl RetireArgs {
    pub(super) async fn run(self, session: &Session) -> Result<(), Failure> {
        let key_id = self.key_id;
        let mut admin = session.admin().await?;
        let retired = answer(admin.retire_version(self.into_request())).await;
        let retired = retired.map_err(|failure| explain(failure, key_id))?;
        session.show(&RetiredView::from(retired))
    }

    fn into_request(self) -> admin::RetireVersionRequest {
        admin::RetireVersionRequest {
            key_id: self.key_id.as_str().to_owned(),
            version: self.version.unwrap_or_default(),
            force: self.force,
            reason: self.reason.unwrap_or_default(),
        }
    }
}

/// Adds a hint to a refusal: the commands that show who uses the version.
fn explain(failure: Failure, key_id: KeyId) -> Failure {
    match failure.exit() {
        Exit::Refused => failure.hint(format!(
            "`relatch usage {key_id}` shows who uses which version, `relatch rotate status {key_id}` shows what the rotation waits for"
        )),
        Exit::Done
        | Exit::Failed
        | Exit::Usage
        | Exit::NotFound
        | Exit::TimedOut
        | Exit::NotPermitted
        | Exit::Unreachable
        | Exit::SecretForgotten => failure,
    }
}

impl From<admin::RetireVersionResponse> for RetiredView {
    fn from(retired: admin::RetireVersionResponse) -> Self {
        Self {
            keyring: retired.keyring,
            key_id: retired.key_id,
            version: retired.version,
            revision: retired.revision,
            reason: retired.reason,
        }
    }
}

impl View for RetiredView {
    fn render(&self, _now: Timestamp) -> String {
        output::facts(&[
            ("KEYRING", self.keyring.clone()),
            ("KEY ID", self.key_id.clone()),
            ("RETIRED", self.version.to_string()),
            ("REASON", self.reason.clone()),
            ("REVISION", self.revision.to_string()),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key_id() -> KeyId {
        "7Qm2Xc91TbKe".parse().expect("a key id")
    }

    #[test]
    fn it_tells_on_which_grounds_the_version_was_retired() {
        let view = RetiredView::from(admin::RetireVersionResponse {
            keyring: "payments".to_owned(),
            key_id: "7Qm2Xc91TbKe".to_owned(),
            version: 3,
            revision: 19,
            reason: "by an operator; it was not used since 2026-01-01T00:00:00.000Z".to_owned(),
        });
        assert_eq!(
            serde_json::to_string(&view).expect("serializable"),
            concat!(
                r#"{"keyring":"payments","key_id":"7Qm2Xc91TbKe","version":3,"revision":19,"#,
                r#""reason":"by an operator; it was not used since 2026-01-01T00:00:00.000Z"}"#,
            )
        );
        let table = view.render(Timestamp::from_millis(0));
        assert!(table.contains("\nRETIRED   3\nREASON    by an"), "{table}");
    }

    #[test]
    fn a_refusal_keeps_who_uses_it_and_leads_on() {
        let refused = tonic::Status::failed_precondition("version 3 may be in use: by 10.0.0.1");
        let failure = explain(refused.into(), key_id());
        assert_eq!(failure.exit(), Exit::Refused);
        let report = failure.report(false);
        assert!(
            report.contains("by 10.0.0.1\nhint: `relatch usage 7Qm2Xc91TbKe`"),
            "{report}"
        );
        let missing = explain(tonic::Status::not_found("no key").into(), key_id());
        assert_eq!(missing.report(false), "error: no key\n");
    }
}
