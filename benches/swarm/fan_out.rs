//! The measurements with streams: their memory, the time of a change to all of them, and their return after a cut.

use std::time::Duration;

use anyhow::{Result, ensure};
use tokio::time::Instant;

use crate::{
    control::{Control, Home},
    figures::{Report, kibibytes, mebibytes, millis},
    seed::Seed,
    swarm::Swarm,
    writers::{self, Written},
};

/// The size of the measurements with streams.
#[derive(Debug, clap::Args)]
pub(crate) struct FanOut {
    /// Number of sidecars, each with its own stream
    #[arg(long, value_name = "N", default_value = "1000", value_parser = clap::value_parser!(u32).range(1..))]
    streams: u32,

    /// Number of keys in the keyring that they follow
    #[arg(long, value_name = "N", default_value = "10000", value_parser = clap::value_parser!(u64).range(1_000..))]
    keys: u64,

    /// Number of timed revocations
    #[arg(long, value_name = "N", default_value = "100", value_parser = clap::value_parser!(u32).range(1..=1_000))]
    revocations: u32,

    /// Number of cuts of all streams, for each kind
    #[arg(long, value_name = "N", default_value = "3", value_parser = clap::value_parser!(u32).range(1..))]
    cuts: u32,

    /// Time in seconds for which each number of writers commits
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = clap::value_parser!(u64).range(1..))]
    commit_for: u64,
}

/// The keyring that all sidecars follow.
const KEYRING: &str = "bench";
/// The numbers of operators that write at the same time.
const WRITERS: [usize; 3] = [1, 8, 64];
/// The time without changes after which every beat was answered, and the memory is that of an idle control plane.
const AT_REST: Duration = Duration::from_secs(6);
/// The time of six beats of each sidecar.
const IDLE_FOR: Duration = Duration::from_secs(30);

impl FanOut {
    /// Measures, and adds the figures to `report`.
    ///
    /// # Errors
    ///
    /// When something fails, or a sidecar never follows.
    pub(crate) async fn measure(&self, report: &mut Report) -> Result<()> {
        let directory = tempfile::tempdir()?;
        let home = Home::make(directory.path())?;
        let seed = Seed {
            keys: self.keys,
            keys_per_consumer: 1,
        };
        let keys = seed.fill(&home.store(), &home.pepper()?, KEYRING).await?;
        let control = home.start()?;

        for writers in WRITERS {
            let written = self.write(&control, writers).await?;
            report.add(
                format!("commits a second, {writers} writers, no stream"),
                &[written.rate()],
            )?;
        }
        let without = control.memory()?.resident;
        let began = Instant::now();
        let swarm = Swarm::send_out(self.streams as usize, control.discovery()?, KEYRING);
        swarm.all_follow().await?;
        let all = format!("all {} sidecars", swarm.size());
        report.add(
            format!("first connection of {all}, each with a snapshot, ms"),
            &[millis(began.elapsed())],
        )?;
        let counts = swarm.counts();
        let mut admin = control.admin().await?;
        let items = counts.snapshots * writers::keys(&mut admin, KEYRING).await?;
        report.add(
            "bytes of a key in a snapshot",
            &[ratio(counts.snapshot_bytes, items)],
        )?;
        tokio::time::sleep(AT_REST).await;
        let with = control.memory()?.resident;
        let grown = kibibytes(with.saturating_sub(without)) / f64::from(self.streams);
        report.add("control plane, memory of a stream, KiB", &[grown])?;

        idle(&swarm, report).await?;
        self.revoke(&control, &swarm, &keys, report).await?;
        for writers in WRITERS {
            let before = swarm.counts().deltas;
            let began = Instant::now();
            let written = self.write(&control, writers).await?;
            swarm.all_applied(written.revision).await?;
            let took = began.elapsed();
            let deltas = swarm.counts().deltas - before;
            report.add(
                format!("commits a second, {writers} writers, {all} following"),
                &[written.rate()],
            )?;
            report.add(
                format!("deltas a second to {all}, {writers} writers"),
                &[f64::from(u32::try_from(deltas)?) / took.as_secs_f64()],
            )?;
            report.add(
                format!("until {all} had the last commit of {writers} writers, ms"),
                &[millis(took.saturating_sub(written.took))],
            )?;
        }
        self.cut(&control, &swarm, report).await?;
        swarm.stop().await;
        Ok(())
    }

