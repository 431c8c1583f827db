//! `--metrics`: what a guest and armlet have done, as OpenMetrics text (`docs/metrics.md`).
//!
//! One thread of its own asks the event loop, writes the file or answers those who connect, and does
//! nothing else. File or socket are there before armlet confines itself.

use crate::run::{Command, Done, Reply};
use anyhow::{Context, Result, bail};
use armlet_backends::broker::Broker;
use armlet_backends::kind::Need;
use armlet_devices::counts::Tally;
use armlet_system::deadline::wait_once;
use armlet_system::eintr::uninterrupted;
use armlet_system::files;
use armlet_system::page_size::page_size;
use armlet_system::sockets::{self, Access};
use rustix::event::PollFlags;
use rustix::fs::{Mode, OFlags, ftruncate};
use std::fmt::Write as _;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How much memory this process has.
const MEMORY: &str = "/proc/self/statm";
/// How often a file is written.
const EVERY: Duration = Duration::from_secs(10);
/// How long an answer of the event loop, and a client's request, may take.
const PATIENCE: Duration = Duration::from_secs(5);
/// The pause after a client that could not be accepted.
const PAUSE: Duration = Duration::from_millis(10);
/// Small, so that a huge page never backs it.
const STACK_BYTES: usize = 128 << 10;

/// Where metrics go: `--metrics`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// A file, which is written over and over.
    File(PathBuf),
    /// A socket: whoever connects gets them.
    Socket(PathBuf),
}

impl Target {
    /// Reads the option's value.
    ///
    /// # Errors
    /// A value without a path.
    pub fn parse(text: &str) -> Result<Target> {
        let (path, target): (&str, fn(PathBuf) -> Target) = match text.strip_prefix("unix:") {
            Some(path) => (path, Target::Socket),
            None => (text, Target::File),
        };
        if path.is_empty() {
            bail!("--metrics '{text}' names no file; use PATH, or unix:PATH for a socket");
        }
        Ok(target(path.into()))
    }
}

impl Target {
    /// What it takes of the sandbox: files are read and written, and those who connect answered.
    #[must_use]
    pub fn needs(&self) -> &'static [Need] {
        match self {
            Target::File(_) => &[Need::Storage],
            Target::Socket(_) => &[Need::Storage, Need::Sockets],
        }
    }
}

enum Open {
    File(File),
    Socket(UnixListener),
}

/// Where metrics go, open, and where the kernel says how much memory this process has.
pub struct Metrics {
    target: Open,
    memory: OwnedFd,
}

