//! A control plane and its sidecars as processes, each link through a proxy, under steady checks, with a record of all.

use std::{
    fs,
    sync::{
        Arc, Mutex, MutexGuard,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use envoy_types::pb::envoy::service::auth::v3::{
    AttributeContext, CheckRequest, CheckResponse,
    attribute_context::{HttpRequest, Request as AttributesRequest},
    authorization_client::AuthorizationClient,
    check_response::HttpResponse,
};
use futures_util::future::join_all;
use relatch::{
    clock::{BootTime, Clock},
    proto::admin::{
        self, admin_client::AdminClient, revoke_request, start_rotation_response::Step,
    },
};
use rustix::process::Signal;
use tempfile::TempDir;
use tokio::{sync::watch, task::JoinSet};
use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Channel, Endpoint},
};

use super::{
    history::{
        Change, Check, Credential, Cut, History, Judgement, Limits, Moment, Outcome, SidecarPast,
        Span,
    },
    proxy::FaultProxy,
};
use crate::support::{
    envoy::AuthzAddress,
    eventually::eventually,
    relatch::{Control, Sidecar, sidecar_yaml},
};

/// Everything that a scenario plays with.
pub(super) struct World {
    pub(super) control: Control,
    pub(super) nodes: Vec<Node>,
    record: Arc<Record>,
    admin: AdminClient<InterceptedService<Channel, Bearer>>,
    keys: Vec<IssuedKey>,
    /// What was done to it.
    injections: usize,
    /// The longest time until everything followed again.
    recovery: Duration,
    tasks: JoinSet<()>,
    _data: TempDir,
}

/// A sidecar, its link, and where it is asked.
pub(super) struct Node {
    pub(super) proxy: FaultProxy,
    pub(super) sidecar: Sidecar,
    yaml: String,
    address: watch::Sender<AuthzAddress>,
}

/// How a world is made.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) sidecars: usize,
    /// More lines of each sidecar's file.
    pub(super) settings: String,
    pub(super) limits: Limits,
}

/// What a run came to.
#[derive(Debug)]
pub(super) struct Report {
    pub(super) injections: usize,
    pub(super) judgement: Judgement,
    pub(super) recovery: Duration,
}

/// A key of the run, with the number of the credential that is its newest version.
#[derive(Clone, Debug)]
pub(super) struct IssuedKey {
    id: String,
    newest: usize,
    /// The version before, while it is still accepted.
    old: Option<(usize, u32)>,
    version: u32,
}

/// What tasks write to.
struct Record {
    clock: Clock,
    begun: BootTime,
    history: Mutex<History>,
    secrets: Mutex<Vec<String>>,
    stop: AtomicBool,
}

/// Puts the first admin token into every call.
#[derive(Clone, Debug)]
struct Bearer(MetadataValue<Ascii>);

const KEYRING: &str = "payments";
/// The least that the control plane's file may hold.
const BRISK: &str = "heartbeat: 1s\nlease: 10s\n";
/// Between two checks of one asker: enough of them, and time for what is asked.
const PAUSE: Duration = Duration::from_millis(4);
/// A check that takes longer has failed. Far more than Envoy waits: on a busy machine a process may not run for a second.
const CHECK_TIMEOUT: Duration = Duration::from_secs(5);
/// How many checks are under way at once where every second one is given up.
const GIVEN_UP_AT_ONCE: u32 = 32;
/// Between two looks at the fleet.
const LOOK: Duration = Duration::from_millis(15);

