use crate::rig::{CONSOLE, Rig, Turn, WITH_DEVICES};
use crate::software::{Program, archive, initrd_with_script};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use rustix::termios::{OptionalActions, Termios, Winsize, tcgetattr, tcsetattr, tcsetwinsize};
use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};
use tempfile::TempDir;
use vmm_sys_util::signal::register_signal_handler;

/// How long a test waits for anything: an emulated guest takes seconds, on a machine that others
/// use too some tens of them.
const PATIENCE: Duration = Duration::from_secs(300);

/// How often a test looks whether what it waits for is there.
pub(crate) const GLANCE: Duration = Duration::from_millis(20);

/// The first line that the guest's init prints.
pub(crate) const MARKER: &str = "GUEST-MARKER";

/// Where armlet's standard input comes from.
#[derive(Clone, Debug)]
pub(crate) enum Input {
    /// `/dev/null`.
    Nothing,
    /// A pipe that [`Guest::send`] writes to.
    Pipe,
    /// A file.
    File(PathBuf),
    /// A terminal that [`Guest::send`] types at; the output goes there as well.
    Terminal,
}

/// `armlet run` to be.
pub(crate) struct Armlet {
    arguments: Vec<OsString>,
    cmdline: String,
    input: Input,
    memory: &'static str,
    cpus: usize,
    turn: Option<Turn>,
    /// A command that becomes armlet.
    through: Vec<OsString>,
    folder: TempDir,
}

impl Armlet {
    /// `armlet run`.
    pub(crate) fn new() -> Armlet {
        Armlet {
            arguments: vec!["run".into()],
            cmdline: String::new(),
            input: Input::Nothing,
            memory: "256M",
            cpus: 1,
            turn: None,
            through: Vec::new(),
            folder: tempfile::tempdir().expect("a temporary folder"),
        }
    }

    /// A guest of a few instructions.
    pub(crate) fn program(program: &Program) -> Armlet {
        Armlet::image(&program.image())
    }

    /// A guest whose kernel file holds `image`.
    pub(crate) fn image(image: &[u8]) -> Armlet {
        let armlet = Armlet::new();
        let path = armlet.file("kernel", image);
        armlet.option("--kernel", path)
    }

    /// Debian's `kernel` with the test initramfs, whose init does `what`.
    pub(crate) fn debian(rig: &Rig, kernel: &str, what: &str) -> Armlet {
        Armlet::linux(&rig.asset(kernel), &rig.asset("initrd"), what)
    }

    /// Debian's `kernel` with an init that runs `script` and powers off.
    pub(crate) fn script(rig: &Rig, kernel: &str, script: &str) -> Armlet {
        Armlet::script_on(rig, &rig.asset(kernel), script)
    }

    /// The kernel at `path` with an init that runs `script` and powers off.
    pub(crate) fn script_on(rig: &Rig, path: &Path, script: &str) -> Armlet {
        let mut armlet = Armlet::new();
        let initrd = armlet.folder.path().join("initrd");
        initrd_with_script(&rig.asset("initrd"), script, &initrd);
        armlet.boot(path, &initrd, "script");
        armlet
    }

    /// Debian's usual kernel with the drivers of virtio devices, whose init runs `script` and powers
    /// off.
    pub(crate) fn devices(rig: &Rig, script: &str) -> Armlet {
        let [kernel, drivers] = WITH_DEVICES;
        Armlet::devices_on(rig, kernel, drivers, script)
    }

    /// As [`Self::devices`], with this kernel and the drivers in this archive.
    pub(crate) fn devices_on(rig: &Rig, kernel: &str, drivers: &str, script: &str) -> Armlet {
        let armlet = Armlet::new();
        let read = |name: &str| {
            let path = rig.asset(name);
            fs::read(&path).unwrap_or_else(|error| panic!("cannot read {path:?}: {error}"))
        };
        let initrd = [
            read("initrd"),
            read(drivers),
            archive("script", script.as_bytes()),
        ];
        let initrd = armlet.file("initrd", &initrd.concat());
        let mut armlet = armlet;
        armlet.boot(&rig.asset(kernel), &initrd, "script");
        armlet
    }

    /// Debian's usual kernel with drivers for the power key, whose init runs `script` and powers off.
    pub(crate) fn power_key(rig: &Rig, script: &str) -> Armlet {
        let mut armlet = Armlet::new();
        let read = |name: &str| fs::read(rig.asset(name)).expect("an asset");
        let script = archive("powerkey.sh", script.as_bytes());
        let initrd = [read("initrd"), read("powerkey.cpio"), script];
        let initrd = armlet.file("initrd", &initrd.concat());
        armlet.boot(&rig.asset("Image-generic"), &initrd, "powerkey");
        armlet
    }

