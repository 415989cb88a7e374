use super::*;
use crate::key::{
    Coverage, PolicyOverrides, VersionNumber, Window, operation,
    operation::{KeySpec, OldEnds, StageSpec},
    testing,
};

const HOUR: Duration = Duration::from_hours(1);
const START: Timestamp = Timestamp::from_millis(1_800_000_000_000);
/// The overlap in the policy of the scene.
const OVERLAP: Duration = Duration::from_hours(10);
const IDLE_FOR: Duration = Duration::from_hours(2);
const REMIND_BEFORE: Duration = Duration::from_hours(3);

/// A keyring with one key, and the evidence of its use.
struct Scene {
    keyring: Keyring,
    key_id: KeyId,
    evidence: Evidence,
    now: Timestamp,
}

impl Scene {
    /// Creates a key whose first version is active since [`START`].
    fn new(lives_for: Option<Duration>) -> Self {
        let first = operation::create_keyring(
            testing::keyring_name(),
            crate::key::Prefix::default(),
            false,
            None,
        );
        let first = first.expect("a valid keyring");
        let key_id = KeyId::generate().expect("the random source works");
        let mut scene = Self {
            keyring: Keyring::begin(START, &first).expect("a first change"),
            key_id,
            evidence: Evidence::default(),
            now: START,
        };
        scene.set(&PolicyOverrides {
            overlap: Some(OVERLAP),
            idle_for: Some(IDLE_FOR),
            remind_before: Some(REMIND_BEFORE),
            ..PolicyOverrides::default()
        });
        let consumer = scene
            .keyring
            .create_consumer("checkout".parse().expect("valid"), String::new());
        scene.commit(consumer.expect("a new consumer"));
        let spec = KeySpec {
            key_id,
            consumer: "checkout".parse().expect("valid"),
            name: String::new(),
            scopes: crate::key::Scopes::default(),
            allowed_sources: crate::key::AllowedSources::default(),
            window: Window::new(None, lives_for.map(|life| START.saturating_add(life))),
            imported: false,
        };
        let secret = testing::secret(key_id);
        let created =
            scene
                .keyring
                .create_key(spec, &secret.presented(), &testing::pepper(), START);
        scene.commit(created.expect("a new key"));
        scene
    }

    /// Creates the same key, one hour after [`START`]. The overlap of version 1 began at `START`,
    /// and version 2 is active.
    fn rotated() -> Self {
        Self::rotated_with(None)
    }

    fn rotated_with(lives_for: Option<Duration>) -> Self {
        let mut scene = Self::new(lives_for);
        let rotation = scene.stage();
        let handed_over = scene.keyring.hand_over(
            scene.key_id,
            rotation,
            &OldEnds::AfterOverlap(None),
            scene.now,
        );
        scene.commit(handed_over.expect("it is staged"));
        scene.at(HOUR)
    }

    fn stage(&mut self) -> crate::key::RotationId {
        let rotation = crate::key::RotationId::generate().expect("the random source works");
        let spec = StageSpec {
            key_id: self.key_id,
            rotation,
            window: Window::default(),
            withdraw_after: self.now.saturating_add(HOUR),
        };
        let secret = testing::secret(self.key_id);
        let staged = self
            .keyring
            .stage(spec, &secret.presented(), &testing::pepper(), self.now);
        self.commit(staged.expect("there is room"));
        rotation
    }

    fn set(&mut self, parts: &PolicyOverrides) {
        let set = self.keyring.set_policy(parts).expect("a valid policy");
        self.commit(set);
    }

    fn on_deadline(mut self, answer: OnDeadline) -> Self {
        self.set(&PolicyOverrides {
            on_deadline: Some(answer),
            ..PolicyOverrides::default()
        });
        self
    }

    fn at(mut self, after: Duration) -> Self {
        self.now = START.saturating_add(after);
        self
    }

    /// Sets the evidence: sidecars have reported all uses until `after`.
    fn told(mut self, after: Duration) -> Self {
        self.evidence.coverage.complete_until = Some(START.saturating_add(after));
        self
    }

