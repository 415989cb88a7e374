//! `relatch webhook`: creates, shows, tests and deletes webhooks.

use std::time::Duration;

use clap::{Args, Subcommand};
use serde::Serialize;

use super::{
    Session,
    connection::{Admin, answer},
    convert,
    failure::{Exit, Failure, required},
    idempotency::{IdempotencyArgs, answered, not_shown},
    output::{self, Listing, Row, View},
    secret::{Revealed, SecretInput},
    value::WebhookIdParser,
    words,
};
use crate::{
    key::{
        ConsumerId, IdempotencyKey, KeyringName, Timestamp,
        webhook::{EventKind, WebhookId},
    },
    proto::admin,
};

/// The commands of `webhook`.
#[derive(Debug, Subcommand)]
pub enum WebhookCommand {
    /// Create a webhook: send events about keys to a URL, and print the signing secret once
    ///
    /// The control plane sends each event in the CloudEvents format, in a POST request that is signed as Standard Webhooks
    /// specifies, and retries until it is delivered or given up. The receiver verifies the signature with the signing
    /// secret.
    // The usage that clap generates is wider than a terminal.
    #[command(
        after_help = ADD_EXAMPLES,
        override_usage = "relatch webhook add [OPTIONS] --keyring <KEYRING>\n    \
                          <--url <URL>|--url-file <PATH>>"
    )]
    Add(AddArgs),
    /// List webhooks
    List(ListArgs),
    /// Delete a webhook
    Remove(OneArgs),
    /// Send an event of type webhook.test, and show the result
    ///
    /// The exit code is 1 if the event was not delivered. The control plane does not retry it.
    #[command(after_help = TEST_EXAMPLES)]
    Test(OneArgs),
    /// List sent and waiting events, newest first
    #[command(after_help = DELIVERIES_EXAMPLES)]
    Deliveries(DeliveriesArgs),
}

/// The arguments of `webhook add`.
#[derive(Debug, Args)]
pub struct AddArgs {
    /// Keyring whose events to send
    #[arg(long)]
    keyring: KeyringName,

    #[command(flatten)]
    address: AddressArgs,

    /// Send only events about keys of this consumer [default: all consumers]
    #[arg(long)]
    consumer: Option<ConsumerId>,

    /// Event to send, for example rotation.started; may be repeated [default: all events]
    #[arg(long = "event", value_name = "EVENT")]
    events: Vec<EventKind>,

    /// Allow a URL on a private network, or with plain http
    #[arg(long)]
    allow_private: bool,

    #[command(flatten)]
    idempotency: IdempotencyArgs,
}

/// The URL for events.
#[derive(Args)]
#[group(required = true, multiple = false)]
struct AddressArgs {
    /// URL to send events to; if it contains a token, use --url-file, because other processes can read arguments
    #[arg(long)]
    url: Option<String>,

    /// File that contains the URL, or - for standard input
    #[arg(long, value_name = "PATH")]
    url_file: Option<SecretInput>,
}

/// The arguments of `webhook list`.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// List only the webhooks of this keyring [default: all keyrings]
    #[arg(long)]
    keyring: Option<KeyringName>,
}

/// One webhook.
#[derive(Debug, Args)]
pub struct OneArgs {
    /// Keyring of the webhook [default: the keyring that has a webhook with this id]
    #[arg(long)]
    keyring: Option<KeyringName>,

    /// Id of the webhook, as `relatch webhook list` shows it
    #[arg(value_name = "ID", value_parser = WebhookIdParser)]
    id: WebhookId,
}

/// The arguments of `webhook deliveries`.
#[derive(Debug, Args)]
pub struct DeliveriesArgs {
    /// Keyring of the webhooks
    #[arg(long)]
    keyring: KeyringName,

    /// List only events of this webhook: an id as `relatch webhook list` shows it [default: all webhooks]
    #[arg(long, value_name = "ID", value_parser = WebhookIdParser)]
    webhook: Option<WebhookId>,

