//! Taking the machine down and ending the process.
//!
//! ```text
//!  power button, again and again ──guest has ended──▶ at rest ──▶ the process exits
//!        │ nobody listens, or not in time                ▲
//!        └──────────── switched off ─────────────────────┘
//! ```

use super::machine::blocking;
use super::phase::Phase;
use super::{Event, Process};
use crate::fence::{SharedGate, lock};
use crate::gate::Hold;
use crate::request::{Reply, StopMode};
use crate::volumes::VolumeSet;
use migrate::SourceHandle;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmm::Machine;

/// How long devices may take to finish what is in flight, and volumes to become durable, each. A store that can't do it in
/// this time would keep the operator waiting; what the guest flushed is safe without it.
const REST_TIMEOUT: Duration = Duration::from_secs(10);

/// How long a guest that is asked to shut itself down may take. Below what the daemon gives the whole stop, with the limits
/// above behind it.
const SHUTDOWN_TIMEOUT: Duration = Duration::from_secs(75);

/// Between two presses of the power button: one that comes while the guest boots finds nobody who acts on it. A guest that
/// is shutting itself down does not mind another.
const BUTTON_INTERVAL: Duration = Duration::from_secs(10);

/// How long the volumes may take to say goodbye to their replicas, which notice a broken connection as well.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

impl Process {
    pub(super) async fn stop(&mut self, mode: StopMode, reply: Reply) {
        tracing::info!(?mode, "asked to stop");
        self.stoppers.push(reply);
        if mode == StopMode::PowerCut {
            self.end_at_once();
            return;
        }
        if self.phase == Phase::Ending {
            return;
        }
        if mode == StopMode::PowerButton {
            // Asked again by a daemon that did not hear the answer.
            if self.stoppers.len() > 1 {
                return;
            }
            if let Some(machine) = self.listening_machine() {
                return self.ask_guest(machine);
            }
        }
        self.take_down();
    }

    /// The machine, if its guest runs and hears its power button.
    fn listening_machine(&self) -> Option<Arc<Machine>> {
        let runs = self.phase == Phase::Live && self.holds().is_some_and(|holds| holds.is_empty());
        let machine = self.vm.as_ref()?.machine.clone()?;
        (runs && machine.listens_to_power_button()).then_some(machine)
    }

    /// Presses the button until the guest has ended, which takes it down, or has had its time.
    fn ask_guest(&self, machine: Arc<Machine>) {
        tracing::info!("the power button is pressed");
        self.spawn(async move {
            for _ in 0..SHUTDOWN_TIMEOUT.as_secs() / BUTTON_INTERVAL.as_secs() {
                if let Err(error) = machine.press_power_button() {
                    tracing::warn!(%error, "the power button");
                }
                tokio::time::sleep(BUTTON_INTERVAL).await;
            }
            Event::ShutdownOverdue
        });
    }

    pub(super) fn shutdown_overdue(&mut self) {
        if self.phase != Phase::Ending {
            tracing::warn!("the guest has not shut itself down in {SHUTDOWN_TIMEOUT:?}; it is switched off");
            self.take_down();
        }
    }

    /// Whether somebody waits for the end.
    pub(super) fn is_to_end(&self) -> bool {
        !self.stoppers.is_empty()
    }

    /// Switches the machine off and ends the process when its volumes are at rest.
    pub(super) fn take_down(&mut self) {
        let Some(vm) = &self.vm else { return self.end_at_once() };
        self.phase = Phase::Ending;
        let outgoing = self.source_handle();
        let (gate, machine, volumes) = (vm.gate.clone(), vm.machine.clone(), vm.volumes.clone());
        self.spawn(async move {
            call_off(outgoing).await;
            come_to_rest(gate, machine, volumes).await;
            Event::Rested
        });
    }

    /// As when the power goes: the process's end is the end of everything.
    pub(super) fn end_at_once(&mut self) {
        self.phase = Phase::Ending;
        self.rested();
    }

    pub(super) fn rested(&mut self) {
        self.is_over = true;
        let stoppers = std::mem::take(&mut self.stoppers);
        self.answer_all(stoppers, &Ok(()));
    }
}

/// Ends a migration of a machine that is at its end.
pub(super) async fn call_off(outgoing: Option<SourceHandle>) {
    let Some(outgoing) = outgoing else { return };
    match tokio::time::timeout(REST_TIMEOUT, outgoing.cancel()).await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::debug!(%error, "the migration of an ended machine is not cancelled"),
        Err(_) => tracing::warn!("the migration of an ended machine does not end"),
    }
}

/// Stops vCPUs, devices and volumes, in this order. Goes on after a failure: the process ends in any case.
async fn come_to_rest(gate: SharedGate<Machine>, machine: Option<Arc<Machine>>, volumes: VolumeSet) {
    let has_run = machine.is_some();
    let stop = move || {
        // Also keeps a machine from running that is just being started.
        lock(&gate).hold(Hold::Shutdown)?;
        Ok(machine.is_none_or(|machine| machine.drain(Instant::now() + REST_TIMEOUT)))
    };
    match blocking("stop the machine", stop).await {
        Ok(true) => {}
        Ok(false) => tracing::warn!("the devices do not come to rest; the process ends regardless"),
        Err(error) => tracing::warn!(%error, "the vCPUs do not stop; the process ends regardless"),
    }
    if !has_run {
        return;
    }
    match tokio::time::timeout(REST_TIMEOUT, volumes.drain()).await {
        Ok(Ok(_)) => {}
        Ok(Err(error)) => tracing::warn!(%error, "the process ends before its volumes are at rest"),
        Err(_) => tracing::warn!("the volumes do not come to rest; the process ends regardless"),
    }
    if tokio::time::timeout(CLOSE_TIMEOUT, volumes.close()).await.is_err() {
        tracing::debug!("the volumes' connections are cut by the end of the process");
    }
}
