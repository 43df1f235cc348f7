//! What a VM does: sums, and rates between two readings of them.

use super::bytes;
use crate::output::Object;
use proto::{VmId, v1};
use serde::Serialize;
use std::fmt::Write as _;

/// A VM's figures.
#[derive(Debug, Serialize)]
pub struct VmStatsView {
    id: String,
    vm: String,
    host: String,
    epoch: u64,
    state: String,
    interval_ms: f64,
    vcpus: Vec<VcpuView>,
    memory_bytes: u64,
    memory_resident_bytes: u64,
    disks: Vec<DiskView>,
    migration: Option<MoveView>,
}

#[derive(Debug, Serialize)]
struct VcpuView {
    cpu_ms: f64,
    cpu_percent: f64,
    faults: u64,
}

#[derive(Debug, Serialize)]
struct DiskView {
    volume: String,
    reads: CountsView,
    writes: CountsView,
    discards: CountsView,
    flushes: CountsView,
}

/// Sums, and what came to them in a second.
#[derive(Debug, Serialize)]
struct CountsView {
    operations: u64,
    bytes: u64,
    errors: u64,
    operations_per_s: f64,
    bytes_per_s: f64,
    mean_us: f64,
}

/// The move under way.
#[derive(Debug, Serialize)]
struct MoveView {
    rounds: u32,
    bytes_sent: u64,
    pages_remaining: u64,
    bytes_per_s: u64,
    dirty_bytes_per_s: u64,
    throttle_percent: u32,
    eta_ms: Option<f64>,
    eta_error_percent: u32,
}

/// What came to a sum; a VM that was started anew or has moved in between begins at zero.
fn since(first: u64, last: u64) -> f64 {
    last.checked_sub(first).unwrap_or(last) as f64
}

impl VmStatsView {
    /// The last reading, with rates since the first one.
    #[must_use]
    pub fn new(first: &v1::VmStats, last: v1::VmStats) -> Self {
        // Clocks of two hosts have nothing in common.
        let same = first.host == last.host && first.epoch == last.epoch;
        let us = if same { last.read_at_us.saturating_sub(first.read_at_us) } else { 0 };
        let seconds = us as f64 / 1e6;
        let rate = |first: u64, last: u64| if seconds > 0.0 { since(first, last) / seconds } else { 0.0 };
        let counts = |first: Option<v1::DiskCounts>, last: Option<v1::DiskCounts>| {
            let (first, last) = (first.unwrap_or_default(), last.unwrap_or_default());
            let operations = since(first.operations, last.operations);
            CountsView {
                operations: last.operations,
                bytes: last.bytes,
                errors: last.errors,
                operations_per_s: rate(first.operations, last.operations),
                bytes_per_s: rate(first.bytes, last.bytes),
                mean_us: if operations > 0.0 {
                    since(first.total_us, last.total_us) / operations
                } else {
                    0.0
                },
            }
        };
        let vcpus = last.vcpus.iter().enumerate().map(|(index, vcpu)| {
            let before = first.vcpus.get(index).map_or(0, |vcpu| vcpu.cpu_us);
            VcpuView {
                cpu_ms: vcpu.cpu_us as f64 / 1e3,
                cpu_percent: rate(before, vcpu.cpu_us) / 1e4,
                faults: vcpu.faults,
            }
        });
        let disks = last.disks.iter().map(|disk| {
            let before = first.disks.iter().find(|other| other.volume == disk.volume);
            let before = before.cloned().unwrap_or_default();
            DiskView {
                volume: disk.volume.clone(),
                reads: counts(before.reads, disk.reads),
                writes: counts(before.writes, disk.writes),
                discards: counts(before.discards, disk.discards),
                flushes: counts(before.flushes, disk.flushes),
            }
        });
        let migration = last.migration.as_ref().map(|record| MoveView {
            rounds: record.rounds,
            bytes_sent: record.bytes_sent,
            pages_remaining: record.pages_remaining,
            bytes_per_s: record.bytes_per_s,
            dirty_bytes_per_s: record.dirty_bytes_per_s,
            throttle_percent: record.throttle_percent,
            eta_ms: record.eta_ms,
            eta_error_percent: record.eta_error_percent,
        });
        Self {
            id: VmId(last.id).to_string(),
            vcpus: vcpus.collect(),
            disks: disks.collect(),
            migration,
            interval_ms: us as f64 / 1e3,
            vm: last.vm,
            host: last.host,
            epoch: last.epoch,
            state: last.state,
            memory_bytes: last.memory_bytes,
            memory_resident_bytes: last.memory_resident_bytes,
        }
    }

