//! Builders for tests.

use std::{sync::LazyLock, time::Duration};

use bytes::{Bytes, BytesMut};
use http::HeaderName;
use prost::Message as _;

use super::{
    client_address::{AddressSource, TrustedProxies},
    decision::{Decision, Denial, HeldKeyring, LookedUp, Outcome, Verdict, decide},
    question::Question,
    response::{self, About, Form},
    settings::{CredentialSource, Settings, SettingsParts},
};
use crate::{
    clock::{BootTime, Reading},
    key::{Epoch, KeyRecord, KeyringName, Prefix, Revision, Timestamp, parse_block, testing},
    keyring::{Announced, KeyringSettings, Keyrings, Mirror, Slot, Staleness},
    proto::auth::{
        Address, AttributeContext, CheckRequest, CheckResponse, Entry, HeaderMap, HttpRequest,
        Peer, RawHeader, Request, SocketAddress,
    },
};

/// A request as a client sent it. It can be encoded in both ways.
#[derive(Clone, Debug)]
pub(crate) struct Message {
    pub(crate) method: Bytes,
    pub(crate) path: Bytes,
    pub(crate) host: Bytes,
    pub(crate) source: Bytes,
    pub(crate) headers: Vec<(Bytes, Bytes)>,
    pub(crate) extensions: Vec<(Bytes, Bytes)>,
}

impl Message {
    pub(crate) fn get(path: impl Into<Bytes>) -> Self {
        Self {
            method: "GET".into(),
            path: path.into(),
            host: "api.example.com".into(),
            source: "192.0.2.1".into(),
            headers: Vec::new(),
            extensions: Vec::new(),
        }
    }

