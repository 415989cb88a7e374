//! Conversions between the generated messages of the admin API and the values of commands.

use std::time::Duration;

use crate::{
    key::{KeyState, Lifetime, OnDeadline, Timestamp, rotation::Phase},
    proto::admin,
};

/// Reads a point in time of a message.
#[must_use]
pub(crate) fn timestamp(time: Option<prost_types::Timestamp>) -> Option<Timestamp> {
    time.map(|time| {
        let millis = time.seconds.saturating_mul(1_000);
        Timestamp::from_millis(millis.saturating_add(i64::from(time.nanos / 1_000_000)))
    })
}

/// Writes a point in time for a message.
#[must_use]
pub(crate) fn to_timestamp(time: Timestamp) -> prost_types::Timestamp {
    std::time::SystemTime::from(time).into()
}

/// Reads a duration of a message; none if it is negative.
#[must_use]
pub(crate) fn duration(duration: Option<prost_types::Duration>) -> Option<Duration> {
    duration.and_then(|duration| duration.try_into().ok())
}

/// Writes a duration for a message, at most [`MAX_DURATION`](super::value::MAX_DURATION).
#[must_use]
pub(crate) fn to_duration(duration: Duration) -> prost_types::Duration {
    duration
        .try_into()
        .expect("a duration on the command line has at most 100 years")
}

/// Writes the lifetime of a version for a message.
#[must_use]
pub(crate) fn to_lifetime(lifetime: Lifetime) -> admin::start_rotation_request::Lifetime {
    match lifetime {
        Lifetime::Limited(duration) => {
            admin::start_rotation_request::Lifetime::ExpiresIn(to_duration(duration))
        }
        Lifetime::Unlimited => admin::start_rotation_request::Lifetime::NeverExpires(true),
    }
}

/// The name of the state of a key; `unknown` for a state that only a newer control plane has.
#[must_use]
pub(crate) fn state(state: i32) -> String {
    match admin::KeyState::try_from(state) {
        Ok(admin::KeyState::Pending) => KeyState::Pending.to_string(),
        Ok(admin::KeyState::Active) => KeyState::Active.to_string(),
        Ok(admin::KeyState::Retiring) => KeyState::Retiring.to_string(),
        Ok(admin::KeyState::Retired) => KeyState::Retired.to_string(),
        Ok(admin::KeyState::Revoked) => KeyState::Revoked.to_string(),
        Ok(admin::KeyState::Unspecified) | Err(_) => "unknown".to_owned(),
    }
}

/// The name of the phase of a rotation; `unknown` for a phase that only a newer control plane has.
#[must_use]
pub(crate) fn phase(phase: i32) -> String {
    let phase = match admin::RotationPhase::try_from(phase) {
        Ok(admin::RotationPhase::Stage) => Phase::Stage,
        Ok(admin::RotationPhase::Overlap) => Phase::Overlap,
        Ok(admin::RotationPhase::Drain) => Phase::Drain,
        Ok(admin::RotationPhase::Held) => Phase::Held,
        Ok(admin::RotationPhase::SecretLost) => Phase::SecretLost,
        Ok(admin::RotationPhase::Unspecified) | Err(_) => return "unknown".to_owned(),
    };
    phase.as_str().to_owned()
}

/// Reads the action of a policy at a deadline; none if the message has none, or one that only a newer control plane has.
#[must_use]
pub(crate) fn on_deadline(answer: i32) -> Option<OnDeadline> {
    match admin::OnDeadline::try_from(answer) {
        Ok(admin::OnDeadline::Retire) => Some(OnDeadline::Retire),
        Ok(admin::OnDeadline::Extend) => Some(OnDeadline::Extend),
        Ok(admin::OnDeadline::Hold) => Some(OnDeadline::Hold),
        Ok(admin::OnDeadline::Unspecified) | Err(_) => None,
    }
}

/// Writes the action of a policy at a deadline for a message.
#[must_use]
pub(crate) fn to_on_deadline(answer: Option<OnDeadline>) -> i32 {
    match answer {
        Some(OnDeadline::Retire) => admin::OnDeadline::Retire,
        Some(OnDeadline::Extend) => admin::OnDeadline::Extend,
        Some(OnDeadline::Hold) => admin::OnDeadline::Hold,
        None => admin::OnDeadline::Unspecified,
    }
    .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_survive_the_wire() {
        let time = Timestamp::from_millis(1_798_761_600_250);
        assert_eq!(timestamp(Some(to_timestamp(time))), Some(time));
        assert_eq!(timestamp(None), None);
        let extreme = prost_types::Timestamp {
            seconds: i64::MAX,
            nanos: 999_999_999,
        };
        assert_eq!(
            timestamp(Some(extreme)).map(|time| time.to_string()),
            Some("9999-12-31T23:59:59.999Z".to_owned())
        );
    }

    #[test]
    fn durations_survive_the_wire() {
        let longest = super::super::value::MAX_DURATION;
        assert_eq!(duration(Some(to_duration(longest))), Some(longest));
        let negative = prost_types::Duration {
            seconds: -1,
            nanos: 0,
        };
        assert_eq!(duration(Some(negative)), None);
    }

    #[test]
    fn what_only_a_newer_control_plane_knows_is_unknown() {
        assert_eq!(state(admin::KeyState::Retiring as i32), "retiring");
        assert_eq!(state(99), "unknown");
        assert_eq!(phase(admin::RotationPhase::Drain as i32), "drain");
        assert_eq!(phase(99), "unknown");
        assert_eq!(on_deadline(99), None);
    }

    #[test]
    fn answers_to_a_deadline_survive_the_wire() {
        for answer in [OnDeadline::Retire, OnDeadline::Extend, OnDeadline::Hold] {
            assert_eq!(on_deadline(to_on_deadline(Some(answer))), Some(answer));
        }
        assert_eq!(on_deadline(to_on_deadline(None)), None);
    }
}
