//! `relatch rotate rollback`: makes the previous version active again.

use std::time::Duration;

use clap::Args;
use serde::Serialize;
use tonic::Streaming;

use crate::{
    cli::{
        Session,
        barrier::BarrierView,
        convert,
        failure::{Exit, Failure},
        output::{self, Format, View},
        pass_by::PassByArgs,
        value::{self, KeyIdParser},
        watch::{Stopped, patience, watch},
        words,
    },
    key::{KeyId, Timestamp},
    proto::admin,
};

/// The arguments of `rotate rollback`.
#[derive(Debug, Args)]
pub struct RollbackArgs {
    /// Key id: the 12 characters between the first two '_' of the key
    #[arg(value_name = "KEY_ID", value_parser = KeyIdParser)]
    key_id: KeyId,

    /// Reason, recorded in the audit log
    #[arg(long, value_name = "TEXT")]
    reason: String,

    /// Wait until every sidecar that may serve has confirmed, and report how long that took
    #[arg(long)]
    wait: bool,

    /// Maximum time for --wait [default: 1m for connected sidecars, and until lost sidecars can no longer serve]
    #[arg(long, value_name = "DURATION", value_parser = value::positive_duration, requires = "wait")]
    timeout: Option<Duration>,

    #[command(flatten)]
    pass_by: PassByArgs,
}

/// A step of a roll-back, a line of JSON each. The last is `rolled_back`.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum RollbackEvent {
    /// The roll-back is committed; the number of sidecars that have confirmed it.
    Barrier(RolledBackView),
    /// The roll-back is done; with `--wait`, every sidecar has confirmed it.
    RolledBack(RolledBackView),
}

/// The version that is active again, and the state of the version that had replaced it.
#[derive(Clone, Debug, Serialize)]
struct RolledBackView {
    keyring: String,
    key_id: String,
    /// The version that is active again.
    version: u32,
    /// The version that is retiring now; null for none.
    replaced_version: Option<u32>,
    /// The end of its overlap.
    replaced_until: Option<Timestamp>,
    revision: u64,
    #[serde(flatten)]
    barrier: BarrierView,
    /// The time from the commit to the confirmation of the last sidecar; null without `--wait`.
    propagation_seconds: Option<f64>,
}

pub(super) const EXAMPLES: &str = "\
Example:
  Roll back to the old version, and wait until every sidecar has confirmed:
    relatch rotate rollback 7Qm2Xc91TbKe --reason 'acme cannot deploy' --wait

The new version stays accepted and retires on evidence, as the old one would
have; to end it immediately, use `relatch revoke`. A committed roll-back stays
in effect, even if --wait ends with exit code 5.

Exit codes of note: 4 no former version can become active again.";

impl RollbackArgs {
    pub(super) async fn run(self, session: &Session) -> Result<(), Failure> {
        let mut admin = session.admin().await?;
        let mut committed = None;
        let (patience, wait) = (patience(self.timeout), self.wait);
        let rollback = async {
            let events = admin.roll_back(self.into_request()).await?;
            follow(events.into_inner(), &mut committed, wait, session).await
        };
        match watch(patience, rollback).await {
            Ok(()) => Ok(()),
            Err(Stopped::Failed(failure)) => {
                Err(explain(failure, committed.as_ref(), session.now()))
            }
            Err(Stopped::Interrupted) => {
                let exit = match committed {
                    Some(_) => Exit::TimedOut,
                    None => Exit::Failed,
                };
                Err(explain(
                    Failure::failed("interrupted while waiting for sidecars").exit_with(exit),
                    committed.as_ref(),
                    session.now(),
                ))
            }
        }
    }

    fn into_request(self) -> admin::RollBackRequest {
        admin::RollBackRequest {
            key_id: self.key_id.as_str().to_owned(),
            reason: self.reason,
            wait: self.wait,
            timeout: self.timeout.map(convert::to_duration),
            pass_by: self.pass_by.into_request(),
        }
    }
}

async fn follow(
    mut events: Streaming<admin::RollBackResponse>,
    committed: &mut Option<RolledBackView>,
    waited: bool,
    session: &Session,
) -> Result<(), Failure> {
    let mut progress = session.output.progress();
    while let Some(event) = events.message().await? {
        let done = event.done;
        let view = RolledBackView::from(event);
        if done {
            drop(progress);
            return finish(view, waited, session);
        }
        let sentence = view.barrier.sentence(session.now());
        *committed = Some(view.clone());
        session.report(&mut progress, &RollbackEvent::Barrier(view), &sentence)?;
    }
    Err(Failure::failed(
        "the control plane closed the call before it was complete",
    ))
}

fn finish(view: RolledBackView, waited: bool, session: &Session) -> Result<(), Failure> {
    match session.output.format() {
        Format::Json => session.output.event(&RollbackEvent::RolledBack(view)),
        Format::Table => {
            session.show(&view)?;
            if waited {
                session.output.note(&view.propagation(session.now()));
            }
            if let Some(replaced) = view.replaced() {
                session.output.note(&replaced);
            }
            Ok(())
        }
    }
}

