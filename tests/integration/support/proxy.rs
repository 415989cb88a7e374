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

use super::{
    eventually::{DEADLINE, within},
    loopback::listen,
};

/// Stands between a sidecar and its control plane. Dropping it resets everything.
#[derive(Debug)]
pub(crate) struct FaultProxy {
    address: SocketAddr,
    fault: Arc<watch::Sender<Fault>>,
    counts: Arc<Counts>,
    /// The connections that are carried.
    open: TaskTracker,
    acceptor: JoinHandle<()>,
}

/// Sets the fault of a proxy.
#[derive(Debug)]
pub(crate) struct Remote(Arc<watch::Sender<Fault>>);

/// What it has seen.
#[derive(Debug, Default)]
struct Counts {
    connections: AtomicUsize,
    /// Bytes from the control plane.
    carried: AtomicUsize,
    /// Bytes from the control plane that were kept.
    held_back: AtomicUsize,
}

/// What is done to every connection, those that are open and those that come.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Fault {
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
    /// What comes from the control plane is kept, and delivered when the fault is over.
    HeldBack,
    /// What was kept is delivered. Nothing else gets through any more on what is open, which the control plane sees reset and the
    /// sidecar does not. Whatever comes is reset.
    Late,
}

/// How what comes from the control plane has ended.
enum Ended {
    /// The control plane has closed the connection, or it was reset on purpose.
    WithServer,
    /// With [`Fault::Late`].
    Late,
}

/// More would hide where a connection was cut.
const PIECE: usize = 4096;

impl FaultProxy {
    /// A proxy to `upstream` that does nothing yet.
    pub(crate) async fn start(upstream: SocketAddr) -> Self {
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
    pub(crate) const fn address(&self) -> SocketAddr {
        self.address
    }

    /// How many connections have come.
    pub(crate) fn connections(&self) -> usize {
        self.counts.connections.load(Ordering::Relaxed)
    }

    /// How many bytes have come from the control plane and gone on.
    pub(crate) fn carried(&self) -> usize {
        self.counts.carried.load(Ordering::Relaxed)
    }

    /// How many bytes have come from the control plane and were kept.
    pub(crate) fn held_back(&self) -> usize {
        self.counts.held_back.load(Ordering::Relaxed)
    }

    /// Resets every connection, and returns when none is left that may carry anything.
    pub(crate) async fn cut(&self) {
        self.set(Fault::Cut);
        within(DEADLINE, "every connection is reset", self.open.wait()).await;
    }

    /// From now on.
    pub(crate) fn set(&self, fault: Fault) {
        self.fault.send_replace(fault);
    }

    /// Sets its fault from elsewhere.
    pub(crate) fn remote(&self) -> Remote {
        Remote(Arc::clone(&self.fault))
    }
}

impl Remote {
    /// From now on.
    pub(crate) fn set(&self, fault: Fault) {
        self.0.send_replace(fault);
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
    if matches!(*fault.borrow(), Fault::Cut | Fault::Late) {
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
            end = download(from_server, to_client, fault.clone(), counts) => match end? {
                Ended::WithServer => return Ok(()),
                Ended::Late => Fault::Late,
            },
            met = seen.wait_for(|fault| matches!(fault, Fault::Cut | Fault::HalfOpen)) => {
                // Fails when the proxy is gone.
                met.map_or(Fault::Cut, |met| *met)
            }
        }
    };
    match met {
        Fault::Cut => return Ok(()),
        Fault::Late => drop(server),
        _ => {}
    }
    // What is open stays open, and hears nothing of the other end. Fails when the proxy is gone, which is an end too.
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
) -> io::Result<Ended> {
    let mut piece = [0; PIECE];
    let mut carried = 0;
    loop {
        let mut len = from.read(&mut piece).await?;
        let now = *fault.borrow();
        let mut is_last = len == 0;
        match now {
            Fault::None | Fault::Cut | Fault::HalfOpen | Fault::Late => {}
            Fault::HeldBack => {
                let kept = hold_back(&piece[..len], &mut from, &mut fault, counts).await?;
                to.write_all(&kept).await?;
                if *fault.borrow() == Fault::Late {
                    return Ok(Ended::Late);
                }
                continue;
            }
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
            return Ok(Ended::WithServer);
        }
    }
}

/// Keeps what comes from the control plane, `first` before all, until the fault is over; returns that.
async fn hold_back(
    first: &[u8],
    from: &mut ReadHalf<'_>,
    fault: &mut watch::Receiver<Fault>,
    counts: &Counts,
) -> io::Result<Vec<u8>> {
    let mut kept = first.to_vec();
    counts.held_back.fetch_add(first.len(), Ordering::Relaxed);
    let mut piece = [0; PIECE];
    let mut is_open = !first.is_empty();
    while *fault.borrow_and_update() == Fault::HeldBack {
        tokio::select! {
            len = from.read(&mut piece), if is_open => {
                let len = len?;
                is_open = len > 0;
                kept.extend(&piece[..len]);
                counts.held_back.fetch_add(len, Ordering::Relaxed);
            }
            // Fails when the proxy is gone.
            changed = fault.changed() => if changed.is_err() { break },
        }
    }
    Ok(kept)
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
