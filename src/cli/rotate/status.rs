//! `relatch rotate status`: shows the progress of a key's rotation, once or until it ends.

use std::time::Duration;

use clap::Args;
use serde::Serialize;

use crate::{
    cli::{
        Session,
        barrier::BarrierView,
        connection::{Admin, answer},
        convert,
        failure::{Exit, Failure, required},
        output::{self, Format, View},
        screen::Screen,
        usage::UsageView,
        value::{self, KeyIdParser},
        words,
    },
    clock::BootTime,
    duration::written,
    key::{KeyId, OnDeadline, Timestamp},
    proto::admin,
};

/// The arguments of `rotate status`.
#[derive(Debug, Args)]
pub struct StatusArgs {
    /// Key id: the 12 characters between the first two '_' of the key
    #[arg(value_name = "KEY_ID", value_parser = KeyIdParser)]
    key_id: KeyId,

    /// Continue until the key has no rotation in progress
    #[arg(long)]
    watch: bool,

    /// Time between two updates of --watch, at least 100ms
    #[arg(
        long,
        value_name = "DURATION",
        value_parser = value::positive_duration,
        default_value = "2s",
        requires = "watch"
    )]
    interval: Duration,
}

/// A change that `--watch` saw, a line of JSON each. The last is `ended`.
#[derive(Debug, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
enum StatusEvent<'a> {
    /// A rotation is in progress.
    Status(&'a StatusView),
    /// No rotation is in progress any more.
    Ended(&'a StatusView),
}

/// The progress of the rotations of a key, and the use of each version.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct StatusView {
    #[serde(flatten)]
    usage: UsageView,
    /// The versions that are pending or retiring; empty if no rotation is in progress.
    rotations: Vec<RotationView>,
}

/// A version that is pending or retiring.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct RotationView {
    version: u32,
    state: String,
    /// `stage`, `overlap`, `drain` or `held`.
    phase: String,
    rotation_id: Option<String>,
    since: Option<Timestamp>,
    /// The end of the overlap; null for a pending version.
    deadline: Option<Timestamp>,
    /// The action of the policy at that time: `retire`, `extend` or `hold`.
    on_deadline: Option<OnDeadline>,
    /// The version to use instead; null for a pending version.
    replaced_by: Option<u32>,
    /// The reason why it has not ended yet, as a sentence.
    waits_for: String,
    /// The earliest end if the version is not used again; null if it is not known.
    earliest_end: Option<Timestamp>,
    /// For a pending version: the progress at the barrier.
    barrier: Option<BarrierView>,
}

/// An outage: a time in which the control plane cannot be reached.
#[derive(Debug, Default)]
struct Outage {
    since: Option<BootTime>,
}

pub(super) const EXAMPLES: &str = "\
Examples:
  relatch rotate status 7Qm2Xc91TbKe -o table

  Wait until the old version has retired:
    relatch rotate status 7Qm2Xc91TbKe --watch

Exit codes of note: with --watch, 0 when no rotation is in progress, 7 when the
control plane was unreachable for two minutes.";

/// The shortest interval: below it, an update would begin before most results of the last one have arrived.
const MIN_INTERVAL: Duration = Duration::from_millis(100);
/// The longest outage: a control plane restarts within seconds, and its machine within two minutes. After that, an operator
/// has to act.
const PATIENCE: Duration = Duration::from_mins(2);
/// The most callers of a version that are shown: the most frequent ones are enough to find its owner, and `relatch usage`
/// shows all.
const MOST_CALLERS: usize = 5;

impl StatusArgs {
    pub(super) async fn run(self, session: &Session) -> Result<(), Failure> {
        if self.watch {
            return self.follow(session).await;
        }
        let mut admin = session.admin().await?;
        session.show(&look(&mut admin, self.key_id).await?)
    }

