//! `outrigger queue` and `outrigger dlq`: queues, messages and dead letters of one sidecar.
//!
//! A dead letter is shown with everything needed to judge it, and replayed by id or by what is
//! common to many.

use std::fmt::Write as _;

use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};

use crate::client::{Admin, encode};
use crate::output::{Failure, Format, cell, items, print, print_as, table};
use crate::transfer::{self, Place};

/// What to do with queues.
#[derive(Debug, Subcommand)]
pub(crate) enum Queue {
    /// List the queues with their counts
    Ls(Admin),
    /// Show one queue: its targets and its messages
    Show {
        /// The queue, namespace/name, or name where only one fits
        queue: String,
        /// Only messages in this state, such as waiting or succeeded
        #[arg(long)]
        state: Option<String>,
        /// At most so many messages
        #[arg(long, default_value_t = 50)]
        limit: u32,
        #[command(flatten)]
        admin: Admin,
    },
    /// Write messages that are pending or dead to standard output, a line of JSON each, whole
    ///
    /// With the credentials that are stored in them: keep the file as you keep those. What is
    /// delivered while a sidecar is asked is in the file all the same.
    Export {
        /// Only of this queue; default: all
        queue: Option<String>,
        #[command(flatten)]
        place: Place,
    },
    /// Take lines of an export in: ids are kept, and what is known already changes nothing
    Import {
        /// A file of lines; - is standard input
        file: std::path::PathBuf,
        #[command(flatten)]
        place: Place,
    },
}

/// What to do with dead letters.
#[derive(Debug, Subcommand)]
pub(crate) enum Dlq {
    /// List dead letters
    Ls {
        /// Only of this queue
        #[arg(long)]
        queue: Option<String>,
        #[command(flatten)]
        filter: Filter,
        /// One line for all that failed alike
        #[arg(long)]
        group: bool,
        /// At most so many
        #[arg(long, default_value_t = 50)]
        limit: u32,
        #[command(flatten)]
        admin: Admin,
    },
    /// Show one dead letter whole: every attempt, the last answer, the request
    Show {
        /// The message's id
        id: String,
        #[command(flatten)]
        admin: Admin,
    },
    /// Deliver dead letters again, with the id and the idempotency key they had
    Replay {
        #[command(flatten)]
        choice: Choice,
        /// To this service instead
        #[arg(long, value_name = "SERVICE")]
        to: Option<String>,
        /// At most so many in a second, such as 50/s
        #[arg(long, value_name = "N/s", value_parser = rate)]
        rate: Option<std::num::NonZeroU32>,
    },
    /// Delete dead letters for good
    Purge {
        #[command(flatten)]
        choice: Choice,
    },
    /// List who replayed and deleted what, the latest first
    Audit {
        /// At most so many
        #[arg(long, default_value_t = 50)]
        limit: u32,
        #[command(flatten)]
        admin: Admin,
    },
}

/// Conditions on dead letters; all that are given must hold.
#[derive(Debug, Default, Args)]
pub(crate) struct Filter {
    /// With this reason, such as permanent_status or max_age
    #[arg(long)]
    reason: Option<String>,
    /// For this target service
    #[arg(long)]
    target: Option<String>,
    /// Of this route
    #[arg(long)]
    route: Option<String>,
    /// Dead for no longer than this, such as 1h
    #[arg(long, value_name = "DURATION")]
    since: Option<String>,
    /// That failed alike: a fingerprint of dlq ls --group
    #[arg(long)]
    fingerprint: Option<String>,
}

impl Filter {
    fn pairs(&self) -> impl Iterator<Item = (&'static str, &String)> {
        let pairs = [
            ("reason", &self.reason),
            ("target", &self.target),
            ("route", &self.route),
            ("since", &self.since),
            ("fingerprint", &self.fingerprint),
        ];
        pairs
            .into_iter()
            .filter_map(|(name, value)| Some((name, value.as_ref()?)))
    }
}

