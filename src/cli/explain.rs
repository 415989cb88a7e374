//! `relatch explain`: the decision that a sidecar would make about a credential, step by step.

use std::net::IpAddr;

use clap::Args;
use serde::Serialize;

use super::{
    Session,
    barrier::LaggardView,
    connection::answer,
    convert,
    decision::Decision,
    failure::{Exit, Failure},
    output::{self, View},
    secret::SecretInput,
    words,
};
use crate::{
    key::{KeyringName, Scope, Timestamp},
    proto::admin,
};

/// The arguments of `explain`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct ExplainArgs {
    /// Keyring that the route names
    #[arg(long)]
    keyring: KeyringName,

    /// Address of the client, as the sidecar finds it (`client_address`) [default: unknown]
    #[arg(long, value_name = "IP")]
    source: Option<IpAddr>,

    /// Scope that the route requires; may be repeated [default: none]
    #[arg(long = "scope", value_name = "SCOPE")]
    scopes: Vec<Scope>,

    /// Evaluate as of this time (RFC 3339), for example 2027-01-31T12:00:00Z [default: now]
    #[arg(long, value_name = "TIME")]
    at: Option<Timestamp>,

    /// File that contains the key, or - for standard input; one trailing line break is ignored
    #[arg(long, value_name = "PATH", default_value = "-")]
    key_file: SecretInput,
}

/// The decision and its steps. The identity is null unless the credential is a key of the keyring.
#[derive(Debug, Serialize)]
struct ExplanationView {
    decision: Decision,
    /// The reason of the denial, as a sidecar gives it; null if the request is allowed.
    reason: Option<String>,
    keyring: String,
    consumer: Option<String>,
    key_id: Option<String>,
    key_version: Option<u32>,
    key_state: Option<String>,
    /// The steps in the order of a sidecar, up to the step that decides.
    steps: Vec<StepView>,
    /// Sidecars that may serve but do not have the newest revision yet: they may decide differently.
    laggards: Vec<LaggardView>,
}

#[derive(Debug, Serialize)]
struct StepView {
    check: String,
    passed: bool,
    /// The finding, as a sentence.
    finding: String,
}

const EXAMPLES: &str = "\
Examples:
  Why was this key denied?
    relatch explain --keyring payments --key-file acme.key \\
      --source 10.1.2.3 --scope write -o table

  Will it still be accepted next month?
    relatch explain --keyring payments --at 2027-01-31T12:00:00Z < acme.key

The control plane answers from its committed state. It does not store the key,
and the answer does not contain it. To ask a sidecar, use `relatch check`: it
also shows the address of the client, and how the sidecar finds it.

Exit codes: 0 the key would be allowed, 1 it would be denied.";

/// The most sidecars that a note names; the JSON names all.
const MOST_NAMED: usize = 5;

impl ExplainArgs {
    /// Runs the command, and returns [`Exit::Done`] for allowed and [`Exit::Failed`] for denied.
    ///
    /// # Errors
    ///
    /// When there is no credential, or the control plane cannot be reached or refuses.
    pub async fn run(self, session: &Session) -> Result<Exit, Failure> {
        let request = self.into_request()?;
        let keyring = request.keyring.clone();
        let mut admin = session.admin().await?;
        let explained = answer(admin.explain(request)).await?;
        let view = ExplanationView::new(keyring, explained);
        session.show(&view)?;
        if let Some(note) = view.lag() {
            session.output.note(&note);
        }
        Ok(view.decision.exit())
    }

    fn into_request(self) -> Result<admin::ExplainRequest, Failure> {
        let bytes = self.key_file.read("key", "--key-file")?;
        // The error must not contain the bytes: the file may contain a secret.
        let credential = std::str::from_utf8(&bytes).map_err(|_| {
            Failure::usage(format!(
                "{} does not contain text, and every key is text",
                self.key_file
            ))
        })?;
        Ok(admin::ExplainRequest {
            keyring: self.keyring.as_str().to_owned(),
            credential: credential.to_owned(),
            source: self.source.map_or_else(String::new, |ip| ip.to_string()),
            scopes: self.scopes.into_iter().map(String::from).collect(),
            at: self.at.map(convert::to_timestamp),
        })
    }
}

impl ExplanationView {
    fn new(keyring: String, explained: admin::ExplainResponse) -> Self {
        let text = |text: String| Some(text).filter(|text| !text.is_empty());
        let is_known = !explained.key_id.is_empty();
        Self {
            decision: if explained.allowed {
                Decision::Allow
            } else {
                Decision::Deny
            },
            reason: text(explained.reason),
            keyring,
            consumer: text(explained.consumer),
            key_id: text(explained.key_id),
            key_version: is_known.then_some(explained.version),
            key_state: is_known.then(|| convert::state(explained.state)),
            steps: explained.steps.into_iter().map(Into::into).collect(),
            laggards: explained.laggards.into_iter().map(Into::into).collect(),
        }
    }

