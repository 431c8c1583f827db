//! What a developer of armlet runs: `cargo xtask boot`, `test`, `bench`, and what they
//! rest on.

mod assets;
mod bench;
mod bench_io;
mod bench_scale;
mod boot;
mod check;
mod clients;
mod command;
mod dist;
mod elf;
mod figures;
mod fuzz;
mod help;
mod host;
mod image;
mod initramfs;
mod isa;
mod load;
mod marker;
mod measure;
mod measure_io;
mod measure_restore;
mod measure_scale;
mod order;
mod packages;
mod perf;
mod procfs;
mod progress;
mod repository;
mod rig;
mod runner;
mod signals;
mod small_std;
mod terminal;
mod toolchain;
mod trace;
mod vm;
mod vmlinux;
mod vmms;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, anyhow, ensure};
use argh::FromArgs;

use crate::assets::Choice;
use crate::bench_io::BenchIo;
use crate::bench_scale::BenchScale;
use crate::host::{Ended, HostSpec, Job};
use crate::isa::Isa;
use crate::load::Load;
use crate::measure::Measure;
use crate::measure_io::MeasureIo;
use crate::measure_scale::MeasureScale;
use crate::packages::Store;
use crate::progress::say;
use crate::repository::is_checkout;
use crate::terminal::RawTerminal;

/// Build, boot and test armlet, on any Debian or Ubuntu machine.
#[derive(Debug, FromArgs)]
struct Arguments {
    #[argh(subcommand)]
    task: Task,
}

#[derive(Debug, FromArgs)]
#[argh(subcommand)]
enum Task {
    Boot(boot::Boot),
    Test(check::Test),
    Bench(bench::Bench),
    Image(image::Image),
    Runner(Runner),
    Setup(Setup),
    Host(Host),
    Dist(dist::Dist),
    Fuzz(fuzz::Fuzz),
    Order(order::Order),
    Clients(clients::Clients),
}

/// Run a program built for ARM64, with its arguments: what cargo calls for the aarch64 targets.
#[derive(Debug, FromArgs)]
#[argh(subcommand, name = "runner")]
struct Runner {
    /// the program and its arguments
    #[argh(positional, greedy)]
    command: Vec<String>,
}

/// Fetch everything that boot and test need, so that they work without a network.
#[derive(Debug, FromArgs)]
#[argh(subcommand, name = "setup")]
struct Setup {
    /// for guests of this architecture: aarch64 (the default) or x86_64
    #[argh(option, default = "String::from(\"aarch64\")")]
    arch: String,

    /// look for newer versions of what is there already
    #[argh(switch)]
    refresh: bool,
}

/// Run a shell, or a command, in an emulated host that the ARMLET_RIG_* variables describe.
#[derive(Debug, FromArgs)]
#[argh(subcommand, name = "host")]
struct Host {
    /// put this file of ours into the host's /root; may be repeated
    #[argh(option)]
    file: Vec<PathBuf>,

    /// the command; a shell when there is none
    #[argh(positional, greedy)]
    command: Vec<String>,
}

