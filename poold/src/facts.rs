//! What this host tells the pool of itself besides what its replica server announces: its logical CPUs.

use crate::node::NodeContext;
use pool_state::Command;

/// Proposes the facts once they differ from the state; ends when the state has them.
pub async fn run(context: NodeContext) {
    let cpus = std::thread::available_parallelism().map_or(0, |count| count.get());
    let cpus = u32::try_from(cpus).unwrap_or(u32::MAX);
    let me = context.host;
    let mut states = context.consensus.watch();
    loop {
        let known = states.borrow_and_update().hosts.get(&me).map(|host| host.cpus);
        match known {
            Some(known) if known == cpus => return,
            Some(_) => context.report(Command::SetHostCpus { host: me, cpus }).await,
            None => {}
        }
        tokio::select! {
            changed = states.changed() => if changed.is_err() { return },
            () = context.shutdown.cancelled() => return,
        }
    }
}
