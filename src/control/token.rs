//! Admin tokens and what they permit.

use std::{collections::BTreeMap, fmt, str::FromStr, sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::{
    journal::{CommitError, Journal, LogError, State},
    metrics::CommitOutcome,
    spans::{Changes, CommitEvent, ControlTracer},
};
use crate::{
    clock::Clock,
    key::{
        ApplyError, Epoch, KeyDigest, KeyId, MasterPepper, Pepper, Prefix, PresentedKey, Refusal,
        Revision, Secret, Timestamp,
    },
    store::{EntryHash, LogName, Store},
};

/// The tokens of a control plane, kept in its own log.
#[derive(Debug)]
pub struct Tokens {
    journal: Journal<TokenBook>,
    pepper: Pepper,
    clock: Clock,
    tracer: ControlTracer,
}

/// One admin token. Its secret is stored as a keyed digest only.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Token {
    /// Public; also a part of the token.
    pub id: KeyId,
    /// For people.
    pub name: String,
    /// What it permits.
    pub role: Role,
    /// When it was made.
    pub created_at: Timestamp,
    /// When it ends by itself.
    pub expires_at: Option<Timestamp>,
    /// When it was ended.
    pub ended_at: Option<Timestamp>,
    digest: KeyDigest,
}

/// What the holder of a token is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Reads.
    Viewer,
    /// Reads, makes consumers and keys, rotates.
    Issuer,
    /// Reads and revokes.
    Revoker,
    /// Everything.
    Admin,
}

/// What a call does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Permission {
    /// Looks.
    Read,
    /// Makes consumers and keys, rotates keys.
    Issue,
    /// Ends keys at once.
    Revoke,
    /// Makes keyrings and tokens, confirms what is held.
    Administer,
}

/// Who makes a call, once its token was verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Caller {
    /// As the audit log names the caller: `token:<id> (<name>)`.
    pub actor: String,
    /// What the token permits.
    pub role: Role,
}

/// All tokens, as their log tells.
#[derive(Clone, Debug, Default)]
pub struct TokenBook {
    revision: Revision,
    tokens: BTreeMap<KeyId, Token>,
}

/// What happened to the tokens. Stored as JSON.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum TokenChange {
    /// One was made.
    TokenCreated {
        /// Its id.
        id: KeyId,
        /// For people.
        name: String,
        /// What it permits.
        role: Role,
        /// Of its secret.
        digest: KeyDigest,
        /// When it ends by itself.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        expires_at: Option<Timestamp>,
    },
    /// One was ended.
    TokenEnded {
        /// Its id.
        id: KeyId,
    },
}

/// A text that is no role.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a role: use viewer, issuer, revoker or admin")]
pub struct ParseRoleError;

impl Tokens {
    /// Loads the tokens of a store.
    ///
    /// # Errors
    ///
    /// When their log cannot be followed.
    pub async fn open(
        store: Arc<dyn Store>,
        clock: Clock,
        pepper: &MasterPepper,
    ) -> Result<Self, LogError> {
        let book = TokenBook::default();
        let epoch = Epoch::default();
        let log = LogName::Control;
        let journal = Journal::open(
            store,
            clock.clone(),
            log,
            epoch,
            (book, EntryHash::ZERO),
            Revision::default(),
        )
        .await?;
        Ok(Self {
            journal,
            pepper: pepper.for_admin_tokens(),
            clock,
            tracer: ControlTracer::default(),
        })
    }

    /// The same, with spans of its commits.
    #[must_use]
    pub fn with_tracer(self, tracer: ControlTracer) -> Self {
        Self { tracer, ..self }
    }

    /// Makes a token and returns it with its secret, which is not kept.
    ///
    /// # Errors
    ///
    /// When its name cannot be, or the store fails.
    pub async fn create(
        &self,
        actor: &str,
        name: &str,
        role: Role,
        expires_in: Option<Duration>,
    ) -> Result<(Token, Secret), CommitError> {
        let id = KeyId::generate()?;
        self.create_as(id, actor, name, role, expires_in).await
    }

