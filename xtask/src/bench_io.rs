//! `cargo xtask bench io`: what the work of devices costs, beside what it costs the peer.
//!
//! Armlet, and QEMU from its package, run in one emulated ARM64 host that counts instructions, so
//! that the figures can be compared and do not depend on this machine. The guest keeps a device
//! busy; what is counted meanwhile is divided by the number of operations. The measuring itself is
//! [`crate::measure_io`].

mod tables;

use std::fs;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail, ensure};
use argh::FromArgs;
use serde_json::{Value, json};

use crate::assets::{self, Choice};
use crate::boot;
use crate::host::{self, Ended, HostFile, HostSpec, Job};
use crate::initramfs::Archive;
use crate::isa::Isa;
use crate::measure_io::{FIRST_OF_MANY, GUEST_ADDRESS, HOST_ADDRESS, NETWORK_OF_MANY, PORT, READY};
use crate::packages::Store;
use crate::progress::say;
use crate::rig;
use crate::vmms::Vmm;
use tables::tables;
pub(crate) use tables::text;

/// How long everything may take.
const LIMIT: Duration = Duration::from_secs(7200);

/// Measure what armlet's devices cost, beside QEMU's, in one run.
///
/// Everything runs in an emulated ARM64 host that counts instructions: a virtual nanosecond is one
/// instruction. Other VMMs are measured in the same host, and each row says who is first. A VMM is a
/// static ARM64 program with its arguments: {kernel}, {initrd}, {cmdline} (which names no console)
/// and {cpus} stand for the guest's, {disk} for a disk image, {tap} for a network interface of the
/// host; what uses neither is measured at its console.
///
/// cargo xtask bench io --only disk --vmm "lkvm=/tmp/lkvm run -k {kernel} -i {initrd} -c {cpus}
/// -m 256 -d {disk} -p 'console=ttyS0 {cmdline}'"
#[derive(Debug, FromArgs)]
#[argh(subcommand, name = "io")]
pub(crate) struct BenchIo {
    /// print every figure of every run as JSON
    #[argh(switch)]
    json: bool,

    /// how many VMs are measured for each row (default 1)
    #[argh(option, default = "1")]
    runs: u32,

    /// measure only this, separated by commas: disk, net, console, memory (all of these by default),
    /// and crowd: many devices that are busy at once
    #[argh(option)]
    only: Option<String>,

    /// leave the peer out
    #[argh(switch)]
    alone: bool,

    /// measure this VMM too: "NAME=PROGRAM ARGUMENTS"; may be repeated
    #[argh(option)]
    vmm: Vec<String>,

    /// how long a crowd is busy, in virtual seconds (default 10)
    #[argh(option, default = "10")]
    seconds: u32,

    /// how many CPUs the host has (default 1)
    #[argh(option, default = "1")]
    host_cpus: u32,
}

const WORKS: [&str; 5] = ["disk", "net", "console", "memory", "crowd"];

/// The devices of a crowd, all of which are busy at once.
const CROWD_DISKS: usize = 16;
const CROWD_CARDS: usize = 4;