    fn used(mut self, version: u32, after: Duration) -> Self {
        let which = self.version(version);
        let used = self.evidence.uses.entry(which).or_default();
        used.requests += 1;
        used.last_used = Some(START.saturating_add(after));
        self
    }

    fn version(&self, number: u32) -> VersionRef {
        VersionRef {
            key_id: self.key_id,
            version: VersionNumber::new(number).expect("from 1"),
        }
    }

    fn plan(&self) -> Vec<Change> {
        plan(&self.keyring, &self.evidence, self.now, usize::MAX)
    }

    /// Commits the changes that are due, and returns their names.
    fn reconcile(&mut self) -> Vec<String> {
        let due = self.plan();
        let names = due.iter().map(name).collect();
        self.commit(due);
        names
    }

    fn commit(&mut self, changes: Vec<Change>) {
        for change in changes {
            let revision = self.keyring.revision().next();
            self.keyring
                .apply(revision, self.now, &change)
                .expect("an operation plans only possible changes");
        }
    }

    fn state(&self, number: u32) -> &'static str {
        let (_, version) = self
            .keyring
            .version(self.version(number))
            .expect("it is there");
        version.state.kind().as_str()
    }

    fn outlook(&self, number: u32) -> Outlook {
        let which = self.version(number);
        outlook(&self.keyring, which, &self.evidence, self.now).expect("a rotation")
    }
}

fn name(change: &Change) -> String {
    let note = match change {
        Change::Noted { note, .. } => match note {
            Note::Reminder { .. } => "reminder",
            Note::Drained { .. } => "drained",
            Note::Held { .. } => "held",
            Note::SecretLost { .. } => "secret lost",
            Note::Expiring { .. } => "expiring",
            Note::RotationDue { .. } => "rotation due",
        },
        other => other.kind(),
    };
    note.to_owned()
}

#[test]
fn an_idle_version_retires_when_its_overlap_is_over_and_not_before() {
    let mut scene = Scene::rotated().used(1, HOUR).told(3 * HOUR);
    let tick = Duration::from_millis(1);
    scene = scene.at(3 * HOUR);
    assert_eq!(scene.reconcile(), ["drained"]);
    assert_eq!(scene.outlook(1).phase, Phase::Drain);
    assert_eq!(
        scene.outlook(1).earliest_end,
        Some(START.saturating_add(OVERLAP))
    );
    scene = scene.told(OVERLAP - tick).at(OVERLAP - tick);
    assert_eq!(scene.reconcile(), [""; 0]);
    scene = scene.at(OVERLAP);
    assert_eq!(scene.reconcile(), ["version_retired"]);
    assert_eq!((scene.state(1), scene.state(2)), ("retired", "active"));
}

#[test]
fn a_version_that_drains_late_retires_at_once() {
    let mut scene = Scene::rotated().used(1, OVERLAP).told(OVERLAP).at(OVERLAP);
    assert_eq!(scene.reconcile(), ["held"]);
    assert_eq!(scene.reconcile(), [""; 0]);
    let outlook = scene.outlook(1);
    assert_eq!(outlook.phase, Phase::Held);
    assert!(
        outlook.waits_for.contains("it was last used at"),
        "{outlook:?}"
    );
    let idle = OVERLAP + IDLE_FOR;
    assert_eq!(outlook.earliest_end, Some(START.saturating_add(idle)));
    scene = scene.told(idle - Duration::from_millis(1)).at(idle);
    assert_eq!(scene.reconcile(), [""; 0]);
    scene = scene.told(idle);
    assert_eq!(scene.reconcile(), ["drained", "version_retired"]);
}

