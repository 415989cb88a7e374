use std::collections::HashSet;

use proptest::prelude::*;

use super::*;
use crate::key::{VersionNumber, testing};

const BOOTS: usize = 3;
const VERSIONS: u32 = 2;

/// The events of sidecars, of reports on their way, and of a control plane.
#[derive(Clone, Debug)]
enum Event {
    /// A sidecar sees a version used.
    Uses {
        boot: usize,
        version: u32,
        count: u64,
    },
    /// A sidecar sends a report of everything. It may be delivered never, late, and more than once.
    Sends { boot: usize },
    /// One of the reports that were ever sent arrives.
    Arrives { report: prop::sample::Index },
    /// The control plane writes its unsaved counts.
    Saves,
    /// The control plane dies between two writes.
    Dies,
    /// A sidecar ends with its last report and a Goodbye.
    Leaves { boot: usize },
}

/// Sidecars, their reports, a control plane and its store.
#[derive(Debug, Default)]
struct World {
    /// The true use in each process.
    saw: BTreeMap<(usize, u32), Use>,
    gone: HashSet<usize>,
    sent: Vec<(usize, Vec<(u32, Use)>)>,
    ledger: Ledger,
    disk: BTreeMap<(u32, String), Use>,
    folded: HashSet<String>,
    time: i64,
}

fn boot(index: usize) -> Boot {
    ["a", "b", "c"][index].into()
}

fn version(number: u32) -> VersionRef {
    VersionRef {
        key_id: "7Qm2Xc91TbKe".parse().expect("a key id"),
        version: VersionNumber::new(number).expect("not zero"),
    }
}

impl World {
    fn apply(&mut self, event: &Event) {
        match event {
            Event::Uses {
                boot,
                version,
                count,
            } => self.uses(*boot, *version, *count),
            Event::Sends { boot } => self.send(*boot),
            Event::Arrives { report } => {
                if !self.sent.is_empty() {
                    let (boot, report) = report.get(&self.sent).clone();
                    self.deliver(boot, &report);
                }
            }
            Event::Saves => self.save(),
            Event::Dies => self.die(),
            Event::Leaves { boot } => self.leave(*boot),
        }
    }

    fn uses(&mut self, boot: usize, version: u32, count: u64) {
        if self.gone.contains(&boot) {
            return;
        }
        self.time += 1;
        let at = Timestamp::from_millis(self.time);
        let saw = self.saw.entry((boot, version)).or_default();
        saw.requests += count;
        saw.denied += count / 2;
        saw.first_used = saw.first_used.or(Some(at));
        saw.last_used = Some(at);
    }

    fn report(&self, boot: usize) -> Vec<(u32, Use)> {
        let saw = self.saw.iter().filter(|((by, _), _)| *by == boot);
        saw.map(|((_, version), saw)| (*version, *saw)).collect()
    }

    fn send(&mut self, boot: usize) {
        if !self.gone.contains(&boot) {
            self.sent.push((boot, self.report(boot)));
        }
    }

    fn deliver(&mut self, by: usize, report: &[(u32, Use)]) {
        for (number, saw) in report {
            let (keyring, which) = (testing::keyring_name(), version(*number));
            let told = ReportedUse {
                requests: saw.requests,
                denied: saw.denied,
                first_used: saw.first_used.expect("it is used"),
            };
            self.ledger
                .merge(&keyring, which, &boot(by), told, received(self.time));
        }
    }

    /// Writes the counts as the store's contract requires.
    fn save(&mut self) {
        let rows = self.ledger.unsaved(None, usize::MAX);
        for row in &rows {
            let told = Use {
                requests: row.requests,
                denied: row.denied,
                first_used: row.first_used,
                last_used: row.last_used,
            };
            assert!(!self.folded.contains(&row.run_id), "{row:?} is folded");
            let key = (row.version.version.get(), row.run_id.clone());
            let held = self.disk.entry(key).or_default();
            held.requests = held.requests.max(told.requests);
            held.denied = held.denied.max(told.denied);
            held.first_used = earlier(held.first_used, told.first_used);
            held.last_used = held.last_used.max(told.last_used);
        }
        self.ledger.saved(&rows);
        assert_eq!(self.ledger.unsaved(None, usize::MAX), []);
    }

