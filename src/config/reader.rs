//! Reads a file into raw structs, and collects every problem that is found on the way to settings.

use std::{
    collections::BTreeMap,
    fmt::{self, Display},
    fs::File,
    io::Read as _,
    path::{Path, PathBuf},
    time::Duration,
};

use serde::de::DeserializeOwned;
use serde_path_to_error::{Segment, Track};
use serde_saphyr::{Location, Spanned};

use super::error::{ConfigError, Problem};

use crate::duration::written;

/// The largest file that is read, in bytes: a thousand routes need a tenth of it.
const MAX_FILE: u64 = 1 << 20;

/// The most edits between an unknown field and the known field that an error suggests: a guess beyond that is noise.
const MAX_EDITS: usize = 2;

/// A scalar of the file as text, with its line and column.
pub(super) type Text = Spanned<String>;

/// The problems found in one file so far, and the places of its fields.
#[derive(Debug)]
pub(super) struct Findings {
    file: String,
    problems: Vec<Problem>,
    places: Places,
}

/// The line and column of each field that a file gives.
#[derive(Clone, Debug, Default)]
pub(crate) struct Places(BTreeMap<String, (u64, u64)>);

/// Returns the text of the file at `path`, and the name of the file for errors.
pub(super) fn read(path: &Path) -> Result<(String, String), ConfigError> {
    let unreadable = |source| ConfigError::Unreadable {
        file: path.to_owned(),
        source,
    };
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(MAX_FILE + 1).read_to_end(&mut bytes))
        .map_err(unreadable)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(ConfigError::TooLarge {
            file: path.to_owned(),
            limit: MAX_FILE,
        });
    }
    let name = path.display().to_string();
    match String::from_utf8(bytes) {
        Ok(text) => Ok((text, name)),
        Err(error) => {
            let bytes = error.as_bytes();
            let valid = &bytes[..error.utf8_error().valid_up_to()];
            let problem = Problem {
                line: valid.split(|byte| *byte == b'\n').count() as u64,
                column: 1 + String::from_utf8_lossy(valid)
                    .chars()
                    .rev()
                    .take_while(|c| *c != '\n')
                    .count() as u64,
                field: String::new(),
                message: "is not UTF-8, save the file as UTF-8".to_owned(),
            };
            Err(ConfigError::Invalid {
                file: name,
                problems: vec![problem],
            })
        }
    }
}

/// Reads `text` as one YAML document.
pub(super) fn from_yaml<T: DeserializeOwned>(text: &str, file: &str) -> Result<T, ConfigError> {
    let options = serde_saphyr::options! { with_snippet: false };
    let mut track = Track::new();
    serde_saphyr::with_deserializer_from_str_with_options(text, options, |yaml| {
        T::deserialize(serde_path_to_error::Deserializer::new(yaml, &mut track))
    })
    .map_err(|error| ConfigError::Invalid {
        file: file.to_owned(),
        problems: vec![problem_of(&error, track)],
    })
}

impl Findings {
    pub(super) fn new(file: &str) -> Self {
        Self {
            file: file.to_owned(),
            problems: Vec::new(),
            places: Places::default(),
        }
    }

    /// Notes a problem of `field` at `place`.
    pub(super) fn note(&mut self, place: Location, field: impl Display, message: impl Display) {
        self.problems.push(Problem {
            // A missing field has no place: it is reported at the top of the file.
            line: place.line().max(1),
            column: place.column().max(1),
            field: field.to_string(),
            message: message.to_string(),
        });
    }

    /// Notes that `field` is missing from the value at `place`. `advice` says what to do.
    pub(super) fn missing(&mut self, place: Location, field: impl Display, advice: &str) {
        self.note(place, field, format_args!("is missing, {advice}"));
    }

