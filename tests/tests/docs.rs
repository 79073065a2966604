//! What the documents promise is there.

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
