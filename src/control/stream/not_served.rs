//! The keyrings that the sidecar of a stream was told to erase.

use std::{
    collections::BTreeMap,
    sync::{Mutex, MutexGuard, PoisonError},
};

use crate::{key::KeyringName, proto::discovery};

/// The messages of a stream about keyrings that are not served. The session sends them, and the
/// listener matches the answers of the sidecar.
#[derive(Debug, Default)]
pub(crate) struct NotServedBook(Mutex<Sent>);

#[derive(Debug, Default)]
struct Sent {
    /// The number of the newest message.
    number: u64,
    /// The messages that ask to erase a keyring, if nothing of the keyring was sent since.
    forbidden: BTreeMap<KeyringName, u64>,
}

impl NotServedBook {
    /// Returns the message that a keyring is not served, and may be served later.
    pub(crate) fn missing(&self, keyring: &KeyringName, reason: String) -> discovery::NotServed {
        let mut sent = self.lock();
        sent.number += 1;
        discovery::NotServed {
            keyring: keyring.to_string(),
            reason,
            number: sent.number,
            is_forbidden: false,
        }
    }

    /// Returns the message that the sidecar has to erase a keyring. A name that is not valid has no
    /// keyring, and nothing is erased.
    pub(crate) fn forbidden(&self, keyring: &str, reason: String) -> discovery::NotServed {
        let mut sent = self.lock();
        sent.number += 1;
        let number = sent.number;
        if let Ok(name) = keyring.parse() {
            sent.forbidden.insert(name, number);
        }
        discovery::NotServed {
            keyring: keyring.to_owned(),
            reason,
            number,
            is_forbidden: true,
        }
    }

    /// Notes that the keyring is sent from now on: the sidecar may hold it again.
    pub(crate) fn serve(&self, keyring: &KeyringName) {
        self.lock().forbidden.remove(keyring);
    }

    /// Returns the keyring that the sidecar has erased, if the newest message about it asked for
    /// that.
    pub(crate) fn erased(&self, dropped: &discovery::Dropped) -> Option<KeyringName> {
        let keyring: KeyringName = dropped.keyring.parse().ok()?;
        let asked = self.lock().forbidden.get(&keyring).copied();
        (asked == Some(dropped.not_served)).then_some(keyring)
    }

    fn lock(&self) -> MutexGuard<'_, Sent> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::testing::keyring_name;

    fn dropped(not_served: u64) -> discovery::Dropped {
        discovery::Dropped {
            keyring: keyring_name().to_string(),
            not_served,
        }
    }

    #[test]
    fn an_erasure_counts_only_as_the_answer_to_the_newest_message() {
        let book = NotServedBook::default();
        let name = keyring_name();
        assert_eq!(book.missing(&name, String::new()).number, 1);
        assert_eq!(book.erased(&dropped(1)), None, "it was not asked for");
        assert_eq!(book.forbidden(name.as_str(), String::new()).number, 2);
        assert_eq!(book.erased(&dropped(1)), None);
        assert_eq!(book.erased(&dropped(2)), Some(name.clone()));
        book.serve(&name);
        assert_eq!(book.erased(&dropped(2)), None, "it is sent again");
        assert_eq!(book.forbidden(name.as_str(), String::new()).number, 3);
        assert_eq!(book.erased(&dropped(2)), None);
        assert_eq!(book.erased(&dropped(3)), Some(name));
    }
}
