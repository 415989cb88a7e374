//! The callers of a key version that its consumer should no longer use: those with the most
//! requests, in bounded memory.
//!
//! The table is a Space-Saving sketch (Metwally, Agrawal, El Abbadi: "Efficient computation of
//! frequent and top-k elements in data streams", 2005): when it is full, a new caller replaces the
//! one with the fewest requests and continues its count. A caller that makes more than one in
//! [`MAX_CALLERS`] of the requests is always in the table.

use std::{cmp::Reverse, net::IpAddr};

use crate::key::Timestamp;

/// The origin of a request, cut to the lengths that are kept.
#[derive(Clone, Debug)]
pub(crate) struct Caller {
    source: Option<IpAddr>,
    user_agent: Short,
    route: Short,
}

/// The callers that use a version most.
#[derive(Debug, Default)]
pub(super) struct Callers(Vec<CallerUse>);

/// How often a caller has used a version.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct CallerUse {
    /// The address of the client; none when it is unknown.
    pub(crate) source: Option<IpAddr>,
    /// The `user-agent` of the request; at most 128 bytes of printable ASCII.
    pub(crate) user_agent: String,
    /// Host and the first two segments of the path; at most 128 bytes of printable ASCII.
    pub(crate) route: String,
    /// The number of requests since the caller is in the table. It is too large by at most the
    /// count that the caller continued.
    pub(crate) requests: u64,
    /// The time of the newest request, by the wall clock.
    pub(crate) last_used: Timestamp,
}

/// At most [`MAX_TEXT`] bytes of printable ASCII, on the stack: a check creates one without an
/// allocation.
#[derive(Clone)]
struct Short {
    bytes: [u8; MAX_TEXT],
    len: usize,
}

/// The most callers of one version. An operator looks for the few callers that have not switched;
/// sixteen fit on a screen, and use at most 5 KiB of memory.
pub(crate) const MAX_CALLERS: usize = 16;
/// The most bytes of a text: enough for the names and versions at the beginning of a `user-agent`.
const MAX_TEXT: usize = 128;
/// The number of path segments in a route: enough to distinguish one API from another. Later
/// segments are mostly ids, and each id would count as a caller of its own.
const SEGMENTS: usize = 2;

impl Caller {
    /// Creates the caller of a request from the client `source` with these headers and this path. The path
    /// ends at its first `?` or `;`: a query may contain credentials, and `;parameters` may contain
    /// sessions.
    #[must_use]
    pub(crate) fn new(source: Option<IpAddr>, user_agent: &[u8], host: &[u8], path: &[u8]) -> Self {
        let mut route = Short::new();
        route.push(host);
        let end = path.iter().position(|byte| matches!(byte, b'?' | b';'));
        let segments = path[..end.unwrap_or(path.len())].split(|byte| *byte == b'/');
        for segment in segments.filter(|part| !part.is_empty()).take(SEGMENTS) {
            route.push(b"/");
            route.push(segment);
        }
        let mut shown = Short::new();
        shown.push(user_agent);
        Self {
            source,
            user_agent: shown,
            route,
        }
    }

    fn is(&self, other: &CallerUse) -> bool {
        self.source == other.source
            && self.user_agent.as_bytes() == other.user_agent.as_bytes()
            && self.route.as_bytes() == other.route.as_bytes()
    }
}

impl Callers {
    /// Counts one request of `caller`.
    pub(super) fn note(&mut self, caller: &Caller, now: Timestamp) {
        let Self(table) = self;
        if let Some(held) = table.iter_mut().find(|held| caller.is(held)) {
            held.requests += 1;
            held.last_used = held.last_used.max(now);
        } else if table.len() < MAX_CALLERS {
            table.push(CallerUse {
                source: caller.source,
                user_agent: caller.user_agent.as_str().to_owned(),
                route: caller.route.as_str().to_owned(),
                requests: 1,
                last_used: now,
            });
        } else if let Some(least) = table.iter_mut().min_by_key(|held| held.requests) {
            // The memory of its texts is reused: callers that come and go cost no allocations.
            least.source = caller.source;
            caller.user_agent.write_to(&mut least.user_agent);
            caller.route.write_to(&mut least.route);
            least.requests += 1;
            least.last_used = now;
        }
    }

