//! The forms that a call may have, and its answers.

use std::{
    future::{Ready, ready},
    pin::Pin,
};

use http::HeaderValue;
use http_body::{Body, Frame};
use proptest::{collection::vec, prelude::*};
use prost::{Message as _, encoding::encode_varint};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};
use tokio_util::sync::CancellationToken;
use tonic::{
    Code, Response,
    server::{Grpc, UnaryService},
    service::Routes,
};
use tonic_prost::ProstCodec;

use super::*;
use crate::{
    authz::{
        condense::MAX_KEPT,
        request::{NotAMessage, RequestError},
        testing::Message,
    },
    proto::auth::{CheckRequest, CheckResponse},
    sidecar::{
        grpc::connection::{MAX_STREAMS, Services, serve},
        testing::{ANSWER, Answered, Echo, Peer, check_request, framed, request},
    },
};

/// A request without a valid message, and the status of its answer.
struct Fault {
    name: &'static str,
    encoding: Option<&'static str>,
    frames: Vec<Bytes>,
    code: Code,
}

/// The method as a service of tonic. It answers with a status that no other code uses.
#[derive(Clone, Copy)]
struct Asked;

/// The body of a request to tonic.
struct Frames(std::vec::IntoIter<Bytes>);

const ASKED: Code = Code::Aborted;

impl UnaryService<CheckRequest> for Asked {
    type Response = CheckResponse;
    type Future = Ready<Result<Response<CheckResponse>, Status>>;

    fn call(&mut self, _: tonic::Request<CheckRequest>) -> Self::Future {
        ready(Err(Status::new(ASKED, "asked")))
    }
}

impl Body for Frames {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        Poll::Ready(self.get_mut().0.next().map(|data| Ok(Frame::data(data))))
    }
}

impl Fault {
    fn new(name: &'static str, code: Code, frames: impl IntoIterator<Item = Bytes>) -> Self {
        Self {
            name,
            encoding: None,
            frames: frames.into_iter().collect(),
            code,
        }
    }

    fn encoded(self, encoding: &'static str) -> Self {
        Self {
            encoding: Some(encoding),
            ..self
        }
    }

    fn head(&self) -> Request<()> {
        let mut head = check_request();
        if let Some(encoding) = self.encoding {
            let encoding = HeaderValue::from_static(encoding);
            head.headers_mut().insert("grpc-encoding", encoding);
        }
        head
    }

    /// Returns the status with which tonic answers it.
    async fn of_tonic(&self) -> (Code, String) {
        let codec = ProstCodec::<CheckResponse, CheckRequest>::default();
        let mut grpc = Grpc::new(codec).max_decoding_message_size(2 * MAX_KEPT);
        let request = self
            .head()
            .map(|()| Frames(self.frames.clone().into_iter()));
        let response = grpc.unary(Asked, request).await;
        let status = Status::from_header_map(response.headers()).expect("a status");
        (status.code(), status.message().to_owned())
    }
}

/// Returns a message with the given prefix.
fn with_prefix(flag: u8, length: usize, message: &[u8]) -> Bytes {
    let length = u32::try_from(length).expect("a small message");
    [&[flag][..], &length.to_be_bytes(), message]
        .concat()
        .into()
}

fn faults() -> Vec<Fault> {
    let message = framed(b"");
    vec![
        Fault::new("nothing", Code::Internal, []),
        Fault::new(
            "nothing at length",
            Code::Internal,
            [Bytes::new(), Bytes::new()],
        ),
        Fault::new("half a prefix", Code::Internal, [message.slice(..4)]),
        Fault::new(
            "half a message",
            Code::Internal,
            [with_prefix(0, 4, b"abc")],
        ),
        Fault::new("compressed", Code::Internal, [with_prefix(1, 3, b"abc")]),
        Fault::new(
            "compressed as identity",
            Code::Internal,
            [with_prefix(1, 3, b"abc")],
        )
        .encoded("identity"),
        Fault::new(
            "compressed by gzip",
            Code::Unimplemented,
            [with_prefix(1, 3, b"abc")],
        )
        .encoded("gzip"),
        Fault::new(
            "an unknown flag",
            Code::Internal,
            [with_prefix(2, 3, b"abc")],
        ),
        Fault::new(
            "half a large message",
            Code::Internal,
            [with_prefix(0, MAX_KEPT + 1, b"abc")],
        ),
        Fault::new(
            "half a message behind a whole one",
            Code::Internal,
            [message.clone(), message.slice(..4)],
        ),
        Fault::new(
            "an unknown flag behind a whole message",
            Code::Internal,
            [message, with_prefix(7, 0, b"")],
        ),
    ]
}