    /// Maximum number of events to list, up to 1000
    #[arg(
        long,
        value_name = "N",
        default_value_t = 100,
        value_parser = clap::value_parser!(u32).range(1..=1_000)
    )]
    limit: u32,
}

#[derive(Serialize)]
struct WebhookView {
    id: String,
    keyring: String,
    url: String,
    /// The consumer whose events are sent; null: all consumers.
    consumer: Option<String>,
    /// The events that are sent; empty: all events.
    events: Vec<String>,
    allow_private: bool,
    created_at: Option<Timestamp>,
}

/// A new webhook.
#[derive(Serialize)]
struct AddedView {
    #[serde(flatten)]
    webhook: WebhookView,
    /// The signing secret, with which the receiver verifies signatures. It is shown only once.
    signing_secret: Option<Revealed>,
}

/// The result of a test.
#[derive(Debug, Serialize)]
struct TestView {
    delivered: bool,
    /// The HTTP status; null if there was no answer.
    http_status: Option<u32>,
    /// The problem; null if there was none.
    problem: Option<String>,
    took_seconds: Option<f64>,
}

/// An event for a webhook, sent or waiting.
#[derive(Debug, Serialize)]
struct DeliveryView {
    webhook_id: String,
    event_id: String,
    event: String,
    created_at: Option<Timestamp>,
    /// `waiting`, `delivered` or `given_up`.
    state: String,
    attempts: u32,
    /// The time of the next attempt; null if there is none.
    next_attempt_at: Option<Timestamp>,
    /// The HTTP status of the last attempt; null if there was no answer.
    last_http_status: Option<u32>,
    last_problem: Option<String>,
}

const ADD_EXAMPLES: &str = "\
Examples:
  Send a consumer the events about its keys; write the signing secret to a file:
    (umask 077; relatch webhook add --keyring payments --consumer acme \\
      --url https://hooks.example.com/relatch -o json \\
      | jq -r .signing_secret > acme.hook)

Events: rotation.started, rotation.reminder, rotation.drained, rotation.held,
rotation.secret_lost, rotation.retired, rotation.rolled_back, rotation.due,
key.revoked, key.expiring.

Requires role admin.";

const TEST_EXAMPLES: &str = "\
Example:
  relatch webhook test 4fK0pQz81LmN -o table

Exit codes: 0 delivered, 1 not delivered.";

const DELIVERIES_EXAMPLES: &str = "\
Example:
  List the events that were given up:
    relatch webhook deliveries --keyring payments --limit 1000 -o json \\
      | jq '.[] | select(.state == \"given_up\")'";

impl WebhookCommand {
    /// Runs the command, and returns [`Exit::Failed`] for a test that was not delivered.
    ///
    /// # Errors
    ///
    /// When the control plane cannot be reached or refuses.
    pub async fn run(self, session: &Session) -> Result<Exit, Failure> {
        match self {
            Self::Add(args) => {
                let key = args.idempotency.key()?;
                let request = args.into_request(&key)?;
                let added = answered(session, &key, async |mut admin: Admin| {
                    answer(admin.add_webhook(request.clone())).await
                });
                let view = AddedView::try_from(added.await?)?;
                session
                    .show(&view)
                    .map_err(|failure| not_shown(failure, &key))?;
            }
            Self::List(args) => {
                let mut admin = session.admin().await?;
                let keyring = args.keyring.map(String::from).unwrap_or_default();
                let request = admin::ListWebhooksRequest { keyring };
                let list = answer(admin.list_webhooks(request)).await?;
                let webhooks = list.webhooks.into_iter().map(WebhookView::from);
                session.show(&Listing(webhooks.collect()))?;
            }
            Self::Remove(args) => {
                let mut admin = session.admin().await?;
                let (keyring, id) = args.find(&mut admin).await?;
                let request = admin::RemoveWebhookRequest { keyring, id };
                let removed = answer(admin.remove_webhook(request)).await?;
                session.show(&WebhookView::from(removed))?;
                session
                    .output
                    .note("the webhook was deleted: it receives no more events");
            }
            Self::Test(args) => {
                let mut admin = session.admin().await?;
                let (keyring, id) = args.find(&mut admin).await?;
                let request = admin::TestWebhookRequest { keyring, id };
                let view = TestView::from(answer(admin.test_webhook(request)).await?);
                session.show(&view)?;
                return Ok(view.exit());
            }
            Self::Deliveries(args) => {
                let mut admin = session.admin().await?;
                let list = answer(admin.list_deliveries(args.into_request())).await?;
                let deliveries = list.deliveries.into_iter().map(DeliveryView::from);
                session.show(&Listing(deliveries.collect()))?;
            }
        }
        Ok(Exit::Done)
    }
}

