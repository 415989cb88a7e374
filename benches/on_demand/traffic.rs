//! Checks whose keys follow Zipf's law.

use std::{fmt, sync::Arc, time::Duration};

use anyhow::{Result, ensure};
use envoy_types::pb::envoy::service::auth::v3::{
    AttributeContext, CheckRequest,
    attribute_context::{HttpRequest, Request as AttributesRequest},
    authorization_client::AuthorizationClient,
};
use tokio::{
    sync::Semaphore,
    task::JoinSet,
    time::{Instant, sleep_until},
};

use crate::{deployment::Daemon, store::Keys};

/// The probability of each key: that of rank `r` is proportional to `1 / r^skew`.
#[derive(Debug)]
pub(crate) struct Zipf(Vec<f64>);

/// The number and the rate of checks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Plan {
    pub(crate) checks: u64,
    /// Checks per second; none: as fast as they are answered.
    pub(crate) rate: Option<u64>,
}

/// The latencies of checks.
#[derive(Debug)]
pub(crate) struct Measured {
    /// Sorted.
    latencies: Vec<Duration>,
    denied: u64,
    took: Duration,
}

/// The number of checks at the same time: as an Envoy with a few worker threads has under load.
const MAX_UNDER_WAY: usize = 64;
/// The seed: every run uses the same keys in the same order.
const SEED: u64 = 0x5eed;

impl Zipf {
    /// The distribution for `keys` keys.
    pub(crate) fn new(keys: u32, skew: f64) -> Self {
        let mut sum = 0.0;
        let ranks = (1..=keys).map(|rank| {
            sum += f64::from(rank).powf(-skew);
            sum
        });
        Self(ranks.collect())
    }

    /// The key at a point in `[0, 1)`.
    fn at(&self, point: f64) -> u32 {
        let whole = self.0.last().copied().unwrap_or_default();
        let at = self.0.partition_point(|sum| *sum <= point * whole);
        u32::try_from(at.min(self.0.len() - 1)).unwrap_or(u32::MAX)
    }
}

/// Sends checks to a sidecar.
///
/// # Errors
///
/// When it does not answer.
pub(crate) async fn run(
    sidecar: &Daemon,
    keys: &Keys,
    zipf: &Zipf,
    plan: Plan,
) -> Result<Measured> {
    let address = format!("http://{}", sidecar.address("ext_authz")?);
    let client = AuthorizationClient::connect(address).await?;
    let room = Arc::new(Semaphore::new(MAX_UNDER_WAY));
    let mut under_way = JoinSet::new();
    let mut latencies = Vec::with_capacity(usize::try_from(plan.checks)?);
    let mut denied = 0;
    let mut random = SEED ^ plan.checks;
    let began = Instant::now();
    for number in 0..plan.checks {
        let due = match plan.rate {
            Some(rate) => {
                let due = began + Duration::from_nanos(number * 1_000_000_000 / rate);
                sleep_until(due).await;
                Some(due)
            }
            None => None,
        };
        let request = request(keys.get(zipf.at(next(&mut random)))?);
        let place = Arc::clone(&room).acquire_owned().await?;
        let mut client = client.clone();
        under_way.spawn(async move {
            let due = due.unwrap_or_else(Instant::now);
            let answer = client.check(request).await;
            drop(place);
            let is_allowed = answer.map(|answer| {
                let status = answer.into_inner().status;
                status.is_some_and(|status| status.code == 0)
            });
            is_allowed.map(|is_allowed| (due.elapsed(), is_allowed))
        });
        while let Some(ended) = under_way.try_join_next() {
            let (took, is_allowed) = ended??;
            latencies.push(took);
            denied += u64::from(!is_allowed);
        }
    }
    while let Some(ended) = under_way.join_next().await {
        let (took, is_allowed) = ended??;
        latencies.push(took);
        denied += u64::from(!is_allowed);
    }
    ensure!(!latencies.is_empty(), "no check was sent");
    latencies.sort_unstable();
    Ok(Measured {
        latencies,
        denied,
        took: began.elapsed(),
    })
}

/// A point in `[0, 1)`: 53 bits of `SplitMix64`.
#[expect(clippy::cast_precision_loss, reason = "53 bits are exact")]
fn next(state: &mut u64) -> f64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut mixed = *state;
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    ((mixed ^ (mixed >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
}

/// A request as Envoy sends it.
fn request(key: String) -> CheckRequest {
    let headers = [
        (":authority", "api.example".to_owned()),
        (":method", "GET".to_owned()),
        (":path", "/v1/orders".to_owned()),
        ("x-api-key", key),
    ];
    let http = HttpRequest {
        method: "GET".to_owned(),
        path: "/v1/orders".to_owned(),
        host: "api.example".to_owned(),
        headers: headers.map(|(name, value)| (name.to_owned(), value)).into(),
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

impl fmt::Display for Measured {
    #[expect(clippy::cast_precision_loss, reason = "far below 2^52")]
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let at = |share: usize| {
            let at = self.latencies.len() * share / 1_000;
            self.latencies[at.min(self.latencies.len() - 1)]
        };
        write!(
            f,
            "{:.0} checks/s, {} of {} denied; p50 {:?}, p99 {:?}, p99.9 {:?}",
            self.latencies.len() as f64 / self.took.as_secs_f64(),
            self.denied,
            self.latencies.len(),
            at(500),
            at(990),
            at(999),
        )
    }
}
