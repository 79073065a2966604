//! Texts to load, and reading them from a file or a directory.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// A text to load, and the name under which its problems are reported.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// A file's path, or any other name.
    pub name: String,
    /// YAML, one document or several; JSON is YAML.
    pub text: String,
}

impl Source {
    /// A text under a name.
    pub fn new(name: impl Into<String>, text: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            text: text.into(),
        }
    }
}

/// Reads a file, or the `*.yaml` and `*.yml` files of a directory and of its directories, sorted.
///
/// Names that begin with a dot are left out: editors' files, and the `..data` links by which
/// Kubernetes mounts a ConfigMap. Bytes that are not UTF-8 are replaced, and reported when they
/// are loaded.
///
/// # Errors
/// When the path or one of the files cannot be read.
pub fn read_sources(path: &Path) -> io::Result<Vec<Source>> {
    let mut files = Vec::new();
    if fs::metadata(path)?.is_dir() {
        collect(path, 1, &mut files)?;
        files.sort();
    } else {
        files.push(path.to_owned());
    }
    files.iter().map(|file| read_source(file)).collect()
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
    Ok(Source {
        name: path.display().to_string(),
        text,
    })
}

fn collect(directory: &Path, deeper: u8, files: &mut Vec<PathBuf>) -> io::Result<()> {
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
                collect(&path, deeper - 1, files)?;
            }
        } else if path
            .extension()
            .is_some_and(|ext| ext == "yaml" || ext == "yml")
        {
            files.push(path);
        }
    }
    Ok(())
}
