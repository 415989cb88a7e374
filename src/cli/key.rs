//! `relatch key`: the credentials of consumers.

use std::time::Duration;

use clap::{Args, Subcommand};
use serde::Serialize;
use zeroize::Zeroizing;

use super::{
    Session,
    barrier::BarrierView,
    connection::{Admin, answer, answer_within},
    convert,
    failure::{Exit, Failure, required},
    fleet,
    idempotency::{IdempotencyArgs, answered, ask_again, forgotten, not_shown},
    issued::IssuedView,
    output::{self, Format, Listing, Row, View},
    pass_by::PassByArgs,
    secret::SecretInput,
    value::{self, KeyIdParser},
    watch::{Stopped, patience, watch},
    words,
};
use crate::{
    key::{ConsumerId, IdempotencyKey, KeyId, KeyringName, Scope, Secret, Timestamp},
    proto::admin,
};

/// The commands of `key`.
#[derive(Debug, Subcommand)]
pub enum KeyCommand {
    /// Create a key, and print its secret once, when every sidecar accepts it
    ///
    /// If sidecars do not confirm in time, the key is revoked, no secret is handed out, and the exit code is 5.
    #[command(after_help = CREATE_EXAMPLES)]
    Create(KeyArgs),
    /// Import a key of another system unchanged
    ///
    /// The key is read from a file or from standard input, never from an argument. The keyring must have been created
    /// with --allow-imported.
    #[command(after_help = IMPORT_EXAMPLES)]
    Import(ImportArgs),
    /// List keys
    List(ListArgs),
    /// Show one key and its versions
    Show(ShowArgs),
}

/// The properties of a new key.
#[derive(Debug, Args)]
pub struct KeyArgs {
    /// Keyring of the key
    #[arg(long)]
    keyring: KeyringName,

    /// Consumer that owns the key
    #[arg(long)]
    consumer: ConsumerId,

    /// Display name [default: none]
    #[arg(long)]
    name: Option<String>,

    /// Scope of the key; may be repeated [default: none]
    #[arg(long = "scope", value_name = "SCOPE")]
    scopes: Vec<Scope>,

    /// CIDR block or address that may use the key; may be repeated [default: any address]
    #[arg(long = "allow-source", value_name = "CIDR", value_parser = value::source)]
    allowed_sources: Vec<String>,

    /// Time from which the key is accepted (RFC 3339), for example 2027-01-31T12:00:00Z [default: now]
    #[arg(long, value_name = "TIME")]
    not_before: Option<Timestamp>,

    /// Lifetime of the key, for example 90d [default: the key does not expire]
    #[arg(long, value_name = "DURATION", value_parser = value::positive_duration)]
    expires_in: Option<Duration>,

    /// Create the keyring (requires role admin) and the consumer if they do not exist
    #[arg(long)]
    create_missing: bool,

    /// Do not wait until every sidecar accepts the key: a request that uses it immediately may be denied
    #[arg(long)]
    no_wait: bool,

    /// Maximum time to wait [default: 1m for connected sidecars, and until lost sidecars can no longer serve]
    #[arg(long, value_name = "DURATION", value_parser = value::positive_duration, conflicts_with = "no_wait")]
    timeout: Option<Duration>,

    #[command(flatten)]
    pass_by: PassByArgs,

    #[command(flatten)]
    idempotency: IdempotencyArgs,
}

/// The arguments of `key import`.
#[derive(Debug, Args)]
pub struct ImportArgs {
    #[command(flatten)]
    key: KeyArgs,

    /// File that contains the key, or - for standard input; one trailing line break is ignored
    #[arg(long, value_name = "PATH", default_value = "-")]
    from_file: SecretInput,
}

/// The sidecars for which a call waits.
#[derive(Debug, Default)]
struct WaitsFor {
    keyring: String,
    pass_by: Option<admin::PassBy>,
}

/// The arguments of `key list`.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// List only the keys of this keyring [default: all keyrings]
    #[arg(long)]
    keyring: Option<KeyringName>,

    /// List only the keys of this consumer [default: all consumers]
    #[arg(long)]
    consumer: Option<ConsumerId>,
}

/// The arguments of `key show`.
#[derive(Debug, Args)]
pub struct ShowArgs {
    /// Key id: the 12 characters between the first two '_' of the key
    #[arg(value_name = "KEY_ID", value_parser = KeyIdParser)]
    key_id: KeyId,
}

