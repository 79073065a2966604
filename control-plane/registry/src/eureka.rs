//! `discovery.eureka`: applications in Eureka, by full fetches and deltas.
//!
//! A server is asked for everything it has, so all services of one list of servers share one
//! [`Follower`]. What it knows is in `eureka/apps.rs`.

mod apps;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use hyper::StatusCode;
use outrigger_config::wire::Endpoint;
use serde_json::Value;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep};
use tracing::{debug, info};

use crate::http::{Base, get};
use crate::origin;
use crate::source::{Answer, Asked, Source, SourceError};
use apps::Apps;

/// A server keeps its delta for three minutes; what is older is fetched as a whole.
const DELTA_REACHES: Duration = Duration::from_secs(150);

/// How long one fetch may take.
const FETCH_WITHIN: Duration = Duration::from_secs(20);

/// A server that failed is left alone for this long, while there is another.
const QUARANTINE: Duration = Duration::from_secs(60);

/// The longest wait after failures in a row.
const MAX_WAIT: Duration = Duration::from_secs(60);

/// What the follower last heard.
type Heard = Option<Result<Arc<Apps>, String>>;

/// Follows one application.
pub(crate) struct Eureka {
    app: String,
    heard: watch::Receiver<Heard>,
    _follower: Arc<Follower>,
}

impl Eureka {
    pub(crate) fn new(spec: origin::Eureka, followers: &Followers) -> Self {
        let follower = followers.of(&spec);
        let mut heard = follower.heard.subscribe();
        // What is known already is news to this one.
        heard.mark_changed();
        Self {
            app: spec.app,
            heard,
            _follower: follower,
        }
    }

    async fn next(&mut self) -> Result<Vec<Endpoint>, String> {
        loop {
            if self.heard.changed().await.is_err() {
                return Err("nobody asks any more".to_owned());
            }
            match &*self.heard.borrow_and_update() {
                None => {}
                Some(Ok(apps)) => return Ok(apps.endpoints(&self.app)),
                Some(Err(problem)) => return Err(problem.clone()),
            }
        }
    }
}

impl Source for Eureka {
    fn ask(&mut self) -> Asked<'_> {
        Box::pin(async {
            match self.next().await {
                Ok(endpoints) => Ok(Answer {
                    endpoints,
                    again_in: Duration::ZERO,
                }),
                // The follower has its own pace; this only waits for its next word.
                Err(problem) => Err(SourceError {
                    reason: format!("Eureka: {problem}"),
                    again_in: Duration::ZERO,
                }),
            }
        })
    }
}

/// One follower for each list of servers, as long as a service needs it.
#[derive(Default)]
pub(crate) struct Followers(Mutex<HashMap<Asks, Weak<Follower>>>);

/// Which servers, and how often.
type Asks = (Vec<String>, Duration);

impl Followers {
    fn of(&self, spec: &origin::Eureka) -> Arc<Follower> {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|_, follower| follower.strong_count() > 0);
        let key = (spec.urls.clone(), spec.refresh);
        if let Some(follower) = known.get(&key).and_then(Weak::upgrade) {
            return follower;
        }
        let heard = watch::Sender::new(None);
        let follower = Arc::new(Follower {
            task: tokio::spawn(follow(spec.urls.clone(), spec.refresh, heard.clone())),
            heard,
        });
        known.insert(key, Arc::downgrade(&follower));
        follower
    }
}

struct Follower {
    heard: watch::Sender<Heard>,
    task: JoinHandle<()>,
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.task.abort();
    }
}

async fn follow(urls: Vec<String>, refresh: Duration, heard: watch::Sender<Heard>) {
    let mut client = match Client::new(&urls) {
        Ok(client) => client,
        Err(problem) => {
            heard.send_replace(Some(Err(problem)));
            return std::future::pending().await;
        }
    };
    let mut failures = 0u32;
    loop {
        let wait = match client.refresh().await {
            Ok(apps) => {
                failures = 0;
                heard.send_replace(Some(Ok(apps)));
                refresh.max(Duration::from_millis(50))
            }
            Err(problem) => {
                failures += 1;
                heard.send_replace(Some(Err(problem)));
                // No slower than the usual pace, and at first quicker.
                let wait = Duration::from_secs(1) * 2u32.pow(failures.min(6) - 1);
                wait.min(MAX_WAIT)
                    .min(refresh.max(Duration::from_millis(50)))
            }
        };
        sleep(wait.mul_f64(0.9 + 0.2 * fastrand::f64())).await;
    }
}

