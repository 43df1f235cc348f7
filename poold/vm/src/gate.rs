//! The run gate: the one place that starts and stops the vCPUs.
//!
//! Several parties may want the vCPUs to stand still, each for a reason of its own and without knowing of the others.
//! The gate keeps the set of reasons; the vCPUs run exactly while the set is empty and a machine is there. So a lease
//! that comes back can't resume a VM that a migration has paused, and the other way round.

use std::collections::BTreeSet;
use std::sync::Arc;
use vmm::virtio::LinkState;

/// Why the vCPUs stand still.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Hold {
    /// Not booted yet.
    Boot,
    /// The operator paused the VM.
    Operator,
    /// There is no valid lease.
    Lease,
    /// Outgoing migration: stop-and-copy and after.
    Outgoing,
    /// Incoming migration: until its volumes are active.
    Incoming,
    /// Incoming migration: pages are missing, and there is no link to where they are.
    Starved,
    /// Its disks have a newer owner.
    Superseded,
    /// The machine is being taken down.
    Shutdown,
}

impl Hold {
    /// Whether it holds only once every vCPU stands still.
    fn is_strict(self) -> bool {
        // A vCPU that waits for a page can't be stopped before it has it, and need not: it does nothing meanwhile.
        self != Self::Starved
    }

    /// Whether the VM has no place on its networks meanwhile: another copy may have it, now or soon.
    fn unplugs(self) -> bool {
        match self {
            Self::Boot | Self::Lease | Self::Incoming | Self::Superseded | Self::Shutdown => true,
            Self::Operator | Self::Outgoing | Self::Starved => false,
        }
    }
}

/// Vcpus that can be stopped and started; `vmm::Machine` in the process, a recorder in tests.
pub trait Vcpus {
    /// Why they could not.
    type Error;
    /// Returns once no vCPU executes guest code.
    fn pause(&self) -> Result<(), Self::Error>;
    /// Tells all vCPUs to stop, and returns at once.
    fn ask_to_pause(&self);
    /// Lets all vCPUs execute.
    fn resume(&self) -> Result<(), Self::Error>;
    /// Plugs the cables of its network cards in or out.
    fn set_link(&self, state: LinkState);
}

impl Vcpus for vmm::Machine {
    type Error = vmm::MachineError;

    fn pause(&self) -> Result<(), Self::Error> {
        Self::pause(self)
    }

    fn ask_to_pause(&self) {
        Self::ask_to_pause(self);
    }

    fn resume(&self) -> Result<(), Self::Error> {
        Self::resume(self);
        Ok(())
    }

    fn set_link(&self, state: LinkState) {
        Self::set_link(self, state);
    }
}

/// What the vCPUs were last told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Told {
    Run,
    /// To stop; perhaps not all of them have.
    Stop,
    /// To stop, and they have.
    Stopped,
}

/// The gate of one machine.
#[derive(Debug)]
pub struct RunGate<M> {
    machine: Option<Arc<M>>,
    holds: BTreeSet<Hold>,
    told: Told,
    link: LinkState,
}

impl<M: Vcpus> RunGate<M> {
    /// A gate without a machine, held by the given reasons.
    pub fn new(holds: impl IntoIterator<Item = Hold>) -> Self {
        Self { machine: None, holds: holds.into_iter().collect(), told: Told::Stopped, link: LinkState::Down }
    }

    /// Puts the (paused) machine behind the gate; it runs at once if nothing holds it.
    pub fn install(&mut self, machine: Arc<M>) -> Result<(), M::Error> {
        self.machine = Some(machine);
        self.told = Told::Stopped;
        self.link = LinkState::Down;
        self.settle()
    }

    /// Adds a reason; when this returns `Ok`, no vCPU executes. Only [`Hold::Starved`] does not wait for that.
    pub fn hold(&mut self, reason: Hold) -> Result<(), M::Error> {
        self.holds.insert(reason);
        self.settle()
    }

    /// Takes a reason away; the last one lets the vCPUs run.
    pub fn release(&mut self, reason: Hold) -> Result<(), M::Error> {
        self.holds.remove(&reason);
        self.settle()
    }

    /// All reasons that hold the vCPUs.
    pub fn holds(&self) -> &BTreeSet<Hold> {
        &self.holds
    }

    /// Whether the vCPUs execute.
    #[cfg(test)]
    pub fn is_running(&self) -> bool {
        self.told == Told::Run
    }

    fn settle(&mut self) -> Result<(), M::Error> {
        let Some(machine) = &self.machine else { return Ok(()) };
        let link = if self.holds.iter().any(|hold| hold.unplugs()) { LinkState::Down } else { LinkState::Up };
        let machine = machine.clone();
        // Before the vCPUs: in, so that no frame of theirs is lost; out, because one of them may not stop.
        if self.link != link {
            machine.set_link(link);
            self.link = link;
        }
        // A pause that fails changes nothing here, so that the next hold tries again.
        if self.holds.is_empty() {
            if self.told != Told::Run {
                machine.resume()?;
                self.told = Told::Run;
            }
        } else if self.holds.iter().any(|hold| hold.is_strict()) {
            if self.told != Told::Stopped {
                machine.pause()?;
                self.told = Told::Stopped;
            }
        } else if self.told == Told::Run {
            machine.ask_to_pause();
            self.told = Told::Stop;
        }
        Ok(())
    }

