//! The requests of the admin API and their answers.
//!
//! Owns the paths and the JSON. A service in a path is `name` (in the namespace of `?namespace=`,
//! else `default`) or `namespace%2Fname`.

use std::borrow::Cow;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue, LOCATION};
use hyper::{Method, Response, StatusCode, Uri};
use outrigger_config::units::DEFAULT_NAMESPACE;
use outrigger_config::wire::Endpoint;
use outrigger_registry::Standing;
use serde::Deserialize;
use serde_json::{Value, json};

use super::problem::Problem;
use crate::app::App;
use crate::clock;
use crate::proxies::Proxy;
use crate::registry::{Lease, Registration, State};
use crate::world::Origin;

type Answer = Result<Response<Full<Bytes>>, Problem>;

/// Answers one request.
///
/// # Errors
/// The problem to be told to the client.
pub fn answer(app: &App, method: &Method, uri: &Uri, body: &[u8]) -> Answer {
    let segments: Result<Vec<_>, _> = uri.path().split('/').skip(1).map(decode).collect();
    let segments = segments?;
    let path: Vec<&str> = segments.iter().map(Cow::as_ref).collect();
    let method = if method == Method::HEAD {
        &Method::GET
    } else {
        method
    };
    let service = |name: &str| service_name(name, uri.query());
    match (method, path.as_slice()) {
        (&Method::GET, ["livez"]) => Ok(text(StatusCode::OK, "ok\n")),
        (&Method::GET, ["readyz"]) => Ok(ready(app)),
        (&Method::GET, ["metrics"]) => Ok(metrics(app)),
        (&Method::GET, ["v1", "proxies"]) => Ok(proxies(app)),
        (&Method::GET, ["v1", "config"]) => Ok(config(app)),
        (&Method::GET, ["v1", "ca"]) => authority(app),
        (&Method::GET, ["v1", "rollouts"]) => Ok(rollouts(app)),
        (&Method::POST, ["v1", "rollouts", "rollback"]) => roll_back(app, body),
        (&Method::GET, ["v1", "services"]) => Ok(services(app)),
        (&Method::GET, ["v1", "services", name] | ["v1", "services", name, "instances"]) => {
            one_service(app, &service(name)?)
        }
        (&Method::POST, ["v1", "services", name, "confirm"]) => confirm(app, &service(name)?),
        (&Method::POST, ["v1", "services", name, "instances"]) => {
            register(app, &service(name)?, body)
        }
        (&Method::PUT, ["v1", "services", name, "instances", id, "heartbeat"]) => {
            heartbeat(app, &service(name)?, id)
        }
        (&Method::PUT, ["v1", "services", name, "instances", id, "state"]) => {
            set_state(app, &service(name)?, id, body)
        }
        (&Method::DELETE, ["v1", "services", name, "instances", id]) => {
            remove(app, &service(name)?, id)
        }
        (_, path) => no_such(path),
    }
}

fn no_such(path: &[&str]) -> Answer {
    let allowed = match path {
        ["livez" | "readyz" | "metrics"] | ["v1", "proxies" | "config" | "services" | "ca"] => {
            "GET"
        }
        ["v1", "rollouts"] | ["v1", "services", _] => "GET",
        ["v1", "rollouts", "rollback"] => "POST",
        ["v1", "services", _, "confirm"] => "POST",
        ["v1", "services", _, "instances"] => "GET, POST",
        ["v1", "services", _, "instances", _] => "DELETE",
        ["v1", "services", _, "instances", _, "heartbeat" | "state"] => "PUT",
        _ => {
            return Err(Problem::unknown(
                "not_found",
                "there is nothing at this path",
            ));
        }
    };
    let mut response = Problem::method_not_allowed(allowed).into_response();
    response
        .headers_mut()
        .insert(ALLOW, HeaderValue::from_static(allowed));
    Ok(response)
}

fn ready(app: &App) -> Response<Full<Bytes>> {
    match app.current() {
        Some(_) => text(StatusCode::OK, "ok\n"),
        None => Problem::unavailable("config_missing", "no usable config yet").into_response(),
    }
}

fn metrics(app: &App) -> Response<Full<Bytes>> {
    let mut response = text(StatusCode::OK, app.metrics());
    let format = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");
    response.headers_mut().insert(CONTENT_TYPE, format);
    response
}

fn proxies(app: &App) -> Response<Full<Bytes>> {
    let version = app.current().map(|c| c.config.version.clone());
    json(
        StatusCode::OK,
        &json!({"configVersion": version, "proxies": app.proxies.list()}),
    )
}

fn authority(app: &App) -> Answer {
    match app.guard.authority() {
        Some(authority) => Ok(json(StatusCode::OK, &authority.view())),
        None => Err(Problem::unknown(
            "not_found",
            "this control plane has no authority: set ca",
        )),
    }
}

