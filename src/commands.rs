//! The commands: each reads its arguments, does its work, and prints the result.

use crate::boards::Chosen;
use crate::cli::{
    ApiArgs, BoardsArgs, Command, CtlArgs, DeviceArgs, JailArgs, MachineArgs, PlanArgs, ProbeArgs,
    RunArgs, SnapshotArgs,
};
use crate::config::{self, Config};
use crate::decide::{decide, warn_of_host, write_tree};
use crate::host::HostFiles;
use crate::kvm::{self, HostArch, KvmArch};
use crate::run::{OnPanic, OnReset, RunOptions, VCPU_NAMES};
use crate::sandbox::{Mode, Sandbox};
use crate::snapshot::{Head, MemoryFrom, Restore};
use crate::{api, boards, control, gdb, host, jail, metrics, probe, report, run, shutdown, table};
use anyhow::{Context, Result, anyhow, bail};
use armlet_arch::aarch64::{self, Aarch64};
use armlet_arch::size::{parse_size, show_size};
use armlet_arch::x86_64::X86_64;
use armlet_arch::{Arch, Architecture, Board, Plan};
use armlet_snapshot::{Paths, Snapshot};
use armlet_system::messages::{visible_json, visible_lines};
use armlet_system::status::{Fault, Status};
use serde_json::json;
use std::io::Write;
use std::path::Path;

/// Executes a command, with these devices. All but `run` are out of line, for a guest's start not to
/// page them in.
///
/// # Errors
/// Errors carry armlet's exit status ([`armlet_system::status::status_of`]).
pub fn execute(command: &Command, devices: &DeviceArgs) -> Result<Status> {
    match command {
        Command::Run(args) => run::run(run_options(args, devices)?),
        Command::Plan(args) => plan(args, devices),
        Command::Probe(args) => probe(args),
        Command::Boards(args) => boards(args),
        Command::Jail(args) => jail(args),
        Command::Ctl(args) => ctl(args),
        Command::Api(args) => api(args),
        Command::Snapshot(args) => snapshot(args),
    }
}

/// Confines a program, and becomes it.
#[cold]
#[inline(never)]
fn jail(args: &JailArgs) -> Result<Status> {
    if args.version {
        print(&format!(
            "Jailer v{}\n\narmlet {}, with the interface of that release\n",
            api::VERSION,
            env!("CARGO_PKG_VERSION")
        ))?;
        return Ok(Status::Success);
    }
    jail::jail(args).map(|never| match never {})
}

/// Serves Firecracker's API.
#[cold]
#[inline(never)]
fn api(args: &ApiArgs) -> Result<Status> {
    if args.version {
        print(&format!(
            "Firecracker v{}\n\narmlet {}, with the interface of that release\n",
            api::VERSION,
            env!("CARGO_PKG_VERSION")
        ))?;
        return Ok(Status::Success);
    }
    let version = match &args.describe_snapshot {
        Some(path) => crate::snapshot::version(Path::new(path)).fault(Status::Failure)?,
        None if args.snapshot_version => crate::snapshot::VERSION,
        None => return api::api(args),
    };
    print(&format!("v{version}.0.0\n"))?;
    Ok(Status::Success)
}

#[cold]
#[inline(never)]
fn ctl(args: &CtlArgs) -> Result<Status> {
    let mut words: Vec<&str> = args.request.iter().map(String::as_str).collect();
    match (args.diff, words.first()) {
        (false, _) => {}
        (true, Some(&"snapshot")) => words.insert(1, "--diff"),
        (true, _) => return Err(anyhow!("--diff goes with snapshot")).fault(Status::Usage),
    }
    let (text, is_refused) = control::ask(Path::new(&args.path), &words, args.json)?;
    print(&text)?;
    Ok(if is_refused {
        Status::Failure
    } else {
        Status::Success
    })
}

#[cold]
#[inline(never)]
fn snapshot(args: &SnapshotArgs) -> Result<Status> {
    let (text, value) = crate::snapshot::inspect(args)?;
    match args.json {
        true => print_json(&value)?,
        false => print(&text)?,
    }
    Ok(Status::Success)
}