/// Which dead letters.
#[derive(Debug, Args)]
pub(crate) struct Choice {
    /// These
    #[arg(value_name = "ID")]
    ids: Vec<String>,
    /// Or those of this queue that pass the filters
    #[arg(long, conflicts_with = "ids", required_unless_present = "ids")]
    queue: Option<String>,
    #[command(flatten)]
    filter: Filter,
    /// At most so many, the oldest first
    #[arg(long, requires = "queue")]
    max: Option<u64>,
    /// Only say what would be done
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    admin: Admin,
}

impl Choice {
    /// The order that the admin API takes.
    fn order(&self) -> Result<Map<String, Value>, Failure> {
        let filter: Map<String, Value> = self
            .filter
            .pairs()
            .map(|(name, value)| (name.to_owned(), json!(value)))
            .collect();
        let mut order = Map::new();
        match &self.queue {
            Some(queue) => {
                order.insert("queue".to_owned(), json!(queue));
                order.insert("filter".to_owned(), Value::Object(filter));
            }
            None if !filter.is_empty() => {
                return Err(Failure::errors("filters go with --queue, not with ids"));
            }
            None => {
                order.insert("ids".to_owned(), json!(self.ids));
            }
        }
        if let Some(max) = self.max {
            order.insert("max".to_owned(), json!(max));
        }
        if let Some(user) = std::env::var("USER").ok().filter(|user| !user.is_empty()) {
            order.insert("by".to_owned(), json!(user));
        }
        if self.dry_run {
            order.insert("dryRun".to_owned(), json!(true));
        }
        Ok(order)
    }
}

pub(crate) async fn queue(command: Queue, format: Format) -> Result<(), Failure> {
    match command {
        Queue::Ls(admin) => {
            let value = admin.client()?.get("/queues").await?;
            let store = &value["store"];
            if store["health"] == "failed" {
                if format == Format::Table {
                    print(&queues_table(&value));
                }
                let message = format!("the queue store failed: {}", cell(&store["reason"]));
                return Err(Failure::errors(message).with(value));
            }
            print_as(format, &value, queues_table);
        }
        Queue::Show {
            queue,
            state,
            limit,
            admin,
        } => {
            let client = admin.client()?;
            let queues = client.get("/queues").await?;
            let view = find(&queues, &queue)?.clone();
            let name = view["name"].as_str().unwrap_or(&queue);
            let mut path = format!("/messages?queue={}&limit={limit}", encode(name));
            if let Some(state) = &state {
                let _ = write!(path, "&state={}", encode(state));
            }
            let messages = client.get(&path).await?;
            let whole = json!({
                "queue": view, "messages": messages["messages"], "next": messages["next"],
            });
            print_as(format, &whole, queue_view);
        }
        Queue::Export { queue, place } => transfer::export(queue, &place).await?,
        Queue::Import { file, place } => transfer::import(&file, &place, format).await?,
    }
    Ok(())
}

/// The queue that is called so, or is in some namespace.
fn find<'a>(queues: &'a Value, asked: &str) -> Result<&'a Value, Failure> {
    let named = |queue: &&Value| queue["name"] == asked;
    let short = |queue: &&Value| {
        let name = queue["name"]
            .as_str()
            .and_then(|name| name.rsplit_once('/'));
        name.is_some_and(|(_, name)| name == asked)
    };
    let list = items(&queues["queues"]);
    if let Some(found) = list.iter().find(named) {
        return Ok(found);
    }
    let mut fitting = list.iter().filter(short);
    match (fitting.next(), fitting.next()) {
        (Some(found), None) => Ok(found),
        (Some(_), Some(_)) => Err(Failure::errors(format!(
            "several queues are called {asked}; write namespace/name"
        ))),
        _ => {
            let known: Vec<String> = list.iter().map(|queue| cell(&queue["name"])).collect();
            let known = if known.is_empty() {
                "none".to_owned()
            } else {
                known.join(", ")
            };
            Err(Failure::errors(format!(
                "there is no queue {asked}; known: {known}"
            )))
        }
    }
}

