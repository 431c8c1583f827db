//! Signals: what each does in each phase of armlet's life, and the deadline for waits.
//!
//! Handlers record signals and wake the event loop. While no loop checks them, that is, while files
//! are opened and daemons started, and once armlet is about to exit, they end armlet at once. An
//! alarm reports which wait has taken too long, and ends armlet if it is about to exit or was asked
//! to. Handlers only call what is async-signal-safe (signal-safety(7)): atomics, write, poll,
//! alarm, _exit.
//!
//! No signal is blocked, so that the programs that armlet starts inherit an empty mask.

use crate::messages;
use crate::raise::raise;
use crate::status::Status;
use crate::terminal;
use anyhow::{Context, Result};
use armlet_devices::sync::{self, lock};
use std::fmt::{self, Write};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU8, AtomicU32, Ordering};
use std::sync::{Mutex, OnceLock};
use vmm_sys_util::eventfd::EventFd;

/// How long a wait in a phase other than [`Phase::Running`] may take before it is reported, and how
/// long exiting may take, in seconds.
const PATIENCE: u32 = 30;

/// The phases of armlet's life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Phase {
    /// Before the first guest runs. Signals end armlet.
    Starting,
    /// A guest runs, and the event loop handles signals.
    Running,
    /// A guest was reset: one machine is torn down and the next one created. A signal that asks to
    /// stop at once does so; the power key waits for the event loop.
    Between,
    /// Armlet is exiting. A signal, or the deadline, ends it at once.
    Ending,
}

/// The signals since they were last [taken](take).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Taken {
    /// SIGTERM or SIGHUP: presses the power key.
    pub power_key: bool,
    /// SIGINT, or the second signal that asks armlet to end.
    pub stop: bool,
    /// SIGUSR1: shows the counters.
    pub counters: bool,
    /// SIGWINCH: the terminal's size has changed.
    pub resized: bool,
    /// SIGCONT: armlet was stopped, and continues.
    pub continued: bool,
}

/// The status with which a handler ends armlet.
static STATUS: AtomicU8 = AtomicU8::new(Status::Stopped.code());
static PHASE: AtomicU8 = AtomicU8::new(Phase::Starting as u8);
/// The signal whose previous disposition is not known yet, and whether it arrived meanwhile.
static UNDECIDED: AtomicI32 = AtomicI32::new(0);
static CAME_EARLY: AtomicBool = AtomicBool::new(false);
/// The number of signals so far that asked armlet to end.
static ENDS: AtomicU32 = AtomicU32::new(0);
/// How long a wait may take, in seconds.
static LIMIT: AtomicU32 = AtomicU32::new(PATIENCE);
/// The eventfd that wakes the event loop.
static BELL: AtomicI32 = AtomicI32::new(-1);
static POWER_KEY: AtomicBool = AtomicBool::new(false);
static STOP: AtomicBool = AtomicBool::new(false);
static COUNTERS: AtomicBool = AtomicBool::new(false);
static RESIZED: AtomicBool = AtomicBool::new(false);
static CONTINUED: AtomicBool = AtomicBool::new(false);
/// What armlet is waiting for, for messages.
static WAIT: Mutex<Words> = Mutex::new(Words::none());

/// Makes writes beyond RLIMIT_FSIZE fail with EFBIG instead of killing the process by SIGXFSZ. It
/// installs an empty handler because, unlike an ignored signal, that is not inherited by programs
/// that are started.
pub fn survive_file_size_limit() {
    extern "C" fn nothing(_: i32) {}
    // SAFETY: all fields are numbers or sets of them, for which zero is a value, and the handler has
    // the type that a sigaction without SA_SIGINFO asks for.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = nothing as *const () as usize;
        action.sa_flags = libc::SA_RESTART;
        libc::sigaction(libc::SIGXFSZ, &raw const action, std::ptr::null_mut());
    }
}

/// Installs handlers for the signals that ask armlet to end, for the alarm and, if `counted`, for
/// SIGUSR1. A signal that is ignored stays ignored, as nohup(1) intends. Returns the eventfd that
/// is readable after a signal.
///
/// # Errors
/// When the process has no room for another descriptor.
pub fn install(counted: bool) -> Result<&'static EventFd> {
    static KEPT: OnceLock<EventFd> = OnceLock::new();
    let bell = match KEPT.get() {
        Some(bell) => bell,
        None => {
            let bell = sync::bell().context("cannot make an eventfd")?;
            KEPT.get_or_init(|| bell)
        }
    };
    BELL.store(bell.as_raw_fd(), Ordering::Release);
    let usr1 = counted.then_some(libc::SIGUSR1);
    let signals = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP];
    for signal in signals.into_iter().chain(usr1) {
        handle_unless_ignored(signal);
    }
    handle(libc::SIGALRM);
    enter(Phase::Starting);
    Ok(bell)
}

