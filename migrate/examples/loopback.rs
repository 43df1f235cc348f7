//! What the engine alone costs: moves random memory over loopback, between two machines that are nothing but memory.
//!
//! `cargo run --release -p migrate --example loopback -- [MIB] [RUNS] [BUSY THREADS] [CONNECTIONS]`; made to be looked at with `perf`. The
//! busy threads stand for vCPUs: they take their share of the processors and write nothing.

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use migrate::{
    FaultSink, Identity, Outcome, PAGE_BYTES, PageBitmap, PausedVm, Rehash, ResumedParts, SourceConfig,
    SourcePhase, SourceTask, SourceVm, TargetConfig, TargetPhase, TargetTask, TargetVm, VmError,
};
use proto::{ByteCount, MigrationId, PageIndex, VmId};
use std::{
    net::{IpAddr, Ipv4Addr},
    ops::Range,
    sync::Arc,
    thread,
    time::Duration,
};
use vmm::Memory;

const LOOPBACK: IpAddr = IpAddr::V4(Ipv4Addr::LOCALHOST);

/// A machine without vCPUs.
struct OnlyMemory(Memory);

impl OnlyMemory {
    fn new(mib: u64) -> Result<Self> {
        Ok(Self(Memory::new(ByteCount(mib << 20))?))
    }

    fn fill(&self) -> Result<()> {
        let mut content = vec![0; 1 << 20];
        for page in (0..self.0.page_count()).step_by(content.len() / PAGE_BYTES) {
            blake3::Hasher::new().update(&page.to_le_bytes()).finalize_xof().fill(&mut content);
            self.0.fill_pages(PageIndex(page), &content)?;
        }
        Ok(())
    }
}

impl SourceVm for OnlyMemory {
    fn page_count(&self) -> u64 {
        self.0.page_count()
    }
    fn resident(&self, range: Range<PageIndex>) -> Result<Vec<Range<PageIndex>>, VmError> {
        self.0.resident(range).map_err(|error| VmError::new("examine", error))
    }
    fn read_pages(&self, first: PageIndex, out: &mut [u8]) -> Result<(), VmError> {
        self.0.read_pages(first, out).map_err(|error| VmError::new("read", error))
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

impl TargetVm for OnlyMemory {
    fn page_count(&self) -> u64 {
        self.0.page_count()
    }
    fn write_pages(&self, first: PageIndex, data: &[u8]) -> Result<(), VmError> {
        self.0.fill_pages(first, data).map_err(|error| VmError::new("write", error))
    }
    fn write_pieces(&self, first: PageIndex, pieces: &[Bytes]) -> Result<(), VmError> {
        self.0.fill_pieces(first, pieces).map_err(|error| VmError::new("write", error))
    }
    fn zero_pages(&self, range: Range<PageIndex>) -> Result<(), VmError> {
        self.0.zero_pages(range).map_err(|error| VmError::new("empty", error))
    }
    fn read_pages(&self, first: PageIndex, out: &mut [u8]) -> Result<(), VmError> {
        self.0.read_pages(first, out).map_err(|error| VmError::new("read", error))
    }
    fn begin_on_demand(&self, _: &PageBitmap, _: FaultSink) -> Result<(), VmError> {
        Err(VmError::new("wait for pages", "nothing runs here"))
    }
    fn load_state(&self, _: &[u8]) -> Result<(), VmError> {
        Ok(())
    }
}

async fn migrate_once(source: Arc<OnlyMemory>, mib: u64, connections: u8) -> Result<()> {
    let target = Arc::new(OnlyMemory::new(mib)?);
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
    let source = Arc::new(OnlyMemory::new(mib)?);
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
