//! The registry's part of the admin API: services with their endpoints, and the instances that
//! announce themselves.

use std::net::{IpAddr, SocketAddr};
use std::time::Duration;

use hyper::StatusCode;
use hyper::header::{ETAG, HeaderValue, LOCATION};
use outrigger_config::wire::Endpoint;
use outrigger_registry::Standing;
use serde::Deserialize;
use serde_json::{Value, json};

use super::call::{Answer, Call, etag, json_answer, no_content, tagged, would};
use super::problem::Problem;
use crate::app::App;
use crate::clock;
use crate::registry::{Instance, Lease, Registration, State};
use crate::world::Origin;

pub(super) fn services(call: &Call) -> Answer {
    let app = &call.app;
    let origins = app.services().unwrap_or_default();
    let page = call.page(origins.iter(), |(name, _)| (*name).clone())?;
    let services = page.items.iter();
    let services: Vec<Value> = services
        .map(|(name, origin)| service_view(app, name, origin))
        .collect();
    Ok(call.paged(&page, json!({ "services": services })))
}

pub(super) fn one_service(call: &Call) -> Answer {
    let service = call.service()?;
    let origin = origin_of(&call.app, &service)?;
    let view = service_view(&call.app, &service, &origin);
    Ok(json_answer(StatusCode::OK, &view))
}

fn service_view(app: &App, service: &str, origin: &Origin) -> Value {
    let mut endpoints: Vec<Value> = match origin {
        Origin::Static(endpoints) => endpoints.iter().map(endpoint_view).collect(),
        Origin::Discovered(_) => {
            let found = app.sources.endpoints();
            found
                .get(service)
                .into_iter()
                .flatten()
                .map(endpoint_view)
                .collect()
        }
        Origin::Unknown(_) => Vec::new(),
        Origin::Heartbeat(_) => app.with_registry(|registry| {
            let now = clock::monotonic();
            let ages = registry
                .instances(service)
                .map(|(_, i)| now.saturating_sub(i.seen));
            let ages: Vec<_> = ages.collect();
            let endpoints = registry.endpoints(service);
            let with_age = endpoints.iter().zip(ages).map(|(endpoint, age)| {
                let mut view = endpoint_view(endpoint);
                view["secondsSinceHeartbeat"] = age.as_secs().into();
                view
            });
            with_age.collect()
        }),
    };
    let unreachable = app.proxies.unreachable_of(service);
    for endpoint in &mut endpoints {
        if let Some(from) = at(endpoint).and_then(|at| unreachable.get(&at)) {
            endpoint["unreachableFrom"] = json!(from);
        }
    }
    let mut view = json!({"name": service, "discovery": origin.name(), "endpoints": endpoints});
    if let Some(standing) = app.sources.standing().get(service) {
        view["registry"] = standing_view(standing);
    }
    view
}

fn standing_view(standing: &Standing) -> Value {
    let held = standing
        .kept_for
        .map(|left| json!({"endpoints": standing.kept, "secondsLeft": left.as_secs()}));
    json!({
        "secondsSinceAnswer": standing.answered_ago.map(|ago| ago.as_secs()),
        "problem": standing.problem,
        "held": held,
    })
}

/// `address:port` of a view, as sidecars write it.
fn at(endpoint: &Value) -> Option<String> {
    let ip: IpAddr = endpoint["address"].as_str()?.parse().ok()?;
    let port = u16::try_from(endpoint["port"].as_u64()?).ok()?;
    Some(SocketAddr::new(ip, port).to_string())
}

fn endpoint_view(endpoint: &Endpoint) -> Value {
    json!({
        "id": endpoint.id,
        "address": endpoint.address,
        "port": endpoint.port,
        "zone": endpoint.zone,
        "weight": endpoint.weight,
        "state": endpoint.state().as_str(),
        "labels": endpoint.labels,
        "identity": endpoint.identity,
    })
}

/// Somebody knows that the registry is right.
pub(super) fn confirm(call: &Call) -> Answer {
    let service = call.service()?;
    origin_of(&call.app, &service)?;
    if call.is_dry_run()? {
        let standing = call.app.sources.standing();
        let held = standing.get(&service).map_or(0, |s| s.kept.len());
        return match held {
            0 => Err(Problem::conflict(
                "nothing_held",
                format!("nothing of {service} is held back"),
            )),
            held => Ok(would(&json!({"service": service, "endpointsLost": held}))),
        };
    }
    call.app
        .sources
        .confirm(&service)
        .map_err(|e| Problem::conflict("nothing_held", e.to_string()))?;
    tracing::info!(service, who = call.who, "loss of endpoints confirmed");
    Ok(no_content())
}

/// The ETag of an instance: of what it said, and not of when it was heard.
fn tag_of(instance: &Instance) -> String {
    let said = serde_json::to_string(&instance.registration).unwrap_or_default();
    etag([said.as_str()])
}

/// The ETag of the instance in the path; `None` when there is none.
fn tag_in(app: &App, service: &str, id: &str) -> Option<String> {
    app.with_registry(|registry| registry.instance(service, id).map(tag_of))
}

