//! `relatch rotate start`: the next version of a key, handed out once every sidecar accepts it.

use std::{fmt::Write as _, time::Duration};

use clap::Args;
use serde::Serialize;
use tonic::Streaming;

use crate::{
    cli::{
        Session,
        barrier::BarrierView,
        failure::{Exit, Failure},
        issued::IssuedView,
        output::{Format, View},
        secret::Revealed,
        value::{self, KeyIdParser},
        watch::{Stopped, patience, watch},
        wire, words,
    },
    key::{KeyId, Timestamp},
    proto::admin::{self, start_rotation_response::Step},
};

/// The arguments of `rotate start`.
#[derive(Debug, Args)]
pub struct StartArgs {
    /// The key's id: the 12 characters between the first two '_' of the key
    #[arg(value_name = "KEY_ID", value_parser = KeyIdParser)]
    key_id: KeyId,

    /// How long the old version stays accepted after the hand-over, for example 7d; without this flag as long as the
    /// policy says
    #[arg(long, value_name = "DURATION", value_parser = value::duration, conflicts_with = "emergency")]
    overlap: Option<Duration>,

    /// How long the new version lives, for example 90d; without this flag it does not expire
    #[arg(long, value_name = "DURATION", value_parser = value::positive_duration)]
    expires_in: Option<Duration>,

    /// How long to wait for the sidecars; 1m without this flag
    #[arg(long, value_name = "DURATION", value_parser = value::positive_duration)]
    timeout: Option<Duration>,

    /// Revoke the old version at the hand-over: nothing overlaps; needs role admin
    #[arg(long, requires = "reason")]
    emergency: bool,

    /// Why it is an emergency; it is kept in the audit log
    #[arg(long, value_name = "TEXT", requires = "emergency")]
    reason: Option<String>,
}

/// A step of a rotation, a line of JSON each. The last is `handed_over`.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum RotationEvent {
    /// The new version is on its way to the sidecars.
    Staged {
        /// Names the rotation.
        rotation_id: String,
        /// The new version.
        version: u32,
        /// The revision that sidecars have to confirm.
        revision: u64,
    },
    /// How far it has got.
    Barrier(BarrierView),
    /// Done: the new version with its secret.
    HandedOver(Box<HandedOverView>),
}

/// The new version, and what became of the old one.
#[derive(Debug, Serialize)]
struct HandedOverView {
    #[serde(flatten)]
    key: IssuedView,
    /// The version that is retiring now; null where there was none.
    old_version: Option<u32>,
    /// Until when that one is accepted.
    old_until: Option<Timestamp>,
    #[serde(flatten)]
    barrier: BarrierView,
    /// From the staged commit to the last sidecar's ack.
    propagation_seconds: Option<f64>,
    /// In an emergency: who denies the old version; null where it retires.
    revocation: Option<OldRevokedView>,
}

/// How the end of the old version has got through.
#[derive(Debug, Serialize)]
struct OldRevokedView {
    #[serde(flatten)]
    barrier: BarrierView,
    /// From its commit to the last sidecar's ack; null when some have not confirmed it.
    propagation_seconds: Option<f64>,
}

/// What is known of a rotation that runs, for the words that it ends with.
#[derive(Debug, Default)]
struct Run {
    staged: Option<u32>,
    barrier: BarrierView,
    emergency: bool,
}

pub(super) const EXAMPLES: &str = "\
Examples:
  Replace a key, with a week for its consumer to switch:
    relatch rotate start 7Qm2Xc91TbKe --overlap 7d

  Give sidecars five minutes to confirm, and keep the new secret in a file:
    (umask 077; relatch rotate start 7Qm2Xc91TbKe --timeout 5m -o json \\
      | jq -r 'select(.event == \"handed_over\").secret' > acme.key)

  Replace a key that has leaked: the old version is revoked as the new one is handed out:
    relatch rotate start 7Qm2Xc91TbKe --emergency --reason 'found in a public repository'

Exit codes of note: 4 another rotation is in the way, 5 sidecars did not confirm in time.";

impl StartArgs {
    pub(super) async fn run(self, session: &Session) -> Result<(), Failure> {
        let mut admin = session.admin().await?;
        let mut run = Run {
            emergency: self.emergency,
            ..Run::default()
        };
        let (key_id, emergency, patience) = (self.key_id, self.emergency, self.patience());
        let rotation = async {
            let events = admin.start_rotation(self.into_request()).await?;
            follow(events.into_inner(), &mut run, session).await
        };
        match watch(patience, rotation).await {
            Ok(()) => Ok(()),
            Err(Stopped::Failed(failure)) => Err(run.explain(failure, key_id, session.now())),
            Err(Stopped::Interrupted) => Err(interrupted(key_id, emergency)),
        }
    }

