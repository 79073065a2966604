//! The control plane's own metrics, as Prometheus text.
//!
//! Owns the counters and the names. Everything is written into a fresh recorder at each scrape, so
//! a label value that no longer exists (an old config version, a service that is gone) disappears
//! instead of staying at its last value.

use std::sync::atomic::{AtomicU64, Ordering};

use metrics::{Unit, counter, describe_counter, describe_gauge, gauge};
use metrics_exporter_prometheus::PrometheusBuilder;
use outrigger_config::wire::{BUNDLE_TYPE, DOCUMENT_TYPE, ENDPOINTS_TYPE, EndpointState};

use crate::ca;
use crate::proxies::Step;
use crate::replicas::Standing;

/// What is counted since the start of the process.
#[derive(Debug, Default)]
pub struct Counters {
    documents: Pushes,
    endpoints: Pushes,
    roots: Pushes,
    other: Pushes,
    /// Configs that were refused as a whole.
    pub config_rejected: AtomicU64,
    /// Configs that canaries ran and everybody got.
    pub promoted: AtomicU64,
    /// Configs that were taken back because a canary refused them or was lost.
    pub stopped: AtomicU64,
    /// Times that somebody went back to an earlier config.
    pub rolled_back: AtomicU64,
}

#[derive(Debug, Default)]
struct Pushes {
    sent: AtomicU64,
    acked: AtomicU64,
    refused: AtomicU64,
}

