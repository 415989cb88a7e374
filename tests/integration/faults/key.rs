//! The keys of a run, which are made, rotated, retired and revoked while faults are played.

use relatch::proto::admin::{self, revoke_request, start_rotation_response::Step};
use tonic::Request;

use super::{
    fleet::{KEYRING, within_a_moment},
    world::World,
};
use crate::support::eventually::eventually;

/// A key of the run, with the number of the credential that is its newest version.
#[derive(Clone, Debug)]
pub(super) struct IssuedKey {
    id: String,
    newest: usize,
    /// The version before, while it is still accepted.
    old: Option<(usize, u32)>,
    version: u32,
}

/// For how long commands wait that are not to wait for the lost.
const SHORT: prost_types::Duration = prost_types::Duration {
    seconds: 2,
    nanos: 0,
};

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

    /// Rotates a key that has one version; the old one stays accepted. Gives up after two seconds.
    pub(super) async fn rotate(&mut self, key: usize) {
        let request = admin::StartRotationRequest {
            timeout: Some(SHORT),
            ..admin::StartRotationRequest::default()
        };
        self.rotate_by(key, within_a_moment(request)).await;
    }

    /// As [`Self::rotate`], and waits for sidecars that are lost until they cannot serve any more.
    pub(super) async fn rotate_patiently(&mut self, key: usize) {
        let request = admin::StartRotationRequest::default();
        self.rotate_by(key, Request::new(request)).await;
    }

    async fn rotate_by(&mut self, key: usize, mut request: Request<admin::StartRotationRequest>) {
        let key = key % self.keys.len();
        if self.keys[key].old.is_some() {
            return self.retire(key).await;
        }
        let begun = self.now();
        request.get_mut().key_id.clone_from(&self.keys[key].id);
        let Ok(steps) = self.admin.start_rotation(request).await else {
            return;
        };
        let mut steps = steps.into_inner();
        while let Ok(Some(step)) = steps.message().await {
            if let Some(Step::HandedOver(handed_over)) = step.step {
                let new = handed_over.key.expect("a hand-over hands over");
                let credential = self.record.issued(begun, new.secret.clone(), new.revision);
                let key = &mut self.keys[key];
                self.record.handed_over(credential, key.newest);
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
        let request = within_a_moment(admin::RevokeRequest::default());
        self.revoke_by(key, request).await;
    }

    /// As [`Self::revoke`], and waits until no sidecar accepts it.
    pub(super) async fn revoke_patiently(&mut self, key: usize) {
        let request = admin::RevokeRequest {
            wait: true,
            ..admin::RevokeRequest::default()
        };
        self.revoke_by(key, Request::new(request)).await;
    }

    /// As [`Self::revoke_patiently`], and gives up after two seconds; the key, where it was waited for in vain.
    pub(super) async fn revoke_impatiently(&mut self, key: usize) -> Option<IssuedKey> {
        let request = admin::RevokeRequest {
            wait: true,
            timeout: Some(SHORT),
            ..admin::RevokeRequest::default()
        };
        let key = self.keys.swap_remove(key % self.keys.len());
        let is_done = self.revoke_of(&key, Request::new(request)).await;
        (!is_done).then_some(key)
    }

    /// Asks again for what was waited for in vain, and waits until no sidecar accepts it.
    pub(super) async fn revoke_again(&mut self, key: &IssuedKey) {
        let request = admin::RevokeRequest {
            wait: true,
            ..admin::RevokeRequest::default()
        };
        let is_done = self.revoke_of(key, Request::new(request)).await;
        assert!(is_done, "nobody accepts it by then");
    }

    async fn revoke_by(&mut self, key: usize, request: Request<admin::RevokeRequest>) {
        let key = self.keys.swap_remove(key % self.keys.len());
        self.revoke_of(&key, request).await;
    }

    /// Returns whether it is gone everywhere, which only a request that waits is told.
    async fn revoke_of(
        &mut self,
        key: &IssuedKey,
        mut request: Request<admin::RevokeRequest>,
    ) -> bool {
        let asked = request.get_mut();
        asked.key_id.clone_from(&key.id);
        "a scenario".clone_into(&mut asked.reason);
        asked.which = Some(revoke_request::Which::All(true));
        let waits = asked.wait;
        let versions = [Some(key.newest), key.old.map(|(old, _)| old)];
        let versions = versions.into_iter().flatten();
        for version in versions.clone() {
            self.record.ending(version);
        }
        let Ok(events) = self.admin.revoke(request).await else {
            return false;
        };
        let mut is_gone = false;
        let mut events = events.into_inner();
        while let Ok(Some(event)) = events.message().await {
            for version in versions.clone() {
                self.record.ended(version, event.revision);
                if waits && event.done {
                    self.record.is_gone(version);
                    is_gone = true;
                }
            }
        }
        is_gone
    }

    /// Has the old version of a key asked for at one sidecar alone, or nowhere any more.
    pub(super) fn ask_for_old_only_at(&self, key: usize, sidecar: Option<usize>) {
        if let Some((old, _)) = self.keys[key].old {
            if sidecar.is_none() {
                // It ends once nobody uses it.
                self.record.ending(old);
            }
            self.record.ask_only_at(old, sidecar);
        }
    }

    /// Has old versions retire once they were not used for two seconds, and two seconds after their hand-over at the soonest.
    pub(super) async fn retire_when_unused(&self) {
        let set = ["policy", "set", "--keyring", KEYRING];
        let times = ["--overlap", "2s", "--idle-for", "2s"];
        self.control.cli_json(&[&set[..], &times].concat()).await;
    }

    /// Waits until the first version of a key has retired.
    pub(super) async fn first_retires(&self, key: usize) {
        let show = ["key", "show", &self.keys[key].id];
        eventually("a version that nobody uses retires", async || {
            let shown = self.control.cli_json(&show).await;
            (shown["versions"][0]["state"] == "retired").then_some(())
        })
        .await;
    }
}
