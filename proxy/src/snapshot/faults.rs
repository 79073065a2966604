//! `fault.async`, compiled: what goes wrong with messages on purpose, and how often it did.
//!
//! Stands on the life of a config update.

use std::sync::Arc;
use std::time::Duration;

use metrics::Counter;
use outrigger_config::effective;
use outrigger_config::model::{FaultDelay, FaultShare};
use outrigger_core::fault::{Params, Share};

use crate::snapshot::compile::header_matches;
use crate::telemetry::metrics::Metrics;

/// What goes wrong with a rule's messages.
#[derive(Debug)]
pub struct AsyncFaults {
    /// Which requests are concerned; of the rest of it nothing is set.
    pub concerned: Params,
    /// The store refuses.
    pub store_error: Option<Meets<()>>,
    /// The store's word is lost.
    pub lost_acknowledgement: Option<Meets<()>>,
    /// A delivery is made twice.
    pub duplicate: Option<Meets<()>>,
    /// A message falls due later.
    pub delay: Option<Meets<Duration>>,
    /// A delivery takes longer.
    pub slow_consumer: Option<Meets<Duration>>,
}

/// One fault: how often it happens, what it is, and how often it did happen.
pub struct Meets<T> {
    share: Share,
    what: T,
    injected: Counter,
}

impl<T: Copy> Meets<T> {
    /// Draws, and counts what is met.
    pub fn draw(&self, rng: &mut fastrand::Rng) -> Option<T> {
        if !self.share.draw(rng) {
            return None;
        }
        self.injected.increment(1);
        Some(self.what)
    }
}

impl<T: std::fmt::Debug> std::fmt::Debug for Meets<T> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}% {:?}", self.share.0, self.what)
    }
}

/// The faults of a rule's messages; none where it has none.
pub fn compile(
    features: &effective::Features,
    metrics: &Metrics,
    route: &str,
) -> Option<Arc<AsyncFaults>> {
    let fault = features.fault.as_deref()?;
    let spec = fault.async_.as_ref()?;
    let counter = |kind: &str| {
        let labels = [("route", route), ("kind", kind)];
        metrics.counter("outrigger_faults_injected_total", &labels)
    };
    let share = |spec: &Option<FaultShare>, kind| {
        let spec = spec.as_ref()?;
        Some(Meets {
            share: Share(spec.percent.0),
            what: (),
            injected: counter(kind),
        })
    };
    let pause = |spec: &Option<FaultDelay>, kind| {
        let spec = spec.as_ref()?;
        Some(Meets {
            share: Share(spec.percent.0),
            what: spec.fixed.0,
            injected: counter(kind),
        })
    };
    Some(Arc::new(AsyncFaults {
        concerned: Params {
            headers: header_matches(&fault.headers),
            ..Params::default()
        },
        store_error: share(&spec.store_error, "async.storeError"),
        lost_acknowledgement: share(&spec.lost_acknowledgement, "async.lostAcknowledgement"),
        duplicate: share(&spec.duplicate, "async.duplicate"),
        delay: pause(&spec.delay, "async.delay"),
        slow_consumer: pause(&spec.slow_consumer, "async.slowConsumer"),
    }))
}
