//! A stock Debian in a pool of three hosts, as an operator has it: the disk is imported, the VM starts without a kernel of its
//! own, moves there and back under load, reboots, and is stopped by its power button. Needs a true KVM: `cargo xtask lab`
//! runs it in its machine, with each host in a network namespace.

#![expect(clippy::print_stdout, reason = "a program that talks to a person")]

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::{Value, json};
use std::io::Write as _;
use std::process::Stdio;
use std::time::{Duration, Instant};
use tests::{Network, Pool, output, wait_until};

/// The disk with Debian, as the lab machine shows it.
const DISK: &str = "/dev/vda";

const VM: &str = "debian";

/// Longest import of the disk: a gibibyte to three replicas, all of it interpreted.
const IMPORT_DEADLINE: Duration = Duration::from_secs(900);

/// Longest wait for a boot or a shutdown: systemd, interpreted twice.
const BOOT_PATIENCE: Duration = Duration::from_secs(240);

/// Longest wait for a command of the guest.
const PATIENCE: Duration = Duration::from_secs(60);

/// What the guest does all the time; each counts its rounds in a file of its name, what goes wrong stands in /run/wrong.
const LOADS: [(&str, &str); 4] = [
    ("timer0", "exec taskset 1 sh -c 'while :; do sleep 0.01; i=$((i+1)); echo $i > /run/timer0; done'"),
    ("timer1", "exec taskset 2 sh -c 'while :; do sleep 0.01; i=$((i+1)); echo $i > /run/timer1; done'"),
    (
        "clock",
        "while :; do read a b < /proc/uptime; n=${a%.*}${a#*.}; [ $n -ge ${last:-0} ] || \
         echo clock $last $n >> /run/wrong; last=$n; i=$((i+1)); echo $i > /run/clock; done",
    ),
    (
        "disk",
        "while :; do seq $i $((i+20000)) > /root/block; sync /root/block; sum=$(md5sum < /root/block); \
         echo 1 > /proc/sys/vm/drop_caches; [ \"$sum\" = \"$(md5sum < /root/block)\" ] || echo disk >> /run/wrong; \
         i=$((i+1)); echo $i > /run/disk; done",
    ),
];

/// A VM whose console is typed into.
struct Guest<'a> {
    pool: &'a Pool,
    commands: u32,
}

impl Guest<'_> {
    /// Types a line.
    fn type_line(&self, line: &str) -> Result<()> {
        let mut command = self.pool.poolctl_command(&["console", "serial", VM]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::null()).spawn()?;
        let mut stdin = child.stdin.take().context("it has an input")?;
        stdin.write_all(format!("{line}\n").as_bytes())?;
        drop(stdin);
        let status = child.wait()?;
        ensure!(status.success(), "`poolctl console serial` ended with {status}");
        Ok(())
    }

    /// Runs a command and returns what it prints; fails when the command does.
    fn run(&mut self, command: &str) -> Result<String> {
        self.commands += 1;
        let number = self.commands;
        // The marks are put together by the guest's shell, so that an echo of the line is not taken for them.
        self.type_line(&format!("echo BEGIN\"{number}:\"; {command}; echo END\"{number}:\"$?."))?;
        let (begin, end) = (format!("BEGIN{number}:"), format!("END{number}:"));
        let found = wait_until(PATIENCE, &format!("the guest runs `{command}`"), || {
            let text = self.pool.console(VM)?;
            let Some((_, rest)) = text.split_once(&begin) else { return Ok(None) };
            let Some((output, rest)) = rest.split_once(&end) else { return Ok(None) };
            let Some((code, _)) = rest.split_once('.') else { return Ok(None) };
            Ok(Some((output.replace('\r', "").trim().to_owned(), code.to_owned())))
        });
        let (output, code) = found.with_context(|| self.tail())?;
        ensure!(code == "0", "`{command}` ended with {code}:\n{output}");
        Ok(output)
    }

    /// Waits until the console holds `wanted` this many times, over all boots of the present process.
    fn wait_for(&self, wanted: &str, patience: Duration) -> Result<()> {
        let seen = wait_until(patience, &format!("the guest prints {wanted:?}"), || {
            Ok(self.pool.console(VM)?.contains(wanted).then_some(()))
        });
        seen.with_context(|| self.tail())
    }

    fn log_in(&mut self) -> Result<()> {
        self.wait_for("lab login:", BOOT_PATIENCE)?;
        self.type_line("root")?;
        self.wait_for("root@lab:", BOOT_PATIENCE)?;
        self.type_line("stty -echo; PS1= exec sh")?;
        self.run("true").map(drop)
    }

    /// What the guest's kernel takes for a fault.
    fn complaints(&mut self) -> Result<String> {
        let signs =
            "^<[0-3]>|WARNING:|BUG:|Call Trace|soft lockup|nobody cared|I/O error|clocksource.*unstable";
        self.run(&format!("dmesg -r | grep -E '{signs}' | grep -v 'PCI: Fatal: No config space' || true"))
    }

    /// Rounds of each load.
    fn counts(&mut self) -> Result<Vec<u64>> {
        let names: Vec<_> = LOADS.iter().map(|(name, _)| format!("/run/{name}")).collect();
        // A file is empty in the moment between its truncation and the write.
        let text =
            self.run(&format!("for f in {}; do read n < $f || n=0; echo $n; done", names.join(" ")))?;
        text.lines()
            .map(|line| line.trim().parse().with_context(|| format!("{line:?} in {text:?}")))
            .collect()
    }

    /// Every load gets on, and none has found anything wrong.
    fn check_loads(&mut self) -> Result<()> {
        let before = self.counts()?;
        let deadline = Instant::now() + PATIENCE;
        loop {
            let now = self.counts()?;
            if before.iter().zip(&now).all(|(before, now)| now > before) {
                break;
            }
            ensure!(Instant::now() < deadline, "a load stands still: {before:?}, {now:?}\n{}", self.tail());
        }
        let wrong = self.run("cat /run/wrong")?;
        ensure!(wrong.is_empty(), "the guest has found:\n{wrong}");
        Ok(())
    }

    fn tail(&self) -> String {
        let text = self.pool.console(VM).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        format!("end of the console:\n{}", lines[lines.len().saturating_sub(30)..].join("\n"))
    }
}

