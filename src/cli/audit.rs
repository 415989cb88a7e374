//! `relatch audit`: lists the audit log, and verifies that it was not changed.

use std::collections::{BTreeMap, VecDeque};

use clap::{Args, Subcommand};
use serde::Serialize;
use serde_json::Value;

use super::{
    Session,
    connection::{Admin, answer},
    convert,
    failure::Failure,
    output::{Format, Listing, Row},
    words,
};
use crate::{
    key::{KeyringName, Timestamp},
    proto::admin,
};

/// The commands of `audit`.
#[derive(Debug, Subcommand)]
pub enum AuditCommand {
    /// List the changes of a keyring, newest last
    List(ListArgs),
    /// Recompute the hash chain; the exit code is 1 if it is broken
    Verify(VerifyArgs),
}

/// The arguments of `audit list`.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// Keyring whose log to list [default: the control plane's own log, which records admin tokens]
    #[arg(long)]
    keyring: Option<KeyringName>,

    /// List the entries after this revision, from the oldest [default: the newest entries]
    #[arg(long, value_name = "REVISION")]
    after: Option<u64>,

    /// Maximum number of entries to list, up to 1000
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1000))]
    limit: u32,
}

/// The arguments of `audit verify`.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// Verify only the log of this keyring [default: every log]
    #[arg(long)]
    keyring: Option<KeyringName>,
}

#[derive(Debug, Serialize)]
struct EntryView {
    /// Null in the control plane's own log.
    keyring: Option<String>,
    revision: u64,
    at: Option<Timestamp>,
    actor: String,
    kind: String,
    /// The change. It contains digests, never a secret.
    payload: Value,
    hash: String,
    /// The consumer of the key, if the change itself does not name it.
    #[serde(skip)]
    owner: Option<String>,
}

#[derive(Debug, Serialize)]
struct VerdictView {
    /// Null for the control plane's own log.
    keyring: Option<String>,
    entries: u64,
    intact: bool,
    /// The place and the kind of the break in the chain.
    problem: Option<String>,
}

/// The name of the control plane's own log in tables.
const OWN_LOG: &str = "(control plane)";
/// The most entries that the control plane lists at once.
const PAGE: u32 = 1_000;

impl AuditCommand {
    /// Runs the command.
    ///
    /// # Errors
    ///
    /// When the control plane cannot be reached or refuses, or a verified log is broken.
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        match self {
            Self::List(args) => list(args, session).await,
            Self::Verify(args) => verify(args, session).await,
        }
    }
}

async fn list(args: ListArgs, session: &Session) -> Result<(), Failure> {
    let mut admin = session.admin().await?;
    let keyring = args.keyring.map(String::from).unwrap_or_default();
    let (entries, note) = if let Some(after) = args.after {
        let entries = page(&mut admin, &keyring, after, args.limit).await?;
        let full = entries.len() >= args.limit as usize;
        let last = entries.last().filter(|_| full).map(|last| last.revision);
        let more = |last| format!("there may be more entries: continue with --after {last}");
        (entries, last.map(more))
    } else {
        let entries = newest(&mut admin, &keyring, args.limit).await?;
        let has_older = entries.first().is_some_and(|first| first.revision > 1);
        let note = "older entries are not listed: start from the oldest with --after 0";
        (entries, has_older.then(|| note.to_owned()))
    };
    let mut entries: Vec<_> = entries.into_iter().map(EntryView::from).collect();
    if session.output.format() == Format::Table {
        add_owners(&mut admin, &mut entries).await;
    }
    session.show(&Listing(entries))?;
    if let Some(note) = note {
        session.output.note(&note);
    }
    Ok(())
}

/// Requests the entries after a revision, the oldest first.
async fn page(
    admin: &mut Admin,
    keyring: &str,
    after: u64,
    limit: u32,
) -> Result<Vec<admin::AuditEntry>, Failure> {
    let keyring = keyring.to_owned();
    let request = admin::ListAuditRequest {
        keyring,
        after,
        limit,
    };
    Ok(answer(admin.list_audit(request)).await?.entries)
}

