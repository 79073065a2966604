//! Where a callback may go, and when it is sent again.
//!
//! Pure: a URL against the patterns of a rule, an address against what nobody may reach through a
//! sidecar, the pauses between tries. Whoever sends asks about the address that it is about to
//! connect to, not about a name, so that a name which changes its address gains nothing. On the
//! message's life.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use http::Uri;

use crate::authz::Block;
use crate::backoff;
use crate::time::UnixMillis;

/// The pauses between tries: those that Standard Webhooks 1.0 recommends after an immediate try.
pub const SCHEDULE: [Duration; 9] = [
    Duration::from_secs(5),
    Duration::from_secs(5 * 60),
    Duration::from_secs(30 * 60),
    Duration::from_secs(2 * 3600),
    Duration::from_secs(5 * 3600),
    Duration::from_secs(10 * 3600),
    Duration::from_secs(14 * 3600),
    Duration::from_secs(20 * 3600),
    Duration::from_secs(24 * 3600),
];

/// How much longer than its pause a try may wait, as a share of it: many callbacks that failed
/// together do not come back together.
const JITTER_DIVISOR: u32 = 10;

/// A URL that somebody wants to be called back at.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Url {
    /// `https`; else `http`.
    pub https: bool,
    /// A name in lower case, or an address, an IPv6 one without brackets.
    pub host: String,
    /// The port.
    pub port: u16,
    /// Path and query.
    pub path_and_query: String,
}

/// The text is not a URL that can be called back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NotAUrl;

impl fmt::Display for NotAUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("expected http:// or https:// with a host and without a user")
    }
}

impl std::error::Error for NotAUrl {}

impl Url {
    /// Reads an absolute URL of `http` or `https`.
    ///
    /// # Errors
    /// [`NotAUrl`] for anything else, also for one that names a user.
    pub fn parse(text: &str) -> Result<Self, NotAUrl> {
        let uri: Uri = text.parse().map_err(|_| NotAUrl)?;
        let https = match uri.scheme_str() {
            Some("https") => true,
            Some("http") => false,
            _ => return Err(NotAUrl),
        };
        let authority = uri.authority().ok_or(NotAUrl)?;
        if authority.as_str().contains('@') {
            return Err(NotAUrl);
        }
        let host = authority.host();
        let bare = host.strip_prefix('[').and_then(|h| h.strip_suffix(']'));
        let host = match bare {
            Some(address) => {
                address.parse::<Ipv6Addr>().map_err(|_| NotAUrl)?;
                address
            }
            None if is_name(host) => host,
            None => return Err(NotAUrl),
        };
        let port = match authority.as_str().rsplit_once(':') {
            // The colons of an address without a port.
            Some((_, after)) if after.ends_with(']') => None,
            Some((_, port)) => Some(port.parse().map_err(|_| NotAUrl)?),
            None => None,
        };
        Ok(Self {
            https,
            host: host.to_ascii_lowercase(),
            port: port.unwrap_or(if https { 443 } else { 80 }),
            path_and_query: uri
                .path_and_query()
                .map_or("/", |path| path.as_str())
                .to_owned(),
        })
    }

    /// The address, when the host is none that has to be looked up.
    pub fn address(&self) -> Option<IpAddr> {
        self.host.parse().ok()
    }

    /// `Host`: without the port where it is the scheme's own.
    pub fn authority(&self) -> String {
        let usual = if self.https { 443 } else { 80 };
        let host = match self.host.contains(':') {
            true => format!("[{}]", self.host),
            false => self.host.clone(),
        };
        match self.port == usual {
            true => host,
            false => format!("{host}:{}", self.port),
        }
    }

    /// Scheme, host and port: all of it that may be shown, because paths carry tokens.
    pub fn origin(&self) -> String {
        let scheme = if self.https { "https" } else { "http" };
        format!("{scheme}://{}", self.authority())
    }
}

fn is_name(host: &str) -> bool {
    let known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    !host.is_empty() && host.chars().all(known)
}

/// URLs that may be called back: a scheme, a host with `*` for one label, and a port.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pattern {
    https: bool,
    labels: Vec<Option<String>>,
    port: u16,
}

