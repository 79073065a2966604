//! Address ranges.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

/// IPv4 or IPv6.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

/// An address range such as `10.0.0.0/8`; the bits beyond the prefix are 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cidr {
    address: IpAddr,
    prefix: u8,
}

impl Cidr {
    /// The loopback addresses of a family.
    pub const fn loopback(family: Family) -> Self {
        match family {
            Family::V4 => Self {
                address: IpAddr::V4(Ipv4Addr::new(127, 0, 0, 0)),
                prefix: 8,
            },
            Family::V6 => Self {
                address: IpAddr::V6(Ipv6Addr::LOCALHOST),
                prefix: 128,
            },
        }
    }

    /// Which addresses it is made of.
    pub fn family(&self) -> Family {
        match self.address {
            IpAddr::V4(_) => Family::V4,
            IpAddr::V6(_) => Family::V6,
        }
    }

    /// Whether it holds an address.
    #[cfg(test)]
    pub(super) fn contains(&self, address: IpAddr) -> bool {
        address.is_ipv4() == self.address.is_ipv4() && base(address, self.prefix) == self.address
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)
    }
}

/// The first address of the range of `address`.
fn base(address: IpAddr, prefix: u8) -> IpAddr {
    match address {
        IpAddr::V4(address) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0);
            IpAddr::V4(Ipv4Addr::from_bits(address.to_bits() & mask))
        }
        IpAddr::V6(address) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(prefix)).unwrap_or(0);
            IpAddr::V6(Ipv6Addr::from_bits(address.to_bits() & mask))
        }
    }
}

impl FromStr for Cidr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let wrong = || {
            format!(
                "`{text}` is not an address range: write one such as 10.0.0.0/8, fd00::/8 or \
                 10.0.0.1"
            )
        };
        let (address, prefix) = match text.split_once('/') {
            Some((address, prefix)) => (address, Some(prefix)),
            None => (text, None),
        };
        let address: IpAddr = address.parse().map_err(|_| wrong())?;
        let most = if address.is_ipv4() { 32 } else { 128 };
        let prefix = match prefix {
            Some(prefix) => prefix.parse().map_err(|_| wrong())?,
            None => most,
        };
        if prefix > most {
            return Err(format!("{text}: the longest prefix is /{most}"));
        }
        let first = base(address, prefix);
        if first != address {
            return Err(format!(
                "{text} has bits beyond its prefix: write {first}/{prefix}"
            ));
        }
        Ok(Self { address, prefix })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_alone_is_a_range_of_one() {
        let written = |text: &str| text.parse::<Cidr>().expect(text).to_string();
        assert_eq!(written("10.0.0.1"), "10.0.0.1/32");
        assert_eq!(written("fd00::1"), "fd00::1/128");
        assert_eq!(written("0.0.0.0/0"), "0.0.0.0/0");
        assert_eq!(written("::/0"), "::/0");
        assert_eq!(written("10.128.0.0/9"), "10.128.0.0/9");
    }

    #[test]
    fn a_wrong_range_says_what_to_write() {
        let refused = |text: &str| text.parse::<Cidr>().expect_err(text);
        assert_eq!(
            refused("10.1.2.3/8"),
            "10.1.2.3/8 has bits beyond its prefix: write 10.0.0.0/8"
        );
        assert_eq!(
            refused("fd00::1/64"),
            "fd00::1/64 has bits beyond its prefix: write fd00::/64"
        );
        assert_eq!(
            refused("10.0.0.0/33"),
            "10.0.0.0/33: the longest prefix is /32"
        );
        for text in [
            "",
            "10.0.0",
            "kubelet",
            "10.0.0.0/",
            "10.0.0.0/-1",
            "10.0.0.0/8/8",
        ] {
            let expected = format!("`{text}` is not an address range: write one such as ");
            assert!(refused(text).starts_with(&expected), "{}", refused(text));
        }
    }
}
