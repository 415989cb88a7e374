//! A connection whose handshake is complete.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{Buf as _, Bytes};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, ReadBuf};

/// The bytes of a TLS connection, of either side. It offers no vectored writes: HTTP/2 then joins
/// its frames, and they are sent in one record.
#[derive(Debug)]
pub(crate) struct TlsStream<S> {
    inner: tokio_rustls::TlsStream<S>,
    /// The bytes that [`hear`](Self::hear) has read.
    first: Bytes,
}

/// The size in bytes of the first read. HTTP/2 begins with the settings, which fit.
const FIRST: usize = 256;

impl<S: AsyncRead + AsyncWrite + Unpin> TlsStream<S> {
    pub(super) fn new(inner: tokio_rustls::TlsStream<S>) -> Self {
        Self {
            inner,
            first: Bytes::new(),
        }
    }

    /// Waits for the first bytes of the other side, and keeps them for the next read. Cancellation
    /// safe.
    ///
    /// # Errors
    ///
    /// When another message arrives first, such as the rejection of this side's certificate.
    pub(super) async fn hear(&mut self) -> io::Result<()> {
        let mut first = [0; FIRST];
        let read = self.inner.read(&mut first).await?;
        self.first = Bytes::copy_from_slice(&first[..read]);
        Ok(())
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for TlsStream<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.first.is_empty() {
            return Pin::new(&mut this.inner).poll_read(cx, buf);
        }
        let taken = this.first.len().min(buf.remaining());
        buf.put_slice(&this.first[..taken]);
        this.first.advance(taken);
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for TlsStream<S> {
    fn poll_write(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().inner).poll_write(cx, buf)
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().inner).poll_shutdown(cx)
    }
}