    async fn follow(&self, session: &Session) -> Result<(), Failure> {
        let interval = self.interval.max(MIN_INTERVAL);
        let mut admin = Some(session.admin().await?);
        let mut outage = Outage::default();
        let mut screen = session.output.screen();
        let mut told = None;
        loop {
            match look_again(&mut admin, self.key_id, session).await {
                Ok(view) => {
                    if outage.ends() {
                        screen.leave();
                        session.output.note("the control plane answers again");
                    }
                    let is_over = view.rotations.is_empty();
                    view.tell(told.as_ref(), &mut screen, session)?;
                    if is_over {
                        session
                            .output
                            .note(&format!("key {} has no rotation in progress", self.key_id));
                        return Ok(());
                    }
                    told = Some(view);
                }
                Err(failure) if told.is_none() => return Err(failure),
                Err(failure) => {
                    if outage.bear(failure, session.boot())? {
                        screen.leave();
                        session.output.note(&format!(
                            "the control plane cannot be reached; retrying for {}",
                            written(PATIENCE)
                        ));
                    }
                    admin = None;
                }
            }
            tokio::time::sleep(interval).await;
        }
    }
}

async fn look(admin: &mut Admin, key_id: KeyId) -> Result<StatusView, Failure> {
    let key_id = key_id.as_str().to_owned();
    let status = answer(admin.get_rotation(admin::GetRotationRequest { key_id })).await?;
    status.try_into()
}

/// Asks over a new connection if the last one broke.
async fn look_again(
    admin: &mut Option<Admin>,
    key_id: KeyId,
    session: &Session,
) -> Result<StatusView, Failure> {
    let admin = match admin {
        Some(admin) => admin,
        None => admin.insert(session.admin().await?),
    };
    look(admin, key_id).await
}

impl StatusView {
    /// Shows the status if something has changed; on a terminal always, because times pass.
    fn tell(
        &self,
        before: Option<&Self>,
        screen: &mut Screen,
        session: &Session,
    ) -> Result<(), Failure> {
        let is_news = before != Some(self);
        match session.output.format() {
            Format::Json if is_news => session.output.event(&self.event()),
            Format::Table if is_news || screen.redraws() => {
                screen.show(&self.render(session.now()))
            }
            Format::Json | Format::Table => Ok(()),
        }
    }

    const fn event(&self) -> StatusEvent<'_> {
        if self.rotations.is_empty() {
            StatusEvent::Ended(self)
        } else {
            StatusEvent::Status(self)
        }
    }

    fn last_used(&self, version: u32) -> Option<Timestamp> {
        let mut versions = self.usage.versions.iter();
        versions
            .find(|usage| usage.version == version)?
            .last_used_at
    }
}

impl View for StatusView {
    fn render(&self, now: Timestamp) -> String {
        let mut facts = self.usage.subject();
        if self.rotations.is_empty() {
            facts.push(("ROTATION", "none in progress".to_owned()));
        }
        for rotation in &self.rotations {
            facts.extend(rotation.facts(self.last_used(rotation.version), now));
        }
        facts.extend(self.usage.completeness(now));
        let mut text = format!(
            "{}\n{}",
            output::facts(&facts),
            self.usage.versions_table(now)
        );
        if let Some(callers) = self.usage.callers_table(MOST_CALLERS, now) {
            text.push('\n');
            text.push_str(&callers);
        }
        text
    }
}

impl RotationView {
    fn facts(&self, last_used: Option<Timestamp>, now: Timestamp) -> Vec<(&'static str, String)> {
        let when = |at| format!("{}, {}", words::time(Some(at)), words::distance(at, now));
        let title = match self.replaced_by {
            Some(by) => format!("version {} to version {by}", self.version),
            None => format!("to version {}", self.version),
        };
        let mut facts = vec![
            ("ROTATION", title),
            ("PHASE", self.phase.clone()),
            (
                "SINCE",
                self.since.map_or_else(|| words::NOTHING.to_owned(), when),
            ),
        ];
        if let Some(barrier) = &self.barrier {
            facts.push(("SIDECARS", barrier.sentence(now)));
        }
        if self.replaced_by.is_some() {
            facts.push((
                "LAST USED",
                last_used.map_or_else(|| "no known use".to_owned(), when),
            ));
        }
        if let Some(deadline) = self.deadline {
            facts.push(("OVERLAP UNTIL", when(deadline)));
            if let Some(on_deadline) = self.on_deadline {
                facts.push(("ON DEADLINE", then(on_deadline).to_owned()));
            }
        }
        facts.push(("WAITS FOR", words::or_nothing(&self.waits_for)));
        if self.replaced_by.is_some() {
            let end = match self.earliest_end {
                Some(end) if end <= now => "due now".to_owned(),
                Some(end) => format!("{} at the earliest", when(end)),
                None => "unknown".to_owned(),
            };
            facts.push(("ENDS", end));
        }
        facts
    }
}

