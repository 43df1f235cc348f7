//! openraft's runtime in tests: tokio's, or on a thread that simulates, one with a clock and a chance of its own.
//!
//! ```text
//!  simulate(seed, history) ─▶ run all tasks until each waits ─▶ set the clock to the earliest timer ─▶ wake it ─▶ …
//! ```
//! One thread, no time that passes by itself: an hour of a pool takes as long as its work. What is drawn (election timeouts) comes
//! from the seed. All of openraft goes through here.

use futures::executor::{LocalPool, LocalSpawner};
use futures::task::LocalSpawnExt as _;
use openraft::{AsyncRuntime, OptionalSend, TokioRuntime};
use rand::rngs::StdRng;
use rand::{RngCore as _, SeedableRng as _};
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::future::Future;
use std::ops::{Add, AddAssign, Sub, SubAssign};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::OnceLock;
use std::task::{Context, Poll, Waker};
use std::time::Duration;
use tokio::sync::oneshot;

/// What one thread simulates.
struct Simulation {
    now: Duration,
    /// By deadline, and in the order in which they were set.
    timers: BTreeMap<(Duration, u64), Waker>,
    set: u64,
    rng: StdRng,
    spawner: LocalSpawner,
}

thread_local! {
    static SIMULATION: RefCell<Option<Simulation>> = const { RefCell::new(None) };
}

/// Something of the simulation of this thread; none: it simulates nothing.
fn simulated<T>(with: impl FnOnce(&mut Simulation) -> T) -> Option<T> {
    SIMULATION.with_borrow_mut(|simulation| simulation.as_mut().map(with))
}

/// Plays a history to its end on this thread.
///
/// # Panics
/// When nothing can happen any more.
pub fn simulate<T: 'static>(seed: u64, history: impl Future<Output = T> + 'static) -> T {
    let mut pool = LocalPool::new();
    let (rng, spawner) = (StdRng::seed_from_u64(seed), pool.spawner());
    let simulation = Simulation { now: Duration::ZERO, timers: BTreeMap::new(), set: 0, rng, spawner };
    SIMULATION.with_borrow_mut(|place| *place = Some(simulation));
    let result = Rc::new(Cell::new(None));
    let (main, kept) = (pool.spawner(), result.clone());
    main.spawn_local(async move { kept.set(Some(history.await)) }).unwrap();
    let end = loop {
        pool.run_until_stalled();
        if let Some(end) = result.take() {
            break end;
        }
        let next = simulated(|simulation| {
            let ((deadline, _), waker) = simulation.timers.pop_first()?;
            simulation.now = simulation.now.max(deadline);
            Some(waker)
        });
        next.flatten().expect("a history goes on until its end").wake();
    };
    // Tasks that are left find no simulation when they are dropped with the pool, and need none.
    drop(SIMULATION.take());
    end
}

/// The time of a simulation, or of the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct TestInstant(Duration);

fn machine_start() -> tokio::time::Instant {
    static START: OnceLock<tokio::time::Instant> = OnceLock::new();
    *START.get_or_init(tokio::time::Instant::now)
}

impl openraft::Instant for TestInstant {
    fn now() -> Self {
        Self(simulated(|simulation| simulation.now).unwrap_or_else(|| machine_start().elapsed()))
    }
}

impl Add<Duration> for TestInstant {
    type Output = Self;
    fn add(self, more: Duration) -> Self {
        Self(self.0 + more)
    }
}

impl AddAssign<Duration> for TestInstant {
    fn add_assign(&mut self, more: Duration) {
        self.0 += more;
    }
}

impl Sub<Duration> for TestInstant {
    type Output = Self;
    fn sub(self, less: Duration) -> Self {
        Self(self.0.saturating_sub(less))
    }
}

