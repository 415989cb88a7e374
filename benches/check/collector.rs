//! A trace collector that receives spans in OTLP over gRPC, counts them, and discards them.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::{SocketAddr, TcpListener as BlockingListener, TcpStream as BlockingStream},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
};

use anyhow::Result;
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
    trace_service_server::{TraceService, TraceServiceServer},
};
use serde_json::json;
use tokio::{net::TcpListener, runtime::Builder};
use tonic::{
    Request, Response, Status,
    transport::{Server as GrpcServer, server::TcpIncoming},
};

use crate::{
    cores::{Core, Cores},
    daemon::Daemon,
    page,
    server::this_program,
};

/// A collector in a process of its own.
#[derive(Debug)]
pub(crate) struct Collector {
    daemon: Daemon,
}

#[derive(Clone, Debug, Default)]
struct Spans(Arc<AtomicU64>);

const METRIC: &str = "spans_received";
const LABEL: &str = "kind=\"all\"";

impl Collector {
    /// Starts this program as a collector, on the core of the load.
    ///
    /// # Errors
    ///
    /// When it does not start.
    pub(crate) fn start(cores: &Cores) -> Result<Self> {
        let mut command = this_program()?;
        let daemon = cores.on(Core::Load, || {
            Daemon::start(command.args(["serve", "collector"]))
        })?;
        Ok(Self { daemon })
    }

    /// The address for spans.
    ///
    /// # Errors
    ///
    /// When the collector has not reported it.
    pub(crate) fn address(&self) -> Result<SocketAddr> {
        self.daemon.address("otlp")
    }

    /// The number of spans that it has received.
    ///
    /// # Errors
    ///
    /// When it does not answer.
    pub(crate) fn received(&self) -> Result<u64> {
        page::sum(
            &page::get(self.daemon.address("http")?, "/metrics")?,
            METRIC,
            LABEL,
        )
    }
}

/// Serves as a collector until the process is killed.
///
/// # Errors
///
/// When no address can be bound.
pub(crate) fn serve() -> Result<()> {
    let spans = Spans::default();
    let pages = BlockingListener::bind("127.0.0.1:0")?;
    let http = pages.local_addr()?.to_string();
    let counted = spans.clone();
    thread::spawn(move || {
        for stream in pages.incoming().flatten() {
            // A client that has disconnected needs no answer.
            let _gone = tell(stream, &counted);
        }
    });
    let runtime = Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let listener = TcpListener::bind("127.0.0.1:0").await?;
        let otlp = listener.local_addr()?.to_string();
        eprintln!(
            "{}",
            json!({ "message": "started", "otlp": otlp, "http": http })
        );
        let server = GrpcServer::builder().add_service(TraceServiceServer::new(spans));
        Ok(server
            .serve_with_incoming(TcpIncoming::from(listener))
            .await?)
    })
}

fn tell(mut stream: BlockingStream, spans: &Spans) -> Result<()> {
    let asked = BufReader::new(stream.try_clone()?);
    for line in asked.lines() {
        if line?.is_empty() {
            break;
        }
    }
    let count = spans.0.load(Ordering::Relaxed);
    let head = "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n";
    writeln!(stream, "{head}{METRIC}{{{LABEL}}} {count}")?;
    Ok(())
}

#[tonic::async_trait]
impl TraceService for Spans {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let resources = request.get_ref().resource_spans.iter();
        let scopes = resources.flat_map(|resource| &resource.scope_spans);
        let count: usize = scopes.map(|scope| scope.spans.len()).sum();
        self.0.fetch_add(count as u64, Ordering::Relaxed);
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}
