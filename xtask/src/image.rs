//! `cargo xtask image`: a whole Debian system on a disk image, made from packages.
//!
//! The packages are installed where they belong, in an emulated ARM64 machine: that needs no rights
//! on this one, no interpreter for foreign programs and no loop device, and the same happens
//! everywhere. What was built once is found again in the cache folder.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use argh::FromArgs;

use crate::host::{self, Ended, HostFile, HostSpec, Job};
use crate::isa::Isa;
use crate::packages::{Kernel, Store, System, digest, uncompressed};
use crate::progress::say;

/// To be raised when what is built from the same packages changes.
const RECIPE: u32 = 1;

/// What the system has beside the packages that each has (those of priority "required").
const PACKAGES: [&str; 19] = [
    "apt",
    "bash-completion",
    "dbus",
    "e2fsprogs",
    "ethtool",
    "initramfs-tools",
    "iproute2",
    "iputils-ping",
    "kmod",
    "less",
    "libnss-resolve",
    "libpam-systemd",
    "openssh-server",
    "procps",
    "sudo",
    "systemd-resolved",
    "systemd-sysv",
    "udev",
    "zstd",
];

/// The identity of the file system, the same for every image: guests find it by `/dev/vda` or by
/// its label.
const UUID: &str = "3fd3a7f0-5b6e-4b3c-9d9e-61726d6c6574";
const LABEL: &str = "armlet-root";

/// How long the installation may take, on a machine that others use too.
const LIMIT: Duration = Duration::from_secs(3600);

const INSTALL: &str = include_str!("image/install.sh");

/// Our own files in the system: path and contents.
const FILES: [(&str, &str); 7] = [
    // Packing as tightly as Debian does takes an emulated machine minutes. The root's type cannot be
    // found out where the system is made.
    (
        "etc/initramfs-tools/conf.d/image",
        "MODULES=most\nCOMPRESS=zstd\nCOMPRESSLEVEL=1\nFSTYPE=ext4\n",
    ),
    (
        "etc/fstab",
        "LABEL=armlet-root / ext4 defaults,errors=remount-ro 0 1\n",
    ),
    ("etc/hosts", "127.0.0.1 localhost armlet\n::1 localhost\n"),
    (
        "etc/systemd/network/80-dhcp.network",
        "[Match]\nType=ether\n\n[Network]\nDHCP=yes\nIPv6AcceptRA=yes\n",
    ),
    // A console that is not there must not be waited for, so the device itself asks for its login.
    (
        "etc/udev/rules.d/99-consoles.rules",
        "SUBSYSTEM==\"tty\", KERNEL==\"ttyAMA0|hvc0\", TAG+=\"systemd\", \
         ENV{SYSTEMD_WANTS}+=\"serial-getty@%k.service\"\n",
    ),
    (
        "etc/ssh/sshd_config.d/keys-only.conf",
        "PasswordAuthentication no\nHostKey /etc/ssh/ssh_host_ed25519_key\n",
    ),
    ("etc/sudoers.d/armlet", "armlet ALL=(ALL) NOPASSWD: ALL\n"),
];

/// Make the disk image of a whole Debian system, with the kernel and initramfs to boot it.
///
/// Fetches the packages and installs them in an emulated ARM64 machine, with no rights on this one.
/// Beside the image come vmlinuz, initrd.img, the key id_ed25519 by which the user "armlet" logs in
/// over ssh (on a console the password is "armlet"), and known_hosts. It takes minutes the first
/// time; the same image is then found in the cache.
#[derive(Debug, FromArgs)]
#[argh(subcommand, name = "image")]
pub(crate) struct Image {
    /// where to write the image (default root.img)
    #[argh(option, default = "PathBuf::from(\"root.img\")")]
    output: PathBuf,

    /// the size of the disk, such as 2G (the default)
    #[argh(option, default = "String::from(\"2G\")")]
    size: String,

    /// raw (the default) or qcow2
    #[argh(option, default = "Format::Raw")]
    format: Format,

    /// the kernel: generic (the default), which has the power key's driver, or cloud, which is a
    /// third of its size
    #[argh(option, default = "Flavour::Generic")]
    kernel: Flavour,

    /// install these packages too, separated by commas
    #[argh(option)]
    include: Option<String>,

    /// look for newer packages
    #[argh(switch)]
    refresh: bool,
}

/// The format of a disk image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    Raw,
    Qcow2,
}

impl argh::FromArgValue for Format {
    fn from_arg_value(value: &str) -> Result<Self, String> {
        match value {
            "raw" => Ok(Self::Raw),
            "qcow2" => Ok(Self::Qcow2),
            _ => Err(format!("{value:?} is no format; there are raw and qcow2")),
        }
    }
}

/// Which of Debian's kernels a system has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Flavour {
    /// Every driver.
    Generic,
    /// Those for virtual machines.
    Cloud,
}

