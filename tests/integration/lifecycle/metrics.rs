//! What Prometheus finds while a key is rotated, and whether the alerts ask for nothing else.

use std::{
    collections::{BTreeMap, BTreeSet},
    str::Chars,
};

use serde::Deserialize;

use super::{
    deployment::{Control, IssuedKey, KEYRING, Sidecar},
    snapshot::Disk,
};
use crate::support::{client::Request, eventually::eventually, reserved::Reserved};

/// A scrape: the labels of each metric, and its samples as they stand there.
#[derive(Debug, Default)]
struct Scrape {
    labels: BTreeMap<String, BTreeSet<String>>,
    page: String,
}

#[derive(Debug, Deserialize)]
struct Rules {
    groups: Vec<Group>,
}

#[derive(Debug, Deserialize)]
struct Group {
    rules: Vec<Rule>,
}

#[derive(Debug, Deserialize)]
struct Rule {
    alert: String,
    expr: String,
    annotations: BTreeMap<String, String>,
}

/// What an expression asks for.
#[derive(Debug, Default, PartialEq, Eq)]
struct Wanted {
    /// The metrics, with the labels that are matched.
    metrics: BTreeMap<String, BTreeSet<String>>,
    /// The labels by which series are grouped or joined.
    grouping: BTreeSet<String>,
}