impl AddArgs {
    fn into_request(
        self,
        idempotency_key: &IdempotencyKey,
    ) -> Result<admin::AddWebhookRequest, Failure> {
        Ok(admin::AddWebhookRequest {
            keyring: self.keyring.into(),
            url: self.address.read()?,
            consumer: self.consumer.map(String::from).unwrap_or_default(),
            events: self.events.iter().map(ToString::to_string).collect(),
            allow_private: self.allow_private,
            idempotency_key: idempotency_key.as_str().to_owned(),
        })
    }
}

impl AddressArgs {
    fn read(self) -> Result<String, Failure> {
        let Some(file) = self.url_file else {
            return Ok(self.url.unwrap_or_default());
        };
        let bytes = file.read("URL", "--url-file")?;
        let url = std::str::from_utf8(&bytes)
            .map_err(|_| Failure::usage(format!("{file} does not contain a URL")))?;
        Ok(url.to_owned())
    }
}

/// Without the URL, because it may contain a token.
impl std::fmt::Debug for AddressArgs {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("AddressArgs")
            .field("url_file", &self.url_file)
            .finish_non_exhaustive()
    }
}

impl OneArgs {
    /// The keyring and the id of the webhook.
    ///
    /// # Errors
    ///
    /// When no keyring is given, and none has such a webhook.
    async fn find(self, admin: &mut Admin) -> Result<(String, String), Failure> {
        let id = String::from(self.id);
        if let Some(keyring) = self.keyring {
            return Ok((keyring.into(), id));
        }
        let everywhere = admin::ListWebhooksRequest::default();
        let list = answer(admin.list_webhooks(everywhere)).await?;
        Ok((keyring_of(&id, list.webhooks)?, id))
    }
}

impl DeliveriesArgs {
    fn into_request(self) -> admin::ListDeliveriesRequest {
        admin::ListDeliveriesRequest {
            keyring: self.keyring.into(),
            webhook_id: self.webhook.map(String::from).unwrap_or_default(),
            limit: self.limit,
        }
    }
}

impl From<admin::Webhook> for WebhookView {
    fn from(webhook: admin::Webhook) -> Self {
        Self {
            id: webhook.id,
            keyring: webhook.keyring,
            url: webhook.url,
            consumer: Some(webhook.consumer).filter(|consumer| !consumer.is_empty()),
            events: webhook.events,
            allow_private: webhook.allow_private,
            created_at: convert::timestamp(webhook.created_at),
        }
    }
}

impl TryFrom<admin::AddWebhookResponse> for AddedView {
    type Error = Failure;

    fn try_from(added: admin::AddWebhookResponse) -> Result<Self, Failure> {
        Ok(Self {
            webhook: required(added.webhook, "webhook")?.into(),
            signing_secret: Revealed::new(added.signing_secret),
        })
    }
}

impl From<admin::TestWebhookResponse> for TestView {
    fn from(test: admin::TestWebhookResponse) -> Self {
        Self {
            delivered: test.delivered,
            http_status: Some(test.status).filter(|&status| status != 0),
            problem: Some(test.problem).filter(|problem| !problem.is_empty()),
            took_seconds: convert::duration(test.took).map(|took| took.as_secs_f64()),
        }
    }
}

