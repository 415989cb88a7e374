//! Sends spans to a collector on a task of its own, so that checks never wait for it.
//!
//! A span that ends goes into a bounded queue. If the queue is full, the span is dropped and counted. The task sends batches
//! from the queue over OTLP/gRPC. If the collector hangs, fails or is absent, spans are lost, but nothing waits. The caller
//! decides whether a span is created: every created span is queued.

use std::{collections::BTreeMap, fmt, mem, time::Duration};

use opentelemetry::{Context, InstrumentationScope, KeyValue, trace::TracerProvider as _};
use opentelemetry_otlp::WithExportConfig as _;
use opentelemetry_sdk::{
    Resource,
    error::OTelSdkResult,
    trace::{Sampler, SdkTracer, SdkTracerProvider, Span, SpanData, SpanExporter, SpanProcessor},
};
use prometheus_client::metrics::counter::Counter;
use tokio::{sync::mpsc, task::JoinHandle, time::timeout};
use tokio_util::sync::CancellationToken;

use crate::config::OtlpEndpoint;

/// The task that sends spans. When it is dropped, the spans in the queue are lost. If the task panics, every later span is
/// counted as dropped.
#[derive(Debug)]
#[must_use = "without it, queued spans are dropped"]
pub(crate) struct SpanPipeline {
    stop: CancellationToken,
    task: JoinHandle<()>,
}

/// The source of spans: the attributes of their resource.
#[derive(Clone, Debug)]
pub(crate) struct SpanSource<'a> {
    /// `service.name`.
    pub(crate) service_name: &'a str,
    /// `service.instance.id`: the node id.
    pub(crate) instance: &'a str,
    /// The labels of the node; each becomes `relatch.node.label.<name>`.
    pub(crate) labels: &'a BTreeMap<String, String>,
}

/// The address of the collector cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot send spans to `{endpoint}`")]
pub struct ExportError {
    endpoint: String,
    source: opentelemetry_otlp::ExporterBuildError,
}

/// The most spans in the queue: eight batches. At about 1 KiB each, they need some megabytes.
const QUEUE: usize = 4096;

/// The most spans in one message: at about 1 KiB each, it stays far below the 4 MiB that gRPC servers accept.
const BATCH: usize = 512;

/// How long a batch waits to become full: short enough for an operator who watches a rotation.
const LINGER: Duration = Duration::from_secs(1);

/// The timeout of one batch, retries included.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);

/// The sending end of the queue.
struct Queueing {
    queue: mpsc::Sender<SpanData>,
    stop: CancellationToken,
    dropped: Counter,
}

/// The receiving end of the queue. When it is dropped, the spans in it and in the batch are counted as dropped.
struct Queued {
    queue: mpsc::Receiver<SpanData>,
    batch: Vec<SpanData>,
    dropped: Counter,
}

/// The spans of a message that is being sent. They are counted as dropped unless they arrive.
struct Underway {
    spans: u64,
    dropped: Counter,
}

impl SpanPipeline {
    /// Starts to send spans to `endpoint`, on the current runtime. Lost spans are counted in `dropped`.
    ///
    /// # Errors
    ///
    /// When the endpoint, or a variable `OTEL_EXPORTER_OTLP_*`, cannot be used. It is not an error if nothing answers there.
    ///
    /// # Panics
    ///
    /// Outside a tokio runtime.
    pub(crate) fn start(
        endpoint: &OtlpEndpoint,
        source: &SpanSource<'_>,
        dropped: Counter,
    ) -> Result<(SdkTracer, Self), ExportError> {
        let exporter = opentelemetry_otlp::SpanExporter::builder()
            .with_tonic()
            .with_endpoint(endpoint.to_string())
            .with_timeout(EXPORT_TIMEOUT)
            .build()
            .map_err(|source| ExportError {
                endpoint: endpoint.to_string(),
                source,
            })?;
        Ok(Self::with_exporter(exporter, source, dropped))
    }

