//! What the admin API answers: one table, from which requests are dispatched and the OpenAPI
//! document is made, so that neither knows a path that the other does not.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::sync::Arc;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{ALLOW, ETAG, HeaderMap, HeaderValue, IF_NONE_MATCH};
use hyper::{Method, Response, StatusCode, Uri};

use super::call::{self, Answer, Call};
use super::problem::Problem;
use super::{instances, openapi, views};
use crate::app::App;

/// One method of one path.
pub struct Route {
    /// GET (which answers HEAD, too), POST, PUT or DELETE.
    pub method: &'static str,
    /// With `{names}`; each stands for one segment.
    pub path: &'static str,
    /// A word for programs that are made from the document.
    pub id: &'static str,
    /// One sentence.
    pub summary: &'static str,
    /// Names of the query; see [`openapi::PARAMETERS`]. Others are refused.
    pub query: &'static [&'static str],
    /// The schema of the body.
    pub body: Option<Body>,
    /// Statuses of success with the schema of their answer.
    pub answers: &'static [(u16, &'static str)],
    /// Codes of refusals, beside those that any path has.
    pub problems: &'static [(u16, &'static str)],
    /// Who answers.
    pub handler: Handler,
}

/// The body of a write.
pub struct Body {
    /// Its schema.
    pub schema: &'static str,
    /// Whether it may be left out.
    pub optional: bool,
}

/// Who answers, and how.
pub enum Handler {
    /// At once.
    Now(fn(&Call) -> Answer),
    /// From a thread that may wait for the disk.
    Blocking(fn(&Call) -> Answer),
    /// After reading the files anew.
    Reload,
}

const fn get(
    path: &'static str,
    id: &'static str,
    summary: &'static str,
    answer: &'static [(u16, &'static str)],
    handler: fn(&Call) -> Answer,
) -> Route {
    Route {
        method: "GET",
        path,
        id,
        summary,
        query: &[],
        body: None,
        answers: answer,
        problems: &[],
        handler: Handler::Now(handler),
    }
}

const fn needed(schema: &'static str) -> Option<Body> {
    Some(Body {
        schema,
        optional: false,
    })
}

