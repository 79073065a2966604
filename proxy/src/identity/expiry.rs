//! How a connection ends whose peer's certificate expires while it is open.
//!
//! TLS looks at a certificate once. Whoever was believed then would stay so for as long as it keeps
//! the connection, so the certificate's end is the connection's: no request begins after it, those
//! under way have as long as a drain, and what is still there then is cut. Who renews in time
//! never meets this, because new requests go over new connections by then.
//!
//! On the head of a request's life, once a connection.

use std::pin::pin;
use std::time::Duration;

use metrics::Counter;
use outrigger_core::time::Mono;
use rustls::pki_types::CertificateDer;
use tracing::debug;

use crate::clock;
use crate::identity::verify;
use crate::listener::Direction;
use crate::telemetry::metrics::Metrics;
use crate::wheel::Wheel;

/// What is done with connections of one direction that outlive a certificate.
#[derive(Clone)]
pub struct Outlived {
    direction: Direction,
    drain: Duration,
    drained: Counter,
    cut: Counter,
}

impl Outlived {
    /// What is under way may go on for `drain`.
    pub fn new(metrics: &Metrics, direction: Direction, drain: Duration) -> Self {
        let counter = |end| {
            let labels = [("direction", direction.as_str()), ("end", end)];
            metrics.counter("outrigger_tls_connections_expired_total", &labels)
        };
        Self {
            direction,
            drain,
            drained: counter("drained"),
            cut: counter("cut"),
        }
    }
}

/// When a connection ends because its peer's certificate does.
#[derive(Clone)]
pub struct Expiry {
    at: Mono,
    outlived: Outlived,
}

impl Expiry {
    /// That of a connection whose peer showed `leaf`; none when nobody could tell, which whoever
    /// verified the leaf could.
    ///
    /// As the clock is set now: whoever sets it later moves no certificate's end.
    pub fn of(leaf: &CertificateDer<'_>, outlived: &Outlived) -> Option<Self> {
        // The certificate counts until the end of its last second.
        let end = u64::try_from(verify::not_after(leaf)?).ok()? + 1;
        let left =
            Duration::from_secs(end).saturating_sub(Duration::from_millis(clock::unix_now().0));
        Some(Self {
            at: clock::now() + left,
            outlived: outlived.clone(),
        })
    }

    /// From when on no request begins.
    pub fn at(&self) -> Mono {
        self.at
    }

    /// Does the `work` of the connection, to its end or until it is cut: none then.
    ///
    /// # Cancel safety
    /// That of `work`.
    pub async fn watch<T>(&self, wheel: &Wheel, work: impl Future<Output = T>) -> Option<T> {
        let outlived = &self.outlived;
        let direction = outlived.direction.as_str();
        let mut work = pin!(work);
        tokio::select! {
            biased;
            done = &mut work => {
                // The work looks at the time as well, and may have been the first to see it.
                if self.at <= clock::now() {
                    outlived.drained.increment(1);
                }
                return Some(done);
            }
            () = wheel.sleep_until(self.at) => {}
        }
        debug!(
            direction,
            "the certificate of a connection's peer has expired"
        );
        tokio::select! {
            biased;
            done = &mut work => {
                outlived.drained.increment(1);
                Some(done)
            }
            () = wheel.sleep_until(self.at + outlived.drain) => {
                outlived.cut.increment(1);
                debug!(direction, "connection cut: its peer's certificate has expired");
                None
            }
        }
    }
}