fn queues_table(value: &Value) -> String {
    let row = |queue: &Value| {
        let get = |key: &str| cell(&queue[key]);
        vec![
            get("name"),
            get("pending"),
            get("ready"),
            get("delayed"),
            get("waiting"),
            get("inFlight"),
            get("dead"),
            get("oldestSeconds"),
            get("enqueuedTotal"),
            get("succeededTotal"),
            get("drift"),
        ]
    };
    let rows: Vec<Vec<String>> = items(&value["queues"]).iter().map(row).collect();
    let headings = [
        "QUEUE",
        "PENDING",
        "READY",
        "DELAYED",
        "WAITING",
        "IN FLIGHT",
        "DEAD",
        "OLDEST S",
        "ENQUEUED",
        "SUCCEEDED",
        "DRIFT",
    ];
    let mut text = table(&headings, &rows);
    let store = &value["store"];
    if !store["reason"].is_null() {
        let _ = writeln!(
            text,
            "\nstore {}: {}",
            cell(&store["health"]),
            cell(&store["reason"])
        );
    }
    text
}

fn queue_view(whole: &Value) -> String {
    let queue = &whole["queue"];
    let mut text = queues_table(&json!({"queues": [queue]}));
    let targets: Vec<Vec<String>> = items(&queue["targets"])
        .iter()
        .map(|target| {
            vec![
                cell(&target["service"]),
                cell(&target["state"]),
                cell(&target["reason"]),
                cell(&target["maxInFlight"]),
            ]
        })
        .collect();
    let _ = write!(
        text,
        "\n{}",
        table(&["TARGET", "DELIVERY", "WHY", "MAX IN FLIGHT"], &targets)
    );
    let messages: Vec<Vec<String>> = items(&whole["messages"])
        .iter()
        .map(|message| {
            vec![
                cell(&message["id"]),
                cell(&message["status"]),
                cell(&message["target"]),
                cell(&message["attemptsSpent"]),
                cell(&message["nextAttemptAt"]),
                cell(&message["createdAt"]),
                cell(&message["reason"]),
            ]
        })
        .collect();
    let headings = [
        "MESSAGE",
        "STATUS",
        "TARGET",
        "ATTEMPTS",
        "NEXT ATTEMPT",
        "CREATED",
        "REASON",
    ];
    let _ = write!(text, "\n{}", table(&headings, &messages));
    text.push_str(&more(&whole["next"]));
    text
}

fn more(next: &Value) -> String {
    match next {
        Value::Null => String::new(),
        _ => "there are more; see --limit\n".to_owned(),
    }
}

pub(crate) async fn dlq(command: Dlq, format: Format) -> Result<(), Failure> {
    match command {
        Dlq::Ls {
            queue,
            filter,
            group,
            limit,
            admin,
        } => {
            let list = if group { "/dead/groups" } else { "/dead" };
            let mut path = format!("{list}?limit={limit}");
            let queue = queue.iter().map(|queue| ("queue", queue));
            for (name, value) in queue.chain(filter.pairs()) {
                let _ = write!(path, "&{name}={}", encode(value));
            }
            let value = admin.client()?.get(&path).await?;
            let show = if group { groups_table } else { dead_table };
            print_as(format, &value, show);
        }
        Dlq::Audit { limit, admin } => {
            let path = format!("/dead/audit?limit={limit}");
            let value = admin.client()?.get(&path).await?;
            print_as(format, &value, audit_table);
        }
        Dlq::Show { id, admin } => {
            let value = admin
                .client()?
                .get(&format!("/dead/{}", encode(&id)))
                .await?;
            print_as(format, &value, letter);
        }
        Dlq::Replay { choice, to, rate } => {
            let mut order = choice.order()?;
            if let Some(to) = to {
                order.insert("to".to_owned(), json!(to));
            }
            if let Some(rate) = rate {
                order.insert("requestsPerSecond".to_owned(), json!(rate));
            }
            let client = choice.admin.client()?;
            let value = client.post("/dead/replay", &Value::Object(order)).await?;
            print_as(format, &value, replayed);
        }
        Dlq::Purge { choice } => {
            let client = choice.admin.client()?;
            let value = client
                .post("/dead/purge", &Value::Object(choice.order()?))
                .await?;
            print_as(format, &value, |value| {
                let verb = if value["dryRun"] == true {
                    "would be purged"
                } else {
                    "purged"
                };
                format!("{} {verb}\n", cell(&value["purged"]))
            });
        }
    }
    Ok(())
}

