//! Hosts: joining, serving, being lost, returning, leaving.

use super::{
    Applied, Change, check_length, check_name, check_range, check_room, find_mut, placement::check_up,
    tokens::TokenUse,
};
use crate::rejection::{GovernRejection, VolumeRejection};
use crate::{
    command::{HostFacts, JoinHost, RemoveMode, UpdateHost},
    limits::{ADDRESS_BYTES_MAX, HOSTS_MAX, PUBLIC_KEY_BYTES_MAX, REMOVED_HOSTS_MAX},
    outcome::Outcome,
    rejection::{Field, ObjectKind, Rejection},
    state::{
        Desired, EventKind, HaPolicy, Host, HostDuty, HostState, IsrMember, MigrationOutcome, PoolState,
        StoreSpace, TargetChoice, TaskState, Token, TokenState, Volume,
    },
};
use proto::{ByteCount, HostId, MigrationId, VmId, VolumeId};
use std::collections::BTreeMap;

/// Longest CPU summary, boot id or incarnation in bytes.
const FACT_BYTES_MAX: usize = 256;

impl PoolState {
    /// Everything that keeps a host from joining now, except that it may have joined before.
    #[must_use]
    pub fn join_problems(&self, now_ms: u64, join: &JoinHost) -> Vec<Rejection> {
        let mut problems = Vec::new();
        match self.token_of(&join.secret_hash) {
            Err(unknown) => problems.push(unknown),
            Ok(Token { rekeys: Some(host), .. }) => {
                return vec![GovernRejection::TokenRekeys { host: self.host_name(*host) }.into()];
            }
            Ok(token) => match self.judge_token(token, &join.facts.public_key, now_ms) {
                Ok(TokenUse::Fresh) => {}
                Ok(TokenUse::Repeated(host)) => return self.check_rejoin(host).err().into_iter().collect(),
                Err(void) => problems.push(void),
            },
        }
        problems.extend(self.facts_problems(&join.facts));
        problems
    }

    fn check_rejoin(&self, host: HostId) -> Result<(), Rejection> {
        let removed = || Rejection::HostRemoved { host: self.host_name(host) };
        if self.host(host)?.is_member() { Ok(()) } else { Err(removed()) }
    }

    fn facts_problems(&self, facts: &HostFacts) -> Vec<Rejection> {
        let mut problems = Vec::new();
        let names = self.members().map(|host| host.name.as_str());
        problems.extend(check_name(ObjectKind::Host, &facts.name, names).err());
        problems.extend(check_room(ObjectKind::Host, self.members().count(), HOSTS_MAX).err());
        problems.extend(check_length(Field::Address, facts.address.as_bytes(), ADDRESS_BYTES_MAX).err());
        problems.extend(check_length(Field::PublicKey, &facts.public_key, PUBLIC_KEY_BYTES_MAX).err());
        problems.extend(
            check_range(Field::ShortText, facts.cpu_vendor.len() as u64, 0, FACT_BYTES_MAX as u64).err(),
        );
        problems.extend(self.check_address_free(None, &facts.address).err());
        let pool_level = self.settings.feature_level;
        if facts.feature_level < pool_level {
            problems.push(Rejection::FeatureLevelTooLow { host_level: facts.feature_level, pool_level });
        }
        problems
    }

    fn check_address_free(&self, except: Option<HostId>, address: &str) -> Result<(), Rejection> {
        match self.members().find(|host| Some(host.id) != except && host.address == address) {
            Some(host) => {
                Err(Rejection::AddressTaken { address: address.to_owned(), host: host.name.clone() })
            }
            None => Ok(()),
        }
    }
}

