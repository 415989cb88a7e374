//! Which address counts: tables of chains of proxies, and what no client can choose.

use proptest::{collection::vec, prelude::*, sample::select};
use prost::Message as _;

use super::*;
use crate::{authz::testing::Message, key::parse_block};

fn ip(text: &str) -> IpAddr {
    text.parse().expect("an address")
}

fn trusted(blocks: &[&str]) -> TrustedProxies {
    let block = |block: &&str| parse_block(block).expect("a block");
    TrustedProxies::new(blocks.iter().map(block).collect())
}

/// The proxies of the tests.
fn proxies() -> TrustedProxies {
    trusted(&["10.0.0.0/8", "127.0.0.1", "2001:db8:1::/48"])
}

fn forwarded_for() -> AddressSource {
    AddressSource::ForwardedFor { trusted: proxies() }
}

fn hops(count: u8, envoy_appends: bool) -> AddressSource {
    AddressSource::Hops {
        trusted: proxies(),
        hops: Hops {
            count,
            envoy_appends,
        },
    }
}

fn external() -> AddressSource {
    AddressSource::Header {
        trusted: proxies(),
        name: HeaderName::from_static("x-envoy-external-address"),
    }
}

/// Finds the client of a request from `peer` with `headers`, and says how it was found. Both
/// encodings of headers, and the values in one header, must give the same.
fn found(source: &AddressSource, peer: &str, headers: &[(&str, &str)]) -> (Option<IpAddr>, String) {
    let message = headers.iter().fold(
        Message::get("/").from(peer.to_owned()),
        |message, (name, value)| message.header((*name).to_owned(), (*value).to_owned()),
    );
    let find = |request: Vec<u8>| {
        let input = CheckInput::read(&request).expect("a request");
        let client = source.find(&input);
        (client.address(), client.origin().to_string())
    };
    let raw = find(message.raw().encode_to_vec());
    assert_eq!(find(message.joined().encode_to_vec()), raw);
    let values: Vec<_> = headers.iter().map(|(_, value)| *value).collect();
    if let Some((name, _)) = headers.first() {
        let joined = Message::get("/").from(peer.to_owned());
        let joined = joined.header((*name).to_owned(), values.join(","));
        assert_eq!(find(joined.joined().encode_to_vec()), raw, "joined");
    }
    raw
}

/// As [`found`], with lines of `x-forwarded-for`.
fn found_in(source: &AddressSource, peer: &str, lines: &[&str]) -> (Option<IpAddr>, String) {
    let lines: Vec<_> = lines.iter().map(|line| (FORWARDED_FOR, *line)).collect();
    found(source, peer, &lines)
}

#[test]
fn without_a_setting_the_peer_is_the_client() {
    for (peer, expected) in [
        ("10.0.0.1", Some(ip("10.0.0.1"))),
        ("::ffff:192.0.2.1", Some(ip("192.0.2.1"))),
        ("", None),
        ("/run/envoy.sock", None),
    ] {
        let expected = (expected, "source.address".to_owned());
        let lines = ["203.0.113.9"];
        assert_eq!(
            found_in(&AddressSource::Peer, peer, &lines),
            expected,
            "{peer}"
        );
    }
}

#[test]
fn a_header_of_an_untrusted_peer_does_not_count() {
    for source in [forwarded_for(), hops(1, false), hops(1, true), external()] {
        let header = source.header().expect("it reads a header");
        for peer in ["192.0.2.1", "11.0.0.1", "2001:db8:2::1", "::ffff:192.0.2.1"] {
            let (address, origin) = found(&source, peer, &[(header, "203.0.113.9")]);
            assert_eq!(address, Some(ip(peer).to_canonical()), "{source:?}");
            assert_eq!(origin, "source.address (not trusted)");
        }
        let unknown = found(&source, "", &[(header, "203.0.113.9")]);
        assert_eq!(unknown, (None, "source.address (not trusted)".to_owned()));
    }
}

