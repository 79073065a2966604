//! Holds the arrows between our packages, and keeps the pure ones pure.

use std::collections::{BTreeMap, BTreeSet};
use std::process::Command;

use serde_json::Value;

/// Package, and which of ours it may depend on outside its own tests.
const ARROWS: [(&str, &[&str]); 9] = [
    ("outrigger-config", &[]),
    ("outrigger-core", &[]),
    ("outrigger-queue", &["outrigger-core"]),
    (
        "outrigger-proxy",
        &[
            "outrigger-config",
            "outrigger-core",
            "outrigger-queue",
            "outrigger-registry",
        ],
    ),
    ("outrigger-registry", &["outrigger-config"]),
    (
        "outrigger-control-plane",
        &["outrigger-config", "outrigger-core", "outrigger-registry"],
    ),
    (
        "outrigger",
        &[
            "outrigger-config",
            "outrigger-control-plane",
            "outrigger-core",
            "outrigger-proxy",
            "outrigger-queue",
        ],
    ),
    (
        "outrigger-tests",
        &[
            "outrigger-config",
            "outrigger-control-plane",
            "outrigger-core",
            "outrigger-proxy",
            "outrigger-queue",
        ],
    ),
    ("outrigger-examples", &[]),
];

/// What a pure package must not see: runtimes, sockets and whatever reads a clock by itself.
const IMPURE: [&str; 8] = [
    "tokio",
    "hyper",
    "hyper-util",
    "mio",
    "socket2",
    "tonic",
    "h2",
    "notify",
];

fn metadata() -> Value {
    let output = Command::new(env!("CARGO"))
        .args([
            "metadata",
            "--no-deps",
            "--offline",
            "--format-version",
            "1",
        ])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("cargo runs");
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// Package → what it depends on outside its own tests.
fn dependencies() -> BTreeMap<String, BTreeSet<String>> {
    let metadata = metadata();
    let packages = metadata["packages"].as_array().expect("packages");
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    packages
        .iter()
        .map(|package| {
            let all = package["dependencies"].as_array().expect("dependencies");
            let real = all.iter().filter(|dependency| dependency["kind"] != "dev");
            (
                text(&package["name"]),
                real.map(|dependency| text(&dependency["name"])).collect(),
            )
        })
        .collect()
}

#[test]
fn packages_depend_on_each_other_only_along_the_arrows() {
    let found = dependencies();
    let expected: BTreeSet<&str> = ARROWS.iter().map(|(package, _)| *package).collect();
    let packages: BTreeSet<&str> = found.keys().map(String::as_str).collect();
    assert_eq!(
        packages, expected,
        "a new package needs a row here and in DESIGN"
    );
    for (package, allowed) in ARROWS {
        let ours = found[package]
            .iter()
            .filter(|name| packages.contains(name.as_str()));
        for name in ours {
            assert!(
                allowed.contains(&name.as_str()),
                "{package} must not depend on {name}"
            );
        }
    }
}

#[test]
fn the_pure_packages_see_no_runtime_and_no_socket() {
    let found = dependencies();
    for package in ["outrigger-core", "outrigger-config"] {
        for name in IMPURE {
            assert!(
                !found[package].contains(name),
                "{package} must not depend on {name}"
            );
        }
    }
    assert!(
        !found["outrigger-core"].contains("serde"),
        "core knows no formats"
    );
    // The parser of the traffic and the storage stay behind their own packages.
    assert!(!found["outrigger-control-plane"].contains("redb"));
}
