//! A span for each call: from its first byte to the last of its answer.

use std::{
    collections::BTreeSet,
    convert::Infallible,
    future::Future,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response};
use http_body::{Frame, SizeHint};
use prost::Message as _;
use prost_types::FileDescriptorSet;
use tonic::{Code, Status, body::Body, server::NamedService};
use tower::Service;

use crate::{
    control::spans::{ControlTracer, OpenSpan},
    proto,
    trace::TraceParent,
};

/// A service whose calls have spans.
#[derive(Clone, Debug)]
pub(crate) struct TracedCalls<S> {
    service: S,
    tracer: ControlTracer,
    /// `<service>/<method>` of all methods.
    methods: Arc<BTreeSet<String>>,
}

/// An answer, and the span that ends with it. If the caller disconnects, both end.
#[derive(Debug)]
struct TracedBody {
    body: Body,
    call: TracedCall,
}

/// A call that is under way.
#[derive(Debug)]
struct TracedCall {
    span: OpenSpan,
    is_told: bool,
}

impl<S: NamedService> TracedCalls<S> {
    /// Returns the calls of `service`, with spans of `tracer`.
    #[must_use]
    pub(crate) fn new(service: S, tracer: ControlTracer) -> Self {
        Self {
            methods: Arc::new(methods(S::NAME)),
            service,
            tracer,
        }
    }

    /// Returns the method that a path names; `_OTHER` for one that does not exist, because its text
    /// comes from the caller.
    fn method(&self, path: &str) -> String {
        path.strip_prefix('/')
            .filter(|method| self.methods.contains(*method))
            .map_or_else(|| format!("{}/_OTHER", S::NAME), str::to_owned)
    }
}

impl<S> Service<Request<Body>> for TracedCalls<S>
where
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible> + NamedService,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.service.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        if !self.tracer.is_on() {
            return Box::pin(self.service.call(request));
        }
        let parent = parent(request.headers());
        let method = self.method(request.uri().path());
        let mut call = TracedCall {
            span: self.tracer.call(method, parent),
            is_told: false,
        };
        let answer = call.span.carry(self.service.call(request));
        Box::pin(async move {
            let (head, body) = answer.await?.into_parts();
            // An answer without a body has its status in the headers.
            if let Some(status) = Status::from_header_map(&head.headers) {
                call.ended(status.code());
            }
            Ok(Response::from_parts(
                head,
                Body::new(TracedBody { body, call }),
            ))
        })
    }
}

impl<S: NamedService> NamedService for TracedCalls<S> {
    const NAME: &'static str = S::NAME;
}

impl http_body::Body for TracedBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(context));
        match &frame {
            Some(Ok(frame)) => {
                if let Some(status) = frame.trailers_ref().and_then(Status::from_header_map) {
                    self.call.ended(status.code());
                }
            }
            Some(Err(status)) => self.call.ended(status.code()),
            None => {}
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl TracedCall {
    fn ended(&mut self, code: Code) {
        if self.is_told {
            return;
        }
        self.is_told = true;
        let name = name(code);
        self.span.set("rpc.response.status_code", name);
        if is_ours(code) {
            self.span.fail(name);
        }
    }
}

impl Drop for TracedCall {
    fn drop(&mut self) {
        self.ended(Code::Cancelled);
    }
}

/// Returns the span of the caller; none without a valid `traceparent`.
fn parent(headers: &HeaderMap) -> Option<TraceParent> {
    TraceParent::parse(headers.get("traceparent")?.as_bytes())
}

/// Returns `<service>/<method>` of all methods of a service in `proto/`.
fn methods(service: &str) -> BTreeSet<String> {
    let files = FileDescriptorSet::decode(proto::DESCRIPTORS);
    let files = files.expect("the build wrote the descriptors").file;
    let mut methods = BTreeSet::new();
    for file in files {
        for described in &file.service {
            if format!("{}.{}", file.package(), described.name()) == service {
                let names = described.method.iter();
                methods.extend(names.map(|method| format!("{service}/{}", method.name())));
            }
        }
    }
    methods
}

/// Returns whether a server counts a status as its own failure (OpenTelemetry's conventions for
/// gRPC).
const fn is_ours(code: Code) -> bool {
    match code {
        Code::Unknown
        | Code::DeadlineExceeded
        | Code::Unimplemented
        | Code::Internal
        | Code::Unavailable
        | Code::DataLoss => true,
        Code::Ok
        | Code::Cancelled
        | Code::InvalidArgument
        | Code::NotFound
        | Code::AlreadyExists
        | Code::PermissionDenied
        | Code::ResourceExhausted
        | Code::FailedPrecondition
        | Code::Aborted
        | Code::OutOfRange
        | Code::Unauthenticated => false,
    }
}

/// Returns the name of a status code in the specification of gRPC.
const fn name(code: Code) -> &'static str {
    match code {
        Code::Ok => "OK",
        Code::Cancelled => "CANCELLED",
        Code::Unknown => "UNKNOWN",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::NotFound => "NOT_FOUND",
        Code::AlreadyExists => "ALREADY_EXISTS",
        Code::PermissionDenied => "PERMISSION_DENIED",
        Code::ResourceExhausted => "RESOURCE_EXHAUSTED",
        Code::FailedPrecondition => "FAILED_PRECONDITION",
        Code::Aborted => "ABORTED",
        Code::OutOfRange => "OUT_OF_RANGE",
        Code::Unimplemented => "UNIMPLEMENTED",
        Code::Internal => "INTERNAL",
        Code::Unavailable => "UNAVAILABLE",
        Code::DataLoss => "DATA_LOSS",
        Code::Unauthenticated => "UNAUTHENTICATED",
    }
}
