use std::time::Duration;

use super::*;
use crate::{
    budget::{Budget, Rate},
    key::{Epoch, KeyId, KeyRecord, KeyState, Secret, testing},
    keyring::{DeltaError, KeyringSettings, Keyrings, Mode, Slot, Staleness},
};

mod groups;

const EPOCH: Epoch = Epoch::new(7);
const SETTINGS: CacheSettings = CacheSettings {
    max_size: 1 << 20,
    ttl: Duration::from_mins(10),
    negative_ttl: Duration::from_secs(10),
    lookup_timeout: Duration::from_millis(150),
    unknown_budget: Rate {
        per_second: 1,
        burst: 3,
    },
};
const START: BootTime = BootTime::from_millis(1_000);

/// A keyring at revision 10 that is followed, with nothing looked up.
struct Followed {
    keyrings: Keyrings,
    follower: Follower,
}

impl Followed {
    fn new() -> Self {
        let name = testing::keyring_name();
        let mode = Mode::OnDemand(SETTINGS);
        let keyrings = Keyrings::with_modes([(name, Staleness::default(), mode)]);
        let slot = slot(&keyrings);
        let cache = slot.cache().cloned().expect("it is held on demand");
        let mut follower = Follower::new(slot, cache);
        follower.adopt(KeyringSettings {
            prefix: crate::key::Prefix::default(),
            issued_only: true,
            peppers: vec![testing::pepper()],
            help_url: None,
        });
        assert_eq!(follower.start(EPOCH, revision(10)), Ok(true));
        follower.connected();
        Self { keyrings, follower }
    }

    fn cache(&self) -> Arc<KeyCache> {
        let slot = slot(&self.keyrings);
        slot.cache().cloned().expect("it is held on demand")
    }

    fn find(&self, secret: &Secret, now: BootTime) -> Finding {
        let peppers = [testing::pepper()];
        self.cache().find(&peppers, &secret.presented(), &[], now)
    }

    /// The state in which a key is held; none when it has to be looked up.
    fn state(&self, secret: &Secret, now: BootTime) -> Option<KeyState> {
        match self.find(secret, now) {
            Finding::Held(cached) => Some(cached.key().held().state()),
            Finding::Ended(..) | Finding::Missing(_) => None,
            Finding::Unknown => panic!("it is known"),
        }
    }

    fn fill(&mut self, at: u64, digest: KeyDigest, record: Option<KeyRecord>, now: BootTime) {
        let fill = Fill {
            epoch: EPOCH,
            revision: revision(at),
            digest,
            found: record.map_or(Found::Nothing, |record| Found::Version(Box::new(record))),
            siblings: Some(Vec::new()),
        };
        self.follower.fill(fill, now);
    }

    fn delta(&mut self, to: u64, revocations: &[KeyRecord], upserts: &[KeyRecord]) {
        let from = revision(to - 1);
        self.follower
            .apply_delta(EPOCH, from, revision(to), revocations, upserts, &[])
            .expect("it follows");
    }

    fn wait(&self, digest: KeyDigest, now: BootTime) -> Waiting {
        self.cache().look_up(digest, now).expect("it may wait")
    }

    fn requests(&self) -> usize {
        std::iter::from_fn(|| self.cache().next_request()).count()
    }
}

fn slot(keyrings: &Keyrings) -> Arc<Slot> {
    keyrings
        .get(&testing::keyring_name())
        .expect("it is configured")
}

fn revision(number: u64) -> Revision {
    Revision::new(number)
}

fn key() -> (Secret, KeyRecord) {
    let secret = testing::secret(KeyId::generate().expect("the random source works"));
    let record = testing::record_of(&secret);
    (secret, record)
}

fn revoked(record: &KeyRecord) -> KeyRecord {
    KeyRecord {
        state: KeyState::Revoked,
        ..record.clone()
    }
}

fn later(millis: u64) -> BootTime {
    START.saturating_add(Duration::from_millis(millis))
}

