//! The suite that every backend passes: what the contract of [`crate::QueueBackend`] means in
//! detail.
//!
//! Each case gets an empty backend and panics where the contract is broken. Time is a number that
//! the case moves, so nothing sleeps but [`crate::QueueBackend::wait_due`]. Durability is not
//! covered: it needs a crash, which only a backend's own tests can stage.

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::FutureExt as _;
use futures_util::future::{BoxFuture, join, join_all};
use outrigger_core::time::UnixMillis;

use crate::backend::{
    CancelOutcome, Conclusion, Counts, DeadFilter, EnqueueError, EnqueueOutcome, ForgetOutcome,
    Inspect, Lease, LeaseRequest, PageRequest, QueueBackend, QueueLimits, Quota, Replay,
    ResultOutcome, Selection, Settle, SettleOutcome, TargetLimits, wait_final,
};
use crate::message::{AttemptRecord, HELD, IdemKey, Message, MessageId, State, StoredResult};

/// The queue of the suite.
pub const QUEUE: &str = "orders";
/// When every case begins.
pub const START: UnixMillis = UnixMillis(1_700_000_000_000);

type Backend = Arc<dyn QueueBackend>;
type Case = fn(Backend) -> BoxFuture<'static, ()>;

macro_rules! cases {
    ($($name:ident),* $(,)?) => {
        /// Every case, by name.
        pub const CASES: &[(&str, Case)] = &[$((stringify!($name), |b| $name(b).boxed())),*];
    };
}

cases!(
    accepts_and_delivers_the_same_bytes,
    leases_oldest_first_and_never_twice,
    skips_targets_without_room,
    a_lease_that_runs_out_is_delivered_again_and_counts,
    a_late_settle_is_lost_once_leased_again,
    settle_is_idempotent,
    extend_keeps_a_lease,
    retry_is_never_early,
    delay_is_never_early,
    waiting_spends_no_attempt,
    release_changes_nothing,
    keys_keep_their_order,
    a_key_is_kept_at_each_target_by_itself,
    a_dead_head_blocks_its_key_when_asked,
    a_message_and_its_copies_are_stored_together_or_not,
    a_follower_falls_due_when_its_message_ends,
    followers_count_in_their_own_queue,
    a_held_message_is_concluded_or_forgotten,
    duplicates_are_recognised,
    concurrent_duplicates_store_one,
    cancel_only_what_is_not_being_delivered,
    expires_undelivered,
    results_are_kept_for_their_time,
    dead_letters_keep_everything,
    replay_starts_over_at_the_tail,
    a_replay_keeps_its_rate,
    purge_forgets_the_request,
    limits_refuse,
    a_quota_is_each_callers_own,
    a_finished_message_is_forgotten_on_request,
    reap_forgets_what_is_past_its_time,
    a_dead_letter_is_kept_as_long_as_its_death_says,
    dead_letters_do_not_push_each_other_out,
    an_exported_message_is_restored_once_as_it_was,
    wait_due_wakes,
    wait_final_sees_the_end,
    lists_come_in_pages,
);

/// Runs every case, each on a fresh backend from `open`.
///
/// # Panics
/// Where the backend breaks the contract; the case's name is printed before.
pub async fn run_all<F, Fut>(open: F)
where
    F: Fn() -> Fut,
    Fut: Future<Output = Backend>,
{
    for (name, case) in CASES {
        println!("conformance: {name}");
        let backend = open().await;
        case(Arc::clone(&backend)).await;
        let queues = inspect(&backend).queues().await.expect("queues");
        for queue in queues {
            let counts = inspect(&backend)
                .counts(&queue, START)
                .await
                .expect("counts");
            assert_eq!(
                counts.drift(),
                0,
                "conservation in {queue} after {name}: {counts:?}"
            );
        }
        backend.close().await;
    }
}

/// A moment of a case, in milliseconds after [`START`].
#[must_use]
pub const fn at(ms: u64) -> UnixMillis {
    UnixMillis(START.0 + ms)
}

/// The id of the nth message of a case.
#[must_use]
pub fn id(n: u64) -> MessageId {
    let mut bytes = [0; 16];
    bytes[..6].copy_from_slice(&START.0.to_be_bytes()[2..]);
    bytes[8..].copy_from_slice(&n.to_be_bytes());
    MessageId::from_bytes(bytes)
}

/// The nth message of a case, enqueued `ms` after the start.
#[must_use]
pub fn message(n: u64, ms: u64) -> Message {
    let mut message = Message::new(
        id(n),
        QUEUE,
        "billing",
        Bytes::from(format!("body {n}")),
        at(ms),
    );
    message.headers = vec![("x-n".to_owned(), n.to_string().into_bytes())];
    message
}

/// A try that was answered with `status`.
#[must_use]
pub fn attempt(status: u16) -> AttemptRecord {
    AttemptRecord {
        status: Some(status),
        ms: 3,
        ..AttemptRecord::default()
    }
}

fn inspect(backend: &Backend) -> &dyn Inspect {
    backend
        .inspect()
        .expect("the suite needs the inspect facet")
}

fn to(target: &str) -> Replay {
    Replay {
        to: Some(target.to_owned()),
        ..Replay::default()
    }
}

fn key(name: &str, fingerprint: u8) -> IdemKey {
    IdemKey {
        scope: "caller route".to_owned(),
        key: name.to_owned(),
        fingerprint: [fingerprint; 32],
        ttl_ms: 1000,
    }
}

async fn enqueue(backend: &Backend, message: Message) {
    let now = message.enqueued_at;
    let out = backend
        .enqueue(message, QueueLimits::NONE, now)
        .await
        .expect("enqueue");
    assert!(matches!(out, EnqueueOutcome::Accepted(_)), "{out:?}");
}

async fn lease_with(backend: &Backend, max: usize, ms: u64, limits: TargetLimits) -> Vec<Lease> {
    let request = LeaseRequest {
        queue: QUEUE.to_owned(),
        max,
        lease_for_ms: 1000,
        now: at(ms),
        limits,
    };
    backend.lease(request).await.expect("lease").leases
}

async fn lease(backend: &Backend, max: usize, ms: u64) -> Vec<Lease> {
    lease_with(backend, max, ms, TargetLimits::default()).await
}

async fn lease_one(backend: &Backend, ms: u64) -> Lease {
    let mut leases = lease(backend, 1, ms).await;
    leases.pop().expect("a message is due")
}

async fn settle(backend: &Backend, lease: &Lease, how: Settle, ms: u64) {
    let out = backend.settle(lease.id, how, at(ms)).await.expect("settle");
    assert_eq!(out, SettleOutcome::Settled);
}

fn done() -> Settle {
    Settle::Done {
        result: None,
        attempt: attempt(200),
    }
}

