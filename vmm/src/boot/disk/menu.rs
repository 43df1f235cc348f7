//! What a boot menu says: GRUB's `grub.cfg` as `grub-mkconfig` writes it, and entries of the boot loader specification
//! (Fedora, openSUSE). Not a shell: conditions are not evaluated, variables are those that are set to a plain word.

use std::collections::BTreeMap;

/// Entries of one menu that are looked at: hundreds of kernels, not a file of nothing else.
const ENTRIES_MAX: usize = 512;

/// One way to boot.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct MenuEntry {
    pub title: String,
    /// GRUB's `--id`, or the name of the file.
    pub id: String,
    /// As the menu names it, from the root of its own file system.
    pub kernel: String,
    /// Loaded one behind the other.
    pub initrds: Vec<String>,
    pub arguments: String,
}

/// The entries of a `grub.cfg`, with the chosen one first. `saved` is the entry that the environment block names.
pub fn grub(text: &str, saved: Option<&str>) -> Vec<MenuEntry> {
    let mut parser = Parser::default();
    for line in text.lines() {
        parser.line(line);
        if parser.entries.len() > ENTRIES_MAX {
            break;
        }
    }
    let mut entries = parser.entries;
    if let Some(at) = chosen(&entries, &parser.default, saved) {
        let first = entries.remove(at);
        entries.insert(0, first);
    }
    // The outer entry of a submenu and those that load another loader name no kernel.
    entries.retain(|entry| !entry.kernel.is_empty());
    entries
}

/// An entry of the boot loader specification; `variables` are those of the environment block.
pub fn loader_entry(name: &str, text: &str, variables: &BTreeMap<String, String>) -> Option<MenuEntry> {
    let mut entry = MenuEntry { id: name.to_owned(), ..MenuEntry::default() };
    for line in text.lines() {
        let line = line.trim();
        let (key, value) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let value = expand(value.trim(), variables);
        match key {
            "title" => entry.title = value,
            "linux" => entry.kernel = value,
            "initrd" => entry.initrds.extend(value.split_whitespace().map(str::to_owned)),
            "options" => entry.arguments = join(&entry.arguments, &value),
            _ => {}
        }
    }
    (!entry.kernel.is_empty()).then_some(entry)
}

/// GRUB's environment block: `name=value` lines in a file of fixed size.
pub fn environment(text: &str) -> BTreeMap<String, String> {
    let lines = text.lines().filter(|line| !line.starts_with('#'));
    lines
        .filter_map(|line| line.split_once('='))
        .map(|(name, value)| (name.to_owned(), value.to_owned()))
        .collect()
}

/// The default is a position, a title or an id; of a submenu (`1>2`) only the entry itself is looked for.
fn chosen(entries: &[MenuEntry], default: &str, saved: Option<&str>) -> Option<usize> {
    let wanted = match default {
        "" | "saved" => saved?,
        default => default,
    };
    let wanted = wanted.rsplit('>').next().unwrap_or(wanted);
    let named = entries.iter().position(|entry| entry.title == wanted || entry.id == wanted);
    named.or_else(|| wanted.parse().ok().filter(|at| *at < entries.len()))
}

#[derive(Default)]
struct Parser {
    entries: Vec<MenuEntry>,
    variables: BTreeMap<String, String>,
    default: String,
    /// Depth of braces at which the entry that is being read ends.
    inside: Option<u32>,
    depth: u32,
}

impl Parser {
    fn line(&mut self, line: &str) {
        let words = words(line, &self.variables);
        let Some((command, rest)) = words.split_first() else { return };
        match command.as_str() {
            "menuentry" => {
                self.inside = Some(self.depth);
                self.entries.push(MenuEntry {
                    title: rest.first().cloned().unwrap_or_default(),
                    id: id_of(rest),
                    ..MenuEntry::default()
                });
            }
            "set" => self.set(rest),
            _ if self.inside.is_some() => self.in_entry(command, rest),
            _ => {}
        }
        for word in &words {
            match word.as_str() {
                "{" => self.depth += 1,
                "}" => {
                    self.depth = self.depth.saturating_sub(1);
                    if self.inside.is_some_and(|depth| depth >= self.depth) {
                        self.inside = None;
                    }
                }
                _ => {}
            }
        }
    }

