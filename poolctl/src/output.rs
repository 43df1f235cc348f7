//! How results and failures are written.
//!
//! JSON is a promise: objects carry `apiVersion` and `kind`, lists carry `items`, fields are only ever added.

use clap::ValueEnum;
use comfy_table::{ContentArrangement, Table, presets};
use serde::Serialize;
use std::{
    io::{self, IsTerminal as _, Write},
    process::ExitCode,
};

use crate::failure::{Exit, Failure};

/// Version of all JSON and YAML.
const API_VERSION: &str = "pool/v1";

/// Form of a result.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Format {
    /// Columns for people
    #[default]
    Table,
    /// More columns
    Wide,
    /// For programs
    Json,
    /// For programs, too
    Yaml,
    /// Names alone, one a line
    Name,
}

/// An object that can be shown.
pub trait Object: Serialize {
    /// Its kind in JSON; a list's is this and `List`.
    const KIND: &'static str;
    /// Columns of a table.
    const COLUMNS: &'static [&'static str];
    /// Columns that `wide` adds.
    const WIDE: &'static [&'static str];
    /// What `-o name` prints.
    fn name(&self) -> String;
    /// The cells of all columns, those of `WIDE` last.
    fn cells(&self) -> Vec<String>;
}

#[derive(Serialize)]
struct One<'a, T> {
    #[serde(rename = "apiVersion")]
    api_version: &'static str,
    kind: &'static str,
    #[serde(flatten)]
    object: &'a T,
}

#[derive(Serialize)]
struct Many<'a, T> {
    #[serde(rename = "apiVersion")]
    api_version: &'static str,
    kind: String,
    revision: u64,
    items: &'a [T],
}

/// Where results go.
pub struct Output<W: Write> {
    writer: W,
    format: Format,
}

impl Output<io::Stdout> {
    /// Results go to standard output.
    #[must_use]
    pub fn new(format: Format) -> Self {
        Self { writer: io::stdout(), format }
    }
}

impl<W: Write> Output<W> {
    /// The form asked for.
    pub fn format(&self) -> Format {
        self.format
    }

    /// One object, all that is known of it.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn show<T: Object>(&mut self, object: &T) -> Result<(), Failure> {
        let text = match self.format {
            Format::Table | Format::Wide => vertical(object),
            Format::Json => json(&one(object))?,
            Format::Yaml => yaml(&one(object))?,
            Format::Name => format!("{}\n", object.name()),
        };
        self.write(&text)
    }

    /// A list.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn list<T: Object>(&mut self, revision: u64, items: &[T]) -> Result<(), Failure> {
        let many = || Many { api_version: API_VERSION, kind: format!("{}List", T::KIND), revision, items };
        let text = match self.format {
            Format::Table => table(items, false),
            Format::Wide => table(items, true),
            Format::Json => json(&many())?,
            Format::Yaml => yaml(&many())?,
            Format::Name => items.iter().map(|item| item.name() + "\n").collect(),
        };
        self.write(&text)
    }

    /// What became of an object: a sentence for people, the object for programs.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn changed<T: Object>(&mut self, object: &T, sentence: &str) -> Result<(), Failure> {
        match self.format {
            Format::Table | Format::Wide => self.write(&format!("{sentence}\n")),
            Format::Json | Format::Yaml | Format::Name => self.show(object),
        }
    }

    /// One of a series: a line of text, a line of JSON, or a YAML document.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn stream<T: Object>(&mut self, object: &T) -> Result<(), Failure> {
        let text = match self.format {
            Format::Table => object.cells()[..T::COLUMNS.len()].join("  ") + "\n",
            Format::Wide => object.cells().join("  ") + "\n",
            Format::Json => json_line(&one(object))?,
            Format::Yaml => format!("---\n{}", yaml(&one(object))?),
            Format::Name => format!("{}\n", object.name()),
        };
        self.write(&text)
    }

    /// One list of a series.
    ///
    /// # Errors
    /// When it can't be written.
    pub fn stream_list<T: Object>(&mut self, revision: u64, items: &[T]) -> Result<(), Failure> {
        if self.format == Format::Json {
            let kind = format!("{}List", T::KIND);
            let text = json_line(&Many { api_version: API_VERSION, kind, revision, items })?;
            return self.write(&text);
        }
        if self.format == Format::Yaml {
            self.write("---\n")?;
        }
        self.list(revision, items)?;
        if matches!(self.format, Format::Table | Format::Wide) { self.write("\n") } else { Ok(()) }
    }

    /// Bytes as they are.
    ///
    /// # Errors
    /// When they can't be written.
    pub fn raw(&mut self, bytes: &[u8]) -> Result<(), Failure> {
        let written = self.writer.write_all(bytes).and_then(|()| self.writer.flush());
        written.map_err(|error| Failure::local("standard output", error))
    }

    fn write(&mut self, text: &str) -> Result<(), Failure> {
        self.raw(text.as_bytes())
    }
}

