//! A program that is handed the secret on its standard input.
//!
//! It is started without a shell, in a process group of its own, with an environment that says what is delivered. The
//! secret is neither there nor among its arguments, where other users of the machine could read it. No process of the
//! group outlives the delivery; one that leaves the group is out of reach.

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

use super::{Delivery, redact};
use crate::{
    config::sink::ExecSettings,
    duration::written,
    key::{PresentedKey, Secret},
};

/// A program that is handed the secret.
#[derive(Clone, Debug)]
pub(crate) struct ExecSink {
    settings: ExecSettings,
}

/// Why a program did not take a secret. What it said is told without the secret, should it repeat it.
#[derive(Debug, thiserror::Error)]
pub enum ExecError {
    /// It could not be started.
    #[error("cannot start {}: {error}; it must be a file that the user of the control plane may run", program.display())]
    Start {
        /// Its path.
        program: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// It could not be watched.
    #[error("cannot watch {}: {error}; it was killed", program.display())]
    Watch {
        /// Its path.
        program: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// It ended with another exit code than 0.
    #[error("{} ended with {status} {said}; find out what the program could not do", program.display())]
    Failed {
        /// Its path.
        program: PathBuf,
        /// How it ended.
        status: ExitStatus,
        /// The end of its output.
        said: String,
    },
    /// It took too long and was killed. It may have delivered the secret.
    #[error(
        "{} was killed after {} {said}; find out what it waits for, or set a longer `timeout`",
        program.display(),
        written(*limit)
    )]
    TimedOut {
        /// Its path.
        program: PathBuf,
        /// How long it was allowed to run.
        limit: Duration,
        /// The end of its output.
        said: String,
    },
}

/// A program's process group, killed when this is dropped.
///
/// The group is named by the program's process id, which nobody else gets before the program is waited for.
#[derive(Debug)]
struct Group(Pid);

/// The end of a stream.
struct Tail(Zeroizing<Vec<u8>>);

/// Where a program finds others. That of the control plane is of no concern to it, and may hold anything.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// How much of what a program said is told: some lines, of which the last one tends to say why it failed.
const SHOWN: usize = 400;
/// How much is kept of it, so that a secret which reaches into what is told is seen whole.
const KEPT: usize = SHOWN + PresentedKey::MAX_LEN;
/// How long output is read when the program has ended. It is in the pipe already; only a process that left the group
/// can keep the pipe open.
const LAST_WORDS: Duration = Duration::from_millis(500);

impl ExecSink {
    /// The program of `settings`.
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
    /// When it cannot be started, takes too long, or ends with another exit code than 0.
    pub(crate) async fn deliver(&self, delivery: &Delivery<'_>) -> Result<(), ExecError> {
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
            // Before the program is waited for: what it left running ends with it, and lets go of the pipes.
            drop(group);
            over.cancel();
            ended
        };
        let ((), ended) = tokio::join!(talk, end);
        // It has ended or was killed; one that the kernel holds up is waited for by the runtime, later.
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

    fn command(&self, delivery: &Delivery<'_>) -> Command {
        let Delivery {
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

    /// Waits until the program has ended, and leaves it to be waited for: until then its id is nobody else's.
    fn ended(&self) -> impl Future<Output = io::Result<()>> + use<> {
        let program = self.0;
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOWAIT;
        // Ends with the program, which a dropped group kills.
        let ended = spawn_blocking(move || retry_on_intr(|| waitid(WaitId::Pid(program), options)));
        async { Ok(ended.await?.map(drop)?) }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        // Fails when all of it has ended, which is as well.
        let _ = kill_process_group(self.0, Signal::KILL);
    }
}

impl Tail {
    fn new() -> Self {
        // Never grows beyond, so that no copy is left behind in memory.
        Self(Zeroizing::new(Vec::with_capacity(KEPT)))
    }

    /// Reads a stream to its end and keeps its tail.
    async fn read(&mut self, mut stream: impl AsyncRead + Unpin) {
        let mut chunk = Zeroizing::new([0; KEPT]);
        // A stream that breaks has ended as far as its tail is concerned.
        while let Ok(read @ 1..) = stream.read(chunk.as_mut_slice()).await {
            let excess = (self.0.len() + read).saturating_sub(KEPT);
            self.0.drain(..excess);
            self.0.extend_from_slice(&chunk[..read]);
        }
    }

    /// What may be told of it: its last [`SHOWN`] bytes as printable text, without any part of the secret.
    fn shown(&self, secret: &Secret) -> String {
        let start = self.0.len().saturating_sub(SHOWN);
        let text = redact::without(&self.0, start, &[secret.expose()]);
        match text.trim() {
            "" => "and wrote nothing".to_owned(),
            // Quoted: a program's output must not pass for lines of a log, or move a terminal's cursor.
            text => format!("and wrote {text:?}"),
        }
    }
}

/// Hands over the secret as one line. A program that does not read it may still know what to do.
async fn feed(mut input: ChildStdin, secret: &Secret) {
    let line = Zeroizing::new([secret.expose().as_bytes(), b"\n"].concat());
    let _ = input.write_all(&line).await;
}

#[cfg(test)]
mod tests;
