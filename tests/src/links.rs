//! What the kernel knows of network links in a namespace, and sockets of a test there.

use anyhow::{Context, Result, bail};
use nix::libc;
use nix::sched::{CloneFlags, setns};
use serde_json::Value;
use std::fs::File;
use std::io::{ErrorKind, Read as _, Write as _};
use std::net::UdpSocket;
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{FromRawFd as _, OwnedFd};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// How long a socket of a test waits for a datagram before it looks whether it shall end.
const RECEIVE_TIMEOUT: Duration = Duration::from_millis(100);

/// How long a guest may take to answer a call, and a piece of a stream to come back: an interpreted guest that polls a few times
/// a second, and a move in between.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(20);
const STREAM_TIMEOUT: Duration = Duration::from_secs(40);

/// Bytes of a piece of a stream.
const PIECE_BYTES: usize = 800;

/// Links of a network namespace, as `ip -j -d link` shows them.
///
/// # Errors
/// When there is no such namespace.
pub fn links(namespace: &str) -> Result<Vec<Value>> {
    let output = Command::new("ip").args(["-n", namespace, "-j", "-d", "address"]).output()?;
    if !output.status.success() {
        bail!("{}", String::from_utf8_lossy(&output.stderr).trim());
    }
    let Value::Array(links) = serde_json::from_slice(&output.stdout)? else {
        bail!("`ip -j` printed no list")
    };
    Ok(links)
}

/// The taps of VMs in a network namespace.
///
/// # Errors
/// As [`links`].
pub fn taps(namespace: &str) -> Result<Vec<Value>> {
    let is_tap = |link: &Value| link["linkinfo"]["info_kind"] == "tun";
    Ok(links(namespace)?.into_iter().filter(is_tap).collect())
}

/// Whether the cable of a link is in.
#[must_use]
pub fn has_carrier(link: &Value) -> bool {
    link["flags"].as_array().is_some_and(|flags| flags.iter().any(|flag| flag == "LOWER_UP"))
}

/// Runs something with the network of another namespace; sockets made there stay there.
///
/// # Errors
/// When there is no such namespace, or what runs fails.
pub fn within<T: Send + 'static>(
    namespace: &str,
    run: impl FnOnce() -> Result<T> + Send + 'static,
) -> Result<T> {
    let path = format!("/run/netns/{namespace}");
    // A thread of its own enters the namespace and ends there.
    let thread = std::thread::spawn(move || {
        let file = File::open(&path).with_context(|| format!("open {path}"))?;
        setns(file, CloneFlags::CLONE_NEWNET).context("enter the namespace")?;
        run()
    });
    thread.join().map_err(|_| anyhow::anyhow!("the thread in the namespace panicked"))?
}

/// Answers datagrams at an address of a namespace, until the process ends.
///
/// # Errors
/// When the address can't be bound.
pub fn echo(namespace: &str, address: &str) -> Result<()> {
    let address = address.to_owned();
    let socket = within(namespace, move || Ok(UdpSocket::bind(&address)?))?;
    std::thread::spawn(move || {
        let mut datagram = [0; 2048];
        while let Ok((len, from)) = socket.recv_from(&mut datagram) {
            // A guest that is gone is no matter.
            socket.send_to(&datagram[..len], from).ok();
        }
    });
    Ok(())
}

/// One TCP connection to an echo server, on which numbered pieces go out and must come back, until it is dropped.
pub struct EchoStream {
    echoed: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<Result<()>>>,
}

impl EchoStream {
    /// Connects from a namespace.
    ///
    /// # Errors
    /// Nobody answers there.
    pub fn open(namespace: &str, server: SocketAddr) -> Result<Self> {
        let connection =
            within(namespace, move || Ok(TcpStream::connect_timeout(&server, CONNECT_TIMEOUT)?))?;
        connection.set_read_timeout(Some(STREAM_TIMEOUT))?;
        let (echoed, stop) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let (count, ended) = (echoed.clone(), stop.clone());
        let thread = std::thread::spawn(move || talk(connection, &count, &ended));
        Ok(Self { echoed, stop, thread: Some(thread) })
    }

    /// Pieces that came back so far.
    ///
    /// # Errors
    /// The connection has broken, or a piece came back wrong.
    pub fn echoed(&mut self) -> Result<u64> {
        if self.thread.as_ref().is_some_and(JoinHandle::is_finished)
            && let Some(thread) = self.thread.take()
        {
            thread.join().map_err(|_| anyhow::anyhow!("the stream's thread panicked"))??;
        }
        Ok(self.echoed.load(Ordering::SeqCst))
    }
}

impl Drop for EchoStream {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            // What it says was asked for before, or is of no interest any more.
            thread.join().ok();
        }
    }
}

fn talk(mut connection: TcpStream, echoed: &AtomicU64, stop: &AtomicBool) -> Result<()> {
    for number in 0_u64.. {
        if stop.load(Ordering::SeqCst) {
            break;
        }
        let piece: Vec<u8> = number.to_be_bytes().into_iter().cycle().take(PIECE_BYTES).collect();
        connection.write_all(&piece).context("send on the stream")?;
        let mut back = vec![0; PIECE_BYTES];
        connection.read_exact(&mut back).with_context(|| format!("piece {number} does not come back"))?;
        if back != piece {
            bail!("piece {number} came back wrong");
        }
        echoed.store(number + 1, Ordering::SeqCst);
    }
    Ok(())
}

/// Listens to one type of Ethernet frames in a namespace.
pub struct Sniffer {
    /// Any socket can be received from in this way.
    socket: UdpSocket,
}

impl Sniffer {
    /// Listens to frames of this Ethernet type on all links of the namespace.
    ///
    /// # Errors
    /// Without root there is no such socket.
    pub fn open(namespace: &str, ether_type: u16) -> Result<Self> {
        within(namespace, move || {
            let protocol = i32::from(ether_type.to_be());
            // SAFETY: plain numbers.
            let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_CLOEXEC, protocol) };
            let fd = nix::errno::Errno::result(fd).context("open a packet socket")?;
            // SAFETY: just opened, and nobody else has it.
            let socket = UdpSocket::from(unsafe { OwnedFd::from_raw_fd(fd) });
            socket.set_read_timeout(Some(RECEIVE_TIMEOUT))?;
            Ok(Self { socket })
        })
    }

    /// The next frame; none when none has come for a while.
    ///
    /// # Errors
    /// When the socket fails.
    pub fn next(&self) -> Result<Option<Vec<u8>>> {
        let mut frame = vec![0; 2048];
        match self.socket.recv(&mut frame) {
            Ok(len) => {
                frame.truncate(len);
                Ok(Some(frame))
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }
}
