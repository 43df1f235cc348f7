//! The metrics of a host, as a scraper reads them.

use crate::Host;
use anyhow::{Context, Result};
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// A host answers from memory.
const ANSWER_DEADLINE: Duration = Duration::from_secs(5);

impl Host {
    /// Where its metrics are: the port after its own.
    #[must_use]
    pub fn metrics_address(&self) -> SocketAddr {
        SocketAddr::new(self.address().ip(), self.address().port() + 1)
    }

    /// Sets the address in its configuration; the daemon must be started anew.
    ///
    /// # Errors
    /// When the file can't be written.
    pub fn configure_metrics(&self) -> Result<()> {
        let path = self.data_dir().join("poold.toml");
        let text = fs::read_to_string(&path)?;
        fs::write(&path, format!("metrics = \"{}\"\n{text}", self.metrics_address()))?;
        Ok(())
    }

    /// The value of a sample, by its name with labels; none: there is no such sample.
    ///
    /// # Errors
    /// When the host does not answer.
    pub fn metric(&self, sample: &str) -> Result<Option<u64>> {
        let mut stream = TcpStream::connect_timeout(&self.metrics_address(), ANSWER_DEADLINE)?;
        stream.set_read_timeout(Some(ANSWER_DEADLINE))?;
        stream.write_all(b"GET /metrics HTTP/1.1\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text).with_context(|| format!("metrics of {}", self.name()))?;
        let value = text.lines().find_map(|line| line.strip_prefix(sample)?.strip_prefix(' '));
        value.map(|value| value.trim().parse().context("a sample is a number")).transpose()
    }
}
