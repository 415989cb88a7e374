//! The one rule about plaintext: what nobody else may read does not cross a network in clear.

use std::net::IpAddr;

use crate::parse::ParseValueError;

/// Something may not be said in clear over a network.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {rule}")]
pub(crate) struct PlaintextError {
    /// The setting.
    pub(crate) field: &'static str,
    rule: ParseValueError,
}

/// Why a server that takes keys or hands them out may not listen beyond this machine.
const PLAINTEXT_LISTENER: ParseValueError = ParseValueError::new(
    "without `tls` only this machine may connect: use 127.0.0.1 or [::1], or give it `tls`",
);

/// Why a client may not say what it has to say.
const PLAINTEXT_CLIENT: ParseValueError = ParseValueError::new(
    "http:// is for this machine only (127.0.0.1, [::1] or localhost): use https:// for another",
);

/// The one rule about plaintext: nothing that takes, hands out or checks keys listens on an address that other machines
/// reach, unless over TLS.
///
/// # Errors
///
/// When it would.
pub(crate) fn refuse_plaintext_listener(
    field: &'static str,
    address: IpAddr,
    has_tls: bool,
) -> Result<(), PlaintextError> {
    if has_tls || address.is_loopback() {
        Ok(())
    } else {
        let rule = PLAINTEXT_LISTENER;
        Err(PlaintextError { field, rule })
    }
}

/// The same of whoever connects to `host`.
///
/// # Errors
///
/// When what it says would cross a network in clear.
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