    fn set(&mut self, rest: &[String]) {
        let Some((name, value)) = rest.first().and_then(|word| word.split_once('=')) else { return };
        match (name, value) {
            // `grub-mkconfig` writes both branches of "if there is a next entry"; the one with a word is the usual one.
            ("default", "") => {}
            ("default", value) => value.clone_into(&mut self.default),
            // The root of paths: everything is looked for where the menu is.
            ("root" | "prefix", _) => {}
            (name, value) => drop(self.variables.insert(name.to_owned(), value.to_owned())),
        }
    }

    fn in_entry(&mut self, command: &str, rest: &[String]) {
        let Some(entry) = self.entries.last_mut() else { return };
        match (command, rest.split_first()) {
            ("linux" | "linux16" | "linuxefi", Some((kernel, arguments))) if entry.kernel.is_empty() => {
                without_device(kernel).clone_into(&mut entry.kernel);
                entry.arguments = arguments.join(" ");
            }
            ("initrd" | "initrd16" | "initrdefi", Some(_)) if entry.initrds.is_empty() => {
                entry.initrds = rest.iter().map(|path| without_device(path).to_owned()).collect();
            }
            _ => {}
        }
    }
}

/// `(hd0,gpt1)/boot/vmlinuz` without the device.
fn without_device(path: &str) -> &str {
    path.strip_prefix('(').and_then(|rest| rest.split_once(')')).map_or(path, |(_, path)| path)
}

fn id_of(words: &[String]) -> String {
    let after = |name: &str| words.iter().position(|word| word == name).and_then(|at| words.get(at + 1));
    // Debian writes `$menuentry_id_option`, which is `--id` and which nothing in the file sets.
    let id = after("--id").or_else(|| words.iter().find(|word| word.starts_with("gnulinux-")));
    id.cloned().unwrap_or_default()
}

/// Splits a line as a shell does: quotes, a comment, variables outside of single quotes.
fn words(line: &str, variables: &BTreeMap<String, String>) -> Vec<String> {
    let mut words = Vec::new();
    let mut word = String::new();
    let mut quote = None;
    let mut is_open = false;
    let mut rest = line;
    while let Some(next) = rest.chars().next() {
        rest = &rest[next.len_utf8()..];
        match (next, quote) {
            (next, Some(end)) if next == end => quote = None,
            ('\'' | '"', None) => {
                quote = Some(next);
                is_open = true;
            }
            ('\\', None | Some('"')) => {
                if let Some(escaped) = rest.chars().next() {
                    word.push(escaped);
                    is_open = true;
                    rest = &rest[escaped.len_utf8()..];
                }
            }
            ('$', None | Some('"')) => {
                let (value, len) = variable(rest, variables);
                word.push_str(value);
                rest = &rest[len..];
            }
            ('#', None) if !is_open && word.is_empty() => break,
            (' ' | '\t' | ';', None) => {
                if is_open || !word.is_empty() {
                    words.push(std::mem::take(&mut word));
                }
                is_open = false;
            }
            (next, _) => word.push(next),
        }
    }
    if is_open || !word.is_empty() {
        words.push(word);
    }
    words
}

/// The value of the variable that `text` begins with, and the length of its name as it is written.
fn variable<'a>(text: &str, variables: &'a BTreeMap<String, String>) -> (&'a str, usize) {
    let (name, len) = match text.strip_prefix('{').and_then(|inner| inner.split_once('}')) {
        Some((name, _)) => (name, name.len() + 2),
        None => {
            let is_name = |letter: char| letter.is_ascii_alphanumeric() || letter == '_';
            let len = text.find(|letter| !is_name(letter)).unwrap_or(text.len());
            (&text[..len], len)
        }
    };
    (variables.get(name).map_or("", String::as_str), len)
}

fn expand(text: &str, variables: &BTreeMap<String, String>) -> String {
    words(text, variables).join(" ")
}

