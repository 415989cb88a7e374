//! The settings of a sink for a KV version 2 mount of Vault or OpenBao, in the configuration file of a control plane.

use std::{fmt, path::PathBuf, str::FromStr};

use ::http::Uri;
use serde::Deserialize;
use serde_saphyr::Location;

use super::{
    plaintext::is_loopback,
    reader::{Findings, Text},
    value::base_uri,
};
use crate::{
    key::{ConsumerId, KeyId, KeyringName},
    parse::ParseValueError,
};

/// A KV version 2 mount of Vault or OpenBao.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VaultSettings {
    /// The address of the server.
    pub address: VaultAddress,
    /// The path of the mount. Default: `secret`.
    pub mount: VaultMount,
    /// The path of a key's secret in the mount. Default: `relatch/{keyring}/{key_id}`.
    pub path: VaultPath,
    /// The file of the token, read at every delivery.
    pub token_file: PathBuf,
    /// The namespace. Default: the root namespace, or that of the token.
    pub namespace: Option<VaultNamespace>,
    /// A PEM file of certificates that are trusted in addition to those of the system, read at the start. Default: none.
    pub ca_file: Option<PathBuf>,
}

/// The address of a Vault: `https://host:port`, or `http://host:port` with a host on loopback.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VaultAddress(Uri);

/// The path of a mount: segments of `A-Z`, `a-z`, `0-9` and `. _ -`, with `/` between them; at most 128 bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VaultMount(String);

/// The path of a namespace, in the form of a [`VaultMount`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VaultNamespace(String);

/// The path of a key's secret, with placeholders for its keyring, consumer and id; at most 512 bytes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct VaultPath(Vec<PathPart>);

#[derive(Clone, Debug, PartialEq, Eq)]
enum PathPart {
    Text(String),
    Keyring,
    Consumer,
    KeyId,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RawVault {
    address: Option<Text>,
    mount: Option<Text>,
    path: Option<Text>,
    token_file: Option<Text>,
    namespace: Option<Text>,
    ca_file: Option<Text>,
}

/// The longest path and the longest mount, in bytes: a URL of both, with an address, stays below 1 KiB.
const MAX_PATH: usize = 512;
const MAX_MOUNT: usize = 128;

impl RawVault {
    pub(super) fn into_settings(
        self,
        at: usize,
        place: Location,
        found: &mut Findings,
    ) -> Option<VaultSettings> {
        let field = |name: &str| format!("sinks[{at}].vault.{name}");
        let address = found.required(
            place,
            field("address"),
            "name the server, such as https://vault.internal:8200",
            self.address.as_ref(),
            str::parse,
        );
        let mount = found.parse_or(
            field("mount"),
            self.mount.as_ref(),
            VaultMount::default(),
            str::parse,
        );
        let path = found.parse_or(
            field("path"),
            self.path.as_ref(),
            VaultPath::default(),
            str::parse,
        );
        if self.token_file.is_none() {
            found.missing(place, field("token_file"), "name the file of the token");
        }
        let token_file = found.path(field("token_file"), self.token_file.as_ref());
        let namespace = found.parse_or(
            field("namespace"),
            self.namespace.as_ref(),
            None,
            |text: &str| text.parse().map(Some),
        );
        let ca_file = found.path(field("ca_file"), self.ca_file.as_ref());
        Some(VaultSettings {
            address: address?,
            mount: mount?,
            path: path?,
            token_file: token_file?,
            namespace: namespace?,
            ca_file,
        })
    }
}

impl FromStr for VaultAddress {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let uri = base_uri(text).ok_or(ParseValueError::new(
            "use https://host:port, such as https://vault.internal:8200",
        ))?;
        let local = uri.host().is_some_and(is_loopback);
        match uri.scheme_str() {
            Some("https") => Ok(Self(uri)),
            Some("http") if local => Ok(Self(uri)),
            Some(_) | None => Err(ParseValueError::new(
                "use https://, or http:// with 127.0.0.1, [::1] or localhost: secrets are sent to this address",
            )),
        }
    }
}

impl Default for VaultMount {
    fn default() -> Self {
        Self("secret".to_owned())
    }
}

impl FromStr for VaultMount {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        segments(text).map(Self)
    }
}

impl VaultNamespace {
    /// The path as text.
    #[must_use]
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for VaultNamespace {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        segments(text).map(Self)
    }
}

