//! A program that receives the secret on its standard input.
//!
//! The program is started without a shell, in its own process group, with an environment that
//! describes the delivery. The secret is neither in the environment nor in the arguments, where
//! other users of the machine could read it. No process of the group outlives the delivery; a
//! process that leaves the group is out of reach.

use std::{
    io,
    path::PathBuf,
    process::{ExitStatus, Stdio},
    time::Duration,
};

use rustix::{
    io::retry_on_intr,
    process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _},
    process::{Child, ChildStdin, Command},
    task::spawn_blocking,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use zeroize::Zeroizing;

use super::{SecretDelivery, redact};
use crate::{
    config::sink::ExecSettings,
    duration::written,
    key::{PresentedKey, Secret},
};

/// A program that receives the secret.
#[derive(Clone, Debug)]
pub(crate) struct ExecSink {
    settings: ExecSettings,
}

/// Why a program did not accept a secret. Its output is shown without the secret, in case the
/// program repeats it.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// The program could not be started.
    #[error("cannot start {}: {error}; it must be a file that the user of the control plane may run", program.display())]
    Start {
        /// The path of the program.
        program: PathBuf,
        /// The error of the operating system.
        error: io::Error,
    },
    /// The program could not be watched.
    #[error("cannot watch {}: {error}; it was killed", program.display())]
    Watch {
        /// The path of the program.
        program: PathBuf,
        /// The error of the operating system.
        error: io::Error,
    },
    /// The program ended with another status than exit code 0.
    #[error("{} ended with {status} {said}; find out what the program could not do", program.display())]
    Failed {
        /// The path of the program.
        program: PathBuf,
        /// The exit code, or the signal that killed it.
        status: ExitStatus,
        /// The end of its output, without the secret.
        said: String,
    },
    /// The program took too long and was killed. It may have delivered the secret.
    #[error(
        "{} was killed after {} {said}; find out what it waits for, or set a longer `timeout`",
        program.display(),
        written(*limit)
    )]
    TimedOut {
        /// The path of the program.
        program: PathBuf,
        /// The longest time of a run.
        limit: Duration,
        /// The end of its output, without the secret.
        said: String,
    },
}

/// The process group of a program, killed when this is dropped.
///
/// The program's process id names the group. No other process gets this id before the program is
/// waited for.
#[derive(Debug)]
struct Group(Pid);

/// The end of a stream.
struct Tail(Zeroizing<Vec<u8>>);

/// The search path of a program. The `PATH` of the control plane does not concern it, and can
/// contain anything.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// The bytes of a program's output that are shown: some lines, of which the last one usually says
/// why it failed.
const SHOWN: usize = 400;
/// The bytes of the output that are kept: a secret that reaches into the shown part is then found
/// whole.
const KEPT: usize = SHOWN + PresentedKey::MAX_LEN;
/// How long output is read after the program has ended. The output is already in the pipe; only a
/// process that left the group can keep the pipe open. The wait for the exit status is as long.
const LAST_WORDS: Duration = Duration::from_millis(500);

impl ExecSink {
    /// Creates the sink of `settings`.
    #[must_use]
    pub(crate) fn new(settings: &ExecSettings) -> Self {
        Self {
            settings: settings.clone(),
        }
    }

    /// Runs the program with the secret as the only line on its standard input.
    ///
    /// When the future is dropped, the program is killed with its group.
    ///
    /// # Errors
    ///
    /// When the program cannot be started or watched, takes too long, or ends with another status
    /// than exit code 0.
    pub(crate) async fn deliver(&self, delivery: &SecretDelivery<'_>) -> Result<(), ExecError> {
        let program = || self.settings.program.clone();
        let watch = |error| ExecError::Watch {
            program: program(),
            error,
        };
        let mut child = self.command(delivery).spawn().map_err(|error| {
            let program = program();
            ExecError::Start { program, error }
        })?;
        let group = Group::of(&child);
        let ended = group.ended();
        let input = child.stdin.take().expect("standard input is piped");
        let output = child.stdout.take().expect("standard output is piped");
        let errors = child.stderr.take().expect("standard error is piped");
        let (mut said, mut complained) = (Tail::new(), Tail::new());

        let over = CancellationToken::new();
        let talk = async {
            let all = async {
                tokio::join!(
                    feed(input, delivery.secret),
                    said.read(output),
                    complained.read(errors)
                )
            };
            tokio::select! {
                _ = all => {}
                () = async { over.cancelled().await; sleep(LAST_WORDS).await } => {}
            }
        };
        let limit = self.settings.timeout;
        let end = async {
            let ended = timeout(limit, ended).await;
            // Before the program is waited for: the processes that it left running end with it, and
            // close the pipes.
            drop(group);
            over.cancel();
            ended
        };
        let ((), ended) = tokio::join!(talk, end);
        // The program has ended or was killed. If the kernel delays its end, the runtime waits for
        // it later.
        let status = timeout(LAST_WORDS, child.wait()).await;
        let tail = if complained.0.is_empty() {
            said
        } else {
            complained
        };
        let said = tail.shown(delivery.secret);
        match (ended, status) {
            (Ok(ended), Ok(status)) => {
                ended.map_err(watch)?;
                let status = status.map_err(watch)?;
                if status.success() {
                    return Ok(());
                }
                let program = program();
                Err(ExecError::Failed {
                    program,
                    status,
                    said,
                })
            }
            (Err(_elapsed), _) | (_, Err(_elapsed)) => {
                let program = program();
                Err(ExecError::TimedOut {
                    program,
                    limit,
                    said,
                })
            }
        }
    }