/// Installs handlers for the terminal's signals: SIGWINCH and SIGCONT.
pub fn follow_terminal() {
    handle(libc::SIGWINCH);
    handle(libc::SIGCONT);
}

/// Enters a phase, and starts its deadline.
pub fn enter(phase: Phase) {
    if phase != Phase::Running {
        waiting_for("its own work");
    }
    PHASE.store(phase as u8, Ordering::Release);
    // One that is set while a guest begins to run finds nothing overdue.
    if phase != Phase::Running {
        alarm(LIMIT.load(Ordering::Relaxed));
    }
}

/// Enters the phase of exiting, with armlet's exit status.
pub fn end_with(status: Status) {
    STATUS.store(status.code(), Ordering::Release);
    enter(Phase::Ending);
}

/// Sets what armlet is waiting for from here on, for the message about a wait that takes too long.
pub fn waiting_for(what: impl fmt::Display) {
    let mut wait = lock(&WAIT);
    *wait = Words::none();
    // What does not fit is truncated.
    let _ = write!(wait, "{what}");
}

/// Takes the signals since the last call.
pub fn take() -> Taken {
    let take = |flag: &AtomicBool| flag.swap(false, Ordering::AcqRel);
    let taken = Taken {
        power_key: take(&POWER_KEY),
        stop: take(&STOP),
        counters: take(&COUNTERS),
        resized: take(&RESIZED),
        continued: take(&CONTINUED),
    };
    if taken.power_key && !taken.stop {
        // The event loop is handling the request.
        alarm(0);
    }
    taken
}

fn alarm(seconds: u32) {
    // SAFETY: the call touches no memory.
    unsafe { libc::alarm(seconds) };
}

/// Installs the handler for a signal, unless armlet was started with this signal ignored: then it stays
/// ignored. A signal that arrives before that is known is not lost.
fn handle_unless_ignored(signal: libc::c_int) {
    UNDECIDED.store(signal, Ordering::Release);
    let was_ignored = handle(signal) == libc::SIG_IGN;
    if was_ignored {
        // SAFETY: the call sets what the signal does, and touches no memory.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
    UNDECIDED.store(0, Ordering::Release);
    if CAME_EARLY.swap(false, Ordering::AcqRel) && !was_ignored {
        raise(signal);
    }
}

/// Has a signal handled; returns what was done with it before.
fn handle(signal: libc::c_int) -> libc::sighandler_t {
    // SAFETY: all fields are numbers and pointers for which zero is a value; the handler does only
    // what is safe in one, and the calls work on sets of our own.
    unsafe {
        let mut new: libc::sigaction = std::mem::zeroed();
        let handler: extern "C" fn(libc::c_int) = caught;
        new.sa_sigaction = handler as usize;
        // The interrupted thread's system call is restarted.
        new.sa_flags = libc::SA_RESTART;
        libc::sigfillset(&raw mut new.sa_mask);
        let mut old: libc::sigaction = std::mem::zeroed();
        libc::sigaction(signal, &raw const new, &raw mut old);
        old.sa_sigaction
    }
}

extern "C" fn caught(signal: libc::c_int) {
    if signal == UNDECIDED.load(Ordering::Acquire) {
        CAME_EARLY.store(true, Ordering::Release);
        return;
    }
    // SAFETY: the location is this thread's own, and lives as long as it.
    let kept = unsafe { *libc::__errno_location() };
    let flag = match signal {
        libc::SIGTERM | libc::SIGHUP | libc::SIGINT => asked_to_end(signal),
        libc::SIGUSR1 => Some(&COUNTERS),
        libc::SIGWINCH => Some(&RESIZED),
        libc::SIGCONT => Some(&CONTINUED),
        libc::SIGALRM => {
            overdue();
            None
        }
        _ => None,
    };
    if let Some(flag) = flag {
        flag.store(true, Ordering::Release);
        ring();
    }
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = kept };
}