#[test]
fn with_traffic_left_the_policy_says_what_becomes_of_the_deadline() {
    let at_deadline = |answer| {
        Scene::rotated()
            .on_deadline(answer)
            .used(1, OVERLAP - HOUR)
            .told(OVERLAP)
            .at(OVERLAP)
    };
    let mut retire = at_deadline(OnDeadline::Retire);
    assert_eq!(retire.reconcile(), ["version_retired"]);
    let mut hold = at_deadline(OnDeadline::Hold);
    assert_eq!(hold.reconcile(), ["held"]);
    assert_eq!(hold.state(1), "retiring");
    let mut extend = at_deadline(OnDeadline::Extend);
    // The new deadline is near enough for a reminder.
    assert_eq!(extend.reconcile(), ["overlap_extended", "reminder"]);
    let (_, version) = extend
        .keyring
        .version(extend.version(1))
        .expect("it is there");
    assert_eq!(
        version.ends_at(),
        Some(START.saturating_add(OVERLAP + IDLE_FOR))
    );
    assert_eq!(extend.reconcile(), [""; 0]);
}

#[test]
fn an_extension_does_not_outlast_the_version() {
    let life = OVERLAP + HOUR;
    let mut scene = Scene::rotated_with(Some(life))
        .on_deadline(OnDeadline::Extend)
        .used(1, OVERLAP)
        .told(OVERLAP)
        .at(OVERLAP);
    let planned = scene.reconcile();
    assert_eq!(planned[0], "overlap_extended");
    let (_, version) = scene
        .keyring
        .version(scene.version(1))
        .expect("it is there");
    assert_eq!(version.ends_at(), Some(START.saturating_add(life)));
    scene = scene
        .at(life)
        .told(life)
        .used(1, life - Duration::from_millis(1));
    assert_eq!(scene.reconcile(), ["version_retired"]);
}

#[test]
fn silence_and_gaps_are_not_zero_use() {
    let mut silent = Scene::rotated().at(OVERLAP);
    assert_eq!(silent.reconcile(), ["held"]);
    let outlook = silent.outlook(1);
    assert_eq!((outlook.phase, outlook.earliest_end), (Phase::Held, None));

    let mut gap = Scene::rotated().told(OVERLAP).at(OVERLAP);
    gap.evidence.coverage = Coverage {
        gap_until: Some(START.saturating_add(OVERLAP - HOUR)),
        ..gap.evidence.coverage
    };
    assert_eq!(gap.reconcile(), ["held"]);
    assert!(gap.outlook(1).waits_for.contains("vanished"));
    gap = gap.told(OVERLAP + HOUR).at(OVERLAP + HOUR);
    assert_eq!(gap.reconcile(), ["drained", "version_retired"]);
}

#[test]
fn a_version_without_a_successor_stays_whatever_the_policy_says() {
    for answer in [OnDeadline::Retire, OnDeadline::Extend, OnDeadline::Hold] {
        let mut scene = Scene::rotated().on_deadline(answer);
        let revoked = scene.keyring.revoke(
            scene.key_id,
            operation::Which::Version(scene.version(2).version),
            "leaked",
        );
        scene.commit(revoked.expect("it is there"));
        scene = scene.told(OVERLAP).at(OVERLAP);
        assert_eq!(scene.reconcile(), ["drained", "held"], "{answer}");
        assert_eq!(scene.state(1), "retiring");
        let refused = scene
            .keyring
            .retire(scene.key_id, None, &scene.evidence, None, scene.now);
        assert!(
            matches!(refused, Err(crate::key::OperationRefusal::Unsafe(_))),
            "{refused:?}"
        );
        let forced = scene.keyring.retire(
            scene.key_id,
            None,
            &scene.evidence,
            Some("the consumer is gone"),
            scene.now,
        );
        assert!(forced.is_ok());
    }
}

#[test]
fn a_reminder_comes_once_before_each_deadline() {
    let soon = OVERLAP - REMIND_BEFORE;
    let mut scene = Scene::rotated()
        .used(1, soon)
        .told(soon)
        .at(soon - Duration::from_millis(1));
    assert_eq!(scene.reconcile(), [""; 0]);
    scene = scene.at(soon);
    assert_eq!(scene.reconcile(), ["reminder"]);
    assert_eq!(scene.reconcile(), [""; 0]);
    let later = START.saturating_add(2 * OVERLAP);
    let extended = scene
        .keyring
        .extend(scene.key_id, None, later, "they asked");
    scene.commit(extended.expect("it is later"));
    assert_eq!(scene.reconcile(), [""; 0]);
    scene = scene.at(2 * OVERLAP - REMIND_BEFORE);
    assert_eq!(scene.reconcile(), ["reminder"]);
}

