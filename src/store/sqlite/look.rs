//! A look at a database from outside.
//!
//! SQLite would make files beside it, and lock it: here only its header is read, so that a control plane may use it
//! meanwhile.

use std::{
    fs::{self, File},
    io::{self, Read as _},
    path::Path,
};

use rustix::fs::{Access, AtFlags, CWD};

use super::{place::Place, schema};
use crate::store::StoreError;

/// What a database begins with: the header of its file (<https://www.sqlite.org/fileformat.html>, section 1.3).
const HEADER_LEN: usize = 100;
const MAGIC: &[u8] = b"SQLite format 3\0";
const USER_VERSION_AT: usize = 60;
const APPLICATION_ID_AT: usize = 68;

/// Finds what opening the database would be refused for, as far as that shows from outside: it is missing, something
/// else, of a later version, or not writable. Damage deeper inside does not show.
pub(super) fn look(place: &Place) -> Result<(), StoreError> {
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

fn check_header(header: &[u8], place: &Place) -> Result<(), StoreError> {
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

    use rusqlite::Connection;

    use super::*;
    use crate::store::{SqliteOptions, SqliteStore};

    fn look_at(path: &Path) -> Result<(), StoreError> {
        look(&Place::new(path.to_owned(), Duration::ZERO))
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

    async fn assert_refused_alike(path: &Path, what: &str) {
        let looked = look_at(path).expect_err(what).to_string();
        let opened = SqliteStore::open(path, SqliteOptions::default()).await;
        assert_eq!(looked, opened.expect_err(what).to_string(), "{what}");
    }
}
