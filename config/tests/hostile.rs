//! No text makes the loader panic, and what it writes it reads.

#![allow(clippy::unwrap_used)]

use outrigger_config::{Source, bootstrap, load};
use proptest::prelude::*;

const SAMPLES: [&str; 3] = [
    include_str!("../samples/minimal.yaml"),
    include_str!("../samples/full.yaml"),
    include_str!("data/contract-mesh.yaml"),
];

fn survive(text: &str) {
    let source = Source::new("it.yaml", text);
    let loaded = load(std::slice::from_ref(&source));
    assert_eq!(loaded.mesh.is_none(), loaded.report.has_errors());
    let lines = text.split('\n').count();
    for problem in &loaded.report.problems {
        assert!(problem.line >= 1 && problem.line <= lines + 1 && problem.column >= 1);
    }
    if let Some(mesh) = loaded.mesh {
        let sources: Vec<Source> = mesh
            .documents
            .iter()
            .map(|document| Source::new(document.resource_name(), document.to_json()))
            .collect();
        let again = load(&sources);
        assert_eq!(
            again.mesh.as_ref(),
            Some(&mesh),
            "{}",
            again.report.render_text()
        );
    }
    let _ = bootstrap::load_proxy(&source);
    let _ = bootstrap::load_control_plane(&source);
}

/// Pieces that mean something to a YAML reader.
const PIECES: [&str; 24] = [
    "\n",
    "---\n",
    "...\n",
    ": ",
    "- ",
    "{",
    "}",
    "[",
    "]",
    ",",
    "&a ",
    "*a",
    "!!str ",
    "|\n",
    ">-\n",
    "'",
    "\"",
    "#",
    "\t",
    "? ",
    "%YAML 1.2\n",
    "<<: ",
    "\u{0}",
    "\u{85}",
];

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_text(text in "\\PC*") {
        survive(&text);
    }

    #[test]
    fn any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        survive(&String::from_utf8_lossy(&bytes));
    }

    #[test]
    fn pieces(pieces in proptest::collection::vec(0..PIECES.len(), 0..60)) {
        survive(&pieces.iter().map(|n| PIECES[*n]).collect::<String>());
    }

    #[test]
    fn samples_with_changes(
        sample in 0..SAMPLES.len(),
        changes in proptest::collection::vec((any::<prop::sample::Index>(), 0usize..20, 0..PIECES.len()), 1..4),
    ) {
        let mut text: Vec<char> = SAMPLES[sample].chars().collect();
        for (at, cut, piece) in changes {
            let at = at.index(text.len());
            let end = (at + cut).min(text.len());
            text.splice(at..end, PIECES[piece].chars());
        }
        survive(&text.into_iter().collect::<String>());
    }

    #[test]
    fn any_text_within_a_document_comes_back(text in any::<String>()) {
        let text = text.replace('\u{fffd}', "?");
        let document = serde_json::json!({
            "apiVersion": "outrigger.dev/v1alpha1", "kind": "MeshService",
            "metadata": {"name": "a", "annotations": {text.clone(): text}},
            "spec": {"discovery": {"heartbeat": {}}},
        });
        // As a program would write it: escape what YAML does not print.
        let ascii: String = document.to_string().chars().map(|c| {
            if c.is_ascii() && c != '\u{7f}' { return c.to_string() }
            c.encode_utf16(&mut [0; 2]).iter().map(|unit| format!("\\u{unit:04x}")).collect()
        }).collect();
        let loaded = load(&[Source::new("it", ascii)]);
        let mesh = loaded.mesh.unwrap_or_else(|| panic!("{}", loaded.report.render_text()));
        prop_assert_eq!(&mesh.documents[0].canonical["metadata"]["annotations"], &document["metadata"]["annotations"]);
        for text in [mesh.documents[0].to_json(), mesh.documents[0].to_yaml()] {
            let again = load(&[Source::new("again", text)]);
            prop_assert_eq!(again.mesh.as_ref(), Some(&mesh));
        }
    }
}
