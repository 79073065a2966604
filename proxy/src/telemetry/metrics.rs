//! The metrics registry of one sidecar.
//!
//! Counters and gauges are handles of the exporter's recorder, resolved once when a snapshot is
//! compiled; no label is formatted while a request runs. Histograms are our own atomic buckets,
//! because the exporter's keep every sample until the next scrape. Gauges of state that changes
//! by itself (breakers, queues, connections) are set just before a scrape is rendered.
//!
//! There is no global recorder: several sidecars live in one process under test.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use metrics::{Counter, Gauge, Key, KeyName, Label, Level, Metadata, Recorder, Unit};
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle, PrometheusRecorder};

const METADATA: Metadata<'static> = Metadata::new("outrigger", Level::INFO, None);

/// One family per row: name, kind, help. The names are PRODUCT's contract.
const FAMILIES: &[(&str, Kind, &str)] = &[
    (
        "outrigger_requests_total",
        Kind::Counter,
        "Requests ended, by route and answer; code is Outrigger's own error code or empty.",
    ),
    (
        "outrigger_attempts_total",
        Kind::Counter,
        "Tries sent or attempted towards an endpoint.",
    ),
    (
        "outrigger_retries_total",
        Kind::Counter,
        "Retry decisions: retried, resent (nobody had worked on it), or why not.",
    ),
    (
        "outrigger_hedges_total",
        Kind::Counter,
        "Second tries beside a slow first one: won, lost, or why there was none.",
    ),
    (
        "outrigger_breaker_state",
        Kind::Gauge,
        "Breaker of a service: 0 closed, 1 half-open, 2 open.",
    ),
    (
        "outrigger_breaker_openings",
        Kind::Gauge,
        "How often the breaker of a service opened since start.",
    ),
    (
        "outrigger_endpoints",
        Kind::Gauge,
        "Endpoints known for a service: available, ejected, unhealthy, draining or disabled.",
    ),
    (
        "outrigger_health_checks_total",
        Kind::Counter,
        "Active health checks, by result: passed or failed.",
    ),
    (
        "outrigger_balancer_panic",
        Kind::Gauge,
        "1 while too few endpoints of a service are available and health is ignored.",
    ),
    (
        "outrigger_panic_picks_total",
        Kind::Counter,
        "Endpoints picked whatever their health, because too few were available.",
    ),
    (
        "outrigger_in_flight",
        Kind::Gauge,
        "Requests in flight to a service.",
    ),
    (
        "outrigger_in_flight_limit",
        Kind::Gauge,
        "Requests that may be in flight to a service now, where limits.adaptive finds that out.",
    ),
    (
        "outrigger_pending",
        Kind::Gauge,
        "Requests that wait for a place among those in flight to a service.",
    ),
    (
        "outrigger_route_in_flight",
        Kind::Gauge,
        "Requests in flight of a rule that has a limit of its own.",
    ),
    (
        "outrigger_route_pending",
        Kind::Gauge,
        "Requests that wait for a place among those in flight of a rule.",
    ),
    (
        "outrigger_limit_rejected_total",
        Kind::Counter,
        "Requests and connections refused because a limit was reached, by limit.",
    ),
    (
        "outrigger_queue_events_total",
        Kind::Counter,
        "Events of messages: sent, failed to be sent, or dropped because too many wait.",
    ),
    (
        "outrigger_queue_events_backlog",
        Kind::Gauge,
        "Events of messages that nobody has taken yet.",
    ),
    (
        "outrigger_rate_limited_total",
        Kind::Counter,
        "Requests refused by a route's rate limit.",
    ),
    (
        "outrigger_cache_requests_total",
        Kind::Counter,
        "Calls of a route with a cache: hit, miss, stale, revalidated.",
    ),
    (
        "outrigger_cache_entries",
        Kind::Gauge,
        "Answers kept for a service.",
    ),
    (
        "outrigger_cache_bytes",
        Kind::Gauge,
        "Bytes of the answers kept for a service.",
    ),
    (
        "outrigger_fallbacks_total",
        Kind::Counter,
        "Calls that got a step of onUnavailable, by step and why the service was not asked.",
    ),
    (
        "outrigger_mirrored_total",
        Kind::Counter,
        "Copies of requests for a route's mirror: sent, failed, body_too_large, limit_reached.",
    ),
    (
        "outrigger_faults_injected_total",
        Kind::Counter,
        "Faults made on purpose, by route and kind: delay, abort, bandwidth.",
    ),
    (
        "outrigger_connections_refused_total",
        Kind::Counter,
        "Connections refused before it was known what they speak, by reason.",
    ),
    (
        "outrigger_authorization_audited_total",
        Kind::Counter,
        "Inbound calls that an Audit policy met, by service and policy.",
    ),
    (
        "outrigger_jwks_fetches_total",
        Kind::Counter,
        "Looks at the keys of issuers of tokens, by outcome: fetched, failed.",
    ),
    (
        "outrigger_tls_handshake_failures_total",
        Kind::Counter,
        "TLS handshakes between sidecars that failed, by reason.",
    ),
    (
        "outrigger_tls_connections_expired_total",
        Kind::Counter,
        "Connections that outlived their peer's certificate, by how they ended: drained, cut.",
    ),
    (
        "outrigger_certificate_expiry_timestamp_seconds",
        Kind::Gauge,
        "When our certificate (leaf) or the first authority of our bundle (bundle) expires.",
    ),
    (
        "outrigger_certificate_renewals_total",
        Kind::Counter,
        "Certificates that the control plane's authority signed for us.",
    ),
    (
        "outrigger_certificate_renewal_failures_total",
        Kind::Counter,
        "Tries to get one that failed; the certificate before stays until it expires.",
    ),
    (
        "outrigger_tcp_connections_total",
        Kind::Counter,
        "Opaque connections ended; code is Outrigger's own error code or empty.",
    ),
    (
        "outrigger_tcp_bytes_total",
        Kind::Counter,
        "Bytes of opaque connections: sent to the upstream, received from it.",
    ),
    (
        "outrigger_queue_enqueued_total",
        Kind::Counter,
        "Messages made durable and acknowledged.",
    ),
    (
        "outrigger_queue_delivered_total",
        Kind::Counter,
        "Messages delivered.",
    ),
    (
        "outrigger_queue_redelivered_total",
        Kind::Counter,
        "Deliveries that will be tried again.",
    ),
    (
        "outrigger_queue_dead_total",
        Kind::Counter,
        "Messages that became dead letters.",
    ),
    (
        "outrigger_queue_replayed_total",
        Kind::Counter,
        "Dead letters replayed.",
    ),
    (
        "outrigger_queue_depth",
        Kind::Gauge,
        "Messages in a queue, by state.",
    ),
    (
        "outrigger_queue_oldest_seconds",
        Kind::Gauge,
        "Age of the oldest message that is not done.",
    ),
    (
        "outrigger_queue_conservation_drift",
        Kind::Gauge,
        "Enqueued minus everything accounted for; always 0.",
    ),
    (
        "outrigger_queue_store_ready",
        Kind::Gauge,
        "1 while the queue store takes work; 0 while it is opened, failed or stuck.",
    ),
    (
        "outrigger_queue_store_bytes",
        Kind::Gauge,
        "Size of the queue store's file.",
    ),
    (
        "outrigger_queue_store_free_bytes",
        Kind::Gauge,
        "Bytes left on the queue store's volume at the last look.",
    ),
    (
        "outrigger_queue_store_ballast_bytes",
        Kind::Gauge,
        "Room kept for a full volume; 0 while it is released.",
    ),
    (
        "outrigger_queue_store_corrupt",
        Kind::Gauge,
        "Damaged rows and files found since the start.",
    ),
    (
        "outrigger_queue_store_reopens",
        Kind::Gauge,
        "Times the store was opened again after a failure since the start.",
    ),
    (
        "outrigger_config_applied_timestamp_seconds",
        Kind::Gauge,
        "When the mesh config in force was applied.",
    ),
    (
        "outrigger_config_rejected_total",
        Kind::Counter,
        "Mesh configs refused whole.",
    ),
    (
        "outrigger_control_plane_connected",
        Kind::Gauge,
        "1 while the discovery stream is up.",
    ),
    (
        "outrigger_registered",
        Kind::Gauge,
        "1 while the workload is announced to the control plane and accepts connections.",
    ),
    (
        "outrigger_registration_failures_total",
        Kind::Counter,
        "Registrations and heartbeats that the control plane refused or did not answer.",
    ),
    (
        "outrigger_overloaded",
        Kind::Gauge,
        "1 while memory is over the sidecar's budget and requests are shed.",
    ),
    (
        "outrigger_replay_bytes",
        Kind::Gauge,
        "Bytes of request bodies that are kept to be sent again.",
    ),
    (
        "outrigger_connections",
        Kind::Gauge,
        "Open connections, by side.",
    ),
    (
        "outrigger_access_log_dropped_total",
        Kind::Counter,
        "Access log lines dropped because the log could not keep up.",
    ),
    (
        "outrigger_build_info",
        Kind::Gauge,
        "Version of this binary.",
    ),
];