    async fn write(&self, control: &Control, writers: usize) -> Result<Written> {
        let time = Duration::from_secs(self.commit_for);
        writers::make_keys(control, KEYRING, writers, time).await
    }

    async fn revoke(
        &self,
        control: &Control,
        swarm: &Swarm,
        keys: &[::relatch::key::KeyId],
        report: &mut Report,
    ) -> Result<()> {
        let mut admin = control.admin().await?;
        let mut head = writers::revision(&mut admin, KEYRING).await?;
        let before = swarm.counts().change_bytes;
        let (mut by_swarm, mut by_control) = (Vec::new(), Vec::new());
        for key_id in keys.iter().take(self.revocations as usize) {
            head += 1;
            swarm.expect_revoked(head);
            let began = Instant::now();
            let revoked = writers::revoke(&mut admin, *key_id).await?;
            ensure!(
                revoked.revision == head,
                "somebody else has committed revision {head}"
            );
            let last = swarm.all_revoked().await?;
            by_swarm.push(millis(last.duration_since(began)));
            by_control.push(millis(revoked.propagation));
        }
        swarm.all_applied(head).await?;
        let bytes = swarm.counts().change_bytes - before;
        let each = u64::from(self.revocations) * swarm.size() as u64;
        report.add(
            "bytes of a revocation and its delta to one sidecar",
            &[ratio(bytes, each)],
        )?;
        let all = format!("all {} sidecars", swarm.size());
        for (values, from) in [
            (&by_swarm, "from the call of revoke until it was known to"),
            (&by_control, "from the revocation until it was acked by"),
        ] {
            report.add(format!("{from} {all}, ms"), values)?;
            report.add_p99(format!("{from} {all}, p99, ms"), values)?;
        }
        Ok(())
    }

    async fn cut(&self, control: &Control, swarm: &Swarm, report: &mut Report) -> Result<()> {
        for (forget, with) in [(false, "resuming"), (true, "holding nothing")] {
            for (jitter, how) in [(false, "at once"), (true, "with jitter")] {
                let (mut times, mut peaks) = (Vec::new(), Vec::new());
                let before = swarm.counts();
                for _ in 0..self.cuts {
                    // Until a beat was answered, a simulated sidecar does not know the digest of its keyring.
                    tokio::time::sleep(AT_REST).await;
                    control.forget_peak()?;
                    times.push(millis(swarm.cut(jitter, forget).await?));
                    peaks.push(mebibytes(control.memory()?.peak));
                }
                let after = swarm.counts();
                let all = format!("{} sidecars come back {how}, {with}", swarm.size());
                report.add(format!("{all}: until all follow, ms"), &times)?;
                report.add(
                    format!("{all}: peak memory of the control plane, MiB"),
                    &peaks,
                )?;
                let of_each = f64::from(self.cuts);
                report.add(
                    format!("{all}: failed attempts"),
                    &[per_cut(after.failures - before.failures, of_each)?],
                )?;
                report.add(
                    format!("{all}: snapshots"),
                    &[per_cut(after.snapshots - before.snapshots, of_each)?],
                )?;
            }
        }
        Ok(())
    }
}

/// Measures the bytes between a sidecar and the control plane while nothing changes.
async fn idle(swarm: &Swarm, report: &mut Report) -> Result<()> {
    let (began, before) = (Instant::now(), swarm.counts());
    tokio::time::sleep(IDLE_FOR).await;
    let (took, after) = (began.elapsed().as_secs_f64(), swarm.counts());
    let sidecars = f64::from(u32::try_from(swarm.size())?);
    for (bytes, way) in [
        (after.sent - before.sent, "from"),
        (after.received - before.received, "to"),
    ] {
        let bytes = f64::from(u32::try_from(bytes)?);
        report.add(
            format!("idle: bytes a second {way} a sidecar, with the frames of HTTP/2"),
            &[bytes / sidecars / took],
        )?;
    }
    Ok(())
}

fn per_cut(count: u64, cuts: f64) -> Result<f64> {
    Ok(f64::from(u32::try_from(count)?) / cuts)
}

#[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
fn ratio(of: u64, to: u64) -> f64 {
    of as f64 / to as f64
}
