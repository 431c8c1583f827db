//! `xtask load`: keeps a disk, a network or a console busy, for `cargo xtask bench io`.
//!
//! This is the part of the bench that runs in the guest, built for ARM64. It says on its standard
//! output when its work begins and when it has ended, and whoever reads the guest's console takes
//! the measurements at these lines.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::sync::Barrier;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use argh::FromArgs;
use rustix::fs::OFlags;

/// What is printed when the work begins, before its name.
pub(crate) const START: &str = "IO-START";

/// What is printed when it has ended, before its name, the number of operations and nanoseconds, and
/// the nanoseconds of one operation at each of [`PERCENTILES`] where each one was timed.
pub(crate) const END: &str = "IO-END";

/// The percentiles of an operation's latency that are told, in tenths of a per cent.
pub(crate) const PERCENTILES: [u64; 4] = [500, 990, 999, 1000];

/// How long a look at counters takes at most: the guest sleeps, and time counts nothing else.
const LOOK: Duration = Duration::from_millis(100);

/// How much is done before the work that counts: caches and threads are warm then.
const WARM_UP: u64 = 64;

/// Transfers that O_DIRECT takes are aligned to this many bytes on every disk.
const ALIGNMENT: usize = 4096;

/// A message and its answer, in bytes.
const MESSAGE: usize = 64;

/// How much one call sends or receives, in bytes.
const CHUNK: usize = 128 << 10;

/// Keep a device busy, and say when.
#[derive(Debug, FromArgs)]
pub(crate) struct Load {
    #[argh(subcommand)]
    kind: Kind,
}

#[derive(Debug, FromArgs)]
#[argh(subcommand)]
enum Kind {
    Disk(Disk),
    Net(Net),
    Stream(Stream),
}

/// Read or write a block device past the page cache.
#[derive(Debug, FromArgs)]
#[argh(subcommand, name = "disk")]
struct Disk {
    /// what to call this work
    #[argh(option)]
    name: String,

    /// the block device
    #[argh(option)]
    device: PathBuf,

    /// bytes of a request
    #[argh(option)]
    block: usize,

    /// how many requests are under way at once
    #[argh(option)]
    depth: u64,

    /// how many requests there are (default: as many as there is time for)
    #[argh(option)]
    operations: Option<u64>,

    /// end after so many seconds
    #[argh(option)]
    seconds: Option<u64>,

    /// write, not read
    #[argh(switch)]
    write: bool,

    /// flush after each write
    #[argh(switch)]
    flush: bool,

    /// in a random order, always the same
    #[argh(switch)]
    random: bool,
}

/// Talk to the bench's server.
#[derive(Debug, FromArgs)]
#[argh(subcommand, name = "net")]
struct Net {
    /// what to call this work
    #[argh(option)]
    name: String,

    /// address and port of the server
    #[argh(option)]
    connect: String,

    /// upload, download or ping
    #[argh(option)]
    mode: String,

    /// how many bytes, or how many messages
    #[argh(option)]
    count: u64,

    /// with ping: end after so many seconds
    #[argh(option)]
    seconds: Option<u64>,
}

/// Write lines to a console.
#[derive(Debug, FromArgs)]
#[argh(subcommand, name = "stream")]
struct Stream {
    /// what to call this work
    #[argh(option)]
    name: String,

    /// the terminal
    #[argh(option)]
    device: PathBuf,

    /// how many bytes
    #[argh(option)]
    count: u64,
}

impl Load {
    /// Does the work.
    pub(crate) fn run(&self) -> Result<i32> {
        match &self.kind {
            Kind::Disk(disk) => disk.run()?,
            Kind::Net(net) => net.run()?,
            Kind::Stream(stream) => stream.run()?,
        }
        Ok(0)
    }
}

/// Says that the work `name` begins, and gives whoever measures the time to look; from then on
/// time counts.
fn begin(name: &str) -> Result<Instant> {
    say(&format!("{START} {name}"))?;
    thread::sleep(LOOK);
    Ok(Instant::now())
}