impl Pattern {
    /// Reads `https://*.shop.internal`, with a port where it is not the scheme's own.
    ///
    /// # Errors
    /// [`NotAUrl`] for anything else, also for one with a path.
    pub fn parse(text: &str) -> Result<Self, NotAUrl> {
        // A star is no part of a host: read the pattern with a name in its place.
        const STAR: &str = "outrigger-any-label";
        let url = Url::parse(&text.replace('*', STAR))?;
        if url.path_and_query != "/" {
            return Err(NotAUrl);
        }
        let label = |label: &str| match label {
            STAR => Ok(None),
            part if part.contains(STAR) => Err(NotAUrl),
            part => Ok(Some(part.to_owned())),
        };
        Ok(Self {
            https: url.https,
            labels: split(&url.host).map(label).collect::<Result<_, _>>()?,
            port: url.port,
        })
    }

    /// Whether it allows `url`.
    pub fn allows(&self, url: &Url) -> bool {
        let labels: Vec<&str> = split(&url.host).collect();
        self.https == url.https
            && self.port == url.port
            && labels.len() == self.labels.len()
            && labels
                .iter()
                .zip(&self.labels)
                .all(|(is, want)| match want {
                    None => !is.is_empty() && url.address().is_none(),
                    Some(want) => want == is,
                })
    }
}

/// The labels of a name; an address is one.
fn split(host: &str) -> impl Iterator<Item = &str> {
    let whole = host.parse::<IpAddr>().is_ok();
    host.split(move |c| c == '.' && !whole)
}

/// Whether a callback may connect to `address`: never to this host, its link or a cloud's metadata
/// service, whatever `allowed` says; with ranges in `allowed` only to these, else only to addresses
/// of the public internet.
///
/// # Errors
/// What kind of address it is.
pub fn screen(address: IpAddr, allowed: &[Block]) -> Result<(), &'static str> {
    let address = unwrapped(address);
    if let Some(kind) = forbidden(address) {
        return Err(kind);
    }
    match allowed {
        [] if is_special(address) => Err("a private address"),
        [] => Ok(()),
        ranges if ranges.iter().any(|range| range.contains(address)) => Ok(()),
        _ => Err("an address outside allowAddresses"),
    }
}

/// The address that a translator would make of it: IPv4 in IPv6 (RFC 4291 §2.5.5), through NAT64
/// (RFC 6052), 6to4 (RFC 3056).
fn unwrapped(address: IpAddr) -> IpAddr {
    let IpAddr::V6(v6) = address else {
        return address;
    };
    let [a, b, c, d, e, f, g, h] = v6.segments();
    let v4 = |high: u16, low: u16| Ipv4Addr::from_bits(u32::from(high) << 16 | u32::from(low));
    let inner = match (a, b, c, d, e, f) {
        (0, 0, 0, 0, 0, 0xffff) | (0x64, 0xff9b, 0, 0, 0, 0) => v4(g, h),
        (0, 0, 0, 0, 0, 0) if g != 0 => v4(g, h),
        (0x2002, ..) => v4(b, c),
        _ => return address,
    };
    IpAddr::V4(inner)
}

