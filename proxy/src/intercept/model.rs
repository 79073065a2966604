//! What is redirected: the rules themselves, without any tool's language.
//!
//! ```text
//! arrives from outside ──► inbound ──► the sidecar's inbound listener
//! made by a local process ──► outbound ──► the sidecar's outbound listener
//!                                  └─ the sidecar to its own host ──► inbound
//! ```
//! The shape is that of Linkerd's proxy-init, with Istio's rule for a workload that calls its own
//! service. Two differences from Istio: that call meets the whole inbound chain, so ports that are
//! skipped for others are skipped for it as well; and what marks a connection of the sidecar to
//! its own application is a source address on loopback (Istio: 127.0.0.6), which exists in both
//! families without adding an address.

use super::{Cidr, DNS, Family, Ports};

/// What the rules are made for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Params {
    /// The port of the outbound listener; none: calls of the application are not redirected.
    pub outbound_port: Option<u16>,
    /// The port of the inbound listener; none: calls to the application are not redirected.
    pub inbound_port: Option<u16>,
    /// The user that the sidecar runs as: what it opens itself is never sent back to its outbound
    /// listener.
    pub proxy_uid: u32,
    /// The group that the sidecar runs as, where its user is not its own.
    pub proxy_gid: Option<u32>,
    /// Destination ports that reach the application directly.
    pub skip_inbound_ports: Ports,
    /// Callers that reach the application directly.
    pub skip_inbound_cidrs: Vec<Cidr>,
    /// Only these destination ports are redirected; empty: all.
    pub only_inbound_ports: Ports,
    /// Destination ports that the application reaches directly. DNS is always one of them.
    pub skip_outbound_ports: Ports,
    /// Destinations that the application reaches directly.
    pub skip_outbound_cidrs: Vec<Cidr>,
}

/// A list of rules that a connection's first packet goes through; the first match decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chain {
    /// Connections to this host.
    Inbound,
    /// Connections that a process of this host opens.
    Outbound,
}

/// A condition on a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Match {
    /// It stays on this host: it leaves through the loopback interface, whatever its addresses.
    Local,
    /// Its source is in the range.
    From(Cidr),
    /// Its destination is in the range.
    To(Cidr),
    /// Its destination is not in the range, but of the same family.
    NotTo(Cidr),
    /// Its destination port is one of these.
    Ports(Ports),
    /// A process of this user opened it.
    Uid(u32),
    /// A process of this group opened it.
    Gid(u32),
}

impl Match {
    fn family(&self) -> Option<Family> {
        match self {
            Self::From(range) | Self::To(range) | Self::NotTo(range) => Some(range.family()),
            Self::Local | Self::Ports(_) | Self::Uid(_) | Self::Gid(_) => None,
        }
    }
}

/// What becomes of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Not redirected by this chain.
    Leave,
    /// To this port of the host itself.
    Redirect(u16),
    /// As if it had come from outside.
    Inbound,
}

/// All `matches` → `verdict`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// Where it stands.
    pub chain: Chain,
    /// Why it is there, for whoever lists the rules.
    pub why: &'static str,
    /// All of them must hold.
    pub matches: Vec<Match>,
    /// What happens then.
    pub verdict: Verdict,
}

impl Rule {
    /// The only family that it can match; none: both.
    pub fn family(&self) -> Option<Family> {
        self.matches.iter().find_map(Match::family)
    }
}

/// The rules, in the order in which they are asked.
pub fn rules(params: &Params) -> Vec<Rule> {
    let mut rules = inbound(params);
    rules.extend(outbound(params));
    rules
}

fn inbound(params: &Params) -> Vec<Rule> {
    let Some(port) = params.inbound_port else {
        return Vec::new();
    };
    let rule = |why, matches, verdict| Rule {
        chain: Chain::Inbound,
        why,
        matches,
        verdict,
    };
    let mut rules = Vec::new();
    if !params.skip_inbound_ports.is_empty() {
        let ports = Match::Ports(params.skip_inbound_ports.clone());
        rules.push(rule("skipped inbound port", vec![ports], Verdict::Leave));
    }
    for range in &params.skip_inbound_cidrs {
        let from = Match::From(*range);
        rules.push(rule("skipped caller", vec![from], Verdict::Leave));
    }
    let mut matches = Vec::new();
    if !params.only_inbound_ports.is_empty() {
        matches.push(Match::Ports(params.only_inbound_ports.clone()));
    }
    rules.push(rule("to the application", matches, Verdict::Redirect(port)));
    rules
}

