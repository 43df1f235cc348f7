//! Bounds of the pool's state. Together they keep it far below the 128 MiB that a snapshot may have.

/// A limit as operators read it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limit {
    /// Its name in the sources.
    pub name: &'static str,
    /// Its value in the unit that its name ends with.
    pub value: u64,
    /// What it bounds, and why there.
    pub reason: &'static str,
}

/// Defines the limits, and the list of them that `poold config check` prints: none can be left out of it.
macro_rules! limits {
    ($($(#[doc = $doc:literal])+ pub const $name:ident: $kind:ty = $value:expr;)+) => {
        $($(#[doc = $doc])+ pub const $name: $kind = $value;)+

        /// All of them.
        pub const ALL: &[Limit] = &[$(Limit {
            name: stringify!($name),
            value: $name as u64,
            reason: concat!($($doc),+),
        }),+];
    };
}

limits! {
    /// Hosts of one pool, removed ones not counted: full-mesh leases and a full log at each host stay cheap up to here.
    pub const HOSTS_MAX: usize = 64;
    /// Tombstones of removed hosts that are kept, so that a late one is told what happened to it.
    pub const REMOVED_HOSTS_MAX: usize = 256;
    /// Join tokens; one is small, but each is a secret that an operator should be able to survey.
    pub const TOKENS_MAX: usize = 256;
    /// Virtual machines: about 1 KiB each.
    pub const VMS_MAX: usize = 10_000;
    /// Volumes: about 400 bytes each with their history.
    pub const VOLUMES_MAX: usize = 20_000;
    /// Snapshots of all volumes: about 150 bytes each.
    pub const SNAPSHOTS_MAX: usize = 50_000;
    /// Snapshots of one volume and of those that it was cloned from: as many layers as the store looks through for a block.
    pub const VOLUME_DEPTH_MAX: usize = 128;
    /// Images.
    pub const IMAGES_MAX: usize = 1_000;
    /// Tasks kept, ended ones included; the oldest ended ones go first.
    pub const TASKS_MAX: usize = 2_000;
    /// Migrations kept, ended ones included; the oldest ended ones go first.
    pub const MIGRATIONS_MAX: usize = 1_000;
    /// Events kept for watchers that reconnect: hours of a busy pool.
    pub const EVENTS_MAX: usize = 4_096;
    /// Audit records kept: who changed what in the last weeks of a quiet pool or hours of a busy one.
    pub const AUDIT_MAX: usize = 4_096;
    /// Clusters: as many as a pool has hosts.
    pub const CLUSTERS_MAX: usize = HOSTS_MAX;
    /// Groups: rules that a person can still survey.
    pub const GROUPS_MAX: usize = 1_000;
    /// VMs or hosts of one group: an entry that changes it must stay small.
    pub const GROUP_MEMBERS_MAX: usize = 1_000;
    /// Users, deleted ones included.
    pub const USERS_MAX: usize = 1_000;
    /// Access tokens of all users together.
    pub const ACCESS_TOKENS_MAX: usize = 1_000;
    /// Lifetime of an access token in milliseconds at most: a year; whoever finds it can use it.
    pub const ACCESS_TOKEN_TTL_MS_MAX: u64 = 366 * 24 * 3_600_000;
    /// Longest version of a daemon in bytes.
    pub const VERSION_BYTES_MAX: usize = 64;
    /// Labels of one host.
    pub const LABELS_MAX: usize = 32;
    /// Longest value of a label in bytes.
    pub const LABEL_VALUE_BYTES_MAX: usize = 63;
    /// Request ids kept for retries: at 100 changes a second a client has 40 s to come back.
    pub const REQUESTS_MAX: usize = 4_096;
    /// Ids of refused requests kept, apart from the others: as long as a client may wait and try again, at 100 refusals a second.
    pub const REFUSALS_MAX: usize = 4_096;

    /// Longest request id in bytes, as the API promises.
    pub const REQUEST_ID_BYTES_MAX: usize = 64;
    /// Longest principal in bytes: a certificate's common name.
    pub const PRINCIPAL_BYTES_MAX: usize = 128;
    /// Longest kernel command line in bytes: what x86 kernels accept.
    pub const CMDLINE_BYTES_MAX: usize = 2_047;
    /// Longest address in bytes: a DNS name and a port.
    pub const ADDRESS_BYTES_MAX: usize = 262;
    /// Longest free text that a reporter may store (a problem, a reason) in bytes; longer ones are cut.
    pub const TEXT_BYTES_MAX: usize = 512;
    /// Largest public key of a joining host in bytes: RSA-4096 in DER with room.
    pub const PUBLIC_KEY_BYTES_MAX: usize = 1_024;
    /// Largest PEM of the pool's CA certificate or key in bytes.
    pub const PEM_BYTES_MAX: usize = 16 << 10;
    /// Lifetime of a join token in milliseconds at most: a week; it is a key to the pool.
    pub const TOKEN_TTL_MS_MAX: u64 = 7 * 24 * 3_600_000;

    /// vCPUs of one VM.
    pub const VCPUS_MAX: u32 = 64;
    /// Smallest memory of a VM in bytes: a kernel that unpacks itself needs this much.
    pub const VM_MEMORY_BYTES_MIN: u64 = 16 << 20;
    /// Largest memory of a VM in bytes: 1 TiB.
    pub const VM_MEMORY_BYTES_MAX: u64 = 1 << 40;
    /// Disks of one VM: one virtio-mmio window and interrupt each.
    pub const VM_DISKS_MAX: usize = 8;
    /// Network cards of one VM: as many windows and interrupts as disks.
    pub const VM_NICS_MAX: usize = 8;
    /// Networks: each is a bridge at every host.
    pub const NETWORKS_MAX: usize = 256;
    /// Longest name of a network interface in bytes: the kernel's.
    pub const INTERFACE_BYTES_MAX: usize = 15;
    /// Name servers of one network: what fits into an answer of DHCP.
    pub const DNS_MAX: usize = 4;
    /// Smallest volume in bytes.
    pub const VOLUME_BYTES_MIN: u64 = 1 << 20;
    /// Largest volume in bytes: 64 TiB.
    pub const VOLUME_BYTES_MAX: u64 = 64 << 40;
    /// Largest limit of operations per second: beyond it a limit limits nothing.
    pub const OPERATIONS_PER_S_MAX: u64 = 10_000_000;
    /// Largest limit of bytes per second: 1 TiB; beyond it a limit limits nothing.
    pub const BANDWIDTH_MAX: u64 = 1 << 40;
    /// Volumes that a host brings up to date at a time: each is a process, and they share its disk and its link.
    pub const SERVICES_PER_HOST_MAX: usize = 4;
    /// A volume is scrubbed this long after its last scrub, in milliseconds: damage is found within a week, before a second disk has had
    /// long to fail.
    pub const SCRUB_INTERVAL_MS: u64 = 7 * 24 * 3_600_000;
    /// The longest that the settings may say: a year.
    pub const SCRUB_INTERVAL_MS_MAX: u64 = 365 * 24 * 3_600_000;
    /// Bytes per second that such a scrub reads of each replica: 32 MiB, a part of what any disk reads, and a terabyte in nine hours.
    pub const SCRUB_BYTES_PER_S: u64 = 32 << 20;
    /// The slowest scrub: what is slower never ends.
    pub const SCRUB_BYTES_PER_S_MIN: u64 = 1 << 20;
    /// How many times as long as its reads alone a scrub may take: its volume may have no owner for hours, and disks have other work.
    pub const SCRUB_PATIENCE: u64 = 4;
    /// Used share of a host's disk from which on it gets no further replica, in percent: those that are there have the rest to grow.
    pub const STORE_REPLICAS_PERCENT_MAX: u64 = 85;
    /// Steps of used share in which hosts count as equally full for a new replica, in percent: within a step the number of replicas
    /// decides, so that volumes which are still empty are spread, too.
    pub const STORE_STEP_PERCENT: u64 = 10;
    /// Most replicas of a volume; one more while a host with one of them leaves.
    pub const REPLICAS_MAX: u32 = 5;
    /// Replicas of a volume whose creator names no number, if the pool has as many hosts and its settings say nothing else.
    pub const REPLICAS_DEFAULT: u32 = 3;
    /// Epoch starts kept for a volume. A replica that is behind the oldest copies everything anew.
    pub const EPOCH_HISTORY_MAX: usize = 64;
    /// Rounds kept in a migration's record; the first ones are dropped.
    pub const ROUNDS_MAX: usize = 64;

    /// Restarts in a row of a VM that does not stay up, before the pool gives up on it.
    pub const RESTARTS_MAX: u32 = 5;
    /// A VM that ran this long in milliseconds counts as up, and its restarts count from zero again.
    pub const RESTART_STABLE_MS: u64 = 60_000;

    /// VMs that move away from a host at a time, whoever asked for it: they share its link, and each keeps a core busy. One after the
    /// other is faster for each; a second one fills the time in which the first waits for the pool.
    pub const MOVES_OUT_MAX: usize = 2;
    /// VMs that move to a host at a time, for the same reason.
    pub const MOVES_IN_MAX: usize = 2;
    /// VMs of the pool that move at a time: what a switch between 64 hosts carries while it also carries their disks.
    pub const MOVES_OF_POOL_MAX: usize = 32;
    /// Connections of one migration: what the engine takes.
    pub const MIGRATION_CONNECTIONS_MAX: u8 = 4;
    /// Moves that wait for others to end: a host full of VMs, several times over. More are a mistake of whoever asks.
    pub const MOVES_QUEUED_MAX: usize = 400;
    /// Longest wait of a move for its turn in milliseconds: as long as the longest planned work.
    pub const MOVE_QUEUED_MS: u64 = PLANNED_WORK_MS;
    /// Wait in milliseconds after a planned move that failed before the same VM is tried again.
    pub const PLANNED_MOVE_RETRY_MS: u64 = 10_000;
    /// Time of a drain, restore or balance in milliseconds: a host full of large VMs over a slow link.
    pub const PLANNED_WORK_MS: u64 = 4 * 3_600_000;
    /// vCPUs that a logical CPU is counted for, unless the pool's settings say otherwise: most guests idle most of the time.
    pub const CPU_OVERCOMMIT: u32 = 4;
    /// The most that the settings may say: beyond it hosts are judged by memory alone anyway.
    pub const CPU_OVERCOMMIT_MAX: u32 = 64;
    /// Difference between the fullest and the emptiest host, in permille of their memory, that a balance leaves alone: less is not
    /// worth the moves.
    pub const BALANCE_SPREAD_PERMILLE: u64 = 100;
    /// Moves of one balance plan.
    pub const BALANCE_MOVES_MAX: usize = 64;

    /// Commands that one planning round proposes: the rest follows in the next round, a lost host of 500 VMs in eight.
    pub const PLAN_COMMANDS_MAX: usize = 64;
}

// Those that wait are never forgotten, and leave room for those that have ended.
const _: () = assert!(2 * (MOVES_QUEUED_MAX + MOVES_OF_POOL_MAX) <= MIGRATIONS_MAX);
const _: () = assert!(CMDLINE_BYTES_MAX + 4 * PEM_BYTES_MAX < proto::limits::RAFT_ENTRY_BYTES_MAX);
const _: () = assert!(VM_MEMORY_BYTES_MIN <= VM_MEMORY_BYTES_MAX && VOLUME_BYTES_MIN <= VOLUME_BYTES_MAX);
