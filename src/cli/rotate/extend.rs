//! `relatch rotate extend`: moves the end of an overlap to a later time.

use std::time::Duration;

use clap::Args;
use serde::Serialize;

use crate::{
    cli::{
        Session,
        connection::answer,
        convert,
        failure::Failure,
        output::{self, View},
        value::{self, KeyIdParser},
        words,
    },
    key::{KeyId, Timestamp},
    proto::admin::{self, extend_overlap_request::To},
};

/// The arguments of `rotate extend`.
#[derive(Debug, Args)]
pub struct ExtendArgs {
    /// Key id: the 12 characters between the first two '_' of the key
    #[arg(value_name = "KEY_ID", value_parser = KeyIdParser)]
    key_id: KeyId,

    #[command(flatten)]
    to: ToArgs,

    /// Reason, recorded in the audit log
    #[arg(long, value_name = "TEXT")]
    reason: String,

    /// Version whose overlap to extend; required if several versions are retiring [default: the retiring version]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    version: Option<u32>,
}

/// The new end.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct ToArgs {
    /// New end (RFC 3339), for example 2027-01-31T12:00:00Z
    #[arg(long, value_name = "TIME")]
    until: Option<Timestamp>,

    /// Time to add to the current end, or to the current time if the end has passed, for example 3d
    #[arg(long, value_name = "DURATION", value_parser = value::positive_duration)]
    by: Option<Duration>,
}

/// The new end.
#[derive(Debug, Serialize)]
struct ExtendedView {
    keyring: String,
    key_id: String,
    version: u32,
    until: Option<Timestamp>,
    revision: u64,
}

pub(super) const EXAMPLES: &str = "\
Examples:
  relatch rotate extend 7Qm2Xc91TbKe --by 3d \\
    --reason 'acme deploys on Thursday'
  relatch rotate extend 7Qm2Xc91TbKe --until 2027-01-31T12:00:00Z \\
    --reason 'end of their freeze'

Exit codes of note: 4 no version of the key is retiring, or its overlap already
ends when the version expires.";

impl ExtendArgs {
    pub(super) async fn run(self, session: &Session) -> Result<(), Failure> {
        let asked = self.to.until;
        let mut admin = session.admin().await?;
        let extended = answer(admin.extend_overlap(self.into_request())).await?;
        let view = ExtendedView::from(extended);
        session.show(&view)?;
        if let Some(note) = view.note(asked) {
            session.output.note(&note);
        }
        Ok(())
    }

    fn into_request(self) -> admin::ExtendOverlapRequest {
        let until = self.to.until.map(convert::to_timestamp).map(To::Until);
        let by = self.to.by.map(convert::to_duration).map(To::By);
        admin::ExtendOverlapRequest {
            key_id: self.key_id.as_str().to_owned(),
            version: self.version.unwrap_or_default(),
            to: until.or(by),
            reason: self.reason,
        }
    }
}

impl ExtendedView {
    /// A note if the new end is not the requested one.
    fn note(&self, asked: Option<Timestamp>) -> Option<String> {
        let until = self
            .until
            .filter(|until| asked.is_some_and(|asked| *until < asked))?;
        Some(format!(
            "version {} expires at {}: its overlap cannot end later",
            self.version,
            words::time(Some(until))
        ))
    }
}

impl From<admin::ExtendOverlapResponse> for ExtendedView {
    fn from(extended: admin::ExtendOverlapResponse) -> Self {
        Self {
            keyring: extended.keyring,
            key_id: extended.key_id,
            version: extended.version,
            until: convert::timestamp(extended.until),
            revision: extended.revision,
        }
    }
}

impl View for ExtendedView {
    fn render(&self, _now: Timestamp) -> String {
        output::facts(&[
            ("KEYRING", self.keyring.clone()),
            ("KEY ID", self.key_id.clone()),
            ("VERSION", self.version.to_string()),
            ("OVERLAP UNTIL", words::time(self.until)),
            ("REVISION", self.revision.to_string()),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn view() -> ExtendedView {
        ExtendedView::from(admin::ExtendOverlapResponse {
            keyring: "payments".to_owned(),
            key_id: "7Qm2Xc91TbKe".to_owned(),
            version: 3,
            until: Some(prost_types::Timestamp {
                seconds: 1_798_761_600,
                nanos: 0,
            }),
            revision: 19,
        })
    }

    #[test]
    fn it_tells_the_new_end() {
        assert_eq!(
            serde_json::to_string(&view()).expect("serializable"),
            r#"{"keyring":"payments","key_id":"7Qm2Xc91TbKe","version":3,"until":"2027-01-01T00:00:00.000Z","revision":19}"#
        );
        let table = view().render(Timestamp::from_millis(0));
        assert!(
            table.contains("OVERLAP UNTIL  2027-01-01T00:00:00Z\n"),
            "{table}"
        );
    }

    #[test]
    fn an_end_before_the_one_that_was_asked_for_is_told() {
        let end = 1_798_761_600_000;
        let note = |asked| view().note(asked);
        assert_eq!(note(None), None);
        assert_eq!(note(Some(Timestamp::from_millis(end))), None);
        let later = note(Some(Timestamp::from_millis(end + 1))).expect("a note");
        assert!(later.contains("expires at 2027-01-01"), "{later}");
    }
}