/// Adds to the failure that the roll-back is committed, and which sidecars lag.
fn explain(failure: Failure, committed: Option<&RolledBackView>, now: Timestamp) -> Failure {
    let Some(view) = committed else {
        return failure;
    };
    failure
        .context(format!(
            "the roll-back is committed as revision {} of keyring {}, but not every sidecar has confirmed it",
            view.revision, view.keyring
        ))
        .hint(view.barrier.hint(now))
}

impl RolledBackView {
    fn propagation(&self, now: Timestamp) -> String {
        let mut sentence = self.barrier.sentence(now);
        if let Some(seconds) = self.propagation_seconds {
            let took = Duration::try_from_secs_f64(seconds).unwrap_or_default();
            sentence = format!("{sentence}; the last one after {}", words::took(took));
        }
        sentence
    }

    /// A sentence on the version that had replaced it.
    fn replaced(&self) -> Option<String> {
        let replaced = self.replaced_version?;
        let until = self.replaced_until.map_or_else(String::new, |until| {
            format!(" after its overlap ends at {}", words::time(Some(until)))
        });
        Some(format!(
            "version {replaced} stays accepted and retires{until}, on evidence that nobody uses it; `relatch rotate status {}` shows the progress",
            self.key_id
        ))
    }
}

impl From<admin::RollBackResponse> for RolledBackView {
    fn from(response: admin::RollBackResponse) -> Self {
        Self {
            keyring: response.keyring,
            key_id: response.key_id,
            version: response.version,
            replaced_version: Some(response.replaced_version).filter(|&version| version != 0),
            replaced_until: convert::timestamp(response.replaced_until),
            revision: response.revision,
            barrier: response.barrier.unwrap_or_default().into(),
            propagation_seconds: convert::duration(response.propagation).map(|d| d.as_secs_f64()),
        }
    }
}

impl View for RolledBackView {
    fn render(&self, _now: Timestamp) -> String {
        let replaced = self.replaced_version.map(|version| version.to_string());
        output::facts(&[
            ("KEYRING", self.keyring.clone()),
            ("KEY ID", self.key_id.clone()),
            ("ACTIVE AGAIN", self.version.to_string()),
            (
                "RETIRING",
                replaced.unwrap_or_else(|| words::NOTHING.to_owned()),
            ),
            ("OVERLAP UNTIL", words::time(self.replaced_until)),
            ("REVISION", self.revision.to_string()),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn response(done: bool) -> admin::RollBackResponse {
        admin::RollBackResponse {
            keyring: "payments".to_owned(),
            key_id: "7Qm2Xc91TbKe".to_owned(),
            version: 3,
            replaced_version: 4,
            replaced_until: Some(prost_types::Timestamp {
                seconds: 1_798_761_600,
                nanos: 0,
            }),
            revision: 19,
            barrier: Some(admin::Barrier {
                applied: if done { 2 } else { 1 },
                total: 2,
                laggards: (!done)
                    .then(|| admin::Laggard {
                        node: "edge-3".to_owned(),
                        behind: 1,
                        ..admin::Laggard::default()
                    })
                    .into_iter()
                    .collect(),
                passed_by: Vec::new(),
            }),
            done,
            propagation: done.then_some(prost_types::Duration {
                seconds: 0,
                nanos: 38_000_000,
            }),
        }
    }

    #[test]
    fn the_last_line_of_json_says_what_is_active_again() {
        let event = RollbackEvent::RolledBack(response(true).into());
        assert_eq!(
            serde_json::to_string(&event).expect("serializable"),
            concat!(
                r#"{"event":"rolled_back","keyring":"payments","key_id":"7Qm2Xc91TbKe","version":3,"replaced_version":4,"#,
                r#""replaced_until":"2027-01-01T00:00:00.000Z","revision":19,"applied":2,"total":2,"laggards":[],"#,
                r#""propagation_seconds":0.038}"#,
            )
        );
    }

    #[test]
    fn it_says_plainly_that_the_replaced_version_is_still_accepted() {
        let view = RolledBackView::from(response(true));
        let said = view.replaced().expect("one was replaced");
        assert!(
            said.starts_with("version 4 stays accepted and retires after its overlap"),
            "{said}"
        );
        assert_eq!(
            view.propagation(Timestamp::from_millis(0)),
            "2 of 2 sidecars confirmed; the last one after 38 ms"
        );
        let alone = RolledBackView {
            replaced_version: None,
            ..view
        };
        assert_eq!(alone.replaced(), None);
    }

    #[test]
    fn a_timeout_says_that_the_roll_back_stands() {
        let committed = RolledBackView::from(response(false));
        let timed_out = tonic::Status::deadline_exceeded("1 of 2 sidecars confirmed");
        let failure = explain(
            timed_out.into(),
            Some(&committed),
            Timestamp::from_millis(0),
        );
        assert_eq!(failure.exit(), Exit::TimedOut);
        let report = failure.report(false);
        assert!(
            report.contains("the roll-back is committed as revision 19"),
            "{report}"
        );
        assert!(
            report.contains("hint: edge-3 is 1 revision behind"),
            "{report}"
        );
    }
}
