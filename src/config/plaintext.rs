//! The one rule about plaintext: secrets do not cross a network without TLS.

use std::net::IpAddr;

use crate::parse::ParseValueError;

/// A setting would send secrets over a network in plaintext.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {rule}")]
pub(crate) struct PlaintextError {
    pub(crate) field: &'static str,
    rule: ParseValueError,
}

/// The problem of a server without TLS on an address that other machines can reach.
const PLAINTEXT_LISTENER: ParseValueError = ParseValueError::new(
    "without `tls` only this machine may connect: use 127.0.0.1 or [::1], or add `tls`",
);
/// The problem of a client that would connect to another machine in plaintext.
const PLAINTEXT_CLIENT: ParseValueError = ParseValueError::new(
    "http:// is for this machine only (127.0.0.1, [::1] or localhost): use https:// for another machine",
);

/// Checks the rule about plaintext: a server that receives, sends or checks keys may listen on an address that other machines
/// can reach only with TLS.
///
/// # Errors
///
/// When `ip` is such an address, and there is no TLS.
pub(crate) fn refuse_plaintext_listener(
    field: &'static str,
    ip: IpAddr,
    has_tls: bool,
) -> Result<(), PlaintextError> {
    if has_tls || ip.is_loopback() {
        Ok(())
    } else {
        let rule = PLAINTEXT_LISTENER;
        Err(PlaintextError { field, rule })
    }
}

/// Checks the same rule for a client that connects to `host`.
///
/// # Errors
///
/// When `host` is not on loopback, and there is no TLS.
pub(crate) fn refuse_plaintext_client(host: &str, has_tls: bool) -> Result<(), ParseValueError> {
    if has_tls || is_loopback(host) {
        Ok(())
    } else {
        Err(PLAINTEXT_CLIENT)
    }
}

impl PlaintextError {
    pub(super) const fn rule(&self) -> ParseValueError {
        self.rule
    }
}

pub(super) fn is_loopback(host: &str) -> bool {
    let bare = host
        .strip_prefix('[')
        .and_then(|host| host.strip_suffix(']'))
        .unwrap_or(host);
    bare.eq_ignore_ascii_case("localhost")
        || bare
            .parse::<IpAddr>()
            .is_ok_and(|address| address.is_loopback())
}
