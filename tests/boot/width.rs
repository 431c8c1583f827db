use crate::guest::{Armlet, Outcome, section};
use crate::rig::{self, Rig};
use crate::software::Program;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

/// A board with RAM at 1 GiB and at 2^48.
const HIGHBANK: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/boards/highbank.toml");

/// KVM_CREATE_VM as the host's kernel saw it, by tracefs: a trace of our own, which is gone with
/// this.
struct Trace {
    folder: PathBuf,
}

impl Trace {
    /// `None` where there is no tracefs or it is not ours to use.
    fn start() -> Option<Trace> {
        let name = format!("armlet-test-{}", std::process::id());
        let folder = Path::new("/sys/kernel/tracing/instances").join(name);
        fs::create_dir(&folder).ok()?;
        let trace = Trace { folder };
        let event = trace.folder.join("events/syscalls/sys_enter_ioctl");
        // KVM_CREATE_VM is _IO(0xae, 1).
        fs::write(event.join("filter"), "cmd == 0xae01").ok()?;
        fs::write(event.join("enable"), "1").ok()?;
        Some(trace)
    }

    /// The address bits that a process asked for with its last VM.
    fn bits(&self, pid: u32) -> u64 {
        let trace = fs::read_to_string(self.folder.join("trace")).expect("a trace");
        // "armlet-123 [000] ..... 12.34: sys_ioctl(fd: 3, cmd: ae01, arg: 20)", on newer kernels with
        // "0x" before the numbers.
        let task = format!("-{pid} ");
        let line = trace
            .lines()
            .rfind(|line| line.contains(&task) && line.contains("ae01,"));
        let line = line.unwrap_or_else(|| panic!("no VM of {pid} in the trace:\n{trace}"));
        let arg = line
            .split_once("arg: ")
            .and_then(|(_, arg)| arg.strip_suffix(')'))
            .map(|arg| arg.trim_start_matches("0x"));
        let kind = u64::from_str_radix(arg.expect("an argument"), 16).expect("a number");
        // The lowest eight bits of a VM's type (KVM_VM_TYPE_ARM_IPA_SIZE_MASK).
        kind & 0xff
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        let _ = fs::write(
            self.folder.join("events/syscalls/sys_enter_ioctl/enable"),
            "0",
        );
        let _ = fs::remove_dir(&self.folder);
    }
}

/// Runs a guest that ends with status 0, and checks the bits that KVM was asked for.
fn assert_bits(armlet: Armlet, bits: u8) -> Outcome {
    // One trace at a time has the name.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock().unwrap_or_else(PoisonError::into_inner);
    let trace = Trace::start();
    let guest = armlet.verbose().start();
    let pid = guest.pid();
    let outcome = guest.end();
    outcome.assert_status(0);
    let said = format!("armlet: {bits} IPA bits for ");
    assert!(outcome.errors.contains(&said), "{}", outcome.errors);
    match trace {
        Some(trace) => assert_eq!(
            trace.bits(pid),
            u64::from(bits),
            "bits that KVM was asked for"
        ),
        None => println!("KVM cannot be asked here: no tracefs"),
    }
    outcome
}

/// A guest that is gone at once.
fn brief() -> Armlet {
    Armlet::program(&Program::default().print("up\n").power_off())
}

#[test]
fn the_width_fits_the_memory() {
    let Some(rig) = rig::any() else { return };
    assert_bits(brief(), 32);
    for (memory, bits) in [
        ("2G", 32),
        ("3G", 32),
        ("3145792K", 33),
        ("7G", 33),
        ("14G", 34),
        ("15G", 34),
        ("16G", 35),
    ] {
        assert_bits(brief().memory(memory), bits);
    }
    let limit = rig.facts.ipa_limit;
    for (asked, bits) in [("fit", 32), ("max", limit), ("33", 33), ("40", 40)] {
        assert_bits(brief().option("--ipa-bits", asked), bits);
    }
}

