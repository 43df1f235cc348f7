//! The metrics of volumes: of the pool's state for all of them, and of what this host alone knows for those that are here.

use super::render::Page;
use pool_state::PoolState;
use proto::{
    VolumeId,
    v1::{AgentFacts, IoCounts, IoStats, VolumeStatus},
};
use storage::owner::LATENCY_US;

/// A kind of operations, and what was done of it.
type Kind = (&'static str, fn(&IoStats) -> Option<&IoCounts>);

const KINDS: [Kind; 4] = [
    ("read", |io| io.reads.as_ref()),
    ("write", |io| io.writes.as_ref()),
    ("discard", |io| io.discards.as_ref()),
    ("flush", |io| io.flushes.as_ref()),
];

/// All of them.
pub(super) fn render(page: &mut Page, state: &PoolState, facts: &AgentFacts, nbd: (u64, u64)) {
    of_state(page, state);
    of_store(page, facts, nbd);
    of_replicas(page, state, facts);
    of_owners(page, state, facts);
}

/// A volume's name as a label: names have no character that would have to be escaped.
fn volume(state: &PoolState, id: u64) -> String {
    let id = VolumeId(id);
    state.volumes.get(&id).map_or_else(|| id.to_string(), |volume| volume.name.clone())
}

fn of_state(page: &mut Page, state: &PoolState) {
    let name = "pool_volume_size_bytes";
    page.metric(name, "gauge", "Size of each volume.");
    for volume in state.volumes.values() {
        page.sample(name, &format!("{{volume=\"{}\"}}", volume.name), volume.size.0);
    }
    let name = "pool_volume_replicas_wanted";
    page.metric(name, "gauge", "Replicas that each volume is to have.");
    for volume in state.volumes.values() {
        page.sample(name, &format!("{{volume=\"{}\"}}", volume.name), volume.replicas_wanted.into());
    }
    let name = "pool_volume_replicas_in_sync";
    page.metric(
        name,
        "gauge",
        "Replicas of each volume that have every acknowledged write and can be reached.",
    );
    for volume in state.volumes.values() {
        let serving = state.serving_members(volume).count() as u64;
        page.sample(name, &format!("{{volume=\"{}\"}}", volume.name), serving);
    }
    let name = "pool_volume_scrub_damaged_blocks";
    page.metric(name, "gauge", "Blocks that the last scrub of each volume found damaged.");
    for (volume, scrub) in state.volumes.values().filter_map(|it| Some((it, it.last_scrub?))) {
        page.sample(name, &format!("{{volume=\"{}\"}}", volume.name), scrub.counts.damaged);
    }
    let name = "pool_volume_scrub_ended_seconds";
    page.metric(name, "gauge", "Unix time of the end of the last scrub of each volume.");
    for (volume, scrub) in state.volumes.values().filter_map(|it| Some((it, it.last_scrub?))) {
        page.sample(name, &format!("{{volume=\"{}\"}}", volume.name), scrub.ended_ms / 1000);
    }
}

fn of_store(page: &mut Page, facts: &AgentFacts, (clients, refused): (u64, u64)) {
    page.gauge(
        "pool_store_used_bytes",
        "Used on the disk of this host's block store.",
        facts.store_used_bytes,
    );
    page.gauge("pool_store_capacity_bytes", "Size of that disk.", facts.store_capacity_bytes);
    let counters = [
        (
            "pool_store_damaged_blocks_total",
            "Blocks of replicas here that could not be read as they were written.",
            facts.damaged,
        ),
        (
            "pool_store_repaired_blocks_total",
            "Blocks here that were put back from another replica.",
            facts.repaired,
        ),
        (
            "pool_store_refused_connections_total",
            "Connections to the block store that were no owner's, or broke the protocol.",
            facts.refused,
        ),
        (
            "pool_nbd_refused_connections_total",
            "Connections to volumes served here that broke the protocol.",
            refused,
        ),
    ];
    for (name, help, value) in counters {
        page.metric(name, "counter", help);
        page.sample(name, "", value);
    }
    page.gauge("pool_nbd_clients", "Clients of volumes served here.", clients);
}

fn of_replicas(page: &mut Page, state: &PoolState, facts: &AgentFacts) {
    let name = "pool_replica_used_bytes";
    page.metric(name, "gauge", "Data that this host's replica of each volume and its snapshots takes.");
    for replica in &facts.replicas {
        let labels = format!("{{volume=\"{}\"}}", volume(state, replica.volume_id));
        page.sample(name, &labels, replica.used_bytes);
    }
}

fn of_owners(page: &mut Page, state: &PoolState, facts: &AgentFacts) {
    let name = "pool_volume_resync_left_bytes";
    page.metric(
        name,
        "gauge",
        "Data still to be copied to each replica that is being made equal, as far as it is known.",
    );
    for open in &facts.open {
        for resync in &open.resyncs {
            let host = state.host_name(proto::HostId(resync.host_id));
            let labels = format!("{{volume=\"{}\",host=\"{host}\"}}", volume(state, open.volume_id));
            page.sample(name, &labels, resync.left_bytes);
        }
    }
    let name = "pool_volume_damaged_reads_total";
    page.metric(
        name,
        "counter",
        "Reads of volumes open here that a replica could not serve since its content was damaged.",
    );
    each(page, state, facts, name, |open| open.damaged);
    let name = "pool_volume_repairs_total";
    page.metric(name, "counter", "Times that a replica of a volume open here was given intact content.");
    each(page, state, facts, name, |open| open.repaired);
    operations(page, state, facts);
}

fn each(page: &mut Page, state: &PoolState, facts: &AgentFacts, name: &str, of: fn(&VolumeStatus) -> u64) {
    for open in &facts.open {
        page.sample(name, &format!("{{volume=\"{}\"}}", volume(state, open.volume_id)), of(open));
    }
}

fn operations(page: &mut Page, state: &PoolState, facts: &AgentFacts) {
    let mut counter = |name: &str, help: &str, of: fn(&IoCounts) -> u64| {
        page.metric(name, "counter", help);
        for_each_kind(state, facts, |labels, counts| page.sample(name, &format!("{{{labels}}}"), of(counts)));
    };
    counter("pool_volume_bytes_total", "Bytes of operations on volumes open here.", |counts| counts.bytes);
    counter("pool_volume_errors_total", "Operations on volumes open here that failed.", |counts| {
        counts.errors
    });
    let name = "pool_volume_latency_us";
    page.metric(
        name,
        "histogram",
        "Time of operations on volumes open here, in microseconds; its count is the operations.",
    );
    for_each_kind(state, facts, |labels, counts| {
        let mut below = 0;
        for (end, class) in LATENCY_US.iter().zip(&counts.classes) {
            below += class;
            page.sample(&format!("{name}_bucket"), &format!("{{{labels},le=\"{end}\"}}"), below);
        }
        page.sample(&format!("{name}_bucket"), &format!("{{{labels},le=\"+Inf\"}}"), counts.operations);
        page.sample(&format!("{name}_sum"), &format!("{{{labels}}}"), counts.total_us);
        page.sample(&format!("{name}_count"), &format!("{{{labels}}}"), counts.operations);
    });
}

fn for_each_kind(state: &PoolState, facts: &AgentFacts, mut each: impl FnMut(&str, &IoCounts)) {
    for open in &facts.open {
        let Some(io) = &open.io else { continue };
        for (word, of) in KINDS {
            if let Some(counts) = of(io) {
                each(&format!("volume=\"{}\",kind=\"{word}\"", volume(state, open.volume_id)), counts);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_adds_up_to_its_count() {
        let mut classes = vec![0; LATENCY_US.len() + 1];
        (classes[1], classes[LATENCY_US.len()]) = (3, 2);
        let writes = IoCounts { operations: 5, bytes: 20_480, errors: 1, total_us: 900, classes };
        let io = Some(IoStats { writes: Some(writes), ..IoStats::default() });
        let open = vec![VolumeStatus { volume_id: 7, io, ..VolumeStatus::default() }];
        let facts = AgentFacts { open, ..AgentFacts::default() };
        let mut page = Page::default();
        render(&mut page, &PoolState::default(), &facts, (0, 4));
        let text = page.into_text();
        for line in [
            "pool_volume_latency_us_bucket{volume=\"vol-7\",kind=\"write\",le=\"50\"} 0",
            "pool_volume_latency_us_bucket{volume=\"vol-7\",kind=\"write\",le=\"100\"} 3",
            "pool_volume_latency_us_bucket{volume=\"vol-7\",kind=\"write\",le=\"+Inf\"} 5",
            "pool_volume_latency_us_count{volume=\"vol-7\",kind=\"write\"} 5",
            "pool_volume_bytes_total{volume=\"vol-7\",kind=\"write\"} 20480",
            "pool_volume_errors_total{volume=\"vol-7\",kind=\"write\"} 1",
            "pool_nbd_refused_connections_total 4",
        ] {
            assert!(text.lines().any(|is| is == line), "{line} is missing in\n{text}");
        }
    }
}
