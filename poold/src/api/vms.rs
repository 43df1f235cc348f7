//! Service `VmService`.

use super::{stats, status::rejected, views};
use crate::{
    agent::Agents,
    api::{Principal, require_user},
    node::NodeContext,
};
use pool_state::{
    Command, Outcome, PoolState, Rejection,
    command::CreateVm,
    state::{DiskCloning, HaPolicy, StopMode},
};
use proto::{
    ByteCount, MemoryPages, VmId,
    v1::{
        CloneVmRequest, CreateVmRequest, ListVmsRequest, ListVmsResponse, RequestMeta, StartVmRequest,
        StopVmRequest, Task, Vm, VmChangeRequest, VmExplanation, VmRef, VmStats,
        vm_service_server::VmService,
    },
};
use tonic::{Request, Response, Status};

/// Priority of recovery of a VM whose creator names none.
const PRIORITY_DEFAULT: u8 = 100;

/// gRPC service `VmService`.
pub struct VmApi {
    context: NodeContext,
    agents: Agents,
}

impl VmApi {
    /// The service of this host.
    pub fn new(context: NodeContext, agents: Agents) -> Self {
        Self { context, agents }
    }

    /// Proposes a change of one VM and answers with the VM as it is then.
    async fn change(
        &self,
        request: Request<VmChangeRequest>,
        command: impl FnOnce(VmId) -> Command,
    ) -> Result<Response<Vm>, Status> {
        let principal = require_user(&request)?;
        let VmChangeRequest { meta, vm } = request.into_inner();
        let before = self.context.read().await?;
        let id = views::found(before.resolve_vm(&vm))?.id;
        let (_, state) = self.context.change(&principal, meta, command(id)).await?;
        Ok(Response::new(view_of(&state, id)?))
    }

    async fn task(
        &self,
        principal: &Principal,
        meta: Option<RequestMeta>,
        command: Command,
    ) -> Result<Response<Task>, Status> {
        let (outcome, state) = self.context.change(principal, meta, command).await?;
        Ok(Response::new(views::task_begun(&state, outcome)?))
    }
}

fn view_of(state: &PoolState, vm: VmId) -> Result<Vm, Status> {
    Ok(views::vm(state, views::found(state.vm(vm))?))
}

fn priority(number: u32) -> Result<u8, Status> {
    match number {
        0 => Ok(PRIORITY_DEFAULT),
        number => u8::try_from(number)
            .map_err(|_| Status::invalid_argument(format!("ha priority {number} is above 255"))),
    }
}

fn create_command(state: &PoolState, request: CreateVmRequest) -> Result<Command, Status> {
    let image = |text: &str| match text {
        "" => Ok(None),
        text => views::found(state.resolve_image(text)).map(|image| Some(image.id)),
    };
    let ha = match request.ha.as_str() {
        "" | "restart" => HaPolicy::Restart,
        "none" => HaPolicy::None,
        other => {
            return Err(Status::invalid_argument(format!(
                "ha policy `{other}` is neither `restart` nor `none`"
            )));
        }
    };
    let disks: Result<Vec<_>, Status> = request
        .disks
        .iter()
        .map(|disk| views::found(state.resolve_volume(disk)).map(|volume| volume.id))
        .collect();
    let nets: Result<Vec<_>, Status> = request
        .nets
        .iter()
        .map(|net| views::found(state.resolve_network(net)).map(|network| network.id))
        .collect();
    let cluster = match request.cluster.as_str() {
        "" => Ok(None),
        text => views::found(state.resolve_cluster(text)).map(|cluster| cluster.map(|cluster| cluster.id)),
    };
    Ok(Command::CreateVm(CreateVm {
        name: request.name,
        vcpus: request.vcpus,
        memory: ByteCount(request.memory_bytes),
        disks: disks?,
        kernel: image(&request.kernel)?,
        initrd: image(&request.initrd)?,
        cmdline: request.cmdline,
        ha,
        priority: priority(request.ha_priority)?,
        nets: nets?,
        cpu_profile: views::cpu_profile(&request.cpu_profile)?,
        cluster: cluster?,
        pages: MemoryPages::of_flag(request.huge_pages),
    }))
}

#[tonic::async_trait]
impl VmService for VmApi {
    async fn create(&self, request: Request<CreateVmRequest>) -> Result<Response<Vm>, Status> {
        let principal = require_user(&request)?;
        let mut request = request.into_inner();
        let meta = request.meta.take();
        let command = create_command(&*self.context.read().await?, request)?;
        let (outcome, state) = self.context.change(&principal, meta, command).await?;
        let Outcome::Vm(vm) = outcome else { return Err(views::unexpected(outcome)) };
        Ok(Response::new(view_of(&state, vm)?))
    }

