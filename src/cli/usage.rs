//! `relatch usage`: shows how often each version of a key was used, when it was last used, and from where.

use clap::Args;
use serde::Serialize;

use super::{
    Session,
    connection::answer,
    convert,
    failure::Failure,
    output::{self, View},
    value::KeyIdParser,
    words,
};
use crate::{
    key::{KeyId, KeyState, Timestamp},
    proto::admin,
};

/// The arguments of `usage`.
#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub struct UsageArgs {
    /// Key id: the 12 characters between the first two '_' of the key
    #[arg(value_name = "KEY_ID", value_parser = KeyIdParser)]
    key_id: KeyId,
}

/// The reported use of a key, and up to which moment the reports are complete.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct UsageView {
    pub keyring: String,
    pub consumer: String,
    pub key_id: String,
    /// The versions by number, the oldest first.
    pub versions: Vec<VersionUsageView>,
    /// The time up to which every sidecar that may serve has reported all requests; null if one has reported nothing yet.
    pub complete_until: Option<Timestamp>,
    /// The gaps of sidecars that are gone without their last report.
    pub gaps: Vec<GapView>,
    /// The sidecars that may serve and whose reports are late.
    pub silent: Vec<String>,
}

/// The reported use of one version.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub(crate) struct VersionUsageView {
    pub version: u32,
    pub state: String,
    /// The number of checks that presented it, denied ones included.
    pub requests: u64,
    /// The number of these checks that were denied.
    pub denied: u64,
    /// The recent requests per second; null if they are not known.
    pub rate: Option<f64>,
    /// Its share of the recent requests of the key, from 0 to 1; null if it is not known.
    pub share: Option<f64>,
    /// The time of the first request; null: never used.
    pub first_used_at: Option<Timestamp>,
    /// The time of the last request; null: never used.
    pub last_used_at: Option<Timestamp>,
    /// The most frequent callers; only of versions that are retiring or have ended.
    pub callers: Vec<CallerView>,
}

/// A caller of a version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct CallerView {
    /// The source address.
    pub source: String,
    /// The user agent that it sends.
    pub user_agent: String,
    /// The target of its requests.
    pub route: String,
    /// The number of its requests.
    pub requests: u64,
    /// The time of its last request.
    pub last_used_at: Option<Timestamp>,
}

/// A time in which a sidecar may have seen requests that it has not reported.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub(crate) struct GapView {
    pub node: String,
    /// The process of the sidecar.
    pub run_id: String,
    /// The time up to which it has reported all requests; null if it has reported nothing.
    pub from: Option<Timestamp>,
    /// The time until which it may have seen requests.
    pub until: Option<Timestamp>,
}

const EXAMPLES: &str = "\
Example:
  Who still uses an old version of this key?
    relatch usage 7Qm2Xc91TbKe -o table

The counts include every check that presented the key, allowed or denied. They
do not include requests that sidecars have not reported yet; COMPLETE shows the
time up to which all are reported. The most frequent callers are recorded for
versions that are retiring or have ended.";

impl UsageArgs {
    /// Runs the command.
    ///
    /// # Errors
    ///
    /// When the control plane cannot be reached or refuses.
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        let mut admin = session.admin().await?;
        let key_id = self.key_id.as_str().to_owned();
        let usage = answer(admin.get_usage(admin::GetUsageRequest { key_id })).await?;
        session.show(&UsageView::from(usage))
    }
}

impl UsageView {
    /// The facts that identify the key.
    #[must_use]
    pub(crate) fn subject(&self) -> Vec<(&'static str, String)> {
        vec![
            ("KEYRING", self.keyring.clone()),
            ("CONSUMER", self.consumer.clone()),
            ("KEY ID", self.key_id.clone()),
        ]
    }

    /// The facts about the completeness of the reports, with a line for each gap.
    #[must_use]
    pub(crate) fn completeness(&self, now: Timestamp) -> Vec<(&'static str, String)> {
        let complete = match self.complete_until {
            Some(until) => format!(
                "until {}, {} ago",
                words::time(Some(until)),
                words::age(until, now)
            ),
            None => "no: a sidecar has not reported any requests yet".to_owned(),
        };
        let gaps = self.gaps.iter().map(|gap| ("GAP", gap.sentence()));
        let silent = self
            .silent
            .iter()
            .map(|node| ("SILENT", format!("the reports of {node} are late")));
        std::iter::once(("COMPLETE", complete))
            .chain(gaps)
            .chain(silent)
            .collect()
    }

    /// A table with a row for each version.
    #[must_use]
    pub(crate) fn versions_table(&self, now: Timestamp) -> String {
        let titles = [
            "VERSION",
            "STATE",
            "SHARE",
            "RATE",
            "REQUESTS",
            "DENIED",
            "FIRST USED",
            "LAST USED",
        ];
        let versions = self.versions.iter();
        output::table(&titles, versions.map(|version| version.cells(now)))
    }