    fn die(&mut self) {
        let rows = self.disk.iter().map(|((number, boot), told)| UsageRow {
            keyring: testing::keyring_name(),
            version: version(*number),
            run_id: boot.clone(),
            requests: told.requests,
            denied: told.denied,
            first_used: told.first_used,
            last_used: told.last_used,
        });
        let folded = self.folded.iter().cloned().collect();
        let now = Timestamp::from_millis(self.time);
        self.ledger = Ledger::load(rows.collect(), folded, now);
    }

    fn leave(&mut self, by: usize) {
        if !self.gone.insert(by) {
            return;
        }
        let last = self.report(by);
        self.deliver(by, &last);
        self.ledger
            .end(&boot(by), Timestamp::from_millis(self.time));
        self.save();
        let name = boot(by).to_string();
        for number in 1..=VERSIONS {
            if let Some(told) = self.disk.remove(&(number, name.clone())) {
                let sum = self.disk.entry((number, String::new())).or_default();
                sum.requests += told.requests;
                sum.denied += told.denied;
                sum.first_used = earlier(sum.first_used, told.first_used);
                sum.last_used = sum.last_used.max(told.last_used);
            }
        }
        self.folded.insert(name);
        self.ledger.fold(&boot(by));
    }

    /// Returns the true use in all sidecars together.
    fn truth(&self, version: u32) -> Use {
        let saw = self.saw.iter().filter(|((_, of), _)| *of == version);
        saw.fold(Use::default(), |sum, (_, saw)| Use {
            requests: sum.requests + saw.requests,
            denied: sum.denied + saw.denied,
            first_used: earlier(sum.first_used, saw.first_used),
            last_used: sum.last_used.max(saw.last_used),
        })
    }

    fn counted(&self, number: u32) -> Use {
        let total = self.ledger.total(&testing::keyring_name(), version(number));
        total.unwrap_or_default()
    }
}

fn event() -> impl Strategy<Value = Event> {
    let boot = 0..BOOTS;
    prop_oneof![
        4 => (boot.clone(), 1..=VERSIONS, 1..9_u64)
            .prop_map(|(boot, version, count)| Event::Uses { boot, version, count }),
        3 => boot.clone().prop_map(|boot| Event::Sends { boot }),
        4 => any::<prop::sample::Index>().prop_map(|report| Event::Arrives { report }),
        2 => Just(Event::Saves),
        1 => Just(Event::Dies),
        1 => boot.prop_map(|boot| Event::Leaves { boot }),
    ]
}

proptest! {
    #[test]
    fn counts_end_exact_whatever_is_lost_repeated_or_late(
        events in prop::collection::vec(event(), 0..80),
    ) {
        let mut world = World::default();
        for event in &events {
            world.apply(event);
            for number in 1..=VERSIONS {
                let (counted, truth) = (world.counted(number), world.truth(number));
                prop_assert!(counted.requests <= truth.requests, "{counted:?} is above {truth:?}");
            }
        }
        for by in 0..BOOTS {
            if !world.gone.contains(&by) {
                let last = world.report(by);
                world.deliver(by, &last);
            }
        }
        world.save();
        for dies in [false, true] {
            if dies {
                world.die();
            }
            for number in 1..=VERSIONS {
                let (counted, truth) = (world.counted(number), world.truth(number));
                prop_assert!(counted.last_used >= truth.last_used, "{counted:?} is before {truth:?}");
                let last_used = truth.last_used;
                prop_assert_eq!(Use { last_used, ..counted }, truth);
            }
        }
    }
}

fn told(requests: u64) -> ReportedUse {
    ReportedUse {
        requests,
        denied: 0,
        first_used: Timestamp::from_millis(1),
    }
}

/// Returns a receipt at `millis` milliseconds by either clock.
fn received(millis: i64) -> Receipt {
    Receipt {
        wall: Timestamp::from_millis(millis),
        boot: BootTime::from_millis(millis.unsigned_abs()),
    }
}

fn used(requests: u64, last_used: i64) -> Use {
    Use {
        requests,
        denied: 0,
        first_used: Some(Timestamp::from_millis(1)),
        last_used: Some(Timestamp::from_millis(last_used)),
    }
}

