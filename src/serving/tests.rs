use super::*;
use crate::{
    key::{Revision, VersionNumber, VersionRef, testing},
    tls::Identity,
};

const HOUR: Duration = Duration::from_hours(1);
const MINUTE: Duration = Duration::from_mins(1);
const MILLISECOND: Duration = Duration::from_millis(1);
/// An hour by a boot clock that is slower by 1 %.
const STRETCHED_HOUR: Duration = Duration::from_millis(3_636_001);

/// A book, and the time by both clocks.
struct Book {
    serving: Serving,
    now: Now,
}

impl Book {
    fn new() -> Self {
        Self::restored(Vec::new(), start())
    }

    /// The book that the next control plane restores from rows, by clocks of its own.
    fn restored(rows: Vec<Row>, now: Now) -> Self {
        let serving = Serving::restore(rows, HOUR, now).expect("sound rows");
        Self { serving, now }
    }

    /// The rows that the next control plane finds after this one has written everything.
    fn written(&mut self) -> Vec<Row> {
        self.serving.write_down(true);
        let unsaved = self.serving.unsaved(self.now);
        self.serving.saved(&unsaved, self.now);
        unsaved.rows
    }

    fn advance(&mut self, time: Duration) {
        self.now.boot = self.now.boot.saturating_add(time);
        self.now.wall = self.now.wall.saturating_add(time);
        self.serving.pass(self.now);
    }

    fn hello(&mut self, hello: Hello) -> Result<Welcome, HelloError> {
        self.serving.hello(hello, self.now)
    }

    fn connect(&mut self, hello: Hello) -> RunKey {
        let key = hello.key.clone();
        self.hello(hello).expect("it is welcome");
        key
    }

    /// Everything that is not saved is saved.
    fn save(&mut self) {
        let unsaved = self.serving.unsaved(self.now);
        self.serving.saved(&unsaved, self.now);
    }

    /// Answers a beat that arrives now.
    fn grant(&mut self, key: &RunKey, serve_for: Duration) -> Result<bool, UnknownRun> {
        let arrived = self.now.boot;
        self.serving.grant(key, &name(), serve_for, arrived)
    }

    /// Answers a beat once that is on record.
    fn answer(&mut self, key: &RunKey, serve_for: Duration) {
        self.save();
        if self.grant(key, serve_for) == Ok(false) {
            self.save();
        }
    }

    fn lose(&mut self, key: &RunKey) {
        let newest = self.run(key).newest_stream;
        self.serving.stream_ended(key, newest, self.now);
    }

    fn goodbye(&mut self, key: &RunKey, farewell: Farewell) {
        self.serving.goodbye(key, farewell, self.now);
    }

    fn confirm(&mut self, key: &RunKey, confirmation: &Confirmation) {
        let newest = self
            .serving
            .runs
            .get(key)
            .map_or(1, |run| run.newest_stream);
        self.confirm_on(key, newest, confirmation);
    }

    fn confirm_on(&mut self, key: &RunKey, stream: u64, confirmation: &Confirmation) {
        self.serving
            .confirmed(key, stream, &name(), confirmation, self.now);
    }

    fn barrier(&self, target: Target) -> Barrier {
        self.barrier_without(target, &[])
    }

    fn barrier_without(&self, target: Target, without: &[RunKey]) -> Barrier {
        let without = without.iter().cloned().collect();
        let barrier = self
            .serving
            .barrier(&name(), epoch(), target, &without, self.now);
        let reached = self
            .serving
            .reached(&name(), epoch(), target, &without, self.now);
        assert_eq!(reached, (barrier.confirmed, barrier.total));
        assert_eq!(barrier.total, barrier.confirmed + barrier.laggards.len());
        barrier
    }

    fn has_reached(&self, target: Target) -> bool {
        self.barrier(target).is_passed()
    }

    fn run(&self, key: &RunKey) -> &Run {
        self.serving.runs.get(key).expect("it may serve")
    }

    fn presence(&self, key: &RunKey) -> Option<Presence> {
        self.serving.runs.get(key).map(Run::presence)
    }

    fn names(&self) -> Vec<&str> {
        self.serving.runs().map(|(key, _)| &*key.run_id).collect()
    }

    fn gaps(&self) -> Vec<&str> {
        self.serving.gaps().map(|(key, _)| &*key.run_id).collect()
    }

    /// Asserts that a run counts until `rest` has passed and no longer.
    fn assert_serves_for(&mut self, key: &RunKey, rest: Duration) {
        assert_eq!(self.run(key).rest(self.now.boot), Some(rest));
        self.advance(rest.saturating_sub(MILLISECOND));
        assert_eq!(self.barrier(applied(9)).total, 1);
        self.advance(MILLISECOND);
        assert_eq!(self.barrier(applied(9)).total, 0);
        assert_eq!(self.presence(key), None);
    }

    fn coverage(&self) -> (Option<Timestamp>, Option<Timestamp>) {
        let coverage = self.serving.coverage(&name(), self.now.wall, self.now);
        (coverage.complete_until, coverage.gap_until)
    }
}

fn start() -> Now {
    Now {
        boot: BootTime::from_millis(50_000_000),
        wall: Timestamp::from_millis(1_800_000_000_000),
    }
}

fn name() -> KeyringName {
    testing::keyring_name()
}

fn epoch() -> Epoch {
    Epoch::new(1)
}

fn held(revision: u64) -> HeldState {
    HeldState {
        epoch: epoch(),
        revision: Revision::new(revision),
        revoked_through: Revision::new(revision),
        agrees: true,
        deny_after: HOUR,
        is_admitted: true,
        is_on_demand: false,
    }
}

/// The first stream of a run of edge-1 that holds revision 3.
fn hello(run_id: &str) -> Hello {
    Hello {
        key: RunKey {
            node: "edge-1".to_owned(),
            run_id: run_id.to_owned(),
        },
        stream: 1,
        about: About::default(),
        lock: None,
        file: None,
        keyrings: BTreeMap::from([(name(), held(3))]),
    }
}

/// The same of a run that holds nothing yet.
fn empty_hello(run_id: &str) -> Hello {
    let nothing = HeldState {
        epoch: Epoch::default(),
        agrees: false,
        ..held(0)
    };
    Hello {
        keyrings: BTreeMap::from([(name(), nothing)]),
        ..hello(run_id)
    }
}

fn lock(acquired_ns: u64) -> Lock {
    Lock {
        place: LockPlace {
            boot_id: "boot-1".to_owned(),
            time_namespace: 1,
            at: LockAt::File {
                device: 2,
                inode: 3,
            },
        },
        acquired_ns,
    }
}

fn file(begun_from_write: u64) -> SnapshotFile {
    SnapshotFile {
        id: "f1".to_owned(),
        begun_from_write,
    }
}

/// A run with a lock and a file.
fn filed(run_id: &str, acquired_ns: u64, begun_from_write: u64) -> Hello {
    Hello {
        lock: Some(lock(acquired_ns)),
        file: Some(file(begun_from_write)),
        ..hello(run_id)
    }
}

fn told_all(last_write: u64) -> Farewell {
    Farewell {
        has_told_all: true,
        has_erased_file: false,
        last_write,
    }
}

fn version() -> VersionRef {
    VersionRef {
        key_id: "7Qm2Xc91TbKe".parse().expect("a key id"),
        version: VersionNumber::FIRST,
    }
}

