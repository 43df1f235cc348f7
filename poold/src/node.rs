//! The part of the daemon that works for the pool once consensus is up: starts its tasks and collects its gRPC services.
//!
//! ```text
//!  run ─┬─ supervisor        VM processes of this host
//!       ├─ replica           block replica server (its loss is fatal)
//!       ├─ lease client      renews, passes deadlines on        ├─ leader duties
//!       ├─ reconcile         state → processes
//!       └─ images            state → image store
//! ```
//! Invariant: when the node stops, VM processes go on; the next daemon finds them.

use crate::{
    agent::{AgentApi, Agents, LocalFacts},
    api::{
        Principal, clusters::ClusterApi, consoles::ConsoleApi, events::EventApi, groups::GroupApi,
        images::ImageApi, migrations::MigrationApi, networks::NetworkApi, snapshots::SnapshotApi, status,
        support::SupportApi, tasks::TaskApi, users::UserApi, vms::VmApi, volumes::VolumeApi,
    },
    cli::MemoryProof,
    consensus::{Consensus, HostClients, ProposeError, ProposeMeta, ReadError},
    images::{self, ImageError, ImageStore},
    lease::{self, LeaderHandle, LeaseApi, LeaseClient},
    loans::Loans,
    metrics::{self, Sources},
    network::Networks,
    progress::ProgressBook,
    reconcile::{self, Executor},
    replica::{self, ReplicaError},
    supervisor::{self, Launch, Privilege, ProcessError, Supervisor},
    support::Reporter,
};
use pool_state::{Command, Outcome, PoolState, Timing};
use proto::{
    HostId,
    limits::GRPC_MESSAGE_BYTES_MAX,
    v1::{
        RequestMeta, agent_service_server::AgentServiceServer, cluster_service_server::ClusterServiceServer,
        console_service_server::ConsoleServiceServer, event_service_server::EventServiceServer,
        group_service_server::GroupServiceServer, image_service_server::ImageServiceServer,
        lease_service_server::LeaseServiceServer, migration_service_server::MigrationServiceServer,
        network_service_server::NetworkServiceServer, snapshot_service_server::SnapshotServiceServer,
        support_service_server::SupportServiceServer, task_service_server::TaskServiceServer,
        user_service_server::UserServiceServer, vm_service_server::VmServiceServer,
        volume_service_server::VolumeServiceServer,
    },
};
use std::{io, net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};
use tokio::{net::TcpListener, sync::oneshot, task::JoinSet};
use tokio_util::sync::CancellationToken;
use tonic::{Status, service::Routes};

/// How long a read for display waits for the leader before it shows what this host knows.
const FRESH_TIMEOUT: Duration = Duration::from_millis(750);

/// How long a read that decides something may take: an election fits in, and the client still waits for the answer.
const READ_TIMEOUT: Duration = Duration::from_secs(4);

/// How long an applied entry may take to be applied at this host too, before the answer goes out without it.
const CATCH_UP_TIMEOUT: Duration = Duration::from_secs(5);

/// Between two attempts to catch up with the pool.
const CATCH_UP_RETRY: Duration = Duration::from_millis(100);

/// How long the tasks may take to end at a shutdown.
const STOP_TIMEOUT: Duration = Duration::from_secs(5);

/// What the node works with; clones share it.
#[derive(Clone)]
pub struct NodeContext {
    /// This host.
    pub host: HostId,
    /// The data directory.
    pub data_dir: PathBuf,
    /// `IP:PORT`; its UDP side is the replica server's, its IP carries migrations.
    pub address: SocketAddr,
    /// Memory that VMs may use at this host.
    pub vm_memory_bytes: u64,
    /// The highest feature level that this host supports.
    pub feature_level: u32,
    /// How the memory of VMs that move away is proved.
    pub memory_proof: MemoryProof,
    /// The pool's state.
    pub consensus: Consensus,
    /// Channels to the other hosts.
    pub clients: HostClients,
    /// Volumes that are being filled or read for clients.
    pub loans: Loans,
    /// How far work on tasks is.
    pub progress: ProgressBook,
    /// Cancelled when the daemon shall end.
    pub shutdown: CancellationToken,
}

