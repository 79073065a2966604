//! Checks of the Mesh, of services and of queues.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use super::{Checks, Subject};
use crate::document::Kind;
use crate::format::spiffe_trust_domain;
use crate::model::{
    BreakerSpec, Discovery, DnsType, EjectionSpec, HealthSpec, LoadBalancerSpec, MeshService,
};
use crate::units::{Dur, KeySource, NamespacedName};

impl<'a> Checks<'a> {
    pub(super) fn mesh(&mut self) {
        let docs = self.docs;
        let mut meshes = docs.keys().filter(|(kind, _)| *kind == Kind::Mesh);
        let Some((_, first)) = meshes.next() else {
            return;
        };
        for (kind, name) in meshes {
            let Some(at) = self.subject(*kind, name) else {
                continue;
            };
            let message = format!("there is already a Mesh, \"{}\"", first.name);
            self.error(at, "E207", "metadata.name", message);
        }
        let Some(at) = self.subject(Kind::Mesh, first) else {
            return;
        };
        let Some(defaults) = &self.config.mesh.defaults else {
            return;
        };
        let base = "spec.defaults";
        self.timeouts(at, base, defaults.timeouts.as_ref());
        self.retry(at, base, defaults.retry.as_ref());
        self.async_(at, base, defaults.async_.as_ref());
        self.breaker(at, base, defaults.breaker.as_ref());
        self.ejection(at, base, defaults.ejection.as_ref());
        self.load_balancer(at, base, defaults.load_balancer.as_ref());
        self.health(at, base, defaults.health.as_ref());
    }

    pub(super) fn services(&mut self) {
        for (name, service) in &self.config.services {
            let Some(at) = self.subject(Kind::MeshService, name) else {
                continue;
            };
            self.breaker(at, "spec", service.breaker.as_ref());
            self.ejection(at, "spec", service.ejection.as_ref());
            self.load_balancer(at, "spec", service.load_balancer.as_ref());
            self.discovery(at, service);
            self.health(at, "spec", service.health.as_ref());
            self.identities(at, service);
            self.jwt(at, service);
        }
        self.hostnames();
        self.addresses();
    }

    fn breaker(&mut self, at: Subject<'_>, base: &str, spec: Option<&BreakerSpec>) {
        let Some(spec) = spec else { return };
        if let Some(rate) = &spec.failure_rate {
            let base = format!("{base}.breaker.failureRate");
            if rate.min_requests == Some(0) {
                self.error(
                    at,
                    "E307",
                    &format!("{base}.minRequests"),
                    "must be at least 1",
                );
            }
            if rate.window.is_some_and(|window| window.enabled().is_none()) {
                self.error(
                    at,
                    "E307",
                    &format!("{base}.window"),
                    "must be longer than 0s",
                );
            }
        }
        let base = format!("{base}.breaker");
        if spec
            .open_for
            .is_some_and(|open_for| open_for.enabled().is_none())
        {
            self.error(
                at,
                "E308",
                &format!("{base}.openFor"),
                "must be longer than 0s",
            );
        }
        let keys = [
            ("openFor", spec.open_for),
            ("maxOpenFor", spec.max_open_for),
        ];
        self.ordered(at, &base, keys, [Dur(secs(10)), Dur(secs(120))]);
    }

    fn ejection(&mut self, at: Subject<'_>, base: &str, spec: Option<&EjectionSpec>) {
        let Some(spec) = spec else { return };
        let keys = [("baseTime", spec.base_time), ("maxTime", spec.max_time)];
        self.ordered(
            at,
            &format!("{base}.ejection"),
            keys,
            [Dur(secs(30)), Dur(secs(300))],
        );
    }

