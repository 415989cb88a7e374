//! The contract of [`Store`], as tests that every engine runs: `store_contract!(MyEngine)` makes one test of each
//! function here.

mod outbox;

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use relatch::{
    key::{Epoch, Revision, Timestamp, VersionNumber, VersionRef},
    store::{
        AppendError, CallersRow, EntryError, EntryHash, FOLDED_FOR, Head, LogEntry, LogName,
        MAX_APPEND, MAX_ENTRY_LEN, MAX_PAGE, MAX_PAGE_LEN, NewEntry, PresenceRow, StatePage,
        StateSnapshot, Store, StoreError, StoredUsage, UsageRow, chain,
    },
};
use tokio::task::JoinSet;

/// An engine under test.
pub(crate) trait Engine {
    /// A store that nobody has used.
    async fn start() -> Self;

    /// A handle on that store which shares nothing with other handles, as another process would have it.
    async fn open(&self) -> Arc<dyn Store>;
}

macro_rules! store_contract {
    ($engine:ty) => {
        $crate::store_contract::store_contract! {
            $engine:
            new_log_begins_at_revision_one,
            entries_read_back_byte_for_byte,
            revisions_have_no_gaps,
            append_is_all_or_nothing,
            entries_beyond_the_bounds_are_refused,
            conflict_names_the_head,
            append_of_nothing_only_compares,
            concurrent_writers_never_lose_or_repeat_a_revision,
            handles_see_each_others_commits,
            logs_are_independent,
            chain_verifies,
            chain_verifies_while_it_grows,
            verification_of_an_unknown_log_says_so,
            state_only_moves_forward,
            state_must_belong_to_its_log,
            state_is_saved_when_all_its_pages_are,
            pages_of_older_states_are_removed,
            presence_is_kept_by_node_and_process,
            whatever_was_saved_of_presence_last_counts,
            usage_is_merged_by_maximum,
            usage_merges_in_any_order,
            folded_usage_counts_once,
            folded_processes_are_forgotten_after_a_while,
            callers_are_replaced_and_removed,
            cursor_moves_with_its_deliveries,
            deliveries_that_are_refused_do_not_move_the_cursor,
            of_two_projectors_one_makes_each_delivery,
            a_claimed_delivery_is_nobody_elses,
            two_claimants_never_share_a_delivery,
            a_delivery_is_settled_by_its_newest_claim,
            deliveries_are_listed_by_webhook_and_pruned,
            epochs_differ_and_rotate,
            long_pages_end_early,
            long_log_is_read_in_pages,
            reopened_store_has_everything,
            ping_succeeds,
        }
    };
    ($engine:ty: $($test:ident),* $(,)?) => {$(
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $test() {
            use $crate::store_contract;
            store_contract::within_deadline(store_contract::$test::<$engine>()).await;
        }
    )*};
}

pub(crate) use outbox::*;
pub(crate) use store_contract;

/// Far above what any of these tests takes; one that hangs fails instead.
const DEADLINE: Duration = Duration::from_mins(2);

pub(crate) async fn new_log_begins_at_revision_one<E: Engine>() {
    let engine = E::start().await;
    let store = engine.open().await;
    assert_eq!(heads(&store).await, []);
    assert_eq!(read(&store, &log("payments"), 0).await, []);

    let head = append(&store, &log("payments"), 0, 1).await;

    assert_eq!(head.log, log("payments"));
    assert_eq!(head.revision, Revision::new(1));
    assert_ne!(head.epoch, Epoch::default());
    let entries = read(&store, &log("payments"), 0).await;
    assert_eq!(entries.len(), 1);
    assert_eq!(entries[0].revision, Revision::new(1));
    assert_eq!(entries[0].prev_hash, EntryHash::ZERO);
    assert_eq!(entries[0].hash, head.hash);
    assert_eq!(heads(&store).await, std::slice::from_ref(&head));
    let found = store.head(&log("payments")).await.expect("it reads");
    assert_eq!(found, Some(head));
    let absent = store.head(&LogName::Control).await.expect("it reads");
    assert_eq!(absent, None);
}

pub(crate) async fn entries_read_back_byte_for_byte<E: Engine>() {
    let engine = E::start().await;
    let store = engine.open().await;
    let end_of_time = Timestamp::from_millis(i64::MAX);
    let odd = [
        (
            0,
            "alice",
            "keyring_created",
            b"{ \"b\":1,\n\t\"a\":1.0e2 }".to_vec(),
        ),
        (1, "", "", Vec::new()),
        (
            end_of_time.as_millis(),
            "Zoë 鍵 '; --",
            "k\u{1F511}",
            (0..=255).collect(),
        ),
        (5, "trailing space ", "K", b"\0\0".to_vec()),
    ];
    let entries: Vec<_> = odd
        .into_iter()
        .map(|(at, actor, kind, payload)| NewEntry {
            at: Timestamp::from_millis(at),
            actor: actor.into(),
            kind: kind.into(),
            payload,
        })
        .collect();
    let revision = Revision::default();
    let head = store
        .append(&LogName::Control, revision, entries.clone())
        .await
        .expect("it appends");

    let expected = chain::link(&Head::absent(LogName::Control), entries);

    assert_eq!(read(&store, &LogName::Control, 0).await, expected);
    assert_eq!(head.hash, expected[3].hash);
}

