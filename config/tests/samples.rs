//! The samples, the contract and the committed schemas are what the code says they are.

#![allow(clippy::unwrap_used)]

use std::path::{Path, PathBuf};

use outrigger_config::{
    Loaded, Report, Source, bootstrap, load, read_source, read_sources, schema,
};
use serde_json::Value;

fn here(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

fn load_file(path: &str) -> Loaded {
    load(&read_sources(&here(path)).unwrap())
}

const MESHES: [&str; 3] = [
    "samples/minimal.yaml",
    "samples/full.yaml",
    "tests/data/contract-mesh.yaml",
];

#[test]
fn every_mesh_sample_loads_without_an_error() {
    for path in MESHES {
        let loaded = load_file(path);
        assert!(
            !loaded.report.has_errors(),
            "{path}:\n{}",
            loaded.report.render_text()
        );
        assert!(loaded.mesh.is_some());
    }
}

#[test]
fn the_smallest_sample_has_no_problem_at_all() {
    let loaded = load_file("samples/minimal.yaml");
    assert_eq!(loaded.report.render_text(), "");
    assert_eq!(loaded.report.summary(), "1 document, 0 errors, 0 warnings");
}

#[test]
fn documents_load_to_the_same_config_from_their_json_and_from_their_yaml() {
    for path in MESHES {
        let mesh = load_file(path).mesh.unwrap();
        for render in [
            outrigger_config::Document::to_json,
            outrigger_config::Document::to_yaml,
        ] {
            let sources: Vec<Source> = mesh
                .documents
                .iter()
                .rev()
                .map(|document| Source::new(document.resource_name(), render(document)))
                .collect();
            let again = load(&sources);
            assert!(
                !again.report.has_errors(),
                "{path}:\n{}",
                again.report.render_text()
            );
            let again = again.mesh.unwrap();
            assert_eq!(again, mesh);
            let texts = |config: &outrigger_config::MeshConfig| -> Vec<String> {
                config.documents.iter().map(render).collect()
            };
            assert_eq!(texts(&again), texts(&mesh));
        }
    }
}

#[test]
fn a_directory_is_read_sorted_and_without_hidden_files() {
    let directory = std::env::temp_dir().join(format!("outrigger-config-{}", std::process::id()));
    for (file, text) in [
        ("b.yml", ""),
        ("a.yaml", "# nothing"),
        ("sub/c.yaml", ""),
        ("..data/a.yaml", ""),
        ("n.txt", ""),
    ] {
        let path = directory.join(file);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    let sources = read_sources(&directory).unwrap();
    let names: Vec<&str> = sources
        .iter()
        .map(|s| s.name.rsplit_once(std::path::MAIN_SEPARATOR).unwrap().1)
        .collect();
    assert_eq!(names, ["a.yaml", "b.yml", "c.yaml"]);
    let loaded = load(&sources);
    assert_eq!(loaded.report.problems[0].code, "W304");
    assert!(loaded.mesh.is_some());
    std::fs::remove_dir_all(directory).unwrap();
    assert!(read_sources(&here("samples/no-such-file.yaml")).is_err());
}

#[test]
fn the_socket_of_a_workload_api_may_be_written_as_a_url() {
    let check = |socket: &str, expected: &str| {
        let text = format!(
            "workload: {{name: a}}\nmesh: m.yaml\nidentity: {{workloadApi: {{socket: \"{socket}\"}}}}\n"
        );
        let (proxy, report) = bootstrap::load_proxy(&Source::new("proxy.yaml", text));
        clean(&report);
        let mut proxy = proxy.unwrap();
        proxy.resolve(Path::new("/etc"));
        let api = proxy.identity.unwrap().workload_api.unwrap();
        assert_eq!(api.socket, Path::new(expected), "{socket}");
    };
    check("unix:///run/agent.sock", "/run/agent.sock");
    check("unix:/run/agent.sock", "/run/agent.sock");
    check("/run/agent.sock", "/run/agent.sock");
    check("agent.sock", "/etc/agent.sock");
}

fn clean(report: &Report) {
    assert!(!report.has_errors(), "{}", report.render_text());
}

#[test]
fn the_bootstrap_samples_load() {
    for path in ["samples/proxy.yaml", "tests/data/contract-proxy.yaml"] {
        let (proxy, report) = bootstrap::load_proxy(&read_source(&here(path)).unwrap());
        clean(&report);
        let mut proxy = proxy.unwrap();
        proxy.resolve(Path::new("/etc/outrigger"));
        assert_eq!(proxy.state_dir(), Path::new("/etc/outrigger/./state"));
        assert_eq!(proxy.listen.outbound.unwrap()[0].port(), 15001);
    }
    for path in [
        "samples/control-plane.yaml",
        "tests/data/contract-control-plane.yaml",
    ] {
        let (plane, report) = bootstrap::load_control_plane(&read_source(&here(path)).unwrap());
        clean(&report);
        assert!(plane.unwrap().config.is_some());
    }
}

/// The samples with every commented key in force, but for those of which there must be only one.
#[test]
fn the_commented_keys_of_the_bootstrap_samples_are_read() {
    let text = std::fs::read_to_string(here("samples/proxy.yaml")).unwrap();
    let text: String = text
        .lines()
        .filter(|line| {
            !line.starts_with("mesh:")
                && !line.starts_with("#   controlPlane: {}")
                && !line.starts_with("#   workloadApi")
                && !line.starts_with("# yaml-language-server")
        })
        .map(|line| match line.strip_prefix("# ") {
            Some(rest) if rest.contains(':') && !rest.starts_with(char::is_uppercase) => {
                format!("{rest}\n")
            }
            _ => format!("{line}\n"),
        })
        .collect();
    let (proxy, report) = bootstrap::load_proxy(&Source::new("proxy.yaml", text));
    clean(&report);
    let proxy = proxy.unwrap();
    assert!(proxy.control_plane.is_some() && proxy.identity.is_some() && proxy.tracing.is_some());
}

#[test]
fn the_committed_schemas_are_those_of_the_types() {
    for (file, schema) in [
        ("schema/mesh.schema.json", schema::mesh()),
        ("schema/proxy.schema.json", schema::proxy()),
        ("schema/control-plane.schema.json", schema::control_plane()),
    ] {
        let text = format!("{schema:#}\n");
        if std::env::var_os("OUTRIGGER_UPDATE_SCHEMA").is_some() {
            std::fs::write(here(file), &text).unwrap();
        }
        let committed = std::fs::read_to_string(here(file)).unwrap_or_default();
        assert!(
            committed == text,
            "{file} is stale: run the tests with OUTRIGGER_UPDATE_SCHEMA=1"
        );
    }
}

/// A complete validator agrees with our own walk on the samples, and refuses what we refuse.
#[test]
fn a_complete_validator_accepts_the_samples_by_the_same_schema() {
    let validator = jsonschema::validator_for(&schema::mesh()).unwrap();
    for path in MESHES {
        let mesh = load_file(path).mesh.unwrap();
        for document in &mesh.documents {
            let errors: Vec<String> = validator
                .iter_errors(&document.canonical)
                .map(|error| format!("{}: {error}", error.instance_path()))
                .collect();
            assert_eq!(errors, Vec::<String>::new(), "{}", document.resource_name());
            let mut typo = document.canonical.clone();
            typo["spec"]["no-such-key"] = Value::Bool(true);
            assert_eq!(validator.is_valid(&typo), document.kind.is_gateway());
        }
    }
}