const RULES: &str = include_str!("../../../deploy/prometheus/relatch.rules.yaml");
/// Whatever is scraped has these from Prometheus.
const OF_THE_JOB: [&str; 2] = ["job", "instance"];
/// Prometheus makes it itself.
const UP: &str = "up";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotation_shows_and_every_alert_finds_its_metrics() {
    let control = Control::with_file("heartbeat: 1s\n").await;
    let key = control.create_key().await;
    let disk = Disk::new().await;
    let sidecar = disk.start(&control).await;
    sidecar.reaches(key.revision).await;
    sidecar.ready().await;
    let nobody = Reserved::new();
    let url = format!("http://{}/", nobody.address());
    let add = ["webhook", "add", "--keyring", KEYRING, "--url", &url];
    control
        .json(&[&add[..], &["--allow-private"]].concat())
        .await;
    assert!(sidecar.check(&key.secret).await.allowed);
    control.set_policy(&["--on-deadline", "retire"]).await;
    let start = ["rotate", "start", &key.id, "--overlap", "1h"];
    let new = IssuedKey::from_json(&control.json(&start).await);
    assert!(sidecar.check(&new.secret).await.allowed);
    assert!(sidecar.check(&new.secret).await.allowed);

    let labels = |version: u32, last: &str| {
        let id = &key.id;
        format!(
            "{{keyring=\"{KEYRING}\",consumer=\"acme\",key_id=\"{id}\",version=\"{version}\",{last}}}"
        )
    };
    let old = labels(1, "state=\"retiring\"");
    let sidecars = |status: &str, count: u32| {
        format!("relatch_sidecars{{keyring=\"{KEYRING}\",status=\"{status}\"}} {count}")
    };
    let expected = [
        format!("relatch_key_requests_total{old} 1"),
        format!(
            "relatch_key_requests_total{} 2",
            labels(2, "state=\"active\"")
        ),
        format!("relatch_rotation_phase{} 1", labels(1, "phase=\"overlap\"")),
        sidecars("current", 1),
        sidecars("lagging", 0),
        sidecars("lost", 0),
        sidecars("stopped", 0),
        sidecars("gap", 0),
        "relatch_propagation_seconds_count 1".to_owned(),
        "relatch_commits_total{outcome=\"failed\"} 0".to_owned(),
        "relatch_spans_dropped_total 0".to_owned(),
    ];
    let told = [
        format!("relatch_key_last_used_timestamp_seconds{old} "),
        format!("relatch_key_retires_timestamp_seconds{old} "),
        format!("relatch_key_denied_from_timestamp_seconds{old} "),
        "relatch_webhook_deliveries_total{event=\"rotation.started\",outcome=\"retried\"} "
            .to_owned(),
    ];
    let mut scrape = eventually("the rotation shows", async || {
        let scrape = Scrape::of(
            &Request::get("/metrics")
                .send(control.plane.http())
                .await
                .text(),
        );
        let has = |line: &String| scrape.page.lines().any(|other| other == line);
        let begins = |start: &String| scrape.page.lines().any(|line| line.starts_with(start));
        (expected.iter().all(has) && told.iter().all(begins)).then_some(scrape)
    })
    .await;
    for hidden in [&key.secret, &new.secret, &url] {
        assert!(!scrape.page.contains(hidden.as_str()));
    }

    let of_sidecar = sidecar.daemon.get("/metrics").await.text();
    scrape.labels.extend(Scrape::of(&of_sidecar).labels);
    let rules: Rules = serde_saphyr::from_str(RULES).expect("the rules are YAML");
    let rules: Vec<Rule> = rules
        .groups
        .into_iter()
        .flat_map(|group| group.rules)
        .collect();
    assert!(rules.len() > 10, "{rules:?}");
    // Nothing here has a certificate: `tls` looks for its metrics.
    for rule in rules
        .iter()
        .filter(|rule| rule.alert != "RelatchCertificateExpiring")
    {
        let wrong = scrape.lacks(rule);
        assert!(wrong.is_empty(), "{}: {wrong:?}", rule.alert);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn each_commit_that_every_sidecar_was_waited_for_is_observed_once() {
    let keys = tempfile::tempdir().expect("a directory can be made");
    let directory = keys.path().display();
    let file =
        format!("heartbeat: 1s\nsinks: [{{ name: files, file: {{ directory: {directory} }} }}]\n");
    let control = Control::with_file(&file).await;
    let key = control.create_key().await;
    let observed = async || {
        let page = Request::get("/metrics").send(control.plane.http()).await;
        let page = page.text();
        let mut lines = page.lines();
        let count = lines.find_map(|line| line.strip_prefix("relatch_propagation_seconds_count "));
        let count = count.expect("it is registered").parse::<usize>();
        count.expect("a number")
    };
    control
        .json(&["rotate", "start", &key.id, "--overlap", "0s"])
        .await;
    assert_eq!(observed().await, 0, "there is no sidecar");
    let sidecar = Sidecar::start(&control, "edge-1").await;
    sidecar.reaches(key.revision).await;
    sidecar.ready().await;

    let versions = async || {
        let shown = control.show_key(&key.id).await;
        shown["versions"].as_array().expect("a list").clone()
    };
    let often = [
        "--rotate-every",
        "2s",
        "--overlap",
        "0s",
        "--idle-for",
        "0s",
    ];
    let set = ["policy", "set", &key.id, "--sink", "files"];
    control.json(&[&set[..], &often].concat()).await;
    eventually("it is rotated by itself", async || {
        (versions().await.len() >= 4).then_some(())
    })
    .await;
    let never = ["policy", "set", &key.id, "--rotate-every", "never"];
    control.json(&never).await;
    let by_schedule = eventually("no rotation is under way", async || {
        let versions = versions().await;
        let is_pending = versions.iter().any(|version| version["state"] == "pending");
        (!is_pending).then_some(versions.len() - 2)
    })
    .await;
    assert_eq!(observed().await, by_schedule);

    let emergency = [
        "rotate",
        "start",
        &key.id,
        "--emergency",
        "--reason",
        "leaked",
    ];
    control.json(&emergency).await;
    assert_eq!(
        observed().await,
        by_schedule + 2,
        "the new version, and the end of the old one"
    );
    let revoke = ["revoke", &key.id, "--all", "--reason", "leaked", "--wait"];
    control.json(&revoke).await;
    assert_eq!(observed().await, by_schedule + 3);
    control.json(&revoke).await;
    assert_eq!(observed().await, by_schedule + 3, "it was there before");
}

#[test]
fn what_an_alert_asks_for_is_read() {
    let wanted = Wanted::of(
        r#"sum by (job, le) (rate(relatch_a_bucket{x=~"b|relatch_c", y!="}"}[5m])) > 6 * 3600
           unless on (x) relatch_d offset 1h and time() - relatch_e{} < 1e3"#,
    );
    let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    let metrics = [
        ("relatch_a_bucket", set(&["x", "y"])),
        ("relatch_d", set(&[])),
        ("relatch_e", set(&[])),
    ];
    assert_eq!(wanted.grouping, set(&["job", "le", "x"]));
    assert_eq!(
        wanted.metrics,
        metrics
            .map(|(name, labels)| (name.to_owned(), labels))
            .into()
    );
    let scrape = Scrape::of("# HELP relatch_d x\nrelatch_d{x=\"a,z=\\\"}\",y=\"\"} 1\n");
    assert_eq!(scrape.labels["relatch_d"], set(&["x", "y"]));
    let rule = |expr: &str, said: &str| Rule {
        alert: "A".to_owned(),
        expr: expr.to_owned(),
        annotations: [("summary".to_owned(), said.to_owned())].into(),
    };
    for (expr, said, lacking) in [
        ("sum by (x, job) (relatch_d{y=\"\"})", "{{ $labels.x }}", 0),
        ("relatch_d{z=\"\"}", "", 1),
        ("sum by (z) (relatch_d)", "", 1),
        ("relatch_e", "", 1),
        ("relatch_d", "{{ $labels.z }}", 1),
    ] {
        let lacks = scrape.lacks(&rule(expr, said));
        assert_eq!(lacks.len(), lacking, "{expr}: {lacks:?}");
    }
}

impl Scrape {
    fn of(page: &str) -> Self {
        let mut scrape = Self {
            page: page.to_owned(),
            ..Self::default()
        };
        for line in page.lines().filter(|line| !line.starts_with('#')) {
            let mut rest = line.chars();
            let metric = word(&mut rest);
            let labels = scrape.labels.entry(metric).or_default();
            if rest.as_str().starts_with('{') {
                rest.next();
                labels.extend(matched(&mut rest));
            }
        }
        scrape
    }

    /// What a rule asks for and is not there.
    fn lacks(&self, rule: &Rule) -> Vec<String> {
        let mut lacks = Vec::new();
        let wanted = Wanted::of(&rule.expr);
        assert!(!wanted.metrics.is_empty(), "{rule:?}");
        let said = rule.annotations.values().flat_map(|text| {
            let labels = text.split("$labels.").skip(1);
            labels.map(|rest| word(&mut rest.chars()))
        });
        let common: BTreeSet<String> = wanted.grouping.into_iter().chain(said).collect();
        for (metric, mut labels) in wanted.metrics {
            let Some(held) = self.labels.get(&metric) else {
                if metric != UP {
                    lacks.push(metric);
                }
                continue;
            };
            labels.extend(common.iter().cloned());
            for label in labels {
                if !held.contains(&label) && !OF_THE_JOB.contains(&label.as_str()) {
                    lacks.push(format!("{metric}{{{label}}}"));
                }
            }
        }
        lacks
    }
}

impl Wanted {
    fn of(expr: &str) -> Self {
        let mut wanted = Self::default();
        let mut rest = expr.chars();
        while let Some(next) = rest.clone().next() {
            if !next.is_ascii_alphanumeric() && next != '_' {
                rest.next();
                match next {
                    '[' => skip_past(&mut rest, ']'),
                    '"' => skip_past(&mut rest, '"'),
                    _ => {}
                }
                continue;
            }
            let word = word(&mut rest);
            let behind = rest.as_str().trim_start();
            if matches!(word.as_str(), "by" | "on") {
                let list = behind
                    .split(['(', ')'])
                    .nth(1)
                    .expect("labels stand in brackets");
                let labels = list.split(',').map(|label| label.trim().to_owned());
                wanted.grouping.extend(labels);
                skip_past(&mut rest, ')');
            } else if word.starts_with("relatch_") || word.starts_with("process_") || word == UP {
                let labels = wanted.metrics.entry(word).or_default();
                if rest.as_str().starts_with('{') {
                    rest.next();
                    labels.extend(matched(&mut rest));
                }
            }
        }
        wanted
    }
}

/// The names of the labels up to the closing bracket.
fn matched(rest: &mut Chars<'_>) -> Vec<String> {
    let mut names = Vec::new();
    loop {
        match rest.clone().next() {
            Some('}') | None => {
                rest.next();
                return names;
            }
            Some('"') => {
                rest.next();
                skip_past(rest, '"');
            }
            Some(letter) if letter.is_ascii_alphabetic() || letter == '_' => names.push(word(rest)),
            Some(_) => {
                rest.next();
            }
        }
    }
}

/// A name or a number.
fn word(rest: &mut Chars<'_>) -> String {
    let is_part = |letter: &char| letter.is_ascii_alphanumeric() || *letter == '_';
    let word: String = rest.clone().take_while(is_part).collect();
    *rest = rest.as_str()[word.len()..].chars();
    word
}

/// Goes on behind `end`, but not one that is escaped.
fn skip_past(rest: &mut Chars<'_>, end: char) {
    while let Some(next) = rest.next() {
        if next == '\\' {
            rest.next();
        } else if next == end {
            return;
        }
    }
}
