//! A pool of real daemons.

use anyhow::{Context, Result};
use serde_json::Value;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::Duration;

use crate::disks::{Disk, DiskKind};
use crate::fabric::{Fabric, Network};
use crate::host::{FAULT_SOCKET, Place};
use crate::leftovers::{self, RUNS_DIR, Run};
use crate::output::{self, Output};
use crate::wait::{wait_for, wait_until};
use crate::{Binaries, Host, Traffic};

/// Longest run of one `poolctl` or `poold` command: above every deadline that the programs have themselves.
const COMMAND_DEADLINE: Duration = Duration::from_secs(90);
/// A host is up within this after its start: election, join and log replay on two busy cores.
const HOST_UP_DEADLINE: Duration = Duration::from_secs(30);

/// Timing profile of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Timing {
    /// Scaled down, for tests that wait for many leases.
    Fast,
    /// What an operator gets.
    Default,
}

impl Timing {
    /// Its name on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Fast => "fast",
            Self::Default => "default",
        }
    }
}

/// How the memory of a VM that moves is proved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proof {
    /// All of it at the pause, so that a lost write is found whichever page it hit.
    Full,
    /// What an operator gets.
    Default,
}

/// Whether daemons take faults.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Injection {
    /// As an operator's.
    None,
    /// By a socket, see [`Host::inject`].
    Faults,
}

/// What a pool shall be like.
#[derive(Debug, Clone)]
pub struct PoolBuilder {
    name: String,
    hosts: usize,
    spares: usize,
    network: Network,
    timing: Timing,
    vm_memory_bytes: Option<u64>,
    feature_level: Option<u32>,
    disk: Option<(DiskKind, u64)>,
    proof: Proof,
    injection: Injection,
    root: PathBuf,
    binaries: Option<Binaries>,
    keep: bool,
}

impl PoolBuilder {
    /// Name of the pool (`lab`).
    #[must_use]
    pub fn name(mut self, name: &str) -> Self {
        self.name = name.to_owned();
        self
    }

    /// Number of hosts (3).
    #[must_use]
    pub fn hosts(mut self, hosts: usize) -> Self {
        self.hosts = hosts;
        self
    }

    /// Machines beside the hosts that may join later (none).
    #[must_use]
    pub fn spares(mut self, spares: usize) -> Self {
        self.spares = spares;
        self
    }

    /// How they reach each other (loopback).
    #[must_use]
    pub fn network(mut self, network: Network) -> Self {
        self.network = network;
        self
    }

    /// Timing profile (default).
    #[must_use]
    pub fn timing(mut self, timing: Timing) -> Self {
        self.timing = timing;
        self
    }

    /// Bytes that VMs may use at each host (what the daemon finds).
    #[must_use]
    pub fn vm_memory_bytes(mut self, bytes: u64) -> Self {
        self.vm_memory_bytes = Some(bytes);
        self
    }

    /// The highest feature level that its daemons take part in (the newest).
    #[must_use]
    pub fn feature_level(mut self, level: u32) -> Self {
        self.feature_level = Some(level);
        self
    }

    /// Gives each host a disk of this kind and size (no limit). Needs root.
    #[must_use]
    pub fn disk(mut self, kind: DiskKind, bytes: u64) -> Self {
        self.disk = Some((kind, bytes));
        self
    }

    /// How memory is proved (all of it).
    #[must_use]
    pub fn proof(mut self, proof: Proof) -> Self {
        self.proof = proof;
        self
    }

    /// Whether faults can be injected into its daemons (they can't).
    #[must_use]
    pub fn injection(mut self, injection: Injection) -> Self {
        self.injection = injection;
        self
    }

    /// Folder for the run (`/tmp/pool-tests`); keep it short, unix sockets live below it.
    #[must_use]
    pub fn data_root(mut self, root: &Path) -> Self {
        root.clone_into(&mut self.root);
        self
    }

