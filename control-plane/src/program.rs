//! The program around the control plane: its options, its log, its signals and its exit code.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use outrigger_config::bootstrap::{ControlPlaneBootstrap, load_control_plane};
use outrigger_config::{Source, load, read_sources};
use tokio::signal::unix::{SignalKind, signal};
use tracing::{error, info};
use tracing_subscriber::EnvFilter;

use crate::app::start;

/// Outrigger's control plane: checks the mesh config, keeps the registry, pushes both to sidecars.
#[derive(Clone, Debug, Parser)]
#[command(name = "outrigger-control-plane", version)]
pub struct Options {
    /// The bootstrap file: listeners, state directory, where the mesh config is
    #[arg(long, value_name = "FILE", env = "OUTRIGGER_CONTROL_PLANE_CONFIG")]
    pub config: PathBuf,
    /// Check the bootstrap file and the mesh config, print all problems and exit: 0 clean,
    /// 1 errors, 2 unreadable
    #[arg(long)]
    pub check: bool,
}

/// Exit status when a file cannot be read or the process cannot start, as `outrigger-proxy` has it.
const UNUSABLE: u8 = 2;

/// Runs the program to its end. 0 after SIGTERM or SIGINT, 1 for errors in config, 2 when something
/// cannot be read, bound or locked.
pub fn run(options: &Options) -> ExitCode {
    let bootstrap = match read_bootstrap(&options.config) {
        Ok(bootstrap) => bootstrap,
        Err(code) => return code,
    };
    if options.check {
        return check(&bootstrap);
    }
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .json()
        .flatten_event(true)
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .init();
    // One thread serves thousands of sidecars; the disk has the blocking pool.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    match runtime {
        Ok(runtime) => runtime.block_on(serve(bootstrap)),
        Err(e) => {
            error!(error = %e, "no runtime");
            ExitCode::from(UNUSABLE)
        }
    }
}

async fn serve(bootstrap: ControlPlaneBootstrap) -> ExitCode {
    // Before anything is started, so that no signal is missed.
    let (terminate, interrupt) = match (
        signal(SignalKind::terminate()),
        signal(SignalKind::interrupt()),
    ) {
        (Ok(terminate), Ok(interrupt)) => (terminate, interrupt),
        (Err(e), _) | (_, Err(e)) => {
            error!(error = %e, "no signal handler");
            return ExitCode::from(UNUSABLE);
        }
    };
    let (mut terminate, mut interrupt) = (terminate, interrupt);
    let running = match start(bootstrap).await {
        Ok(running) => running,
        Err(e) => {
            error!(error = %e, "control plane not started");
            return ExitCode::from(UNUSABLE);
        }
    };
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
    }
    info!("ending");
    running.shutdown().await;
    info!("ended");
    ExitCode::SUCCESS
}

fn read_bootstrap(path: &Path) -> Result<ControlPlaneBootstrap, ExitCode> {
    let text = std::fs::read_to_string(path).map_err(|e| {
        eprintln!("{}: {e}", path.display());
        ExitCode::from(UNUSABLE)
    })?;
    let (bootstrap, report) = load_control_plane(&Source::new(path.display().to_string(), text));
    eprint!("{}", report.render_text());
    let mut bootstrap = bootstrap.ok_or(ExitCode::FAILURE)?;
    bootstrap.resolve(path.parent().unwrap_or(Path::new("")));
    Ok(bootstrap)
}

fn check(bootstrap: &ControlPlaneBootstrap) -> ExitCode {
    let Some(path) = &bootstrap.config else {
        return ExitCode::SUCCESS;
    };
    match read_sources(path) {
        Ok(sources) => {
            let report = load(&sources).report;
            print!("{}", report.render_text());
            println!("{}", report.summary());
            if report.has_errors() {
                ExitCode::FAILURE
            } else {
                ExitCode::SUCCESS
            }
        }
        Err(e) => {
            eprintln!("{e}");
            ExitCode::from(UNUSABLE)
        }
    }
}
