//! As much HTTP/1.1 as a scraper needs: one GET for each connection.

use super::{Health, Sources};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

/// Connections at a time: a few scrapers and a load balancer.
const CONNECTIONS_MAX: usize = 16;

/// Largest request in bytes; only its first line matters.
const REQUEST_BYTES_MAX: usize = 4096;

/// Time for a connection, so that a silent one does not hold its place.
const EXCHANGE_TIMEOUT: Duration = Duration::from_secs(5);

/// Pause after a connection could not be accepted.
const ACCEPT_RETRY: Duration = Duration::from_millis(100);

/// Serves until the shutdown.
pub async fn serve(listener: TcpListener, sources: Sources, shutdown: CancellationToken) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let stream = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::debug!(%error, "a metrics connection could not be accepted");
                    tokio::time::sleep(ACCEPT_RETRY).await;
                    continue;
                }
            },
            () = shutdown.cancelled() => return,
        };
        let sources = sources.clone();
        tokio::spawn(async move {
            // A client that goes away or says nothing is nobody's problem.
            let _ = tokio::time::timeout(EXCHANGE_TIMEOUT, exchange(stream, &sources)).await;
            drop(place);
        });
    }
}

async fn exchange(mut stream: TcpStream, sources: &Sources) -> std::io::Result<()> {
    let mut request = Vec::new();
    let mut piece = [0; 512];
    while !request.windows(4).any(|end| end == b"\r\n\r\n") {
        let count = stream.read(&mut piece).await?;
        request.extend_from_slice(&piece[..count]);
        if count == 0 || request.len() > REQUEST_BYTES_MAX {
            break;
        }
    }
    let answer = answer(&request, sources);
    stream.write_all(answer.as_bytes()).await?;
    stream.shutdown().await
}

fn answer(request: &[u8], sources: &Sources) -> String {
    let (status, body) = match path_of(request) {
        Some("/metrics") => ("200 OK", sources.text()),
        Some("/healthz") => match sources.health() {
            Health::Serving => ("200 OK", "ok\n".to_owned()),
            Health::Failing(why) => ("503 Service Unavailable", format!("{why}\n")),
        },
        Some(_) => ("404 Not Found", "there are /metrics and /healthz\n".to_owned()),
        None => ("400 Bad Request", "GET only\n".to_owned()),
    };
    let length = body.len();
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4\r\nContent-Length: {length}\r\n\
         Connection: close\r\n\r\n{body}"
    )
}

/// The path of a GET, without its query.
fn path_of(request: &[u8]) -> Option<&str> {
    let line = request.split(|byte| *byte == b'\r').next()?;
    let mut words = std::str::from_utf8(line).ok()?.split(' ');
    let path = (words.next() == Some("GET")).then(|| words.next()).flatten()?;
    Some(path.split('?').next().unwrap_or(path))
}

#[cfg(test)]
mod tests {
    use super::path_of;

    #[test]
    fn only_a_get_has_a_path() {
        assert_eq!(path_of(b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n"), Some("/metrics"));
        assert_eq!(path_of(b"GET /healthz?x=1 HTTP/1.0\r\n\r\n"), Some("/healthz"));
        for bad in [&b"POST /metrics HTTP/1.1\r\n"[..], b"", b"\xff\xff\r\n", b"GET\r\n"] {
            assert_eq!(path_of(bad), None);
        }
    }
}
