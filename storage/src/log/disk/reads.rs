//! Reads that nobody waits for on a thread: by io_uring where the kernel lets us, by a few threads elsewhere.
//!
//! ```text
//!  read(file, offset, len, done) ─▶ queue ─▶ one thread with a ring: many reads at the device at once ─▶ done(result)
//!                                      └───▶ or some threads that read one block each
//! ```
//! What is in the page cache is copied when the ring is entered; the rest does not hold it up. Which way is taken is
//! found out at the start.

use super::aligned::aligned;
use bytes::BytesMut;
use io_uring::{IoUring, opcode, squeue, types};
use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, PipeReader, PipeWriter, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Reads at the device at once: more than it works on in parallel.
const DEPTH: usize = 128;

/// Threads where there is no ring: enough to keep a device busy.
const THREADS: usize = 16;

/// The ring's entries: one more for being woken.
const ENTRIES: u32 = 2 * DEPTH as u32;

/// Under load this thread is woken for so many parts of what is under way, or after so long a time.
const TOGETHER_PART: usize = 6;
const TOGETHER: types::Timespec = types::Timespec::new().nsec(100_000);

/// What a completion says when it is about being woken.
const WAKE: u64 = u64::MAX;

/// Told what was read, on a thread that must not be held up.
pub type ReadDone = Box<dyn FnOnce(io::Result<BytesMut>) + Send>;

/// A read that waits.
pub struct ReadRequest {
    /// Of which file.
    pub file: Arc<File>,
    /// From where.
    pub offset: u64,
    /// How many bytes.
    pub len: usize,
    /// Told what was read.
    pub done: ReadDone,
}

impl ReadRequest {
    fn read_here(self) {
        let mut buffer = BytesMut::zeroed(self.len);
        let result = self.file.read_exact_at(&mut buffer, self.offset).map(|()| buffer);
        (self.done)(result);
    }
}

/// Takes reads; ends its threads when dropped.
pub struct ReadQueue {
    shared: Arc<Shared>,
    /// Wakes a ring's thread; there is none without a ring.
    wake: Option<PipeWriter>,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    /// Wakes threads that have no ring.
    arrived: Condvar,
}

#[derive(Default)]
struct State {
    waiting: VecDeque<ReadRequest>,
    /// The ring's thread looks at the queue only when it is woken.
    asleep: bool,
    closed: bool,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl ReadQueue {
    /// With a ring if that is possible.
    ///
    /// # Errors
    /// No thread can be started.
    pub fn new() -> io::Result<Self> {
        match IoUring::new(ENTRIES) {
            Ok(ring) => Self::with_ring(ring),
            Err(error) => {
                tracing::info!(%error, "no io_uring: blocks are read by threads");
                Self::with_threads()
            }
        }
    }

    fn with_ring(ring: IoUring) -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        let (woken, wake) = io::pipe()?;
        let reader = RingReader { ring, shared: shared.clone(), woken, slots: Slots::default() };
        std::thread::Builder::new().name("block reads".to_owned()).spawn(move || reader.run())?;
        Ok(Self { shared, wake: Some(wake) })
    }

    fn with_threads() -> io::Result<Self> {
        let shared = Arc::new(Shared::default());
        for _ in 0..THREADS {
            let shared = shared.clone();
            std::thread::Builder::new().name("block reads".to_owned()).spawn(move || run_thread(&shared))?;
        }
        Ok(Self { shared, wake: None })
    }

    /// Hands in a read.
    pub fn read(&self, request: ReadRequest) {
        let mut state = self.shared.state();
        state.waiting.push_back(request);
        let was_asleep = std::mem::take(&mut state.asleep);
        drop(state);
        match &self.wake {
            Some(wake) if was_asleep => self.ring_wake(wake),
            Some(_) => {}
            None => self.shared.arrived.notify_one(),
        }
    }

    fn ring_wake(&self, mut wake: &PipeWriter) {
        // The thread ends only after this does.
        if let Err(error) = wake.write_all(&[1]) {
            tracing::error!(%error, "the reading thread is gone");
            self.shared.state().waiting.drain(..).for_each(ReadRequest::read_here);
        }
    }
}

impl Drop for ReadQueue {
    fn drop(&mut self) {
        self.shared.state().closed = true;
        self.shared.arrived.notify_all();
        if let Some(wake) = &self.wake {
            self.ring_wake(wake);
        }
    }
}

fn run_thread(shared: &Shared) {
    loop {
        let mut state = shared.state();
        let request = loop {
            if let Some(request) = state.waiting.pop_front() {
                break request;
            }
            if state.closed {
                return;
            }
            state = shared.arrived.wait(state).unwrap_or_else(PoisonError::into_inner);
        };
        drop(state);
        request.read_here();
    }
}

/// Interrupted, or the time for more is over.
fn is_everyday(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::Interrupted || error.raw_os_error() == Some(libc::ETIME)
}

/// A read that the kernel works on.
struct UnderWay {
    request: ReadRequest,
    buffer: BytesMut,
}

/// The reads that the kernel works on, by their numbers.
#[derive(Default)]
struct Slots {
    slots: Vec<Option<UnderWay>>,
    free: Vec<usize>,
    used: usize,
}

impl Drop for Slots {
    /// The kernel may write to their buffers: they must not be freed.
    fn drop(&mut self) {
        if self.used > 0 {
            std::process::abort();
        }
    }
}

