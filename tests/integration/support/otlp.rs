//! A trace collector: receives OTLP over gRPC and keeps every span.

use std::{
    net::SocketAddr,
    sync::{Arc, Mutex, MutexGuard},
};

use opentelemetry_proto::tonic::{
    collector::trace::v1::{
        ExportTraceServiceRequest, ExportTraceServiceResponse,
        trace_service_server::{TraceService, TraceServiceServer},
    },
    common::v1::{AnyValue, KeyValue, any_value::Value},
    trace::v1::Span,
};
use tokio::task::JoinSet;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::{Request, Response, Status};

use super::{eventually::eventually, loopback::listen};

/// An OTLP receiver on a loopback port; ends when it is dropped.
#[derive(Debug)]
pub(crate) struct OtlpReceiver {
    addr: SocketAddr,
    spans: Spans,
    _server: JoinSet<()>,
}

/// A span and the `service.name` of who sent it.
#[derive(Clone, Debug)]
pub(crate) struct ReceivedSpan {
    pub(crate) service: String,
    pub(crate) span: Span,
}

#[derive(Clone, Debug, Default)]
struct Spans(Arc<Mutex<Vec<ReceivedSpan>>>);

impl OtlpReceiver {
    pub(crate) async fn start() -> Self {
        let (listener, addr) = listen().await;
        let spans = Spans::default();
        let service = TraceServiceServer::new(spans.clone());
        let mut server = JoinSet::new();
        server.spawn(async move {
            let serving = tonic::transport::Server::builder()
                .add_service(service)
                .serve_with_incoming(TcpListenerStream::new(listener));
            serving.await.expect("the listener stays open");
        });
        Self {
            addr,
            spans,
            _server: server,
        }
    }

    pub(crate) const fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Every span so far.
    pub(crate) fn spans(&self) -> Vec<ReceivedSpan> {
        self.spans.lock().clone()
    }

    /// Waits for a span of which `matches` holds.
    pub(crate) async fn span(&self, matches: impl Fn(&ReceivedSpan) -> bool) -> ReceivedSpan {
        eventually("a span", async || {
            self.spans.lock().iter().find(|span| matches(span)).cloned()
        })
        .await
    }
}

impl ReceivedSpan {
    /// The value of a text attribute.
    pub(crate) fn text(&self, key: &str) -> Option<&str> {
        match self.attribute(key)? {
            Value::StringValue(text) => Some(text),
            _ => None,
        }
    }

    /// The value of an attribute that is a whole number.
    pub(crate) fn int(&self, key: &str) -> Option<i64> {
        match self.attribute(key)? {
            Value::IntValue(number) => Some(*number),
            _ => None,
        }
    }

    /// The values of an attribute that is a list of texts.
    pub(crate) fn texts(&self, key: &str) -> Vec<&str> {
        let Some(Value::ArrayValue(list)) = self.attribute(key) else {
            return Vec::new();
        };
        list.values.iter().filter_map(text).collect()
    }

    fn attribute(&self, key: &str) -> Option<&Value> {
        value(&self.span.attributes, key)
    }
}

#[tonic::async_trait]
impl TraceService for Spans {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        for resource in request.into_inner().resource_spans {
            let attributes = resource.resource.unwrap_or_default().attributes;
            let service = match value(&attributes, "service.name") {
                Some(Value::StringValue(name)) => name.clone(),
                _ => String::new(),
            };
            let scopes = resource.scope_spans.into_iter();
            let spans = scopes
                .flat_map(|scope| scope.spans)
                .map(|span| ReceivedSpan {
                    service: service.clone(),
                    span,
                });
            self.lock().extend(spans);
        }
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Spans {
    fn lock(&self) -> MutexGuard<'_, Vec<ReceivedSpan>> {
        self.0.lock().expect("no holder of the spans panics")
    }
}

fn text(value: &AnyValue) -> Option<&str> {
    match value.value.as_ref() {
        Some(Value::StringValue(text)) => Some(text),
        _ => None,
    }
}

fn value<'a>(attributes: &'a [KeyValue], key: &str) -> Option<&'a Value> {
    let attribute = attributes.iter().find(|attribute| attribute.key == key)?;
    attribute.value.as_ref()?.value.as_ref()
}

#[cfg(test)]
mod tests {
    use opentelemetry_proto::tonic::{
        collector::trace::v1::trace_service_client::TraceServiceClient,
        resource::v1::Resource,
        trace::v1::{ResourceSpans, ScopeSpans},
    };

    use super::*;

    fn attribute(key: &str, value: Value) -> KeyValue {
        KeyValue {
            key: key.to_owned(),
            value: Some(AnyValue { value: Some(value) }),
            ..KeyValue::default()
        }
    }

    #[tokio::test]
    async fn a_span_arrives_with_its_service_and_attributes() {
        let collector = OtlpReceiver::start().await;
        let span = Span {
            name: "check".to_owned(),
            attributes: vec![
                attribute("auth.keyring", Value::StringValue("payments".to_owned())),
                attribute("auth.key.version", Value::IntValue(3)),
            ],
            ..Span::default()
        };
        let service = attribute("service.name", Value::StringValue("relatch".to_owned()));
        let request = ExportTraceServiceRequest {
            resource_spans: vec![ResourceSpans {
                resource: Some(Resource {
                    attributes: vec![service],
                    ..Resource::default()
                }),
                scope_spans: vec![ScopeSpans {
                    spans: vec![span],
                    ..ScopeSpans::default()
                }],
                ..ResourceSpans::default()
            }],
        };
        let mut client = TraceServiceClient::connect(format!("http://{}", collector.addr()))
            .await
            .expect("the collector listens");
        client
            .export(request)
            .await
            .expect("the collector takes it");
        let span = collector.span(|span| span.span.name == "check").await;
        assert_eq!(span.service, "relatch");
        assert_eq!(span.text("auth.keyring"), Some("payments"));
        assert_eq!(span.int("auth.key.version"), Some(3));
        assert_eq!(span.int("auth.keyring"), None);
        assert_eq!(collector.spans().len(), 1);
    }
}
