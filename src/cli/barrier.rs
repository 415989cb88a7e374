//! The progress of a revision at the sidecars, as an event and as a sentence.

use serde::Serialize;

use super::{convert, words};
use crate::{key::Timestamp, proto::admin};

/// The number of sidecars that have confirmed a revision, and those that lag.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub(crate) struct BarrierView {
    /// The number of sidecars that have confirmed it.
    pub applied: u32,
    /// The number of sidecars that may serve the keyring.
    pub total: u32,
    /// The sidecars that have not confirmed it.
    pub laggards: Vec<LaggardView>,
    /// The sidecars for which the command does not wait; left out if there are none.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub passed_by: Vec<RunView>,
}

/// A process of a sidecar.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct RunView {
    /// The node id of the sidecar.
    pub node: String,
    /// Its process.
    pub run_id: String,
}

/// A sidecar that has not applied a revision.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct LaggardView {
    /// The node id of the sidecar.
    pub node: String,
    /// The cluster of the sidecar.
    pub cluster: String,
    /// Whether the stream of the sidecar is open.
    pub connected: bool,
    /// The number of revisions that it is behind.
    pub behind: u64,
    /// The time of the last message from the sidecar.
    pub last_seen: Option<Timestamp>,
    /// Its process.
    pub run_id: String,
    /// `connected`, `lost` or `stopped`.
    pub presence: &'static str,
    /// The time since which it is lost or stopped.
    pub since: Option<Timestamp>,
    /// The time until which it may serve its keyrings; null while it is connected.
    pub serves_until: Option<Timestamp>,
    /// Whether it uses the revision, but does not have it in its snapshot file.
    pub lacks_disk: bool,
}

/// The most sidecars that a sentence names, so that it stays short; the JSON names all.
const MOST_NAMED: usize = 5;

impl BarrierView {
    /// `17 of 20 sidecars confirmed; edge-3 and edge-9 are connected and 2 revisions behind`
    #[must_use]
    pub(crate) fn sentence(&self, now: Timestamp) -> String {
        let Self {
            applied,
            total,
            passed_by,
            ..
        } = self;
        let mut sentence = match total {
            0 if passed_by.is_empty() => return "no sidecar serves this keyring".to_owned(),
            _ => format!("{applied} of {total} sidecars confirmed"),
        };
        if let Some(laggards) = self.laggards_sentence(now) {
            sentence.push_str("; ");
            sentence.push_str(&laggards);
        }
        if !passed_by.is_empty() {
            let nodes: Vec<String> = passed_by.iter().map(|run| run.node.clone()).collect();
            sentence.push_str("; not waiting for ");
            sentence.push_str(&words::list(&nodes, MOST_NAMED));
        }
        sentence
    }

    /// The sidecars that lag, such as `edge-3 has been lost since 12:01:03 and may serve its last revision until 13:01:05`; none
    /// if no sidecar lags.
    #[must_use]
    pub(crate) fn laggards_sentence(&self, now: Timestamp) -> Option<String> {
        let connected = self.connected(now);
        let lost = self.laggards.iter().filter(|l| l.serves_until.is_some());
        let lost: Vec<String> = lost.map(LaggardView::absence).collect();
        let lost = match lost.len() {
            0 => None,
            many if many > MOST_NAMED => {
                let more = many - MOST_NAMED;
                Some(format!(
                    "{}, and {more} more",
                    lost[..MOST_NAMED].join(", ")
                ))
            }
            _ => Some(lost.join(", ")),
        };
        let parts: Vec<String> = connected.into_iter().chain(lost).collect();
        (!parts.is_empty()).then(|| parts.join("; "))
    }

    /// The advice about the sidecars that lag: for one that is gone for good, the command that ends the wait.
    #[must_use]
    pub(crate) fn hint(&self, now: Timestamp) -> String {
        let see = || match self.laggards_sentence(now) {
            Some(laggards) => format!("{laggards}; see `relatch fleet`"),
            None => "see `relatch fleet`".to_owned(),
        };
        self.way_out().unwrap_or_else(see)
    }

