use std::{fs, path::Path, pin::pin};

use super::*;
use crate::{
    control::sink::testing::{Owner, Version},
    key::{Timestamp, Window},
};

/// How long a test waits before it fails. Only a failing test ever waits this long.
const DEADLINE: Duration = Duration::from_mins(2);

fn shell(script: &str, limit: Duration) -> ExecSink {
    ExecSink::new(&ExecSettings {
        program: "/bin/sh".into(),
        arguments: ["-c", script].map(str::to_owned).to_vec(),
        timeout: limit,
    })
}

/// Creates a sink with a script, which receives the directory as `$1`.
fn shell_in(directory: &Path, script: &str, limit: Duration) -> ExecSink {
    let mut sink = shell(script, limit);
    let directory = directory.to_str().expect("UTF-8").to_owned();
    sink.settings.arguments.extend(["sh".to_owned(), directory]);
    sink
}

async fn deliver(sink: &ExecSink, version: &Version<'_>) -> Result<(), ExecError> {
    timeout(DEADLINE, sink.deliver(&version.delivery()))
        .await
        .expect("a delivery has an end")
}

async fn failure(script: &str, version: &Version<'_>) -> String {
    let error = deliver(&shell(script, DEADLINE), version).await;
    let error = error.expect_err("it fails");
    version.assert_absent(&format!("{error} {error:?}"));
    error.to_string()
}

/// Returns the content of a file once another process has written it.
async fn eventually(path: &Path) -> String {
    let look = async {
        loop {
            match fs::read_to_string(path) {
                Ok(text) if text.ends_with('\n') => return text.trim().to_owned(),
                Ok(_) | Err(_) => sleep(Duration::from_millis(5)).await,
            }
        }
    };
    timeout(DEADLINE, look).await.expect("it is written")
}

/// Waits until a process is gone, or dead and not yet waited for by its new parent.
async fn assert_gone(pid: &str) {
    let gone = async {
        loop {
            match fs::read_to_string(format!("/proc/{pid}/stat")) {
                Ok(stat) if !stat.contains(") Z ") => sleep(Duration::from_millis(5)).await,
                Ok(_) | Err(_) => return,
            }
        }
    };
    let gone = timeout(DEADLINE, gone).await;
    assert!(gone.is_ok(), "process {pid} is still there");
}

#[tokio::test]
async fn the_secret_is_the_only_line_on_standard_input() {
    let (owner, directory) = (Owner::new(), tempfile::tempdir().expect("a directory"));
    let version = owner.version(3);
    let script = r#"cat >"$1/input"; tr '\0' '\n' </proc/$$/cmdline >"$1/arguments"; env >"$1/environment"; pwd >"$1/pwd""#;
    let sink = shell_in(directory.path(), script, DEADLINE);
    let window = Window::new(None, Some(Timestamp::from_millis(1_800_000_000_000)));
    let delivery = SecretDelivery {
        window,
        ..version.delivery()
    };
    sink.deliver(&delivery).await.expect("it is delivered");

    let read = |name: &str| fs::read_to_string(directory.path().join(name)).expect("it is written");
    assert_eq!(read("input"), format!("{}\n", version.secret.expose()));
    version.assert_absent(&read("arguments"));
    version.assert_absent(&read("environment"));
    assert_eq!(read("pwd"), "/\n");
    let mut environment: Vec<String> = read("environment")
        .lines()
        .filter(|line| line.starts_with("RELATCH_") || line.starts_with("PATH="))
        .map(str::to_owned)
        .collect();
    environment.sort();
    assert_eq!(
        environment,
        [
            format!("PATH={PATH}"),
            "RELATCH_CONSUMER=team/checkout".to_owned(),
            "RELATCH_EXPIRES_AT=2027-01-15T08:00:00.000Z".to_owned(),
            "RELATCH_KEYRING=payments".to_owned(),
            format!("RELATCH_KEY_ID={}", owner.key_id),
            format!("RELATCH_ROTATION={}", delivery.rotation),
            "RELATCH_VERSION=3".to_owned(),
        ]
    );
    // The shell itself sets `PWD` and similar names. Cargo sets some in every test: an inherited one would show.
    assert!(std::env::vars_os().any(|(name, _)| name == "CARGO_MANIFEST_DIR"));
    assert!(!read("environment").contains("CARGO"));
}