/// The action of the policy at a deadline, in words.
const fn then(on_deadline: OnDeadline) -> &'static str {
    match on_deadline {
        OnDeadline::Retire => "retire, even if the version is used",
        OnDeadline::Extend => "extend the overlap while the version is used",
        OnDeadline::Hold => "hold while the version is used",
    }
}

impl Outage {
    /// Accepts a failure that may pass. Returns whether it is the first of its outage.
    ///
    /// # Errors
    ///
    /// The failure, if it will not pass, or if the outage lasts too long.
    fn bear(&mut self, failure: Failure, now: BootTime) -> Result<bool, Failure> {
        match failure.exit() {
            Exit::Unreachable => {}
            Exit::Done
            | Exit::Failed
            | Exit::Usage
            | Exit::NotFound
            | Exit::Refused
            | Exit::TimedOut
            | Exit::NotPermitted
            | Exit::SecretForgotten => return Err(failure),
        }
        let is_first = self.since.is_none();
        let since = *self.since.get_or_insert(now);
        if now.saturating_since(since) >= PATIENCE {
            return Err(failure);
        }
        Ok(is_first)
    }

    /// Records an answer of the control plane. Returns whether this ends an outage.
    const fn ends(&mut self) -> bool {
        self.since.take().is_some()
    }
}

impl TryFrom<admin::RotationStatus> for StatusView {
    type Error = Failure;

    fn try_from(status: admin::RotationStatus) -> Result<Self, Failure> {
        Ok(Self {
            usage: required(status.usage, "usage of the key")?.into(),
            rotations: status.rotations.into_iter().map(Into::into).collect(),
        })
    }
}