/// Prints to standard output, which may be closed. Control characters are escaped.
///
/// # Errors
/// A failed write.
pub fn print(text: &str) -> Result<()> {
    let mut out = std::io::stdout().lock();
    out.write_all(visible_lines(text).as_bytes())
        .and_then(|()| out.flush())
        .context("cannot write to standard output")
}

fn print_json(value: &serde_json::Value) -> Result<()> {
    print(&visible_json(&format!("{value:#}\n")))
}

/// Collects everything that running a guest takes, from the arguments of `run`, with those of
/// its devices.
///
/// # Errors
/// Invalid values, missing files, and a host without KVM.
pub fn run_options(args: &RunArgs, devices: &DeviceArgs) -> Result<RunOptions<HostArch>> {
    let mut machine = args.machine(devices);
    verbosity(&machine);
    let on_reset = match args.on_reset.as_deref() {
        None | Some("restart") => OnReset::Restart,
        Some("exit") => OnReset::Exit,
        Some(other) => {
            return Err(anyhow!(
                "--on-reset '{other}' is not known; use restart or exit"
            ))
            .fault(Status::Usage);
        }
    };
    let on_panic = match args.on_panic.as_deref() {
        None | Some("report") => OnPanic::Report,
        Some("exit") => OnPanic::Exit,
        Some(other) => {
            return Err(anyhow!(
                "--on-panic '{other}' is not known; use report or exit"
            ))
            .fault(Status::Usage);
        }
    };
    let sandbox = Mode::parse(args.sandbox.as_deref()).fault(Status::Usage)?;
    let patience = shutdown::parse_patience(args.stop_timeout.as_deref())
        .map_err(anyhow::Error::msg)
        .fault(Status::Usage)?;
    if machine.kernel.is_none() && args.restore.is_none() {
        return Err(anyhow!("run needs a kernel: armlet run --kernel PATH")).fault(Status::Usage);
    }
    let files = host::this();
    let fallback = boards::fallback_of(HostArch::ARCHITECTURE);
    let restore = restore(args, &mut machine).fault(Status::Usage)?;
    let chosen = match &restore {
        Some(restore) => restore.head.board_on(&files)?,
        None => config::board(&machine, None, fallback, &files)?,
    };
    let board = &chosen.board;
    if board.arch != HostArch::ARCHITECTURE {
        return Err(anyhow!(
            "board '{}' is for {} guests, this is an {} host; 'armlet plan --board {0}' shows it",
            board.name,
            board.arch,
            HostArch::ARCHITECTURE
        ))
        .fault(Status::Host);
    }
    if args.dump_dtb.is_some() && board.arch != Architecture::Aarch64 {
        return Err(no_tree(board, "--dump-dtb")).fault(Status::Usage);
    }
    let metrics = args.metrics.as_deref().map(metrics::Target::parse);
    let metrics = metrics.transpose().fault(Status::Usage)?;
    let gdb = args.gdb.as_deref().map(gdb::Address::parse);
    let gdb = gdb.transpose().fault(Status::Usage)?;
    let cores = files.cores(board.host.core_names());
    let mut config = config::read::<HostArch>(&machine, chosen, &cores, Some(&files))?;
    if args.control.is_some() {
        config.expect_clients();
    }
    let no_kernel = match &restore {
        Some(restore) => restore.head.give(&mut config).fault(Status::Usage)?,
        None => None,
    };
    if !config.pinning.description.is_empty() {
        log::info!("vCPUs run on {}", config.pinning.description);
    }
    let kvm = kvm::open::open().fault(Status::Host)?;
    let host = HostArch::probe(&kvm, HostArch::depth(&config.request)).fault(Status::Host)?;
    Ok(RunOptions {
        kvm,
        host,
        config,
        on_reset,
        on_panic,
        patience,
        seeded: !machine.deterministic,
        stats: args.stats,
        counted: false,
        sandbox,
        vcpu_names: VCPU_NAMES,
        serial_limit: None,
        dump_dtb: args.dump_dtb.clone(),
        control: args.control.clone().map(Into::into),
        service: None,
        metrics,
        gdb,
        restore,
        no_kernel,
        commander: None,
    })
}