/// What the guest does; `armlet.io=` on the kernel's command line chooses.
const SCRIPT: &str = r#"
for word in $(cat /proc/cmdline); do
    case "$word" in armlet.io=*) work=${word#armlet.io=} ;; esac
done
disk() { xtask load disk --device /dev/vda "$@"; }
net() { xtask load net --connect @HOST@:@PORT@ "$@"; }
stream() { xtask load stream "$@"; }
case "$work" in
    disk)
        for depth in 1 32; do
            small="--block 4096 --random --depth $depth --operations 3000"
            large="--block 131072 --depth $depth --operations 800"
            disk --name 4k-random-read-$depth $small
            disk --name 4k-random-write-$depth $small --write
            disk --name 128k-read-$depth $large
            disk --name 128k-write-$depth $large --write
        done
        disk --name 4k-write-flush-1 --block 4096 --depth 1 --operations 500 --write --flush
        ;;
    net|memory)
        [ "$work" = memory ] && disk --name some-reads --block 4096 --depth 4 --operations 200
        ip link set eth0 up
        ip addr add @GUEST@/24 dev eth0
        if [ "$work" = memory ]; then
            net --name some-bytes --mode download --count 4194304
        else
            net --name request-response --mode ping --count 2000
            net --name send --mode upload --count 67108864
            net --name receive --mode download --count 67108864
        fi
        ;;
    console)
        stream --name serial --device /dev/ttyAMA0 --count 16384
        stream --name virtio --device /dev/hvc0 --count 262144
        ;;
    crowd)
        for card in @CARDS@; do
            ip link set eth$((card - 1)) up
            ip addr add @NETWORK@$((@FIRST@ + card)).2/24 dev eth$((card - 1))
        done
        for disk in @DISKS@; do
            how=
            case $disk in [i-p]) how=--write ;; esac
            xtask load disk --name disk-$disk --device /dev/vd$disk --block 4096 --random \
                --depth 4 --seconds @SECONDS@ $how > /tmp/disk-$disk &
        done
        for card in @CARDS@; do
            xtask load net --name card-$card --connect @NETWORK@$((@FIRST@ + card)).1:@PORT@ \
                --mode ping --count 10000000 --seconds @SECONDS@ > /tmp/card-$card &
        done
        wait
        cat /tmp/disk-* /tmp/card-*
        ;;
esac
echo @READY@
"#;

/// A VMM with devices, and what its guest does with them.
struct Setup {
    work: &'static str,
    name: String,
    command: Vec<String>,
}

fn armlet(work: &'static str, name: &str, devices: &[&str]) -> Setup {
    let mut command = vec![
        "/bin/armlet",
        "run",
        "--kernel",
        "{kernel}",
        "--initrd",
        "{initrd}",
    ];
    command.extend(["--memory", "256M", "--cpus", "1"]);
    command.extend(["--cmdline", "console=ttyAMA0 {cmdline}"]);
    command.extend(devices);
    Setup {
        work,
        name: name.to_owned(),
        command: command.into_iter().map(str::to_owned).collect(),
    }
}

fn qemu(work: &'static str, name: &str, devices: &[&str]) -> Setup {
    let mut command = vec!["/tools/usr/bin/qemu-system-aarch64"];
    command.extend([
        "-accel",
        "kvm",
        "-machine",
        "virt,gic-version=3",
        "-cpu",
        "host",
    ]);
    command.extend(["-m", "256", "-smp", "1", "-nodefaults", "-no-user-config"]);
    command.extend(["-display", "none", "-no-reboot"]);
    command.extend([
        "-chardev",
        "stdio,id=console,signal=off",
        "-serial",
        "chardev:console",
    ]);
    command.extend(["-kernel", "{kernel}", "-initrd", "{initrd}"]);
    command.extend(["-append", "console=ttyAMA0 {cmdline}"]);
    command.extend(devices);
    Setup {
        work,
        name: name.to_owned(),
        command: command.into_iter().map(str::to_owned).collect(),
    }
}

