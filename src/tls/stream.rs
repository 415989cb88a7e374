//! A connection whose handshake is done.

use std::{
    io,
    pin::Pin,
    sync::{Arc, Mutex, PoisonError},
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::handshake::{HandshakeError, SERVER, tls_error};

/// Bytes over TLS, of either side. It offers no vectored writes: HTTP/2 then puts its frames together, and they leave in
/// one record.
#[derive(Debug)]
pub struct TlsStream<S> {
    inner: tokio_rustls::TlsStream<S>,
    complaint: Complaint,
}

/// Why the server ended a connection. In TLS 1.3 it judges a client's certificate after the client has begun to speak, so
/// that its verdict arrives as the first read fails; what is above tells that something broke, and not what. Cheap to
/// clone.
#[derive(Clone, Debug, Default)]
pub struct Complaint(Arc<Mutex<Heard>>);

#[derive(Debug, Default)]
struct Heard {
    /// What we have shown.
    certificate: Option<String>,
    error: Option<HandshakeError>,
}

impl<S> TlsStream<S> {
    pub(super) fn server(inner: tokio_rustls::server::TlsStream<S>) -> Self {
        Self {
            inner: inner.into(),
            complaint: Complaint::default(),
        }
    }

    pub(super) fn client(
        inner: tokio_rustls::client::TlsStream<S>,
        complaint: Complaint,
        certificate: Option<String>,
    ) -> Self {
        complaint.lock().certificate = certificate;
        Self {
            inner: inner.into(),
            complaint,
        }
    }
}

impl Complaint {
    /// What the server has said, once.
    #[must_use]
    pub fn take(&self) -> Option<HandshakeError> {
        self.lock().error.take()
    }

    fn hear(&self, error: &io::Error) {
        let Some(cause) = tls_error(error) else {
            return;
        };
        let error = io::Error::new(error.kind(), cause.clone());
        let mut heard = self.lock();
        let ours = heard.certificate.clone();
        heard.error = Some(HandshakeError::from_io(SERVER, error, None, ours));
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Heard> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncRead for TlsStream<S> {
    fn poll_read(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let read = Pin::new(&mut this.inner).poll_read(cx, buf);
        if let Poll::Ready(Err(error)) = &read {
            this.complaint.hear(error);
        }
        read
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
