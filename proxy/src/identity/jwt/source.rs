//! Where the keys of an issuer come from, and that they are kept up to date.
//!
//! A set of keys is fetched by one task of the control thread, however many services and workers
//! use it, and outlives a reload of the config. What was fetched counts until something better is:
//! an issuer that is away takes nothing away. A token whose key is not known asks for the set
//! ahead of time, at most once every ten seconds. Stands on the life of a config update.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::Duration;

use arc_swap::ArcSwapOption;
use bytes::Bytes;
use http::header::{ACCEPT, HOST, USER_AGENT};
use http::{Request, StatusCode, Uri};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;
use tokio::sync::Notify;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tracing::{info, warn};

use super::keys::{self, Key};
use crate::app::Shared;
use crate::source::file::POLL;
use crate::telemetry::metrics::Metrics;

/// How long one fetch may take.
const FETCH_WITHIN: Duration = Duration::from_secs(5);
/// More than any issuer publishes.
const MAX_BYTES: usize = 1024 * 1024;
/// How soon a fetch follows one that failed.
const AGAIN: Duration = Duration::from_secs(1);
/// How soon one follows another because of a token: anybody can make a token with an unknown key.
const WANTED_AT_MOST: Duration = Duration::from_secs(10);

/// Where a set of keys is.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Place {
    /// A file at the sidecar, watched.
    File(PathBuf),
    /// A URL, and how often it is asked.
    Url {
        /// `http` or `https`.
        url: String,
        /// The authorities to believe; none is the system's.
        bundle: Option<PathBuf>,
        /// How often.
        refresh: Duration,
    },
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::Url { url, .. } => f.write_str(url),
        }
    }
}

/// One set of keys, kept up to date.
pub struct KeySet {
    place: Place,
    keys: ArcSwapOption<Vec<Key>>,
    generation: AtomicU64,
    problem: Mutex<Option<String>>,
    wanted: Arc<Notify>,
    followed: AtomicBool,
}

impl KeySet {
    fn new(place: Place) -> Self {
        Self {
            place,
            keys: ArcSwapOption::default(),
            generation: AtomicU64::new(0),
            problem: Mutex::default(),
            wanted: Arc::default(),
            followed: AtomicBool::new(false),
        }
    }

    /// The keys; none before the first were fetched.
    pub fn current(&self) -> Option<Arc<Vec<Key>>> {
        self.keys.load_full()
    }

    /// Rises with every other set of keys.
    pub fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    /// Why the last fetch brought nothing.
    pub fn problem(&self) -> Option<String> {
        let problem = self.problem.lock();
        problem.unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Asks for the keys ahead of time.
    pub fn want(&self) {
        self.wanted.notify_one();
    }

    /// Takes up what a fetch brought; whether it was any good.
    fn take(&self, fetched: Result<Vec<u8>, String>, metrics: &Metrics) -> bool {
        let parsed = fetched.and_then(|text| keys::parse(&text));
        let outcome = if parsed.is_ok() { "fetched" } else { "failed" };
        metrics
            .counter("outrigger_jwks_fetches_total", &[("outcome", outcome)])
            .increment(1);
        let mut problem = self.problem.lock().unwrap_or_else(PoisonError::into_inner);
        match parsed {
            Ok(keys) => {
                let known = self.keys.load();
                if known.as_ref().is_none_or(|known| **known != keys) {
                    info!(place = %self.place, keys = keys.len(), "keys of an issuer in force");
                    self.keys.store(Some(Arc::new(keys)));
                    self.generation.fetch_add(1, Ordering::Release);
                }
                *problem = None;
                true
            }
            Err(error) => {
                // Said once, and not at every try.
                if problem.as_ref() != Some(&error) {
                    warn!(place = %self.place, error, "the keys of an issuer were not fetched");
                }
                *problem = Some(error);
                false
            }
        }
    }
}

/// Every set of keys of this sidecar.
#[derive(Default)]
pub struct Registry {
    known: Mutex<HashMap<Place, Weak<KeySet>>>,
    added: Notify,
}

impl Registry {
    /// The set at `place`: the same for everybody who asks.
    pub fn get(&self, place: Place) -> Arc<KeySet> {
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.retain(|_, set| set.strong_count() > 0);
        if let Some(set) = known.get(&place).and_then(Weak::upgrade) {
            return set;
        }
        let set = Arc::new(KeySet::new(place.clone()));
        known.insert(place, Arc::downgrade(&set));
        self.added.notify_one();
        set
    }

