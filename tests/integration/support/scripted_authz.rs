//! An `ext_authz` server that records what Envoy asks and answers as the test says.

use std::{
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex},
};

use envoy_types::pb::{
    envoy::{
        config::core::v3::{
            HeaderValue, HeaderValueOption, header_value_option::HeaderAppendAction,
        },
        service::auth::v3::{
            CheckRequest, CheckResponse, DeniedHttpResponse, OkHttpResponse, attribute_context,
            authorization_server::{Authorization, AuthorizationServer},
            check_response::HttpResponse,
        },
        r#type::v3::HttpStatus,
    },
    google::{protobuf::BoolValue, rpc},
};
use tokio::{net::UnixListener, task::JoinSet};
use tokio_stream::wrappers::{TcpListenerStream, UnixListenerStream};
use tonic::{Request, Response, Status, metadata::MetadataMap, transport::Server};

use super::loopback::listen;

/// The server, on a loopback port or a unix socket; ends when it is dropped.
#[derive(Debug)]
pub(crate) struct ScriptedAuthz {
    calls: Calls,
    server: JoinSet<()>,
}

/// One Check as it came.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) metadata: MetadataMap,
    pub(crate) request: CheckRequest,
}

/// What a script answers: a response, or the failure of the call.
pub(crate) type Answer = Result<CheckResponse, Status>;

type Calls = Arc<Mutex<Vec<Call>>>;

struct Service<F> {
    script: F,
    calls: Calls,
}

impl ScriptedAuthz {
    /// Answers every call with what `script` makes of it, on a loopback port.
    pub(crate) async fn start(
        script: impl Fn(&Call) -> Answer + Send + Sync + 'static,
    ) -> (Self, SocketAddr) {
        let (listener, addr) = listen().await;
        let (mut this, service) = Self::new(script);
        let serving = Server::builder()
            .add_service(service)
            .serve_with_incoming(TcpListenerStream::new(listener));
        this.serve(serving);
        (this, addr)
    }

    /// As [`Self::start`], on a unix socket that is made at `path`.
    pub(crate) fn start_on_unix_socket(
        path: &Path,
        script: impl Fn(&Call) -> Answer + Send + Sync + 'static,
    ) -> Self {
        let listener =
            UnixListener::bind(path).expect("a socket can be made in the test's directory");
        let (mut this, service) = Self::new(script);
        let serving = Server::builder()
            .add_service(service)
            .serve_with_incoming(UnixListenerStream::new(listener));
        this.serve(serving);
        this
    }

    fn new<F>(script: F) -> (Self, AuthorizationServer<Service<F>>)
    where
        F: Fn(&Call) -> Answer + Send + Sync + 'static,
    {
        let calls = Calls::default();
        let service = AuthorizationServer::new(Service {
            script,
            calls: Arc::clone(&calls),
        });
        let server = JoinSet::new();
        (Self { calls, server }, service)
    }

    fn serve(
        &mut self,
        serving: impl Future<Output = Result<(), tonic::transport::Error>> + Send + 'static,
    ) {
        self.server
            .spawn(async move { serving.await.expect("the listener stays open") });
    }

    /// Every call so far.
    pub(crate) fn calls(&self) -> Vec<Call> {
        self.calls
            .lock()
            .expect("no holder of the calls panics")
            .clone()
    }

    /// The newest call; panics before the first.
    pub(crate) fn last_call(&self) -> Call {
        self.calls().pop().expect("Envoy has asked")
    }
}

impl Call {
    /// The attributes of the HTTP request.
    pub(crate) fn http(&self) -> &attribute_context::HttpRequest {
        let attributes = self.request.attributes.as_ref();
        attributes
            .and_then(|attributes| attributes.request.as_ref()?.http.as_ref())
            .expect("Envoy sends HTTP attributes")
    }

    /// A header in map mode.
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.http().headers.get(name).map(String::as_str)
    }

    /// The lines of a header in raw mode.
    pub(crate) fn raw_header(&self, name: &str) -> Vec<&[u8]> {
        let headers = self.http().header_map.iter().flat_map(|map| &map.headers);
        headers
            .filter(|header| header.key == name)
            .map(|header| header.raw_value.as_slice())
            .collect()
    }

    /// A value of the gRPC call's own metadata.
    pub(crate) fn metadata(&self, name: &str) -> Option<&str> {
        self.metadata.get(name)?.to_str().ok()
    }
}

#[tonic::async_trait]
impl<F> Authorization for Service<F>
where
    F: Fn(&Call) -> Answer + Send + Sync + 'static,
{
    async fn check(
        &self,
        request: Request<CheckRequest>,
    ) -> Result<Response<CheckResponse>, Status> {
        let (metadata, _, request) = request.into_parts();
        let call = Call { metadata, request };
        let answer = (self.script)(&call);
        self.calls
            .lock()
            .expect("no holder of the calls panics")
            .push(call);
        answer.map(Response::new)
    }
}

/// A response that allows.
pub(crate) fn allowed(response: OkHttpResponse) -> CheckResponse {
    CheckResponse {
        status: Some(rpc::Status::default()),
        dynamic_metadata: None,
        http_response: Some(HttpResponse::OkResponse(response)),
    }
}

/// A response that denies with the HTTP status `http`; the gRPC status is `PERMISSION_DENIED`.
pub(crate) fn denied(http: i32, response: DeniedHttpResponse) -> CheckResponse {
    CheckResponse {
        status: Some(rpc::Status {
            code: tonic::Code::PermissionDenied.into(),
            ..rpc::Status::default()
        }),
        dynamic_metadata: None,
        http_response: Some(HttpResponse::DeniedResponse(DeniedHttpResponse {
            status: Some(HttpStatus { code: http }),
            ..response
        })),
    }
}

/// A header change that replaces what is there, in both of Envoy's ways of saying so.
pub(crate) fn overwrite(name: &str, value: &str) -> HeaderValueOption {
    change(
        name,
        value,
        Some(false),
        HeaderAppendAction::OverwriteIfExistsOrAdd,
    )
}

/// A header change with the deprecated `append` and the `append_action` that was to take its place.
#[expect(deprecated, reason = "Envoy still obeys `append`")]
pub(crate) fn change(
    name: &str,
    value: &str,
    append: Option<bool>,
    append_action: HeaderAppendAction,
) -> HeaderValueOption {
    HeaderValueOption {
        header: Some(HeaderValue {
            key: name.to_owned(),
            value: value.to_owned(),
            raw_value: Vec::new(),
        }),
        append: append.map(|value| BoolValue { value }),
        append_action: append_action.into(),
        keep_empty_value: false,
    }
}