impl From<admin::Delivery> for DeliveryView {
    fn from(delivery: admin::Delivery) -> Self {
        Self {
            webhook_id: delivery.webhook_id,
            event_id: delivery.event_id,
            event: delivery.event,
            created_at: convert::timestamp(delivery.created_at),
            state: delivery.state,
            attempts: delivery.attempts,
            next_attempt_at: convert::timestamp(delivery.next_attempt_at),
            last_http_status: Some(delivery.last_status).filter(|&status| status != 0),
            last_problem: Some(delivery.last_problem).filter(|problem| !problem.is_empty()),
        }
    }
}

impl WebhookView {
    fn consumers(&self) -> String {
        self.consumer.clone().unwrap_or_else(|| "all".to_owned())
    }

    fn events(&self) -> String {
        if self.events.is_empty() {
            "all".to_owned()
        } else {
            self.events.join(" ")
        }
    }

    /// The number of events that it receives: their names would not fit into a table.
    fn count(&self) -> String {
        match self.events.len() {
            0 => "all".to_owned(),
            count => count.to_string(),
        }
    }
}

impl View for WebhookView {
    fn render(&self, _now: Timestamp) -> String {
        output::facts(&[
            ("ID", self.id.clone()),
            ("KEYRING", self.keyring.clone()),
            ("URL", self.url.clone()),
            ("CONSUMER", self.consumers()),
            ("EVENTS", self.events()),
            ("PRIVATE", words::yes_no(self.allow_private)),
            ("CREATED", words::time(self.created_at)),
        ])
    }
}

impl Row for WebhookView {
    const TITLES: &[&str] = &["ID", "KEYRING", "CONSUMER", "EVENTS", "URL"];

    fn cells(&self, _now: Timestamp) -> Vec<Vec<String>> {
        vec![vec![
            self.id.clone(),
            self.keyring.clone(),
            self.consumers(),
            self.count(),
            self.url.clone(),
        ]]
    }
}

impl View for AddedView {
    fn render(&self, now: Timestamp) -> String {
        self.webhook.render(now)
    }

    fn secret(&self) -> Option<&Revealed> {
        self.signing_secret.as_ref()
    }
}

impl TestView {
    const fn exit(&self) -> Exit {
        if self.delivered {
            Exit::Done
        } else {
            Exit::Failed
        }
    }
}

impl View for TestView {
    fn render(&self, _now: Timestamp) -> String {
        let took = self
            .took_seconds
            .map(|seconds| words::took(Duration::try_from_secs_f64(seconds).unwrap_or_default()));
        output::facts(&[
            ("DELIVERED", words::yes_no(self.delivered)),
            ("STATUS", number(self.http_status)),
            (
                "PROBLEM",
                words::or_nothing(self.problem.as_deref().unwrap_or_default()),
            ),
            ("TOOK", took.unwrap_or_else(|| words::NOTHING.to_owned())),
        ])
    }
}

impl Row for DeliveryView {
    const TITLES: &[&str] = &[
        "AGE", "EVENT", "WEBHOOK", "STATE", "TRIES", "NEXT", "PROBLEM",
    ];

    fn cells(&self, now: Timestamp) -> Vec<Vec<String>> {
        let age = self.created_at.map(|created| words::age(created, now));
        vec![vec![
            age.unwrap_or_else(|| words::NOTHING.to_owned()),
            self.event.clone(),
            self.webhook_id.clone(),
            self.state.clone(),
            self.attempts.to_string(),
            words::when(self.next_attempt_at, now),
            words::or_nothing(self.last_problem.as_deref().unwrap_or_default()),
        ]]
    }
}

/// The one keyring that has a webhook with this id.
fn keyring_of(id: &str, webhooks: Vec<admin::Webhook>) -> Result<String, Failure> {
    let mut found = webhooks.into_iter().filter(|webhook| webhook.id == id);
    match (found.next(), found.next()) {
        (Some(webhook), None) => Ok(webhook.keyring),
        (Some(one), Some(other)) => Err(Failure::usage(format!(
            "keyrings {} and {} both have a webhook {id}",
            one.keyring, other.keyring
        ))
        .hint("use --keyring NAME to choose one")),
        (None, _) => Err(Failure::failed(format!("webhook {id} does not exist"))
            .exit_with(Exit::NotFound)
            .hint("`relatch webhook list` shows the webhooks")),
    }
}

