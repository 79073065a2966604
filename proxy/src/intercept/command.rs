//! `outrigger-proxy intercept`: from the command line and the bootstrap file to the rules.

use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{ArgGroup, ValueEnum};
use outrigger_config::bootstrap::ProxyListen;

use super::{Backend, Cidr, Family, PROXY_UID, Params, PortRange, Ports, Tools, rules, users};
use crate::cli::{REFUSED, UNUSABLE};

/// Redirect the TCP connections of this network namespace to the sidecar, with rules in its
/// kernel; needs root or CAP_NET_ADMIN and CAP_NET_RAW (not to print)
///
/// Connections that the local application opens go to the outbound listener, connections to it go
/// to the inbound listener. Left alone are UDP, DNS over TCP (port 53), whatever stays on
/// loopback, what the sidecar's own user opens, and the sidecar's admin and probe ports. A
/// redirected IPv6 connection of the application arrives on [::1], and one from outside on the
/// address of the interface: the sidecar must listen there.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Exit status: 0 done; 1 the bootstrap file, or what the options say together, is refused; 2 an \
option is wrong or a tool failed. A failure says which command it was, what it printed and what \
state is left.")]
#[command(group = ArgGroup::new("action").required(true).args(["print", "apply", "remove"]))]
pub struct Args {
    /// Show what --apply would feed to which command, and change nothing
    #[arg(long)]
    print: bool,
    /// Put the rules in place, at once, instead of whatever this command put there before
    #[arg(long)]
    apply: bool,
    /// Take away whatever this command put there; of the other options only --backend counts
    #[arg(long)]
    remove: bool,
    /// The sidecar's bootstrap file: the ports are those of its listen.outbound and
    /// listen.inbound, and those of listen.admin and listen.probes are skipped inbound
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where the sidecar's outbound listener is [default: 15001]
    #[arg(long, value_name = "PORT", conflicts_with = "config", value_parser = port())]
    outbound_port: Option<u16>,
    /// Where the sidecar's inbound listener is [default: 15006]
    #[arg(long, value_name = "PORT", conflicts_with = "config", value_parser = port())]
    inbound_port: Option<u16>,
    /// The user that the sidecar runs as, and nothing else does: a number, or a name in
    /// /etc/passwd
    #[arg(long, value_name = "USER", default_value_t = PROXY_UID, value_parser = users::uid)]
    proxy_uid: u32,
    /// A group whose processes count as the sidecar as well: a number, or a name in /etc/group
    #[arg(long, value_name = "GROUP", value_parser = users::gid)]
    proxy_gid: Option<u32>,
    /// Ports of the application that are reached directly, such as 22,15020-15021
    #[arg(long, value_name = "PORTS", value_delimiter = ',')]
    skip_inbound_ports: Vec<PortRange>,
    /// Callers that reach the application directly, such as the kubelet's 10.0.0.1
    #[arg(long, value_name = "RANGES", value_delimiter = ',')]
    skip_inbound_cidrs: Vec<Cidr>,
    /// Redirect only these ports of the application [default: all]
    #[arg(long, value_name = "PORTS", value_delimiter = ',')]
    only_inbound_ports: Vec<PortRange>,
    /// Ports that the application reaches directly wherever they are, such as 3306,5432
    #[arg(long, value_name = "PORTS", value_delimiter = ',')]
    skip_outbound_ports: Vec<PortRange>,
    /// Destinations that the application reaches directly, such as 169.254.169.254,fd00:ec2::/32
    #[arg(long, value_name = "RANGES", value_delimiter = ',')]
    skip_outbound_cidrs: Vec<Cidr>,
    /// The tool that talks to the kernel; auto: nft, else iptables-nft, else iptables-legacy,
    /// whichever is installed, and with --remove all of them
    #[arg(long, value_name = "TOOL", default_value = "auto")]
    backend: BackendChoice,
    /// Whether IPv6 is redirected as well; auto: where the kernel has it and, with --config, both
    /// listeners serve it
    #[arg(long, value_name = "WHEN", default_value = "auto")]
    ipv6: Ipv6,
}

