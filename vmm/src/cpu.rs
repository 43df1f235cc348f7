//! What a guest is told of its processor: the features that the pool has chosen for it, without any that can't move with
//! it, and a topology of its own.
//!
//! Leaves that are not known here are not shown: whatever a newer kernel adds to KVM's list may differ from host to host.
//! Performance counters, nested virtualisation, the TSC's constant rate and the processor's own description of its bugs
//! (`ARCH_CAPABILITIES`, an MSR that no other host would take) stay hidden for the same reason.

use crate::state::STATE_VERSION;
use kvm_bindings::{CpuId, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};
use proto::cpu::{Register, WORDS};
use proto::{CpuFeatures, HostCpu};

const LEAF_VENDOR: u32 = 0x0;
const LEAF_FEATURES: u32 = 0x1;
const LEAF_POWER: u32 = 0x6;
const LEAF_MORE_FEATURES: u32 = 0x7;
const LEAF_STATE: u32 = 0xd;
const LEAF_INTEL_CACHES: u32 = 0x4;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_AMD_FEATURES: u32 = 0x8000_0001;
const LEAF_AMD_POWER: u32 = 0x8000_0007;
const LEAF_AMD_SIZES: u32 = 0x8000_0008;
const LEAF_EXTENDED: u32 = 0x8000_0000;
#[cfg(test)]
const LEAF_AMD_SVM: u32 = 0x8000_000a;

/// All that a guest is shown: identity, features, caches, topology, KVM's own.
fn is_shown(entry: &kvm_cpuid_entry2) -> bool {
    match entry.function {
        // Its later parts are of newer kernels.
        LEAF_MORE_FEATURES => entry.index <= 1,
        LEAF_VENDOR..=0x2 | LEAF_INTEL_CACHES | LEAF_POWER | LEAF_STATE => true,
        0x4000_0000..=0x4000_0001 | LEAF_EXTENDED..=LEAF_AMD_SIZES => true,
        _ => false,
    }
}

/// How the names of the vendors begin whose cores are counted by `CMP_LEGACY`: "AuthenticAMD", "HygonGenuine".
const AMD_VENDORS: [u32; 2] = [u32::from_le_bytes(*b"Auth"), u32::from_le_bytes(*b"Hygo")];

/// Of leaf 1: nested virtualisation (its state is not saved), the deadline timer, "runs under a hypervisor", several threads.
const ECX_VMX: u32 = 1 << 5;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_HTT: u32 = 1 << 28;
/// Of leaf 7: the processor's description of its bugs.
const EDX_ARCH_CAPABILITIES: u32 = 1 << 29;
/// Of leaf 0x8000_0001: several cores by the old way; nested virtualisation; AMD's own topology leaves, which name host cores.
const ECX_CMP_LEGACY: u32 = 1 << 1;
const ECX_SVM: u32 = 1 << 2;
const ECX_TOPOEXT: u32 = 1 << 22;
/// Of leaf 0x8000_0007: a TSC that never changes its rate. Another host has another rate.
const EDX_INVARIANT_TSC: u32 = 1 << 8;

/// Which of the words says what state XSAVE saves, and the size of its oldest part.
const STATE_WORD: usize = 7;
const LEGACY_STATE_BYTES: u32 = 576;

/// Level types of the topology leaf.
const LEVEL_THREAD: u32 = 1 << 8;
const LEVEL_CORE: u32 = 2 << 8;

/// A guest's processors: one socket, one thread a core.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Topology {
    pub vcpus: u32,
    /// KVM can work the local timer's deadline mode.
    pub has_deadline_timer: bool,
}

impl Topology {
    /// Bits that hold every core's number.
    fn core_bits(self) -> u32 {
        self.vcpus.next_power_of_two().trailing_zeros()
    }
}

/// This host has no KVM that can be asked.
#[derive(Debug, thiserror::Error)]
#[error("KVM does not tell its CPUID: {0}")]
pub struct HostCpuError(#[from] kvm_ioctls::Error);

/// Asks this host's KVM what it can be to guests.
///
/// # Errors
/// There is none.
pub fn host_cpu() -> Result<HostCpu, HostCpuError> {
    let kvm = Kvm::new()?;
    let cpuid = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)?;
    let features = host_features(&cpuid, kvm.check_extension(Cap::TscDeadlineTimer));
    // Of a machine of its own: only vCPUs know the rate on older kernels.
    let rate = kvm.create_vm().and_then(|vm| vm.create_vcpu(0)?.get_tsc_khz());
    let scales_tsc = kvm.check_extension(Cap::TscControl);
    Ok(HostCpu { features, tsc_khz: rate.unwrap_or(0), scales_tsc, machine_version: STATE_VERSION.into() })
}