#[test]
fn a_staged_version_is_withdrawn_when_its_time_is_over() {
    let mut scene = Scene::new(None);
    scene.stage();
    scene = scene.at(HOUR - Duration::from_millis(1));
    assert_eq!(scene.reconcile(), [""; 0]);
    scene = scene.at(HOUR);
    assert_eq!(scene.reconcile(), ["version_withdrawn"]);
    assert_eq!((scene.state(1), scene.state(2)), ("active", "revoked"));
}

#[test]
fn what_became_of_a_delivery_is_told_by_the_use_of_its_version() {
    let delivering = || {
        let mut scene = Scene::new(None);
        let rotation = scene.stage();
        let sink = "files".parse().expect("a name");
        let until = START.saturating_add(HOUR);
        let begun = scene
            .keyring
            .begin_delivery(scene.key_id, rotation, sink, until);
        scene.commit(begun.expect("it is staged"));
        scene.at(HOUR)
    };
    let mut used = delivering().used(2, HOUR);
    assert_eq!(used.reconcile(), ["handed_over"]);
    assert_eq!((used.state(1), used.state(2)), ("retiring", "active"));

    let mut unknown = delivering();
    assert_eq!(unknown.reconcile(), ["held"]);
    assert_eq!(unknown.outlook(2).phase, Phase::Held);
    assert_eq!((unknown.state(1), unknown.state(2)), ("active", "pending"));
    assert!(due_rotations(&unknown.keyring, unknown.now).is_empty());

    unknown = unknown.told(100 * HOUR).at(100 * HOUR);
    assert_eq!(unknown.reconcile(), [""; 0]);
    let aborted = unknown
        .keyring
        .abort(unknown.key_id, "the sink holds version 1");
    unknown.commit(aborted.expect("it is pending"));
    assert_eq!(unknown.state(2), "revoked");
}

#[test]
fn a_staged_version_is_settled_once_by_the_control_plane_that_comes_after() {
    let left_behind = |scene: &Scene, versions: &[VersionRef]| {
        let changes = settle_left_behind(&scene.keyring, versions, 10);
        (changes.iter().map(name).collect::<Vec<_>>(), changes)
    };
    let mut scene = Scene::new(None);
    scene.stage();
    let versions: Vec<VersionRef> = staged(&scene.keyring).collect();
    assert_eq!(versions, [scene.version(2)]);
    let (names, changes) = left_behind(&scene, &versions);
    assert_eq!(names, ["version_withdrawn"]);
    scene.commit(changes);
    assert_eq!((scene.state(1), scene.state(2)), ("active", "revoked"));
    assert_eq!(left_behind(&scene, &versions).0, [""; 0]);

    // A version that this process stages is not settled.
    scene.stage();
    assert_eq!(left_behind(&scene, &versions).0, [""; 0]);
    assert_eq!(scene.state(3), "pending");
}

#[test]
fn a_secret_that_may_be_in_a_sink_is_reported_lost_and_waited_for_by_its_use_alone() {
    let mut scene = Scene::new(None);
    let rotation = scene.stage();
    let begun = scene.keyring.begin_delivery(
        scene.key_id,
        rotation,
        "files".parse().expect("a name"),
        START.saturating_add(HOUR),
    );
    scene.commit(begun.expect("it is staged"));
    let versions: Vec<VersionRef> = staged(&scene.keyring).collect();
    let lost = settle_left_behind(&scene.keyring, &versions, 10);
    assert_eq!(lost.iter().map(name).collect::<Vec<_>>(), ["secret lost"]);
    scene.commit(lost);

    assert_eq!(settle_left_behind(&scene.keyring, &versions, 10), []);
    assert_eq!(scene.reconcile(), [""; 0]);
    let outlook = scene.outlook(2);
    assert_eq!(outlook.phase, Phase::SecretLost);
    let command = format!("relatch rotate abort {}", scene.key_id);
    assert!(outlook.waits_for.contains(&command), "{outlook:?}");
    scene = scene.at(10 * HOUR);
    assert_eq!(scene.reconcile(), [""; 0], "it is reported once");

    // Immediately: not only after the hour in which a delivery may still be in progress.
    scene = scene
        .at(Duration::from_secs(1))
        .used(2, Duration::from_secs(1));
    assert_eq!(scene.reconcile(), ["handed_over"]);
    assert_eq!((scene.state(1), scene.state(2)), ("retiring", "active"));
}

