//! The probe guest: proves from inside that memory and disk are right across migrations and crashes.
//!
//! A freestanding x86-64 PVH ELF. In turns it walks a working set, checking and rewriting a stamp in every page, writes
//! stamped blocks to its first disk and has them flushed, and says on the serial port what it has done:
//!
//! ```text
//! PROBE boot disk_counter=41 verified=41 errors=0      what it found on its disk
//! PROBE disk acked=49                                   everything up to this counter was flushed
//! PROBE size blocks=8192 errors=0                       its disk has another size, and the last block of it works
//! PROBE beat=1 pass=0 acked=49 errors=0                 a sign of life, after every turn
//! PROBE typed …                                         what came in on the serial port
//! PROBE ERROR memory page=7 …                           an inconsistency; also counted in `errors`
//! ```
//! Parameters on the command line: `wss=64M` (working set), `light=1` (one word of each page instead of two stamps), `scatter=1` (in a
//! scattered order), `initrd=1` (the working set lies in the initrd), `rate=20M` (bytes of it per second, judged by a TSC of 2 GHz; 0: as
//! fast as it goes), `busy=1` (wait in a loop, so that processor time says whether it runs), `disk=1` (0: leave the disk alone),
//! `turns=N` (power off after N turns; 0: never), `crash=1` (crash then), `net=1` (use the network card), `peer=10.7.0.2` (send this
//! address datagrams); `load=1` (2: writes) instead of all this reads the disk at random, 32 requests in flight, and counts:
//! `PROBE io done=1000 errors=0`.
//!
//! Devices are polled; between two looks, and where its rate lets it wait, the processor halts until its timer wakes it (`sleep.rs`).

#![no_std]
#![no_main]

mod disk;
mod load;
mod memory;
mod net;
mod params;
mod runtime;
mod serial;
mod sleep;
mod start;
mod tcp;
mod virtio;

use core::arch::global_asm;
use core::panic::PanicInfo;
use params::Params;
use serial::say;

global_asm!(include_str!("entry.s"), options(att_syntax));

/// Pages that one turn walks at most, so that a turn takes well under a second where the processor is only interpreted.
const PAGES_PER_TURN: u64 = 4096;

/// A byte written here ends the machine: 0 for a power-off, anything else for a crash.
const EXIT_PORT: u16 = 0xf4;

#[unsafe(no_mangle)]
extern "C" fn guest_main(start_info: u64) -> ! {
    let params = Params::parse(start::cmdline(start_info));
    if !params.busy {
        sleep::prepare();
    }
    match params.load {
        0 => {}
        1 => load::run(virtio::Kind::Read),
        _ => load::run(virtio::Kind::Write),
    }
    let step = if params.light { memory::Step::Word } else { memory::Step::Stamps };
    let order = if params.scattered { memory::Order::Scattered } else { memory::Order::Ascending };
    let place = match start::initrd(start_info).filter(|_| params.in_initrd) {
        Some(place) => memory::Place::in_initrd(place),
        None => memory::Place::free(start::low_memory_end(start_info)),
    };
    let mut walker = memory::Walker::new(step, order, &place, params.working_set);
    let mut errors = 0;
    let mut disk = if params.disk { virtio::Device::open() } else { None };
    let mut journal = disk.as_mut().and_then(|device| match disk::Journal::recover(device, &mut errors) {
        Ok(journal) => Some(journal),
        Err(status) => {
            errors += 1;
            say!("PROBE ERROR disk recover status=", u64::from(status));
            None
        }
    });
    let (counter, verified) =
        journal.as_ref().map_or((0, 0), |journal| (journal.counter(), journal.verified()));
    say!("PROBE boot disk_counter=", counter, " verified=", verified, " errors=", errors);
    let mut net = if params.net { net::Net::open(params.peer) } else { None };
    let mut beat = 0_u64;
    loop {
        walker.turn(PAGES_PER_TURN, params.rate, &mut errors);
        if let (Some(device), Some(journal)) = (disk.as_mut(), journal.as_mut()) {
            match journal.turn(device, &mut errors) {
                Ok(acked) => {
                    say!("PROBE disk acked=", acked);
                }
                Err(status) => {
                    errors += 1;
                    say!("PROBE ERROR disk status=", u64::from(status));
                }
            }
        }
        if let Some(device) = disk.as_mut()
            && device.look_at_size()
        {
            if let Err(status) = disk::check_edge(device, &mut errors) {
                errors += 1;
                say!("PROBE ERROR disk edge status=", u64::from(status));
            }
            say!("PROBE size blocks=", device.blocks(), " errors=", errors);
        }
        if let Some(net) = net.as_mut() {
            net.turn(&mut errors);
        }
        beat += 1;
        let acked = journal.as_ref().map_or(0, disk::Journal::counter);
        let pass = walker.pass();
        say!("PROBE beat=", beat, " pass=", pass, " acked=", acked, " errors=", errors);
        serial::echo();
        if params.turns != 0 && beat >= params.turns {
            serial::out(EXIT_PORT, u8::from(errors > 0 || params.crash));
        }
    }
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    let line = info.location().map_or(0, |location| u64::from(location.line()));
    say!("PROBE ERROR panic line=", line);
    serial::out(EXIT_PORT, 2);
    loop {
        core::hint::spin_loop();
    }
}
