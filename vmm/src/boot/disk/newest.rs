//! The newest kernel of a folder, and the initrd that belongs to it.

use super::DiskBootError;
use super::files::FileSystem;
use super::menu::MenuEntry;
use std::cmp::Ordering;

/// How kernels are named, with the version behind it.
const KERNELS: [&str; 2] = ["vmlinuz-", "linux-"];

/// How initrds are named around the version: Debian and Ubuntu, Fedora, openSUSE and Arch.
const INITRDS: [(&str, &str); 4] =
    [("initrd.img-", ""), ("initramfs-", ".img"), ("initrd-", ""), ("initramfs-", "")];

/// Kernels that are no choice for a normal start.
const NOT: [&str; 2] = ["rescue", "kdump"];

/// The newest kernel without its command line; `None` if there is none.
pub fn entry(system: &FileSystem) -> Result<Option<MenuEntry>, DiskBootError> {
    for folder in ["/boot", ""] {
        let names = system.names(folder)?;
        let mut kernels: Vec<(&str, &str)> = Vec::new();
        for name in names.iter().filter(|name| !NOT.iter().any(|not| name.contains(not))) {
            kernels.extend(KERNELS.iter().filter_map(|kind| Some((name.as_str(), name.strip_prefix(kind)?))));
        }
        kernels.sort_by(|a, b| compare(b.1, a.1));
        for (name, version) in kernels {
            let kernel = format!("{folder}/{name}");
            if !system.has_file(&kernel)? {
                continue;
            }
            let of_version = INITRDS.map(|(before, after)| format!("{before}{version}{after}"));
            let initrd = of_version.iter().find(|initrd| names.contains(initrd));
            let initrds = initrd.map(|initrd| format!("{folder}/{initrd}")).into_iter().collect();
            return Ok(Some(MenuEntry { title: name.to_owned(), kernel, initrds, ..MenuEntry::default() }));
        }
    }
    Ok(None)
}

/// Orders versions: numbers by their value, everything else by its letters.
pub fn compare(a: &str, b: &str) -> Ordering {
    let (mut a, mut b) = (a, b);
    loop {
        match (a.is_empty(), b.is_empty()) {
            (true, true) => return Ordering::Equal,
            (true, false) => return Ordering::Less,
            (false, true) => return Ordering::Greater,
            (false, false) => {}
        }
        let ((text_a, rest_a), (text_b, rest_b)) =
            (split(a, |c| !c.is_ascii_digit()), split(b, |c| !c.is_ascii_digit()));
        let ((number_a, rest_a), (number_b, rest_b)) =
            (split(rest_a, |c| c.is_ascii_digit()), split(rest_b, |c| c.is_ascii_digit()));
        let (number_a, number_b) = (number_a.trim_start_matches('0'), number_b.trim_start_matches('0'));
        let numbers = number_a.len().cmp(&number_b.len()).then_with(|| number_a.cmp(number_b));
        let order = text_a.cmp(text_b).then(numbers);
        if order != Ordering::Equal {
            return order;
        }
        (a, b) = (rest_a, rest_b);
    }
}

fn split(text: &str, is_first: impl Fn(char) -> bool) -> (&str, &str) {
    text.split_at(text.find(|letter| !is_first(letter)).unwrap_or(text.len()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_ordered_by_their_numbers() {
        let ordered =
            ["5.10.0-30-amd64", "6.1.0-9-amd64", "6.1.0-10-amd64", "6.1.0-010-arm", "6.8", "6.8.1", "6.12.3"];
        for (index, older) in ordered.iter().enumerate() {
            assert_eq!(compare(older, older), Ordering::Equal);
            for newer in &ordered[index + 1..] {
                assert_eq!(compare(older, newer), Ordering::Less, "{older} {newer}");
                assert_eq!(compare(newer, older), Ordering::Greater, "{newer} {older}");
            }
        }
    }
}
