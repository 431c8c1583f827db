//! The event loop: it waits for the terminal, signals, virtio devices, the host's clock and events
//! of other threads, and tracks the deadlines of a life.

use super::alarm::Alarm;
use super::change;
use super::command::{By, Command, Done, Reply, State, of_signals};
use super::ending::{Ending, OnPanic};
use super::input::{Input, at_hand};
use super::power::Power;
use super::queue::{Event, Queue};
use super::recorder::Recorder;
use super::saving::{Ended, Saving};
use crate::config::fresh_generation;
use crate::console::{ESCAPE_HELP, Limit, PanicWatch, StandardOutput};
use crate::kvm::KvmArch;
use crate::machine::{Devices, Machine, Wires};
use crate::sandbox::{Role, Sandbox};
use crate::serial::TICK;
use crate::snapshot::{Head, Wanted, Written};
use crate::stats::Counters;
use crate::vcpu::VcpuEvent;
use anyhow::{Context, Result};
use armlet_backends::backend::Backend;
use armlet_backends::console::{HvcConsole, terminal_size};
use armlet_devices::generation;
use armlet_devices::rate::Bucket;
use armlet_devices::sync::lock;
use armlet_snapshot::faults::Handler;
use armlet_system::eintr::events;
use armlet_system::messages;
use armlet_system::signals;
use armlet_system::terminal;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

mod giver;

use giver::Giver;

/// How long the machine may take to pause. The event loop waits for it.
const LIMIT: Duration = Duration::from_secs(5);

/// Epoll tokens.
const INPUT: u64 = 0;
const BELL: u64 = 1;
const VIRTIO: u64 = 2;
const CLOCK: u64 = 3;

/// The event loop.
pub(super) struct Events {
    epoll: Epoll,
    pub(super) queue: Queue,
    /// Rings for signals and for what is in the queue.
    bell: &'static EventFd,
    pub(super) input: Input,
    /// What stands behind the virtio devices.
    pub(super) backends: Vec<Box<dyn Backend>>,
    power: Power,
    alarm: Alarm,
    /// How often a guest was started.
    lives: u64,
    /// What VMGenID and VMClock hold, once a guest has them.
    pub(super) generation: Option<generation::Random>,
    /// When to flush a burst of output.
    tick: Option<Instant>,
    on_panic: OnPanic,
    /// What the serial console may print, in all of the guest's lives.
    serial_limit: Option<Arc<Limit>>,
    /// Whether a signal stops the guest without asking it.
    stops_at_once: bool,
    /// Whether a panic of the guest's kernel was reported in this life.
    panicked: bool,
    /// Snapshots.
    pub(super) saving: Saving,
    /// The pages that a restored guest needs first.
    pub(super) recorder: Recorder,
    /// Watches the process that gives guest memory, if one does.
    giver: Giver,
}

/// A life of the guest, as the event loop has it.
pub(super) struct Life<'a, A: KvmArch> {
    /// The machine.
    pub(super) machine: &'a Machine<A>,
    /// Describes it for a snapshot.
    pub(super) describe: &'a dyn Fn() -> Result<Head>,
}

impl Events {
    /// Creates a loop that waits for signals and for its queue.
    ///
    /// # Errors
    /// A process without room for another descriptor.
    pub(super) fn new(
        on_panic: OnPanic,
        stats: bool,
        patience: Option<Duration>,
    ) -> Result<Events> {
        let epoll = Epoll::new().context("cannot make an epoll instance")?;
        let bell = signals::install(stats)?;
        epoll
            .ctl(
                ControlOperation::Add,
                bell.as_raw_fd(),
                EpollEvent::new(EventSet::IN, BELL),
            )
            .context("cannot watch a descriptor")?;
        Ok(Events {
            epoll,
            queue: Queue::new(bell),
            bell,
            input: Input::new(INPUT),
            backends: Vec::new(),
            stops_at_once: patience == Some(Duration::ZERO),
            power: Power::new(patience),
            alarm: Alarm::new(CLOCK),
            lives: 0,
            generation: None,
            serial_limit: None,
            tick: None,
            on_panic,
            panicked: false,
            saving: Saving::default(),
            recorder: Recorder::default(),
            giver: Giver::default(),
        })
    }

