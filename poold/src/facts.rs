//! What this host tells the pool of itself besides what its replica server announces: its logical CPUs, what its processor can
//! be to guests, the memory that its kernel keeps in huge pages, and the version of its daemon with the feature level that it
//! supports.

use crate::node::NodeContext;
use pool_state::{Command, command::Govern, features::Feature, state::Host};
use proto::{ByteCount, HostCpu};
use std::time::Duration;

/// Between two looks at what an operator may change while the daemon runs.
const LOOK_INTERVAL: Duration = Duration::from_secs(3);

/// What does not change while the daemon runs.
struct Fixed {
    cpus: u32,
    cpu: HostCpu,
}

/// Proposes each fact once it differs from the state.
pub async fn run(context: NodeContext) {
    let cpus = std::thread::available_parallelism().map_or(0, |count| count.get());
    let cpu = vmm::host_cpu().unwrap_or_else(|error| {
        tracing::warn!(%error, "what guests could see of this host's processor is unknown");
        HostCpu::default()
    });
    let fixed = Fixed { cpus: u32::try_from(cpus).unwrap_or(u32::MAX), cpu };
    let me = context.host;
    let mut states = context.consensus.watch();
    let mut looks = tokio::time::interval(LOOK_INTERVAL);
    loop {
        let state = states.borrow_and_update().clone();
        let has_huge_pages = state.has_feature(Feature::HugePages);
        let known = state.hosts.get(&me);
        let due = known.and_then(|host| {
            let huge = || huge_memory_due(host);
            due(&context, host, &fixed).or_else(|| has_huge_pages.then(huge).flatten())
        });
        let is_settled = known.is_some() && due.is_none();
        if let Some(fact) = due {
            context.report(fact).await;
        }
        tokio::select! {
            changed = states.changed(), if !is_settled => if changed.is_err() { return },
            _ = looks.tick() => {}
            () = context.shutdown.cancelled() => return,
        }
    }
}

/// The first fact that the state lacks.
fn due(context: &NodeContext, known: &Host, Fixed { cpus, cpu }: &Fixed) -> Option<Command> {
    let (host, version, feature_level) = (context.host, env!("CARGO_PKG_VERSION"), context.feature_level);
    if known.cpus != *cpus {
        return Some(Command::SetHostCpus { host, cpus: *cpus });
    }
    if known.cpu != *cpu {
        return Some(Command::SetHostCpu { host, cpu: *cpu });
    }
    let differs = (known.version.as_str(), known.feature_level) != (version, feature_level);
    let version = version.to_owned();
    differs.then_some(Command::Govern(Govern::SetHostVersion { host, version, feature_level }))
}

fn huge_memory_due(known: &Host) -> Option<Command> {
    let memory: ByteCount = vmm::huge_memory().total;
    (known.huge_memory != memory).then_some(Command::SetHostHugeMemory { host: known.id, memory })
}
