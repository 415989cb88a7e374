//! Compares the state of a keyring in the answer to a beat with the held state.

use std::cmp::Ordering;

use super::Leave;
use crate::{
    key::{Epoch, KeyringName, Revision},
    keyring::{KeyringPosition, Slot},
    proto::discovery::{self, ResyncReason},
};

/// Returns why the keyring has to come anew; none if it is at the same revision of the same
/// history.
///
/// # Errors
///
/// When the control plane is behind this sidecar.
pub(super) fn reason_to_resync(
    keyring: &KeyringName,
    held: KeyringPosition,
    pulse: &discovery::KeyringPulse,
) -> Result<Option<ResyncReason>, Leave> {
    if held.epoch != Epoch::new(pulse.epoch) {
        return Ok(Some(ResyncReason::Epoch));
    }
    let found = Revision::new(pulse.revision);
    match found.cmp(&held.revision) {
        Ordering::Less => Err(Leave::Lagging {
            keyring: keyring.clone(),
            held: held.revision,
            found,
        }),
        Ordering::Equal => Ok(None),
        Ordering::Greater => Ok(Some(ResyncReason::Gap)),
    }
}

/// Returns the time for which a keyring may go without a confirmation, in milliseconds, as the
/// control plane receives it.
pub(super) fn deny_after_ms(slot: &Slot) -> u64 {
    let limit = slot.staleness().deny_after.as_millis();
    u64::try_from(limit).unwrap_or(u64::MAX)
}