impl World {
    /// Starts everything, issues two keys, and asks from then on.
    pub(super) async fn start(plan: Plan) -> Self {
        let data = tempfile::tempdir().expect("a directory can be made");
        let control = Control::start_with(data.path(), BRISK).await;
        let record = Arc::new(Record {
            clock: Clock::system(),
            begun: Clock::system().boot(),
            history: Mutex::new(History {
                limits: plan.limits,
                ..History::default()
            }),
            secrets: Mutex::default(),
            stop: AtomicBool::new(false),
        });
        let admin = admin_client(&control);
        let mut world = Self {
            control,
            nodes: Vec::new(),
            record,
            admin,
            keys: Vec::new(),
            injections: 0,
            recovery: Duration::ZERO,
            tasks: JoinSet::new(),
            _data: data,
        };
        // Well formed, and of nobody.
        let never = "rlk_7Qm2Xc91TbKe_0000000000000000000000000000000003Xqnfa".to_owned();
        world.record.add(never, Credential::default());
        world.issue().await;
        for number in 0..plan.sidecars {
            let proxy = FaultProxy::start(world.control.discovery()).await;
            let yaml = sidecar_yaml(&format!("edge-{number}"), proxy.address(), &[KEYRING]);
            let yaml = yaml + &plan.settings;
            world.record.lives(number);
            let sidecar = Sidecar::start(&yaml).await.until_ready().await;
            let (address, asked) = watch::channel(sidecar.ext_authz());
            world.nodes.push(Node {
                proxy,
                sidecar,
                yaml,
                address,
            });
            let record = Arc::clone(&world.record);
            world.tasks.spawn(ask(record, number, asked));
        }
        let watcher = watch_fleet(Arc::clone(&world.record), world.admin.clone());
        world.tasks.spawn(watcher);
        world.issue().await;
        world.follows().await;
        world
    }

    pub(super) fn now(&self) -> Moment {
        self.record.now()
    }

    /// Notes that something was done to the world.
    pub(super) const fn injected(&mut self) {
        self.injections += 1;
    }

    pub(super) const fn keys(&self) -> usize {
        self.keys.len()
    }

    /// Makes a key; nothing where the control plane does not answer.
    pub(super) async fn issue(&mut self) {
        let begun = self.now();
        let request = admin::CreateKeyRequest {
            keyring: KEYRING.to_owned(),
            consumer: "acme".to_owned(),
            create_missing: true,
            ..admin::CreateKeyRequest::default()
        };
        let Ok(issued) = self.admin.create_key(within_a_moment(request)).await else {
            return;
        };
        let issued = issued.into_inner();
        let newest = self.issued(begun, issued.secret.clone(), issued.revision);
        self.keys.push(IssuedKey {
            id: issued.key_id.clone(),
            newest,
            old: None,
            version: issued.version,
        });
    }

    /// Rotates a key that has one version; the old one stays accepted.
    pub(super) async fn rotate(&mut self, key: usize) {
        let key = key % self.keys.len();
        if self.keys[key].old.is_some() {
            return self.retire(key).await;
        }
        let begun = self.now();
        let request = admin::StartRotationRequest {
            key_id: self.keys[key].id.clone(),
            timeout: Some(prost_types::Duration {
                seconds: 2,
                nanos: 0,
            }),
            ..admin::StartRotationRequest::default()
        };
        let Ok(steps) = self.admin.start_rotation(within_a_moment(request)).await else {
            return;
        };
        let mut steps = steps.into_inner();
        while let Ok(Some(step)) = steps.message().await {
            if let Some(Step::HandedOver(handed_over)) = step.step {
                let new = handed_over.key.expect("a hand-over hands over");
                let credential = self.issued(begun, new.secret.clone(), new.revision);
                let key = &mut self.keys[key];
                key.old = Some((key.newest, key.version));
                key.newest = credential;
                key.version = new.version;
                return;
            }
        }
    }

    /// Ends the old version of a key that was rotated.
    pub(super) async fn retire(&mut self, key: usize) {
        let key = key % self.keys.len();
        let Some((old, version)) = self.keys[key].old else {
            return;
        };
        let request = admin::RetireVersionRequest {
            key_id: self.keys[key].id.clone(),
            version,
            force: true,
            reason: "a scenario".to_owned(),
        };
        self.ending(old);
        if let Ok(retired) = self.admin.retire_version(within_a_moment(request)).await {
            self.ended(old, retired.into_inner().revision);
            self.keys[key].old = None;
        }
    }

