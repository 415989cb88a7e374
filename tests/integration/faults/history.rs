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
    pub(super) limits: Limits,
}

/// A secret that was issued, or that nobody ever issued.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Credential {
    pub(super) issued: Option<Change>,
    /// Retired or revoked.
    pub(super) ended: Option<Change>,
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
    pub(super) lives: Vec<Span>,
    /// When a process stood still.
    pub(super) frozen: Vec<Span>,
    /// When no control plane could confirm what it holds.
    pub(super) cut: Vec<Cut>,
    acks: Vec<Ack>,
    /// In which life a process was first heard of.
    boots: HashMap<String, usize>,
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

/// What the checks of a run came to.
#[derive(Debug, Default)]
pub(super) struct Judgement {
    pub(super) must_allow: usize,
    pub(super) must_deny: usize,
    pub(super) either: usize,
    pub(super) wrong: Vec<String>,
}

/// The limit holds within so much.
const STALE_WITHIN: Duration = Duration::from_secs(1);

impl History {
    /// Judges every check.
    pub(super) fn judge(&self) -> Judgement {
        let mut judgement = Judgement::default();
        for check in &self.checks {
            let expected = self.expected(check);
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

    /// What a check has to be.
    pub(super) fn expected(&self, check: &Check) -> Expected {
        let credential = &self.credentials[check.credential];
        let Some(issued) = credential.issued else {
            return Expected::Deny;
        };
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
            Staleness::None => {}
        }
        if knows(issued) && sidecar.could_answer(check) {
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
    /// Notes what the control plane knew of a process at a moment.
    pub(super) fn acked(&mut self, boot: &str, at: Moment, applied: u64, durable: u64) {
        let Some(newest) = self.lives.len().checked_sub(1) else {
            return;
        };
        // A process is first heard of while it lives; one that is gone is still told of for a while.
        let life = *self.boots.entry(boot.to_owned()).or_insert(newest);
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

    /// Whether one and the same process was there, and running, from the question to the answer.
    fn could_answer(&self, check: &Check) -> bool {
        self.life_of(check).is_some() && !self.frozen.iter().any(|span| span.touches(check))
    }

    fn life_of(&self, check: &Check) -> Option<usize> {
        self.lives.iter().position(|life| {
            life.from <= check.sent && life.to.is_none_or(|to| check.answered < to)
        })
    }

    fn staleness(&self, check: &Check, limits: Limits) -> Staleness {
        let mut staleness = Staleness::None;
        for cut in &self.cut {
            let is_cut = cut.healed.is_none_or(|healed| check.answered < healed);
            if is_cut && check.sent > cut.from + limits.deny_after + STALE_WITHIN {
                return Staleness::Certain;
            }
            let first = (cut.from + limits.deny_after).saturating_sub(limits.heartbeat);
            let has_recovered = cut
                .recovered
                .is_some_and(|recovered| recovered < check.sent);
            if check.answered >= first && !has_recovered {
                staleness = Staleness::Possible;
            }
        }
        staleness
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
    /// As a sidecar's own, which no short run comes near.
    fn default() -> Self {
        Self {
            deny_after: Duration::from_hours(1),
            heartbeat: Duration::from_secs(1),
        }
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

mod tests {
    use super::*;

    const ALLOWED: Outcome = Outcome::Allowed;

    fn at(seconds: u64) -> Moment {
        Duration::from_secs(seconds)
    }

    fn denied() -> Outcome {
        Outcome::Denied("revoked".to_owned())
    }

    fn failed() -> Outcome {
        Outcome::Failed("no answer".to_owned())
    }

    fn change(begun: u64, revision: u64) -> Change {
        Change {
            begun: at(begun),
            revision: Some(revision),
        }
    }

    /// Issued at 10 as revision 5, acked at 20; revoked at 50 as revision 9, acked at 60.
    fn history() -> History {
        let mut sidecar = SidecarPast {
            lives: vec![Span::since(at(0))],
            ..SidecarPast::default()
        };
        sidecar.acked("boot", at(20), 5, 0);
        sidecar.acked("boot", at(60), 9, 0);
        let key = Credential {
            issued: Some(change(10, 5)),
            ended: Some(change(50, 9)),
        };
        History {
            credentials: vec![key, Credential::default()],
            sidecars: vec![sidecar],
            ..History::default()
        }
    }

    fn check(sent: u64, answered: u64) -> Check {
        Check {
            sidecar: 0,
            credential: 0,
            sent: at(sent),
            answered: at(answered),
            outcome: ALLOWED,
        }
    }

    #[track_caller]
    fn assert_wrong(history: &mut History, check: &Check, wrong: &[Outcome], right: &[Outcome]) {
        for (outcomes, count) in [(wrong, 1), (right, 0)] {
            for outcome in outcomes {
                let outcome = outcome.clone();
                history.checks = vec![Check {
                    outcome,
                    ..check.clone()
                }];
                let judged = history.judge();
                assert_eq!(judged.wrong.len(), count, "{:?}", history.checks);
            }
        }
    }

    #[test]
    fn a_key_that_was_acked_must_be_allowed_until_its_end_is_asked_for() {
        let mut history = history();
        let all = [ALLOWED, denied(), failed()];
        assert_wrong(&mut history, &check(5, 6), &[], &all);
        assert_wrong(&mut history, &check(15, 16), &[], &all);
        assert_wrong(&mut history, &check(19, 21), &[], &all);
        assert_wrong(
            &mut history,
            &check(21, 22),
            &[denied(), failed()],
            &[ALLOWED],
        );
        assert_wrong(
            &mut history,
            &check(48, 49),
            &[denied(), failed()],
            &[ALLOWED],
        );
        assert_wrong(&mut history, &check(48, 50), &[], &all);
        assert_wrong(&mut history, &check(55, 56), &[], &all);
        assert_wrong(&mut history, &check(59, 61), &[], &all);
        assert_wrong(
            &mut history,
            &check(61, 62),
            &[ALLOWED],
            &[denied(), failed()],
        );
    }

    #[test]
    fn what_was_never_issued_must_be_denied_whatever_else_happens() {
        let mut history = history();
        history.sidecars[0].lives.clear();
        let check = Check {
            credential: 1,
            ..check(21, 22)
        };
        assert_wrong(&mut history, &check, &[ALLOWED], &[denied(), failed()]);
    }

    #[test]
    fn a_change_of_which_nobody_heard_an_answer_binds_nobody() {
        let mut history = history();
        let unheard = Change {
            begun: at(30),
            revision: None,
        };
        history.credentials[0].ended = Some(unheard);
        let all = [ALLOWED, denied(), failed()];
        assert_wrong(&mut history, &check(28, 29), &[denied()], &[ALLOWED]);
        assert_wrong(&mut history, &check(70, 71), &[], &all);
    }

    #[test]
    fn a_process_that_is_gone_or_stands_still_owes_no_answer_and_its_successor_only_what_was_on_disk()
     {
        let all = [ALLOWED, denied(), failed()];
        let mut history = history();
        history.sidecars[0].frozen = vec![Span {
            from: at(30),
            to: Some(at(35)),
        }];
        assert_wrong(&mut history, &check(29, 31), &[], &all);
        assert_wrong(&mut history, &check(36, 37), &[denied()], &[ALLOWED]);

        history.sidecars[0].lives = vec![
            Span {
                from: at(0),
                to: Some(at(40)),
            },
            Span::since(at(41)),
        ];
        assert_wrong(&mut history, &check(39, 40), &[], &all);
        assert_wrong(&mut history, &check(42, 43), &[], &all);
        // What the first process had acked by then does not count for the second: 60 is told of the first.
        assert_wrong(&mut history, &check(61, 62), &[], &all);
        history.sidecars[0].acked("second", at(63), 9, 0);
        assert_wrong(&mut history, &check(64, 65), &[ALLOWED], &[denied()]);

        // The same with the first acks on disk.
        for ack in &mut history.sidecars[0].acks {
            ack.durable = ack.applied;
        }
        assert_wrong(&mut history, &check(42, 43), &[denied()], &[ALLOWED]);
        assert_wrong(&mut history, &check(61, 62), &[ALLOWED], &[denied()]);
    }

    #[test]
    fn a_keyring_that_nobody_confirms_must_be_denied_from_its_limit_on() {
        let all = [ALLOWED, denied(), failed()];
        let mut history = history();
        history.credentials[0].ended = None;
        history.limits.deny_after = at(10);
        history.sidecars[0].cut = vec![Cut {
            from: at(22),
            healed: Some(at(45)),
            recovered: Some(at(60)),
        }];
        assert_wrong(&mut history, &check(29, 30), &[denied()], &[ALLOWED]);
        assert_wrong(&mut history, &check(30, 31), &[], &all);
        assert_wrong(&mut history, &check(33, 34), &[], &all);
        assert_wrong(
            &mut history,
            &check(34, 35),
            &[ALLOWED],
            &[denied(), failed()],
        );
        assert_wrong(&mut history, &check(44, 46), &[], &all);
        assert_wrong(&mut history, &check(50, 51), &[], &all);
        assert_wrong(&mut history, &check(61, 62), &[denied()], &[ALLOWED]);
    }
}
