//! Byte counts as operators write them: `512MiB`, `10GiB`, `1.5G`.

use serde::{Deserialize, Serialize};
use std::{fmt, str::FromStr};

/// A number of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize)]
pub struct ByteCount(pub u64);

/// The text is no byte count.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{text}` is not a size; write a number with a unit, such as 512MiB or 10GiB")]
pub struct ParseByteCountError {
    /// What was given.
    pub text: String,
}

/// Binary units, largest first. A bare `K`, `M`, `G`, `T` means the binary unit, as in most virtualisation tools.
const UNITS: [(&str, u64); 4] = [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];

impl FromStr for ByteCount {
    type Err = ParseByteCountError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseByteCountError { text: text.to_owned() };
        let trimmed = text.trim();
        let split = trimmed.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(trimmed.len());
        let (number, unit) = trimmed.split_at(split);
        let unit = unit.trim();
        let scale = match unit {
            "" | "B" => 1,
            _ => UNITS
                .iter()
                .find(|(name, _)| name.eq_ignore_ascii_case(unit) || name[..1].eq_ignore_ascii_case(unit))
                .map(|&(_, scale)| scale)
                .ok_or_else(error)?,
        };
        if let Ok(whole) = number.parse::<u64>() {
            return whole.checked_mul(scale).map(ByteCount).ok_or_else(error);
        }
        let fraction: f64 = number.parse().map_err(|_| error())?;
        let bytes = fraction * scale as f64;
        // Above 2^53 a float no longer holds every byte; such sizes must be written whole.
        if bytes.is_finite() && bytes < 9e15 { Ok(ByteCount(bytes.round() as u64)) } else { Err(error()) }
    }
}

impl fmt::Display for ByteCount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match UNITS.iter().find(|&&(_, scale)| self.0 >= scale) {
            Some(&(name, scale)) if self.0.is_multiple_of(scale) => write!(f, "{} {name}", self.0 / scale),
            Some(&(name, scale)) => write!(f, "{:.1} {name}", self.0 as f64 / scale as f64),
            None => write!(f, "{} B", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_parse_with_and_without_units() {
        for (text, bytes) in
            [("0", 0), ("512MiB", 512 << 20), ("1.5 GiB", 3 << 29), ("2g", 2 << 30), ("7B", 7)]
        {
            assert_eq!(text.parse(), Ok(ByteCount(bytes)), "{text}");
        }
        for bad in ["", "MiB", "1 XB", "-1", "99999999999 TiB", "1.2.3G", "1e9999"] {
            assert!(bad.parse::<ByteCount>().is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_print_in_the_largest_unit() {
        assert_eq!(ByteCount(512 << 20).to_string(), "512 MiB");
        assert_eq!(ByteCount((3 << 30) / 2).to_string(), "1.5 GiB");
    }
}
