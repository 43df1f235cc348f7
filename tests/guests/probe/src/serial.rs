//! The serial port. `core::fmt` is not used: it comes precompiled with SSE instructions.

use core::arch::asm;

const COM1: u16 = 0x3f8;
/// Register of the line's status, and the bit that says that a byte has come in.
const LINE_STATUS: u16 = 5;
const DATA_READY: u8 = 1;
/// Decimal digits of the largest number.
const DIGITS: usize = 20;

/// Writes a byte to a port.
pub fn out(port: u16, value: u8) {
    // SAFETY: the machine's ports can't harm this program's memory.
    unsafe { asm!("out dx, al", in("dx") port, in("al") value, options(nomem, nostack, preserves_flags)) };
}

/// Reads a byte from a port.
fn input(port: u16) -> u8 {
    let value: u8;
    // SAFETY: the machine's ports can't harm this program's memory.
    unsafe { asm!("in al, dx", in("dx") port, out("al") value, options(nomem, nostack, preserves_flags)) };
    value
}

/// Says what was typed, a line for each look: `PROBE typed …`.
pub fn echo() {
    let is_typed = || input(COM1 + LINE_STATUS) & DATA_READY != 0;
    if !is_typed() {
        return;
    }
    "PROBE typed ".say();
    while is_typed() {
        out(COM1, input(COM1));
    }
    "\n".say();
}

/// Something that can be written on the console.
pub trait Say {
    /// Writes it. The machine takes every byte at once; there is no need to wait for its FIFO.
    fn say(self);
}

impl Say for &str {
    fn say(self) {
        for &byte in self.as_bytes() {
            out(COM1, byte);
        }
    }
}

impl Say for u64 {
    fn say(self) {
        let mut digits = [0; DIGITS];
        let (mut rest, mut at) = (self, DIGITS);
        loop {
            at -= 1;
            if let Some(digit) = digits.get_mut(at) {
                *digit = b'0' + (rest % 10) as u8;
            }
            rest /= 10;
            if rest == 0 {
                break;
            }
        }
        for &digit in digits.get(at..).unwrap_or(&[]) {
            out(COM1, digit);
        }
    }
}

/// One line on the console, from strings and numbers.
macro_rules! say {
    ($($part:expr),+) => {{
        $($crate::serial::Say::say($part);)+
        $crate::serial::Say::say("\n");
    }};
}
pub(crate) use say;
