//! Connections as they are accepted: never more than a set number at a time, and never in a busy loop.

use futures::StreamExt;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_stream::Stream;
use tokio_util::sync::CancellationToken;
use tonic::transport::server::{Connected, TcpConnectInfo, TcpIncoming};

/// Open connections: a few of each host of the largest pool, and many clients. Each costs a file descriptor and some
/// buffers, also when its other end never says anything.
pub const CONNECTIONS_MAX: usize = 1024;

/// Pause after a connection could not be accepted, e.g. since all file descriptors are in use: trying at once again would
/// only burn the CPU that could close some.
const ACCEPT_RETRY: Duration = Duration::from_millis(50);

/// A connection that counts until it is closed.
pub struct Counted {
    stream: TcpStream,
    /// Cancelled when it counts no more, since what it was admitted by is void.
    admission: CancellationToken,
    _place: OwnedSemaphorePermit,
}

/// The connections of a listener, at most `connections_max` at a time; more wait in the kernel's queue.
pub fn incoming(
    listener: TcpListener,
    connections_max: usize,
) -> impl Stream<Item = io::Result<Counted>> + Send + 'static {
    let places = Arc::new(Semaphore::new(connections_max));
    let accepted = TcpIncoming::from(listener).with_nodelay(Some(true));
    Box::pin(accepted.then(move |accepted| {
        let places = places.clone();
        async move {
            match accepted {
                Ok(stream) => {
                    let place = places.acquire_owned().await.map_err(io::Error::other)?;
                    Ok(Counted { stream, admission: CancellationToken::new(), _place: place })
                }
                Err(error) => {
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                    Err(error)
                }
            }
        }
    }))
}

impl Counted {
    /// The connection, as long as this is not cancelled.
    pub fn under(mut self, admission: CancellationToken) -> Self {
        self.admission = admission;
        self
    }
}

impl Connected for Counted {
    type ConnectInfo = TcpConnectInfo;

    fn connect_info(&self) -> TcpConnectInfo {
        self.stream.connect_info()
    }
}

impl AsyncRead for Counted {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        // Seen at the next byte that comes: nothing that is asked from now on is answered.
        if self.admission.is_cancelled() {
            return Poll::Ready(Err(io::ErrorKind::ConnectionAborted.into()));
        }
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Counted {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, bufs)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use futures::FutureExt;

    #[tokio::test]
    async fn a_full_house_lets_the_next_one_in_when_somebody_leaves() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut connections = incoming(listener, 2);
        let mut clients = Vec::new();
        for _ in 0..3 {
            clients.push(TcpStream::connect(address).await.unwrap());
        }
        let first = connections.next().await.unwrap().unwrap();
        let _second = connections.next().await.unwrap().unwrap();
        // The third is complete in the kernel's queue, so only its place is missing.
        assert!(connections.next().now_or_never().is_none());
        drop(first);
        let third = tokio::time::timeout(Duration::from_secs(10), connections.next()).await;
        assert!(third.is_ok_and(|third| third.is_some_and(|third| third.is_ok())));
    }
}
