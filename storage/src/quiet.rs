//! Sockets that wake their task for what comes in, and for room to send only while something waits for it.
//!
//! ```text
//!  tokio's:   send ─▶ peer reads ─▶ "there is room" ─▶ the thread wakes, finds nothing to do, sleeps
//!  these:     send ─▶ peer reads                        send would block ─▶ a second descriptor of the socket waits for room, once
//! ```
//! With small requests one after the other those wakings cost more processor time than the requests, and they come just when the
//! peer needs the processor to work on what it has read.

use quinn::udp::{RecvMeta, Transmit, UdpSocketState};
use quinn::{AsyncUdpSocket, UdpPoller};
use std::fmt;
use std::io::{self, IoSlice, IoSliceMut, Read, Write};
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use tokio::io::unix::AsyncFd;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};

/// Bytes that the kernel takes in one call, all datagrams of it together.
const SEND_BYTES_MAX: usize = 65_400;

/// Bytes that it gives at once, likewise.
const RECEIVE_BYTES_MAX: usize = 64 << 10;

/// Largest datagram: two make one call, as many as fit if the path takes smaller ones only. Each costs the same work, whatever its size.
pub const DATAGRAM_BYTES_MAX: u16 = 32_700;

/// What a buffer for one datagram must hold.
pub const DATAGRAM_BUFFER_BYTES: u16 = 32 << 10;

const _: () = assert!(DATAGRAM_BYTES_MAX as usize * 2 <= SEND_BYTES_MAX);
const _: () = assert!(DATAGRAM_BYTES_MAX <= DATAGRAM_BUFFER_BYTES);

fn register<S: AsFd + AsRawFd>(socket: S, interest: Interest) -> io::Result<AsyncFd<S>> {
    // SAFETY: it owns its descriptor, which stays the same and open as long as it lives.
    unsafe { AsyncFd::register_with_interest(socket, interest) }.map_err(|error| error.into_parts().1)
}

/// Waits for room in a socket, once.
#[derive(Debug, Default)]
struct Room(Option<AsyncFd<OwnedFd>>);

impl Room {
    fn poll(&mut self, socket: &impl AsFd, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.0.is_none() {
            let twin = socket.as_fd().try_clone_to_owned()?;
            self.0 = Some(register(twin, Interest::WRITABLE)?);
        }
        let waiting = self.0.as_ref().expect("made above");
        ready!(waiting.poll_write_ready(cx))?.retain_ready();
        self.0 = None;
        Poll::Ready(Ok(()))
    }
}

/// A connected stream.
#[derive(Debug)]
pub struct QuietStream<S: AsRawFd> {
    incoming: AsyncFd<S>,
    room: Room,
}

impl<S: AsFd + AsRawFd> QuietStream<S> {
    /// Takes over a stream that does not block. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// The process has no more descriptors.
    pub fn new(stream: S) -> io::Result<Self> {
        Ok(Self { incoming: register(stream, Interest::READABLE)?, room: Room::default() })
    }
}

impl TryFrom<tokio::net::UnixStream> for QuietStream<UnixStream> {
    type Error = io::Error;

    fn try_from(stream: tokio::net::UnixStream) -> io::Result<Self> {
        Self::new(stream.into_std()?)
    }
}

impl TryFrom<tokio::net::TcpStream> for QuietStream<std::net::TcpStream> {
    type Error = io::Error;

    fn try_from(stream: tokio::net::TcpStream) -> io::Result<Self> {
        Self::new(stream.into_std()?)
    }
}

impl<S: AsRawFd + AsFd + Unpin> QuietStream<S>
where
    for<'a> &'a S: Write,
{
    fn poll_send(
        &mut self,
        cx: &mut Context<'_>,
        send: impl Fn(&mut &S) -> io::Result<usize>,
    ) -> Poll<io::Result<usize>> {
        loop {
            match send(&mut self.incoming.get_ref()) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    ready!(self.room.poll(self.incoming.get_ref(), cx))?;
                }
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                sent => return Poll::Ready(sent),
            }
        }
    }
}

impl<S: AsRawFd + Unpin> AsyncRead for QuietStream<S>
where
    for<'a> &'a S: Read,
{
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, out: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            let mut ready = ready!(self.incoming.poll_read_ready(cx))?;
            let wanted = out.remaining();
            let read = ready.try_io(|socket| receive(socket.get_ref(), out));
            match read {
                Ok(Ok(count)) => {
                    if 0 < count && count < wanted {
                        // That was all: what comes later wakes us anew.
                        ready.clear_ready();
                    }
                    return Poll::Ready(Ok(()));
                }
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(error)) => return Poll::Ready(Err(error)),
                Err(_would_block) => {}
            }
        }
    }
}

/// Receives without filling the buffer before.
fn receive(socket: &impl AsRawFd, out: &mut ReadBuf<'_>) -> io::Result<usize> {
    // SAFETY: nothing reads the unfilled part, and nothing in it is made uninitialised.
    let room = unsafe { out.unfilled_mut() };
    // SAFETY: the descriptor is open, and the kernel writes within the memory that it is given.
    let received = unsafe { libc::recv(socket.as_raw_fd(), room.as_mut_ptr().cast(), room.len(), 0) };
    let count = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
    // SAFETY: the kernel has written so many bytes.
    unsafe { out.assume_init(count) };
    out.advance(count);
    Ok(count)
}

impl<S: AsRawFd + AsFd + Unpin> AsyncWrite for QuietStream<S>
where
    for<'a> &'a S: Write,
{
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.get_mut().poll_send(cx, |socket| socket.write(bytes))
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.get_mut().poll_send(cx, |socket| socket.write_vectored(parts))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let socket = self.incoming.as_raw_fd();
        // SAFETY: the descriptor is open; no memory is touched.
        let result = unsafe { libc::shutdown(socket, libc::SHUT_WR) };
        Poll::Ready(if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) })
    }
}