fn applied(revision: u64) -> Target {
    Target::Applied(Revision::new(revision), version())
}

fn revoked(revision: u64) -> Target {
    Target::Revoked(Revision::new(revision))
}

/// An answer to a change, of a run without a snapshot file.
fn in_use(revision: u64) -> Confirmation {
    Confirmation {
        epoch: epoch(),
        applied: Revision::new(revision),
        revoked_through: Revision::new(revision),
        ..Confirmation::default()
    }
}

fn whole(revision: u64) -> Confirmation {
    Confirmation {
        is_whole: true,
        ..in_use(revision)
    }
}

// Whether a run may serve.

#[test]
fn a_connected_run_counts_for_as_long_as_its_stream_is_open() {
    let mut book = Book::new();
    let key = book.connect(empty_hello("a"));
    book.advance(100 * HOUR);
    assert_eq!(book.presence(&key), Some(Presence::Connected));
    assert_eq!(book.run(&key).rest(book.now.boot), None);
    let barrier = book.barrier(applied(4));
    assert_eq!((barrier.confirmed, barrier.total), (0, 1));
    assert_eq!(barrier.laggards[0].rest, None);
    assert_eq!(barrier.laggards[0].serves_until, None);
    assert_eq!(barrier.rest(), None, "no time ends this wait");
}

#[test]
fn a_lost_run_counts_until_its_bound() {
    let mut book = Book::new();
    let key = book.connect(empty_hello("a"));
    book.answer(&key, HOUR);
    book.advance(10 * MINUTE);
    book.lose(&key);
    let since = book.now.wall;
    book.advance(MINUTE);
    assert_eq!(book.presence(&key), Some(Presence::Lost(since)));
    let rest = STRETCHED_HOUR.saturating_sub(11 * MINUTE);
    let barrier = book.barrier(applied(4));
    let laggard = &barrier.laggards[0];
    assert_eq!(
        (&laggard.key, laggard.presence),
        (&key, Presence::Lost(since))
    );
    assert_eq!(laggard.last_seen, since);
    assert_eq!(laggard.rest, Some(rest));
    assert_eq!(
        laggard.serves_until,
        Some(book.now.wall.saturating_add(rest))
    );
    assert_eq!(barrier.rest(), Some(rest));
    book.assert_serves_for(&key, rest);
    assert_eq!(book.gaps(), ["a"]);
}

#[test]
fn a_run_that_was_never_granted_anything_is_gone_with_its_stream() {
    let mut book = Book::new();
    let key = book.connect(empty_hello("a"));
    book.lose(&key);
    assert_eq!(book.presence(&key), None);
    // Of one that comes with something nobody knows who has granted it.
    let key = book.connect(hello("b"));
    book.lose(&key);
    book.assert_serves_for(&key, STRETCHED_HOUR);
}

#[test]
fn a_stopped_run_with_a_file_counts_until_its_bound() {
    let mut book = Book::new();
    let key = book.connect(Hello {
        file: Some(file(0)),
        ..empty_hello("a")
    });
    book.answer(&key, HOUR);
    book.advance(MINUTE);
    book.goodbye(&key, told_all(7));
    let at = book.now.wall;
    assert_eq!(book.presence(&key), Some(Presence::Stopped(at)));
    let barrier = book.barrier(applied(4));
    assert_eq!(barrier.laggards[0].presence, Presence::Stopped(at));
    book.assert_serves_for(&key, STRETCHED_HOUR.saturating_sub(MINUTE));
    // It may have served from its file, whatever it had reported before.
    assert_eq!(book.gaps(), ["a"]);
}

#[test]
fn a_goodbye_without_a_file_is_the_end() {
    for (has_told_all, has_erased_file, gaps) in [
        (true, false, [].as_slice()),
        (false, false, &["a"]),
        (true, true, &[]),
        (false, true, &["a"]),
    ] {
        let mut book = Book::new();
        let key = book.connect(Hello {
            file: has_erased_file.then(|| file(0)),
            ..hello("a")
        });
        book.answer(&key, HOUR);
        book.goodbye(
            &key,
            Farewell {
                has_told_all,
                has_erased_file,
                last_write: 7,
            },
        );
        assert_eq!(book.presence(&key), None);
        assert!(book.has_reached(applied(9)));
        assert_eq!(book.gaps(), gaps);
    }
}

#[test]
fn a_goodbye_ends_all_streams_of_its_run() {
    let mut book = Book::new();
    let key = book.connect(hello("a"));
    book.connect(Hello {
        stream: 2,
        ..hello("a")
    });
    assert_eq!(book.run(&key).streams(), 2);
    book.goodbye(&key, told_all(0));
    assert_eq!(book.presence(&key), None);
}

#[test]
fn a_stream_that_is_replaced_does_not_lose_its_run() {
    let mut book = Book::new();
    let key = book.connect(hello("a"));
    book.connect(Hello {
        stream: 2,
        ..hello("a")
    });
    book.serving.stream_ended(&key, 1, book.now);
    assert_eq!(book.presence(&key), Some(Presence::Connected));
    // Its end is told twice.
    book.serving.stream_ended(&key, 1, book.now);
    assert_eq!(book.presence(&key), Some(Presence::Connected));
    book.serving.stream_ended(&key, 2, book.now);
    assert_eq!(book.presence(&key), Some(Presence::Lost(book.now.wall)));
}

#[test]
fn what_an_older_stream_confirms_late_counts_for_nothing() {
    let mut book = Book::new();
    let key = book.connect(hello("a"));
    let mut again = Hello {
        stream: 2,
        ..hello("a")
    };
    let held = again.keyrings.get_mut(&name()).expect("it subscribes");
    held.agrees = false;
    book.connect(again);
    let late = whole(9);
    book.confirm_on(&key, 1, &late);
    assert!(book.run(&key).keyrings[&name()].progress.awaits_whole);
    book.confirm_on(&key, 2, &late);
    assert!(!book.run(&key).keyrings[&name()].progress.awaits_whole);
}

#[test]
fn what_is_held_on_demand_is_in_no_file() {
    let mut book = Book::new();
    let mut on_demand = filed("a", 1, 0);
    let held = on_demand.keyrings.get_mut(&name()).expect("it subscribes");
    held.is_on_demand = true;
    let key = book.connect(on_demand);
    book.answer(&key, HOUR);
    // It confirms what it has in use, and with its end nothing is left of it.
    book.confirm(&key, &in_use(9));
    assert!(book.barrier(applied(9)).is_passed());
    book.goodbye(&key, told_all(7));
    assert_eq!(book.presence(&key), None);
    assert_eq!(book.barrier(applied(10)).total, 0);
}

#[test]
fn a_keyring_that_is_not_followed_any_more_counts_until_its_bound_whoever_is_connected() {
    let other: KeyringName = "partners".parse().expect("a name");
    let mut book = Book::new();
    let mut former = filed("a", 1, 0);
    former.keyrings.insert(other.clone(), held(3));
    let former = book.connect(former);
    book.answer(&former, HOUR);
    // The next process takes the file, and its own settings name one keyring only.
    let next = book.connect(filed("b", 2, 1));
    book.answer(&next, HOUR);
    let barrier = |book: &Book| {
        let nobody = BTreeSet::new();
        book.serving
            .barrier(&other, epoch(), applied(9), &nobody, book.now)
    };
    let waited = barrier(&book);
    assert_eq!(
        (waited.total, waited.laggards[0].key.run_id.as_str()),
        (1, "b")
    );
    assert!(waited.rest().is_some(), "time brings its end");
    book.advance(STRETCHED_HOUR);
    assert_eq!(barrier(&book).total, 0);
    assert_eq!(book.presence(&next), Some(Presence::Connected));
}

