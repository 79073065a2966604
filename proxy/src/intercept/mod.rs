//! Transparent interception: the redirect rules of one network namespace.
//!
//! Owns what the rules are ([`rules`], pure), how each tool is told ([`nft`], [`iptables`]) and
//! putting them in place and away ([`Tools`]). The data plane knows nothing of this module: it
//! only sees connections whose original destination is not the address they arrived at.
//! Runs once, before the sidecar starts, in its own process and with privileges that the sidecar
//! does not have.
//!
//! Only new TCP connections are looked at. UDP, DNS over TCP (port 53) and whatever stays on
//! loopback are never redirected.

mod apply;
mod cidr;
pub mod command;
pub mod iptables;
mod model;
pub mod nft;
mod ports;
mod users;

pub use apply::{Backend, Failure, Tools};
pub use cidr::{Cidr, Family};
pub use model::{Chain, Match, Params, Rule, Verdict, rules};
pub use ports::{PortRange, Ports};

/// The user id of the sidecar unless another is named, the one Linkerd's sidecar has.
pub const PROXY_UID: u32 = 2102;

/// DNS over TCP is no more captured than DNS over UDP: a resolver falls back to it by itself.
const DNS: PortRange = PortRange::one(53);