/// The features that guests of this host may be shown.
pub(crate) fn host_features(host: &CpuId, has_deadline_timer: bool) -> CpuFeatures {
    let one = Topology { vcpus: 1, has_deadline_timer };
    let shown = adapted(host, one, 0);
    let mut features = CpuFeatures::default();
    for (word, place) in features.words.iter_mut().zip(WORDS) {
        let found = shown.iter().find(|entry| (entry.function, entry.index) == (place.leaf, place.index));
        *word = found.map_or(0, |entry| *register(&mut { *entry }, place.register));
    }
    let sizes = shown.iter().find(|entry| entry.function == LEAF_AMD_SIZES);
    // What processors without the leaf have.
    features.address_bits = sizes.map_or(36, |entry| entry.eax.to_le_bytes()[0]);
    features
}

fn register(entry: &mut kvm_cpuid_entry2, register: Register) -> &mut u32 {
    match register {
        Register::Eax => &mut entry.eax,
        Register::Ebx => &mut entry.ebx,
        Register::Ecx => &mut entry.ecx,
        Register::Edx => &mut entry.edx,
    }
}

/// The CPUID of one vCPU that is shown these features.
pub(crate) fn cpuid_of(host: &CpuId, topology: Topology, index: u32, shown: &CpuFeatures) -> CpuId {
    let mut entries = adapted(host, topology, index);
    for (word, place) in shown.words.iter().zip(WORDS) {
        for entry in entries.iter_mut().filter(|e| (e.function, e.index) == (place.leaf, place.index)) {
            *register(entry, place.register) &= word | kept(place.leaf, place.register);
        }
    }
    let state = shown.words[STATE_WORD];
    entries.retain(|e| e.function != LEAF_STATE || e.index < 2 || e.index < 32 && state >> e.index & 1 == 1);
    let state_bytes = entries
        .iter()
        .filter(|e| e.function == LEAF_STATE && e.index >= 2)
        .map(|e| e.eax.saturating_add(e.ebx));
    let state_bytes = state_bytes.max().unwrap_or(LEGACY_STATE_BYTES);
    let has = |leaf| host.as_slice().iter().any(|entry| entry.function == leaf);
    for leaf in [LEAF_TOPOLOGY, LEAF_TOPOLOGY_V2].into_iter().filter(|leaf| has(*leaf)) {
        entries.extend(topology_leaf(leaf, topology, index));
    }
    let last = |from: u32| {
        let leaves = entries.iter().map(|entry| entry.function);
        leaves.filter(|leaf| (from..from + 0x1000).contains(leaf)).max().unwrap_or(from)
    };
    let (last_basic, last_extended) = (last(LEAF_VENDOR), last(LEAF_EXTENDED));
    for entry in &mut entries {
        match (entry.function, entry.index) {
            (LEAF_VENDOR, _) => entry.eax = last_basic,
            (LEAF_EXTENDED, _) => entry.eax = last_extended,
            (LEAF_STATE, 0) => entry.ecx = entry.ecx.min(state_bytes),
            (LEAF_AMD_SIZES, _) if shown.address_bits != 0 => {
                let bits = (entry.eax & 0xff).min(u32::from(shown.address_bits));
                entry.eax = entry.eax & !0xff | bits;
            }
            _ => {}
        }
    }
    CpuId::from_entries(&entries).expect("as many entries as the host has, and at most four more")
}

/// Bits that the topology has set, whatever the features are.
fn kept(leaf: u32, register: Register) -> u32 {
    match (leaf, register) {
        (LEAF_FEATURES, Register::Edx) => EDX_HTT,
        (LEAF_AMD_FEATURES, Register::Ecx) => ECX_CMP_LEGACY,
        _ => 0,
    }
}

/// The host's entries that guests see, with everything that can't move taken out.
fn adapted(host: &CpuId, topology: Topology, index: u32) -> Vec<kvm_cpuid_entry2> {
    let mut entries: Vec<_> = host.as_slice().iter().filter(|entry| is_shown(entry)).copied().collect();
    let is_amd =
        entries.iter().any(|entry| entry.function == LEAF_VENDOR && AMD_VENDORS.contains(&entry.ebx));
    for entry in &mut entries {
        adapt(entry, topology, index, is_amd);
    }
    entries
}

fn adapt(entry: &mut kvm_cpuid_entry2, topology: Topology, index: u32, is_amd: bool) {
    let several = topology.vcpus > 1;
    match entry.function {
        LEAF_FEATURES => {
            entry.ebx = entry.ebx & 0xffff | topology.vcpus.min(0xff) << 16 | index << 24;
            entry.ecx = entry.ecx & !(ECX_VMX | ECX_TSC_DEADLINE) | ECX_HYPERVISOR;
            if topology.has_deadline_timer {
                entry.ecx |= ECX_TSC_DEADLINE;
            }
            entry.edx = if several { entry.edx | EDX_HTT } else { entry.edx & !EDX_HTT };
        }
        // Cores of the package less one, and no sharing of caches.
        LEAF_INTEL_CACHES if entry.eax & 0x1f != 0 => {
            entry.eax = entry.eax & 0x3fff | (topology.vcpus.min(64) - 1) << 26;
        }
        LEAF_AMD_FEATURES => {
            entry.ecx &= !(ECX_SVM | ECX_TOPOEXT | ECX_CMP_LEGACY);
            if several && is_amd {
                entry.ecx |= ECX_CMP_LEGACY;
            }
        }
        LEAF_POWER => (entry.ebx, entry.ecx, entry.edx) = (0, 0, 0),
        LEAF_MORE_FEATURES => entry.edx &= !EDX_ARCH_CAPABILITIES,
        LEAF_AMD_POWER => {
            (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, entry.edx & !EDX_INVARIANT_TSC)
        }
        LEAF_AMD_SIZES => entry.ecx = topology.core_bits() << 12 | (topology.vcpus - 1) & 0xff,
        _ => {}
    }
}