#[test]
fn a_keyring_that_a_run_may_not_have_counts_for_what_it_was_granted_and_no_longer() {
    let forbidden = |stream| {
        let mut hello = hello("a");
        hello.stream = stream;
        let held = hello.keyrings.get_mut(&name()).expect("it subscribes");
        held.is_admitted = false;
        held.agrees = false;
        hello
    };
    let mut book = Book::new();
    // What it says that it holds counts for nothing where it was never granted that.
    let key = book.connect(forbidden(1));
    assert_eq!(book.barrier(applied(9)).total, 0);
    book.goodbye(&key, told_all(0));

    let mut book = Book::new();
    let key = book.connect(hello("a"));
    book.answer(&key, HOUR);
    book.connect(forbidden(2));
    assert_eq!(book.grant(&key, HOUR), Err(UnknownRun));
    assert!(!book.barrier(applied(9)).is_passed());
    book.advance(STRETCHED_HOUR);
    assert!(book.barrier(applied(9)).is_passed());
}

#[test]
fn a_lock_ends_no_run_of_another_node() {
    let mut book = Book::new();
    let key = book.connect(filed("a", 1, 0));
    book.answer(&key, HOUR);
    let mut other = filed("b", 2, 1);
    other.key.node = "edge-2".to_owned();
    let other = book.connect(other);
    assert_eq!(book.presence(&key), Some(Presence::Connected));
    assert_eq!(book.presence(&other), Some(Presence::Connected));
}

#[test]
fn what_a_backup_says_of_the_time_that_is_left_is_not_believed() {
    let mut book = Book::new();
    let key = book.connect(hello("a"));
    book.answer(&key, HOUR);
    book.lose(&key);
    book.advance(HOUR);
    book.serving.distrust_rests(book.now);
    book.advance(HOUR);
    assert!(!book.barrier(applied(9)).is_passed());
    book.advance(STRETCHED_HOUR.saturating_sub(HOUR));
    assert!(book.barrier(applied(9)).is_passed());
}

#[test]
fn uses_of_what_was_held_on_demand_are_a_gap_where_nobody_has_reported_them() {
    let mut book = Book::new();
    let other: KeyringName = "partners".parse().expect("a name");
    let mut hello = filed("a", 1, 0);
    let on_demand = HeldState {
        is_on_demand: true,
        ..held(3)
    };
    hello.keyrings.insert(other.clone(), on_demand);
    let key = book.connect(hello);
    book.answer(&key, HOUR);
    let granted = book.serving.grant(&key, &other, HOUR, book.now.boot);
    assert_eq!(granted, Ok(true));
    // A new process shows that the former has ended.
    book.connect(Hello {
        keyrings: BTreeMap::from([(name(), held(3))]),
        ..filed("b", 2, 0)
    });
    assert_eq!(book.presence(&key), Some(Presence::Stopped(book.now.wall)));
    let coverage = book.serving.coverage(&other, book.now.wall, book.now);
    assert_eq!(coverage.gap_until, Some(book.now.wall));
}

#[test]
fn what_a_former_process_left_in_the_file_counts_until_its_bound_although_it_is_held_on_demand_now()
{
    let mut book = Book::new();
    let former = book.connect(filed("a", 1, 0));
    book.answer(&former, HOUR);
    let mut next = filed("b", 2, 1);
    let held = next.keyrings.get_mut(&name()).expect("it subscribes");
    held.is_on_demand = true;
    let next = book.connect(next);
    book.answer(&next, MINUTE);
    book.confirm(&next, &in_use(9));
    assert!(
        !book.barrier(applied(9)).is_passed(),
        "the file may have it still"
    );
    book.goodbye(&next, told_all(7));
    assert_eq!(book.presence(&next), Some(Presence::Stopped(book.now.wall)));
    book.advance(STRETCHED_HOUR);
    assert_eq!(book.presence(&next), None);
}

#[test]
fn a_gap_of_a_keyring_that_a_run_may_not_have_any_more_stays_when_it_is_back() {
    let mut book = Book::new();
    let key = book.connect(hello("a"));
    book.answer(&key, HOUR);
    book.lose(&key);
    book.advance(STRETCHED_HOUR);
    let ended = book.now.wall;
    let mut back = hello("a");
    back.stream = 2;
    let held = back.keyrings.get_mut(&name()).expect("it subscribes");
    held.is_admitted = false;
    book.connect(back);
    assert_eq!(book.coverage(), (Some(book.now.wall), Some(ended)));
    assert!(
        book.run(&key).keyrings.contains_key(&name()),
        "its last counts are taken"
    );
    book.serving.dropped(&key, 2, &name());
    assert!(book.run(&key).keyrings.is_empty());
}

#[test]
fn no_answer_waits_for_what_is_only_written_down() {
    let mut book = Book::new();
    let key = book.connect(hello("a"));
    book.answer(&key, HOUR);
    book.save();
    book.serving.write_down(true);
    assert_eq!(book.grant(&key, HOUR), Ok(true), "the store has that");
    assert_eq!(book.serving.unsaved(book.now).rows.len(), 1);
}

#[test]
fn what_was_reported_by_a_clock_that_was_ahead_counts_for_nothing() {
    let mut book = Book::new();
    let key = book.connect(hello("a"));
    book.answer(&key, HOUR);
    let right = book.now.wall;
    book.now.wall = right.saturating_add(HOUR);
    book.serving.reported(&key, book.now.wall, book.now);
    book.now.wall = right.saturating_add(MINUTE);
    book.serving.pass(book.now);
    assert_eq!(book.coverage().0, None);
}

// Until when.

#[test]
fn a_bound_counts_from_the_arrival_of_the_beat() {
    let mut book = Book::new();
    let key = book.connect(empty_hello("a"));
    book.save();
    let arrived = book.now.boot;
    book.advance(30 * MINUTE);
    let granted = book.serving.grant(&key, &name(), HOUR, arrived);
    assert_eq!(granted, Ok(true));
    book.lose(&key);
    book.assert_serves_for(&key, STRETCHED_HOUR.saturating_sub(30 * MINUTE));
}

#[test]
fn a_smaller_grant_does_not_lower_a_bound() {
    let mut book = Book::new();
    let key = book.connect(empty_hello("a"));
    book.answer(&key, HOUR);
    book.advance(5 * MINUTE);
    book.answer(&key, MINUTE);
    // Nor does an answer to an earlier beat that is late.
    let earlier = book.now.boot.saturating_sub(10 * MINUTE);
    let granted = book.serving.grant(&key, &name(), HOUR, earlier);
    assert_eq!(granted, Ok(true));
    book.lose(&key);
    book.assert_serves_for(&key, STRETCHED_HOUR.saturating_sub(5 * MINUTE));
}

