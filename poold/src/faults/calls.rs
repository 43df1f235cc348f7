//! Calls that come late or twice, as they do over a network and through clients that try again.
//!
//! ```text
//!  call ─┬─▶ (delay) ─▶ service ─▶ answer
//!        └─▶ the same again, later: its answer goes nowhere
//! ```
//! Only calls with one request and one answer: what streams has an order of its own. Invariant: every call is served at least once,
//! and its asker gets an answer to it.

use rand::Rng as _;
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, LazyLock};
use std::task::{Context, Poll};
use std::time::Duration;
use tonic::body::Body;
use tonic::codegen::http::{Request, Response};
use tower::{Layer, Service, ServiceExt as _};

use super::Faults;
use crate::calls::{Whole, descriptors, methods, take_ready};

/// What happens to calls; nothing at first.
#[derive(Debug, Default)]
pub struct CallFaults {
    delay_ms: AtomicU64,
    delayed_percent: AtomicU32,
    duplicated_percent: AtomicU32,
    repeated_after_ms: AtomicU64,
}

impl CallFaults {
    /// So many of a hundred calls are served up to this much later.
    pub fn delay(&self, delay: Duration, percent: u32) {
        let ms = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX);
        self.delay_ms.store(ms, Ordering::SeqCst);
        self.delayed_percent.store(percent, Ordering::SeqCst);
    }

    /// So many of a hundred calls are served once more, up to this much later: newer ones may have come in between.
    pub fn duplicate(&self, later: Duration, percent: u32) {
        let ms = u64::try_from(later.as_millis()).unwrap_or(u64::MAX);
        self.repeated_after_ms.store(ms, Ordering::SeqCst);
        self.duplicated_percent.store(percent, Ordering::SeqCst);
    }

    /// Calls come as they are sent.
    pub fn clear(&self) {
        self.delayed_percent.store(0, Ordering::SeqCst);
        self.duplicated_percent.store(0, Ordering::SeqCst);
    }

    /// Whether anything happens to calls.
    #[must_use]
    pub fn is_on(&self) -> bool {
        self.delayed_percent.load(Ordering::SeqCst) > 0 || self.duplicated_percent.load(Ordering::SeqCst) > 0
    }

    /// How long the next call waits.
    fn draw_delay(&self) -> Duration {
        let ms = self.delay_ms.load(Ordering::SeqCst);
        let is_late = rand::rng().random_ratio(self.delayed_percent.load(Ordering::SeqCst).min(100), 100);
        Duration::from_millis(if is_late { rand::rng().random_range(0..=ms) } else { 0 })
    }

    /// When the next call comes again, if it does.
    fn draw_repetition(&self) -> Option<Duration> {
        let again = rand::rng().random_ratio(self.duplicated_percent.load(Ordering::SeqCst).min(100), 100);
        let ms = self.repeated_after_ms.load(Ordering::SeqCst);
        again.then(|| Duration::from_millis(rand::rng().random_range(0..=ms)))
    }
}

/// Paths of calls with one request and one answer.
static UNARY: LazyLock<BTreeSet<String>> = LazyLock::new(|| {
    let set = descriptors();
    methods(&set).filter(|method| method.is_unary).map(|method| method.path).collect()
});

/// Puts faults, if there may be any, in front of the services.
#[derive(Debug, Clone)]
pub struct CallFaultsLayer {
    faults: Option<Arc<Faults>>,
}

impl CallFaultsLayer {
    /// A layer with these faults; without, it does nothing.
    #[must_use]
    pub fn new(faults: Option<Arc<Faults>>) -> Self {
        Self { faults }
    }
}

impl<S> Layer<S> for CallFaultsLayer {
    type Service = Disturbed<S>;

    fn layer(&self, inner: S) -> Disturbed<S> {
        Disturbed { inner, faults: self.faults.clone() }
    }
}

/// A service behind faults.
#[derive(Debug, Clone)]
pub struct Disturbed<S> {
    inner: S,
    faults: Option<Arc<Faults>>,
}

type BoxFuture<T> = std::pin::Pin<Box<dyn Future<Output = T> + Send>>;

impl<S, B> Service<Request<Body>> for Disturbed<S>
where
    S: Service<Request<Body>, Response = Response<B>> + Clone + Send + 'static,
    S::Future: Send + 'static,
    S::Error: Send,
    B: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = futures::future::Either<S::Future, BoxFuture<Result<S::Response, S::Error>>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        use futures::future::Either;
        let faults = self.faults.as_ref().filter(|faults| faults.calls.is_on());
        let Some(faults) = faults.filter(|_| UNARY.contains(request.uri().path())) else {
            return Either::Left(self.inner.call(request));
        };
        Either::Right(Box::pin(disturb(take_ready(&mut self.inner), request, faults.clone())))
    }
}

async fn disturb<S, B>(
    mut service: S,
    request: Request<Body>,
    faults: Arc<Faults>,
) -> Result<S::Response, S::Error>
where
    S: Service<Request<Body>, Response = Response<B>> + Clone + Send + 'static,
    S::Future: Send + 'static,
    S::Error: Send,
    B: Send + 'static,
{
    let (delay, repetition) = (faults.calls.draw_delay(), faults.calls.draw_repetition());
    tokio::time::sleep(delay).await;
    let Some(later) = repetition else { return service.call(request).await };
    // The asker is gone, or asks for too much: an empty request is refused as such.
    let whole = Whole::read(request).await.unwrap_or_else(|head| head);
    let (first, second, again) = (whole.request(), whole.request(), service.clone());
    tokio::spawn(async move {
        tokio::time::sleep(later).await;
        // Nobody waits for this answer.
        drop(again.oneshot(second).await);
    });
    service.call(first).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;
    use http_body_util::{BodyExt as _, Full};
    use std::convert::Infallible;
    use tokio::sync::mpsc;

    async fn served(path: &str, faults: &Arc<Faults>) -> Vec<Bytes> {
        let (seen, mut all) = mpsc::unbounded_channel();
        let inner = tower::service_fn(move |request: Request<Body>| {
            let seen = seen.clone();
            async move {
                seen.send(request.into_body().collect().await.unwrap().to_bytes()).unwrap();
                Ok::<_, Infallible>(Response::new(()))
            }
        });
        let disturbed = CallFaultsLayer::new(Some(faults.clone())).layer(inner);
        let request = Request::builder().uri(path).body(Body::new(Full::new(Bytes::from("content"))));
        disturbed.oneshot(request.unwrap()).await.unwrap();
        let mut served = Vec::new();
        while let Some(content) = all.recv().await {
            served.push(content);
        }
        served
    }

    #[tokio::test]
    async fn a_call_is_served_twice_with_the_same_content_and_a_stream_once() {
        let faults = Arc::new(Faults::default());
        assert_eq!(served("/pool.v1.VmService/Start", &faults).await, ["content"]);
        faults.calls.duplicate(Duration::from_millis(5), 100);
        faults.calls.delay(Duration::from_millis(5), 100);
        assert_eq!(served("/pool.v1.VmService/Start", &faults).await, ["content", "content"]);
        assert_eq!(served("/pool.v1.EventService/Watch", &faults).await, ["content"]);
    }
}
