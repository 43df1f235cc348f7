//! `poolctl pool`, `poolctl ha` and `poolctl balance`.

use super::{Session, govern};
use crate::{
    args::{BalanceCommand, HaCommand, PoolCommand},
    client::{call, new_meta},
    config::create_private,
    failure::{Exit, Failure},
    output::{Format, hint},
    view::{HaPlanView, HostView, PlannedMoveView, PoolView},
};
use proto::{
    ByteCount,
    v1::{
        BackupChunk, BackupRequest, BalancePlanRequest, BalanceRunRequest, HaArmRequest, HaPlanRequest,
        HaResumeRequest, ListHostsRequest, Pool, PoolShowRequest, host_service_client::HostServiceClient,
        pool_service_client::PoolServiceClient,
    },
};
use std::{io::Write as _, path::Path};

/// Runs a command of the pool.
///
/// # Errors
/// As the pool answers.
pub async fn run(command: PoolCommand, session: &mut Session) -> Result<(), Failure> {
    let command = match command {
        PoolCommand::Backup { file } => return backup(&file, session).await,
        PoolCommand::Set { settings } => return govern::set(settings, session).await,
        PoolCommand::Ca(command) => return govern::ca(command, session).await,
        command => command,
    };
    let pool = call!(session.client, PoolServiceClient, show, PoolShowRequest {}).await?;
    let (view, revision) = (PoolView::from(pool), 0);
    let for_people = matches!(session.output.format(), Format::Table | Format::Wide);
    match command {
        PoolCommand::Status if for_people => {
            let hosts = call!(session.client, HostServiceClient, list, ListHostsRequest {}).await?;
            let hosts: Vec<HostView> = hosts.hosts.into_iter().map(HostView::from).collect();
            session.output.list(revision, &[view])?;
            session.output.raw(b"\n")?;
            session.output.list(revision, &hosts)
        }
        _ => session.output.show(&view),
    }
}

/// Runs a command of recovery.
///
/// # Errors
/// As the pool answers.
pub async fn run_ha(command: HaCommand, session: &mut Session) -> Result<(), Failure> {
    let (pool, sentence) = match command {
        HaCommand::Plan { fail } => return ha_plan(fail, session).await,
        HaCommand::Resume => {
            let request = HaResumeRequest { meta: new_meta() };
            let pool = call!(session.client, PoolServiceClient, ha_resume, request).await?;
            (pool, "recovery of VMs is on")
        }
        HaCommand::Disarm => {
            (arm("disarmed", session).await?, "recovery of VMs is off until `poolctl ha arm`")
        }
        HaCommand::Arm => (arm("armed", session).await?, "recovery of VMs is armed"),
    };
    session.output.changed(&PoolView::from(pool), sentence)
}

async fn arm(mode: &str, session: &Session) -> Result<Pool, Failure> {
    let request = HaArmRequest { meta: new_meta(), mode: mode.to_owned() };
    call!(session.client, PoolServiceClient, ha_arm, request).await
}

async fn ha_plan(fail: u32, session: &mut Session) -> Result<(), Failure> {
    let plan = call!(session.client, PoolServiceClient, ha_plan, HaPlanRequest { fail }).await?;
    let view = HaPlanView::new(fail, plan);
    session.output.show(&view)?;
    match view.unplaced() {
        [] => Ok(()),
        vms => Err(Failure::new(
            Exit::Blocked,
            "NOT_ENOUGH_CAPACITY",
            "pool",
            format!("{} VMs would find no place", vms.len()),
        )
        .with_remedy("add a host, or stop VMs that need not run")),
    }
}

/// Runs a command of balance.
///
/// # Errors
/// As the pool answers, and when the task that is waited for fails.
pub async fn run_balance(command: BalanceCommand, session: &mut Session) -> Result<(), Failure> {
    match command {
        BalanceCommand::Plan => {
            let plan = call!(session.client, PoolServiceClient, balance_plan, BalancePlanRequest {}).await?;
            let views: Vec<PlannedMoveView> = plan.moves.into_iter().map(PlannedMoveView::from).collect();
            session.output.list(plan.revision, &views)
        }
        BalanceCommand::Run { detach } => {
            let request = BalanceRunRequest { meta: new_meta() };
            let task = call!(session.client, PoolServiceClient, balance_run, request).await?;
            super::end_of_pool_task(session, task, "the pool", "balancing", detach).await
        }
    }
}

/// Writes the state to a new file that only its owner can read: it holds the key of the pool's CA.
async fn backup(file: &Path, session: &mut Session) -> Result<(), Failure> {
    let object = file.display().to_string();
    let mut out = create_private(file).map_err(|error| Failure::local(&object, error))?;
    let mut stream = call!(session.client, PoolServiceClient, backup, BackupRequest {}).await?;
    let mut count = 0;
    loop {
        match stream.message().await {
            Ok(Some(BackupChunk { data })) => {
                out.write_all(&data).map_err(|error| Failure::local(&object, error))?;
                count += data.len() as u64;
            }
            Ok(None) => break,
            Err(status) => {
                // Half a backup is none.
                let _ = std::fs::remove_file(file);
                return Err(status.into());
            }
        }
    }
    out.sync_all().map_err(|error| Failure::local(&object, error))?;
    hint(&format!(
        "{object} written, {}; keep it as safe as the pool's CA: its key is in it",
        ByteCount(count)
    ));
    Ok(())
}