#[test]
fn a_smaller_grant_counts_once_the_larger_one_has_run_out() {
    let mut book = Book::new();
    let key = book.connect(empty_hello("a"));
    book.answer(&key, HOUR);
    let full = |book: &mut Book| {
        let mut next = Book::restored(book.written(), start());
        next.serving.pass(next.now);
        next.run(&key).rest(next.now.boot)
    };
    for _ in 0..59 {
        book.advance(MINUTE);
        book.answer(&key, MINUTE);
        assert_eq!(full(&mut book), Some(STRETCHED_HOUR));
    }
    book.advance(MINUTE);
    book.answer(&key, MINUTE);
    assert_eq!(full(&mut book), Some(Duration::from_millis(60_601)));
    book.lose(&key);
    book.assert_serves_for(&key, Duration::from_millis(60_601));
}

#[test]
fn an_answer_waits_until_what_it_grants_is_on_record() {
    let mut book = Book::new();
    let mut brief = empty_hello("a");
    let held = brief.keyrings.get_mut(&name()).expect("it is there");
    held.deny_after = MINUTE;
    let key = book.connect(brief);
    assert_eq!(book.grant(&key, MINUTE), Ok(false), "it has no row yet");
    book.save();
    assert_eq!(book.grant(&key, MINUTE), Ok(true));
    assert_eq!(book.grant(&key, HOUR), Ok(false), "its row grants a minute");
    book.save();
    assert_eq!(book.grant(&key, HOUR), Ok(true));
    assert_eq!(book.grant(&key, MINUTE), Ok(true));
}

#[test]
fn a_run_that_is_not_connected_is_granted_nothing() {
    let mut book = Book::new();
    let other: KeyringName = "elsewhere".parse().expect("a name");
    let key = book.connect(Hello {
        file: Some(file(0)),
        ..hello("a")
    });
    book.answer(&key, HOUR);
    let arrived = book.now.boot;
    let elsewhere = book.serving.grant(&key, &other, HOUR, arrived);
    assert_eq!(elsewhere, Err(UnknownRun), "it does not hold that");
    book.lose(&key);
    book.save();
    // What is left of its bound is written: an answer that leaves now would raise it beyond that.
    assert_eq!(book.grant(&key, HOUR), Err(UnknownRun));
    let key = book.connect(Hello {
        stream: 2,
        file: Some(file(0)),
        ..hello("a")
    });
    book.goodbye(&key, told_all(7));
    assert_eq!(book.grant(&key, HOUR), Err(UnknownRun));
    let unknown = hello("b").key;
    assert_eq!(book.grant(&unknown, HOUR), Err(UnknownRun));
}

// What proves an end.

#[test]
fn a_lock_that_is_acquired_later_ends_its_former_holder() {
    let mut book = Book::new();
    let locked = |run_id: &str, acquired_ns| Hello {
        lock: Some(lock(acquired_ns)),
        ..hello(run_id)
    };
    let former = book.connect(locked("a", 10));
    book.answer(&former, HOUR);
    let welcome = book.hello(locked("b", 11)).expect("it is welcome");
    assert!(!welcome.has_namesake);
    assert_eq!(book.names(), ["b"]);
    assert_eq!(book.gaps(), ["a"], "it went without its last report");
    // The end of its stream comes later.
    book.serving.stream_ended(&former, 1, book.now);
    assert_eq!(book.names(), ["b"]);
}

#[test]
fn a_lock_that_was_acquired_earlier_ends_nothing_and_proves_its_holder_dead() {
    let mut book = Book::new();
    let locked = |run_id: &str, acquired_ns| Hello {
        lock: Some(lock(acquired_ns)),
        ..hello(run_id)
    };
    book.connect(locked("b", 11));
    assert_eq!(book.hello(locked("a", 10)), Err(HelloError::Ended));
    // Nobody can say which of two is the later.
    let welcome = book.hello(locked("c", 11)).expect("it is welcome");
    assert!(welcome.has_namesake);
    assert_eq!(book.names(), ["b", "c"]);
}

#[test]
fn a_lock_of_another_place_and_a_name_prove_nothing() {
    let socket = |network_namespace| LockAt::Socket {
        network_namespace,
        node: "edge-1".to_owned(),
    };
    let place = lock(10).place;
    let on = |at: LockAt| LockPlace {
        at,
        ..place.clone()
    };
    let inode = |device, inode| on(LockAt::File { device, inode });
    for (former, later) in [
        (Some(inode(2, 3)), Some(inode(2, 4))),
        (Some(inode(2, 3)), Some(inode(9, 3))),
        (Some(on(socket(5))), Some(on(socket(6)))),
        (Some(inode(2, 3)), Some(on(socket(5)))),
        (
            Some(place.clone()),
            Some(LockPlace {
                boot_id: "boot-2".to_owned(),
                ..place.clone()
            }),
        ),
        (
            Some(place.clone()),
            Some(LockPlace {
                time_namespace: 2,
                ..place.clone()
            }),
        ),
        (None, Some(place.clone())),
        (Some(place.clone()), None),
        (None, None),
    ] {
        let mut book = Book::new();
        let locked = |run_id: &str, place: Option<LockPlace>, acquired_ns| Hello {
            lock: place.map(|place| Lock { place, acquired_ns }),
            ..hello(run_id)
        };
        let key = book.connect(locked("a", former.clone(), 10));
        book.answer(&key, HOUR);
        book.lose(&key);
        let welcome = book.hello(locked("b", later.clone(), 11));
        let welcome = welcome.expect("it is welcome");
        assert!(welcome.has_namesake, "{former:?}, {later:?}");
        assert_eq!(book.names(), ["a", "b"], "{former:?}, {later:?}");
    }
}

#[test]
fn the_end_of_a_run_is_not_the_end_of_its_file() {
    let other_file = Some(SnapshotFile {
        id: "f2".to_owned(),
        begun_from_write: 9,
    });
    // Without a file, with another one, anew, and from a state before the one from which the former began.
    for successor in [None, other_file, Some(file(0)), Some(file(4))] {
        let mut book = Book::new();
        let former = book.connect(filed("a", 10, 5));
        book.answer(&former, HOUR);
        book.connect(Hello {
            file: successor.clone(),
            ..filed("b", 11, 0)
        });
        let stopped = Presence::Stopped(book.now.wall);
        assert_eq!(book.presence(&former), Some(stopped), "{successor:?}");
        assert_eq!(book.barrier(applied(4)).total, 2);
        book.advance(STRETCHED_HOUR);
        assert_eq!(book.names(), ["b"]);
    }
}

#[test]
fn a_run_that_continues_the_file_at_its_last_write_leaves_no_gap() {
    for (last_write, begun_from_write, gaps) in [
        (7, 7, [].as_slice()),
        // Somebody has served from the file since.
        (7, 8, &["a"]),
        // Or the file is one of before.
        (7, 6, &["a"]),
        // Nobody knows.
        (0, 7, &["a"]),
    ] {
        let mut book = Book::new();
        let former = book.connect(filed("a", 10, 5));
        book.answer(&former, HOUR);
        book.goodbye(&former, told_all(last_write));
        book.connect(filed("b", 11, begun_from_write));
        assert_eq!(book.names(), ["b"], "{last_write}, {begun_from_write}");
        assert_eq!(book.gaps(), gaps, "{last_write}, {begun_from_write}");
    }
}