/// Opens the snapshot that the arguments name, and adds what its machine was asked for to `machine`.
fn restore(args: &RunArgs, machine: &mut MachineArgs) -> Result<Option<Restore>> {
    let Some(folder) = &args.restore else {
        let (from, paused) = (args.memory_from.is_some(), args.paused);
        let option = from.then_some("--memory-from");
        let option = option.or(args.prefetch.is_some().then_some("--prefetch"));
        return match option.or(paused.then_some("--paused")) {
            Some(option) => Err(anyhow!("{option} goes with --restore DIR")),
            None => Ok(None),
        };
    };
    if args.dump_dtb.is_some() {
        return Err(anyhow!(
            "--dump-dtb: a guest that is restored gets no device tree"
        ));
    }
    let from = MemoryFrom::parse(args.memory_from.as_deref())?;
    let prefetches = match args.prefetch.as_deref() {
        None | Some("on") => true,
        Some("off") => false,
        Some(other) => bail!("--prefetch '{other}' is not known; use on or off"),
    };
    let paths = Paths::folder(Path::new(folder));
    let opened = Restore::open(&paths, from, args.paused, prefetches);
    let restore = opened.with_context(|| format!("--restore {folder}"))?;
    restore.head.asked.add_to(machine)?;
    Ok(Some(restore))
}

#[cold]
#[inline(never)]
fn plan(args: &PlanArgs, devices: &DeviceArgs) -> Result<Status> {
    let mut machine = args.machine(devices);
    verbosity(&machine);
    if args.dts && (args.json || args.sandbox) {
        let other = if args.json { "--json" } else { "--sandbox" };
        return Err(anyhow!("{other} and --dts exclude one another")).fault(Status::Usage);
    }
    let other = args.host.as_deref().filter(|host| *host != "this");
    let files = host::this();
    let restore = match &args.restore {
        None => None,
        Some(folder) => {
            let what = || format!("--restore {folder}");
            let state = Snapshot::state(&Paths::folder(Path::new(folder)));
            let head = state.and_then(|state| Head::from_bytes(&state.head));
            let head = head.with_context(what).fault(Status::Usage)?;
            head.asked.add_to(&mut machine).fault(Status::Usage)?;
            Some(head)
        }
    };
    let chosen = match &restore {
        None => config::board(&machine, other, boards::FALLBACK, &files)?,
        Some(head) => head.board_for(other)?,
    };
    let board = &chosen.board;
    match board.arch {
        Architecture::Aarch64 => {
            let (config, plan) =
                make_plan::<Aarch64>(args, &machine, chosen, &files, restore, kvm::aarch64_host)?;
            if args.dts {
                let tree = aarch64::device_tree(&config.board, &plan, &config.request);
                print(&tree.to_dts())?;
            } else {
                print_plan(args, &config, &plan)?;
            }
            if let Some(path) = &args.dtb {
                write_tree(path, &plan)?;
            }
        }
        Architecture::X86_64 => {
            if args.dts || args.dtb.is_some() {
                return Err(no_tree(board, "--dts and --dtb")).fault(Status::Usage);
            }
            let (config, plan) =
                make_plan::<X86_64>(args, &machine, chosen, &files, restore, kvm::x86_64_host)?;
            print_plan(args, &config, &plan)?;
        }
    }
    Ok(Status::Success)
}

fn no_tree(board: &Board, options: &str) -> anyhow::Error {
    anyhow!(
        "board '{}' is for {} guests, which have no device tree; leave out {options}",
        board.name,
        board.arch
    )
}