    /// Returns all callers, those with the most requests first.
    pub(super) fn ranked(&self) -> Vec<CallerUse> {
        let mut ranked = self.0.clone();
        ranked.sort_by_key(|held| Reverse(held.requests));
        ranked
    }
}

impl Short {
    const fn new() -> Self {
        Self {
            bytes: [0; MAX_TEXT],
            len: 0,
        }
    }

    /// Appends as much of `text` as fits. A byte that is not printable ASCII becomes a `?`, so that
    /// a caller cannot write to a terminal or forge a line.
    fn push(&mut self, text: &[u8]) {
        let room = &mut self.bytes[self.len..];
        for (to, from) in room.iter_mut().zip(text) {
            *to = match from {
                b' '..=b'~' => *from,
                _ => b'?',
            };
        }
        self.len += text.len().min(room.len());
    }

    fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    fn as_str(&self) -> &str {
        str::from_utf8(self.as_bytes()).expect("printable ASCII")
    }

    fn write_to(&self, text: &mut String) {
        text.clear();
        text.push_str(self.as_str());
    }
}

impl std::fmt::Debug for Short {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        std::fmt::Debug::fmt(self.as_str(), f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(millis: i64) -> Timestamp {
        Timestamp::from_millis(millis)
    }

    fn agent(name: &str) -> Caller {
        Caller::new(None, name.as_bytes(), b"api.example.com", b"/v1")
    }

    fn route(host: &str, path: &str) -> String {
        let caller = Caller::new(None, b"", host.as_bytes(), path.as_bytes());
        caller.route.as_str().to_owned()
    }

    #[test]
    fn a_route_is_host_and_two_segments_without_query_and_parameters() {
        for (path, expected) in [
            ("/", "api"),
            ("/v1/orders/17/lines", "api/v1/orders"),
            ("//v1//orders", "api/v1/orders"),
            ("/v1?api_key=K", "api/v1"),
            ("/v1/orders;session=S/17", "api/v1/orders"),
            ("?api_key=K", "api"),
        ] {
            assert_eq!(route("api", path), expected, "{path}");
        }
    }

    #[test]
    fn texts_are_printable_and_cut() {
        let long = "x".repeat(MAX_TEXT + 1);
        let caller = Caller::new(None, long.as_bytes(), b"a\x1b[2J\r\n", "/ä".as_bytes());
        assert_eq!(caller.user_agent.as_str(), &long[..MAX_TEXT]);
        assert_eq!(caller.route.as_str(), "a?[2J??/??");
        assert_eq!(route(&long, "/v1"), &long[..MAX_TEXT]);
    }

    #[test]
    fn callers_are_counted_apart_and_ranked() {
        let mut callers = Callers::default();
        let other = Caller::new(Some([192, 0, 2, 1].into()), b"curl", b"api", b"/v1");
        callers.note(&agent("curl"), at(5));
        for now in [9, 7] {
            callers.note(&other, at(now));
        }
        let ranked = callers.ranked();
        let told: Vec<_> = ranked
            .iter()
            .map(|caller| (caller.source.is_some(), caller.requests, caller.last_used))
            .collect();
        assert_eq!(told, [(true, 2, at(9)), (false, 1, at(5))]);
    }

    #[test]
    fn the_most_frequent_stay_however_many_come_and_go() {
        let mut callers = Callers::default();
        for number in 0..1_000 {
            for _ in 0..200 {
                callers.note(&agent("batch"), at(number));
            }
            callers.note(&agent(&format!("passer-by-{number}")), at(number));
        }
        let ranked = callers.ranked();
        assert_eq!(ranked.len(), MAX_CALLERS);
        assert_eq!(ranked[0].user_agent, "batch");
        assert_eq!(ranked[0].requests, 200_000);
        let all: u64 = ranked.iter().map(|caller| caller.requests).sum();
        assert_eq!(all, 201_000, "every request is counted for somebody");
    }
}
