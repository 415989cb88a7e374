//! Lookups that are refused.

/// Why a check is not let wait for a lookup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Refusal {
    /// There is no stream to a control plane.
    Offline,
    /// Too many lookups came to nothing lately.
    OverBudget,
    /// Too many checks wait already, or too many lookups are under way.
    Crowded,
}

impl Refusal {
    /// Every reason, in the order of their numbers.
    pub(crate) const ALL: [Self; 3] = [Self::Offline, Self::OverBudget, Self::Crowded];

    /// Its name in metrics.
    #[must_use]
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Offline => "offline",
            Self::OverBudget => "over_budget",
            Self::Crowded => "crowded",
        }
    }
}
