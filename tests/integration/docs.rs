//! The pages say what is true. The examples of `docs/for-consumers.md` are taken out of it and run as a consumer would;
//! `docs/operating.md` knows every alert, and every metric that one relies on. Tests that pages name are there.

mod names;

use std::{
    fs,
    path::{Path, PathBuf},
    process::Command,
};

use relatch::{
    authz::DenyReason,
    key::{EventKind, Timestamp},
};
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::support::{
    client::Request,
    envoy::{Envoy, EnvoyOptions},
    eventually::eventually,
    page::{example, node},
    process::{Output, run},
    relatch::Relatch,
    upstream::Upstream,
};

/// The page for consumers.
const PAGE: &str = include_str!("../../docs/for-consumers.md");

/// The page for operators.
const OPERATING: &str = include_str!("../../docs/operating.md");

/// The alerts, which promtool tests with the file beside them.
const RULES: &str = include_str!("../../deploy/prometheus/relatch.rules.yaml");
const RULE_TESTS: &str = include_str!("../../deploy/prometheus/relatch.rules.test.yaml");

/// An example of the page, named by the file that its first line names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Example {
    Curl,
    Python,
    TypeScript,
}

/// The examples as a consumer has them: each in its file.
#[derive(Debug)]
struct Examples(TempDir);

impl Example {
    const ALL: [Self; 3] = [Self::Curl, Self::Python, Self::TypeScript];

    const fn file(self) -> &'static str {
        match self {
            Self::Curl => "notice.sh",
            Self::Python => "notice.py",
            Self::TypeScript => "notice.mts",
        }
    }

    fn program(self) -> PathBuf {
        match self {
            Self::Curl => "sh".into(),
            Self::Python => "python3".into(),
            Self::TypeScript => node(),
        }
    }

    /// Its text in the page.
    fn text(self) -> &'static str {
        example(PAGE, self.file())
    }
}

impl Examples {
    fn extract() -> Self {
        let dir = tempfile::tempdir().expect("a directory can be made");
        for example in Example::ALL {
            fs::write(dir.path().join(example.file()), example.text())
                .expect("the test's directory can be written to");
        }
        Self(dir)
    }

    /// Runs one against an API with a key.
    async fn call(&self, example: Example, url: &str, key: &str) -> Output {
        let key_file = self.0.path().join("api.key");
        fs::write(&key_file, format!("{key}\n")).expect("the test's directory can be written to");
        let mut command = Command::new(example.program());
        command
            .arg(self.0.path().join(example.file()))
            .env("API_URL", url)
            .env("API_KEY_FILE", &key_file);
        without_proxy(&mut command);
        let output = run(&mut command, "").await;
        let told = [output.stdout.as_str(), &output.stderr].concat();
        assert!(!told.contains(key), "{example:?} prints the key: {told}");
        output
    }

    /// What an example reads from each header's value.
    async fn dictionaries(&self, example: Example, headers: &[&str]) -> Vec<Value> {
        let script = match example {
            Example::Curl => panic!("the curl example does not read the value"),
            Example::Python => {
                "import json, sys\n\
                 from notice import dictionary\n\
                 for line in sys.stdin:\n    print(json.dumps(dictionary(line.rstrip('\\n'))))"
            }
            Example::TypeScript => {
                "import { readFileSync } from 'node:fs';\n\
                 import { dictionary } from './notice.mts';\n\
                 const all = (members) => [...members].map(([name, value]) => [name, value ?? null]);\n\
                 for (const line of readFileSync(0, 'utf8').split('\\n').slice(0, -1))\n\
                 console.log(JSON.stringify(Object.fromEntries(all(dictionary(line)))));"
            }
        };
        let mut command = Command::new(example.program());
        match example {
            Example::Curl | Example::Python => command.args(["-c", script]),
            Example::TypeScript => command.args(["--input-type=module", "--eval", script]),
        };
        let stdin = headers.join("\n") + "\n";
        let output = run(command.current_dir(self.0.path()), &stdin).await;
        assert!(output.status.success(), "{example:?}: {}", output.stderr);
        let lines = output.stdout.lines();
        lines
            .map(|line| serde_json::from_str(line).expect("the script prints JSON"))
            .collect()
    }
}

