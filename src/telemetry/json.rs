//! Log lines in JSON: one object for each event.
//!
//! The format of the library writes an error without its causes, which often are the only part that says what to do. Here,
//! an error is one text with its causes, so that a search in Loki or Elasticsearch finds every cause in the same field.
//! Spans are left out: relatch opens none with `tracing`.

use std::{error::Error, fmt, io};

use serde::ser::{SerializeMap, Serializer as _};
use serde_json::ser::{CompactFormatter, Formatter};
use tracing::{
    Event, Subscriber,
    field::{Field, Visit},
};
use tracing_subscriber::{
    fmt::{
        FmtContext, FormatEvent, FormatFields,
        format::Writer,
        time::{FormatTime as _, SystemTime},
    },
    registry::LookupSpan,
};

use crate::causes;

/// Writes an event as one object on one line: `timestamp`, `level`, the fields of the event, and `target`.
#[derive(Clone, Copy, Debug)]
pub(super) struct JsonLines;

/// The field in which the bridge from the crate `log` puts the target of a record. The event itself has the target `log`.
const LOG_TARGET: &str = "log.target";
/// The prefix of all fields that the bridge adds to a record.
const LOG_FIELDS: &str = "log.";

/// Writes fields into an object. It keeps the first error, because a visitor cannot return one.
struct Fields<M: SerializeMap> {
    object: M,
    written: Result<(), M::Error>,
    /// The target of a record from the crate `log`.
    log_target: Option<String>,
}

/// A compact format that escapes all control characters. `serde_json` escapes those below U+0020 only; some terminals also
/// interpret U+0080 to U+009F.
struct Escaped(CompactFormatter);

/// Writes UTF-8 bytes into a log line.
struct Utf8<'w, 'l>(&'w mut Writer<'l>);

impl<S, N> FormatEvent<S, N> for JsonLines
where
    S: Subscriber + for<'lookup> LookupSpan<'lookup>,
    N: for<'writer> FormatFields<'writer> + 'static,
{
    fn format_event(
        &self,
        _context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut timestamp = String::new();
        SystemTime.format_time(&mut Writer::new(&mut timestamp))?;
        write_object(&mut writer, &timestamp, event).map_err(|_| fmt::Error)?;
        writeln!(writer)
    }
}

fn write_object(
    writer: &mut Writer<'_>,
    timestamp: &str,
    event: &Event<'_>,
) -> serde_json::Result<()> {
    let metadata = event.metadata();
    let formatter = Escaped(CompactFormatter);
    let mut serializer = serde_json::Serializer::with_formatter(Utf8(writer), formatter);
    let mut object = serializer.serialize_map(None)?;
    object.serialize_entry("timestamp", timestamp)?;
    object.serialize_entry("level", metadata.level().as_str())?;
    let mut fields = Fields {
        object,
        written: Ok(()),
        log_target: None,
    };
    event.record(&mut fields);
    fields.written?;
    let mut object = fields.object;
    let target = fields.log_target.as_deref().unwrap_or(metadata.target());
    object.serialize_entry("target", target)?;
    object.end()
}

impl<M: SerializeMap> Fields<M> {
    fn write(&mut self, field: &Field, value: &(impl serde::Serialize + ?Sized)) {
        if self.written.is_ok() && !field.name().starts_with(LOG_FIELDS) {
            // A raw identifier, such as `r#type`, is a field without the `r#`.
            let name = field.name();
            let name = name.strip_prefix("r#").unwrap_or(name);
            self.written = self.object.serialize_entry(name, value);
        }
    }
}

impl<M: SerializeMap> Visit for Fields<M> {
    fn record_f64(&mut self, field: &Field, value: f64) {
        self.write(field, &value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.write(field, &value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.write(field, &value);
    }

    fn record_i128(&mut self, field: &Field, value: i128) {
        self.write(field, &value);
    }

    /// The type of milliseconds, for example.
    fn record_u128(&mut self, field: &Field, value: u128) {
        self.write(field, &value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.write(field, &value);
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        if field.name() == LOG_TARGET {
            self.log_target = Some(value.to_owned());
        }
        self.write(field, value);
    }

    fn record_error(&mut self, field: &Field, value: &(dyn Error + 'static)) {
        self.write(field, &causes::in_one_line(value));
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.write(field, &format!("{value:?}"));
    }
}

impl Formatter for Escaped {
    fn write_string_fragment<W>(&mut self, writer: &mut W, fragment: &str) -> io::Result<()>
    where
        W: ?Sized + io::Write,
    {
        let mut rest = fragment;
        while let Some((at, control)) = rest.char_indices().find(|(_, c)| c.is_control()) {
            self.0.write_string_fragment(writer, &rest[..at])?;
            write!(writer, "\\u{:04x}", u32::from(control))?;
            rest = &rest[at + control.len_utf8()..];
        }
        self.0.write_string_fragment(writer, rest)
    }
}

impl io::Write for Utf8<'_, '_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let text = std::str::from_utf8(bytes).map_err(io::Error::other)?;
        self.0.write_str(text).map_err(io::Error::other)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
