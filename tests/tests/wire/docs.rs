//! `proxy/WIRE.md` has a row for every case, and no other.

use std::collections::BTreeSet;

use crate::{chunks, passed, refused, responses, streams, upstreams};

const WIRE: &str = include_str!("../../../proxy/WIRE.md");

/// Tests that are no table: each is a case itself.
const SOURCES: [&str; 3] = [
    include_str!("exchanges.rs"),
    include_str!("upstreams.rs"),
    include_str!("fidelity.rs"),
];

/// Tests that run a table.
const RUNNERS: [&str; 2] = [
    "what_an_h2_service_does_to_a_stream_is_told_as_what_it_is",
    "an_h2_service_that_is_none_is_told_as_such",
];

fn cases() -> Vec<String> {
    let mut names: Vec<&str> = Vec::new();
    names.extend(refused::FIELDS.iter().map(|case| case.0));
    names.extend(refused::LINES.iter().map(|case| case.0));
    names.extend(refused::HEADS.iter().map(|case| case.0));
    names.extend(refused::large().iter().map(|case| case.0));
    names.extend(chunks::BROKEN.iter().map(|case| case.0));
    names.extend(chunks::broken_large().iter().map(|case| case.0));
    names.extend(chunks::WHOLE.iter().map(|case| case.0));
    names.extend(passed::CASES.iter().map(|case| case.0));
    names.extend(passed::large().iter().map(|case| case.0));
    names.extend(responses::REFUSED.iter().map(|case| case.0));
    names.extend(responses::refused_large().iter().map(|case| case.0));
    names.extend(responses::lost().iter().map(|case| case.0));
    names.extend(responses::cut().iter().map(|case| case.0));
    names.extend(responses::passed().iter().map(|case| case.0));
    names.extend(streams::REFUSED.iter().map(|case| case.0));
    names.extend(streams::PASSED.iter().map(|case| case.0));
    names.extend(upstreams::names());
    let tests = SOURCES.iter().flat_map(|source| {
        let after = source.split("#[tokio::test").skip(1);
        after.filter_map(|test| test.split("async fn ").nth(1)?.split('(').next())
    });
    names.extend(tests.filter(|name| !RUNNERS.contains(name)));
    names.into_iter().map(str::to_owned).collect()
}

/// The names in the first column of its tables.
fn rows() -> Vec<String> {
    let rows = WIRE.lines().filter_map(|line| line.strip_prefix("| `"));
    rows.flat_map(|row| {
        let names = row.split(" | ").next().unwrap_or_default();
        names
            .split("`, `")
            .map(|name| name.trim_end_matches('`').to_owned())
    })
    .collect()
}

#[test]
fn every_case_has_a_row_and_every_row_a_case() {
    let (cases, rows) = (cases(), rows());
    let (tested, told): (BTreeSet<_>, BTreeSet<_>) =
        (cases.iter().collect(), rows.iter().collect());
    assert_eq!(tested.len(), cases.len(), "a name is used twice: {cases:?}");
    assert_eq!(told.len(), rows.len(), "a row is there twice: {rows:?}");
    let untold: Vec<_> = tested.difference(&told).collect();
    let untested: Vec<_> = told.difference(&tested).collect();
    assert!(
        untold.is_empty() && untested.is_empty(),
        "not in WIRE.md: {untold:#?}\nnot tested: {untested:#?}"
    );
}

#[test]
fn the_readme_leads_to_it() {
    assert!(include_str!("../../../README.md").contains("proxy/WIRE.md"));
}
