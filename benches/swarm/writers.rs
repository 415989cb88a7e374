//! Operators, which call the admin API.

use std::time::Duration;

use ::relatch::{
    cli::connection::Admin,
    key::KeyId,
    proto::admin::{
        CreateKeyRequest, Keyring, ListKeyringsRequest, RevokeRequest, revoke_request::Which,
    },
};
use anyhow::{Context as _, Result, ensure};
use tokio::{task::JoinSet, time::Instant};

use crate::control::Control;

/// The result of many writers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Written {
    /// The number of commits, of one key each.
    pub(crate) commits: u64,
    /// The time from the first call to the last answer.
    pub(crate) took: Duration,
    /// The revision of the last commit.
    pub(crate) revision: u64,
}

/// A revocation that every sidecar has confirmed.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Revoked {
    pub(crate) revision: u64,
    /// The time from the commit to the last ack, by the clock of the control plane.
    pub(crate) propagation: Duration,
}

/// The consumer of the created keys.
const CONSUMER: &str = "writers";

impl Written {
    /// Commits a second.
    pub(crate) fn rate(&self) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "counts are far below 2^52")]
        let commits = self.commits as f64;
        commits / self.took.as_secs_f64()
    }
}

/// Lets `writers` create keys for `time`. Each has its own connection, and creates one key after another.
///
/// # Errors
///
/// When a call fails.
pub(crate) async fn make_keys(
    control: &Control,
    keyring: &str,
    writers: usize,
    time: Duration,
) -> Result<Written> {
    let mut connections = Vec::new();
    for _ in 0..writers {
        connections.push(control.admin().await?);
    }
    if let Some(first) = connections.first_mut() {
        make_key(first, keyring).await?;
    }
    let began = Instant::now();
    let mut working = JoinSet::new();
    for mut admin in connections {
        let keyring = keyring.to_owned();
        working.spawn(async move {
            let (mut commits, mut revision) = (0, 0);
            while began.elapsed() < time {
                revision = make_key(&mut admin, &keyring).await?;
                commits += 1;
            }
            anyhow::Ok((commits, revision))
        });
    }
    let mut written = Written {
        commits: 0,
        took: Duration::ZERO,
        revision: 0,
    };
    while let Some(ended) = working.join_next().await {
        let (commits, revision) = ended??;
        written.commits += commits;
        written.revision = written.revision.max(revision);
    }
    written.took = began.elapsed();
    Ok(written)
}

async fn make_key(admin: &mut Admin, keyring: &str) -> Result<u64> {
    let request = CreateKeyRequest {
        keyring: keyring.to_owned(),
        consumer: CONSUMER.to_owned(),
        create_missing: true,
        ..CreateKeyRequest::default()
    };
    Ok(admin.create_key(request).await?.into_inner().revision)
}

/// The revision of a keyring.
///
/// # Errors
///
/// When there is no such keyring.
pub(crate) async fn revision(admin: &mut Admin, keyring: &str) -> Result<u64> {
    Ok(of_keyring(admin, keyring).await?.revision)
}

/// The number of keys in a keyring.
///
/// # Errors
///
/// When there is no such keyring.
pub(crate) async fn keys(admin: &mut Admin, keyring: &str) -> Result<u64> {
    Ok(of_keyring(admin, keyring).await?.keys)
}

async fn of_keyring(admin: &mut Admin, keyring: &str) -> Result<Keyring> {
    let keyrings = admin.list_keyrings(ListKeyringsRequest::default()).await?;
    let mut keyrings = keyrings.into_inner().keyrings.into_iter();
    let found = keyrings.find(|held| held.name == keyring);
    found.context("the keyring is not served")
}

/// Revokes a key, and waits until every sidecar that may serve has confirmed.
///
/// # Errors
///
/// When the call fails.
pub(crate) async fn revoke(admin: &mut Admin, key_id: KeyId) -> Result<Revoked> {
    let request = RevokeRequest {
        key_id: key_id.to_string(),
        which: Some(Which::All(true)),
        reason: "measured".to_owned(),
        wait: true,
        ..RevokeRequest::default()
    };
    let mut steps = admin.revoke(request).await?.into_inner();
    let mut last = None;
    while let Some(step) = steps.message().await? {
        last = Some(step);
    }
    let last = last.context("the revocation was not answered")?;
    ensure!(last.done, "the revocation has not reached every sidecar");
    let propagation = last.propagation.context("nobody was waited for")?;
    Ok(Revoked {
        revision: last.revision,
        propagation: propagation.try_into()?,
    })
}
