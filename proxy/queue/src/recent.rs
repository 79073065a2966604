//! Remembers the last settled leases, so that repeating a settle is harmless.

use std::collections::{HashSet, VecDeque};

use crate::backend::LeaseId;

/// How many are remembered. A settle is repeated at once or not at all; this covers the leases of a
/// busy dispatcher over that moment.
const REMEMBERED: usize = 1024;

/// The last settled leases, oldest out first.
#[derive(Debug, Default)]
pub(crate) struct RecentlySettled {
    order: VecDeque<LeaseId>,
    known: HashSet<LeaseId>,
}

impl RecentlySettled {
    pub(crate) fn remember(&mut self, lease: LeaseId) {
        if !self.known.insert(lease) {
            return;
        }
        self.order.push_back(lease);
        if self.order.len() > REMEMBERED
            && let Some(oldest) = self.order.pop_front()
        {
            self.known.remove(&oldest);
        }
    }

    pub(crate) fn contains(&self, lease: LeaseId) -> bool {
        self.known.contains(&lease)
    }
}