    /// A table with at most `most` callers for each version; none if no caller is known.
    #[must_use]
    pub(crate) fn callers_table(&self, most: usize, now: Timestamp) -> Option<String> {
        let rows: Vec<Vec<String>> = self
            .versions
            .iter()
            .flat_map(|version| {
                let callers = version.callers.iter().take(most);
                callers.map(|caller| caller.cells(version.version, now))
            })
            .collect();
        let titles = [
            "VERSION",
            "SOURCE",
            "USER AGENT",
            "ROUTE",
            "REQUESTS",
            "LAST USED",
        ];
        (!rows.is_empty()).then(|| output::table(&titles, rows))
    }
}

impl View for UsageView {
    fn render(&self, now: Timestamp) -> String {
        let facts = [self.subject(), self.completeness(now)].concat();
        let mut text = format!("{}\n{}", output::facts(&facts), self.versions_table(now));
        if let Some(callers) = self.callers_table(usize::MAX, now) {
            text.push('\n');
            text.push_str(&callers);
        }
        text
    }
}

impl VersionUsageView {
    fn cells(&self, now: Timestamp) -> Vec<String> {
        let nothing = || words::NOTHING.to_owned();
        vec![
            self.version.to_string(),
            self.state.clone(),
            self.share.map_or_else(nothing, words::percent),
            self.rate.map_or_else(nothing, words::rate),
            self.requests.to_string(),
            self.denied.to_string(),
            words::when(self.first_used_at, now),
            words::when(self.last_used_at, now),
        ]
    }

    /// Whether its secret may be in use. If the rate of such a version is not known, no share is known.
    fn is_accepted(&self) -> bool {
        [KeyState::Pending, KeyState::Active, KeyState::Retiring]
            .iter()
            .any(|state| state.to_string() == self.state)
    }
}

impl CallerView {
    fn cells(&self, version: u32, now: Timestamp) -> Vec<String> {
        vec![
            version.to_string(),
            words::or_nothing(&self.source),
            words::or_nothing(&self.user_agent),
            words::or_nothing(&self.route),
            self.requests.to_string(),
            words::when(self.last_used_at, now),
        ]
    }
}

impl GapView {
    /// `edge-3: … to … not reported`
    fn sentence(&self) -> String {
        let Self {
            node, from, until, ..
        } = self;
        let until = words::time(*until);
        match from {
            Some(_) => format!("{node}: {} to {until} not reported", words::time(*from)),
            None => format!("{node}: nothing reported up to {until}"),
        }
    }
}

impl From<admin::KeyUsage> for UsageView {
    fn from(usage: admin::KeyUsage) -> Self {
        let mut versions: Vec<VersionUsageView> =
            usage.versions.into_iter().map(Into::into).collect();
        share_out(&mut versions);
        Self {
            keyring: usage.keyring,
            consumer: usage.consumer,
            key_id: usage.key_id,
            versions,
            complete_until: convert::timestamp(usage.complete_until),
            gaps: usage.gaps.into_iter().map(Into::into).collect(),
            silent: usage.silent,
        }
    }
}

impl From<admin::VersionUsage> for VersionUsageView {
    fn from(usage: admin::VersionUsage) -> Self {
        Self {
            version: usage.version,
            state: convert::state(usage.state),
            requests: usage.requests,
            denied: usage.denied,
            rate: usage.rate.filter(|rate| rate.is_finite() && *rate >= 0.0),
            share: None,
            first_used_at: convert::timestamp(usage.first_used_at),
            last_used_at: convert::timestamp(usage.last_used_at),
            callers: usage.callers.into_iter().map(Into::into).collect(),
        }
    }
}

impl From<admin::Caller> for CallerView {
    fn from(caller: admin::Caller) -> Self {
        Self {
            source: caller.source,
            user_agent: caller.user_agent,
            route: caller.route,
            requests: caller.requests,
            last_used_at: convert::timestamp(caller.last_used_at),
        }
    }
}

impl From<admin::Gap> for GapView {
    fn from(gap: admin::Gap) -> Self {
        Self {
            node: gap.node,
            run_id: gap.run_id,
            from: convert::timestamp(gap.from),
            until: convert::timestamp(gap.until),
        }
    }
}

