//! `outrigger rollout`: which configs were pushed, who runs the newest, and the way back.

use std::fmt::Write as _;
use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use crate::client::{CONTROL_PLANE, Client};
use crate::clock;
use crate::output::{Failure, Format, cell, items, print_as, table};

#[derive(Debug, Subcommand)]
pub(crate) enum Rollout {
    /// Show the newest config and how many sidecars run it
    Status(Address),
    /// Show the last configs, what each changed, when and why
    History(Address),
    /// Push an earlier config again, until the files change
    Rollback {
        /// The version to go back to [default: the one before the newest]
        version: Option<String>,
        #[command(flatten)]
        address: Address,
    },
}

/// Whom to ask.
#[derive(Debug, Args)]
pub(crate) struct Address {
    /// The control plane
    #[arg(long, value_name = "URL", env = "OUTRIGGER_CONTROL_PLANE", default_value = CONTROL_PLANE)]
    control_plane: String,
}

pub(crate) async fn run(command: Rollout, format: Format) -> Result<(), Failure> {
    let client = |address: &Address| Client::control_plane(&address.control_plane);
    match command {
        Rollout::Status(address) => {
            let value = client(&address)?.get("/v1/rollouts").await?;
            print_as(format, &value, status);
        }
        Rollout::History(address) => {
            let value = client(&address)?.get("/v1/rollouts").await?;
            print_as(format, &value, |value| history(value, clock::wall_millis()));
        }
        Rollout::Rollback { version, address } => {
            let body = json!({"to": version});
            let value = client(&address)?
                .post("/v1/rollouts/rollback", &body)
                .await?;
            print_as(format, &value, |value| {
                format!(
                    "back at {}, until the files change\n",
                    cell(&value["version"])
                )
            });
        }
    }
    Ok(())
}

fn status(value: &Value) -> String {
    let proxies = &value["proxies"];
    let mut text = format!(
        "{}: {} of {} sidecars run it, {} refused it\n",
        cell(&value["version"]),
        cell(&proxies["synced"]),
        cell(&proxies["connected"]),
        cell(&proxies["refused"])
    );
    if let Some(withdrawn) = value["withdrawn"].as_str() {
        let _ = writeln!(text, "rolled back: the files say {withdrawn}");
    }
    text
}

fn history(value: &Value, now: u64) -> String {
    let rows: Vec<Vec<String>> = items(&value["versions"])
        .iter()
        .map(|version| {
            let age = now.saturating_sub(version["at"].as_u64().unwrap_or(now));
            let mut what = Vec::new();
            for (sign, key) in [("+", "added"), ("~", "changed"), ("-", "removed")] {
                let names = items(&version[key]).iter();
                what.extend(names.map(|name| format!("{sign}{}", cell(name))));
            }
            vec![
                cell(&version["version"]),
                clock::short(Duration::from_millis(age)),
                cell(&version["by"]),
                what.join(" "),
            ]
        })
        .collect();
    table(&["VERSION", "AGE", "BY", "CHANGES"], &rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_and_its_changes_are_seen() {
        let value = json!({
            "version": "b", "withdrawn": "c",
            "proxies": {"connected": 3, "synced": 2, "refused": 1},
            "versions": [
                {"version": "b", "at": 1000, "by": "rollback", "added": [],
                 "changed": ["MeshRoute/shop/orders"], "removed": ["Queue/shop/a"]},
            ],
        });
        let text = status(&value);
        assert!(
            text.contains("b: 2 of 3 sidecars run it, 1 refused it"),
            "{text}"
        );
        assert!(text.contains("the files say c"), "{text}");
        let text = history(&value, 61_000);
        assert!(
            text.contains("~MeshRoute/shop/orders -Queue/shop/a"),
            "{text}"
        );
        assert!(text.contains("rollback"), "{text}");
    }
}