    /// A Linux guest from these files.
    pub(crate) fn linux(kernel: &Path, initrd: &Path, what: &str) -> Armlet {
        let mut armlet = Armlet::new();
        armlet.boot(kernel, initrd, what);
        armlet
    }

    /// A whole system on the first disk, with these files of its own.
    pub(crate) fn system(kernel: &Path, initrd: &Path) -> Armlet {
        let mut armlet = Armlet::new();
        armlet.boot(kernel, initrd, "nothing");
        armlet.cmdline = "root=/dev/vda rw console=ttyAMA0 cryptomgr.notests".to_owned();
        armlet
    }

    fn boot(&mut self, kernel: &Path, initrd: &Path, what: &str) {
        // The kernel's self-tests of its ciphers are half of its boot.
        self.cmdline = format!("console={CONSOLE} quiet cryptomgr.notests armlet.run={what}");
        let words: [&OsStr; 4] = [
            "--kernel".as_ref(),
            kernel.as_ref(),
            "--initrd".as_ref(),
            initrd.as_ref(),
        ];
        self.arguments.extend(words.map(OsStr::to_owned));
    }

    /// Writes a file that lives as long as the guest, and gives its path.
    pub(crate) fn file(&self, name: &str, data: &[u8]) -> PathBuf {
        let path = self.folder.path().join(name);
        fs::write(&path, data).unwrap_or_else(|error| panic!("cannot write {path:?}: {error}"));
        path
    }

    /// The initramfs of [`Self::devices`].
    pub(crate) fn initrd(&self) -> PathBuf {
        self.folder.path().join("initrd")
    }

    pub(crate) fn option(mut self, name: &str, value: impl AsRef<OsStr>) -> Armlet {
        self.arguments.extend([name.into(), value.as_ref().into()]);
        self
    }

    pub(crate) fn flag(mut self, name: &str) -> Armlet {
        self.arguments.push(name.into());
        self
    }

    /// Adds `words` to the kernel's command line.
    pub(crate) fn cmdline(mut self, words: &str) -> Armlet {
        self.cmdline.push(' ');
        self.cmdline.push_str(words);
        self
    }

    /// Gives a Linux guest another serial console.
    pub(crate) fn console(mut self, name: &str) -> Armlet {
        self.cmdline = self.cmdline.replace(CONSOLE, name);
        self
    }

    pub(crate) fn verbose(self) -> Armlet {
        self.flag("--verbose")
    }

    /// Gives the guest so much memory, not 256 MiB.
    pub(crate) fn memory(mut self, size: &'static str) -> Armlet {
        self.memory = size;
        self
    }

    /// Gives the guest so many vCPUs, not one.
    pub(crate) fn cpus(mut self, cpus: usize) -> Armlet {
        self.cpus = cpus;
        self
    }

    pub(crate) fn input(mut self, input: Input) -> Armlet {
        self.input = input;
        self
    }

    /// Starts armlet by a command that takes armlet's own behind its words, and becomes it.
    pub(crate) fn through(mut self, words: &[&OsStr]) -> Armlet {
        self.through = words.iter().map(OsString::from).collect();
        self
    }

    /// Waits until no guest runs; none starts before this one has ended. Who changes the host for
    /// it does so after this.
    pub(crate) fn alone(mut self) -> Armlet {
        self.turn = Some(Turn::alone());
        self
    }

    /// Runs the guest to its end.
    pub(crate) fn run(self) -> Outcome {
        self.start().end()
    }

    /// Starts the guest.
    pub(crate) fn start(self) -> Guest {
        self.start_with(None)
    }

    /// Starts the guest from a snapshot, which says what its machine is.
    pub(crate) fn restore(self, folder: &Path) -> Guest {
        self.option("--restore", folder).spawn(None)
    }

    /// Starts the guest with `output` as armlet's standard output, which the test looks after.
    pub(crate) fn start_with(self, output: Option<OwnedFd>) -> Guest {
        let (memory, cpus, cmdline) = (self.memory, self.cpus, self.cmdline.clone());
        let armlet = self.option("--memory", memory);
        let armlet = armlet.option("--cpus", cpus.to_string());
        armlet.option("--cmdline", cmdline).spawn(output)
    }