    /// Revokes every version of a key, which leaves the run; does not wait for sidecars.
    pub(super) async fn revoke(&mut self, key: usize) {
        let key = self.keys.swap_remove(key % self.keys.len());
        let request = admin::RevokeRequest {
            key_id: key.id,
            reason: "a scenario".to_owned(),
            which: Some(revoke_request::Which::All(true)),
            ..admin::RevokeRequest::default()
        };
        let versions = [Some(key.newest), key.old.map(|(old, _)| old)];
        let versions = versions.into_iter().flatten();
        for version in versions.clone() {
            self.ending(version);
        }
        let Ok(events) = self.admin.revoke(within_a_moment(request)).await else {
            return;
        };
        if let Ok(Some(event)) = events.into_inner().message().await {
            for version in versions {
                self.ended(version, event.revision);
            }
        }
    }

    /// Kills a sidecar's process at once.
    pub(super) async fn kill_sidecar(&mut self, number: usize) {
        self.record.dies(number);
        self.nodes[number].sidecar.process.signal(Signal::KILL);
        self.nodes[number].sidecar.process.exit().await;
    }

    /// Tells a sidecar to stop and waits until it has.
    pub(super) async fn stop_sidecar(&mut self, number: usize) {
        self.record.dies(number);
        assert!(self.nodes[number].sidecar.stop().await.success());
    }

    /// Starts it again after its end.
    pub(super) async fn start_sidecar(&mut self, number: usize) {
        self.record.lives(number);
        let node = &mut self.nodes[number];
        node.sidecar = Sidecar::start(&node.yaml).await;
        node.address.send_replace(node.sidecar.ext_authz());
    }

    /// Lets a sidecar's process stand still for a while.
    pub(super) async fn freeze_sidecar(&mut self, number: usize, duration: Duration) {
        let from = self.now();
        let history = |record: &Record| record.history().sidecars[number].frozen.len();
        let at = history(&self.record);
        self.record.history().sidecars[number]
            .frozen
            .push(Span::since(from));
        self.nodes[number].sidecar.process.signal(Signal::STOP);
        tokio::time::sleep(duration).await;
        self.nodes[number].sidecar.process.signal(Signal::CONT);
        let to = self.now();
        self.record.history().sidecars[number].frozen[at].to = Some(to);
    }

    /// Asks a sidecar many times at once over one connection, and gives every second call up after a moment. The others are
    /// judged as any check.
    pub(super) async fn give_up_every_second(&self, number: usize, rounds: usize) {
        let client = checks(&self.nodes[number].address.borrow());
        for _ in 0..rounds {
            let calls = (0..GIVEN_UP_AT_ONCE).map(|turn: u32| {
                let mut client = client.clone();
                let record = Arc::clone(&self.record);
                async move {
                    if turn.is_multiple_of(2) {
                        record.ask(&mut client, number, turn as usize).await;
                    } else {
                        let secret = record.secrets()[0].clone();
                        let call = client.check(check_request(&secret));
                        let moment = PAUSE.mul_f64(0.05) * turn;
                        // Whether it was answered in time does not matter.
                        let _ = tokio::time::timeout(moment, call).await;
                    }
                }
            });
            join_all(calls).await;
        }
    }

    /// Notes that nobody can confirm what a sidecar holds.
    pub(super) fn is_cut(&self, number: usize) {
        let cut = Cut {
            from: self.now(),
            healed: None,
            recovered: None,
        };
        self.record.history().sidecars[number].cut.push(cut);
    }

    /// Notes that the way of a sidecar is about to be whole again.
    pub(super) fn is_healed(&self, number: usize) {
        let now = self.now();
        if let Some(cut) = self.record.history().sidecars[number].cut.last_mut() {
            cut.healed = Some(now);
        }
    }

    /// Makes a key, and waits until every sidecar has it and is ready: how long that takes is the recovery from what was
    /// done before.
    pub(super) async fn follows(&mut self) {
        let since = self.now();
        let before = self.keys.len();
        eventually("the control plane makes a key", async || {
            self.issue().await;
            (self.keys.len() > before).then_some(())
        })
        .await;
        let newest = self.keys[self.keys.len() - 1].newest;
        let issued = self.record.history().credentials[newest].issued;
        let revision = issued.and_then(|change| change.revision);
        let revision = revision.expect("it was answered");
        for (number, node) in self.nodes.iter().enumerate() {
            eventually("every sidecar has the newest key", async || {
                let status = node
                    .sidecar
                    .get("/status")
                    .await
                    .json::<serde_json::Value>();
                let keyring = &status["keyrings"][0];
                let is_ready = node.sidecar.get("/readyz").await.status == 200;
                (is_ready && keyring["revision"].as_u64() >= Some(revision)).then_some(())
            })
            .await;
            let now = self.now();
            if let Some(cut) = self.record.history().sidecars[number].cut.last_mut() {
                cut.recovered.get_or_insert(now);
            }
        }
        self.recovery = self.recovery.max(self.now().saturating_sub(since));
    }