fn port() -> clap::builder::RangedI64ValueParser<u16> {
    clap::value_parser!(u16).range(1..)
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum BackendChoice {
    Auto,
    Nft,
    IptablesNft,
    IptablesLegacy,
}

impl BackendChoice {
    fn named(self) -> Option<Backend> {
        match self {
            Self::Auto => None,
            Self::Nft => Some(Backend::Nft),
            Self::IptablesNft => Some(Backend::IptablesNft),
            Self::IptablesLegacy => Some(Backend::IptablesLegacy),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Ipv6 {
    Auto,
    On,
    Off,
}

/// Does what was asked; the exit status.
pub fn run(args: &Args) -> ExitCode {
    let tools = Tools::default();
    if args.remove {
        return finish(tools.remove(args.backend.named()));
    }
    let listen = match args.config.as_deref().map(crate::cli::bootstrap) {
        Some(Ok(bootstrap)) => Some(bootstrap.listen),
        Some(Err(status)) => return status,
        None => None,
    };
    let plan = match plan(args, listen.as_ref(), kernel_has_ipv6()) {
        Ok(plan) => plan,
        Err(wrong) => {
            match &args.config {
                Some(file) => eprintln!("outrigger-proxy: {}: {wrong}", file.display()),
                None => eprintln!("outrigger-proxy: {wrong}"),
            }
            return ExitCode::from(REFUSED);
        }
    };
    if let Some(note) = &plan.note {
        eprintln!("outrigger-proxy: {note}");
    }
    let backend = match args.backend.named().map_or_else(|| tools.choose(), Ok) {
        Ok(backend) => backend,
        Err(failure) => return finish(Err(failure)),
    };
    let rules = rules(&plan.params);
    if args.print {
        print!("{}", backend.print(&rules, plan.ipv6));
        return ExitCode::SUCCESS;
    }
    finish(tools.apply(backend, &rules, plan.ipv6))
}

fn finish(result: Result<Vec<String>, super::Failure>) -> ExitCode {
    match result {
        Ok(done) if done.is_empty() => println!("nothing to remove"),
        Ok(done) => println!("{}", done.join("\n")),
        Err(failure) => {
            eprintln!("outrigger-proxy: {failure}");
            return ExitCode::from(UNUSABLE);
        }
    }
    ExitCode::SUCCESS
}

/// Of the current network namespace, whether or not an address is there yet.
fn kernel_has_ipv6() -> bool {
    Path::new("/proc/net/if_inet6").exists()
}

#[derive(Debug, PartialEq, Eq)]
struct Plan {
    params: Params,
    ipv6: bool,
    /// What the user may not have expected.
    note: Option<String>,
}

fn plan(args: &Args, listen: Option<&ProxyListen>, kernel_has_ipv6: bool) -> Result<Plan, String> {
    let (mut outbound, mut inbound) = (Some(15001), Some(15006));
    let mut unserved = None;
    if let Some(listen) = listen {
        let out = Listener::of("outbound", &listen.outbound(), arrives_outbound)?;
        let into = Listener::of("inbound", &listen.inbound(), arrives_inbound)?;
        unserved = [&out, &into]
            .into_iter()
            .flatten()
            .find_map(Listener::without_ipv6);
        outbound = out.map(|listener| listener.port);
        inbound = into.map(|listener| listener.port);
    }
    let outbound_port = args.outbound_port.or(outbound);
    let inbound_port = args.inbound_port.or(inbound);
    // Both absent is refused where the bootstrap file is checked.
    if let Some(port) = outbound_port.filter(|port| inbound_port == Some(*port)) {
        return Err(format!(
            "port {port} cannot be outbound and inbound at once"
        ));
    }
    let (ipv6, note) = match (args.ipv6, unserved) {
        (Ipv6::On, Some(missing)) => return Err(format!("--ipv6 on: {missing}")),
        (Ipv6::Auto, Some(missing)) if kernel_has_ipv6 => {
            (false, Some(format!("IPv6 is not redirected: {missing}")))
        }
        (Ipv6::On, None) => (true, None),
        (Ipv6::Auto, None) => (kernel_has_ipv6, None),
        (Ipv6::Off, _) | (Ipv6::Auto, Some(_)) => (false, None),
    };
    let defaults = ProxyListen::default();
    let listen = listen.unwrap_or(&defaults);
    let own = listen.admin().into_iter().chain(listen.probes());
    let own = own.map(|address| PortRange::one(address.port()));
    let params = Params {
        outbound_port,
        inbound_port,
        proxy_uid: args.proxy_uid,
        proxy_gid: args.proxy_gid,
        skip_inbound_ports: Ports::new(args.skip_inbound_ports.iter().copied().chain(own)),
        skip_inbound_cidrs: args.skip_inbound_cidrs.clone(),
        only_inbound_ports: Ports::new(args.only_inbound_ports.iter().copied()),
        skip_outbound_ports: Ports::new(args.skip_outbound_ports.iter().copied()),
        skip_outbound_cidrs: args.skip_outbound_cidrs.clone(),
    };
    Ok(Plan { params, ipv6, note })
}

/// One that redirected connections can arrive at.
struct Listener {
    name: &'static str,
    port: u16,
    ipv6: bool,
}

impl Listener {
    /// None when the sidecar does not serve it.
    fn of(
        name: &'static str,
        addresses: &[SocketAddr],
        arrives: fn(IpAddr, Family) -> bool,
    ) -> Result<Option<Self>, String> {
        if addresses.is_empty() {
            return Ok(None);
        }
        let port = |family| {
            let mut addresses = addresses.iter();
            let found = addresses.find(|address| arrives(address.ip(), family));
            found.map(SocketAddr::port)
        };
        let Some(port4) = port(Family::V4) else {
            let listener = Self {
                name,
                port: addresses[0].port(),
                ipv6: false,
            };
            return Err(listener.missing(Family::V4));
        };
        if port4 == 0 {
            return Err(format!(
                "listen.{name}: port 0 is not known before the sidecar runs"
            ));
        }
        let port6 = port(Family::V6);
        if let Some(port6) = port6.filter(|port6| *port6 != port4) {
            return Err(format!(
                "listen.{name}: one port for IPv4 and IPv6 can be redirected to, not {port4} and \
                 {port6}"
            ));
        }
        Ok(Some(Self {
            name,
            port: port4,
            ipv6: port6.is_some(),
        }))
    }

    fn without_ipv6(&self) -> Option<String> {
        (!self.ipv6).then(|| self.missing(Family::V6))
    }

    fn missing(&self, family: Family) -> String {
        let Self { name, port, .. } = self;
        let (at, add) = match (*name, family) {
            ("outbound", Family::V4) => ("127.0.0.1", "127.0.0.1"),
            ("outbound", Family::V6) => ("[::1]", "[::1]"),
            (_, Family::V4) => ("an IPv4 address of this host", "0.0.0.0"),
            (_, Family::V6) => ("an IPv6 address of this host", "[::]"),
        };
        format!(
            "listen.{name} has nothing at {at}, where redirected connections arrive: add \
             {add}:{port}"
        )
    }
}

/// The kernel redirects what a process of this host opens to the loopback address.
fn arrives_outbound(address: IpAddr, family: Family) -> bool {
    match (address, family) {
        (IpAddr::V4(address), Family::V4) => {
            address.is_unspecified() || address == std::net::Ipv4Addr::LOCALHOST
        }
        (IpAddr::V6(address), Family::V4) => address.is_unspecified(),
        (IpAddr::V6(address), Family::V6) => address.is_unspecified() || address.is_loopback(),
        (IpAddr::V4(_), Family::V6) => false,
    }
}

/// The kernel redirects what comes from outside to the address of the interface.
fn arrives_inbound(address: IpAddr, family: Family) -> bool {
    match (address, family) {
        (IpAddr::V4(address), Family::V4) => !address.is_loopback(),
        (IpAddr::V6(address), Family::V4) => address.is_unspecified(),
        (IpAddr::V6(address), Family::V6) => !address.is_loopback(),
        (IpAddr::V4(_), Family::V6) => false,
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;
    use outrigger_config::Source;

    use super::*;

    #[derive(Debug, Parser)]
    struct Line {
        #[command(flatten)]
        args: Args,
    }

    fn parse(options: &str) -> Result<Args, String> {
        let words = ["intercept"].into_iter().chain(options.split_whitespace());
        let line = Line::try_parse_from(words).map_err(|error| error.to_string())?;
        Ok(line.args)
    }

    fn planned(options: &str, listen: Option<&str>) -> Result<Plan, String> {
        let args = parse(&format!("--print {options}")).expect(options);
        let listen = listen.map(|listen| {
            let text = format!("workload: {{name: web}}\nmesh: m.yaml\nlisten: {listen}\n");
            let source = Source::new("proxy.yaml", &text);
            let (bootstrap, report) = outrigger_config::bootstrap::load_proxy(&source);
            bootstrap
                .unwrap_or_else(|| panic!("{}", report.render_text()))
                .listen
        });
        plan(&args, listen.as_ref(), true)
    }

    #[test]
    fn a_wrong_option_says_what_to_write() {
        for (options, expected) in [
            ("", "--print|--apply|--remove"),
            ("--print --apply", "cannot be used with"),
            ("--print --outbound-port 0", "0 is not in 1..=65535"),
            ("--print --config f --inbound-port 9", "cannot be used with"),
            ("--print --proxy-uid nobody-here", "write a number"),
            (
                "--print --skip-inbound-ports 22,http",
                "`http` is not a port",
            ),
            ("--print --skip-outbound-ports 9-3", "write 3-9"),
            (
                "--print --skip-outbound-cidrs 10.1.0.0/8",
                "write 10.0.0.0/8",
            ),
            (
                "--print --skip-inbound-cidrs kubelet",
                "is not an address range",
            ),
            (
                "--print --backend iptables",
                "iptables-nft, iptables-legacy",
            ),
            ("--print --ipv6 yes", "[possible values: auto, on, off]"),
        ] {
            let error = parse(options).expect_err(options);
            assert!(error.contains(expected), "{options}: {error}");
        }
    }

    #[test]
    fn the_ports_are_those_of_the_bootstrap_file() {
        let listen = "{outbound: ['127.0.0.1:4140', '[::1]:4140'], inbound: '[::]:4143', \
                       admin: '127.0.0.1:4191', probes: '0.0.0.0:4192'}";
        let plan = planned("--skip-inbound-ports 22", Some(listen)).expect("a fine file");
        let skipped = ["22", "4191-4192"].map(|ports| ports.parse().expect(ports));
        assert_eq!(plan.params.outbound_port, Some(4140));
        assert_eq!(plan.params.inbound_port, Some(4143));
        assert_eq!(plan.params.skip_inbound_ports, Ports::new(skipped));
        assert!(plan.ipv6 && plan.note.is_none());
    }

    #[test]
    fn ipv6_is_redirected_only_to_listeners_that_serve_it() {
        let expected = "listen.outbound has nothing at [::1], where redirected connections \
                        arrive: add [::1]:15001";
        let v4 = Some("{outbound: '127.0.0.1:15001', inbound: '0.0.0.0:15006'}");
        let plan = planned("", v4).expect("IPv4 is fine");
        let note = format!("IPv6 is not redirected: {expected}");
        assert_eq!((plan.ipv6, plan.note), (false, Some(note)));
        assert_eq!(
            planned("--ipv6 on", v4),
            Err(format!("--ipv6 on: {expected}"))
        );
        assert_eq!(planned("--ipv6 off", v4).expect("not asked").note, None);
        assert!(planned("", None).expect("no file").ipv6);
    }

    #[test]
    fn a_listener_that_nothing_can_be_redirected_to_is_refused() {
        let add = "where redirected connections arrive: add";
        for (listen, expected) in [
            (
                "{outbound: '10.0.0.1:15001'}",
                format!("listen.outbound has nothing at 127.0.0.1, {add} 127.0.0.1:15001"),
            ),
            (
                "{inbound: '127.0.0.1:15006'}",
                format!(
                    "listen.inbound has nothing at an IPv4 address of this host, {add} \
                         0.0.0.0:15006"
                ),
            ),
            (
                "{outbound: '127.0.0.1:0'}",
                "listen.outbound: port 0 is not known before the sidecar runs".to_owned(),
            ),
            (
                "{outbound: ['127.0.0.1:1', '[::1]:2']}",
                "listen.outbound: one port for IPv4 and IPv6 can be redirected to, not 1 and 2"
                    .to_owned(),
            ),
        ] {
            assert_eq!(planned("", Some(listen)), Err(expected), "{listen}");
        }
        let same = "--outbound-port 9 --inbound-port 9";
        let expected = "port 9 cannot be outbound and inbound at once".to_owned();
        assert_eq!(planned(same, None), Err(expected));
    }

    #[test]
    fn a_listener_that_is_not_served_is_not_redirected_to() {
        let plan = planned("", Some("{outbound: []}")).expect("inbound is served");
        assert_eq!(plan.params.outbound_port, None);
        assert_eq!(plan.params.inbound_port, Some(15006));
    }
}
