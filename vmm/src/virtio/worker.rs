//! The thread that works a device's queues: at the guest's kick, and at whatever the device waits for outside.

use super::device::VirtioDevice;
use nix::errno::Errno;
use std::io;
use std::os::fd::{AsRawFd as _, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use vmm_sys_util::eventfd::EventFd;

/// One device's thread. Dropping it ends the thread.
pub struct Worker {
    kick: EventFd,
    end: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Worker {
    /// Works `device` whenever `kick` is written. The descriptor must not block.
    ///
    /// # Errors
    /// No thread can be made.
    pub fn spawn(name: String, device: Arc<dyn VirtioDevice>, kick: EventFd) -> io::Result<Self> {
        let end = Arc::new(AtomicBool::new(false));
        let (wait, ended) = (kick.try_clone()?, end.clone());
        let work = move || {
            while wait_for_work(&wait, device.waits_for()) && !ended.load(Ordering::SeqCst) {
                device.process();
            }
        };
        let thread = std::thread::Builder::new().name(name).spawn(work)?;
        Ok(Self { kick, end, thread: Some(thread) })
    }

    /// Makes the device look again; for changes that no descriptor tells.
    pub fn wake(&self) {
        if let Err(error) = self.kick.write(1) {
            // Only a counter at its maximum fails: the thread is awake then.
            tracing::debug!(%error, "kick");
        }
    }
}

/// Waits for a kick or for input; `false` when waiting is impossible.
fn wait_for_work(kick: &EventFd, input: Option<RawFd>) -> bool {
    let readable = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
    let mut fds = vec![readable(kick.as_raw_fd())];
    fds.extend(input.map(readable));
    // SAFETY: pointer and length are of one vector; the descriptors are held by the caller and its device.
    let ready = unsafe { libc::poll(fds.as_mut_ptr(), fds.len() as libc::nfds_t, -1) };
    match Errno::result(ready) {
        Ok(_) | Err(Errno::EINTR) => {}
        Err(error) => {
            tracing::error!(%error, "a device's thread can't wait");
            return false;
        }
    }
    // Taken before the queues are looked at, so that a kick during the work is not lost. Empty when it was the input.
    drop(kick.read());
    true
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.end.store(true, Ordering::SeqCst);
        self.wake();
        if let Some(thread) = self.thread.take() {
            // A panic of the thread has been printed.
            drop(thread.join());
        }
    }
}
