//! `outrigger check`: everything that is wrong with config files, before anything runs.
//!
//! All mesh documents of all paths are one config, as a sidecar would load it. A bootstrap file is
//! told by its top-level keys and checked as what it is.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, ValueEnum};
use outrigger_config::{Problem, Report, Severity, Source, bootstrap, load, read_sources};
use outrigger_control_plane::ca::issuer::first_expiry;

use crate::clock;
use crate::output::{self, ERRORS, Format, UNUSABLE};

/// A certificate that expires within this time is warned of: a week, as renewals by hand take.
const EXPIRES_SOON: Duration = Duration::from_secs(7 * 86_400);

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
                    report.problems.extend(expiring(&source, path));
                }
                (Some(Bootstrap::ControlPlane), true) => {
                    add(&mut report, bootstrap::load_control_plane(&source).1);
                    report.problems.extend(expiring(&source, path));
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

/// Warnings of the certificates that a bootstrap file names, those of them that are there.
fn expiring(source: &Source, path: &Path) -> Vec<Problem> {
    let base = path.parent().unwrap_or(Path::new(""));
    let now = clock::wall_millis() / 1000;
    let warning = |named: bootstrap::NamedFile| {
        let pem = std::fs::read(base.join(&named.file)).ok()?;
        let left = first_expiry(&pem)?
            .checked_sub(now)
            .filter(|left| *left > 0);
        let message = match left {
            None => "has expired".to_owned(),
            Some(left) if left < EXPIRES_SOON.as_secs() => {
                let left = clock::short(Duration::from_secs(left));
                format!("expires in {left}")
            }
            Some(_) => return None,
        };
        Some(Problem {
            severity: Severity::Warning,
            code: "W403",
            file: source.name.clone(),
            line: named.line,
            column: named.column,
            path: named.path.to_owned(),
            message: format!("a certificate in {} {message}", named.file.display()),
            help: None,
        })
    };
    let files = bootstrap::certificate_files(source);
    files.into_iter().filter_map(warning).collect()
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
    use outrigger_control_plane::ca::make;

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
    fn certificates_that_expire_within_a_week_are_warned_of_where_they_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let now = clock::wall_millis() / 1000;
        // A year's certificate, made 360 days ago, and one of today.
        let year = 365 * 86_400;
        let made = |name: &str, at: u64| {
            let names = ["localhost".to_owned()];
            make::init(&dir.path().join(name), "a", &names, at).unwrap();
        };
        made("old", now - 360 * 86_400);
        made("over", now - year - 60);
        made("new", now);
        let check = |state: &str, expected: &[&str]| {
            let path = dir.path().join("plane.yaml");
            let text = format!(
                "listen: {{discovery: '127.0.0.1:1'}}\nconfig: mesh\n\
                 tls: {{certificate: {state}/server.pem, key: {state}/server.key}}\n\
                 ca:\n  certificate: {state}/issuer.pem\n  key: {state}/issuer.key\n  roots: {state}/roots.pem\n"
            );
            std::fs::write(&path, text).unwrap();
            let (report, _) = super::check(&[path]);
            let found: Vec<String> = report
                .problems
                .iter()
                .filter(|problem| problem.code == "W403")
                .map(|problem| format!("{}:{} {}", problem.line, problem.path, problem.message))
                .collect();
            assert_eq!(found.len(), expected.len(), "{found:?}");
            for (found, expected) in found.iter().zip(expected) {
                assert!(found.starts_with(expected), "{found}");
            }
        };
        check("new", &[]);
        check("missing", &[]);
        check(
            "old",
            &[
                "3:tls.certificate a certificate in old/server.pem expires in 1",
                "5:ca.certificate a certificate in old/issuer.pem expires in 1",
            ],
        );
        check(
            "over",
            &[
                "3:tls.certificate a certificate in over/server.pem has expired",
                "5:ca.certificate a certificate in over/issuer.pem has expired",
            ],
        );
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
