//! Groups.

use super::{Applied, Change, check_name, check_range, check_room, find_mut};
use crate::{
    command::{ChangeGroup, CreateGroup},
    limits::{GROUP_MEMBERS_MAX, GROUPS_MAX},
    outcome::Outcome,
    rejection::{Field, ObjectKind, Rejection},
    state::{EventKind, Group, GroupRule},
};
use proto::{GroupId, HostId, VmId};

impl Change<'_> {
    pub(super) fn create_group(&mut self, create: &CreateGroup) -> Applied {
        let names = self.state.groups.values().map(|group| group.name.as_str());
        check_name(ObjectKind::Group, &create.name, names)?;
        check_room(ObjectKind::Group, self.state.groups.len(), GROUPS_MAX)?;
        let id = GroupId(self.index);
        let mut group = Group {
            id,
            name: create.name.clone(),
            rule: create.rule,
            strength: create.strength,
            vms: create.vms.clone(),
            hosts: create.hosts.clone(),
        };
        self.check_group(&mut group)?;
        let message = format!("created: {} {}", group.strength.as_str(), group.rule.as_str());
        self.event(EventKind::Group, format!("group {}", group.name), message);
        self.state.groups.insert(id, group);
        Ok(Outcome::Group(id))
    }

    pub(super) fn change_group(&mut self, change: &ChangeGroup) -> Applied {
        let mut group = self.state.group(change.group)?.clone();
        group.vms.retain(|vm| !change.remove_vms.contains(vm));
        group.hosts.retain(|host| !change.remove_hosts.contains(host));
        group.vms.extend(&change.add_vms);
        group.hosts.extend(&change.add_hosts);
        self.check_group(&mut group)?;
        let message = format!("has {} VMs and {} hosts now", group.vms.len(), group.hosts.len());
        self.event(EventKind::Group, format!("group {}", group.name), message);
        self.state.groups.insert(group.id, group);
        Ok(Outcome::Group(change.group))
    }

    pub(super) fn delete_group(&mut self, id: GroupId) -> Applied {
        let name = self.state.group(id)?.name.clone();
        self.state.groups.remove(&id);
        self.event(EventKind::Group, format!("group {name}"), "deleted".into());
        Ok(Outcome::Group(id))
    }

    /// Brings the members in order and checks that each exists and has a meaning for the rule.
    fn check_group(&self, group: &mut Group) -> Result<(), Rejection> {
        group.vms.sort_unstable();
        group.vms.dedup();
        group.hosts.sort_unstable();
        group.hosts.dedup();
        group.vms.iter().try_for_each(|vm| self.state.vm(*vm).map(drop))?;
        group.hosts.iter().try_for_each(|host| self.check_member(*host))?;
        let hosts_max = match group.rule {
            GroupRule::Together | GroupRule::Apart => 0,
            GroupRule::OnHosts | GroupRule::NotOnHosts => GROUP_MEMBERS_MAX as u64,
        };
        check_range(Field::GroupVms, group.vms.len() as u64, 0, GROUP_MEMBERS_MAX as u64)?;
        check_range(Field::GroupHosts, group.hosts.len() as u64, 0, hosts_max)
    }

    /// A deleted VM leaves its groups.
    pub(super) fn take_vm_from_groups(&mut self, vm: VmId) -> Result<(), Rejection> {
        self.change_groups(|group| group.vms.contains(&vm), |group| group.vms.retain(|member| *member != vm))
    }

    /// A removed host leaves the groups.
    pub(super) fn take_host_from_groups(&mut self, host: HostId) -> Result<(), Rejection> {
        let leave = |group: &mut Group| group.hosts.retain(|member| *member != host);
        self.change_groups(|group| group.hosts.contains(&host), leave)
    }

    fn change_groups(
        &mut self,
        concerns: impl Fn(&Group) -> bool,
        change: impl Fn(&mut Group),
    ) -> Result<(), Rejection> {
        let concerned: Vec<GroupId> =
            self.state.groups.values().filter(|group| concerns(group)).map(|group| group.id).collect();
        for id in concerned {
            change(find_mut(&mut self.state.groups, &id, ObjectKind::Group)?);
        }
        Ok(())
    }
}