    /// In an emergency the control plane waits twice: for the new version, and for the end of the old one.
    fn patience(&self) -> Duration {
        let once = patience(self.timeout);
        if self.emergency {
            once.saturating_mul(2)
        } else {
            once
        }
    }

    fn into_request(self) -> admin::StartRotationRequest {
        admin::StartRotationRequest {
            key_id: self.key_id.as_str().to_owned(),
            overlap: self.overlap.map(wire::to_duration),
            expires_in: self.expires_in.map(wire::to_duration),
            timeout: self.timeout.map(wire::to_duration),
            emergency: self.emergency,
            reason: self.reason.unwrap_or_default(),
        }
    }
}

async fn follow(
    mut events: Streaming<admin::StartRotationResponse>,
    run: &mut Run,
    session: &Session,
) -> Result<(), Failure> {
    let mut progress = session.output.progress();
    while let Some(event) = events.message().await? {
        // A step that only a newer control plane knows is passed over.
        let Some(step) = event.step else { continue };
        let event = RotationEvent::from_step(step)?;
        run.note(&event);
        match event {
            RotationEvent::HandedOver(view) => {
                drop(progress);
                return finish(view, session);
            }
            event @ (RotationEvent::Staged { .. } | RotationEvent::Barrier(_)) => {
                let sentence = event.sentence(session.now());
                session.report(&mut progress, &event, &sentence)?;
            }
        }
    }
    Err(Failure::failed(
        "the control plane ended the call before the hand-over",
    ))
}

fn finish(view: Box<HandedOverView>, session: &Session) -> Result<(), Failure> {
    match session.output.format() {
        Format::Json => session.output.event(&RotationEvent::HandedOver(view)),
        Format::Table => {
            session.show(&*view)?;
            session.output.note(&view.summary());
            if let Some(revoked) = view.revoked(session.now()) {
                session.output.note(&revoked);
            }
            Ok(())
        }
    }
}

impl RotationEvent {
    fn from_step(step: Step) -> Result<Self, Failure> {
        Ok(match step {
            Step::Staged(staged) => Self::Staged {
                rotation_id: staged.rotation_id,
                version: staged.version,
                revision: staged.revision,
            },
            Step::Barrier(barrier) => Self::Barrier(barrier.into()),
            Step::HandedOver(done) => Self::HandedOver(Box::new(done.try_into()?)),
        })
    }

    fn sentence(&self, now: Timestamp) -> String {
        match self {
            Self::Staged {
                version, revision, ..
            } => format!("version {version} is on its way to the sidecars as revision {revision}"),
            Self::Barrier(barrier) => barrier.sentence(now),
            Self::HandedOver(view) => view.summary(),
        }
    }
}

impl TryFrom<admin::HandedOver> for HandedOverView {
    type Error = Failure;

    fn try_from(done: admin::HandedOver) -> Result<Self, Failure> {
        Ok(Self {
            key: wire::required(done.key, "new key")?.into(),
            old_version: Some(done.old_version).filter(|&version| version != 0),
            old_until: wire::timestamp(done.old_until),
            barrier: done.barrier.unwrap_or_default().into(),
            propagation_seconds: wire::duration(done.propagation).map(|d| d.as_secs_f64()),
            revocation: done.revocation.map(|barrier| OldRevokedView {
                barrier: barrier.into(),
                propagation_seconds: wire::duration(done.revoked_in).map(|d| d.as_secs_f64()),
            }),
        })
    }
}

impl HandedOverView {
    fn summary(&self) -> String {
        let version = self.key.version;
        let sidecars = words::count(self.barrier.applied.into(), "sidecar");
        let mut summary = format!("{sidecars} accepted version {version}");
        if let Some(seconds) = self.propagation_seconds {
            let took = Duration::try_from_secs_f64(seconds).unwrap_or_default();
            let _ = write!(summary, " within {}", words::took(took));
        }
        match (self.old_version, self.old_until, &self.revocation) {
            (Some(old), _, Some(_)) => {
                let _ = write!(summary, "; version {old} is revoked");
            }
            (Some(old), Some(until), None) => {
                let _ = write!(
                    summary,
                    "; version {old} is accepted until {until}, and longer where the policy says so"
                );
            }
            (Some(_) | None, _, _) => {}
        }
        summary
    }

