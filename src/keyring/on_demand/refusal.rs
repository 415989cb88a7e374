//! The reasons for which a check may not wait for a lookup.

/// Why a check may not wait for a lookup.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LookupRefusal {
    /// No stream to a control plane is open.
    Offline,
    /// The budget for lookups of keys that do not exist is spent.
    OverBudget,
    /// 4,096 checks already wait, or 4,096 lookups are already in progress.
    Crowded,
}

impl LookupRefusal {
    /// Every reason, in the order of their numbers.
    pub(crate) const ALL: [Self; 3] = [Self::Offline, Self::OverBudget, Self::Crowded];

    /// Returns its name in metrics.
    #[must_use]
    pub(crate) const fn as_str(self) -> &'static str {
        match self {
            Self::Offline => "offline",
            Self::OverBudget => "over_budget",
            Self::Crowded => "crowded",
        }
    }
}
