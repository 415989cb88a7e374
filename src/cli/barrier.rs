//! How far a revision has got among the sidecars, as an event and as a sentence.

use serde::Serialize;

use super::{wire, words};
use crate::{key::Timestamp, proto::admin};

/// How many of the live sidecars have applied a revision, and who lags.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct BarrierView {
    /// The sidecars that have applied it.
    pub applied: u32,
    /// The live sidecars that hold the keyring.
    pub total: u32,
    /// Those that have not.
    pub laggards: Vec<LaggardView>,
}

/// A sidecar that has not applied a revision.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct LaggardView {
    /// Its name.
    pub node: String,
    /// Where it runs.
    pub cluster: String,
    /// Whether its stream is open.
    pub connected: bool,
    /// How many revisions it is behind.
    pub behind: u64,
    /// When the control plane last heard of it.
    pub last_seen: Option<Timestamp>,
}

/// The most laggards that a sentence names, so that it stays a sentence; the JSON names all.
const MOST_NAMED: usize = 5;

impl BarrierView {
    /// `17 of 20 sidecars have it; edge-3, edge-9 and edge-11 lag by 2 revisions, last seen 4 s ago`
    #[must_use]
    pub fn sentence(&self, now: Timestamp) -> String {
        let Self { applied, total, .. } = self;
        let mut sentence = match (applied, total) {
            (_, 0) => return "no sidecar holds this keyring".to_owned(),
            (1, 1) => "1 of 1 sidecar has it".to_owned(),
            (_, 1) => format!("{applied} of 1 sidecars has it"),
            _ => format!("{applied} of {total} sidecars have it"),
        };
        if let Some(laggards) = self.laggards_sentence(now) {
            sentence.push_str("; ");
            sentence.push_str(&laggards);
        }
        sentence
    }

    /// `edge-3, edge-9 and edge-11 lag by 2 revisions, last seen 4 s ago`; none when nobody lags.
    #[must_use]
    pub fn laggards_sentence(&self, now: Timestamp) -> Option<String> {
        let nodes: Vec<String> = self.laggards.iter().map(|l| l.node.clone()).collect();
        let most = self.laggards.iter().map(|l| l.behind).max()?;
        let alike = self.laggards.iter().all(|l| l.behind == most);
        let verb = if nodes.len() == 1 { "lags" } else { "lag" };
        let up_to = if alike { "" } else { "up to " };
        let mut sentence = format!(
            "{} {verb} by {up_to}{}",
            words::list(&nodes, MOST_NAMED),
            words::count(most, "revision")
        );
        // The one that was silent longest is the one to look at.
        if let Some(oldest) = self.laggards.iter().filter_map(|l| l.last_seen).min() {
            sentence.push_str(", last seen ");
            sentence.push_str(&words::age(oldest, now));
            sentence.push_str(" ago");
        }
        Some(sentence)
    }
}

impl From<admin::Barrier> for BarrierView {
    fn from(barrier: admin::Barrier) -> Self {
        Self {
            applied: barrier.applied,
            total: barrier.total,
            laggards: barrier.laggards.into_iter().map(Into::into).collect(),
        }
    }
}

impl From<admin::Laggard> for LaggardView {
    fn from(laggard: admin::Laggard) -> Self {
        Self {
            node: laggard.node,
            cluster: laggard.cluster,
            connected: laggard.connected,
            behind: laggard.behind,
            last_seen: wire::timestamp(laggard.last_seen),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: i64 = 1_798_761_600_000;

    fn now() -> Timestamp {
        Timestamp::from_millis(NOW)
    }

    fn laggard(node: &str, behind: u64, silent_for: i64) -> LaggardView {
        LaggardView {
            node: node.to_owned(),
            cluster: "gateway".to_owned(),
            connected: true,
            behind,
            last_seen: Some(Timestamp::from_millis(NOW - silent_for * 1_000)),
        }
    }

    fn barrier(applied: u32, total: u32, laggards: &[LaggardView]) -> BarrierView {
        BarrierView {
            applied,
            total,
            laggards: laggards.to_vec(),
        }
    }

    #[test]
    fn laggards_are_named_with_their_lag() {
        let laggards = ["edge-3", "edge-9", "edge-11"].map(|node| laggard(node, 2, 4));
        assert_eq!(
            barrier(17, 20, &laggards).sentence(now()),
            "17 of 20 sidecars have it; edge-3, edge-9 and edge-11 lag by 2 revisions, last seen 4 s ago"
        );
    }

    #[test]
    fn one_laggard_stands_in_the_singular() {
        assert_eq!(
            barrier(1, 2, &[laggard("edge-3", 1, 0)]).sentence(now()),
            "1 of 2 sidecars have it; edge-3 lags by 1 revision, last seen 0 s ago"
        );
    }

    #[test]
    fn different_lags_are_told_by_the_worst() {
        let laggards = [laggard("edge-3", 1, 2), laggard("edge-9", 7, 130)];
        assert_eq!(
            barrier(0, 2, &laggards).sentence(now()),
            "0 of 2 sidecars have it; edge-3 and edge-9 lag by up to 7 revisions, last seen 2 min ago"
        );
    }

    #[test]
    fn many_laggards_are_counted() {
        let laggards: Vec<_> = (0..8).map(|n| laggard(&format!("e{n}"), 1, 1)).collect();
        let sentence = barrier(0, 8, &laggards).laggards_sentence(now());
        assert_eq!(
            sentence.as_deref(),
            Some("e0, e1, e2, e3, e4 and 3 more lag by 1 revision, last seen 1 s ago")
        );
    }

    #[test]
    fn nobody_lags_when_all_have_it() {
        assert_eq!(
            barrier(20, 20, &[]).sentence(now()),
            "20 of 20 sidecars have it"
        );
        assert_eq!(barrier(1, 1, &[]).sentence(now()), "1 of 1 sidecar has it");
        assert_eq!(
            barrier(0, 0, &[]).sentence(now()),
            "no sidecar holds this keyring"
        );
        assert_eq!(barrier(0, 0, &[]).laggards_sentence(now()), None);
    }
}
