//! `relatch rotate start`: creates the next version of a key, and hands it out when every sidecar accepts it.

use std::{fmt::Write as _, time::Duration};

use clap::Args;
use serde::Serialize;
use tonic::Streaming;

use crate::{
    cli::{
        Session,
        barrier::BarrierView,
        connection::{Admin, answer},
        convert,
        failure::{Exit, Failure, required},
        idempotency::{IdempotencyArgs, answered, ask_again, forgotten, not_shown},
        issued::IssuedView,
        output::{Format, View},
        pass_by::PassByArgs,
        secret::Revealed,
        value::{self, KeyIdParser},
        watch::{Stopped, patience, watch},
        words,
    },
    key::{IdempotencyKey, KeyId, Lifetime, Timestamp},
    proto::admin::{self, start_rotation_response::Step},
};

/// The arguments of `rotate start`.
#[derive(Debug, Args)]
pub struct StartArgs {
    /// Key id: the 12 characters between the first two '_' of the key
    #[arg(value_name = "KEY_ID", value_parser = KeyIdParser)]
    key_id: KeyId,

    /// Time that the old version stays accepted after the hand-over, for example 7d [default: from the policy]
    #[arg(long, value_name = "DURATION", value_parser = value::duration, conflicts_with = "emergency")]
    overlap: Option<Duration>,

    /// Lifetime of the new version, for example 90d, or never [default: the lifetime of the previous version]
    #[arg(long, value_name = "DURATION", value_parser = value::lifetime)]
    expires_in: Option<Lifetime>,

    /// Maximum time to wait [default: 1m for connected sidecars, and until lost sidecars can no longer serve]
    #[arg(long, value_name = "DURATION", value_parser = value::positive_duration)]
    timeout: Option<Duration>,

    #[command(flatten)]
    pass_by: PassByArgs,

    /// Revoke the old version at the hand-over, without an overlap; requires role admin
    #[arg(long, requires = "reason")]
    emergency: bool,

    /// Reason for --emergency, recorded in the audit log [default: none]
    #[arg(long, value_name = "TEXT", requires = "emergency")]
    reason: Option<String>,

    #[command(flatten)]
    idempotency: IdempotencyArgs,
}

/// A step of a rotation, a line of JSON each. The last is `handed_over`; in an emergency `old_revoked` follows.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum RotationEvent {
    /// The new version is sent to the sidecars.
    Staged {
        /// The id of the rotation.
        rotation_id: String,
        /// The new version.
        version: u32,
        /// The revision that sidecars have to confirm.
        revision: u64,
    },
    /// The progress at the barrier.
    Barrier(BarrierView),
    /// The hand-over is done: the new version with its secret.
    HandedOver(Box<HandedOverView>),
    /// In an emergency: the progress of the revocation of the old version.
    OldRevoked(OldRevokedView),
}

/// The new version, and the state of the old one.
#[derive(Debug, Serialize)]
struct HandedOverView {
    #[serde(flatten)]
    key: IssuedView,
    /// The version that is retiring now; null if there was none.
    old_version: Option<u32>,
    /// The time until which it is accepted.
    old_until: Option<Timestamp>,
    #[serde(flatten)]
    barrier: BarrierView,
    /// The time from the staged commit to the confirmation of the last sidecar.
    propagation_seconds: Option<f64>,
}

/// The progress of the revocation of the old version.
#[derive(Debug, Serialize)]
struct OldRevokedView {
    #[serde(flatten)]
    barrier: BarrierView,
    /// No sidecar accepts it any more.
    done: bool,
    /// The time from its commit to the confirmation of the last sidecar; null until it is done.
    propagation_seconds: Option<f64>,
}

/// What is known about a rotation in progress, for the report at its end.
#[derive(Debug)]
struct Run {
    key_id: KeyId,
    idempotency_key: IdempotencyKey,
    emergency: bool,
    staged: Option<u32>,
    barrier: BarrierView,
    /// The caller has received the secret.
    handed_over: bool,
}

/// The state of a version whose hand-over was not seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fate {
    /// The version was withdrawn; its secret was not handed out.
    Withdrawn,
    /// The version was handed over, and its secret did not arrive.
    HandedOver,
    /// The control plane could not be asked, or the version is still being staged.
    Unknown,
}

