//! One connection: writes requests, takes answers, and keeps the rules of HTTP/2 that a server insists on.

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

/// A connection to a server, and the requests that are under way on it.
#[derive(Debug)]
pub(crate) struct Connection {
    socket: TcpStream,
    buffer: Box<[u8]>,
    /// Of `buffer`, so many bytes were received.
    received: usize,
    /// Of those, so many are taken already.
    taken: usize,
    outgoing: Vec<u8>,
    /// Of `outgoing`, so many bytes are written already.
    written: usize,
    /// By their order on the connection: stream 1 is the first.
    streams: Vec<Stream>,
    under_way: usize,
    /// How many may be under way: what the server allows.
    max_under_way: usize,
    /// How many bytes of DATA the server still takes on this connection.
    window: i64,
    /// How many bytes of DATA came since the server was last given room.
    consumed: u32,
    reply: Reply,
    /// The DATA of the answer, where it is looked at.
    kept: Option<Vec<u8>>,
}

/// A request and how far its answer is.
#[derive(Clone, Copy, Debug)]
struct Stream {
    /// What was passed in with the request.
    due: u64,
    has_fields: bool,
}

/// Holds what a server writes at once to fifty requests, and a frame of the largest length that was not negotiated.
const BUFFER: usize = 128 << 10;
/// How much a server may send before it waits for room: more than it ever does here.
const ROOM: u32 = 1 << 30;
/// Of a server that does not say: `h2` has no bound of its own and Envoy allows as many.
const UNBOUNDED: usize = i32::MAX as usize;
/// The window of a connection that was not widened (RFC 9113, section 6.9.2).
const FIRST_WINDOW: i64 = 65_535;
const SETTINGS_MAX_CONCURRENT_STREAMS: u16 = 0x3;
const SETTINGS_INITIAL_WINDOW_SIZE: u16 = 0x4;

impl Connection {
    /// Connects, and announces itself.
    ///
    /// # Errors
    ///
    /// When nobody listens there.
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

    /// Keeps the DATA of what is answered from now on.
    pub(crate) fn keep(&mut self) {
        self.kept = Some(Vec::new());
    }

    /// The DATA that was kept.
    pub(crate) fn kept(self) -> Vec<u8> {
        self.kept.unwrap_or_default()
    }

    /// How many requests wait for their answer.
    pub(crate) const fn under_way(&self) -> usize {
        self.under_way
    }

    /// Whether the server takes one more request.
    pub(crate) fn has_room(&self, traffic: &Traffic) -> bool {
        let needed = i64::try_from(traffic.body_len()).expect("bodies are small");
        self.under_way < self.max_under_way && self.window >= needed
    }

    /// Whether something waits to be written.
    pub(crate) const fn is_writing(&self) -> bool {
        self.written < self.outgoing.len()
    }

    /// Appends request `number` of `traffic` to what is written next. `due` is handed back with the answer.
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

    /// Writes as much as the socket takes.
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

    /// Reads what has come, and calls `answered` with what was passed in as `due` for each answer that is whole.
    ///
    /// # Errors
    ///
    /// When the server is gone, refuses a request, or answers otherwise than with what is asked for.
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

    /// The head of the next frame that is whole, and where it ends.
    fn next_frame(&self) -> Option<(Head, usize)> {
        let rest = &self.buffer[self.taken..self.received];
        let head = Head::read(rest.first_chunk()?);
        let len = HEAD_LEN + head.len;
        (rest.len() >= len).then_some((head, self.taken + len))
    }

    /// Takes one frame; returns what was passed in for the answer that it ends.
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
                    // A gRPC error comes without a message, and thus in one block of fields.
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
                        // What a server may be sent beyond what every server must take is not used.
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
            // Answers to our own, priorities, and what is to be ignored (RFC 9113, section 5.5).
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

/// Where a stream stands among those of its connection: clients have the odd numbers.
fn index(stream: u32) -> usize {
    usize::try_from(stream / 2).unwrap_or(usize::MAX)
}
