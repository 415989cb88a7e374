//! What happened in a run, and the judgement of every check by it.

use std::{collections::HashMap, fmt, time::Duration};

/// The time since the run began.
pub(super) type Moment = Duration;

/// Everything that was done and seen.
#[derive(Debug, Default)]
pub(super) struct History {
    /// What checks present, by number.
    pub(super) credentials: Vec<Credential>,
    /// By number.
    pub(super) sidecars: Vec<SidecarPast>,
    pub(super) checks: Vec<Check>,
    /// Of keys that nobody ever issued, which are too many to be kept one by one.
    pub(super) nobodys: Nobodys,
    pub(super) limits: Limits,
}

/// A secret that was issued, or that nobody ever issued.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Credential {
    pub(super) issued: Option<Change>,
    /// Retired or revoked.
    pub(super) ended: Option<Change>,
    /// It replaced another one.
    pub(super) handed_over: Option<HandOver>,
    /// When a command returned that waits until no sidecar accepts it any more.
    pub(super) gone: Option<Moment>,
}

/// A version was handed out in the place of another one.
#[derive(Clone, Copy, Debug)]
pub(super) struct HandOver {
    /// After the command returned that waits until every sidecar accepts it.
    pub(super) at: Moment,
    /// The number of the credential before it.
    pub(super) old: usize,
}

/// A change of a keyring.
#[derive(Clone, Copy, Debug)]
pub(super) struct Change {
    /// Before it was asked for.
    pub(super) begun: Moment,
    /// None where no answer came, so that nobody knows whether it was committed.
    pub(super) revision: Option<u64>,
}

/// What became of a sidecar.
#[derive(Debug, Default)]
pub(super) struct SidecarPast {
    /// Its processes, one after the other.
    pub(super) lives: Vec<Life>,
    /// When a process stood still.
    pub(super) frozen: Vec<Span>,
    /// When no control plane could confirm what it holds.
    pub(super) cut: Vec<Cut>,
    /// When so many keys that nobody has were asked for that a keyring held on demand looks no more keys up.
    pub(super) crowded: Vec<Span>,
    acks: Vec<Ack>,
    /// In which life a process was first heard of.
    boots: HashMap<String, usize>,
}

/// A process of a sidecar.
#[derive(Clone, Copy, Debug)]
pub(super) struct Life {
    /// Before it was started.
    pub(super) from: Moment,
    /// When it was known to listen, with all that it had on its disk.
    pub(super) serves: Option<Moment>,
    /// When it was seen to be ready.
    pub(super) well: Option<Moment>,
    /// Before it was told to end.
    pub(super) to: Option<Moment>,
}

/// A time with its end, where that has come.
#[derive(Clone, Copy, Debug)]
pub(super) struct Span {
    pub(super) from: Moment,
    pub(super) to: Option<Moment>,
}

/// A time in which nobody could confirm what a sidecar holds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cut {
    pub(super) from: Moment,
    /// When what it holds since then was confirmed at the latest: as the time began, or sooner for what it took from a file.
    pub(super) confirmed: Moment,
    /// When the way was whole again.
    pub(super) healed: Option<Moment>,
    /// When the sidecar said that it was well again.
    pub(super) recovered: Option<Moment>,
}

/// A revision that the control plane was seen to know applied.
#[derive(Clone, Copy, Debug)]
struct Ack {
    at: Moment,
    life: usize,
    applied: u64,
    durable: u64,
}

/// A check and its answer.
#[derive(Clone, Debug)]
pub(super) struct Check {
    pub(super) sidecar: usize,
    pub(super) credential: usize,
    pub(super) sent: Moment,
    pub(super) answered: Moment,
    pub(super) outcome: Outcome,
}

/// Checks of keys that nobody ever issued.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Nobodys {
    pub(super) asked: usize,
    pub(super) allowed: usize,
}

/// How a check ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Outcome {
    Allowed,
    /// With the reason that was given.
    Denied(String),
    /// No answer came.
    Failed(String),
}

/// The staleness limits of the run's sidecars.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    pub(super) deny_after: Duration,
    /// How old a confirmation may be while everything is well.
    pub(super) heartbeat: Duration,
}

