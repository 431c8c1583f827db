use crate::guest::{Armlet, GLANCE, MARKER};
use crate::software::{Program, UARTDR};
use crate::{commanded, control, handler, lives, rig, snapshot};
use rustix::process::Signal;
use std::fs;
use std::path::PathBuf;
use std::thread::sleep;
use std::time::{Duration, Instant};

fn thread_names(pid: u32) -> Vec<String> {
    let tasks = fs::read_dir(format!("/proc/{pid}/task")).expect("a process");
    let name = |task: PathBuf| fs::read_to_string(task.join("comm")).unwrap_or_default();
    let names = tasks.map(|task| name(task.expect("a thread").path()));
    names.map(|name| name.trim().to_owned()).collect()
}

#[test]
fn each_vcpu_has_a_thread_of_its_name() {
    let Some(rig) = rig::any() else { return };
    let cpus = rig.facts.max_vcpus.min(20) as usize;
    let program = Program::default().print("up\n").sleep();
    let mut guest = Armlet::program(&program).cpus(cpus).start();
    guest.expect("up\n");
    // A thread names itself when it first runs, and the boot CPU's may be the first to.
    let deadline = Instant::now() + Duration::from_secs(20);
    let wanted: Vec<String> = (0..cpus).map(|index| format!("vcpu{index}")).collect();
    loop {
        let names = thread_names(guest.pid());
        let count = |name: &String| names.iter().filter(|n| *n == name).count();
        if wanted.iter().all(|name| count(name) == 1) {
            break;
        }
        assert!(Instant::now() < deadline, "{names:?}");
        sleep(GLANCE);
    }
    guest.signal(Signal::INT);
    guest.end().assert_status(6);
}

/// When the kernel gives out huge pages, set for a while.
struct Policy {
    before: String,
}

impl Policy {
    const PATH: &str = "/sys/kernel/mm/transparent_hugepage/enabled";

    /// `None` where this user cannot set it.
    fn set(policy: &str) -> Option<Policy> {
        // "always [madvise] never": the brackets are around the one in force.
        let text = fs::read_to_string(Policy::PATH).ok()?;
        let before = text.split_once('[')?.1.split_once(']')?.0.to_owned();
        fs::write(Policy::PATH, policy).ok()?;
        Some(Policy { before })
    }
}

impl Drop for Policy {
    fn drop(&mut self) {
        // The next test that cares sets it anyway.
        let _ = fs::write(Policy::PATH, &self.before);
    }
}

