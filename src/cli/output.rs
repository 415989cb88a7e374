//! The output of commands: answers on standard output, notes and progress on standard error.

use std::io::{self, IsTerminal};

use comfy_table::{Table, presets};
use serde::Serialize;
use zeroize::Zeroizing;

use super::{
    failure::{Exit, Failure},
    screen::Screen,
    secret::Revealed,
    stream::{write_err, write_out},
    words,
};
use crate::key::Timestamp;

/// An answer of a command. Its JSON and its table come from the same value.
pub trait View: Serialize {
    /// The answer for people, with a final newline and without the secret.
    fn render(&self, now: Timestamp) -> String;

    /// The secret in the answer, to show once.
    fn secret(&self) -> Option<&Revealed> {
        None
    }
}

/// One kind of line in a table.
pub trait Row: Serialize {
    /// The titles of the columns.
    const TITLES: &[&str];

    /// The lines of this value, each with a cell for every title.
    fn cells(&self, now: Timestamp) -> Vec<Vec<String>>;
}

/// Values of one kind: an array in JSON, a table for people.
#[derive(Debug, Serialize)]
#[serde(transparent)]
pub struct Listing<T>(pub Vec<T>);

/// The form of an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// For people.
    Table,
    /// One document on one line, or one line per event where a command reports progress.
    Json,
}

/// The properties of the terminal and the standard streams.
#[derive(Clone, Copy, Debug, Default)]
#[expect(
    clippy::struct_excessive_bools,
    reason = "four facts that do not depend on each other"
)]
pub struct Terminal {
    /// Standard output is a terminal.
    pub stdout: bool,
    /// Standard error is a terminal.
    pub stderr: bool,
    /// The terminal supports the control sequences that redraw a line.
    pub redraws: bool,
    /// Colours are allowed: `NO_COLOR` is unset or empty.
    pub coloured: bool,
}

/// The format and the terminal for the output of a command.
#[derive(Clone, Copy, Debug)]
pub struct Output {
    format: Format,
    terminal: Terminal,
}

/// Progress on standard error while a command runs. On drop, a redrawn line is cleared.
#[derive(Debug)]
pub struct Progress {
    style: ProgressStyle,
    last: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum ProgressStyle {
    /// One line, redrawn.
    Live,
    /// A line for each new sentence.
    Lines,
    /// Nothing, because the events are written as JSON.
    Silent,
}

/// Back to the first column, clear the line, and do not wrap what is longer than the line.
const REDRAW: &str = "\r\x1b[2K\x1b[?7l";
/// Wrap again.
const WRAP: &str = "\x1b[?7h";
/// Back to the first column, and clear the line.
const CLEAR: &str = "\r\x1b[2K";

impl Terminal {
    /// Reads the streams and the environment of this process (`NO_COLOR`, see no-color.org, and `TERM`).
    #[must_use]
    pub fn detect() -> Self {
        let is_set = |name| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        let dumb = std::env::var_os("TERM").is_none_or(|term| term == "dumb");
        let stderr = io::stderr().is_terminal();
        Self {
            stdout: io::stdout().is_terminal(),
            stderr,
            redraws: !dumb,
            coloured: stderr && !dumb && !is_set("NO_COLOR"),
        }
    }
}

impl Output {
    /// Output in `format`. The default is a table on a terminal, and JSON elsewhere.
    #[must_use]
    pub fn new(format: Option<Format>, terminal: Terminal) -> Self {
        let default = if terminal.stdout {
            Format::Table
        } else {
            Format::Json
        };
        Self {
            format: format.unwrap_or(default),
            terminal,
        }
    }

    /// Writes the answer of a command, with its secret.
    ///
    /// # Errors
    ///
    /// When standard output cannot be written to.
    pub fn show<V: View>(&self, view: &V, now: Timestamp) -> Result<(), Failure> {
        match self.format {
            Format::Json => self.event(view),
            Format::Table => {
                let mut text =
                    Zeroizing::new(words::printable_lines(&view.render(now)).into_owned());
                if let Some(secret) = view.secret() {
                    // The capacity is reserved first: a string that grows leaves a copy of the secret behind.
                    text.reserve_exact(secret.expose().len() + 2);
                    text.push('\n');
                    text.push_str(secret.expose());
                    text.push('\n');
                }
                write_out(text.as_bytes())?;
                if view.secret().is_some() {
                    self.note("save this secret now: it is not shown again");
                }
                Ok(())
            }
        }
    }

    /// Writes a text for people, in any format of answers.
    ///
    /// # Errors
    ///
    /// When standard output cannot be written to.
    pub fn announce(&self, text: &str) -> Result<(), Failure> {
        // The text may contain a secret.
        let text = Zeroizing::new(words::printable_lines(text).into_owned());
        write_out(text.as_bytes())
    }

    /// Writes one line of JSON.
    ///
    /// # Errors
    ///
    /// When standard output cannot be written to.
    pub fn event<T: Serialize + ?Sized>(&self, event: &T) -> Result<(), Failure> {
        let mut line = Zeroizing::new(Vec::with_capacity(1024));
        serde_json::to_writer(&mut *line, event)
            .map_err(|error| Failure::new(Exit::Failed, error).context("cannot write JSON"))?;
        line.push(b'\n');
        write_out(&line)
    }

    /// The format of answers.
    #[must_use]
    pub const fn format(&self) -> Format {
        self.format
    }