impl argh::FromArgValue for Flavour {
    fn from_arg_value(value: &str) -> Result<Self, String> {
        match value {
            "generic" => Ok(Self::Generic),
            "cloud" => Ok(Self::Cloud),
            _ => Err(format!(
                "{value:?} is no kernel; there are generic and cloud"
            )),
        }
    }
}

impl Flavour {
    fn package(self) -> &'static str {
        match self {
            Self::Generic => "linux-image-arm64",
            Self::Cloud => "linux-image-cloud-arm64",
        }
    }
}

/// What a system is made of.
#[derive(Clone, Debug)]
pub(crate) struct Recipe {
    /// The size of its disk in MiB.
    pub(crate) size_mib: u32,
    /// Its kernel.
    pub(crate) kernel: Flavour,
    /// Packages beyond the usual.
    pub(crate) include: Vec<String>,
}

impl Default for Recipe {
    fn default() -> Self {
        Self {
            size_mib: 2048,
            kernel: Flavour::Generic,
            include: Vec::new(),
        }
    }
}

/// The names of the files that a built system consists of. The first is the raw image.
pub(crate) const BUILT: [&str; 5] = [
    "root.img",
    "vmlinuz",
    "initrd.img",
    "id_ed25519",
    "known_hosts",
];

impl Image {
    /// Builds the image, or finds it, and copies it to where it is wanted.
    pub(crate) fn run(&self) -> Result<i32> {
        let recipe = Recipe {
            size_mib: host::mebibytes(&self.size).context("--size")?,
            kernel: self.kernel,
            include: self.include.iter().flat_map(|all| words(all)).collect(),
        };
        let store = Store::open()?;
        if self.refresh {
            store.forget_systems()?;
        }
        let built = build(&store, &recipe)?;
        let folder = match self.output.parent() {
            Some(folder) if !folder.as_os_str().is_empty() => folder.to_owned(),
            _ => PathBuf::from("."),
        };
        fs::create_dir_all(&folder).with_context(|| format!("cannot create {folder:?}"))?;
        let [image, others @ ..] = BUILT;
        for name in others {
            copy(&built.join(name), &folder.join(name))?;
        }
        match self.format {
            Format::Raw => copy(&built.join(image), &self.output)?,
            Format::Qcow2 => {
                say("converting to qcow2");
                store.convert_to_qcow2(&built.join(image), &self.output)?;
            }
        }
        let output = self.output.display();
        say(&format!(
            "{output}: the user is armlet, the password on consoles armlet; ssh logs in by the key"
        ));
        println!(
            "armlet run --kernel {folder}/vmlinuz --initrd {folder}/initrd.img \\\n    \
             --cmdline 'root=/dev/vda rw console=ttyAMA0' --memory 1G \\\n    \
             --disk path={output}{format} --net user,hostfwd=tcp:2222-:22\n\
             ssh -i {folder}/id_ed25519 -o UserKnownHostsFile={folder}/known_hosts -p 2222 \
             armlet@localhost",
            folder = folder.display(),
            format = match self.format {
                Format::Raw => "",
                Format::Qcow2 => ",format=qcow2",
            }
        );
        Ok(0)
    }
}

fn words(list: &str) -> Vec<String> {
    let words = list.split(',').map(str::trim);
    words
        .filter(|word| !word.is_empty())
        .map(str::to_owned)
        .collect()
}

/// Returns the folder of the system that `recipe` describes, with the files [`BUILT`], built when
/// it is not there yet.
pub(crate) fn build(store: &Store, recipe: &Recipe) -> Result<PathBuf> {
    let mut names = PACKAGES.to_vec();
    names.push(recipe.kernel.package());
    names.extend(recipe.include.iter().map(String::as_str));
    names.sort_unstable();
    names.dedup();
    let system = store.system("system", &names)?;
    let keys = keys(store)?;

    let version = system.folder.to_string_lossy();
    let ours = FILES.map(|(path, contents)| [path, contents]).concat();
    let mut parts = vec![&*version, INSTALL];
    parts.extend(ours);
    let numbers = format!("{RECIPE} {}", recipe.size_mib);
    parts.push(&numbers);
    let folder = store
        .assets()
        .join(format!("system-{:08x}", digest(&parts)));
    if BUILT.iter().all(|name| folder.join(name).is_file()) {
        return Ok(folder);
    }
    let _lock = store.lock_for("lock-system", "installs a system")?;
    if !BUILT.iter().all(|name| folder.join(name).is_file()) {
        let unfinished = folder.with_extension("unfinished");
        let _ = fs::remove_dir_all(&unfinished);
        fs::create_dir_all(&unfinished).with_context(|| format!("cannot create {unfinished:?}"))?;
        install(store, recipe, &system, &keys, &unfinished)?;
        let _ = fs::remove_dir_all(&folder);
        fs::rename(&unfinished, &folder).with_context(|| format!("cannot make {folder:?}"))?;
    }
    Ok(folder)
}

