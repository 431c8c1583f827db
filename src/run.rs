//! Runs a guest: one event loop owns the machine; everything reaches it through one queue, the
//! terminal, and signals.
//!
//! `event` is the event loop; [`command`] the commands that it carries out, `queue` the events of
//! other threads, `ending` how a life ends. `input` feeds the console, `power` presses the power
//! key, `alarm` watches the guest's clock, `services` serves others. This file takes the guest from one life to the next: a
//! life lasts from a start to the next reset.

use crate::affinity;
use crate::config::{Config, fresh_generation, fresh_seeds};
use crate::console;
use crate::decide::{decide, warn_of_host, write_tree};
use crate::descriptors;
use crate::gdb;
use crate::heap;
use crate::host::allowed_cpus;
use crate::kvm::KvmArch;
use crate::machine::{self, Machine};
use crate::memory::{self, Sharing};
use crate::metrics;
use crate::sandbox::{Mode, Sandbox};
use crate::snapshot::{Head, Restore, Savers};
use crate::vcpu::{Traps, VcpuEvent};
use anyhow::{Context, Result};
use armlet_arch::Plan;
use armlet_arch::backing::HugePages;
use armlet_backends::backend::Backend;
use armlet_backends::drafts::Drafts;
use armlet_backends::kind::Need;
use armlet_backends::open::{self, Wanted};
use armlet_devices::rate::Bucket;
use armlet_devices::sync::lock;
use armlet_system::messages;
use armlet_system::page_size::page_size;
use armlet_system::signals::{self, Phase};
use armlet_system::status::{Fault, Status};
use armlet_system::terminal::RawTerminal;
use ending::Ending;
use event::{Events, Life, tell_counters};
use kvm_ioctls::Kvm;
use queue::Event;
use services::{Asked, Services};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;
use vm_memory::GuestMemoryMmap;

mod alarm;
mod change;
pub mod command;
mod ending;
mod event;
mod input;
mod power;
mod queue;
mod recorder;
mod saving;
mod services;

pub use command::{BalloonReport, By, Command, Done, Reply, State};
pub use ending::{OnPanic, OnReset};
pub use queue::Commands;
pub use services::{Begin, Service};

/// How long a debugger may take to hear of the guest's end.
const LAST_WORD: Duration = Duration::from_millis(500);
/// How long to wait for vCPUs before the name of the one that is waited for is updated.
const LONG: Duration = Duration::from_millis(50);

/// What stands before a vCPU's number in its thread's name, unless something else is asked for.
pub const VCPU_NAMES: &str = "vcpu";

/// The options of [`run`].
pub struct RunOptions<A: KvmArch> {
    /// KVM.
    pub kvm: Kvm,
    /// What KVM offers.
    pub host: A::Host,
    /// What the user asked for.
    pub config: Config<A>,
    /// What to do when the guest asks for a reset.
    pub on_reset: OnReset,
    /// What to do when the guest's kernel panics.
    pub on_panic: OnPanic,
    /// How long the guest may take to power off when asked; `None` for no limit.
    pub patience: Option<Duration>,
    /// Whether the guest gets fresh random seeds at each start.
    pub seeded: bool,
    /// Whether to count exits, and report them at the end and on SIGUSR1.
    pub stats: bool,
    /// Whether to count exits, for whoever asks by [`Command::Tally`].
    pub counted: bool,
    /// How far armlet confines itself.
    pub sandbox: Mode,
    /// What stands before a vCPU's number in its thread's name ([`VCPU_NAMES`]); the name is cut off
    /// after 15 bytes.
    pub vcpu_names: &'static str,
    /// How much the serial console may print in how much time, in bytes; what is beyond is thrown away.
    pub serial_limit: Option<Bucket>,
    /// Where to write the device tree to.
    pub dump_dtb: Option<String>,
    /// Where to listen for clients that control the machine.
    pub control: Option<PathBuf>,
    /// Serves clients once armlet is confined.
    pub service: Option<Service>,
    /// Where metrics go.
    pub metrics: Option<metrics::Target>,
    /// Where to listen for a debugger.
    pub gdb: Option<gdb::Address>,
    /// The snapshot from which the guest goes on in place of its kernel's start.
    pub restore: Option<Restore>,
    /// Why the guest cannot be started from its kernel, where that is so.
    pub no_kernel: Option<String>,
    /// Called with the sender of commands, once the event loop exists.
    pub commander: Option<Box<dyn FnOnce(Commands)>>,
}