/// Everything that is measured. QEMU is set up as those who want it fast do: devices on PCI with
/// MSI, a thread of its own for the disk.
fn setups() -> Vec<Setup> {
    let drive = "if=none,id=disk,format=raw,file={disk}";
    let block = [
        "-object",
        "iothread,id=io",
        "-device",
        "virtio-blk-pci,drive=disk,iothread=io",
    ];
    let with_drive = |options: &str| format!("{drive},{options}");
    let card = ["-device", "virtio-net-pci,netdev=net,romfile="];
    let tap = "tap,id=net,ifname={tap},script=no,downscript=no";
    let disks = (1..=CROWD_DISKS).map(|disk| format!("--disk=path={{disk{disk}}}"));
    let cards = (1..=CROWD_CARDS).map(|card| format!("--net=tap={{tap{card}}}"));
    let crowd = disks.chain(cards).collect::<Vec<_>>();
    let crowd = crowd.iter().map(String::as_str).collect::<Vec<_>>();
    vec![
        armlet("crowd", "armlet", &crowd),
        armlet(
            "disk",
            "armlet, io_uring",
            &["--disk", "path={disk},engine=io_uring"],
        ),
        armlet(
            "disk",
            "armlet, threads",
            &["--disk", "path={disk},engine=sync"],
        ),
        qemu(
            "disk",
            "QEMU, io_uring",
            &[&["-drive", &*with_drive("aio=io_uring")][..], &block].concat(),
        ),
        qemu(
            "disk",
            "QEMU, threads",
            &[&["-drive", &*with_drive("aio=threads")][..], &block].concat(),
        ),
        armlet("net", "armlet, vhost", &["--net", "tap={tap},vhost=on"]),
        armlet("net", "armlet, own", &["--net", "tap={tap},vhost=off"]),
        qemu(
            "net",
            "QEMU, vhost",
            &[&["-netdev", &*format!("{tap},vhost=on")][..], &card].concat(),
        ),
        qemu(
            "net",
            "QEMU, own",
            &[&["-netdev", &*format!("{tap},vhost=off")][..], &card].concat(),
        ),
        armlet("console", "armlet", &["--console", "virtio"]),
        qemu(
            "console",
            "QEMU",
            &[
                "-device",
                "virtio-serial-pci",
                "-chardev",
                "file,id=hvc,path=/dev/null",
                "-device",
                "virtconsole,chardev=hvc",
            ],
        ),
        armlet(
            "memory",
            "armlet",
            &["--disk", "path={disk}", "--net", "tap={tap}"],
        ),
        qemu(
            "memory",
            "QEMU",
            &[
                &["-drive", &*with_drive("aio=io_uring")][..],
                &block,
                &["-netdev", &*format!("{tap},vhost=on")],
                &card,
            ]
            .concat(),
        ),
    ]
}

/// A VMM that somebody asked for, with the work that its arguments have devices for.
fn setups_of(vmm: &Vmm) -> impl Iterator<Item = Setup> {
    let uses = |what: &str| vmm.arguments.iter().any(|word| word.contains(what));
    let works: &[&str] = match (uses("{disk}"), uses("{tap}")) {
        (true, true) => &["disk", "net", "memory"],
        (true, false) => &["disk"],
        (false, true) => &["net"],
        (false, false) => &["console"],
    };
    works.iter().map(|work| Setup {
        work,
        name: vmm.name.clone(),
        command: vmm.command(1, &["{disk}".to_owned()]),
    })
}

impl BenchIo {
    /// Measures and prints tables, or JSON.
    pub(crate) fn run(&self) -> Result<i32> {
        ensure!(self.runs > 0, "--runs is at least 1");
        ensure!(self.host_cpus > 0, "--host-cpus is at least 1");
        let works = self.works()?;
        let vmms = Vmm::parse_all(&self.vmm, &["armlet", "QEMU"])?;
        let store = Store::open()?;
        let folder = assets::prepare(&store, Isa::Arm64, Choice::All)?;
        let armlet = boot::build(Isa::Arm64, "armlet", true)?;
        let measurer = boot::build(Isa::Arm64, "xtask", true)?;
        let file = |from: PathBuf, to: &str| HostFile {
            from,
            to: to.into(),
            mode: 0o755,
        };
        let mut files = vec![
            file(armlet, "/bin/armlet"),
            file(measurer.clone(), "/bin/xtask"),
        ];

        let mut setups = setups();
        setups.retain(|setup| works.contains(&setup.work));
        if self.alone {
            setups.retain(|setup| !setup.name.starts_with("QEMU"));
        }
        for vmm in &vmms {
            setups.extend(setups_of(vmm).filter(|setup| works.contains(&setup.work)));
            files.push(vmm.host_file());
        }

        let image = fs::canonicalize(folder.join("Image")).context("no kernel for the guest")?;
        files.push(file(image, "/assets/Image"));
        let initrd = host::NamelessFile::new()?;
        initrd_for(&folder, &measurer, &initrd, self.seconds)?;
        files.push(file(initrd.path(), "/assets/initrd"));
        let spec = HostSpec {
            smp: self.host_cpus,
            icount: true,
            tools: true,
            ..HostSpec::of(Isa::Arm64)
        };
        let lines = measure(&store, &spec, files, &self.script(&setups), "name")?;
        if self.json {
            println!("{:#}", json!({"lines": lines}));
        } else {
            print!("{}", tables(&lines));
        }
        let failures = lines.iter().filter_map(|line| {
            let error = line["error"].as_str()?;
            Some(format!(
                "{}: {}: {error}",
                text(line, "vmm"),
                text(line, "work")
            ))
        });
        let mut status = 0;
        for failure in failures {
            say(&format!("error: {failure}"));
            status = 1;
        }
        Ok(status)
    }

