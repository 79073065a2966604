//! Putting the rules in place and away, with the tools of the system.
//!
//! A backend replaces its rules in one transaction: nft all of them, iptables those of a family.
//! Whatever another backend left behind is taken away afterwards, so that changing the backend
//! never leaves two sets.

use std::fmt;
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};

use super::iptables::{self, Found};
use super::{Family, Rule, nft};

/// Who speaks to the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Backend {
    /// `nft`: a table of our own.
    Nft,
    /// `iptables-nft`: our chains in the `nat` tables that Kubernetes and Docker use as well.
    IptablesNft,
    /// `iptables-legacy`: the same for kernels without nf_tables.
    IptablesLegacy,
}

impl Backend {
    /// In the order in which they are preferred.
    const ALL: [Self; 3] = [Self::Nft, Self::IptablesNft, Self::IptablesLegacy];

    /// What comes before `-save` and `-restore`.
    fn prefix(self, family: Family) -> &'static str {
        match (self, family) {
            (Self::Nft, _) => "nft",
            (Self::IptablesNft, Family::V4) => "iptables-nft",
            (Self::IptablesNft, Family::V6) => "ip6tables-nft",
            (Self::IptablesLegacy, Family::V4) => "iptables-legacy",
            (Self::IptablesLegacy, Family::V6) => "ip6tables-legacy",
        }
    }

    /// The program that is given the rules.
    fn program(self, family: Family) -> String {
        match self {
            Self::Nft => "nft".to_owned(),
            Self::IptablesNft | Self::IptablesLegacy => format!("{}-restore", self.prefix(family)),
        }
    }

    /// What [`Tools::apply`] gives to which command where nothing is in place yet.
    pub fn print(self, rules: &[Rule], ipv6: bool) -> String {
        if self == Self::Nft {
            return format!("# nft {}\n{}", NFT.join(" "), nft::script(rules, ipv6));
        }
        let texts = families(ipv6).iter().map(|family| {
            let (program, options) = (self.program(*family), RESTORE.join(" "));
            let text = iptables::restore(rules, *family, &Found::default());
            format!("# {program} {options}\n{text}")
        });
        texts.collect()
    }
}

impl fmt::Display for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.prefix(Family::V4))
    }
}

/// `nft` reads one transaction.
const NFT: [&str; 2] = ["-f", "-"];
/// Other chains stay; somebody else may hold the lock of the legacy tables for this many seconds.
const RESTORE: [&str; 2] = ["--noflush", "--wait=30"];

fn families(ipv6: bool) -> &'static [Family] {
    if ipv6 {
        &[Family::V4, Family::V6]
    } else {
        &[Family::V4]
    }
}

/// One step that did not work.
#[derive(Debug, thiserror::Error)]
enum Problem {
    #[error("{0} is not installed (looked in PATH, /usr/sbin, /sbin and /usr/local/sbin)")]
    Missing(String),
    #[error(
        "none of nft, iptables-nft-restore and iptables-legacy-restore is installed (looked in \
         PATH, /usr/sbin, /sbin and /usr/local/sbin)"
    )]
    NoBackend,
    #[error(
        "{program} cannot read table nat: it holds rules that only nft can write (nft list table \
         {table}); use --backend nft"
    )]
    Incompatible {
        program: String,
        table: &'static str,
    },
    #[error(
        "{program} cannot read table nat any more, for it holds rules that only nft can write; \
         ours are in it: take the chains OUTRIGGER_INBOUND and OUTRIGGER_OUTBOUND and the jumps \
         to them away by hand (nft -a list table {table})"
    )]
    Locked {
        program: String,
        table: &'static str,
    },
    #[error("{path} cannot be read: {source}")]
    Unreadable { path: String, source: io::Error },
    #[error("{command} cannot be run: {source}")]
    NotRun { command: String, source: io::Error },
    #[error("{command}: {status}\n{stderr}")]
    Status {
        command: String,
        status: ExitStatus,
        stderr: String,
    },
}