#[test]
fn an_address_counts_if_all_to_its_right_are_trusted() {
    const HEADER: &str = "x-forwarded-for";
    const MALFORMED: &str = "x-forwarded-for (not an address)";
    let source = forwarded_for();
    for (lines, client, origin) in [
        // One proxy; Envoy has not appended it, and has.
        (&["203.0.113.9"][..], Some("203.0.113.9"), HEADER),
        (&["203.0.113.9, 10.0.0.1"], Some("203.0.113.9"), HEADER),
        // What the client has written is on the left.
        (
            &["192.0.2.66, 203.0.113.9, 10.0.0.1"],
            Some("203.0.113.9"),
            HEADER,
        ),
        (&["unknown, 203.0.113.9"], Some("203.0.113.9"), HEADER),
        (&["10.9.9.9,203.0.113.9"], Some("203.0.113.9"), HEADER),
        (&[", ,\u{e4}, 203.0.113.9"], Some("203.0.113.9"), HEADER),
        // More proxies.
        (
            &["203.0.113.9, 10.0.0.3, 10.0.0.2"],
            Some("203.0.113.9"),
            HEADER,
        ),
        (
            &["203.0.113.9, 192.0.2.7, 10.0.0.2"],
            Some("192.0.2.7"),
            HEADER,
        ),
        // All are trusted.
        (&["10.0.0.9, 10.0.0.2"], Some("10.0.0.9"), HEADER),
        (&["10.0.0.1"], Some("10.0.0.1"), HEADER),
        // Several headers are one list.
        (
            &["192.0.2.66", "203.0.113.9", "10.0.0.2, 10.0.0.1"],
            Some("203.0.113.9"),
            HEADER,
        ),
        // Forms of addresses.
        (&["203.0.113.9:5678"], Some("203.0.113.9"), HEADER),
        (
            &["203.0.113.9:5678,\t10.0.0.2:443 "],
            Some("203.0.113.9"),
            HEADER,
        ),
        (&["2001:db8:2::1"], Some("2001:db8:2::1"), HEADER),
        (&["[2001:db8:2::1]"], Some("2001:db8:2::1"), HEADER),
        (&["[2001:db8:2::1]:443"], Some("2001:db8:2::1"), HEADER),
        (
            &["203.0.113.9, [2001:db8:1::5]:443"],
            Some("203.0.113.9"),
            HEADER,
        ),
        (&["::ffff:203.0.113.9"], Some("203.0.113.9"), HEADER),
        (
            &["203.0.113.9, ::ffff:10.0.0.2"],
            Some("203.0.113.9"),
            HEADER,
        ),
        // What is no address, where it has to be read.
        (&["203.0.113.9, unknown"], None, MALFORMED),
        (&["203.0.113.9, _hidden, 10.0.0.1"], None, MALFORMED),
        (&["203.0.113.9, "], None, MALFORMED),
        (&[""], None, MALFORMED),
        (&["203.0.113.9", ""], None, MALFORMED),
        (&["203.0.113.9 10.0.0.1"], None, MALFORMED),
        (&["203.0.113"], None, MALFORMED),
        (&["203.0.113.09"], None, MALFORMED),
        (&["203.0.113.9:"], None, MALFORMED),
        (&["203.0.113.9:+1"], None, MALFORMED),
        (&["203.0.113.9:65536"], None, MALFORMED),
        (&["\"203.0.113.9\""], None, MALFORMED),
        (&["for=203.0.113.9"], None, MALFORMED),
        (&["[203.0.113.9]"], None, MALFORMED),
        (&["[2001:db8:2::1"], None, MALFORMED),
        (&["[2001:db8:2::1]443"], None, MALFORMED),
        (&["[2001:db8:2::1]:"], None, MALFORMED),
        (&["fe80::1%eth0"], None, MALFORMED),
        // Nobody has forwarded it.
        (&[], Some("10.0.0.1"), "source.address (no x-forwarded-for)"),
    ] {
        let expected = (client.map(ip), origin.to_owned());
        for peer in ["10.0.0.1", "::ffff:10.0.0.1"] {
            assert_eq!(found_in(&source, peer, lines), expected, "{lines:?}");
        }
    }
}

#[test]
fn no_more_proxies_are_read_than_there_can_be() {
    let source = forwarded_for();
    let chain = |proxies| format!("203.0.113.9{}", ", 10.0.0.2".repeat(proxies));
    let (address, _) = found_in(&source, "10.0.0.1", &[&chain(MAX_PROXIES - 1)]);
    assert_eq!(address, Some(ip("203.0.113.9")));
    let expected = (None, "x-forwarded-for (too many addresses)".to_owned());
    let longer = chain(MAX_PROXIES);
    assert_eq!(found_in(&source, "10.0.0.1", &[&longer]), expected);
}