fn config(app: &App) -> Response<Full<Bytes>> {
    let current = app.current();
    let current = current.as_ref();
    let documents = current.map(|c| c.config.documents.keys().collect::<Vec<_>>());
    json(
        StatusCode::OK,
        &json!({
            "version": current.map(|c| &c.config.version),
            "source": current.map(|c| c.source),
            "path": app.config_path().display().to_string(),
            "appliedAt": current.map(|c| c.applied),
            "documents": documents.unwrap_or_default(),
            "warnings": current.map(|c| c.warnings.as_slice()).unwrap_or_default(),
            "rejected": app.rejected(),
        }),
    )
}

fn rollouts(app: &App) -> Response<Full<Bytes>> {
    let history = app.history();
    let versions: Vec<Value> = history
        .versions()
        .map(|version| {
            json!({
                "version": version.version,
                "at": version.at,
                "by": version.by,
                "added": version.added,
                "changed": version.changed,
                "removed": version.removed,
            })
        })
        .collect();
    let version = app.current().map(|c| c.config.version.clone());
    let proxies = app.proxies.list();
    let connected = || proxies.iter().filter(|proxy| proxy.connected);
    let runs = |proxy: &&Proxy| proxy.config.acknowledged == version;
    let refused = |proxy: &&Proxy| {
        let refused = proxy.config.refused.as_ref();
        refused.is_some_and(|refused| Some(&refused.version) == version.as_ref())
    };
    json(
        StatusCode::OK,
        &json!({
            "version": version,
            "withdrawn": history.withdrawn(),
            "proxies": {
                "connected": connected().count(),
                "synced": connected().filter(runs).count(),
                "refused": connected().filter(refused).count(),
            },
            "versions": versions,
        }),
    )
}

fn roll_back(app: &App, body: &[u8]) -> Answer {
    #[derive(Default, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Body {
        to: Option<String>,
    }
    let body: Body = match body {
        [] => Body::default(),
        _ => serde_json::from_slice(body).map_err(|e| {
            Problem::bad_request(format!("write {{\"to\": \"VERSION\"}} or nothing: {e}"))
        })?,
    };
    let version = app
        .roll_back(body.to.as_deref())
        .map_err(|detail| Problem::conflict("no_such_version", detail))?;
    Ok(json(StatusCode::OK, &json!({ "version": version })))
}

fn services(app: &App) -> Response<Full<Bytes>> {
    let Some(current) = app.current() else {
        return json(StatusCode::OK, &json!({"services": []}));
    };
    let origins = current.config.services.iter();
    let services: Vec<Value> = origins
        .map(|(name, origin)| service_view(app, name, origin))
        .collect();
    json(StatusCode::OK, &json!({ "services": services }))
}

fn one_service(app: &App, service: &str) -> Answer {
    let view = service_view(app, service, &origin_of(app, service)?);
    Ok(json(StatusCode::OK, &view))
}