/// Says that the work `name` has ended, how many operations it took that long for, and the
/// percentiles of `latencies`.
fn end(name: &str, operations: u64, took: Duration, latencies: Latencies) -> Result<()> {
    let nanos = took.as_nanos();
    let mut line = format!("{END} {name} {operations} {nanos}");
    for nanos in latencies.percentiles() {
        line += &format!(" {nanos}");
    }
    say(&line)?;
    thread::sleep(LOOK);
    Ok(())
}

/// How long each operation took, in nanoseconds.
#[derive(Default)]
struct Latencies(Vec<u64>);

impl Latencies {
    /// Adds an operation that began then and has ended now.
    fn since(&mut self, begun: Instant) {
        self.0.push(begun.elapsed().as_nanos() as u64);
    }

    /// The latency at each of [`PERCENTILES`], by the nearest rank; none if nothing was timed.
    fn percentiles(mut self) -> Vec<u64> {
        self.0.sort_unstable();
        let count = self.0.len() as u64;
        let rank = |tenths: u64| (count * tenths).div_ceil(1000).max(1) as usize;
        let at = |tenths| self.0.get(rank(tenths) - 1).copied();
        PERCENTILES.into_iter().filter_map(at).collect()
    }
}

fn say(line: &str) -> Result<()> {
    let mut out = io::stdout();
    writeln!(out, "{line}")
        .and_then(|()| out.flush())
        .context("cannot write standard output")
}

impl Disk {
    fn run(&self) -> Result<()> {
        ensure!(
            self.block.is_multiple_of(512) && self.block > 0,
            "--block is no multiple of 512"
        );
        ensure!(self.depth > 0, "--depth is at least 1");
        ensure!(
            self.operations.is_some() || self.seconds.is_some(),
            "--operations or --seconds is needed"
        );
        let mut file = OpenOptions::new()
            .read(true)
            .write(self.write)
            .custom_flags(OFlags::DIRECT.bits().cast_signed())
            .open(&self.device)
            .with_context(|| format!("cannot open {:?}", self.device))?;
        let size = file
            .seek(SeekFrom::End(0))
            .context("cannot tell the disk's size")?;
        let blocks = size / self.block as u64;
        ensure!(blocks > 0, "the disk is smaller than a request");

        let next = AtomicU64::new(0);
        let (warm, go, over) = (
            Barrier::new(self.depth as usize + 1),
            Barrier::new(self.depth as usize + 1),
            Barrier::new(self.depth as usize + 1),
        );
        let done = thread::scope(|scope| {
            let threads = (0..self.depth)
                .map(|index| {
                    let (file, next) = (&file, &next);
                    let (warm, go, over) = (&warm, &go, &over);
                    scope.spawn(move || {
                        let mut requests = Requests::new(self, file, blocks, index);
                        let warmed = requests.work(next, WARM_UP, None);
                        requests.latencies.0.clear();
                        warm.wait();
                        go.wait();
                        let operations = self.operations.unwrap_or(u64::MAX);
                        let worked =
                            warmed.and_then(|_| requests.work(next, operations, self.seconds));
                        over.wait();
                        worked.map(|()| requests.latencies)
                    })
                })
                .collect::<Vec<_>>();
            warm.wait();
            next.store(0, Ordering::SeqCst);
            let begun = begin(&self.name);
            go.wait();
            over.wait();
            let took = begun?.elapsed();
            let mut all = Latencies::default();
            for thread in threads {
                match thread.join() {
                    Ok(worked) => all.0.extend(worked.context("cannot use the disk")?.0),
                    Err(_) => bail!("a thread of the load panicked"),
                }
            }
            let done = all.0.len() as u64;
            end(&self.name, done, took, all)?;
            Ok(done)
        })?;
        ensure!(
            self.seconds.is_some() || Some(done) == self.operations,
            "{done} requests were done"
        );
        Ok(())
    }
}

/// The requests of one thread, one at a time.
struct Requests<'a> {
    disk: &'a Disk,
    file: &'a File,
    blocks: u64,
    random: u64,
    buffer: Vec<u8>,
    offset: usize,
    latencies: Latencies,
}

impl<'a> Requests<'a> {
    fn new(disk: &'a Disk, file: &'a File, blocks: u64, thread: u64) -> Self {
        let buffer = vec![thread as u8; disk.block + ALIGNMENT];
        let offset = buffer.as_ptr().align_offset(ALIGNMENT);
        Self {
            disk,
            file,
            blocks,
            random: 0x9e37_79b9_7f4a_7c15 ^ (thread + 1),
            buffer,
            offset,
            latencies: Latencies(Vec::with_capacity(disk.operations.unwrap_or(0) as usize)),
        }
    }