#[test]
fn a_run_that_continues_the_file_of_one_that_did_not_report_all_leaves_a_gap() {
    for goodbye in [false, true] {
        let mut book = Book::new();
        let former = book.connect(filed("a", 10, 5));
        book.answer(&former, HOUR);
        if goodbye {
            let farewell = Farewell {
                has_told_all: false,
                ..told_all(7)
            };
            book.goodbye(&former, farewell);
        }
        book.advance(MINUTE);
        book.connect(filed("b", 11, 7));
        assert_eq!(book.names(), ["b"]);
        assert_eq!(book.gaps(), ["a"]);
        assert_eq!(book.coverage().1, Some(book.now.wall));
    }
}

#[test]
fn a_run_may_serve_what_its_file_was_granted() {
    let mut book = Book::new();
    let former = book.connect(filed("a", 10, 5));
    book.answer(&former, HOUR);
    book.advance(MINUTE);
    book.goodbye(&former, told_all(7));
    let mut brief = filed("b", 11, 7);
    let held = brief.keyrings.get_mut(&name()).expect("it is there");
    held.deny_after = MINUTE;
    let key = book.connect(brief);
    book.lose(&key);
    book.assert_serves_for(&key, STRETCHED_HOUR.saturating_sub(MINUTE));
}

#[test]
fn a_file_that_moved_to_another_machine_continues_nothing() {
    let mut book = Book::new();
    let former = book.connect(filed("a", 10, 5));
    book.answer(&former, HOUR);
    book.goodbye(&former, told_all(7));
    let mut elsewhere = filed("b", 11, 7);
    let lock = elsewhere.lock.as_mut().expect("it has one");
    lock.place.boot_id = "boot-2".to_owned();
    book.connect(elsewhere);
    assert_eq!(book.names(), ["a", "b"]);
}

// What is late.

#[test]
fn a_late_hello_of_an_older_stream_neither_steals_nor_revives() {
    let mut book = Book::new();
    let stream = |stream| Hello {
        stream,
        ..hello("a")
    };
    let key = book.connect(stream(2));
    assert_eq!(book.hello(stream(1)), Err(HelloError::Late));
    assert_eq!(book.hello(stream(2)), Err(HelloError::Late));
    book.lose(&key);
    assert_eq!(book.hello(stream(2)), Err(HelloError::Late));
    assert_eq!(book.presence(&key), Some(Presence::Lost(book.now.wall)));
    // The next control plane knows the same,
    let mut next = Book::restored(book.written(), start());
    assert_eq!(next.hello(stream(2)), Err(HelloError::Late));
    // and so does the book when the run is gone.
    book.advance(2 * HOUR);
    assert_eq!(book.gaps(), ["a"]);
    assert_eq!(book.hello(stream(2)), Err(HelloError::Late));
    let mut next = Book::restored(book.written(), start());
    assert_eq!(next.hello(stream(2)), Err(HelloError::Late));
    // A later one is the run itself.
    book.connect(stream(3));
    assert_eq!(book.gaps(), [] as [&str; 0]);
}

#[test]
fn a_run_that_has_ended_does_not_come_back() {
    let again = || Hello {
        stream: 2,
        ..filed("a", 10, 5)
    };
    let mut book = Book::new();
    let key = book.connect(filed("a", 10, 5));
    book.answer(&key, HOUR);
    book.goodbye(&key, told_all(7));
    assert_eq!(book.hello(again()), Err(HelloError::Ended));
    let mut next = Book::restored(book.written(), start());
    assert_eq!(next.hello(again()), Err(HelloError::Ended));
    // Nor once its file cannot be served any more.
    book.advance(2 * HOUR);
    assert_eq!(book.gaps(), ["a"]);
    assert_eq!(book.hello(again()), Err(HelloError::Ended));
    let mut next = Book::restored(book.written(), start());
    assert_eq!(next.hello(again()), Err(HelloError::Ended));
}

#[test]
fn what_is_dropped_counts_on_the_newest_stream_alone() {
    let mut book = Book::new();
    let key = book.connect(hello("a"));
    book.connect(Hello {
        stream: 2,
        ..hello("a")
    });
    book.save();
    book.serving.dropped(&key, 1, &name());
    assert_eq!(book.barrier(applied(9)).total, 1);
    book.serving.dropped(&key, 2, &name());
    assert_eq!(book.barrier(applied(9)).total, 0);
    let unsaved = book.serving.unsaved(book.now);
    assert_eq!(unsaved.rows[0].keyrings, []);
    // One that is lost said it before it was: nothing is to be believed of what it holds since.
    let key = book.connect(hello("b"));
    book.lose(&key);
    book.serving.dropped(&key, 1, &name());
    assert_eq!(book.barrier(applied(9)).total, 1);
}

// Who is forgotten.

#[test]
fn a_forgotten_run_is_not_waited_for_and_leaves_a_gap() {
    let mut book = Book::new();
    let key = book.connect(hello("a"));
    book.serving.reported(&key, book.now.wall, book.now);
    let reported = book.now.wall;
    let forget = |book: &mut Book| book.serving.forget(&key, book.now);
    assert_eq!(forget(&mut book), Err(ForgetError::Connected));
    book.advance(MINUTE);
    book.lose(&key);
    assert_eq!(forget(&mut book), Ok(()));
    assert_eq!(forget(&mut book), Err(ForgetError::Unknown));
    assert!(book.has_reached(applied(9)));
    let (_, gap) = book.serving.gaps().next().expect("it left one");
    assert!(gap.is_forgotten);
    assert_eq!(gap.complete_until, Some(reported));
    assert_eq!(gap.until, book.now.wall);
    assert_eq!(book.coverage(), (Some(book.now.wall), Some(book.now.wall)));
}

#[test]
fn a_forgotten_run_that_comes_back_begins_anew() {
    let mut book = Book::new();
    let key = book.connect(hello("a"));
    book.serving.reported(&key, book.now.wall, book.now);
    let reported = book.now.wall;
    book.lose(&key);
    book.serving.forget(&key, book.now).expect("it is lost");
    let mut next = Book::restored(book.written(), start());
    for book in [&mut book, &mut next] {
        let back = Hello {
            stream: 2,
            ..hello("a")
        };
        let welcome = book.hello(back).expect("it is welcome");
        assert!(welcome.was_forgotten);
        // That its digest agrees does not count.
        assert!(!book.has_reached(applied(1)) && !book.has_reached(revoked(1)));
        book.confirm(&key, &in_use(5));
        assert!(!book.has_reached(applied(1)));
        book.confirm(&key, &whole(5));
        assert!(book.has_reached(applied(5)));
        assert_eq!(book.run(&key).complete_until, Some(reported));
        // It is one like others from then on.
        let again = Hello {
            stream: 3,
            ..hello("a")
        };
        assert!(!book.hello(again).expect("it is welcome").was_forgotten);
    }
}

#[test]
fn a_forgotten_run_that_comes_back_counts_for_what_it_was_granted() {
    let mut book = Book::new();
    let key = book.connect(hello("a"));
    book.answer(&key, HOUR);
    book.lose(&key);
    book.advance(10 * MINUTE);
    let rest = STRETCHED_HOUR.saturating_sub(10 * MINUTE);
    book.serving.forget(&key, book.now).expect("it is lost");
    let mut next = Book::restored(book.written(), start());
    for book in [&mut book, &mut next] {
        // It may not have the keyring any more, and has not dropped it yet.
        let forbidden = HeldState {
            is_admitted: false,
            ..held(3)
        };
        book.connect(Hello {
            stream: 2,
            keyrings: BTreeMap::from([(name(), forbidden)]),
            ..hello("a")
        });
        assert!(!book.has_reached(applied(9)));
        book.lose(&key);
        book.assert_serves_for(&key, rest);
    }
}

