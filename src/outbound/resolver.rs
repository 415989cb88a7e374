//! Resolves names to addresses that may be called.

use std::net::{IpAddr, SocketAddr};

use reqwest::dns::{Addrs, Name, Resolve, Resolving};

use super::{
    Kind,
    address::kind,
    error::{OutboundError, Unreachable},
};

/// The addresses that may be connected to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Accepted {
    /// All addresses.
    Any,
    /// Only public addresses.
    Public,
    /// All addresses except special ones.
    PublicOrPrivate,
    /// Only private addresses.
    Private,
}

/// Resolves names with the resolver of the system, and keeps the accepted addresses.
#[derive(Debug)]
pub(super) struct Resolver(Accepted);

impl Accepted {
    /// Returns the accepted ones of `addresses`, in their order. It is an error if there is none.
    pub(super) fn keep(
        self,
        addresses: impl IntoIterator<Item = SocketAddr>,
    ) -> Result<Vec<SocketAddr>, Unreachable> {
        let mut why = Unreachable::Unresolved;
        let mut kept = Vec::new();
        for address in addresses {
            let kind = kind(address.ip());
            if self.includes(kind) {
                kept.push(address);
            } else if why == Unreachable::Unresolved {
                why = Unreachable::Refused(kind);
            }
        }
        if kept.is_empty() { Err(why) } else { Ok(kept) }
    }

    /// Checks that a host that is this address may be called.
    pub(super) fn judge(self, host: &str, address: IpAddr) -> Result<(), OutboundError> {
        match kind(address) {
            kind if self.includes(kind) => Ok(()),
            kind => Err(OutboundError::unreachable(host, Unreachable::Refused(kind))),
        }
    }

    const fn includes(self, kind: Kind) -> bool {
        match (self, kind) {
            (Self::Any, Kind::Public | Kind::Private | Kind::Special)
            | (Self::Public | Self::PublicOrPrivate, Kind::Public)
            | (Self::PublicOrPrivate | Self::Private, Kind::Private) => true,
            (Self::Public, Kind::Private)
            | (Self::Private, Kind::Public)
            | (Self::Public | Self::PublicOrPrivate | Self::Private, Kind::Special) => false,
        }
    }
}

impl Resolver {
    pub(super) const fn new(accepted: Accepted) -> Self {
        Self(accepted)
    }
}

impl Resolve for Resolver {
    fn resolve(&self, name: Name) -> Resolving {
        let accepted = self.0;
        Box::pin(async move {
            // The caller replaces the port by that of the URL.
            let found = tokio::net::lookup_host((name.as_str(), 0))
                .await
                .map_err(|_| Unreachable::Unresolved)?;
            let addresses: Addrs = Box::new(accepted.keep(found)?.into_iter());
            Ok(addresses)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addresses(texts: &[&str]) -> Vec<SocketAddr> {
        let parse = |text: &&str| SocketAddr::new(text.parse().expect("an address"), 0);
        texts.iter().map(parse).collect()
    }

    #[test]
    fn each_kind_is_accepted_where_it_should_be() {
        let of = |accepted: Accepted| {
            ["8.8.8.8", "127.0.0.1", "169.254.169.254"]
                .map(|text| accepted.keep(addresses(&[text])).is_ok())
        };
        assert_eq!(of(Accepted::Any), [true, true, true]);
        assert_eq!(of(Accepted::Public), [true, false, false]);
        assert_eq!(of(Accepted::PublicOrPrivate), [true, true, false]);
        assert_eq!(of(Accepted::Private), [false, true, false]);
    }

    #[test]
    fn a_name_without_addresses_is_not_resolved() {
        assert_eq!(Accepted::Any.keep([]), Err(Unreachable::Unresolved));
    }

    #[test]
    fn of_a_name_with_addresses_of_both_kinds_only_the_accepted_are_called() {
        let mixed = addresses(&["10.0.0.1", "8.8.8.8", "::1", "2606:4700::1"]);
        let kept = Accepted::Public.keep(mixed).expect("some are public");
        assert_eq!(kept, addresses(&["8.8.8.8", "2606:4700::1"]));
    }
}