struct RingReader {
    ring: IoUring,
    shared: Arc<Shared>,
    woken: PipeReader,
    slots: Slots,
}

impl RingReader {
    fn run(mut self) {
        self.wait_for_wake();
        loop {
            let Some(requests) = self.take() else { return };
            requests.into_iter().for_each(|request| self.submit(request));
            // Many at once: each time that this thread is woken costs more than what it does for one of them.
            let args = types::SubmitArgs::new().timespec(&TOGETHER);
            let can_wait = self.ring.params().is_feature_ext_arg();
            let enough = if can_wait { (self.slots.used / TOGETHER_PART).max(1) } else { 1 };
            let entered = if enough == 1 {
                self.ring.submit_and_wait(1)
            } else {
                self.ring.submitter().submit_with_args(enough, &args)
            };
            match entered {
                Err(error) if !is_everyday(&error) => {
                    // Only a wrong use of the ring: nothing can be read that way.
                    tracing::error!(%error, "io_uring does not work");
                    std::process::abort();
                }
                _ => self.complete(),
            }
        }
    }

    /// What waits and fits in; `None`: it is over.
    fn take(&self) -> Option<Vec<ReadRequest>> {
        let mut state = self.shared.state();
        let room = DEPTH - self.slots.used;
        let count = state.waiting.len().min(room);
        let requests = state.waiting.drain(..count).collect();
        state.asleep = state.waiting.is_empty();
        let is_over = state.closed && state.waiting.is_empty() && count == 0 && self.slots.used == 0;
        (!is_over).then_some(requests)
    }

    fn submit(&mut self, request: ReadRequest) {
        let number = self.slots.free.pop().unwrap_or_else(|| {
            self.slots.slots.push(None);
            self.slots.slots.len() - 1
        });
        let mut buffer = aligned(request.len);
        let len = u32::try_from(request.len).expect("a read is at most a frame");
        let entry = opcode::Read::new(types::Fd(request.file.as_raw_fd()), buffer.as_mut_ptr(), len)
            .offset(request.offset)
            .build()
            .user_data(number as u64);
        self.slots.slots[number] = Some(UnderWay { request, buffer });
        self.slots.used += 1;
        self.push(&entry);
    }

    fn wait_for_wake(&mut self) {
        let poll = opcode::PollAdd::new(types::Fd(self.woken.as_raw_fd()), libc::POLLIN as u32);
        self.push(&poll.build().user_data(WAKE));
    }

    fn push(&mut self, entry: &squeue::Entry) {
        // SAFETY: the file and the buffer are kept in `slots` until the completion is seen; the pipe lives as long as this does.
        let pushed = unsafe { self.ring.submission().push(entry) };
        pushed.expect("the ring has twice as many entries as there are reads");
    }

    fn complete(&mut self) {
        let completed: Vec<(u64, i32)> =
            self.ring.completion().map(|entry| (entry.user_data(), entry.result())).collect();
        for (number, result) in completed {
            if number == WAKE {
                let mut bytes = [0; 64];
                // Whatever is in it: it was about what is in the queue.
                if let Err(error) = self.woken.read(&mut bytes) {
                    tracing::error!(%error, "waking the reading thread");
                }
                self.wait_for_wake();
                continue;
            }
            let slot = self.slots.slots.get_mut(number as usize).and_then(Option::take);
            let Some(UnderWay { request, mut buffer }) = slot else { continue };
            self.slots.free.push(number as usize);
            self.slots.used -= 1;
            if usize::try_from(result) == Ok(request.len) {
                // SAFETY: the kernel has filled so many bytes, which is the capacity that was asked for.
                unsafe { buffer.set_len(request.len) };
                (request.done)(Ok(buffer));
            } else {
                // Interrupted, short, or failed: the plain way tells.
                request.read_here();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    fn check(queue: &ReadQueue) {
        let mut file = tempfile::tempfile().unwrap();
        let content: Vec<u8> = (0..1_u32 << 16).flat_map(u32::to_le_bytes).collect();
        file.write_all(&content).unwrap();
        let file = Arc::new(file);
        let (tell, told) = channel();
        let read = |offset: u64, len: usize| {
            let tell = tell.clone();
            let done: ReadDone = Box::new(move |result| tell.send((offset, len, result)).unwrap());
            queue.read(ReadRequest { file: file.clone(), offset, len, done });
        };
        let count = 3 * DEPTH;
        (0..count).for_each(|index| read(index as u64 * 8, 4096));
        for (offset, len, result) in told.iter().take(count) {
            assert_eq!(result.unwrap(), content[offset as usize..][..len]);
        }
        read(content.len() as u64 - 8, 4096);
        assert_eq!(told.recv().unwrap().2.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        read(0, content.len());
        assert_eq!(told.recv().unwrap().2.unwrap(), content);
    }

    #[test]
    fn threads_read_what_is_asked() {
        check(&ReadQueue::with_threads().unwrap());
    }

    #[test]
    fn a_ring_reads_what_is_asked_and_the_choice_works() {
        check(&ReadQueue::new().unwrap());
        if let Ok(ring) = IoUring::new(ENTRIES) {
            check(&ReadQueue::with_ring(ring).unwrap());
        }
    }
}
