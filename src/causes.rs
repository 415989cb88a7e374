//! An error with its causes, as one text.

use std::error::Error;

/// The maximum number of causes in a text. Errors of a network stack have about eight; a longer
/// chain tells a reader nothing more, and a chain that refers to itself must end.
const MAX_CAUSES: usize = 16;

/// Returns the error and its causes, outermost first, joined by `: `. Layers of a network stack
/// repeat each other's words, and some errors end with the text of their cause: a cause that the
/// text already ends with is left out.
pub(crate) fn in_one_line(error: &(dyn Error + 'static)) -> String {
    let causes = std::iter::successors(error.source(), |&cause| cause.source());
    causes
        .take(MAX_CAUSES)
        .map(ToString::to_string)
        .fold(error.to_string(), |mut text, cause| {
            if !ends_with_cause(&text, &cause) {
                text.push_str(": ");
                text.push_str(&cause);
            }
            text
        })
}

fn ends_with_cause(text: &str, cause: &str) -> bool {
    let before = text.strip_suffix(cause);
    before.is_some_and(|before| before.is_empty() || before.ends_with(": "))
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Layer {
        text: &'static str,
        source: Option<Box<Layer>>,
    }

    fn chain(texts: &[&'static str]) -> Layer {
        let (text, rest) = texts.split_first().expect("a text");
        let source = (!rest.is_empty()).then(|| Box::new(chain(rest)));
        Layer { text, source }
    }

    #[test]
    fn the_causes_follow_the_error() {
        let error = chain(&[
            "the connection failed",
            "transport error",
            "connection refused",
        ]);
        assert_eq!(
            in_one_line(&error),
            "the connection failed: transport error: connection refused"
        );
        assert_eq!(in_one_line(&io::Error::other("alone")), "alone");
    }

    #[test]
    fn a_text_that_stands_at_the_end_is_not_repeated() {
        for (texts, expected) in [
            (&["broken", "broken", "pipe"][..], "broken: pipe"),
            (&["sink a: no room", "no room"], "sink a: no room"),
            // The end of a word is not a text of its own.
            (&["cannot unlisten", "listen"], "cannot unlisten: listen"),
        ] {
            assert_eq!(in_one_line(&chain(texts)), expected);
        }
    }

    #[test]
    fn a_long_chain_ends() {
        let text = in_one_line(&chain(&["a", "b"].repeat(50)));
        assert_eq!(text.split(": ").count(), 1 + MAX_CAUSES, "{text}");
    }
}