/// Thread, core, and the end of the list.
fn topology_leaf(function: u32, topology: Topology, index: u32) -> [kvm_cpuid_entry2; 3] {
    let level = |level, shift, count, kind| kvm_cpuid_entry2 {
        function,
        index: level,
        flags: kvm_bindings::KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
        eax: shift,
        ebx: count,
        ecx: level | kind,
        edx: index,
        ..Default::default()
    };
    [
        level(0, 0, 1, LEVEL_THREAD),
        level(1, topology.core_bits(), topology.vcpus, LEVEL_CORE),
        level(2, 0, 0, 0),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 {
            function,
            eax: u32::MAX,
            ebx: u32::MAX,
            ecx: u32::MAX,
            edx: u32::MAX,
            ..Default::default()
        }
    }

    fn shown(vcpus: u32, index: u32) -> impl Fn(u32) -> kvm_cpuid_entry2 {
        let leaves =
            [LEAF_FEATURES, LEAF_TOPOLOGY, LEAF_AMD_FEATURES, LEAF_AMD_POWER, LEAF_AMD_SIZES, LEAF_AMD_SVM];
        let host = CpuId::from_entries(&leaves.map(entry)).unwrap();
        let all = host_features(&host, true);
        let guest = cpuid_of(&host, Topology { vcpus, has_deadline_timer: true }, index, &all);
        move |leaf| {
            let found = guest
                .as_slice()
                .iter()
                .rfind(|e| e.function == leaf && (leaf != LEAF_TOPOLOGY || e.index == 1));
            found.copied().unwrap_or_default()
        }
    }

    #[test]
    fn what_cannot_move_is_not_shown() {
        let guest = shown(2, 1);
        assert_eq!(guest(LEAF_FEATURES).ecx & ECX_VMX, 0);
        assert_eq!(guest(LEAF_AMD_FEATURES).ecx & (ECX_SVM | ECX_TOPOEXT), 0);
        assert_eq!(guest(LEAF_AMD_POWER).edx & EDX_INVARIANT_TSC, 0);
        assert_eq!(guest(LEAF_AMD_SVM), kvm_cpuid_entry2::default());
    }

    #[test]
    fn a_guest_sees_no_more_than_it_is_shown() {
        let leaves = [0, 1, 5, 6, 7, 0xa, 0xd, 0x14, 0x8000_0000, 0x8000_0001, 0x8000_0008, 0x8000_001f];
        let host = CpuId::from_entries(&leaves.map(entry)).unwrap();
        let all = host_features(&host, false);
        let mut shown = all;
        shown.words[0] &= !(1 << 28);
        shown.address_bits = 40;
        let guest = cpuid_of(&host, Topology { vcpus: 2, has_deadline_timer: false }, 0, &shown);
        let leaf = |leaf| guest.as_slice().iter().find(|entry| entry.function == leaf).copied();
        assert_eq!(leaf(LEAF_FEATURES).unwrap().ecx, shown.words[0]);
        assert_ne!(leaf(LEAF_FEATURES).unwrap().ecx & ECX_HYPERVISOR, 0);
        assert_eq!(leaf(LEAF_AMD_SIZES).unwrap().eax & 0xff, 40);
        assert_eq!((leaf(0).unwrap().eax, leaf(LEAF_EXTENDED).unwrap().eax), (0xd, LEAF_AMD_SIZES));
        for hidden in [5, 0xa, 0x14, 0x8000_001f] {
            assert_eq!(leaf(hidden), None, "{hidden:#x}");
        }
        assert_eq!(leaf(LEAF_MORE_FEATURES).unwrap().edx & EDX_ARCH_CAPABILITIES, 0);
        assert_eq!(shown.missing_in(&all), Vec::<String>::new());
        assert_eq!(all.missing_in(&shown), ["avx", "255 bits of physical address"]);
    }

    #[test]
    fn each_vcpu_has_its_place_in_one_socket() {
        let guest = shown(3, 2);
        assert_eq!(guest(LEAF_FEATURES).ebx >> 24, 2);
        assert_eq!(guest(LEAF_FEATURES).ebx >> 16 & 0xff, 3);
        assert_eq!((guest(LEAF_TOPOLOGY).eax, guest(LEAF_TOPOLOGY).ebx, guest(LEAF_TOPOLOGY).edx), (2, 3, 2));
        assert_eq!(guest(LEAF_AMD_SIZES).ecx, 2 << 12 | 2);
        assert_eq!(shown(1, 0)(LEAF_FEATURES).edx & EDX_HTT, 0);
    }
}
