//! Admin tokens and their permissions, and the check values of the peppers that the digests of the
//! store need.

use std::{collections::BTreeMap, fmt, str::FromStr, sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::{
    journal::{self, CommitError, CommitOutcome, Journal, LogError, LogState, Report},
    spans::{Changes, CommitEvent, ControlTracer, carried_report},
};
use crate::{
    clock::Clock,
    key::{
        ApplyError, Epoch, KeyDigest, KeyId, KeyringName, MasterPepper, OperationRefusal, Pepper,
        PepperCheck, PepperId, Prefix, PresentedKey, RandomError, Revision, Secret, Timestamp,
    },
    printable,
    serving::RunKey,
    store::{EntryHash, LogName, NewEntry, Store},
};

/// The tokens of a control plane, in a log of their own, and the check values of its peppers.
#[derive(Debug)]
pub(crate) struct Tokens {
    journal: Journal<TokenBook>,
    pepper: Pepper,
    clock: Clock,
    tracer: ControlTracer,
}

/// An admin token. The store holds only a keyed digest of its secret.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Token {
    /// The public id, which is also a part of the token.
    pub(crate) id: KeyId,
    /// The name of the person or program that uses the token.
    pub(crate) name: String,
    pub(crate) role: Role,
    pub(crate) created_at: Timestamp,
    /// When it expires. None: it does not expire.
    pub(crate) expires_at: Option<Timestamp>,
    /// When it was deleted. None: it was not.
    pub(crate) ended_at: Option<Timestamp>,
    digest: KeyDigest,
}

/// The role of a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Role {
    /// Read.
    Viewer,
    /// Read, create consumers and keys, and rotate keys.
    Issuer,
    /// Read, revoke keys, and retire versions by force.
    Revoker,
    /// Everything.
    Admin,
}

/// A kind of call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Permission {
    /// Read.
    Read,
    /// Create consumers and keys, and rotate keys.
    Issue,
    /// Revoke keys, and retire versions by force.
    Revoke,
    /// Change keyrings, tokens, policies, webhooks and the list of sidecars, confirm snapshots that
    /// are held, and rotate in an emergency.
    Administer,
}

/// The caller of a call, after its token was verified.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct AdminCaller {
    /// The actor, as the audit log names it: `token:<id> (<name>)`.
    pub(crate) actor: String,
    /// The role of the token.
    pub(crate) role: Role,
}

/// All tokens of the log, and the check value of each pepper that the digests of the store need.
#[derive(Clone, Debug, Default)]
pub(crate) struct TokenBook {
    revision: Revision,
    tokens: BTreeMap<KeyId, Token>,
    peppers: BTreeMap<PepperId, PepperCheck>,
}

/// A new token that is not in the log yet.
struct Draft {
    id: KeyId,
    secret: Secret,
    digest: KeyDigest,
}

/// A change of the tokens or peppers, or a note about sidecars. Stored as JSON.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub(crate) enum TokenChange {
    /// A token was created.
    TokenCreated {
        id: KeyId,
        /// The name of the person or program that uses the token.
        name: String,
        role: Role,
        /// The keyed digest of its secret.
        digest: KeyDigest,
        /// When it expires.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        expires_at: Option<Timestamp>,
    },
    /// A token was deleted.
    TokenEnded {
        /// The deleted token.
        id: KeyId,
    },
    /// The digests of the store need a pepper.
    PepperAdded {
        id: PepperId,
        /// The value by which the pepper is recognized.
        check: PepperCheck,
    },
    /// An operator stated that runs of sidecars no longer serve.
    SidecarsForgotten {
        sidecars: Vec<RunKey>,
        /// The reason that the operator gave.
        reason: String,
    },
    /// A call passes runs of sidecars by, although they may serve.
    SidecarsPassedBy {
        sidecars: Vec<RunKey>,
        /// The name of the call.
        call: String,
        /// The keyring of the call.
        keyring: KeyringName,
        /// The key of the call. None: the call creates it.
        key_id: Option<KeyId>,
    },
}

/// The kind of the log entries with check values of peppers.
pub(crate) const PEPPER_ADDED: &str = "pepper_added";

/// A text that is not a role.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a role: use viewer, issuer, revoker or admin")]
pub(crate) struct ParseRoleError;

