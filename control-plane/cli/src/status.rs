//! `outrigger status`: which config each sidecar runs, and what was refused.

use std::fmt::Write as _;
use std::time::Duration;

use clap::Args;
use http::Method;
use serde_json::{Value, json};

use crate::client::{ADMIN, CONTROL_PLANE, Client};
use crate::clock;
use crate::output::{Failure, Format, cell, items, print_as, table};
use crate::wait::Wait;

/// Whom to ask.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// The control plane; a token of its api.tokens comes from OUTRIGGER_TOKEN
    #[arg(long, value_name = "URL", env = "OUTRIGGER_CONTROL_PLANE", default_value = CONTROL_PLANE)]
    control_plane: String,
    /// Ask one sidecar instead [default address: OUTRIGGER_ADMIN or http://127.0.0.1:15020]
    #[arg(long, value_name = "URL", num_args = 0..=1)]
    #[arg(conflicts_with = "wait")]
    admin: Option<Option<String>>,
    #[command(flatten)]
    wait: Wait,
}

pub(crate) async fn run(options: Options, format: Format) -> Result<(), Failure> {
    match options.admin {
        Some(address) => sidecar(&address_of(address), format).await,
        None => mesh(&options, format).await,
    }
}

/// The address of an `--admin` that may be given without one.
pub(crate) fn address_of(given: Option<String>) -> String {
    let known = given.or_else(|| std::env::var("OUTRIGGER_ADMIN").ok());
    known.unwrap_or_else(|| ADMIN.to_owned())
}

async fn mesh(options: &Options, format: Format) -> Result<(), Failure> {
    let client = Client::control_plane(&options.control_plane)?;
    options.wait.wait(&client).await?;
    let config = client.get("/v1/config").await?;
    let proxies = client.get("/v1/proxies").await?;
    let whole = json!({"config": config, "proxies": proxies["proxies"]});
    print_as(format, &whole, mesh_table);
    Ok(())
}

fn mesh_table(whole: &Value) -> String {
    let config = &whole["config"];
    let mut text = format!(
        "config {} of {} ({} documents)\n",
        cell(&config["version"]),
        cell(&config["path"]),
        items(&config["documents"]).len()
    );
    text.push_str(&rejected(&config["rejected"]));
    let now = clock::wall_millis();
    let mut refusals = String::new();
    let rows: Vec<Vec<String>> = items(&whole["proxies"])
        .iter()
        .map(|proxy| {
            let id = cell(&proxy["id"]);
            for what in ["config", "endpoints"] {
                let refused = &proxy[what]["refused"];
                if !refused.is_null() {
                    let reason = refused["reason"].as_str().unwrap_or_default();
                    let version = cell(&refused["version"]);
                    let _ = writeln!(refusals, "{id} refused {what} {version}:");
                    for line in reason.lines() {
                        let _ = writeln!(refusals, "  {line}");
                    }
                }
            }
            let state = match (proxy["connected"].as_bool(), proxy["synced"].as_bool()) {
                (Some(true), Some(true)) => "synced",
                (Some(true), _) => "behind",
                _ => "gone",
            };
            let seen = now.saturating_sub(proxy["lastSeen"].as_u64().unwrap_or(now));
            vec![
                id,
                cell(&proxy["service"]),
                cell(&proxy["zone"]),
                state.to_owned(),
                cell(&proxy["config"]["acknowledged"]),
                if refuses(proxy) { "see below" } else { "-" }.to_owned(),
                format!("{} ago", clock::short(Duration::from_millis(seen))),
                cell(&proxy["version"]),
            ]
        })
        .collect();
    let headings = [
        "PROXY", "SERVICE", "ZONE", "STATE", "CONFIG", "REFUSED", "HEARD", "VERSION",
    ];
    let _ = write!(text, "\n{}", table(&headings, &rows));
    if !refusals.is_empty() {
        let _ = write!(text, "\n{refusals}");
    }
    text
}

fn refuses(proxy: &Value) -> bool {
    ["config", "endpoints"]
        .iter()
        .any(|what| !proxy[what]["refused"].is_null())
}

/// The problems of a config that was refused and is therefore not the one in force.
fn rejected(rejected: &Value) -> String {
    if rejected.is_null() {
        return String::new();
    }
    let mut text = format!("NOT IN FORCE, refused: {}\n", cell(&rejected["summary"]));
    for problem in items(&rejected["problems"]) {
        let _ = match problem {
            Value::String(line) => writeln!(text, "  {line}"),
            problem => writeln!(text, "  {}", problem_line(problem)),
        };
    }
    text
}

fn problem_line(problem: &Value) -> String {
    let get = |key: &str| problem[key].as_str().unwrap_or_default();
    let (line, column) = (cell(&problem["line"]), cell(&problem["column"]));
    let mut text = format!(
        "{}:{line}:{column}: {}[{}] ",
        get("file"),
        get("severity"),
        get("code"),
    );
    if !get("path").is_empty() {
        let _ = write!(text, "{}: ", get("path"));
    }
    text.push_str(get("message"));
    if !get("help").is_empty() {
        let _ = write!(text, "; {}", get("help"));
    }
    text
}

