//! The rules as text for `iptables-restore --noflush`, one for each family, and what is read back
//! from `iptables-save`.
//!
//! Two chains of our own in the `nat` table and a jump to each. Declaring a chain empties it, so
//! one commit replaces the rules of a family; the jumps never change, and are added where they are
//! missing.

use std::fmt::Write as _;

use super::{Chain, Family, Match, Ports, Rule, Verdict};

/// Connections to this host.
const INBOUND: &str = "OUTRIGGER_INBOUND";
/// Connections that a process of this host opens.
pub const OUTBOUND: &str = "OUTRIGGER_OUTBOUND";
/// The kernel's chain and ours that it jumps to.
const JUMPS: [(&str, &str); 2] = [("PREROUTING", INBOUND), ("OUTPUT", OUTBOUND)];

/// The `nat` table of one family, as far as it concerns us.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Found {
    /// Our chains that exist.
    chains: Vec<&'static str>,
    /// The rules that jump to them from other chains, as `iptables-save` writes them.
    jumps: Vec<String>,
    /// The kernel's chains with rules that are not ours, and the chains of others.
    others: Vec<String>,
}

impl Found {
    /// Reads what `iptables-save -t nat` printed.
    pub fn read(saved: &str) -> Self {
        let mut found = Self::default();
        for line in saved.lines() {
            let mut words = line.split(' ');
            match words.next().unwrap_or_default() {
                "-A" => {
                    let chain = words.next().unwrap_or_default();
                    if ours(chain).is_some() {
                        continue;
                    }
                    let target = line.rsplit_once(" -j ").map(|(_, target)| target);
                    match target.and_then(ours) {
                        Some(_) => found.jumps.push(line.to_owned()),
                        None => found.others.push(chain.to_owned()),
                    }
                }
                first => {
                    let Some(chain) = first.strip_prefix(':') else {
                        continue;
                    };
                    match ours(chain) {
                        Some(chain) => found.chains.push(chain),
                        // A policy of `-` is that of a chain somebody made.
                        None if words.next() != Some("ACCEPT") => {
                            found.others.push(chain.to_owned());
                        }
                        None => {}
                    }
                }
            }
        }
        found
    }

    /// Whether nothing of ours is there.
    pub fn nothing(&self) -> bool {
        self.chains.is_empty() && self.jumps.is_empty()
    }

    /// Whether the table holds something that is not ours.
    pub fn others(&self) -> bool {
        !self.others.is_empty()
    }

    /// The kernel's chains that are empty without us.
    pub fn only_ours(&self) -> impl Iterator<Item = &'static str> {
        let jumped_from = JUMPS
            .into_iter()
            .filter(|(from, to)| self.jumps_to(from, to));
        let unused = |from: &&str| !self.others.iter().any(|other| other == from);
        jumped_from.map(|(from, _)| from).filter(unused)
    }

    fn jumps_to(&self, from: &str, to: &str) -> bool {
        let start = format!("-A {from} ");
        let end = format!(" -j {to}");
        let this = |jump: &String| jump.starts_with(&start) && jump.ends_with(&end);
        self.jumps.iter().any(this)
    }
}

fn ours(chain: &str) -> Option<&'static str> {
    [INBOUND, OUTBOUND].into_iter().find(|name| *name == chain)
}

/// What puts `rules` in place of whatever was there.
pub fn restore(rules: &[Rule], family: Family, found: &Found) -> String {
    let mut text = format!("*nat\n:{INBOUND} - [0:0]\n:{OUTBOUND} - [0:0]\n");
    for rule in rules {
        if rule.family().is_none_or(|only| only == family) {
            for line in lines(rule) {
                let _ = writeln!(text, "{line}");
            }
        }
    }
    for (from, to) in JUMPS {
        if !found.jumps_to(from, to) {
            let _ = writeln!(
                text,
                "-A {from} -p tcp -m comment --comment \"outrigger\" -j {to}"
            );
        }
    }
    text.push_str("COMMIT\n");
    text
}

/// What takes away exactly what is ours.
pub fn remove(found: &Found) -> String {
    let mut text = "*nat\n".to_owned();
    for jump in &found.jumps {
        let _ = writeln!(text, "{}", jump.replacen("-A", "-D", 1));
    }
    for command in ["-F", "-X"] {
        for chain in &found.chains {
            let _ = writeln!(text, "{command} {chain}");
        }
    }
    text.push_str("COMMIT\n");
    text
}