    fn spawn(self, output: Option<OwnedFd>) -> Guest {
        ignore_no_signal();
        let turn = self.turn.unwrap_or_else(|| Turn::of(self.cpus));
        let mut words = self.through.clone();
        words.push(env!("CARGO_BIN_EXE_armlet").into());
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).args(&self.arguments);
        command.stderr(Stdio::piped());
        let terminal = match &self.input {
            Input::Terminal => Some(Terminal::open()),
            _ => None,
        };
        match (&self.input, &terminal) {
            (Input::Nothing, _) => command.stdin(Stdio::null()),
            (Input::File(path), _) => command.stdin(File::open(path).expect("a file for input")),
            (_, Some(terminal)) => command.stdin(terminal.slave()),
            (_, None) => command.stdin(Stdio::piped()),
        };
        let read_here = output.is_none();
        match (output, &terminal) {
            (Some(output), _) => command.stdout(output),
            (None, Some(terminal)) => command.stdout(terminal.slave()),
            (None, None) => command.stdout(Stdio::piped()),
        };
        let line = format!("armlet {:?}", self.arguments);
        let mut child = command.spawn().expect("armlet can be run");
        let keys: Option<Box<dyn Write + Send>> = match (child.stdin.take(), &terminal) {
            (Some(pipe), _) => Some(Box::new(pipe)),
            (None, Some(terminal)) => Some(Box::new(terminal.master())),
            (None, None) => None,
        };
        let output = match (child.stdout.take(), &terminal) {
            (Some(pipe), _) => Stream::of(pipe),
            (None, Some(terminal)) if read_here => Stream::of(terminal.master()),
            _ => Stream::none(),
        };
        let errors = Stream::of(child.stderr.take().expect("a pipe"));
        Guest {
            line,
            child,
            keys,
            terminal,
            output,
            errors,
            seen: 0,
            errors_seen: 0,
            started: Instant::now(),
            folder: self.folder,
            _turn: turn,
        }
    }
}

/// Lets the processes that are started from here on take the signals that tests send: this one may
/// have been started with some of them ignored, by nohup(1) or in the background of a shell, which
/// they would inherit, and armlet leaves them so. A signal with a handler gets its default action
/// back when a program is executed (signal(7)).
fn ignore_no_signal() {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    let status = fs::read_to_string("/proc/self/status").expect("/proc");
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = u64::from_str_radix(ignored.expect("SigIgn").trim(), 16).expect("a mask");
    for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGTERM] {
        if ignored >> (signal - 1) & 1 == 1 {
            register_signal_handler(signal, nothing).expect("a signal that can be handled");
        }
    }
}

/// A running armlet; it is killed when this is dropped.
pub(crate) struct Guest {
    line: String,
    child: Child,
    keys: Option<Box<dyn Write + Send>>,
    terminal: Option<Terminal>,
    output: Arc<Stream>,
    errors: Arc<Stream>,
    /// How much of the output was expected already.
    seen: usize,
    errors_seen: usize,
    started: Instant,
    folder: TempDir,
    _turn: Turn,
}

impl Guest {
    /// Armlet's process.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// A file of the guest's own folder.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// How long it has been running.
    pub(crate) fn age(&self) -> Duration {
        self.started.elapsed()
    }

    /// What the console has printed so far, without carriage returns.
    pub(crate) fn said(&self) -> String {
        self.output.text().replace('\r', "")
    }

    /// Waits until the console prints `text`, after what was expected before.
    pub(crate) fn expect(&mut self, text: &str) {
        match self.output.find(text.as_bytes(), self.seen) {
            Ok(end) => self.seen = end,
            Err(why) => self.fail(&format!("{why}, but no {text:?} on the console")),
        }
    }

    /// Waits until armlet says `text` on standard error, after what was expected before.
    pub(crate) fn expect_error(&mut self, text: &str) {
        match self.errors.find(text.as_bytes(), self.errors_seen) {
            Ok(end) => self.errors_seen = end,
            Err(why) => self.fail(&format!("{why}, but no {text:?} on standard error")),
        }
    }

    /// Types, or writes to the pipe; waits where nothing takes it.
    pub(crate) fn send(&mut self, bytes: &[u8]) {
        let keys = self.keys.as_mut().expect("an input to write to");
        let sent = keys.write_all(bytes).and_then(|()| keys.flush());
        if let Err(error) = sent {
            self.fail(&format!("cannot send: {error}"));
        }
    }

    /// Ends the input.
    pub(crate) fn close_input(&mut self) {
        self.keys = None;
    }

    /// Sends armlet a signal.
    pub(crate) fn signal(&self, signal: Signal) {
        let pid = Pid::from_child(&self.child);
        kill_process(pid, signal).expect("armlet runs");
    }

