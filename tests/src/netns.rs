//! Network namespaces, in which connections are redirected as in a pod.
//!
//! A namespace is one test's; it has loopback, the addresses the test gives it, and rules that
//! redirect connections by the address that they come from. So the test's clients are intercepted
//! and the sidecar's own connections are not, though both are in one process.

use std::fs::File;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd as _;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};
use tokio::net::{TcpSocket, TcpStream};
use tokio::time::timeout;

use crate::SOON;

static MADE: AtomicUsize = AtomicUsize::new(0);

/// A namespace of the test's own; removed when dropped.
pub struct Netns {
    name: String,
}

/// Runs `test` on a thread of its own that is in a new namespace with `addresses`, and so is
/// everything it starts. Needs root.
///
/// # Panics
/// When the namespace cannot be made, or as `test` does.
pub fn within<F: Future<Output = ()>>(
    addresses: &'static [&'static str],
    test: impl FnOnce() -> F + Send + 'static,
) {
    let running = std::thread::spawn(move || {
        let netns = Netns::new(addresses);
        netns.enter();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("a runtime");
        runtime.block_on(test());
    });
    if let Err(panic) = running.join() {
        std::panic::resume_unwind(panic);
    }
}

impl Netns {
    fn new(addresses: &[&str]) -> Self {
        let number = MADE.fetch_add(1, Ordering::Relaxed);
        let name = format!("outrigger-test-{}-{number}", std::process::id());
        tool("ip", &["netns", "add", &name]);
        let netns = Self { name };
        let ip = |args: &str| {
            let args: Vec<&str> = ["-n", &netns.name]
                .into_iter()
                .chain(args.split(' '))
                .collect();
            tool("ip", &args);
        };
        ip("link set lo up");
        for address in addresses {
            // nodad: an address is in use at once.
            let extra = if address.contains(':') { " nodad" } else { "" };
            ip(&format!("addr add {address} dev lo{extra}"));
        }
        netns
    }

    fn enter(&self) {
        let path = format!("/run/netns/{}", self.name);
        let file = File::open(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
        move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))
            .expect("in the namespace");
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = Command::new("ip")
            .args(["netns", "del", &self.name])
            .status();
    }
}

/// From now on, connections from `source` end at `port` of this machine, wherever they go.
///
/// # Panics
/// When the rule cannot be made.
pub fn redirect(source: IpAddr, port: u16) {
    let family = if source.is_ipv4() { "ip" } else { "ip6" };
    let table = format!("t{}", MADE.fetch_add(1, Ordering::Relaxed));
    let rules = format!(
        "table {family} {table} {{ chain output {{ type nat hook output priority -100; \
         {family} saddr {source} tcp dport 1-65535 redirect to :{port}; }}; }}"
    );
    tool("nft", &[&rules]);
}

/// Connects from `source` to `to`.
///
/// # Errors
/// The socket's.
pub async fn connect(source: IpAddr, to: SocketAddr) -> std::io::Result<TcpStream> {
    let socket = match to {
        SocketAddr::V4(_) => TcpSocket::new_v4()?,
        SocketAddr::V6(_) => TcpSocket::new_v6()?,
    };
    socket.bind(SocketAddr::new(source, 0))?;
    timeout(SOON, socket.connect(to))
        .await
        .unwrap_or_else(|_| Err(std::io::ErrorKind::TimedOut.into()))
}

/// How a peer ended its side.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Properly.
    Closed,
    /// With a reset.
    Reset,
}

/// Reads to the end: what came, and how it ended.
///
/// # Panics
/// When it does not end.
pub async fn read_to_end(stream: &mut TcpStream) -> (String, End) {
    use tokio::io::AsyncReadExt as _;
    let mut all = Vec::new();
    let read = timeout(SOON, stream.read_to_end(&mut all)).await;
    let end = match read.expect("it ends") {
        Ok(_) => End::Closed,
        Err(_) => End::Reset,
    };
    (String::from_utf8_lossy(&all).into_owned(), end)
}

/// How long `waiting` took.
pub async fn timed<T>(waiting: impl Future<Output = T>) -> (T, Duration) {
    let start = tokio::time::Instant::now();
    let value = waiting.await;
    (value, start.elapsed())
}

fn tool(program: &str, args: &[&str]) {
    // Debian keeps these in sbin, which is not on every user's path.
    let path = std::env::var("PATH").unwrap_or_default() + ":/usr/sbin:/sbin";
    let output = Command::new(program).args(args).env("PATH", path).output();
    let output =
        output.unwrap_or_else(|error| panic!("{program}: {error} (tests/run installs it)"));
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{program} {args:?}: {said} (network namespaces need root)"
    );
}
