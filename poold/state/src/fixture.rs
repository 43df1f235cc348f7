//! A pool for tests: applies commands one after the other and checks all invariants after each.

use crate::{
    Command, Entry, Outcome, PoolState, Rejection, Seed, Timing,
    command::{CreateGroup, CreateVm, HostFacts, InitPool, JoinHost, LastSequence, UpdateHost},
    features, invariants,
    planner::{self, LeaderView},
    state::{
        CertificateFingerprint, ContentHash, FIRST_HOST, GroupRule, GroupStrength, HaPolicy, Migration,
        MigrationOptions, TargetEndpoint, Vm, Volume,
    },
};
use proto::{
    ByteCount, Epoch, GroupId, HostId, ImageId, Incarnation, MemoryPages, MigrationId, Sequence, TaskId,
    VmId, VolumeId,
};

pub(crate) const GIB: u64 = 1 << 30;
/// Memory of each host of a test.
pub(crate) const HOST_MEMORY: ByteCount = ByteCount(8 * GIB);

pub(crate) struct Pool {
    pub(crate) state: PoolState,
    pub(crate) now_ms: u64,
    pub(crate) kernel: ImageId,
    /// Feature level of the daemons that join.
    level: u32,
}

impl Pool {
    /// A pool of `count` hosts that are up, `h1`, `h2`, …, with a kernel image at the first.
    pub(crate) fn new(count: usize) -> Self {
        Self::at_level(count, features::NEWEST)
    }

    /// A pool of daemons that all know this feature level and no newer one.
    pub(crate) fn at_level(count: usize, level: u32) -> Self {
        let mut pool = Self { state: PoolState::default(), now_ms: 1_000_000, kernel: ImageId(0), level };
        // Index 1 is the log's own.
        pool.state.note_applied(1);
        pool.accept(init_pool_at(level));
        pool.serve(FIRST_HOST, 0);
        for number in 2..=count {
            let host = pool.join(number);
            pool.serve(host, 0);
        }
        let import = Command::CreateImage {
            name: "linux".into(),
            blake3: ContentHash([7; 32]),
            size: ByteCount(1 << 20),
            holders: vec![FIRST_HOST],
        };
        let Outcome::Image(kernel) = pool.accept(import) else { panic!("an import answers with its image") };
        pool.kernel = kernel;
        pool
    }

    pub(crate) fn entry(&self, command: Command) -> Entry {
        let mut seed = [9; 32];
        seed[..8].copy_from_slice(&self.state.revision.to_le_bytes());
        Entry {
            request_id: None,
            principal: "user-ann".into(),
            time_ms: self.now_ms,
            seed: Seed(seed),
            command,
        }
    }

    pub(crate) fn apply_entry(&mut self, entry: &Entry) -> Result<Outcome, Rejection> {
        let before = self.state.clone();
        let result = self.state.apply(before.revision + 1, entry);
        invariants::check(&self.state).unwrap_or_else(|violation| panic!("{violation} after {entry:?}"));
        invariants::check_step(&before, &self.state)
            .unwrap_or_else(|violation| panic!("{violation} after {entry:?}"));
        if result.is_err() {
            // That it was refused is remembered.
            assert_eq!(self.state.requests.len(), before.requests.len());
            let requests = self.state.requests.clone();
            let unchanged = PoolState { revision: self.state.revision, requests, ..before };
            assert_eq!(self.state, unchanged, "a rejected entry changed something: {entry:?}");
        }
        result
    }

    pub(crate) fn apply(&mut self, command: Command) -> Result<Outcome, Rejection> {
        self.apply_entry(&self.entry(command))
    }

    pub(crate) fn accept(&mut self, command: Command) -> Outcome {
        self.apply(command.clone()).unwrap_or_else(|rejection| panic!("{command:?}: {rejection}"))
    }

