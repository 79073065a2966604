//! What the benches measure with: an origin that costs little and load that keeps its promises.
//!
//! Not for users; `tests/bench/README.md` says which command drives which part. Every command runs
//! on one thread, says `ready` and waits for a line on standard input before it measures, prints one
//! line of JSON when it is done, and is told apart by what it holds constant:
//!
//! | command | constant |
//! |---|---|
//! | `origin` | – it answers |
//! | `rate` | requests per second, whatever the answers do (an open loop) |
//! | `closed` | requests in flight (a closed loop), over kept connections |
//! | `connect` | requests in flight, each on a connection of its own |
//! | `hold` | connections, in phases that the driver ends by a line on standard input |

mod closed;
mod hold;
mod http1;
mod http2;
mod latency;
mod origin;
mod rate;
mod tls;

use std::net::SocketAddr;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

#[derive(Parser)]
#[command(about = "Origin and load of Outrigger's benches")]
struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Answer HTTP/1.1, h2 with prior knowledge and gRPC on one port.
    Origin {
        /// Where to listen; the first line printed says where it does.
        #[arg(long, default_value = "127.0.0.1:0")]
        listen: SocketAddr,
    },
    /// Send at a fixed rate; latency counts from when a request was due.
    Rate {
        #[command(flatten)]
        target: Target,
        /// Requests per second.
        #[arg(long, default_value_t = 4_000)]
        rate: u32,
        /// How long.
        #[arg(long, default_value_t = 5.0)]
        seconds: f64,
        /// Connections.
        #[arg(long, default_value_t = 32)]
        connections: usize,
    },
    /// Send the next request when one is answered.
    Closed {
        #[command(flatten)]
        target: Target,
        /// Requests in all.
        #[arg(long)]
        requests: u64,
        /// Connections.
        #[arg(long, default_value_t = 1)]
        connections: usize,
        /// Requests in flight on each connection; HTTP/1.1 has one.
        #[arg(long, default_value_t = 1)]
        streams: usize,
    },
    /// As `closed`, but every request opens a connection and closes it.
    Connect {
        #[command(flatten)]
        target: Target,
        /// Requests in all.
        #[arg(long)]
        requests: u64,
        /// Requests in flight.
        #[arg(long, default_value_t = 16)]
        concurrency: usize,
    },
    /// Hold many HTTP/1.1 connections: opened, used once, each with a request in flight, idle.
    Hold {
        #[command(flatten)]
        target: Target,
        /// Connections.
        #[arg(long, default_value_t = 4_000)]
        connections: usize,
        /// How long the origin keeps every request in flight.
        #[arg(long, default_value_t = 4_000)]
        milliseconds: u64,
    },
}

/// Whom to ask, and how.
#[derive(Args, Clone)]
struct Target {
    /// The address to connect to.
    #[arg(long)]
    to: SocketAddr,
    /// What is spoken.
    #[arg(long, value_enum, default_value = "h1")]
    protocol: Protocol,
    /// The service that is asked.
    #[arg(long, default_value = "orders")]
    authority: String,
    /// The path; the origin knows `/small`, `/10k`, `/slow/MILLISECONDS`, `/status/CODE`, `/flaky`.
    #[arg(long, default_value = "/small")]
    path: String,
    /// HTTP/1.1 only: POST so many bytes instead of a GET.
    #[arg(long)]
    post: Option<usize>,
    /// HTTP/1.1 only: count any answer as a success, not only 200.
    #[arg(long)]
    any: bool,
    /// HTTP/1.1 only: mutual TLS with `chain.pem` and `key.pem` of this directory.
    #[arg(long, value_name = "DIRECTORY", value_parser = tls::Tls::load)]
    tls: Option<tls::Tls>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Protocol {
    H1,
    H2,
    Grpc,
}

fn main() {
    raise_file_limit();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .expect("a runtime starts");
    let command = Options::parse().command;
    let result = tokio::task::LocalSet::new().block_on(&runtime, async {
        match command {
            Command::Origin { listen } => origin::serve(listen).await.map(|()| None),
            Command::Rate {
                target,
                rate,
                seconds,
                connections,
            } => {
                let period = Duration::from_secs_f64(seconds);
                rate::run(&target, rate, period, connections)
                    .await
                    .map(Some)
            }
            Command::Closed {
                target,
                requests,
                connections,
                streams,
            } => closed::run(&target, requests, connections, streams)
                .await
                .map(Some),
            Command::Connect {
                target,
                requests,
                concurrency,
            } => closed::connect(&target, requests, concurrency)
                .await
                .map(Some),
            Command::Hold {
                target,
                connections,
                milliseconds,
            } => hold::run(&target, connections, milliseconds)
                .await
                .map(Some),
        }
    });
    match result {
        Ok(None) => {}
        Ok(Some(report)) => println!("{report}"),
        Err(error) => {
            eprintln!("outrigger-bench: {error}");
            std::process::exit(1);
        }
    }
}

/// Says what has been reached and waits for a line, or the end, of standard input. Blocks on purpose:
/// nothing is to move while the driver looks at the proxy, and answers wait in the kernel.
fn announce(phase: &str) -> std::io::Result<()> {
    println!("{phase}");
    std::io::stdin().read_line(&mut String::new()).map(|_| ())
}

/// Thousands of connections need more descriptors than shells allow by default.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let all = Rlimit {
        current: limit.maximum,
        maximum: limit.maximum,
    };
    // What cannot be raised shows when a connection is refused.
    let _ = setrlimit(Resource::Nofile, all);
}
