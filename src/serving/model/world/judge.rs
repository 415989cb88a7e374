//! The judge of the answers of sidecars, and of retirements.

use super::{
    super::{
        Plant,
        machine::{Sidecar, View},
    },
    IDLE_FOR, Version, World,
};

/// A promise is broken.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) enum Violation {
    /// A sidecar denies a version that was handed out.
    Denied { run: usize, version: usize },
    /// A sidecar accepts a version that none should accept any more.
    Accepted { run: usize, version: usize },
    /// A version was retired as unused, and was used.
    Used { version: usize },
}

impl World {
    /// Checks that every answer that a sidecar would give now keeps the promises.
    pub(super) fn judge(&self) -> Result<(), Violation> {
        for (run, sidecar) in self.sidecars.iter().enumerate() {
            let now = self.machines[sidecar.machine].now();
            if !sidecar.is_fresh(now, self.plant == Plant::GrantIgnored) {
                continue;
            }
            for (version, state) in self.versions.iter().enumerate() {
                let handed_over = state.handed_over.is_some();
                let is_promised = handed_over && !self.may_deny.contains(&(version, run));
                if is_promised && self.denies(sidecar, version) {
                    return Err(Violation::Denied { run, version });
                }
                let is_denied = state.is_denied && !self.may_accept.contains(&(version, run));
                if is_denied && self.accepts(sidecar, version) {
                    return Err(Violation::Accepted { run, version });
                }
            }
        }
        Ok(())
    }

    /// Returns whether a sidecar accepts a version from its state.
    pub(super) fn accepts(&self, sidecar: &Sidecar, version: usize) -> bool {
        sidecar.holds(version) && self.versions[version].is_accepted_in(sidecar.view)
    }

    /// Returns whether a sidecar would deny a version when it is cut off. One that holds keys on
    /// demand may hold no version; if it accepts one version, it must accept the others.
    fn denies(&self, sidecar: &Sidecar, version: usize) -> bool {
        let state = &self.versions[version];
        if sidecar.on_demand.is_none() {
            return sidecar.view.applied < state.staged;
        }
        let has_ended = state.revoked.is_some() || state.retired.is_some();
        let mut others = (0..self.versions.len()).filter(|other| *other != version);
        !has_ended
            && !self.accepts(sidecar, version)
            && others.any(|other| self.accepts(sidecar, other))
    }

    /// Returns whether a retired version was idle for long enough at any time since the last use
    /// that was reported to the control plane, and since it was replaced.
    pub(super) fn was_idle(&self, version: usize) -> bool {
        // The clocks that measure this are true within one per cent.
        let enough = IDLE_FOR - IDLE_FOR / 100 - 1;
        let replaced = self.versions[version].replaced_at;
        let mut since = replaced.map_or(0, |at| at.true_time);
        let checks = self.used.get(&version).map_or(&[][..], Vec::as_slice);
        let is_told = |run| self.told.get(&(run, version)).map_or(0, |told| told.uses);
        let told = checks
            .iter()
            .filter(|check| check.number <= is_told(check.run));
        since = told
            .map(|check| check.true_time)
            .max()
            .map_or(since, |last| last.max(since));
        let mut moments = checks.iter().map(|check| check.true_time);
        let mut is_idle = |until: u64| {
            let is_enough = until.saturating_sub(since) >= enough;
            since = since.max(until);
            is_enough
        };
        moments.any(&mut is_idle) || is_idle(self.true_time)
    }
}

impl Version {
    /// Returns whether a sidecar that holds the version accepts it, at the revisions of its `view`.
    fn is_accepted_in(&self, view: View) -> bool {
        let revoked_through = view.revoked_through.max(view.applied);
        self.staged <= view.applied
            && self.revoked.is_none_or(|at| at > revoked_through)
            && self.retired.is_none_or(|at| at > view.applied)
    }

    /// Returns whether the version is accepted at a revision.
    pub(super) fn is_live_at(&self, head: u64) -> bool {
        let all = View {
            applied: head,
            revoked_through: head,
        };
        self.is_accepted_in(all)
    }
}
