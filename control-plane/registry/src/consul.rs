//! `discovery.consul`: a service's health in Consul, by blocking queries.
//!
//! The rules for the index are Consul's own (its documentation of blocking queries): back to 0 when
//! it goes backwards or after an error, never 0 twice, and what comes back early is no change yet.

mod health;

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use hyper::StatusCode;
use hyper::header::{HeaderMap, HeaderName, HeaderValue};
use outrigger_config::wire::Endpoint;
use tokio::time::Instant;
use tracing::warn;

use crate::http::{Base, Reply, encode, get};
use crate::names::Names;
use crate::origin;
use crate::source::{Answer, Asked, Source, SourceError};
use health::{Instance, read};

/// What a query may take beyond its wait and the sixteenth that Consul adds to it.
const GRACE: Duration = Duration::from_secs(10);

/// A follower this far behind the leader tells of another time (`X-Consul-LastContact`).
const OLD: Duration = Duration::from_secs(30);

/// Follows one service.
pub(crate) struct Consul {
    spec: origin::Consul,
    base: Result<Base, String>,
    index: Index,
    pace: Pace,
    /// Instances may be registered by a host name.
    names: Names,
    known: BTreeMap<String, Vec<IpAddr>>,
    answered: bool,
}

impl Consul {
    pub(crate) fn new(spec: origin::Consul) -> Self {
        Self {
            base: Base::parse(&spec.address),
            spec,
            index: Index(0),
            pace: Pace::new(Instant::now()),
            names: Names::default(),
            known: BTreeMap::new(),
            answered: false,
        }
    }

    async fn query(&mut self) -> Result<Answer, SourceError> {
        let base = self.base.clone().map_err(SourceError::lasting)?;
        let (headers, path) = self.question().map_err(SourceError::lasting)?;
        let within = self.spec.wait + self.spec.wait / 16 + GRACE;
        let reply = get(&base, &path, &headers, within).await;
        let reply = reply.map_err(SourceError::passing)?;
        let lag = self.check(&reply)?;
        if let Some(lag) = lag
            && self.answered
        {
            return Err(SourceError::passing(lag));
        }
        let instances = read(&reply.body, self.spec.only_passing).map_err(SourceError::passing)?;
        let endpoints = self.resolve(instances).await;
        self.index = self.index.after(number(&reply.headers, "x-consul-index"));
        self.answered = true;
        Ok(Answer {
            endpoints,
            again_in: self.pace.spend(Instant::now()),
        })
    }

    /// The token is read each time: it is rotated by replacing the file.
    fn question(&self) -> Result<(Vec<(HeaderName, HeaderValue)>, String), String> {
        let mut headers = Vec::new();
        if let Some(file) = &self.spec.token_file {
            let token = std::fs::read_to_string(file).map_err(|e| format!("{file}: {e}"))?;
            let mut value =
                HeaderValue::from_str(token.trim()).map_err(|_| format!("{file}: not a token"))?;
            value.set_sensitive(true);
            headers.push((HeaderName::from_static("x-consul-token"), value));
        }
        // Without `passing`: an instance in maintenance is to be drained, not to be gone.
        let mut path = format!(
            "/v1/health/service/{}?stale=&index={}&wait={}ms",
            encode(&self.spec.service),
            self.index.0,
            self.spec.wait.as_millis()
        );
        if let Some(datacenter) = &self.spec.datacenter {
            path.push_str("&dc=");
            path.push_str(&encode(datacenter));
        }
        Ok((headers, path))
    }

    /// Why the reply cannot be used, or `Ok(Some)` with why only for want of something better.
    fn check(&self, reply: &Reply) -> Result<Option<String>, SourceError> {
        let text: String = String::from_utf8_lossy(&reply.body)
            .chars()
            .take(200)
            .collect();
        let problem = format!(
            "{}: {} {}",
            self.spec.address,
            reply.status.as_u16(),
            text.trim()
        );
        match reply.status {
            StatusCode::OK => {}
            StatusCode::FORBIDDEN | StatusCode::UNAUTHORIZED => {
                return Err(SourceError::lasting(problem));
            }
            _ => return Err(SourceError::passing(problem)),
        }
        let leader = reply.headers.get("x-consul-knownleader");
        if leader.is_some_and(|known| known == "false") {
            let problem = format!("{}: it knows no leader", self.spec.address);
            return Ok(Some(problem));
        }
        let behind = number(&reply.headers, "x-consul-lastcontact").map(Duration::from_millis);
        Ok(behind.filter(|behind| *behind > OLD).map(|behind| {
            format!(
                "{}: it is {} s behind its leader",
                self.spec.address,
                behind.as_secs()
            )
        }))
    }

