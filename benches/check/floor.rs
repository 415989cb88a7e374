//! The baseline `floor`: the gRPC stack alone. Bytes come in unread, one constant response goes out.

use std::{
    convert::Infallible,
    future::{Ready, ready},
    task::{Context, Poll},
};

use anyhow::{Context as _, Result};
use bytes::{Buf, BufMut, Bytes};
use prost::Message as _;
use tonic::{
    Request, Response, Status,
    body::Body,
    codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder},
    codegen::{BoxFuture, Service},
    server::{Grpc, NamedService, UnaryService},
    service::Routes,
};

use crate::{always_ok, request::FramedRequest, server};

/// Answers every call with the same message.
#[derive(Clone, Debug)]
struct Floor {
    response: Bytes,
}

/// Messages as they are on the wire.
#[derive(Clone, Copy, Debug, Default)]
struct RawCodec;

/// Serves it until the process is killed.
///
/// # Errors
///
/// When no address can be bound.
pub(crate) fn serve() -> Result<()> {
    // What `always-ok` answers, so that both write the same.
    let request = FramedRequest::recorded("key")?;
    let request = request.decode().context("it was just encoded")?;
    let response = always_ok::answer(&request).encode_to_vec().into();
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
