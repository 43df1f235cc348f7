//! `PoolService`.

use super::principal::{require_user, shows_certificate_of};
use super::status::detailed;
use super::{status, views};
use crate::consensus::Consensus;
use crate::consensus::backup;
use crate::identity::{CaError, CertificateAuthority, fingerprint_of_pem};
use pool_state::command::{Govern, NewCa, PoolChange};
use pool_state::{Command, Outcome, PoolState, balance, capacity};
use proto::limits::CHUNK_BYTES;
use proto::v1::{self, pool_service_server::PoolService};
use std::pin::Pin;
use std::sync::Arc;
use tokio_stream::Stream;
use tonic::{Code, Request, Response, Status};

/// The service of one host.
pub struct PoolApi {
    consensus: Consensus,
}

impl PoolApi {
    /// A service on the local consensus.
    #[must_use]
    pub fn new(consensus: Consensus) -> Self {
        Self { consensus }
    }

    fn pool(&self, state: &PoolState) -> v1::Pool {
        let name = |host| state.host_name(host);
        let ca_hash = state.settings.ca_hash();
        v1::Pool {
            id: state.settings.pool_id.clone(),
            name: state.settings.name.clone(),
            leader: self.consensus.leader().map(name).unwrap_or_default(),
            hosts: u32::try_from(state.members().count()).unwrap_or(u32::MAX),
            voters: self.consensus.voters().into_iter().map(name).collect(),
            revision: state.revision,
            ha_braked: state.settings.ha_braked,
            ca_fingerprint: fingerprint_of_pem(&state.settings.ca_cert_pem).unwrap_or_default(),
            ha_disarmed: state.settings.ha_disarmed,
            feature_level: state.settings.feature_level,
            feature_level_supported: state.level_supported().unwrap_or_default(),
            replicas_default: state.settings.replicas_default,
            cpu_overcommit: state.settings.cpu_overcommit,
            ca_rotating: state.settings.old_ca.is_some(),
            ca_pending: state
                .members()
                .filter(|host| state.settings.old_ca.is_some() && host.shows_ca != Some(ca_hash))
                .map(|host| host.name.clone())
                .collect(),
            cpu_profile: state.settings.cpu_profile.to_string(),
            scrub_interval_ms: state.settings.scrub_interval_ms,
            scrub_bytes_per_s: state.settings.scrub_bytes_per_s,
        }
    }
}

impl PoolApi {
    async fn read(&self) -> Result<Arc<PoolState>, Status> {
        self.consensus.read_linearizable().await.map_err(status::read)
    }

    async fn change(
        &self,
        principal: &super::Principal,
        meta: Option<&v1::RequestMeta>,
        command: Command,
    ) -> Result<(Outcome, Arc<PoolState>), Status> {
        let meta = super::propose_meta(principal, meta);
        let (index, outcome) = self.consensus.propose(command, meta).await.map_err(status::proposed)?;
        Ok((outcome, self.consensus.applied(index).await.map_err(status::read)?))
    }
}

type BackupStream = Pin<Box<dyn Stream<Item = Result<v1::BackupChunk, Status>> + Send>>;

#[tonic::async_trait]
impl PoolService for PoolApi {
    type BackupStream = BackupStream;

    async fn ha_arm(&self, request: Request<v1::HaArmRequest>) -> Result<Response<v1::Pool>, Status> {
        let principal = require_user(&request)?;
        let request = request.into_inner();
        let command = match request.mode.as_str() {
            "armed" => Command::HaArm,
            "disarmed" => Command::HaDisarm,
            other => {
                let problem = format!("mode `{other}` is neither armed nor disarmed");
                return Err(Status::invalid_argument(problem));
            }
        };
        let (_, state) = self.change(&principal, request.meta.as_ref(), command).await?;
        Ok(Response::new(self.pool(&state)))
    }

    async fn ha_plan(
        &self,
        request: Request<v1::HaPlanRequest>,
    ) -> Result<Response<v1::HaPlanResponse>, Status> {
        require_user(&request)?;
        let state = self.consensus.local();
        let fail = usize::try_from(request.get_ref().fail).unwrap_or(usize::MAX);
        let up = state.hosts.values().filter(|host| host.is_up()).count();
        if fail == 0 || fail > up {
            return Err(detailed(
                Code::InvalidArgument,
                "OUT_OF_RANGE",
                "the pool",
                &format!("choose a number from 1 to {up}"),
                &format!("{fail} hosts can't fail: {up} are up"),
            ));
        }
        let worst = capacity::worst_case(&state, fail);
        let name = |vm: &proto::VmId| state.vms.get(vm).map_or_else(|| vm.to_string(), |vm| vm.name.clone());
        Ok(Response::new(v1::HaPlanResponse {
            vms: u32::try_from(worst.restarts).unwrap_or(u32::MAX),
            unplaced: worst.unplaced.iter().map(name).collect(),
            worst: worst.hosts.iter().map(|host| state.host_name(*host)).collect(),
            revision: state.revision,
        }))
    }

