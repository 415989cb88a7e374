//! The hand-written reader of a serialized `CheckRequest` gives the same result as the generated code.

use prost::Message as _;
use relatch::{
    authz::request::{CheckInput, RequestError},
    proto::auth::{AttributeContext, CheckRequest, HttpRequest},
};

/// Panics if the two differ.
pub(crate) fn holds(bytes: &[u8]) {
    let input = CheckInput::read(bytes);
    let Ok(generated) = CheckRequest::decode(bytes) else {
        let error = input.expect_err("the generated code refuses it");
        assert!(matches!(error, RequestError::NotAMessage(_)), "{error:?}");
        return;
    };
    let attributes = generated.attributes.unwrap_or_default();
    let http = attributes
        .request
        .as_ref()
        .and_then(|request| request.http.as_ref());
    match input {
        Err(RequestError::TooLarge) => panic!("only a message that was condensed is too large"),
        Err(RequestError::Original(_) | RequestError::RepeatedHeader) => {
            panic!("only a check over HTTP has an original request")
        }
        Ok(input) => compare(&input, &attributes, http.expect("it was read by hand")),
        Err(RequestError::NotAMessage(_)) => panic!("the generated code reads it"),
        Err(RequestError::NoHttpAttributes) => assert!(http.is_none()),
        Err(
            RequestError::BothEncodings
            | RequestError::TwoValues
            | RequestError::TooMany
            | RequestError::TooLong
            | RequestError::ImpossiblePath,
        ) => assert!(http.is_some()),
    }
}

fn compare(input: &CheckInput<'_>, attributes: &AttributeContext, http: &HttpRequest) {
    assert_eq!(input.method(), http.method);
    assert_eq!(input.path(), http.path);
    assert_eq!(input.host(), http.host);
    let source = attributes.source.as_ref();
    let source = source.and_then(|peer| peer.address.as_ref()?.socket_address.as_ref());
    let source = source.and_then(|socket| str::from_utf8(&socket.address).ok()?.parse().ok());
    assert_eq!(input.source(), source);

    let entries = http.headers.iter().map(|entry| (&entry.key, &entry.value));
    let raw = http.header_map.iter().flat_map(|map| &map.headers);
    let raw = raw.map(|header| {
        let is_raw = !header.raw_value.is_empty();
        (
            &header.key,
            if is_raw {
                &header.raw_value
            } else {
                &header.value
            },
        )
    });
    let mut headers = input.headers();
    for (name, value) in entries.chain(raw) {
        let header = headers.next().expect("a header is missing");
        assert_eq!((header.name, header.value), (&name[..], &value[..]));
    }
    assert!(headers.next().is_none(), "there is a header too many");

    let extensions = attributes.context_extensions.iter();
    let extensions = extensions.map(|entry| (&entry.key[..], &entry.value[..]));
    assert!(input.extensions().eq(extensions));
}
