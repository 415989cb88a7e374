//! Text of other parties, made safe to show to people.
//!
//! A control character controls the terminal. Other characters deceive the reader: the
//! bidirectional controls show a line in another order than it is stored in (U+202E reverses the
//! rest of it), and invisible characters make two texts look the same or hide a text. All of them
//! are shown as U+FFFD in tables, sentences and text logs, and are refused in names. JSON is data
//! and is not changed.
//!
//! Some invisible characters stay, because scripts need them and they do not reorder anything: the
//! zero-width joiner and non-joiner (U+200C, U+200D) for Persian, Indic scripts and emoji, and the
//! variation selectors of emoji (U+FE00 to U+FE0F) and of Mongolian (U+180B to U+180D, U+180F).
//! They could imitate only a free text: identifiers are ASCII. The 240 other variation selectors
//! (U+E0100 to U+E01EF) do not stay: each can stand for a byte of a hidden text, and without them a
//! Japanese name is written with the usual form of its character. Spaces and visible format
//! characters also stay.

use std::borrow::Cow;

/// The character that replaces an unsafe one.
const REPLACEMENT: char = '\u{fffd}';

/// Whether `c` controls a terminal or deceives the reader.
pub(crate) fn is_unsafe(c: char) -> bool {
    c.is_control() || is_deceptive(c)
}

/// Returns `text` on one line, with every unsafe character replaced.
pub(crate) fn line(text: &str) -> String {
    let shown = |c| if is_unsafe(c) { REPLACEMENT } else { c };
    text.chars().map(shown).collect()
}

/// Returns `text` with its line breaks, and with every other unsafe character replaced.
pub(crate) fn lines(text: &str) -> Cow<'_, str> {
    let is_replaced = |c: char| c != '\n' && is_unsafe(c);
    if !text.contains(is_replaced) {
        return Cow::Borrowed(text);
    }
    // The capacity is reserved first, so that a growing string leaves no copy of a secret behind.
    let mut shown = String::with_capacity(text.len() * REPLACEMENT.len_utf8());
    shown.extend(
        text.chars()
            .map(|c| if is_replaced(c) { REPLACEMENT } else { c }),
    );
    Cow::Owned(shown)
}

/// Returns `text` with every deceptive character replaced. The caller must handle control
/// characters.
pub(crate) fn undeceptive(text: &str) -> Cow<'_, str> {
    if text.is_ascii() || !text.contains(is_deceptive) {
        return Cow::Borrowed(text);
    }
    Cow::Owned(text.replace(is_deceptive, "\u{fffd}"))
}

/// Whether `c` reorders or hides the characters beside it. By the Unicode properties, these are
/// line and paragraph separators, and `Default_Ignorable_Code_Point` except the characters that
/// scripts need (see the module); also the marks of annotations and the blank of Braille.
fn is_deceptive(c: char) -> bool {
    matches!(
        c,
        // The bidirectional controls: marks, embeddings, overrides and isolates.
        '\u{61c}' | '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}'
        // Line and paragraph separators.
        | '\u{2028}' | '\u{2029}'
        // Soft hyphen, combining grapheme joiner, Mongolian vowel separator, zero-width space, word joiner and the
        // invisible operators, the deprecated format characters, and the byte order mark.
        | '\u{ad}' | '\u{34f}' | '\u{180e}' | '\u{200b}' | '\u{2060}'..='\u{2065}' | '\u{206a}'..='\u{206f}' | '\u{feff}'
        // Reserved for invisible characters, and the marks of annotations.
        | '\u{fff0}'..='\u{fff8}' | '\u{fff9}'..='\u{fffb}'
        // Letters without a visible form: the fillers of Hangul, and the inherent vowels of Khmer.
        | '\u{115f}' | '\u{1160}' | '\u{3164}' | '\u{ffa0}' | '\u{17b4}' | '\u{17b5}'
        // The blank of Braille.
        | '\u{2800}'
        // The controls of shorthand and of musical notation.
        | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}'
        // Tags and the supplement of variation selectors, which can hide a whole text, and the
        // reserved characters beside them.
        | '\u{e0000}'..='\u{e0fff}'
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

    /// `Default_Ignorable_Code_Point` of Unicode: characters without a visible form.
    const IGNORABLE: [(u32, u32); 17] = [
        (0xad, 0xad),
        (0x34f, 0x34f),
        (0x61c, 0x61c),
        (0x115f, 0x1160),
        (0x17b4, 0x17b5),
        (0x180b, 0x180f),
        (0x200b, 0x200f),
        (0x202a, 0x202e),
        (0x2060, 0x206f),
        (0x3164, 0x3164),
        (0xfe00, 0xfe0f),
        (0xfeff, 0xfeff),
        (0xffa0, 0xffa0),
        (0xfff0, 0xfff8),
        (0x1bca0, 0x1bca3),
        (0x1d173, 0x1d17a),
        (0xe0000, 0xe0fff),
    ];

    #[test]
    fn every_ignorable_character_is_unsafe_except_those_that_scripts_need() {
        let needed = |c| matches!(c, 0x200c | 0x200d | 0x180b..=0x180d | 0x180f | 0xfe00..=0xfe0f);
        for (first, last) in IGNORABLE {
            for code in first..=last {
                let c = char::from_u32(code).expect("no surrogate is among them");
                assert_eq!(is_unsafe(c), !needed(code), "U+{code:04X}");
            }
        }
        assert!(is_unsafe('\u{2800}'), "the blank of Braille");
    }

    #[test]
    fn what_scripts_need_stays() {
        let persian = "می\u{200c}خواهم";
        let family = "\u{1f469}\u{200d}\u{1f467}";
        let heart = "\u{2764}\u{fe0f}";
        let mongolian = "\u{1820}\u{180b}";
        // A format character that is visible: the Arabic number sign.
        let numbered = "\u{600}\u{661}";
        for text in [
            "Müller",
            persian,
            family,
            heart,
            mongolian,
            numbered,
            "한글",
            "עברית",
            "日本語",
        ] {
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
