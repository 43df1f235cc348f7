//! `poold serve`: the daemon.

use super::{Failure, chain};
use crate::cli::MemoryProof;
use crate::config::HostConfig;
use crate::consensus::{Consensus, MembershipTask, StartOptions};
use crate::identity::{IdentityDir, IdentityTask, SharedIdentity};
use crate::node::{self, NodeContext};
use crate::server::{self, RunningServer, ServerOptions};
use nix::fcntl::{Flock, FlockArg};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use pool_state::PoolState;
use pool_state::state::HostState;
use std::fs::File;
use std::net::SocketAddr;
use std::path::Path;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

/// Runs the daemon until a signal or a fatal error.
pub async fn run(
    data: &Path,
    metrics: Option<SocketAddr>,
    memory_proof: Option<MemoryProof>,
) -> Result<(), Failure> {
    let failed = |error: &dyn std::error::Error| Failure::failed(chain(error));
    let config = HostConfig::load(data).map_err(|error| Failure::usage(chain(&error)))?.ok_or_else(|| {
        let data = data.display();
        Failure::blocked(format!("{data} belongs to no pool: run `poold init` or `poold join` with it first"))
    })?;
    let _lock = lock(data)?;
    raise_file_limit();
    let identity_dir = IdentityDir::open(data).map_err(|error| failed(&error))?;
    let identity = SharedIdentity::new(identity_dir.load().map_err(|error| failed(&error))?);
    // Bound before anything else is started: a taken port is the operator's most likely mistake.
    let listener = bind(config.listen).await?;
    let metrics_port = match metrics.or(config.metrics) {
        Some(address) => Some(bind(address).await?),
        None => None,
    };
    let options = StartOptions {
        data_dir: data,
        pool_id: &config.pool_id,
        host: config.host(),
        timing: config.timing.timing(),
        feature_level: config.feature_level(),
        identity: identity.clone(),
    };
    let consensus = Consensus::start(options).await.map_err(|error| match error.is_too_new() {
        true => Failure::blocked(chain(&error)),
        false => failed(&error),
    })?;
    let level = consensus.local().settings.feature_level;
    if level > config.feature_level() {
        consensus.shutdown().await;
        return Err(too_old(level, config.feature_level()));
    }
    if let Some(faults) = crate::faults::present() {
        tokio::spawn(take_snapshots(faults, consensus.clone()));
    }
    let shutdown = CancellationToken::new();
    let context = NodeContext {
        host: config.host(),
        data_dir: data.to_owned(),
        address: config.listen,
        vm_memory_bytes: config.vm_memory_bytes,
        feature_level: config.feature_level(),
        memory_proof: memory_proof.or(config.prove_memory).unwrap_or_default(),
        consensus: consensus.clone(),
        clients: consensus.clients(),
        loans: crate::loans::Loans::default(),
        progress: crate::progress::ProgressBook::default(),
        shutdown: shutdown.clone(),
    };
    let mut node = node::run(context, metrics_port).await.map_err(|error| failed(&error))?;
    let membership = tokio::spawn(MembershipTask::new(consensus.clone()).run(shutdown.clone()));
    let routes = std::mem::take(&mut node.routes);
    let leader = node.leader.clone();
    let keeper = IdentityTask { consensus: consensus.clone(), dir: identity_dir, identity: identity.clone() };
    tokio::spawn(keeper.run(shutdown.clone()));
    let options = ServerOptions { listener, identity, consensus: consensus.clone(), leader, routes };
    let mut server = server::spawn(options, shutdown.clone()).map_err(|error| failed(&error))?;
    tokio::spawn(tell_removal(consensus.clone(), shutdown.clone()));
    tracing::info!(host = %config.host(), address = %config.listen, "serving");
    let outcome = wait(&consensus, &mut node, &mut server, config.feature_level()).await;
    shutdown.cancel();
    node.stopped().await;
    server.stopped().await;
    if let Err(error) = membership.await {
        tracing::warn!(%error, "the membership task ended badly");
    }
    consensus.shutdown().await;
    outcome
}

