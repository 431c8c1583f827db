use crate::bad::{Bad, armlet};
use crate::guest::{Armlet, GLANCE, Guest, Tuned};
use crate::rig::{self, Rig};
use crate::software::Program;
use rustix::process::Signal;
use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread::sleep;
use std::time::{Duration, Instant};

/// KiB of guest memory, a whole number of huge pages on hosts with pages of 4 and 16 KiB.
const GUEST_KIB: u64 = 64 << 10;

/// A guest that touches next to nothing of its memory.
fn idle_guest() -> Armlet {
    Armlet::program(&Program::default().print("up\n").sleep()).memory("64M")
}

/// Starts the guest and waits until it runs.
fn up(armlet: Armlet) -> Guest {
    let mut guest = armlet.start();
    guest.expect("up\n");
    guest
}

fn stop(guest: Guest) {
    guest.signal(Signal::INT);
    guest.end().assert_status(6);
}

/// A line of /proc/PID/status or smaps_rollup in KiB.
fn kib(pid: u32, file: &str, name: &str) -> u64 {
    let text = fs::read_to_string(format!("/proc/{pid}/{file}")).expect("a process");
    let line = text.lines().find_map(|line| line.strip_prefix(name));
    let value = line.and_then(|line| line.trim().strip_suffix(" kB"));
    let value = value.and_then(|value| value.trim().parse().ok());
    value.unwrap_or_else(|| panic!("no {name} in\n{text}"))
}

/// The pool of the host's smallest huge pages, with so many pages in it for a while. Only a test
/// whose guest is alone has one: small hosts have no memory for another guest beside it.
struct Pool {
    folder: PathBuf,
    /// "2M".
    size: String,
    before: String,
    _lock: MutexGuard<'static, ()>,
}

/// One test at a time has the pool: it is put back after its guest's turn. Who has it must not wait
/// for another turn.
static POOL: Mutex<()> = Mutex::new(());

impl Pool {
    /// `None` where this user cannot set pages aside, or the host has none left in one piece; this
    /// was said then.
    fn with(rig: &Rig, bytes: u64) -> Option<Pool> {
        let size = rig.facts.page_size / 8 * rig.facts.page_size;
        let folder = format!("/sys/kernel/mm/hugepages/hugepages-{}kB", size >> 10);
        let folder = PathBuf::from(folder);
        let lock = POOL.lock().unwrap_or_else(PoisonError::into_inner);
        let before = fs::read_to_string(folder.join("nr_hugepages")).ok()?;
        let pool = Pool {
            _lock: lock,
            folder,
            size: format!("{}M", size >> 20),
            before,
        };
        let pages = bytes / size;
        let set = fs::write(pool.folder.join("nr_hugepages"), pages.to_string());
        if set.is_err() || pool.number("nr_hugepages") < pages {
            println!(
                "skipped: this host does not set {pages} pages of {} aside",
                pool.size
            );
            return None;
        }
        Some(pool)
    }

    fn number(&self, file: &str) -> u64 {
        let text = fs::read_to_string(self.folder.join(file)).expect("a pool's file");
        text.trim().parse().expect("a number")
    }

    /// HugePages_Free of /proc/meminfo, for this size.
    fn free(&self) -> u64 {
        self.number("free_hugepages")
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        // The next test that cares sets it anyway.
        let _ = fs::write(self.folder.join("nr_hugepages"), &self.before);
    }
}

#[test]
fn guest_memory_comes_from_the_pool_and_goes_back_to_it() {
    let Some(rig) = rig::any() else { return };
    let armlet = idle_guest().alone();
    let Some(pool) = Pool::with(rig, GUEST_KIB << 10) else {
        return;
    };
    let all = pool.free();
    let guest = up(armlet.option("--hugepages", &pool.size));
    // What it touched: its program, its tree.
    let touched = pool.free();
    assert!(touched < all, "{touched} of {all} pages are free");
    assert_eq!(
        pool.number("resv_hugepages"),
        touched,
        "none is left for others"
    );
    let from_pool = kib(guest.pid(), "status", "HugetlbPages:");
    println!(
        "{all} pages of {}: {touched} free, {from_pool} KiB taken",
        pool.size
    );
    assert!(from_pool > 0);
    stop(guest);
    assert_eq!(pool.free(), all);
}

#[test]
fn memory_taken_beforehand_empties_the_pool() {
    let Some(rig) = rig::any() else { return };
    let armlet = idle_guest().alone();
    let Some(pool) = Pool::with(rig, GUEST_KIB << 10) else {
        return;
    };
    let all = pool.free();
    let armlet = armlet.option("--hugepages", &pool.size);
    let guest = up(armlet.flag("--prefault"));
    assert_eq!(pool.free(), 0, "of {all} pages");
    assert_eq!(kib(guest.pid(), "status", "HugetlbPages:"), GUEST_KIB);
    // The pool is empty now. No guest runs, so none waits for its turn.
    let other = Command::new(env!("CARGO_BIN_EXE_armlet"))
        .args(["run", "--memory", "64M", "--hugepages", &pool.size])
        .arg("--kernel")
        .arg(guest.path("kernel"))
        .output()
        .expect("armlet can be run");
    let errors = String::from_utf8_lossy(&other.stderr);
    assert_eq!(other.status.code(), Some(3), "{errors}");
    let wanted = format!("{all} pages are needed, and 0 of {all} in the pool are free");
    assert!(errors.contains(&wanted), "{errors}");
    stop(guest);
    assert_eq!(pool.free(), all);
}

