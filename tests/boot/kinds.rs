use crate::guest::{Armlet, GLANCE, Guest};
use crate::rig::{self, Rig};
use crate::software::Program;
use rustix::process::Signal;
use std::ffi::OsStr;
use std::fmt::Write;
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};
use tempfile::TempDir;

/// MIDR_EL1 of Cortex-A55 and A76 (Linux, arch/arm64/include/asm/cputype.h).
const SLOW: &str = "0x00000000411fd050";
const FAST: &str = "0x00000000414fd0b0";

/// The host, described as one whose CPU 0 is a Cortex-A55, and each other a Cortex-A76.
///
/// No emulator at hand mixes kinds of core, so its CPUs are alike and its files are not: those in
/// which Linux says what they are lie under others, for armlet alone.
struct TwoKinds {
    folder: TempDir,
    script: String,
    cpus: usize,
}

impl TwoKinds {
    /// With perf events of this type for the counters of its fast CPUs. `None` where this user
    /// cannot mount; this was said then.
    fn with_counters(perf_type: &str) -> Option<TwoKinds> {
        let cpus = std::thread::available_parallelism().map_or(1, usize::from);
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut script = String::from("set -e\n");
        let mut lay = |path: &Path, text: &str, over: &str| {
            fs::create_dir_all(path.parent().expect("a folder")).expect("a folder");
            fs::write(path, format!("{text}\n")).expect("a file");
            // Writing to a String cannot fail.
            let _ = writeln!(
                script,
                "[ ! -e {over} ] || mount --bind {} {over}",
                path.display()
            );
        };
        for cpu in 0..cpus {
            let (midr, capacity) = if cpu == 0 {
                (SLOW, "530")
            } else {
                (FAST, "1024")
            };
            let real = format!("/sys/devices/system/cpu/cpu{cpu}");
            let file = |name: &str| folder.path().join(format!("{name}{cpu}"));
            let over = format!("{real}/regs/identification/midr_el1");
            lay(&file("midr"), midr, &over);
            lay(&file("capacity"), capacity, &format!("{real}/cpu_capacity"));
        }
        let devices = folder.path().join("devices");
        for (name, cpus, number) in [
            ("armv8_cortex_a55", "0".to_owned(), "4710"),
            ("armv8_cortex_a76", format!("1-{}", cpus - 1), perf_type),
        ] {
            let device = devices.join(name);
            fs::create_dir_all(&device).expect("a folder");
            fs::write(device.join("cpus"), format!("{cpus}\n")).expect("a file");
            fs::write(device.join("type"), format!("{number}\n")).expect("a file");
        }
        let real = "/sys/bus/event_source/devices";
        let _ = writeln!(script, "mount --bind {} {real}", devices.display());
        script.push_str("exec \"$@\"\n");
        let tried = Command::new("unshare")
            .args(["-m", "sh", "-c", &script, "sh", "true"])
            .stdin(Stdio::null())
            .output();
        let mounts = tried.is_ok_and(|tried| tried.status.success());
        if !mounts || cpus < 2 {
            println!("skipped: needs two CPUs, and a user who can mount");
            return None;
        }
        Some(TwoKinds {
            folder,
            script,
            cpus,
        })
    }

    /// Armlet on that host.
    fn start(&self, armlet: Armlet) -> Armlet {
        let words = ["unshare", "-m", "sh", "-c", &self.script, "sh"];
        assert!(self.folder.path().exists());
        armlet.through(&words.map(OsStr::new))
    }
}

/// The type of the perf events of the host's real counters.
fn real_type() -> Option<String> {
    let text = fs::read_to_string("/sys/bus/event_source/devices/armv8_pmuv3_0/type");
    text.ok().map(|text| text.trim().to_owned())
}

fn has_counters(rig: &Rig) -> bool {
    rig.facts.all["pmu"] == true
}

/// The CPUs that each of a guest's threads may run on, by the thread's name.
fn threads(guest: &Guest) -> Vec<(String, String)> {
    let tasks = fs::read_dir(format!("/proc/{}/task", guest.pid())).expect("a process");
    let read = |name: &str, text: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(name));
        line.map(|line| line.trim().to_owned())
    };
    let of = |path: &Path| {
        let status = fs::read_to_string(path.join("status")).ok()?;
        Some((
            read("Name:", &status)?,
            read("Cpus_allowed_list:", &status)?,
        ))
    };
    let tasks = tasks.filter_map(|task| of(&task.expect("a thread").path()));
    tasks.collect()
}