    /// Takes requests until `until` of them were taken by all threads, or for so many
    /// seconds; each that it took has a latency.
    fn work(&mut self, next: &AtomicU64, until: u64, seconds: Option<u64>) -> io::Result<()> {
        let end = end_of(seconds);
        loop {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= until || end.is_some_and(|end| Instant::now() >= end) {
                return Ok(());
            }
            let block = match self.disk.random {
                true => self.draw() % self.blocks,
                false => index % self.blocks,
            };
            let begun = Instant::now();
            self.one(block * self.disk.block as u64)?;
            self.latencies.since(begun);
        }
    }

    fn one(&mut self, at: u64) -> io::Result<()> {
        let buffer = &mut self.buffer[self.offset..self.offset + self.disk.block];
        if !self.disk.write {
            return self.file.read_exact_at(buffer, at);
        }
        self.file.write_all_at(buffer, at)?;
        match self.disk.flush {
            true => self.file.sync_data(),
            false => Ok(()),
        }
    }

    /// Returns the next of a fixed sequence: xorshift64.
    fn draw(&mut self) -> u64 {
        self.random ^= self.random << 13;
        self.random ^= self.random >> 7;
        self.random ^= self.random << 17;
        self.random
    }
}

impl Net {
    fn run(&self) -> Result<()> {
        let mut stream = TcpStream::connect(&self.connect)
            .with_context(|| format!("cannot connect to {}", self.connect))?;
        stream.set_nodelay(true)?;
        let mut latencies = Latencies::default();
        let mut work = |stream: &mut TcpStream, count: u64| -> io::Result<u64> {
            match self.mode.as_str() {
                "upload" => upload(stream, count),
                "download" => download(stream, count),
                _ => {
                    latencies = Latencies(Vec::with_capacity(count as usize));
                    ping(stream, count, self.seconds, &mut latencies)
                }
            }
        };
        ensure!(
            ["upload", "download", "ping"].contains(&self.mode.as_str()),
            "--mode is upload, download or ping"
        );
        let warm = match self.mode.as_str() {
            "ping" => WARM_UP,
            _ => WARM_UP * CHUNK as u64,
        };
        work(&mut stream, warm).context("cannot talk to the server")?;
        let begun = begin(&self.name)?;
        let done = work(&mut stream, self.count).context("cannot talk to the server")?;
        let took = begun.elapsed();
        end(&self.name, done, took, latencies)
    }
}

/// Work for the server: what it shall do and how much of it.
fn order(stream: &mut TcpStream, what: u8, count: u64) -> io::Result<()> {
    let mut order = [what; 9];
    order[1..].copy_from_slice(&count.to_le_bytes());
    stream.write_all(&order)
}

fn upload(stream: &mut TcpStream, count: u64) -> io::Result<u64> {
    order(stream, b'u', count)?;
    send(stream, count)?;
    // The server has it all when this comes.
    let mut all = [0; 1];
    stream.read_exact(&mut all)?;
    Ok(count)
}

fn download(stream: &mut TcpStream, count: u64) -> io::Result<u64> {
    order(stream, b'd', count)?;
    receive(stream, count)?;
    Ok(count)
}

/// Sends `count` messages, or those that there is time for: the server then answers no more.
fn ping(
    stream: &mut TcpStream,
    count: u64,
    seconds: Option<u64>,
    latencies: &mut Latencies,
) -> io::Result<u64> {
    order(stream, b'p', count)?;
    let end = end_of(seconds);
    let mut message = [7; MESSAGE];
    for done in 0..count {
        let begun = Instant::now();
        if end.is_some_and(|end| begun >= end) {
            return Ok(done);
        }
        stream.write_all(&message)?;
        stream.read_exact(&mut message)?;
        latencies.since(begun);
    }
    Ok(count)
}

/// When so many seconds from now are over.
fn end_of(seconds: Option<u64>) -> Option<Instant> {
    Some(Instant::now() + Duration::from_secs(seconds?))
}

