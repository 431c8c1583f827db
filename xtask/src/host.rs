//! The rig: a machine with KVM, ARM64 or x86_64, emulated where the computer at hand is none.
//!
//! QEMU emulates EL2, and on x86_64 SVM, as well, so the Linux in it is a real KVM host, only slower. It boots from an
//! initramfs that holds everything a job needs, runs the job's program, and says its exit status
//! on the console in a mark that programs do not print.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{BufWriter, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::io::{FdFlags, fcntl_setfd};

use crate::assets;
use crate::initramfs::Archive;
use crate::isa::Isa;
use crate::marker::Filter;
use crate::packages::{Kernel, Module, Store};
use crate::progress::say;
use crate::signals::Watch;
use crate::terminal::RawTerminal;

/// Ctrl-], as telnet has it: ends the emulated host at once.
const LEAVE: u8 = 0x1d;

/// Longer than the slowest CPU takes to boot on a busy machine.
const BOOT_LIMIT: Duration = Duration::from_secs(120);

/// A kernel that boots says something more often than this.
const SILENCE_LIMIT: Duration = Duration::from_secs(30);

/// The model on whose emulated SVM Linux and its guests run without fail, less what QEMU cannot
/// emulate of it and would say so.
pub(crate) const X86_CPU: &str =
    "EPYC,+svm,+npt,-fxsr-opt,-misalignsse,-osvw,-topoext,-nrip-save,-xsavec";

/// How often an emulated x86_64 host is woken.
const WAKE_EVERY: Duration = Duration::from_millis(200);

/// How much of a console is shown when its host does not come up.
const LAST_LINES: usize = 25;

const HOST_INIT: &str = r#"#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
/bin/busybox --install -s /bin
# Nobody can pivot away from the kernel's first mount (pivot_root(2)), which sandboxes of daemons
# want to. The same files, mounted once more on top of it, are a root like any other.
if [ -z "$ARMLET_RIG_ROOT" ]; then
    export ARMLET_RIG_ROOT=1
    umount /proc
    mkdir /mnt
    mount --bind / /mnt
    cd /mnt
    mount --move . /
    exec chroot . /init
fi
export PATH=/bin HOME=/root TERM=linux
dmesg -n 1
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm /tmp /run
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t tracefs tracefs /sys/kernel/tracing
mount -t debugfs debugfs /sys/kernel/debug
ip link set lo up
hostname host
for module in /rig/modules/*.ko; do
    [ -e "$module" ] && insmod "$module"
done
for disk in /sys/block/vd*; do
    [ -e "$disk/serial" ] || continue
    case "$(cat "$disk/serial")" in
        tools)
            ln -s "${disk##*/}" /dev/tools
            mkdir /tools
            mount -t ext4 -o ro "/dev/${disk##*/}" /tools
            # Programs find their libraries and data where they were made for.
            ln -s /tools/usr/lib /lib
            ln -s /tools/usr/lib64 /lib64
            for folder in lib libexec sbin share; do ln -s "/tools/usr/$folder" "/usr/$folder"; done
            export PATH=/bin:/tools/usr/bin:/tools/usr/sbin
            ;;
        data) mkdir /data && mount -t ext4 "/dev/${disk##*/}" /data ;;
    esac
done
# All else is the initramfs itself, in memory too: a job's files may lie anywhere, below /tmp also.
exec </dev/null >/dev/console 2>&1
stty -onlcr -echo </dev/console
printf '\036ARMLET-RIG-START\n'
/bin/sh /rig/run
status=$?
# Changing a terminal's settings waits until all output has left it.
stty sane </dev/console
printf '\036ARMLET-RIG-EXIT %d\n' $status
# The rig ends the machine when it sees the mark; this is for when nobody looks.
sleep 5
poweroff -f
"#;

/// The second one is who programs become that need no rights.
const PASSWD: &str = "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n";

/// Addresses at which no program is that is not put there on purpose.
pub(crate) const TRACED: std::ops::Range<u64> = 0x1000_0000..0x2000_0000;

