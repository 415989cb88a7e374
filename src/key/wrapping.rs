//! Text around a key that does not belong to it.

use std::fmt;

/// Text around a key that does not belong to it. Shells, configuration files and HTTP libraries add
/// it by mistake. The `Display` form is a predicate to "the key", and contains nothing of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wrapping {
    /// A word in front of the key, and its name if it is a usual scheme (RFC 9110, section 11.1).
    Scheme(Option<&'static str>),
    /// A quotation mark.
    Quotes,
    /// A line end, as such or as an escape.
    LineEnd,
}

/// The schemes that clients put before an API key.
const SCHEMES: [&str; 6] = ["Bearer", "Basic", "ApiKey", "Api-Key", "Token", "Key"];
/// The escapes of a line end in shells, in programs and in URLs, in lower case.
const ESCAPES: [&[u8]; 4] = [br"\n", br"\r", b"%0a", b"%0d"];

impl Wrapping {
    /// Returns what surrounds the key in `value`; none if nothing does.
    #[must_use]
    pub(crate) fn of(value: &[u8]) -> Option<Self> {
        let is_quote = |byte: Option<&u8>| byte.is_some_and(|byte| b"\"'`".contains(byte));
        let space = value.iter().position(|byte| matches!(byte, b' ' | b'\t'));
        if let Some((word, _)) = space.and_then(|at| value.split_at_checked(at))
            && !word.is_empty()
            && word
                .iter()
                .all(|byte| byte.is_ascii_alphabetic() || *byte == b'-')
        {
            let name = |scheme: &&str| scheme.as_bytes().eq_ignore_ascii_case(word);
            return Some(Self::Scheme(SCHEMES.into_iter().find(name)));
        }
        if is_quote(value.first()) || is_quote(value.last()) {
            return Some(Self::Quotes);
        }
        let ends_with = |escape: &[u8]| {
            let at = value.len().checked_sub(escape.len());
            at.is_some_and(|at| value[at..].eq_ignore_ascii_case(escape))
        };
        let has_line_end = value.iter().any(|byte| matches!(byte, b'\r' | b'\n'));
        (has_line_end || ESCAPES.into_iter().any(ends_with)).then_some(Self::LineEnd)
    }
}

impl fmt::Display for Wrapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Scheme(Some(scheme)) => {
                write!(f, "begins with the scheme {scheme}")
            }
            Self::Scheme(None) => f.write_str("has a word before it"),
            Self::Quotes => f.write_str("is in quotation marks"),
            Self::LineEnd => f.write_str("has a line end"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_surrounds_a_key_is_named() {
        use Wrapping::{LineEnd, Quotes, Scheme};

        for (value, wrapping) in [
            ("rlk_7Qm2Xc91TbKe_abc", None),
            ("", None),
            ("two'parts", None),
            ("a%0ab", None),
            ("Bearer rlk_7Qm2Xc91TbKe_abc", Some(Scheme(Some("Bearer")))),
            ("apikey\trlk_7Qm2Xc91TbKe_abc", Some(Scheme(Some("ApiKey")))),
            ("Hello rlk_7Qm2Xc91TbKe_abc", Some(Scheme(None))),
            ("rlk_7Qm2Xc91TbKe_abc d", None),
            ("\"rlk_7Qm2Xc91TbKe_abc\"", Some(Quotes)),
            ("'rlk_7Qm2Xc91TbKe_abc", Some(Quotes)),
            ("rlk_7Qm2Xc91TbKe_abc\r\n", Some(LineEnd)),
            (r"rlk_7Qm2Xc91TbKe_abc\n", Some(LineEnd)),
            ("rlk_7Qm2Xc91TbKe_abc%0D%0A", Some(LineEnd)),
        ] {
            assert_eq!(Wrapping::of(value.as_bytes()), wrapping, "{value:?}");
        }
    }
}
