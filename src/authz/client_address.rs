//! The address of the client: the one of the peer, or the one that trusted proxies name.
//!
//! The peer is whoever has the connection to Envoy: the client itself, or the last proxy before
//! Envoy. A header counts only if the peer is a trusted proxy, because a client can send every
//! header. Of `X-Forwarded-For`, to which each proxy appends its own peer on the right, an address
//! counts only if trusted proxies wrote it.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use http::HeaderName;
use ipnet::IpNet;

use super::request::CheckInput;

/// Where the address of the client is found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum AddressSource {
    /// The address of the peer: Envoy's `source.address`.
    #[default]
    Peer,
    /// `X-Forwarded-For`, read from the right, beginning at the peer: the first address that is not
    /// a trusted proxy. If all are trusted, the leftmost one.
    ///
    /// It does not matter whether Envoy has appended the peer: the peer is then one more trusted
    /// address.
    ForwardedFor {
        /// The proxies that append their peer to the header.
        trusted: TrustedProxies,
    },
    /// `X-Forwarded-For`, by the number of proxies: see [`Hops`].
    Hops {
        /// The proxies that may be the peer.
        trusted: TrustedProxies,
        /// How many proxies there are.
        hops: Hops,
    },
    /// A header with one address, which the peer sets and does not pass on from a client.
    Header {
        /// The proxies that set the header.
        trusted: TrustedProxies,
        /// The name of the header.
        name: HeaderName,
    },
}

/// How many proxies a request passes before Envoy.
///
/// The proxies are counted from the right: the peer is the first, the rightmost address of
/// `X-Forwarded-For` that Envoy has not appended is the second, and so on. The client is the
/// address after the last proxy:
///
/// | `X-Forwarded-For`  | peer | `hops` | `envoy_appends` | client  |
/// | ------------------ | ---- | ------ | --------------- | ------- |
/// | `x, client`        | `p1` | 1      | false           | client  |
/// | `x, client, p1`    | `p1` | 1      | true            | client  |
/// | `x, client, p2`    | `p1` | 2      | false           | client  |
/// | `x, client, p2, p1`| `p1` | 2      | true            | client  |
/// | `client, p1`       | `p1` | 2      | true            | unknown |
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Hops {
    /// The number of proxies, 1 to [`Hops::MAX`], the peer included.
    pub(crate) count: u8,
    /// Whether Envoy has appended the peer to the header before it asks relatch
    /// (`use_remote_address: true` without `skip_xff_append`). The client is unknown if the
    /// rightmost address is not the peer, because relatch would then count one proxy too many and
    /// believe the client.
    pub(crate) envoy_appends: bool,
}

/// The address blocks of trusted proxies.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TrustedProxies(Arc<[IpNet]>);

/// The address of the client of a request, and how it was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ClientAddress<'s> {
    address: Option<IpAddr>,
    peer: Option<IpAddr>,
    origin: Origin<'s>,
}

