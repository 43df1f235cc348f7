//! Stock Linux in a pool of three hosts, as an operator has it: a disk is imported, the VM starts without a kernel of its own,
//! moves there and back under load, reboots, and is stopped by its power button. Needs a true KVM: `cargo xtask lab` runs it
//! in its machine, with each host in a network namespace.
//!
//! ```text
//!  small DISK MOVES    two guests with busybox: networks, VLAN, a growing disk, a stream between them, moves of both, dead hosts
//!  debian DISK MOVES   one guest with systemd: a login, moves
//! ```

#![expect(clippy::print_stdout, reason = "a program that talks to a person")]

mod deaths;
mod guest;
mod loads;
mod moves;
mod network;

use anyhow::{Context as _, Result, bail, ensure};
use guest::{Guest, Login};
use moves::Moves;
use network::Stream;
use serde_json::{Value, json};
use std::time::{Duration, Instant};
use tests::{Network, Pool, output};

/// Longest import, all of it interpreted: of 18 MiB that are not zero to three replicas, and of 300 MiB to two.
const SMALL_IMPORT_DEADLINE: Duration = Duration::from_secs(120);
const LARGE_IMPORT_DEADLINE: Duration = Duration::from_secs(900);

/// Lines of each log that are shown when a run fails.
const SHOWN_LINES: usize = 25;

/// The second disk of the small guest, and what it grows to.
const DATA_MIB: u64 = 16;
const GROWN_MIB: u64 = 24;

const BUSYBOX: Login = Login { steps: &[("GUEST ready", "")] };

const SYSTEMD: Login = Login { steps: &[("lab login:", "root"), ("root@lab:", "stty -echo; PS1= exec sh")] };

/// When it began; every step is told.
struct Steps(Instant);

impl Steps {
    fn say(&self, what: &str) {
        println!("{:6.1} s: {what}", self.0.elapsed().as_secs_f64());
    }
}

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [kind, disk, moves] = arguments.as_slice() else { bail!("small|debian DISK MOVES") };
    let moves: u32 = moves.parse().context("the number of moves")?;
    let steps = Steps(Instant::now());
    let pool = Pool::builder().name("lab").network(Network::Namespaces).start()?;
    steps.say("three hosts");
    let details = match kind.as_str() {
        "small" => small(&pool, disk, moves, &steps),
        "debian" => debian(&pool, disk, moves, &steps),
        _ => bail!("there is no guest `{kind}`"),
    };
    let details = details.inspect_err(|_| show_logs(&pool))?;
    println!("{details}");
    if let Some(path) = std::env::var_os("LAB_DETAILS") {
        std::fs::write(path, details.to_string())?;
    }
    Ok(())
}

/// The lab machine and everything in it will be gone: what the programs have said last goes to its console.
fn show_logs(pool: &Pool) {
    let folder = std::env::temp_dir().join("stock-guest-logs");
    pool.copy_logs(&folder);
    for entry in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
        let text = std::fs::read_to_string(entry.path()).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        println!("── {}", entry.path().display());
        println!("{}", lines[lines.len().saturating_sub(SHOWN_LINES)..].join("\n"));
    }
}

/// A volume `root` with what is on the disk. A replica that fell behind catches up first: on one interpreted processor the guest and
/// a copy of half a gibibyte would stand in each other's way for a quarter of an hour.
fn import(pool: &Pool, disk: &str, replicas: usize, deadline: Duration) -> Result<()> {
    let number = replicas.to_string();
    let mut import = pool.poolctl_command(&["volume", "import", "root", disk, "--replicas", &number]);
    let began = Instant::now();
    output::run(&mut import, deadline)?.ok()?;
    println!("imported in {:.1} s", began.elapsed().as_secs_f64());
    pool.wait_in_sync("root", replicas, deadline)
}

fn small(pool: &Pool, disk: &str, moves: u32, steps: &Steps) -> Result<Value> {
    import(pool, disk, 3, SMALL_IMPORT_DEADLINE)?;
    network::create(pool)?;
    pool.json(&["volume", "snapshot", "root", "fresh"])?;
    pool.json(&["volume", "clone", "fresh", "root-two"])?;
    pool.create_volume("data", &format!("{DATA_MIB}MiB"), 3)?;
    let nets: Vec<&str> = network::NETWORKS.into_iter().flat_map(|name| ["--net", name]).collect();
    let one =
        ["vm", "create", "one", "--vcpus", "2", "--memory", "160MiB", "--disk", "root", "--disk", "data"];
    pool.json(&[&one[..], &nets].concat())?;
    let two = ["vm", "create", "two", "--vcpus", "1", "--memory", "128MiB", "--disk", "root-two"];
    pool.json(&[&two[..], &nets].concat())?;
    steps.say("networks, VMs");
    let started = Instant::now();
    pool.start_vm("one", Some("h1"))?;
    pool.start_vm("two", Some("h2"))?;
    let mut one = Guest::log_in(pool, "one", BUSYBOX)?;
    let boot_seconds = started.elapsed().as_secs_f64();
    let mut two = Guest::log_in(pool, "two", BUSYBOX)?;
    steps.say("both are there");
    check_shape(&mut one, "/dev/vda1 / ext4")?;
    let here = network::addresses(&mut one)?;
    let there = network::addresses(&mut two)?;
    for address in &there {
        network::hears(&mut one, address)?;
    }
    network::is_tagged(pool)?;
    network::has_no_other_name(&mut one, &there[0])?;
    steps.say("they hear each other");
    grow(pool, &mut one)?;
    steps.say("a disk has grown");
    loads::start(&mut one)?;
    let mut stream = Stream::open(&mut one, &mut two, &there[0])?;
    let mut moved = Moves::default();
    for number in 0..moves {
        // One of them and then the other; they are never at home for long.
        let name = if number % 2 == 0 { "one" } else { "two" };
        moved.move_on(pool, name)?;
        loads::check(&mut one).with_context(|| format!("after move {number}"))?;
        stream.check(&mut two).with_context(|| format!("after move {number}"))?;
    }
    for address in &here {
        network::hears(&mut two, address)?;
    }
    steps.say("moved");
    deaths::of_a_replica(pool, ["one", "two"], &mut one)?;
    stream.check(&mut two).context("after the death of a host that both only had copies at")?;
    steps.say("a host with copies has died and is back");
    one.check_kernel()?;
    two.check_kernel()?;
    drop(two);
    let (one, away_seconds) = deaths::of_its_host(pool, one, BUSYBOX)?;
    steps.say("its host has died, it is back");
    restart_by_operator(pool, one, BUSYBOX)?;
    steps.say("rebooted");
    for name in ["one", "two"] {
        pool.json(&["vm", "stop", name])?;
        ensure!(pool.vm(name)?["state"] == "stopped", "{name} is not stopped");
    }
    steps.say("stopped by their power buttons");
    Ok(json!({
        "boot_seconds": boot_seconds,
        "moves": moves,
        "memory": "proved equal",
        "moves_tried_again": moved.tried_again,
        "slowest_blackout_ms": moved.slowest_blackout_ms,
        "numbers_on_the_stream": stream.received(),
        "back_after_the_death_of_its_host_seconds": away_seconds,
    }))
}