    /// How the end of the old version has got through.
    fn revoked(&self, now: Timestamp) -> Option<String> {
        let revocation = self.revocation.as_ref()?;
        let mut sentence = format!(
            "revocation of version {}: {}",
            self.old_version?,
            revocation.barrier.sentence(now)
        );
        match revocation.propagation_seconds {
            Some(seconds) => {
                let took = Duration::try_from_secs_f64(seconds).unwrap_or_default();
                let _ = write!(sentence, "; the last one after {}", words::took(took));
            }
            None => sentence.push_str(
                "; the revocation stands, and the others apply it as it reaches them: see `relatch fleet`",
            ),
        }
        Some(sentence)
    }
}

impl View for HandedOverView {
    fn render(&self, now: Timestamp) -> String {
        self.key.render(now)
    }

    fn secret(&self) -> Option<&Revealed> {
        self.key.secret()
    }
}

impl Run {
    fn note(&mut self, event: &RotationEvent) {
        match event {
            RotationEvent::Staged { version, .. } => self.staged = Some(*version),
            RotationEvent::Barrier(barrier) => self.barrier = barrier.clone(),
            RotationEvent::HandedOver(_) => {}
        }
    }

    /// Says with the failure what it means for the rotation, as far as that is known.
    fn explain(&self, failure: Failure, key_id: KeyId, now: Timestamp) -> Failure {
        let Some(version) = self.staged else {
            return failure;
        };
        let failure = if self.emergency {
            // The failure may have come while the end of the old version was waited for.
            failure.context(format!("the secret of version {version} was not received"))
        } else {
            failure.context(format!("version {version} was not handed out"))
        };
        match self.barrier.laggards_sentence(now) {
            Some(laggards) if failure.exit() == Exit::TimedOut => {
                failure.hint(format!("{laggards}; see `relatch fleet`"))
            }
            // The control plane withdraws the version, unless the hand-over and the failure crossed.
            Some(_) | None => failure.hint(show_versions(key_id)),
        }
    }
}

fn interrupted(key_id: KeyId, emergency: bool) -> Failure {
    let failure = if emergency {
        Failure::failed(
            "interrupted: the secret of the new version was not received; unless the hand-over was committed before, the control plane withdraws the version and the old one stays active",
        )
    } else {
        Failure::failed(
            "interrupted before the hand-over: the control plane withdraws the new version, and its secret was not handed out",
        )
    };
    failure.hint(show_versions(key_id))
}

