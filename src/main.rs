//! The `relatch` binary: parses the command line, runs the command, and reports a failure in words and by the exit code.

use std::process::ExitCode;

use clap::Parser;
use mimalloc::MiMalloc;
use relatch::{
    cli::{Cli, Exit, Failure, output::Terminal, stream, usage_error},
    core_dumps,
};

/// HTTP/2 allocates seven times for each check, mostly for the headers of both directions. This
/// allocator is faster at that than the allocator of the system.
#[global_allocator]
static ALLOCATOR: MiMalloc = MiMalloc;

fn main() -> ExitCode {
    let cli =
        Cli::try_parse().unwrap_or_else(|error| usage_error::exit(&error, std::env::args_os()));
    let terminal = Terminal::detect();
    match run(cli, terminal) {
        Ok(exit) => exit.into(),
        Err(failure) => {
            stream::write_err(&failure.report(terminal.coloured));
            failure.exit().into()
        }
    }
}

fn run(cli: Cli, terminal: Terminal) -> Result<Exit, Failure> {
    core_dumps::forbid().map_err(|error| {
        Failure::new(Exit::Failed, error).context("cannot switch core dumps off")
    })?;
    let runtime = cli
        .command
        .runtime()
        .enable_all()
        .build()
        .map_err(|error| Failure::new(Exit::Failed, error).context("cannot start a runtime"))?;
    runtime.block_on(cli.run(terminal))
}