impl VaultPath {
    /// Returns the path for one key. None if a segment of it would be `.` or `..`, which the name of a consumer can cause.
    ///
    /// A `/` in the name of the consumer becomes `~`, which no name contains: a name must not lead into the folder of another
    /// consumer.
    #[must_use]
    pub(crate) fn render(
        &self,
        keyring: &KeyringName,
        consumer: &ConsumerId,
        key_id: KeyId,
    ) -> Option<String> {
        let path: String = self
            .0
            .iter()
            .map(|part| match part {
                PathPart::Text(text) => text.clone(),
                PathPart::Keyring => keyring.to_string(),
                PathPart::Consumer => consumer.as_str().replace('/', "~"),
                PathPart::KeyId => key_id.to_string(),
            })
            .collect();
        let climbs = path
            .split('/')
            .any(|segment| matches!(segment, "" | "." | ".."));
        (!climbs).then_some(path)
    }
}

impl Default for VaultPath {
    fn default() -> Self {
        Self(vec![
            PathPart::Text("relatch/".to_owned()),
            PathPart::Keyring,
            PathPart::Text("/".to_owned()),
            PathPart::KeyId,
        ])
    }
}

impl FromStr for VaultPath {
    type Err = ParseValueError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        const FORM: ParseValueError = ParseValueError::new(
            "use segments of A-Z, a-z, 0-9, . _ - and the placeholders {keyring}, {consumer} and {key_id}, with '/' between them",
        );
        if text.len() > MAX_PATH {
            return Err(ParseValueError::new("use a path of at most 512 bytes"));
        }
        let mut parts = Vec::new();
        let mut rest = text;
        while !rest.is_empty() {
            let (plain, place) = match rest.split_once('{') {
                Some((plain, tail)) => {
                    let (name, tail) = tail.split_once('}').ok_or(FORM)?;
                    rest = tail;
                    let place = match name {
                        "keyring" => PathPart::Keyring,
                        "consumer" => PathPart::Consumer,
                        "key_id" => PathPart::KeyId,
                        _ => return Err(FORM),
                    };
                    (plain, Some(place))
                }
                None => (std::mem::take(&mut rest), None),
            };
            if !plain.bytes().all(|byte| byte == b'/' || is_plain(byte)) {
                return Err(FORM);
            }
            if !plain.is_empty() {
                parts.push(PathPart::Text(plain.to_owned()));
            }
            parts.extend(place);
        }
        if !parts.contains(&PathPart::KeyId) {
            return Err(ParseValueError::new(
                "add {key_id} to the path: two keys must not have the same path",
            ));
        }
        // The samples for the placeholders are neither empty nor dots, so that only the text of the file can be wrong.
        let sample = text.replace(['{', '}'], "x");
        let wrong = sample
            .split('/')
            .any(|segment| matches!(segment, "" | "." | ".."));
        if wrong { Err(FORM) } else { Ok(Self(parts)) }
    }
}

/// The form of the file.
impl fmt::Display for VaultPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for part in &self.0 {
            f.write_str(match part {
                PathPart::Text(text) => text,
                PathPart::Keyring => "{keyring}",
                PathPart::Consumer => "{consumer}",
                PathPart::KeyId => "{key_id}",
            })?;
        }
        Ok(())
    }
}

/// Without a final `/`.
impl fmt::Display for VaultAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let scheme = self.0.scheme_str().unwrap_or_default();
        let authority = self
            .0
            .authority()
            .map_or("", |authority| authority.as_str());
        write!(f, "{scheme}://{authority}")
    }
}

impl fmt::Display for VaultMount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

fn segments(text: &str) -> Result<String, ParseValueError> {
    let valid = text.len() <= MAX_MOUNT
        && text
            .split('/')
            .all(|segment| !matches!(segment, "" | "." | "..") && segment.bytes().all(is_plain));
    if valid {
        Ok(text.to_owned())
    } else {
        Err(ParseValueError::new(
            "use segments of A-Z, a-z, 0-9 and . _ - with '/' between them, such as team-a/secret",
        ))
    }
}

fn is_plain(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"._-".contains(&byte)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_consumer_cannot_climb_out_of_its_place() {
        const PATH: &str = "relatch/{keyring}/{consumer}/{key_id}";
        let keyring: KeyringName = "payments".parse().expect("a name");
        let key_id: KeyId = "7Qm2Xc91TbKe".parse().expect("an id");
        let render = |path: &str, consumer: &str| {
            let path: VaultPath = path.parse().expect("a path");
            path.render(&keyring, &consumer.parse().expect("a name"), key_id)
        };
        assert_eq!(
            render(PATH, "team/checkout@eu:1").as_deref(),
            Some("relatch/payments/team~checkout@eu:1/7Qm2Xc91TbKe")
        );
        assert_eq!(
            render(PATH, "../../admin").as_deref(),
            Some("relatch/payments/..~..~admin/7Qm2Xc91TbKe")
        );
        for climbing in [".", ".."] {
            assert_eq!(render(PATH, climbing), None, "{climbing}");
            assert!(render("{keyring}-{consumer}/{key_id}", climbing).is_some());
        }
    }
}
