//! A block of text on standard output that is shown again as it changes: in its place on a terminal, below elsewhere.

use std::io;

use rustix::termios::tcgetwinsize;

use super::{failure::Failure, stream::write_out, words};

/// Where the block stands.
#[derive(Debug)]
pub struct Screen {
    /// Whether it is drawn over what it was before.
    redraws: bool,
    /// How many lines above the cursor are the block's own.
    drawn: usize,
    /// Whether anything was shown yet.
    begun: bool,
}

/// Do not wrap what is longer than the line: a line of the block is a line of the terminal.
const NO_WRAP: &str = "\x1b[?7l";
/// Wrap again.
const WRAP: &str = "\x1b[?7h";
/// Clear from the cursor to the end of the screen.
const CLEAR_BELOW: &str = "\x1b[J";
/// The height of a terminal that does not tell its own: the one that all of them have had.
const USUAL_ROWS: usize = 24;

impl Screen {
    /// A block of which nothing is shown yet.
    pub(super) const fn new(redraws: bool) -> Self {
        Self {
            redraws,
            drawn: 0,
            begun: false,
        }
    }

    /// Whether it is drawn in its place, so that to draw it often disturbs nobody.
    #[must_use]
    pub const fn redraws(&self) -> bool {
        self.redraws
    }

    /// Shows the block as it is now. Each of its lines is ended by a newline.
    ///
    /// # Errors
    ///
    /// When standard output cannot be written to.
    pub fn show(&mut self, text: &str) -> Result<(), Failure> {
        let text = &*words::printable_lines(text);
        let shown = if self.redraws {
            self.redrawn(text, rows())
        } else if self.begun {
            format!("\n{text}")
        } else {
            text.to_owned()
        };
        self.begun = true;
        write_out(shown.as_bytes())
    }

    /// Leaves what is shown where it is, so that something else can be written below.
    pub const fn leave(&mut self) {
        self.drawn = 0;
    }

    /// What draws the block over the one before. A block higher than the terminal is cut: what has scrolled out of it
    /// cannot be drawn over.
    fn redrawn(&mut self, text: &str, rows: usize) -> String {
        let most = rows.saturating_sub(1).max(1);
        let lines: Vec<&str> = text.lines().take(most).collect();
        let up = match self.drawn {
            0 => String::new(),
            drawn => format!("\x1b[{drawn}A\r"),
        };
        self.drawn = lines.len();
        format!("{up}{CLEAR_BELOW}{NO_WRAP}{}\n{WRAP}", lines.join("\n"))
    }
}

fn rows() -> usize {
    tcgetwinsize(io::stdout())
        .map(|size| usize::from(size.ws_row))
        .ok()
        .filter(|rows| *rows > 0)
        .unwrap_or(USUAL_ROWS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_drawn_over_the_one_before() {
        let mut screen = Screen::new(true);
        assert_eq!(
            screen.redrawn("a\nb\nc\n", 24),
            "\x1b[J\x1b[?7la\nb\nc\n\x1b[?7h"
        );
        assert_eq!(
            screen.redrawn("d\n", 24),
            "\x1b[3A\r\x1b[J\x1b[?7ld\n\x1b[?7h"
        );
        screen.leave();
        assert!(!screen.redrawn("e\n", 24).contains('A'));
    }

    #[test]
    fn a_block_that_is_too_high_is_cut() {
        let mut screen = Screen::new(true);
        assert!(screen.redrawn("1\n2\n3\n4\n", 3).contains("1\n2\n\x1b[?7h"));
        assert!(screen.redrawn("1\n2\n3\n4\n", 3).starts_with("\x1b[2A"));
        assert!(screen.redrawn("1\n2\n", 0).contains("1\n\x1b[?7h"));
    }
}
