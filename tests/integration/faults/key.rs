//! The keys of a run, which are made, rotated, retired and revoked while faults are played.

use relatch::proto::admin::{self, revoke_request, start_rotation_response::Step};

use super::{
    fleet::{KEYRING, within_a_moment},
    world::World,
};

/// A key of the run, with the number of the credential that is its newest version.
#[derive(Clone, Debug)]
pub(super) struct IssuedKey {
    id: String,
    newest: usize,
    /// The version before, while it is still accepted.
    old: Option<(usize, u32)>,
    version: u32,
}

impl World {
    pub(super) const fn keys(&self) -> usize {
        self.keys.len()
    }

    /// Makes a key; nothing where the control plane does not answer.
    pub(super) async fn issue(&mut self) {
        let begun = self.now();
        let request = admin::CreateKeyRequest {
            keyring: KEYRING.to_owned(),
            consumer: "acme".to_owned(),
            create_missing: true,
            ..admin::CreateKeyRequest::default()
        };
        let Ok(issued) = self.admin.create_key(within_a_moment(request)).await else {
            return;
        };
        let issued = issued.into_inner();
        let newest = self
            .record
            .issued(begun, issued.secret.clone(), issued.revision);
        self.keys.push(IssuedKey {
            id: issued.key_id.clone(),
            newest,
            old: None,
            version: issued.version,
        });
    }

    /// Rotates a key that has one version; the old one stays accepted.
    pub(super) async fn rotate(&mut self, key: usize) {
        let key = key % self.keys.len();
        if self.keys[key].old.is_some() {
            return self.retire(key).await;
        }
        let begun = self.now();
        let request = admin::StartRotationRequest {
            key_id: self.keys[key].id.clone(),
            timeout: Some(prost_types::Duration {
                seconds: 2,
                nanos: 0,
            }),
            ..admin::StartRotationRequest::default()
        };
        let Ok(steps) = self.admin.start_rotation(within_a_moment(request)).await else {
            return;
        };
        let mut steps = steps.into_inner();
        while let Ok(Some(step)) = steps.message().await {
            if let Some(Step::HandedOver(handed_over)) = step.step {
                let new = handed_over.key.expect("a hand-over hands over");
                let credential = self.record.issued(begun, new.secret.clone(), new.revision);
                let key = &mut self.keys[key];
                key.old = Some((key.newest, key.version));
                key.newest = credential;
                key.version = new.version;
                return;
            }
        }
    }

    /// Ends the old version of a key that was rotated.
    pub(super) async fn retire(&mut self, key: usize) {
        let key = key % self.keys.len();
        let Some((old, version)) = self.keys[key].old else {
            return;
        };
        let request = admin::RetireVersionRequest {
            key_id: self.keys[key].id.clone(),
            version,
            force: true,
            reason: "a scenario".to_owned(),
        };
        self.record.ending(old);
        if let Ok(retired) = self.admin.retire_version(within_a_moment(request)).await {
            self.record.ended(old, retired.into_inner().revision);
            self.keys[key].old = None;
        }
    }

    /// Revokes every version of a key, which leaves the run; does not wait for sidecars.
    pub(super) async fn revoke(&mut self, key: usize) {
        let key = self.keys.swap_remove(key % self.keys.len());
        let request = admin::RevokeRequest {
            key_id: key.id,
            reason: "a scenario".to_owned(),
            which: Some(revoke_request::Which::All(true)),
            ..admin::RevokeRequest::default()
        };
        let versions = [Some(key.newest), key.old.map(|(old, _)| old)];
        let versions = versions.into_iter().flatten();
        for version in versions.clone() {
            self.record.ending(version);
        }
        let Ok(events) = self.admin.revoke(within_a_moment(request)).await else {
            return;
        };
        if let Ok(Some(event)) = events.into_inner().message().await {
            for version in versions {
                self.record.ended(version, event.revision);
            }
        }
    }
}