    fn with_exporter(
        mut exporter: impl SpanExporter + 'static,
        source: &SpanSource<'_>,
        dropped: Counter,
    ) -> (SdkTracer, Self) {
        let resource = source.resource();
        exporter.set_resource(&resource);
        let (sender, receiver) = mpsc::channel(QUEUE);
        let stop = CancellationToken::new();
        let provider = SdkTracerProvider::builder()
            .with_sampler(Sampler::AlwaysOn)
            .with_resource(resource)
            .with_span_processor(Queueing {
                queue: sender,
                stop: stop.clone(),
                dropped: dropped.clone(),
            })
            .build();
        let scope = InstrumentationScope::builder(env!("CARGO_PKG_NAME"))
            .with_version(env!("CARGO_PKG_VERSION"))
            .build();
        let queued = Queued {
            queue: receiver,
            batch: Vec::with_capacity(BATCH),
            dropped,
        };
        let task = tokio::spawn(queued.send_all(exporter, stop.clone()));
        (provider.tracer_with_scope(scope), Self { stop, task })
    }

    /// Sends the queued spans, for at most `deadline`. The spans that are left, and every span that ends later, are dropped
    /// and counted.
    pub(crate) async fn shutdown(mut self, deadline: Duration) {
        self.stop.cancel();
        match timeout(deadline, &mut self.task).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                tracing::error!(
                    error = &error as &dyn std::error::Error,
                    "the task that sends spans failed"
                );
            }
            Err(_late) => {
                tracing::warn!("the collector did not receive the last spans in time");
                self.task.abort();
                // An aborted task ends at the await where it hangs. Its spans are then counted.
                let _aborted = (&mut self.task).await;
            }
        }
    }
}

impl Drop for SpanPipeline {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl SpanSource<'_> {
    fn resource(&self) -> Resource {
        let labels = self.labels.iter().map(|(name, value)| {
            KeyValue::new(format!("relatch.node.label.{name}"), value.clone())
        });
        Resource::builder_empty()
            .with_attributes([
                KeyValue::new("service.name", self.service_name.to_owned()),
                KeyValue::new("service.version", env!("CARGO_PKG_VERSION")),
                KeyValue::new("service.instance.id", self.instance.to_owned()),
            ])
            .with_attributes(labels)
            .build()
    }
}

impl SpanProcessor for Queueing {
    fn on_start(&self, _span: &mut Span, _context: &Context) {}

    fn on_end(&self, span: SpanData) {
        if self.queue.try_send(span).is_err() {
            self.dropped.inc();
        }
    }

    /// Does nothing: the task sends the queued spans within [`LINGER`].
    fn force_flush(&self) -> OTelSdkResult {
        Ok(())
    }

    /// Tells the task to send the queued spans and to end. It does not wait for the task.
    fn shutdown_with_timeout(&self, _timeout: Duration) -> OTelSdkResult {
        self.stop.cancel();
        Ok(())
    }
}

impl Queued {
    /// Sends batches until `stop` is cancelled and the queue is empty.
    async fn send_all(mut self, exporter: impl SpanExporter, stop: CancellationToken) {
        while !stop.is_cancelled() {
            tokio::select! {
                () = stop.cancelled() => {}
                open = self.fill() => if !open { break },
            }
            self.send(&exporter).await;
        }
        // Spans that end from now on find the queue closed, and are counted as dropped.
        self.queue.close();
        while self.receive().await {
            self.send(&exporter).await;
        }
    }

    /// Waits for a span, and then for a full batch. False if no more spans can arrive. Cancellation safe: the batch keeps
    /// the received spans.
    async fn fill(&mut self) -> bool {
        let open = self.receive().await;
        let full = async { while self.batch.len() < BATCH && self.receive().await {} };
        // The batch is sent even if it is not full.
        let _full = timeout(LINGER, full).await;
        open
    }

    /// Waits for spans. False if no more can arrive. Cancellation safe.
    async fn receive(&mut self) -> bool {
        let room = BATCH - self.batch.len();
        self.queue.recv_many(&mut self.batch, room).await > 0
    }

    async fn send(&mut self, exporter: &impl SpanExporter) {
        if self.batch.is_empty() {
            return;
        }
        let spans = mem::replace(&mut self.batch, Vec::with_capacity(BATCH));
        let underway = Underway {
            spans: spans.len() as u64,
            dropped: self.dropped.clone(),
        };
        match timeout(EXPORT_TIMEOUT, exporter.export(spans)).await {
            Ok(Ok(())) => underway.arrived(),
            Ok(Err(error)) => {
                tracing::debug!(
                    error = &error as &dyn std::error::Error,
                    "spans are dropped"
                );
            }
            Err(_late) => tracing::debug!("spans are dropped: the collector does not answer"),
        }
    }
}

impl Drop for Queued {
    fn drop(&mut self) {
        self.queue.close();
        let left = self.queue.len() + self.batch.len();
        self.dropped.inc_by(left as u64);
    }
}

