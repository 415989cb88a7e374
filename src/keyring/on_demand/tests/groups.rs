//! The versions of one key are held together.

use super::*;
use crate::key::VersionNumber;

/// Secrets of one key, and their versions: the first is active, the others are pending.
fn versions<const N: usize>() -> [(Secret, KeyRecord); N] {
    let key_id = KeyId::generate().expect("the random source works");
    std::array::from_fn(|index| {
        let secret = testing::secret(key_id);
        let number = u32::try_from(index + 1).expect("few");
        let record = KeyRecord {
            key_id,
            version: VersionNumber::new(number).expect("not zero"),
            state: if index == 0 {
                KeyState::Active
            } else {
                KeyState::Pending
            },
            ..testing::record_of(&secret)
        };
        (secret, record)
    })
}

fn retired(record: &KeyRecord) -> KeyRecord {
    KeyRecord {
        state: KeyState::Retired,
        ..record.clone()
    }
}

impl Followed {
    /// The control plane answers a lookup of `record`, which has `siblings`.
    fn fill_with(&mut self, at: u64, record: &KeyRecord, siblings: Option<&[&KeyRecord]>) {
        let siblings = siblings.map(|all| all.iter().map(|sibling| (*sibling).clone()).collect());
        let fill = Fill {
            epoch: EPOCH,
            revision: revision(at),
            digest: record.digest,
            found: Found::Version(Box::new(record.clone())),
            siblings,
        };
        self.follower.fill(fill, START);
    }

    /// Does all deferred work.
    fn tidy(&mut self) {
        self.cache().tidy();
        self.follower.groups.tidy();
        self.cache().tidy();
    }
}

#[test]
fn siblings_are_held_with_the_version_that_was_looked_up() {
    let mut followed = Followed::new();
    let [(old, active), (new, pending)] = versions();
    followed.fill(10, pending.digest, None, START);
    followed.fill_with(10, &active, Some(&[&pending]));
    assert_eq!(followed.state(&old, START), Some(KeyState::Active));
    assert_eq!(followed.state(&new, START), Some(KeyState::Pending));
    followed.tidy();
    assert_eq!(followed.cache().len(), 2);

    // Which of them is looked up does not matter, and they are looked up again together.
    let later = later(1_000);
    let expired = |followed: &Followed, secret: &Secret| match followed.find(secret, later) {
        Finding::Held(cached) => cached.expires_at,
        found => panic!("{found:?}"),
    };
    let first = expired(&followed, &old);
    let fill = Fill {
        epoch: EPOCH,
        revision: revision(11),
        digest: pending.digest,
        found: Found::Version(Box::new(pending)),
        siblings: Some(vec![active]),
    };
    followed.follower.fill(fill, later);
    assert_eq!(expired(&followed, &old), expired(&followed, &new));
    assert_ne!(expired(&followed, &old), first);
    followed.tidy();
    assert_eq!(followed.cache().len(), 2);
}

#[test]
fn a_staged_version_joins_those_that_are_held() {
    let mut followed = Followed::new();
    let [(old, active), (new, pending)] = versions();
    followed.fill_with(10, &active, Some(&[]));
    followed.delta(11, &[], std::slice::from_ref(&pending));
    assert_eq!(followed.state(&new, START), Some(KeyState::Pending));
    let handed_over = [
        KeyRecord {
            state: KeyState::Retiring,
            ..active
        },
        KeyRecord {
            state: KeyState::Active,
            ..pending
        },
    ];
    followed.delta(12, &[], &handed_over);
    followed.follower.disconnected();
    assert_eq!(followed.state(&old, START), Some(KeyState::Retiring));
    assert_eq!(followed.state(&new, START), Some(KeyState::Active));
    followed
        .follower
        .revoke(EPOCH, revision(13), &handed_over[..1]);
    assert_eq!(followed.state(&old, START), Some(KeyState::Revoked));
    assert_eq!(followed.state(&new, START), Some(KeyState::Active));
    // Nothing is kept of a key that is not held.
    let (other, record) = key();
    followed.delta(13, &[], &[record]);
    assert_eq!(followed.state(&other, START), None);
    assert_eq!(followed.requests(), 0);
}

#[test]
fn what_an_answer_has_ended_already_does_not_join() {
    let mut followed = Followed::new();
    let [(_, active), (withdrawn, pending), (new, next)] = versions();
    followed.fill_with(13, &active, Some(&[]));
    followed.delta(11, &[], &[pending]);
    assert_eq!(followed.state(&withdrawn, START), None);
    followed.delta(12, &[], &[]);
    followed.delta(13, &[], &[]);
    followed.delta(14, &[], &[retired(&next)]);
    assert_eq!(followed.state(&new, START), None);
    followed.delta(15, &[], &[next]);
    assert_eq!(followed.state(&new, START), Some(KeyState::Pending));
}

#[test]
fn a_key_goes_with_all_its_versions_when_there_is_no_room() {
    const KEYS: u64 = 5_000;
    let mut followed = Followed::new();
    let keys: Vec<_> = (0..KEYS).map(|_| versions::<2>()).collect();
    for [(_, active), (_, pending)] in &keys {
        followed.fill_with(10, active, Some(&[pending]));
    }
    followed.tidy();
    let cache = followed.cache();
    assert!(cache.bytes() <= SETTINGS.max_size);
    assert!(cache.bytes() > SETTINGS.max_size / 2);
    let mut held = 0;
    for [(_, active), (_, pending)] in &keys {
        assert_eq!(cache.holds(&active.digest), cache.holds(&pending.digest));
        held += u64::from(cache.holds(&active.digest));
    }
    assert!(held > 0 && held < KEYS, "{held}");
    assert_eq!(cache.len(), 2 * held);
    assert_eq!(cache.stats().evictions(), 2 * (KEYS - held));
    assert_eq!(followed.follower.groups.len() as u64, held);
}

