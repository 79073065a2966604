//! Dead letters that failed alike: one line for what may be thousands.
//!
//! Two failed alike when reason, target, route, last answer and its text agree, numbers in the text
//! aside. Nothing is stored: the fingerprint is made of what a dead letter keeps. On the message's
//! life.

use std::collections::BTreeMap;
use std::sync::Arc;

use outrigger_core::time::UnixMillis;
use outrigger_queue::{DeadFilter, DeadLetter, Inspect, MessageId, PageRequest};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

use crate::app::Shared;
use crate::queueing::letters::Filter;
use crate::queueing::lookup::{MAX_PAGE, Refused, chosen, facet, look, refused};
use crate::queueing::text;

/// Of the last answer's text this much counts and is shown, in bytes.
const TEXT: usize = 200;

/// Dead letters that are looked at for one answer; the rest is told as `more`.
const MAX_LOOKED_AT: usize = 100_000;

/// What dead letters that failed alike have in common, 12 hexadecimal digits.
pub(super) fn fingerprint(letter: &DeadLetter) -> String {
    let status = &letter.status;
    let last = status.attempts.last();
    let last_status = letter.last_status.map(|status| status.to_string());
    let parts = [
        letter.reason.as_str(),
        &status.target,
        &status.route,
        last_status.as_deref().unwrap_or_default(),
        last.and_then(|attempt| attempt.reason.as_deref())
            .unwrap_or_default(),
        &without_numbers(&excerpt(letter)),
    ];
    let mut hash = Sha256::new();
    for part in parts {
        hash.update((part.len() as u64).to_be_bytes());
        hash.update(part);
    }
    text::hex(&hash.finalize()[..6])
}

fn excerpt(letter: &DeadLetter) -> String {
    let start = &letter.last_body_excerpt[..letter.last_body_excerpt.len().min(TEXT)];
    String::from_utf8_lossy(start).into_owned()
}

/// Ids, times and counts differ between failures of one cause.
fn without_numbers(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '0'..='9' if out.ends_with('#') => {}
            '0'..='9' => out.push('#'),
            other => out.push(other),
        }
    }
    out
}

/// Calls `each` for the dead letters of a queue until it says to stop; how many were looked at.
///
/// # Errors
/// 503 for the store.
pub(super) async fn scan(
    inspect: &dyn Inspect,
    queue: &str,
    filter: &DeadFilter,
    mut each: impl FnMut(&DeadLetter) -> bool,
) -> Result<(), Refused> {
    let mut page = PageRequest {
        after: None,
        limit: MAX_PAGE,
    };
    loop {
        let found = look(inspect.dead(queue, filter.clone(), page)).await;
        let found = found.map_err(refused)?;
        if !found.items.iter().all(&mut each) {
            return Ok(());
        }
        match found.next {
            Some(after) => page.after = Some(after),
            None => return Ok(()),
        }
    }
}

/// The ids of at most `max` dead letters with a fingerprint.
///
/// # Errors
/// 503 for the store.
pub(super) async fn alike(
    inspect: &dyn Inspect,
    queue: &str,
    filter: &DeadFilter,
    wanted: &str,
    max: usize,
) -> Result<Vec<MessageId>, Refused> {
    let mut ids = Vec::new();
    scan(inspect, queue, filter, |letter| {
        if ids.len() < max && fingerprint(letter) == wanted {
            ids.push(letter.status.id);
        }
        ids.len() < max
    })
    .await?;
    Ok(ids)
}

struct Group {
    count: u64,
    first: UnixMillis,
    last: UnixMillis,
    example: DeadLetter,
}

/// Dead letters by what they failed of, the most first; parameters as for the list:
/// `{"groups":[{"fingerprint","count","reason","target","route","lastStatus","lastText",
/// "firstDiedAt","lastDiedAt","example"}],"more"}`.
///
/// # Errors
/// As [`messages`](super::inspect::messages).
pub async fn groups(
    shared: &Arc<Shared>,
    get: &dyn Fn(&str) -> Option<String>,
) -> Result<Value, Refused> {
    let snapshot = shared.store.load();
    let filter = Filter::of(get).resolve(&snapshot)?;
    let Some(backend) = shared.queues.backend() else {
        return Ok(json!({"groups": [], "more": false}));
    };
    let inspect = facet(&*backend)?;
    let mut groups: BTreeMap<String, Group> = BTreeMap::new();
    let mut looked_at = 0;
    for queue in chosen(&snapshot, &*backend, get("queue")).await? {
        scan(inspect, &queue, &filter, |letter| {
            looked_at += 1;
            if looked_at > MAX_LOOKED_AT {
                return false;
            }
            let group = groups.entry(fingerprint(letter)).or_insert_with(|| Group {
                count: 0,
                first: letter.died_at,
                last: letter.died_at,
                example: letter.clone(),
            });
            group.count += 1;
            group.first = group.first.min(letter.died_at);
            group.last = group.last.max(letter.died_at);
            true
        })
        .await?;
    }
    let mut list: Vec<(String, Group)> = groups.into_iter().collect();
    list.sort_by_key(|(_, group)| std::cmp::Reverse(group.count));
    let list: Vec<Value> = list.iter().map(|(name, group)| view(name, group)).collect();
    Ok(json!({"groups": list, "more": looked_at > MAX_LOOKED_AT}))
}

fn view(fingerprint: &str, group: &Group) -> Value {
    let example = &group.example;
    json!({
        "fingerprint": fingerprint,
        "count": group.count,
        "reason": example.reason,
        "queue": example.status.queue,
        "target": example.status.target,
        "route": example.status.route,
        "lastStatus": example.last_status,
        "lastText": excerpt(example),
        "firstDiedAt": text::rfc3339(group.first),
        "lastDiedAt": text::rfc3339(group.last),
        "example": example.status.id.to_string(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_in_a_text_do_not_tell_failures_apart() {
        let one = without_numbers("order 4711 of 2026-11-25 is unknown");
        assert_eq!(one, without_numbers("order 8 of 1999-1-2 is unknown"));
        assert_ne!(one, without_numbers("item 4711 of 2026-11-25 is unknown"));
    }
}
