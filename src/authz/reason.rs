//! The reasons of denials: one closed list for the response, the metric label, the span attribute
//! and the log.

use std::fmt;

/// The reason why a request is denied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum DenyReason {
    /// The request cannot be understood, or can be read in two ways.
    MalformedRequest,
    /// The headers or the path of the request are larger than relatch reads.
    RequestTooLarge,
    /// Neither the Envoy route nor the configuration chooses a keyring, or this sidecar does not
    /// have the chosen one.
    UnknownKeyring,
    /// The keyring is not loaded or was never confirmed by the control plane, or the lookup of a
    /// key on demand failed or was refused.
    KeyringUnavailable,
    /// The control plane has not confirmed the keyring within `deny_after` or its grant.
    KeyringStale,
    /// The request has more than one credential.
    AmbiguousCredential,
    /// The request has no credential, and the route requires one.
    MissingCredential,
    /// The credential is too long for a key, or is not a token of a keyring that accepts only
    /// issued keys.
    MalformedCredential,
    /// The keyring does not have the key.
    UnknownKey,
    /// The address of the client has presented too many malformed or unknown keys.
    TooManyFailures,
    /// The version was revoked.
    Revoked,
    /// The version was retired.
    Retired,
    /// The `expires_at` of the version has passed.
    Expired,
    /// The `not_before` of the version has not come yet.
    NotYetValid,
    /// The key may not be used from the address of the client, or this address is unknown.
    SourceNotAllowed,
    /// The key lacks a scope that the route requires.
    InsufficientScope,
    /// A fault of relatch: a panic or a broken invariant.
    InternalError,
}

/// The status of a denial. No proxy could mistake one of them for an allow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DenialStatus {
    /// HTTP 400, gRPC `INVALID_ARGUMENT`.
    BadRequest,
    /// HTTP 401, gRPC `UNAUTHENTICATED`.
    Unauthorized,
    /// HTTP 403, gRPC `PERMISSION_DENIED`.
    Forbidden,
    /// HTTP 429, gRPC `RESOURCE_EXHAUSTED`.
    TooManyRequests,
    /// HTTP 431 (RFC 6585, section 5), gRPC `RESOURCE_EXHAUSTED`.
    HeadersTooLarge,
    /// HTTP 503, gRPC `UNAVAILABLE`.
    Unavailable,
}

impl DenyReason {
    /// All reasons, in the order in which a decision tests for them; the fault of relatch is last.
    pub const ALL: [Self; 17] = [
        Self::MalformedRequest,
        Self::RequestTooLarge,
        Self::UnknownKeyring,
        Self::KeyringUnavailable,
        Self::KeyringStale,
        Self::AmbiguousCredential,
        Self::MissingCredential,
        Self::MalformedCredential,
        Self::UnknownKey,
        Self::TooManyFailures,
        Self::Revoked,
        Self::Retired,
        Self::Expired,
        Self::NotYetValid,
        Self::SourceNotAllowed,
        Self::InsufficientScope,
        Self::InternalError,
    ];

