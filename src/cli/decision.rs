//! The decision of a sidecar on a check, read as Envoy reads it.

use std::collections::BTreeMap;

use prost_types::{Struct, Value, value::Kind};
use serde::Serialize;

use super::{
    failure::Exit,
    output::{self, View},
    words,
};
use crate::{
    key::Timestamp,
    proto::auth::{CheckResponse, HeaderValueOption, check_response::HttpResponse},
};

/// The decision of a sidecar. The identity is null unless the key was verified.
#[derive(Debug, Serialize)]
pub(crate) struct DecisionView {
    decision: Decision,
    /// The HTTP status of the response to the consumer; null if the request is allowed, because the upstream then answers.
    http_status: Option<i32>,
    reason: Option<String>,
    keyring: Option<String>,
    consumer: Option<String>,
    key_id: Option<String>,
    key_version: Option<u64>,
    key_state: Option<String>,
    revision: Option<u64>,
    /// The address of the client; null if it is unknown, or if the request could not be read.
    client_address: Option<String>,
    /// How the address was found; null if the request could not be read.
    client_address_from: Option<String>,
    /// The headers that are added to the request for the upstream.
    upstream_headers: BTreeMap<String, String>,
    /// The headers and query parameters that are removed from the request for the upstream.
    removed_headers: Vec<String>,
    removed_query_parameters: Vec<String>,
    /// The headers of the response to the consumer.
    response_headers: BTreeMap<String, String>,
}

/// Allowed or denied.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Decision {
    /// The request goes to the upstream.
    Allow,
    /// The request goes to the upstream, because the denial is not enforced.
    WouldDeny,
    /// The consumer receives the answer of the sidecar.
    Deny,
}

/// The decision in the metadata of a denial that is not enforced.
const WOULD_DENY: &str = "would_deny";

/// The status that Envoy sends to the consumer if a denial has none.
const DEFAULT_DENIED_STATUS: i32 = 403;

impl Decision {
    /// The word for people and for scripts.
    #[must_use]
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Allow => "allow",
            Self::WouldDeny => WOULD_DENY,
            Self::Deny => "deny",
        }
    }

    /// [`Exit::Done`] if the request passes, else [`Exit::Failed`].
    #[must_use]
    pub(crate) const fn exit(self) -> Exit {
        match self {
            Self::Allow | Self::WouldDeny => Exit::Done,
            Self::Deny => Exit::Failed,
        }
    }
}

impl DecisionView {
    /// Whether the request is allowed.
    #[must_use]
    pub(crate) const fn decision(&self) -> Decision {
        self.decision
    }

    /// The reason that the sidecar gives.
    #[must_use]
    pub(crate) fn reason(&self) -> Option<&str> {
        self.reason.as_deref()
    }
}

impl From<CheckResponse> for DecisionView {
    fn from(response: CheckResponse) -> Self {
        let metadata = response.dynamic_metadata.unwrap_or_default();
        // Envoy reads an absent status as zero, and zero allows.
        let decision = match response.status.map_or(0, |status| status.code) {
            0 if text(&metadata, "decision").as_deref() == Some(WOULD_DENY) => Decision::WouldDeny,
            0 => Decision::Allow,
            _ => Decision::Deny,
        };
        let mut view = Self {
            decision,
            http_status: None,
            reason: text(&metadata, "reason"),
            keyring: text(&metadata, "keyring"),
            consumer: text(&metadata, "consumer"),
            key_id: text(&metadata, "key_id"),
            key_version: number(&metadata, "key_version"),
            key_state: text(&metadata, "key_state"),
            revision: number(&metadata, "revision"),
            client_address: text(&metadata, "client_address"),
            client_address_from: text(&metadata, "client_address_from"),
            upstream_headers: BTreeMap::new(),
            removed_headers: Vec::new(),
            removed_query_parameters: Vec::new(),
            response_headers: BTreeMap::new(),
        };
        match response.http_response {
            Some(HttpResponse::OkResponse(ok)) => {
                view.upstream_headers = headers(ok.headers);
                view.removed_headers = ok.headers_to_remove;
                view.removed_query_parameters = ok.query_parameters_to_remove;
                view.response_headers = headers(ok.response_headers_to_add);
            }
            Some(HttpResponse::DeniedResponse(denied)) => {
                view.http_status = denied.status.map(|status| status.code);
                view.response_headers = headers(denied.headers);
            }
            None => {}
        }
        if decision == Decision::Deny {
            view.http_status.get_or_insert(DEFAULT_DENIED_STATUS);
        }
        view
    }
}