/// What a check has to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Expected {
    Allow,
    Deny,
    /// A change is in flight, or the sidecar cannot be expected to answer.
    Either,
}

/// How much a process owed.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Owed {
    /// Checks that had to be allowed.
    pub(super) allowed: usize,
    /// Checks that had to be denied because a command had returned which waits until no process accepts the credential.
    pub(super) gone: usize,
}

/// What the checks of a run came to.
#[derive(Debug, Default)]
pub(super) struct Judgement {
    pub(super) must_allow: usize,
    pub(super) must_deny: usize,
    pub(super) either: usize,
    pub(super) wrong: Vec<String>,
}

/// When processes first allowed something.
#[derive(Debug, Default)]
struct Found {
    /// By sidecar, process and credential.
    each: HashMap<(usize, usize, usize), Moment>,
    /// By sidecar and process.
    any: HashMap<(usize, usize), Moment>,
}

/// The limit holds within so much.
const STALE_WITHIN: Duration = Duration::from_secs(1);

impl History {
    /// Judges every check.
    pub(super) fn judge(&self) -> Judgement {
        let nobodys = self.nobodys;
        let mut judgement = Judgement {
            must_deny: nobodys.asked,
            ..Judgement::default()
        };
        if nobodys.allowed > 0 {
            judgement.wrong.push(format!("{nobodys:?}"));
        }
        let found = self.found();
        for check in &self.checks {
            let expected = self.expected(check, &found);
            match expected {
                Expected::Allow => judgement.must_allow += 1,
                Expected::Deny => judgement.must_deny += 1,
                Expected::Either => judgement.either += 1,
            }
            if expected.is_broken_by(&check.outcome) {
                let credential = self.credentials[check.credential];
                judgement
                    .wrong
                    .push(format!("{expected:?}: {check:?} of {credential:?}"));
            }
        }
        judgement
    }

    /// How much a sidecar owed since a moment.
    pub(super) fn owed(&self, sidecar: usize, since: Moment) -> Owed {
        let found = self.found();
        let checks = self.checks.iter();
        let checks = checks.filter(|check| check.sidecar == sidecar && check.sent >= since);
        checks.fold(Owed::default(), |owed, check| {
            let gone = self.credentials[check.credential].gone;
            let is_gone = gone.is_some_and(|gone| gone <= check.sent);
            let is_allowed = self.expected(check, &found) == Expected::Allow;
            Owed {
                allowed: owed.allowed + usize::from(is_allowed),
                gone: owed.gone + usize::from(is_gone),
            }
        })
    }

    /// When processes first said of credentials that they are good, by sidecar, process and credential.
    fn found(&self) -> Found {
        let mut found = Found::default();
        let allowed = self.checks.iter();
        for check in allowed.filter(|check| check.outcome == Outcome::Allowed) {
            if let Some(life) = self.sidecars[check.sidecar].life_of(check) {
                let key = (check.sidecar, life, check.credential);
                let each = found.each.entry(key).or_insert(check.answered);
                *each = check.answered.min(*each);
                let any = found.any.entry((check.sidecar, life));
                let any = any.or_insert(check.answered);
                *any = check.answered.min(*any);
            }
        }
        found
    }

    /// What a check has to be.
    fn expected(&self, check: &Check, found: &Found) -> Expected {
        let credential = &self.credentials[check.credential];
        let Some(issued) = credential.issued else {
            return Expected::Deny;
        };
        if credential.gone.is_some_and(|gone| gone <= check.sent) {
            // Whatever the control plane knew of this process.
            return Expected::Deny;
        }
        let sidecar = &self.sidecars[check.sidecar];
        let knows = |change: Change| {
            let revision = change.revision;
            revision.is_some_and(|revision| sidecar.knew(revision, check))
        };
        if let Some(ended) = credential
            .ended
            .filter(|ended| ended.begun <= check.answered)
        {
            return if knows(ended) {
                Expected::Deny
            } else {
                Expected::Either
            };
        }
        match sidecar.staleness(check, self.limits) {
            Staleness::Certain => return Expected::Deny,
            Staleness::Possible => return Expected::Either,
            Staleness::None if sidecar.may_have_begun_stale(check, self.limits, found) => {
                return Expected::Either;
            }
            Staleness::None => {}
        }
        let is_promised = credential.handed_over.is_some_and(|handed_over| {
            handed_over.at <= check.sent && sidecar.has_found(handed_over.old, check, found)
        });
        let is_known = knows(issued) && sidecar.was_confirmed(issued, check, found);
        if (is_promised || is_known)
            && sidecar.could_answer(check)
            && sidecar.could_find(check, found)
        {
            Expected::Allow
        } else {
            Expected::Either
        }
    }
}

