//! The configs that were pushed, one after another: what each changed, when and why, and the way
//! back to one of them.
//!
//! Owns the list and what a rollback leaves behind: the version that the files still say and that
//! is not to be taken up again. Pure; `state.rs` keeps it on disk. Stands on the life of a config
//! update, beside `app.rs`.

use std::collections::{BTreeMap, VecDeque};

use outrigger_config::Source;
use serde::{Deserialize, Serialize};

use crate::world::Config;

/// How many versions are kept.
pub const KEEP: usize = 20;

/// Why a version was pushed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum By {
    /// The watched files said so.
    Files,
    /// Somebody went back to it.
    Rollback,
}

/// Who pushed a version, and why.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Change {
    /// Why.
    pub by: By,
    /// The watched path, or who asked for the rollback.
    pub who: String,
    /// What they said.
    pub reason: Option<String>,
}

/// A config that was tried and taken back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Stopped {
    /// Its name everywhere.
    pub version: String,
    /// When it was taken back, in milliseconds since 1970.
    pub at: u64,
    /// The sidecar that refused it; empty when the canaries were lost.
    pub sidecar: String,
    /// Why, in its words.
    pub reason: String,
}

/// One version.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Version {
    /// Its name everywhere.
    pub version: String,
    /// When it was taken up, in milliseconds since 1970.
    pub at: u64,
    /// Why.
    pub by: By,
    /// The watched path, or who asked for the rollback.
    #[serde(default)]
    pub who: String,
    /// What they said.
    #[serde(default)]
    pub reason: Option<String>,
    /// Documents that the version before did not have.
    pub added: Vec<String>,
    /// Documents that differ from those of the version before.
    pub changed: Vec<String>,
    /// Documents that only the version before had.
    pub removed: Vec<String>,
    /// All of its documents, by name.
    documents: BTreeMap<String, String>,
}

impl Version {
    /// Its documents as texts to load.
    pub fn sources(&self) -> Vec<Source> {
        let all = self.documents.iter();
        all.map(|(name, json)| Source::new(format!("{}: {name}", self.version), json.clone()))
            .collect()
    }
}

/// The last [`KEEP`] versions, the newest last.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct History {
    versions: VecDeque<Version>,
    withdrawn: Option<String>,
    #[serde(default)]
    stopped: Option<Stopped>,
}

impl History {
    /// The versions, the newest first.
    pub fn versions(&self) -> impl Iterator<Item = &Version> {
        self.versions.iter().rev()
    }

    /// The version that the files say and that was taken back.
    pub fn withdrawn(&self) -> Option<&str> {
        self.withdrawn.as_deref()
    }

    /// What was tried and taken back, while the files still say it.
    pub fn stopped(&self) -> Option<&Stopped> {
        self.stopped.as_ref()
    }

    /// Notes that a config is pushed from now on; the same as before is no news. True when it was.
    pub fn push(&mut self, config: &Config, change: Change, at: u64) -> bool {
        let nothing = BTreeMap::new();
        let last = self.versions.back();
        if last.is_some_and(|last| last.version == config.version) {
            return false;
        }
        let before = last.map_or(&nothing, |last| &last.documents);
        let documents: BTreeMap<String, String> = config
            .documents
            .values()
            .map(|entry| (entry.name.clone(), entry.json.clone()))
            .collect();
        let (mut added, mut changed) = (Vec::new(), Vec::new());
        for (name, json) in &documents {
            match before.get(name) {
                None => added.push(name.clone()),
                Some(old) if old != json => changed.push(name.clone()),
                Some(_) => {}
            }
        }
        let is_gone = |name: &&String| !documents.contains_key(*name);
        let removed = before.keys().filter(is_gone).cloned().collect();
        self.versions.push_back(Version {
            version: config.version.clone(),
            at,
            by: change.by,
            who: change.who,
            reason: change.reason,
            added,
            changed,
            removed,
            documents,
        });
        if self.versions.len() > KEEP {
            self.versions.pop_front();
        }
        true
    }

