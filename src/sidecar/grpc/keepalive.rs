//! Pings that find out whether the peer of a connection is alive.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use h2::{Ping, PingPong};
use tokio::time::{Instant, Sleep, sleep};

/// Pings a peer at intervals.
pub(super) struct Keepalive {
    pings: PingPong,
    /// The time of the next ping, or the deadline for the answer to a ping.
    next: Pin<Box<Sleep>>,
    is_asked: bool,
}

/// The time from an answer to the next ping. With [`TIMEOUT`], a dead Envoy is found within a
/// minute. Its connection costs nothing until then.
pub(super) const INTERVAL: Duration = Duration::from_secs(45);
/// The time within which a peer must answer a ping.
pub(super) const TIMEOUT: Duration = Duration::from_secs(10);

impl Keepalive {
    pub(super) fn new(pings: PingPong) -> Self {
        Self {
            pings,
            next: Box::pin(sleep(INTERVAL)),
            is_asked: false,
        }
    }

    /// Ready if the peer has not answered a ping in time. This includes a peer that does not read.
    pub(super) fn poll_dead(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            // A failure means that the connection is closed. The poll of the connection reports it.
            if self.is_asked && self.pings.poll_pong(cx).is_ready() {
                self.is_asked = false;
                self.wait(INTERVAL);
            }
            ready!(self.next.as_mut().poll(cx));
            if self.is_asked {
                return Poll::Ready(());
            }
            self.is_asked = self.pings.send_ping(Ping::opaque()).is_ok();
            self.wait(TIMEOUT);
        }
    }

    fn wait(&mut self, time: Duration) {
        self.next.as_mut().reset(Instant::now() + time);
    }
}