/// Runs a guest to its end, through all of its resets.
///
/// # Errors
/// When the machine cannot be planned or created.
pub fn run<A: KvmArch>(mut options: RunOptions<A>) -> Result<Status> {
    // Threads inherit the affinity of the thread that starts them: unpinned vCPUs get the original
    // affinity back.
    let mut everywhere = Vec::new();
    if !options.config.io_cpus.is_empty() {
        everywhere = allowed_cpus();
        affinity::run_on(&options.config.io_cpus).fault(Status::Usage)?;
    }
    heap::have_c_use_one_heap();
    // Must precede the first thread.
    let devices = options.config.virtio.len() as u32;
    let descriptors = descriptors::of_machine(devices, options.config.request.cpus);
    descriptors::make_room(descriptors);
    let services = Asked {
        control: options.control.take(),
        gdb: options.gdb.take(),
        metrics: options.metrics.take(),
        service: options.service.take(),
        is_commanded: options.commander.is_some(),
    };
    let has_clients = services.has_clients();
    let native = match options.sandbox {
        Mode::On | Mode::Strict => Some(&A::OTHER_CALLS.native),
        Mode::Log | Mode::Off => None,
    };
    let virtio = &options.config.virtio;
    let broker = open::fork_broker(virtio, services.needs_broker(), native).fault(Status::Host)?;
    signals::survive_file_size_limit();
    let mut events = Events::new(options.on_panic, options.stats, options.patience)?;
    events.limit_serial(options.serial_limit.as_ref());
    let mut others = services.needs();
    match &options.restore {
        _ if has_clients => others.push(Need::Snapshots),
        Some(restore) => {
            others.push(Need::Restoring);
            others.extend(restore.records().then_some(Need::Recording));
        }
        None => {}
    }
    others.extend(options.config.needs());
    let sandbox = Sandbox::of(options.sandbox, virtio, has_clients, &others);
    let sandbox = Arc::new(sandbox);
    let mut memory = None;
    let mut terminal = None;
    let mut devices = options.config.virtio.iter().map(Wanted::options);
    let hvc = match devices.any(|device| device.is_terminal()) {
        false => None,
        true => Some(events.open_hvc(&sandbox)?),
    };
    // A machine that cannot be planned is refused before images are locked and daemons started.
    let mut restore = options.restore.take();
    options.config.request.goes_on = restore.is_some();
    let planned = plan(&mut options);
    // Another life of the guest begins with its kernel.
    options.config.request.goes_on = false;
    let mut first = Some(match &restore {
        None => planned?,
        Some(restore) => restore.head.accept(planned)?,
    });
    let mut drafts = match &broker {
        Some(broker) if has_clients => Some(Drafts::offer(broker).fault(Status::Host)?),
        _ => None,
    };
    let console = hvc.clone().map(|hvc| hvc as Arc<dyn Backend + Sync>);
    let config = &options.config;
    let ram = config.request.memory;
    let mut services = services.open(&options.kvm, broker.as_deref())?;
    options.counted |= services.as_ref().is_some_and(Services::counts_exits);
    let traps = services.as_ref().and_then(Services::traps);
    let (console, of_broker) = (console.as_ref(), broker.as_ref());
    events.backends =
        open::open(&config.virtio, ram, console, of_broker, has_clients).fault(Status::Usage)?;
    if let Some(commander) = options.commander.take() {
        commander(events.queue.commands());
    }
    loop {
        let plan = match first.take() {
            Some(plan) => plan,
            None => plan(&mut options)?,
        };
        log::info!(
            "{} IPA bits for {} ending at {:#x}, {} levels of stage 2",
            plan.width.bits,
            plan.width.highest.name,
            plan.width.highest.range.last(),
            plan.width.levels
        );
        if let Some(path) = options.dump_dtb.take() {
            write_tree(&path, &plan)?;
        }
        let memory = match &memory {
            Some(memory) => memory,
            None => {
                let saved = restore.as_ref().and_then(Restore::image);
                let mapped = map_memory(&options, &plan, &events.backends, saved)?;
                let memory = memory.insert(mapped);
                A::before_confinement(&plan);
                if let Some(restore) = &mut restore {
                    bring_pages(restore, &options, memory, &sandbox, &mut events)?;
                }
                if let Some(drafts) = drafts.take() {
                    let savers = Savers::new(drafts, memory, restore.as_ref());
                    let savers = savers.fault(Status::Host)?;
                    events.saving.savers = Some(savers);
                }
                // Before there are threads, which are confined as the one that starts them.
                sandbox.enter()?;
                open::examine(&mut events.backends).fault(Status::Usage)?;
                if let Some(services) = services.take() {
                    let commands = events.queue.commands();
                    services.start(&commands, &sandbox, memory, &options.config)?;
                }
                memory
            }
        };
        let wires = events.wires();
        let backends = &events.backends;
        let restored = match restore.take() {
            Some(restore) => {
                let state = restore.state::<A>().fault(Status::Usage)?;
                Some((state, restore.stays_paused))
            }
            None => None,
        };
        let saved = restored.as_ref().map_or(&[][..], |(state, _)| &state.vcpus);
        let kvm = &options.kvm;
        let mut machine =
            machine::assemble::<A>(kvm, &plan, memory, backends, wires, &sandbox, saved)
                .fault(Status::Host)?;
        machine.devices.hvc = hvc.clone();
        let stays_paused = match restored {
            Some((state, stays_paused)) => {
                let restored = machine.restore(&state);
                restored.context("cannot restore the machine")?;
                Some(stays_paused)
            }
            None => {
                let (kernel, initrd) = (&options.config.kernel, &options.config.initrd);
                signals::waiting_for("the kernel to be unpacked");
                machine
                    .load(memory, &plan, kernel.as_ref(), initrd.as_ref())
                    .fault(Status::Usage)?;
                None
            }
        };
        if plan.layout.generation.is_some() {
            tell_generation(
                &machine,
                &mut events,
                options.seeded,
                stays_paused.is_some(),
            )?;
        }
        if options.stats || options.counted {
            machine.count();
        }
        if terminal.is_none() {
            terminal = RawTerminal::enter()?;
            if terminal.is_some() || hvc.is_some() {
                signals::follow_terminal();
            }
        }
        // From here on SIGTERM asks the guest to power off, even before the event loop starts.
        signals::enter(Phase::Running);
        start(&mut machine, &options, &everywhere, traps.as_ref(), &events)?;
        events.input.terminal = terminal.is_some();
        match stays_paused {
            Some(true) => {
                events.input.held = true;
                events.recorder.guest_is_there(true);
            }
            Some(false) => events.resume(&machine)?,
            None => {}
        }
        let Config {
            asked,
            board,
            request,
            ..
        } = &options.config;
        let ending = events.watch(&Life {
            machine: &machine,
            describe: &|| Head::of(asked.clone(), board, request, &options.host, &plan),
        });
        let ending = ending.map(|ending| may_start_again(ending, &options, &events));
        let is_over = !matches!(ending, Ok(Ending::Reset) if options.on_reset == OnReset::Restart);
        let ending = match is_over {
            true => {
                // From here on signals end armlet, and the terminal's modes are restored.
                terminal = None;
                let ending = ending.map(Ending::status);
                let status = *ending.as_ref().unwrap_or(&Status::Failure);
                signals::end_with(status);
                if let Some(traps) = &traps {
                    traps.end(status as u8, LAST_WORD);
                }
                Some(ending)
            }
            false => {
                signals::enter(Phase::Between);
                None
            }
        };
        finish(&mut machine, &mut events);
        if options.stats {
            tell_counters(&machine.counters);
        }
        signals::waiting_for("the machine to be taken down");
        drop(machine);
        match ending {
            None => log::info!("the guest asked for a reset; starting it again"),
            Some(ending) => {
                for backend in std::mem::take(&mut events.backends) {
                    signals::waiting_for(format_args!("{} to be closed", backend.name()));
                    drop(backend);
                }
                return ending;
            }
        }
    }
}

