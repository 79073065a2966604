//! Destinations that the mesh knows nothing of: whether they may be reached, and where a name is.
//!
//! `outbound.unknown` decides. Whatever it says, nothing unknown leads to loopback, link-local
//! addresses (cloud metadata among them) or a listener of this sidecar: a name that resolves to
//! one of those is refused like the address itself.
//!
//! Stands on the life of a request.

use std::cell::OnceCell;
use std::net::{IpAddr, SocketAddr};
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use hickory_resolver::TokioResolver;
use hickory_resolver::config::LookupIpStrategy;
use outrigger_core::error_code::ErrorCode;
use tracing::{debug, warn};

use crate::clock;
use crate::error::{ProxyError, chain};
use crate::snapshot::{Service, Snapshot};
use crate::worker::Worker;

/// A name is not waited for any longer.
const LOOKUP: Duration = Duration::from_secs(5);

/// What serves the unknown destination `addr`.
///
/// # Errors
/// `no_route` when it may not be reached.
pub fn passthrough(
    worker: &Worker,
    snapshot: &Snapshot,
    addr: SocketAddr,
) -> Result<Arc<Service>, ProxyError> {
    let Some(service) = &snapshot.passthrough else {
        let detail = format!("{addr} is outside the mesh and outbound.unknown is Deny");
        return Err(ProxyError::local(ErrorCode::NoRoute, detail));
    };
    match worker.shared.listeners.reachable_unknown(addr) {
        Ok(()) => Ok(Arc::clone(service)),
        Err(refusal) => {
            let detail = format!("{addr} is not passed on to: {}", refusal.as_str());
            Err(ProxyError::local(ErrorCode::NoRoute, detail))
        }
    }
}

/// The address of a destination outside the mesh that is named by `host` (a name or an address,
/// an IPv6 address with or without brackets) and `port`: for absolute-form requests and CONNECT.
///
/// # Errors
/// `no_route` when it may not be reached, `connect_failed` when the name leads nowhere.
///
/// # Cancel safety
/// Dropping the future abandons the lookup.
pub async fn unknown_destination(
    worker: &Rc<Worker>,
    snapshot: &Snapshot,
    host: &str,
    port: u16,
) -> Result<SocketAddr, ProxyError> {
    if snapshot.passthrough.is_none() {
        let detail = format!("{host} is outside the mesh and outbound.unknown is Deny");
        return Err(ProxyError::local(ErrorCode::NoRoute, detail));
    }
    let literal = host.trim_start_matches('[').trim_end_matches(']');
    let found = match literal.parse::<IpAddr>() {
        Ok(ip) => vec![ip],
        Err(_) => worker.names.lookup(worker, host).await?,
    };
    let mut refused = None;
    for ip in found {
        let addr = SocketAddr::new(ip.to_canonical(), port);
        match passthrough(worker, snapshot, addr) {
            Ok(_) => return Ok(addr),
            Err(error) => refused = refused.or(Some(error)),
        }
    }
    Err(refused.unwrap_or_else(|| nowhere(host, "no address")))
}

fn nowhere(host: &str, why: &str) -> ProxyError {
    ProxyError::upstream(
        ErrorCode::ConnectFailed,
        format!("cannot resolve {host}: {why}"),
    )
}

/// The names of a worker: the system's resolver settings and hosts file, asked without blocking,
/// with a cache that follows the records' lifetimes.
#[derive(Default)]
pub struct Names(OnceCell<Option<TokioResolver>>);

impl Names {
    /// The addresses of a name.
    ///
    /// # Errors
    /// `connect_failed`.
    pub(crate) async fn lookup(
        &self,
        worker: &Worker,
        host: &str,
    ) -> Result<Vec<IpAddr>, ProxyError> {
        let Some(resolver) = self.0.get_or_init(make) else {
            return Err(nowhere(host, "no resolver"));
        };
        let found = tokio::select! {
            biased;
            found = resolver.lookup_ip(host) => found,
            () = worker.wheel.sleep_until(clock::now() + LOOKUP) => {
                return Err(nowhere(host, "no answer in time"));
            }
        };
        match found {
            Ok(found) => Ok(found.iter().collect()),
            Err(error) => {
                debug!(host, error = chain(&error), "name not resolved");
                Err(nowhere(host, "the name is not known"))
            }
        }
    }
}

/// Made when the first name is asked for: most sidecars never do.
fn make() -> Option<TokioResolver> {
    let made = TokioResolver::builder_tokio().and_then(|mut builder| {
        // Many machines have no way out over IPv6, however often a name has such an address.
        builder.options_mut().ip_strategy = LookupIpStrategy::Ipv4thenIpv6;
        builder.build()
    });
    made.inspect_err(|error| warn!(error = chain(error), "names cannot be resolved"))
        .ok()
}
