//! `poold config`: what is in force at a host, and what could be.

use super::{Failure, chain};
use crate::config::{HostConfig, reference};
use std::io::Write as _;
use std::path::Path;

/// Checks the configuration of a data folder and prints what is in force.
pub fn check(data: &Path) -> Result<(), Failure> {
    let config = HostConfig::load(data).map_err(|error| Failure::usage(chain(&error)))?;
    let Some(config) = config else {
        return Err(Failure::blocked(format!(
            "{} has no poold.toml: `poold init` or `poold join` writes it",
            data.display()
        )));
    };
    let text = reference::effective(&config).map_err(|error| Failure::failed(error.to_string()))?;
    print(&text)
}

/// Prints a file with every key.
pub fn example() -> Result<(), Failure> {
    print(&reference::example())
}

fn print(text: &str) -> Result<(), Failure> {
    let printed = std::io::stdout().write_all(text.as_bytes());
    printed.map_err(|error| Failure::failed(format!("standard output: {error}")))
}