/// The machines that are emulated.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Machine {
    /// QEMU's own, with any CPU and GIC, and with disks.
    #[default]
    Virt,
    /// A Raspberry Pi 4, as far as QEMU knows it: no disks, and just under 1 GiB that Linux finds.
    RaspberryPi4,
}

/// A machine to emulate.
#[derive(Clone, Debug)]
pub(crate) struct HostSpec {
    /// Its instruction set.
    pub(crate) isa: Isa,
    /// What it is, for ARM64. CPU, GIC and memory are those of [`Machine::Virt`].
    pub(crate) machine: Machine,
    /// The CPU as QEMU calls it, such as `max` or `cortex-a53`.
    pub(crate) cpu: String,
    /// The version of an ARM64 machine's interrupt controller, 2 or 3.
    pub(crate) gic: u8,
    /// The kernel that is KVM's host.
    pub(crate) kernel: Kernel,
    /// How many CPUs.
    pub(crate) smp: u32,
    /// Memory in MiB. Twice the size of the files put in is taken before the job starts.
    pub(crate) memory_mib: u32,
    /// Whether to count instructions: one virtual nanosecond is then one instruction.
    pub(crate) icount: bool,
    /// Where to write the instructions of programs at addresses in [`TRACED`] that were executed, as
    /// they first were.
    pub(crate) executed: Option<PathBuf>,
    /// More for the kernel's command line.
    pub(crate) append: String,
    /// Whether it has Debian's programs for devices, such as passt, at `/tools`.
    pub(crate) tools: bool,
    /// Whether it has the Debian system that `cargo xtask image` makes, at `/data`.
    pub(crate) system: bool,
    /// The image of an ext4 file system to be mounted at `/data`; what the host writes is lost.
    pub(crate) data: Option<PathBuf>,
}

/// A file of this machine to put into the emulated one.
#[derive(Clone, Debug)]
pub(crate) struct HostFile {
    /// Where it is here.
    pub(crate) from: PathBuf,
    /// Where it shall be there.
    pub(crate) to: PathBuf,
    /// Its permission bits there.
    pub(crate) mode: u32,
}

impl HostFile {
    /// A program, which `from` is here and `to` shall be there.
    pub(crate) fn program(from: &Path, to: impl Into<PathBuf>) -> Self {
        Self {
            from: from.to_owned(),
            to: to.into(),
            mode: 0o755,
        }
    }
}

/// What an emulated host shall run.
#[derive(Clone, Debug, Default)]
pub(crate) struct Job {
    /// The files that it needs.
    pub(crate) files: Vec<HostFile>,
    /// The program and its arguments.
    pub(crate) command: Vec<String>,
    /// Variables to set for it.
    pub(crate) environment: Vec<(String, String)>,
    /// The folder to run it in, made when missing.
    pub(crate) folder: PathBuf,
    /// How long it may take once the host is up.
    pub(crate) limit: Option<Duration>,
    /// Disk images of this machine that it writes to, each with the serial number by which it is
    /// found.
    pub(crate) disks: Vec<(PathBuf, String)>,
}

/// How a job ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ended {
    /// With this exit status; 128 and more for a signal, as a shell has it.
    Exit(i32),
    /// Because the user pressed Ctrl-].
    Left,
    /// Because xtask got this signal.
    Signal(i32),
}

impl HostSpec {
    /// The usual host.
    pub(crate) fn of(isa: Isa) -> Self {
        let (cpu, kernel, smp) = match isa {
            Isa::Arm64 => ("max", Kernel::V6_12, 2),
            // Other models, and more CPUs, hang now and then.
            Isa::X86 => (X86_CPU, Kernel::V6_1X86, 1),
        };
        Self {
            isa,
            machine: Machine::Virt,
            cpu: cpu.to_owned(),
            gic: 3,
            kernel,
            smp,
            memory_mib: 3072,
            icount: false,
            executed: None,
            append: String::new(),
            tools: false,
            system: false,
            data: None,
        }
    }

    /// The host that the variables `ARMLET_RIG_*` describe.
    pub(crate) fn from_environment() -> Result<Self> {
        Self::from_variables(Isa::from_environment()?)
    }

