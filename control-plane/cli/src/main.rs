//! `outrigger`: the command people type.
//!
//! Owns the command line and the exit codes. Each command is a file; `demo` is a directory. The
//! hidden commands `proxy` and `control-plane` are those processes, so that one binary is enough.

mod ca;
mod check;
mod client;
mod clock;
mod demo;
mod explain;
mod identity;
mod output;
mod queue;
mod rollout;
mod schema;
mod sidecar;
mod status;
mod transfer;
mod wait;

use std::ffi::OsString;
use std::future::Future;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use output::{Failure, Format};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Outrigger: calls and letters between services.
///
/// Begin with `outrigger demo`. Commands that ask a sidecar take --admin, those that ask the
/// control plane take --control-plane.
#[derive(Debug, Parser)]
#[command(name = "outrigger", version, max_term_width = 100)]
struct Cli {
    /// A table for people, or JSON for programs
    #[arg(long, short, global = true, value_enum, default_value_t = Format::Table)]
    output: Format,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Start a small mesh on this machine and show what it does
    Demo(demo::Options),
    /// Check config files: 0 clean, 1 errors, 2 unreadable
    Check(check::Options),
    /// Show which rule takes a request, why, and every value that applies to it
    Explain(explain::Options),
    /// Print a JSON Schema, for editors
    Schema(schema::Options),
    /// Show the sidecars that the control plane knows, or one sidecar with --admin
    Status(status::Options),
    /// Show the rules of a sidecar
    Routes(client::Admin),
    /// Show the endpoints of a sidecar with load and health
    Endpoints(client::Admin),
    /// Show the breakers of a sidecar
    Breakers(client::Admin),
    /// Show who a sidecar is, and until when
    Identity(client::Admin),
    /// Make, replace and show the authority that signs the sidecars' certificates
    #[command(subcommand)]
    Ca(ca::Ca),
    /// Show the configs that were pushed, and go back to one
    #[command(subcommand)]
    Rollout(rollout::Rollout),
    /// Show queues and their messages
    #[command(subcommand)]
    Queue(queue::Queue),
    /// Show, replay and purge dead letters
    #[command(subcommand)]
    Dlq(queue::Dlq),
    /// Run a sidecar in this process
    #[command(hide = true, disable_help_flag = true)]
    Proxy(Arguments),
    /// Run the control plane in this process
    #[command(hide = true, disable_help_flag = true)]
    ControlPlane(Arguments),
}

/// What another program's command line reads.
#[derive(Debug, clap::Args)]
struct Arguments {
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    rest: Vec<OsString>,
}

impl Arguments {
    fn named(self, name: &str) -> impl Iterator<Item = OsString> {
        std::iter::once(OsString::from(name)).chain(self.rest)
    }
}

fn main() -> ExitCode {
    demo::end_with_parent();
    let cli = Cli::parse();
    let format = cli.output;
    match cli.command {
        Command::Demo(options) => demo::run(&options),
        Command::Check(options) => check::run(&options, format),
        Command::Explain(options) => asking(format, explain::run(options, format)),
        Command::Schema(options) => schema::run(&options),
        Command::Status(options) => asking(format, status::run(options, format)),
        Command::Routes(admin) => asking(format, sidecar::routes(admin, format)),
        Command::Endpoints(admin) => asking(format, sidecar::endpoints(admin, format)),
        Command::Breakers(admin) => asking(format, sidecar::breakers(admin, format)),
        Command::Identity(admin) => asking(format, identity::run(admin, format)),
        Command::Ca(command) => asking(format, ca::run(command, format)),
        Command::Rollout(command) => asking(format, rollout::run(command, format)),
        Command::Queue(command) => asking(format, queue::queue(command, format)),
        Command::Dlq(command) => asking(format, queue::dlq(command, format)),
        Command::Proxy(arguments) => outrigger_proxy::cli::main(arguments.named("outrigger-proxy")),
        Command::ControlPlane(arguments) => control_plane(arguments),
    }
}

fn control_plane(arguments: Arguments) -> ExitCode {
    let arguments = arguments.named("outrigger-control-plane");
    match outrigger_control_plane::Options::try_parse_from(arguments) {
        Ok(options) => outrigger_control_plane::run(&options),
        Err(error) => {
            let _ = error.print();
            ExitCode::from(if error.use_stderr() {
                output::UNUSABLE
            } else {
                0
            })
        }
    }
}

/// Runs a command that asks over the network.
fn asking(format: Format, command: impl Future<Output = Result<(), Failure>>) -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    let outcome = match runtime {
        Ok(runtime) => runtime.block_on(command),
        Err(error) => Err(Failure::unusable(format!("no runtime: {error}"))),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => failure.tell(format),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_sound() {
        use clap::CommandFactory as _;
        Cli::command().debug_assert();
    }

    #[test]
    fn hidden_processes_get_their_own_arguments() {
        let cli = Cli::try_parse_from(["outrigger", "proxy", "--config", "a.yaml", "--check"]);
        let Ok(Cli {
            command: Command::Proxy(arguments),
            ..
        }) = cli
        else {
            panic!("not understood: {cli:?}");
        };
        let given: Vec<_> = arguments.named("x").collect();
        assert_eq!(given, ["x", "--config", "a.yaml", "--check"]);
    }
}
