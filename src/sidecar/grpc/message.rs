//! The incoming message of a unary gRPC call.
//!
//! Five bytes precede a message: one for the compression flag, four for the length (gRPC's
//! PROTOCOL-HTTP2, "Length-Prefixed-Message"). A message within one DATA frame is passed on without
//! a copy. Of a message that is too large to be kept, only what a decision needs is kept.

use std::{
    mem,
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, Bytes, BytesMut};
use h2::RecvStream;

use crate::authz::{
    condense::{Condenser, MAX_KEPT},
    request::RequestError,
};

/// A message that is being received.
#[derive(Debug)]
pub(super) struct Incoming {
    body: RecvStream,
    gathered: Gathered,
    /// Instead of `gathered`, if the message is larger than [`MAX_KEPT`].
    condenser: Option<Box<Condenser>>,
}

/// A serialized `CheckRequest`; of a large one, the fields that a decision needs. An error is
/// answered with a denial.
pub(super) type Message = Result<Bytes, RequestError>;

/// The reason why there is no message to answer. The texts that a client receives are those of
/// tonic.
#[derive(Debug, thiserror::Error)]
pub(super) enum MessageError {
    /// The client has cancelled the call, or the connection is closed.
    #[error("the call was cancelled")]
    TakenBack(#[from] h2::Error),
    /// The call has ended without a message.
    #[error("Missing request message.")]
    Missing,
    /// The call has ended inside a message.
    #[error("Unexpected EOF decoding stream.")]
    Truncated,
    /// Further messages follow the first one, and have more than [`MAX_KEPT`] bytes with it. The
    /// value is the number of bytes.
    #[error(
        "Error, decoded message length too large: found {0} bytes, the limit is: {MAX_KEPT} bytes"
    )]
    TooLarge(usize),
    /// The message is compressed.
    #[error(
        "protocol error: received message with compressed-flag but no grpc-encoding was specified"
    )]
    Compressed,
    /// The compression flag is neither 0 nor 1.
    #[error(
        "protocol error: received message with invalid compression flag: {0} (valid flags are 0 and 1), while sending request"
    )]
    UnknownFlag(u8),
}

/// The bytes that have arrived. Memory is allocated only for these bytes, whatever length a prefix
/// announces, and a body above [`MAX_BODY`] is refused.
#[derive(Debug, Default)]
enum Gathered {
    #[default]
    Nothing,
    /// One DATA frame.
    Frame(Bytes),
    /// Several DATA frames.
    Frames(BytesMut),
}

/// The length of the prefix before a message, in bytes.
pub(super) const PREFIX: usize = 5;
/// The maximum size of a body that is gathered, in bytes: one message with its prefix.
const MAX_BODY: usize = PREFIX + MAX_KEPT;

impl Incoming {
    /// Creates the receiver of the message in `body`.
    pub(super) const fn new(body: RecvStream) -> Self {
        Self {
            body,
            gathered: Gathered::Nothing,
            condenser: None,
        }
    }

    /// Receives the message. It is ready when the client has sent the whole body. A call should
    /// have one message. Further messages must be well formed and are ignored.
    ///
    /// # Errors
    ///
    /// As soon as it is certain that there is no valid message.
    pub(super) fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<Message, MessageError>> {
        while let Some(data) = ready!(self.body.poll_data(cx)).transpose()? {
            let length = data.len();
            self.push(data)?;
            if self.body.is_end_stream() {
                // The capacity of the last frame is released with the stream.
                break;
            }
            self.body.flow_control().release_capacity(length)?;
        }
        Poll::Ready(match self.condenser.take() {
            Some(condenser) if condenser.is_complete() => Ok(condenser.finish()),
            Some(_) => Err(MessageError::Truncated),
            None => first_message(mem::take(&mut self.gathered).into()).map(Ok),
        })
    }

    fn push(&mut self, data: Bytes) -> Result<(), MessageError> {
        if let Some(condenser) = &mut self.condenser {
            condenser.push(&data);
            return Ok(());
        }
        self.gathered.push(data);
        let gathered = self.gathered.as_slice();
        match announced(gathered)? {
            Some(length) if length > MAX_KEPT => {
                let mut condenser = Box::new(Condenser::new(length));
                condenser.push(&gathered[PREFIX..]);
                self.gathered = Gathered::Nothing;
                self.condenser = Some(condenser);
                Ok(())
            }
            Some(_) | None if gathered.len() > MAX_BODY => {
                Err(MessageError::TooLarge(gathered.len() - PREFIX))
            }
            Some(_) | None => Ok(()),
        }
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

/// Returns the length that a prefix announces; none until the prefix is complete.
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
    Ok(Some(usize::try_from(length).unwrap_or(usize::MAX)))
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
