//! The beats of a sidecar: the send times of the unanswered ones, and the pause between two.

use std::{collections::VecDeque, time::Duration};

use crate::{clock::Reading, proto::discovery};

/// The beats of one process.
#[derive(Debug)]
pub(super) struct Beats {
    /// The number of the last beat, counted over all streams.
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

/// The most beats that wait for an answer. One answer covers all beats before it, and the sidecar
/// leaves a stream that is silent for three pauses, but at least 15 s. So more wait only in a burst
/// of snapshots, or at a pause below a quarter of a second. Then the oldest are forgotten, and the
/// answers to the newer ones count.
const MAX_UNANSWERED: usize = 64;
/// The pause before the first answer.
const DEFAULT_EVERY: Duration = Duration::from_secs(5);
/// The bounds of the pause. A control plane that asks for less is wrong: beats would be the main
/// traffic. The longest is the longest heartbeat of a control plane's settings.
const EVERY_BOUNDS: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(30));

impl Beats {
    pub(super) const fn new() -> Self {
        Self {
            number: 0,
            unanswered: VecDeque::new(),
            every: DEFAULT_EVERY,
        }
    }

    /// Returns the next beat, which is sent at `now`.
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

    /// Returns the number of the last beat; 0 before the first one.
    pub(super) const fn last(&self) -> u64 {
        self.number
    }

    /// Returns when the answered beat was sent; none if a newer one was answered before, or the
    /// number is unknown. The answer covers all beats before it, too.
    pub(super) fn answered(&mut self, number: u64) -> Option<Reading> {
        let at = self
            .unanswered
            .iter()
            .position(|sent| sent.number == number)?;
        self.unanswered.drain(..=at).next_back().map(|sent| sent.at)
    }

    /// Notes that the stream has ended: its beats are not answered any more.
    pub(super) fn disconnected(&mut self) {
        self.unanswered.clear();
    }

    /// Returns the pause between two beats.
    pub(super) const fn every(&self) -> Duration {
        self.every
    }

    /// Sets the pause that the control plane asks for, within [`EVERY_BOUNDS`].
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
        assert_eq!(beats.answered(5), None, "no such beat was sent");
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
