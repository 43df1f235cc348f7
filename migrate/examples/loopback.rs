//! What the engine alone costs: moves random memory over loopback, between two machines that are nothing but memory files.
//!
//! `cargo run --release -p migrate --example loopback -- [MIB] [RUNS] [BUSY THREADS] [CONNECTIONS]`; made to be looked at with `perf`. The
//! busy threads stand for vCPUs: they take their share of the processors and write nothing.

use anyhow::{Context, Result, ensure};
use migrate::{
    FaultSink, Identity, Outcome, PAGE_BYTES, PageBitmap, PausedVm, Rehash, ResumedParts, SourceConfig,
    SourcePhase, SourceTask, SourceVm, TargetConfig, TargetPhase, TargetTask, TargetVm, VmError,
};
use nix::sys::memfd::{MFdFlags, memfd_create};
use proto::{MigrationId, PageIndex, VmId};
use std::{
    fs::File,
    net::{IpAddr, Ipv4Addr},
    ops::Range,
    os::unix::fs::FileExt,
    sync::Arc,
    thread,
    time::Duration,
};

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// A machine without vCPUs.
struct Memory {
    file: File,
    pages: u64,
}

impl Memory {
    fn new(mib: u64) -> Result<Self> {
        let file = File::from(memfd_create("loopback", MFdFlags::MFD_CLOEXEC)?);
        file.set_len(mib << 20)?;
        Ok(Self { file, pages: (mib << 20) / PAGE_BYTES as u64 })
    }

    fn fill(&self) -> Result<()> {
        let mut content = vec![0; 1 << 20];
        for at in (0..self.pages * PAGE_BYTES as u64).step_by(1 << 20) {
            blake3::Hasher::new().update(&at.to_le_bytes()).finalize_xof().fill(&mut content);
            self.file.write_all_at(&content, at)?;
        }
        Ok(())
    }

    fn read(&self, first: PageIndex, out: &mut [u8]) -> Result<(), VmError> {
        let at = first.0 * PAGE_BYTES as u64;
        self.file.read_exact_at(out, at).map_err(|error| VmError::new("read", error))
    }
}

impl SourceVm for Memory {
    fn page_count(&self) -> u64 {
        self.pages
    }
    fn resident(&self, range: Range<PageIndex>) -> Result<Vec<Range<PageIndex>>, VmError> {
        Ok(vec![range])
    }
    fn read_pages(&self, first: PageIndex, out: &mut [u8]) -> Result<(), VmError> {
        self.read(first, out)
    }
    fn start_dirty_tracking(&self) -> Result<(), VmError> {
        Ok(())
    }
    fn fetch_dirty(&self, _: &mut PageBitmap) -> Result<(), VmError> {
        Ok(())
    }
    fn clear_dirty(&self, _: usize, _: &[u64]) -> Result<(), VmError> {
        Ok(())
    }
    fn stop_dirty_tracking(&self) -> Result<(), VmError> {
        Ok(())
    }
    fn throttle(&self, _: &[u8]) -> Result<(), VmError> {
        Ok(())
    }
    async fn pause_and_drain(&self) -> Result<PausedVm, VmError> {
        Ok(PausedVm::default())
    }
    fn save_state(&self) -> Result<Vec<u8>, VmError> {
        Ok(vec![0; 4000])
    }
    fn resume(&self) -> Result<(), VmError> {
        Ok(())
    }
}

impl TargetVm for Memory {
    fn page_count(&self) -> u64 {
        self.pages
    }
    fn write_pages(&self, first: PageIndex, data: &[u8]) -> Result<(), VmError> {
        let at = first.0 * PAGE_BYTES as u64;
        self.file.write_all_at(data, at).map_err(|error| VmError::new("write", error))
    }
    fn zero_pages(&self, _: Range<PageIndex>) -> Result<(), VmError> {
        Ok(())
    }
    fn read_pages(&self, first: PageIndex, out: &mut [u8]) -> Result<(), VmError> {
        self.read(first, out)
    }
    fn begin_on_demand(&self, _: &PageBitmap, _: FaultSink) -> Result<(), VmError> {
        Err(VmError::new("wait for pages", "nothing runs here"))
    }
    fn load_state(&self, _: &[u8]) -> Result<(), VmError> {
        Ok(())
    }
}

async fn migrate_once(source: Arc<Memory>, mib: u64, connections: u8) -> Result<()> {
    let target = Arc::new(Memory::new(mib)?);
    let (here, there) = (Identity::generate()?, Identity::generate()?);
    let config = TargetConfig {
        migration: MigrationId(1),
        vm: VmId(1),
        listen_ip: LOOPBACK,
        source_fingerprint: here.fingerprint(),
        rehash: Rehash::Incremental,
        kept: None,
    };
    let incoming = TargetTask::listen(there, config, target)?;
    let config = SourceConfig::new(MigrationId(1), VmId(1), incoming.address(), incoming.fingerprint());
    let config = config.with_connections(connections);
    let outgoing = SourceTask::spawn(here, config, source)?;
    let mut progress = outgoing.progress();
    progress.wait_for(|now| matches!(now.phase, SourcePhase::Paused { .. }) || now.phase.is_final()).await?;
    outgoing.commit_proposed().await?;
    outgoing.outcome(Outcome::Committed).await?;
    let mut phase = incoming.phase();
    phase.wait_for(|now| matches!(now, TargetPhase::Ready { .. })).await?;
    incoming.send_resumed(ResumedParts::default()).await;
    let stats = progress.wait_for(|now| now.phase.is_final()).await?.stats.clone();
    let ms = |time: Duration| time.as_secs_f64() * 1e3;
    let gib = stats.bytes_sent as f64 / f64::from(1 << 30);
    eprintln!(
        "{:.0} ms, {:.2} GiB/s, CPU s per GiB: source {:.2}, target {:.2}; raw {} compressed {}",
        ms(stats.total),
        gib / stats.total.as_secs_f64(),
        stats.source_cpu.as_secs_f64() / gib,
        stats.target_cpu.as_secs_f64() / gib,
        stats.pages.raw,
        stats.pages.compressed,
    );
    ensure!(stats.memory_hash.is_some(), "the memory is not proved");
    Ok(())
}

fn main() -> Result<()> {
    let number = |at: usize, default: u64| {
        let word = std::env::args().nth(at);
        word.map_or(Ok(default), |word| word.parse().with_context(|| format!("`{word}` is no number")))
    };
    let (mib, runs, busy) = (number(1, 512)?, number(2, 3)?, number(3, 0)?);
    let connections = u8::try_from(number(4, 1)?)?;
    let source = Arc::new(Memory::new(mib)?);
    source.fill()?;
    for _ in 0..busy {
        thread::spawn(|| {
            loop {
                std::hint::spin_loop();
            }
        });
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    for _ in 0..runs {
        runtime.block_on(migrate_once(source.clone(), mib, connections))?;
    }
    Ok(())
}
