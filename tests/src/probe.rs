//! The lines that the probe guest prints on its serial console.
//!
//! A line is `PROBE`, a word for its kind, and `key=value` pairs; unknown pairs are skipped, so that the guest may say more.
//! Only complete lines count: the tail of a console that is being written is no line yet.

/// One line of a probe guest.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Line {
    /// The guest has booted and looked at its disk.
    Boot {
        /// Newest counter found on the disk.
        disk_counter: u64,
        /// Blocks read back and found right.
        verified: u64,
        /// Blocks found wrong.
        errors: u64,
    },
    /// Writes up to this counter were acknowledged by the disk.
    Disk {
        /// The counter.
        acked: u64,
    },
    /// The network has given the guest this address.
    Address(String),
    /// Datagrams of the network card since boot.
    Net {
        /// To its peer.
        sent: u64,
        /// Came back from there.
        echoed: u64,
        /// Of others, answered.
        answered: u64,
    },
    /// A sign of life.
    Beat {
        /// Number of the beat, from boot.
        beat: u64,
        /// Completed passes over the memory.
        pass: u64,
        /// Newest acknowledged disk counter.
        acked: u64,
        /// Inconsistencies seen since boot.
        errors: u64,
    },
    /// The guest found something wrong.
    Error(String),
}

/// All complete probe lines of a console, in order; other output is skipped.
#[must_use]
pub fn parse(console: &str) -> Vec<Line> {
    let complete = console.rfind('\n').map_or("", |end| &console[..end]);
    complete.lines().filter_map(parse_line).collect()
}

/// One line, if it is a probe's.
#[must_use]
pub fn parse_line(line: &str) -> Option<Line> {
    let rest = line.trim().strip_prefix("PROBE ")?;
    let get = |key: &str| -> Option<u64> {
        rest.split_ascii_whitespace()
            .find_map(|word| word.strip_prefix(key)?.strip_prefix('='))
            .and_then(|value| value.parse().ok())
    };
    if let Some(error) = rest.strip_prefix("ERROR") {
        return Some(Line::Error(error.trim().to_owned()));
    }
    match rest.split_ascii_whitespace().next()? {
        "boot" => Some(Line::Boot {
            disk_counter: get("disk_counter")?,
            verified: get("verified")?,
            errors: get("errors")?,
        }),
        "net" => match rest.strip_prefix("net ip=") {
            Some(address) => Some(Line::Address(address.to_owned())),
            None => {
                Some(Line::Net { sent: get("sent")?, echoed: get("echoed")?, answered: get("answered")? })
            }
        },
        "disk" => Some(Line::Disk { acked: get("acked")? }),
        word if word.starts_with("beat=") => Some(Line::Beat {
            beat: get("beat")?,
            pass: get("pass")?,
            acked: get("acked")?,
            errors: get("errors")?,
        }),
        _ => None,
    }
}

/// What a console tells all in all.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Summary {
    /// Number of boots.
    pub boots: u64,
    /// Counter found on the disk at the last boot.
    pub disk_counter: u64,
    /// Blocks verified at the last boot.
    pub verified: u64,
    /// Last beat.
    pub beat: u64,
    /// Passes over the memory at the last beat.
    pub pass: u64,
    /// Highest acknowledged counter of the last boot.
    pub acked: u64,
    /// Its address, once the network has given one.
    pub address: String,
    /// Datagrams sent to its peer since the last boot.
    pub net_sent: u64,
    /// Echoes of them that came back.
    pub net_echoed: u64,
    /// Everything that the guest complained about.
    pub errors: Vec<String>,
}

impl Summary {
    /// Sums up.
    #[must_use]
    pub fn of(lines: &[Line]) -> Self {
        let mut summary = Self::default();
        for line in lines {
            match line {
                Line::Boot { disk_counter, verified, errors } => {
                    summary.boots += 1;
                    (summary.disk_counter, summary.verified) = (*disk_counter, *verified);
                    (summary.beat, summary.acked) = (0, 0);
                    summary.count_errors(*errors, "at boot");
                }
                Line::Disk { acked } => summary.acked = summary.acked.max(*acked),
                Line::Beat { beat, pass, acked, errors } => {
                    (summary.beat, summary.pass) = (*beat, *pass);
                    summary.acked = summary.acked.max(*acked);
                    summary.count_errors(*errors, "at a beat");
                }
                Line::Address(address) => summary.address.clone_from(address),
                Line::Net { sent, echoed, .. } => (summary.net_sent, summary.net_echoed) = (*sent, *echoed),
                Line::Error(error) => summary.errors.push(error.clone()),
            }
        }
        summary
    }

    /// Summary of a console.
    #[must_use]
    pub fn of_console(console: &str) -> Self {
        Self::of(&parse(console))
    }

    fn count_errors(&mut self, errors: u64, when: &str) {
        if errors > 0 {
            self.errors.push(format!("{errors} errors counted {when}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CONSOLE: &str = "noise\nPROBE boot disk_counter=41 verified=40 errors=0 more=x\r\nPROBE disk acked=42\n\
        PROBE beat=1 pass=3 acked=43 errors=0\nPROBE ERROR memory page=7\nPROBE beat=2 pa";

    #[test]
    fn complete_lines_are_read_and_the_torn_tail_is_not() {
        assert_eq!(
            parse(CONSOLE),
            vec![
                Line::Boot { disk_counter: 41, verified: 40, errors: 0 },
                Line::Disk { acked: 42 },
                Line::Beat { beat: 1, pass: 3, acked: 43, errors: 0 },
                Line::Error("memory page=7".to_owned()),
            ]
        );
    }

    #[test]
    fn a_summary_holds_the_last_boot_and_every_error() {
        let summary = Summary::of_console(CONSOLE);
        assert_eq!((summary.boots, summary.disk_counter, summary.acked, summary.beat), (1, 41, 43, 1));
        assert_eq!(summary.errors, ["memory page=7"]);
        let counted = Summary::of(&[Line::Beat { beat: 1, pass: 0, acked: 0, errors: 2 }]);
        assert_eq!(counted.errors.len(), 1);
    }
}
