//! For each rejection: its stable code, its class, the object it is about, and what to do next.

use super::{ObjectKind, Rejection};
use crate::state::HostState;

/// What kind of refusal it is; the edge maps it to gRPC codes and exit codes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RejectionClass {
    /// The object does not exist.
    NotFound,
    /// The request is sound, but not in the present state of the pool.
    Precondition,
    /// The request itself is wrong.
    Invalid,
    /// The requester must not.
    Denied,
    /// Somebody else was faster, or the request is a stale copy.
    Conflict,
}

impl Rejection {
    /// Stable upper-case code.
    #[must_use]
    pub fn reason_code(&self) -> &'static str {
        match self {
            Self::Volume(inner) => inner.reason_code(),
            Self::Govern(inner) => inner.reason_code(),
            Self::Cluster(inner) => inner.reason_code(),
            Self::Memory(inner) => inner.reason_code(),
            Self::PoolNotInitialised => "POOL_NOT_INITIALISED",
            Self::PoolAlreadyInitialised => "POOL_ALREADY_INITIALISED",
            Self::BadTiming(_) => "BAD_TIMING",
            Self::RequestIdReused { .. } => "REQUEST_ID_REUSED",
            Self::NotFound { kind, .. } => not_found_code(*kind),
            Self::Ambiguous { .. } => "AMBIGUOUS_REFERENCE",
            Self::BadName { .. } => "BAD_NAME",
            Self::NameTaken { .. } => "NAME_TAKEN",
            Self::AddressTaken { .. } => "ADDRESS_TAKEN",
            Self::OutOfRange { .. } => "OUT_OF_RANGE",
            Self::NotAligned { .. } => "NOT_ALIGNED",
            Self::TooMany { .. } => "TOO_MANY_OBJECTS",
            Self::TokenUnknown => "TOKEN_UNKNOWN",
            Self::TokenExpired => "TOKEN_EXPIRED",
            Self::TokenUsed { .. } => "TOKEN_USED",
            Self::TokenRevoked => "TOKEN_REVOKED",
            Self::FeatureLevelTooLow { .. } => "FEATURE_LEVEL_TOO_LOW",
            Self::HostRemoved { .. } => "HOST_REMOVED",
            Self::HostNotUp { .. } => "HOST_NOT_UP",
            Self::HostNotLost { .. } => "HOST_NOT_LOST",
            Self::HostHasVms { .. } => "HOST_HAS_VMS",
            Self::LastInSyncReplica { .. } => "LAST_IN_SYNC_REPLICA",
            Self::LastImageHolder { .. } => "LAST_IMAGE_HOLDER",
            Self::LastHost { .. } => "LAST_HOST",
            Self::ImageInUse { .. } => "IMAGE_IN_USE",
            Self::ImageWithoutHolder { .. } => "IMAGE_WITHOUT_HOLDER",
            Self::NotEnoughHosts { .. } => "NOT_ENOUGH_HOSTS",
            Self::VolumeInUse { .. } => "VOLUME_IN_USE",
            Self::DuplicateDisk { .. } => "DUPLICATE_DISK",
            Self::Network(rejection) => rejection.reason_code(),
            _ => self.reason_code_of_run(),
        }
    }

    /// The codes of volume membership, of running VMs, and of tasks.
    fn reason_code_of_run(&self) -> &'static str {
        match self {
            Self::StaleVolume { .. } => "STALE_VOLUME",
            Self::StartAlreadyRecorded { .. } => "START_ALREADY_RECORDED",
            Self::IsrWouldBeEmpty { .. } => "ISR_WOULD_BE_EMPTY",
            Self::NotInIsr { .. } => "NOT_IN_ISR",
            Self::NotAReplica { .. } => "NOT_A_REPLICA",
            Self::StaleIncarnation { .. } => "STALE_INCARNATION",
            Self::VmAlreadyPlaced { .. } => "VM_ALREADY_PLACED",
            Self::VmNotStopped { .. } => "VM_NOT_STOPPED",
            Self::VmIsStopped { .. } => "VM_IS_STOPPED",
            Self::VmIsStopping { .. } => "VM_IS_STOPPING",
            Self::VmNotRunning { .. } => "VM_NOT_RUNNING",
            Self::VmNotPaused { .. } => "VM_NOT_PAUSED",
            Self::VmIsMigrating { .. } => "VM_IS_MIGRATING",
            Self::VmWithoutKernel { .. } => "VM_WITHOUT_KERNEL",
            Self::StaleEpoch { .. } => "STALE_EPOCH",
            Self::MayStillRun { .. } => "MAY_STILL_RUN",
            Self::NotHighlyAvailable { .. } => "NOT_HIGHLY_AVAILABLE",
            Self::Braked => "HA_BRAKED",
            Self::NotEnoughMemory { .. } => "NOT_ENOUGH_MEMORY",
            Self::NoHostFits { .. } => "NO_HOST_FITS",
            Self::TargetIsSource { .. } => "TARGET_IS_SOURCE",
            Self::CpuMismatch { .. } => "CPU_MISMATCH",
            Self::CpuLacks { .. } => "CPU_LACKS_FEATURES",
            Self::TscMismatch { .. } => "TSC_MISMATCH",
            Self::MachineMismatch { .. } => "MACHINE_MISMATCH",
            Self::WrongPhase { .. } => "WRONG_PHASE",
            Self::MigrationEnded { .. } => "MIGRATION_ENDED",
            Self::AlreadyCommitted { .. } => "ALREADY_COMMITTED",
            Self::LastSequenceMismatch { .. } => "LAST_SEQUENCE_MISMATCH",
            Self::TaskEnded { .. } => "TASK_ENDED",
            Self::TaskNotCancellable { .. } => "TASK_NOT_CANCELLABLE",
            Self::TaskNotExpired { .. } => "TASK_NOT_EXPIRED",
            Self::Disarmed => "HA_DISARMED",
            Self::HostOutOfService { .. } => "HOST_OUT_OF_SERVICE",
            Self::GroupForbids { .. } => "GROUP_FORBIDS",
            Self::TooManyMoves { .. } => "TOO_MANY_MOVES",
            Self::PoolMovesTooMany { .. } => "POOL_TOO_MANY_MOVES",
            Self::MoveQueueFull { .. } => "MIGRATION_QUEUE_FULL",
            Self::MayHaveArrived { .. } => "MAY_HAVE_ARRIVED",
            Self::MoveNotWanted { .. } => "MOVE_NOT_WANTED",
            Self::TaskNotFinished { .. } => "TASK_NOT_FINISHED",
            Self::LastAdmin { .. } => "LAST_ADMIN",
            _ => "REJECTED",
        }
    }

    /// What kind of refusal it is.
    #[must_use]
    pub fn class(&self) -> RejectionClass {
        match self {
            Self::Govern(inner) => inner.class(),
            Self::Cluster(inner) => inner.class(),
            Self::Memory(inner) => inner.class(),
            Self::NotFound { .. } => RejectionClass::NotFound,
            Self::Network(rejection) => rejection.class(),
            Self::BadTiming(_)
            | Self::Ambiguous { .. }
            | Self::BadName { .. }
            | Self::OutOfRange { .. }
            | Self::NotAligned { .. }
            | Self::DuplicateDisk { .. }
            | Self::LastSequenceMismatch { .. } => RejectionClass::Invalid,
            Self::TokenUnknown
            | Self::TokenExpired
            | Self::TokenUsed { .. }
            | Self::TokenRevoked
            | Self::HostRemoved { .. } => RejectionClass::Denied,
            Self::RequestIdReused { .. }
            | Self::NameTaken { .. }
            | Self::AddressTaken { .. }
            | Self::StaleVolume { .. }
            | Self::StartAlreadyRecorded { .. }
            | Self::StaleIncarnation { .. }
            | Self::StaleEpoch { .. } => RejectionClass::Conflict,
            _ => RejectionClass::Precondition,
        }
    }

    /// The object that it is about, e.g. `vm web1`; empty when it is about the pool.
    #[must_use]
    pub fn object(&self) -> String {
        match self {
            Self::Volume(inner) => inner.object(),
            Self::Govern(inner) => inner.object(),
            Self::Cluster(inner) => inner.object(),
            Self::Memory(inner) => inner.object(),
            Self::NotFound { kind, text } | Self::Ambiguous { kind, text, .. } => format!("{kind} {text}"),
            Self::NameTaken { kind, name } => format!("{kind} {name}"),
            Self::Network(rejection) => rejection.object(),
            Self::RequestIdReused { request_id } => format!("request {request_id}"),
            Self::AddressTaken { host, .. }
            | Self::TokenUsed { host }
            | Self::HostRemoved { host }
            | Self::HostNotUp { host, .. }
            | Self::HostNotLost { host, .. }
            | Self::HostHasVms { host, .. }
            | Self::LastInSyncReplica { host, .. }
            | Self::LastImageHolder { host, .. }
            | Self::LastHost { host }
            | Self::StaleIncarnation { host }
            | Self::HostOutOfService { host, .. }
            | Self::TooManyMoves { host, .. }
            | Self::NotEnoughMemory { host, .. } => format!("host {host}"),
            Self::LastAdmin { user } => format!("user {user}"),
            Self::CpuMismatch { target, .. }
            | Self::TscMismatch { target, .. }
            | Self::MachineMismatch { target, .. } => format!("host {target}"),
            Self::CpuLacks { host, .. } => format!("host {host}"),
            Self::ImageInUse { image, .. } | Self::ImageWithoutHolder { image } => format!("image {image}"),
            Self::VolumeInUse { volume, .. }
            | Self::DuplicateDisk { volume }
            | Self::StaleVolume { volume, .. }
            | Self::StartAlreadyRecorded { volume, .. }
            | Self::IsrWouldBeEmpty { volume }
            | Self::NotInIsr { volume, .. }
            | Self::NotAReplica { volume, .. } => format!("volume {volume}"),
            Self::VmAlreadyPlaced { vm }
            | Self::VmNotStopped { vm }
            | Self::VmIsStopped { vm }
            | Self::VmIsStopping { vm }
            | Self::VmNotRunning { vm }
            | Self::VmNotPaused { vm }
            | Self::VmIsMigrating { vm, .. }
            | Self::VmWithoutKernel { vm }
            | Self::StaleEpoch { vm, .. }
            | Self::MayStillRun { vm, .. }
            | Self::NotHighlyAvailable { vm }
            | Self::NoHostFits { vm, .. }
            | Self::GroupForbids { vm, .. }
            | Self::MoveNotWanted { vm }
            | Self::MayHaveArrived { vm, .. }
            | Self::TargetIsSource { vm, .. } => format!("vm {vm}"),
            Self::WrongPhase { migration, .. }
            | Self::MigrationEnded { migration }
            | Self::AlreadyCommitted { migration }
            | Self::LastSequenceMismatch { migration, .. } => format!("migration {migration}"),
            Self::TaskEnded { task }
            | Self::TaskNotCancellable { task }
            | Self::TaskNotFinished { task }
            | Self::TaskNotExpired { task } => {
                format!("task {task}")
            }
            Self::PoolNotInitialised
            | Self::PoolAlreadyInitialised
            | Self::BadTiming(_)
            | Self::BadName { .. }
            | Self::OutOfRange { .. }
            | Self::NotAligned { .. }
            | Self::TooMany { .. }
            | Self::TokenUnknown
            | Self::TokenExpired
            | Self::TokenRevoked
            | Self::FeatureLevelTooLow { .. }
            | Self::NotEnoughHosts { .. }
            | Self::Disarmed
            | Self::PoolMovesTooMany { .. }
            | Self::MoveQueueFull { .. }
            | Self::Braked => String::new(),
        }
    }

    /// What to do next: one sentence or a command.
    #[must_use]
    pub fn remedy(&self) -> String {
        match self {
            Self::Volume(inner) => inner.remedy(),
            Self::Govern(inner) => inner.remedy(),
            Self::Cluster(inner) => inner.remedy(),
            Self::Memory(inner) => inner.remedy(),
            Self::PoolNotInitialised => "found the pool with `poold init`".into(),
            Self::PoolAlreadyInitialised => "use `poold join` with a token of the pool".into(),
            Self::BadTiming(_) => "choose a consistent profile of timings".into(),
            Self::RequestIdReused { .. } => "use a new request id for a new change".into(),
            Self::NotFound { kind, .. } => list_remedy(*kind),
            Self::Ambiguous { .. } => "write more of the name or the id".into(),
            Self::BadName { .. } => {
                "use 1 to 63 of a-z A-Z 0-9 . _ - and no form of an id such as vm-17".into()
            }
            Self::NameTaken { kind: ObjectKind::Host, name } => {
                format!("choose another name; if that host is gone for good, `poolctl host forget {name}`")
            }
            Self::NameTaken { .. } => "choose another name".into(),
            Self::AddressTaken { host, .. } => {
                format!("choose another one; if that host is gone for good, `poolctl host forget {host}`")
            }
            Self::OutOfRange { field, min, max, .. } => {
                format!("choose a value from {} to {}", field.show(*min), field.show(*max))
            }
            Self::NotAligned { .. } => "choose a multiple of 4 KiB".into(),
            Self::TooMany { .. } => "delete what is not needed any more".into(),
            Self::TokenUnknown | Self::TokenExpired | Self::TokenUsed { .. } | Self::TokenRevoked => {
                "create a new token with `poolctl host token create`".into()
            }
            Self::FeatureLevelTooLow { .. } => "install the pool's version on the host".into(),
            Self::HostRemoved { .. } => "wipe its data directory and join it again as a new host".into(),
            Self::HostNotUp { host, state: HostState::Lost } => {
                format!(
                    "choose another host, or bring it back; if it is gone for good, `poolctl host forget {host}`"
                )
            }
            Self::HostNotUp { host, .. } => format!("see `poolctl host show {host}`, or choose another host"),
            Self::HostNotLost { host, .. } => format!("see `poolctl host show {host}`"),
            Self::HostHasVms { host, .. } => {
                format!("move its VMs away first: `poolctl host drain {host}`")
            }
            Self::LastInSyncReplica { volume, .. } => {
                format!(
                    "wait for another replica to catch up (`poolctl volume show {volume}`), or delete the volume"
                )
            }
            Self::LastImageHolder { image, .. } => {
                format!("let another host fetch it, or delete it: `poolctl image delete {image}`")
            }
            Self::LastHost { .. } => "stop the daemon and delete its data to end the pool".into(),
            Self::ImageInUse { vm, .. } => format!("delete the VM first: `poolctl vm delete {vm}`"),
            Self::ImageWithoutHolder { .. } => "import the image again".into(),
            Self::NotEnoughHosts { up, .. } => format!("choose at most {up} replicas, or add hosts"),
            Self::VolumeInUse { vm, .. } => format!("delete the VM first: `poolctl vm delete {vm}`"),
            Self::DuplicateDisk { .. } => "name each disk once".into(),
            Self::Network(rejection) => rejection.remedy(),
            _ => self.remedy_of_run(),
        }
    }

    /// The remedies of volume membership, of running VMs, and of tasks.
    fn remedy_of_run(&self) -> String {
        match self {
            Self::VmAlreadyPlaced { vm } => format!("see `poolctl vm show {vm}`"),
            Self::VmNotStopped { vm } => {
                format!("stop it first: `poolctl vm stop {vm}`, at once with --force")
            }
            Self::VmIsStopped { vm } => format!("start it with `poolctl vm start {vm}`"),
            Self::VmIsStopping { vm } => {
                format!("wait until it has stopped, or `poolctl vm stop {vm} --force`")
            }
            Self::VmNotRunning { vm } => format!("see `poolctl vm show {vm}`"),
            Self::VmNotPaused { vm } => format!("see `poolctl vm show {vm}`"),
            Self::VmIsMigrating { migration, .. } => {
                format!("wait for it, or `poolctl migration cancel {migration}`")
            }
            Self::VmWithoutKernel { .. } => "create the VM with --disk or --kernel".into(),
            Self::MayStillRun { vm, host } => {
                format!(
                    "make sure that {host} is off, then `poolctl host confirm-dead {host}` or `poolctl vm stop {vm} --force`"
                )
            }
            Self::NotHighlyAvailable { vm } => format!("start it with `poolctl vm start {vm}`"),
            Self::Braked => "check the hosts, then `poolctl ha resume`".into(),
            Self::Disarmed => "switch it on again with `poolctl ha arm`".into(),
            Self::HostOutOfService { host, .. } => {
                format!("choose another host, or put it back into service: `poolctl host restore {host}`")
            }
            Self::GroupForbids { group, .. } => {
                format!("choose another host, or change the group: `poolctl group show {group}`")
            }
            Self::TooManyMoves { .. } | Self::PoolMovesTooMany { .. } | Self::MoveQueueFull { .. } => {
                "wait until one has ended: `poolctl migration list`".into()
            }
            Self::LastAdmin { .. } => "make another user an admin first: `poolctl user create`".into(),
            Self::NotEnoughMemory { .. } | Self::NoHostFits { .. } => {
                "stop or move other VMs, or add a host: `poolctl host list` shows free memory".into()
            }
            Self::TargetIsSource { .. } => "choose another host, or none".into(),
            Self::CpuMismatch { .. } => "choose a host with the same CPU".into(),
            Self::CpuLacks { vm, .. } => format!(
                "choose another host, or `poolctl pool set cpu-profile=host-common` and `poolctl vm reboot {vm}`"
            ),
            Self::TscMismatch { .. } => "choose a host with the same TSC rate, or one that scales it".into(),
            Self::MachineMismatch { .. } => "upgrade the older of the two daemons".into(),
            Self::WrongPhase { migration, .. }
            | Self::MigrationEnded { migration }
            | Self::LastSequenceMismatch { migration, .. } => {
                format!("see `poolctl migration show {migration}`")
            }
            Self::AlreadyCommitted { .. } => "wait until it is done, then move the VM back".into(),
            Self::TaskEnded { task } | Self::TaskNotExpired { task } => {
                format!("see `poolctl task show {task}`")
            }
            Self::TaskNotCancellable { .. } => "wait until the VM has stopped, then start it again".into(),
            _ => "read the present state and decide again".into(),
        }
    }
}

fn not_found_code(kind: ObjectKind) -> &'static str {
    match kind {
        ObjectKind::Host => "HOST_NOT_FOUND",
        ObjectKind::Vm => "VM_NOT_FOUND",
        ObjectKind::Volume => "VOLUME_NOT_FOUND",
        ObjectKind::Snapshot => "SNAPSHOT_NOT_FOUND",
        ObjectKind::Image => "IMAGE_NOT_FOUND",
        ObjectKind::Task => "TASK_NOT_FOUND",
        ObjectKind::Migration => "MIGRATION_NOT_FOUND",
        ObjectKind::Token => "TOKEN_NOT_FOUND",
        ObjectKind::Group => "GROUP_NOT_FOUND",
        ObjectKind::Network => "NETWORK_NOT_FOUND",
        ObjectKind::Cluster => "CLUSTER_NOT_FOUND",
        ObjectKind::User => "USER_NOT_FOUND",
        ObjectKind::Pool => "POOL_NOT_FOUND",
    }
}

fn list_remedy(kind: ObjectKind) -> String {
    match kind {
        ObjectKind::Token => "see `poolctl host token list`".into(),
        ObjectKind::Network => "see `poolctl net list`".into(),
        _ => format!("see `poolctl {kind} list`"),
    }
}
