//! Creates the messages of answers from values of the domain.

use std::time::Duration;

use crate::{
    control::token::{Role, Token},
    key::{
        Consumer, ConsumerId, Key, KeyState, KeyVersion, Keyring, KeyringName, OnDeadline,
        Revision, Timestamp, Use, VersionRef, VersionState, Window, rotation::Phase,
    },
    proto::admin as api,
    serving::{Barrier, Laggard, Presence, RunKey},
};

/// The most sidecars that fit into the metadata of an error.
const MAX_MISSING: usize = 10;

pub(super) fn time(value: Option<Timestamp>) -> Option<prost_types::Timestamp> {
    value.map(Timestamp::to_wire)
}

pub(super) fn elapsed(value: Duration) -> Option<prost_types::Duration> {
    prost_types::Duration::try_from(value).ok()
}

pub(super) fn token(token: &Token) -> api::Token {
    api::Token {
        id: token.id.to_string(),
        name: token.name.clone(),
        role: match token.role {
            Role::Viewer => api::Role::Viewer,
            Role::Issuer => api::Role::Issuer,
            Role::Revoker => api::Role::Revoker,
            Role::Admin => api::Role::Admin,
        }
        .into(),
        created_at: time(Some(token.created_at)),
        expires_at: time(token.expires_at),
        ended_at: time(token.ended_at),
    }
}

pub(super) fn keyring(keyring: &Keyring, epoch: crate::key::Epoch) -> api::Keyring {
    api::Keyring {
        name: keyring.name().to_string(),
        prefix: keyring.prefix().to_string(),
        allow_imported: keyring.allow_imported(),
        revision: keyring.revision().get(),
        epoch: epoch.get(),
        consumers: keyring.consumers().len() as u64,
        keys: keyring.keys().len() as u64,
        created_at: time(Some(keyring.created_at())),
        help_url: keyring.help_url().unwrap_or_default().to_owned(),
        versions: keyring.version_count() as u64,
    }
}

pub(super) fn consumer(
    keyring: &KeyringName,
    id: &ConsumerId,
    consumer: &Consumer,
) -> api::Consumer {
    api::Consumer {
        keyring: keyring.to_string(),
        consumer: id.to_string(),
        name: consumer.name.clone(),
        created_at: time(Some(consumer.created_at)),
        key_ids: consumer.keys.keys().map(ToString::to_string).collect(),
    }
}

/// Returns a key, with the use of its versions as `used` returns it.
pub(super) fn key(
    keyring: &Keyring,
    key: &Key,
    used: impl Fn(VersionRef) -> Option<Use>,
) -> api::Key {
    let version = |version: &KeyVersion| {
        let which = VersionRef {
            key_id: key.id,
            version: version.number,
        };
        self::version(version, used(which))
    };
    api::Key {
        keyring: keyring.name().to_string(),
        consumer: key.consumer.to_string(),
        key_id: key.id.to_string(),
        name: key.name.clone(),
        scopes: key
            .scopes
            .iter()
            .map(|scope| scope.as_str().to_owned())
            .collect(),
        allowed_sources: key
            .allowed_sources
            .iter()
            .map(ToString::to_string)
            .collect(),
        revision: keyring.revision().get(),
        versions: key.versions.values().map(version).collect(),
    }
}

pub(super) fn state(state: KeyState) -> i32 {
    match state {
        KeyState::Pending => api::KeyState::Pending,
        KeyState::Active => api::KeyState::Active,
        KeyState::Retiring => api::KeyState::Retiring,
        KeyState::Retired => api::KeyState::Retired,
        KeyState::Revoked => api::KeyState::Revoked,
    }
    .into()
}

pub(super) fn on_deadline(answer: OnDeadline) -> i32 {
    match answer {
        OnDeadline::Retire => api::OnDeadline::Retire,
        OnDeadline::Extend => api::OnDeadline::Extend,
        OnDeadline::Hold => api::OnDeadline::Hold,
    }
    .into()
}

