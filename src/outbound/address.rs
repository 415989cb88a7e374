//! The kinds of IP addresses.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{Ipv4Net, Ipv6Net};

/// The kind of an address, as far as requests are concerned.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    /// On the Internet, the same server for every caller.
    Public,
    /// On this machine or in a network around it: loopback, RFC 1918, shared address space (RFC
    /// 6598), unique local (RFC 4193).
    Private,
    /// Addresses without a server that a request is meant for: link-local, with the metadata
    /// services of clouds, multicast, unspecified, reserved, documentation, tunnels.
    Special,
}

/// The private blocks of IPv4.
const PRIVATE_V4: [Ipv4Net; 5] = [
    v4([10, 0, 0, 0], 8),
    v4([100, 64, 0, 0], 10),
    v4([127, 0, 0, 0], 8),
    v4([172, 16, 0, 0], 12),
    v4([192, 168, 0, 0], 16),
];

/// The blocks of IPv4 that are not globally reachable, from the IANA registry of special-purpose addresses.
const SPECIAL_V4: [Ipv4Net; 10] = [
    v4([0, 0, 0, 0], 8),
    v4([169, 254, 0, 0], 16),
    v4([192, 0, 0, 0], 24),
    v4([192, 0, 2, 0], 24),
    v4([192, 88, 99, 0], 24),
    v4([198, 18, 0, 0], 15),
    v4([198, 51, 100, 0], 24),
    v4([203, 0, 113, 0], 24),
    v4([224, 0, 0, 0], 4),
    v4([240, 0, 0, 0], 4),
];

/// The assigned unicast block of IPv6; other addresses are special, except loopback, unique local,
/// mapped and NAT64 ones.
const GLOBAL_V6: Ipv6Net = v6([0x2000, 0, 0, 0, 0, 0, 0, 0], 3);
/// The exceptions in that block: protocol assignments with Teredo, documentation, 6to4.
const SPECIAL_V6: [Ipv6Net; 4] = [
    v6([0x2001, 0, 0, 0, 0, 0, 0, 0], 23),
    v6([0x2001, 0xdb8, 0, 0, 0, 0, 0, 0], 32),
    v6([0x2002, 0, 0, 0, 0, 0, 0, 0], 16),
    v6([0x3fff, 0, 0, 0, 0, 0, 0, 0], 20),
];
const UNIQUE_LOCAL: Ipv6Net = v6([0xfc00, 0, 0, 0, 0, 0, 0, 0], 7);
/// The metadata service of EC2, which is among the unique local addresses.
const EC2_METADATA: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254);
/// The prefix with which a network without IPv4 reaches an IPv4 address (RFC 6052): the kind is
/// that of the IPv4 address.
const NAT64: Ipv6Net = v6([0x64, 0xff9b, 0, 0, 0, 0, 0, 0], 96);

/// Returns the kind of `address`.
#[must_use]
pub(crate) fn kind(address: IpAddr) -> Kind {
    match address {
        IpAddr::V4(address) => kind_v4(address),
        IpAddr::V6(address) => kind_v6(address),
    }
}

fn kind_v4(address: Ipv4Addr) -> Kind {
    if PRIVATE_V4.iter().any(|block| block.contains(&address)) {
        Kind::Private
    } else if SPECIAL_V4.iter().any(|block| block.contains(&address)) {
        Kind::Special
    } else {
        Kind::Public
    }
}

fn kind_v6(address: Ipv6Addr) -> Kind {
    if let Some(mapped) = address.to_ipv4_mapped() {
        return kind_v4(mapped);
    }
    if NAT64.contains(&address) {
        let [.., a, b, c, d] = address.octets();
        return kind_v4(Ipv4Addr::new(a, b, c, d));
    }
    if address == EC2_METADATA {
        Kind::Special
    } else if address.is_loopback() || UNIQUE_LOCAL.contains(&address) {
        Kind::Private
    } else if GLOBAL_V6.contains(&address)
        && !SPECIAL_V6.iter().any(|block| block.contains(&address))
    {
        Kind::Public
    } else {
        Kind::Special
    }
}

const fn v4([a, b, c, d]: [u8; 4], len: u8) -> Ipv4Net {
    Ipv4Net::new_assert(Ipv4Addr::new(a, b, c, d), len)
}

const fn v6(segments: [u16; 8], len: u8) -> Ipv6Net {
    let mut bits = 0;
    let mut at = 0;
    while at < segments.len() {
        bits = bits << 16 | segments[at] as u128;
        at += 1;
    }
    Ipv6Net::new_assert(Ipv6Addr::from_bits(bits), len)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_block_is_told_at_its_edges() {
        for (expected, addresses) in [
            (
                Kind::Public,
                "1.0.0.0 9.255.255.255 11.0.0.0 100.63.255.255 100.128.0.0 126.255.255.255 128.0.0.0 169.253.255.255 \
                 169.255.0.0 172.15.255.255 172.32.0.0 192.167.255.255 192.169.0.0 192.0.1.0 198.17.255.255 198.20.0.0 \
                 223.255.255.255 2606:4700::1 2001:200:: 2a00:: 3ffe:: ::ffff:8.8.8.8 64:ff9b::808:808",
            ),
            (
                Kind::Private,
                "10.0.0.0 10.255.255.255 100.64.0.0 100.127.255.255 127.0.0.1 127.255.255.255 172.16.0.0 172.31.255.255 \
                 192.168.0.0 192.168.255.255 ::1 fc00:: fdff::1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 64:ff9b::7f00:1",
            ),
            (
                Kind::Special,
                "0.0.0.0 0.255.255.255 169.254.0.0 169.254.169.254 192.0.0.0 192.0.2.1 192.88.99.1 198.18.0.0 \
                 198.19.255.255 198.51.100.1 203.0.113.1 224.0.0.0 239.255.255.255 240.0.0.0 255.255.255.255 :: \
                 ::127.0.0.1 100:: 64:ff9b:1:: 2001:: 2001:1ff:ffff:: 2001:db8:: 2002:7f00:1:: 3fff:: 4000:: fe80::1 \
                 febf:: fec0:: ff02::1 fd00:ec2::254 ::ffff:169.254.169.254 ::ffff:0.0.0.0 64:ff9b::a9fe:a9fe",
            ),
        ] {
            for address in addresses.split_whitespace() {
                let parsed = address.parse().expect("an address");
                assert_eq!(kind(parsed), expected, "{address}");
            }
        }
    }
}
