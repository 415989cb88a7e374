//! Finds keyrings by the patterns of the sidecar.

use std::collections::BTreeSet;

use crate::{
    key::KeyringName,
    keyring::{Keyrings, Slot},
    proto::discovery,
};

/// Finds keyrings by the patterns of the sidecar, in the lists of the control plane.
#[derive(Debug)]
pub(super) struct Finder {
    /// The keyrings that the sidecar holds, and those that its configuration asks for.
    keyrings: Keyrings,
    /// The patterns that were sent on the open stream.
    asked: Vec<String>,
    /// The last beat before the patterns were sent: an answer to it may precede the list.
    asked_after: u64,
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
    /// Returns a finder that adds keyrings to `keyrings`.
    pub(super) const fn new(keyrings: Keyrings) -> Self {
        Self {
            keyrings,
            asked: Vec::new(),
            asked_after: 0,
            listed: None,
            is_whole: false,
            ended: BTreeSet::new(),
            told: None,
            is_ignored: false,
        }
    }

    /// Returns the keyrings that the sidecar holds.
    pub(super) const fn keyrings(&self) -> &Keyrings {
        &self.keyrings
    }

    /// Returns the message that asks for a list; none if the patterns are those that were sent.
    /// `last_beat` is the number of the last beat.
    pub(super) fn ask(&mut self, last_beat: u64) -> Option<discovery::Find> {
        let wanted = self.keyrings.wanted();
        let rules = wanted.rules().iter();
        let patterns: Vec<_> = rules.map(|rule| rule.pattern.to_string()).collect();
        if patterns == self.asked {
            return None;
        }
        self.listed = None;
        self.asked.clone_from(&patterns);
        self.asked_after = last_beat;
        Some(discovery::Find { patterns })
    }

    /// Notes an answer to a beat. A beat that was sent after the patterns is answered after the
    /// list, unless the control plane does not know patterns.
    pub(super) fn answered(&mut self, beat: u64) {
        if beat > self.asked_after && !self.is_answered() {
            self.is_ignored = true;
            tracing::error!(
                "the control plane does not answer to the patterns of this sidecar, so that it finds no keyring: update the control plane"
            );
        }
    }

    /// Returns whether the control plane of the open stream ignores the patterns.
    #[cfg(test)]
    pub(super) const fn is_ignored(&self) -> bool {
        self.is_ignored
    }

    /// Returns whether no list is missing on the open stream, or none will come.
    pub(super) const fn is_answered(&self) -> bool {
        self.asked.is_empty() || self.listed.is_some() || self.is_ignored
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
        let (slots, wanted) = (self.keyrings.load(), self.keyrings.wanted());
        let over = slots.iter().filter(|slot| {
            let name = slot.name();
            let is_unlisted = !wanted.is_named(name) && !listed.contains(name);
            is_unlisted && !self.ended.contains(name) && is_over(slot)
        });
        let over: Vec<_> = over.map(|slot| slot.name().clone()).collect();
        self.ended.extend(over.iter().cloned());
        over
    }

    /// Notes that the subscription to a keyring ends. Returns whether it had not ended before.
    pub(super) fn end(&mut self, name: &KeyringName) -> bool {
        self.ended.insert(name.clone())
    }

    /// Returns whether the sidecar itself has ended the subscription to a keyring.
    pub(super) fn has_ended(&self, name: &KeyringName) -> bool {
        self.ended.contains(name)
    }

    /// Notes that a keyring was dropped. Returns whether the sidecar forgets it: unless the
    /// configuration names it, it is not shown any more.
    pub(super) fn lose(&mut self, name: &KeyringName) -> bool {
        let is_ended = self.ended.remove(name);
        self.keyrings.lose(name) || is_ended
    }

    /// Notes that the stream has ended: the next one begins with a list.
    pub(super) fn disconnected(&mut self) {
        self.listed = None;
        self.asked.clear();
        self.is_ignored = false;
        self.ended.clear();
    }
}

#[cfg(test)]
mod tests;
