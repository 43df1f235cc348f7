//! The process of one virtual machine, or of one volume without one ([`volume`]).
//!
//! ```text
//!  daemon ──gRPC, unix socket──▶ service ──requests──▶ process ─┬─ volumes   owner side of the replicated store
//!                                   ▲                           ├─ gate ◀── fence   stops the vCPUs at the lease's end
//!                                   └── status, console ────────┼─ machine   KVM
//!                                                               └─ outgoing, incoming   both ends of a migration
//! ```
//! Before any of this runs, it gives up what it does not need of the host: [`confine`].
//!
//! Invariants: it outlives the daemon and needs it only for leases and decisions; a directory is used once, so an epoch
//! never runs twice; the process ends with its machine.

mod attachment;
mod clock;
mod confine;
mod console;
mod content;
mod directory;
mod disk;
mod fence;
mod gate;
mod heap;
mod incoming;
mod kept;
mod lease;
mod limit;
mod nics;
mod outgoing;
mod process;
mod request;
mod scrub;
mod service;
mod snapshots;
mod spec;
mod superseded;
mod throttle;
mod volume;
mod volumes;

use anyhow::Context as _;
use clap::Parser;
use confine::{ConfineArguments, Views};
use console::ConsoleSource;
use directory::Directory;
use kept::KeptMemory;
use process::{Equipment, Process};
use proto::limits::GRPC_MESSAGE_BYTES_MAX;
use proto::v1::MachineStatus;
use proto::v1::machine_server::MachineServer;
use request::Request;
use service::{MachineService, REQUESTS_MAX};
use std::os::fd::RawFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot, watch};
use tokio_stream::wrappers::UnixListenerStream;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::layer::SubscriberExt as _;
use tracing_subscriber::util::SubscriberInitExt as _;
use vmm::ConsoleRing;
use volume::VolumeProcess;

/// Threads of the runtime: requests, volumes and the device's completions. vCPUs and migrations have their own.
const WORKER_THREADS: usize = 2;

/// How long the last answer may take to leave. Streams that never end are cut after it.
const GOODBYE_TIMEOUT: Duration = Duration::from_millis(300);

/// Runs one virtual machine for the daemon `poold`, which starts it. Not meant to be started by hand.
#[derive(Debug, Parser)]
#[command(name = "poold-vm", version)]
struct Arguments {
    /// Directory of this process: a fresh one for each.
    #[arg(long)]
    dir: PathBuf,
    /// What is left to it of the host's rights.
    #[command(flatten)]
    confine: ConfineArguments,
    /// An open tap, for the next network card; may be repeated.
    #[arg(long = "tap", value_name = "FD")]
    taps: Vec<RawFd>,
    /// Serve a volume instead of a VM.
    #[arg(long)]
    volume: bool,
    /// Open file with memory of the machine that was kept at this host.
    #[arg(long, requires = "kept_index_fd")]
    kept_memory_fd: Option<RawFd>,
    /// Open file with the hashes of its pages.
    #[arg(long, requires = "kept_memory_fd")]
    kept_index_fd: Option<RawFd>,
}

fn main() -> ExitCode {
    let filter = std::env::var("RUST_LOG").ok().filter(|words| !words.is_empty());
    let filter: Option<Targets> = filter.and_then(|words| words.parse().ok());
    let filter = filter.unwrap_or_else(|| Targets::new().with_default(LevelFilter::INFO));
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr).with_ansi(false);
    tracing_subscriber::registry().with(filter).with(lines).init();
    match run(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> anyhow::Result<()> {
    heap::keep_some();
    let views = if arguments.volume {
        // It listens where an operator says, and serves no guest.
        Views::of_the_host(&arguments.dir)
    } else {
        vmm::host::open_early();
        confine::enter(&arguments.dir, &arguments.confine).context("confine this process")?
    };
    let directory = Directory::claim(views.own())?;
    let kept = arguments.kept_memory_fd.zip(arguments.kept_index_fd);
    let kept = kept.map(|(memory, index)| KeptMemory::inherit(memory, index)).transpose()?;
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(WORKER_THREADS)
        .enable_all()
        .build()
        .context("start the runtime")?;
    let taps = nics::inherited(&arguments.taps)?;
    let console = ConsoleRing::default();
    let kind = Kind::new(arguments, &console, Equipment { views, taps, kept });
    runtime.block_on(serve(&directory, console, kind))
}

/// What the process is for, and where its status appears.
enum Kind {
    Vm(Box<Process>),
    Volume(Box<VolumeProcess>),
}

impl Kind {
    fn new(
        arguments: &Arguments,
        console: &ConsoleRing,
        equipment: Equipment,
    ) -> (Self, watch::Receiver<MachineStatus>) {
        if arguments.volume {
            let (process, status) = VolumeProcess::new(arguments.dir.clone());
            return (Self::Volume(Box::new(process)), status);
        }
        let (process, status) = Process::new(console.clone(), equipment);
        (Self::Vm(Box::new(process)), status)
    }

    async fn run(&mut self, inbox: mpsc::Receiver<Request>) {
        match self {
            Self::Vm(process) => process.run(inbox).await,
            Self::Volume(process) => process.run(inbox).await,
        }
    }
}

/// Serves until the process is over, and ends it.
async fn serve(
    directory: &Directory,
    console: ConsoleRing,
    (mut process, status): (Kind, watch::Receiver<MachineStatus>),
) -> anyhow::Result<()> {
    let (requests, inbox) = mpsc::channel(REQUESTS_MAX);
    let service = MachineService::new(requests, status, ConsoleSource::new(console));
    let socket = directory.listen()?;
    let (over, is_over) = oneshot::channel::<()>();
    let server = tonic::transport::Server::builder()
        .add_service(MachineServer::new(service).max_decoding_message_size(GRPC_MESSAGE_BYTES_MAX))
        .serve_with_incoming_shutdown(UnixListenerStream::new(socket), async {
            // Sent or dropped: the process is over.
            let _ = is_over.await;
        });
    let mut server = tokio::spawn(server);
    tracing::info!(pid = std::process::id(), "serving");
    tokio::select! {
        () = process.run(inbox) => {}
        ended = &mut server => {
            ended.context("the control service panicked")?.context("serve the control socket")?;
            anyhow::bail!("the control service has ended by itself");
        }
    }
    drop(over);
    if tokio::time::timeout(GOODBYE_TIMEOUT, server).await.is_err() {
        tracing::debug!("a caller was still there at the end");
    }
    // Without taking anything apart: a vCPU or a device that hangs must not keep the process.
    std::process::exit(0)
}
