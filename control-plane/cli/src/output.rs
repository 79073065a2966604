//! What the commands print: tables for people, JSON for programs, failures for both.
//!
//! Owns the look of a table and the exit codes. A reader that goes away (`| head`) is no error.

use std::fmt::Write as _;
use std::io::Write as _;
use std::process::ExitCode;

use clap::ValueEnum;
use serde_json::{Value, json};

/// The exit code when there are errors in what was asked about.
pub(crate) const ERRORS: u8 = 1;
/// The exit code when something cannot be read or reached.
pub(crate) const UNUSABLE: u8 = 2;

/// How answers are printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// For people
    Table,
    /// For programs
    Json,
}

/// Why a command ends without an answer.
#[derive(Debug)]
pub(crate) struct Failure {
    /// One sentence, and what to do.
    pub(crate) message: String,
    code: u8,
    /// What is known nevertheless, for programs.
    value: Option<Value>,
}

impl Failure {
    /// What was asked about is wrong or not there.
    pub(crate) fn errors(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            code: ERRORS,
            value: None,
        }
    }

    /// Something cannot be read or reached.
    pub(crate) fn unusable(message: impl Into<String>) -> Self {
        Self {
            message: message.into(),
            code: UNUSABLE,
            value: None,
        }
    }

    /// What is known nevertheless: an object, which programs get with the error in it.
    pub(crate) fn with(mut self, value: Value) -> Self {
        self.value = Some(value);
        self
    }

    /// Says it on standard error, and to programs also on standard output.
    pub(crate) fn tell(self, format: Format) -> ExitCode {
        eprintln!("outrigger: {}", self.message);
        let code = ExitCode::from(self.code);
        if format == Format::Json {
            print_json(&self.json());
        }
        code
    }

    /// `{"error": …}` beside what is known.
    fn json(self) -> Value {
        let mut value = self.value.unwrap_or_else(|| json!({}));
        value["error"] = self.message.into();
        value
    }
}

/// Prints to standard output.
pub(crate) fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

/// Prints a value as JSON.
pub(crate) fn print_json(value: &Value) {
    print(&format!("{value:#}\n"));
}

/// Prints the value as JSON, or else what `table` makes of it.
pub(crate) fn print_as(format: Format, value: &Value, table: impl FnOnce(&Value) -> String) {
    match format {
        Format::Json => print_json(value),
        Format::Table => print(&table(value)),
    }
}

/// Rows under headings, in columns as wide as their widest cell.
pub(crate) fn table(headings: &[&str], rows: &[Vec<String>]) -> String {
    let width = |at: usize| {
        let cells = rows.iter().filter_map(|row| row.get(at));
        let widest = cells.map(|cell| cell.chars().count()).max().unwrap_or(0);
        widest.max(headings[at].chars().count())
    };
    let widths: Vec<usize> = (0..headings.len()).map(width).collect();
    let mut text = String::new();
    let mut line = |cells: &mut dyn Iterator<Item = &str>| {
        let mut made = String::new();
        for (cell, width) in cells.zip(&widths) {
            let _ = write!(made, "{cell:width$}  ");
        }
        let _ = writeln!(text, "{}", made.trim_end());
    };
    line(&mut headings.iter().copied());
    for row in rows {
        line(&mut row.iter().map(|cell| plain(cell)));
    }
    text
}

/// A cell without what would move a terminal's cursor: cells hold what others sent.
fn plain(cell: &str) -> &str {
    let end = cell.find(char::is_control).unwrap_or(cell.len());
    &cell[..end]
}

/// A JSON value as a cell; nothing is `-`.
pub(crate) fn cell(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) if text.is_empty() => "-".to_owned(),
        Value::String(text) => text.clone(),
        Value::Number(number) if number.is_f64() => {
            format!("{:.1}", number.as_f64().unwrap_or_default())
        }
        Value::Bool(true) => "yes".to_owned(),
        Value::Bool(false) => "no".to_owned(),
        other => other.to_string(),
    }
}

/// The items of a list, or none.
pub(crate) fn items(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failure_is_one_object_for_programs() {
        let bare = Failure::errors("no").json();
        assert_eq!(bare, json!({"error": "no"}));
        let known = Failure::errors("no").with(json!({"a": 1})).json();
        assert_eq!(known, json!({"a": 1, "error": "no"}));
    }

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let rows = [
            vec!["orders".to_owned(), "1".to_owned()],
            vec!["é".to_owned(), "22".to_owned()],
        ];
        assert_eq!(
            table(&["NAME", "N"], &rows),
            "NAME    N\norders  1\né       22\n"
        );
    }

    #[test]
    fn a_cell_cannot_move_the_cursor() {
        assert_eq!(table(&["A"], &[vec!["x\u{1b}[2J".to_owned()]]), "A\nx\n");
    }

    #[test]
    fn values_become_cells() {
        let check = |value: Value, expected: &str| assert_eq!(cell(&value), expected);
        check(Value::Null, "-");
        check(json!("a"), "a");
        check(json!(1.25), "1.2");
        check(json!(3), "3");
        check(json!(true), "yes");
    }
}