    fn load_balancer(&mut self, at: Subject<'_>, base: &str, spec: Option<&LoadBalancerSpec>) {
        let key = spec.and_then(|spec| spec.hash_key.as_ref());
        if let Some(KeySource::JsonPointer(_) | KeySource::Route | KeySource::Identity) = key {
            let message = "expected header:NAME, cookie:NAME or Source";
            self.error(at, "E106", &format!("{base}.loadBalancer.hashKey"), message);
        }
        let session = spec.and_then(|spec| spec.session_cookie.as_ref());
        if session.is_some() && !matches!(key, Some(KeySource::Cookie(_))) {
            let message = "needs hashKey: cookie:NAME beside it";
            let path = format!("{base}.loadBalancer.sessionCookie");
            self.error(at, "E107", &path, message);
        }
        let path = session.and_then(|session| session.path.as_deref());
        if path.is_some_and(|path| path.contains(';')) {
            let path = format!("{base}.loadBalancer.sessionCookie.path");
            self.error(at, "E305", &path, "a cookie's path has no ';'");
        }
    }

    /// Two durations of which the first must not be longer; a default stands in for one left out.
    pub(super) fn ordered(
        &mut self,
        at: Subject<'_>,
        base: &str,
        keys: [(&str, Option<Dur>); 2],
        defaults: [Dur; 2],
    ) {
        let [(low_key, low), (high_key, high)] = keys;
        let (low_value, high_value) = (low.unwrap_or(defaults[0]), high.unwrap_or(defaults[1]));
        if (low.is_none() && high.is_none()) || low_value <= high_value {
            return;
        }
        let (key, default) = if low.is_some() {
            (low_key, high.is_none())
        } else {
            (high_key, true)
        };
        let default = if default {
            ", one of them by default"
        } else {
            ""
        };
        let message =
            format!("{low_key} ({low_value}) is longer than {high_key} ({high_value}){default}");
        self.error(at, "E308", &format!("{base}.{key}"), message);
    }

    fn discovery(&mut self, at: Subject<'_>, service: &MeshService) {
        let Some(discovery) = &service.discovery else {
            self.warn(
                at,
                "W305",
                "spec",
                "no discovery: the service has no endpoints",
            );
            return;
        };
        match discovery.as_enum() {
            Some(Discovery::Static(endpoints)) => {
                let mut seen = BTreeMap::new();
                for (n, endpoint) in endpoints.iter().enumerate() {
                    let path = format!("spec.discovery.static[{n}]");
                    let address = (endpoint.address, endpoint.port);
                    if let Some(first) = seen.insert(address, n) {
                        let message = format!("the same endpoint as static[{first}]");
                        self.error(at, "E320", &path, message);
                    }
                }
                if endpoints.is_empty() {
                    let message = "the list is empty: the service has no endpoints";
                    self.warn(at, "W305", "spec.discovery.static", message);
                }
            }
            Some(Discovery::Heartbeat(heartbeat)) => {
                let keys = [
                    ("ttl", heartbeat.ttl),
                    ("removeAfter", heartbeat.remove_after),
                ];
                let defaults = [Dur(secs(15)), Dur(secs(60))];
                self.ordered(at, "spec.discovery.heartbeat", keys, defaults);
                if heartbeat.ttl.is_some_and(|ttl| ttl.enabled().is_none()) {
                    let path = "spec.discovery.heartbeat.ttl";
                    self.error(at, "E308", path, "must be longer than 0s");
                }
            }
            Some(Discovery::Dns(dns)) => {
                let keys = [("minTtl", dns.min_ttl), ("maxTtl", dns.max_ttl)];
                self.ordered(
                    at,
                    "spec.discovery.dns",
                    keys,
                    [Dur(secs(5)), Dur(secs(60))],
                );
                if dns.port.is_none() && dns.type_ != Some(DnsType::SRV) {
                    let message = "\"port\" is missing: only SRV records carry one";
                    self.error(at, "E107", "spec.discovery.dns", message);
                }
            }
            Some(Discovery::Consul(consul)) => {
                self.plain_http(at, "spec.discovery.consul.address", &consul.address);
                if consul.wait.is_some_and(|wait| wait.enabled().is_none()) {
                    let path = "spec.discovery.consul.wait";
                    self.error(at, "E308", path, "must be longer than 0s");
                }
            }
            Some(Discovery::Eureka(eureka)) => {
                if eureka.urls.is_empty() {
                    let path = "spec.discovery.eureka.urls";
                    self.error(at, "E107", path, "needs at least one server");
                }
                for (n, url) in eureka.urls.iter().enumerate() {
                    self.plain_http(at, &format!("spec.discovery.eureka.urls[{n}]"), url);
                }
                if eureka.refresh.is_some_and(|time| time.enabled().is_none()) {
                    let path = "spec.discovery.eureka.refresh";
                    self.error(at, "E308", path, "must be longer than 0s");
                }
            }
            Some(Discovery::Kubernetes(_)) | None => {}
        }
    }