impl Sub for TestInstant {
    type Output = Duration;
    fn sub(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

impl SubAssign<Duration> for TestInstant {
    fn sub_assign(&mut self, less: Duration) {
        *self = *self - less;
    }
}

/// Waits for an instant.
pub enum TestSleep {
    Machine(Pin<Box<tokio::time::Sleep>>),
    Simulated { deadline: Duration, set: Option<u64> },
}

impl Future for TestSleep {
    type Output = ();

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<()> {
        match self.get_mut() {
            Self::Machine(sleep) => sleep.as_mut().poll(context),
            Self::Simulated { deadline, set } => {
                // The waker of before is dropped when the simulation is free again.
                let looked = simulated(|simulation| {
                    let before = set.take().and_then(|old| simulation.timers.remove(&(*deadline, old)));
                    if simulation.now >= *deadline {
                        return (Poll::Ready(()), before);
                    }
                    simulation.set += 1;
                    *set = Some(simulation.set);
                    simulation.timers.insert((*deadline, simulation.set), context.waker().clone());
                    (Poll::Pending, before)
                });
                looked.map_or(Poll::Ready(()), |(poll, _)| poll)
            }
        }
    }
}

impl Drop for TestSleep {
    fn drop(&mut self) {
        if let Self::Simulated { deadline, set: Some(set) } = self {
            let waker = simulated(|simulation| simulation.timers.remove(&(*deadline, *set)));
            drop(waker);
        }
    }
}

/// Lets the time of the simulation pass.
pub fn pass(time: Duration) -> TestSleep {
    TestRuntime::sleep(time)
}

/// It was too late.
#[derive(Debug, thiserror::Error)]
#[error("it took too long")]
pub struct Elapsed;

/// A future that ends in time or not at all.
pub struct TestTimeout<T> {
    future: Pin<Box<T>>,
    sleep: TestSleep,
}

impl<T: Future> Future for TestTimeout<T> {
    type Output = Result<T::Output, Elapsed>;

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        if let Poll::Ready(output) = self.future.as_mut().poll(context) {
            return Poll::Ready(Ok(output));
        }
        Pin::new(&mut self.sleep).poll(context).map(|()| Err(Elapsed))
    }
}

/// The end of a task.
pub enum TestHandle<T> {
    Machine(tokio::task::JoinHandle<T>),
    Simulated(oneshot::Receiver<T>),
}

/// A task has no result.
#[derive(Debug, thiserror::Error)]
pub enum JoinError {
    #[error(transparent)]
    Machine(#[from] tokio::task::JoinError),
    #[error("the task is gone")]
    Simulated,
}

impl<T> Future for TestHandle<T> {
    type Output = Result<T, JoinError>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match self.get_mut() {
            Self::Machine(handle) => Pin::new(handle).poll(context).map_err(JoinError::Machine),
            Self::Simulated(end) => Pin::new(end).poll(context).map_err(|_| JoinError::Simulated),
        }
    }
}

/// Draws from the seed of the simulation.
pub struct TestRng;

impl rand_of_openraft::RngCore for TestRng {
    fn next_u32(&mut self) -> u32 {
        simulated(|simulation| simulation.rng.next_u32()).unwrap_or_else(rand::random)
    }

    fn next_u64(&mut self) -> u64 {
        simulated(|simulation| simulation.rng.next_u64()).unwrap_or_else(rand::random)
    }

    fn fill_bytes(&mut self, bytes: &mut [u8]) {
        bytes.fill_with(|| self.next_u32().to_le_bytes()[0]);
    }

    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), rand_of_openraft::Error> {
        self.fill_bytes(bytes);
        Ok(())
    }
}

/// See the [module](self).
#[derive(Debug, Default, PartialEq, Eq)]
pub struct TestRuntime;

impl AsyncRuntime for TestRuntime {
    type JoinError = JoinError;
    type JoinHandle<T: OptionalSend + 'static> = TestHandle<T>;
    type Sleep = TestSleep;
    type Instant = TestInstant;
    type TimeoutError = Elapsed;
    type Timeout<R, T: Future<Output = R> + OptionalSend> = TestTimeout<T>;
    type ThreadLocalRng = TestRng;
    type OneshotSender<T: OptionalSend> = <TokioRuntime as AsyncRuntime>::OneshotSender<T>;
    type OneshotReceiver<T: OptionalSend> = oneshot::Receiver<T>;
    type OneshotReceiverError = oneshot::error::RecvError;

    fn spawn<T>(future: T) -> TestHandle<T::Output>
    where
        T: Future + OptionalSend + 'static,
        T::Output: OptionalSend + 'static,
    {
        match simulated(|simulation| simulation.spawner.clone()) {
            None => TestHandle::Machine(tokio::spawn(future)),
            Some(spawner) => {
                let (done, end) = oneshot::channel();
                let task = async move {
                    // Nobody may wait for it.
                    let _ = done.send(future.await);
                };
                spawner.spawn_local(task).expect("the simulation goes on");
                TestHandle::Simulated(end)
            }
        }
    }

    fn sleep(duration: Duration) -> TestSleep {
        Self::sleep_until(<TestInstant as openraft::Instant>::now() + duration)
    }

    fn sleep_until(deadline: TestInstant) -> TestSleep {
        match simulated(|_| ()) {
            None => TestSleep::Machine(Box::pin(tokio::time::sleep_until(machine_start() + deadline.0))),
            Some(()) => TestSleep::Simulated { deadline: deadline.0, set: None },
        }
    }

    fn timeout<R, F: Future<Output = R> + OptionalSend>(duration: Duration, future: F) -> TestTimeout<F> {
        TestTimeout { future: Box::pin(future), sleep: Self::sleep(duration) }
    }

    fn timeout_at<R, F: Future<Output = R> + OptionalSend>(
        deadline: TestInstant,
        future: F,
    ) -> TestTimeout<F> {
        TestTimeout { future: Box::pin(future), sleep: Self::sleep_until(deadline) }
    }

    fn is_panic(error: &JoinError) -> bool {
        matches!(error, JoinError::Machine(error) if error.is_panic())
    }

    fn thread_rng() -> TestRng {
        TestRng
    }

    fn oneshot<T: OptionalSend>() -> (Self::OneshotSender<T>, oneshot::Receiver<T>) {
        TokioRuntime::oneshot()
    }
}
