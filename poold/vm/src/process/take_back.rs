//! This process as the source of a migration that was committed and whose target died before the machine ran there.
//!
//! ```text
//!  the pool has placed the machine here at epoch + 2 ─▶ volumes: was epoch + 1 ever active? ── no ─▶ resume: Live
//!                                                                                      └── perhaps ─▶ Failed
//! ```
//! Invariant: the machine resumes only after every volume was taken back at its new epoch. From then on no replica lets the
//! target in, so what it has in memory can never run.

use super::machine::attachments;
use super::migration::{Outgoing, Part, failed};
use super::phase::Phase;
use super::{Event, Process};
use crate::request::{Refusal, Reply};
use crate::spec::check;
use crate::volumes::{LastSequences, VolumeSet};
use migrate::SourceHandle;
use proto::{Epoch, v1};

impl Process {
    pub(super) fn take_back(&mut self, request: &v1::TakeBackRequest, reply: Reply) {
        if let Some(Part::Outgoing(Outgoing { taking_back: Some(waiting), .. })) = &mut self.part {
            return waiting.push(reply);
        }
        match self.begin_taking_back(request) {
            Ok(None) => self.answer(reply, Ok(())),
            Ok(Some((volumes, last, handle))) => {
                tracing::info!(
                    migration = request.migration_id,
                    epoch = request.epoch,
                    "given back by the pool"
                );
                if let Some(Part::Outgoing(outgoing)) = &mut self.part {
                    outgoing.taking_back = Some(vec![reply]);
                }
                let epoch = Epoch(request.epoch);
                self.spawn(async move {
                    Event::TakenBack(resume_here(volumes, last, handle).await.map(|()| epoch))
                });
            }
            Err(refusal) => self.answer(reply, Err(refusal)),
        }
    }

    /// `None` when it has been done already.
    fn begin_taking_back(
        &mut self,
        request: &v1::TakeBackRequest,
    ) -> Result<Option<(VolumeSet, LastSequences, SourceHandle)>, Refusal> {
        let migration = request.migration_id;
        let unknown = Refusal::UnknownMigration { migration };
        let Some(Part::Outgoing(outgoing)) = &self.part else { return Err(unknown) };
        if outgoing.migration.0 != migration {
            return Err(unknown);
        }
        let (handle, last) = (outgoing.handle.clone(), outgoing.last_sequences.clone());
        let wrong_state = self.wrong_state("TakeBack");
        let Some(vm) = self.vm.as_mut().filter(|_| self.phase == Phase::Live) else {
            return Err(wrong_state);
        };
        if vm.epoch == Epoch(request.epoch) {
            return Ok(None);
        }
        check(request.epoch > vm.epoch.0, "epoch", || format!("{} is before {}", request.epoch, vm.epoch))?;
        vm.volumes = vm.volumes.with_attachments(attachments(&request.volumes)?)?;
        Ok(Some((vm.volumes.clone(), last, handle)))
    }

    pub(super) fn taken_back(&mut self, taken: Result<Epoch, Refusal>) {
        let Some(Part::Outgoing(outgoing)) = &mut self.part else { return };
        let waiting = outgoing.taking_back.take().unwrap_or_default();
        let done = match taken {
            Ok(epoch) => {
                tracing::info!(%epoch, "the machine runs here again");
                if let Some(vm) = &mut self.vm {
                    vm.epoch = epoch;
                }
                Ok(())
            }
            Err(refusal) => {
                tracing::error!(%refusal, "the machine was given back and can't go on; it has to boot anew");
                // It may have been stopped meanwhile.
                if self.phase == Phase::Live {
                    self.phase = Phase::Failed { error: refusal.to_string() };
                }
                Err(refusal)
            }
        };
        self.answer_all(waiting, &done);
    }
}

async fn resume_here(volumes: VolumeSet, last: LastSequences, handle: SourceHandle) -> Result<(), Refusal> {
    volumes.take_back(&last).await.map_err(|error| failed("TakeBack", &error))?;
    handle.reclaimed().await.map_err(|error| failed("TakeBack", &error))
}
