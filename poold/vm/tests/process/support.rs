//! What the tests of the VM process share: a one-host store, a pool that says yes, and the process itself.

use hyper_util::rt::TokioIo;
use proto::v1::machine_client::MachineClient;
use proto::{AttachmentSecret, ByteCount, Epoch, HostId, IsrVersion, VolumeId, v1};
use std::fs::File;
use std::future::Future;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsRawFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus};
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;
use storage::{
    AttachRefused, Attachment, Authority, BoxFuture, EpochStart, IsrMember, ProposalError, ReplicaOptions,
    ReplicaServer, VolumeProposal, VolumeView,
};
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

/// Long enough for an interpreted guest on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(90);

pub const VOLUME: VolumeId = VolumeId(20);
pub const VM: u64 = 7;
const DISK: ByteCount = ByteCount(8 << 20);
const HOST: HostId = HostId(1);

/// User of the VM processes where the tests run as root.
pub const UID: u32 = 0x7000_0007;

/// The probe guest, built once in a process.
pub fn probe() -> &'static Path {
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| tests::build_probe().expect("the probe guest builds"))
}

/// The pool's view of the one volume.
struct Ownership {
    epoch: Epoch,
    secret: AttachmentSecret,
    isr_version: IsrVersion,
    isr: Vec<IsrMember>,
    epoch_history: Vec<EpochStart>,
}

/// A pool with one volume.
pub struct Pool {
    ownership: Mutex<Ownership>,
}

impl Authority for Pool {
    fn attachment(&self, volume: VolumeId, epoch: Epoch) -> BoxFuture<'_, Result<Attachment, AttachRefused>> {
        Box::pin(async move {
            if volume != VOLUME {
                return Err(AttachRefused::UnknownVolume);
            }
            let own = self.ownership.lock().unwrap();
            if epoch != own.epoch {
                return Err(AttachRefused::StaleEpoch { current: own.epoch });
            }
            Ok(Attachment { epoch: own.epoch, secret: own.secret.clone(), size: DISK })
        })
    }

    fn propose(&self, proposal: VolumeProposal) -> BoxFuture<'_, Result<VolumeView, ProposalError>> {
        Box::pin(async move {
            let mut own = self.ownership.lock().unwrap();
            match proposal {
                VolumeProposal::RecordStart { epoch, start, .. } => {
                    if epoch != own.epoch {
                        return Err(ProposalError::Fenced { current: own.epoch });
                    }
                    let entry = own.epoch_history.iter_mut().find(|entry| entry.epoch == epoch);
                    entry.expect("each epoch is in the history").start = Some(start);
                }
                VolumeProposal::RemoveFromIsr { .. } | VolumeProposal::AddToIsr { .. } => {
                    let cause = "the volume has one replica".to_owned();
                    return Err(ProposalError::Refused { cause });
                }
            }
            Ok(VolumeView {
                epoch: own.epoch,
                isr_version: own.isr_version,
                isr: own.isr.clone(),
                epoch_history: own.epoch_history.clone(),
            })
        })
    }
}

/// A host with a store and VM processes.
pub struct Host {
    pool: Arc<Pool>,
    server: ReplicaServer,
    // Last, so that it outlives what uses it.
    root: tempfile::TempDir,
}