#[test]
fn proxies_are_counted_from_the_peer_on() {
    const TOO_FEW: Result<&str, &str> = Err("too few addresses");
    const NOT_APPENDED: Result<&str, &str> = Err("source.address is not appended");
    const MALFORMED: Result<&str, &str> = Err("not an address");
    for (header, count, envoy_appends, expected) in [
        ("192.0.2.66, 203.0.113.9", 1, false, Ok("203.0.113.9")),
        (
            "192.0.2.66, 203.0.113.9, 10.0.0.1",
            1,
            true,
            Ok("203.0.113.9"),
        ),
        // Proxies need no known address: only the peer must be trusted.
        (
            "192.0.2.66, 203.0.113.9, 198.51.100.2",
            2,
            false,
            Ok("203.0.113.9"),
        ),
        (
            "192.0.2.66, 203.0.113.9, 198.51.100.2, 10.0.0.1",
            2,
            true,
            Ok("203.0.113.9"),
        ),
        (
            "203.0.113.9, 10.0.0.3, 198.51.100.2, 10.0.0.1",
            3,
            true,
            Ok("203.0.113.9"),
        ),
        (
            "203.0.113.9:80,[::ffff:10.0.0.1]:80",
            1,
            true,
            Ok("203.0.113.9"),
        ),
        // The address after the proxies counts, also if it is a trusted one.
        ("203.0.113.9, 10.0.0.7", 1, false, Ok("10.0.0.7")),
        ("203.0.113.9, 10.0.0.1", 1, false, Ok("10.0.0.1")),
        // Too few.
        ("203.0.113.9", 2, false, TOO_FEW),
        ("203.0.113.9, 10.0.0.1", 2, true, TOO_FEW),
        ("10.0.0.1", 1, true, TOO_FEW),
        // Envoy has not appended the peer. The client could have written the next address.
        ("192.0.2.66, 203.0.113.9", 1, true, NOT_APPENDED),
        ("203.0.113.9, 10.0.0.2", 1, true, NOT_APPENDED),
        // What is no address, where it has to be read.
        ("203.0.113.9, unknown", 1, false, MALFORMED),
        ("203.0.113.9, _hidden", 2, false, MALFORMED),
        ("203.0.113.9, ", 2, false, MALFORMED),
        ("203.0.113.9, 198.51.100.2, unknown", 2, true, MALFORMED),
        ("unknown, 203.0.113.9", 1, false, Ok("203.0.113.9")),
    ] {
        let expected = match expected {
            Ok(client) => (Some(ip(client)), FORWARDED_FOR.to_owned()),
            Err(problem) => (None, format!("{FORWARDED_FOR} ({problem})")),
        };
        let source = hops(count, envoy_appends);
        let found = found_in(&source, "10.0.0.1", &[header]);
        assert_eq!(found, expected, "{header}, {count}, {envoy_appends}");
    }
    for (envoy_appends, problem) in [(false, TOO_FEW), (true, NOT_APPENDED)] {
        let problem = problem.expect_err("a problem");
        let expected = (None, format!("{FORWARDED_FOR} ({problem})"));
        assert_eq!(found_in(&hops(1, envoy_appends), "10.0.0.1", &[]), expected);
    }
}

#[test]
fn for_a_peer_on_its_own_machine_envoy_may_append_another_trusted_address() {
    let find = |line| found_in(&hops(1, true), "127.0.0.1", &[line]);
    let found = (Some(ip("203.0.113.9")), FORWARDED_FOR.to_owned());
    assert_eq!(find("203.0.113.9, 10.0.0.9"), found);
    // The client may have written it.
    let reason = "x-forwarded-for (source.address is not appended)";
    assert_eq!(find("203.0.113.9, 172.17.0.2"), (None, reason.to_owned()));
}

#[test]
fn a_header_with_one_address_has_one() {
    const NAME: &str = "x-envoy-external-address";
    for (values, expected) in [
        (&["203.0.113.9"][..], Ok("203.0.113.9")),
        (&["[2001:db8:2::1]:443"], Ok("2001:db8:2::1")),
        (&["::ffff:203.0.113.9"], Ok("203.0.113.9")),
        // Also a trusted one.
        (&["10.0.0.2"], Ok("10.0.0.2")),
        (&[], Err("missing")),
        (&["203.0.113.9", "203.0.113.9"], Err("more than one value")),
        (&["203.0.113.9,203.0.113.9"], Err("more than one value")),
        (&["203.0.113.9,"], Err("more than one value")),
        (&["unknown"], Err("not an address")),
        (&[""], Err("not an address")),
    ] {
        let expected = match expected {
            Ok(client) => (Some(ip(client)), NAME.to_owned()),
            Err(problem) => (None, format!("{NAME} ({problem})")),
        };
        let headers: Vec<_> = values.iter().map(|value| (NAME, *value)).collect();
        assert_eq!(
            found(&external(), "10.0.0.1", &headers),
            expected,
            "{values:?}"
        );
    }
}

