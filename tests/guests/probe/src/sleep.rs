//! Waiting without the processor: it halts until the timer of its local APIC interrupts. A guest that waits in a loop takes a whole
//! processor from the daemons beside it.
//!
//! Interrupts are on only while it halts, so nothing else of the guest has to know of them. Where the timer turns out not to
//! interrupt, the guest waits in a loop.

use crate::serial::say;
use core::arch::asm;
use core::arch::x86_64::_rdtsc;
use core::ptr;

/// The local APIC and its registers.
const APIC: u64 = 0xfee0_0000;
const SPURIOUS: u64 = 0xf0;
const LVT_TIMER: u64 = 0x320;
const INITIAL_COUNT: u64 = 0x380;
const CURRENT_COUNT: u64 = 0x390;
const DIVIDE: u64 = 0x3e0;
/// Turns the APIC on.
const ENABLED: u32 = 1 << 8;
/// The timer starts anew at its end.
const PERIODIC: u32 = 1 << 17;
/// It counts at the speed of its bus.
const BY_ONE: u32 = 0b1011;
/// Masks of the two old interrupt controllers.
const PIC_MASKS: [u16; 2] = [0x21, 0xa1];
/// Interrupts that nobody turned on end here, as the APIC's own.
const TIMER_VECTOR: usize = 0x20;
const SPURIOUS_VECTOR: usize = 0x2f;
/// Ticks of the TSC during which the timer's speed is taken, and those after which it should have interrupted.
const SAMPLE_TICKS: u64 = 500_000;
const TRIAL_TICKS_MAX: u64 = 500_000_000;
/// The speed is in counts for so many ticks, as a power of two.
const SPEED_SHIFT: u32 = 20;
/// Counts between two looks at something that somebody else does.
const MOMENT: u32 = 50_000;
/// Waits below this are not worth an interrupt.
const COUNTS_MIN: u64 = 20_000;

/// An interrupt gate for long mode.
#[derive(Clone, Copy)]
#[repr(C)]
struct Gate([u64; 2]);

static mut GATES: [Gate; SPURIOUS_VECTOR + 1] = [Gate([0; 2]); SPURIOUS_VECTOR + 1];
/// Interrupts of the timer so far: the handler counts them.
#[unsafe(no_mangle)]
static mut TIMER_INTERRUPTS: u64 = 0;
/// Speed of the timer; 0: it does not interrupt.
static mut SPEED: u64 = 0;

unsafe extern "C" {
    fn timer_interrupt();
    fn spurious_interrupt();
}

fn write(register: u64, value: u32) {
    // SAFETY: the page of the APIC is mapped, and nothing else of the guest uses it.
    unsafe { ptr::write_volatile((APIC + register) as *mut u32, value) };
}

fn read(register: u64) -> u32 {
    // SAFETY: as above.
    unsafe { ptr::read_volatile((APIC + register) as *const u32) }
}

/// The TSC.
pub fn ticks() -> u64 {
    // SAFETY: rdtsc exists on every x86-64.
    unsafe { _rdtsc() }
}

fn interrupts() -> u64 {
    // SAFETY: only the handler writes it, as a whole.
    unsafe { ptr::read_volatile(&raw const TIMER_INTERRUPTS) }
}

/// The gate of a handler: present, and with interrupts off in it.
fn gate(handler: unsafe extern "C" fn()) -> Gate {
    let address = handler as usize as u64;
    let low = address & 0xffff | 8 << 16 | 0x8e00 << 32 | (address >> 16 & 0xffff) << 48;
    Gate([low, address >> 32])
}

/// Sets timer and interrupts up and tries them.
pub fn prepare() {
    // SAFETY: interrupts are off, and the processor knows no table yet.
    unsafe {
        ptr::write_volatile(&raw mut GATES[TIMER_VECTOR], gate(timer_interrupt));
        ptr::write_volatile(&raw mut GATES[SPURIOUS_VECTOR], gate(spurious_interrupt));
    }
    let address = (&raw const GATES) as u64;
    let size = (size_of::<[Gate; SPURIOUS_VECTOR + 1]>() - 1) as u64;
    let pointer = [size << 48, address];
    // SAFETY: limit and address of the table, which lives as long as the guest. They begin in the last two bytes of the first word.
    unsafe { asm!("lidt [{}]", in(reg) (&raw const pointer).byte_add(6), options(readonly, nostack)) };
    for port in PIC_MASKS {
        crate::serial::out(port, 0xff);
    }
    write(SPURIOUS, ENABLED | SPURIOUS_VECTOR as u32);
    write(DIVIDE, BY_ONE);
    write(LVT_TIMER, TIMER_VECTOR as u32 | PERIODIC);
    write(INITIAL_COUNT, u32::MAX);
    let (started, counts) = (ticks(), read(CURRENT_COUNT));
    while ticks().wrapping_sub(started) < SAMPLE_TICKS {
        core::hint::spin_loop();
    }
    let counts = u64::from(counts.saturating_sub(read(CURRENT_COUNT)));
    let speed = (counts << SPEED_SHIFT) / ticks().wrapping_sub(started);
    let (started, before) = (ticks(), interrupts());
    write(INITIAL_COUNT, MOMENT);
    while interrupts() == before {
        if ticks().wrapping_sub(started) > TRIAL_TICKS_MAX {
            say!("PROBE note its timer does not interrupt: it waits in a loop");
            return;
        }
        // SAFETY: the handlers are in place, and leave everything as it is. An interrupt needs the stack, which is why that is not
        // excluded, and one instruction more after `sti`.
        unsafe { asm!("sti", "nop", "cli") };
    }
    write(INITIAL_COUNT, 0);
    // SAFETY: nobody else writes it.
    unsafe { SPEED = speed };
}

/// Halts for so many counts of the timer at most.
fn halt(counts: u32) {
    write(INITIAL_COUNT, counts);
    // SAFETY: as above. `sti` lets nothing in before `hlt` has begun. On a machine that only interprets that may not hold: then the
    // timer's next period wakes it.
    unsafe { asm!("sti", "hlt", "cli") };
    write(INITIAL_COUNT, 0);
}

/// Waits until so many ticks have passed since `started`. A TSC that stands lower after a migration ends it.
pub fn until(started: u64, due: u64) {
    loop {
        let passed = ticks().wrapping_sub(started);
        if passed >= due {
            return;
        }
        // SAFETY: written once, at the start.
        let counts = (due - passed) * unsafe { SPEED } >> SPEED_SHIFT;
        if counts >= COUNTS_MIN {
            halt(counts.min(u64::from(u32::MAX)) as u32);
        } else {
            core::hint::spin_loop();
        }
    }
}

/// Waits for a moment, between two looks at what a device does.
pub fn moment() {
    // SAFETY: as above.
    if unsafe { SPEED } == 0 {
        core::hint::spin_loop();
    } else {
        halt(MOMENT);
    }
}
