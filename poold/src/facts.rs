//! What this host tells the pool of itself besides what its replica server announces: its logical CPUs, what its processor can
//! be to guests, and the version of its daemon with the feature level that it supports.

use crate::node::NodeContext;
use pool_state::{Command, command::Govern, state::Host};
use proto::HostCpu;

/// Proposes the facts once they differ from the state; ends when the state has them.
pub async fn run(context: NodeContext) {
    let cpus = std::thread::available_parallelism().map_or(0, |count| count.get());
    let cpus = u32::try_from(cpus).unwrap_or(u32::MAX);
    let cpu = vmm::host_cpu().unwrap_or_else(|error| {
        tracing::warn!(%error, "what guests could see of this host's processor is unknown");
        HostCpu::default()
    });
    let me = context.host;
    let mut states = context.consensus.watch();
    loop {
        let due = states.borrow_and_update().hosts.get(&me).map(|host| due(&context, host, cpus, &cpu));
        match due {
            Some(None) => return,
            Some(Some(fact)) => context.report(fact).await,
            None => {}
        }
        tokio::select! {
            changed = states.changed() => if changed.is_err() { return },
            () = context.shutdown.cancelled() => return,
        }
    }
}

/// The first fact that the state lacks.
fn due(context: &NodeContext, known: &Host, cpus: u32, cpu: &HostCpu) -> Option<Command> {
    let (host, version, feature_level) = (context.host, env!("CARGO_PKG_VERSION"), context.feature_level);
    if known.cpus != cpus {
        return Some(Command::SetHostCpus { host, cpus });
    }
    if known.cpu != *cpu {
        return Some(Command::SetHostCpu { host, cpu: *cpu });
    }
    let differs = (known.version.as_str(), known.feature_level) != (version, feature_level);
    let version = version.to_owned();
    differs.then_some(Command::Govern(Govern::SetHostVersion { host, version, feature_level }))
}