    /// Keeps the process that gives guest memory, to the end.
    pub(super) fn keep_handler(&mut self, handler: Handler) {
        self.giver.keep(handler);
    }

    /// Has the serial console print no more than this.
    pub(super) fn limit_serial(&mut self, bucket: Option<&Bucket>) {
        self.serial_limit = bucket.and_then(Limit::new).map(Arc::new);
    }

    /// Returns the virtio console of this terminal.
    pub(super) fn open_hvc(&self, sandbox: &Arc<Sandbox>) -> Result<Arc<HvcConsole>> {
        let (room, action) = (self.queue.clone(), self.queue.clone());
        // The loop drains the console before armlet ends; nothing else stops its thread.
        let output = StandardOutput::new(Arc::default());
        let hvc = HvcConsole::open(
            Box::new(PanicWatch::new(output)),
            sandbox.entrance(Role::Console),
            move || room.tell(Event::Room),
            move |told| action.tell_action(told),
        )?;
        Ok(Arc::new(hvc))
    }

    /// Returns the callbacks for the devices of a new life of the guest, before any of its vCPUs
    /// runs.
    pub(super) fn wires(&mut self) -> Wires {
        self.lives += 1;
        // Events of the previous life are void.
        self.queue.take_events();
        self.input.begin_life();
        self.power.begin_life();
        self.alarm.begin_life();
        (self.tick, self.panicked) = (None, false);
        let (room, burst, deadline) = (self.queue.clone(), self.queue.clone(), self.queue.clone());
        let stopping = Arc::default();
        let output = StandardOutput::new(Arc::clone(&stopping));
        let output = output.held_to(self.serial_limit.clone());
        Wires {
            output: Box::new(PanicWatch::new(output)),
            on_room: Box::new(move || room.tell(Event::Room)),
            on_burst: Box::new(move || burst.tell(Event::Burst)),
            on_deadline: Box::new(move || deadline.tell(Event::Deadline)),
            stopping,
        }
    }

    /// Serves the machine until its life ends.
    ///
    /// # Errors
    /// A failed wait.
    pub(super) fn watch<A: KvmArch>(&mut self, life: &Life<'_, A>) -> Result<Ending> {
        let machine = life.machine;
        let devices = &machine.devices;
        self.giver.watch(machine.entrance(Role::Device));
        if self.input.held {
            machine.stop_time();
        }
        // It is removed from epoll when the reactor is dropped.
        let event = EpollEvent::new(EventSet::IN, VIRTIO);
        self.epoll
            .ctl(ControlOperation::Add, machine.light.as_raw_fd(), event)
            .context("cannot watch the virtio devices")?;
        self.feed(devices)?;
        let mut ready = [EpollEvent::default(); 4];
        loop {
            let count = events(&self.epoll, self.timeout(), &mut ready)
                .context("cannot wait for events")?;
            for event in &ready[..count] {
                let ending = match event.data() {
                    INPUT => self.read_input(life)?,
                    VIRTIO => machine.light.turn(0).map(|_| None)?,
                    CLOCK => {
                        let clock = devices.clock.as_deref();
                        self.alarm.clock_was_set(&self.epoll, clock)?;
                        None
                    }
                    _ => self.answer_bell(life)?,
                };
                if let Some(ending) = ending {
                    return Ok(ending);
                }
            }
            if let Some(ending) = self.pass_deadlines(devices)? {
                return Ok(ending);
            }
        }
    }

    fn read_input<A: KvmArch>(&mut self, life: &Life<'_, A>) -> Result<Option<Ending>> {
        for escape in self.input.read(&self.epoll)? {
            let ending = self.obey(escape.into(), life)?;
            if ending.is_some() {
                return Ok(ending);
            }
        }
        self.feed(&life.machine.devices)?;
        Ok(None)
    }