impl Host {
    pub async fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let ownership = Ownership {
            epoch: Epoch(1),
            secret: AttachmentSecret([1; 32]),
            isr_version: IsrVersion(1),
            isr: Vec::new(),
            epoch_history: vec![EpochStart { epoch: Epoch(1), start: None }],
        };
        let pool = Arc::new(Pool { ownership: Mutex::new(ownership) });
        let options = ReplicaOptions {
            dir: root.path().join("store"),
            host: HOST,
            boot_id: "boot".to_owned(),
            capacity: None,
            faults: None,
        };
        let authority = pool.clone();
        let server = tokio::task::spawn_blocking(move || ReplicaServer::open(options, authority));
        let server = server.await.unwrap().unwrap();
        pool.ownership.lock().unwrap().isr =
            vec![IsrMember { host: HOST, incarnation: server.incarnation() }];
        let anywhere = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        std::fs::create_dir(root.path().join("run")).unwrap();
        server.serve(&root.path().join("run/replica.sock"), anywhere).await.unwrap();
        Self { pool, server, root }
    }

    fn replica_dir(&self) -> PathBuf {
        self.root.path().join("run")
    }

    /// A new owner: the next epoch with a secret of its own.
    pub fn next_epoch(&self) {
        let mut own = self.pool.ownership.lock().unwrap();
        own.epoch = own.epoch.next();
        own.secret = AttachmentSecret([own.epoch.0 as u8; 32]);
        let start = EpochStart { epoch: own.epoch, start: None };
        own.epoch_history.push(start);
    }

    /// The volume as the pool has it now.
    pub fn attachment(&self) -> v1::VolumeAttachment {
        let own = self.pool.ownership.lock().unwrap();
        let start = |start: &EpochStart| v1::EpochStart {
            epoch: start.epoch.0,
            start_seq: start.start.map_or(0, |sequence| sequence.0),
        };
        v1::VolumeAttachment {
            volume_id: VOLUME.0,
            name: "disk0".to_owned(),
            size_bytes: DISK.0,
            epoch: own.epoch.0,
            isr_version: own.isr_version.0,
            secret: own.secret.0.to_vec(),
            replicas: vec![v1::ReplicaEndpoint {
                host_id: HOST.0,
                address: String::new(),
                isr_incarnation: self.server.incarnation().0,
                certificate_sha256: self.server.certificate_fingerprint().0.to_vec(),
            }],
            epoch_history: own.epoch_history.iter().map(start).collect(),
            min_isr: 1,
            ..v1::VolumeAttachment::default()
        }
    }

    /// The probe VM at this epoch of its placement.
    pub fn config(&self, epoch: u64, cmdline: &str) -> v1::MachineConfig {
        v1::MachineConfig {
            vm_id: VM,
            vm_name: "probe".to_owned(),
            host_id: HOST.0,
            host_name: "h1".to_owned(),
            vcpus: 1,
            memory_bytes: 64 << 20,
            kernel_path: self
                .root
                .path()
                .join(format!("vm-{VM}-e{epoch}"))
                .join("kernel")
                .display()
                .to_string(),
            cmdline: cmdline.to_owned(),
            volumes: vec![self.attachment()],
            fence_exit_ms: 3_000,
            replica_socket: self.replica_dir().join("replica.sock").display().to_string(),
            epoch,
            migration_ip: Ipv4Addr::LOCALHOST.to_string(),
            ..v1::MachineConfig::default()
        }
    }

    /// Starts the real program in a directory of its own.
    pub async fn spawn(&self, name: &str) -> VmProcess {
        self.spawn_with(name, None).await
    }

    /// The same, with memory that was kept and its index.
    pub async fn spawn_with(&self, name: &str, kept: Option<[File; 2]>) -> VmProcess {
        let directory = self.root.path().join(name);
        std::fs::create_dir(&directory).unwrap();
        std::fs::copy(probe(), directory.join("kernel")).unwrap();
        // Beside the tests, also where both were brought to from another machine.
        let program = tests::binaries::target_dir().unwrap().join("poold-vm");
        let mut command = Command::new(program);
        command.arg("--dir").arg(&directory).arg("--replica-dir").arg(self.replica_dir());
        if nix::unistd::Uid::effective().is_root() {
            command.args(["--uid", &UID.to_string()]);
        }
        if let Some(files) = &kept {
            let [memory, index] = files.each_ref().map(File::as_raw_fd);
            command.args(["--kept-memory-fd", &memory.to_string(), "--kept-index-fd", &index.to_string()]);
            let pass_on = move || {
                for fd in [memory, index] {
                    // SAFETY: a system call on a number; open, because the files live until the spawn is over.
                    if unsafe { libc::fcntl(fd, libc::F_SETFD, 0) } < 0 {
                        return Err(std::io::Error::last_os_error());
                    }
                }
                Ok(())
            };
            // SAFETY: only system calls on numbers.
            unsafe { command.pre_exec(pass_on) };
        }
        let child = command.spawn().unwrap();
        let socket = directory.join("machine.sock");
        let shown = socket.clone();
        until("the control socket", || std::future::ready(shown.exists().then_some(()))).await;
        let connector = tower::service_fn(move |_| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        let channel =
            Endpoint::from_static("http://machine").connect_with_connector(connector).await.unwrap();
        let client = MachineClient::new(channel).max_decoding_message_size(4 << 20);
        VmProcess { child, client }
    }
}

/// One VM process. Killed when dropped.
pub struct VmProcess {
    child: Child,
    pub client: MachineClient<Channel>,
}

impl VmProcess {
    /// As when the host dies.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// An open file of the process.
    pub fn file(&self, fd: u32) -> File {
        File::options().read(true).write(true).open(format!("/proc/{}/fd/{fd}", self.pid())).unwrap()
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    pub async fn status(&self) -> v1::MachineStatus {
        self.client.clone().status(v1::MachineStatusRequest {}).await.unwrap().into_inner()
    }

    pub async fn extend_lease(&self, ttl: Duration, placement_confirmed: bool) {
        let deadline = boottime() + ttl;
        let deadline_boottime_ns = u64::try_from(deadline.as_nanos()).unwrap();
        let request = v1::ExtendLeaseRequest { deadline_boottime_ns, placement_confirmed };
        self.client.clone().extend_lease(request).await.unwrap();
    }

    /// Configures with a lease, and boots.
    pub async fn boot(&self, config: v1::MachineConfig, ttl: Duration) {
        let mut client = self.client.clone();
        client.configure(config).await.unwrap();
        self.extend_lease(ttl, false).await;
        client.start(v1::MachineStartRequest {}).await.unwrap();
    }

    pub async fn console(&self) -> String {
        let answer = self.client.clone().console_read(v1::ConsoleReadRequest { offset: 0 }).await.unwrap();
        String::from_utf8_lossy(&answer.into_inner().data).into_owned()
    }

    pub async fn beats(&self) -> usize {
        self.console().await.matches("PROBE beat=").count()
    }

    /// Waits for `more` further beats.
    pub async fn wait_beats(&self, more: usize) {
        let wanted = self.beats().await + more;
        until("beats", || async { (self.beats().await >= wanted).then_some(()) }).await;
    }

    pub async fn wait_state(&self, word: &str) -> v1::MachineStatus {
        until(word, || async { Some(self.status().await).filter(|status| status.state == word) }).await
    }

    pub async fn wait_exit(&mut self) -> ExitStatus {
        let child = Mutex::new(&mut self.child);
        until("the end of the process", || {
            std::future::ready(child.lock().unwrap().try_wait().expect("the child is ours"))
        })
        .await
    }
}

impl Drop for VmProcess {
    fn drop(&mut self) {
        // Both fail only when it has ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Now on CLOCK_BOOTTIME.
fn boottime() -> Duration {
    nix::time::clock_gettime(nix::time::ClockId::CLOCK_BOOTTIME).unwrap().into()
}

/// Waits for a condition.
pub async fn until<T, F: Future<Output = Option<T>>>(what: &str, condition: impl FnMut() -> F) -> T {
    tests::wait::until(PATIENCE, what, condition).await
}