    /// Programs that are built already.
    #[must_use]
    pub fn binaries(mut self, binaries: Binaries) -> Self {
        self.binaries = Some(binaries);
        self
    }

    /// Leaves the logs in place at the end.
    #[must_use]
    pub fn keep_logs(mut self) -> Self {
        self.keep = true;
        self
    }

    /// Makes the pool and waits until every host is up.
    ///
    /// # Errors
    /// When a step fails; what was made so far is removed.
    pub fn start(self) -> Result<Pool> {
        let binaries = match &self.binaries {
            Some(binaries) => binaries.clone(),
            None => Binaries::build()?,
        };
        let run = Run::new(&self.root)?;
        let fabric = Fabric::new(self.network, &run.tag).inspect_err(|_| leftovers::remove_run(&run.dir))?;
        // From here on the drop of the pool cleans up.
        let (hosts, spares) = (self.hosts, self.spares);
        let mut pool = Pool { settings: self, binaries, run, fabric, hosts: Vec::new(), config: None };
        for _ in 0..hosts {
            pool.add_host()?;
        }
        for _ in 0..spares {
            pool.prepare_host()?;
        }
        pool.wait_hosts_up()?;
        Ok(pool)
    }
}

/// A running pool; its drop removes it.
#[derive(Debug)]
pub struct Pool {
    settings: PoolBuilder,
    binaries: Binaries,
    run: Run,
    fabric: Fabric,
    hosts: Vec<Host>,
    /// Of `poolctl`, for a pool that somebody else has made.
    config: Option<PathBuf>,
}

impl Pool {
    /// A pool to be.
    #[must_use]
    pub fn builder() -> PoolBuilder {
        PoolBuilder {
            name: "lab".to_owned(),
            hosts: 3,
            spares: 0,
            network: Network::Loopback,
            timing: Timing::Default,
            vm_memory_bytes: None,
            feature_level: None,
            disk: None,
            proof: Proof::Full,
            injection: Injection::None,
            root: PathBuf::from(RUNS_DIR),
            binaries: None,
            keep: false,
        }
    }

    /// A pool that somebody else has made, reached with his configuration of `poolctl`; its hosts can't be touched.
    ///
    /// # Errors
    /// When it doesn't answer.
    pub fn attach(config: &Path) -> Result<Self> {
        let settings = Self::builder();
        let binaries = Binaries::build()?;
        let run = Run::new(&settings.root)?;
        let (hosts, config) = (Vec::new(), Some(std::path::absolute(config)?));
        let mut pool = Self { settings, binaries, run, fabric: Fabric::Elsewhere, hosts, config };
        let names = pool.items(&["host", "list"])?;
        let names = names.iter().filter_map(|host| Some((host["name"].as_str()?, host["address"].as_str()?)));
        for (index, (name, address)) in names.enumerate() {
            let address = address.parse().with_context(|| format!("{name} has the address `{address}`"))?;
            pool.hosts.push(Host {
                index,
                name: name.to_owned(),
                data_dir: pool.run.dir.join(name),
                disk: None,
                log_path: pool.run.dir.join(format!("{name}.log")),
                address,
                serve: Vec::new(),
                daemon: Mutex::new(None),
                place: Place::Elsewhere,
            });
        }
        Ok(pool)
    }

    /// Its hosts, in the order in which they joined; spare ones are at the end.
    #[must_use]
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// Host by position, from 0.
    ///
    /// # Panics
    /// When there is none.
    #[must_use]
    pub fn host(&self, index: usize) -> &Host {
        &self.hosts[index]
    }

    /// Host by name.
    ///
    /// # Errors
    /// When there is none.
    pub fn host_named(&self, name: &str) -> Result<&Host> {
        self.hosts
            .iter()
            .find(|host| host.name == name)
            .with_context(|| format!("the pool has no host `{name}`"))
    }

    /// Any host but the named ones.
    ///
    /// # Errors
    /// When there is none.
    pub fn host_besides(&self, names: &[&str]) -> Result<&Host> {
        let other = self.hosts.iter().find(|host| !names.contains(&host.name.as_str()));
        other.with_context(|| format!("the pool has no host besides {names:?}"))
    }