    fn feed(&mut self, devices: &Devices) -> Result<()> {
        self.input.feed(&self.epoll, &self.queue, devices)
    }

    fn answer_bell<A: KvmArch>(&mut self, life: &Life<'_, A>) -> Result<Option<Ending>> {
        // A signal or an event after this read makes it readable again.
        let _ = self.bell.read();
        match self.read_signals(life)? {
            None => self.read_queue(life),
            ending => Ok(ending),
        }
    }

    fn read_signals<A: KvmArch>(&mut self, life: &Life<'_, A>) -> Result<Option<Ending>> {
        for command in of_signals(signals::take()) {
            let ending = self.obey(command, life)?;
            if ending.is_some() {
                return Ok(ending);
            }
        }
        Ok(None)
    }

    /// Returns the milliseconds until the next deadline; -1 without one.
    fn timeout(&self) -> i32 {
        let retry = messages::is_behind().then(|| Instant::now() + messages::RETRY);
        let deadlines = [
            self.power.deadline(),
            self.alarm.deadline(),
            self.input.deadline(),
            self.tick,
            self.recorder.deadline(),
            retry,
        ];
        deadlines.into_iter().flatten().min().map_or(-1, |next| {
            let left = next.saturating_duration_since(Instant::now());
            // Rounded up, so that the loop does not wake just before it.
            i32::try_from(left.as_millis() + 1).unwrap_or(i32::MAX)
        })
    }

    fn pass_deadlines(&mut self, devices: &Devices) -> Result<Option<Ending>> {
        if messages::is_behind() {
            messages::retry();
        }
        let now = Instant::now();
        let is_due = |deadline: Option<Instant>| deadline.is_some_and(|deadline| deadline <= now);
        if is_due(self.alarm.deadline()) {
            self.alarm.set(&self.epoll, devices.clock.as_deref())?;
        }
        if is_due(self.tick) {
            let goes_on = devices.serial.as_ref().is_some_and(|serial| {
                at_hand(serial).is_none_or(|mut serial| {
                    let (goes_on, action) = serial.tick();
                    self.queue.tell_action(action);
                    goes_on
                })
            });
            self.tick = goes_on.then(|| now + TICK);
        }
        if is_due(self.input.deadline()) {
            self.feed(devices)?;
        }
        if is_due(self.recorder.deadline()) {
            self.recorder.begin();
        }
        Ok(self.power.pass(now, devices))
    }

    fn read_queue<A: KvmArch>(&mut self, life: &Life<'_, A>) -> Result<Option<Ending>> {
        let machine = life.machine;
        let devices = &machine.devices;
        let news = self.queue.take_events();
        if let Some(what) = news.panicked {
            if self.on_panic == OnPanic::Exit {
                self.panicked = true;
                return Ok(Some(Ending::Failed(what)));
            }
            self.say_panic(&what);
        }
        match news.end {
            Some(VcpuEvent::PowerOff) => return Ok(Some(Ending::PowerOff)),
            Some(VcpuEvent::Reset) => return Ok(Some(Ending::Reset)),
            Some(VcpuEvent::Failed(what) | VcpuEvent::Panicked(what)) => {
                return Ok(Some(Ending::Failed(what)));
            }
            None | Some(VcpuEvent::Asked | VcpuEvent::AllOff) => {}
        }
        if news.all_off {
            let what = all_off(machine.vcpus.count());
            if self.on_panic == OnPanic::Exit {
                return Ok(Some(Ending::Failed(what)));
            }
            if self.power.was_asked() {
                messages::say(&format!("stopped: {what}"));
                return Ok(Some(Ending::Stopped));
            }
            self.power.all_off = true;
            let keys = if self.input.terminal {
                "Ctrl-A x or "
            } else {
                ""
            };
            messages::say(&format!(
                "{what}, and it ignores its power key; {keys}a signal ends it"
            ));
        }
        if news.asked {
            machine.vcpus.kick_asked();
        }
        if news.burst {
            self.tick = Some(Instant::now() + TICK);
        }
        if news.deadline {
            self.alarm.set(&self.epoll, devices.clock.as_deref())?;
        }
        if news.room {
            self.feed(devices)?;
        }
        if let Some(ended) = news.saved.and_then(|outcome| self.saving.end(*outcome)) {
            self.answer_snapshot(machine, ended)?;
        }
        for command in self.queue.take_commands() {
            let ending = self.obey(command, life)?;
            if ending.is_some() {
                return Ok(ending);
            }
        }
        Ok(None)
    }

