//! VMs and their consoles.

use super::{NicView, bytes, words};
use crate::output::Object;
use proto::{VmId, v1};
use serde::Serialize;

/// A VM.
#[derive(Debug, Serialize)]
pub struct VmView {
    id: String,
    name: String,
    state: String,
    host: String,
    epoch: u64,
    vcpus: u32,
    memory_bytes: u64,
    disks: Vec<String>,
    kernel: String,
    initrd: String,
    cmdline: String,
    ha: String,
    problem: String,
    revision: u64,
    ha_priority: u32,
    home: String,
    nics: Vec<NicView>,
    cpu_profile: String,
    cluster: String,
    huge_pages: bool,
}

impl VmView {
    /// `running at h2`, or its state alone when it has no host.
    #[must_use]
    pub fn whereabouts(&self) -> String {
        match self.host.as_str() {
            "" => self.state.clone(),
            host => format!("{} at {host}", self.state),
        }
    }
}

impl From<v1::Vm> for VmView {
    fn from(vm: v1::Vm) -> Self {
        Self {
            id: VmId(vm.id).to_string(),
            name: vm.name,
            state: vm.state,
            host: vm.host,
            epoch: vm.epoch,
            vcpus: vm.vcpus,
            memory_bytes: vm.memory_bytes,
            disks: vm.disks,
            kernel: vm.kernel,
            initrd: vm.initrd,
            cmdline: vm.cmdline,
            ha: vm.ha,
            problem: vm.problem,
            revision: vm.revision,
            ha_priority: vm.ha_priority,
            home: vm.home,
            nics: vm.nics.into_iter().map(NicView::from).collect(),
            cpu_profile: vm.cpu_profile,
            cluster: vm.cluster,
            huge_pages: vm.huge_pages,
        }
    }
}

impl Object for VmView {
    const KIND: &'static str = "Vm";
    const COLUMNS: &'static [&'static str] = &["NAME", "STATE", "HOST", "VCPUS", "MEMORY", "PROBLEM"];
    const WIDE: &'static [&'static str] = &[
        "ID",
        "EPOCH",
        "HA",
        "PRIORITY",
        "DISKS",
        "KERNEL",
        "INITRD",
        "CMDLINE",
        "HOME",
        "NICS",
        "CPU",
        "CLUSTER",
        "HUGE PAGES",
    ];

    fn name(&self) -> String {
        self.name.clone()
    }

    fn cells(&self) -> Vec<String> {
        vec![
            self.name.clone(),
            self.state.clone(),
            self.host.clone(),
            self.vcpus.to_string(),
            bytes(self.memory_bytes),
            self.problem.clone(),
            self.id.clone(),
            self.epoch.to_string(),
            self.ha.clone(),
            self.ha_priority.to_string(),
            words(&self.disks),
            self.kernel.clone(),
            self.initrd.clone(),
            self.cmdline.clone(),
            self.home.clone(),
            words(&self.nics.iter().map(NicView::text).collect::<Vec<_>>()),
            self.cpu_profile.clone(),
            self.cluster.clone(),
            if self.huge_pages { "yes" } else { "no" }.to_owned(),
        ]
    }
}

/// Why a VM is where it is, or why it doesn't run.
#[derive(Debug, Serialize)]
pub struct ExplanationView {
    vm: String,
    state: String,
    host: String,
    reasons: Vec<String>,
    hosts: Vec<VerdictView>,
    revision: u64,
}

/// What the pool thinks of one host for the VM.
#[derive(Debug, Serialize)]
struct VerdictView {
    host: String,
    fits: bool,
    rank: u32,
    reasons: Vec<String>,
}

impl From<v1::VmExplanation> for ExplanationView {
    fn from(answer: v1::VmExplanation) -> Self {
        let verdict = |verdict: v1::HostVerdict| VerdictView {
            host: verdict.host,
            fits: verdict.fits,
            rank: verdict.rank,
            reasons: verdict.reasons,
        };
        Self {
            vm: answer.vm,
            state: answer.state,
            host: answer.host,
            reasons: answer.reasons,
            hosts: answer.hosts.into_iter().map(verdict).collect(),
            revision: answer.revision,
        }
    }
}

impl ExplanationView {
    /// For people: sentences rather than cells.
    #[must_use]
    pub fn text(&self) -> String {
        let place = if self.host.is_empty() { String::new() } else { format!(" at {}", self.host) };
        let mut text = format!("vm {} is {}{place}\n", self.vm, self.state);
        text.extend(self.reasons.iter().map(|reason| format!("  {reason}\n")));
        for verdict in &self.hosts {
            let word = if verdict.fits { format!("choice {}", verdict.rank) } else { "no choice".to_owned() };
            text += &format!("host {}: {word}: {}\n", verdict.host, verdict.reasons.join("; "));
        }
        text
    }
}

impl Object for ExplanationView {
    const KIND: &'static str = "VmExplanation";
    const COLUMNS: &'static [&'static str] = &["VM", "STATE", "HOST", "REASONS"];
    const WIDE: &'static [&'static str] = &[];

    fn name(&self) -> String {
        self.vm.clone()
    }

    fn cells(&self) -> Vec<String> {
        vec![self.vm.clone(), self.state.clone(), self.host.clone(), self.reasons.join("; ")]
    }
}

/// A piece of a VM's serial output.
#[derive(Debug, Serialize)]
pub struct ConsoleView {
    /// The VM, as the operator named it.
    vm: String,
    /// Bytes ever written before `text`.
    offset: u64,
    /// The output; bytes that are no UTF-8 are replaced.
    text: String,
}

impl ConsoleView {
    /// A piece of output of `vm`.
    #[must_use]
    pub fn new(vm: &str, piece: &v1::ConsoleLogResponse) -> Self {
        let text = String::from_utf8_lossy(&piece.data).into_owned();
        Self { vm: vm.to_owned(), offset: piece.offset, text }
    }
}

impl Object for ConsoleView {
    const KIND: &'static str = "ConsoleLog";
    const COLUMNS: &'static [&'static str] = &["TEXT"];
    const WIDE: &'static [&'static str] = &[];

    fn name(&self) -> String {
        self.vm.clone()
    }

    fn cells(&self) -> Vec<String> {
        vec![self.text.clone()]
    }
}