/// A rule, or several where its ports do not fit one.
fn lines(rule: &Rule) -> Vec<String> {
    let chain = match rule.chain {
        Chain::Inbound => INBOUND,
        Chain::Outbound => OUTBOUND,
    };
    let mut start = format!("-A {chain} -p tcp");
    let mut ports: Option<&Ports> = None;
    for condition in &rule.matches {
        let _ = match condition {
            Match::Local => write!(start, " -o lo"),
            Match::From(range) => write!(start, " -s {range}"),
            Match::To(range) => write!(start, " -d {range}"),
            Match::NotTo(range) => write!(start, " ! -d {range}"),
            Match::Uid(uid) => write!(start, " -m owner --uid-owner {uid}"),
            Match::Gid(gid) => write!(start, " -m owner --gid-owner {gid}"),
            Match::Ports(several) => {
                ports = Some(several);
                Ok(())
            }
        };
    }
    let target = match rule.verdict {
        Verdict::Leave => "RETURN".to_owned(),
        Verdict::Redirect(port) => format!("REDIRECT --to-ports {port}"),
        Verdict::Inbound => INBOUND.to_owned(),
    };
    let end = format!("-m comment --comment \"{}\" -j {target}", rule.why);
    let Some(ports) = ports else {
        return vec![format!("{start} {end}")];
    };
    let pieces = ports.multiport().into_iter();
    pieces
        .map(|piece| {
            let written: Vec<String> = piece.iter().map(|range| range.written(':')).collect();
            format!("{start} -m multiport --dports {} {end}", written.join(","))
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::intercept::model::tests::plain;
    use crate::intercept::rules;

    const FOREIGN: &str = "*nat\n\
        :PREROUTING ACCEPT [0:0]\n\
        :OUTPUT ACCEPT [0:0]\n\
        :DOCKER - [0:0]\n\
        -A PREROUTING -p udp -j OUTRIGGER_INBOUNDS\n\
        -A OUTPUT ! -d 127.0.0.0/8 -j DOCKER\n\
        COMMIT\n";

    const OURS: &str = "*nat\n\
        :PREROUTING ACCEPT [7:420]\n\
        :OUTPUT ACCEPT [9:540]\n\
        :OUTRIGGER_INBOUND - [0:0]\n\
        :OUTRIGGER_OUTBOUND - [0:0]\n\
        -A PREROUTING -p tcp -m comment --comment outrigger -j OUTRIGGER_INBOUND\n\
        -A OUTPUT -p tcp -m comment --comment outrigger -j OUTRIGGER_OUTBOUND\n\
        -A OUTRIGGER_INBOUND -p tcp -j REDIRECT --to-ports 15006\n\
        -A OUTRIGGER_OUTBOUND -o lo -p tcp -j OUTRIGGER_INBOUND\n\
        COMMIT\n";

    #[test]
    fn what_is_not_ours_is_left_alone() {
        let found = Found::read(FOREIGN);
        assert!(found.nothing() && found.others());
        assert_eq!(remove(&found), "*nat\nCOMMIT\n");
        assert!(!Found::read("").others());
        assert!(Found::read("*nat\n:OUTPUT DROP [0:0]\nCOMMIT\n").others());
    }

    #[test]
    fn removing_undoes_what_was_found() {
        let found = Found::read(OURS);
        assert!(!found.nothing() && !found.others());
        assert_eq!(
            found.only_ours().collect::<Vec<_>>(),
            ["PREROUTING", "OUTPUT"]
        );
        let shared = format!("{OURS}-A OUTPUT -p udp -j ACCEPT\n");
        let shared = Found::read(&shared);
        assert!(shared.others());
        assert_eq!(shared.only_ours().collect::<Vec<_>>(), ["PREROUTING"]);
        assert_eq!(
            remove(&found),
            "*nat\n\
             -D PREROUTING -p tcp -m comment --comment outrigger -j OUTRIGGER_INBOUND\n\
             -D OUTPUT -p tcp -m comment --comment outrigger -j OUTRIGGER_OUTBOUND\n\
             -F OUTRIGGER_INBOUND\n\
             -F OUTRIGGER_OUTBOUND\n\
             -X OUTRIGGER_INBOUND\n\
             -X OUTRIGGER_OUTBOUND\n\
             COMMIT\n"
        );
    }

    #[test]
    fn a_jump_is_added_only_where_it_is_missing() {
        let jumps = |saved: &str| -> Vec<String> {
            let text = restore(&rules(&plain()), Family::V4, &Found::read(saved));
            let jump =
                |line: &&str| line.starts_with("-A PREROUTING") || line.starts_with("-A OUTPUT");
            text.lines().filter(jump).map(str::to_owned).collect()
        };
        assert_eq!(jumps(FOREIGN).len(), 2);
        assert_eq!(jumps(OURS).len(), 0);
        let half = OURS.replace("-A OUTPUT", "-A POSTROUTING");
        assert_eq!(jumps(&half).len(), 1);
    }
}