    /// The host of this architecture that the other variables describe.
    pub(crate) fn from_variables(isa: Isa) -> Result<Self> {
        let mut spec = Self::of(isa);
        let variable = |name: &str| std::env::var(format!("ARMLET_RIG_{name}")).ok();
        spec.machine = match variable("MACHINE").as_deref() {
            None | Some("virt") => Machine::Virt,
            Some("raspi4b") => Machine::RaspberryPi4,
            Some(other) => bail!("ARMLET_RIG_MACHINE is {other:?}; it may be virt or raspi4b"),
        };
        if let Some(cpu) = variable("CPU") {
            spec.cpu = cpu;
        }
        if let Some(gic) = variable("GIC").filter(|_| isa == Isa::Arm64) {
            spec.gic = gic
                .parse()
                .ok()
                .filter(|gic| [2, 3].contains(gic))
                .with_context(|| format!("ARMLET_RIG_GIC is {gic:?}; it may be 2 or 3"))?;
        }
        if let Some(kernel) = variable("KERNEL") {
            spec.kernel = Kernel::from_name(&kernel).context("ARMLET_RIG_KERNEL")?;
            ensure!(
                spec.kernel.isa() == isa,
                "ARMLET_RIG_KERNEL is {kernel:?}, which is no kernel for {}",
                isa.name()
            );
        }
        if let Some(smp) = variable("SMP") {
            spec.smp = smp.parse().context("ARMLET_RIG_SMP is no number of CPUs")?;
        }
        if let Some(memory) = variable("MEMORY") {
            spec.memory_mib = mebibytes(&memory).context("ARMLET_RIG_MEMORY")?;
        }
        spec.icount = variable("ICOUNT").is_some_and(|value| value == "1");
        spec.append = variable("APPEND").unwrap_or_default();
        spec.tools = variable("TOOLS").is_some_and(|value| value == "1");
        spec.system = variable("SYSTEM").is_some_and(|value| value == "1");
        spec.data = variable("DATA").map(PathBuf::from);
        Ok(spec)
    }

    /// The machine in a few words.
    pub(crate) fn summary(&self) -> String {
        let counted = if self.icount {
            ", counting instructions"
        } else {
            ""
        };
        let gic = match self.isa {
            Isa::Arm64 => format!(", GICv{}", self.gic),
            Isa::X86 => String::new(),
        };
        let machine = match self.machine {
            Machine::Virt => format!("{}{gic}", self.cpu),
            Machine::RaspberryPi4 => "Raspberry Pi 4".to_owned(),
        };
        format!("{machine}, Linux {}{counted}", self.kernel.name())
    }
}

/// A size such as `512M` or `4G` in MiB; a bare number is MiB.
pub(crate) fn mebibytes(size: &str) -> Result<u32> {
    let (number, factor) = match size.strip_suffix(['G', 'g']) {
        Some(number) => (number, 1024),
        None => (size.strip_suffix(['M', 'm']).unwrap_or(size), 1),
    };
    let parsed = number
        .parse::<u32>()
        .ok()
        .and_then(|number| number.checked_mul(factor));
    parsed
        .filter(|size| *size > 0)
        .with_context(|| format!("{size:?} is no size such as 512M or 4G"))
}