/// What did not work, and what state is left.
#[derive(Debug)]
pub struct Failure {
    problems: Vec<Problem>,
    done: Vec<String>,
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for problem in &self.problems {
            writeln!(f, "{problem}")?;
        }
        if self.done.is_empty() {
            return f.write_str("nothing was changed");
        }
        write!(f, "done all the same: {}", self.done.join("; "))
    }
}

impl std::error::Error for Failure {}

/// The tools of the system, looked up where they are used.
#[derive(Debug)]
pub struct Tools {
    dirs: Vec<PathBuf>,
}

impl Default for Tools {
    /// Those on the path, and where Debian keeps what is root's.
    fn default() -> Self {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let sbin = ["/usr/sbin", "/sbin", "/usr/local/sbin"].map(PathBuf::from);
        Self {
            dirs: std::env::split_paths(&path).chain(sbin).collect(),
        }
    }
}

impl Tools {
    /// The preferred backend that is installed.
    ///
    /// # Errors
    /// When there is none.
    pub fn choose(&self) -> Result<Backend, Failure> {
        let found = Backend::ALL
            .into_iter()
            .find(|backend| self.has(*backend, Family::V4));
        found.ok_or(Failure {
            problems: vec![Problem::NoBackend],
            done: Vec::new(),
        })
    }

    /// Puts the rules in place of whatever was there of ours; what was done, in words.
    ///
    /// # Errors
    /// The command that failed, what it said, and what had been done before.
    pub fn apply(
        &self,
        backend: Backend,
        rules: &[Rule],
        ipv6: bool,
    ) -> Result<Vec<String>, Failure> {
        let mut done = Vec::new();
        match self.replace(backend, rules, ipv6, &mut done) {
            Ok(()) => Ok(done),
            Err(problem) => Err(Failure {
                problems: vec![problem],
                done,
            }),
        }
    }

    fn replace(
        &self,
        backend: Backend,
        rules: &[Rule],
        ipv6: bool,
        done: &mut Vec<String>,
    ) -> Result<(), Problem> {
        if backend == Backend::Nft {
            self.run("nft", &NFT, &nft::script(rules, ipv6))?;
            let families = if ipv6 { "IPv4 and IPv6" } else { "IPv4" };
            done.push(format!("{families} rules are in place (nft)"));
        } else {
            for family in families(ipv6) {
                let found = self.found(backend, *family)?;
                let text = iptables::restore(rules, *family, &found);
                self.run(&backend.program(*family), &RESTORE, &text)?;
                done.push(format!("{family} rules are in place ({backend})"));
            }
            if !ipv6 && self.has(backend, Family::V6) {
                self.remove_chains(backend, Family::V6, done)?;
            }
        }
        for other in Backend::ALL {
            // One that cannot be read has nothing of ours: we could not have written to it.
            if other != backend && self.holds_ours(other) {
                self.remove_one(other, done)?;
            }
        }
        Ok(())
    }

    /// Takes away what is there of ours, by one backend or by all that are installed; what was
    /// done, in words. Where nothing is there, that is nothing.
    ///
    /// # Errors
    /// The commands that failed, what they said, and what was done nevertheless.
    pub fn remove(&self, backend: Option<Backend>) -> Result<Vec<String>, Failure> {
        let backends: Vec<Backend> = match backend {
            Some(backend) => vec![backend],
            None => {
                self.choose()?;
                let all = Backend::ALL.into_iter();
                all.filter(|backend| self.has(*backend, Family::V4))
                    .collect()
            }
        };
        let (mut done, mut problems) = (Vec::new(), Vec::new());
        for backend in backends {
            problems.extend(self.remove_one(backend, &mut done).err());
        }
        if problems.is_empty() {
            return Ok(done);
        }
        Err(Failure { problems, done })
    }

    fn remove_one(&self, backend: Backend, done: &mut Vec<String>) -> Result<(), Problem> {
        if backend != Backend::Nft {
            self.remove_chains(backend, Family::V4, done)?;
            if self.has(backend, Family::V6) {
                self.remove_chains(backend, Family::V6, done)?;
            }
            return Ok(());
        }
        // Lists names only, and fails for the same reasons as the removal would.
        let tables = self.run("nft", &["list", "tables", "inet"], "")?;
        if tables.lines().any(|line| line == "table inet outrigger") {
            self.run("nft", &NFT, nft::REMOVE)?;
            done.push("IPv4 and IPv6 rules are removed (nft)".to_owned());
        }
        Ok(())
    }

