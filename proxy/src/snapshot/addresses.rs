//! Which service an address belongs to, and what is declared of a port.
//!
//! A service address (`addresses` with `ports`) names the service as a whole. An endpoint's
//! address names that one endpoint: whoever calls it wants no other, as with a Prometheus that
//! scrapes each pod or a client of a clustered database. Where both are known, the service
//! address wins; an endpoint of several services belongs to the first by namespace and name.
//!
//! Service addresses are fixed with the snapshot; endpoints are indexed anew with every change of
//! a set. Asked once a connection, and for requests whose host is unknown.
//!
//! Stands on the life of a config update and at the head of that of a request.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;

use arc_swap::ArcSwap;
use outrigger_config::model::{AppProtocol, MeshService, PortSpec};

use crate::snapshot::live::Endpoint;
use crate::snapshot::{Service, Snapshot};

type Index = HashMap<SocketAddr, usize>;

/// Addresses → index into [`Snapshot::services`].
#[derive(Default)]
pub struct Addresses {
    services: Index,
    endpoints: ArcSwap<Index>,
}

impl Addresses {
    /// The addresses of `services`, in the order of the snapshot.
    pub fn of_services<'a>(services: impl IntoIterator<Item = &'a MeshService>) -> Self {
        let mut index = Index::new();
        for (at, spec) in services.into_iter().enumerate() {
            for port in spec.ports_or_default() {
                for address in &spec.addresses {
                    // That no other service claims it was checked.
                    let addr = SocketAddr::new(address.to_canonical(), port.port);
                    index.entry(addr).or_insert(at);
                }
            }
        }
        Self {
            services: index,
            endpoints: ArcSwap::default(),
        }
    }
}

/// What an address belongs to.
pub struct Found {
    /// The service.
    pub service: Arc<Service>,
    /// The one endpoint that was meant; none when the service was.
    pub endpoint: Option<Endpoint>,
    /// What is declared to be spoken there.
    pub declared: Option<AppProtocol>,
}

impl Snapshot {
    /// Takes up the endpoint sets as they are now.
    pub fn index_endpoints(&self) {
        let mut index = Index::new();
        for (at, service) in self.services.iter().enumerate() {
            for endpoint in &service.state.endpoints().endpoints {
                let addr = endpoint.spec.addr;
                let addr = SocketAddr::new(addr.ip().to_canonical(), addr.port());
                index.entry(addr).or_insert(at);
            }
        }
        self.addresses.endpoints.store(Arc::new(index));
    }

    /// What `addr` belongs to.
    pub fn at(&self, addr: SocketAddr) -> Option<Found> {
        let service_of = |at: &usize| self.services.get(*at).map(Arc::clone);
        if let Some(service) = self.addresses.services.get(&addr).and_then(service_of) {
            let declared = service.ports.at(addr.port()).flatten();
            return Some(Found {
                service,
                endpoint: None,
                declared,
            });
        }
        let service = self
            .addresses
            .endpoints
            .load()
            .get(&addr)
            .and_then(service_of)?;
        let set = service.state.endpoints();
        let mut known = set.endpoints.iter();
        let endpoint = known.find(|endpoint| {
            let known = endpoint.spec.addr;
            (known.ip().to_canonical(), known.port()) == (addr.ip(), addr.port())
        });
        // It may have left a moment ago: then the service as a whole is the best there is.
        let endpoint = endpoint.cloned();
        drop(set);
        let declared = service.ports.behind(addr.port());
        Some(Found {
            service,
            endpoint,
            declared,
        })
    }

    /// What the local application is declared to speak on `port`; `None` asks for the port of `app`.
    pub fn app_speaks(&self, port: Option<u16>, app: Option<u16>) -> Option<AppProtocol> {
        let service = self.app.as_ref()?;
        let Some(port) = port else {
            return match app.and_then(|port| service.ports.at(port)) {
                Some(declared) => declared,
                None => service.ports.first(),
            };
        };
        if let Some(declared) = service.ports.at(port) {
            return declared;
        }
        // A service's port need not be the one that its workloads listen on; other ports of the
        // workload are none of the service's.
        let is_endpoint = || {
            let own = self.service(&service.name)?;
            let set = own.state.endpoints();
            set.endpoints
                .iter()
                .find(|endpoint| endpoint.spec.addr.port() == port)
                .map(|_| ())
        };
        if app == Some(port) || is_endpoint().is_some() {
            return service.ports.behind(port);
        }
        None
    }
}

/// The ports of a service and what is declared of them.
#[derive(Debug, Clone, Default)]
pub struct Ports(Vec<(u16, Option<AppProtocol>)>);

impl Ports {
    /// Those of a document.
    pub fn new(specs: &[PortSpec]) -> Self {
        let port = |spec: &PortSpec| (spec.port, spec.app_protocol);
        Self(specs.iter().map(port).collect())
    }

    /// What is declared of the first port.
    pub fn first(&self) -> Option<AppProtocol> {
        self.0.first().and_then(|(_, declared)| *declared)
    }

    /// What is declared of `port`; none when the service has no such port.
    pub fn at(&self, port: u16) -> Option<Option<AppProtocol>> {
        let mut listed = self.0.iter();
        listed
            .find(|(known, _)| *known == port)
            .map(|(_, declared)| *declared)
    }

    /// What is declared of an endpoint's port: of the same port, else of the only one.
    pub fn behind(&self, port: u16) -> Option<AppProtocol> {
        match (self.at(port), &self.0[..]) {
            (Some(declared), _) => declared,
            (None, [(_, only)]) => *only,
            (None, _) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_endpoints_port_is_looked_up_by_number_and_then_as_the_only_one() {
        let ports = |listed: &[(u16, Option<AppProtocol>)]| Ports(listed.to_vec());
        let one = ports(&[(80, Some(AppProtocol::Tcp))]);
        assert_eq!(one.at(80), Some(Some(AppProtocol::Tcp)));
        assert_eq!(one.at(8080), None);
        assert_eq!(one.behind(8080), Some(AppProtocol::Tcp));
        let two = ports(&[(80, Some(AppProtocol::Tcp)), (81, None)]);
        assert_eq!(two.behind(80), Some(AppProtocol::Tcp));
        assert_eq!(two.behind(81), None);
        assert_eq!(two.behind(8080), None);
        assert_eq!(Ports::default().behind(80), None);
    }
}
