//! The times at which the control plane sent its answers to beats. They show until when a report
//! that replies to an answer is complete.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use crate::{control::pace::Pace, key::Timestamp};

/// The answers of one stream, shared by their sender and the receiver of the replies.
#[derive(Clone, Debug)]
pub(crate) struct Answers {
    pace: Arc<Pace>,
    /// The number of the beat and the time of the sending, the oldest first.
    sent: Arc<Mutex<VecDeque<(u64, Timestamp)>>>,
}

/// The most answers to which a reply may still come. A sidecar replies immediately, or not at all
/// while its previous report is on its way: older answers are of no use.
const MAX_ANSWERS: usize = 64;
/// How long before the sending of its answer a report is complete. A check takes microseconds from
/// its request to its count. Within a second, only a thread that gets no processor is late with its
/// count. Compared with the hours for which versions have to be idle, a second delays nothing. The
/// next report contains a late use, at the time of that report.
const MARGIN: Duration = Duration::from_secs(1);

impl Answers {
    /// Creates an empty list; `pace` dates the answers.
    #[must_use]
    pub(crate) fn new(pace: Arc<Pace>) -> Self {
        Self {
            pace,
            sent: Arc::default(),
        }
    }

    /// Records that the answer to a beat is about to be sent.
    pub(crate) fn sending(&self, beat: u64) {
        let now = self.pace.now();
        let mut sent = self.lock();
        if sent.len() == MAX_ANSWERS {
            sent.pop_front();
        }
        sent.push_back((beat, now));
    }

    /// Returns until when a report that replies to the answer to `beat` is complete. None when no
    /// such answer is known.
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
