//! Creates keys in the store of a control plane before it starts, with the control plane's own code.

use std::{
    fs::File,
    io::{BufWriter, Write as _},
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
    sync::Arc,
};

use anyhow::{Context as _, Result, ensure};
use relatch::{
    clock::Clock,
    control::{catalog::Catalog, metrics::ControlMetrics, secrets},
    key::{
        AllowedSources, Change, ConsumerId, KeyId, Prefix, Scopes, Secret, VersionNumber, Window,
        operation, version::NewVersion,
    },
    store::{SqliteOptions, SqliteStore},
};

/// The file of the secrets of all keys in a keyring.
#[derive(Debug)]
pub(crate) struct Keys(File);

pub(crate) const KEYRING: &str = "large";
/// The number of changes in one commit; each key needs one, and its consumer another one.
const BATCH: u32 = 2_500;
/// The length of a token whose prefix is `rlk`: prefix, `_`, key id, `_`, secret, checksum.
const TOKEN: usize = 3 + 1 + 12 + 1 + 32 + 6;

/// The path of the secrets in a data directory.
pub(crate) fn secrets_file(data_dir: &Path) -> PathBuf {
    data_dir.join("secrets")
}

/// Creates the keyring with `keys` keys, and writes their secrets to a file beside the store.
///
/// # Errors
///
/// When the store cannot be written.
pub(crate) async fn fill(data_dir: &Path, keys: u32) -> Result<()> {
    let pepper = secrets::read_pepper(&data_dir.join("pepper.json"))?;
    let path = data_dir.join("relatch.db");
    let store = SqliteStore::open(&path, SqliteOptions::default()).await?;
    let metrics = ControlMetrics::default();
    let catalog = Catalog::open(Arc::new(store), Clock::system(), pepper, metrics).await?;
    let first = operation::create_keyring(KEYRING.parse()?, Prefix::default(), false, None)?;
    let served = catalog
        .create_keyring("bench", KEYRING.parse()?, &first)
        .await?;
    let scopes = Scopes::parse("orders.read orders.write")?;
    let mut secrets = BufWriter::new(File::create(secrets_file(data_dir))?);
    let mut number = 0;
    while number < keys {
        let end = keys.min(number + BATCH);
        let mut changes = Vec::new();
        for number in number..end {
            let consumer: ConsumerId = format!("consumer-{number}").parse()?;
            changes.push(Change::ConsumerCreated {
                consumer: consumer.clone(),
                name: String::new(),
            });
            let key_id = KeyId::generate()?;
            let secret = Secret::generate(&Prefix::default(), key_id)?;
            ensure!(secret.expose().len() == TOKEN, "a key has another length");
            secrets.write_all(secret.expose().as_bytes())?;
            changes.push(Change::KeyCreated {
                key_id,
                consumer,
                name: String::new(),
                imported: false,
                scopes: scopes.clone(),
                allowed_sources: AllowedSources::default(),
                version: NewVersion {
                    number: VersionNumber::FIRST,
                    digest: served.pepper().digest(&secret.presented()),
                    pepper: served.pepper().id(),
                    window: Window::default(),
                },
            });
        }
        let planned = |_: &_, _| Ok((changes.clone(), ()));
        catalog.commit(&served, "bench", planned).await?;
        number = end;
    }
    secrets.flush()?;
    served.journal().save_if_due().await?;
    Ok(())
}

impl Keys {
    /// Opens the secrets of a filled data directory.
    ///
    /// # Errors
    ///
    /// When it was not filled.
    pub(crate) fn open(data_dir: &Path) -> Result<Self> {
        let path = secrets_file(data_dir);
        let file = File::open(&path).with_context(|| format!("cannot read {}", path.display()))?;
        Ok(Self(file))
    }

    /// Reads the secret of key `number`.
    ///
    /// # Errors
    ///
    /// When it cannot be read.
    pub(crate) fn get(&self, number: u32) -> Result<String> {
        let mut token = [0; TOKEN];
        self.0
            .read_exact_at(&mut token, u64::from(number) * TOKEN as u64)?;
        Ok(String::from_utf8(token.to_vec())?)
    }
}
