//! `outrigger-proxy`: see `outrigger_proxy::cli`.

use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    outrigger_proxy::cli::main(std::env::args_os())
}