fn dead(reason: &str) -> Settle {
    Settle::Dead {
        reason: reason.to_owned(),
        attempt: Some(attempt(503)),
        excerpt: Bytes::from_static(b"oh no"),
        retain_ms: None,
    }
}

fn retry(ms: u64) -> Settle {
    Settle::RetryAt {
        at: at(ms),
        attempt: Some(attempt(503)),
        waiting: false,
        reason: None,
    }
}

fn numbers(leases: &[Lease]) -> Vec<u64> {
    let number =
        |l: &Lease| u64::from_be_bytes(l.message.id.as_bytes()[8..].try_into().expect("8"));
    leases.iter().map(number).collect()
}

async fn counts(backend: &Backend, ms: u64) -> Counts {
    let counts = inspect(backend)
        .counts(QUEUE, at(ms))
        .await
        .expect("counts");
    assert_eq!(counts.drift(), 0, "{counts:?}");
    counts
}

async fn state(backend: &Backend, n: u64) -> Option<State> {
    inspect(backend)
        .status(id(n))
        .await
        .expect("status")
        .map(|view| view.state)
}

async fn accepts_and_delivers_the_same_bytes(backend: Backend) {
    let mut sent = message(1, 0);
    sent.body = Bytes::from((0..=255).collect::<Vec<u8>>());
    sent.headers.push(("x-bin".to_owned(), vec![0, 255, 128]));
    sent.trailers = Some(vec![("t".to_owned(), b"v".to_vec())]);
    sent.trace_context = Some("00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".to_owned());
    sent.annotations = vec![("callback".to_owned(), "https://example.com".to_owned())];
    let out = backend
        .enqueue(sent.clone(), QueueLimits::NONE, at(0))
        .await
        .expect("enqueue");
    let EnqueueOutcome::Accepted(receipt) = out else {
        panic!("{out:?}")
    };
    assert_eq!(receipt.id, sent.id);
    assert_eq!(receipt.durability, backend.capabilities().durability);
    assert_eq!(state(&backend, 1).await, Some(State::Queued));

    let lease = lease_one(&backend, 1).await;
    assert_eq!(lease.message, sent);
    assert_eq!(
        (lease.attempts_so_far, lease.until, lease.replays),
        (0, at(1001), 0)
    );
    assert_eq!(state(&backend, 1).await, Some(State::Delivering));
    settle(&backend, &lease, done(), 2).await;

    let view = inspect(&backend)
        .status(id(1))
        .await
        .expect("status")
        .expect("known");
    assert_eq!(view.state, State::Succeeded);
    assert_eq!((view.attempts_spent, view.attempts[0].n), (1, 1));
    assert_eq!(view.attempts[0].status, Some(200));
    assert_eq!((view.created_at, view.finished_at), (at(0), Some(at(2))));
    assert_eq!(view.trace_id(), Some("0af7651916cd43dd8448eb211c80319c"));
    let counts = counts(&backend, 2).await;
    assert_eq!(
        (
            counts.enqueued_total,
            counts.succeeded_total,
            counts.pending()
        ),
        (1, 1, 0)
    );
}

async fn leases_oldest_first_and_never_twice(backend: Backend) {
    // Enqueue order, not id order.
    for n in [5, 3, 4, 1, 2] {
        enqueue(&backend, message(n, 0)).await;
    }
    assert_eq!(numbers(&lease(&backend, 2, 1).await), [5, 3]);
    assert_eq!(numbers(&lease(&backend, 9, 1).await), [4, 1, 2]);
    assert!(lease(&backend, 9, 1).await.is_empty());
    assert_eq!(counts(&backend, 1).await.in_flight, 5);
}

async fn skips_targets_without_room(backend: Backend) {
    for n in 1..=6 {
        let mut message = message(n, 0);
        message.target = if n <= 4 { "slow" } else { "fast" }.to_owned();
        enqueue(&backend, message).await;
    }
    let skip = TargetLimits::skip(["slow".to_owned()]);
    assert_eq!(numbers(&lease_with(&backend, 1, 1, skip).await), [5]);
    let mut two = TargetLimits::default();
    two.by_target.insert("slow".to_owned(), 2);
    assert_eq!(numbers(&lease_with(&backend, 9, 1, two).await), [1, 2, 6]);
    assert_eq!(numbers(&lease(&backend, 9, 1).await), [3, 4]);
}

async fn a_lease_that_runs_out_is_delivered_again_and_counts(backend: Backend) {
    enqueue(&backend, message(1, 0)).await;
    let first = lease_one(&backend, 0).await;
    assert!(lease(&backend, 1, 999).await.is_empty(), "still leased");
    let second = lease_one(&backend, 1000).await;
    assert_ne!(first.id, second.id);
    assert_eq!(second.attempts_so_far, 1, "a lost attempt counts");
    let view = inspect(&backend)
        .status(id(1))
        .await
        .expect("status")
        .expect("known");
    assert_eq!(view.attempts[0].reason.as_deref(), Some("lease_expired"));
}

async fn a_late_settle_is_lost_once_leased_again(backend: Backend) {
    enqueue(&backend, message(1, 0)).await;
    let first = lease_one(&backend, 0).await;
    let second = lease_one(&backend, 1000).await;
    let late = backend.settle(first.id, dead("late"), at(1001)).await;
    assert_eq!(late, Ok(SettleOutcome::LeaseLost));
    let extended = backend.extend(first.id, 1000, at(1001)).await;
    assert_eq!(extended, Ok(SettleOutcome::LeaseLost));
    assert_eq!(state(&backend, 1).await, Some(State::Delivering));
    settle(&backend, &second, done(), 1002).await;
    assert_eq!(state(&backend, 1).await, Some(State::Succeeded));
    let late = backend.settle(first.id, dead("late"), at(1003)).await;
    assert_eq!(late, Ok(SettleOutcome::LeaseLost));
}

async fn settle_is_idempotent(backend: Backend) {
    enqueue(&backend, message(1, 0)).await;
    let lease = lease_one(&backend, 0).await;
    settle(&backend, &lease, done(), 1).await;
    settle(&backend, &lease, done(), 2).await;
    settle(&backend, &lease, dead("changed its mind"), 3).await;
    let counts = counts(&backend, 3).await;
    assert_eq!(
        (counts.succeeded_total, counts.dead),
        (1, 0),
        "the first one decided"
    );
}

async fn extend_keeps_a_lease(backend: Backend) {
    enqueue(&backend, message(1, 0)).await;
    let held = lease_one(&backend, 0).await;
    let out = backend.extend(held.id, 1000, at(900)).await;
    assert_eq!(out, Ok(SettleOutcome::Settled));
    assert!(lease(&backend, 1, 1899).await.is_empty());
    assert_eq!(lease(&backend, 1, 1900).await.len(), 1);
}

