//! `relatch audit`: who changed what and when, and whether anybody changed that record.

use clap::{Args, Subcommand};
use serde::Serialize;
use serde_json::Value;

use super::{
    Session,
    connection::answer,
    failure::Failure,
    output::{Listing, Row},
    wire, words,
};
use crate::{
    key::{KeyringName, Timestamp},
    proto::admin,
};

/// What can be done with the audit log.
#[derive(Debug, Subcommand)]
pub enum AuditCommand {
    /// List the changes of a keyring, the oldest first
    List(ListArgs),
    /// Recompute the chain of hashes; exit code 1 when it is broken
    Verify(VerifyArgs),
}

/// The arguments of `audit list`.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// The keyring; without this flag the control plane's own log, which tells of admin tokens
    #[arg(long)]
    keyring: Option<KeyringName>,

    /// Only what came after this revision
    #[arg(long, value_name = "REVISION", default_value_t = 0)]
    after: u64,

    /// The most entries to list, up to 1000
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1000))]
    limit: u32,
}

/// The arguments of `audit verify`.
#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// Only the log of this keyring; without this flag every log
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
    /// The change. It holds digests, never a secret.
    payload: Value,
    hash: String,
}

#[derive(Debug, Serialize)]
struct VerdictView {
    /// Null for the control plane's own log.
    keyring: Option<String>,
    entries: u64,
    intact: bool,
    /// Where and how the chain is broken.
    problem: Option<String>,
}

/// How the control plane's own log is called in tables.
const OWN_LOG: &str = "(control plane)";
/// How much of a hash a table shows: enough to tell two entries apart; JSON has all of it.
const SHOWN_HASH: usize = 12;

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
    let request = admin::ListAuditRequest {
        keyring: args.keyring.map(String::from).unwrap_or_default(),
        after: args.after,
        limit: args.limit,
    };
    let page = answer(admin.list_audit(request)).await?;
    let entries: Vec<_> = page.entries.into_iter().map(EntryView::from).collect();
    let last = entries.last().map(|entry| entry.revision);
    let full = entries.len() >= args.limit as usize;
    session.show(&Listing(entries))?;
    if let Some(last) = last.filter(|_| full) {
        let note = format!("there may be more: continue with --after {last}");
        session.output.note(&note);
    }
    Ok(())
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
            let problem = verdict.problem.as_deref().unwrap_or("no place was named");
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
            at: wire::timestamp(entry.at),
            actor: entry.actor,
            kind: entry.kind,
            // What is no JSON after all is shown as the text that it is.
            payload: serde_json::from_str(&entry.payload).unwrap_or(Value::String(entry.payload)),
            hash: entry.hash,
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
    const TITLES: &[&str] = &["KEYRING", "REVISION", "AT", "ACTOR", "KIND", "HASH"];

    fn cells(&self, _now: Timestamp) -> Vec<Vec<String>> {
        vec![vec![
            self.keyring.as_deref().unwrap_or(OWN_LOG).to_owned(),
            self.revision.to_string(),
            words::time(self.at),
            words::or_nothing(&self.actor),
            self.kind.clone(),
            self.hash.chars().take(SHOWN_HASH).collect(),
        ]]
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
        super::{failure::Exit, output::View},
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
        let mut entry = admin::AuditEntry {
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
        entry.keyring.clear();
        assert_eq!(
            Listing(vec![EntryView::from(entry)]).render(Timestamp::from_millis(0)),
            "KEYRING          REVISION  AT  ACTOR   KIND              HASH\n\
             (control plane)  2         -   deploy  consumer_created  00ff00ff00ff\n"
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
