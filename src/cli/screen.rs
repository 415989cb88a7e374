//! A block of text on standard output that is updated: a terminal redraws it in place, other outputs get it again below.

use std::io;

use rustix::termios::tcgetwinsize;

use super::{failure::Failure, stream::write_out, words};

/// The state of the block.
#[derive(Debug)]
pub struct Screen {
    /// Whether the block is redrawn in place.
    redraws: bool,
    /// The number of lines above the cursor that belong to the block.
    drawn: usize,
    /// Whether anything was shown yet.
    begun: bool,
}

/// Do not wrap long lines: a line of the block is a line of the terminal.
const NO_WRAP: &str = "\x1b[?7l";
/// Wrap again.
const WRAP: &str = "\x1b[?7h";
/// Clear from the cursor to the end of the screen.
const CLEAR_BELOW: &str = "\x1b[J";
/// The height of a terminal that does not report its own: the traditional height.
const USUAL_ROWS: usize = 24;

impl Screen {
    /// A block that was not shown yet.
    pub(super) const fn new(redraws: bool) -> Self {
        Self {
            redraws,
            drawn: 0,
            begun: false,
        }
    }

    /// Whether the block is redrawn in place, so that it can be shown often.
    #[must_use]
    pub const fn redraws(&self) -> bool {
        self.redraws
    }

    /// Shows the block with the text `text`, whose lines each end with a newline.
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

    /// Leaves the shown block as it is, so that other text can be written below it.
    pub const fn leave(&mut self) {
        self.drawn = 0;
    }

    /// The output that draws the block over the previous one. A block that is higher than the terminal is cut, because lines
    /// that have scrolled out cannot be redrawn.
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
