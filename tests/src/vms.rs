//! VMs, volumes and images of a pool, through `poolctl`.

use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::time::Duration;

use crate::probe::{self, Summary};
use crate::process::VmProcess;
use crate::wait::{wait_for, wait_until};
use crate::{Pool, build_probe};

/// What a VM of a test shall be like. The kernel is the probe guest.
#[derive(Debug, Clone)]
pub struct VmSpec<'a> {
    /// Its name.
    pub name: &'a str,
    /// Memory, as an operator writes it.
    pub memory: &'a str,
    /// Volumes.
    pub disks: &'a [&'a str],
    /// Kernel command line: what the probe guest shall do.
    pub cmdline: &'a str,
    /// `restart` or `none`.
    pub ha: &'a str,
}

/// A guest boots, verifies its disk and beats within this, with everything else on two cores.
pub const BOOT_DEADLINE: Duration = Duration::from_secs(60);

/// Name under which the probe guest is imported.
pub const PROBE_IMAGE: &str = "probe";

/// Work of a probe guest that fits into any test: a small working set and steady disk writes, a fifth of a processor in all.
pub const PROBE_LIGHT: &str = "wss=1M rate=16M disk=1";

/// The same, waiting in a loop: whoever judges by its processor time whether it runs can't miss it, however fast the machine is.
pub const PROBE_BUSY: &str = "wss=1M rate=16M disk=1 busy=1";

/// The number in the id of a VM as `poolctl` shows it.
#[must_use]
pub fn vm_number(vm: &Value) -> Option<u64> {
    vm["id"].as_str()?.strip_prefix("vm-")?.parse().ok()
}

impl Pool {
    /// A VM with the probe guest and one volume with as many replicas as hosts, up to three; started, and seen to beat.
    ///
    /// # Errors
    /// When a step fails.
    pub fn start_probe(
        &self,
        name: &str,
        memory: &str,
        cmdline: &str,
        host: Option<&str>,
    ) -> Result<Summary> {
        if !self.items(&["image", "list"])?.iter().any(|image| image["name"] == PROBE_IMAGE) {
            self.import_probe()?;
        }
        let disk = format!("{name}-disk");
        self.create_volume(&disk, "16MiB", u32::try_from(self.hosts().len().min(3))?)?;
        self.create_vm(&VmSpec { name, memory, disks: &[&disk], cmdline, ha: "restart" })?;
        self.start_vm(name, host)?;
        self.wait_probe(name, BOOT_DEADLINE, "boots and writes", |now| now.beat > 0 && now.acked > 0)
    }

    /// Imports the probe guest.
    ///
    /// # Errors
    /// When it can't be built or imported.
    pub fn import_probe(&self) -> Result<()> {
        let path = build_probe()?;
        let path = path.to_str().context("the path of the probe guest is text")?;
        self.json(&["image", "import", PROBE_IMAGE, path]).map(drop)
    }

    /// Makes a volume.
    ///
    /// # Errors
    /// When `poolctl` fails.
    pub fn create_volume(&self, name: &str, size: &str, replicas: u32) -> Result<Value> {
        self.json(&["volume", "create", name, "--size", size, "--replicas", &replicas.to_string()])
    }

    /// Waits until a volume has so many replicas, and all of them are in sync.
    ///
    /// # Errors
    /// At the deadline.
    pub fn wait_in_sync(&self, volume: &str, replicas: usize, deadline: Duration) -> Result<()> {
        wait_for(deadline, &format!("all {replicas} replicas of {volume} are in sync"), || {
            let volume = self.json(&["volume", "show", volume])?;
            let found = volume["replicas"].as_array().context("a volume has replicas")?;
            Ok(found.len() == replicas && found.iter().all(|replica| replica["state"] == "in-sync"))
        })
    }

    /// Makes a VM that boots the probe guest.
    ///
    /// # Errors
    /// When `poolctl` fails.
    pub fn create_vm(&self, spec: &VmSpec<'_>) -> Result<Value> {
        let mut arguments = vec!["vm", "create", spec.name, "--vcpus", "1", "--memory", spec.memory];
        arguments.extend(["--kernel", PROBE_IMAGE, "--cmdline", spec.cmdline, "--ha", spec.ha]);
        for disk in spec.disks {
            arguments.extend(["--disk", disk]);
        }
        self.json(&arguments)
    }