/// The answer of `key show`. The names and their order, up to `versions`, are a contract.
#[derive(Debug, Serialize)]
struct KeyView {
    keyring: String,
    consumer: String,
    key_id: String,
    /// From the active version, or from the newest version if none is active.
    version: Option<u32>,
    state: Option<String>,
    not_before: Option<Timestamp>,
    expires_at: Option<Timestamp>,
    revision: u64,
    scopes: Vec<String>,
    versions: Vec<VersionView>,
    name: String,
    allowed_sources: Vec<String>,
}

/// A version of a key. The names and their order, up to `last_used_at`, are a contract.
#[derive(Debug, Serialize)]
struct VersionView {
    version: u32,
    state: String,
    created_at: Option<Timestamp>,
    not_before: Option<Timestamp>,
    expires_at: Option<Timestamp>,
    /// The number of requests that used it; null: not counted yet, which is not the same as none.
    requests: Option<u64>,
    /// The time of the last request that used it; null: never, or not counted yet.
    last_used_at: Option<Timestamp>,
    /// The reason of its state, if one was given.
    reason: Option<String>,
    /// The announced end of its overlap; null: it is not retiring.
    ends_at: Option<Timestamp>,
}

const CREATE_EXAMPLES: &str = "\
Examples:
  A key for a new consumer of a new keyring:
    relatch key create --keyring payments --consumer acme --create-missing

  A key that can only read, from one network, for 90 days:
    relatch key create --keyring payments --consumer acme \\
      --scope read --allow-source 10.0.0.0/8 --expires-in 90d

  Write the secret to a file:
    (umask 077; relatch key create --keyring payments --consumer acme -o json \\
      | jq -r .secret > acme.key)";

const IMPORT_EXAMPLES: &str = "\
Examples:
  relatch key import --keyring partners --consumer acme --from-file acme.key
  vault kv get -field=key secret/acme \\
    | relatch key import --keyring partners --consumer acme";

/// The time after which a command says that it waits: sidecars normally confirm within milliseconds.
const MOMENT: Duration = Duration::from_secs(2);

impl KeyCommand {
    /// Runs the command.
    ///
    /// # Errors
    ///
    /// When the control plane cannot be reached or refuses.
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        match self {
            Self::Create(args) => {
                let (key, patience) = (args.idempotency.key()?, patience(args.timeout));
                let request = args.into_request(&key);
                let keyring = request.keyring.clone();
                let waits_for = WaitsFor::of(&request);
                let mut issued = None;
                let call = answered(session, &key, async |mut admin: Admin| {
                    let answer = answer_within(patience, admin.create_key(request.clone()));
                    issued = Some(waiting(session, &waits_for, answer).await?);
                    Ok(())
                });
                Box::pin(watched(patience, call, &key, &keyring)).await?;
                show_issued(session, required(issued, "new key")?, &key)
            }
            Self::Import(args) => {
                let (key, patience) = (args.key.idempotency.key()?, patience(args.key.timeout));
                let request = args.into_request(&key)?;
                let waits_for = request.key.as_ref().map(WaitsFor::of).unwrap_or_default();
                let issued = answered(session, &key, async |mut admin: Admin| {
                    let answer = answer_within(patience, admin.import_key(request.clone()));
                    waiting(session, &waits_for, answer).await
                });
                show_issued(session, issued.await?, &key)
            }
            Self::List(args) => {
                let mut admin = session.admin().await?;
                let list = answer(admin.list_keys(args.into_request())).await?;
                session.show(&Listing(list.keys.into_iter().map(KeyView::from).collect()))
            }
            Self::Show(args) => {
                let mut admin = session.admin().await?;
                let key_id = args.key_id.as_str().to_owned();
                let key = answer(admin.get_key(admin::GetKeyRequest { key_id })).await?;
                session.show(&KeyView::from(key))
            }
        }
    }
}

/// Reports the sidecars for which a call waits, if the wait is longer than a moment.
async fn waiting<T>(
    session: &Session,
    waits_for: &WaitsFor,
    call: impl Future<Output = Result<T, Failure>>,
) -> Result<T, Failure> {
    let WaitsFor { keyring, pass_by } = waits_for;
    let reported = async {
        tokio::time::sleep(MOMENT).await;
        session
            .output
            .note("waiting until every sidecar that may serve accepts the key");
        let mut progress = session.output.progress();
        loop {
            if let Ok(missing) = fleet::behind(session, keyring, pass_by.as_ref()).await {
                progress.say(&missing.sentence(session.now()));
            }
            tokio::time::sleep(MOMENT).await;
        }
    };
    tokio::select! {
        answer = call => answer,
        never = reported => never,
    }
}

