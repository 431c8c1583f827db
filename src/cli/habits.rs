//! Options of other VMMs, and what stands for each here, with the value that the user gave.

use armlet_arch::size::parse_memory;
use armlet_arch::words::{cpus_in, part, size_in};
use armlet_backends::habits::rewrite;
use armlet_backends::kind::Guest;
use armlet_backends::open::KINDS;

/// What stands for an option of another VMM.
enum Here {
    /// This option with the same value; beside it what stands for a value that is not given.
    Option(&'static str, &'static str),
    /// This device, with the value as the option takes it; beside it what is said where the value cannot
    /// be rewritten.
    Device(&'static str, &'static str),
    /// A text that hangs on the value, which may be empty.
    Of(fn(&str) -> String),
    /// A text.
    Text(&'static str),
}

use Here::{Device, Of, Option as As, Text};

const NO_DISPLAY: &str = "leave it out: a guest has no display, its console is this terminal";
const DISK: &str = "use --disk path=IMG, with format=qcow2 for such an image";
const NET: &str = "use --net user, or --net tap=NAME";
const SHARE: &str = "use --share tag=T,path=DIR";
const NO_FIRMWARE: &str =
    "use --kernel IMAGE: there is no firmware, the kernel is started directly";

/// The longest value that is shown beside its option.
pub(super) const SHOWN: usize = 80;

/// Options of QEMU, kvmtool, Firecracker, Cloud Hypervisor and crosvm, without their dashes.
const ELSEWHERE: &[(&[&str], Here)] = &[
    (
        &[
            "append",
            "params",
            "boot-args",
            "command-line",
            "kernel-cmdline",
        ],
        As("--cmdline", "STR"),
    ),
    (&["initramfs"], As("--initrd", "PATH")),
    (&["smp", "vcpus", "vcpu-count"], Of(cpus)),
    (&["mem", "ram", "mem-size"], Of(memory)),
    (&["drive", "blockdev"], Of(drive)),
    (
        &[
            "block", "rwdisk", "hda", "hdb", "hdc", "sda", "root", "rwroot",
        ],
        Device("disk", DISK),
    ),
    (&["cdrom"], Of(|value| path("--disk", value, ",readonly"))),
    (&["netdev", "nic", "network"], Device("net", NET)),
    (&["net"], Of(net)),
    (
        &["tap", "tap-name"],
        Of(|value| after("--net tap=", value, "NAME")),
    ),
    (
        &["guest-mac"],
        Of(|value| after("--net user,mac=", value, "MAC")),
    ),
    (&["machine", "M"], Of(machine)),
    (&["cpu"], Of(cpu)),
    (
        &["enable-kvm", "accel"],
        Text("leave it out: a guest always runs on KVM"),
    ),
    (
        &["nographic", "curses", "tty"],
        Text("leave it out: the guest's console is this terminal"),
    ),
    (
        &["display", "vga", "vnc", "spice", "sdl", "gtk"],
        Text(NO_DISPLAY),
    ),
    (
        &["serial", "chardev"],
        Text("leave it out: the serial console is this terminal; --console virtio makes it hvc0"),
    ),
    (
        &["api-sock"],
        Text("'armlet api' serves Firecracker's API, with these options"),
    ),
    (
        &["monitor", "mon", "qmp", "api-socket"],
        Of(|value| {
            let socket = value.rsplit(':').next().unwrap_or_default();
            let socket = socket.split(',').next().unwrap_or_default();
            let ours = after("--control ", socket.trim_start_matches("path="), "PATH");
            format!("{ours}, and 'armlet ctl'")
        }),
    ),
    (
        &["no-api", "config-file"],
        Text("'armlet api' takes it; with 'armlet run' a guest is described by options"),
    ),
    (
        &["daemonize", "pidfile"],
        Text(
            "leave it out: armlet stays in the foreground; armlet@.service makes a service of it, and 'armlet jail' can start it in the background",
        ),
    ),
    (&["no-reboot"], Text("use --on-reset exit")),
    (
        &["no-shutdown"],
        Text("leave it out: armlet ends when the guest powers off"),
    ),
    (
        &["dumpdtb"],
        Of(|value| {
            let ours = after("--dump-dtb ", value, "PATH");
            format!("{ours} with 'run', or --dtb with 'plan'")
        }),
    ),
    (
        &["dtb"],
        Text("leave it out: armlet makes the device tree, and --dump-dtb writes it to a file"),
    ),
    (&["bios", "firmware", "pflash", "flash"], Text(NO_FIRMWARE)),
    (&["device", "object"], Of(device)),
    (&["virtfs", "fsdev", "fs"], Device("share", SHARE)),
    (&["9p", "shared-dir"], Of(folder)),
    (
        &["mem-path", "hugetlbfs"],
        Text("use --hugepages SIZE, for pages of the pool in hugetlbfs"),
    ),
    (&["mem-prealloc"], Text("use --prefault")),
    (&["overcommit"], Text("use --mlock")),
    (&["nvdimm"], Of(|value| path("--pmem", value, ""))),
    (
        &["cid", "guest-cid"],
        Of(|value| after("--vsock cid=", value, "N")),
    ),
    (
        &["irqchip"],
        Of(|value| {
            let version = value.trim_start_matches("gicv");
            after("--gic ", version.get(..1).unwrap_or_default(), "VERSION")
        }),
    ),
    (
        &["affinity", "cpu-affinity", "vcpu-affinity"],
        As("--pin", "LIST"),
    ),
    (
        &["pvtime", "no-pvtime"],
        Text("use --pv steal-time=on or --pv steal-time=off"),
    ),
    (
        &["snapshot"],
        Text(
            "make an overlay: 'qemu-img create -f qcow2 -b BASE -F raw NEW', and --disk path=NEW,format=qcow2,backing=BASE",
        ),
    ),
    (
        &["restore", "incoming", "loadvm"],
        Text("leave it out: there are no snapshots of guests"),
    ),
    (&["s", "S"], Text("use --gdb tcp:127.0.0.1:1234")),
    (&["gdb"], Of(debugger)),
    (&["usb", "usbdevice"], Text("leave it out: there is no USB")),
    (&["watchdog"], Text("leave it out: there is no watchdog")),
    (
        &["name", "uuid", "id"],
        Text(
            "leave it out: a guest has no name; a disk's serial number is --disk path=IMG,id=SERIAL",
        ),
    ),
    (
        &["rtc"],
        Text("leave it out: the guest's clock is the host's, in UTC"),
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
        Text("use --verbose; messages go to standard error"),
    ),
    (
        &["seccomp", "seccomp-filter", "seccomp-policy-dir"],
        Text("leave it out: armlet confines itself, as --sandbox says"),
    ),
    (
        &["no-seccomp", "disable-sandbox"],
        Text("use --sandbox off"),
    ),
    (
        &["nodefaults", "no-user-config"],
        Text("leave it out: a guest gets the devices asked for"),
    ),
    (
        &["no-balloon"],
        Text("leave it out: without --balloon there is none"),
    ),
    (
        &["kaslr-seed"],
        Text("leave it out: seeds are fresh unless --deterministic"),
    ),
];

/// Returns what stands for the option `bare` of another VMM, with its value if that is known.
pub(super) fn instead(bare: &str, value: Option<&str>) -> Option<String> {
    let elsewhere = ELSEWHERE.iter().find(|(names, _)| names.contains(&bare));
    let (_, here) = elsewhere?;
    let given = value.unwrap_or_default();
    Some(match here {
        As(option, placeholder) => used(option, Some(value.unwrap_or(placeholder))),
        Device(name, otherwise) => {
            let ours = rewritten(name, given);
            ours.map_or_else(
                || (*otherwise).to_owned(),
                |ours| after(&format!("--{name} "), &ours, ""),
            )
        }
        Of(answer) => answer(given),
        Text(text) => (*text).to_owned(),
    })
}

/// Advises to use `option`, with this value.
pub(super) fn used(option: &str, value: Option<&str>) -> String {
    match value {
        Some(value) if value.len() <= SHOWN => {
            format!("use {option} {}", quoted(value))
        }
        _ => format!("use {option}"),
    }
}

/// Quotes a word for a shell, where it needs that.
fn quoted(text: &str) -> String {
    let is_plain = |c: char| c.is_ascii_alphanumeric() || "-_=+:,./@%[]".contains(c);
    match !text.is_empty() && text.chars().all(is_plain) {
        true => text.to_owned(),
        false => format!("'{}'", text.replace('\'', r"'\''")),
    }
}

/// Advises to use what `option` begins, with `value` or with what stands for one.
fn after(option: &str, value: &str, otherwise: &str) -> String {
    let value = if value.is_empty() { otherwise } else { value };
    let (name, first) = option.split_once(' ').unwrap_or((option, ""));
    used(name, Some(&format!("{first}{value}")))
}

fn path(option: &str, value: &str, more: &str) -> String {
    let value = if value.is_empty() { "IMG" } else { value };
    used(
        option,
        Some(&format!("path={}{more}", value.replace(',', ",,"))),
    )
}

/// The value of a device's option of another VMM as ours; a value that is ours already stays.
fn rewritten(name: &str, text: &str) -> Option<String> {
    // What a device is checked against is not known yet.
    let guest = Guest {
        memory: u64::MAX,
        parse_size: parse_memory,
        show_size: armlet_arch::size::show_size,
    };
    let kind = KINDS.iter().find(|kind| kind.name == name)?;
    rewrite(kind, text, &guest).or_else(|| {
        let is_ours = !text.is_empty() && (kind.parse)(text, &guest).is_ok();
        is_ours.then(|| text.to_owned())
    })
}

fn cpus(value: &str) -> String {
    after("--cpus ", cpus_in(value).unwrap_or_default(), "N")
}

/// A number alone means MiB elsewhere.
fn memory(value: &str) -> String {
    let size = size_in(value);
    let unit = if size.parse::<u64>().is_ok() { "M" } else { "" };
    after("--memory ", &format!("{size}{unit}"), "SIZE")
}

fn drive(value: &str) -> String {
    // Its id is what a -device refers to it by.
    let parts = value.split(',').filter(|part| !part.starts_with("id="));
    let value: Vec<&str> = parts.collect();
    match rewritten("disk", &value.join(",")) {
        Some(ours) => after("--disk ", &ours, ""),
        None => DISK.to_owned(),
    }
}

fn net(value: &str) -> String {
    if value == "none" || value.starts_with("nic") {
        return "leave it out: --net user, or --net tap=NAME, makes the card".to_owned();
    }
    match rewritten("net", value) {
        Some(ours) => after("--net ", &ours, ""),
        None => NET.to_owned(),
    }
}

fn machine(value: &str) -> String {
    let first = value.split(',').next().unwrap_or_default();
    let name = part(value, "type").unwrap_or(first);
    let board = match name {
        "virt" => "virt",
        "q35" | "pc" | "microvm" => "pc",
        "raspi4b" => "rpi4",
        "none" | "" => "NAME",
        name if name.starts_with("pc-") => "pc",
        name if name.starts_with("virt-") => "virt",
        _ => "NAME",
    };
    match part(value, "gic-version") {
        Some("2" | "3") => {
            let version = part(value, "gic-version").unwrap_or_default();
            format!("use --board {board} --gic {version}")
        }
        _ => format!("use --board {board}"),
    }
}

fn cpu(value: &str) -> String {
    if cpus_in(value).is_some() {
        return cpus(value);
    }
    let hidden: Vec<String> = ["pmu", "sve", "pauth"]
        .into_iter()
        .filter(|name| part(value, name) == Some("off"))
        .map(|name| format!("--{name} off"))
        .collect();
    match hidden.is_empty() {
        true => {
            "leave it out: a guest has the host's CPU, of which --pmu, --sve and --pauth hide parts"
                .to_owned()
        }
        false => format!("use {}", hidden.join(" ")),
    }
}

/// QEMU's devices, of which some hang on a `-drive` or `-netdev`.
fn device(value: &str) -> String {
    let name = value.split(',').next().unwrap_or_default();
    let is = |words: &[&str]| words.iter().any(|word| name.contains(word));
    let id = part(value, "serial").map(|id| format!(",id={id}"));
    if is(&["blk", "scsi", "ide-", "nvme", "usb-storage"]) {
        let id = id.unwrap_or_default();
        return format!("use --disk path=IMG{id}, in place of the drive, too");
    }
    if is(&["net", "e1000", "rtl8139"]) {
        let mac = part(value, "mac").map(|mac| format!(",mac={mac}"));
        let mac = mac.unwrap_or_default();
        return format!("use --net user{mac}, or --net tap=NAME{mac}, in place of the netdev, too");
    }
    if is(&["vsock"]) {
        return after(
            "--vsock cid=",
            part(value, "guest-cid").unwrap_or_default(),
            "N",
        );
    }
    if is(&["-fs", "9p"]) {
        let tag = part(value, "tag").or_else(|| part(value, "mount_tag"));
        return format!("use --share tag={},path=DIR", tag.unwrap_or("T"));
    }
    let text = match name {
        name if name.contains("rng") => "leave it out: a guest has one, unless --rng off",
        name if name.contains("balloon") => "use --balloon on",
        name if name.contains("console") || name.contains("serial") => "use --console virtio",
        name if name.contains("pmem") || name.contains("nvdimm") => "use --pmem path=IMG",
        name if name.contains("memory-backend-file") => "use --pmem path=IMG, or --hugepages SIZE",
        name if name.contains("memory-backend") => {
            "leave it out: memory is shared where a device needs that"
        }
        name if name.contains("gpu") || name.contains("vga") || name.contains("ramfb") => {
            NO_DISPLAY
        }
        name if name.contains("usb") || name.contains("xhci") => "leave it out: there is no USB",
        name if name.contains("vfio") => "leave it out: devices of the host are not passed through",
        name if name.contains("pvpanic") => "leave it out: --on-panic says what a panic leads to",
        name if name.contains("pci") => "leave it out: there is no PCI, devices are on virtio-mmio",
        _ => "use --disk, --net, --share, --pmem, --vsock, --balloon or --rng",
    };
    text.to_owned()
}

/// QEMU's `tcp::1234`, or crosvm's and Cloud Hypervisor's port and path.
fn debugger(value: &str) -> String {
    let path = part(value, "path").unwrap_or(value);
    match value {
        "" => "use --gdb unix:PATH".to_owned(),
        port if port.bytes().all(|byte| byte.is_ascii_digit()) => {
            used("--gdb", Some(&format!("tcp:127.0.0.1:{port}")))
        }
        address if address.starts_with("tcp:") => used("--gdb", Some(address)),
        _ => used("--gdb", Some(&format!("unix:{path}"))),
    }
}

/// kvmtool's `DIR,TAG` and crosvm's `DIR:TAG:type=fs`.
fn folder(value: &str) -> String {
    let mut parts = value.split([',', ':']).filter(|part| !part.is_empty());
    match (parts.next(), parts.next()) {
        (Some(folder), tag) if !folder.contains('=') => {
            let tag = tag.filter(|tag| !tag.contains('=')).unwrap_or("T");
            used("--share", Some(&format!("tag={tag},path={folder}")))
        }
        _ => SHARE.to_owned(),
    }
}

/// Every option that an answer names.
#[cfg(test)]
pub(super) fn advised() -> Vec<String> {
    let values = [
        "",
        "4",
        "user",
        "file=x",
        "virt,gic-version=3",
        "host,pmu=off",
        "virtio-blk",
        "virtio-net",
        "vsock",
        "virtio-9p",
        "rng",
        "balloon",
        "console",
        "pmem",
        "pvpanic",
        "memory-backend-file",
        "nic",
        "dir:tag",
    ];
    let answers = ELSEWHERE.iter().flat_map(|(names, _)| {
        let name = names[0];
        values
            .iter()
            .filter_map(move |value| instead(name, Some(*value)))
    });
    let texts: Vec<String> = answers.collect();
    let words = texts
        .iter()
        .flat_map(|text| text.split([' ', ',', ';', ':']));
    // 'plan' has --dtb.
    words
        .filter(|word| word.starts_with("--") && *word != "--dtb")
        .map(str::to_owned)
        .collect()
}