    fn works(&self) -> Result<Vec<&'static str>> {
        let Some(only) = &self.only else {
            // The crowd takes as long as all others.
            return Ok(WORKS.into_iter().filter(|work| *work != "crowd").collect());
        };
        let asked = only.split(',').collect::<Vec<_>>();
        if let Some(work) = asked.iter().find(|work| !WORKS.contains(work)) {
            bail!("{work:?} is not one of {}", WORKS.join(", "));
        }
        let asked = WORKS.into_iter().filter(|work| asked.contains(work));
        Ok(asked.collect())
    }

    /// What the host runs.
    fn script(&self, setups: &[Setup]) -> String {
        let mut script = String::new();
        for setup in setups {
            let (disks, cards) = (CROWD_DISKS.to_string(), CROWD_CARDS.to_string());
            let runs = self.runs.to_string();
            let mut options = vec![
                ("--name", &*setup.name),
                ("--work", setup.work),
                ("--runs", &runs),
            ];
            if setup.work == "crowd" {
                options.extend([("--disks", &*disks), ("--taps", &*cards)]);
            }
            script += &measuring("measure-io", &options, &setup.command);
        }
        script
    }
}

/// The line by which the host's shell has `task` measure a VMM with the guest's kernel and initramfs.
pub(crate) fn measuring(task: &str, options: &[(&str, &str)], command: &[String]) -> String {
    let guest = [
        ("--kernel", "/assets/Image"),
        ("--initrd", "/assets/initrd"),
    ];
    let options = options.iter().chain(&guest);
    let options = options.flat_map(|(option, value)| [*option, *value]);
    let words = ["/bin/xtask", task]
        .into_iter()
        .chain(options)
        .chain(["--"]);
    let words = words.chain(command.iter().map(String::as_str));
    let mut line = words.map(host::quoted).collect::<Vec<_>>().join(" ");
    line.push('\n');
    line
}

fn write_all(file: &host::NamelessFile, data: &[u8]) -> Result<()> {
    std::io::Write::write_all(&mut file.file(), data).context("cannot write a temporary file")
}

/// Words for the guest's shell.
fn list(words: impl Iterator<Item = impl ToString>) -> String {
    let words = words.map(|word| word.to_string());
    words.collect::<Vec<_>>().join(" ")
}

/// The guest's initramfs: the standard one with drivers, our program and the script.
fn initrd_for(
    folder: &std::path::Path,
    measurer: &std::path::Path,
    to: &host::NamelessFile,
    seconds: u32,
) -> Result<()> {
    let mut data = Vec::new();
    for name in ["initrd", "devices.cpio"] {
        let path = folder.join(name);
        data.extend(fs::read(&path).with_context(|| format!("cannot read {path:?}"))?);
    }
    let script = SCRIPT
        .replace("@HOST@", HOST_ADDRESS)
        .replace("@GUEST@", GUEST_ADDRESS)
        .replace("@PORT@", &PORT.to_string())
        .replace("@SECONDS@", &seconds.to_string())
        .replace("@NETWORK@", NETWORK_OF_MANY)
        .replace("@FIRST@", &FIRST_OF_MANY.to_string())
        .replace("@CARDS@", &list(1..=CROWD_CARDS))
        .replace("@DISKS@", &list(('a'..='z').take(CROWD_DISKS)))
        .replace("@READY@", READY);
    let mut archive = Archive::new(Vec::new());
    archive.file_from("/bin/xtask", 0o755, measurer)?;
    archive.file("/script", 0o755, script.as_bytes())?;
    data.extend(archive.finish()?);
    write_all(to, &data)
}