impl Underway {
    fn arrived(mut self) {
        self.spans = 0;
    }
}

impl Drop for Underway {
    fn drop(&mut self) {
        self.dropped.inc_by(self.spans);
    }
}

impl fmt::Debug for Queueing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Queueing").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::{
        net::{Ipv4Addr, SocketAddr},
        time::{Instant, SystemTime},
    };

    use opentelemetry::trace::{
        Span as _, SpanContext, SpanId, SpanKind, TraceContextExt as _, TraceFlags, TraceId,
        TraceState, Tracer as _,
    };
    use opentelemetry_proto::tonic::{
        collector::trace::v1::{
            ExportTraceServiceRequest, ExportTraceServiceResponse,
            trace_service_server::{TraceService, TraceServiceServer},
        },
        common::v1::{KeyValue as ProtoKeyValue, any_value::Value},
    };
    use tokio::net::TcpListener;
    use tokio_stream::wrappers::TcpListenerStream;
    use tonic::{Request, Response, Status};

    use super::*;
    use crate::reserved::Reserved;

    /// Longer than anything here takes, so that only a hung test meets it.
    const SOON: Duration = Duration::from_mins(2);

    /// A collector that hands over what it receives.
    struct Collector(mpsc::UnboundedSender<ExportTraceServiceRequest>);

    #[tonic::async_trait]
    impl TraceService for Collector {
        async fn export(
            &self,
            request: Request<ExportTraceServiceRequest>,
        ) -> Result<Response<ExportTraceServiceResponse>, Status> {
            self.0
                .send(request.into_inner())
                .map_err(|_| Status::unavailable("the test is over"))?;
            Ok(Response::new(ExportTraceServiceResponse::default()))
        }
    }

    async fn collector() -> (
        OtlpEndpoint,
        mpsc::UnboundedReceiver<ExportTraceServiceRequest>,
    ) {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .await
            .expect("a port");
        let endpoint = endpoint(listener.local_addr().expect("bound"));
        let (sender, received) = mpsc::unbounded_channel();
        let server = tonic::transport::Server::builder()
            .add_service(TraceServiceServer::new(Collector(sender)))
            .serve_with_incoming(TcpListenerStream::new(listener));
        tokio::spawn(server);
        (endpoint, received)
    }

    fn endpoint(address: SocketAddr) -> OtlpEndpoint {
        format!("http://{address}").parse().expect("an endpoint")
    }

    fn start(endpoint: &OtlpEndpoint) -> (SdkTracer, SpanPipeline, Counter) {
        let dropped = Counter::default();
        let labels = BTreeMap::from([("zone".to_owned(), "eu-1a".to_owned())]);
        let source = SpanSource {
            service_name: "relatch-sidecar",
            instance: "edge-1",
            labels: &labels,
        };
        let (tracer, pipeline) =
            SpanPipeline::start(endpoint, &source, dropped.clone()).expect("a right endpoint");
        (tracer, pipeline, dropped)
    }

    fn end_spans(tracer: &SdkTracer, count: usize) {
        for _ in 0..count {
            tracer.start_with_context("Check", &Context::new()).end();
        }
    }

    fn text<'a>(attributes: &'a [ProtoKeyValue], key: &str) -> &'a str {
        let value = attributes
            .iter()
            .find(|attribute| attribute.key == key)
            .and_then(|attribute| attribute.value.as_ref()?.value.as_ref());
        match value {
            Some(Value::StringValue(text)) => text,
            other => panic!("{key} is {other:?}"),
        }
    }

    #[tokio::test]
    async fn a_span_arrives_as_it_was_made() {
        let (endpoint, mut received) = collector().await;
        let (tracer, pipeline, dropped) = start(&endpoint);
        let parent = SpanContext::new(
            TraceId::from(0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c),
            SpanId::from(0xb7ad_6b71_6920_3331),
            TraceFlags::SAMPLED,
            true,
            TraceState::default(),
        );
        let from = SystemTime::UNIX_EPOCH + Duration::from_nanos(1_700_000_000_000_000_001);
        let to = from + Duration::from_micros(7);
        tracer
            .span_builder("envoy.service.auth.v3.Authorization/Check")
            .with_kind(SpanKind::Server)
            .with_start_time(from)
            .with_attributes([KeyValue::new("auth.decision", "allow")])
            .start_with_context(&tracer, &Context::new().with_remote_span_context(parent))
            .end_with_timestamp(to);

        let request = timeout(SOON, received.recv())
            .await
            .expect("in time")
            .expect("a request");
        let resource_spans = &request.resource_spans[0];
        let resource = resource_spans.resource.as_ref().expect("a resource");
        assert_eq!(
            text(&resource.attributes, "service.name"),
            "relatch-sidecar"
        );
        assert_eq!(
            text(&resource.attributes, "service.version"),
            env!("CARGO_PKG_VERSION")
        );
        assert_eq!(text(&resource.attributes, "service.instance.id"), "edge-1");
        assert_eq!(
            text(&resource.attributes, "relatch.node.label.zone"),
            "eu-1a"
        );
        let [span] = resource_spans.scope_spans[0].spans.as_slice() else {
            panic!("one span was made: {request:?}");
        };
        assert_eq!(span.name, "envoy.service.auth.v3.Authorization/Check");
        assert_eq!(span.kind, 2, "SPAN_KIND_SERVER");
        assert_eq!(
            span.trace_id,
            0x0af7_6519_16cd_43dd_8448_eb21_1c80_319c_u128.to_be_bytes()
        );
        assert_eq!(span.parent_span_id, 0xb7ad_6b71_6920_3331_u64.to_be_bytes());
        assert_eq!(span.start_time_unix_nano, 1_700_000_000_000_000_001);
        assert_eq!(span.end_time_unix_nano, 1_700_000_000_000_007_001);
        assert_eq!(text(&span.attributes, "auth.decision"), "allow");
        pipeline.shutdown(SOON).await;
        assert_eq!(dropped.get(), 0);
    }

    #[tokio::test]
    async fn shutdown_sends_what_is_queued() {
        let (endpoint, mut received) = collector().await;
        let (tracer, pipeline, dropped) = start(&endpoint);
        end_spans(&tracer, BATCH + 1);
        pipeline.shutdown(SOON).await;
        let mut arrived = 0;
        while let Ok(request) = received.try_recv() {
            arrived += request.resource_spans[0].scope_spans[0].spans.len();
        }
        assert_eq!(arrived, BATCH + 1);
        assert_eq!(dropped.get(), 0);
        end_spans(&tracer, 3);
        assert_eq!(dropped.get(), 3, "what ends after the shutdown is counted");
    }

    #[tokio::test]
    async fn a_collector_that_hangs_costs_spans_and_no_time() {
        // The system accepts connections for it; it never reads.
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .await
            .expect("a port");
        let (tracer, pipeline, dropped) = start(&endpoint(listener.local_addr().expect("bound")));
        let (made, done) = tokio::sync::oneshot::channel();
        let maker = tracer.clone();
        // A thread outside the runtime: were `end` to wait for the queue, it would wait for ever or panic.
        std::thread::spawn(move || {
            end_spans(&maker, 2 * QUEUE);
            made.send(()).expect("the test listens");
        });
        timeout(SOON, done)
            .await
            .expect("no span waits")
            .expect("the thread does not panic");
        assert!(dropped.get() > 0, "the queue cannot have taken all");
        #[expect(clippy::disallowed_methods, reason = "a test of real time")]
        let begin = Instant::now();
        pipeline.shutdown(Duration::from_millis(10)).await;
        assert!(
            begin.elapsed() < EXPORT_TIMEOUT,
            "the deadline did not hold"
        );
        assert_eq!(
            dropped.get(),
            2 * QUEUE as u64,
            "each lost span is counted once"
        );
        drop(listener);
    }

    #[tokio::test]
    async fn a_collector_that_is_absent_costs_spans() {
        let nobody = Reserved::new();
        let (tracer, pipeline, dropped) = start(&endpoint(nobody.address()));
        end_spans(&tracer, 5);
        pipeline.shutdown(SOON).await;
        assert_eq!(dropped.get(), 5);
    }

    #[tokio::test]
    async fn a_dropped_pipeline_counts_what_it_held() {
        let (endpoint, _received) = collector().await;
        let (tracer, pipeline, dropped) = start(&endpoint);
        end_spans(&tracer, 5);
        drop(pipeline);
        timeout(SOON, async {
            while dropped.get() < 5 {
                tokio::task::yield_now().await;
            }
        })
        .await
        .expect("the task goes and counts");
        assert_eq!(dropped.get(), 5);
    }
}