    /// Reports that the guest's kernel panicked, once in a life: a guest may print the message any
    /// number of times.
    fn say_panic(&mut self, what: &str) {
        if !std::mem::replace(&mut self.panicked, true) {
            messages::say(what);
        }
    }

    /// Reports events that vCPUs sent after the loop ended, while they were being stopped.
    pub(super) fn hear_last_words(&mut self) {
        if let Some(what) = self.queue.take_events().panicked {
            self.say_panic(&what);
        }
    }

    /// Returns whether the guest was asked to power off.
    pub(super) fn was_asked(&self) -> bool {
        self.power.was_asked()
    }

    /// Carries out a command; returns the guest's end, if the command causes it.
    fn obey<A: KvmArch>(&mut self, command: Command, life: &Life<'_, A>) -> Result<Option<Ending>> {
        let machine = life.machine;
        let devices = &machine.devices;
        match command {
            Command::ShowCounters => tell_counters(&machine.counters),
            Command::TerminalChanged(by_a_shell) => self.look_at_terminal(by_a_shell, devices),
            Command::Help => messages::say(ESCAPE_HELP),
            Command::Break => {
                if let Some(mut serial) = devices.serial.as_deref().and_then(at_hand) {
                    self.queue.tell_action(serial.receive_break());
                }
            }
            Command::Stop(by) => {
                match by {
                    By::Key => {}
                    By::Signal => messages::say("stopped by a signal"),
                    By::Control => messages::say("stopped at the control socket"),
                    By::Debugger => messages::say("stopped by the debugger"),
                }
                return Ok(Some(Ending::Stopped));
            }
            Command::PowerKey if self.stops_at_once => {
                messages::say("stopped by a signal");
                return Ok(Some(Ending::Stopped));
            }
            Command::PowerKey => return Ok(self.power.ask(devices)),
            Command::Pause(reply) => {
                let held = machine.pause(LIMIT);
                self.input.held = held.is_ok();
                reply.send(held);
            }
            Command::Resume(reply) => match self.saving.refusal() {
                Some(why) => reply.send(Err(why)),
                None => {
                    self.resume(machine)?;
                    reply.send(Ok(()));
                }
            },
            Command::Snapshot(wanted, reply) => self.snapshot(life, wanted, reply)?,
            Command::SetBalloon(bytes, reply) => {
                let post = |name: &str, command| machine.workers.post(name, command);
                change::set_balloon(&self.backends, post, bytes, reply);
            }
            Command::LookAtBalloon(reply) => {
                let post = |name: &str, command| machine.workers.post(name, command);
                change::look_at_balloon(&self.backends, post, reply);
            }
            Command::PressPowerKey(reply) => reply.send(match self.power.press(devices) {
                true => Ok(()),
                false => Err("this board has no power key".to_owned()),
            }),
            Command::LookAtDisk(name, reply) => {
                let post = |name: &str, command| machine.workers.post(name, command);
                change::look_at_disk(&self.backends, post, &name, reply);
            }
            Command::ChangeDisk(name, path, reply) => {
                let post = |name: &str, command| machine.workers.post(name, command);
                change::change_disk(&self.backends, post, &name, path, reply);
            }
            Command::SetLimits(name, flow, limits, reply) => {
                reply.send(change::set_limits(&self.backends, &name, flow, &limits));
            }
            Command::NewGeneration(reply) => reply.send(self.renew_generation(devices)),
            Command::Status(reply) => reply.send(State {
                is_paused: self.input.held,
                restarts: self.lives.saturating_sub(1),
            }),
            Command::Tally(reply) => {
                let devices = self.backends.iter();
                let devices =
                    devices.filter_map(|backend| Some((backend.name(), backend.tally()?)));
                reply.send(Done {
                    exits: machine.counters.exits(),
                    devices: devices.collect(),
                    faults: machine.workers.faults().collect(),
                    restarts: self.lives.saturating_sub(1),
                });
            }
            Command::Counters(reply) => reply.send(machine.counters.report()),
            Command::Reset(reply) => match self.saving.refusal() {
                Some(why) => reply.send(Err(why)),
                None => {
                    reply.send(Ok(()));
                    return Ok(Some(Ending::Reset));
                }
            },
            Command::Hold(reply) => reply.send(machine.hold(LIMIT)),
            Command::Release(only) => machine.vcpus.release(only),
            Command::WithVcpu(index, task) => {
                // If no vCPU runs it, the task is dropped, which notifies whoever waits for it.
                let _ = machine.vcpus.ask(index, task);
            }
        }
        Ok(None)
    }