/// Has the shell of an emulated host, which gets `files`, run `script`, and gives the lines of JSON
/// that it printed. Each is told of by its VMM and what it has under the key `what`.
pub(crate) fn measure(
    store: &Store,
    spec: &HostSpec,
    mut files: Vec<HostFile>,
    script: &str,
    what: &str,
) -> Result<Vec<Value>> {
    let file = host::NamelessFile::new()?;
    write_all(&file, script.as_bytes())?;
    files.push(HostFile::program(&file.path(), "/root/bench.sh"));
    let job = Job {
        files,
        command: vec!["/bin/sh".to_owned(), "/root/bench.sh".to_owned()],
        folder: "/root".into(),
        limit: Some(LIMIT),
        ..Job::default()
    };
    let mut output = Vec::new();
    let mut lines = Vec::new();
    let mut said = String::new();
    let mut print = |bytes: &[u8]| {
        output.extend_from_slice(bytes);
        while let Some(end) = output.iter().position(|byte| *byte == b'\n') {
            let line = output.drain(..=end).collect::<Vec<_>>();
            match serde_json::from_slice::<Value>(&line) {
                Ok(value) => {
                    if value["error"].is_null() {
                        say(&told(&value, what));
                    }
                    lines.push(value);
                }
                Err(_) => said.push_str(&String::from_utf8_lossy(&line)),
            }
        }
        Ok(())
    };
    match rig::run(store, spec, &job, None, &mut print)? {
        Ended::Exit(0) => Ok(lines),
        ended => Err(anyhow!("measuring failed ({ended:?})\n{said}")),
    }
}

/// What a line of JSON says, in short: its VMM, what it has under the key `what`, and its values.
fn told(line: &Value, what: &str) -> String {
    let mut told = format!("{}: {}", text(line, "vmm"), text(line, what));
    for (key, value) in line["values"].as_object().into_iter().flatten() {
        if let Some(number) = value.as_f64() {
            told += &format!(", {key} {number:.1}");
        }
    }
    told
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_told_with_its_values_when_it_comes() {
        let line =
            json!({"vmm": "a", "row": "8 disks", "values": {"entry_ms": 4.26, "threads": 3}});
        assert_eq!(told(&line, "row"), "a: 8 disks, entry_ms 4.3, threads 3.0");
    }

    #[test]
    fn every_setup_names_its_devices() {
        for setup in setups().into_iter().filter(|setup| setup.work != "crowd") {
            let all = setup.command.join(" ");
            assert_eq!(
                all.contains("{disk}"),
                ["disk", "memory"].contains(&setup.work),
                "{all}"
            );
            assert_eq!(
                all.contains("{tap}"),
                ["net", "memory"].contains(&setup.work),
                "{all}"
            );
        }
    }

    #[test]
    fn a_vmm_does_the_work_that_it_has_devices_for() {
        let works = |text: &str| {
            let vmm = Vmm::parse(text).expect("a VMM");
            let setups = setups_of(&vmm).map(|setup| (setup.work, setup.command.join(" ")));
            setups.collect::<Vec<_>>()
        };
        let command = "/bin/vmm-a -d {disk} -c 1".to_owned();
        assert_eq!(works("a=/a -d {disk} -c {cpus}"), [("disk", command)]);
        let both = works("a=/a -d {disk} -n {tap}");
        assert_eq!(both.len(), 3);
        assert_eq!(works("a=/a"), [("console", "/bin/vmm-a".to_owned())]);
    }
}
