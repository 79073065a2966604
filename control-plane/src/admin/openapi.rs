//! The OpenAPI 3.1 document of the admin API, made from the table of routes.

use hyper::StatusCode;
use serde_json::{Map, Value, json};

use super::call::{Answer, Call, MAX_PAGE, json_answer};
use super::routes::{ROUTES, Route};

/// The parameters that a query may have: name, schema, and what they say.
pub static PARAMETERS: &[(&str, &str, &str)] = &[
    ("limit", "integer", "At most so many items; default all."),
    (
        "after",
        "string",
        "Only items whose name is behind this one; see next.",
    ),
    (
        "namespace",
        "string",
        "The service's namespace; default default.",
    ),
    (
        "dryRun",
        "boolean",
        "Only say what would happen; default false.",
    ),
];

pub(super) fn answer(_: &Call) -> Answer {
    Ok(json_answer(StatusCode::OK, &document()))
}

/// The document.
pub fn document() -> Value {
    let mut paths = Map::new();
    for route in ROUTES {
        let path = paths.entry(route.path).or_insert_with(|| json!({}));
        path[route.method.to_ascii_lowercase()] = operation(route);
    }
    json!({
        "openapi": "3.1.0",
        "info": {
            "title": "Outrigger control plane",
            "version": env!("CARGO_PKG_VERSION"),
            "description": "Registry, rollouts and status. Every error is problem+json (RFC 9457) \
                with a stable code, which the header outrigger-error repeats.",
            "license": {"name": "Apache-2.0", "identifier": "Apache-2.0"},
        },
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": schemas(),
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        },
    })
}

fn operation(route: &Route) -> Value {
    let writes = route.method != "GET";
    let in_path = route.path.split('/').filter_map(|segment| {
        let name = segment.strip_prefix('{')?.strip_suffix('}')?;
        Some(json!({
            "name": name, "in": "path", "required": true, "schema": {"type": "string"},
            "description": match name {
                "service" => "name, or namespace%2Fname",
                _ => "The instance's id",
            },
        }))
    });
    let in_query = PARAMETERS.iter().filter(|(n, ..)| route.query.contains(n));
    let in_query = in_query.map(|(name, kind, says)| {
        let schema = match *name {
            "limit" => json!({"type": kind, "minimum": 1, "maximum": MAX_PAGE}),
            _ => json!({"type": kind}),
        };
        json!({"name": name, "in": "query", "description": says, "schema": schema})
    });
    let mut parameters: Vec<Value> = in_path.chain(in_query).collect();
    if route.problems.contains(&(412, "precondition_failed")) {
        parameters.push(json!({
            "name": "If-Match", "in": "header", "schema": {"type": "string"},
            "description": "The ETag that was read: 412 when it is another one by now.",
        }));
    }
    let mut responses = Map::new();
    for (status, schema) in route.answers {
        responses.insert(status.to_string(), success(schema));
    }
    let mut problems = vec![(400, "bad_request")];
    if writes {
        problems.extend([
            (401, "unauthenticated"),
            (403, "unauthorized"),
            (413, "request_too_large"),
            (503, "tokens_unreadable"),
        ]);
    }
    problems.extend(route.problems);
    for (status, code) in problems {
        let codes = responses.entry(status.to_string()).or_insert_with(refusal);
        let known = codes["description"].as_str().unwrap_or_default();
        codes["description"] = match known {
            "" => code.to_owned(),
            known => format!("{known}, {code}"),
        }
        .into();
    }
    let mut operation = json!({
        "operationId": route.id,
        "summary": route.summary,
        "parameters": parameters,
        "responses": responses,
    });
    if writes {
        // From this machine without, unless `api.requireToken`.
        operation["security"] = json!([{"token": []}, {}]);
    }
    if let Some(body) = &route.body {
        operation["requestBody"] = json!({
            "required": !body.optional,
            "content": {"application/json": {"schema": reference(body.schema)}},
        });
    }
    operation
}

fn reference(schema: &str) -> Value {
    json!({"$ref": format!("#/components/schemas/{schema}")})
}

fn success(schema: &str) -> Value {
    match schema {
        "" => json!({"description": "Done"}),
        "Text" => json!({
            "description": "As said above",
            "content": {"text/plain": {"schema": {"type": "string"}}},
        }),
        schema => json!({
            "description": "As said above",
            "content": {"application/json": {"schema": reference(schema)}},
        }),
    }
}

fn refusal() -> Value {
    json!({
        "description": "",
        "content": {"application/problem+json": {"schema": reference("Problem")}},
    })
}

/// An object with these members, all of them there.
fn object(members: Value) -> Value {
    let names: Vec<String> = members
        .as_object()
        .map(|members| members.keys().cloned().collect())
        .unwrap_or_default();
    let mut schema = json!({"type": "object", "required": names, "additionalProperties": false});
    schema["properties"] = members;
    schema
}

/// [`object`], of which only these have to be there.
fn object_with(required: &[&str], members: Value) -> Value {
    let mut schema = object(members);
    schema["required"] = json!(required);
    schema
}

