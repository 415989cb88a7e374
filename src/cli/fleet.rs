//! `relatch fleet`: shows the sidecars that may serve and what each of them has confirmed, and forgets sidecars.

use std::{collections::BTreeMap, time::Duration};

use clap::{Args, Subcommand};
use serde::Serialize;

use super::{
    Session,
    barrier::{BarrierView, LaggardView, RunView},
    connection::answer,
    convert,
    failure::Failure,
    output::{Listing, Row},
    words,
};

mod forget;

use crate::{
    clock::Clock,
    key::{KeyringName, Timestamp},
    proto::admin,
};
use forget::ForgetArgs;

/// The arguments of `fleet`.
#[derive(Debug, Args)]
#[command(args_conflicts_with_subcommands = true, after_help = COLUMNS)]
pub struct FleetArgs {
    #[command(subcommand)]
    command: Option<FleetCommand>,

    /// Show only the sidecars that serve this keyring [default: all sidecars]
    #[arg(long)]
    keyring: Option<KeyringName>,
}

#[derive(Debug, Subcommand)]
enum FleetCommand {
    /// Declare that a sidecar no longer serves, so that no command waits for it; requires role admin
    Forget(ForgetArgs),
}

/// An entry of the fleet.
#[derive(Debug, Serialize)]
#[serde(untagged)]
enum FleetView {
    /// A sidecar that may serve.
    Sidecar(SidecarView),
    /// A sidecar that is gone without its last report.
    Gap(GapView),
}

#[derive(Debug, Serialize)]
struct SidecarView {
    node: String,
    cluster: String,
    version: String,
    run_id: String,
    labels: BTreeMap<String, String>,
    connected: bool,
    connected_at: Option<Timestamp>,
    last_seen: Option<Timestamp>,
    keyrings: Vec<HeldKeyringView>,
    /// The time up to which it has reported every use of a key.
    complete_until: Option<Timestamp>,
    /// Always null; a sidecar that is gone has a value here.
    gap_until: Option<Timestamp>,
    /// `connected`, `lost` or `stopped`.
    presence: &'static str,
    /// The time since which it is lost or stopped.
    since: Option<Timestamp>,
    /// The time until which it may serve its keyrings; null while it is connected.
    serves_until: Option<Timestamp>,
    /// Whether it has a snapshot file.
    snapshot_file: bool,
}

/// A sidecar that is gone without its last report, with the field names of a sidecar that may serve.
#[derive(Debug, Serialize)]
struct GapView {
    node: String,
    cluster: String,
    version: String,
    run_id: String,
    connected: bool,
    last_seen: Option<Timestamp>,
    keyrings: Vec<GapKeyringView>,
    complete_until: Option<Timestamp>,
    /// The time until which it may have served.
    gap_until: Option<Timestamp>,
    /// Always `gone`.
    presence: &'static str,
    /// Whether an operator forgot it.
    forgotten: bool,
}

#[derive(Debug, Serialize)]
struct GapKeyringView {
    keyring: String,
}

#[derive(Debug, Serialize)]
struct HeldKeyringView {
    keyring: String,
    epoch: u64,
    applied_revision: u64,
    durable_revision: u64,
    head_revision: u64,
    /// The number of revisions that the sidecar is behind the head; null: the keyring does not exist.
    lag: Option<u64>,
    /// The time since which the sidecar has `applied_revision`.
    applied_at: Option<Timestamp>,
    /// The items that the sidecar refused, with the reason.
    rejected: Vec<String>,
    /// Whether the keyring does not exist.
    missing: bool,
}

const COLUMNS: &str = "\
Columns of the table:
  STATUS     connected, lost, stopped or gone, and for how long
  MAY SERVE  how long a lost sidecar may continue to serve, or a stopped one may
             start from its snapshot file
  REVISION   the revision that the sidecar uses, of the newest revision
  LAG        the difference between the two
  SINCE      when the sidecar began to use its revision
  REPORTED   the time up to which it has reported the use of keys

With -o json each sidecar also has its cluster, version, run id and labels.";

/// The age at which a report is late. A sidecar sends one after every answer to a beat, by default every five seconds.
const LATE: Duration = Duration::from_secs(30);
/// The most sidecars that a note names: more would not fit into two lines.
const MOST_NAMED: usize = 5;

