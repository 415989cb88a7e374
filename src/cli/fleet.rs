//! `relatch fleet`: which sidecar has which revision, since when.

use std::collections::BTreeMap;

use clap::Args;
use serde::Serialize;

use super::{
    Session,
    connection::answer,
    failure::Failure,
    output::{Listing, Row},
    wire, words,
};
use crate::{
    key::{KeyringName, Timestamp},
    proto::admin,
};

/// The arguments of `fleet`.
#[derive(Debug, Args)]
pub struct FleetArgs {
    /// Only the sidecars that hold this keyring
    #[arg(long)]
    keyring: Option<KeyringName>,
}

#[derive(Debug, Serialize)]
struct SidecarView {
    node: String,
    cluster: String,
    version: String,
    boot_id: String,
    labels: BTreeMap<String, String>,
    connected: bool,
    connected_at: Option<Timestamp>,
    last_seen: Option<Timestamp>,
    keyrings: Vec<HeldKeyringView>,
}

#[derive(Debug, Serialize)]
struct HeldKeyringView {
    keyring: String,
    epoch: u64,
    applied_revision: u64,
    durable_revision: u64,
    head_revision: u64,
    /// How many revisions the sidecar is behind the head.
    lag: u64,
    /// Since when `applied_revision` is what it is.
    applied_at: Option<Timestamp>,
    /// Items that the sidecar refused, with the reason.
    rejected: Vec<String>,
}

impl FleetArgs {
    /// Runs the command.
    ///
    /// # Errors
    ///
    /// When the control plane cannot be reached or refuses.
    pub async fn run(self, session: &Session) -> Result<(), Failure> {
        let mut admin = session.admin().await?;
        let keyring = self.keyring.map(String::from).unwrap_or_default();
        let fleet = answer(admin.get_fleet(admin::GetFleetRequest { keyring })).await?;
        let sidecars: Vec<_> = fleet.sidecars.into_iter().map(SidecarView::from).collect();
        let refused: Vec<String> = sidecars.iter().flat_map(SidecarView::refused).collect();
        session.show(&Listing(sidecars))?;
        for refusal in refused {
            session.output.note(&refusal);
        }
        Ok(())
    }
}

impl SidecarView {
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

    fn connection(&self, now: Timestamp) -> String {
        match (self.connected, self.last_seen) {
            (true, _) => "yes".to_owned(),
            (false, Some(seen)) => format!("no, last seen {} ago", words::age(seen, now)),
            (false, None) => "no".to_owned(),
        }
    }
}

impl From<admin::Sidecar> for SidecarView {
    fn from(sidecar: admin::Sidecar) -> Self {
        Self {
            node: sidecar.node,
            cluster: sidecar.cluster,
            version: sidecar.version,
            boot_id: sidecar.boot_id,
            labels: sidecar.labels.into_iter().collect(),
            connected: sidecar.connected,
            connected_at: wire::timestamp(sidecar.connected_at),
            last_seen: wire::timestamp(sidecar.last_seen),
            keyrings: sidecar.keyrings.into_iter().map(Into::into).collect(),
        }
    }
}

impl From<admin::SidecarKeyring> for HeldKeyringView {
    fn from(held: admin::SidecarKeyring) -> Self {
        Self {
            lag: held.head_revision.saturating_sub(held.applied_revision),
            keyring: held.keyring,
            epoch: held.epoch,
            applied_revision: held.applied_revision,
            durable_revision: held.durable_revision,
            head_revision: held.head_revision,
            applied_at: wire::timestamp(held.applied_at),
            rejected: held.rejected,
        }
    }
}

/// A line for each keyring that the sidecar holds; one even where it holds none.
impl Row for SidecarView {
    const TITLES: &[&str] = &[
        "NODE",
        "CLUSTER",
        "VERSION",
        "CONNECTED",
        "KEYRING",
        "REVISION",
        "LAG",
        "SINCE",
    ];

    fn cells(&self, now: Timestamp) -> Vec<Vec<String>> {
        let sidecar = [
            self.node.clone(),
            words::or_nothing(&self.cluster),
            words::or_nothing(&self.version),
            self.connection(now),
        ];
        let row = |held: [String; 4]| [sidecar.as_slice(), held.as_slice()].concat();
        if self.keyrings.is_empty() {
            return vec![row([words::NOTHING; 4].map(str::to_owned))];
        }
        let keyrings = self.keyrings.iter();
        keyrings.map(|held| row(held.cells(now))).collect()
    }
}

impl HeldKeyringView {
    fn cells(&self, now: Timestamp) -> [String; 4] {
        let since = self
            .applied_at
            .map(|at| format!("{} ago", words::age(at, now)));
        [
            self.keyring.clone(),
            format!("{} of {}", self.applied_revision, self.head_revision),
            self.lag.to_string(),
            since.unwrap_or_else(|| words::NOTHING.to_owned()),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::{super::output::View, *};

    fn at(seconds: i64) -> prost_types::Timestamp {
        prost_types::Timestamp { seconds, nanos: 0 }
    }

    fn sidecar() -> admin::Sidecar {
        admin::Sidecar {
            node: "edge-3".to_owned(),
            cluster: "gateway".to_owned(),
            version: "0.1.0".to_owned(),
            boot_id: "b1".to_owned(),
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
            }],
        }
    }

    #[test]
    fn json_of_a_sidecar() {
        assert_eq!(
            serde_json::to_string(&SidecarView::from(sidecar())).expect("serializable"),
            concat!(
                r#"{"node":"edge-3","cluster":"gateway","version":"0.1.0","boot_id":"b1","labels":{"zone":"a"},"#,
                r#""connected":false,"connected_at":"2026-01-01T00:00:00.000Z","last_seen":"2026-01-01T00:00:06.000Z","#,
                r#""keyrings":[{"keyring":"payments","epoch":1,"applied_revision":16,"durable_revision":15,"#,
                r#""head_revision":18,"lag":2,"applied_at":"2026-01-01T00:00:02.000Z","#,
                r#""rejected":["key 0123456789ab: too long"]}]}"#,
            )
        );
    }

    #[test]
    fn a_line_names_the_lag_and_since_when() {
        let now = Timestamp::from_millis(1_767_225_610_000);
        let mut bare = sidecar();
        bare.node = "edge-4".to_owned();
        bare.connected = true;
        bare.keyrings.clear();
        let list = Listing(vec![sidecar().into(), SidecarView::from(bare)]);
        assert_eq!(
            list.render(now),
            "NODE    CLUSTER  VERSION  CONNECTED              KEYRING   REVISION  LAG  SINCE\n\
             edge-3  gateway  0.1.0    no, last seen 4 s ago  payments  16 of 18  2    8 s ago\n\
             edge-4  gateway  0.1.0    yes                    -         -         -    -\n"
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