/// Requests the last entries of a log, the newest last. The revision of a keyring determines where they begin. The control
/// plane's own log is short, and is read completely.
async fn newest(
    admin: &mut Admin,
    keyring: &str,
    limit: u32,
) -> Result<Vec<admin::AuditEntry>, Failure> {
    let mut after = 0;
    if !keyring.is_empty() {
        let name = keyring.to_owned();
        let head = answer(admin.get_keyring(admin::GetKeyringRequest { name })).await?;
        after = head.revision.saturating_sub(limit.into());
    }
    let mut newest = VecDeque::new();
    loop {
        let entries = page(admin, keyring, after, PAGE).await?;
        let is_last = entries.len() < PAGE as usize;
        newest.extend(entries);
        newest.drain(..newest.len().saturating_sub(limit as usize));
        match newest.back() {
            Some(last) if !is_last => after = last.revision,
            _ => return Ok(newest.into()),
        }
    }
}

/// Requests the consumer of each key whose entry does not name it. If the request fails, the table shows no consumer.
async fn add_owners(admin: &mut Admin, entries: &mut [EntryView]) {
    let mut owners: BTreeMap<String, Option<String>> = BTreeMap::new();
    for entry in entries {
        let Some(key_id) = entry.text("key_id").filter(|_| entry.consumer().is_none()) else {
            continue;
        };
        let key_id = key_id.to_owned();
        if !owners.contains_key(&key_id) {
            let request = admin::GetKeyRequest {
                key_id: key_id.clone(),
            };
            let key = answer(admin.get_key(request)).await.ok();
            owners.insert(key_id.clone(), key.map(|key| key.consumer));
        }
        entry.owner = owners.get(&key_id).cloned().flatten();
    }
}

async fn verify(args: VerifyArgs, session: &Session) -> Result<(), Failure> {
    let mut admin = session.admin().await?;
    let keyring = args.keyring.map(String::from).unwrap_or_default();
    let verdicts = answer(admin.verify_audit(admin::VerifyAuditRequest { keyring })).await?;
    let verdicts: Vec<_> = verdicts.logs.into_iter().map(VerdictView::from).collect();
    let broken = broken(&verdicts);
    session.show(&Listing(verdicts))?;
    broken.map_or(Ok(()), Err)
}

fn broken(verdicts: &[VerdictView]) -> Option<Failure> {
    let broken: Vec<String> = verdicts
        .iter()
        .filter(|verdict| !verdict.intact)
        .map(|verdict| {
            let log = verdict.keyring.as_deref().unwrap_or(OWN_LOG);
            let problem = verdict
                .problem
                .as_deref()
                .unwrap_or("the control plane did not say where");
            format!("the log of {log} is broken: {problem}")
        })
        .collect();
    (!broken.is_empty()).then(|| Failure::failed(broken.join("; ")))
}

impl From<admin::AuditEntry> for EntryView {
    fn from(entry: admin::AuditEntry) -> Self {
        Self {
            keyring: Some(entry.keyring).filter(|name| !name.is_empty()),
            revision: entry.revision,
            at: convert::timestamp(entry.at),
            actor: entry.actor,
            kind: entry.kind,
            // A text that is not JSON is shown unchanged.
            payload: serde_json::from_str(&entry.payload).unwrap_or(Value::String(entry.payload)),
            hash: entry.hash,
            owner: None,
        }
    }
}

impl From<admin::AuditVerdict> for VerdictView {
    fn from(verdict: admin::AuditVerdict) -> Self {
        Self {
            keyring: Some(verdict.keyring).filter(|name| !name.is_empty()),
            entries: verdict.entries,
            intact: verdict.intact,
            problem: Some(verdict.problem).filter(|problem| !problem.is_empty()),
        }
    }
}

impl Row for EntryView {
    const TITLES: &[&str] = &["REV", "AT", "ACTOR", "KIND", "KEY", "CONSUMER", "REASON"];

    fn cells(&self, _now: Timestamp) -> Vec<Vec<String>> {
        let text = |text: Option<&str>| words::or_nothing(text.unwrap_or_default());
        vec![vec![
            self.revision.to_string(),
            words::time(self.at),
            words::or_nothing(self.actor_name()),
            self.kind.clone(),
            text(self.key()),
            text(self.consumer().or(self.owner.as_deref())),
            text(self.text("reason")),
        ]]
    }
}

impl EntryView {
    fn text(&self, field: &str) -> Option<&str> {
        self.payload.get(field)?.as_str()
    }

    /// The name of the token from `token:ID (NAME)`; another actor is shown unchanged.
    fn actor_name(&self) -> &str {
        let token = self.actor.strip_prefix("token:");
        let name = token.and_then(|token| token.split_once(" (")?.1.strip_suffix(')'));
        name.unwrap_or(&self.actor)
    }

