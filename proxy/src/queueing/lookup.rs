//! Finding things for the admin API: queues and services by name, pages over several queues, and
//! refusals for a person.
//!
//! Names may be given short (`orders`) where only one in the mesh fits. On the message's life.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use http::StatusCode;
use outrigger_queue::{Inspect, MessageId, Page, PageRequest, QueueBackend, StoreError};

use crate::app::Shared;
use crate::queueing::store;
use crate::snapshot::Snapshot;

/// Why the admin API refuses, for a person.
pub type Refused = (StatusCode, String);

/// Most items of one page.
pub(super) const MAX_PAGE: usize = 1_000;

/// How long a look into the store may take; a disk that hangs must not hang the admin API.
const LOOK: Duration = Duration::from_millis(250);

/// How long a change of many messages may take.
const CHANGE: Duration = Duration::from_secs(25);

/// What a look into the store finds, if it answers within 250 ms.
pub(super) async fn look<T>(
    asked: impl Future<Output = Result<T, StoreError>>,
) -> Result<T, StoreError> {
    let answer = tokio::time::timeout(LOOK, asked).await;
    answer.unwrap_or_else(|_| {
        let why = "no answer within 250 ms; its disk is slow or stuck";
        Err(StoreError::Unavailable(why.to_owned()))
    })
}

/// What a change of the store did, if it answers within 25 s.
pub(super) async fn change<T>(
    asked: impl Future<Output = Result<T, StoreError>>,
) -> Result<T, Refused> {
    let answer = tokio::time::timeout(CHANGE, asked).await;
    let answer = answer.unwrap_or_else(|_| {
        let why = "no answer within 25 s; whether it was done is unknown";
        Err(StoreError::Unavailable(why.to_owned()))
    });
    answer.map_err(refused)
}

/// The queues of the config, and those that ever held a message.
///
/// # Errors
/// The store did not answer.
pub(super) async fn names(
    snapshot: &Snapshot,
    backend: Option<&dyn QueueBackend>,
) -> Result<BTreeSet<String>, StoreError> {
    let mut names: BTreeSet<String> = snapshot.queues.keys().cloned().collect();
    if let Some(inspect) = backend.and_then(|backend| backend.inspect()) {
        names.extend(look(inspect.queues()).await?);
        names.remove(store::ANSWERED);
    }
    Ok(names)
}

/// A page over several queues, in the order of the ids.
pub(super) async fn gather<T>(
    queues: &[String],
    page: PageRequest,
    id: impl Fn(&T) -> MessageId,
    fetch: impl AsyncFn(&str, PageRequest) -> Result<Page<T>, StoreError>,
) -> Result<Page<T>, Refused> {
    let mut items = Vec::new();
    let mut more = false;
    for queue in queues {
        let mut page = page;
        let mut taken = 0;
        loop {
            let found = fetch(queue, page).await.map_err(refused)?;
            taken += found.items.len();
            items.extend(found.items);
            let Some(after) = found.next else { break };
            if taken >= page.limit {
                more = true;
                break;
            }
            page.after = Some(after);
        }
    }
    items.sort_by_key(|item| id(item));
    more |= items.len() > page.limit;
    items.truncate(page.limit);
    let next = items.last().filter(|_| more).map(id);
    Ok(Page { items, next })
}

/// The queue that was asked for, or all.
pub(super) async fn chosen(
    snapshot: &Snapshot,
    backend: &dyn QueueBackend,
    asked: Option<String>,
) -> Result<Vec<String>, Refused> {
    let names = names(snapshot, Some(backend)).await.map_err(refused)?;
    let names: Vec<String> = names.into_iter().collect();
    let Some(asked) = asked else { return Ok(names) };
    match resolve(names.iter().map(String::as_str), &asked) {
        Some(name) => Ok(vec![name]),
        None => Err((
            StatusCode::NOT_FOUND,
            format!("queue: there is none called {asked}"),
        )),
    }
}

pub(super) fn service_name(snapshot: &Snapshot, asked: &str) -> Option<String> {
    resolve(
        snapshot.services.iter().map(|service| &*service.name),
        asked,
    )
}