pub(crate) async fn revisions_have_no_gaps<E: Engine>() {
    let engine = E::start().await;
    let store = engine.open().await;
    let mut head = 0;
    for count in [1, 2, 1, 5, 3] {
        let appended = append(&store, &log("payments"), head, count).await;
        head += count as u64;
        assert_eq!(appended.revision, Revision::new(head));
    }
    assert_eq!(
        revisions(&read(&store, &log("payments"), 0).await),
        (1..=12).collect::<Vec<_>>()
    );
    assert_eq!(
        revisions(&read(&store, &log("payments"), 9).await),
        [10, 11, 12]
    );
    assert_eq!(read(&store, &log("payments"), 12).await, []);
    assert_eq!(read(&store, &log("payments"), u64::MAX).await, []);
    let page = store.read(&log("payments"), Revision::new(3), 2).await;
    assert_eq!(revisions(&page.expect("it reads")), [4, 5]);
    let page = store.read(&log("payments"), Revision::new(3), 0).await;
    assert_eq!(page.expect("it reads"), []);
}

pub(crate) async fn append_is_all_or_nothing<E: Engine>() {
    let engine = E::start().await;
    let store = engine.open().await;
    let before = append(&store, &log("payments"), 0, 2).await;
    let mut entries = entries(3);
    entries[2].payload = vec![b' '; MAX_ENTRY_LEN + 1];
    let refused = store
        .append(&log("payments"), before.revision, entries.clone())
        .await;
    assert!(
        matches!(refused, Err(AppendError::Invalid(_))),
        "{refused:?}"
    );
    let refused = store
        .append(&log("new"), Revision::default(), entries)
        .await;
    assert!(
        matches!(refused, Err(AppendError::Invalid(_))),
        "{refused:?}"
    );
    conflict(&store, &log("payments"), 1, 3).await;

    assert_eq!(heads(&store).await, [before]);
    assert_eq!(read(&store, &log("payments"), 2).await, []);
    assert_eq!(read(&store, &log("new"), 0).await, []);
}

pub(crate) async fn entries_beyond_the_bounds_are_refused<E: Engine>() {
    let engine = E::start().await;
    let store = engine.open().await;
    let mut nul = entries(1);
    nul[0].actor.push('\0');
    for (refused, why) in [
        (
            entries(MAX_APPEND + 1),
            EntryError::TooMany {
                count: MAX_APPEND + 1,
            },
        ),
        (nul, EntryError::Nul),
    ] {
        match store
            .append(&log("payments"), Revision::default(), refused)
            .await
        {
            Err(AppendError::Invalid(error)) => assert_eq!(error, why),
            other => panic!("not refused: {other:?}"),
        }
    }
    let head = append(&store, &log("payments"), 0, MAX_APPEND).await;
    assert_eq!(head.revision, Revision::new(MAX_APPEND as u64));
}

pub(crate) async fn conflict_names_the_head<E: Engine>() {
    let engine = E::start().await;
    let store = engine.open().await;
    let absent = conflict(&store, &log("payments"), 1, 1).await;
    assert_eq!(absent, Head::absent(log("payments")));
    assert_eq!(heads(&store).await, [], "a conflict made a log");

    let head = append(&store, &log("payments"), 0, 7).await;

    for expected in [0, 6, 8, u64::MAX] {
        assert_eq!(conflict(&store, &log("payments"), expected, 1).await, head);
    }
    assert_eq!(
        append(&store, &log("payments"), 7, 1).await.revision,
        Revision::new(8)
    );
}

pub(crate) async fn append_of_nothing_only_compares<E: Engine>() {
    let engine = E::start().await;
    let store = engine.open().await;
    assert_eq!(
        append(&store, &log("payments"), 0, 0).await,
        Head::absent(log("payments"))
    );
    assert_eq!(heads(&store).await, []);

    let head = append(&store, &log("payments"), 0, 2).await;

    assert_eq!(append(&store, &log("payments"), 2, 0).await, head);
    assert_eq!(conflict(&store, &log("payments"), 1, 0).await, head);
}