    fn renew_generation(&mut self, devices: &Devices) -> Result<(), String> {
        if devices.generation.is_none() {
            return Err("this machine has no VMGenID; give it one by --vmgenid on".to_owned());
        }
        let renewed = fresh_generation().and_then(|random| {
            devices.renew_generation(&random)?;
            // What it is after a reset, too.
            self.generation = Some(random);
            Ok(())
        });
        renewed.map_err(|error| format!("{error:#}"))
    }

    /// Begins a snapshot, for which the machine is paused.
    fn snapshot<A: KvmArch>(
        &mut self,
        life: &Life<'_, A>,
        wanted: Wanted,
        reply: Reply<Result<Written, String>>,
    ) -> Result<()> {
        let resumes = !self.input.held;
        let refused = match self.saving.refusal() {
            None if resumes && wanted.only_paused => Err("the machine is not paused".to_owned()),
            None => life.machine.pause(LIMIT),
            Some(why) => Err(why),
        };
        if let Err(why) = refused {
            reply.send(Err(why));
            return Ok(());
        }
        self.input.held = true;
        let (head, wanted) = ((life.describe)(), (wanted, resumes));
        let begun = self
            .saving
            .begin(life.machine, head, wanted, &self.queue, reply);
        match begun {
            Ok(()) => Ok(()),
            Err(ended) => self.answer_snapshot(life.machine, *ended),
        }
    }

    fn answer_snapshot<A: KvmArch>(&mut self, machine: &Machine<A>, ended: Ended) -> Result<()> {
        if ended.resumes {
            self.resume(machine)?;
        }
        ended.answer();
        Ok(())
    }

    /// Resumes a paused machine.
    pub(super) fn resume<A: KvmArch>(&mut self, machine: &Machine<A>) -> Result<()> {
        machine.resume();
        self.input.held = false;
        self.recorder.guest_is_there(false);
        self.feed(&machine.devices)
    }

    fn look_at_terminal(&self, by_a_shell: bool, devices: &Devices) {
        if by_a_shell && self.input.terminal {
            terminal::make_raw_again();
        }
        let console = devices.hvc.as_ref().and_then(|hvc| hvc.current());
        if let (Some(console), Some(size)) = (console, terminal_size()) {
            lock(&console).resize(size);
        }
    }
}

/// Closes the queue: no command is carried out any more.
impl Drop for Events {
    fn drop(&mut self) {
        self.queue.close();
    }
}

/// Returns the message that all vCPUs of a guest are off.
fn all_off(vcpus: usize) -> String {
    let which = match vcpus {
        1 => "the guest's only CPU is off".to_owned(),
        _ => format!("all {vcpus} CPUs of the guest are off"),
    };
    format!("{which} (PSCI CPU_OFF): nothing can turn one on again")
}

/// Shows the counters.
pub(super) fn tell_counters(counters: &Counters) {
    for line in counters.report() {
        messages::say(&line);
    }
}