/// Boots a host, runs `job` in it and gives what it prints to `print` as it comes.
///
/// With a `terminal`, what the user types goes to the job, which has the console as its terminal.
pub(crate) fn run(
    store: &Store,
    spec: &HostSpec,
    job: &Job,
    terminal: Option<&RawTerminal>,
    print: &mut dyn FnMut(&[u8]) -> Result<()>,
) -> Result<Ended> {
    let kernel = store.kernel(spec.kernel)?;
    let busybox = store.busybox(spec.isa)?;
    let qemu = store.qemu(spec.isa)?;

    let disks = disks(store, spec, job)?;
    // KVM is built into ARM64 kernels.
    let mut modules = match spec.isa {
        Isa::Arm64 => Vec::new(),
        Isa::X86 => vec!["kvm_amd"],
    };
    if !disks.is_empty() {
        modules.extend(["virtio_pci", "virtio_blk", "ext4"]);
    }
    if spec.tools {
        modules.extend(["loop", "tun", "vhost_net", "vhost_vsock"]);
    }
    let modules = kernel.modules(&modules)?;

    let initramfs = NamelessFile::new()?;
    write_initramfs(
        initramfs.file(),
        &busybox,
        &modules,
        job,
        terminal.is_some(),
    )
    .context("cannot write the emulated host's initramfs")?;

    let mut command = qemu.command();
    match spec.machine {
        Machine::Virt => virt(&mut command, spec, &kernel.image, &initramfs.path()),
        Machine::RaspberryPi4 => {
            ensure!(
                disks.is_empty(),
                "QEMU's Raspberry Pi 4 takes no disks of ours"
            );
            let tree = store.device_tree(spec.kernel, "bcm2711-rpi-4-b.dtb")?;
            raspberry_pi_4(&mut command, spec, &kernel.image, &initramfs.path(), &tree);
        }
    }
    for (index, disk) in disks.iter().enumerate() {
        disk.attach(&mut command, index);
    }
    let started = Instant::now();
    let mut emulator = Emulator::start(command)?;
    let (events, _watch) = emulator.events(terminal, spec.isa)?;
    say(&format!(
        "booting an emulated {} host ({})",
        spec.isa.name(),
        spec.summary()
    ));

    let mut filter = Filter::new("RIG");
    if terminal.is_some() {
        filter = filter.raw();
    }
    let mut deadline = Some(started + BOOT_LIMIT);
    let silence = match spec.machine {
        Machine::Virt => SILENCE_LIMIT,
        // Until Linux starts them the Pi's other cores spin, and the first one gets little of a
        // machine with fewer than four CPUs.
        Machine::RaspberryPi4 => BOOT_LIMIT,
    };
    let mut heard = Instant::now();
    loop {
        if !filter.started() {
            deadline = Some((started + BOOT_LIMIT).min(heard + silence));
        }
        let event = match deadline {
            Some(deadline) => {
                events.recv_timeout(deadline.saturating_duration_since(Instant::now()))
            }
            None => events.recv().map_err(|_| RecvTimeoutError::Disconnected),
        };
        match event {
            Ok(Event::Output(bytes)) => {
                heard = Instant::now();
                let was_started = filter.started();
                let output = filter.feed(&bytes);
                if filter.started() && !was_started {
                    say_raw(
                        terminal,
                        &format!("host up after {:.1} s", started.elapsed().as_secs_f32()),
                    );
                    deadline = job.limit.map(|limit| Instant::now() + limit);
                }
                print(&output)?;
                if let Some(status) = filter.status() {
                    return Ok(Ended::Exit(status));
                }
            }
            Ok(Event::Leave) => return Ok(Ended::Left),
            Ok(Event::Signal(signal)) => return Ok(Ended::Signal(signal)),
            Ok(Event::Closed) | Err(RecvTimeoutError::Disconnected) => {
                let status = emulator.child.wait().context("cannot wait for QEMU")?;
                bail!(
                    "the emulated host ended ({status}) without saying how the program did{}",
                    last_lines(&filter.before())
                );
            }
            Err(RecvTimeoutError::Timeout) if filter.started() => {
                bail!("stopped after {:.0} s", started.elapsed().as_secs_f32())
            }
            Err(RecvTimeoutError::Timeout) => {
                bail!(
                    "the emulated host did not come up within {:.0} s, and said nothing for the \
                     last {:.0} s{}",
                    started.elapsed().as_secs_f32(),
                    heard.elapsed().as_secs_f32(),
                    last_lines(&filter.before())
                )
            }
        }
    }
}

/// A disk of the emulated host.
struct Disk {
    image: PathBuf,
    serial: String,
    access: Access,
}

/// What becomes of what is written to a disk.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    Refused,
    /// Kept until the host ends.
    Forgotten,
    Kept,
}

