//! A child process whose output the test reads, and the `relatch` binary as one.

use std::{
    fmt, fs,
    io::{BufRead, BufReader, Read, Write},
    net::TcpListener,
    process::{Child, Command, ExitStatus, Stdio},
    sync::{Arc, Mutex},
    thread::{self, JoinHandle},
    time::Duration,
};

use command_fds::{CommandFdExt as _, FdMapping};
use rustix::process::{Pid, Signal, kill_process};

use super::eventually::{DEADLINE, eventually};

/// A running program. Dropping it kills it; when the test is failing, its output is printed first.
#[derive(Debug)]
pub(crate) struct Process {
    name: String,
    child: Child,
    stdout: Captured,
    stderr: Captured,
}

/// Ends a [`Process`] at once.
#[derive(Debug)]
pub(crate) struct Killer(Pid);

/// Between two looks at whether a program has stopped: threads stop within microseconds on an idle machine.
const PAUSE: Duration = Duration::from_millis(1);

/// What a program that has ended leaves.
#[derive(Debug)]
pub(crate) struct Output {
    pub(crate) status: ExitStatus,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

/// Every line that a program printed from its start to its end: what is not here it never printed.
#[derive(Debug)]
pub(crate) struct Printed(Vec<String>);

/// The lines of one stream, read by a thread until the stream ends.
#[derive(Debug)]
struct Captured {
    lines: Arc<Mutex<Vec<String>>>,
    reader: JoinHandle<()>,
}

/// Runs `relatch` with `args` to its end; `stdin` is what it reads.
pub(crate) async fn relatch(args: &[&str], stdin: &str) -> Output {
    run(Command::new(RELATCH).args(args), stdin).await
}

/// Runs a program to its end; `stdin` is what it reads.
pub(crate) async fn run(command: &mut Command, stdin: &str) -> Output {
    let mut process = Process::spawn(command, Stdio::piped());
    let pipe = process.child.stdin.take().expect("standard input is piped");
    let text = stdin.to_owned();
    // A thread, since a program may write before it has read everything.
    let writer = thread::spawn(move || write_all(pipe, &text));
    let status = process.exit().await;
    writer.join().expect("the writer does not panic");
    Output {
        status,
        stdout: process.stdout.text(),
        stderr: process.stderr.text(),
    }
}

/// The binary.
pub(crate) const RELATCH: &str = env!("CARGO_BIN_EXE_relatch");

impl Process {
    /// Starts `relatch` with `args`.
    pub(crate) fn relatch(args: &[&str]) -> Self {
        Self::start(Command::new(RELATCH).args(args))
    }

    /// Starts it in a shell that runs `before` first, for what a process leaves to those that it becomes.
    pub(crate) fn relatch_after(before: &str, args: &[&str]) -> Self {
        let script = format!("{before}\nexec \"$0\" \"$@\"");
        let mut shell = Command::new("sh");
        Self::start(shell.args(["-c", &script, RELATCH]).args(args))
    }

    /// Starts `relatch` with a listening socket, as systemd passes one (`sd_listen_fds(3)`).
    pub(crate) fn relatch_with_socket(socket: &TcpListener, args: &[&str]) -> Self {
        /// The first file descriptor of those that systemd passes.
        const FIRST: i32 = 3;

        // The process id is known in the child only.
        let script = "LISTEN_PID=$$ LISTEN_FDS=1 exec \"$0\" \"$@\"";
        let mut shell = Command::new("sh");
        shell.args(["-c", script, RELATCH]).args(args);
        let socket = socket.try_clone().expect("a file descriptor is free");
        let mapping = FdMapping {
            parent_fd: socket.into(),
            child_fd: FIRST,
        };
        let mapped = shell.fd_mappings(vec![mapping]);
        mapped.expect("one file descriptor is passed once");
        Self::start(&mut shell)
    }

    /// Starts a program with nothing on its standard input.
    pub(crate) fn start(command: &mut Command) -> Self {
        Self::spawn(command, Stdio::null())
    }

    fn spawn(command: &mut Command, stdin: Stdio) -> Self {
        let name = command.get_program().to_string_lossy().into_owned();
        let mut child = command
            .stdin(stdin)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap_or_else(|error| panic!("{name} does not start: {error}"));
        let stdout = Captured::read(child.stdout.take().expect("standard output is piped"));
        let stderr = Captured::read(child.stderr.take().expect("standard error is piped"));
        Self {
            name,
            child,
            stdout,
            stderr,
        }
    }

