//! The row of a run in the store, and how the book is restored from it.

use std::{collections::BTreeMap, time::Duration};

use serde::{Deserialize, Serialize};

use super::{
    About, Gap, Holding, Lock, Now, Run, RunKey, Serving, SnapshotFile, holding::stretched,
    run::Ended,
};
use crate::key::{KeyringName, Timestamp};

/// The row of a run or a gap in the store.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) key: RunKey,
    /// The cluster of its node.
    pub(crate) cluster: String,
    /// The version of relatch that it runs.
    pub(crate) version: String,
    /// The keyrings that it holds.
    pub(crate) keyrings: Vec<KeyringName>,
    /// When the control plane last had contact with the run.
    pub(crate) last_seen: Timestamp,
    /// It has reported every use of a key before this moment; none when it has reported nothing.
    pub(crate) complete_until: Option<Timestamp>,
    /// For a run that is gone, the time until which it may have served; none for a run that may
    /// serve.
    pub(crate) gone_at: Option<Timestamp>,
    /// The other fields, as JSON; none in rows that an earlier version of relatch has written.
    pub(crate) record: Option<String>,
}

/// A row cannot be read.
#[derive(Debug, thiserror::Error)]
#[error("the row of the sidecar {node} in the store cannot be read")]
pub struct RowError {
    node: String,
    source: serde_json::Error,
}

