//! Clients of a served volume that write stamps into its blocks and read them back.
//!
//! ```text
//!  mover: serves the volume by NBD, now and then at another host
//!  two clients ──write(block, stamp, durable) / read(block)──▶ NBD server ──▶ replicas
//!      └── every call with its times and its answer ──▶ checkers::blocks
//! ```
//! Each stamp is written once only, so a stamp that is read says which write was seen. A write without an answer may have happened,
//! may happen later, or never.

use anyhow::{Result, ensure};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::AtomicBool;
use std::time::Duration;
use tests::Pool;
use tests::nbd::socket_of;
use tests::wait::wait_until;

use crate::nbd::Export;
use crate::observation::{BlockCall, Recorder, Seen};
use crate::pace;

/// The volume, which nobody else uses.
pub const VOLUME: &str = "chaos-stamped";
/// Blocks that are used: few, so that calls meet.
const BLOCKS: u64 = 6;
const BLOCK_BYTES: usize = 4096;
/// Clients at a time.
pub const CLIENTS: u64 = 2;
/// Pause between two calls of a client.
const CALL_EVERY: Duration = Duration::from_millis(120);
/// Pause between two looks at whether the volume shall be served elsewhere.
const MOVE_EVERY: Duration = Duration::from_secs(4);
/// After everything has healed, the volume is served within this.
const SERVED_DEADLINE: Duration = Duration::from_secs(60);

/// Where the volume is served now.
type Served = Mutex<Option<PathBuf>>;

/// The clients of one run.
#[derive(Debug)]
pub struct Stamps<'a> {
    pool: &'a Pool,
    recorder: &'a Recorder,
    stop: &'a AtomicBool,
    seed: u64,
    served: Served,
}

impl<'a> Stamps<'a> {
    /// Clients that stop when `stop` is set.
    #[must_use]
    pub fn new(pool: &'a Pool, recorder: &'a Recorder, stop: &'a AtomicBool, seed: u64) -> Self {
        Self { pool, recorder, stop, seed, served: Served::default() }
    }

    /// Makes the volume and serves it, now at one host and then at another one.
    pub fn serve(&self) {
        let mut random = StdRng::seed_from_u64(self.seed ^ 0x57A1);
        let replicas = self.pool.hosts().len().min(3).to_string();
        pace::every(MOVE_EVERY, self.stop, || {
            let host = self.pool.host(random.random_range(0..self.pool.hosts().len())).name();
            let moves = random.random_bool(0.4);
            if !moves && self.served.lock().is_ok_and(|served| served.is_some()) {
                return;
            }
            // It exists, or can't be made now; a volume that is served must be let go first, and is not served at first.
            self.pool.poolctl(&["volume", "create", VOLUME, "--size", "1MiB", "--replicas", &replicas]).ok();
            self.pool.poolctl(&["volume", "nbd", VOLUME, "--stop"]).ok();
            let socket = serve(self.pool, host).ok();
            if let Ok(mut served) = self.served.lock() {
                *served = socket;
            }
        });
    }

    /// Writes and reads blocks, and records what was answered.
    pub fn call(&self, client: u64) {
        let mut random = StdRng::seed_from_u64(self.seed ^ (0xB10C + client));
        let mut export: Option<(PathBuf, Export)> = None;
        let mut next = 0;
        pace::every(CALL_EVERY, self.stop, || {
            let Some(socket) = self.served.lock().ok().and_then(|served| served.clone()) else { return };
            if export.as_ref().is_none_or(|(open, _)| *open != socket) {
                export = Export::open(&socket, VOLUME).ok().map(|export| (socket.clone(), export));
            }
            let Some((_, open)) = &mut export else { return };
            let block = random.random_range(0..BLOCKS);
            let is_well = if random.random_bool(0.5) {
                next += 1;
                // Client and number make it one of its kind; 0 is what nobody has written.
                self.write(open, client, block, (client + 1) << 32 | next)
            } else {
                self.read(open, client, block)
            };
            if !is_well {
                export = None;
            }
        });
    }

    fn write(&self, export: &mut Export, client: u64, block: u64, stamp: u64) -> bool {
        let from_ms = self.recorder.now_ms();
        let is_done = export.write(block * BLOCK_BYTES as u64, &content(stamp)).is_ok();
        let call = if is_done { BlockCall::Wrote { stamp } } else { BlockCall::MayHaveWritten { stamp } };
        self.record(client, block, from_ms, call);
        is_done
    }

    fn read(&self, export: &mut Export, client: u64, block: u64) -> bool {
        let (from_ms, mut data) = (self.recorder.now_ms(), vec![0; BLOCK_BYTES]);
        if export.read(block * BLOCK_BYTES as u64, &mut data).is_err() {
            return false;
        }
        self.record(client, block, from_ms, seen_in(&data));
        true
    }

    fn record(&self, client: u64, block: u64, from_ms: u64, call: BlockCall) {
        self.recorder.add(Seen::Block { volume: VOLUME.to_owned(), block, client, from_ms, call });
    }
}

/// Serves the volume by a host; the socket.
fn serve(pool: &Pool, host: &str) -> Result<PathBuf> {
    let uri = pool.serve_nbd(VOLUME, host)?;
    socket_of(&uri).map(ToOwned::to_owned)
}

/// Reads every block once more when everything has healed, and lets go of the volume.
///
/// # Errors
/// When it can't be served: what was acknowledged can't be had.
pub fn read_back(pool: &Pool, recorder: &Recorder) -> Result<()> {
    if !pool.items(&["volume", "list"])?.iter().any(|volume| volume["name"] == VOLUME) {
        return Ok(());
    }
    let stop = AtomicBool::new(false);
    let stamps = Stamps::new(pool, recorder, &stop, 0);
    wait_until(SERVED_DEADLINE, "the stamped volume is served and read", || {
        pool.poolctl(&["volume", "nbd", VOLUME, "--stop"])?;
        let socket = serve(pool, pool.host(0).name())?;
        let mut export = Export::open(&socket, VOLUME)?;
        for block in 0..BLOCKS {
            ensure!(stamps.read(&mut export, u64::MAX, block), "block {block} is not read");
        }
        Ok(Some(()))
    })?;
    pool.json(&["volume", "nbd", VOLUME, "--stop"]).map(drop)
}

/// A block full of a stamp, in which every word is another one: half of a block shows.
fn content(stamp: u64) -> Vec<u8> {
    let words = 0..(BLOCK_BYTES / size_of::<u64>()) as u64;
    words.flat_map(|word| if stamp == 0 { 0 } else { stamp.wrapping_add(word << 48) }.to_le_bytes()).collect()
}

/// The stamp that a block is full of, if it is of one.
fn seen_in(data: &[u8]) -> BlockCall {
    let stamp = data.first_chunk().map_or(0, |first| u64::from_le_bytes(*first));
    if content(stamp) == data { BlockCall::Read { stamp } } else { BlockCall::ReadTorn }
}

#[cfg(test)]
mod unit_tests {
    use super::*;

    #[test]
    fn a_block_shows_its_stamp_and_whether_it_is_whole() {
        for stamp in [0, 1, (2 << 32) | 77] {
            assert_eq!(seen_in(&content(stamp)), BlockCall::Read { stamp });
        }
        let mut torn = content(5);
        torn[2048..].copy_from_slice(&content(6)[2048..]);
        assert_eq!(seen_in(&torn), BlockCall::ReadTorn);
        torn[2048..].fill(0);
        assert_eq!(seen_in(&torn), BlockCall::ReadTorn);
    }
}
