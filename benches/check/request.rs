//! The Check that is asked: one that Envoy sent, with a key that the keyring holds.

use anyhow::{Context as _, Result};
use envoy_types::pb::envoy::service::auth::v3::CheckRequest;
use prost::Message as _;

/// A gRPC message in its frame: what a client sends as the body. It holds a key: no `Debug`.
pub(crate) struct FramedRequest(Vec<u8>);

/// As Envoy 1.40 sent it for a GET with twelve headers.
const RECORDED: &[u8] = include_bytes!("../../tests/data/check-request.grpc");
/// Before a message: one byte for compression, four for the length.
const FRAME_LEN: usize = 5;

impl FramedRequest {
    /// The recorded request with `key` in the header `x-api-key`. The route names no keyring.
    ///
    /// # Errors
    ///
    /// When the recording is not what it is taken for.
    pub(crate) fn recorded(key: &str) -> Result<Self> {
        let mut request = CheckRequest::decode(&RECORDED[FRAME_LEN..])?;
        let held = request
            .attributes
            .as_mut()
            .and_then(|attributes| attributes.request.as_mut())
            .and_then(|request| request.http.as_mut())
            .and_then(|http| http.headers.get_mut("x-api-key"))
            .context("the recorded request has no key")?;
        key.clone_into(held);
        let message = request.encode_to_vec();
        let length = u32::try_from(message.len())?;
        let mut framed = vec![0];
        framed.extend(length.to_be_bytes());
        framed.extend(message);
        Ok(Self(framed))
    }

    /// The message.
    ///
    /// # Errors
    ///
    /// When it is not a `T`.
    pub(crate) fn decode<T: prost::Message + Default>(&self) -> Result<T, prost::DecodeError> {
        T::decode(&self.0[FRAME_LEN..])
    }

    /// The frame and the message.
    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The length of the message without its frame, in bytes.
    pub(crate) const fn len(&self) -> usize {
        self.0.len() - FRAME_LEN
    }
}
