//! Every example's config is clean: no error, and no key that is not yet in effect.

use std::path::{Path, PathBuf};

use outrigger_config::{Report, bootstrap, load, read_source, read_sources};

fn examples() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let entries = std::fs::read_dir(root).expect("the package is there");
    let dirs = entries.map(|entry| entry.expect("readable").path());
    let mut dirs: Vec<_> = dirs.filter(|dir| dir.join("mesh.yaml").exists()).collect();
    dirs.sort();
    dirs
}

fn assert_clean(file: &Path, report: &Report) {
    assert_eq!(
        report.problems,
        [],
        "{}\n{}",
        file.display(),
        report.render_text()
    );
}

#[test]
fn every_example_is_clean() {
    let examples = examples();
    assert!(examples.len() >= 2, "{examples:?}");
    for dir in examples {
        let mesh = dir.join("mesh.yaml");
        assert_clean(&mesh, &load(&read_sources(&mesh).expect("readable")).report);
        let file = dir.join("proxy.yaml");
        let (proxy, report) = bootstrap::load_proxy(&read_source(&file).expect("readable"));
        assert_clean(&file, &report);
        let proxy = proxy.expect("a clean bootstrap");
        let named = proxy.mesh.expect("standalone");
        assert!(
            dir.join(&named).exists(),
            "{}: {}",
            file.display(),
            named.display()
        );
        assert!(
            dir.join("README.md").exists(),
            "{} has no README",
            dir.display()
        );
    }
}
