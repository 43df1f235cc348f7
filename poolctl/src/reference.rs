//! Values that operators write: sizes, durations, and numbers of tasks and migrations.

use proto::cpu::{CpuProfile, ParseCpuProfileError};
use proto::{ByteCount, MigrationId, TaskId, TokenId};
use std::time::Duration;

/// The text is no value of the wanted kind.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ValueError {
    /// No duration.
    #[error("`{text}` is not a duration; write a number with a unit, such as 30ms, 10s, 5m or 3h")]
    Duration {
        /// What was given.
        text: String,
    },
    /// Zero where something is needed.
    #[error("`{text}` is zero; it must be at least {least}")]
    Zero {
        /// What was given.
        text: String,
        /// The smallest that will do.
        least: &'static str,
    },
    /// No change of a label.
    #[error("`{text}` changes no label; write KEY=VALUE to set one or KEY- to remove it")]
    Label {
        /// What was given.
        text: String,
    },
    /// No setting of the pool.
    #[error(
        "`{text}` is no setting; write name=NAME, replicas-default=N, cpu-overcommit=N, cpu-profile=NAME, \
         scrub-interval=DURATION (or never) or scrub-rate=BYTES"
    )]
    Setting {
        /// What was given.
        text: String,
    },
    /// No value of that setting.
    #[error("`{value}` is no {name}: {wanted}")]
    SettingValue {
        /// The setting.
        name: String,
        /// What was given for it.
        value: String,
        /// What it takes.
        wanted: &'static str,
    },
    /// Neither an id of the kind nor a number.
    #[error("`{text}` is not an id; write {prefix}NUMBER or the number alone")]
    Id {
        /// What was given.
        text: String,
        /// The prefix of the kind, with its dash.
        prefix: &'static str,
    },
}

/// Units of a duration in milliseconds, longest suffix first where one ends with another.
const DURATION_UNITS: [(&str, u64); 5] =
    [("ms", 1), ("s", 1000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000)];

/// Reads a duration such as `30ms`, `1.5s`, `5m`, `3h`.
///
/// # Errors
/// When the unit is missing or the number is none.
pub fn duration(text: &str) -> Result<Duration, ValueError> {
    let error = || ValueError::Duration { text: text.to_owned() };
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(error)?;
    let (number, unit) = text.split_at(digits);
    let scale = DURATION_UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(error)?.1;
    let number: f64 = number.parse().map_err(|_| error())?;
    Duration::try_from_secs_f64(number * scale as f64 / 1000.0).map_err(|_| error())
}

/// A duration of at least one millisecond.
///
/// # Errors
/// As [`duration`], and for zero.
pub fn duration_ms(text: &str) -> Result<Duration, ValueError> {
    at_least(text, Duration::from_millis(1), "1ms")
}

/// A duration of at least one second.
///
/// # Errors
/// As [`duration`], and for less than a second.
pub fn duration_s(text: &str) -> Result<Duration, ValueError> {
    at_least(text, Duration::from_secs(1), "1s")
}

fn at_least(text: &str, least: Duration, name: &'static str) -> Result<Duration, ValueError> {
    let duration = duration(text)?;
    if duration < least {
        return Err(ValueError::Zero { text: text.to_owned(), least: name });
    }
    Ok(duration)
}

/// A CPU profile by its name.
///
/// # Errors
/// There is none of this name.
pub fn cpu_profile(text: &str) -> Result<CpuProfile, ParseCpuProfileError> {
    text.parse()
}

/// A size of at least one byte, such as `512MiB`.
///
/// # Errors
/// When it is no size, or zero.
pub fn size(text: &str) -> Result<ByteCount, Box<dyn std::error::Error + Send + Sync>> {
    let size: ByteCount = text.parse()?;
    if size.0 == 0 {
        return Err(Box::new(ValueError::Zero { text: text.to_owned(), least: "1 byte" }));
    }
    Ok(size)
}

/// A change of one label.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Label {
    /// `KEY=VALUE`
    Set(String, String),
    /// `KEY-`
    Remove(String),
}

/// `KEY=VALUE` or `KEY-`.
///
/// # Errors
/// When it is neither.
pub fn label(text: &str) -> Result<Label, ValueError> {
    let label = match text.split_once('=') {
        Some((key, value)) => Label::Set(key.to_owned(), value.to_owned()),
        None => Label::Remove(text.strip_suffix('-').unwrap_or_default().to_owned()),
    };
    match &label {
        Label::Set(key, _) | Label::Remove(key) if key.is_empty() => {
            Err(ValueError::Label { text: text.to_owned() })
        }
        _ => Ok(label),
    }
}

/// A setting of the pool.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Setting {
    /// `name=NAME`
    Name(String),
    /// `replicas-default=N`
    ReplicasDefault(u32),
    /// `cpu-overcommit=N`
    CpuOvercommit(u32),
    /// `cpu-profile=NAME`
    CpuProfile(CpuProfile),
    /// `scrub-interval=DURATION`, `scrub-interval=never`
    ScrubInterval(Duration),
    /// `scrub-rate=BYTES`
    ScrubRate(ByteCount),
}

