//! Relays calls of other methods than `Check` to tonic, mainly gRPC health.
//!
//! These calls are few. Their bodies are passed on piece by piece, within the windows of flow
//! control. A call ends when the client cancels it.

use std::{
    future::poll_fn,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream, server::SendResponse};
use http::{HeaderMap, Request, Response};
use http_body::{Body, Frame};
use tonic::service::Routes;
use tower::ServiceExt as _;

/// The body of a request, as tonic reads it.
struct RequestBody {
    stream: RecvStream,
    has_data: bool,
}

/// Relays `request` to `routes` and its response to `reply`.
pub(super) async fn relay(
    routes: Routes,
    request: Request<RecvStream>,
    mut reply: SendResponse<Bytes>,
) {
    let request = request.map(RequestBody::new);
    let response = tokio::select! {
        Ok(response) = routes.oneshot(request) => response,
        _reason = poll_fn(|cx| reply.poll_reset(cx)) => return,
    };
    let relayed = respond(response, reply).await;
    if let Err(error) = relayed {
        tracing::debug!(
            error = &error as &dyn std::error::Error,
            "a call was cancelled before its end"
        );
    }
}

async fn respond(
    response: Response<tonic::body::Body>,
    mut reply: SendResponse<Bytes>,
) -> Result<(), h2::Error> {
    let (head, mut body) = response.into_parts();
    let head = Response::from_parts(head, ());
    if body.is_end_stream() {
        return reply.send_response(head, true).map(drop);
    }
    let mut stream = reply.send_response(head, false)?;
    loop {
        let frame = tokio::select! {
            frame = poll_fn(|cx| Pin::new(&mut body).poll_frame(cx)) => frame,
            reason = poll_fn(|cx| stream.poll_reset(cx)) => return Err(reason?.into()),
        };
        match frame.transpose() {
            Ok(Some(frame)) => match frame.into_data() {
                Ok(data) => send(&mut stream, data).await?,
                Err(frame) => {
                    return stream.send_trailers(frame.into_trailers().unwrap_or_default());
                }
            },
            Ok(None) => return stream.send_data(Bytes::new(), true),
            Err(_status) => {
                stream.send_reset(Reason::INTERNAL_ERROR);
                return Ok(());
            }
        }
    }
}

/// Sends `data` in pieces, as soon as the client's window has room for them.
async fn send(stream: &mut SendStream<Bytes>, mut data: Bytes) -> Result<(), h2::Error> {
    while !data.is_empty() {
        stream.reserve_capacity(data.len());
        let room = poll_fn(|cx| stream.poll_capacity(cx)).await;
        let Some(room) = room.transpose()? else {
            return Err(Reason::CANCEL.into());
        };
        stream.send_data(data.split_to(room.min(data.len())), false)?;
    }
    Ok(())
}

impl RequestBody {
    const fn new(stream: RecvStream) -> Self {
        Self {
            stream,
            has_data: true,
        }
    }

    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Bytes, h2::Error>>> {
        let Some(data) = ready!(self.stream.poll_data(cx)).transpose()? else {
            self.has_data = false;
            return Poll::Ready(None);
        };
        self.stream.flow_control().release_capacity(data.len())?;
        Poll::Ready(Some(Ok(data)))
    }
}

impl Body for RequestBody {
    type Data = Bytes;
    type Error = h2::Error;

    fn poll_frame(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, h2::Error>>> {
        let body = self.get_mut();
        if body.has_data
            && let Some(data) = ready!(body.poll_data(cx))
        {
            return Poll::Ready(Some(data.map(Frame::data)));
        }
        let trailers: Result<Option<HeaderMap>, _> = ready!(body.stream.poll_trailers(cx));
        Poll::Ready(
            trailers
                .transpose()
                .map(|trailers| trailers.map(Frame::trailers)),
        )
    }

    fn is_end_stream(&self) -> bool {
        self.stream.is_end_stream()
    }
}

#[cfg(test)]
mod tests;