/// 32 writers on two handles race for every revision, while two readers tail the log.
pub(crate) async fn concurrent_writers_never_lose_or_repeat_a_revision<E: Engine>() {
    const WRITERS: usize = 32;
    const EACH: usize = 4;
    let engine = E::start().await;
    let handles = [engine.open().await, engine.open().await];
    let mut readers = JoinSet::new();
    for store in &handles {
        readers.spawn(tail(Arc::clone(store), (WRITERS * EACH) as u64));
    }
    let mut writers = JoinSet::new();
    for writer in 0..WRITERS {
        let store = Arc::clone(&handles[writer % 2]);
        writers.spawn(async move {
            let mut won = Vec::new();
            for number in 0..EACH {
                won.push(append_until_won(&store, format!("{writer}/{number}")).await);
            }
            won
        });
    }
    let won: Vec<_> = writers.join_all().await.concat();
    let unique: BTreeSet<_> = won.iter().copied().collect();
    assert_eq!(unique.len(), WRITERS * EACH, "a revision was given twice");
    assert_eq!(unique.first(), Some(&1));
    assert_eq!(unique.last(), Some(&((WRITERS * EACH) as u64)));

    let seen = readers.join_all().await;

    let committed = read(&handles[0], &log("payments"), 0).await;
    assert_eq!(
        revisions(&committed),
        unique.into_iter().collect::<Vec<_>>()
    );
    let actors: BTreeSet<_> = committed.iter().map(|entry| &entry.actor).collect();
    assert_eq!(
        actors.len(),
        WRITERS * EACH,
        "an entry was lost or repeated"
    );
    for seen in seen {
        assert_eq!(seen, committed, "a reader saw another log");
    }
    let verdict = chain::verify(&*handles[1], &log("payments"))
        .await
        .expect("it reads");
    assert_eq!(verdict.problem, None);
}

pub(crate) async fn handles_see_each_others_commits<E: Engine>() {
    let engine = E::start().await;
    let (one, other) = (engine.open().await, engine.open().await);
    let first = append(&one, &log("payments"), 0, 1).await;
    assert_eq!(heads(&other).await, [first]);
    let second = append(&other, &log("payments"), 1, 1).await;
    assert_eq!(conflict(&one, &log("payments"), 1, 1).await, second);
    assert_eq!(
        read(&one, &log("payments"), 0).await,
        read(&other, &log("payments"), 0).await
    );
    let rotated = other
        .rotate_epoch(&log("payments"))
        .await
        .expect("it rotates");
    assert_eq!(heads(&one).await, [rotated]);
}

pub(crate) async fn logs_are_independent<E: Engine>() {
    let engine = E::start().await;
    let store = engine.open().await;
    let names = [
        log("zebra"),
        LogName::Control,
        log("a"),
        log("a-b"),
        log("ab"),
    ];
    let mut expected = Vec::new();
    for (index, name) in names.iter().enumerate() {
        expected.push(append(&store, name, 0, index + 1).await);
    }
    for (name, head) in names.iter().zip(&expected) {
        let entries = read(&store, name, 0).await;
        assert!(entries.iter().all(|entry| entry.log == *name));
        assert_eq!(entries.len() as u64, head.revision.get());
    }
    let first: BTreeSet<_> = expected.iter().map(|head| head.hash.to_string()).collect();
    assert_eq!(
        first.len(),
        names.len(),
        "the same entry has one hash in two logs"
    );
    expected.sort_by(|one, other| one.log.as_str().cmp(other.log.as_str()));
    assert_eq!(heads(&store).await, expected);
}

pub(crate) async fn chain_verifies<E: Engine>() {
    let engine = E::start().await;
    let store = engine.open().await;
    append(&store, &log("payments"), 0, MAX_PAGE + 1).await;
    let head = append(&store, &log("payments"), MAX_PAGE as u64 + 1, 1).await;

    let verdict = chain::verify(&*store, &log("payments"))
        .await
        .expect("it reads");

    assert_eq!(verdict.problem, None);
    assert_eq!(verdict.entries, MAX_PAGE as u64 + 2);
    assert_eq!(verdict.head, head);
}

pub(crate) async fn chain_verifies_while_it_grows<E: Engine>() {
    let engine = E::start().await;
    let store = engine.open().await;
    append(&store, &log("payments"), 0, 1).await;
    let writer = tokio::spawn({
        let store = Arc::clone(&store);
        async move {
            for revision in 1..60 {
                append(&store, &log("payments"), revision, 1).await;
            }
        }
    });
    let mut finished = false;
    while !finished {
        finished = writer.is_finished();
        let verdict = chain::verify(&*store, &log("payments"))
            .await
            .expect("it reads");
        assert_eq!(verdict.problem, None);
        assert_eq!(verdict.entries, verdict.head.revision.get());
    }
    writer.await.expect("the writer succeeds");
}