/// Wakes the event loop.
fn ring() {
    let fd = BELL.load(Ordering::Acquire);
    if fd >= 0 {
        // SAFETY: the bell is never closed.
        let fd = unsafe { BorrowedFd::borrow_raw(fd) };
        let _ = rustix::io::write(fd, &1_u64.to_ne_bytes());
    }
}

fn is_phase(phase: Phase) -> bool {
    PHASE.load(Ordering::Acquire) == phase as u8
}

/// Handles a signal that asks armlet to end; returns the flag that tells the event loop.
fn asked_to_end(signal: libc::c_int) -> Option<&'static AtomicBool> {
    let is_second = ENDS.fetch_add(1, Ordering::AcqRel) > 0;
    let at_once = is_second || signal == libc::SIGINT;
    if is_phase(Phase::Starting) || is_phase(Phase::Ending) || (is_phase(Phase::Between) && at_once)
    {
        end("armlet: stopped by a signal\n", None);
    }
    // In case the event loop does not handle it in time.
    alarm(LIMIT.load(Ordering::Relaxed));
    Some(if at_once { &STOP } else { &POWER_KEY })
}

/// Handles the alarm: a wait has taken too long.
fn overdue() {
    if is_phase(Phase::Running) && ENDS.load(Ordering::Acquire) == 0 {
        return;
    }
    let wait = WAIT.try_lock().ok();
    let wait = wait.as_deref();
    if is_phase(Phase::Ending) || STOP.load(Ordering::Acquire) {
        end("armlet: ended without waiting longer for ", wait);
    }
    say("armlet: still waits for ", wait);
    alarm(LIMIT.load(Ordering::Relaxed));
}

/// Ends armlet from a handler.
fn end(start: &str, wait: Option<&Words>) -> ! {
    terminal::restore();
    say(start, wait);
    // SAFETY: the call ends the process. The kernel releases what it held: the guest, locks on
    // images, and the programs that it started.
    unsafe { libc::_exit(STATUS.load(Ordering::Acquire).into()) }
}

/// Prints a message from a handler, if standard error takes it at once.
fn say(start: &str, wait: Option<&Words>) {
    let mut line = Words::none();
    let end = terminal::line_end();
    let _ = match (wait, start.ends_with('\n')) {
        (_, true) => line.write_str(start),
        (Some(wait), _) => write!(line, "{start}{wait}{end}"),
        (None, _) => write!(line, "{start}something{end}"),
    };
    messages::say_from_handler(line.bytes());
}

/// A short text in a fixed buffer, because a handler must not allocate.
struct Words {
    bytes: [u8; 200],
    len: usize,
}

impl Words {
    const fn none() -> Words {
        Words {
            bytes: [0; 200],
            len: 0,
        }
    }

    fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

impl Write for Words {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for &byte in text.as_bytes() {
            let Some(place) = self.bytes.get_mut(self.len) else {
                return Err(fmt::Error);
            };
            *place = byte;
            self.len += 1;
        }
        Ok(())
    }
}

impl fmt::Display for Words {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(std::str::from_utf8(self.bytes()).unwrap_or("something"))
    }
}

#[cfg(test)]
mod tests {
    //! Each test runs in a process of its own, because signals affect the whole process.

    use super::*;
    use std::io::{BufRead, BufReader, Read};
    use std::process::{Child, ChildStderr, Command, Stdio};
    use std::time::Duration;

    /// Runs one of the functions below in a child process; returns the child when it is ready.
    fn start(name: &str) -> (Child, BufReader<ChildStderr>) {
        let mut child = Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", "--ignored", "--nocapture"])
            .arg(format!("signals::tests::{name}"))
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("it runs");
        let mut errors = BufReader::new(child.stderr.take().expect("a pipe"));
        let mut line = String::new();
        errors.read_line(&mut line).expect("a line");
        assert_eq!(line, "armlet: ready\n");
        (child, errors)
    }

    fn send(child: &Child, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(child);
        rustix::process::kill_process(pid, signal).expect("it runs");
    }

    /// Waits for the child; returns its output and status.
    fn end_of(mut child: Child, mut errors: BufReader<ChildStderr>) -> (String, Option<i32>) {
        let mut text = String::new();
        errors.read_to_string(&mut text).expect("UTF-8");
        (text, child.wait().expect("its end").code())
    }

    /// Restores the default action of the signals that these tests send: this process may have been
    /// started with some of them ignored (by nohup(1), or in the background of a shell without job
    /// control), which [`install`] leaves so.
    fn ignore_nothing() {
        for signal in [libc::SIGTERM, libc::SIGINT, libc::SIGHUP] {
            // SAFETY: the default action is no handler, so no code of ours runs by it.
            unsafe { libc::signal(signal, libc::SIG_DFL) };
        }
    }

