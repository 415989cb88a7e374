//! Text of other parties, made safe to show to people.
//!
//! A control character steers the terminal. Other characters deceive whoever reads: the bidirectional controls show a
//! line in another order than it is stored in (U+202E turns the rest of it around), and invisible characters make two
//! texts look the same. All of them are shown as U+FFFD in tables, sentences and text logs, and are refused in names.
//! JSON is data and is left as it is.
//!
//! The zero-width joiner and non-joiner (U+200C, U+200D) stay: Persian, Indic scripts and emoji need them, and they do
//! not reorder anything. What they could imitate is a free text only: identifiers are ASCII.

use std::borrow::Cow;

/// What is shown in the place of a character that may not be.
const REPLACEMENT: char = '\u{fffd}';

/// Whether `c` steers a terminal or deceives the reader.
pub(crate) fn is_unsafe(c: char) -> bool {
    c.is_control() || is_deceptive(c)
}

/// `text` on one line, with every unsafe character replaced.
pub(crate) fn line(text: &str) -> String {
    let shown = |c| if is_unsafe(c) { REPLACEMENT } else { c };
    text.chars().map(shown).collect()
}

/// `text` with its line breaks, and with every other unsafe character replaced.
pub(crate) fn lines(text: &str) -> Cow<'_, str> {
    let is_replaced = |c: char| c != '\n' && is_unsafe(c);
    if !text.contains(is_replaced) {
        return Cow::Borrowed(text);
    }
    // Reserved first, so that no copy of a secret in the text is left behind by a string that grew.
    let mut shown = String::with_capacity(text.len() * REPLACEMENT.len_utf8());
    shown.extend(
        text.chars()
            .map(|c| if is_replaced(c) { REPLACEMENT } else { c }),
    );
    Cow::Owned(shown)
}

/// `text` with every deceptive character replaced; control characters are left to the caller.
pub(crate) fn undeceptive(text: &str) -> Cow<'_, str> {
    if text.is_ascii() || !text.contains(is_deceptive) {
        return Cow::Borrowed(text);
    }
    Cow::Owned(text.replace(is_deceptive, "\u{fffd}"))
}

/// Whether `c` reorders or hides what is beside it. By the Unicode categories: line and paragraph separators, and those
/// format characters that are invisible, except U+200C and U+200D.
fn is_deceptive(c: char) -> bool {
    matches!(
        c,
        // The bidirectional controls: marks, embeddings, overrides and isolates.
        '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
        // Line and paragraph separators.
        | '\u{2028}' | '\u{2029}'
        // Soft hyphen, Mongolian vowel separator, zero-width space, word joiner and the invisible operators, the
        // deprecated format characters, the byte order mark, and the marks of annotations.
        | '\u{ad}' | '\u{180e}' | '\u{200b}' | '\u{2060}'..='\u{2065}' | '\u{206a}'..='\u{206f}' | '\u{feff}'
        | '\u{fff9}'..='\u{fffb}'
        // Tags, with which a whole text can be hidden.
        | '\u{e0000}'..='\u{e007f}'
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_reorders_or_hides_text_is_replaced() {
        for c in [
            '\u{61c}',
            '\u{200e}',
            '\u{200f}',
            '\u{202a}',
            '\u{202b}',
            '\u{202c}',
            '\u{202d}',
            '\u{202e}',
            '\u{2066}',
            '\u{2067}',
            '\u{2068}',
            '\u{2069}',
            '\u{2028}',
            '\u{2029}',
            '\u{200b}',
            '\u{2060}',
            '\u{feff}',
            '\u{ad}',
            '\u{e0041}',
        ] {
            let text = format!("a{c}b");
            let shown = [lines(&text), undeceptive(&text)].map(Cow::into_owned);
            for shown in shown.into_iter().chain([line(&text)]) {
                assert_eq!(shown, "a\u{fffd}b", "U+{:04X}", u32::from(c));
            }
        }
    }

    #[test]
    fn what_scripts_need_stays() {
        let persian = "می\u{200c}خواهم";
        let family = "\u{1f469}\u{200d}\u{1f467}";
        for text in ["Müller", persian, family, "עברית", "日本語"] {
            assert_eq!(line(text), text);
            assert!(matches!(lines(text), Cow::Borrowed(_)));
            assert!(matches!(undeceptive(text), Cow::Borrowed(_)));
        }
    }

    #[test]
    fn control_characters_are_replaced_and_line_breaks_only_where_there_may_be_none() {
        let text = "a\x1b[31m\nb\r\u{9b}";
        assert_eq!(line(text), "a\u{fffd}[31m\u{fffd}b\u{fffd}\u{fffd}");
        assert_eq!(lines(text), "a\u{fffd}[31m\nb\u{fffd}\u{fffd}");
        assert_eq!(undeceptive(text), text);
    }
}
