//! Turns the logs of keyrings into deliveries.
//!
//! Each log has a cursor in the store, which moves together with the deliveries that it leads to. Whoever finds it
//! moved by another replica reads it anew.

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

/// Walks the logs of all keyrings.
#[derive(Debug)]
pub(crate) struct Projector {
    catalog: Arc<Catalog>,
    /// How far each log was walked, as last seen. Another replica may be further.
    cursors: BTreeMap<KeyringName, Revision>,
}

/// The webhooks that get deliveries from one walk.
struct Audience<'a> {
    webhooks: &'a BTreeMap<WebhookId, Webhook>,
    /// The revisions at which webhooks were added after the one from which the walk starts. A webhook gets no change from
    /// before it was added.
    added: &'a BTreeMap<WebhookId, Revision>,
}

/// [`Change::WebhookAdded`] in the log.
const WEBHOOK_ADDED: &str = "webhook_added";
/// The most entries in one step: with the most webhooks of a keyring, ten thousand deliveries at once, which take well
/// under a second to write.
const PAGE: usize = 100;
/// Without webhooks nothing is to be made, and the cursor follows only in steps of so many entries, so that keyrings
/// without webhooks cost no writes. Whoever adds one then waits for a page or ten to be read.
const LAZY: u64 = 1_000;

impl Projector {
    /// A projector of all keyrings.
    #[must_use]
    pub(crate) const fn new(catalog: Arc<Catalog>) -> Self {
        Self {
            catalog,
            cursors: BTreeMap::new(),
        }
    }

    /// Makes the deliveries of all changes so far. A keyring of which that fails is logged, and tried again next time.
    pub(crate) async fn follow(&mut self) {
        for served in self.catalog.list() {
            if let Err(error) = self.follow_one(&served).await {
                tracing::error!(
                    auth.keyring = %served.name(),
                    error = &error as &dyn Error,
                    "events of the keyring cannot be delivered to webhooks; it is tried again"
                );
            }
        }
    }

    async fn follow_one(&mut self, served: &ServedKeyring) -> Result<(), LogError> {
        let name = served.name();
        let log = LogName::Keyring(name.clone());
        let store = Arc::clone(self.catalog.store());
        // One look, so that these are the webhooks of this very revision. What comes later wakes us again.
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
    /// The deliveries of the entries of `page` up to revision `held`, and the revision of the last of them.
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

/// The webhooks that were added after revision `from` up to `held`, and where.
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
