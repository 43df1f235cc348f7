//! Requests that can't be: each has its exit code, its reason, and changes nothing.

use anyhow::Result;
use serde_json::Value;
use std::io::Write;
use std::net::{TcpStream, UdpSocket};
use std::time::Duration;
use tests::vms::PROBE_LIGHT;
use tests::{Pool, VmSpec, in_turn, pool::Timing};

/// Fields of a volume that move with what its guest does.
const MEASURED: [&str; 3] = ["io", "used_bytes", "physical_bytes"];

/// An object without what changes by itself.
fn without_measured(mut item: Value) -> Value {
    if let Some(fields) = item.as_object_mut() {
        fields.remove("revision");
        MEASURED.iter().for_each(|field| drop(fields.remove(*field)));
        for replica in fields.get_mut("replicas").and_then(Value::as_array_mut).into_iter().flatten() {
            *replica = without_measured(replica.take());
        }
    }
    item
}

/// Everything that a refused request could have changed, without the counters that grow by themselves.
fn objects(pool: &Pool) -> Result<Vec<Value>> {
    let mut all = Vec::new();
    for kind in ["vm", "volume", "image", "migration", "task"] {
        all.extend(pool.items(&[kind, "list"])?.into_iter().map(without_measured));
    }
    for host in pool.items(&["host", "list"])? {
        all.push(host["vm_memory_reserved_bytes"].clone());
    }
    Ok(all)
}

#[test]
fn impossible_requests_have_exit_codes_and_change_nothing() -> Result<()> {
    let _turn = in_turn();
    let pool = Pool::builder().hosts(2).timing(Timing::Fast).vm_memory_bytes(256 << 20).start()?;
    pool.start_probe("small", "64MiB", PROBE_LIGHT, Some("h1"))?;
    // It fills the second host, so that nothing else fits there.
    pool.create_vm(&VmSpec {
        name: "big",
        memory: "224MiB",
        disks: &[],
        cmdline: PROBE_LIGHT,
        ha: "restart",
    })?;
    pool.start_vm("big", Some("h2"))?;
    pool.wait_probe("big", Duration::from_secs(60), "beats", |now| now.beat > 0)?;
    let before = objects(&pool)?;
    let cases: &[(&[&str], i32, &str)] = &[
        (&["vm", "show", "nobody"], 3, "nobody"),
        (&["vm", "start", "nobody"], 3, "nobody"),
        (&["vm", "migrate", "nobody", "--to", "h2"], 3, "nobody"),
        (&["vm", "migrate", "small", "--to", "h9"], 3, "h9"),
        (&["vm", "migrate", "small", "--to", "h1"], 4, "h1"),
        (&["vm", "migrate", "small", "--to", "h2"], 4, "memory"),
        (&["vm", "start", "small"], 4, "small"),
        (&["vm", "delete", "small"], 4, "small"),
        (&["vm", "create", "small", "--vcpus", "1", "--memory", "64MiB", "--kernel", "probe"], 4, "small"),
        (&["vm", "create", "x", "--vcpus", "1", "--memory", "lots", "--kernel", "probe"], 2, "lots"),
        (&["vm", "create", "x", "--vcpus", "1", "--memory", "64MiB", "--kernel", "nokernel"], 3, "nokernel"),
        (
            &[
                "vm", "create", "x", "--vcpus", "1", "--memory", "64MiB", "--kernel", "probe", "--disk",
                "nodisk",
            ],
            3,
            "nodisk",
        ),
        (&["volume", "delete", "small-disk"], 4, "small"),
        (&["volume", "create", "x", "--size", "1MiB", "--replicas", "5"], 4, "replicas"),
        (&["image", "delete", "probe"], 4, "probe"),
        (&["migration", "show", "mig-99999"], 3, "mig-99999"),
        (&["migration", "cancel", "mig-99999"], 3, "mig-99999"),
        (&["task", "show", "task-99999"], 3, "task-99999"),
        (&["vm", "frobnicate"], 2, "frobnicate"),
    ];
    for (arguments, code, named) in cases {
        let output = pool.poolctl(arguments)?.expect_code(*code)?;
        assert!(output.stderr.contains(named), "{arguments:?} doesn't name `{named}`: {}", output.stderr);
        assert_eq!(objects(&pool)?, before, "{arguments:?} changed something");
    }
    pool.wait_beats("small", 3, Duration::from_secs(20))?;
    Ok(())
}

#[test]
fn garbage_on_the_ports_disturbs_nothing() -> Result<()> {
    let _turn = in_turn();
    let pool = Pool::builder().timing(Timing::Fast).start()?;
    pool.start_probe("vm1", "64MiB", PROBE_LIGHT, None)?;
    let daemons: Vec<_> = pool.hosts().iter().map(tests::Host::daemon).collect();
    let mut noise = Noise(0x9E37_79B9_7F4A_7C15);
    for round in 0..40 {
        for host in pool.hosts() {
            let mut bytes = noise.bytes(1 + round * 37);
            if round % 3 == 0 {
                // The first bytes of a TLS record or of a QUIC initial packet, then garbage.
                bytes.splice(0..0, [0x16, 3, 1, 0x40, 0]);
            } else if round % 3 == 1 {
                bytes.splice(0..0, [0xC3, 0, 0, 0, 1, 8]);
            }
            TcpStream::connect(host.address())?.write_all(&bytes).ok();
            let socket = UdpSocket::bind("127.0.0.1:0").or_else(|_| UdpSocket::bind("0.0.0.0:0"))?;
            socket.send_to(&bytes[..bytes.len().min(1400)], host.address())?;
        }
    }
    // Connections that say nothing must not use up the listener either.
    let _silent: Vec<TcpStream> = (0..200)
        .filter_map(|_| TcpStream::connect_timeout(&pool.host(0).address(), Duration::from_secs(1)).ok())
        .collect();
    pool.wait_beats("vm1", 5, Duration::from_secs(30))?;
    pool.create_volume("after", "1MiB", 3)?;
    let now: Vec<_> = pool.hosts().iter().map(tests::Host::daemon).collect();
    assert_eq!(now, daemons, "a daemon was started anew or is gone");
    Ok(())
}

/// Bytes that look random and are the same in each run (xorshift).
struct Noise(u64);

impl Noise {
    fn bytes(&mut self, count: usize) -> Vec<u8> {
        std::iter::repeat_with(|| {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            self.0.to_le_bytes()[0]
        })
        .take(count)
        .collect()
    }
}