async fn retry_is_never_early(backend: Backend) {
    enqueue(&backend, message(1, 0)).await;
    let first = lease_one(&backend, 0).await;
    settle(&backend, &first, retry(500), 10).await;
    assert_eq!(state(&backend, 1).await, Some(State::Retrying));
    let view = inspect(&backend)
        .status(id(1))
        .await
        .expect("status")
        .expect("known");
    assert_eq!(view.next_attempt_at, Some(at(500)));
    assert_eq!(counts(&backend, 499).await.delayed, 1);
    assert!(lease(&backend, 1, 499).await.is_empty());
    assert_eq!(counts(&backend, 500).await.ready, 1);
    assert_eq!(lease_one(&backend, 500).await.attempts_so_far, 1);
}

async fn delay_is_never_early(backend: Backend) {
    let mut late = message(1, 0);
    late.not_before = at(1000);
    enqueue(&backend, late).await;
    enqueue(&backend, message(2, 0)).await;
    assert_eq!(numbers(&lease(&backend, 9, 999).await), [2]);
    assert_eq!(numbers(&lease(&backend, 9, 1000).await), [1]);
}

async fn waiting_spends_no_attempt(backend: Backend) {
    enqueue(&backend, message(1, 0)).await;
    let first = lease_one(&backend, 0).await;
    let wait = Settle::RetryAt {
        at: at(100),
        attempt: None,
        waiting: true,
        reason: Some("circuit_open".to_owned()),
    };
    settle(&backend, &first, wait, 1).await;
    let view = inspect(&backend)
        .status(id(1))
        .await
        .expect("status")
        .expect("known");
    assert_eq!((view.state, view.attempts_spent), (State::Waiting, 0));
    assert_eq!(view.reason.as_deref(), Some("circuit_open"));
    assert_eq!(counts(&backend, 1).await.waiting, 1);
    assert!(lease(&backend, 1, 99).await.is_empty());
    assert_eq!(lease_one(&backend, 100).await.attempts_so_far, 0);
}

async fn release_changes_nothing(backend: Backend) {
    enqueue(&backend, message(1, 0)).await;
    let first = lease_one(&backend, 0).await;
    settle(&backend, &first, Settle::Release, 1).await;
    assert_eq!(state(&backend, 1).await, Some(State::Queued));
    let again = lease_one(&backend, 1).await;
    assert_eq!(again.attempts_so_far, 0);
}

async fn keys_keep_their_order(backend: Backend) {
    for (n, name) in [(1, "a"), (2, "a"), (3, "b"), (4, "a")] {
        let mut message = message(n, 0);
        message.ordering_key = Some(name.to_owned());
        enqueue(&backend, message).await;
    }
    let heads = lease(&backend, 9, 0).await;
    assert_eq!(numbers(&heads), [1, 3], "one per key");
    assert!(lease(&backend, 9, 0).await.is_empty());
    settle(&backend, &heads[0], retry(500), 1).await;
    assert!(
        lease(&backend, 9, 499).await.is_empty(),
        "a retrying head holds its key"
    );
    let head = lease_one(&backend, 500).await;
    assert_eq!(numbers(std::slice::from_ref(&head)), [1]);
    settle(&backend, &head, dead("no"), 501).await;
    let next = lease_one(&backend, 501).await;
    assert_eq!(
        numbers(std::slice::from_ref(&next)),
        [2],
        "skipped by default"
    );
    let cancelled = inspect(&backend).cancel(id(4), at(502)).await;
    assert_eq!(cancelled, Ok(CancelOutcome::Cancelled));
    settle(&backend, &next, done(), 503).await;
    assert!(lease(&backend, 9, 504).await.is_empty());
}

async fn a_key_is_kept_at_each_target_by_itself(backend: Backend) {
    for (n, target) in [(1, "down"), (2, "up"), (3, "down"), (4, "up")] {
        let mut message = message(n, 0);
        message.target = target.to_owned();
        message.ordering_key = Some("a".to_owned());
        enqueue(&backend, message).await;
    }
    let heads = lease(&backend, 9, 0).await;
    assert_eq!(numbers(&heads), [1, 2], "one per key and target");
    settle(&backend, &heads[0], dead("no"), 1).await;
    settle(&backend, &heads[1], retry(500), 1).await;
    assert_eq!(numbers(&lease(&backend, 9, 2).await), [3]);
    let sent_on = inspect(&backend)
        .replay(Selection::Ids(vec![id(1)]), to("up"), at(3))
        .await;
    assert_eq!(sent_on.expect("replay").replayed, [id(1)]);
    assert!(
        lease(&backend, 9, 4).await.is_empty(),
        "at the tail of its new target"
    );
}

async fn a_dead_head_blocks_its_key_when_asked(backend: Backend) {
    for n in 1..=3 {
        let mut message = message(n, 0);
        message.ordering_key = Some("a".to_owned());
        message.block_on_dead = true;
        enqueue(&backend, message).await;
    }
    let head = lease_one(&backend, 0).await;
    settle(&backend, &head, dead("no"), 1).await;
    assert!(lease(&backend, 9, 2).await.is_empty(), "blocked");
    let report = inspect(&backend)
        .replay(Selection::Ids(vec![id(1)]), Replay::default(), at(3))
        .await;
    assert_eq!(report.expect("replay").replayed, [id(1)]);
    let head = lease_one(&backend, 4).await;
    assert_eq!(
        numbers(std::slice::from_ref(&head)),
        [2],
        "the replayed one went to the tail"
    );
    settle(&backend, &head, dead("no"), 5).await;
    assert!(lease(&backend, 9, 6).await.is_empty(), "blocked again");
    assert_eq!(
        inspect(&backend)
            .purge(Selection::Ids(vec![id(2)]), at(7))
            .await,
        Ok(1)
    );
    assert_eq!(numbers(&lease(&backend, 9, 8).await), [3]);
}

