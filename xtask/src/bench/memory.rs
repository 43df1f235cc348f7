//! Memory that is there before something is measured.
//!
//! A machine that is virtual itself may have lent the memory that it does not use to its host, which brings it back page by page
//! as it is touched: two and a half seconds for 1 GiB where this was written, longer than a migration takes. Whoever was measured
//! soon after somebody else had given memory back would win by that alone.

use anyhow::{Context, Result};
use clap::ValueEnum;
use memmap2::{Advice, MmapMut};

/// What is done to free memory before a measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum FreeMemory {
    /// Nothing.
    AsItIs,
    /// It is brought back from whoever it was lent to.
    AtHand,
}

impl FreeMemory {
    /// Makes so much of it ready.
    pub fn prepare(self, bytes: usize) -> Result<()> {
        match self {
            Self::AsItIs => Ok(()),
            Self::AtHand => bring(bytes),
        }
    }
}

/// Bytes of which one is touched for each page.
const PAGE_BYTES: usize = 4096;

/// Makes so much free memory be there, for what is started next: it is lent again within seconds.
fn bring(bytes: usize) -> Result<()> {
    let mut memory = MmapMut::map_anon(bytes).context("memory that is touched before a measurement")?;
    // Guests are in pieces of that size, which the kernel keeps apart from smaller ones; a kernel without them has only small ones.
    let _ = memory.advise(Advice::HugePage);
    memory.chunks_mut(PAGE_BYTES).for_each(|page| page[0] = 1);
    Ok(())
}