/// The node could not be started.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// VM processes can't be managed.
    #[error(transparent)]
    Processes(#[from] ProcessError),
    /// The image store can't be opened.
    #[error(transparent)]
    Images(#[from] ImageError),
    /// The block store can't be opened.
    #[error(transparent)]
    Replica(#[from] ReplicaError),
    /// A file of the system can't be read.
    #[error("{what}: {source}")]
    System {
        /// Which.
        what: &'static str,
        /// Why.
        source: io::Error,
    },
}

/// The node can't go on.
#[derive(Debug, thiserror::Error)]
pub enum NodeFailure {
    /// The block store stopped.
    #[error("the block store stopped: {0}")]
    Replica(ReplicaError),
    /// A task panicked.
    #[error("a task of the node panicked: {0}")]
    Panic(tokio::task::JoinError),
}

/// A report to the pool was not accepted.
#[derive(Debug, thiserror::Error)]
pub enum ReportError {
    /// Consensus said no, or nothing.
    #[error(transparent)]
    Propose(#[from] ProposeError),
    /// It was accepted, but this host lags behind.
    #[error("entry {index} is committed but not applied here yet")]
    Lagging {
        /// Its index.
        index: u64,
    },
}

impl NodeContext {
    /// The newest state that can be had soon: linearizable, or else what this host knows. Messages say its revision.
    pub async fn fresh(&self) -> Arc<PoolState> {
        match tokio::time::timeout(FRESH_TIMEOUT, self.consensus.read_linearizable()).await {
            Ok(Ok(state)) => state,
            Ok(Err(_)) | Err(_) => self.consensus.local(),
        }
    }

    /// The state with everything that was acknowledged before.
    ///
    /// # Errors
    /// No majority can be reached.
    pub async fn read(&self) -> Result<Arc<PoolState>, Status> {
        let read = tokio::time::timeout(READ_TIMEOUT, self.consensus.read_linearizable()).await;
        read.unwrap_or(Err(ReadError::NoQuorum)).map_err(status::read)
    }

    /// Waits until this host's state contains everything that was committed before now; false at a shutdown.
    ///
    /// A restarted daemon begins with an old state, and what it finds here (processes, replicas, images) may be newer:
    /// nothing may be ended or removed before it has caught up.
    pub async fn caught_up(&self) -> bool {
        loop {
            tokio::select! {
                state = self.consensus.read_linearizable() => match state {
                    Ok(state) if state.settings.is_initialised() => return true,
                    Ok(_) => {}
                    Err(error) => tracing::warn!(%error, "waiting for the pool's present state"),
                },
                () = self.shutdown.cancelled() => return false,
            }
            tokio::time::sleep(CATCH_UP_RETRY).await;
        }
    }

    /// The pool's timings. A host that has just joined first waits for a state that has them; none at a shutdown.
    pub async fn timing(&self) -> Option<Timing> {
        let mut states = self.consensus.watch();
        tokio::select! {
            state = states.wait_for(|state| state.settings.is_initialised()) => Some(state.ok()?.settings.timing),
            () = self.shutdown.cancelled() => None,
        }
    }

    /// Proposes a client's change. Returns its outcome and a state that contains it.
    ///
    /// # Errors
    /// As the pool decides, for the client.
    pub async fn change(
        &self,
        principal: &Principal,
        meta: Option<RequestMeta>,
        command: Command,
    ) -> Result<(Outcome, Arc<PoolState>), Status> {
        let request_id = meta.map(|meta| meta.request_id).filter(|id| !id.is_empty());
        let meta = ProposeMeta { request_id, principal: principal.to_string() };
        let (index, outcome) = self.consensus.propose(command, meta).await.map_err(status::proposed)?;
        let applied = self.applied(index).await;
        let state = applied.map_err(|error| Status::unavailable(format!("done, but not shown: {error}")))?;
        Ok((outcome, state))
    }

    /// Proposes a report of this host and waits until its effect is seen here.
    ///
    /// # Errors
    /// As the pool decides.
    pub async fn try_report(&self, command: Command) -> Result<(), ReportError> {
        let meta = ProposeMeta { request_id: None, principal: self.host.to_string() };
        let (index, _) = self.consensus.propose(command, meta).await?;
        self.applied(index).await?;
        Ok(())
    }

    /// Proposes a report of this host that will be made again if it is still true.
    pub async fn report(&self, command: Command) {
        tracing::debug!(?command, "proposing");
        log_report(self.try_report(command).await);
    }

    /// Proposes what this host decided as the leader of `term`, if it still is; it is decided again if it is still due.
    pub async fn decree(&self, term: u64, command: Command) {
        tracing::debug!(?command, term, "proposing as leader");
        let meta = ProposeMeta { request_id: None, principal: self.host.to_string() };
        let proposed = async {
            let (index, _) = self.consensus.propose_as_leader(term, command, meta).await?;
            self.applied(index).await?;
            Ok(())
        };
        log_report(proposed.await);
    }

    /// A local state that contains the entry.
    ///
    /// # Errors
    /// This host lags behind.
    pub async fn applied(&self, index: u64) -> Result<Arc<PoolState>, ReportError> {
        let mut states = self.consensus.watch();
        let seen = states.wait_for(|state| state.revision >= index);
        match tokio::time::timeout(CATCH_UP_TIMEOUT, seen).await {
            Ok(Ok(state)) => Ok(state.clone()),
            Ok(Err(_)) | Err(_) => Err(ReportError::Lagging { index }),
        }
    }
}

fn log_report(result: Result<(), ReportError>) {
    match result {
        Ok(()) => {}
        Err(ReportError::Propose(ProposeError::Rejected(rejection))) => {
            tracing::debug!(%rejection, "a proposal was rejected");
        }
        Err(error) => tracing::warn!(%error, "a proposal was not accepted"),
    }
}

/// The running node.
pub struct Node {
    /// Its gRPC services.
    pub routes: Routes,
    /// Tells when it can't go on.
    pub failed: oneshot::Receiver<NodeFailure>,
    /// Ages of the hosts' leases, as the leader knows them.
    pub leader: LeaderHandle,
    watcher: tokio::task::JoinHandle<()>,
}

impl Node {
    /// After the shutdown was asked for: waits until the tasks have ended.
    pub async fn stopped(self) {
        if tokio::time::timeout(STOP_TIMEOUT, self.watcher).await.is_err() {
            tracing::warn!("tasks of the node did not end in time");
        }
    }
}

/// How VM processes are started here. Says what an operator loses who runs the daemon without root.
fn launch(context: &NodeContext, binary: PathBuf) -> Launch {
    let privilege = Privilege::of_this_process();
    if privilege == Privilege::None {
        tracing::warn!(
            "poold is not root: VM processes run as its own user, with a filter of system calls and Landlock but without \
             a user and a root directory of their own, and VMs with networks do not start here"
        );
    }
    let replica_dir = reconcile::replica_dir(&context.data_dir);
    Launch { binary, replica_dir, privilege }
}

/// Starts the node. The host must be a member of the pool and consensus must run. Metrics are served where they are wanted.
///
/// # Errors
/// A store or a directory can't be used.
pub async fn run(context: NodeContext, metrics_port: Option<TcpListener>) -> Result<Node, NodeError> {
    let binary = supervisor::default_binary()
        .map_err(|source| NodeError::System { what: "the path of this executable", source })?;
    let boot_id = read_boot_id()?;
    let images = ImageStore::open(context.data_dir.join("images"))?;
    let replica = replica::start(&context, &boot_id).await?;
    let launch = launch(&context, binary);
    let networks = Networks::new(context.clone(), launch.privilege);
    let supervisor = Supervisor::open(context.data_dir.join("vms"), launch)?;
    let (leader, leader_queue) = LeaderHandle::new();
    let lease = LeaseClient::default();
    let facts = LocalFacts::new(replica.server(), supervisor.clone(), context.progress.clone());
    let agents = Agents::new(context.host, context.clients.clone(), supervisor.clone(), facts.clone());
    let executor =
        Executor::new(context.clone(), supervisor.clone(), images.clone(), lease.clone(), networks.clone());
    let sources = Sources { context: context.clone(), supervisor: supervisor.clone(), facts: facts.clone() };
    let reporter = Reporter::new(sources.clone());
    let routes = routes(&context, &supervisor, &images, (&agents, &facts, &reporter), &leader);

    let mut tasks = JoinSet::new();
    tasks.spawn(lease::run_leader(context.clone(), leader_queue));
    tasks.spawn(replica.duties(context.clone(), boot_id.clone()));
    let identity = lease::LeaseIdentity { boot_id, incarnation: replica.incarnation() };
    tasks.spawn(lease::run_client(context.clone(), supervisor.clone(), leader.clone(), lease, identity));
    tasks.spawn(reconcile::run(Arc::new(executor)));
    tasks.spawn(networks.run(supervisor.clone()));
    tasks.spawn(crate::facts::run(context.clone()));
    if let Some(listener) = metrics_port {
        tasks.spawn(metrics::serve(listener, sources, context.shutdown.clone()));
    }
    tasks.spawn(images::sync_task(context.clone(), images));
    let (failure, failed) = oneshot::channel();
    let watcher = tokio::spawn(watch(tasks, replica, failure, context.shutdown));
    Ok(Node { routes, failed, leader, watcher })
}

fn routes(
    context: &NodeContext,
    supervisor: &Supervisor,
    images: &ImageStore,
    (agents, facts, reporter): (&Agents, &LocalFacts, &Reporter),
    leader: &LeaderHandle,
) -> Routes {
    let (supervisor_too, reporter_too) = (supervisor.clone(), reporter.clone());
    let agent = AgentApi::new(context.host, supervisor_too, images.clone(), facts.clone(), reporter_too);
    let image = ImageApi::new(context.clone(), images.clone());
    let volumes = VolumeApi::new(context.clone(), supervisor.clone(), agents.clone());
    let volumes = VolumeServiceServer::new(volumes);
    Routes::new(VmServiceServer::new(VmApi::new(context.clone(), agents.clone())))
        .add_service(volumes.max_decoding_message_size(GRPC_MESSAGE_BYTES_MAX))
        .add_service(ImageServiceServer::new(image).max_decoding_message_size(GRPC_MESSAGE_BYTES_MAX))
        .add_service(MigrationServiceServer::new(MigrationApi::new(context.clone(), agents.clone())))
        .add_service(TaskServiceServer::new(TaskApi::new(context.clone(), agents.clone())))
        .add_service(EventServiceServer::new(EventApi::new(context.clone())))
        .add_service(SnapshotServiceServer::new(SnapshotApi::new(context.clone())))
        .add_service(GroupServiceServer::new(GroupApi::new(context.clone())))
        .add_service(ClusterServiceServer::new(ClusterApi::new(context.clone())))
        .add_service(NetworkServiceServer::new(NetworkApi::new(context.clone())))
        .add_service(SupportServiceServer::new(SupportApi::new(
            context.clone(),
            agents.clone(),
            reporter.clone(),
        )))
        .add_service(UserServiceServer::new(UserApi::new(context.clone())))
        .add_service(ConsoleServiceServer::new(ConsoleApi::new(context.clone(), agents.clone())))
        .add_service(AgentServiceServer::new(agent).max_decoding_message_size(GRPC_MESSAGE_BYTES_MAX))
        .add_service(LeaseServiceServer::new(LeaseApi::new(context.clone(), leader.clone())))
}

/// Waits for the end: asked for, or by a failure.
async fn watch(
    mut tasks: JoinSet<()>,
    replica: replica::Replica,
    failure: oneshot::Sender<NodeFailure>,
    shutdown: CancellationToken,
) {
    let mut stopped = None;
    loop {
        tokio::select! {
            error = replica.failed() => {
                stopped = Some(NodeFailure::Replica(error));
                break;
            }
            ended = tasks.join_next() => match ended {
                Some(Err(error)) => {
                    stopped = Some(NodeFailure::Panic(error));
                    break;
                }
                // Tasks end by themselves only at a shutdown.
                Some(Ok(())) => {}
                None => break,
            },
        }
    }
    if let Some(stopped) = stopped {
        // Nobody listens any more when the daemon is ending anyhow.
        let _ = failure.send(stopped);
        shutdown.cancel();
    }
    tasks.shutdown().await;
    replica.stop().await;
}

fn read_boot_id() -> Result<String, NodeError> {
    const PATH: &str = "/proc/sys/kernel/random/boot_id";
    let text = std::fs::read_to_string(PATH).map_err(|source| NodeError::System { what: PATH, source })?;
    Ok(text.trim().to_owned())
}
