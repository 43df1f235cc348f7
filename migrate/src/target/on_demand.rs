//! Pages that come after the machine.
//!
//! ```text
//! missing … missing ─▶ given up ─▶ Ready ─ resumed ─▶ Filling ─ all in: complete ─ closed by the source ─▶ Resumed
//!                                    │ ▲                │ ▲
//!                          link lost ▼ │ rejoin         ▼ │ rejoin: what is missing, and what is waited for
//! ```

use super::{Fill, Filling, Ready, State, Target, TargetCommand, TargetFailure, finish::resumed};
use crate::{
    bitmap::PageBitmap,
    machine::Supply,
    source::ResumedParts,
    wire::{PageWords, Rest, ToSource},
};
use proto::{MigrationId, PageIndex, VmId};

/// Pages waited for at once: a thread waits for one, and a machine has fewer threads. More are left to the background.
const WANTED_MAX: usize = 1024;

impl Target {
    pub(super) fn on_missing(&mut self, pages: &PageWords) -> Vec<TargetCommand> {
        match &mut self.state {
            State::Finishing(finishing) if finishing.rest == Rest::OnDemand && !finishing.has_pages => {
                pages.add_to(&mut finishing.missing);
                if !pages.is_last {
                    return Vec::new();
                }
                let (round, missing) = (finishing.last_round, finishing.missing.clone());
                vec![TargetCommand::BeginOnDemand { round, missing }]
            }
            _ => self.out_of_turn("missing pages"),
        }
    }

    pub(super) fn on_demand_begun(&mut self) -> Vec<TargetCommand> {
        let State::Finishing(finishing) = &mut self.state else { return Vec::new() };
        finishing.has_pages = true;
        self.check_ready()
    }

    pub(super) fn begin_filling(&mut self, fill: Fill, parts: ResumedParts) -> Vec<TargetCommand> {
        let (supply, is_filled) = (fill.supply, fill.is_filled);
        self.enter(State::Filling(Filling { fill, parts }));
        if supply == Supply::Broken {
            return if is_filled { Vec::new() } else { vec![TargetCommand::Starve(Supply::Broken)] };
        }
        let mut commands = vec![TargetCommand::Send(resumed(parts))];
        if is_filled {
            commands.push(TargetCommand::Send(ToSource::Complete));
        }
        commands
    }

    /// The machine may touch a page before its owner gets to say that it runs.
    pub(super) fn on_fault(&mut self, page: PageIndex) -> Vec<TargetCommand> {
        let (State::Ready(Ready { fill: Some(fill), .. }) | State::Filling(Filling { fill, .. })) =
            &mut self.state
        else {
            return Vec::new();
        };
        if fill.wanted.len() == WANTED_MAX {
            fill.wanted.clear();
        }
        fill.wanted.insert(page);
        match fill.supply {
            Supply::Flows => vec![TargetCommand::Send(ToSource::Need { page })],
            Supply::Broken => Vec::new(),
        }
    }

    pub(super) fn on_filled(&mut self) -> Vec<TargetCommand> {
        match &mut self.state {
            State::Ready(Ready { fill: Some(fill), .. }) => {
                fill.is_filled = true;
                Vec::new()
            }
            State::Filling(filling) => {
                filling.fill.is_filled = true;
                filling.fill.wanted.clear();
                match filling.fill.supply {
                    Supply::Flows => vec![TargetCommand::Send(ToSource::Complete)],
                    // Nothing is missing, so nothing is waited for; the source hears it when it rejoins.
                    Supply::Broken => vec![TargetCommand::Starve(Supply::Flows)],
                }
            }
            _ => Vec::new(),
        }
    }

    pub(super) fn on_link_lost(&mut self, error: String) -> Vec<TargetCommand> {
        self.without_link(TargetFailure::Link { error })
    }

    fn without_link(&mut self, failure: TargetFailure) -> Vec<TargetCommand> {
        match &mut self.state {
            State::Ready(Ready { fill: Some(fill), .. }) => {
                fill.supply = Supply::Broken;
                Vec::new()
            }
            State::Filling(filling) if filling.fill.supply == Supply::Flows => {
                filling.fill.supply = Supply::Broken;
                if filling.fill.is_filled { Vec::new() } else { vec![TargetCommand::Starve(Supply::Broken)] }
            }
            State::Ready(_) | State::Filling(_) => Vec::new(),
            _ => self.fail(failure),
        }
    }

    /// A source closes the link when it has all it waits for, or when it gives up.
    pub(super) fn on_link_closed(&mut self, why: String) -> Vec<TargetCommand> {
        match &self.state {
            State::Filling(filling) if filling.fill.is_filled => {
                self.enter(State::Resumed);
                Vec::new()
            }
            _ => self.without_link(TargetFailure::GivenUp { why }),
        }
    }

    pub(super) fn on_rejoin(&mut self, migration: MigrationId, vm: VmId) -> Vec<TargetCommand> {
        if migration != self.settings.migration || vm != self.settings.vm {
            return vec![TargetCommand::CloseLink];
        }
        match &mut self.state {
            State::Ready(Ready { fill: Some(fill), .. }) | State::Filling(Filling { fill, .. }) => {
                fill.supply = Supply::Flows;
                vec![TargetCommand::ListMissing]
            }
            _ => self.out_of_turn("rejoin"),
        }
    }

    pub(super) fn on_missing_listed(&mut self, missing: &PageBitmap) -> Vec<TargetCommand> {
        let list =
            || PageWords::of(missing).into_iter().map(|pages| TargetCommand::Send(ToSource::Missing(pages)));
        let needs = |fill: &Fill| {
            let wanted = fill.wanted.iter().filter(|page| missing.contains(**page));
            wanted.map(|&page| TargetCommand::Send(ToSource::Need { page })).collect::<Vec<_>>()
        };
        match &self.state {
            State::Ready(Ready { fill: Some(fill), .. }) if fill.supply == Supply::Flows => {
                list().chain(needs(fill)).collect()
            }
            State::Filling(filling) if filling.fill.supply == Supply::Flows => {
                // The source may not have heard it before the link broke.
                let mut commands = vec![TargetCommand::Send(resumed(filling.parts))];
                if filling.fill.is_filled {
                    commands.push(TargetCommand::Send(ToSource::Complete));
                    return commands;
                }
                commands.extend(list());
                commands.extend(needs(&filling.fill));
                commands.push(TargetCommand::Starve(Supply::Flows));
                commands
            }
            _ => Vec::new(),
        }
    }
}
