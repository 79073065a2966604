//! What the sidecar knows, as JSON for people and programs, and the gauges set before a scrape.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use outrigger_config::MeshConfig;
use outrigger_config::asyncapi::{self, About};
use outrigger_core::breaker::Cause;
use outrigger_core::time::Mono;
use serde_json::{Value, json};

use crate::admin::standing::{STANDINGS, Standing};
use crate::app::Shared;
use crate::bulkhead;
use crate::clock;
use crate::snapshot::live::{Endpoint, EndpointState};
use crate::snapshot::{Service, Snapshot, When};
use crate::telemetry::metrics::labels_text;
use crate::upstream::connect::Protocol;

/// The answer to `GET /`.
pub(super) const INDEX: &str = "\
outrigger-proxy admin API
GET  /livez /readyz /startupz   health
GET  /metrics                   Prometheus text format
GET  /config                    the mesh config in force, its source, and what was refused last
GET  /asyncapi.json             which calls become messages, as AsyncAPI 3
GET  /routes                    rules with their effective values
GET  /endpoints                 endpoints with load and health
GET  /breakers                  breakers with their windows
GET  /identity                  who this sidecar is, and until when (seconds since 1970)
GET  /queues                    queues with their counts
GET  /queues/export?queue=&at=  whole messages to keep or move; POST /queues/import takes them in
GET  /messages?queue=&state=    messages; /messages/{id} one of them
GET  /dead?queue=&reason=       dead letters; /dead/{id} one of them whole; /dead/groups, /dead/audit
POST /dead/replay /dead/purge   {\"ids\": [..]} or {\"queue\": .., \"reason\": .., \"dryRun\": true}
GET  /cache                     how much the caches keep
POST /cache/purge               {\"service\": \"shop/orders\", \"path\": \"/v1\"}; both optional
POST /drain                     drain and end, like SIGTERM
PUT  /log                       {\"level\": \"debug\"}
";

/// The identity in force, and why the last material was not taken up.
pub(super) fn identity(shared: &Shared) -> Value {
    let svid = shared.identity.current();
    let svid = svid.as_deref();
    json!({
        "configured": shared.identity.configured(),
        "id": svid.map(|svid| svid.id.as_str()),
        "generation": shared.identity.generation(),
        "notBefore": svid.map(|svid| svid.not_before),
        "notAfter": svid.map(|svid| svid.not_after),
        "bundleNotAfter": svid.map(|svid| svid.bundle_not_after),
        "problem": shared.identity.problem(),
    })
}

/// Which calls become messages, for whoever generates code or documentation from it.
pub(super) fn asyncapi(shared: &Shared) -> Value {
    let snapshot = shared.store.load();
    let none = MeshConfig::default();
    let listening = shared.bootstrap.listen.outbound();
    let host = listening.first();
    let host = host.map(ToString::to_string).unwrap_or_default();
    let about = About {
        workload: &shared.workload,
        version: match snapshot.configured() {
            true => &snapshot.version,
            false => "none",
        },
        host: &host,
    };
    asyncapi::document(snapshot.config.as_deref().unwrap_or(&none), about)
}

pub(super) fn config(shared: &Shared) -> Value {
    let snapshot = shared.store.load();
    let known = shared.config.get();
    let documents = snapshot.config.iter().flat_map(|config| &config.documents);
    let documents: Vec<Value> = documents
        .map(|document| json!({"name": document.resource_name(), "content": document.canonical}))
        .collect();
    let rejected = known.rejected.as_ref().map(|report| {
        json!({
            "summary": report.summary(),
            "problems": report.problems.iter().map(ToString::to_string).collect::<Vec<_>>(),
        })
    });
    let link = known.link.as_ref().map(|link| {
        json!({
            "connected": link.connected(),
            "accepted": link.accepted(),
            "refused": link.refused(),
            "problem": link.problem(),
        })
    });
    json!({
        "version": snapshot.version,
        "generation": snapshot.generation,
        "source": known.source,
        "appliedAt": known.applied_at,
        "warnings": known.warnings,
        "rejected": rejected,
        "controlPlane": link,
        "documents": documents,
    })
}

pub(super) fn routes(shared: &Shared) -> Value {
    let snapshot = shared.store.load();
    let services: Vec<Value> = snapshot
        .services
        .iter()
        .map(|service| {
            let routes = service.routes.iter().map(|route| {
                let backends = route.backends.iter().map(|backend| {
                    let name = snapshot
                        .services
                        .get(backend.service)
                        .map(|service| &*service.name);
                    json!({"service": name, "weight": backend.weight})
                });
                let asynchronous = route.asynchronous.as_ref().map(|asynchronous| {
                    json!({
                        "when": match asynchronous.when {
                            When::Preferred => "Preferred",
                            When::Always => "Always",
                            When::Shadow => "Shadow",
                            When::Unavailable => "Never",
                        },
                        "queue": asynchronous.queue,
                        "attempts": asynchronous.redelivery.attempts,
                        "maxInFlight": asynchronous.max_in_flight,
                    })
                });
                json!({
                    "name": &*route.name,
                    "backends": backends.collect::<Vec<_>>(),
                    "timeouts": {
                        "requestMs": route.timeouts.request.map(|time| time.as_millis()),
                        "perTryMs": route.timeouts.per_try.map(|time| time.as_millis()),
                        "idleMs": route.timeouts.idle.map(|time| time.as_millis()),
                        "streamMs": route.timeouts.stream.map(|time| time.as_millis()),
                    },
                    "retry": {
                        "attempts": route.retry.attempts,
                        "unsafe": route.retry.unsafe_methods,
                        "budgetLeft": route.state.budget.remaining(&route.budget, clock::now()),
                    },
                    "async": asynchronous,
                })
            });
            json!({"service": &*service.name, "routes": routes.collect::<Vec<_>>()})
        })
        .collect();
    json!({"version": snapshot.version, "services": services})
}

pub(super) fn endpoints(shared: &Shared) -> Value {
    let now = clock::now();
    let snapshot = shared.store.load();
    let services: Vec<Value> = services(&snapshot)
        .map(|service| {
            let set = service.state.endpoints();
            let endpoints: Vec<Value> = set
                .endpoints
                .iter()
                .map(|endpoint| endpoint_view(endpoint, now))
                .collect();
            json!({
                "service": &*service.name,
                // The local application, behind this sidecar; not the service others call.
                "local": snapshot.app.as_ref().is_some_and(|app| Arc::ptr_eq(app, service)),
                "protocol": match service.spoken.protocol {
                    Protocol::Http1 => "http/1.1",
                    Protocol::Http2 => "h2",
                },
                "inFlight": service.state.bulkhead.current(),
                "adaptive": adaptive_view(service),
                // Too few endpoints are available: health is ignored.
                "panic": set.is_in_panic(),
                "endpoints": endpoints,
            })
        })
        .collect();
    json!({"services": services})
}

/// What was found out about how much the service can take; nothing where that is not asked.
fn adaptive_view(service: &Service) -> Option<Value> {
    service.limits.adaptive.as_ref()?;
    let unhurried = service.state.adaptive.unhurried();
    Some(json!({
        "maxInFlight": bulkhead::max_in_flight(service),
        "latencyMs": unhurried.map(|took| took.as_secs_f64() * 1e3),
    }))
}

fn endpoint_view(endpoint: &Endpoint, now: Mono) -> Value {
    let state = &endpoint.state;
    let health = &state.health;
    let standing = Standing::of(endpoint, now);
    let check = state.reasons.last_check().map(|check| {
        json!({
            "passed": check.failure.is_none(),
            "why": check.failure,
            "agoMs": now.saturating_since(check.at).as_millis(),
            "tookMs": check.took.as_secs_f64() * 1e3,
        })
    });
    let ejected = health.ejected_until(now);
    json!({
        "address": endpoint.spec.addr.to_string(),
        "zone": endpoint.spec.zone,
        "weight": endpoint.spec.weight,
        "priority": endpoint.spec.priority,
        "labels": &*endpoint.spec.labels,
        "state": endpoint.spec.admin.as_str(),
        "available": standing.name == "available",
        "standing": standing.name,
        "sinceMs": now.saturating_since(standing.since).as_millis(),
        "why": standing.why(endpoint),
        "ejectedForMs": ejected.map(|until| until.saturating_since(now).as_millis()),
        // Its last connect failed: it is asked after all others for so long.
        "avoidedForMs": health.avoided_for(now).map(|left| left.as_millis()),
        "timesEjected": health.times_ejected(),
        "lastEjection": state.reasons.last_ejection(),
        "consecutiveFailures": health.consecutive(),
        "lastCheck": check,
        "inFlight": state.load.in_flight(),
        "latencyMs": state.load.latency().map(|latency| latency.as_secs_f64() * 1e3),
        "connections": state.connections.load(Ordering::Relaxed),
    })
}

pub(super) fn breakers(shared: &Shared) -> Value {
    let now = clock::now();
    let breakers: Vec<Value> = services(&shared.store.load())
        .filter_map(|service| {
            let params = service.breaker_params()?;
            let view = service.state.breaker.state(&params, now);
            let cause = view.last_cause.map(|cause| match cause {
                Cause::ConsecutiveFailures(count) => format!("{count} failures in a row"),
                Cause::FailureRate { failures, requests } => {
                    format!("{failures} of {requests} requests failed")
                }
                Cause::ProbeFailed => "a probe failed".to_owned(),
            });
            Some(json!({
                "service": &*service.name,
                "state": view.state.as_str(),
                "sinceMs": now.saturating_since(view.since).as_millis(),
                "retryInMs": view.retry_in.map(|left| left.as_millis()),
                "consecutiveFailures": view.consecutive,
                "windowRequests": view.window_requests,
                "windowFailures": view.window_failures,
                "openedCount": view.opened_count,
                "lastCause": cause,
            }))
        })
        .collect();
    json!({"breakers": breakers})
}

fn services(snapshot: &Snapshot) -> impl Iterator<Item = &Arc<Service>> {
    snapshot.services.iter().chain(&snapshot.app)
}

/// Sets the gauges of everything that changes by itself.
pub(super) fn refresh_metrics(shared: &Shared) {
    let now = clock::now();
    let metrics = &shared.metrics;
    let (inbound, outbound) = shared.drain.open();
    metrics
        .gauge("outrigger_connections", &[("side", "inbound")])
        .set(inbound as f64);
    metrics
        .gauge("outrigger_connections", &[("side", "outbound")])
        .set(outbound as f64);
    metrics
        .gauge("outrigger_overloaded", &[])
        .set(f64::from(u8::from(shared.overload.is_shedding())));
    metrics
        .gauge("outrigger_replay_bytes", &[])
        .set(shared.overload.kept() as f64);
    let snapshot = shared.store.load();
    let open = |state: &EndpointState| state.connections.load(Ordering::Relaxed);
    let mut upstream = open(&shared.live.passthrough) + open(&shared.live.app);
    if let Some(passthrough) = &snapshot.passthrough {
        let in_flight = passthrough.state.bulkhead.current();
        metrics
            .gauge("outrigger_in_flight", &[("service", &passthrough.name)])
            .set(f64::from(in_flight));
    }
    let mut ejections = Vec::new();
    for service in services(&snapshot) {
        let name = ("service", &*service.name);
        let in_flight = service.state.bulkhead.current();
        metrics
            .gauge("outrigger_in_flight", &[name])
            .set(f64::from(in_flight));
        metrics
            .gauge("outrigger_pending", &[name])
            .set(f64::from(service.state.bulkhead.pending()));
        if service.limits.adaptive.is_some() {
            metrics
                .gauge("outrigger_in_flight_limit", &[name])
                .set(f64::from(bulkhead::max_in_flight(service)));
        }
        for route in &service.routes {
            if route.limits.is_some() {
                let of = [name, ("route", &route.name)];
                let bulkhead = &route.state.bulkhead;
                metrics
                    .gauge("outrigger_route_in_flight", &of)
                    .set(f64::from(bulkhead.current()));
                metrics
                    .gauge("outrigger_route_pending", &of)
                    .set(f64::from(bulkhead.pending()));
            }
        }
        let set = service.state.endpoints();
        let mut counts = STANDINGS.map(|name| (name, 0));
        for endpoint in &set.endpoints {
            let standing = Standing::of(endpoint, now).name;
            let of_this = counts.iter_mut().filter(|(name, _)| *name == standing);
            of_this.for_each(|(_, count)| *count += 1);
            upstream += open(&endpoint.state);
            let address = endpoint.spec.addr.to_string();
            let labels = [("service", &*service.name), ("endpoint", &*address)];
            let ejected = endpoint.state.health.is_ejected(now);
            ejections.push((labels_text(&labels), f64::from(u8::from(ejected))));
        }
        metrics
            .gauge("outrigger_balancer_panic", &[name])
            .set(f64::from(u8::from(set.is_in_panic())));
        for (state, count) in counts {
            metrics
                .gauge("outrigger_endpoints", &[name, ("state", state)])
                .set(f64::from(count));
        }
        if let Some(params) = service.breaker_params() {
            let view = service.state.breaker.state(&params, now);
            metrics
                .gauge("outrigger_breaker_state", &[name])
                .set(f64::from(view.state.gauge()));
            let opened = view.opened_count as f64;
            metrics
                .gauge("outrigger_breaker_openings", &[name])
                .set(opened);
        }
    }
    metrics.set_passing("outrigger_endpoint_ejected", ejections);
    metrics
        .gauge("outrigger_connections", &[("side", "upstream")])
        .set(upstream as f64);
}
