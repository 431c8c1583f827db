//! Messages on standard error; all of them go through this module.
//!
//! A message is one line of bounded length, without control characters, whatever it quotes.
//! Printing never blocks: while standard error is full, some lines are kept, further ones are
//! counted, and the count is printed as soon as there is room. Log messages are rate-limited by
//! kind: by their place in the source, or by a [`RateLimit`] of their own.

pub use crate::visible::{shell_word, visible, visible_json, visible_lines};

use crate::deadline::{Deadline, wait_once};
use crate::eintr::uninterrupted;
use crate::terminal;
use armlet_devices::limit::{Admitted, LIMITED, RateLimit, take_held_back};
use armlet_devices::sync::lock;
use rustix::event::PollFlags;
use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::net::SendFlags;
use rustix::stdio;
use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The size up to which writes to a pipe are atomic, in bytes (Linux's `limits.h`).
const PIPE_BUF: usize = 4096;
/// The longest message in bytes: less than that, including its prefix.
const LONGEST: usize = 2048;
/// The longest quotation from another program or a file, in bytes.
const LONGEST_OF_OTHERS: usize = 512;
/// How many lines of another program are shown before the rate limit applies.
pub const LINES: u32 = 16;
/// How many bytes are kept while standard error is full.
const ROOM: usize = 16 << 10;
/// How many messages of one place in the source are shown before the rate limit applies.
const BURST: u32 = 32;
/// The interval at which kept messages are retried.
pub const RETRY: Duration = Duration::from_secs(1);
/// How long armlet waits for the reader when it exits.
const FAREWELL: Duration = Duration::from_secs(1);

/// Prints a message without a rate limit. It is for what a user asked for and for the end of a
/// guest; anything that a guest, a file or another program can cause repeatedly is logged instead.
pub fn say(message: &str) {
    outlet().say(log::Level::Info, message);
}

/// How a line looks that goes to a file of its own: with time, who says it, and its level.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Form {
    /// What the machine is called.
    pub id: String,
    /// Whether a line has its level; `None` leaves that as it is.
    pub show_level: Option<bool>,
}

/// Has messages go to standard output from here on, between what the guest prints, in this form.
pub fn use_output(form: Form) {
    let mut outlet = outlet();
    outlet.fd = stdio::stdout();
    outlet.way = None;
    outlet.is_output = true;
    outlet.is_formed = true;
    outlet.form = form;
}

/// Prints a line on standard error, whatever messages go to, as far as it takes it at once.
pub fn say_at_the_end(message: &str) {
    let line = format!("{}\n", visible(message.as_bytes(), LONGEST));
    say_from_handler(line.as_bytes());
}

/// Has messages go to `file` from here on, if there is one, which takes writes without waiting; and in
/// this form where they go to such a file.
pub fn change_form(file: Option<File>, form: Form) {
    let mut outlet = outlet();
    if let Some(file) = file {
        outlet.way = Some(Way::Reopened(file.into()));
        outlet.is_output = false;
        outlet.is_formed = true;
    }
    let show_level = form.show_level.or(outlet.form.show_level);
    outlet.form = Form { show_level, ..form };
}

/// Returns the non-empty lines of another program's output, escaped and truncated.
pub fn lines(said: &[u8]) -> impl Iterator<Item = String> {
    said.split(|byte| *byte == b'\n')
        .map(<[u8]>::trim_ascii)
        .filter(|line| !line.is_empty())
        .map(|line| visible(line, LONGEST_OF_OTHERS))
}

/// Routes log records and panic messages through this module; at first only warnings and errors are
/// logged.
pub fn install() {
    static LOG: Log = Log(Mutex::new(Vec::new()));
    if log::set_logger(&LOG).is_ok() {
        log::set_max_level(log::LevelFilter::Warn);
    }
    // With it, developers get the standard library's own report.
    if std::env::var_os("RUST_BACKTRACE").is_none() {
        std::panic::set_hook(Box::new(|panic| {
            let thread = std::thread::current();
            let name = thread.name().unwrap_or("unnamed").to_owned();
            say(&format!(
                "a fault of armlet's own in thread {name}: {panic}"
            ));
        }));
    }
}