    async fn balance_plan(
        &self,
        request: Request<v1::BalancePlanRequest>,
    ) -> Result<Response<v1::BalancePlanResponse>, Status> {
        require_user(&request)?;
        let state = self.read().await?;
        let moves = balance::plan(&state).into_iter().map(|next| v1::PlannedMove {
            vm: state.vms.get(&next.vm).map_or_else(|| next.vm.to_string(), |vm| vm.name.clone()),
            source: state.host_name(next.source),
            target: state.host_name(next.target),
            reason: next.reason.to_string(),
        });
        Ok(Response::new(v1::BalancePlanResponse { moves: moves.collect(), revision: state.revision }))
    }

    async fn balance_run(
        &self,
        request: Request<v1::BalanceRunRequest>,
    ) -> Result<Response<v1::Task>, Status> {
        let principal = require_user(&request)?;
        let meta = request.into_inner().meta;
        let (outcome, state) = self.change(&principal, meta.as_ref(), Command::StartBalance).await?;
        Ok(Response::new(views::task_begun(&state, outcome)?))
    }

    async fn backup(&self, request: Request<v1::BackupRequest>) -> Result<Response<BackupStream>, Status> {
        require_user(&request)?;
        let state = self.read().await?;
        let bytes = backup::encode(&state).map_err(|error| Status::internal(error.to_string()))?;
        let pieces: Vec<_> =
            bytes.chunks(CHUNK_BYTES).map(|piece| Ok(v1::BackupChunk { data: piece.to_vec() })).collect();
        Ok(Response::new(Box::pin(tokio_stream::iter(pieces))))
    }

    async fn set(&self, request: Request<v1::PoolSetRequest>) -> Result<Response<v1::Pool>, Status> {
        let principal = require_user(&request)?;
        let v1::PoolSetRequest {
            meta,
            name,
            replicas_default,
            cpu_overcommit,
            scrub_interval_ms,
            scrub_bytes_per_s,
            cpu_profile,
        } = request.into_inner();
        let number = |value: u32| (value != 0).then_some(value);
        let change = PoolChange {
            name: (!name.is_empty()).then_some(name),
            replicas_default: number(replicas_default),
            cpu_overcommit: number(cpu_overcommit),
            cpu_profile: views::cpu_profile(&cpu_profile)?,
            scrub_interval_ms,
            scrub_bytes_per_s: (scrub_bytes_per_s != 0).then_some(scrub_bytes_per_s),
        };
        if change == PoolChange::default() {
            return Err(Status::invalid_argument(
                "no setting is given: name, replicas-default, cpu-overcommit, cpu-profile, scrub-interval or scrub-rate",
            ));
        }
        let command = Command::Govern(Govern::SetPool(change));
        let (_, state) = self.change(&principal, meta.as_ref(), command).await?;
        Ok(Response::new(self.pool(&state)))
    }

    async fn rotate_ca(&self, request: Request<v1::RotateCaRequest>) -> Result<Response<v1::Pool>, Status> {
        let principal = require_user(&request)?;
        let meta = request.into_inner().meta;
        let state = self.read().await?;
        // The next authority is made here, so a repeated request would be another change than the first.
        if views::answered(&state, meta.as_ref()).is_some() {
            return Ok(Response::new(self.pool(&state)));
        }
        let settings = &state.settings;
        let internal = |error: CaError| Status::internal(error.to_string());
        let old =
            CertificateAuthority::load(&settings.ca_cert_pem, &settings.ca_key_pem).map_err(internal)?;
        let (new, cross_pem) = old.succeed(&settings.name).map_err(internal)?;
        let (cert_pem, key_pem) = (new.cert_pem().to_owned(), new.key_pem().to_owned());
        let command = Command::Govern(Govern::RotateCa(Box::new(NewCa { cert_pem, key_pem, cross_pem })));
        let (_, state) = self.change(&principal, meta.as_ref(), command).await?;
        Ok(Response::new(self.pool(&state)))
    }

    async fn finish_ca(&self, request: Request<v1::FinishCaRequest>) -> Result<Response<v1::Pool>, Status> {
        let principal = require_user(&request)?;
        let state = self.read().await?;
        let rotating = state.settings.old_ca.is_some();
        if rotating && !shows_certificate_of(request.extensions(), &state.settings.ca_cert_pem) {
            return Err(detailed(
                Code::FailedPrecondition,
                "OLD_CERTIFICATE",
                &principal.to_string(),
                "poolctl user renew",
                "your own certificate is of the old authority: you would lock yourself out",
            ));
        }
        let meta = request.into_inner().meta;
        let command = Command::Govern(Govern::FinishCaRotation);
        let (_, state) = self.change(&principal, meta.as_ref(), command).await?;
        Ok(Response::new(self.pool(&state)))
    }

    async fn show(&self, request: Request<v1::PoolShowRequest>) -> Result<Response<v1::Pool>, Status> {
        require_user(&request)?;
        Ok(Response::new(self.pool(&self.consensus.local())))
    }

    async fn ha_resume(&self, request: Request<v1::HaResumeRequest>) -> Result<Response<v1::Pool>, Status> {
        let principal = require_user(&request)?;
        let meta = super::propose_meta(&principal, request.get_ref().meta.as_ref());
        self.consensus.propose(Command::HaResume, meta).await.map_err(status::proposed)?;
        Ok(Response::new(self.pool(&self.consensus.local())))
    }
}