    /// Writes a note for people to standard error.
    pub fn note(&self, text: &str) {
        let label = words::label("note:", words::Colour::Cyan, self.terminal.coloured);
        write_err(&format!("{label} {}\n", words::printable(text)));
    }

    /// Progress for people.
    #[must_use]
    pub fn progress(&self) -> Progress {
        Progress {
            style: self.progress_style(),
            last: String::new(),
        }
    }

    /// A block of text that is shown again and again as it changes, on standard output.
    #[must_use]
    pub const fn screen(&self) -> Screen {
        Screen::new(self.terminal.stdout && self.terminal.redraws)
    }

    const fn progress_style(self) -> ProgressStyle {
        let Terminal {
            stdout,
            stderr,
            redraws,
            coloured: _,
        } = self.terminal;
        match self.format {
            Format::Table if stderr && redraws => ProgressStyle::Live,
            Format::Table => ProgressStyle::Lines,
            // The events go to a pipe or a file, while a person watches standard error.
            Format::Json if stderr && redraws && !stdout => ProgressStyle::Live,
            Format::Json => ProgressStyle::Silent,
        }
    }
}

impl Progress {
    /// Shows the progress.
    pub fn say(&mut self, sentence: &str) {
        if self.last == sentence {
            return;
        }
        sentence.clone_into(&mut self.last);
        let sentence = words::printable(sentence);
        match self.style {
            ProgressStyle::Live => write_err(&format!("{REDRAW}{sentence}{WRAP}")),
            ProgressStyle::Lines => write_err(&format!("{sentence}\n")),
            ProgressStyle::Silent => {}
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if self.style == ProgressStyle::Live && !self.last.is_empty() {
            write_err(CLEAR);
        }
    }
}

impl<T: Row> View for Listing<T> {
    fn render(&self, now: Timestamp) -> String {
        let rows = self.0.iter().flat_map(|value| value.cells(now));
        table(T::TITLES, rows)
    }
}

/// A table without borders: one line per row, columns two spaces apart.
#[must_use]
pub fn table(titles: &[&str], rows: impl IntoIterator<Item = Vec<String>>) -> String {
    let mut table = borderless();
    table.set_header(titles);
    for row in rows {
        table.add_row(row.iter().map(|cell| words::printable(cell)));
    }
    lines(table)
}

/// Facts as lines of a name and a value.
#[must_use]
pub fn facts(facts: &[(&str, String)]) -> String {
    let mut table = borderless();
    for (name, value) in facts {
        table.add_row([(*name).to_owned(), words::printable(value)]);
    }
    lines(table)
}

fn borderless() -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING);
    table
}

fn lines(mut table: Table) -> String {
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
    }
    let mut text = table.trim_fmt();
    text.push('\n');
    text
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Returns `text`, and asserts that each of its lines fits into 80 columns.
    pub(crate) fn fits(text: String) -> String {
        for line in text.lines() {
            assert!(line.chars().count() <= 80, "{line:?} is too wide");
        }
        text
    }

    fn terminal(stdout: bool, stderr: bool) -> Terminal {
        Terminal {
            stdout,
            stderr,
            redraws: true,
            coloured: false,
        }
    }

    #[test]
    fn a_table_has_no_borders_and_no_trailing_space() {
        let rows = [["a", "7"], ["longer", "-"]].map(|row| row.map(str::to_owned).to_vec());
        assert_eq!(
            table(&["NAME", "LAG"], rows),
            "NAME    LAG\na       7\nlonger  -\n"
        );
        assert_eq!(table(&["NAME", "LAG"], []), "NAME  LAG\n");
    }

    #[test]
    fn a_cell_stays_on_its_line() {
        let rows = [vec!["two\nlines".to_owned()]];
        assert_eq!(table(&["NAME"], rows), "NAME\ntwo\u{fffd}lines\n");
    }

    #[test]
    fn no_cell_and_no_fact_turns_its_line_around() {
        let told = "edge\u{202e}1-egde\u{2066}";
        assert_eq!(
            table(&["NODE"], [vec![told.to_owned()]]),
            "NODE\nedge\u{fffd}1-egde\u{fffd}\n"
        );
        assert_eq!(
            facts(&[("NODE", told.to_owned())]),
            "NODE  edge\u{fffd}1-egde\u{fffd}\n"
        );
    }

    #[test]
    fn facts_stand_in_two_columns() {
        assert_eq!(
            facts(&[("KEYRING", "payments".to_owned()), ("KEY", "x".to_owned())]),
            "KEYRING  payments\nKEY      x\n"
        );
    }

    #[test]
    fn the_form_follows_standard_output_unless_told() {
        let format = |format, stdout| Output::new(format, terminal(stdout, true)).format();
        assert_eq!(format(None, true), Format::Table);
        assert_eq!(format(None, false), Format::Json);
        assert_eq!(format(Some(Format::Json), true), Format::Json);
        assert_eq!(format(Some(Format::Table), false), Format::Table);
    }

    #[test]
    fn progress_is_drawn_where_it_disturbs_nothing() {
        let style = |format, stdout, stderr| {
            Output::new(Some(format), terminal(stdout, stderr)).progress_style()
        };
        assert_eq!(style(Format::Table, true, true), ProgressStyle::Live);
        assert_eq!(style(Format::Table, true, false), ProgressStyle::Lines);
        assert_eq!(style(Format::Json, false, true), ProgressStyle::Live);
        assert_eq!(style(Format::Json, true, true), ProgressStyle::Silent);
        assert_eq!(style(Format::Json, false, false), ProgressStyle::Silent);
    }
}
