use crate::guest::{Armlet, section};
use crate::rig::{self, Rig};
use crate::software::Program;

const LOOK: &str = "
echo '== features'; grep -m 1 Features /proc/cpuinfo
echo '== counters'; ls /sys/bus/event_source/devices
echo '== dmesg'; dmesg -r | grep -i -E 'pmu|perfevents|SVE|auth'
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
    let counters = section(&script, "counters");
    let interrupts = section(&script, "interrupts");
    assert_eq!(counters.contains("armv8_pmuv3"), has(rig, "pmu"));
    if has(rig, "pmu") {
        let dmesg = section(&script, "dmesg");
        assert!(dmesg.contains("armv8_pmuv3 PMU driver"), "{dmesg}");
        // PPI 7, by its INTID.
        let words: Vec<&str> = interrupts.split_whitespace().collect();
        let line = words
            .windows(3)
            .any(|words| words == ["23", "Level", "arm-pmu"]);
        assert!(line, "{interrupts}");
    }

    let script = look(rig, &["--pmu=off", "--sve=off", "--pauth=off"]);
    let features = section(&script, "features");
    let words: Vec<&str> = features.split_whitespace().collect();
    for word in ["sve", "sve2", "paca", "pacg"] {
        assert!(!words.contains(&word), "{word} in {features}");
    }
    let counters = section(&script, "counters");
    assert!(!counters.contains("armv8_pmuv3"), "{counters}");
    assert_eq!(section(&script, "interrupts"), "");
}

#[test]
fn counters_count_where_they_are_given_and_are_undefined_where_not() {
    let Some(rig) = rig::any() else { return };
    if !has(rig, "pmu") {
        println!("skipped: this host's KVM has no counters for guests");
        return;
    }
    let counted = Program::default().print("it counts\n").power_off();
    let program = Program::default()
        .if_cycles_count(&counted)
        .print("it stands still\n")
        .power_off()
        .on_exception(Program::default().print("undefined\n").power_off());
    for (option, text) in [("on", "it counts\n"), ("off", "undefined\n")] {
        let guest = Armlet::program(&program).option("--pmu", option).run();
        assert_eq!(guest.assert_status(0).text(), text, "--pmu {option}");
    }
}

#[test]
fn what_the_host_lacks_is_refused_before_a_vm_is_made() {
    let Some(rig) = rig::any() else { return };
    let program = Program::default().power_off();
    for name in ["pmu", "sve", "pauth"] {
        let option = format!("--{name}");
        let guest = Armlet::program(&program).option(&option, "on").run();
        if has(rig, name) {
            guest.assert_status(0);
        } else {
            let wanted = format!("{option} on is not offered by this host's KVM");
            assert!(guest.assert_status(3).errors.contains(&wanted));
        }
    }
}