/// What nobody may reach through a sidecar.
fn forbidden(address: IpAddr) -> Option<&'static str> {
    // Metadata services outside link-local: Alibaba Cloud, Azure's platform, Oracle Cloud.
    const METADATA_V4: [Ipv4Addr; 3] = [
        Ipv4Addr::new(100, 100, 100, 200),
        Ipv4Addr::new(168, 63, 129, 16),
        Ipv4Addr::new(192, 0, 0, 192),
    ];
    // AWS, and Google Cloud.
    const METADATA_V6: [Ipv6Addr; 2] = [
        Ipv6Addr::new(0xfd00, 0xec2, 0, 0, 0, 0, 0, 0x254),
        Ipv6Addr::new(0xfd20, 0xce, 0, 0, 0, 0, 0, 0x254),
    ];
    let kind = match address {
        IpAddr::V4(v4) if v4.is_loopback() => "a loopback address",
        IpAddr::V4(v4) if v4.is_link_local() => "a link-local address",
        IpAddr::V4(v4) if METADATA_V4.contains(&v4) => "a metadata service",
        // All of 0.0.0.0/8 is "this host" (RFC 1122 §3.2.1.3).
        IpAddr::V4(v4) if v4.octets()[0] == 0 => "an unspecified address",
        IpAddr::V4(v4) if v4.is_multicast() || v4.is_broadcast() => "a multicast address",
        IpAddr::V6(v6) if v6.is_loopback() => "a loopback address",
        IpAddr::V6(v6) if v6.is_unicast_link_local() => "a link-local address",
        IpAddr::V6(v6) if METADATA_V6.contains(&v6) => "a metadata service",
        IpAddr::V6(v6) if v6.is_unspecified() => "an unspecified address",
        IpAddr::V6(v6) if v6.is_multicast() => "a multicast address",
        IpAddr::V4(_) | IpAddr::V6(_) => return None,
    };
    Some(kind)
}

/// Addresses that are not of the public internet (the IANA special-purpose registries).
fn is_special(address: IpAddr) -> bool {
    match address {
        IpAddr::V4(v4) => {
            let [a, b, c, _] = v4.octets();
            v4.is_private()
                || v4.is_documentation()
                || matches!((a, b), (100, 64..=127) | (198, 18..=19))
                || (a, b, c) == (192, 0, 0)
                || (a, b, c) == (192, 88, 99)
                || a >= 240
        }
        IpAddr::V6(v6) => {
            let [a, b, ..] = v6.segments();
            // Only 2000::/3 is given out; in it documentation, Teredo and other protocols are not.
            a >> 13 != 1 || (a, b) == (0x2001, 0xdb8) || (a == 0x2001 && b < 0x200)
        }
    }
}