    /// Returns the name in responses, metrics, spans and logs.
    #[must_use]
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::MalformedRequest => "malformed_request",
            Self::RequestTooLarge => "request_too_large",
            Self::UnknownKeyring => "unknown_keyring",
            Self::KeyringUnavailable => "keyring_unavailable",
            Self::KeyringStale => "keyring_stale",
            Self::AmbiguousCredential => "ambiguous_credential",
            Self::MissingCredential => "missing_credential",
            Self::MalformedCredential => "malformed_credential",
            Self::UnknownKey => "unknown_key",
            Self::TooManyFailures => "too_many_failures",
            Self::Revoked => "revoked",
            Self::Retired => "retired",
            Self::Expired => "expired",
            Self::NotYetValid => "not_yet_valid",
            Self::SourceNotAllowed => "source_not_allowed",
            Self::InsufficientScope => "insufficient_scope",
            Self::InternalError => "internal_error",
        }
    }

    /// Returns the status of the response to the consumer.
    #[must_use]
    pub const fn status(self) -> DenialStatus {
        match self {
            Self::MalformedRequest | Self::AmbiguousCredential => DenialStatus::BadRequest,
            Self::MissingCredential
            | Self::MalformedCredential
            | Self::UnknownKey
            | Self::Revoked
            | Self::Retired
            | Self::Expired
            | Self::NotYetValid => DenialStatus::Unauthorized,
            Self::SourceNotAllowed | Self::InsufficientScope => DenialStatus::Forbidden,
            Self::TooManyFailures => DenialStatus::TooManyRequests,
            Self::RequestTooLarge => DenialStatus::HeadersTooLarge,
            Self::UnknownKeyring
            | Self::KeyringUnavailable
            | Self::KeyringStale
            | Self::InternalError => DenialStatus::Unavailable,
        }
    }

    /// Returns the title of the response to the consumer. It is the same for a malformed key and
    /// for an unknown one.
    #[must_use]
    pub(crate) const fn title(self) -> &'static str {
        match self {
            Self::MalformedRequest => "The request cannot be understood",
            Self::RequestTooLarge => "The headers of the request are too large",
            Self::UnknownKeyring => "No keyring serves this route",
            Self::KeyringUnavailable => "The keys of this API are not available yet",
            Self::KeyringStale => "The keys of this API are out of date",
            Self::AmbiguousCredential => "The request holds more than one API key",
            Self::MissingCredential => "An API key is required",
            Self::MalformedCredential | Self::UnknownKey => "The API key is not valid",
            Self::TooManyFailures => "Too many API keys from this address were not valid",
            Self::Revoked => "The API key was revoked",
            Self::Retired => "The API key was replaced by a newer version",
            Self::Expired => "The API key has expired",
            Self::NotYetValid => "The API key is not valid yet",
            Self::SourceNotAllowed => "The API key may not be used from this address",
            Self::InsufficientScope => "The API key does not hold the scopes that this route needs",
            Self::InternalError => "The API key could not be checked",
        }
    }

    /// Returns whether relatch, not the request, is the cause.
    #[must_use]
    pub(crate) const fn is_our_fault(self) -> bool {
        matches!(self.status(), DenialStatus::Unavailable)
    }

    /// Returns whether the credential is not the secret of any key. Such a credential counts
    /// against the budget of its source.
    #[must_use]
    pub(crate) const fn is_failed_credential(self) -> bool {
        match self {
            Self::MalformedCredential | Self::UnknownKey => true,
            Self::MalformedRequest
            | Self::RequestTooLarge
            | Self::UnknownKeyring
            | Self::KeyringUnavailable
            | Self::KeyringStale
            | Self::AmbiguousCredential
            | Self::MissingCredential
            | Self::TooManyFailures
            | Self::Revoked
            | Self::Retired
            | Self::Expired
            | Self::NotYetValid
            | Self::SourceNotAllowed
            | Self::InsufficientScope
            | Self::InternalError => false,
        }
    }

    /// Returns whether the request has one credential, but it is not a key that is valid now.
    #[must_use]
    pub(crate) const fn is_of_the_key(self) -> bool {
        match self {
            Self::MalformedCredential
            | Self::UnknownKey
            | Self::Revoked
            | Self::Retired
            | Self::Expired
            | Self::NotYetValid => true,
            Self::MalformedRequest
            | Self::RequestTooLarge
            | Self::UnknownKeyring
            | Self::KeyringUnavailable
            | Self::KeyringStale
            | Self::TooManyFailures
            | Self::AmbiguousCredential
            | Self::MissingCredential
            | Self::SourceNotAllowed
            | Self::InsufficientScope
            | Self::InternalError => false,
        }
    }
}

impl fmt::Display for DenyReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl DenialStatus {
    /// Returns the code of the HTTP status.
    #[must_use]
    pub const fn http(self) -> u16 {
        match self {
            Self::BadRequest => 400,
            Self::Unauthorized => 401,
            Self::Forbidden => 403,
            Self::TooManyRequests => 429,
            Self::HeadersTooLarge => 431,
            Self::Unavailable => 503,
        }
    }

    /// Returns the corresponding `google.rpc.Code`. It is never 0, which would allow.
    #[must_use]
    pub(crate) const fn rpc(self) -> i32 {
        match self {
            Self::BadRequest => 3,
            Self::Unauthorized => 16,
            Self::Forbidden => 7,
            Self::TooManyRequests | Self::HeadersTooLarge => 8,
            Self::Unavailable => 14,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_reason_has_its_place_and_its_statuses() {
        let expected = [
            ("malformed_request", 400, 3),
            ("request_too_large", 431, 8),
            ("unknown_keyring", 503, 14),
            ("keyring_unavailable", 503, 14),
            ("keyring_stale", 503, 14),
            ("ambiguous_credential", 400, 3),
            ("missing_credential", 401, 16),
            ("malformed_credential", 401, 16),
            ("unknown_key", 401, 16),
            ("too_many_failures", 429, 8),
            ("revoked", 401, 16),
            ("retired", 401, 16),
            ("expired", 401, 16),
            ("not_yet_valid", 401, 16),
            ("source_not_allowed", 403, 7),
            ("insufficient_scope", 403, 7),
            ("internal_error", 503, 14),
        ];
        for (at, (reason, expected)) in DenyReason::ALL.into_iter().zip(expected).enumerate() {
            let found = (
                reason.as_str(),
                reason.status().http(),
                reason.status().rpc(),
            );
            assert_eq!(found, expected);
            assert_eq!(reason as usize, at);
        }
    }

    #[test]
    fn malformed_and_unknown_keys_read_the_same() {
        assert_eq!(
            DenyReason::MalformedCredential.title(),
            DenyReason::UnknownKey.title()
        );
    }
}
