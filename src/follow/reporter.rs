//! Reports the use of key versions to the control plane, so that no use that was counted is missing
//! for good.
//!
//! The counts only grow. A count without an ack is reported again, and the next report makes up for
//! a lost one. A report that arrives twice or late changes nothing, because the control plane keeps
//! the larger number.

use std::{
    collections::{BTreeMap, HashMap},
    sync::Arc,
};

use prost::Message;

use crate::{
    key::{Epoch, KeyringName, Timestamp, VersionRef},
    keyring::{CallerUse, Keyrings, Slot, UsageIndex, VersionUsage},
    proto::discovery,
};

/// Creates the usage reports of a sidecar and tracks which of them have arrived.
#[derive(Debug)]
pub(crate) struct Reporter {
    keyrings: BTreeMap<KeyringName, Account>,
    /// The sequence of the last message, over all streams.
    sequence: u64,
    acked: u64,
    /// Whether no check is under way and none will come.
    has_ended: bool,
}

/// The progress of a sidecar's usage reports.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct ReportProgress {
    /// The sequence of the last message that is in the control plane's store.
    pub(crate) acked: u64,
    /// The number of versions that were reported, or are to be reported again, without an ack.
    pub(crate) unacked: usize,
}

/// The uses of one keyring that are not acked.
#[derive(Debug)]
struct Account {
    /// Its counters are those of every slot of this keyring.
    slot: Arc<Slot>,
    /// The epoch of the control plane's settings; none before they arrive.
    epoch: Option<Epoch>,
    unacked: HashMap<VersionRef, Unacked>,
}

#[derive(Debug)]
struct Unacked {
    usage: UsageIndex,
    /// The sequence of the last message on this stream that reported the version; none if it is
    /// still to be reported.
    told: Option<u64>,
}

/// A report in preparation.
#[derive(Debug, Default)]
struct Draft {
    messages: Vec<discovery::Usage>,
    /// The number of versions in the last message.
    versions: usize,
    bytes: usize,
}

/// The most versions in one message; without callers they have 50 KiB.
const MAX_VERSIONS: usize = 500;
/// The size at which a message is full. The control plane accepts 256 KiB. A version with all its
/// callers has up to 6 KiB, so the version that is added last fits.
const MAX_BYTES: usize = 128 << 10;
/// The most messages in one report: 100,000 versions, more than a sidecar sees used between two
/// beats. If there are more, such as after a change of the epoch, the rest follows in the next
/// reports.
const MAX_MESSAGES: usize = 200;

impl Reporter {
    /// Returns a reporter of all uses that are counted in `keyrings`.
    #[must_use]
    pub(crate) fn new(keyrings: &Keyrings) -> Self {
        let mut reporter = Self {
            keyrings: BTreeMap::new(),
            sequence: 0,
            acked: 0,
            has_ended: false,
        };
        for slot in keyrings.load().iter() {
            reporter.follow(slot);
        }
        reporter
    }

    /// Reports the uses of a further keyring. The account of a keyring that was dropped before
    /// continues, because its counters do.
    pub(crate) fn follow(&mut self, slot: &Arc<Slot>) {
        let account = self.keyrings.entry(slot.name().clone());
        account.or_insert_with(|| Account {
            slot: Arc::clone(slot),
            epoch: None,
            unacked: HashMap::new(),
        });
    }

    /// Creates the report that replies to the answer to a beat: every use without an ack, in
    /// messages of bounded size. It has at least one message, because it confirms that no use
    /// counted before is missing. Checks continue meanwhile.
    pub(crate) fn report(&mut self, beat: u64) -> Vec<discovery::Usage> {
        self.tell_all(beat)
    }

    /// Creates the same report once no check is under way and none will come: this report, and each
    /// after it, is final.
    pub(crate) fn last_report(&mut self) -> Vec<discovery::Usage> {
        const NO_BEAT: u64 = 0;
        self.has_ended = true;
        self.tell_all(NO_BEAT)
    }

    /// Notes an ack: all uses that were reported up to `sequence` are in the store.
    pub(crate) fn acked(&mut self, sequence: u64) {
        if sequence > self.sequence {
            tracing::warn!(
                sequence,
                newest = self.sequence,
                "the control plane confirms a usage report that was not sent"
            );
            return;
        }
        self.acked = self.acked.max(sequence);
        for account in self.keyrings.values_mut() {
            account
                .unacked
                .retain(|_, unacked| unacked.told.is_none_or(|told| told > sequence));
        }
    }

    /// Notes that a new stream has begun: uses that were reported on the last one without an ack
    /// may be lost.
    pub(crate) fn reconnected(&mut self) {
        for unacked in self.unacked_mut() {
            unacked.told = None;
        }
    }