const HISTOGRAMS: &[(&str, &str)] = &[
    (
        "outrigger_request_duration_seconds",
        "Time from the request's head to the end of the response.",
    ),
    (
        "outrigger_queue_wait_seconds",
        "Time from the enqueue to the first attempt.",
    ),
];

/// Gauges of what comes and goes. Rendered by hand: the exporter cannot forget a series.
const PASSING: &[(&str, &str)] = &[(
    "outrigger_endpoint_ejected",
    "1 while an endpoint is taken out of picking.",
)];

/// The series of one gauge: labels as text, and the value.
type Series = Vec<(String, f64)>;

#[derive(Clone, Copy)]
enum Kind {
    Counter,
    Gauge,
}

/// All metrics of one sidecar. Shared by reference; handles stay valid for the process's life.
pub struct Metrics {
    recorder: PrometheusRecorder,
    handle: PrometheusHandle,
    process: metrics_process::Collector,
    histograms: Mutex<Vec<(String, String, Arc<Histogram>)>>,
    passing: Mutex<HashMap<&'static str, Series>>,
    /// Rendered by hand: the exporter cannot forget the series of an old version.
    config_version: Mutex<Option<String>>,
}

impl Default for Metrics {
    fn default() -> Self {
        Self::new()
    }
}

impl Metrics {
    /// An empty registry with every family described.
    pub fn new() -> Self {
        let recorder = PrometheusBuilder::new().build_recorder();
        for (name, kind, help) in FAMILIES {
            let name = KeyName::from(*name);
            match kind {
                Kind::Counter => recorder.describe_counter(name, None::<Unit>, (*help).into()),
                Kind::Gauge => recorder.describe_gauge(name, None::<Unit>, (*help).into()),
            }
        }
        let process = metrics_process::Collector::default();
        metrics::with_local_recorder(&recorder, || process.describe());
        let handle = recorder.handle();
        let metrics = Self {
            recorder,
            handle,
            process,
            histograms: Mutex::default(),
            passing: Mutex::default(),
            config_version: Mutex::default(),
        };
        metrics
            .gauge(
                "outrigger_build_info",
                &[("version", env!("CARGO_PKG_VERSION"))],
            )
            .set(1.0);
        metrics
            .counter("outrigger_config_rejected_total", &[])
            .absolute(0);
        metrics
    }