/// When the next try is due after `tries` that failed; none when it was the last. The receiver may
/// ask for more time with `retry_after`, not for less.
pub fn next(
    schedule: &[Duration],
    tries: u32,
    retry_after: Option<Duration>,
    now: UnixMillis,
    rng: &mut fastrand::Rng,
) -> Option<UnixMillis> {
    let done = usize::try_from(tries).ok()?.checked_sub(1)?;
    let pause = *schedule.get(done)?;
    let pause = backoff::spread(pause, pause.saturating_add(pause / JITTER_DIVISOR), rng);
    Some(now + pause.max(retry_after.unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_is_scheme_host_port_and_path() {
        let check = |text, origin: &str, path: &str| {
            let url = Url::parse(text).unwrap();
            assert_eq!(
                (&*url.origin(), &*url.path_and_query),
                (origin, path),
                "{text}"
            );
        };
        check("https://Hooks.Shop/a?b=c", "https://hooks.shop", "/a?b=c");
        check("https://hooks.shop:443", "https://hooks.shop", "/");
        check("http://hooks.shop:443/", "http://hooks.shop:443", "/");
        check("https://[2001:DB8::1]/x", "https://[2001:db8::1]", "/x");
        check("https://[::1]:8443/x", "https://[::1]:8443", "/x");
        for text in [
            "",
            "/path",
            "ftp://hooks.shop/",
            "https://user@hooks.shop/",
            "https://user:secret@hooks.shop/",
            "https:///x",
            "https://[hooks]/",
            "https://hooks.shop:port/",
            "https://hooks.shop:99999/",
            "https://hooks%2eshop/",
            "hooks.shop:443",
        ] {
            assert_eq!(Url::parse(text), Err(NotAUrl), "{text}");
        }
    }

    #[test]
    fn a_star_stands_for_one_label() {
        let check = |pattern: &str, url: &str, expected| {
            let url = Url::parse(url).unwrap();
            let pattern_of = Pattern::parse(pattern).unwrap();
            assert_eq!(pattern_of.allows(&url), expected, "{pattern} {url:?}");
        };
        let star = "https://*.shop.internal";
        check(star, "https://hooks.shop.internal/a", true);
        check(star, "https://HOOKS.shop.internal/a", true);
        check(star, "http://hooks.shop.internal/a", false);
        check(star, "https://hooks.shop.internal:8443/a", false);
        check(star, "https://shop.internal/", false);
        check(star, "https://a.b.shop.internal/", false);
        check(star, "https://hooks.shop.internal.evil.example/", false);
        check(star, "https://evilshop.internal/", false);
        check("https://*", "https://localhost/", true);
        check("https://*", "https://10.0.0.7/", false);
        check("http://10.0.0.7:8080", "http://10.0.0.7:8080/x", true);
        check("http://*.0.0.7:8080", "http://10.0.0.7:8080/x", false);
        check("https://[2001:db8::1]", "https://[2001:db8::1]/", true);
        for pattern in [
            "*",
            "https://a*.shop",
            "https://hooks.shop/path",
            "hooks.shop",
        ] {
            assert_eq!(Pattern::parse(pattern), Err(NotAUrl), "{pattern}");
        }
    }

    #[test]
    fn loopback_link_local_and_metadata_are_never_reached() {
        let everything = [
            Block::parse("0.0.0.0/0").unwrap(),
            Block::parse("::/0").unwrap(),
        ];
        for text in [
            "127.0.0.1",
            "127.8.9.10",
            "0.0.0.0",
            "0.1.2.3",
            "169.254.169.254",
            "169.254.1.1",
            "100.100.100.200",
            "168.63.129.16",
            "192.0.0.192",
            "224.0.0.1",
            "255.255.255.255",
            "::1",
            "::",
            "fe80::1",
            "fd00:ec2::254",
            "fd20:ce::254",
            "ff02::1",
            "::ffff:127.0.0.1",
            "::ffff:169.254.169.254",
            "::127.0.0.1",
            "64:ff9b::169.254.169.254",
            "2002:7f00:1::",
            "2002:a9fe:a9fe::1",
        ] {
            let address: IpAddr = text.parse().unwrap();
            assert!(screen(address, &everything).is_err(), "{text}");
            assert!(screen(address, &[]).is_err(), "{text}");
        }
    }

    #[test]
    fn private_addresses_need_a_range_and_a_range_leaves_out_the_rest() {
        let ten = [Block::parse("10.0.0.0/8").unwrap()];
        let check = |text: &str, without, with| {
            let address: IpAddr = text.parse().unwrap();
            let found = (screen(address, &[]).is_ok(), screen(address, &ten).is_ok());
            assert_eq!(found, (without, with), "{text}");
        };
        check("10.1.2.3", false, true);
        check("::ffff:10.1.2.3", false, true);
        check("93.184.216.34", true, false);
        check("2606:2800:220:1:248:1893:25c8:1946", true, false);
        for private in [
            "172.16.0.1",
            "192.168.1.1",
            "100.64.0.1",
            "192.0.2.1",
            "198.18.0.1",
            "240.0.0.1",
            "fd12::1",
            "fec0::1",
            "2001:db8::1",
            "2001::1",
        ] {
            check(private, false, false);
        }
    }

    #[test]
    fn tries_follow_the_schedule_and_end_with_it() {
        let mut rng = fastrand::Rng::with_seed(3);
        let now = UnixMillis(1_000_000);
        for (done, pause) in (1..).zip(SCHEDULE) {
            let at = next(&SCHEDULE, done, None, now, &mut rng).unwrap();
            let waited = at.saturating_since(now);
            assert!(
                waited >= pause && waited <= pause * 11 / 10,
                "{done}: {waited:?}"
            );
        }
        assert_eq!(next(&SCHEDULE, 10, None, now, &mut rng), None);
        assert_eq!(next(&[], 1, None, now, &mut rng), None);
        let asked = Some(Duration::from_secs(60));
        let at = next(&SCHEDULE, 1, asked, now, &mut rng).unwrap();
        assert_eq!(at.saturating_since(now), Duration::from_secs(60));
        let at = next(&SCHEDULE, 2, asked, now, &mut rng).unwrap();
        assert!(at.saturating_since(now) >= Duration::from_secs(300));
    }
}
