//! One connection: it writes requests, reads answers, and follows the rules of HTTP/2 that servers require.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::{SocketAddr, TcpStream},
    os::fd::{AsFd, BorrowedFd},
};

use anyhow::{Context as _, Result, bail, ensure};

use super::{
    frame::{self, HEAD_LEN, Head, kind},
    traffic::{Reply, Traffic},
};

/// A connection to a server, and its requests without an answer.
#[derive(Debug)]
pub(crate) struct Connection {
    socket: TcpStream,
    buffer: Box<[u8]>,
    /// The number of received bytes in `buffer`.
    received: usize,
    /// The number of them that are already processed.
    taken: usize,
    outgoing: Vec<u8>,
    /// The number of bytes in `outgoing` that are already written.
    written: usize,
    /// The requests by their order on the connection: stream 1 is the first.
    streams: Vec<Stream>,
    under_way: usize,
    /// The most requests at the same time, as the server allows.
    max_under_way: usize,
    /// The number of bytes of DATA that the server still accepts on this connection.
    window: i64,
    /// The number of bytes of DATA since the last update of the window for the server.
    consumed: u32,
    reply: Reply,
    /// The DATA of the answer, if it is kept.
    kept: Option<Vec<u8>>,
}

/// A request, and the progress of its answer.
#[derive(Clone, Copy, Debug)]
struct Stream {
    /// The value that was passed in with the request.
    due: u64,
    has_fields: bool,
}

/// The size of the buffer in bytes: it has room for the answers to fifty requests, and for a frame of the largest length
/// without negotiation.
const BUFFER: usize = 128 << 10;
/// The window for the server, in bytes: more than it ever sends here.
const ROOM: u32 = 1 << 30;
/// The most requests for a server that does not set a limit: `h2` has none, and Envoy allows this many.
const UNBOUNDED: usize = i32::MAX as usize;
/// The initial window of a connection (RFC 9113, section 6.9.2).
const FIRST_WINDOW: i64 = 65_535;
const SETTINGS_MAX_CONCURRENT_STREAMS: u16 = 0x3;
const SETTINGS_INITIAL_WINDOW_SIZE: u16 = 0x4;

impl Connection {
    /// Connects, and sends the preface.
    ///
    /// # Errors
    ///
    /// When nothing listens there.
    pub(crate) fn open(address: SocketAddr, reply: Reply) -> Result<Self> {
        let socket =
            TcpStream::connect(address).with_context(|| format!("cannot connect to {address}"))?;
        socket.set_nodelay(true)?;
        socket.set_nonblocking(true)?;
        let mut outgoing = frame::PREFACE.to_vec();
        let [id, window] = [
            SETTINGS_INITIAL_WINDOW_SIZE.to_be_bytes().to_vec(),
            ROOM.to_be_bytes().to_vec(),
        ];
        frame::write(&mut outgoing, kind::SETTINGS, 0, 0, &[id, window].concat());
        frame::write(
            &mut outgoing,
            kind::WINDOW_UPDATE,
            0,
            0,
            &ROOM.to_be_bytes(),
        );
        Ok(Self {
            socket,
            buffer: vec![0; BUFFER].into(),
            received: 0,
            taken: 0,
            outgoing,
            written: 0,
            streams: Vec::new(),
            under_way: 0,
            max_under_way: UNBOUNDED,
            window: FIRST_WINDOW,
            consumed: 0,
            reply,
            kept: None,
        })
    }

    /// Keeps the DATA of answers from now on.
    pub(crate) fn keep(&mut self) {
        self.kept = Some(Vec::new());
    }

    /// The DATA that was kept.
    pub(crate) fn kept(self) -> Vec<u8> {
        self.kept.unwrap_or_default()
    }

    /// The number of requests that wait for their answer.
    pub(crate) const fn under_way(&self) -> usize {
        self.under_way
    }

    /// Whether the server accepts another request.
    pub(crate) fn has_room(&self, traffic: &Traffic) -> bool {
        let needed = i64::try_from(traffic.body_len()).expect("bodies are small");
        self.under_way < self.max_under_way && self.window >= needed
    }

    /// Whether there are bytes to write.
    pub(crate) const fn is_writing(&self) -> bool {
        self.written < self.outgoing.len()
    }

    /// Adds request `number` of `traffic` to the bytes to write. `due` is returned with the answer.
    pub(crate) fn ask(&mut self, traffic: &Traffic, number: u64, due: u64) {
        let stream =
            u32::try_from(2 * self.streams.len() + 1).expect("2^30 requests on one connection");
        let is_first = self.streams.is_empty();
        let body = traffic.write(number, is_first, stream, &mut self.outgoing);
        self.window -= i64::try_from(body).expect("bodies are small");
        self.streams.push(Stream {
            due,
            has_fields: false,
        });
        self.under_way += 1;
    }

    /// Writes as much as the socket accepts.
    ///
    /// # Errors
    ///
    /// When the server is gone.
    pub(crate) fn flush(&mut self) -> Result<()> {
        while self.is_writing() {
            match self.socket.write(&self.outgoing[self.written..]) {
                Ok(count) => self.written += count,
                Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(error).context("the server takes no more requests"),
            }
        }
        self.outgoing.clear();
        self.written = 0;
        Ok(())
    }

