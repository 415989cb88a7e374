//! The settings of all checks of a sidecar.

use std::sync::Arc;

use super::settings::Settings;

/// The settings of the checks of Envoy, and of each profile for proxies that ask over HTTP. Cheap to
/// clone.
#[derive(Clone, Debug)]
pub struct AllSettings {
    envoy: Arc<Settings>,
    profiles: Arc<[Settings]>,
}

impl AllSettings {
    /// Combines the settings for Envoy with those of the profiles, in their order.
    #[must_use]
    pub(crate) fn new(envoy: Settings, profiles: impl Iterator<Item = Settings>) -> Self {
        Self {
            envoy: Arc::new(envoy),
            profiles: profiles.collect(),
        }
    }

    /// Returns the settings for Envoy.
    #[must_use]
    pub(crate) fn envoy(&self) -> &Settings {
        &self.envoy
    }

    /// Returns the settings of the profile at a position, or else those for Envoy.
    #[must_use]
    pub(crate) fn of(&self, profile: Option<usize>) -> &Settings {
        profile.map_or(&self.envoy, |profile| &self.profiles[profile])
    }
}

impl From<Arc<Settings>> for AllSettings {
    /// Returns settings without profiles.
    fn from(envoy: Arc<Settings>) -> Self {
        Self {
            envoy,
            profiles: Arc::default(),
        }
    }
}
