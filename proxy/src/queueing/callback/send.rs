//! Sends one callback: resolve, screen the address, connect to that very address, POST.
//!
//! A name is looked up once for a try and the address that was screened is the one connected to, so
//! a name that changes between the two gains nothing. Redirects are not followed. HTTP/1.1, with
//! TLS 1.3 for `https`. Does not decide what an answer means. On the message's life.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::rc::Rc;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use http::header::RETRY_AFTER;
use http::{HeaderMap, HeaderValue, Method, Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use outrigger_core::authz::Block;
use outrigger_core::callback::{self, Url};
use outrigger_core::headers;
use outrigger_queue::message::MAX_EXCERPT_BYTES;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use tokio::net::TcpStream;
use tokio_rustls::{TlsConnector, TlsStream};

use crate::clock;
use crate::error::chain;
use crate::io::Io;
use crate::upstream::connect::{self, Source};
use crate::worker::Worker;

/// What we call ourselves.
pub(in crate::queueing) const AGENT: HeaderValue = HeaderValue::from_static("outrigger");

/// How many addresses of a name are tried.
const ADDRESSES: usize = 3;

/// Where a POST may lead, and how.
pub(in crate::queueing) struct Reach<'a> {
    /// The only addresses, or those of the public internet, for a URL that a caller brought; none
    /// for an operator's, which may lead anywhere but to this sidecar.
    pub(in crate::queueing) addresses: Option<&'a [Block]>,
    /// The authorities to trust; none: the system's.
    pub(in crate::queueing) ca_file: Option<&'a PathBuf>,
    /// How long connecting may take.
    pub(in crate::queueing) timeout: Duration,
}

/// What the receiver answered.
pub(in crate::queueing) struct Answer {
    pub(in crate::queueing) status: StatusCode,
    pub(in crate::queueing) retry_after: Option<Duration>,
    /// The beginning of its body.
    pub(in crate::queueing) excerpt: Bytes,
}

