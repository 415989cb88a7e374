//! The log: one line for each event, on standard error.

use std::io::{self, IsTerminal as _};

use tracing::{Subscriber, level_filters::LevelFilter};
use tracing_subscriber::{
    Layer as _, Registry,
    filter::Targets,
    fmt,
    fmt::MakeWriter,
    layer::SubscriberExt as _,
    registry, reload,
    util::{SubscriberInitExt as _, TryInitError},
};

use super::{
    json::JsonLines,
    lines::{Lines, LinesGuard},
};
use crate::{
    config::{LogFormat, LogSettings},
    printable,
};

/// The log of the process. When it is dropped, the queued lines are written.
#[derive(Debug)]
pub(crate) struct Log {
    /// Changes the level.
    pub(crate) level: LogLevel,
    _lines: LinesGuard,
}

/// Changes the level of the log while the process runs; cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct LogLevel(reload::Handle<Targets, Registry>);

/// Creates writers of text for people. Parts of the text come from others; no character of it may deceive the reader.
struct ForPeople<W>(W);

/// The prefix of relatch's own targets.
const OURS: &str = env!("CARGO_CRATE_NAME");

/// The least severe level of libraries that is logged: below it, they log data such as the headers of a request.
const LIBRARIES: LevelFilter = LevelFilter::WARN;

/// The log cannot be set up.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LogError {
    /// The thread that writes log lines cannot be started.
    #[error("cannot start the thread that writes the log")]
    Thread(#[source] io::Error),
    /// The log is already set up.
    #[error("the log is already set up")]
    Twice(#[source] TryInitError),
}

/// Writes the events of the whole process to standard error, with colours only on a terminal and without `NO_COLOR`. The
/// caller keeps the log until the end of the process.
///
/// # Errors
///
/// When the thread cannot be started, or when the log is already set up.
pub(crate) fn init(settings: LogSettings) -> Result<Log, LogError> {
    let colours = io::stderr().is_terminal();
    let (lines, guard) = Lines::to(io::stderr()).map_err(LogError::Thread)?;
    let (subscriber, level) = subscriber(settings, move || lines.clone(), colours);
    subscriber.try_init().map_err(LogError::Twice)?;
    Ok(Log {
        level,
        _lines: guard,
    })
}

/// Returns a subscriber that writes to `writer`, and what changes its level.
#[must_use]
pub(crate) fn subscriber<W>(
    settings: LogSettings,
    writer: W,
    colours: bool,
) -> (impl Subscriber + Send + Sync, LogLevel)
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let (filter, handle) = reload::Layer::new(targets(settings.level));
    let lines = match settings.format {
        LogFormat::Json => fmt::layer()
            .with_writer(writer)
            .event_format(JsonLines)
            .boxed(),
        // The library reads NO_COLOR on its own, unless colours are set here.
        LogFormat::Text if colours => fmt::layer().with_writer(ForPeople(writer)).boxed(),
        LogFormat::Text => fmt::layer()
            .with_writer(ForPeople(writer))
            .with_ansi(false)
            .boxed(),
    };
    let subscriber = registry().with(lines.with_filter(filter));
    (subscriber, LogLevel(handle))
}

/// Returns the events that are logged at a level.
fn targets(level: LevelFilter) -> Targets {
    Targets::new()
        .with_default(level.min(LIBRARIES))
        .with_target(OURS, level)
}

impl LogLevel {
    /// Changes the level from now on.
    pub(crate) fn set(&self, level: LevelFilter) {
        // It fails only when the log is gone, at the end of the process.
        let _changed = self.0.reload(targets(level));
    }
}

impl<'w, W: MakeWriter<'w>> MakeWriter<'w> for ForPeople<W> {
    type Writer = ForPeople<W::Writer>;

    fn make_writer(&'w self) -> Self::Writer {
        ForPeople(self.0.make_writer())
    }
}

/// Each write is one line. It keeps control characters: the library has escaped those in values, and colours need them.
impl<W: io::Write> io::Write for ForPeople<W> {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let text = String::from_utf8_lossy(line);
        self.0.write_all(printable::undeceptive(&text).as_bytes())?;
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use serde_json::Value;

    use super::*;

