//! What a host says of itself when something is wrong: the end of its logs, metrics, versions, its configuration.
//!
//! Bounded whatever there is, and without secrets: what looks like one is taken out of the logs, although none is logged.

use crate::clock::unix_ms;
use crate::{logs, metrics};
use proto::v1::{HostReport, ProcessLog};
use std::fs;

/// Bytes of the daemon's log: about two thousand lines.
const LOG_BYTES_MAX: u64 = 256 << 10;

/// Bytes of one VM process's log: it says little once it runs.
const PROCESS_LOG_BYTES_MAX: u64 = 8 << 10;

/// Bytes of the logs of all VM processes of a host.
const PROCESS_LOGS_BYTES_MAX: usize = 128 << 10;

/// Bytes of the metrics; those of a pool of thousands of volumes are longer.
const METRICS_BYTES_MAX: usize = 512 << 10;

/// How secrets begin: join tokens, access tokens, headers, keys.
const SECRETS: [&str; 4] = ["pool1-", "pooltoken-", "Bearer ", PEM_BEGIN];

/// The first and the last line of PEM.
const PEM_BEGIN: &str = "-----BEGIN";
const PEM_END: &str = "-----END";

/// Makes the reports of one host.
#[derive(Clone)]
pub struct Reporter {
    sources: metrics::Sources,
}

impl Reporter {
    /// From what metrics are made of.
    #[must_use]
    pub fn new(sources: metrics::Sources) -> Self {
        Self { sources }
    }

    /// What is known now. Reads files.
    #[must_use]
    pub fn now(&self) -> HostReport {
        let context = &self.sources.context;
        let state = context.consensus.local();
        let uname = nix::sys::utsname::uname().ok();
        let word = |text: &std::ffi::OsStr| text.to_string_lossy().into_owned();
        let kernel = uname.map(|name| format!("{} {}", word(name.sysname()), word(name.release())));
        let uptime = fs::read_to_string("/proc/uptime").unwrap_or_default();
        let uptime_s = uptime.split(['.', ' ']).next().and_then(|seconds| seconds.parse().ok());
        let mut metrics = self.sources.text();
        metrics.truncate(metrics.floor_char_boundary(METRICS_BYTES_MAX));
        HostReport {
            host: state.host_name(context.host),
            missing: String::new(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            feature_level: context.feature_level,
            time_ms: unix_ms(),
            kernel: kernel.unwrap_or_default(),
            uptime_s: uptime_s.unwrap_or(0),
            log: redact(&logs::last_lines(&context.data_dir, LOG_BYTES_MAX)),
            processes: self.process_logs(),
            metrics,
            config: redact(&fs::read_to_string(context.data_dir.join("poold.toml")).unwrap_or_default()),
        }
    }

    fn process_logs(&self) -> Vec<ProcessLog> {
        let folder = self.sources.context.data_dir.join("vms");
        let mut processes: Vec<_> =
            fs::read_dir(folder).into_iter().flatten().filter_map(Result::ok).collect();
        // The newest first, since not all may fit.
        processes
            .sort_by_key(|entry| std::cmp::Reverse(entry.metadata().and_then(|data| data.modified()).ok()));
        let mut bytes = 0;
        let logs = processes.into_iter().map(|entry| ProcessLog {
            process: entry.file_name().to_string_lossy().into_owned(),
            log: redact(&String::from_utf8_lossy(&logs::tail(
                &entry.path().join("log"),
                PROCESS_LOG_BYTES_MAX,
            ))),
        });
        logs.take_while(|log| {
            bytes += log.log.len();
            bytes <= PROCESS_LOGS_BYTES_MAX
        })
        .collect()
    }
}

/// Takes out of each line what follows the beginning of a secret, and of PEM all lines up to its end. One that has no end was cut
/// off in the middle: what follows may all be of it.
fn redact(text: &str) -> String {
    let mut safe = String::with_capacity(text.len());
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        match SECRETS.iter().filter_map(|start| line.find(start)).min() {
            Some(at) => safe.extend([&line[..at], "(taken out)"]),
            None => safe.push_str(line),
        }
        safe.push('\n');
        let opened = line.rfind(PEM_BEGIN).is_some_and(|begin| !line[begin..].contains(PEM_END));
        if opened {
            lines.by_ref().find(|line| line.contains(PEM_END));
        }
    }
    safe
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_looks_like_a_secret_is_taken_out_and_the_rest_stays() {
        let text = "one\ntoken pool1-00ff of h2\nauthorization: Bearer abc\nlast";
        assert_eq!(redact(text), "one\ntoken (taken out)\nauthorization: (taken out)\nlast\n");
    }

    #[test]
    fn pem_is_taken_out_to_its_end() {
        let (begin, end) = ("-----BEGIN PRIVATE KEY-----", "-----END PRIVATE KEY-----");
        let two = format!("one\nkey: {begin}\nMIGH\nAgEA\n{end}\ntwo\n{begin}\nMIGH\n{end}\nlast");
        assert_eq!(redact(&two), "one\nkey: (taken out)\ntwo\n(taken out)\nlast\n");
        let in_one_line = format!("{{\"key\":\"{begin}\\nMIGH\\n{end}\"}}\nlast");
        assert_eq!(redact(&in_one_line), "{\"key\":\"(taken out)\nlast\n");
        assert_eq!(redact(&format!("one\n{begin}\nMIGH\nAgEA")), "one\n(taken out)\n");
    }
}