/// `50` or `50/s`.
fn rate(text: &str) -> Result<std::num::NonZeroU32, String> {
    let number = text.strip_suffix("/s").unwrap_or(text);
    number
        .parse()
        .map_err(|_| "expected a number of messages a second, such as 50/s".to_owned())
}

fn groups_table(value: &Value) -> String {
    let keys = [
        "fingerprint",
        "count",
        "target",
        "reason",
        "lastStatus",
        "lastDiedAt",
        "example",
    ];
    let row = |group: &Value| {
        let mut row = keys.map(|key| cell(&group[key])).to_vec();
        let text = group["lastText"].as_str().unwrap_or_default();
        let first: String = text
            .lines()
            .next()
            .unwrap_or_default()
            .chars()
            .take(60)
            .collect();
        row.push(first.replace(char::is_control, "?"));
        row
    };
    let rows: Vec<Vec<String>> = items(&value["groups"]).iter().map(row).collect();
    let headings = [
        "FINGERPRINT",
        "COUNT",
        "TARGET",
        "REASON",
        "LAST STATUS",
        "LATEST",
        "EXAMPLE",
        "LAST ANSWER",
    ];
    table(&headings, &rows)
}

fn audit_table(value: &Value) -> String {
    let row = |entry: &Value| {
        let count = entry["ids"].as_array().map(|ids| ids.len().to_string());
        let mut row = ["at", "by", "action", "queue", "to"]
            .map(|key| cell(&entry[key]))
            .to_vec();
        row.push(count.unwrap_or_default());
        row.push(cell(&entry["filter"]));
        row
    };
    let rows: Vec<Vec<String>> = items(&value["audit"]).iter().map(row).collect();
    table(
        &["AT", "BY", "ACTION", "QUEUE", "TO", "MESSAGES", "FILTER"],
        &rows,
    )
}

fn dead_table(value: &Value) -> String {
    let row = |letter: &Value| {
        [
            "id",
            "queue",
            "target",
            "reason",
            "attemptsSpent",
            "lastStatus",
            "diedAt",
            "replays",
        ]
        .map(|key| cell(&letter[key]))
        .to_vec()
    };
    let rows: Vec<Vec<String>> = items(&value["dead"]).iter().map(row).collect();
    let headings = [
        "MESSAGE",
        "QUEUE",
        "TARGET",
        "REASON",
        "ATTEMPTS",
        "LAST STATUS",
        "DIED",
        "REPLAYS",
    ];
    format!("{}{}", table(&headings, &rows), more(&value["next"]))
}

