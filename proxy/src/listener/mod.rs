//! Downstream connections: accepting them, learning what they speak, handing them on.

pub mod accept;
pub mod bind;
pub mod detect;
pub mod orig_dst;
pub mod tls;

/// Relative to the local application; a property of a listener only.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Calls of the application to others.
    Outbound,
    /// Calls of others to the application.
    Inbound,
}

impl Direction {
    /// As metrics and logs write it.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Outbound => "outbound",
            Self::Inbound => "inbound",
        }
    }
}