    fn remove_chains(
        &self,
        backend: Backend,
        family: Family,
        done: &mut Vec<String>,
    ) -> Result<(), Problem> {
        let found = match self.found(backend, family) {
            Err(Problem::Incompatible { program, table }) => {
                return if self.locked(family) {
                    Err(Problem::Locked { program, table })
                } else {
                    Ok(())
                };
            }
            found => found?,
        };
        if found.nothing() {
            return Ok(());
        }
        let program = backend.program(family);
        if backend == Backend::IptablesNft && !found.others() {
            // The table came with our chains. Without `--noflush` it goes with them.
            self.run(&program, &[], "*nat\nCOMMIT\n")?;
        } else {
            self.run(&program, &RESTORE, &iptables::remove(&found))?;
            self.remove_empty(backend, &program, &found);
        }
        done.push(format!("{family} rules are removed ({backend})"));
        Ok(())
    }

    /// With `iptables-nft` the kernel's chains are made for the first rule, ours perhaps. Old
    /// versions cannot take them away: then they stay, empty.
    fn remove_empty(&self, backend: Backend, program: &str, found: &Found) {
        if backend != Backend::IptablesNft {
            return;
        }
        for chain in found.only_ours() {
            let text = format!("*nat\n-X {chain}\nCOMMIT\n");
            let _ = self.run(program, &RESTORE, &text);
        }
    }

    fn holds_ours(&self, backend: Backend) -> bool {
        if !self.has(backend, Family::V4) {
            return false;
        }
        if backend == Backend::Nft {
            return self
                .run("nft", &["list", "table", "inet", "outrigger"], "")
                .is_ok();
        }
        [Family::V4, Family::V6]
            .into_iter()
            .any(|family| match self.found(backend, family) {
                Err(Problem::Incompatible { .. }) => self.locked(family),
                found => found.is_ok_and(|found| !found.nothing()),
            })
    }

    /// Whether a table that `iptables-nft` cannot read holds rules of ours.
    fn locked(&self, family: Family) -> bool {
        let table = nft::nat_table(family).split(' ');
        let arguments: Vec<&str> = ["list", "chain"]
            .into_iter()
            .chain(table)
            .chain([iptables::OUTBOUND])
            .collect();
        self.run("nft", &arguments, "").is_ok()
    }

    /// What is in the `nat` table.
    fn found(&self, backend: Backend, family: Family) -> Result<Found, Problem> {
        if backend == Backend::IptablesLegacy && !legacy_nat(family)? {
            return Ok(Found::default());
        }
        let program = format!("{}-save", backend.prefix(family));
        let saved = self.run(&program, &["-t", "nat"], "")?;
        // It succeeds all the same, and `-restore` adds rules that nobody finds again.
        if saved.contains("is incompatible, use 'nft' tool") {
            let table = nft::nat_table(family);
            return Err(Problem::Incompatible { program, table });
        }
        Ok(Found::read(&saved))
    }

    fn has(&self, backend: Backend, family: Family) -> bool {
        self.path(&backend.program(family)).is_some()
    }

    fn path(&self, program: &str) -> Option<PathBuf> {
        let mut paths = self.dirs.iter().map(|dir| dir.join(program));
        paths.find(|path| path.is_file())
    }

    /// Runs a command to its end and gives its standard output.
    fn run(&self, program: &str, arguments: &[&str], input: &str) -> Result<String, Problem> {
        let path = self
            .path(program)
            .ok_or_else(|| Problem::Missing(program.to_owned()))?;
        let command = || [&[program], arguments].concat().join(" ");
        let not_run = |source| Problem::NotRun {
            command: command(),
            source,
        };
        let mut child = Command::new(path)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(not_run)?;
        if let Some(mut stdin) = child.stdin.take() {
            // One that does not read to the end says why with its status.
            let _ = stdin.write_all(input.as_bytes());
        }
        let output = child.wait_with_output().map_err(not_run)?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        Err(Problem::Status {
            command: command(),
            status: output.status,
            stderr: match said.trim_end() {
                "" => "(it did not say why)".to_owned(),
                said => said.to_owned(),
            },
        })
    }
}

