//! Inspects a database from outside.
//!
//! SQLite would create files beside the database and lock it. [`look`] therefore reads only the
//! header, so that a control plane may use the database meanwhile, and [`at_rest`] reads entries
//! only while no process uses it.

use std::{
    fmt::Write as _,
    fs::{self, File},
    io::{self, Read as _},
    os::unix::{ffi::OsStrExt as _, fs::MetadataExt as _},
    path::Path,
};

use rusqlite::{Connection, OpenFlags};
use rustix::fs::{Access, AtFlags, CWD};

use super::{
    place::{DatabasePlace, Fault},
    schema,
};
use crate::store::{LogName, StoreError};

/// The length of the header of a database file (<https://www.sqlite.org/fileformat.html>, section
/// 1.3).
const HEADER_LEN: usize = 100;
const MAGIC: &[u8] = b"SQLite format 3\0";
const USER_VERSION_AT: usize = 60;
const APPLICATION_ID_AT: usize = 68;

/// The content of a database about one kind of entries, while no process uses it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct AtRest {
    /// The payloads of the entries of that kind, in the order of their revisions.
    pub(crate) payloads: Vec<Vec<u8>>,
    /// Whether any log has an entry.
    pub(crate) has_entries: bool,
}

/// Reads entries of one kind from a database that no process uses, without a lock and without a
/// file beside it: a flag promises SQLite that the file does not change. Returns none if a journal
/// beside the database contains a part of it, or if the file did change. The caller must check,
/// before and after, whether a process owns the database.
pub(super) fn at_rest(
    place: &DatabasePlace,
    log: &LogName,
    kind: &str,
) -> Result<Option<AtRest>, StoreError> {
    let Some(before) = resting(place)? else {
        return Ok(None);
    };
    let read = read(place, log, kind).map_err(|fault| place.explain(fault));
    if resting(place)? == Some(before) {
        read.map(Some)
    } else {
        Ok(None)
    }
}

/// Returns values that a write to the file changes; none if the file is not the whole database.
fn resting(place: &DatabasePlace) -> Result<Option<(u64, u64, i64, i64)>, StoreError> {
    for suffix in ["-wal", "-journal"] {
        match fs::metadata(place.beside(suffix)) {
            Ok(metadata) if metadata.len() == 0 => {}
            Ok(_) => return Ok(None),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(place.cannot_open(error)),
        }
    }
    let file = fs::metadata(place.path()).map_err(|error| place.cannot_open(error))?;
    Ok(Some((
        file.ino(),
        file.len(),
        file.mtime(),
        file.mtime_nsec(),
    )))
}

fn read(place: &DatabasePlace, log: &LogName, kind: &str) -> Result<AtRest, Fault> {
    let flags = OpenFlags::SQLITE_OPEN_READ_ONLY
        | OpenFlags::SQLITE_OPEN_URI
        | OpenFlags::SQLITE_OPEN_NO_MUTEX;
    let connection = Connection::open_with_flags(immutable(place.path()), flags)?;
    // A file from elsewhere may contain triggers and views; they cannot call functions with side
    // effects.
    connection.pragma_update(None, "trusted_schema", false)?;
    let has_entries =
        connection.query_row("SELECT EXISTS (SELECT 1 FROM logs)", [], |row| row.get(0))?;
    let mut statement = connection
        .prepare("SELECT payload FROM entries WHERE log = ?1 AND kind = ?2 ORDER BY revision")?;
    let payloads = statement.query_map([log.as_str(), kind], |row| row.get(0))?;
    Ok(AtRest {
        payloads: payloads.collect::<rusqlite::Result<_>>()?,
        has_entries,
    })
}

/// Returns the URI of a file that does not change (<https://www.sqlite.org/uri.html>). Each byte
/// that may have a meaning in a URI is escaped.
fn immutable(path: &Path) -> String {
    let mut uri = String::from("file:");
    for &byte in path.as_os_str().as_bytes() {
        if byte.is_ascii_alphanumeric() || b"/._-".contains(&byte) {
            uri.push(char::from(byte));
        } else {
            let _ = write!(uri, "%{byte:02x}");
        }
    }
    uri.push_str("?immutable=1");
    uri
}

/// Finds reasons for which an open would refuse the database, as far as they show from outside: it
/// is missing, is another file, is of a later version, or is not writable. Damage deeper in the
/// file does not show.
pub(super) fn look(place: &DatabasePlace) -> Result<(), StoreError> {
    match fs::metadata(place.path()) {
        Ok(metadata) if metadata.is_dir() => {
            return Err(StoreError::NotRelatch {
                store: place.name(),
                found: "a directory".into(),
            });
        }
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(place.missing()),
        Err(error) => return Err(place.cannot_open(error)),
    }
    let header = File::open(place.path())
        .and_then(|file| {
            let mut header = Vec::with_capacity(HEADER_LEN);
            file.take(HEADER_LEN as u64).read_to_end(&mut header)?;
            Ok(header)
        })
        .map_err(|error| place.cannot_open(error))?;
    check_header(&header, place)?;
    let directory = match place.path().parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        Some(_) | None => Path::new("."),
    };
    let is_writable =
        |path: &Path, access| rustix::fs::accessat(CWD, path, access, AtFlags::EACCESS).is_ok();
    let file_access = Access::READ_OK | Access::WRITE_OK;
    let directory_access = Access::WRITE_OK | Access::EXEC_OK;
    if is_writable(place.path(), file_access) && is_writable(directory, directory_access) {
        Ok(())
    } else {
        Err(StoreError::ReadOnly {
            store: place.name(),
        })
    }
}