fn held(answer: Option<Answer>) -> KeyState {
    match answer {
        Some(Answer::Held(cached)) => cached.key().held().state(),
        other => panic!("{other:?} holds nothing"),
    }
}

#[test]
fn checks_that_want_one_key_share_a_lookup() {
    let mut followed = Followed::new();
    let (secret, record) = key();
    let Finding::Missing(digest) = followed.find(&secret, START) else {
        panic!("nothing was looked up");
    };
    let waiting: Vec<_> = (0..3).map(|_| followed.wait(digest, START)).collect();
    assert_eq!(followed.requests(), 1);
    assert!(waiting[0].collect().is_none());
    followed.fill(10, digest, Some(record), START);
    for waiting in waiting {
        assert_eq!(held(waiting.collect()), KeyState::Active);
    }
    assert_eq!(followed.state(&secret, START), Some(KeyState::Active));
    assert_eq!(followed.requests(), 0);
    assert!(followed.cache().lock_lookups().flights.is_empty());
}

#[test]
fn a_lookup_that_nobody_answers_is_sent_again_after_its_time() {
    let followed = Followed::new();
    let (_, record) = key();
    let _first = followed.wait(record.digest, START);
    let _second = followed.wait(record.digest, later(149));
    assert_eq!(followed.requests(), 1);
    let _third = followed.wait(record.digest, later(150));
    assert_eq!(followed.requests(), 1);
}

#[test]
fn unknown_keys_use_the_budget_up_and_known_ones_do_not() {
    let mut followed = Followed::new();
    for _ in 0..10 {
        let (secret, record) = key();
        let waiting = followed.wait(record.digest, START);
        followed.fill(10, record.digest, Some(record), START);
        assert_eq!(held(waiting.collect()), KeyState::Active);
        assert_eq!(followed.state(&secret, START), Some(KeyState::Active));
    }
    for _ in 0..3 {
        let (secret, record) = key();
        let waiting = followed.wait(record.digest, START);
        followed.fill(10, record.digest, None, START);
        assert!(matches!(waiting.collect(), Some(Answer::Unknown)));
        assert!(matches!(followed.find(&secret, START), Finding::Unknown));
    }
    let (_, record) = key();
    let refused = followed.cache().look_up(record.digest, START);
    assert_eq!(refused.err(), Some(LookupRefusal::OverBudget));
    let cache = followed.cache();
    let stats = cache.stats();
    assert_eq!(stats.refusals(LookupRefusal::OverBudget), 1);
    assert_eq!(stats.lookups(LookupOutcome::Found), 10);
    assert_eq!(stats.lookups(LookupOutcome::Unknown), 3);
    followed.wait(record.digest, later(1_000));
}

#[test]
fn no_more_checks_wait_than_there_is_room_for() {
    let followed = Followed::new();
    let (_, record) = key();
    let waiting: Vec<_> = (0..MAX_WAITING)
        .map(|_| followed.wait(record.digest, START))
        .collect();
    let refused = followed.cache().look_up(record.digest, START);
    assert_eq!(refused.err(), Some(LookupRefusal::Crowded));
    drop(waiting);
    followed.wait(record.digest, START);
}

#[test]
fn lookups_that_nobody_waits_for_make_room() {
    let followed = Followed::new();
    let cache = followed.cache();
    let mut lookups = cache.lock_lookups();
    lookups.budget = Budget::new(Rate {
        per_second: 1,
        burst: 100_000,
    });
    drop(lookups);
    for _ in 0..MAX_WAITING {
        followed.wait(key().1.digest, START);
    }
    let refused = followed.cache().look_up(key().1.digest, later(149));
    assert_eq!(refused.err(), Some(LookupRefusal::Crowded));
    followed.wait(key().1.digest, later(150));
}