/// The socket of a QUIC endpoint.
pub struct QuietUdp {
    incoming: AsyncFd<std::net::UdpSocket>,
    state: UdpSocketState,
}

impl fmt::Debug for QuietUdp {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        to.debug_tuple("QuietUdp").field(self.incoming.get_ref()).finish()
    }
}

impl QuietUdp {
    /// Takes over a socket. Must be called inside a tokio runtime.
    ///
    /// # Errors
    /// The kernel does not know its options.
    pub fn new(socket: std::net::UdpSocket) -> io::Result<Self> {
        let state = UdpSocketState::new((&socket).into())?;
        Ok(Self { incoming: register(socket, Interest::READABLE)?, state })
    }
}

impl AsyncUdpSocket for QuietUdp {
    fn create_io_poller(self: Arc<Self>) -> Pin<Box<dyn UdpPoller>> {
        Box::pin(UdpRoom { socket: self, room: Room::default() })
    }

    fn try_send(&self, transmit: &Transmit<'_>) -> io::Result<()> {
        let socket = self.incoming.get_ref();
        let Some(segment) = transmit.segment_size.filter(|_| transmit.contents.len() > SEND_BYTES_MAX) else {
            return self.state.send(socket.into(), transmit);
        };
        // As many whole datagrams as one call takes.
        for (index, contents) in transmit.contents.chunks(SEND_BYTES_MAX / segment * segment).enumerate() {
            let part = Transmit { contents, src_ip: transmit.src_ip, ..*transmit };
            match self.state.send(socket.into(), &part) {
                // Some are on their way; the others are lost, as any datagram may be, and sent again.
                Err(error) if index > 0 && error.kind() == io::ErrorKind::WouldBlock => return Ok(()),
                sent => sent?,
            }
        }
        Ok(())
    }

    fn poll_recv(
        &self,
        cx: &mut Context<'_>,
        buffers: &mut [IoSliceMut<'_>],
        meta: &mut [RecvMeta],
    ) -> Poll<io::Result<usize>> {
        loop {
            let mut ready = ready!(self.incoming.poll_read_ready(cx))?;
            if let Ok(received) =
                ready.try_io(|socket| self.state.recv(socket.get_ref().into(), buffers, meta))
            {
                if received.as_ref().is_ok_and(|count| *count < buffers.len()) {
                    // That was all: what comes later wakes us anew.
                    ready.clear_ready();
                }
                return Poll::Ready(received);
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.incoming.get_ref().local_addr()
    }

    fn max_transmit_segments(&self) -> usize {
        self.state.max_gso_segments()
    }

    /// Decides how large the buffer of a call is: never more comes than this.
    fn max_receive_segments(&self) -> usize {
        RECEIVE_BYTES_MAX / usize::from(DATAGRAM_BUFFER_BYTES)
    }

    fn may_fragment(&self) -> bool {
        self.state.may_fragment()
    }
}

#[derive(Debug)]
struct UdpRoom {
    socket: Arc<QuietUdp>,
    room: Room,
}

impl UdpPoller for UdpRoom {
    fn poll_writable(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Self { socket, room } = self.get_mut();
        room.poll(socket.incoming.get_ref(), cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    #[tokio::test]
    async fn a_sender_that_finds_no_room_goes_on_when_there_is_some() {
        let (ours, theirs) = tokio::net::UnixStream::pair().unwrap();
        let (mut ours, mut theirs) =
            (QuietStream::try_from(ours).unwrap(), QuietStream::try_from(theirs).unwrap());
        let sent: Vec<u8> = (0..4_000_000_u32).map(|index| (index / 251) as u8).collect();
        let content = sent.clone();
        let sending = tokio::spawn(async move {
            ours.write_all(&content).await.unwrap();
            ours.shutdown().await.unwrap();
            ours
        });
        let mut received = Vec::new();
        theirs.read_to_end(&mut received).await.unwrap();
        assert!(received == sent, "every byte, in order, and the end");
        let mut ours = sending.await.unwrap();
        theirs.write_all(b"answer").await.unwrap();
        let mut answer = [0; 6];
        ours.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"answer", "the other way is open still");
        drop(theirs);
        assert_eq!(ours.read(&mut answer).await.unwrap(), 0);
        assert!(ours.write(b"nobody").await.is_err());
    }

    #[tokio::test]
    async fn more_than_one_call_takes_is_sent_by_several() {
        let socket = || {
            let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
            socket.set_nonblocking(true).unwrap();
            QuietUdp::new(socket).unwrap()
        };
        let (ours, theirs) = (socket(), socket());
        let sent: Vec<u8> = (0..5 * 25_000_u32).map(|index| (index / 257) as u8).collect();
        let transmit = Transmit {
            destination: theirs.local_addr().unwrap(),
            ecn: None,
            contents: &sent,
            segment_size: Some(25_000),
            src_ip: None,
        };
        ours.try_send(&transmit).unwrap();
        let mut received = Vec::new();
        while received.len() < sent.len() {
            let mut buffer = vec![0; RECEIVE_BYTES_MAX];
            let mut meta = [RecvMeta::default()];
            let count = std::future::poll_fn(|cx| {
                theirs.poll_recv(cx, &mut [IoSliceMut::new(&mut buffer)], &mut meta)
            });
            assert_eq!(count.await.unwrap(), 1);
            received.extend_from_slice(&buffer[..meta[0].len]);
        }
        assert!(received == sent);
    }
}