    /// Notes that the control plane is at `epoch` of a keyring. If the epoch has changed, the store
    /// was restored and may have lost uses that it had acked: all uses are reported again.
    pub(crate) fn entered(&mut self, keyring: &KeyringName, epoch: Epoch) {
        let Some(account) = self.keyrings.get_mut(keyring) else {
            return;
        };
        let former = account.epoch.replace(epoch);
        if former.is_some_and(|former| former != epoch) {
            let used = account.slot.usage().ever_used();
            account.expect(used);
        }
    }

    /// Returns the progress of the reports.
    #[must_use]
    pub(crate) fn progress(&self) -> ReportProgress {
        ReportProgress {
            acked: self.acked,
            unacked: self
                .keyrings
                .values()
                .map(|account| account.unacked.len())
                .sum(),
        }
    }

    fn tell_all(&mut self, beat: u64) -> Vec<discovery::Usage> {
        for account in self.keyrings.values_mut() {
            let used = account.slot.usage().take_used();
            account.expect(used);
        }
        let mut draft = Draft::default();
        draft.begin(&mut self.sequence);
        let first = draft.last().sequence;
        // Unreported versions come first, so that several reports together cover all versions.
        let is_whole = self.tell(&mut draft, |told| told.is_none())
            && self.tell(&mut draft, |told| told.is_some_and(|told| told < first));
        if is_whole {
            let is_final = self.has_ended;
            let last = draft.last();
            last.complete_until_beat = beat;
            last.is_final = is_final;
        }
        draft.messages
    }

    /// Adds the unacked versions whose last report meets `which`; returns whether there was room
    /// for all.
    fn tell(&mut self, draft: &mut Draft, which: impl Fn(Option<u64>) -> bool) -> bool {
        for (name, account) in &mut self.keyrings {
            for unacked in account.unacked.values_mut() {
                if !which(unacked.told) {
                    continue;
                }
                let told = describe(account.slot.usage().get(unacked.usage));
                if !draft.has_room() {
                    if draft.messages.len() >= MAX_MESSAGES {
                        return false;
                    }
                    draft.begin(&mut self.sequence);
                }
                draft.add(name, told);
                unacked.told = Some(self.sequence);
            }
        }
        true
    }

    fn unacked_mut(&mut self) -> impl Iterator<Item = &mut Unacked> {
        self.keyrings
            .values_mut()
            .flat_map(|account| account.unacked.values_mut())
    }
}

impl Account {
    /// Notes versions that are to be reported.
    fn expect(&mut self, used: Vec<UsageIndex>) {
        for usage in used {
            let version = self.slot.usage().get(usage).version();
            self.unacked.insert(version, Unacked { usage, told: None });
        }
    }
}

impl Draft {
    /// Begins the next message.
    fn begin(&mut self, sequence: &mut u64) {
        *sequence += 1;
        self.messages.push(discovery::Usage {
            sequence: *sequence,
            ..discovery::Usage::default()
        });
        (self.versions, self.bytes) = (0, 0);
    }

    fn last(&mut self) -> &mut discovery::Usage {
        self.messages.last_mut().expect("a draft begins at once")
    }

    const fn has_room(&self) -> bool {
        self.versions < MAX_VERSIONS && self.bytes < MAX_BYTES
    }

    fn add(&mut self, keyring: &KeyringName, told: discovery::VersionUsage) {
        self.versions += 1;
        self.bytes += told.encoded_len();
        let keyrings = &mut self.last().keyrings;
        match keyrings.last_mut() {
            Some(last) if last.keyring == keyring.as_str() => last.versions.push(told),
            Some(_) | None => keyrings.push(discovery::KeyringUsage {
                keyring: keyring.to_string(),
                versions: vec![told],
            }),
        }
    }
}

fn describe(usage: &VersionUsage) -> discovery::VersionUsage {
    let version = usage.version();
    let used = usage.read();
    let millis = |time: Option<Timestamp>| time.map_or(0, Timestamp::as_millis);
    discovery::VersionUsage {
        key_id: version.key_id.to_string(),
        version: version.version.get(),
        requests: used.requests,
        denied: used.denied,
        first_used_ms: millis(used.first_used),
        last_used_ms: millis(used.last_used),
        callers: usage.callers().into_iter().map(describe_caller).collect(),
    }
}

fn describe_caller(caller: CallerUse) -> discovery::Caller {
    discovery::Caller {
        source: caller.source.map_or_else(String::new, |at| at.to_string()),
        user_agent: caller.user_agent,
        route: caller.route,
        requests: caller.requests,
        last_used_ms: caller.last_used.as_millis(),
    }
}

#[cfg(test)]
mod tests;
