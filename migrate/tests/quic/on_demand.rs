//! Pages that come after the machine, and links that break meanwhile.

use crate::harness::{DEADLINE, LOOPBACK, Pair, Writer, source_phase, target_phase};
use crate::support::ModelGuest;
use migrate::{
    Outcome, Policy, Rehash, ResumedParts, SourceConfig, SourceHandle, SourcePhase, SourceVm, Supply,
    TargetPhase,
};
use proto::PageIndex;
use std::{
    net::{SocketAddr, UdpSocket},
    num::NonZeroU64,
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

/// A network between source and target that can be cut.
struct Network {
    address: SocketAddr,
    is_cut: Arc<AtomicBool>,
    is_over: Arc<AtomicBool>,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Network {
    fn to(target: SocketAddr) -> Self {
        let front = UdpSocket::bind((LOOPBACK, 0)).unwrap();
        let back = UdpSocket::bind((LOOPBACK, 0)).unwrap();
        back.connect(target).unwrap();
        let (is_cut, is_over) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicBool::new(false)));
        let source = Arc::new(Mutex::new(None));
        let address = front.local_addr().unwrap();
        let sockets = [&front, &back].map(|socket| {
            socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
            socket.try_clone().unwrap()
        });
        let [front_out, back_out] = sockets;
        let (cut, over, from) = (is_cut.clone(), is_over.clone(), source.clone());
        let there = std::thread::spawn(move || {
            let mut packet = vec![0; 1 << 16];
            while !over.load(Ordering::Relaxed) {
                let Ok((bytes, peer)) = front.recv_from(&mut packet) else { continue };
                *from.lock().unwrap() = Some(peer);
                if !cut.load(Ordering::Relaxed) {
                    let _ = back_out.send(&packet[..bytes]);
                }
            }
        });
        let (cut, over) = (is_cut.clone(), is_over.clone());
        let back_again = std::thread::spawn(move || {
            let mut packet = vec![0; 1 << 16];
            while !over.load(Ordering::Relaxed) {
                let Ok(bytes) = back.recv(&mut packet) else { continue };
                let peer = *source.lock().unwrap();
                if let Some(peer) = peer.filter(|_| !cut.load(Ordering::Relaxed)) {
                    let _ = front_out.send_to(&packet[..bytes], peer);
                }
            }
        });
        Self { address, is_cut, is_over, threads: vec![there, back_again] }
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

/// Starts a guest that outruns the link, and lets it go over.
async fn go_over(pair: &Pair, pages: usize, config: SourceConfig) -> SourceHandle {
    (0..pages).for_each(|page| pair.source.fill(page, page as u64));
    let _writer = Writer::start(pair.source.clone(), pages, 300);
    let outgoing = pair.start(SourceConfig { policy: Policy::PostCopy, ..config });
    source_phase(&outgoing, |phase| matches!(phase, SourcePhase::Paused { .. })).await;
    outgoing.commit_proposed().await.unwrap();
    outgoing.outcome(Outcome::Committed).await.unwrap();
    target_phase(&pair.incoming, |phase| matches!(phase, TargetPhase::Ready { .. })).await;
    pair.incoming.send_resumed(ResumedParts::default()).await;
    outgoing
}

async fn wait_supply(pair: &Pair, supply: Supply) {
    let phase = target_phase(&pair.incoming, |phase| *phase == TargetPhase::Filling { supply }).await;
    assert_eq!(phase, TargetPhase::Filling { supply });
}

/// Twice: the machine is held, what it waits for comes first when the link is back, and in the end all is there.
#[tokio::test]
async fn a_link_that_breaks_twice_is_made_again_and_all_pages_arrive() {
    let pages = 8_000;
    let pair = Pair::new(pages, Rehash::Incremental);
    let network = Network::to(pair.incoming.address());
    let limit = NonZeroU64::new(6 << 20);
    let config = SourceConfig { target: network.address, bandwidth_bytes_per_s: limit, ..pair.config() };
    let outgoing = go_over(&pair, pages, config).await;
    wait_supply(&pair, Supply::Flows).await;
    for cut in 1..=2 {
        network.is_cut.store(true, Ordering::Relaxed);
        wait_supply(&pair, Supply::Broken).await;
        let waited_for = {
            let missing = pair.target.missing();
            let (missing, _) = missing.as_ref().expect("pages are missing");
            missing.runs(0..missing.words().len()).last().unwrap().start.0 as usize
        };
        let guest = pair.target.clone();
        let touch = tokio::task::spawn_blocking(move || touch(&guest, waited_for).1);
        network.is_cut.store(false, Ordering::Relaxed);
        wait_supply(&pair, Supply::Flows).await;
        assert_eq!(touch.await.unwrap(), word_of(&pair.source, waited_for));
        assert_eq!(pair.target.starved_times.load(Ordering::SeqCst), cut);
    }
    let done = source_phase(&outgoing, SourcePhase::is_final).await;
    assert_eq!(done.phase, SourcePhase::Done { resumed: true });
    assert_eq!(target_phase(&pair.incoming, |_| false).await, TargetPhase::Resumed);
    assert_eq!(pair.source.first_difference(&pair.target), None);
    assert!(pair.target.missing().is_none() && !pair.target.is_starved.load(Ordering::SeqCst));
}

fn word_of(guest: &ModelGuest, page: usize) -> u64 {
    let mut content = [0; 4096];
    SourceVm::read_pages(guest, PageIndex(page as u64), &mut content).unwrap();
    u64::from_ne_bytes(content[..8].try_into().unwrap())
}

/// Reads a word as the guest would: waits for a page that is missing. How long, and what it is.
fn touch(guest: &ModelGuest, page: usize) -> (Duration, u64) {
    let (begun, index) = (Instant::now(), PageIndex(page as u64));
    let mut missing = guest.missing();
    if let Some((_, faults)) = missing.as_ref().filter(|(set, _)| set.contains(index)) {
        faults(index);
    }
    while missing.as_ref().is_some_and(|(set, _)| set.contains(index)) {
        let wait = DEADLINE.checked_sub(begun.elapsed()).expect("the page comes");
        missing = guest.placed.wait_timeout(missing, wait).unwrap().0;
    }
    drop(missing);
    (begun.elapsed(), word_of(guest, page))
}

#[tokio::test]
async fn a_guest_that_outruns_the_link_goes_over_and_its_pages_follow() {
    let pages = 20_000;
    let pair = Pair::new(pages, Rehash::Incremental);
    let limit = NonZeroU64::new(100 << 20);
    let outgoing =
        go_over(&pair, pages, SourceConfig { bandwidth_bytes_per_s: limit, ..pair.config() }).await;
    target_phase(&pair.incoming, |phase| matches!(phase, TargetPhase::Filling { .. })).await;
    let (source, target) = (pair.source.clone(), pair.target.clone());
    let touches = tokio::task::spawn_blocking(move || {
        let touched = (0..400).map(|step| {
            let page = step * 7919 % pages;
            let (waited, word) = touch(&target, page);
            assert_eq!(word, word_of(&source, page));
            waited
        });
        touched.filter(|waited| *waited > Duration::from_micros(20)).collect::<Vec<_>>()
    });
    let mut waits = touches.await.unwrap();
    let done = source_phase(&outgoing, SourcePhase::is_final).await;
    assert_eq!(done.phase, SourcePhase::Done { resumed: true });
    assert_eq!(target_phase(&pair.incoming, |_| false).await, TargetPhase::Resumed);
    assert_eq!(pair.source.first_difference(&pair.target), None);
    assert!(pair.target.missing().is_none());
    waits.sort();
    let mean = waits.iter().sum::<Duration>() / waits.len().max(1) as u32;
    eprintln!("{} faults, mean {mean:.0?}, longest {:.0?}", waits.len(), waits.last());
    assert!(!waits.is_empty());
}

#[tokio::test]
async fn a_target_that_can_not_wait_for_pages_leaves_the_guest_at_the_source() {
    let pair = Pair::new(5_000, Rehash::Incremental);
    (0..5_000).for_each(|page| pair.source.fill(page, page as u64));
    pair.target.sabotage.fail_on_demand.store(true, Ordering::Relaxed);
    let _writer = Writer::start(pair.source.clone(), 5_000, 300);
    let limit = NonZeroU64::new(100 << 20);
    let config = SourceConfig { policy: Policy::PostCopy, bandwidth_bytes_per_s: limit, ..pair.config() };
    let end = source_phase(&pair.start(config), |_| false).await;
    let SourcePhase::Aborted { cause } = &end.phase else { panic!("{end:?}") };
    assert!(cause.to_string().contains("as planted by the test"), "{cause}");
    assert!(pair.source.is_running());
}