impl FleetArgs {
    /// Runs the command.
    ///
    /// # Errors
    ///
    /// When the control plane cannot be reached or refuses.
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        if let Some(FleetCommand::Forget(forget)) = self.command {
            return forget.run(session).await;
        }
        let mut admin = session.admin().await?;
        let keyring = self.keyring.map(String::from).unwrap_or_default();
        let fleet = answer(admin.get_fleet(admin::GetFleetRequest { keyring })).await?;
        let sidecars: Vec<_> = fleet.sidecars.into_iter().map(SidecarView::from).collect();
        let gaps: Vec<_> = fleet.gaps.into_iter().map(GapView::from).collect();
        let now = Clock::system().wall();
        let mut notes: Vec<String> = sidecars.iter().flat_map(SidecarView::refused).collect();
        notes.extend(missing(&sidecars));
        notes.extend(sidecars.iter().filter_map(|sidecar| sidecar.lateness(now)));
        notes.extend(gaps.iter().map(GapView::note));
        let sidecars = sidecars.into_iter().map(FleetView::Sidecar);
        let fleet = sidecars.chain(gaps.into_iter().map(FleetView::Gap));
        session.show(&Listing(fleet.collect()))?;
        for note in notes {
            session.output.note(&note);
        }
        Ok(())
    }
}

/// The sidecars that are behind the newest revision of a keyring, and for which the command waits.
///
/// # Errors
///
/// When the control plane cannot be reached or refuses.
pub(super) async fn behind(
    session: &Session,
    keyring: &str,
    pass_by: Option<&admin::PassBy>,
) -> Result<BarrierView, Failure> {
    let mut admin = session.admin().await?;
    let request = admin::GetFleetRequest {
        keyring: keyring.to_owned(),
    };
    let fleet = answer(admin.get_fleet(request)).await?;
    let is_passed_by = |sidecar: &SidecarView| {
        pass_by.is_some_and(|by| {
            by.nodes.contains(&sidecar.node) || (by.lost && sidecar.serves_until.is_some())
        })
    };
    let sidecars = fleet.sidecars.into_iter().map(SidecarView::from);
    let (passed_by, waited_for): (Vec<_>, Vec<_>) = sidecars.partition(is_passed_by);
    let total = waited_for.len();
    let laggards = waited_for.into_iter().filter_map(|s| s.laggard(keyring));
    let laggards: Vec<_> = laggards.collect();
    let count = |n: usize| u32::try_from(n).unwrap_or(u32::MAX);
    Ok(BarrierView {
        applied: count(total - laggards.len()),
        total: count(total),
        laggards,
        passed_by: passed_by.into_iter().map(SidecarView::run).collect(),
    })
}

impl SidecarView {
    /// The sidecar as a laggard; none if it has the newest revision of the keyring.
    fn laggard(self, keyring: &str) -> Option<LaggardView> {
        let held = self.keyrings.iter().find(|held| held.keyring == keyring)?;
        let behind = held.lag.unwrap_or(0);
        let lacks_disk = self.snapshot_file && held.durable_revision < held.head_revision;
        if behind == 0 && !lacks_disk {
            return None;
        }
        Some(LaggardView {
            node: self.node,
            cluster: self.cluster,
            connected: self.connected,
            behind,
            last_seen: None,
            run_id: self.run_id,
            presence: self.presence,
            since: self.since,
            serves_until: self.serves_until,
            lacks_disk: behind == 0,
        })
    }

    fn run(self) -> RunView {
        RunView {
            node: self.node,
            run_id: self.run_id,
        }
    }

    fn refused(&self) -> Vec<String> {
        let keyrings = self
            .keyrings
            .iter()
            .filter(|held| !held.rejected.is_empty());
        keyrings
            .map(|held| {
                let items = words::list(&held.rejected, 5);
                format!("{} refused items of {}: {items}", self.node, held.keyring)
            })
            .collect()
    }

    fn lateness(&self, now: Timestamp) -> Option<String> {
        let Self {
            node,
            complete_until,
            ..
        } = self;
        match complete_until {
            _ if self.keyrings.is_empty() => None,
            None => Some(format!("{node} has not reported the use of keys yet")),
            Some(until) if now.saturating_since(*until) > LATE => Some(format!(
                "{node} has not reported the use of keys for {}",
                words::age(*until, now)
            )),
            Some(_) => None,
        }
    }

    /// `connected`, or `lost 4s ago`.
    fn status(&self, now: Timestamp) -> String {
        match self.since.filter(|_| self.serves_until.is_some()) {
            Some(since) => format!("{} {} ago", self.presence, words::age(since, now)),
            None => self.presence.to_owned(),
        }
    }

    /// The time that it may still serve without a stream; a dash while it has one.
    fn may_serve(&self, now: Timestamp) -> String {
        self.serves_until.map_or_else(
            || words::NOTHING.to_owned(),
            |until| format!("for {}", words::age(now, until)),
        )
    }
}

