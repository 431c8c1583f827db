//! The life of a guest: one event loop owns the machine; everything reaches it through one
//! queue, the terminal, and signals.

use crate::affinity;
use crate::clock::ClockWatch;
use crate::commands::{decide, warn_of_host, write_tree};
use crate::config::{Config, fresh_seeds};
use crate::console::{
    self, ESCAPE_HELP, Escape, EscapeFilter, PanicWatch, RawTerminal, StandardOutput,
};
use crate::eintr::{events, uninterrupted};
use crate::host::allowed_cpus;
use crate::kvm::KvmArch;
use crate::machine::{self, Devices, Wires};
use crate::memory::{self, Sharing};
use crate::messages;
use crate::reactor::Reactor;
use crate::serial::TICK;
use crate::shutdown::{Due, Shutdown};
use crate::signals::{self, Phase};
use crate::stats::Counters;
use crate::status::{Fault, Status};
use crate::vcpu::{OffCheck, RunningVcpu, Shared, Told};
use crate::virtio;
use crate::virtio::console::{ConsoleKind, HvcConsole, terminal_size};
use anyhow::{Context, Result};
use armlet_devices::console::Console;
use armlet_devices::sync::lock;
use kvm_ioctls::Kvm;
use rustix::io::Errno;
use rustix::stdio;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

mod queue;

use queue::{Event, Queue};

/// How long the power key is held: longer than gpio-keys' debouncing of 5 ms.
const KEY_HELD: Duration = Duration::from_millis(100);
/// How soon vCPUs that were told to stop are told again; each time it takes twice as long.
const FIRST_KICK: Duration = Duration::from_micros(50);
/// The longest that it takes then.
const LONGEST_TO_KICK: Duration = Duration::from_millis(10);
/// How long a guest listens before it gets input: Linux's driver listens for a moment before it
/// throws away what came and begins in earnest (`pl011_hwinit`).
const SETTLE: Duration = Duration::from_millis(1);
/// How often a lock that a vCPU holds is tried before the loop goes on to other things.
const TRIES: usize = 100;
/// Bytes of type-ahead that are kept for a guest that does not read.
const INPUT_BYTES: usize = 4096;

/// What to do when the guest asks for a reset.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnReset {
    /// Start the machine anew.
    Restart,
    /// Leave, with [`Status::GuestReset`].
    Exit,
}

/// What to do when the guest's kernel panics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnPanic {
    /// Say so; the guest goes on as it likes (to a crash kernel, a reset, or nowhere).
    Report,
    /// Leave, with [`Status::GuestFailed`].
    Exit,
}

/// Everything that [`run`] is told.
pub struct Orders<A: KvmArch> {
    /// KVM.
    pub kvm: Kvm,
    /// What it offers.
    pub host: A::Host,
    /// What the user asked for.
    pub config: Config<A>,
    /// What to do when the guest asks for a reset.
    pub on_reset: OnReset,
    /// What to do when the guest's kernel panics.
    pub on_panic: OnPanic,
    /// How long the guest may take to power off when it was asked to; `None` for no limit.
    pub patience: Option<Duration>,
    /// Whether the guest gets fresh random seeds at each start.
    pub seeded: bool,
    /// Whether to count exits, and tell at the end and on SIGUSR1.
    pub stats: bool,
    /// Where to write the device tree to.
    pub dump_dtb: Option<String>,
}

/// How one life of the guest, from start to reset or end, ended.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Ending {
    PowerOff,
    Reset,
    Failed(String),
    Stopped,
}