/// Plans the guest's next life.
fn plan<A: KvmArch>(options: &mut RunOptions<A>) -> Result<Plan<A>> {
    if options.seeded && !options.config.request.goes_on {
        options.config.request.seeds = Some(fresh_seeds()?);
    }
    decide(&options.config, &options.host, &options.config.board)
}

/// Maps the guest's memory, which is kept across resets.
fn map_memory<A: KvmArch>(
    options: &RunOptions<A>,
    plan: &Plan<A>,
    backends: &[Box<dyn Backend>],
    saved: Option<memory::Image<'_>>,
) -> Result<Arc<GuestMemoryMmap>> {
    warn_of_host(&options.config, Some(&options.host));
    memory::warn_if_scarce(options.config.request.memory);
    let sharing = match backends.iter().any(|backend| backend.shares_memory()) {
        true => Sharing::Shared,
        false => Sharing::Private,
    };
    signals::waiting_for("the host to give guest memory");
    let backing = options.config.backing;
    let mapped = memory::map(&plan.layout.ram, sharing, backing, saved.as_ref());
    let mapped = mapped.fault(Status::Host)?;
    Ok(Arc::new(mapped))
}

/// Has the memory of a guest that goes on brought from the snapshot: by the process that gives its
/// pages, or those first that it needs first.
#[cold]
#[inline(never)]
fn bring_pages<A: KvmArch>(
    restore: &mut Restore,
    options: &RunOptions<A>,
    memory: &Arc<GuestMemoryMmap>,
    sandbox: &Arc<Sandbox>,
    events: &mut Events,
) -> Result<()> {
    let page = match options.config.backing.pages {
        HugePages::Of(size) => size,
        _ => page_size() as u64,
    };
    if let Some(handler) = restore.fill(memory, page).fault(Status::Host)? {
        events.keep_handler(handler);
    }
    let pages = restore.first_pages();
    events.recorder.wait_for(pages, memory, sandbox);
    Ok(())
}

