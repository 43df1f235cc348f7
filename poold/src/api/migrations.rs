//! Service `MigrationService`.

use super::views;
use crate::{agent::Agents, api::require_user, node::NodeContext};
use futures::Stream;
use pool_state::{
    Command, Outcome, PoolState, Rejection,
    state::{Migration as MigrationState, MigrationOptions, MigrationPolicy, Vm},
};
use proto::{
    HostId, MigrationId, VmId,
    v1::{
        CancelMigrationRequest, ListMigrationsRequest, ListMigrationsResponse, Migration, MigrationPlan,
        MigrationRef, StartMigrationRequest, migration_service_server::MigrationService,
    },
};
use std::{pin::Pin, time::Duration};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

/// Between two records of a migration that is watched.
const PROGRESS_INTERVAL: Duration = Duration::from_millis(250);

/// How long the source may take to tell its progress before an answer goes out without it.
const PROGRESS_TIMEOUT: Duration = Duration::from_millis(400);

/// Updates ahead of a slow watcher.
const UPDATES_AHEAD: usize = 4;

/// gRPC service `MigrationService`.
pub struct MigrationApi {
    context: NodeContext,
    agents: Agents,
}

impl MigrationApi {
    /// The service of this host.
    pub fn new(context: NodeContext, agents: Agents) -> Self {
        Self { context, agents }
    }
}

/// What a request to move a VM means.
struct Move {
    vm: VmId,
    target: Option<HostId>,
    options: MigrationOptions,
}

fn read_move(state: &PoolState, request: &StartMigrationRequest) -> Result<Move, Status> {
    let policy = match request.policy.as_str() {
        "" | "default" => MigrationPolicy::Default,
        "gentle" => MigrationPolicy::Gentle,
        "post-copy" => MigrationPolicy::PostCopy,
        "must-finish" => MigrationPolicy::MustFinish,
        other => {
            let known = "gentle, default, post-copy or must-finish";
            return Err(Status::invalid_argument(format!("migration policy `{other}` is none of {known}")));
        }
    };
    let target = match request.target.as_str() {
        "" => None,
        host => Some(views::found(state.resolve_host(host))?.id),
    };
    let options = MigrationOptions {
        policy,
        bandwidth_bytes_per_s: request.bandwidth_bytes_per_s,
        downtime_ms: request.downtime_ms,
        // What does not fit in a byte is above the limit, too, and is refused as such.
        connections: u8::try_from(request.connections).unwrap_or(u8::MAX),
    };
    Ok(Move { vm: views::found(state.resolve_vm(&request.vm))?.id, target, options })
}

/// The migration with its live record while it runs.
async fn live_view(state: &PoolState, agents: &Agents, migration: &MigrationState) -> Migration {
    let mut view = views::migration(state, migration);
    if migration.is_under_way() && view.record.is_none() {
        let progress = agents.migration_progress(migration.source, migration.vm);
        view.record = tokio::time::timeout(PROGRESS_TIMEOUT, progress).await.ok().and_then(Result::ok);
    }
    view
}

/// Sends the migration at an interval and at its end.
async fn watch(
    context: NodeContext,
    agents: Agents,
    id: MigrationId,
    sender: mpsc::Sender<Result<Migration, Status>>,
) {
    let mut changes = context.consensus.watch();
    loop {
        let state = changes.borrow_and_update().clone();
        let migration = match views::found(state.migration(id)) {
            Ok(migration) => migration,
            Err(status) => {
                let _ = sender.send(Err(status)).await;
                return;
            }
        };
        let view = live_view(&state, &agents, migration).await;
        if sender.send(Ok(view)).await.is_err() || !migration.is_running() {
            return;
        }
        let (phase, outcome) = (migration.phase, migration.outcome);
        let moved = changes.wait_for(|state| {
            state.migrations.get(&id).is_none_or(|now| (now.phase, now.outcome) != (phase, outcome))
        });
        tokio::select! {
            moved = moved => if moved.is_err() { return },
            () = tokio::time::sleep(PROGRESS_INTERVAL) => {}
            () = sender.closed() => return,
            () = context.shutdown.cancelled() => return,
        }
    }
}

/// What a migration will be like.
#[derive(Debug, Default, PartialEq)]
struct Prediction {
    total_ms: f64,
    blackout_ms: f64,
    bytes_sent: u64,
}

