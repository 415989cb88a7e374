//! The signature of a request to a webhook, as in Standard Webhooks 1.0.0
//! (<https://github.com/standard-webhooks/standard-webhooks>).

use std::fmt;

use base64::{Engine as _, engine::general_purpose::STANDARD};
use hmac::{Hmac, KeyInit, Mac};
use http::{HeaderMap, HeaderName, HeaderValue};
use sha2::Sha256;
use zeroize::Zeroizing;

use crate::key::{MasterPepper, Pepper, Timestamp, WebhookId};

/// The secret that signs a webhook's requests. Its receiver knows it too. Zeroized on drop.
#[derive(Clone)]
pub struct SigningSecret(Zeroizing<[u8; Pepper::LEN]>);

/// The header with the event's id, which is the same in every attempt.
pub(crate) const ID: HeaderName = HeaderName::from_static("webhook-id");
/// The header with the time of the attempt, in whole seconds since the Unix epoch.
pub(crate) const TIMESTAMP: HeaderName = HeaderName::from_static("webhook-timestamp");
/// The header with the signature of id, timestamp and body.
pub(crate) const SIGNATURE: HeaderName = HeaderName::from_static("webhook-signature");

/// The prefix by which people and tools recognize a secret of this kind.
const PREFIX: &str = "whsec_";

impl SigningSecret {
    /// Derives the secret of one webhook.
    #[must_use]
    pub(crate) fn of(pepper: &MasterPepper, webhook: WebhookId) -> Self {
        Self(pepper.for_webhook(webhook))
    }

    /// Returns the secret in the form for its receiver, `whsec_` and base64. To be shown once.
    #[must_use]
    pub fn expose(&self) -> Zeroizing<String> {
        let mut text = Zeroizing::new(String::with_capacity(64));
        text.push_str(PREFIX);
        STANDARD.encode_string(self.0.as_slice(), &mut text);
        text
    }

    /// Returns the headers that sign `body`, sent at `now` for the event `id`.
    #[must_use]
    pub fn headers(&self, id: &str, now: Timestamp, body: &[u8]) -> HeaderMap {
        let seconds = (now.as_millis() / 1_000).to_string();
        let signature = sign(self.0.as_slice(), id, &seconds, body);
        [(ID, id), (TIMESTAMP, &seconds), (SIGNATURE, &signature)]
            .into_iter()
            .map(|(name, value)| {
                let value = HeaderValue::from_str(value).expect("ids and signatures are printable");
                (name, value)
            })
            .collect()
    }
}

impl fmt::Debug for SigningSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SigningSecret(redacted)")
    }
}

fn sign(secret: &[u8], id: &str, timestamp: &str, body: &[u8]) -> String {
    let mut mac = Hmac::<Sha256>::new_from_slice(secret).expect("HMAC takes a key of any length");
    for part in [id.as_bytes(), b".", timestamp.as_bytes(), b".", body] {
        mac.update(part);
    }
    format!("v1,{}", STANDARD.encode(mac.finalize().into_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::PepperId;

    fn secret() -> SigningSecret {
        let pepper = MasterPepper::new(PepperId::new(1), &[7; 32]).expect("32 bytes");
        SigningSecret::of(&pepper, "7Qm2Xc91TbKe".parse().expect("an id"))
    }

    #[test]
    fn the_published_example_is_signed_as_published() {
        let secret = STANDARD
            .decode("MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
            .expect("base64");
        let id = "msg_p5jXN8AQM9LWM0D4loKWxJek";
        let signature = sign(&secret, id, "1614265330", b"{\"test\": 2432232314}");
        assert_eq!(signature, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }

    #[test]
    fn headers_are_signed_with_the_secret_that_is_shown() {
        let text = secret().expose();
        let shown = STANDARD.decode(text.strip_prefix(PREFIX).expect("the prefix"));
        let shown = shown.expect("base64");
        assert_eq!(shown.len(), 32);
        let now = Timestamp::from_millis(1_614_265_330_999);
        let headers = secret().headers("payments-1-2", now, b"{}");
        assert_eq!(headers[ID], "payments-1-2");
        assert_eq!(headers[TIMESTAMP], "1614265330");
        let expected = sign(&shown, "payments-1-2", "1614265330", b"{}");
        assert_eq!(headers[SIGNATURE], expected);
    }

    #[test]
    fn secrets_do_not_print() {
        assert_eq!(format!("{:?}", secret()), "SigningSecret(redacted)");
    }
}
