//! The pool's networks at this host: bridges, VLANs, NAT, and the taps of its VMs.
//!
//! ```text
//!  applied state ─▶ wanted ─┐
//!  kernel: links ─▶ seen ───┼─▶ plan (pure) ─▶ steps ─▶ kernel        again until nothing is left to do
//!  VM processes ─▶ taps ────┘
//! ```
//! - [`plan`]: what is to be done, from what is wanted and what is there.
//! - [`kernel`]: links and addresses by rtnetlink. [`nat`]: masquerading by nftables. [`tap`]: the ends of VMs' cables.
//!
//! Level-triggered: what an operator or a reboot takes away comes back, what the pool no longer wants goes. Links of ours carry
//! an alias that names pool and host; nothing without it is ever removed. A tap is opened here, put on its bridge, and then held
//! by the VM process alone: it goes with the process, whatever becomes of this daemon.

mod kernel;
mod nat;
mod plan;
mod tap;

pub use plan::Problem;
pub use tap::TapError;

use crate::{
    node::NodeContext,
    supervisor::{Privilege, ProcessKey, Supervisor},
};
use kernel::{Kernel, KernelError};
use nat::Nat;
use plan::{Ours, Wanted};
use pool_state::{PoolState, state::Vm};
use proto::NetworkId;
use std::{
    collections::BTreeMap,
    os::fd::OwnedFd,
    sync::{Arc, PoisonError},
    time::{Duration, Instant},
};
use tokio::sync::Mutex;

/// How long what somebody else changed stays so.
const PASS_INTERVAL: Duration = Duration::from_secs(3);

/// Passes in a row: a bridge is made, then found, then filled; more means that somebody undoes it at once.
const PASSES_MAX: usize = 6;

/// A network is not ready for a VM.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The host lacks something.
    #[error("network {network} is not ready at this host: {problem}")]
    NotReady {
        /// Which.
        network: String,
        /// What is missing and how to get it.
        problem: Problem,
    },
    /// The daemon may not.
    #[error("VMs with networks need poold to run as root: it makes taps and bridges")]
    NotRoot,
    /// The kernel.
    #[error(transparent)]
    Kernel(#[from] KernelError),
    /// A tap.
    #[error(transparent)]
    Tap(#[from] TapError),
}

struct Shared {
    context: NodeContext,
    privilege: Privilege,
    /// One pass at a time; what NAT was last set to.
    nat: Mutex<Nat>,
    /// What stood in the way last, by network.
    problems: std::sync::Mutex<BTreeMap<NetworkId, Problem>>,
}

/// Handle of this host's networks; clones share it.
#[derive(Clone)]
pub struct Networks {
    shared: Arc<Shared>,
}

impl Networks {
    /// The networks of this host; nothing is touched yet.
    pub fn new(context: NodeContext, privilege: Privilege) -> Self {
        let shared =
            Shared { context, privilege, nat: Mutex::default(), problems: std::sync::Mutex::default() };
        Self { shared: Arc::new(shared) }
    }

    /// Keeps the host as the pool wants it, until the node stops.
    pub async fn run(self, supervisor: Supervisor) {
        let context = self.shared.context.clone();
        if self.shared.privilege == Privilege::None || !context.caught_up().await {
            return;
        }
        let mut states = context.consensus.watch();
        let mut last: Option<(Wanted, Instant)> = None;
        loop {
            let state = states.borrow_and_update().clone();
            let keys: Vec<_> = supervisor.processes().iter().map(|process| process.key).collect();
            let wanted = Wanted::of(&state, &keys);
            let is_due = match &last {
                Some((known, at)) if *known == wanted => !wanted.is_empty() && at.elapsed() >= PASS_INTERVAL,
                _ => true,
            };
            if is_due {
                match self.converge(&state, &keys).await {
                    Ok(()) => last = Some((wanted, Instant::now())),
                    Err(error) => {
                        tracing::warn!(%error, "the networks of this host are not as the pool wants them");
                    }
                }
            }
            tokio::select! {
                changed = states.changed() => if changed.is_err() { return },
                () = tokio::time::sleep(PASS_INTERVAL) => {}
                () = context.shutdown.cancelled() => return,
            }
        }
    }

    /// Opens a tap for each card of the VM's process, on its bridge and unplugged.
    ///
    /// # Errors
    /// A network is not ready here, or the kernel refuses.
    pub async fn taps(
        &self,
        state: &PoolState,
        vm: &Vm,
        key: ProcessKey,
    ) -> Result<Vec<OwnedFd>, NetworkError> {
        if vm.spec.nics.is_empty() {
            return Ok(Vec::new());
        }
        if self.shared.privilege == Privilege::None {
            return Err(NetworkError::NotRoot);
        }
        // The bridges first, so that what is missing is said before anything is made.
        self.converge(state, &[]).await?;
        for nic in &vm.spec.nics {
            if let Some(problem) = self.problems().get(&nic.network) {
                let network = state.networks.get(&nic.network).map(|network| network.name.clone());
                let network = network.unwrap_or_else(|| nic.network.to_string());
                return Err(NetworkError::NotReady { network, problem: problem.clone() });
            }
        }
        let mut taps = Vec::new();
        for index in 0..vm.spec.nics.len() {
            taps.push(tap::open(&tap::name(key, index)?)?);
        }
        self.converge(state, &[key]).await?;
        Ok(taps)
    }

    /// Passes until nothing is left to do.
    async fn converge(&self, state: &PoolState, keys: &[ProcessKey]) -> Result<(), NetworkError> {
        let mut nat = self.shared.nat.lock().await;
        let ours = Ours { pool_id: state.settings.pool_id.clone(), host: self.shared.context.host };
        let wanted = Wanted::of(state, keys);
        let kernel = Kernel::connect()?;
        let mut planned = plan::plan(&ours, &wanted, &kernel.links().await?);
        for _ in 0..PASSES_MAX {
            if planned.steps.is_empty() {
                break;
            }
            let steps = std::mem::take(&mut planned.steps);
            for step in &steps {
                tracing::info!(?step, "network");
                // The next look says whether it is still needed: links come and go by themselves.
                if let Err(error) = kernel.carry_out(step).await {
                    tracing::debug!(?step, %error, "a step of the network failed");
                    planned.note_failure(step, &error.to_string());
                }
            }
            let failed = std::mem::take(&mut planned.problems);
            planned = plan::plan(&ours, &wanted, &kernel.links().await?);
            if !planned.steps.is_empty() {
                planned.problems.extend(failed);
            }
        }
        let nat_problems = nat.apply(&ours, &wanted).await;
        planned.problems.extend(nat_problems);
        self.note(state, planned.problems);
        Ok(())
    }

    /// Says what is new among the problems.
    fn note(&self, state: &PoolState, found: BTreeMap<NetworkId, Problem>) {
        let mut known = self.problems();
        for (network, problem) in &found {
            if known.get(network) != Some(problem) {
                let name = state.networks.get(network).map_or("?", |network| network.name.as_str());
                tracing::warn!(network = name, %problem, "a network is not ready at this host");
            }
        }
        *known = found;
    }

    fn problems(&self) -> std::sync::MutexGuard<'_, BTreeMap<NetworkId, Problem>> {
        // Replaced as a whole, so it is whole even after a panic elsewhere.
        self.shared.problems.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
