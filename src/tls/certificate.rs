//! The fields of a certificate that identities and errors need.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use x509_parser::{
    certificate::X509Certificate, extensions::GeneralName, prelude::FromDer as _, x509::X509Name,
};

use crate::{key::Timestamp, printable};

/// The readable part of a certificate. Its text is for errors. The sender of the certificate chose
/// its content, so the text is shortened and contains no control characters.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Certificate {
    subject: String,
    issuer: String,
    /// DNS names and IP addresses.
    hosts: Vec<String>,
    uris: Vec<String>,
    not_before: Timestamp,
    not_after: Timestamp,
    public_key: Vec<u8>,
}

/// The maximum number of characters of a name in an error; longer ones are shortened.
const MAX_NAME: usize = 128;
/// The maximum number of names in an error; the text only counts the others.
const MAX_NAMES: usize = 6;

impl Certificate {
    /// Reads a certificate in DER; returns none if the bytes are not a certificate.
    #[must_use]
    pub(crate) fn read(der: &[u8]) -> Option<Self> {
        let (_, certificate) = X509Certificate::from_der(der).ok()?;
        let (mut hosts, mut uris) = (Vec::new(), Vec::new());
        if let Some(names) = certificate.subject_alternative_name().ok()? {
            for name in &names.value.general_names {
                match name {
                    GeneralName::DNSName(name) => hosts.push((*name).to_owned()),
                    GeneralName::IPAddress(bytes) => hosts.extend(address(bytes)),
                    GeneralName::URI(uri) => uris.push((*uri).to_owned()),
                    GeneralName::OtherName(..)
                    | GeneralName::RFC822Name(_)
                    | GeneralName::X400Address(_)
                    | GeneralName::DirectoryName(_)
                    | GeneralName::EDIPartyName(_)
                    | GeneralName::RegisteredID(_)
                    | GeneralName::Invalid(..) => {}
                }
            }
        }
        let validity = certificate.validity();
        Some(Self {
            subject: name(certificate.subject()),
            issuer: name(certificate.issuer()),
            hosts,
            uris,
            not_before: seconds(validity.not_before.timestamp()),
            not_after: seconds(validity.not_after.timestamp()),
            public_key: certificate.public_key().subject_public_key.data.to_vec(),
        })
    }

    /// Returns the URIs, unchanged.
    #[must_use]
    pub(crate) fn uris(&self) -> &[String] {
        &self.uris
    }

    /// Returns the subject, as a distinguished name.
    pub(super) fn subject(&self) -> &str {
        &self.subject
    }

    /// Returns the public key.
    pub(super) fn public_key(&self) -> &[u8] {
        &self.public_key
    }

    /// Returns the time from which the certificate is valid.
    #[must_use]
    pub(crate) const fn not_before(&self) -> Timestamp {
        self.not_before
    }

    /// Returns the last moment at which the certificate is valid, in whole seconds.
    #[must_use]
    pub(crate) const fn not_after(&self) -> Timestamp {
        self.not_after
    }
}

impl fmt::Display for Certificate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names: Vec<&str> = self
            .uris
            .iter()
            .chain(&self.hosts)
            .map(String::as_str)
            .collect();
        write!(f, "{}", Plain(&self.subject))?;
        if !names.is_empty() {
            write!(f, " for ")?;
        }
        for (at, name) in names.iter().take(MAX_NAMES).enumerate() {
            if at > 0 {
                write!(f, ", ")?;
            }
            write!(f, "{}", Plain(name))?;
        }
        if names.len() > MAX_NAMES {
            write!(f, " and {} more", names.len() - MAX_NAMES)?;
        }
        write!(
            f,
            "; issued by {}; valid from {} to {}",
            Plain(&self.issuer),
            self.not_before,
            self.not_after
        )
    }
}

/// A text that other parties chose.
struct Plain<'a>(&'a str);

impl fmt::Display for Plain<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("(no name)");
        }
        for c in self.0.chars().take(MAX_NAME) {
            fmt::Write::write_char(f, if printable::is_unsafe(c) { '?' } else { c })?;
        }
        if self.0.chars().nth(MAX_NAME).is_some() {
            f.write_str("...")?;
        }
        Ok(())
    }
}

fn name(name: &X509Name<'_>) -> String {
    name.to_string()
}

fn address(bytes: &[u8]) -> Option<String> {
    let address: IpAddr = if let Ok(four) = <[u8; 4]>::try_from(bytes) {
        Ipv4Addr::from(four).into()
    } else {
        Ipv6Addr::from(<[u8; 16]>::try_from(bytes).ok()?).into()
    };
    Some(address.to_string())
}

fn seconds(since_epoch: i64) -> Timestamp {
    Timestamp::from_millis(since_epoch.saturating_mul(1_000))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tls::testing::{Authority, Leaf};

    #[test]
    fn a_certificate_tells_its_names_its_issuer_and_its_validity() {
        let authority = Authority::new("mesh CA");
        let leaf = authority.issue(
            &Leaf::server(&["control.example", "127.0.0.1", "::1"])
                .uri("spiffe://mesh.example/control"),
        );
        let read = Certificate::read(leaf.der()).expect("it is one");
        assert_eq!(read.uris(), ["spiffe://mesh.example/control"]);
        let text = read.to_string();
        assert!(
            text.starts_with(
                "CN=control.example for spiffe://mesh.example/control, control.example, \
                 127.0.0.1, ::1; issued by CN=mesh CA; valid from "
            ),
            "{text}"
        );
        assert!(read.not_before() < read.not_after());
    }

    #[test]
    fn names_that_others_chose_are_cut_and_hold_no_control_characters() {
        let authority = Authority::new("mesh CA");
        let leaf = authority.issue(&Leaf::named(&format!("a\n\u{1b}[31mb{}", "x".repeat(200))));
        let text = Certificate::read(leaf.der())
            .expect("it is one")
            .to_string();
        assert!(text.starts_with("CN=a??[31mbx"), "{text}");
        assert!(!text.contains('\n') && text.len() < 300, "{text}");
    }

    #[test]
    fn what_is_no_certificate_is_none() {
        assert_eq!(Certificate::read(b""), None);
        assert_eq!(Certificate::read(&[0x30, 0x82, 0xff, 0xff, 1, 2, 3]), None);
    }
}