    /// The key; in the control plane's own log, the admin token.
    fn key(&self) -> Option<&str> {
        let token = || self.text("id").filter(|_| self.kind.starts_with("token_"));
        self.text("key_id").or_else(token)
    }

    fn consumer(&self) -> Option<&str> {
        let of_webhook = || self.payload.get("webhook")?.get("consumer")?.as_str();
        self.text("consumer").or_else(of_webhook)
    }
}

impl Row for VerdictView {
    const TITLES: &[&str] = &["LOG", "ENTRIES", "INTACT", "PROBLEM"];

    fn cells(&self, _now: Timestamp) -> Vec<Vec<String>> {
        vec![vec![
            self.keyring.as_deref().unwrap_or(OWN_LOG).to_owned(),
            self.entries.to_string(),
            words::yes_no(self.intact),
            words::or_nothing(self.problem.as_deref().unwrap_or_default()),
        ]]
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{
            failure::Exit,
            output::{View, tests::fits},
        },
        *,
    };

    fn verdict(keyring: &str, problem: &str) -> VerdictView {
        VerdictView::from(admin::AuditVerdict {
            keyring: keyring.to_owned(),
            entries: 18,
            intact: problem.is_empty(),
            problem: problem.to_owned(),
        })
    }

    #[test]
    fn json_of_an_entry_holds_the_change_as_json() {
        let entry = admin::AuditEntry {
            keyring: "payments".to_owned(),
            revision: 2,
            at: None,
            actor: "deploy".to_owned(),
            kind: "consumer_created".to_owned(),
            payload: r#"{"consumer":"acme"}"#.to_owned(),
            hash: "00ff".repeat(16),
        };
        let json = serde_json::to_string(&EntryView::from(entry.clone())).expect("serializable");
        let hash = &entry.hash;
        assert_eq!(
            json,
            format!(
                r#"{{"keyring":"payments","revision":2,"at":null,"actor":"deploy","kind":"consumer_created","payload":{{"consumer":"acme"}},"hash":"{hash}"}}"#
            )
        );
    }

    #[test]
    fn entries_are_listed_with_key_consumer_and_reason() {
        let entry = |revision, kind: &str, payload: &str| {
            EntryView::from(admin::AuditEntry {
                keyring: "payments".to_owned(),
                revision,
                at: Some(prost_types::Timestamp {
                    seconds: 1_767_225_600,
                    nanos: 0,
                }),
                actor: "token:NdCNSCy9mibE (ops)".to_owned(),
                kind: kind.to_owned(),
                payload: payload.to_owned(),
                hash: "00ff".repeat(16),
            })
        };
        let mut rolled_back = entry(
            3,
            "rolled_back",
            r#"{"key_id":"7Qm2Xc91TbKe","version":1,"reason":"broken"}"#,
        );
        rolled_back.owner = Some("acme".to_owned());
        let list = Listing(vec![
            entry(
                1,
                "token_created",
                r#"{"id":"4fK0pQz81LmN","name":"deploy"}"#,
            ),
            entry(
                2,
                "key_created",
                r#"{"key_id":"7Qm2Xc91TbKe","consumer":"acme"}"#,
            ),
            rolled_back,
        ]);
        assert_eq!(
            fits(list.render(Timestamp::from_millis(0))),
            "REV  AT                    ACTOR  KIND           KEY           CONSUMER  REASON\n\
             1    2026-01-01T00:00:00Z  ops    token_created  4fK0pQz81LmN  -         -\n\
             2    2026-01-01T00:00:00Z  ops    key_created    7Qm2Xc91TbKe  acme      -\n\
             3    2026-01-01T00:00:00Z  ops    rolled_back    7Qm2Xc91TbKe  acme      broken\n"
        );
    }

    #[test]
    fn a_broken_log_fails_the_command_and_names_the_place() {
        assert!(broken(&[verdict("payments", ""), verdict("", "")]).is_none());
        let verdicts = [
            verdict("payments", "revision 7 does not follow revision 6"),
            verdict("", ""),
        ];
        let failure = broken(&verdicts).expect("one is broken");
        assert_eq!(failure.exit(), Exit::Failed);
        assert_eq!(
            failure.report(false),
            "error: the log of payments is broken: revision 7 does not follow revision 6\n"
        );
    }
}
