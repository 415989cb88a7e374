//! HTTP/1.1 on a socket, byte for byte: what client and upstream share.
//!
//! Names keep their case, values their bytes, and headers their order, which no ordinary library leaves alone.

use std::{io, net::SocketAddr};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

/// One end of an HTTP/1.1 connection.
#[derive(Debug)]
pub(crate) struct Wire {
    stream: TcpStream,
    /// Read from the socket and not yet taken.
    received: Vec<u8>,
}

/// Header lines in the order in which they stood.
pub(crate) type Headers = Vec<(String, Vec<u8>)>;

/// The most header lines of a message: more than Envoy lets through by default (100).
pub(crate) const MAX_HEADERS: usize = 128;

/// The longest head: twice what Envoy lets through by default (60 KiB).
const MAX_HEAD: usize = 128 * 1024;

impl Wire {
    pub(crate) const fn new(stream: TcpStream) -> Self {
        Self {
            stream,
            received: Vec::new(),
        }
    }

    pub(crate) fn peer(&self) -> io::Result<SocketAddr> {
        self.stream.peer_addr()
    }

    pub(crate) async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes).await
    }

    /// The next start line and headers with the blank line after them; `None` when the peer has closed instead.
    pub(crate) async fn head(&mut self) -> io::Result<Option<Vec<u8>>> {
        loop {
            if let Some(at) = find(&self.received, b"\r\n\r\n") {
                return Ok(Some(self.received.drain(..at + 4).collect()));
            }
            if self.received.len() > MAX_HEAD {
                return Err(malformed("the head is too long"));
            }
            if !self.read().await? {
                return if self.received.is_empty() {
                    Ok(None)
                } else {
                    Err(io::ErrorKind::UnexpectedEof.into())
                };
            }
        }
    }

    /// The body that `headers` announce; without an announcement it is empty.
    pub(crate) async fn body(&mut self, headers: &Headers) -> io::Result<Vec<u8>> {
        let value_of = |wanted: &str| {
            let mut values = headers
                .iter()
                .filter(|(name, _)| name.eq_ignore_ascii_case(wanted));
            values.next().map(|(_, value)| value.as_slice())
        };
        if value_of("transfer-encoding").is_some_and(|value| value.eq_ignore_ascii_case(b"chunked"))
        {
            return self.chunks().await;
        }
        match value_of("content-length") {
            Some(length) => {
                let length = number(length, 10)?;
                self.take(length).await
            }
            None => Ok(Vec::new()),
        }
    }

    async fn chunks(&mut self) -> io::Result<Vec<u8>> {
        let mut body = Vec::new();
        loop {
            let line = self.line().await?;
            let size = line.split(|byte| *byte == b';').next().unwrap_or_default();
            let size = number(size, 16)?;
            if size == 0 {
                while !self.line().await?.is_empty() {}
                return Ok(body);
            }
            body.extend(self.take(size).await?);
            if !self.line().await?.is_empty() {
                return Err(malformed("a chunk is longer than it says"));
            }
        }
    }

    async fn line(&mut self) -> io::Result<Vec<u8>> {
        loop {
            if let Some(at) = find(&self.received, b"\r\n") {
                let mut line: Vec<u8> = self.received.drain(..at + 2).collect();
                line.truncate(at);
                return Ok(line);
            }
            self.read_more().await?;
        }
    }

    async fn take(&mut self, length: usize) -> io::Result<Vec<u8>> {
        while self.received.len() < length {
            self.read_more().await?;
        }
        Ok(self.received.drain(..length).collect())
    }

    async fn read_more(&mut self) -> io::Result<()> {
        if self.read().await? {
            Ok(())
        } else {
            Err(io::ErrorKind::UnexpectedEof.into())
        }
    }

    async fn read(&mut self) -> io::Result<bool> {
        Ok(self.stream.read_buf(&mut self.received).await? > 0)
    }
}

/// Copies parsed header lines out of the buffer that they borrow.
pub(crate) fn owned(headers: &[httparse::Header<'_>]) -> Headers {
    let line = |header: &httparse::Header<'_>| (header.name.to_owned(), header.value.to_vec());
    headers.iter().map(line).collect()
}

/// An error for bytes that are no HTTP/1.1.
pub(crate) fn malformed(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_owned())
}

fn number(digits: &[u8], radix: u32) -> io::Result<usize> {
    let digits = str::from_utf8(digits).map_err(|_| malformed("a length is not a number"))?;
    usize::from_str_radix(digits.trim(), radix).map_err(|_| malformed("a length is not a number"))
}

fn find(haystack: &[u8], needle: &[u8]) -> Option<usize> {
    haystack
        .windows(needle.len())
        .position(|window| window == needle)
}
