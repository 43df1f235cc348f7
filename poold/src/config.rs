//! `poold.toml`: the few things that a host must know before it has read the pool's state.

pub mod reference;

use crate::cli::MemoryProof;
use crate::identity::write_private;
use pool_state::features;
use proto::HostId;
use serde::{Deserialize, Serialize};
use std::fs;
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

/// The host's configuration, written by `init` and `join`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostConfig {
    /// Id of the pool.
    pub pool_id: String,
    /// Id of this host, which is its Raft node id.
    pub host_id: u64,
    /// Name of this host.
    pub host_name: String,
    /// Address to listen on: TCP for gRPC, UDP for the block store.
    pub listen: SocketAddr,
    /// Memory that VMs may use, in bytes.
    pub vm_memory_bytes: u64,
    /// Intervals of elections and heartbeats, as in the pool's timing profile.
    pub timing: TimingName,
    /// The highest feature level that this host takes part in, so that the pool waits with a new one; none: the newest that
    /// this version knows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub feature_level_max: Option<u32>,
    /// Address of the metrics port; none: there is no such port.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub metrics: Option<SocketAddr>,
    /// Form of the log lines; none: text.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_format: Option<LogFormat>,
    /// Which lines are logged; none: [`LOG_FILTER`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_filter: Option<String>,
    /// How the memory of VMs that move away is proved; none: by a sample.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prove_memory: Option<MemoryProof>,
}

/// What is logged unless somebody says otherwise: openraft reports everything that passes by itself as an error.
pub const LOG_FILTER: &str = "info,openraft=off,sled=warn";

/// The same for commands that are not the daemon.
pub const COMMAND_LOG_FILTER: &str = "warn,openraft=off";

/// Form of the log lines.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum LogFormat {
    /// For people.
    #[default]
    Text,
    /// One object a line.
    Json,
}

/// A named timing profile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub enum TimingName {
    /// For production.
    Default,
    /// A fifth of it, for tests on one machine.
    Fast,
}

impl TimingName {
    /// Its values.
    #[must_use]
    pub fn timing(self) -> pool_state::Timing {
        match self {
            Self::Default => pool_state::Timing::default(),
            Self::Fast => pool_state::Timing::fast(),
        }
    }
}

/// The configuration can't be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// It can't be read or written.
    #[error("{}: {source}", path.display())]
    Io {
        path: PathBuf,
        #[source]
        source: io::Error,
    },
    /// It is not what it should be.
    #[error("{} is no valid configuration: {cause}", path.display())]
    Invalid { path: PathBuf, cause: String },
    /// It has a key that means nothing.
    #[error("{}: there is no key `{key}`{}; `poold config example` lists all keys", path.display(), meant(*nearest))]
    UnknownKey { path: PathBuf, key: String, nearest: Option<&'static str> },
}

fn meant(nearest: Option<&str>) -> String {
    nearest.map(|key| format!(", did you mean `{key}`?")).unwrap_or_default()
}