/// Whether a keyring was stale at a check.
enum Staleness {
    None,
    Possible,
    Certain,
}

impl SidecarPast {
    /// Notes that the control plane, asked at a moment, names a process as connected. One of which nothing was heard before is
    /// the one that listened by then: one that is gone is still told of, but not as connected.
    pub(super) fn hears_of(&mut self, boot: &str, asked: Moment) {
        let newest = self.lives.iter().enumerate().next_back();
        if let Some((number, life)) = newest
            && life.serves.is_some_and(|serves| serves <= asked)
        {
            self.boots.entry(boot.to_owned()).or_insert(number);
        }
    }

    /// Notes what the control plane knew at a moment of a process that was heard of.
    pub(super) fn acked(&mut self, boot: &str, at: Moment, applied: u64, durable: u64) {
        let Some(life) = self.boots.get(boot).copied() else {
            return;
        };
        self.acks.push(Ack {
            at,
            life,
            applied,
            durable,
        });
    }

    /// Whether it was known, before the check, to have applied a revision: in the life in which it was asked, or on disk in
    /// an earlier one.
    fn knew(&self, revision: u64, check: &Check) -> bool {
        let Some(life) = self.life_of(check) else {
            return false;
        };
        self.acks.iter().any(|ack| {
            let is_held = match ack.life {
                at if at == life => ack.applied >= revision,
                earlier if earlier < life => ack.durable >= revision,
                _ => false,
            };
            is_held && ack.at < check.sent
        })
    }

    /// Whether the process had been answered a beat before the check. One that starts without a file serves from then on, which
    /// is a round trip after it has said what it applied; it is not ready before.
    fn was_confirmed(&self, issued: Change, check: &Check, found: &Found) -> bool {
        let Some(life) = self.life_of(check) else {
            return false;
        };
        let mut acks = self.acks.iter();
        let is_from_disk = acks.any(|ack| {
            ack.life < life && issued.revision <= Some(ack.durable) && ack.at < check.sent
        });
        is_from_disk || self.was_answered(life, check, found)
    }

    /// Whether the process that lives was seen to have a revision on its disk.
    pub(super) fn keeps(&self, revision: u64) -> bool {
        let mut acks = self.acks.iter();
        acks.any(|ack| ack.life + 1 == self.lives.len() && ack.durable >= revision)
    }

    /// Whether one and the same process was there, and running, from the question to the answer.
    fn could_answer(&self, check: &Check) -> bool {
        let life = self.life_of(check).map(|life| self.lives[life]);
        let serves = life.and_then(|life| life.serves);
        serves.is_some_and(|serves| serves <= check.sent)
            && !self.frozen.iter().any(|span| span.touches(check))
    }

    /// Whether the process that is asked has allowed a credential before.
    fn has_found(&self, credential: usize, check: &Check, found: &Found) -> bool {
        let life = self.life_of(check);
        let first = life.and_then(|life| found.each.get(&(check.sidecar, life, credential)));
        first.is_some_and(|first| *first < check.sent)
    }

    /// Whether lookups were made, or none was needed.
    fn could_find(&self, check: &Check, found: &Found) -> bool {
        self.has_found(check.credential, check, found)
            || !self.crowded.iter().any(|span| span.touches(check))
    }

    fn life_of(&self, check: &Check) -> Option<usize> {
        self.lives.iter().position(|life| {
            life.from <= check.sent && life.to.is_none_or(|to| check.answered < to)
        })
    }

