//! The beats of a sidecar: when each was sent that is not answered, and how often the next one is due.

use std::{collections::VecDeque, time::Duration};

use crate::{clock::Reading, proto::discovery};

/// The beats of one process.
#[derive(Debug)]
pub(super) struct Beats {
    /// Of the last beat, over all streams.
    number: u64,
    /// The beats of the open stream that can still be answered, the oldest first.
    unanswered: VecDeque<Sent>,
    every: Duration,
}

#[derive(Clone, Copy, Debug)]
struct Sent {
    number: u64,
    at: Reading,
}

/// Beats that wait for an answer. One answers all before it, and a stream without answers is left after three pauses, so
/// that more are sent only in a burst of snapshots; then the oldest are forgotten, and the answers to the newer ones count.
const MAX_UNANSWERED: usize = 64;
/// Before the first answer.
const DEFAULT_EVERY: Duration = Duration::from_secs(5);
/// A control plane that asks for less is wrong: beats would be the main traffic. The longest is that of its settings.
const EVERY_BOUNDS: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(30));

impl Beats {
    pub(super) const fn new() -> Self {
        Self {
            number: 0,
            unanswered: VecDeque::new(),
            every: DEFAULT_EVERY,
        }
    }

    /// The next beat, which is sent at `now`.
    pub(super) fn send(&mut self, now: Reading) -> discovery::Beat {
        self.number += 1;
        if self.unanswered.len() == MAX_UNANSWERED {
            self.unanswered.pop_front();
        }
        self.unanswered.push_back(Sent {
            number: self.number,
            at: now,
        });
        discovery::Beat {
            number: self.number,
        }
    }

    /// When the beat was sent that is answered; none when a newer one was answered before, or it is not known. The answer
    /// speaks for all beats before it.
    pub(super) fn answered(&mut self, number: u64) -> Option<Reading> {
        let at = self
            .unanswered
            .iter()
            .position(|sent| sent.number == number)?;
        self.unanswered.drain(..=at).next_back().map(|sent| sent.at)
    }

    /// The stream has ended: what was asked there is not answered any more.
    pub(super) fn disconnected(&mut self) {
        self.unanswered.clear();
    }

    /// The pause between two beats.
    pub(super) const fn every(&self) -> Duration {
        self.every
    }

    /// Takes the pause that the control plane asks for, within bounds.
    pub(super) fn pace(&mut self, every: Duration) {
        let (shortest, longest) = EVERY_BOUNDS;
        self.every = every.clamp(shortest, longest);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{clock::Clock, key::Timestamp};

    #[test]
    fn an_answer_speaks_for_its_beat_and_those_before_it_once() {
        let (clock, hands) = Clock::manual(Timestamp::from_millis(1_000));
        let mut beats = Beats::new();
        let mut sent = Vec::new();
        for number in 1..=4 {
            hands.advance(Duration::from_secs(1));
            sent.push(clock.reading());
            assert_eq!(beats.send(clock.reading()).number, number);
        }
        assert_eq!(beats.answered(2), Some(sent[1]));
        assert_eq!(beats.answered(2), None);
        assert_eq!(beats.answered(1), None);
        assert_eq!(beats.answered(5), None, "nobody has asked so");
        assert_eq!(beats.answered(4), Some(sent[3]));
        assert_eq!(beats.send(clock.reading()).number, 5);
        beats.disconnected();
        assert_eq!(beats.answered(5), None, "it is of another stream");
        assert_eq!(beats.send(clock.reading()).number, 6);
        assert_eq!(beats.answered(6), Some(clock.reading()));
    }

    #[test]
    fn beats_that_nobody_answers_are_bounded() {
        let (clock, _) = Clock::manual(Timestamp::from_millis(1_000));
        let mut beats = Beats::new();
        for _ in 0..10_000 {
            beats.send(clock.reading());
        }
        assert_eq!(beats.unanswered.len(), MAX_UNANSWERED);
        assert_eq!(beats.answered(10_000), Some(clock.reading()));
    }

    #[test]
    fn a_pause_beyond_all_bounds_is_not_taken() {
        let mut beats = Beats::new();
        for (asked, taken) in [
            (Duration::ZERO, EVERY_BOUNDS.0),
            (Duration::from_secs(7), Duration::from_secs(7)),
            (Duration::MAX, EVERY_BOUNDS.1),
        ] {
            beats.pace(asked);
            assert_eq!(beats.every(), taken);
        }
    }
}
