//! When the control plane sent its answers to beats, so that a report which replies to one says until when it is complete.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use crate::{control::pace::Pace, key::Timestamp};

/// The answers of one stream; shared by who sends them and who hears the replies.
#[derive(Clone, Debug)]
pub(crate) struct Answers {
    pace: Arc<Pace>,
    /// Of the beat, and of the sending; the oldest first.
    sent: Arc<Mutex<VecDeque<(u64, Timestamp)>>>,
}

/// Answers to which a reply may still come. A sidecar replies at once, or not at all while its former report is on its way,
/// so that older ones are of no use.
const MAX_ANSWERS: usize = 64;
/// A check takes microseconds from its request to its count. A second is so much more that only a thread which gets no
/// processor for as long is counted late, and so little beside the hours for which versions have to be idle that it delays
/// nothing. The next report has such a use, as one at the time of that report.
const MARGIN: Duration = Duration::from_secs(1);

impl Answers {
    /// None yet; they are dated by `pace`.
    #[must_use]
    pub(crate) fn new(pace: Arc<Pace>) -> Self {
        Self {
            pace,
            sent: Arc::default(),
        }
    }

    /// The answer to a beat is about to be sent.
    pub(crate) fn sending(&self, beat: u64) {
        let now = self.pace.now();
        let mut sent = self.lock();
        if sent.len() == MAX_ANSWERS {
            sent.pop_front();
        }
        sent.push_back((beat, now));
    }

    /// Until when a report is complete that replies to the answer to `beat`; none when no such answer is known.
    pub(super) fn complete_until(&self, beat: u64) -> Option<Timestamp> {
        let sent = self.lock();
        let (_, at) = sent.iter().find(|(answered, _)| *answered == beat)?;
        Some(at.saturating_sub(MARGIN))
    }

    fn lock(&self) -> MutexGuard<'_, VecDeque<(u64, Timestamp)>> {
        self.sent.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Clock;

    #[test]
    fn a_report_is_complete_until_a_second_before_the_sending_of_its_answer() {
        let (clock, hands) = Clock::manual(Timestamp::from_millis(1_000_000));
        let answers = Answers::new(Arc::new(Pace::new(clock)));
        assert_eq!(answers.complete_until(1), None);
        answers.sending(7);
        hands.advance(Duration::from_secs(5));
        answers.sending(9);
        hands.advance(Duration::from_hours(1));
        let until = |beat| answers.complete_until(beat).map(Timestamp::as_millis);
        assert_eq!(until(7), Some(999_000));
        assert_eq!(until(9), Some(1_004_000));
        assert_eq!(until(8), None, "it was not answered");
        for beat in 10..10_000 {
            answers.sending(beat);
        }
        assert_eq!(answers.lock().len(), MAX_ANSWERS);
        assert_eq!(until(9), None);
    }
}