#[test]
fn a_count_that_grew_is_a_use_at_its_receipt_and_one_that_did_not_is_none() {
    let keyring = testing::keyring_name();
    let mut ledger = Ledger::default();
    for (requests, at, expected) in [
        (5, 10, used(5, 10)),
        (5, 20, used(5, 10)),
        (4, 30, used(5, 10)),
        (6, 40, used(6, 40)),
        (6, 50, used(6, 40)),
    ] {
        ledger.merge(&keyring, version(1), &boot(0), told(requests), received(at));
        assert_eq!(
            ledger.total(&keyring, version(1)),
            Some(expected),
            "at {at}"
        );
    }
    // The clock of another process is far ahead.
    let ahead = ReportedUse {
        first_used: Timestamp::from_millis(9_999),
        ..told(1)
    };
    ledger.merge(&keyring, version(2), &boot(1), ahead, received(60));
    let total = ledger.total(&keyring, version(2)).expect("it is used");
    assert_eq!(total.first_used, Some(Timestamp::from_millis(60)));
}

#[test]
fn a_late_use_of_a_process_that_ended_is_dated_and_not_counted() {
    let keyring = testing::keyring_name();
    let mut ledger = Ledger::default();
    ledger.merge(&keyring, version(1), &boot(0), told(5), received(10));
    ledger.end(&boot(0), Timestamp::from_millis(10));
    let rows = ledger.unsaved(None, usize::MAX);
    ledger.saved(&rows);
    ledger.fold(&boot(0));
    ledger.merge(&keyring, version(1), &boot(0), told(5), received(30));
    assert_eq!(ledger.total(&keyring, version(1)), Some(used(5, 30)));
    assert_eq!(ledger.unsaved(None, usize::MAX).len(), 1);
}

#[test]
fn what_changes_while_it_is_written_is_written_again() {
    let keyring = testing::keyring_name();
    let mut ledger = Ledger::default();
    ledger.merge(&keyring, version(1), &boot(0), told(5), received(10));
    let rows = ledger.unsaved(None, usize::MAX);
    ledger.merge(&keyring, version(1), &boot(0), told(6), received(11));
    ledger.saved(&rows);
    assert_eq!(ledger.unsaved(None, usize::MAX)[0].requests, 6);
}

#[test]
fn a_rate_is_that_of_the_last_minute() {
    let keyring = testing::keyring_name();
    let mut ledger = Ledger::default();
    let at = |seconds: u64| BootTime::from_millis(seconds * 1_000);
    let mut report = |seconds: u64| {
        let receipt = Receipt {
            boot: at(seconds),
            ..received(1)
        };
        let told = told(10 * seconds);
        ledger.merge(&keyring, version(1), &boot(0), told, receipt);
        ledger.rate(&keyring, version(1), at(seconds))
    };
    // The requests of the first seconds are spread over the minute.
    assert!(report(6) <= 1.0);
    for seconds in (12..300).step_by(6) {
        let rate = report(seconds);
        assert!(
            seconds < 66 || (9.0..=11.0).contains(&rate),
            "{rate} at {seconds}"
        );
    }
    assert!(ledger.rate(&keyring, version(1), at(350)) > 0.0);
    let after = ledger.rate(&keyring, version(1), at(294 + 60));
    assert!(after.abs() < f64::EPSILON, "{after}");
}

#[test]
fn what_is_unsaved_is_read_in_batches() {
    let keyring = testing::keyring_name();
    let mut ledger = Ledger::default();
    for number in 1..=3 {
        for process in 0..=1 {
            let boot = boot(process);
            ledger.merge(&keyring, version(number), &boot, told(1), received(10));
        }
    }
    let all = ledger.unsaved(None, usize::MAX);
    assert_eq!(all.len(), 6);
    let first = ledger.unsaved(None, 4);
    let second = ledger.unsaved(first.last().map(count_name_of).as_ref(), 4);
    assert_eq!((first.len(), second.len()), (4, 2));
    assert_eq!(
        ledger.unsaved(second.last().map(count_name_of).as_ref(), 4),
        []
    );
    assert_eq!([first, second].concat(), all);
}
