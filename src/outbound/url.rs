//! A URL that relatch may call.

use std::{fmt, net::IpAddr};

use url::{Host, Url};

/// An `http` or `https` URL with a host, without user or password. It is printed as its origin,
/// because the rest may be a secret.
#[derive(Clone, PartialEq, Eq)]
pub struct OutboundUrl {
    url: Url,
    scheme: Scheme,
}

/// The scheme of a URL.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Scheme {
    /// `http`: plain text.
    Http,
    /// `https`: over TLS.
    Https,
}

/// The reason that a text is not a URL that relatch may call.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    /// The text is not a URL.
    #[error("not a URL: write one such as https://hooks.example.com/relatch")]
    Syntax,
    /// The URL has another scheme.
    #[error("not a URL that begins with https://")]
    Scheme,
    /// The URL has a user or a password.
    #[error("a URL with a user or a password: leave them out")]
    UserInfo,
    /// The URL has a fragment, which is never sent to a server.
    #[error("a URL with a fragment: leave out what follows the #")]
    Fragment,
    /// The URL is longer than 2,048 bytes.
    #[error("a URL of more than {MAX_LEN} bytes: use a shorter one")]
    TooLong,
}

/// The maximum length of a URL in bytes, which servers and proxies commonly accept.
const MAX_LEN: usize = 2_048;

impl OutboundUrl {
    /// Parses a URL.
    ///
    /// # Errors
    ///
    /// When the text is not a URL that relatch may call.
    pub fn parse(text: &str) -> Result<Self, UrlError> {
        if text.len() > MAX_LEN {
            return Err(UrlError::TooLong);
        }
        let url = Url::parse(text).map_err(|_| UrlError::Syntax)?;
        let scheme = match url.scheme() {
            "http" => Scheme::Http,
            "https" => Scheme::Https,
            _ => return Err(UrlError::Scheme),
        };
        if !url.username().is_empty() || url.password().is_some() {
            return Err(UrlError::UserInfo);
        }
        if url.fragment().is_some() {
            return Err(UrlError::Fragment);
        }
        if !url.has_host() {
            return Err(UrlError::Syntax);
        }
        Ok(Self { url, scheme })
    }

    /// Returns the scheme.
    #[must_use]
    pub(crate) const fn scheme(&self) -> Scheme {
        self.scheme
    }

    /// Returns the host and, if it is not the default of the scheme, the port.
    #[must_use]
    pub(crate) fn host(&self) -> String {
        let host = self.url.host_str().unwrap_or_default();
        match self.url.port() {
            Some(port) => format!("{host}:{port}"),
            None => host.to_owned(),
        }
    }

    /// Returns the whole URL, which may contain a secret.
    #[cfg(test)]
    #[must_use]
    pub(crate) fn as_str(&self) -> &str {
        self.url.as_str()
    }

    /// Returns the host if it is an address, in any spelling that browsers accept.
    pub(super) fn address(&self) -> Option<IpAddr> {
        match self.url.host()? {
            Host::Ipv4(address) => Some(address.into()),
            Host::Ipv6(address) => Some(address.into()),
            Host::Domain(_) => None,
        }
    }

    pub(super) fn into_inner(self) -> Url {
        self.url
    }
}

impl fmt::Display for OutboundUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = match self.scheme {
            Scheme::Http => "http",
            Scheme::Https => "https",
        };
        write!(f, "{scheme}://{}", self.host())
    }
}

impl fmt::Debug for OutboundUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "OutboundUrl({self}, rest redacted)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_origin_prints() {
        let text = "https://hooks.example.com:8443/services/T0/secret?token=hidden";
        let url = OutboundUrl::parse(text).expect("a URL");
        assert_eq!(url.to_string(), "https://hooks.example.com:8443");
        assert_eq!(
            format!("{url:?}"),
            "OutboundUrl(https://hooks.example.com:8443, rest redacted)"
        );
        assert_eq!(url.as_str(), text);
    }

    #[test]
    fn what_may_not_be_called_is_refused() {
        for (text, error) in [
            ("", UrlError::Syntax),
            ("hooks.example.com", UrlError::Syntax),
            ("https://", UrlError::Syntax),
            ("https://1.2.3.4.5/", UrlError::Syntax),
            ("https://[fe80::1%25eth0]/", UrlError::Syntax),
            ("ftp://example.com/", UrlError::Scheme),
            ("file:///etc/passwd", UrlError::Scheme),
            ("unix:///run/docker.sock", UrlError::Scheme),
            ("https://user@example.com/", UrlError::UserInfo),
            ("https://:password@example.com/", UrlError::UserInfo),
            ("https://example.com/#a", UrlError::Fragment),
        ] {
            assert_eq!(OutboundUrl::parse(text), Err(error), "{text}");
        }
        let long = format!("https://example.com/{}", "a".repeat(MAX_LEN));
        assert_eq!(OutboundUrl::parse(&long), Err(UrlError::TooLong));
    }

    #[test]
    fn every_spelling_of_an_address_is_one() {
        for text in [
            "http://127.0.0.1/",
            "http://127.0.0.1./",
            "http://127.1/",
            "http://2130706433/",
            "http://0x7f000001/",
            "http://0177.0.0.1/",
            "http://%31%32%37.0.0.1/",
            "http://127。0。0。1/",
        ] {
            let url = OutboundUrl::parse(text).expect("a URL");
            assert_eq!(url.address(), Some([127, 0, 0, 1].into()), "{text}");
        }
        let url = OutboundUrl::parse("http://[::ffff:127.0.0.1]/").expect("a URL");
        assert!(url.address().is_some_and(|address| address.is_ipv6()));
        let url = OutboundUrl::parse("http://localhost/").expect("a URL");
        assert_eq!(url.address(), None);
    }
}