fn check_header(header: &[u8], place: &DatabasePlace) -> Result<(), StoreError> {
    let number = |at: usize| {
        let bytes = header.get(at..at + 4)?;
        Some(u32::from_be_bytes(bytes.try_into().ok()?))
    };
    let marks = number(USER_VERSION_AT).zip(number(APPLICATION_ID_AT));
    let (Some((version, id)), true) = (marks, header.starts_with(MAGIC)) else {
        let found = if header.is_empty() {
            "an empty file"
        } else {
            "another file, or its beginning is damaged"
        };
        return Err(StoreError::NotRelatch {
            store: place.name(),
            found: found.into(),
        });
    };
    schema::check_marks(id.cast_signed(), version, place)
}

#[cfg(test)]
mod tests {
    use std::{fs, time::Duration};

    use super::*;
    use crate::{
        key::{Revision, Timestamp},
        store::{NewEntry, SqliteOptions, SqliteStore, Store as _},
    };

    fn look_at(path: &Path) -> Result<(), StoreError> {
        look(&DatabasePlace::new(path.to_owned(), Duration::ZERO))
    }

    #[tokio::test]
    async fn a_database_is_looked_at_without_a_trace() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("relatch.db");
        let options = SqliteOptions {
            create: true,
            ..SqliteOptions::default()
        };
        let store = SqliteStore::open(&path, options)
            .await
            .expect("a new store");
        look_at(&path).expect("it is in use, and sound");
        drop(store);
        let files = || {
            let entries = fs::read_dir(dir.path()).expect("readable");
            let names = entries.map(|entry| entry.expect("readable").file_name());
            let mut names: Vec<_> = names.collect();
            names.sort_unstable();
            names
        };
        let (before, content) = (files(), fs::read(&path).expect("readable"));
        look_at(&path).expect("it is sound");
        assert_eq!(files(), before);
        assert_eq!(fs::read(&path).expect("readable"), content);
    }

    #[tokio::test]
    async fn what_a_start_refuses_is_refused_in_the_same_words() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("relatch.db");
        for (what, content) in [
            ("missing", None),
            ("empty", Some(Vec::new())),
            ("text", Some(vec![b'x'; 4_096])),
        ] {
            if let Some(content) = content {
                fs::write(&path, content).expect("writable");
            }
            assert_refused_alike(&path, what).await;
        }
        fs::remove_file(&path).expect("it is there");
        fs::create_dir(&path).expect("writable");
        assert_refused_alike(&path, "a directory").await;
    }

    #[tokio::test]
    async fn a_database_of_another_program_or_of_a_later_version_is_refused() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        for (pragma, value) in [("application_id", 7), ("user_version", 99)] {
            let path = dir.path().join(pragma);
            let options = SqliteOptions {
                create: true,
                ..SqliteOptions::default()
            };
            drop(
                SqliteStore::open(&path, options)
                    .await
                    .expect("a new store"),
            );
            let database = Connection::open(&path).expect("it opens");
            database
                .pragma_update(None, pragma, value)
                .expect("writable");
            drop(database);
            assert_refused_alike(&path, pragma).await;
        }
    }

    #[tokio::test]
    async fn a_database_at_rest_is_read_without_a_trace_and_one_with_a_log_beside_it_is_not() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let path = dir.path().join("100%?a=b#c d.db");
        let options = SqliteOptions {
            create: true,
            ..SqliteOptions::default()
        };
        let store = SqliteStore::open(&path, options)
            .await
            .expect("a new store");
        let entry = |kind: &str| NewEntry {
            at: Timestamp::from_millis(1),
            actor: "alice".into(),
            kind: kind.into(),
            payload: kind.into(),
        };
        let entries = vec![entry("one"), entry("two")];
        let appended = store
            .append(&LogName::Control, Revision::default(), entries)
            .await;
        appended.expect("it appends");
        let read = || {
            let place = DatabasePlace::new(path.clone(), Duration::ZERO);
            at_rest(&place, &LogName::Control, "two").expect("it is sound")
        };
        assert_eq!(read(), None, "its log holds the entries");
        drop(store);
        let names = || fs::read_dir(dir.path()).expect("readable").count();
        let (before, content) = (names(), fs::read(&path).expect("readable"));
        let found = read().expect("it rests");
        assert_eq!(found.payloads, [b"two".to_vec()]);
        assert!(found.has_entries);
        assert_eq!(names(), before);
        assert_eq!(fs::read(&path).expect("readable"), content);
    }

    async fn assert_refused_alike(path: &Path, what: &str) {
        let looked = look_at(path).expect_err(what).to_string();
        let opened = SqliteStore::open(path, SqliteOptions::default()).await;
        assert_eq!(looked, opened.expect_err(what).to_string(), "{what}");
    }
}
