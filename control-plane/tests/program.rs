//! The program as a process: its options, its signals, its exit codes.

mod common;

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};

use common::{BROKEN, MESH};

fn write(dir: &Path, mesh: &str) -> String {
    std::fs::write(dir.join("mesh.yaml"), mesh).expect("written");
    let bootstrap = "listen: {discovery: 127.0.0.1:0, admin: 127.0.0.1:0}\nconfig: mesh.yaml\nstateDir: state\n";
    let path = dir.join("control-plane.yaml");
    std::fs::write(&path, bootstrap).expect("written");
    path.display().to_string()
}

fn program() -> Command {
    Command::new(env!("CARGO_BIN_EXE_outrigger-control-plane"))
}

fn output(arguments: &[&str]) -> (Output, String) {
    let output = program().args(arguments).output().expect("it runs");
    let text = [output.stdout.clone(), output.stderr.clone()].concat();
    (output, String::from_utf8(text).expect("text"))
}

fn started(path: &str) -> (Child, BufReader<std::process::ChildStderr>) {
    let mut child = program()
        .args(["--config", path])
        .stderr(Stdio::piped())
        .spawn()
        .expect("it runs");
    let mut log = BufReader::new(child.stderr.take().expect("piped"));
    let mut line = String::new();
    while !line.contains("control plane started") {
        line.clear();
        assert_ne!(
            log.read_line(&mut line).expect("readable"),
            0,
            "it ended early"
        );
    }
    (child, log)
}

#[test]
fn check_prints_every_problem_and_sets_the_exit_code() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = write(dir.path(), MESH);
    let (good, text) = output(&["--config", &path, "--check"]);
    assert_eq!(good.status.code(), Some(0), "{text}");
    write(dir.path(), BROKEN);
    let (bad, text) = output(&["--config", &path, "--check"]);
    assert_eq!(bad.status.code(), Some(1), "{text}");
    assert!(text.contains("mesh.yaml:6:3: error"), "{text}");
    let (none, _) = output(&["--config", "/nowhere/control-plane.yaml", "--check"]);
    assert_eq!(none.status.code(), Some(2));
    let (version, text) = output(&["--version"]);
    assert_eq!(version.status.code(), Some(0));
    assert!(text.contains(env!("CARGO_PKG_VERSION")), "{text}");
}

#[test]
fn sigterm_ends_it_in_order_and_a_second_one_is_refused() {
    let dir = tempfile::tempdir().expect("a directory");
    let path = write(dir.path(), MESH);
    let (mut child, _log) = started(&path);
    let (second, text) = output(&["--config", &path]);
    assert_eq!(second.status.code(), Some(2));
    assert!(text.contains("in use by another control plane"), "{text}");
    let kill = Command::new("kill")
        .args(["-TERM", &child.id().to_string()])
        .status();
    assert!(kill.expect("kill runs").success());
    assert_eq!(child.wait().expect("it ends").code(), Some(0));
}
