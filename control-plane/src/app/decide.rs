//! Which config is pushed: what the files say, what some sidecars try first, and the way back.
//!
//! Owns every change of the current config. A config with any error is refused whole and the last
//! good one goes on being pushed; it is also on disk, and is served after a restart while the files
//! are broken. Whether a trial goes on is said by `rollout.rs`, which versions there were by
//! `history.rs`. Stands on the life of a config update, between reading and pushing.

use std::io;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use outrigger_config::{Loaded, Problem, Severity, load, read_sources};
use serde::{Deserialize, Serialize};
use tracing::{error, info, warn};

use super::{App, Candidate, ConfigSource, Current, Rejected, lock};
use crate::clock;
use crate::history::{By, Change, History, Stopped};
use crate::rollout::{Trial, Verdict};
use crate::world::{Config, Origin};

/// What the leader of several control planes has decided, as the others are told.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) struct Announcement {
    /// The leader's name.
    pub(crate) by: String,
    /// What it pushes to everybody.
    version: String,
    /// What the files say and was taken back.
    withdrawn: Option<String>,
    /// Why.
    stopped: Option<Stopped>,
}

impl App {
    /// Reads the files, and takes the config up or refuses it.
    pub(crate) async fn reload(self: &Arc<Self>) {
        let app = self.clone();
        let work = move || {
            let _deciding = lock(&app.deciding);
            let sources = read_sources(&app.config_path);
            // The watch may have seen half of a save and this reading all of it; then the next
            // reading is the same, and has been decided about.
            let last = lock(&app.offered).take();
            if let Ok(sources) = &sources {
                *lock(&app.offered) = Some(sources.clone());
                if last.as_ref() == Some(sources) {
                    return;
                }
            }
            app.offer(sources.map(|sources| load(&sources)));
        };
        if let Err(e) = tokio::task::spawn_blocking(work).await {
            error!(error = %e, "config check failed; what was pushed before stays");
        }
    }

    /// Decides about a config that was read. Blocks on the disk.
    fn offer(&self, read: io::Result<Loaded>) {
        let loaded = match read {
            Ok(loaded) => loaded,
            Err(e) => return self.reject(vec![unreadable(&self.config_path, e.to_string())]),
        };
        let Some(mesh) = loaded.mesh.filter(|_| !loaded.report.has_errors()) else {
            return self.reject(loaded.report.problems);
        };
        if mesh.documents.is_empty() {
            let nothing = "no documents here; an empty config is not pushed";
            return self.reject(vec![unreadable(&self.config_path, nothing.into())]);
        }
        for problem in &loaded.report.problems {
            warn!(%problem, "config warning");
        }
        let config = Config::new(&mesh);
        let version = config.version.as_str();
        if self.config_state().rejected.take().is_some() {
            info!(version, "the config files are good again");
        }
        if !lock(&self.history).admits(version) {
            info!(version, "the files say what was taken back; it stays so");
            return;
        }
        self.introduce(Arc::new(config), loaded.report.problems);
    }

    /// What the files say gets to everybody, or to some first.
    fn introduce(&self, config: Arc<Config>, warnings: Vec<Problem>) {
        let state = self.config_state();
        let tried = state.candidate.as_ref().map(|c| &c.config.version);
        if tried == Some(&config.version) {
            return;
        }
        let pushed = state.current.as_ref().map(|c| &c.config.version);
        let is_news = pushed.is_some_and(|pushed| *pushed != config.version);
        drop(state);
        let announced = lock(&self.announced).clone();
        let is_decided = announced.is_some_and(|a| a.version == config.version) && !self.leads();
        if self.canary.is_some() && is_news && !is_decided {
            return self.try_out(config, warnings);
        }
        self.config_state().candidate = None;
        self.keep(&config, self.read_from_files());
        self.take_up(config, ConfigSource::File, warnings);
    }

    /// Some sidecars get it; [`App::judge`] says how it ends.
    fn try_out(&self, config: Arc<Config>, warnings: Vec<Problem>) {
        let version = config.version.clone();
        info!(version, "a new config is tried by some sidecars");
        self.config_state().candidate = Some(Candidate {
            config,
            began: clock::wall_millis(),
            trial: Trial::begin(version, clock::monotonic()),
            warnings,
        });
        self.follow_sources();
        self.dirty.notify_one();
        self.tell_replicas();
    }