    /// Whether armlet runs.
    pub(crate) fn runs(&mut self) -> bool {
        self.child.try_wait().expect("a child").is_none()
    }

    /// Sets the terminal's modes, as a shell does that takes it back.
    pub(crate) fn set_modes(&self, modes: &Termios) {
        let terminal = self.terminal.as_ref().expect("a terminal");
        tcsetattr(&terminal.slave, OptionalActions::Now, modes).expect("a terminal");
    }

    /// The terminal's modes.
    pub(crate) fn all_modes(&self) -> Termios {
        let terminal = self.terminal.as_ref().expect("a terminal");
        tcgetattr(&terminal.slave).expect("a terminal's modes")
    }

    /// The terminal's modes, as text.
    pub(crate) fn modes(&self) -> String {
        self.terminal.as_ref().expect("a terminal").modes()
    }

    /// Waits for the end.
    pub(crate) fn end(mut self) -> Outcome {
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            match self.child.try_wait().expect("a child") {
                Some(status) => break status,
                None if Instant::now() > deadline => self.fail("it should have ended"),
                None => sleep(GLANCE),
            }
        };
        let age = self.age();
        println!("{:.1} s: {status}: {}", age.as_secs_f32(), self.line);
        let modes = self.terminal.take().map(|terminal| terminal.modes());
        self.errors.close(deadline);
        self.output.close(deadline);
        Outcome {
            line: self.line.clone(),
            status,
            modes,
            age,
            bytes: self.output.lock().bytes.clone(),
            errors: self.errors.text(),
        }
    }

    fn fail(&self, why: &str) -> ! {
        if self.output.lock().closed {
            // The last words come after the console's.
            self.errors.close(Instant::now() + Duration::from_secs(5));
        }
        panic!(
            "{}: {why} after {:.1} s\n{}",
            self.line,
            self.age().as_secs_f32(),
            transcript(&self.output.text(), &self.errors.text())
        )
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // It fails where it has ended, which is what it is for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn transcript(output: &str, errors: &str) -> String {
    let mut text = String::new();
    for (name, what) in [("console", output), ("standard error", errors)] {
        // The end tells more than the beginning.
        let start = what.len().saturating_sub(6000);
        let tail = what.get(start..).unwrap_or(what);
        let _ = write!(text, "---- {name}:\n{tail}\n");
    }
    text
}

/// How a guest ended, and what was said.
pub(crate) struct Outcome {
    line: String,
    pub(crate) status: ExitStatus,
    /// The terminal's modes afterwards, as text.
    pub(crate) modes: Option<String>,
    /// How long it ran.
    pub(crate) age: Duration,
    /// What the console printed.
    pub(crate) bytes: Vec<u8>,
    /// What armlet said on standard error.
    pub(crate) errors: String,
}

impl Outcome {
    /// What the console printed, without carriage returns.
    pub(crate) fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes).replace('\r', "")
    }

    /// Fails unless armlet ended with this status.
    pub(crate) fn assert_status(&self, wanted: i32) -> &Outcome {
        let status = self.status;
        assert!(
            status.code() == Some(wanted),
            "{} ended with {status}, not with {wanted}\n{}",
            self.line,
            transcript(&self.text(), &self.errors)
        );
        self
    }

    /// Fails unless armlet was ended by this signal.
    pub(crate) fn assert_signal(&self, wanted: Signal) -> &Outcome {
        let status = self.status;
        assert!(
            status.signal() == Some(wanted.as_raw()),
            "{} ended with {status}, not by {wanted:?}\n{}",
            self.line,
            transcript(&self.text(), &self.errors)
        );
        self
    }

    /// What armlet said on standard error, but for the note that vCPUs share the host's CPUs: an
    /// emulated host may have one.
    pub(crate) fn complaints(&self) -> String {
        let lines = self.errors.lines();
        let lines = lines.filter(|line| !line.contains("vCPUs share CPUs"));
        lines.map(|line| format!("{line}\n")).collect()
    }

    /// What the script printed; fails unless it ran to its end, and the guest powered off.
    pub(crate) fn script(&self) -> String {
        self.assert_status(0);
        let text = self.text();
        let script = text
            .split_once("\x1eARMLET-SCRIPT-START\n")
            .and_then(|(_, rest)| rest.split_once("\x1eARMLET-SCRIPT-EXIT "));
        let Some((script, status)) = script else {
            panic!(
                "{}: the script did not run\n{}",
                self.line,
                transcript(&text, &self.errors)
            );
        };
        let status = status.lines().next();
        assert_eq!(status, Some("0"), "the script failed; it said\n{script}");
        script.to_owned()
    }
}

