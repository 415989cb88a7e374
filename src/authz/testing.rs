//! Builders for tests.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::HeaderName;

use super::{
    decision::{Decision, Held, decide},
    question::Question,
    request::CheckInput,
    response,
    settings::{CredentialSource, Settings, SettingsParts},
};
use crate::{
    clock::BootTime,
    key::{Epoch, KeyRecord, Prefix, Revision, Timestamp, testing},
    keyring::{Announced, KeyringSettings, Keyrings, Mirror, Staleness},
    proto::auth::{
        Address, AttributeContext, CheckRequest, CheckResponse, Entry, HeaderMap, HttpRequest,
        Peer, RawHeader, Request, SocketAddress,
    },
};

/// A request as a client sent it, to be encoded in either way.
#[derive(Clone, Debug)]
pub(crate) struct Message {
    pub(crate) path: Bytes,
    pub(crate) host: Bytes,
    pub(crate) source: Bytes,
    pub(crate) headers: Vec<(Bytes, Bytes)>,
    pub(crate) extensions: Vec<(Bytes, Bytes)>,
}

impl Message {
    pub(crate) fn get(path: impl Into<Bytes>) -> Self {
        Self {
            path: path.into(),
            host: "api.example.com".into(),
            source: "192.0.2.1".into(),
            headers: Vec::new(),
            extensions: Vec::new(),
        }
    }

    pub(crate) fn header(mut self, name: impl Into<Bytes>, value: impl Into<Bytes>) -> Self {
        self.headers.push((name.into(), value.into()));
        self
    }

    pub(crate) fn extension(mut self, name: impl Into<Bytes>, value: impl Into<Bytes>) -> Self {
        self.extensions.push((name.into(), value.into()));
        self
    }

    pub(crate) fn host(mut self, host: impl Into<Bytes>) -> Self {
        self.host = host.into();
        self
    }

    pub(crate) fn from(mut self, source: impl Into<Bytes>) -> Self {
        self.source = source.into();
        self
    }

    /// As Envoy sends it by default, except that duplicates are left apart.
    pub(crate) fn joined(&self) -> CheckRequest {
        self.request(HttpRequest {
            headers: self
                .headers
                .iter()
                .map(|(key, value)| entry(key.clone(), value.clone()))
                .collect(),
            ..HttpRequest::default()
        })
    }

    /// As Envoy sends it with `encode_raw_headers`.
    pub(crate) fn raw(&self) -> CheckRequest {
        let headers = self
            .headers
            .iter()
            .map(|(key, value)| RawHeader {
                key: key.clone(),
                value: Bytes::new(),
                raw_value: value.clone(),
            })
            .collect();
        self.request(HttpRequest {
            header_map: Some(HeaderMap { headers }),
            ..HttpRequest::default()
        })
    }

    #[expect(
        clippy::unused_self,
        reason = "reads as a part of the message at the call"
    )]
    pub(crate) fn http_of<'a>(&self, request: &'a mut CheckRequest) -> &'a mut HttpRequest {
        request
            .attributes
            .as_mut()
            .and_then(|attributes| attributes.request.as_mut())
            .and_then(|request| request.http.as_mut())
            .expect("an HTTP request")
    }

    fn request(&self, http: HttpRequest) -> CheckRequest {
        let http = HttpRequest {
            method: "GET".into(),
            path: self.path.clone(),
            host: self.host.clone(),
            ..http
        };
        let socket_address = Some(SocketAddress {
            address: self.source.clone(),
        });
        CheckRequest {
            attributes: Some(AttributeContext {
                source: Some(Peer {
                    address: Some(Address { socket_address }),
                }),
                request: Some(Request { http: Some(http) }),
                context_extensions: self
                    .extensions
                    .iter()
                    .map(|(key, value)| entry(key.clone(), value.clone()))
                    .collect(),
            }),
        }
    }
}

pub(crate) fn entry(key: impl Into<Bytes>, value: impl Into<Bytes>) -> Entry {
    Entry {
        key: key.into(),
        value: value.into(),
    }
}

/// The default places, the query parameter `api_key` and the cookie `api_key`; keyring `payments` by default.
pub(crate) fn parts() -> SettingsParts {
    SettingsParts {
        credentials: vec![
            CredentialSource::Header {
                name: HeaderName::from_static("x-api-key"),
                scheme: None,
            },
            CredentialSource::Header {
                name: http::header::AUTHORIZATION,
                scheme: Some("Bearer".parse().expect("a scheme")),
            },
            CredentialSource::Query {
                name: "api_key".parse().expect("a name"),
            },
            CredentialSource::Cookie {
                name: "api_key".parse().expect("a name"),
            },
        ],
        default_keyring: Some(testing::keyring_name()),
        ..SettingsParts::default()
    }
}

/// Settings of [`parts`].
pub(crate) fn settings() -> Settings {
    Settings::new(parts()).expect("valid settings")
}

/// The limit of [`keyrings`].
pub(crate) const DENY_AFTER: Duration = Duration::from_hours(1);
/// When the keyring of [`keyrings`] was confirmed.
pub(crate) const CONFIRMED_AT: BootTime = BootTime::from_millis(1_000);
/// Where its view is.
pub(crate) const REVISION: Revision = Revision::new(7);

/// The keyring `payments` with `records`, confirmed, and an `empty` one that never came.
pub(crate) fn keyrings(records: Vec<KeyRecord>, issued_only: bool) -> Keyrings {
    let staleness = Staleness {
        warn_after: Duration::from_secs(30),
        deny_after: DENY_AFTER,
    };
    let empty = "empty".parse().expect("a name");
    let keyrings = Keyrings::new([(testing::keyring_name(), staleness), (empty, staleness)]);
    let slot = keyrings.get(&testing::keyring_name()).expect("it was made");
    let mut mirror = Mirror::new(Arc::clone(slot));
    mirror.adopt(KeyringSettings {
        prefix: Prefix::default(),
        issued_only,
        peppers: vec![testing::pepper()],
        help_url: Some("https://help.example.com/rotate".to_owned()),
    });
    let mut snapshot = mirror
        .begin_snapshot(Epoch::new(1), REVISION)
        .expect("settings have come");
    for (record, hash) in records.into_iter().zip(1..) {
        snapshot.add(Announced { record, hash });
    }
    mirror
        .finish_snapshot(snapshot, None, 0)
        .expect("the first snapshot");
    slot.confirm(CONFIRMED_AT);
    keyrings
}

/// What a sidecar with `settings` and `keyrings` makes of a request at a moment.
pub(crate) fn judge(
    settings: &Settings,
    keyrings: &Keyrings,
    request: &CheckRequest,
    now: Timestamp,
    boot: BootTime,
) -> (Decision, CheckResponse) {
    let Ok(question) = Question::read(settings, request) else {
        let denial = super::decision::Denial::malformed();
        let response = response::deny(settings, &denial, None);
        return (denial.into(), response);
    };
    let slot = question
        .keyring()
        .and_then(|name| keyrings.iter().find(|slot| slot.name().as_str() == name));
    let view = slot.map(|slot| slot.load());
    let view = view.as_ref().and_then(|view| view.as_deref());
    let held = slot.map(|slot| Held::new(slot, view, boot));
    let decision = decide(&question, held.as_ref(), now);
    let input = CheckInput::new(request).expect("it was read");
    let response = response::respond(settings, &input, &decision, None);
    (decision, response)
}
