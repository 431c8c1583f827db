//! The event loop: it waits for the terminal, signals, virtio devices, the host's clock and what other
//! threads tell it, and keeps the deadlines of a life.

use super::command::Commands;
use super::input::{Input, at_hand};
use super::queue::{Event, Queue};
use super::{Ending, OnPanic};
use crate::clock::ClockWatch;
use crate::console::{PanicWatch, StandardOutput};
use crate::eintr::events;
use crate::kvm::KvmArch;
use crate::machine::{Devices, Machine, Wires};
use crate::messages;
use crate::serial::TICK;
use crate::shutdown::{Due, Shutdown};
use crate::signals;
use crate::stats::Counters;
use crate::vcpu::VcpuEvent;
use crate::virtio::console::HvcConsole;
use anyhow::{Context, Result};
use armlet_devices::sync::lock;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::time::{Duration, Instant};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

/// How long the power key is held: longer than gpio-keys' debouncing of 5 ms.
const KEY_HELD: Duration = Duration::from_millis(100);

/// What epoll says is ready.
pub(super) const INPUT: u64 = 0;
const BELL: u64 = 1;
const SIGNAL: u64 = 2;
const VIRTIO: u64 = 3;
const CLOCK: u64 = 4;

/// The event loop.
pub(super) struct Events {
    pub(super) epoll: Epoll,
    pub(super) queue: Queue,
    signals: &'static EventFd,
    pub(super) input: Input,
    /// When the power key is released.
    release: Option<Instant>,
    /// When the clock's alarm may be due.
    alarm: Option<Instant>,
    /// Tells when the host's clock is set, once there was an alarm.
    clock_set: Option<ClockWatch>,
    /// When a burst of output is looked after.
    tick: Option<Instant>,
    /// When input is looked after.
    pub(super) feed: Option<Instant>,
    on_panic: OnPanic,
    /// Whether the guest's kernel said in this life that it panicked.
    panicked: bool,
    /// Whether all vCPUs of this life are off.
    pub(super) all_off: bool,
    /// How long the guest may take to power off when it was asked to.
    pub(super) patience: Option<Duration>,
    /// That it was.
    pub(super) shutdown: Option<Shutdown>,
}

impl Events {
    /// A loop that waits for signals and for what it is told.
    ///
    /// # Errors
    /// A process without room for another descriptor.
    pub(super) fn new(
        on_panic: OnPanic,
        stats: bool,
        patience: Option<Duration>,
    ) -> Result<Events> {
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

    /// Where others command the machine.
    pub(super) fn commands(&self) -> Commands {
        Commands(self.queue.clone())
    }

    /// The virtio console of this terminal.
    pub(super) fn open_hvc(&self) -> Result<Arc<HvcConsole>> {
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
    pub(super) fn wires(&mut self) -> Wires {
        // What an earlier life left behind means nothing to this one.
        self.queue.take_events();
        (self.release, self.alarm, self.tick, self.feed) = (None, None, None, None);
        self.input.session = None;
        (self.panicked, self.all_off) = (false, false);
        let (room, burst, deadline) = (self.queue.clone(), self.queue.clone(), self.queue.clone());
        let stopping = Arc::default();
        let output = StandardOutput::new(Arc::clone(&stopping));
        Wires {
            output: Box::new(PanicWatch::new(output)),
            on_room: Box::new(move || room.tell(Event::Room)),
            on_burst: Box::new(move || burst.tell(Event::Burst)),
            on_deadline: Box::new(move || deadline.tell(Event::Deadline)),
            stopping,
        }
    }

    /// Serves the machine until its end.
    ///
    /// # Errors
    /// What the system says of a wait.
    pub(super) fn watch<A: KvmArch>(&mut self, machine: &Machine<A>) -> Result<Ending> {
        let devices = &machine.devices;
        // It leaves epoll when the reactor is dropped.
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
                    INPUT => self.read_input(machine)?,
                    SIGNAL => self.read_signals(machine),
                    VIRTIO => machine.light.turn(0).map(|_| None)?,
                    CLOCK => self.clock_was_set(devices).map(|()| None)?,
                    _ => self.read_queue(machine)?,
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

    fn read_signals<A: KvmArch>(&mut self, machine: &Machine<A>) -> Option<Ending> {
        // What comes after this read rings again.
        let _ = self.signals.read();
        self.obey_signals(signals::take(), machine)
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

    fn read_queue<A: KvmArch>(&mut self, machine: &Machine<A>) -> Result<Option<Ending>> {
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
        if news.asked {
            machine.vcpus.kick_asked();
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
        for command in self.queue.take_commands() {
            let ending = self.obey(command, machine);
            if ending.is_some() {
                return Ok(ending);
            }
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
    pub(super) fn hear_last_words(&mut self) {
        if let Some(what) = self.queue.take_events().panicked {
            self.say_panic(&what);
        }
    }

    /// Whether the guest was asked to power off.
    pub(super) fn was_asked(&self) -> bool {
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
    pub(super) fn press(&mut self, devices: &Devices) -> bool {
        let Some(key) = &devices.power_key else {
            return false;
        };
        lock(&**key).set_pressed(true);
        self.release = Some(Instant::now() + KEY_HELD);
        true
    }
}

/// Nobody obeys any more.
impl Drop for Events {
    fn drop(&mut self) {
        self.queue.close();
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

/// Shows the counters.
pub(super) fn tell_counters(counters: &Counters) {
    for line in counters.report() {
        messages::say(&line);
    }
}