pub(crate) async fn verification_of_an_unknown_log_says_so<E: Engine>() {
    let engine = E::start().await;
    let store = engine.open().await;
    match chain::verify(&*store, &log("payments")).await {
        Err(StoreError::UnknownLog { log: name }) => assert_eq!(name, log("payments")),
        other => panic!("not refused: {other:?}"),
    }
}

pub(crate) async fn state_only_moves_forward<E: Engine>() {
    let engine = E::start().await;
    let store = engine.open().await;
    append(&store, &log("payments"), 0, 9).await;
    let entries = read(&store, &log("payments"), 0).await;
    let state = |revision: usize, format, payload: &[u8]| StateSnapshot {
        revision: Revision::new(revision as u64),
        hash: entries[revision - 1].hash,
        format,
        payload: payload.to_vec(),
        pages: 0,
    };
    assert_eq!(load_state(&store, "payments").await, None);
    let steps = [
        (state(5, 1, b"five"), true),
        (state(4, 1, b"older"), false),
        (state(4, 2, b"older, of a later format"), false),
        (state(5, 1, b"the same"), false),
        (state(5, 2, b"of a later format"), true),
        (state(5, 1, b"of an earlier format"), false),
        (state(9, 1, &[0, 255, 0]), true),
        (state(8, 7, b"older"), false),
    ];
    let mut newest = None;
    for (state, is_newer) in steps {
        store
            .save_state(&log("payments"), state.clone())
            .await
            .expect("it saves");
        if is_newer {
            newest = Some(state);
        }
        assert_eq!(load_state(&store, "payments").await, newest);
    }
    assert_eq!(load_state(&store, "other").await, None);
}

pub(crate) async fn state_must_belong_to_its_log<E: Engine>() {
    let engine = E::start().await;
    let store = engine.open().await;
    let head = append(&store, &log("payments"), 0, 2).await;
    for (name, revision, hash) in [
        ("payments", 3, head.hash),
        ("payments", 1, head.hash),
        ("payments", 0, EntryHash::ZERO),
        ("payments", u64::MAX, head.hash),
        ("other", 2, head.hash),
    ] {
        let state = StateSnapshot {
            revision: Revision::new(revision),
            hash,
            format: 1,
            payload: b"state".to_vec(),
            pages: 0,
        };
        let refused = store.save_state(&log(name), state).await;
        assert!(
            matches!(refused, Err(StoreError::ForeignState { .. })),
            "{refused:?}"
        );
        assert_eq!(load_state(&store, name).await, None);
    }
}

/// Page `number` of the state at `revision`.
fn page(revision: u64, number: u32) -> StatePage {
    StatePage {
        revision: Revision::new(revision),
        format: 1,
        number,
        payload: format!("page {number} at {revision}").into(),
    }
}

async fn load_page(store: &Arc<dyn Store>, revision: u64, number: u32) -> Option<StatePage> {
    let revision = Revision::new(revision);
    store
        .load_state_page(&log("payments"), revision, 1, number)
        .await
        .expect("it reads")
}

pub(crate) async fn state_is_saved_when_all_its_pages_are<E: Engine>() {
    let engine = E::start().await;
    let store = engine.open().await;
    append(&store, &log("payments"), 0, 9).await;
    let entries = read(&store, &log("payments"), 0).await;
    let state = StateSnapshot {
        revision: Revision::new(5),
        hash: entries[4].hash,
        format: 1,
        payload: b"head".to_vec(),
        pages: 3,
    };
    let of_another = page(4, 1);
    for page in [page(5, 0), page(5, 2), of_another] {
        store
            .save_state_page(&log("payments"), page)
            .await
            .expect("it saves");
    }
    let refused = store.save_state(&log("payments"), state.clone()).await;
    assert!(
        matches!(refused, Err(StoreError::IncompleteState { .. })),
        "{refused:?}"
    );
    assert_eq!(load_state(&store, "payments").await, None);
    let early = StatePage {
        payload: b"an earlier try".to_vec(),
        ..page(5, 1)
    };
    for page in [early, page(5, 1)] {
        store
            .save_state_page(&log("payments"), page)
            .await
            .expect("it saves");
    }
    store
        .save_state(&log("payments"), state.clone())
        .await
        .expect("it is whole");
    assert_eq!(load_state(&store, "payments").await, Some(state));
    for number in 0..3 {
        assert_eq!(load_page(&store, 5, number).await, Some(page(5, number)));
    }
    assert_eq!(load_page(&store, 5, 3).await, None);
    for (name, revision) in [("payments", 10), ("other", 5)] {
        let refused = store.save_state_page(&log(name), page(revision, 0)).await;
        assert!(
            matches!(refused, Err(StoreError::ForeignState { .. })),
            "{refused:?}"
        );
    }
}