    /// Looks at what the canaries say, if there are any.
    pub(super) async fn judge(self: &Arc<Self>) {
        if self.canary.is_none() || self.candidate().is_none() || !self.leads() {
            return;
        }
        let app = self.clone();
        let work = move || {
            let _deciding = lock(&app.deciding);
            app.judge_now();
        };
        if let Err(e) = tokio::task::spawn_blocking(work).await {
            error!(error = %e, "the trial of a config was not judged");
        }
    }

    fn judge_now(&self) {
        let Some(policy) = &self.canary else { return };
        let sidecars = self.proxies.sidecars(policy);
        let verdict = match &mut self.config_state().candidate {
            None => return,
            Some(candidate) => candidate.trial.judge(policy, &sidecars, clock::monotonic()),
        };
        match verdict {
            Verdict::Wait(false) => {}
            Verdict::Wait(true) => self.dirty.notify_one(),
            Verdict::Promote(tried) => {
                if !tried {
                    warn!("there was no sidecar to try the config");
                }
                self.finish();
            }
            Verdict::Stop { sidecar, reason } => self.take_back(sidecar, reason),
        }
    }

    /// Everybody gets the config on trial. True when there was one. Blocks on the disk.
    fn finish(&self) -> bool {
        let Some(candidate) = self.config_state().candidate.take() else {
            return false;
        };
        self.keep(&candidate.config, self.read_from_files());
        count(&self.counters.promoted);
        self.take_up(candidate.config, ConfigSource::File, candidate.warnings);
        true
    }

    /// Everybody gets the config on trial now.
    ///
    /// # Errors
    /// For people: there is none.
    pub fn promote(&self) -> Result<String, String> {
        let _deciding = lock(&self.deciding);
        match self.finish() {
            true => Ok(self.version()),
            false => Err("no config is on trial".to_owned()),
        }
    }

    /// Everybody goes on with the config before the one on trial.
    fn take_back(&self, sidecar: String, reason: String) {
        let Some(candidate) = self.config_state().candidate.take() else {
            return;
        };
        let version = candidate.config.version.clone();
        error!(
            version,
            sidecar, reason, "a config on trial was refused; the one before stays in effect"
        );
        count(&self.counters.stopped);
        let at = clock::wall_millis();
        let who = match sidecar.as_str() {
            "" => "its trial",
            sidecar => sidecar,
        };
        let summary = format!("config {version} was stopped by {who}: {reason}");
        lock(&self.history).stop(Stopped {
            version,
            at,
            sidecar,
            reason,
        });
        self.save_history();
        let mut state = self.config_state();
        if let Some(current) = &mut state.current {
            current.source = ConfigSource::Rollback;
        }
        state.rejected = Some(Rejected {
            at,
            summary,
            problems: Vec::new(),
        });
        drop(state);
        self.follow_sources();
        self.dirty.notify_one();
        self.tell_replicas();
    }

    /// The trial of a config begins anew: whoever judged it before is gone.
    pub(super) fn try_anew(&self) {
        let now = clock::monotonic();
        if let Some(candidate) = &mut self.config_state().candidate {
            candidate.trial = Trial::begin(candidate.config.version.clone(), now);
        }
    }

    /// What the other control planes are told when this one leads.
    pub(crate) fn announcement(&self, by: &str) -> Vec<u8> {
        let history = self.history();
        let announcement = Announcement {
            by: by.to_owned(),
            version: self.version(),
            withdrawn: history.withdrawn().map(str::to_owned),
            stopped: history.stopped().cloned(),
        };
        serde_json::to_vec(&announcement).unwrap_or_default()
    }