/// Runs the call that creates a key until it ends or is interrupted.
async fn watched(
    patience: Duration,
    call: impl Future<Output = Result<(), Failure>>,
    key: &IdempotencyKey,
    keyring: &str,
) -> Result<(), Failure> {
    // The call has its own timeout for each attempt.
    match watch(patience.saturating_mul(2), call).await {
        Ok(()) => Ok(()),
        Err(Stopped::Failed(failure)) => Err(failure),
        Err(Stopped::Interrupted) => Err(Failure::failed(
            "interrupted: the control plane revokes the key, unless the hand-over has already begun",
        )
        .exit_with(Exit::TimedOut)
        .hint(format!(
            "`relatch key list --keyring {keyring}` shows its state; {}",
            ask_again(key)
        ))),
    }
}

/// Shows a key that was just created or imported, and the sidecars that accept it.
fn show_issued(
    session: &Session,
    key: admin::IssuedKey,
    idempotency_key: &IdempotencyKey,
) -> Result<(), Failure> {
    if key.secret_forgotten {
        let stands = format!(
            "key {} of consumer {} was created (version {} is {})",
            key.key_id,
            key.consumer,
            key.version,
            convert::state(key.state)
        );
        let hint = format!(
            "if nobody has the secret: relatch rotate start {}, or relatch revoke {} --all",
            key.key_id, key.key_id
        );
        return Err(forgotten(&stands, hint));
    }
    let barrier = key.barrier.clone().map(BarrierView::from);
    let keyring = key.keyring.clone();
    session
        .show(&IssuedView::from(key))
        .map_err(|failure| not_shown(failure, idempotency_key))?;
    match barrier {
        Some(barrier) if barrier.total == 0 => session.output.note(&format!(
            "no sidecar serves keyring {keyring}, so no sidecar accepts this key yet; add the keyring to `keyrings` in a sidecar's file, and see `relatch fleet`"
        )),
        Some(barrier) if session.output.format() == Format::Table => {
            let sidecars = words::count(barrier.applied.into(), "sidecar");
            session.output.note(&format!("{sidecars} accepted the key"));
        }
        Some(_) | None => {}
    }
    Ok(())
}

impl WaitsFor {
    fn of(request: &admin::CreateKeyRequest) -> Self {
        Self {
            keyring: request.keyring.clone(),
            pass_by: request.pass_by.clone(),
        }
    }
}

impl KeyArgs {
    fn into_request(self, idempotency_key: &IdempotencyKey) -> admin::CreateKeyRequest {
        admin::CreateKeyRequest {
            keyring: self.keyring.as_str().to_owned(),
            consumer: self.consumer.as_str().to_owned(),
            name: self.name.unwrap_or_default(),
            scopes: self.scopes.iter().map(|s| s.as_str().to_owned()).collect(),
            allowed_sources: self.allowed_sources,
            not_before: self.not_before.map(convert::to_timestamp),
            expires_in: self.expires_in.map(convert::to_duration),
            create_missing: self.create_missing,
            wait: !self.no_wait,
            timeout: self.timeout.map(convert::to_duration),
            idempotency_key: idempotency_key.as_str().to_owned(),
            pass_by: self.pass_by.into_request(),
        }
    }
}

impl ImportArgs {
    fn into_request(
        self,
        idempotency_key: &IdempotencyKey,
    ) -> Result<admin::ImportKeyRequest, Failure> {
        let bytes = self.from_file.read("key", "--from-file")?;
        // Bytes that are not text get the same error as text that is not a key.
        let text = std::str::from_utf8(&bytes).unwrap_or_default();
        let secret = Secret::import(Zeroizing::new(text.to_owned())).map_err(|error| {
            Failure::new(Exit::Usage, error).context(format!(
                "the content of {} cannot be imported",
                self.from_file
            ))
        })?;
        Ok(admin::ImportKeyRequest {
            key: Some(self.key.into_request(idempotency_key)),
            secret: secret.expose().to_owned(),
        })
    }
}

impl ListArgs {
    fn into_request(self) -> admin::ListKeysRequest {
        admin::ListKeysRequest {
            keyring: self.keyring.map(String::from).unwrap_or_default(),
            consumer: self.consumer.map(String::from).unwrap_or_default(),
        }
    }
}

