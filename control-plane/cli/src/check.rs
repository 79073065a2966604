//! `outrigger check`: everything that is wrong with config files, before anything runs.
//!
//! All mesh documents of all paths are one config, as a sidecar would load it. A bootstrap file is
//! told by its top-level keys and checked as what it is.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use outrigger_config::{Report, Source, bootstrap, load, read_sources};

use crate::output::{self, ERRORS, Format, UNUSABLE};

/// What to check.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Files or directories with mesh config, bootstrap files, or - for standard input
    #[arg(required = true, value_name = "PATH")]
    paths: Vec<PathBuf>,
    /// How problems are printed; default: text, or json with --output json
    #[arg(long, value_enum)]
    format: Option<ProblemFormat>,
    /// Warnings fail, too
    #[arg(long)]
    strict: bool,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ProblemFormat {
    /// file:line:column: error[CODE] path: message
    Text,
    /// One object
    Json,
    /// Workflow commands, shown beside the line in code review
    Github,
}

pub(crate) fn run(options: &Options, output: Format) -> ExitCode {
    let (report, readable) = check(&options.paths);
    let format = options.format.unwrap_or(match output {
        Format::Table => ProblemFormat::Text,
        Format::Json => ProblemFormat::Json,
    });
    match format {
        ProblemFormat::Text => {
            output::print(&format!("{}{}\n", report.render_text(), report.summary()));
        }
        ProblemFormat::Json => output::print(&report.render_json()),
        ProblemFormat::Github => {
            output::print(&format!("{}{}\n", report.render_github(), report.summary()));
        }
    }
    match (
        readable,
        report.has_errors() || options.strict && report.warnings() > 0,
    ) {
        (false, _) => ExitCode::from(UNUSABLE),
        (true, true) => ExitCode::from(ERRORS),
        (true, false) => ExitCode::SUCCESS,
    }
}

/// All problems, and whether every path could be read.
fn check(paths: &[PathBuf]) -> (Report, bool) {
    let mut report = Report::default();
    let mut readable = true;
    let mut mesh = Vec::new();
    let mut bootstraps = 0;
    for path in paths {
        let sources = match read(path) {
            Ok(sources) => sources,
            Err(error) => {
                eprintln!("outrigger: cannot read {}: {error}", path.display());
                readable = false;
                continue;
            }
        };
        // A directory is read as a sidecar reads it: all of it is mesh config.
        let named = !path.is_dir();
        for source in sources {
            match (bootstrap_of(&source.text), named) {
                (Some(Bootstrap::Proxy), true) => {
                    add(&mut report, bootstrap::load_proxy(&source).1);
                }
                (Some(Bootstrap::ControlPlane), true) => {
                    add(&mut report, bootstrap::load_control_plane(&source).1);
                }
                (found, _) => {
                    if found.is_some() {
                        let file = &source.name;
                        eprintln!(
                            "outrigger: {file} looks like a bootstrap file; to check it, name it"
                        );
                    }
                    mesh.push(source);
                    continue;
                }
            }
            bootstraps += 1;
        }
    }
    if !mesh.is_empty() || (readable && bootstraps == 0) {
        add(&mut report, load(&mesh).report);
    }
    (report, readable)
}

fn read(path: &Path) -> std::io::Result<Vec<Source>> {
    if path.as_os_str() != "-" {
        return read_sources(path);
    }
    let mut bytes = Vec::new();
    std::io::stdin().read_to_end(&mut bytes)?;
    Ok(vec![Source::new("stdin", String::from_utf8_lossy(&bytes))])
}

fn add(report: &mut Report, more: Report) {
    report.documents += more.documents;
    report.problems.extend(more.problems);
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bootstrap {
    Proxy,
    ControlPlane,
}

/// Which bootstrap file this is; none: mesh config. By its top-level keys, for a file with a
/// syntax error is to be told what is wrong with what it wants to be.
fn bootstrap_of(text: &str) -> Option<Bootstrap> {
    let key = |name: &str| {
        text.lines().any(|line| {
            let line = line.trim_end().trim_start_matches(['{', '"']);
            line.strip_prefix(name)
                .is_some_and(|rest| rest.trim_start_matches('"').trim_start().starts_with(':'))
        })
    };
    if key("kind") || key("apiVersion") {
        return None;
    }
    if key("workload") {
        return Some(Bootstrap::Proxy);
    }
    let plane = key("config") || key("kubernetes") || key("ca") || text.contains("discovery:");
    key("listen").then_some(match plane {
        true => Bootstrap::ControlPlane,
        false => Bootstrap::Proxy,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_told_by_their_top_level_keys() {
        let check = |text, expected| assert_eq!(bootstrap_of(text), expected, "{text}");
        check("workload: {name: a}\nlisten: {}\n", Some(Bootstrap::Proxy));
        check(
            "listen: {outbound: 127.0.0.1:1}\nmesh: a\n",
            Some(Bootstrap::Proxy),
        );
        check(
            "listen:\n  discovery: 127.0.0.1:1\nconfig: mesh\n",
            Some(Bootstrap::ControlPlane),
        );
        check(
            "apiVersion: a\nkind: MeshService\nspec:\n  listen: 1\n",
            None,
        );
        check("{\"workload\": {\"name\": \"a\"}}", Some(Bootstrap::Proxy));
        check("  workload: nested\n", None);
        check("", None);
    }

    #[test]
    fn mesh_and_bootstrap_are_checked_together() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            std::fs::write(dir.path().join(name), text).unwrap();
            dir.path().join(name)
        };
        let bootstrap = write(
            "proxy.yaml",
            "workload: {name: a}\nlisten: {outbound: \"127.0.0.1:0\"}\nmesh: ./mesh.yaml\n",
        );
        let mesh = write(
            "mesh.yaml",
            "apiVersion: outrigger.dev/v1alpha1\nkind: MeshService\nmetadata: {name: a}\n\
             spec: {discovery: {static: [{address: 127.0.0.1, port: 1}]}}\n",
        );
        let (report, readable) = check(&[bootstrap, mesh]);
        assert!(readable);
        assert_eq!(
            (report.errors(), report.documents),
            (0, 2),
            "{}",
            report.render_text()
        );
        let (_, readable) = check(&[dir.path().join("missing.yaml")]);
        assert!(!readable);
    }
}