#[tokio::test]
async fn every_example_notices_a_retiring_key_once_and_is_silent_with_the_new_one() {
    let relatch = Relatch::dev().await;
    let upstream = Upstream::start().await;
    let envoy = Envoy::start(EnvoyOptions::new(relatch.ext_authz(), upstream.addr())).await;
    let url = format!("http://{}/", envoy.addr());
    let examples = Examples::extract();
    let old = relatch.key();
    for example in Example::ALL {
        assert_silent(example, &examples.call(example, &url, old).await);
    }

    let rotate = ["rotate", "start", relatch.key_id(), "--overlap", "7d"];
    let rotated = relatch.cli_json(&rotate).await;
    let new = rotated["secret"].as_str().expect("the new secret");
    let notice = eventually("the old version is announced", async || {
        let request = Request::get("/").header("x-api-key", old);
        let response = request.send(envoy.addr()).await;
        response.header("api-key-rotation").map(str::to_owned)
    })
    .await;
    let (start, sunset) = notice.split_once("sunset=@").expect("an announced end");
    assert_eq!(start, "version=1, state=retiring, ");
    let seconds: i64 = sunset.parse().expect("whole seconds");
    let end = Timestamp::from_millis(seconds * 1000).to_string();
    let end = end.strip_suffix(".000Z").expect("whole seconds in UTC");
    for example in Example::ALL {
        let output = examples.call(example, &url, old).await;
        assert!(output.status.success(), "{example:?}: {}", output.stderr);
        let expected = match example {
            Example::Curl => notice.clone(),
            Example::Python | Example::TypeScript => {
                format!("version 1 of the API key ends at {end}")
            }
        };
        let warnings: Vec<_> = output.stderr.lines().collect();
        assert_eq!(warnings.len(), 1, "{example:?}: {warnings:?}");
        assert!(warnings[0].contains(&expected), "{example:?}: {warnings:?}");
        assert_silent(example, &examples.call(example, &url, new).await);
    }

    let version = ["--version", "1", "--reason", "leaked", "--wait"];
    relatch
        .cli_json(&[&["revoke", relatch.key_id()], &version[..]].concat())
        .await;
    for example in Example::ALL {
        let output = examples.call(example, &url, old).await;
        let expected = match example {
            Example::Curl => "401",
            Example::Python | Example::TypeScript => "\"reason\":\"revoked\"",
        };
        assert!(
            !output.status.success() && output.stderr.contains(expected),
            "{example:?}: {output:?}"
        );
    }
}

#[tokio::test]
async fn the_examples_read_the_header_as_structured_fields_are_read() {
    let cases = [
        (
            "version=3, state=retiring, sunset=@1798761600",
            json!({"version": "3", "state": "retiring", "sunset": "@1798761600"}),
        ),
        (
            "  version=3 ,\tstate=retiring;q=0.5; why=\"a, b\",sunset=@-1  ",
            json!({"version": "3", "state": "retiring", "sunset": "@-1"}),
        ),
        (
            r#"note="x, state=active \" \\", state=retiring, beta, on=?0, b=:aGk=:, *a.b-c_d=t:/x"#,
            json!({
                "note": r#""x, state=active \" \\""#,
                "state": "retiring",
                "beta": null,
                "on": "?0",
                "b": ":aGk=:",
                "*a.b-c_d": "t:/x",
            }),
        ),
        ("state=active, state=retiring", json!({"state": "retiring"})),
        ("", json!({})),
        ("state==retiring", json!({})),
        ("state=retiring,, version=3", json!({})),
        ("state=retiring, ", json!({})),
        ("state=retiring version=3", json!({})),
        ("state=retiring, version=(1 2)", json!({})),
        ("state=retiring, note=\"open", json!({})),
        ("State=retiring", json!({})),
        ("state=rétiring", json!({})),
    ];
    let examples = Examples::extract();
    let headers = cases.each_ref().map(|(header, _)| *header);
    for example in [Example::Python, Example::TypeScript] {
        let read = examples.dictionaries(example, &headers).await;
        assert_eq!(read.len(), cases.len(), "{example:?}");
        for ((header, expected), read) in cases.iter().zip(read) {
            assert_eq!(&read, expected, "{example:?} reads {header:?}");
        }
    }
}