    /// Waits for a line of standard output or standard error that contains `part`; panics when the program ends first.
    pub(crate) async fn wait_for_line(&mut self, part: &str) -> String {
        let mut lines = self.wait_for_lines(part, 1).await;
        lines.swap_remove(0)
    }

    /// Waits until `count` lines, or more, contain `part`; panics when the program ends first.
    pub(crate) async fn wait_for_lines(&mut self, part: &str, count: usize) -> Vec<String> {
        eventually(&format!("{} prints {part:?}", self.name), async || {
            // Asked before the lines are read: what a program printed before it ended is not overlooked.
            let ended = self.ended();
            let mut lines = self.lines();
            lines.retain(|line| line.contains(part));
            let are_all = lines.len() >= count;
            assert!(
                are_all || ended.is_none(),
                "{} has ended ({ended:?}) without printing {part:?}",
                self.name
            );
            are_all.then_some(lines)
        })
        .await
    }

    /// Asks the program to stop, waits for its end and returns everything that it printed.
    ///
    /// # Panics
    ///
    /// When it does not end with success.
    pub(crate) async fn stop(&mut self) -> Printed {
        self.signal(Signal::TERM);
        let status = self.exit().await;
        assert!(status.success(), "{} ends with {status}", self.name);
        Printed(self.lines())
    }

    /// Kills the program, waits for its end and returns everything that it printed.
    pub(crate) async fn kill(&mut self) -> Printed {
        self.signal(Signal::KILL);
        self.exit().await;
        Printed(self.lines())
    }

    /// Waits for the end of the program and of its output.
    pub(crate) async fn exit(&mut self) -> ExitStatus {
        let what = format!("{} ends", self.name);
        eventually(&what, async || self.ended()).await
    }

    /// The status of the program if it has ended, with all its output read.
    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        let status = self
            .child
            .try_wait()
            .expect("a child's status can be asked for");
        status.filter(|_| self.stdout.is_finished() && self.stderr.is_finished())
    }

    /// Every line of standard output, then every line of standard error, so far. More may be on their way: wait for what has to
    /// come, and look for what must not come in [`Printed`].
    pub(crate) fn lines(&self) -> Vec<String> {
        [self.stdout.lines(), self.stderr.lines()].concat()
    }

    /// Its process id.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends it a signal. One that stops it has done so when this returns: on a busy machine a thread goes on for a moment.
    pub(crate) fn signal(&self, signal: Signal) {
        kill_process(self.pid(), signal).expect("a child that was not waited for exists");
        if signal == Signal::STOP {
            let mut left = DEADLINE;
            while !self.is_stopped() {
                let Some(rest) = left.checked_sub(PAUSE) else {
                    panic!("{} does not stop", self.name);
                };
                left = rest;
                thread::sleep(PAUSE);
            }
        }
    }

    /// Whether none of its threads runs (proc(5): the state behind the name in parentheses).
    fn is_stopped(&self) -> bool {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.child.id()));
        let tasks = tasks.expect("a child that was not waited for is in /proc");
        tasks.flatten().all(|task| {
            // A thread that ends meanwhile has no file any more.
            let stat = fs::read_to_string(task.path().join("stat")).unwrap_or_default();
            let state = stat
                .rsplit_once(") ")
                .map(|(_, rest)| rest.starts_with(['T', 't', 'Z', 'X']));
            state.unwrap_or(true)
        })
    }

    /// Kills it while somebody else holds it, as long as that does not wait for its end.
    pub(crate) fn killer(&self) -> Killer {
        Killer(self.pid())
    }

    /// The memory that it has in use, in bytes.
    pub(crate) fn resident(&self) -> u64 {
        let path = format!("/proc/{}/status", self.child.id());
        let status = fs::read_to_string(path).expect("a child that runs is in /proc");
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let kib = line.and_then(|line| line.trim().strip_suffix(" kB"));
        let kib: Option<u64> = kib.and_then(|kib| kib.parse().ok());
        kib.expect("proc(5) tells of it in kB") * 1024
    }

    fn pid(&self) -> Pid {
        let pid = i32::try_from(self.child.id()).ok();
        pid.and_then(Pid::from_raw)
            .expect("the system gave out this process id")
    }
}

