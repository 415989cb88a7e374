//! How many handshakes are under way: a bound that slow ones do not use up.
//!
//! A handshake takes milliseconds. Where there are too many, the oldest is given up for the newest, so that somebody
//! who opens connections and says nothing keeps nobody out for longer than it takes to open as many again.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
};

use tokio_util::sync::CancellationToken;

/// The handshakes that are under way; cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Turns {
    max: usize,
    /// The oldest first.
    waiting: Arc<Mutex<VecDeque<CancellationToken>>>,
}

/// One of them.
#[derive(Debug)]
pub(super) struct Turn {
    turns: Turns,
    given_up: CancellationToken,
}

impl Turns {
    pub(super) fn new(max: usize) -> Self {
        Self {
            max,
            waiting: Arc::default(),
        }
    }

    /// One more, for which the oldest is given up when there are too many.
    pub(super) fn begin(&self) -> Turn {
        let given_up = CancellationToken::new();
        let mut waiting = self.lock();
        // Those that ended on their own.
        waiting.retain(|other| !other.is_cancelled());
        if waiting.len() >= self.max
            && let Some(oldest) = waiting.pop_front()
        {
            oldest.cancel();
        }
        waiting.push_back(given_up.clone());
        drop(waiting);
        Turn {
            turns: self.clone(),
            given_up,
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, VecDeque<CancellationToken>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Turn {
    /// Ends when it is given up for another.
    pub(super) async fn given_up(&self) {
        self.given_up.cancelled().await;
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.given_up.cancel();
        self.turns.lock().retain(|other| !other.is_cancelled());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_makes_room_for_the_newest() {
        let turns = Turns::new(2);
        let (first, second) = (turns.begin(), turns.begin());
        assert!(!first.given_up.is_cancelled());
        let third = turns.begin();
        assert!(first.given_up.is_cancelled());
        assert!(!second.given_up.is_cancelled() && !third.given_up.is_cancelled());
    }

    #[test]
    fn those_that_have_ended_are_not_counted() {
        let turns = Turns::new(2);
        let first = turns.begin();
        for _ in 0..10 {
            drop(turns.begin());
        }
        let second = turns.begin();
        assert!(!first.given_up.is_cancelled() && !second.given_up.is_cancelled());
        assert_eq!(turns.lock().len(), 2);
    }
}
