//! What the documents promise is there.

use outrigger_config::Source;
use outrigger_core::error_code::ErrorCode;

const README: &str = include_str!("../../README.md");

#[test]
fn every_error_code_has_a_row_that_says_what_to_do() {
    for code in ErrorCode::ALL {
        let start = format!("| `{}` | ", code.as_str());
        let row = README.lines().find(|line| line.starts_with(&start));
        let row = row.unwrap_or_else(|| panic!("README has no row for {code}"));
        if *code != ErrorCode::FaultInjected {
            let status = format!("| {} / {} |", code.status().as_u16(), code.grpc().number());
            assert!(row.contains(&status), "{row} should say {status}");
        }
    }
}

#[test]
fn the_first_screen_names_the_two_commands() {
    let first: String = README.lines().take(20).collect::<Vec<_>>().join("\n");
    for command in ["cargo run --release -- demo", "tests/run"] {
        assert!(first.contains(command), "{command}");
    }
}

/// The first YAML blocks of the README: a mesh, a bootstrap, and more of the mesh.
fn blocks() -> Vec<&'static str> {
    README
        .split("```yaml\n")
        .skip(1)
        .filter_map(|rest| rest.split("```").next())
        .collect()
}

#[test]
fn the_config_on_the_first_screens_is_accepted_as_it_stands() {
    let blocks = blocks();
    let [mesh, bootstrap, more] = blocks[..] else {
        panic!("{} YAML blocks", blocks.len())
    };
    let sources = [
        Source::new("mesh.yaml", mesh),
        Source::new("more.yaml", more),
    ];
    let report = outrigger_config::load(&sources).report;
    assert!(report.problems.is_empty(), "{}", report.render_text());
    let source = Source::new("proxy.yaml", bootstrap);
    let (_, report) = outrigger_config::bootstrap::load_proxy(&source);
    assert!(report.problems.is_empty(), "{}", report.render_text());
}
