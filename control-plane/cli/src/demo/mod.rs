//! `outrigger demo`: a whole small mesh on this machine, and a tour of what it does.
//!
//! One control plane, three services and their sidecars, as processes of this same binary; the
//! services are plain HTTP servers in this one. Owns the order of start, tour and end: whatever
//! happens, the processes end and the directory goes.

mod children;
mod services;
mod stage;
mod tour;

use std::process::ExitCode;

use clap::Args;
use tokio::signal::unix::{SignalKind, signal};
use tokio::time::{Duration, sleep};

pub(crate) use children::end_with_parent;

use children::Children;
use services::{Mailer, Orders};
use stage::Stage;
use tour::{STEPS, Tour};

use crate::clock;
use crate::output::print;

/// How the demo ends.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// End after the tour; status 0 only if every step did what it says
    #[arg(long)]
    exit: bool,
    /// Leave the directory with config, state and logs where it is
    #[arg(long)]
    keep_state: bool,
}

/// Runs the demo. 0 when every step held, 1 when one did not or it was interrupted before its end.
pub(crate) fn run(options: &Options) -> ExitCode {
    // The children end with this thread: everything is started from it.
    let runtime = match tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
    {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("outrigger: no runtime: {error}");
            return ExitCode::FAILURE;
        }
    };
    match runtime.block_on(play(options)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(problem) => {
            eprintln!("outrigger: the demo cannot go on: {problem}");
            ExitCode::FAILURE
        }
    }
}

async fn play(options: &Options) -> Result<bool, String> {
    let mut stage = Stage::set().map_err(|error| format!("cannot set the stage: {error}"))?;
    if options.keep_state {
        let kept = stage.keep();
        print(&format!("state and logs stay in {}\n", kept.display()));
    }
    let children = Children::new(stage.dir());
    let mailer = Mailer::new(stage.mailer.app);
    let mut tour = Tour {
        stage,
        children,
        orders: Orders::default(),
        mailer,
    };
    let outcome = tokio::select! {
        outcome = show(&mut tour, options) => outcome,
        () = interrupted() => {
            print("\nending\n");
            Ok(Shown::Interrupted)
        }
    };
    let outcome = match outcome {
        Ok(Shown::ToTheEnd { held, stay: true }) => {
            print(&where_to_look(&tour));
            tokio::select! {
                () = interrupted() => {
                    print("\nending\n");
                    Ok(held)
                }
                problem = watch(&mut tour.children) => Err(problem),
            }
        }
        Ok(Shown::ToTheEnd { held, .. }) => Ok(held),
        Ok(Shown::Interrupted) => Ok(false),
        Err(problem) => Err(problem),
    };
    tour.children.end().await;
    outcome
}

enum Shown {
    ToTheEnd { held: bool, stay: bool },
    Interrupted,
}

async fn show(tour: &mut Tour, options: &Options) -> Result<Shown, String> {
    let began = clock::now();
    start(tour).await?;
    tour.ready().await?;
    print(&format!(
        "control plane, web, orders, mailer and their sidecars are up after {}\n\n{:>2}  {:30}  {:6}  {:>6}  WHAT HAPPENED\n",
        clock::short(clock::now() - began),
        "#",
        "STEP",
        "",
        "TOOK",
    ));
    let mut failed = 0;
    for (at, name) in STEPS.iter().enumerate() {
        let began = clock::now();
        let outcome = tour.step(at).await;
        let took = clock::short(clock::now() - began);
        let (verdict, what) = match outcome {
            Ok(what) => ("ok", what),
            Err(problem) => {
                failed += 1;
                ("FAILED", problem)
            }
        };
        print(&format!(
            "{:>2}  {name:30}  {verdict:6}  {took:>6}  {what}\n",
            at + 1
        ));
        if failed > 0 {
            // Without one of its processes no later step can hold.
            tour.children.all_run()?;
        }
    }
    let took = clock::short(clock::now() - began);
    print(&match failed {
        0 => format!("\nall {} steps held, {took}\n", STEPS.len()),
        failed => format!("\n{failed} of {} steps FAILED, {took}\n", STEPS.len()),
    });
    Ok(Shown::ToTheEnd {
        held: failed == 0,
        stay: !options.exit,
    })
}

async fn start(tour: &mut Tour) -> Result<(), String> {
    let Tour {
        stage,
        children,
        orders,
        mailer,
    } = tour;
    let listen = |error: std::io::Error| format!("a service cannot listen: {error}");
    services::start_web(stage.web.app, stage.web.outbound)
        .await
        .map_err(listen)?;
    orders.start(stage.orders.app).await.map_err(listen)?;
    mailer.start().await?;
    let config = stage.bootstrap("control-plane");
    children.start("control-plane", &["control-plane", "--config", &config])?;
    for name in ["web", "orders", "mailer"] {
        children.start(name, &["proxy", "--config", &stage.bootstrap(name)])?;
    }
    Ok(())
}

/// Ctrl-C or SIGTERM.
async fn interrupted() {
    let (Ok(mut interrupt), Ok(mut terminate)) = (
        signal(SignalKind::interrupt()),
        signal(SignalKind::terminate()),
    ) else {
        // Without handlers the signals end this process, and the children end with it.
        return std::future::pending().await;
    };
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
}

/// Ends when a child does.
async fn watch(children: &mut Children) -> String {
    loop {
        if let Err(ended) = children.all_run() {
            return ended;
        }
        sleep(Duration::from_millis(200)).await;
    }
}

fn where_to_look(tour: &Tour) -> String {
    let stage = &tour.stage;
    let (control, web) = (stage.control, stage.web);
    let (orders, mailer) = (stage.orders.admin, stage.mailer.admin);
    let (admin, outbound, inbound) = (web.admin, web.outbound, web.inbound);
    let mesh = stage.mesh_file();
    let mesh = mesh.display();
    let program =
        std::env::current_exe().map_or("outrigger".into(), |path| path.display().to_string());
    format!(
        "
look
  control plane   http://{control}/v1/proxies  /v1/services  /v1/config  /metrics
  web's sidecar   http://{admin}/  /metrics /config /routes /endpoints /breakers /queues
  orders' sidecar http://{orders}/  /metrics
  mailer's        http://{mailer}/  /metrics

try
  curl -i http://{inbound}/orders/7                     # web, which calls orders
  curl -i -H 'Host: orders' http://{outbound}/orders/7  # as web does
  curl -i -H 'Host: mailer' -H 'Prefer: respond-async' -d '{{\"to\": \"you@example.com\"}}' http://{outbound}/mails
  curl -s http://{outbound}/.outrigger/messages/ID      # the Location of the answer
  {program} status --control-plane http://{control}
  {program} queue show mail --admin http://{admin}
  {program} dlq ls --admin http://{admin}
  {program} explain POST http://mailer/mails -H 'Prefer: respond-async' --namespace shop --admin http://{admin}
edit
  {mesh}

Ctrl-C ends everything
"
    )
}
