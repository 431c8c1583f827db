//! Suggestions for options that a command does not have: the option that was probably meant.

use super::devices;
use argh::EarlyExit;
use armlet_arch::words::nearest;

/// The commands, of which the first has the most options.
pub(super) const COMMANDS: [&str; 6] = ["run", "plan", "probe", "boards", "jail", "ctl"];

/// Options of QEMU, kvmtool, Firecracker, Cloud Hypervisor and crosvm, without their dashes, and
/// what stands for them here: an option, or words.
const ELSEWHERE: &[(&[&str], &str)] = &[
    (
        &[
            "append",
            "params",
            "boot-args",
            "command-line",
            "kernel-cmdline",
        ],
        "--cmdline",
    ),
    (&["initramfs"], "--initrd"),
    (&["smp", "vcpus", "vcpu-count"], "--cpus"),
    (&["mem", "ram", "mem-size"], "--memory"),
    (
        &[
            "drive", "blockdev", "block", "rwdisk", "hda", "hdb", "sda", "root",
        ],
        "--disk path=IMG, with format=qcow2 for such an image",
    ),
    (&["cdrom"], "--disk path=IMG,readonly"),
    (
        &["netdev", "nic", "network", "tap", "tap-name"],
        "--net user, or --net tap=NAME",
    ),
    (&["guest-mac"], "--net user,mac=MAC"),
    (
        &["machine", "M"],
        "--board, and --gic for the GIC's version",
    ),
    (
        &["cpu"],
        "--cpus for their number; a guest has the host's CPU, of which --pmu, --sve and --pauth hide parts",
    ),
    (
        &["enable-kvm", "accel"],
        "leave it out: a guest always runs on KVM",
    ),
    (
        &["nographic", "curses", "tty"],
        "leave it out: the guest's console is this terminal",
    ),
    (
        &["display", "vga", "vnc", "spice", "sdl", "gtk"],
        "leave it out: a guest has no display, its console is this terminal",
    ),
    (
        &["serial", "chardev"],
        "leave it out: the serial console is this terminal; --console virtio makes it hvc0",
    ),
    (
        &[
            "monitor",
            "mon",
            "qmp",
            "api-sock",
            "api-socket",
            "no-api",
            "config-file",
        ],
        "there is no monitor and no API: give options, and signals (SIGTERM presses the power key)",
    ),
    (
        &["daemonize", "pidfile"],
        "leave it out: armlet stays in the foreground; armlet@.service makes a service of it, and 'armlet jail' can start it in the background",
    ),
    (&["no-reboot"], "--on-reset exit"),
    (
        &["no-shutdown"],
        "leave it out: armlet ends when the guest powers off",
    ),
    (&["dumpdtb"], "--dump-dtb with 'run', or --dtb with 'plan'"),
    (
        &["dtb"],
        "leave it out: armlet makes the device tree, and --dump-dtb writes it to a file",
    ),
    (
        &["bios", "firmware", "pflash", "flash"],
        "--kernel: there is no firmware, the kernel is started directly",
    ),
    (
        &["device", "object"],
        "--disk, --net, --share, --pmem, --vsock, --balloon or --rng",
    ),
    (
        &["virtfs", "fsdev", "fs", "9p", "shared-dir"],
        "--share tag=T,path=DIR",
    ),
    (
        &["mem-path", "hugetlbfs"],
        "--hugepages SIZE, for pages of the pool in hugetlbfs",
    ),
    (&["mem-prealloc"], "--prefault"),
    (&["overcommit"], "--mlock"),
    (&["nvdimm"], "--pmem path=IMG"),
    (&["cid", "guest-cid"], "--vsock cid=N"),
    (&["irqchip"], "--gic"),
    (&["affinity", "cpu-affinity"], "--pin"),
    (&["pvtime", "no-pvtime"], "--pv steal-time=on or off"),
    (
        &["snapshot"],
        "make an overlay: 'qemu-img create -f qcow2 -b BASE -F raw NEW', and --disk path=NEW,format=qcow2,backing=BASE",
    ),
    (
        &["restore", "incoming", "loadvm"],
        "leave it out: there are no snapshots of guests",
    ),
    (
        &["gdb", "s", "S"],
        "leave it out: there is no debugger's port",
    ),
    (&["usb", "usbdevice"], "leave it out: there is no USB"),
    (&["watchdog"], "leave it out: there is no watchdog"),
    (
        &["name", "uuid", "id"],
        "leave it out: a guest has no name; a disk's serial number is --disk path=IMG,id=SERIAL",
    ),
    (
        &["rtc"],
        "leave it out: the guest's clock is the host's, in UTC",
    ),
    (
        &[
            "log-path",
            "log-file",
            "log-level",
            "level",
            "loglevel",
            "debug",
        ],
        "--verbose; messages go to standard error",
    ),
    (
        &[
            "seccomp",
            "no-seccomp",
            "seccomp-filter",
            "sandbox",
            "disable-sandbox",
        ],
        "leave it out: armlet has no sandbox of its own",
    ),
    (
        &["nodefaults"],
        "leave it out: a guest gets the devices asked for",
    ),
    (
        &["no-balloon"],
        "leave it out: without --balloon there is none",
    ),
    (
        &["kaslr-seed"],
        "leave it out: seeds are fresh unless --deterministic",
    ),
];

