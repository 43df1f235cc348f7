//! Clusters: which hosts support their profiles, and which VMs may be where.
//!
//! ```text
//!  default: profile of the pool          c1: x86-64-v3
//!  h1 h2 h3 ── VMs stay among them        h4 h5 ── VMs stay among them
//! ```
//! A host enters a cluster without VMs, and only when it supports the profile, so whatever runs in a cluster moves to each of its
//! hosts. A host whose processor becomes another one later (a setting of its firmware) stays a member, but gets no VM there.

use super::{Applied, Change, check_name, check_room};
use crate::{
    PoolState,
    command::ClusterCommand,
    limits::CLUSTERS_MAX,
    outcome::Outcome,
    rejection::{ClusterRejection, ObjectKind, Rejection},
    state::{Cluster, DEFAULT_CLUSTER, EventKind, Host, Vm},
};
use proto::{ClusterId, CpuFeatures, CpuProfile, HostId, VmId};

impl PoolState {
    /// What guests see in a cluster whose VM names no profile of its own.
    #[must_use]
    pub fn cluster_profile(&self, cluster: Option<ClusterId>) -> CpuProfile {
        let cluster = cluster.and_then(|id| self.clusters.get(&id));
        cluster.map_or(self.settings.cpu_profile, |cluster| cluster.cpu_profile)
    }

    /// What keeps a VM from a host by their clusters.
    pub(super) fn cluster_obstacle(&self, vm: &Vm, host: &Host) -> Option<Rejection> {
        if vm.spec.cluster != host.cluster {
            let (cluster, other) = (self.cluster_name(vm.spec.cluster), self.cluster_name(host.cluster));
            let (vm, host) = (vm.name.clone(), host.name.clone());
            return Some(ClusterRejection::Outside { vm, cluster, host, other }.into());
        }
        let cluster = host.cluster.and_then(|id| self.clusters.get(&id))?;
        lacks(host, cluster).map(Into::into)
    }

    /// Checks that a host can be in a cluster together with those that are.
    fn check_supports(&self, host: &Host, cluster: &Cluster) -> Result<(), ClusterRejection> {
        if host.cpu.features.is_unknown() {
            return Err(ClusterRejection::CpuUnknown { host: host.name.clone() });
        }
        if let Some(rejection) = lacks(host, cluster) {
            return Err(rejection);
        }
        let others = self.members().filter(|other| other.cluster == Some(cluster.id) && other.id != host.id);
        for other in others {
            if let Some(difference) = difference(host, other, cluster.cpu_profile) {
                return Err(ClusterRejection::CpuDiffers {
                    host: host.name.clone(),
                    other: other.name.clone(),
                    cluster: cluster.name.clone(),
                    difference,
                });
            }
        }
        Ok(())
    }
}

/// What a profile asks of every host by itself. The others follow from the hosts.
fn demanded(profile: CpuProfile) -> CpuFeatures {
    match profile {
        CpuProfile::HostCommon | CpuProfile::Host => CpuFeatures::default(),
        CpuProfile::Level2 | CpuProfile::Level3 => {
            profile.resolve(&CpuFeatures::default(), &CpuFeatures::default())
        }
    }
}

fn lacks(host: &Host, cluster: &Cluster) -> Option<ClusterRejection> {
    if host.cpu.features.is_unknown() {
        return None;
    }
    let missing = demanded(cluster.cpu_profile).missing_in(&host.cpu.features);
    (!missing.is_empty()).then(|| ClusterRejection::CpuLacks {
        host: host.name.clone(),
        cluster: cluster.name.clone(),
        profile: cluster.cpu_profile,
        missing: missing.join(", "),
    })
}

/// What would keep VMs of a profile from moving between two hosts, for ever.
fn difference(host: &Host, other: &Host, profile: CpuProfile) -> Option<String> {
    if host.cpu_vendor != other.cpu_vendor {
        return Some(format!("`{}` instead of `{}`", host.cpu_vendor, other.cpu_vendor));
    }
    if !host.cpu.keeps_tsc_at(&other.cpu) || !other.cpu.keeps_tsc_at(&host.cpu) {
        return Some(format!("a TSC of {} kHz instead of {} kHz", host.cpu.tsc_khz, other.cpu.tsc_khz));
    }
    if profile != CpuProfile::Host || other.cpu.features.is_unknown() {
        return None;
    }
    let (more, less) = (
        host.cpu.features.missing_in(&other.cpu.features),
        other.cpu.features.missing_in(&host.cpu.features),
    );
    let told =
        |word: &str, names: &[String]| (!names.is_empty()).then(|| format!("{word} {}", names.join(", ")));
    let told: Vec<String> = told("it also has", &more).into_iter().chain(told("it lacks", &less)).collect();
    (!told.is_empty()).then(|| told.join("; "))
}

