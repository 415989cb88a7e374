//! The parent of a span, as a request names it (W3C Trace Context, section 3.2).

use opentelemetry::trace::{SpanContext, SpanId, TraceFlags, TraceId, TraceState};

/// The span of a caller: its trace, its id, and whether it is sampled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TraceParent {
    trace: TraceId,
    span: SpanId,
    flags: TraceFlags,
}

impl TraceParent {
    /// Parses the value of a `traceparent` header; returns none for an invalid value, which a
    /// receiver ignores.
    #[must_use]
    pub(crate) fn parse(value: &[u8]) -> Option<Self> {
        const LEN: usize = 55;
        let (head, tail) = value.split_at_checked(LEN)?;
        let version = hex::<1>(&head[..2])?[0];
        let is_well_formed = match version {
            0 => tail.is_empty(),
            0xff => false,
            _ => tail.is_empty() || tail[0] == b'-',
        };
        if !is_well_formed || head[2] != b'-' || head[35] != b'-' || head[52] != b'-' {
            return None;
        }
        let trace = TraceId::from_bytes(hex(&head[3..35])?);
        let span = SpanId::from_bytes(hex(&head[36..52])?);
        let flags = TraceFlags::new(hex::<1>(&head[53..])?[0]);
        let is_valid = trace != TraceId::INVALID && span != SpanId::INVALID;
        is_valid.then_some(Self { trace, span, flags })
    }

    #[must_use]
    pub(crate) const fn trace_id(&self) -> TraceId {
        self.trace
    }

    /// Whether the caller samples its span.
    #[must_use]
    pub(crate) fn is_sampled(&self) -> bool {
        self.flags.is_sampled()
    }

    /// Returns the context for a child span that is recorded, whether the caller records its own
    /// span or not: the sampled flag is set, and a sampler that follows the parent records the
    /// child.
    #[must_use]
    pub(crate) fn recording_context(&self) -> SpanContext {
        let flags = self.flags.with_sampled(true);
        SpanContext::new(self.trace, self.span, flags, true, TraceState::NONE)
    }
}

/// Parses lower-case hexadecimal digits; the specification allows no others.
fn hex<const N: usize>(text: &[u8]) -> Option<[u8; N]> {
    let digit = |digit: u8| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; N];
    for (byte, pair) in bytes.iter_mut().zip(text.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";

    fn parse(text: &str) -> Option<TraceParent> {
        TraceParent::parse(text.as_bytes())
    }

    #[test]
    fn a_parent_is_read() {
        let parent = parse(&format!("00-{TRACE}-b7ad6b7169203331-01")).expect("a parent");
        assert_eq!(parent.trace_id().to_string(), TRACE);
        assert_eq!(
            parent.recording_context().span_id().to_string(),
            "b7ad6b7169203331"
        );
        assert!(parent.is_sampled());
        let parent = parse(&format!("cc-{TRACE}-b7ad6b7169203331-00-later"));
        assert!(!parent.expect("a parent").is_sampled());
    }

    #[test]
    fn what_is_no_parent_is_ignored() {
        let zeros = "0".repeat(32);
        for bad in [
            String::new(),
            format!("ff-{TRACE}-b7ad6b7169203331-01"),
            format!("00-{zeros}-b7ad6b7169203331-01"),
            format!("00-{TRACE}-0000000000000000-01"),
            format!("00-{TRACE}-b7ad6b7169203331-01-x"),
            format!("00-{TRACE}-b7ad6b7169203331-0x"),
            format!("00-{}-b7ad6b7169203331-01", TRACE.to_uppercase()),
            format!("00_{TRACE}_b7ad6b7169203331_01"),
        ] {
            assert_eq!(parse(&bad), None, "{bad:?} was read");
        }
    }
}