#[test]
fn people_are_told_once_of_a_key_that_expires() {
    let life = 100 * HOUR;
    let mut scene = Scene::new(Some(life)).at(life - REMIND_BEFORE - Duration::from_millis(1));
    assert_eq!(scene.reconcile(), [""; 0]);
    scene = scene.at(life - REMIND_BEFORE);
    assert_eq!(scene.reconcile(), ["expiring"]);
    assert_eq!(scene.reconcile(), [""; 0]);
}

#[test]
fn a_schedule_rotates_with_a_sink_and_only_tells_without() {
    let every = 100 * HOUR;
    let schedule = |sink: &str| {
        let mut scene = Scene::new(None);
        scene.set(&PolicyOverrides {
            rotate_every: Some(every),
            sink: Some(sink.into()),
            ..PolicyOverrides::default()
        });
        scene
    };
    let mut without = schedule("").at(every - Duration::from_millis(1));
    assert_eq!(without.reconcile(), [""; 0]);
    without = without.at(every);
    assert_eq!(without.reconcile(), ["rotation due"]);
    assert_eq!(without.reconcile(), [""; 0]);
    assert!(due_rotations(&without.keyring, without.now).is_empty());

    let early = schedule("files").at(every - Duration::from_millis(1));
    assert!(due_rotations(&early.keyring, early.now).is_empty());
    let mut due = schedule("files").at(every);
    assert_eq!(due.reconcile(), [""; 0]);
    assert_eq!(due_rotations(&due.keyring, due.now), [due.key_id]);
    due.stage();
    assert!(due_rotations(&due.keyring, due.now).is_empty());
}

#[test]
fn a_clock_that_is_set_back_revives_nothing() {
    let mut scene = Scene::rotated().told(OVERLAP).at(OVERLAP);
    assert_eq!(scene.reconcile(), ["drained", "version_retired"]);
    scene = scene.at(HOUR);
    assert_eq!(scene.reconcile(), [""; 0]);
    assert_eq!(scene.state(1), "retired");
}

#[test]
fn a_roll_back_lets_both_versions_be_used_and_ends_with_the_new_one() {
    let mut scene = Scene::rotated();
    let back = scene
        .keyring
        .roll_back(scene.key_id, "the client crashes", scene.now);
    scene.commit(back.expect("version 1 is retiring"));
    assert_eq!((scene.state(1), scene.state(2)), ("active", "retiring"));
    let over = HOUR + OVERLAP;
    scene = scene.used(1, over).told(over).at(over);
    assert_eq!(scene.reconcile(), ["drained", "version_retired"]);
    assert_eq!((scene.state(1), scene.state(2)), ("active", "retired"));
    // A second roll-back is possible within `rollback_for`.
    let again = scene
        .keyring
        .roll_back(scene.key_id, "it was not that", scene.now);
    scene.commit(again.expect("version 2 retired just now"));
    assert_eq!((scene.state(1), scene.state(2)), ("retiring", "active"));
}

/// Returns the message of a refusal.
fn refused(outcome: Result<Vec<Change>, crate::key::OperationRefusal>) -> String {
    outcome.expect_err("it is refused").to_string()
}