/// Installs the packages of `system` in an emulated machine, onto a new image in `folder`.
fn install(
    store: &Store,
    recipe: &Recipe,
    system: &System,
    keys: &Path,
    folder: &Path,
) -> Result<()> {
    let started = Instant::now();
    let count = system.base.len() + system.rest.len();
    say(&format!(
        "installing {count} packages in an emulated machine"
    ));
    let scratch = folder.join("scratch");
    let mut files = Vec::new();
    let mut add = |from: PathBuf, to: String, mode| {
        files.push(HostFile {
            from,
            to: to.into(),
            mode,
        });
    };
    let mut newest = 0;
    for (kind, archives) in [("base", &system.base), ("rest", &system.rest)] {
        for archive in archives {
            let name = archive.file_name().context("a package has a name")?;
            let (plain, time) = uncompressed(archive)?;
            newest = newest.max(time);
            let from = scratch.join(kind).join(name);
            write(&from, &plain)?;
            add(from, format!("/image/{kind}/{}", name.display()), 0o644);
        }
    }
    let epoch = match std::env::var("SOURCE_DATE_EPOCH") {
        Ok(epoch) => epoch.parse().context("SOURCE_DATE_EPOCH is no number")?,
        // Not the time of this run: the same packages make the same image.
        Err(_) => newest,
    };
    let settings = format!("epoch={epoch}\nlabel={LABEL}\nuuid={UUID}\n");
    for (path, contents) in FILES {
        let from = scratch.join("files").join(path);
        write(&from, contents.as_bytes())?;
        add(from, format!("/image/files/{path}"), 0o644);
    }
    for (name, contents) in [("settings", settings.as_str()), ("install.sh", INSTALL)] {
        let from = scratch.join(name);
        write(&from, contents.as_bytes())?;
        add(from, format!("/image/{name}"), 0o755);
    }
    for (name, to) in [
        ("id_ed25519.pub", "authorized_keys"),
        ("hostkey", "hostkey"),
        ("hostkey.pub", "hostkey.pub"),
    ] {
        add(keys.join(name), format!("/image/{to}"), 0o644);
    }

    let image = folder.join(BUILT[0]);
    let file = fs::File::create(&image).with_context(|| format!("cannot create {image:?}"))?;
    file.set_len(u64::from(recipe.size_mib) << 20)
        .with_context(|| format!("cannot make {image:?} as large"))?;
    drop(file);
    let job = Job {
        files,
        command: vec!["/image/install.sh".to_owned()],
        folder: "/root".into(),
        limit: Some(LIMIT),
        disks: vec![(image.clone(), "root".to_owned())],
        ..Job::default()
    };
    // Not what ARMLET_RIG_* asks for: the image does not depend on it.
    let spec = HostSpec {
        kernel: Kernel::V6_12Cloud,
        memory_mib: 4096,
        ..HostSpec::of(Isa::Arm64)
    };
    let mut log = Log::new(count);
    let mut print = |bytes: &[u8]| {
        log.take(bytes);
        Ok(())
    };
    let ended = host::run(store, &spec, &job, Vec::new(), None, &mut print)?;
    if !matches!(ended, Ended::Exit(0)) {
        bail!("the installation failed ({ended:?})\n{}", log.end());
    }
    write(&folder.join("install.log"), log.text.as_bytes())?;

    for (name, inside) in [("vmlinuz", "/vmlinuz"), ("initrd.img", "/initrd.img")] {
        take_out(&image, inside, &folder.join(name))?;
    }
    for name in ["id_ed25519", "known_hosts"] {
        copy(&keys.join(name), &folder.join(name))?;
    }
    fs::remove_dir_all(&scratch).with_context(|| format!("cannot remove {scratch:?}"))?;
    say(&format!(
        "installed in {:.0} s",
        started.elapsed().as_secs_f32()
    ));
    Ok(())
}

/// What an installation prints, told in few lines.
struct Log {
    started: Instant,
    /// Every line with the seconds that had passed.
    text: String,
    line: Vec<u8>,
    packages: usize,
    set_up: usize,
}

impl Log {
    fn new(packages: usize) -> Self {
        Self {
            started: Instant::now(),
            text: String::new(),
            line: Vec::new(),
            packages,
            set_up: 0,
        }
    }

