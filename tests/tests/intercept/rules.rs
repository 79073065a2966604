//! The rules of `outrigger-proxy intercept` in a kernel, with each tool.

use std::io::Write as _;
use std::process::{Command, Output, Stdio};

use outrigger_tests::process::{Process, binary, output, printed, python, run, tool};
use serde_json::Value;

use crate::netns::Host;

/// The sidecar's user, which is the default, and another.
const SIDECAR: u32 = 2102;
const APP: u32 = 1000;

const OPTIONS: &str = "--skip-inbound-ports 22,7000-7009 --skip-inbound-cidrs 10.200.9.0/24 \
                       --skip-outbound-ports 443,5000-5010 --skip-outbound-cidrs 10.200.9.0/24";

fn succeeds(output: &Output) -> String {
    assert_eq!(output.status.code(), Some(0), "{}", printed(output));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Every tool makes these tables when it is first asked about them, and only the legacy ones stay.
fn make_legacy_tables(host: &Host) {
    for tool in ["iptables-legacy", "ip6tables-legacy"] {
        run(host
            .moved(&outrigger_tests::process::tool(tool))
            .args(["-t", "nat", "-S"]));
    }
}

/// What each peer answered: the port that was reached and where the connection was meant to go.
fn asked(host: &Host, uid: u32, peers: &[&str]) -> Vec<(u16, String)> {
    let mut connect = python("redirected.py");
    let answers = run(&mut host.of_user(uid, connect.arg("connect").args(peers)));
    let answers: Vec<(u16, String)> = answers
        .lines()
        .map(|line| {
            let answer: Value = serde_json::from_str(line).unwrap_or_default();
            let reached = answer["reached"].as_u64();
            let reached = reached.unwrap_or_else(|| panic!("{uid} to {peers:?}: {answers}"));
            let reached = u16::try_from(reached).expect("a port");
            (reached, answer["meant"].as_str().unwrap_or_default().into())
        })
        .collect();
    assert_eq!(answers.len(), peers.len());
    answers
}

/// Each peer, and the port that is reached instead.
fn check_reached(host: &Host, uid: u32, expected: &[(&str, u16)]) {
    let peers: Vec<&str> = expected.iter().map(|(peer, _)| *peer).collect();
    for ((reached, meant), (peer, port)) in asked(host, uid, &peers).into_iter().zip(expected) {
        assert_eq!(reached, *port, "{uid} to {peer}");
        // What was meant is always told, redirected or not. The source is no part of it.
        let target: Vec<&str> = peer.split(',').take(2).collect();
        assert_eq!(meant, target.join(","), "{uid} to {peer}");
    }
}

fn check_redirects(backend: &str) {
    let (left, right) = Host::pair();
    let listen = |host: &Host, ports: &[&str]| {
        let mut listen = python("redirected.py");
        listen.arg("listen").args(ports);
        let mut process = Process::start("redirected.py", &mut host.moved(&listen));
        process.line("listening");
        process
    };
    let _left = listen(&left, &["22", "7005", "8080", "15001", "15006", "15020"]);
    let _right = listen(&right, &["53", "443", "5005", "9000"]);
    succeeds(&left.intercept(&format!("--apply --backend {backend} {OPTIONS}")));

    check_reached(
        &left,
        APP,
        &[
            ("10.200.0.3,9000", 15001),
            ("fd00:200::3,9000", 15001),
            // Skipped.
            ("10.200.0.3,443", 443),
            ("fd00:200::3,5005", 5005),
            ("10.200.9.3,9000", 9000),
            ("10.200.0.3,53", 53),
            // Its own host.
            ("127.0.0.1,8080", 8080),
            ("::1,8080", 8080),
            ("10.200.0.2,8080", 8080),
            ("fd00:200::2,8080", 8080),
        ],
    );
    check_reached(
        &left,
        SIDECAR,
        &[
            // A loop is impossible.
            ("10.200.0.3,9000", 9000),
            ("fd00:200::3,9000", 9000),
            // Its own service, by an address that others use as well.
            ("10.200.0.2,8080", 15006),
            ("fd00:200::2,8080", 15006),
            ("10.200.0.2,22", 22),
            // The application, after that.
            ("10.200.0.2,8080,127.0.0.1", 8080),
            ("10.200.0.2,8080,127.0.0.6", 8080),
            ("fd00:200::2,8080,::1", 8080),
            ("127.0.0.1,8080", 8080),
            ("127.0.0.9,8080", 8080),
            ("::1,8080", 8080),
        ],
    );
    check_reached(
        &right,
        APP,
        &[
            ("10.200.0.2,8080", 15006),
            ("fd00:200::2,8080", 15006),
            ("10.200.0.2,15001", 15006),
            // Skipped.
            ("10.200.0.2,22", 22),
            ("fd00:200::2,7005", 7005),
            ("10.200.0.2,15020", 15020),
            ("10.200.0.2,8080,10.200.9.3", 8080),
        ],
    );

    succeeds(&left.intercept(&format!(
        "--apply --backend {backend} --only-inbound-ports 7000-7009"
    )));
    check_reached(
        &right,
        APP,
        &[("10.200.0.2,7005", 15006), ("10.200.0.2,8080", 8080)],
    );
    succeeds(&left.intercept("--remove"));
    check_reached(&left, APP, &[("10.200.0.3,9000", 9000)]);
    check_reached(&right, APP, &[("fd00:200::2,8080", 8080)]);
}

#[test]
fn nft_redirects_what_it_should() {
    check_redirects("nft");
}

#[test]
fn iptables_nft_redirects_what_it_should() {
    check_redirects("iptables-nft");
}

#[test]
fn iptables_legacy_redirects_what_it_should() {
    check_redirects("iptables-legacy");
}

/// Twice is once, a change replaces, and removing leaves what was there before.
fn check_life(host: &Host, backend: &str) {
    let before = host.all_rules();
    let apply = |options: &str| {
        succeeds(&host.intercept(&format!("--apply --backend {backend} {options}")));
        host.all_rules()
    };
    let applied = apply(OPTIONS);
    assert!(
        applied.contains("15001") && applied.contains("443"),
        "{applied}"
    );
    assert_eq!(apply(OPTIONS), applied, "twice is once");

    let changed = apply("--outbound-port 4140 --skip-outbound-ports 6443");
    for gone in ["15001", "5010", "7009", "10.200.9.0"] {
        assert!(!changed.contains(gone), "{gone} in {changed}");
    }
    assert!(
        changed.contains("6443") && changed.contains("4140"),
        "{changed}"
    );
    let ipv4 = apply("--ipv6 off");
    assert!(!ipv4.contains("::1"), "{ipv4}");
    assert_eq!(apply(OPTIONS), applied, "back again");

    let said = succeeds(&host.intercept("--remove"));
    assert!(said.contains("removed"), "{said}");
    assert_eq!(host.all_rules(), before, "nothing is left");
    let said = succeeds(&host.intercept(&format!("--remove --backend {backend}")));
    assert_eq!(said, "nothing to remove\n");
    assert_eq!(host.all_rules(), before, "nor is anything made");
}

#[test]
fn rules_are_replaced_as_a_whole_and_leave_nothing_behind() {
    for backend in ["nft", "iptables-nft", "iptables-legacy"] {
        let host = Host::new();
        if backend == "iptables-legacy" {
            make_legacy_tables(&host);
        }
        check_life(&host, backend);
        // Among the rules of others.
        for tables in ["iptables-nft", "ip6tables-nft"] {
            let rule = "-t nat -A OUTPUT -p udp --dport 53 -j REDIRECT --to-ports 5353";
            run(host.moved(&tool(tables)).args(rule.split(' ')));
        }
        run(host
            .moved(&tool("nft"))
            .args(["add", "table", "inet", "others"]));
        check_life(&host, backend);
    }
}

#[test]
fn another_backend_takes_the_place_of_the_last() {
    let host = Host::new();
    make_legacy_tables(&host);
    let before = host.all_rules();
    let only = |backend: &str| -> String {
        let fresh = Host::new();
        make_legacy_tables(&fresh);
        succeeds(&fresh.intercept(&format!("--apply --backend {backend}")));
        fresh.all_rules()
    };
    for backend in ["nft", "iptables-nft", "iptables-legacy", "nft"] {
        succeeds(&host.intercept(&format!("--apply --backend {backend}")));
        assert_eq!(host.all_rules(), only(backend), "{backend}");
    }
    succeeds(&host.intercept("--remove"));
    assert_eq!(host.all_rules(), before);
}

/// What only nft can write makes `iptables-nft` blind to the table it is in.
#[test]
fn a_table_that_iptables_cannot_read_is_left_alone() {
    let host = Host::new();
    let foreign = || {
        let rules = "add table ip nat; \
                     add chain ip nat OUTPUT { type nat hook output priority -100; }; \
                     add rule ip nat OUTPUT fib daddr type local counter accept";
        run(host.moved(&tool("nft")).arg(rules));
    };
    foreign();
    let before = host.all_rules();
    let refused = host.intercept("--apply --backend iptables-nft");
    assert_eq!(refused.status.code(), Some(2), "{}", printed(&refused));
    let said = printed(&refused);
    assert!(said.contains("cannot read table nat"), "{said}");
    assert!(said.contains("nothing was changed"), "{said}");
    assert_eq!(host.all_rules(), before);

    succeeds(&host.intercept("--apply"));
    succeeds(&host.intercept("--remove"));
    assert_eq!(host.all_rules(), before);

    // Come later, they shut our own rules in.
    run(host
        .moved(&tool("nft"))
        .args(["delete", "table", "ip", "nat"]));
    succeeds(&host.intercept("--apply --backend iptables-nft"));
    foreign();
    let stuck = host.intercept("--remove");
    assert_eq!(stuck.status.code(), Some(2), "{}", printed(&stuck));
    assert!(printed(&stuck).contains("by hand"), "{}", printed(&stuck));
}

#[test]
fn what_is_printed_is_what_is_applied() {
    for backend in ["nft", "iptables-nft", "iptables-legacy"] {
        let (printed, applied) = (Host::new(), Host::new());
        let options = format!("--backend {backend} {OPTIONS}");
        let text = succeeds(&printed.intercept(&format!("--print {options}")));
        for part in text
            .split_inclusive('\n')
            .collect::<Vec<_>>()
            .chunk_by(|_, line| {
                // A comment begins the input of the command that it names.
                !line.starts_with("# ")
            })
        {
            let words: Vec<&str> = part[0]
                .trim_start_matches("# ")
                .split_whitespace()
                .collect();
            feed(
                printed.moved(&tool(words[0])).args(&words[1..]),
                &part.concat(),
            );
        }
        succeeds(&applied.intercept(&format!("--apply {options}")));
        assert_eq!(printed.all_rules(), applied.all_rules(), "{backend}");
    }
}

fn feed(command: &mut Command, input: &str) {
    let mut child = command.stdin(Stdio::piped()).spawn().expect("it is there");
    let mut stdin = child.stdin.take().expect("stdin is piped");
    stdin.write_all(input.as_bytes()).expect("it reads");
    drop(stdin);
    let status = child.wait().expect("it runs");
    assert!(status.success(), "{command:?}: {status}\n{input}");
}

#[test]
fn without_privileges_it_prints_and_says_why_it_cannot_apply() {
    let host = Host::new();
    let powerless = |options: &str| {
        let mut command = host.command("setpriv");
        command
            .arg("--bounding-set=-net_admin,-net_raw")
            .arg(binary("outrigger-proxy"))
            .arg("intercept");
        output(command.args(options.split(' ')))
    };
    for (backend, command) in [
        ("nft", "nft -f -: exit status: 1\n"),
        ("iptables-nft", "iptables-nft-save -t nat: exit status: "),
        (
            "iptables-legacy",
            "iptables-legacy-restore --noflush --wait=30: exit status: ",
        ),
    ] {
        succeeds(&powerless(&format!("--print --backend {backend}")));
        let failed = powerless(&format!("--apply --backend {backend}"));
        let said = String::from_utf8_lossy(&failed.stderr).into_owned();
        assert_eq!(failed.status.code(), Some(2), "{said}");
        assert!(
            said.starts_with(&format!("outrigger-proxy: {command}")),
            "{said}"
        );
        assert!(said.trim_end().ends_with("\nnothing was changed"), "{said}");
    }
}

#[test]
fn the_bootstrap_file_gives_the_ports_or_the_reason() {
    let host = Host::new();
    let dir = tempfile::tempdir().expect("a scratch directory");
    let file = dir.path().join("proxy.yaml");
    let listen = |listen: &str| {
        let text = format!("workload: {{name: web}}\nmesh: mesh.yaml\nlisten: {listen}\n");
        std::fs::write(&file, text).expect("the scratch directory is writable");
        host.intercept(&format!(
            "--print --backend nft --config {}",
            file.display()
        ))
    };
    let text = succeeds(&listen(
        "{outbound: ['127.0.0.1:4140', '[::1]:4140'], inbound: '[::]:4143', admin: '127.0.0.1:4191'}",
    ));
    for expected in [
        "redirect to :4140",
        "redirect to :4143",
        "dport { 4191 } return",
        "ip6 saddr",
    ] {
        assert!(text.contains(expected), "{expected} in {text}");
    }
    for (text, status, expected) in [
        (
            "{outbound: '10.0.0.1:15001'}",
            1,
            "listen.outbound has nothing at 127.0.0.1",
        ),
        ("{outbound: everywhere}", 1, "everywhere"),
    ] {
        let refused = listen(text);
        assert_eq!(refused.status.code(), Some(status), "{}", printed(&refused));
        assert!(
            printed(&refused).contains(expected),
            "{}",
            printed(&refused)
        );
    }
    let missing = host.intercept("--print --config /nowhere/proxy.yaml");
    assert_eq!(missing.status.code(), Some(2), "{}", printed(&missing));
    let usage = host.intercept("--apply --remove");
    assert_eq!(usage.status.code(), Some(2), "{}", printed(&usage));
}