#[test]
fn every_reason_of_a_denial_stands_beside_its_status() {
    for reason in DenyReason::ALL {
        let status = reason.status().http();
        let row = |line: &&str| line.starts_with(&format!("| {status} |"));
        let mut rows = PAGE.lines().filter(row);
        let name = format!("`{reason}`");
        assert!(rows.any(|line| line.contains(&name)), "{status} {name}");
    }
}

#[test]
fn every_event_that_a_consumer_is_promised_exists() {
    let quoted = PAGE.split('`').skip(1).step_by(2);
    let events: Vec<_> = quoted
        .filter(|word| word.starts_with("rotation.") || word.starts_with("key."))
        .collect();
    assert!(!events.is_empty(), "the page names the events");
    for event in events {
        assert!(event.parse::<EventKind>().is_ok(), "{event}");
    }
}

#[test]
fn every_alert_is_described_and_tested_to_fire_and_to_be_silent() {
    let alerts: Vec<_> = RULES
        .lines()
        .filter_map(|line| line.trim().strip_prefix("- alert: "))
        .collect();
    assert!(alerts.len() > 10, "{alerts:?}");
    for alert in alerts {
        let row = format!("| `{alert}` | ");
        assert!(OPERATING.contains(&row), "{alert} is not described");
        let cases = RULE_TESTS.split("- alertname: ").skip(1);
        let of_this = cases.filter(|case| case.lines().next() == Some(alert));
        let (silent, fires): (Vec<_>, Vec<_>) =
            of_this.partition(|case| case.contains("exp_alerts: []"));
        assert!(!silent.is_empty(), "{alert} has no test to be silent");
        assert!(!fires.is_empty(), "{alert} has no test to fire");
    }
}

#[test]
fn every_metric_that_an_alert_relies_on_is_described() {
    let word = |c: char| !(c.is_ascii_alphanumeric() || c == '_');
    let metrics = RULES
        .split(word)
        .filter(|word| word.starts_with("relatch_") || word.starts_with("process_"));
    let mut seen = 0;
    for metric in metrics {
        let name = metric.strip_suffix("_bucket").unwrap_or(metric);
        let described = ['{', '`'].map(|end| OPERATING.contains(&format!("`{name}{end}")));
        assert!(described.contains(&true), "{name} is not described");
        seen += 1;
    }
    assert!(seen > 10, "only {seen} were found");
}

/// The tables of these pages name files, below the repository, `src/` or `tests/integration/`, and behind each its tests.
#[test]
fn every_test_that_a_page_names_exists() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut named = 0;
    let pages = [
        "ARCHITECTURE.md",
        "docs/design/invariants.md",
        "docs/faults.md",
        "docs/security.md",
    ];
    for page in pages {
        let text = fs::read_to_string(root.join(page)).expect("the page is there");
        for row in text.lines().filter(|line| line.starts_with('|')) {
            let mut code = None;
            for word in row.split('`').skip(1).step_by(2) {
                let is_code = Path::new(word).extension().is_some_and(|it| it == "rs");
                let is_directory = word.ends_with('/') && !word.ends_with("//");
                if is_code || is_directory {
                    let places = ["", "src", "tests/integration"];
                    let paths = places.map(|place| root.join(place).join(word));
                    let path = paths.iter().find(|path| path.exists());
                    let path = path.unwrap_or_else(|| panic!("{page}: there is no {word}"));
                    code = fs::read_to_string(path).ok();
                } else if is_name_of_a_test(word) {
                    let code = code.as_deref().unwrap_or_default();
                    let is_there = code.contains(&format!("fn {word}("));
                    assert!(
                        is_there,
                        "{page}: there is no test {word} in the file before it"
                    );
                    named += 1;
                }
            }
        }
    }
    assert!(named > 0, "the pages name no test");
}

/// Tests have names like sentences.
fn is_name_of_a_test(word: &str) -> bool {
    let is_name = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'_';
    word.bytes().all(is_name) && word.matches('_').count() >= 2
}

fn assert_silent(example: Example, output: &Output) {
    assert!(output.status.success(), "{example:?}: {}", output.stderr);
    assert_eq!(output.stderr, "", "{example:?}");
}

/// A consumer's proxy has no part in a test on loopback.
fn without_proxy(command: &mut Command) {
    for name in ["http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"] {
        command.env_remove(name);
    }
}