/// Describes what is wrong with `word`, which argh rejects among `words` (the arguments after the
/// program's name).
pub(super) fn explain(word: &str, words: &[&str]) -> String {
    let command = words.first().copied().filter(|first| is_command(first));
    let help = help_of(command);
    let valid = names_in(&help);
    let list = || {
        format!(
            "Unrecognized argument: {word} (valid here: {})",
            valid.join(", ")
        )
    };
    let stray = !word.starts_with('-') || word.trim_start_matches('-').is_empty();
    if stray {
        return match command {
            None => format!(
                "'{word}' is no command; use {} (see 'armlet --help')",
                COMMANDS.join(", ")
            ),
            Some(_) if valid.contains(&"--kernel") => format!(
                "'{word}' belongs to no option; a kernel is named by --kernel, a disk by --disk"
            ),
            Some(_) => list(),
        };
    }
    let (name, value) = match word.split_once('=') {
        Some((name, value)) => (name, Some(value)),
        None => (word, None),
    };
    let Some(command) = command else {
        // 'armlet --kernel Image', as other programs take it.
        let meant = meant(name, value, &help_of(Some(COMMANDS[0])));
        let first = COMMANDS[0];
        return match meant.is_some() || is_short(name, &help_of(Some(first))) {
            true => format!("{word}: name the command first: armlet {first} {word}"),
            false => list(),
        };
    };
    if let Some(meant) = meant(name, value, &help) {
        return format!("{word}: 'armlet {command}' has no such option; {meant}");
    }
    let other = COMMANDS
        .iter()
        .find(|other| names_in(&help_of(Some(other))).contains(&name));
    match other {
        Some(other) => {
            format!("{word} is an option of 'armlet {other}', not of 'armlet {command}'")
        }
        None => list(),
    }
}

/// Suggests what to use instead of `name`, if there is a likely candidate.
fn meant(name: &str, value: Option<&str>, help: &str) -> Option<String> {
    let valid = names_in(help);
    let bare = name.trim_start_matches('-');
    let known = |bare: &str| valid.iter().find(|valid| valid[2..] == *bare);
    if let Some(known) = known(bare) {
        return Some(format!("use {known}"));
    }
    let elsewhere = ELSEWHERE.iter().find(|(names, _)| names.contains(&bare));
    if let Some((_, here)) = elsewhere.filter(|_| valid.contains(&"--kernel")) {
        let verb = if here.starts_with('-') { "use " } else { "" };
        return Some(format!("{verb}{here}"));
    }
    // '-m=1G' and '-m1G'.
    let (short, rest) = name.split_at_checked(2)?;
    if is_short(short, help) {
        match (rest, value) {
            ("", Some(value)) => return Some(format!("use {short} {value}")),
            (digits, None) if digits.starts_with(|c: char| c.is_ascii_digit()) => {
                return Some(format!("use {short} {digits}"));
            }
            _ => {}
        }
    }
    let bare_names = valid.iter().map(|valid| &valid[2..]);
    nearest(bare, bare_names)
        .filter(|(_, distance)| bare.len() > 3 && *distance <= 2)
        .map(|(nearest, _)| format!("use --{nearest}"))
}

fn is_command(word: &str) -> bool {
    COMMANDS.contains(&word)
}

/// Returns the text of `--help`, of a command or of armlet itself.
fn help_of(command: Option<&str>) -> String {
    let words: Vec<&str> = command.into_iter().chain(["--help"]).collect();
    match devices::parse(&words) {
        Err(EarlyExit { output, .. }) => output,
        Ok(_) => String::new(),
    }
}

/// Returns the long names of the options in a help text.
fn names_in(help: &str) -> Vec<&str> {
    help.lines()
        .filter_map(|line| {
            let line = line.strip_prefix("  ")?;
            let mut words = line.split_whitespace();
            let name = words.find(|word| word.starts_with("--"));
            match name.map(|name| name.trim_end_matches(',')) {
                Some(name) if line.starts_with('-') => Some(name),
                _ => None,
            }
        })
        .collect()
}

/// Returns whether a help text has the one-letter option `-m`.
fn is_short(name: &str, help: &str) -> bool {
    name.len() == 2 && help.contains(&format!("\n  {name}, --"))
}

/// Every option that an answer names.
#[cfg(test)]
pub(super) fn advised() -> Vec<&'static str> {
    let texts = ELSEWHERE
        .iter()
        .flat_map(|(_, here)| here.split([' ', ',', ';', ':']));
    // 'plan' has --dtb.
    texts
        .filter(|word| word.starts_with("--") && *word != "--dtb")
        .collect()
}
