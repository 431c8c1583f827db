//! The `armlet` program: parse, call, print an error's chain on one line, exit.

use armlet::api::{self, FIRECRACKER};
use armlet::cli::{self, Command, Parsed};
use armlet::commands;
use armlet::descriptors;
use armlet::heap::Heap;
use armlet::jail::JAILER;
use armlet_system::messages;
use armlet_system::status::{Status, status_of};
use std::env::ArgsOs;
use std::path::Path;
use std::process::ExitCode;

#[global_allocator]
static ALLOCATOR: Heap = Heap;

fn main() -> ExitCode {
    messages::install();
    let mut words = std::env::args_os();
    let name = words.next().unwrap_or_default();
    let name = Path::new(&name).file_name().unwrap_or_default();
    let command = match name {
        name if name == JAILER => Some("jail"),
        name if name == FIRECRACKER => Some("api"),
        _ => None,
    };
    let mut is_api = false;
    let mut status = start(command, words, &mut is_api).unwrap_or_else(|error| {
        match is_api {
            // The messages, which may go elsewhere, have it already.
            true => messages::say_at_the_end(&format!("Error: {error:#}")),
            false => messages::say(&format!("{error:#}")),
        }
        status_of(&error)
    });
    messages::finish();
    if is_api {
        return ExitCode::from(api::end(status));
    }
    // Firecracker's has one status for all that goes wrong.
    if name == JAILER && status != Status::Success {
        status = Status::Failure;
    }
    status.into()
}

fn start(command: Option<&str>, words: ArgsOs, is_api: &mut bool) -> anyhow::Result<Status> {
    let mut arguments: Vec<String> = Vec::new();
    arguments.extend(command.map(str::to_owned));
    for word in words {
        match word.into_string() {
            Ok(word) => arguments.push(word),
            Err(word) => {
                let line = format!("argument {word:?} is no UTF-8; use UTF-8 paths and options");
                messages::say(&line);
                return Ok(Status::Usage);
            }
        }
    }
    *is_api = arguments.first().is_some_and(|word| word == "api");
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
    if matches!(cli.command, Some(Command::Run(_) | Command::Api(_))) {
        descriptors::close_others(&descriptors::named(&arguments));
    }
    match &cli.command {
        Some(command) => commands::execute(command, &devices),
        None => {
            messages::say(
                "no command given; use run, plan, probe, boards, jail, ctl, api or snapshot (see 'armlet --help')",
            );
            Ok(Status::Usage)
        }
    }
}