    /// For people.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = format!("{} is {} at {}\n", self.vm, self.state, self.host);
        let resident = bytes(self.memory_resident_bytes);
        // Writing to a string does not fail.
        let _ = writeln!(text, "memory    {resident} resident of {}", bytes(self.memory_bytes));
        for (index, vcpu) in self.vcpus.iter().enumerate() {
            let _ = writeln!(
                text,
                "vcpu {index:<4} {:.1} %, {:.1} s in all",
                vcpu.cpu_percent,
                vcpu.cpu_ms / 1e3
            );
        }
        for disk in &self.disks {
            let _ = writeln!(text, "disk {}", disk.volume);
            let kinds = [("reads", &disk.reads), ("writes", &disk.writes), ("flushes", &disk.flushes)];
            for (kind, counts) in kinds {
                let rate = bytes(counts.bytes_per_s as u64);
                let _ = writeln!(
                    text,
                    "  {kind:<8}{:.0}/s, {rate}/s, {:.0} us each; {} in all, {} errors",
                    counts.operations_per_s, counts.mean_us, counts.operations, counts.errors
                );
            }
        }
        if let Some(moves) = &self.migration {
            let _ = writeln!(
                text,
                "moves     round {}, {} sent, {} pages left, {}/s; the guest writes {}/s and is slowed by {} %",
                moves.rounds,
                bytes(moves.bytes_sent),
                moves.pages_remaining,
                bytes(moves.bytes_per_s),
                bytes(moves.dirty_bytes_per_s),
                moves.throttle_percent
            );
        }
        text
    }
}

impl Object for VmStatsView {
    const KIND: &'static str = "VmStats";
    const COLUMNS: &'static [&'static str] = &["VM", "HOST", "STATE", "CPU", "MEMORY"];
    const WIDE: &'static [&'static str] = &[];

    fn name(&self) -> String {
        self.vm.clone()
    }

    fn cells(&self) -> Vec<String> {
        let percent: f64 = self.vcpus.iter().map(|vcpu| vcpu.cpu_percent).sum();
        let memory = bytes(self.memory_resident_bytes);
        vec![self.vm.clone(), self.host.clone(), self.state.clone(), format!("{percent:.1} %"), memory]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn reading(read_at_us: u64, cpu_us: u64, operations: u64) -> v1::VmStats {
        let writes =
            v1::DiskCounts { operations, bytes: operations * 4096, errors: 0, total_us: operations * 50 };
        v1::VmStats {
            id: 7,
            vm: "web".into(),
            host: "h1".into(),
            epoch: 3,
            state: "running".into(),
            read_at_us,
            vcpus: vec![v1::VcpuStats { cpu_us, faults: 5 }],
            memory_bytes: 64 << 20,
            memory_resident_bytes: 8 << 20,
            disks: vec![v1::DiskStats {
                volume: "data".into(),
                writes: Some(writes),
                ..v1::DiskStats::default()
            }],
            migration: None,
        }
    }

    #[test]
    fn rates_are_of_the_time_between_two_readings() {
        let view = VmStatsView::new(&reading(1_000_000, 100_000, 10), reading(3_000_000, 1_100_000, 30));
        let json = serde_json::to_value(&view).unwrap();
        assert_eq!(json["vcpus"], json!([{"cpu_ms": 1100.0, "cpu_percent": 50.0, "faults": 5}]));
        assert_eq!(
            json["disks"][0]["writes"],
            json!({"operations": 30, "bytes": 30 * 4096, "errors": 0, "operations_per_s": 10.0,
                "bytes_per_s": 40960.0, "mean_us": 50.0})
        );
        assert_eq!((&json["interval_ms"], &json["migration"]), (&json!(2000.0), &json!(null)));
        assert!(view.text().contains("8 MiB resident of 64 MiB") && view.text().contains("50.0 %"));
    }

    #[test]
    fn a_vm_that_has_moved_in_between_has_sums_and_no_rates() {
        let moved = v1::VmStats { host: "h2".into(), epoch: 4, ..reading(10, 7, 2) };
        let view = VmStatsView::new(&reading(1_000_000, 100_000, 10), moved);
        let json = serde_json::to_value(&view).unwrap();
        assert_eq!((&json["vcpus"][0]["cpu_percent"], &json["host"]), (&json!(0.0), &json!("h2")));
    }

    #[test]
    fn a_move_under_way_is_told() {
        let record = v1::MigrationRecord { dirty_bytes_per_s: 3 << 20, rounds: 2, ..Default::default() };
        let moving = v1::VmStats { migration: Some(record), ..reading(2_000_000, 1, 1) };
        let view = VmStatsView::new(&reading(1_000_000, 0, 0), moving);
        assert!(view.text().contains("the guest writes 3 MiB/s"), "{}", view.text());
        assert_eq!(serde_json::to_value(&view).unwrap()["migration"]["dirty_bytes_per_s"], 3 << 20);
    }
}
