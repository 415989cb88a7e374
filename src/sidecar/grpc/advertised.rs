//! The limit on streams that is announced to a client, which may open more until it reads that
//! limit.
//!
//! A client may open streams before it reads the server's SETTINGS (RFC 9113, section 3.4). An
//! Envoy with checks that wait for a connection sends all of them at once. `h2` refuses, from the
//! first byte, every stream above the limit that it announces, and Envoy turns a refused check into
//! an error for the consumer. So `h2` gets the higher limit, up to which streams are accepted, and
//! the SETTINGS announce the lower one.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf as _, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// A connection that replaces the limit on streams in the server's first frame, its SETTINGS, by
/// `streams`.
#[derive(Debug)]
pub(super) struct Advertised<S> {
    socket: S,
    streams: u32,
    first: First,
}

/// The progress of the first frame.
#[derive(Debug)]
enum First {
    /// The server has not written it yet.
    ToCome,
    /// The rest of it, which is not written to the socket yet.
    Begun(Bytes),
    /// All of it is written.
    Told,
}

/// The length of the head of a frame, in bytes: the length of the payload, a type, flags and the
/// stream (RFC 9113, section 4.1).
const HEAD: usize = 9;
/// The type of SETTINGS (RFC 9113, section 6.5).
const SETTINGS: u8 = 4;
/// The length of a setting, in bytes: two for its identifier, four for its value.
const SETTING: usize = 6;
/// `SETTINGS_MAX_CONCURRENT_STREAMS` (RFC 9113, section 6.5.2).
const MAX_CONCURRENT_STREAMS: [u8; 2] = [0, 3];

impl<S> Advertised<S> {
    /// Creates a connection over `socket` that announces `streams`.
    pub(super) const fn new(socket: S, streams: u32) -> Self {
        Self {
            socket,
            streams,
            first: First::ToCome,
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Advertised<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_read(cx, buf)
    }
}

/// Does not offer vectored writes, as [`Socket`](super::socket::Socket) does not.
impl<S: AsyncWrite + Unpin> AsyncWrite for Advertised<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let socket = Pin::new(&mut this.socket);
        if let First::ToCome = this.first {
            this.first = First::Begun(told(buf, this.streams)?);
        }
        let First::Begun(rest) = &mut this.first else {
            return socket.poll_write(cx, buf);
        };
        let written = ready!(socket.poll_write(cx, rest))?;
        rest.advance(written);
        if rest.is_empty() {
            this.first = First::Told;
        }
        Poll::Ready(Ok(written))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().socket).poll_shutdown(cx)
    }
}

/// Returns the SETTINGS frame at the beginning of `output`, with `streams` as the limit on streams.
///
/// # Errors
///
/// When `output` does not begin with a whole SETTINGS frame that has this limit.
fn told(output: &[u8], streams: u32) -> io::Result<Bytes> {
    let frame = || {
        let (head, rest) = output.split_first_chunk::<HEAD>()?;
        let [high, middle, low, kind, ..] = *head;
        let length = u32::from_be_bytes([0, high, middle, low]);
        let end = HEAD + usize::try_from(length).ok()?;
        let place = rest
            .chunks_exact(SETTING)
            .position(|setting| setting.starts_with(&MAX_CONCURRENT_STREAMS))?;
        let value = HEAD + place * SETTING + MAX_CONCURRENT_STREAMS.len();
        let mut frame = BytesMut::from(output.get(..end).filter(|_| kind == SETTINGS)?);
        frame
            .get_mut(value..value + size_of::<u32>())?
            .copy_from_slice(&streams.to_be_bytes());
        Some(frame.freeze())
    };
    frame().ok_or_else(|| io::Error::other("HTTP/2 does not start with a limit on streams"))
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, duplex};

    use super::*;

    /// Settings of a header list of 16 KiB and of 1,024 streams.
    const FRAME: &[u8] = &[
        0, 0, 12, SETTINGS, 0, 0, 0, 0, 0, 0, 6, 0, 0, 64, 0, 0, 3, 0, 0, 4, 0,
    ];

    /// Returns the bytes that a client reads if the server writes `output` and the system accepts
    /// `room` bytes at a time.
    async fn read(output: &[u8], room: usize) -> io::Result<Vec<u8>> {
        let (mut client, server) = duplex(room);
        let mut server = Advertised::new(server, 77);
        // The end of this block closes the connection, after an error too.
        let write = async move { server.write_all(output).await };
        let mut input = Vec::new();
        let (written, read) = tokio::join!(write, client.read_to_end(&mut input));
        written.and(read)?;
        Ok(input)
    }

    #[tokio::test]
    async fn the_first_settings_tell_of_other_streams_and_nothing_else_changes() {
        // A second frame of the same form does not change.
        let output = [FRAME, b"what follows", FRAME].concat();
        let mut expected = output.clone();
        expected[FRAME.len() - 4..FRAME.len()].copy_from_slice(&[0, 0, 0, 77]);
        for room in [1, 4, FRAME.len() - 3, FRAME.len(), 1 << 10] {
            let input = read(&output, room).await.expect("it is written");
            assert_eq!(input, expected, "{room} bytes at a time");
        }
    }

    #[tokio::test]
    async fn what_does_not_begin_with_settings_of_streams_is_an_error() {
        let mut other_kind = FRAME.to_vec();
        other_kind[3] = SETTINGS + 1;
        let mut beyond = FRAME.to_vec();
        beyond[2] = 6;
        for output in [
            &other_kind,
            &beyond,
            &FRAME[..FRAME.len() - 1],
            &FRAME[..HEAD],
        ] {
            let error = read(output, 1 << 10).await;
            let error = error.expect_err("there are no such settings");
            assert_eq!(error.kind(), io::ErrorKind::Other, "{output:?}");
        }
    }
}
