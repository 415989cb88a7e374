//! `enforce` and `remove` of a keyring or a route, in the configuration file of a sidecar.

use serde_saphyr::Location;

use super::{
    reader::{Findings, Text},
    value,
};
use crate::authz::Enforcement;

/// The setting of the fields `enforce` and `remove`, whose names `field` completes; none if the file
/// gives neither. What is wrong is noted.
pub(super) fn enforcement(
    field: impl Fn(&str) -> String,
    enforce: Option<&Text>,
    remove: Option<&Text>,
    found: &mut Findings,
) -> Option<Enforcement> {
    let is_enforced = found.parse(field("enforce"), enforce, value::boolean);
    let removes = found.parse(field("remove"), remove, value::boolean);
    if enforce.is_none() || is_enforced == Some(true) {
        if removes.is_some() {
            let place = remove.map_or(Location::UNKNOWN, |text| text.referenced);
            found.note(
                place,
                field("remove"),
                "can be used only with `enforce: false`, remove it",
            );
        }
        return is_enforced.map(|_| Enforcement::Enforced);
    }
    Some(Enforcement::Observed {
        removes_credential: removes.unwrap_or(false),
    })
}