/// Makes snapshots of the state when a campaign asks for them.
async fn take_snapshots(faults: std::sync::Arc<crate::faults::Faults>, consensus: Consensus) {
    loop {
        faults.snapshot.notified().await;
        consensus.take_snapshot().await;
    }
}

async fn bind(address: SocketAddr) -> Result<TcpListener, Failure> {
    let bound = TcpListener::bind(address).await;
    bound.map_err(|error| Failure::blocked(format!("TCP {address} can't be bound: {error}")))
}

/// Resolves with the pool's feature level if that is beyond what this host supports: it must not act on a state that it does not
/// understand. Happens to a host that was set back to an older version while it was off.
async fn beyond(consensus: &Consensus, supported: u32) -> u32 {
    let mut states = consensus.watch();
    match states.wait_for(|state| state.settings.feature_level > supported).await {
        Ok(state) => state.settings.feature_level,
        // The state is gone with consensus, whose failure is waited for too.
        Err(_) => std::future::pending().await,
    }
}

fn too_old(level: u32, supported: u32) -> Failure {
    Failure::blocked(format!(
        "the pool is at feature level {level}, and this host supports {supported} at most: install a newer poold, or take \
         `feature_level_max` out of poold.toml"
    ))
}

/// Waits for a signal (a good end) or a fatal error.
async fn wait(
    consensus: &Consensus,
    node: &mut node::Node,
    server: &mut RunningServer,
    supported: u32,
) -> Result<(), Failure> {
    let signals = |kind| signal(kind).map_err(|error| Failure::failed(format!("signals: {error}")));
    let mut terminate = signals(SignalKind::terminate())?;
    let mut interrupt = signals(SignalKind::interrupt())?;
    tokio::select! {
        // The node and consensus know why; the server may merely follow them.
        biased;
        level = beyond(consensus, supported) => Err(too_old(level, supported)),
        failure = &mut node.failed => Err(Failure::failed(match failure {
            Ok(failure) => chain(&failure),
            Err(_) => "the node's tasks have ended".to_owned(),
        })),
        cause = consensus.failed() => Err(Failure::failed(format!("consensus has stopped: {cause}"))),
        error = server.failed() => Err(Failure::failed(chain(&error))),
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
    }
}

/// Tells the operator of a host that was taken out why nothing happens there any more. The daemon goes on: VM processes that
/// are still here have to be ended.
async fn tell_removal(consensus: Consensus, shutdown: CancellationToken) {
    let me = consensus.host_id();
    let mut states = consensus.watch();
    let removed = |state: &std::sync::Arc<PoolState>| {
        state.hosts.get(&me).is_some_and(|host| host.state == HostState::Removed)
    };
    tokio::select! {
        seen = states.wait_for(removed) => if seen.is_ok() {
            tracing::error!(
                host = %me,
                "this host was removed from the pool; stop poold here, and join again with an empty folder if you want it back"
            );
        },
        () = shutdown.cancelled() => {}
    }
}

/// Takes as many file descriptors as the system gives: connections, segments of volumes and VM processes need some each.
fn raise_file_limit() {
    let raised = getrlimit(Resource::RLIMIT_NOFILE)
        .and_then(|(_, hard)| setrlimit(Resource::RLIMIT_NOFILE, hard, hard));
    if let Err(error) = raised {
        tracing::warn!(%error, "the limit of open files could not be raised");
    }
}

/// One daemon per data folder.
pub fn lock(data: &Path) -> Result<Flock<File>, Failure> {
    let path = data.join("lock");
    let file =
        File::create(&path).map_err(|error| Failure::failed(format!("{}: {error}", path.display())))?;
    Flock::lock(file, FlockArg::LockExclusiveNonblock).map_err(|(_, error)| {
        Failure::blocked(format!("another poold already serves {} ({error})", data.display()))
    })
}