pub(crate) async fn pages_of_older_states_are_removed<E: Engine>() {
    const PAGES: u32 = 20;
    let engine = E::start().await;
    let store = engine.open().await;
    append(&store, &log("payments"), 0, 9).await;
    let entries = read(&store, &log("payments"), 0).await;
    // Of an older state, of the newest one, and of one that is being saved.
    for revision in [3, 5, 8] {
        for number in 0..PAGES {
            store
                .save_state_page(&log("payments"), page(revision, number))
                .await
                .expect("it saves");
        }
    }
    let prune = async || {
        let pruned = store.prune_state_pages(&log("payments")).await;
        pruned.expect("it writes")
    };
    assert!(!prune().await, "without a state no page is an old one");
    let state = StateSnapshot {
        revision: Revision::new(5),
        hash: entries[4].hash,
        format: 1,
        payload: Vec::new(),
        pages: PAGES,
    };
    store
        .save_state(&log("payments"), state)
        .await
        .expect("it saves");
    while prune().await {}
    for number in 0..PAGES {
        assert_eq!(load_page(&store, 3, number).await, None);
        for revision in [5, 8] {
            let kept = load_page(&store, revision, number).await;
            assert_eq!(kept, Some(page(revision, number)));
        }
    }
}

pub(crate) async fn presence_is_kept_by_node_and_process<E: Engine>() {
    let engine = E::start().await;
    let store = engine.open().await;
    let row = |node: &str, run_id: &str, millis| PresenceRow {
        node: node.into(),
        run_id: run_id.into(),
        cluster: "gateway".into(),
        version: "0.1.0".into(),
        keyrings: vec!["payments".into(), "quoted \" and, comma".into()],
        last_contact: Timestamp::from_millis(millis),
        complete_until: None,
        gone_at: None,
        serving: None,
    };
    assert_eq!(load_presence(&store).await, []);
    let rows = [
        row("edge-1", "a", 10),
        row("edge-1", "b", 20),
        row("edge-2", "a", 30),
    ];
    store
        .save_presence(vec![rows[2].clone(), rows[0].clone(), rows[1].clone()])
        .await
        .expect("it saves");
    assert_eq!(load_presence(&store).await, rows);

    let mut later = row("edge-1", "b", 21);
    later.cluster = "mesh".into();
    later.version = "0.2.0".into();
    later.keyrings = Vec::new();
    later.serving = Some("{\"stream\":7}".into());
    // The later save wins, whatever a wall clock said of it.
    let earlier = row("edge-2", "a", 29);
    store
        .save_presence(vec![later.clone(), earlier.clone()])
        .await
        .expect("it saves");
    assert_eq!(
        load_presence(&store).await,
        [rows[0].clone(), later.clone(), earlier.clone()]
    );
    // Of two in one call, too.
    later.serving = None;
    let twice = vec![row("edge-1", "b", 40), later.clone()];
    store.save_presence(twice).await.expect("it saves");
    assert_eq!(
        load_presence(&store).await,
        [rows[0].clone(), later.clone(), earlier.clone()]
    );

    let gone = vec![
        rows[0].key(),
        row("edge-9", "a", 0).key(),
        row("edge-2", "b", 0).key(),
    ];
    store.remove_presence(gone).await.expect("it removes");
    assert_eq!(load_presence(&store).await, [later, earlier]);
}

pub(crate) async fn whatever_was_saved_of_presence_last_counts<E: Engine>() {
    let engine = E::start().await;
    let store = engine.open().await;
    let row = |last_contact, complete_until: Option<i64>, gone_at: Option<i64>| PresenceRow {
        node: "edge-1".into(),
        run_id: "a".into(),
        cluster: String::new(),
        version: String::new(),
        keyrings: Vec::new(),
        last_contact: Timestamp::from_millis(last_contact),
        complete_until: complete_until.map(Timestamp::from_millis),
        gone_at: gone_at.map(Timestamp::from_millis),
        serving: None,
    };
    for (saved, expected) in [
        (row(10, None, None), row(10, None, None)),
        (row(11, Some(9), Some(71)), row(11, Some(9), Some(71))),
        // It came back.
        (row(12, Some(8), None), row(12, Some(8), None)),
        (row(13, None, None), row(13, None, None)),
        // By a wall clock that was set back.
        (row(5, Some(12), Some(65)), row(5, Some(12), Some(65))),
    ] {
        store.save_presence(vec![saved]).await.expect("it saves");
        assert_eq!(load_presence(&store).await, [expected]);
    }
}

