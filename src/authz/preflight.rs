//! CORS preflights (Fetch Standard, "CORS-preflight fetch"): a browser asks whether it may send a
//! request. A preflight has no credentials, so that it can never present a key.

use http::HeaderName;

use super::{request::CheckInput, settings::folds_to};

/// Headers by which some upstreams replace the method of a request, in any spelling that a framework
/// could mistake for them. A preflight has none of them.
static METHOD_OVERRIDES: [HeaderName; 3] = [
    HeaderName::from_static("x-http-method-override"),
    HeaderName::from_static("x-http-method"),
    HeaderName::from_static("x-method-override"),
];

/// Returns whether a request is a preflight: `OPTIONS` with one `Origin` and one
/// `Access-Control-Request-Method`, and without a declared body. Another request must not pass as one.
pub(super) fn is_preflight(input: &CheckInput<'_>) -> bool {
    input.method() == b"OPTIONS"
        && has_one(input, "origin")
        && has_one(input, "access-control-request-method")
        && input.values("transfer-encoding").next().is_none()
        && input.values("content-length").all(|length| length == b"0")
        && !input.headers().any(|header| {
            let mut overrides = METHOD_OVERRIDES.iter();
            overrides.any(|name| folds_to(header.name, name))
        })
}

/// Returns whether a header occurs once, with one value.
fn has_one(input: &CheckInput<'_>, name: &str) -> bool {
    let mut values = input.values(name);
    let first = values.next();
    first.is_some_and(|value| !value.is_empty() && !value.contains(&b','))
        && values.next().is_none()
}

#[cfg(test)]
mod tests {
    use prost::Message as _;

    use super::*;
    use crate::authz::testing::Message;

    fn is_a_preflight(method: &'static str, headers: &[(&'static str, &'static str)]) -> bool {
        let headers = headers.iter();
        let message = headers.fold(
            Message::get("/orders").method(method),
            |message, (name, value)| message.header(*name, *value),
        );
        [message.joined(), message.raw()].iter().all(|request| {
            let request = request.encode_to_vec();
            is_preflight(&CheckInput::read(&request).expect("a request"))
        })
    }

    #[test]
    fn only_what_a_browser_sends_is_a_preflight() {
        const ORIGIN: (&str, &str) = ("origin", "https://app.example");
        const METHOD: (&str, &str) = ("access-control-request-method", "PUT");
        assert!(is_a_preflight("OPTIONS", &[ORIGIN, METHOD]));
        assert!(is_a_preflight(
            "OPTIONS",
            &[ORIGIN, METHOD, ("content-length", "0")]
        ));
        for (method, headers) in [
            ("GET", &[ORIGIN, METHOD][..]),
            ("options", &[ORIGIN, METHOD]),
            ("OPTIONS", &[ORIGIN]),
            ("OPTIONS", &[METHOD]),
            ("OPTIONS", &[ORIGIN, ORIGIN, METHOD]),
            ("OPTIONS", &[ORIGIN, METHOD, METHOD]),
            ("OPTIONS", &[ORIGIN, ("access-control-request-method", "")]),
            (
                "OPTIONS",
                &[ORIGIN, ("access-control-request-method", "PUT,GET")],
            ),
            ("OPTIONS", &[ORIGIN, METHOD, ("content-length", "7")]),
            (
                "OPTIONS",
                &[ORIGIN, METHOD, ("transfer-encoding", "chunked")],
            ),
            (
                "OPTIONS",
                &[ORIGIN, METHOD, ("x-http-method-override", "DELETE")],
            ),
            (
                "OPTIONS",
                &[ORIGIN, METHOD, ("X_Http.Method-Override", "DELETE")],
            ),
        ] {
            assert!(!is_a_preflight(method, headers), "{method} {headers:?}");
        }
    }
}