impl Change<'_> {
    pub(super) fn join_host(&mut self, join: &JoinHost) -> Applied {
        if let Some(problem) = self.state.join_problems(self.time_ms, join).into_iter().next() {
            return Err(problem);
        }
        let token = self.state.token_of(&join.secret_hash)?.clone();
        if let TokenState::Used { host } = token.state {
            return Ok(Outcome::Host(host));
        }
        let host = HostId(self.index);
        self.add_host(host, &join.facts)?;
        find_mut(&mut self.state.tokens, &token.id, ObjectKind::Token)?.state = TokenState::Used { host };
        Ok(Outcome::Host(host))
    }

    pub(super) fn add_host(&mut self, id: HostId, facts: &HostFacts) -> Result<(), Rejection> {
        if let Some(problem) = self.state.facts_problems(facts).into_iter().next() {
            return Err(problem);
        }
        let host = Host {
            id,
            name: facts.name.clone(),
            address: facts.address.clone(),
            vm_memory: facts.vm_memory,
            public_key: facts.public_key.clone(),
            cpu_vendor: facts.cpu_vendor.clone(),
            feature_level: facts.feature_level,
            version: String::new(),
            shows_ca: None,
            incarnation: None,
            replica_fingerprint: None,
            boot_id: String::new(),
            state: HostState::Joining,
            joined_ms: self.time_ms,
            lost_ms: None,
            duty: HostDuty::Active,
            labels: BTreeMap::new(),
            cpus: 0,
            cpu: proto::HostCpu::default(),
            cluster: None,
            store: None,
            huge_memory: ByteCount::default(),
        };
        self.state.hosts.insert(id, host);
        self.event(
            EventKind::HostJoined,
            format!("host {}", facts.name),
            format!("joined at {}", facts.address),
        );
        Ok(())
    }

    pub(super) fn update_host(&mut self, update: &UpdateHost) -> Applied {
        self.check_member(update.host)?;
        check_length(Field::Address, update.address.as_bytes(), ADDRESS_BYTES_MAX)?;
        check_length(Field::ShortText, update.incarnation.0.as_bytes(), FACT_BYTES_MAX)?;
        check_range(Field::ShortText, update.boot_id.len() as u64, 0, FACT_BYTES_MAX as u64)?;
        self.state.check_address_free(Some(update.host), &update.address)?;
        let reserved = self.state.reserved_memory().get(&update.host).copied().unwrap_or_default();
        let host = self.host_mut(update.host)?;
        let before = host.clone();
        host.incarnation = Some(update.incarnation.clone());
        host.replica_fingerprint = Some(update.replica_fingerprint);
        host.boot_id.clone_from(&update.boot_id);
        host.address.clone_from(&update.address);
        // What VMs have reserved was promised when the host was larger.
        host.vm_memory = update.vm_memory.max(reserved);
        if host.state == HostState::Joining {
            host.state = HostState::Up;
        }
        if *host != before {
            let object = format!("host {}", host.name);
            let message = format!("serves at {}", host.address);
            self.event(EventKind::HostUp, object, message);
        }
        Ok(Outcome::Host(update.host))
    }

    /// The disk of its block store is fuller or emptier.
    pub(super) fn set_host_store(&mut self, id: HostId, store: StoreSpace) -> Applied {
        self.check_member(id)?;
        let host = self.host_mut(id)?;
        let had_room = host.has_store_room();
        host.store = Some(store);
        if host.has_store_room() != had_room {
            let object = format!("host {}", host.name);
            let word = if had_room { "takes no further replicas" } else { "takes replicas again" };
            let message = format!("{word}: its block store is {} percent full", store.percent());
            self.event(EventKind::HostUp, object, message);
        }
        Ok(Outcome::Host(id))
    }

    pub(super) fn host_lost(&mut self, id: HostId) -> Applied {
        let time_ms = self.time_ms;
        let host = self.host_mut(id)?;
        check_up(host)?;
        host.state = HostState::Lost;
        host.lost_ms = Some(time_ms);
        let name = host.name.clone();
        self.event(EventKind::HostLost, format!("host {name}"), "declared lost: it renewed no lease".into());
        self.end_migrations_of(id, &format!("host {name} was lost"))?;
        for vm in self.vms_on(id) {
            self.vm_lost_its_host(vm, &name)?;
        }
        self.services_lost_their_host(id, &name)?;
        Ok(Outcome::Host(id))
    }

    /// What changes at once for a VM whose host is lost; a new placement comes with its recovery.
    fn vm_lost_its_host(&mut self, id: VmId, host: &str) -> Result<(), Rejection> {
        let vm = self.state.vm(id)?;
        match (vm.spec.ha, vm.desired) {
            (HaPolicy::Restart, Desired::Stopped) => return self.finish_stop_of_lost(id),
            (HaPolicy::Restart, Desired::Running | Desired::Paused) => {}
            (HaPolicy::None, _) => {
                self.vm_mut(id)?.problem = Some(format!("host {host} is lost, and the VM has ha none"));
            }
        }
        let problem = format!("host {host} was lost");
        self.end_vm_task(id, |_| TaskState::Failed { problem: problem.clone() });
        self.vm_event(EventKind::VmFailed, id, problem);
        Ok(())
    }

    /// Ends the migrations that a host can't take part in any more. A committed one goes on when only its source is gone, and goes
    /// back when its target is gone before the VM ran there.
    fn end_migrations_of(&mut self, host: HostId, reason: &str) -> Result<(), Rejection> {
        let ends: Vec<MigrationId> = self
            .state
            .running_migrations()
            .filter(|migration| {
                let arrived =
                    self.state.vms.get(&migration.vm).is_some_and(crate::state::Vm::is_reported_running);
                let needs_source = !migration.is_committed() || arrived;
                // The pool chooses another one when its turn comes.
                let needs_target = !(migration.is_queued() && migration.choice == TargetChoice::Pool);
                (migration.target == host && needs_target) || (migration.source == host && needs_source)
            })
            .map(|migration| migration.id)
            .collect();
        for id in ends {
            let migration = self.state.migration(id)?;
            if migration.target == host && self.state.obstacle_of_reclaim(migration).is_none() {
                self.reclaim(id)?;
            } else {
                self.give_up_migration(id, MigrationOutcome::Failed, reason.to_owned())?;
            }
        }
        Ok(())
    }

    pub(super) fn host_returned(&mut self, id: HostId) -> Applied {
        let host = self.host_mut(id)?;
        match host.state {
            HostState::Up => return Ok(Outcome::Host(id)),
            HostState::Joining => {
                return Err(Rejection::HostNotUp { host: host.name.clone(), state: host.state });
            }
            HostState::Removed => return Err(Rejection::HostRemoved { host: host.name.clone() }),
            HostState::Lost => {
                host.state = HostState::Up;
                host.lost_ms = None;
            }
        }
        let object = format!("host {}", host.name);
        self.event(EventKind::HostReturned, object, "renews its lease again".into());
        for vm in self.vms_on(id) {
            let vm = self.vm_mut(vm)?;
            if vm.spec.ha == HaPolicy::None {
                vm.problem = None;
            }
        }
        self.services_have_their_host(id)?;
        Ok(Outcome::Host(id))
    }

    pub(super) fn remove_host(&mut self, id: HostId, mode: RemoveMode) -> Applied {
        let host = self.state.host(id)?.clone();
        let name = host.name.clone();
        self.check_member(id)?;
        if self.state.members().count() == 1 {
            return Err(Rejection::LastHost { host: name });
        }
        let vms = self.vms_on(id);
        match mode {
            RemoveMode::Drained => self.check_drained(&host, &vms)?,
            RemoveMode::ConfirmDead if host.state != HostState::Lost => {
                return Err(Rejection::HostNotLost { host: name, state: host.state });
            }
            RemoveMode::ConfirmDead => {}
        }
        self.end_migrations_of(id, &format!("host {name} was removed"))?;
        for vm in vms {
            self.give_up_vm(vm, &format!("host {name} was removed while the VM was there"))?;
        }
        self.give_up_services(id, &format!("host {name} was removed"))?;
        let removed = TaskState::Failed { problem: format!("host {name} was removed") };
        self.give_up_drain(id, HostDuty::Cordoned, removed)?;
        self.end_restores_of(id);
        for vm in self.home_of(id) {
            self.vm_mut(vm)?.home = None;
        }
        self.take_host_from_groups(id)?;
        let host = self.host_mut(id)?;
        host.state = HostState::Removed;
        host.lost_ms = None;
        self.take_replicas_from(id)?;
        self.take_images_from(id);
        self.event(EventKind::HostRemoved, format!("host {name}"), format!("removed by {}", self.principal));
        self.forget_removed_hosts();
        Ok(Outcome::Host(id))
    }

    fn check_drained(&self, host: &Host, vms: &[VmId]) -> Result<(), Rejection> {
        if let Some(first) = vms.first() {
            let example = self.state.vm(*first)?.name.clone();
            return Err(Rejection::HostHasVms { host: host.name.clone(), count: vms.len() as u64, example });
        }
        // Its copies are made elsewhere first; a volume that is nowhere else is the worse news.
        let held = self.state.volumes.values().filter(|volume| volume.replicas.contains(&host.id));
        let held: Vec<&Volume> = held.collect();
        let stays = |member: &&IsrMember| member.host != host.id && self.state.is_current(member);
        if held.iter().all(|volume| volume.isr.iter().any(|member| stays(&member)))
            && let Some(example) = held.first()
        {
            let (host, count, example) = (host.name.clone(), held.len() as u64, example.name.clone());
            return Err(Rejection::Volume(VolumeRejection::HostHasReplicas { host, count, example }));
        }
        match self.state.images.values().find(|image| image.holders == [host.id]) {
            Some(image) => {
                Err(Rejection::LastImageHolder { host: host.name.clone(), image: image.name.clone() })
            }
            None => Ok(()),
        }
    }

    /// A VM of a host that an operator confirmed as dead: not placed any more, and fenced.
    pub(super) fn give_up_vm(&mut self, id: VmId, problem: &str) -> Result<(), Rejection> {
        let problem = problem.to_owned();
        self.fence(id)?;
        let vm = self.vm_mut(id)?;
        vm.problem = (vm.desired != Desired::Stopped).then(|| problem.clone());
        vm.desired = Desired::Stopped;
        self.end_vm_task(id, |_| TaskState::Failed { problem: problem.clone() });
        self.vm_event(EventKind::VmFailed, id, problem);
        Ok(())
    }

    /// Takes a removed host out of all replica sets and chooses others in its place.
    fn take_replicas_from(&mut self, id: HostId) -> Result<(), Rejection> {
        let affected: Vec<VolumeId> = self
            .state
            .volumes
            .values()
            .filter(|volume| volume.replicas.contains(&id))
            .map(|volume| volume.id)
            .collect();
        for volume_id in affected {
            let volume = self.state.volume(volume_id)?;
            let stays = |member: &&IsrMember| member.host != id && self.state.is_current(member);
            if volume.isr_member(id).is_some() && !volume.isr.iter().any(|member| stays(&member)) {
                let host = self.state.host_name(id);
                return Err(Rejection::LastInSyncReplica { host, volume: volume.name.clone() });
            }
            let present: Vec<HostId> = volume.replicas.iter().copied().filter(|host| *host != id).collect();
            let replacement = self.state.next_replica(&self.state.replica_hosts(), &present);
            let volume = self.volume_mut(volume_id)?;
            volume.replicas.retain(|replica| *replica != id);
            volume.isr.retain(|member| member.host != id);
            volume.replicas.extend(replacement);
            volume.replicas.sort_unstable();
            volume.isr_version = volume.isr_version.next();
            let object = format!("volume {}", volume.name);
            let message = match replacement {
                Some(host) => format!("its replica moves to host {}", self.state.host_name(host)),
                None => "it has one replica less: no other host can take it".to_owned(),
            };
            self.event(EventKind::VolumeIsr, object, message);
        }
        Ok(())
    }

    fn take_images_from(&mut self, id: HostId) {
        let held: Vec<_> = self
            .state
            .images
            .values()
            .filter(|image| image.holders.contains(&id))
            .map(|image| image.id)
            .collect();
        for image in held {
            if let Some(image) = self.state.images.get_mut(&image) {
                image.holders.retain(|holder| *holder != id);
            }
        }
    }

    fn forget_removed_hosts(&mut self) {
        let removed: Vec<HostId> =
            self.state.hosts.values().filter(|host| !host.is_member()).map(|host| host.id).collect();
        let surplus = removed.len().saturating_sub(REMOVED_HOSTS_MAX);
        for id in &removed[..surplus] {
            self.state.hosts.remove(id);
        }
    }

    fn vms_on(&self, host: HostId) -> Vec<VmId> {
        self.state.vms_on(host).map(|vm| vm.id).collect()
    }
}
