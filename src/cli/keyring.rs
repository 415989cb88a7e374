//! `relatch keyring`: creates and shows keyrings.

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
    key::{KeyringName, Prefix, Timestamp},
    proto::admin,
};

/// The commands of `keyring`.
#[derive(Debug, Subcommand)]
pub enum KeyringCommand {
    /// Create a keyring
    Create(CreateArgs),
    /// List the keyrings
    List,
    /// Show one keyring
    Show(ShowArgs),
    /// Allow sidecars to load a snapshot that removes more than half of their versions
    ///
    /// If a keyring is much smaller after a restore from a backup, sidecars keep serving the versions that they have
    /// cached. Check the keyring with `relatch keyring show`. If it is correct, confirm its number of versions.
    Confirm(ConfirmArgs),
}

/// The arguments of `keyring create`.
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// Name of the keyring: 1 to 63 of a-z, 0-9 and '-', beginning with a letter
    name: KeyringName,

    /// Prefix of its keys; it may name the environment, for example rlk-test
    #[arg(long, default_value_t)]
    prefix: Prefix,

    /// Also accept imported keys of other systems; the format of keys is then not checked before they are hashed
    #[arg(long)]
    allow_imported: bool,

    /// Page for consumers whose key is about to retire; each response links to it [default: none]
    #[arg(long, value_name = "URL")]
    help_url: Option<String>,
}

/// The arguments of `keyring show`.
#[derive(Debug, Args)]
pub struct ShowArgs {
    /// Name of the keyring
    name: KeyringName,
}

/// The arguments of `keyring confirm`.
#[derive(Debug, Args)]
pub struct ConfirmArgs {
    /// Name of the keyring
    name: KeyringName,

    /// Number of versions of the keyring, as `relatch keyring show` reports it
    #[arg(long, value_name = "N")]
    versions: u64,
}

#[derive(Debug, Serialize)]
struct KeyringView {
    name: String,
    prefix: String,
    allow_imported: bool,
    revision: u64,
    epoch: u64,
    consumers: u64,
    keys: u64,
    versions: u64,
    created_at: Option<Timestamp>,
    help_url: Option<String>,
}

impl KeyringCommand {
    /// Runs the command.
    ///
    /// # Errors
    ///
    /// When the control plane cannot be reached or refuses.
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        let mut admin = session.admin().await?;
        match self {
            Self::Create(args) => {
                let keyring = answer(admin.create_keyring(args.into_request())).await?;
                session.show(&KeyringView::from(keyring))
            }
            Self::List => {
                let list = answer(admin.list_keyrings(admin::ListKeyringsRequest {})).await?;
                let keyrings = list.keyrings.into_iter().map(KeyringView::from).collect();
                session.show(&Listing(keyrings))
            }
            Self::Show(args) => {
                let name = args.name.as_str().to_owned();
                let keyring = answer(admin.get_keyring(admin::GetKeyringRequest { name })).await?;
                session.show(&KeyringView::from(keyring))
            }
            Self::Confirm(args) => {
                let request = admin::ConfirmSnapshotRequest {
                    keyring: args.name.as_str().to_owned(),
                    items: args.versions,
                };
                answer(admin.confirm_snapshot(request)).await?;
                session.output.note(&format!(
                    "sidecars may load a snapshot of keyring {1} with {0} versions",
                    args.versions, args.name
                ));
                Ok(())
            }
        }
    }
}

impl CreateArgs {
    fn into_request(self) -> admin::CreateKeyringRequest {
        admin::CreateKeyringRequest {
            name: self.name.as_str().to_owned(),
            prefix: self.prefix.as_str().to_owned(),
            allow_imported: self.allow_imported,
            help_url: self.help_url.unwrap_or_default(),
        }
    }
}

impl From<admin::Keyring> for KeyringView {
    fn from(keyring: admin::Keyring) -> Self {
        Self {
            name: keyring.name,
            prefix: keyring.prefix,
            allow_imported: keyring.allow_imported,
            revision: keyring.revision,
            epoch: keyring.epoch,
            consumers: keyring.consumers,
            keys: keyring.keys,
            versions: keyring.versions,
            created_at: convert::timestamp(keyring.created_at),
            help_url: Some(keyring.help_url).filter(|url| !url.is_empty()),
        }
    }
}

impl View for KeyringView {
    fn render(&self, _now: Timestamp) -> String {
        output::facts(&[
            ("NAME", self.name.clone()),
            ("PREFIX", self.prefix.clone()),
            ("IMPORTED KEYS", words::yes_no(self.allow_imported)),
            (
                "HELP",
                words::or_nothing(self.help_url.as_deref().unwrap_or_default()),
            ),
            ("CONSUMERS", self.consumers.to_string()),
            ("KEYS", self.keys.to_string()),
            ("VERSIONS", self.versions.to_string()),
            ("REVISION", self.revision.to_string()),
            ("EPOCH", self.epoch.to_string()),
            ("CREATED", words::time(self.created_at)),
        ])
    }
}

impl Row for KeyringView {
    const TITLES: &[&str] = &["NAME", "PREFIX", "CONSUMERS", "KEYS", "REVISION", "CREATED"];

    fn cells(&self, _now: Timestamp) -> Vec<Vec<String>> {
        vec![vec![
            self.name.clone(),
            self.prefix.clone(),
            self.consumers.to_string(),
            self.keys.to_string(),
            self.revision.to_string(),
            words::time(self.created_at),
        ]]
    }
}

#[cfg(test)]
mod tests {
    use super::{super::output::tests::fits, *};

    #[test]
    fn json_of_a_keyring() {
        let view = KeyringView::from(admin::Keyring {
            name: "payments".to_owned(),
            prefix: "rlk".to_owned(),
            allow_imported: false,
            revision: 18,
            epoch: 1,
            consumers: 2,
            keys: 3,
            created_at: None,
            help_url: String::new(),
            versions: 4,
        });
        assert_eq!(
            fits(view.render(Timestamp::from_millis(0))),
            "NAME           payments\n\
             PREFIX         rlk\n\
             IMPORTED KEYS  no\n\
             HELP           -\n\
             CONSUMERS      2\n\
             KEYS           3\n\
             VERSIONS       4\n\
             REVISION       18\n\
             EPOCH          1\n\
             CREATED        -\n"
        );
        assert_eq!(
            serde_json::to_string(&view).expect("serializable"),
            r#"{"name":"payments","prefix":"rlk","allow_imported":false,"revision":18,"epoch":1,"consumers":2,"keys":3,"versions":4,"created_at":null,"help_url":null}"#
        );
    }
}
