//! Connections to hosts: mTLS, several hosts tried at once with a stagger, the first to answer wins.

use super::Attempt;
use crate::{
    config::Config,
    failure::{Exit, Failure},
};
use futures::{StreamExt as _, stream::FuturesUnordered};
use std::{error::Error, net::SocketAddr, time::Duration};
use tonic::{
    Request, Status,
    metadata::{Ascii, MetadataValue},
    service::{Interceptor, interceptor::InterceptedService},
    transport::{Certificate, Channel as Connection, ClientTlsConfig, Endpoint, Identity},
};

/// A connection that carries the operator's token, if there is one.
pub type Channel = InterceptedService<Connection, Bearer>;

/// Adds an access token to each call; nothing for those who show a certificate.
#[derive(Clone)]
pub struct Bearer(Option<MetadataValue<Ascii>>);

impl Interceptor for Bearer {
    fn call(&mut self, mut request: Request<()>) -> Result<Request<()>, Status> {
        if let Bearer(Some(token)) = self {
            request.metadata_mut().insert("authorization", token.clone());
        }
        Ok(request)
    }
}

/// Name in the certificate of every host.
const TLS_NAME: &str = "poold.pool";

/// Longest wait for TCP and TLS with one host; two busy cores need a good part of it for a handshake.
const CONNECT_LIMIT: Duration = Duration::from_secs(2);

/// Silence of one host after which the next is tried as well.
const STAGGER: Duration = Duration::from_millis(250);

/// A connection that is quiet for this long is asked for a sign of life, so that a watch notices a dead host.
const KEEP_ALIVE_INTERVAL: Duration = Duration::from_secs(2);

/// Longest wait for that sign.
const KEEP_ALIVE_LIMIT: Duration = Duration::from_secs(3);

/// Makes connections with the operator's certificate.
pub struct Connector {
    tls: ClientTlsConfig,
    bearer: Bearer,
}

impl Connector {
    /// Takes the certificates of a configuration.
    ///
    /// # Errors
    /// When they are no certificates.
    pub fn new(config: &Config) -> Result<Self, Failure> {
        let tls = ClientTlsConfig::new()
            .ca_certificate(Certificate::from_pem(&config.ca_pem))
            .domain_name(TLS_NAME);
        let connector = if config.token.is_empty() {
            let identity = Identity::from_pem(&config.cert_pem, &config.key_pem);
            Self { tls: tls.identity(identity), bearer: Bearer(None) }
        } else {
            let header = format!("Bearer {}", config.token).parse().map_err(|_| {
                Failure::new(
                    Exit::Usage,
                    "BAD_CONFIG",
                    "`token` of the configuration",
                    "it is no token".to_owned(),
                )
                .with_remedy("copy the whole line that `poolctl user token create` printed")
            })?;
            Self { tls, bearer: Bearer(Some(header)) }
        };
        // Bad PEM shows only here; better now than as "unreachable".
        connector.endpoint(([127, 0, 0, 1], 1).into()).map_err(|error| {
            Failure::new(Exit::Usage, "BAD_CONFIG", "certificates of the configuration", chain(&error))
                .with_remedy("pass --config FILE; `poold init` writes one to DIR/admin.toml")
        })?;
        Ok(connector)
    }

    fn endpoint(&self, address: SocketAddr) -> Result<Endpoint, tonic::transport::Error> {
        Ok(Endpoint::from_shared(format!("https://{address}"))?
            .tls_config(self.tls.clone())?
            .connect_timeout(CONNECT_LIMIT)
            .http2_keep_alive_interval(KEEP_ALIVE_INTERVAL)
            .keep_alive_timeout(KEEP_ALIVE_LIMIT))
    }

