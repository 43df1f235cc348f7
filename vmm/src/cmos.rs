//! The CMOS clock (MC146818): a guest reads the time of day from it when it boots. Time is read from the host, never set.

use std::time::{SystemTime, UNIX_EPOCH};

/// Ports of the index and of the data.
pub const CMOS_INDEX: u16 = 0x70;
pub const CMOS_DATA: u16 = 0x71;

/// Bytes of the memory behind the index; the highest bit of the index masks NMIs.
const BYTES: usize = 128;

const REGISTER_SECONDS: usize = 0x00;
const REGISTER_MINUTES: usize = 0x02;
const REGISTER_HOURS: usize = 0x04;
const REGISTER_WEEKDAY: usize = 0x06;
const REGISTER_DAY: usize = 0x07;
const REGISTER_MONTH: usize = 0x08;
const REGISTER_YEAR: usize = 0x09;
const REGISTER_A: usize = 0x0a;
const REGISTER_B: usize = 0x0b;
const REGISTER_C: usize = 0x0c;
const REGISTER_D: usize = 0x0d;
/// By convention of PCs, and named by the FADT.
pub const REGISTER_CENTURY: u8 = 0x32;

/// Divider for 32.768 kHz and no periodic interrupt; never "update in progress".
const A_RUNNING: u8 = 0x26;
/// 24 hours, in binary-coded decimal.
const B_24_HOURS: u8 = 0x02;
/// Time and memory are valid.
const D_VALID: u8 = 0x80;

const SECONDS_PER_DAY: u64 = 86_400;

/// The clock's index register; the time is the host's.
#[derive(Debug, Default)]
pub struct Cmos {
    index: usize,
}

impl Cmos {
    /// The guest chooses a register.
    pub fn select(&mut self, index: u8) {
        self.index = usize::from(index) % BYTES;
    }

    /// The chosen register.
    pub fn index(&self) -> u8 {
        u8::try_from(self.index).expect("below 128")
    }

    /// The guest reads the chosen register at this time.
    pub fn read(&self, now: SystemTime) -> u8 {
        let seconds = now.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs());
        let (year, month, day) = date_of(seconds / SECONDS_PER_DAY);
        let of_day = seconds % SECONDS_PER_DAY;
        match self.index {
            REGISTER_SECONDS => bcd(of_day % 60),
            REGISTER_MINUTES => bcd(of_day / 60 % 60),
            REGISTER_HOURS => bcd(of_day / 3600),
            // Sunday is 1; the epoch was a Thursday.
            REGISTER_WEEKDAY => bcd((seconds / SECONDS_PER_DAY + 4) % 7 + 1),
            REGISTER_DAY => bcd(day),
            REGISTER_MONTH => bcd(month),
            REGISTER_YEAR => bcd(year % 100),
            REGISTER_A => A_RUNNING,
            REGISTER_B => B_24_HOURS,
            REGISTER_C => 0,
            REGISTER_D => D_VALID,
            index if index == usize::from(REGISTER_CENTURY) => bcd(year / 100),
            _ => 0,
        }
    }
}

fn bcd(value: u64) -> u8 {
    u8::try_from(value / 10 % 10 * 16 + value % 10).expect("two digits")
}

/// Year, month and day of a day since 1970 (Howard Hinnant's `civil_from_days`): years begin in March, so that the leap day is
/// the last one.
fn date_of(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1_460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    (year_of_era + era * 400 + u64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn read(seconds: u64, registers: &[u8]) -> Vec<u8> {
        let mut cmos = Cmos::default();
        let now = UNIX_EPOCH + Duration::from_secs(seconds);
        let read = registers.iter().map(|register| {
            cmos.select(*register);
            cmos.read(now)
        });
        read.collect()
    }

    #[test]
    fn the_time_of_day_reads_in_decimal_digits() {
        // Thursday, 2024-02-29 23:59:58, and two seconds later.
        let registers = [REGISTER_CENTURY, 0x09, 0x08, 0x07, 0x06, 0x04, 0x02, 0x00];
        assert_eq!(read(1_709_251_198, &registers), [0x20, 0x24, 0x02, 0x29, 0x05, 0x23, 0x59, 0x58]);
        assert_eq!(read(1_709_251_200, &registers), [0x20, 0x24, 0x03, 0x01, 0x06, 0x00, 0x00, 0x00]);
        assert_eq!(read(0, &registers), [0x19, 0x70, 0x01, 0x01, 0x05, 0x00, 0x00, 0x00]);
    }

    #[test]
    fn any_register_and_any_time_can_be_read() {
        for register in 0..=u8::MAX {
            for seconds in [0, 951_782_400, 4_102_444_799, 253_402_300_799, u64::from(u32::MAX) << 7] {
                read(seconds, &[register]);
            }
        }
    }
}