fn send(stream: &mut TcpStream, mut count: u64) -> io::Result<()> {
    let data = vec![0x5a; CHUNK];
    while count > 0 {
        let part = count.min(CHUNK as u64);
        stream.write_all(&data[..part as usize])?;
        count -= part;
    }
    Ok(())
}

fn receive(stream: &mut TcpStream, mut count: u64) -> io::Result<()> {
    let mut data = vec![0; CHUNK];
    while count > 0 {
        let part = count.min(CHUNK as u64) as usize;
        match stream.read(&mut data[..part])? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            length => count -= length as u64,
        }
    }
    Ok(())
}

/// Serves what [`Net`] asks for, on a thread of its own, for as long as this process lives.
pub(crate) fn serve(address: &str) -> Result<()> {
    let listener =
        TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"))?;
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            // A guest that is gone ends the talk, and nobody else hears of it.
            thread::spawn(move || answer(stream));
        }
    });
    Ok(())
}

fn answer(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    loop {
        let mut order = [0; 9];
        stream.read_exact(&mut order)?;
        let mut count = [0; 8];
        count.copy_from_slice(&order[1..]);
        let count = u64::from_le_bytes(count);
        match order[0] {
            b'u' => {
                receive(&mut stream, count)?;
                stream.write_all(b"u")?;
            }
            b'd' => send(&mut stream, count)?,
            _ => {
                let mut message = [0; MESSAGE];
                for _ in 0..count {
                    stream.read_exact(&mut message)?;
                    stream.write_all(&message)?;
                }
            }
        }
    }
}

impl Stream {
    fn run(&self) -> Result<()> {
        let mut device = OpenOptions::new()
            .write(true)
            .open(&self.device)
            .with_context(|| format!("cannot open {:?}", self.device))?;
        // As a kernel's log and a program's output are: lines of some length.
        let line = [&[b'.'; 63][..], b"\n"].concat();
        let lines = self.count / line.len() as u64;
        device.write_all(&line)?;
        // The VMM may write this console's output later than the serial port's, and both to one place,
        // where what is said next is to stand on a line of its own.
        thread::sleep(LOOK);
        let begun = begin(&self.name)?;
        for _ in 0..lines {
            device.write_all(&line).context("cannot write the lines")?;
        }
        rustix::termios::tcdrain(&device).context("cannot wait for the terminal")?;
        let took = begun.elapsed();
        thread::sleep(LOOK);
        let bytes = lines * line.len() as u64;
        end(&self.name, bytes, took, Latencies::default())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn a_disk_is_written_in_order_and_all_of_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("disk");
        std::fs::write(&path, vec![0xff; 64 << 10]).unwrap();
        let words = format!(
            "disk --name w --device {} --block 4096 --depth 4 --operations 16 --write",
            path.display()
        );
        let words = words.split(' ').collect::<Vec<_>>();
        let load = Load::from_args(&["xtask load"], &words).unwrap();
        // Not every file system has O_DIRECT.
        if let Err(error) = load.run() {
            println!("skipped: {error:#}");
            return;
        }
        let written = std::fs::read(&path).unwrap();
        assert!(written.iter().all(|byte| *byte < 4), "a block was left out");
    }

    #[test]
    fn the_server_does_what_it_is_asked() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let server = thread::spawn(move || answer(listener.accept().unwrap().0));
        let mut stream = TcpStream::connect(address).unwrap();
        let mut latencies = Latencies::default();
        assert_eq!(upload(&mut stream, 300_000).unwrap(), 300_000);
        assert_eq!(download(&mut stream, 300_000).unwrap(), 300_000);
        assert_eq!(ping(&mut stream, 10, None, &mut latencies).unwrap(), 10);
        assert_eq!(latencies.0.len(), 10);
        drop(stream);
        assert!(server.join().unwrap().is_err());
    }

    #[test]
    fn percentiles_are_latencies_that_were_seen() {
        let of = |all: &[u64]| Latencies(all.to_vec()).percentiles();
        assert_eq!(of(&[]), [0; 0]);
        assert_eq!(of(&[7]), [7; 4]);
        let thousand = (1..=1000).rev().collect::<Vec<_>>();
        assert_eq!(of(&thousand), [500, 990, 999, 1000]);
    }
}
