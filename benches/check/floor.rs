//! The baseline `floor`: the gRPC stack alone. It does not read the bytes of a request, and sends a constant response.

use std::{
    convert::Infallible,
    fs,
    future::{Ready, ready},
    path::Path,
    task::{Context, Poll},
};

use anyhow::{Context as _, Result};
use bytes::{Buf, BufMut, Bytes};
use envoy_types::pb::envoy::service::auth::v3::CheckRequest;
use prost::Message as _;
use tonic::{
    Request, Response, Status,
    body::Body,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    codegen::{BoxFuture, Service},
    server::{Grpc, NamedService, UnaryService},
    service::Routes,
};

use crate::{
    always_ok,
    request::{CheckTemplate, FRAME_LEN},
    server,
};

/// Answers every call with the same message.
#[derive(Clone, Debug)]
struct Floor {
    response: Bytes,
}

/// A codec that leaves messages as they are on the wire.
#[derive(Clone, Copy, Debug, Default)]
struct RawCodec;

/// Serves until the process is killed, with the message in the file `answer`, or else with that of `always-ok`.
///
/// # Errors
///
/// When no address can be bound, or the file cannot be read.
pub(crate) fn serve(answer: Option<&Path>) -> Result<()> {
    let response = if let Some(file) = answer {
        fs::read(file).context("cannot read the answer")?.into()
    } else {
        let template = CheckTemplate::recorded()?;
        let request = CheckRequest::decode(&template.as_bytes()[FRAME_LEN..])?;
        always_ok::answer(&request).encode_to_vec().into()
    };
    server::serve(Routes::new(Floor { response }))
}

impl NamedService for Floor {
    const NAME: &'static str = "envoy.service.auth.v3.Authorization";
}

impl Service<http::Request<Body>> for Floor {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Self::Response, Self::Error>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        let method = self.clone();
        Box::pin(async move { Ok(Grpc::new(RawCodec).unary(method, request).await) })
    }
}

impl UnaryService<Bytes> for Floor {
    type Response = Bytes;
    type Future = Ready<Result<Response<Bytes>, Status>>;

    fn call(&mut self, _: Request<Bytes>) -> Self::Future {
        ready(Ok(Response::new(self.response.clone())))
    }
}

impl Codec for RawCodec {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        *self
    }

    fn decoder(&mut self) -> Self {
        *self
    }
}

impl Encoder for RawCodec {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, message: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(message);
        Ok(())
    }
}

impl Decoder for RawCodec {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        Ok(Some(buffer.copy_to_bytes(buffer.remaining())))
    }
}
