//! `ListOperations`: the operations of the caller, of the service that was called.
//!
//! In the order of their ids, over the queues that the service's rules use and over every state. On
//! the message's life.

use std::collections::BTreeSet;

use outrigger_core::error_code::ErrorCode;
use outrigger_queue::{Inspect, MessageId, PageRequest, State, StatusView};

use super::wire::{ListRequest, ListResponse};
use super::{PATIENCE, backend, inspect, look, of_message, unknown};
use crate::call::Call;
use crate::error::ProxyError;
use crate::queueing::caller;
use crate::snapshot::GrpcAck;

/// Operations of one page, where the caller does not ask for fewer.
const PAGE: usize = 100;

/// The states in which a message can be listed; those that are not final come together.
const STATES: [Option<State>; 5] = [
    None,
    Some(State::Succeeded),
    Some(State::Dead),
    Some(State::Cancelled),
    Some(State::Expired),
];

/// One page of the caller's operations.
///
/// # Errors
/// `bad_request` for a filter or a token of somebody else; `message_unknown` for a name that has no
/// operations below it; `queue_unavailable`.
pub(super) async fn list(call: &mut Call, asked: &ListRequest) -> Result<ListResponse, ProxyError> {
    if !matches!(asked.name.as_str(), "" | "operations") {
        return Err(unknown(format!("nothing is below {:?}", asked.name)));
    }
    let bad = |detail: &str| ProxyError::downstream(ErrorCode::BadRequest, detail);
    if !asked.filter.is_empty() {
        return Err(bad("operations are not listed by a filter"));
    }
    let after = match asked.page_token.as_str() {
        "" => None,
        token => Some(token.parse().map_err(|_| bad("no page token of ours"))?),
    };
    let limit = match usize::try_from(asked.page_size) {
        Ok(0) => PAGE,
        Ok(size) => size.min(PAGE),
        Err(_) => return Err(bad("page_size is negative")),
    };
    let queues = queues(call)?;
    let backend = backend(call)?;
    let inspect = inspect(&*backend)?;
    let own = call.worker.shared.identity.workload();
    let wanted = |view: &StatusView| {
        caller::owns(own.as_deref(), &view.caller)
            && queues.routes.contains(view.route.as_str())
            && *view.target == *queues.service
    };
    let mut found: Vec<StatusView> = Vec::new();
    for queue in &queues.names {
        for state in STATES {
            found.extend(some(inspect, queue, state, after, limit + 1, &wanted).await?);
        }
    }
    found.sort_by_key(|view| view.id);
    // A message that ended meanwhile may be in two lists.
    found.dedup_by_key(|view| view.id);
    let more = found.len() > limit;
    found.truncate(limit);
    let last = found.last().filter(|_| more).map(|view| view.id);
    let mut operations = Vec::with_capacity(found.len());
    for view in &found {
        operations.push(of_message(call, inspect, view).await?);
    }
    Ok(ListResponse {
        operations,
        next_page_token: last.map_or_else(String::new, |id| id.to_string()),
    })
}

/// Where the operations of the service that was called are, and by which rules they were made.
struct Queues {
    names: BTreeSet<String>,
    routes: BTreeSet<String>,
    /// Copies for others are not among them.
    service: String,
}

fn queues(call: &mut Call) -> Result<Queues, ProxyError> {
    let service = call.find_service()?;
    let mut queues = Queues {
        names: BTreeSet::new(),
        routes: BTreeSet::new(),
        service: service.name.to_string(),
    };
    for route in &service.routes {
        if let Some(policy) = &route.asynchronous
            && policy.grpc_ack == Some(GrpcAck::Operation)
        {
            queues.names.insert(policy.queue.clone());
            queues.routes.insert(route.name.to_string());
        }
    }
    Ok(queues)
}

/// Up to `most` that are wanted, behind `after`.
async fn some(
    inspect: &dyn Inspect,
    queue: &str,
    state: Option<State>,
    after: Option<MessageId>,
    most: usize,
    wanted: &dyn Fn(&StatusView) -> bool,
) -> Result<Vec<StatusView>, ProxyError> {
    let mut found = Vec::new();
    let mut page = PageRequest {
        after,
        limit: 1_000,
    };
    loop {
        let listed = look(PATIENCE, inspect.list(queue, state, page)).await?;
        found.extend(listed.items.into_iter().filter(|view| wanted(view)));
        page.after = listed.next;
        if listed.next.is_none() || found.len() >= most {
            found.truncate(most);
            return Ok(found);
        }
    }
}
