//! Which registry a service is in: what a document says, with the defaults filled in.

use std::net::SocketAddr;
use std::time::Duration;

use outrigger_config::NamespacedName;
use outrigger_config::model::{Discovery, DnsType, MeshService};
use outrigger_config::units::Dur;

/// A service's place in a registry. Equal origins are one and the same source.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Origin {
    /// `discovery.dns`.
    Dns(Dns),
    /// `discovery.consul`.
    Consul(Consul),
    /// `discovery.eureka`.
    Eureka(Eureka),
}

/// A name in DNS.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Dns {
    pub(crate) name: String,
    pub(crate) records: DnsType,
    pub(crate) port: u16,
    pub(crate) min_ttl: Duration,
    pub(crate) max_ttl: Duration,
    /// Empty: the system's.
    pub(crate) servers: Vec<SocketAddr>,
}

/// A service in Consul.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Consul {
    pub(crate) address: String,
    pub(crate) service: String,
    pub(crate) datacenter: Option<String>,
    pub(crate) only_passing: bool,
    pub(crate) wait: Duration,
    pub(crate) token_file: Option<String>,
}

/// An application in Eureka.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Eureka {
    pub(crate) urls: Vec<String>,
    pub(crate) app: String,
    pub(crate) refresh: Duration,
}

impl Origin {
    /// Where the endpoints of `service` are found; `None` when its document lists them, they
    /// register themselves, or nothing is said.
    pub fn of(name: &NamespacedName, service: &MeshService) -> Option<Self> {
        let time = |written: Option<Dur>, default| written.map_or(default, |time| time.0);
        let seconds = Duration::from_secs;
        match service.discovery.as_ref()?.as_enum()? {
            Discovery::Dns(dns) => {
                let min_ttl = time(dns.min_ttl, seconds(5));
                Some(Self::Dns(Dns {
                    name: dns.name.clone(),
                    records: dns.type_.unwrap_or_default(),
                    port: dns.port.unwrap_or(0),
                    min_ttl,
                    max_ttl: time(dns.max_ttl, seconds(60)).max(min_ttl),
                    servers: dns.servers.clone(),
                }))
            }
            Discovery::Consul(consul) => Some(Self::Consul(Consul {
                address: consul.address.clone(),
                service: consul.service.clone().unwrap_or_else(|| name.name.clone()),
                datacenter: consul.datacenter.clone(),
                only_passing: consul.only_passing.unwrap_or(true),
                // Consul itself allows no more.
                wait: time(consul.wait, seconds(55)).min(seconds(600)),
                token_file: consul.token_file.clone(),
            })),
            Discovery::Eureka(eureka) => Some(Self::Eureka(Eureka {
                urls: eureka.urls.clone(),
                app: eureka
                    .app
                    .as_ref()
                    .unwrap_or(&name.name)
                    .to_ascii_uppercase(),
                refresh: time(eureka.refresh, seconds(30)),
            })),
            Discovery::Static(_) | Discovery::Heartbeat(_) | Discovery::Kubernetes(_) => None,
        }
    }

    /// The word in `discovery` of the document.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Dns(_) => "dns",
            Self::Consul(_) => "consul",
            Self::Eureka(_) => "eureka",
        }
    }
}