/// The fields of a row beyond its columns. Times are in milliseconds.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Record {
    stream: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    lock: Option<Lock>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    file: Option<FileRecord>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    lost_at: Option<Timestamp>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ended: Option<EndRecord>,
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    keyrings: BTreeMap<KeyringName, HoldingRecord>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    gap: Option<GapRecord>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct FileRecord {
    id: String,
    begun_from_write: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct EndRecord {
    at: Timestamp,
    has_told_all: bool,
    last_write: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct HoldingRecord {
    /// The largest grant that may not have expired.
    granted_ms: u64,
    /// How long the run may still serve when it is no longer answered; absent while it is answered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rest_ms: Option<u64>,
    #[serde(default)]
    is_on_demand: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct GapRecord {
    age_ms: u64,
    has_ended: bool,
    is_forgotten: bool,
}

impl Row {
    pub(super) fn of_run(key: &RunKey, run: &Run, now: Now) -> Self {
        let connected = run.is_connected();
        let holding = |(name, held): (&KeyringName, &Holding)| {
            let rest = (!run.is_answered(held)).then(|| held.rest(now.boot));
            (name.clone(), HoldingRecord::of(held, rest, now))
        };
        let record = Record {
            stream: run.newest_stream,
            lock: run.lock.clone(),
            file: run.file.as_ref().map(|file| FileRecord {
                id: file.id.clone(),
                begun_from_write: file.begun_from_write,
            }),
            lost_at: run.lost_at,
            ended: run.ended.as_ref().map(|ended| EndRecord {
                at: ended.at,
                has_told_all: ended.has_told_all,
                last_write: ended.last_write,
            }),
            keyrings: run.keyrings.iter().map(holding).collect(),
            gap: None,
        };
        Self {
            key: key.clone(),
            cluster: run.about.cluster.clone(),
            version: run.about.version.clone(),
            keyrings: run.keyrings.keys().cloned().collect(),
            last_seen: if connected { now.wall } else { run.last_seen },
            complete_until: run.complete_until,
            gone_at: None,
            record: Some(record.to_json()),
        }
    }

    pub(super) fn of_gap(key: &RunKey, gap: &Gap, now: Now) -> Self {
        let holding = |(name, held): (&KeyringName, &Holding)| {
            let rest = Some(held.rest(now.boot));
            (name.clone(), HoldingRecord::of(held, rest, now))
        };
        let record = Record {
            stream: gap.newest_stream,
            keyrings: gap.held.iter().map(holding).collect(),
            gap: Some(GapRecord {
                age_ms: u64::try_from(gap.age(now.boot).as_millis()).unwrap_or(u64::MAX),
                has_ended: gap.has_ended,
                is_forgotten: gap.is_forgotten,
            }),
            ..Record::default()
        };
        Self {
            key: key.clone(),
            cluster: gap.about.cluster.clone(),
            version: gap.about.version.clone(),
            keyrings: gap.keyrings.iter().cloned().collect(),
            last_seen: gap.last_seen,
            complete_until: gap.complete_until,
            gone_at: Some(gap.until),
            record: Some(record.to_json()),
        }
    }

    /// Returns whether `other`, an earlier row, contains everything that this row contains. Rests
    /// and ages do not count, because they change with time. A later time of contact does not
    /// count, because it is of no use.
    pub(super) fn says_as_much_as(&self, other: &Self) -> bool {
        let settled = |row: &Self| {
            let record: Option<Record> = row
                .record
                .as_deref()
                .and_then(|text| serde_json::from_str(text).ok());
            record.map(|mut record| {
                for held in record.keyrings.values_mut() {
                    held.rest_ms = held.rest_ms.map(|_| 0);
                }
                if let Some(gap) = &mut record.gap {
                    gap.age_ms = 0;
                }
                record
            })
        };
        self.keyrings == other.keyrings
            && self.gone_at == other.gone_at
            && settled(self) == settled(other)
    }

    pub(super) fn load(self, serving: &mut Serving, now: Now) -> Result<(), RowError> {
        let record = match &self.record {
            None => None,
            Some(text) => {
                let read = serde_json::from_str(text);
                let record: Record = read.map_err(|source| RowError {
                    node: self.key.node.clone(),
                    source,
                })?;
                Some(record)
            }
        };
        let about = About {
            cluster: self.cluster,
            version: self.version,
            ..About::default()
        };
        if let Some(until) = self.gone_at {
            let record = record.unwrap_or_default();
            let kept = record.gap.as_ref().unwrap_or(&GapRecord {
                age_ms: 0,
                has_ended: false,
                is_forgotten: false,
            });
            let gap = Gap {
                about,
                keyrings: self.keyrings.into_iter().collect(),
                complete_until: self.complete_until,
                last_seen: self.last_seen,
                until,
                is_forgotten: kept.is_forgotten,
                ended: now.boot,
                age_before: Duration::from_millis(kept.age_ms),
                newest_stream: record.stream,
                has_ended: kept.has_ended,
                held: held_of(record.keyrings, now),
            };
            serving.gaps.load(self.key, gap);
            return Ok(());
        }
        let full = serving.max_serve_for;
        let Record {
            stream,
            lock,
            file,
            lost_at,
            ended,
            keyrings,
            gap: _,
        } = record.unwrap_or_else(|| Record {
            keyrings: self
                .keyrings
                .iter()
                .map(|name| {
                    let granted_ms = millis(full);
                    let rest_ms = None;
                    let held = HoldingRecord {
                        granted_ms,
                        rest_ms,
                        is_on_demand: false,
                    };
                    (name.clone(), held)
                })
                .collect(),
            ..Record::default()
        });
        let mut run = Run::new(about, self.last_seen);
        run.complete_until = self.complete_until;
        run.newest_stream = stream;
        run.lock = lock;
        run.file = file.map(|file| SnapshotFile {
            id: file.id,
            begun_from_write: file.begun_from_write,
        });
        run.lost_at = lost_at.or(Some(self.last_seen));
        run.ended = ended.map(|ended| Ended {
            at: ended.at,
            has_told_all: ended.has_told_all,
            last_write: ended.last_write,
        });
        run.keyrings = held_of(keyrings, now);
        serving.runs.insert(self.key, run);
        Ok(())
    }
}

fn held_of(
    records: BTreeMap<KeyringName, HoldingRecord>,
    now: Now,
) -> BTreeMap<KeyringName, Holding> {
    let records = records.into_iter();
    records.map(|(name, held)| (name, held.load(now))).collect()
}

impl HoldingRecord {
    fn of(held: &Holding, rest: Option<Duration>, now: Now) -> Self {
        Self {
            granted_ms: millis(held.granted),
            rest_ms: rest.map(millis),
            is_on_demand: !held.may_be_in_file(now.boot),
        }
    }

    fn load(&self, now: Now) -> Holding {
        let granted = Duration::from_millis(self.granted_ms);
        let rest = self
            .rest_ms
            .map_or_else(|| stretched(granted), Duration::from_millis);
        Holding {
            until: Some(now.boot.saturating_add(rest)),
            granted,
            is_on_demand: self.is_on_demand,
            ..Holding::default()
        }
    }
}

impl Record {
    fn to_json(&self) -> String {
        serde_json::to_string(self).expect("a record can be JSON")
    }
}

/// Returns a time in milliseconds, rounded up, so that no time is written shorter than it is.
fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_nanos().div_ceil(1_000_000)).unwrap_or(u64::MAX)
}