    fn unfollowed(&self) -> Vec<Arc<KeySet>> {
        let known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let sets = known.values().filter_map(Weak::upgrade);
        sets.filter(|set| !set.followed.swap(true, Ordering::Relaxed))
            .collect()
    }
}

/// Keeps every set up to date that the config in force uses, for ever.
pub async fn run(shared: Arc<Shared>) {
    loop {
        for set in shared.keys.unfollowed() {
            tokio::task::spawn_local(follow(Arc::clone(&shared), Arc::downgrade(&set)));
        }
        shared.keys.added.notified().await;
    }
}

/// Keeps one set up to date until nobody uses it.
async fn follow(shared: Arc<Shared>, set: Weak<KeySet>) {
    let mut last = None;
    loop {
        let Some(now) = set.upgrade() else { return };
        let (pause, ahead) = match &now.place {
            Place::File(path) => {
                let read = std::fs::read(path)
                    .map_err(|error| format!("cannot read {}: {error}", path.display()));
                if last.as_ref() != Some(&read) {
                    now.take(read.clone(), &shared.metrics);
                    last = Some(read);
                }
                (POLL, POLL)
            }
            Place::Url {
                url,
                bundle,
                refresh,
            } => {
                let fetched = timeout(FETCH_WITHIN, fetch(url, bundle.as_deref())).await;
                let fetched = fetched.unwrap_or_else(|_| Err(format!("{url} does not answer")));
                match now.take(fetched.map(|body| body.to_vec()), &shared.metrics) {
                    true => (*refresh, WANTED_AT_MOST.min(*refresh)),
                    false => (AGAIN, AGAIN),
                }
            }
        };
        let wanted = Arc::clone(&now.wanted);
        drop(now);
        tokio::time::sleep(ahead).await;
        // One that was asked for meanwhile is asked for now.
        let _ = timeout(pause.saturating_sub(ahead), wanted.notified()).await;
    }
}

/// The body of a successful GET.
async fn fetch(url: &str, bundle: Option<&Path>) -> Result<Bytes, String> {
    let uri: Uri = url.parse().map_err(|_| format!("{url} is no URL"))?;
    let secure = uri.scheme_str() == Some("https");
    let host = uri.host().unwrap_or_default();
    let bare = host.trim_start_matches('[').trim_end_matches(']');
    let port = uri.port_u16().unwrap_or(if secure { 443 } else { 80 });
    let stream = TcpStream::connect((bare, port))
        .await
        .map_err(|error| format!("cannot connect to {url}: {error}"))?;
    if !secure {
        return get(&uri, stream).await;
    }
    let name =
        ServerName::try_from(bare.to_owned()).map_err(|_| format!("{bare} is no name for TLS"))?;
    let connector = TlsConnector::from(client(bundle)?);
    let stream = connector
        .connect(name, stream)
        .await
        .map_err(|error| format!("no TLS with {url}: {error}"))?;
    get(&uri, stream).await
}

async fn get(
    uri: &Uri,
    stream: impl AsyncRead + AsyncWrite + Unpin + 'static,
) -> Result<Bytes, String> {
    let failed = |error: &dyn std::fmt::Display| format!("{uri} did not answer: {error}");
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|error| failed(&error))?;
    let path = uri.path_and_query().map_or("/", |path| path.as_str());
    let request = Request::get(path)
        .header(HOST, uri.authority().map_or("", |host| host.as_str()))
        .header(ACCEPT, "application/jwk-set+json, application/json")
        .header(USER_AGENT, concat!("outrigger/", env!("CARGO_PKG_VERSION")))
        .body(Empty::<Bytes>::new())
        .map_err(|error| failed(&error))?;
    let asking = async {
        let response = sender
            .send_request(request)
            .await
            .map_err(|error| failed(&error))?;
        if response.status() != StatusCode::OK {
            return Err(format!("{uri} answered {}", response.status()));
        }
        let body = Limited::new(response.into_body(), MAX_BYTES)
            .collect()
            .await;
        body.map(|body| body.to_bytes())
            .map_err(|error| failed(&error))
    };
    // The connection moves the bytes; its own end says nothing that the answer does not.
    let moving = async {
        let _ = connection.await;
        std::future::pending().await
    };
    tokio::select! {
        answer = asking => answer,
        never = moving => never,
    }
}

/// TLS 1.3 with servers that one of the authorities in `bundle` vouches for, or of the system's.
fn client(bundle: Option<&Path>) -> Result<Arc<ClientConfig>, String> {
    let mut roots = RootCertStore::empty();
    let authorities = match bundle {
        Some(path) => std::fs::read(path)
            .map_err(|error| format!("cannot read {}: {error}", path.display()))?,
        None => system_roots()?,
    };
    let authorities = CertificateDer::pem_slice_iter(&authorities).filter_map(Result::ok);
    if roots.add_parsable_certificates(authorities).0 == 0 {
        return Err("there is no authority to believe".to_owned());
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| error.to_string())?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}

/// Where Linux distributions keep the authorities that they believe; `SSL_CERT_FILE` as OpenSSL
/// reads it.
fn system_roots() -> Result<Vec<u8>, String> {
    const PLACES: [&str; 4] = [
        "/etc/ssl/certs/ca-certificates.crt",
        "/etc/pki/tls/certs/ca-bundle.crt",
        "/etc/ssl/ca-bundle.pem",
        "/etc/ssl/cert.pem",
    ];
    let named = std::env::var_os("SSL_CERT_FILE").map(PathBuf::from);
    let places = named.into_iter().chain(PLACES.map(PathBuf::from));
    let mut found = places.filter_map(|place| std::fs::read(place).ok());
    found
        .next()
        .ok_or_else(|| "the system has no list of authorities: set jwks.bundle".to_owned())
}
