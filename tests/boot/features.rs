use crate::guest::{Armlet, section};
use crate::rig::{self, Rig};
use crate::software::Program;
use rustix::thread::{CpuSet, sched_setaffinity};
use std::sync::atomic::{AtomicBool, Ordering};

const LOOK: &str = "
echo '== features'; grep -m 1 Features /proc/cpuinfo
echo '== counters'; ls /sys/bus/event_source/devices
echo '== dmesg'; dmesg -r | grep -i -E 'pmu|perfevents|SVE|auth|stolen'
echo '== interrupts'; grep pmu /proc/interrupts
echo '== end'
";

/// What a Linux guest with these options sees of its vCPUs.
fn look(rig: &Rig, options: &[&str]) -> String {
    let mut armlet = Armlet::script(rig, "Image", LOOK).cpus(2);
    for option in options {
        armlet = armlet.flag(option);
    }
    let script = armlet.run().script();
    println!("{options:?}:\n{script}");
    script
}

fn has(rig: &Rig, name: &str) -> bool {
    let fact = &rig.facts.all[name];
    fact.as_bool().unwrap_or_else(|| panic!("no {name}"))
}

#[test]
fn linux_finds_what_the_host_offers_and_nothing_that_is_off() {
    let Some(rig) = rig::any() else { return };
    let script = look(rig, &[]);
    let features = section(&script, "features");
    let words: Vec<&str> = features.split_whitespace().collect();
    assert_eq!(words.contains(&"sve"), has(rig, "sve"), "{features}");
    assert_eq!(words.contains(&"paca"), has(rig, "pauth"), "{features}");
    assert_eq!(words.contains(&"pacg"), has(rig, "pauth"), "{features}");
    let dmesg = section(&script, "dmesg");
    let told = dmesg.contains("using stolen time PV");
    assert_eq!(told, has(rig, "steal_time"), "{dmesg}");
    let counters = section(&script, "counters");
    let interrupts = section(&script, "interrupts");
    assert_eq!(counters.contains("armv8_pmuv3"), has(rig, "pmu"));
    if has(rig, "pmu") {
        assert!(dmesg.contains("armv8_pmuv3 PMU driver"), "{dmesg}");
        // PPI 7, by its INTID.
        let words: Vec<&str> = interrupts.split_whitespace().collect();
        let line = words
            .windows(3)
            .any(|words| words == ["23", "Level", "arm-pmu"]);
        assert!(line, "{interrupts}");
    }

    let script = look(
        rig,
        &[
            "--pmu=off",
            "--sve=off",
            "--pauth=off",
            "--pv=steal-time=off",
        ],
    );
    let features = section(&script, "features");
    let words: Vec<&str> = features.split_whitespace().collect();
    for word in ["sve", "sve2", "paca", "pacg"] {
        assert!(!words.contains(&word), "{word} in {features}");
    }
    assert!(!section(&script, "dmesg").contains("stolen"), "{script}");
    let counters = section(&script, "counters");
    assert!(!counters.contains("armv8_pmuv3"), "{counters}");
    assert!(
        !section(&script, "interrupts").contains("arm-pmu"),
        "{script}"
    );
}

#[test]
fn counters_count_where_they_are_given_and_are_undefined_where_not() {
    let Some(rig) = rig::any() else { return };
    if !has(rig, "pmu") {
        println!("skipped: this host's KVM has no counters for guests");
        return;
    }
    let program = Program::says_whether_cycles_count();
    for (option, text) in [("on", "it counts\n"), ("off", "undefined\n")] {
        let guest = Armlet::program(&program).option("--pmu", option).run();
        assert_eq!(guest.assert_status(0).text(), text, "--pmu {option}");
    }
}

#[test]
fn what_the_host_lacks_is_refused_before_a_vm_is_made() {
    let Some(rig) = rig::any() else { return };
    let program = Program::default().power_off();
    for (fact, option, value) in [
        ("pmu", "--pmu", "on"),
        ("sve", "--sve", "on"),
        ("pauth", "--pauth", "on"),
        ("steal_time", "--pv", "steal-time=on"),
    ] {
        let guest = Armlet::program(&program).option(option, value).run();
        if has(rig, fact) {
            guest.assert_status(0);
        } else {
            let wanted = format!("{option} {value} is not offered by this host's KVM");
            assert!(guest.assert_status(3).errors.contains(&wanted));
        }
    }
}

#[test]
fn a_guest_knows_what_time_others_took_from_it() {
    let Some(rig) = rig::any() else { return };
    if !has(rig, "steal_time") {
        println!("skipped: this host's kernel does not count it");
        return;
    }
    // The eighth number of the first line of /proc/stat, in hundredths of a second
    // (Linux, Documentation/filesystems/proc.rst).
    let script = "read -r _ _ _ _ _ _ _ _ stolen _ </proc/stat
turns=0
while [ $stolen -lt LEAST ] && [ $turns -lt MOST ]; do
    turns=$((turns + 1))
    read -r _ _ _ _ _ _ _ _ stolen _ </proc/stat
done
echo '== stolen'; echo $stolen
echo '== end'";
    let run = |option: &str, least: &str, most: &str| {
        let script = script.replace("LEAST", least).replace("MOST", most);
        let armlet = Armlet::script(rig, "Image", &script).alone();
        let armlet = armlet.option("--pin", "0").option("--pv", option);
        // As many turns as it takes to see some, or enough to have seen it.
        let script = beside_a_busy_thread(|| armlet.run().script());
        let stolen = section(&script, "stolen").trim().parse::<u64>();
        stolen.expect("a number")
    };
    let stolen = run("steal-time=on", "20", "100000000");
    println!("{stolen}0 ms were stolen");
    assert!(stolen >= 20);
    assert_eq!(run("steal-time=off", "1", "2000"), 0);
}

/// Does something while a thread takes what it can get of CPU 0.
fn beside_a_busy_thread<T>(work: impl FnOnce() -> T) -> T {
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut first = CpuSet::new();
            first.set(0);
            sched_setaffinity(None, &first).expect("CPU 0");
            while !done.load(Ordering::Relaxed) {
                std::hint::spin_loop();
            }
        });
        let result = work();
        done.store(true, Ordering::Relaxed);
        result
    })
}
