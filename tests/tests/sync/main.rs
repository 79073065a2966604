//! The life of a request through one real sidecar, or two.

mod balancing;
mod breaker;
mod bulkhead;
mod deadlines;
mod drain;
mod headers;
mod health;
mod hedging;
mod protocols;
mod races;
mod retries;
mod routing;
mod screen;
mod sharing;
mod switch;
mod timeouts;
mod uploads;
