//! Finds keyrings by the patterns of the sidecar.

use std::{collections::BTreeSet, sync::Arc};

use crate::{
    key::KeyringName,
    keyring::{Keyrings, PatternRule, Slot},
    proto::discovery,
};

/// Finds keyrings by the patterns of the sidecar, in the lists of the control plane.
#[derive(Debug)]
pub(super) struct Finder {
    /// The patterns, and how the keyrings that they find are held. The first that matches applies.
    pub(super) rules: Vec<PatternRule>,
    keyrings: Keyrings,
    /// The keyrings that the sidecar holds because of a pattern.
    found: BTreeSet<KeyringName>,
    /// The keyrings of the newest list on the open stream; none before the first one.
    listed: Option<BTreeSet<KeyringName>>,
    /// Whether the newest list has every keyring.
    is_whole: bool,
    /// The keyrings whose subscription was ended, on the open stream.
    ended: BTreeSet<KeyringName>,
    /// The outcome that was last logged.
    told: Option<Listed>,
    /// Whether the control plane of the open stream ignores the patterns.
    is_ignored: bool,
}

/// What a list of keyrings came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Listed {
    /// The number of keyrings that the control plane serves, and that a pattern matches.
    pub(crate) matching: usize,
    /// The number of these keyrings that the sidecar does not hold, because they are too many.
    pub(crate) left_out: usize,
}

impl Finder {
    /// Returns a finder without patterns, which adds keyrings to `keyrings`.
    pub(super) const fn new(keyrings: Keyrings) -> Self {
        Self {
            rules: Vec::new(),
            keyrings,
            found: BTreeSet::new(),
            listed: None,
            is_whole: false,
            ended: BTreeSet::new(),
            told: None,
            is_ignored: false,
        }
    }

    /// Returns the message that asks for a list; none without patterns.
    pub(super) fn ask(&self) -> Option<discovery::Find> {
        let patterns = self.rules.iter().map(|rule| rule.pattern.to_string());
        (!self.rules.is_empty()).then(|| discovery::Find {
            patterns: patterns.collect(),
        })
    }

    /// Notes an answer to a beat. It follows the list, unless the control plane does not know
    /// patterns.
    pub(super) fn answered(&mut self) {
        if !self.is_answered() {
            self.is_ignored = true;
            tracing::error!(
                "the control plane does not answer to the patterns of this sidecar, so that it finds no keyring: update the control plane"
            );
        }
    }

    /// Returns whether no list is missing on the open stream, or none will come.
    pub(super) const fn is_answered(&self) -> bool {
        self.rules.is_empty() || self.listed.is_some() || self.is_ignored
    }

    /// Returns whether a pattern matches a name.
    pub(super) fn finds(&self, name: &KeyringName) -> bool {
        PatternRule::of(&self.rules, name).is_some()
    }

    /// Adds a slot for a keyring that a pattern finds. None if no pattern finds it, or if the
    /// process has held too many different keyrings.
    pub(super) fn find(&mut self, name: &KeyringName) -> Option<Arc<Slot>> {
        let rule = PatternRule::of(&self.rules, name)?;
        let slot = self.keyrings.add(name, rule.staleness, rule.mode)?;
        self.found.insert(name.clone());
        Some(slot)
    }

    /// Notes a list of keyrings, which has every keyring if it `is_whole`.
    pub(super) fn listed(&mut self, names: BTreeSet<KeyringName>, is_whole: bool, outcome: Listed) {
        self.listed = Some(names);
        self.is_whole = is_whole;
        let former = self.told.replace(outcome);
        let is_news = former != Some(outcome);
        if outcome.left_out > 0 && is_news {
            tracing::error!(
                matching = outcome.matching,
                left_out = outcome.left_out,
                "the patterns of this sidecar match too many keyrings: some are left out, and their checks are denied; make the patterns narrower"
            );
        } else if outcome.matching == 0 && is_news {
            tracing::warn!(
                "the patterns of this sidecar match no keyring that the control plane serves and lets it have"
            );
        }
    }

    /// Returns the keyrings that were found, that are not listed any more, and of which `is_over`
    /// holds. Their subscription ends now.
    pub(super) fn end_unlisted(&mut self, is_over: impl Fn(&Slot) -> bool) -> Vec<KeyringName> {
        let Some(listed) = self.listed.as_ref().filter(|_| self.is_whole) else {
            return Vec::new();
        };
        let unlisted = self.found.difference(listed);
        let over = unlisted.filter(|name| {
            let slot = self.keyrings.get(name);
            !self.ended.contains(*name) && slot.is_some_and(|slot| is_over(&slot))
        });
        let over: Vec<_> = over.cloned().collect();
        self.ended.extend(over.iter().cloned());
        over
    }

    /// Returns whether the sidecar itself has ended the subscription to a keyring.
    pub(super) fn has_ended(&self, name: &KeyringName) -> bool {
        self.ended.contains(name)
    }

    /// Removes a keyring that the sidecar must not hold any more. Returns whether a pattern had
    /// found it.
    pub(super) fn lose(&mut self, name: &KeyringName) -> bool {
        self.ended.remove(name);
        let was_found = self.found.remove(name);
        if was_found {
            self.keyrings.remove(name);
        }
        was_found
    }

    /// Notes that the stream has ended: the next one begins with a list.
    pub(super) fn disconnected(&mut self) {
        self.listed = None;
        self.is_ignored = false;
        self.ended.clear();
    }
}

#[cfg(test)]
mod tests;
