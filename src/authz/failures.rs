//! The limit on failed credentials: each source may present only a limited rate of malformed or
//! unknown keys.

use std::{
    hash::{BuildHasher as _, RandomState},
    net::{IpAddr, Ipv6Addr},
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
};

use super::settings::Enforcement;
use crate::{
    budget::{Budget, Rate},
    clock::BootTime,
};

/// The budgets of the requests that are enforced, and of those in a trial: a trial does not spend
/// the budgets of others.
#[derive(Debug)]
pub(super) struct Failures {
    rate: Rate,
    enforced: FailureBudgets,
    /// Created with the first trial.
    observed: OnceLock<FailureBudgets>,
}

/// A budget for each source, which is the address of a client: an IPv4 address, or an IPv6 network of 64 bits, because one machine
/// can have all its addresses.
///
/// Sources with the same cell share its budget. So the memory is bounded, however many sources
/// there are. Nobody can choose with whom to share, because the cell of a source is different in
/// every process.
#[derive(Debug)]
pub(super) struct FailureBudgets {
    hasher: RandomState,
    cells: Box<[Mutex<Budget>]>,
}

/// The number of cells. At 40 bytes for each, they occupy 160 KiB.
const CELLS: usize = 4096;
/// The length of the network part of an IPv6 address, in bits.
const NETWORK_BITS: u32 = 64;

impl Failures {
    pub(super) fn new(rate: Rate) -> Self {
        Self {
            rate,
            enforced: FailureBudgets::new(rate),
            observed: OnceLock::new(),
        }
    }

    /// Returns the budgets of requests with this enforcement.
    pub(super) fn of(&self, enforcement: Enforcement) -> &FailureBudgets {
        match enforcement {
            Enforcement::Enforced => &self.enforced,
            Enforcement::Observed { .. } => {
                self.observed.get_or_init(|| FailureBudgets::new(self.rate))
            }
        }
    }
}

impl FailureBudgets {
    pub(super) fn new(rate: Rate) -> Self {
        Self {
            hasher: RandomState::new(),
            cells: (0..CELLS).map(|_| Mutex::new(Budget::new(rate))).collect(),
        }
    }

    /// Charges `source` with a failed credential; false if its budget is spent.
    pub(super) fn take(&self, source: IpAddr, now: BootTime) -> bool {
        self.cell(source).take(now)
    }

    /// Returns whether the budget of `source` is spent: its next failed credential is one too many.
    pub(super) fn is_spent(&self, source: IpAddr, now: BootTime) -> bool {
        self.cell(source).is_spent(now)
    }

    fn cell(&self, source: IpAddr) -> MutexGuard<'_, Budget> {
        let hash = self.hasher.hash_one(network(source));
        let cell = usize::try_from(hash).unwrap_or(0) % CELLS;
        // A budget stays consistent even if a thread that holds it panics.
        self.cells[cell]
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Returns the address or network that has one budget. An IPv4-mapped IPv6 address counts as the
/// IPv4 address.
fn network(source: IpAddr) -> IpAddr {
    match source.to_canonical() {
        IpAddr::V4(address) => address.into(),
        IpAddr::V6(address) => {
            let network = address.to_bits() >> NETWORK_BITS << NETWORK_BITS;
            Ipv6Addr::from_bits(network).into()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const RATE: Rate = Rate {
        per_second: 1,
        burst: 2,
    };
    const NOW: BootTime = BootTime::from_millis(1_000);
    const LATER: BootTime = BootTime::from_millis(2_000);

    fn ip(text: &str) -> IpAddr {
        text.parse().expect("an address")
    }

    #[test]
    fn each_source_has_a_budget_of_its_own() {
        let budgets = FailureBudgets::new(RATE);
        let (one, other) = (ip("192.0.2.1"), ip("192.0.2.2"));
        // In one process of 4,096 both have the same cell.
        if budgets.hasher.hash_one(one) % 4096 == budgets.hasher.hash_one(other) % 4096 {
            return each_source_has_a_budget_of_its_own();
        }
        assert!(!budgets.is_spent(one, NOW));
        let taken = [(); 4].map(|()| budgets.take(one, NOW));
        assert_eq!(taken, [true, true, false, false]);
        assert!(budgets.is_spent(one, NOW));
        assert!(budgets.take(other, NOW));
        assert!(budgets.take(one, LATER));
    }

    #[test]
    fn a_source_does_not_multiply_by_its_addresses() {
        for (one, same, other) in [
            ("2001:db8::1", "2001:db8::ffff:2", "2001:db8:0:1::1"),
            ("192.0.2.1", "::ffff:192.0.2.1", "192.0.2.2"),
        ] {
            assert_eq!(network(ip(one)), network(ip(same)));
            assert_ne!(network(ip(one)), network(ip(other)));
        }
    }
}
