//! One process that a test started: its log, its signals, its end.

use std::io::{BufRead as _, BufReader, Read};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::time::Duration;

use super::{PATIENCE, now, run, wait_until};

type Lines = Arc<(Mutex<Vec<String>>, Condvar)>;

/// A running process. Killed when dropped.
#[derive(Debug)]
pub struct Process {
    name: String,
    child: Child,
    lines: Lines,
}

impl Process {
    /// Starts a command; what it prints on both outputs is its log.
    ///
    /// # Panics
    /// When it cannot be started.
    pub fn start(name: &str, command: &mut Command) -> Self {
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut child = command
            .spawn()
            .unwrap_or_else(|error| panic!("{command:?}: {error} (tests/run installs it)"));
        let lines = Lines::default();
        let out = child.stdout.take().expect("stdout is piped");
        let err = child.stderr.take().expect("stderr is piped");
        collect(out, Arc::clone(&lines));
        collect(err, Arc::clone(&lines));
        Self {
            name: name.to_owned(),
            child,
            lines,
        }
    }

    /// Its id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// All that it has printed.
    pub fn log(&self) -> String {
        self.lines
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .join("\n")
    }

    /// The first line with `text`, waited for.
    ///
    /// # Panics
    /// With the whole log, when the line does not come or the process ends without it.
    pub fn line(&mut self, text: &str) -> String {
        let end = now() + PATIENCE;
        loop {
            let ended = self.child.try_wait().ok().flatten();
            {
                let lines = self.lines.0.lock().unwrap_or_else(PoisonError::into_inner);
                if let Some(line) = lines.iter().find(|line| line.contains(text)) {
                    return line.clone();
                }
                // The lock is given back before the log is read again for the panic.
                let short = Duration::from_millis(100);
                drop(self.lines.1.wait_timeout(lines, short));
            }
            let late = now() >= end;
            assert!(
                ended.is_none() && !late,
                "{} never said {text:?} ({ended:?}); it said:\n{}",
                self.name,
                self.log()
            );
        }
    }

    /// Sends a signal by name, such as `TERM`.
    ///
    /// # Panics
    /// When the process is gone.
    pub fn signal(&self, signal: &str) {
        run(Command::new("kill")
            .arg(format!("-{signal}"))
            .arg(self.id().to_string()));
    }

    /// SIGKILL, and waits for the end.
    pub fn kill(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    /// Whether it has not ended.
    pub fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits for its end.
    ///
    /// # Panics
    /// With its log, when it does not end within `limit`.
    pub fn wait(&mut self, limit: Duration) -> ExitStatus {
        let end = now() + limit;
        loop {
            match self.child.try_wait() {
                Ok(Some(status)) => return status,
                Ok(None) => {}
                Err(error) => panic!("{}: {error}", self.name),
            }
            assert!(
                now() < end,
                "{} still runs after {limit:?}:\n{}",
                self.name,
                self.log()
            );
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// A line of `/proc/PID/status` in bytes, such as `VmRSS` or `VmHWM`.
    ///
    /// # Panics
    /// When the process is gone.
    pub fn memory(&self, line: &str) -> u64 {
        let path = format!("/proc/{}/status", self.id());
        let status = std::fs::read_to_string(&path).expect("the process runs");
        let found = status
            .lines()
            .find_map(|l| l.strip_prefix(line)?.strip_prefix(':'));
        let text = found.unwrap_or_else(|| panic!("{path} has no {line}"));
        let kib = text.trim().trim_end_matches(" kB").parse::<u64>();
        kib.expect("a number of kB") * 1024
    }

    /// Waits until it accepts connections on a local port.
    ///
    /// # Panics
    /// With its log, when it does not.
    pub fn accepts(&mut self, port: u16) {
        let what = format!("{} accepts connections on port {port}", self.name);
        wait_until(&what, PATIENCE, || {
            assert!(self.is_running(), "{} ended:\n{}", self.name, self.log());
            std::net::TcpStream::connect(("127.0.0.1", port)).is_ok()
        });
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            let log = self.log();
            let lines: Vec<&str> = log.lines().collect();
            let tail = &lines[lines.len().saturating_sub(30)..];
            eprintln!("--- the last that {} said:\n{}", self.name, tail.join("\n"));
        }
    }
}

/// Reads one output to its end; the thread ends with the process.
fn collect(output: impl Read + Send + 'static, lines: Lines) {
    std::thread::spawn(move || {
        let mut reader = BufReader::new(output);
        let mut line = Vec::new();
        while reader
            .read_until(b'\n', &mut line)
            .is_ok_and(|read| read > 0)
        {
            let text = String::from_utf8_lossy(&line).trim_end().to_owned();
            lines
                .0
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .push(text);
            lines.1.notify_all();
            line.clear();
        }
    });
}
