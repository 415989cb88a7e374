//! A TCP proxy that does to connections what networks do.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{
        TcpStream,
        tcp::{ReadHalf, WriteHalf},
    },
    sync::watch,
    task::JoinHandle,
};
use tokio_util::task::TaskTracker;

use crate::support::{
    eventually::{DEADLINE, within},
    loopback::listen,
};

/// Stands between a sidecar and its control plane. Dropping it resets everything.
#[derive(Debug)]
pub(super) struct FaultProxy {
    address: SocketAddr,
    fault: Arc<watch::Sender<Fault>>,
    counts: Arc<Counts>,
    /// The connections that are carried.
    open: TaskTracker,
    acceptor: JoinHandle<()>,
}

/// What it has seen.
#[derive(Debug, Default)]
struct Counts {
    connections: AtomicUsize,
    /// Bytes from the control plane.
    carried: AtomicUsize,
}

/// What is done to every connection, those that are open and those that come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) enum Fault {
    #[default]
    None,
    /// Open connections are reset, and so is whatever comes.
    Cut,
    /// What is open stays open, and nothing gets through any more, even when the fault is over.
    HalfOpen,
    /// Each connection is reset after so many bytes from the control plane.
    ResetAfter(usize),
    /// So many bytes a second from the control plane.
    Throttled(usize),
    /// Every piece comes so much later.
    Delayed(Duration),
}

/// More would hide where a connection was cut.
const PIECE: usize = 4096;

impl FaultProxy {
    /// A proxy to `upstream` that does nothing yet.
    pub(super) async fn start(upstream: SocketAddr) -> Self {
        let (listener, address) = listen().await;
        let (fault, seen) = watch::channel(Fault::None);
        let open = TaskTracker::new();
        open.close();
        let carried = open.clone();
        let counts = Arc::new(Counts::default());
        let counting = Arc::clone(&counts);
        let acceptor = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                let (seen, counts) = (seen.clone(), Arc::clone(&counting));
                counts.connections.fetch_add(1, Ordering::Relaxed);
                carried.spawn(async move {
                    // How a connection ends is what the test is about.
                    let _ = carry(client, upstream, seen, &counts).await;
                });
            }
        });
        Self {
            address,
            fault: Arc::new(fault),
            counts,
            open,
            acceptor,
        }
    }

    /// Where sidecars connect.
    pub(super) const fn address(&self) -> SocketAddr {
        self.address
    }

    /// How many connections have come.
    pub(super) fn connections(&self) -> usize {
        self.counts.connections.load(Ordering::Relaxed)
    }

    /// How many bytes have come from the control plane and gone on.
    pub(super) fn carried(&self) -> usize {
        self.counts.carried.load(Ordering::Relaxed)
    }

    /// Resets every connection, and returns when none is left that may carry anything.
    pub(super) async fn cut(&self) {
        self.set(Fault::Cut);
        within(DEADLINE, "every connection is reset", self.open.wait()).await;
    }

    /// From now on.
    pub(super) fn set(&self, fault: Fault) {
        self.fault.send_replace(fault);
    }
}

impl Drop for FaultProxy {
    fn drop(&mut self) {
        self.acceptor.abort();
        self.fault.send_replace(Fault::Cut);
    }
}

async fn carry(
    mut client: TcpStream,
    upstream: SocketAddr,
    mut fault: watch::Receiver<Fault>,
    counts: &Counts,
) -> io::Result<()> {
    reset_on_drop(&client)?;
    if *fault.borrow() == Fault::Cut {
        return Ok(());
    }
    let mut server = TcpStream::connect(upstream).await?;
    reset_on_drop(&server)?;
    let met = {
        let (from_client, to_client) = client.split();
        let (from_server, to_server) = server.split();
        let mut seen = fault.clone();
        tokio::select! {
            end = upload(from_client, to_server) => return end,
            end = download(from_server, to_client, fault.clone(), counts) => return end,
            met = seen.wait_for(|fault| matches!(fault, Fault::Cut | Fault::HalfOpen)) => {
                // Fails when the proxy is gone.
                met.map_or(Fault::Cut, |met| *met)
            }
        }
    };
    if met == Fault::Cut {
        return Ok(());
    }
    // Both ends stay open, and hear nothing of each other. Fails when the proxy is gone, which is an end too.
    let _ = fault.wait_for(|fault| *fault == Fault::Cut).await;
    Ok(())
}

/// From the sidecar: whole.
async fn upload(mut from: ReadHalf<'_>, mut to: WriteHalf<'_>) -> io::Result<()> {
    tokio::io::copy(&mut from, &mut to).await.map(|_| ())
}

/// From the control plane, with all that may happen on the way.
async fn download(
    mut from: ReadHalf<'_>,
    mut to: WriteHalf<'_>,
    mut fault: watch::Receiver<Fault>,
    counts: &Counts,
) -> io::Result<()> {
    let mut piece = [0; PIECE];
    let mut carried = 0;
    loop {
        let mut len = from.read(&mut piece).await?;
        let now = *fault.borrow();
        let mut is_last = len == 0;
        match now {
            Fault::None | Fault::Cut | Fault::HalfOpen => {}
            Fault::ResetAfter(bytes) => {
                is_last |= carried + len >= bytes;
                len = len.min(bytes.saturating_sub(carried));
            }
            Fault::Throttled(bytes_a_second) => {
                let share = Duration::from_secs(1).mul_f64(ratio(len, bytes_a_second));
                pause(&mut fault, share).await;
            }
            Fault::Delayed(by) => pause(&mut fault, by).await,
        }
        to.write_all(&piece[..len]).await?;
        carried += len;
        counts.carried.fetch_add(len, Ordering::Relaxed);
        if is_last {
            return Ok(());
        }
    }
}

/// Waits for as long as the fault lasts, at most.
async fn pause(fault: &mut watch::Receiver<Fault>, duration: Duration) {
    fault.borrow_and_update();
    let _ = tokio::time::timeout(duration, fault.changed()).await;
}

/// The other end sees a reset, not an orderly end.
fn reset_on_drop(stream: &TcpStream) -> io::Result<()> {
    stream.set_zero_linger()?;
    stream.set_nodelay(true)
}

#[expect(clippy::cast_precision_loss, reason = "a few thousand bytes")]
fn ratio(bytes: usize, of: usize) -> f64 {
    bytes as f64 / of.max(1) as f64
}