    pub(crate) fn method(mut self, method: impl Into<Bytes>) -> Self {
        self.method = method.into();
        self
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

    /// Encodes the request as Envoy does by default, except that duplicate headers stay separate.
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

    /// Encodes the request as Envoy does with `encode_raw_headers`.
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
            method: self.method.clone(),
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

/// Returns settings with the default places, the query parameter `api_key` and the cookie
/// `api_key`; `payments` is the default keyring.
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

/// Returns the settings of [`parts`] with the client address from `x-forwarded-for`; the proxies in
/// 10.0.0.0/8 are trusted.
pub(crate) fn behind_proxies() -> SettingsParts {
    let trusted = parse_block("10.0.0.0/8").expect("a block");
    SettingsParts {
        client_address: AddressSource::ForwardedFor {
            trusted: TrustedProxies::new(vec![trusted]),
        },
        ..parts()
    }
}

/// Returns the settings of [`parts`].
pub(crate) fn settings() -> Settings {
    Settings::new(parts()).expect("valid settings")
}

/// The `deny_after` of [`keyrings`].
pub(crate) const DENY_AFTER: Duration = Duration::from_hours(1);
/// The time at which the keyring of [`keyrings`] was confirmed.
pub(crate) const CONFIRMED_AT: BootTime = BootTime::from_millis(1_000);
/// The revision of the keyring of [`keyrings`].
pub(crate) const REVISION: Revision = Revision::new(7);

/// Creates the confirmed keyring `payments` with `records`, and the keyring `empty`, which is not
/// loaded.
pub(crate) fn keyrings(records: Vec<KeyRecord>, issued_only: bool) -> Keyrings {
    let keyrings = unconfirmed(records, issued_only);
    let slot = keyrings.get(&testing::keyring_name()).expect("it was made");
    slot.confirm(read_at(CONFIRMED_AT).into(), DENY_AFTER);
    keyrings
}

/// Creates the same keyrings, before the control plane has confirmed them.
pub(crate) fn unconfirmed(records: Vec<KeyRecord>, issued_only: bool) -> Keyrings {
    let staleness = Staleness {
        warn_after: Duration::from_secs(30),
        deny_after: DENY_AFTER,
    };
    let empty = "empty".parse().expect("a name");
    let keyrings = Keyrings::new([(testing::keyring_name(), staleness), (empty, staleness)]);
    let slot = keyrings.get(&testing::keyring_name()).expect("it was made");
    let mut mirror = Mirror::new(slot);
    mirror.adopt(KeyringSettings {
        prefix: Prefix::default(),
        issued_only,
        peppers: vec![testing::pepper()],
        help_url: Some("https://help.example.com/rotate".to_owned()),
    });
    let mut snapshot = mirror
        .begin_snapshot(Epoch::new(1), REVISION, records.len())
        .expect("settings have come");
    for (record, hash) in records.into_iter().zip(1..) {
        snapshot.add(&Announced { record, hash });
    }
    mirror
        .finish_snapshot(snapshot, None, 0)
        .expect("the first snapshot");
    keyrings
}

/// Returns a reading of both clocks at one moment. Tests of validity set the wall clock for it
/// separately.
pub(crate) fn read_at(boot: BootTime) -> Reading {
    let millis = i64::try_from(boot.as_millis()).expect("no test waits for so long");
    Reading {
        boot,
        wall: Timestamp::from_millis(millis),
    }
}

/// The facts of a decision, copied so that they outlive the keyring.
#[derive(Debug)]
pub(crate) struct Judged {
    pub(crate) outcome: Outcome,
    /// The version that was found.
    pub(crate) record: Option<KeyRecord>,
    /// Whether a keyring was chosen.
    pub(crate) has_keyring: bool,
    /// The revision of the keyring's view; none before the first view.
    pub(crate) revision: Option<Revision>,
    pub(crate) sunset: Option<Timestamp>,
}

/// Returns the name of the keyring of tests, with a static lifetime.
pub(crate) fn keyring_name() -> &'static KeyringName {
    static NAME: LazyLock<KeyringName> = LazyLock::new(testing::keyring_name);
    &NAME
}

/// Judges a request as a sidecar with `settings` and `keyrings` does. `now` decides about validity,
/// `boot` about staleness.
pub(crate) fn judge(
    settings: &Settings,
    keyrings: &Keyrings,
    request: &CheckRequest,
    now: Timestamp,
    boot: BootTime,
) -> (Judged, CheckResponse) {
    let (decision, response) = decided(settings, keyrings, request, now, boot);
    (Judged::new(&decision), response)
}

/// Returns the decision itself, and its response. The values that it borrows are never freed: tests
/// create few.
pub(crate) fn decided(
    settings: &Settings,
    keyrings: &Keyrings,
    request: &CheckRequest,
    now: Timestamp,
    boot: BootTime,
) -> (Decision<'static>, CheckResponse) {
    let settings: &'static Settings = Box::leak(Box::new(settings.clone()));
    let request: &'static [u8] = request.encode_to_vec().leak();
    let question = match Question::read(settings, request) {
        Ok(question) => question,
        Err(error) => {
            let denial = Denial::unread(error.reason());
            let form = Form::of_message(settings, request);
            let response = written(|answer| {
                let about = About::unread(settings, None);
                response::deny(settings, &denial, form, &about, answer);
            });
            return (denial.into(), response);
        }
    };
    let slot = question
        .keyring()
        .and_then(|name| keyrings.load().get(name).cloned());
    let slot: Option<&'static Slot> = slot.map(|slot| &**Box::leak(Box::new(slot)));
    let look: Option<&'static _> = slot.map(|slot| &*Box::leak(Box::new(slot.look(read_at(boot)))));
    let looked_up: &'static LookedUp = Box::leak(Box::default());
    let held = look.map(|look| HeldKeyring::new(look, looked_up));
    let decision = at_once(decide(&question, held.as_ref(), now)).enforced(&question);
    let response = written(|answer| {
        response::respond(settings, &question, &decision, None, answer);
    });
    (decision, response)
}

/// Returns the decision; panics if the key must be looked up.
pub(crate) fn at_once(verdict: Verdict<'_>) -> Decision<'_> {
    match verdict {
        Verdict::Decided(decision) => decision,
        Verdict::LookUp(_) => panic!("the keyring is held in full"),
    }
}

/// Decodes the response that `write` writes.
pub(crate) fn written(write: impl FnOnce(&mut BytesMut)) -> CheckResponse {
    let mut answer = BytesMut::new();
    write(&mut answer);
    CheckResponse::decode(answer).expect("a response")
}

impl Judged {
    fn new(decision: &Decision<'_>) -> Self {
        Self {
            outcome: decision.outcome(),
            record: decision.key().map(|key| key.to_record()),
            has_keyring: decision.keyring().is_some(),
            revision: decision.keyring().and_then(|keyring| keyring.revision),
            sunset: match decision {
                Decision::Allow(grant) => grant.notice().and_then(|notice| notice.sunset),
                Decision::Anonymous(_)
                | Decision::Preflight(_)
                | Decision::WouldDeny(_)
                | Decision::Deny(_) => None,
            },
        }
    }
}
