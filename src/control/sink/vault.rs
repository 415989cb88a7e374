//! A KV version 2 mount of Vault or OpenBao, over its HTTP API.
//!
//! The content is read first, and overwritten only if it is unchanged (check-and-set): of two
//! control planes that deliver at the same time, neither undoes a write of the other.

use std::{
    fmt, io,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use http::{
    HeaderMap, HeaderValue, Method, StatusCode,
    header::{CONTENT_TYPE, HeaderName},
};
use serde::{Deserialize, Serialize};
use tokio::time::timeout;
use zeroize::Zeroizing;

use super::{SecretDelivery, redact};
use crate::{
    causes,
    config::vault::VaultSettings,
    duration::written,
    key::Secret,
    outbound::{Answer, Limits, Outbound, OutboundError, OutboundUrl, Request, SetupError},
    secret_file,
};

/// A KV version 2 mount.
#[derive(Debug)]
pub(crate) struct VaultSink {
    settings: VaultSettings,
    client: Outbound,
}

/// Why a secret was not written to a Vault, or is not known to be there.
#[derive(Debug, thiserror::Error)]
pub enum VaultError {
    /// The certificates of the settings cannot be read.
    #[error("cannot read {}: {error}; correct `ca_file` or its permissions", path.display())]
    CaFile {
        /// The path of the file.
        path: PathBuf,
        /// The error of the operating system.
        error: io::Error,
    },
    /// The HTTP client cannot be created, most likely because of the certificates of the settings.
    #[error("cannot create the HTTP client: {}; check `ca_file`", causes::in_one_line(.0))]
    Setup(SetupError),
    /// With the consumer's name, the path would lead elsewhere.
    #[error(
        "the consumer's name `{consumer}` cannot be a whole segment of `path`: add text beside {{consumer}}, or remove {{consumer}}"
    )]
    Path {
        /// The name of the consumer.
        consumer: String,
    },
    /// The token file cannot be read.
    #[error("cannot read the token in {}: {error}; correct `token_file` or its permissions", path.display())]
    Token {
        /// The path of the file.
        path: PathBuf,
        /// The error of the operating system.
        error: io::Error,
    },
    /// The file does not contain a token. The error does not repeat its content.
    #[error("{} does not contain a token: it must be one line of printable ASCII", path.display())]
    TokenForm {
        /// The path of the file.
        path: PathBuf,
    },
    /// No answer arrived. The Vault may still have stored the secret.
    #[error(
        "{}; check the server and the network between",
        causes::in_one_line(error)
    )]
    Unreachable {
        /// Why no answer arrived.
        error: OutboundError,
    },
    /// The Vault refused the request.
    #[error("cannot {what} {place}: status {status}, {errors}; {}", advice(*status, place))]
    Refused {
        /// The refused operation, `read` or `write`.
        what: &'static str,
        /// The place: `<mount>/data/<path>`.
        place: String,
        /// The status of the answer.
        status: u16,
        /// The texts of the answer, without secrets.
        errors: Errors,
    },
    /// The answer is not that of a KV version 2 mount.
    #[error(
        "{place} does not answer as a KV version 2 mount does: check `address`, `mount` and the version of the mount"
    )]
    NotKv2 {
        /// The place: `<mount>/data/<path>`.
        place: String,
    },
    /// The delivery took too long. The Vault may still have stored the secret.
    #[error("{place} was not written within {}: check the server", written(*limit))]
    TimedOut {
        /// The place: `<mount>/data/<path>`.
        place: String,
        /// The longest time of a delivery.
        limit: Duration,
    },
}

/// The texts of a Vault about a refusal: at most 3, each with at most 300 characters and without
/// secrets.
#[derive(Debug)]
pub struct Errors(Vec<String>);

/// A place in a mount, with the token for it.
struct VaultCall<'a> {
    sink: &'a VaultSink,
    url: OutboundUrl,
    /// `<mount>/data/<path>`, as the policies of Vault name it.
    place: String,
    token: Zeroizing<String>,
    secret: &'a Secret,
}

/// The content of a place.
#[derive(Debug)]
struct Found {
    /// The version in Vault's own count; 0 when the place has never had a version.
    revision: u64,
    held: Option<HeldFields>,
}

