//! What can stand in `poold.toml`, key by key, and what cannot be set there: the pool's timings, and the limits of this version.
//!
//! `poold config example` prints a file with every key, `poold config check` what is in force at a host. A test compares the keys
//! with those that are read, so that none can be forgotten here.

use super::HostConfig;
use pool_state::{features, limits};
use std::fmt::Write as _;

/// A key of the file.
pub struct Key {
    /// Its name.
    pub name: &'static str,
    /// An example, as TOML.
    pub example: &'static str,
    /// What holds without it; none: it must be there.
    pub default: Option<&'static str>,
    /// What it is for.
    pub help: &'static str,
}

const fn key(
    name: &'static str,
    example: &'static str,
    default: Option<&'static str>,
    help: &'static str,
) -> Key {
    Key { name, example, default, help }
}

/// All keys, in the order of the file.
pub const KEYS: &[Key] = &[
    key(
        "pool_id",
        "\"0f8e2c6a\"",
        None,
        "Id of the pool. Written by `poold init` and `poold join`; never changed.",
    ),
    key("host_id", "3", None, "Id of this host, which is its Raft node id. Written as above; never changed."),
    key("host_name", "\"h3\"", None, "Name of this host. Written as above; never changed."),
    key(
        "listen",
        "\"192.0.2.3:7443\"",
        None,
        "IP:PORT that the other hosts reach: TCP for gRPC, UDP for the block store. Another one is told to the pool at the next start.",
    ),
    key(
        "vm_memory_bytes",
        "68719476736",
        None,
        "Memory that VMs may use. What is reserved already stays reserved when it shrinks.",
    ),
    key(
        "timing",
        "\"default\"",
        None,
        "Intervals of elections until the pool's own are known: `default`, or `fast` in tests. As the pool was founded.",
    ),
    key(
        "feature_level_max",
        "3",
        Some("the newest level of this version"),
        "Holds this host, and with it the pool, at an older feature level, so that an older version can still come back.",
    ),
    key(
        "metrics",
        "\"192.0.2.3:9443\"",
        Some("no such port"),
        "IP:PORT of Prometheus metrics and /healthz, in plain HTTP; see docs/metrics.md. `--metrics` wins.",
    ),
    key(
        "log_format",
        "\"json\"",
        Some("\"text\""),
        "Form of the log lines: `text` or `json`. `--log-json` wins.",
    ),
    key(
        "log_filter",
        "\"info,poold=debug\"",
        Some("\"info,openraft=off,sled=warn\""),
        "Which lines are logged, by module: error, warn, info, debug, trace, off. $RUST_LOG wins.",
    ),
    key(
        "prove_memory",
        "\"full\"",
        Some("\"sampled\""),
        "How the memory of VMs that move away is proved: `sampled`, or `full`, while the VM stands still. `--prove-memory` wins.",
    ),
];

/// A file with every key; those with a default stand behind a comment sign.
#[must_use]
pub fn example() -> String {
    let mut text =
        "# poold.toml, in the data folder of each host. `poold config check --data DIR` checks it.\n"
            .to_owned();
    for key in KEYS {
        let (sign, default) = match key.default {
            Some(default) => ("#", format!(" Default: {default}.")),
            None => ("", String::new()),
        };
        // Writing to a string can't fail.
        let _ = write!(text, "\n# {}{default}\n{sign}{} = {}\n", key.help, key.name, key.example);
    }
    text
}

/// What is in force at a host with this configuration: each key, the timings, the limits.
///
/// # Errors
/// The configuration can't be written as text, which would be a fault of this program.
pub fn effective(config: &HostConfig) -> Result<String, toml::ser::Error> {
    let set = toml::Table::try_from(config)?;
    let mut text = String::new();
    for key in KEYS {
        let value = set.get(key.name).map(ToString::to_string);
        let value = value.unwrap_or_else(|| format!("({})", key.default.unwrap_or("missing")));
        let _ = write!(text, "{} = {value}\n    {}\n", key.name, key.help);
    }
    let _ = write!(
        text,
        "\nTimings of the pool, profile `{}`, in milliseconds:\n",
        set["timing"].as_str().unwrap_or("")
    );
    for (name, value, help) in config.timing.timing().list() {
        let _ = writeln!(text, "{name} = {value}\n    {help}");
    }
    let (oldest, newest) = (features::OLDEST, features::NEWEST);
    let _ = write!(text, "\nLimits of this version, which works at feature levels {oldest} to {newest}:\n");
    for limit in limits::ALL {
        let _ =
            writeln!(text, "{} = {}\n    {}", limit.name.to_lowercase(), limit.value, limit.reason.trim());
    }
    Ok(text)
}

/// The key that was probably meant.
#[must_use]
pub fn nearest(typed: &str) -> Option<&'static str> {
    let near = KEYS.iter().map(|key| (distance(typed, key.name), key.name)).min()?;
    // Half of it another word: nobody meant that one.
    (near.0 * 2 <= typed.len().max(near.1.len())).then_some(near.1)
}

/// Letters to change, to add or to leave out between two words.
fn distance(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (done, letter) in from.chars().enumerate() {
        let mut before = row[0];
        row[0] = done + 1;
        for at in 0..to.len() {
            let change = before + usize::from(letter != to[at]);
            before = row[at + 1];
            row[at + 1] = change.min(row[at] + 1).min(before + 1);
        }
    }
    row[to.len()]
}