impl From<admin::Sidecar> for SidecarView {
    fn from(sidecar: admin::Sidecar) -> Self {
        Self {
            presence: words::presence(sidecar.presence()),
            since: convert::timestamp(sidecar.since),
            serves_until: convert::timestamp(sidecar.serves_until),
            snapshot_file: sidecar.has_snapshot_file,
            node: sidecar.node,
            cluster: sidecar.cluster,
            version: sidecar.version,
            run_id: sidecar.run_id,
            labels: sidecar.labels.into_iter().collect(),
            connected: sidecar.connected,
            connected_at: convert::timestamp(sidecar.connected_at),
            last_seen: convert::timestamp(sidecar.last_seen),
            keyrings: sidecar.keyrings.into_iter().map(Into::into).collect(),
            complete_until: convert::timestamp(sidecar.complete_until),
            gap_until: None,
        }
    }
}

impl GapView {
    fn note(&self) -> String {
        let how = if self.forgotten {
            "was forgotten"
        } else {
            "ended without its last report"
        };
        format!(
            "{} {how}; its requests until {} are not known",
            self.node,
            words::time(self.gap_until)
        )
    }

    /// A row for each keyring that it served, or one row if it served none.
    fn cells(&self, now: Timestamp) -> Vec<Vec<String>> {
        let gone = self.last_seen.map_or_else(
            || "gone".to_owned(),
            |seen| format!("gone {} ago", words::age(seen, now)),
        );
        let nothing = || words::NOTHING.to_owned();
        let row = |keyring: String| {
            vec![
                self.node.clone(),
                gone.clone(),
                nothing(),
                keyring,
                nothing(),
                nothing(),
                nothing(),
                reported(self.complete_until, now),
            ]
        };
        if self.keyrings.is_empty() {
            return vec![row(nothing())];
        }
        let keyrings = self.keyrings.iter();
        keyrings.map(|held| row(held.keyring.clone())).collect()
    }
}

impl From<admin::GoneSidecar> for GapView {
    fn from(gap: admin::GoneSidecar) -> Self {
        let keyrings = gap.keyrings.into_iter();
        Self {
            node: gap.node,
            cluster: gap.cluster,
            version: gap.version,
            run_id: gap.run_id,
            connected: false,
            last_seen: convert::timestamp(gap.last_contact),
            keyrings: keyrings.map(|keyring| GapKeyringView { keyring }).collect(),
            complete_until: convert::timestamp(gap.complete_until),
            gap_until: convert::timestamp(gap.until),
            presence: "gone",
            forgotten: gap.forgotten,
        }
    }
}

impl From<admin::SidecarKeyring> for HeldKeyringView {
    fn from(held: admin::SidecarKeyring) -> Self {
        Self {
            lag: (!held.missing).then(|| held.head_revision.saturating_sub(held.applied_revision)),
            keyring: held.keyring,
            epoch: held.epoch,
            applied_revision: held.applied_revision,
            durable_revision: held.durable_revision,
            head_revision: held.head_revision,
            applied_at: convert::timestamp(held.applied_at),
            rejected: held.rejected,
            missing: held.missing,
        }
    }
}

impl Row for FleetView {
    const TITLES: &[&str] = &[
        "NODE",
        "STATUS",
        "MAY SERVE",
        "KEYRING",
        "REVISION",
        "LAG",
        "SINCE",
        "REPORTED",
    ];

    fn cells(&self, now: Timestamp) -> Vec<Vec<String>> {
        match self {
            Self::Sidecar(sidecar) => sidecar.cells(now),
            Self::Gap(gap) => gap.cells(now),
        }
    }
}

impl SidecarView {
    /// A row for each keyring of the sidecar, or one row if it has none.
    fn cells(&self, now: Timestamp) -> Vec<Vec<String>> {
        let sidecar = [self.node.clone(), self.status(now), self.may_serve(now)];
        let reported = [reported(self.complete_until, now)];
        let row = |held: [String; 4]| [&sidecar[..], &held, &reported].concat();
        if self.keyrings.is_empty() {
            return vec![row([words::NOTHING; 4].map(str::to_owned))];
        }
        let keyrings = self.keyrings.iter();
        keyrings.map(|held| row(held.cells(now))).collect()
    }
}