/// The fields of a secret that relatch writes. Other fields are not written by relatch.
#[derive(Deserialize)]
struct HeldFields {
    #[serde(default)]
    key: Option<String>,
    #[serde(default)]
    key_id: Option<String>,
    #[serde(default)]
    version: Option<u32>,
    #[serde(default)]
    previous: Option<String>,
}

#[derive(Deserialize)]
struct ReadAnswer {
    data: ReadData,
}

#[derive(Deserialize)]
struct ReadData {
    data: Option<HeldFields>,
    metadata: Metadata,
}

#[derive(Deserialize)]
struct WriteAnswer {
    data: Metadata,
}

#[derive(Deserialize)]
struct Metadata {
    version: u64,
}

#[derive(Deserialize)]
struct ErrorAnswer {
    errors: Vec<String>,
}

#[derive(Serialize)]
struct Write<'a> {
    data: Data<'a>,
    options: Options,
}

#[derive(Serialize)]
struct Data<'a> {
    key: &'a str,
    key_id: &'a str,
    version: u32,
    consumer: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    previous: Option<&'a str>,
}

#[derive(Serialize)]
struct Options {
    cas: u64,
}

const TOKEN: HeaderName = HeaderName::from_static("x-vault-token");
const NAMESPACE: HeaderName = HeaderName::from_static("x-vault-namespace");
/// Agents and proxies of Vault can be set to accept only requests with this header.
const REQUEST: HeaderName = HeaderName::from_static("x-vault-request");
/// The limits of one request. A Vault answers in milliseconds, or in seconds while its leader
/// changes.
const LIMITS: Limits = Limits {
    connect: Duration::from_secs(5),
    total: Duration::from_secs(10),
};
/// The most writes when another writer interferes. The other writer is a second control plane that
/// delivers the same secret, and the next read finds it.
const ATTEMPTS: u32 = 3;
/// The most texts of a refusal that are shown, and the most characters of each. Vault returns one
/// or two short ones.
const MAX_ERRORS: usize = 3;
const MAX_ERROR: usize = 300;

impl VaultSink {
    /// The longest time of a delivery: three requests at their slowest.
    pub(crate) const TIME_LIMIT: Duration = Duration::from_secs(30);

    /// Creates the sink of `settings`.
    ///
    /// # Errors
    ///
    /// When the trusted certificates cannot be used.
    pub(crate) fn new(settings: &VaultSettings) -> Result<Self, VaultError> {
        let ca = match &settings.ca_file {
            Some(path) => Some(std::fs::read(path).map_err(|error| VaultError::CaFile {
                path: path.clone(),
                error,
            })?),
            None => None,
        };
        Ok(Self {
            settings: settings.clone(),
            client: Outbound::for_operator(LIMITS, ca.as_deref()).map_err(VaultError::Setup)?,
        })
    }

    /// Checks that there is a token for a Vault. Blocks the thread.
    ///
    /// # Errors
    ///
    /// When the file cannot be read, or does not contain a token.
    pub(crate) fn check_token(settings: &VaultSettings) -> Result<(), VaultError> {
        read_token(&settings.token_file).map(drop)
    }

    /// Writes the secret to the mount, and the secret that was there as `previous`. Writes nothing
    /// when the secret is already there.
    ///
    /// # Errors
    ///
    /// When the secret is not there, or is not known to be.
    pub(crate) async fn deliver(&self, delivery: &SecretDelivery<'_>) -> Result<(), VaultError> {
        let call = self.call(delivery)?;
        match timeout(Self::TIME_LIMIT, call.deliver(delivery)).await {
            Ok(delivered) => delivered,
            Err(_elapsed) => Err(VaultError::TimedOut {
                place: call.place,
                limit: Self::TIME_LIMIT,
            }),
        }
    }

    fn call<'a>(&'a self, delivery: &SecretDelivery<'a>) -> Result<VaultCall<'a>, VaultError> {
        let VaultSettings {
            address,
            mount,
            path,
            token_file,
            namespace: _,
            ca_file: _,
        } = &self.settings;
        let path = path
            .render(delivery.keyring, delivery.consumer, delivery.version.key_id)
            .ok_or_else(|| VaultError::Path {
                consumer: delivery.consumer.to_string(),
            })?;
        let place = format!("{mount}/data/{path}");
        let url = OutboundUrl::parse(&format!("{address}/v1/{place}"))
            .expect("an address, a mount and a path make a URL of less than 2 KiB");
        let token = read_token(token_file)?;
        Ok(VaultCall {
            sink: self,
            url,
            place,
            token,
            secret: delivery.secret,
        })
    }
}