pub(super) fn phase(phase: Phase) -> i32 {
    match phase {
        Phase::Stage => api::RotationPhase::Stage,
        Phase::Overlap => api::RotationPhase::Overlap,
        Phase::Drain => api::RotationPhase::Drain,
        Phase::Held => api::RotationPhase::Held,
        Phase::SecretLost => api::RotationPhase::SecretLost,
    }
    .into()
}

/// Returns a version with its secret. `secret` is empty if the owner imported it, or if the control
/// plane has forgotten it.
pub(super) fn issued(
    keyring: &Keyring,
    key: &Key,
    version: &KeyVersion,
    secret: &str,
    revision: Revision,
) -> api::IssuedKey {
    let Window {
        not_before,
        expires_at,
    } = version.window;
    api::IssuedKey {
        keyring: keyring.name().to_string(),
        consumer: key.consumer.to_string(),
        key_id: key.id.to_string(),
        version: version.number.get(),
        state: state(version.state.kind()),
        secret: secret.to_owned(),
        not_before: time(not_before),
        expires_at: time(expires_at),
        revision: revision.get(),
        secret_forgotten: false,
        barrier: None,
    }
}

pub(super) fn barrier(barrier: &Barrier) -> api::Barrier {
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    api::Barrier {
        applied: count(barrier.confirmed),
        total: count(barrier.total),
        laggards: barrier.laggards.iter().map(laggard).collect(),
        passed_by: barrier.passed_by.iter().map(run).collect(),
    }
}

/// Returns a barrier that is small enough for the metadata of an error: with [`MAX_MISSING`]
/// laggards at most, those that are not connected first.
pub(super) fn missing(barrier: &Barrier) -> api::Barrier {
    let mut laggards: Vec<_> = barrier.laggards.iter().collect();
    laggards.sort_by_key(|laggard| laggard.presence == Presence::Connected);
    laggards.truncate(MAX_MISSING);
    api::Barrier {
        laggards: laggards.into_iter().map(laggard).collect(),
        passed_by: Vec::new(),
        ..self::barrier(barrier)
    }
}

fn laggard(laggard: &Laggard) -> api::Laggard {
    let (presence, since) = presence(laggard.presence);
    api::Laggard {
        node: laggard.key.node.clone(),
        run_id: laggard.key.run_id.clone(),
        cluster: laggard.cluster.clone(),
        connected: laggard.presence == Presence::Connected,
        behind: laggard.behind,
        last_seen: time(Some(laggard.last_seen)),
        presence: presence.into(),
        since: time(since),
        serves_until: time(laggard.serves_until),
        lacks_disk: laggard.lacks_disk,
    }
}

pub(super) fn run(key: &RunKey) -> api::SidecarRun {
    api::SidecarRun {
        node: key.node.clone(),
        run_id: key.run_id.clone(),
    }
}

/// Returns whether a run is connected, lost or stopped, and since when it is lost or stopped.
pub(super) const fn presence(presence: Presence) -> (api::Presence, Option<Timestamp>) {
    match presence {
        Presence::Connected => (api::Presence::Connected, None),
        Presence::Lost(since) => (api::Presence::Lost, Some(since)),
        Presence::Stopped(since) => (api::Presence::Stopped, Some(since)),
    }
}

fn version(version: &KeyVersion, used: Option<Use>) -> api::KeyVersion {
    let (ends_at, reason) = match &version.state {
        VersionState::Retiring { until, .. } => (Some(*until), String::new()),
        VersionState::Retired { reason, .. } | VersionState::Revoked { reason, .. } => {
            (None, reason.to_string())
        }
        VersionState::Pending { .. } | VersionState::Active { .. } => (None, String::new()),
    };
    api::KeyVersion {
        version: version.number.get(),
        state: state(version.state.kind()),
        created_at: time(Some(version.created_at)),
        not_before: time(version.window.not_before),
        expires_at: time(version.window.expires_at),
        reason,
        requests: used.map(|used| used.requests),
        last_used_at: time(used.and_then(|used| used.last_used)),
        ends_at: time(ends_at),
    }
}
