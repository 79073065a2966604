//! A closed loop: an answer lets the next request go. Says what the proxy spends on a request, and
//! nothing about latency.

use std::cell::Cell;
use std::io;
use std::rc::Rc;

use outrigger_tests::process::now;
use serde_json::{Value, json};
use tokio::task::JoinSet;

use crate::{Protocol, Target, announce, http1, http2};

/// What is left to send, and what failed.
#[derive(Default)]
struct Work {
    left: Cell<u64>,
    failed: Cell<u64>,
    error: Cell<Option<String>>,
}

impl Work {
    fn take(&self) -> bool {
        let left = self.left.get();
        self.left.set(left.saturating_sub(1));
        left > 0
    }

    fn fail(&self, error: &io::Error) {
        self.failed.set(self.failed.get() + 1);
        self.error.set(Some(error.to_string()));
    }
}

/// Over kept connections: `ready` says that all are open and were used once, together, so that the
/// proxy has as many connections to the service.
pub(crate) async fn run(
    target: &Target,
    requests: u64,
    connections: usize,
    streams: usize,
) -> io::Result<Value> {
    let work = Rc::new(Work::default());
    work.left.set(requests);
    let mut tasks = JoinSet::new();
    let began;
    if target.protocol == Protocol::H1 {
        let request: Rc<[u8]> = http1::request(target, &target.path, false).into();
        let mut warming = JoinSet::new();
        for _ in 0..connections {
            let mut connection = http1::Connection::open(target).await?;
            let request = Rc::clone(&request);
            warming.spawn_local(async move {
                connection.exchange(&request).await?;
                io::Result::Ok(connection)
            });
        }
        let mut open = Vec::with_capacity(connections);
        while let Some(warmed) = warming.join_next().await {
            open.push(warmed.map_err(io::Error::other)??);
        }
        announce("ready")?;
        began = now();
        for mut connection in open {
            let (work, request) = (Rc::clone(&work), Rc::clone(&request));
            tasks.spawn_local(async move {
                while work.take() {
                    if let Err(error) = connection.exchange(&request).await {
                        return work.fail(&error);
                    }
                }
            });
        }
    } else {
        let request = http2::request(target)?;
        let grpc = target.protocol == Protocol::Grpc;
        let mut open = Vec::with_capacity(connections);
        for _ in 0..connections {
            let mut sender = http2::open(target.to).await?;
            http2::exchange(&mut sender, request.clone(), grpc).await?;
            open.push(sender);
        }
        announce("ready")?;
        began = now();
        for sender in open {
            for _ in 0..streams {
                let (work, request, mut sender) =
                    (Rc::clone(&work), request.clone(), sender.clone());
                tasks.spawn_local(async move {
                    while work.take() {
                        if let Err(error) =
                            http2::exchange(&mut sender, request.clone(), grpc).await
                        {
                            work.fail(&error);
                        }
                    }
                });
            }
        }
    }
    finish(tasks, &work, requests, began).await
}

/// Every request on a connection of its own, closed by the proxy.
pub(crate) async fn connect(
    target: &Target,
    requests: u64,
    concurrency: usize,
) -> io::Result<Value> {
    let work = Rc::new(Work::default());
    work.left.set(requests);
    let request: Rc<[u8]> = http1::request(target, &target.path, true).into();
    let mut tasks = JoinSet::new();
    announce("ready")?;
    let began = now();
    for _ in 0..concurrency {
        let (work, request) = (Rc::clone(&work), Rc::clone(&request));
        let target = target.clone();
        tasks.spawn_local(async move {
            while work.take() {
                let one = async {
                    let mut connection = http1::Connection::open(&target).await?;
                    connection.exchange(&request).await?;
                    connection.closed().await
                };
                if let Err(error) = one.await {
                    work.fail(&error);
                }
            }
        });
    }
    finish(tasks, &work, requests, began).await
}

async fn finish(
    mut tasks: JoinSet<()>,
    work: &Work,
    requests: u64,
    began: std::time::Instant,
) -> io::Result<Value> {
    while let Some(ended) = tasks.join_next().await {
        ended.map_err(io::Error::other)?;
    }
    // Connections that broke left their share unsent.
    let failed = work.failed.get() + work.left.get();
    let seconds = (now() - began).as_secs_f64();
    Ok(json!({
        "requests": requests,
        "succeeded": requests - failed,
        "failed": failed,
        "error": work.error.take(),
        "seconds": seconds,
    }))
}