impl Tokens {
    /// Loads the tokens of a store.
    ///
    /// # Errors
    ///
    /// When the log of the tokens cannot be read.
    pub(crate) async fn open(
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
            Arc::new(()),
        )
        .await?;
        Ok(Self {
            journal,
            pepper: pepper.for_admin_tokens(),
            clock,
            tracer: ControlTracer::default(),
        })
    }

    /// Adds spans for the commits.
    #[must_use]
    pub(crate) fn with_tracer(self, tracer: ControlTracer) -> Self {
        Self { tracer, ..self }
    }

    /// Creates a token, and returns it with its secret, which is not stored.
    ///
    /// # Errors
    ///
    /// When the name is invalid, the random source fails, or the store fails.
    pub(crate) async fn create(
        &self,
        actor: &str,
        name: &str,
        role: Role,
        expires_in: Option<Duration>,
    ) -> Result<(Token, Secret), CommitError> {
        let id = KeyId::generate()?;
        self.create_as(id, actor, name, role, expires_in).await
    }

    /// Does the same as [`Self::create`], with a given id. It is refused when a token has this id.
    pub(crate) async fn create_as(
        &self,
        id: KeyId,
        actor: &str,
        name: &str,
        role: Role,
        expires_in: Option<Duration>,
    ) -> Result<(Token, Secret), CommitError> {
        if !matches!(name.len(), 1..=64) || name.contains(printable::is_unsafe) {
            return Err(OperationRefusal::Invalid {
                field: "name",
                problem: "use 1 to 64 bytes, without control characters and without characters that are invisible or change the direction of text".to_owned(),
            }
            .into());
        }
        let Draft { id, secret, digest } = Draft::generate(id, &self.pepper)?;
        self.commit(actor, |book, now| {
            if book.tokens.contains_key(&id) {
                return Err(OperationRefusal::AlreadyExists {
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

    /// Deletes a token. The last admin token that does not expire cannot be deleted: without it,
    /// nobody could create another one.
    ///
    /// # Errors
    ///
    /// When the token does not exist, is already deleted or must stay, or the store fails.
    pub(crate) async fn end(&self, actor: &str, id: KeyId) -> Result<Token, CommitError> {
        self.commit(actor, |book, _| match book.tokens.get(&id) {
            None => Err(not_found(id)),
            Some(token) if token.ended_at.is_some() => Err(OperationRefusal::DoneBefore(format!(
                "token {id} is already deleted"
            ))),
            Some(token) if token.is_lasting_admin() && book.lasting_admins() == 1 => {
                Err(OperationRefusal::Unsafe(format!(
                    "token {id} is the last admin token that does not expire: create another one first with `relatch token create --role admin`; if this one is lost, `relatch control recover-admin` creates another one on the machine of the store"
                )))
            }
            Some(_) => Ok(TokenChange::TokenEnded { id }),
        })
        .await?;
        Ok(self.get(id)?)
    }

    /// Returns the check value of each pepper that the digests of the store need. Empty for a store
    /// that was created without check values.
    #[must_use]
    pub(crate) fn peppers(&self) -> BTreeMap<PepperId, PepperCheck> {
        self.journal.state().peppers.clone()
    }

    /// Records the check value of a pepper, unless the store already has one with this id.
    ///
    /// # Errors
    ///
    /// When the store fails.
    pub(crate) async fn add_pepper(
        &self,
        actor: &str,
        pepper: &MasterPepper,
    ) -> Result<(), CommitError> {
        let (id, check) = (pepper.id(), pepper.check());
        let planned = |book: &TokenBook, _| {
            let is_new = !book.peppers.contains_key(&id);
            let change = is_new.then_some(TokenChange::PepperAdded { id, check });
            Ok((change.into_iter().collect(), ()))
        };
        let committed = self.journal.commit(actor, planned, |_| Report::none());
        committed.await.map(drop)
    }

    /// Records a change in the audit log that affects neither tokens nor peppers.
    ///
    /// # Errors
    ///
    /// When the store fails.
    pub(crate) async fn note(&self, actor: &str, change: TokenChange) -> Result<(), CommitError> {
        self.commit(actor, |_, _| Ok(change.clone())).await
    }

    /// Returns all tokens, including deleted ones.
    #[must_use]
    pub(crate) fn list(&self) -> Vec<Token> {
        self.journal.state().tokens.values().cloned().collect()
    }

    /// Returns the caller with `token`. None when the token is unknown, expired or deleted.
    #[must_use]
    pub(crate) fn verify(&self, token: &str) -> Option<AdminCaller> {
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
        Some(AdminCaller {
            actor: format!("token:{id} ({})", token.name),
            role: token.role,
        })
    }

    /// Applies the commits of other processes.
    ///
    /// # Errors
    ///
    /// When the log cannot be read.
    pub(crate) async fn refresh(&self) -> Result<(), LogError> {
        self.journal.catch_up().await
    }

    async fn commit(
        &self,
        actor: &str,
        plan: impl Fn(&TokenBook, Timestamp) -> Result<TokenChange, OperationRefusal>,
    ) -> Result<(), CommitError> {
        let (started, tracer) = (self.clock.system_time(), &self.tracer);
        let mut changes = Changes::default();
        let planned = |book: &TokenBook, now| {
            let change = plan(book, now)?;
            changes = Changes::of_kind(TokenBook::kind(&change));
            Ok((vec![change], ()))
        };
        let report = |changes: &[TokenChange]| {
            let kind = changes.first().map_or("", TokenBook::kind);
            let (tracer, actor) = (tracer.clone(), actor.to_owned());
            Report::new(carried_report(move |_| {
                tracer.commit(&CommitEvent {
                    started,
                    actor: &actor,
                    keyring: None,
                    changes: &Changes::of_kind(kind),
                    outcome: CommitOutcome::Committed,
                    revision: None,
                });
            }))
        };
        let committed = self.journal.commit(actor, planned, report).await;
        if committed.is_err() {
            tracer.commit(&CommitEvent {
                started,
                actor,
                keyring: None,
                changes: &changes,
                outcome: CommitOutcome::of(&committed),
                revision: None,
            });
        }
        committed.map(drop)
    }

    /// Returns the token with an id.
    pub(crate) fn get(&self, id: KeyId) -> Result<Token, OperationRefusal> {
        self.journal
            .state()
            .tokens
            .get(&id)
            .cloned()
            .ok_or_else(|| not_found(id))
    }
}

/// Returns the first entries of the log of a new store, its pepper and an admin token, and the
/// secret of the token.
///
/// # Errors
///
/// When the operating system's random source fails.
pub(crate) fn first_entries(
    actor: &str,
    name: &str,
    pepper: &MasterPepper,
    now: Timestamp,
) -> Result<(Vec<NewEntry>, Secret), RandomError> {
    let Draft { id, secret, digest } =
        Draft::generate(KeyId::generate()?, &pepper.for_admin_tokens())?;
    let changes = [
        TokenChange::PepperAdded {
            id: pepper.id(),
            check: pepper.check(),
        },
        TokenChange::TokenCreated {
            id,
            name: name.to_owned(),
            role: Role::Admin,
            digest,
            expires_at: None,
        },
    ];
    let entries = changes
        .iter()
        .map(|change| journal::entry::<TokenBook>(change, actor, now));
    Ok((entries.collect(), secret))
}

/// Returns the check value in the payload of a [`PEPPER_ADDED`] entry. None for another payload.
pub(crate) fn recorded_pepper(payload: &[u8]) -> Option<(PepperId, PepperCheck)> {
    match serde_json::from_slice(payload).ok()? {
        TokenChange::PepperAdded { id, check } => Some((id, check)),
        TokenChange::TokenCreated { .. }
        | TokenChange::TokenEnded { .. }
        | TokenChange::SidecarsForgotten { .. }
        | TokenChange::SidecarsPassedBy { .. } => None,
    }
}

impl Draft {
    fn generate(id: KeyId, pepper: &Pepper) -> Result<Self, RandomError> {
        let secret = Secret::generate(&prefix(), id)?;
        let digest = pepper.digest(&secret.presented());
        Ok(Self { id, secret, digest })
    }
}

impl Token {
    /// Returns whether the token has the role admin, does not expire and is not deleted.
    fn is_lasting_admin(&self) -> bool {
        self.role == Role::Admin && self.expires_at.is_none() && self.ended_at.is_none()
    }
}

impl TokenBook {
    fn lasting_admins(&self) -> usize {
        self.tokens
            .values()
            .filter(|token| token.is_lasting_admin())
            .count()
    }
}

impl LogState for TokenBook {
    type Change = TokenChange;

    fn kind(change: &TokenChange) -> &'static str {
        match change {
            TokenChange::TokenCreated { .. } => "token_created",
            TokenChange::TokenEnded { .. } => "token_ended",
            TokenChange::PepperAdded { .. } => PEPPER_ADDED,
            TokenChange::SidecarsForgotten { .. } => "sidecars_forgotten",
            TokenChange::SidecarsPassedBy { .. } => "sidecars_passed_by",
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
            TokenChange::PepperAdded { id, check } => {
                self.peppers.insert(*id, *check);
            }
            // These changes exist only for the audit log.
            TokenChange::SidecarsForgotten { .. } | TokenChange::SidecarsPassedBy { .. } => {}
        }
        self.revision = revision;
        Ok(())
    }
}

impl Role {
    /// Returns whether the role permits a call. Calls that are not listed are denied.
    #[must_use]
    pub(crate) const fn permits(self, permission: Permission) -> bool {
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

    #[must_use]
    pub(crate) const fn as_str(self) -> &'static str {
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

/// Returns the token in `authorization: Bearer TOKEN`.
#[must_use]
pub fn bearer(header: &str) -> Option<Zeroizing<String>> {
    let (scheme, token) = header.split_once(' ')?;
    scheme
        .eq_ignore_ascii_case("bearer")
        .then(|| Zeroizing::new(token.trim().to_owned()))
}

/// Returns the prefix of admin tokens, by which secret scanners distinguish them from keys.
fn prefix() -> Prefix {
    "rlat".parse().expect("the prefix of admin tokens is valid")
}

fn not_found(id: KeyId) -> OperationRefusal {
    OperationRefusal::NotFound {
        what: "token",
        name: id.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use tempfile::TempDir;

    use super::*;
    use crate::store::{SqliteOptions, SqliteStore};

    const WHO: &str = "test";

    /// The tokens of a store that another process may use, too.
    async fn tokens(dir: &TempDir) -> Tokens {
        let options = SqliteOptions {
            create: true,
            ..SqliteOptions::default()
        };
        let store = SqliteStore::open(&dir.path().join("relatch.db"), options).await;
        let pepper = MasterPepper::new(PepperId::new(1), &[7; 32]).expect("32 bytes");
        Tokens::open(Arc::new(store.expect("it opens")), Clock::system(), &pepper)
            .await
            .expect("a sound store")
    }

    async fn create(tokens: &Tokens, role: Role, expires_in: Option<Duration>) -> KeyId {
        let (token, _) = tokens
            .create(WHO, "one", role, expires_in)
            .await
            .expect("it is created");
        token.id
    }

    fn is_refused(ended: &Result<Token, CommitError>) -> bool {
        matches!(
            ended,
            Err(CommitError::Refused(OperationRefusal::Unsafe(_)))
        )
    }

    #[tokio::test]
    async fn the_last_admin_token_that_does_not_expire_stays() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let tokens = tokens(&dir).await;
        let first = create(&tokens, Role::Admin, None).await;
        let day = Some(Duration::from_hours(24));
        let expiring = create(&tokens, Role::Admin, day).await;
        for role in [Role::Viewer, Role::Issuer, Role::Revoker] {
            create(&tokens, role, None).await;
        }

        let refused = tokens.end(WHO, first).await;

        assert!(is_refused(&refused), "{refused:?}");
        let refused = refused.expect_err("it stays").to_string();
        for part in [&first.to_string(), "relatch token create", "recover-admin"] {
            assert!(refused.contains(part), "{part}: {refused}");
        }
        tokens.end(WHO, expiring).await.expect("it may go");
        let second = create(&tokens, Role::Admin, None).await;
        tokens.end(WHO, first).await.expect("another one is left");
        assert!(is_refused(&tokens.end(WHO, second).await));
        let again = tokens.end(WHO, first).await.expect_err("it has ended");
        assert!(again.to_string().contains("is already deleted"), "{again}");
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn of_the_last_two_admin_tokens_that_are_ended_at_once_one_stays() {
        let dir = tempfile::tempdir().expect("a temporary directory");
        let here = tokens(&dir).await;
        let there = tokens(&dir).await;
        let mut left = create(&here, Role::Admin, None).await;
        for round in 0..20 {
            let other = create(&here, Role::Admin, None).await;
            // In one process, and in two.
            let by = if round % 2 == 0 { &here } else { &there };
            by.refresh().await.expect("it reads on");
            let (one, two) = tokio::join!(here.end(WHO, left), by.end(WHO, other));
            assert_ne!(one.is_ok(), two.is_ok(), "{one:?} {two:?}");
            let refused = if one.is_ok() { &two } else { &one };
            assert!(is_refused(refused), "{refused:?}");
            left = if one.is_ok() { other } else { left };
        }
    }

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
