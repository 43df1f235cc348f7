//! A VM with its memory in huge pages: only where a host keeps some, and from there it moves like any other.

use anyhow::{Result, ensure};
use std::time::Duration;
use tests::huge_pages::HugePages;
use tests::vms::{PROBE_IMAGE, PROBE_LIGHT};
use tests::wait::wait_for;
use tests::{Pool, alone, pool::Timing};

const PATIENCE: Duration = Duration::from_secs(60);

/// Memory of the VM, in huge pages.
const VM_PAGES: u64 = 32;

fn create(pool: &Pool, name: &str, memory: &str) -> Result<tests::output::Output> {
    let create = ["vm", "create", name, "--vcpus", "1", "--memory", memory, "--hugepages"];
    pool.poolctl(&[&create[..], &["--kernel", PROBE_IMAGE, "--cmdline", PROBE_LIGHT]].concat())
}

/// Waits until every host says that it keeps so many bytes in huge pages.
fn wait_huge_memory(pool: &Pool, bytes: u64) -> Result<()> {
    wait_for(PATIENCE, "the hosts tell of their huge pages", || {
        Ok(pool.items(&["host", "list"])?.iter().all(|host| host["huge_memory_bytes"] == bytes))
    })
}

#[test]
fn memory_in_huge_pages_is_had_where_hosts_keep_some_and_moves() -> Result<()> {
    let _turn = alone();
    // All hosts of this pool are this machine: its pages are for whoever takes them first.
    let mut pages = HugePages::add(0)?;
    let before = pages.count;
    let pool = Pool::builder().hosts(2).timing(Timing::Fast).start()?;
    pool.import_probe()?;
    let odd = create(&pool, "odd", "65MiB")?;
    ensure!(odd.code == 2 && odd.stderr.contains("2 MiB"), "not whole pages: {odd:?}");
    ensure!(create(&pool, "web", "64MiB")?.code == 0, "nobody has to have the pages yet");

    if before == 0 {
        let refused = pool.poolctl(&["vm", "start", "web", "--host", "h1"])?;
        let says = |word: &str| refused.stderr.contains(word);
        ensure!(refused.code == 4 && says("h1") && says("vm.nr_hugepages=32"), "{refused:?}");
        let explained = pool.poolctl(&["vm", "explain", "web"])?;
        ensure!(explained.stdout.contains("in huge pages free"), "{explained:?}");
    }
    // Twice: both ends of a move have theirs at a time.
    pages.set(2 * VM_PAGES)?;
    if !pages.has(2 * VM_PAGES) {
        eprintln!(
            "this machine gives {} huge pages and not {}: only their refusal is tested",
            pages.count,
            2 * VM_PAGES
        );
        return Ok(());
    }
    wait_huge_memory(&pool, pages.count * (2 << 20))?;
    pool.start_vm("web", Some("h1"))?;
    let vm = pool.vm("web")?;
    ensure!(vm["huge_pages"] == true, "{vm}");
    pool.wait_probe("web", PATIENCE, "one pass over its memory", |now| now.pass >= 1)?;
    let host = pool.json(&["host", "show", "h1"])?;
    ensure!(host["huge_memory_reserved_bytes"] == 64 << 20, "{host}");

    // Pages on demand are not for it, and the plan says so with everything else.
    let plan = ["vm", "migrate", "web", "--to", "h2", "--dry-run"];
    let on_demand = pool.poolctl(&[&plan[..], &["--policy", "post-copy"]].concat())?;
    ensure!(on_demand.code != 0 && on_demand.stderr.contains("can't come on demand"), "{on_demand:?}");
    ensure!(pool.poolctl(&plan)?.code == 0, "nothing else is in the way");
    let refused = pool.poolctl(&["vm", "migrate", "web", "--to", "h2", "--policy", "post-copy"])?;
    ensure!(refused.code == 4, "{refused:?}");

    for to in ["h2", "h1"] {
        let record = pool.json(&["vm", "migrate", "web", "--to", to])?;
        ensure!(record["outcome"] == "done" && record["memory_proved"] == true, "{record}");
        ensure!(record["huge_pages"] == true, "{record}");
        let last = pool.wait_beats("web", 3, PATIENCE)?;
        ensure!(last.errors.is_empty() && last.boots == 1, "{last:?}");
    }
    pool.json(&["vm", "stop", "web"])?;
    wait_for(PATIENCE, "the pages are given back", || {
        Ok(pool.json(&["host", "show", "h1"])?["huge_memory_reserved_bytes"] == 0)
    })
}