#[tokio::test]
async fn a_stream_that_ends_wakes_those_who_wait() {
    let followed = Followed::new();
    let (_, record) = key();
    let mut waiting = followed.wait(record.digest, START);
    followed.follower.disconnected();
    (&mut waiting).await;
    assert!(matches!(
        waiting.collect(),
        Some(Answer::Failed(Failure::Lost))
    ));
    let refused = followed.cache().look_up(record.digest, START);
    assert_eq!(refused.err(), Some(LookupRefusal::Offline));
    drop(waiting);
    followed.follower.connected();
    assert_eq!(followed.requests(), 0);
    // It cost nothing.
    let budget = followed.cache().lock_lookups().budget.take(START);
    assert!(budget);
    let waiting = followed.wait(record.digest, START);
    assert!(waiting.collect().is_none());
    assert_eq!(followed.requests(), 1);
}

#[test]
fn an_entry_is_looked_up_again_when_it_is_used_near_its_end_and_ends_otherwise() {
    let mut followed = Followed::new();
    let (secret, record) = key();
    followed.fill(10, record.digest, Some(record.clone()), START);
    let Finding::Held(cached) = followed.find(&secret, START) else {
        panic!("it was looked up");
    };
    let end = BootTime::from_millis(cached.expires_at);
    let life = end.saturating_since(START);
    assert!(life <= SETTINGS.ttl && life >= SETTINGS.ttl.mul_f64(0.9));
    let tick = Duration::from_millis(1);
    let due = end.saturating_sub(SETTINGS.ttl / 10);
    followed.find(&secret, due.saturating_sub(tick));
    assert_eq!(followed.requests(), 0);
    followed.find(&secret, due);
    followed.find(&secret, due);
    assert_eq!(followed.requests(), 1);
    assert!(followed.state(&secret, end.saturating_sub(tick)).is_some());
    assert_eq!(followed.state(&secret, end), None);
    followed.fill(10, record.digest, Some(record), due);
    assert_eq!(followed.state(&secret, end), Some(KeyState::Active));
    assert_eq!(followed.cache().stats().refreshes(), 1);
}

#[test]
fn an_entry_that_has_ended_is_looked_up_at_nobodys_expense_and_is_there_meanwhile() {
    let mut followed = Followed::new();
    let (secret, record) = key();
    followed.fill(10, record.digest, Some(record.clone()), START);
    // Checks with keys that do not exist have spent the budget, and continue to do so.
    let long = START.saturating_add(SETTINGS.ttl);
    for _ in 0..3 {
        followed.wait(key().1.digest, long);
    }
    let refused = followed.cache().look_up(key().1.digest, long);
    assert_eq!(refused.err(), Some(LookupRefusal::OverBudget));
    assert_eq!(followed.requests(), 3);

    let Finding::Ended(_, digest) = followed.find(&secret, long) else {
        panic!("it was to end by then");
    };
    let waiting = followed.wait(digest, long);
    assert_eq!(followed.requests(), 1);
    let revoked = KeyRecord {
        state: KeyState::Revoked,
        ..record.clone()
    };
    followed.fill(11, digest, Some(record), long);
    assert_eq!(held(waiting.collect()), KeyState::Active);
    // The lookup was not charged, and no token is refunded for it.
    let refused = followed.cache().look_up(key().1.digest, long);
    assert_eq!(refused.err(), Some(LookupRefusal::OverBudget));

    // Without a stream the entry stays, with all changes that were applied to it.
    followed.follower.disconnected();
    let longer = long.saturating_add(SETTINGS.ttl);
    let refused = followed.cache().look_up(digest, longer);
    assert_eq!(refused.err(), Some(LookupRefusal::Offline));
    assert_eq!(followed.cache().stats().refusals(LookupRefusal::Offline), 0);
    let ended = |followed: &Followed| match followed.find(&secret, longer) {
        Finding::Ended(cached, _) => cached.key().held().state(),
        found => panic!("{found:?}"),
    };
    assert_eq!(ended(&followed), KeyState::Active);
    followed
        .follower
        .revoke(EPOCH, Revision::new(12), &[revoked]);
    assert_eq!(ended(&followed), KeyState::Revoked);
    // After a start the entry is not used again.
    assert_eq!(followed.follower.start(EPOCH, Revision::new(20)), Ok(true));
    assert!(matches!(
        followed.find(&secret, longer),
        Finding::Missing(_)
    ));
}