fn number(number: Option<u32>) -> String {
    number.map_or_else(|| words::NOTHING.to_owned(), |number| number.to_string())
}

#[cfg(test)]
mod tests {
    use clap::{Parser, error::ErrorKind};

    use super::{
        super::{Cli, Command, output::tests::fits},
        *,
    };

    fn at(seconds: i64) -> prost_types::Timestamp {
        prost_types::Timestamp { seconds, nanos: 0 }
    }

    fn webhook() -> admin::Webhook {
        admin::Webhook {
            id: "4fK0pQz81LmN".to_owned(),
            keyring: "payments".to_owned(),
            url: "https://hooks.example.com/t0ken".to_owned(),
            consumer: "acme".to_owned(),
            events: vec!["rotation.started".to_owned(), "key.revoked".to_owned()],
            allow_private: false,
            created_at: Some(at(1_767_225_600)),
        }
    }

    fn parse(line: &str) -> Result<WebhookCommand, clap::Error> {
        let line = format!("relatch webhook {line}");
        match Cli::try_parse_from(line.split(' '))?.command {
            Command::Webhook(client) => Ok(client.command),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_secret_of_a_new_webhook_is_shown_once() {
        let added = admin::AddWebhookResponse {
            webhook: Some(webhook()),
            signing_secret: "whsec_x".to_owned(),
        };
        let view = AddedView::try_from(added).expect("whole");
        assert_eq!(
            serde_json::to_string(&view).expect("serializable"),
            concat!(
                r#"{"id":"4fK0pQz81LmN","keyring":"payments","url":"https://hooks.example.com/t0ken","consumer":"acme","#,
                r#""events":["rotation.started","key.revoked"],"allow_private":false,"#,
                r#""created_at":"2026-01-01T00:00:00.000Z","signing_secret":"whsec_x"}"#,
            )
        );
        let table = view.render(Timestamp::from_millis(0));
        assert!(!table.contains("whsec_"), "{table}");
        assert_eq!(view.secret().map(Revealed::expose), Some("whsec_x"));
    }

    #[test]
    fn webhooks_are_listed_with_what_they_are_told_of() {
        let all = admin::Webhook {
            id: "7Qm2Xc91TbKe".to_owned(),
            consumer: String::new(),
            events: Vec::new(),
            ..webhook()
        };
        let list = Listing(vec![WebhookView::from(webhook()), all.into()]);
        assert_eq!(
            fits(list.render(Timestamp::from_millis(0))),
            "ID            KEYRING   CONSUMER  EVENTS  URL\n\
             4fK0pQz81LmN  payments  acme      2       https://hooks.example.com/t0ken\n\
             7Qm2Xc91TbKe  payments  all       all     https://hooks.example.com/t0ken\n"
        );
    }

    #[test]
    fn a_webhook_is_found_by_its_id_alone() {
        assert!(parse("test 4fK0pQz81LmN").is_ok());
        assert!(parse("remove 4fK0pQz81LmN --keyring payments").is_ok());
        let other = admin::Webhook {
            id: "7Qm2Xc91TbKe".to_owned(),
            keyring: "partners".to_owned(),
            ..webhook()
        };
        let twin = admin::Webhook {
            keyring: "partners".to_owned(),
            ..webhook()
        };
        let of = |webhooks: &[admin::Webhook]| keyring_of("4fK0pQz81LmN", webhooks.to_vec());
        assert_eq!(of(&[other.clone(), webhook()]).expect("one"), "payments");
        let missing = of(&[other]).expect_err("another one");
        assert_eq!(missing.exit(), Exit::NotFound);
        let both = of(&[webhook(), twin]).expect_err("two");
        assert_eq!(both.exit(), Exit::Usage);
        assert!(both.report(false).contains("--keyring"));
    }

    #[test]
    fn a_test_that_was_not_delivered_fails() {
        let view = TestView::from(admin::TestWebhookResponse {
            delivered: false,
            status: 503,
            problem: "status 503".to_owned(),
            took: Some(prost_types::Duration {
                seconds: 0,
                nanos: 38_000_000,
            }),
        });
        assert_eq!(view.exit(), Exit::Failed);
        assert_eq!(
            serde_json::to_string(&view).expect("serializable"),
            r#"{"delivered":false,"http_status":503,"problem":"status 503","took_seconds":0.038}"#
        );
        assert_eq!(
            view.render(Timestamp::from_millis(0)),
            "DELIVERED  no\nSTATUS     503\nPROBLEM    status 503\nTOOK       38 ms\n"
        );
        let delivered = admin::TestWebhookResponse {
            delivered: true,
            status: 204,
            ..admin::TestWebhookResponse::default()
        };
        assert_eq!(TestView::from(delivered).exit(), Exit::Done);
    }

    #[test]
    fn deliveries_say_when_they_are_tried_again() {
        let view = DeliveryView::from(admin::Delivery {
            webhook_id: "4fK0pQz81LmN".to_owned(),
            event_id: "payments-1-18".to_owned(),
            event: "rotation.started".to_owned(),
            created_at: Some(at(1_767_225_600)),
            state: "waiting".to_owned(),
            attempts: 2,
            next_attempt_at: Some(at(1_767_225_730)),
            last_status: 0,
            last_problem: "connection refused".to_owned(),
        });
        assert_eq!(
            serde_json::to_string(&view).expect("serializable"),
            concat!(
                r#"{"webhook_id":"4fK0pQz81LmN","event_id":"payments-1-18","event":"rotation.started","#,
                r#""created_at":"2026-01-01T00:00:00.000Z","state":"waiting","attempts":2,"#,
                r#""next_attempt_at":"2026-01-01T00:02:10.000Z","last_http_status":null,"#,
                r#""last_problem":"connection refused"}"#,
            )
        );
        let list = Listing(vec![view]);
        assert_eq!(
            fits(list.render(Timestamp::from_millis(1_767_225_610_000))),
            "AGE  EVENT             WEBHOOK       STATE    TRIES  NEXT   PROBLEM\n\
             10s  rotation.started  4fK0pQz81LmN  waiting  2      in 2m  connection refused\n"
        );
    }

    #[test]
    fn an_address_comes_by_argument_or_by_file_and_does_not_print() {
        let add = parse("add --keyring payments --url https://example.com/t0ken").expect("valid");
        assert!(!format!("{add:?}").contains("t0ken"));
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("url");
        std::fs::write(&path, "https://example.com/t0ken\n").expect("writable");
        let add = parse(&format!(
            "add --keyring payments --url-file {}",
            path.display()
        ));
        let WebhookCommand::Add(args) = add.expect("valid") else {
            panic!("it adds");
        };
        let key = "once".parse().expect("an idempotency key");
        let request = args.into_request(&key).expect("readable");
        assert_eq!(request.url, "https://example.com/t0ken");
        for (line, kind) in [
            ("add --keyring payments", ErrorKind::MissingRequiredArgument),
            (
                "add --keyring payments --url a --url-file b",
                ErrorKind::ArgumentConflict,
            ),
            (
                "add --keyring payments --url a --event rotation",
                ErrorKind::ValueValidation,
            ),
            (
                "deliveries --keyring payments --limit 1001",
                ErrorKind::ValueValidation,
            ),
        ] {
            assert_eq!(parse(line).expect_err(line).kind(), kind, "{line}");
        }
    }

    #[test]
    fn a_secret_in_the_place_of_an_id_is_not_repeated() {
        let error = parse("test --keyring payments whsec_MfKQ9r8GKYqrTwjU").expect_err("no id");
        assert_eq!(error.kind(), ErrorKind::ValueValidation);
        assert!(!error.to_string().contains("MfKQ9r8"), "{error}");
    }
}