fn outbound(params: &Params) -> Vec<Rule> {
    let rule = |why, matches, verdict| Rule {
        chain: Chain::Outbound,
        why,
        matches,
        verdict,
    };
    let loopback = [Family::V4, Family::V6].map(Cidr::loopback);
    let mut sidecar = vec![Match::Uid(params.proxy_uid)];
    sidecar.extend(params.proxy_gid.map(Match::Gid));

    let mut rules = Vec::new();
    for range in loopback {
        let matches = vec![Match::Local, Match::From(range)];
        rules.push(rule("from loopback", matches, Verdict::Leave));
    }
    if params.inbound_port.is_some() {
        for who in &sidecar {
            for range in loopback {
                let matches = vec![Match::Local, Match::NotTo(range), who.clone()];
                rules.push(rule("sidecar to its own host", matches, Verdict::Inbound));
            }
        }
    }
    for who in sidecar {
        rules.push(rule("sidecar", vec![who], Verdict::Leave));
    }
    rules.push(rule("stays here", vec![Match::Local], Verdict::Leave));
    let Some(port) = params.outbound_port else {
        return rules;
    };
    let skipped = params.skip_outbound_ports.ranges().iter().copied();
    let ports = Match::Ports(Ports::new(skipped.chain([DNS])));
    rules.push(rule("skipped outbound port", vec![ports], Verdict::Leave));
    for range in &params.skip_outbound_cidrs {
        let to = Match::To(*range);
        rules.push(rule("skipped destination", vec![to], Verdict::Leave));
    }
    rules.push(rule(
        "of the application",
        Vec::new(),
        Verdict::Redirect(port),
    ));
    rules
}

#[cfg(test)]
pub(super) mod tests {
    use std::net::IpAddr;

    use super::*;
    use crate::intercept::PROXY_UID;

    pub(in crate::intercept) fn plain() -> Params {
        Params {
            outbound_port: Some(15001),
            inbound_port: Some(15006),
            proxy_uid: PROXY_UID,
            proxy_gid: None,
            skip_inbound_ports: ports("15020"),
            skip_inbound_cidrs: Vec::new(),
            only_inbound_ports: Ports::default(),
            skip_outbound_ports: Ports::default(),
            skip_outbound_cidrs: Vec::new(),
        }
    }

    pub(in crate::intercept) fn full() -> Params {
        let range = |text: &str| text.parse::<Cidr>().expect(text);
        Params {
            proxy_uid: 1337,
            proxy_gid: Some(1338),
            skip_inbound_ports: ports("22,15020-15021"),
            skip_inbound_cidrs: vec![range("10.0.0.1"), range("fd00::/64")],
            only_inbound_ports: ports("80,8080-8089"),
            skip_outbound_ports: ports(
                "25,110,143,443,465,587,993,995,3306,5432,6379,9042,9092,11211,27017-27019,50000",
            ),
            skip_outbound_cidrs: vec![range("169.254.169.254"), range("192.168.0.0/16")],
            ..plain()
        }
    }

    pub(in crate::intercept) fn ports(text: &str) -> Ports {
        Ports::new(text.split(',').map(|part| part.parse().expect(part)))
    }

    /// The first packet of a connection.
    struct Packet {
        local: bool,
        from: IpAddr,
        to: IpAddr,
        port: u16,
        uid: u32,
    }

    fn holds(condition: &Match, packet: &Packet) -> bool {
        let same = |range: &Cidr| (range.family() == Family::V4) == packet.to.is_ipv4();
        match condition {
            Match::Local => packet.local,
            Match::From(range) => range.contains(packet.from),
            Match::To(range) => range.contains(packet.to),
            Match::NotTo(range) => same(range) && !range.contains(packet.to),
            Match::Ports(ports) => ports.contain(packet.port),
            Match::Uid(uid) => *uid == packet.uid,
            Match::Gid(gid) => *gid == packet.uid,
        }
    }

    /// The port it is redirected to, by the rules.
    fn redirected(rules: &[Rule], chain: Chain, packet: &Packet) -> Option<u16> {
        for rule in rules.iter().filter(|rule| rule.chain == chain) {
            if !rule
                .matches
                .iter()
                .all(|condition| holds(condition, packet))
            {
                continue;
            }
            match rule.verdict {
                Verdict::Leave => return None,
                Verdict::Redirect(port) => return Some(port),
                Verdict::Inbound => {
                    if let Some(port) = redirected(rules, Chain::Inbound, packet) {
                        return Some(port);
                    }
                }
            }
        }
        None
    }

    const APP: u32 = 1000;