fn show_versions(key_id: KeyId) -> String {
    format!("`relatch key show {key_id}` shows the key's versions")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::issued::tests::issued;

    fn json(step: Step) -> String {
        let event = RotationEvent::from_step(step).expect("a whole step");
        serde_json::to_string(&event).expect("serializable")
    }

    fn barrier() -> admin::Barrier {
        admin::Barrier {
            applied: 1,
            total: 2,
            laggards: vec![admin::Laggard {
                node: "edge-3".to_owned(),
                cluster: "gateway".to_owned(),
                connected: false,
                behind: 2,
                last_seen: Some(prost_types::Timestamp {
                    seconds: 1_767_225_600,
                    nanos: 0,
                }),
            }],
        }
    }

    fn handed_over() -> admin::HandedOver {
        admin::HandedOver {
            key: Some(issued("rlk_7Qm2Xc91TbKe_x")),
            old_version: 3,
            old_until: Some(prost_types::Timestamp {
                seconds: 1_767_225_600,
                nanos: 0,
            }),
            barrier: Some(admin::Barrier {
                applied: 2,
                total: 2,
                laggards: Vec::new(),
            }),
            propagation: Some(prost_types::Duration {
                seconds: 0,
                nanos: 412_000_000,
            }),
            revocation: None,
            revoked_in: None,
        }
    }

    fn emergency(applied: u32) -> HandedOverView {
        let done = admin::HandedOver {
            revocation: Some(admin::Barrier {
                applied,
                total: 2,
                laggards: barrier()
                    .laggards
                    .into_iter()
                    .take(2 - applied as usize)
                    .collect(),
            }),
            revoked_in: (applied == 2).then_some(prost_types::Duration {
                seconds: 0,
                nanos: 38_000_000,
            }),
            ..handed_over()
        };
        done.try_into().expect("whole")
    }

    #[test]
    fn progress_is_a_line_of_json_for_each_event() {
        let staged = admin::Staged {
            rotation_id: "r1".to_owned(),
            version: 4,
            revision: 17,
        };
        assert_eq!(
            json(Step::Staged(staged)),
            r#"{"event":"staged","rotation_id":"r1","version":4,"revision":17}"#
        );
        assert_eq!(
            json(Step::Barrier(barrier())),
            r#"{"event":"barrier","applied":1,"total":2,"laggards":[{"node":"edge-3","cluster":"gateway","connected":false,"behind":2,"last_seen":"2026-01-01T00:00:00.000Z"}]}"#
        );
    }

    #[test]
    fn the_last_line_is_the_new_key() {
        assert_eq!(
            json(Step::HandedOver(handed_over())),
            concat!(
                r#"{"event":"handed_over","keyring":"payments","consumer":"acme","key_id":"7Qm2Xc91TbKe","version":4,"#,
                r#""state":"active","secret":"rlk_7Qm2Xc91TbKe_x","not_before":null,"#,
                r#""expires_at":"2027-01-01T00:00:00.000Z","revision":18,"old_version":3,"#,
                r#""old_until":"2026-01-01T00:00:00.000Z","applied":2,"total":2,"laggards":[],"propagation_seconds":0.412,"revocation":null}"#,
            )
        );
    }

    #[test]
    fn an_emergency_tells_how_the_old_version_was_revoked() {
        let now = Timestamp::from_millis(1_767_225_604_000);
        let view = emergency(2);
        let json = serde_json::to_string(&view).expect("serializable");
        assert!(
            json.ends_with(
                r#","revocation":{"applied":2,"total":2,"laggards":[],"propagation_seconds":0.038}}"#
            ),
            "{json}"
        );
        assert!(
            view.summary().ends_with("; version 3 is revoked"),
            "{}",
            view.summary()
        );
        assert_eq!(
            view.revoked(now).as_deref(),
            Some("revocation of version 3: 2 of 2 sidecars have it; the last one after 38 ms")
        );
        let partly = emergency(1).revoked(now).expect("it was revoked");
        assert!(
            partly.contains("1 of 2 sidecars have it; edge-3 lags by 2 revisions, last seen 4 s ago; the revocation stands"),
            "{partly}"
        );
    }

    #[test]
    fn an_emergency_that_fails_does_not_claim_that_nothing_happened() {
        let run = Run {
            staged: Some(4),
            emergency: true,
            ..Run::default()
        };
        let key_id = "7Qm2Xc91TbKe".parse().expect("a key id");
        let lost = tonic::Status::unavailable("draining");
        let report = run
            .explain(lost.into(), key_id, Timestamp::from_millis(0))
            .report(false);
        assert!(
            report.starts_with("error: the secret of version 4 was not received\n"),
            "{report}"
        );
        let report = interrupted(key_id, true).report(false);
        assert!(
            report.contains("unless the hand-over was committed"),
            "{report}"
        );
    }

    #[test]
    fn the_summary_names_sidecars_time_and_the_old_version() {
        let event = RotationEvent::from_step(Step::HandedOver(handed_over())).expect("whole");
        assert_eq!(
            event.sentence(Timestamp::from_millis(0)),
            "2 sidecars accepted version 4 within 412 ms; version 3 is accepted until 2026-01-01T00:00:00.000Z, and longer where the policy says so"
        );
    }

    #[test]
    fn a_hand_over_without_its_key_is_a_failure() {
        let step = Step::HandedOver(admin::HandedOver::default());
        let failure = RotationEvent::from_step(step).expect_err("no key");
        assert_eq!(failure.exit(), Exit::Failed);
    }

    #[test]
    fn a_timeout_names_who_lags_and_that_nothing_was_handed_out() {
        let mut run = Run {
            staged: Some(4),
            ..Run::default()
        };
        run.note(&RotationEvent::Barrier(barrier().into()));
        let timed_out = tonic::Status::deadline_exceeded("1 of 2 sidecars have revision 17");
        let now = Timestamp::from_millis(1_767_225_604_000);
        let key_id = "7Qm2Xc91TbKe".parse().expect("a key id");
        let failure = run.explain(timed_out.into(), key_id, now);
        assert_eq!(failure.exit(), Exit::TimedOut);
        assert_eq!(
            failure.report(false),
            "error: version 4 was not handed out\n  caused by: 1 of 2 sidecars have revision 17\n\
             hint: edge-3 lags by 2 revisions, last seen 4 s ago; see `relatch fleet`\n"
        );
    }

    #[test]
    fn a_connection_lost_after_staging_says_where_to_look() {
        let run = Run {
            staged: Some(4),
            ..Run::default()
        };
        let lost = tonic::Status::unavailable("draining");
        let key_id = "7Qm2Xc91TbKe".parse().expect("a key id");
        let failure = run.explain(lost.into(), key_id, Timestamp::from_millis(0));
        assert_eq!(failure.exit(), Exit::Unreachable);
        assert_eq!(
            failure.report(false),
            "error: version 4 was not handed out\n  caused by: draining\n\
             hint: `relatch key show 7Qm2Xc91TbKe` shows the key's versions\n"
        );
    }
}
