//! The interface between connections and the code that answers their checks.

use std::time::Duration;

use bytes::BytesMut;
use http::HeaderMap;

use crate::{
    authz::{Authorizer, LaterAnswer, Metadata, request::RequestError},
    trace::TraceParent,
};

/// Answers the checks of all connections.
pub(in crate::sidecar) trait CheckHandler: Send + Sync + 'static {
    /// Answers `message`, a serialized `CheckRequest` that came with `metadata`: appends the
    /// serialized `CheckResponse` to `answer`, or leaves `answer` unchanged and answers later. It
    /// runs on a thread that answers other checks too, so it must not block. It must not keep a
    /// part of `message`: that would keep the whole buffer of the read in memory.
    ///
    /// Every message gets an answer, even if it is not valid. Envoy treats a gRPC error status as a
    /// failure, and may let the request pass then.
    fn check(
        &self,
        message: Result<&[u8], RequestError>,
        metadata: Metadata,
        answer: &mut BytesMut,
    ) -> Answer;
}

/// Whether a check is answered now or later.
pub(in crate::sidecar) enum Answer {
    /// The answer was appended.
    Given,
    /// The future returns the answer.
    Later(LaterAnswer),
}

impl CheckHandler for Authorizer {
    fn check(
        &self,
        message: Result<&[u8], RequestError>,
        metadata: Metadata,
        answer: &mut BytesMut,
    ) -> Answer {
        match self.answer(message, metadata, answer) {
            None => Answer::Given,
            Some(later) => Answer::Later(later),
        }
    }
}

/// Reads the headers of a call.
pub(super) fn metadata_of(headers: &HeaderMap) -> Metadata {
    Metadata {
        parent: parent_of(headers),
        timeout: timeout_of(headers),
    }
}

/// Returns the span of Envoy's own call, which Envoy sends in the metadata. The span in the
/// request's headers is the caller's.
fn parent_of(metadata: &HeaderMap) -> Option<TraceParent> {
    TraceParent::parse(metadata.get("traceparent")?.as_bytes())
}

/// Returns the time for which Envoy waits for the answer: `grpc-timeout`, at most eight digits and
/// a unit (gRPC's PROTOCOL-HTTP2, "Timeout").
fn timeout_of(metadata: &HeaderMap) -> Option<Duration> {
    let timeout = metadata.get("grpc-timeout")?.as_bytes();
    let (unit, digits) = timeout.split_last()?;
    if !matches!(digits.len(), 1..=8) || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let value: u64 = str::from_utf8(digits).ok()?.parse().ok()?;
    Some(match unit {
        b'H' => Duration::from_hours(value),
        b'M' => Duration::from_mins(value),
        b'S' => Duration::from_secs(value),
        b'm' => Duration::from_millis(value),
        b'u' => Duration::from_micros(value),
        b'n' => Duration::from_nanos(value),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use http::{HeaderName, HeaderValue};
    use prost::Message as _;

    use super::*;
    use crate::{
        authz::{
            CheckEvent, Observer,
            testing::{Message, keyrings, settings},
        },
        clock::Clock,
        key::{KeyId, Timestamp, testing},
        proto::auth::CheckResponse,
    };

    const OF_ENVOY: &str = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";

    /// An observer that stores the parent of each check.
    #[derive(Debug, Default)]
    struct Parents(Mutex<Vec<Option<TraceParent>>>);

    impl Observer for Parents {
        fn observe(&self, event: &CheckEvent<'_>) {
            self.0
                .lock()
                .expect("no test panics here")
                .push(event.parent);
        }
    }

    fn authorizer(observer: &Arc<Parents>) -> (Authorizer, String) {
        let secret = testing::secret(KeyId::generate().expect("the random source works"));
        let keyrings = keyrings(vec![testing::record_of(&secret)], true);
        let (clock, _) = Clock::manual(Timestamp::from_millis(5_000));
        let settings = Arc::new(settings());
        let observer = Arc::clone(observer);
        let authorizer = Authorizer::new(settings, &keyrings, clock, observer);
        (authorizer, secret.expose().to_owned())
    }

    #[test]
    fn a_check_is_answered_behind_what_is_there_and_told_of_with_its_parent() {
        let observer = Arc::default();
        let (authorizer, key) = authorizer(&observer);
        let message = Message::get("/").header("x-api-key", key).joined();
        let message = message.encode_to_vec();
        let parent = HeaderValue::from_static(OF_ENVOY);
        let with_parent = HeaderMap::from_iter([(HeaderName::from_static("traceparent"), parent)]);
        for metadata in [HeaderMap::new(), with_parent] {
            let mut answer = BytesMut::from("prefix");
            let given = authorizer.check(Ok(&message), metadata_of(&metadata), &mut answer);
            assert!(matches!(given, Answer::Given));
            let response = answer.strip_prefix(b"prefix").expect("it is left alone");
            let response = CheckResponse::decode(response).expect("a response");
            assert_eq!(response.status.map(|status| status.code), Some(0));
        }
        let told = observer.0.lock().expect("no test panics here").clone();
        assert_eq!(told, [None, TraceParent::parse(OF_ENVOY.as_bytes())]);
    }

    #[test]
    fn what_is_no_check_request_is_denied() {
        let observer = Arc::default();
        let (authorizer, _) = authorizer(&observer);
        let mut answer = BytesMut::new();
        let message = b"\xff";
        let given = authorizer.check(Ok(message), Metadata::default(), &mut answer);
        assert!(matches!(given, Answer::Given));
        let response = CheckResponse::decode(answer).expect("a response");
        let status = response.status.expect("a status");
        assert_eq!(status.message, "malformed_request");
        let told = observer.0.lock().expect("no test panics here").clone();
        assert_eq!(told, [None]);
    }

    #[test]
    fn the_timeout_of_a_call_is_read_as_grpc_writes_it() {
        let timeout = |text: &'static str| {
            let name = HeaderName::from_static("grpc-timeout");
            timeout_of(&HeaderMap::from_iter([(
                name,
                HeaderValue::from_static(text),
            )]))
        };
        for (text, expected) in [
            ("250m", Some(Duration::from_millis(250))),
            ("99999999n", Some(Duration::from_nanos(99_999_999))),
            ("7u", Some(Duration::from_micros(7))),
            ("2S", Some(Duration::from_secs(2))),
            ("3M", Some(Duration::from_mins(3))),
            ("99999999H", Some(Duration::from_hours(99_999_999))),
            ("0m", Some(Duration::ZERO)),
            ("m", None),
            ("1", None),
            ("1s", None),
            ("-1m", None),
            ("+1m", None),
            ("1.5S", None),
            ("123456789m", None),
            ("", None),
        ] {
            assert_eq!(timeout(text), expected, "{text}");
        }
        assert_eq!(timeout_of(&HeaderMap::new()), None);
    }
}