impl From<admin::Key> for KeyView {
    fn from(key: admin::Key) -> Self {
        let active = admin::KeyState::Active as i32;
        let current = key
            .versions
            .iter()
            .find(|version| version.state == active)
            .or_else(|| key.versions.iter().max_by_key(|version| version.version));
        Self {
            keyring: key.keyring,
            consumer: key.consumer,
            key_id: key.key_id,
            version: current.map(|version| version.version),
            state: current.map(|version| convert::state(version.state)),
            not_before: current.and_then(|version| convert::timestamp(version.not_before)),
            expires_at: current.and_then(|version| convert::timestamp(version.expires_at)),
            revision: key.revision,
            scopes: key.scopes,
            versions: key.versions.into_iter().map(VersionView::from).collect(),
            name: key.name,
            allowed_sources: key.allowed_sources,
        }
    }
}

impl From<admin::KeyVersion> for VersionView {
    fn from(version: admin::KeyVersion) -> Self {
        Self {
            version: version.version,
            state: convert::state(version.state),
            created_at: convert::timestamp(version.created_at),
            not_before: convert::timestamp(version.not_before),
            expires_at: convert::timestamp(version.expires_at),
            requests: version.requests,
            last_used_at: convert::timestamp(version.last_used_at),
            reason: Some(version.reason).filter(|reason| !reason.is_empty()),
            ends_at: convert::timestamp(version.ends_at),
        }
    }
}

impl View for KeyView {
    fn render(&self, _now: Timestamp) -> String {
        let sources = if self.allowed_sources.is_empty() {
            "any".to_owned()
        } else {
            self.allowed_sources.join(" ")
        };
        let facts = output::facts(&[
            ("KEYRING", self.keyring.clone()),
            ("CONSUMER", self.consumer.clone()),
            ("KEY ID", self.key_id.clone()),
            ("NAME", words::or_nothing(&self.name)),
            ("SCOPES", words::or_nothing(&self.scopes.join(" "))),
            ("SOURCES", sources),
            ("REVISION", self.revision.to_string()),
        ]);
        // There are two tables, because one would be wider than a terminal.
        let ends = ["VERSION", "STATE", "EXPIRES", "ENDS", "REASON"];
        let ends = output::table(&ends, self.versions.iter().map(VersionView::ends));
        let uses = ["VERSION", "CREATED", "NOT BEFORE", "REQUESTS", "LAST USED"];
        let uses = output::table(&uses, self.versions.iter().map(VersionView::uses));
        format!("{facts}\n{ends}\n{uses}")
    }
}

impl Row for KeyView {
    const TITLES: &[&str] = &[
        "KEYRING", "CONSUMER", "KEY ID", "NAME", "VERSIONS", "EXPIRES",
    ];

    fn cells(&self, now: Timestamp) -> Vec<Vec<String>> {
        let versions = self.versions.iter();
        let versions: Vec<String> = versions
            .map(|version| format!("{} {}", version.version, version.state))
            .collect();
        vec![vec![
            self.keyring.clone(),
            self.consumer.clone(),
            self.key_id.clone(),
            words::or_nothing(&self.name),
            words::or_nothing(&versions.join(", ")),
            words::when(self.expires_at, now),
        ]]
    }
}

impl VersionView {
    /// The end of each version by its own expiry and by its overlap, and the reason of its state.
    fn ends(&self) -> Vec<String> {
        vec![
            self.version.to_string(),
            self.state.clone(),
            words::time(self.expires_at),
            words::time(self.ends_at),
            words::or_nothing(self.reason.as_deref().unwrap_or_default()),
        ]
    }

