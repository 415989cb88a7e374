//! The end of file descriptors: somebody opens connections until a process can take no more.
//!
//! Who is connected goes on being served, nothing is burnt over what cannot be, and it is over when they leave.

use std::{fs, net::SocketAddr, ops::RangeInclusive, sync::Arc, time::Duration};

use relatch::{
    clock::{BootTime, Clock},
    proto::admin::{CreateKeyRequest, admin_client::AdminClient},
};
use rustix::process::{Pid, Resource, Rlimit, prlimit};
use tokio::{io::AsyncWriteExt as _, net::TcpStream};
use tonic::{
    Request,
    metadata::{Ascii, MetadataValue},
    transport::{Channel, Endpoint},
};

use super::{
    deployment::{CONSUMER, Control, KEYRING, Sidecar, Verdict},
    floods::{Others, tcp},
    snapshot::Disk,
};
use crate::support::{
    client,
    eventually::eventually,
    frames::PREFACE,
    process::{Printed, Process},
};

/// Connections that are opened and held.
struct Crowd(Vec<TcpStream>);

/// How many descriptors a process may still open: for a while everything works.
const SPARE: u64 = 8;
/// How many connections are opened to have none left.
const CROWD: usize = 40;
/// The pause between two lines that say so of one listener.
const SELDOM: Duration = Duration::from_secs(10);
const TOLD: &str = "cannot accept a connection";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_sidecar_without_file_descriptors_answers_those_who_are_there() {
    let disk = Disk::new().await;
    let control = Control::start().await;
    let key = control.create_key().await;
    let sidecar = Arc::new(disk.start(&control).await);
    sidecar.ready().await;
    sidecar.reaches(key.revision).await;
    let (address, http) = (tcp(&sidecar), sidecar.daemon.http());
    assert_eq!(sidecar.check(&key.secret).await, Verdict::allowed(1));
    let told = Told::from_now_on();
    limit(&sidecar.daemon.process, http).await;

    let crowd = Crowd::gather(address, PREFACE, &sidecar.daemon.process).await;
    is_calm(&sidecar.daemon.process).await;
    let others = Others::ask(&sidecar, &key);
    others.answered(50).await;
    let later = control.create_key().await;
    let revoke = ["revoke", &key.id, "--all", "--reason", "leaked", "--wait"];
    others.stop().await;
    let revoked = control.json(&revoke).await;
    assert_eq!(sidecar.check(&later.secret).await, Verdict::allowed(1));
    let verdict = sidecar.check(&key.secret).await;
    assert_eq!(verdict, Verdict::denied("revoked", 1));
    crowd.is_here();
    drop(crowd);

    let last = control.create_key().await;
    sidecar.reaches(last.revision).await;
    eventually("everything is on disk", async || {
        let fleet = control.json(&["fleet"]).await;
        let durable = fleet[0]["keyrings"][0]["durable_revision"].as_u64();
        (durable == Some(last.revision)).then_some(())
    })
    .await;
    assert!(revoked["revision"].as_u64() < Some(last.revision));
    assert_eq!(disk.keyring().await["revision"], last.revision);
    assert_eq!(sidecar.daemon.get("/readyz").await.status, 200);
    let sidecar = Arc::into_inner(sidecar).expect("nobody else asks it");
    let log = sidecar.stopped().await;
    told.is_met(&log, 1..=2);
    let opened = log.count("stream to the control plane is open");
    assert_eq!(opened, 1, "{log}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_control_plane_without_file_descriptors_serves_those_who_are_there() {
    let control = Control::start().await;
    let key = control.create_key().await;
    let sidecar = Sidecar::start(&control, "edge-1").await;
    sidecar.reaches(key.revision).await;
    sidecar.ready().await;
    let mut operator = Operator::connect(&control).await;
    let http = control.plane.http();
    let told = Told::from_now_on();
    limit(&control.plane.process, http).await;

    for (port, begin) in [
        (control.plane.discovery(), PREFACE),
        (control.plane.admin(), PREFACE),
        (http, b"GET /livez HTTP/1.1\r\n"),
    ] {
        let crowd = Crowd::gather(port, begin, &control.plane.process).await;
        is_calm(&control.plane.process).await;
        let key = operator.create_key().await;
        eventually("the key reaches the sidecar", async || {
            sidecar.check(&key).await.allowed.then_some(())
        })
        .await;
        drop(crowd);
        let key = control.create_key().await;
        sidecar.reaches(key.revision).await;
    }
    let metrics = client::Request::get("/metrics").send(http).await;
    assert_eq!(metrics.status, 200);
    let log = sidecar.stopped().await;
    let opened = log.count("stream to the control plane is open");
    assert_eq!(opened, 1, "{log}");
    told.is_met(&control.stopped().await, 3..=3);
}

/// The lines that say of each of some listeners that it cannot accept a connection, from a moment on.
struct Told(BootTime);

impl Told {
    fn from_now_on() -> Self {
        Self(Clock::system().boot())
    }

    /// Each of so many listeners is named at once, and then again after [`SELDOM`], for as long as the process ran.
    fn is_met(&self, log: &Printed, listeners: RangeInclusive<usize>) {
        let elapsed = Clock::system().boot().saturating_since(self.0);
        let again = usize::try_from(elapsed.as_secs() / SELDOM.as_secs()).expect("a short run");
        let lines = log.count(TOLD);
        let (least, most) = (*listeners.start(), listeners.end() * (1 + again));
        assert!((least..=most).contains(&lines), "{lines} lines: {log}");
    }
}

/// A caller of the admin API that stays connected.
struct Operator {
    admin: AdminClient<Channel>,
    bearer: MetadataValue<Ascii>,
}

impl Operator {
    async fn connect(control: &Control) -> Self {
        let uri = format!("http://{}", control.plane.admin());
        let endpoint = Endpoint::from_shared(uri).expect("an address");
        let channel = endpoint.connect().await.expect("it listens");
        let token = fs::read_to_string(control.plane.token_file()).expect("a token");
        let bearer = format!("Bearer {}", token.trim());
        Self {
            admin: AdminClient::new(channel),
            bearer: bearer.parse().expect("a token is text"),
        }
    }

    async fn create_key(&mut self) -> String {
        let mut request = Request::new(CreateKeyRequest {
            keyring: KEYRING.to_owned(),
            consumer: CONSUMER.to_owned(),
            ..CreateKeyRequest::default()
        });
        let metadata = request.metadata_mut();
        metadata.insert("authorization", self.bearer.clone());
        let created = self.admin.create_key(request).await;
        created.expect("it is made").into_inner().secret
    }
}

impl Crowd {
    /// Connects to `port` and says how requests `begin` until the process cannot accept a connection any more.
    async fn gather(port: SocketAddr, begin: &[u8], process: &Process) -> Self {
        let count = || {
            let lines = process.lines();
            lines.iter().filter(|line| line.contains(TOLD)).count()
        };
        let before = count();
        let mut crowd = Vec::new();
        for _ in 0..CROWD {
            let mut socket = TcpStream::connect(port).await.expect("it listens");
            socket.write_all(begin).await.expect("it is open");
            crowd.push(socket);
        }
        eventually("a connection cannot be accepted", async || {
            (count() > before).then_some(())
        })
        .await;
        Self(crowd)
    }

    /// Nobody has been turned away meanwhile: there was no room all the while.
    fn is_here(&self) {
        for socket in &self.0 {
            let closed = socket.try_read(&mut [0; 1]);
            assert!(!matches!(closed, Ok(0)), "{closed:?}");
        }
    }
}

/// Lets a process open [`SPARE`] more files than it has open.
async fn limit(process: &Process, http: SocketAddr) {
    let page = client::Request::get("/metrics").send(http).await.text();
    let line = page
        .lines()
        .find_map(|line| line.strip_prefix("process_open_fds "));
    let open: u64 = line.and_then(|line| line.parse().ok()).expect("a number");
    let pid = i32::try_from(process.id()).ok().and_then(Pid::from_raw);
    let most = Some(open + SPARE);
    let limit = Rlimit {
        current: most,
        maximum: most,
    };
    prlimit(pid, Resource::Nofile, limit).expect("it is our process");
}

/// Whether a process that has nothing to do does nothing: over a second it takes a small part of a processor.
async fn is_calm(process: &Process) {
    let clock = Clock::system();
    let (from, began) = (ticks(process), clock.boot());
    tokio::time::sleep(Duration::from_secs(1)).await;
    let (to, ended) = (ticks(process), clock.boot());
    let busy = Duration::from_millis(10 * (to - from));
    let elapsed = ended.saturating_since(began);
    assert!(busy < elapsed / 4, "busy for {busy:?} of {elapsed:?}");
}

/// The hundredths of a second that a process has had (`proc_pid_stat(5)`, fields 14 and 15).
fn ticks(process: &Process) -> u64 {
    let stat = fs::read_to_string(format!("/proc/{}/stat", process.id()));
    let stat = stat.expect("the process runs");
    let (_, fields) = stat.rsplit_once(") ").expect("its name is in brackets");
    let fields: Vec<&str> = fields.split(' ').collect();
    let field = |at: usize| fields[at].parse::<u64>().expect("a number");
    field(11) + field(12)
}
