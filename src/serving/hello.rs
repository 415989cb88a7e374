//! The beginning of a stream: which run it belongs to, the end of which other run it proves, and
//! which reported state counts.

use std::collections::BTreeMap;

use super::{
    About, Farewell, Gone, HeldState, Holding, Lock, Now, Run, RunKey, Serving, SnapshotFile,
};
use crate::{key::KeyringName, tls::Identity};

/// The first message of a sidecar on a stream.
#[derive(Clone, Debug)]
pub(crate) struct Hello {
    /// The name of the run.
    pub(crate) key: RunKey,
    /// The number of the stream within the run, from 1.
    pub(crate) stream: u64,
    /// The description that the sidecar sends of itself.
    pub(crate) about: About,
    /// The lock that it holds.
    pub(crate) lock: Option<Lock>,
    /// The snapshot file that it keeps.
    pub(crate) file: Option<SnapshotFile>,
    /// The state of each keyring that it holds or subscribes to.
    pub(crate) keyrings: BTreeMap<KeyringName, HeldState>,
}

/// The result of a Hello.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Welcome {
    /// Whether an operator had forgotten the run: it must begin anew.
    pub(crate) was_forgotten: bool,
    /// Whether another run of the node may also serve: the configuration was copied, or this run
    /// cannot prove the end of the former one.
    pub(crate) has_namesake: bool,
}

/// Why a stream cannot begin.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum HelloError {
    /// A later stream of the run has begun.
    #[error("a later stream of this run has begun")]
    Late,
    /// The run has said Goodbye, or another one holds its lock.
    #[error("this run has ended: another process holds its lock, or it has said Goodbye")]
    Ended,
    /// Another identity uses the id of this node.
    #[error("another identity uses the id of this node")]
    Taken {
        /// The identity that uses the node id.
        holder: Identity,
    },
}

impl Serving {
    /// Begins a stream of a run. Nothing may be sent on it before the run's row is saved.
    ///
    /// # Errors
    ///
    /// When a later stream of the run has begun, when the run has ended, or when the node belongs
    /// to another identity.
    pub(crate) fn hello(&mut self, hello: Hello, now: Now) -> Result<Welcome, HelloError> {
        self.pass(now);
        self.check(&hello)?;
        let inherited = self.end_predecessors(&hello, now);
        let gap = self.gaps.close(&hello.key);
        let was_forgotten = gap.as_ref().is_some_and(|gap| gap.is_forgotten);
        let has_namesake = self.others_of_node(&hello.key).next().is_some();
        self.unremoved.remove(&hello.key);
        self.unsaved.insert(hello.key.clone());
        let max_serve_for = self.max_serve_for;
        let run = self
            .runs
            .entry(hello.key)
            .or_insert_with(|| Run::back(gap, now));
        let identity = hello.about.identity.clone();
        run.about = About {
            identity: identity.or_else(|| run.about.identity.take()),
            ..hello.about
        };
        run.newest_stream = hello.stream;
        run.open.insert(hello.stream);
        run.lost_at = None;
        run.connected_at = Some(now.wall);
        run.last_seen = now.wall;
        run.lock = hello.lock;
        run.file = hello.file;
        for holding in run.keyrings.values_mut() {
            holding.is_followed = false;
        }
        for (name, from) in inherited {
            run.keyrings.entry(name).or_default().inherit(&from);
        }
        for (name, mut held) in hello.keyrings {
            held.agrees &= !was_forgotten;
            if !held.is_admitted {
                if let Some(holding) = run.keyrings.get_mut(&name) {
                    holding.progress.greet(&held, now.wall);
                }
                continue;
            }
            let holding = run.keyrings.entry(name).or_default();
            holding.greet(&held, max_serve_for, now);
        }
        Ok(Welcome {
            was_forgotten,
            has_namesake,
        })
    }

    fn check(&self, hello: &Hello) -> Result<(), HelloError> {
        if let Some(known) = self.runs.get(&hello.key) {
            if known.ended.is_some() {
                return Err(HelloError::Ended);
            }
            if hello.stream <= known.newest_stream {
                return Err(HelloError::Late);
            }
        }
        if let Some(gap) = self.gaps.get(&hello.key) {
            if gap.has_ended {
                return Err(HelloError::Ended);
            }
            if hello.stream <= gap.newest_stream {
                return Err(HelloError::Late);
            }
        }
        if let Some(lock) = &hello.lock {
            let mut others = self.others_of_node(&hello.key);
            if others.any(|other| {
                let held = self.runs[other].lock.as_ref();
                held.is_some_and(|held| held.succeeds(lock))
            }) {
                return Err(HelloError::Ended);
            }
        }
        if let Some(identity) = &hello.about.identity {
            let of_node = self.runs.range(RunKey::first_of(&hello.key.node)..);
            let of_node = of_node.take_while(|(key, _)| key.node == hello.key.node);
            let mut holders = of_node.filter_map(|(_, run)| run.about.identity.as_ref());
            if let Some(holder) = holders.find(|holder| *holder != identity) {
                return Err(HelloError::Taken {
                    holder: holder.clone(),
                });
            }
        }
        Ok(())
    }

    /// Ends the runs of the node whose lock the new run holds now. Returns the keyrings that the
    /// new run may serve from the file of one of them.
    fn end_predecessors(&mut self, hello: &Hello, now: Now) -> Vec<(KeyringName, Holding)> {
        let Some(lock) = &hello.lock else {
            return Vec::new();
        };
        let mut ended = Vec::new();
        for (key, run) in &self.runs {
            let is_other = *key != hello.key && key.node == hello.key.node;
            let held = run.lock.as_ref().filter(|_| is_other);
            if held.is_some_and(|held| lock.succeeds(held)) {
                ended.push(key.clone());
            }
        }
        let mut inherited = Vec::new();
        for key in ended {
            let unwitnessed = Farewell {
                has_told_all: false,
                has_erased_file: false,
                last_write: 0,
            };
            self.end(&key, unwitnessed, now);
            let stopped = self.runs.get(&key);
            if let Some(run) = stopped
                && let Some(began) = run.continued_by(hello)
            {
                inherited.extend(run.keyrings.clone());
                let ended = run.ended.as_ref();
                let told = ended.is_some_and(|ended| {
                    ended.has_told_all && ended.last_write > 0 && ended.last_write == began
                });
                if told {
                    // No process has served from the file since.
                    self.remove(&key);
                } else {
                    self.leave_gap(&key, Gone::Ended, now);
                }
            }
        }
        inherited
    }

    /// Returns the other runs of a node that may serve.
    fn others_of_node<'a>(&'a self, key: &'a RunKey) -> impl Iterator<Item = &'a RunKey> {
        let of_node = self.runs.range(RunKey::first_of(&key.node)..);
        let of_node = of_node.map(|(other, _)| other);
        of_node
            .take_while(|other| other.node == key.node)
            .filter(move |other| *other != key)
    }
}

impl Run {
    /// Returns the number of the write from which a new run with this run's lock continues the
    /// file; none when it does not continue the file.
    fn continued_by(&self, hello: &Hello) -> Option<u64> {
        let (mine, theirs) = (self.file.as_ref()?, hello.file.as_ref()?);
        let began = theirs.begun_from_write;
        (mine.id == theirs.id && began > 0 && began >= mine.begun_from_write).then_some(began)
    }
}
