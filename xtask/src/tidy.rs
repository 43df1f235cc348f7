//! Rules that no compiler checks.

use ::tests::binaries::workspace_dir;
use anyhow::{Context, Result, bail};
use std::fs;
use std::path::{Path, PathBuf};

/// Lines of a source file: what one reader holds in mind.
const FILE_LINES_MAX: usize = 600;

/// Lines of ARCHITECTURE.md.
const ARCHITECTURE_LINES_MAX: usize = 300;

/// Text that must not land, in pieces so that this file does not hold it, and why.
const BANNED: [(&str, &str, &str); 6] = [
    ("FIX", "ME", "do it, or put it into an issue"),
    ("TO", "DO", "do it, or put it into an issue"),
    ("XX", "X", "do it, or put it into an issue"),
    ("#[ig", "nore", "a test that does not run proves nothing"),
    ("#[al", "low(", "use #[expect(…, reason = …)], which is reported when it is no longer needed"),
    ("dbg", "!(", "left over from debugging"),
];

/// Checks the whole tree; lists everything that is wrong.
pub fn run() -> Result<()> {
    let root = workspace_dir();
    let mut wrong = Vec::new();
    let mut files = Vec::new();
    collect(&root, &mut files)?;
    for path in &files {
        let shown = path.strip_prefix(&root).unwrap_or(path);
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("rs") => check_source(shown, &read(path)?, &mut wrong),
            Some("md" | "toml" | "proto" | "sh") => check_text(shown, &read(path)?, &mut wrong),
            _ => {}
        }
    }
    check_documents(&root, &mut wrong)?;
    check_members(&root, &mut wrong)?;
    if !wrong.is_empty() {
        bail!("{}", wrong.join("\n"));
    }
    Ok(())
}

fn read(path: &Path) -> Result<String> {
    fs::read_to_string(path).with_context(|| format!("read {}", path.display()))
}

/// All files but what is generated or git's.
fn collect(dir: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("read {}", dir.display()))? {
        let entry = entry?;
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            if !matches!(entry.file_name().to_str(), Some("target" | ".git")) {
                collect(&path, files)?;
            }
        } else {
            files.push(path);
        }
    }
    Ok(())
}

fn check_source(path: &Path, text: &str, wrong: &mut Vec<String>) {
    check_text(path, text, wrong);
    let lines = text.lines().count();
    if lines > FILE_LINES_MAX {
        wrong.push(format!("{}: {lines} lines, at most {FILE_LINES_MAX}: split it by role", path.display()));
    }
    for (number, line) in text.lines().enumerate() {
        for (start, end, why) in BANNED {
            if line.contains(&[start, end].concat()) {
                wrong.push(format!("{}:{}: `{start}{end}`: {why}", path.display(), number + 1));
            }
        }
    }
    let is_test = path.components().any(|part| part.as_os_str() == "tests") || path.ends_with("tests.rs");
    let is_root =
        matches!(path.file_name().and_then(|name| name.to_str()), Some("lib.rs" | "mod.rs" | "main.rs"));
    if is_root && !is_test && !text.starts_with("//!") {
        wrong.push(format!("{}: starts without `//!`: say what the module is for", path.display()));
    }
    // The places of the tests that may wait by time: the loop that everything else uses, and the clock of a simulation.
    let waits = ["tests/src/wait.rs", "consensus/tests/runtime.rs"].iter().any(|file| path.ends_with(file));
    if is_test && text.contains("sleep(") && !waits {
        wrong.push(format!("{}: sleeps: wait for a condition instead", path.display()));
    }
}

fn check_text(path: &Path, text: &str, wrong: &mut Vec<String>) {
    for (number, line) in text.lines().enumerate() {
        if line.ends_with([' ', '\t']) {
            wrong.push(format!("{}:{}: blanks at the end of the line", path.display(), number + 1));
        }
    }
    if !text.is_empty() && !text.ends_with('\n') {
        wrong.push(format!("{}: no line feed at the end", path.display()));
    }
}

/// What a newcomer reads first exists and is of a size that is read.
fn check_documents(root: &Path, wrong: &mut Vec<String>) -> Result<()> {
    for name in ["README.md", "ARCHITECTURE.md", "CHANGELOG.md", "chaos/README.md", "storage/SAFETY.md"] {
        if !root.join(name).is_file() {
            wrong.push(format!("{name} is missing"));
        }
    }
    let lines = read(&root.join("ARCHITECTURE.md"))?.lines().count();
    if lines > ARCHITECTURE_LINES_MAX {
        wrong.push(format!("ARCHITECTURE.md: {lines} lines, at most {ARCHITECTURE_LINES_MAX}"));
    }
    let mut numbers = Vec::new();
    for entry in fs::read_dir(root.join("docs/adr"))? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        match name.split_once('-').map(|(number, _)| number) {
            Some(number) if number.len() == 4 && number.bytes().all(|b| b.is_ascii_digit()) => {
                numbers.push(number.to_owned());
            }
            _ => wrong.push(format!("docs/adr/{name}: not of the form NNNN-title.md")),
        }
    }
    numbers.sort_unstable();
    for pair in numbers.windows(2).filter(|pair| pair[0] == pair[1]) {
        wrong.push(format!("docs/adr: number {} is used twice", pair[0]));
    }
    Ok(())
}

/// Every member of the workspace takes the workspace's lints and stands in the code map.
fn check_members(root: &Path, wrong: &mut Vec<String>) -> Result<()> {
    let architecture = read(&root.join("ARCHITECTURE.md"))?;
    let manifest = read(&root.join("Cargo.toml"))?;
    let members = manifest.lines().find_map(|line| line.strip_prefix("members = "));
    let members = members.context("Cargo.toml has a line `members = […]`")?;
    for member in members.split(['[', ']', ',', '"', ' ']).filter(|word| !word.is_empty()) {
        if !read(&root.join(member).join("Cargo.toml"))?.contains("[lints]\nworkspace = true") {
            wrong.push(format!("{member}/Cargo.toml: does not take the workspace's lints"));
        }
        if !architecture.contains(&format!("`{member}/`")) {
            wrong.push(format!("ARCHITECTURE.md: the code map lacks `{member}/`"));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(path: &str, text: &str) -> Vec<String> {
        let mut wrong = Vec::new();
        check_source(Path::new(path), text, &mut wrong);
        wrong
    }

    #[test]
    fn each_rule_finds_what_breaks_it() {
        assert!(found("a/src/lib.rs", "//! Fine.\nfn a() {}\n").is_empty());
        assert_eq!(found("a/src/lib.rs", "fn a() {}\n").len(), 1, "no module documentation");
        assert_eq!(found("a/src/b.rs", &"x\n".repeat(FILE_LINES_MAX + 1)).len(), 1, "too long");
        assert_eq!(found("a/src/b.rs", "x \n").len(), 1, "blanks at the end");
        assert_eq!(found("a/src/b.rs", "x").len(), 1, "no line feed");
        assert_eq!(found("a/tests/b.rs", "sleep(x);\n").len(), 1, "a sleeping test");
        for (start, end, _) in BANNED {
            assert_eq!(found("a/src/b.rs", &format!("{start}{end}\n")).len(), 1, "{start}{end}");
        }
    }
}