/// Why there is no answer.
pub(in crate::queueing) enum Failure {
    /// No address of the receiver may be reached: what the first one is.
    Refused(String),
    /// It did not answer; a stable code, and what happened.
    Unanswered(&'static str, String),
    /// Something of ours is missing that only an operator can bring.
    NotReady(String),
}

/// Sends `body` once. The address that was connected to is left in `endpoint`. The deadline is the
/// caller's.
///
/// # Errors
/// [`Failure`].
///
/// # Cancel safety
/// Dropping the future closes the connection; the receiver may have acted.
pub(in crate::queueing) async fn post(
    worker: &Rc<Worker>,
    url: &Url,
    reach: &Reach<'_>,
    fields: HeaderMap,
    body: Bytes,
    endpoint: &mut Option<SocketAddr>,
) -> Result<Answer, Failure> {
    let tls = match url.https {
        true => Some(config(reach.ca_file.cloned()).await?),
        false => None,
    };
    let stream = open(worker, url, reach, endpoint).await?;
    let io = match tls {
        None => Io::Plain(stream),
        Some(config) => {
            let name = ServerName::try_from(url.host.clone())
                .map_err(|_| Failure::Unanswered("tls_failed", "no server name".to_owned()))?;
            let session = TlsConnector::from(config).connect(name, stream).await;
            let session =
                session.map_err(|error| Failure::Unanswered("tls_failed", chain(&error)))?;
            Io::tls(TlsStream::Client(session))
        }
    };
    ask(io, url, fields, body).await
}

/// Connects to the first address that may be reached and accepts.
async fn open(
    worker: &Rc<Worker>,
    url: &Url,
    reach: &Reach<'_>,
    endpoint: &mut Option<SocketAddr>,
) -> Result<TcpStream, Failure> {
    let unreached = |detail| Failure::Unanswered("connect_failed", detail);
    let found: Vec<IpAddr> = match url.address() {
        Some(address) => vec![address],
        None => worker
            .names
            .lookup(worker, &url.host)
            .await
            .map_err(|error| unreached(error.detail))?,
    };
    let mut refused = None;
    let mut failed = None;
    for ip in found.into_iter().take(ADDRESSES) {
        let addr = SocketAddr::new(ip.to_canonical(), url.port);
        if let Err(kind) = screen(worker, addr, reach) {
            refused.get_or_insert(format!("{ip} is {kind}"));
            continue;
        }
        *endpoint = Some(addr);
        match connect::tcp(&worker.wheel, addr, Source::Any, reach.timeout).await {
            Ok(stream) => return Ok(stream),
            Err(error) => failed = Some(chain(&error)),
        }
    }
    Err(match (failed, refused) {
        (Some(failed), _) => unreached(failed),
        (None, Some(kind)) => Failure::Refused(kind),
        (None, None) => unreached("the name has no address".to_owned()),
    })
}

fn screen(worker: &Worker, addr: SocketAddr, reach: &Reach<'_>) -> Result<(), &'static str> {
    let listeners = &worker.shared.listeners;
    let own = match reach.addresses {
        Some(allowed) => {
            callback::screen(addr.ip(), allowed)?;
            listeners.reachable_unknown(addr)
        }
        None => listeners.reachable(addr),
    };
    own.map_err(|_| "a listener of this sidecar")
}

async fn ask(io: Io, url: &Url, fields: HeaderMap, body: Bytes) -> Result<Answer, Failure> {
    let broke = |error: &dyn std::error::Error| Failure::Unanswered("upstream_reset", chain(error));
    let mut request = Request::new(Full::new(body));
    *request.method_mut() = Method::POST;
    *request.uri_mut() = url
        .path_and_query
        .parse()
        .map_err(|error: http::uri::InvalidUri| broke(&error))?;
    *request.headers_mut() = fields;
    let (mut sender, connection) = http1::handshake(TokioIo::new(io))
        .await
        .map_err(|error| broke(&error))?;
    let asking = async {
        let answer = sender.send_request(request).await;
        let (head, mut body) = answer.map_err(|error| broke(&error))?.into_parts();
        let mut excerpt = Vec::new();
        // The status decides; a body that breaks off, or goes on, changes nothing.
        while excerpt.len() < MAX_EXCERPT_BYTES
            && let Some(Ok(frame)) = body.frame().await
        {
            if let Ok(data) = frame.into_data() {
                let room = MAX_EXCERPT_BYTES - excerpt.len();
                excerpt.extend_from_slice(&data[..data.len().min(room)]);
            }
        }
        let retry_after = head.headers.get(RETRY_AFTER);
        Ok(Answer {
            status: head.status,
            retry_after: retry_after
                .and_then(|value| headers::parse_retry_after(value, clock::unix_now())),
            excerpt: excerpt.into(),
        })
    };
    let driving = async {
        // How it ended is seen by who asks.
        let _ = connection.await;
        std::future::pending().await
    };
    tokio::select! {
        biased;
        answer = asking => answer,
        never = driving => never,
    }
}

/// Who is believed to be a receiver.
async fn config(ca_file: Option<PathBuf>) -> Result<Arc<ClientConfig>, Failure> {
    // Reading files and building a store takes milliseconds, which are not the worker's.
    let reading = tokio::task::spawn_blocking(move || match ca_file {
        None => system(),
        Some(file) => {
            let pem = std::fs::read(&file)
                .map_err(|error| format!("caFile {}: {error}", file.display()))?;
            let mut roots = RootCertStore::empty();
            for certificate in CertificateDer::pem_slice_iter(&pem).flatten() {
                roots
                    .add(certificate)
                    .map_err(|error| format!("caFile {}: {error}", file.display()))?;
            }
            client(roots)
        }
    });
    let read = reading
        .await
        .map_err(|error| Failure::NotReady(chain(&error)))?;
    read.map_err(Failure::NotReady)
}

/// With the system's authorities, read once.
fn system() -> Result<Arc<ClientConfig>, String> {
    static SYSTEM: OnceLock<Arc<ClientConfig>> = OnceLock::new();
    if let Some(config) = SYSTEM.get() {
        return Ok(Arc::clone(config));
    }
    let mut roots = RootCertStore::empty();
    let found = rustls_native_certs::load_native_certs();
    roots.add_parsable_certificates(found.certs);
    let config = client(roots)?;
    Ok(Arc::clone(SYSTEM.get_or_init(|| config)))
}

fn client(roots: RootCertStore) -> Result<Arc<ClientConfig>, String> {
    if roots.is_empty() {
        return Err("there are no authorities to trust".to_owned());
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|error| chain(&error))?;
    let mut config = builder.with_root_certificates(roots).with_no_client_auth();
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}