async fn a_message_and_its_copies_are_stored_together_or_not(backend: Backend) {
    let group = |n: u64, target: &str| {
        let mut first = message(n, 0);
        first.idempotency_key = Some(key("k", 1));
        let copies = (1..=2).map(|nth| Message {
            id: first.id.nth(nth),
            target: format!("{target}{nth}"),
            idempotency_key: None,
            ..first.clone()
        });
        let copies: Vec<Message> = copies.collect();
        (first, copies)
    };
    let limits = |max_depth| QueueLimits {
        max_depth,
        ..QueueLimits::NONE
    };
    let (first, copies) = group(10, "a");
    let refused = backend
        .enqueue_with(first.clone(), copies.clone(), limits(2), at(0))
        .await;
    assert!(
        matches!(refused, Err(EnqueueError::Full { .. })),
        "{refused:?}"
    );
    assert_eq!(counts(&backend, 0).await.pending(), 0, "nothing is stored");
    let stored = backend
        .enqueue_with(first.clone(), copies, limits(3), at(0))
        .await;
    assert!(
        matches!(stored, Ok(EnqueueOutcome::Accepted(_))),
        "{stored:?}"
    );
    let (again, copies) = group(20, "b");
    let repeated = backend.enqueue_with(again, copies, limits(9), at(1)).await;
    assert!(
        matches!(repeated, Ok(EnqueueOutcome::Duplicate { id, .. }) if id == first.id),
        "{repeated:?}"
    );
    assert_eq!(counts(&backend, 1).await.enqueued_total, 3);
    let leases = lease(&backend, 9, 1).await;
    assert_eq!(leases.len(), 3);
    settle(&backend, &leases[0], done(), 2).await;
    settle(&backend, &leases[1], dead("no"), 2).await;
    settle(&backend, &leases[2], retry(9), 2).await;
    let counts = counts(&backend, 3).await;
    assert_eq!(
        (counts.succeeded_total, counts.dead, counts.pending()),
        (1, 1, 1),
        "each ends by itself"
    );
    assert_eq!(counts.drift(), 0);
}

/// A held message that follows the nth one.
fn follower(n: u64, queue: &str) -> Message {
    Message {
        id: id(n).follower(0),
        queue: queue.to_owned(),
        not_before: HELD,
        ..message(n, 0)
    }
}

async fn a_follower_falls_due_when_its_message_ends(backend: Backend) {
    // Each ends in another way: done, dead, cancelled, expired, purged.
    for n in 1..=5 {
        let mut first = message(n, 0);
        first.expires_at = (n == 4).then_some(at(50));
        let stored = backend
            .enqueue_with(first, vec![follower(n, "news")], QueueLimits::NONE, at(0))
            .await;
        assert!(
            matches!(stored, Ok(EnqueueOutcome::Accepted(_))),
            "{stored:?}"
        );
    }
    let news = |ms: u64| {
        let request = LeaseRequest {
            queue: "news".to_owned(),
            max: 9,
            lease_for_ms: 1000,
            now: at(ms),
            limits: TargetLimits::default(),
        };
        let backend = Arc::clone(&backend);
        async move { backend.lease(request).await.expect("lease") }
    };
    let found = news(45).await;
    assert!(found.leases.is_empty(), "held: {:?}", found.leases);
    assert_eq!(found.cursor.next_due, None, "no time makes it due");
    let look = inspect(&backend);
    let held = look.counts("news", at(1)).await.expect("counts");
    assert_eq!(
        (held.pending(), held.oldest_enqueued_at),
        (5, None),
        "{held:?}"
    );
    let view = look.status(id(1).follower(0)).await.expect("status");
    assert_eq!(view.expect("known").next_attempt_at, None);

    let leases = lease(&backend, 2, 10).await;
    settle(&backend, &leases[0], retry(10), 11).await;
    assert!(news(45).await.leases.is_empty(), "a try is no end");
    let again = lease_one(&backend, 12).await;
    settle(&backend, &again, done(), 20).await;
    settle(&backend, &leases[1], dead("no"), 21).await;
    look.cancel(id(3), at(22)).await.expect("cancel");
    while backend.reap(at(50)).await.expect("reap") > 0 {}
    look.purge_pending(QUEUE, at(51)).await.expect("purge");
    let leases = news(60).await.leases;
    let ids: Vec<MessageId> = leases.iter().map(|lease| lease.message.id).collect();
    let expected: Vec<MessageId> = (1..=5).map(|n| id(n).follower(0)).collect();
    assert_eq!(ids, expected);
    assert_eq!(leases[0].message.enqueued_at, at(20), "its age begins then");
    for lease in leases {
        settle(&backend, &lease, done(), 61).await;
    }
}

async fn followers_count_in_their_own_queue(backend: Backend) {
    let limits = QueueLimits {
        max_depth: 1,
        ..QueueLimits::NONE
    };
    let pair = |n| (message(n, 0), vec![follower(n, "news")]);
    let (first, news) = pair(1);
    let stored = backend.enqueue_with(first, news, limits, at(0)).await;
    assert!(
        matches!(stored, Ok(EnqueueOutcome::Accepted(_))),
        "{stored:?}"
    );
    let leased = lease_one(&backend, 1).await;
    settle(&backend, &leased, done(), 2).await;
    let (second, news) = pair(2);
    let refused = backend.enqueue_with(second, news, limits, at(3)).await;
    assert!(
        matches!(refused, Err(EnqueueError::Full { .. })),
        "no room for its news: {refused:?}"
    );
    assert_eq!(state(&backend, 2).await, None);
}

async fn a_held_message_is_concluded_or_forgotten(backend: Backend) {
    let held = |n, name| {
        let mut held = message(n, 0);
        held.not_before = HELD;
        held.idempotency_key = Some(key(name, 1));
        held
    };
    let result = StoredResult {
        status: 201,
        headers: Vec::new(),
        body: Bytes::from_static(b"made"),
        trailers: None,
        finished_at: at(5),
        truncated: false,
    };
    enqueue(&backend, held(1, "a")).await;
    enqueue(&backend, held(2, "b")).await;
    let answered = || Conclusion::Answered(Some(result.clone()));
    assert_eq!(backend.conclude(id(9), answered(), at(5)).await, Ok(false));
    assert_eq!(backend.conclude(id(1), answered(), at(5)).await, Ok(true));
    assert_eq!(backend.conclude(id(1), answered(), at(6)).await, Ok(false));
    let look = inspect(&backend);
    assert_eq!(
        look.result(id(1), at(6)).await,
        Ok(ResultOutcome::Ready(result.clone()))
    );
    let repeat = backend
        .enqueue(held(3, "a"), QueueLimits::NONE, at(7))
        .await;
    assert!(
        matches!(repeat, Ok(EnqueueOutcome::Duplicate { id: known, .. }) if known == id(1)),
        "{repeat:?}"
    );
    let forgotten = backend.conclude(id(2), Conclusion::Forgotten, at(8)).await;
    assert_eq!(forgotten, Ok(true));
    assert_eq!(state(&backend, 2).await, Some(State::Cancelled));
    enqueue(&backend, held(4, "b")).await;
    enqueue(&backend, message(5, 9)).await;
    assert_eq!(
        backend.conclude(id(5), answered(), at(9)).await,
        Ok(false),
        "it is not held"
    );
}

