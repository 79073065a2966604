//! Hosts of a test: network namespaces with names of their own, gone when dropped.

use std::ffi::OsStr;
use std::os::unix::fs::MetadataExt as _;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU16, Ordering};

use outrigger_tests::process::{binary, output, run, tool};

/// A network namespace with its loopback up.
#[derive(Debug)]
pub(crate) struct Host {
    name: String,
}

impl Host {
    /// One that is connected to nothing.
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU16 = AtomicU16::new(0);
        let own = std::fs::metadata("/proc/self").expect("there is a /proc");
        assert_eq!(
            own.uid(),
            0,
            "network namespaces need root: run this test, or tests/run, as root"
        );
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let name = format!("outrigger-{}-{number}", std::process::id());
        run(tool("ip").args(["netns", "add", &name]));
        // From here on it is removed, whatever happens.
        let host = Self { name };
        host.ip("link set lo up");
        host
    }

    /// Two that reach each other: `10.200.0.2` and `fd00:200::2` is the first one, `…3` the
    /// second, which also has `10.200.9.3`.
    pub(crate) fn pair() -> (Self, Self) {
        let (left, right) = (Self::new(), Self::new());
        let veth = format!(
            "link add eth0 netns {} type veth peer name eth0 netns {}",
            left.name, right.name
        );
        run(tool("ip").args(veth.split(' ')));
        for (host, last) in [(&left, 2), (&right, 3)] {
            host.ip("link set eth0 up");
            host.ip(&format!("addr add 10.200.0.{last}/24 dev eth0"));
            host.ip(&format!("addr add fd00:200::{last}/64 dev eth0 nodad"));
        }
        right.ip("addr add 10.200.9.3/32 dev eth0");
        left.ip("route add 10.200.9.0/24 via 10.200.0.3");
        (left, right)
    }

    /// Reaches `range` by way of another host.
    pub(crate) fn route(&self, range: &str, via: &str) {
        self.ip(&format!("route add {range} via {via}"));
    }

    fn ip(&self, arguments: &str) {
        run(tool("ip")
            .args(["-netns", &self.name])
            .args(arguments.split(' ')));
    }

    /// A program on this host.
    pub(crate) fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = tool("ip");
        command.args(["netns", "exec", &self.name]).arg(program);
        command
    }

    /// A command on this host.
    pub(crate) fn moved(&self, inner: &Command) -> Command {
        let mut command = self.command(inner.get_program());
        command.args(inner.get_args());
        command
    }

    /// A command of this user on this host. It may read every file, wherever the tests are.
    pub(crate) fn of_user(&self, uid: u32, inner: &Command) -> Command {
        let mut command = self.moved(&tool("setpriv"));
        command
            .args([format!("--reuid={uid}"), format!("--regid={uid}")])
            .arg("--clear-groups")
            .args([
                "--inh-caps=+dac_read_search",
                "--ambient-caps=+dac_read_search",
            ])
            .arg(inner.get_program())
            .args(inner.get_args());
        command
    }

    /// `outrigger-proxy intercept` on this host, with options as in a shell.
    pub(crate) fn intercept(&self, options: &str) -> Output {
        let mut command = self.command(binary("outrigger-proxy"));
        output(command.arg("intercept").args(options.split_whitespace()))
    }

    /// Every rule that the kernel has for this host, by all tools.
    pub(crate) fn all_rules(&self) -> String {
        let mut all = run(self.moved(&tool("nft")).args(["list", "ruleset"]));
        for tables in [
            "iptables-nft",
            "ip6tables-nft",
            "iptables-legacy",
            "ip6tables-legacy",
        ] {
            let saved = run(&mut self.moved(&tool(&format!("{tables}-save"))));
            // Comments have the time.
            for line in saved.lines().filter(|line| !line.starts_with('#')) {
                all.push_str(line);
                all.push('\n');
            }
        }
        all
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let _ = tool("ip").args(["netns", "del", &self.name]).status();
    }
}
