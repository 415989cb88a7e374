//! A check: from Envoy's question to the answer, and the event that reports it.
//!
//! The way of a request, in file names: [`service`] receives the message and lets `judge` answer
//! it, at once or, after the lookup of its key, in `later`. `question` reads the message
//! ([`request`] reads both encodings of headers, [`client_address`] finds the client behind proxies,
//! [`route`] uses context extensions or rules, [`credential`] searches the places of the route, and
//! `removal` plans how the key is removed), by the settings and keyrings of one `basis`. [`decision`]
//! judges it against one load of the keyring, [`response`] writes the answer, and an [`event`]
//! reports it.
//!
//! A proxy other than Envoy asks over HTTP, in its own dialect: [`forward`] translates its
//! question into that of Envoy, and the answer back.
//!
//! Every outcome is an [`Outcome`], and every denial has a [`DenyReason`]. Response, metric, span
//! and log use the same values.

mod all_settings;
mod basis;
mod check;
pub(crate) mod client_address;
pub(crate) mod condense;
mod cookie;
pub(crate) mod credential;
mod credential_value;
pub(crate) mod decision;
pub(crate) mod event;
mod failures;
pub(crate) mod forward;
mod judge;
mod later;
mod message;
mod preflight;
mod protocols;
mod query;
pub(crate) mod question;
pub(crate) mod reason;
mod removal;
pub mod request;
pub(crate) mod response;
pub(crate) mod route;
pub(crate) mod service;
pub(crate) mod settings;
mod writer;

#[cfg(test)]
mod properties;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod wire;

pub(crate) use all_settings::AllSettings;
pub use check::Metadata;
pub(crate) use client_address::{AddressSource, Hops, TrustedProxies};
#[cfg(test)]
pub(crate) use decision::Decision;
pub(crate) use decision::Outcome;
pub(crate) use event::{CheckEvent, Observer};
pub(crate) use later::LaterAnswer;
pub use reason::DenialStatus;
pub use reason::DenyReason;
pub use service::Authorizer;
#[cfg(test)]
pub(crate) use settings::HostPattern;
pub(crate) use settings::{
    Auth, CredentialSource, Enforcement, Enforcements, IdentityHeaders, Notices, PathPrefix,
    Preflight, RouteRule,
};
pub use settings::{Dialect, Settings, SettingsParts};