async fn duplicates_are_recognised(backend: Backend) {
    let with_key = |n, ms, fingerprint| {
        let mut message = message(n, ms);
        message.idempotency_key = Some(key("k", fingerprint));
        message
    };
    enqueue(&backend, with_key(1, 0, 7)).await;
    let again = backend
        .enqueue(with_key(2, 1, 7), QueueLimits::NONE, at(1))
        .await;
    let durability = backend.capabilities().durability;
    assert_eq!(
        again,
        Ok(EnqueueOutcome::Duplicate {
            id: id(1),
            durability
        })
    );
    let other = backend
        .enqueue(with_key(3, 1, 8), QueueLimits::NONE, at(1))
        .await;
    assert_eq!(other, Ok(EnqueueOutcome::Mismatch { id: id(1) }));
    let mut elsewhere = with_key(4, 1, 8);
    elsewhere.idempotency_key = Some(IdemKey {
        scope: "another".to_owned(),
        ..key("k", 8)
    });
    enqueue(&backend, elsewhere).await;
    let found = inspect(&backend)
        .by_idempotency("caller route", "k", at(999))
        .await;
    assert_eq!(found, Ok(Some(id(1))));
    let found = inspect(&backend)
        .by_idempotency("caller route", "k", at(1000))
        .await;
    assert_eq!(found, Ok(None), "forgotten after its time");
    let leased = lease(&backend, 9, 2).await;
    assert_eq!(numbers(&leased), [1, 4]);
    settle(&backend, &leased[0], done(), 3).await;
    let after = backend
        .enqueue(with_key(5, 4, 7), QueueLimits::NONE, at(4))
        .await;
    assert_eq!(
        after,
        Ok(EnqueueOutcome::Duplicate {
            id: id(1),
            durability
        }),
        "done is known too"
    );
    enqueue(&backend, with_key(6, 1000, 9)).await;
    let same_id = backend
        .enqueue(message(6, 1001), QueueLimits::NONE, at(1001))
        .await;
    assert_eq!(
        same_id,
        Ok(EnqueueOutcome::Duplicate {
            id: id(6),
            durability
        })
    );
    assert_eq!(counts(&backend, 1001).await.enqueued_total, 3);
}

async fn concurrent_duplicates_store_one(backend: Backend) {
    let all = join_all((0..32).map(|n| {
        let mut message = message(n, 0);
        message.idempotency_key = Some(key("same", 1));
        backend.enqueue(message, QueueLimits::NONE, at(0))
    }))
    .await;
    let mut stored = Vec::new();
    let mut meant = Vec::new();
    for out in all {
        match out.expect("enqueue") {
            EnqueueOutcome::Accepted(receipt) => stored.push(receipt.id),
            EnqueueOutcome::Duplicate { id, .. } => meant.push(id),
            EnqueueOutcome::Mismatch { .. } => panic!("the same request"),
        }
    }
    assert_eq!((stored.len(), meant.len()), (1, 31));
    assert!(meant.iter().all(|id| *id == stored[0]));
    assert_eq!(lease(&backend, 99, 1).await.len(), 1);
}

async fn cancel_only_what_is_not_being_delivered(backend: Backend) {
    let look = inspect(&backend);
    assert_eq!(look.cancel(id(9), at(0)).await, Ok(CancelOutcome::Unknown));
    enqueue(&backend, message(1, 0)).await;
    let leased = lease_one(&backend, 0).await;
    let busy = CancelOutcome::NotCancellable(State::Delivering);
    assert_eq!(look.cancel(id(1), at(1)).await, Ok(busy));
    settle(&backend, &leased, retry(100), 2).await;
    assert_eq!(
        look.cancel(id(1), at(3)).await,
        Ok(CancelOutcome::Cancelled)
    );
    assert_eq!(
        look.cancel(id(1), at(4)).await,
        Ok(CancelOutcome::Cancelled),
        "again"
    );
    assert!(lease(&backend, 1, 100).await.is_empty());
    assert_eq!(look.result(id(1), at(100)).await, Ok(ResultOutcome::Gone));
    assert_eq!(counts(&backend, 100).await.cancelled_total, 1);

    enqueue(&backend, message(2, 100)).await;
    let leased = lease_one(&backend, 100).await;
    settle(&backend, &leased, done(), 101).await;
    let over = CancelOutcome::NotCancellable(State::Succeeded);
    assert_eq!(look.cancel(id(2), at(102)).await, Ok(over));
}

async fn expires_undelivered(backend: Backend) {
    for n in 1..=3 {
        let mut message = message(n, 0);
        message.expires_at = Some(at(100));
        enqueue(&backend, message).await;
    }
    let leased = lease(&backend, 1, 99).await;
    assert!(
        lease(&backend, 9, 100).await.is_empty(),
        "2 and 3 are past their time"
    );
    while backend.reap(at(100)).await.expect("reap") > 0 {}
    assert_eq!(
        state(&backend, 1).await,
        Some(State::Delivering),
        "a delivery is not torn away"
    );
    assert_eq!(state(&backend, 2).await, Some(State::Expired));
    settle(&backend, &leased[0], Settle::Expired, 101).await;
    assert_eq!(state(&backend, 1).await, Some(State::Expired));
    assert_eq!(counts(&backend, 101).await.expired_total, 3);
}

async fn results_are_kept_for_their_time(backend: Backend) {
    let look = inspect(&backend);
    assert_eq!(look.result(id(1), at(0)).await, Ok(ResultOutcome::Unknown));
    let mut sent = message(1, 0);
    sent.result_ttl_ms = 500;
    enqueue(&backend, sent).await;
    assert_eq!(look.result(id(1), at(0)).await, Ok(ResultOutcome::NotYet));
    let leased = lease_one(&backend, 0).await;
    let result = StoredResult {
        status: 201,
        headers: vec![("x-bin".to_owned(), vec![1, 200])],
        body: Bytes::from_static(b"created"),
        trailers: None,
        finished_at: at(10),
        truncated: false,
    };
    let done = Settle::Done {
        result: Some(result.clone()),
        attempt: attempt(201),
    };
    settle(&backend, &leased, done, 10).await;
    assert_eq!(
        look.result(id(1), at(509)).await,
        Ok(ResultOutcome::Ready(result))
    );
    assert_eq!(look.result(id(1), at(510)).await, Ok(ResultOutcome::Gone));
    while backend.reap(at(510)).await.expect("reap") > 0 {}
    assert_eq!(
        look.result(id(1), at(0)).await,
        Ok(ResultOutcome::Gone),
        "reaped"
    );
    assert_eq!(state(&backend, 1).await, Some(State::Succeeded));
}