impl VaultCall<'_> {
    async fn deliver(&self, delivery: &SecretDelivery<'_>) -> Result<(), VaultError> {
        let mut refused: Option<(u64, VaultError)> = None;
        for _ in 0..ATTEMPTS {
            let found = self.read().await?;
            if found.is(delivery) {
                return Ok(());
            }
            if let Some((revision, error)) = refused.take()
                && revision == found.revision
            {
                // No other writer has changed the content: the refusal has another reason.
                return Err(error);
            }
            match self.write(delivery, &found).await {
                Err(error) if error.is_conflict() => refused = Some((found.revision, error)),
                written => return written,
            }
        }
        let (_, error) = refused.expect("each attempt returns or is refused");
        Err(error)
    }

    async fn read(&self) -> Result<Found, VaultError> {
        let answer = self.send(Method::GET, Bytes::new()).await?;
        match answer.status {
            StatusCode::OK => {
                let read: ReadAnswer = self.parse(&answer)?;
                Ok(Found {
                    revision: read.data.metadata.version,
                    held: read.data.data,
                })
            }
            StatusCode::NOT_FOUND => {
                // With metadata, the newest version was deleted, and the next one still counts from
                // it.
                if let Ok(read) = self.parse::<ReadAnswer>(&answer) {
                    let revision = read.data.metadata.version;
                    return Ok(Found {
                        revision,
                        held: None,
                    });
                }
                match self.parse::<ErrorAnswer>(&answer) {
                    Ok(ErrorAnswer { errors }) if errors.is_empty() => Ok(Found {
                        revision: 0,
                        held: None,
                    }),
                    Ok(_) | Err(_) => Err(self.refused("read", &answer, None)),
                }
            }
            _ => Err(self.refused("read", &answer, None)),
        }
    }

    async fn write(&self, delivery: &SecretDelivery<'_>, found: &Found) -> Result<(), VaultError> {
        let secret = delivery.secret.expose();
        let held = found.held.as_ref();
        let key = held.and_then(|held| held.key.as_deref());
        let previous = match key {
            Some(key) if key != secret => Some(key),
            Some(_) | None => held.and_then(|held| held.previous.as_deref()),
        };
        let write = Write {
            data: Data {
                key: secret,
                key_id: delivery.version.key_id.as_str(),
                version: delivery.version.version.get(),
                consumer: delivery.consumer.as_str(),
                previous,
            },
            options: Options {
                cas: found.revision,
            },
        };
        let body = serde_json::to_vec(&write).expect("texts and numbers can be written as JSON");
        let answer = self.send(Method::POST, body.into()).await?;
        if !answer.status.is_success() {
            return Err(self.refused("write", &answer, held));
        }
        // A version 1 mount stores the request as a secret at `data/…`, and returns no content.
        let written: WriteAnswer = self.parse(&answer)?;
        if written.data.version > found.revision {
            Ok(())
        } else {
            Err(self.not_kv2())
        }
    }

    async fn send(&self, method: Method, body: Bytes) -> Result<Answer, VaultError> {
        let mut token = HeaderValue::from_str(&self.token).expect("a token is printable ASCII");
        token.set_sensitive(true);
        let mut headers = HeaderMap::new();
        headers.insert(TOKEN, token);
        headers.insert(REQUEST, HeaderValue::from_static("true"));
        headers.insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
        if let Some(namespace) = &self.sink.settings.namespace {
            let namespace =
                HeaderValue::from_str(namespace.as_str()).expect("a namespace is printable ASCII");
            headers.insert(NAMESPACE, namespace);
        }
        let request = Request {
            method,
            url: self.url.clone(),
            headers,
            body,
            allow_private: true,
        };
        let answer = self.sink.client.send(request).await;
        answer.map_err(|error| VaultError::Unreachable { error })
    }

    fn parse<'a, T: Deserialize<'a>>(&self, answer: &'a Answer) -> Result<T, VaultError> {
        serde_json::from_slice(&answer.body).map_err(|_| self.not_kv2())
    }

    fn not_kv2(&self) -> VaultError {
        VaultError::NotKv2 {
            place: self.place.clone(),
        }
    }

    /// Returns the error of a refused request. `held` is the content of the place: the request
    /// contained it, or the refusal may repeat it.
    fn refused(
        &self,
        what: &'static str,
        answer: &Answer,
        held: Option<&HeldFields>,
    ) -> VaultError {
        let errors = match serde_json::from_slice(&answer.body) {
            Ok(ErrorAnswer { errors }) => errors,
            // Most likely the page of a proxy.
            Err(_) => Vec::new(),
        };
        let mut secrets = vec![self.secret.expose(), self.token.as_str()];
        if let Some(held) = held {
            secrets.extend(held.key.as_deref());
            secrets.extend(held.previous.as_deref());
        }
        let tell = |error: &String| -> String {
            let text = redact::without(error.as_bytes(), 0, &secrets);
            text.chars().take(MAX_ERROR).collect()
        };
        VaultError::Refused {
            what,
            place: self.place.clone(),
            status: answer.status.as_u16(),
            errors: Errors(errors.iter().take(MAX_ERRORS).map(tell).collect()),
        }
    }
}

