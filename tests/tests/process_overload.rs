//! One sidecar as a process, with more asked of it than its services can do.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::Duration;

use futures_util::future::join_all;
use outrigger_tests::client::{Ask, Client};
use outrigger_tests::mesh::{route, service};
use outrigger_tests::process::{Sidecar, SidecarFiles, scratch};
use outrigger_tests::until_true;
use outrigger_tests::upstream::{Gate, Reply, Upstream};
use tokio::time::Instant;

/// The tests here measure, so one at a time.
static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

fn start(mesh: &str) -> (tempfile::TempDir, Sidecar) {
    let dir = scratch();
    let files = SidecarFiles::write(dir.path(), "web", None, "workers: 1");
    files.set_mesh(mesh);
    (dir, files.start())
}

fn median(mut of: Vec<f64>) -> f64 {
    of.sort_by(f64::total_cmp);
    of[of.len() / 2]
}

/// The time that 99 of 100 calls stay under.
fn p99(mut of: Vec<Duration>) -> f64 {
    of.sort();
    of[(of.len() * 99).div_ceil(100) - 1].as_secs_f64()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_saturated_route_leaves_the_latency_of_another_alone() {
    const ROUNDS: usize = 5;
    /// More rounds are taken only where the machine was too busy for the first to agree.
    const MOST_ROUNDS: usize = 25;
    let _alone = ALONE.lock().await;
    let (slow_gate, fast) = (
        Gate::new(),
        Upstream::h1(|_| Reply::ok("fast").delay(Duration::from_millis(20))).await,
    );
    let held = slow_gate.clone();
    let slow = Upstream::h1(move |_| Reply::ok("slow").hold(&held)).await;
    let mesh = service("fast", &[fast.addr], "")
        + &service(
            "slow",
            &[slow.addr],
            "limits: {maxInFlight: 100, maxPending: 100, maxPendingWait: 30s}",
        )
        + &route("slow", &["{timeouts: {request: 0s}}"]);
    // Two alike, so that both are measured in the same moments.
    let (_one_dir, quiet) = start(&mesh);
    let (_other_dir, saturated) = start(&mesh);
    let to = saturated.outbound;
    let stop = Arc::new(AtomicBool::new(false));
    let refused = Arc::new(AtomicUsize::new(0));
    let callers = (0..220).map(|_| {
        let (stop, refused) = (Arc::clone(&stop), Arc::clone(&refused));
        tokio::spawn(async move {
            let mut client = Client::h1(to).await;
            while !stop.load(Relaxed) {
                // Held for as long as the test lasts, or refused and back after a pause.
                let answer = client.open(Ask::get("slow", "/")).await;
                if answer.is_ok_and(|answer| answer.status() == 503) {
                    refused.fetch_add(1, Relaxed);
                }
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        })
    });
    let callers: Vec<_> = callers.collect();
    until_true("the slow service has what it may have", || {
        slow.active() == 100 && refused.load(Relaxed) >= 20
    })
    .await;
    let mut ratios = Vec::new();
    while ratios.len() < ROUNDS || (median(ratios.clone()) > 1.2 && ratios.len() < MOST_ROUNDS) {
        let (alone, beside) = tokio::join!(calls(quiet.outbound, "fast"), calls(to, "fast"));
        ratios.push(p99(beside) / p99(alone));
    }
    println!("p99 beside a saturated route to p99 alone: {ratios:.3?}");
    assert_eq!(slow.active(), 100, "it is saturated to the end");
    assert!(median(ratios.clone()) <= 1.2, "{ratios:.3?}");
    stop.store(true, Relaxed);
    slow_gate.open();
    for caller in callers {
        caller.abort();
    }
}

/// Eight callers, forty calls each, one after the other.
async fn calls(to: SocketAddr, host: &'static str) -> Vec<Duration> {
    let callers = (0..8).map(|_| async move {
        let mut client = Client::h1(to).await;
        let mut took = Vec::new();
        for _ in 0..40 {
            let begun = Instant::now();
            assert_eq!(client.call(Ask::get(host, "/")).await.status, 200);
            took.push(begun.elapsed());
        }
        took
    });
    join_all(callers).await.into_iter().flatten().collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn under_three_times_its_capacity_a_service_keeps_doing_what_it_can() {
    /// Each takes half a second, so the service does a hundred a second.
    const PLACES: usize = 50;
    const TAKES: Duration = Duration::from_millis(500);
    const SPAN: Duration = Duration::from_secs(4);
    let _alone = ALONE.lock().await;
    let upstream = Upstream::h1(|_| Reply::ok("done").delay(TAKES)).await;
    let limits =
        format!("limits: {{maxInFlight: {PLACES}, maxPending: 100, maxPendingWait: 250ms}}");
    let (_dir, sidecar) = start(&service("orders", &[upstream.addr], &limits));
    let to = sidecar.outbound;

    // What it can do: as many callers as there are places.
    let capacity = goodput(to, PLACES, Duration::ZERO, SPAN).await;
    let resident = sidecar.process.memory("VmRSS");
    // Three times that: whoever is refused comes back as often as makes it so.
    let (overload, offered) = {
        let before = asked(&sidecar);
        let done = goodput(to, 4 * PLACES, Duration::from_millis(500), SPAN).await;
        (done, (asked(&sidecar) - before) / SPAN.as_secs_f64())
    };
    let grown = sidecar.process.memory("VmRSS").saturating_sub(resident);
    println!(
        "{capacity} a second at capacity, {overload} with {offered} offered; {grown} bytes more"
    );
    assert!(offered >= 2.5 * capacity, "{offered} offered");
    assert!(overload >= 0.9 * capacity, "{overload} of {capacity}");
    // Its 150 more connections, with a request on each, and nothing that grows with what is refused.
    assert!(grown < 24 << 20, "{grown} bytes more");
    let limit = |limit| sidecar.metric("outrigger_limit_rejected_total", &["orders", limit]);
    let refused = limit("limits.maxPending\"").unwrap_or(0.0)
        + limit("limits.maxPendingWait\"").unwrap_or(0.0);
    assert!(refused > 100.0, "{refused} refused");
    assert_eq!(
        sidecar.metric("outrigger_breaker_state", &["orders"]),
        Some(0.0),
        "a full bulkhead is no broken service"
    );
}

fn asked(sidecar: &Sidecar) -> f64 {
    let of = |status| sidecar.metric("outrigger_requests_total", &["orders", status]);
    of("status=\"200\"").unwrap_or(0.0) + of("status=\"503\"").unwrap_or(0.0)
}

/// Requests a second that are done, of `callers` in `span`; each waits for `pause` after a refusal.
async fn goodput(to: SocketAddr, callers: usize, pause: Duration, span: Duration) -> f64 {
    let done = AtomicUsize::new(0);
    let one = || async {
        let mut client = Client::h1(to).await;
        loop {
            match client.call(Ask::get("orders", "/")).await.status {
                200 => drop(done.fetch_add(1, Relaxed)),
                503 => tokio::time::sleep(pause).await,
                status => panic!("{status}"),
            }
        }
    };
    let all = join_all((0..callers).map(|_| one()));
    // The first answers are all at once; what is counted begins behind them.
    let measuring = async {
        until_true("the first are done", || {
            done.load(Relaxed) >= callers.min(50)
        })
        .await;
        let (before, begun) = (done.load(Relaxed), Instant::now());
        tokio::time::sleep(span).await;
        (done.load(Relaxed) - before) as f64 / begun.elapsed().as_secs_f64()
    };
    tokio::select! {
        _ = all => unreachable!("callers do not end"),
        rate = measuring => rate,
    }
}
