//! The record of every certificate that was signed, and of every refusal.
//!
//! One JSON object a line in `ca-audit.jsonl` of the state directory, and an event in the log. At
//! 16 MiB the file becomes `ca-audit.jsonl.1`, in the place of the one before it: about a hundred
//! thousand certificates.

use std::fs::{self, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};
use tracing::{info, warn};

use super::Refused;
use super::credentials::Caller;
use super::issuer::Issued;
use crate::clock;

const FILE: &str = "ca-audit.jsonl";
const MAX_BYTES: u64 = 16 << 20;

/// Where the record is.
#[derive(Debug)]
pub struct Audit {
    path: PathBuf,
}

impl Audit {
    /// In the state directory.
    pub fn new(state_dir: &Path) -> Self {
        Self {
            path: state_dir.join(FILE),
        }
    }

    /// A certificate was signed.
    pub fn issued(&self, caller: &Caller, issued: &Issued) {
        let (by, peer) = (caller.credential(), &caller.peer);
        let (id, serial) = (issued.id.as_str(), &issued.serial);
        let not_after = issued.not_after;
        info!(id, serial, not_after, by, peer, "certificate issued");
        self.write(&json!({
            "at": clock::wall_millis(), "event": "issued", "id": id, "serial": serial,
            "notAfter": not_after, "issuer": issued.issuer, "by": by, "peer": peer,
        }));
    }

    /// It was not.
    pub fn refused(&self, caller: &Caller, refused: &Refused) {
        let (by, peer) = (caller.credential(), &caller.peer);
        let (reason, detail) = (refused.reason(), refused.to_string());
        warn!(reason, detail, by, peer, "certificate refused");
        self.write(&json!({
            "at": clock::wall_millis(), "event": "refused", "reason": reason, "detail": detail,
            "by": by, "peer": peer,
        }));
    }

    fn write(&self, entry: &Value) {
        if let Err(e) = self.append(&format!("{entry}\n")) {
            warn!(error = %e, path = %self.path.display(), "the audit was not written");
        }
    }

    fn append(&self, line: &str) -> io::Result<()> {
        if fs::metadata(&self.path).is_ok_and(|file| file.len() > MAX_BYTES) {
            fs::rename(&self.path, self.path.with_extension("jsonl.1"))?;
        }
        let mut file = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(&self.path)?;
        file.write_all(line.as_bytes())
    }
}