    /// Does what the leader has decided. Files that say something new are taken up as they are
    /// read, so a leader that has not read them yet takes nothing away: what counts is what it
    /// promotes, takes back, and goes back to. Blocks on the disk.
    pub(crate) fn heed(&self, said: Announcement) {
        let _deciding = lock(&self.deciding);
        *lock(&self.announced) = Some(said.clone());
        let candidate = self.candidate().map(|c| c.config.version.clone());
        if candidate.as_ref() == Some(&said.version) {
            self.finish();
            return;
        }
        if said.withdrawn.is_some() && candidate == said.withdrawn {
            self.config_state().candidate = None;
        }
        let ours = self.history().withdrawn().map(str::to_owned);
        if ours != said.withdrawn {
            lock(&self.history).agree(said.withdrawn.clone(), said.stopped.clone());
            self.save_history();
        }
        let current = self.version();
        let is_taken_back = said.withdrawn.as_ref() == Some(&current);
        let is_forth_again = said.withdrawn.is_none() && ours.as_ref() == Some(&said.version);
        if current == said.version || !(is_taken_back || is_forth_again) {
            return;
        }
        let (config, warnings) = match self.earlier(Some(&said.version)) {
            Ok(found) => found,
            Err(problem) => {
                error!(
                    version = said.version,
                    leader = said.by,
                    problem,
                    "the leader pushes a config that is not known here"
                );
                return;
            }
        };
        let source = match is_forth_again {
            true => ConfigSource::File,
            false => ConfigSource::Rollback,
        };
        let change = Change {
            by: By::Rollback,
            who: said.by,
            reason: None,
        };
        self.keep(&config, change);
        self.take_up(Arc::new(config), source, warnings);
    }

    /// The version being pushed; empty before the first.
    fn version(&self) -> String {
        let state = self.config_state();
        let current = state.current.as_ref();
        current.map_or_else(String::new, |c| c.config.version.clone())
    }

    fn read_from_files(&self) -> Change {
        Change {
            by: By::Files,
            who: self.config_path.display().to_string(),
            reason: None,
        }
    }

    /// Keeps a config that is about to be pushed, and its place among the others.
    fn keep(&self, config: &Config, change: Change) {
        if let Err(e) = self.state.save_config(config) {
            warn!(error = %e, "the last good config was not saved");
        }
        lock(&self.history).push(config, change, clock::wall_millis());
        self.save_history();
    }

    fn save_history(&self) {
        let history = self.history();
        if let Err(e) = self.state.save_history(&history) {
            warn!(error = %e, "the history of configs was not saved");
        }
    }

    /// A copy of the versions that were pushed.
    pub fn history(&self) -> History {
        lock(&self.history).clone()
    }

    /// Pushes an earlier version again: the one of this name, or the one before the newest, which,
    /// while one is on trial, is the one being pushed. It stays until the files say something else
    /// than now. Blocks on the disk.
    ///
    /// # Errors
    /// For people: there is no such version, or it no longer loads.
    pub fn roll_back(&self, to: Option<&str>, change: Change) -> Result<String, String> {
        let _deciding = lock(&self.deciding);
        let (config, warnings) = self.earlier(to)?;
        let version = config.version.clone();
        let state = self.config_state();
        let candidate = state.candidate.as_ref().map(|c| c.config.version.clone());
        let current = state.current.as_ref();
        let current = current.filter(|c| c.source == ConfigSource::File);
        let files = candidate.or(current.map(|c| c.config.version.clone()));
        drop(state);
        let source = match lock(&self.history).go_to(&version, files.as_deref()) {
            true => ConfigSource::File,
            false => ConfigSource::Rollback,
        };
        let who = change.who.clone();
        self.config_state().candidate = None;
        self.keep(&config, change);
        count(&self.counters.rolled_back);
        warn!(version, who, ?source, "an earlier config is pushed again");
        self.take_up(Arc::new(config), source, warnings);
        Ok(version)
    }

    /// The version that [`App::roll_back`] would go to.
    ///
    /// # Errors
    /// For people: there is no such version, or it no longer loads.
    pub fn earlier(&self, to: Option<&str>) -> Result<(Config, Vec<Problem>), String> {
        let on_trial = self.candidate().is_some();
        let history = self.history();
        let target = match to {
            Some(to) => history.versions().find(|version| version.version == to),
            None => history.versions().nth(usize::from(!on_trial)),
        };
        let Some(target) = target else {
            return Err(match to {
                Some(to) => format!("version {to} is not among the last ones"),
                None => "there is no version before the newest".to_owned(),
            });
        };
        let loaded = load(&target.sources());
        match loaded.mesh.filter(|_| !loaded.report.has_errors()) {
            Some(mesh) => Ok((Config::new(&mesh), loaded.report.problems)),
            None => Err(format!(
                "it no longer loads: {}",
                loaded.report.render_text()
            )),
        }
    }