pub(super) const EXAMPLES: &str = "\
Examples:
  Rotate a key; its consumer has a week to switch:
    relatch rotate start 7Qm2Xc91TbKe --overlap 7d

  Wait at most five minutes for sidecars, and write the new secret to a file:
    (umask 077; relatch rotate start 7Qm2Xc91TbKe --timeout 5m -o json \\
      | jq -r 'select(.event == \"handed_over\").secret' > acme.key)

  Rotate a leaked key: the old version is revoked at the hand-over:
    relatch rotate start 7Qm2Xc91TbKe --emergency \\
      --reason 'found in a public repository'

Exit codes of note:
  4  another rotation blocks this one
  5  sidecars did not confirm in time
  7  no answer: the new version may have been handed over; the message says how
     to get the answer
  8  an earlier call with the same idempotency key did this, and its secret is
     forgotten";

/// How long the command asks for the state of a version after an interruption: a withdrawal takes some milliseconds.
const FATE_TIMEOUT: Duration = Duration::from_secs(5);
const FATE_POLL: Duration = Duration::from_millis(100);

impl StartArgs {
    pub(super) async fn run(self, session: &Session) -> Result<(), Failure> {
        let idempotency_key = self.idempotency.key()?;
        let mut run = Run {
            key_id: self.key_id,
            idempotency_key: idempotency_key.clone(),
            emergency: self.emergency,
            staged: None,
            barrier: BarrierView::default(),
            handed_over: false,
        };
        let patience = self.patience();
        let request = self.into_request(&idempotency_key);
        let rotation = answered(session, &idempotency_key, async |mut admin: Admin| {
            run.begin_attempt();
            let events = admin.start_rotation(request.clone()).await?;
            follow(events.into_inner(), &mut run, session).await
        });
        match watch(patience, rotation).await {
            Ok(()) => Ok(()),
            Err(Stopped::Failed(failure)) if failure.is_local() && !run.handed_over => {
                let fate = run.fate(session).await;
                Err(run.broken_off(failure, fate))
            }
            Err(Stopped::Failed(failure)) => Err(run.explain(failure, session.now())),
            Err(Stopped::Interrupted) => {
                let fate = run.fate(session).await;
                Err(run.interrupted(fate, session.now()))
            }
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

    fn into_request(self, idempotency_key: &IdempotencyKey) -> admin::StartRotationRequest {
        admin::StartRotationRequest {
            key_id: self.key_id.as_str().to_owned(),
            overlap: self.overlap.map(convert::to_duration),
            lifetime: self.expires_in.map(convert::to_lifetime),
            timeout: self.timeout.map(convert::to_duration),
            emergency: self.emergency,
            reason: self.reason.unwrap_or_default(),
            idempotency_key: idempotency_key.as_str().to_owned(),
            pass_by: self.pass_by.into_request(),
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
        // A step that only a newer control plane knows is skipped.
        let Some(step) = event.step else { continue };
        if let Step::HandedOver(done) = &step
            && let Some(key) = done.key.as_ref().filter(|key| key.secret_forgotten)
        {
            if !run.handed_over {
                return Err(run.forgotten(key));
            }
            // Only the end of the revocation of the old version was not seen.
            continue;
        }
        let event = RotationEvent::from_step(step)?;
        run.note(&event);
        match event {
            RotationEvent::HandedOver(view) => {
                let is_revoked = run.emergency && view.old_version.is_some();
                progress = session.output.progress();
                if !run.handed_over {
                    let shown = hand_out(view, session);
                    shown.map_err(|failure| not_shown(failure, &run.idempotency_key))?;
                    run.handed_over = true;
                }
                if !is_revoked {
                    return Ok(());
                }
            }
            RotationEvent::OldRevoked(view) if view.done => {
                drop(progress);
                return match session.output.format() {
                    Format::Json => session.output.event(&RotationEvent::OldRevoked(view)),
                    Format::Table => {
                        session.output.note(&view.sentence(session.now()));
                        Ok(())
                    }
                };
            }
            event @ (RotationEvent::Staged { .. }
            | RotationEvent::Barrier(_)
            | RotationEvent::OldRevoked(_)) => {
                let sentence = event.sentence(session.now());
                session.report(&mut progress, &event, &sentence)?;
            }
        }
    }
    let problem = anyhow::anyhow!("the control plane closed the call before it was complete");
    Err(Failure::unanswered(Exit::Failed, problem))
}

/// Shows the secret as soon as it arrives, before the command waits for anything else.
fn hand_out(view: Box<HandedOverView>, session: &Session) -> Result<(), Failure> {
    match session.output.format() {
        Format::Json => session.output.event(&RotationEvent::HandedOver(view)),
        Format::Table => {
            session.show(&*view)?;
            session.output.note(&view.summary());
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
            Step::OldRevoked(revoked) => Self::OldRevoked(OldRevokedView {
                barrier: revoked.barrier.unwrap_or_default().into(),
                done: revoked.done,
                propagation_seconds: convert::duration(revoked.propagation)
                    .map(|d| d.as_secs_f64()),
            }),
        })
    }

    fn sentence(&self, now: Timestamp) -> String {
        match self {
            Self::Staged {
                version, revision, ..
            } => format!("pushing version {version} to the sidecars as revision {revision}"),
            Self::Barrier(barrier) => barrier.sentence(now),
            Self::HandedOver(view) => view.summary(),
            Self::OldRevoked(view) => view.sentence(now),
        }
    }
}

impl TryFrom<admin::HandedOver> for HandedOverView {
    type Error = Failure;

    fn try_from(done: admin::HandedOver) -> Result<Self, Failure> {
        Ok(Self {
            key: required(done.key, "new key")?.into(),
            old_version: Some(done.old_version).filter(|&version| version != 0),
            old_until: convert::timestamp(done.old_until),
            barrier: done.barrier.unwrap_or_default().into(),
            propagation_seconds: convert::duration(done.propagation).map(|d| d.as_secs_f64()),
        })
    }
}

impl HandedOverView {
    fn summary(&self) -> String {
        let version = self.key.version;
        let mut summary = if self.barrier.total == 0 {
            let keyring = &self.key.keyring;
            format!(
                "no sidecar serves keyring {keyring}, so no sidecar accepts version {version} yet"
            )
        } else {
            let sidecars = words::count(self.barrier.applied.into(), "sidecar");
            format!("{sidecars} accepted version {version}")
        };
        if let Some(seconds) = self.propagation_seconds.filter(|_| self.barrier.total > 0) {
            let took = Duration::try_from_secs_f64(seconds).unwrap_or_default();
            let _ = write!(summary, " within {}", words::took(took));
        }
        if let (Some(old), Some(until)) = (self.old_version, self.old_until) {
            let _ = write!(
                summary,
                "; version {old} is accepted until {}, or longer if the policy says so",
                words::time(Some(until))
            );
        } else if let Some(old) = self.old_version {
            let _ = write!(summary, "; version {old} is revoked");
        }
        summary
    }
}

impl OldRevokedView {
    fn sentence(&self, now: Timestamp) -> String {
        let mut sentence = format!(
            "revocation of the old version: {}",
            self.barrier.sentence(now)
        );
        if let Some(seconds) = self.propagation_seconds {
            let took = Duration::try_from_secs_f64(seconds).unwrap_or_default();
            let _ = write!(sentence, "; the last one after {}", words::took(took));
        }
        sentence
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
    /// Resets what was known from an earlier attempt, because it may have changed.
    fn begin_attempt(&mut self) {
        self.staged = None;
        self.barrier = BarrierView::default();
    }

    fn note(&mut self, event: &RotationEvent) {
        match event {
            RotationEvent::Staged { version, .. } => self.staged = Some(*version),
            RotationEvent::Barrier(barrier) => self.barrier = barrier.clone(),
            RotationEvent::HandedOver(_) => {}
            RotationEvent::OldRevoked(view) => self.barrier = view.barrier.clone(),
        }
    }

    /// Adds to the failure what it means for the rotation, as far as that is known.
    fn explain(&self, failure: Failure, now: Timestamp) -> Failure {
        let version = self.version();
        if self.handed_over {
            return failure
                .context(format!(
                    "{version} was handed out; the revocation of the old version is committed, but not every sidecar has confirmed it"
                ))
                .hint(self.show_versions());
        }
        if failure.is_answer_lost() {
            let neither = if self.emergency {
                "; if it was, the old version is revoked, and the consumer has no accepted key until you get the secret"
            } else {
                ""
            };
            return failure
                .context(format!(
                    "it is not known whether {version} was handed out{neither}"
                ))
                .hint(format!(
                    "{}; {}",
                    ask_again(&self.idempotency_key),
                    self.show_versions()
                ));
        }
        if self.staged.is_none() || !failure.is_withdrawn() {
            return failure;
        }
        let failure = failure.context(format!("{version} was not handed out{}", self.kept()));
        if failure.exit() == Exit::TimedOut {
            failure.hint(self.barrier.hint(now))
        } else {
            failure.hint(self.show_versions())
        }
    }

    fn version(&self) -> String {
        let number = |number| format!("version {number}");
        self.staged
            .map_or_else(|| "a new version".to_owned(), number)
    }

    /// In an emergency, says that the old version is not revoked: it ends only with the hand-over, and the operator of a leaked
    /// key must know this.
    const fn kept(&self) -> &'static str {
        if self.emergency {
            ", and this call did not revoke the old version; to end it without a new version, use `relatch revoke`"
        } else {
            ""
        }
    }

    /// Asks for the state of the staged version after the call was given up.
    async fn fate(&self, session: &Session) -> Fate {
        let Some(version) = self.staged.filter(|_| !self.handed_over) else {
            return Fate::Unknown;
        };
        let ask = async {
            let mut admin = session.admin().await?;
            loop {
                let key_id = self.key_id.as_str().to_owned();
                let key = answer(admin.get_key(admin::GetKeyRequest { key_id })).await?;
                if key.versions.iter().any(|shown| shown.version > version) {
                    // Another attempt of this call may have staged it.
                    return Ok(Fate::Unknown);
                }
                let mut versions = key.versions.iter();
                let state = versions
                    .find(|shown| shown.version == version)
                    .and_then(|shown| admin::KeyState::try_from(shown.state).ok());
                match state {
                    Some(admin::KeyState::Pending) => tokio::time::sleep(FATE_POLL).await,
                    Some(admin::KeyState::Revoked) => return Ok(Fate::Withdrawn),
                    Some(
                        admin::KeyState::Active
                        | admin::KeyState::Retiring
                        | admin::KeyState::Retired,
                    ) => return Ok(Fate::HandedOver),
                    Some(admin::KeyState::Unspecified) | None => return Ok(Fate::Unknown),
                }
            }
        };
        let asked: Result<Result<Fate, Failure>, _> = tokio::time::timeout(FATE_TIMEOUT, ask).await;
        match asked {
            Ok(Ok(fate)) => fate,
            Ok(Err(_)) | Err(_) => Fate::Unknown,
        }
    }

    fn interrupted(&self, fate: Fate, now: Timestamp) -> Failure {
        if self.handed_over {
            return Failure::failed(
                "interrupted: the new version was handed out and the revocation of the old version is committed, but not every sidecar has confirmed it",
            )
            .exit_with(Exit::TimedOut)
            .hint(self.barrier.hint(now));
        }
        let (became, hint) = self.became(fate);
        let (when, exit) = match fate {
            Fate::Withdrawn => ("interrupted before the hand-over", Exit::TimedOut),
            Fate::HandedOver | Fate::Unknown => ("interrupted", Exit::Failed),
        };
        let hint = match self.barrier.way_out() {
            Some(way_out) if fate == Fate::Withdrawn => way_out,
            Some(_) | None => hint,
        };
        Failure::failed(format!("{when}: {became}"))
            .exit_with(exit)
            .hint(hint)
    }

    /// The failure of the command on this machine while the control plane continues.
    fn broken_off(&self, failure: Failure, fate: Fate) -> Failure {
        if self.staged.is_none() || failure.has_hint() {
            return failure;
        }
        let (became, hint) = self.became(fate);
        failure.context(became).hint(hint)
    }

    /// The state of the version of a call that the command gave up, and what to do.
    fn became(&self, fate: Fate) -> (String, String) {
        let version = self.version();
        match fate {
            Fate::Withdrawn => (
                format!(
                    "{version} is withdrawn, and its secret was not handed out{}",
                    self.kept()
                ),
                self.show_versions(),
            ),
            Fate::HandedOver => {
                let neither = if self.emergency {
                    "; the old version is revoked, so the consumer has no accepted key until you get the secret"
                } else {
                    ""
                };
                (
                    format!(
                        "{version} was already handed over, and its secret did not arrive{neither}"
                    ),
                    ask_again(&self.idempotency_key),
                )
            }
            Fate::Unknown => (
                format!("it is not known whether {version} was handed out"),
                format!(
                    "{}; {}",
                    self.show_versions(),
                    ask_again(&self.idempotency_key)
                ),
            ),
        }
    }

    fn forgotten(&self, key: &admin::IssuedKey) -> Failure {
        let stands = format!(
            "version {} of key {} (now {}) was handed over",
            key.version,
            key.key_id,
            convert::state(key.state)
        );
        forgotten(
            &stands,
            format!(
                "if nobody has the secret: relatch rotate start {}; {}",
                key.key_id,
                self.show_versions()
            ),
        )
    }

    fn show_versions(&self) -> String {
        format!(
            "`relatch key show {}` shows the key's versions",
            self.key_id
        )
    }
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
                run_id: "b1".to_owned(),
                presence: admin::Presence::Lost as i32,
                since: Some(prost_types::Timestamp {
                    seconds: 1_767_225_600,
                    nanos: 0,
                }),
                serves_until: Some(prost_types::Timestamp {
                    seconds: 1_767_229_200,
                    nanos: 0,
                }),
                lacks_disk: false,
            }],
            passed_by: vec![admin::SidecarRun {
                node: "edge-9".to_owned(),
                run_id: "b2".to_owned(),
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
                passed_by: Vec::new(),
            }),
            propagation: Some(prost_types::Duration {
                seconds: 0,
                nanos: 412_000_000,
            }),
        }
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
            concat!(
                r#"{"event":"barrier","applied":1,"total":2,"laggards":[{"node":"edge-3","cluster":"gateway","#,
                r#""connected":false,"behind":2,"last_seen":"2026-01-01T00:00:00.000Z","run_id":"b1","#,
                r#""presence":"lost","since":"2026-01-01T00:00:00.000Z","serves_until":"2026-01-01T01:00:00.000Z","#,
                r#""lacks_disk":false}],"passed_by":[{"node":"edge-9","run_id":"b2"}]}"#,
            )
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
                r#""old_until":"2026-01-01T00:00:00.000Z","applied":2,"total":2,"laggards":[],"propagation_seconds":0.412}"#,
            )
        );
    }

    #[test]
    fn an_emergency_tells_how_the_old_version_was_revoked() {
        let revoked = admin::OldRevoked {
            barrier: Some(barrier()),
            done: true,
            propagation: Some(prost_types::Duration {
                seconds: 0,
                nanos: 38_000_000,
            }),
        };
        let line = json(Step::OldRevoked(revoked.clone()));
        assert!(
            line.starts_with(r#"{"event":"old_revoked","applied":1,"total":2,"#),
            "{line}"
        );
        assert!(
            line.ends_with(r#""done":true,"propagation_seconds":0.038}"#),
            "{line}"
        );
        let event = RotationEvent::from_step(Step::OldRevoked(revoked)).expect("whole");
        let sentence = event.sentence(Timestamp::from_millis(1_767_225_604_000));
        assert!(
            sentence.ends_with("; the last one after 38 ms"),
            "{sentence}"
        );
        let at_once = admin::HandedOver {
            old_until: None,
            ..handed_over()
        };
        let view: HandedOverView = at_once.try_into().expect("whole");
        assert!(
            view.summary().ends_with("; version 3 is revoked"),
            "{}",
            view.summary()
        );
    }

    fn run() -> Run {
        Run {
            key_id: "7Qm2Xc91TbKe".parse().expect("a key id"),
            idempotency_key: "once".parse().expect("an idempotency key"),
            emergency: false,
            staged: Some(4),
            barrier: BarrierView::default(),
            handed_over: false,
        }
    }

    /// An error of the control plane that has handed out nothing.
    fn withdrawn(mut status: tonic::Status) -> Failure {
        let outcome = tonic::metadata::MetadataValue::from_static(crate::proto::WITHDRAWN);
        status.metadata_mut().insert(crate::proto::OUTCOME, outcome);
        status.into()
    }

    #[test]
    fn what_fails_after_the_hand_over_does_not_claim_that_nothing_happened() {
        let run = Run {
            handed_over: true,
            ..run()
        };
        let lost = tonic::Status::unavailable("draining");
        let report = run
            .explain(lost.into(), Timestamp::from_millis(0))
            .report(false);
        assert!(
            report.starts_with("error: version 4 was handed out;"),
            "{report}"
        );
        let report = run
            .interrupted(Fate::Unknown, Timestamp::from_millis(0))
            .report(false);
        assert!(
            report.contains("the revocation of the old version is committed"),
            "{report}"
        );
    }

    #[test]
    fn the_summary_names_sidecars_time_and_the_old_version() {
        let event = RotationEvent::from_step(Step::HandedOver(handed_over())).expect("whole");
        assert_eq!(
            event.sentence(Timestamp::from_millis(0)),
            "2 sidecars accepted version 4 within 412 ms; version 3 is accepted until 2026-01-01T00:00:00Z, or longer if the policy says so"
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
        let mut run = run();
        run.note(&RotationEvent::Barrier(barrier().into()));
        let timed_out = tonic::Status::deadline_exceeded("1 of 2 sidecars confirmed revision 17");
        let now = Timestamp::from_millis(1_767_225_604_000);
        let failure = run.explain(withdrawn(timed_out), now);
        assert_eq!(failure.exit(), Exit::TimedOut);
        assert_eq!(
            failure.report(false),
            "error: version 4 was not handed out\n  caused by: 1 of 2 sidecars confirmed revision 17\n\
             hint: if edge-3 is gone for good: relatch fleet forget edge-3 --reason TEXT; to continue without it this time: --without edge-3\n"
        );
    }

    #[test]
    fn a_lost_answer_is_not_taken_for_a_withdrawal() {
        for lost in [
            tonic::Status::unavailable("upstream connect error"),
            tonic::Status::unknown("stream reset"),
            tonic::Status::deadline_exceeded("a gateway gave up"),
        ] {
            let report = run().explain(lost.into(), Timestamp::from_millis(0));
            let report = report.report(false);
            assert!(
                report.starts_with("error: it is not known whether version 4 was handed out\n"),
                "{report}"
            );
            assert!(report.contains("--idempotency-key once"), "{report}");
            assert!(!report.contains("was not handed out"), "{report}");
        }
        let emergency = Run {
            emergency: true,
            ..run()
        };
        let lost = tonic::Status::unavailable("draining");
        let report = emergency.explain(lost.into(), Timestamp::from_millis(0));
        let report = report.report(false);
        assert!(
            report.contains("the consumer has no accepted key"),
            "{report}"
        );
    }

    #[test]
    fn what_the_control_plane_withdrew_was_not_handed_out() {
        let stops = || withdrawn(tonic::Status::unavailable("the control plane stops"));
        let failure = run().explain(stops(), Timestamp::from_millis(0));
        assert_eq!(failure.exit(), Exit::Unreachable);
        assert_eq!(
            failure.report(false),
            "error: version 4 was not handed out\n  caused by: the control plane stops\n\
             hint: `relatch key show 7Qm2Xc91TbKe` shows the key's versions\n"
        );
        let emergency = Run {
            emergency: true,
            ..run()
        };
        let report = emergency.explain(stops(), Timestamp::from_millis(0));
        let report = report.report(false);
        assert!(
            report.contains("did not revoke the old version"),
            "{report}"
        );
    }

    #[test]
    fn an_interruption_says_what_became_of_the_version() {
        let interrupted = |fate| run().interrupted(fate, Timestamp::from_millis(0));
        let withdrawn = interrupted(Fate::Withdrawn);
        assert_eq!(withdrawn.exit(), Exit::TimedOut);
        assert!(
            withdrawn
                .report(false)
                .contains("its secret was not handed out")
        );
        for fate in [Fate::HandedOver, Fate::Unknown] {
            assert_eq!(interrupted(fate).exit(), Exit::Failed);
            let report = interrupted(fate).report(false);
            assert!(!report.contains("was not handed out"), "{report}");
            assert!(report.contains("--idempotency-key once"), "{report}");
        }
    }
}