async fn dead_letters_keep_everything(backend: Backend) {
    let look = inspect(&backend);
    enqueue(&backend, message(1, 0)).await;
    let leased = lease_one(&backend, 0).await;
    settle(&backend, &leased, retry(10), 1).await;
    let leased = lease_one(&backend, 10).await;
    let long = Bytes::from(vec![b'x'; 10_000]);
    let dead = Settle::Dead {
        reason: "exhausted".to_owned(),
        attempt: Some(attempt(500)),
        excerpt: long,
        retain_ms: None,
    };
    settle(&backend, &leased, dead, 11).await;
    let letter = look
        .dead_letter(id(1))
        .await
        .expect("dead_letter")
        .expect("dead");
    assert_eq!(
        (letter.reason.as_str(), letter.died_at),
        ("exhausted", at(11))
    );
    assert_eq!(letter.last_status, Some(500));
    assert_eq!(letter.last_body_excerpt.len(), 4096);
    assert_eq!(letter.status.attempts.len(), 2);
    let request = letter.message.expect("the whole request");
    assert_eq!(
        (request.body, request.headers),
        (message(1, 0).body, message(1, 0).headers)
    );
    assert_eq!(look.result(id(1), at(11)).await, Ok(ResultOutcome::Gone));
    let counts = counts(&backend, 11).await;
    assert_eq!((counts.dead, counts.dead_total, counts.bytes), (1, 1, 0));
    assert!(counts.dead_bytes > 0);
    assert_eq!(look.dead_letter(id(2)).await, Ok(None));
}

async fn replay_starts_over_at_the_tail(backend: Backend) {
    let look = inspect(&backend);
    for n in 1..=3 {
        enqueue(&backend, message(n, 0)).await;
    }
    let leased = lease(&backend, 2, 0).await;
    settle(&backend, &leased[0], dead("exhausted"), 1).await;
    settle(&backend, &leased[1], dead("client_error"), 2).await;
    let matching = Selection::Matching {
        queue: QUEUE.to_owned(),
        filter: DeadFilter {
            reason: Some("exhausted".to_owned()),
            ..DeadFilter::default()
        },
        max: 10,
    };
    let report = look
        .replay(matching, to("elsewhere"), at(5000))
        .await
        .expect("replay");
    assert_eq!(report.replayed, [id(1)]);
    let again = look
        .replay(Selection::Ids(vec![id(1)]), Replay::default(), at(5001))
        .await
        .expect("replay");
    assert_eq!((again.replayed.len(), again.skipped), (0, vec![id(1)]));
    let leased = lease(&backend, 9, 5000).await;
    assert_eq!(numbers(&leased), [3, 1], "after what was there");
    let replayed = &leased[1];
    assert_eq!((replayed.attempts_so_far, replayed.replays), (0, 1));
    assert_eq!(
        replayed.message.enqueued_at,
        at(5000),
        "its age starts over"
    );
    assert_eq!(replayed.created_at, at(0));
    assert_eq!(replayed.message.target, "elsewhere");
    assert_eq!(replayed.message.body, message(1, 0).body);
    settle(&backend, replayed, done(), 5001).await;
    let counts = counts(&backend, 5001).await;
    assert_eq!(
        (counts.enqueued_total, counts.dead_total, counts.dead),
        (3, 2, 1)
    );
}

async fn a_replay_keeps_its_rate(backend: Backend) {
    for n in 1..=5 {
        enqueue(&backend, message(n, 0)).await;
    }
    for lease in lease(&backend, 9, 0).await {
        settle(&backend, &lease, dead("no"), 1).await;
    }
    let all = Selection::Matching {
        queue: QUEUE.to_owned(),
        filter: DeadFilter::default(),
        max: 9,
    };
    let eight_a_second = Replay {
        per_second: std::num::NonZeroU32::new(8),
        ..Replay::default()
    };
    let report = inspect(&backend)
        .replay(all, eight_a_second, at(1000))
        .await;
    let ids: Vec<MessageId> = (1..=5).map(id).collect();
    assert_eq!(report.expect("replay").replayed, ids);
    assert_eq!(counts(&backend, 1000).await.dead, 0, "all at once");
    let due = async |ms| numbers(&lease(&backend, 9, ms).await);
    assert_eq!(due(1000).await, [1]);
    assert!(due(1124).await.is_empty());
    assert_eq!(due(1125).await, [2]);
    assert_eq!(due(1500).await, [3, 4, 5]);
}

async fn purge_forgets_the_request(backend: Backend) {
    let look = inspect(&backend);
    for n in 1..=4 {
        enqueue(&backend, message(n, 0)).await;
    }
    let leased = lease(&backend, 2, 0).await;
    settle(&backend, &leased[0], dead("no"), 1).await;
    assert_eq!(
        look.purge(Selection::Ids(vec![id(1), id(3)]), at(2)).await,
        Ok(1),
        "only the dead"
    );
    assert_eq!(look.dead_letter(id(1)).await, Ok(None));
    assert_eq!(
        state(&backend, 1).await,
        Some(State::Dead),
        "its status stays for a while"
    );
    assert_eq!(
        look.purge_pending(QUEUE, at(3)).await,
        Ok(2),
        "all but the leased one"
    );
    assert_eq!(state(&backend, 3).await, Some(State::Cancelled));
    assert_eq!(state(&backend, 2).await, Some(State::Delivering));
    let counts = counts(&backend, 3).await;
    assert_eq!(
        (counts.purged_total, counts.dead, counts.pending()),
        (3, 0, 1)
    );
}

async fn limits_refuse(backend: Backend) {
    let limits = QueueLimits {
        max_depth: 2,
        ..QueueLimits::NONE
    };
    let refused = |limits, n| backend.enqueue(message(n, 0), limits, at(0));
    assert!(refused(limits, 1).await.is_ok());
    assert!(refused(limits, 2).await.is_ok());
    assert_eq!(
        refused(limits, 3).await,
        Err(EnqueueError::Full { depth: 2, max: 2 })
    );
    let weight = message(4, 0).weight();
    let bytes = counts(&backend, 0).await.bytes;
    assert_eq!(bytes, 2 * weight);
    let tight = QueueLimits {
        max_bytes: bytes + weight - 1,
        ..QueueLimits::NONE
    };
    let full = EnqueueError::FullBytes {
        bytes,
        max: bytes + weight - 1,
    };
    assert_eq!(refused(tight, 4).await, Err(full));
    let small = QueueLimits {
        max_message_bytes: weight - 1,
        ..QueueLimits::NONE
    };
    let large = EnqueueError::TooLarge {
        bytes: weight,
        max: weight - 1,
    };
    assert_eq!(refused(small, 4).await, Err(large));
    let leased = lease_one(&backend, 0).await;
    settle(&backend, &leased, done(), 1).await;
    assert!(refused(limits, 5).await.is_ok(), "room again");
}