impl Disk {
    fn attach(&self, command: &mut Command, index: usize) {
        let options = match self.access {
            Access::Refused => "readonly=on",
            Access::Forgotten => "snapshot=on",
            Access::Kept => "readonly=off",
        };
        // Who would lose data is the emulated host, and it ends with us.
        let drive = format!(
            "if=none,id=disk{index},format=raw,cache=unsafe,discard=unmap,{options},file={}",
            self.image.display()
        );
        let device = format!("virtio-blk-pci,drive=disk{index},serial={}", self.serial);
        command.args(["-drive", &drive, "-device", &device]);
    }
}

/// The disks that a host needs for `job`.
fn disks(store: &Store, spec: &HostSpec, job: &Job) -> Result<Vec<Disk>> {
    let mut disks = Vec::new();
    let mut add = |image: &Path, serial: &str, access| {
        disks.push(Disk {
            image: image.to_owned(),
            serial: serial.to_owned(),
            access,
        });
    };
    if spec.tools {
        add(&assets::tools(store, spec.isa)?, "tools", Access::Refused);
    }
    if spec.system {
        add(&assets::system(store)?, "data", Access::Forgotten);
    } else if let Some(data) = &spec.data {
        add(data, "data", Access::Forgotten);
    }
    for (image, serial) in &job.disks {
        add(image, serial, Access::Kept);
    }
    Ok(disks)
}

/// The end of what a console said before the job, for an error's text.
fn last_lines(console: &str) -> String {
    let lines = console
        .lines()
        .map(str::trim_end)
        .filter(|line| !line.is_empty());
    let lines = lines.collect::<Vec<_>>();
    let from = lines.len().saturating_sub(LAST_LINES);
    let mut text = String::new();
    for line in &lines[from..] {
        text.push_str("\n  | ");
        text.push_str(line);
    }
    text
}

/// Says `line`, also where a terminal in raw mode does not return the carriage.
fn say_raw(terminal: Option<&RawTerminal>, line: &str) {
    match terminal {
        Some(_) => say(&format!("{line}\r")),
        None => say(line),
    }
}

/// Adds the options that make QEMU's own machine.
fn virt(command: &mut Command, spec: &HostSpec, image: &Path, initramfs: &Path) {
    let machine = match spec.isa {
        Isa::Arm64 => format!("virt,virtualization=on,gic-version={}", spec.gic),
        Isa::X86 => "q35".to_owned(),
    };
    command
        .args(["-machine", &machine])
        .args(["-cpu", &spec.cpu])
        .args(["-smp", &spec.smp.to_string()])
        .args(["-m", &spec.memory_mib.to_string()])
        .args(["-nodefaults", "-no-user-config"])
        .args(["-serial", "chardev:console"]);
    let console = match spec.isa {
        Isa::Arm64 => "console=ttyAMA0",
        Isa::X86 => "console=ttyS0",
    };
    software(command, spec, image, initramfs, console);
}

/// Adds the options that make a Raspberry Pi 4, whose cores, GIC and memory are given.
fn raspberry_pi_4(
    command: &mut Command,
    spec: &HostSpec,
    image: &Path,
    initramfs: &Path,
    tree: &Path,
) {
    command
        .args(["-machine", "raspi4b", "-smp", "4", "-m", "2048"])
        .arg("-dtb")
        .arg(tree)
        // The second port is the mini UART, Linux's console here.
        .args(["-serial", "null", "-serial", "chardev:console"]);
    // QEMU has no second interrupt controller and no I2C of the Pi's, and its clocks and power
    // domains are not to be switched off.
    let append = "console=ttyS1 initcall_blacklist=brcmstb_l2_driver_init,brcmstb_i2c_driver_init \
                  clk_ignore_unused pd_ignore_unused";
    software(command, spec, image, initramfs, append);
}