fn main() -> ExitCode {
    match run() {
        Ok(status) => ExitCode::from(u8::try_from(status).unwrap_or(1)),
        Err(error) => {
            say(&format!("error: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// Does what the command line says and gives the exit status.
fn run() -> Result<i32> {
    let words = std::env::args().skip(1).collect::<Vec<_>>();
    let task = words.first().map(String::as_str);
    // These run in emulated hosts and in guests.
    if !matches!(
        task,
        Some("measure" | "measure-io" | "measure-scale" | "load")
    ) {
        ensure!(
            is_checkout(),
            "this is no checkout of armlet; run 'cargo xtask' in one"
        );
    }
    match words.split_first() {
        // The options after `runner` are the program's: none of them is ours to parse.
        Some((task, command))
            if task == "runner" && !command.first().is_none_or(|word| word.starts_with('-')) =>
        {
            let command = command.to_vec();
            return Runner { command }.run();
        }
        // Not for people, so the help does not tell of it.
        Some((task, rest)) if task == "measure" => {
            return measuring("xtask measure", rest, Measure::run);
        }
        Some((task, rest)) if task == "measure-io" => {
            return measuring("xtask measure-io", rest, MeasureIo::run);
        }
        Some((task, rest)) if task == "measure-scale" => {
            return measuring("xtask measure-scale", rest, MeasureScale::run);
        }
        Some((task, rest)) if task == "load" => return measuring("xtask load", rest, Load::run),
        // `bench` takes any words after its options, so it has no subcommands of its own.
        Some((task, rest)) if task == "bench" => match rest.first().map(String::as_str) {
            Some("io") => {
                return bench("cargo xtask bench io", &rest[1..], BenchIo::run);
            }
            Some("scale") => {
                return bench("cargo xtask bench scale", &rest[1..], BenchScale::run);
            }
            _ => {}
        },
        _ => {}
    }
    match argh::from_env::<Arguments>().task {
        Task::Boot(boot) => boot.run(),
        Task::Test(test) => test.run(),
        Task::Bench(bench) => bench.run(),
        Task::Order(order) => order.run(),
        Task::Clients(clients) => clients.run(),
        Task::Image(image) => image.run(),
        Task::Runner(runner) => runner.run(),
        Task::Setup(setup) => setup.run(),
        Task::Host(host) => host.run(),
        Task::Dist(dist) => dist.run(),
        Task::Fuzz(fuzz) => fuzz.run(),
    }
}

/// Parses the words after a command's `name`.
fn parse<T: FromArgs>(name: &str, words: &[String]) -> Result<T, argh::EarlyExit> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    T::from_args(&[name], &words)
}

/// Runs a command that a bench starts in its host or guest.
fn measuring<T: FromArgs>(name: &str, words: &[String], run: fn(&T) -> Result<i32>) -> Result<i32> {
    run(&parse(name, words).map_err(|exit| anyhow!("{}", exit.output))?)
}

/// Runs a bench, or prints its help or the error in its command line.
fn bench<T: FromArgs>(name: &str, words: &[String], run: fn(&T) -> Result<i32>) -> Result<i32> {
    match parse(name, words) {
        Ok(bench) => run(&bench),
        Err(exit) => {
            print!("{}", exit.output);
            Ok(i32::from(exit.status.is_err()))
        }
    }
}

impl Runner {
    fn run(&self) -> Result<i32> {
        let (binary, arguments) = self
            .command
            .split_first()
            .context("runner needs a program")?;
        runner::run(Path::new(binary), arguments)
    }
}

impl Setup {
    fn run(&self) -> Result<i32> {
        let store = Store::open()?;
        if self.refresh {
            store.forget()?;
        }
        let isa = Isa::from_name(&self.arch)?;
        isa.toolchain()?;
        let folder = assets::prepare(&store, isa, Choice::All)?;
        if !isa.is_native() {
            store.qemu(isa)?;
            if packages::can_make_systems() {
                assets::tools(&store, isa)?;
            }
        }
        say(&format!(
            "all there, in {:?}",
            folder.parent().unwrap_or(&folder)
        ));
        Ok(0)
    }
}

impl Host {
    fn run(&self) -> Result<i32> {
        let store = Store::open()?;
        let mut files = Vec::new();
        for path in &self.file {
            let name = path
                .file_name()
                .with_context(|| format!("{path:?} names no file"))?;
            let to = Path::new("/root").join(name);
            files.push(host::HostFile::program(path, to));
        }
        let terminal = if self.command.is_empty() {
            RawTerminal::take()?
        } else {
            None
        };
        let mut command = self.command.clone();
        if command.is_empty() {
            say("a shell in the emulated host; exit ends it, Ctrl-] stops it at once\r");
            command.push("/bin/sh".to_owned());
        }
        let job = Job {
            files,
            command,
            folder: "/root".into(),
            ..Job::default()
        };
        let spec = HostSpec::from_environment()?;
        let mut out = std::io::stdout();
        let mut print = |bytes: &[u8]| {
            out.write_all(bytes)
                .and_then(|()| out.flush())
                .context("cannot write standard output")
        };
        match rig::run(&store, &spec, &job, terminal.as_ref(), &mut print)? {
            Ended::Exit(status) => Ok(status),
            Ended::Left => Ok(0),
            Ended::Signal(signal) => Ok(128 + signal),
        }
    }
}