    /// As [`Self::create`], with an id that no token has.
    pub(crate) async fn create_as(
        &self,
        id: KeyId,
        actor: &str,
        name: &str,
        role: Role,
        expires_in: Option<Duration>,
    ) -> Result<(Token, Secret), CommitError> {
        if !matches!(name.len(), 1..=64) || name.chars().any(char::is_control) {
            return Err(Refusal::Invalid {
                field: "name",
                problem: "give 1 to 64 bytes without control characters".to_owned(),
            }
            .into());
        }
        let secret = Secret::generate(&prefix(), id)?;
        let digest = self.pepper.digest(&secret.presented());
        self.commit(actor, |book, now| {
            if book.tokens.contains_key(&id) {
                return Err(Refusal::AlreadyExists {
                    what: "token",
                    name: id.to_string(),
                });
            }
            Ok(TokenChange::TokenCreated {
                id,
                name: name.to_owned(),
                role,
                digest,
                expires_at: expires_in.map(|after| now.saturating_add(after)),
            })
        })
        .await?;
        Ok((self.get(id)?, secret))
    }

    /// Ends a token.
    ///
    /// # Errors
    ///
    /// When it does not exist or has ended, or the store fails.
    pub async fn end(&self, actor: &str, id: KeyId) -> Result<Token, CommitError> {
        self.commit(actor, |book, _| match book.tokens.get(&id) {
            None => Err(not_found(id)),
            Some(token) if token.ended_at.is_some() => Err(Refusal::AlreadyExists {
                what: "the end of token",
                name: id.to_string(),
            }),
            Some(_) => Ok(TokenChange::TokenEnded { id }),
        })
        .await?;
        Ok(self.get(id)?)
    }

    /// All tokens, ended ones too.
    #[must_use]
    pub fn list(&self) -> Vec<Token> {
        self.journal.state().tokens.values().cloned().collect()
    }

    /// Who presents `token`; none when it is not one, or is over.
    #[must_use]
    pub fn verify(&self, token: &str) -> Option<Caller> {
        let presented = PresentedKey::new(token.as_bytes()).ok()?;
        let id = presented.parse(&prefix()).ok()?;
        let digest = self.pepper.digest(&presented);
        let now = self.clock.wall();
        let state = self.journal.state();
        let token = state.tokens.get(&id).filter(|token| {
            token.digest == digest
                && token.ended_at.is_none()
                && token.expires_at.is_none_or(|end| now < end)
        })?;
        Some(Caller {
            actor: format!("token:{id} ({})", token.name),
            role: token.role,
        })
    }

    /// Follows what other processes have committed.
    ///
    /// # Errors
    ///
    /// When the log cannot be followed.
    pub async fn refresh(&self) -> Result<(), LogError> {
        self.journal.catch_up().await
    }

    async fn commit(
        &self,
        actor: &str,
        plan: impl Fn(&TokenBook, Timestamp) -> Result<TokenChange, Refusal>,
    ) -> Result<(), CommitError> {
        let started = self.clock.system_time();
        let mut changes = Changes::default();
        let planned = |book: &TokenBook, now| {
            let change = plan(book, now)?;
            changes = Changes::of_kind(TokenBook::kind(&change));
            Ok((vec![change], ()))
        };
        let committed = self.journal.commit(actor, planned).await;
        self.tracer.commit(&CommitEvent {
            started,
            actor,
            keyring: None,
            changes: &changes,
            outcome: CommitOutcome::of(&committed),
            revision: None,
        });
        committed.map(drop)
    }

    /// The token with an id.
    pub(crate) fn get(&self, id: KeyId) -> Result<Token, Refusal> {
        self.journal
            .state()
            .tokens
            .get(&id)
            .cloned()
            .ok_or_else(|| not_found(id))
    }
}