/// Opens what messages are written to, which a process that confines itself cannot do any more.
pub fn prepare() {
    let mut outlet = outlet();
    let fd = outlet.fd;
    outlet.way.get_or_insert_with(|| Way::of(fd));
}

/// Prints a line from a signal handler: at once or not at all, without locks or allocations.
pub fn say_from_handler(line: &[u8]) {
    let stderr = stdio::stderr();
    if is_ready(stderr) {
        let _ = rustix::io::write(stderr, line);
    }
}

/// Returns whether messages are waiting for the reader, so that [`retry`] has to be called.
#[must_use]
pub fn is_behind() -> bool {
    BEHIND.load(Ordering::Relaxed)
}

/// Tries to print waiting messages, without blocking.
pub fn retry() {
    outlet().flush();
}

/// Prints how many messages were suppressed, and waits up to a second for the reader to take what
/// is left: armlet's last act.
pub fn finish() {
    let held = take_held_back();
    if held > 0 {
        say(&format!(
            "{held} messages were held back, as many of their kind were shown before"
        ));
    }
    outlet().finish(FAREWELL);
}

/// The file and line of a log statement.
type Site = (Option<&'static str>, Option<u32>);

struct Log(Mutex<Vec<(Site, RateLimit)>>);

impl Log {
    /// Counts a message of `site`; returns `None` if it is suppressed.
    fn admit(&self, site: Site) -> Option<Admitted> {
        let mut sites = lock(&self.0);
        let index = sites.iter().position(|(known, _)| *known == site);
        let index = index.unwrap_or_else(|| {
            sites.push((site, RateLimit::new(BURST)));
            sites.len() - 1
        });
        sites[index].1.admit()
    }
}

impl log::Log for Log {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.level() <= log::max_level()
    }

    fn log(&self, record: &log::Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        if record.target() == LIMITED {
            return outlet().say(record.level(), &record.args().to_string());
        }
        if let Some(held) = self.admit((record.file_static(), record.line())) {
            outlet().say(record.level(), &format!("{}{held}", record.args()));
        }
    }

    fn flush(&self) {
        retry();
    }
}

/// Whether messages are waiting for the reader of standard error.
static BEHIND: AtomicBool = AtomicBool::new(false);

fn outlet() -> MutexGuard<'static, Outlet> {
    static OUTLET: Mutex<Outlet> = Mutex::new(Outlet::new(&BEHIND));
    lock(&OUTLET)
}

/// How to write to a descriptor without blocking and without setting O_NONBLOCK, which would affect
/// everyone who shares its open file description: the shell, and programs that armlet starts.
#[derive(Debug)]
enum Way {
    /// By MSG_DONTWAIT.
    Socket,
    /// By reopening it with O_NONBLOCK.
    Reopened(OwnedFd),
    /// By poll(2) before each write; a pipe that is ready takes PIPE_BUF bytes.
    Polled,
}

impl Way {
    fn of(fd: BorrowedFd<'_>) -> Way {
        let kind = rustix::fs::fstat(fd).map(|stat| FileType::from_raw_mode(stat.st_mode));
        match kind {
            Ok(FileType::Socket) => Way::Socket,
            Ok(FileType::Fifo | FileType::CharacterDevice) => {
                let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
                let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
                rustix::fs::open(path, flags, Mode::empty()).map_or(Way::Polled, Way::Reopened)
            }
            _ => Way::Polled,
        }
    }

    fn write(&self, fd: BorrowedFd<'_>, bytes: &[u8]) -> Result<usize, Errno> {
        match self {
            Way::Socket => rustix::net::send(fd, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL),
            Way::Reopened(own) => rustix::io::write(own, bytes),
            Way::Polled if is_ready(fd) => rustix::io::write(fd, bytes),
            Way::Polled => Err(Errno::AGAIN),
        }
    }
}

fn is_ready(fd: BorrowedFd<'_>) -> bool {
    wait_once(fd, PollFlags::OUT, Some(Duration::ZERO)) == Ok(true)
}

/// A descriptor with the messages that wait for it.
struct Outlet {
    fd: BorrowedFd<'static>,
    way: Option<Way>,
    waiting: Vec<u8>,
    /// The number of messages that were dropped for lack of room.
    lost: u64,
    /// Whether messages have the form that follows.
    is_formed: bool,
    form: Form,
    /// Whether they go where the guest's console is.
    is_output: bool,
    /// Whether messages are waiting, readable without the lock.
    behind: &'static AtomicBool,
}