/// Runs a guest to its end, through as many resets as it asks for.
///
/// # Errors
/// A machine that cannot be planned or made.
pub fn run<A: KvmArch>(mut orders: Orders<A>) -> Result<Status> {
    let pinning = orders.config.pinning.clone();
    // Threads run where the one that starts them does: vCPUs without CPUs of their own go back to
    // where this one was.
    let mut everywhere = Vec::new();
    if !orders.config.io_cpus.is_empty() {
        everywhere = allowed_cpus();
        affinity::run_on(&orders.config.io_cpus).fault(Status::Usage)?;
    }
    // Before there are threads.
    let broker = virtio::fork_broker(&orders.config.virtio).fault(Status::Host)?;
    signals::survive_file_size_limit();
    let mut events = Events::new(orders.on_panic, orders.stats, orders.patience)?;
    let mut memory = None;
    let mut terminal = None;
    let hvc = match orders.config.console {
        ConsoleKind::Serial => None,
        ConsoleKind::Virtio => Some(events.open_hvc()?),
    };
    let decide = |orders: &mut Orders<A>| {
        if orders.seeded {
            orders.config.request.seeds = Some(fresh_seeds()?);
        }
        decide(&orders.config, &orders.host, &orders.config.board)
    };
    // What cannot be planned is refused before images are locked and daemons started.
    let mut first = Some(decide(&mut orders)?);
    let backends =
        virtio::open(&orders.config.virtio, hvc.as_ref(), broker.as_ref()).fault(Status::Usage)?;
    loop {
        let plan = match first.take() {
            Some(plan) => plan,
            None => decide(&mut orders)?,
        };
        log::info!(
            "{} IPA bits for {} ending at {:#x}, {} levels of stage 2",
            plan.width.bits,
            plan.width.highest.name,
            plan.width.highest.range.last(),
            plan.width.levels
        );
        if let Some(path) = orders.dump_dtb.take() {
            write_tree(&path, &plan)?;
        }
        let memory = match &memory {
            Some(memory) => memory,
            None => {
                warn_of_host(&orders.config, Some(&orders.host));
                memory::warn_if_scarce(orders.config.request.memory);
                let sharing = match backends.iter().any(|backend| backend.shares_memory()) {
                    true => Sharing::Shared,
                    false => Sharing::Private,
                };
                signals::waiting_for("the host to give guest memory");
                let mapped = memory::map(&plan.layout.ram, sharing, orders.config.backing)
                    .fault(Status::Host)?;
                memory.insert(Arc::new(mapped))
            }
        };
        let stopping = Arc::new(AtomicBool::new(false));
        let wires = events.wires(&stopping);
        let mut machine = machine::assemble::<A>(&orders.kvm, &plan, memory, &backends, wires)
            .fault(Status::Host)?;
        let (kernel, initrd) = (&orders.config.kernel, &orders.config.initrd);
        machine.devices.hvc = hvc.clone();
        signals::waiting_for("the kernel to be unpacked");
        machine
            .load(memory, &plan, kernel.as_ref(), initrd.as_ref())
            .fault(Status::Usage)?;
        drop(plan);
        if orders.stats {
            machine.count();
        }
        if terminal.is_none() {
            terminal = RawTerminal::enter()?;
        }
        // A guest that runs is asked to power off, also before the loop looks for the first time.
        signals::enter(Phase::Running);
        let off = Arc::new(OffCheck::new(machine.vcpus.len()));
        let shared = Shared {
            buses: Arc::clone(&machine.buses),
            stopping: Arc::clone(&stopping),
            off: Arc::clone(&off),
        };
        let mut vcpus = Vec::new();
        for (index, vcpu) in std::mem::take(&mut machine.vcpus).into_iter().enumerate() {
            let queue = events.queue.clone();
            let cpus = pinning.cpus.get(index).unwrap_or(&everywhere).clone();
            let (serial, hvc) = (machine.devices.serial.clone(), hvc.clone());
            let halt = Arc::clone(&stopping);
            let tell = move |told| {
                if told == Told::Asked {
                    return queue.tell(Event::Told(told));
                }
                // Here, where a reader that does not read holds up a vCPU and not the loop.
                if let Some(serial) = &serial {
                    queue.tell_action(lock(serial).flush());
                }
                if let Some(hvc) = &hvc {
                    hvc.drain(|| !halt.load(Ordering::Acquire));
                }
                queue.tell(Event::Told(told));
            };
            let exits = Arc::clone(&machine.counters.exits[index]);
            vcpus.push(RunningVcpu::start::<A>(
                index,
                vcpu,
                shared.clone(),
                cpus,
                exits,
                tell,
            )?);
        }
        drop(shared);
        events.input.terminal = terminal.is_some();
        let ending = events.watch(
            &machine.devices,
            &machine.light,
            &machine.counters,
            &Vcpus {
                running: &vcpus,
                off: &off,
            },
        );
        let ending = match ending {
            Ok(Ending::Reset) if orders.on_reset == OnReset::Restart && events.was_asked() => {
                messages::say(
                    "the guest asked for a reset when it was to power off; it is not started again",
                );
                Ok(Ending::Stopped)
            }
            ending => ending,
        };
        let is_over = !matches!(ending, Ok(Ending::Reset) if orders.on_reset == OnReset::Restart);
        let ending = match is_over {
            true => {
                // From here on signals end armlet, and the terminal is the user's again.
                terminal = None;
                let ending = ending.map(status);
                signals::end_with(*ending.as_ref().unwrap_or(&Status::Failure));
                Some(ending)
            }
            false => {
                signals::enter(Phase::Between);
                None
            }
        };
        stop(&vcpus, &stopping, || machine.workers.at_work());
        for vcpu in vcpus {
            vcpu.join();
        }
        if let Some(serial) = &machine.devices.serial {
            events.queue.tell_action(lock(serial).flush());
        }
        if let Some(hvc) = &hvc {
            hvc.drain(console::is_output_ready);
        }
        events.hear_last_words();
        if orders.stats {
            tell_counters(&machine.counters);
        }
        signals::waiting_for("the machine to be taken down");
        drop(machine);
        match ending {
            None => log::info!("the guest asked for a reset; starting it again"),
            Some(ending) => {
                for backend in backends {
                    signals::waiting_for(format_args!("{} to be closed", backend.name()));
                    drop(backend);
                }
                return ending;
            }
        }
    }
}

