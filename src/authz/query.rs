//! The query string of a request target: its parameters as they are spelled, and the target without
//! some of them.

use super::credential_value::CredentialValue;

/// A parameter, not decoded.
#[derive(Clone, Copy)]
pub(super) struct Parameter<'a> {
    pub(super) name: &'a [u8],
    pub(super) value: &'a [u8],
}

/// Returns the parameters of a target, in order.
pub(super) fn parameters(path: &[u8]) -> impl Iterator<Item = Parameter<'_>> {
    query_of(path)
        .into_iter()
        .flat_map(|query| query.split(|b| *b == b'&'))
        .map(Parameter::new)
}

/// Returns the target without the parameters that `is_removed` selects. All other parts keep their
/// bytes.
pub(super) fn without(path: &[u8], is_removed: impl Fn(&Parameter<'_>) -> bool) -> Vec<u8> {
    let Some(query) = query_of(path) else {
        return path.to_vec();
    };
    let mut rest = Vec::with_capacity(path.len());
    rest.extend_from_slice(&path[..path.len() - query.len() - 1]);
    let kept = query
        .split(|b| *b == b'&')
        .filter(|parameter| !is_removed(&Parameter::new(parameter)));
    for (at, parameter) in kept.enumerate() {
        rest.push(if at == 0 { b'?' } else { b'&' });
        rest.extend_from_slice(parameter);
    }
    rest
}

impl<'a> Parameter<'a> {
    fn new(parameter: &'a [u8]) -> Self {
        let (name, value) = split_at_first(parameter, b'=');
        Self { name, value }
    }

    /// Returns whether its name decodes to `name`.
    pub(super) fn is(&self, name: &str) -> bool {
        let decoded = Decode(self.name).map(|byte| match byte {
            Decoded::Plain(b'+') => b' ',
            Decoded::Plain(byte) | Decoded::Escaped(byte) => byte,
        });
        decoded.eq(name.bytes())
    }

    /// Decodes its value. A `+` stays a `+`: no key contains a space, but keys in base64 can
    /// contain a `+`.
    pub(super) fn decoded(&self) -> CredentialValue<'a> {
        if self.value.contains(&b'%') {
            let decoded = Decode(self.value).map(|byte| match byte {
                Decoded::Plain(byte) | Decoded::Escaped(byte) => byte,
            });
            CredentialValue::owned(decoded.collect())
        } else {
            CredentialValue::Borrowed(self.value)
        }
    }
}

/// Decodes percent escapes. An invalid escape stays unchanged.
struct Decode<'a>(&'a [u8]);

enum Decoded {
    Plain(u8),
    Escaped(u8),
}

impl Iterator for Decode<'_> {
    type Item = Decoded;

    fn next(&mut self) -> Option<Decoded> {
        if let [b'%', high, low, rest @ ..] = self.0
            && let (Some(high), Some(low)) = (hex(*high), hex(*low))
        {
            self.0 = rest;
            return Some(Decoded::Escaped(high << 4 | low));
        }
        let (byte, rest) = self.0.split_first()?;
        self.0 = rest;
        Some(Decoded::Plain(*byte))
    }
}

/// Decodes percent escapes once.
pub(super) fn percent_decoded(text: &[u8]) -> impl Iterator<Item = u8> {
    Decode(text).map(|byte| match byte {
        Decoded::Plain(byte) | Decoded::Escaped(byte) => byte,
    })
}

/// Splits `text` at the first `separator`. Without a separator, the second part is empty.
pub(super) fn split_at_first(text: &[u8], separator: u8) -> (&[u8], &[u8]) {
    match text.iter().position(|b| *b == separator) {
        Some(at) => (&text[..at], &text[at + 1..]),
        None => (text, &[]),
    }
}

fn query_of(path: &[u8]) -> Option<&[u8]> {
    path.iter()
        .position(|b| *b == b'?')
        .map(|at| &path[at + 1..])
}

const fn hex(digit: u8) -> Option<u8> {
    match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        b'A'..=b'F' => Some(digit - b'A' + 10),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn without_key(path: &str) -> String {
        let rest = without(path.as_bytes(), |parameter| parameter.is("api_key"));
        String::from_utf8(rest).expect("text")
    }

    #[test]
    fn a_parameter_is_found_in_every_spelling_of_its_name() {
        for name in ["api_key", "api%5Fkey", "api%5fkey", "%61pi_key"] {
            let path = format!("/?a=1&{name}=K");
            let found = parameters(path.as_bytes()).any(|parameter| parameter.is("api_key"));
            assert!(found, "{name} was not found");
        }
        for name in [
            "API_KEY",
            "api+key",
            "api_key%20",
            "api%255Fkey",
            "api%5key",
        ] {
            let path = format!("/?{name}=K");
            let found = parameters(path.as_bytes()).any(|parameter| parameter.is("api_key"));
            assert!(!found, "{name} was found");
        }
    }

    #[test]
    fn values_are_decoded_and_a_plus_stays() {
        let value = |path: &'static str| {
            let mut parameters = parameters(path.as_bytes());
            parameters
                .next()
                .expect("a parameter")
                .decoded()
                .as_bytes()
                .to_vec()
        };
        assert_eq!(value("/?k=a%2Bb+c"), b"a+b+c");
        assert_eq!(value("/?k=a=b"), b"a=b");
        assert_eq!(value("/?k=%zz%4"), b"%zz%4");
        assert_eq!(value("/?k"), b"");
    }

    #[test]
    fn the_rest_of_the_query_stays_as_it_was() {
        for (path, rest) in [
            ("/a?api_key=K", "/a"),
            ("/a?api%5Fkey=K&b=%7e+c", "/a?b=%7e+c"),
            ("/a?z=1&api_key=K&&b", "/a?z=1&&b"),
            ("/a?z=1&api_key", "/a?z=1"),
            ("/a?b=api_key=K", "/a?b=api_key=K"),
            ("/a?", "/a?"),
            ("/a", "/a"),
            ("/a?b?api_key=K", "/a?b?api_key=K"),
        ] {
            assert_eq!(without_key(path), rest, "{path}");
        }
    }
}
