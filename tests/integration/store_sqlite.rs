//! The store on SQLite: the contract, logs that were tampered with, and files that cannot be used.

use std::{
    fs,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use relatch::{
    key::{Revision, Timestamp},
    store::{
        AppendError, PresenceRow, SqliteOptions, SqliteStore, Store, StoreError,
        chain::{self, Problem, Verdict},
    },
};
use rusqlite::Connection;
use tempfile::TempDir;

use crate::store_contract::{self, Engine, append, entries, log, read};

store_contract::store_contract!(Sqlite);

/// A database in a directory of its own.
struct Sqlite {
    directory: TempDir,
}

impl Engine for Sqlite {
    async fn start() -> Self {
        let directory = tempfile::tempdir().expect("a temporary directory");
        Self { directory }
    }

    async fn open(&self) -> Arc<dyn Store> {
        let store = SqliteStore::open(&self.path(), creating()).await;
        Arc::new(store.expect("it opens"))
    }
}

impl Sqlite {
    fn path(&self) -> PathBuf {
        self.directory.path().join("relatch.db")
    }

    /// A database whose log `payments` has `count` entries, closed again.
    async fn with_entries(count: usize) -> Self {
        let engine = Self::start().await;
        append(&engine.open().await, &log("payments"), 0, count).await;
        engine
    }

    /// Runs `sql` as somebody who may write to the file and removed what stands against accidents.
    fn tamper(&self, sql: &str) {
        let connection = Connection::open(self.path()).expect("it opens");
        connection
            .execute_batch(
                "DROP TRIGGER entries_are_never_updated; DROP TRIGGER entries_are_never_deleted;",
            )
            .expect("the triggers are there");
        connection
            .execute_batch(sql)
            .expect("it can be tampered with");
    }

    async fn verify(&self) -> Verdict {
        let store = self.open().await;
        chain::verify(&*store, &log("payments"))
            .await
            .expect("it reads")
    }

    async fn open_error(&self) -> StoreError {
        match SqliteStore::open(&self.path(), options()).await {
            Err(error) => error,
            Ok(store) => panic!("it opened: {store:?}"),
        }
    }

    /// Opens a file that must be refused and left as it is.
    async fn refusal(&self) -> StoreError {
        let before = fs::read(self.path()).expect("it reads");
        let error = self.open_error().await;
        let with_create = SqliteStore::open(&self.path(), creating()).await;
        assert!(with_create.is_err(), "it opened where it may be made");
        assert!(
            fs::read(self.path()).expect("it reads") == before,
            "it was changed"
        );
        error
    }
}

#[tokio::test]
async fn edited_payload_is_named() {
    let engine = Sqlite::with_entries(12).await;
    engine
        .tamper("UPDATE entries SET payload = CAST('{\"number\":99}' AS BLOB) WHERE revision = 9");
    let verdict = engine.verify().await;
    assert_eq!(verdict.entries, 8);
    let problem = verdict.problem.expect("a problem");
    assert_eq!(
        problem,
        Problem::Edited {
            revision: Revision::new(9)
        }
    );
    assert!(
        problem.to_string().starts_with("revision 9 was edited"),
        "{problem}"
    );
}

#[tokio::test]
async fn every_edited_column_is_named() {
    for edit in [
        "at = at + 1",
        "actor = 'mallory'",
        "kind = 'key_removed'",
        "payload = X'00'",
        "prev_hash = zeroblob(32)",
        "hash = zeroblob(32)",
    ] {
        let engine = Sqlite::with_entries(5).await;
        engine.tamper(&format!("UPDATE entries SET {edit} WHERE revision = 3"));
        let verdict = engine.verify().await;
        assert_eq!(verdict.entries, 2, "{edit}: {:?}", verdict.problem);
        assert!(verdict.problem.is_some(), "{edit} went unseen");
    }
}

#[tokio::test]
async fn swapped_pair_is_named() {
    let engine = Sqlite::with_entries(12).await;
    engine.tamper(
        "UPDATE entries SET revision = 1000 WHERE revision = 4;
         UPDATE entries SET revision = 4 WHERE revision = 5;
         UPDATE entries SET revision = 5 WHERE revision = 1000;",
    );
    let verdict = engine.verify().await;
    assert_eq!(verdict.entries, 3);
    let problem = verdict.problem.expect("a problem");
    assert!(
        matches!(problem, Problem::Unchained { revision, .. } if revision == Revision::new(4)),
        "{problem}"
    );
}

#[tokio::test]
async fn deleted_middle_is_named() {
    let engine = Sqlite::with_entries(12).await;
    engine.tamper("DELETE FROM entries WHERE revision BETWEEN 6 AND 7");
    let verdict = engine.verify().await;
    assert_eq!(verdict.entries, 5);
    let (after, next) = (Revision::new(5), Revision::new(8));
    assert_eq!(verdict.problem, Some(Problem::Gap { after, next }));
}

#[tokio::test]
async fn deleted_middle_with_closed_ranks_is_named() {
    let engine = Sqlite::with_entries(12).await;
    engine.tamper(
        "DELETE FROM entries WHERE revision = 6;
         UPDATE entries SET revision = revision - 1 WHERE revision = 7;
         UPDATE logs SET revision = 6; DELETE FROM entries WHERE revision > 6;",
    );
    let problem = engine.verify().await.problem.expect("a problem");
    assert!(
        matches!(problem, Problem::Unchained { revision, .. } if revision == Revision::new(6)),
        "{problem}"
    );
}

#[tokio::test]
async fn cut_tail_is_named() {
    let engine = Sqlite::with_entries(17).await;
    engine.tamper("DELETE FROM entries WHERE revision > 15");
    let verdict = engine.verify().await;
    assert_eq!(verdict.entries, 15);
    let problem = verdict.problem.expect("a problem");
    assert_eq!(
        problem.to_string(),
        "cut: the head says revision 17, but the log ends at revision 15"
    );
}

#[tokio::test]
async fn log_cut_to_nothing_is_named() {
    let engine = Sqlite::with_entries(3).await;
    engine.tamper("DELETE FROM entries");
    let (end, head) = (Revision::default(), Revision::new(3));
    assert_eq!(
        engine.verify().await.problem,
        Some(Problem::Cut { end, head })
    );
}

#[tokio::test]
async fn head_moved_back_is_named() {
    let engine = Sqlite::with_entries(5).await;
    engine.tamper(
        "UPDATE logs SET revision = 4, hash = (SELECT hash FROM entries WHERE revision = 4)",
    );
    let (head, found) = (Revision::new(4), Revision::new(5));
    assert_eq!(
        engine.verify().await.problem,
        Some(Problem::Overhang { head, found })
    );
}

#[tokio::test]
async fn replaced_last_entry_is_named() {
    let engine = Sqlite::with_entries(3).await;
    let store = engine.open().await;
    let last = read(&store, &log("payments"), 2).await.remove(0);
    let other = Sqlite::with_entries(2).await;
    let forged_store = other.open().await;
    let mut forged = entries(1);
    forged[0].actor = "mallory".into();
    let head = forged_store
        .append(&log("payments"), Revision::new(2), forged)
        .await
        .expect("it appends");
    engine.tamper(&format!(
        "UPDATE entries SET actor = 'mallory', payload = CAST('{{\"number\":0}}' AS BLOB), hash = X'{}' WHERE revision = 3",
        head.hash
    ));
    let problem = engine.verify().await.problem.expect("a problem");
    assert_eq!(
        problem,
        Problem::OtherHead {
            revision: Revision::new(3),
            found: head.hash,
            head: last.hash,
        }
    );
}

#[tokio::test]
async fn accidental_edit_is_refused_by_the_database() {
    let engine = Sqlite::with_entries(2).await;
    let connection = Connection::open(engine.path()).expect("it opens");
    for sql in ["UPDATE entries SET actor = 'x'", "DELETE FROM entries"] {
        let error = connection.execute_batch(sql).expect_err("it is refused");
        assert!(error.to_string().contains("never"), "{error}");
    }
    assert_eq!(engine.verify().await.problem, None);
}

#[tokio::test]
async fn new_database_is_readable_by_its_owner_only() {
    let engine = Sqlite::start().await;
    let _store = engine.open().await;
    for file in files(engine.directory.path()) {
        let mode = fs::metadata(&file)
            .expect("it is there")
            .permissions()
            .mode();
        assert_eq!(mode & 0o777, 0o600, "{}", file.display());
    }
    let names: Vec<_> = files(engine.directory.path());
    assert!(
        names
            .iter()
            .all(|file| !file.to_string_lossy().contains(".new-")),
        "{names:?}"
    );
}

#[tokio::test]
async fn orderly_close_leaves_one_file() {
    let engine = Sqlite::with_entries(3).await;
    assert_eq!(files(engine.directory.path()), [engine.path()]);
}

#[tokio::test]
async fn two_processes_may_make_the_same_database() {
    let engine = Sqlite::start().await;
    let path = engine.path();
    let opened = tokio::join!(
        SqliteStore::open(&path, creating()),
        SqliteStore::open(&path, creating()),
        SqliteStore::open(&path, creating()),
    );
    let stores: [Arc<dyn Store>; 3] = [opened.0, opened.1, opened.2]
        .map(|store| -> Arc<dyn Store> { Arc::new(store.expect("it opens")) });
    for (revision, store) in (0..).zip(&stores) {
        append(store, &log("payments"), revision, 1).await;
    }
}

#[tokio::test]
async fn missing_database_is_not_made_unasked() {
    let engine = Sqlite::start().await;
    let error = engine.open_error().await;
    assert!(matches!(error, StoreError::Missing { .. }), "{error:?}");
    assert!(
        error.to_string().contains("relatch control init"),
        "{error}"
    );
    assert_eq!(files(engine.directory.path()), Vec::<PathBuf>::new());
}

#[tokio::test]
async fn missing_directory_is_not_made() {
    let engine = Sqlite::start().await;
    let path = engine.directory.path().join("absent/relatch.db");
    let error = SqliteStore::open(&path, creating())
        .await
        .expect_err("it is refused");
    assert!(matches!(error, StoreError::CannotOpen { .. }), "{error:?}");
}

#[tokio::test]
async fn lost_database_is_not_begun_anew_over_its_changes() {
    let engine = Sqlite::start().await;
    let store = engine.open().await;
    append(&store, &log("payments"), 0, 3).await;
    let aside = engine.directory.path().join("aside.db");
    fs::rename(engine.path(), &aside).expect("it moves");
    for create in [true, false] {
        let options = SqliteOptions {
            create,
            ..options()
        };
        let error = SqliteStore::open(&engine.path(), options)
            .await
            .expect_err("it is refused");
        assert!(matches!(error, StoreError::Orphaned { .. }), "{error:?}");
    }
    fs::rename(&aside, engine.path()).expect("it moves back");
    assert_eq!(
        read(&engine.open().await, &log("payments"), 0).await.len(),
        3
    );
}

#[tokio::test]
async fn database_removed_while_open_is_noticed() {
    let engine = Sqlite::start().await;
    let store = engine.open().await;
    append(&store, &log("payments"), 0, 1).await;
    let aside = engine.directory.path().join("aside.db");
    fs::rename(engine.path(), &aside).expect("it moves");
    let error = store.ping().await.expect_err("it is noticed");
    assert!(matches!(error, StoreError::Replaced { .. }), "{error:?}");
    fs::copy(&aside, engine.path()).expect("it copies");
    let lost = store
        .append(&log("payments"), Revision::new(1), entries(1))
        .await;
    assert!(
        matches!(lost, Err(AppendError::Store(StoreError::Replaced { .. }))),
        "{lost:?}"
    );
    fs::rename(&aside, engine.path()).expect("it moves back");
    append(&store, &log("payments"), 1, 1).await;
}

#[tokio::test]
async fn file_that_is_no_database_is_left_alone() {
    let engine = Sqlite::start().await;
    for content in [&b"node: { id: edge-1 }\n"[..], &[b'x'; 8192], b""] {
        fs::write(engine.path(), content).expect("it writes");
        let error = engine.refusal().await;
        assert!(matches!(error, StoreError::NotRelatch { .. }), "{error:?}");
    }
}

#[tokio::test]
async fn directory_is_no_database() {
    let engine = Sqlite::start().await;
    fs::create_dir(engine.path()).expect("it is made");
    let error = engine.open_error().await;
    assert!(matches!(error, StoreError::NotRelatch { .. }), "{error:?}");
}

#[tokio::test]
async fn database_of_another_program_is_left_alone() {
    let engine = Sqlite::start().await;
    let connection = Connection::open(engine.path()).expect("it opens");
    connection
        .execute_batch("CREATE TABLE logs (name TEXT)")
        .expect("it is made");
    drop(connection);
    let error = engine.refusal().await;
    assert!(matches!(error, StoreError::NotRelatch { .. }), "{error:?}");
}

#[tokio::test]
async fn newer_schema_names_both_versions() {
    let engine = Sqlite::with_entries(3).await;
    engine.tamper("PRAGMA user_version = 7");
    let error = engine.refusal().await;
    let message = error.to_string();
    assert!(
        matches!(
            error,
            StoreError::NewerSchema {
                found: 7,
                supported: 4,
                ..
            }
        ),
        "{error:?}"
    );
    assert!(
        message.contains("version 7") && message.contains("version 4"),
        "{message}"
    );
    assert!(message.contains("upgrade relatch"), "{message}");
}

/// What version 1 made, and a sidecar that it knew.
const VERSION_1: &str = "
    CREATE TABLE logs (
        name TEXT PRIMARY KEY, epoch INTEGER NOT NULL CHECK (epoch > 0),
        revision INTEGER NOT NULL CHECK (revision > 0), hash BLOB NOT NULL CHECK (length(hash) = 32)
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE entries (
        log TEXT NOT NULL REFERENCES logs (name), revision INTEGER NOT NULL CHECK (revision > 0),
        at INTEGER NOT NULL, actor TEXT NOT NULL, kind TEXT NOT NULL, payload BLOB NOT NULL,
        prev_hash BLOB NOT NULL CHECK (length(prev_hash) = 32),
        hash BLOB NOT NULL CHECK (length(hash) = 32), PRIMARY KEY (log, revision)
    ) STRICT, WITHOUT ROWID;
    CREATE TRIGGER entries_are_never_updated BEFORE UPDATE ON entries
    BEGIN SELECT RAISE(ABORT, 'entries of a log are never updated'); END;
    CREATE TRIGGER entries_are_never_deleted BEFORE DELETE ON entries
    BEGIN SELECT RAISE(ABORT, 'entries of a log are never deleted'); END;
    CREATE TABLE states (
        log TEXT PRIMARY KEY REFERENCES logs (name), revision INTEGER NOT NULL CHECK (revision > 0),
        hash BLOB NOT NULL CHECK (length(hash) = 32), format INTEGER NOT NULL CHECK (format >= 0),
        payload BLOB NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE TABLE presence (
        node TEXT NOT NULL, boot_id TEXT NOT NULL, cluster TEXT NOT NULL, version TEXT NOT NULL,
        keyrings TEXT NOT NULL CHECK (json_valid(keyrings)), last_contact INTEGER NOT NULL,
        PRIMARY KEY (node, boot_id)
    ) STRICT, WITHOUT ROWID;
    INSERT INTO presence VALUES ('edge-1', 'a', 'mesh', '0.1.0', '[\"payments\"]', 7);
    PRAGMA application_id = 1919705960;
    PRAGMA user_version = 1;
";

/// Makes a database of version 1 with the entries that this version would write.
async fn database_of_version_1() -> Sqlite {
    let engine = Sqlite::with_entries(3).await;
    let old = engine.path().with_extension("old");
    let connection = Connection::open(&old).expect("it opens");
    connection.execute_batch(VERSION_1).expect("version 1");
    let new = engine.path();
    connection
        .execute("ATTACH ?1 AS new", [new.to_str().expect("a text")])
        .expect("it attaches");
    connection
        .execute_batch(
            "INSERT INTO logs SELECT * FROM new.logs;
             INSERT INTO entries SELECT * FROM new.entries;
             DETACH new;",
        )
        .expect("it copies");
    drop(connection);
    for suffix in ["-wal", "-shm"] {
        let mut beside = new.clone().into_os_string();
        beside.push(suffix);
        drop(fs::remove_file(beside));
    }
    fs::rename(old, new).expect("it moves");
    engine
}

#[tokio::test]
async fn database_of_version_1_is_upgraded_in_place() {
    let engine = database_of_version_1().await;
    let presence = |gone_at| PresenceRow {
        node: "edge-1".to_owned(),
        run_id: "a".to_owned(),
        cluster: "mesh".to_owned(),
        version: "0.1.0".to_owned(),
        keyrings: vec!["payments".to_owned()],
        last_contact: Timestamp::from_millis(7),
        complete_until: None,
        gone_at,
        serving: None,
    };
    let gone_at = Some(Timestamp::from_millis(9));
    for (found, folded) in [(None, vec![]), (gone_at, vec!["a".to_owned()])] {
        let store = engine.open().await;
        let rows = store.load_presence().await.expect("it reads");
        assert_eq!(rows, [presence(found)]);
        let usage = store.load_usage().await.expect("it reads");
        assert_eq!(usage.folded, folded);
        let gone = vec![presence(gone_at)];
        store.save_presence(gone).await.expect("it saves");
        let now = Timestamp::from_millis(1);
        store.fold_usage("a", now).await.expect("it folds");
    }
    let verdict = engine.verify().await;
    assert_eq!((verdict.entries, verdict.problem), (3, None));
}

#[tokio::test]
async fn upgrade_that_fails_changes_nothing() {
    let engine = database_of_version_1().await;
    // The last step of the upgrade then fails.
    engine.tamper("ALTER TABLE presence ADD COLUMN gone_at INTEGER");
    engine.open_error().await;
    let connection = Connection::open(engine.path()).expect("it opens");
    let count = |query| {
        connection
            .query_row(query, [], |row| row.get::<_, u32>(0))
            .expect(query)
    };
    assert_eq!(
        count("SELECT count(*) FROM sqlite_schema WHERE name = 'usage'"),
        0
    );
    assert_eq!(count("PRAGMA user_version"), 1);
}

#[tokio::test]
async fn truncated_database_is_corrupt() {
    let engine = Sqlite::with_entries(500).await;
    let whole = fs::read(engine.path()).expect("it reads");
    for len in [whole.len() / 2, whole.len() - 4096, 4096, 4096 + 100, 50] {
        fs::write(engine.path(), &whole[..len]).expect("it writes");
        let error = engine.refusal().await;
        assert!(
            matches!(error, StoreError::Corrupt { .. }),
            "{len}: {error:?}"
        );
        assert!(
            error.to_string().contains("restore the last backup"),
            "{error}"
        );
    }
}

#[tokio::test]
async fn flipped_bytes_are_found_at_open() {
    let engine = Sqlite::with_entries(500).await;
    let mut bytes = fs::read(engine.path()).expect("it reads");
    // The header of each page behind the first: its kind, and how many cells it has.
    for page in bytes.chunks_mut(4096).skip(1) {
        for byte in &mut page[..8] {
            *byte ^= 0xff;
        }
    }
    fs::write(engine.path(), bytes).expect("it writes");
    let error = engine.refusal().await;
    assert!(matches!(error, StoreError::Corrupt { .. }), "{error:?}");
}

#[tokio::test]
async fn flipped_byte_of_a_payload_is_found_by_the_chain() {
    let engine = Sqlite::with_entries(20).await;
    let mut bytes = fs::read(engine.path()).expect("it reads");
    let needle = br#"{"number":12}"#;
    let at = bytes
        .windows(needle.len())
        .position(|window| window == needle)
        .expect("the payload is in the file");
    bytes[at + 10] ^= 1;
    fs::write(engine.path(), bytes).expect("it writes");
    let problem = engine.verify().await.problem;
    assert_eq!(
        problem,
        Some(Problem::Edited {
            revision: Revision::new(13)
        })
    );
}

#[tokio::test]
async fn locked_database_is_an_error_after_the_timeout() {
    let engine = Sqlite::with_entries(1).await;
    let store = SqliteStore::open(&engine.path(), options())
        .await
        .expect("it opens");
    let other = Connection::open(engine.path()).expect("it opens");
    other.execute_batch("BEGIN EXCLUSIVE").expect("it locks");
    let locked = store
        .append(&log("payments"), Revision::new(1), entries(1))
        .await;
    match locked {
        Err(AppendError::Store(StoreError::Locked { waited, .. })) => {
            assert_eq!(waited, options().busy_timeout);
        }
        other => panic!("not locked: {other:?}"),
    }
    store.ping().await.expect("reads go on");
    other.execute_batch("ROLLBACK").expect("it unlocks");
    store
        .append(&log("payments"), Revision::new(1), entries(1))
        .await
        .expect("it appends once the lock is gone");
}

#[tokio::test]
async fn database_held_exclusively_cannot_be_opened() {
    let engine = Sqlite::with_entries(1).await;
    let other = Connection::open(engine.path()).expect("it opens");
    other
        .execute_batch("PRAGMA locking_mode = EXCLUSIVE; BEGIN EXCLUSIVE; COMMIT;")
        .expect("it locks");
    let error = engine.open_error().await;
    assert!(matches!(error, StoreError::Locked { .. }), "{error:?}");
    assert!(
        error
            .to_string()
            .contains("locked by another process for 50ms"),
        "{error}"
    );
    drop(other);
    assert_eq!(engine.verify().await.problem, None);
}

/// Where permission bits do not bind, a directory in the place of the file says no all the same.
#[tokio::test]
async fn write_ahead_log_that_cannot_be_opened_is_an_error() {
    let engine = Sqlite::with_entries(1).await;
    fs::create_dir(engine.directory.path().join("relatch.db-wal")).expect("it is made");
    let error = engine.refusal().await;
    assert!(matches!(error, StoreError::CannotOpen { .. }), "{error:?}");
}

#[tokio::test]
async fn row_that_breaks_the_rules_is_corrupt() {
    let engine = Sqlite::with_entries(1).await;
    engine.tamper("UPDATE entries SET at = -5");
    let store = engine.open().await;
    let error = store
        .read(&log("payments"), Revision::default(), 1)
        .await
        .expect_err("it is refused");
    assert!(matches!(error, StoreError::Corrupt { .. }), "{error:?}");
}

fn options() -> SqliteOptions {
    SqliteOptions {
        create: false,
        busy_timeout: Duration::from_millis(50),
    }
}

/// Options for a database that is made if need be, and shared by many writers.
fn creating() -> SqliteOptions {
    SqliteOptions {
        create: true,
        ..SqliteOptions::default()
    }
}

fn files(directory: &Path) -> Vec<PathBuf> {
    let mut files: Vec<_> = fs::read_dir(directory)
        .expect("it reads")
        .map(|file| file.expect("it reads").path())
        .collect();
    files.sort();
    files
}