impl Change<'_> {
    pub(super) fn change_cluster(&mut self, command: &ClusterCommand) -> Applied {
        match command {
            ClusterCommand::CreateCluster { name, cpu_profile } => self.create_cluster(name, *cpu_profile),
            ClusterCommand::DeleteCluster { cluster } => self.delete_cluster(*cluster),
            ClusterCommand::SetHostCluster { host, cluster } => self.set_host_cluster(*host, *cluster),
            ClusterCommand::SetVmCluster { vm, cluster } => self.set_vm_cluster(*vm, *cluster),
        }
    }

    fn create_cluster(&mut self, name: &str, cpu_profile: CpuProfile) -> Applied {
        if name == DEFAULT_CLUSTER {
            return Err(ClusterRejection::IsDefault.into());
        }
        let names = self.state.clusters.values().map(|cluster| cluster.name.as_str());
        check_name(ObjectKind::Cluster, name, names)?;
        check_room(ObjectKind::Cluster, self.state.clusters.len(), CLUSTERS_MAX)?;
        let id = ClusterId(self.index);
        self.state.clusters.insert(id, Cluster { id, name: name.to_owned(), cpu_profile });
        let message = format!("created with CPU profile {cpu_profile} by {}", self.principal);
        self.event(EventKind::Cluster, format!("cluster {name}"), message);
        Ok(Outcome::Cluster(id))
    }

    fn delete_cluster(&mut self, id: ClusterId) -> Applied {
        let cluster = self.state.cluster(id)?.name.clone();
        let hosts = self.state.members().filter(|host| host.cluster == Some(id)).count() as u64;
        let vms = self.state.vms.values().filter(|vm| vm.spec.cluster == Some(id)).count() as u64;
        if hosts + vms > 0 {
            return Err(ClusterRejection::NotEmpty { cluster, hosts, vms }.into());
        }
        self.state.clusters.remove(&id);
        self.event(
            EventKind::Cluster,
            format!("cluster {cluster}"),
            format!("deleted by {}", self.principal),
        );
        Ok(Outcome::Cluster(id))
    }

    fn set_host_cluster(&mut self, id: HostId, cluster: Option<ClusterId>) -> Applied {
        self.check_member(id)?;
        let host = self.state.host(id)?;
        let to = cluster.map(|cluster| self.state.cluster(cluster)).transpose()?;
        if host.cluster == cluster {
            return Ok(Outcome::Host(id));
        }
        let vms = self.state.vms.values().filter(|vm| self.state.occupies(vm).any(|at| at == id));
        let vms: Vec<&Vm> = vms.collect();
        if let Some(vm) = vms.first() {
            let (host, example) = (host.name.clone(), vm.name.clone());
            return Err(Rejection::HostHasVms { host, count: vms.len() as u64, example });
        }
        if let Some(to) = to {
            self.state.check_supports(host, to)?;
        }
        self.host_mut(id)?.cluster = cluster;
        let (host, cluster) = (self.state.host_name(id), self.state.cluster_name(cluster));
        let message = format!("has host {host} now, by {}", self.principal);
        self.event(EventKind::Cluster, format!("cluster {cluster}"), message);
        Ok(Outcome::Host(id))
    }

    fn set_vm_cluster(&mut self, id: VmId, cluster: Option<ClusterId>) -> Applied {
        let vm = self.state.vm(id)?;
        if let Some(cluster) = cluster {
            self.state.cluster(cluster)?;
        }
        if vm.spec.cluster == cluster {
            return Ok(Outcome::Vm(id));
        }
        if vm.placement.is_some() {
            return Err(Rejection::VmNotStopped { vm: vm.name.clone() });
        }
        let vm = self.vm_mut(id)?;
        vm.spec.cluster = cluster;
        // A drain took it from a host of the other cluster.
        vm.home = None;
        let (vm, cluster) = (vm.name.clone(), self.state.cluster_name(cluster));
        let message = format!("has VM {vm} now, by {}", self.principal);
        self.event(EventKind::Cluster, format!("cluster {cluster}"), message);
        Ok(Outcome::Vm(id))
    }
}