#[tokio::test]
async fn faults_have_the_status_that_tonic_gives_them() {
    for fault in faults() {
        let name = fault.name;
        let mut peer = Peer::connect(Routes::default()).await;
        let mut opened = peer.open(fault.head(), false).await;
        for frame in &fault.frames {
            opened.send(frame.clone());
        }
        opened.end();
        let answered = opened.answered().await;
        assert_eq!(answered.status, StatusCode::OK, "{name}");
        assert_eq!(answered.body, "", "{name}");
        assert_eq!(answered.grpc().0, fault.code, "{name}");
        assert_eq!(answered.grpc(), fault.of_tonic().await, "{name}");
        assert_eq!(peer.answer(b"next").await, Answered::to(b"next"), "{name}");
    }
}

#[tokio::test]
async fn a_client_learns_how_it_may_encode_messages() {
    let mut peer = Peer::connect(Routes::default()).await;
    let mut head = check_request();
    let gzip = HeaderValue::from_static("gzip");
    head.headers_mut().insert("grpc-encoding", gzip);
    let mut opened = peer.open(head.clone(), false).await;
    opened.send(with_prefix(1, 3, b"abc"));
    opened.end();
    let answered = opened.answered().await;
    assert_eq!(answered.headers["grpc-accept-encoding"], "identity");

    // A message that is not compressed can be read, whatever encoding the call announces.
    let mut opened = peer.open(head, false).await;
    opened.send(framed(b"plain"));
    opened.end();
    assert_eq!(opened.answered().await, Answered::to(b"plain"));
}

#[tokio::test]
async fn what_follows_a_message_is_left_alone_as_tonic_does() {
    let first = framed(b"");
    let second = framed(b"");
    let both: Bytes = [&first[..], &second].concat().into();
    for frames in [vec![both], vec![first, second]] {
        let two = Fault::new("two messages", ASKED, frames);
        assert_eq!(two.of_tonic().await.0, ASKED);
        let mut peer = Peer::connect(Routes::default()).await;
        let opened = peer.check(two.frames).await;
        assert_eq!(opened.answered().await, Answered::to(b""));
    }
}

#[tokio::test]
async fn a_check_is_kept_whole_up_to_a_size_and_read_as_it_arrives_above_it() {
    let mut peer = Peer::connect(Routes::default()).await;
    let message = vec![b'a'; MAX_KEPT];
    let answered = peer.answer(&message).await;
    assert!(answered == Answered::to(&message), "{:?}", answered.status);

    let small = Message::get("/").header("x-api-key", "K").joined();
    let small = small.encode_to_vec();
    for size in [MAX_KEPT + 1, 3 << 20] {
        // A field of the whole message that nobody reads.
        let mut large = small.clone();
        large.push(15 << 3 | 2);
        encode_varint(size as u64, &mut large);
        large.resize(large.len() + size, b'a');
        let answered = peer.answer(&large).await;
        assert_eq!(answered.grpc().0, Code::Ok);
        assert!(answered.body.len() < 2 * small.len(), "the field was kept");
        let kept = &answered.body[PREFIX + ANSWER.len()..];
        let kept = CheckRequest::decode(kept).expect("a check");
        assert_eq!(kept.encode_to_vec(), small);
    }
}

#[tokio::test]
async fn no_size_of_a_check_makes_a_grpc_error() {
    let mut peer = Peer::connect(Routes::default()).await;
    let large = Message::get("/").header("a", "b".repeat(MAX_KEPT)).joined();
    let nonsense = vec![b'a'; MAX_KEPT + 1];
    for (message, error) in [
        (large.encode_to_vec(), RequestError::TooLarge),
        (nonsense, RequestError::NotAMessage(NotAMessage)),
    ] {
        let answered = peer.answer(&message).await;
        assert_eq!(answered.grpc().0, Code::Ok);
        let text = String::from_utf8_lossy(&answered.body[PREFIX..]);
        assert_eq!(text, error.to_string());
    }
    assert_eq!(peer.answer(b"next").await, Answered::to(b"next"));
}

#[tokio::test]
async fn messages_behind_the_first_one_are_bounded() {
    let mut peer = Peer::connect(Routes::default()).await;
    let mut opened = peer.open(check_request(), false).await;
    for _ in 0..=MAX_KEPT / 5_005 {
        opened.send(framed(&[b'a'; 5_000]));
    }
    // The refusal comes although the call is not ended.
    assert_eq!(opened.answered().await.grpc().0, Code::OutOfRange);
    assert_eq!(peer.answer(b"next").await, Answered::to(b"next"));
}

