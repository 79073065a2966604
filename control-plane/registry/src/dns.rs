//! `discovery.dns`: A and AAAA records, or SRV records with their tiers and weights.
//!
//! A name that has nothing (NXDOMAIN, or no record of the type) is an answer, which the guard
//! judges; SERVFAIL, a refusal, silence and an answer that stays truncated over TCP are errors.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use hickory_resolver::proto::rr::rdata::SRV;
use hickory_resolver::proto::rr::{RData, RecordType};
use outrigger_config::model::DnsType;
use outrigger_config::wire::Endpoint;
use tracing::warn;

use crate::names::{Addresses, Names};
use crate::origin;
use crate::source::{Answer, Asked, Source, SourceError};

/// Follows one name.
pub(crate) struct Dns {
    spec: origin::Dns,
    names: Names,
    /// The last addresses of each name: they stand in where one family or one SRV target of an
    /// answer cannot be had.
    known: BTreeMap<String, Vec<IpAddr>>,
}

impl Dns {
    pub(crate) fn new(spec: origin::Dns) -> Self {
        Self {
            names: Names::new(&spec.servers),
            spec,
            known: BTreeMap::new(),
        }
    }

    async fn look_up(&mut self) -> Result<Answer, String> {
        let (endpoints, ttl) = match self.spec.records {
            DnsType::SRV => self.services().await?,
            records => {
                let name = self.spec.name.clone();
                let (ips, ttl) = self.addresses(&name, records == DnsType::AAAA).await?;
                let endpoint = |ip: &IpAddr| endpoint(*ip, self.spec.port, 100, 0);
                (ips.iter().map(endpoint).collect(), ttl)
            }
        };
        let again_in = lifetime(ttl, self.spec.min_ttl, self.spec.max_ttl, fastrand::f64());
        Ok(Answer {
            endpoints,
            again_in,
        })
    }

    /// The endpoints of the SRV records. A target without an address is left out, as long as there
    /// is another.
    async fn services(&mut self) -> Result<(Vec<Endpoint>, Option<Duration>), String> {
        let found = self.names.records(&self.spec.name, RecordType::SRV).await?;
        let mut ttl = found.ttl;
        let records: Vec<SRV> = found.data.into_iter().filter_map(srv).collect();
        let tiers = tiers(&records);
        // Each target once: two records with one target must not disagree about it.
        let mut targets = BTreeMap::new();
        let mut problem = None;
        for record in &records {
            let target = record.target.to_utf8();
            if targets.contains_key(&target) {
                continue;
            }
            match self.addresses(&target, false).await {
                Ok((ips, of_target)) => {
                    ttl = ttl.into_iter().chain(of_target).min();
                    targets.insert(target, ips);
                }
                Err(reason) => {
                    warn!(target, reason, "SRV target left out");
                    targets.insert(target, Vec::new());
                    problem = Some(reason);
                }
            }
        }
        let mut endpoints = Vec::new();
        for record in &records {
            let ips = &targets[&record.target.to_utf8()];
            let weight = share(record.weight, ips.len());
            let tier = tiers[&record.priority];
            let each = ips
                .iter()
                .map(|ip| endpoint(*ip, record.port, weight, tier));
            endpoints.extend(each);
        }
        match problem {
            Some(problem) if endpoints.is_empty() => Err(problem),
            _ => Ok((endpoints, ttl)),
        }
    }

    /// The addresses of a name. What one family had before stands in while only the other answers,
    /// and what a whole name had before while nothing does.
    async fn addresses(
        &mut self,
        name: &str,
        v6: bool,
    ) -> Result<(Vec<IpAddr>, Option<Duration>), String> {
        let known = self.known.get(name);
        let Addresses {
            mut ips,
            ttl,
            unknown,
        } = match self.names.addresses(name, v6).await {
            Ok(found) => found,
            Err(problem) => match known {
                // Only a target among others: for the name itself the error is the answer.
                Some(ips) if self.spec.records == DnsType::SRV => return Ok((ips.clone(), None)),
                _ => return Err(problem),
            },
        };
        if let (Some(v6), Some(known)) = (unknown, known) {
            ips.extend(known.iter().filter(|ip| ip.is_ipv6() == v6));
        }
        if !ips.is_empty() {
            self.known.insert(name.to_owned(), ips.clone());
        }
        Ok((ips, ttl))
    }
}