    fn staleness(&self, check: &Check, limits: Limits) -> Staleness {
        let mut staleness = Staleness::None;
        for (number, cut) in self.cut.iter().enumerate() {
            let is_cut =
                cut.from <= check.sent && cut.healed.is_none_or(|healed| check.answered < healed);
            if is_cut && check.sent > cut.confirmed + limits.deny_after + STALE_WITHIN {
                return Staleness::Certain;
            }
            let first = self.confirmed_since(number, limits) + limits.deny_after;
            let first = first.max(cut.from);
            let has_recovered = cut
                .recovered
                .is_some_and(|recovered| recovered < check.sent);
            if check.answered >= first && !has_recovered {
                staleness = Staleness::Possible;
            }
        }
        staleness
    }

    /// When what is held since a cut was confirmed at the earliest.
    fn confirmed_since(&self, cut: usize, limits: Limits) -> Moment {
        let Cut {
            from, confirmed, ..
        } = self.cut[cut];
        let earliest = confirmed.saturating_sub(limits.heartbeat);
        let mut ends = self.lives.iter().filter_map(|life| life.to);
        if ends.any(|end| earliest <= end && end <= from) {
            self.file_since(earliest, limits)
        } else {
            earliest
        }
    }

    /// When what a file holds was confirmed at the earliest. A file says only every so often how fresh it is: when a process is
    /// killed soon after it has recovered, the file says what it said before that.
    fn file_since(&self, earliest: Moment, limits: Limits) -> Moment {
        let before = self.cut.iter().rposition(|before| {
            let is_over = before.recovered.is_some_and(|over| over <= earliest);
            before.from <= earliest && !is_over
        });
        before.map_or(earliest, |before| self.confirmed_since(before, limits))
    }

    /// Whether a process that began with a file may have been stale until it was answered.
    fn may_have_begun_stale(&self, check: &Check, limits: Limits, found: &Found) -> bool {
        let Some(life) = self.life_of(check) else {
            return false;
        };
        let Some(killed) = life.checked_sub(1).and_then(|former| self.lives[former].to) else {
            return false;
        };
        let since = self.file_since(killed.saturating_sub(limits.heartbeat), limits);
        !self.was_answered(life, check, found) && since + limits.deny_after <= check.answered
    }

    /// Whether a process was seen to be ready, or to allow something, before the check.
    fn was_answered(&self, life: usize, check: &Check, found: &Found) -> bool {
        let is_well = self.lives[life].well.is_some_and(|well| well < check.sent);
        let first = found.any.get(&(check.sidecar, life));
        is_well || first.is_some_and(|first| *first < check.sent)
    }
}

impl Life {
    pub(super) const fn since(from: Moment) -> Self {
        Self {
            from,
            serves: None,
            well: None,
            to: None,
        }
    }
}

impl Span {
    pub(super) const fn since(from: Moment) -> Self {
        Self { from, to: None }
    }

    fn touches(&self, check: &Check) -> bool {
        self.from <= check.answered && self.to.is_none_or(|to| check.sent <= to)
    }
}

impl Expected {
    fn is_broken_by(self, outcome: &Outcome) -> bool {
        match self {
            Self::Allow => !matches!(outcome, Outcome::Allowed),
            Self::Deny => matches!(outcome, Outcome::Allowed),
            Self::Either => false,
        }
    }
}

impl Default for Limits {
    /// As a sidecar's own, which no short run comes near. The store is read each second and that is told each second, to
    /// which a busy machine adds.
    fn default() -> Self {
        Self {
            deny_after: Duration::from_hours(1),
            heartbeat: Duration::from_secs(3),
        }
    }
}

impl Judgement {
    /// Whether there was something to be wrong in.
    pub(super) const fn is_enough(&self) -> bool {
        self.must_allow > 50 && self.must_deny > 50
    }

    /// Fails the test on a wrong decision.
    pub(super) fn assert_right(&self) {
        let wrong = &self.wrong;
        assert!(
            wrong.is_empty(),
            "{} wrong decisions, the first of them:\n{}",
            wrong.len(),
            wrong[..wrong.len().min(5)].join("\n")
        );
    }
}

impl fmt::Display for Judgement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} to allow, {} to deny, {} either",
            self.must_allow, self.must_deny, self.either
        )
    }
}

#[cfg(test)]
mod tests;
