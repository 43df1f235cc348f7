//! Does to the pool what a fault says, and undoes it.

use anyhow::{Context, Result};
use tests::process::Signal;
use tests::{Host, Pool};

use crate::plan::{Fault, Victim};

/// A fault that has struck and is to be undone.
#[derive(Debug)]
pub struct Struck {
    /// How long it lasts.
    pub away_ms: u64,
    /// The host whose daemon does not run meanwhile.
    pub daemon_away: Option<usize>,
    undo: Undo,
}

#[derive(Debug)]
enum Undo {
    Nothing,
    StartDaemon(usize),
    Continue(usize),
    ContinueDaemon(usize),
    Heal,
}

/// Strikes; `announce` is told the victim just before.
///
/// # Errors
/// When there is no such victim now, e.g. no leader; nothing was done then.
pub fn strike(pool: &Pool, vms: &[String], fault: Fault, announce: impl FnOnce(&str)) -> Result<Struck> {
    let victim = match fault {
        Fault::KillVm { vm } => {
            let process = pool.vm_process(&vms[vm])?;
            announce(&format!("vm {} (pid {}, epoch {})", vms[vm], process.process.pid, process.epoch));
            process.process.kill9()?;
            return Ok(Struck { away_ms: 0, daemon_away: None, undo: Undo::Nothing });
        }
        Fault::KillDaemon { victim, .. }
        | Fault::KillHost { victim, .. }
        | Fault::StopHost { victim, .. }
        | Fault::StopDaemon { victim, .. }
        | Fault::CutHost { victim, .. } => victim,
    };
    let host = find(pool, vms, victim)?;
    announce(&format!("host {}", host.name()));
    strike_host(pool, host, fault)
}

fn strike_host(pool: &Pool, host: &Host, fault: Fault) -> Result<Struck> {
    let index = host.index();
    let (away_ms, undo) = match fault {
        Fault::KillVm { .. } => (0, Undo::Nothing),
        Fault::KillDaemon { away_ms, .. } => {
            host.kill9_daemon()?;
            (away_ms, Undo::StartDaemon(index))
        }
        Fault::KillHost { away_ms, .. } => {
            host.kill9_host()?;
            (away_ms, Undo::StartDaemon(index))
        }
        Fault::StopHost { away_ms, .. } => {
            host.stop_all()?;
            (away_ms, Undo::Continue(index))
        }
        Fault::StopDaemon { away_ms, .. } => {
            host.daemon().context("its daemon does not run")?.signal(Signal::SIGSTOP)?;
            (away_ms, Undo::ContinueDaemon(index))
        }
        Fault::CutHost { away_ms, .. } => {
            let others: Vec<usize> = (0..pool.hosts().len()).filter(|&other| other != index).collect();
            pool.cut(&[&others, &[index]])?;
            (away_ms, Undo::Heal)
        }
    };
    let daemon_away = matches!(undo, Undo::StartDaemon(_)).then_some(index);
    Ok(Struck { away_ms, daemon_away, undo })
}

/// Undoes a fault.
///
/// # Errors
/// When a daemon can't be started or a link not be mended.
pub fn undo(pool: &Pool, struck: &Struck) -> Result<()> {
    match struck.undo {
        Undo::Nothing => Ok(()),
        Undo::StartDaemon(index) => pool.host(index).start_daemon(),
        Undo::Continue(index) => pool.host(index).cont_all(),
        Undo::ContinueDaemon(index) => {
            pool.host(index).daemon().map_or(Ok(()), |daemon| daemon.signal(Signal::SIGCONT))
        }
        Undo::Heal => pool.heal(),
    }
}

fn find<'a>(pool: &'a Pool, vms: &[String], victim: Victim) -> Result<&'a Host> {
    match victim {
        Victim::Host(index) => Ok(pool.host(index)),
        Victim::Leader => pool.leader(),
        Victim::HostOfVm(vm) => pool.host_named(&pool.vm_host(&vms[vm])?),
    }
}
