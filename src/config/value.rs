//! The settings that both daemons have, and the types of their values.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    str::FromStr,
};

use ::http::Uri;
use serde::Deserialize;
use tracing::level_filters::LevelFilter;

use super::{
    plaintext::refuse_plaintext_client,
    reader::{Findings, Text},
};
use crate::{budget::Rate, parse::ParseValueError};

/// The address on which a server listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Listen {
    /// A TCP address; port 0 lets the system choose.
    Tcp(SocketAddr),
    /// The absolute path of a Unix socket.
    Unix(PathBuf),
}

/// The address of a control plane: `https://host:port`, or `http://host:port` with a host on loopback.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ControlEndpoint(Uri);

/// The address of an OTLP collector: `http://host:port`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct OtlpEndpoint(Uri);

/// The export of spans.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TelemetrySettings {
    /// The OTLP/gRPC collector. Default: none; then no spans are created.
    pub(crate) otlp_endpoint: Option<OtlpEndpoint>,
    /// `service.name` of the spans, 1 to 128 printable characters. Default: `relatch-sidecar` or `relatch-control`.
    pub(crate) service_name: String,
}

/// The format and level of the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogSettings {
    /// Default: text.
    pub(crate) format: LogFormat,
    /// The least severe level that is logged. Default: info.
    pub(crate) level: LevelFilter,
}

/// The format of log lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One JSON object per line.
    Json,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawTelemetry {
    otlp_endpoint: Option<Text>,
    service_name: Option<Text>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawLog {
    format: Option<Text>,
    level: Option<Text>,
}

impl Listen {
    /// The longest path in the address of a Unix socket on Linux (`sockaddr_un`), in bytes, without its final zero.
    const MAX_PATH: usize = 107;

    /// The IP address; none for a Unix socket.
    #[must_use]
    pub(crate) fn ip(&self) -> Option<IpAddr> {
        match self {
            Self::Tcp(address) => Some(address.ip()),
            Self::Unix(_) => None,
        }
    }
}

impl FromStr for Listen {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if let Some(path) = text.strip_prefix("unix://") {
            return if path.starts_with('/')
                && path.len() <= Self::MAX_PATH
                && !path.contains('\0')
                && !path.ends_with('/')
            {
                Ok(Self::Unix(path.into()))
            } else {
                Err(ParseValueError::new(
                    "use unix:///path with an absolute path of at most 107 bytes",
                ))
            };
        }
        text.parse().map(Self::Tcp).map_err(|_| {
            ParseValueError::new(
                "use an IP address with a port, such as 127.0.0.1:9001, or unix:///path",
            )
        })
    }
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix://{}", path.display()),
        }
    }
}

impl ControlEndpoint {
    /// The address.
    #[must_use]
    pub(crate) const fn uri(&self) -> &Uri {
        &self.0
    }

    /// The address of a control plane that listens on `address`.
    ///
    /// # Errors
    ///
    /// When `address` is not on loopback.
    pub(crate) fn at(address: SocketAddr) -> Result<Self, ParseValueError> {
        format!("http://{address}").parse()
    }

    /// Whether the connection uses TLS.
    #[must_use]
    pub(crate) fn has_tls(&self) -> bool {
        self.0.scheme_str() == Some("https")
    }
}

impl FromStr for ControlEndpoint {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const FORM: ParseValueError = ParseValueError::new(
            "use https://host:port, or http:// on this machine, such as http://127.0.0.1:9010",
        );
        let endpoint = Self(base_uri(text).ok_or(FORM)?);
        if !matches!(endpoint.0.scheme_str(), Some("http" | "https")) {
            return Err(FORM);
        }
        let host = endpoint.0.host().unwrap_or_default();
        refuse_plaintext_client(host, endpoint.has_tls())?;
        Ok(endpoint)
    }
}

impl FromStr for OtlpEndpoint {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        base_uri(text)
            .filter(|uri| uri.scheme_str() == Some("http"))
            .map(Self)
            .ok_or(ParseValueError::new(
                "use http://host:port of a collector that receives OTLP over gRPC, such as http://127.0.0.1:4317; \
                 this version sends spans in plaintext",
            ))
    }
}

impl fmt::Display for ControlEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl fmt::Display for OtlpEndpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl TelemetrySettings {
    /// The defaults for the service `service_name`: no spans.
    #[must_use]
    pub(crate) fn named(service_name: &str) -> Self {
        Self {
            otlp_endpoint: None,
            service_name: service_name.to_owned(),
        }
    }

    pub(super) fn from_raw(raw: &RawTelemetry, default_name: &str, found: &mut Findings) -> Self {
        Self {
            otlp_endpoint: found.parse(
                "telemetry.otlp_endpoint",
                raw.otlp_endpoint.as_ref(),
                str::parse,
            ),
            service_name: found
                .parse("telemetry.service_name", raw.service_name.as_ref(), label)
                .unwrap_or_else(|| default_name.to_owned()),
        }
    }
}

impl LogSettings {
    pub(super) fn from_raw(raw: &RawLog, found: &mut Findings) -> Self {
        let default = Self::default();
        Self {
            format: found
                .parse("log.format", raw.format.as_ref(), str::parse)
                .unwrap_or(default.format),
            level: found
                .parse("log.level", raw.level.as_ref(), level)
                .unwrap_or(default.level),
        }
    }
}