pub(crate) async fn usage_is_merged_by_maximum<E: Engine>() {
    let engine = E::start().await;
    let store = engine.open().await;
    assert_eq!(load_usage(&store).await, StoredUsage::default());
    let rows = [
        usage(1, "a", 5, Some((10, 20))),
        usage(1, "b", 7, Some((11, 12))),
        usage(2, "a", 1, None),
    ];
    save_usage(&store, &rows).await;
    assert_eq!(load_usage(&store).await.counts, rows);

    let mut other = usage(1, "a", 1, Some((9, 21)));
    other.keyring = "partners".parse().expect("a name");
    let update = [
        usage(1, "a", 4, Some((8, 15))),
        usage(1, "b", 9, None),
        usage(2, "a", 1, Some((30, 31))),
        other.clone(),
    ];
    save_usage(&store, &update).await;
    drop(store);
    let store = engine.open().await;
    let merged = [
        other,
        usage(1, "a", 5, Some((8, 20))),
        usage(1, "b", 9, Some((11, 12))),
        usage(2, "a", 1, Some((30, 31))),
    ];
    assert_eq!(load_usage(&store).await.counts, merged);
}

pub(crate) async fn usage_merges_in_any_order<E: Engine>() {
    let reports = [
        usage(1, "a", 1, Some((10, 10))),
        usage(1, "a", 3, Some((10, 25))),
        usage(1, "a", 6, Some((10, 40))),
    ];
    for order in [
        &[0, 1, 2][..],
        &[2, 1, 0],
        &[1, 2, 0, 2, 1],
        &[2],
        &[0, 2, 0],
    ] {
        let engine = E::start().await;
        let store = engine.open().await;
        for index in order {
            save_usage(&store, std::slice::from_ref(&reports[*index])).await;
        }
        assert_eq!(load_usage(&store).await.counts, [reports[2].clone()]);
    }
}

pub(crate) async fn folded_usage_counts_once<E: Engine>() {
    let engine = E::start().await;
    let store = engine.open().await;
    let rows = [
        usage(1, "a", 6, Some((10, 20))),
        usage(1, "b", 8, Some((9, 12))),
        usage(2, "b", 1, None),
    ];
    save_usage(&store, &rows).await;
    for run_id in ["a", "b", "a", "never seen"] {
        fold(&store, run_id, 100).await;
    }
    let folded = UsageRow::FOLDED;
    let sums = [
        usage(1, folded, 14, Some((9, 20))),
        usage(2, folded, 1, None),
    ];
    assert_eq!(load_usage(&store).await.counts, sums);
    assert_eq!(load_usage(&store).await.folded, ["a", "b", "never seen"]);

    // What comes late of them counts no more, but a use is never forgotten.
    let late = [
        usage(1, "a", 9, Some((8, 30))),
        usage(3, "b", 2, Some((40, 41))),
    ];
    save_usage(&store, &late).await;
    fold(&store, "a", 101).await;
    let sums = [
        usage(1, folded, 14, Some((8, 30))),
        usage(2, folded, 1, None),
        usage(3, folded, 0, Some((40, 41))),
    ];
    assert_eq!(load_usage(&store).await.counts, sums);
}

pub(crate) async fn folded_processes_are_forgotten_after_a_while<E: Engine>() {
    let engine = E::start().await;
    let store = engine.open().await;
    let later = i64::try_from(FOLDED_FOR.as_millis()).expect("a month") + 5;
    fold(&store, "a", 5).await;
    fold(&store, "b", later).await;
    assert_eq!(load_usage(&store).await.folded, ["a", "b"]);
    fold(&store, "b", later + 1).await;
    assert_eq!(load_usage(&store).await.folded, ["b"]);
}

pub(crate) async fn callers_are_replaced_and_removed<E: Engine>() {
    let engine = E::start().await;
    let store = engine.open().await;
    let row = |version, run_id: &str, payload: &[u8]| {
        let UsageRow {
            keyring,
            version,
            run_id,
            ..
        } = usage(version, run_id, 0, None);
        let payload = payload.to_vec();
        CallersRow {
            keyring,
            version,
            run_id,
            payload,
        }
    };
    let save = async |rows: Vec<CallersRow>| store.save_callers(rows).await.expect("it saves");
    save(vec![
        row(1, "a", b"1"),
        row(1, "b", b"2"),
        row(2, "a", b"3"),
    ])
    .await;
    save(vec![
        row(1, "a", b"\0new"),
        row(1, "b", b""),
        row(9, "a", b""),
    ])
    .await;
    let kept = [row(1, "a", b"\0new"), row(2, "a", b"3")];
    assert_eq!(load_usage(&store).await.callers, kept);
}

