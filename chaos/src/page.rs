//! The report of a run as one file that a browser shows without anything else: the plotted timeline, the histogram of
//! recovery times, faults and violations.

use std::fmt::Write;

use crate::lanes::{Bar, Lane, Paint, lanes};
use crate::observation::{Observation, Seen};
use crate::report::{Report, Verdict, histogram};

/// Width of a second in the plot; a long run is scrolled.
const PIXELS_A_SECOND: f64 = 12.0;
/// Room for the names of the lanes.
const NAMES_WIDTH: f64 = 190.0;
const LANE_HEIGHT: f64 = 22.0;
/// Room for the axis.
const AXIS_HEIGHT: f64 = 24.0;
/// Seconds between two marks of the axis.
const MARK_EVERY_S: u64 = 5;
/// Width of a letter in the plot, about.
const LETTER_WIDTH: f64 = 6.2;

const STYLE: &str = "body{font:14px sans-serif;margin:1.5em;color:#222}h1{font-size:1.4em}h2{font-size:1.1em;\
margin-top:1.5em}.plot{overflow-x:auto;border:1px solid #ccc}svg text{font:11px sans-serif}table{border-collapse:\
collapse}td,th{border:1px solid #ccc;padding:2px 8px;text-align:left;vertical-align:top}.ok{color:#176d2b}.bad{color:\
#b00020}";

/// Colours of hosts, in the order of their numbers.
const HOSTS: [&str; 8] =
    ["#4e79a7", "#f28e2b", "#59a14f", "#b07aa1", "#76b7b2", "#edc948", "#9c755f", "#bab0ac"];

/// The whole page.
#[must_use]
pub fn render(report: &Report, observations: &[Observation]) -> String {
    let class = if report.verdict == Verdict::Ok { "ok" } else { "bad" };
    let mut page = String::new();
    let mut add = |text: std::fmt::Arguments<'_>| page.write_fmt(text).expect("a string takes all text");
    add(format_args!(
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><title>chaos seed {}",
        report.seed
    ));
    add(format_args!("</title><style>{STYLE}</style></head><body>\n"));
    add(format_args!(
        "<h1>Chaos, seed {}: <span class=\"{class}\">{:?}</span></h1>\n",
        report.seed, report.verdict
    ));
    add(format_args!("<pre>{}</pre>\n", escape(&summary(report))));
    add(format_args!("<h2>Timeline</h2>\n<div class=\"plot\">{}</div>\n", timeline(report, observations)));
    add(format_args!(
        "<p>Bars carry their text: point at one. Red lines are violations, dashed ones crashes.</p>\n"
    ));
    add(format_args!("<h2>Times from a fault to a running copy elsewhere</h2>\n{}\n", recovery_plot(report)));
    add(format_args!("<h2>Violations and crashes</h2>\n{}\n", findings(report)));
    add(format_args!("<h2>Faults</h2>\n{}\n</body></html>\n", fault_table(observations)));
    page
}

/// The head of the text report, without its histogram and lists.
fn summary(report: &Report) -> String {
    let text = report.text();
    text.lines()
        .take_while(|line| !line.starts_with("recoveries"))
        .fold(String::new(), |sum, line| sum + line + "\n")
}

fn timeline(report: &Report, observations: &[Observation]) -> String {
    let lanes = lanes(observations);
    let end_ms = observations.last().map_or(0, |observation| observation.at_ms);
    let (width, height) = (x(end_ms) + 20.0, AXIS_HEIGHT + LANE_HEIGHT * lanes.len() as f64 + 4.0);
    let mut svg =
        format!("<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width:.0}\" height=\"{height:.0}\">");
    let mut add = |text: String| svg.push_str(&text);
    for second in (0..=end_ms / 1000).step_by(usize::try_from(MARK_EVERY_S).unwrap_or(1)) {
        let at = x(second * 1000);
        add(format!(
            "<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{AXIS_HEIGHT}\" y2=\"{height:.0}\" stroke=\"#eee\"/>"
        ));
        add(format!("<text x=\"{:.1}\" y=\"14\" fill=\"#666\">{second} s</text>", at + 2.0));
    }
    for (row, lane) in lanes.iter().enumerate() {
        add(draw_lane(lane, AXIS_HEIGHT + LANE_HEIGHT * row as f64));
    }
    for violation in &report.violations {
        let title = format!("{}: {}", violation.invariant, violation.text);
        add(draw_mark(violation.at_ms, height, "", &title));
    }
    for observation in observations {
        if let Seen::Crash { program, text } = &observation.seen {
            add(draw_mark(
                observation.at_ms,
                height,
                "stroke-dasharray=\"4 3\"",
                &format!("{program}: {text}"),
            ));
        }
    }
    svg.push_str("</svg>");
    svg
}

fn x(ms: u64) -> f64 {
    NAMES_WIDTH + ms as f64 / 1000.0 * PIXELS_A_SECOND
}

fn draw_lane(lane: &Lane, top: f64) -> String {
    let mut svg = format!("<text x=\"4\" y=\"{:.1}\">{}</text>", top + 15.0, escape(&lane.name));
    for bar in &lane.bars {
        svg.push_str(&draw_bar(bar, top));
    }
    svg
}

