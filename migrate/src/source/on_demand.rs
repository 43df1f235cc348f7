//! Pages that go over after the machine.
//!
//! ```text
//! stopped, missing … missing ─▶ Ready: serve ─▶ … Committed ─ complete ─▶ Done
//!                                                 │ link lost        ▲
//!                                                 ▼                  │ bulk streams open: serve what is missing
//!                                  wait ─▶ connect ─▶ rejoin ─▶ missing … missing
//! ```
//! The pages are served from `Ready` on, so that most of them go over while the commit is agreed on. The machine's memory
//! stays as it is until the target has said that it has all of it.

use super::{CONNECT_TIMEOUT, Serving, Source, SourceCommand, State, Stop};
use crate::{
    bitmap::PageBitmap,
    moment::Moment,
    wire::{Kept, PageWords, Rest, ToTarget, batch::Round},
};
use proto::PageIndex;
use std::{sync::Arc, time::Duration};

/// Pause before the next try to reach the target: a link that is back is found before a guest's timeouts expire.
const RECONNECT_PAUSE: Duration = Duration::from_millis(250);

/// Pages that are asked for while the bulk streams are being opened; a thread of the machine waits for each.
const WANTED_MAX: usize = 1024;

impl Source {
    pub(super) fn on_missing_listed(&mut self, now: Moment, missing: PageBitmap) -> Vec<SourceCommand> {
        let State::Finishing { stop } = &mut self.state else { return Vec::new() };
        stop.timeline.pages_in(now);
        self.stats.pages_remaining = missing.count();
        let commands =
            PageWords::of(&missing).into_iter().map(|pages| SourceCommand::Send(ToTarget::Missing(pages)));
        let commands = commands.collect();
        stop.serving.missing = Some(Arc::new(missing));
        commands
    }

    pub(super) fn begin_serving(&self, stop: &mut Stop) -> Vec<SourceCommand> {
        let Some(missing) = stop.serving.missing.clone() else { return Vec::new() };
        stop.serving.is_serving = true;
        let round = Round(self.stats.rounds);
        let mut commands = vec![SourceCommand::Serve { round, missing }];
        let wanted = std::mem::take(&mut stop.serving.wanted).into_iter();
        commands.extend(wanted.map(|page| SourceCommand::SendUrgent { page }));
        commands
    }

    fn serving(&mut self) -> Option<&mut Serving> {
        match &mut self.state {
            State::Ready { stop } | State::Proposed { stop } | State::Committed { stop, .. }
                if stop.rest == Rest::OnDemand =>
            {
                Some(&mut stop.serving)
            }
            _ => None,
        }
    }

    pub(super) fn on_need(&mut self, page: PageIndex) -> Vec<SourceCommand> {
        let page_count = self.settings.page_count;
        self.stats.pages.faulted += 1;
        match self.serving() {
            Some(serving) if page.0 < page_count => {
                if serving.is_serving {
                    return vec![SourceCommand::SendUrgent { page }];
                }
                if serving.wanted.len() < WANTED_MAX {
                    serving.wanted.push(page);
                }
                Vec::new()
            }
            _ => self.out_of_turn("need"),
        }
    }

    pub(super) fn on_complete(&mut self) -> Vec<SourceCommand> {
        let Some(serving) = self.serving() else { return self.out_of_turn("complete") };
        serving.is_complete = true;
        match &self.state {
            State::Committed { stop, .. } => {
                let stop = stop.clone();
                self.finish_if_over(&stop)
            }
            _ => Vec::new(),
        }
    }

    /// Over with the word that the machine runs there, and with pages on demand only when all are there.
    pub(super) fn finish_if_over(&mut self, stop: &Stop) -> Vec<SourceCommand> {
        let has_all = stop.rest == Rest::Now || stop.serving.is_complete;
        if stop.resumed.is_some() && has_all { self.finish(stop) } else { Vec::new() }
    }

    pub(super) fn commit_on_demand(&mut self, now: Moment, stop: Stop) -> Vec<SourceCommand> {
        self.enter(State::Committed { stop: stop.clone(), deadline: None });
        let commands = self.finish_if_over(&stop);
        if self.has_link || !commands.is_empty() { commands } else { self.wait_for_link(now) }
    }

    /// The machine at the target waits meanwhile.
    pub(super) fn wait_for_link(&mut self, now: Moment) -> Vec<SourceCommand> {
        if let State::Committed { stop, deadline } = &mut self.state {
            stop.serving.is_serving = false;
            stop.serving.wanted.clear();
            *deadline = Some(now.after(RECONNECT_PAUSE));
        }
        vec![SourceCommand::CloseLink { why: "the link broke, another one follows".to_owned() }]
    }

    pub(super) fn connect_again(&mut self, now: Moment) -> Vec<SourceCommand> {
        if let State::Committed { deadline, .. } = &mut self.state {
            // The attempt ends by itself before that.
            *deadline = Some(now.after(2 * CONNECT_TIMEOUT));
        }
        vec![SourceCommand::Connect]
    }

    pub(super) fn on_connected_again(&mut self) -> Vec<SourceCommand> {
        let (migration, vm, page_count) =
            (self.settings.migration, self.settings.vm, self.settings.page_count);
        let State::Committed { stop, deadline } = &mut self.state else { return Vec::new() };
        if stop.rest == Rest::Now || self.has_link {
            return Vec::new();
        }
        *deadline = None;
        stop.serving.named = Some(PageBitmap::new(page_count));
        self.has_link = true;
        vec![SourceCommand::Send(ToTarget::Rejoin { migration, vm })]
    }

    pub(super) fn on_missing(&mut self, pages: &PageWords) -> Vec<SourceCommand> {
        let State::Committed { stop, .. } = &mut self.state else { return self.out_of_turn("missing pages") };
        let Some(named) = &mut stop.serving.named else { return self.out_of_turn("missing pages") };
        pages.add_to(named);
        if !pages.is_last {
            return Vec::new();
        }
        stop.serving.missing = stop.serving.named.take().map(Arc::new);
        vec![SourceCommand::OpenBulk { ports: Vec::new(), kept: Kept::Nothing }]
    }

    pub(super) fn serve_again(&mut self) -> Vec<SourceCommand> {
        let State::Committed { stop, .. } = &self.state else { return Vec::new() };
        let mut stop = stop.clone();
        let commands = if self.has_link { self.begin_serving(&mut stop) } else { Vec::new() };
        if let State::Committed { stop: current, .. } = &mut self.state {
            *current = stop;
        }
        commands
    }
}
