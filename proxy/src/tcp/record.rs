//! One opaque connection watched from its accept to its end: metrics and access log.
//!
//! Bytes are counted while they move, the connection when it ends, exactly once. Stands on the
//! life of a request.

use std::cell::Cell;
use std::io::Write as _;
use std::net::SocketAddr;
use std::rc::Rc;
use std::sync::Arc;

use metrics::Counter;
use outrigger_core::client_hello::ClientHello;
use outrigger_core::error_code::ErrorCode;
use outrigger_core::time::Mono;

use crate::clock;
use crate::http::context::Connection;
use crate::listener::Direction;
use crate::snapshot::Service;
use crate::tcp::copy::Way;
use crate::telemetry::access_log::When;
use crate::worker::Worker;

/// How the connection ended, as the access log writes it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    /// Both sides said that they were done.
    Complete,
    /// Nothing moved for `wire.tcpIdleTimeout`.
    Idle,
    /// The upstream broke off.
    UpstreamReset,
    /// The downstream broke off.
    DownstreamReset,
    /// We refused it, or found no upstream.
    Refused,
    /// The drain was over, or the certificate of a peer.
    Cut,
}

impl Ending {
    fn as_str(self) -> &'static str {
        match self {
            Self::Complete => "complete",
            Self::Idle => "idle",
            Self::UpstreamReset => "upstream_reset",
            Self::DownstreamReset => "downstream_reset",
            Self::Refused => "refused",
            Self::Cut => "cut",
        }
    }
}

/// The record of one connection; recorded when dropped.
pub(super) struct Record {
    worker: Rc<Worker>,
    start: Mono,
    direction: Direction,
    peer: SocketAddr,
    original: Option<SocketAddr>,
    server_name: Option<String>,
    tls: bool,
    service: Option<Arc<Service>>,
    endpoint: Option<SocketAddr>,
    attempts: u32,
    code: Option<ErrorCode>,
    ending: Ending,
    sent: Meter,
    received: Meter,
}

/// Bytes of one direction: counted here for the log, and where a scrape sees them at once.
struct Meter {
    bytes: Cell<u64>,
    counter: Counter,
}

impl Meter {
    fn new() -> Self {
        Self {
            bytes: Cell::new(0),
            counter: Counter::noop(),
        }
    }
}

impl Record {
    /// Starts watching.
    pub(super) fn start(worker: &Rc<Worker>, of: &Connection, hello: Option<&ClientHello>) -> Self {
        Self {
            worker: Rc::clone(worker),
            start: clock::now(),
            direction: of.direction,
            peer: of.peer,
            original: of.original,
            server_name: hello.and_then(|hello| hello.server_name.clone()),
            tls: hello.is_some(),
            service: None,
            endpoint: None,
            attempts: 0,
            code: None,
            ending: Ending::Cut,
            sent: Meter::new(),
            received: Meter::new(),
        }
    }

    /// It is for this service.
    pub(super) fn routed(&mut self, service: &Arc<Service>) {
        let counter = |way| {
            let labels = [
                ("direction", self.direction.as_str()),
                ("service", &*service.name),
                ("way", way),
            ];
            let metrics = &self.worker.shared.metrics;
            metrics.counter("outrigger_tcp_bytes_total", &labels)
        };
        self.sent.counter = counter("sent");
        self.received.counter = counter("received");
        self.service = Some(Arc::clone(service));
    }

    /// One more try, towards this endpoint.
    pub(super) fn attempt(&mut self, endpoint: SocketAddr) {
        self.attempts += 1;
        self.endpoint = Some(endpoint);
    }

    /// Bytes were passed on: `Sent` to the upstream, `Received` from it.
    pub(super) fn moved(&self, way: Way, count: u64) {
        let meter = match way {
            Way::Sent => &self.sent,
            Way::Received => &self.received,
        };
        meter.bytes.set(meter.bytes.get() + count);
        meter.counter.increment(count);
    }

    /// It has ended.
    pub(super) fn end(mut self, ending: Ending, code: Option<ErrorCode>) {
        self.ending = ending;
        self.code = code;
    }

    fn service_name(&self) -> &str {
        self.service.as_ref().map_or("", |service| &service.name)
    }

    fn write_line(&self, line: &mut Vec<u8>) {
        let seconds = clock::now().saturating_since(self.start).as_secs_f64();
        let json = |text: &str| serde_json::Value::from(text).to_string();
        let text =
            |addr: Option<SocketAddr>| addr.map_or_else(String::new, |addr| addr.to_string());
        // Writing to memory cannot fail.
        let _ = write!(
            line,
            r#"{{"time":{},"direction":"{}","peer":"{}","protocol":"{}","destination":"{}","code":"{}","service":{},"endpoint":"{}","attempts":{},"sent":{},"received":{},"seconds":{seconds:.6},"ending":"{}""#,
            clock::unix_now().0,
            self.direction.as_str(),
            self.peer,
            if self.tls { "tls" } else { "tcp" },
            text(self.original),
            self.code.map_or("", ErrorCode::as_str),
            json(self.service_name()),
            text(self.endpoint),
            self.attempts,
            self.sent.bytes.get(),
            self.received.bytes.get(),
            self.ending.as_str(),
        );
        if let Some(name) = &self.server_name {
            let _ = write!(line, r#","serverName":{}"#, json(name));
        }
        line.extend_from_slice(b"}\n");
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        let labels = [
            ("direction", self.direction.as_str()),
            ("service", self.service_name()),
            ("code", self.code.map_or("", ErrorCode::as_str)),
        ];
        let shared = &self.worker.shared;
        let counter = shared
            .metrics
            .counter("outrigger_tcp_connections_total", &labels);
        counter.increment(1);
        let bad = self.code.is_some();
        let wanted = match shared.access_log.when() {
            When::Off => false,
            When::Errors => bad,
            When::Sampled => bad || self.worker.sampled(),
            When::All => true,
        };
        if wanted {
            self.worker.log_line(|line| self.write_line(line));
        }
    }
}
