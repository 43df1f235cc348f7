//! `poolctl vm`, but for moves.

use super::{Session, migrations};
use crate::{
    args::{CreateArguments, HaPolicy, VmCommand},
    client::{call, new_meta},
    failure::Failure,
    output::{Format, Object as _},
    view::{ExplanationView, TaskView, VmStatsView, VmView},
    wait,
};
use proto::{
    TaskId,
    v1::{
        CloneVmRequest, CreateVmRequest, ListVmsRequest, StartVmRequest, StopVmRequest, Task,
        VmChangeRequest, VmRef, vm_service_client::VmServiceClient,
    },
};

use std::time::Duration;

/// Runs a command of VMs.
///
/// # Errors
/// As the pool answers, and when a task that is waited for fails.
pub async fn run(command: VmCommand, session: &mut Session) -> Result<(), Failure> {
    match command {
        VmCommand::Create(arguments) => create(arguments, session).await,
        VmCommand::Start { vm, host, detach } => {
            let request = StartVmRequest { meta: new_meta(), vm: vm.clone(), host: host.unwrap_or_default() };
            let task = call!(session.client, VmServiceClient, start, request).await?;
            end_of_task(session, task, &vm, &format!("starting {vm}"), detach).await
        }
        VmCommand::Stop { vm, force, detach } => {
            let request = StopVmRequest { meta: new_meta(), vm: vm.clone(), force };
            let task = call!(session.client, VmServiceClient, stop, request).await?;
            end_of_task(session, task, &vm, &format!("stopping {vm}"), detach).await
        }
        VmCommand::Reboot { vm, force, detach } => {
            let request = StopVmRequest { meta: new_meta(), vm: vm.clone(), force };
            let task = call!(session.client, VmServiceClient, reboot, request).await?;
            end_of_task(session, task, &vm, &format!("rebooting {vm}"), detach).await
        }
        VmCommand::Pause { vm } => {
            let request = VmChangeRequest { meta: new_meta(), vm };
            let vm = call!(session.client, VmServiceClient, pause, request).await?;
            tell(session, vm.into())
        }
        VmCommand::Resume { vm } => {
            let request = VmChangeRequest { meta: new_meta(), vm };
            let vm = call!(session.client, VmServiceClient, resume, request).await?;
            tell(session, vm.into())
        }
        VmCommand::Migrate(arguments) => migrations::migrate(arguments, session).await,
        VmCommand::List => {
            let vms = call!(session.client, VmServiceClient, list, ListVmsRequest {}).await?;
            let views: Vec<VmView> = vms.vms.into_iter().map(VmView::from).collect();
            session.output.list(vms.revision, &views)
        }
        VmCommand::Show { vm } => {
            let vm = call!(session.client, VmServiceClient, show, VmRef { r#ref: vm }).await?;
            session.output.show(&VmView::from(vm))
        }
        VmCommand::Explain { vm } => {
            let answer = call!(session.client, VmServiceClient, explain, VmRef { r#ref: vm }).await?;
            let view = ExplanationView::from(answer);
            if matches!(session.output.format(), Format::Table | Format::Wide) {
                return session.output.raw(view.text().as_bytes());
            }
            session.output.show(&view)
        }
        VmCommand::Stats { vm, interval } => stats(&vm, interval, session).await,
        VmCommand::Where { vm } => {
            let vm = call!(session.client, VmServiceClient, r#where, VmRef { r#ref: vm }).await?;
            tell(session, vm.into())
        }
        VmCommand::Clone { vm, name, full, detach } => {
            let request = CloneVmRequest { meta: new_meta(), vm: vm.clone(), name: name.clone(), full };
            let task = call!(session.client, VmServiceClient, clone_vm, request).await?;
            end_of_task(session, task, &name, &format!("cloning {vm}"), detach).await
        }
        VmCommand::Delete { vm } => {
            let request = VmChangeRequest { meta: new_meta(), vm };
            let vm = call!(session.client, VmServiceClient, delete, request).await?;
            let sentence = format!("vm {} deleted", vm.name);
            session.output.changed(&VmView::from(vm), &sentence)
        }
    }
}

/// Two readings, and what happened between them.
async fn stats(vm: &str, interval: Duration, session: &mut Session) -> Result<(), Failure> {
    let reference = || VmRef { r#ref: vm.to_owned() };
    let first = call!(session.client, VmServiceClient, stats, reference()).await?;
    tokio::time::sleep(interval).await;
    let last = call!(session.client, VmServiceClient, stats, reference()).await?;
    let view = VmStatsView::new(&first, last);
    if matches!(session.output.format(), Format::Table | Format::Wide) {
        return session.output.raw(view.text().as_bytes());
    }
    session.output.show(&view)
}

async fn create(arguments: CreateArguments, session: &mut Session) -> Result<(), Failure> {
    let CreateArguments {
        name,
        vcpus,
        memory,
        disks,
        nets,
        kernel,
        initrd,
        cmdline,
        ha,
        ha_priority,
        cpu_profile,
        cluster,
        hugepages,
    } = arguments;
    let request = CreateVmRequest {
        meta: new_meta(),
        name,
        vcpus,
        memory_bytes: memory.0,
        disks,
        kernel: kernel.unwrap_or_default(),
        initrd: initrd.unwrap_or_default(),
        cmdline: cmdline.unwrap_or_default(),
        ha: match ha {
            HaPolicy::Restart => "restart",
            HaPolicy::None => "none",
        }
        .to_owned(),
        ha_priority: ha_priority.map_or(0, u32::from),
        nets,
        cpu_profile: cpu_profile.map(|profile| profile.to_string()).unwrap_or_default(),
        cluster: cluster.unwrap_or_default(),
        huge_pages: hugepages,
    };
    let vm = call!(session.client, VmServiceClient, create, request).await?;
    let sentence = format!("vm {} made; start it with `poolctl vm start {}`", vm.name, vm.name);
    session.output.changed(&VmView::from(vm), &sentence)
}

/// Waits for a task and shows the VM, or shows the task alone.
async fn end_of_task(
    session: &mut Session,
    task: Task,
    vm: &str,
    what: &str,
    detach: bool,
) -> Result<(), Failure> {
    let id = TaskId(task.id);
    if detach {
        let view = TaskView::from(task);
        return session.output.changed(&view, &view.name());
    }
    wait::task(&session.client, id, &format!("vm {vm}"), what).await?;
    let vm = call!(session.client, VmServiceClient, show, VmRef { r#ref: vm.to_owned() }).await?;
    tell(session, vm.into())
}

fn tell(session: &mut Session, vm: VmView) -> Result<(), Failure> {
    let sentence = format!("{} is {}", vm.name(), vm.whereabouts());
    session.output.changed(&vm, &sentence)
}