    /// The creation, the validity and the use of each version.
    fn uses(&self) -> Vec<String> {
        vec![
            self.version.to_string(),
            words::time(self.created_at),
            words::time(self.not_before),
            words::or_nothing(&self.requests.map(|n| n.to_string()).unwrap_or_default()),
            words::time(self.last_used_at),
        ]
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::{super::output::tests::fits, *};

    fn key() -> admin::Key {
        let at = |seconds| Some(prost_types::Timestamp { seconds, nanos: 0 });
        admin::Key {
            keyring: "payments".to_owned(),
            consumer: "acme".to_owned(),
            key_id: "7Qm2Xc91TbKe".to_owned(),
            name: "batch".to_owned(),
            scopes: vec!["read".to_owned(), "write".to_owned()],
            allowed_sources: vec!["10.0.0.0/8".to_owned()],
            revision: 18,
            versions: vec![
                admin::KeyVersion {
                    version: 1,
                    state: admin::KeyState::Active as i32,
                    created_at: at(1_767_225_600),
                    not_before: None,
                    expires_at: at(1_798_761_600),
                    reason: String::new(),
                    requests: Some(17),
                    last_used_at: at(1_767_312_000),
                    ends_at: None,
                },
                admin::KeyVersion {
                    version: 2,
                    state: admin::KeyState::Retired as i32,
                    created_at: at(1_767_225_600),
                    not_before: None,
                    expires_at: None,
                    reason: "withdrawn".to_owned(),
                    requests: None,
                    last_used_at: None,
                    ends_at: None,
                },
            ],
        }
    }

    #[test]
    fn json_of_a_key_is_the_contract() {
        assert_eq!(
            serde_json::to_string(&KeyView::from(key())).expect("serializable"),
            concat!(
                r#"{"keyring":"payments","consumer":"acme","key_id":"7Qm2Xc91TbKe","version":1,"state":"active","#,
                r#""not_before":null,"expires_at":"2027-01-01T00:00:00.000Z","revision":18,"scopes":["read","write"],"#,
                r#""versions":[{"version":1,"state":"active","created_at":"2026-01-01T00:00:00.000Z","not_before":null,"#,
                r#""expires_at":"2027-01-01T00:00:00.000Z","requests":17,"last_used_at":"2026-01-02T00:00:00.000Z","reason":null,"ends_at":null},"#,
                r#"{"version":2,"state":"retired","created_at":"2026-01-01T00:00:00.000Z","not_before":null,"#,
                r#""expires_at":null,"requests":null,"last_used_at":null,"reason":"withdrawn","ends_at":null}],"#,
                r#""name":"batch","allowed_sources":["10.0.0.0/8"]}"#,
            )
        );
    }

    #[test]
    fn a_key_without_an_active_version_is_told_by_its_newest() {
        let mut key = key();
        key.versions[0].state = admin::KeyState::Revoked as i32;
        let view = KeyView::from(key);
        assert_eq!(
            (view.version, view.state.as_deref()),
            (Some(2), Some("retired"))
        );
    }

    #[test]
    fn a_key_is_shown_with_the_own_expiry_of_each_version_beside_its_announced_end() {
        let mut key = key();
        key.versions[0].state = admin::KeyState::Retiring as i32;
        key.versions[0].ends_at = Some(prost_types::Timestamp {
            seconds: 1_767_830_400,
            nanos: 0,
        });
        assert_eq!(
            fits(KeyView::from(key).render(Timestamp::from_millis(0))),
            "KEYRING   payments\n\
             CONSUMER  acme\n\
             KEY ID    7Qm2Xc91TbKe\n\
             NAME      batch\n\
             SCOPES    read write\n\
             SOURCES   10.0.0.0/8\n\
             REVISION  18\n\
             \n\
             VERSION  STATE     EXPIRES               ENDS                  REASON\n\
             1        retiring  2027-01-01T00:00:00Z  2026-01-08T00:00:00Z  -\n\
             2        retired   -                     -                     withdrawn\n\
             \n\
             VERSION  CREATED               NOT BEFORE  REQUESTS  LAST USED\n\
             1        2026-01-01T00:00:00Z  -           17        2026-01-02T00:00:00Z\n\
             2        2026-01-01T00:00:00Z  -           -         -\n"
        );
    }

    #[test]
    fn keys_are_listed_with_the_states_of_their_versions() {
        let now = Timestamp::from_millis(1_767_312_000_000);
        assert_eq!(
            fits(Listing(vec![KeyView::from(key())]).render(now)),
            "KEYRING   CONSUMER  KEY ID        NAME   VERSIONS             EXPIRES\n\
             payments  acme      7Qm2Xc91TbKe  batch  1 active, 2 retired  in 364d\n"
        );
    }

    #[test]
    fn what_cannot_be_a_key_is_not_imported_and_not_repeated() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("key");
        fs::write(&path, "two words\n").expect("writable");
        let args = ImportArgs {
            key: KeyArgs {
                keyring: "partners".parse().expect("a name"),
                consumer: "acme".parse().expect("a consumer"),
                name: None,
                scopes: Vec::new(),
                allowed_sources: Vec::new(),
                not_before: None,
                expires_in: None,
                create_missing: false,
                no_wait: false,
                timeout: None,
                pass_by: PassByArgs::default(),
                idempotency: IdempotencyArgs::default(),
            },
            from_file: SecretInput::File(path),
        };
        let key = "once".parse().expect("an idempotency key");
        let failure = args.into_request(&key).expect_err("it has a space");
        assert_eq!(failure.exit(), Exit::Usage);
        assert!(!failure.report(false).contains("two words"));
    }
}