fn debian(pool: &Pool, disk: &str, moves: u32, steps: &Steps) -> Result<Value> {
    import(pool, disk, 2, LARGE_IMPORT_DEADLINE)?;
    pool.json(&["vm", "create", "debian", "--vcpus", "2", "--memory", "512MiB", "--disk", "root"])?;
    let volume = pool.json(&["volume", "show", "root"])?;
    let host = volume["replicas"][0]["host"].as_str().context("a replica has a host")?;
    let started = Instant::now();
    pool.start_vm("debian", Some(host))?;
    let mut guest = Guest::log_in(pool, "debian", SYSTEMD)?;
    let login_seconds = started.elapsed().as_secs_f64();
    steps.say("logged in");
    check_shape(&mut guest, "/dev/vda1 / ext4")?;
    loads::start(&mut guest)?;
    let mut moved = Moves::default();
    for number in 0..moves {
        moved.move_on(pool, "debian")?;
        loads::check(&mut guest).with_context(|| format!("after move {number}"))?;
    }
    steps.say("moved");
    guest.check_kernel()?;
    restart_by_operator(pool, guest, SYSTEMD)?;
    steps.say("rebooted");
    pool.json(&["vm", "stop", "debian"])?;
    ensure!(pool.vm("debian")?["state"] == "stopped", "it is not stopped");
    steps.say("stopped by its power button");
    Ok(json!({
        "login_seconds": login_seconds,
        "moves": moves,
        "memory": "proved equal",
        "moves_tried_again": moved.tried_again,
        "slowest_blackout_ms": moved.slowest_blackout_ms,
    }))
}

fn check_shape(guest: &mut Guest<'_>, root: &str) -> Result<()> {
    let found = guest.run("grep ' / ext4' /proc/mounts | cut -d' ' -f1-3")?;
    ensure!(found == root, "the root file system is {found:?}");
    let cpus = guest.run("nproc")?;
    ensure!(cpus == "2", "the guest sees {cpus} CPUs");
    Ok(())
}

/// The pool makes a volume larger; the guest sees it, and finds again what it writes to the new space.
fn grow(pool: &Pool, guest: &mut Guest<'_>) -> Result<()> {
    let sectors = |mib: u64| mib * 2048;
    let size = guest.run("cat /sys/block/vdb/size")?;
    ensure!(size == sectors(DATA_MIB).to_string(), "the second disk has {size} sectors");
    pool.json(&["volume", "resize", "data", &format!("{GROWN_MIB}MiB")])?;
    guest.wait_for(&format!("[ $(cat /sys/block/vdb/size) = {} ]", sectors(GROWN_MIB)))?;
    let last = GROWN_MIB - 1;
    guest.run("dd if=/dev/urandom of=/run/grown bs=64k count=16 2>&1")?;
    guest.run(&format!("dd if=/run/grown of=/dev/vdb bs=1M seek={last} conv=fsync 2>&1"))?;
    guest.run("echo 3 > /proc/sys/vm/drop_caches")?;
    guest.run(&format!("dd if=/dev/vdb bs=1M skip={last} 2> /dev/null | cmp - /run/grown")).map(drop)
}

/// `vm reboot` shuts the guest down cleanly: what it wrote last is there, and its file system needs no recovery.
fn restart_by_operator(pool: &Pool, mut guest: Guest<'_>, login: Login) -> Result<()> {
    guest.run("echo written > /root/written")?;
    let name = guest.name;
    drop(guest);
    pool.json(&["vm", "reboot", name])?;
    let mut guest = Guest::log_in(pool, name, login)?;
    let written = guest.run("cat /root/written")?;
    ensure!(written == "written", "the file is {written:?}");
    let recovery = guest.run("dmesg | grep -iE 'recovery complete|orphan' || true")?;
    ensure!(recovery.is_empty(), "it was not shut down cleanly: {recovery}");
    Ok(())
}
