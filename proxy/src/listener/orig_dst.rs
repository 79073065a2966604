//! Where a connection was going before it was redirected to us, and which of them are refused.
//!
//! iptables and nft leave the original destination with the socket (`SO_ORIGINAL_DST`). The
//! kernel also answers for connections that were not redirected, with our own address; without
//! connection tracking it answers with an error. Both mean: nobody redirected it.
//!
//! | listener | original destination | what happens |
//! |---|---|---|
//! | outbound | none | explicit use: host, `:authority` or TLS server name tells the service |
//! | outbound | a service, an endpoint, or unknown | as `destination` says, after the host |
//! | inbound | none, `app` is set | to `app` |
//! | inbound | none, no `app` | refused: `not_redirected` |
//! | inbound | any other | there, instead of to `app` |
//! | both | a listener of this sidecar | refused: `loop` |
//! | both | link-local (169.254/16, fe80::/10) | refused: `link_local` |
//! | both | unspecified, multicast, broadcast | refused: `unroutable` |
//!
//! Loopback is refused only where nothing is known about it: an endpoint may be on loopback, but
//! to pass an unknown one through would hand out what only the application may reach (see
//! [`crate::unknown`]). Cloud metadata services are link-local: leave them out of the redirect.
//!
//! Stands at the head of the life of a request.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};

use socket2::SockRef;
use tokio::net::TcpStream;

use crate::listener::Direction;

/// The destination that the client asked for; `None` when nobody redirected the connection.
pub fn original(stream: &TcpStream) -> Option<SocketAddr> {
    let local = stream.local_addr().ok()?;
    let asked = ask(&SockRef::from(stream), local).ok()?;
    (asked != canonical(local)).then_some(asked)
}

/// A v4-mapped connection on a `[::]` listener is IPv4 to the redirect, so it is asked there.
fn ask(socket: &SockRef<'_>, local: SocketAddr) -> io::Result<SocketAddr> {
    let asked = match canonical(local) {
        SocketAddr::V4(_) => socket.original_dst_v4(),
        SocketAddr::V6(_) => socket.original_dst_v6(),
    }?;
    let asked = asked
        .as_socket()
        .ok_or_else(|| io::Error::other("no address of the internet family"))?;
    Ok(canonical(asked))
}

/// IPv4 as IPv4, and without the scope and flow that only the socket knows.
pub fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

/// Why a connection is refused before it is known what it speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refusal {
    /// It would come back to us.
    Loop,
    /// Nobody redirected it and there is no `app`.
    NotRedirected,
    /// Its destination is link-local.
    LinkLocal,
    /// Its destination is unknown, and on loopback.
    Loopback,
    /// Its destination is no host's address.
    Unroutable,
    /// Not TLS, where `mtls.mode` is Strict.
    Plaintext,
    /// Neither HTTP nor TLS to a known name, and no destination to pass it on to.
    NoDestination,
}

impl Refusal {
    /// As metrics and logs write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Loop => "loop",
            Self::NotRedirected => "not_redirected",
            Self::LinkLocal => "link_local",
            Self::Loopback => "loopback",
            Self::Unroutable => "unroutable",
            Self::Plaintext => "plaintext",
            Self::NoDestination => "no_destination",
        }
    }
}

/// The table above.
///
/// # Errors
/// Why the connection is refused.
pub fn judge(
    direction: Direction,
    original: Option<SocketAddr>,
    has_app: bool,
    own: &Own,
) -> Result<(), Refusal> {
    match (direction, original) {
        (Direction::Outbound, None) => Ok(()),
        (Direction::Inbound, None) if has_app => Ok(()),
        (Direction::Inbound, None) => Err(Refusal::NotRedirected),
        (_, Some(original)) => own.reachable(original),
    }
}

/// The addresses this sidecar listens on.
#[derive(Debug, Clone, Default)]
pub struct Own(Vec<SocketAddr>);

impl Own {
    /// These.
    pub fn new(listeners: impl IntoIterator<Item = SocketAddr>) -> Self {
        Self(listeners.into_iter().map(canonical).collect())
    }