    fn plain_http(&mut self, at: Subject<'_>, path: &str, url: &str) {
        if !url.starts_with("http://") {
            let message = "registries are asked in plaintext only, for now: write http://";
            self.error(at, "E305", path, message);
        } else if url.contains('@') {
            let message = "a URL with a user name is not supported";
            self.error(at, "E305", path, message);
        }
    }

    fn health(&mut self, at: Subject<'_>, base: &str, health: Option<&HealthSpec>) {
        let Some(health) = health else { return };
        let set = [
            health.http.is_some(),
            health.grpc.is_some(),
            health.tcp.is_some(),
        ];
        if set.iter().filter(|set| **set).count() != 1 {
            self.error(
                at,
                "E105",
                &format!("{base}.health"),
                "exactly one of http, grpc, tcp must be set",
            );
        }
        for (key, time) in [("interval", health.interval), ("timeout", health.timeout)] {
            if time.is_some_and(|time| time.enabled().is_none()) {
                let path = format!("{base}.health.{key}");
                self.error(at, "E308", &path, "must be longer than 0s");
            }
        }
    }

    fn identities(&mut self, at: Subject<'_>, service: &MeshService) {
        let ids = service
            .identity
            .iter()
            .flat_map(|identity| &identity.spiffe_ids)
            .enumerate();
        for (n, id) in ids {
            self.trust_domain(at, &format!("spec.identity.spiffeIds[{n}]"), id);
        }
    }

    fn jwt(&mut self, at: Subject<'_>, service: &MeshService) {
        let mut issuers = BTreeSet::new();
        for (n, jwt) in service.jwt.iter().enumerate() {
            let base = format!("spec.jwt[{n}]");
            if !issuers.insert(&jwt.issuer) {
                let message = format!("\"{}\" is listed already", jwt.issuer);
                self.error(at, "E202", &format!("{base}.issuer"), message);
            }
            let jwks = &jwt.jwks;
            if jwks.file.is_some() == jwks.url.is_some() {
                let message = "exactly one of file, url must be set";
                self.error(at, "E105", &format!("{base}.jwks"), message);
            }
            if jwks.refresh.is_some_and(|refresh| refresh.0 < secs(1)) {
                let path = format!("{base}.jwks.refresh");
                self.error(at, "E308", &path, "must be at least 1s");
            }
        }
    }

    pub(super) fn trust_domain(&mut self, at: Subject<'_>, path: &str, id: &str) {
        let Some(ours) = self.config.mesh.trust_domain.as_deref() else {
            return;
        };
        let theirs = spiffe_trust_domain(id);
        if theirs.is_some_and(|theirs| theirs != ours) {
            let message = format!("not of this mesh: its trust domain is \"{ours}\"");
            self.error(at, "E306", path, message);
        }
    }

    fn hostnames(&mut self) {
        let mut owners: BTreeMap<String, &'a NamespacedName> = BTreeMap::new();
        for (name, service) in &self.config.services {
            let Some(at) = self.subject(Kind::MeshService, name) else {
                continue;
            };
            for (n, host) in service.hostnames.iter().enumerate() {
                if let Some(owner) = owners.insert(host.to_ascii_lowercase(), name)
                    && owner != name
                {
                    let message = format!("\"{host}\" already belongs to {owner}");
                    self.error(at, "E205", &format!("spec.hostnames[{n}]"), message);
                }
            }
        }
        for (name, service) in &self.config.services {
            if !service.hostnames.is_empty() {
                continue;
            }
            for host in service.hostnames_or_default(name) {
                // A bare name is one of its own namespace; elsewhere it may be another's.
                let owner = owners.get(&host).copied().filter(|owner| {
                    *owner != name && (host.contains('.') || owner.namespace == name.namespace)
                });
                if let (Some(owner), Some(at)) = (owner, self.subject(Kind::MeshService, name)) {
                    let message =
                        format!("\"{host}\", by which this service is known, belongs to {owner}");
                    self.error(at, "E205", "metadata.name", message);
                }
            }
        }
    }