    #[derive(Clone, Default)]
    struct Written(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Written {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().expect("no panic").extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// What is written for the events of `emit`.
    fn written(format: LogFormat, level: LevelFilter, emit: impl FnOnce()) -> String {
        let lines = Written::default();
        let writer = lines.clone();
        let settings = LogSettings { format, level };
        let (subscriber, _level) = subscriber(settings, move || writer.clone(), false);
        tracing::subscriber::with_default(subscriber, emit);
        let bytes = lines.0.lock().expect("no panic").clone();
        String::from_utf8(bytes).expect("lines are UTF-8")
    }

    #[test]
    fn a_json_line_has_the_fields_beside_its_message() {
        let line = written(LogFormat::Json, LevelFilter::INFO, || {
            tracing::info!(
                "auth.consumer.id" = "checkout",
                "auth.key.version" = 3,
                "a denial"
            );
        });
        assert_eq!(line.lines().count(), 1);
        let event: Value = serde_json::from_str(&line).expect("JSON");
        assert_eq!(event["level"], "INFO");
        assert_eq!(event["message"], "a denial");
        assert_eq!(event["target"], "relatch::telemetry::logs::tests");
        assert_eq!(event["auth.consumer.id"], "checkout");
        assert_eq!(event["auth.key.version"], 3);
        let timestamp = event["timestamp"].as_str().expect("a timestamp");
        assert!(humantime::parse_rfc3339(timestamp).is_ok(), "{timestamp}");
        let names: Vec<_> = event.as_object().expect("an object").keys().collect();
        assert_eq!(names.len(), 6, "{names:?}");
    }

    #[derive(Debug, thiserror::Error)]
    #[error("the connection failed")]
    struct Failed(#[source] Refused);

    #[derive(Debug, thiserror::Error)]
    #[error("the server refuses")]
    struct Refused(#[source] io::Error);

    #[test]
    fn an_error_is_logged_with_its_causes_in_both_formats() {
        let error = Failed(Refused(io::Error::other("out of \"keys\"\n\u{9b}2J")));
        for format in [LogFormat::Text, LogFormat::Json] {
            let line = written(format, LevelFilter::INFO, || {
                tracing::warn!(
                    error = &error as &dyn std::error::Error,
                    retry_in_ms = 300,
                    "no stream"
                );
            });
            for text in ["the connection failed", "the server refuses", "out of "] {
                assert!(line.contains(text), "{format:?} lacks {text:?}: {line}");
            }
            assert!(!line.contains('\u{9b}'), "{format:?}: {line:?}");
            if format == LogFormat::Json {
                assert_eq!(line.lines().count(), 1, "{line}");
                let event: Value = serde_json::from_str(&line).expect("JSON");
                assert_eq!(
                    event["error"],
                    "the connection failed: the server refuses: out of \"keys\"\n\u{9b}2J"
                );
                assert_eq!(event["retry_in_ms"], 300);
            }
        }
    }

    #[test]
    fn every_kind_of_field_is_json() {
        let line = written(LogFormat::Json, LevelFilter::INFO, || {
            tracing::info!(
                whole = -3,
                large = u64::MAX,
                waited_ms = std::time::Duration::from_millis(300).as_millis(),
                fraction = 0.5,
                flag = true,
                none = None::<u32>,
                text = "\u{1b}[31m",
                shown = %LevelFilter::INFO,
                debugged = ?["a"],
                r#type = "raw",
                "all"
            );
        });
        let event: Value = serde_json::from_str(&line).expect("JSON");
        assert_eq!(event["whole"], -3);
        assert_eq!(event["large"], u64::MAX);
        assert_eq!(event["waited_ms"], 300);
        assert_eq!(event["fraction"], 0.5);
        assert_eq!(event["flag"], true);
        assert_eq!(event.get("none"), None);
        assert_eq!(event["text"], "\u{1b}[31m");
        assert_eq!(event["shown"], "info");
        assert_eq!(event["debugged"], "[\"a\"]");
        assert_eq!(event["type"], "raw");
        assert!(!line.contains('\u{1b}'), "{line:?}");
    }

    #[test]
    fn text_has_no_colours_beside_a_terminal() {
        let line = written(LogFormat::Text, LevelFilter::INFO, || {
            tracing::warn!(keyring = "payments", "stale");
        });
        assert!(
            line.ends_with(" WARN relatch::telemetry::logs::tests: stale keyring=\"payments\"\n"),
            "{line:?}"
        );
    }

    #[test]
    fn text_of_others_does_not_turn_a_line_around_and_json_is_data() {
        let name = "edge\u{202e}1-egde";
        let emit = || tracing::warn!(node = %name, "{name} vanished");
        let text = written(LogFormat::Text, LevelFilter::INFO, emit);
        assert!(
            text.ends_with(": edge\u{fffd}1-egde vanished node=edge\u{fffd}1-egde\n"),
            "{text:?}"
        );
        let json = written(LogFormat::Json, LevelFilter::INFO, emit);
        let event: Value = serde_json::from_str(&json).expect("JSON");
        assert_eq!(event["node"], name);
    }

    #[test]
    fn libraries_are_heard_from_warn_on_only() {
        let text = written(LogFormat::Text, LevelFilter::TRACE, || {
            tracing::info!(target: "h2::codec", "headers");
            tracing::warn!(target: "h2::codec", "trouble");
            tracing::trace!("ours");
        });
        assert!(!text.contains("headers"), "{text}");
        assert!(text.contains("trouble"), "{text}");
        assert!(text.contains("ours"), "{text}");
    }

    #[test]
    fn the_level_changes_while_the_process_runs() {
        let lines = Written::default();
        let writer = lines.clone();
        let settings = LogSettings {
            format: LogFormat::Text,
            level: LevelFilter::WARN,
        };
        let (subscriber, level) = subscriber(settings, move || writer.clone(), false);
        tracing::subscriber::with_default(subscriber, || {
            for (now, message) in [
                (LevelFilter::WARN, "first"),
                (LevelFilter::INFO, "second"),
                (LevelFilter::ERROR, "third"),
            ] {
                level.set(now);
                tracing::info!("{message}");
            }
        });
        let bytes = lines.0.lock().expect("no panic").clone();
        let text = String::from_utf8(bytes).expect("lines are UTF-8");
        assert!(
            text.contains("second") && text.lines().count() == 1,
            "{text}"
        );
    }

    #[test]
    fn the_level_holds_for_all() {
        let text = written(LogFormat::Text, LevelFilter::ERROR, || {
            tracing::warn!(target: "h2::codec", "trouble");
            tracing::info!("ours");
        });
        assert_eq!(text, "");
    }
}
