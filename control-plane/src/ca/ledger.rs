//! Which roots sidecars need, and which may sign: the rules of replacing a root without a gap.
//!
//! Pure: `now` is passed, in seconds since 1970. The order is that of every rotation: hand a new
//! root out, let it sign when everybody has been told of it, take the old one back when nothing
//! lives that it signed.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::issuer::Root;

/// The roots, by fingerprint.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ledger {
    roots: BTreeMap<String, Entry>,
    dirty: bool,
}

/// What is kept of a root over a restart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Entry {
    /// Its certificate.
    pem: String,
    /// When it expires itself.
    not_after: u64,
    /// Whether the files list it.
    listed: bool,
    /// When the last certificate under it expires; 0: there is none.
    live_until: u64,
    /// The same, as it is on disk: never earlier, and mostly a little later.
    #[serde(default)]
    kept_until: u64,
    /// Until when certificates live whose owners were not told of this root.
    unaware_until: u64,
}

/// A [`Ledger`] as it is on disk.
pub type Saved = BTreeMap<String, Entry>;

impl Ledger {
    /// As it was on disk.
    pub fn restored(mut saved: Saved) -> Self {
        for entry in saved.values_mut() {
            entry.live_until = entry.live_until.max(entry.kept_until);
        }
        Self {
            roots: saved,
            dirty: false,
        }
    }

    /// Takes up the roots that the files list now. One that is listed no more stays while
    /// certificates under it live.
    pub fn list(&mut self, listed: &[Root], now: u64) {
        let before = self.roots.clone();
        let alive = self.roots.values().map(|entry| entry.live_until).max();
        let alive = alive.unwrap_or(0);
        for entry in self.roots.values_mut() {
            entry.listed = false;
        }
        for root in listed {
            let new = Entry {
                pem: root.pem().to_owned(),
                not_after: root.not_after(),
                listed: true,
                live_until: 0,
                kept_until: 0,
                unaware_until: alive,
            };
            self.roots
                .entry(root.fingerprint().to_owned())
                .or_insert(new)
                .listed = true;
        }
        self.roots
            .retain(|_, entry| entry.listed || entry.live_until > now);
        self.dirty |= self.roots != before;
    }

    /// The roots to hand out, PEM.
    pub fn bundle(&self, now: u64) -> Vec<String> {
        let needed = |entry: &&Entry| entry.listed || entry.live_until > now;
        let pem = |entry: &Entry| entry.pem.clone();
        self.roots.values().filter(needed).map(pem).collect()
    }

    /// Whether everybody who has a certificate was told of this root.
    pub fn may_sign(&self, fingerprint: &str, now: u64) -> bool {
        self.roots
            .get(fingerprint)
            .is_some_and(|entry| entry.unaware_until <= now)
    }

    /// A certificate under this root was signed. What is kept on disk runs ahead by an eighth of
    /// its life, so that most certificates need no write.
    pub fn issued(&mut self, fingerprint: &str, not_after: u64, ttl: std::time::Duration) {
        let Some(entry) = self.roots.get_mut(fingerprint) else {
            return;
        };
        entry.live_until = entry.live_until.max(not_after);
        if entry.kept_until < entry.live_until {
            entry.kept_until = entry.live_until + ttl.as_secs() / 8;
            self.dirty = true;
        }
    }

    /// What another authority with the same issuers says, which signs, too: a root is needed as
    /// long as any of us needs it.
    pub fn learn(&mut self, theirs: &Saved) {
        for (fingerprint, entry) in theirs {
            let live_until = entry.live_until.max(entry.kept_until);
            let ours = self.roots.entry(fingerprint.clone());
            let before = matches!(ours, std::collections::btree_map::Entry::Occupied(_));
            let ours = ours.or_insert_with(|| Entry {
                listed: false,
                ..entry.clone()
            });
            let known = ours.clone();
            ours.live_until = ours.live_until.max(live_until);
            ours.kept_until = ours.kept_until.max(live_until);
            ours.unaware_until = ours.unaware_until.max(entry.unaware_until);
            self.dirty |= !before || *ours != known;
        }
    }

    /// All of it.
    pub fn all(&self) -> Saved {
        self.roots.clone()
    }

    /// What must be on disk before anything more is signed; none when it is there.
    pub fn unsaved(&self) -> Option<Saved> {
        self.dirty.then(|| self.roots.clone())
    }

    /// It is there.
    pub fn saved(&mut self) {
        self.dirty = false;
    }

    /// For people.
    pub fn view(&self, now: u64) -> Vec<Value> {
        let root = |(fingerprint, entry): (&String, &Entry)| {
            let state = match entry {
                _ if entry.unaware_until > now => "announced",
                _ if entry.listed => "trusted",
                _ if entry.live_until > now => "leaving",
                _ => return None,
            };
            let later = |at: u64| (at > now).then_some(at);
            Some(json!({
                "sha256": fingerprint,
                "notAfter": entry.not_after,
                "state": state,
                "liveUntil": later(entry.live_until),
                "signsFrom": later(entry.unaware_until),
            }))
        };
        self.roots.iter().filter_map(root).collect()
    }

    /// When the last certificate under this root expires, if one lives.
    pub fn live_until(&self, fingerprint: &str, now: u64) -> Option<u64> {
        let entry = self.roots.get(fingerprint)?;
        (entry.live_until > now).then_some(entry.live_until)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    const TTL: Duration = Duration::from_secs(80);

    fn root(name: &str) -> Root {
        Root::named_for_tests(name)
    }

    #[test]
    fn the_first_root_signs_at_once() {
        let mut ledger = Ledger::default();
        ledger.list(&[root("a")], 100);
        assert!(ledger.may_sign("a", 100));
        assert!(!ledger.may_sign("b", 100));
        assert_eq!(ledger.bundle(100), ["a"]);
    }

    #[test]
    fn a_new_root_is_told_of_first_signs_next_and_the_old_one_goes_last() {
        let mut ledger = Ledger::default();
        ledger.list(&[root("a")], 100);
        ledger.issued("a", 180, TTL);
        // The files name only the new one: the worst that can be done.
        ledger.list(&[root("b")], 110);
        assert_eq!(ledger.bundle(110), ["a", "b"]);
        assert!(ledger.may_sign("a", 110) && !ledger.may_sign("b", 110));
        // Signed by the old one, but told of both: it does not put the new one off.
        ledger.issued("a", 200, TTL);
        assert!(!ledger.may_sign("b", 179) && ledger.may_sign("b", 180));
        ledger.issued("b", 270, TTL);
        assert_eq!(ledger.bundle(199), ["a", "b"]);
        assert_eq!(ledger.bundle(200), ["b"]);
        ledger.list(&[root("b")], 200);
        assert_eq!(ledger.roots.len(), 1);
        // Back again, it is a new one.
        ledger.list(&[root("a"), root("b")], 210);
        assert!(!ledger.may_sign("a", 210) && ledger.may_sign("a", 270));
    }

    #[test]
    fn what_is_on_disk_is_never_too_early_and_seldom_written() {
        let mut ledger = Ledger::default();
        ledger.list(&[root("a")], 0);
        let mut writes = 0;
        for at in 0..160 {
            ledger.issued("a", at + TTL.as_secs(), TTL);
            if let Some(saved) = ledger.unsaved() {
                writes += 1;
                let restored = Ledger::restored(saved.clone());
                assert!(restored.live_until("a", 0) >= Some(at + TTL.as_secs()));
                ledger.saved();
            }
        }
        assert!((10..=20).contains(&writes), "{writes} writes");
    }
}