async fn sidecar(address: &str, format: Format) -> Result<(), Failure> {
    let client = Client::admin(address)?;
    let ready = client.ask(Method::GET, "/readyz", None).await?;
    let mut config = client.get("/config").await?;
    let documents = items(&config["documents"]).len();
    if let Some(config) = config.as_object_mut() {
        // `outrigger status` tells where things stand; the documents are at /config.
        config.insert("documents".to_owned(), documents.into());
        config.insert("ready".to_owned(), ready.status.is_success().into());
        config.insert("readiness".to_owned(), ready.text().trim().into());
        config.insert("store".to_owned(), store(&client).await?);
    }
    print_as(format, &config, sidecar_table);
    Ok(())
}

/// The queue store as `/queues` tells it; `unknown` where that is not to be had.
async fn store(client: &Client) -> Result<Value, Failure> {
    let answer = client.ask(Method::GET, "/queues", None).await?;
    let value = answer.json();
    if answer.status.is_success() {
        return Ok(value["store"].clone());
    }
    Ok(json!({"health": "unknown", "reason": value["detail"]}))
}

fn store_line(store: &Value) -> String {
    let health = cell(&store["health"]);
    match store["reason"].as_str() {
        Some(reason) => format!("{health}: {reason}"),
        None => health,
    }
}

fn sidecar_table(config: &Value) -> String {
    let link = &config["controlPlane"];
    let mut rows = vec![
        row(
            "ready",
            match config["ready"].as_bool() {
                Some(true) => "yes".to_owned(),
                _ => format!("no: {}", cell(&config["readiness"])),
            },
        ),
        row(
            "config",
            format!(
                "{} ({} documents)",
                cell(&config["version"]),
                cell(&config["documents"])
            ),
        ),
        row("from", cell(&config["source"])),
        row("applied", applied(&config["appliedAt"])),
        row("queue store", store_line(&config["store"])),
    ];
    if !link.is_null() {
        let state = if link["connected"] == true {
            "connected"
        } else {
            "not connected"
        };
        let (accepted, refused) = (cell(&link["accepted"]), cell(&link["refused"]));
        rows.push(row(
            "control plane",
            format!("{state}, {accepted} accepted, {refused} refused"),
        ));
        if !link["problem"].is_null() {
            rows.push(row("", cell(&link["problem"])));
        }
    }
    let mut text = String::new();
    for (name, value) in rows {
        let _ = writeln!(text, "{name:14}{value}");
    }
    for warning in items(&config["warnings"]) {
        let _ = writeln!(text, "{:14}{}", "warning", cell(warning));
    }
    text.push_str(&rejected(&config["rejected"]));
    text
}

fn row(name: &'static str, value: String) -> (&'static str, String) {
    (name, value)
}

/// How long ago a moment in seconds since 1970 was.
fn applied(at: &Value) -> String {
    let Some(seconds) = at.as_f64() else {
        return cell(at);
    };
    let ago = Duration::from_millis(clock::wall_millis()).as_secs_f64() - seconds;
    format!(
        "{} ago",
        clock::short(Duration::from_secs_f64(ago.max(0.0)))
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_that_failed_is_shown_with_its_reason() {
        let config = json!({"ready": true, "store": {"health": "failed", "reason": "damaged"}});
        let text = sidecar_table(&config);
        assert!(text.contains("queue store   failed: damaged\n"), "{text}");
        assert_eq!(
            store_line(&json!({"health": "none", "reason": null})),
            "none"
        );
    }

    #[test]
    fn a_refusal_is_shown_with_its_place() {
        let whole = json!({
            "config": {"version": "abc", "path": "mesh", "documents": ["a"], "rejected": {
                "summary": "1 document, 1 error, 0 warnings",
                "problems": [{"severity": "error", "code": "E103", "file": "mesh/a.yaml", "line": 7,
                    "column": 9, "path": "spec.rulez", "message": "unknown field",
                    "help": "did you mean \"rules\"?"}],
            }},
            "proxies": [{"id": "web-1", "service": "shop/web", "connected": true, "synced": false,
                "config": {"acknowledged": "abc", "refused": {"version": "def", "reason": "no"}},
                "endpoints": {}, "lastSeen": 0, "version": "0.1.0", "zone": ""}],
        });
        let text = mesh_table(&whole);
        let place =
            "mesh/a.yaml:7:9: error[E103] spec.rulez: unknown field; did you mean \"rules\"?";
        assert!(text.contains(place), "{text}");
        assert!(text.contains("behind"), "{text}");
        assert!(text.contains("web-1 refused config def:\n  no"), "{text}");
    }
}
