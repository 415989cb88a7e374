//! Steady load on a whole mesh, of which every single answer is judged.

use std::{
    fmt,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use relatch::clock::{BootTime, Clock};
use serde_json::Value;
use tokio::{task::JoinHandle, time::MissedTickBehavior};

use super::deployment::{CONSUMER, Control, IssuedKey, Sidecar};
use crate::support::{
    client::{Connection, Request, Response},
    envoy::{Envoy, EnvoyOptions},
    eventually::eventually,
    upstream::Upstream,
};

/// A control plane, three sidecars that one Envoy asks in turn, and an upstream: each a process of its own but the last.
#[derive(Debug)]
pub(super) struct Mesh {
    pub(super) control: Control,
    pub(super) sidecars: [Sidecar; 3],
    pub(super) envoy: Envoy,
    _upstream: Upstream,
}

/// A program of a consumer that sends on and on, with the key that it holds at that moment.
#[derive(Debug)]
pub(super) struct Caller {
    run: Arc<Run>,
    task: JoinHandle<()>,
}

/// A key as a caller holds it.
#[derive(Clone)]
pub(super) struct HeldKey {
    secret: String,
    /// Unknown to a caller that was not told.
    version: Option<u64>,
}

/// What became of one request.
#[derive(Clone, Debug)]
pub(super) struct Answer {
    pub(super) sent: BootTime,
    pub(super) answered: BootTime,
    /// Of the key that was sent.
    pub(super) version: Option<u64>,
    pub(super) outcome: Outcome,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    /// It reached the upstream as a request of [`CONSUMER`] with this key version.
    Allowed(u64),
    /// It was denied for this reason.
    Denied(String),
    /// Anything else.
    Failed(String),
}

struct Run {
    key: Box<dyn Fn() -> HeldKey + Send + Sync>,
    held: Mutex<Option<HeldKey>>,
    answers: Mutex<Vec<Answer>>,
    stopping: AtomicBool,
}

/// What callers ask for, as sidecars name it: the host and the first part of the path.
pub(super) const ROUTE: &str = "api.example/orders";

/// A hundred requests a second and caller: some for every moment that matters, few enough for all tests at once.
const PACE: Duration = Duration::from_millis(10);

impl Mesh {
    /// Starts it, with the lines `settings` in the control plane's file, and makes a key that every sidecar holds.
    pub(super) async fn start(settings: &str) -> (Self, IssuedKey) {
        let control = Control::start_brisk(settings).await;
        let key = control.create_key().await;
        let sidecars = [
            Sidecar::start(&control, "edge-1").await,
            Sidecar::start(&control, "edge-2").await,
            Sidecar::start(&control, "edge-3").await,
        ];
        let upstream = Upstream::start().await;
        let [first, others @ ..] = sidecars.each_ref().map(|one| one.daemon.ext_authz());
        let options = EnvoyOptions::new(first, upstream.addr());
        let options = others.into_iter().fold(options, EnvoyOptions::and_authz);
        let mesh = Self {
            control,
            sidecars,
            envoy: Envoy::start(options).await,
            _upstream: upstream,
        };
        (mesh, key)
    }

    /// A caller that goes on with `key` until it is told to switch.
    pub(super) fn caller(&self, name: &'static str, key: &IssuedKey) -> Caller {
        let key = HeldKey::from(key);
        Caller::start(self.envoy.addr(), name, move || key.clone())
    }

    /// Waits until every sidecar has applied what a change of the log has brought.
    pub(super) async fn reaches(&self, change: &Value) {
        let revision = change["revision"].as_u64().expect("a revision");
        for sidecar in &self.sidecars {
            sidecar.reaches(revision).await;
        }
    }

    /// One request with `key`.
    pub(super) async fn ask(&self, key: &IssuedKey) -> Outcome {
        let request = request("late", &key.secret);
        Outcome::of(&request.send(self.envoy.addr()).await)
    }
}

impl Caller {
    /// Sends to `addr` what `key` holds before each request, unless it was told to switch.
    pub(super) fn start(
        addr: SocketAddr,
        name: &'static str,
        key: impl Fn() -> HeldKey + Send + Sync + 'static,
    ) -> Self {
        let run = Arc::new(Run {
            key: Box::new(key),
            held: Mutex::default(),
            answers: Mutex::default(),
            stopping: AtomicBool::new(false),
        });
        let task = tokio::spawn(work(addr, name, Arc::clone(&run)));
        Self { run, task }
    }

    /// From its next request on it uses `key`.
    pub(super) fn switch(&self, key: &IssuedKey) {
        *self.run.held.lock().expect("nobody panics with it") = Some(key.into());
    }

    /// Waits for the answers to `count` more requests.
    pub(super) async fn answered(&self, count: usize) {
        let wanted = self.answers().len() + count;
        eventually("answers to a caller", async || {
            (self.answers().len() >= wanted).then_some(())
        })
        .await;
    }

    /// All answers so far.
    pub(super) fn answers(&self) -> Vec<Answer> {
        let answers = self.run.answers.lock();
        answers.expect("nobody panics with it").clone()
    }

    /// Ends it after the request in flight. All answers.
    pub(super) async fn stop(self) -> Vec<Answer> {
        self.run.stopping.store(true, Ordering::SeqCst);
        self.task.await.expect("it does not panic");
        let answers = self.run.answers.lock();
        answers.expect("nobody panics with it").clone()
    }
}

impl HeldKey {
    /// One whose version its caller is not told.
    pub(super) const fn anonymous(secret: String) -> Self {
        Self {
            secret,
            version: None,
        }
    }
}

impl From<&IssuedKey> for HeldKey {
    fn from(key: &IssuedKey) -> Self {
        Self {
            secret: key.secret.clone(),
            version: Some(key.version),
        }
    }
}

impl Answer {
    /// Whether the request was allowed, as one with the version that was sent.
    pub(super) fn is_right(&self) -> bool {
        match self.outcome {
            Outcome::Allowed(version) => self.version.is_none_or(|sent| sent == version),
            Outcome::Denied(_) | Outcome::Failed(_) => false,
        }
    }
}

impl Outcome {
    pub(super) fn denied(reason: &str) -> Self {
        Self::Denied(reason.to_owned())
    }

    fn of(response: &Response) -> Self {
        if response.status != 200 {
            let problem: Value = serde_json::from_slice(&response.body).unwrap_or_default();
            return match problem["reason"].as_str() {
                Some(reason) => Self::denied(reason),
                None => Self::Failed(format!("{}: {}", response.status, response.text())),
            };
        }
        let seen = response.seen();
        let version = seen.values("x-relatch-key-version");
        let consumer = seen.values("x-relatch-consumer");
        let secrets = seen.values("x-api-key");
        match (version.as_slice(), consumer.as_slice(), secrets.as_slice()) {
            ([version], [CONSUMER], []) => match version.parse() {
                Ok(version) => Self::Allowed(version),
                Err(_) => Self::Failed(format!("key version {version}")),
            },
            _ => Self::Failed(format!("version {version:?} of consumer {consumer:?}")),
        }
    }
}

impl fmt::Debug for Run {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Run").finish_non_exhaustive()
    }
}

