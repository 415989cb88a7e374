//! A real Traefik, Caddy or nginx in front of an upstream, with the sample of `deploy/` for it. It asks a sidecar over HTTP.

use std::{
    fmt, fs,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::Command,
};

use tempfile::TempDir;

use super::{
    client::{Connection, Request, Response},
    eventually::eventually,
    process::Process,
    reserved::Reserved,
};

/// A running proxy. Dropping it kills the process and removes its files.
#[derive(Debug)]
pub(crate) struct Gateway {
    kind: GatewayKind,
    address: Reserved,
    _process: Process,
    _files: TempDir,
}

/// A proxy that `scripts/test.sh` has fetched; the exact releases are named in `scripts/lib/`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum GatewayKind {
    Traefik,
    Caddy,
    Nginx,
}

/// What a proxy asks, and what is behind it.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asks<'a> {
    /// The listener of the sidecar.
    pub(crate) sidecar: SocketAddr,
    pub(crate) profile: &'a str,
    pub(crate) upstream: SocketAddr,
}

impl Gateway {
    /// Starts it with the files of its sample, in which only addresses and the profile are replaced, and with the further
    /// changes `changes`. Waits until it answers.
    ///
    /// # Panics
    ///
    /// When `scripts/test.sh` has not fetched it, or it does not come up.
    pub(crate) async fn start(kind: GatewayKind, asks: Asks<'_>, changes: &[(&str, &str)]) -> Self {
        let program = kind.program();
        assert!(
            program.exists(),
            "{} is missing: run scripts/test.sh once, it fetches the proxies that the tests run",
            program.display()
        );
        let address = Reserved::new();
        let files = tempfile::tempdir().expect("a directory can be made");
        for file in kind.sample() {
            let sample = Path::new(env!("CARGO_MANIFEST_DIR"))
                .join("deploy")
                .join(file);
            let sample = fs::read_to_string(sample).expect("the sample is there");
            let name = file.rsplit('/').next().expect("a file has a name");
            let text = kind.set_up(&sample, address.address(), asks);
            let text = changes.iter().fold(text, |text, (from, to)| {
                assert!(text.contains(from), "{from} is not in {name}");
                text.replace(from, to)
            });
            fs::write(files.path().join(name), text).expect("the test's directory is writable");
        }
        let mut process = Process::start(&mut kind.command(&program, files.path()));
        eventually("the proxy answers", async || {
            let ended = process.ended();
            assert!(ended.is_none(), "{kind} does not start: {ended:?}");
            let mut connection = Connection::open(address.address()).await.ok()?;
            let response = connection.send(&Request::get("/")).await.ok()?;
            // Traefik has no routes at first.
            (response.status != 404).then_some(())
        })
        .await;
        Self {
            kind,
            address,
            _process: process,
            _files: files,
        }
    }

    pub(crate) const fn kind(&self) -> GatewayKind {
        self.kind
    }

    /// Where consumers connect.
    pub(crate) const fn addr(&self) -> SocketAddr {
        self.address.address()
    }

    pub(crate) async fn send(&self, request: Request) -> Response {
        request.send(self.addr()).await
    }
}

impl GatewayKind {
    pub(crate) const ALL: [Self; 3] = [Self::Traefik, Self::Caddy, Self::Nginx];

    /// The name of its dialect.
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Traefik => "traefik",
            Self::Caddy => "caddy",
            Self::Nginx => "nginx",
        }
    }

    fn program(self) -> PathBuf {
        let target = Path::new(env!("CARGO_MANIFEST_DIR")).join("target");
        target.join(match self {
            Self::Traefik => "traefik/bin/traefik",
            Self::Caddy => "caddy/bin/caddy",
            Self::Nginx => "nginx/nginx",
        })
    }

    /// The files of its sample.
    const fn sample(self) -> &'static [&'static str] {
        match self {
            Self::Traefik => &["traefik/traefik.yaml", "traefik/dynamic.yaml"],
            Self::Caddy => &["caddy/Caddyfile"],
            Self::Nginx => &["nginx/nginx.conf"],
        }
    }

    /// The sample with the addresses of a test.
    fn set_up(self, sample: &str, address: SocketAddr, asks: Asks<'_>) -> String {
        let text = match self {
            Self::Traefik | Self::Nginx => sample.replace("127.0.0.1:10000", &address.to_string()),
            Self::Caddy => sample
                .replace("http://:10000", &format!("http://:{}", address.port()))
                .replace("bind 127.0.0.1", &format!("bind {}", address.ip())),
        };
        text.replace("127.0.0.1:9003", &asks.sidecar.to_string())
            .replace("127.0.0.1:8080", &asks.upstream.to_string())
            .replace("/authz/shop", &format!("/authz/{}", asks.profile))
            // A busy machine is slow, and no test must mistake that for a denial.
            .replace("250ms", "30s")
    }

    /// The command of its sample, with its files in `files`.
    fn command(self, program: &Path, files: &Path) -> Command {
        let mut command = Command::new(program);
        command.current_dir(files).env("HOME", files);
        match self {
            Self::Traefik => command.arg("--configFile=traefik.yaml"),
            Self::Caddy => command.args(["run", "--config", "Caddyfile"]),
            // With one process, nothing is left when that is killed.
            Self::Nginx => command
                .args(["-e", "stderr", "-p", ".", "-c", "nginx.conf"])
                .args(["-g", "daemon off; master_process off;"]),
        };
        command
    }
}

impl fmt::Display for GatewayKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}
