//! `outrigger queue export` and `queue import`: messages as lines of JSON, by a sidecar's admin API
//! or, where none runs, from its state directory.
//!
//! A line is a message that is pending or a dead letter. It keeps its id, so importing it twice
//! changes nothing the second time.

use std::io::{BufRead, BufReader, Write as _};
use std::path::{Path, PathBuf};

use clap::Args;
use outrigger_proxy::queueing::export::{At, Line, Offline};
use serde_json::{Value, json};

use crate::client::{Admin, Client, encode};
use crate::output::{Failure, Format, cell, items, print_as};

/// What one import asks of the admin API at a time, in bytes of lines.
const BATCH_BYTES: usize = 4 << 20;

/// Where the messages are.
#[derive(Debug, Args)]
pub(crate) struct Place {
    /// The state directory of a sidecar that does not run, instead of the admin API of one that does
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    #[command(flatten)]
    admin: Admin,
}

/// A store that is asked by either way.
enum Store {
    Running(Client),
    Stopped(Offline),
}

impl Store {
    async fn at(place: &Place) -> Result<Self, Failure> {
        match &place.state_dir {
            None => place.admin.client().map(Self::Running),
            Some(dir) => {
                let opened = Offline::open(dir).await;
                let failed = |why| Failure::unusable(format!("{}: {why}", dir.display()));
                opened.map(Self::Stopped).map_err(failed)
            }
        }
    }

    async fn queues(&self) -> Result<Vec<String>, Failure> {
        match self {
            Self::Running(client) => {
                let queues = client.get("/queues").await?;
                let names = items(&queues["queues"]).iter();
                Ok(names.map(|queue| cell(&queue["name"])).collect())
            }
            Self::Stopped(store) => store.queues().await.map_err(unusable),
        }
    }

    /// Writes the lines of a queue; how many.
    async fn export(&self, queue: &str, out: &mut impl std::io::Write) -> Result<u64, Failure> {
        let mut count = 0;
        let mut write = |line: String| {
            count += 1;
            writeln!(out, "{line}").map_err(|error| Failure::unusable(format!("write: {error}")))
        };
        match self {
            Self::Running(client) => {
                let mut at: Option<String> = None;
                loop {
                    let mut path = format!("/queues/export?queue={}", encode(queue));
                    if let Some(at) = &at {
                        path = format!("{path}&at={}", encode(at));
                    }
                    let page = client.get(&path).await?;
                    for line in items(&page["messages"]) {
                        write(line.to_string())?;
                    }
                    match page["next"].as_str() {
                        Some(next) => at = Some(next.to_owned()),
                        None => break,
                    }
                }
            }
            Self::Stopped(store) => {
                let mut at = Some(At::default());
                while let Some(from) = at {
                    let (lines, next) = store.page(queue, from).await.map_err(unusable)?;
                    for line in lines {
                        write(json!(line).to_string())?;
                    }
                    at = next;
                }
            }
        }
        Ok(count)
    }

    /// Takes lines in; how many were new, and how many known.
    async fn import(&self, lines: Vec<Line>) -> Result<(u64, u64), Failure> {
        match self {
            Self::Running(client) => {
                let body = json!({"messages": lines});
                let answer = client.post("/queues/import", &body).await?;
                let count = |key: &str| answer[key].as_u64().unwrap_or(0);
                Ok((count("imported"), count("known")))
            }
            Self::Stopped(store) => {
                let all: Result<Vec<_>, _> = lines.into_iter().map(Line::into_exported).collect();
                let all = all.map_err(Failure::errors)?;
                let (imported, known) = store.restore(all).await.map_err(unusable)?;
                Ok((imported as u64, known as u64))
            }
        }
    }

    async fn close(self) {
        if let Self::Stopped(store) = self {
            store.close().await;
        }
    }
}

fn unusable(error: impl std::fmt::Display) -> Failure {
    Failure::unusable(error.to_string())
}

/// Writes messages to standard output.
pub(crate) async fn export(queue: Option<String>, place: &Place) -> Result<(), Failure> {
    let store = Store::at(place).await?;
    let done = write_all(&store, queue).await;
    store.close().await;
    let count = done?;
    eprintln!("{count} messages");
    Ok(())
}

async fn write_all(store: &Store, queue: Option<String>) -> Result<u64, Failure> {
    let queues = match queue {
        Some(queue) => vec![queue],
        None => store.queues().await?,
    };
    let mut out = std::io::BufWriter::new(std::io::stdout());
    let mut count = 0;
    for queue in queues {
        count += store.export(&queue, &mut out).await?;
    }
    let flushed = out.flush();
    flushed.map_err(|error| Failure::unusable(format!("write: {error}")))?;
    Ok(count)
}

/// Takes messages in from a file; `-` is standard input.
pub(crate) async fn import(file: &Path, place: &Place, format: Format) -> Result<(), Failure> {
    let store = Store::at(place).await?;
    let done = read_all(&store, file).await;
    store.close().await;
    let (imported, known) = done?;
    let value = json!({"imported": imported, "known": known});
    print_as(format, &value, |value: &Value| {
        let get = |key: &str| cell(&value[key]);
        format!(
            "{} imported, {} known already\n",
            get("imported"),
            get("known")
        )
    });
    Ok(())
}

async fn read_all(store: &Store, file: &Path) -> Result<(u64, u64), Failure> {
    let failed = |error: std::io::Error| Failure::unusable(format!("{}: {error}", file.display()));
    let input: Box<dyn BufRead> = if file == Path::new("-") {
        Box::new(std::io::stdin().lock())
    } else {
        Box::new(BufReader::new(std::fs::File::open(file).map_err(failed)?))
    };
    let (mut imported, mut known) = (0, 0);
    let (mut batch, mut bytes) = (Vec::new(), 0);
    for (n, text) in input.lines().enumerate() {
        let text = text.map_err(failed)?;
        if text.trim().is_empty() {
            continue;
        }
        let line = serde_json::from_str::<Line>(&text).map_err(|error| {
            let done = imported + known;
            let file = file.display();
            Failure::errors(format!(
                "{file}:{}: {error}; {done} before it are in",
                n + 1
            ))
        })?;
        bytes += text.len();
        batch.push(line);
        if bytes > BATCH_BYTES {
            let (new, old) = store.import(std::mem::take(&mut batch)).await?;
            (imported, known, bytes) = (imported + new, known + old, 0);
        }
    }
    if !batch.is_empty() {
        let (new, old) = store.import(batch).await?;
        (imported, known) = (imported + new, known + old);
    }
    Ok((imported, known))
}
