//! The command line of `outrigger-proxy`: load the bootstrap config, start, drain on SIGTERM; and
//! `intercept`, which redirects connections to the sidecar before it starts.

use std::ffi::OsString;
use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::OnceLock;

use clap::{Parser, Subcommand};
use outrigger_config::bootstrap::{self, ProxyBootstrap};
use outrigger_config::{Source, read_sources};
use tracing_subscriber::{EnvFilter, Registry, layer::SubscriberExt as _, reload};

use crate::{app, intercept};

/// The sidecar: carries the calls of one workload, both ways.
#[derive(Debug, Parser)]
#[command(
    name = "outrigger-proxy",
    version,
    about,
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true
)]
pub struct Cli {
    /// The bootstrap config, a YAML file (config/samples/proxy.yaml shows every key)
    #[arg(long, value_name = "FILE", required = true)]
    pub config: Option<PathBuf>,
    /// Check the bootstrap config and the mesh config it names, then exit
    #[arg(long)]
    pub check: bool,
    /// What to log: a level or tracing directives
    #[arg(
        long,
        value_name = "LEVEL",
        default_value = "info",
        env = "OUTRIGGER_LOG"
    )]
    pub log: String,
    /// Instead of running the sidecar.
    #[command(subcommand)]
    pub command: Option<Task>,
}

/// What the program does besides running the sidecar.
#[derive(Debug, Subcommand)]
pub enum Task {
    #[expect(
        missing_docs,
        reason = "it would replace what the options themselves say"
    )]
    Intercept(intercept::command::Args),
}

/// Exit status when the config has errors.
pub(crate) const REFUSED: u8 = 1;
/// Exit status when the config cannot be read or the process cannot start.
pub(crate) const UNUSABLE: u8 = 2;

/// Runs the process; the exit status is 0 after a drain, 1 for a refused config, 2 when
/// something cannot be read, bound or locked.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(if error.use_stderr() { UNUSABLE } else { 0 });
        }
    };
    if let Some(Task::Intercept(args)) = &cli.command {
        return intercept::command::run(args);
    }
    let config = cli.config.expect("required unless there is a subcommand");
    let mut loaded = match bootstrap(&config) {
        Ok(loaded) => loaded,
        Err(status) => return status,
    };
    loaded.resolve(config.parent().unwrap_or(Path::new(".")));
    if cli.check {
        return check(&loaded);
    }
    start_log(&cli.log);
    let running = match app::start(loaded) {
        Ok(running) => running,
        Err(error) => {
            eprintln!("outrigger-proxy: {error}");
            return ExitCode::from(UNUSABLE);
        }
    };
    drain_on_signal(&running);
    running.join();
    ExitCode::SUCCESS
}

/// The bootstrap config as written. What is wrong with it goes to standard error.
pub(crate) fn bootstrap(file: &Path) -> Result<ProxyBootstrap, ExitCode> {
    let sources = read_sources(file).map_err(|error| {
        eprintln!("outrigger-proxy: cannot read {}: {error}", file.display());
        ExitCode::from(UNUSABLE)
    })?;
    let Some(source) = sources.into_iter().next() else {
        eprintln!("outrigger-proxy: {} holds no YAML file", file.display());
        return Err(ExitCode::from(UNUSABLE));
    };
    let (loaded, report) = bootstrap::load_proxy(&source);
    eprint!("{}", report.render_text());
    loaded
        .filter(|_| !report.has_errors())
        .ok_or(ExitCode::from(REFUSED))
}

fn check(bootstrap: &ProxyBootstrap) -> ExitCode {
    let Some(mesh) = &bootstrap.mesh else {
        println!("the bootstrap config is fine; the mesh config comes from the control plane");
        return ExitCode::SUCCESS;
    };
    let sources: Vec<Source> = match read_sources(mesh) {
        Ok(sources) => sources,
        Err(error) => {
            eprintln!("outrigger-proxy: cannot read {}: {error}", mesh.display());
            return ExitCode::from(UNUSABLE);
        }
    };
    let report = outrigger_config::load(&sources).report;
    print!("{}", report.render_text());
    println!("{}", report.summary());
    ExitCode::from(if report.has_errors() { REFUSED } else { 0 })
}

fn drain_on_signal(running: &app::Running) {
    let shared = std::sync::Arc::clone(&running.shared);
    let watching = std::thread::Builder::new()
        .name("signals".into())
        .spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build();
            let Ok(runtime) = runtime else { return };
            runtime.block_on(async {
                use tokio::signal::unix::{SignalKind, signal};
                let (Ok(mut term), Ok(mut int)) = (
                    signal(SignalKind::terminate()),
                    signal(SignalKind::interrupt()),
                ) else {
                    return tracing::error!("cannot watch for signals");
                };
                tokio::select! {
                    _ = term.recv() => {}
                    _ = int.recv() => {}
                }
                shared.drain.advance(crate::drain::Phase::Leaving);
            });
        });
    if let Err(error) = watching {
        tracing::error!(%error, "cannot watch for signals");
    }
}

static FILTER: OnceLock<reload::Handle<EnvFilter, Registry>> = OnceLock::new();

/// Sends the log to standard error: text on a terminal, JSON lines otherwise.
fn start_log(directives: &str) {
    let filter = EnvFilter::try_new(directives).unwrap_or_else(|error| {
        eprintln!("outrigger-proxy: --log {directives}: {error}; using info");
        EnvFilter::new("info")
    });
    let (filter, handle) = reload::Layer::new(filter);
    let _ = FILTER.set(handle);
    let terminal = std::io::stderr().is_terminal();
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let text = terminal.then(|| lines.with_ansi(true));
    let json = (!terminal).then(|| {
        tracing_subscriber::fmt::layer()
            .json()
            .flatten_event(true)
            .with_writer(std::io::stderr)
    });
    let subscriber = Registry::default().with(filter).with(text).with(json);
    // A host process (the demo, a test) may have its own log already.
    let _ = tracing::subscriber::set_global_default(subscriber);
}

/// Changes what is logged, at run time.
///
/// # Errors
/// What is wrong with the directives, or that the log belongs to a host process.
pub fn set_log(directives: &str) -> Result<(), String> {
    let filter = EnvFilter::try_new(directives).map_err(|error| error.to_string())?;
    let handle = FILTER.get().ok_or("the log of this process is not ours")?;
    handle.reload(filter).map_err(|error| error.to_string())
}
