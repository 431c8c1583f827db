//! What a guest boots in tests and demonstrations: kernels and a small initramfs.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use crate::image::{self, search_path};
use crate::initramfs::Archive;
use crate::isa::Isa;
use crate::packages::{Kernel, Module, Store};
use crate::progress::say;
use crate::vmlinux;

/// The folder of the assets inside an emulated host.
pub(crate) const FOLDER_IN_HOST: &str = "/assets";

/// The variable that tells a test where the assets are.
pub(crate) const VARIABLE: &str = "ARMLET_TEST_ASSETS";

/// Debian's programs for the other ends of devices, for tests of them, and the peer to compare with.
const TOOLS: [&str; 18] = [
    "dash",
    "e2fsprogs",
    "ethtool",
    "fio",
    "git",
    "iperf3",
    "iproute2",
    "kexec-tools",
    "libc6-dev",
    "make",
    "openssh-client",
    "passt",
    "qemu-system-arm",
    "qemu-utils",
    "socat",
    "strace",
    "tcc",
    "virtiofsd",
];

/// The peer, which is for ARM64 alone.
const PEER: &str = "qemu-system-arm";

/// The size of the disk that they lie on.
const TOOLS_MIB: u32 = 1024;

/// The size of the disk with a whole system: its image may fill up.
const DATA_MIB: u32 = 6144;

/// Prints the marker first, then does what `armlet.run=` on the kernel's command line says.
const GUEST_INIT: &str = r#"#!/bin/busybox sh
/bin/busybox mount -t proc proc /proc
read -r up rest </proc/uptime
echo "GUEST-MARKER $up"