impl Source for Dns {
    fn ask(&mut self) -> Asked<'_> {
        Box::pin(async {
            self.look_up().await.map_err(|reason| SourceError {
                reason: format!("DNS: {reason}"),
                again_in: self.spec.min_ttl.max(Duration::from_millis(50)),
            })
        })
    }
}

fn srv(data: RData) -> Option<SRV> {
    match data {
        // A target of "." says that there is decidedly no such service (RFC 2782).
        RData::SRV(srv) if !srv.target.is_root() => Some(srv),
        _ => None,
    }
}

/// Priorities are sparse and only their order counts: 10 and 20 are the tiers 0 and 1.
fn tiers(records: &[SRV]) -> BTreeMap<u16, u32> {
    let priorities: BTreeSet<u16> = records.iter().map(|record| record.priority).collect();
    let tiers = (0..).map(|tier: u32| tier.min(100));
    priorities.into_iter().zip(tiers).collect()
}

/// What each of a target's addresses weighs. An SRV weight of 0 takes very little (RFC 2782), while
/// an endpoint of weight 0 would take nothing; several addresses share their target's weight.
fn share(weight: u16, addresses: usize) -> u32 {
    let addresses = u32::try_from(addresses).unwrap_or(u32::MAX).max(1);
    (u32::from(weight) * 10 / addresses).max(1)
}

fn endpoint(ip: IpAddr, port: u16, weight: u32, priority: u32) -> Endpoint {
    Endpoint {
        // As a static endpoint is called.
        id: format!("{ip}-{port}"),
        address: ip.to_string(),
        port: port.into(),
        weight,
        priority,
        ..Endpoint::default()
    }
}

/// When to ask again: the records' lifetime within its bounds, a tenth more or less so that not
/// all names are asked at once. `random` is in 0..1.
fn lifetime(ttl: Option<Duration>, min: Duration, max: Duration, random: f64) -> Duration {
    let bounded = ttl.unwrap_or(min).clamp(min, max.max(min));
    // 0s as a bound must not become a loop without a pause.
    bounded
        .mul_f64(0.9 + 0.2 * random)
        .max(Duration::from_millis(50))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(priority: u16, weight: u16) -> SRV {
        let target = "a.example.".parse().expect("a name");
        SRV::new(priority, weight, 80, target)
    }

    #[test]
    fn priorities_become_tiers_in_their_order() {
        let records = [
            record(20, 1),
            record(0, 1),
            record(65_535, 1),
            record(20, 9),
        ];
        let tiers = tiers(&records);
        assert_eq!(tiers, [(0, 0), (20, 1), (65_535, 2)].into());
    }

    #[test]
    fn every_priority_has_a_tier() {
        let records: Vec<SRV> = (0..300).map(|priority| record(priority, 1)).collect();
        let tiers = tiers(&records);
        assert_eq!(tiers.len(), 300);
        assert_eq!(tiers[&299], 100);
    }

    #[test]
    fn a_weight_is_shared_by_addresses_and_never_nothing() {
        for (weight, addresses, expected) in [
            (0, 1, 1),
            (1, 1, 10),
            (10, 2, 50),
            (1, 100, 1),
            (65_535, 1, 655_350),
            (5, 0, 50),
        ] {
            assert_eq!(share(weight, addresses), expected, "{weight} {addresses}");
        }
    }

    #[test]
    fn lifetimes_are_bounded_and_spread() {
        let seconds = Duration::from_secs;
        let check = |ttl: Option<u64>, random, millis: u128| {
            let found = lifetime(ttl.map(seconds), seconds(5), seconds(60), random);
            assert_eq!(found.as_millis(), millis, "{ttl:?} {random}");
        };
        check(Some(0), 0.5, 5000);
        check(Some(30), 0.5, 30_000);
        check(Some(3600), 0.5, 60_000);
        check(None, 0.5, 5000);
        check(Some(30), 0.0, 27_000);
        assert!(!lifetime(None, Duration::ZERO, Duration::ZERO, 0.0).is_zero());
    }
}