impl Outlet {
    const fn new(behind: &'static AtomicBool) -> Outlet {
        Outlet::to(stdio::stderr(), behind)
    }

    const fn to(fd: BorrowedFd<'static>, behind: &'static AtomicBool) -> Outlet {
        Outlet {
            fd,
            way: None,
            waiting: Vec::new(),
            lost: 0,
            is_formed: false,
            form: Form {
                id: String::new(),
                show_level: None,
            },
            is_output: false,
            behind,
        }
    }

    /// How a line begins, and ends.
    fn frame(&self, level: log::Level) -> (String, &'static str) {
        if !self.is_formed {
            return ("armlet:".to_owned(), terminal::line_end());
        }
        let level = match self.form.show_level {
            Some(true) => format!(":{level}"),
            _ => String::new(),
        };
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("main").to_owned();
        let time = utc(SystemTime::now());
        // A terminal is raw while the guest's console has it; a file takes no carriage return.
        let end = match self.is_output {
            true => terminal::line_end(),
            false => "\n",
        };
        (format!("{time} [{}:{name}{level}]", self.form.id), end)
    }

    fn say(&mut self, level: log::Level, message: &str) {
        self.flush();
        let (start, end) = self.frame(level);
        let line = format!("{start} {}{end}", visible(message.as_bytes(), LONGEST));
        // After lost messages, it would take the room of the line that reports them.
        if self.lost > 0 || self.waiting.len() + line.len() > ROOM {
            self.lost += 1;
        } else {
            self.waiting.extend_from_slice(line.as_bytes());
        }
        self.flush();
    }

    fn flush(&mut self) {
        while !self.waiting.is_empty() || self.lost > 0 {
            if self.waiting.is_empty() {
                let lost = std::mem::take(&mut self.lost);
                let (start, end) = self.frame(log::Level::Warn);
                let line = format!(
                    "{start} {lost} messages are lost: what they go to took no more at the time{end}"
                );
                self.waiting.extend_from_slice(line.as_bytes());
            }
            let way = self.way.get_or_insert_with(|| Way::of(self.fd));
            let part = &self.waiting[..self.waiting.len().min(PIPE_BUF)];
            match uninterrupted(|| way.write(self.fd, part)) {
                Ok(count) => drop(self.waiting.drain(..count)),
                // There is no reader any more.
                Err(Errno::PIPE | Errno::BADF | Errno::CONNRESET | Errno::NOTCONN) => {
                    self.waiting.clear();
                    self.lost = 0;
                }
                // The reader may continue, and a full disk may get room.
                Err(_) => break,
            }
        }
        let behind = !self.waiting.is_empty() || self.lost > 0;
        self.behind.store(behind, Ordering::Relaxed);
    }

    fn finish(&mut self, limit: Duration) {
        let deadline = Deadline::after(limit);
        self.flush();
        while !self.waiting.is_empty() {
            let is_ready = deadline.wait(self.fd, PollFlags::OUT) == Ok(true);
            if !is_ready || deadline.left().is_zero() {
                return;
            }
            self.flush();
            // For poll(2), a file on a full disk is always ready.
            std::thread::sleep(deadline.left().min(Duration::from_millis(1)));
        }
    }
}

/// A time as date and time of day, in UTC and nanoseconds.
fn utc(time: SystemTime) -> String {
    let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
    let (days, second) = (since.as_secs() / 86400, since.as_secs() % 86400);
    // The civil calendar in years that begin in March, by eras of 400 years ("chrono-Compatible
    // Low-Level Date Algorithms", days_from_civil's inverse).
    let day = days + 719_468;
    let (era, day) = (day / 146_097, day % 146_097);
    let year = (day - day / 1460 + day / 36524 - day / 146_096) / 365;
    let day = day - (365 * year + year / 4 - year / 100);
    let month = (5 * day + 2) / 153;
    let day = day - (153 * month + 2) / 5 + 1;
    let month = if month < 10 { month + 3 } else { month - 9 };
    let year = year + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    let nanos = since.subsec_nanos();
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{nanos:09}")
}

#[cfg(test)]
mod tests;