    /// The code of the rejection that a command gets.
    pub(crate) fn reject(&mut self, command: Command) -> &'static str {
        match self.apply(command.clone()) {
            Ok(outcome) => panic!("{command:?} was accepted: {outcome:?}"),
            Err(rejection) => rejection.reason_code(),
        }
    }

    pub(crate) fn join(&mut self, number: usize) -> HostId {
        let secret_hash = [number as u8; 32];
        self.accept(Command::CreateToken { secret_hash, ttl_ms: 1_000 });
        let join = Command::JoinHost(JoinHost {
            secret_hash,
            facts: HostFacts { feature_level: self.level, ..facts(number) },
        });
        let Outcome::Host(host) = self.accept(join) else { panic!("a join answers with its host") };
        host
    }

    /// The host serves in its given life: `boot` 0 is the first.
    pub(crate) fn serve(&mut self, host: HostId, boot: u32) {
        let address = self.state.host(host).expect("it joined").address.clone();
        self.accept(Command::UpdateHost(UpdateHost {
            host,
            incarnation: incarnation(host, boot),
            replica_fingerprint: CertificateFingerprint([host.0 as u8; 32]),
            boot_id: format!("boot-{boot}"),
            address,
            vm_memory: HOST_MEMORY,
        }));
    }

    /// Ids of the members in the order in which they joined.
    pub(crate) fn hosts(&self) -> Vec<HostId> {
        self.state.members().map(|host| host.id).collect()
    }

    pub(crate) fn volume(&mut self, name: &str) -> VolumeId {
        let create = Command::CreateVolume { name: name.into(), size: ByteCount(GIB), replicas: None };
        let Outcome::Volume(volume) = self.accept(create) else {
            panic!("a creation answers with its volume")
        };
        volume
    }

    pub(crate) fn create_vm(&self, name: &str, disks: Vec<VolumeId>, ha: HaPolicy) -> Command {
        Command::CreateVm(CreateVm {
            name: name.into(),
            vcpus: 2,
            memory: ByteCount(2 * GIB),
            disks,
            kernel: Some(self.kernel),
            initrd: None,
            cmdline: "console=ttyS0".into(),
            ha,
            priority: 0,
            nets: Vec::new(),
            cpu_profile: None,
            pages: MemoryPages::Small,
            cluster: None,
        })
    }

    /// A stopped VM with one disk.
    pub(crate) fn stopped_vm(&mut self, name: &str, ha: HaPolicy) -> VmId {
        let disk = self.volume(&format!("{name}-disk"));
        let create = self.create_vm(name, vec![disk], ha);
        let Outcome::Vm(vm) = self.accept(create) else { panic!("a creation answers with its VM") };
        vm
    }

    /// A VM that runs at the given host.
    pub(crate) fn running_vm(&mut self, name: &str, host: HostId, ha: HaPolicy) -> VmId {
        let vm = self.stopped_vm(name, ha);
        self.start(vm, Some(host));
        self.runs(vm);
        vm
    }

    pub(crate) fn start(&mut self, vm: VmId, host: Option<HostId>) -> TaskId {
        let Outcome::Task(task) = self.accept(Command::StartVm { vm, host }) else {
            panic!("a start answers with its task")
        };
        task
    }

    pub(crate) fn runs(&mut self, vm: VmId) {
        let epoch = self.epoch(vm);
        self.accept(Command::VmRunning { vm, epoch });
    }

    pub(crate) fn start_migration(&mut self, vm: VmId, target: Option<HostId>) -> (MigrationId, TaskId) {
        let start = Command::StartMigration { vm, target, options: MigrationOptions::default() };
        let Outcome::Migration { migration, task } = self.accept(start) else {
            panic!("a start answers with its migration")
        };
        (migration, task)
    }

    /// A migration that copies.
    pub(crate) fn copying(&mut self, vm: VmId, target: HostId) -> MigrationId {
        let (migration, _) = self.start_migration(vm, Some(target));
        let fingerprint = CertificateFingerprint([3; 32]);
        self.accept(Command::MigrationSourceReady { migration, fingerprint });
        self.accept(Command::MigrationPrepared { migration, endpoint: endpoint() });
        self.accept(Command::MigrationCopying { migration });
        migration
    }

    pub(crate) fn commit(&self, migration: MigrationId) -> Command {
        let vm = self.vm(self.migration(migration).vm);
        let last_sequences = vm.spec.disks.iter();
        Command::MigrationCommit {
            migration,
            last_sequences: last_sequences
                .map(|volume| LastSequence { volume: *volume, sequence: Sequence(41) })
                .collect(),
        }
    }

    /// A committed migration.
    pub(crate) fn committed(&mut self, vm: VmId, target: HostId) -> MigrationId {
        let migration = self.copying(vm, target);
        let commit = self.commit(migration);
        self.accept(commit);
        migration
    }

    /// Carries a migration that has begun to its good end.
    pub(crate) fn finish(&mut self, migration: MigrationId) {
        let fingerprint = CertificateFingerprint([3; 32]);
        self.accept(Command::MigrationSourceReady { migration, fingerprint });
        self.accept(Command::MigrationPrepared { migration, endpoint: endpoint() });
        self.accept(Command::MigrationCopying { migration });
        let commit = self.commit(migration);
        self.accept(commit);
        self.accept(Command::MigrationDone { migration, record: None });
    }

    /// Lets the leader plan once; what it proposes is accepted.
    pub(crate) fn plan(&mut self) -> Vec<Command> {
        let commands = planner::plan(&self.state, &LeaderView::at(self.now_ms));
        for command in &commands {
            self.accept(command.clone());
        }
        commands
    }

    /// Lets the leader plan and every move succeed, until there is none. Returns the most moves at a time.
    pub(crate) fn run_moves(&mut self) -> usize {
        const ROUNDS_MAX: usize = 200;
        let mut most = 0;
        for _ in 0..ROUNDS_MAX {
            self.plan();
            let moving = self.state.running_migrations().filter(|migration| migration.is_under_way());
            let moving: Vec<MigrationId> = moving.map(|it| it.id).collect();
            most = most.max(moving.len());
            if moving.is_empty() {
                return most;
            }
            moving.into_iter().for_each(|migration| self.finish(migration));
        }
        panic!("the moves do not end");
    }

    /// A group; `hosts` only for rules about hosts.
    pub(crate) fn group(
        &mut self,
        name: &str,
        (rule, strength): (GroupRule, GroupStrength),
        vms: &[VmId],
        hosts: &[HostId],
    ) -> GroupId {
        let (vms, hosts) = (vms.to_vec(), hosts.to_vec());
        let create = CreateGroup { name: name.into(), rule, strength, vms, hosts };
        let Outcome::Group(group) = self.accept(Command::CreateGroup(create)) else {
            panic!("a creation answers with its group")
        };
        group
    }

    pub(crate) fn host_of(&self, vm: VmId) -> Option<HostId> {
        self.vm(vm).placement
    }

    pub(crate) fn vm(&self, vm: VmId) -> &Vm {
        self.state.vm(vm).expect("the test created it")
    }

    pub(crate) fn epoch(&self, vm: VmId) -> Epoch {
        self.vm(vm).epoch
    }

    /// The state of a VM as operators see it.
    pub(crate) fn vm_state(&self, vm: VmId) -> &'static str {
        self.state.vm_state(self.vm(vm)).as_str()
    }

    /// The first disk of a VM.
    pub(crate) fn disk(&self, vm: VmId) -> &Volume {
        self.state.volume(self.vm(vm).spec.disks[0]).expect("a disk exists")
    }

    pub(crate) fn migration(&self, migration: MigrationId) -> &Migration {
        self.state.migration(migration).expect("the test started it")
    }

    pub(crate) fn task_state(&self, task: TaskId) -> &'static str {
        self.state.task(task).expect("the test started it").state.as_str()
    }
}

pub(crate) fn incarnation(host: HostId, boot: u32) -> Incarnation {
    Incarnation(format!("{host}/{boot}"))
}

pub(crate) fn endpoint() -> TargetEndpoint {
    TargetEndpoint { address: "10.0.0.2:7000".into(), fingerprint: CertificateFingerprint([4; 32]) }
}

pub(crate) fn facts(number: usize) -> HostFacts {
    HostFacts {
        name: format!("h{number}"),
        address: format!("10.0.0.{number}:7400"),
        public_key: vec![number as u8; 44],
        cpu_vendor: "vendor-a".into(),
        vm_memory: HOST_MEMORY,
        feature_level: features::NEWEST,
    }
}

pub(crate) fn init_pool() -> Command {
    init_pool_at(features::NEWEST)
}

fn init_pool_at(level: u32) -> Command {
    Command::InitPool(Box::new(InitPool {
        pool_id: "5ca1ab1e".into(),
        name: "lab".into(),
        timing: Timing::default(),
        ca_cert_pem: "certificate".into(),
        ca_key_pem: "key".into(),
        feature_level: level,
        first_host: HostFacts { feature_level: level, ..facts(1) },
    }))
}