    fn command(&self, delivery: &SecretDelivery<'_>) -> Command {
        let SecretDelivery {
            keyring,
            consumer,
            version,
            rotation,
            window,
            secret: _,
        } = delivery;
        let mut command = Command::new(&self.settings.program);
        command
            .args(&self.settings.arguments)
            .current_dir("/")
            .env_clear()
            .env("PATH", PATH)
            .env("RELATCH_KEYRING", keyring.as_str())
            .env("RELATCH_CONSUMER", consumer.as_str())
            .env("RELATCH_KEY_ID", version.key_id.as_str())
            .env("RELATCH_VERSION", version.version.to_string())
            .env("RELATCH_ROTATION", rotation.as_str())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true);
        for (name, time) in [
            ("RELATCH_NOT_BEFORE", window.not_before),
            ("RELATCH_EXPIRES_AT", window.expires_at),
        ] {
            if let Some(time) = time {
                command.env(name, time.to_string());
            }
        }
        command
    }
}

impl Group {
    fn of(child: &Child) -> Self {
        let id = child.id().and_then(|id| i32::try_from(id).ok());
        let pid = id.and_then(Pid::from_raw);
        Self(pid.expect("a child that was not waited for has a process id"))
    }

    /// Waits until the program has ended, without collecting its status: until then no other
    /// process gets its id.
    fn ended(&self) -> impl Future<Output = io::Result<()>> + use<> {
        let program = self.0;
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        // This ends with the program, which a dropped group kills.
        let ended = spawn_blocking(move || retry_on_intr(|| waitid(WaitId::Pid(program), options)));
        async { Ok(ended.await?.map(drop)?) }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // This fails when the whole group has ended, which is fine.
        let _ = kill_process_group(self.0, Signal::KILL);
    }
}

impl Tail {
    fn new() -> Self {
        // The buffer never grows beyond this, so that no copy stays in memory.
        Self(Zeroizing::new(Vec::with_capacity(KEPT)))
    }

    /// Reads a stream to its end and keeps its tail.
    async fn read(&mut self, mut stream: impl AsyncRead + Unpin) {
        let mut chunk = Zeroizing::new([0; KEPT]);
        // A stream that breaks counts as ended: only its tail is of interest.
        while let Ok(read @ 1..) = stream.read(chunk.as_mut_slice()).await {
            let excess = (self.0.len() + read).saturating_sub(KEPT);
            self.0.drain(..excess);
            self.0.extend_from_slice(&chunk[..read]);
        }
    }

    /// Returns the part of the output that may be shown: the last [`SHOWN`] bytes as printable
    /// text, without any part of the secret.
    fn shown(&self, secret: &Secret) -> String {
        let start = self.0.len().saturating_sub(SHOWN);
        let text = redact::without(&self.0, start, &[secret.expose()]);
        match text.trim() {
            "" => "and wrote nothing".to_owned(),
            // Quoted: a program's output must not look like lines of a log, or move a terminal's
            // cursor.
            text => format!("and wrote {text:?}"),
        }
    }
}

/// Writes the secret as one line. A program that does not read it may still succeed.
async fn feed(mut input: ChildStdin, secret: &Secret) {
    let line = Zeroizing::new([secret.expose().as_bytes(), b"\n"].concat());
    let _ = input.write_all(&line).await;
}

#[cfg(test)]
mod tests;