    fn take(&mut self, bytes: &[u8]) {
        for byte in bytes {
            if *byte != b'\n' {
                self.line.push(*byte);
                continue;
            }
            let line = String::from_utf8_lossy(&std::mem::take(&mut self.line)).into_owned();
            let seconds = self.started.elapsed().as_secs_f32();
            self.text.push_str(&format!("{seconds:7.1} {line}\n"));
            if let Some(step) = line.strip_prefix("== ") {
                say(step);
            } else if line.starts_with("Setting up ") {
                self.set_up += 1;
                if self.set_up.is_multiple_of(25) {
                    say(&format!(
                        "set up {} of {} packages",
                        self.set_up, self.packages
                    ));
                }
            }
        }
    }

    fn end(&self) -> String {
        let lines = self.text.lines().rev().take(30).collect::<Vec<_>>();
        lines
            .into_iter()
            .rev()
            .map(|line| format!("  | {line}\n"))
            .collect()
    }
}

/// Copies a file out of an ext4 image, following symbolic links.
fn take_out(image: &Path, inside: &str, to: &Path) -> Result<()> {
    let debugfs = |request: &str| {
        let output = Command::new("debugfs")
            .arg("-R")
            .arg(request)
            .arg(image)
            .env("PATH", search_path())
            .output()
            .context("cannot run debugfs (package e2fsprogs)")?;
        Ok::<_, anyhow::Error>(String::from_utf8_lossy(&output.stdout).into_owned())
    };
    let about = debugfs(&format!("stat {inside}"))?;
    let target = about
        .split_once("Fast link dest: \"")
        .and_then(|(_, rest)| rest.split_once('"'));
    let path = match target {
        Some((target, _)) => format!("/{}", target.trim_start_matches('/')),
        None => inside.to_owned(),
    };
    let _ = fs::remove_file(to);
    debugfs(&format!("dump {path} {}", to.display()))?;
    let length = fs::metadata(to).map_or(0, |about| about.len());
    ensure!(length > 0, "the image holds no {path}");
    Ok(())
}

/// Returns where programs are looked for: those for root too.
pub(crate) fn search_path() -> String {
    let path = std::env::var("PATH").unwrap_or_default();
    format!("{path}:/usr/sbin:/sbin")
}

/// Returns the folder of the keys: the user's, the system's own, and the latter as known_hosts
/// names it. They are made once for this user of this machine, so that an image can be built twice
/// alike.
fn keys(store: &Store) -> Result<PathBuf> {
    let folder = store.assets().join("keys");
    if folder.join("known_hosts").is_file() {
        return Ok(folder);
    }
    let _lock = store.lock_for("lock-keys", "makes keys")?;
    fs::create_dir_all(&folder).with_context(|| format!("cannot create {folder:?}"))?;
    for name in ["id_ed25519", "hostkey"] {
        let path = folder.join(name);
        let _ = fs::remove_file(&path);
        let output = Command::new("ssh-keygen")
            .args(["-q", "-t", "ed25519", "-N", "", "-C", "armlet-image", "-f"])
            .arg(&path)
            .output()
            .context("cannot run ssh-keygen (package openssh-client)")?;
        let complaint = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "ssh-keygen: {}", complaint.trim());
    }
    let public = folder.join("hostkey.pub");
    let public = fs::read_to_string(&public).with_context(|| format!("cannot read {public:?}"))?;
    write(
        &folder.join("known_hosts"),
        format!("* {public}").as_bytes(),
    )?;
    Ok(folder)
}

fn write(path: &Path, data: &[u8]) -> Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder).with_context(|| format!("cannot create {folder:?}"))?;
    }
    fs::write(path, data).with_context(|| format!("cannot write {path:?}"))
}

/// Copies a file with its holes and permissions.
pub(crate) fn copy(from: &Path, to: &Path) -> Result<()> {
    let output = Command::new("cp")
        .args(["--sparse=always", "--reflink=auto", "--preserve=mode"])
        .args([from, to])
        .output()
        .context("cannot run cp")?;
    let complaint = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}", complaint.trim());
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_taken_out_of_an_image_through_its_link() {
        let folder = tempfile::tempdir().unwrap();
        let tree = folder.path().join("tree");
        write(&tree.join("boot/vmlinuz-6"), b"kernel").unwrap();
        std::os::unix::fs::symlink("boot/vmlinuz-6", tree.join("vmlinuz")).unwrap();
        let image = folder.path().join("image");
        let status = Command::new("mke2fs")
            .env("PATH", search_path())
            .args(["-q", "-t", "ext4", "-d"])
            .args([&tree, &image])
            .arg("4M")
            .status();
        assert!(status.unwrap().success());
        let to = folder.path().join("vmlinuz");
        take_out(&image, "/vmlinuz", &to).unwrap();
        assert_eq!(fs::read(&to).unwrap(), b"kernel");
        let error = take_out(&image, "/nothing", &to).unwrap_err().to_string();
        assert!(error.contains("/nothing"), "{error}");
    }

    #[test]
    fn lists_of_packages_are_read() {
        assert_eq!(words("fio, git,,make"), ["fio", "git", "make"]);
    }
}