impl Default for LogSettings {
    fn default() -> Self {
        Self {
            format: LogFormat::default(),
            level: LevelFilter::INFO,
        }
    }
}

impl FromStr for LogFormat {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err(ParseValueError::new("use text or json")),
        }
    }
}

/// Parses an IP address with a port.
///
/// # Errors
///
/// When `text` is anything else.
pub(crate) fn address(text: &str) -> Result<SocketAddr, ParseValueError> {
    text.parse()
        .map_err(|_| ParseValueError::new("use an IP address with a port, such as 127.0.0.1:9002"))
}

/// Parses a text for a label: 1 to 128 printable ASCII characters.
pub(super) fn label(text: &str) -> Result<String, ParseValueError> {
    let valid = matches!(text.len(), 1..=128)
        && text
            .bytes()
            .all(|byte| byte.is_ascii_graphic() || byte == b' ');
    if valid {
        Ok(text.to_owned())
    } else {
        Err(ParseValueError::new(
            "use 1 to 128 printable ASCII characters",
        ))
    }
}

/// Parses `true` or `false`.
pub(super) fn boolean(text: &str) -> Result<bool, ParseValueError> {
    text.parse()
        .map_err(|_| ParseValueError::new("use true or false"))
}

/// Parses one of the numbers of a [`Rate`].
pub(super) fn rate(text: &str) -> Result<u32, String> {
    text.parse()
        .ok()
        .filter(|number| (1..=Rate::MAX).contains(number))
        .ok_or_else(|| format!("use a whole number from 1 to {}", Rate::MAX))
}

/// Parses a size such as `64MiB` within `bounds`, both included; the result and `bounds` are in bytes.
pub(super) fn size(text: &str, bounds: (u64, u64)) -> Result<u64, String> {
    let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
    let (number, unit) = text.split_at(digits);
    let shift = match unit {
        "KiB" => Some(10),
        "MiB" => Some(20),
        "GiB" => Some(30),
        _ => None,
    };
    let bytes = shift.and_then(|shift| number.parse::<u64>().ok()?.checked_mul(1 << shift));
    bytes
        .filter(|bytes| (bounds.0..=bounds.1).contains(bytes))
        .ok_or_else(|| {
            let [least, most] = [bounds.0, bounds.1].map(in_words);
            format!("use a size from {least} to {most}, such as 64MiB")
        })
}

/// Writes a size in the largest unit that divides it.
fn in_words(bytes: u64) -> String {
    match bytes {
        bytes if bytes.is_multiple_of(1 << 30) => format!("{}GiB", bytes >> 30),
        bytes if bytes.is_multiple_of(1 << 20) => format!("{}MiB", bytes >> 20),
        bytes => format!("{}KiB", bytes >> 10),
    }
}

fn level(text: &str) -> Result<LevelFilter, ParseValueError> {
    match text {
        "error" => Ok(LevelFilter::ERROR),
        "warn" => Ok(LevelFilter::WARN),
        "info" => Ok(LevelFilter::INFO),
        "debug" => Ok(LevelFilter::DEBUG),
        "trace" => Ok(LevelFilter::TRACE),
        _ => Err(ParseValueError::new(
            "use error, warn, info, debug or trace",
        )),
    }
}

/// Parses a URI that has a scheme, a host and a port only. Credentials in it are refused, because messages print the URI.
pub(super) fn base_uri(text: &str) -> Option<Uri> {
    let uri: Uri = text.parse().ok()?;
    let base = uri.scheme().is_some()
        && uri.host().is_some_and(|host| !host.is_empty())
        && uri.port_u16().is_some()
        && uri.path() == "/"
        && uri.query().is_none()
        && uri
            .authority()
            .is_some_and(|authority| !authority.as_str().contains('@'));
    base.then_some(uri)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_planes_are_reached_in_clear_on_loopback_only() {
        for good in [
            "http://127.0.0.1:9010",
            "http://127.8.0.1:9010/",
            "http://[::1]:9010",
            "http://localhost:0",
            "https://relatch-control:9010",
            "https://10.0.0.1:9010",
        ] {
            assert!(
                good.parse::<ControlEndpoint>().is_ok(),
                "{good} was refused"
            );
        }
        for bad in [
            "ftp://127.0.0.1:9010",
            "http://relatch-control:9010",
            "http://localhost.example.com:9010",
            "http://10.0.0.1:9010",
            "http://127.0.0.1",
            "http://127.0.0.1:9010/path",
            "http://user:secret@127.0.0.1:9010",
            "127.0.0.1:9010",
            "",
        ] {
            assert!(
                bad.parse::<ControlEndpoint>().is_err(),
                "{bad} was accepted"
            );
        }
    }

    #[test]
    fn listen_addresses_round_trip() {
        for text in [
            "127.0.0.1:9001",
            "[::1]:0",
            "unix:///run/relatch/authz.sock",
        ] {
            let listen: Listen = text.parse().expect("valid");
            assert_eq!(listen.to_string(), text);
        }
        for bad in [
            "9001",
            "localhost:9001",
            "unix://authz.sock",
            "unix:///run/",
        ] {
            assert!(bad.parse::<Listen>().is_err(), "{bad} was accepted");
        }
        assert!(
            format!("unix:///{}", "a".repeat(106))
                .parse::<Listen>()
                .is_ok()
        );
        assert!(
            format!("unix:///{}", "a".repeat(107))
                .parse::<Listen>()
                .is_err()
        );
    }
}
