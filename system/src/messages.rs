//! What armlet says on standard error: the one way that every message goes.
//!
//! A message is one line, without control characters whoever they come from, and of bounded length.
//! Saying it never waits: where standard error takes no more, some lines are kept, what is more is
//! counted, and the count is said as soon as there is room. What is logged is limited by kind: a
//! kind is the place in the source, or what has a [`RateLimit`] of its own.

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
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard};
use std::time::Duration;

/// What a pipe takes as a whole, in bytes (`limits.h` of Linux).
const PIPE_BUF: usize = 4096;
/// The longest message in bytes: less than that, with what stands before it.
const LONGEST: usize = 2048;
/// The longest piece of a message that another program or a file says, in bytes.
const LONGEST_OF_OTHERS: usize = 512;
/// Lines of another program that are shown in a row.
pub const LINES: u32 = 16;
/// Bytes that wait for a reader who does not read.
const ROOM: usize = 16 << 10;
/// Messages of one place in the source that are shown in a row.
const BURST: u32 = 32;
/// How often what waits is tried again.
pub const RETRY: Duration = Duration::from_secs(1);
/// How long the end of armlet waits for a reader.
const FAREWELL: Duration = Duration::from_secs(1);

/// Says a message in any case. It is for what a user asked for and for the end of a guest; what
/// a guest, a file or another program can cause again and again is logged, which limits it.
pub fn say(message: &str) {
    outlet().say(message);
}

/// Returns the lines that another program said, made visible and cut, without empty ones.
pub fn lines(said: &[u8]) -> impl Iterator<Item = String> {
    said.split(|byte| *byte == b'\n')
        .map(<[u8]>::trim_ascii)
        .filter(|line| !line.is_empty())
        .map(|line| visible(line, LONGEST_OF_OTHERS))
}

/// Sends what is logged, and what is said of a crash of armlet, the way of all messages; warnings
/// and errors at first.
pub fn install() {
    static LOG: Log = Log(Mutex::new(Vec::new()));
    if log::set_logger(&LOG).is_ok() {
        log::set_max_level(log::LevelFilter::Warn);
    }
    // With it a developer gets the standard library's own report.
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

/// Says a line from a signal's handler: at once or not at all, without locks and a heap.
pub fn say_from_handler(line: &[u8]) {
    let stderr = stdio::stderr();
    if is_ready(stderr) {
        let _ = rustix::io::write(stderr, line);
    }
}

/// Returns whether some of what was said still waits for a reader: [`retry`] is due some time.
#[must_use]
pub fn is_behind() -> bool {
    BEHIND.load(Ordering::Relaxed)
}

/// Tries again to say what waits. It does not wait.
pub fn retry() {
    outlet().flush();
}

/// Says how many messages were held back, and waits up to a second for a reader to take what
/// waits: the last that armlet does.
pub fn finish() {
    let held = take_held_back();
    if held > 0 {
        say(&format!(
            "{held} messages were held back, as many of their kind were shown before"
        ));
    }
    outlet().finish(FAREWELL);
}

/// A place in the source that logs: file and line.
type Site = (Option<&'static str>, Option<u32>);

struct Log(Mutex<Vec<(Site, RateLimit)>>);

impl Log {
    /// Counts a message of `site`; `None` if it is held back.
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
            return say(&record.args().to_string());
        }
        if let Some(held) = self.admit((record.file_static(), record.line())) {
            say(&format!("{}{held}", record.args()));
        }
    }

    fn flush(&self) {
        retry();
    }
}

/// Whether the outlet of standard error has something that waits.
static BEHIND: AtomicBool = AtomicBool::new(false);

fn outlet() -> MutexGuard<'static, Outlet> {
    static OUTLET: Mutex<Outlet> = Mutex::new(Outlet::new(&BEHIND));
    lock(&OUTLET)
}

/// How a descriptor is written without waiting and without O_NONBLOCK, which would be set for
/// everyone who shares its description: the shell, and whoever armlet starts.
#[derive(Debug)]
enum Way {
    /// MSG_DONTWAIT does.
    Socket,
    /// A description of our own, with O_NONBLOCK.
    Reopened(OwnedFd),
    /// poll(2) goes before each write; a pipe that is ready takes PIPE_BUF bytes.
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

/// Messages on their way to a descriptor.
struct Outlet {
    fd: BorrowedFd<'static>,
    way: Option<Way>,
    waiting: Vec<u8>,
    /// Messages that there was no room for.
    lost: u64,
    /// Whether something waits, for those who ask without the lock.
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
            behind,
        }
    }

    fn say(&mut self, message: &str) {
        self.flush();
        let end = terminal::line_end();
        let line = format!("armlet: {}{end}", visible(message.as_bytes(), LONGEST));
        // With lost ones before it, it would take the room of the line that tells of them.
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
                let (lost, end) = (std::mem::take(&mut self.lost), terminal::line_end());
                let line = format!(
                    "armlet: {lost} messages are lost: standard error took no more at the time{end}"
                );
                self.waiting.extend_from_slice(line.as_bytes());
            }
            let way = self.way.get_or_insert_with(|| Way::of(self.fd));
            let part = &self.waiting[..self.waiting.len().min(PIPE_BUF)];
            match uninterrupted(|| way.write(self.fd, part)) {
                Ok(count) => drop(self.waiting.drain(..count)),
                // There is nobody left to tell.
                Err(Errno::PIPE | Errno::BADF | Errno::CONNRESET | Errno::NOTCONN) => {
                    self.waiting.clear();
                    self.lost = 0;
                }
                // A reader may come back, a full disk may get room.
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
            // A file on a full disk is always ready.
            std::thread::sleep(deadline.left().min(Duration::from_millis(1)));
        }
    }
}

#[cfg(test)]
mod tests;
