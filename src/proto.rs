//! The code generated from `proto/`. Only the modules of services use it.
//!
//! Messages with the headers of a request, and those of the snapshot file, have no `Debug`. The `Debug` of other messages
//! with a secret omits the secret.

use std::fmt;

use crate::key::Timestamp;

pub(crate) mod codec;

/// `envoy.service.auth.v3`
#[expect(
    missing_debug_implementations,
    missing_docs,
    unused_qualifications,
    clippy::pedantic,
    clippy::allow_attributes,
    clippy::allow_attributes_without_reason,
    reason = "generated"
)]
pub mod auth {
    tonic::include_proto!("envoy.service.auth.v3");
}

/// `relatch.admin.v1`
#[expect(
    missing_docs,
    unused_qualifications,
    clippy::pedantic,
    clippy::allow_attributes,
    clippy::allow_attributes_without_reason,
    clippy::large_enum_variant,
    reason = "generated"
)]
pub mod admin {
    tonic::include_proto!("relatch.admin.v1");
}

/// `relatch.discovery.v1`
#[expect(
    missing_docs,
    unused_qualifications,
    clippy::pedantic,
    clippy::allow_attributes,
    clippy::allow_attributes_without_reason,
    reason = "generated"
)]
pub mod discovery {
    /// The version of the protocol, which a Hello contains.
    pub const PROTOCOL: u32 = 2;

    tonic::include_proto!("relatch.discovery.v1");
}

/// `relatch.snapshot.v1`
#[expect(unreachable_pub, reason = "generated")]
pub(crate) mod snapshot {
    tonic::include_proto!("relatch.snapshot.v1");
}

/// The metadata of an error that reports the outcome of the call; see `admin.proto`.
pub(crate) const OUTCOME: &str = "relatch-outcome";
/// The [`OUTCOME`] of a call that has handed out nothing, and will not.
pub(crate) const WITHDRAWN: &str = "withdrawn";
/// The [`OUTCOME`] of a call whose change is committed, and not confirmed by every sidecar.
pub(crate) const COMMITTED: &str = "committed";

/// The metadata of an error that reports which sidecars did not confirm; see `admin.proto`.
pub(crate) const MISSING: &str = "relatch-missing-bin";

/// The descriptors of all of `proto/`, for reflection.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));

impl Timestamp {
    /// The form on the wire.
    #[must_use]
    pub fn to_wire(self) -> prost_types::Timestamp {
        std::time::SystemTime::from(self).into()
    }
}

impl fmt::Debug for discovery::Pepper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Pepper {{ id: {}, secret: redacted }}", self.id)
    }
}

impl fmt::Debug for admin::IssuedKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IssuedKey")
            .field("keyring", &self.keyring)
            .field("key_id", &self.key_id)
            .field("version", &self.version)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for admin::ImportKeyRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ImportKeyRequest")
            .field("key", &self.key)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for admin::CreateTokenResponse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CreateTokenResponse")
            .field("token", &self.token)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for admin::ExplainRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ExplainRequest")
            .field("keyring", &self.keyring)
            .finish_non_exhaustive()
    }
}

/// Without the URL of the webhook, because it may contain a token.
impl fmt::Debug for admin::Webhook {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Webhook")
            .field("keyring", &self.keyring)
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for admin::AddWebhookRequest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AddWebhookRequest")
            .field("keyring", &self.keyring)
            .finish_non_exhaustive()
    }
}

impl fmt::Debug for admin::AddWebhookResponse {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("AddWebhookResponse")
            .field("webhook", &self.webhook)
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::admin;

    #[test]
    fn credentials_and_addresses_of_webhooks_do_not_print() {
        let webhook = admin::Webhook {
            url: "https://example.com/hooks/t0ken".to_owned(),
            ..admin::Webhook::default()
        };
        let printed = [
            format!("{webhook:?}"),
            format!(
                "{:?}",
                admin::AddWebhookRequest {
                    url: webhook.url.clone(),
                    ..admin::AddWebhookRequest::default()
                }
            ),
            format!(
                "{:?}",
                admin::AddWebhookResponse {
                    webhook: Some(webhook),
                    signing_secret: "t0ken".to_owned(),
                }
            ),
            format!(
                "{:?}",
                admin::ExplainRequest {
                    credential: "t0ken".to_owned(),
                    ..admin::ExplainRequest::default()
                }
            ),
        ];
        for text in printed {
            assert!(!text.contains("t0ken"), "{text}");
        }
    }
}