fn draw_bar(bar: &Bar, top: f64) -> String {
    let (from, width) = (x(bar.from_ms), (x(bar.to_ms) - x(bar.from_ms)).max(2.0));
    let title = escape(&format!("{} to {} ms: {}", bar.from_ms, bar.to_ms, bar.label));
    let colour = colour(&bar.paint);
    let (y, height) = (top + 2.0, LANE_HEIGHT - 4.0);
    let mut svg = format!(
        "<rect x=\"{from:.1}\" y=\"{y:.1}\" width=\"{width:.1}\" height=\"{height:.1}\" fill=\"{colour}\">\
         <title>{title}</title></rect>"
    );
    if bar.label.len() as f64 * LETTER_WIDTH < width {
        let at = (from + 3.0, top + 15.0);
        write!(
            svg,
            "<text x=\"{:.1}\" y=\"{:.1}\" fill=\"#fff\" pointer-events=\"none\">{}</text>",
            at.0,
            at.1,
            escape(&bar.label)
        )
        .expect("a string takes all text");
    }
    svg
}

fn draw_mark(at_ms: u64, height: f64, style: &str, title: &str) -> String {
    let at = x(at_ms);
    format!(
        "<line x1=\"{at:.1}\" x2=\"{at:.1}\" y1=\"{AXIS_HEIGHT}\" y2=\"{height:.0}\" stroke=\"#d00000\" \
         stroke-width=\"2\" {style}><title>{}</title></line>",
        escape(&format!("{at_ms} ms: {title}"))
    )
}

fn colour(paint: &Paint) -> &'static str {
    match paint {
        Paint::Host(name) => {
            let number: usize = name.trim_start_matches(|c: char| !c.is_ascii_digit()).parse().unwrap_or(1);
            HOSTS[number.saturating_sub(1) % HOSTS.len()]
        }
        Paint::Replicas(0 | 1) => "#d62728",
        Paint::Replicas(2) => "#e0a800",
        Paint::Replicas(_) => "#2e8b57",
        Paint::Fault => "#555555",
        Paint::Moved => "#8fbc8f",
        Paint::NotMoved => "#c9a0a0",
        Paint::Blackout => "#000000",
    }
}

fn recovery_plot(report: &Report) -> String {
    let classes = histogram(&report.recovery_ms);
    if classes.is_empty() {
        return "<p>None.</p>".to_owned();
    }
    let most = classes.iter().map(|&(_, count)| count).max().unwrap_or(1);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"520\" height=\"{}\">",
        classes.len() * 22 + 4
    );
    for (row, (class, count)) in classes.iter().enumerate() {
        let (y, width) = (row * 22 + 2, 360 * count / most);
        write!(
            svg,
            "<text x=\"80\" y=\"{}\" text-anchor=\"end\">{}</text><rect x=\"90\" y=\"{y}\" width=\"{width}\" \
             height=\"18\" fill=\"#4e79a7\"/><text x=\"{}\" y=\"{}\">{count}</text>",
            y + 13,
            escape(class),
            96 + width,
            y + 13
        )
        .expect("a string takes all text");
    }
    svg + "</svg>"
}

fn findings(report: &Report) -> String {
    if report.violations.is_empty() && report.crashes.is_empty() {
        return "<p>None.</p>".to_owned();
    }
    let mut rows = String::new();
    for violation in &report.violations {
        rows += &row(&[&violation.invariant, &violation.at_ms.to_string(), &violation.text]);
    }
    for crash in &report.crashes {
        rows += &row(&["crash", "", crash]);
    }
    format!("<table><tr><th>what</th><th>ms</th><th>how</th></tr>{rows}</table>")
}

fn fault_table(observations: &[Observation]) -> String {
    let mut rows = String::new();
    for observation in observations {
        if let Seen::FaultBegins { number, fault, struck } = &observation.seen {
            let (number, at_ms) = (number.to_string(), observation.at_ms.to_string());
            rows += &row(&[&number, &at_ms, fault.kind(), struck, &fault.away_ms().to_string()]);
        }
    }
    format!("<table><tr><th>#</th><th>ms</th><th>fault</th><th>hit</th><th>lasts ms</th></tr>{rows}</table>")
}

fn row(cells: &[&str]) -> String {
    let cells: String = cells.iter().map(|cell| format!("<td>{}</td>", escape(cell))).collect();
    format!("<tr>{cells}</tr>")
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fault::Fault;
    use crate::observation::CopyId;

    #[test]
    fn a_page_shows_faults_copies_and_violations_and_loads_nothing() {
        let copy = CopyId { vm: 1, epoch: 2, host: "h2".to_owned(), process: 3 };
        let ran = |at_ms, vcpu_ns| Observation {
            at_ms,
            seen: Seen::Copy { copy: copy.clone(), from_ms: at_ms, vcpu_ns },
        };
        let at = |at_ms, seen| Observation { at_ms, seen };
        let seen = [
            at(0, Seen::Started { seed: 7, hosts: 3, lost_ms: 3000 }),
            ran(100, 0),
            ran(300, 100_000_000),
            at(
                400,
                Seen::FaultBegins { number: 0, fault: Fault::KillVm { vm: 0 }, struck: "vm <a>".to_owned() },
            ),
            at(500, Seen::FaultEnds { number: 0 }),
            at(600, Seen::Leftover { kind: "socket".to_owned(), name: "/run/x".to_owned() }),
        ];
        let page = render(&Report::new(&seen), &seen);
        for part in
            ["seed 7", "Correctness", "h2 (epoch 2)", "vm &lt;a&gt;", "socket left behind: /run/x", "I7"]
        {
            assert!(page.contains(part), "{part} is missing");
        }
        assert!(!page.contains("<a>"), "not escaped");
        for foreign in ["<script", "<link", "src=", "url("] {
            assert!(!page.contains(foreign), "{foreign}");
        }
    }
}