impl Printed {
    /// How many lines contain `part`.
    pub(crate) fn count(&self, part: &str) -> usize {
        self.0.iter().filter(|line| line.contains(part)).count()
    }

    /// Whether a line contains `part`.
    pub(crate) fn has(&self, part: &str) -> bool {
        self.count(part) > 0
    }
}

impl fmt::Display for Printed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0.join("\n"))
    }
}

impl Killer {
    pub(crate) fn kill(self) {
        kill_process(self.0, Signal::KILL).expect("a child that was not waited for exists");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("{} printed:\n{}", self.name, self.lines().join("\n"));
        }
        // Both fail only when the program has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Captured {
    fn read(stream: impl Read + Send + 'static) -> Self {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let written = Arc::clone(&lines);
        let reader = thread::spawn(move || {
            let mut stream = BufReader::new(stream);
            let mut line = Vec::new();
            while stream.read_until(b'\n', &mut line).is_ok_and(|n| n > 0) {
                let text = String::from_utf8_lossy(&line);
                let text = text.strip_suffix('\n').unwrap_or(&text).to_owned();
                written
                    .lock()
                    .expect("no holder of the lines panics")
                    .push(text);
                line.clear();
            }
        });
        Self { lines, reader }
    }

    fn is_finished(&self) -> bool {
        self.reader.is_finished()
    }

    fn lines(&self) -> Vec<String> {
        self.lines
            .lock()
            .expect("no holder of the lines panics")
            .clone()
    }

    fn text(&self) -> String {
        self.lines().join("\n")
    }
}

fn write_all(mut pipe: impl Write, text: &str) {
    // Fails when the program has ended without reading, which is for its status to tell.
    let _ = pipe.write_all(text.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shell(script: &str) -> Command {
        let mut command = Command::new("sh");
        command.args(["-c", script]);
        command
    }

    #[tokio::test]
    async fn a_program_is_read_signalled_and_waited_for() {
        let script = "trap 'echo caught; exit 3' TERM; echo ready; while :; do read -r _ || sleep 0.02; done";
        let mut process = Process::start(&mut shell(script));
        assert_eq!(process.wait_for_line("read").await, "ready");
        assert_eq!(process.ended(), None);
        process.signal(Signal::TERM);
        assert_eq!(process.exit().await.code(), Some(3));
        assert_eq!(process.lines(), ["ready", "caught"]);
    }

    #[tokio::test]
    async fn what_a_program_prints_on_its_way_out_is_part_of_what_it_printed() {
        let script = "trap 'sleep 0.2; echo late >&2; exit 0' TERM; echo ready; while :; do sleep 0.02; done";
        let mut process = Process::start(&mut shell(script));
        process.wait_for_line("ready").await;
        let printed = process.stop().await;
        assert_eq!((printed.count("late"), printed.has("never")), (1, false));
        assert_eq!(printed.to_string(), "ready\nlate");
        let mut process = Process::start(&mut shell("echo ready; exec sleep 600"));
        process.wait_for_line("ready").await;
        assert_eq!(process.kill().await.to_string(), "ready");
    }

    #[tokio::test]
    #[should_panic(expected = "without printing \"never\"")]
    async fn waiting_for_a_line_ends_with_the_program() {
        let mut process = Process::start(&mut shell("echo last words"));
        process.wait_for_line("never").await;
    }

    #[tokio::test]
    async fn one_shot_output_is_complete() {
        let output = run(&mut shell("cat; echo note >&2; exit 4"), "a\nb\n").await;
        assert_eq!(output.status.code(), Some(4));
        assert_eq!(
            (output.stdout.as_str(), output.stderr.as_str()),
            ("a\nb", "note")
        );
    }

    #[tokio::test]
    async fn the_binary_refuses_an_unknown_command() {
        let mut process = Process::relatch(&["no-such-command"]);
        assert_eq!(process.exit().await.code(), Some(2));
    }

    #[tokio::test]
    async fn the_binary_prints_its_version() {
        let output = relatch(&["--version"], "").await;
        assert!(output.status.success(), "{}", output.stderr);
        assert_eq!(
            output.stdout,
            concat!("relatch ", env!("CARGO_PKG_VERSION"))
        );
    }
}