/// Every route.
pub static ROUTES: &[Route] = &[
    get(
        "/livez",
        "getLiveness",
        "Whether the process works.",
        &[(200, "Text")],
        views::alive,
    ),
    Route {
        problems: &[(503, "config_missing")],
        ..get(
            "/readyz",
            "getReadiness",
            "Whether there is a config to push.",
            &[(200, "Text")],
            views::ready,
        )
    },
    get(
        "/metrics",
        "getMetrics",
        "What an operator counts, as Prometheus text.",
        &[(200, "Text")],
        views::metrics,
    ),
    get(
        "/openapi.json",
        "getOpenApi",
        "This document.",
        &[(200, "Object")],
        openapi::answer,
    ),
    Route {
        query: &["limit", "after"],
        ..get(
            "/v1/proxies",
            "listProxies",
            "Every sidecar with what it was sent, runs and refused.",
            &[(200, "Proxies")],
            views::proxies,
        )
    },
    get(
        "/v1/config",
        "getConfig",
        "The config being pushed, and why another one is not.",
        &[(200, "Config")],
        views::config,
    ),
    Route {
        method: "POST",
        handler: Handler::Reload,
        ..get(
            "/v1/config/reload",
            "reloadConfig",
            "Read the files now instead of when the watch sees a change.",
            &[(200, "Config")],
            views::config,
        )
    },
    Route {
        problems: &[(404, "not_found")],
        ..get(
            "/v1/ca",
            "getAuthority",
            "The authority that signs the sidecars' certificates.",
            &[(200, "Object")],
            views::authority,
        )
    },
    Route {
        problems: &[(404, "not_found")],
        ..get(
            "/v1/replicas",
            "getReplicas",
            "Which of several control planes leads, and what they share.",
            &[(200, "Replicas")],
            views::replicas,
        )
    },
    get(
        "/v1/rollouts",
        "getRollouts",
        "The config on trial, who runs what, and the last twenty versions.",
        &[(200, "Rollouts")],
        views::rollouts,
    ),
    Route {
        method: "POST",
        query: &["dryRun"],
        body: Some(Body {
            schema: "Rollback",
            optional: true,
        }),
        problems: &[
            (409, "no_such_version"),
            (409, "not_leader"),
            (412, "precondition_failed"),
        ],
        handler: Handler::Blocking(views::roll_back),
        ..get(
            "/v1/rollouts/rollback",
            "rollBack",
            "Push an earlier version again, and end the trial of another one.",
            &[(200, "RolledBack")],
            views::roll_back,
        )
    },
    Route {
        method: "POST",
        query: &["dryRun"],
        problems: &[
            (409, "nothing_on_trial"),
            (409, "not_leader"),
            (412, "precondition_failed"),
        ],
        handler: Handler::Blocking(views::promote),
        ..get(
            "/v1/rollouts/promote",
            "promote",
            "Push the config on trial to everybody now.",
            &[(200, "RolledBack")],
            views::promote,
        )
    },
    Route {
        query: &["limit", "after"],
        ..get(
            "/v1/services",
            "listServices",
            "Every service with its endpoints.",
            &[(200, "Services")],
            instances::services,
        )
    },
    Route {
        query: &["namespace"],
        problems: SERVICE,
        ..get(
            "/v1/services/{service}",
            "getService",
            "A service with its endpoints.",
            &[(200, "Service")],
            instances::one_service,
        )
    },
    Route {
        method: "POST",
        query: &["namespace", "dryRun"],
        problems: &[
            (404, "service_unknown"),
            (409, "nothing_held"),
            (503, "config_missing"),
        ],
        handler: Handler::Now(instances::confirm),
        ..get(
            "/v1/services/{service}/confirm",
            "confirmLoss",
            "Believe the registry that lost so many endpoints at once.",
            &[(200, "Would"), (204, "")],
            instances::confirm,
        )
    },
    Route {
        query: &["namespace"],
        problems: SERVICE,
        ..get(
            "/v1/services/{service}/instances",
            "listInstances",
            "A service with its endpoints.",
            &[(200, "Service")],
            instances::one_service,
        )
    },
    Route {
        method: "POST",
        query: &["namespace", "dryRun"],
        body: needed("Registration"),
        problems: &[
            (404, "service_unknown"),
            (409, "not_self_registered"),
            (412, "precondition_failed"),
            (503, "config_missing"),
            (503, "registry_full"),
        ],
        handler: Handler::Now(instances::register),
        ..get(
            "/v1/services/{service}/instances",
            "registerInstance",
            "Register an instance, or register it again.",
            &[(200, "Registered"), (201, "Registered")],
            instances::register,
        )
    },
    Route {
        query: &["namespace"],
        problems: INSTANCE,
        ..get(
            "/v1/services/{service}/instances/{instance}",
            "getInstance",
            "A registered instance.",
            &[(200, "Instance")],
            instances::one_instance,
        )
    },
    Route {
        method: "DELETE",
        query: &["namespace", "dryRun"],
        problems: INSTANCE_WRITE,
        handler: Handler::Now(instances::remove),
        ..get(
            "/v1/services/{service}/instances/{instance}",
            "removeInstance",
            "Deregister an instance.",
            &[(200, "Would"), (204, "")],
            instances::remove,
        )
    },
    Route {
        method: "PUT",
        query: &["namespace"],
        problems: INSTANCE,
        handler: Handler::Now(instances::heartbeat),
        ..get(
            "/v1/services/{service}/instances/{instance}/heartbeat",
            "renewInstance",
            "Renew an instance's lease.",
            &[(204, "")],
            instances::heartbeat,
        )
    },
    Route {
        method: "PUT",
        query: &["namespace", "dryRun"],
        body: needed("State"),
        problems: INSTANCE_WRITE,
        handler: Handler::Now(instances::set_state),
        ..get(
            "/v1/services/{service}/instances/{instance}/state",
            "setInstanceState",
            "Say whether an instance takes requests.",
            &[(200, "Would"), (204, "")],
            instances::set_state,
        )
    },
];

const SERVICE: &[(u16, &str)] = &[(404, "service_unknown"), (503, "config_missing")];
const INSTANCE: &[(u16, &str)] = &[(404, "instance_unknown")];
const INSTANCE_WRITE: &[(u16, &str)] = &[(404, "instance_unknown"), (412, "precondition_failed")];