#[tokio::test]
async fn arguments_are_taken_as_they_are() {
    let (owner, directory) = (Owner::new(), tempfile::tempdir().expect("a directory"));
    let mut sink = shell_in(directory.path(), r#"printf %s "$2" >"$1/said""#, DEADLINE);
    let odd = "a b; $(echo c) `d` *";
    sink.settings.arguments.push(odd.to_owned());
    deliver(&sink, &owner.version(1)).await.expect("delivered");
    let said = fs::read_to_string(directory.path().join("said")).expect("it is written");
    assert_eq!(said, odd);
}

#[tokio::test]
async fn an_exit_code_is_a_failure_told_with_the_last_words() {
    let version = &Owner::new();
    let version = version.version(1);
    assert_eq!(
        failure(
            "echo started; echo 'no route to \u{1b}[31mthe cluster' >&2; exit 3",
            &version
        )
        .await,
        "/bin/sh ended with exit status: 3 and wrote \"no route to \\u{1b}[31mthe cluster\"; \
         find out what the program could not do"
    );
    assert_eq!(
        failure("echo only here; exit 1", &version).await,
        "/bin/sh ended with exit status: 1 and wrote \"only here\"; find out what the program could not do"
    );
    assert_eq!(
        failure("kill -TERM $$", &version).await,
        "/bin/sh ended with signal: 15 (SIGTERM) and wrote nothing; find out what the program could not do"
    );
}

#[tokio::test]
async fn a_program_that_repeats_the_secret_does_not_give_it_away() {
    let owner = Owner::new();
    let version = owner.version(1);
    for script in [
        "read -r key; echo \"cannot use $key\" >&2; exit 1",
        "read -r key; echo \"cannot use $key\"; exit 1",
        // In pieces, each of which reveals a lot.
        "read -r key; for n in 10 20 30 40; do printf %s \"$key\" | head -c $n | tail -c 20 >&2; echo >&2; done; exit 1",
        // Exactly at the edge of the shown part, wherever it is.
        "read -r key; for n in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do printf %s \"$key\" >&2; done; exit 1",
    ] {
        let text = failure(script, &version).await;
        assert!(text.contains("[redacted]"), "{text}");
    }
}

#[tokio::test]
async fn the_secret_is_hidden_wherever_what_is_shown_begins() {
    let owner = Owner::new();
    let version = owner.version(1);
    let secret = version.secret.expose();
    for after in SHOWN - secret.len() - 1..=SHOWN + 1 {
        let said = format!("{}{secret}{}", ".".repeat(KEPT), ".".repeat(after));
        let mut tail = Tail::new();
        tail.read(said.as_bytes()).await;
        let shown = tail.shown(&version.secret);
        let quoted = shown
            .strip_prefix("and wrote ")
            .expect("it wrote something");
        let rest = quoted.replacen("[redacted]", "", 1);
        assert!(
            rest.trim_matches('"').bytes().all(|byte| byte == b'.'),
            "{after} bytes behind it: {shown}"
        );
        assert_eq!(after < SHOWN, rest != quoted, "{shown}");
    }
}

#[tokio::test]
async fn much_output_is_read_and_little_is_kept() {
    let owner = Owner::new();
    let version = owner.version(1);
    let script = "head -c 3000000 /dev/zero; head -c 3000000 /dev/zero | tr '\\0' x >&2; echo the end >&2; exit 1";
    let text = failure(script, &version).await;
    assert!(text.contains("xxx"), "{text}");
    assert!(text.contains("the end\""), "{text}");
    assert!(text.len() < 600, "{} bytes", text.len());
}

#[tokio::test]
async fn a_program_that_reads_nothing_may_succeed() {
    let owner = Owner::new();
    let sink = shell("exec 0<&-; exit 0", DEADLINE);
    for number in 1..=20 {
        let version = owner.version(number);
        deliver(&sink, &version).await.expect("it ended with 0");
    }
}

#[tokio::test]
async fn a_program_that_hangs_is_killed_with_its_children() {
    let (owner, directory) = (Owner::new(), tempfile::tempdir().expect("a directory"));
    let version = owner.version(1);
    // The inner shell ignores the signals that ask it to end, and both shells keep the pipes open.
    let script = r#"sh -c 'trap "" TERM HUP INT; echo $$ >"$1/child"; sleep 1000; sleep 1000' sh "$1" & echo $$ >"$1/parent"
        echo waiting >&2; wait"#;
    let sink = shell_in(directory.path(), script, Duration::from_secs(1));
    let error = deliver(&sink, &version).await.expect_err("it hangs");
    assert_eq!(
        error.to_string(),
        "/bin/sh was killed after 1s and wrote \"waiting\"; find out what it waits for, or set a longer `timeout`"
    );
    for name in ["parent", "child"] {
        let pid = fs::read_to_string(directory.path().join(name)).expect("it began");
        assert_gone(pid.trim()).await;
    }
}

#[tokio::test]
async fn what_a_program_leaves_running_ends_with_it() {
    let (owner, directory) = (Owner::new(), tempfile::tempdir().expect("a directory"));
    let script = r#"sleep 1000 & echo $! >"$1/left"; exit 0"#;
    let sink = shell_in(directory.path(), script, DEADLINE);
    deliver(&sink, &owner.version(1)).await.expect("delivered");
    let left = fs::read_to_string(directory.path().join("left")).expect("it began");
    assert_gone(left.trim()).await;
}

#[tokio::test]
async fn a_process_that_left_the_group_does_not_hold_the_delivery_up() {
    let (owner, directory) = (Owner::new(), tempfile::tempdir().expect("a directory"));
    let script = r#"setsid sleep 1000 & echo $! >"$1/left"; exit 0"#;
    let sink = shell_in(directory.path(), script, DEADLINE);
    deliver(&sink, &owner.version(1)).await.expect("delivered");
    let left = fs::read_to_string(directory.path().join("left")).expect("it began");
    if let Some(pid) = left.trim().parse().ok().and_then(Pid::from_raw) {
        // No other code kills it. It may have been killed before it left the group.
        let _ = rustix::process::kill_process(pid, Signal::KILL);
    }
}

#[tokio::test]
async fn a_dropped_delivery_kills_the_program() {
    let (owner, directory) = (Owner::new(), tempfile::tempdir().expect("a directory"));
    let version = owner.version(1);
    let script = r#"sleep 1000 & echo $! >"$1/child"; echo $$ >"$1/parent"; wait"#;
    let sink = shell_in(directory.path(), script, DEADLINE);
    let delivery = version.delivery();
    let parent = directory.path().join("parent");
    {
        let delivered = pin!(sink.deliver(&delivery));
        tokio::select! {
            delivered = delivered => panic!("it waits: {delivered:?}"),
            _ = eventually(&parent) => {}
        }
    }
    for name in ["parent", "child"] {
        assert_gone(&eventually(&directory.path().join(name)).await).await;
    }
}

#[tokio::test]
async fn a_program_that_cannot_run_is_named() {
    let owner = Owner::new();
    let sink = ExecSink::new(&ExecSettings {
        program: "/nonexistent/deliver".into(),
        arguments: Vec::new(),
        timeout: DEADLINE,
    });
    let error = deliver(&sink, &owner.version(1)).await.expect_err("absent");
    assert_eq!(
        error.to_string(),
        "cannot start /nonexistent/deliver: No such file or directory (os error 2); \
         it must be a file that the user of the control plane may run"
    );
}