    /// Parses a value without a default, of the value at `place`. None if it is missing or wrong, which is then noted. `advice`
    /// says what to do about a missing value.
    pub(super) fn required<T, E: Display>(
        &mut self,
        place: Location,
        field: impl Display,
        advice: &str,
        text: Option<&Text>,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Option<T> {
        if text.is_none() {
            self.missing(place, &field, advice);
        }
        self.parse(field, text, parse)
    }

    /// Parses `text` where it is given. None if it is not given, or if it is wrong, which is then noted.
    pub(super) fn parse<T, E: Display>(
        &mut self,
        field: impl Display,
        text: Option<&Text>,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Option<T> {
        let text = text?;
        let field = field.to_string();
        let place = (
            text.referenced.line().max(1),
            text.referenced.column().max(1),
        );
        self.places.0.insert(field.clone(), place);
        parse(&text.value)
            .map_err(|error| self.note(text.referenced, field, error))
            .ok()
    }

    /// Parses `text`, or returns `default` where it is not given. None if it is wrong, which is then noted.
    pub(super) fn parse_or<T, E: Display>(
        &mut self,
        field: impl Display,
        text: Option<&Text>,
        default: T,
        parse: impl FnOnce(&str) -> Result<T, E>,
    ) -> Option<T> {
        match text {
            Some(_) => self.parse(field, text, parse),
            None => Some(default),
        }
    }

    /// Parses a duration within `bounds`, both included.
    pub(super) fn duration(
        &mut self,
        field: impl Display,
        text: Option<&Text>,
        bounds: (Duration, Duration),
    ) -> Option<Duration> {
        self.parse(field, text, |text| {
            let within = |found: &Duration| (bounds.0..=bounds.1).contains(found);
            humantime::parse_duration(text)
                .ok()
                .filter(within)
                .ok_or_else(|| {
                    let [least, most] = [bounds.0, bounds.1].map(written);
                    format!("use a duration from {least} to {most}")
                })
        })
    }

    /// Parses a path.
    pub(super) fn path(&mut self, field: impl Display, text: Option<&Text>) -> Option<PathBuf> {
        self.parse(field, text, |text| {
            if text.is_empty() || text.contains('\0') {
                Err("use the path of a file or directory")
            } else {
                Ok(PathBuf::from(text))
            }
        })
    }

    /// Notes a list that is longer than `most`.
    pub(super) fn bound<T>(&mut self, field: &str, list: &Spanned<Vec<T>>, most: usize) {
        if list.value.len() > most {
            self.note(
                list.referenced,
                field,
                format_args!("has {} entries, use at most {most}", list.value.len()),
            );
        }
    }

    /// Combines parts that are each valid. None if a problem was noted before, or if they do not fit together, which is then
    /// noted.
    pub(super) fn combine<T, E: Display>(
        &mut self,
        combine: impl FnOnce() -> Result<T, E>,
    ) -> Option<T> {
        if !self.problems.is_empty() {
            return None;
        }
        combine()
            .map_err(|error| self.note(Location::UNKNOWN, "", error))
            .ok()
    }

    /// Returns the settings and the places of their fields, or all problems in the order of the file.
    pub(super) fn finish<T>(mut self, settings: Option<T>) -> Result<(T, Places), ConfigError> {
        match settings {
            Some(settings) if self.problems.is_empty() => Ok((settings, self.places)),
            Some(_) | None => {
                self.problems
                    .sort_by_key(|found| (found.line, found.column));
                Err(ConfigError::Invalid {
                    file: self.file,
                    problems: self.problems,
                })
            }
        }
    }
}

impl Places {
    /// The line and column of the first of `fields` that the file gives; the top of the file if it gives none of them.
    #[must_use]
    pub(crate) fn of(&self, fields: &[&str]) -> (u64, u64) {
        let place = fields.iter().find_map(|field| self.0.get(*field));
        place.copied().unwrap_or((1, 1))
    }
}

fn problem_of(error: &serde_saphyr::Error, track: Track) -> Problem {
    use serde_saphyr::Error;

    let (line, column) = error
        .location()
        .map_or((1, 1), |place| (place.line().max(1), place.column().max(1)));
    let mut field = path_of(track);
    let message = match error.without_snippet() {
        Error::SerdeUnknownField {
            field, expected, ..
        } => unknown_field(field, expected),
        Error::DuplicateMappingKey { key, .. } => {
            if let Some(key) = key {
                field.clone_from(key);
            }
            "is given twice, keep one of them".to_owned()
        }
        Error::MultipleDocuments { .. } => {
            "holds more than one YAML document, keep one of them".to_owned()
        }
        Error::Unexpected {
            expected: "string scalar",
            ..
        } => "use a single value".to_owned(),
        Error::Unexpected {
            expected: "mapping start",
            ..
        } => "use fields with values, such as `name: value`".to_owned(),
        Error::Unexpected {
            expected: "sequence start",
            ..
        } => "use a list, such as `[first, second]`".to_owned(),
        // The enum belongs to the library and may grow. Its text says what is wrong.
        other => {
            let text = other.to_string();
            let place = format!(" at line {line}, column {column}");
            text.strip_suffix(place.as_str())
                .unwrap_or(text.as_str())
                .to_owned()
        }
    };
    Problem {
        line,
        column,
        field,
        message,
    }
}

/// The path of a field as an operator writes it, without the wrapper that keeps the place of a value.
fn path_of(track: Track) -> String {
    let mut path = String::new();
    for segment in &track.path() {
        match segment {
            Segment::Seq { index } => path.extend(["[", &index.to_string(), "]"]),
            Segment::Map { key } if key == "value" => {}
            Segment::Map { key } | Segment::Enum { variant: key } => {
                if !path.is_empty() {
                    path.push('.');
                }
                path.push_str(key);
            }
            Segment::Unknown => {}
        }
    }
    path
}

fn unknown_field(field: &str, known: &[&'static str]) -> String {
    let nearest = known
        .iter()
        .map(|name| (edits(field, name), *name))
        .min()
        .filter(|(edits, _)| *edits <= MAX_EDITS);
    match nearest {
        Some((_, name)) => format!("is not a known field, did you mean `{name}`?"),
        None => format!("is not a known field, use one of {}", Names(known)),
    }
}

/// The number of letters to insert, remove, change or swap with their neighbour to turn `from` into `to`.
fn edits(from: &str, to: &str) -> usize {
    let (from, to) = (from.as_bytes(), to.as_bytes());
    // The field of a file may have any length. A known field is short, so a long one is no match.
    if from.len() > to.len() + MAX_EDITS {
        return usize::MAX;
    }
    let mut table = vec![vec![0; to.len() + 1]; from.len() + 1];
    for i in 0..=from.len() {
        for j in 0..=to.len() {
            table[i][j] = if i == 0 || j == 0 {
                i + j
            } else {
                let change = usize::from(from[i - 1] != to[j - 1]);
                let mut least = (table[i - 1][j] + 1)
                    .min(table[i][j - 1] + 1)
                    .min(table[i - 1][j - 1] + change);
                if i > 1 && j > 1 && from[i - 1] == to[j - 2] && from[i - 2] == to[j - 1] {
                    least = least.min(table[i - 2][j - 2] + 1);
                }
                least
            };
        }
    }
    table[from.len()][to.len()]
}

struct Names<'a>(&'a [&'static str]);

impl Display for Names<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, name) in self.0.iter().enumerate() {
            if at > 0 {
                f.write_str(", ")?;
            }
            write!(f, "`{name}`")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn edits_count_a_swap_once() {
        assert_eq!(edits("keyrigns", "keyrings"), 1);
        assert_eq!(edits("listn", "listen"), 1);
        assert_eq!(edits("http", "http"), 0);
        assert_eq!(edits(&"x".repeat(10_000), "http"), usize::MAX);
    }

    #[test]
    fn a_file_that_is_not_utf8_is_refused_at_its_place() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("bad.yaml");
        std::fs::write(&path, b"node:\n  id: a\xffb\n").expect("writable");
        let error = read(&path).expect_err("not UTF-8");
        assert_eq!(
            error.to_string(),
            format!(
                "{}:2:8: is not UTF-8, save the file as UTF-8",
                path.display()
            )
        );
    }

    #[test]
    fn a_missing_or_endless_file_is_refused() {
        let missing = read(Path::new("/nonexistent/sidecar.yaml")).expect_err("missing");
        assert_eq!(
            missing.to_string(),
            "/nonexistent/sidecar.yaml: cannot be read, check the path and its permissions"
        );
        assert!(matches!(
            read(Path::new("/dev/zero")),
            Err(ConfigError::TooLarge { .. })
        ));
    }
}
