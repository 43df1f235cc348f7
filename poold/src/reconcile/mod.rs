//! Makes this host's VM processes what the pool's state wants: the executor of `pool_state::reconcile`.
//!
//! ```text
//!  applied state ─┐                                             ┌─▶ supervisor: spawn, destroy
//!  processes ─────┼─▶ pool_state::reconcile ─▶ Schedule ─▶ task ┼─▶ Machine: configure, start, pause, migrate, …
//!  time (≤ 1 s) ──┘        (pure)              (slots)     │    └─▶ consensus: reports
//!                 ▲                                        │
//!                 └──────────── finished ──────────────────┘
//! ```
//! - [`observe`]: a process's status as `pool_state` sees it.
//! - [`schedule`]: one action per process at a time, back-off after failures.
//! - [`execute`]: carries an action out.
//! - [`attach`]: what a process is given.
//! - [`services`]: the same for processes of volumes without a VM.
//! - [`follow`]: streams of migrations, so that no step of a blackout waits for a poll.
//!
//! Invariants: at most one action works on a process, except that ending it overtakes whatever hangs; every action may be
//! carried out twice. Nothing is remembered that a restarted daemon would miss. No pass is made on a state older than the
//! processes that are found: the first one waits for a linearizable read.

mod attach;
mod execute;
mod follow;
mod observe;
mod schedule;
mod services;
mod trace;

pub use attach::{replica_dir, replica_socket};
pub use execute::Executor;

use crate::clock::pool_ms;
use follow::Followers;
use pool_state::{PoolState, reconcile::HostAction};
use schedule::{Finish, Schedule, Ticket, Verdict};
use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::{sync::Notify, time::Instant};
use tracing::Instrument as _;

/// The longest time between two passes: what is wanted may change by the clock alone (back-off of a restart).
const PASS_INTERVAL: Duration = Duration::from_secs(1);

/// Runs until the node stops. VM processes stay as they are.
pub async fn run(executor: Arc<Executor>) {
    let context = executor.context().clone();
    if !context.caught_up().await {
        return;
    }
    let mut states = context.consensus.watch();
    let mut processes = executor.supervisor().changed();
    let schedule = Arc::new(Mutex::new(Schedule::default()));
    let finished = Arc::new(Notify::new());
    let mut followers = Followers::default();
    loop {
        let state = states.borrow_and_update().clone();
        processes.mark_unchanged();
        followers.keep(executor.supervisor());
        let next = pass(&executor, &state, &schedule, &finished);
        let wait = next.map_or(PASS_INTERVAL, |at| at.duration_since(Instant::now()).min(PASS_INTERVAL));
        tokio::select! {
            changed = states.changed() => if changed.is_err() { return },
            changed = processes.changed() => if changed.is_err() { return },
            () = finished.notified() => {}
            () = tokio::time::sleep(wait) => {}
            () = context.shutdown.cancelled() => return,
        }
    }
}

/// Starts every action that is wanted and may begin now. Returns when the next postponed one may.
fn pass(
    executor: &Arc<Executor>,
    state: &PoolState,
    schedule: &Arc<Mutex<Schedule>>,
    finished: &Arc<Notify>,
) -> Option<Instant> {
    executor.trim_kept(state);
    let (me, now_ms) = (executor.context().host, pool_ms());
    let observed = executor.observe();
    let mut actions = pool_state::reconcile::reconcile(state, me, now_ms, &observed);
    let services = executor.observe_services();
    let loans = executor.context().loans.keys();
    actions.extend(pool_state::reconcile::reconcile_services(state, me, now_ms, &services, &loans));
    actions.extend(pool_state::reconcile::reconcile_work(state, me));
    actions.extend(pool_state::reconcile::reconcile_scrubs(state, me, &executor.observe_scrubs()));
    // A guest stands still meanwhile; everything else can wait.
    actions.sort_by_key(|action| !is_in_blackout(action));
    let now = Instant::now();
    let mut earliest = None;
    for action in actions {
        let Some(slot) = schedule::slot_of(state, &action) else { continue };
        let verdict = lock(schedule).admit(now, slot, &action);
        match verdict {
            Verdict::Busy => {}
            Verdict::NotBefore(at) => {
                earliest = Some(earliest.map_or(at, |earliest: Instant| earliest.min(at)))
            }
            Verdict::Go(ticket) => {
                let (executor, finished) = (executor.clone(), finished.clone());
                let mut done = Done { schedule: schedule.clone(), ticket, result: Finish::Failed };
                let span = trace::span_of(state, &action);
                let work = async move {
                    match executor.execute(&action).await {
                        Ok(()) => {
                            match action {
                                HostAction::Report(_) | HostAction::UpdateVolumes { .. } => {
                                    tracing::debug!(?action, "carried out");
                                }
                                _ => tracing::info!(?action, "carried out"),
                            }
                            done.result = Finish::Succeeded;
                        }
                        Err(error) if error.is_overtaken() => {
                            tracing::debug!(?action, %error, "an action came too late");
                        }
                        Err(error) => {
                            tracing::warn!(?action, %error, "an action failed and will be tried again")
                        }
                    }
                    drop(done);
                    finished.notify_one();
                };
                let work = tokio::spawn(work.instrument(span));
                lock(schedule).attach(ticket, work.abort_handle());
            }
        }
    }
    lock(schedule).forget_old(now);
    earliest
}

/// Frees the slot of an action when it is over, also when it panicked.
struct Done {
    schedule: Arc<Mutex<Schedule>>,
    ticket: Ticket,
    result: Finish,
}

impl Drop for Done {
    fn drop(&mut self) {
        lock(&self.schedule).finish(Instant::now(), self.ticket, self.result);
    }
}

fn lock(schedule: &Mutex<Schedule>) -> MutexGuard<'_, Schedule> {
    // Each change is complete before the guard is dropped, also after a panic elsewhere.
    schedule.lock().unwrap_or_else(PoisonError::into_inner)
}

fn is_in_blackout(action: &HostAction) -> bool {
    matches!(
        action,
        HostAction::ProposeCommit { .. }
            | HostAction::ActivateIncoming { .. }
            | HostAction::ResumeAfterAbort { .. }
            | HostAction::TakeBack { .. }
    )
}