/// `KEY=VALUE` of a setting of the pool.
///
/// # Errors
/// When there is no such setting, or the value is none for it.
pub fn setting(text: &str) -> Result<Setting, ValueError> {
    let error = || ValueError::Setting { text: text.to_owned() };
    let (key, value) = text.split_once('=').filter(|(_, value)| !value.is_empty()).ok_or_else(error)?;
    let wrong = |wanted| ValueError::SettingValue { name: key.to_owned(), value: value.to_owned(), wanted };
    // Zero would mean "as it is" on the wire.
    let number = || {
        value.parse().ok().filter(|number| *number > 0).ok_or_else(|| wrong("write a number of at least 1"))
    };
    match key {
        "name" => Ok(Setting::Name(value.to_owned())),
        "replicas-default" => number().map(Setting::ReplicasDefault),
        "cpu-overcommit" => number().map(Setting::CpuOvercommit),
        "scrub-interval" if value == "never" => Ok(Setting::ScrubInterval(Duration::ZERO)),
        "scrub-interval" => duration_s(value).map(Setting::ScrubInterval),
        "scrub-rate" => {
            size(value).map(Setting::ScrubRate).map_err(|_| wrong("write a size for a second, such as 64MiB"))
        }
        "cpu-profile" => value
            .parse()
            .map(Setting::CpuProfile)
            .map_err(|_| wrong("there are host-common, x86-64-v2, x86-64-v3 and host")),
        _ => Err(error()),
    }
}

/// `mig-21` or `21`.
///
/// # Errors
/// When it is neither.
pub fn migration(text: &str) -> Result<MigrationId, ValueError> {
    number(text, "mig-").map(MigrationId)
}

/// `task-20` or `20`.
///
/// # Errors
/// When it is neither.
pub fn task(text: &str) -> Result<TaskId, ValueError> {
    number(text, "task-").map(TaskId)
}

/// `token-9` or `9`.
///
/// # Errors
/// When it is neither.
pub fn token(text: &str) -> Result<TokenId, ValueError> {
    number(text, "token-").map(TokenId)
}

fn number(text: &str, prefix: &'static str) -> Result<u64, ValueError> {
    let digits = text.strip_prefix(prefix).unwrap_or(text);
    let is_number = !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit());
    let error = || ValueError::Id { text: text.to_owned(), prefix };
    if is_number { digits.parse().map_err(|_| error()) } else { Err(error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_need_a_unit() {
        for (text, ms) in
            [("30ms", 30), ("1.5s", 1500), ("5m", 300_000), ("3h", 10_800_000), ("2d", 172_800_000)]
        {
            assert_eq!(duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for bad in ["", "30", "s", "-1s", "1 s", "3w", "1.2.3s", "99999999999999999999999999d"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn nothing_is_not_enough() {
        assert!(duration_ms("0ms").is_err());
        assert!(duration_s("500ms").is_err());
        assert!(duration_s("1s").is_ok());
        assert!(size("0").is_err());
        assert!(size("ten").is_err());
        assert_eq!(size("10GiB").unwrap(), ByteCount(10 << 30));
    }

    #[test]
    fn a_setting_that_exists_with_a_wrong_value_is_told_from_one_that_does_not() {
        let told = |text: &str| setting(text).unwrap_err().to_string();
        assert_eq!(told("cpu-overcommit=0"), "`0` is no cpu-overcommit: write a number of at least 1");
        assert!(told("cpu-profile=z80").contains("x86-64-v3"), "{}", told("cpu-profile=z80"));
        assert!(told("nope=1").contains("`nope=1` is no setting; write name=NAME"), "{}", told("nope=1"));
        assert_eq!(setting("cpu-overcommit=8"), Ok(Setting::CpuOvercommit(8)));
    }

    #[test]
    fn labels_are_set_or_removed() {
        assert_eq!(label("zone=a"), Ok(Label::Set("zone".into(), "a".into())));
        assert_eq!(label("x=a=b"), Ok(Label::Set("x".into(), "a=b".into())));
        assert_eq!(label("my-zone-"), Ok(Label::Remove("my-zone".into())));
        for bad in ["", "zone", "-", "=a"] {
            assert!(label(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn ids_are_accepted_with_and_without_their_kind() {
        assert_eq!(migration("mig-21"), Ok(MigrationId(21)));
        assert_eq!(migration("21"), Ok(MigrationId(21)));
        assert_eq!(task("task-20"), Ok(TaskId(20)));
        assert_eq!(token("9"), Ok(TokenId(9)));
        for bad in ["", "mig-", "task-21", "+21", "21x", "99999999999999999999999"] {
            assert!(migration(bad).is_err(), "{bad}");
        }
    }
}
