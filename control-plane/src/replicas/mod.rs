//! Several control planes as one: what they tell each other, and which of them leads.
//!
//! Owns the tasks and what they have learnt; the store is a directory (one machine) or etcd. Stands
//! on the life of a config update, beside the registry and `app/decide.rs`.
//!
//! Config and endpoints of other registries are no matter of it: every replica reads the same
//! sources and makes the same bytes of them. What is shared is what only one of them was told:
//!
//! - instances that registered themselves, one key each, written by whoever was told;
//! - who was heard, once a second from each replica, so that an instance may renew its lease
//!   anywhere;
//! - decisions about configs, written by the leader alone;
//! - which roots the certificates in circulation need, from each replica.
//!
//! The leader alone removes instances that stay silent, and judges trials. Nothing that sidecars or
//! instances do waits for it, nor for the store: a replica that has lost the store serves what it
//! knows, takes registrations, and tells them when the store is back.

mod apply;
mod directory;
mod etcd;
mod etcd_wire;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::pin::pin;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use outrigger_config::bootstrap::ReplicasSpec;
use serde::{Deserialize, Serialize};
use tokio::sync::Notify;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tracing::{info, warn};

use crate::app::{App, lock};
use crate::ca::ledger;
use crate::stop::Stop;
use directory::Directory;
use etcd::Etcd;

/// The key of the leader.
const LEADER: &str = "leader";

/// How often each replica says whom it has heard.
const TELL_EVERY: Duration = Duration::from_secs(1);

/// A store that was lost is looked for again after this.
const RETRY_AFTER: Duration = Duration::from_millis(500);

/// How long giving the lead back may take at the end.
const LEAVE_WITHIN: Duration = Duration::from_secs(1);

/// Who leads.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Leader {
    /// Its name among the replicas.
    pub name: String,
    /// Its admin API.
    pub admin: String,
}

impl Leader {
    fn to_json(&self) -> String {
        serde_json::json!({"name": self.name, "admin": self.admin}).to_string()
    }

    /// Nobody, where it cannot be read.
    fn from_json(json: &[u8]) -> Self {
        serde_json::from_slice(json).unwrap_or_default()
    }
}

/// What a store tells.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Event {
    /// Everything there is; the first of a session.
    Whole(BTreeMap<String, Vec<u8>>),
    /// A key has a new value.
    Put(String, Vec<u8>),
    /// A key is gone.
    Delete(String),
    /// Somebody leads.
    Led {
        /// Who.
        by: Leader,
        /// Whether it is we.
        us: bool,
    },
    /// Nobody leads.
    Vacant,
}

enum Store {
    Directory(Directory),
    Etcd(Etcd),
}

enum Session {
    Directory(directory::Session),
    Etcd(Box<etcd::Session>),
}

impl Store {
    async fn open(&mut self) -> Result<Session, String> {
        Ok(match self {
            Self::Directory(directory) => Session::Directory(directory.open().await?),
            Self::Etcd(etcd) => Session::Etcd(Box::new(etcd.open().await?)),
        })
    }
}

impl Session {
    /// Cancel-safe.
    async fn next(&mut self) -> Result<Event, String> {
        match self {
            Self::Directory(session) => session.next().await,
            Self::Etcd(session) => session.next().await,
        }
    }

    async fn campaign(&mut self) -> Result<(), String> {
        match self {
            // It campaigns with every look.
            Self::Directory(_) => Ok(()),
            Self::Etcd(session) => session.campaign().await,
        }
    }

    async fn put(&mut self, key: &str, value: Vec<u8>) -> Result<(), String> {
        match self {
            Self::Directory(session) => session.put(key, value).await,
            Self::Etcd(session) => session.put(key, value).await,
        }
    }

    async fn put_as_leader(&mut self, key: &str, value: Vec<u8>) -> Result<bool, String> {
        match self {
            Self::Directory(session) => session.put_as_leader(key, value).await,
            Self::Etcd(session) => session.put_as_leader(key, value).await,
        }
    }

    async fn delete(&mut self, key: &str) -> Result<(), String> {
        match self {
            Self::Directory(session) => session.delete(key).await,
            Self::Etcd(session) => session.delete(key).await,
        }
    }

    async fn keep_alive(&mut self) -> Result<(), String> {
        match self {
            Self::Directory(_) => Ok(()),
            Self::Etcd(session) => session.keep_alive().await,
        }
    }

    async fn leave(&mut self) -> Result<(), String> {
        match self {
            Self::Directory(session) => {
                session.leave();
                Ok(())
            }
            Self::Etcd(session) => session.leave().await,
        }
    }
}

/// One replica's view of all of them.
#[derive(Debug)]
pub struct Replicas {
    spec: ReplicasSpec,
    /// Our name.
    pub name: String,
    standing: Mutex<Standing>,
    /// Something is to be told.
    news: Notify,
}

/// Where a replica stands.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Standing {
    /// Who leads, as far as is known.
    pub leader: Option<Leader>,
    /// Whether we do.
    pub leads: bool,
    /// Whether the store answers.
    pub connected: bool,
    /// Why it does not.
    pub problem: Option<String>,
}

/// What was told last, so that only news is written.
#[derive(Default)]
struct Told {
    announcement: Option<Vec<u8>>,
    ledger: Option<ledger::Saved>,
}

impl Replicas {
    /// Of this bootstrap config; `name` where it says none.
    pub fn new(spec: &ReplicasSpec, name: String) -> Self {
        Self {
            spec: spec.clone(),
            name: spec.name.clone().unwrap_or(name),
            standing: Mutex::default(),
            news: Notify::new(),
        }
    }

    /// Where we stand.
    pub fn standing(&self) -> Standing {
        lock(&self.standing).clone()
    }