fn main() -> Result<()> {
    let moves: u32 = match std::env::args().nth(1) {
        Some(text) => text.parse().context("the number of moves")?,
        None => bail!("how many moves?"),
    };
    let details = run(moves)?;
    println!("{details}");
    if let Some(path) = std::env::var_os("LAB_DETAILS") {
        std::fs::write(path, details.to_string())?;
    }
    Ok(())
}

fn run(moves: u32) -> Result<Value> {
    let began = Instant::now();
    let say = |what: &str| println!("{:6.1} s: {what}", began.elapsed().as_secs_f64());
    let pool = Pool::builder().name("lab").network(Network::Namespaces).start()?;
    say("three hosts");
    let mut import = pool.poolctl_command(&["volume", "import", "root", DISK, "--replicas", "3"]);
    output::run(&mut import, IMPORT_DEADLINE)?.ok()?;
    say("the disk is imported");
    pool.json(&["vm", "create", VM, "--vcpus", "2", "--memory", "512MiB", "--disk", "root"])?;
    let started = Instant::now();
    pool.start_vm(VM, Some("h1"))?;
    let mut guest = Guest { pool: &pool, commands: 0 };
    guest.log_in()?;
    let login_seconds = started.elapsed().as_secs_f64();
    say("logged in");
    let root = guest.run("findmnt -n -o SOURCE,FSTYPE /")?;
    ensure!(root == "/dev/vda1 ext4", "the root file system is {root:?}");
    let cpus = guest.run("nproc")?;
    ensure!(cpus == "2", "the guest sees {cpus} CPUs");
    let slowest = move_about(&pool, &mut guest, moves)?;
    say("moved");
    let complaints = guest.complaints()?;
    ensure!(complaints.is_empty(), "the kernel complains:\n{complaints}");
    restart_by_operator(&pool, &mut guest)?;
    say("rebooted");
    pool.json(&["vm", "stop", VM])?;
    ensure!(pool.vm(VM)?["state"] == "stopped", "it is not stopped");
    say("stopped by its power button");
    Ok(json!({
        "login_seconds": login_seconds,
        "moves": moves,
        "memory": "proved equal",
        "slowest_blackout_ms": slowest,
    }))
}

/// There and back under load; the longest blackout in milliseconds.
fn move_about(pool: &Pool, guest: &mut Guest<'_>, moves: u32) -> Result<f64> {
    guest.run("dmesg -n 1; : > /run/wrong")?;
    for (name, script) in LOADS {
        guest.run(&format!("cat > /run/{name}.sh <<'EOF'\n{script}\nEOF\ntrue"))?;
        guest.run(&format!("setsid sh /run/{name}.sh < /dev/null > /dev/null 2>&1 & true"))?;
    }
    let mut slowest = 0.0_f64;
    for number in 0..moves {
        let to = ["h2", "h1"][(number % 2) as usize];
        let record = pool.json(&["vm", "migrate", VM, "--to", to])?;
        ensure!(
            record["outcome"] == "done" && record["memory_proved"] == true,
            "move {number} failed: {record}"
        );
        let blackout = record["blackout_ms"].as_f64().context("the record has a blackout")?;
        println!("to {to}: {} ms, blackout {blackout} ms", record["total_ms"]);
        slowest = slowest.max(blackout);
        guest.check_loads().with_context(|| format!("after move {number}"))?;
    }
    Ok(slowest)
}

/// `vm reboot` shuts the guest down cleanly: what it wrote last is there, and its file system needs no recovery.
fn restart_by_operator(pool: &Pool, guest: &mut Guest<'_>) -> Result<()> {
    guest.run("echo written > /root/written")?;
    pool.json(&["vm", "reboot", VM])?;
    guest.log_in()?;
    let written = guest.run("cat /root/written")?;
    ensure!(written == "written", "the file is {written:?}");
    let recovery = guest.run("dmesg | grep -iE 'recovery complete|orphan' || true")?;
    ensure!(recovery.is_empty(), "it was not shut down cleanly: {recovery}");
    Ok(())
}