impl From<admin::Rotation> for RotationView {
    fn from(rotation: admin::Rotation) -> Self {
        Self {
            version: rotation.version,
            state: convert::state(rotation.state),
            phase: convert::phase(rotation.phase),
            rotation_id: Some(rotation.rotation_id).filter(|id| !id.is_empty()),
            since: convert::timestamp(rotation.since),
            deadline: convert::timestamp(rotation.deadline),
            on_deadline: convert::on_deadline(rotation.on_deadline),
            replaced_by: Some(rotation.replaced_by).filter(|&version| version != 0),
            waits_for: rotation.waits_for,
            earliest_end: convert::timestamp(rotation.earliest_end),
            barrier: rotation.barrier.map(Into::into),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::{
        output::tests::fits,
        usage::tests::{NOW, at, usage},
    };

    fn overlap() -> admin::Rotation {
        admin::Rotation {
            version: 1,
            state: admin::KeyState::Retiring as i32,
            phase: admin::RotationPhase::Overlap as i32,
            rotation_id: "r1".to_owned(),
            since: Some(at(1_767_139_200)),
            deadline: Some(at(1_767_484_800)),
            on_deadline: admin::OnDeadline::Hold as i32,
            replaced_by: 2,
            waits_for: "it was last used just now".to_owned(),
            earliest_end: Some(at(1_767_484_800)),
            barrier: None,
        }
    }

    fn stage() -> admin::Rotation {
        admin::Rotation {
            version: 2,
            state: admin::KeyState::Pending as i32,
            phase: admin::RotationPhase::Stage as i32,
            since: Some(at(1_767_225_600)),
            waits_for: "every sidecar to accept the new version".to_owned(),
            barrier: Some(admin::Barrier {
                applied: 2,
                total: 3,
                laggards: Vec::new(),
                passed_by: Vec::new(),
            }),
            ..admin::Rotation::default()
        }
    }

    fn status(rotations: Vec<admin::Rotation>) -> StatusView {
        let status = admin::RotationStatus {
            usage: Some(usage()),
            rotations,
        };
        status.try_into().expect("whole")
    }

    fn json(event: &StatusEvent<'_>) -> serde_json::Value {
        serde_json::to_value(event).expect("serializable")
    }

    #[test]
    fn json_of_a_rotation() {
        let view = status(vec![overlap()]);
        assert_eq!(
            serde_json::to_string(&view.rotations).expect("serializable"),
            concat!(
                r#"[{"version":1,"state":"retiring","phase":"overlap","rotation_id":"r1","since":"2025-12-31T00:00:00.000Z","#,
                r#""deadline":"2026-01-04T00:00:00.000Z","on_deadline":"hold","replaced_by":2,"#,
                r#""waits_for":"it was last used just now","earliest_end":"2026-01-04T00:00:00.000Z","barrier":null}]"#,
            )
        );
        let event = json(&view.event());
        assert_eq!(event["event"], "status");
        assert_eq!(event["versions"][0]["share"], 0.75);
        assert_eq!(event["rotations"][0]["phase"], "overlap");
        let over = status(Vec::new());
        assert_eq!(json(&over.event())["event"], "ended");
    }

    #[test]
    fn an_overlap_is_shown_with_its_end_and_who_uses_it() {
        let table = fits(status(vec![overlap()]).render(Timestamp::from_millis(NOW)));
        let begin = "KEYRING        payments\n\
             CONSUMER       acme\n\
             KEY ID         7Qm2Xc91TbKe\n\
             ROTATION       version 1 to version 2\n\
             PHASE          overlap\n\
             SINCE          2025-12-31T00:00:00Z, 1d ago\n\
             LAST USED      2026-01-01T00:00:08Z, 2s ago\n\
             OVERLAP UNTIL  2026-01-04T00:00:00Z, in 2d\n\
             ON DEADLINE    hold while the version is used\n\
             WAITS FOR      it was last used just now\n\
             ENDS           2026-01-04T00:00:00Z, in 2d at the earliest\n\
             COMPLETE       until 2026-01-01T00:00:06Z, 4s ago\n\
             GAP            edge-3: ";
        assert!(table.starts_with(begin), "{table}");
        assert!(
            table.contains("\n1        retiring  75%    7.5/s"),
            "{table}"
        );
        assert!(table.contains("10.1.2.3  batch/2.1"), "{table}");
    }

    #[test]
    fn what_is_due_does_not_lie_in_the_past() {
        let mut rotation = overlap();
        rotation.earliest_end = Some(at(NOW / 1_000));
        let table = status(vec![rotation.clone()]).render(Timestamp::from_millis(NOW));
        assert!(table.contains("ENDS           due now\n"), "{table}");
        rotation.earliest_end = None;
        let table = status(vec![rotation]).render(Timestamp::from_millis(NOW));
        assert!(table.contains("ENDS           unknown\n"), "{table}");
    }

    #[test]
    fn a_stage_is_shown_with_its_sidecars() {
        let table = status(vec![stage()]).render(Timestamp::from_millis(NOW));
        assert!(
            table.contains("ROTATION   to version 2\nPHASE      stage\n"),
            "{table}"
        );
        assert!(
            table.contains("SIDECARS   2 of 3 sidecars confirmed\n"),
            "{table}"
        );
        assert!(!table.contains("OVERLAP UNTIL"), "{table}");
        let none = status(Vec::new()).render(Timestamp::from_millis(NOW));
        assert!(none.contains("ROTATION  none in progress\n"), "{none}");
    }

    #[test]
    fn an_outage_is_borne_for_a_bounded_time() {
        let lost = || Failure::from(tonic::Status::unavailable("gone"));
        let mut outage = Outage::default();
        let began = BootTime::from_millis(1_000);
        let just_before = began
            .saturating_add(PATIENCE)
            .saturating_sub(Duration::from_millis(1));
        assert!(outage.bear(lost(), began).expect("it may pass"));
        assert!(!outage.bear(lost(), just_before).expect("it may pass"));
        let failure = outage
            .bear(lost(), began.saturating_add(PATIENCE))
            .expect_err("too long");
        assert_eq!(failure.exit(), Exit::Unreachable);
        assert!(outage.ends());
        assert!(!outage.ends());
        assert!(outage.bear(lost(), just_before).expect("a new outage"));
    }

    #[test]
    fn a_refusal_is_no_outage() {
        let mut outage = Outage::default();
        let denied = Failure::from(tonic::Status::permission_denied("no"));
        let failure = outage.bear(denied, BootTime::default()).expect_err("no");
        assert_eq!(failure.exit(), Exit::NotPermitted);
    }
}