    /// Starts a VM and waits until it runs.
    ///
    /// # Errors
    /// When `poolctl` fails.
    pub fn start_vm(&self, name: &str, host: Option<&str>) -> Result<()> {
        let mut arguments = vec!["vm", "start", name];
        arguments.extend(host.map(|host| ["--host", host]).into_iter().flatten());
        self.json(&arguments).map(drop)
    }

    /// `vm show`.
    ///
    /// # Errors
    /// When `poolctl` fails.
    pub fn vm(&self, name: &str) -> Result<Value> {
        self.json(&["vm", "show", name])
    }

    /// Name of the host that the VM is placed on.
    ///
    /// # Errors
    /// When it has no placement.
    pub fn vm_host(&self, name: &str) -> Result<String> {
        let vm = self.vm(name)?;
        match vm["host"].as_str() {
            Some(host) if !host.is_empty() => Ok(host.to_owned()),
            _ => bail!("vm {name} has no host: {vm}"),
        }
    }

    /// The process that runs the VM now: that of its host with the highest epoch.
    ///
    /// # Errors
    /// When its host has none.
    pub fn vm_process(&self, name: &str) -> Result<VmProcess> {
        let vm = self.vm(name)?;
        let id = vm_number(&vm).with_context(|| format!("no id in {vm}"))?;
        let host = vm["host"].as_str().unwrap_or_default();
        let processes = self.host_named(host)?.vm_processes();
        let newest =
            processes.into_iter().filter(|process| process.vm == id).max_by_key(|process| process.epoch);
        newest.with_context(|| format!("no process of vm {name} at {host}"))
    }

    /// What the pool keeps of the VM's serial console.
    ///
    /// # Errors
    /// When `poolctl` fails.
    pub fn console(&self, name: &str) -> Result<String> {
        Ok(self.poolctl(&["console", "log", name])?.ok()?.stdout)
    }

    /// What the probe guest has said.
    ///
    /// # Errors
    /// When `poolctl` fails.
    pub fn probe(&self, name: &str) -> Result<Summary> {
        Ok(Summary::of(&probe::parse(&self.console(name)?)))
    }

    /// Waits until what the probe guest has said fulfils `holds`, and returns it.
    ///
    /// # Errors
    /// At the deadline, or at once when the guest reports an inconsistency.
    pub fn wait_probe(
        &self,
        name: &str,
        deadline: Duration,
        what: &str,
        mut holds: impl FnMut(&Summary) -> bool,
    ) -> Result<Summary> {
        let summary = wait_until(deadline, &format!("vm {name}: {what}"), || {
            let summary = self.probe(name)?;
            Ok((!summary.errors.is_empty() || holds(&summary)).then_some(summary))
        })
        .with_context(|| self.describe(name))?;
        if !summary.errors.is_empty() {
            bail!("vm {name} found itself damaged: {:?}", summary.errors);
        }
        Ok(summary)
    }

    /// Waits until the probe guest has beaten `more` times more than now.
    ///
    /// # Errors
    /// As [`Pool::wait_probe`].
    pub fn wait_beats(&self, name: &str, more: u64, deadline: Duration) -> Result<Summary> {
        let before = self.probe(name).map(|summary| summary.beat).unwrap_or(0);
        self.wait_probe(name, deadline, &format!("beats {more} times more"), |now| now.beat >= before + more)
    }

    /// What is known of a VM, for the message of a failed test.
    fn describe(&self, name: &str) -> String {
        let vm = self.vm(name).map_or_else(|error| format!("{error:#}"), |vm| vm.to_string());
        let console = self.console(name).unwrap_or_default();
        let tail: Vec<&str> = console.lines().rev().take(5).collect();
        format!("vm: {vm}\nend of its console, newest first: {tail:#?}")
    }
}