#[test]
fn an_answer_that_cannot_be_read_ends_what_is_held() {
    let mut followed = Followed::new();
    let (secret, record) = key();
    let digest = record.digest;
    followed.fill(10, digest, Some(record), START);
    let long = START.saturating_add(SETTINGS.ttl);
    let Finding::Ended(..) = followed.find(&secret, long) else {
        panic!("it was to end by then");
    };
    let waiting = followed.wait(digest, long);
    let unreadable = Fill {
        epoch: EPOCH,
        revision: revision(11),
        digest,
        found: Found::Unreadable,
        siblings: None,
    };
    followed.follower.fill(unreadable, long);
    assert!(matches!(
        waiting.collect(),
        Some(Answer::Failed(Failure::Unreadable))
    ));
    // A check whose lookup failed finds no entry to fall back on.
    assert!(matches!(followed.find(&secret, long), Finding::Missing(_)));
}

#[test]
fn that_a_key_is_unknown_is_believed_for_its_time_and_until_the_key_is_made() {
    let mut followed = Followed::new();
    let (secret, record) = key();
    followed.fill(10, record.digest, None, START);
    assert!(matches!(
        followed.find(&secret, later(9_999)),
        Finding::Unknown
    ));
    assert_eq!(followed.state(&secret, later(10_000)), None);
    followed.delta(11, &[], &[record]);
    assert_eq!(followed.state(&secret, START), None);
}

#[test]
fn an_answer_that_is_older_than_a_revocation_ahead_of_its_delta_is_dropped() {
    let mut followed = Followed::new();
    let ((secret, record), (_, other)) = (key(), key());
    followed
        .follower
        .revoke(EPOCH, revision(12), &[revoked(&other)]);
    let waiting = followed.wait(record.digest, START);
    followed.fill(11, record.digest, Some(record.clone()), START);
    assert!(matches!(
        waiting.collect(),
        Some(Answer::Failed(Failure::Outdated))
    ));
    assert_eq!(followed.state(&secret, START), None);
    followed.fill(12, record.digest, Some(record), START);
    assert_eq!(followed.state(&secret, START), Some(KeyState::Active));
}

#[test]
fn an_answer_of_another_epoch_is_dropped() {
    let mut followed = Followed::new();
    let (secret, record) = key();
    let fill = Fill {
        epoch: Epoch::new(8),
        revision: revision(99),
        digest: record.digest,
        found: Found::Version(Box::new(record)),
        siblings: Some(Vec::new()),
    };
    followed.follower.fill(fill, START);
    assert_eq!(followed.state(&secret, START), None);
}

#[test]
fn an_answer_that_waits_to_be_collected_is_kept_true() {
    let mut followed = Followed::new();
    let (_, record) = key();
    let waiting = followed.wait(record.digest, START);
    followed.fill(10, record.digest, Some(record.clone()), START);
    followed
        .follower
        .revoke(EPOCH, revision(11), &[revoked(&record)]);
    assert_eq!(held(waiting.collect()), KeyState::Revoked);

    let (_, record) = key();
    let waiting = followed.wait(record.digest, START);
    followed.fill(11, record.digest, None, START);
    followed.delta(11, &[], std::slice::from_ref(&record));
    assert_eq!(held(waiting.collect()), KeyState::Active);
    assert_eq!(followed.follower.start(EPOCH, revision(12)), Ok(true));
    assert!(matches!(
        waiting.collect(),
        Some(Answer::Failed(Failure::Outdated))
    ));
}