impl State for TokenBook {
    type Change = TokenChange;

    fn kind(change: &TokenChange) -> &'static str {
        match change {
            TokenChange::TokenCreated { .. } => "token_created",
            TokenChange::TokenEnded { .. } => "token_ended",
        }
    }

    fn revision(&self) -> Revision {
        self.revision
    }

    fn apply(
        &mut self,
        revision: Revision,
        at: Timestamp,
        change: &TokenChange,
    ) -> Result<(), ApplyError> {
        match change {
            TokenChange::TokenCreated {
                id,
                name,
                role,
                digest,
                expires_at,
            } => {
                self.tokens.insert(
                    *id,
                    Token {
                        id: *id,
                        name: name.clone(),
                        role: *role,
                        created_at: at,
                        expires_at: *expires_at,
                        ended_at: None,
                        digest: *digest,
                    },
                );
            }
            TokenChange::TokenEnded { id } => {
                let token = self.tokens.get_mut(id).ok_or_else(|| ApplyError::Unknown {
                    revision,
                    what: format!("token {id}"),
                })?;
                token.ended_at = Some(at);
            }
        }
        self.revision = revision;
        Ok(())
    }
}

impl Role {
    /// Whether it permits a call. What is not listed is not permitted.
    #[must_use]
    pub const fn permits(self, permission: Permission) -> bool {
        match permission {
            Permission::Read => matches!(
                self,
                Self::Viewer | Self::Issuer | Self::Revoker | Self::Admin
            ),
            Permission::Issue => matches!(self, Self::Issuer | Self::Admin),
            Permission::Revoke => matches!(self, Self::Revoker | Self::Admin),
            Permission::Administer => matches!(self, Self::Admin),
        }
    }

    /// Its name.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Viewer => "viewer",
            Self::Issuer => "issuer",
            Self::Revoker => "revoker",
            Self::Admin => "admin",
        }
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

impl FromStr for Role {
    type Err = ParseRoleError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        [Self::Viewer, Self::Issuer, Self::Revoker, Self::Admin]
            .into_iter()
            .find(|role| role.as_str() == text)
            .ok_or(ParseRoleError)
    }
}

/// Reads the token out of `authorization: Bearer TOKEN`.
#[must_use]
pub fn bearer(header: &str) -> Option<Zeroizing<String>> {
    let (scheme, token) = header.split_once(' ')?;
    scheme
        .eq_ignore_ascii_case("bearer")
        .then(|| Zeroizing::new(token.trim().to_owned()))
}

/// What admin tokens begin with, so that secret scanners tell them from keys.
fn prefix() -> Prefix {
    "rlat".parse().expect("the prefix of admin tokens is valid")
}

fn not_found(id: KeyId) -> Refusal {
    Refusal::NotFound {
        what: "token",
        name: id.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roles_permit_what_the_documentation_says() {
        use Permission::{Administer, Issue, Read, Revoke};
        let permitted = |role: Role| {
            [Read, Issue, Revoke, Administer]
                .into_iter()
                .filter(|permission| role.permits(*permission))
                .collect::<Vec<_>>()
        };
        assert_eq!(permitted(Role::Viewer), [Read]);
        assert_eq!(permitted(Role::Issuer), [Read, Issue]);
        assert_eq!(permitted(Role::Revoker), [Read, Revoke]);
        assert_eq!(permitted(Role::Admin), [Read, Issue, Revoke, Administer]);
    }

    #[test]
    fn bearer_tokens_are_read_from_their_header() {
        assert_eq!(
            bearer("Bearer abc").as_deref().map(String::as_str),
            Some("abc")
        );
        assert_eq!(
            bearer("bearer abc").as_deref().map(String::as_str),
            Some("abc")
        );
        assert_eq!(bearer("Basic abc"), None);
        assert_eq!(bearer("Bearer"), None);
    }
}
