//! Measures the latency of checks while keys change: one every 50 ms, in a large keyring.
//!
//! On a machine with few cores, the control plane, which commits the changes, takes time from the load. There is therefore a
//! third condition besides "quiet" and "changes": as many changes of another keyring, which this sidecar does not have.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use ::relatch::{
    cli::{
        Failure,
        connection::{self, Bearer, TlsArgs},
    },
    proto::admin::CreateKeyRequest,
};
use anyhow::{Context as _, Result, anyhow, ensure};
use tokio::{
    runtime::Builder,
    time::{MissedTickBehavior, interval},
};

use super::{
    Bench, Shown, grouped,
    size::{PRESENTED, STREAMS},
    tail,
};
use crate::{
    deployment::{Deployment, SidecarOptions},
    generator::{Generator, Latencies, Traffic},
    page,
    patience::until,
    rounds::{figures, interleaved},
    row::{Row, Unit},
    server::Server,
};

/// The condition while checks are sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Condition {
    Quiet,
    /// Changes of a keyring that the sidecar does not have.
    Elsewhere,
    Changes,
}

/// A writer that creates a new key at every tick.
struct Writer {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<u64>>,
}

const PART: &str = "change";
const EVERY: Duration = Duration::from_millis(50);
/// The longest wait for a change, which needs milliseconds to a sidecar on the same machine.
const ARRIVE_TIMEOUT: Duration = Duration::from_secs(20);

pub(super) fn measure(bench: Bench<'_>) -> Result<Shown> {
    let plan = bench.plan;
    let keys = bench.deployment.keys(plan.many)?;
    let server = bench
        .deployment
        .sidecar(plan.many, SidecarOptions::default())?;
    let traffic = || Traffic::checks(server.address()?, keys, PRESENTED);
    server.allow(traffic()?)?;
    let mut generator = Generator::new(server.address()?, traffic()?);
    let saturated = server.allowing(plan.checks, || generator.saturate(plan.checks, STREAMS))?;
    let rate = saturated / 2.0;
    let count = tail::count(rate, plan.paced.as_secs_f64());
    let mut conditions = [Condition::Quiet, Condition::Elsewhere, Condition::Changes];
    let measured = interleaved(
        plan.rounds,
        &mut conditions,
        |condition| condition.name().to_owned(),
        |condition| condition.measure(bench, &server, &mut generator, count, rate),
    )?;

    let ratio = |of: usize, to: usize| {
        let name = format!("{} / {}: p99", conditions[of].name(), conditions[to].name());
        let [of, to] = [&measured[of], &measured[to]].map(|rounds| figures(rounds, Latencies::p99));
        Row::ratio(PART, name, &of, &to)
    };
    let mut rows = vec![ratio(2, 0), ratio(2, 1)];
    for (condition, rounds) in conditions.iter().zip(&measured) {
        let row = |what: &str, figure: fn(&Latencies) -> f64| {
            let name = format!("{}: {what}", condition.name());
            Row::new(PART, name, Unit::Microseconds, figures(rounds, figure))
        };
        rows.extend([
            row("p50", Latencies::median),
            row("p99", Latencies::p99),
            row("p99.9", |latencies| latencies.all_but_one_in(1_000)),
            row("longest", Latencies::max),
        ]);
    }
    Ok(Shown {
        plan: format!(
            "{} rounds of {} Checks at half of the saturation rate, {} keys, a change every {} ms",
            plan.rounds,
            grouped(count),
            grouped(plan.many),
            EVERY.as_millis(),
        ),
        rows,
    })
}

impl Condition {
    const fn name(self) -> &'static str {
        match self {
            Self::Quiet => "quiet",
            Self::Elsewhere => "changes elsewhere",
            Self::Changes => "changes",
        }
    }

    fn measure(
        self,
        bench: Bench<'_>,
        server: &Server,
        generator: &mut Generator,
        count: u64,
        rate: f64,
    ) -> Result<Latencies> {
        let changed = match self {
            Self::Quiet => None,
            Self::Elsewhere => Some(bench.plan.few),
            Self::Changes => Some(bench.plan.many),
        };
        let before = held(server)?;
        let writer = changed
            .map(|size| Writer::start(bench.deployment, size))
            .transpose()?;
        let latencies = server.allowing(count, || generator.pace(count, rate))?;
        let committed = writer.map_or(Ok(0), Writer::stop)?;
        let expected = match self {
            Self::Quiet | Self::Elsewhere => before,
            Self::Changes => before + committed,
        };
        ensure!(committed > 0 || self == Self::Quiet, "nothing was changed");
        until("the sidecar holds every change", ARRIVE_TIMEOUT, || {
            Ok((held(server)? == expected).then_some(()))
        })?;
        Ok(latencies)
    }
}

impl Writer {
    fn start(deployment: &Deployment, size: u32) -> Result<Self> {
        let keyring = deployment.keyring(size)?.to_owned();
        let (address, token_file) = (deployment.admin()?, deployment.token_file());
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let write = async move || {
            let bearer = Bearer::from_file(&token_file)?;
            let mut admin = connection::connect(&address, bearer, &TlsArgs::default()).await?;
            let mut ticks = interval(EVERY);
            ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
            let mut committed = 0;
            while !stopped.load(Ordering::Relaxed) {
                ticks.tick().await;
                let request = CreateKeyRequest {
                    keyring: keyring.clone(),
                    consumer: "consumer-0".to_owned(),
                    ..CreateKeyRequest::default()
                };
                connection::answer(admin.create_key(request)).await?;
                committed += 1;
            }
            Ok::<_, Failure>(committed)
        };
        let thread = thread::spawn(move || {
            let runtime = Builder::new_current_thread().enable_all().build()?;
            let written = runtime.block_on(write());
            written.map_err(|failure| anyhow!("keys are not made: {}", failure.report(false)))
        });
        Ok(Self { stop, thread })
    }

    /// Stops the writer, and returns the number of committed changes.
    fn stop(self) -> Result<u64> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread
            .join()
            .map_err(|_| anyhow!("the writer has panicked"))?
    }
}

/// The number of active versions of the sidecar.
fn held(server: &Server) -> Result<u64> {
    let http = server.metrics.context("a sidecar has metrics")?;
    page::sum(
        &page::get(http, "/metrics")?,
        "relatch_keyring_keys",
        "state=\"active\"",
    )
}
