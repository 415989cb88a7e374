//! A child process that serves, and reports its addresses in a JSON line on standard error.

use std::{
    io::{BufRead, BufReader},
    net::SocketAddr,
    path::PathBuf,
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result, anyhow, ensure};
use serde_json::Value;

/// A running program. It is killed on drop.
#[derive(Debug)]
pub(crate) struct Daemon {
    child: Child,
    started: Value,
}

/// The place where a program listens.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Place {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

/// The longest start: on a loaded machine, a server needs a second or two.
const START_TIMEOUT: Duration = Duration::from_secs(20);

impl Daemon {
    /// Starts `command` and waits for the line whose message ends with `started`.
    ///
    /// # Errors
    ///
    /// When the program cannot be run, ends, or does not start in time.
    pub(crate) fn start(command: &mut Command) -> Result<Self> {
        Self::start_within(command, START_TIMEOUT)
    }

    /// Does the same for a program with a long start.
    ///
    /// # Errors
    ///
    /// When the program cannot be run, ends, or does not start in time.
    pub(crate) fn start_within(command: &mut Command, timeout: Duration) -> Result<Self> {
        let name = command.get_program().to_string_lossy().into_owned();
        let mut child = command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("cannot run {name}"))?;
        let stderr = child.stderr.take().context("standard error is piped")?;
        let mut daemon = Self {
            child,
            started: Value::Null,
        };
        let (found, announcement) = mpsc::channel();
        // It reads to the end, so that the program never waits for a reader.
        thread::spawn(move || {
            let mut last = String::new();
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                match started(&line) {
                    Some(value) => {
                        // After the deadline, there is no receiver.
                        let _late = found.send(Ok(value));
                    }
                    None => last = line,
                }
            }
            let _late = found.send(Err(last));
        });
        daemon.started = announcement
            .recv_timeout(timeout)
            .with_context(|| format!("{name} has not started in time"))?
            .map_err(|last| anyhow!("{name} has ended: {last}"))?;
        Ok(daemon)
    }

    /// The address that it has reported as `name`.
    ///
    /// # Errors
    ///
    /// When it has not reported one.
    pub(crate) fn address(&self, name: &str) -> Result<SocketAddr> {
        match self.place(name)? {
            Place::Tcp(address) => Ok(address),
            Place::Unix(path) => Err(anyhow!("{name} is the socket {}", path.display())),
        }
    }

    /// The address or the socket that it has reported as `name`.
    ///
    /// # Errors
    ///
    /// When it has not reported one.
    pub(crate) fn place(&self, name: &str) -> Result<Place> {
        let text = self.started[name]
            .as_str()
            .with_context(|| format!("no address {name} was told"))?;
        Ok(match text.strip_prefix("unix://") {
            Some(path) => Place::Unix(path.into()),
            None => Place::Tcp(text.parse()?),
        })
    }

    /// Stops the program, and waits for its end.
    ///
    /// # Errors
    ///
    /// When it fails.
    pub(crate) fn stop(mut self) -> Result<()> {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        let status = self.child.wait()?;
        ensure!(status.success(), "it has ended with {status}");
        Ok(())
    }

    /// Its process id.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        // The program may already have ended.
        let _ended = self.child.kill();
        let _status = self.child.wait();
    }
}

fn started(line: &str) -> Option<Value> {
    let value: Value = serde_json::from_str(line).ok()?;
    value["message"]
        .as_str()
        .is_some_and(|message| message.ends_with("started"))
        .then_some(value)
}