// What confirms.

#[test]
fn a_run_with_a_file_confirms_what_is_on_its_disk() {
    let mut book = Book::new();
    let key = book.connect(Hello {
        file: Some(file(0)),
        ..hello("a")
    });
    for target in [applied(3), revoked(3)] {
        assert!(!book.has_reached(target), "a Hello says nothing of a disk");
    }
    let confirmation = Confirmation {
        durable: Revision::new(3),
        durable_revoked_through: Revision::new(4),
        ..in_use(5)
    };
    book.confirm(&key, &confirmation);
    assert!(book.has_reached(applied(3)) && !book.has_reached(applied(4)));
    assert!(book.has_reached(revoked(4)) && !book.has_reached(revoked(5)));
    assert!(book.barrier(applied(5)).laggards[0].lacks_disk);
    assert!(book.barrier(revoked(5)).laggards[0].lacks_disk);
    assert!(!book.barrier(applied(6)).laggards[0].lacks_disk);
    assert_eq!(book.barrier(applied(8)).laggards[0].behind, 3);
    // Without a file, what is in use counts.
    let mut book = Book::new();
    let key = book.connect(hello("a"));
    assert!(book.has_reached(applied(3)) && book.has_reached(revoked(3)));
    book.confirm(&key, &in_use(5));
    assert!(book.has_reached(applied(5)) && !book.has_reached(applied(6)));
    assert!(!book.barrier(applied(6)).laggards[0].lacks_disk);
}

#[test]
fn revocations_are_confirmed_ahead_of_the_revision() {
    let mut book = Book::new();
    let key = book.connect(hello("a"));
    let ahead = Confirmation {
        revoked_through: Revision::new(9),
        ..in_use(3)
    };
    book.confirm(&key, &ahead);
    assert!(book.has_reached(revoked(9)) && !book.has_reached(applied(9)));
}

#[test]
fn another_epoch_confirms_nothing() {
    let mut book = Book::new();
    let key = book.connect(hello("a"));
    let other = Confirmation {
        epoch: Epoch::new(2),
        ..in_use(30)
    };
    book.confirm(&key, &other);
    assert!(!book.has_reached(applied(4)) && !book.has_reached(revoked(4)));
}

#[test]
fn a_hello_that_does_not_agree_counts_for_nothing_until_a_whole_snapshot() {
    let mut book = Book::new();
    let differs = HeldState {
        agrees: false,
        ..held(5)
    };
    let key = book.connect(Hello {
        keyrings: BTreeMap::from([(name(), differs)]),
        ..hello("a")
    });
    for confirmation in [in_use(5), in_use(6)] {
        assert!(!book.has_reached(applied(1)) && !book.has_reached(revoked(1)));
        book.confirm(&key, &confirmation);
    }
    assert!(!book.has_reached(applied(1)) && !book.has_reached(revoked(1)));
    book.confirm(&key, &whole(6));
    assert!(book.has_reached(applied(6)) && book.has_reached(revoked(6)));
    book.confirm(&key, &in_use(7));
    assert!(book.has_reached(applied(7)));
    // What was confirmed before counts no longer than until a Hello that does not agree.
    book.connect(Hello {
        stream: 2,
        keyrings: BTreeMap::from([(name(), differs)]),
        ..hello("a")
    });
    assert!(!book.has_reached(applied(1)));
}

#[test]
fn a_refused_version_is_not_reached_until_a_whole_snapshot() {
    let mut book = Book::new();
    let key = book.connect(hello("a"));
    let refusal = Confirmation {
        rejected: vec![(version().to_string(), "state: 9 is unknown".to_owned())],
        ..in_use(4)
    };
    book.confirm(&key, &refusal);
    book.confirm(&key, &in_use(5));
    assert!(!book.has_reached(applied(4)));
    let next = VersionRef {
        version: version().version.next(),
        ..version()
    };
    assert!(book.has_reached(Target::Applied(Revision::new(4), next)));
    assert!(book.has_reached(revoked(4)));
    // It comes again with the same hole in what it holds.
    let differs = HeldState {
        agrees: false,
        ..held(5)
    };
    book.connect(Hello {
        stream: 2,
        keyrings: BTreeMap::from([(name(), differs)]),
        ..hello("a")
    });
    let refused = &book.run(&key).keyrings[&name()].progress.rejected;
    assert!(refused.contains_key(&version().to_string()));
    // A whole snapshot with the refusal in it is none with the version.
    let again = Confirmation {
        is_whole: true,
        ..refusal
    };
    book.confirm(&key, &again);
    assert!(!book.has_reached(applied(4)));
    book.confirm(&key, &whole(5));
    assert!(book.has_reached(applied(4)));
}

#[test]
fn more_refusals_than_are_named_reach_no_target() {
    let other = |number: usize| (format!("key {number}"), String::new());
    let many = Confirmation {
        rejected: (0..=progress::MAX_REJECTED).map(other).collect(),
        ..in_use(4)
    };
    let unnamed = Confirmation {
        rejected: vec![other(1)],
        has_more_rejected: true,
        ..in_use(4)
    };
    for confirmation in [many, unnamed] {
        let mut book = Book::new();
        let key = book.connect(hello("a"));
        book.confirm(&key, &confirmation);
        assert!(!book.has_reached(applied(4)));
        assert!(book.has_reached(revoked(4)));
        let progress = &book.run(&key).keyrings[&name()].progress;
        assert!(progress.rejected.len() <= progress::MAX_REJECTED);
        // The same again is not more.
        book.confirm(&key, &in_use(5));
        assert!(!book.has_reached(applied(4)));
        book.confirm(&key, &whole(5));
        assert!(book.has_reached(applied(4)));
    }
    // As many as can be named are named.
    let mut book = Book::new();
    let key = book.connect(hello("a"));
    let full = Confirmation {
        rejected: (0..progress::MAX_REJECTED).map(other).collect(),
        ..in_use(4)
    };
    book.confirm(&key, &full);
    book.confirm(&key, &full);
    assert!(book.has_reached(applied(4)));
}

#[test]
fn runs_that_are_passed_by_are_named_and_not_waited_for() {
    let mut book = Book::new();
    let lost = book.connect(hello("a"));
    let behind = book.connect(hello("b"));
    book.lose(&lost);
    let barrier = book.barrier_without(applied(4), std::slice::from_ref(&lost));
    assert_eq!(barrier.passed_by, std::slice::from_ref(&lost));
    assert_eq!((barrier.confirmed, barrier.total), (0, 1));
    assert_eq!(barrier.laggards[0].key, behind);
    let barrier = book.barrier_without(applied(4), &[lost.clone(), behind.clone()]);
    assert!(barrier.is_passed());
    assert_eq!(barrier.passed_by, [lost, behind]);
    // Another run of the same name is not passed by.
    let next = book.connect(hello("c"));
    let barrier = book.barrier_without(applied(4), &barrier.passed_by);
    assert_eq!(barrier.laggards[0].key, next);
}