fn one<T: Object>(object: &T) -> One<'_, T> {
    One { api_version: API_VERSION, kind: T::KIND, object }
}

fn json(value: &impl Serialize) -> Result<String, Failure> {
    let text = serde_json::to_string_pretty(value);
    text.map(|text| text + "\n").map_err(|error| Failure::local("JSON", error))
}

fn json_line(value: &impl Serialize) -> Result<String, Failure> {
    let text = serde_json::to_string(value);
    text.map(|text| text + "\n").map_err(|error| Failure::local("JSON", error))
}

fn yaml(value: &impl Serialize) -> Result<String, Failure> {
    serde_norway::to_string(value).map_err(|error| Failure::local("YAML", error))
}

/// An empty table without lines, whose columns are as wide as their contents.
fn plain() -> Table {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).set_content_arrangement(ContentArrangement::Disabled);
    table
}

fn table<T: Object>(items: &[T], wide: bool) -> String {
    let mut table = plain();
    let columns = T::COLUMNS.iter().chain(if wide { T::WIDE } else { &[] });
    table.set_header(columns);
    let shown = T::COLUMNS.len() + if wide { T::WIDE.len() } else { 0 };
    for item in items {
        table.add_row(item.cells().into_iter().take(shown));
    }
    trimmed(&table)
}

fn vertical<T: Object>(object: &T) -> String {
    let mut table = plain();
    for (column, cell) in T::COLUMNS.iter().chain(T::WIDE).zip(object.cells()) {
        if !cell.is_empty() {
            table.add_row([(*column).to_owned(), cell]);
        }
    }
    trimmed(&table)
}

/// The table without the blanks that pad its edges.
fn trimmed(table: &Table) -> String {
    table.lines().map(|line| line.strip_prefix(' ').unwrap_or(&line).trim_end().to_owned() + "\n").collect()
}

/// A hint for people; programs that read standard output don't see it.
pub fn hint(text: &str) {
    if io::stderr().is_terminal() {
        writeln!(io::stderr(), "{text}").ok();
    }
}

/// Something that an operator and a script should know although the command has done its work.
pub fn warning(text: &str) {
    writeln!(io::stderr(), "{text}").ok();
}

/// Writes a failure to standard error and gives the exit code.
#[must_use]
pub fn report(failure: &Failure, format: Format) -> ExitCode {
    // A reader of the output that has gone away is no failure worth a message.
    io::stderr().write_all(failure_text(failure, format).as_bytes()).ok();
    ExitCode::from(failure.exit as u8)
}

fn failure_text(failure: &Failure, format: Format) -> String {
    if format == Format::Json {
        let value = serde_json::json!({
            "apiVersion": API_VERSION, "kind": "Error", "reason": failure.reason, "object": failure.object,
            "cause": failure.cause, "remedy": failure.remedy, "exit_code": failure.exit as u8,
        });
        return format!("{value}\n");
    }
    let mut text = match failure.object.as_str() {
        "" => format!("error: {}\n", failure.cause),
        object => format!("error: {object}: {}\n", failure.cause),
    };
    if !failure.remedy.is_empty() {
        text += &format!("  next: {}\n", failure.remedy);
    }
    text
}

