//! The seam between one kind of registry and everything that is the same for all of them.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use outrigger_config::wire::Endpoint;

/// What a registry says about one service.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// All of its endpoints; the order does not matter.
    pub endpoints: Vec<Endpoint>,
    /// When to ask again; nothing where the next question waits at the registry.
    pub again_in: Duration,
}

/// Why a registry gave no answer. What was known before stays in force.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub struct SourceError {
    /// For people; names the server that was asked.
    pub reason: String,
    /// The first wait before it is asked again; it doubles with every failure in a row.
    pub again_in: Duration,
}

impl SourceError {
    /// A failure that may be over in a second.
    pub(crate) fn passing(reason: impl Into<String>) -> Self {
        Self {
            reason: reason.into(),
            again_in: Duration::from_secs(1),
        }
    }

    /// A failure that somebody has to repair first, such as a refused token.
    pub(crate) fn lasting(reason: impl Into<String>) -> Self {
        Self {
            reason: reason.into(),
            again_in: Duration::from_secs(15),
        }
    }
}

/// What [`Source::ask`] returns.
pub type Asked<'a> = Pin<Box<dyn Future<Output = Result<Answer, SourceError>> + Send + 'a>>;

/// One service in one registry.
pub trait Source: Send {
    /// Asks; the future may wait at the registry until something has changed there.
    ///
    /// # Errors
    /// [`SourceError`]: nothing can be said about the service now. A registry that says that there
    /// are no endpoints is an answer and no error.
    ///
    /// # Cancel safety
    /// The future is polled to its end, or dropped together with the source.
    fn ask(&mut self) -> Asked<'_>;
}
