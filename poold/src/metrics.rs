//! Prometheus metrics and `/healthz` on a port of their own, in plain HTTP: for scrapers and load balancers on the management
//! network, which have no certificate. Nothing here changes anything, and nothing secret is shown.
//!
//! Every metric is listed in `docs/metrics.md`; a test keeps the two equal.

mod http;
mod render;
mod volumes;

pub use http::serve;

use crate::agent::LocalFacts;
use crate::node::NodeContext;
use crate::supervisor::Supervisor;

/// What the metrics are read from.
#[derive(Clone)]
pub struct Sources {
    /// The node.
    pub context: NodeContext,
    /// Its VM processes.
    pub supervisor: Supervisor,
    /// What it knows of volumes.
    pub facts: LocalFacts,
}

/// Whether this host does its part.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    /// It does.
    Serving,
    /// It does not, and why.
    Failing(&'static str),
}

impl Sources {
    /// What `/healthz` says.
    #[must_use]
    pub fn health(&self) -> Health {
        let consensus = &self.context.consensus;
        if consensus.is_removed(self.context.host) {
            Health::Failing("this host was removed from the pool")
        } else if consensus.leader().is_none() {
            Health::Failing("no leader: there may be no majority")
        } else if !consensus.local().settings.is_initialised() {
            Health::Failing("this host has not caught up with the pool yet")
        } else {
            Health::Serving
        }
    }

    /// All metrics.
    #[must_use]
    pub fn text(&self) -> String {
        render::render(&self.observe())
    }

    /// Clients of the volumes that are served here, and connections that were refused.
    fn nbd_counts(&self) -> (u64, u64) {
        let statuses = self.supervisor.processes().into_iter().filter_map(|process| process.status);
        let served: Vec<_> = statuses.filter_map(|status| status.nbd).collect();
        let clients = served.iter().map(|nbd| u64::from(nbd.connections)).sum();
        (clients, served.iter().map(|nbd| nbd.refused).sum())
    }

    fn observe(&self) -> render::Observation {
        let consensus = &self.context.consensus;
        render::Observation {
            state: consensus.local(),
            host: self.context.host,
            leads: consensus.is_leader(),
            has_leader: consensus.leader().is_some(),
            voters: consensus.voters().len(),
            term: consensus.term(),
            vm_processes: self.supervisor.processes().len(),
            resident_bytes: resident_bytes(),
            facts: self.facts.now(),
            nbd: self.nbd_counts(),
        }
    }
}

/// Memory of this daemon in bytes; 0: the system does not say.
fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap_or_default();
    let pages = statm.split_whitespace().nth(1).and_then(|pages| pages.parse::<u64>().ok());
    // SAFETY: `sysconf` has no preconditions and touches no memory of ours.
    let page = unsafe { libc::sysconf(libc::_SC_PAGESIZE) };
    pages.unwrap_or(0).saturating_mul(u64::try_from(page).unwrap_or(0))
}