/// Gives VMGenID and VMClock their content: a reset is no new generation, and a restore is.
#[cold]
#[inline(never)]
fn tell_generation<A: KvmArch>(
    machine: &Machine<A>,
    events: &mut Events,
    is_seeded: bool,
    is_restored: bool,
) -> Result<()> {
    let random = match (events.generation, is_seeded || is_restored) {
        (Some(random), _) => random,
        (None, false) => Default::default(),
        (None, true) => fresh_generation()?,
    };
    events.generation = Some(random);
    match is_restored {
        false => machine.devices.begin_generation(&random),
        true => machine.devices.renew_generation(&random),
    }
}

/// A guest that was to power off, or that has no kernel to begin with, ends where it asks for a reset.
fn may_start_again<A: KvmArch>(ending: Ending, options: &RunOptions<A>, events: &Events) -> Ending {
    if !matches!(ending, Ending::Reset) || options.on_reset != OnReset::Restart {
        return ending;
    }
    if events.was_asked() {
        messages::say(
            "the guest asked for a reset when it was to power off; it is not started again",
        );
        return Ending::Stopped;
    }
    match &options.no_kernel {
        Some(why) => {
            messages::say(&format!(
                "the guest asked for a reset, and cannot be started again: {why}"
            ));
            Ending::Stopped
        }
        None => Ending::Reset,
    }
}

/// Starts the vCPUs, on their CPUs or `everywhere`; they report to `events`.
fn start<A: KvmArch>(
    machine: &mut Machine<A>,
    options: &RunOptions<A>,
    everywhere: &[u32],
    traps: Option<&Arc<Traps>>,
    events: &Events,
) -> Result<()> {
    if let Some(traps) = traps {
        traps.begin_life();
    }
    let (serial, hvc) = (machine.devices.serial.clone(), machine.devices.hvc.clone());
    let stopping = Arc::clone(&machine.stopping);
    let tell = || {
        let (serial, hvc) = (serial.clone(), hvc.clone());
        let (queue, stopping) = (events.queue.clone(), Arc::clone(&stopping));
        move |event| {
            if event == VcpuEvent::Asked {
                return queue.tell(Event::Vcpu(event));
            }
            // Flushed on the vCPU's thread, where a slow reader blocks the vCPU and not the event
            // loop.
            if let Some(serial) = &serial {
                queue.tell_action(lock(serial).flush());
            }
            if let Some(hvc) = &hvc {
                hvc.drain(|| !stopping.load(Ordering::Acquire));
            }
            queue.tell(Event::Vcpu(event));
        }
    };
    let pinned = &options.config.pinning.cpus;
    let cpus = |index| pinned.get(index).map_or(everywhere, Vec::as_slice).to_vec();
    machine.start(options.vcpu_names, cpus, traps, tell)
}

/// Stops the vCPUs, and flushes the rest of the console's output.
fn finish<A: KvmArch>(machine: &mut Machine<A>, events: &mut Events) {
    signals::waiting_for("the vCPUs to stop");
    // This ends only with the vCPUs, or when the deadline of `signals` or another signal ends
    // armlet.
    while let Err(what) = machine.stop(LONG) {
        signals::waiting_for(what);
    }
    machine.vcpus.join();
    if let Some(serial) = &machine.devices.serial {
        events.queue.tell_action(lock(serial).flush());
    }
    if let Some(hvc) = &machine.devices.hvc {
        hvc.drain(console::is_output_ready);
    }
    events.hear_last_words();
}