/// Writes what the command-line parser says. `--help` and `--version` are results, not failures.
#[must_use]
pub fn report_usage(error: &clap::Error, arguments: impl Iterator<Item = String>) -> ExitCode {
    if error.use_stderr() && wants_json(arguments) {
        let text = error.to_string();
        let cause = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
        let failure = Failure::new(Exit::Usage, "USAGE", "command line", cause).with_remedy("poolctl --help");
        return report(&failure, Format::Json);
    }
    error.print().ok();
    ExitCode::from(if error.use_stderr() { Exit::Usage as u8 } else { 0 })
}

/// Whether a command line that could not be parsed asks for JSON.
fn wants_json(arguments: impl Iterator<Item = String>) -> bool {
    let arguments: Vec<String> = arguments.collect();
    let joined = ["-ojson", "-o=json", "--output=json"];
    arguments.iter().any(|word| joined.contains(&word.as_str()))
        || arguments.windows(2).any(|pair| matches!(pair[0].as_str(), "-o" | "--output") && pair[1] == "json")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Serialize)]
    struct Thing {
        id: &'static str,
        size: u64,
    }

    impl Object for Thing {
        const KIND: &'static str = "Thing";
        const COLUMNS: &'static [&'static str] = &["ID"];
        const WIDE: &'static [&'static str] = &["SIZE"];
        fn name(&self) -> String {
            self.id.to_owned()
        }
        fn cells(&self) -> Vec<String> {
            vec![self.id.to_owned(), self.size.to_string()]
        }
    }

    const THINGS: [Thing; 2] = [Thing { id: "a", size: 1 }, Thing { id: "bcd", size: 22 }];

    fn written(
        format: Format,
        write: impl FnOnce(&mut Output<&mut Vec<u8>>) -> Result<(), Failure>,
    ) -> String {
        let mut bytes = Vec::new();
        write(&mut Output { writer: &mut bytes, format }).unwrap();
        String::from_utf8(bytes).unwrap()
    }

    #[test]
    fn lists_have_a_form_of_each_kind() {
        let list = |format| written(format, |output| output.list(7, &THINGS));
        assert_eq!(list(Format::Name), "a\nbcd\n");
        assert_eq!(list(Format::Table), "ID\na\nbcd\n");
        assert_eq!(list(Format::Wide), "ID   SIZE\na    1\nbcd  22\n");
        let json: serde_json::Value = serde_json::from_str(&list(Format::Json)).unwrap();
        assert_eq!(
            json,
            serde_json::json!({"apiVersion": "pool/v1", "kind": "ThingList", "revision": 7,
                "items": [{"id": "a", "size": 1}, {"id": "bcd", "size": 22}]})
        );
        assert_eq!(
            list(Format::Yaml),
            "apiVersion: pool/v1\nkind: ThingList\nrevision: 7\nitems:\n- id: a\n  size: 1\n- id: bcd\n  size: 22\n"
        );
    }

    #[test]
    fn an_object_carries_version_and_kind() {
        let text = written(Format::Json, |output| output.stream(&THINGS[0]));
        assert_eq!(text, "{\"apiVersion\":\"pool/v1\",\"kind\":\"Thing\",\"id\":\"a\",\"size\":1}\n");
        assert_eq!(written(Format::Table, |output| output.show(&THINGS[0])), "ID    a\nSIZE  1\n");
        assert_eq!(written(Format::Table, |output| output.changed(&THINGS[0], "made a")), "made a\n");
    }

    #[test]
    fn a_failure_names_object_cause_and_remedy() {
        let failure = Failure::new(Exit::Blocked, "VM_IS_MIGRATING", "vm a", "it moves")
            .with_remedy("poolctl migration list");
        assert_eq!(
            failure_text(&failure, Format::Table),
            "error: vm a: it moves\n  next: poolctl migration list\n"
        );
        let json: serde_json::Value = serde_json::from_str(&failure_text(&failure, Format::Json)).unwrap();
        assert_eq!((&json["kind"], &json["exit_code"]), (&"Error".into(), &4.into()));
        assert_eq!(json["reason"], "VM_IS_MIGRATING");
    }

    #[test]
    fn json_is_recognised_in_a_command_line_that_is_wrong() {
        let wants = |line: &str| wants_json(line.split(' ').map(ToOwned::to_owned));
        assert!(wants("poolctl fly -o json"));
        assert!(wants("poolctl --output=json fly"));
        assert!(!wants("poolctl json -o table"));
    }
}