    /// Whether a connection that was asked for at `addr` may be made at all.
    ///
    /// # Errors
    /// Why not.
    pub fn reachable(&self, addr: SocketAddr) -> Result<(), Refusal> {
        let addr = canonical(addr);
        // RFC 6890: "this network", and what is reserved with the broadcast address in it.
        let no_host = |ip: Ipv4Addr| ip.octets()[0] == 0 || ip.octets()[0] >= 240;
        let (link_local, no_host) = match addr.ip() {
            IpAddr::V4(ip) => (ip.is_link_local(), no_host(ip)),
            IpAddr::V6(ip) => (ip.is_unicast_link_local(), ip.is_unspecified()),
        };
        if link_local {
            return Err(Refusal::LinkLocal);
        }
        if no_host || addr.ip().is_multicast() || addr.port() == 0 {
            return Err(Refusal::Unroutable);
        }
        if self.contains(addr) {
            return Err(Refusal::Loop);
        }
        Ok(())
    }

    /// As [`Own::reachable`], for destinations that nothing is known of.
    ///
    /// # Errors
    /// Why not.
    pub fn reachable_unknown(&self, addr: SocketAddr) -> Result<(), Refusal> {
        self.reachable(addr)?;
        match addr.ip().to_canonical().is_loopback() {
            true => Err(Refusal::Loopback),
            false => Ok(()),
        }
    }

    fn contains(&self, addr: SocketAddr) -> bool {
        self.0.iter().any(|own| {
            let everywhere = own.ip().is_unspecified();
            own.port() == addr.port()
                && (own.ip() == addr.ip() || (everywhere && is_local(addr.ip())))
        })
    }
}

/// Only a local address can be bound. Asked only for destinations with the port of a listener on
/// all addresses.
fn is_local(ip: IpAddr) -> bool {
    ip.is_loopback() || UdpSocket::bind((ip, 0)).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addr(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn the_table() {
        use Direction::{Inbound, Outbound};
        let own = Own::new(["127.0.0.1:15001", "[::]:15006", "127.0.0.1:15020"].map(addr));
        let check = |direction, original: Option<&str>, has_app, expected| {
            let judged = judge(direction, original.map(addr), has_app, &own);
            assert_eq!(judged, expected, "{direction:?} {original:?} {has_app}");
        };
        check(Outbound, None, false, Ok(()));
        check(Inbound, None, true, Ok(()));
        check(Inbound, None, false, Err(Refusal::NotRedirected));
        for direction in [Outbound, Inbound] {
            let refused = |original, why| check(direction, Some(original), true, Err(why));
            refused("127.0.0.1:15001", Refusal::Loop);
            refused("[::ffff:127.0.0.1]:15020", Refusal::Loop);
            refused("127.0.0.9:15006", Refusal::Loop);
            refused("[::1]:15006", Refusal::Loop);
            refused("169.254.169.254:80", Refusal::LinkLocal);
            refused("[fe80::1]:80", Refusal::LinkLocal);
            refused("[::ffff:169.254.0.1]:80", Refusal::LinkLocal);
            refused("0.0.0.0:80", Refusal::Unroutable);
            refused("224.0.0.1:80", Refusal::Unroutable);
            refused("255.255.255.255:80", Refusal::Unroutable);
            for fine in [
                "10.96.0.12:80",
                "[fd00::12]:80",
                "127.0.0.1:9001",
                "127.0.0.2:15001",
            ] {
                check(direction, Some(fine), false, Ok(()));
            }
            // Another machine's sidecar: TEST-NET-1 is nobody's.
            check(direction, Some("192.0.2.1:15006"), false, Ok(()));
        }
        let unknown = |text| own.reachable_unknown(addr(text));
        assert_eq!(unknown("127.0.0.1:9001"), Err(Refusal::Loopback));
        assert_eq!(unknown("[::ffff:127.0.0.1]:9"), Err(Refusal::Loopback));
        assert_eq!(unknown("[::1]:9001"), Err(Refusal::Loopback));
        assert_eq!(unknown("192.0.2.1:443"), Ok(()));
    }

    #[tokio::test]
    async fn a_connection_that_nobody_redirected_has_no_original_destination() {
        for at in ["127.0.0.1:0", "[::1]:0", "[::]:0"] {
            let Ok(listener) = tokio::net::TcpListener::bind(at).await else {
                continue; // A machine without IPv6.
            };
            let port = listener.local_addr().unwrap().port();
            let to = match at {
                "[::1]:0" => SocketAddr::new(addr("[::1]:0").ip(), port),
                _ => SocketAddr::from(([127, 0, 0, 1], port)),
            };
            let client = TcpStream::connect(to).await.unwrap();
            let (accepted, _) = listener.accept().await.unwrap();
            assert_eq!(original(&accepted), None, "{at}");
            assert_eq!(original(&client), None, "{at}");
        }
    }
}