async fn a_quota_is_each_callers_own(backend: Backend) {
    let of = |caller: &str, n: u64| Message {
        caller: caller.to_owned(),
        ..message(n, 0)
    };
    let weight = message(1, 0).weight();
    let quota = |max_depth, max_bytes| QueueLimits {
        per_caller: Some(Quota {
            max_depth,
            max_bytes,
        }),
        ..QueueLimits::NONE
    };
    let two = quota(2, u64::MAX);
    let accepted = |out: Result<EnqueueOutcome, EnqueueError>| {
        assert!(matches!(out, Ok(EnqueueOutcome::Accepted(_))), "{out:?}");
    };
    accepted(backend.enqueue(of("a", 1), two, at(0)).await);
    accepted(backend.enqueue(of("a", 2), two, at(0)).await);
    let full = EnqueueError::CallerFull {
        caller: "a".to_owned(),
        depth: 2,
        max: 2,
    };
    let refused = backend.enqueue(of("a", 3), two, at(0)).await;
    assert_eq!(refused, Err(full.clone()));
    let with_copy = vec![of("b", 5)];
    let both = backend.enqueue_with(of("b", 4), with_copy, quota(1, u64::MAX), at(0));
    assert!(
        matches!(both.await, Err(EnqueueError::CallerFull { .. })),
        "a copy counts"
    );
    let bytes = quota(9, 2 * weight);
    accepted(backend.enqueue(of("b", 4), bytes, at(0)).await);
    accepted(backend.enqueue(of("b", 5), bytes, at(0)).await);
    let over = EnqueueError::CallerFullBytes {
        caller: "b".to_owned(),
        bytes: 2 * weight,
        max: 2 * weight,
    };
    assert_eq!(backend.enqueue(of("b", 6), bytes, at(0)).await, Err(over));
    // What waits for its next try counts, what has ended does not.
    let leases = lease(&backend, 2, 0).await;
    assert_eq!(numbers(&leases), [1, 2]);
    settle(&backend, &leases[0], retry(5), 1).await;
    let refused = backend.enqueue(of("a", 3), two, at(1)).await;
    assert_eq!(refused, Err(full));
    settle(&backend, &leases[1], dead("no"), 1).await;
    accepted(backend.enqueue(of("a", 3), two, at(1)).await);
    let cancelled = inspect(&backend).cancel(id(3), at(2)).await;
    assert_eq!(cancelled, Ok(CancelOutcome::Cancelled));
    accepted(backend.enqueue(of("a", 7), two, at(2)).await);
}

async fn a_finished_message_is_forgotten_on_request(backend: Backend) {
    let forget = async |n| inspect(&backend).forget(id(n)).await;
    assert_eq!(forget(1).await, Ok(ForgetOutcome::Unknown));
    for n in 1..=3 {
        let mut message = message(n, 0);
        message.idempotency_key = Some(key(&format!("k{n}"), 1));
        enqueue(&backend, message).await;
    }
    let kept = |state| Ok(ForgetOutcome::Kept(state));
    assert_eq!(forget(1).await, kept(State::Queued));
    let leases = lease(&backend, 2, 0).await;
    assert_eq!(forget(1).await, kept(State::Delivering));
    settle(&backend, &leases[0], done(), 1).await;
    settle(&backend, &leases[1], dead("no"), 1).await;
    assert_eq!(forget(2).await, kept(State::Dead));
    assert_eq!(forget(1).await, Ok(ForgetOutcome::Forgotten));
    assert_eq!(state(&backend, 1).await, None);
    let result = inspect(&backend).result(id(1), at(2)).await;
    assert_eq!(result, Ok(ResultOutcome::Unknown));
    assert_eq!(forget(1).await, Ok(ForgetOutcome::Unknown));
    let mut again = message(9, 2);
    again.idempotency_key = Some(key("k1", 1));
    let again = backend.enqueue(again, QueueLimits::NONE, at(2)).await;
    assert!(
        matches!(again, Ok(EnqueueOutcome::Duplicate { id: first, .. }) if first == id(1)),
        "{again:?}"
    );
    let letter = inspect(&backend).dead_letter(id(2)).await;
    assert!(letter.is_ok_and(|letter| letter.is_some()), "it stays");
}

/// Needs the default [`crate::Retention`].
async fn reap_forgets_what_is_past_its_time(backend: Backend) {
    const DAY: u64 = 86_400_000;
    for n in 1..=2 {
        let mut message = message(n, 0);
        message.idempotency_key = Some(key(&n.to_string(), 1));
        enqueue(&backend, message).await;
    }
    let leased = lease(&backend, 2, 0).await;
    settle(&backend, &leased[0], done(), 0).await;
    settle(&backend, &leased[1], dead("no"), 0).await;
    let reap = async |ms| while backend.reap(at(ms)).await.expect("reap") > 0 {};
    reap(DAY - 1).await;
    assert_eq!(state(&backend, 1).await, Some(State::Succeeded));
    reap(DAY).await;
    assert_eq!(state(&backend, 1).await, None);
    assert_eq!(counts(&backend, DAY).await.dead, 1);
    reap(14 * DAY).await;
    assert_eq!(counts(&backend, 14 * DAY).await.purged_total, 1);
    reap(15 * DAY).await;
    assert_eq!(state(&backend, 2).await, None);
}

/// Needs the default [`crate::Retention`].
async fn a_dead_letter_is_kept_as_long_as_its_death_says(backend: Backend) {
    const DAY: u64 = 86_400_000;
    let retained = |retain_ms| Settle::Dead {
        reason: "no".to_owned(),
        attempt: None,
        excerpt: Bytes::new(),
        retain_ms,
    };
    for n in 1..=3 {
        enqueue(&backend, message(n, 0)).await;
    }
    let leased = lease(&backend, 3, 0).await;
    settle(&backend, &leased[0], retained(Some(2000)), 0).await;
    settle(&backend, &leased[1], retained(None), 0).await;
    settle(&backend, &leased[2], retained(Some(30 * DAY)), 0).await;
    let held = async |ms| {
        while backend.reap(at(ms)).await.expect("reap") > 0 {}
        counts(&backend, ms).await.dead
    };
    assert_eq!(held(1999).await, 3);
    assert_eq!(held(2000).await, 2, "shorter than the default");
    assert_eq!(held(14 * DAY).await, 1, "the default");
    assert_eq!(held(30 * DAY - 1).await, 1, "longer than the default");
    assert_eq!(held(30 * DAY).await, 0);
}

/// Needs the default [`crate::Retention`].
async fn dead_letters_do_not_push_each_other_out(backend: Backend) {
    const MANY: u64 = 10_001;
    join_all((0..MANY).map(|n| enqueue(&backend, message(n, 0)))).await;
    let leased = lease(&backend, 20_000, 0).await;
    let settled = leased.iter().map(|l| settle(&backend, l, dead("no"), 0));
    join_all(settled).await;
    while backend.reap(at(1)).await.expect("reap") > 0 {}
    let counts = counts(&backend, 1).await;
    assert_eq!((counts.dead, counts.purged_total), (MANY, 0));
}