#[test]
fn what_an_overlap_does_not_allow_is_refused_with_the_way_out() {
    let scene = Scene::rotated().used(1, HOUR).told(HOUR);
    let (key_id, keyring, now) = (scene.key_id, &scene.keyring, scene.now);
    let in_use = keyring.retire(key_id, None, &scene.evidence, None, now);
    assert!(matches!(
        in_use,
        Err(crate::key::OperationRefusal::InUse { .. })
    ));
    assert!(refused(in_use).contains("it was last used at"));
    let second = VersionNumber::new(2);
    let active = keyring.retire(key_id, second, &scene.evidence, Some("why"), now);
    assert!(refused(active).ends_with("is active, not retiring"));
    let third = VersionNumber::new(3);
    let unknown = keyring.retire(key_id, third, &scene.evidence, Some("why"), now);
    assert!(matches!(
        unknown,
        Err(crate::key::OperationRefusal::NoVersion(_))
    ));
    assert!(refused(unknown).ends_with(" has no version 3"));
    let unexplained = keyring.retire(key_id, None, &scene.evidence, Some(" "), now);
    assert!(refused(unexplained).starts_with("reason: use 1 to 512 bytes"));
    let earlier = START.saturating_add(OVERLAP);
    let earlier = keyring.extend(key_id, None, earlier, "why");
    assert!(refused(earlier).contains("give a later end"));
    let nothing_staged = keyring.abort(key_id, "why");
    assert!(refused(nothing_staged).ends_with("`relatch rotate rollback`"));
}

#[test]
fn an_overlap_that_ends_with_the_version_cannot_be_extended() {
    let scene = Scene::rotated_with(Some(OVERLAP));
    let later = START.saturating_add(2 * OVERLAP);
    let extended = scene.keyring.extend(scene.key_id, None, later, "why");
    assert!(refused(extended).contains("an overlap cannot outlast that"));
}

#[test]
fn more_than_one_retiring_version_has_to_be_named() {
    let mut scene = Scene::rotated();
    let rotation = scene.stage();
    let overlap = OldEnds::AfterOverlap(None);
    let again = scene
        .keyring
        .hand_over(scene.key_id, rotation, &overlap, scene.now);
    scene.commit(again.expect("it is staged"));
    let later = START.saturating_add(3 * OVERLAP);
    let extend = |version| scene.keyring.extend(scene.key_id, version, later, "why");
    assert!(refused(extend(None)).contains("more than one version is retiring; name one"));
    assert!(extend(VersionNumber::new(1)).is_ok());
    let back = scene.keyring.roll_back(scene.key_id, "why", scene.now);
    let back = back.expect("version 2 was replaced last");
    assert!(matches!(back[..], [Change::RolledBack { version, .. }] if version.get() == 2));
}

#[test]
fn a_version_that_cannot_come_back_does_not() {
    let roll_back =
        |scene: &Scene| refused(scene.keyring.roll_back(scene.key_id, "why", scene.now));
    let never_rotated = Scene::new(None);
    assert!(roll_back(&never_rotated).contains("no former version"));

    let mut staged = Scene::rotated();
    staged.stage();
    assert!(roll_back(&staged).contains("relatch rotate abort"));

    let expired = Scene::rotated_with(Some(2 * HOUR)).at(2 * HOUR);
    assert!(roll_back(&expired).contains("has expired"));

    let mut late = Scene::rotated().told(OVERLAP).at(OVERLAP);
    assert_eq!(late.reconcile(), ["drained", "version_retired"]);
    let rollback_for = RotationPolicy::default().rollback_for;
    late = late.at(OVERLAP + rollback_for - Duration::from_millis(1));
    let back = late.keyring.roll_back(late.key_id, "why", late.now);
    assert!(back.is_ok(), "{back:?}");
    late = late.at(OVERLAP + rollback_for);
    assert!(roll_back(&late).contains("longer ago than rollback_for allows"));
}

#[test]
fn an_emergency_revokes_the_old_version_in_the_same_commit() {
    let mut scene = Scene::new(None);
    let rotation = scene.stage();
    let at_once = OldEnds::AtOnce("leaked".into());
    let handed_over = scene
        .keyring
        .hand_over(scene.key_id, rotation, &at_once, scene.now);
    let handed_over = handed_over.expect("it is staged");
    let kinds: Vec<_> = handed_over.iter().map(Change::kind).collect();
    assert_eq!(kinds, ["handed_over", "versions_revoked"]);
    scene.commit(handed_over);
    assert_eq!((scene.state(1), scene.state(2)), ("revoked", "active"));
}
