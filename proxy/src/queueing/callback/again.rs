//! A dead letter that is replayed ends once more, and whoever was told of its death is told of that
//! end too: its next callback is stored before the replay.
//!
//! Should the replay not happen after all, the callback stays held and the next replay finds it. On
//! the message's life.

use outrigger_queue::{
    DeadFilter, Inspect, MessageId, PageRequest, QueueBackend, QueueLimits, Selection, StatusView,
};

use super::{follow as follower, noted};
use crate::clock;
use crate::queueing::fan_out;
use crate::queueing::lookup::{MAX_PAGE, Refused, change, facet, look, refused};
use crate::snapshot::Snapshot;

/// Stores the next callbacks of the dead letters of a selection.
///
/// # Errors
/// 503 for the store; nothing is to be replayed then.
pub(in crate::queueing) async fn follow(
    snapshot: &Snapshot,
    backend: &dyn QueueBackend,
    selection: &Selection,
) -> Result<(), Refused> {
    let calls_back = |view: &StatusView| {
        let policy = fan_out::accepting(snapshot, &view.route);
        policy.is_some_and(|policy| policy.callback.is_some())
    };
    let mut routes = snapshot.services.iter().flat_map(|service| &service.routes);
    if !routes.any(|route| {
        let policy = route.asynchronous.as_ref();
        policy.is_some_and(|policy| policy.callback.is_some())
    }) {
        return Ok(());
    }
    let inspect = facet(backend)?;
    let ids = match selection {
        Selection::Ids(ids) => ids.clone(),
        Selection::Matching { queue, filter, .. } => {
            listed(inspect, queue, filter, calls_back).await?
        }
    };
    for id in ids {
        let letter = look(inspect.dead_letter(id)).await.map_err(refused)?;
        let Some(letter) = letter.filter(|letter| calls_back(&letter.status)) else {
            continue;
        };
        let Some(message) = letter.message else {
            continue;
        };
        let Some(url) = noted(&message).filter(|_| super::subject(&message).is_none()) else {
            continue;
        };
        let told = follower(&message, &url, letter.status.replays + 1);
        let storing = backend.enqueue(told, QueueLimits::NONE, clock::unix_now());
        let storing = async {
            // Known already: an earlier replay stored it and did not happen.
            let stored = storing.await.map(drop);
            stored.map_err(|error| outrigger_queue::StoreError::Unavailable(error.to_string()))
        };
        change(storing).await?;
    }
    Ok(())
}

async fn listed(
    inspect: &dyn Inspect,
    queue: &str,
    filter: &DeadFilter,
    wanted: impl Fn(&StatusView) -> bool,
) -> Result<Vec<MessageId>, Refused> {
    let mut ids = Vec::new();
    let mut page = PageRequest {
        after: None,
        limit: MAX_PAGE,
    };
    loop {
        let found = look(inspect.dead(queue, filter.clone(), page))
            .await
            .map_err(refused)?;
        let statuses = found.items.iter().map(|letter| &letter.status);
        ids.extend(statuses.filter(|view| wanted(view)).map(|view| view.id));
        match found.next {
            Some(after) => page.after = Some(after),
            None => return Ok(ids),
        }
    }
}
