//! The `cookie` header (RFC 6265, section 4.2): its pairs, and the header without some of them.

use super::query::split_at_first;

/// A pair, without the quotes around its value.
#[derive(Clone, Copy)]
pub(super) struct Cookie<'a> {
    pub(super) name: &'a [u8],
    pub(super) value: &'a [u8],
}

/// Returns the pairs of a header, in order.
pub(super) fn cookies(header: &[u8]) -> impl Iterator<Item = Cookie<'_>> {
    header.split(|b| *b == b';').map(Cookie::new)
}

/// Returns whether a pair with `name` is behind a comma. A proxy may have joined two `cookie`
/// headers with it, or the upstream may use a comma as a separator, as RFC 2965 did.
pub(super) fn hides(header: &[u8], name: &str) -> bool {
    header.split(|b| *b == b';').any(|pair| {
        pair.split(|b| *b == b',')
            .skip(1)
            .any(|part| part.contains(&b'=') && Cookie::new(part).name == name.as_bytes())
    })
}

/// Joins the headers into one (RFC 9113, section 8.2.3), without the pairs that `is_removed`
/// selects. Every other pair keeps its bytes. The result is empty if no pair is left.
pub(super) fn without<'a>(
    headers: impl Iterator<Item = &'a [u8]>,
    is_removed: impl Fn(&Cookie<'_>) -> bool,
) -> Vec<u8> {
    let mut rest = Vec::new();
    for header in headers {
        let mut separator: &[u8] = if rest.is_empty() { b"" } else { b"; " };
        let kept = header
            .split(|b| *b == b';')
            .filter(|pair| !is_removed(&Cookie::new(pair)));
        for pair in kept {
            let pair = if separator == b";" {
                pair
            } else {
                pair.trim_ascii_start()
            };
            rest.extend_from_slice(separator);
            rest.extend_from_slice(pair);
            separator = b";";
        }
    }
    if rest.trim_ascii().is_empty() {
        rest.clear();
    }
    rest
}

impl<'a> Cookie<'a> {
    fn new(pair: &'a [u8]) -> Self {
        let (name, value) = split_at_first(pair, b'=');
        let value = value.trim_ascii();
        let unquoted = value
            .strip_prefix(b"\"")
            .and_then(|value| value.strip_suffix(b"\""));
        Self {
            name: name.trim_ascii(),
            value: unquoted.unwrap_or(value),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn without_key(headers: &[&str]) -> String {
        let headers = headers.iter().map(|header| header.as_bytes());
        let rest = without(headers, |cookie| cookie.name == b"api_key");
        String::from_utf8(rest).expect("text")
    }

    #[test]
    fn a_cookie_is_found_with_quotes_and_spaces() {
        for header in [
            "api_key=K",
            "a=1; api_key=K; b=2",
            "a=1;api_key=\"K\"",
            "a; api_key = K ",
        ] {
            let found = cookies(header.as_bytes()).find(|cookie| cookie.name == b"api_key");
            assert_eq!(
                found.map(|cookie| cookie.value),
                Some(&b"K"[..]),
                "{header}"
            );
        }
    }

    #[test]
    fn a_cookie_behind_a_comma_is_noticed() {
        assert!(hides(b"a=1,api_key=K", "api_key"));
        assert!(hides(b"a=1, api_key=K; b=2", "api_key"));
        assert!(!hides(b"a=1,api_keys=K; b=2,3", "api_key"));
        assert!(!hides(b"api_key=K; b=2,api_key", "api_key"));
    }

    #[test]
    fn the_rest_of_the_header_stays_as_it_was() {
        for (headers, rest) in [
            (&["api_key=K"][..], ""),
            (&["api_key=K; b=\"2\""], "b=\"2\""),
            (&["a=1; api_key=K; b=2"], "a=1; b=2"),
            (&["a=1;api_key=K;  b=2;"], "a=1;  b=2;"),
            (&["a=1; b=2"], "a=1; b=2"),
            (&["a=1", "api_key=K", "b=2; c=3"], "a=1; b=2; c=3"),
            (&["api_key=K; "], ""),
        ] {
            assert_eq!(without_key(headers), rest, "{headers:?}");
        }
    }
}