#[test]
fn the_advice_about_a_pool_that_others_use_leads_to_a_start() {
    let Some(rig) = rig::any() else { return };
    let idle = idle_guest().alone();
    // The first guest's pages are promised to it: most still count as free.
    let Some(pool) = Pool::with(rig, (GUEST_KIB << 10) + (GUEST_KIB << 9)) else {
        return;
    };
    let first = up(idle.option("--hugepages", &pool.size));
    let bad = Bad::new();
    let kernel = Program::default().print("up\n").power_off().image();
    let kernel = bad.file("kernel", &kernel);
    let second = |status: i32| {
        let output = armlet(&[
            "run",
            "--memory",
            "64M",
            "--hugepages",
            &pool.size,
            "--kernel",
            &kernel,
        ]);
        let errors = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(status), "{errors}");
        errors
    };
    let line = second(3);
    println!("{line}");
    let (_, command) = line.split_once('\'').expect("a command");
    let (command, _) = command.split_once('\'').expect("its end");
    let done = Command::new("sh").args(["-c", command]).status();
    assert!(done.expect("a shell").success(), "{command}");
    second(0);
    stop(first);
}

#[test]
fn linux_runs_on_pages_of_the_pool() {
    let Some(rig) = rig::any() else { return };
    let armlet = Armlet::debian(rig, "Image", "hold").memory("256M").alone();
    let Some(pool) = Pool::with(rig, 256 << 20) else {
        return;
    };
    let mut guest = armlet.option("--hugepages", &pool.size).start();
    guest.expect(crate::guest::MARKER);
    let taken = kib(guest.pid(), "status", "HugetlbPages:");
    println!("{taken} KiB of pages of {}", pool.size);
    // The kernel and the initramfs, at least.
    assert!(taken >= 32 << 10, "{taken} KiB");
    stop(guest);
}

#[test]
fn locked_memory_is_all_there_and_stays() {
    if rig::any().is_none() {
        return;
    }
    let plain = up(idle_guest());
    assert_eq!(kib(plain.pid(), "status", "VmLck:"), 0);
    let untouched = kib(plain.pid(), "status", "VmRSS:");
    stop(plain);
    let guest = up(idle_guest().flag("--mlock"));
    assert_eq!(kib(guest.pid(), "status", "VmLck:"), GUEST_KIB);
    let there = kib(guest.pid(), "status", "VmRSS:");
    assert!(
        there >= GUEST_KIB && untouched < GUEST_KIB,
        "{untouched}, {there}"
    );
    stop(guest);
}

#[test]
fn memory_taken_beforehand_is_there_before_the_guest_touches_it() {
    if rig::any().is_none() {
        return;
    }
    let guest = up(idle_guest()
        .option("--hugepages", "none")
        .flag("--prefault"));
    let there = kib(guest.pid(), "status", "VmRSS:");
    assert!(there >= GUEST_KIB, "{there} KiB");
    assert_eq!(kib(guest.pid(), "smaps_rollup", "AnonHugePages:"), 0);
    stop(guest);
}

/// KSM, scanning without a pause for a while. `None` where this user cannot set it, or this kernel
/// has none.
fn merging() -> Option<Tuned> {
    let values = [
        ("pages_to_scan", "20000"),
        ("sleep_millisecs", "20"),
        ("run", "1"),
    ];
    Tuned::set("/sys/kernel/mm/ksm", &values)
}

#[test]
fn equal_pages_are_merged_where_that_is_asked_for_alone() {
    let Some(rig) = rig::any() else { return };
    let merged = |guest: &Guest| -> u64 {
        let path = format!("/proc/{}/ksm_merging_pages", guest.pid());
        let text = fs::read_to_string(path).expect("a kernel with KSM");
        text.trim().parse().expect("a number")
    };
    // All of it is there, and zero.
    let guest = || {
        idle_guest()
            .option("--hugepages", "none")
            .flag("--prefault")
    };
    let (armlet, other) = (guest().alone(), guest());
    let Some(_merging) = merging() else {
        println!("skipped: this user cannot set KSM");
        return;
    };
    let (guest, pages) = (
        up(armlet.flag("--mergeable")),
        (GUEST_KIB << 10) / rig.facts.page_size,
    );
    let deadline = Instant::now() + Duration::from_secs(120);
    while merged(&guest) < pages / 2 {
        let so_far = merged(&guest);
        assert!(
            Instant::now() < deadline,
            "{so_far} of {pages} pages are merged"
        );
        sleep(GLANCE);
    }
    println!("{} of {pages} pages are merged", merged(&guest));
    stop(guest);
    let guest = up(other);
    assert_eq!(merged(&guest), 0);
    stop(guest);
}
