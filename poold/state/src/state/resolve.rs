//! From what an operator typed to an object: a name, an id such as `vm-17`, or a unique prefix of either.

use super::{
    Cluster, DEFAULT_CLUSTER, Group, Host, Image, Migration, Network, PoolState, Snapshot, Table, Task, Vm,
    Volume,
};
use crate::rejection::{ObjectKind, Rejection};
use std::fmt::Display;

/// Matches of an ambiguous reference that are named.
const MATCHES_SHOWN: usize = 4;

impl PoolState {
    /// The host that is meant; removed ones are not found by name.
    ///
    /// # Errors
    /// When none or several match.
    pub fn resolve_host(&self, text: &str) -> Result<&Host, Rejection> {
        if let Some(host) = text.parse().ok().and_then(|id| self.hosts.get(&id)) {
            return if host.is_member() {
                Ok(host)
            } else {
                Err(Rejection::HostRemoved { host: host.name.clone() })
            };
        }
        resolve(ObjectKind::Host, text, self.members().map(|host| (host.id, host.name.as_str(), host)))
    }

    /// The VM that is meant.
    ///
    /// # Errors
    /// When none or several match.
    pub fn resolve_vm(&self, text: &str) -> Result<&Vm, Rejection> {
        resolve(ObjectKind::Vm, text, named(&self.vms, |vm| &vm.name))
    }

    /// The volume that is meant.
    ///
    /// # Errors
    /// When none or several match.
    pub fn resolve_volume(&self, text: &str) -> Result<&Volume, Rejection> {
        resolve(ObjectKind::Volume, text, named(&self.volumes, |volume| &volume.name))
    }

    /// The snapshot that is meant: its id, or `VOLUME@NAME`, or its name where no other volume has a snapshot of that name.
    ///
    /// # Errors
    /// When none or several match.
    pub fn resolve_snapshot(&self, text: &str) -> Result<&Snapshot, Rejection> {
        let Some((volume, name)) = text.split_once('@') else {
            return resolve(ObjectKind::Snapshot, text, named(&self.snapshots, |snapshot| &snapshot.name));
        };
        let volume = self.resolve_volume(volume)?.id;
        let of_volume = named(&self.snapshots, |snapshot| snapshot.name.as_str());
        let of_volume = of_volume.filter(|(_, _, snapshot)| snapshot.volume == volume);
        resolve(ObjectKind::Snapshot, name, of_volume)
    }

    /// The image that is meant.
    ///
    /// # Errors
    /// When none or several match.
    pub fn resolve_image(&self, text: &str) -> Result<&Image, Rejection> {
        resolve(ObjectKind::Image, text, named(&self.images, |image| &image.name))
    }

    /// The group that is meant.
    ///
    /// # Errors
    /// When none or several match.
    pub fn resolve_group(&self, text: &str) -> Result<&Group, Rejection> {
        resolve(ObjectKind::Group, text, named(&self.groups, |group| &group.name))
    }

    /// The cluster that is meant; none: the default one.
    ///
    /// # Errors
    /// When none or several match.
    pub fn resolve_cluster(&self, text: &str) -> Result<Option<&Cluster>, Rejection> {
        if text == DEFAULT_CLUSTER {
            return Ok(None);
        }
        resolve(ObjectKind::Cluster, text, named(&self.clusters, |cluster| &cluster.name)).map(Some)
    }

    /// The network that is meant.
    ///
    /// # Errors
    /// When none or several match.
    pub fn resolve_network(&self, text: &str) -> Result<&Network, Rejection> {
        resolve(ObjectKind::Network, text, named(&self.networks, |network| &network.name))
    }

    /// The task that is meant; tasks have no names.
    ///
    /// # Errors
    /// When none or several match.
    pub fn resolve_task(&self, text: &str) -> Result<&Task, Rejection> {
        resolve(ObjectKind::Task, text, named(&self.tasks, |_| ""))
    }

    /// The migration that is meant; migrations have no names.
    ///
    /// # Errors
    /// When none or several match.
    pub fn resolve_migration(&self, text: &str) -> Result<&Migration, Rejection> {
        resolve(ObjectKind::Migration, text, named(&self.migrations, |_| ""))
    }
}

fn named<'a, K: Ord + Clone + 'a, V: Clone + 'a>(
    table: &'a Table<K, V>,
    name: impl Fn(&'a V) -> &'a str + 'a,
) -> impl Iterator<Item = (K, &'a str, &'a V)> {
    table.iter().map(move |(id, value)| (id.clone(), name(value), value))
}

/// An exact name or id wins over prefixes.
fn resolve<'a, K: Display, V>(
    kind: ObjectKind,
    text: &str,
    candidates: impl Iterator<Item = (K, &'a str, &'a V)>,
) -> Result<&'a V, Rejection> {
    let not_found = || Rejection::NotFound { kind, text: text.to_owned() };
    if text.is_empty() {
        return Err(not_found());
    }
    let mut found: Option<&V> = None;
    let mut matches = Vec::new();
    let mut count = 0;
    for (id, name, value) in candidates {
        let id = id.to_string();
        if name == text || id == text {
            return Ok(value);
        }
        if name.starts_with(text) || id.starts_with(text) {
            count += 1;
            found = Some(value);
            if matches.len() < MATCHES_SHOWN {
                matches.push(if name.is_empty() { id } else { name.to_owned() });
            }
        }
    }
    match found {
        Some(value) if count == 1 => Ok(value),
        Some(_) => Err(Rejection::Ambiguous { kind, text: text.to_owned(), matches }),
        None => Err(not_found()),
    }
}
