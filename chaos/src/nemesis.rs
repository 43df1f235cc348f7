//! Does to the pool what a fault says, and undoes it.

use anyhow::{Context, Result, bail};
use rand::SeedableRng;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use std::io::ErrorKind;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tests::process::Signal;
use tests::wait::wait_for;
use tests::{Host, Pool, VmProcess};

use crate::fault::{DiskPart, Fault, Kept, Victim};
use crate::injure;
use crate::observation::{Recorder, Seen};
use crate::pressure::{self, Squeezed};

/// What a daemon says when its disk has failed: below its block store, or below its Raft log.
const DISK_FAILED: [&str; 2] = ["the block store has failed", "the Raft log can't be made durable"];

/// How long it takes to end then.
const ENDS_WITHIN: Duration = Duration::from_secs(2);

/// A fault that has struck and is to be undone.
#[derive(Debug)]
pub struct Struck {
    /// How long it lasts.
    pub away_ms: u64,
    undo: Undo,
}

impl Struck {
    /// Whether the daemon of the host may not run meanwhile.
    #[must_use]
    pub fn takes_daemon(&self, host: usize) -> bool {
        match &self.undo {
            Undo::StartDaemons(hosts) => hosts.contains(&host),
            // A log that can't be made durable ends the daemon, as does a store that can't; so may the kernel, for want of memory.
            Undo::EmptyDisk { host: ill, .. } | Undo::HealDisk(ill) | Undo::Release { host: ill, .. } => {
                *ill == host
            }
            _ => false,
        }
    }
}

