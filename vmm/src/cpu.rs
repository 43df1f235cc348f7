//! What a guest is told of its processor: the host's features without those that can't move with it, and a topology of its own.

use kvm_bindings::{CpuId, kvm_cpuid_entry2};

const LEAF_VENDOR: u32 = 0x0;
const LEAF_FEATURES: u32 = 0x1;
const LEAF_INTEL_CACHES: u32 = 0x4;
const LEAF_TOPOLOGY: u32 = 0xb;
const LEAF_TOPOLOGY_V2: u32 = 0x1f;
const LEAF_AMD_FEATURES: u32 = 0x8000_0001;
const LEAF_AMD_POWER: u32 = 0x8000_0007;
const LEAF_AMD_SIZES: u32 = 0x8000_0008;
const LEAF_AMD_SVM: u32 = 0x8000_000a;

/// How the names of the vendors begin whose cores are counted by `CMP_LEGACY`: "AuthenticAMD", "HygonGenuine".
const AMD_VENDORS: [u32; 2] = [u32::from_le_bytes(*b"Auth"), u32::from_le_bytes(*b"Hygo")];

/// Of leaf 1: nested virtualisation (its state is not saved), the deadline timer, "runs under a hypervisor", several threads.
const ECX_VMX: u32 = 1 << 5;
const ECX_TSC_DEADLINE: u32 = 1 << 24;
const ECX_HYPERVISOR: u32 = 1 << 31;
const EDX_HTT: u32 = 1 << 28;
/// Of leaf 0x8000_0001: several cores by the old way; nested virtualisation; AMD's own topology leaves, which name host cores.
const ECX_CMP_LEGACY: u32 = 1 << 1;
const ECX_SVM: u32 = 1 << 2;
const ECX_TOPOEXT: u32 = 1 << 22;
/// Of leaf 0x8000_0007: a TSC that never changes its rate. Another host has another rate.
const EDX_INVARIANT_TSC: u32 = 1 << 8;

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

/// The CPUID of one vCPU.
pub(crate) fn cpuid_of(host: &CpuId, topology: Topology, index: u32) -> CpuId {
    let is_topology = |entry: &&kvm_cpuid_entry2| {
        !matches!(entry.function, LEAF_TOPOLOGY | LEAF_TOPOLOGY_V2 | LEAF_AMD_SVM)
    };
    let mut entries: Vec<_> = host.as_slice().iter().filter(is_topology).copied().collect();
    let is_amd =
        entries.iter().any(|entry| entry.function == LEAF_VENDOR && AMD_VENDORS.contains(&entry.ebx));
    for entry in &mut entries {
        adapt(entry, topology, index, is_amd);
    }
    let has = |leaf| host.as_slice().iter().any(|entry| entry.function == leaf);
    for leaf in [LEAF_TOPOLOGY, LEAF_TOPOLOGY_V2].into_iter().filter(|leaf| has(*leaf)) {
        entries.extend(topology_leaf(leaf, topology, index));
    }
    CpuId::from_entries(&entries).expect("as many entries as the host has, and at most four more")
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
        LEAF_AMD_POWER => entry.edx &= !EDX_INVARIANT_TSC,
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
        let guest = cpuid_of(&host, Topology { vcpus, has_deadline_timer: true }, index);
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
    fn each_vcpu_has_its_place_in_one_socket() {
        let guest = shown(3, 2);
        assert_eq!(guest(LEAF_FEATURES).ebx >> 24, 2);
        assert_eq!(guest(LEAF_FEATURES).ebx >> 16 & 0xff, 3);
        assert_eq!((guest(LEAF_TOPOLOGY).eax, guest(LEAF_TOPOLOGY).ebx, guest(LEAF_TOPOLOGY).edx), (2, 3, 2));
        assert_eq!(guest(LEAF_AMD_SIZES).ecx, 2 << 12 | 2);
        assert_eq!(shown(1, 0)(LEAF_FEATURES).edx & EDX_HTT, 0);
    }
}