fn make_plan<A: Arch>(
    args: &PlanArgs,
    machine: &MachineArgs,
    chosen: Chosen,
    files: &HostFiles,
    restore: Option<Head>,
    this_host: fn() -> Result<A::Host>,
) -> Result<(Config<A>, Plan<A>)> {
    let names = chosen.board.host.core_names();
    let (assumed, cores, known) = match args.host.as_deref() {
        Some("this") if args.page_size.is_some() => {
            return Err(anyhow!(
                "--page-size: this host has its own pages; name a board by --host"
            ))
            .fault(Status::Usage);
        }
        Some("this") => (None, files.cores(names), None),
        named => {
            let board = named.map(boards::find).transpose()?;
            let board = with_pages(args, board.unwrap_or_else(|| chosen.board.clone()))?;
            let host = A::assumed_host(&board);
            (Some(host), board.host.cores(), Some(board))
        }
    };
    let is_this = assumed.is_none();
    let mut config = config::read::<A>(machine, chosen, &cores, is_this.then_some(files))?;
    let host = match assumed {
        Some(host) => host,
        None => this_host().fault(Status::Host)?,
    };
    if !machine.deterministic {
        config.request.seeds = Some(config::fresh_seeds()?);
    }
    if let Some(head) = &restore {
        head.give(&mut config).fault(Status::Usage)?;
    }
    let plan = decide(&config, &host, known.as_ref().unwrap_or(&config.board));
    let plan = match &restore {
        None => plan?,
        Some(head) => head.accept(plan)?,
    };
    warn_of_host(&config, is_this.then_some(&host));
    Ok((config, plan))
}

/// Returns `board` as a host whose kernel has pages of `--page-size`.
fn with_pages(args: &PlanArgs, mut board: Board) -> Result<Board> {
    let Some(text) = &args.page_size else {
        return Ok(board);
    };
    let page = parse_size(text)
        .map_err(|cause| anyhow!("--page-size: {cause}"))
        .fault(Status::Usage)?;
    let known = &board.host.guest_pages;
    if !known.contains(&page) {
        let known: Vec<_> = known.iter().map(|size| show_size(*size)).collect();
        return Err(anyhow!(
            "--page-size {text}: the cores of board '{}' have {}",
            board.name,
            known.join(", ")
        ))
        .fault(Status::Usage);
    }
    board.host.page_size = page;
    Ok(board)
}

fn print_plan<A: Arch>(args: &PlanArgs, config: &Config<A>, plan: &Plan<A>) -> Result<()> {
    if args.sandbox {
        let sandbox = Sandbox::of(Mode::On, &config.virtio, false, config.needs());
        return match args.json {
            true => print_json(&sandbox.json()),
            false => print(&sandbox.text()),
        };
    }
    let cmdline = &config.request.cmdline;
    if args.json {
        let settings = &config.settings;
        return print_json(&report::json(plan, settings, cmdline));
    }
    let kernel = config.kernel.as_ref().map(|kernel| kernel.describe());
    print(&report::text(plan, kernel.as_deref(), &config.settings))
}

#[cold]
#[inline(never)]
fn probe(args: &ProbeArgs) -> Result<Status> {
    let report = probe::probe();
    match args.json {
        true => print_json(&report.json())?,
        false => print(&report.text())?,
    }
    Ok(match report.runs_guests() {
        true => Status::Success,
        false => Status::Host,
    })
}

#[cold]
#[inline(never)]
fn boards(args: &BoardsArgs) -> Result<Status> {
    if let Some(name) = &args.show {
        print(&boards::profile(name)?.show())?;
        return Ok(Status::Success);
    }
    if args.table {
        print(&table::of_boards()?)?;
        return Ok(Status::Success);
    }
    let mut known = Vec::new();
    for board in boards::BUILT_IN {
        known.push(boards::find(board.name)?);
    }
    if args.json {
        let known: Vec<_> = known
            .iter()
            .map(|board| {
                json!({
                    "name": board.name,
                    "architecture": board.arch,
                    "description": board.description,
                })
            })
            .collect();
        print_json(&json!(known))?;
        return Ok(Status::Success);
    }
    for board in known {
        print(&format!(
            "{:<12} {:<8} {}\n",
            board.name,
            board.arch.to_string(),
            board.description
        ))?;
    }
    Ok(Status::Success)
}

fn verbosity(machine: &MachineArgs) {
    log::set_max_level(match machine.verbose {
        true => log::LevelFilter::Info,
        false => log::LevelFilter::Warn,
    });
}