impl HostConfig {
    /// Reads the configuration of a data folder; `None` if the host belongs to no pool yet.
    ///
    /// # Errors
    /// It can't be read or is invalid.
    pub fn load(data_dir: &Path) -> Result<Option<Self>, ConfigError> {
        let path = data_dir.join("poold.toml");
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(ConfigError::Io { path, source }),
        };
        let invalid =
            |error: toml::de::Error| ConfigError::Invalid { path: path.clone(), cause: error.to_string() };
        let keys: toml::Table = text.parse().map_err(invalid)?;
        if let Some(key) = keys.keys().find(|key| reference::KEYS.iter().all(|known| known.name != **key)) {
            let (key, nearest) = (key.clone(), reference::nearest(key));
            return Err(ConfigError::UnknownKey { path, key, nearest });
        }
        let config: Self = toml::from_str(&text).map_err(invalid)?;
        config.check().map_err(|cause| ConfigError::Invalid { path, cause })?;
        Ok(Some(config))
    }

    /// What makes no sense although it can be read.
    fn check(&self) -> Result<(), String> {
        if self.pool_id.is_empty() || self.host_id == 0 {
            return Err("`pool_id` and `host_id` are what `poold init` or `poold join` wrote".to_owned());
        }
        if !proto::limits::is_valid_name(&self.host_name) {
            return Err(format!("`host_name` {} is no valid name", self.host_name));
        }
        if self.listen.port() == 0 || self.listen.ip().is_unspecified() {
            return Err(format!("`listen` {} is no address that other hosts could reach", self.listen));
        }
        if self.vm_memory_bytes == 0 {
            return Err("`vm_memory_bytes` is 0: no VM could run here".to_owned());
        }
        if let Some(level) = self.feature_level_max
            && !(features::OLDEST..=features::NEWEST).contains(&level)
        {
            let (oldest, newest) = (features::OLDEST, features::NEWEST);
            return Err(format!(
                "`feature_level_max` {level} is not {oldest} to {newest}, which this version knows"
            ));
        }
        if let Some(filter) = &self.log_filter
            && let Err(error) = filter.parse::<tracing_subscriber::filter::Targets>()
        {
            return Err(format!("`log_filter` {filter} says nothing that can be logged by: {error}"));
        }
        if self.metrics == Some(self.listen) {
            return Err("`metrics` needs another port than `listen`".to_owned());
        }
        Ok(())
    }

    /// Writes it; this is the step that makes a host a member of its pool.
    ///
    /// # Errors
    /// The disk refuses.
    pub fn save(&self, data_dir: &Path) -> Result<(), ConfigError> {
        let path = data_dir.join("poold.toml");
        let text = toml::to_string(self)
            .map_err(|error| ConfigError::Invalid { path: path.clone(), cause: error.to_string() })?;
        write_private(&path, text.as_bytes()).map_err(|source| ConfigError::Io { path, source })
    }

    /// The highest feature level that this host supports.
    #[must_use]
    pub fn feature_level(&self) -> u32 {
        self.feature_level_max.unwrap_or(features::NEWEST)
    }

    /// This host.
    #[must_use]
    pub fn host(&self) -> HostId {
        HostId(self.host_id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use tracing::Level;

    fn valid() -> HostConfig {
        HostConfig {
            pool_id: "p".to_owned(),
            host_id: 3,
            host_name: "h3".to_owned(),
            listen: "10.0.0.3:7400".parse().unwrap(),
            vm_memory_bytes: 1 << 30,
            timing: TimingName::Default,
            feature_level_max: None,
            metrics: Some("10.0.0.3:7401".parse().unwrap()),
            log_format: Some(LogFormat::Json),
            log_filter: Some("debug".to_owned()),
            prove_memory: Some(MemoryProof::Full),
        }
    }

    #[test]
    fn what_is_saved_is_loaded_and_an_older_file_has_no_metrics() {
        let dir = tempfile::tempdir().unwrap();
        valid().save(dir.path()).unwrap();
        assert_eq!(HostConfig::load(dir.path()).unwrap(), Some(valid()));
        let without = HostConfig { metrics: None, ..valid() };
        without.save(dir.path()).unwrap();
        assert_eq!(HostConfig::load(dir.path()).unwrap(), Some(without));
    }

    #[test]
    fn what_is_logged_usually_is_what_was_meant() {
        let of = |filter: &str| filter.parse::<tracing_subscriber::filter::Targets>().unwrap();
        for (filter, own) in [(LOG_FILTER, Level::INFO), (COMMAND_LOG_FILTER, Level::WARN)] {
            let filter = of(filter);
            assert!(filter.would_enable("poold::reconcile", &own));
            assert!(!filter.would_enable("openraft::engine", &Level::ERROR));
        }
        assert!(!of(LOG_FILTER).would_enable("sled", &Level::INFO));
    }

    #[test]
    fn each_mistake_is_named() {
        type Spoil = fn(&mut HostConfig);
        let cases: [(&str, Spoil); 7] = [
            ("pool_id", |config| config.pool_id.clear()),
            ("host_name", |config| config.host_name = "h 3".to_owned()),
            ("listen", |config| config.listen.set_port(0)),
            ("vm_memory_bytes", |config| config.vm_memory_bytes = 0),
            ("feature_level_max", |config| config.feature_level_max = Some(features::NEWEST + 1)),
            ("log_filter", |config| config.log_filter = Some("poold=shout".to_owned())),
            ("metrics", |config| config.metrics = Some(config.listen)),
        ];
        let dir = tempfile::tempdir().unwrap();
        for (word, spoil) in cases {
            let mut config = valid();
            spoil(&mut config);
            config.save(dir.path()).unwrap();
            let error = HostConfig::load(dir.path()).unwrap_err().to_string();
            assert!(error.contains(word), "{word}: {error}");
        }
    }

    #[test]
    fn an_unknown_key_is_named_with_the_one_that_was_meant() {
        let dir = tempfile::tempdir().unwrap();
        let told = |line: &str| {
            valid().save(dir.path()).unwrap();
            let path = dir.path().join("poold.toml");
            let text = std::fs::read_to_string(&path).unwrap();
            std::fs::write(&path, format!("{line}\n{text}")).unwrap();
            HostConfig::load(dir.path()).unwrap_err().to_string()
        };
        let error = told("metric = \"10.0.0.3:1\"");
        assert!(
            error.contains("`metric`, did you mean `metrics`?") && error.contains("config example"),
            "{error}"
        );
        let error = told("colour = 1");
        assert!(error.contains("no key `colour`;"), "{error}");
    }

    #[test]
    fn every_key_is_in_the_example_and_every_key_of_the_example_is_read() {
        let all = HostConfig { feature_level_max: Some(features::NEWEST), ..valid() };
        let table = toml::Table::try_from(&all).unwrap();
        let names: Vec<&str> = reference::KEYS.iter().map(|key| key.name).collect();
        assert_eq!(
            table.keys().map(String::as_str).collect::<BTreeSet<_>>(),
            names.iter().copied().collect()
        );
        let example = reference::example();
        for uncommented in
            [example.clone(), example.replace("\n#log", "\nlog").replace("\n#prove", "\nprove")]
        {
            let dir = tempfile::tempdir().unwrap();
            std::fs::write(dir.path().join("poold.toml"), uncommented).unwrap();
            assert!(HostConfig::load(dir.path()).unwrap().is_some());
        }
        assert_eq!(
            example,
            include_str!("../dist/poold.toml.example"),
            "the shipped file: `poold config example`"
        );
    }

    #[test]
    fn every_timing_and_limit_is_told() {
        let text = reference::effective(&valid()).unwrap();
        let timings = toml::Table::try_from(pool_state::Timing::default()).unwrap();
        let told: BTreeSet<&str> = pool_state::Timing::default().list().map(|(name, ..)| name).into();
        assert_eq!(timings.keys().map(String::as_str).collect::<BTreeSet<_>>(), told);
        for (name, value, _) in pool_state::Timing::default().list() {
            assert_eq!(timings[name].as_integer(), i64::try_from(value).ok(), "{name}");
            assert!(text.contains(&format!("{name} = {value}\n")), "{name}");
        }
        for limit in pool_state::limits::ALL {
            assert!(
                text.contains(&format!("{} = {}\n", limit.name.to_lowercase(), limit.value)),
                "{}",
                limit.name
            );
        }
    }
}