    /// A connection is for one service: an address and port cannot be those of two.
    fn addresses(&mut self) {
        let mut owners: BTreeMap<(IpAddr, u16), &'a NamespacedName> = BTreeMap::new();
        for (name, service) in &self.config.services {
            let Some(at) = self.subject(Kind::MeshService, name) else {
                continue;
            };
            for (n, address) in service.addresses.iter().enumerate() {
                let path = format!("spec.addresses[{n}]");
                if address.is_unspecified() || address.is_multicast() || is_link_local(*address) {
                    let message = format!("no service is called at {address}");
                    self.error(at, "E321", &path, message);
                    continue;
                }
                for port in service.ports_or_default() {
                    let port = port.port;
                    match owners.insert((address.to_canonical(), port), name) {
                        Some(owner) if owner == name => {
                            let message = format!("{address} is listed twice with port {port}");
                            self.error(at, "E321", &path, message);
                        }
                        Some(owner) => {
                            let message = format!("{address} with port {port} belongs to {owner}");
                            self.error(at, "E205", &path, message);
                        }
                        None => {}
                    }
                }
            }
        }
    }

    pub(super) fn queues(&mut self) {
        for (name, queue) in &self.config.queues {
            let Some(at) = self.subject(Kind::Queue, name) else {
                continue;
            };
            let Some(backend) = &queue.backend else {
                continue;
            };
            let urls = [
                (
                    "rabbitmq",
                    backend.rabbitmq.as_ref().map(|b| &b.url),
                    &["amqp", "amqps"][..],
                ),
                (
                    "nats",
                    backend.nats.as_ref().map(|b| &b.url),
                    &["nats", "tls"],
                ),
                (
                    "amqp1",
                    backend.amqp1.as_ref().map(|b| &b.url),
                    &["amqp", "amqps"],
                ),
                (
                    "mqtt",
                    backend.mqtt.as_ref().map(|b| &b.url),
                    &["mqtt", "mqtts"],
                ),
                (
                    "redis",
                    backend.redis.as_ref().map(|b| &b.url),
                    &["redis", "rediss"],
                ),
            ];
            for (key, url, schemes) in urls {
                let scheme = url.and_then(|url| url.split_once("://"));
                let fits = scheme
                    .is_some_and(|(scheme, rest)| schemes.contains(&scheme) && !rest.is_empty());
                if url.is_some() && !fits {
                    let message = format!("expected a URL such as \"{}://host\"", schemes[0]);
                    self.error(at, "E305", &format!("spec.backend.{key}.url"), message);
                }
            }
            if queue.max_bytes.is_some_and(|size| size.0 == 0) {
                self.error(at, "E305", "spec.maxBytes", "must be more than 0");
            }
            let quota = queue.per_caller.as_ref();
            let bytes = quota.and_then(|quota| quota.max_bytes);
            if bytes.is_some_and(|size| size.0 == 0) {
                self.error(at, "E305", "spec.perCaller.maxBytes", "must be more than 0");
            }
            if let Some(events) = &queue.events {
                let url = events.url.split_once("://");
                let fits = url.is_some_and(|(scheme, rest)| {
                    let host = rest.split(['/', '?']).next().unwrap_or_default();
                    matches!(scheme, "http" | "https") && !host.is_empty() && !host.contains('@')
                });
                if !fits {
                    let message = "expected a URL such as \"http://host:8080/events\"";
                    self.error(at, "E305", "spec.events.url", message);
                }
            }
        }
    }
}

fn is_link_local(address: IpAddr) -> bool {
    match address.to_canonical() {
        IpAddr::V4(address) => address.is_link_local(),
        IpAddr::V6(address) => address.is_unicast_link_local(),
    }
}

fn secs(seconds: u64) -> std::time::Duration {
    std::time::Duration::from_secs(seconds)
}
