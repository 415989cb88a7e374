//! The operating system's random source.

/// A failure of the operating system's random source.
#[derive(Clone, Copy, Debug, thiserror::Error)]
#[error("the operating system's random source failed: {0}")]
pub struct RandomError(getrandom::Error);

/// Fills `bytes` from the operating system's random source. Fails only if that source fails.
#[expect(
    clippy::disallowed_methods,
    reason = "this is the home of random secrets and ids"
)]
pub(crate) fn fill_random(bytes: &mut [u8]) -> Result<(), RandomError> {
    getrandom::fill(bytes).map_err(RandomError)
}
