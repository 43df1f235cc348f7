//! The largest pool: what it costs to start all of its VMs, and to recover those of a host.

use pool_state::{
    Command, Entry, Outcome, PoolState, Seed, Timing,
    command::{CreateVm, HostFacts, InitPool, JoinHost, UpdateHost},
    invariants,
    planner::{LeaderView, plan},
    state::{CertificateFingerprint, ContentHash, HaPolicy},
};
use proto::{ByteCount, HostId, Incarnation, VmId};

const HOSTS: usize = 64;
const VMS: usize = 2_000;

/// Bytes of a snapshot for one VM with a volume of three replicas, its start task and its events: a pool of 10,000 VMs stays far
/// below the cap of 128 MiB.
const SNAPSHOT_BYTES_PER_VM_MAX: usize = 2_048;

struct Storm {
    state: PoolState,
    entries: usize,
}

impl Storm {
    fn apply(&mut self, command: Command) -> Outcome {
        let index = self.state.revision + 1;
        let principal = "user-storm".to_owned();
        let entry = Entry { request_id: None, principal, time_ms: index, seed: Seed([1; 32]), command };
        self.entries += 1;
        self.state.apply(index, &entry).unwrap_or_else(|rejection| panic!("{:?}: {rejection}", entry.command))
    }

    fn new() -> Self {
        let mut storm = Self { state: PoolState::default(), entries: 0 };
        let facts = |number: usize| HostFacts {
            name: format!("h{number}"),
            address: format!("10.0.{number}.1:1"),
            public_key: vec![1; 44],
            cpu_vendor: "v".to_owned(),
            vm_memory: ByteCount(64 << 30),
            feature_level: 1,
        };
        storm.apply(Command::InitPool(Box::new(InitPool {
            pool_id: "storm".to_owned(),
            name: "storm".to_owned(),
            timing: Timing::default(),
            ca_cert_pem: "c".to_owned(),
            ca_key_pem: "k".to_owned(),
            feature_level: 1,
            first_host: facts(1),
        })));
        for number in 2..=HOSTS {
            let secret_hash = [number as u8; 32];
            storm.apply(Command::CreateToken { secret_hash, ttl_ms: 1_000_000 });
            storm.apply(Command::JoinHost(JoinHost { secret_hash, facts: facts(number) }));
        }
        let ids: Vec<HostId> = storm.state.hosts.keys().copied().collect();
        for host in &ids {
            let address = storm.state.host(*host).expect("it joined").address.clone();
            storm.apply(Command::UpdateHost(UpdateHost {
                host: *host,
                incarnation: Incarnation(format!("{host}/0")),
                replica_fingerprint: CertificateFingerprint([1; 32]),
                boot_id: String::new(),
                address,
                vm_memory: ByteCount(64 << 30),
            }));
        }
        let (blake3, size) = (ContentHash([1; 32]), ByteCount(1));
        storm.apply(Command::CreateImage { name: "linux".to_owned(), blake3, size, holders: ids });
        storm
    }

    fn create_and_start(&mut self, number: usize) -> VmId {
        let name = format!("d{number}");
        let created = self.apply(Command::CreateVolume { name, size: ByteCount(1 << 30), replicas: Some(3) });
        let Outcome::Volume(disk) = created else { panic!("a volume") };
        let kernel = self.state.images.keys().next().copied();
        let created = self.apply(Command::CreateVm(CreateVm {
            name: format!("vm{number}"),
            vcpus: 2,
            memory: ByteCount(1 << 30),
            disks: vec![disk],
            kernel,
            initrd: None,
            cmdline: "console=ttyS0".to_owned(),
            ha: HaPolicy::Restart,
            priority: 100,
            nets: Vec::new(),
        }));
        let Outcome::Vm(vm) = created else { panic!("a VM") };
        self.apply(Command::StartVm { vm, host: None });
        let epoch = self.state.vm(vm).expect("it was created").epoch;
        self.apply(Command::VmRunning { vm, epoch });
        vm
    }
}

#[test]
fn a_boot_storm_and_the_loss_of_a_host_cost_a_bounded_number_of_entries() {
    let mut storm = Storm::new();
    let before = storm.entries;
    for number in 0..VMS {
        storm.create_and_start(number);
    }
    assert_eq!(storm.entries - before, 4 * VMS, "volume, VM, start, report");
    invariants::check(&storm.state).expect("a storm breaks nothing");
    let counts: Vec<usize> = storm.state.hosts.keys().map(|host| storm.state.vms_on(*host).count()).collect();
    let (least, most) = (counts.iter().min().copied(), counts.iter().max().copied());
    assert!(most <= least.map(|least| least + 16), "VMs are spread evenly: {counts:?}");
    let snapshot = postcard_len(&storm.state);
    assert!(snapshot / VMS <= SNAPSHOT_BYTES_PER_VM_MAX, "{} bytes for each VM", snapshot / VMS);

    let lost = *storm.state.hosts.keys().next_back().expect("there are hosts");
    let stranded = storm.state.vms_on(lost).count();
    storm.apply(Command::HostLost { host: lost });
    let mut rounds = 0;
    loop {
        let commands = plan(&storm.state, &LeaderView { now_ms: 0 });
        if commands.is_empty() {
            break;
        }
        rounds += 1;
        for command in commands {
            storm.apply(command);
        }
    }
    assert_eq!(rounds, stranded.div_ceil(pool_state::limits::PLAN_COMMANDS_MAX));
    assert_eq!(storm.state.vms_on(lost).count(), 0);
    invariants::check(&storm.state).expect("a loss breaks nothing");
}

/// Bytes of the state as a snapshot holds it.
fn postcard_len(state: &PoolState) -> usize {
    postcard::to_stdvec(state).expect("it is plain data").len()
}
