//! A new key version: the answer of `key create`, `key import` and a finished `rotate start`.

use serde::Serialize;

use super::{
    convert,
    output::{self, View},
    secret::Revealed,
    words,
};
use crate::{key::Timestamp, proto::admin};

/// A new version, with its secret. The names and their order are a contract.
#[derive(Debug, Serialize)]
pub(crate) struct IssuedView {
    /// The keyring of the key.
    pub keyring: String,
    /// The consumer of the key.
    pub consumer: String,
    /// The id of the key.
    pub key_id: String,
    /// The number of the version.
    pub version: u32,
    /// The state of the version.
    pub state: String,
    /// The secret, shown only once; null for an imported key: its owner knows it.
    pub secret: Option<Revealed>,
    /// The time from which it is accepted; null: immediately.
    pub not_before: Option<Timestamp>,
    /// The time at which it expires; null: never.
    pub expires_at: Option<Timestamp>,
    /// The revision of the keyring that added it.
    pub revision: u64,
}

impl From<admin::IssuedKey> for IssuedView {
    fn from(key: admin::IssuedKey) -> Self {
        Self {
            keyring: key.keyring,
            consumer: key.consumer,
            key_id: key.key_id,
            version: key.version,
            state: convert::state(key.state),
            secret: Revealed::new(key.secret),
            not_before: convert::timestamp(key.not_before),
            expires_at: convert::timestamp(key.expires_at),
            revision: key.revision,
        }
    }
}

impl View for IssuedView {
    fn render(&self, _now: Timestamp) -> String {
        output::facts(&[
            ("KEYRING", self.keyring.clone()),
            ("CONSUMER", self.consumer.clone()),
            ("KEY ID", self.key_id.clone()),
            ("VERSION", self.version.to_string()),
            ("STATE", self.state.clone()),
            ("NOT BEFORE", words::time(self.not_before)),
            ("EXPIRES", words::time(self.expires_at)),
            ("REVISION", self.revision.to_string()),
        ])
    }

    fn secret(&self) -> Option<&Revealed> {
        self.secret.as_ref()
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(crate) fn issued(secret: &str) -> admin::IssuedKey {
        admin::IssuedKey {
            keyring: "payments".to_owned(),
            consumer: "acme".to_owned(),
            key_id: "7Qm2Xc91TbKe".to_owned(),
            version: 4,
            state: admin::KeyState::Active as i32,
            secret: secret.to_owned(),
            not_before: None,
            expires_at: Some(prost_types::Timestamp {
                seconds: 1_798_761_600,
                nanos: 0,
            }),
            revision: 18,
            ..admin::IssuedKey::default()
        }
    }

    #[test]
    fn json_of_an_issued_key_is_the_contract() {
        let view = IssuedView::from(issued("rlk_7Qm2Xc91TbKe_x"));
        assert_eq!(
            serde_json::to_string(&view).expect("serializable"),
            r#"{"keyring":"payments","consumer":"acme","key_id":"7Qm2Xc91TbKe","version":4,"state":"active","secret":"rlk_7Qm2Xc91TbKe_x","not_before":null,"expires_at":"2027-01-01T00:00:00.000Z","revision":18}"#
        );
    }

    #[test]
    fn an_imported_key_has_no_secret_to_show() {
        let view = IssuedView::from(issued(""));
        let json = serde_json::to_string(&view).expect("serializable");
        assert!(json.contains(r#""secret":null"#), "{json}");
        assert!(view.secret().is_none());
    }

    #[test]
    fn the_table_leaves_the_secret_to_its_own_line() {
        let view = IssuedView::from(issued("rlk_7Qm2Xc91TbKe_x"));
        let table = view.render(Timestamp::from_millis(0));
        assert!(!table.contains("rlk_"), "{table}");
        assert!(
            table.starts_with("KEYRING     payments\nCONSUMER    acme\n"),
            "{table}"
        );
        assert_eq!(
            view.secret().map(Revealed::expose),
            Some("rlk_7Qm2Xc91TbKe_x")
        );
    }
}
