//! Texts to load, and reading them from a file or a directory.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// The largest file that a document may name.
const MAX_NAMED_BYTES: u64 = 1 << 20;

/// A text to load, and the name under which its problems are reported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// A file's path, or any other name.
    pub name: String,
    /// YAML, one document or several; JSON is YAML.
    pub text: String,
    /// The files in its directory and below that it may name, when it was read from a file.
    pub beside: Vec<(PathBuf, Arc<[u8]>)>,
}

impl Source {
    /// A text under a name.
    pub fn new(name: impl Into<String>, text: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            text: text.into(),
            beside: Vec::new(),
        }
    }
}

/// Reads a file, or the `*.yaml` and `*.yml` files of a directory and of its directories, sorted.
///
/// Names that begin with a dot are left out: editors' files, and the `..data` links by which
/// Kubernetes mounts a ConfigMap. Bytes that are not UTF-8 are replaced, and reported when they
/// are loaded. Files that the documents name (`.json`, `.pb`, `.binpb`, up to 1 MiB) come along.
///
/// # Errors
/// When the path or one of the files cannot be read.
pub fn read_sources(path: &Path) -> io::Result<Vec<Source>> {
    let files = if fs::metadata(path)?.is_dir() {
        files_of(path, 1, &|path| holds_documents(path))?
    } else {
        vec![path.to_owned()]
    };
    let mut sources: Vec<Source> = files
        .iter()
        .map(|file| read_source(file))
        .collect::<io::Result<_>>()?;
    let mut known = BTreeMap::new();
    for (source, file) in sources.iter_mut().zip(&files) {
        let directory = file.parent().filter(|path| !path.as_os_str().is_empty());
        let directory = directory.unwrap_or(Path::new("."));
        let near = known.entry(directory.to_owned()).or_insert_with(|| {
            files_of(directory, 1, &|path| may_be_named(path)).unwrap_or_default()
        });
        source.beside = named(&source.text, near);
    }
    Ok(sources)
}

/// What of `near` a text names, as it seems: what does not is never read.
fn named(text: &str, near: &[PathBuf]) -> Vec<(PathBuf, Arc<[u8]>)> {
    let seems = |path: &&PathBuf| {
        let name = path.file_name().and_then(|name| name.to_str());
        name.is_some_and(|name| text.contains(name))
    };
    let read = |path: &PathBuf| {
        let small = fs::metadata(path).is_ok_and(|found| found.len() <= MAX_NAMED_BYTES);
        let bytes = small.then(|| fs::read(path).ok()).flatten()?;
        Some((path.clone(), bytes.into()))
    };
    near.iter().filter(seems).filter_map(read).collect()
}

/// Whether documents may name it: a schema or a descriptor set.
fn may_be_named(path: &Path) -> bool {
    path.extension()
        .is_some_and(|ext| ext == "json" || ext == "pb" || ext == "binpb")
}

fn holds_documents(path: &Path) -> bool {
    path.extension()
        .is_some_and(|ext| ext == "yaml" || ext == "yml")
}

fn files_of(
    directory: &Path,
    deeper: u8,
    wanted: &dyn Fn(&Path) -> bool,
) -> io::Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    collect(directory, deeper, wanted, &mut files)?;
    files.sort();
    Ok(files)
}

/// Reads one file.
///
/// # Errors
/// When it cannot be read.
pub fn read_source(path: &Path) -> io::Result<Source> {
    let bytes = fs::read(path)
        .map_err(|error| io::Error::new(error.kind(), format!("{}: {error}", path.display())))?;
    let text = match String::from_utf8(bytes) {
        Ok(text) => text,
        Err(error) => String::from_utf8_lossy(error.as_bytes()).into_owned(),
    };
    Ok(Source::new(path.display().to_string(), text))
}

fn collect(
    directory: &Path,
    deeper: u8,
    wanted: &dyn Fn(&Path) -> bool,
    files: &mut Vec<PathBuf>,
) -> io::Result<()> {
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let hidden = path
            .file_name()
            .is_none_or(|name| name.to_string_lossy().starts_with('.'));
        if hidden {
            continue;
        }
        // `metadata` follows links: a ConfigMap's files are links into `..data`.
        let Ok(metadata) = fs::metadata(&path) else {
            continue;
        };
        if metadata.is_dir() {
            if deeper > 0 {
                collect(&path, deeper - 1, wanted, files)?;
            }
        } else if wanted(&path) {
            files.push(path);
        }
    }
    Ok(())
}