/// Adds what every machine has.
fn software(command: &mut Command, spec: &HostSpec, image: &Path, initramfs: &Path, append: &str) {
    command
        .args(["-display", "none", "-no-reboot"])
        .args(["-chardev", "stdio,id=console,signal=off"])
        // The seeds in the device tree stay, or a CPU without FEAT_RNG would wait for entropy.
        .args(["-seed", "1"]);
    if spec.icount {
        command.args(["-icount", "shift=0,sleep=off"]);
    }
    if let Some(log) = &spec.executed {
        let range = format!("{:#x}+{:#x}", TRACED.start, TRACED.end - TRACED.start);
        command.args(["-d", "in_asm", "-dfilter", &range, "-D"]);
        command.arg(log);
    }
    // The kernel's log shows that it gets on, and what the matter is when it does not. Its
    // self-tests of ciphers would be half of its boot.
    let usual = match spec.isa {
        Isa::Arm64 => "loglevel=7",
        // Each byte of the log takes long here.
        Isa::X86 => "quiet loglevel=1 mitigations=off nokaslr",
    };
    let append = format!(
        "{append} {usual} rdinit=/init panic=-1 cryptomgr.notests {}",
        spec.append
    );
    command
        .arg("-kernel")
        .arg(image)
        .arg("-initrd")
        .arg(initramfs);
    command.args(["-append", append.trim_end()]);
}

fn write_initramfs(
    file: &File,
    busybox: &Path,
    modules: &[Module],
    job: &Job,
    terminal: bool,
) -> Result<()> {
    let mut archive = Archive::new(BufWriter::with_capacity(1 << 20, file));
    for folder in ["/dev", "/proc", "/sys", "/root"] {
        archive.folder(folder)?;
    }
    // The kernel opens this as the init's terminal before /dev is mounted.
    archive.device("/dev/console", 0o600, (5, 1))?;
    archive.file_from("/bin/busybox", 0o755, busybox)?;
    // Scripts name their interpreter in either folder.
    archive.symlink("/usr/bin", "/bin")?;
    archive.file("/init", 0o755, HOST_INIT.as_bytes())?;
    archive.file("/rig/run", 0o755, run_script(job, terminal).as_bytes())?;
    for (index, module) in modules.iter().enumerate() {
        let path = format!("/rig/modules/{index:02}-{}.ko", module.name);
        archive.file(path, 0o644, &module.data)?;
    }
    archive.file("/etc/passwd", 0o644, PASSWD.as_bytes())?;
    archive.file("/etc/group", 0o644, b"root:x:0:\nnogroup:x:65534:\n")?;
    if !job.folder.as_os_str().is_empty() {
        archive.folder(&job.folder)?;
    }
    let mut there = BTreeSet::new();
    for file in &job.files {
        if there.insert(&file.to) {
            archive.file_from(&file.to, file.mode, &file.from)?;
        }
    }
    archive.finish()?;
    Ok(())
}

/// The script that becomes the job's program.
fn run_script(job: &Job, terminal: bool) -> String {
    let mut script = String::new();
    for (name, value) in &job.environment {
        script.push_str(&format!("export {name}={}\n", quoted(value)));
    }
    if !job.folder.as_os_str().is_empty() {
        script.push_str(&format!(
            "cd {} || exit 125\n",
            quoted(&job.folder.to_string_lossy())
        ));
    }
    let words = job
        .command
        .iter()
        .map(|word| quoted(word))
        .collect::<Vec<_>>()
        .join(" ");
    // A session of its own makes the console its controlling terminal.
    let terminal = if terminal {
        "stty sane </dev/console\nexec setsid cttyhack "
    } else {
        "exec "
    };
    script.push_str(&format!("{terminal}{words}\n"));
    script
}

/// `word` as a shell takes it literally.
pub(crate) fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}

/// What concerns a running host.
#[derive(Debug)]
pub(crate) enum Event {
    /// Its console printed this.
    Output(Vec<u8>),
    /// Its console is gone.
    Closed,
    /// The user pressed Ctrl-].
    Leave,
    /// This process got a signal.
    Signal(i32),
}

/// A running QEMU, which ends when this is dropped.
struct Emulator {
    child: Child,
}