fn tell_counters(counters: &Counters) {
    for line in counters.report() {
        messages::say(&line);
    }
}

fn status(ending: Ending) -> Status {
    match ending {
        Ending::PowerOff => Status::Success,
        Ending::Reset => Status::GuestReset,
        Ending::Stopped => Status::Stopped,
        Ending::Failed(what) => {
            messages::say(&what);
            Status::GuestFailed
        }
    }
}

/// Says that all vCPUs of a guest are off.
fn all_off(vcpus: usize) -> String {
    let which = match vcpus {
        1 => "the guest's only CPU is off".to_owned(),
        _ => format!("all {vcpus} CPUs of the guest are off"),
    };
    format!("{which} (PSCI CPU_OFF): nothing can turn one on again")
}

/// Makes all vCPUs leave the guest. A kick may come just before a thread begins to wait, so it
/// is repeated, at first soon: most threads end at once.
fn stop(vcpus: &[RunningVcpu], stopping: &AtomicBool, at_work: impl Fn() -> String) {
    stopping.store(true, Ordering::Release);
    signals::waiting_for("the vCPUs to stop");
    let mut pause = FIRST_KICK;
    loop {
        let running = (0..).zip(vcpus).filter(|(_, vcpu)| !vcpu.is_finished());
        let running: Vec<(usize, _)> = running.collect();
        let Some((first, _)) = running.first() else {
            return;
        };
        for (_, vcpu) in &running {
            vcpu.kick();
        }
        if pause == LONGEST_TO_KICK {
            let devices = at_work();
            signals::waiting_for(match devices.is_empty() {
                true => format!("vCPU {first} to stop"),
                false => format!("vCPU {first} to stop, which waits for {devices}"),
            });
        }
        std::thread::sleep(pause);
        pause = (2 * pause).min(LONGEST_TO_KICK);
    }
}

/// What epoll says is ready.
const INPUT: u64 = 0;
const BELL: u64 = 1;
const SIGNAL: u64 = 2;
const VIRTIO: u64 = 3;
const CLOCK: u64 = 4;

/// The event loop.
struct Events {
    epoll: Epoll,
    queue: Queue,
    signals: &'static EventFd,
    input: Input,
    /// When the power key is released.
    release: Option<Instant>,
    /// When the clock's alarm may be due.
    alarm: Option<Instant>,
    /// Tells when the host's clock is set, once there was an alarm.
    clock_set: Option<ClockWatch>,
    /// When a burst of output is looked after.
    tick: Option<Instant>,
    /// When input is looked after.
    feed: Option<Instant>,
    on_panic: OnPanic,
    /// Whether the guest's kernel said in this life that it panicked.
    panicked: bool,
    /// Whether all vCPUs of this life are off.
    all_off: bool,
    /// How long the guest may take to power off when it was asked to.
    patience: Option<Duration>,
    /// That it was.
    shutdown: Option<Shutdown>,
}