/// As the last migration of the VM, or else the last one of the pool scaled to the VM's memory, but not faster than the link may
/// be used; zeroes when there was none.
fn predict(state: &PoolState, vm: &Vm, options: &MigrationOptions) -> Prediction {
    let ended = || state.migrations.values().rev().filter(|migration| migration.record.is_some());
    let like = ended().find(|migration| migration.vm == vm.id).or_else(|| ended().next());
    let Some((migration, record)) = like.and_then(|like| Some((like, like.record.as_ref()?))) else {
        return Prediction::default();
    };
    let before = state.vms.get(&migration.vm).map_or(vm.spec.memory.0, |vm| vm.spec.memory.0);
    let scale = vm.spec.memory.0 as f64 / before.max(1) as f64;
    let bytes_sent = (record.bytes_sent as f64 * scale) as u64;
    let least_ms = match options.bandwidth_bytes_per_s {
        0 => 0.0,
        limit => bytes_sent as f64 * 1e3 / limit as f64,
    };
    Prediction {
        total_ms: (record.total_ms * scale).max(least_ms),
        // It depends on the link and the guest's writes, not on the size.
        blackout_ms: record.blackout_ms,
        bytes_sent,
    }
}

/// A blocker with what to do about it.
fn blocker(rejection: &Rejection) -> String {
    format!("{rejection}; {}", rejection.remedy())
}

#[tonic::async_trait]
impl MigrationService for MigrationApi {
    type WatchStream = Pin<Box<dyn Stream<Item = Result<Migration, Status>> + Send>>;

    async fn start(&self, request: Request<StartMigrationRequest>) -> Result<Response<Migration>, Status> {
        let principal = require_user(&request)?;
        let mut request = request.into_inner();
        let meta = request.meta.take();
        let Move { vm, target, options } = read_move(&*self.context.read().await?, &request)?;
        let command = Command::StartMigration { vm, target, options };
        let (outcome, state) = self.context.change(&principal, meta, command).await?;
        let Outcome::Migration { migration, .. } = outcome else { return Err(views::unexpected(outcome)) };
        Ok(Response::new(views::migration(&state, views::found(state.migration(migration))?)))
    }

    async fn list(
        &self,
        request: Request<ListMigrationsRequest>,
    ) -> Result<Response<ListMigrationsResponse>, Status> {
        require_user(&request)?;
        let state = self.context.fresh().await;
        let migrations =
            state.migrations.values().map(|migration| views::migration(&state, migration)).collect();
        Ok(Response::new(ListMigrationsResponse { revision: state.revision, migrations }))
    }

    async fn show(&self, request: Request<MigrationRef>) -> Result<Response<Migration>, Status> {
        require_user(&request)?;
        let state = self.context.fresh().await;
        let migration = views::found(state.migration(MigrationId(request.get_ref().id)))?;
        Ok(Response::new(live_view(&state, &self.agents, migration).await))
    }

    async fn watch(&self, request: Request<MigrationRef>) -> Result<Response<Self::WatchStream>, Status> {
        require_user(&request)?;
        let id = MigrationId(request.get_ref().id);
        // Another host may have made it just now: the local state must be as new as that.
        views::found(self.context.fresh().await.migration(id))?;
        let (sender, receiver) = mpsc::channel(UPDATES_AHEAD);
        tokio::spawn(watch(self.context.clone(), self.agents.clone(), id, sender));
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn cancel(&self, request: Request<CancelMigrationRequest>) -> Result<Response<Migration>, Status> {
        let principal = require_user(&request)?;
        let CancelMigrationRequest { meta, id } = request.into_inner();
        let migration = MigrationId(id);
        let command = Command::CancelMigration { migration };
        let (_, state) = self.context.change(&principal, meta, command).await?;
        Ok(Response::new(views::migration(&state, views::found(state.migration(migration))?)))
    }

    async fn plan(&self, request: Request<StartMigrationRequest>) -> Result<Response<MigrationPlan>, Status> {
        require_user(&request)?;
        let state = self.context.read().await?;
        let Move { vm, target, options } = read_move(&state, request.get_ref())?;
        let mut blockers: Vec<String> = state.migration_blockers(vm, target).iter().map(blocker).collect();
        blockers.extend(state.option_blockers(vm, &options).into_iter().map(|it| blocker(&it.into())));
        let chosen = match target {
            Some(target) => Some(target),
            None => match state.migration_target(vm) {
                Ok(target) => Some(target),
                Err(rejection) => {
                    let text = blocker(&rejection);
                    if !blockers.contains(&text) {
                        blockers.push(text);
                    }
                    None
                }
            },
        };
        let vm = views::found(state.vm(vm))?;
        let prediction = predict(&state, vm, &options);
        let limits = vm.placement.zip(chosen).map(|(source, target)| state.check_moves(source, target));
        let waits_for = limits.into_iter().flatten().map(|limit| limit.to_string()).next();
        Ok(Response::new(MigrationPlan {
            vm: vm.name.clone(),
            source: vm.placement.map(|host| state.host_name(host)).unwrap_or_default(),
            target: chosen.map(|host| state.host_name(host)).unwrap_or_default(),
            blockers,
            memory_bytes: vm.spec.memory.0,
            predicted_ms: prediction.total_ms,
            predicted_blackout_ms: prediction.blackout_ms,
            predicted_bytes: prediction.bytes_sent,
            waits_for: waits_for.unwrap_or_default(),
        }))
    }
}