fn service_view(app: &App, service: &str, origin: &Origin) -> Value {
    let endpoints: Vec<Value> = match origin {
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

/// Somebody knows that the registry is right.
fn confirm(app: &App, service: &str) -> Answer {
    origin_of(app, service)?;
    app.sources
        .confirm(service)
        .map_err(|e| Problem::conflict("nothing_held", e.to_string()))?;
    tracing::info!(service, "loss of endpoints confirmed");
    Ok(no_content())
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

fn register(app: &App, service: &str, body: &[u8]) -> Answer {
    let lease = heartbeat_lease(app, service)?;
    let registration: Registration = serde_json::from_slice(body)
        .map_err(|e| Problem::bad_request(format!("not a registration: {e}")))?;
    let now = clock::monotonic();
    let registered = app.change_registry(|registry| {
        let result = registry.register(service, registration, lease, now);
        let changed = result.is_ok();
        (result, changed)
    })?;
    tracing::info!(
        service,
        id = registered.id,
        created = registered.created,
        "instance registered"
    );
    let status = if registered.created {
        StatusCode::CREATED
    } else {
        StatusCode::OK
    };
    let answer = json!({
        "id": registered.id,
        "ttl": seconds(lease.ttl),
        "removeAfter": seconds(lease.remove_after),
        // Two heartbeats may be lost before the third is too late.
        "renewEvery": seconds(lease.ttl / 3),
    });
    let mut response = json(status, &answer);
    let location = format!(
        "/v1/services/{}/instances/{}",
        service.replace('/', "%2F"),
        registered.id
    );
    if let Ok(location) = HeaderValue::from_str(&location) {
        response.headers_mut().insert(LOCATION, location);
    }
    Ok(response)
}

fn heartbeat(app: &App, service: &str, id: &str) -> Answer {
    let now = clock::monotonic();
    let back = app.change_registry(|registry| {
        let result = registry.heartbeat(service, id, now);
        let changed = result == Ok(true);
        (result, changed)
    })?;
    if back {
        tracing::info!(service, id, "instance is heard again");
    }
    Ok(no_content())
}

fn set_state(app: &App, service: &str, id: &str, body: &[u8]) -> Answer {
    #[derive(Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Body {
        state: State,
    }
    let Body { state } = serde_json::from_slice(body).map_err(|e| {
        let detail = format!("write {{\"state\": \"Serving\"}}, Draining or Disabled: {e}");
        Problem::bad_request(detail)
    })?;
    app.change_registry(|registry| {
        let result = registry.set_state(service, id, state);
        let changed = result == Ok(true);
        (result, changed)
    })?;
    tracing::info!(service, id, ?state, "instance state set");
    Ok(no_content())
}

fn remove(app: &App, service: &str, id: &str) -> Answer {
    app.change_registry(|registry| {
        let result = registry.remove(service, id);
        let changed = result.is_ok();
        (result, changed)
    })?;
    tracing::info!(service, id, "instance removed");
    Ok(no_content())
}

fn origin_of(app: &App, service: &str) -> Result<Origin, Problem> {
    let Some(current) = app.current() else {
        return Err(Problem::unavailable(
            "config_missing",
            "no usable config yet",
        ));
    };
    current
        .config
        .services
        .get(service)
        .cloned()
        .ok_or_else(|| {
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

fn seconds(duration: std::time::Duration) -> String {
    match duration.as_millis() {
        millis if millis % 1000 == 0 => format!("{}s", millis / 1000),
        millis => format!("{millis}ms"),
    }
}

/// `name` or `namespace/name` to `namespace/name`.
fn service_name(name: &str, query: Option<&str>) -> Result<String, Problem> {
    let mut parameters = query
        .unwrap_or_default()
        .split('&')
        .filter_map(|p| p.split_once('='));
    let namespace = parameters
        .find(|(key, _)| *key == "namespace")
        .map(|(_, value)| decode(value));
    let namespace = namespace.transpose()?;
    let (namespace, name) = match name.split_once('/') {
        Some((own, name)) if namespace.as_deref().is_none_or(|n| n == own) => (own, name),
        Some(_) => return Err(Problem::bad_request("the path and ?namespace= disagree")),
        None => (namespace.as_deref().unwrap_or(DEFAULT_NAMESPACE), name),
    };
    if namespace.is_empty() || name.is_empty() || name.contains('/') {
        return Err(Problem::bad_request(
            "a service is written as name or namespace%2Fname",
        ));
    }
    Ok(format!("{namespace}/{name}"))
}

/// Percent-decoding (RFC 3986 §2.1); the result must be UTF-8 without control characters.
fn decode(segment: &str) -> Result<Cow<'_, str>, Problem> {
    if !segment.contains('%') {
        return Ok(segment.into());
    }
    let bad = || Problem::bad_request("the path is not properly percent-encoded");
    let mut bytes = Vec::with_capacity(segment.len());
    let mut rest = segment.bytes();
    while let Some(byte) = rest.next() {
        if byte != b'%' {
            bytes.push(byte);
            continue;
        }
        let mut digit = || rest.next().and_then(|b| char::from(b).to_digit(16));
        let (Some(high), Some(low)) = (digit(), digit()) else {
            return Err(bad());
        };
        bytes.push(u8::try_from(high * 16 + low).map_err(|_| bad())?);
    }
    let text = String::from_utf8(bytes).map_err(|_| bad())?;
    if text.chars().any(char::is_control) {
        Err(bad())
    } else {
        Ok(text.into())
    }
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    with_type(status, "text/plain; charset=utf-8", body.into())
}

fn json(status: StatusCode, value: &Value) -> Response<Full<Bytes>> {
    with_type(status, "application/json", format!("{value:#}\n").into())
}

fn no_content() -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::default());
    *response.status_mut() = StatusCode::NO_CONTENT;
    response
}

fn with_type(status: StatusCode, kind: &'static str, body: Bytes) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body));
    *response.status_mut() = status;
    response
        .headers_mut()
        .insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_service_is_named_by_path_and_namespace() {
        let check = |name: &str, query: Option<&str>, expected: Option<&str>| {
            assert_eq!(
                service_name(name, query).ok().as_deref(),
                expected,
                "{name} {query:?}"
            );
        };
        check("orders", None, Some("default/orders"));
        check("orders", Some("a=b&namespace=shop"), Some("shop/orders"));
        check("shop/orders", None, Some("shop/orders"));
        check("shop/orders", Some("namespace=shop"), Some("shop/orders"));
        check("shop/orders", Some("namespace=other"), None);
        check("a/b/c", None, None);
        check("", None, None);
    }

    #[test]
    fn paths_are_decoded_and_bad_ones_refused() {
        let check = |raw: &str, expected: Option<&str>| {
            assert_eq!(decode(raw).ok().as_deref(), expected, "{raw}");
        };
        check("plain", Some("plain"));
        check("shop%2Forders", Some("shop/orders"));
        check("%c3%A9", Some("é"));
        check("%2", None);
        check("%zz", None);
        check("%ff", None);
        check("a%0ab", None);
    }
}
