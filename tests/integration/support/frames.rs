//! HTTP/2 frame by frame (RFC 9113): what a client sends that no library would.

use std::{io, net::SocketAddr};

use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    task::JoinHandle,
};

/// A connection on which the client may do as it likes. What the server says is read all the while.
#[derive(Debug)]
pub(crate) struct Frames {
    writer: OwnedWriteHalf,
    reader: JoinHandle<Said>,
}

/// What a server said until the connection ended, or until it answered the last ping.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Said {
    /// The error code of its GOAWAY.
    pub(crate) goaway: Option<u32>,
    /// It has answered [`LAST_PING`]: it took everything that was sent.
    pub(crate) is_open: bool,
}

pub(crate) const DATA: u8 = 0;
pub(crate) const HEADERS: u8 = 1;
pub(crate) const PRIORITY: u8 = 2;
pub(crate) const RST_STREAM: u8 = 3;
pub(crate) const SETTINGS: u8 = 4;
pub(crate) const PING: u8 = 6;
pub(crate) const GOAWAY: u8 = 7;
pub(crate) const WINDOW_UPDATE: u8 = 8;
pub(crate) const CONTINUATION: u8 = 9;
/// A type that nobody has defined.
pub(crate) const UNKNOWN: u8 = 0xf0;

pub(crate) const ACK: u8 = 1;
pub(crate) const END_STREAM: u8 = 1;
pub(crate) const END_HEADERS: u8 = 4;

/// What a client says first, with settings that change nothing.
pub(crate) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
/// What the ping says that is sent last.
const LAST_PING: &[u8; 8] = b"the last";

impl Frames {
    /// Connects, and says what a client says first.
    pub(crate) async fn connect(server: SocketAddr) -> io::Result<Self> {
        let stream = TcpStream::connect(server).await?;
        let (reader, mut writer) = stream.into_split();
        writer.write_all(PREFACE).await?;
        Ok(Self {
            writer,
            reader: tokio::spawn(listen(reader)),
        })
    }

    /// Sends frames.
    pub(crate) async fn send(&mut self, frames: &[u8]) -> io::Result<()> {
        self.writer.write_all(frames).await
    }

    /// Asks whether everything was taken, and waits for that or for the end of the connection.
    pub(crate) async fn said(mut self) -> Said {
        // It fails when the server has closed the connection, of which the reader knows more.
        let _ = self.send(&frame(PING, 0, 0, LAST_PING)).await;
        self.reader.await.expect("the reader does not panic")
    }
}

/// A frame.
pub(crate) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).expect("a frame is short");
    let mut frame = length.to_be_bytes()[1..].to_vec();
    frame.extend([kind, flags]);
    frame.extend(stream.to_be_bytes());
    frame.extend(payload);
    frame
}

/// The headers of a gRPC call of `path` (RFC 7541), without their frame.
pub(crate) fn call(path: &str) -> Vec<u8> {
    // `:method: POST` and `:scheme: http` stand in the table; the others have their names there.
    let mut block = vec![0x83, 0x86];
    for (name, value) in [
        (&[0x04][..], path),
        (&[0x01], "localhost"),
        (&[0x0f, 0x10], "application/grpc"),
    ] {
        block.extend(name);
        block.push(u8::try_from(value.len()).expect("a value is short"));
        block.extend(value.as_bytes());
    }
    block
}

/// Reads frames until the connection ends or the last ping is answered.
async fn listen(mut reader: OwnedReadHalf) -> Said {
    let mut said = Said::default();
    while let Ok((kind, flags, payload)) = read_frame(&mut reader).await {
        match kind {
            PING if flags & ACK != 0 && payload == LAST_PING => {
                said.is_open = true;
                break;
            }
            GOAWAY => {
                let code = payload.get(4..8).and_then(|code| code.try_into().ok());
                said.goaway = code.map(u32::from_be_bytes);
            }
            _ => {}
        }
    }
    said
}

async fn read_frame(reader: &mut (impl AsyncRead + Unpin)) -> io::Result<(u8, u8, Vec<u8>)> {
    let mut head = [0; 9];
    reader.read_exact(&mut head).await?;
    let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
    let mut payload = vec![0; length as usize];
    reader.read_exact(&mut payload).await?;
    Ok((head[3], head[4], payload))
}