/// KiB of a process's memory in huge pages.
fn huge_kib(pid: u32) -> u64 {
    let maps = fs::read_to_string(format!("/proc/{pid}/smaps")).expect("a process's memory");
    let sizes = maps
        .lines()
        .filter_map(|line| line.strip_prefix("AnonHugePages:"));
    let kib = sizes.filter_map(|size| size.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kib.sum()
}

#[test]
fn guest_memory_is_in_huge_pages_under_both_policies() {
    let Some(rig) = rig::any() else { return };
    let image = fs::read(rig.asset("Image")).expect("a kernel");
    let kernel = u64::from_le_bytes(image[16..24].try_into().expect("image_size"));
    for policy in ["always", "madvise"] {
        let armlet = Armlet::debian(rig, "Image", "hold").alone();
        let Some(_policy) = Policy::set(policy) else {
            println!("skipped: this user cannot set {}", Policy::PATH);
            return;
        };
        let mut guest = armlet.start();
        guest.expect(MARKER);
        let huge = huge_kib(guest.pid());
        println!(
            "{policy}: {huge} KiB in huge pages; the kernel takes {} KiB",
            kernel >> 10
        );
        assert!(huge << 10 >= kernel, "{policy}: {huge} KiB in huge pages");
        guest.signal(Signal::INT);
        guest.end().assert_status(6);
    }
}

#[test]
fn a_held_guest_stands_still_and_goes_on() {
    let Some(_) = rig::any() else { return };
    let ticks = Program::default().print(commanded::TICKS).wait(100_000);
    let program = Program::default().print(commanded::FIRST);
    // One that goes off again, and one that was never on.
    let program = program.cpu_on(1, &Program::default().cpu_off());
    let armlet = Armlet::program(&program.wait_for_off(1).then(&ticks.again()));
    commanded::is_held_and_goes_on(armlet, 3, "PC 0x");
}

#[test]
fn a_guest_whose_vcpus_access_devices_without_end_is_held() {
    let Some(_) = rig::any() else { return };
    // UARTFR, whose reading changes nothing.
    let busy = Program::default().read(UARTDR + 0x18).again();
    let ticks = Program::default()
        .print(commanded::TICKS)
        .wait(10_000)
        .again();
    let program = Program::default().print(commanded::FIRST);
    let program = program.cpu_on(1, &busy).cpu_on(2, &busy).cpu_on(3, &busy);
    let armlet = Armlet::program(&program.then(&ticks));
    commanded::is_held_and_goes_on(armlet, 4, "PC 0x");
}

#[test]
fn a_held_disk_stands_still_and_goes_on() {
    if rig::small() {
        commanded::a_busy_disk_is_held_and_goes_on();
    }
}

#[test]
fn a_disk_gets_another_image_while_the_guest_runs() {
    if rig::small() {
        commanded::a_disk_gets_another_image_while_the_guest_runs();
    }
}

#[test]
fn a_disk_and_a_balloon_are_changed_while_the_guest_runs() {
    if rig::small() {
        commanded::a_disk_and_a_balloon_are_changed_while_the_guest_runs();
    }
}

#[test]
fn a_machine_without_vmgenid_is_not_told_that_it_was_cloned() {
    let Some(_) = rig::any() else { return };
    commanded::a_machine_without_vmgenid_is_not_told(ticking());
}

#[test]
fn a_guest_whose_output_nobody_reads_is_not_held_and_that_is_said() {
    let Some(_) = rig::any() else { return };
    let ticks = Program::default().print(commanded::TICKS).again();
    let program = Program::default().print(commanded::FIRST).then(&ticks);
    commanded::is_not_held_while_nobody_reads(Armlet::program(&program));
}

/// A guest that prints [`commanded::FIRST`] and then [`commanded::TICKS`] for ever.
fn ticking() -> Armlet {
    let ticks = Program::default().print(commanded::TICKS).wait(100_000);
    let program = Program::default().print(commanded::FIRST);
    Armlet::program(&program.then(&ticks.again()))
}

#[test]
fn a_guest_is_paused_resumed_reset_and_stopped_by_ctl() {
    if rig::any().is_some() {
        control::a_guest_is_paused_resumed_reset_and_stopped(ticking());
    }
}

#[test]
fn what_a_guest_has_not_is_refused_to_ctl_and_a_killed_armlet_leaves_no_socket() {
    if rig::any().is_some() {
        control::what_a_guest_has_not_is_refused_and_a_killed_armlet_leaves_no_socket(ticking());
    }
}

#[test]
fn a_guest_goes_on_from_its_snapshot() {
    if rig::any().is_some() {
        snapshot::a_guest_goes_on_from_its_snapshot(ticking());
    }
}

#[test]
fn a_guest_goes_on_from_changes_on_a_snapshot() {
    if rig::any().is_some() {
        snapshot::a_guest_goes_on_from_changes_on_a_snapshot(ticking());
    }
}

#[test]
fn a_guest_gets_its_memory_from_a_handler_of_page_faults() {
    if rig::any().is_some() {
        handler::a_guest_gets_its_memory_from_a_handler_of_page_faults(ticking());
    }
}

#[test]
fn whatever_stands_in_a_snapshot_is_refused_or_runs() {
    if rig::any().is_some() {
        let guest = ticking();
        snapshot::whatever_stands_in_one_is_refused_or_runs(guest, 16);
    }
}

#[test]
fn a_snapshot_that_is_none_is_refused() {
    if rig::any().is_some() {
        snapshot::one_that_is_none_is_refused(ticking());
    }
}

#[test]
fn metrics_are_at_a_socket_and_in_a_file() {
    if rig::any().is_some() {
        // The first register of the first slot, which is not writable.
        let program = Program::default()
            .write(0x0a00_0000, 1)
            .print("up\n")
            .stay();
        let up = || Armlet::program(&program);
        lives::has_metrics(up, "register_writes");
    }
}