#[derive(Debug)]
enum Undo {
    Nothing,
    StartDaemons(Vec<usize>),
    Continue(usize),
    ContinueDaemon(usize),
    ContinueVm(VmProcess),
    Heal,
    EmptyDisk {
        host: usize,
        ballast: PathBuf,
    },
    LiftLimit(usize),
    LiftFilter(String),
    HealDisk(usize),
    /// Commands that end a fault of a daemon, if it still has it.
    Inject(usize, &'static str),
    Release {
        host: usize,
        squeezed: Squeezed,
    },
}

/// Strikes; `announce` is told the victim just before.
///
/// # Errors
/// When there is no such victim now, e.g. no leader; nothing was done then.
pub fn strike(pool: &Pool, vms: &[String], fault: Fault, announce: impl FnOnce(&str)) -> Result<Struck> {
    let undo = match fault {
        Fault::KillVm { vm } | Fault::StopVm { vm, .. } => {
            let process = pool.vm_process(&vms[vm])?;
            announce(&format!("vm {} (pid {}, epoch {})", vms[vm], process.process.pid, process.epoch));
            strike_vm(process, fault)?
        }
        Fault::ColdBoot { order, .. } => {
            announce("all hosts");
            cold_stop(pool, order, Host::kill9_host)?
        }
        Fault::CutAllPower { order, .. } => {
            announce("all hosts");
            cold_stop(pool, order, Host::cut_power)?
        }
        Fault::CutHalves { side, .. } => {
            let all = 0..pool.hosts().len();
            let (one, other): (Vec<usize>, Vec<usize>) = all.partition(|host| side >> host & 1 == 1);
            announce(&format!("hosts {one:?} from hosts {other:?} (by position)"));
            pool.cut(&[&other, &one])?;
            Undo::Heal
        }
        Fault::KillDaemon { victim, .. }
        | Fault::KillHost { victim, .. }
        | Fault::CutPower { victim, .. }
        | Fault::StopHost { victim, .. }
        | Fault::StopDaemon { victim, .. }
        | Fault::CutHost { victim, .. }
        | Fault::CutOneWay { victim, .. }
        | Fault::CutPair { victim, .. }
        | Fault::FillDisk { victim, .. }
        | Fault::SlowLink { victim, .. }
        | Fault::CutTraffic { victim, .. }
        | Fault::LosePackets { victim, .. }
        | Fault::FailDisk { victim, .. }
        | Fault::SlowSyncs { victim, .. }
        | Fault::ShiftClock { victim, .. }
        | Fault::DelayCalls { victim, .. }
        | Fault::RepeatCalls { victim, .. }
        | Fault::Squeeze { victim, .. }
        | Fault::FlipKept { victim, .. }
        | Fault::FlipBits { victim, .. } => {
            let host = find(pool, vms, victim)?;
            check_victim(pool, host, fault)?;
            announce(&format!("host {}", host.name()));
            strike_host(pool, host, fault)?
        }
    };
    Ok(Struck { away_ms: fault.away_ms(), undo })
}

fn strike_vm(process: VmProcess, fault: Fault) -> Result<Undo> {
    if matches!(fault, Fault::StopVm { .. }) {
        process.process.signal(Signal::SIGSTOP)?;
        return Ok(Undo::ContinueVm(process));
    }
    process.process.kill9()?;
    Ok(Undo::Nothing)
}

/// Every host at once, and the order in which they come back.
fn cold_stop(pool: &Pool, order: u64, stop: impl Fn(&Host) -> Result<()>) -> Result<Undo> {
    pool.hosts().iter().try_for_each(stop)?;
    let mut hosts: Vec<usize> = (0..pool.hosts().len()).collect();
    hosts.shuffle(&mut StdRng::seed_from_u64(order));
    Ok(Undo::StartDaemons(hosts))
}

/// Faults that would prove nothing, or too much, at this host now.
fn check_victim(pool: &Pool, host: &Host, fault: Fault) -> Result<()> {
    match fault {
        Fault::CutOneWay { to: other, .. } | Fault::CutPair { other, .. } if other == host.index() => {
            bail!("{} is not cut from itself", host.name())
        }
        Fault::FlipBits { .. } => injure::check_others_in_sync(pool, host),
        _ => Ok(()),
    }
}

fn strike_host(pool: &Pool, host: &Host, fault: Fault) -> Result<Undo> {
    let index = host.index();
    Ok(match fault {
        Fault::KillDaemon { .. } => {
            host.kill9_daemon()?;
            Undo::StartDaemons(vec![index])
        }
        Fault::KillHost { .. } => {
            host.kill9_host()?;
            Undo::StartDaemons(vec![index])
        }
        Fault::CutPower { .. } => {
            host.cut_power()?;
            Undo::StartDaemons(vec![index])
        }
        Fault::StopHost { .. } => {
            host.stop_all()?;
            Undo::Continue(index)
        }
        Fault::StopDaemon { .. } => {
            host.daemon().context("its daemon does not run")?.signal(Signal::SIGSTOP)?;
            Undo::ContinueDaemon(index)
        }
        Fault::CutHost { .. } => {
            let others: Vec<usize> = (0..pool.hosts().len()).filter(|&other| other != index).collect();
            pool.cut(&[&others, &[index]])?;
            Undo::Heal
        }
        Fault::CutOneWay { to, .. } => {
            pool.cut_one_way(index, to)?;
            Undo::Heal
        }
        Fault::CutPair { other, .. } => {
            pool.cut_one_way(index, other)?;
            pool.cut_one_way(other, index)?;
            Undo::Heal
        }
        Fault::FillDisk { .. } => {
            Undo::EmptyDisk { host: index, ballast: injure::fill_disk(host.data_dir())? }
        }
        Fault::SlowLink { kbit_per_s, .. } => {
            pool.limit_link(index, Some(kbit_per_s))?;
            Undo::LiftLimit(index)
        }
        Fault::CutTraffic { traffic, .. } => {
            let name = filter_name();
            pool.cut_traffic(index, traffic, &name)?;
            Undo::LiftFilter(name)
        }
        Fault::LosePackets { percent, .. } => {
            let name = filter_name();
            pool.lose_packets(index, percent, &name)?;
            Undo::LiftFilter(name)
        }
        Fault::FlipBits { bits, .. } => {
            injure::flip_bits(host.data_dir(), bits)?;
            Undo::Nothing
        }
        Fault::FlipKept { kept, bits, .. } => {
            if kept == Kept::Snapshot {
                injure::take_snapshot(host)?;
            }
            host.kill9_daemon()?;
            match kept {
                Kept::Log => injure::flip_bits_of_log(host.data_dir(), bits)?,
                Kept::Snapshot => injure::flip_bits_of_snapshot(host.data_dir(), bits)?,
            }
            Undo::StartDaemons(vec![index])
        }
        Fault::Squeeze { mebibytes, .. } => {
            Undo::Release { host: index, squeezed: pressure::squeeze(host, mebibytes)? }
        }
        Fault::FailDisk { .. }
        | Fault::SlowSyncs { .. }
        | Fault::ShiftClock { .. }
        | Fault::DelayCalls { .. }
        | Fault::RepeatCalls { .. } => tell_daemon(host, fault)?,
        Fault::KillVm { .. }
        | Fault::StopVm { .. }
        | Fault::ColdBoot { .. }
        | Fault::CutAllPower { .. }
        | Fault::CutHalves { .. } => unreachable!("strikes no single host"),
    })
}

/// Tells the daemon to have a fault.
fn tell_daemon(host: &Host, fault: Fault) -> Result<Undo> {
    let index = host.index();
    Ok(match fault {
        Fault::FailDisk { part, .. } => {
            let fault = match part {
                DiskPart::Reads => "disk fail-reads",
                DiskPart::Writes => "disk fail-writes",
                DiskPart::Syncs => "disk fail-syncs",
            };
            tell(host, fault)?;
            Undo::HealDisk(index)
        }
        Fault::SlowSyncs { delay_ms, .. } => {
            tell(host, &format!("disk sync-delay {delay_ms}"))?;
            Undo::Inject(index, "disk clear")
        }
        Fault::ShiftClock { seconds, .. } => {
            tell(host, &format!("clock {seconds}"))?;
            Undo::Inject(index, "clock clear")
        }
        Fault::DelayCalls { delay_ms, percent, .. } => {
            tell(host, &format!("calls delay {delay_ms} {percent}"))?;
            Undo::Inject(index, "calls clear")
        }
        Fault::RepeatCalls { later_ms, percent, .. } => {
            tell(host, &format!("calls duplicate {later_ms} {percent}"))?;
            Undo::Inject(index, "calls clear")
        }
        _ => unreachable!("daemons are told of no other fault"),
    })
}

/// Tells it. One that is stopped just now takes it when it goes on, after nobody waits for its answer any more: it counts as told, so that
/// what it will have is undone.
fn tell(host: &Host, fault: &str) -> Result<()> {
    let is_late = |error: &anyhow::Error| {
        let kind = error.downcast_ref::<std::io::Error>().map(std::io::Error::kind);
        matches!(kind, Some(ErrorKind::WouldBlock | ErrorKind::TimedOut))
    };
    match host.inject(fault) {
        Err(error) if is_late(&error) => Ok(()),
        told => told,
    }
}

/// A daemon that has met a disk's fault ends, and may be about to when the fault is over already.
fn let_it_end(host: &Host) {
    let tail = host.log_tail();
    if DISK_FAILED.iter().any(|said| tail.contains(said)) {
        // What it says may be from before its last start: then it lives.
        wait_for(ENDS_WITHIN, "the daemon ends", || Ok(host.daemon().is_none())).ok();
    }
}

/// Undoes a fault.
///
/// # Errors
/// When a daemon can't be started or a link not be mended.
pub fn undo(pool: &Pool, recorder: &Recorder, struck: &Struck) -> Result<()> {
    let start = |index: usize| {
        let host = pool.host(index);
        if host.daemon().is_some() || !host.is_member() { Ok(()) } else { host.start_daemon() }
    };
    match &struck.undo {
        Undo::Nothing => Ok(()),
        Undo::StartDaemons(hosts) => {
            hosts.iter().for_each(|&host| record_promises(pool.host(host), recorder));
            hosts.iter().copied().try_for_each(start)
        }
        Undo::Continue(index) => pool.host(*index).cont_all(),
        Undo::ContinueDaemon(index) => {
            pool.host(*index).daemon().map_or(Ok(()), |daemon| daemon.signal(Signal::SIGCONT))
        }
        Undo::ContinueVm(process) => process.process.signal(Signal::SIGCONT),
        Undo::Heal => pool.heal(),
        Undo::EmptyDisk { host, ballast } => {
            std::fs::remove_file(ballast).with_context(|| format!("remove {}", ballast.display()))?;
            start(*host)
        }
        Undo::LiftLimit(index) => pool.limit_link(*index, None),
        Undo::LiftFilter(name) => pool.lift_filter(name),
        Undo::HealDisk(index) => {
            end_injection(pool.host(*index), "disk clear");
            let_it_end(pool.host(*index));
            start(*index)
        }
        Undo::Inject(index, command) => {
            end_injection(pool.host(*index), command);
            Ok(())
        }
        Undo::Release { host, squeezed } => {
            pressure::release(squeezed)?;
            start(*host)
        }
    }
}

/// A daemon that has died or started anew meanwhile has no fault any more.
fn end_injection(host: &Host, command: &str) {
    host.inject(command).ok();
}

/// A name for what is lost in the network; several may be at a time.
fn filter_name() -> String {
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("lost{}", NEXT.fetch_add(1, Ordering::Relaxed))
}

/// Records which epochs a host that was away has on its disk as promised, before its daemon can change them.
fn record_promises(host: &Host, recorder: &Recorder) {
    let folder = host.data_dir().join("store/promises");
    let mut promises = Vec::new();
    for entry in std::fs::read_dir(folder).into_iter().flatten().flatten() {
        let volume =
            entry.file_name().to_str().and_then(|name| name.strip_prefix("vol-")?.parse::<u64>().ok());
        let content = std::fs::read_to_string(entry.path()).unwrap_or_default();
        let epoch = content.split_ascii_whitespace().next().and_then(|epoch| epoch.parse().ok());
        if let Some(volume) = volume {
            promises.push((volume, epoch.unwrap_or(0)));
        }
    }
    recorder.add(Seen::Promises { host: host.name().to_owned(), promises });
}

fn find<'a>(pool: &'a Pool, vms: &[String], victim: Victim) -> Result<&'a Host> {
    match victim {
        Victim::Host(index) => Ok(pool.host(index)),
        Victim::Leader => pool.leader(),
        Victim::HostOfVm(vm) => pool.host_named(&pool.vm_host(&vms[vm])?),
    }
}