fn letter(value: &Value) -> String {
    let mut text = String::new();
    let facts = [
        ("message", "id"),
        ("queue", "queue"),
        ("target", "target"),
        ("route", "route"),
        ("caller", "caller"),
        ("reason", "reason"),
        ("created", "createdAt"),
        ("died", "diedAt"),
        ("replays", "replays"),
        ("trace", "traceId"),
    ];
    for (name, key) in facts {
        let _ = writeln!(text, "{name:10}{}", cell(&value[key]));
    }
    let attempts: Vec<Vec<String>> = items(&value["status"]["attempts"])
        .iter()
        .map(|attempt| {
            let mut row = ["n", "at", "endpoint", "status", "reason"]
                .map(|key| cell(&attempt[key]))
                .to_vec();
            row.push(format!("{}ms", cell(&attempt["ms"])));
            row
        })
        .collect();
    let headings = ["ATTEMPT", "AT", "ENDPOINT", "STATUS", "REASON", "TOOK"];
    let _ = write!(text, "\n{}", table(&headings, &attempts));
    let _ = writeln!(text, "\nlast answer: {}", cell(&value["lastStatus"]));
    text.push_str(&body(&value["lastBody"]));
    let request = &value["request"];
    if request.is_null() {
        text.push_str("\nthe request is not kept\n");
        return text;
    }
    let (method, path) = (cell(&request["method"]), cell(&request["path"]));
    let _ = writeln!(
        text,
        "\n{method} {path}\nhost: {}",
        cell(&request["authority"])
    );
    for header in items(&request["headers"]) {
        let _ = writeln!(
            text,
            "{}: {}",
            cell(&header["name"]),
            cell(&header["value"])
        );
    }
    let _ = write!(text, "\n{}", body(&request["body"]));
    let id = cell(&value["id"]);
    let _ = writeln!(text, "\nonce the cause is gone: outrigger dlq replay {id}");
    text
}

/// A body for a terminal: what would move its cursor is shown as `?`.
fn body(view: &Value) -> String {
    let Some(data) = view["data"].as_str().filter(|data| !data.is_empty()) else {
        return "(no body)\n".to_owned();
    };
    let note = if view["encoding"] == "base64" {
        "(base64) "
    } else {
        ""
    };
    let safe = |c: char| {
        if c.is_control() && c != '\n' && c != '\t' {
            '?'
        } else {
            c
        }
    };
    let shown: String = data.chars().map(safe).collect();
    format!("{note}{}\n", shown.trim_end_matches('\n'))
}

fn replayed(value: &Value) -> String {
    let dry = value["dryRun"] == true;
    let mut text = String::new();
    for id in items(&value["replayed"]) {
        let verb = if dry { "would be replayed" } else { "replayed" };
        let _ = writeln!(text, "{} {verb}", cell(id));
    }
    for id in items(&value["skipped"]) {
        let _ = writeln!(text, "{} skipped: it is no dead letter", cell(id));
    }
    if text.is_empty() {
        text.push_str("no dead letter fits\n");
    }
    text
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(subcommand)]
        command: Dlq,
    }

    fn order(words: &[&str]) -> Option<Value> {
        let words = ["dlq", "replay"].iter().chain(words);
        match Cli::try_parse_from(words).ok()?.command {
            Dlq::Replay { choice, .. } => choice.order().ok().map(|mut order| {
                order.remove("by"); // whoever runs the test
                Value::Object(order)
            }),
            _ => None,
        }
    }

    #[test]
    fn a_replay_is_by_ids_or_by_queue() {
        assert_eq!(order(&["a", "b"]), Some(json!({"ids": ["a", "b"]})));
        let expected = json!({
            "queue": "mail", "filter": {"reason": "http_400"}, "max": 5, "dryRun": true,
        });
        let words = [
            "--queue",
            "mail",
            "--reason",
            "http_400",
            "--max",
            "5",
            "--dry-run",
        ];
        assert_eq!(order(&words), Some(expected));
        assert_eq!(order(&[]), None);
        assert_eq!(order(&["a", "--queue", "mail"]), None);
        assert_eq!(order(&["a", "--reason", "http_400"]), None);
    }

    #[test]
    fn queues_are_found_by_their_short_name() {
        let queues =
            json!({"queues": [{"name": "shop/mail"}, {"name": "ops/mail"}, {"name": "shop/a"}]});
        let found = |asked| {
            find(&queues, asked)
                .ok()
                .and_then(|queue| queue["name"].as_str())
        };
        assert_eq!(found("a"), Some("shop/a"));
        assert_eq!(found("ops/mail"), Some("ops/mail"));
        assert_eq!(found("mail"), None);
        assert_eq!(found("x"), None);
    }
}
