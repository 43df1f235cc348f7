//! Refusals about clusters.

use super::RejectionClass;
use proto::CpuProfile;
use serde::{Deserialize, Serialize};

/// Why a host or VM can't be in a cluster, or a cluster can't be changed. Fields hold names.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
pub enum ClusterRejection {
    /// It still has members.
    #[error("cluster {cluster} has {hosts} hosts and {vms} VMs")]
    NotEmpty {
        /// The cluster.
        cluster: String,
        /// Hosts in it.
        hosts: u64,
        /// VMs in it.
        vms: u64,
    },
    /// The pool's own cluster has always been there, and stays.
    #[error("cluster default can't be made or deleted")]
    IsDefault,
    /// The host has not told its processor yet, so nobody knows what it supports.
    #[error("host {host} has not told its processor yet")]
    CpuUnknown {
        /// The host.
        host: String,
    },
    /// The host lacks features of the profile.
    #[error(
        "host {host} does not support {profile}, the CPU profile of cluster {cluster}: it lacks {missing}"
    )]
    CpuLacks {
        /// The host.
        host: String,
        /// The cluster.
        cluster: String,
        /// Its profile.
        profile: CpuProfile,
        /// What the host lacks.
        missing: String,
    },
    /// VMs could not move between the host and another one of the cluster.
    #[error("host {host} has another CPU than host {other} of cluster {cluster}: {difference}")]
    CpuDiffers {
        /// The host.
        host: String,
        /// A host of the cluster.
        other: String,
        /// The cluster.
        cluster: String,
        /// What differs.
        difference: String,
    },
    /// The VM belongs to other hosts.
    #[error("VM {vm} is of cluster {cluster}, and host {host} of cluster {other}")]
    Outside {
        /// The VM.
        vm: String,
        /// Its cluster.
        cluster: String,
        /// The host.
        host: String,
        /// The host's cluster.
        other: String,
    },
}

impl ClusterRejection {
    /// Stable upper-case code.
    #[must_use]
    pub fn reason_code(&self) -> &'static str {
        match self {
            Self::NotEmpty { .. } => "CLUSTER_NOT_EMPTY",
            Self::IsDefault => "CLUSTER_IS_DEFAULT",
            Self::CpuUnknown { .. } => "HOST_CPU_UNKNOWN",
            Self::CpuLacks { .. } => "CLUSTER_CPU_LACKS_FEATURES",
            Self::CpuDiffers { .. } => "CLUSTER_CPU_DIFFERS",
            Self::Outside { .. } => "OUTSIDE_CLUSTER",
        }
    }

    /// What kind of refusal it is.
    #[must_use]
    pub fn class(&self) -> RejectionClass {
        match self {
            Self::IsDefault => RejectionClass::Invalid,
            _ => RejectionClass::Precondition,
        }
    }

    /// The object that it is about.
    #[must_use]
    pub fn object(&self) -> String {
        match self {
            Self::NotEmpty { cluster, .. } => format!("cluster {cluster}"),
            Self::IsDefault => "cluster default".into(),
            Self::CpuUnknown { host } | Self::CpuLacks { host, .. } | Self::CpuDiffers { host, .. } => {
                format!("host {host}")
            }
            Self::Outside { vm, .. } => format!("vm {vm}"),
        }
    }

    /// What to do next: one sentence or a command.
    #[must_use]
    pub fn remedy(&self) -> String {
        match self {
            Self::NotEmpty { cluster, .. } => {
                format!(
                    "`poolctl cluster show {cluster}` names them; `poolctl cluster add` puts them into another"
                )
            }
            Self::IsDefault => {
                "choose another name; `poolctl pool set cpu-profile=…` changes its profile".into()
            }
            Self::CpuUnknown { host } => format!("start poold on {host} once"),
            Self::CpuLacks { .. } | Self::CpuDiffers { .. } => {
                "make another cluster for it: `poolctl cluster create NAME --cpu-profile PROFILE`".into()
            }
            Self::Outside { vm, other, .. } => format!(
                "choose a host of its cluster, or stop it and `poolctl cluster add {other} --vm {vm}`"
            ),
        }
    }
}
