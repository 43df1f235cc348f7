//! Masquerading of networks behind NAT: one nftables table for all of this host's, replaced as a whole.

use super::plan::{Ours, Problem, Wanted};
use proto::{Ipv4Subnet, NetworkId};
use std::{
    collections::BTreeMap,
    io,
    process::Stdio,
    time::{Duration, Instant},
};
use tokio::{io::AsyncWriteExt as _, process::Command};

/// Between two times that the same rules are set again, in case that somebody has flushed them.
const REPEAT: Duration = Duration::from_secs(30);

/// Whether this host routes at all, of this network namespace.
const FORWARDING: &str = "/proc/sys/net/ipv4/ip_forward";

/// What was last set.
#[derive(Default)]
pub struct Nat {
    last: Option<(Rules, Instant)>,
}

type Rules = BTreeMap<NetworkId, (String, Ipv4Subnet)>;

impl Nat {
    /// Makes the rules what is wanted; the problems by network.
    pub async fn apply(&mut self, ours: &Ours, wanted: &Wanted) -> BTreeMap<NetworkId, Problem> {
        let rules = wanted.nat();
        let is_set = match &self.last {
            Some((last, at)) => *last == rules && (rules.is_empty() || at.elapsed() < REPEAT),
            // Rules of an earlier daemon are looked for once, unless it can't have made any.
            None => false,
        };
        if is_set {
            return BTreeMap::new();
        }
        match set(ours, &rules).await {
            Ok(()) => {
                self.last = Some((rules, Instant::now()));
                BTreeMap::new()
            }
            Err(problem) if rules.is_empty() => {
                tracing::debug!(%problem, "rules of an earlier daemon are not looked for");
                self.last = Some((rules, Instant::now()));
                BTreeMap::new()
            }
            Err(problem) => {
                self.last = None;
                rules.keys().map(|network| (*network, problem.clone())).collect()
            }
        }
    }
}

async fn set(ours: &Ours, rules: &Rules) -> Result<(), Problem> {
    if !rules.is_empty() {
        let enabled = std::fs::write(FORWARDING, "1");
        enabled.map_err(|error| Problem::Failed(format!("{FORWARDING}: {error}; it must be 1 for NAT")))?;
    }
    nft(&script(ours, rules)).await.map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => {
            Problem::Failed("`nft` is missing; run `apt-get install nftables`".to_owned())
        }
        _ => Problem::Failed(format!("nftables: {error}")),
    })
}

/// The table of this host: gone without rules.
fn script(ours: &Ours, rules: &Rules) -> String {
    let table =
        format!("pool_{}_{}", ours.pool_id.replace(|c: char| !c.is_ascii_alphanumeric(), "_"), ours.host.0);
    // Added first, so that the deletion never fails.
    let mut script = format!("add table ip {table}\ndelete table ip {table}\n");
    if rules.is_empty() {
        return script;
    }
    let mut line = |text: String| {
        script.push_str(&text);
        script.push('\n');
    };
    line(format!(
        "table ip {table} {{\n  chain postrouting {{\n    type nat hook postrouting priority srcnat;"
    ));
    for (bridge, subnet) in rules.values() {
        line(format!("    ip saddr {subnet} oifname != \"{bridge}\" masquerade"));
    }
    line("  }\n}".to_owned());
    script
}

async fn nft(script: &str) -> io::Result<()> {
    let mut child = Command::new("nft")
        .args(["-f", "-"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    if let Some(mut stdin) = child.stdin.take() {
        stdin.write_all(script.as_bytes()).await?;
    }
    let output = child.wait_with_output().await?;
    if output.status.success() {
        return Ok(());
    }
    Err(io::Error::other(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::HostId;

    #[test]
    fn rules_masquerade_what_leaves_and_none_leave_no_table() {
        let ours = Ours { pool_id: "ab-1".to_owned(), host: HostId(3) };
        let rules = BTreeMap::from([(NetworkId(7), ("pnet7".to_owned(), "10.7.0.0/24".parse().unwrap()))]);
        let script_text = script(&ours, &rules);
        assert!(
            script_text.contains("ip saddr 10.7.0.0/24 oifname != \"pnet7\" masquerade"),
            "{script_text}"
        );
        assert!(script_text.contains("table ip pool_ab_1_3 {"), "{script_text}");
        let none = script(&ours, &Rules::new());
        assert_eq!(none, "add table ip pool_ab_1_3\ndelete table ip pool_ab_1_3\n");
    }
}