impl Counters {
    /// Counts one step of a push.
    pub fn push(&self, type_url: &str, step: &Step) {
        let pushes = match type_url {
            DOCUMENT_TYPE => &self.documents,
            ENDPOINTS_TYPE => &self.endpoints,
            BUNDLE_TYPE => &self.roots,
            _ => &self.other,
        };
        let counter = match step {
            Step::Sent => &pushes.sent,
            Step::Acked => &pushes.acked,
            Step::Refused(_) => &pushes.refused,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

/// What is measured at the moment of a scrape.
#[derive(Debug, Default)]
pub struct Gauges {
    /// Open streams.
    pub proxies_connected: usize,
    /// Endpoints that sidecars cannot connect to, counted for each of them.
    pub unreachable: usize,
    /// The version pushed.
    pub config_version: Option<String>,
    /// When it was taken up, in milliseconds since 1970.
    pub config_applied: u64,
    /// Whether some sidecars try another one.
    pub on_trial: bool,
    /// Where this one stands among several control planes.
    pub replicas: Option<Standing>,
    /// Registered instances by service and state.
    pub instances: Vec<(String, EndpointState, u64)>,
    /// Whether silent instances stay listed because there are so many of them.
    pub preserving: bool,
    /// Services in other registries: whether those do not answer, and how many endpoints are kept
    /// although they are gone there.
    pub registries: Vec<(String, bool, usize)>,
    /// When the certificates of the authority and the listener expire, in seconds since 1970.
    pub expiries: Vec<(&'static str, u64)>,
    /// The process.
    pub process: Process,
}

/// What the kernel says about this process; 0 where it does not say.
#[derive(Debug, Default)]
pub struct Process {
    /// Processor time, in hundredths of a second.
    pub cpu_ticks: u64,
    /// Bytes.
    pub resident_bytes: u64,
    /// Open descriptors.
    pub open_fds: u64,
    /// The limit of descriptors.
    pub max_fds: u64,
    /// Seconds since 1970.
    pub started: u64,
}

impl Process {
    /// Reads `/proc/self` (proc(5)).
    pub fn read(started: u64) -> Self {
        // 100 ticks a second and 4 KiB pages on every Linux platform that we build for.
        let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
        // The program's name, in parentheses, may contain spaces: fields are counted behind it.
        let fields = stat.rsplit_once(") ").map_or("", |(_, rest)| rest);
        let field = |n: usize| {
            fields
                .split(' ')
                .nth(n)
                .and_then(|f| f.parse().ok())
                .unwrap_or(0u64)
        };
        let limits = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
        let max_fds = limits
            .lines()
            .find_map(|l| l.strip_prefix("Max open files"));
        let soft = max_fds.and_then(|l| l.split_whitespace().next()?.parse().ok());
        Self {
            cpu_ticks: field(11) + field(12),
            resident_bytes: field(21) * 4096,
            open_fds: std::fs::read_dir("/proc/self/fd").map_or(0, |d| d.count() as u64),
            max_fds: soft.unwrap_or(0),
            started,
        }
    }
}

/// The text of a scrape.
pub fn render(counters: &Counters, authority: Option<&ca::Counts>, gauges: &Gauges) -> String {
    let recorder = PrometheusBuilder::new().build_recorder();
    metrics::with_local_recorder(&recorder, || {
        pushes(counters);
        config(counters, gauges);
        registries(gauges);
        certificates(authority, gauges);
        process(&gauges.process);
    });
    // The recorder's counters are whole numbers; processor time is not.
    let ticks = gauges.process.cpu_ticks;
    let cpu = format!(
        "# HELP process_cpu_seconds_total User and system processor time, in seconds.\n\
         # TYPE process_cpu_seconds_total counter\n\
         process_cpu_seconds_total {}.{:02}\n",
        ticks / 100,
        ticks % 100
    );
    recorder.handle().render() + &cpu
}

fn pushes(counters: &Counters) {
    describe_counter!(
        "outrigger_control_plane_pushes_total",
        "Discovery responses sent."
    );
    describe_counter!(
        "outrigger_control_plane_acks_total",
        "Pushes that sidecars accepted."
    );
    describe_counter!(
        "outrigger_control_plane_nacks_total",
        "Pushes that sidecars refused."
    );
    let types = [
        ("document", &counters.documents),
        ("endpoints", &counters.endpoints),
        ("roots", &counters.roots),
        ("other", &counters.other),
    ];
    for (name, pushes) in types {
        let values = [
            ("outrigger_control_plane_pushes_total", &pushes.sent),
            ("outrigger_control_plane_acks_total", &pushes.acked),
            ("outrigger_control_plane_nacks_total", &pushes.refused),
        ];
        for (metric, value) in values {
            counter!(metric, "type" => name).absolute(value.load(Ordering::Relaxed));
        }
    }
}

// Gauges are floating-point numbers; exact to 2^53.
#[allow(clippy::cast_precision_loss)]
fn config(counters: &Counters, gauges: &Gauges) {
    let describe = |name: &'static str, help: &'static str| describe_gauge!(name, help);
    describe(
        "outrigger_control_plane_proxies_connected",
        "Sidecars with an open stream.",
    );
    gauge!("outrigger_control_plane_proxies_connected").set(gauges.proxies_connected as f64);
    describe(
        "outrigger_control_plane_unreachable_endpoints",
        "Endpoints that sidecars say they cannot connect to, counted for each sidecar.",
    );
    gauge!("outrigger_control_plane_unreachable_endpoints").set(gauges.unreachable as f64);
    describe_counter!(
        "outrigger_control_plane_config_rejected_total",
        "Configs refused as a whole because a document had an error."
    );
    counter!("outrigger_control_plane_config_rejected_total")
        .absolute(counters.config_rejected.load(Ordering::Relaxed));
    describe_counter!(
        "outrigger_control_plane_rollouts_total",
        "Ends of trials and rollbacks, by outcome."
    );
    let outcomes = [
        ("promoted", &counters.promoted),
        ("stopped", &counters.stopped),
        ("rolled_back", &counters.rolled_back),
    ];
    for (outcome, count) in outcomes {
        counter!("outrigger_control_plane_rollouts_total", "outcome" => outcome)
            .absolute(count.load(Ordering::Relaxed));
    }
    if let Some(standing) = &gauges.replicas {
        describe(
            "outrigger_control_plane_leader",
            "1 at the control plane that leads several.",
        );
        gauge!("outrigger_control_plane_leader").set(f64::from(u8::from(standing.leads)));
        describe(
            "outrigger_control_plane_replicas_connected",
            "1 while what the control planes share is reachable.",
        );
        gauge!("outrigger_control_plane_replicas_connected")
            .set(f64::from(u8::from(standing.connected)));
    }
    describe(
        "outrigger_control_plane_config_on_trial",
        "1 while some sidecars try a new config before the others.",
    );
    gauge!("outrigger_control_plane_config_on_trial").set(f64::from(u8::from(gauges.on_trial)));
    if let Some(version) = &gauges.config_version {
        describe(
            "outrigger_control_plane_config_info",
            "The config being pushed; always 1.",
        );
        gauge!("outrigger_control_plane_config_info", "version" => version.clone()).set(1.0);
        describe_gauge!(
            "outrigger_control_plane_config_applied_timestamp_seconds",
            Unit::Seconds,
            "When the config being pushed was taken up."
        );
        gauge!("outrigger_control_plane_config_applied_timestamp_seconds")
            .set(gauges.config_applied as f64 / 1000.0);
    }
    describe(
        "outrigger_control_plane_registry_instances",
        "Self-registered instances.",
    );
    for (service, state, count) in &gauges.instances {
        let labels = [
            ("service", service.clone()),
            ("state", state.as_str().to_owned()),
        ];
        gauge!("outrigger_control_plane_registry_instances", &labels).set(*count as f64);
    }
}

#[allow(clippy::cast_precision_loss)]
fn registries(gauges: &Gauges) {
    describe_gauge!(
        "outrigger_control_plane_registry_stale",
        "1 while DNS, Consul or Eureka do not answer for a service and what was known stays."
    );
    describe_gauge!(
        "outrigger_control_plane_registry_held_endpoints",
        "Endpoints kept although the registry suddenly lost them."
    );
    describe_gauge!(
        "outrigger_control_plane_registry_preserving",
        "1 while so many registered instances are silent at once that none is removed."
    );
    gauge!("outrigger_control_plane_registry_preserving")
        .set(f64::from(u8::from(gauges.preserving)));
    for (service, stale, held) in &gauges.registries {
        let label = [("service", service.clone())];
        gauge!("outrigger_control_plane_registry_stale", &label).set(f64::from(u8::from(*stale)));
        gauge!("outrigger_control_plane_registry_held_endpoints", &label).set(*held as f64);
    }
}

#[allow(clippy::cast_precision_loss)]
fn certificates(authority: Option<&ca::Counts>, gauges: &Gauges) {
    if let Some(counts) = authority {
        describe_counter!(
            "outrigger_control_plane_certificates_issued_total",
            "Certificates signed for sidecars."
        );
        counter!("outrigger_control_plane_certificates_issued_total")
            .absolute(counts.issued.load(Ordering::Relaxed));
        describe_counter!(
            "outrigger_control_plane_certificates_refused_total",
            "Requests for certificates that were refused, by reason."
        );
        for (reason, count) in counts.refused() {
            counter!("outrigger_control_plane_certificates_refused_total", "reason" => reason)
                .absolute(count);
        }
    }
    for (certificate, at) in &gauges.expiries {
        describe_gauge!(
            "outrigger_control_plane_certificate_expiry_timestamp_seconds",
            Unit::Seconds,
            "When the issuer's certificate, its root or the listener's certificate expires."
        );
        gauge!(
            "outrigger_control_plane_certificate_expiry_timestamp_seconds",
            "certificate" => *certificate
        )
        .set(*at as f64);
    }
}

#[allow(clippy::cast_precision_loss)]
fn process(process: &Process) {
    let gauges = [
        (
            "process_resident_memory_bytes",
            "Resident memory, in bytes.",
            process.resident_bytes,
        ),
        (
            "process_open_fds",
            "Open file descriptors.",
            process.open_fds,
        ),
        (
            "process_max_fds",
            "The limit of open file descriptors.",
            process.max_fds,
        ),
        (
            "process_start_time_seconds",
            "Start of the process since 1970, in seconds.",
            process.started,
        ),
    ];
    for (name, help, value) in gauges {
        describe_gauge!(name, help);
        gauge!(name).set(value as f64);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_metric_has_a_help_and_a_type() {
        let gauges = Gauges {
            config_version: Some("abc".into()),
            instances: vec![("shop/a\"b".into(), EndpointState::Unhealthy, 3)],
            registries: vec![("shop/b".into(), true, 2)],
            replicas: Some(Standing::default()),
            expiries: vec![("issuer", 7)],
            process: Process::read(1),
            ..Gauges::default()
        };
        let counters = Counters::default();
        counters.push(DOCUMENT_TYPE, &Step::Refused("no".into()));
        let text = render(&counters, Some(&ca::Counts::default()), &gauges);
        for line in text
            .lines()
            .filter(|l| !l.is_empty() && !l.starts_with('#'))
        {
            let name = line.split(['{', ' ']).next().expect("a name");
            assert!(
                text.contains(&format!("# HELP {name} ")),
                "no help for {name}"
            );
            assert!(
                text.contains(&format!("# TYPE {name} ")),
                "no type for {name}"
            );
            assert!(name.ends_with("_total") == text.contains(&format!("# TYPE {name} counter")));
        }
        assert!(text.contains("outrigger_control_plane_nacks_total{type=\"document\"} 1"));
        assert!(text.contains("outrigger_control_plane_registry_stale{service=\"shop/b\"} 1"));
        assert!(text.contains("registry_held_endpoints{service=\"shop/b\"} 2"));
        assert!(text.contains("service=\"shop/a\\\"b\",state=\"Unhealthy\"} 3"));
        assert!(!text.contains("process_resident_memory_bytes 0\n"));
    }
}