#[test]
fn a_wait_for_lost_runs_ends_with_the_last_bound() {
    let mut book = Book::new();
    let first = book.connect(hello("a"));
    book.lose(&first);
    book.advance(MINUTE);
    let second = book.connect(hello("b"));
    assert_eq!(book.barrier(applied(4)).rest(), None, "one is connected");
    book.lose(&second);
    assert_eq!(book.barrier(applied(4)).rest(), Some(STRETCHED_HOUR));
}

// Evidence.

#[test]
fn coverage_is_the_least_of_all_that_may_serve() {
    let mut book = Book::new();
    let start = book.now.wall;
    assert_eq!(book.coverage(), (Some(start), None), "nobody serves");
    let first = book.connect(hello("a"));
    let second = book.connect(hello("b"));
    let before = |millis| start.saturating_sub(Duration::from_millis(millis));
    let report = |book: &mut Book, key: &RunKey, until| {
        book.serving.reported(key, until, book.now);
    };
    report(&mut book, &first, before(1));
    assert_eq!(book.coverage(), (None, None));
    report(&mut book, &second, before(5));
    assert_eq!(book.coverage(), (Some(before(5)), None));
    report(&mut book, &second, before(9));
    assert_eq!(book.coverage(), (Some(before(5)), None), "it never falls");
    // No clock covers what is still to come.
    report(&mut book, &second, start.saturating_add(HOUR));
    assert_eq!(book.coverage(), (Some(before(1)), None));
    book.advance(MINUTE);
    let later = book.now.wall;
    report(&mut book, &first, later);
    assert_eq!(book.coverage(), (Some(start), None));
    // Who is lost may still serve, and holds it back.
    book.lose(&second);
    book.advance(30 * MINUTE);
    assert_eq!(book.coverage().0, Some(start));
    let other: KeyringName = "elsewhere".parse().expect("a name");
    let elsewhere = book.serving.coverage(&other, book.now.wall, book.now);
    assert_eq!(elsewhere.complete_until, Some(book.now.wall));
}

#[test]
fn a_lost_run_that_comes_back_reports_everything() {
    let mut book = Book::new();
    let key = book.connect(hello("a"));
    book.serving.reported(&key, book.now.wall, book.now);
    let reported = book.now.wall;
    book.lose(&key);
    book.advance(2 * HOUR);
    let over = start().wall.saturating_add(STRETCHED_HOUR);
    assert_eq!(book.coverage(), (Some(book.now.wall), Some(over)));
    book.connect(Hello {
        stream: 2,
        ..hello("a")
    });
    assert_eq!(book.coverage(), (Some(reported), None));
    book.serving.reported(&key, book.now.wall, book.now);
    assert_eq!(book.coverage(), (Some(book.now.wall), None));
}

#[test]
fn the_age_of_a_gap_is_counted_by_boot_clocks() {
    let mut book = Book::new();
    let key = book.connect(hello("a"));
    book.lose(&key);
    book.advance(STRETCHED_HOUR + MINUTE);
    assert_eq!(book.gaps(), ["a"]);
    let age = |book: &Book| {
        let until = book.coverage().1.expect("there is a gap");
        book.now.wall.saturating_since(until)
    };
    assert_eq!(age(&book), MINUTE);
    // A wall clock that jumps makes it neither older nor younger.
    for wall in [0, 4_000_000_000_000] {
        book.now.wall = Timestamp::from_millis(wall);
        book.serving.pass(book.now);
        assert_eq!(
            age(&book),
            MINUTE.min(Duration::from_millis(wall.unsigned_abs()))
        );
    }
    // What passes while no control plane runs does not count.
    let mut next = Book::restored(
        book.written(),
        Now {
            boot: BootTime::from_millis(1),
            wall: book.now.wall.saturating_add(10 * HOUR),
        },
    );
    assert_eq!(age(&next), MINUTE);
    next.advance(MINUTE);
    assert_eq!(age(&next), 2 * MINUTE);
    // It does not matter any more after a month.
    next.advance(Duration::from_hours(30 * 24));
    assert_eq!(next.gaps(), [] as [&str; 0]);
    assert_eq!(next.serving.unsaved(next.now).removed, [key]);
}

#[test]
fn a_keyring_whose_bound_has_passed_is_a_gap_while_others_are_served() {
    let mut book = Book::new();
    let other: KeyringName = "elsewhere".parse().expect("a name");
    let mut both = hello("a");
    both.keyrings.insert(
        other,
        HeldState {
            deny_after: Duration::from_mins(1),
            ..held(3)
        },
    );
    let key = book.connect(both);
    book.lose(&key);
    book.advance(10 * MINUTE);
    let other: KeyringName = "elsewhere".parse().expect("a name");
    let coverage = book.serving.coverage(&other, book.now.wall, book.now);
    let over = start().wall.saturating_add(Duration::from_millis(60_601));
    assert_eq!(coverage.gap_until, Some(over));
    assert_eq!(coverage.complete_until, Some(book.now.wall));
    assert_eq!(book.coverage(), (None, None), "this one is served");
}

#[test]
fn a_node_that_dies_again_and_again_keeps_its_newest_gaps() {
    let mut book = Book::new();
    for number in 0..40 {
        let key = book.connect(hello(&format!("run-{number:02}")));
        book.lose(&key);
        book.advance(2 * HOUR);
    }
    assert_eq!(book.gaps().len(), 16);
    assert_eq!(book.gaps()[0], "run-24");
    let removed = book.serving.unsaved(book.now).removed;
    assert_eq!(removed.len(), 24);
}

// What the store keeps.

#[test]
fn a_row_without_a_rest_begins_at_its_full_bound() {
    let mut book = Book::new();
    let key = book.connect(filed("a", 10, 5));
    book.answer(&key, 10 * MINUTE);
    book.serving.reported(&key, book.now.wall, book.now);
    let mut next = Book::restored(book.written(), start());
    let run = next.run(&key);
    assert_eq!(run.presence(), Presence::Lost(book.now.wall));
    assert_eq!(run.complete_until, Some(book.now.wall));
    assert_eq!(run.file, Some(file(5)));
    assert!(!next.has_reached(applied(1)), "it is to say what it has");
    // Hello had said an hour, and nobody knows better.
    next.assert_serves_for(&key, STRETCHED_HOUR);
}

#[test]
fn a_row_of_a_version_that_kept_no_rest_begins_at_the_longest_grant() {
    let row = Row {
        key: hello("a").key,
        cluster: "mesh".to_owned(),
        version: "0.1.0".to_owned(),
        keyrings: vec![name()],
        last_seen: start().wall,
        complete_until: None,
        gone_at: None,
        record: None,
    };
    let key = row.key.clone();
    let mut book = Book::restored(vec![row.clone()], start());
    book.assert_serves_for(&key, STRETCHED_HOUR);
    let gap = Row {
        gone_at: Some(start().wall),
        ..row.clone()
    };
    assert_eq!(Book::restored(vec![gap], start()).gaps(), ["a"]);
    let unreadable = Row {
        record: Some("{".to_owned()),
        ..row
    };
    let refused = Serving::restore(vec![unreadable], HOUR, start());
    let error = refused.expect_err("it proves too much without it");
    assert!(error.to_string().contains("edge-1"), "{error}");
}