    /// The command that ends the wait for a sidecar that is gone for good; none if all sidecars that lag are connected.
    #[must_use]
    pub(crate) fn way_out(&self) -> Option<String> {
        let mut lost = self.laggards.iter().filter(|l| l.serves_until.is_some());
        let LaggardView { node, .. } = lost.next()?;
        Some(format!(
            "if {node} is gone for good: relatch fleet forget {node} --reason TEXT; to continue without it this time: --without {node}"
        ))
    }

    /// The sidecars that are connected and behind.
    fn connected(&self, now: Timestamp) -> Option<String> {
        let laggards = self.laggards.iter();
        let connected: Vec<&LaggardView> = laggards.filter(|l| l.serves_until.is_none()).collect();
        let nodes: Vec<String> = connected.iter().map(|l| l.node.clone()).collect();
        let most = connected.iter().map(|l| l.behind).max()?;
        let alike = connected.iter().all(|l| l.behind == most);
        let verb = if nodes.len() == 1 { "is" } else { "are" };
        let up_to = if alike { "" } else { "up to " };
        let mut sentence = format!("{} {verb} ", words::list(&nodes, MOST_NAMED));
        if connected.iter().all(|l| l.lacks_disk) {
            sentence.push_str("behind in the snapshot file");
        } else {
            sentence.push_str(up_to);
            sentence.push_str(&words::count(most, "revision"));
            sentence.push_str(" behind");
        }
        // The sidecar that was silent for the longest time is the most important one.
        if let Some(oldest) = connected.iter().filter_map(|l| l.last_seen).min() {
            sentence.push_str(", last seen ");
            sentence.push_str(&words::age(oldest, now));
            sentence.push_str(" ago");
        }
        Some(sentence)
    }
}

impl LaggardView {
    /// `edge-3 has been lost since 12:01:03 and may serve its last revision until 13:01:05`
    fn absence(&self) -> String {
        let Self {
            node,
            presence,
            since,
            serves_until,
            ..
        } = self;
        let (since, until) = (words::time(*since), words::time(*serves_until));
        if *presence == "stopped" {
            format!(
                "{node} has been stopped since {since} and may start from its snapshot file until {until}"
            )
        } else {
            format!(
                "{node} has been {presence} since {since} and may serve its last revision until {until}"
            )
        }
    }
}

impl From<admin::Barrier> for BarrierView {
    fn from(barrier: admin::Barrier) -> Self {
        Self {
            applied: barrier.applied,
            total: barrier.total,
            laggards: barrier.laggards.into_iter().map(Into::into).collect(),
            passed_by: barrier.passed_by.into_iter().map(Into::into).collect(),
        }
    }
}

impl From<admin::SidecarRun> for RunView {
    fn from(run: admin::SidecarRun) -> Self {
        Self {
            node: run.node,
            run_id: run.run_id,
        }
    }
}

impl From<admin::Laggard> for LaggardView {
    fn from(laggard: admin::Laggard) -> Self {
        Self {
            presence: words::presence(laggard.presence()),
            node: laggard.node,
            cluster: laggard.cluster,
            connected: laggard.connected,
            behind: laggard.behind,
            last_seen: convert::timestamp(laggard.last_seen),
            run_id: laggard.run_id,
            since: convert::timestamp(laggard.since),
            serves_until: convert::timestamp(laggard.serves_until),
            lacks_disk: laggard.lacks_disk,
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
            run_id: "b1".to_owned(),
            presence: "connected",
            since: None,
            serves_until: None,
            lacks_disk: false,
        }
    }

    fn barrier(applied: u32, total: u32, laggards: &[LaggardView]) -> BarrierView {
        BarrierView {
            applied,
            total,
            laggards: laggards.to_vec(),
            passed_by: Vec::new(),
        }
    }

