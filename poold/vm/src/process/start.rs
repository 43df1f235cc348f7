//! Cold boot, the operator's pause, and the guest's own end.

use super::machine::{blocking, watch_guest, with_gate};
use super::phase::Phase;
use super::stop::call_off;
use super::{Event, Process};
use crate::fence::{SharedGate, lock};
use crate::gate::Hold;
use crate::request::{Refusal, Reply};
use crate::volumes::{DiskError, VolumeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;
use vmm::{BootConfig, GuestExit, Machine, MachineConfig, MachineError};

/// How long the volumes of a guest that has ended may take to come to rest. It asked for no more: what it flushed is safe.
const REST_TIMEOUT: Duration = Duration::from_secs(10);

/// The machine could not be started.
#[derive(Debug, thiserror::Error)]
pub(super) enum StartError {
    /// A volume.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// The VMM or the kernel image.
    #[error("{}", with_causes(.0))]
    Machine(#[from] MachineError),
}

/// The error and everything below it in one line.
fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        // Some errors print their source themselves.
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

impl Process {
    pub(super) fn start(&mut self, reply: Reply) {
        match &self.phase {
            Phase::Configured => {}
            // Asked again by a daemon that did not hear the first answer.
            Phase::Starting => return self.starters.push(reply),
            Phase::Live => return self.answer(reply, Ok(())),
            _ => return self.answer(reply, Err(self.wrong_state("Start"))),
        }
        match self.begin_start() {
            Ok(()) => {
                self.starters.push(reply);
                self.phase = Phase::Starting;
            }
            Err(refusal) => self.answer(reply, Err(refusal)),
        }
    }

    fn begin_start(&mut self) -> Result<(), Refusal> {
        let vm = self.vm("Start")?;
        let kernel = vm.spec.kernel.clone().ok_or_else(|| Refusal::Invalid {
            field: "kernel_path",
            problem: "is empty: this machine can only take in a migration".to_owned(),
        })?;
        let config = BootConfig { kernel, initrd: vm.spec.initrd.clone(), cmdline: vm.spec.cmdline.clone() };
        let blueprint = self.blueprint("Start")?;
        let (volumes, gate) = (vm.volumes.clone(), vm.gate.clone());
        let machine = async move {
            let build = move || {
                let machine = Machine::new(blueprint)?;
                machine.boot(&config)?;
                Ok(Arc::new(machine))
            };
            blocking("build the machine", build).await
        };
        self.spawn(async move { Event::Started(boot(volumes, gate, machine).await) });
        Ok(())
    }

    /// What the machine is built from, with somebody who waits for the guest's end.
    pub(super) fn blueprint(&self, action: &'static str) -> Result<MachineConfig, Refusal> {
        let failed = |error: io::Error| Refusal::Failed { action, cause: error.to_string() };
        let exits = watch_guest(self.events.clone()).map_err(failed)?;
        // The process keeps its own: an attempt that fails may be made again.
        let taps = self.taps.iter().map(OwnedFd::try_clone).collect::<io::Result<_>>().map_err(failed)?;
        Ok(self.vm(action)?.blueprint(self.console.clone(), exits, taps))
    }

    pub(super) fn started(&mut self, started: Result<Arc<Machine>, StartError>) {
        let done = match started {
            Ok(machine) => {
                if let Some(vm) = &mut self.vm {
                    vm.machine = Some(machine);
                }
                match &self.phase {
                    Phase::Starting => {
                        tracing::info!("booted");
                        self.phase = Phase::Live;
                        Ok(())
                    }
                    // Some guests are quick.
                    Phase::Stopped { .. } => Ok(()),
                    _ => Err(self.wrong_state("Start")),
                }
            }
            Err(error) => {
                tracing::error!(%error, "the machine does not start");
                let cause = error.to_string();
                if self.phase == Phase::Starting {
                    self.phase = Phase::Failed { error: cause.clone() };
                }
                Err(Refusal::Failed { action: "Start", cause })
            }
        };
        let starters = std::mem::take(&mut self.starters);
        self.answer_all(starters, &done);
    }

    pub(super) async fn pause(&mut self) -> Result<(), Refusal> {
        self.work_gate("Pause", |gate| gate.hold(Hold::Operator)).await
    }

    pub(super) async fn resume(&mut self) -> Result<(), Refusal> {
        self.work_gate("Resume", |gate| gate.release(Hold::Operator)).await
    }

    async fn work_gate(
        &mut self,
        action: &'static str,
        work: impl FnOnce(&mut crate::gate::RunGate<Machine>) -> Result<(), MachineError> + Send + 'static,
    ) -> Result<(), Refusal> {
        if self.phase != Phase::Live {
            return Err(self.wrong_state(action));
        }
        let gate = self.vm(action)?.gate.clone();
        let done = with_gate(&gate, work).await;
        done.map_err(|error| Refusal::Failed { action, cause: error.to_string() })
    }

    /// The guest has ended: its last writes go down before the daemon hears of it and removes the process.
    pub(super) fn guest_ended(&mut self, exit: GuestExit) {
        tracing::info!(?exit, "the guest has ended");
        let Some(vm) = &self.vm else { return };
        let volumes = vm.volumes.clone();
        let outgoing = self.source_handle();
        self.spawn(async move {
            call_off(outgoing).await;
            match tokio::time::timeout(REST_TIMEOUT, volumes.drain()).await {
                Ok(Ok(_)) => {}
                Ok(Err(error)) => {
                    tracing::warn!(%error, "the guest has ended before its volumes were at rest")
                }
                Err(_) => tracing::warn!("the volumes of the ended guest do not come to rest"),
            }
            Event::GuestRested(exit)
        });
    }

    pub(super) fn guest_rested(&mut self, exit: GuestExit) {
        // It may end before the news of its start or arrival has come here.
        if !matches!(self.phase, Phase::Live | Phase::Starting | Phase::Incoming) {
            return;
        }
        let (guest_exit, cause) = match exit {
            GuestExit::Poweroff => ("poweroff", String::new()),
            GuestExit::Reboot => ("reboot", String::new()),
            GuestExit::Crash { cause } => ("crash", cause),
        };
        self.phase = Phase::Stopped { guest_exit, cause };
    }
}

/// Takes over the volumes while the machine is built, then lets it run as far as the gate allows.
async fn boot(
    volumes: VolumeSet,
    gate: SharedGate<Machine>,
    machine: impl Future<Output = Result<Arc<Machine>, MachineError>>,
) -> Result<Arc<Machine>, StartError> {
    let ((), machine) =
        tokio::try_join!(async { volumes.recover().await.map_err(StartError::from) }, async {
            machine.await.map_err(StartError::from)
        },)?;
    let ours = machine.clone();
    let install = move || {
        let mut gate = lock(&gate);
        gate.install(ours)?;
        gate.release(Hold::Boot)
    };
    blocking("let the machine run", install).await?;
    Ok(machine)
}
