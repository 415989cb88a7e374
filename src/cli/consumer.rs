//! `relatch consumer`: creates and shows consumers.

use clap::{Args, Subcommand};
use serde::Serialize;

use super::{
    Session,
    connection::answer,
    convert,
    failure::Failure,
    output::{self, Listing, Row, View},
    words,
};
use crate::{
    key::{ConsumerId, KeyringName, Timestamp},
    proto::admin,
};

/// The commands of `consumer`.
#[derive(Debug, Subcommand)]
pub enum ConsumerCommand {
    /// Create a consumer
    Create(CreateArgs),
    /// List the consumers of a keyring
    List(ListArgs),
    /// Show one consumer and its keys
    Show(ShowArgs),
}

/// The arguments of `consumer create`.
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// Id of the consumer, unique within the keyring: 1 to 128 of A-Z, a-z, 0-9 and . _ - : @ /
    consumer: ConsumerId,

    /// Keyring of the consumer
    #[arg(long)]
    keyring: KeyringName,

    /// Display name [default: none]
    #[arg(long)]
    name: Option<String>,
}

/// The arguments of `consumer list`.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// Keyring whose consumers to list
    #[arg(long)]
    keyring: KeyringName,
}

/// The arguments of `consumer show`.
#[derive(Debug, Args)]
pub struct ShowArgs {
    /// Id of the consumer
    consumer: ConsumerId,

    /// Keyring of the consumer
    #[arg(long)]
    keyring: KeyringName,
}

#[derive(Debug, Serialize)]
struct ConsumerView {
    keyring: String,
    consumer: String,
    name: String,
    created_at: Option<Timestamp>,
    key_ids: Vec<String>,
}

impl ConsumerCommand {
    /// Runs the command.
    ///
    /// # Errors
    ///
    /// When the control plane cannot be reached or refuses.
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        let mut admin = session.admin().await?;
        match self {
            Self::Create(args) => {
                let consumer = answer(admin.create_consumer(args.into_request())).await?;
                session.show(&ConsumerView::from(consumer))
            }
            Self::List(args) => {
                let keyring = args.keyring.as_str().to_owned();
                let request = admin::ListConsumersRequest { keyring };
                let list = answer(admin.list_consumers(request)).await?;
                let consumers = list.consumers.into_iter().map(ConsumerView::from);
                session.show(&Listing(consumers.collect()))
            }
            Self::Show(args) => {
                let request = admin::GetConsumerRequest {
                    keyring: args.keyring.as_str().to_owned(),
                    consumer: args.consumer.as_str().to_owned(),
                };
                let consumer = answer(admin.get_consumer(request)).await?;
                session.show(&ConsumerView::from(consumer))
            }
        }
    }
}

impl CreateArgs {
    fn into_request(self) -> admin::CreateConsumerRequest {
        admin::CreateConsumerRequest {
            keyring: self.keyring.as_str().to_owned(),
            consumer: self.consumer.as_str().to_owned(),
            name: self.name.unwrap_or_default(),
        }
    }
}

impl From<admin::Consumer> for ConsumerView {
    fn from(consumer: admin::Consumer) -> Self {
        Self {
            keyring: consumer.keyring,
            consumer: consumer.consumer,
            name: consumer.name,
            created_at: convert::timestamp(consumer.created_at),
            key_ids: consumer.key_ids,
        }
    }
}

impl View for ConsumerView {
    fn render(&self, _now: Timestamp) -> String {
        output::facts(&[
            ("KEYRING", self.keyring.clone()),
            ("CONSUMER", self.consumer.clone()),
            ("NAME", words::or_nothing(&self.name)),
            ("CREATED", words::time(self.created_at)),
            ("KEYS", words::or_nothing(&self.key_ids.join(" "))),
        ])
    }
}

impl Row for ConsumerView {
    const TITLES: &[&str] = &["CONSUMER", "NAME", "KEYS", "CREATED"];

    fn cells(&self, _now: Timestamp) -> Vec<Vec<String>> {
        vec![vec![
            self.consumer.clone(),
            words::or_nothing(&self.name),
            self.key_ids.len().to_string(),
            words::time(self.created_at),
        ]]
    }
}

#[cfg(test)]
mod tests {
    use super::{super::output::tests::fits, *};

    #[test]
    fn consumers_are_listed_with_the_number_of_their_keys() {
        let view = ConsumerView::from(admin::Consumer {
            keyring: "payments".to_owned(),
            consumer: "acme".to_owned(),
            name: String::new(),
            created_at: None,
            key_ids: vec!["7Qm2Xc91TbKe".to_owned(), "0123456789ab".to_owned()],
        });
        assert_eq!(
            serde_json::to_string(&view).expect("serializable"),
            r#"{"keyring":"payments","consumer":"acme","name":"","created_at":null,"key_ids":["7Qm2Xc91TbKe","0123456789ab"]}"#
        );
        assert_eq!(
            fits(Listing(vec![view]).render(Timestamp::from_millis(0))),
            "CONSUMER  NAME  KEYS  CREATED\nacme      -     2     -\n"
        );
    }
}