struct Server {
    base: Base,
    failed: Option<Instant>,
}

struct Client {
    servers: Vec<Server>,
    /// The one that answered last: asked first, as only its deltas follow what is known.
    at: usize,
    apps: Option<(Arc<Apps>, Instant)>,
    deltas: bool,
}

impl Client {
    fn new(urls: &[String]) -> Result<Self, String> {
        let server = |url: &String| Base::parse(url).map(|base| Server { base, failed: None });
        let servers = urls.iter().map(server).collect::<Result<Vec<_>, _>>()?;
        if servers.is_empty() {
            return Err("urls is empty".to_owned());
        }
        Ok(Self {
            servers,
            at: 0,
            apps: None,
            deltas: true,
        })
    }

    /// Asks the server that answered last, else the others in their order.
    async fn refresh(&mut self) -> Result<Arc<Apps>, String> {
        let now = Instant::now();
        let count = self.servers.len();
        let order = (0..count).map(|n| (self.at + n) % count);
        let rested = |server: &Server| {
            server
                .failed
                .is_none_or(|failed| now.duration_since(failed) >= QUARANTINE)
        };
        let (mut order, rest): (Vec<_>, Vec<_>) = order.partition(|n| rested(&self.servers[*n]));
        // When all have failed, quarantine would mean to ask nobody.
        order.extend(rest);
        let mut problems = Vec::new();
        for n in order {
            let same = n == self.at;
            match self.ask(n, same).await {
                Ok(apps) => {
                    self.servers[n].failed = None;
                    if !same {
                        info!(server = n, "another Eureka server is followed");
                        self.at = n;
                    }
                    let apps = Arc::new(apps);
                    self.apps = Some((Arc::clone(&apps), Instant::now()));
                    return Ok(apps);
                }
                Err(problem) => {
                    self.servers[n].failed = Some(Instant::now());
                    problems.push(problem);
                }
            }
        }
        Err(problems.join("; "))
    }

    async fn ask(&mut self, n: usize, same: bool) -> Result<Apps, String> {
        let base = &self.servers[n].base;
        let recent = self
            .apps
            .as_ref()
            .filter(|(_, at)| same && self.deltas && at.elapsed() < DELTA_REACHES);
        if let Some((known, _)) = recent {
            match fetch(base, "/apps/delta").await? {
                Fetched::Apps(delta) => match known.with_delta(&delta) {
                    Some(apps) => return Ok(apps),
                    None => debug!("Eureka's delta does not add up; fetching everything"),
                },
                Fetched::Refused(status) => {
                    info!(%status, "Eureka serves no deltas; fetching everything each time");
                    self.deltas = false;
                }
            }
        }
        match fetch(base, "/apps/").await? {
            Fetched::Apps(all) => Ok(Apps::new(&all)),
            Fetched::Refused(status) => Err(format!("it answered {status}")),
        }
    }
}

enum Fetched {
    Apps(Value),
    /// 403 and 404: deltas are switched off.
    Refused(StatusCode),
}

async fn fetch(base: &Base, path: &str) -> Result<Fetched, String> {
    let reply = get(base, path, &[], FETCH_WITHIN).await?;
    match reply.status {
        StatusCode::OK => {}
        StatusCode::FORBIDDEN | StatusCode::NOT_FOUND => {
            return Ok(Fetched::Refused(reply.status));
        }
        status => return Err(format!("it answered {status}")),
    }
    let value: Value =
        serde_json::from_slice(&reply.body).map_err(|e| format!("its answer is not JSON: {e}"))?;
    match value.get("applications") {
        Some(applications) if applications.is_object() => Ok(Fetched::Apps(applications.clone())),
        _ => Err("its answer has no applications".to_owned()),
    }
}