    /// Lets checks go on for a while.
    pub(super) async fn a_while(&self, millis: u64) {
        tokio::time::sleep(Duration::from_millis(millis)).await;
    }

    /// Ends the run and judges it.
    pub(super) async fn finish(mut self) -> Report {
        self.follows().await;
        self.a_while(100).await;
        self.record.stop.store(true, Ordering::Relaxed);
        while let Some(ended) = self.tasks.join_next().await {
            ended.expect("no task of the world panics");
        }
        let judgement = self.record.history().judge();
        Report {
            injections: self.injections,
            judgement,
            recovery: self.recovery,
        }
    }

    fn issued(&self, begun: Moment, secret: String, revision: u64) -> usize {
        let issued = Some(Change {
            begun,
            revision: Some(revision),
        });
        self.record.add(
            secret,
            Credential {
                issued,
                ended: None,
            },
        )
    }

    fn ending(&self, credential: usize) {
        let begun = self.now();
        let mut history = self.record.history();
        // An end that was asked for before, and of which nothing was heard, may be in force since.
        history.credentials[credential].ended.get_or_insert(Change {
            begun,
            revision: None,
        });
    }

    fn ended(&self, credential: usize, revision: u64) {
        if let Some(ended) = &mut self.record.history().credentials[credential].ended {
            ended.revision = Some(revision);
        }
    }
}

impl Report {
    /// Fails the test on a wrong decision, or when nothing was judged.
    pub(super) fn assert_right(&self) {
        let Judgement {
            must_allow,
            must_deny,
            wrong,
            ..
        } = &self.judgement;
        assert!(
            wrong.is_empty(),
            "{} wrong decisions, the first of them:\n{}",
            wrong.len(),
            wrong[..wrong.len().min(5)].join("\n")
        );
        assert!(
            *must_allow > 50 && *must_deny > 50,
            "too few checks were judged: {}",
            self.judgement
        );
    }
}

impl Record {
    fn now(&self) -> Moment {
        self.clock.boot().saturating_since(self.begun)
    }

    fn history(&self) -> MutexGuard<'_, History> {
        self.history
            .lock()
            .expect("no holder of the history panics")
    }

    fn secrets(&self) -> MutexGuard<'_, Vec<String>> {
        self.secrets
            .lock()
            .expect("no holder of the secrets panics")
    }

    /// What checks present from now on.
    fn add(&self, secret: String, credential: Credential) -> usize {
        let mut history = self.history();
        history.credentials.push(credential);
        self.secrets().push(secret);
        history.credentials.len() - 1
    }

    /// Asks once, for one credential or another.
    async fn ask(&self, client: &mut AuthorizationClient<Channel>, sidecar: usize, turn: usize) {
        // The newest as often as all others: there it is decided whether a change was told in time.
        let (credential, secret) = {
            let secrets = self.secrets();
            let number = match turn % 2 {
                0 => secrets.len() - 1 - (turn / 2) % secrets.len().min(4),
                _ => (turn / 2) % secrets.len(),
            };
            (number, secrets[number].clone())
        };
        let sent = self.now();
        let answer = client.check(check_request(&secret)).await;
        let answered = self.now();
        let outcome = match answer {
            Ok(response) => outcome(response.into_inner()),
            Err(status) => Outcome::Failed(format!("{:?}: {}", status.code(), status.message())),
        };
        self.history().checks.push(Check {
            sidecar,
            credential,
            sent,
            answered,
            outcome,
        });
    }

    fn lives(&self, sidecar: usize) {
        let now = self.now();
        let mut history = self.history();
        if history.sidecars.len() == sidecar {
            history.sidecars.push(SidecarPast::default());
        }
        history.sidecars[sidecar].lives.push(Span::since(now));
    }

    fn dies(&self, sidecar: usize) {
        let now = self.now();
        if let Some(life) = self.history().sidecars[sidecar].lives.last_mut() {
            life.to = Some(now);
        }
    }
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            sidecars: 3,
            settings: String::new(),
            limits: Limits::default(),
        }
    }
}

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request
            .metadata_mut()
            .insert("authorization", self.0.clone());
        Ok(request)
    }
}