fn schemas() -> Value {
    let text = || json!({"type": "string"});
    let texts = || json!({"type": "array", "items": {"type": "string"}});
    let map = || json!({"type": "object", "additionalProperties": {"type": "string"}});
    let whole = || json!({"type": "integer", "minimum": 0});
    let millis =
        || json!({"type": "integer", "minimum": 0, "description": "Milliseconds since 1970"});
    let or_null = |kind: &str| json!({"type": [kind, "null"]});
    let ref_or_null = |name: &str| json!({"anyOf": [reference(name), {"type": "null"}]});
    let list_of = |name: &str| json!({"type": "array", "items": reference(name)});
    let mut endpoint = json!({
        "id": text(), "address": text(), "port": whole(), "zone": text(), "weight": whole(),
        "state": {"type": "string"}, "labels": map(), "identity": text(),
        "secondsSinceHeartbeat": whole(),
    });
    let of_endpoint = [
        "id", "address", "port", "zone", "weight", "state", "labels", "identity",
    ];
    let mut instance = endpoint.clone();
    instance["ttl"] = text();
    instance["removeAfter"] = text();
    endpoint["unreachableFrom"] =
        json!({"type": "array", "items": text(), "description": "Ids of sidecars"});
    json!({
        "Object": {"type": "object"},
        "Problem": object(json!({
            "type": text(), "title": text(), "status": whole(), "detail": text(), "code": text(),
        })),
        "Would": object(json!({"dryRun": {"const": true}, "would": {"type": "object"}})),
        "Registration": object_with(&["address", "port"], json!({
            "id": {"type": "string", "minLength": 1, "maxLength": 128,
                   "description": "Default: address-port"},
            "address": {"type": "string", "description": "An IP address"},
            "port": {"type": "integer", "minimum": 1, "maximum": 65535},
            "zone": {"type": "string", "default": ""},
            "weight": {"type": "integer", "minimum": 0, "maximum": 10000, "default": 100},
            "priority": {"type": "integer", "minimum": 0, "maximum": 100, "default": 0},
            "labels": map(),
            "state": {"enum": ["Serving", "Draining", "Disabled"], "default": "Serving"},
        })),
        "State": object(json!({"state": {"enum": ["Serving", "Draining", "Disabled"]}})),
        "Registered": {"anyOf": [reference("Would"), object(json!({
            "id": text(), "ttl": text(), "removeAfter": text(), "renewEvery": text(),
        }))]},
        "Endpoint": object_with(&of_endpoint, endpoint),
        "Instance": object(instance),
        "Service": object_with(&["name", "discovery", "endpoints"], json!({
            "name": text(), "discovery": text(), "endpoints": list_of("Endpoint"),
            "registry": {"type": "object"},
        })),
        "Services": object(json!({"services": list_of("Service"), "next": or_null("string")})),
        "Progress": object(json!({
            "sent": or_null("string"), "acknowledged": or_null("string"),
            "refused": {"anyOf": [
                object(json!({"version": text(), "reason": text(), "at": millis()})),
                {"type": "null"},
            ]},
        })),
        "Proxy": object_with(&["id", "service", "connected", "synced", "config", "endpoints"], json!({
            "id": text(), "service": text(), "zone": text(), "labels": map(), "version": text(),
            "connected": {"type": "boolean"}, "connectedSince": millis(), "lastSeen": millis(),
            "synced": {"type": "boolean"}, "config": reference("Progress"),
            "endpoints": reference("Progress"),
            "roots": reference("Progress"),
            "unreachable": {"type": "array", "items": object(json!({
                "service": text(), "endpoint": text(),
            }))},
        })),
        "Proxies": object(json!({
            "configVersion": or_null("string"), "proxies": list_of("Proxy"),
            "next": or_null("string"),
        })),
        "Config": object(json!({
            "version": or_null("string"), "source": or_null("string"), "path": text(),
            "appliedAt": or_null("integer"), "documents": texts(),
            "warnings": {"type": "array", "items": {"type": "object"}},
            "rejected": or_null("object"), "onTrial": or_null("string"),
        })),
        "Replicas": object(json!({
            "name": text(), "leads": {"type": "boolean"},
            "leader": {"anyOf": [object(json!({"name": text(), "admin": text()})), {"type": "null"}]},
            "connected": {"type": "boolean"}, "problem": or_null("string"),
        })),
        "Trial": object(json!({
            "version": text(), "at": millis(), "canaries": texts(), "synced": whole(),
            "secondsLeft": whole(),
        })),
        "Stopped": object(json!({
            "version": text(), "at": millis(), "sidecar": text(), "reason": text(),
        })),
        "Version": object(json!({
            "version": text(), "at": millis(), "by": {"enum": ["files", "rollback"]},
            "who": text(), "reason": or_null("string"), "added": texts(), "changed": texts(),
            "removed": texts(),
        })),
        "Rollouts": object(json!({
            "version": or_null("string"), "onTrial": ref_or_null("Trial"),
            "withdrawn": or_null("string"), "stopped": ref_or_null("Stopped"),
            "proxies": object(json!({"connected": whole(), "synced": whole(), "refused": whole()})),
            "versions": list_of("Version"),
        })),
        "Rollback": object_with(&[], json!({
            "to": {"type": "string", "description": "Default: the one before the newest"},
            "reason": text(),
        })),
        "RolledBack": {"anyOf": [reference("Would"), object(json!({"version": text()}))]},
    })
}