    /// Whether the cables of its network cards are in.
    pub fn link(&self) -> LinkState {
        self.link
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;
    use std::sync::atomic::{AtomicBool, Ordering};

    #[derive(Default)]
    struct Recorder {
        calls: Mutex<Vec<&'static str>>,
        links: Mutex<Vec<LinkState>>,
        stuck: AtomicBool,
    }

    impl Vcpus for Recorder {
        type Error = &'static str;

        fn pause(&self) -> Result<(), Self::Error> {
            if self.stuck.load(Ordering::SeqCst) {
                return Err("stuck");
            }
            self.calls.lock().unwrap().push("pause");
            Ok(())
        }

        fn ask_to_pause(&self) {
            self.calls.lock().unwrap().push("ask");
        }

        fn resume(&self) -> Result<(), Self::Error> {
            self.calls.lock().unwrap().push("resume");
            Ok(())
        }

        fn set_link(&self, state: LinkState) {
            self.links.lock().unwrap().push(state);
        }
    }

    #[test]
    fn vcpus_run_only_when_no_reason_is_left() {
        let machine = Arc::new(Recorder::default());
        let mut gate = RunGate::new([Hold::Boot, Hold::Lease]);
        gate.install(machine.clone()).unwrap();
        gate.release(Hold::Boot).unwrap();
        assert!(!gate.is_running());
        gate.release(Hold::Lease).unwrap();
        gate.hold(Hold::Outgoing).unwrap();
        gate.hold(Hold::Lease).unwrap();
        gate.release(Hold::Lease).unwrap();
        assert!(!gate.is_running(), "the lease must not undo the migration's pause");
        gate.release(Hold::Outgoing).unwrap();
        assert_eq!(*machine.calls.lock().unwrap(), ["resume", "pause", "resume"]);
    }

    #[test]
    fn the_cable_is_out_while_another_copy_may_have_the_place() {
        let machine = Arc::new(Recorder::default());
        let mut gate = RunGate::new([Hold::Boot, Hold::Lease]);
        gate.install(machine.clone()).unwrap();
        gate.release(Hold::Boot).unwrap();
        assert_eq!(gate.link(), LinkState::Down);
        gate.release(Hold::Lease).unwrap();
        for (hold, link) in [
            (Hold::Operator, LinkState::Up),
            (Hold::Outgoing, LinkState::Up),
            (Hold::Starved, LinkState::Up),
            (Hold::Lease, LinkState::Down),
            (Hold::Incoming, LinkState::Down),
            (Hold::Shutdown, LinkState::Down),
        ] {
            gate.hold(hold).unwrap();
            assert_eq!(gate.link(), link, "{hold:?}");
            gate.release(hold).unwrap();
            assert_eq!(gate.link(), LinkState::Up, "after {hold:?}");
        }
        let changes = machine.links.lock().unwrap().len();
        assert_eq!(changes, 7, "told once of each change");
        // It is taken out also when a vCPU does not stop.
        machine.stuck.store(true, Ordering::SeqCst);
        assert!(gate.hold(Hold::Lease).is_err());
        assert_eq!(gate.link(), LinkState::Down);
    }

    #[test]
    fn who_waits_for_a_page_is_asked_to_stop_and_not_waited_for() {
        let machine = Arc::new(Recorder::default());
        let mut gate = RunGate::new([]);
        gate.install(machine.clone()).unwrap();
        machine.stuck.store(true, Ordering::SeqCst);
        gate.hold(Hold::Starved).unwrap();
        assert!(!gate.is_running());
        assert!(gate.hold(Hold::Lease).is_err(), "the lease wants to know");
        machine.stuck.store(false, Ordering::SeqCst);
        gate.hold(Hold::Lease).unwrap();
        gate.release(Hold::Lease).unwrap();
        gate.release(Hold::Starved).unwrap();
        gate.hold(Hold::Starved).unwrap();
        gate.release(Hold::Starved).unwrap();
        assert_eq!(*machine.calls.lock().unwrap(), ["resume", "ask", "pause", "resume", "ask", "resume"]);
    }

    #[test]
    fn a_failed_pause_is_tried_again() {
        let machine = Arc::new(Recorder::default());
        let mut gate = RunGate::new([]);
        gate.install(machine.clone()).unwrap();
        machine.stuck.store(true, Ordering::SeqCst);
        assert!(gate.hold(Hold::Lease).is_err());
        assert!(gate.is_running());
        machine.stuck.store(false, Ordering::SeqCst);
        gate.hold(Hold::Lease).unwrap();
        assert!(!gate.is_running());
    }
}
