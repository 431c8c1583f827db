//! The `armlet` program: parse, call, print an error's chain on one line, exit.

use armlet::cli::{self, Parsed};
use armlet::commands;
use armlet::heap::Heap;
use armlet_system::messages;
use armlet_system::status::{Status, status_of};
use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: Heap = Heap;

fn main() -> ExitCode {
    messages::install();
    let status = start().unwrap_or_else(|error| {
        messages::say(&format!("{error:#}"));
        status_of(&error)
    });
    messages::finish();
    status.into()
}

fn start() -> anyhow::Result<Status> {
    let mut arguments = Vec::new();
    for word in std::env::args_os().skip(1) {
        match word.into_string() {
            Ok(word) => arguments.push(word),
            Err(word) => {
                let line = format!("argument {word:?} is no UTF-8; use UTF-8 paths and options");
                messages::say(&line);
                return Ok(Status::Usage);
            }
        }
    }
    let (cli, devices) = match cli::parse(&arguments) {
        Parsed::Cli(cli, devices) => (cli, devices),
        Parsed::Help(text) => {
            commands::print(&text)?;
            return Ok(Status::Success);
        }
        Parsed::Wrong(line) => {
            messages::say(&line);
            return Ok(Status::Usage);
        }
    };
    if cli.version {
        commands::print(concat!("armlet ", env!("CARGO_PKG_VERSION"), "\n"))?;
        return Ok(Status::Success);
    }
    match &cli.command {
        Some(command) => commands::execute(command, &devices),
        None => {
            messages::say("no command given; use run, plan, probe or boards (see 'armlet --help')");
            Ok(Status::Usage)
        }
    }
}