    /// Folder of the run: `h1/` … data directories, `h1.log` … logs.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.run.dir
    }

    /// The administrator's configuration.
    #[must_use]
    pub fn admin_config(&self) -> PathBuf {
        self.config.clone().unwrap_or_else(|| self.run.dir.join("h1/admin.toml"))
    }

    /// Runs `poolctl`; any exit code is an answer.
    ///
    /// # Errors
    /// When it can't be run or hangs.
    pub fn poolctl(&self, arguments: &[&str]) -> Result<Output> {
        output::run(&mut self.poolctl_command(arguments), COMMAND_DEADLINE)
    }

    /// A `poolctl` command that is still to be run, e.g. at a terminal.
    #[must_use]
    pub fn poolctl_command(&self, arguments: &[&str]) -> std::process::Command {
        let mut command = self.fabric.at_operator(&self.binaries.poolctl);
        command.arg("--config").arg(self.admin_config()).args(arguments);
        command
    }

    /// Runs `poolctl … -o json` and returns what it prints.
    ///
    /// # Errors
    /// When the exit code is not 0 or the output is no JSON.
    pub fn json(&self, arguments: &[&str]) -> Result<Value> {
        self.poolctl(&[arguments, &["-o", "json"]].concat())?.ok()?.json()
    }

    /// The `items` of a list.
    ///
    /// # Errors
    /// As [`Pool::json`].
    pub fn items(&self, arguments: &[&str]) -> Result<Vec<Value>> {
        let list = self.json(arguments)?;
        list["items"]
            .as_array()
            .cloned()
            .with_context(|| format!("`items` of {arguments:?} is no list: {list}"))
    }

    /// Runs `poold` at a host, e.g. to join.
    ///
    /// # Errors
    /// When it can't be run or hangs.
    pub fn poold_at(&self, host: usize, arguments: &[&str]) -> Result<Output> {
        output::run(self.fabric.at_host(host, &self.binaries.poold).args(arguments), COMMAND_DEADLINE)
    }

    /// Makes a directory and an address for one more host, without joining it.
    ///
    /// # Errors
    /// When the network or the disk refuses.
    pub fn prepare_host(&mut self) -> Result<&Host> {
        let index = self.hosts.len();
        let address = self.fabric.add_host(index)?;
        let name = format!("h{}", index + 1);
        let data_dir = self.run.dir.join(&name);
        fs::create_dir_all(&data_dir)?;
        let mount = |(kind, bytes)| Disk::mount(kind, bytes, &self.run.dir, &data_dir);
        let disk = self.settings.disk.map(mount).transpose()?;
        let mut serve = self.fabric.at_host(index, &self.binaries.poold);
        serve.arg("serve").arg("--data").arg(&data_dir);
        if self.settings.proof == Proof::Full {
            serve.args(["--prove-memory", "full"]);
        }
        if self.settings.injection == Injection::Faults {
            serve.arg("--fault-socket").arg(data_dir.join(FAULT_SOCKET));
        }
        let words = std::iter::once(serve.get_program()).chain(serve.get_args());
        self.hosts.push(Host {
            index,
            log_path: self.run.dir.join(format!("{name}.log")),
            serve: words.map(ToOwned::to_owned).collect(),
            name,
            data_dir,
            disk,
            address,
            daemon: Mutex::new(None),
            place: Place::Here,
        });
        Ok(&self.hosts[index])
    }

    /// Adds a host: the first one makes the pool, the others join it.
    ///
    /// # Errors
    /// When `poold init` or `poold join` refuses.
    pub fn add_host(&mut self) -> Result<&Host> {
        let index = self.prepare_host()?.index;
        if index == 0 {
            self.init_first()?;
        } else {
            let token = self.create_token(&[])?;
            self.join(index, &token)?.ok()?;
        }
        let host = &self.hosts[index];
        host.start_daemon()?;
        if index == 0 {
            wait_for(HOST_UP_DEADLINE, "the first host leads", || {
                Ok(self.json(&["pool", "status"])?["leader"] == host.name.as_str())
            })
            .with_context(|| format!("log of {}:\n{}", host.name, host.log_tail()))?;
        }
        Ok(host)
    }

    /// A join token.
    ///
    /// # Errors
    /// When `poolctl` fails.
    pub fn create_token(&self, arguments: &[&str]) -> Result<String> {
        let created = self.json(&[&["host", "token", "create"], arguments].concat())?;
        created["token"].as_str().map(ToOwned::to_owned).with_context(|| format!("no token in {created}"))
    }

    /// `poold join` of a prepared host.
    ///
    /// # Errors
    /// When it can't be run; any exit code is an answer.
    pub fn join(&self, index: usize, token: &str) -> Result<Output> {
        let host = &self.hosts[index];
        let (data, listen) = (host.data_dir.to_string_lossy().into_owned(), host.address.to_string());
        let memory = self.host_arguments();
        let mut arguments = vec!["join", "--data", &data, "--host-name", &host.name, "--listen", &listen];
        arguments.extend(memory.iter().map(String::as_str));
        arguments.push(token);
        self.poold_at(index, &arguments)
    }

    /// Waits until every host that has joined is up.
    ///
    /// # Errors
    /// Shows the log of a host that isn't.
    pub fn wait_hosts_up(&self) -> Result<()> {
        for host in self.hosts.iter().filter(|host| host.is_member()) {
            self.wait_host_state(&host.name, "up", HOST_UP_DEADLINE)
                .with_context(|| format!("log of {}:\n{}", host.name, host.log_tail()))?;
        }
        Ok(())
    }

    /// Waits until `host show` gives the state.
    ///
    /// # Errors
    /// At the deadline.
    pub fn wait_host_state(&self, name: &str, state: &str, deadline: Duration) -> Result<()> {
        wait_for(deadline, &format!("host {name} is {state}"), || {
            Ok(self.json(&["host", "show", name])?["state"] == state)
        })
    }

    /// The host that leads.
    ///
    /// # Errors
    /// When none does within the time that an election may take.
    pub fn leader(&self) -> Result<&Host> {
        let name = wait_until(HOST_UP_DEADLINE, "the pool has a leader", || {
            let status = self.json(&["pool", "status"])?;
            Ok(status["leader"].as_str().filter(|name| !name.is_empty()).map(ToOwned::to_owned))
        })?;
        self.host_named(&name)
    }

    /// Lets only hosts of one group (by position) reach each other. The operator stays with the first group.
    ///
    /// # Errors
    /// When the pool is not in namespaces.
    pub fn cut(&self, groups: &[&[usize]]) -> Result<()> {
        self.fabric.cut(groups)
    }

    /// Loses what a host (by position) sends to another one; the other direction works.
    ///
    /// # Errors
    /// When the pool is not in namespaces.
    pub fn cut_one_way(&self, from: usize, to: usize) -> Result<()> {
        self.fabric.cut_one_way(from, to)
    }

    /// Loses one kind of traffic from and to a host, until [`Pool::lift_filter`] of this name.
    ///
    /// # Errors
    /// When the pool is not in namespaces, or nftables are missing.
    pub fn cut_traffic(&self, index: usize, traffic: Traffic, name: &str) -> Result<()> {
        self.fabric.lose_all(index, self.hosts.len(), name, traffic.matches())
    }

    /// Loses so many of a hundred packets from and to a host, until [`Pool::lift_filter`].
    ///
    /// # Errors
    /// As [`Pool::cut_traffic`].
    pub fn lose_packets(&self, index: usize, percent: u32, name: &str) -> Result<()> {
        let rule = format!("numgen random mod 100 < {percent}");
        self.fabric.lose_all(index, self.hosts.len(), name, &[&rule])
    }

    /// Undoes what was lost under a name.
    ///
    /// # Errors
    /// When nftables are missing.
    pub fn lift_filter(&self, name: &str) -> Result<()> {
        (0..self.hosts.len()).try_for_each(|host| self.fabric.lift(host, name))
    }

    /// Limits what a host sends and receives, each; `None` lifts the limit.
    ///
    /// # Errors
    /// When the pool is not in namespaces.
    pub fn limit_link(&self, index: usize, kbit_per_s: Option<u64>) -> Result<()> {
        self.fabric.limit(index, kbit_per_s)
    }

    /// Undoes [`Pool::cut`] and [`Pool::cut_one_way`].
    ///
    /// # Errors
    /// When the pool is not in namespaces.
    pub fn heal(&self) -> Result<()> {
        let all: Vec<usize> = (0..self.hosts.len()).collect();
        all.iter().try_for_each(|&host| self.fabric.mend(host))?;
        self.fabric.cut(&[&all])
    }

    /// Gives every host a bridge `guest0`, all on one switch.
    ///
    /// # Errors
    /// When the pool is not in namespaces.
    pub fn connect_guests(&self) -> Result<()> {
        (0..self.hosts.len()).try_for_each(|host| self.fabric.add_guest_bridge(host))
    }

    /// Names of the network namespaces of a host (by position), and of the guests' switch.
    ///
    /// # Errors
    /// When the pool is not in namespaces.
    pub fn namespaces(&self, host: usize) -> Result<(String, String)> {
        self.fabric.namespaces(host)
    }

    fn init_first(&self) -> Result<()> {
        let host = &self.hosts[0];
        let (data, listen) = (host.data_dir.to_string_lossy().into_owned(), host.address.to_string());
        let memory = self.host_arguments();
        let mut arguments =
            vec!["init", "--data", &data, "--name", &self.settings.name, "--host-name", &host.name];
        arguments.extend(["--listen", &listen, "--timing", self.settings.timing.name()]);
        arguments.extend(memory.iter().map(String::as_str));
        self.poold_at(0, &arguments)?.ok()?;
        Ok(())
    }

    fn host_arguments(&self) -> Vec<String> {
        let bytes = self.settings.vm_memory_bytes.map(|bytes| ["--vm-memory".to_owned(), bytes.to_string()]);
        let level =
            self.settings.feature_level.map(|level| ["--feature-level".to_owned(), level.to_string()]);
        bytes.into_iter().chain(level).flatten().collect()
    }

    /// Bytes that VMs may use at a host, if it was set.
    #[must_use]
    pub fn vm_memory_bytes(&self) -> Option<u64> {
        self.settings.vm_memory_bytes
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        if std::thread::panicking() || self.settings.keep {
            self.save_logs();
        }
        for host in &self.hosts {
            host.kill9_daemon().ok();
        }
        self.fabric.remove();
        leftovers::remove_run(&self.run.dir);
    }
}

impl Pool {
    /// Copies the logs of the daemons and of the VM processes to `TAG-logs` next to the run, for a post-mortem.
    fn save_logs(&self) {
        let kept = self.run.dir.with_file_name(format!("{}-logs", self.run.tag));
        self.copy_logs(&kept);
        #[expect(clippy::print_stderr, reason = "the reader of a failed test needs the place of the logs")]
        {
            eprintln!("logs of the pool: {}", kept.display());
        }
    }

    /// Copies the logs of the daemons and of the VM processes into a folder.
    pub fn copy_logs(&self, to: &Path) {
        fs::create_dir_all(to).ok();
        for host in &self.hosts {
            fs::copy(&host.log_path, to.join(format!("{}.log", host.name))).ok();
            for entry in fs::read_dir(host.data_dir.join("vms")).into_iter().flatten().flatten() {
                let name = entry.file_name().to_string_lossy().into_owned();
                fs::copy(entry.path().join("log"), to.join(format!("{}-{name}.log", host.name))).ok();
            }
        }
    }
}