    fn take_up(&self, config: Arc<Config>, source: ConfigSource, warnings: Vec<Problem>) {
        let (version, documents) = (config.version.clone(), config.documents.len());
        if let Some(authority) = self.guard.authority() {
            authority.set_trust_domain(config.trust_domain.as_deref());
        }
        let mut registry = lock(&self.registry);
        for (service, origin) in &config.services {
            if let Origin::Heartbeat(lease) = origin {
                registry.set_lease(service, *lease);
            }
        }
        drop(registry);
        let mut state = self.config_state();
        let unchanged = state
            .current
            .as_ref()
            .filter(|c| c.config.version == version);
        let applied = unchanged.map_or_else(clock::wall_millis, |c| c.applied);
        if unchanged.is_none() {
            info!(version, documents, "config taken up");
        }
        state.current = Some(Current {
            config,
            source,
            applied,
            warnings,
        });
        drop(state);
        self.follow_sources();
        self.dirty.notify_one();
        self.tell_replicas();
    }

    /// Has every service looked up that anybody is told of.
    fn follow_sources(&self) {
        let services = self.services().unwrap_or_default().into_iter();
        let looked_up = services.filter_map(|(service, origin)| match origin {
            Origin::Discovered(origin) => Some((service, origin)),
            _ => None,
        });
        self.sources.follow(&looked_up.collect());
    }

    fn reject(&self, problems: Vec<Problem>) {
        count(&self.counters.config_rejected);
        for problem in &problems {
            match problem.severity {
                Severity::Error => error!(%problem, "config error"),
                Severity::Warning => warn!(%problem, "config warning"),
            }
        }
        let errors = problems
            .iter()
            .filter(|p| p.severity == Severity::Error)
            .count();
        let mut state = self.config_state();
        let kept = state
            .current
            .as_ref()
            .map_or("none", |c| c.config.version.as_str());
        let summary = format!("{errors} error(s); config version in effect: {kept}");
        error!(
            errors,
            kept, "config refused; the last good one stays in effect"
        );
        state.rejected = Some(Rejected {
            at: clock::wall_millis(),
            summary,
            problems,
        });
    }

    /// Before the first read: where configs are tried, everybody goes on with what they had, so
    /// that a restart is no way around the trial.
    pub(super) fn resume(&self) {
        if self.canary.is_some()
            && let Ok(Some((config, warnings))) = self.last_good()
        {
            let source = match lock(&self.history).withdrawn() {
                Some(_) => ConfigSource::Rollback,
                None => ConfigSource::LastGood,
            };
            self.take_up(Arc::new(config), source, warnings);
        }
    }

    /// After a first read that was refused: the copy of the last run, if it is usable.
    pub(super) fn fall_back(&self) {
        if self.current().is_some() {
            return;
        }
        let (config, warnings) = match self.last_good() {
            Ok(Some(kept)) => kept,
            Ok(None) => {
                error!("no usable config and no last good one: not ready, nothing is pushed");
                return;
            }
            Err(e) => {
                error!(error = %e, "no usable config: not ready, nothing is pushed");
                return;
            }
        };
        let version = config.version.as_str();
        if lock(&self.history).withdrawn().is_some() && self.rejected().is_none() {
            warn!(version, "the config that was gone back to is pushed again");
            return self.take_up(Arc::new(config), ConfigSource::Rollback, warnings);
        }
        error!(
            path = %self.config_path.display(),
            version,
            "THE CONFIG IS BROKEN: SERVING THE LAST GOOD ONE FROM THE STATE DIRECTORY"
        );
        self.take_up(Arc::new(config), ConfigSource::LastGood, warnings);
    }

    /// The config that was pushed last; `None` when none was kept.
    fn last_good(&self) -> Result<Option<(Config, Vec<Problem>)>, String> {
        let kept = self.state.load_config().map_err(|e| e.to_string())?;
        let Some(sources) = kept else {
            return Ok(None);
        };
        let loaded = load(&sources);
        match loaded.mesh {
            Some(mesh) => Ok(Some((Config::new(&mesh), loaded.report.problems))),
            None => Err(format!(
                "the last good config no longer loads: {}",
                loaded.report.render_text()
            )),
        }
    }
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

fn unreadable(path: &Path, message: String) -> Problem {
    Problem {
        severity: Severity::Error,
        code: "E001",
        file: path.display().to_string(),
        line: 1,
        column: 1,
        path: String::new(),
        message,
        help: None,
    }
}