/// The part of a script's output that follows the line `== name`, to the next such line.
pub(crate) fn section<'a>(script: &'a str, name: &str) -> &'a str {
    let head = format!("== {name}\n");
    let start = script
        .find(&head)
        .unwrap_or_else(|| panic!("the script printed no {head:?}:\n{script}"));
    let rest = &script[start + head.len()..];
    rest.split("\n== ").next().unwrap_or(rest)
}

/// Bytes without a pattern, always the same for one `seed`: xorshift64.
pub(crate) fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend(state.to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// What a process printed so far.
#[derive(Default)]
struct Stream {
    printed: Mutex<Printed>,
    changed: Condvar,
}

#[derive(Default)]
struct Printed {
    bytes: Vec<u8>,
    closed: bool,
}

impl Stream {
    /// What somebody else reads.
    fn none() -> Arc<Stream> {
        let stream = Stream::default();
        stream.lock().closed = true;
        Arc::new(stream)
    }

    fn of(mut source: impl Read + Send + 'static) -> Arc<Stream> {
        let stream = Arc::new(Stream::default());
        let there = Arc::clone(&stream);
        std::thread::spawn(move || {
            let mut buffer = [0; 1 << 16];
            // A terminal whose other end is closed reads as an error.
            while let Ok(length @ 1..) = source.read(&mut buffer) {
                there.lock().bytes.extend(&buffer[..length]);
                there.changed.notify_all();
            }
            there.lock().closed = true;
            there.changed.notify_all();
        });
        stream
    }

    fn lock(&self) -> MutexGuard<'_, Printed> {
        self.printed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for `wanted` behind the byte `from`; says where it ends, or why it will not come.
    fn find(&self, wanted: &[u8], from: usize) -> Result<usize, &'static str> {
        let deadline = Instant::now() + PATIENCE;
        let mut printed = self.lock();
        loop {
            let after = printed.bytes.get(from..).unwrap_or_default();
            let found = after.windows(wanted.len()).position(|part| part == wanted);
            if let Some(at) = found {
                return Ok(from + at + wanted.len());
            }
            if printed.closed {
                return Err("it ended");
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err("it was waited for");
            }
            let waited = self.changed.wait_timeout(printed, left);
            printed = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Waits until all has been read.
    fn close(&self, deadline: Instant) {
        while !self.lock().closed && Instant::now() < deadline {
            sleep(GLANCE);
        }
    }

    fn text(&self) -> String {
        String::from_utf8_lossy(&self.lock().bytes).into_owned()
    }
}

/// A terminal of our own.
struct Terminal {
    master: OwnedFd,
    slave: OwnedFd,
}

impl Terminal {
    fn open() -> Terminal {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).expect("a pseudo terminal");
        grantpt(&master).expect("a pseudo terminal of ours");
        unlockpt(&master).expect("a pseudo terminal to open");
        let name = ptsname(&master, Vec::new()).expect("its name");
        let name = name.into_string().expect("its name in ASCII");
        let slave = File::options().read(true).write(true).open(name);
        let slave = OwnedFd::from(slave.expect("its other end"));
        let size = Winsize {
            ws_row: 24,
            ws_col: 80,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        tcsetwinsize(&slave, size).expect("a terminal has a size");
        Terminal { master, slave }
    }

    fn slave(&self) -> OwnedFd {
        self.slave.try_clone().expect("a descriptor")
    }

    fn master(&self) -> File {
        File::from(self.master.try_clone().expect("a descriptor"))
    }

    fn modes(&self) -> String {
        format!("{:?}", tcgetattr(&self.slave).expect("a terminal's modes"))
    }
}

/// Values of files in sysfs, set for a while.
pub(crate) struct Tuned {
    before: Vec<(PathBuf, String)>,
}

impl Tuned {
    /// Sets values by file of a folder. `None` where this user cannot.
    pub(crate) fn set(folder: &str, values: &[(&str, &str)]) -> Option<Tuned> {
        let mut tuned = Tuned { before: Vec::new() };
        for (file, value) in values {
            let path = Path::new(folder).join(file);
            let before = fs::read_to_string(&path).ok()?;
            fs::write(&path, value).ok()?;
            tuned.before.push((path, before));
        }
        Some(tuned)
    }
}

impl Drop for Tuned {
    fn drop(&mut self) {
        for (path, value) in self.before.iter().rev() {
            // The host's other users see to it.
            let _ = fs::write(path, value);
        }
    }
}