pub(super) fn one_instance(call: &Call) -> Answer {
    let (service, id) = (call.service()?, call.instance());
    let found = call.app.with_registry(|registry| {
        let instance = registry.instance(&service, id)?;
        let age = clock::monotonic().saturating_sub(instance.seen);
        let mut view = endpoint_view(&registry.endpoint(&service, id)?);
        view["secondsSinceHeartbeat"] = age.as_secs().into();
        view["ttl"] = seconds(instance.lease.ttl).into();
        view["removeAfter"] = seconds(instance.lease.remove_after).into();
        Some((view, tag_of(instance)))
    });
    match found {
        Some((view, tag)) => Ok(tagged(&view, &tag)),
        None => Err(unknown(&service, id)),
    }
}

fn unknown(service: &str, id: &str) -> Problem {
    let (service, id) = (service.to_owned(), id.to_owned());
    crate::registry::RegistryError::Unknown { service, id }.into()
}

pub(super) fn register(call: &Call) -> Answer {
    let (app, service) = (&call.app, call.service()?);
    let lease = heartbeat_lease(app, &service)?;
    let registration: Registration = call.json("a registration")?;
    let would_be = app.with_registry(|r| r.would_register(&service, &registration))?;
    call.check_conditions(tag_in(app, &service, &would_be.id).as_deref())?;
    if call.is_dry_run()? {
        return Ok(would(
            &json!({"id": would_be.id, "created": would_be.created}),
        ));
    }
    let now = clock::monotonic();
    let registered = app.change_registry(|registry| {
        let result = registry.register(&service, registration, lease, now);
        let changed = result.is_ok();
        (result, changed)
    })?;
    tracing::info!(
        service,
        id = registered.id,
        created = registered.created,
        "instance registered"
    );
    let status = match registered.created {
        true => StatusCode::CREATED,
        false => StatusCode::OK,
    };
    let answer = json!({
        "id": registered.id,
        "ttl": seconds(lease.ttl),
        "removeAfter": seconds(lease.remove_after),
        // Two heartbeats may be lost before the third is too late.
        "renewEvery": seconds(lease.ttl / 3),
    });
    let mut response = json_answer(status, &answer);
    let path = service.replace('/', "%2F");
    let location = format!("/v1/services/{path}/instances/{}", registered.id);
    let tag = tag_in(app, &service, &registered.id).unwrap_or_default();
    for (name, value) in [(LOCATION, location), (ETAG, tag)] {
        if let Ok(value) = HeaderValue::from_str(&value) {
            response.headers_mut().insert(name, value);
        }
    }
    Ok(response)
}

pub(super) fn heartbeat(call: &Call) -> Answer {
    let (service, id) = (call.service()?, call.instance());
    let now = clock::monotonic();
    let back = call.app.change_registry(|registry| {
        let result = registry.heartbeat(&service, id, now);
        let changed = result == Ok(true);
        (result, changed)
    })?;
    if back {
        tracing::info!(service, id, "instance is heard again");
    }
    Ok(no_content())
}

pub(super) fn set_state(call: &Call) -> Answer {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Body {
        state: State,
    }
    let (service, id) = (call.service()?, call.instance());
    let Body { state } = call.json(r#"{"state": "Serving"}, Draining or Disabled"#)?;
    let tag = tag_in(&call.app, &service, id).ok_or_else(|| unknown(&service, id))?;
    call.check_conditions(Some(&tag))?;
    if call.is_dry_run()? {
        return Ok(would(&json!({"id": id, "state": state})));
    }
    call.app.change_registry(|registry| {
        let result = registry.set_state(&service, id, state);
        let changed = result == Ok(true);
        (result, changed)
    })?;
    tracing::info!(service, id, ?state, "instance state set");
    Ok(no_content())
}

pub(super) fn remove(call: &Call) -> Answer {
    let (service, id) = (call.service()?, call.instance());
    let tag = tag_in(&call.app, &service, id).ok_or_else(|| unknown(&service, id))?;
    call.check_conditions(Some(&tag))?;
    if call.is_dry_run()? {
        return Ok(would(&json!({"id": id, "removed": true})));
    }
    call.app.change_registry(|registry| {
        let result = registry.remove(&service, id);
        let changed = result.is_ok();
        (result, changed)
    })?;
    tracing::info!(service, id, "instance removed");
    Ok(no_content())
}

fn origin_of(app: &App, service: &str) -> Result<Origin, Problem> {
    let Some(mut services) = app.services() else {
        return Err(Problem::unavailable(
            "config_missing",
            "no usable config yet",
        ));
    };
    services.remove(service).ok_or_else(|| {
        Problem::unknown(
            "service_unknown",
            format!("there is no MeshService {service}"),
        )
    })
}

fn heartbeat_lease(app: &App, service: &str) -> Result<Lease, Problem> {
    match origin_of(app, service)? {
        Origin::Heartbeat(lease) => Ok(lease),
        other => {
            let detail = format!(
                "endpoints of MeshService {service} come from `{}`; set `discovery: {{heartbeat: {{}}}}` \
                 to let instances register themselves",
                other.name()
            );
            Err(Problem::conflict("not_self_registered", detail))
        }
    }
}

fn seconds(duration: Duration) -> String {
    match duration.as_millis() {
        millis if millis % 1000 == 0 => format!("{}s", millis / 1000),
        millis => format!("{millis}ms"),
    }
}
