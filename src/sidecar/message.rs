//! The message of a unary gRPC call, as it arrives.
//!
//! Five bytes precede a message: whether it is compressed, and its length (gRPC's PROTOCOL-HTTP2, "Length-Prefixed-Message").
//! A message that came within one DATA frame is handed on as it is, without a copy.

use std::{
    mem,
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, Bytes, BytesMut};
use h2::RecvStream;

use super::MAX_CHECK;

/// A message on its way in.
#[derive(Debug)]
pub(super) struct Incoming {
    body: RecvStream,
    gathered: Gathered,
}

/// There is no message that could be answered.
#[derive(Debug, thiserror::Error)]
pub(super) enum MessageError {
    /// The client takes the call back, or is gone.
    #[error("the call was cancelled")]
    TakenBack(#[from] h2::Error),
    /// There is none.
    #[error("Missing request message.")]
    Missing,
    /// The end comes within it.
    #[error("Unexpected EOF decoding stream.")]
    Truncated,
    /// It is larger than any check.
    #[error(
        "Error, decoded message length too large: found {0} bytes, the limit is: {MAX_CHECK} bytes"
    )]
    TooLarge(usize),
    /// It is compressed.
    #[error(
        "protocol error: received message with compressed-flag but no grpc-encoding was specified"
    )]
    Compressed,
    /// Neither compressed nor not.
    #[error(
        "protocol error: received message with invalid compression flag: {0} (valid flags are 0 and 1), while sending request"
    )]
    UnknownFlag(u8),
}

/// What has arrived. At most [`MAX_BODY`], whatever a prefix announces: room is made for what is there.
#[derive(Debug, Default)]
enum Gathered {
    #[default]
    Nothing,
    /// A DATA frame.
    Frame(Bytes),
    /// Several.
    Frames(BytesMut),
}

/// What precedes a message.
pub(super) const PREFIX: usize = 5;
/// A call has one message.
const MAX_BODY: usize = PREFIX + MAX_CHECK;

impl Incoming {
    /// The message that `body` brings.
    pub(super) const fn new(body: RecvStream) -> Self {
        Self {
            body,
            gathered: Gathered::Nothing,
        }
    }

    /// The message, once the client has sent all. A call should have one message; what follows it has to have the form of
    /// messages and is left alone.
    ///
    /// # Errors
    ///
    /// As soon as it is known that there will be none.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Bytes, MessageError>> {
        while let Some(data) = ready!(self.body.poll_data(cx)).transpose()? {
            let length = data.len();
            self.gathered.push(data);
            let gathered = self.gathered.as_slice();
            announced(gathered)?;
            if gathered.len() > MAX_BODY {
                return Poll::Ready(Err(MessageError::TooLarge(gathered.len() - PREFIX)));
            }
            if self.body.is_end_stream() {
                // What was not released is when the stream goes.
                break;
            }
            self.body.flow_control().release_capacity(length)?;
        }
        Poll::Ready(first_message(mem::take(&mut self.gathered).into()))
    }
}

impl Gathered {
    fn push(&mut self, data: Bytes) {
        if data.is_empty() {
            return;
        }
        *self = match mem::take(self) {
            Self::Nothing => Self::Frame(data),
            Self::Frame(first) => {
                let mut frames = BytesMut::with_capacity(first.len() + data.len());
                frames.extend_from_slice(&first);
                frames.extend_from_slice(&data);
                Self::Frames(frames)
            }
            Self::Frames(mut frames) => {
                frames.extend_from_slice(&data);
                Self::Frames(frames)
            }
        };
    }

    fn as_slice(&self) -> &[u8] {
        match self {
            Self::Nothing => &[],
            Self::Frame(frame) => frame,
            Self::Frames(frames) => frames,
        }
    }
}

impl From<Gathered> for Bytes {
    fn from(gathered: Gathered) -> Self {
        match gathered {
            Gathered::Nothing => Self::new(),
            Gathered::Frame(frame) => frame,
            Gathered::Frames(frames) => frames.freeze(),
        }
    }
}

/// The length that a prefix announces; none as long as it is not whole.
fn announced(bytes: &[u8]) -> Result<Option<usize>, MessageError> {
    let Some((&[flag, ref length @ ..], _)) = bytes.split_first_chunk::<PREFIX>() else {
        return Ok(None);
    };
    match flag {
        0 => {}
        1 => return Err(MessageError::Compressed),
        unknown => return Err(MessageError::UnknownFlag(unknown)),
    }
    let length = u32::from_be_bytes(*length);
    let length = usize::try_from(length).unwrap_or(usize::MAX);
    if length > MAX_CHECK {
        return Err(MessageError::TooLarge(length));
    }
    Ok(Some(length))
}

fn first_message(mut body: Bytes) -> Result<Bytes, MessageError> {
    if body.is_empty() {
        return Err(MessageError::Missing);
    }
    let first = split_message(&mut body)?;
    while !body.is_empty() {
        split_message(&mut body)?;
    }
    Ok(first)
}

fn split_message(body: &mut Bytes) -> Result<Bytes, MessageError> {
    let length = announced(body)?.ok_or(MessageError::Truncated)?;
    body.advance(PREFIX);
    if body.len() < length {
        return Err(MessageError::Truncated);
    }
    Ok(body.split_to(length))
}
