//! What may be asked of webhooks.

use super::Refusal;
use crate::key::{
    change::Change,
    keyring::Keyring,
    webhook::{MAX_WEBHOOKS, Webhook, WebhookId},
};

impl Keyring {
    /// Adds a webhook.
    ///
    /// # Errors
    ///
    /// When its consumer does not exist, its address cannot be, or there are as many as may be.
    pub fn add_webhook(&self, webhook: Webhook) -> Result<Vec<Change>, Refusal> {
        webhook.check()?;
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
    pub fn remove_webhook(&self, id: WebhookId) -> Result<Vec<Change>, Refusal> {
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