impl Emulator {
    fn start(mut command: Command) -> Result<Self> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let child = command.spawn().context("cannot start QEMU")?;
        Ok(Self { child })
    }

    /// What the console prints, signals, and with a terminal what the user asks of the rig itself.
    fn events(
        &mut self,
        terminal: Option<&RawTerminal>,
        isa: Isa,
    ) -> Result<(Receiver<Event>, Watch)> {
        let (sender, receiver) = mpsc::channel();
        let watch = Watch::start(sender.clone())?;
        let mut console = self.child.stdout.take().context("QEMU has no console")?;
        let mut keys = self.child.stdin.take().context("QEMU has no keyboard")?;

        if terminal.is_some() {
            let sender = sender.clone();
            // Ends with the process: nothing else reads the terminal until then.
            std::thread::spawn(move || {
                let mut buffer = [0; 4096];
                while let Ok(length @ 1..) = std::io::stdin().read(&mut buffer) {
                    let typed = &buffer[..length];
                    if typed.contains(&LEAVE) {
                        let _ = sender.send(Event::Leave);
                        return;
                    }
                    if keys.write_all(typed).and_then(|()| keys.flush()).is_err() {
                        return;
                    }
                }
            });
        } else if isa == Isa::X86 {
            // QEMU 10.0 now and then loses an interrupt that comes while its CPU enters or leaves a
            // guest (VMRUN sets bits of the CPU's pending interrupts without an atomic operation).
            // Where the lost one is the timer's, and the host idles, nothing wakes it again but an
            // interrupt of another device: the console's, here. Nobody reads what is typed.
            std::thread::spawn(move || {
                while keys.write_all(&[0]).and_then(|()| keys.flush()).is_ok() {
                    std::thread::sleep(WAKE_EVERY);
                }
            });
        }
        std::thread::spawn(move || {
            let mut buffer = vec![0; 1 << 16];
            while let Ok(length @ 1..) = console.read(&mut buffer) {
                if sender
                    .send(Event::Output(buffer[..length].to_vec()))
                    .is_err()
                {
                    return;
                }
            }
            let _ = sender.send(Event::Closed);
        });
        Ok((receiver, watch))
    }
}

impl Drop for Emulator {
    fn drop(&mut self) {
        // It may have ended by itself, and then there is nothing to do.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A file without a name, which is gone when nobody has it open: also when xtask is killed.
pub(crate) struct NamelessFile {
    file: File,
}

impl NamelessFile {
    /// An empty file, which programs started from here may open too.
    pub(crate) fn new() -> Result<Self> {
        let folder = std::env::temp_dir();
        let path = folder.join(format!("armlet-xtask-{}", std::process::id()));
        let mut options = File::options();
        options.read(true).write(true).create_new(true).mode(0o600);
        let file = options
            .open(&path)
            .with_context(|| format!("cannot create {path:?}"))?;
        fs::remove_file(&path).with_context(|| format!("cannot remove {path:?}"))?;
        fcntl_setfd(&file, FdFlags::empty()).context("cannot let a file be inherited")?;
        Ok(Self { file })
    }

    /// The file, to be written.
    pub(crate) fn file(&self) -> &File {
        &self.file
    }

    /// A path by which this process, and those that it starts, may open the file.
    pub(crate) fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.file.as_raw_fd()))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn words_reach_the_program_unchanged() {
        let job = Job {
            command: vec!["/bin/a".to_owned(), "it's $HOME".to_owned()],
            environment: vec![("A".to_owned(), "x y".to_owned())],
            folder: "/w".into(),
            ..Job::default()
        };
        assert_eq!(
            run_script(&job, false),
            "export A='x y'\ncd '/w' || exit 125\nexec '/bin/a' 'it'\\''s $HOME'\n"
        );
    }

    #[test]
    fn the_end_of_a_console_is_shown() {
        assert_eq!(last_lines(""), "");
        assert_eq!(last_lines("a\r\n\r\nb"), "\n  | a\n  | b");
        let long = (0..100).map(|n| format!("{n}\n")).collect::<String>();
        let shown = last_lines(&long);
        assert!(
            shown.starts_with("\n  | 75\n") && shown.ends_with(" 99"),
            "{shown}"
        );
    }

    #[test]
    fn sizes_are_read() {
        assert_eq!(mebibytes("4G").unwrap(), 4096);
        assert_eq!(mebibytes("512M").unwrap(), 512);
        assert_eq!(mebibytes("768").unwrap(), 768);
        for bad in ["", "0", "G", "4T", "5000000G"] {
            assert!(mebibytes(bad).is_err(), "{bad}");
        }
    }
}
