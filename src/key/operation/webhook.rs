//! What may be asked of webhooks.

use super::Refusal;
use crate::key::{
    change::Change,
    keyring::Keyring,
    webhook::{Webhook, WebhookId},
};

/// The longest address of a webhook, in bytes.
const MAX_URL_LEN: usize = 2_048;
/// The most webhooks of a keyring: each gets a copy of every event.
const MAX_WEBHOOKS: usize = 100;

impl Keyring {
    /// Adds a webhook.
    ///
    /// # Errors
    ///
    /// When its consumer does not exist, its address cannot be, or there are as many as may be.
    pub fn add_webhook(&self, webhook: Webhook) -> Result<Vec<Change>, Refusal> {
        check(&webhook)?;
        if let Some(consumer) = &webhook.consumer
            && !self.consumers().contains_key(consumer)
        {
            return Err(Refusal::NotFound {
                what: "consumer",
                name: consumer.as_str().to_owned(),
            });
        }
        if self.webhooks().len() >= MAX_WEBHOOKS {
            return Err(Refusal::Unsafe(format!(
                "keyring {:?} has {MAX_WEBHOOKS} webhooks, the most that it may have; remove one first",
                self.name().as_str()
            )));
        }
        Ok(vec![Change::WebhookAdded { webhook }])
    }

    /// Removes a webhook.
    ///
    /// # Errors
    ///
    /// When it does not exist.
    pub(crate) fn remove_webhook(&self, id: WebhookId) -> Result<Vec<Change>, Refusal> {
        if self.webhooks().contains_key(&id) {
            Ok(vec![Change::WebhookRemoved { id }])
        } else {
            Err(Refusal::NotFound {
                what: "webhook",
                name: id.to_string(),
            })
        }
    }
}

/// Checks what needs no network.
fn check(webhook: &Webhook) -> Result<(), Refusal> {
    let scheme = ["https://", "http://"]
        .iter()
        .find_map(|scheme| webhook.url.strip_prefix(scheme));
    let authority = scheme.and_then(|rest| rest.split(['/', '?', '#']).next());
    let problem = match authority {
        None | Some("") => "give an address such as https://hooks.example.com/relatch",
        Some(authority) if authority.contains('@') => {
            "give it without user and password: it is shown to everybody who may look"
        }
        Some(_) if webhook.url.starts_with("http://") && !webhook.allow_private => {
            "use https; plain http is for endpoints on private addresses, with --allow-private"
        }
        Some(_) if webhook.url.contains('#') => "give it without a fragment",
        Some(_) if !webhook.url.bytes().all(|b| b.is_ascii_graphic()) => {
            "give printable ASCII without spaces"
        }
        Some(_) if webhook.url.len() > MAX_URL_LEN => "give at most 2048 bytes",
        Some(_) => return Ok(()),
    };
    Err(Refusal::Invalid {
        field: "url",
        problem: problem.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::key::Timestamp;

    fn webhook(url: &str, allow_private: bool) -> Webhook {
        Webhook {
            id: "7Qm2Xc91TbKe".parse().expect("an id"),
            url: url.to_owned(),
            consumer: None,
            events: BTreeSet::new(),
            allow_private,
            created_at: Timestamp::from_millis(0),
        }
    }

    #[test]
    fn addresses_that_cannot_be_are_refused() {
        let check_public = |url: &str| check(&webhook(url, false));
        assert_eq!(
            check_public("https://hooks.example.com/relatch?team=a"),
            Ok(())
        );
        let long = format!("https://example.com/{}", "x".repeat(MAX_URL_LEN));
        for url in [
            "",
            "hooks.example.com",
            "https://",
            "https:///path",
            "ftp://example.com",
            "https://user:password@example.com/",
            "https://example.com/#here",
            "https://example.com/with space",
            "http://example.com/",
            &long,
        ] {
            assert!(check_public(url).is_err(), "{url:?} was taken");
        }
        assert_eq!(check(&webhook("http://127.0.0.1:8080/", true)), Ok(()));
    }
}