    async fn connect(&self, address: SocketAddr) -> (SocketAddr, Result<Channel, Failure>) {
        let attempt = async { self.endpoint(address)?.connect().await };
        let result = match tokio::time::timeout(CONNECT_LIMIT, attempt).await {
            Ok(Ok(channel)) => Ok(InterceptedService::new(channel, self.bearer.clone())),
            Ok(Err(error)) => Err(failure_of_connection(address, &error)),
            Err(_) => Err(unreachable_host(address, format!("no answer within {CONNECT_LIMIT:?}"))),
        };
        (address, result)
    }

    /// Tries the addresses in order, the next one after a failure or a short silence, and takes the first connection.
    ///
    /// # Errors
    /// Why each of them failed, as one failure.
    pub async fn connect_any(&self, addresses: &[SocketAddr]) -> Result<(SocketAddr, Channel), Attempt> {
        let mut waiting = addresses.iter().copied();
        let mut attempts = FuturesUnordered::new();
        let mut failures = Vec::new();
        loop {
            if let Some(address) = waiting.next() {
                attempts.push(self.connect(address));
            }
            tokio::select! {
                ended = attempts.next() => match ended {
                    Some((address, Ok(channel))) => return Ok((address, channel)),
                    Some((_, Err(failure))) => failures.push(failure),
                    None => return Err(summary(failures)),
                },
                () = tokio::time::sleep(STAGGER), if waiting.len() > 0 => {}
            }
        }
    }
}

/// All failures as one. A host that refuses the certificate outweighs those that are only silent.
fn summary(failures: Vec<Failure>) -> Attempt {
    if let Some(denied) = failures.iter().find(|failure| failure.exit == Exit::Denied) {
        return Attempt::Refused(denied.clone());
    }
    let causes: Vec<String> =
        failures.iter().map(|failure| format!("{}: {}", failure.object, failure.cause)).collect();
    let failure = Failure::new(
        Exit::NoQuorum,
        "UNREACHABLE",
        "pool",
        format!("no host answers ({})", causes.join("; ")),
    );
    Attempt::Unserved(
        failure.with_remedy("check that `poold serve` runs, and the addresses in the configuration"),
    )
}

fn unreachable_host(address: SocketAddr, cause: String) -> Failure {
    Failure::new(Exit::NoQuorum, "UNREACHABLE", address.to_string(), cause)
}

fn failure_of_connection(address: SocketAddr, error: &(dyn Error + 'static)) -> Failure {
    let Some(tls) = tls_error(error) else { return unreachable_host(address, chain(error)) };
    match tls {
        rustls::Error::InvalidCertificate(_) | rustls::Error::AlertReceived(_) => {
            Failure::new(Exit::Denied, "CERTIFICATE_REFUSED", format!("host at {address}"), tls.to_string())
                .with_remedy("is this the configuration of that pool? pass --config FILE")
        }
        _ => unreachable_host(address, tls.to_string()),
    }
}

/// What a call means for the next attempt that broke with its connection or found no quorum.
pub fn failure_of_lost_call(address: SocketAddr, status: Status) -> Attempt {
    let Some(source) = status.source() else { return Attempt::Unserved(status.into()) };
    let failure = failure_of_connection(address, source);
    if failure.exit == Exit::Denied { Attempt::Refused(failure) } else { Attempt::Unserved(failure) }
}

/// The TLS error that is at the bottom of an error, if one is.
fn tls_error<'a>(error: &'a (dyn Error + 'static)) -> Option<&'a rustls::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(tls) = error.downcast_ref::<rustls::Error>() {
            return Some(tls);
        }
        // An I/O error hides what it carries from `source`.
        let inner = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        next = match inner {
            Some(inner) => Some(inner),
            None => error.source(),
        };
    }
    None
}

/// An error and its sources as one line, the same text not twice.
fn chain(error: &(dyn Error + 'static)) -> String {
    let mut parts: Vec<String> = Vec::new();
    let mut next = Some(error);
    while let Some(error) = next {
        let text = error.to_string();
        if parts.last() != Some(&text) {
            parts.push(text);
        }
        next = error.source();
    }
    parts.join(": ")
}