impl View for DecisionView {
    fn render(&self, _now: Timestamp) -> String {
        let text = |value: &Option<String>| words::or_nothing(value.as_deref().unwrap_or_default());
        let number = |value: Option<u64>| {
            value.map_or_else(|| words::NOTHING.to_owned(), |number| number.to_string())
        };
        let status = self.http_status.map(|status| status.to_string());
        let mut facts = vec![
            ("DECISION", self.decision.as_str().to_owned()),
            (
                "STATUS",
                status.unwrap_or_else(|| words::NOTHING.to_owned()),
            ),
            ("REASON", text(&self.reason)),
            ("KEYRING", text(&self.keyring)),
            ("CONSUMER", text(&self.consumer)),
            ("KEY ID", text(&self.key_id)),
            ("VERSION", number(self.key_version)),
            ("STATE", text(&self.key_state)),
            ("REVISION", number(self.revision)),
            ("CLIENT", text(&self.client_address)),
            ("CLIENT FROM", text(&self.client_address_from)),
        ];
        let upstream = self.upstream_headers.iter();
        facts.extend(upstream.map(|(name, value)| ("TO UPSTREAM", format!("{name}: {value}"))));
        let response = self.response_headers.iter();
        facts.extend(response.map(|(name, value)| ("TO CONSUMER", format!("{name}: {value}"))));
        facts.extend(
            self.removed_headers
                .iter()
                .map(|name| ("REMOVED", name.clone())),
        );
        let parameters = self.removed_query_parameters.iter();
        facts.extend(parameters.map(|name| ("REMOVED", format!("?{name}"))));
        output::facts(&facts)
    }
}

fn headers(options: Vec<HeaderValueOption>) -> BTreeMap<String, String> {
    let headers = options.into_iter().filter_map(|option| option.header);
    headers.map(|header| (header.key, header.value)).collect()
}

fn kind<'a>(metadata: &'a Struct, name: &str) -> Option<&'a Kind> {
    metadata
        .fields
        .get(name)
        .and_then(|Value { kind }| kind.as_ref())
}

fn text(metadata: &Struct, name: &str) -> Option<String> {
    match kind(metadata, name) {
        Some(Kind::StringValue(text)) => Some(text.clone()),
        _ => None,
    }
}

