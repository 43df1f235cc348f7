//! What guest memory is made of: which hosts have huge pages for a VM.
//!
//! A host tells how much memory its kernel keeps in huge pages; what VMs have reserved of it follows from the state, as for
//! memory itself. Somebody else may have taken some meanwhile: then the VM's process says so when it can't have them.

use super::{Applied, Change, placement::Reserved};
use crate::{
    PoolState,
    outcome::Outcome,
    rejection::MemoryRejection,
    state::{Host, MigrationOptions, Vm},
};
use proto::{ByteCount, HostId, MemoryPages, VmId};

impl PoolState {
    /// Everything that forbids a move in this way, besides [`Self::migration_blockers`].
    #[must_use]
    pub fn option_blockers(&self, vm: VmId, options: &MigrationOptions) -> Vec<MemoryRejection> {
        let is_huge = |vm: &&Vm| vm.spec.pages.is_huge();
        let vm = self.vms.get(&vm).filter(is_huge).filter(|_| options.policy.is_on_demand());
        vm.map(|vm| MemoryRejection::HugePagesOnDemand { vm: vm.name.clone() }).into_iter().collect()
    }
}

/// Checks that memory is whole pages of its kind.
pub(super) fn check_pages(memory: ByteCount, pages: MemoryPages) -> Result<(), MemoryRejection> {
    let is_whole = memory.0.is_multiple_of(pages.bytes().0);
    if is_whole { Ok(()) } else { Err(MemoryRejection::NotWholeHugePages { memory }) }
}

/// What keeps a VM with huge pages from a host of which so much is reserved.
pub(super) fn obstacle(vm: &Vm, host: &Host, reserved: Reserved) -> Option<MemoryRejection> {
    let free = ByteCount(host.huge_memory.0.saturating_sub(reserved.huge_memory.0));
    (vm.spec.pages.is_huge() && free < vm.spec.memory).then(|| MemoryRejection::HugePagesShort {
        vm: vm.name.clone(),
        host: host.name.clone(),
        total: host.huge_memory,
        free,
        needed: vm.spec.memory,
    })
}

impl Change<'_> {
    pub(super) fn set_host_huge_memory(&mut self, id: HostId, memory: ByteCount) -> Applied {
        self.check_member(id)?;
        self.host_mut(id)?.huge_memory = memory;
        Ok(Outcome::Host(id))
    }
}