impl Found {
    /// Returns whether the place holds the version and its secret. The number alone does not show
    /// this: a control plane that was restored from a backup assigns the number again.
    fn is(&self, delivery: &SecretDelivery<'_>) -> bool {
        self.held.as_ref().is_some_and(|held| {
            held.key.as_deref() == Some(delivery.secret.expose())
                && held.key_id.as_deref() == Some(delivery.version.key_id.as_str())
                && held.version == Some(delivery.version.version.get())
        })
    }
}

impl VaultError {
    /// Returns whether another writer may have changed the content: Vault has no status of its own
    /// for a failed check-and-set.
    const fn is_conflict(&self) -> bool {
        match self {
            Self::Refused { status, .. } => *status == StatusCode::BAD_REQUEST.as_u16(),
            Self::CaFile { .. }
            | Self::Setup(_)
            | Self::Path { .. }
            | Self::Token { .. }
            | Self::TokenForm { .. }
            | Self::Unreachable { .. }
            | Self::NotKv2 { .. }
            | Self::TimedOut { .. } => false,
        }
    }
}

impl Drop for HeldFields {
    fn drop(&mut self) {
        for secret in [self.key.take(), self.previous.take()] {
            drop(secret.map(Zeroizing::new));
        }
    }
}

impl fmt::Debug for HeldFields {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("HeldFields")
            .field("key_id", &self.key_id)
            .field("version", &self.version)
            .finish_non_exhaustive()
    }
}

impl fmt::Display for Errors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.0.is_empty() {
            return f.write_str("without a reason");
        }
        for (at, error) in self.0.iter().enumerate() {
            let separator = if at == 0 { "" } else { ", " };
            // Quoted: the text of a server must not look like lines of a log.
            write!(f, "{separator}{error:?}")?;
        }
        Ok(())
    }
}

/// Returns the advice for a status, for the operator of both systems.
fn advice(status: u16, place: &str) -> String {
    match status {
        // The documentation of Vault's HTTP API lists the statuses of Vault itself.
        300..=399 => "set `address` to the server that answers without a redirect: redirects are not followed".to_owned(),
        400 => "check what the mount requires of a secret".to_owned(),
        403 => format!(
            "the token must be valid, and its policy must allow `read`, `create` and `update` on {place}"
        ),
        404 => "check `mount` and `namespace`".to_owned(),
        429 | 472 | 473 => "set `address` to the active server, or to one that forwards to it".to_owned(),
        503 => "unseal the server, or wait for the end of its maintenance".to_owned(),
        _ => "read the log of the server".to_owned(),
    }
}

fn read_token(token_file: &Path) -> Result<Zeroizing<String>, VaultError> {
    let token = secret_file::read(token_file).map_err(|error| VaultError::Token {
        path: token_file.to_owned(),
        error,
    })?;
    let token = Zeroizing::new(token.trim().to_owned());
    if token.is_empty() || !token.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(VaultError::TokenForm {
            path: token_file.to_owned(),
        });
    }
    Ok(token)
}

#[cfg(test)]
mod tests;