/// Every request was allowed, as one with the version that was sent.
pub(super) fn assert_all_right(answers: &[Answer]) {
    let wrong: Vec<&Answer> = answers.iter().filter(|a| !a.is_right()).collect();
    let few = &wrong[..wrong.len().min(5)];
    assert!(
        wrong.is_empty(),
        "{} of {} answers are wrong: {few:?}",
        wrong.len(),
        answers.len()
    );
    assert!(!answers.is_empty(), "nothing was asked");
}

/// How many requests came with a version.
pub(super) fn with_version(answers: &[Answer], version: u64) -> usize {
    let sent = answers.iter().filter(|a| a.version == Some(version));
    sent.count()
}

async fn work(addr: SocketAddr, name: &'static str, run: Arc<Run>) {
    let clock = Clock::system();
    let mut connection = None;
    let mut ticks = tokio::time::interval(PACE);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    while !run.stopping.load(Ordering::SeqCst) {
        ticks.tick().await;
        let told = run.held.lock().expect("nobody panics with it").clone();
        let key = told.unwrap_or_else(|| (run.key)());
        let sent = clock.boot();
        let request = request(name, &key.secret);
        let outcome = match Connection::send_kept(&mut connection, addr, &request).await {
            Ok(response) => Outcome::of(&response),
            Err(error) => Outcome::Failed(error.to_string()),
        };
        let answer = Answer {
            sent,
            answered: clock.boot(),
            version: key.version,
            outcome,
        };
        let mut answers = run.answers.lock().expect("nobody panics with it");
        answers.push(answer);
    }
}

fn request(caller: &str, secret: &str) -> Request {
    let (host, path) = ROUTE.split_once('/').expect("a host and a path");
    Request::get(&format!("/{path}"))
        .header("host", host)
        .header("user-agent", caller)
        .header("x-api-key", secret)
}

#[test]
#[should_panic(expected = "3 of 4 answers are wrong")]
fn one_wrong_answer_is_enough() {
    let clock = Clock::system();
    let outcomes = [
        Outcome::Allowed(1),
        Outcome::Allowed(2),
        Outcome::denied("retired"),
        Outcome::Failed("connection reset".to_owned()),
    ];
    let answers = outcomes.map(|outcome| Answer {
        sent: clock.boot(),
        answered: clock.boot(),
        version: Some(1),
        outcome,
    });
    assert_all_right(&answers);
}