/// Sets the share of each version in the recent requests, unless a rate is not known.
fn share_out(versions: &mut [VersionUsageView]) {
    let known = versions
        .iter()
        .all(|version| version.rate.is_some() || !version.is_accepted());
    let all: f64 = versions.iter().filter_map(|version| version.rate).sum();
    if !known || all <= 0.0 {
        return;
    }
    for version in versions {
        version.share = version.rate.map(|rate| rate / all);
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::{super::output::tests::fits, *};

    pub(crate) const NOW: i64 = 1_767_225_610_000;

    pub(crate) fn at(seconds: i64) -> prost_types::Timestamp {
        prost_types::Timestamp { seconds, nanos: 0 }
    }

    /// Three quarters of the requests still use version 1.
    pub(crate) fn usage() -> admin::KeyUsage {
        admin::KeyUsage {
            keyring: "payments".to_owned(),
            consumer: "acme".to_owned(),
            key_id: "7Qm2Xc91TbKe".to_owned(),
            versions: vec![
                admin::VersionUsage {
                    version: 1,
                    state: admin::KeyState::Retiring as i32,
                    requests: 1_200,
                    denied: 3,
                    rate: Some(7.5),
                    first_used_at: Some(at(1_767_000_000)),
                    last_used_at: Some(at(1_767_225_608)),
                    callers: vec![admin::Caller {
                        source: "10.1.2.3".to_owned(),
                        user_agent: "batch/2.1".to_owned(),
                        route: "api.example/orders".to_owned(),
                        requests: 900,
                        last_used_at: Some(at(1_767_225_608)),
                    }],
                },
                admin::VersionUsage {
                    version: 2,
                    state: admin::KeyState::Active as i32,
                    requests: 40,
                    rate: Some(2.5),
                    ..admin::VersionUsage::default()
                },
            ],
            complete_until: Some(at(1_767_225_606)),
            gaps: vec![admin::Gap {
                node: "edge-3".to_owned(),
                run_id: "b1".to_owned(),
                from: Some(at(1_767_225_000)),
                until: Some(at(1_767_225_060)),
            }],
            silent: vec!["edge-4".to_owned()],
        }
    }

    #[test]
    fn json_of_usage() {
        assert_eq!(
            serde_json::to_string(&UsageView::from(usage())).expect("serializable"),
            concat!(
                r#"{"keyring":"payments","consumer":"acme","key_id":"7Qm2Xc91TbKe","versions":["#,
                r#"{"version":1,"state":"retiring","requests":1200,"denied":3,"rate":7.5,"share":0.75,"#,
                r#""first_used_at":"2025-12-29T09:20:00.000Z","last_used_at":"2026-01-01T00:00:08.000Z","#,
                r#""callers":[{"source":"10.1.2.3","user_agent":"batch/2.1","route":"api.example/orders","requests":900,"#,
                r#""last_used_at":"2026-01-01T00:00:08.000Z"}]},"#,
                r#"{"version":2,"state":"active","requests":40,"denied":0,"rate":2.5,"share":0.25,"#,
                r#""first_used_at":null,"last_used_at":null,"callers":[]}],"#,
                r#""complete_until":"2026-01-01T00:00:06.000Z","gaps":[{"node":"edge-3","run_id":"b1","#,
                r#""from":"2025-12-31T23:50:00.000Z","until":"2025-12-31T23:51:00.000Z"}],"silent":["edge-4"]}"#,
            )
        );
    }

    #[test]
    fn a_table_tells_of_versions_callers_and_of_what_is_not_known() {
        assert_eq!(
            fits(UsageView::from(usage()).render(Timestamp::from_millis(NOW))),
            "KEYRING   payments\n\
             CONSUMER  acme\n\
             KEY ID    7Qm2Xc91TbKe\n\
             COMPLETE  until 2026-01-01T00:00:06Z, 4s ago\n\
             GAP       edge-3: 2025-12-31T23:50:00Z to 2025-12-31T23:51:00Z not reported\n\
             SILENT    the reports of edge-4 are late\n\
             \n\
             VERSION  STATE     SHARE  RATE   REQUESTS  DENIED  FIRST USED  LAST USED\n\
             1        retiring  75%    7.5/s  1200      3       2d ago      2s ago\n\
             2        active    25%    2.5/s  40        0       -           -\n\
             \n\
             VERSION  SOURCE    USER AGENT  ROUTE               REQUESTS  LAST USED\n\
             1        10.1.2.3  batch/2.1   api.example/orders  900       2s ago\n"
        );
    }

    #[test]
    fn a_share_is_no_guess() {
        let shares = |usage: admin::KeyUsage| -> Vec<Option<f64>> {
            let view = UsageView::from(usage);
            view.versions.iter().map(|version| version.share).collect()
        };
        let mut unknown = usage();
        unknown.versions[0].rate = None;
        assert_eq!(shares(unknown.clone()), [None, None]);
        // Nobody can use it any more.
        unknown.versions[0].state = admin::KeyState::Revoked as i32;
        assert_eq!(shares(unknown), [None, Some(1.0)]);
        let mut idle = usage();
        for version in &mut idle.versions {
            version.rate = Some(0.0);
        }
        assert_eq!(shares(idle), [None, None]);
    }

    #[test]
    fn what_nobody_has_told_is_not_taken_for_no_use() {
        let mut usage = usage();
        usage.complete_until = None;
        usage.gaps[0].from = None;
        let view = UsageView::from(usage);
        let facts = view.completeness(Timestamp::from_millis(NOW));
        assert_eq!(
            facts[0].1,
            "no: a sidecar has not reported any requests yet"
        );
        assert!(
            facts[1].1.contains(": nothing reported up to "),
            "{facts:?}"
        );
    }

    #[test]
    fn what_callers_call_themselves_cannot_steer_a_terminal() {
        let mut usage = usage();
        usage.versions[0].callers[0].user_agent = "a\x1b[2J\nb".to_owned();
        let table = UsageView::from(usage)
            .callers_table(1, Timestamp::from_millis(NOW))
            .expect("a caller");
        assert!(!table.contains('\x1b'), "{table}");
        assert_eq!(table.lines().count(), 2, "{table}");
    }
}
