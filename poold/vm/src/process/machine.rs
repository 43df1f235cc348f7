//! The configured machine and how it is built.

use super::{Event, Process};
use crate::attachment::Attachment;
use crate::fence::{Fence, SharedGate, lock};
use crate::gate::{Hold, RunGate};
use crate::request::Refusal;
use crate::spec::{LeaseNeed, MachineSpec};
use crate::superseded;
use crate::volumes::VolumeSet;
use migrate::{Identity, IdentityError};
use proto::{Epoch, v1};
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, mpsc as std_mpsc};
use tokio::sync::{mpsc, watch};
use vmm::{ConsoleRing, GuestExit, Machine, MachineConfig, MachineError};

/// The process can't take its machine.
#[derive(Debug, thiserror::Error)]
pub(super) enum ConfigureError {
    /// No certificate for migrations.
    #[error(transparent)]
    Identity(#[from] IdentityError),
    /// No thread for the lease.
    #[error("the lease's thread can't be started")]
    Fence(#[from] io::Error),
}

/// A configured machine.
pub(super) struct Vm {
    /// As it came.
    pub(super) config: v1::MachineConfig,
    pub(super) spec: MachineSpec,
    /// Of the placement; moves on with a migration that arrives.
    pub(super) epoch: Epoch,
    pub(super) volumes: VolumeSet,
    pub(super) gate: SharedGate<Machine>,
    pub(super) fence: Fence,
    pub(super) identity: Identity,
    pub(super) machine: Option<Arc<Machine>>,
}

impl Vm {
    /// Opens the volumes, inactive, and starts the fence. Nothing runs.
    pub(super) fn new(
        config: v1::MachineConfig,
        spec: MachineSpec,
        identity: Identity,
    ) -> Result<Self, ConfigureError> {
        let mut holds = vec![Hold::Boot];
        if spec.lease != LeaseNeed::Exempt {
            holds.push(Hold::Lease);
        }
        let gate = Arc::new(Mutex::new(RunGate::new(holds)));
        let fence = Fence::spawn(spec.lease.guard(), gate.clone())?;
        let volumes = VolumeSet::open(&spec.disks, spec.replica_socket.clone());
        tokio::spawn(superseded::watch(volumes.clone(), gate.clone()));
        Ok(Self { config, epoch: spec.epoch, spec, volumes, gate, fence, identity, machine: None })
    }

    pub(super) fn is_another(&self) -> Refusal {
        Refusal::OtherMachine { vm: self.spec.vm.0, epoch: self.spec.epoch.0 }
    }

    /// What is needed to build the machine on another thread. Must be called within the runtime.
    pub(super) fn blueprint(
        &self,
        console: ConsoleRing,
        exits: std_mpsc::Sender<GuestExit>,
        taps: Vec<OwnedFd>,
    ) -> MachineConfig {
        MachineConfig {
            vcpus: self.spec.vcpus,
            memory: self.spec.memory,
            pages: self.spec.pages,
            memory_file: None,
            cpu: self.spec.cpu,
            disks: self.volumes.backends(),
            nics: self.spec.nics.iter().cloned().zip(taps).collect(),
            console,
            lease_deadline_ns: self.fence.deadline(),
            exits,
        }
    }
}

/// Checks attachments.
pub(super) fn attachments(messages: &[v1::VolumeAttachment]) -> Result<Vec<Attachment>, Refusal> {
    messages.iter().map(Attachment::from_message).collect()
}

/// A thread that waits for the guest's end and reports it.
pub(super) fn watch_guest(events: mpsc::Sender<Event>) -> io::Result<std_mpsc::Sender<GuestExit>> {
    let (exits, ended) = std_mpsc::channel();
    let wait = move || {
        if let Ok(exit) = ended.recv() {
            // The inbox is closed only when the process ends.
            let _ = events.blocking_send(Event::GuestEnded(exit));
        }
    };
    std::thread::Builder::new().name("guest-exit".to_owned()).spawn(wait)?;
    Ok(exits)
}

/// Works the gate on a thread that may block: a vCPU takes its time to stop.
pub(super) async fn with_gate(
    gate: &SharedGate<Machine>,
    work: impl FnOnce(&mut RunGate<Machine>) -> Result<(), MachineError> + Send + 'static,
) -> Result<(), MachineError> {
    let gate = gate.clone();
    blocking("work the run gate", move || work(&mut lock(&gate))).await
}

/// Runs a blocking action of the VMM.
pub(super) async fn blocking<T: Send + 'static>(
    action: &'static str,
    work: impl FnOnce() -> Result<T, MachineError> + Send + 'static,
) -> Result<T, MachineError> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(MachineError::System { action, source: io::Error::other(error) }))
}

impl Process {
    /// Makes an event of every change, until the watched part is gone.
    pub(super) fn forward<T: Send + Sync + 'static>(
        &self,
        mut watched: watch::Receiver<T>,
        event: fn() -> Event,
    ) {
        let events = self.events.clone();
        tokio::spawn(async move {
            while watched.changed().await.is_ok() {
                if events.send(event()).await.is_err() {
                    break;
                }
            }
        });
    }
}