    /// Something changed that the others should know of.
    pub fn wake(&self) {
        self.news.notify_one();
    }

    fn store(&self, me: Leader) -> Result<Store, String> {
        if let Some(path) = &self.spec.directory {
            return Ok(Store::Directory(Directory::new(path, me)));
        }
        match &self.spec.etcd {
            Some(etcd) => Ok(Store::Etcd(Etcd::new(etcd, self.spec.lease(), me)?)),
            None => Err("replicas names no store".to_owned()),
        }
    }

    /// Follows the store until the end, then gives the lead back.
    pub async fn run(&self, app: Arc<App>, admin: String, mut stop: Stop) {
        let me = Leader {
            name: self.name.clone(),
            admin,
        };
        let mut store = match self.store(me) {
            Ok(store) => store,
            Err(problem) => return self.lost(problem),
        };
        let mut stopping = pin!(stop.requested());
        loop {
            let opened = tokio::select! {
                opened = store.open() => opened,
                () = &mut stopping => return,
            };
            let problem = match opened {
                Ok(mut session) => tokio::select! {
                    ended = self.follow(&app, &mut session) => {
                        let Err(problem) = ended;
                        problem
                    }
                    () = &mut stopping => {
                        let _ = timeout(LEAVE_WITHIN, session.leave()).await;
                        return;
                    }
                },
                Err(problem) => problem,
            };
            self.lost(problem);
            tokio::select! {
                () = sleep(RETRY_AFTER) => {}
                () = &mut stopping => return,
            }
        }
    }

    /// Until the store is lost; says why.
    async fn follow(&self, app: &Arc<App>, session: &mut Session) -> Result<Infallible, String> {
        let mut told = Told::default();
        let mut ticks = interval(TELL_EVERY.min(self.spec.lease() / 3));
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        // Everything there is comes first: what we tell before would be missing in it, and be taken
        // for removed.
        let whole = session.next().await?;
        self.on_event(app, session, whole).await?;
        loop {
            tokio::select! {
                event = session.next() => self.on_event(app, session, event?).await?,
                () = self.news.notified() => {}
                _ = ticks.tick() => {
                    session.keep_alive().await?;
                    self.tell_heard(app, session).await?;
                }
            }
            self.tell(app, session, &mut told).await?;
        }
    }

    async fn on_event(
        &self,
        app: &Arc<App>,
        session: &mut Session,
        event: Event,
    ) -> Result<(), String> {
        match event {
            Event::Vacant => {
                self.led(app, None, false);
                session.campaign().await?;
            }
            Event::Led { by, us } => self.led(app, Some(by), us),
            event => {
                self.found();
                apply::apply(app, &self.name, event).await;
            }
        }
        Ok(())
    }

    /// Writes what changed here: instances, decisions, roots.
    async fn tell(
        &self,
        app: &Arc<App>,
        session: &mut Session,
        told: &mut Told,
    ) -> Result<(), String> {
        let changes = app.change_registry(|registry| (registry.take_changes(), false));
        let mut left = changes.into_iter();
        while let Some(((service, id), saved)) = left.next() {
            let key = apply::instance_key(&service, &id);
            let done = match &saved {
                Some(saved) => {
                    let value = apply::instance_value(&self.name, saved);
                    session.put(&key, value).await
                }
                None => session.delete(&key).await,
            };
            if let Err(problem) = done {
                // Told when the store is back.
                let rest = left.map(|(key, _)| key).chain([(service, id)]);
                app.change_registry(|registry| (registry.mark(rest), false));
                return Err(problem);
            }
        }
        if self.standing().leads {
            let announcement = app.announcement(&self.name);
            if told.announcement.as_ref() != Some(&announcement)
                && session
                    .put_as_leader(apply::ROLLOUT, announcement.clone())
                    .await?
            {
                told.announcement = Some(announcement);
            }
        }
        if let Some(authority) = app.guard.authority() {
            let ledger = authority.ledger();
            if told.ledger.as_ref() != Some(&ledger) {
                let key = format!("{}{}", apply::LEDGERS, self.name);
                session.put(&key, apply::to_json(&ledger)).await?;
                told.ledger = Some(ledger);
            }
        }
        Ok(())
    }

    /// Says who was heard since the last time.
    async fn tell_heard(&self, app: &Arc<App>, session: &mut Session) -> Result<(), String> {
        let heard = app.change_registry(|registry| (registry.take_heard(), false));
        let key = format!("{}{}", apply::HEARD, self.name);
        for part in heard.chunks(apply::MOST_HEARD) {
            session.put(&key, apply::to_json(&part)).await?;
        }
        Ok(())
    }

    fn found(&self) {
        let mut standing = lock(&self.standing);
        if !standing.connected {
            info!(name = self.name, "the store of the replicas is there");
        }
        standing.connected = true;
        standing.problem = None;
    }

    /// The store does not answer: whoever cannot say that he leads does not.
    fn lost(&self, problem: String) {
        let mut standing = lock(&self.standing);
        if standing.connected || standing.problem.as_ref() != Some(&problem) {
            warn!(
                problem,
                "the store of the replicas is lost; what is known stays in effect"
            );
        }
        *standing = Standing {
            problem: Some(problem),
            ..Standing::default()
        };
    }

    fn led(&self, app: &Arc<App>, by: Option<Leader>, us: bool) {
        let mut standing = lock(&self.standing);
        let before = std::mem::replace(&mut standing.leader, by.clone());
        let led = std::mem::replace(&mut standing.leads, us);
        drop(standing);
        let Some(by) = by else { return };
        if led != us || before.as_ref() != Some(&by) {
            info!(leader = by.name, us, "leader");
            app.leader_changed(us && !led);
        }
    }
}
