use std::{
    sync::{Barrier, atomic::AtomicUsize},
    thread,
};

use super::*;
use crate::{
    key::{KeyId, VersionNumber, testing},
    keyring::OwnedKey,
};

const CHECKS: usize = 3;
/// A check that announces before it adds loses a use in one of some ten thousand rounds.
const ROUNDS: u64 = 20_000;

fn at(millis: i64) -> Timestamp {
    Timestamp::from_millis(millis)
}

fn versions(count: usize) -> Vec<VersionRef> {
    let version = |_| VersionRef {
        key_id: KeyId::generate().expect("the random source works"),
        version: VersionNumber::FIRST,
    };
    (0..count).map(version).collect()
}

#[test]
fn a_use_is_counted_with_its_times() {
    let ledger = Ledger::default();
    let usage = ledger.of_version(versions(1)[0]);
    assert_eq!(ledger.get(usage).read(), Use::default());
    for (now, denied) in [(50, false), (40, true), (60, false), (55, true)] {
        ledger.count(usage, at(now), denied);
    }
    let expected = Use {
        requests: 4,
        denied: 2,
        first_used: Some(at(40)),
        last_used: Some(at(60)),
    };
    assert_eq!(ledger.get(usage).read(), expected);
}

#[test]
fn used_versions_are_taken_once_until_they_are_used_again() {
    let ledger = Ledger::default();
    let versions = versions(3);
    let usages: Vec<_> = versions
        .iter()
        .map(|version| ledger.of_version(*version))
        .collect();
    let taken = || -> Vec<VersionRef> {
        let taken = ledger.take_used();
        taken
            .iter()
            .map(|usage| ledger.get(*usage).version())
            .collect()
    };
    for usage in [usages[0], usages[1], usages[0]] {
        ledger.count(usage, at(1), false);
    }
    assert_eq!(ledger.waiting(), 2);
    assert_eq!(taken(), versions[..2]);
    assert_eq!(taken(), []);
    for denied in [true, false, true] {
        ledger.count(usages[1], at(2), denied);
    }
    assert_eq!(taken(), versions[1..2]);
    assert_eq!(ledger.ever_used().len(), 2);
}

/// Checks and a reporter run against each other. A check uses the version once a round, so that no
/// later use reports one that was missed. After each round the reporter must have every use.
#[test]
fn no_use_is_missed_whatever_the_threads_do() {
    let ledger = Ledger::default();
    let usage = ledger.of_version(versions(1)[0]);
    let barrier = Barrier::new(CHECKS + 1);
    let running = AtomicUsize::new(0);
    // Judged after the threads have ended: one that panics would leave the others at the barrier.
    let (mut missed, mut shrunk, mut impossible) = (0, 0, 0);
    thread::scope(|scope| {
        for check in 0..CHECKS {
            let (ledger, barrier, running) = (&ledger, &barrier, &running);
            scope.spawn(move || {
                for round in 0..ROUNDS {
                    barrier.wait();
                    let now = at(i64::try_from(round).unwrap_or(i64::MAX));
                    ledger.count(usage, now, check == 0);
                    running.fetch_sub(1, Ordering::SeqCst);
                    barrier.wait();
                }
            });
        }
        let mut told = Use::default();
        let mut take = || {
            for used in ledger.take_used() {
                let now = ledger.get(used).read();
                shrunk += u64::from(now.requests < told.requests || now.denied < told.denied);
                impossible += u64::from(now.denied > now.requests);
                told = now;
            }
            told
        };
        for round in 0..ROUNDS {
            running.store(CHECKS, Ordering::SeqCst);
            barrier.wait();
            while running.load(Ordering::SeqCst) > 0 {
                take();
            }
            barrier.wait();
            let expected = Use {
                requests: (round + 1) * CHECKS as u64,
                denied: round + 1,
                first_used: Some(at(0)),
                last_used: i64::try_from(round).ok().map(at),
            };
            missed += u64::from(take() != expected);
        }
    });
    assert_eq!((missed, shrunk, impossible), (0, 0, 0));
}

#[test]
fn a_version_has_the_same_counters_however_often_it_is_announced() {
    let ledger = Ledger::default();
    let record = testing::record();
    let version = record.version_ref();
    assert!(ledger.find(version).is_none(), "it was not used yet");
    let first = OwnedKey::new(&record);
    ledger.count(ledger.of(&first.held()), at(1), false);
    assert_eq!(ledger.take_used().len(), 1);
    let again = OwnedKey::new(&record);
    ledger.count(ledger.of(&again.held()), at(2), false);
    ledger.count(ledger.of(&first.held()), at(3), false);
    let usage = ledger.find(version).expect("it was used");
    assert_eq!(usage.read().requests, 3);
}

#[test]
fn callers_are_kept_until_they_are_forgotten() {
    let ledger = Ledger::default();
    let usage = ledger.get(ledger.of_version(versions(1)[0]));
    assert_eq!(usage.callers(), []);
    usage.note_caller(&Caller::new(None, b"curl", b"api", b"/v1"), at(5));
    assert_eq!(usage.callers()[0].user_agent, "curl");
    usage.forget_callers();
    assert_eq!(usage.callers(), []);
}

/// Every version that is used has one of these.
#[test]
fn counters_are_small() {
    assert!(size_of::<VersionUsage>() <= 80);
}