fn join(before: &str, more: &str) -> String {
    if before.is_empty() { more.to_owned() } else { format!("{before} {more}") }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The shape of what Debian's `update-grub` writes.
    const DEBIAN: &str = r#"
if [ -s $prefix/grubenv ]; then
  set have_grubenv=true
  load_env
fi
if [ "${next_entry}" ] ; then
   set default="${next_entry}"
else
   set default="0"
fi
function load_video {
  insmod all_video
}
# menuentry 'commented out' {
menuentry 'Debian GNU/Linux' --class debian --class os $menuentry_id_option 'gnulinux-simple-5d1b' {
	load_video
	if [ x$grub_platform = xxen ]; then insmod xzio; insmod lzopio; fi
	search --no-floppy --fs-uuid --set=root 5d1b
	echo	'Loading Linux 6.1.0-2-cloud-amd64 ...'
	linux	/boot/vmlinuz-6.1.0-2-cloud-amd64 root=UUID=5d1b ro console=tty0 console=ttyS0,115200
	echo	'Loading initial ramdisk ...'
	initrd	/boot/initrd.img-6.1.0-2-cloud-amd64
}
submenu 'Advanced options for Debian GNU/Linux' $menuentry_id_option 'gnulinux-advanced-5d1b' {
	menuentry 'Debian GNU/Linux, with Linux 6.1.0-1-cloud-amd64' --class debian $menuentry_id_option 'gnulinux-6.1.0-1' {
		linux	/boot/vmlinuz-6.1.0-1-cloud-amd64 root=UUID=5d1b ro
		initrd	/boot/early.cpio /boot/initrd.img-6.1.0-1-cloud-amd64
	}
}
"#;

    #[test]
    fn the_menu_of_debian_is_read() {
        let entries = grub(DEBIAN, None);
        assert_eq!(entries.len(), 2);
        assert_eq!(entries[0].title, "Debian GNU/Linux");
        assert_eq!(entries[0].kernel, "/boot/vmlinuz-6.1.0-2-cloud-amd64");
        assert_eq!(entries[0].initrds, ["/boot/initrd.img-6.1.0-2-cloud-amd64"]);
        assert_eq!(entries[0].arguments, "root=UUID=5d1b ro console=tty0 console=ttyS0,115200");
        assert_eq!(entries[1].initrds.len(), 2);
        assert_eq!(entries[1].id, "gnulinux-6.1.0-1");
    }

    #[test]
    fn the_default_is_a_position_a_title_an_id_or_the_saved_one() {
        let with = |default: &str| DEBIAN.replace("\"0\"", default);
        let first = |text: &str, saved| grub(text, saved)[0].kernel.clone();
        let old = "/boot/vmlinuz-6.1.0-1-cloud-amd64";
        assert_eq!(first(&with("1"), None), old);
        assert_eq!(first(&with("'Debian GNU/Linux, with Linux 6.1.0-1-cloud-amd64'"), None), old);
        assert_eq!(first(&with("\"gnulinux-advanced-5d1b>gnulinux-6.1.0-1\""), None), old);
        assert_eq!(first(&with("\"${saved_entry}\""), Some("gnulinux-6.1.0-1")), old);
        assert_ne!(first(&with("7"), None), old);
    }

    #[test]
    fn variables_and_devices_are_resolved() {
        let text =
            "set args=\"quiet splash\"\nmenuentry a {\n linux (hd0,gpt1)/vmlinuz ro $args ${missing}x\n}\n";
        let entries = grub(text, None);
        assert_eq!(entries[0].kernel, "/vmlinuz");
        assert_eq!(entries[0].arguments, "ro quiet splash x");
    }

    #[test]
    fn entries_of_the_loader_specification_are_read() {
        let variables =
            environment("# GRUB Environment Block\nkernelopts=root=UUID=7 ro\nsaved_entry=a\n####");
        let text = "title Fedora (6.8)\nversion 6.8\nlinux /vmlinuz-6.8\ninitrd /initramfs-6.8.img $tuned_initrd\noptions $kernelopts quiet\n";
        let entry = loader_entry("a", text, &variables).unwrap();
        assert_eq!(entry.arguments, "root=UUID=7 ro quiet");
        assert_eq!(
            (entry.kernel.as_str(), entry.initrds),
            ("/vmlinuz-6.8", vec!["/initramfs-6.8.img".to_owned()])
        );
        assert_eq!(variables["saved_entry"], "a");
        assert_eq!(loader_entry("b", "title nothing", &variables), None);
    }

    #[test]
    fn no_text_is_too_strange() {
        for text in
            ["menuentry", "}}}}", "menuentry {\nlinux", "\"", "\\", "$", "${", "menuentry 'x' { linux /a }\n"]
        {
            drop(grub(text, Some("x")));
        }
        let many = "menuentry a {\n linux /k\n}\n".repeat(ENTRIES_MAX * 3);
        assert!(grub(&many, None).len() <= ENTRIES_MAX + 1);
    }
}
