//! `outrigger routes`, `endpoints` and `breakers`: what one sidecar knows, as tables.

use std::time::Duration;

use serde_json::Value;

use crate::client::Admin;
use crate::clock;
use crate::output::{Failure, Format, cell, items, print_as, table};

pub(crate) async fn routes(admin: Admin, format: Format) -> Result<(), Failure> {
    let value = admin.client()?.get("/routes").await?;
    print_as(format, &value, routes_table);
    Ok(())
}

fn routes_table(value: &Value) -> String {
    let mut rows = Vec::new();
    for service in items(&value["services"]) {
        for route in items(&service["routes"]) {
            let backends: Vec<String> = items(&route["backends"])
                .iter()
                .map(|backend| {
                    format!("{}:{}", cell(&backend["service"]), cell(&backend["weight"]))
                })
                .collect();
            let asynchronous = &route["async"];
            rows.push(vec![
                cell(&service["service"]),
                cell(&route["name"]),
                if backends.is_empty() {
                    "-".to_owned()
                } else {
                    backends.join(" ")
                },
                millis(&route["timeouts"]["requestMs"]),
                cell(&route["retry"]["attempts"]),
                match asynchronous["when"].as_str() {
                    Some(when) => format!("{when} {}", cell(&asynchronous["queue"])),
                    None => "-".to_owned(),
                },
            ]);
        }
    }
    table(
        &[
            "SERVICE", "ROUTE", "BACKENDS", "TIMEOUT", "RETRIES", "ASYNC",
        ],
        &rows,
    )
}

pub(crate) async fn endpoints(admin: Admin, format: Format) -> Result<(), Failure> {
    let value = admin.client()?.get("/endpoints").await?;
    print_as(format, &value, endpoints_table);
    Ok(())
}

fn endpoints_table(value: &Value) -> String {
    let mut rows = Vec::new();
    for service in items(&value["services"]) {
        let name = cell(&service["service"]);
        let endpoints = items(&service["endpoints"]);
        if endpoints.is_empty() {
            rows.push(vec![name.clone(), "none".to_owned()]);
        }
        for endpoint in endpoints {
            rows.push(vec![
                name.clone(),
                cell(&endpoint["address"]),
                cell(&endpoint["zone"]),
                cell(&endpoint["priority"]),
                cell(&endpoint["weight"]),
                state(service, endpoint),
                millis(&endpoint["sinceMs"]),
                cell(&endpoint["inFlight"]),
                cell(&endpoint["connections"]),
                match endpoint["latencyMs"].as_f64() {
                    Some(latency) => format!("{latency:.1}ms"),
                    None => "-".to_owned(),
                },
                cell(&endpoint["consecutiveFailures"]),
                cell(&endpoint["why"]),
            ]);
        }
    }
    let headings = [
        "SERVICE",
        "ADDRESS",
        "ZONE",
        "TIER",
        "WEIGHT",
        "STATE",
        "SINCE",
        "IN FLIGHT",
        "CONNS",
        "LATENCY",
        "FAILURES",
        "WHY",
    ];
    table(&headings, &rows)
}

/// Where an endpoint stands, and whether that counts.
fn state(service: &Value, endpoint: &Value) -> String {
    let standing = match endpoint["ejectedForMs"].as_u64() {
        Some(left) => format!("ejected for {}", clock::short(Duration::from_millis(left))),
        None => cell(&endpoint["standing"]),
    };
    match service["panic"].as_bool() {
        Some(true) => format!("{standing} (panic: health is ignored)"),
        _ => standing,
    }
}

pub(crate) async fn breakers(admin: Admin, format: Format) -> Result<(), Failure> {
    let value = admin.client()?.get("/breakers").await?;
    print_as(format, &value, breakers_table);
    Ok(())
}

fn breakers_table(value: &Value) -> String {
    let row = |breaker: &Value| {
        let (failed, all) = (
            cell(&breaker["windowFailures"]),
            cell(&breaker["windowRequests"]),
        );
        vec![
            cell(&breaker["service"]),
            cell(&breaker["state"]),
            millis(&breaker["sinceMs"]),
            millis(&breaker["retryInMs"]),
            format!("{failed}/{all}"),
            cell(&breaker["consecutiveFailures"]),
            cell(&breaker["openedCount"]),
            cell(&breaker["lastCause"]),
        ]
    };
    let rows: Vec<Vec<String>> = items(&value["breakers"]).iter().map(row).collect();
    let headings = [
        "SERVICE",
        "STATE",
        "SINCE",
        "RETRY IN",
        "FAILED",
        "IN A ROW",
        "OPENED",
        "LAST CAUSE",
    ];
    table(&headings, &rows)
}

/// A number of milliseconds as people read it.
fn millis(value: &Value) -> String {
    value.as_u64().map_or("-".to_owned(), |millis| {
        clock::short(Duration::from_millis(millis))
    })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_ejected_endpoint_and_an_empty_service_are_seen() {
        let value = json!({"services": [
            {"service": "shop/a", "endpoints": [{"address": "127.0.0.1:1", "ejectedForMs": 1500}]},
            {"service": "shop/b", "endpoints": []},
        ]});
        let text = endpoints_table(&value);
        assert!(text.contains("ejected for 1.5s"), "{text}");
        assert!(text.contains("shop/b   none"), "{text}");
    }
}
