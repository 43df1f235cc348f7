//! Pages on demand in the world: the source's background, the target's guest, and links that are made again.

use crate::world::{Happening, Sink, Stream, World};
use migrate::{
    PageBitmap, SourceVm,
    apply::PageApplier,
    encode::{RoundPlan, RoundScope, RoundTotals, send_round},
    held::Held,
    source::SourceEvent,
    target::TargetEvent,
};
use proto::PageIndex;
use rand::Rng;
use std::{sync::atomic::Ordering, time::Duration};

/// Pages that are sent at a time.
const PUSH_PAGES: usize = 4;

/// Time between them: slow, so that the machine runs while most pages are missing.
const PUSH_INTERVAL: Duration = Duration::from_millis(2);

impl World {
    /// The machine at the target touches a page; two vCPUs can wait.
    pub fn guest_reads(&mut self) {
        let is_starved = self.target_vm.is_starved.load(Ordering::SeqCst);
        if !self.target_vm.is_running() || is_starved || self.target.is_none() {
            return;
        }
        let vm = self.target_vm.clone();
        let missing = |page: u64| vm.missing().as_ref().is_some_and(|(set, _)| set.contains(PageIndex(page)));
        self.waited_for.retain(|page| missing(*page));
        let page = self.rng.random_range(0..self.plan.pages);
        if missing(page as u64) && self.waited_for.len() < 2 && self.waited_for.insert(page as u64) {
            self.faults += 1;
            self.tell_target(TargetEvent::Fault { page: PageIndex(page as u64) });
        }
    }

    pub fn missing_pages(&self) -> u64 {
        self.applier.as_ref().and_then(PageApplier::missing).map_or(0, PageBitmap::count)
    }

    pub fn connect(&mut self) {
        let step = Duration::from_micros(100);
        if self.steps == 0 {
            return self.later(step, Happening::Source(SourceEvent::Connected));
        }
        assert!(self.was_on_demand, "only pages on demand need another link: {:?}", self.plan);
        if self.target.is_none() || self.now < self.link_back_at {
            self.failed_dials += 1;
            if self.target.is_none() && self.failed_dials > 5 {
                // The pool has found out that the target is dead, and ends what is left of the migration.
                self.source = None;
                return;
            }
            return self.later(step, Happening::LinkLostAtSource(self.link));
        }
        if !self.target_knows {
            self.tell_target(TargetEvent::LinkLost { error: "the source made a new one".to_owned() });
        }
        self.link += 1;
        self.has_link = true;
        self.last_on_stream.clear();
        self.transmit(Stream::ControlOut, Happening::Source(SourceEvent::Connected));
    }

    /// Sends a few of the pages that are left.
    pub fn push(&mut self) {
        let mut pages = PageBitmap::new(self.plan.pages as u64);
        let next =
            self.unsent.runs(0..self.unsent.words().len()).into_iter().flat_map(|run| run.start.0..run.end.0);
        next.take(PUSH_PAGES).for_each(|page| pages.insert(PageIndex(page)));
        if pages.count() == 0 {
            let totals = RoundTotals::default();
            return self.later(Duration::from_micros(20), Happening::Source(SourceEvent::RoundSent(totals)));
        }
        self.send_on_demand(&pages, self.plan.streams, None);
        self.transmit_at(PUSH_INTERVAL, Happening::Push);
    }

    pub fn send_on_demand(&mut self, pages: &PageBitmap, streams: u8, as_stream: Option<Stream>) {
        pages.runs(0..pages.words().len()).into_iter().flat_map(|run| run.start.0..run.end.0).for_each(
            |page| {
                self.unsent.remove(PageIndex(page));
            },
        );
        let vm = self.source_vm.clone();
        let plan =
            RoundPlan { round: self.on_demand_round, scope: RoundScope::Last, pages, window: None, streams };
        send_round(&*vm, plan, &mut Held::new(None, 0), &mut Sink { world: self, as_stream }).unwrap();
    }

    pub fn list_missing(&mut self, after: Duration) {
        self.dirty.clear();
        self.source_vm.fetch_dirty(&mut self.dirty).unwrap();
        self.was_on_demand = true;
        let missing = self.dirty.clone();
        self.later(after, Happening::Source(SourceEvent::MissingListed(missing)));
    }

    pub fn send_urgent(&mut self, page: PageIndex) {
        if self.unsent.contains(page) {
            let mut pages = PageBitmap::new(self.plan.pages as u64);
            pages.insert(page);
            self.send_on_demand(&pages, 1, Some(Stream::Urgent));
        }
    }
}
