//! The programs as a user runs them: built binaries as processes, talked to over sockets.
//!
//! Owns finding the binaries, starting and ending processes, the files they are started with, and
//! the foreign tools and servers (curl, h2load, nginx, Python) of the process tests. Everything
//! here blocks: a test that kills processes wants no runtime of its own. Nothing is skipped: what
//! is missing fails the test with what to do about it.

mod child;
mod foreign;
pub mod http;
mod programs;
pub mod sink;
mod wire;

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

pub use child::Process;
pub use foreign::{Nginx, grpc_server, h2load, h2load_until, python, tool};
pub use programs::{ControlPlane, Sidecar, SidecarFiles, command};

/// How long anything that should happen soon may take on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(30);

/// The directory with the test's own binaries: `target/debug`, `target/release`, …
fn profile_dir() -> PathBuf {
    let exe = std::env::current_exe().expect("a running test has a path");
    let deps = exe.parent().expect("it is in a directory");
    deps.parent()
        .expect("target/PROFILE/deps is two levels down")
        .to_owned()
}

/// A program of this workspace, built beside the running test.
///
/// # Panics
/// When it was not built.
pub fn binary(name: &str) -> PathBuf {
    let path = profile_dir().join(name);
    assert!(
        path.is_file(),
        "{} does not exist: run `cargo build --workspace --bins` first (tests/run does)",
        path.display()
    );
    path
}

/// Where the build puts its output, and `tests/run` what it installs.
pub fn target_dir() -> PathBuf {
    profile_dir()
        .parent()
        .expect("target/PROFILE is one level down")
        .to_owned()
}

/// `tests/tools` of the source tree.
pub fn tools_dir() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tools")
}

/// An empty directory for one test, on the disk of the build and not in `/tmp`, which may be
/// memory: the queue must be able to refuse what does not last. Removed when dropped.
///
/// # Panics
/// When it cannot be made.
pub fn scratch() -> tempfile::TempDir {
    let base = target_dir().join("process-tests");
    std::fs::create_dir_all(&base).expect("the target directory is writable");
    tempfile::TempDir::new_in(base).expect("the target directory is writable")
}

/// A TCP port nobody listens on, below the range the kernel gives to outgoing connections, for
/// programs that cannot tell which port they got. Ours are given port 0 instead.
///
/// # Panics
/// When there is none.
pub fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    // Test binaries that run at once start at different places.
    let start = u16::try_from(std::process::id() % 9_000).expect("below 9,000");
    for _ in 0..9_000 {
        let port = 20_000 + (start + NEXT.fetch_add(1, Ordering::Relaxed)) % 9_000;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
    panic!("no free port between 20000 and 29000");
}

/// This moment, for limits on waiting.
#[expect(
    clippy::disallowed_methods,
    reason = "the one place where process tests read a clock"
)]
pub fn now() -> Instant {
    Instant::now()
}

/// Asks until the answer is yes.
///
/// # Panics
/// When it is still no after `limit`, with `what` was waited for.
pub fn wait_until(what: &str, limit: Duration, mut done: impl FnMut() -> bool) {
    let end = now() + limit;
    while !done() {
        assert!(now() < end, "after {limit:?}, still not: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Runs a command to its end and gives its standard output.
///
/// # Panics
/// With all that it printed, when it cannot be started or its status is not 0.
pub fn run(command: &mut Command) -> String {
    let output = output(command);
    assert!(
        output.status.success(),
        "{command:?}: {}\n{}",
        output.status,
        printed(&output)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Runs a command to its end, whatever its status.
///
/// # Panics
/// When it cannot be started.
pub fn output(command: &mut Command) -> Output {
    command
        .output()
        .unwrap_or_else(|error| panic!("{command:?}: {error} (tests/run installs it)"))
}

/// Both outputs of a command as text.
pub fn printed(output: &Output) -> String {
    let stdout = String::from_utf8_lossy(&output.stdout);
    format!("{stdout}{}", String::from_utf8_lossy(&output.stderr))
}
