//! One call of `envoy.service.auth.v3.Authorization/Check`, over gRPC.
//!
//! A call whose message has arrived is answered immediately. A call that has to wait, for the rest
//! of its message or for a later answer, becomes a future. The `grpc-timeout` of a call limits the
//! wait for a later answer; an immediate answer is never too late.
//!
//! A call keeps what is needed of its headers, and not the headers: an Envoy that traces copies
//! `tracestate` there, which its client chooses.

use std::{
    future::poll_fn,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::{BufMut as _, Bytes, BytesMut};
use h2::{RecvStream, server::SendResponse};
use http::{HeaderMap, Method, Request, StatusCode, header};
use tonic::{Status, metadata::MetadataValue};

use super::{
    handler::{Answer, CheckHandler, metadata_of},
    message::{Incoming, Message, MessageError, PREFIX},
    reply::Reply,
};
use crate::authz::{LaterAnswer, Metadata};

/// A call, with the handler that answers it.
pub(super) struct Call<H> {
    handler: Arc<H>,
    metadata: Metadata,
    /// The encoding of compressed messages, shortened; none for `identity`.
    encoding: Option<String>,
    message: Incoming,
    reply: Reply,
}

/// A call whose answer is not known yet.
struct Later {
    answer: LaterAnswer,
    reply: Reply,
}

/// A call that waits.
pub(super) type Waiting = Pin<Box<dyn Future<Output = ()> + Send>>;

/// The path of the method.
pub(in crate::sidecar) const PATH: &str = "/envoy.service.auth.v3.Authorization/Check";
/// The beginning of the content type of every gRPC call.
const CONTENT_TYPE: &[u8] = b"application/grpc";
/// The reserved space for an answer, in bytes. Most answers fit.
const ROOM: usize = 1 << 10;

impl<H: CheckHandler> Call<H> {
    /// Accepts a request for [`PATH`]. A request that is not a gRPC call is refused, and none is
    /// returned.
    pub(super) fn take(
        handler: &Arc<H>,
        request: Request<RecvStream>,
        reply: SendResponse<Bytes>,
    ) -> Option<Self> {
        let (head, body) = request.into_parts();
        let reply = Reply::new(reply);
        if head.method != Method::POST {
            reply.refuse(StatusCode::METHOD_NOT_ALLOWED);
            return None;
        }
        let content_type = head.headers.get(header::CONTENT_TYPE);
        if !content_type.is_some_and(|value| value.as_bytes().starts_with(CONTENT_TYPE)) {
            reply.refuse(StatusCode::UNSUPPORTED_MEDIA_TYPE);
            return None;
        }
        Some(Self {
            handler: Arc::clone(handler),
            metadata: metadata_of(&head.headers),
            encoding: encoding_of(&head.headers),
            message: Incoming::new(body),
            reply,
        })
    }

    /// Answers the call, in space from `arena`, or returns the future of a call that waits.
    pub(super) fn answer(mut self, cx: &mut Context<'_>, arena: &mut BytesMut) -> Option<Waiting> {
        let Poll::Ready(message) = self.message.poll(cx) else {
            return Some(Box::pin(self.wait()));
        };
        let later = self.answer_to(message, arena)?;
        Some(Box::pin(later.answer()))
    }

    async fn wait(mut self) {
        let message = poll_fn(|cx| self.message.poll(cx)).await;
        if let Some(later) = self.answer_to(message, &mut BytesMut::new()) {
            later.answer().await;
        }
    }

    fn answer_to(
        self,
        message: Result<Message, MessageError>,
        arena: &mut BytesMut,
    ) -> Option<Later> {
        let message = match message {
            Ok(message) => message,
            Err(error) => {
                if let Some(status) = status(&error, self.encoding.as_deref()) {
                    self.reply.status(status);
                }
                return None;
            }
        };
        arena.reserve(ROOM);
        arena.put_bytes(0, PREFIX);
        let message = message.as_deref().map_err(|error| *error);
        match self.handler.check(message, self.metadata, arena) {
            Answer::Given => {
                self.reply.message(framed(arena));
                None
            }
            Answer::Later(answer) => {
                arena.clear();
                let reply = self.reply;
                Some(Later { answer, reply })
            }
        }
    }
}

impl Later {
    async fn answer(mut self) {
        let message = tokio::select! {
            message = self.answer => message,
            () = self.reply.taken_back() => return,
        };
        let mut arena = BytesMut::with_capacity(PREFIX + message.len());
        arena.put_bytes(0, PREFIX);
        arena.put(message);
        self.reply.message(framed(&mut arena));
    }
}

/// Splits a message off `arena`, where it follows the space for its prefix, and fills in the
/// prefix.
fn framed(arena: &mut BytesMut) -> Bytes {
    let length = u32::try_from(arena.len() - PREFIX).expect("an answer is far below 4 GiB");
    // The first byte is 0: the message is not compressed.
    arena[1..PREFIX].copy_from_slice(&length.to_be_bytes());
    arena.split().freeze()
}

/// Returns the encoding of compressed messages, at most 64 characters of it; none for `identity`.
fn encoding_of(headers: &HeaderMap) -> Option<String> {
    const MAX_LENGTH: usize = 64;

    let encoding = headers.get("grpc-encoding")?;
    let text = String::from_utf8_lossy(encoding.as_bytes());
    (text != "identity").then(|| text.chars().take(MAX_LENGTH).collect())
}

/// Returns the status for a call without a valid message; none if the client does not wait for it
/// any more.
fn status(error: &MessageError, encoding: Option<&str>) -> Option<Status> {
    match error {
        MessageError::TakenBack(_) => None,
        MessageError::TooLarge(_) => Some(Status::out_of_range(error.to_string())),
        MessageError::Compressed => {
            let identity = || Status::internal(error.to_string());
            Some(encoding.map_or_else(identity, unsupported))
        }
        MessageError::Missing | MessageError::Truncated | MessageError::UnknownFlag(_) => {
            Some(Status::internal(error.to_string()))
        }
    }
}

/// Returns the status for a compressed message. Its `grpc-accept-encoding` names the encoding that
/// the client may use instead.
fn unsupported(encoding: &str) -> Status {
    let text = format!("Content is compressed with `{encoding}` which isn't supported");
    let mut status = Status::unimplemented(text);
    let identity = MetadataValue::from_static("identity");
    status
        .metadata_mut()
        .insert("grpc-accept-encoding", identity);
    status
}

#[cfg(test)]
mod tests;