/// How the address of a client was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin<'s> {
    /// It is the peer, because no header is configured.
    Peer,
    /// It is the peer, because the peer is not a trusted proxy.
    UntrustedPeer,
    /// It is the peer, a trusted proxy whose request has no header with this name.
    PeerWithout(&'s str),
    /// It is in the header with this name.
    Header(&'s str),
    /// It is unknown: the header with this name does not tell it.
    Unknown(&'s str, Problem),
}

/// The reason why a header does not tell the address of the client.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Problem {
    /// The request does not have the header.
    Missing,
    /// The header has more than one value.
    Repeated,
    /// An element that has to be read is not an address, such as `unknown` or `_hidden`.
    NotAnAddress,
    /// There are fewer addresses than proxies and a client.
    TooFew,
    /// There are more than [`MAX_PROXIES`] trusted proxies.
    TooMany,
    /// Envoy has not appended the peer, although the configuration says so.
    NotAppended,
}

/// The name of the header that proxies append their peers to.
pub(crate) const FORWARDED_FOR: &str = "x-forwarded-for";
/// The maximum number of addresses of trusted proxies that a check reads. No chain of proxies is
/// that long, and a header of 192 KiB has room for twenty thousand.
const MAX_PROXIES: usize = 64;

impl AddressSource {
    /// Returns the name of the header; none if the peer is the client.
    #[must_use]
    pub(crate) fn header(&self) -> Option<&str> {
        match self {
            Self::Peer => None,
            Self::ForwardedFor { .. } | Self::Hops { .. } => Some(FORWARDED_FOR),
            Self::Header { name, .. } => Some(name.as_str()),
        }
    }

    /// Returns the trusted proxies; none if the peer is the client.
    #[must_use]
    pub(crate) const fn trusted(&self) -> Option<&TrustedProxies> {
        match self {
            Self::Peer => None,
            Self::ForwardedFor { trusted }
            | Self::Hops { trusted, .. }
            | Self::Header { trusted, .. } => Some(trusted),
        }
    }

    /// Returns how many proxies there are; none if they are not counted.
    #[must_use]
    pub(crate) const fn hops(&self) -> Option<Hops> {
        match self {
            Self::Hops { hops, .. } => Some(*hops),
            Self::Peer | Self::ForwardedFor { .. } | Self::Header { .. } => None,
        }
    }

    /// Finds the address of the client of a request.
    #[must_use]
    pub(crate) fn find(&self, input: &CheckInput<'_>) -> ClientAddress<'_> {
        let peer = input.source().map(|peer| peer.to_canonical());
        let known = |address, origin| ClientAddress {
            address,
            peer,
            origin,
        };
        let (Some(header), Some(trusted)) = (self.header(), self.trusted()) else {
            return known(peer, Origin::Peer);
        };
        let Some(proxy) = peer.filter(|peer| trusted.contains(*peer)) else {
            return known(peer, Origin::UntrustedPeer);
        };
        let found = match self {
            Self::Peer => Ok(peer),
            Self::ForwardedFor { trusted } => before_proxies(elements(input), trusted),
            Self::Hops { hops, trusted } => hops.skip(elements(input), proxy, trusted).map(Some),
            Self::Header { name, .. } => single(input, name.as_str()).map(Some),
        };
        match found {
            Ok(Some(address)) => known(Some(address), Origin::Header(header)),
            Ok(None) => known(peer, Origin::PeerWithout(header)),
            Err(problem) => known(None, Origin::Unknown(header, problem)),
        }
    }
}

/// Returns the elements of `X-Forwarded-For`, the rightmost first. Several headers are one list in
/// their order (RFC 9110, section 5.3).
fn elements<'a>(input: &CheckInput<'a>) -> impl Iterator<Item = &'a [u8]> {
    let values = input.values(FORWARDED_FOR).rev();
    values.flat_map(|value| value.rsplit(|byte| *byte == b','))
}

/// Returns the first address that is not a trusted proxy, or else the last one; none if there are
/// no elements.
fn before_proxies<'a>(
    elements: impl Iterator<Item = &'a [u8]>,
    trusted: &TrustedProxies,
) -> Result<Option<IpAddr>, Problem> {
    let mut leftmost = None;
    for (at, element) in elements.enumerate() {
        if at == MAX_PROXIES {
            return Err(Problem::TooMany);
        }
        let address = parse(element)?;
        leftmost = Some(address);
        if !trusted.contains(address) {
            break;
        }
    }
    Ok(leftmost)
}

/// Returns the address in the only value of a header.
fn single(input: &CheckInput<'_>, name: &str) -> Result<IpAddr, Problem> {
    let mut values = input.values(name);
    let value = values.next().ok_or(Problem::Missing)?;
    // Envoy joins the values of duplicates with commas.
    if values.next().is_some() || value.contains(&b',') {
        return Err(Problem::Repeated);
    }
    parse(value)
}

/// Parses an address: IPv4 or IPv6, also in brackets, with or without a port. An IPv4-mapped IPv6
/// address is the IPv4 address.
fn parse(element: &[u8]) -> Result<IpAddr, Problem> {
    let text = str::from_utf8(element.trim_ascii()).map_err(|_| Problem::NotAnAddress)?;
    let address = match text.strip_prefix('[').map(|text| text.split_once(']')) {
        Some(Some((address, ""))) => v6(address),
        Some(Some((address, rest))) if is_port(rest) => v6(address),
        Some(_) => None,
        None => text.parse().ok().or_else(|| v4_with_port(text)),
    };
    let address = address.ok_or(Problem::NotAnAddress)?;
    Ok(address.to_canonical())
}