/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
/bin/busybox --install -s /bin
export PATH=/bin HOME=/root PS1='guest# '
mkdir -p /dev/pts /tmp /run
mount -t devpts devpts /dev/pts
mount -t tmpfs tmpfs /tmp
mount -t tmpfs tmpfs /run
hostname guest
for module in /devices/*.ko; do
    [ -e "$module" ] && insmod "$module"
done

# Ends the output: no word of the kernel about powering off, and nothing left in the terminal,
# whose settings change only after that.
drained() {
    echo 0 >/proc/sys/kernel/printk
    stty sane </dev/console >/dev/console 2>&1
}

run=shell
for word in $(cat /proc/cmdline); do
    case "$word" in armlet.run=*) run=${word#armlet.run=} ;; esac
done
case "$run" in
    poweroff) ;;
    reboot) drained; reboot -f ;;
    crash) echo c >/proc/sysrq-trigger ;;
    hold) while :; do sleep 3600; done ;;
    script)
        printf '\036ARMLET-SCRIPT-START\n'
        sh /script </dev/null
        printf '\036ARMLET-SCRIPT-EXIT %d\n' $?
        ;;
    powerkey) sh /powerkey.sh ;;
    shell)
        echo "Linux $(uname -r) on $(nproc) CPUs. 'exit' powers the guest off, Ctrl-A x leaves armlet."
        setsid cttyhack sh
        ;;
    *) echo "unknown armlet.run=$run" ;;
esac
drained
poweroff -f
"#;

/// Waits for the power key and powers off, as a distribution's logind does.
const POWER_KEY: &str = r#"for module in /modules/*; do insmod $module; done
tries=0
until [ -e /dev/input/event0 ]; do
    tries=$((tries + 1))
    if [ "$tries" -gt 100 ]; then echo POWERKEY-MISSING; return 1; fi
    sleep 0.1
done
echo POWERKEY-READY
# One input event of 64-bit Linux has 24 bytes (struct input_event).
head -c 24 /dev/input/event0 >/dev/null
echo POWERKEY-PRESSED
"#;

/// The drivers of virtio devices, and what lets guests use them.
const DEVICES: [&str; 10] = [
    "virtio_mmio",
    "virtio_blk",
    "virtio_net",
    "virtio_console",
    "virtio_balloon",
    "virtio_pmem",
    "nd_pmem",
    "virtiofs",
    "vmw_vsock_virtio_transport",
    "virtio_rng",
];

/// Which assets are wanted: an emulated host has to hold them in its memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    /// The standard guest: [`kernel`] and `initrd`.
    Standard,
    /// Also the other kernels and archives of [`names`].
    All,
}

impl Choice {
    /// Returns what `ARMLET_RIG_ASSETS` asks for; everything unless it says `default`.
    pub(crate) fn from_environment() -> Result<Self> {
        match std::env::var("ARMLET_RIG_ASSETS").as_deref() {
            Err(_) | Ok("all") => Ok(Self::All),
            Ok("default") => Ok(Self::Standard),
            Ok(other) => anyhow::bail!("ARMLET_RIG_ASSETS is {other:?}; it may be all or default"),
        }
    }
}

/// Makes the folder of assets in the cache, fetching what is missing, and gives its path.
pub(crate) fn prepare(store: &Store, isa: Isa, choice: Choice) -> Result<PathBuf> {
    let folder = match isa {
        Isa::Arm64 => store.assets(),
        Isa::X86 => store.assets().join(isa.name()),
    };
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {folder:?}"))?;
    let image = store.kernel(standard(isa))?.image;
    link(&image, &folder.join(kernel(isa)))?;
    replace(&folder.join("initrd"), &guest_initrd(&store.busybox(isa)?)?)?;
    match (choice, isa) {
        (Choice::Standard, _) => {}
        (Choice::All, Isa::Arm64) => prepare_arm64(store, &folder)?,
        (Choice::All, Isa::X86) => prepare_x86(store, &folder)?,
    }
    Ok(folder)
}

fn prepare_x86(store: &Store, folder: &Path) -> Result<()> {
    let old = store.kernel(Kernel::V6_1X86)?;
    link(&old.image, &folder.join("bzImage-6.1"))?;
    for (packed, name) in [("bzImage", "vmlinux"), ("bzImage-6.1", "vmlinux-6.1")] {
        // The link changes when another kernel is taken.
        let packed = fs::read_link(folder.join(packed)).context("no kernel")?;
        derive(folder, name, &packed, vmlinux::unpack)?;
    }
    let modules = old.modules(&["evdev", "button"])?;
    replace(&folder.join("powerkey.cpio"), &power_key(&modules)?)?;
    let usual = store.kernel(standard(Isa::X86))?;
    // No cloud kernel of x86_64 has a file system for disks in it, and 6.1 has not this transport.
    for (kernel, name, others) in [
        (usual, "devices.cpio", &["ext4"] as &[&str]),
        (old, "devices-6.1.cpio", &["ext4", "virtio_pci"]),
    ] {
        let drivers = [&DEVICES, others].concat();
        replace(&folder.join(name), &devices(&kernel.modules(&drivers)?)?)?;
    }
    Ok(())
}

fn prepare_arm64(store: &Store, folder: &Path) -> Result<()> {
    let generic = store.kernel(Kernel::V6_12)?;
    link(&generic.image, &folder.join("Image-generic"))?;
    let large = store.kernel(Kernel::V6_12Pages16K)?;
    link(&large.image, &folder.join("Image-16k"))?;
    let usual = store.kernel(Kernel::V6_12Cloud)?;
    for (kernel, name) in [(usual, "devices.cpio"), (large, "devices-16k.cpio")] {
        replace(&folder.join(name), &devices(&kernel.modules(&DEVICES)?)?)?;
    }
    link(
        &store.kernel(Kernel::V6_1)?.image,
        &folder.join("Image-6.1"),
    )?;
    // Every emulated host has it in memory, so it is packed.
    let newest = store.kernel(Kernel::V7_3)?.image;
    derive(folder, "Image-7.3.gz", &newest, gzip)?;
    let modules = generic.modules(&["evdev", "gpio_keys"])?;
    replace(&folder.join("powerkey.cpio"), &power_key(&modules)?)
}

/// Returns the kernel that guests usually run.
pub(crate) fn standard(isa: Isa) -> Kernel {
    match isa {
        Isa::Arm64 => Kernel::V6_12Cloud,
        Isa::X86 => Kernel::V6_12X86,
    }
}

/// Returns the name of its file among the assets.
pub(crate) fn kernel(isa: Isa) -> &'static str {
    match isa {
        Isa::Arm64 => "Image",
        Isa::X86 => "bzImage",
    }
}

/// Returns the names of the assets that `choice` means.
pub(crate) fn names(isa: Isa, choice: Choice) -> &'static [&'static str] {
    match (isa, choice) {
        (Isa::Arm64, Choice::Standard) => &["Image", "initrd"],
        (Isa::X86, Choice::Standard) => &["bzImage", "initrd"],
        (Isa::X86, Choice::All) => &[
            "bzImage",
            "initrd",
            "bzImage-6.1",
            "vmlinux",
            "vmlinux-6.1",
            "powerkey.cpio",
            "devices.cpio",
            "devices-6.1.cpio",
        ],
        (Isa::Arm64, Choice::All) => &[
            "Image",
            "initrd",
            "Image-6.1",
            "Image-7.3.gz",
            "Image-16k",
            "Image-generic",
            "powerkey.cpio",
            "devices.cpio",
            "devices-16k.cpio",
        ],
    }
}

/// Returns an archive that, appended to the guest's initramfs, gives it `script` to run.
pub(crate) fn script(script: &str) -> Result<Vec<u8>> {
    let mut archive = Archive::new(Vec::new());
    archive.file("/script", 0o755, script.as_bytes())?;
    archive.finish()
}

/// Returns the image of a read-only file system with Debian's programs for devices, for hosts and
/// guests.
pub(crate) fn tools(store: &Store, isa: Isa) -> Result<PathBuf> {
    let folder = match isa {
        Isa::Arm64 => store.programs(isa, "tools", &TOOLS)?,
        Isa::X86 => {
            let names = TOOLS.iter().filter(|name| **name != PEER);
            let names = names.copied().collect::<Vec<_>>();
            store.programs(isa, "tools-x86_64", &names)?
        }
    };
    let name = folder.file_name().context("a folder has a name")?;
    let image = store.assets().join(name).with_extension("img");
    if image.is_file() {
        return Ok(image);
    }
    let _lock = store.lock_for("lock-tools", "makes a disk")?;
    if !image.is_file() {
        say("making a disk of Debian's programs for the rig");
        let unfinished = beside(&image);
        ext4(&folder, &unfinished, TOOLS_MIB)?;
        fs::rename(&unfinished, &image).with_context(|| format!("cannot make {image:?}"))?;
    }
    Ok(image)
}

/// Returns the image of a file system with a whole system on disk images, and what it boots from:
/// those of [`image::BUILT`] and `root.qcow2`.
pub(crate) fn system(store: &Store) -> Result<PathBuf> {
    let built = image::build(store, &image::Recipe::default())?;
    let disk = built.join("data.img");
    if disk.is_file() {
        return Ok(disk);
    }
    let _lock = store.lock_for("lock-tools", "makes a disk")?;
    if !disk.is_file() {
        say("making a disk with a Debian system for the rig");
        let folder = built.join("data");
        fs::create_dir_all(&folder).with_context(|| format!("cannot create {folder:?}"))?;
        for name in image::BUILT {
            image::copy(&built.join(name), &folder.join(name))?;
        }
        store.convert_to_qcow2(&built.join(image::BUILT[0]), &folder.join("root.qcow2"))?;
        let unfinished = beside(&disk);
        ext4(&folder, &unfinished, DATA_MIB)?;
        fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {folder:?}"))?;
        fs::rename(&unfinished, &disk).with_context(|| format!("cannot make {disk:?}"))?;
    }
    Ok(disk)
}

/// Makes an ext4 file system of `size_mib` MiB that holds what is in `folder`.
pub(crate) fn ext4(folder: &Path, image: &Path, size_mib: u32) -> Result<()> {
    let mut command = Command::new("mke2fs");
    command
        .env("PATH", search_path())
        .args(["-q", "-F", "-t", "ext4", "-b", "4096", "-m", "0"])
        .args(["-E", "root_owner=0:0,lazy_itable_init=1", "-d"])
        .args([folder, image])
        .arg(format!("{size_mib}M"));
    let output = command
        .output()
        .context("cannot run mke2fs (package e2fsprogs)")?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "mke2fs: {}", complaint.trim());
    Ok(())
}

fn guest_initrd(busybox: &Path) -> Result<Vec<u8>> {
    let mut archive = Archive::new(Vec::new());
    for folder in ["/dev", "/proc", "/sys", "/root"] {
        archive.folder(folder)?;
    }
    // The kernel opens this as the init's terminal before /dev is mounted.
    archive.device("/dev/console", 0o600, (5, 1))?;
    archive.file_from("/bin/busybox", 0o755, busybox)?;
    // Scripts name their interpreter in either folder.
    archive.symlink("/usr/bin", "/bin")?;
    archive.file("/init", 0o755, GUEST_INIT.as_bytes())?;
    archive.finish()
}

fn power_key(modules: &[Module]) -> Result<Vec<u8>> {
    let mut archive = Archive::new(Vec::new());
    archive.file("/powerkey.sh", 0o755, POWER_KEY.as_bytes())?;
    for module in modules {
        archive.file(format!("/modules/{}.ko", module.name), 0o644, &module.data)?;
    }
    archive.finish()
}

/// Returns an archive whose modules the guest's init loads in the order of names.
pub(crate) fn devices(modules: &[Module]) -> Result<Vec<u8>> {
    let mut archive = Archive::new(Vec::new());
    for (index, module) in modules.iter().enumerate() {
        let path = format!("/devices/{index:02}-{}.ko", module.name);
        archive.file(path, 0o644, &module.data)?;
    }
    archive.finish()
}

/// Points `link` to `target`, whole at every moment for others that use the folder.
fn link(target: &Path, link: &Path) -> Result<()> {
    if fs::read_link(link).is_ok_and(|current| current == target) {
        return Ok(());
    }
    let new = beside(link);
    let _ = fs::remove_file(&new);
    std::os::unix::fs::symlink(target, &new).with_context(|| format!("cannot make {new:?}"))?;
    fs::rename(&new, link).with_context(|| format!("cannot make {link:?}"))
}

/// Gives `path` the contents `data`, whole at every moment for others that use the folder.
fn replace(path: &Path, data: &[u8]) -> Result<()> {
    if fs::read(path).is_ok_and(|current| current == data) {
        return Ok(());
    }
    let new = beside(path);
    fs::write(&new, data).with_context(|| format!("cannot write {new:?}"))?;
    fs::rename(&new, path).with_context(|| format!("cannot make {path:?}"))
}

/// Makes the file `name` in `folder` from the kernel `from` by `make`, unless it was made of that
/// kernel already.
fn derive(
    folder: &Path,
    name: &str,
    from: &Path,
    make: impl Fn(&Path) -> Result<Vec<u8>>,
) -> Result<()> {
    let to = folder.join(name);
    let made_of = folder.join(format!(".{name}-of"));
    let now = from.to_string_lossy();
    if to.is_file() && fs::read_to_string(&made_of).is_ok_and(|before| before == now) {
        return Ok(());
    }
    replace(&to, &make(from)?)?;
    replace(&made_of, now.as_bytes())
}

fn gzip(path: &Path) -> Result<Vec<u8>> {
    let output = Command::new("gzip").arg("-c").arg(path).output();
    let output = output.context("cannot run gzip")?;
    ensure!(output.status.success(), "gzip cannot pack {path:?}");
    Ok(output.stdout)
}

fn beside(path: &Path) -> PathBuf {
    path.with_extension(format!("new-{}", std::process::id()))
}
