//! As many connections as a file limit lets one sidecar hold, with a request in flight on each.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::SocketAddr;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use outrigger_tests::process::{
    PATIENCE, Process, Sidecar, SidecarFiles, binary, scratch, wait_until,
};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// What the test is about; fewer where the hard limit of files allows no more, and it says so.
const CONNECTIONS: u64 = 9_000;
/// Listeners, store, log, and what else is open.
const OTHER_FILES: u64 = 200;
/// How long every request of the first wave stays in flight, in milliseconds.
const HELD: u64 = 30_000;

/// Raises our limit of open files, which everything started from here inherits, and says how many
/// connections fit: each takes two files of the sidecar.
fn connections() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    let all = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    setrlimit(Resource::Nofile, all).expect("up to the hard limit it may be raised");
    let fit = limit
        .maximum
        .map_or(CONNECTIONS, |files| files.saturating_sub(OTHER_FILES) / 2);
    if fit < CONNECTIONS {
        println!("only {fit} connections: the hard limit of open files is {limit:?}");
    }
    fit.min(CONNECTIONS)
}

/// Load in a process of its own: its files count against its own limit.
struct Wave {
    child: Child,
    lines: BufReader<ChildStdout>,
    go_on: ChildStdin,
}

impl Wave {
    fn start(to: SocketAddr, connections: u64, milliseconds: u64) -> Self {
        let mut child = Command::new(binary("outrigger-bench"))
            .args(["hold", "--authority=orders"])
            .arg(format!("--to={to}"))
            .arg(format!("--connections={connections}"))
            .arg(format!("--milliseconds={milliseconds}"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("the load starts");
        let lines = BufReader::new(child.stdout.take().expect("it is piped"));
        let go_on = child.stdin.take().expect("it is piped");
        Self {
            child,
            lines,
            go_on,
        }
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.lines.read_line(&mut line).expect("the load speaks");
        line.trim().to_owned()
    }

    /// Waits for a phase, looks, and lets it go on.
    fn phase<T>(&mut self, name: &str, look: impl FnOnce() -> T) -> T {
        assert_eq!(self.line(), name, "the load failed before");
        let seen = look();
        self.go_on.write_all(b"\n").expect("the load listens");
        seen
    }

    /// All answers were 200.
    fn succeeded(mut self, connections: u64) {
        let report: serde_json::Value =
            serde_json::from_str(&self.line()).expect("a report is JSON");
        assert_eq!(report["succeeded"], connections, "{report}");
        assert!(self.child.wait().expect("it ends").success());
    }
}

impl Drop for Wave {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn open_files(process: &Process) -> usize {
    std::fs::read_dir(format!("/proc/{}/fd", process.id()))
        .expect("the sidecar runs")
        .count()
}

#[test]
fn nine_thousand_requests_in_flight_leave_nothing_behind() {
    let connections = connections();
    let dir = scratch();
    let mut origin = Process::start(
        "origin",
        Command::new(binary("outrigger-bench")).arg("origin"),
    );
    let addr: SocketAddr = origin.line("127.0.0.1:").parse().expect("an address");
    // Opening them all takes a busy machine longer than an idle connection may wait by default.
    let files = SidecarFiles::write(
        dir.path(),
        "web",
        None,
        "workers: 1\nwire: {headerTimeout: 5m}",
    );
    files.set_mesh(&format!(
        "apiVersion: outrigger.dev/v1alpha1\n\
         kind: MeshService\n\
         metadata: {{name: orders}}\n\
         spec:\n\
        \x20 discovery: {{static: [{{address: 127.0.0.1, port: {}}}]}}\n\
        \x20 connection: {{idleTimeout: 1s}}\n\
         ---\n\
         apiVersion: outrigger.dev/v1alpha1\n\
         kind: MeshRoute\n\
         metadata: {{name: orders}}\n\
         spec: {{services: [orders], rules: [{{name: slow, timeouts: {{request: 2m}}}}]}}\n",
        addr.port()
    ));
    let sidecar = files.start();
    let (files_before, resident_before) = (open_files(&sidecar.process), resident(&sidecar));

    let mut first = Wave::start(sidecar.outbound, connections, HELD);
    first.phase("open", || ());
    let idle = first.phase("used", || resident(&sidecar));
    let peak = first.phase("in flight", || {
        wait_until("every request is in flight", PATIENCE, || {
            sidecar.metric("outrigger_in_flight", &["orders"]) == Some(as_metric(connections))
        });
        let active = resident(&sidecar);
        println!(
            "{connections} connections: {:.1} KiB each when idle, {:.1} KiB with a request",
            each(idle, resident_before, connections),
            each(active, resident_before, connections)
        );
        active - resident_before
    });
    first.phase("answered", || ());
    first.succeeded(connections);
    settled(&sidecar, files_before);
    let resident_after = resident(&sidecar);

    let mut second = Wave::start(sidecar.outbound, connections, 100);
    for phase in ["open", "used", "in flight", "answered"] {
        second.phase(phase, || ());
    }
    second.succeeded(connections);
    settled(&sidecar, files_before);
    // What the first wave needed is enough for the second, so nothing of it was left in use. The
    // allocator keeps some pages either time, hence the allowance.
    let grown = resident(&sidecar).saturating_sub(resident_after);
    assert!(
        grown < peak / 10,
        "{grown} bytes more after the second wave than after the first, which took {peak}"
    );
}

fn resident(sidecar: &Sidecar) -> u64 {
    sidecar.process.memory("VmRSS")
}

#[expect(clippy::cast_precision_loss, reason = "a figure for people")]
fn each(now: u64, before: u64, connections: u64) -> f64 {
    now.saturating_sub(before) as f64 / connections as f64 / 1024.0
}

#[expect(clippy::cast_precision_loss, reason = "metrics are floats")]
fn as_metric(count: u64) -> f64 {
    count as f64
}

/// Nothing in flight, no connection and no file more than before.
fn settled(sidecar: &Sidecar, files_before: usize) {
    wait_until("nothing is in flight", PATIENCE, || {
        sidecar.metric("outrigger_in_flight", &["orders"]) == Some(0.0)
    });
    wait_until("every connection is closed", PATIENCE, || {
        open_files(&sidecar.process) <= files_before + 2
    });
}