impl Route {
    /// What stands for the names of the path; `None` when it is another path.
    fn names(&self, segments: &[Cow<'_, str>]) -> Option<Vec<String>> {
        let own: Vec<&str> = self.path.split('/').skip(1).collect();
        if own.len() != segments.len() {
            return None;
        }
        let mut names = Vec::new();
        for (own, segment) in own.iter().zip(segments) {
            match own.starts_with('{') {
                true => names.push(segment.to_string()),
                false if own == segment => {}
                false => return None,
            }
        }
        Some(names)
    }
}

/// Answers one request of somebody who may make it.
///
/// # Errors
/// The problem to be told to the client.
///
/// # Cancel safety
/// A write that has begun is done all the same.
pub async fn answer(
    app: &Arc<App>,
    who: String,
    (method, uri, headers): (&Method, &Uri, HeaderMap),
    body: Bytes,
) -> Answer {
    let segments: Result<Vec<_>, _> = uri.path().split('/').skip(1).map(call::decode).collect();
    let segments = segments?;
    let here: Vec<(&Route, Vec<String>)> = ROUTES
        .iter()
        .filter_map(|route| Some((route, route.names(&segments)?)))
        .collect();
    let method = match method {
        &Method::HEAD => "GET",
        method => method.as_str(),
    };
    let Some((route, names)) = here.iter().find(|(route, _)| route.method == method) else {
        return elsewhere(&here);
    };
    let query = call::query(uri.query())?;
    if let Some((name, _)) = query
        .iter()
        .find(|(n, _)| !route.query.contains(&n.as_str()))
    {
        let mut detail = format!("{name:?} is no parameter here");
        if !route.query.is_empty() {
            let _ = write!(detail, "; there are {}", route.query.join(", "));
        }
        return Err(Problem::bad_request(detail));
    }
    let seen: Vec<HeaderValue> = headers.get_all(IF_NONE_MATCH).iter().cloned().collect();
    let call = Call {
        app: Arc::clone(app),
        who,
        path: uri.path().to_owned(),
        names: names.clone(),
        query,
        headers,
        body,
    };
    let response = match route.handler {
        Handler::Now(handler) => handler(&call)?,
        Handler::Blocking(handler) => {
            let work = tokio::task::spawn_blocking(move || handler(&call));
            work.await
                .map_err(|_| Problem::unavailable("failed", "it failed; the log says why"))??
        }
        Handler::Reload => {
            app.reload().await;
            views::config(&call)?
        }
    };
    Ok(match route.method {
        "GET" => unless_seen(response, &seen),
        _ => response,
    })
}

/// 304 when the caller has it already (RFC 9110 §13.1.2).
fn unless_seen(mut response: Response<Full<Bytes>>, seen: &[HeaderValue]) -> Response<Full<Bytes>> {
    let Some(tag) = response.headers().get(ETAG).and_then(|t| t.to_str().ok()) else {
        return response;
    };
    let lists = seen.iter().filter_map(|list| list.to_str().ok());
    let mut tags = lists.flat_map(|list| list.split(',')).map(str::trim);
    // Weak comparison: it is the same for whoever only reads.
    if tags.any(|t| t == "*" || t.strip_prefix("W/").unwrap_or(t) == tag) {
        *response.status_mut() = StatusCode::NOT_MODIFIED;
        *response.body_mut() = Full::default();
    }
    response
}

/// There is nothing at this path, or nothing for this method.
fn elsewhere(here: &[(&Route, Vec<String>)]) -> Answer {
    if here.is_empty() {
        let detail = "there is nothing at this path; /openapi.json says what there is";
        return Err(Problem::unknown("not_found", detail));
    }
    let allowed: Vec<&str> = here.iter().map(|(route, _)| route.method).collect();
    let allowed = allowed.join(", ");
    let mut response = Problem::method_not_allowed(&allowed).into_response();
    if let Ok(allowed) = HeaderValue::from_str(&allowed) {
        response.headers_mut().insert(ALLOW, allowed);
    }
    Ok(response)
}
