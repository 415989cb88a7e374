//! What the tests stand up: each starts on a port of its own and ends when it is dropped.

pub(crate) mod authority;
pub(crate) mod client;
pub(crate) mod envoy;
pub(crate) mod eventually;
pub(crate) mod frames;
pub(crate) mod gateway;
pub(crate) mod load;
pub(crate) mod loopback;
pub(crate) mod openbao;
pub(crate) mod otlp;
pub(crate) mod page;
pub(crate) mod process;
pub(crate) mod proxy;
pub(crate) mod receiver;
pub(crate) mod relatch;
pub(crate) mod reserved;
pub(crate) mod scripted_authz;
pub(crate) mod scripted_control;
pub(crate) mod scripted_sidecar;
pub(crate) mod upstream;
pub(crate) mod wire;
