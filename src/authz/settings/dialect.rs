//! The protocol in which a proxy asks about a request.

use std::{fmt, str::FromStr};

use super::ParseSettingError;

/// The protocol in which a proxy asks. It is configured and never detected: each proxy passes on
/// the headers of the other dialects as clients send them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Dialect {
    /// External authorization over gRPC (`ext_authz`). Envoy removes the headers that an answer
    /// names.
    #[default]
    Envoy,
    /// Traefik's `forwardAuth`, over HTTP.
    Traefik,
    /// Caddy's `forward_auth`, over HTTP.
    Caddy,
    /// The `auth_request` of nginx, over HTTP.
    Nginx,
}

impl Dialect {
    /// All dialects.
    pub(crate) const ALL: [Self; 4] = [Self::Envoy, Self::Traefik, Self::Caddy, Self::Nginx];

    /// Returns the name in the configuration, in spans, logs and metrics.
    #[must_use]
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Envoy => "envoy",
            Self::Traefik => "traefik",
            Self::Caddy => "caddy",
            Self::Nginx => "nginx",
        }
    }
}

impl fmt::Display for Dialect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Parses a dialect over HTTP.
impl FromStr for Dialect {
    type Err = ParseSettingError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let mut others = Self::ALL.into_iter().filter(|one| *one != Self::Envoy);
        let named = others.find(|dialect| dialect.as_str() == text);
        named.ok_or(ParseSettingError::Dialect)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_dialects_over_http_are_parsed() {
        for dialect in [Dialect::Traefik, Dialect::Caddy, Dialect::Nginx] {
            assert_eq!(dialect.to_string().parse(), Ok(dialect));
        }
        for other in ["envoy", "Nginx", "haproxy", ""] {
            let refused = Err(ParseSettingError::Dialect);
            assert_eq!(other.parse::<Dialect>(), refused, "{other}");
        }
    }
}