#[test]
fn a_use_of_one_version_keeps_all_of_them_and_a_new_one_finds_room() {
    let mut followed = Followed::new();
    let [(old, active), (new, pending), (_, next)] = versions();
    followed.fill_with(10, &active, Some(&[&pending]));
    for _ in 0..5_000 {
        let (_, record) = key();
        followed.fill(10, record.digest, Some(record), START);
        assert_eq!(followed.state(&new, START), Some(KeyState::Pending));
        followed.cache().tidy();
    }
    assert!(followed.cache().stats().evictions() > 0);
    assert_eq!(followed.state(&old, START), Some(KeyState::Active));
    followed.delta(11, &[], std::slice::from_ref(&next));
    followed.tidy();
    for record in [active, pending, next] {
        assert!(followed.cache().holds(&record.digest));
    }
}

#[test]
fn a_key_is_not_held_where_one_of_its_versions_cannot_be_read() {
    let mut followed = Followed::new();
    let [(old, active), (new, pending)] = versions();
    let waiting = followed.wait(active.digest, START);
    followed.fill_with(10, &active, None);
    assert_eq!(held(waiting.collect()), KeyState::Active);
    assert_eq!(followed.state(&old, START), None);
    // Where the key is held, the nack of the delta named the unreadable version. The other versions
    // still arrive.
    followed.fill_with(10, &active, Some(&[]));
    followed.fill_with(12, &retired(&active), None);
    assert_eq!(followed.state(&old, START), Some(KeyState::Retired));
    followed.delta(11, &[], &[pending]);
    assert_eq!(followed.state(&new, START), Some(KeyState::Pending));
}

#[test]
fn versions_that_have_ended_do_not_pile_up() {
    let mut followed = Followed::new();
    let all = versions::<12>();
    let (_, active) = &all[0];
    followed.fill_with(10, active, Some(&[]));
    for (at, (secret, record)) in (11..).zip(&all[1..]) {
        let ended = retired(record);
        let fill = Fill {
            epoch: EPOCH,
            revision: revision(at),
            digest: ended.digest,
            found: Found::Version(Box::new(ended)),
            siblings: Some(vec![active.clone()]),
        };
        let now = later(at);
        followed.follower.fill(fill, now);
        assert_eq!(followed.state(secret, now), Some(KeyState::Retired));
    }
    followed.tidy();
    assert_eq!(followed.cache().len(), 5);
    let held = all.iter().map(|(_, record)| &record.digest);
    assert_eq!(held.filter(|it| followed.cache().holds(it)).count(), 5);
    assert!(followed.cache().holds(&active.digest));
}

#[test]
fn a_start_ends_all_versions_and_another_one_may_be_looked_up_first() {
    let mut followed = Followed::new();
    let [(old, active), (new, pending)] = versions();
    followed.fill_with(10, &active, Some(&[&pending]));
    assert_eq!(followed.follower.start(EPOCH, revision(12)), Ok(true));
    assert_eq!(followed.state(&old, START), None);
    assert_eq!(followed.state(&new, START), None);
    // An older generation is no group to join.
    followed.delta(13, &[], std::slice::from_ref(&pending));
    assert_eq!(followed.state(&new, START), None);
    followed.fill_with(13, &pending, Some(&[&active]));
    assert_eq!(followed.state(&old, START), Some(KeyState::Active));
    assert_eq!(followed.state(&new, START), Some(KeyState::Pending));
    followed.tidy();
    assert_eq!(followed.cache().len(), 2);
    assert_eq!(followed.follower.groups.len(), 1);
}

#[test]
fn a_key_of_which_a_version_is_removed_is_looked_up_anew() {
    let mut followed = Followed::new();
    let [(_, active), (new, pending)] = versions();
    followed.fill_with(10, &active, Some(&[&pending]));
    followed.fill(11, pending.digest, None, START);
    assert!(!followed.cache().holds(&active.digest));
    assert!(matches!(followed.find(&new, START), Finding::Unknown));
    followed.fill_with(11, &active, Some(&[&pending]));
    let removals = [pending.digest];
    followed
        .follower
        .apply_delta(EPOCH, revision(10), revision(12), &[], &[], &removals)
        .expect("it follows");
    followed.tidy();
    assert_eq!(followed.cache().len(), 0);
    assert_eq!(followed.follower.groups.len(), 0);
}

/// Whichever key the control plane assigns the digest to.
#[test]
fn a_digest_is_of_one_key_and_its_revocation_ends_it() {
    let mut followed = Followed::new();
    let [(_, active), (new, pending)] = versions();
    let (_, other) = key();
    followed.fill_with(10, &active, Some(&[&pending]));
    let moved = KeyRecord {
        key_id: other.key_id,
        ..pending.clone()
    };
    followed.fill_with(10, &moved, Some(&[]));
    followed
        .follower
        .revoke(EPOCH, revision(11), std::slice::from_ref(&pending));
    assert_eq!(followed.state(&new, START), Some(KeyState::Revoked));
    followed.cache().evict(&moved.digest);
    assert_eq!(followed.state(&new, START), None);
    // The head of one is the head of the other.
    let [(old, active), (new, pending)] = versions();
    followed.fill_with(11, &active, Some(&[]));
    let moved = KeyRecord {
        key_id: other.key_id,
        ..active
    };
    followed.fill_with(11, &moved, Some(&[]));
    followed.delta(11, &[], &[]);
    followed.delta(12, &[], &[pending]);
    assert_eq!(followed.state(&old, START), Some(KeyState::Active));
    assert_eq!(followed.state(&new, START), None);
}
