//! What one daemon asks of another: consoles, live progress of migrations, images.
//!
//! - [`service`]: the answering side, over this host's supervisor and image store.
//! - [`Agents`]: the asking side; this host itself is asked without a connection.
//!
//! Absent on purpose: commands. A host never tells another one what to do; that is what the pool's state is for.

mod console;
mod facts;
mod service;

pub use facts::{Facts, LocalFacts};
pub use service::{AgentApi, image_status, owner_of, spread_status};

use crate::{consensus::HostClients, supervisor::Supervisor};
use futures::{Stream, StreamExt as _};
use proto::{
    HostId, VmId,
    v1::{
        AgentConsole, AgentConsoleType, AgentFacts, AgentFactsRequest, AgentReport, AgentReportRequest,
        AgentVmRequest, HostReport, MachineStats, MigrationRecord, agent_service_client::AgentServiceClient,
    },
};
use std::{collections::BTreeSet, pin::Pin, time::Duration};
use tonic::{Status, transport::Channel};

/// How long another host may take to answer a question that it answers from memory.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(3);

/// How long hosts may take to say what only they know: an operator waits, and what is missing is shown as missing.
const FACTS_TIMEOUT: Duration = Duration::from_secs(1);

/// Live console output.
pub type ConsoleStream = Pin<Box<dyn Stream<Item = Result<AgentConsole, Status>> + Send>>;

/// Asks the agents of all hosts.
#[derive(Clone)]
pub struct Agents {
    me: HostId,
    clients: HostClients,
    supervisor: Supervisor,
    facts: LocalFacts,
}

impl Agents {
    /// An asker at host `me`.
    pub fn new(me: HostId, clients: HostClients, supervisor: Supervisor, facts: LocalFacts) -> Self {
        Self { me, clients, supervisor, facts }
    }

    /// All console output that the VM's process at `host` keeps.
    ///
    /// # Errors
    /// No such process there, or the host does not answer.
    pub async fn console_log(&self, host: HostId, vm: VmId) -> Result<AgentConsole, Status> {
        if host == self.me {
            return console::log(&self.supervisor, vm).await;
        }
        let mut client = self.client(host)?;
        answer(host, client.console_log(AgentVmRequest { vm_id: vm.0 })).await
    }

    /// Live console output of the VM's process at `host`, until it ends.
    ///
    /// # Errors
    /// No such process there, or the host does not answer.
    pub async fn console_follow(&self, host: HostId, vm: VmId) -> Result<ConsoleStream, Status> {
        if host == self.me {
            return console::follow(&self.supervisor, vm).await;
        }
        let mut client = self.client(host)?;
        let stream = answer(host, client.console_follow(AgentVmRequest { vm_id: vm.0 })).await?;
        Ok(stream.boxed())
    }

    /// Types into the console of the VM's process at `host`; the offset of the first byte that is still to be typed.
    ///
    /// # Errors
    /// No such process there, it takes no input now, or the host does not answer.
    pub async fn console_type(&self, host: HostId, request: AgentConsoleType) -> Result<u64, Status> {
        if host == self.me {
            return console::type_in(&self.supervisor, request).await;
        }
        let mut client = self.client(host)?;
        Ok(answer(host, client.console_type(request)).await?.next_offset)
    }

    /// What the VM's machine at `host` has done so far.
    ///
    /// # Errors
    /// No such process there, or the host does not answer.
    pub async fn vm_stats(&self, host: HostId, vm: VmId) -> Result<MachineStats, Status> {
        if host == self.me {
            return console::stats(&self.supervisor, vm).await;
        }
        let mut client = self.client(host)?;
        answer(host, client.vm_stats(AgentVmRequest { vm_id: vm.0 })).await
    }

    /// Live record of the migration that the VM's process at `host` is the source of.
    ///
    /// # Errors
    /// No such process or migration there, or the host does not answer.
    pub async fn migration_progress(&self, host: HostId, vm: VmId) -> Result<MigrationRecord, Status> {
        if host == self.me {
            return service::migration_progress(&self.supervisor, vm);
        }
        let mut client = self.client(host)?;
        let progress = answer(host, client.migration_progress(AgentVmRequest { vm_id: vm.0 })).await?;
        prost::Message::decode(progress.record.as_slice())
            .map_err(|error| Status::internal(format!("{host} sent no migration record: {error}")))
    }

    /// What another host says of itself.
    ///
    /// # Errors
    /// It does not answer.
    pub async fn report(&self, host: HostId) -> Result<HostReport, Status> {
        let mut client = self.client(host)?;
        let AgentReport { report } = answer(host, client.report(AgentReportRequest {})).await?;
        prost::Message::decode(report.as_slice())
            .map_err(|error| Status::internal(format!("{host} sent no report: {error}")))
    }

    /// What hosts know of volumes; those that don't answer soon are left out.
    pub async fn facts_of(&self, hosts: impl IntoIterator<Item = HostId>) -> Facts {
        let hosts: BTreeSet<HostId> = hosts.into_iter().collect();
        let asked = hosts.into_iter().map(|host| async move { Some((host, self.facts(host).await?)) });
        Facts(futures::future::join_all(asked).await.into_iter().flatten().collect())
    }

    async fn facts(&self, host: HostId) -> Option<AgentFacts> {
        if host == self.me {
            return Some(self.facts.now());
        }
        let mut client = self.client(host).ok()?;
        let answer = tokio::time::timeout(FACTS_TIMEOUT, client.facts(AgentFactsRequest {})).await;
        Some(answer.ok()?.ok()?.into_inner())
    }

    fn client(&self, host: HostId) -> Result<AgentServiceClient<Channel>, Status> {
        self.clients.agent(host).map_err(|error| Status::unavailable(error.to_string()))
    }
}

async fn answer<T>(
    host: HostId,
    call: impl Future<Output = Result<tonic::Response<T>, Status>>,
) -> Result<T, Status> {
    match tokio::time::timeout(ANSWER_TIMEOUT, call).await {
        Ok(response) => response.map(tonic::Response::into_inner),
        Err(_) => Err(Status::unavailable(format!("{host} did not answer within {ANSWER_TIMEOUT:?}"))),
    }
}