/// Asks one sidecar for one credential after the other until the run ends.
async fn ask(record: Arc<Record>, sidecar: usize, mut address: watch::Receiver<AuthzAddress>) {
    let mut client = checks(&address.borrow_and_update());
    let mut turn = 0_usize;
    while !record.stop.load(Ordering::Relaxed) {
        if address.has_changed().unwrap_or(false) {
            client = checks(&address.borrow_and_update());
        }
        record.ask(&mut client, sidecar, turn).await;
        turn += 1;
        tokio::time::sleep(PAUSE).await;
    }
}

/// Notes what the control plane knows of its sidecars until the run ends.
async fn watch_fleet(
    record: Arc<Record>,
    mut admin: AdminClient<InterceptedService<Channel, Bearer>>,
) {
    while !record.stop.load(Ordering::Relaxed) {
        let request = admin::GetFleetRequest {
            keyring: KEYRING.to_owned(),
        };
        if let Ok(fleet) = admin.get_fleet(within_a_moment(request)).await {
            let now = record.now();
            let mut history = record.history();
            for sidecar in fleet.into_inner().sidecars {
                let number = sidecar.node.strip_prefix("edge-");
                let number: Option<usize> = number.and_then(|number| number.parse().ok());
                let held = sidecar.keyrings.first();
                if let (Some(number), Some(held)) = (number, held)
                    && let Some(past) = history.sidecars.get_mut(number)
                {
                    let (applied, durable) = (held.applied_revision, held.durable_revision);
                    past.acked(&sidecar.boot_id, now, applied, durable);
                }
            }
        }
        tokio::time::sleep(LOOK).await;
    }
}

fn admin_client(control: &Control) -> AdminClient<InterceptedService<Channel, Bearer>> {
    let token = fs::read_to_string(control.token_file()).expect("the token was written");
    let bearer = format!("Bearer {}", token.trim());
    let bearer = Bearer(bearer.parse().expect("a token is ASCII"));
    let endpoint = Endpoint::from_shared(format!("http://{}", control.admin()));
    let channel = endpoint.expect("an address").connect_lazy();
    AdminClient::with_interceptor(channel, bearer)
}

fn within_a_moment<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(Duration::from_secs(3));
    request
}

fn checks(address: &AuthzAddress) -> AuthorizationClient<Channel> {
    let AuthzAddress::Tcp(address) = address else {
        panic!("the sidecars of a run listen on ports");
    };
    let endpoint = Endpoint::from_shared(format!("http://{address}")).expect("an address");
    AuthorizationClient::new(endpoint.timeout(CHECK_TIMEOUT).connect_lazy())
}

fn check_request(secret: &str) -> CheckRequest {
    let http = HttpRequest {
        method: "GET".to_owned(),
        path: "/v1/orders".to_owned(),
        host: "api.example.com".to_owned(),
        headers: [("x-api-key".to_owned(), secret.to_owned())].into(),
        ..HttpRequest::default()
    };
    CheckRequest {
        attributes: Some(AttributeContext {
            request: Some(AttributesRequest {
                http: Some(http),
                ..AttributesRequest::default()
            }),
            ..AttributeContext::default()
        }),
    }
}

fn outcome(response: CheckResponse) -> Outcome {
    let code = response.status.unwrap_or_default().code;
    match response.http_response {
        // What Envoy takes for an allow, whatever else the answer holds.
        _ if code == 0 => Outcome::Allowed,
        Some(HttpResponse::DeniedResponse(denied)) => {
            let problem: serde_json::Value = serde_json::from_str(&denied.body).unwrap_or_default();
            Outcome::Denied(problem["reason"].as_str().unwrap_or("none").to_owned())
        }
        _ => Outcome::Failed(format!("code {code} without a denial")),
    }
}