    /// Host names become addresses; one that cannot be had keeps those it had.
    async fn resolve(&mut self, instances: Vec<Instance>) -> Vec<Endpoint> {
        let mut endpoints = Vec::new();
        for Instance { host, endpoint } in instances {
            let ips = match host.parse::<IpAddr>() {
                Ok(ip) => vec![ip],
                Err(_) => match self.names.addresses(&host, false).await {
                    Ok(found) => {
                        self.known.insert(host, found.ips.clone());
                        found.ips
                    }
                    Err(reason) => {
                        warn!(host, reason, "Consul instance without an address");
                        self.known.get(&host).cloned().unwrap_or_default()
                    }
                },
            };
            endpoints.extend(ips.iter().enumerate().map(|(n, ip)| {
                let mut endpoint = endpoint.clone();
                endpoint.address = ip.to_string();
                if n > 0 {
                    endpoint.id = format!("{}/{n}", endpoint.id);
                }
                endpoint
            }));
        }
        endpoints
    }
}

impl Source for Consul {
    fn ask(&mut self) -> Asked<'_> {
        Box::pin(async {
            let asked = self.query().await;
            if asked.is_err() {
                self.index = Index(0);
            }
            asked.map_err(|error| SourceError {
                reason: format!("Consul: {}", error.reason),
                ..error
            })
        })
    }
}

fn number(headers: &HeaderMap, name: &str) -> Option<u64> {
    headers.get(name)?.to_str().ok()?.parse().ok()
}

/// `index` of the next query; 0 does not block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Index(u64);

impl Index {
    fn after(self, answered: Option<u64>) -> Self {
        match answered {
            // It does not say: asked again without waiting there, at our own pace.
            None => Self(0),
            Some(index) if index < self.0 => Self(0),
            // 0 would be a loop without any wait.
            Some(index) => Self(index.max(1)),
        }
    }
}

/// How often Consul is asked while answers come at once: a few in a row, so that a change is known
/// at once, then one every two seconds, so that a flapping check is no load.
#[derive(Debug)]
struct Pace {
    tokens: f64,
    at: Instant,
}

impl Pace {
    const BURST: f64 = 5.0;
    const EVERY: Duration = Duration::from_secs(2);

    fn new(now: Instant) -> Self {
        Self {
            tokens: Self::BURST,
            at: now,
        }
    }

    /// Notes a query; how long to wait before the next.
    fn spend(&mut self, now: Instant) -> Duration {
        let earned = now.duration_since(self.at).as_secs_f64() / Self::EVERY.as_secs_f64();
        self.tokens = (self.tokens + earned).min(Self::BURST) - 1.0;
        self.at = now;
        Self::EVERY.mul_f64((1.0 - self.tokens).clamp(0.0, 2.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_index_follows_consuls_rules() {
        let check = |before, answered, expected| {
            assert_eq!(
                Index(before).after(answered),
                Index(expected),
                "{before} {answered:?}"
            );
        };
        check(0, Some(7), 7);
        check(7, Some(7), 7);
        check(7, Some(9), 9);
        check(7, Some(6), 0);
        check(0, Some(0), 1);
        check(7, Some(0), 0);
        check(7, None, 0);
    }

    #[test]
    fn answers_without_a_pause_are_paced_after_a_few() {
        let begin = Instant::now();
        let mut pace = Pace::new(begin);
        let first: Vec<_> = (0..4).map(|_| pace.spend(begin)).collect();
        assert!(first.iter().all(Duration::is_zero), "{first:?}");
        assert_eq!(pace.spend(begin), Pace::EVERY);
        assert_eq!(pace.spend(begin + Pace::EVERY), Pace::EVERY);
        let later = begin + Duration::from_secs(3600);
        assert!(pace.spend(later).is_zero());
    }
}
