//! Measures the memory of a key: it fills a cache in this process until the cache evicts, and measures the process.

use std::{fs, sync::Arc, time::Duration};

use anyhow::{Context as _, Result};
use relatch::{
    clock::BootTime,
    key::{
        AllowedSources, Epoch, KeyDigest, KeyId, KeyRecord, KeyState, PepperId, Prefix, Revision,
        Scopes, VersionNumber, Window,
    },
    keyring::{
        KeyringSettings, Keyrings, Mode, Staleness,
        on_demand::{CacheSettings, Fill, Follower, Found},
    },
};

/// Fills a cache of the default size with keys of `versions` versions each, and reports the memory of a key.
///
/// # Errors
///
/// When the process cannot be measured.
pub(crate) fn of_a_full_cache(versions: u64) -> Result<String> {
    let settings = CacheSettings {
        ttl: Duration::from_hours(1),
        ..CacheSettings::default()
    };
    let name = "payments".parse()?;
    let keyrings = Keyrings::with_modes([(name, Staleness::default(), Mode::OnDemand(settings))]);
    let slots = keyrings.load();
    let slot = slots.iter().next().context("one keyring")?;
    let cache = slot.cache().context("it is held on demand")?;
    let mut follower = Follower::new(Arc::clone(slot), Arc::clone(cache));
    follower.adopt(KeyringSettings {
        prefix: Prefix::default(),
        issued_only: true,
        peppers: Vec::new(),
        help_url: None,
    });
    follower.start(Epoch::new(1), Revision::new(1))?;
    let before = resident("self")?;
    let mut number: u64 = 0;
    while cache.stats().evictions() < 50_000 {
        let key_id = KeyId::generate()?;
        let mut records = Vec::new();
        for version in 1..=versions {
            number += 1;
            records.push(KeyRecord {
                key_id,
                version: VersionNumber::new(u32::try_from(version)?).context("not zero")?,
                ..record(number)?
            });
        }
        let siblings = records.split_off(1);
        let record = records.remove(0);
        follower.fill(
            Fill {
                epoch: Epoch::new(1),
                revision: Revision::new(1),
                digest: record.digest,
                found: Found::Version(Box::new(record)),
                siblings: Some(siblings),
            },
            BootTime::from_millis(1_000),
        );
    }
    cache.tidy();
    let taken = resident("self")? - before;
    let keys = cache.len() / versions;
    Ok(format!(
        "a full cache: {keys} keys of {versions} versions counted as {} each, {} MiB of {} MiB; the process took {} MiB, {} bytes a key",
        cache.bytes() / keys,
        cache.bytes() >> 20,
        settings.max_size >> 20,
        taken >> 20,
        taken / keys,
    ))
}

/// A record like those of the measured stores.
fn record(number: u64) -> Result<KeyRecord> {
    // Practically random, as digests are.
    let mut bytes = [0; KeyDigest::LEN];
    let mut state = number;
    for chunk in bytes.chunks_exact_mut(8) {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        chunk.copy_from_slice(&(mixed ^ (mixed >> 31)).to_le_bytes());
    }
    Ok(KeyRecord {
        digest: KeyDigest::from_slice(&bytes)?,
        pepper: PepperId::new(1),
        key_id: KeyId::generate()?,
        version: VersionNumber::FIRST,
        consumer: format!("consumer-{number}").parse()?,
        state: KeyState::Active,
        window: Window::default(),
        retiring_since: None,
        retires_at: None,
        scopes: Scopes::parse("orders.read orders.write")?,
        allowed_sources: AllowedSources::default(),
        replaced_by: None,
        rotation: None,
    })
}

/// The resident memory of a process, in bytes.
///
/// # Errors
///
/// When there is no such process.
pub(crate) fn resident(process: &str) -> Result<u64> {
    let path = format!("/proc/{process}/status");
    let status = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
    let kib: u64 = kib.context("no VmRSS")?.trim().parse()?;
    Ok(kib << 10)
}