    async fn clone_vm(&self, request: Request<CloneVmRequest>) -> Result<Response<Task>, Status> {
        let principal = require_user(&request)?;
        let CloneVmRequest { meta, vm, name, full } = request.into_inner();
        let disks = if full { DiskCloning::Full } else { DiskCloning::Linked };
        let vm = views::found(self.context.read().await?.resolve_vm(&vm))?.id;
        self.task(&principal, meta, Command::CloneVm { vm, name, disks }).await
    }

    async fn start(&self, request: Request<StartVmRequest>) -> Result<Response<Task>, Status> {
        let principal = require_user(&request)?;
        let StartVmRequest { meta, vm, host } = request.into_inner();
        let state = self.context.read().await?;
        let host = match host.as_str() {
            "" => None,
            host => Some(views::found(state.resolve_host(host))?.id),
        };
        let command = Command::StartVm { vm: views::found(state.resolve_vm(&vm))?.id, host };
        self.task(&principal, meta, command).await
    }

    async fn stop(&self, request: Request<StopVmRequest>) -> Result<Response<Task>, Status> {
        let principal = require_user(&request)?;
        let StopVmRequest { meta, vm, force } = request.into_inner();
        let state = self.context.read().await?;
        let mode = if force { StopMode::Force } else { StopMode::Clean };
        let command = Command::StopVm { vm: views::found(state.resolve_vm(&vm))?.id, mode };
        self.task(&principal, meta, command).await
    }

    async fn reboot(&self, request: Request<StopVmRequest>) -> Result<Response<Task>, Status> {
        let principal = require_user(&request)?;
        let StopVmRequest { meta, vm, force } = request.into_inner();
        let state = self.context.read().await?;
        let mode = if force { StopMode::Force } else { StopMode::Clean };
        let command = Command::RebootVm { vm: views::found(state.resolve_vm(&vm))?.id, mode };
        self.task(&principal, meta, command).await
    }

    async fn pause(&self, request: Request<VmChangeRequest>) -> Result<Response<Vm>, Status> {
        self.change(request, |vm| Command::PauseVm { vm }).await
    }

    async fn resume(&self, request: Request<VmChangeRequest>) -> Result<Response<Vm>, Status> {
        self.change(request, |vm| Command::ResumeVm { vm }).await
    }

    async fn delete(&self, request: Request<VmChangeRequest>) -> Result<Response<Vm>, Status> {
        let principal = require_user(&request)?;
        let VmChangeRequest { meta, vm } = request.into_inner();
        let before = self.context.read().await?;
        let Some(found) = views::to_delete(&before, meta.as_ref(), before.resolve_vm(&vm))? else {
            return Ok(Response::new(Vm { name: vm, ..Vm::default() }));
        };
        // The answer shows what was deleted.
        let vm = views::vm(&before, found);
        self.context.change(&principal, meta, Command::DeleteVm { vm: VmId(vm.id) }).await?;
        Ok(Response::new(vm))
    }

    async fn list(&self, request: Request<ListVmsRequest>) -> Result<Response<ListVmsResponse>, Status> {
        require_user(&request)?;
        let state = self.context.fresh().await;
        let vms = state.vms.values().map(|vm| views::vm(&state, vm)).collect();
        Ok(Response::new(ListVmsResponse { revision: state.revision, vms }))
    }

    async fn show(&self, request: Request<VmRef>) -> Result<Response<Vm>, Status> {
        require_user(&request)?;
        let state = self.context.fresh().await;
        Ok(Response::new(views::vm(&state, views::found(state.resolve_vm(&request.get_ref().r#ref))?)))
    }

    async fn explain(&self, request: Request<VmRef>) -> Result<Response<VmExplanation>, Status> {
        require_user(&request)?;
        let state = self.context.fresh().await;
        let vm = views::found(state.resolve_vm(&request.get_ref().r#ref))?;
        Ok(Response::new(views::explanation(&state, vm)))
    }

    async fn stats(&self, request: Request<VmRef>) -> Result<Response<VmStats>, Status> {
        require_user(&request)?;
        let state = self.context.fresh().await;
        let vm = views::found(state.resolve_vm(&request.get_ref().r#ref))?;
        let stopped = || rejected(&Rejection::VmIsStopped { vm: vm.name.clone() });
        let host = vm.placement.ok_or_else(stopped)?;
        let machine = self.agents.vm_stats(host, vm.id).await?;
        Ok(Response::new(stats::of_vm(&state, vm, host, machine)))
    }

    async fn r#where(&self, request: Request<VmRef>) -> Result<Response<Vm>, Status> {
        require_user(&request)?;
        let state = self.context.read().await?;
        Ok(Response::new(views::vm(&state, views::found(state.resolve_vm(&request.get_ref().r#ref))?)))
    }
}