    /// Somebody goes to `version`, from `files` if the files say what is being pushed. True when
    /// the files say the one gone to; else what they say is withdrawn until they say another.
    pub fn go_to(&mut self, version: &str, files: Option<&str>) -> bool {
        let files = files.or(self.withdrawn());
        let is_theirs = files == Some(version);
        self.withdrawn = files.filter(|_| !is_theirs).map(str::to_owned);
        self.stopped = None;
        is_theirs
    }

    /// Another control plane decided what is withdrawn.
    pub fn agree(&mut self, withdrawn: Option<String>, stopped: Option<Stopped>) {
        self.withdrawn = withdrawn;
        self.stopped = stopped;
    }

    /// What the files say was tried and is taken back until they say another.
    pub fn stop(&mut self, stopped: Stopped) {
        self.withdrawn = Some(stopped.version.clone());
        self.stopped = Some(stopped);
    }

    /// Whether a config from the files is to be taken up. One that is not the withdrawn ends the
    /// withdrawal.
    pub fn admits(&mut self, version: &str) -> bool {
        if self.withdrawn() == Some(version) {
            return false;
        }
        self.withdrawn = None;
        self.stopped = None;
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::world::DocumentEntry;

    fn config(version: &str, documents: &[(&str, &str)]) -> Config {
        let entry = |(name, json): &(&str, &str)| {
            let entry = DocumentEntry {
                name: (*name).to_owned(),
                json: (*json).to_owned(),
                generation: 0,
            };
            ((*name).to_owned(), entry)
        };
        Config {
            version: version.to_owned(),
            documents: documents.iter().map(entry).collect(),
            ..Config::default()
        }
    }

    fn files() -> Change {
        Change {
            by: By::Files,
            who: "mesh".into(),
            reason: None,
        }
    }

    #[test]
    fn a_version_knows_what_it_changed() {
        let mut history = History::default();
        assert!(history.push(&config("1", &[("a", "x"), ("b", "x")]), files(), 1));
        assert!(history.push(&config("2", &[("b", "y"), ("c", "x")]), files(), 2));
        assert!(!history.push(&config("2", &[("b", "y"), ("c", "x")]), files(), 3));
        let newest = history.versions().next().expect("there are two");
        assert_eq!(newest.added, ["c"]);
        assert_eq!(newest.changed, ["b"]);
        assert_eq!(newest.removed, ["a"]);
        let texts: Vec<_> = newest.sources().into_iter().map(|s| s.text).collect();
        assert_eq!(texts, ["y", "x"]);
    }

    #[test]
    fn twenty_versions_are_kept() {
        let mut history = History::default();
        for n in 0..30 {
            history.push(&config(&n.to_string(), &[]), files(), n);
        }
        let kept: Vec<_> = history.versions().map(|v| v.at).collect();
        assert_eq!(kept.len(), KEEP);
        assert_eq!((kept[0], kept[KEEP - 1]), (29, 10));
    }

    #[test]
    fn what_was_withdrawn_is_not_taken_up_until_the_files_change() {
        let mut history = History::default();
        assert!(!history.go_to("1", Some("2")));
        assert_eq!(history.withdrawn(), Some("2"));
        assert!(!history.admits("2"));
        assert!(!history.admits("2"));
        assert!(history.admits("3"));
        assert!(history.admits("2"));
        // Forth, back, and forth again: the files have said 2 all the time.
        assert!(!history.go_to("1", Some("2")) && !history.go_to("0", None));
        assert!(history.go_to("2", None) && history.admits("2"));
        // What a sidecar refused is not tried again until the files have changed.
        history.stop(Stopped {
            version: "3".into(),
            at: 1,
            sidecar: "shop/web-1".into(),
            reason: "no".into(),
        });
        assert!(!history.admits("3") && history.stopped().is_some());
        assert!(history.admits("4") && history.stopped().is_none());
    }
}