/// The one name that is `asked`, or that is it in some namespace.
pub(super) fn resolve<'a>(
    names: impl Iterator<Item = &'a str> + Clone,
    asked: &str,
) -> Option<String> {
    if let Some(name) = names.clone().find(|name| *name == asked) {
        return Some(name.to_owned());
    }
    let mut found = names.filter(|name| {
        name.rsplit_once('/')
            .is_some_and(|(_, short)| short == asked)
    });
    found
        .next()
        .filter(|_| found.next().is_none())
        .map(str::to_owned)
}

pub(super) fn page(get: &dyn Fn(&str) -> Option<String>) -> Result<PageRequest, Refused> {
    let after = get("after").map(|id| parse(&id)).transpose()?;
    let limit = match get("limit") {
        None => PageRequest::default().limit,
        Some(limit) => match limit.parse() {
            Ok(limit @ 1..=MAX_PAGE) => limit,
            _ => return Err(bad(format!("limit: expected 1 to {MAX_PAGE}"))),
        },
    };
    Ok(PageRequest { after, limit })
}

pub(super) fn next(id: Option<MessageId>) -> Option<String> {
    id.map(|id| id.to_string())
}

pub(super) fn parse(id: &str) -> Result<MessageId, Refused> {
    id.parse()
        .map_err(|_| bad(format!("{id:?} is no message id")))
}

pub(super) fn unknown(id: MessageId) -> Refused {
    (StatusCode::NOT_FOUND, format!("no message {id}"))
}

pub(super) fn bad(detail: String) -> Refused {
    (StatusCode::BAD_REQUEST, detail)
}

#[allow(clippy::needless_pass_by_value)] // as map_err hands it over
pub(super) fn refused(error: StoreError) -> Refused {
    (StatusCode::SERVICE_UNAVAILABLE, error.to_string())
}

pub(super) fn opened(shared: &Shared) -> Result<Arc<dyn QueueBackend>, Refused> {
    let none = || (StatusCode::SERVICE_UNAVAILABLE, store::why_not(None));
    shared.queues.backend().ok_or_else(none)
}

pub(super) fn facet(backend: &dyn QueueBackend) -> Result<&dyn Inspect, Refused> {
    backend.inspect().ok_or_else(|| {
        (
            StatusCode::NOT_IMPLEMENTED,
            "the queue's backend cannot look inside".to_owned(),
        )
    })
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use outrigger_core::time::UnixMillis;
    use outrigger_queue::{MemoryQueue, Message, QueueLimits, StatusView};

    use super::*;

    #[test]
    fn short_names_resolve_where_only_one_fits() {
        let names = ["shop/orders", "ops/orders", "shop/mailer", "mailer"];
        let check = |asked, expected: Option<&str>| {
            assert_eq!(
                resolve(names.into_iter(), asked).as_deref(),
                expected,
                "{asked}"
            );
        };
        check("shop/orders", Some("shop/orders"));
        check("orders", None);
        check("mailer", Some("mailer"));
        check("nobody", None);
    }

    #[tokio::test]
    async fn a_store_that_hangs_is_told_soon() {
        let error = look(std::future::pending::<Result<(), _>>())
            .await
            .unwrap_err();
        assert!(error.to_string().contains("250 ms"), "{error}");
    }

    #[tokio::test]
    async fn a_page_over_several_queues_goes_on_where_it_ended() {
        let queue = MemoryQueue::default();
        let mut rng = fastrand::Rng::with_seed(1);
        let mut ids = Vec::new();
        for n in 0..7_u64 {
            let now = UnixMillis(1_000 + n);
            let id = MessageId::new(now, &mut rng);
            let name = if n % 2 == 0 { "a" } else { "b" };
            let message = Message::new(id, name, "shop/orders", Bytes::new(), now);
            queue
                .enqueue(message, QueueLimits::NONE, now)
                .await
                .unwrap();
            ids.push(id);
        }
        let names = ["a".to_owned(), "b".to_owned()];
        let inspect: &dyn Inspect = &queue;
        let mut seen = Vec::new();
        let mut page = PageRequest {
            after: None,
            limit: 3,
        };
        loop {
            let found = gather(
                &names,
                page,
                |view: &StatusView| view.id,
                async |name, page| inspect.list(name, None, page).await,
            );
            let found = found.await.unwrap();
            assert!(found.items.len() <= 3);
            seen.extend(found.items.iter().map(|view| view.id));
            let Some(after) = found.next else { break };
            page.after = Some(after);
        }
        assert_eq!(seen, ids);
    }
}