pub(crate) async fn epochs_differ_and_rotate<E: Engine>() {
    let engine = E::start().await;
    let store = engine.open().await;
    let other = append(&store, &log("other"), 0, 1).await;
    let first = append(&store, &log("payments"), 0, 1).await;
    assert_ne!(first.epoch, other.epoch);
    let second = append(&store, &log("payments"), 1, 1).await;
    assert_eq!(second.epoch, first.epoch, "an append changed the epoch");

    let rotated = store
        .rotate_epoch(&log("payments"))
        .await
        .expect("it rotates");

    assert_ne!(rotated.epoch, first.epoch);
    assert_ne!(rotated.epoch, Epoch::default());
    assert_eq!(
        (rotated.revision, rotated.hash),
        (second.revision, second.hash)
    );
    assert_eq!(heads(&store).await, [other, rotated.clone()]);
    let third = append(&store, &log("payments"), 2, 1).await;
    assert_eq!(third.epoch, rotated.epoch);
    let absent = store.rotate_epoch(&log("absent")).await;
    assert!(
        matches!(absent, Err(StoreError::UnknownLog { .. })),
        "{absent:?}"
    );
}

pub(crate) async fn long_pages_end_early<E: Engine>() {
    let engine = E::start().await;
    let store = engine.open().await;
    let payload = |number: usize| {
        let byte = u8::try_from(number).expect("a small number");
        vec![byte; MAX_ENTRY_LEN - 64]
    };
    let mut long = entries(12);
    for (number, entry) in long.iter_mut().enumerate() {
        entry.payload = payload(number);
    }
    store
        .append(&log("payments"), Revision::default(), long)
        .await
        .expect("it appends");

    let page = store
        .read(&log("payments"), Revision::default(), MAX_PAGE)
        .await
        .expect("it reads");

    let len: usize = page.iter().map(|entry| entry.payload.len()).sum();
    assert!(
        (2..12).contains(&page.len()),
        "a page of {} entries",
        page.len()
    );
    assert!(len < MAX_PAGE_LEN + MAX_ENTRY_LEN, "a page of {len} bytes");
    let all = read(&store, &log("payments"), 0).await;
    assert_eq!(revisions(&all), (1..=12).collect::<Vec<_>>());
    assert!(
        all.iter()
            .enumerate()
            .all(|(number, entry)| entry.payload == payload(number))
    );
}

pub(crate) async fn long_log_is_read_in_pages<E: Engine>() {
    let engine = E::start().await;
    let store = engine.open().await;
    append(&store, &log("payments"), 0, 2 * MAX_PAGE + 500).await;
    append(&store, &log("aside"), 0, 10).await;
    let mut after = Revision::default();
    for len in [MAX_PAGE, MAX_PAGE, 500, 0] {
        let page = store
            .read(&log("payments"), after, usize::MAX)
            .await
            .expect("it reads");
        let expected: Vec<_> = (after.get() + 1..=after.get() + len as u64).collect();
        assert_eq!(revisions(&page), expected);
        after = page.last().map_or(after, |entry| entry.revision);
    }
}

pub(crate) async fn reopened_store_has_everything<E: Engine>() {
    let engine = E::start().await;
    let store = engine.open().await;
    let head = append(&store, &log("payments"), 0, 3).await;
    let state = StateSnapshot {
        revision: head.revision,
        hash: head.hash,
        format: 1,
        payload: b"state".to_vec(),
        pages: 0,
    };
    store
        .save_state(&log("payments"), state.clone())
        .await
        .expect("it saves");
    let row = PresenceRow {
        node: "edge-1".into(),
        run_id: "a".into(),
        cluster: String::new(),
        version: "0.1.0".into(),
        keyrings: vec!["payments".into()],
        last_contact: Timestamp::from_millis(1),
        complete_until: Some(Timestamp::from_millis(2)),
        gone_at: Some(Timestamp::from_millis(3)),
        serving: Some("{\"stream\":7}".into()),
    };
    store
        .save_presence(vec![row.clone()])
        .await
        .expect("it saves");
    let before = read(&store, &log("payments"), 0).await;
    drop(store);

    let store = engine.open().await;

    assert_eq!(heads(&store).await, [head]);
    assert_eq!(read(&store, &log("payments"), 0).await, before);
    assert_eq!(load_state(&store, "payments").await, Some(state));
    assert_eq!(load_presence(&store).await, [row]);
    append(&store, &log("payments"), 3, 1).await;
}

pub(crate) async fn ping_succeeds<E: Engine>() {
    let engine = E::start().await;
    let store = engine.open().await;
    store.ping().await.expect("an empty store answers");
    append(&store, &log("payments"), 0, 1).await;
    store.ping().await.expect("a store answers");
}

/// The log of keyring `name`.
pub(crate) fn log(name: &str) -> LogName {
    LogName::Keyring(name.parse().expect("a valid name"))
}