    /// The sidecars that may decide differently, as a sentence.
    fn lag(&self) -> Option<String> {
        let nodes: Vec<String> = self.laggards.iter().map(|l| l.node.clone()).collect();
        let verb = match nodes.len() {
            0 => return None,
            1 => "has not",
            _ => "have not",
        };
        Some(format!(
            "{} {verb} applied the newest revision and may decide differently; see `relatch fleet`",
            words::list(&nodes, MOST_NAMED)
        ))
    }
}

impl From<admin::ExplainStep> for StepView {
    fn from(step: admin::ExplainStep) -> Self {
        Self {
            check: step.check,
            passed: step.passed,
            finding: step.finding,
        }
    }
}

impl View for ExplanationView {
    fn render(&self, _now: Timestamp) -> String {
        let steps = self.steps.iter().map(|step| {
            let mark = if step.passed { "✓" } else { "✗" };
            vec![mark.to_owned(), step.check.clone(), step.finding.clone()]
        });
        let steps = output::table(&["", "CHECK", "FINDING"], steps);
        let decision = self.decision.as_str();
        let text = |value: &Option<String>| words::or_nothing(value.as_deref().unwrap_or_default());
        let version = self.key_version.map(|version| version.to_string());
        let verdict = output::facts(&[
            ("DECISION", decision.to_owned()),
            ("REASON", text(&self.reason)),
            ("KEYRING", self.keyring.clone()),
            ("CONSUMER", text(&self.consumer)),
            ("KEY ID", text(&self.key_id)),
            ("VERSION", text(&version)),
            ("STATE", text(&self.key_state)),
        ]);
        format!("{steps}\n{verdict}")
    }
}

#[cfg(test)]
mod tests {
    use super::{super::output::tests::fits, *};

    fn step(check: &str, passed: bool, finding: &str) -> admin::ExplainStep {
        admin::ExplainStep {
            check: check.to_owned(),
            passed,
            finding: finding.to_owned(),
        }
    }

    fn denied() -> ExplanationView {
        let explained = admin::ExplainResponse {
            steps: vec![
                step("lookup", true, "version 3"),
                step("state", false, "the version is revoked"),
            ],
            allowed: false,
            reason: "revoked".to_owned(),
            consumer: "acme".to_owned(),
            key_id: "7Qm2Xc91TbKe".to_owned(),
            version: 3,
            state: admin::KeyState::Revoked as i32,
            laggards: vec![admin::Laggard {
                node: "edge-3".to_owned(),
                ..admin::Laggard::default()
            }],
        };
        ExplanationView::new("payments".to_owned(), explained)
    }

    fn args(file: &std::path::Path) -> ExplainArgs {
        ExplainArgs {
            keyring: "payments".parse().expect("a name"),
            source: None,
            scopes: Vec::new(),
            at: None,
            key_file: SecretInput::File(file.to_owned()),
        }
    }

    #[test]
    fn json_of_a_denial() {
        assert_eq!(
            serde_json::to_string(&denied()).expect("serializable"),
            concat!(
                r#"{"decision":"deny","reason":"revoked","keyring":"payments","consumer":"acme","key_id":"7Qm2Xc91TbKe","#,
                r#""key_version":3,"key_state":"revoked","steps":[{"check":"lookup","passed":true,"finding":"version 3"},"#,
                r#"{"check":"state","passed":false,"finding":"the version is revoked"}],"#,
                r#""laggards":[{"node":"edge-3","cluster":"","connected":false,"behind":0,"last_seen":null,"run_id":"","#,
                r#""presence":"unknown","since":null,"serves_until":null,"lacks_disk":false}]}"#,
            )
        );
    }

    #[test]
    fn each_step_has_its_mark() {
        assert_eq!(
            fits(denied().render(Timestamp::from_millis(0))),
            "   CHECK   FINDING\n\
             ✓  lookup  version 3\n\
             ✗  state   the version is revoked\n\
             \n\
             DECISION  deny\n\
             REASON    revoked\n\
             KEYRING   payments\n\
             CONSUMER  acme\n\
             KEY ID    7Qm2Xc91TbKe\n\
             VERSION   3\n\
             STATE     revoked\n"
        );
        assert_eq!(
            denied().lag().as_deref(),
            Some(
                "edge-3 has not applied the newest revision and may decide differently; see `relatch fleet`"
            )
        );
    }

    #[test]
    fn what_is_no_key_of_the_keyring_has_no_identity() {
        let explained = admin::ExplainResponse {
            reason: "unknown_key".to_owned(),
            ..admin::ExplainResponse::default()
        };
        let view = ExplanationView::new("payments".to_owned(), explained);
        assert_eq!((view.key_version, view.key_state), (None, None));
    }

    #[test]
    fn a_credential_that_is_no_text_is_not_repeated() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("key");
        std::fs::write(&path, b"rlk_\xff_x").expect("writable");
        let failure = args(&path).into_request().expect_err("no text");
        assert_eq!(failure.exit(), Exit::Usage);
        assert!(!failure.report(false).contains("rlk_"));
        std::fs::write(&path, "rlk_x\n").expect("writable");
        let request = args(&path).into_request().expect("a text");
        assert_eq!(request.credential, "rlk_x");
        assert!(!format!("{request:?}").contains("rlk_x"));
    }
}