#[test]
fn a_row_with_a_rest_goes_on_from_it_whatever_the_wall_clock_says() {
    let mut book = Book::new();
    let key = book.connect(hello("a"));
    book.lose(&key);
    book.advance(20 * MINUTE);
    let rest = STRETCHED_HOUR.saturating_sub(20 * MINUTE);
    let rows = book.written();
    for wall in [0, 1_800_000_000_000, 9_000_000_000_000] {
        let now = Now {
            boot: BootTime::from_millis(1),
            wall: Timestamp::from_millis(wall),
        };
        let mut next = Book::restored(rows.clone(), now);
        assert_eq!(next.run(&key).rest(now.boot), Some(rest));
        // A jump of the wall clock while it counts changes nothing either.
        next.now.wall = start().wall;
        next.serving.pass(next.now);
        next.assert_serves_for(&key, rest);
    }
}

#[test]
fn a_run_that_is_back_has_no_rest_in_the_store() {
    let mut book = Book::new();
    let key = book.connect(hello("a"));
    book.lose(&key);
    book.advance(59 * MINUTE);
    let rows = book.written();
    let mut next = Book::restored(rows, start());
    next.connect(Hello {
        stream: 2,
        ..hello("a")
    });
    assert_eq!(next.grant(&key, HOUR), Ok(false), "the rest is still there");
    let rows = next.serving.unsaved(next.now).rows;
    let last = Book::restored(rows, start());
    let rest = last.run(&key).rest(last.now.boot);
    assert_eq!(rest, Some(STRETCHED_HOUR));
}

#[test]
fn a_book_that_is_written_down_is_read_back_as_it_was() {
    let mut book = Book::new();
    let stopped = book.connect(filed("a", 10, 5));
    book.goodbye(&stopped, told_all(7));
    let mut renamed = filed("b", 20, 0);
    renamed.lock = None;
    renamed.key.node = "edge-2".to_owned();
    book.connect(renamed);
    let rows = book.written();
    let mut next = Book::restored(rows.clone(), book.now);
    let continued = book.presence(&stopped);
    assert_eq!(next.presence(&stopped), continued);
    // What proves an end, and what it had reported, is still known.
    next.connect(filed("c", 11, 7));
    assert_eq!(next.names(), ["c", "b"]);
    assert_eq!(next.gaps(), [] as [&str; 0]);
}

#[test]
fn what_changes_while_it_is_written_stays_to_be_written() {
    let mut book = Book::new();
    let key = book.connect(hello("a"));
    let written = book.serving.unsaved(book.now);
    assert_eq!(written.rows.len(), 1);
    // It is lost meanwhile.
    book.lose(&key);
    book.serving.saved(&written, book.now);
    let unsaved = book.serving.unsaved(book.now);
    assert_eq!(unsaved.rows[0].key, key);
    // Its rest alone runs on.
    book.advance(MINUTE);
    book.serving.saved(&unsaved, book.now);
    assert_eq!(book.serving.unsaved(book.now), Unsaved::default());
    // Larger than what is being written is what it is granted meanwhile.
    let brief = Hello {
        stream: 2,
        keyrings: BTreeMap::from([(
            name(),
            HeldState {
                deny_after: MINUTE,
                ..held(0)
            },
        )]),
        ..hello("b")
    };
    let key = book.connect(brief);
    let written = book.serving.unsaved(book.now);
    assert_eq!(book.grant(&key, 2 * MINUTE), Ok(false));
    book.serving.saved(&written, book.now);
    assert_eq!(book.grant(&key, 2 * MINUTE), Ok(false));
    // It is gone, and comes back while its row is removed.
    book.goodbye(&key, told_all(0));
    let written = book.serving.unsaved(book.now);
    assert_eq!(written.removed, std::slice::from_ref(&key));
    book.connect(Hello {
        stream: 3,
        ..hello("b")
    });
    book.serving.saved(&written, book.now);
    let unsaved = book.serving.unsaved(book.now);
    assert_eq!(unsaved.removed, []);
    assert_eq!(unsaved.rows[0].key, key);
}

#[test]
fn a_node_belongs_to_one_identity_while_it_may_serve() {
    let [one, other] = ["spiffe://mesh/one", "spiffe://mesh/other"]
        .map(|text| text.parse::<Identity>().expect("an identity"));
    let mut book = Book::new();
    let of = |identity: &Identity, run_id: &str, stream| Hello {
        stream,
        about: About {
            identity: Some(identity.clone()),
            ..About::default()
        },
        ..hello(run_id)
    };
    let key = book.connect(of(&one, "a", 1));
    let taken = HelloError::Taken {
        holder: one.clone(),
    };
    assert_eq!(book.hello(of(&other, "b", 1)), Err(taken.clone()));
    // Not even as the very run, whose Goodbye would end it.
    assert_eq!(book.hello(of(&other, "a", 2)), Err(taken.clone()));
    book.lose(&key);
    assert_eq!(book.hello(of(&other, "b", 1)), Err(taken));
    book.advance(STRETCHED_HOUR);
    book.connect(of(&other, "b", 1));
}

#[test]
fn a_keyring_that_is_subscribed_to_later_counts_from_then_on() {
    let mut book = Book::new();
    let key = book.connect(without_keyrings("a"));
    let barrier = |book: &Book| book.barrier(applied(1)).total;
    assert_eq!(barrier(&book), 0);
    let nothing = HeldState {
        is_admitted: true,
        deny_after: Duration::from_mins(10),
        ..HeldState::default()
    };
    let now = book.now;
    assert!(book.serving.subscribed(&key, 1, name(), &nothing, now));
    assert_eq!(barrier(&book), 1, "it counts before anything is sent");
    // Nothing that it reports of the keyring counts before a whole snapshot.
    book.confirm(&key, &in_use(1));
    assert!(!book.has_reached(applied(1)));
    book.confirm(&key, &whole(1));
    assert!(book.has_reached(applied(1)));
    let unsaved = book.serving.unsaved(now);
    assert_eq!(unsaved.rows[0].keyrings, [name()]);
    // A grant waits for the row.
    assert_eq!(book.grant(&key, Duration::from_mins(10)), Ok(false));
    book.save();
    book.answer(&key, Duration::from_mins(10));
    book.lose(&key);
    assert_eq!(barrier(&book), 1);
    book.advance(Duration::from_mins(11));
    assert_eq!(barrier(&book), 0);
}

#[test]
fn a_subscription_on_a_stream_that_the_sidecar_has_left_counts_for_nothing() {
    let mut book = Book::new();
    let first = without_keyrings("a");
    let second = Hello {
        stream: 2,
        ..first.clone()
    };
    let key = book.connect(first);
    book.connect(second);
    let held = HeldState {
        is_admitted: true,
        ..HeldState::default()
    };
    let now = book.now;
    assert!(!book.serving.subscribed(&key, 1, name(), &held, now));
    assert!(book.run(&key).keyrings.is_empty());
    assert!(book.serving.subscribed(&key, 2, name(), &held, now));
    book.serving.stream_ended(&key, 2, now);
    assert!(!book.serving.subscribed(&key, 2, name(), &held, now));
}

/// The Hello of a sidecar that has found no keyring yet.
fn without_keyrings(run_id: &str) -> Hello {
    Hello {
        keyrings: BTreeMap::new(),
        ..empty_hello(run_id)
    }
}
