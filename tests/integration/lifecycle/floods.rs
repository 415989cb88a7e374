//! Floods of HTTP/2 against a sidecar and against both ports of a control plane, while others are served.
//!
//! A flood ends with its connection, or it is borne: then it costs the attacker as much as the server, and no memory.

mod attack;

use std::{
    fs,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{io::AsyncWriteExt as _, net::TcpStream, task::JoinSet, time::timeout};

use super::deployment::{Control, IssuedKey, Sidecar, Verdict};
use crate::support::{
    envoy::AuthzAddress,
    eventually::{DEADLINE, eventually, within},
    frames::{DATA, END_HEADERS, END_STREAM, HEADERS, PREFACE, call, frame},
    process::{Process, relatch},
};
use attack::{ENHANCE_YOUR_CALM, Expected, Flood};

/// Others that are served all the while: each answer has to be right.
pub(super) struct Others {
    asking: JoinSet<()>,
    stop: Arc<AtomicBool>,
    answered: Arc<AtomicU64>,
}

const CHECK: &str = "/envoy.service.auth.v3.Authorization/Check";
const SUBSCRIBE: &str = "/relatch.discovery.v1.KeyringDiscovery/Subscribe";
const ADMIN: &str = "/relatch.admin.v1.Admin/ListKeys";

/// How much memory attacks may cost, in bytes. A limit that is missing costs hundreds of megabytes.
const MEMORY: u64 = 64 << 20;
/// Attackers at once.
const ATTACKERS: usize = 2;
/// Those who do not read, and how often each of them sends something.
const DEAF: u32 = 200;
/// How long one of them tries to send something that nobody takes.
const PATIENCE: Duration = Duration::from_millis(500);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sidecar_bears_floods_while_it_answers_checks() {
    let control = Control::start().await;
    let key = control.create_key().await;
    let sidecar = Arc::new(Sidecar::start(&control, "edge-1").await);
    sidecar.reaches(key.revision).await;
    sidecar.ready().await;
    let address = tcp(&sidecar);
    let before = peak(&sidecar.daemon.process);
    for flood in Flood::ALL {
        let others = Others::ask(&sidecar, &key);
        attack(flood, address, CHECK, Expected::Either).await;
        others.answered(20).await;
        others.stop().await;
        assert_connects(address, &key).await;
    }
    let after = peak(&sidecar.daemon.process);
    assert!(after < before + MEMORY, "{before} bytes, then {after}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_control_plane_bears_floods_while_it_serves() {
    let control = Control::start().await;
    let mut key = control.create_key().await;
    let sidecar = Sidecar::start(&control, "edge-1").await;
    let before = peak(&control.plane.process);
    let resets = Expected::Closed(ENHANCE_YOUR_CALM);
    for (address, path) in [
        (control.plane.discovery(), SUBSCRIBE),
        (control.plane.admin(), ADMIN),
    ] {
        for flood in Flood::ALL {
            let ((), ()) = tokio::join!(attack(flood, address, path, resets), async {
                assert_eq!(control.fleet().await, ["edge-1"]);
                key = control.create_key().await;
                sidecar.reaches(key.revision).await;
            });
        }
    }
    assert_eq!(sidecar.check(&key.secret).await, Verdict::allowed(1));
    let after = peak(&control.plane.process);
    assert!(after < before + MEMORY, "{before} bytes, then {after}");
    let log = sidecar.stopped().await;
    let opened = log.count("stream to the control plane is open");
    assert_eq!(opened, 1, "{log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_never_reads_and_who_never_finishes_cost_others_nothing() {
    let control = Control::start().await;
    let key = control.create_key().await;
    let sidecar = Arc::new(Sidecar::start(&control, "edge-1").await);
    sidecar.reaches(key.revision).await;
    sidecar.ready().await;
    let address = tcp(&sidecar);
    let before = peak(&sidecar.daemon.process);
    let others = Others::ask(&sidecar, &key);
    // Headers that are never finished.
    let half = [PREFACE, &frame(HEADERS, 0, 1, &call(CHECK))].concat();
    // Whole checks, whose answers nobody takes.
    let check = |stream| {
        let headers = frame(HEADERS, END_HEADERS, stream, &call(CHECK));
        [headers, frame(DATA, END_STREAM, stream, &[0; 5])].concat()
    };
    let checks = |at: u32| -> Vec<u8> {
        let streams = at * 100..(at + 1) * 100;
        streams.flat_map(|stream| check(2 * stream + 1)).collect()
    };
    let mut attackers = Vec::new();
    for _ in 0..32 {
        attackers.push(never_read(address, &half, |_| Vec::new()).await);
    }
    for _ in 0..8 {
        attackers.push(never_read(address, PREFACE, checks).await);
    }
    others.answered(100).await;
    assert_connects(address, &key).await;
    others.answered(100).await;
    others.stop().await;
    let after = peak(&sidecar.daemon.process);
    assert!(after < before + MEMORY, "{before} bytes, then {after}");
    drop(attackers);
    assert_connects(address, &key).await;
}

impl Others {
    /// Two who check without a pause, one with a key that is right and one with a key that is not.
    pub(super) fn ask(sidecar: &Arc<Sidecar>, key: &IssuedKey) -> Self {
        let (stop, answered) = (Arc::<AtomicBool>::default(), Arc::<AtomicU64>::default());
        let mut asking = JoinSet::new();
        let wrong = format!("{}x", key.secret);
        for (secret, is_right) in [(key.secret.clone(), true), (wrong, false)] {
            let (sidecar, stop) = (Arc::clone(sidecar), Arc::clone(&stop));
            let answered = Arc::clone(&answered);
            asking.spawn(async move {
                while !stop.load(Ordering::SeqCst) {
                    let check = Box::pin(sidecar.check(&secret));
                    let verdict = within(DEADLINE, "a verdict", check).await;
                    assert_eq!(verdict.allowed, is_right, "{verdict:?}");
                    answered.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        Self {
            asking,
            stop,
            answered,
        }
    }

    /// Waits for `count` more answers.
    pub(super) async fn answered(&self, count: u64) {
        let wanted = self.answered.load(Ordering::SeqCst) + count;
        eventually("others are answered", async || {
            (self.answered.load(Ordering::SeqCst) >= wanted).then_some(())
        })
        .await;
    }

    pub(super) async fn stop(mut self) {
        self.stop.store(true, Ordering::SeqCst);
        while let Some(asked) = self.asking.join_next().await {
            asked.expect("every answer is right");
        }
    }
}

/// Several attack at once, until each has come to the end that it is to come to.
async fn attack(flood: Flood, address: SocketAddr, path: &'static str, resets: Expected) {
    let mut attackers = JoinSet::new();
    for _ in 0..ATTACKERS {
        attackers.spawn(flood.run(address, path));
    }
    for end in attackers.join_all().await {
        assert!(flood.expected(resets).is_met(end), "{flood:?}: {end:?}");
    }
}

/// Connects, says `first`, and then `more` until the server takes no more of it; nothing is ever read.
async fn never_read(address: SocketAddr, first: &[u8], more: impl Fn(u32) -> Vec<u8>) -> TcpStream {
    let mut socket = TcpStream::connect(address).await.expect("it listens");
    socket.write_all(first).await.expect("it is open");
    for at in 0..DEAF {
        let sent = timeout(PATIENCE, socket.write_all(&more(at))).await;
        if !matches!(sent, Ok(Ok(()))) {
            break;
        }
    }
    socket
}

/// Whoever connects anew is answered.
async fn assert_connects(address: SocketAddr, key: &IssuedKey) {
    let endpoint = address.to_string();
    let output = relatch(&["check", "--endpoint", &endpoint], &key.secret).await;
    assert!(output.status.success(), "{}", output.stderr);
}

/// The most memory that a process has had, in bytes.
fn peak(process: &Process) -> u64 {
    let status = fs::read_to_string(format!("/proc/{}/status", process.id()));
    let status = status.expect("the process runs");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix(" kB"));
    let kilobytes: u64 = kilobytes
        .and_then(|kilobytes| kilobytes.parse().ok())
        .expect("the kernel tells");
    kilobytes << 10
}

pub(super) fn tcp(sidecar: &Sidecar) -> SocketAddr {
    match sidecar.daemon.ext_authz() {
        AuthzAddress::Tcp(address) => address,
        AuthzAddress::Unix(path) => panic!("no port: {}", path.display()),
    }
}
