//! Waiting for something to become true, with a deadline.

use std::{future::Future, time::Duration};

/// How long a test waits before it fails. On a machine that is busy with other things a test may run twenty times as long as
/// alone, and only a failing test ever waits this long.
pub(crate) const DEADLINE: Duration = Duration::from_mins(2);

/// The pause between two looks: short beside a test, long enough to leave the processor to what is waited for.
const PAUSE: Duration = Duration::from_millis(10);

/// Asks `look` until it answers with something; `what` says in the panic what never came.
pub(crate) async fn eventually<T>(what: &str, look: impl AsyncFnMut() -> Option<T>) -> T {
    eventually_within(DEADLINE, what, look).await
}

/// As [`eventually`], with another deadline.
pub(crate) async fn eventually_within<T>(
    deadline: Duration,
    what: &str,
    mut look: impl AsyncFnMut() -> Option<T>,
) -> T {
    let found = async {
        loop {
            if let Some(found) = look().await {
                return found;
            }
            tokio::time::sleep(PAUSE).await;
        }
    };
    within(deadline, what, found).await
}

/// The output of `future`, which has `deadline` to come.
pub(crate) async fn within<T>(
    deadline: Duration,
    what: &str,
    future: impl Future<Output = T>,
) -> T {
    tokio::time::timeout(deadline, future)
        .await
        .unwrap_or_else(|_elapsed| panic!("waited {deadline:?} in vain: {what}"))
}

#[tokio::test]
async fn eventually_asks_until_there_is_an_answer() {
    let mut looks = 0;
    let answer = eventually("the third look", async || {
        looks += 1;
        (looks == 3).then_some(looks)
    });
    assert_eq!(answer.await, 3);
}

#[tokio::test]
#[should_panic(expected = "in vain: the impossible")]
async fn eventually_gives_up_at_its_deadline() {
    let deadline = Duration::from_millis(30);
    eventually_within(deadline, "the impossible", async || None::<()>).await;
}
