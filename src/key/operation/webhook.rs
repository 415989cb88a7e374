//! The operations on webhooks.

use super::OperationRefusal;
use crate::key::{
    change::Change,
    keyring::Keyring,
    webhook::{Webhook, WebhookId},
};

/// The maximum length of the URL of a webhook, in bytes.
const MAX_URL_LEN: usize = 2_048;
/// The maximum number of webhooks of a keyring. There is a limit because each webhook gets its own
/// copy of every event.
const MAX_WEBHOOKS: usize = 100;

impl Keyring {
    /// Adds a webhook.
    ///
    /// # Errors
    ///
    /// When its consumer does not exist, its URL is not valid, or the keyring has 100 webhooks.
    pub fn add_webhook(&self, webhook: Webhook) -> Result<Vec<Change>, OperationRefusal> {
        check(&webhook)?;
        if let Some(consumer) = &webhook.consumer
            && !self.consumers().contains_key(consumer)
        {
            return Err(OperationRefusal::NotFound {
                what: "consumer",
                name: consumer.as_str().to_owned(),
            });
        }
        if self.webhooks().len() >= MAX_WEBHOOKS {
            return Err(OperationRefusal::Unsafe(format!(
                "keyring {:?} has {MAX_WEBHOOKS} webhooks, the maximum; delete one first",
                self.name().as_str()
            )));
        }
        Ok(vec![Change::WebhookAdded { webhook }])
    }

    /// Removes a webhook.
    ///
    /// # Errors
    ///
    /// When the webhook does not exist.
    pub(crate) fn remove_webhook(&self, id: WebhookId) -> Result<Vec<Change>, OperationRefusal> {
        if self.webhooks().contains_key(&id) {
            Ok(vec![Change::WebhookRemoved { id }])
        } else {
            Err(OperationRefusal::NotFound {
                what: "webhook",
                name: id.to_string(),
            })
        }
    }
}

/// Checks the URL of a webhook, as far as that is possible without the network.
fn check(webhook: &Webhook) -> Result<(), OperationRefusal> {
    let scheme = ["https://", "http://"]
        .iter()
        .find_map(|scheme| webhook.url.strip_prefix(scheme));
    let authority = scheme.and_then(|rest| rest.split(['/', '?', '#']).next());
    let problem = match authority {
        None | Some("") => "use a URL such as https://hooks.example.com/relatch",
        Some(authority) if authority.contains('@') => {
            "remove the user and password: everyone who may list webhooks can read the URL"
        }
        Some(_) if webhook.url.starts_with("http://") && !webhook.allow_private => {
            "use https; plain http is for endpoints on private addresses, with --allow-private"
        }
        Some(_) if webhook.url.contains('#') => "remove the fragment: the part from '#' on",
        Some(_) if !webhook.url.bytes().all(|b| b.is_ascii_graphic()) => {
            "use printable ASCII without spaces"
        }
        Some(_) if webhook.url.len() > MAX_URL_LEN => "use at most 2048 bytes",
        Some(_) => return Ok(()),
    };
    Err(OperationRefusal::Invalid {
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