    /// Reads the available bytes, and calls `answered` with the `due` of each complete answer.
    ///
    /// # Errors
    ///
    /// When the server is gone, refuses a request, or gives an unexpected answer.
    pub(crate) fn receive(&mut self, mut answered: impl FnMut(u64)) -> Result<()> {
        match self.socket.read(&mut self.buffer[self.received..]) {
            Ok(0) => bail!("the server has closed the connection"),
            Ok(count) => self.received += count,
            Err(error)
                if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) =>
            {
                return Ok(());
            }
            Err(error) => return Err(error).context("the server answers no more"),
        }
        while let Some((head, end)) = self.next_frame() {
            let start = self.taken + HEAD_LEN;
            self.taken = end;
            if let Some(due) = self.take(head, start..end)? {
                answered(due);
            }
        }
        self.buffer.copy_within(self.taken..self.received, 0);
        self.received -= self.taken;
        self.taken = 0;
        if self.consumed > ROOM / 2 {
            let room = self.consumed.to_be_bytes();
            frame::write(&mut self.outgoing, kind::WINDOW_UPDATE, 0, 0, &room);
            self.consumed = 0;
        }
        Ok(())
    }

    /// The head of the next complete frame, and its end.
    fn next_frame(&self) -> Option<(Head, usize)> {
        let rest = &self.buffer[self.taken..self.received];
        let head = Head::read(rest.first_chunk()?);
        let len = HEAD_LEN + head.len;
        (rest.len() >= len).then_some((head, self.taken + len))
    }

    /// Handles one frame. If it ends an answer, returns the value that was passed in for it.
    fn take(&mut self, head: Head, payload: std::ops::Range<usize>) -> Result<Option<u64>> {
        let payload = &self.buffer[payload];
        match head.kind {
            kind::DATA => {
                ensure!(!head.has(frame::PADDED), "the server pads its frames");
                self.consumed += u32::try_from(head.len)?;
                if let Some(kept) = &mut self.kept {
                    kept.extend_from_slice(payload);
                }
                Ok(self.end(head))
            }
            kind::HEADERS => {
                ensure!(
                    head.has(frame::END_HEADERS) && !head.has(frame::PADDED),
                    "the server splits or pads its fields"
                );
                let stream = self
                    .streams
                    .get_mut(index(head.stream))
                    .context("nobody asked")?;
                if !stream.has_fields {
                    stream.has_fields = true;
                    ensure!(frame::is_ok(payload)?, "the answer is not 200");
                    // A gRPC error has no message, and therefore only one block of fields.
                    let is_empty = head.has(frame::END_STREAM);
                    ensure!(
                        !is_empty || self.reply == Reply::Page,
                        "the answer is a gRPC error"
                    );
                }
                Ok(self.end(head))
            }
            kind::SETTINGS if !head.has(frame::ACK) => {
                for setting in payload.chunks_exact(6) {
                    let [a, b, value @ ..] = setting else {
                        continue;
                    };
                    let value = u32::from_be_bytes(value.try_into()?);
                    match u16::from_be_bytes([*a, *b]) {
                        SETTINGS_MAX_CONCURRENT_STREAMS => {
                            self.max_under_way = usize::try_from(value)?.min(UNBOUNDED);
                        }
                        SETTINGS_INITIAL_WINDOW_SIZE => {
                            ensure!(
                                i64::from(value) >= FIRST_WINDOW,
                                "the server takes less than a request at a time"
                            );
                        }
                        // Optional features beyond those that every server must accept are not used.
                        _ => {}
                    }
                }
                frame::write(&mut self.outgoing, kind::SETTINGS, frame::ACK, 0, &[]);
                Ok(None)
            }
            kind::PING if !head.has(frame::ACK) => {
                let payload = payload.to_vec();
                frame::write(&mut self.outgoing, kind::PING, frame::ACK, 0, &payload);
                Ok(None)
            }
            kind::WINDOW_UPDATE => {
                if head.stream == 0 {
                    let more = u32::from_be_bytes(payload.try_into()?) & 0x7fff_ffff;
                    self.window += i64::from(more);
                }
                Ok(None)
            }
            kind::RST_STREAM => bail!("the server has reset a request"),
            kind::GOAWAY => bail!("the server ends the connection"),
            kind::PUSH_PROMISE | kind::CONTINUATION => bail!("a frame of type {} came", head.kind),
            // Answers to own frames, priorities, and frames that have to be ignored (RFC 9113, section 5.5).
            _ => Ok(None),
        }
    }

    fn end(&mut self, head: Head) -> Option<u64> {
        if !head.has(frame::END_STREAM) {
            return None;
        }
        self.under_way -= 1;
        self.streams
            .get(index(head.stream))
            .map(|stream| stream.due)
    }
}

impl AsFd for Connection {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// The index of a stream on its connection: clients use the odd numbers.
fn index(stream: u32) -> usize {
    usize::try_from(stream / 2).unwrap_or(usize::MAX)
}