/// Whether the legacy `nat` table exists here. To ask `iptables-legacy` would make one.
fn legacy_nat(family: Family) -> Result<bool, Problem> {
    let path = Path::new(match family {
        Family::V4 => "/proc/net/ip_tables_names",
        Family::V6 => "/proc/net/ip6_tables_names",
    });
    match std::fs::read_to_string(path) {
        Ok(names) => Ok(names.lines().any(|name| name == "nat")),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(source) => Err(Problem::Unreadable {
            path: path.display().to_string(),
            source,
        }),
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::intercept::model::tests::{full, plain};
    use crate::intercept::rules;

    /// What `--print` shows, byte for byte; `OUTRIGGER_UPDATE_GOLDEN=1` writes it anew.
    fn check(name: &str, text: &str) {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/intercept/golden");
        let path = dir.join(name);
        if std::env::var_os("OUTRIGGER_UPDATE_GOLDEN").is_some() {
            std::fs::write(&path, text).expect("the source tree is writable");
        }
        let golden = std::fs::read_to_string(&path).expect("the golden file is committed");
        assert_eq!(text, golden, "{}", path.display());
    }

    #[test]
    fn every_backend_prints_its_golden_file() {
        for backend in Backend::ALL {
            for (kind, params, ipv6) in [
                ("plain", plain(), true),
                ("plain-ipv4", plain(), false),
                ("full", full(), true),
            ] {
                let text = backend.print(&rules(&params), ipv6);
                check(&format!("{backend}-{kind}.txt"), &text);
            }
        }
    }

    /// Tools that do what `script` says.
    fn tools(dir: &Path, scripts: &[(&str, &str)]) -> Tools {
        for (name, script) in scripts {
            let path = dir.join(name);
            std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).expect("a scratch directory");
            std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))
                .expect("a file of our own");
        }
        Tools {
            dirs: vec![dir.to_owned()],
        }
    }

    #[test]
    fn the_preferred_backend_is_the_first_that_is_installed() {
        let dir = tempfile::tempdir().expect("a scratch directory");
        let none = tools(dir.path(), &[]).choose().expect_err("nothing there");
        assert!(none.to_string().starts_with("none of nft, "), "{none}");
        for (name, expected) in [
            ("iptables-legacy-restore", Backend::IptablesLegacy),
            ("iptables-nft-restore", Backend::IptablesNft),
            ("nft", Backend::Nft),
        ] {
            let tools = tools(dir.path(), &[(name, "true")]);
            assert_eq!(tools.choose().expect("one is there"), expected);
        }
    }

    #[test]
    fn a_failure_names_the_command_its_words_and_what_was_done() {
        let dir = tempfile::tempdir().expect("a scratch directory");
        let tools = tools(
            dir.path(),
            &[
                ("iptables-nft-save", "true"),
                ("iptables-nft-restore", "cat >/dev/null"),
                ("ip6tables-nft-save", "true"),
                (
                    "ip6tables-nft-restore",
                    "cat >/dev/null; echo no nat >&2; exit 3",
                ),
            ],
        );
        let failure = tools
            .apply(Backend::IptablesNft, &rules(&plain()), true)
            .expect_err("the second step fails");
        assert_eq!(
            failure.to_string(),
            "ip6tables-nft-restore --noflush --wait=30: exit status: 3\nno nat\n\
             done all the same: IPv4 rules are in place (iptables-nft)"
        );
        let failure = tools
            .apply(Backend::Nft, &rules(&plain()), true)
            .expect_err("not installed");
        assert_eq!(
            failure.to_string(),
            "nft is not installed (looked in PATH, /usr/sbin, /sbin and /usr/local/sbin)\n\
             nothing was changed"
        );
    }
}
