//! Shows how often versions are used, and the progress of the rotations of a key.

use std::{collections::BTreeSet, time::Duration};

use tonic::Status;

use super::{AdminApi, error, field, messages};
use crate::{
    control::{served::ServedKeyring, usage::ReportedCaller},
    key::{
        Evidence, Key, KeyId, KeyVersion, Keyring, KeyringName, Timestamp, VersionRef,
        VersionState, rotation,
    },
    proto::admin as api,
    serving::{Gap, RunKey, Target},
};

/// A sidecar without a report for longer than this is named as silent. A report replies to each
/// answer to a beat, every five seconds unless configured otherwise.
const LATE_AFTER: Duration = Duration::from_secs(30);
/// The most callers that a refusal names.
const MAX_NAMED: usize = 5;

impl AdminApi {
    pub(super) fn get_usage(
        &self,
        request: &api::GetUsageRequest,
    ) -> Result<api::KeyUsage, Status> {
        let key_id: KeyId = field::parse("key_id", &request.key_id)?;
        let served = self.holding(key_id)?;
        self.describe_usage(&served, key_id)
    }

    pub(super) fn get_rotation(
        &self,
        request: &api::GetRotationRequest,
    ) -> Result<api::RotationStatus, Status> {
        let key_id: KeyId = field::parse("key_id", &request.key_id)?;
        let served = self.holding(key_id)?;
        let usage = self.describe_usage(&served, key_id)?;
        let now = self.pace.now();
        let state = served.journal().state();
        let keyring = &state.keyring;
        let key = keyring
            .key(key_id)
            .map_err(|refusal| error::refused(&refusal))?;
        let evidence = self.evidence(keyring, now);
        let rotations = key
            .versions
            .values()
            .filter_map(|version| {
                self.describe_rotation(&served, keyring, key, version, &evidence, now)
            })
            .collect();
        Ok(api::RotationStatus {
            usage: Some(usage),
            rotations,
        })
    }

    /// Returns the evidence about the use of a keyring's versions.
    pub(super) fn evidence(&self, keyring: &Keyring, now: Timestamp) -> Evidence {
        self.usage.evidence(keyring, &self.fleet, now)
    }

    /// Returns the callers of a version as text, [`MAX_NAMED`] at most, the most requests first.
    pub(super) fn callers_of(&self, keyring: &KeyringName, version: VersionRef) -> Vec<String> {
        let mut callers = self.usage.callers(keyring, version);
        callers.truncate(MAX_NAMED);
        callers.iter().map(name).collect()
    }

    fn describe_usage(
        &self,
        served: &ServedKeyring,
        key_id: KeyId,
    ) -> Result<api::KeyUsage, Status> {
        let now = self.pace.now();
        let state = served.journal().state();
        let key = state
            .keyring
            .key(key_id)
            .map_err(|refusal| error::refused(&refusal))?;
        let name = served.name();
        let late = self.fleet.late(name, now.saturating_sub(LATE_AFTER));
        Ok(api::KeyUsage {
            keyring: name.to_string(),
            consumer: key.consumer.to_string(),
            key_id: key_id.to_string(),
            versions: key
                .versions
                .values()
                .map(|version| self.describe_use(name, key_id, version))
                .collect(),
            complete_until: messages::time(self.fleet.coverage(name, now).complete_until),
            gaps: self.fleet.gaps(Some(name)).into_iter().map(gap).collect(),
            silent: late.into_iter().map(|late| late.key.node).collect(),
        })
    }

    fn describe_use(
        &self,
        keyring: &KeyringName,
        key_id: KeyId,
        version: &KeyVersion,
    ) -> api::VersionUsage {
        let which = VersionRef {
            key_id,
            version: version.number,
        };
        let used = self.usage.use_of(keyring, which).unwrap_or_default();
        api::VersionUsage {
            version: version.number.get(),
            state: messages::state(version.state.kind()),
            requests: used.requests,
            denied: used.denied,
            rate: Some(self.usage.rate(keyring, which)),
            first_used_at: messages::time(used.first_used),
            last_used_at: messages::time(used.last_used),
            callers: self
                .usage
                .callers(keyring, which)
                .into_iter()
                .map(caller)
                .collect(),
        }
    }

    fn describe_rotation(
        &self,
        served: &ServedKeyring,
        keyring: &Keyring,
        key: &Key,
        version: &KeyVersion,
        evidence: &Evidence,
        now: Timestamp,
    ) -> Option<api::Rotation> {
        let which = VersionRef {
            key_id: key.id,
            version: version.number,
        };
        let outlook = rotation::outlook(keyring, which, evidence, now)?;
        let (since, deadline, replaced_by, barrier) = match &version.state {
            VersionState::Pending { since, .. } => {
                let target = Target::Applied(keyring.revision(), which);
                let barrier =
                    self.fleet
                        .barrier(served.name(), served.epoch(), target, &BTreeSet::new());
                (*since, None, 0, Some(messages::barrier(&barrier)))
            }
            VersionState::Retiring {
                since,
                until,
                replaced_by,
            } => (*since, Some(*until), replaced_by.get(), None),
            VersionState::Active { .. }
            | VersionState::Retired { .. }
            | VersionState::Revoked { .. } => return None,
        };
        Some(api::Rotation {
            version: version.number.get(),
            state: messages::state(version.state.kind()),
            phase: messages::phase(outlook.phase),
            rotation_id: version
                .rotation
                .map_or_else(String::new, |rotation| rotation.to_string()),
            since: messages::time(Some(since)),
            deadline: messages::time(deadline),
            on_deadline: messages::on_deadline(keyring.policy_of(key).on_deadline),
            replaced_by,
            waits_for: outlook.waits_for,
            earliest_end: messages::time(outlook.earliest_end),
            barrier,
        })
    }
}

fn gap((key, gap): (RunKey, Gap)) -> api::Gap {
    api::Gap {
        node: key.node,
        run_id: key.run_id,
        from: messages::time(gap.complete_until),
        until: messages::time(Some(gap.until)),
    }
}

fn caller(caller: ReportedCaller) -> api::Caller {
    api::Caller {
        source: caller.source,
        user_agent: caller.user_agent,
        route: caller.route,
        requests: caller.requests,
        last_used_at: messages::time(Some(caller.last_used)),
    }
}

fn name(caller: &ReportedCaller) -> String {
    let or_unknown = |text: &str| match text {
        "" => "unknown".to_owned(),
        text => text.to_owned(),
    };
    format!(
        "{} ({}) on {}: {} {}, the last at {}",
        or_unknown(&caller.source),
        or_unknown(&caller.user_agent),
        or_unknown(&caller.route),
        caller.requests,
        if caller.requests == 1 {
            "request"
        } else {
            "requests"
        },
        caller.last_used
    )
}
