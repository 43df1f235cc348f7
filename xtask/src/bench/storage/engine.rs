//! Figures of the store by itself, without a network or a client.

use super::report::Row;
use anyhow::{Context, Result, bail};
use std::path::Path;
use std::process::Command;

/// Bytes that the disk writes for each byte of a guest that overwrites its volume at random, at the share of live blocks that
/// cleaning keeps.
pub fn amplification(program: &Path, dir: &Path) -> Result<Row> {
    let report = measure(program, dir, "writes")?;
    let (measured, live) = (figure(&report, "write-amplification")?, figure(&report, "live-percent")?);
    let row = Row::new("write amplification, uniform overwrites", "×", "at 70 % live");
    println!("{live:.0} % of the log in use were live while amplification was measured");
    Ok(row.at_most(measured, 1.0, 2.2))
}

/// Memory of the map of a full volume of 1 TiB; the places of its data are made up.
pub fn map(program: &Path, dir: &Path) -> Result<Row> {
    let report = measure(program, dir, "map")?;
    let row = Row::new("map of a full volume of 1 TiB", "MiB", "allowed");
    Ok(row.at_most(figure(&report, "map-mib")?, 256.0, 1.0))
}

fn measure(program: &Path, dir: &Path, what: &str) -> Result<String> {
    let output = Command::new(program).arg(what).env("TMPDIR", dir).output();
    let output = output.with_context(|| format!("start {}", program.display()))?;
    if !output.status.success() {
        bail!("{} {what} failed: {}", program.display(), String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8(output.stdout)?)
}

/// A figure of a report that has one on each line, behind its name.
fn figure(report: &str, name: &str) -> Result<f64> {
    let value = report.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    let value = value.with_context(|| format!("no {name} in `{report}`"))?;
    value.parse().with_context(|| format!("{name} is `{value}`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_figure_stands_behind_its_name_and_must_be_a_number() {
        let report = "map-pages 20000\nmap-mib 107\nbroken x\n";
        assert_eq!(figure(report, "map-mib").unwrap(), 107.0);
        assert!(figure(report, "map").is_err() && figure(report, "broken").is_err());
    }
}
