//! Configuration: YAML files become validated settings.
//!
//! `reader.rs` reads a file into raw structs of texts with their places. [`sidecar`] and [`control`] turn these into
//! settings, with the other modules: `route.rs` and `credential.rs` make the settings of checks
//! ([`crate::authz::settings`]), and all others, such as [`sink`], make types of their own. All problems of a file are
//! reported together.

mod cache;
mod client_address;
pub mod control;
mod credential;
mod enforcement;
pub(crate) mod error;
pub(crate) mod http_authz;
mod keyring;
pub(crate) mod plaintext;
mod reader;
mod route;
pub mod sidecar;
pub mod sink;
pub(crate) mod tls;
pub(crate) mod value;
pub mod vault;

use std::{fmt, path::Path};

use serde::{Deserialize, de::IgnoredAny};

pub use control::ControlSettings;
pub use error::ConfigError;
pub(crate) use reader::Places;
pub use sidecar::SidecarSettings;
pub use sink::SinkSettings;
pub(crate) use value::{ControlEndpoint, Listen, LogFormat, LogSettings, OtlpEndpoint};

/// The settings of a valid file. Their text is a summary in one line.
#[derive(Clone, Debug)]
pub enum Checked {
    /// The file of a sidecar.
    Sidecar(Box<SidecarSettings>),
    /// The file of a control plane.
    Control(Box<ControlSettings>),
}

/// A valid file.
#[derive(Clone, Debug)]
pub struct CheckedFile {
    /// The settings.
    pub settings: Checked,
    /// The places of the fields.
    pub(crate) places: Places,
}

/// The fields that only one of the two kinds of file has.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Signs {
    node: Option<IgnoredAny>,
    keyrings: Option<IgnoredAny>,
    listen: Option<IgnoredAny>,
    credentials: Option<IgnoredAny>,
    data_dir: Option<IgnoredAny>,
    store: Option<IgnoredAny>,
    discovery: Option<IgnoredAny>,
}

/// Checks the file at `path`, of a sidecar or of a control plane.
///
/// # Errors
///
/// When the daemon would refuse it, or when it has no field that only one of the daemons has.
pub fn check(path: &Path) -> Result<CheckedFile, ConfigError> {
    let (text, file) = reader::read(path)?;
    let signs: Signs = reader::from_yaml(&text, &file)?;
    if signs.of_sidecar() {
        let (settings, places) = sidecar::parse_placed(&text, &file)?;
        Ok(CheckedFile {
            settings: Checked::Sidecar(Box::new(settings)),
            places,
        })
    } else if signs.of_control() {
        let (settings, places) = control::parse_placed(&text, &file)?;
        Ok(CheckedFile {
            settings: Checked::Control(Box::new(settings)),
            places,
        })
    } else {
        Err(ConfigError::UnknownKind { file })
    }
}

impl Signs {
    fn of_sidecar(&self) -> bool {
        self.node.is_some()
            || self.keyrings.is_some()
            || self.listen.is_some()
            || self.credentials.is_some()
    }

    fn of_control(&self) -> bool {
        self.data_dir.is_some() || self.store.is_some() || self.discovery.is_some()
    }
}

impl fmt::Display for Checked {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Sidecar(settings) => {
                let keyrings = settings.keyrings.iter();
                let keyrings = keyrings.map(|keyring| {
                    let is_enforced = settings.authz.enforces(&keyring.name);
                    (keyring.name.as_str(), is_enforced)
                });
                let patterns = settings.authz.pattern_enforcements().iter();
                let patterns = patterns
                    .map(|(pattern, enforcement)| (pattern.as_str(), !enforcement.is_observed()));
                let names = keyrings.chain(patterns).map(|(name, is_enforced)| {
                    let note = if is_enforced { "" } else { " (not enforced)" };
                    format!("{name}{note}")
                });
                let names: Vec<_> = names.collect();
                write!(
                    f,
                    "sidecar {} on {}: keyrings {}; {} routes, {} credential sources",
                    settings.node.id,
                    settings.listen,
                    names.join(", "),
                    settings.authz.routes().len(),
                    settings.authz.credentials().len(),
                )?;
                let Some(http_authz) = &settings.http_authz else {
                    return Ok(());
                };
                write!(f, "; over HTTP on {}:", http_authz.listen)?;
                for (at, profile) in http_authz.profiles.iter().enumerate() {
                    let comma = if at == 0 { "" } else { "," };
                    let dialect = profile.authz.dialect();
                    write!(f, "{comma} {} for {dialect}", profile.name)?;
                }
                Ok(())
            }
            Self::Control(settings) => write!(
                f,
                "control plane: discovery on {}, admin on {}, store {}; {} sinks",
                settings.discovery,
                settings.admin,
                settings.store.display(),
                settings.sinks.len(),
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn samples_are_right_and_say_what_they_are() {
        let deploy = Path::new(env!("CARGO_MANIFEST_DIR")).join("deploy");
        let sidecar = check(&deploy.join("sidecar.yaml")).expect("a right sample");
        assert_eq!(
            sidecar.settings.to_string(),
            "sidecar edge-1 on 127.0.0.1:9001: keyrings payments, partners, devices; 2 routes, 4 credential sources; over HTTP on 127.0.0.1:9003: shop for traefik"
        );
        let control = check(&deploy.join("control.yaml")).expect("a right sample");
        assert_eq!(
            control.settings.to_string(),
            "control plane: discovery on 0.0.0.0:9010, admin on 127.0.0.1:9011, \
             store /var/lib/relatch/relatch.db; 3 sinks"
        );
    }

    #[test]
    fn a_file_of_neither_kind_is_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("other.yaml");
        for text in ["", "http: 127.0.0.1:1", "some: thing"] {
            std::fs::write(&path, text).expect("writable");
            let error = check(&path).expect_err("neither kind");
            assert!(
                matches!(error, ConfigError::UnknownKind { .. }),
                "{text:?}: {error}"
            );
        }
        std::fs::write(&path, "- a list").expect("writable");
        let error = check(&path).expect_err("no fields");
        assert_eq!(
            error.to_string(),
            format!(
                "{}:1:1: use fields with values, such as `name: value`",
                path.display()
            )
        );
    }
}
