//! The machine's state, as it moves or is kept: gathered from stopped vCPUs, put into fresh ones.
//!
//! The order follows the dependencies between the parts (api.rst): at saving `mp_state` first, since fetching it may settle
//! pending events, and `vcpu_events` last; at restoring the lapic before the MSRs, since the deadline timer's MSR arms
//! it, and the TSC before that. The format is postcard behind a magic and a version, bounded, decoded without trust.

use crate::console::ConsoleHistory;
use crate::virtio::MmioState;
use kvm_bindings::{
    CpuId, KVM_CLOCK_TSC_STABLE, Msrs, kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs, kvm_irqchip,
    kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_pit_state2, kvm_regs, kvm_sregs, kvm_vcpu_events,
    kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{VcpuFd, VmFd};
use serde::{Deserialize, Serialize};

/// Tells a state from anything else; the last byte is the version. Version 1: the first; 2: with the console; 3: devices
/// of several kinds, the clock; 4: network cards.
const MAGIC: &[u8; 8] = b"vmstate\x04";

/// Largest encoded state in bytes: 64 vCPUs of 20 KiB, devices, a MiB of console, and as much again.
pub const STATE_BYTES_MAX: usize = 4 << 20;

const MSR_TSC: u32 = 0x10;
const MSR_TSC_DEADLINE: u32 = 0x6e0;

/// Interrupt controllers of the irqchip: two PICs and the IOAPIC.
const IRQCHIPS: u32 = 3;

/// State could not be taken or put.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// KVM refuses a part.
    #[error("KVM does not {action} {part}: {source}")]
    Kvm {
        action: &'static str,
        part: &'static str,
        #[source]
        source: kvm_ioctls::Error,
    },
    /// KVM took fewer MSRs than the source had.
    #[error("this host's KVM does not accept MSR {msr:#x}: the hosts' CPUs or kernels differ")]
    Msr { msr: u32 },
    /// The bytes are no state of this version.
    #[error("the saved state can't be read: {cause}")]
    Decode { cause: String },
    /// The state is of another machine.
    #[error("the saved state has {there} {what}, this machine has {here}")]
    Mismatch { what: &'static str, here: usize, there: usize },
    /// A device refuses its part.
    #[error("device {device}: {cause}")]
    Device { device: String, cause: String },
}

/// One vCPU.
#[derive(Serialize, Deserialize)]
pub struct VcpuState {
    mp_state: kvm_mp_state,
    regs: kvm_regs,
    sregs: kvm_sregs,
    xsave: kvm_xsave,
    xcrs: kvm_xcrs,
    debugregs: kvm_debugregs,
    lapic: kvm_lapic_state,
    tsc_khz: u32,
    cpuid: Vec<kvm_cpuid_entry2>,
    msrs: Vec<kvm_msr_entry>,
    events: kvm_vcpu_events,
}

/// Timers and interrupt controllers of the machine.
#[derive(Clone, Serialize, Deserialize)]
pub struct ChipState {
    pit: kvm_pit_state2,
    clock: kvm_clock_data,
    irqchips: Vec<kvm_irqchip>,
}

/// The serial console's registers.
#[derive(Clone, Serialize, Deserialize)]
pub struct SerialRegisters {
    pub baud_divisor_low: u8,
    pub baud_divisor_high: u8,
    pub interrupt_enable: u8,
    pub interrupt_identification: u8,
    pub line_control: u8,
    pub line_status: u8,
    pub modem_control: u8,
    pub modem_status: u8,
    pub scratch: u8,
    pub in_buffer: Vec<u8>,
    /// Typed ahead of the FIFO.
    pub typed: Vec<u8>,
}

/// The whole machine but its memory.
#[derive(Serialize, Deserialize)]
pub struct MachineState {
    pub(crate) vcpus: Vec<VcpuState>,
    pub(crate) chips: ChipState,
    pub(crate) serial: SerialRegisters,
    pub(crate) console: ConsoleHistory,
    pub(crate) cmos_index: u8,
    pub(crate) devices: Vec<MmioState>,
}

impl MachineState {
    /// The bytes that travel.
    ///
    /// # Errors
    /// The state is larger than any real one.
    pub fn encode(&self) -> Result<Vec<u8>, StateError> {
        let body =
            postcard::to_stdvec(self).map_err(|error| StateError::Decode { cause: error.to_string() })?;
        let mut bytes = MAGIC.to_vec();
        bytes.extend(body);
        if bytes.len() > STATE_BYTES_MAX {
            return Err(StateError::Decode { cause: format!("{} bytes are too many", bytes.len()) });
        }
        Ok(bytes)
    }

    /// Reads bytes from anywhere.
    ///
    /// # Errors
    /// They are no state of this version.
    pub fn decode(bytes: &[u8]) -> Result<Self, StateError> {
        let decode = |cause: String| StateError::Decode { cause };
        if bytes.len() > STATE_BYTES_MAX {
            return Err(decode(format!("{} bytes are too many", bytes.len())));
        }
        let body =
            bytes.strip_prefix(MAGIC).ok_or_else(|| decode("not a state of this version".to_owned()))?;
        postcard::from_bytes(body).map_err(|error| decode(error.to_string()))
    }
}

fn save<T>(part: &'static str, result: Result<T, kvm_ioctls::Error>) -> Result<T, StateError> {
    result.map_err(|source| StateError::Kvm { action: "give", part, source })
}

fn put<T>(part: &'static str, result: Result<T, kvm_ioctls::Error>) -> Result<T, StateError> {
    result.map_err(|source| StateError::Kvm { action: "take", part, source })
}

/// Takes a stopped vCPU's state. `msr_indices` is what this host's KVM can save; `cpuid` what the guest was shown.
pub(crate) fn save_vcpu(fd: &VcpuFd, msr_indices: &[u32], cpuid: &CpuId) -> Result<VcpuState, StateError> {
    let mp_state = save("mp_state", fd.get_mp_state())?;
    Ok(VcpuState {
        mp_state,
        regs: save("registers", fd.get_regs())?,
        sregs: save("system registers", fd.get_sregs())?,
        xsave: save("xsave", fd.get_xsave())?,
        xcrs: save("xcrs", fd.get_xcrs())?,
        debugregs: save("debug registers", fd.get_debug_regs())?,
        lapic: save("lapic", fd.get_lapic())?,
        // Some kernels have no scaled TSC: zero means "as the host's".
        tsc_khz: fd.get_tsc_khz().unwrap_or(0),
        cpuid: cpuid.as_slice().to_vec(),
        msrs: save_msrs(fd, msr_indices)?,
        events: save("pending events", fd.get_vcpu_events())?,
    })
}

/// Reads the MSRs that can be read; the list names some that this CPU lacks.
fn save_msrs(fd: &VcpuFd, indices: &[u32]) -> Result<Vec<kvm_msr_entry>, StateError> {
    let mut saved = Vec::new();
    let mut rest = indices;
    while !rest.is_empty() {
        let wanted: Vec<_> =
            rest.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
        let mut msrs = Msrs::from_entries(&wanted)
            .map_err(|error| StateError::Decode { cause: format!("MSR list: {error:?}") })?;
        let got = save("MSRs", fd.get_msrs(&mut msrs))?;
        saved.extend_from_slice(&msrs.as_slice()[..got]);
        // It stopped at one that it can't read: that one is passed over.
        rest = &rest[(got + 1).min(rest.len())..];
    }
    Ok(saved)
}

/// Puts a state into a fresh vCPU.
pub(crate) fn restore_vcpu(fd: &VcpuFd, state: &VcpuState) -> Result<(), StateError> {
    if state.tsc_khz != 0 && fd.get_tsc_khz().is_ok_and(|here| here != state.tsc_khz) {
        put("TSC frequency", fd.set_tsc_khz(state.tsc_khz))?;
    }
    let cpuid = CpuId::from_entries(&state.cpuid)
        .map_err(|error| StateError::Decode { cause: format!("CPUID: {error:?}") })?;
    put("CPUID", fd.set_cpuid2(&cpuid))?;
    put("mp_state", fd.set_mp_state(state.mp_state))?;
    put("registers", fd.set_regs(&state.regs))?;
    put("system registers", fd.set_sregs(&state.sregs))?;
    // SAFETY: the structure has the 4 KiB that KVM reads when no feature was enabled by arch_prctl, which this process never does.
    put("xsave", unsafe { fd.set_xsave(&state.xsave) })?;
    // A processor without XSAVE has none, and then KVM takes not even none.
    if state.xcrs.nr_xcrs != 0 {
        put("xcrs", fd.set_xcrs(&state.xcrs))?;
    }
    put("debug registers", fd.set_debug_regs(&state.debugregs))?;
    put("lapic", fd.set_lapic(&state.lapic))?;
    restore_msrs(fd, &state.msrs)?;
    put("pending events", fd.set_vcpu_events(&state.events))?;
    // Tells a guest with kvmclock that it was stopped; refused when it has none.
    if let Err(error) = fd.kvmclock_ctrl() {
        tracing::debug!(%error, "kvmclock_ctrl");
    }
    Ok(())
}

fn restore_msrs(fd: &VcpuFd, saved: &[kvm_msr_entry]) -> Result<(), StateError> {
    let mut ordered = saved.to_vec();
    ordered.sort_by_key(|entry| match entry.index {
        MSR_TSC => 0,
        MSR_TSC_DEADLINE => 2,
        _ => 1,
    });
    let msrs = Msrs::from_entries(&ordered)
        .map_err(|error| StateError::Decode { cause: format!("MSR list: {error:?}") })?;
    let set = put("MSRs", fd.set_msrs(&msrs))?;
    match ordered.get(set) {
        None => Ok(()),
        Some(refused) => Err(StateError::Msr { msr: refused.index }),
    }
}

/// Takes the machine's chips; all vCPUs are stopped.
pub(crate) fn save_chips(vm: &VmFd) -> Result<ChipState, StateError> {
    let pit = save("timer", vm.get_pit2())?;
    let mut clock = save("clock", vm.get_clock())?;
    // Only this bit may be given back.
    clock.flags &= !KVM_CLOCK_TSC_STABLE;
    let chips = (0..IRQCHIPS).map(|chip_id| {
        let mut chip = kvm_irqchip { chip_id, ..Default::default() };
        save("interrupt controller", vm.get_irqchip(&mut chip)).map(|()| chip)
    });
    Ok(ChipState { pit, clock, irqchips: chips.collect::<Result<_, _>>()? })
}

/// Puts the chips into a fresh machine, after its vCPUs.
pub(crate) fn restore_chips(vm: &VmFd, state: &ChipState) -> Result<(), StateError> {
    put("timer", vm.set_pit2(&state.pit))?;
    let clock = kvm_clock_data { clock: state.clock.clock, ..Default::default() };
    put("clock", vm.set_clock(&clock))?;
    for chip in &state.irqchips {
        put("interrupt controller", vm.set_irqchip(chip))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn garbage_is_no_state() {
        assert!(MachineState::decode(b"").is_err());
        assert!(MachineState::decode(b"vmstate\x01").is_err());
        assert!(MachineState::decode(&[0; STATE_BYTES_MAX + 1]).is_err());
        // Any bytes behind the magic: refused or read, never a panic or a large allocation.
        let mut bytes = MAGIC.to_vec();
        for seed in 0_u32..2_000 {
            bytes.truncate(MAGIC.len());
            bytes.extend(blake3::hash(&seed.to_le_bytes()).as_bytes());
            drop(MachineState::decode(&bytes));
        }
    }
}
