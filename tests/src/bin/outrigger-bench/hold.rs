//! Many connections, in phases: `open`, `used` (one answer each), `in flight` (a slow request on
//! each), `answered`, and the end. Each phase is announced by a line on standard output and left by
//! a line on standard input, so that the driver can look at the proxy in between.

use std::io;

use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::{Target, announce, http1};

pub(crate) async fn run(
    target: &Target,
    connections: usize,
    milliseconds: u64,
) -> io::Result<Value> {
    let quick = http1::request(target, &target.path, false);
    let slow = http1::request(target, &format!("/slow/{milliseconds}"), false);
    let mut open = Vec::with_capacity(connections);
    for _ in 0..connections {
        open.push(http1::Connection::open(target).await?);
    }
    announce("open")?;
    for connection in &mut open {
        connection.exchange(&quick).await?;
    }
    announce("used")?;
    for connection in &mut open {
        connection.send(&slow).await?;
    }
    announce("in flight")?;
    let mut answers = JoinSet::new();
    for mut connection in open {
        answers.spawn_local(async move {
            let result = connection.receive().await;
            (connection, result)
        });
    }
    let (mut succeeded, mut error) = (0_usize, None);
    let mut held = Vec::with_capacity(connections);
    while let Some(joined) = answers.join_next().await {
        let (connection, result) = joined.map_err(io::Error::other)?;
        match result {
            Ok(()) => succeeded += 1,
            Err(found) => error = Some(found.to_string()),
        }
        held.push(connection);
    }
    announce("answered")?;
    drop(held);
    Ok(json!({
        "requests": connections,
        "succeeded": succeeded,
        "failed": connections - succeeded,
        "error": error,
    }))
}