#[tokio::test]
async fn what_is_no_grpc_call_is_refused_in_the_words_of_http() {
    let mut peer = Peer::connect(Routes::default()).await;
    let mut get = check_request();
    *get.method_mut() = Method::GET;
    let mut json = check_request();
    let value = HeaderValue::from_static("application/json");
    json.headers_mut().insert(header::CONTENT_TYPE, value);
    let mut untyped = check_request();
    untyped.headers_mut().remove(header::CONTENT_TYPE);
    for (request, status) in [
        (get, StatusCode::METHOD_NOT_ALLOWED),
        (json, StatusCode::UNSUPPORTED_MEDIA_TYPE),
        (untyped, StatusCode::UNSUPPORTED_MEDIA_TYPE),
    ] {
        let mut opened = peer.open(request, false).await;
        opened.send(framed(b"a check"));
        opened.end();
        let answered = opened.answered().await;
        assert_eq!(answered.status, status);
        assert_eq!(answered.body, "");
    }
    let mut with_format = check_request();
    let value = HeaderValue::from_static("application/grpc+proto");
    with_format
        .headers_mut()
        .insert(header::CONTENT_TYPE, value);
    let mut opened = peer.open(with_format, false).await;
    opened.send(framed(b"a check"));
    opened.end();
    assert_eq!(opened.answered().await, Answered::to(b"a check"));
}

#[tokio::test]
async fn other_paths_are_other_methods() {
    let mut peer = Peer::connect(Routes::default()).await;
    for path in [
        "/",
        "/envoy.service.auth.v3.Authorization/check",
        "/envoy.service.auth.v3.Authorization/Check/",
        "/envoy.service.auth.v2.Authorization/Check",
    ] {
        let mut opened = peer.open(request(path), false).await;
        opened.send(framed(b"a check"));
        opened.end();
        let answered = opened.answered().await;
        assert_eq!(
            answered.grpc(),
            (Code::Unimplemented, String::new()),
            "{path}"
        );
    }
}

/// Returns an HTTP/2 frame of stream 1, or of the connection.
fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("a small frame");
    let mut frame = length.to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags, 0, 0, 0, stream]);
    frame.extend(payload);
    frame
}

/// Returns a literal header field without indexing and with a new name (RFC 7541, section 6.2.2).
/// Both parts are short.
fn field(name: &str, value: &str) -> Vec<u8> {
    let mut field = vec![0];
    for text in [name, value] {
        field.push(u8::try_from(text.len()).expect("a short text"));
        field.extend(text.as_bytes());
    }
    field
}

/// Returns the bytes of a connection with one check, whose framed message arrives in `frames`.
fn conversation(frames: &[&[u8]]) -> Vec<u8> {
    let fields = [
        (":method", "POST"),
        (":scheme", "http"),
        (":path", PATH),
        ("content-type", "application/grpc"),
    ];
    let fields = fields.map(|(name, value)| field(name, value)).concat();
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    bytes.extend(frame(4, 0, 0, &[]));
    bytes.extend(frame(1, 4, 1, &fields));
    for data in frames {
        bytes.extend(frame(0, 0, 1, data));
    }
    bytes.extend(frame(0, 1, 1, &[]));
    bytes
}

/// Splits `bytes` into pieces at `cuts`.
fn split<'a>(bytes: &'a [u8], cuts: &[prop::sample::Index]) -> Vec<&'a [u8]> {
    let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(bytes.len() + 1)).collect();
    cuts.sort_unstable();
    let ends = cuts.iter().copied().chain([bytes.len()]);
    let begins = [0].into_iter().chain(cuts.iter().copied());
    begins
        .zip(ends)
        .map(|(begin, end)| &bytes[begin..end])
        .collect()
}

/// Writes a conversation piece by piece, so that each piece is read before the next, and returns
/// the body of the answer.
async fn converse(pieces: &[&[u8]]) -> Vec<u8> {
    let (mut client, server) = duplex(1 << 20);
    let services = Services::new(Arc::<Echo>::default(), Routes::default());
    let task = tokio::spawn(serve(
        server,
        services,
        MAX_STREAMS,
        CancellationToken::new(),
    ));
    for piece in pieces {
        client.write_all(piece).await.expect("it is open");
        tokio::task::yield_now().await;
    }
    let mut body = Vec::new();
    loop {
        let mut head = [0; 9];
        client.read_exact(&mut head).await.expect("it is open");
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let mut payload = vec![0; usize::try_from(length).expect("a small frame")];
        client.read_exact(&mut payload).await.expect("it is open");
        let (kind, flags, stream) = (head[3], head[4], head[8]);
        if stream == 1 && kind == 0 {
            body.extend(payload);
        }
        if stream == 1 && flags & 1 != 0 {
            break;
        }
    }
    task.abort();
    body
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn however_a_call_is_cut_its_answer_is_the_same(
        message in vec(any::<u8>(), 0..3_000),
        frames in vec(any::<prop::sample::Index>(), 0..12),
        writes in vec(any::<prop::sample::Index>(), 0..12),
    ) {
        // The prefix keeps the message apart from those that the handler treats specially.
        let message = [b"m", &message[..]].concat();
        let framed_message = framed(&message);
        let bytes = conversation(&split(&framed_message, &frames));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = runtime.expect("a runtime");
        let body = runtime.block_on(converse(&split(&bytes, &writes)));
        prop_assert_eq!(body, framed(&[ANSWER, &message].concat()));
    }
}
