//! A check: from Envoy's question to the answer, and what is told of it.
//!
//! The way of a request, in file names: [`service`] takes the message, `question` reads it ([`request`] behind either
//! encoding of headers, [`credential`] from `query`, `cookie` and header, [`route`] by context extensions or rules),
//! [`decision`] judges it against one load of the keyring, [`response`] writes the answer, and an [`event`] tells of it.
//!
//! Every outcome is an [`Outcome`], every denial has a [`DenyReason`]; response, metric, span and log use the same.

mod cookie;
pub mod credential;
pub mod decision;
pub mod event;
mod failures;
mod inline;
mod later;
mod message;
mod query;
pub mod question;
pub mod reason;
pub mod request;
pub mod response;
pub mod route;
pub mod service;
pub mod settings;

#[cfg(test)]
mod properties;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod wire;

pub use decision::{Decision, Held, LookedUp, Outcome, Verdict, decide};
pub use event::{CheckEvent, Observer};
pub use later::LaterAnswer;
pub use question::Question;
pub use reason::{DenialStatus, DenyReason};
pub use service::Authorizer;
pub use settings::{
    Auth, CredentialSource, HostPattern, IdentityHeaders, Notices, ParseSettingError, PathPrefix,
    QueryName, RouteRule, Settings, SettingsError, SettingsParts, Token,
};