/// `count` entries that differ.
pub(crate) fn entries(count: usize) -> Vec<NewEntry> {
    (0..count)
        .map(|number| NewEntry {
            at: Timestamp::from_millis(1_798_761_600_000),
            actor: format!("actor-{number}"),
            kind: "key_created".into(),
            payload: format!(r#"{{"number":{number}}}"#).into(),
        })
        .collect()
}

/// Appends `count` entries behind revision `expected`, which must be the head.
pub(crate) async fn append(
    store: &Arc<dyn Store>,
    log: &LogName,
    expected: u64,
    count: usize,
) -> Head {
    store
        .append(log, Revision::new(expected), entries(count))
        .await
        .expect("the head is the expected one")
}

/// All entries behind revision `after`.
pub(crate) async fn read(store: &Arc<dyn Store>, log: &LogName, after: u64) -> Vec<LogEntry> {
    let mut entries = Vec::new();
    let mut after = Revision::new(after);
    loop {
        let page = store.read(log, after, MAX_PAGE).await.expect("it reads");
        let Some(last) = page.last() else {
            return entries;
        };
        after = last.revision;
        entries.extend(page);
    }
}

async fn conflict(store: &Arc<dyn Store>, log: &LogName, expected: u64, count: usize) -> Head {
    match store
        .append(log, Revision::new(expected), entries(count))
        .await
    {
        Err(AppendError::Conflict {
            expected: named,
            head,
        }) => {
            assert_eq!(named, Revision::new(expected));
            head
        }
        other => panic!("no conflict: {other:?}"),
    }
}

/// Appends one entry of `actor` as the control plane does: at the head, again after every conflict.
async fn append_until_won(store: &Arc<dyn Store>, actor: String) -> u64 {
    let name = log("payments");
    let mut expected = Revision::default();
    loop {
        let mut entry = entries(1);
        entry[0].actor.clone_from(&actor);
        match store.append(&name, expected, entry).await {
            Ok(head) => {
                assert_eq!(head.revision, expected.next(), "appended elsewhere");
                return head.revision.get();
            }
            Err(AppendError::Conflict { head, .. }) => expected = head.revision,
            Err(error) => panic!("the append failed: {error}"),
        }
    }
}

/// What a reader sees that asks for what lies behind the last entry that it saw, up to revision `end`.
async fn tail(store: Arc<dyn Store>, end: u64) -> Vec<LogEntry> {
    let mut seen: Vec<LogEntry> = Vec::new();
    let mut after = Revision::default();
    while after.get() < end {
        let page = store
            .read(&log("payments"), after, 3)
            .await
            .expect("it reads");
        after = page.last().map_or(after, |entry| entry.revision);
        seen.extend(page);
    }
    seen
}

async fn heads(store: &Arc<dyn Store>) -> Vec<Head> {
    store.heads().await.expect("it reads")
}

async fn load_state(store: &Arc<dyn Store>, name: &str) -> Option<StateSnapshot> {
    store.load_state(&log(name)).await.expect("it reads")
}

async fn load_presence(store: &Arc<dyn Store>) -> Vec<PresenceRow> {
    store.load_presence().await.expect("it reads")
}

fn usage(version: u32, run_id: &str, requests: u64, used: Option<(i64, i64)>) -> UsageRow {
    UsageRow {
        keyring: "payments".parse().expect("a name"),
        version: VersionRef {
            key_id: "7Qm2Xc91TbKe".parse().expect("a key id"),
            version: VersionNumber::new(version).expect("not zero"),
        },
        run_id: run_id.to_owned(),
        requests,
        denied: requests / 2,
        first_used: used.map(|(first, _)| Timestamp::from_millis(first)),
        last_used: used.map(|(_, last)| Timestamp::from_millis(last)),
    }
}

async fn save_usage(store: &Arc<dyn Store>, rows: &[UsageRow]) {
    store.save_usage(rows.to_vec()).await.expect("it saves");
}

async fn fold(store: &Arc<dyn Store>, run_id: &str, now: i64) {
    let now = Timestamp::from_millis(now);
    store.fold_usage(run_id, now).await.expect("it folds");
}

/// What is kept, in an order of its own.
async fn load_usage(store: &Arc<dyn Store>) -> StoredUsage {
    let mut usage = store.load_usage().await.expect("it reads");
    usage
        .counts
        .sort_by_key(|row| (row.keyring.clone(), row.version, row.run_id.clone()));
    usage
        .callers
        .sort_by_key(|row| (row.keyring.clone(), row.version, row.run_id.clone()));
    usage.folded.sort();
    usage
}

fn revisions(entries: &[LogEntry]) -> Vec<u64> {
    entries.iter().map(|entry| entry.revision.get()).collect()
}

pub(crate) async fn within_deadline<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, work)
        .await
        .expect("it ends before the deadline")
}