#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "the cast saturates, and a whole number below 2^53 is exact"
)]
fn number(metadata: &Struct, name: &str) -> Option<u64> {
    match kind(metadata, name) {
        Some(Kind::NumberValue(number)) => Some(*number as u64),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::auth;

    fn header(key: &str, value: &str) -> HeaderValueOption {
        HeaderValueOption {
            header: Some(auth::HeaderValue {
                key: key.to_owned(),
                value: value.to_owned(),
            }),
            append: None,
            append_action: 0,
        }
    }

    fn metadata(fields: &[(&str, Kind)]) -> Struct {
        let fields = fields.iter().cloned();
        Struct {
            fields: fields
                .map(|(name, kind)| (name.to_owned(), Value { kind: Some(kind) }))
                .collect(),
        }
    }

    fn response(code: i32, http_response: Option<HttpResponse>) -> CheckResponse {
        CheckResponse {
            status: Some(auth::Status {
                code,
                message: String::new(),
            }),
            dynamic_metadata: None,
            http_response,
        }
    }

    #[test]
    fn an_allowed_request_shows_its_identity() {
        let ok = auth::OkHttpResponse {
            headers: vec![header("x-relatch-consumer", "acme")],
            headers_to_remove: vec!["x-api-key".to_owned()],
            response_headers_to_add: Vec::new(),
            query_parameters_to_remove: vec!["api%5Fkey".to_owned()],
        };
        let mut response = response(0, Some(HttpResponse::OkResponse(ok)));
        response.dynamic_metadata = Some(metadata(&[
            ("reason", Kind::StringValue("active".to_owned())),
            ("consumer", Kind::StringValue("acme".to_owned())),
            ("key_version", Kind::NumberValue(3.0)),
            (
                "client_address",
                Kind::StringValue("203.0.113.9".to_owned()),
            ),
            (
                "client_address_from",
                Kind::StringValue("x-forwarded-for".to_owned()),
            ),
        ]));
        let view = DecisionView::from(response);
        assert_eq!(
            serde_json::to_string(&view).expect("serializable"),
            concat!(
                r#"{"decision":"allow","http_status":null,"reason":"active","keyring":null,"consumer":"acme","#,
                r#""key_id":null,"key_version":3,"key_state":null,"revision":null,"#,
                r#""client_address":"203.0.113.9","client_address_from":"x-forwarded-for","#,
                r#""upstream_headers":{"x-relatch-consumer":"acme"},"removed_headers":["x-api-key"],"#,
                r#""removed_query_parameters":["api%5Fkey"],"response_headers":{}}"#,
            )
        );
        let table = view.render(Timestamp::from_millis(0));
        assert!(
            table.starts_with("DECISION     allow\nSTATUS       -\n"),
            "{table}"
        );
        assert!(
            table.ends_with("REMOVED      x-api-key\nREMOVED      ?api%5Fkey\n"),
            "{table}"
        );
    }

    #[test]
    fn a_denial_shows_its_status_and_reason() {
        let denied = auth::DeniedHttpResponse {
            status: Some(auth::HttpStatus { code: 401 }),
            headers: vec![header("www-authenticate", "Bearer")],
            body: String::new(),
        };
        let mut response = response(16, Some(HttpResponse::DeniedResponse(denied)));
        let reason = Kind::StringValue("unknown_key".to_owned());
        response.dynamic_metadata = Some(metadata(&[("reason", reason)]));
        let view = DecisionView::from(response);
        assert_eq!(view.decision, Decision::Deny);
        assert_eq!(view.http_status, Some(401));
        assert_eq!(view.reason.as_deref(), Some("unknown_key"));
        assert_eq!(view.response_headers["www-authenticate"], "Bearer");
    }

    #[test]
    fn a_denial_that_is_not_enforced_would_deny() {
        let mut response = response(0, None);
        response.dynamic_metadata = Some(metadata(&[
            ("decision", Kind::StringValue("would_deny".to_owned())),
            ("reason", Kind::StringValue("revoked".to_owned())),
        ]));
        let mut enforced = response.clone();
        let view = DecisionView::from(response);
        assert_eq!(view.decision, Decision::WouldDeny);
        assert_eq!(view.http_status, None);
        let table = view.render(Timestamp::from_millis(0));
        assert!(table.starts_with("DECISION     would_deny\n"), "{table}");
        // The status decides: metadata let nothing pass.
        enforced.status = Some(auth::Status {
            code: 16,
            message: String::new(),
        });
        assert_eq!(DecisionView::from(enforced).decision, Decision::Deny);
    }

    #[test]
    fn a_bare_response_is_read_as_envoy_reads_it() {
        assert_eq!(DecisionView::from(response(7, None)).http_status, Some(403));
        let empty = CheckResponse {
            status: None,
            dynamic_metadata: None,
            http_response: None,
        };
        assert_eq!(DecisionView::from(empty).decision, Decision::Allow);
    }
}
