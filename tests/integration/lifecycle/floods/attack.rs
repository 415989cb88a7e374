//! What a client can do to a server of HTTP/2.

use std::{io, net::SocketAddr};

use crate::support::{
    eventually::{DEADLINE, within},
    frames::{
        CONTINUATION, DATA, END_HEADERS, END_STREAM, Frames, HEADERS, PING, PRIORITY, RST_STREAM,
        SETTINGS, Said, UNKNOWN, WINDOW_UPDATE, call, frame,
    },
};

/// A flood: more of something than any honest client sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Flood {
    /// Calls that are reset as soon as they are begun (CVE-2023-44487).
    RapidReset,
    /// Headers that go on and on (CVE-2024-27316).
    Continuation,
    /// The same without a byte in them.
    EmptyContinuation,
    /// DATA frames without data on a call that does not end.
    EmptyData,
    /// DATA frames with one byte each.
    TinyData,
    Ping,
    Settings,
    /// Credit for the connection, a byte at a time.
    WindowUpdate,
    /// Credit of nothing, which is an error.
    NoWindowUpdate,
    Priority,
    /// Resets of one call, again and again.
    ResetAgain,
    /// Resets of calls that were never begun, which is an error.
    ResetUnbegun,
    /// Calls that are begun and left.
    Abandoned,
    /// One large header, which each call names many times by a single byte.
    HpackBomb,
    /// Frames of a type that nobody has defined.
    Unknown,
}

/// What is to become of an attack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Expected {
    /// The connection is closed with this error.
    Closed(u32),
    /// It is [`End::Borne`].
    Borne,
    /// What is taken as quickly as it comes is borne, and what piles up is not.
    Either,
}

/// What became of an attack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum End {
    /// The server has closed the connection. With which error does not arrive everywhere: what is still on its way to a
    /// closed connection has the kernel reset it.
    Closed(Option<u32>),
    /// The server took everything, and the connection is as good as any.
    Borne,
}

// RFC 9113, section 7.
const PROTOCOL_ERROR: u32 = 1;
pub(super) const ENHANCE_YOUR_CALM: u32 = 11;
const CANCEL: [u8; 4] = [0, 0, 0, 8];

/// Frames of a flood: more than any limit of ours, some seconds' work of a debug build.
const FRAMES: u32 = 30_000;
/// Frames that are sent at once.
const BATCH: u32 = 1_000;

impl Flood {
    pub(super) const ALL: [Self; 15] = [
        Self::RapidReset,
        Self::Continuation,
        Self::EmptyContinuation,
        Self::EmptyData,
        Self::TinyData,
        Self::Ping,
        Self::Settings,
        Self::WindowUpdate,
        Self::NoWindowUpdate,
        Self::Priority,
        Self::ResetAgain,
        Self::ResetUnbegun,
        Self::Abandoned,
        Self::HpackBomb,
        Self::Unknown,
    ];

    /// What is to become of it at a server that does with `resets` what is given.
    pub(super) const fn expected(self, resets: Expected) -> Expected {
        match self {
            Self::RapidReset => resets,
            Self::Continuation
            | Self::EmptyContinuation
            | Self::EmptyData
            | Self::TinyData
            | Self::Abandoned
            | Self::HpackBomb => Expected::Closed(ENHANCE_YOUR_CALM),
            Self::NoWindowUpdate | Self::ResetUnbegun => Expected::Closed(PROTOCOL_ERROR),
            Self::Ping
            | Self::Settings
            | Self::WindowUpdate
            | Self::Priority
            | Self::ResetAgain
            | Self::Unknown => Expected::Borne,
        }
    }

    /// Attacks `server` with calls of `path`, and reads what it says.
    pub(super) async fn run(self, server: SocketAddr, path: &str) -> End {
        let what = format!("{self:?} comes to an end");
        let said = within(2 * DEADLINE, &what, self.attack(server, path)).await;
        match said.expect("it listens") {
            Said { is_open: true, .. } => End::Borne,
            Said { goaway, .. } => End::Closed(goaway),
        }
    }

