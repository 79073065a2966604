//! The rules as a script for `nft -f -`: one table of our own, replaced in one transaction.

use std::fmt::Write as _;

use super::{Chain, Cidr, Family, Match, Ports, Rule, Verdict};

/// Makes the table empty and then absent, whether or not it is there; needs no `destroy`, which is
/// younger (Linux 6.3) than the kernels in use.
pub const REMOVE: &str = "add table inet outrigger\ndelete table inet outrigger\n";

/// The table that `iptables-nft` writes to.
pub fn nat_table(family: Family) -> &'static str {
    match family {
        Family::V4 => "ip nat",
        Family::V6 => "ip6 nat",
    }
}

/// The script that puts `rules` in place of whatever the table held.
pub fn script(rules: &[Rule], ipv6: bool) -> String {
    let only = if ipv6 { "" } else { "meta nfproto ipv4 " };
    let mut script = format!("{REMOVE}table inet outrigger {{\n");
    for (chain, name) in [(Chain::Inbound, "inbound"), (Chain::Outbound, "outbound")] {
        let _ = writeln!(script, "\tchain {name} {{");
        for rule in rules.iter().filter(|rule| rule.chain == chain) {
            if ipv6 || rule.family() != Some(Family::V6) {
                let _ = writeln!(script, "\t\t{}", statement(rule));
            }
        }
        script.push_str("\t}\n");
    }
    for (hook, priority, name) in [
        ("prerouting", "dstnat", "inbound"),
        ("output", "-100", "outbound"),
    ] {
        let _ = write!(
            script,
            "\tchain {hook} {{\n\
             \t\ttype nat hook {hook} priority {priority}; policy accept;\n\
             \t\t{only}meta l4proto tcp jump {name}\n\
             \t}}\n"
        );
    }
    script.push_str("}\n");
    script
}

fn statement(rule: &Rule) -> String {
    let mut words: Vec<String> = rule.matches.iter().map(condition).collect();
    words.push(match rule.verdict {
        Verdict::Leave => "return".to_owned(),
        // A port can be given only where the protocol is known.
        Verdict::Redirect(port) => format!("meta l4proto tcp redirect to :{port}"),
        Verdict::Inbound => "jump inbound".to_owned(),
    });
    words.push(format!("comment \"{}\"", rule.why));
    words.join(" ")
}

fn condition(condition: &Match) -> String {
    let header = |range: &Cidr| match range.family() {
        Family::V4 => "ip",
        Family::V6 => "ip6",
    };
    match condition {
        Match::Local => "oifname \"lo\"".to_owned(),
        Match::From(range) => format!("{} saddr {range}", header(range)),
        Match::To(range) => format!("{} daddr {range}", header(range)),
        Match::NotTo(range) => format!("{} daddr != {range}", header(range)),
        Match::Ports(ports) => format!("tcp dport {{ {} }}", listed(ports)),
        Match::Uid(uid) => format!("meta skuid {uid}"),
        Match::Gid(gid) => format!("meta skgid {gid}"),
    }
}

fn listed(ports: &Ports) -> String {
    let written: Vec<String> = ports.ranges().iter().map(ToString::to_string).collect();
    written.join(", ")
}
