//! Explains what a sidecar would decide about a credential, step by step.

use std::{collections::BTreeSet, net::IpAddr};

use tonic::Status;

use super::{AdminApi, error, field, messages};
use crate::{
    authz::DenyReason,
    control::served::ServedKeyring,
    key::{KeyRecord, PresentedKey, Scopes, Standing, Timestamp},
    proto::admin as api,
    serving::Target,
};

/// The circumstances of the request to explain.
struct Circumstances {
    source: Option<IpAddr>,
    scopes: Scopes,
    at: Timestamp,
}

/// The steps so far.
#[derive(Default)]
struct Steps(Vec<api::ExplainStep>);

impl AdminApi {
    pub(super) fn explain(
        &self,
        request: &api::ExplainRequest,
    ) -> Result<api::ExplainResponse, Status> {
        let served = self.served("keyring", &request.keyring)?;
        let circumstances = Circumstances {
            source: match request.source.as_str() {
                "" => None,
                text => Some(field::parse("source", text)?),
            },
            scopes: Scopes::parse(&request.scopes.join(" "))
                .map_err(|problem| error::invalid("scopes", problem))?,
            at: field::timestamp("at", request.at)?.unwrap_or_else(|| self.catalog.clock().wall()),
        };
        let mut steps = Steps::default();
        let (reason, record) = judge(
            &served,
            request.credential.as_bytes(),
            &circumstances,
            &mut steps,
        );
        let answer = api::ExplainResponse {
            steps: steps.0,
            allowed: reason.is_none(),
            reason: reason.map_or_else(String::new, |reason| reason.as_str().to_owned()),
            ..api::ExplainResponse::default()
        };
        let Some(record) = record else {
            return Ok(answer);
        };
        let target = Target::Applied(served.revision(), record.version_ref());
        let barrier = self
            .fleet
            .barrier(served.name(), served.epoch(), target, &BTreeSet::new());
        Ok(api::ExplainResponse {
            consumer: record.consumer.to_string(),
            key_id: record.key_id.to_string(),
            version: record.version.get(),
            state: messages::state(record.state),
            laggards: messages::barrier(&barrier).laggards,
            ..answer
        })
    }
}

/// Judges a credential in the order of a decision: see `authz::decision`.
fn judge(
    served: &ServedKeyring,
    credential: &[u8],
    circumstances: &Circumstances,
    steps: &mut Steps,
) -> (Option<DenyReason>, Option<KeyRecord>) {
    match find(served, credential, steps) {
        Ok(record) => {
            let judged = stand(&record, circumstances.at, steps)
                .and_then(|()| admit(&record, circumstances, steps));
            (judged.err(), Some(record))
        }
        Err(reason) => (Some(reason), None),
    }
}

fn find(
    served: &ServedKeyring,
    credential: &[u8],
    steps: &mut Steps,
) -> Result<KeyRecord, DenyReason> {
    let state = served.journal().state();
    let keyring = &state.keyring;
    let key = PresentedKey::new(credential).map_err(|problem| {
        steps.failed("format", problem.to_string());
        DenyReason::MalformedCredential
    })?;
    match key.parse(keyring.prefix()) {
        Ok(key_id) => steps.passed(
            "format",
            format!("key id {key_id} in this keyring's format, checksum correct"),
        ),
        Err(problem) if keyring.allow_imported() => steps.passed(
            "format",
            format!("not this keyring's format ({problem}), but the keyring accepts imported keys"),
        ),
        Err(problem) => {
            steps.failed("format", problem.to_string());
            return Err(DenyReason::MalformedCredential);
        }
    }
    let found = keyring.find(&served.pepper().digest(&key));
    let Some(record) = found.and_then(|which| keyring.record(which)) else {
        steps.failed("lookup", "no key in this keyring has this secret");
        return Err(DenyReason::UnknownKey);
    };
    steps.passed(
        "lookup",
        format!(
            "version {} of key {}, consumer {}",
            record.version, record.key_id, record.consumer
        ),
    );
    Ok(record)
}

fn stand(record: &KeyRecord, at: Timestamp, steps: &mut Steps) -> Result<(), DenyReason> {
    let standing = record.standing(at);
    let state = format!("the version is {}", record.state);
    match standing {
        Standing::Revoked => {
            steps.failed("state", state);
            return Err(DenyReason::Revoked);
        }
        Standing::Retired => {
            let instead = record
                .replaced_by
                .map_or_else(String::new, |by| format!("; version {by} replaced it"));
            steps.failed("state", state + &instead);
            return Err(DenyReason::Retired);
        }
        Standing::Accepted | Standing::NotYetValid | Standing::Expired => {
            let until = record.retires_at.map_or_else(String::new, |until| {
                format!("; its overlap ends at {}", seconds(until))
            });
            steps.passed("state", state + &until);
        }
    }
    let window = record.window;
    let valid = match (window.not_before, window.expires_at) {
        (None, None) => "no start or end date".to_owned(),
        (Some(from), None) => format!("valid from {}, no end date", seconds(from)),
        (None, Some(until)) => format!("valid until {}", seconds(until)),
        (Some(from), Some(until)) => {
            format!("valid from {} to {}", seconds(from), seconds(until))
        }
    };
    let valid = format!("{valid}; evaluated as of {}", seconds(at));
    match standing {
        Standing::NotYetValid => {
            steps.failed("window", valid);
            Err(DenyReason::NotYetValid)
        }
        Standing::Expired => {
            steps.failed("window", valid);
            Err(DenyReason::Expired)
        }
        Standing::Accepted | Standing::Revoked | Standing::Retired => {
            steps.passed("window", valid);
            Ok(())
        }
    }
}

/// Formats a time in RFC 3339, to the second.
fn seconds(at: Timestamp) -> impl std::fmt::Display {
    humantime::format_rfc3339_seconds(at.into())
}

fn admit(
    record: &KeyRecord,
    circumstances: &Circumstances,
    steps: &mut Steps,
) -> Result<(), DenyReason> {
    let client = circumstances.source.map_or_else(
        || "no address of the client is given".to_owned(),
        |source| {
            format!(
                "the given address of the client is {}",
                source.to_canonical()
            )
        },
    );
    let blocks: Vec<String> = record
        .allowed_sources
        .iter()
        .map(ToString::to_string)
        .collect();
    let allowed = if blocks.is_empty() {
        "any source".to_owned()
    } else {
        blocks.join(", ")
    };
    if !record.allowed_sources.permit(circumstances.source) {
        steps.failed(
            "source",
            format!("the key may be used from {allowed} only; {client}"),
        );
        return Err(DenyReason::SourceNotAllowed);
    }
    steps.passed(
        "source",
        format!("the key may be used from {allowed}; {client}"),
    );
    let (held, needed) = (&record.scopes, &circumstances.scopes);
    let held_text = if held.is_empty() {
        "no scopes".to_owned()
    } else {
        format!("scopes {held}")
    };
    if !held.hold_all(needed) {
        steps.failed(
            "scopes",
            format!("the key has {held_text}, the route needs {needed}"),
        );
        return Err(DenyReason::InsufficientScope);
    }
    steps.passed("scopes", format!("the key has {held_text}"));
    Ok(())
}

impl Steps {
    fn passed(&mut self, check: &str, finding: impl Into<String>) {
        self.add(check, true, finding.into());
    }

    fn failed(&mut self, check: &str, finding: impl Into<String>) {
        self.add(check, false, finding.into());
    }

    fn add(&mut self, check: &str, passed: bool, finding: String) {
        self.0.push(api::ExplainStep {
            check: check.to_owned(),
            passed,
            finding,
        });
    }
}
