//! `relatch revoke`: revokes versions of a key, immediately and permanently.

use std::time::Duration;

use clap::Args;
use serde::Serialize;
use tonic::Streaming;

use super::{
    Session,
    barrier::BarrierView,
    convert,
    failure::{Exit, Failure},
    output::{self, Format, View},
    pass_by::PassByArgs,
    value::{self, KeyIdParser},
    watch::{Stopped, patience, watch},
    words,
};
use crate::{
    key::{KeyId, Timestamp},
    proto::admin::{self, revoke_request::Which},
};

/// The arguments of `revoke`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct RevokeArgs {
    /// Key id: the 12 characters between the first two '_' of the key
    #[arg(value_name = "KEY_ID", value_parser = KeyIdParser)]
    key_id: KeyId,

    #[command(flatten)]
    which: WhichArgs,

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

/// The versions to revoke.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct WhichArgs {
    /// Number of the version to revoke
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    version: Option<u32>,

    /// Revoke every version: the key can no longer be used
    #[arg(long)]
    all: bool,
}

/// A step of a revocation, a line of JSON each. The last is `revoked`.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum RevocationEvent {
    /// The revocation is committed; the number of sidecars that have confirmed it.
    Barrier(RevocationView),
    /// The revocation is done; with `--wait`, every sidecar has confirmed it.
    Revoked(RevocationView),
}

/// The revoked versions, and the sidecars that have applied the revocation.
#[derive(Clone, Debug, Serialize)]
struct RevocationView {
    keyring: String,
    key_id: String,
    versions: Vec<u32>,
    revision: u64,
    #[serde(flatten)]
    barrier: BarrierView,
    /// The time from the commit to the confirmation of the last sidecar; null without `--wait`.
    propagation_seconds: Option<f64>,
}

/// What the confirmation of every sidecar does not mean.
const OPEN_STREAMS: &str = "streams that were open before stay open until they end, or until Envoy's max_stream_duration ends them";

const EXAMPLES: &str = "\
Examples:
  Revoke one leaked version, and wait until no sidecar accepts it:
    relatch revoke 7Qm2Xc91TbKe --version 3 --wait \\
      --reason 'found in a public repository'

  Revoke all versions of a key:
    relatch revoke 7Qm2Xc91TbKe --all --reason 'contract ended'

relatch judges a request once, at its start: WebSockets and other streams that
are open when their key is revoked stay open until they end, or until Envoy's
`max_stream_duration` ends them.

A committed revocation cannot be undone, even if --wait ends with exit code 5.
Sidecars that did not confirm in time apply it as soon as they are reachable. If
you run the same command again, it only waits.";