/// What is exported, taken away and restored is as it was; here in the same store, where it is known
/// as long as its tombstone is.
async fn an_exported_message_is_restored_once_as_it_was(backend: Backend) {
    let mut keyed = message(1, 0);
    keyed.idempotency_key = Some(IdemKey {
        scope: "scope".to_owned(),
        key: "key".to_owned(),
        fingerprint: [1; 32],
        ttl_ms: 1_000_000_000,
    });
    for message in [keyed.clone(), message(2, 0), message(3, 0)] {
        let stored = backend.enqueue(message, QueueLimits::NONE, at(0)).await;
        stored.expect("enqueue");
    }
    let leases = lease(&backend, 2, 1).await;
    settle(&backend, &leases[0], retry(500), 2).await;
    settle(&backend, &leases[1], dead("no"), 3).await;
    let look = inspect(&backend);
    let mut exported = Vec::new();
    for n in 1..=3 {
        let one = look.export(id(n)).await.expect("export");
        exported.push(one.expect("pending or dead"));
    }
    assert_eq!(exported[0].message.body, keyed.body);
    assert_eq!(
        (exported[0].attempts_spent, exported[2].attempts_spent),
        (1, 0)
    );
    let death = exported[1].death.as_ref().expect("it is dead");
    assert_eq!((death.reason.as_str(), death.died_at), ("no", at(3)));
    for one in &exported {
        let known = backend.restore(one.clone(), at(4)).await.expect("restore");
        assert!(!known, "{} is known", one.message.id);
    }
    let counts = look.counts(QUEUE, at(4)).await.expect("counts");
    assert_eq!(
        (counts.enqueued_total, counts.pending(), counts.dead),
        (3, 2, 1)
    );

    // Another id with the same key is the same operation.
    let mut again = exported[0].clone();
    again.message.id = id(9);
    assert!(!backend.restore(again, at(4)).await.expect("restore"));
    // New ids stand for another store.
    for (n, one) in exported.iter().enumerate() {
        let mut one = one.clone();
        one.message.id = id(10 + n as u64);
        one.message.idempotency_key = None;
        assert!(backend.restore(one.clone(), at(4)).await.expect("restore"));
        assert!(
            !backend.restore(one.clone(), at(4)).await.expect("restore"),
            "twice"
        );
        let back = look.export(one.message.id).await.expect("export");
        assert_eq!(back.expect("it is in"), one);
    }
    let counts = look.counts(QUEUE, at(4)).await.expect("counts");
    assert_eq!((counts.pending(), counts.dead, counts.drift()), (4, 2, 0));
    let due: Vec<MessageId> = lease(&backend, 9, 5)
        .await
        .iter()
        .map(|l| l.message.id)
        .collect();
    assert_eq!(due, [id(3), id(12)], "the others are not due yet");
    assert_eq!(look.export(id(77)).await.expect("export"), None);
}

async fn wait_due_wakes(backend: Backend) {
    let look = async |ms| {
        let request = LeaseRequest {
            queue: QUEUE.to_owned(),
            max: 1,
            lease_for_ms: 1000,
            now: at(ms),
            limits: TargetLimits::default(),
        };
        backend.lease(request).await.expect("lease")
    };
    let patience = Duration::from_secs(10);
    let empty = look(0).await;
    let wait = backend.wait_due(QUEUE, empty.cursor, at(0));
    let (_, woken) = join(
        enqueue(&backend, message(1, 0)),
        tokio::time::timeout(patience, wait),
    )
    .await;
    woken.expect("an enqueue wakes");

    let batch = look(0).await;
    assert_eq!(
        batch.cursor.next_due,
        Some(at(1000)),
        "the end of the lease"
    );
    settle(&backend, &batch.leases[0], retry(1020), 1).await;
    tokio::time::timeout(patience, backend.wait_due(QUEUE, batch.cursor, at(1)))
        .await
        .expect("a retry wakes");
    let batch = look(1000).await;
    assert!(batch.leases.is_empty());
    assert_eq!(batch.cursor.next_due, Some(at(1020)));
    tokio::time::timeout(patience, backend.wait_due(QUEUE, batch.cursor, at(1000)))
        .await
        .expect("a due time wakes");
}

async fn wait_final_sees_the_end(backend: Backend) {
    let look = inspect(&backend);
    assert_eq!(wait_final(look, id(1)).await, Ok(None), "unknown");
    enqueue(&backend, message(1, 0)).await;
    let deliver = async {
        let leased = lease_one(&backend, 0).await;
        tokio::task::yield_now().await;
        settle(&backend, &leased, retry(1), 1).await;
        let leased = lease_one(&backend, 1).await;
        tokio::task::yield_now().await;
        settle(&backend, &leased, done(), 2).await;
    };
    let wait = tokio::time::timeout(Duration::from_secs(10), wait_final(look, id(1)));
    let (seen, ()) = join(wait, deliver).await;
    let view = seen.expect("woken").expect("status").expect("known");
    assert_eq!((view.state, view.attempts_spent), (State::Succeeded, 2));
    let again = look
        .wait_change(id(1), 0)
        .await
        .expect("status")
        .expect("known");
    assert_eq!(again.version, view.version, "0 is older than everything");
}

async fn lists_come_in_pages(backend: Backend) {
    let look = inspect(&backend);
    for n in 1..=5 {
        enqueue(&backend, message(n, 0)).await;
    }
    let leased = lease(&backend, 2, 0).await;
    settle(&backend, &leased[0], dead("no"), 1).await;
    settle(&backend, &leased[1], done(), 1).await;
    let mut page = PageRequest {
        after: None,
        limit: 2,
    };
    let mut seen = Vec::new();
    loop {
        let part = look.list(QUEUE, None, page).await.expect("list");
        assert!(part.items.len() <= 2);
        seen.extend(part.items.iter().map(|view| view.id));
        page.after = part.next;
        if part.next.is_none() {
            break;
        }
    }
    assert_eq!(seen, [id(3), id(4), id(5)]);
    let all = PageRequest::default();
    let done = look
        .list(QUEUE, Some(State::Succeeded), all)
        .await
        .expect("list");
    assert_eq!(done.items.len(), 1);
    let dead = look
        .dead(QUEUE, DeadFilter::default(), all)
        .await
        .expect("dead");
    assert_eq!(dead.items.len(), 1);
    assert!(dead.items[0].message.is_none(), "lists carry no requests");
    let other = DeadFilter {
        target: Some("other".to_owned()),
        ..DeadFilter::default()
    };
    assert!(
        look.dead(QUEUE, other, all)
            .await
            .expect("dead")
            .items
            .is_empty()
    );
    assert!(
        look.list("nowhere", None, all)
            .await
            .expect("list")
            .items
            .is_empty()
    );
}
