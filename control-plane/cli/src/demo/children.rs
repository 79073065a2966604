//! The processes of the demo: this same binary as control plane and as sidecars.
//!
//! Owns their start, their end on every path (a dropped [`Children`] leaves none behind, and the
//! kernel ends those of a demo that was killed), and what they said when one dies early.

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, getppid, kill_process, set_parent_process_death_signal};
use tokio::time::sleep;

use crate::clock;

/// Set in every child to the process id of the demo.
const PARENT: &str = "OUTRIGGER_DEMO_PARENT";

/// How long a child may take to end after SIGTERM.
const GRACE: Duration = Duration::from_secs(5);

/// In a child of the demo: ends this process when the demo is gone, even by SIGKILL.
pub(crate) fn end_with_parent() {
    let Some(parent) = std::env::var(PARENT)
        .ok()
        .and_then(|id| id.parse::<i32>().ok())
    else {
        return;
    };
    let _ = set_parent_process_death_signal(Some(Signal::TERM));
    // It may have gone before we asked to be told.
    if getppid().map(Pid::as_raw_pid) != Some(parent) {
        std::process::exit(1);
    }
}

/// All processes of one demo.
#[derive(Debug)]
pub(super) struct Children {
    logs: PathBuf,
    members: Vec<Member>,
}

#[derive(Debug)]
struct Member {
    name: &'static str,
    arguments: Vec<String>,
    process: Child,
}

impl Children {
    /// None yet; their output goes to files in `logs`.
    pub(super) fn new(logs: &Path) -> Self {
        Self {
            logs: logs.to_owned(),
            members: Vec::new(),
        }
    }

    /// Starts one.
    pub(super) fn start(&mut self, name: &'static str, arguments: &[&str]) -> Result<(), String> {
        let arguments: Vec<String> = arguments.iter().map(|&word| word.to_owned()).collect();
        let process = self
            .spawn(name, &arguments)
            .map_err(|error| format!("{name}: {error}"))?;
        self.members.push(Member {
            name,
            arguments,
            process,
        });
        Ok(())
    }

    fn spawn(&self, name: &str, arguments: &[String]) -> io::Result<Child> {
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log(name))?;
        Command::new(std::env::current_exe()?)
            .args(arguments)
            .env(PARENT, std::process::id().to_string())
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
    }

    fn log(&self, name: &str) -> PathBuf {
        self.logs.join(format!("{name}.log"))
    }

    /// The process id of a child.
    pub(super) fn id(&self, name: &str) -> u32 {
        let member = self.members.iter().find(|member| member.name == name);
        member.map_or(0, |member| member.process.id())
    }

    /// `kill -9`, and waits until it is gone.
    pub(super) fn kill(&mut self, name: &str) -> Result<(), String> {
        let member = self.member(name)?;
        let ended = member.process.kill().and_then(|()| member.process.wait());
        ended.map(drop).map_err(|error| format!("{name}: {error}"))
    }

    /// Starts one that was killed again, as it was started before.
    pub(super) fn start_again(&mut self, name: &str) -> Result<(), String> {
        let arguments = self.member(name)?.arguments.clone();
        let process = self
            .spawn(name, &arguments)
            .map_err(|error| format!("{name}: {error}"))?;
        self.member(name)?.process = process;
        Ok(())
    }

    fn member(&mut self, name: &str) -> Result<&mut Member, String> {
        let found = self.members.iter_mut().find(|member| member.name == name);
        found.ok_or_else(|| format!("there is no process {name}"))
    }

    /// Whether all run.
    ///
    /// # Errors
    /// Which does not, and the end of what it said.
    pub(super) fn all_run(&mut self) -> Result<(), String> {
        for member in &mut self.members {
            if let Ok(Some(status)) = member.process.try_wait() {
                let name = member.name;
                let tail = tail(&self.logs.join(format!("{name}.log")));
                return Err(format!("{name} ended with {status}; it said last:\n{tail}"));
            }
        }
        Ok(())
    }

    /// SIGTERM to all, then SIGKILL to those that take longer than 5 s. In reverse order of start.
    pub(super) async fn end(&mut self) {
        for member in self.members.iter_mut().rev() {
            let runs = matches!(member.process.try_wait(), Ok(None));
            let id = i32::try_from(member.process.id())
                .ok()
                .and_then(Pid::from_raw);
            if let (true, Some(id)) = (runs, id) {
                let _ = kill_process(id, Signal::TERM);
            }
        }
        let deadline = clock::now() + GRACE;
        loop {
            self.members
                .retain_mut(|member| matches!(member.process.try_wait(), Ok(None)));
            if self.members.is_empty() || clock::now() > deadline {
                break;
            }
            sleep(Duration::from_millis(20)).await;
        }
        self.kill_all();
    }

    fn kill_all(&mut self) {
        for mut member in self.members.drain(..) {
            // One that has ended by now cannot be killed, which is as good.
            let _ = member.process.kill();
            let _ = member.process.wait();
        }
    }
}

impl Drop for Children {
    fn drop(&mut self) {
        self.kill_all();
    }
}

/// The last lines of a log, indented.
fn tail(log: &Path) -> String {
    let text = std::fs::read(log).unwrap_or_default();
    let text = String::from_utf8_lossy(&text).into_owned();
    let lines: Vec<&str> = text.lines().collect();
    let last = &lines[lines.len().saturating_sub(12)..];
    last.iter().map(|line| format!("    {line}\n")).collect()
}