    #[test]
    fn laggards_are_named_with_their_lag() {
        let laggards = ["edge-3", "edge-9", "edge-11"].map(|node| laggard(node, 2, 4));
        assert_eq!(
            barrier(17, 20, &laggards).sentence(now()),
            "17 of 20 sidecars confirmed; edge-3, edge-9 and edge-11 are 2 revisions behind, last seen 4s ago"
        );
    }

    #[test]
    fn one_laggard_stands_in_the_singular() {
        assert_eq!(
            barrier(1, 2, &[laggard("edge-3", 1, 0)]).sentence(now()),
            "1 of 2 sidecars confirmed; edge-3 is 1 revision behind, last seen 0s ago"
        );
    }

    #[test]
    fn different_lags_are_told_by_the_worst() {
        let laggards = [laggard("edge-3", 1, 2), laggard("edge-9", 7, 130)];
        assert_eq!(
            barrier(0, 2, &laggards).sentence(now()),
            "0 of 2 sidecars confirmed; edge-3 and edge-9 are up to 7 revisions behind, last seen 2m ago"
        );
    }

    #[test]
    fn many_laggards_are_counted() {
        let laggards: Vec<_> = (0..8).map(|n| laggard(&format!("e{n}"), 1, 1)).collect();
        let sentence = barrier(0, 8, &laggards).laggards_sentence(now());
        assert_eq!(
            sentence.as_deref(),
            Some("e0, e1, e2, e3, e4 and 3 more are 1 revision behind, last seen 1s ago")
        );
    }

    #[test]
    fn who_is_lost_is_named_with_its_bound_and_the_way_out() {
        let lost = LaggardView {
            connected: false,
            presence: "lost",
            since: Some(Timestamp::from_millis(NOW - 60_000)),
            serves_until: Some(Timestamp::from_millis(NOW + 3_600_000)),
            ..laggard("edge-3", 1, 60)
        };
        let stopped = LaggardView {
            node: "edge-4".to_owned(),
            presence: "stopped",
            ..lost.clone()
        };
        let missing = barrier(1, 3, &[lost, stopped]);
        assert_eq!(
            missing.sentence(now()),
            "1 of 3 sidecars confirmed; edge-3 has been lost since 2026-12-31T23:59:00Z and may serve its last revision until 2027-01-01T01:00:00Z, edge-4 has been stopped since 2026-12-31T23:59:00Z and may start from its snapshot file until 2027-01-01T01:00:00Z"
        );
        assert_eq!(
            missing.hint(now()),
            "if edge-3 is gone for good: relatch fleet forget edge-3 --reason TEXT; to continue without it this time: --without edge-3"
        );
        let passed = BarrierView {
            passed_by: vec![RunView {
                node: "edge-3".to_owned(),
                run_id: "b1".to_owned(),
            }],
            ..barrier(2, 2, &[])
        };
        assert_eq!(
            passed.sentence(now()),
            "2 of 2 sidecars confirmed; not waiting for edge-3"
        );
        assert_eq!(passed.hint(now()), "see `relatch fleet`");
    }

    #[test]
    fn a_snapshot_file_that_is_behind_is_named() {
        let behind = LaggardView {
            lacks_disk: true,
            ..laggard("edge-3", 0, 1)
        };
        assert_eq!(
            barrier(0, 1, &[behind]).sentence(now()),
            "0 of 1 sidecars confirmed; edge-3 is behind in the snapshot file, last seen 1s ago"
        );
    }

    #[test]
    fn nobody_lags_when_all_have_it() {
        assert_eq!(
            barrier(20, 20, &[]).sentence(now()),
            "20 of 20 sidecars confirmed"
        );
        assert_eq!(
            barrier(1, 1, &[]).sentence(now()),
            "1 of 1 sidecars confirmed"
        );
        assert_eq!(
            barrier(0, 0, &[]).sentence(now()),
            "no sidecar serves this keyring"
        );
        assert_eq!(barrier(0, 0, &[]).laggards_sentence(now()), None);
    }
}
