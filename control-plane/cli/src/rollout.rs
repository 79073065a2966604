//! `outrigger rollout`: which configs were pushed, who runs the newest, and the way back.

use std::fmt::Write as _;
use std::time::Duration;

use clap::{Args, Subcommand};
use serde_json::{Value, json};

use crate::client::{CONTROL_PLANE, Client};
use crate::clock;
use crate::output::{Failure, Format, cell, items, print_as, table};
use crate::wait::Wait;

#[derive(Debug, Subcommand)]
pub(crate) enum Rollout {
    /// Show the newest config, how many sidecars run it, and the one on trial
    Status {
        #[command(flatten)]
        address: Address,
        #[command(flatten)]
        wait: Wait,
    },
    /// Show the last configs, what each changed, when and why
    History(Address),
    /// Push the config on trial to everybody now
    Promote {
        /// Only say which
        #[arg(long)]
        dry_run: bool,
        #[command(flatten)]
        address: Address,
    },
    /// Push an earlier config again, until the files change; ends the trial of another one
    Rollback {
        /// The version to go back to [default: the one before the newest]
        version: Option<String>,
        /// Why, for the history
        #[arg(long, value_name = "TEXT")]
        reason: Option<String>,
        /// Only say which
        #[arg(long)]
        dry_run: bool,
        #[command(flatten)]
        address: Address,
    },
}

/// Whom to ask.
#[derive(Debug, Args)]
pub(crate) struct Address {
    /// The control plane; a token of its api.tokens comes from OUTRIGGER_TOKEN
    #[arg(long, value_name = "URL", env = "OUTRIGGER_CONTROL_PLANE", default_value = CONTROL_PLANE)]
    control_plane: String,
}

pub(crate) async fn run(command: Rollout, format: Format) -> Result<(), Failure> {
    let client = |address: &Address| Client::control_plane(&address.control_plane);
    match command {
        Rollout::Status { address, wait } => {
            let client = client(&address)?;
            wait.wait(&client).await?;
            let value = client.get("/v1/rollouts").await?;
            print_as(format, &value, status);
        }
        Rollout::History(address) => {
            let value = client(&address)?.get("/v1/rollouts").await?;
            print_as(format, &value, |value| history(value, clock::wall_millis()));
        }
        Rollout::Promote { dry_run, address } => {
            let path = dry("/v1/rollouts/promote", dry_run);
            let value = client(&address)?.post(&path, &json!({})).await?;
            print_as(format, &value, |value| match dry_run {
                true => format!(
                    "{} would be pushed to all\n",
                    cell(&value["would"]["version"])
                ),
                false => format!("{} is pushed to all\n", cell(&value["version"])),
            });
        }
        Rollout::Rollback {
            version,
            reason,
            dry_run,
            address,
        } => {
            let mut body = json!({});
            for (key, given) in [("to", version), ("reason", reason)] {
                if let Some(given) = given {
                    body[key] = given.into();
                }
            }
            let path = dry("/v1/rollouts/rollback", dry_run);
            let value = client(&address)?.post(&path, &body).await?;
            print_as(format, &value, |value| match dry_run {
                true => format!("{} would be pushed\n", cell(&value["would"]["version"])),
                false => format!(
                    "back at {}, until the files change\n",
                    cell(&value["version"])
                ),
            });
        }
    }
    Ok(())
}

fn dry(path: &str, dry_run: bool) -> String {
    match dry_run {
        true => format!("{path}?dryRun=true"),
        false => path.to_owned(),
    }
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
    let (trial, stopped) = (&value["onTrial"], &value["stopped"]);
    if !trial.is_null() {
        let _ = writeln!(
            text,
            "on trial: {}, {} of {} canaries run it, {}s left",
            cell(&trial["version"]),
            cell(&trial["synced"]),
            items(&trial["canaries"]).len(),
            cell(&trial["secondsLeft"])
        );
    }
    if !stopped.is_null() {
        let _ = writeln!(
            text,
            "taken back: {}, {} {}",
            cell(&stopped["version"]),
            cell(&stopped["sidecar"]),
            cell(&stopped["reason"])
        );
    } else if let Some(withdrawn) = value["withdrawn"].as_str() {
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
                cell(&version["who"]),
                cell(&version["reason"]),
                what.join(" "),
            ]
        })
        .collect();
    table(&["VERSION", "AGE", "BY", "WHO", "REASON", "CHANGES"], &rows)
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
        let mut tried = value.clone();
        tried["onTrial"] = json!({
            "version": "d", "synced": 1, "canaries": ["shop/web-1", "shop/web-2"], "secondsLeft": 9,
        });
        tried["stopped"] = json!({"version": "c", "sidecar": "shop/web-1", "reason": "no"});
        let text = status(&tried);
        assert!(
            text.contains("d, 1 of 2 canaries run it, 9s left"),
            "{text}"
        );
        assert!(text.contains("taken back: c, shop/web-1 no"), "{text}");
        let text = history(&value, 61_000);
        assert!(
            text.contains("~MeshRoute/shop/orders -Queue/shop/a"),
            "{text}"
        );
        assert!(text.contains("rollback"), "{text}");
    }
}
