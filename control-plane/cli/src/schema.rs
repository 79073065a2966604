//! `outrigger schema`: the JSON Schemas of the config files.

use std::process::ExitCode;

use clap::{Args, ValueEnum};
use outrigger_config::schema;

use crate::output;

/// Which schema.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Of which file
    #[arg(value_enum, default_value_t = Which::Mesh)]
    which: Which,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum Which {
    /// Mesh config documents
    Mesh,
    /// A sidecar's bootstrap file
    Proxy,
    /// The control plane's bootstrap file
    ControlPlane,
}

pub(crate) fn run(options: &Options) -> ExitCode {
    output::print_json(&match options.which {
        Which::Mesh => schema::mesh(),
        Which::Proxy => schema::proxy(),
        Which::ControlPlane => schema::control_plane(),
    });
    ExitCode::SUCCESS
}