    /// Waits until a signal or the deadline ends the process.
    fn hang(phase: Phase) -> ! {
        ignore_nothing();
        LIMIT.store(1, Ordering::Relaxed);
        install(false).expect("room");
        enter(phase);
        waiting_for("disk0 to stop");
        messages::say("ready");
        loop {
            std::thread::sleep(Duration::from_secs(600));
        }
    }

    #[test]
    #[ignore = "run by another"]
    fn hangs_at_the_start() {
        ignore_nothing();
        LIMIT.store(600, Ordering::Relaxed);
        install(false).expect("room");
        messages::say("ready");
        std::thread::sleep(Duration::from_secs(600));
    }

    #[test]
    #[ignore = "run by another"]
    fn hangs_at_the_end() {
        hang(Phase::Ending);
    }

    #[test]
    #[ignore = "run by another"]
    fn hangs_between() {
        hang(Phase::Between);
    }

    #[test]
    #[ignore = "run by another"]
    fn hangs_while_it_runs() {
        hang(Phase::Running);
    }

    #[test]
    fn a_signal_at_the_start_ends_armlet() {
        use rustix::process::Signal;
        for signal in [Signal::TERM, Signal::INT, Signal::HUP] {
            let (child, errors) = start("hangs_at_the_start");
            send(&child, signal);
            let (said, status) = end_of(child, errors);
            assert_eq!(said, "armlet: stopped by a signal\n");
            assert_eq!(status, Some(6));
        }
    }

    #[test]
    fn an_end_has_a_deadline_and_names_what_does_not_stop() {
        let (child, errors) = start("hangs_at_the_end");
        let (said, status) = end_of(child, errors);
        let wanted = "armlet: ended without waiting longer for disk0 to stop\n";
        assert_eq!((said.as_str(), status), (wanted, Some(6)));
    }

    #[test]
    fn a_reset_that_lasts_is_told_of_and_can_be_stopped() {
        let (child, mut errors) = start("hangs_between");
        for _ in 0..2 {
            let mut line = String::new();
            errors.read_line(&mut line).expect("a line");
            assert_eq!(line, "armlet: still waits for disk0 to stop\n");
        }
        send(&child, rustix::process::Signal::INT);
        let (said, status) = end_of(child, errors);
        assert!(said.ends_with("armlet: stopped by a signal\n"), "{said}");
        assert_eq!(status, Some(6));
    }

    #[test]
    fn an_event_loop_that_hangs_can_be_stopped() {
        let (child, errors) = start("hangs_while_it_runs");
        send(&child, rustix::process::Signal::INT);
        let (said, status) = end_of(child, errors);
        let wanted = "armlet: ended without waiting longer for disk0 to stop\n";
        assert_eq!((said.as_str(), status), (wanted, Some(6)));
    }

    #[test]
    fn nothing_is_overdue_while_a_guest_runs() {
        let (child, errors) = start("hangs_while_it_runs");
        // Longer than its waits may last: the alarm of the start goes off.
        std::thread::sleep(Duration::from_secs(2));
        send(&child, rustix::process::Signal::INT);
        let (said, _) = end_of(child, errors);
        assert_eq!(
            said,
            "armlet: ended without waiting longer for disk0 to stop\n"
        );
    }

    #[test]
    #[ignore = "run by another"]
    fn was_started_by_nohup() {
        ignore_nothing();
        // SAFETY: no code of ours runs by it; the other call sends a signal.
        unsafe { libc::signal(libc::SIGHUP, libc::SIG_IGN) };
        install(false).expect("room");
        messages::say("ready");
        // SAFETY: the call sends a signal.
        unsafe { libc::raise(libc::SIGHUP) };
        messages::say("still there");
        std::thread::sleep(Duration::from_secs(600));
    }

    #[test]
    fn a_signal_that_was_ignored_stays_so() {
        let (child, mut errors) = start("was_started_by_nohup");
        let mut line = String::new();
        errors.read_line(&mut line).expect("a line");
        assert_eq!(line, "armlet: still there\n");
        send(&child, rustix::process::Signal::TERM);
        let (said, status) = end_of(child, errors);
        assert_eq!(
            (said.as_str(), status),
            ("armlet: stopped by a signal\n", Some(6))
        );
    }
}