    /// The counter of these labels, made when it does not exist.
    pub fn counter(&self, name: &'static str, labels: &[(&'static str, &str)]) -> Counter {
        self.recorder
            .register_counter(&key(name, labels), &METADATA)
    }

    /// The gauge of these labels, made when it does not exist.
    pub fn gauge(&self, name: &'static str, labels: &[(&'static str, &str)]) -> Gauge {
        self.recorder.register_gauge(&key(name, labels), &METADATA)
    }

    /// The histogram of these labels, made when it does not exist.
    pub fn histogram(&self, name: &'static str, labels: &[(&'static str, &str)]) -> Arc<Histogram> {
        let labels = labels_text(labels);
        let mut known = self
            .histograms
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let same = known.iter().find(|(n, l, _)| n == name && *l == labels);
        if let Some((_, _, histogram)) = same {
            return Arc::clone(histogram);
        }
        let histogram = Arc::new(Histogram::default());
        known.push((name.to_owned(), labels, Arc::clone(&histogram)));
        histogram
    }

    /// All series there are now of a gauge whose labels come and go, such as endpoints.
    pub fn set_passing(&self, name: &'static str, series: Series) {
        lock(&self.passing).insert(name, series);
    }

    /// The version of the mesh config in force.
    pub fn set_config_version(&self, version: &str) {
        let mut known = self
            .config_version
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        *known = Some(version.to_owned());
    }

    /// The Prometheus text format, version 0.0.4.
    pub fn render(&self) -> String {
        metrics::with_local_recorder(&self.recorder, || self.process.collect());
        self.handle.run_upkeep();
        let mut text = self.handle.render();
        let version = self
            .config_version
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(version) = &*version {
            let name = "outrigger_config_info";
            let _ = writeln!(
                text,
                "# HELP {name} The mesh config in force; the version is its content hash.\n\
                 # TYPE {name} gauge\n{name}{{version=\"{}\"}} 1",
                escape(version)
            );
        }
        let passing = lock(&self.passing);
        for (name, help) in PASSING {
            let Some(series) = passing.get(name).filter(|series| !series.is_empty()) else {
                continue;
            };
            let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} gauge");
            for (labels, value) in series {
                let _ = writeln!(text, "{name}{{{labels}}} {value}");
            }
        }
        let known = lock(&self.histograms);
        for (name, help) in HISTOGRAMS {
            let mut head = false;
            for (_, labels, histogram) in known.iter().filter(|(n, _, _)| n == name) {
                if !head {
                    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} histogram");
                    head = true;
                }
                histogram.render(&mut text, name, labels);
            }
        }
        text
    }
}