#[test]
fn the_hosts_limit_is_the_most_that_can_be_asked_for() {
    let Some(rig) = rig::any() else { return };
    let limit = rig.facts.ipa_limit;
    let exact = |bits: u8| brief().option("--ipa-bits", bits.to_string());
    assert_bits(exact(limit), limit);
    if limit < 52 {
        let outcome = exact(52).run();
        outcome.assert_status(3);
        let wanted = format!(
            "armlet: --ipa-bits 52: this host offers 32 to {limit} bits; use --ipa-bits fit\n"
        );
        assert_eq!(outcome.errors, wanted);
    }
    let outcome = exact(53).run();
    outcome.assert_status(2);
    assert!(outcome.errors.contains("32 to 52"), "{}", outcome.errors);
}

/// 14 GiB is more than the emulated host has: it says so, and the guest has them all the same.
#[test]
fn linux_has_14_gib_in_34_bits() {
    let Some(rig) = rig::any() else { return };
    let script = "echo '== memory'; grep MemTotal /proc/meminfo
echo '== iomem'; grep RAM /proc/iomem
echo '== end'";
    // Stolen time is told in memory that Linux then does not count as RAM.
    let armlet = Armlet::script(rig, "Image", script).option("--pv", "steal-time=off");
    let outcome = assert_bits(armlet.memory("14G"), 34);
    let script = outcome.script();
    assert_eq!(section(&script, "iomem"), "40000000-3bfffffff : System RAM");
    assert!(total_mib(&script) > 13 << 10, "{script}");
    if rig.facts.memory < 14 << 30 {
        let host = rig.facts.memory >> 20;
        let wanted = format!("armlet: the guest has 14G of memory, this host {host} MiB: ");
        assert!(outcome.errors.contains(&wanted), "{}", outcome.errors);
    }
}

/// MemTotal of `/proc/meminfo` in MiB.
fn total_mib(script: &str) -> u64 {
    let line = section(script, "memory");
    let kib = line
        .split_whitespace()
        .nth(1)
        .and_then(|kib| kib.parse::<u64>().ok());
    kib.expect("MemTotal") >> 10
}

#[test]
fn linux_uses_memory_above_2_to_the_48() {
    let Some(rig) = rig::any() else { return };
    if rig.facts.ipa_limit < 49 {
        return refuses_the_high_bank(rig);
    }
    let script = "echo '== memory'; grep MemTotal /proc/meminfo
echo '== iomem'; grep RAM /proc/iomem
head -c 50000000 /dev/zero >/tmp/file
echo '== zone'; grep -A 20 'zone *Normal' /proc/zoneinfo
echo '== dmesg'; dmesg
echo '== end'";
    let armlet = Armlet::script(rig, "Image", script)
        .option("--board", HIGHBANK)
        .option("--pv", "steal-time=off")
        .memory("1536M");
    let outcome = assert_bits(armlet, 49);
    let script = outcome.script();
    let iomem = section(&script, "iomem");
    let banks = "40000000-7fffffff : System RAM\n1000000000000-100001fffffff : System RAM";
    assert_eq!(iomem, banks);
    assert!(total_mib(&script) > 1200, "{script}");
    // All of this zone lies in the high bank: the other ends below 4 GiB.
    let zone = section(&script, "zone");
    let pages = |name: &str| {
        let words: Vec<&str> = zone.split_whitespace().collect();
        let at = words
            .iter()
            .position(|word| *word == name)
            .expect("a number of pages");
        words[at + 1].parse::<u64>().expect("a number of pages")
    };
    let (free, managed) = (pages("free"), pages("managed"));
    println!("{managed} pages in the high bank, {free} of them free");
    assert!(managed > 90_000, "{zone}");
    assert!(free + 10_000 < managed, "{zone}");
}

fn refuses_the_high_bank(rig: &Rig) {
    let limit = rig.facts.ipa_limit;
    let outcome = Armlet::debian(rig, "Image", "poweroff")
        .option("--board", HIGHBANK)
        .memory("1536M")
        .run();
    outcome.assert_status(3);
    println!("{}", outcome.errors);
    let wanted = format!(
        "armlet: RAM bank 1 ends at 0x100001fffffff and needs 49 address bits; this host offers {limit}; use --memory 1G or less\n"
    );
    assert_eq!(outcome.errors, wanted);
    // The advice is good.
    assert_bits(brief().option("--board", HIGHBANK).memory("1G"), 32);
}
