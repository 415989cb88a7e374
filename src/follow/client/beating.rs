//! Decides when the next beat of a stream is due, and when the sidecar leaves a silent stream.

use std::time::Duration;

use tokio::time::{Interval, MissedTickBehavior, interval};

use crate::clock::{Clock, Steps};

/// The beats of an open stream.
#[derive(Debug)]
pub(super) struct Beating {
    next: Interval,
    silence: Interval,
    steps: Steps,
    is_due: bool,
}

/// The result of a wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Turn {
    /// A beat is due.
    Due,
    /// No beat was answered for too long.
    Silent,
}

/// The pauses without an answer after which the sidecar leaves the stream, within
/// [`SILENCE_BOUNDS`].
const MISSED: u32 = 3;
/// The bounds of the time without an answer. A store that is busy for some seconds is no reason to
/// leave, and the sidecar leaves a silent control plane well before `deny_after`.
const SILENCE_BOUNDS: (Duration, Duration) = (Duration::from_secs(15), Duration::from_secs(90));

impl Beating {
    /// Returns the beats of a stream whose first beat was just sent. The pause between two is
    /// `every`.
    pub(super) fn new(clock: &Clock, every: Duration) -> Self {
        Self {
            next: ticking(every),
            silence: ticking(silence(every)),
            steps: clock.steps(),
            is_due: false,
        }
    }

    /// Returns whether a beat is to be sent.
    pub(super) const fn is_due(&self) -> bool {
        self.is_due
    }

    /// Makes the next beat due at once.
    pub(super) const fn hurry(&mut self) {
        self.is_due = true;
    }

    /// Notes that a beat was sent.
    pub(super) fn sent(&mut self) {
        self.is_due = false;
        self.next.reset();
    }

    /// Notes that a beat was answered, and sets the pause between two to `every`.
    pub(super) fn answered(&mut self, every: Duration) {
        if every != self.next.period() {
            self.next = ticking(every);
        }
        self.silence = ticking(silence(every));
    }

    /// Waits until the next beat is due, after the pause or a step of the wall clock, or until no
    /// beat was answered for too long. Nothing is lost if this is cancelled.
    pub(super) async fn turn(&mut self) -> Turn {
        tokio::select! {
            _ = self.next.tick() => {}
            () = self.steps.next() => {}
            _ = self.silence.tick() => return Turn::Silent,
        }
        self.is_due = true;
        Turn::Due
    }
}

fn silence(every: Duration) -> Duration {
    let (shortest, longest) = SILENCE_BOUNDS;
    (MISSED * every).clamp(shortest, longest)
}

/// Returns ticks after each `period`; the first comes after one period.
fn ticking(period: Duration) -> Interval {
    let mut ticks = interval(period);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    ticks.reset();
    ticks
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;
    use tokio::time::advance;

    use super::*;
    use crate::key::Timestamp;

    const EVERY: Duration = Duration::from_secs(4);

    fn beating() -> (Beating, crate::clock::ManualClock) {
        let (clock, hands) = Clock::manual(Timestamp::from_millis(5_000));
        (Beating::new(&clock, EVERY), hands)
    }

    fn turn(beating: &mut Beating) -> Option<Turn> {
        beating.turn().now_or_never()
    }

    #[tokio::test(start_paused = true)]
    async fn a_beat_is_due_after_each_pause() {
        let (mut beating, _hands) = beating();
        assert_eq!(turn(&mut beating), None);
        for _ in 0..3 {
            advance(EVERY).await;
            assert!(!beating.is_due());
            assert_eq!(turn(&mut beating), Some(Turn::Due));
            assert!(beating.is_due());
            beating.sent();
            beating.answered(EVERY);
        }
        beating.answered(EVERY / 2);
        advance(EVERY / 2).await;
        assert_eq!(turn(&mut beating), Some(Turn::Due));
    }

    #[tokio::test(start_paused = true)]
    async fn a_step_of_the_wall_clock_makes_the_next_beat_due_at_once() {
        let (mut beating, hands) = beating();
        hands.advance(Duration::from_mins(1));
        assert_eq!(turn(&mut beating), None);
        hands.set_wall(Timestamp::from_millis(1_000));
        assert_eq!(turn(&mut beating), Some(Turn::Due));
        beating.sent();
        assert_eq!(turn(&mut beating), None);
    }

    #[tokio::test(start_paused = true)]
    async fn a_stream_without_answers_is_given_up() {
        let (mut beating, _hands) = beating();
        let began = tokio::time::Instant::now();
        while beating.turn().await == Turn::Due {
            beating.sent();
        }
        assert_eq!(began.elapsed(), SILENCE_BOUNDS.0, "not below");
        assert_eq!(silence(Duration::from_secs(10)), Duration::from_secs(30));
        assert_eq!(silence(Duration::from_mins(5)), SILENCE_BOUNDS.1);
        // Answers keep the stream.
        let kept = Beating::new(&Clock::manual(Timestamp::from_millis(0)).0, EVERY);
        let mut beating = kept;
        for _ in 0..20 {
            advance(EVERY).await;
            assert_eq!(beating.turn().await, Turn::Due);
            beating.sent();
            beating.answered(EVERY);
        }
    }
}