/// A sentence for each keyring that does not exist, with the sidecars that wait for it.
fn missing(sidecars: &[SidecarView]) -> Vec<String> {
    let mut waiting: BTreeMap<&str, Vec<String>> = BTreeMap::new();
    for sidecar in sidecars {
        for held in sidecar.keyrings.iter().filter(|held| held.missing) {
            let nodes = waiting.entry(&held.keyring).or_default();
            nodes.push(sidecar.node.clone());
        }
    }
    let sentence = |(keyring, nodes): (&str, Vec<String>)| {
        let verb = if nodes.len() == 1 { "waits" } else { "wait" };
        format!(
            "{} {verb} for keyring {keyring}, which does not exist: create it with `relatch keyring create {keyring}`, or correct `keyrings` in the sidecar's file",
            words::list(&nodes, MOST_NAMED)
        )
    };
    waiting.into_iter().map(sentence).collect()
}

/// The age of the last complete report of use.
fn reported(complete_until: Option<Timestamp>, now: Timestamp) -> String {
    complete_until.map_or_else(
        || "never".to_owned(),
        |until| format!("{} ago", words::age(until, now)),
    )
}

impl HeldKeyringView {
    fn cells(&self, now: Timestamp) -> [String; 4] {
        let Some(lag) = self.lag else {
            let nothing = words::NOTHING.to_owned();
            let missing = "no such keyring".to_owned();
            return [self.keyring.clone(), missing, nothing.clone(), nothing];
        };
        let since = self
            .applied_at
            .map(|at| format!("{} ago", words::age(at, now)));
        [
            self.keyring.clone(),
            format!("{} of {}", self.applied_revision, self.head_revision),
            lag.to_string(),
            since.unwrap_or_else(|| words::NOTHING.to_owned()),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::output::{View, tests::fits},
        *,
    };

    fn at(seconds: i64) -> prost_types::Timestamp {
        prost_types::Timestamp { seconds, nanos: 0 }
    }

    fn sidecar() -> admin::Sidecar {
        admin::Sidecar {
            node: "edge-3".to_owned(),
            cluster: "gateway".to_owned(),
            version: "0.1.0".to_owned(),
            run_id: "b1".to_owned(),
            labels: [("zone".to_owned(), "a".to_owned())].into(),
            connected: false,
            connected_at: Some(at(1_767_225_600)),
            last_seen: Some(at(1_767_225_606)),
            keyrings: vec![admin::SidecarKeyring {
                keyring: "payments".to_owned(),
                epoch: 1,
                applied_revision: 16,
                durable_revision: 15,
                head_revision: 18,
                applied_at: Some(at(1_767_225_602)),
                rejected: vec!["key 0123456789ab: too long".to_owned()],
                missing: false,
            }],
            complete_until: Some(at(1_767_225_605)),
            presence: admin::Presence::Lost as i32,
            since: Some(at(1_767_225_606)),
            serves_until: Some(at(1_767_229_206)),
            has_snapshot_file: true,
        }
    }

    fn connect(sidecar: &mut admin::Sidecar) {
        sidecar.connected = true;
        sidecar.presence = admin::Presence::Connected as i32;
        sidecar.since = None;
        sidecar.serves_until = None;
    }

    fn gap() -> admin::GoneSidecar {
        admin::GoneSidecar {
            node: "edge-9".to_owned(),
            cluster: String::new(),
            version: "0.1.0".to_owned(),
            run_id: "b2".to_owned(),
            keyrings: vec!["payments".to_owned(), "partners".to_owned()],
            complete_until: None,
            last_contact: Some(at(1_767_225_550)),
            until: Some(at(1_767_225_610)),
            forgotten: false,
        }
    }

    #[test]
    fn json_of_a_sidecar() {
        assert_eq!(
            serde_json::to_string(&FleetView::Sidecar(sidecar().into())).expect("serializable"),
            concat!(
                r#"{"node":"edge-3","cluster":"gateway","version":"0.1.0","run_id":"b1","labels":{"zone":"a"},"#,
                r#""connected":false,"connected_at":"2026-01-01T00:00:00.000Z","last_seen":"2026-01-01T00:00:06.000Z","#,
                r#""keyrings":[{"keyring":"payments","epoch":1,"applied_revision":16,"durable_revision":15,"#,
                r#""head_revision":18,"lag":2,"applied_at":"2026-01-01T00:00:02.000Z","#,
                r#""rejected":["key 0123456789ab: too long"],"missing":false}],"#,
                r#""complete_until":"2026-01-01T00:00:05.000Z","gap_until":null,"presence":"lost","#,
                r#""since":"2026-01-01T00:00:06.000Z","serves_until":"2026-01-01T01:00:06.000Z","snapshot_file":true}"#,
            )
        );
    }

    #[test]
    fn json_of_a_gap() {
        assert_eq!(
            serde_json::to_string(&FleetView::Gap(gap().into())).expect("serializable"),
            concat!(
                r#"{"node":"edge-9","cluster":"","version":"0.1.0","run_id":"b2","connected":false,"#,
                r#""last_seen":"2025-12-31T23:59:10.000Z","keyrings":[{"keyring":"payments"},{"keyring":"partners"}],"#,
                r#""complete_until":null,"gap_until":"2026-01-01T00:00:10.000Z","presence":"gone","forgotten":false}"#,
            )
        );
    }

    #[test]
    fn who_has_not_told_of_uses_is_named() {
        let now = Timestamp::from_millis(1_767_225_605_000);
        let at = |seconds: i64| Timestamp::from_millis(1_767_225_605_000 + seconds * 1_000);
        let view = SidecarView::from(sidecar());
        assert_eq!(view.lateness(now), None);
        assert_eq!(view.lateness(at(30)), None);
        assert_eq!(
            view.lateness(at(31)).as_deref(),
            Some("edge-3 has not reported the use of keys for 31s")
        );
        let silent = SidecarView {
            complete_until: None,
            ..view
        };
        assert_eq!(
            silent.lateness(now).as_deref(),
            Some("edge-3 has not reported the use of keys yet")
        );
        assert_eq!(
            GapView::from(gap()).note(),
            "edge-9 ended without its last report; its requests until 2026-01-01T00:00:10Z are not known"
        );
        let forgotten = admin::GoneSidecar {
            forgotten: true,
            ..gap()
        };
        assert_eq!(
            GapView::from(forgotten).note(),
            "edge-9 was forgotten; its requests until 2026-01-01T00:00:10Z are not known"
        );
    }

    #[test]
    fn a_line_names_the_lag_and_since_when() {
        let now = Timestamp::from_millis(1_767_225_610_000);
        let mut bare = sidecar();
        bare.node = "edge-4".to_owned();
        connect(&mut bare);
        bare.keyrings.clear();
        bare.complete_until = None;
        let mut stopped = sidecar();
        stopped.node = "edge-5".to_owned();
        stopped.presence = admin::Presence::Stopped as i32;
        let list = Listing(vec![
            FleetView::Sidecar(sidecar().into()),
            FleetView::Sidecar(bare.into()),
            FleetView::Sidecar(stopped.into()),
            FleetView::Gap(gap().into()),
        ]);
        assert_eq!(
            fits(list.render(now)),
            "NODE    STATUS          MAY SERVE  KEYRING   REVISION  LAG  SINCE   REPORTED\n\
             edge-3  lost 4s ago     for 59m    payments  16 of 18  2    8s ago  5s ago\n\
             edge-4  connected       -          -         -         -    -       never\n\
             edge-5  stopped 4s ago  for 59m    payments  16 of 18  2    8s ago  5s ago\n\
             edge-9  gone 1m ago     -          payments  -         -    -       never\n\
             edge-9  gone 1m ago     -          partners  -         -    -       never\n"
        );
    }

    #[test]
    fn a_keyring_that_does_not_exist_is_not_in_step() {
        let now = Timestamp::from_millis(1_767_225_610_000);
        let mut waiting = sidecar();
        connect(&mut waiting);
        let keyring = &mut waiting.keyrings[0];
        keyring.keyring = "paymnets".to_owned();
        keyring.missing = true;
        (keyring.applied_revision, keyring.head_revision) = (0, 0);
        let mut other = waiting.clone();
        other.node = "edge-4".to_owned();
        let sidecars = [waiting, other].map(SidecarView::from);
        assert_eq!(
            missing(&sidecars),
            [
                "edge-3 and edge-4 wait for keyring paymnets, which does not exist: create it with `relatch keyring create paymnets`, or correct `keyrings` in the sidecar's file"
            ]
        );
        let list = Listing(sidecars.map(FleetView::Sidecar).into());
        let json = serde_json::to_value(&list).expect("serializable");
        let keyring = &json[0]["keyrings"][0];
        assert_eq!(keyring["missing"], true);
        assert_eq!(keyring["lag"], serde_json::Value::Null);
        assert_eq!(
            fits(list.render(now)),
            "NODE    STATUS     MAY SERVE  KEYRING   REVISION         LAG  SINCE  REPORTED\n\
             edge-3  connected  -          paymnets  no such keyring  -    -      5s ago\n\
             edge-4  connected  -          paymnets  no such keyring  -    -      5s ago\n"
        );
    }

    #[test]
    fn refused_items_are_told() {
        assert_eq!(
            SidecarView::from(sidecar()).refused(),
            ["edge-3 refused items of payments: key 0123456789ab: too long"]
        );
    }
}
