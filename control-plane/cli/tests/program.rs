//! The program as it is run: the demo to its end, and the exit codes that scripts rely on.

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

fn outrigger(words: &[&str]) -> Output {
    let program = env!("CARGO_BIN_EXE_outrigger");
    Command::new(program)
        .args(words)
        .output()
        .expect("the program starts")
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

fn temporary() -> tempfile::TempDir {
    tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory")
}

#[test]
fn every_step_of_the_demo_holds_and_nothing_stays_behind() {
    let dir = temporary();
    let output = Command::new(env!("CARGO_BIN_EXE_outrigger"))
        .args(["demo", "--exit"])
        .env("TMPDIR", dir.path())
        .output()
        .expect("the program starts");
    let (said, complaints) = (text(&output.stdout), text(&output.stderr));
    assert!(output.status.success(), "{said}{complaints}");
    assert!(said.contains("all 8 steps held"), "{said}");
    let left: Vec<_> = std::fs::read_dir(dir.path()).expect("readable").collect();
    assert!(left.is_empty(), "{left:?}");
}

fn file(dir: &Path, name: &str, contents: &str) -> PathBuf {
    let path = dir.join(name);
    std::fs::write(&path, contents).expect("written");
    path
}

#[test]
fn check_tells_clean_from_broken_from_unreadable() {
    let dir = temporary();
    let clean = "apiVersion: outrigger.dev/v1alpha1\nkind: MeshService\nmetadata: {name: a}\n\
                 spec: {discovery: {static: [{address: 127.0.0.1, port: 1}]}}\n";
    let good = file(dir.path(), "good.yaml", clean);
    let bad = file(
        dir.path(),
        "bad.yaml",
        &clean.replace("discovery", "discovry"),
    );
    let warned = file(
        dir.path(),
        "warned.yaml",
        &clean.replace("{name: a}", "{name: a, colour: blue}"),
    );
    let check = |words: &[&str], path: &Path, code: i32, says: &str| {
        let path = path.display().to_string();
        let words: Vec<&str> = ["check"]
            .iter()
            .chain(words)
            .copied()
            .chain([path.as_str()])
            .collect();
        let output = outrigger(&words);
        let said = text(&output.stdout) + &text(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{words:?}: {said}");
        assert!(said.contains(says), "{words:?}: {said}");
    };
    check(&[], &good, 0, "1 document, 0 errors, 0 warnings");
    check(&[], &bad, 1, "bad.yaml:4:8: error[E103] spec.discovry");
    check(&["--format", "github"], &bad, 1, "::error file=");
    check(&["--format", "json"], &bad, 1, "\"errors\": 1");
    check(&[], &warned, 0, "1 warning");
    check(&["--strict"], &warned, 1, "1 warning");
    check(&[], &dir.path().join("missing.yaml"), 2, "cannot read");
}

#[test]
fn a_sidecar_that_is_not_there_is_status_2_and_names_the_address() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let address = taken.local_addr().expect("an address").to_string();
    drop(taken);
    for words in [
        &["queue", "ls", "--admin"][..],
        &["status", "--control-plane"],
        &["status", "--admin"],
    ] {
        let url = format!("http://{address}");
        let words: Vec<&str> = words.iter().copied().chain([url.as_str()]).collect();
        let output = outrigger(&words);
        assert_eq!(output.status.code(), Some(2), "{words:?}");
        assert!(
            text(&output.stderr).contains(&address),
            "{}",
            text(&output.stderr)
        );
    }
}

#[test]
fn programs_get_an_error_as_json_and_a_silent_sidecar_is_not_waited_for_long() {
    // Accepts by its backlog and never answers.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("http://{}", silent.local_addr().expect("an address"));
    let output = outrigger(&["queue", "ls", "--output", "json", "--admin", &url]);
    assert_eq!(output.status.code(), Some(2));
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    let error = said["error"].as_str().expect("an error");
    assert!(error.contains("no answer within 5s"), "{error}");
    assert!(text(&output.stderr).contains(error));
}

#[test]
fn a_queue_store_that_failed_is_status_1_with_the_reason() {
    use std::io::{Read as _, Write as _};
    let sidecar = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("http://{}", sidecar.local_addr().expect("an address"));
    let serving = std::thread::spawn(move || {
        for _ in 0..2 {
            let (mut stream, _) = sidecar.accept().expect("a connection");
            let _ = stream.read(&mut [0; 4096]);
            let body = r#"{"store":{"health":"failed","reason":"damaged"},"queues":[]}"#;
            let length = body.len();
            let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\n\r\n{body}");
            stream.write_all(head.as_bytes()).expect("written");
        }
    });
    let output = outrigger(&["queue", "ls", "--admin", &url]);
    assert_eq!(output.status.code(), Some(1), "{}", text(&output.stdout));
    assert!(text(&output.stderr).contains("the queue store failed: damaged"));
    let output = outrigger(&["queue", "ls", "-o", "json", "--admin", &url]);
    assert_eq!(output.status.code(), Some(1));
    let said: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(said["error"], "the queue store failed: damaged");
    assert_eq!(said["store"]["health"], "failed");
    serving.join().expect("served");
}

#[test]
fn schemas_are_json_schemas() {
    for which in ["mesh", "proxy", "control-plane"] {
        let output = outrigger(&["schema", which]);
        let schema: serde_json::Value = serde_json::from_slice(&output.stdout).expect("JSON");
        assert!(
            schema["$schema"]
                .as_str()
                .is_some_and(|uri| uri.contains("2020-12")),
            "{which}"
        );
    }
}
