//! The result of an attempt to deliver an event, and what follows from it.

use std::time::Duration;

use http::{HeaderMap, StatusCode, header::RETRY_AFTER};

use crate::{
    causes,
    key::Timestamp,
    outbound::{OutboundError, UrlError},
    printable,
    store::{Delivery, Settled, Settlement},
    wire::backoff::drawn,
};

/// The result of an attempt.
#[derive(Debug)]
pub(crate) enum DeliveryOutcome {
    /// The endpoint answered.
    Answered {
        /// The HTTP status of the answer.
        status: StatusCode,
        /// The wait that the endpoint asks for, with status 429 or 503 only.
        retry_after: Option<Duration>,
    },
    /// No answer arrived.
    Failed(OutboundError),
    /// The webhook's URL cannot be used.
    Unusable(UrlError),
    /// The webhook no longer exists.
    Removed,
    /// This control plane has not read the webhook's definition yet.
    Behind,
}

/// The range of the first wait: most failures are a restart or a lost packet.
const FIRST: Duration = Duration::from_secs(5);
/// The largest range, and the longest wait that an endpoint may ask for: an endpoint that works
/// again receives its events within an hour.
const MAX: Duration = Duration::from_hours(1);
/// The most attempts. With the waits above, three days take about half as many; the limit is for a
/// clock that does not move.
pub(crate) const MAX_ATTEMPTS: u32 = 200;
/// The age at which the delivery of an event is given up: its news is old by then, and `webhook
/// deliveries`, a log line and a metric have reported the problem.
pub(crate) const MAX_AGE: Duration = Duration::from_hours(72);
/// The longest stored error, in bytes: one line.
const MAX_ERROR: usize = 300;

impl DeliveryOutcome {
    /// Interprets an answer.
    #[must_use]
    pub(crate) fn answered(status: StatusCode, headers: &HeaderMap, now: Timestamp) -> Self {
        let says_when = matches!(
            status,
            StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE
        );
        Self::Answered {
            status,
            retry_after: says_when.then(|| retry_after(headers, now)).flatten(),
        }
    }

    /// Returns the status of the answer, if there was one.
    #[must_use]
    pub(crate) fn status(&self) -> Option<StatusCode> {
        match self {
            Self::Answered { status, .. } => Some(*status),
            Self::Failed(_) | Self::Unusable(_) | Self::Removed | Self::Behind => None,
        }
    }

    /// Returns the error, in one short line without any text of the endpoint. None when the
    /// endpoint accepted the event.
    #[must_use]
    pub(crate) fn error(&self) -> Option<String> {
        let mut text = match self {
            Self::Answered { status, .. } if status.is_success() => return None,
            Self::Answered { status, .. } => format!("answered with status {}", status.as_u16()),
            Self::Failed(error) => causes::in_one_line(error),
            Self::Unusable(error) => format!("the webhook's URL is {error}"),
            Self::Removed => "the webhook was removed".to_owned(),
            Self::Behind => {
                "this control plane has not read the webhook from the store yet".to_owned()
            }
        };
        text.retain(|c| !printable::is_unsafe(c));
        text.truncate(text.floor_char_boundary(MAX_ERROR));
        Some(text)
    }

    /// Returns the next state of a delivery whose attempt ended at `now`; `random` is uniform.
    #[must_use]
    pub(crate) fn settle(&self, delivery: &Delivery, now: Timestamp, random: u32) -> Settlement {
        Settlement {
            webhook: delivery.what.webhook.clone(),
            event: delivery.what.event.clone(),
            attempts: delivery.attempts,
            at: now,
            state: self.follows(delivery, now, random),
            status: self.status().map(|status| status.as_u16()),
            error: self.error(),
        }
    }

    fn follows(&self, delivery: &Delivery, now: Timestamp, random: u32) -> Settled {
        let at_least = match self {
            Self::Answered { status, .. } if status.is_success() => return Settled::Delivered,
            // The endpoint states that it is gone for good.
            Self::Answered {
                status: StatusCode::GONE,
                ..
            }
            | Self::Removed => return Settled::GivenUp,
            Self::Answered { retry_after, .. } => *retry_after,
            Self::Failed(_) | Self::Unusable(_) | Self::Behind => None,
        };
        let wait = wait(delivery.attempts, random).max(at_least.unwrap_or_default());
        let next = now.saturating_add(wait.min(MAX));
        let too_old = next >= delivery.what.created_at.saturating_add(MAX_AGE);
        if delivery.attempts >= MAX_ATTEMPTS || too_old {
            Settled::GivenUp
        } else {
            Settled::Retry(next)
        }
    }
}

/// Returns the wait after the given number of attempts: drawn from the whole of a range that
/// doubles with each.
fn wait(attempts: u32, random: u32) -> Duration {
    let doubled = 1_u32
        .checked_shl(attempts.saturating_sub(1))
        .unwrap_or(u32::MAX);
    drawn(FIRST.saturating_mul(doubled).min(MAX), random)
}