fn v6(text: &str) -> Option<IpAddr> {
    text.parse::<Ipv6Addr>().ok().map(IpAddr::V6)
}

fn v4_with_port(text: &str) -> Option<IpAddr> {
    let (address, port) = text.split_at_checked(text.find(':')?)?;
    let address = address.parse::<Ipv4Addr>().ok()?;
    is_port(port).then_some(address.into())
}

/// Returns whether a text is a colon and a port.
fn is_port(text: &str) -> bool {
    let port = text.strip_prefix(':').unwrap_or_default();
    port.bytes().all(|byte| byte.is_ascii_digit()) && port.parse::<u16>().is_ok()
}

impl Hops {
    /// The maximum number of proxies. Four are many.
    pub(crate) const MAX: u8 = 16;

    /// Returns the address after the proxies.
    fn skip<'a>(
        self,
        elements: impl Iterator<Item = &'a [u8]>,
        peer: IpAddr,
        trusted: &TrustedProxies,
    ) -> Result<IpAddr, Problem> {
        let mut addresses = elements.map(parse);
        if self.envoy_appends {
            let appended = addresses.next().ok_or(Problem::NotAppended)??;
            // For a peer on its own machine, Envoy appends an address of this machine.
            let is_own = is_own_machine(peer) && trusted.contains(appended);
            if appended != peer && !is_own {
                return Err(Problem::NotAppended);
            }
        }
        // The peer is the first proxy.
        for _ in 1..self.count {
            addresses.next().ok_or(Problem::TooFew)??;
        }
        addresses.next().ok_or(Problem::TooFew)?
    }
}

/// Returns whether Envoy appends another address for this peer
/// (`Network::Utility::isLoopbackAddress`).
fn is_own_machine(peer: IpAddr) -> bool {
    peer == IpAddr::V4(Ipv4Addr::LOCALHOST) || peer == IpAddr::V6(Ipv6Addr::LOCALHOST)
}

impl TrustedProxies {
    /// The maximum number of blocks. A check compares them one by one, for each address that it
    /// reads; a large content delivery network publishes about two hundred.
    pub(crate) const MAX: usize = 256;

    /// Trusts the proxies in `blocks`. Without a block, nobody is trusted.
    #[must_use]
    pub(crate) fn new(blocks: Vec<IpNet>) -> Self {
        Self(blocks.into())
    }

    /// Returns the blocks in order.
    pub(crate) fn iter(&self) -> impl Iterator<Item = &IpNet> {
        self.0.iter()
    }

    fn contains(&self, address: IpAddr) -> bool {
        self.0.iter().any(|block| block.contains(&address))
    }
}

impl<'s> ClientAddress<'s> {
    /// Creates the address of a client that is the peer.
    #[cfg(test)]
    pub(crate) const fn of_peer(peer: IpAddr) -> Self {
        Self {
            address: Some(peer),
            peer: Some(peer),
            origin: Origin::Peer,
        }
    }

    /// Returns the address; none if it is unknown. An IPv4-mapped IPv6 address is the IPv4 address.
    #[must_use]
    pub(crate) const fn address(&self) -> Option<IpAddr> {
        self.address
    }

    /// Returns how the address was found.
    #[must_use]
    pub(crate) const fn origin(&self) -> Origin<'s> {
        self.origin
    }

    /// Returns the address whose budget of failed credentials is charged: the address of the
    /// client, or the peer if the client is unknown. None if the peer is unknown, too.
    #[must_use]
    pub(super) fn charged(&self) -> Option<IpAddr> {
        self.address.or(self.peer)
    }
}

/// As metadata, spans and logs show it, such as `x-forwarded-for` or `x-real-ip (missing)`.
impl fmt::Display for Origin<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Peer => f.write_str("source.address"),
            Self::UntrustedPeer => f.write_str("source.address (not trusted)"),
            Self::PeerWithout(header) => write!(f, "source.address (no {header})"),
            Self::Header(header) => f.write_str(header),
            Self::Unknown(header, problem) => write!(f, "{header} ({problem})"),
        }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Missing => "missing",
            Self::Repeated => "more than one value",
            Self::NotAnAddress => "not an address",
            Self::TooFew => "too few addresses",
            Self::TooMany => "too many addresses",
            Self::NotAppended => "source.address is not appended",
        })
    }
}

#[cfg(test)]
mod tests;