impl RevokeArgs {
    /// Runs the command.
    ///
    /// # Errors
    ///
    /// When the control plane cannot be reached or refuses, or with `--wait` sidecars do not confirm in time.
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        let mut admin = session.admin().await?;
        let mut committed = None;
        let (patience, wait) = (patience(self.timeout), self.wait);
        let revocation = async {
            let events = admin.revoke(self.into_request()).await?;
            follow(events.into_inner(), &mut committed, wait, session).await
        };
        match watch(patience, revocation).await {
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

    fn into_request(self) -> admin::RevokeRequest {
        admin::RevokeRequest {
            key_id: self.key_id.as_str().to_owned(),
            which: Some(self.which.version.map_or(Which::All(true), Which::Version)),
            reason: self.reason,
            wait: self.wait,
            timeout: self.timeout.map(convert::to_duration),
            pass_by: self.pass_by.into_request(),
        }
    }
}

async fn follow(
    mut events: Streaming<admin::RevokeResponse>,
    committed: &mut Option<RevocationView>,
    waited: bool,
    session: &Session,
) -> Result<(), Failure> {
    let mut progress = session.output.progress();
    while let Some(event) = events.message().await? {
        let done = event.done;
        let view = RevocationView::from(event);
        if done {
            drop(progress);
            return finish(view, waited, session);
        }
        let sentence = view.barrier.sentence(session.now());
        *committed = Some(view.clone());
        session.report(&mut progress, &RevocationEvent::Barrier(view), &sentence)?;
    }
    Err(Failure::failed(
        "the control plane closed the call before it was complete",
    ))
}

fn finish(view: RevocationView, waited: bool, session: &Session) -> Result<(), Failure> {
    match session.output.format() {
        Format::Json => session.output.event(&RevocationEvent::Revoked(view)),
        Format::Table => {
            session.show(&view)?;
            session.output.note(&view.summary(waited, session.now()));
            Ok(())
        }
    }
}

/// Adds to the failure that the revocation is committed, and which sidecars lag.
fn explain(failure: Failure, committed: Option<&RevocationView>, now: Timestamp) -> Failure {
    let Some(view) = committed else {
        return failure;
    };
    failure
        .context(format!(
            "the revocation is committed as revision {} of keyring {}, but not every sidecar has confirmed it",
            view.revision, view.keyring
        ))
        .hint(view.barrier.hint(now))
}

impl RevocationView {
    fn summary(&self, waited: bool, now: Timestamp) -> String {
        if !waited {
            return "sidecars apply the revocation as they receive it; `relatch fleet` shows which have confirmed, --wait waits for them"
                .to_owned();
        }
        let mut summary = self.barrier.sentence(now);
        if let Some(seconds) = self.propagation_seconds {
            let took = Duration::try_from_secs_f64(seconds).unwrap_or_default();
            summary = format!("{summary}; the last one after {}", words::took(took));
        }
        format!("{summary}\n{OPEN_STREAMS}")
    }
}

impl From<admin::RevokeResponse> for RevocationView {
    fn from(response: admin::RevokeResponse) -> Self {
        Self {
            keyring: response.keyring,
            key_id: response.key_id,
            versions: response.versions,
            revision: response.revision,
            barrier: response.barrier.unwrap_or_default().into(),
            propagation_seconds: convert::duration(response.propagation).map(|d| d.as_secs_f64()),
        }
    }
}

impl View for RevocationView {
    fn render(&self, _now: Timestamp) -> String {
        let versions: Vec<String> = self.versions.iter().map(u32::to_string).collect();
        output::facts(&[
            ("KEYRING", self.keyring.clone()),
            ("KEY ID", self.key_id.clone()),
            ("REVOKED", words::or_nothing(&versions.join(", "))),
            ("REVISION", self.revision.to_string()),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn response(applied: u32, done: bool) -> admin::RevokeResponse {
        admin::RevokeResponse {
            keyring: "payments".to_owned(),
            key_id: "7Qm2Xc91TbKe".to_owned(),
            versions: vec![1, 3],
            revision: 19,
            barrier: Some(admin::Barrier {
                applied,
                total: 2,
                laggards: (applied < 2)
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
    fn the_last_line_of_json_says_what_was_revoked() {
        let event = RevocationEvent::Revoked(response(2, true).into());
        assert_eq!(
            serde_json::to_string(&event).expect("serializable"),
            r#"{"event":"revoked","keyring":"payments","key_id":"7Qm2Xc91TbKe","versions":[1,3],"revision":19,"applied":2,"total":2,"laggards":[],"propagation_seconds":0.038}"#
        );
    }

    #[test]
    fn the_summary_says_how_long_it_took_when_it_was_waited_for() {
        let view = RevocationView::from(response(2, true));
        let now = Timestamp::from_millis(0);
        assert_eq!(
            view.summary(true, now),
            "2 of 2 sidecars confirmed; the last one after 38 ms\n\
             streams that were open before stay open until they end, or until Envoy's max_stream_duration ends them"
        );
        assert!(view.summary(false, now).contains("--wait"));
    }

    #[test]
    fn a_timeout_says_that_the_revocation_stands_and_who_lags() {
        let committed = RevocationView::from(response(1, false));
        let timed_out = tonic::Status::deadline_exceeded("1 of 2 sidecars have it");
        let now = Timestamp::from_millis(0);
        let failure = explain(timed_out.into(), Some(&committed), now);
        assert_eq!(failure.exit(), Exit::TimedOut);
        assert_eq!(
            failure.report(false),
            "error: the revocation is committed as revision 19 of keyring payments, but not every sidecar has confirmed it\n  \
             caused by: 1 of 2 sidecars have it\n\
             hint: edge-3 is 1 revision behind; see `relatch fleet`\n"
        );
    }

    #[test]
    fn a_refusal_before_the_commit_claims_nothing() {
        let refused = tonic::Status::not_found("there is no key");
        let failure = explain(refused.into(), None, Timestamp::from_millis(0));
        assert_eq!(failure.report(false), "error: there is no key\n");
    }
}
