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

const METRICS: &str = include_str!("../../proxy/src/telemetry/metrics.rs");
const LIMITS: &str = include_str!("../../proxy/LIMITS.md");

/// What stands in backticks.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    text.split('`').skip(1).step_by(2)
}

/// Whether a schema has a property of this name, anywhere.
fn has_property(schema: &serde_json::Value, name: &str) -> bool {
    match schema {
        serde_json::Value::Object(members) => {
            let properties = members.get("properties").and_then(|of| of.as_object());
            properties.is_some_and(|of| of.contains_key(name))
                || members.values().any(|member| has_property(member, name))
        }
        serde_json::Value::Array(items) => items.iter().any(|item| has_property(item, name)),
        _ => false,
    }
}

#[test]
fn every_key_of_wire_is_among_the_limits() {
    let schema = outrigger_config::schema::proxy();
    let wire = schema["$defs"]["WireSpec"]["properties"].as_object();
    for key in wire.expect("the schema describes wire").keys() {
        let quoted = format!("`wire.{key}`");
        assert!(LIMITS.contains(&quoted), "LIMITS.md has no {quoted}");
    }
}

#[test]
fn what_the_limits_name_exists() {
    let schemas = [
        outrigger_config::schema::proxy(),
        outrigger_config::schema::mesh(),
    ];
    let rows: Vec<&str> = LIMITS
        .lines()
        .filter(|line| line.starts_with("| "))
        .collect();
    assert!(rows.len() > 40, "{} rows", rows.len());
    let mut codes = 0;
    for row in rows {
        for name in quoted(row) {
            if let Some(metric) = name.strip_prefix("outrigger_") {
                let family = metric.split('{').next().unwrap_or_default();
                let known = METRICS.contains(&format!("\"outrigger_{family}\""));
                assert!(known, "no metric {name}");
            } else if let Some((group, key)) = name.split_once('.') {
                let ours = ["wire", "limits", "timeouts", "retry", "async"];
                let known = schemas.iter().any(|schema| has_property(schema, key));
                assert!(!ours.contains(&group) || known, "no key {name}: {row}");
            } else if is_code(row, name) {
                codes += 1;
                assert!(
                    ErrorCode::ALL.iter().any(|code| code.as_str() == name),
                    "{row}"
                );
            }
        }
    }
    assert!(codes > 10, "{codes} codes");
}

/// Whether a row gives the name as the code of an answer: after its status.
fn is_code(row: &str, name: &str) -> bool {
    let Some(before) = row.split(&format!("`{name}`")).next() else {
        return false;
    };
    let status = before.trim_end().rsplit(' ').next().unwrap_or_default();
    status.len() == 3 && status.bytes().all(|byte| byte.is_ascii_digit())
}

#[test]
fn every_limit_that_is_counted_is_named() {
    for limit in outrigger_proxy::telemetry::limits::WireLimit::ALL {
        let name = format!("rejected `{}`", limit.as_str());
        assert!(LIMITS.contains(&name), "LIMITS.md has no {name}");
    }
}
