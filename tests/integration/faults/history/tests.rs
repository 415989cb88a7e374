//! The judge finds what is planted at the edges of each rule.

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

fn life(from: u64, serves: u64, to: Option<u64>) -> Life {
    Life {
        from: at(from),
        serves: Some(at(serves)),
        well: Some(at(serves)),
        to: to.map(at),
    }
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
        lives: vec![life(0, 0, None)],
        ..SidecarPast::default()
    };
    acked(&mut sidecar, "boot", 20, 5, 0);
    acked(&mut sidecar, "boot", 60, 9, 0);
    let key = Credential {
        issued: Some(change(10, 5)),
        ended: Some(change(50, 9)),
        ..Credential::default()
    };
    History {
        credentials: vec![key, Credential::default()],
        sidecars: vec![sidecar],
        ..History::default()
    }
}

/// What is known of a process that is connected.
fn acked(past: &mut SidecarPast, boot: &str, seconds: u64, applied: u64, durable: u64) {
    past.hears_of(boot, at(seconds));
    past.acked(boot, at(seconds), applied, durable);
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
fn a_process_that_is_gone_or_stands_still_owes_no_answer_and_its_successor_only_what_was_on_disk() {
    let all = [ALLOWED, denied(), failed()];
    let mut history = history();
    history.sidecars[0].frozen = vec![Span {
        from: at(30),
        to: Some(at(35)),
    }];
    assert_wrong(&mut history, &check(29, 31), &[], &all);
    assert_wrong(&mut history, &check(36, 37), &[denied()], &[ALLOWED]);

    history.sidecars[0].lives = vec![life(0, 0, Some(40)), life(41, 42, None)];
    assert_wrong(&mut history, &check(39, 40), &[], &all);
    assert_wrong(&mut history, &check(42, 43), &[], &all);
    // What the first process had acked by then does not count for the second: 60 is told of the first.
    assert_wrong(&mut history, &check(61, 62), &[], &all);
    acked(&mut history.sidecars[0], "second", 63, 9, 0);
    assert_wrong(&mut history, &check(64, 65), &[ALLOWED], &[denied()]);

    // The same with the first acks on disk. Before it listens it owes no answer.
    for ack in &mut history.sidecars[0].acks {
        ack.durable = ack.applied;
    }
    assert_wrong(&mut history, &check(41, 43), &[], &all);
    assert_wrong(
        &mut history,
        &check(42, 43),
        &[denied(), failed()],
        &[ALLOWED],
    );
    assert_wrong(&mut history, &check(61, 62), &[ALLOWED], &[denied()]);
}

#[test]
fn what_is_known_of_a_process_that_is_gone_does_not_bind_the_next_one() {
    let mut history = history();
    history.sidecars[0].lives = vec![life(0, 0, Some(40)), life(41, 42, None)];
    let past = &mut history.sidecars[0];
    // It was never heard of while it lived, and is still connected as far as the control plane knows.
    past.hears_of("unheard", at(41));
    past.acked("unheard", at(43), 9, 0);
    // It is told of as lost.
    past.acked("unheard", at(44), 9, 0);
    let all = [ALLOWED, denied(), failed()];
    assert_wrong(&mut history, &check(45, 46), &[], &all);
    acked(&mut history.sidecars[0], "second", 47, 9, 0);
    history.credentials[0].ended = None;
    assert_wrong(&mut history, &check(48, 49), &[denied()], &[ALLOWED]);
}

#[test]
fn a_process_without_a_file_owes_nothing_before_it_was_answered_a_beat() {
    let all = [ALLOWED, denied(), failed()];
    let mut history = history();
    history.credentials[0].ended = None;
    history.sidecars[0].lives[0].well = Some(at(30));
    assert_wrong(&mut history, &check(28, 29), &[], &all);
    assert_wrong(&mut history, &check(31, 32), &[denied()], &[ALLOWED]);
    // It has allowed something by then.
    history.checks = vec![
        check(22, 23),
        Check {
            outcome: denied(),
            ..check(24, 25)
        },
    ];
    assert_eq!(history.judge().wrong.len(), 1);
}

#[test]
fn a_keyring_that_nobody_confirms_must_be_denied_from_its_limit_on() {
    let all = [ALLOWED, denied(), failed()];
    let mut history = history();
    history.credentials[0].ended = None;
    history.limits = Limits {
        deny_after: at(10),
        heartbeat: at(1),
    };
    history.sidecars[0].cut = vec![Cut {
        from: at(22),
        confirmed: at(22),
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

    // What it has held since 24 was last confirmed at 14; until then it was confirmed all the while.
    history.sidecars[0].cut[0].from = at(24);
    history.sidecars[0].cut[0].confirmed = at(14);
    assert_wrong(&mut history, &check(22, 23), &[denied()], &[ALLOWED]);
    assert_wrong(&mut history, &check(22, 24), &[], &all);
    assert_wrong(&mut history, &check(24, 26), &[], &all);
    let right = [denied(), failed()];
    assert_wrong(&mut history, &check(26, 27), &[ALLOWED], &right);
    history.sidecars[0].cut[0].from = at(30);
    assert_wrong(&mut history, &check(26, 27), &[denied()], &[ALLOWED]);
    assert_wrong(&mut history, &check(30, 31), &[ALLOWED], &right);
}

#[test]
fn a_file_may_say_what_it_said_before_the_process_recovered() {
    let all = [ALLOWED, denied(), failed()];
    let mut history = history();
    history.credentials[0].ended = None;
    history.limits = Limits {
        deny_after: at(10),
        heartbeat: at(3),
    };
    acked(&mut history.sidecars[0], "boot", 35, 9, 9);
    let cut = |from, recovered| Cut {
        from: at(from),
        confirmed: at(from),
        healed: recovered,
        recovered,
    };
    for (recovered, killed, is_stale_at_once) in [
        (36, Some(40), false),
        (37, Some(40), false),
        (38, Some(40), true),
        (39, Some(40), true),
        (39, None, false),
    ] {
        let sidecar = &mut history.sidecars[0];
        sidecar.cut = vec![cut(22, Some(at(recovered))), cut(40, None)];
        sidecar.lives = vec![life(0, 0, killed)];
        if killed.is_some() {
            sidecar.lives.push(life(40, 40, None));
        }
        if is_stale_at_once {
            assert_wrong(&mut history, &check(40, 41), &[], &all);
        } else {
            assert_wrong(&mut history, &check(40, 41), &[denied()], &[ALLOWED]);
            assert_wrong(&mut history, &check(46, 47), &[], &all);
        }
        assert_wrong(&mut history, &check(52, 53), &[ALLOWED], &[denied()]);
    }

    // The link is whole as it begins: it is stale until it is answered.
    for (recovered, is_stale_at_once) in [(37, false), (38, true)] {
        let sidecar = &mut history.sidecars[0];
        sidecar.cut = vec![cut(22, Some(at(recovered)))];
        sidecar.lives = vec![life(0, 0, Some(40)), life(40, 40, None)];
        sidecar.lives[1].well = Some(at(44));
        if is_stale_at_once {
            assert_wrong(&mut history, &check(41, 42), &[], &all);
        } else {
            assert_wrong(&mut history, &check(41, 42), &[denied()], &[ALLOWED]);
        }
        assert_wrong(&mut history, &check(45, 46), &[denied()], &[ALLOWED]);
    }
}

#[test]
fn what_a_process_owed_is_told_for_each_apart() {
    let mut history = history();
    history.credentials[0].gone = Some(at(70));
    history.sidecars.push(SidecarPast::default());
    history.checks = [(21, 22), (48, 49), (55, 56), (69, 71), (70, 71)]
        .map(|(sent, answered)| check(sent, answered))
        .to_vec();
    let owed = history.owed(0, at(0));
    assert_eq!((owed.allowed, owed.gone), (2, 1));
    let owed = history.owed(0, at(22));
    assert_eq!((owed.allowed, owed.gone), (1, 1));
    let owed = history.owed(1, at(0));
    assert_eq!((owed.allowed, owed.gone), (0, 0));
}

#[test]
fn a_process_that_begins_with_a_file_owes_what_the_former_one_was_told_to_have_and_no_more() {
    let all = [ALLOWED, denied(), failed()];
    let mut history = history();
    // The key is on disk, its end is only applied, when the process ends at 70.
    let past = &mut history.sidecars[0];
    past.lives = vec![life(0, 0, Some(70)), life(71, 72, None)];
    acked(past, "boot", 65, 9, 5);
    assert!(!past.keeps(5), "that is of another life");
    assert_wrong(&mut history, &check(75, 76), &[], &all);

    // Its end, too; that it was is heard of at 80.
    acked(&mut history.sidecars[0], "boot", 80, 9, 9);
    assert_wrong(&mut history, &check(75, 76), &[], &all);
    assert_wrong(
        &mut history,
        &check(81, 82),
        &[ALLOWED],
        &[denied(), failed()],
    );

    // A process that stood no more when the question came owes nothing; what it has on disk binds the next one alone.
    history.credentials[0].ended = None;
    assert_wrong(&mut history, &check(69, 70), &[], &all);
    assert_wrong(&mut history, &check(69, 73), &[], &all);
    assert_wrong(
        &mut history,
        &check(72, 73),
        &[denied(), failed()],
        &[ALLOWED],
    );
    acked(&mut history.sidecars[0], "next", 83, 9, 8);
    assert!(history.sidecars[0].keeps(8) && !history.sidecars[0].keeps(9));
}

#[test]
fn a_version_that_was_handed_out_must_be_allowed_wherever_the_one_before_was() {
    let all = [ALLOWED, denied(), failed()];
    let mut history = history();
    history.credentials[0].ended = None;
    // Handed out at 70. The process is cut off, and nothing is known of it.
    history.credentials[1] = Credential {
        issued: Some(change(65, 11)),
        handed_over: Some(HandOver { at: at(70), old: 0 }),
        ..Credential::default()
    };
    let old = |sent, answered| Check {
        outcome: ALLOWED,
        ..check(sent, answered)
    };
    let new = |sent, answered, outcome| Check {
        credential: 1,
        outcome,
        ..check(sent, answered)
    };
    let wrong = |history: &mut History, checks: &[Check]| {
        history.checks = checks.to_vec();
        history.judge().wrong.len()
    };
    assert_eq!(
        wrong(&mut history, &[old(61, 62), new(70, 71, denied())]),
        1
    );
    assert_eq!(
        wrong(&mut history, &[old(61, 62), new(70, 71, failed())]),
        1
    );
    assert_eq!(wrong(&mut history, &[old(61, 62), new(70, 71, ALLOWED)]), 0);
    assert_eq!(
        wrong(&mut history, &[old(61, 62), new(69, 71, denied())]),
        0
    );
    for outcome in all {
        // It is not known to have held the old one.
        assert_eq!(wrong(&mut history, &[new(70, 71, outcome.clone())]), 0);
        let late = [old(61, 72), new(72, 73, outcome)];
        assert_eq!(wrong(&mut history, &late), 0);
    }
    // Another process of the sidecar owes what it holds itself.
    history.sidecars[0].lives = vec![life(0, 0, Some(66)), life(67, 68, None)];
    assert_eq!(
        wrong(&mut history, &[old(61, 62), new(70, 71, denied())]),
        0
    );
    assert_eq!(
        wrong(&mut history, &[old(68, 69), new(70, 71, denied())]),
        1
    );
}

#[test]
fn a_version_whose_end_was_waited_for_must_be_denied_by_whatever_answers() {
    let mut history = history();
    history.credentials[0].ended = Some(change(70, 11));
    history.credentials[0].gone = Some(at(80));
    let all = [ALLOWED, denied(), failed()];
    assert_wrong(&mut history, &check(79, 81), &[], &all);
    let right = [denied(), failed()];
    assert_wrong(&mut history, &check(80, 81), &[ALLOWED], &right);
    history.sidecars[0].lives = vec![life(0, 0, Some(66)), life(83, 84, None)];
    assert_wrong(&mut history, &check(85, 86), &[ALLOWED], &right);
}

#[test]
fn no_key_of_a_flood_may_be_allowed() {
    let mut history = history();
    history.nobodys.asked = 1_000;
    let right = history.judge();
    assert_eq!((right.must_deny, right.wrong.len()), (1_000, 0));
    history.nobodys.allowed = 1;
    assert_eq!(history.judge().wrong.len(), 1);
}

#[test]
fn a_process_that_looks_no_more_keys_up_owes_those_that_it_has_found() {
    let mut history = history();
    history.credentials[0].ended = None;
    history.sidecars[0].crowded = vec![Span {
        from: at(30),
        to: Some(at(40)),
    }];
    let wrong = |history: &mut History, checks: [(Check, Outcome); 2]| {
        let checks = checks.map(|(check, outcome)| Check { outcome, ..check });
        history.checks = checks.to_vec();
        history.judge().wrong.len()
    };
    let unfound = [(check(31, 32), denied()), (check(39, 41), denied())];
    assert_eq!(wrong(&mut history, unfound), 0);
    let after = [(check(31, 32), denied()), (check(41, 42), denied())];
    assert_eq!(wrong(&mut history, after), 1);
    let found = [(check(21, 22), ALLOWED), (check(31, 32), denied())];
    assert_eq!(wrong(&mut history, found), 1);
    let too_late = [(check(31, 33), ALLOWED), (check(32, 34), denied())];
    assert_eq!(wrong(&mut history, too_late), 0);
}