/// Reads `Retry-After` (RFC 9110, section 10.2.3): seconds, or a date.
fn retry_after(headers: &HeaderMap, now: Timestamp) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = httpdate::parse_http_date(text).ok()?;
    Some(Timestamp::from(date).saturating_since(now))
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;
    use crate::{
        key::{Revision, testing},
        store::{DeliveryState, NewDelivery},
    };

    const NOW: Timestamp = Timestamp::from_millis(1_800_000_000_000);

    fn delivery(attempts: u32) -> Delivery {
        Delivery {
            what: NewDelivery {
                webhook: "7Qm2Xc91TbKe".into(),
                event: "payments-1-2".into(),
                keyring: testing::keyring_name(),
                revision: Revision::new(2),
                kind: "key.revoked".into(),
                body: "{}".into(),
                created_at: NOW,
            },
            state: DeliveryState::Waiting,
            attempts,
            next_attempt_at: NOW,
            settled_at: None,
            last_status: None,
            last_error: None,
        }
    }

    fn answered(status: u16, retry_after: Option<&'static str>) -> DeliveryOutcome {
        let mut headers = HeaderMap::new();
        headers.extend(retry_after.map(|text| (RETRY_AFTER, HeaderValue::from_static(text))));
        let status = StatusCode::from_u16(status).expect("a status");
        DeliveryOutcome::answered(status, &headers, NOW)
    }

    /// Returns the wait in seconds; none when no attempt follows.
    fn waits(outcome: &DeliveryOutcome, attempts: u32) -> Option<u64> {
        match outcome.follows(&delivery(attempts), NOW, u32::MAX) {
            Settled::Retry(next) => Some(next.saturating_since(NOW).as_secs()),
            Settled::Delivered | Settled::GivenUp => None,
        }
    }

    #[test]
    fn the_range_doubles_up_to_an_hour_and_ends() {
        let waits: Vec<_> = (1..=MAX_ATTEMPTS)
            .map(|attempts| waits(&answered(500, None), attempts))
            .collect();
        let expected = [
            5, 10, 20, 40, 80, 160, 320, 640, 1_280, 2_560, 3_600, 3_600, 3_600, 3_600,
        ];
        assert_eq!(waits[..14], expected.map(Some));
        assert_eq!(waits.last(), Some(&None), "it is never given up");
        assert!(wait(1, 0) < Duration::from_millis(1), "no jitter");
        assert_eq!(wait(u32::MAX, u32::MAX), MAX);
    }

    #[test]
    fn only_success_is_delivered_and_only_gone_is_final() {
        for status in [200, 201, 202, 204, 299] {
            let outcome = answered(status, None);
            assert_eq!(outcome.follows(&delivery(1), NOW, 0), Settled::Delivered);
            assert_eq!(outcome.error(), None);
        }
        for status in [300, 301, 302, 307, 400, 401, 403, 404, 409, 429, 500, 503] {
            assert_eq!(waits(&answered(status, None), 1), Some(5), "{status}");
        }
        let gone = answered(410, None);
        assert_eq!(gone.follows(&delivery(1), NOW, 0), Settled::GivenUp);
        assert_eq!(gone.error().as_deref(), Some("answered with status 410"));
        let removed = DeliveryOutcome::Removed.follows(&delivery(1), NOW, 0);
        assert_eq!(removed, Settled::GivenUp);
        assert_eq!(waits(&DeliveryOutcome::Behind, 1), Some(5));
    }

    #[test]
    fn an_endpoint_may_ask_for_time_within_bounds() {
        for (status, text, expected) in [
            (503, "120", 120),
            (429, " 120 ", 120),
            (503, "0", 5),
            (503, "999999999", 3_600),
            (503, "Fri, 15 Jan 2027 08:02:00 GMT", 120),
            (503, "Fri, 15 Jan 2021 08:02:00 GMT", 5),
            (503, "-1", 5),
            (503, "soon", 5),
            (500, "120", 5),
        ] {
            let outcome = answered(status, Some(text));
            assert_eq!(waits(&outcome, 1), Some(expected), "{status} {text}");
        }
    }

    #[test]
    fn what_is_too_old_is_given_up() {
        let mut old = delivery(1);
        let tried = NOW.saturating_add(MAX_AGE.saturating_sub(Duration::from_secs(5)));
        let outcome = answered(500, None);
        let follows = |old: &Delivery| outcome.follows(old, tried, u32::MAX);
        assert_eq!(follows(&old), Settled::GivenUp);
        old.what.created_at = NOW.saturating_add(Duration::from_millis(1));
        let next = tried.saturating_add(Duration::from_secs(5));
        assert_eq!(follows(&old), Settled::Retry(next));
    }

    #[test]
    fn errors_are_one_short_line() {
        let host = format!("hooks\n{}", "é".repeat(400));
        let text = DeliveryOutcome::Failed(OutboundError::Unresolved { host }).error();
        let text = text.expect("an error");
        assert!(text.starts_with("the name hooksé"), "{text}");
        assert!(text.len() <= MAX_ERROR);
    }
}
