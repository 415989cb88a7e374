//! Converts the logs of keyrings to deliveries.
//!
//! Each log has a cursor in the store, which moves together with the deliveries that it causes. A
//! projector whose cursor was moved by another replica reads the cursor again.

use std::{collections::BTreeMap, error::Error, sync::Arc};

use super::event::Event;
use crate::{
    control::{
        catalog::Catalog,
        journal::{self, LogError},
        served::ServedKeyring,
    },
    key::{Change, KeyringName, Revision, Webhook, WebhookId},
    store::{LogEntry, LogName, MAX_PAGE, NewDelivery, Store},
};

/// Reads the logs of all keyrings.
#[derive(Debug)]
pub(crate) struct Projector {
    catalog: Arc<Catalog>,
    /// The last known cursor of each log. Another replica may be further.
    cursors: BTreeMap<KeyringName, Revision>,
}

/// The webhooks that receive deliveries from one pass.
struct Audience<'a> {
    webhooks: &'a BTreeMap<WebhookId, Webhook>,
    /// The revisions at which webhooks were added after the revision from which the pass starts. A
    /// webhook receives no change from before it was added.
    added: &'a BTreeMap<WebhookId, Revision>,
}

/// The kind of [`Change::WebhookAdded`] in the log.
const WEBHOOK_ADDED: &str = "webhook_added";
/// The most entries in one step: with the most webhooks of a keyring, ten thousand deliveries at
/// once, which take well under a second to write.
const PAGE: usize = 100;
/// Without webhooks there are no deliveries, and the cursor moves only in steps of this many
/// entries: keyrings without webhooks cost no writes. After a webhook is added, up to ten pages are
/// read before its first event.
const LAZY: u64 = 1_000;

impl Projector {
    /// Creates a projector of all keyrings.
    #[must_use]
    pub(crate) const fn new(catalog: Arc<Catalog>) -> Self {
        Self {
            catalog,
            cursors: BTreeMap::new(),
        }
    }

    /// Stores the deliveries of all changes so far. A failure is logged for its keyring, and the
    /// next call retries it.
    pub(crate) async fn follow(&mut self) {
        for served in self.catalog.list() {
            if let Err(error) = self.follow_one(&served).await {
                tracing::error!(
                    auth.keyring = %served.name(),
                    error = &error as &dyn Error,
                    "events of the keyring cannot be delivered to webhooks; the control plane retries"
                );
            }
        }
    }

    async fn follow_one(&mut self, served: &ServedKeyring) -> Result<(), LogError> {
        let name = served.name();
        let log = LogName::Keyring(name.clone());
        let store = Arc::clone(self.catalog.store());
        // Read together, so that these are the webhooks of exactly this revision. A later change
        // causes another call.
        let (held, webhooks) = {
            let state = served.journal().state();
            (state.keyring.revision(), state.keyring.webhooks().clone())
        };
        let mut added = None;
        loop {
            let from = match self.cursors.get(name) {
                Some(cursor) => *cursor,
                None => store.outbox_cursor(&log).await?,
            };
            self.cursors.insert(name.clone(), from);
            if from >= held || (webhooks.is_empty() && from.behind(held) < LAZY) {
                return Ok(());
            }
            let (to, rows) = if webhooks.is_empty() {
                (held, Vec::new())
            } else {
                let added = match &mut added {
                    Some(added) => added,
                    none => none.insert(additions(&*store, &log, from, held).await?),
                };
                let page = store.read(&log, from, PAGE).await?;
                let told = Audience {
                    webhooks: &webhooks,
                    added,
                };
                told.deliveries(served, &page, held)?
            };
            if store.project(&log, from, to, rows).await? {
                self.cursors.insert(name.clone(), to);
            } else {
                self.cursors.remove(name);
            }
        }
    }
}

impl Audience<'_> {
    /// Returns the deliveries of the entries of `page` up to revision `held`, and the revision of
    /// the last of these entries.
    fn deliveries(
        &self,
        served: &ServedKeyring,
        page: &[LogEntry],
        held: Revision,
    ) -> Result<(Revision, Vec<NewDelivery>), LogError> {
        let (mut to, mut rows) = (held, Vec::new());
        for entry in page.iter().filter(|entry| entry.revision <= held) {
            let revision = entry.revision;
            to = revision;
            let change: Change = journal::decode(entry)?;
            let event = {
                let state = served.journal().state();
                Event::of(&state.keyring, served.epoch(), revision, entry.at, &change)
            };
            let Some(event) = event else {
                continue;
            };
            let body = event.to_json();
            let of = self.webhooks.values().filter(|webhook| {
                let consumer = event.data.consumer.as_ref();
                consumer.is_some_and(|consumer| webhook.wants(event.kind, consumer))
                    && self.added.get(&webhook.id).is_none_or(|at| *at < revision)
            });
            rows.extend(of.map(|webhook| NewDelivery {
                webhook: webhook.id.to_string(),
                event: event.id.clone(),
                keyring: served.name().clone(),
                revision,
                kind: event.kind.to_string(),
                body: body.clone(),
                created_at: entry.at,
            }));
        }
        Ok((to, rows))
    }
}

/// Returns the webhooks that were added after revision `from` up to `held`, with the revision of
/// each.
async fn additions(
    store: &dyn Store,
    log: &LogName,
    from: Revision,
    held: Revision,
) -> Result<BTreeMap<WebhookId, Revision>, LogError> {
    let (mut added, mut after) = (BTreeMap::new(), from);
    while after < held {
        let page = store.read(log, after, MAX_PAGE).await?;
        let Some(last) = page.last() else {
            break;
        };
        after = last.revision;
        for entry in page.iter().filter(|entry| entry.kind == WEBHOOK_ADDED) {
            if let Change::WebhookAdded { webhook } = journal::decode(entry)? {
                added.insert(webhook.id, entry.revision);
            }
        }
    }
    Ok(added)
}
