//! Who replayed or deleted what: one line of JSON for each, in `audit.jsonl` of the state directory.
//!
//! A person is who they say they are: the admin API takes changes from this machine only, and knows
//! no names. On the message's life.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde_json::{Value, json};
use tracing::error;

use crate::app::Shared;

/// The file in the state directory.
const FILE: &str = "audit.jsonl";

/// A file that has grown to this is set aside as `audit.jsonl.1`, in place of the one before.
const MAX_BYTES: u64 = 16 * 1024 * 1024;

/// Adds a line. A failure is told to the log and to nobody else: what the line is about is done.
pub(super) async fn record(shared: &Arc<Shared>, entry: Value) {
    let file = file(shared);
    let adding = tokio::task::spawn_blocking(move || add(&file, &entry, MAX_BYTES));
    match adding.await {
        Ok(Ok(())) => {}
        Ok(Err(error)) => error!(%error, "no line added to audit.jsonl"),
        Err(error) => error!(%error, "no line added to audit.jsonl"),
    }
}

fn file(shared: &Shared) -> PathBuf {
    shared.bootstrap.state_dir().join(FILE)
}

fn add(file: &Path, entry: &Value, max_bytes: u64) -> io::Result<()> {
    if fs::metadata(file).is_ok_and(|found| found.len() >= max_bytes) {
        fs::rename(file, file.with_extension("jsonl.1"))?;
    }
    let mut out = OpenOptions::new().create(true).append(true).open(file)?;
    out.write_all(format!("{entry}\n").as_bytes())?;
    out.sync_data()
}

/// The latest lines, the newest first: `{"audit":[{"at","by","action","queue","filter","to",
/// "requestsPerSecond","ids","skipped"}]}`; `?limit=`, 50 without one.
pub async fn latest(shared: &Arc<Shared>, get: &dyn Fn(&str) -> Option<String>) -> Value {
    let limit = get("limit").and_then(|limit| limit.parse().ok());
    let limit: usize = limit.unwrap_or(50);
    let file = file(shared);
    let reading = tokio::task::spawn_blocking(move || read(&file, limit));
    json!({"audit": reading.await.unwrap_or_default()})
}

fn read(file: &Path, limit: usize) -> Vec<Value> {
    let text = fs::read_to_string(file).unwrap_or_default();
    let lines = text.lines().rev().take(limit);
    lines
        .filter_map(|line| serde_json::from_str(line).ok())
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_newest_first_and_a_long_file_is_set_aside() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join(FILE);
        assert_eq!(read(&file, 9), Vec::<Value>::new());
        for n in 0..3 {
            add(&file, &json!({"n": n}), 1_000).unwrap();
        }
        assert_eq!(read(&file, 2), [json!({"n": 2}), json!({"n": 1})]);
        add(&file, &json!({"n": 3}), 10).unwrap();
        assert_eq!(read(&file, 9), [json!({"n": 3})]);
        assert_eq!(read(&dir.path().join("audit.jsonl.1"), 9).len(), 3);
    }
}
