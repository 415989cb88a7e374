//! Whether the peer of a connection is alive: it is asked now and then.

use std::{
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use h2::{Ping, PingPong};
use tokio::time::{Instant, Sleep, sleep};

/// Pings a peer.
pub(super) struct Keepalive {
    pings: PingPong,
    /// The next ping, or the end of the wait for an answer to it.
    next: Pin<Box<Sleep>>,
    is_asked: bool,
}

/// With the timeout below, a dead Envoy is found within a minute; it costs nothing to keep its connection until then.
pub(super) const INTERVAL: Duration = Duration::from_secs(45);
pub(super) const TIMEOUT: Duration = Duration::from_secs(10);

impl Keepalive {
    pub(super) fn new(pings: PingPong) -> Self {
        Self {
            pings,
            next: Box::pin(sleep(INTERVAL)),
            is_asked: false,
        }
    }

    /// Ready when the peer does not answer; one that does not read is among those.
    pub(super) fn poll_dead(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        loop {
            // A failure says that the connection is closed, which shows where it is polled.
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