impl Metrics {
    /// Opens the file, or listens at the socket for this user alone; `broker` removes a socket at the end.
    ///
    /// # Errors
    /// What the system says.
    pub fn open(target: &Target, broker: Option<&Broker>) -> Result<Metrics> {
        let cannot = |path: &Path| format!("--metrics: cannot use {}", path.display());
        let memory = rustix::fs::open(MEMORY, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
        let memory = memory.with_context(|| format!("--metrics: cannot open {MEMORY}"))?;
        let target = match target {
            Target::File(path) => {
                let file = files::rewrite(path).with_context(|| cannot(path))?;
                Open::File(file)
            }
            Target::Socket(path) => {
                let listener =
                    sockets::listen(path, Access::Owner).with_context(|| cannot(path))?;
                listener.set_nonblocking(true)?;
                if let Some(broker) = broker {
                    broker.offer_removal(path)?;
                }
                Open::Socket(listener)
            }
        };
        Ok(Metrics { target, memory })
    }

    /// Starts the thread, which ends with the process, and writes nothing unless `begin` succeeds there.
    /// `send` gives back commands that are not taken.
    ///
    /// # Errors
    /// A host without room for another thread.
    pub fn start(
        self,
        begin: impl FnOnce() -> Result<()> + Send + 'static,
        send: impl Fn(Command) -> Result<(), Command> + Send + 'static,
    ) -> Result<()> {
        let ask = move || {
            let (reply, answer) = Reply::channel();
            send(Command::Tally(reply)).ok()?;
            answer.recv_timeout(PATIENCE).ok()
        };
        let begun = Instant::now();
        let serve = move || {
            let text = || {
                let done = ask()?;
                Some(text(&done, begun.elapsed(), resident(&self.memory)))
            };
            let served = begin().and_then(|()| match &self.target {
                Open::File(file) => write_to(file, text),
                Open::Socket(listener) => serve(listener, text),
            });
            if let Err(error) = served {
                log::error!("metrics are written no more: {error:#}");
            }
        };
        let builder = std::thread::Builder::new().name("metrics".to_owned());
        let started = builder.stack_size(STACK_BYTES).spawn(serve);
        started.context("cannot start the thread metrics")?;
        Ok(())
    }
}

/// Writes the file again and again, each time at once and from its beginning.
fn write_to(file: &File, text: impl Fn() -> Option<String>) -> Result<()> {
    loop {
        // A guest between two lives answers later.
        if let Some(text) = text() {
            file.write_all_at(text.as_bytes(), 0)
                .context("cannot write the file")?;
            uninterrupted(|| ftruncate(file, text.len() as u64)).context("cannot cut the file")?;
        }
        std::thread::sleep(EVERY);
    }
}

/// Answers those who connect, one after another.
fn serve(listener: &UnixListener, text: impl Fn() -> Option<String>) -> Result<()> {
    loop {
        wait(listener, None)?;
        match listener.accept() {
            // One that goes away, or takes nothing, has none.
            Ok((stream, _)) => drop(answer(stream, &text)),
            Err(_) => std::thread::sleep(PAUSE),
        }
    }
}

/// Waits until something can be read, for so long at most.
fn wait(source: impl AsFd, limit: Option<Duration>) -> Result<bool> {
    uninterrupted(|| wait_once(&source, PollFlags::IN, limit)).context("cannot wait")
}

/// How long a client may be silent before it gets the text without asking: one that is no HTTP client
/// says nothing.
const SILENCE: Duration = Duration::from_millis(200);

fn answer(mut stream: UnixStream, text: impl Fn() -> Option<String>) -> Result<()> {
    stream.set_write_timeout(Some(PATIENCE))?;
    stream.set_read_timeout(Some(SILENCE))?;
    let mut bytes = [0; 1024];
    let asks = match wait(&stream, Some(SILENCE))? {
        true => uninterrupted(|| rustix::io::read(&stream, &mut bytes))? > 0,
        false => false,
    };
    let text = text().context("the guest has ended")?;
    let head = match asks {
        // What a client of HTTP asks for is always this.
        true => format!(
            "HTTP/1.1 200 OK\r\nContent-Type: application/openmetrics-text; version=1.0.0; \
             charset=utf-8\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
            text.len()
        ),
        false => String::new(),
    };
    Ok(stream.write_all(format!("{head}{text}").as_bytes())?)
}

/// How many bytes of this process are in memory, nearly all of them the guest's (proc(5),
/// "/proc/pid/statm").
fn resident(memory: &OwnedFd) -> Option<u64> {
    let mut bytes = [0; 128];
    let count = uninterrupted(|| rustix::io::pread(memory, &mut bytes[..], 0)).ok()?;
    let text = std::str::from_utf8(&bytes[..count]).ok()?;
    let pages: u64 = text.split(' ').nth(1)?.parse().ok()?;
    Some(pages * page_size() as u64)
}

/// The text (OpenMetrics 1.0).
fn text(done: &Done, uptime: Duration, resident: Option<u64>) -> String {
    let mut text = String::new();
    // Writing to a String cannot fail.
    let family = |text: &mut String, name: &str, kind: &str, help: &str| {
        let _ = writeln!(text, "# TYPE {name} {kind}\n# HELP {name} {help}");
    };
    let help = "Time since the guest was first started.";
    family(&mut text, "armlet_uptime_seconds", "gauge", help);
    let (seconds, millis) = (uptime.as_secs(), uptime.subsec_millis());
    let _ = writeln!(text, "armlet_uptime_seconds {seconds}.{millis:03}");
    if let Some(resident) = resident {
        let help = "Memory of the guest and armlet that the host has given.";
        family(&mut text, "armlet_resident_bytes", "gauge", help);
        let _ = writeln!(text, "armlet_resident_bytes {resident}");
    }
    let family = |text: &mut String, name: &str, help: &str| family(text, name, "counter", help);
    family(
        &mut text,
        "armlet_restarts",
        "How often the guest was started again.",
    );
    let _ = writeln!(text, "armlet_restarts_total {}", done.restarts);
    family(
        &mut text,
        "armlet_exits",
        "Exits of vCPUs to armlet in this life of the guest.",
    );
    for (reason, count) in &done.exits {
        let reason = reason.replace(' ', "_");
        let _ = writeln!(text, "armlet_exits_total{{reason=\"{reason}\"}} {count}");
    }
    type Column = (&'static str, &'static str, fn(&Tally) -> u64);
    let columns: [Column; 6] = [
        (
            "armlet_device_to_guest",
            "Requests or frames with data for the guest.",
            |it| it.to_guest,
        ),
        (
            "armlet_device_to_guest_bytes",
            "Bytes for the guest.",
            |it| it.bytes_to_guest,
        ),
        (
            "armlet_device_from_guest",
            "Requests or frames with data of the guest.",
            |it| it.from_guest,
        ),
        (
            "armlet_device_from_guest_bytes",
            "Bytes of the guest.",
            |it| it.bytes_from_guest,
        ),
        ("armlet_device_flushes", "Flushes.", |it| it.flushes),
        (
            "armlet_device_failures",
            "Requests that failed, and frames that were lost.",
            |it| it.failed,
        ),
    ];
    for (name, help, column) in columns {
        family(&mut text, name, help);
        for (device, tally) in &done.devices {
            let _ = writeln!(
                text,
                "{name}_total{{device=\"{device}\"}} {}",
                column(tally)
            );
        }
    }
    family(
        &mut text,
        "armlet_device_faults",
        "What drivers asked of devices that makes no sense, in this life of the guest.",
    );
    for (device, faults) in &done.faults {
        let _ = writeln!(
            text,
            "armlet_device_faults_total{{device=\"{device}\"}} {faults}"
        );
    }
    text.push_str("# EOF\n");
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Read;

    #[test]
    fn what_was_counted_is_openmetrics_text() {
        let tally = Tally {
            to_guest: 2,
            bytes_to_guest: 1024,
            ..Tally::default()
        };
        let done = Done {
            exits: vec![("register reads", 7)],
            devices: vec![("disk0".to_owned(), tally)],
            faults: vec![("rng".to_owned(), 3)],
            restarts: 1,
        };
        let text = text(&done, Duration::from_millis(1500), Some(4096));
        for line in [
            "# TYPE armlet_uptime_seconds gauge",
            "armlet_uptime_seconds 1.500",
            "armlet_resident_bytes 4096",
            "armlet_restarts_total 1",
            "armlet_exits_total{reason=\"register_reads\"} 7",
            "armlet_device_to_guest_bytes_total{device=\"disk0\"} 1024",
            "armlet_device_failures_total{device=\"disk0\"} 0",
            "armlet_device_faults_total{device=\"rng\"} 3",
        ] {
            assert!(text.lines().any(|other| other == line), "{line}: {text}");
        }
        assert!(text.ends_with("# EOF\n"));
        // Each sample stands behind its family.
        let mut family = "";
        for line in text.lines() {
            match line.strip_prefix("# TYPE ") {
                Some(rest) => family = rest.split(' ').next().expect("a name"),
                None => assert!(line.starts_with('#') || line.starts_with(family), "{line}"),
            }
        }
    }

    #[test]
    fn clients_of_http_and_others_get_the_text() {
        for (request, begins) in [
            (&b"GET / HTTP/1.1\r\n\r\n"[..], "HTTP/1.1 200"),
            (b"", "text"),
        ] {
            let (mut ours, theirs) = UnixStream::pair().expect("a pair");
            ours.write_all(request).expect("sent");
            answer(theirs, || Some("text".to_owned())).expect("taken");
            let mut got = String::new();
            ours.read_to_string(&mut got).expect("text");
            assert!(got.starts_with(begins) && got.ends_with("text"), "{got}");
        }
    }

    #[test]
    fn targets_are_files_or_sockets() {
        let parse = |text| Target::parse(text).expect("a target");
        assert_eq!(parse("a.prom"), Target::File("a.prom".into()));
        assert_eq!(parse("unix:/run/m"), Target::Socket("/run/m".into()));
        assert!(Target::parse("unix:").is_err());
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("m");
        std::fs::write(&path, "much more than that").expect("written");
        Metrics::open(&Target::File(path.clone()), None).expect("a file");
        assert_eq!(std::fs::read_to_string(&path).expect("a file"), "");
        let none = folder.path().join("none/m");
        assert!(Metrics::open(&Target::File(none), None).is_err());
    }
}
