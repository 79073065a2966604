//! An open loop: requests are due at fixed times, whatever happened to those before.
//!
//! A latency counts from when the request was due. A slow answer therefore costs every request
//! that had to wait behind it, and nothing is left out because the client was held up
//! ("coordinated omission"). How late requests were sent is reported as `lag`, so that a starved
//! load is seen and not taken for a slow proxy.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::Full;
use hyper::client::conn::http2::SendRequest;
use outrigger_tests::process::now;
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create,
    timerfd_settime,
};
use serde_json::{Value, json};
use tokio::sync::Notify;

use crate::latency::Latencies;
use crate::{Protocol, Target, announce, http1, http2};

/// Asked on every connection before anything counts.
const WARM_UP: usize = 20;
/// An answer that takes longer has failed, as have those that wait for a connection by then.
const PATIENCE: Duration = Duration::from_secs(10);

struct Results {
    latencies: Latencies,
    lag: Latencies,
    done: u64,
    failed: u64,
    error: Option<String>,
}

impl Results {
    fn record(&mut self, due: Instant, result: io::Result<()>) {
        match result {
            Ok(()) => {
                self.done += 1;
                self.latencies.record(now() - due);
            }
            Err(error) => {
                self.failed += 1;
                self.error.get_or_insert(error.to_string());
            }
        }
    }
}

struct State {
    results: RefCell<Results>,
    /// HTTP/1.1 only: the connection that waited longest is taken first.
    idle: RefCell<VecDeque<http1::Connection>>,
    due: RefCell<VecDeque<Instant>>,
    answered: Notify,
}

pub(crate) async fn run(
    target: &Target,
    rate: u32,
    period: Duration,
    connections: usize,
) -> io::Result<Value> {
    let state = Rc::new(State {
        results: RefCell::new(Results {
            latencies: Latencies::new(),
            lag: Latencies::new(),
            done: 0,
            failed: 0,
            error: None,
        }),
        idle: RefCell::default(),
        due: RefCell::default(),
        answered: Notify::new(),
    });
    let sender = Sender::open(target, connections, &state).await?;
    let every = Duration::from_secs(1) / rate.max(1);
    announce("ready")?;
    let clock = Ticks::start(every)?;
    let began = now();
    let mut sent: u32 = 0;
    while every * sent < period {
        clock.next().await;
        let current = now();
        loop {
            let due = began + every * sent;
            if due > current || every * sent >= period {
                break;
            }
            state.results.borrow_mut().lag.record(current - due);
            sender.send(&state, due, usize::try_from(sent).unwrap_or(0));
            sent += 1;
        }
    }
    let all = u64::from(sent);
    let settled = async {
        loop {
            let over = {
                let results = state.results.borrow();
                results.done + results.failed >= all
            };
            if over {
                return;
            }
            state.answered.notified().await;
        }
    };
    let _ = tokio::time::timeout(PATIENCE, settled).await;
    let seconds = (now() - began).as_secs_f64();
    let results = state.results.borrow();
    Ok(json!({
        "requests": all,
        "succeeded": results.done,
        "failed": all - results.done,
        "error": results.error,
        "seconds": seconds,
        "latency_us": results.latencies.json(),
        "lag_us": results.lag.json(),
    }))
}

/// The connections.
enum Sender {
    H1(Rc<[u8]>),
    H2(
        Vec<SendRequest<Full<Bytes>>>,
        Box<http::Request<Full<Bytes>>>,
        bool,
    ),
}

impl Sender {
    async fn open(target: &Target, connections: usize, state: &State) -> io::Result<Self> {
        if target.protocol == Protocol::H1 {
            let request = http1::request(target, &target.path, false);
            for _ in 0..connections {
                let mut connection = http1::Connection::open(target).await?;
                for _ in 0..WARM_UP {
                    connection.exchange(&request).await?;
                }
                state.idle.borrow_mut().push_back(connection);
            }
            return Ok(Self::H1(request.into()));
        }
        let request = http2::request(target)?;
        let grpc = target.protocol == Protocol::Grpc;
        let mut senders = Vec::new();
        for _ in 0..connections {
            let mut sender = http2::open(target.to).await?;
            for _ in 0..WARM_UP {
                http2::exchange(&mut sender, request.clone(), grpc).await?;
            }
            senders.push(sender);
        }
        Ok(Self::H2(senders, Box::new(request), grpc))
    }

    fn send(&self, state: &Rc<State>, due: Instant, number: usize) {
        match self {
            Self::H1(request) => {
                let idle = state.idle.borrow_mut().pop_front();
                match idle {
                    Some(connection) => {
                        let (state, request) = (Rc::clone(state), Rc::clone(request));
                        tokio::task::spawn_local(work(state, connection, request, due));
                    }
                    None => state.due.borrow_mut().push_back(due),
                }
            }
            Self::H2(senders, request, grpc) => {
                let mut sender = senders[number % senders.len()].clone();
                let (state, request, grpc) = (Rc::clone(state), (**request).clone(), *grpc);
                tokio::task::spawn_local(async move {
                    let result = http2::exchange(&mut sender, request, grpc).await;
                    state.results.borrow_mut().record(due, result);
                    state.answered.notify_one();
                });
            }
        }
    }
}

/// Exchanges on one connection until nothing is due.
async fn work(
    state: Rc<State>,
    mut connection: http1::Connection,
    request: Rc<[u8]>,
    due: Instant,
) {
    let mut due = due;
    loop {
        let result = connection.exchange(&request).await;
        let broken = result.is_err();
        state.results.borrow_mut().record(due, result);
        state.answered.notify_one();
        if broken {
            // The round counts for nothing now; the others may go on.
            return;
        }
        let next = state.due.borrow_mut().pop_front();
        match next {
            Some(next) => due = next,
            None => return state.idle.borrow_mut().push_back(connection),
        }
    }
}

/// A timer of the kernel's resolution, awaited by a thread: the runtime's own rounds to a
/// millisecond.
struct Ticks(Arc<Notify>);

impl Ticks {
    fn start(every: Duration) -> io::Result<Self> {
        let timer = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::empty())?;
        let each = Timespec {
            tv_sec: i64::try_from(every.as_secs()).map_err(io::Error::other)?,
            tv_nsec: i64::from(every.subsec_nanos()),
        };
        let both = Itimerspec {
            it_interval: each,
            it_value: each,
        };
        timerfd_settime(&timer, TimerfdTimerFlags::empty(), &both)?;
        let ticked = Arc::new(Notify::new());
        let ticks = Self(Arc::clone(&ticked));
        // Ends with its reader, or with the process.
        std::thread::spawn(move || {
            while Arc::strong_count(&ticked) > 1 && rustix::io::read(&timer, &mut [0_u8; 8]).is_ok()
            {
                ticked.notify_one();
            }
        });
        Ok(ticks)
    }

    /// Returns after the next tick, or at once when some have passed.
    async fn next(&self) {
        self.0.notified().await;
    }
}