    #[test]
    fn who_opens_it_and_where_it_goes_decide() {
        const LOCAL: bool = true;
        const AWAY: bool = false;
        let rules = rules(&plain());
        for (uid, local, from, to, port, expected) in [
            (APP, AWAY, "10.0.0.2", "10.0.0.3", 80, Some(15001)),
            (APP, AWAY, "fd00::2", "fd00::3", 80, Some(15001)),
            (APP, AWAY, "10.0.0.2", "10.0.0.3", 53, None),
            (APP, LOCAL, "127.0.0.1", "127.0.0.1", 80, None),
            (APP, LOCAL, "::1", "::1", 80, None),
            (APP, LOCAL, "10.0.0.2", "10.0.0.2", 80, None),
            (PROXY_UID, AWAY, "10.0.0.2", "10.0.0.3", 80, None),
            (PROXY_UID, AWAY, "fd00::2", "fd00::3", 80, None),
            (PROXY_UID, LOCAL, "10.0.0.2", "10.0.0.2", 80, Some(15006)),
            (PROXY_UID, LOCAL, "fd00::2", "fd00::2", 80, Some(15006)),
            (PROXY_UID, LOCAL, "10.0.0.2", "10.0.0.2", 15020, None),
            (PROXY_UID, LOCAL, "127.0.0.1", "10.0.0.2", 80, None),
            (PROXY_UID, LOCAL, "::1", "fd00::2", 80, None),
            (PROXY_UID, LOCAL, "127.0.0.1", "127.0.0.9", 80, None),
        ] {
            let packet = Packet {
                local,
                from: from.parse().expect(from),
                to: to.parse().expect(to),
                port,
                uid,
            };
            let found = redirected(&rules, Chain::Outbound, &packet);
            assert_eq!(found, expected, "{uid}: {from} to {to} {port}");
        }
    }

    #[test]
    fn the_sidecar_never_reaches_its_own_outbound_listener() {
        let with_group = Params {
            proxy_gid: Some(PROXY_UID),
            ..plain()
        };
        for params in [plain(), with_group, full()] {
            let rules = rules(&params);
            for (local, from, to) in [
                (false, "10.0.0.2", "10.0.0.3"),
                (true, "10.0.0.2", "10.0.0.2"),
                (true, "127.0.0.1", "127.0.0.1"),
                (false, "fd00::2", "fd00::3"),
                (true, "fd00::2", "fd00::2"),
            ] {
                for port in [53, 80, 443, 15001, 15006, 15020] {
                    let packet = Packet {
                        local,
                        from: from.parse().expect(from),
                        to: to.parse().expect(to),
                        port,
                        uid: params.proxy_uid,
                    };
                    let found = redirected(&rules, Chain::Outbound, &packet);
                    assert_ne!(found, params.outbound_port, "{from} to {to} {port}");
                }
            }
        }
    }

    #[test]
    fn from_outside_all_but_the_skipped_is_redirected() {
        let caught = |params: &Params, from: &str, port: u16| {
            let packet = Packet {
                local: false,
                from: from.parse().expect(from),
                to: "10.0.0.2".parse().expect("an address"),
                port,
                uid: 0,
            };
            redirected(&rules(params), Chain::Inbound, &packet)
        };
        assert_eq!(caught(&plain(), "10.0.0.1", 80), Some(15006));
        assert_eq!(caught(&plain(), "10.0.0.1", 15001), Some(15006));
        assert_eq!(caught(&plain(), "10.0.0.1", 15020), None);
        assert_eq!(caught(&full(), "10.0.0.9", 8081), Some(15006));
        assert_eq!(caught(&full(), "10.0.0.9", 22), None, "a skipped port");
        assert_eq!(
            caught(&full(), "10.0.0.9", 8090),
            None,
            "not one of the only"
        );
        assert_eq!(caught(&full(), "10.0.0.1", 8081), None, "a skipped caller");
    }

    #[test]
    fn a_direction_that_is_not_served_is_not_redirected() {
        let no_inbound = Params {
            inbound_port: None,
            ..plain()
        };
        let no_outbound = Params {
            outbound_port: None,
            ..plain()
        };
        let kept = |params: &Params, port: u16| {
            let verdict = Verdict::Redirect(port);
            rules(params).iter().any(|rule| rule.verdict == verdict)
        };
        assert!(kept(&no_inbound, 15001) && !kept(&no_inbound, 15006));
        assert!(kept(&no_outbound, 15006) && !kept(&no_outbound, 15001));
        let to_inbound = |rule: &Rule| rule.verdict == Verdict::Inbound;
        assert!(!rules(&no_inbound).iter().any(to_inbound));
    }
}