    async fn attack(self, server: SocketAddr, path: &str) -> io::Result<Said> {
        let mut connection = Frames::connect(server).await?;
        let first = self.first(path);
        let mut sent = connection.send(&first).await;
        for batch in 0..FRAMES / BATCH {
            if sent.is_err() {
                // It was closed.
                break;
            }
            let each = batch * BATCH..(batch + 1) * BATCH;
            let frames: Vec<u8> = each.flat_map(|at| self.frames(path, at)).collect();
            sent = connection.send(&frames).await;
        }
        Ok(connection.said().await)
    }

    /// What comes before the flood.
    fn first(self, path: &str) -> Vec<u8> {
        match self {
            Self::Continuation | Self::EmptyContinuation => frame(HEADERS, 0, 1, &call(path)),
            Self::EmptyData | Self::TinyData => frame(HEADERS, END_HEADERS, 1, &call(path)),
            Self::ResetAgain => {
                let begun = frame(HEADERS, END_HEADERS, 1, &call(path));
                [begun, frame(RST_STREAM, 0, 1, &CANCEL)].concat()
            }
            Self::HpackBomb => {
                // A header of 4,000 bytes, nearly all that the table holds (RFC 7541, section 6.2.1).
                let mut block = call(path);
                block.extend([0x40, 1, b'x', 0x7f, 0xa1, 0x1e]);
                block.extend([b'a'; 4_000]);
                frame(HEADERS, END_HEADERS | END_STREAM, 1, &block)
            }
            Self::RapidReset
            | Self::Ping
            | Self::Settings
            | Self::WindowUpdate
            | Self::NoWindowUpdate
            | Self::Priority
            | Self::ResetUnbegun
            | Self::Abandoned
            | Self::Unknown => Vec::new(),
        }
    }

    /// The frames number `at` of the flood.
    fn frames(self, path: &str, at: u32) -> Vec<u8> {
        let stream = 2 * at + 3;
        match self {
            Self::RapidReset => {
                let begun = frame(HEADERS, END_HEADERS, stream, &call(path));
                [begun, frame(RST_STREAM, 0, stream, &CANCEL)].concat()
            }
            // Each a header of its own.
            Self::Continuation => frame(CONTINUATION, 0, 1, b"\0\x01x\x03yes"),
            Self::EmptyContinuation => frame(CONTINUATION, 0, 1, b""),
            Self::EmptyData => frame(DATA, 0, 1, b""),
            Self::TinyData => frame(DATA, 0, 1, b"\0"),
            Self::Ping => frame(PING, 0, 0, b"and more"),
            Self::Settings => frame(SETTINGS, 0, 0, b""),
            Self::WindowUpdate => frame(WINDOW_UPDATE, 0, 0, &[0, 0, 0, 1]),
            Self::NoWindowUpdate => frame(WINDOW_UPDATE, 0, 0, &[0; 4]),
            Self::Priority => frame(PRIORITY, 0, stream, &[0, 0, 0, 1, 9]),
            Self::ResetAgain => frame(RST_STREAM, 0, 1, &CANCEL),
            Self::ResetUnbegun => frame(RST_STREAM, 0, stream, &CANCEL),
            Self::Abandoned => frame(HEADERS, END_HEADERS, stream, &call(path)),
            Self::HpackBomb => {
                // The newest entry of the table, number 62: 4 MB in 1,000 bytes.
                let block = [call(path), vec![0xbe; 1_000]].concat();
                frame(HEADERS, END_HEADERS | END_STREAM, stream, &block)
            }
            Self::Unknown => frame(UNKNOWN, 0, 0, b"what is this"),
        }
    }
}

impl Expected {
    pub(super) const fn is_met(self, end: End) -> bool {
        match (self, end) {
            (Self::Either, _)
            | (Self::Borne, End::Borne)
            | (Self::Closed(_), End::Closed(None)) => true,
            (Self::Closed(expected), End::Closed(Some(code))) => expected == code,
            (Self::Closed(_), End::Borne) | (Self::Borne, End::Closed(_)) => false,
        }
    }
}