/// The running vCPUs of a life.
struct Vcpus<'a> {
    running: &'a [RunningVcpu],
    off: &'a OffCheck,
}

/// Standard input on its way to the guest.
#[derive(Debug, Default)]
struct Input {
    filter: EscapeFilter,
    /// Read, and not yet taken by the guest.
    pending: Vec<u8>,
    /// Whether epoll watches it.
    watched: bool,
    /// A file, which epoll does not watch: it can be read at any time.
    always_ready: bool,
    /// A terminal, where escape keys work.
    terminal: bool,
    ended: bool,
    /// The time of the guest's listening that has lasted for [`SETTLE`].
    session: Option<u64>,
}

/// What came of giving the console input.
enum Handed {
    /// As much as it wanted; whether it wants more than there was.
    All { wants_more: bool },
    /// Nothing; when to try again, if not when it says so itself.
    NotNow(Option<Duration>),
}

impl Events {
    fn new(on_panic: OnPanic, stats: bool, patience: Option<Duration>) -> Result<Events> {
        let epoll = Epoll::new().context("cannot make an epoll instance")?;
        let bell = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).context("cannot make an eventfd")?;
        let signals = signals::install(stats)?;
        for (fd, token) in [(bell.as_raw_fd(), BELL), (signals.as_raw_fd(), SIGNAL)] {
            epoll
                .ctl(
                    ControlOperation::Add,
                    fd,
                    EpollEvent::new(EventSet::IN, token),
                )
                .context("cannot watch a descriptor")?;
        }
        Ok(Events {
            epoll,
            queue: Queue::new(bell),
            signals,
            input: Input::default(),
            release: None,
            alarm: None,
            clock_set: None,
            tick: None,
            feed: None,
            on_panic,
            panicked: false,
            patience,
            shutdown: None,
            all_off: false,
        })
    }

    /// The virtio console of this terminal.
    fn open_hvc(&self) -> Result<Arc<HvcConsole>> {
        let (room, action) = (self.queue.clone(), self.queue.clone());
        // What the loop waits for is drained before armlet ends; nothing else stops the thread.
        let output = StandardOutput::new(Arc::default());
        let hvc = HvcConsole::open(
            Box::new(PanicWatch::new(output)),
            move || room.tell(Event::Room),
            move |told| action.tell_action(told),
        )?;
        Ok(Arc::new(hvc))
    }

    /// The wires of a new life of the guest, before any vCPU of it runs.
    fn wires(&mut self, stopping: &Arc<AtomicBool>) -> Wires {
        // What an earlier life left behind means nothing to this one.
        self.queue.take();
        (self.release, self.alarm, self.tick, self.feed) = (None, None, None, None);
        self.input.session = None;
        (self.panicked, self.all_off) = (false, false);
        let (room, burst, deadline) = (self.queue.clone(), self.queue.clone(), self.queue.clone());
        let output = StandardOutput::new(Arc::clone(stopping));
        Wires {
            output: Box::new(PanicWatch::new(output)),
            on_room: Box::new(move || room.tell(Event::Room)),
            on_burst: Box::new(move || burst.tell(Event::Burst)),
            on_deadline: Box::new(move || deadline.tell(Event::Deadline)),
        }
    }

    /// Serves the machine until its end.
    fn watch(
        &mut self,
        devices: &Devices,
        light: &Reactor,
        counters: &Counters,
        vcpus: &Vcpus<'_>,
    ) -> Result<Ending> {
        // It leaves epoll when the reactor is dropped.
        let event = EpollEvent::new(EventSet::IN, VIRTIO);
        self.epoll
            .ctl(ControlOperation::Add, light.as_raw_fd(), event)
            .context("cannot watch the virtio devices")?;
        self.feed(devices)?;
        let mut ready = [EpollEvent::default(); 4];
        loop {
            let count = events(&self.epoll, self.timeout(), &mut ready)
                .context("cannot wait for events")?;
            for event in &ready[..count] {
                let ending = match event.data() {
                    INPUT => self.read_input(devices)?,
                    SIGNAL => self.read_signals(devices, counters),
                    VIRTIO => light.turn(0).map(|_| None)?,
                    CLOCK => self.clock_was_set(devices).map(|()| None)?,
                    _ => self.read_queue(devices, vcpus)?,
                };
                if let Some(ending) = ending {
                    return Ok(ending);
                }
            }
            self.pass_deadlines(devices)?;
            if let Some(ending) = self.ask_again(devices) {
                return Ok(ending);
            }
        }
    }

    /// Milliseconds until the next deadline; -1 without one.
    fn timeout(&self) -> i32 {
        let retry = messages::is_behind().then(|| Instant::now() + messages::RETRY);
        let asked = self.shutdown.map(|shutdown| shutdown.next());
        let deadlines = [self.release, self.alarm, self.tick, self.feed, retry, asked];
        deadlines.into_iter().flatten().min().map_or(-1, |next| {
            let left = next.saturating_duration_since(Instant::now());
            // Rounded up, so that it is not woken just before.
            i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX)
        })
    }

    fn pass_deadlines(&mut self, devices: &Devices) -> Result<()> {
        if messages::is_behind() {
            messages::retry();
        }
        let now = Instant::now();
        if self.release.is_some_and(|release| release <= now) {
            self.release = None;
            if let Some(key) = &devices.power_key {
                lock(&**key).set_pressed(false);
            }
        }
        if self.alarm.is_some_and(|alarm| alarm <= now) {
            self.set_alarm(devices)?;
        }
        if self.tick.is_some_and(|tick| tick <= now) {
            let goes_on = devices.serial.as_ref().is_some_and(|serial| {
                at_hand(serial).is_none_or(|mut serial| {
                    let (goes_on, action) = serial.tick();
                    self.queue.tell_action(action);
                    goes_on
                })
            });
            self.tick = goes_on.then(|| now + TICK);
        }
        if self.feed.is_some_and(|feed| feed <= now) {
            self.feed = None;
            self.feed(devices)?;
        }
        Ok(())
    }

    /// Raises a due alarm and finds the next.
    fn set_alarm(&mut self, devices: &Devices) -> Result<()> {
        self.alarm = devices.clock.as_ref().and_then(|clock| {
            let mut clock = lock(clock);
            clock.poll();
            clock
                .deadline()
                .and_then(|left| Instant::now().checked_add(left))
        });
        if self.alarm.is_some() && self.clock_set.is_none() {
            let watch = ClockWatch::new()?;
            let event = EpollEvent::new(EventSet::IN, CLOCK);
            self.epoll
                .ctl(ControlOperation::Add, watch.as_raw_fd(), event)
                .context("cannot watch the host's clock")?;
            self.clock_set = Some(watch);
            // Set between the question and the watch, it would not have told.
            return self.set_alarm(devices);
        }
        Ok(())
    }

    /// Somebody set the host's clock: the alarm is due at another time.
    fn clock_was_set(&mut self, devices: &Devices) -> Result<()> {
        if let Some(watch) = &self.clock_set {
            watch.again()?;
        }
        self.set_alarm(devices)
    }

    fn read_queue(&mut self, devices: &Devices, vcpus: &Vcpus<'_>) -> Result<Option<Ending>> {
        let news = self.queue.take();
        if let Some(what) = news.panicked {
            if self.on_panic == OnPanic::Exit {
                self.panicked = true;
                return Ok(Some(Ending::Failed(what)));
            }
            self.say_panic(&what);
        }
        match news.end {
            Some(Told::PowerOff) => return Ok(Some(Ending::PowerOff)),
            Some(Told::Reset) => return Ok(Some(Ending::Reset)),
            Some(Told::Failed(what) | Told::Panicked(what)) => {
                return Ok(Some(Ending::Failed(what)));
            }
            None | Some(Told::Asked | Told::AllOff) => {}
        }
        if news.all_off {
            let what = all_off(vcpus.running.len());
            if self.on_panic == OnPanic::Exit {
                return Ok(Some(Ending::Failed(what)));
            }
            if self.was_asked() {
                messages::say(&format!("stopped: {what}"));
                return Ok(Some(Ending::Stopped));
            }
            self.all_off = true;
            let keys = if self.input.terminal {
                "Ctrl-A x or "
            } else {
                ""
            };
            messages::say(&format!(
                "{what}, and it does not hear its power key; {keys}a signal ends it"
            ));
        }
        if news.asked
            && let Some(index) = vcpus.off.asked()
        {
            vcpus.running[index].kick();
        }
        if news.burst {
            self.tick = Some(Instant::now() + TICK);
        }
        if news.deadline {
            self.set_alarm(devices)?;
        }
        if news.room {
            self.feed(devices)?;
        }
        Ok(None)
    }

    /// Says that the guest's kernel panicked, once in a life: a guest may print those words as often
    /// as it likes.
    fn say_panic(&mut self, what: &str) {
        if !std::mem::replace(&mut self.panicked, true) {
            messages::say(what);
        }
    }

    /// Says what was told after the loop ended, by vCPUs on their way to the end.
    fn hear_last_words(&mut self) {
        if let Some(what) = self.queue.take().panicked {
            self.say_panic(&what);
        }
    }

    /// Whether the guest was asked to power off.
    fn was_asked(&self) -> bool {
        self.shutdown.is_some()
    }

    /// Presses the power key again where the guest was asked to power off and has not yet, and gives
    /// it up where it took too long.
    fn ask_again(&mut self, devices: &Devices) -> Option<Ending> {
        match self.shutdown.as_mut()?.due(Instant::now()) {
            Due::Nothing => None,
            Due::Press => {
                self.press(devices);
                None
            }
            Due::GiveUp => {
                let seconds = self.patience.unwrap_or_default().as_secs();
                messages::say(&format!(
                    "stopped: the guest did not power off within {seconds} s (--stop-timeout)"
                ));
                Some(Ending::Stopped)
            }
        }
    }

    /// Presses the guest's power key; whether it has one.
    fn press(&mut self, devices: &Devices) -> bool {
        let Some(key) = &devices.power_key else {
            return false;
        };
        lock(&**key).set_pressed(true);
        self.release = Some(Instant::now() + KEY_HELD);
        true
    }

    /// SIGUSR1 asks for the counters. The first SIGTERM or SIGHUP asks the guest to power off, where
    /// a vCPU is on to hear it; everything else stops at once.
    fn read_signals(&mut self, devices: &Devices, counters: &Counters) -> Option<Ending> {
        // What comes after this read rings again.
        let _ = self.signals.read();
        let taken = signals::take();
        if taken.counters {
            tell_counters(counters);
        }
        if taken.continued && self.input.terminal {
            console::make_raw_again();
        }
        if taken.resized || taken.continued {
            let console = devices.hvc.as_ref().and_then(|hvc| hvc.current());
            if let (Some(console), Some(size)) = (console, terminal_size()) {
                lock(&console).resize(size);
            }
        }
        if taken.stop {
            messages::say("stopped by a signal");
            return Some(Ending::Stopped);
        }
        if !taken.power_key {
            return None;
        }
        if self.all_off {
            messages::say("stopped by a signal: all of its CPUs are off");
            return Some(Ending::Stopped);
        }
        if !self.press(devices) {
            messages::say("stopped by a signal: this board has no power key");
            return Some(Ending::Stopped);
        }
        self.shutdown = Some(Shutdown::new(Instant::now(), self.patience));
        messages::say("pressed the guest's power key; a second signal stops it at once");
        None
    }

    fn read_input(&mut self, devices: &Devices) -> Result<Option<Ending>> {
        let mut buffer = [0_u8; INPUT_BYTES];
        // It is ready, or does not wait.
        let count = match uninterrupted(|| rustix::io::read(stdio::stdin(), &mut buffer)) {
            Ok(0) => {
                self.input.ended = true;
                self.watch_input(false)?;
                return Ok(None);
            }
            Ok(count) => count,
            Err(Errno::AGAIN) => 0,
            Err(error) => {
                log::warn!("cannot read standard input ({error}); the guest gets no more of it");
                self.input.ended = true;
                self.watch_input(false)?;
                0
            }
        };
        if !self.input.terminal {
            self.input.pending.extend_from_slice(&buffer[..count]);
            self.feed(devices)?;
            return Ok(None);
        }
        if !console::is_raw() {
            // Brought back from the background without a signal.
            console::make_raw_again();
        }
        let mut typed = &buffer[..count];
        while !typed.is_empty() {
            let (used, escape) = self.input.filter.take(typed, &mut self.input.pending);
            typed = &typed[used..];
            match escape {
                Some(Escape::Leave) => return Ok(Some(Ending::Stopped)),
                Some(Escape::Help) => messages::say(ESCAPE_HELP),
                Some(Escape::Break) => {
                    if let Some(mut serial) = devices.serial.as_deref().and_then(at_hand) {
                        self.queue.tell_action(serial.receive_break());
                    }
                }
                None => {}
            }
        }
        // A person who types at a guest that does not read is better off with working escape
        // keys than with all that was typed.
        self.input.pending.truncate(INPUT_BYTES);
        self.feed(devices)?;
        Ok(None)
    }

    /// Hands the guest what it wants of what was typed, and reads on where there is room.
    fn feed(&mut self, devices: &Devices) -> Result<()> {
        loop {
            let wants_more = match self.hand_over(devices) {
                Handed::All { wants_more } => wants_more,
                Handed::NotNow(retry) => {
                    self.feed = retry.map(|wait| Instant::now() + wait);
                    false
                }
            };
            // While the guest takes nothing, reading on would only fill our memory. A terminal is
            // read all the same, for its escape keys.
            let read_on = self.input.pending.is_empty() || self.input.terminal;
            self.watch_input(read_on)?;
            let from_file = self.input.always_ready && !self.input.ended;
            if !(from_file && read_on && wants_more) {
                return Ok(());
            }
            self.read_file();
        }
    }

    /// Gives the console as much of what is pending as it wants.
    fn hand_over(&mut self, devices: &Devices) -> Handed {
        if let Some(console) = devices.hvc.as_ref().and_then(|hvc| hvc.current()) {
            // Only this thread and a vCPU that starts or stops the device ever hold it for long.
            let mut console = lock(&console);
            if console.listening().is_some() {
                let (taken, wants_more) = console.receive(&self.input.pending);
                self.input.pending.drain(..taken);
                return Handed::All { wants_more };
            }
        }
        let Some(serial) = &devices.serial else {
            return Handed::NotNow(None);
        };
        let Some(mut serial) = at_hand(serial) else {
            return Handed::NotNow(Some(TICK));
        };
        let session = serial.listening();
        if session != self.input.session {
            self.input.session = session;
            return Handed::NotNow(session.map(|_| SETTLE));
        }
        let (taken, wants_more, action) = serial.receive(&self.input.pending);
        self.queue.tell_action(action);
        self.input.pending.drain(..taken);
        Handed::All { wants_more }
    }

    fn read_file(&mut self) {
        let mut buffer = [0_u8; INPUT_BYTES];
        match uninterrupted(|| rustix::io::read(stdio::stdin(), &mut buffer)) {
            Ok(0) | Err(_) => self.input.ended = true,
            Ok(count) => self.input.pending.extend_from_slice(&buffer[..count]),
        }
    }

    /// Has epoll watch standard input, or not.
    fn watch_input(&mut self, watch: bool) -> Result<()> {
        let fd: RawFd = stdio::stdin().as_raw_fd();
        let event = EpollEvent::new(EventSet::IN, INPUT);
        let watch = watch && !self.input.ended;
        if watch == self.input.watched || self.input.always_ready {
            return Ok(());
        }
        let operation = match watch {
            true => ControlOperation::Add,
            false => ControlOperation::Delete,
        };
        match self.epoll.ctl(operation, fd, event) {
            Ok(()) => self.input.watched = watch,
            // A file or /dev/null.
            Err(error) if error.raw_os_error() == Some(libc::EPERM) => {
                self.input.always_ready = true;
            }
            // A closed one.
            Err(error) if error.raw_os_error() == Some(libc::EBADF) => self.input.ended = true,
            Err(error) => return Err(error).context("cannot watch standard input"),
        }
        Ok(())
    }
}

/// The console, if it can be used without waiting for a reader of the output: neither for a vCPU
/// that writes, nor to write what a burst has left. The loop waits for nobody.
fn at_hand(serial: &Mutex<dyn Console>) -> Option<MutexGuard<'_, dyn Console + 'static>> {
    // A vCPU that tells of room still holds the lock, as a rule for an instant only.
    let serial = (0..TRIES).find_map(|_| {
        let free = serial.try_lock().ok();
        if free.is_none() {
            std::thread::yield_now();
        }
        free
    })?;
    (!serial.in_burst() || console::is_output_ready()).then_some(serial)
}
