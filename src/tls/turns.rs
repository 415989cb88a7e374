//! A limit on the handshakes in progress, which slow handshakes cannot exhaust.
//!
//! A handshake needs milliseconds. If there are too many, the oldest is cancelled for the newest. A
//! stranger who opens connections and sends nothing therefore blocks other clients no longer than
//! the opening of another such set of connections lasts.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
};

use tokio_util::sync::CancellationToken;

/// The handshakes in progress; cheap to clone.
#[derive(Clone, Debug)]
pub(super) struct Turns {
    max: usize,
    /// The oldest handshake comes first.
    waiting: Arc<Mutex<VecDeque<CancellationToken>>>,
}

/// One handshake in progress.
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

    /// Adds a handshake, and cancels the oldest if there are too many.
    pub(super) fn begin(&self) -> Turn {
        let given_up = CancellationToken::new();
        let mut waiting = self.lock();
        // The handshakes that have ended.
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
    /// Returns when this handshake is cancelled for a newer one.
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
