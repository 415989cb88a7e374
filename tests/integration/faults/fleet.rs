//! What the control plane is asked for and tells: changes, and what it knows of its sidecars.

use std::{
    collections::HashMap,
    fs, process,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use relatch::proto::admin::{self, admin_client::AdminClient};
use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Channel, Endpoint},
};

use super::record::Record;
use crate::support::relatch::Control;

/// The admin API, to whoever holds the first token.
pub(super) type Admin = AdminClient<InterceptedService<Channel, Bearer>>;

/// Puts a token into every call.
#[derive(Clone, Debug)]
pub(super) struct Bearer(MetadataValue<Ascii>);

/// The keyring of a run.
pub(super) const KEYRING: &str = "payments";
/// The label with a sidecar's number, which tells those apart that have one name. Nothing but the judge looks at it.
pub(super) const NUMBER: &str = "number";
/// Between two looks at the fleet.
const LOOK: Duration = Duration::from_millis(15);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        request
            .metadata_mut()
            .insert("authorization", self.0.clone());
        Ok(request)
    }
}

/// The admin API of a control plane.
pub(super) fn admin_of(control: &Control) -> Admin {
    let token = fs::read_to_string(control.token_file()).expect("the token was written");
    let bearer = format!("Bearer {}", token.trim());
    let bearer = Bearer(bearer.parse().expect("a token is ASCII"));
    let endpoint = Endpoint::from_shared(format!("http://{}", control.admin()));
    let channel = endpoint.expect("an address").connect_lazy();
    AdminClient::with_interceptor(channel, bearer)
}

/// A call that ends by itself when nobody answers.
pub(super) fn within_a_moment<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(Duration::from_secs(3));
    request
}

/// What the names of a world's nodes begin with, before their numbers. No two worlds have a name in common: the lock that
/// proves the end of a process is one of the machine.
pub(super) fn new_prefix() -> String {
    static WORLDS: AtomicUsize = AtomicUsize::new(0);
    let world = WORLDS.fetch_add(1, Ordering::Relaxed);
    format!("edge-{}-{world}-", process::id())
}

/// Notes what the control plane knows of its sidecars until the run ends.
pub(super) async fn watch(record: Arc<Record>, mut admin: Admin) {
    // Labels are told of those that have connected since the control plane was started.
    let mut numbers: HashMap<String, usize> = HashMap::new();
    while !record.has_stopped() {
        let request = admin::GetFleetRequest {
            keyring: KEYRING.to_owned(),
        };
        let asked = record.now();
        if let Ok(fleet) = admin.get_fleet(within_a_moment(request)).await {
            let now = record.now();
            let mut history = record.history();
            for sidecar in fleet.into_inner().sidecars {
                if let Some(number) = sidecar.labels.get(NUMBER) {
                    let number = number.parse().expect("the number of a sidecar");
                    numbers.insert(sidecar.run_id.clone(), number);
                }
                let number = numbers.get(&sidecar.run_id);
                let held = sidecar.keyrings.first();
                if let (Some(number), Some(held)) = (number, held)
                    && let Some(past) = history.sidecars.get_mut(*number)
                {
                    let (applied, durable) = (held.applied_revision, held.durable_revision);
                    if sidecar.connected {
                        past.hears_of(&sidecar.run_id, asked);
                    }
                    past.acked(&sidecar.run_id, now, applied, durable);
                }
            }
        }
        tokio::time::sleep(LOOK).await;
    }
}
