//! What is wrong with a config, and how it is told to people, programs and code review.
//!
//! Owns [`Problem`] and the three renderings. Finds nothing itself.

use std::fmt::Write;

use serde::Serialize;

/// Whether a problem stops the config from being used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The config is refused.
    Error,
    /// The config is used.
    Warning,
}

/// One problem at one place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// Whether it stops the config from being used.
    pub severity: Severity,
    /// The stable code: `E…` for an error, `W…` for a warning.
    pub code: &'static str,
    /// The source as it was named to `load`.
    pub file: String,
    /// The line, from 1.
    pub line: usize,
    /// The column in characters, from 1.
    pub column: usize,
    /// The path of the key within the document, for example `spec.rules[0].timeouts.perTri`.
    pub path: String,
    /// What is wrong.
    pub message: String,
    /// What to write instead.
    pub help: Option<String>,
}

/// All problems of one load, by file and line.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Report {
    /// How many documents were read.
    pub documents: usize,
    /// The problems.
    pub problems: Vec<Problem>,
}

impl Report {
    /// Whether the config is refused.
    pub fn has_errors(&self) -> bool {
        self.errors() > 0
    }

    /// How many errors there are.
    pub fn errors(&self) -> usize {
        self.count(Severity::Error)
    }

    /// How many warnings there are.
    pub fn warnings(&self) -> usize {
        self.count(Severity::Warning)
    }

    fn count(&self, severity: Severity) -> usize {
        self.problems
            .iter()
            .filter(|problem| problem.severity == severity)
            .count()
    }

    /// One line: `3 documents, 2 errors, 1 warning`.
    pub fn summary(&self) -> String {
        let counted = |count: usize, what: &str| {
            let plural = if count == 1 { "" } else { "s" };
            format!("{count} {what}{plural}")
        };
        format!(
            "{}, {}, {}",
            counted(self.documents, "document"),
            counted(self.errors(), "error"),
            counted(self.warnings(), "warning")
        )
    }

    /// One line a problem, for people: `file:line:column: error[E103] path: message; help`.
    pub fn render_text(&self) -> String {
        let mut out = String::new();
        for problem in &self.problems {
            let _ = writeln!(out, "{problem}");
        }
        out
    }

    /// One JSON object with `documents`, `errors`, `warnings` and `problems`, for programs.
    pub fn render_json(&self) -> String {
        let value = serde_json::json!({
            "documents": self.documents,
            "errors": self.errors(),
            "warnings": self.warnings(),
            "problems": self.problems,
        });
        format!("{value:#}\n")
    }

    /// One workflow command a problem, which code review shows beside the line.
    pub fn render_github(&self) -> String {
        let mut out = String::new();
        for problem in &self.problems {
            let level = match problem.severity {
                Severity::Error => "error",
                Severity::Warning => "warning",
            };
            let _ = writeln!(
                out,
                "::{level} file={},line={},col={},title={}::{}",
                escape_property(&problem.file),
                problem.line,
                problem.column,
                problem.code,
                escape_data(&problem.text())
            );
        }
        out
    }

    pub(crate) fn sort(&mut self) {
        self.problems.sort_by(|a, b| {
            let key = |p: &Problem| (p.line, p.column, p.severity, p.code);
            a.file.cmp(&b.file).then_with(|| key(a).cmp(&key(b)))
        });
        self.problems.dedup();
    }
}

impl Problem {
    /// The path, the message and the help, without the place.
    pub fn text(&self) -> String {
        let mut out = String::new();
        if !self.path.is_empty() {
            out.push_str(&self.path);
            out.push_str(": ");
        }
        out.push_str(&self.message);
        if let Some(help) = &self.help {
            out.push_str("; ");
            out.push_str(help);
        }
        out
    }
}

impl std::fmt::Display for Problem {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let severity = match self.severity {
            Severity::Error => "error",
            Severity::Warning => "warning",
        };
        let Self {
            code,
            file,
            line,
            column,
            ..
        } = self;
        write!(
            f,
            "{file}:{line}:{column}: {severity}[{code}] {}",
            self.text()
        )
    }
}

fn escape_data(text: &str) -> String {
    text.replace('%', "%25")
        .replace('\r', "%0D")
        .replace('\n', "%0A")
}

fn escape_property(text: &str) -> String {
    escape_data(text).replace(':', "%3A").replace(',', "%2C")
}
