//! Fills keyrings with keys in the store of a control plane before it starts.
//!
//! A control plane commits a key in about a millisecond, mostly the time of the disk: a million keys would need a quarter of
//! an hour. Here, the control plane's own code commits five thousand keys at a time. The store is the same as if the control
//! plane had written it. This needs memory, so a process of its own does it.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::Arc,
};

use ::relatch::{
    clock::Clock,
    control::{
        catalog::Catalog, journal::CommitError, metrics::ControlMetrics, secrets,
        served::ServedKeyring,
    },
    key::{
        AllowedSources, ConsumerId, KeyId, KeyringName, Prefix, Scope, Scopes, Secret, Window,
        operation::{self, KeySpec},
    },
    store::{SqliteOptions, SqliteStore},
};
use anyhow::{Context as _, Result, ensure};
use tokio::runtime::Builder;

use crate::{keys::Keys, server::this_program};

/// A keyring and the secrets of its keys.
#[derive(Clone, Debug)]
pub(crate) struct Population {
    pub(crate) keyring: KeyringName,
    pub(crate) keys: Arc<Keys>,
}

/// A key that will be created.
struct Newcomer {
    consumer: ConsumerId,
    id: KeyId,
    secret: Secret,
}

const ACTOR: &str = "bench";
/// The number of changes in one commit: half of what the store accepts at once.
const BATCH: u32 = 5_000;

impl Population {
    /// Fills the store in `data_dir`, which `relatch control init` has created, with a keyring for each of `sizes`.
    ///
    /// # Errors
    ///
    /// When the process that fills it fails.
    pub(crate) fn make(data_dir: &Path, sizes: &[u32]) -> Result<Vec<Self>> {
        let filling = this_program()?
            .arg("fill")
            .arg(data_dir)
            .args(sizes.iter().map(u32::to_string))
            .status();
        ensure!(filling?.success(), "the store is not filled");
        sizes
            .iter()
            .map(|&size| {
                let keys = fs::read(keys_file(data_dir, size))?;
                Ok(Self {
                    keyring: keyring(size)?,
                    keys: Arc::new(Keys::of(keys)),
                })
            })
            .collect()
    }
}

/// Fills a store, and writes the secrets to a file beside it. Every key has its own consumer and two scopes.
///
/// # Errors
///
/// When the store cannot be written.
pub(crate) fn fill(data_dir: &Path, sizes: &[u32]) -> Result<()> {
    let runtime = Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let pepper = secrets::read_pepper(&data_dir.join("pepper.json"))?;
        let path = data_dir.join("relatch.db");
        let store = SqliteStore::open(&path, SqliteOptions::default()).await?;
        let metrics = ControlMetrics::default();
        let catalog = Catalog::open(Arc::new(store), Clock::system(), pepper, metrics).await?;
        for &size in sizes {
            let keys = fill_keyring(&catalog, size).await?;
            fs::write(keys_file(data_dir, size), keys.as_bytes())?;
        }
        Ok(())
    })
}

async fn fill_keyring(catalog: &Catalog, size: u32) -> Result<Keys> {
    let name = keyring(size)?;
    let first = operation::create_keyring(name.clone(), Prefix::default(), false, None)?;
    let served = catalog.create_keyring(ACTOR, name, &first).await?;
    let scopes = ["orders.read", "orders.write"].map(str::parse::<Scope>);
    let scopes: Scopes = scopes.into_iter().collect::<Result<_, _>>()?;
    let mut keys = Keys::of(Vec::new());
    let mut number = 0;
    while number < size {
        let end = size.min(number + BATCH);
        let batch: Vec<Newcomer> = (number..end).map(Newcomer::new).collect::<Result<_>>()?;
        commit(catalog, &served, &batch, &scopes).await?;
        for newcomer in &batch {
            keys.push(newcomer.secret.expose())?;
        }
        number = end;
    }
    served.journal().save_if_due().await?;
    Ok(keys)
}

fn keyring(size: u32) -> Result<KeyringName> {
    Ok(format!("keys-{size}").parse()?)
}

fn keys_file(data_dir: &Path, size: u32) -> PathBuf {
    data_dir.join(format!("keys-{size}.secrets"))
}

impl Newcomer {
    fn new(number: u32) -> Result<Self> {
        let id = KeyId::generate()?;
        Ok(Self {
            consumer: format!("consumer-{number}").parse()?,
            id,
            secret: Secret::generate(&Prefix::default(), id)?,
        })
    }
}

/// Makes two commits, because a key needs an existing consumer.
async fn commit(
    catalog: &Catalog,
    served: &ServedKeyring,
    batch: &[Newcomer],
    scopes: &Scopes,
) -> Result<()> {
    catalog
        .commit(served, ACTOR, |keyring, _| {
            let mut changes = Vec::with_capacity(batch.len());
            for newcomer in batch {
                let name = String::new();
                changes.extend(keyring.create_consumer(newcomer.consumer.clone(), name)?);
            }
            Ok((changes, ()))
        })
        .await
        .context("cannot make consumers")?;
    catalog
        .commit(served, ACTOR, |keyring, now| {
            let mut changes = Vec::with_capacity(batch.len());
            for newcomer in batch {
                let spec = KeySpec {
                    key_id: newcomer.id,
                    consumer: newcomer.consumer.clone(),
                    name: String::new(),
                    scopes: scopes.clone(),
                    allowed_sources: AllowedSources::default(),
                    window: Window::default(),
                    imported: false,
                };
                let secret = newcomer.secret.presented();
                changes.extend(keyring.create_key(spec, &secret, served.pepper(), now)?);
            }
            Ok::<_, CommitError>((changes, ()))
        })
        .await
        .context("cannot make keys")?;
    Ok(())
}