#[test]
fn a_delta_that_an_answer_has_already_changes_nothing() {
    let mut followed = Followed::new();
    let (secret, record) = key();
    let retired = KeyRecord {
        state: KeyState::Retired,
        ..record.clone()
    };
    followed.fill(12, record.digest, Some(retired.clone()), START);
    followed.delta(11, &[], &[record]);
    assert_eq!(followed.state(&secret, START), Some(KeyState::Retired));
    followed.delta(12, &[], &[retired]);
    assert_eq!(followed.state(&secret, START), Some(KeyState::Retired));
}

/// Also where a newer answer is held, and where a check waits for one.
#[test]
fn a_revocation_ends_a_version_whatever_its_record_says() {
    let (secret, record) = key();
    let mut followed = Followed::new();
    let waiting = followed.wait(record.digest, START);
    followed.fill(12, record.digest, Some(record.clone()), START);
    followed
        .follower
        .revoke(EPOCH, revision(11), std::slice::from_ref(&record));
    assert_eq!(followed.state(&secret, START), Some(KeyState::Revoked));
    assert_eq!(held(waiting.collect()), KeyState::Revoked);
}

#[test]
fn a_revocation_outlives_its_entry_and_its_epoch() {
    let mut followed = Followed::new();
    let (secret, record) = key();
    followed.delta(11, &[revoked(&record)], &[]);
    assert_eq!(
        followed.follower.start(Epoch::new(8), revision(3)),
        Ok(true)
    );
    let fill = Fill {
        epoch: Epoch::new(8),
        revision: revision(3),
        digest: record.digest,
        found: Found::Version(Box::new(record)),
        siblings: Some(Vec::new()),
    };
    followed.follower.fill(fill, START);
    assert_eq!(followed.state(&secret, START), Some(KeyState::Revoked));
}

#[test]
fn a_revocation_that_came_as_an_answer_outlives_its_epoch() {
    let mut followed = Followed::new();
    let (secret, record) = key();
    followed.fill(11, record.digest, Some(revoked(&record)), START);
    let epoch = Epoch::new(8);
    assert_eq!(followed.follower.start(epoch, revision(3)), Ok(true));
    let fill = Fill {
        epoch,
        revision: revision(3),
        digest: record.digest,
        found: Found::Version(Box::new(record)),
        siblings: Some(Vec::new()),
    };
    followed.follower.fill(fill, START);
    assert_eq!(followed.state(&secret, START), Some(KeyState::Revoked));
}

#[test]
fn a_start_drops_what_was_looked_up_and_never_goes_back() {
    let mut followed = Followed::new();
    let ((secret, record), (nobodys, unknown)) = (key(), key());
    followed.fill(10, record.digest, Some(record), START);
    followed.fill(10, unknown.digest, None, START);
    let older = followed.follower.start(EPOCH, revision(9));
    let (held, found) = (revision(10), revision(9));
    assert_eq!(older, Err(StartError { held, found }));
    assert!(followed.state(&secret, START).is_some());
    assert_eq!(followed.follower.start(EPOCH, revision(10)), Ok(true));
    assert_eq!(followed.state(&secret, START), None);
    assert_eq!(followed.state(&nobodys, START), None);
}

#[test]
fn entries_go_when_there_is_no_room() {
    let mut followed = Followed::new();
    for _ in 0..10_000 {
        let (_, record) = key();
        followed.fill(10, record.digest, Some(record), START);
    }
    followed.cache().tidy();
    assert!(followed.cache().bytes() <= SETTINGS.max_size);
    assert!(followed.cache().bytes() > SETTINGS.max_size / 2);
    let gone = followed.cache().stats().evictions();
    assert_eq!(gone + followed.cache().len(), 10_000);
}

#[test]
fn a_delta_never_leads_back() {
    let mut followed = Followed::new();
    let from = revision(10);
    for to in [from, revision(9)] {
        let applied = followed
            .follower
            .apply_delta(EPOCH, from, to, &[], &[], &[]);
        assert_eq!(applied, Err(DeltaError::Backwards { from, to }));
    }
    assert_eq!(followed.follower.position().revision, from);
}
