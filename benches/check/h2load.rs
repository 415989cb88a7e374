//! Load from `h2load`, an independent program that repeats one request, and its results.

use std::{
    fmt, fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, Result, ensure};

/// A request for `h2load`.
#[derive(Debug)]
pub(crate) struct H2load {
    question: Question,
    log: PathBuf,
}

/// The form of the request.
#[derive(Debug)]
enum Question {
    /// A call of gRPC, whose message in its frame is in this file.
    Grpc(PathBuf),
    /// A GET over HTTP/1.1.
    Http {
        path: String,
        headers: Vec<(String, String)>,
    },
}

/// The number of requests at the same time.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Pressure {
    connections: u32,
    /// On each connection.
    streams: u32,
}

/// The latencies, from the first byte of a request to the last byte of its answer, in microseconds.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Latency {
    pub(crate) p50: f64,
    pub(crate) p99: f64,
}

impl Pressure {
    /// A load above what one thread can answer.
    pub(crate) const SATURATING: Self = Self {
        connections: 4,
        streams: 50,
    };
    /// As many requests as the server allows, on connections of many clients.
    pub(crate) const EXCESSIVE: Self = Self {
        connections: 64,
        streams: 1_024,
    };
    /// A few requests at a time, so that the latency is not that of a queue.
    pub(crate) const LIGHT: Self = Self {
        connections: 4,
        streams: 1,
    };
}

impl fmt::Display for Pressure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self {
            connections,
            streams,
        } = self;
        write!(
            f,
            "{connections} connections with up to {streams} under way on each"
        )
    }
}

impl H2load {
    /// Creates it for `framed`, a gRPC message in its frame, with its files in `directory`.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
    pub(crate) fn prepare(directory: &Path, framed: &[u8]) -> Result<Self> {
        let body = directory.join("request.grpc");
        fs::write(&body, framed).context("cannot write the request")?;
        Ok(Self {
            question: Question::Grpc(body),
            log: directory.join("latency.tsv"),
        })
    }

    /// Creates it for a GET of `path` over HTTP/1.1, with its files in `directory`. The headers are arguments of `h2load`,
    /// which everybody on the machine can read.
    pub(crate) fn over_http(
        directory: &Path,
        path: String,
        headers: Vec<(String, String)>,
    ) -> Self {
        Self {
            question: Question::Http { path, headers },
            log: directory.join("latency.tsv"),
        }
    }

    /// Sends `count` requests to `address` and returns the rate, in requests per second.
    ///
    /// # Errors
    ///
    /// When `h2load` cannot be run, or a request has not succeeded.
    pub(crate) fn rate(&self, address: SocketAddr, count: u64, pressure: Pressure) -> Result<f64> {
        let told = run(&mut self.command(address, count, pressure), count)?;
        told.lines()
            .find(|line| line.starts_with("finished in "))
            .and_then(|line| line.split(", ").nth(1))
            .and_then(|part| part.strip_suffix(" req/s"))
            .and_then(|rate| rate.parse().ok())
            .with_context(|| format!("h2load tells no rate:\n{told}"))
    }

    /// Does the same, and returns the latencies.
    ///
    /// # Errors
    ///
    /// As [`H2load::rate`].
    pub(crate) fn latency(
        &self,
        address: SocketAddr,
        count: u64,
        pressure: Pressure,
    ) -> Result<Latency> {
        // `h2load` appends to the file.
        if self.log.exists() {
            fs::remove_file(&self.log)?;
        }
        let mut command = self.command(address, count, pressure);
        run(command.arg("--log-file").arg(&self.log), count)?;
        let mut micros = fs::read_to_string(&self.log)?
            .lines()
            .map(|line| {
                let field = line.rsplit('\t').next().unwrap_or_default();
                field.parse().context("h2load's log has another form")
            })
            .collect::<Result<Vec<f64>>>()?;
        ensure!(!micros.is_empty(), "h2load has logged no request");
        micros.sort_unstable_by(f64::total_cmp);
        Ok(Latency {
            p50: micros[micros.len() / 2],
            p99: micros[micros.len() - 1 - micros.len() / 100],
        })
    }

    fn command(&self, address: SocketAddr, count: u64, pressure: Pressure) -> Command {
        let mut command = Command::new("h2load");
        command
            .arg("-c")
            .arg(pressure.connections.to_string())
            .arg("-m")
            .arg(pressure.streams.to_string())
            .arg("-n")
            .arg(count.to_string());
        match &self.question {
            Question::Grpc(body) => {
                command
                    .arg("-d")
                    .arg(body)
                    .args(["-H", "content-type: application/grpc"])
                    .args(["-H", "te: trailers"])
                    .arg(format!(
                        "http://{address}/envoy.service.auth.v3.Authorization/Check"
                    ));
            }
            Question::Http { path, headers } => {
                command.arg("--h1");
                for (name, value) in headers {
                    command.arg("-H").arg(format!("{name}: {value}"));
                }
                command.arg(format!("http://{address}{path}"));
            }
        }
        command
    }
}

/// Runs `h2load`, and returns its output if every request has succeeded.
fn run(command: &mut Command, count: u64) -> Result<String> {
    let output = command
        .output()
        .context("cannot run h2load; it is in the package nghttp2-client")?;
    let told = String::from_utf8_lossy(&output.stdout).into_owned();
    let all_succeeded = told.lines().any(|line| {
        line.starts_with("requests: ")
            && line.contains(&format!(
                " {count} succeeded, 0 failed, 0 errored, 0 timeout"
            ))
    });
    ensure!(
        output.status.success() && all_succeeded,
        "not every request has succeeded:\n{told}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    Ok(told)
}