#[test]
fn only_the_configured_header_is_read() {
    let others = [
        ("forwarded", "for=203.0.113.9"),
        ("x-forwarded-for", "203.0.113.9"),
        ("x_envoy_external_address", "203.0.113.9"),
        ("x-real-ip", "203.0.113.9"),
    ];
    for other in others {
        let (address, _) = found(&external(), "10.0.0.1", &[other]);
        assert_eq!(address, None, "{other:?}");
    }
}

#[test]
fn the_budget_of_an_unknown_client_is_the_one_of_its_peer() {
    for (header, charged) in [("203.0.113.9", "203.0.113.9"), ("unknown", "10.0.0.1")] {
        let message = Message::get("/").from("10.0.0.1");
        let request = message.header(FORWARDED_FOR, header).raw().encode_to_vec();
        let input = CheckInput::read(&request).expect("a request");
        let source = forwarded_for();
        assert_eq!(source.find(&input).charged(), Some(ip(charged)));
    }
}

/// What a client may write into a header.
fn forged() -> impl Strategy<Value = String> {
    let element = prop_oneof![
        4 => select(vec!["10.0.0.1", "10.9.9.9", "203.0.113.66", "::1", "[2001:db8:1::1]:80"])
            .prop_map(str::to_owned),
        1 => "[ -~]{0,12}",
    ];
    vec(element, 0..5).prop_map(|elements| elements.join(", "))
}

/// Appends an address, as a proxy does.
fn appended(header: &str, address: &str) -> String {
    if header.is_empty() {
        address.to_owned()
    } else {
        format!("{header}, {address}")
    }
}

const CLIENT: &str = "192.0.2.1";

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2_000))]

    #[test]
    fn no_header_of_an_untrusted_peer_changes_the_address(
        header in forged(),
        count in 1..4_u8,
        envoy_appends: bool,
    ) {
        for source in [forwarded_for(), hops(count, envoy_appends), external()] {
            let name = source.header().expect("it reads a header");
            for headers in [vec![(name, header.as_str())], vec![(name, CLIENT), (name, &header)]] {
                let (address, _) = found(&source, CLIENT, &headers);
                prop_assert_eq!(address, Some(ip(CLIENT)));
            }
        }
    }

    /// Each proxy appends its peer to what the client has sent. The client is found, whatever it
    /// has sent, and is never another address.
    #[test]
    fn a_client_behind_proxies_cannot_choose_its_address(
        sent in forged(),
        proxies in vec(1..=254_u8, 1..5),
        envoy_appends: bool,
    ) {
        let proxies: Vec<_> = proxies.iter().map(|it| format!("10.0.0.{it}")).collect();
        let (peer, before) = proxies.split_last().expect("at least one");
        let mut header = appended(&sent, CLIENT);
        for proxy in before {
            header = appended(&header, proxy);
        }
        if envoy_appends {
            header = appended(&header, peer);
        }
        let count = u8::try_from(proxies.len()).expect("few");
        for source in [forwarded_for(), hops(count, envoy_appends)] {
            let (address, _) = found_in(&source, peer, &[&header]);
            prop_assert_eq!(address, Some(ip(CLIENT)), "{}", header);
        }
        // A wrong setting believes nobody. The one exception cannot be seen: the last proxy before
        // the peer has the address of the peer.
        let (address, _) = found_in(&hops(count, !envoy_appends), peer, &[&header]);
        if envoy_appends {
            let address = address.expect("there are enough addresses");
            prop_assert!(proxies.iter().any(|proxy| ip(proxy) == address), "{}", header);
        } else if before.last() != Some(peer) {
            prop_assert_eq!(address, None, "{}", header);
        }
    }

    /// The address that counts is the peer, or it stands in the header and everything to its right
    /// is trusted.
    #[test]
    fn everything_to_the_right_of_the_address_is_trusted(header in forged()) {
        const PEER: &str = "10.0.0.1";
        let (address, _) = found_in(&forwarded_for(), PEER, &[&header]);
        let Some(address) = address else {
            return Ok(());
        };
        let elements: Vec<_> = header.rsplit(',').map(|it| parse(it.as_bytes()).ok()).collect();
        let right = |at: usize| elements[..at].iter();
        let stands = (0..elements.len()).any(|at| {
            elements[at] == Some(address)
                && right(at).all(|it| it.is_some_and(|it| proxies().contains(it)))
        });
        prop_assert!(stands || header.is_empty() && address == ip(PEER));
    }
}