/// Labels as the text format writes them.
pub fn labels_text(labels: &[(&'static str, &str)]) -> String {
    let labels = labels.iter();
    let labels: Vec<String> = labels
        .map(|(label, value)| format!("{label}=\"{}\"", escape(value)))
        .collect();
    labels.join(",")
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that is done under these locks can leave them half changed.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn key(name: &'static str, labels: &[(&'static str, &str)]) -> Key {
    let labels: Vec<Label> = labels
        .iter()
        .map(|(label, value)| Label::new(*label, (*value).to_owned()))
        .collect();
    Key::from_parts(name, labels)
}

fn escape(value: &str) -> String {
    value
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

/// Upper bounds in nanoseconds: 0.5 ms to 60 s, the usual latency ladder of the field.
const BOUNDS: [(u64, &str); 16] = [
    (500_000, "0.0005"),
    (1_000_000, "0.001"),
    (2_500_000, "0.0025"),
    (5_000_000, "0.005"),
    (10_000_000, "0.01"),
    (25_000_000, "0.025"),
    (50_000_000, "0.05"),
    (100_000_000, "0.1"),
    (250_000_000, "0.25"),
    (500_000_000, "0.5"),
    (1_000_000_000, "1"),
    (2_500_000_000, "2.5"),
    (5_000_000_000, "5"),
    (10_000_000_000, "10"),
    (30_000_000_000, "30"),
    (60_000_000_000, "60"),
];

/// A latency histogram of atomic buckets; recording costs three relaxed additions.
#[derive(Default)]
pub struct Histogram {
    buckets: [AtomicU64; BOUNDS.len() + 1],
    sum_nanos: AtomicU64,
}

impl Histogram {
    /// Adds one observation.
    pub fn record(&self, value: Duration) {
        let nanos = u64::try_from(value.as_nanos()).unwrap_or(u64::MAX);
        let bucket = BOUNDS.partition_point(|(bound, _)| *bound < nanos);
        self.buckets[bucket].fetch_add(1, Ordering::Relaxed);
        self.sum_nanos.fetch_add(nanos, Ordering::Relaxed);
    }

    fn render(&self, out: &mut String, name: &str, labels: &str) {
        let comma = if labels.is_empty() { "" } else { "," };
        let mut total = 0;
        for (bucket, (_, bound)) in self.buckets.iter().zip(BOUNDS.iter()) {
            total += bucket.load(Ordering::Relaxed);
            let _ = writeln!(
                out,
                "{name}_bucket{{{labels}{comma}le=\"{bound}\"}} {total}"
            );
        }
        total += self.buckets[BOUNDS.len()].load(Ordering::Relaxed);
        let sum = Duration::from_nanos(self.sum_nanos.load(Ordering::Relaxed)).as_secs_f64();
        let braces = if labels.is_empty() {
            String::new()
        } else {
            format!("{{{labels}}}")
        };
        let _ = writeln!(out, "{name}_bucket{{{labels}{comma}le=\"+Inf\"}} {total}");
        let _ = writeln!(
            out,
            "{name}_sum{braces} {sum}\n{name}_count{braces} {total}"
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_histogram_is_cumulative_and_ends_with_its_count() {
        let metrics = Metrics::new();
        let histogram =
            metrics.histogram("outrigger_request_duration_seconds", &[("route", "a\"b")]);
        for millis in [0, 1, 2, 70_000] {
            histogram.record(Duration::from_millis(millis));
        }
        let text = metrics.render();
        for line in [
            "outrigger_request_duration_seconds_bucket{route=\"a\\\"b\",le=\"0.001\"} 2",
            "outrigger_request_duration_seconds_bucket{route=\"a\\\"b\",le=\"60\"} 3",
            "outrigger_request_duration_seconds_bucket{route=\"a\\\"b\",le=\"+Inf\"} 4",
            "outrigger_request_duration_seconds_count{route=\"a\\\"b\"} 4",
            "# TYPE outrigger_request_duration_seconds histogram",
        ] {
            assert!(text.contains(line), "{line} is missing in\n{text}");
        }
    }

    #[test]
    fn a_handle_asked_for_twice_is_the_same_series() {
        let metrics = Metrics::new();
        metrics
            .counter("outrigger_attempts_total", &[("service", "a")])
            .increment(1);
        metrics
            .counter("outrigger_attempts_total", &[("service", "a")])
            .increment(2);
        assert!(
            metrics
                .render()
                .contains("outrigger_attempts_total{service=\"a\"} 3")
        );
    }
}