/// Waits until each vCPU's thread may run on these CPUs alone; `cpus` names one for each vCPU.
fn assert_pinned(guest: &Guest, cpus: &[&str]) {
    // A thread names itself and takes its place when it first runs.
    let deadline = Instant::now() + Duration::from_secs(20);
    loop {
        let threads = threads(guest);
        let is_there = |(index, cpus): (usize, &&str)| {
            threads.contains(&(format!("vcpu{index}"), (*cpus).to_owned()))
        };
        if cpus.iter().enumerate().all(is_there) {
            println!("{threads:?}");
            return;
        }
        assert!(Instant::now() < deadline, "{threads:?}, wanted {cpus:?}");
        sleep(GLANCE);
    }
}

fn stop(guest: Guest) {
    guest.signal(Signal::INT);
    guest.end().assert_status(6);
}

fn idle_guest() -> Armlet {
    Armlet::program(&Program::default().print("up\n").sleep())
}

#[test]
fn vcpus_and_other_threads_run_on_the_cpus_of_their_lists() {
    if rig::any().is_none() {
        return;
    }
    if std::thread::available_parallelism().map_or(1, usize::from) < 2 {
        println!("skipped: needs two CPUs");
        return;
    }
    let guest = idle_guest().cpus(2).option("--pin", "1,0");
    let mut guest = guest.option("--pin-io", "1").start();
    guest.expect("up\n");
    assert_pinned(&guest, &["1", "0"]);
    let threads = threads(&guest);
    let mut others = threads.iter().filter(|(name, _)| !name.starts_with("vcpu"));
    assert!(others.all(|(_, cpus)| cpus == "1"), "{threads:?}");
    stop(guest);
}

#[test]
fn vcpus_run_on_one_kind_of_core_where_there_are_two() {
    let Some(rig) = rig::any() else { return };
    let real = real_type().unwrap_or_default();
    let Some(host) = TwoKinds::with_counters(&real) else {
        return;
    };
    let fast = match host.cpus {
        2 => "1".to_owned(),
        cpus => format!("1-{}", cpus - 1),
    };
    let mut guest = host.start(idle_guest().verbose()).start();
    guest.expect_error(&format!("vCPUs run on CPUs {fast} (MIDR 0x410fd0b0)"));
    guest.expect_error("this host has 2 kinds of core");
    guest.expect("up\n");
    assert_pinned(&guest, &[&fast]);
    stop(guest);

    // On the slow kind, if that is asked for; one more than there are of it is said.
    let guest = idle_guest().cpus(2).option("--pin", "0");
    // No counters are behind the type that its files name for that kind.
    let guest = guest.option("--pmu", "off");
    let mut guest = host.start(guest).start();
    guest.expect_error("2 vCPUs share CPUs: they are pinned to 1 CPU");
    guest.expect("up\n");
    assert_pinned(&guest, &["0", "0"]);
    stop(guest);
    println!("counters: {}", has_counters(rig));
}

#[test]
fn counters_are_those_of_the_kind_that_vcpus_run_on() {
    let Some(rig) = rig::any() else { return };
    let (Some(real), true) = (real_type(), has_counters(rig)) else {
        println!("skipped: this host's KVM has no counters for guests");
        return;
    };
    let program = Program::says_whether_cycles_count();
    let Some(host) = TwoKinds::with_counters(&real) else {
        return;
    };
    let run = |armlet: Armlet| host.start(armlet).run();
    let counts = run(Armlet::program(&program));
    assert_eq!(counts.assert_status(0).text(), "it counts\n");

    // No counters are those of both kinds.
    let none = run(Armlet::program(&program).option("--pin", "none"));
    assert_eq!(none.assert_status(0).text(), "undefined\n");
    let refused = Armlet::program(&program).option("--pin", "none");
    let refused = run(refused.option("--pmu", "on"));
    let line = &refused.assert_status(2).errors;
    assert!(
        line.contains("--pmu on: the vCPUs run on several kinds of core"),
        "{line}"
    );
    assert!(line.contains("(--pin)"), "{line}");

    // KVM is told which: one that it does not have is no secret.
    let Some(host) = TwoKinds::with_counters("4711") else {
        return;
    };
    let run = |armlet: Armlet| host.start(armlet).run();
    let wrong = run(Armlet::program(&program));
    let line = &wrong.assert_status(3).errors;
    assert!(line.contains("counters of perf type 4711"), "{line}");
    let without = run(Armlet::program(&program).option("--pmu", "off"));
    assert_eq!(without.assert_status(0).text(), "undefined\n");
}
