//! Names in DNS, asked without a cache: the records' lifetimes are kept by whoever asks.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use hickory_resolver::TokioResolver;
use hickory_resolver::config::{ConnectionConfig, NameServerConfig, ResolverConfig, ResolverOpts};
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::net::{DnsError, NetError};
use hickory_resolver::proto::rr::{RData, RecordType};

/// One try at one server; there are two.
const TRY: Duration = Duration::from_secs(2);

/// Where the system says which servers to ask (resolv.conf(5)).
const SYSTEM: &str = "/etc/resolv.conf";

/// What a name has of one type; nothing is an answer too (NXDOMAIN, or no such record).
#[derive(Debug, Default)]
pub(crate) struct Records {
    pub(crate) data: Vec<RData>,
    /// Of the record that ends first; `None` where the answer does not say.
    pub(crate) ttl: Option<Duration>,
}

/// The addresses of a name.
#[derive(Debug, Default)]
pub(crate) struct Addresses {
    pub(crate) ips: Vec<IpAddr>,
    pub(crate) ttl: Option<Duration>,
    /// The family that could not be asked for, when the other answered: true is IPv6.
    pub(crate) unknown: Option<bool>,
}

/// Asks the servers that a document names, or those of the system as long as its file says so.
#[derive(Default)]
pub(crate) struct Names {
    servers: Vec<SocketAddr>,
    made: Option<(Vec<u8>, TokioResolver)>,
}

impl Names {
    pub(crate) fn new(servers: &[SocketAddr]) -> Self {
        Self {
            servers: servers.to_vec(),
            made: None,
        }
    }

    /// The records of one type.
    pub(crate) async fn records(
        &mut self,
        name: &str,
        kind: RecordType,
    ) -> Result<Records, String> {
        let resolver = self.resolver()?;
        records(&resolver, name, kind).await
    }

    /// The addresses of both families, or of IPv6 only.
    pub(crate) async fn addresses(&mut self, name: &str, v6: bool) -> Result<Addresses, String> {
        if let Ok(ip) = name.parse::<IpAddr>() {
            return Ok(Addresses {
                ips: vec![ip],
                ..Addresses::default()
            });
        }
        let resolver = self.resolver()?;
        let of_v6 = records(&resolver, name, RecordType::AAAA);
        if v6 {
            return of_v6.await.map(|six| join(&Records::default(), &six, None));
        }
        let of_v4 = records(&resolver, name, RecordType::A);
        match futures_util::future::join(of_v4, of_v6).await {
            (Ok(four), Ok(six)) => Ok(join(&four, &six, None)),
            (Ok(four), Err(_)) if !four.data.is_empty() => {
                Ok(join(&four, &Records::default(), Some(true)))
            }
            (Err(_), Ok(six)) if !six.data.is_empty() => {
                Ok(join(&Records::default(), &six, Some(false)))
            }
            (Err(problem), _) | (_, Err(problem)) => Err(problem),
        }
    }

    fn resolver(&mut self) -> Result<TokioResolver, String> {
        // A few lines; and what the system's file says may change while we run.
        let settings = match self.servers.is_empty() {
            true => std::fs::read(SYSTEM).unwrap_or_default(),
            false => Vec::new(),
        };
        if let Some((of, resolver)) = &self.made
            && *of == settings
        {
            return Ok(resolver.clone());
        }
        let mut builder = if self.servers.is_empty() {
            TokioResolver::builder_tokio().map_err(|e| format!("{SYSTEM}: {e}"))?
        } else {
            let servers = self.servers.iter().map(name_server).collect();
            let config = ResolverConfig::from_parts(None, Vec::new(), servers);
            TokioResolver::builder_with_config(config, TokioRuntimeProvider::default())
        };
        let options: &mut ResolverOpts = builder.options_mut();
        options.cache_size = 0;
        options.timeout = TRY;
        options.attempts = 2;
        let resolver = builder.build().map_err(|e| e.to_string())?;
        self.made = Some((settings, resolver.clone()));
        Ok(resolver)
    }
}

fn name_server(addr: &SocketAddr) -> NameServerConfig {
    let connections = [ConnectionConfig::udp(), ConnectionConfig::tcp()];
    let connections = connections.map(|mut connection| {
        connection.port = addr.port();
        connection
    });
    // A server that was named is to be believed also when it says that there is nothing.
    NameServerConfig::new(addr.ip(), true, connections.to_vec())
}

async fn records(
    resolver: &TokioResolver,
    name: &str,
    kind: RecordType,
) -> Result<Records, String> {
    match resolver.lookup(name, kind).await {
        Ok(found) => {
            if found.message().metadata.truncation {
                return Err(format!("{name}: the answer was cut short"));
            }
            let records = found.answers().iter();
            let ttl = records.clone().map(|record| record.ttl).min();
            let of_kind = records.filter(|record| record.data.record_type() == kind);
            Ok(Records {
                data: of_kind.map(|record| record.data.clone()).collect(),
                ttl: ttl.map(|seconds| Duration::from_secs(seconds.into())),
            })
        }
        Err(NetError::Dns(DnsError::NoRecordsFound(none))) => Ok(Records {
            data: Vec::new(),
            ttl: none
                .negative_ttl
                .map(|seconds| Duration::from_secs(seconds.into())),
        }),
        Err(error) => Err(format!("{name} {kind}: {error}")),
    }
}

fn join(four: &Records, six: &Records, unknown: Option<bool>) -> Addresses {
    let ip = |data: &RData| match data {
        RData::A(a) => Some(IpAddr::from(a.0)),
        RData::AAAA(aaaa) => Some(IpAddr::from(aaaa.0)),
        _ => None,
    };
    // An absent family says nothing about how long the other's addresses last.
    let with_any = [four, six].into_iter().filter(|r| !r.data.is_empty());
    let ttl = match (with_any.clone().next(), four.ttl, six.ttl) {
        (None, a, b) => a.into_iter().chain(b).min(),
        (Some(_), ..) => with_any.filter_map(|r| r.ttl).min(),
    };
    Addresses {
        ips: four.data.iter().chain(&six.data).filter_map(ip).collect(),
        ttl,
        unknown,
    }
}
